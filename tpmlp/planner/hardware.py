"""Hardware: what a device computes, holds and receives in a second, as predictions need it.

    a product      FLOPs / (share of the peak at its size * peak), or its bytes / memory's rate
    a collective   a table by size and group where one was measured; else
                   steps * latency_s + received bytes / bytes_per_s, level by level

A *level* is a kind of link and how many devices it joins: a node's NVLink, a pod's torus, what is
between nodes. A group of devices that lies in several levels does a part of its collective in each,
the innermost on the largest arrays: gathering V bytes over p_1 devices of a node and p_2 nodes is
V / p_1 over p_2 between nodes, then V over p_1 inside.

The size of a product m x k by k x n is its *side*, the cube root of m n k.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tpmlp.checks import DTYPES
from tpmlp.kernels.cost import Kind

PLATFORMS = ("cpu", "gpu", "tpu")

# Of a group size: (bytes of the whole, seconds), by size.
Curve = Sequence[tuple[float, float]]
Measured = Mapping[str, Mapping[int, Curve]]

# A message to the next device is one step of a ring, of which it takes an all-reduce twice as many.
ROUNDS: Mapping[str, int] = {"all_reduce": 2}


class Group(NamedTuple):
    """The devices of a collective on one level.

    Attributes:
        level: the links between them.
        size: how many.
    """

    level: "Level"
    size: int


class Span(NamedTuple):
    """Where the devices of a group are, in the order of the mesh.

    Attributes:
        size: devices of the group.
        stride: how far its neighbours are from each other.
        devices: of the mesh, all groups of it.
    """

    size: int
    stride: int
    devices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """Links of one kind.

    Attributes:
        name: for example "NVLink".
        devices: how many devices they join, neighbours in the order of the mesh; None for any
            number. Of levels one in the other, each a multiple of the one inside.
        bytes_per_s: that a device receives in a collective.
        latency_s: of a step of a ring from one device to the next.
        measured: seconds of collectives by kind, group size and bytes of the whole array (gathered,
            or summed), in place of the two numbers above; may be empty.

    Raises:
        ValueError: a number that is not positive, a latency below 0, or a table out of order.
    """

    name: str
    devices: int | None
    bytes_per_s: float
    latency_s: float
    measured: Measured = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.devices is not None:
            _check_positive("devices", self.devices)
        _check_positive("bytes_per_s", self.bytes_per_s)
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(
                f"latency_s must be finite and at least 0: got latency_s={self.latency_s!r}. Use "
                "seconds, for example latency_s=2e-6."
            )
        for kind, groups in self.measured.items():
            _check_kind(kind, groups)

    def seconds(self, kind: str, num_bytes: float, size: int) -> float:
        """Return how long a collective of a group takes.

        A group of a size that was not measured takes what the nearest one does in which a device
        receives as many bytes.

        Args:
            kind: of tpmlp.kernels.cost.Kind.
            num_bytes: of the whole array.
            size: devices of the group.
        """
        groups = self.measured.get(kind)
        if groups:
            near = min(groups, key=lambda p: abs(math.log(p / size)))
            share = (size - 1) / size / ((near - 1) / near)
            return _interpolate(groups[near], num_bytes * share)
        rounds = ROUNDS.get(kind, 1)
        received = rounds * num_bytes * (size - 1) / size
        return rounds * (size - 1) * self.latency_s + received / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A kind of device and its links.

    Attributes:
        name: for example "h100".
        platform: "cpu", "gpu" or "tpu", whose compiler the predictions of memory are for.
        flops_per_s: peak of products by the dtype of their operands, at JAX's default precision.
        memory_bytes: of a device.
        memory_bytes_per_s: of that memory.
        products: (side, share of the peak) of square products, by side; between two, the share
            grows with the logarithm of the side; below the first it falls with the side.
        levels: links, innermost first; the last joins any number of devices.
        sources: where the numbers are from, and which are assumed.

    Raises:
        ValueError: a number that is not positive, an unknown dtype or platform, tables or levels
            out of order.

    Examples:
        >>> mine = Hardware(
        ...     name="mine",
        ...     platform="gpu",
        ...     flops_per_s={"float32": 1e12},
        ...     memory_bytes=8e9,
        ...     memory_bytes_per_s=1e11,
        ...     levels=(Level(name="PCIe", devices=None, bytes_per_s=1e10, latency_s=1e-5),),
        ... )
        >>> mine.product_s(1000, 1000, 1000, "float32")
        0.002
        >>> mine.collective_s("all_gather", 4e6, Span(size=4, stride=1, devices=4))
        0.00033
    """

    name: str
    platform: str
    flops_per_s: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    products: Sequence[tuple[float, float]] = ((1.0, 1.0),)
    levels: Sequence[Level]
    sources: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ValueError(
                f"platform must be one of {PLATFORMS}: got platform={self.platform!r}. It is whose "
                "compiler memory is predicted for."
            )
        for name in ("memory_bytes", "memory_bytes_per_s"):
            _check_positive(name, getattr(self, name))
        if not self.flops_per_s or not set(self.flops_per_s) <= set(DTYPES):
            raise ValueError(
                f"flops_per_s must be a number for each of some of {DTYPES}: got "
                f"flops_per_s={dict(self.flops_per_s)!r}. Use for example {{'bfloat16': 1e14}}."
            )
        for dtype, value in self.flops_per_s.items():
            _check_positive(f"flops_per_s[{dtype!r}]", value)
        _check_products(self.products)
        _check_levels(self.levels)

    @classmethod
    def from_json(cls, path: Any) -> "Hardware":
        """Return the hardware that to_json wrote, or that a calibration measured.

        Raises:
            ValueError: the file describes none.
        """
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        try:
            levels = tuple(_level(**level) for level in said.pop("levels"))
            said["products"] = tuple(map(tuple, said.get("products", ((1.0, 1.0),))))
            return cls(**{**said, "levels": levels, "sources": tuple(said.get("sources", ()))})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"path must be of a file that Hardware.to_json wrote: got path={str(path)!r}, "
                f"which is none ({error}). Write it with to_json."
            ) from error

    def to_json(self, path: Any) -> None:
        """Write all numbers to a file, from which from_json reads them."""
        said = json.dumps(asdict(self), indent=2)
        Path(path).write_text(said + "\n", encoding="utf-8")

    def peak_flops_per_s(self, dtype: str) -> float:
        """Return the peak of products of a dtype.

        Raises:
            ValueError: the hardware has none of it.
        """
        if dtype not in self.flops_per_s:
            raise ValueError(
                f"dtype must be one that {self.name} computes in: got dtype={dtype!r}. Use one of "
                f"{sorted(self.flops_per_s)}."
            )
        return self.flops_per_s[dtype]

    def product_s(self, m: float, n: float, k: float, dtype: str) -> float:
        """Return how long a product of m x k by k x n takes."""
        share = _interpolate_share(self.products, (m * n * k) ** (1 / 3))
        computing = 2 * m * n * k / (share * self.peak_flops_per_s(dtype))
        moved = (m * k + k * n + m * n) * ITEM_BYTES[dtype]
        return max(computing, moved / self.memory_bytes_per_s)

    def groups(self, span: Span) -> list[Group]:
        """Return what part of a group of devices is on each level, innermost first.

        Examples:
            >>> h100 = get_hardware("h100")
            >>> [(level.name, size) for level, size in h100.groups(Span(16, stride=2, devices=64))]
            [('NVLink', 4), ('InfiniBand NDR', 4)]
        """
        found = []
        for level in self.levels:
            there = span.size if level.devices is None else _common(span, level.devices)
            if there > 1:
                found.append(Group(level, there))
            span = span._replace(size=span.size // there, stride=span.stride * there)
        return found

    def collective_s(self, kind: str, num_bytes: float, span: Span) -> float:
        """Return how long a collective takes, one level after the other.

        Args:
            kind: of tpmlp.kernels.cost.Kind.
            num_bytes: of the whole array: gathered, or summed.
            span: where the devices are.
        """
        return collective_s(kind, num_bytes, self.groups(span))

    def message_s(self, num_bytes: float, span: Span) -> float:
        """Return how long messages take from each device of a group to the next, the slowest."""
        groups = self.groups(span)
        return max((g.level.latency_s + num_bytes / g.level.bytes_per_s for g in groups), default=0)


ITEM_BYTES: Mapping[str, int] = {"bfloat16": 2, "float32": 4, "float64": 8}


def get_hardware(name: Any) -> Hardware:
    """Return one of the known chips, or a Hardware as it is.

    Args:
        name: of tpmlp.planner.chips.CHIPS, for example "h100"; or a Hardware.

    Raises:
        ValueError: an unknown name; says which are near.

    Examples:
        >>> get_hardware("v5p").memory_bytes
        95000000000.0
        >>> get_hardware("h10")
        Traceback (most recent call last):
        ...
        ValueError: hardware must be one of ... Did you mean 'h100' or 'h200'? ...
    """
    # They are written in terms of this module.
    from tpmlp.planner.chips import find_chip

    return name if isinstance(name, Hardware) else find_chip(name)


def collective_s(kind: str, num_bytes: float, groups: Iterable[Group]) -> float:
    """Return how long a collective takes of which each level has a group, innermost first."""
    total, inside = 0.0, 1
    for level, there in groups:
        total += level.seconds(kind, num_bytes / inside, there)
        inside *= there
    return total


def _common(span: Span, joined: int) -> int:
    """Return how many of every group are joined: all, or what divides them and what it steps on."""
    if span.devices <= joined:
        return span.size
    inside = span.stride < joined and joined % span.stride == 0
    return math.gcd(span.size, joined // span.stride) if inside else 1


def _interpolate(curve: Curve, num_bytes: float) -> float:
    """Return seconds between two that were measured; beyond, as the nearest two go on."""
    sizes = [size for size, _ in curve]
    if num_bytes <= sizes[0]:
        return curve[0][1]
    i = min(bisect_left(sizes, num_bytes), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (num_bytes - x0) / (x1 - x0)


def _interpolate_share(products: Sequence[tuple[float, float]], side: float) -> float:
    """Return the share of the peak at a side."""
    sides = [at for at, _ in products]
    if side <= sides[0]:
        # A single row is of every size.
        return products[0][1] * (side / sides[0] if len(products) > 1 else 1)
    if side >= sides[-1]:
        return products[-1][1]
    i = bisect_left(sides, side)
    (x0, y0), (x1, y1) = products[i - 1], products[i]
    return y0 + (y1 - y0) * math.log(side / x0) / math.log(x1 / x0)


def _level(measured: Any = None, **said: Any) -> Level:
    tables = {
        kind: {int(p): tuple(map(tuple, curve)) for p, curve in groups.items()}
        for kind, groups in (measured or {}).items()
    }
    return Level(**said, measured=tables)


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(
            f"{name} must be a positive number: got {name}={value!r}. Use what a device has, in "
            "bytes, bytes a second or FLOPs a second."
        )


def _check_kind(kind: str, groups: Mapping[int, Curve]) -> None:
    if kind not in get_args(Kind):
        raise ValueError(
            f"measured must have kinds of {get_args(Kind)}: got kind={kind!r}. Leave others out."
        )
    for size, curve in groups.items():
        rising = len(curve) > 1 and all(a < b and s > 0 for (a, s), (b, _) in pairwise(curve))
        if size < 2 or not rising:
            raise ValueError(
                "measured must have two rows or more, (bytes, seconds) by bytes, for groups of 2 "
                f"and more: got {kind} of {size}: {curve!r}. Sort them, and leave out what is 0."
            )


def _check_products(products: Sequence[tuple[float, float]]) -> None:
    rising = all(a < b for (a, _), (b, _) in pairwise(products))
    inside = all(side > 0 and 0 < share <= 1 for side, share in products)
    if not products or not rising or not inside:
        raise ValueError(
            "products must be rows (side, share of the peak) by side, shares above 0 and up to 1: "
            f"got products={products!r}. Use ((1.0, 1.0),) for the peak at every size."
        )


def _check_levels(levels: Sequence[Level]) -> None:
    if not levels or levels[-1].devices is not None:
        raise ValueError(
            "levels must end with one that joins any number of devices: got "
            f"{[(level.name, level.devices) for level in levels]}. Give the last devices=None."
        )
    joined = [level.devices for level in levels[:-1]]
    if any(a is None or b is None or b % a for a, b in pairwise(joined)) or None in joined:
        raise ValueError(
            "levels must each join a multiple of the devices of the one before, and only the last "
            f"any number: got devices={[*joined, None]}. Put the innermost first."
        )
