"""Where an adapter's file comes from: bundled, on this machine, or in a repository of the Hugging Face hub.

    owner/name/path/style.safetensors    one file of a repository
    owner/name                           a repository that holds one .safetensors file

A local path always wins. What is in the hub's cache is used without asking the hub; what is not is pulled, and
verified, as `gossamer pull` does it.
"""

from __future__ import annotations

from pathlib import Path

from gossamer.adapters.peft_settings import FOLDER_SETTINGS, FOLDER_WEIGHTS
from gossamer.errors import GossamerError, InvalidOptionError
from gossamer.pipeline.loras import LoraChoice, find_local, find_lora
from gossamer.pipeline.pull import Target, fetch, parse_target, plan_adapter, plan_pull
from gossamer.pipeline.sources import MAIN, HubCache

ENDING = ".safetensors"


def locate(choice: LoraChoice) -> Path:
    """The file of an adapter, fetched where the hub has it and this machine has not."""
    local = find_local(choice)
    if local is not None:
        return local
    target = _target(choice.source)
    return find_lora(choice) if target is None else _cached(target) or _pulled(target)


def _target(source: str) -> Target | None:
    """What a source means on the hub; None where it can only be a local path."""
    try:
        target = parse_target(source)
    except InvalidOptionError:
        return None
    if target.file is None:  # a missing local file, styles/ink.safetensors, has the form of a repository too
        return None if source.lower().endswith((ENDING, ".gguf")) else target
    return target if target.file.endswith(ENDING) else None


def _cached(target: Target) -> Path | None:
    """The file in the hub's cache, of the commit that was fetched last."""
    cache = HubCache.of(target.repository)
    commit = cache.commit(MAIN)
    if commit is None:
        return None
    if target.file is not None:
        names = [target.file]
    else:  # only the record that `_pulled` leaves says which file it is: a snapshot may lack others
        names = [file.name for file in cache.files(commit) or () if file.name.endswith(ENDING)]
    found = [cache.snapshot(commit) / name for name in names]
    return found[0] if len(found) == 1 and _is_whole(found[0]) else None


def _is_whole(path: Path) -> bool:
    """Whether the file is there, and the settings that belong to it."""
    return path.is_file() and (path.name != FOLDER_WEIGHTS or path.with_name(FOLDER_SETTINGS).is_file())


def _pulled(target: Target) -> Path:
    try:
        plan = plan_adapter(target.repository) if target.file is None else plan_pull(str(target))
        fetch(plan)
    except GossamerError as error:
        why = f"{error.why} There is no file {str(target)!r} on this machine either."
        raise type(error)(error.what, why, error.next_step) from error
    cache, commit = plan.origin.cache, plan.origin.commit
    if target.file is None and cache.files(commit) is None:
        cache.set_files(commit, plan.files)
    return plan.path
