"""What a user may wish for products and attention. Light: option tables and help texts import it without torch."""

from __future__ import annotations

from typing import Literal

from gossamer.errors import UnknownOptionError

Compute = Literal["fp8", "int8", "bf16", "fp16", "fp32"]

COMPUTES: tuple[Compute, ...] = ("fp8", "int8", "bf16", "fp16", "fp32")
WISHES = ("auto", "exact", *COMPUTES)
ATTENTION_WISHES = ("auto", "exact")  # of attention; "exact" rounds nothing below the type of the activations


def require_wish(wish: str) -> str:
    """The wish, if there is one of that name."""
    if wish not in WISHES:
        raise UnknownOptionError(
            f"There is no compute type called {wish!r}.", f"The wishes are: {', '.join(WISHES)}.", "Use 'auto'."
        )
    return wish


def require_attention_wish(wish: str) -> str:
    """The wish, if there is one of that name for attention."""
    if wish not in ATTENTION_WISHES:
        raise UnknownOptionError(
            f"There is no kind of attention called {wish!r}.",
            f"The wishes are: {', '.join(ATTENTION_WISHES)}.",
            "Use 'auto'.",
        )
    return wish
