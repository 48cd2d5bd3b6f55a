"""One low-rank term of a linear layer: scale * up @ down, and a bias that comes with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gossamer.errors import AdapterError


@dataclass(eq=False)
class LowRank:
    """An adapter's share of one layer.

    `down` is (rank, in), `up` is (out, rank), `bias` is (out,) or None. `scale` multiplies all of it and may change
    between any two calls; 0 switches the term off.
    """

    name: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None
    _row_bound: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.down.shape[0] != self.up.shape[1]:
            raise AdapterError(
                f"Adapter {self.name!r} has factors that do not multiply.",
                f"down is {tuple(self.down.shape)} and up is {tuple(self.up.shape)}; "
                "they have to be (rank, in) and (out, rank) with one rank.",
                "Check that both factors come from the same layer of the same file.",
            )
        if self.bias is not None and self.bias.shape != (self.out_features,):
            raise AdapterError(
                f"Adapter {self.name!r} has a bias that does not fit its factors.",
                f"The bias is {tuple(self.bias.shape)}; up has {self.out_features} rows.",
                "Check that the bias comes from the same layer as the factors.",
            )

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of down."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of up."""
        return self.up.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and the bias."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that make up this term."""
        return (self.down, self.up) if self.bias is None else (self.down, self.up, self.bias)

    def move(self, device: torch.device | str) -> None:
        """Put the tensors on a device, their types unchanged."""
        self.down, self.up = self.down.to(device), self.up.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)

    def add_to_weight(self, weight: torch.Tensor) -> None:
        """Add scale * up @ down to a float32 weight (out, in), in place."""
        weight.addmm_(self.up.float(), self.down.float(), alpha=self.scale)

    def row_bound(self) -> torch.Tensor:
        """Float32 (out,): no value of up @ down is larger in its row, by Cauchy and Schwarz. Computed once."""
        if self._row_bound is None or self._row_bound.device != self.up.device:
            self._row_bound = self.up.float().norm(dim=1) * self.down.float().norm(dim=0).max()
        return self._row_bound

    def scaled_bias(self) -> torch.Tensor:
        """scale * bias in float32 (out,); zeros where the adapter brings no bias."""
        if self.bias is None:
            return torch.zeros(self.out_features, dtype=torch.float32, device=self.up.device)
        return self.scale * self.bias.float()
