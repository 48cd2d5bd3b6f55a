"""What a user may wish for the type of products. Light: option tables and help texts import it without torch."""

from __future__ import annotations

from typing import Literal

from gossamer.errors import UnknownOptionError

Compute = Literal["fp8", "int8", "bf16", "fp16", "fp32"]

COMPUTES: tuple[Compute, ...] = ("fp8", "int8", "bf16", "fp16", "fp32")
WISHES = ("auto", "exact", *COMPUTES)


def require_wish(wish: str) -> str:
    """The wish, if there is one of that name."""
    if wish not in WISHES:
        raise UnknownOptionError(
            f"There is no compute type called {wish!r}.", f"The wishes are: {', '.join(WISHES)}.", "Use 'auto'."
        )
    return wish
