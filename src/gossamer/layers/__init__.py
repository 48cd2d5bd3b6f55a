"""The one linear layer, its stored weight, its low-rank terms, and groups of layers that run as one."""

from gossamer.layers.execution import Execution, Workspace
from gossamer.layers.group import LinearGroup
from gossamer.layers.linear import QuantLinear
from gossamer.layers.low_rank import LowRank
from gossamer.layers.stored import StoredWeight

__all__ = ["Execution", "LinearGroup", "LowRank", "QuantLinear", "StoredWeight", "Workspace"]
