"""The table of cards, from GTX 1650 to B200. Every row names where its figures are from.

GeForce rows give multiprocessors, boost clock, bandwidth and bus as NVIDIA's whitepapers and product pages state them;
their rates follow from operations a clock and multiprocessor, which the whitepapers state by generation. The boost
clock of a laptop card depends on the power that a maker allows: the middle of NVIDIA's range is taken. Rows of server
cards give the rates of their data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.memory.card import Card

GIB = 2**30


@dataclass(frozen=True)
class Series:
    """A GeForce generation: dense operations of one multiprocessor in a clock, fp16 and fp8 with float32 sums."""

    compute_capability: tuple[int, int]
    fp16: int
    bf16: int
    fp8: int
    int8: int
    fp32: int
    pcie: int
    source: str


PAGES = "and product pages"
TURING = f"NVIDIA Turing architecture whitepaper, appendix A, {PAGES}"

# The GTX 16 cards have no tensor cores; with float32 sums their fp16 is as fast as float32 at best.
GTX16 = Series((7, 5), 128, 0, 0, 512, 128, 3, TURING)
RTX20 = Series((7, 5), 512, 0, 0, 2048, 128, 3, TURING)
RTX30 = Series((8, 6), 512, 512, 0, 2048, 256, 4, f"NVIDIA Ampere GA102 architecture whitepaper, appendix A, {PAGES}")
RTX40 = Series((8, 9), 512, 512, 1024, 2048, 256, 4, f"NVIDIA Ada architecture whitepaper, appendix A, {PAGES}")
RTX50 = Series((12, 0), 512, 512, 1024, 2048, 256, 5, f"NVIDIA RTX Blackwell architecture whitepaper {PAGES}")

# name, memory in GiB, multiprocessors, boost clock in MHz, bandwidth in GB/s, bus lanes, aliases
Row = tuple[str, int, int, int, float, int, tuple[str, ...]]

GEFORCE: tuple[tuple[Series, tuple[Row, ...]], ...] = (
    (
        GTX16,
        (
            ("GTX 1650", 4, 14, 1665, 128, 16, ("1650", "GTX 1650 4GB")),
            ("GTX 1650 Super", 4, 20, 1725, 192, 16, ("1650 Super",)),
            ("GTX 1660", 6, 22, 1785, 192, 16, ("1660", "GTX 1660 6GB")),
            ("GTX 1660 Super", 6, 22, 1785, 336, 16, ("1660 Super",)),
            ("GTX 1660 Ti", 6, 24, 1770, 288, 16, ("1660 Ti",)),
        ),
    ),
    (
        RTX20,
        (
            ("RTX 2060 6GB", 6, 30, 1680, 336, 16, ("2060", "RTX 2060")),
            ("RTX 2060 12GB", 12, 34, 1650, 336, 16, ("2060 12GB",)),
            ("RTX 2060 Super", 8, 34, 1650, 448, 16, ("2060 Super",)),
            ("RTX 2070", 8, 36, 1620, 448, 16, ("2070",)),
            ("RTX 2070 Super", 8, 40, 1770, 448, 16, ("2070 Super",)),
            ("RTX 2080", 8, 46, 1710, 448, 16, ("2080",)),
            ("RTX 2080 Super", 8, 48, 1815, 496, 16, ("2080 Super",)),
            ("RTX 2080 Ti", 11, 68, 1545, 616, 16, ("2080 Ti",)),
        ),
    ),
    (
        RTX30,
        (
            ("RTX 3050 6GB", 6, 18, 1470, 168, 8, ("3050 6GB",)),
            ("RTX 3050 8GB", 8, 20, 1777, 224, 8, ("3050", "RTX 3050", "3050 8GB")),
            ("RTX 3060 12GB", 12, 28, 1777, 360, 16, ("3060", "RTX 3060", "3060 12GB")),
            ("RTX 3060 8GB", 8, 28, 1777, 240, 16, ("3060 8GB",)),
            ("RTX 3060 Ti", 8, 38, 1665, 448, 16, ("3060 Ti",)),
            ("RTX 3070", 8, 46, 1725, 448, 16, ("3070",)),
            ("RTX 3070 Ti", 8, 48, 1770, 608, 16, ("3070 Ti",)),
            ("RTX 3080 10GB", 10, 68, 1710, 760, 16, ("3080", "RTX 3080", "3080 10GB")),
            ("RTX 3080 12GB", 12, 70, 1710, 912, 16, ("3080 12GB",)),
            ("RTX 3080 Ti", 12, 80, 1665, 912, 16, ("3080 Ti",)),
            ("RTX 3090", 24, 82, 1695, 936, 16, ("3090",)),
            ("RTX 3090 Ti", 24, 84, 1860, 1008, 16, ("3090 Ti",)),
            ("RTX 3050 Laptop", 4, 16, 1398, 192, 8, ("3050 Laptop", "RTX 3050 Mobile")),
            ("RTX 3050 Ti Laptop", 4, 20, 1365, 192, 8, ("3050 Ti Laptop", "RTX 3050 Ti Mobile")),
            ("RTX 3060 Laptop", 6, 30, 1493, 336, 16, ("3060 Laptop", "RTX 3060 Mobile")),
            ("RTX 3070 Laptop", 8, 40, 1455, 448, 16, ("3070 Laptop", "RTX 3070 Mobile")),
            ("RTX 3080 Laptop", 16, 48, 1477, 448, 16, ("3080 Laptop", "RTX 3080 Mobile")),
        ),
    ),
    (
        RTX40,
        (
            ("RTX 4060", 8, 24, 2460, 272, 8, ("4060", "RTX 4060 8GB")),
            ("RTX 4060 Ti 8GB", 8, 34, 2535, 288, 8, ("4060 Ti", "RTX 4060 Ti", "4060 Ti 8GB")),
            ("RTX 4060 Ti 16GB", 16, 34, 2535, 288, 8, ("4060 Ti 16GB",)),
            ("RTX 4070", 12, 46, 2475, 504, 16, ("4070", "RTX 4070 12GB")),
            ("RTX 4070 Super", 12, 56, 2475, 504, 16, ("4070 Super",)),
            ("RTX 4070 Ti", 12, 60, 2610, 504, 16, ("4070 Ti",)),
            ("RTX 4070 Ti Super", 16, 66, 2610, 672, 16, ("4070 Ti Super",)),
            ("RTX 4080", 16, 76, 2505, 717, 16, ("4080",)),
            ("RTX 4080 Super", 16, 80, 2550, 736, 16, ("4080 Super",)),
            ("RTX 4090", 24, 128, 2520, 1008, 16, ("4090", "RTX 4090 24GB")),
            ("RTX 4090 D", 24, 114, 2520, 1008, 16, ("4090 D",)),
            ("RTX 4050 Laptop", 6, 20, 1988, 192, 8, ("4050 Laptop", "RTX 4050 Mobile")),
            ("RTX 4060 Laptop", 8, 24, 1920, 256, 8, ("4060 Laptop", "RTX 4060 Mobile")),
            ("RTX 4070 Laptop", 8, 36, 1703, 256, 8, ("4070 Laptop", "RTX 4070 Mobile")),
            ("RTX 4080 Laptop", 12, 58, 1815, 432, 16, ("4080 Laptop", "RTX 4080 Mobile")),
            ("RTX 4090 Laptop", 16, 76, 1748, 576, 16, ("4090 Laptop", "RTX 4090 Mobile")),
        ),
    ),
    (
        RTX50,
        (
            ("RTX 5050", 8, 20, 2572, 320, 8, ("5050",)),
            ("RTX 5060", 8, 30, 2497, 448, 8, ("5060", "RTX 5060 8GB")),
            ("RTX 5060 Ti 8GB", 8, 36, 2572, 448, 8, ("5060 Ti 8GB",)),
            ("RTX 5060 Ti 16GB", 16, 36, 2572, 448, 8, ("5060 Ti", "RTX 5060 Ti", "5060 Ti 16GB")),
            ("RTX 5070", 12, 48, 2512, 672, 16, ("5070", "RTX 5070 12GB")),
            ("RTX 5070 Ti", 16, 70, 2452, 896, 16, ("5070 Ti",)),
            ("RTX 5080", 16, 84, 2617, 960, 16, ("5080",)),
            ("RTX 5090", 32, 170, 2407, 1792, 16, ("5090", "RTX 5090 32GB")),
            ("RTX 5060 Laptop", 8, 26, 1976, 384, 8, ("5060 Laptop", "RTX 5060 Mobile")),
            ("RTX 5070 Laptop", 8, 36, 1886, 384, 8, ("5070 Laptop", "RTX 5070 Mobile")),
            ("RTX 5070 Ti Laptop", 12, 46, 1834, 672, 16, ("5070 Ti Laptop", "RTX 5070 Ti Mobile")),
            ("RTX 5080 Laptop", 16, 60, 1894, 896, 16, ("5080 Laptop", "RTX 5080 Mobile")),
            ("RTX 5090 Laptop", 24, 82, 1879, 896, 16, ("5090 Laptop", "RTX 5090 Mobile")),
        ),
    ),
)


def _geforce(series: Series, row: Row) -> Card:
    name, memory, multiprocessors, megahertz, bandwidth, lanes, aliases = row
    clocks = multiprocessors * megahertz * 1e6
    return Card(
        name=name,
        memory_bytes=memory * GIB,
        compute_capability=series.compute_capability,
        bandwidth=bandwidth * 1e9,
        fp16=clocks * series.fp16,
        bf16=clocks * series.bf16,
        fp8=clocks * series.fp8,
        int8=clocks * series.int8,
        fp32=clocks * series.fp32,
        pcie=(series.pcie, lanes),
        source=series.source,
        aliases=aliases,
    )


def _server(
    name: str,
    gib: float,
    capability: tuple[int, int],
    gigabytes: float,
    tera: tuple[float, float, float, float],
    pcie: int,
    source: str,
    *aliases: str,
) -> Card:
    """`tera` are the dense rates in fp16 (bf16 is the same from 8.0 on), fp8, int8 and fp32, in 1e12 a second."""
    fp16, fp8, int8, fp32 = (value * 1e12 for value in tera)
    bf16 = fp16 if capability >= (8, 0) else 0.0
    memory = int(gib * GIB)
    return Card(
        name, memory, capability, gigabytes * 1e9, fp16, bf16, fp8, int8, fp32, (pcie, 16), source, tuple(aliases)
    )


ECC = 15 / 16  # of GDDR memory is left where error correction is on, as it is by default on these cards

SERVERS = (
    _server("T4", 16 * ECC, (7, 5), 320, (65, 0, 130, 8.1), 3, "NVIDIA T4 data sheet", "T4 16GB"),
    _server("A10", 24 * ECC, (8, 6), 600, (125, 0, 250, 31.2), 4, "NVIDIA A10 data sheet", "A10 24GB", "A10G"),
    _server("L4", 24 * ECC, (8, 9), 300, (121, 242, 242, 30.3), 4, "NVIDIA L4 data sheet", "L4 24GB"),
    _server("L40S", 48 * ECC, (8, 9), 864, (362, 733, 733, 91.6), 4, "NVIDIA L40S data sheet", "L40S 48GB"),
    _server("RTX A6000", 48, (8, 6), 768, (154.8, 0, 309.7, 38.7), 4, "NVIDIA RTX A6000 data sheet", "A6000"),
    _server(
        "RTX 6000 Ada", 48, (8, 9), 960, (364.2, 728.5, 728.5, 91.1), 4, "NVIDIA RTX 6000 Ada data sheet", "6000 Ada"
    ),
    _server("A100 40GB", 40, (8, 0), 1555, (312, 0, 624, 19.5), 4, "NVIDIA A100 data sheet", "A100-SXM4-40GB"),
    _server(
        "A100 80GB",
        80,
        (8, 0),
        2039,
        (312, 0, 624, 19.5),
        4,
        "NVIDIA A100 data sheet",
        "A100",
        "A100-SXM4-80GB",
        "A100 80GB PCIe",
    ),
    _server("H100 PCIe", 80, (9, 0), 2000, (756, 1513, 1513, 51), 5, "NVIDIA H100 data sheet", "H100 80GB PCIe"),
    _server(
        "H100",
        80,
        (9, 0),
        3350,
        (989, 1979, 1979, 67),
        5,
        "NVIDIA H100 data sheet",
        "H100 SXM",
        "H100 80GB",
        "H100 80GB HBM3",
    ),
    _server("H200", 140, (9, 0), 4800, (989, 1979, 1979, 67), 5, "NVIDIA H200 data sheet", "H200 141GB", "H200 SXM"),
    _server("B200", 180, (10, 0), 8000, (2250, 4500, 4500, 80), 5, "NVIDIA DGX B200 data sheet", "B200 180GB"),
)

CARDS: tuple[Card, ...] = (*(_geforce(series, row) for series, rows in GEFORCE for row in rows), *SERVERS)

MULTIPROCESSORS = {row[0]: row[2] for _, rows in GEFORCE for row in rows}
