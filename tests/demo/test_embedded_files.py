"""What is shipped with the package: not too large for a repository, and the files that its record was measured with."""

from __future__ import annotations

from gossamer.demo.embedded import adapter_paths, model_folder

MOST_BYTES, MOST_FILE_BYTES = 30_000_000, 16_000_000


def test_the_demo_is_at_most_30_mb_in_all_and_no_file_is_above_16():
    folder = model_folder().parent
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sum(sizes.values()) <= MOST_BYTES
    assert max(sizes.values()) <= MOST_FILE_BYTES
    assert {*adapter_paths().values(), folder / "reader.safetensors"} <= sizes.keys()
    assert sum(size for path, size in sizes.items() if model_folder() in path.parents) > 10_000_000


def test_nothing_is_shipped_as_a_pickle():
    endings = {path.suffix for path in model_folder().rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".txt", ".model"}
