import pytest

from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.kernels.capability import Capability
from gossamer.memory.byte_sizes import parse_bytes, show_bytes
from gossamer.memory.card_table import CARDS
from gossamer.memory.cards import card_of, find_card

# Rates as NVIDIA's whitepapers state them, in 1e12 a second, dense and with float32 sums.
WHITEPAPERS = {
    "RTX 2080 Ti": ("fp16", 53.8),
    "RTX 3090": ("bf16", 71),
    "RTX 3080 10GB": ("int8", 238),
    "RTX 4090": ("fp8", 330.3),
    "RTX 4080": ("bf16", 97.5),
    "RTX 5090": ("bf16", 209.5),
    "RTX 5080": ("int8", 450.2),
}


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"),
        ("3060", "RTX 3060 12GB"),
        ("rtx4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"),
        ("NVIDIA GeForce RTX 3050 Ti Laptop GPU", "RTX 3050 Ti Laptop"),
        ("geforce rtx 3080 ti", "RTX 3080 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla T4", "T4"),
        ("NVIDIA H200", "H200"),
        ("gtx 1660 super", "GTX 1660 Super"),
    ],
)
def test_names_as_people_and_drivers_write_them(typed, name):
    assert find_card(typed).name == name


@pytest.mark.parametrize("name", WHITEPAPERS)
def test_rates_are_those_of_the_whitepapers(name):
    compute, rate = WHITEPAPERS[name]
    assert find_card(name).rate(compute) == pytest.approx(rate * 1e12, rel=0.005)


def test_every_name_means_one_card_and_every_card_is_whole():
    spellings = [spelling for card in CARDS for spelling in (card.name, *card.aliases)]
    for card in CARDS:
        for spelling in (card.name, *card.aliases):
            assert find_card(spelling) is card, spelling
        generation = card.capability.generation
        assert bool(card.bf16) == generation.bf16
        assert bool(card.fp8) == generation.fp8
        assert card.source
        assert 3e9 < card.memory_bytes < 2e11
        assert 1e11 < card.bandwidth < 1e13
        assert card.fp8 in (0, pytest.approx(2 * card.bf16, rel=0.03))
    assert len(set(spellings)) == len(spellings)


def test_bus():
    assert find_card("RTX 3060").bus == pytest.approx(31.5e9, rel=1e-3)  # 4.0 x16
    assert find_card("RTX 4060").bus == pytest.approx(15.75e9, rel=1e-3)  # 4.0 x8
    assert find_card("RTX 5090").bus == pytest.approx(63e9, rel=1e-3)  # 5.0 x16


def test_unknown_card_names_the_nearest():
    with pytest.raises(UnknownOptionError) as error:
        find_card("RTX 4900")
    assert "RTX 4090" in str(error.value)


def machine(name: str, capability: tuple[int, int], memory: int = 10 * 10**9) -> Capability:
    return Capability("cuda", name, "Linux", (2, 11), capability, (13, 0), 91900, "3.6.0", None, True, memory)


def test_the_card_here_has_the_memory_that_is_here():
    card = card_of(machine("NVIDIA GeForce RTX 4060 Ti", (8, 9), 17 * 10**9), 34)
    assert card.name == "RTX 4060 Ti 8GB"
    assert card.memory_bytes == 17 * 10**9


def test_a_card_that_is_not_listed_is_scaled_from_its_generation():
    card = card_of(machine("NVIDIA RTX 4000 SFF Ada Generation", (8, 9)), 48)
    nearest = find_card("RTX 4070")  # 46 multiprocessors
    assert card.bf16 == pytest.approx(nearest.bf16 * 48 / 46)
    assert card.name == "NVIDIA RTX 4000 SFF Ada Generation"
    assert "RTX 4070" in card.source


def test_what_cannot_be_planned_for():
    with pytest.raises(InvalidOptionError):
        card_of(Capability("mps", "Apple arm64", "Darwin", (2, 13)), 10)
    with pytest.raises(InvalidOptionError):
        card_of(machine("Tesla V100", (7, 0)), 80)
    with pytest.raises(InvalidOptionError):
        find_card("RTX 3060").rate("fp8")


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6e9), ("6GiB", 6 * 2**30), ("5.5G", 5.5e9), ("800 MB", 8e8), ("1TiB", 2**40), (".5g", 5e8), ("6gb", 6e9)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["6", "", "GB", "-6GB", "0GB", "6XB", "6GB6", "nan GB", "1e9GB", "9999999999TB"])
def test_sizes_that_are_none(text):
    with pytest.raises(InvalidOptionError) as error:
        parse_bytes(text)
    assert "GiB is 2^30" in error.value.why


def test_show():
    assert show_bytes(6e9) == "6.00 GB"
    assert show_bytes(66e6) == "66 MB"
