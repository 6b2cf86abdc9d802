"""Ways to an int4 K that benchmarks/kv_formats.py measures; V is int4 with a scale a token and head in all of them.

Where q is changed too, q . k stays what it was but for rounding, or changes by the same amount for every key of a query,
which softmax does not see. K is quantised by the hardware's quantiser (docs/numerics.md section 1) unless the name says
otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from golden.epilogue import channels, quantise_heads, query_channels
from golden.model import Cache, FloatModel
from host_driver.key_channels import KeyChannels, channels_of


@dataclass(frozen=True)
class LayerStatistics:
    """K of a layer behind RoPE on the calibration text, float32 (kv_heads, head_dim)."""

    mean: Tensor
    largest: Tensor
    """Largest magnitude of a channel."""
    spread: Tensor
    """Largest distance of a channel from its mean."""
    channels: KeyChannels
    """What `lutra calibrate` makes of the same keys, for a layer."""


Statistics = list[LayerStatistics]


def calibrate(network: FloatModel, ids: list[int]) -> Statistics:
    """Statistics of every layer on one text."""
    found: Statistics = []

    def look(_: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = k[0]  # (tokens, kv_heads, head_dim)
        mean = keys.mean(0)
        words = channels_of(keys.transpose(0, 1)[None].numpy())
        found.append(LayerStatistics(mean, keys.abs().amax(0), (keys - mean).abs().amax(0), words))
        return q, k, v

    network.cache = look
    network.hidden(torch.tensor([ids]))
    network.cache = None
    return found


def cached(y: Tensor, bits: int) -> Tensor:
    """K or V (windows, tokens, heads, head_dim) as they come back out of a cache of so many bits."""
    q, scale = quantise_heads(y.flatten(0, 1), int4=bits == 4)
    return (q * scale[..., None]).unflatten(0, y.shape[:2])


def _with_zero_point(k: Tensor) -> Tensor:
    """16 steps from the least to the largest of each token and head."""
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-30)
    return ((k - low) / step).round() * step + low


def _scaled(scales: list[Tensor], means: list[Tensor] | None, group: int) -> Cache:
    """K less its mean and divided by its scale, q times the scale: per layer (kv_heads, head_dim)."""

    def cache(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = scales[layer]
        centred = k if means is None else k - means[layer]
        return q * scale.repeat_interleave(group, 0), cached(centred / scale, 4), cached(v, 4)

    return cache


def _pairs(largest: Tensor) -> Tensor:
    """The same number for both channels of a RoPE pair (2i, 2i+1): such a scale can be folded into Q's and K's rows."""
    return largest.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)


def pair_scales(statistics: Statistics, group: int) -> Cache:
    """A static scale a channel pair: the root of its largest magnitude, the best of a few exponents."""
    return _scaled([_pairs(layer.largest) ** 0.5 for layer in statistics], None, group)


def channel_scales(statistics: Statistics, group: int) -> Cache:
    """A static mean and scale a channel, behind RoPE; the best of a few exponents."""
    return _scaled([layer.spread**0.75 for layer in statistics], [layer.mean for layer in statistics], group)


def key_channels(statistics: Statistics, _: int) -> Cache:
    """The hardware's: offset and power of two a channel, as `--keys` brings them, in golden's arithmetic."""

    def cache(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = statistics[layer].channels
        offset, shift = torch.tensor(found.offset[0]).float(), torch.tensor(found.shift[0]).long()
        return query_channels(q, shift), cached(channels(k, offset, shift), 4), cached(v, 4)

    return cache


def centred_pairs(statistics: Statistics, group: int) -> Cache:
    """A static mean a channel behind RoPE, a static scale a pair."""
    return _scaled([_pairs(layer.spread) ** 0.5 for layer in statistics], [layer.mean for layer in statistics], group)


def zero_point(_: Statistics, __: int) -> Cache:
    """A scale and a zero point a token and head."""
    return lambda _, q, k, v: (q, _with_zero_point(k), cached(v, 4))


def hadamard(statistics: Statistics, _: int) -> Cache:
    """Q and K of a head times a Hadamard matrix behind RoPE; head_dim must be a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < statistics[0].mean.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return lambda _, q, k, v: (q @ matrix, cached(k @ matrix, 4), cached(v, 4))


SCHEMES: dict[str, tuple[int, Callable[[Statistics, int], Cache]]] = {
    "int4, K with a static scale a RoPE pair": (0, pair_scales),
    "int4, K with a zero point": (4, zero_point),
    "int4, K with Hadamard-64": (0, hadamard),
    "int4, K with a static mean a channel, scale a pair": (0, centred_pairs),
    "int4, K with a static mean and scale a channel": (0, channel_scales),
    "int4, K with an offset and a power of two a channel (--keys)": (0, key_channels),
}
"""Name: bytes a token and head beyond two int4 rows and their scales, and the way."""
