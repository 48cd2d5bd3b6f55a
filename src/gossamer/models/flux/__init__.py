"""FLUX.1's forward of our own, a drop-in for diffusers' FluxTransformer2DModel, with a seam at the loop over blocks.

Read `blocks` first, then `seam`, then `transformer`.
"""

from gossamer.models.flux.graph import GraphedSteps
from gossamer.models.flux.operators import Operators
from gossamer.models.flux.prepare import Prepared, prepare
from gossamer.models.flux.prepass import prepass
from gossamer.models.flux.seam import BlockRunner, BlockState, BlockStep, run_block
from gossamer.models.flux.step import StepInputs, run_step
from gossamer.models.flux.takeover import from_diffusers
from gossamer.models.flux.transformer import FluxTransformer

__all__ = [
    "BlockRunner",
    "BlockState",
    "BlockStep",
    "FluxTransformer",
    "GraphedSteps",
    "Operators",
    "Prepared",
    "StepInputs",
    "from_diffusers",
    "prepare",
    "prepass",
    "run_block",
    "run_step",
]
