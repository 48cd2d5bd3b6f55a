"""The one linear layer, its stored weight, what adapters add to it, and groups of layers that run as one."""

from gossamer.layers.dense_terms import Decomposed, Difference, Hadamard, Kronecker
from gossamer.layers.execution import Buffers, Execution, Workspace
from gossamer.layers.group import LinearGroup
from gossamer.layers.linear import QuantLinear
from gossamer.layers.low_rank import LowRank
from gossamer.layers.stored import StoredWeight
from gossamer.layers.strength import Strength
from gossamer.layers.term import Term

__all__ = [
    "Buffers",
    "Decomposed",
    "Difference",
    "Execution",
    "Hadamard",
    "Kronecker",
    "LinearGroup",
    "LowRank",
    "QuantLinear",
    "StoredWeight",
    "Strength",
    "Term",
    "Workspace",
]
