"""What is written comes back: every spelling, every kind of content, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gossamer.adapters import Adapter, KroneckerTerm, LowRankTerm, Matrix, read_adapter, write_adapter
from gossamer.adapters.fused import join_terms, split_term
from gossamer.adapters.rows import take_rows
from gossamer.checkpoints.flux_names import Part
from gossamer.checkpoints.safetensors_file import read_header
from gossamer.errors import AdapterError, OutputError, UnknownOptionError

FUSED = (Part("q", ((0, 4),)), Part("k", ((4, 8),)), Part("mlp", ((8, 20),)))


def change_of(term):
    """The change of weight, and of bias, in float64."""
    bias = torch.zeros(term.shape[0]) if term.bias is None else term.bias
    return term.multiplier * term.up.double() @ term.down.double(), term.multiplier * bias.double()


def assert_same(found, expected):
    assert found.terms.keys() == expected.terms.keys()
    for name, term in expected.terms.items():
        other = found.terms[name]
        assert torch.equal(other.down, term.down), name
        assert torch.equal(other.up, term.up), name
        assert other.multiplier == pytest.approx(term.multiplier, rel=1e-7)
        assert (other.bias is None) == (term.bias is None)
        assert term.bias is None or torch.equal(other.bias, term.bias)
    assert found.replacements.keys() == expected.replacements.keys()
    assert all(torch.equal(found.replacements[name], values) for name, values in expected.replacements.items())


@pytest.mark.parametrize("multiplier", [1.0, 0.5, 1 / 3])
@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "bfl"])
def test_round_trip_of_every_linear(make_adapter, spec, tmp_path, spelling, multiplier):
    """The parts of fused modules have downs of their own here, and still come back as they were."""
    adapter = make_adapter(rank=3, multiplier=multiplier)
    path = tmp_path / "a.safetensors"
    write_adapter(adapter, path, spelling, {"base_model": "tiny"})
    found = read_adapter(path, spec)
    assert_same(found, adapter)
    assert (found.spelling, found.base_model, len(found.sha256)) == (spelling, "tiny", 64)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("spelling", ["diffusers", "bfl"])
def test_round_trip_of_a_control_lora(control, spec, tmp_path, spelling):
    path = tmp_path / "control.safetensors"
    write_adapter(control, path, spelling)
    found = read_adapter(path, spec)
    assert_same(found, control)
    assert found.is_control
    assert found.input_channels == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "bfl"])
def test_types_are_kept(make_adapter, spec, tmp_path, spelling, dtype):
    source = make_adapter()
    terms = {name: LowRankTerm(term.down.to(dtype), term.up.to(dtype)) for name, term in source.terms.items()}
    path = tmp_path / "a.safetensors"
    write_adapter(Adapter(spec, terms), path, spelling)
    found = read_adapter(path, spec)
    assert {term.down.dtype for term in found.terms.values()} == {dtype}
    assert {term.up.dtype for term in found.terms.values()} == {dtype}


@pytest.mark.parametrize("spelling", ["kohya", "bfl"])
def test_a_shared_down_is_written_once(make_adapter, spec, tmp_path, spelling):
    source = make_adapter(rank=4)
    down = torch.randn(4, 256)
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    adapter = Adapter(spec, {name: LowRankTerm(down, source.terms[name].up) for name in names})
    path = tmp_path / "a.safetensors"
    write_adapter(adapter, path, spelling)
    assert {entry.shape for entry in read_header(path).tensors.values()} >= {(4, 256), (768, 4)}
    assert_same(read_adapter(path, spec), adapter)


def test_only_one_part_of_a_fused_module(make_adapter, spec, tmp_path):
    adapter = make_adapter(lambda name: name.endswith((".attn.to_k", "proj_mlp")))
    path = tmp_path / "a.safetensors"
    write_adapter(adapter, path, "kohya")
    assert_same(read_adapter(path, spec), adapter)


def test_parts_of_different_types(make_adapter, spec, tmp_path):
    terms = dict(make_adapter(lambda name: name.startswith("transformer_blocks.0.attn.to_")).terms)
    first = terms["transformer_blocks.0.attn.to_q"]
    terms["transformer_blocks.0.attn.to_q"] = LowRankTerm(first.down.half(), first.up.bfloat16())
    path = tmp_path / "a.safetensors"
    write_adapter(Adapter(spec, terms), path, "kohya")
    found = read_adapter(path, spec)
    for name, term in terms.items():
        assert torch.equal(found.terms[name].up, term.up.float())
        assert torch.equal(found.terms[name].down, term.down.float())


def test_parts_of_different_strength(make_adapter, spec, tmp_path):
    terms = dict(make_adapter(lambda name: name.startswith("transformer_blocks.0.attn.to_"), bias=True).terms)
    weaker = terms["transformer_blocks.0.attn.to_q"]
    terms["transformer_blocks.0.attn.to_q"] = LowRankTerm(weaker.down, weaker.up, 0.3, weaker.bias)
    path = tmp_path / "a.safetensors"
    write_adapter(Adapter(spec, terms), path, "bfl")
    found = read_adapter(path, spec)
    for name, term in terms.items():
        for ours, theirs in zip(change_of(found.terms[name]), change_of(term), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    multipliers=st.lists(st.sampled_from((1.0, 0.5, 2.0)), min_size=3, max_size=3),
    with_bias=st.booleans(),
)
def test_joining_and_splitting_change_nothing(ranks, multipliers, with_bias):
    heights = (4, 4, 12)
    terms = {
        part.name: LowRankTerm(
            torch.randn(rank, 6), torch.randn(height, rank), multiplier, torch.randn(height) if with_bias else None
        )
        for part, rank, height, multiplier in zip(FUSED, ranks, heights, multipliers, strict=True)
        if rank
    }
    joined = join_terms(terms, FUSED)
    assert (joined is None) == (not terms)
    split = {} if joined is None else split_term(joined, FUSED)
    assert split.keys() == terms.keys()
    for name, term in terms.items():
        for ours, theirs in zip(change_of(split[name]), change_of(term), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert split[name].rank == term.rank


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1000), holes=st.integers(0, 8), with_bias=st.booleans())
def test_splitting_any_fused_term_keeps_its_change(seed, holes, with_bias):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(20, 5, generator=generator)
    for _ in range(holes):
        part = FUSED[int(torch.randint(3, (), generator=generator))]
        ((start, stop),) = part.rows
        up[start:stop, int(torch.randint(5, (), generator=generator))] = 0
    bias = torch.randn(20, generator=generator) if with_bias else None
    fused = LowRankTerm(torch.randn(5, 6, generator=generator), up, 0.5, bias)
    weight, offset = change_of(fused)
    split = split_term(fused, FUSED)
    for part in FUSED:
        ((start, stop),) = part.rows
        expected = weight[start:stop], offset[start:stop]
        found = (
            change_of(split[part.name]) if part.name in split else (torch.zeros(1, 1).double(), torch.zeros(1).double())
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.expand_as(theirs), theirs, rtol=1e-6, atol=1e-8)


def test_a_part_with_nothing_but_a_bias_keeps_it():
    up = torch.zeros(20, 5)
    up[:4] = 1
    split = split_term(LowRankTerm(torch.ones(5, 6), up, 1.0, torch.arange(20.0)), FUSED)
    assert split["k"].rank == 1
    assert not split["k"].up.any()
    assert torch.equal(split["k"].bias, torch.arange(4.0, 8.0))


def test_real_keys(make_adapter, control, tmp_path):
    adapter = make_adapter(multiplier=0.5)
    expected = {
        "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "bfl": "img_in.lora_A.weight",
    }
    for spelling, key in expected.items():
        path = tmp_path / "a.safetensors"
        write_adapter(adapter, path, spelling)
        keys = load_file(path)
        assert key in keys
        assert sum(name.endswith(".alpha") for name in keys) * 3 == len(keys), "alpha differs from the rank everywhere"
    write_adapter(control, path, "bfl")
    keys = load_file(path)
    assert keys["img_in.lora_A.weight"].shape == (3, 128)
    assert {"img_in.lora_B.bias", "double_blocks.0.img_attn.norm.query_norm.scale"} <= keys.keys()
    assert not any(key.endswith(".alpha") for key in keys), "BFL's files have none"


def test_what_kohya_cannot_say(control, make_adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    for adapter, what in ((make_adapter(bias=True), "a bias"), (make_adapter(norms=True), "norm scales")):
        with pytest.raises(AdapterError, match=what):
            write_adapter(adapter, path, "kohya")
    assert not path.exists()


def test_places_that_cannot_be_written(make_adapter, tmp_path):
    adapter = make_adapter(lambda name: name == "proj_out")
    with pytest.raises(OutputError, match="ends in"):
        write_adapter(adapter, tmp_path / "a.bin")
    with pytest.raises(OutputError, match="folder exists"):
        write_adapter(adapter, tmp_path / "none" / "a.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OutputError):
        write_adapter(adapter, tmp_path / "taken.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.safetensors"], "nothing half-written is left"


def test_an_unknown_spelling(make_adapter, tmp_path):
    with pytest.raises(UnknownOptionError, match="diffusers, kohya, bfl"):
        write_adapter(make_adapter(), tmp_path / "a.safetensors", "a1111")


@settings(max_examples=80, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True),
    order=st.permutations(range(3)),
    rows=st.tuples(st.integers(0, 11), st.integers(0, 11)),
)
def test_rows_of_rows_of_a_kronecker_product(cuts, order, rows):
    """Any ranges of any reordering of the rows are those of the matrix itself."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 2, generator=generator), torch.randn(4, 5, generator=generator)
    stops = [0, *sorted(cuts), 12]
    ranges = [(stops[i], stops[i + 1]) for i in order if stops[i] < stops[i + 1]]
    inner = ((min(rows), max(rows) + 1),)
    term = KroneckerTerm(Matrix(left), Matrix(right)).rows(tuple(ranges)).rows(inner)
    matrix = take_rows(take_rows(torch.kron(left, right), tuple(ranges)), inner)
    assert term.shape == matrix.shape
    assert torch.equal(take_rows(torch.kron(left, right), term.kept), matrix)
