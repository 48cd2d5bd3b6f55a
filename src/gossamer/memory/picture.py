"""What is painted, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass

PIXELS_A_TOKEN = 16  # the VAE shrinks 8 times, the transformer sees patches of 2 x 2
LATENT_SHRINK = 8


@dataclass(frozen=True)
class Job:
    """Pictures of `width` x `height` pixels, `batch` at a time, `steps` steps each, with `text_tokens` of prompt."""

    width: int = 1024
    height: int = 1024
    batch: int = 1
    steps: int = 20
    text_tokens: int = 512

    @property
    def pixels(self) -> int:
        """Of one picture."""
        return self.width * self.height

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return (self.width // PIXELS_A_TOKEN) * (self.height // PIXELS_A_TOKEN)

    @property
    def tokens(self) -> int:
        """Image and text tokens of one picture."""
        return self.image_tokens + self.text_tokens
