"""Every option of Gossamer: its name, type, default and help, in three frozen records that are validated once.

The command line, and any other way in, derives from these fields. A text given for an option is read by the field's
`parse`; a value that already has the option's type is taken as it is; None means the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.kernels.wishes import ATTENTION_WISHES, WISHES
from gossamer.memory.byte_sizes import MOST as MOST_BYTES
from gossamer.memory.byte_sizes import parse_bytes
from gossamer.memory.diffusers_names import find_offload
from gossamer.pipeline.loras import LoraChoice, parse_lora
from gossamer.pipeline.parse import CONTROL_KINDS, FORMATS, Size, parse_choice, parse_integer, parse_number, parse_seeds
from gossamer.pipeline.parse import parse_size as _parse_size

EMBEDDED = "embedded"
STORED = "stored"
AUTO = "auto"  # a format that the plan chooses: as stored where nothing has to be saved
MOST_STEPS = 1000
MOST_GUIDANCE = 1000.0
UNDECIDED = "auto"  # the control kind that looks at the picture first
SEEDS = 2**63  # seeds run from 0 to this, exclusive

Options = TypeVar("Options")


@dataclass(frozen=True)
class Argument:
    """How an option is given as text: `positional` as in PROMPT, `many` repeatable, `switch` without a value."""

    help: str
    parse: Callable[[str], Any] = str
    metavar: str | None = None
    form: str = "single"
    flag: str | None = None


def _argument(*parts: Any, **named: Any) -> dict[str, Argument]:
    """The metadata of an options field."""
    return {"argument": Argument(*parts, **named)}


def make(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """An options record from values by name; an unknown name raises and names the nearest known one."""
    arguments = {known.name: known.metadata.get("argument") for known in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in arguments:
            nearest = get_close_matches(name, arguments, n=1)
            raise UnknownOptionError(
                f"There is no option called {name!r}.",
                f"The options here are: {', '.join(arguments)}.",
                f"Did you mean {nearest[0]!r}?" if nearest else "Use one of these names.",
            )
    required = {known.name for known in fields(kind) if known.default is MISSING}  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if value is not None or name in required}
    return kind(**{name: _read(arguments[name], value) for name, value in given.items()})


def _read(argument: Argument | None, value: Any) -> Any:
    if argument is None:
        return value
    if argument.form != "many":
        return argument.parse(value) if isinstance(value, str) else value
    items = [value] if isinstance(value, str) else value
    return tuple(argument.parse(item) if isinstance(item, str) else item for item in items)


@dataclass(frozen=True)
class LoadOptions:
    """What is loaded, and in which form it stays in memory."""

    model: str = field(
        default=EMBEDDED,
        metadata=_argument(
            "'embedded', a diffusers folder, a checkpoint file (.safetensors, .gguf), or a hub id such as "
            "black-forest-labs/FLUX.1-dev",
            metavar="MODEL",
        ),
    )
    base: str | None = field(
        default=None,
        metadata=_argument(
            "where the parts come from that MODEL lacks: 'embedded', a diffusers folder or a hub id", metavar="MODEL"
        ),
    )
    storage: str = field(
        default=AUTO,
        metadata=_argument(
            "storage format of the transformer's linears; 'stored': as the files have it; 'auto': the same, or what "
            "the plan chooses for --vram, or where that does not fit",
            metavar="FORMAT",
        ),
    )
    text_storage: str = field(
        default=AUTO,
        metadata=_argument("storage format of the text encoders' linears, likewise", metavar="FORMAT"),
    )
    skip: tuple[str, ...] = field(
        default=(),
        metadata=_argument(
            "linears to keep as they are stored, by dotted name or pattern", metavar="PATTERN", form="many"
        ),
    )
    compute: str = field(
        default="auto",
        metadata=_argument(
            "type of the products: 'auto', 'exact' (16 bits or more), fp8, int8, bf16, fp16 or fp32; see doctor",
            parse_choice(WISHES),
            metavar="WISH",
        ),
    )
    attention: str = field(
        default="auto",
        metadata=_argument(
            "'exact', or 'auto': beside fp8 products, probabilities and values in eight bits where that is faster",
            parse_choice(ATTENTION_WISHES),
            metavar="WISH",
        ),
    )
    loras: tuple[LoraChoice, ...] = field(
        default=(),
        metadata=_argument(
            "adapter to attach: a bundled name, a file or a hub id; with a window it acts in a part of the steps",
            parse_lora,
            "NAME_OR_FILE[:SCALE][@START-END]",
            form="many",
            flag="lora",
        ),
    )
    device: str = field(
        default="auto",
        metadata=_argument("'cpu', 'cuda', 'cuda:1'; 'auto': CUDA where there is one, else the CPU", metavar="DEVICE"),
    )

    vram: int | None = field(
        default=None,
        metadata=_argument(
            "GPU memory that this run may take, the driver's part included: 6GB, 6GiB, 5.5G (default: what is free)",
            parse_bytes,
            "SIZE",
        ),
    )
    ram: int | None = field(
        default=None,
        metadata=_argument("host memory of the machine, to plan with (default: what is free)", parse_bytes, "SIZE"),
    )
    offload: str = field(
        default="auto",
        metadata=_argument("auto, none, model, sequential or group, in diffusers' words; see plan", metavar="NAME"),
    )
    least_fidelity: str = field(
        default="good",
        metadata=_argument(
            "what the plan may choose from: exact, high, good or any, or the coarsest format to accept", metavar="LEVEL"
        ),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        object.__setattr__(self, "base", None if self.base is None else str(self.base))
        _require(bool(self.model.strip()), "model", self.model, "a model has a name", "Leave it out for 'embedded'.")
        _require(self.compute in WISHES, "compute", self.compute, f"it is one of {', '.join(WISHES)}", "Use 'auto'.")
        wishes = f"it is one of {', '.join(ATTENTION_WISHES)}"
        _require(self.attention in ATTENTION_WISHES, "attention", self.attention, wishes, "Use 'auto'.")
        object.__setattr__(self, "offload", find_offload(self.offload).name)
        for name in ("vram", "ram"):
            size = getattr(self, name)
            known = size is None or (isinstance(size, int) and not isinstance(size, bool) and 0 < size <= MOST_BYTES)
            _require(known, name, size, "it is a number of bytes, or a text with a unit", "Write it like '6GB'.")


@dataclass(frozen=True)
class PaintOptions:
    """What is painted, and how."""

    prompt: str
    seed: int = 0
    steps: int = field(default=20, metadata=_argument("denoising steps", parse_integer, "N"))
    guidance: float = field(default=3.5, metadata=_argument("how closely the prompt is followed", parse_number, "G"))
    size: Size | None = field(
        default=None,
        metadata=_argument(
            "width and height in pixels, each divisible by 16 (default: the model's)", _parse_size, "WxH"
        ),
    )
    control: Any = field(
        default=None, metadata=_argument("picture that guides the shapes, through a Control LoRA", metavar="IMAGE")
    )
    control_kind: str = field(
        default=UNDECIDED,
        metadata=_argument(
            "'map': IMAGE already is what the Control LoRA expects; 'picture': its edges are extracted first; "
            "'auto': 'map', but refused where IMAGE is plainly no edge map",
            parse_choice(CONTROL_KINDS),
            "{auto,map,picture}",
        ),
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata=_argument("text tokens that the model sees (default: the model's)", parse_integer, "N"),
    )

    def __post_init__(self) -> None:
        _require_prompt(self.prompt)
        if isinstance(self.size, tuple):
            object.__setattr__(self, "size", Size(*self.size))
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < SEEDS
        _require(whole, "seed", self.seed, "a seed is a whole number from 0 to 2^63 - 1", "Try 0.")
        _require(_whole(self.steps, MOST_STEPS), "steps", self.steps, f"it must be from 1 to {MOST_STEPS}", "Try 20.")
        real = isinstance(self.guidance, int | float) and 0 <= self.guidance <= MOST_GUIDANCE
        _require(real, "guidance", self.guidance, f"it must be a number from 0 to {MOST_GUIDANCE:g}", "Try 3.5.")
        length = self.max_sequence_length
        fits = length is None or _whole(length, 512)
        _require(fits, "max_sequence_length", length, "it must be from 1 to 512, as T5's window is", "Leave it out.")
        parse_choice(CONTROL_KINDS)(self.control_kind)
        if self.control is None and self.control_kind != UNDECIDED:
            raise InvalidOptionError(
                f"The control kind {self.control_kind!r} was given without a control picture.",
                "It says how a control picture is read; without one it would be ignored.",
                "Give the picture with --control IMAGE (in Python: control=), or leave the control kind out.",
            )


@dataclass(frozen=True)
class RunOptions:
    """Which pictures one run makes, and where they go."""

    prompt: str | None = field(default=None, metadata=_argument("what to paint", metavar="PROMPT", form="positional"))
    prompts: str | None = field(
        default=None,
        metadata=_argument(
            "file of prompts, one a line; blank lines and lines that begin with # are skipped", metavar="FILE"
        ),
    )
    seeds: tuple[int, ...] = field(
        default=(0,),
        metadata=_argument(
            "seed, list of seeds or range: 7, 1,5,9 or 0-3", parse_seeds, "SEEDS", form="many", flag="seed"
        ),
    )
    output: str | None = field(
        default=None,
        metadata=_argument(
            "picture or folder to write (default: outputs/<prompt>-<seed>.png)", metavar="FILE_OR_FOLDER"
        ),
    )
    overwrite: bool = field(
        default=False, metadata=_argument("replace pictures that other settings painted", form="switch")
    )
    format: str = field(
        default="text",
        metadata=_argument("how results are printed on stdout", parse_choice(FORMATS), "{text,json}"),
    )

    def __post_init__(self) -> None:
        flat = tuple(seed for seeds in self.seeds for seed in (seeds if isinstance(seeds, tuple) else (seeds,)))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(flat)))
        if (self.prompt is None) == (self.prompts is None):
            raise InvalidOptionError(
                "A run needs either a prompt or a file of prompts.",
                "Neither was given." if self.prompt is None else "Both were given.",
                'For example: gossamer run "a red sphere", or gossamer run --prompts prompts.txt',
            )
        if self.prompt is not None:
            _require_prompt(self.prompt)


def _require_prompt(prompt: str) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidOptionError(
            "The prompt is empty.",
            "The model paints what the prompt describes; there is nothing to paint.",
            'Describe a picture, for example: "a glossy red sphere on top of a blue cube".',
        )
    if "\0" in prompt or prompt != prompt.encode("utf-8", "ignore").decode("utf-8"):
        raise InvalidOptionError(
            "The prompt holds bytes that are not text.",
            "It must be valid Unicode without NUL, or it could not be recorded in the picture.",
            "Give the prompt as UTF-8 text.",
        )


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _require(holds: bool, name: str, value: Any, rule: str, next_step: str) -> None:
    if not holds:
        raise InvalidOptionError(
            f"{value!r} is not a usable value for {name}.", f"{rule[0].upper()}{rule[1:]}.", next_step
        )
