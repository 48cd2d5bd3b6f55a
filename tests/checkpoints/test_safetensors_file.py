"""Damaged, hostile and foreign files: a clear error, before the reader sees them."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from gossamer.checkpoints.safetensors_file import MAX_HEADER_BYTES, read_header, read_tensors, sha256_file
from gossamer.errors import FileDamagedError, FileMissingError, GossamerError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def container(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def file_of(tmp_path):
    def write(content, name="file.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path, match, error=FileDamagedError):
    for read in (read_header, read_tensors):
        with pytest.raises(error, match=match) as caught:
            read(path)
        assert caught.value.what
        assert caught.value.why
        assert caught.value.next_step


def test_a_sound_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "codes": torch.arange(7, dtype=torch.uint8),
    }
    path = tmp_path / "sound.safetensors"
    save_file(tensors, path, {"base_model": "tiny"})
    header = read_header(path)
    assert header.metadata == {"base_model": "tiny"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    read = read_tensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes"),
        (b"\1\0\0", "3 bytes"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n <HTML><body>sign in</body></HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"GGUF\3\0\0\0\0\0\0\0\0\0\0\0", "GGUF file"),
        (b"PK\x03\x04 torch archive", "pickled checkpoint"),
        (pickle.dumps({"weight": list(range(100))}, protocol=4), "pickled checkpoint"),
        (pickle.dumps({"weight": 1}, protocol=2), "pickled checkpoint"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "the most that is allowed"),
        ((2**63).to_bytes(8, "little") + b"{}", "the most that is allowed"),
        ((500).to_bytes(8, "little") + b"{}", "cut off"),
        (container(b"[1, 2]"), "not a JSON object"),
        (container(b'{"a": '), "not valid JSON"),
        (container(b'{"a": \xff\xfe}'), "not valid JSON"),
        (container(b'{"a":' + b"[" * 200_000), "not valid JSON"),
        (container(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
        (container(b'{"a":{},"a":{}}'), "'a' appears twice"),
        (container({"a": 1}), "is not dtype, shape and data_offsets"),
        (container({"a": {**F32, "more": 1}}), "is not dtype, shape and data_offsets"),
        (container({"a": {**F32, "dtype": "F33"}}), "unknown dtype"),
        (container({"a": {**F32, "dtype": ["F32"]}}), "unknown dtype"),
        (container({"a": {**F32, "shape": [-2]}}), "no valid shape"),
        (container({"a": {**F32, "shape": [2.0]}}), "no valid shape"),
        (container({"a": {**F32, "shape": [True, 2]}}), "no valid shape"),
        (container({"a": {**F32, "shape": [2**62, 4, 2]}}), "more elements than any file holds"),
        (container({"a": {**F32, "shape": [2**64]}}), "no valid shape"),
        (container({"a": {**F32, "shape": [3]}}), "does not fill"),
        (container({"a": {**F32, "data_offsets": [8, 0]}}), "no valid data_offsets"),
        (container({"a": {**F32, "data_offsets": [0, 8, 9]}}), "no valid data_offsets"),
        (container({"a": F32, "b": F32}), "overlaps"),
        (container({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20), "leaves a hole"),
        (container({"a": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12), "leaves a hole"),
        (container({"a": F32}, b"\0" * 7), "cut off"),
        (container({"a": F32}, b"\0" * 9), "belong to nothing"),
        (container({"__metadata__": {"a": 1}, "a": F32}), "metadata"),
        (container({"__metadata__": [], "a": F32}), "metadata"),
        (container(b"{" + b'"data_offsets"' * 16_385), "more than 16384 tensors"),
        (container(b'{"a":[' + b"0," * 98_305), "more than 98304 values"),
        (container(b"{" + b'"":' * 163_841), "more than 163840 texts"),
        (container('{"a": 1}'.encode("utf-16-le")), "not valid JSON"),
        (container(b'{"\\ud800": 1}'), "not valid JSON"),
        (container(b'{"__metadata__": {"a": "\\udfff"}}', b""), "not valid text"),
        (container({"a": {**F32, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""), "more elements"),
    ],
)
def test_unsound_files(file_of, content, match):
    refused(file_of(content), match)


EMOJI = "🙂".encode()  # one of them makes Python hold a text with 4 bytes a character


def filled(start, end):
    return container(start + EMOJI + b"a" * (MAX_HEADER_BYTES - len(start) - len(EMOJI) - len(end)) + end, b"")


LONG_HEADERS = {
    "text": (lambda: filled(b'{"__metadata__": {"k": "', b'"}, "a": 1}'), "is not dtype"),
    "lists": (lambda: filled(b'{"a": [' + b"[]," * 98_000 + b'"', b'"]}'), "is not dtype"),
    "keys": (
        lambda: filled(b"{" + b"".join(b'"%x":{},' % key for key in range(98_000)) + b'"', b'":1}'),
        "is not dtype",
    ),
    "long keys": (
        lambda: filled(b"{" + b"".join(b'"%s%x":{},' % (EMOJI, key) for key in range(98_000)) + b'"', b'":1}'),
        "is not dtype",
    ),
    "escapes": (lambda: filled(b'{"a": "' + b"\\n" * 1_000_000, b'"}'), "is not dtype"),
    "quotes": (lambda: filled(b'{"a": "' + b'\\"' * 1_000_000, b'"}'), "is not dtype"),
    "open end": (lambda: filled(b'{"a": "', b"\\"), "not valid JSON"),
    "nesting": (lambda: container(b'{"a":' + b'[{"":' * 1_000_000), "more than 163840 texts"),
    "100 MB": (lambda: container(b"{" + bytes(100_000_000)), "the most that is allowed"),
}


@pytest.mark.parametrize("name", LONG_HEADERS)
def test_long_headers_take_little_memory_and_time(file_of, name):
    make, match = LONG_HEADERS[name]
    path = file_of(make())
    started = time.thread_time()
    with pytest.raises(FileDamagedError, match=match):
        read_header(path)
    assert time.thread_time() - started < 1
    tracemalloc.start()
    try:
        with pytest.raises(FileDamagedError, match=match):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused_by_name(file_of, suffix):
    refused(file_of(save({"a": torch.zeros(2)}), f"model{suffix}"), r"pickled checkpoint[\s\S]*\.safetensors version")


def test_missing_files(tmp_path):
    refused(tmp_path / "none.safetensors", "no file", FileMissingError)
    refused(tmp_path, "folder", FileMissingError)
    with pytest.raises(FileMissingError):
        sha256_file(tmp_path / "none.safetensors")


SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"key": "text"})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(SOUND) - 1))
def test_every_truncation_is_seen(file_of, length):
    refused(file_of(SOUND[:length]), "sound safetensors file")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(SOUND) - 29), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_still_agrees_with_the_file(file_of, position, value):
    content = bytearray(SOUND)
    content[position] = value
    path = file_of(bytes(content))
    try:
        header = read_header(path)
    except GossamerError:
        return
    # what passes our checks the reader must be able to read
    assert read_tensors(path).keys() == header.tensors.keys()
