"""Every error a user can meet: what happened, why, and what to do next.

Each kind has a stable code that scripts may match. The command line prints the three parts and exits with code 2;
a traceback means a defect of Gossamer, never a mistake of its user.
"""

from __future__ import annotations

from typing import ClassVar


class GossamerError(Exception):
    """What happened, why, and what to do next; `code` is stable across versions."""

    code: ClassVar[str] = "gossamer"

    def __init__(self, what: str, why: str, next_step: str) -> None:
        super().__init__(what, why, next_step)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.what}\n  why:  {self.why}\n  next: {self.next_step}"


class UnknownStorageError(GossamerError):
    """A storage format that does not exist."""

    code = "unknown-storage"


class UnsupportedShapeError(GossamerError):
    """A weight whose shape a storage format cannot hold."""

    code = "unsupported-shape"


class UnknownOptionError(GossamerError):
    """An option, layer name or value that nothing here understands."""

    code = "unknown-option"


class InvalidOptionError(GossamerError):
    """A known option with a value that cannot work."""

    code = "invalid-option"


class FileMissingError(GossamerError):
    """A file or folder that is not there, or cannot be read."""

    code = "file-missing"


class FileDamagedError(GossamerError):
    """A file that is truncated, corrupt, or lies about itself."""

    code = "file-damaged"


class WrongModelError(GossamerError):
    """An adapter or checkpoint that was made for another model."""

    code = "wrong-model"


class AdapterError(GossamerError):
    """An adapter that cannot be attached, found or removed."""

    code = "adapter"


class OutputError(GossamerError):
    """An output that cannot be written."""

    code = "output"


class NotReproducibleError(GossamerError):
    """A picture whose recorded settings do not lead back to the same pixels."""

    code = "not-reproducible"
