"""Keeps the progress bars and start-up notices of other libraries out of the way, for the length of a `with` block."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

NOISY = ("transformers", "diffusers", "bitsandbytes")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Only errors of the loading libraries are shown inside; all their settings are as before afterwards."""
    # importing the two modules makes them set up their own loggers, which would undo a level set earlier
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub_bars = not are_progress_bars_disabled()
    bars = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    levels = {name: logging.getLogger(name).level for name in NOISY}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in bars:
        module.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        for module in bars:
            module.enable_progress_bar()
        (enable_progress_bars if hub_bars else disable_progress_bars)()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
