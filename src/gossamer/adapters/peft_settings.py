"""PEFT's settings in the header of files that diffusers saved: where such a file keeps alpha.

    __metadata__["lora_adapter_metadata"]   JSON: {"transformer.r": 16, "transformer.lora_alpha": 8, ...}

with the settings of the text encoders under `text_encoder.` and `text_encoder_2.`. PEFT itself writes a folder instead:
`adapter_model.safetensors`, and the same settings of the one model that it wrapped in `adapter_config.json` beside it.

The multiplier is lora_alpha / rank, or lora_alpha / sqrt(rank) where `use_rslora` is set; `alpha_pattern` gives single
modules their own alpha, by regular expressions that match the end of a module's name. LoKr and LoHa call it `alpha`;
where both factors of a LoKr are whole, its rank is in the settings alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.errors import FileDamagedError

KEY = "lora_adapter_metadata"
FOLDER_WEIGHTS, FOLDER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
MOST_BYTES = 1_000_000  # of the settings in a folder; PEFT writes about one thousand


@dataclass(frozen=True)
class PeftSettings:
    """What of PEFT's settings changes the arithmetic; no alpha means alpha = rank."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def multiplier(self, module: str, rank: int | None) -> float:
        """alpha / rank of one module by its diffusers name; the rank of the settings where its factors have none."""
        alpha = _of_module(self.alpha_pattern, module, self.alpha)
        divisor = rank if rank is not None else _of_module(self.rank_pattern, module, self.rank)
        if alpha is None or not divisor:
            return 1.0
        return alpha / (math.sqrt(divisor) if self.use_rslora else divisor)


def with_folder_settings(path: Path, metadata: Mapping[str, str]) -> Mapping[str, str]:
    """A header's metadata, with the settings of PEFT's folder where the file is the weights of one."""
    beside = path.parent / FOLDER_SETTINGS
    if path.name != FOLDER_WEIGHTS or KEY in metadata or not beside.is_file():
        return metadata
    try:
        with beside.open("rb") as file:
            content = json.loads(file.read(MOST_BYTES))
        return {**metadata, KEY: json.dumps({f"transformer.{key}": value for key, value in content.items()})}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FileDamagedError(
            f"{str(beside)!r} cannot be read.",
            f"It holds the strength of the adapter beside it, as a JSON table: {error}.",
            "Copy or save the folder again, or rename the weights if that file belongs to another adapter.",
        ) from error


def read_peft_settings(metadata: Mapping[str, str], component: str = "transformer") -> PeftSettings:
    """The settings for one component; the defaults when the file has none."""
    if KEY not in metadata:
        return PeftSettings()
    try:
        content = json.loads(metadata[KEY])
        prefix = f"{component}."
        settings = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        found = _settings(settings)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise FileDamagedError(
            f"The header's {KEY!r} cannot be read.",
            f"It should be a JSON table of PEFT's settings: {error}.",
            "Save the adapter again, or remove that entry from its header.",
        ) from error
    return found


def _settings(settings: Mapping[str, Any]) -> PeftSettings:
    return PeftSettings(
        alpha=_number(settings.get("lora_alpha", settings.get("alpha"))),
        alpha_pattern=_pattern(settings.get("alpha_pattern")),
        rank=_number(settings.get("r")),
        rank_pattern=_pattern(settings.get("rank_pattern")),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _pattern(values: Mapping[str, Any] | None) -> dict[str, float]:
    """Numbers by regular expression, each of them checked."""
    return {re.compile(end).pattern: float(value) for end, value in (values or {}).items()}


def _of_module(pattern: Mapping[str, float], module: str, default: float | None) -> float | None:
    """The number of the first expression that matches the end of the module's name."""
    matching = (value for end, value in pattern.items() if re.match(rf"(.*\.)?({end})$", module))
    return next(matching, default)
