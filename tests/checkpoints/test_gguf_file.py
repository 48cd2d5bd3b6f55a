"""GGUF files: what the independent `gguf` package writes is read bit for bit; what is damaged or hostile is refused."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_headers import (
    EXPECTED,
    FORMATS,
    MOST_BYTES,
    SLOW_SECONDS,
    SOUND_GGUF,
    SOUND_SAFETENSORS,
    array,
    fuzz,
    gguf,
    key,
    outcome,
    tensor,
    text,
)
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.gguf_file import iterate_tensors, open_file, read_header, read_tensor, release
from gossamer.checkpoints.gguf_header import MAX_KEYS, MAX_TENSORS, PLAIN_TYPES, TYPE_NAMES
from gossamer.checkpoints.gguf_metadata import LeftOut
from gossamer.errors import FileDamagedError, FileMissingError, UnknownOptionError
from gossamer.formats import Packed, unpack
from gossamer.formats.gguf import BLOCK_TYPES

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def file_of(tmp_path):
    def write(content, name="file.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def written(tmp_path):
    """A file from the `gguf` package: `fill` adds to the writer."""

    def write(fill, **options):
        path = tmp_path / "written.gguf"
        writer = GGUFWriter(path, "flux", **options)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def bounded(call):
    """Call it twice: in under a second of processor time, then in under 100 MB, as watching memory takes time."""
    started = time.thread_time()
    call()
    assert time.thread_time() - started < SLOW_SECONDS
    tracemalloc.start()
    try:
        call()
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


READERS = (read_header, open_file, lambda path: list(iterate_tensors(path)))


def refused(path, match, error=FileDamagedError, readers=READERS):
    def attempt(read):
        with pytest.raises(error, match=match) as caught:
            read(path)
        assert caught.value.what
        assert caught.value.why
        assert caught.value.next_step

    for read in readers:
        bounded(partial(attempt, read))


# what others write


def random_blocks(name, rows, width):
    """Bytes of a type with sensible scales: what the package encodes where it can, else anything finite."""
    kind = GGMLQuantizationType[name]
    generator = np.random.default_rng(len(name) + width)
    try:
        return quants.quantize(generator.standard_normal((rows, width), dtype=np.float32), kind)
    except NotImplementedError:
        return generator.integers(0, 60, (rows, BLOCK_TYPES[name].row_bytes(width)), dtype=np.uint8)


MATRIX_TYPES = [
    name for name, kind in BLOCK_TYPES.items() if kind.elements > 1 and name in GGMLQuantizationType.__members__
]


def test_every_block_type_is_read_bit_for_bit(written):
    stored = {name: random_blocks(name, 6, 512) for name in MATRIX_TYPES}

    def fill(writer):
        for name, blocks in stored.items():
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=GGMLQuantizationType[name])

    file = open_file(written(fill))
    assert [entry.type_name for entry in file.header.tensors.values()] == MATRIX_TYPES
    for name, blocks in stored.items():
        packed = read_tensor(file, f"{name}.weight")
        assert isinstance(packed, Packed)
        assert (packed.format, packed.shape) == (name, (6, 512))
        assert np.array_equal(packed.tensors["blocks"].numpy(), blocks)
        expected = quants.dequantize(blocks, GGMLQuantizationType[name])
        assert np.array_equal(unpack(packed, torch.float32).numpy(), expected, equal_nan=True)


def test_plain_types(written):
    values = np.arange(12).reshape(3, 4)
    stored = {
        "F32": values.astype(np.float32),
        "F16": values.astype(np.float16),
        "F64": values.astype(np.float64),
        "I8": values.astype(np.int8),
        "I16": values.astype(np.int16),
        "I32": values.astype(np.int32),
        "I64": values.astype(np.int64),
    }

    def fill(writer):
        for name, content in stored.items():
            writer.add_tensor(name, content)
        bf16 = quants.quantize(values.astype(np.float32), GGMLQuantizationType.BF16)
        writer.add_tensor("BF16", bf16, raw_dtype=GGMLQuantizationType.BF16)
        writer.add_tensor("vector", np.ones(5, np.float32))
        writer.add_tensor("convolution", np.ones((4, 3, 2, 2), np.float16))

    read = dict(iterate_tensors(written(fill)))
    for name, dtype in PLAIN_TYPES.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name].double(), torch.from_numpy(values).double())
    assert read["vector"].shape == (5,)
    assert read["convolution"].shape == (4, 3, 2, 2)


def test_quantised_tensors_that_are_no_matrix_are_decoded(written):
    vector, deep = random_blocks("Q8_0", 1, 64)[0], random_blocks("Q4_0", 6, 32).reshape(3, 2, -1)

    def fill(writer):
        writer.add_tensor("vector", vector, raw_dtype=GGMLQuantizationType.Q8_0)
        writer.add_tensor("deep", deep, raw_dtype=GGMLQuantizationType.Q4_0)

    read = dict(iterate_tensors(written(fill)))
    assert np.array_equal(read["vector"].numpy(), quants.dequantize(vector, GGMLQuantizationType.Q8_0))
    assert np.array_equal(read["deep"].numpy(), quants.dequantize(deep, GGMLQuantizationType.Q4_0))


SCALARS = {
    "uint8": 255,
    "int8": -128,
    "uint16": 65535,
    "int16": -1,
    "uint32": 2**32 - 1,
    "int32": -5,
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float32": 0.5,
    "float64": 0.1,
    "bool": True,
    "string": "Glühwürmchen 🙂",
}


def test_metadata_of_every_type(written):
    def fill(writer):
        for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
            getattr(writer, f"add_{name}")(name, SCALARS[name])
        writer.add_bool("bool", True)
        writer.add_string("string", SCALARS["string"])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_array("texts", ["a", "", "ü"])
        writer.add_array("tokens", ["token"] * 5000)
        writer.add_key_value("scores", [0.5] * 5000, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
        writer.add_string("long", "x" * (5 << 20))
        writer.add_custom_alignment(64)
        writer.add_tensor("a", np.ones(3, np.float32))
        writer.add_tensor("b", np.ones(3, np.float32))

    path = written(fill)
    header = read_header(path)
    assert header.metadata == {
        "general.architecture": "flux",
        **SCALARS,
        "numbers": (1, 2, 3),
        "texts": ("a", "", "ü"),
        "tokens": LeftOut("array of string", 5000),
        "scores": LeftOut("array of float32", 5000),
        "long": LeftOut("string", 5 << 20),
        "general.alignment": 64,
    }
    assert (header.version, header.alignment, header.data_start % 64) == (3, 64, 0)
    assert header.tensors["b"].start == header.data_start + 64
    assert all(torch.equal(content, torch.ones(3)) for _, content in iterate_tensors(path))


def test_a_vocabulary_is_stepped_over(written):
    path = written(lambda writer: writer.add_array("tokens", [f"token {number}" for number in range(262_144)]))
    assert path.stat().st_size > 4 << 20
    bounded(lambda: read_header(path))
    assert read_header(path).metadata["tokens"] == LeftOut("array of string", 262_144)


def test_version_2_and_a_last_tensor_without_padding(file_of):
    info = tensor(b"a", (3,), 0, 0)
    path = file_of(gguf([], [info], struct.pack("<3f", 1, 2, 3), version=2))
    assert read_header(path).version == 2
    assert read_tensor(path, "a").tolist() == [1, 2, 3]


def test_empty_files_and_tensors(file_of):
    assert not read_header(file_of(gguf())).tensors
    assert not read_header(file_of(gguf()[:24])).tensors
    infos = [tensor(b"a", (0,), 0, 0), tensor(b"b", (32, 0), 8, 0), tensor(b"c", (0, 2), 8, 0)]
    read = dict(iterate_tensors(file_of(gguf([], infos).rstrip(b"\0") + bytes(11))))
    assert {name: tuple(content.shape) for name, content in read.items()} == {"a": (0,), "b": (0, 32), "c": (2, 0)}


def test_types_have_the_numbers_of_the_package():
    assert {kind.name: kind.value for kind in GGMLQuantizationType} == {
        name: number for number, name in enumerate(TYPE_NAMES) if name in GGMLQuantizationType.__members__
    }
    assert set(BLOCK_TYPES) | set(PLAIN_TYPES) <= set(TYPE_NAMES)


def test_nothing_is_copied_and_the_file_is_never_changed(file_of):
    path = file_of(SOUND_GGUF)
    file = open_file(path)
    weight = read_tensor(file, "img_in.weight").tensors["blocks"]
    assert weight.untyped_storage().data_ptr() == file.data.untyped_storage().data_ptr()
    weight.zero_()
    assert path.read_bytes() == SOUND_GGUF
    # a view outlives the record it came from
    path.unlink()
    del file
    assert not weight.any()


def test_a_large_file_is_not_read_by_its_header(tmp_path):
    path = tmp_path / "large.gguf"
    rows = 1 << 26  # of 32 weights: 2.2 GB that exist nowhere
    path.write_bytes(gguf([], [tensor(b"a", (32, rows), 8, 0)]))
    os.truncate(path, path.stat().st_size + rows * 34)

    def last_row():
        packed = read_tensor(path, "a")
        assert packed.shape == (rows, 32)
        assert not packed.tensors["blocks"][-1].any()

    bounded(last_row)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's count of mapped pages")
def test_released_pages_leave_the_process_and_come_back(tmp_path):
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    path = tmp_path / "two.gguf"
    infos = [tensor(b"a", (32, 1 << 20), 8, 0), tensor(b"b", (3,), 0, 34 << 20)]
    path.write_bytes(gguf([], infos, bytes(34 << 20) + struct.pack("<3f", 1, 2, 3)))
    file = open_file(path)
    before = resident()
    blocks = read_tensor(file, "a").tensors["blocks"]
    assert not blocks.any()
    assert resident() - before > 30_000
    release(file, "a")
    assert resident() - before < 10_000
    assert not blocks.any()
    release(file, "b")
    assert read_tensor(file, "b").tolist() == [1, 2, 3]


def test_an_unknown_name_is_an_error_with_a_suggestion(file_of):
    with pytest.raises(UnknownOptionError, match=r"Did you mean 'img_in\.weight'"):
        read_tensor(file_of(SOUND_GGUF), "img_in.weights")


# what is damaged or hostile

A = tensor(b"a", (3,), 0, 0)
U8 = key(b"k", 0, b"\0")
HUGE = 2**62


def one(dims, kind=0, offset=0, data=bytes(32)):
    return gguf([], [tensor(b"a", dims, kind, offset)], data)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes"),
        (b"GGU", "does not begin"),
        (b"GGUF\3\0\0\0", "8 bytes; the shortest header takes 24"),
        (b"<!DOCTYPE html><html></html>" + bytes(50), "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"PK\x03\x04 torch archive" + bytes(50), "pickled checkpoint"),
        (b"lmgg" + bytes(60), "does not begin"),
        (SOUND_SAFETENSORS, "does not begin"),
        (gguf(version=1), "version 1"),
        (gguf(version=4), "version 4"),
        (gguf(version=3 << 24), "big-endian"),
        (gguf(version=2 << 24), "big-endian"),
        (gguf(counts=(HUGE, 0)), "cannot fit"),
        (gguf(counts=(0, HUGE)), "cannot fit"),
        (gguf(counts=(2**64 - 1, 2**64 - 1)), "cannot fit"),
        (gguf([], [], bytes(10**6), counts=(MAX_TENSORS + 1, 0)), "the most that is allowed"),
        (gguf([], [], bytes(10**6), counts=(0, MAX_KEYS + 1)), "the most that is allowed"),
        (gguf([key(b"k", 9, array(8, HUGE))])[:60], "cut off"),
        (gguf([key(b"k", 9, array(0, HUGE))]), "cut off"),
        (gguf([key(b"k", 9, array(12, 2**64 - 1))]), "cut off"),
        (gguf([key(b"k", 9, array(9, 1, array(9, 1, array(0, 1, b"\0"))))]), "array of arrays"),
        (gguf([key(b"k", 9, array(9, 10**5) + array(9, 1) * 10**5)]), "array of arrays"),
        (gguf([key(b"k", 9, array(13, 1) + bytes(99))]), "unknown type 13"),
        (gguf([key(b"k", 9, array(8, 3, text(b"x") + struct.pack("<Q", HUGE)) + bytes(50))]), "cut off"),
        (gguf([key(b"k", 9, array(8, 2_000_001, bytes(8 * 2_000_001)))]), "more than 2000000 texts"),
        (gguf([key(b"k", 13, bytes(99))]), "unknown type 13"),
        (gguf([key(b"k", 8, struct.pack("<Q", HUGE))]), "cut off"),
        (gguf([key(b"", 0, b"\0")]), "1 to 256 are allowed"),
        (gguf([key(b"k" * 257, 0, b"\0")]), "1 to 256 are allowed"),
        (gguf([struct.pack("<Q", HUGE) + bytes(99)]), "1 to 256 are allowed"),
        (gguf([key(b"\xff", 0, b"\0")]), "not UTF-8"),
        (gguf([U8, U8]), "'k' appears twice"),
        (gguf([key(b"general.alignment", 4, bytes(4))]), "alignment is 0"),
        (gguf([key(b"general.alignment", 4, b"\4\0\0\0")]), "alignment is 4"),
        (gguf([key(b"general.alignment", 4, b"\x30\0\0\0")]), "alignment is 48"),
        (gguf([key(b"general.alignment", 10, bytes(8))]), "not a uint32"),
        (gguf([], [A, A], bytes(64)), "'a' appears twice"),
        (gguf([], [tensor(b"", (3,), 0, 0)], bytes(32)), "1 to 256 are allowed"),
        (gguf([], [text(b"a") + struct.pack("<I", 2**32 - 1)], bytes(99)), "4294967295 dimensions"),
        (one((1,) * 9), "9 dimensions"),
        (one((HUGE, 4)), "more elements than any file holds"),
        (one((2**32, 2**32)), "more elements than any file holds"),
        (one((HUGE, 0, HUGE)), "more elements than any file holds"),
        (one((2**57,)), "cut off"),
        (one((32,), 41), "Q1_0 type 41"),
        (one((32,), 31), "Q4_0_4_4 type 31"),
        (one((32,), 4711), "unknown type 4711"),
        (one((33, 2), 8), "rows of 33; Q8_0 stores blocks of 32"),
        (one((128, 2), 12), "rows of 128; Q4_K stores blocks of 256"),
        (one((), 8), "rows of 1; Q8_0"),
        (one((3,), 0, 4), "no multiple of the alignment"),
        (one((3,), 0, 32, bytes(64)), "leaves a hole"),
        (one((3,), 0, 2**64 - 32), "leaves a hole"),
        (one((9,)), "cut off"),
        (one((3,), data=bytes(11)), "cut off"),
        (one((3,), data=bytes(33)), "21 bytes past the last tensor"),
        (gguf([], [A, tensor(b"b", (3,), 0, 0)], bytes(64)), "overlaps"),
        (gguf([], [tensor(b"a", (9,), 0, 0), tensor(b"b", (3,), 0, 32)], bytes(96)), "overlaps"),
        (gguf([], [A, tensor(b"b", (3,), 0, 64)], bytes(96)), "leaves a hole"),
    ],
)
def test_unsound_files(file_of, content, match):
    refused(file_of(content), match)


def test_headers_that_are_as_large_as_the_file(file_of):
    texts = array(8, 1_900_000, bytes(8 * 1_900_000))
    refused(file_of(gguf([key(b"k", 9, texts), key(b"l", 9, array(0, HUGE))])), "cut off", readers=(read_header,))
    emoji = "🙂".encode()
    names = [tensor(emoji * 60 + b"%d" % index, (0,), 0, 1) for index in range(MAX_TENSORS)]
    keys = [key(emoji * 60 + b"%d" % index, 8, text(emoji * 120)) for index in range(MAX_KEYS)]
    refused(file_of(gguf(keys, names)), "no multiple of the alignment", readers=(read_header,))


def test_a_header_of_more_than_is_allowed(tmp_path):
    path = tmp_path / "long.gguf"
    path.write_bytes(gguf([key(b"k", 9, array(0, 100_000_000))]))
    os.truncate(path, 101_000_000)
    refused(path, "header takes more than")


def test_files_of_the_other_byte_order(written):
    refused(written(lambda writer: None, endianess=GGUFEndian.BIG), "big-endian")


def test_missing_files(tmp_path):
    refused(tmp_path / "none.gguf", "no file", FileMissingError)
    refused(tmp_path, "folder", FileMissingError)


# anything at all


@FEW
@given(length=st.integers(0, len(SOUND_GGUF) - 29))
def test_every_truncation_is_seen(file_of, length):
    # the last 28 bytes are padding behind the last tensor, which may be absent
    with pytest.raises(FileDamagedError):
        read_header(file_of(SOUND_GGUF[:length]))


@FEW
@given(position=st.integers(0, len(SOUND_GGUF) - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_as_the_package_reads_it(file_of, position, value):
    content = bytearray(SOUND_GGUF)
    content[position] = value
    path = file_of(bytes(content))
    try:
        header = read_header(path)
    except FileDamagedError:
        return
    theirs = {entry.name: entry for entry in GGUFReader(path).tensors}
    assert theirs.keys() == header.tensors.keys()
    for name, entry in header.tensors.items():
        assert entry.type_name == theirs[name].tensor_type.name
        assert entry.shape == tuple(reversed(theirs[name].shape.tolist()))
        assert (entry.start, entry.stop - entry.start) == (theirs[name].data_offset, theirs[name].n_bytes)


@pytest.mark.parametrize("name", list(FORMATS))
@FEW
@given(rng=st.randoms(use_true_random=False))
def test_no_mutation_raises_anything_else(file_of, name, rng):
    make, read = FORMATS[name]
    assert outcome(file_of(make(rng), f"file.{name}"), read) in EXPECTED


@pytest.mark.parametrize("name", list(FORMATS))
@given(content=st.binary(max_size=300))
@FEW
def test_no_bytes_raise_anything_else(file_of, name, content):
    assert outcome(file_of(content, f"file.{name}"), FORMATS[name][1]) in EXPECTED


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_long_run_in_short(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz(500, 7, name)
    assert outcomes.keys() == set(EXPECTED)
