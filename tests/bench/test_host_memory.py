"""The benchmark of host memory as a command on three small blocks, what it counts, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gossamer
from gossamer.bench.host_memory import HostMemory, host_memory, watched
from gossamer.bench.random_flux import TINY
from gossamer.bench.random_gguf import nbytes, shapes_of, write_gguf
from gossamer.errors import InvalidOptionError
from gossamer.models.flux_spec import FluxSpec
from gossamer.models.swap import linear_layers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
linux = pytest.mark.skipif(host_memory() is None, reason="the system does not count memory by kind")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import host_memory as module

    yield module
    del sys.modules["host_memory"]


@linux
def test_the_record(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "host_memory.py"), "--quick", "--steps", "2", "--out", str(tmp_path)]
    subprocess.run([*command, "--rows", "2GB/short-T5,6GB/T5-XXL"], check=True, stdout=subprocess.PIPE)
    (path,) = tmp_path.glob("host_memory-cpu-*.json")
    record = json.loads(path.read_text("utf-8"))
    assert {"machine", "versions", "date", "storage", "rows"} <= record.keys()
    short, whole = record["rows"]
    assert (short["name"], whole["name"]) == ("2GB/short-T5", "6GB/T5-XXL")
    assert 0 < short["text_bytes"] < whole["text_bytes"]
    for row in (short, whole):
        assert row["plan"] is row["peak_gpu_bytes"] is None, "there is no GPU to stream to"
        assert row["limit_bytes"] == row["file_bytes"] + 2 * 10**9
        assert row["kept"] == (row["peak_bytes"] - row["text_bytes"] <= row["limit_bytes"])
        assert 0.9 * row["text_file_bytes"] < row["text_bytes"] < 3 * row["text_file_bytes"], "float32 on a CPU"
        for kind, size in row["before"].items():
            assert 0 <= size <= 1.05 * row["most"][kind], kind


def test_other_text_encoders_are_refused(benchmark):
    with pytest.raises(InvalidOptionError, match="No text encoder is called 'T6'"):
        benchmark.with_texts(None, "T6")


def test_a_process_that_fails_leaves_a_row_that_says_so(benchmark, tmp_path, capfd):
    row = benchmark.apart(benchmark.Task("2GB/T5-XXL", str(tmp_path / "none.gguf"), str(tmp_path), None, 1, 64))
    assert row == {"name": "2GB/T5-XXL", "error": "its process ended with code 1"}
    assert "failed" in benchmark.line(row)
    assert "file-missing" in capfd.readouterr().err


def test_without_a_gpu_the_full_size_is_refused(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["host_memory.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="no GPU"):
        benchmark.main()


# counting -------------------------------------------------------------------------------------------------------------


@linux
def test_a_passing_peak_is_seen_by_kind(tmp_path):
    size = 60_000_000
    (tmp_path / "file").write_bytes(bytes(size))
    before = host_memory()
    with watched() as watch:
        anonymous = np.ones(size, np.uint8)
        watch.look()
        del anonymous
        mapped = np.memmap(tmp_path / "file", np.uint8, "r")
        assert mapped.sum() == 0
        watch.look()
        del mapped
    assert watch.most.anonymous - before.anonymous > 0.9 * size
    assert watch.most.file - before.file > 0.9 * size
    assert watch.most.resident - before.resident < 1.8 * size, "they were not there together"


def test_peaks_are_taken_kind_by_kind():
    more = HostMemory(10, 5, 1, 4, 6).or_more(HostMemory(9, 2, 3, 5, 5))
    assert more == HostMemory(10, 5, 3, 5, 6)


# files ----------------------------------------------------------------------------------------------------------------


def test_a_written_file_is_loaded_with_values_of_the_right_size(tmp_path):
    path, spec = tmp_path / "flux.gguf", FluxSpec.from_config(TINY)
    shapes = shapes_of(spec, "Q4_K")
    write_gguf(path, shapes, std=0.07)
    assert path.stat().st_size > sum(nbytes(*entry) for entry in shapes.values())
    model = gossamer.load_transformer(path, device="cpu")
    layers = linear_layers(model)
    kinds = {layer.stored.format.name for name, layer in layers.items() if "transformer_blocks" in name}
    assert kinds == {"Q4_K"}
    for name in ("transformer_blocks.0.ff.net.0.proj", "proj_out", "single_transformer_blocks.1.proj_out"):
        assert layers[name].stored.unpack(torch.float32).std().item() == pytest.approx(0.07, rel=0.1), name
    norm = model.transformer_blocks[0].attn.norm_q.weight
    assert norm.mean().item() == pytest.approx(1.0, abs=0.1)


def test_large_tensors_repeat_what_small_ones_begin_with(tmp_path, monkeypatch):
    from gossamer.bench import random_gguf

    monkeypatch.setattr(random_gguf, "CHUNK_BYTES", 1)
    path = tmp_path / "flux.gguf"
    rows = 3 * random_gguf.SLAB_SHAPE[0] + 5
    write_gguf(path, {"a.weight": ("Q8_0", (rows, 4096)), "b.weight": ("BF16", (7, 64))})
    whole = path.read_bytes()
    slab = nbytes("Q8_0", random_gguf.SLAB_SHAPE)
    last = -(-nbytes("BF16", (7, 64)) // 32) * 32
    start = len(whole) - last - nbytes("Q8_0", (rows, 4096))
    assert whole[start : start + slab] == whole[start + 2 * slab : start + 3 * slab]
    assert start % 32 == 0
