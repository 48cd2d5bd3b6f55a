"""The one linear layer, its stored weight and its low-rank terms."""

from gossamer.layers.linear import QuantLinear
from gossamer.layers.low_rank import LowRank
from gossamer.layers.stored import StoredWeight

__all__ = ["LowRank", "QuantLinear", "StoredWeight"]
