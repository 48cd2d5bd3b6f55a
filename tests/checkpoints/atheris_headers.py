"""Coverage-guided fuzzing of both header checks and of encoded weights, with atheris (not run by pytest).

    pip install -e '.[fuzz]'          # Linux; Python 3.11 to 3.13 have wheels
    python tests/checkpoints/atheris_headers.py -max_total_time=300 [other options of libFuzzer] [corpus folders]

The first byte of an input chooses what the rest is: a GGUF file, a safetensors file, one with encoded weights that are
decoded, or choices of dtypes, shapes and JSON for a layer in one of the encodings. Anything but a GossamerError, a read
of more than a second, or a process that grows by more than 400 MB (which includes libFuzzer's own tables) ends the run,
and libFuzzer keeps the input. If no folder is named, the run starts from sound files.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gossamer.checkpoints", "gossamer.formats"]):
    from fuzz_encodings import DTYPES, LAYERS, file_of, read_encodings
    from fuzz_headers import SLOW_SECONDS, SOUND_GGUF, SOUND_SAFETENSORS, read_gguf, read_safetensors

    from gossamer.checkpoints.safetensors_file import DTYPE_BITS
    from gossamer.errors import GossamerError

MOST_GROWTH_KIB = 400_000
WARM_UP_RUNS = 1000  # until libraries and caches are in place


def layer_file(data: bytes) -> bytes:
    """A file with a sound header and one layer, of which the input chooses dtypes, shapes and the text of the JSON."""
    choose = atheris.FuzzedDataProvider(data)
    layer = LAYERS[choose.ConsumeIntInRange(0, len(LAYERS) - 1)](random.Random(choose.ConsumeIntInRange(0, 7)))
    for role in list(layer.tensors):
        dtype, shape, content = layer.tensors[role]
        if choose.ConsumeProbability() < 0.2:
            dtype = list(DTYPES)[choose.ConsumeIntInRange(0, len(DTYPES) - 1)]
        if choose.ConsumeProbability() < 0.2:
            shape = [choose.ConsumeIntInRange(0, 64) for _ in range(choose.ConsumeIntInRange(0, 3))]
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        layer.tensors[role] = (
            dtype,
            shape,
            (content * (nbytes // max(len(content), 1) + 1))[:nbytes].ljust(nbytes, b"\1"),
        )
    prefix, in_metadata = ("a.", "model.diffusion_model.a.")[choose.ConsumeBool()], choose.ConsumeBool()
    text = choose.ConsumeBytes(choose.remaining_bytes())
    if text:
        layer.text = text
    return file_of(layer, prefix=prefix, in_metadata=in_metadata)


# suffix of the file, what an input is made into, and what reads it
TARGETS = (
    (".gguf", bytes, read_gguf),
    (".safetensors", bytes, read_safetensors),
    (".safetensors", bytes, read_encodings),
    (".safetensors", layer_file, read_encodings),
)


def refusal(read: Callable[[Path], None], path: Path) -> GossamerError | None:
    """The error that a file is refused with, if it is one of ours."""
    try:
        read(path)
    except GossamerError as error:
        return error
    return None


class Target:
    """Write an input to a file, read it, and watch time and memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = 0
        self.runs = 0

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        suffix, make, read = TARGETS[data[0] % len(TARGETS)]
        path = self.folder / f"file{suffix}"
        path.write_bytes(make(data[1:]))
        started = time.thread_time()
        error = refusal(read, path)
        assert error is None or all((error.what, error.why, error.next_step))
        str(error).encode()
        assert time.thread_time() - started < SLOW_SECONDS, "slow"
        self.runs += 1
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self.runs <= WARM_UP_RUNS:
            self.before = resident
        assert resident - self.before < MOST_GROWTH_KIB, f"{resident - self.before} KiB of memory"


def write_corpus(folder: Path) -> None:
    """Sound files of every kind, as inputs to start from."""
    inputs = [b"\0" + SOUND_GGUF, b"\1" + SOUND_SAFETENSORS]
    for number, make in enumerate(LAYERS):
        for in_metadata in (False, True):
            layer = make(random.Random(number))
            inputs.append(b"\2" + file_of(layer, prefix="a.", in_metadata=in_metadata))
            # the choices are read from the end, the text from the start
            inputs.append(b"\3" + json.dumps(layer.settings).encode() + bytes([0] * 40 + [number] * 4))
    for number, content in enumerate(inputs):
        (folder / f"sound-{number}").write_bytes(content)


def main() -> None:
    arguments = list(sys.argv)
    memory = Path("/dev/shm")
    # libFuzzer leaves the process without unwinding, so the folder is named and used again by the next run
    base = (memory if memory.is_dir() else Path(tempfile.gettempdir())) / "gossamer-atheris"
    files, corpus = base / "files", base / "corpus"
    for folder in (files, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    if all(argument.startswith("-") for argument in arguments[1:]):
        write_corpus(corpus)
        arguments.append(str(corpus))
    atheris.Setup(arguments, Target(files))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
