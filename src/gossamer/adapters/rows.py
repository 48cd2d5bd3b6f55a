"""Ranges of rows: which rows of a fused module one of its linears has."""

from __future__ import annotations

import torch

Rows = tuple[tuple[int, int], ...]  # ranges (start, stop), in order


def take_rows(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Those rows of (rows, ...), in the order of the ranges; a view where there is one range."""
    pieces = [values[start:stop] for start, stop in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def height_of(rows: Rows) -> int:
    """How many rows the ranges have."""
    return sum(stop - start for start, stop in rows)


def rows_of_rows(kept: Rows, rows: Rows) -> Rows:
    """Ranges of what the ranges `kept` lead to, as ranges of the whole; neighbours become one."""
    found: list[tuple[int, int]] = []
    for start, stop in rows:
        done = 0
        for first, last in kept:
            begin, end = max(start - done, 0), min(stop - done, last - first)
            done += last - first
            if begin >= end:
                continue
            if found and found[-1][1] == first + begin:
                found[-1] = (found[-1][0], first + end)
            else:
                found.append((first + begin, first + end))
    return tuple(found)
