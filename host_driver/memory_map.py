"""Where everything lies in the device's memory and in its vector memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from spec.config import LANES, ModelConfig, ceil_div

ALIGNMENT = 4096
"""Every region starts on one of AXI's 4 KB boundaries, so that no burst of it is split needlessly."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A named piece of the device's memory."""

    name: str
    address: int
    size: int

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.address + self.size


@dataclass(frozen=True, kw_only=True)
class MemoryMap:
    """All regions of one compiled model, in address order."""

    regions: tuple[Region, ...]

    def __getitem__(self, name: str) -> Region:
        for region in self.regions:
            if region.name == name:
                return region
        raise KeyError(f"no region {name!r}; there are {', '.join(region.name for region in self.regions)}")

    @property
    def limit(self) -> int:
        """First byte behind the model's memory: the `memory_limit` register."""
        return ceil_div(self.regions[-1].end, ALIGNMENT) * ALIGNMENT


def place(sizes: Iterable[tuple[str, int]]) -> MemoryMap:
    """Regions one behind the other from address 0, each on a 4 KB boundary."""
    regions: list[Region] = []
    address = 0
    for name, size in sizes:
        regions.append(Region(name=name, address=address, size=size))
        address = ceil_div(address + size, ALIGNMENT) * ALIGNMENT
    return MemoryMap(regions=tuple(regions))


@dataclass(frozen=True, kw_only=True)
class VectorRegion:
    """``tokens`` vectors in the vector memory, ``stride`` rows of 8 FP32 each."""

    row: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class VectorMap:
    """The vector memory: residual stream X, attention output Y, hidden values H of the feed-forward network."""

    x: VectorRegion
    y: VectorRegion
    h: VectorRegion
    rows: int


def vector_map(model: ModelConfig, tokens: int) -> VectorMap:
    """X, Y and H of a tile one behind the other."""
    strides = [length // LANES for length in (model.hidden, model.q_dim, model.ffn)]
    starts = [tokens * sum(strides[:place]) for place in range(3)]
    x, y, h = (VectorRegion(row=row, stride=stride) for row, stride in zip(starts, strides, strict=True))
    return VectorMap(x=x, y=y, h=h, rows=tokens * sum(strides))
