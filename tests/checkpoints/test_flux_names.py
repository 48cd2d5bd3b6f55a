"""The naming tables against diffusers' own conversion of a BFL checkpoint.

Each tensor's rows carry their own number (shape (rows, 1)), so the test sees where every row goes.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from gossamer.checkpoints.flux_names import bfl_linears, bfl_norms, kohya_name

WIDTH = 3072  # diffusers' conversion knows no other
HEIGHTS = {"img_mod.lin": 6, "txt_mod.lin": 6, "modulation.lin": 3, "img_mlp.0": 4, "txt_mlp.0": 4}


def rows_of(bfl, parts):
    ends = [stop for part in parts for _, stop in part.rows]
    height = next((height for ending, height in HEIGHTS.items() if bfl.endswith(ending)), 1)
    return torch.arange(max(ends, default=height * WIDTH), dtype=torch.int32)


@pytest.mark.parametrize("guidance", [True, False])
def test_rows_go_where_diffusers_puts_them(guidance):
    linears, norms = bfl_linears(2, 3, WIDTH, guidance), bfl_norms(2, 3)
    checkpoint = {}
    for bfl, parts in linears.items():
        rows = rows_of(bfl, parts)
        checkpoint |= {f"{bfl}.weight": rows[:, None].clone(), f"{bfl}.bias": rows.clone()}
    checkpoint |= {bfl: torch.full((1,), number) for number, bfl in enumerate(norms)}
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    for bfl, parts in linears.items():
        for part in parts:
            rows = rows_of(bfl, parts)
            moved = torch.cat([rows[start:stop] for start, stop in part.rows]) if part.rows else rows
            assert torch.equal(expected.pop(f"{part.name}.weight")[:, 0], moved), part.name
            assert torch.equal(expected.pop(f"{part.name}.bias"), moved), part.name
    for bfl, name in norms.items():
        assert torch.equal(expected.pop(name), checkpoint[bfl])
    assert not expected


def test_parts_cover_every_row_once():
    for bfl, parts in bfl_linears(1, 1, 8, True).items():
        ranges = sorted(rows for part in parts for rows in part.rows)
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)], bfl


def test_kohya_names_are_unique():
    linears = bfl_linears(19, 38, WIDTH, True)
    assert len({kohya_name(bfl) for bfl in linears}) == len(linears) == 504 - 2 * 2 * 19 - 3 * 38
    assert "double_blocks_0_img_attn_qkv" in {kohya_name(bfl) for bfl in linears}
