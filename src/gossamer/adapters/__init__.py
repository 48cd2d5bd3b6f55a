"""Adapters: one canonical form for every file spelling; attach to a quantised model, scale, detach without a trace."""

from gossamer.adapters.adapter import Adapter
from gossamer.adapters.attach import attach, base_spec, detach, set_scale
from gossamer.adapters.cost import Cost
from gossamer.adapters.fuse import fuse, fused_adapters, unfuse
from gossamer.adapters.fuse_report import FuseReport
from gossamer.adapters.read import read_adapter
from gossamer.adapters.records import Attachment, attached
from gossamer.adapters.terms import (
    BiasTerm,
    DecomposedTerm,
    DifferenceTerm,
    HadamardTerm,
    KroneckerTerm,
    LinearTerm,
    LowRankTerm,
    Matrix,
)
from gossamer.adapters.write import write_adapter

__all__ = [
    "Adapter",
    "Attachment",
    "BiasTerm",
    "Cost",
    "DecomposedTerm",
    "DifferenceTerm",
    "FuseReport",
    "HadamardTerm",
    "KroneckerTerm",
    "LinearTerm",
    "LowRankTerm",
    "Matrix",
    "attach",
    "attached",
    "base_spec",
    "detach",
    "fuse",
    "fused_adapters",
    "read_adapter",
    "set_scale",
    "unfuse",
    "write_adapter",
]
