from dataclasses import FrozenInstanceError, replace
from itertools import pairwise, product

import pytest
import torch
from chips import CHIPS, DOCS, nvidia, with_table

from gossamer.errors import InvalidOptionError, UnknownOptionError, UnknownStorageError
from gossamer.formats import storage_names
from gossamer.kernels.backends import attention_backend, product_backend
from gossamer.kernels.capability import CUDA_GENERATIONS
from gossamer.kernels.choice import Choice, as_text, choose
from gossamer.kernels.decode_support import READABLE
from gossamer.kernels.wishes import COMPUTES, WISHES

PARTS = {
    "compute": set(COMPUTES),
    "decode": {"none", "triton", "torch"},
    "merge": {"triton", "torch"},
    "attention": {"eight_bit", "cudnn", "flash", "efficient", "math"},
}


def reason_against(choice, part: str, option: str) -> str:
    (text,) = [each.text for each in choice.rejected if (each.part, each.option) == (part, option)]
    return text


# the compute type -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "expected"),
    [  # compute for fp32, fp16, bf16, int8, nf4 storage
        ("GTX 1080", "fp32 fp32 fp32 fp32 fp32"),
        ("V100", "fp32 fp16 fp16 fp16 fp16"),
        ("RTX 2080", "fp32 fp16 fp16 fp16 fp16"),
        ("A100", "fp32 fp16 bf16 bf16 bf16"),
        ("RTX 3090", "fp32 fp16 bf16 bf16 bf16"),
        ("RTX 4090", "fp32 fp16 bf16 fp8 fp8"),
        ("H200", "fp32 fp16 bf16 fp8 fp8"),
        ("B200", "fp32 fp16 bf16 fp8 fp8"),
        ("RTX 5090", "fp32 fp16 bf16 fp8 fp8"),
        ("MI300X", "fp32 fp16 bf16 bf16 bf16"),
        ("Apple M4", "fp32 fp16 bf16 bf16 bf16"),
        ("CPU", "fp32 fp32 fp32 fp32 fp32"),
    ],
)
def test_what_auto_means_on_each_chip(chip, expected):
    storages = ("fp32", "fp16", "bf16", "int8", "nf4")
    assert [choose(CHIPS[chip], storage).compute for storage in storages] == expected.split()


@pytest.mark.parametrize("chip", CHIPS)
def test_exact_never_rounds_activations_to_eight_bits(chip):
    for storage in ("bf16", "int8", "Q4_K", "nf4"):
        choice = choose(CHIPS[chip], storage, "exact")
        assert choice.compute in ("bf16", "fp16", "fp32")
        assert choice.activations == choice.compute


def test_int8_is_not_chosen_unmeasured_and_the_reason_says_so():
    assert "not measured on Ampere (8.6)" in reason_against(choose(CHIPS["RTX 3090"], "int8"), "compute", "int8")
    assert "590 to 700" in reason_against(choose(CHIPS["H200"], "int8"), "compute", "int8")
    wished = choose(CHIPS["RTX 3090"], "int8", "int8")
    assert (wished.compute, wished.decode, wished.product, wished.activations) == ("int8", "none", "int_mm", "bf16")
    assert choose(CHIPS["RTX 2080"], "nf4", "int8").activations == "fp16"


@pytest.mark.parametrize(
    ("chip", "wish"), [("RTX 3090", "fp8"), ("RTX 2080", "bf16"), ("V100", "int8"), ("MI300X", "fp8")]
)
def test_a_wish_that_cannot_be_met_is_refused_with_the_alternatives(chip, wish):
    with pytest.raises(InvalidOptionError) as caught:
        choose(CHIPS[chip], "int8", wish)
    assert wish in caught.value.what
    assert CHIPS[chip].chip in caught.value.why
    assert "fp32" in caught.value.next_step
    assert wish not in caught.value.next_step
    assert all(other in caught.value.what + caught.value.why + caught.value.next_step for other in COMPUTES)


def test_names_that_do_not_exist():
    with pytest.raises(UnknownOptionError, match="fp9"):
        choose(CHIPS["CPU"], "nf4", "fp9")
    with pytest.raises(UnknownStorageError, match="nf5"):
        choose(CHIPS["CPU"], "nf5")
    assert choose(CHIPS["CPU"], "q4_k").storage == "Q4_K"


def test_a_shape_that_eight_bit_products_cannot_take():
    assert choose(CHIPS["H200"], "int8", shape=(3072, 64)).compute == "fp8"
    narrow = choose(CHIPS["H200"], "int8", shape=(3072, 24))
    assert narrow.compute == "bf16"
    assert "3072 x 24" in reason_against(narrow, "compute", "fp8")
    with pytest.raises(InvalidOptionError, match="divisible by 16"):
        choose(CHIPS["H200"], "int8", "fp8", shape=(3072, 24))


def test_nothing_is_assumed_about_the_eight_bit_units_of_a_later_chip():
    later = nvidia("?", 14, 0)
    assert choose(later, "nf4").compute == "bf16"
    assert "newer than Blackwell (14.0)" in reason_against(choose(later, "nf4"), "compute", "fp8")


# every combination ----------------------------------------------------------------------------------------------------


def require_complete(choice: Choice, wish: str) -> None:
    """One reason for what was chosen in every part, and one against everything else."""
    assert wish in ("auto", "exact", choice.compute)
    assert [reason.part for reason in choice.reasons] == ["compute", "decode", "merge", "product", "attention"]
    assert all(reason.option == getattr(choice, reason.part) for reason in choice.reasons)
    assert all(reason.text for reason in (*choice.reasons, *choice.rejected))
    for part, options in PARTS.items():
        rejected = [reason.option for reason in choice.rejected if reason.part == part]
        assert sorted([*rejected, getattr(choice, part)]) == sorted(options)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_alternative_is_chosen_or_rejected_with_a_reason(chip):
    refused = set()
    for storage, wish in product(storage_names(), WISHES):
        try:
            choice = choose(CHIPS[chip], storage, wish)
        except InvalidOptionError:
            refused.add((storage, wish))
            continue
        require_complete(choice, wish)
        assert choice == choose(CHIPS[chip], storage, wish)
    able = {"fp8": CHIPS[chip].generation.fp8, "int8": CHIPS[chip].generation.int8}
    able |= {"bf16": CHIPS[chip].generation.bf16, "fp16": CHIPS[chip].generation.fp16}
    expected = {
        (storage, wish)
        for storage, wish in product(storage_names(), WISHES)
        if (chip != "CPU" and not able.get(wish, True)) or (chip == "Apple M4" and storage.startswith("fp8"))
    }
    assert refused == expected


def test_the_choice_asks_nothing_of_this_machine(monkeypatch):
    expected = choose(CHIPS["H200"], "nf4")

    def refuse(*arguments):
        raise AssertionError("the machine was asked")

    for name in ("is_available", "get_device_properties", "get_device_capability", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert choose(CHIPS["H200"], "nf4") == expected
    with pytest.raises(FrozenInstanceError):
        expected.compute = "bf16"


def test_the_generations_follow_each_other_without_gap_or_overlap():
    for earlier, later in pairwise(CUDA_GENERATIONS):
        assert earlier.last < later.first
        assert later.first[0] - earlier.last[0] <= 1
    for major, minor in product(range(3, 13), range(10)):
        named = [each.name for each in CUDA_GENERATIONS if each.first <= (major, minor) <= each.last]
        assert len(named) == 1, (major, minor)


def test_as_text_has_a_line_for_every_reason():
    choice = choose(CHIPS["RTX 3090, no Triton"], "nf4")
    lines = as_text(choice).splitlines()
    assert len(lines) == len(choice.reasons) + len(choice.rejected)
    assert lines[0].split()[:2] == ["compute", "bf16"]
    for reason in (*choice.reasons, *choice.rejected):
        assert any(line.startswith(reason.part) and line.endswith(reason.text) for line in lines)


# decoding -------------------------------------------------------------------------------------------------------------


def test_where_triton_is_missing_the_reference_decodes_and_the_reason_is_there():
    choice = choose(CHIPS["RTX 3090, no Triton"], "nf4")
    assert (choice.decode, choice.merge) == ("torch", "torch")
    assert reason_against(choice, "decode", "triton") == "Triton is not installed"
    assert "NVIDIA only" in reason_against(choose(CHIPS["MI300X"], "nf4"), "decode", "triton")
    assert "7.5" in reason_against(choose(CHIPS["V100"], "nf4"), "decode", "triton")


def test_storage_that_is_the_operand_already_is_decoded_only_under_adapters():
    for storage, wish in (("bf16", "bf16"), ("fp8", "fp8"), ("int8", "int8")):
        choice = choose(CHIPS["H200"], storage, wish)
        assert (choice.decode, choice.merge) == ("none", "triton")
    assert choose(CHIPS["H200"], "fp8_e5m2", "fp8").decode == "triton"


def test_formats_without_a_kernel_say_so():
    for storage in storage_names():
        choice = choose(CHIPS["H200"], storage, "bf16")
        assert choice.merge == ("triton" if storage in READABLE else "torch")
    assert choose(CHIPS["H200"], "nf4", "bf16", shape=(64, 96)).merge == "torch"
    assert "blocks of 64" in reason_against(choose(CHIPS["H200"], "nf4", "bf16", shape=(64, 96)), "merge", "triton")
    assert "IQ1_S" in reason_against(choose(CHIPS["H200"], "IQ1_S"), "merge", "triton")


def test_fp8_bytes_cannot_be_on_an_apple_gpu():
    with pytest.raises(InvalidOptionError, match="Apple"):
        choose(CHIPS["Apple M4"], "fp8")


# products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "changes", "expected"),
    [
        ("RTX 4090", {}, "scaled_mm_rowwise"),
        ("RTX 4090", {"torch_version": (2, 11)}, "scaled_mm_tensorwise"),
        ("RTX 4090", {"torch_version": (2, 12)}, "scaled_mm_rowwise"),
        ("RTX 4090", {"system": "Windows"}, "scaled_mm_tensorwise"),
        ("H200", {"torch_version": (2, 11)}, "scaled_mm_rowwise"),
        ("H200", {"cuda_version": (12, 8)}, "scaled_mm_rowwise"),
        ("H200", {"system": "Windows"}, "scaled_mm_rowwise"),
        ("H200", {"system": "Windows", "cuda_version": (12, 8)}, "scaled_mm_tensorwise"),
        ("B200", {}, "scaled_mm_rowwise"),
        ("RTX 5090", {}, "scaled_mm_rowwise"),
        ("RTX 5090", {"system": "Windows"}, "scaled_mm_tensorwise"),
        ("RTX 5090", {"torch_version": (2, 10)}, "scaled_mm_tensorwise"),
        ("CPU", {}, "reference"),
    ],
)
def test_which_fp8_product(chip, changes, expected):
    picked = product_backend(replace(CHIPS[chip], **changes), "fp8")
    assert picked.name == expected
    assert len(picked.rejected) == 2


# attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "changes", "activations", "head_dim", "expected"),
    [
        ("H200", {}, "bf16", 128, "cudnn"),
        ("H200", {}, "bf16", 32, "cudnn"),
        ("H200", {}, "bf16", 256, "cudnn"),
        ("H200", {}, "bf16", 100, "flash"),
        ("H200", {}, "bf16", 264, "efficient"),
        ("H200", {}, "fp32", 128, "efficient"),
        ("H200", {}, "fp32", 30, "math"),
        ("H200", {"cudnn_version": 91002}, "bf16", 128, "flash"),
        ("H200", {"cudnn_version": None}, "fp16", 128, "flash"),
        ("B200", {}, "bf16", 128, "cudnn"),
        ("B200", {}, "bf16", 256, "flash"),
        ("RTX 5090", {}, "bf16", 128, "flash"),
        ("RTX 4090", {"flash": False}, "bf16", 128, "efficient"),
        ("RTX 2080", {}, "fp16", 128, "efficient"),
        ("RTX 2080", {}, "bf16", 128, "math"),
        ("GTX 1080", {}, "fp32", 128, "efficient"),
        ("MI300X", {}, "bf16", 128, "flash"),
        ("MI300X", {"flash": False}, "bf16", 128, "math"),
        ("Apple M4", {}, "fp16", 128, "math"),
        ("CPU", {}, "fp32", 128, "flash"),
    ],
)
def test_which_attention(chip, changes, activations, head_dim, expected):
    picked = attention_backend(replace(CHIPS[chip], **changes), activations, head_dim, compute=activations)
    assert picked.name == expected
    assert {reason.option for reason in picked.rejected} | {expected} == PARTS["attention"]


@pytest.mark.parametrize(
    ("chip", "changes", "arguments", "words"),
    [
        ("H200", {}, {}, None),
        ("H200", {"triton": "3.8.0"}, {}, None),
        ("H200", {"cudnn_version": None}, {}, None),
        ("H200", {}, {"wish": "exact"}, "exact attention was asked for"),
        ("H200", {}, {"compute": "bf16"}, "the products around it run in bf16"),
        ("H200", {}, {"compute": "bf16 and fp8"}, "run in bf16 and fp8"),
        ("H200", {}, {"compute": "int8"}, "run in int8"),
        ("H200", {}, {"activations": "fp16"}, "not fp16"),
        ("H200", {}, {"head_dim": 32}, "heads of 128, not 32"),
        ("H200", {}, {"head_dim": 256}, "not 256"),
        ("H200", {"triton": None, "triton_obstacle": "Triton is not installed"}, {}, "not installed"),
        ("H200", {"triton": "3.5.1"}, {}, "this is 3.5.1"),
        ("H200", {"triton": "3.9.0"}, {}, "this is 3.9.0"),
        ("H200", {"triton": "3.10.0"}, {}, "this is 3.10.0"),
        ("H200", {"triton": "of unknown version"}, {}, "of unknown version"),
        ("H200", {"compute_capability": (9, 2)}, {}, "Hopper (9.2)"),
        ("B200", {}, {}, "Blackwell (10.0)"),
        ("RTX 4090", {}, {}, "Ada (8.9)"),
        ("MI300X", {}, {}, "AMD"),
        ("CPU", {}, {}, "CPU"),
    ],
)
def test_when_attention_is_in_eight_bits(chip, changes, arguments, words):
    given = {"activations": "bf16", "head_dim": 128, "compute": "fp8", **arguments}
    picked = attention_backend(replace(CHIPS[chip], **changes), **given)
    if words is None:
        assert picked.name == "eight_bit"
        assert "449" in picked.reason.text
    else:
        assert picked.name in ("cudnn", "flash", "math")
        (text,) = [reason.text for reason in picked.rejected if reason.option == "eight_bit"]
        assert words in text


def test_attention_follows_head_dim_products_and_wish():
    assert choose(CHIPS["H200"], "nf4").attention == "eight_bit"
    assert choose(CHIPS["H200"], "nf4", "bf16").attention == "cudnn"
    assert choose(CHIPS["H200"], "nf4", "exact").attention == "cudnn"
    assert choose(CHIPS["H200"], "nf4", attention="exact").attention == "cudnn"
    assert choose(CHIPS["H200"], "bf16").attention == "cudnn"
    assert choose(CHIPS["H200"], "nf4", head_dim=32).attention == "cudnn"
    assert choose(CHIPS["H200"], "nf4", head_dim=264).attention == "efficient"
    with pytest.raises(UnknownOptionError, match="precise"):
        choose(CHIPS["H200"], "nf4", attention="precise")


# the page -------------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_table_of_the_function():
    text = DOCS.read_text()
    assert with_table(text) == text, "renew it with `python tests/kernels/chips.py`"
