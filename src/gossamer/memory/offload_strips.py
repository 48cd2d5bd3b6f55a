"""A VAE decoder that works in strips of rows, with the result of the whole: no seams, at any size.

diffusers decodes overlapping tiles one by one and blends them. Each tile's group norms then see that tile only, and so
does the attention in the middle, so brightness and colour change from tile to tile. Here a group norm has the mean and
variance of the whole map, a convolution sees the rows above and below its strip, and a query attends to all positions.

Only the input and the output of a residual block are kept as whole maps. What lies between them (the map after its
first convolution, and a doubled map in front of it) is computed strip by strip each time it is needed: for each group
norm's statistics, for the output, for the shortcut. So convolutions run up to four times, about twice as many
operations in all for FLUX's decoder. At its worst moment there are two maps: 256 values a pixel of FLUX's pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from gossamer.errors import WrongModelError

STRIP_POSITIONS = 1 << 15  # of a map; 32 rows of 1024

Change = Callable[[torch.Tensor], torch.Tensor]  # of rows, position by position


class Map(Protocol):
    """A map (batch, channels, height, width) whose rows can be had."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, channels, height, width)."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A map in memory."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, channels, height, width)."""
        batch, channels, height, width = self.values.shape
        return batch, channels, height, width

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A view of them."""
        return self.values[:, :, start:stop]


@dataclass(frozen=True, eq=False)
class Doubled:
    """Every position of another map four times."""

    source: Map

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, channels, height, width)."""
        batch, channels, height, width = self.source.shape
        return batch, channels, 2 * height, 2 * width

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Of twice as many rows."""
        first = start // 2
        doubled = F.interpolate(self.source.rows(first, (stop + 1) // 2), scale_factor=2.0, mode="nearest")
        return doubled[:, :, start - 2 * first : stop - 2 * first]


@dataclass(frozen=True, eq=False)
class Convolved:
    """A 3 x 3 convolution of `before` of another map, computed whenever rows are asked for."""

    conv: nn.Conv2d
    source: Map
    before: Change

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, channels, height, width)."""
        batch, _, height, width = self.source.shape
        return batch, self.conv.out_channels, height, width

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """From the same rows and one more on either side; beyond the edge that is zeros, after `before`."""
        first, last = max(start - 1, 0), min(stop + 1, self.shape[2])
        strip = self.before(self.source.rows(first, last))
        padded = F.pad(strip, (0, 0, first - (start - 1), stop + 1 - last))
        return F.conv2d(padded, self.conv.weight, self.conv.bias, padding=(0, 1))


class StripDecoder(nn.Module):
    """In place of the `decoder` of a diffusers AutoencoderKL, whose modules it holds under their own names."""

    def __init__(self, decoder: nn.Module, positions: int) -> None:
        super().__init__()
        for name, child in decoder.named_children():
            self.add_module(name, child)
        self._whole = (decoder,)  # in a tuple: its modules are this one's already
        self._positions = positions

    @classmethod
    def of(cls, decoder: nn.Module, positions: int = STRIP_POSITIONS) -> StripDecoder:
        """The decoder in strips of about so many positions; refused where it has layers that are not known here."""
        _require_known(decoder)
        return cls(decoder, positions).train(decoder.training)

    def whole(self) -> nn.Module:
        """The decoder as it was."""
        return self._whole[0]

    def forward(self, sample: torch.Tensor, latent_embeds: None = None) -> torch.Tensor:
        """Latents (batch, channels, height, width) to pictures, as the decoder itself."""
        parts: Any = self
        x: Map = self._keep(Convolved(parts.conv_in, Kept(sample), _same))
        first, *others = parts.mid_block.resnets
        x = self._residual(first, x)
        for attention, block in zip(parts.mid_block.attentions, others, strict=True):
            x = self._residual(block, x if attention is None else self._attend(attention, x))
        for up in parts.up_blocks:
            for block in up.resnets:
                x = self._residual(block, x)
            for upsampler in up.upsamplers or ():
                x = Convolved(upsampler.conv, Doubled(x), _same)
        norm = self._norm(parts.conv_norm_out, x)
        return self._keep(Convolved(parts.conv_out, x, lambda rows: F.silu(norm(rows)))).values

    # layers -----------------------------------------------------------------------------------------------------------

    def _residual(self, block: Any, x: Map) -> Kept:
        """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""
        first = self._norm(block.norm1, x)
        hidden = Convolved(block.conv1, x, lambda rows: F.silu(first(rows)))
        second = self._norm(block.norm2, hidden)
        out = self._keep(Convolved(block.conv2, hidden, lambda rows: F.silu(second(rows))))
        for start, stop in self._strips(x):
            own = x.rows(start, stop)
            out.rows(start, stop).add_(own if block.conv_shortcut is None else block.conv_shortcut(own))
        out.values.div_(block.output_scale_factor)
        return out

    def _attend(self, attention: Any, x: Map) -> Kept:
        """x + attention of all positions to all positions; queries come strip by strip."""
        norm = self._norm(attention.group_norm, x)
        strips, width = self._strips(x), x.shape[3]
        normed = torch.cat([_tokens(norm(x.rows(*strip))) for strip in strips], dim=1)
        heads = [_heads(linear(normed), attention.heads) for linear in (attention.to_k, attention.to_v)]
        results = []
        for start, stop in strips:
            query = _heads(attention.to_q(normed[:, start * width : stop * width]), attention.heads)
            attended = F.scaled_dot_product_attention(query, heads[0], heads[1]).transpose(1, 2).flatten(2)
            result = attention.to_out[0](attended).transpose(1, 2).unflatten(2, (-1, width))
            results.append((result + x.rows(start, stop)) / attention.rescale_output_factor)
        return Kept(torch.cat(results, dim=2))

    def _norm(self, norm: nn.GroupNorm, x: Map) -> Change:
        """The group norm with the statistics of the whole map, for any rows of it."""
        mean, variance = _statistics(norm.num_groups, (x.rows(*strip) for strip in self._strips(x)))
        inverse = (variance + norm.eps).rsqrt()
        channels = x.shape[1] // norm.num_groups
        scale = inverse.repeat_interleave(channels, dim=1) * norm.weight.double()
        shift = norm.bias.double() - mean.repeat_interleave(channels, dim=1) * scale
        scale, shift = (each.float()[:, :, None, None] for each in (scale, shift))
        return lambda rows: (rows.float() * scale + shift).to(rows.dtype)

    # strips -----------------------------------------------------------------------------------------------------------

    def _keep(self, x: Map) -> Kept:
        """All rows of a map in memory."""
        values: torch.Tensor | None = None
        for start, stop in self._strips(x):
            rows = x.rows(start, stop)
            values = rows.new_empty(x.shape) if values is None else values
            values[:, :, start:stop] = rows
        assert values is not None
        return Kept(values)

    def _strips(self, x: Map) -> list[tuple[int, int]]:
        """(start, stop) of runs of rows: about `positions` positions each, and an even number of rows."""
        height, width = x.shape[2:]
        step = max(2, self._positions // width // 2 * 2)
        return [(start, min(start + step, height)) for start in range(0, height, step)]


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _statistics(groups: int, strips: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (batch, groups) of all strips together, in float64 from the float32 ones of each.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    count = 0
    mean = deviations = torch.zeros((), dtype=torch.float64)
    for strip in strips:
        values = strip.float().unflatten(1, (groups, -1)).flatten(2)
        own, size = values.shape[2], count + values.shape[2]
        variance, centre = (each.double() for each in torch.var_mean(values, dim=2, correction=0))
        apart = centre - mean.to(centre.device)
        deviations = deviations.to(centre.device) + variance * own + apart**2 * (count * own / size)
        mean = mean.to(centre.device) + apart * (own / size)
        count = size
    return mean, deviations / count


def _tokens(rows: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) to (batch, positions, channels)."""
    return rows.flatten(2).transpose(1, 2)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, positions, channels) to (batch, heads, positions, head size)."""
    apart: torch.Tensor = x.unflatten(2, (heads, -1))
    return apart.transpose(1, 2)


# checks ---------------------------------------------------------------------------------------------------------------


def _require_known(decoder: Any) -> None:
    """Every layer is one that `forward` runs, in the setting that it runs it in."""
    blocks = [*decoder.mid_block.resnets, *(block for up in decoder.up_blocks for block in up.resnets)]
    upsamplers = [upsampler for up in decoder.up_blocks for upsampler in up.upsamplers or ()]
    attentions = [each for each in decoder.mid_block.attentions if each is not None]
    unknown = (
        _other(decoder.up_blocks, lambda up: type(up).__name__ == "UpDecoderBlock2D")
        or _other([decoder.conv_norm_out, *(norm for b in blocks for norm in (b.norm1, b.norm2))], _is_group_norm)
        or _other(blocks, _is_plain_block)
        or _other(upsamplers, lambda up: up.use_conv and up.interpolate and up.norm is None and up.name == "conv")
        or _other([decoder.conv_in, decoder.conv_out, *(up.conv for up in upsamplers)], _is_three_by_three)
        or _other(attentions, _is_plain_attention)
        or _other([decoder.conv_act], lambda act: isinstance(act, nn.SiLU))
    )
    if unknown is not None:
        raise WrongModelError(
            f"This VAE cannot be decoded in strips: its decoder has a {unknown}.",
            "Strips are exact for the layers of FLUX's autoencoder, in the setting that it has them in.",
            "Use a placement with vae='whole'.",
        )


def _other(parts: Iterable[Any], known: Callable[[Any], bool]) -> str | None:
    """The name of a part that is not known, with what torch prints of it."""
    return next((str(part).split("\n")[0] for part in parts if not known(part)), None)


def _is_group_norm(norm: Any) -> bool:
    return isinstance(norm, nn.GroupNorm) and norm.affine


def _is_three_by_three(conv: Any) -> bool:
    setting = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return type(conv) is nn.Conv2d and setting == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _is_plain_block(block: Any) -> bool:
    plain = type(block).__name__ == "ResnetBlock2D" and isinstance(block.nonlinearity, nn.SiLU)
    other = (block.upsample, block.downsample, block.time_emb_proj)
    still = block.dropout.p == 0 or not block.training
    return plain and still and other == (None,) * 3 and all(map(_is_three_by_three, (block.conv1, block.conv2)))


def _is_plain_attention(attention: Any) -> bool:
    parts = (attention.norm_q, attention.norm_k, attention.spatial_norm, attention.norm_cross)
    return attention.group_norm is not None and bool(attention.residual_connection) and parts == (None,) * 4
