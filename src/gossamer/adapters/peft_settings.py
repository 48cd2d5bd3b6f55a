"""PEFT's settings in the header of files that diffusers saved: where such a file keeps alpha.

    __metadata__["lora_adapter_metadata"]   JSON: {"transformer.r": 16, "transformer.lora_alpha": 8, ...}

with the settings of the text encoders under `text_encoder.` and `text_encoder_2.`.

The multiplier is lora_alpha / rank, or lora_alpha / sqrt(rank) where `use_rslora` is set; `alpha_pattern` gives single
modules their own alpha, by regular expressions that match the end of a module's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.errors import AdapterError, FileDamagedError

KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class PeftSettings:
    """What of PEFT's settings changes the arithmetic; no alpha means alpha = rank."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def multiplier(self, module: str, rank: int) -> float:
        """alpha / rank of one module by its diffusers name."""
        alpha = next((value for end, value in self.alpha_pattern.items() if _matches(end, module)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


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
    if settings.get("use_dora"):
        raise AdapterError(
            "This adapter was trained with DoRA.",
            "Its header sets use_dora: without the magnitudes the factors mean something else.",
            "Use an adapter that was trained without DoRA.",
        )
    return found


def _settings(settings: Mapping[str, Any]) -> PeftSettings:
    alpha = settings.get("lora_alpha")
    pattern = {re.compile(end).pattern: float(value) for end, value in (settings.get("alpha_pattern") or {}).items()}
    return PeftSettings(None if alpha is None else float(alpha), pattern, bool(settings.get("use_rslora")))


def _matches(end: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({end})$", module) is not None
