"""From times to ratios, from ratios to verdicts. Reads the record (plain JSON data) alone.

A *row* is one program of the record; a *cell* is one size, all numbers of devices and dtypes. A
ratio of two programs is taken in every round, in which both ran within seconds of each other;
its value is the median over the rounds, its spread the quartiles. The mean of ratios over cells is
geometric, taken round by round as well.

Of a group the best stands for all: the fastest by its median for time, the leanest for memory,
which may be two different programs.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.bench.problem import Size

Row = dict[str, Any]
Cell = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A ratio in every round.

    Attributes:
        rounds: one number a round.

    Examples:
        >>> ratio = Ratio.of([2.0, 3.0, 4.0], [4.0, 4.0, 4.0])
        >>> ratio.median, ratio.quartiles
        (0.75, (0.625, 0.875))
    """

    rounds: tuple[float, ...]

    @classmethod
    def of(cls, mine: Sequence[float], other: Sequence[float]) -> "Ratio":
        """Return mine / other, round by round."""
        return cls(rounds=tuple(a / b for a, b in zip(mine, other, strict=True)))

    @classmethod
    def geometric_mean(cls, ratios: Iterable["Ratio"]) -> "Ratio":
        """Return the geometric mean over cells, round by round.

        Examples:
            >>> ratios = [Ratio(rounds=(0.5, 0.5)), Ratio(rounds=(2.0, 0.5))]
            >>> Ratio.geometric_mean(ratios).rounds
            (1.0, 0.5)
        """
        together = zip(*(ratio.rounds for ratio in ratios), strict=True)
        return cls(rounds=tuple(statistics.geometric_mean(one) for one in together))

    @property
    def median(self) -> float:
        """The value."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The spread: a quarter of the rounds lie below, a quarter above."""
        if len(self.rounds) == 1:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.median:.2f} ({low:.2f}-{high:.2f})"


def median_s(row: Row) -> float:
    """Return the median of a program's rounds, in seconds."""
    return statistics.median(row["seconds"])


def fastest(rows: Iterable[Row]) -> Row:
    """Return the row with the least median; rows that were screened out do not take part."""
    return min((row for row in rows if row["seconds"]), key=median_s)


def leanest(rows: Iterable[Row]) -> Row:
    """Return the row with the fewest bytes of temporaries."""
    return min(rows, key=lambda row: row["temp_bytes"])


def name(row: Row) -> str:
    """Return what a program is called in a table."""
    return ", ".join(filter(None, (row["variant"], row["form"], row["mesh"])))


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The kernel against its baselines: one size, number of devices and dtype.

    Attributes:
        size: the size.
        devices: number of devices.
        dtype: of the products.
        kernel: the step.
        automatic: the fastest automatic partitioning.
        leanest: the one with the fewest temporaries.
        unsharded: the faster form of the network on one device.
        products: the products alone; None where they were not measured.
    """

    size: Size
    devices: int
    dtype: str
    kernel: Row
    automatic: Row
    leanest: Row
    unsharded: Row
    products: Row | None

    @property
    def to_automatic(self) -> Ratio:
        """Time over that of the fastest automatic partitioning."""
        return Ratio.of(self.kernel["seconds"], self.automatic["seconds"])

    @property
    def to_unsharded(self) -> Ratio:
        """Time over that of one device with all the cores."""
        return Ratio.of(self.kernel["seconds"], self.unsharded["seconds"])

    @property
    def floor(self) -> Ratio | None:
        """Time of the products alone over that of the fastest automatic partitioning."""
        if self.products is None:
            return None
        return Ratio.of(self.products["seconds"], self.automatic["seconds"])

    @property
    def temporaries(self) -> float:
        """Bytes of temporaries over those of the leanest automatic partitioning."""
        return self.kernel["temp_bytes"] / self.leanest["temp_bytes"]

    @property
    def temporaries_to_fastest(self) -> float:
        """Bytes of temporaries over those of the fastest one, which is often less lean."""
        return self.kernel["temp_bytes"] / self.automatic["temp_bytes"]


def select(cell: Cell, group: str, devices: int, dtype: str) -> list[Row]:
    """Return the rows of a group."""
    wanted = (group, devices, dtype)
    return [row for row in cell["rows"] if (row["group"], row["devices"], row["dtype"]) == wanted]


def compare(cell: Cell, lean: Cell | None = None) -> list[Comparison]:
    """Return a comparison for each number of devices and dtype of a cell.

    Args:
        cell: the kernel's fastest row is taken, of however many it has.
        lean: the cell whose automatic partitionings compete for memory, by default the same.
    """
    keys = {(r["devices"], r["dtype"]): None for r in cell["rows"] if r["group"] == "kernel"}
    found = []
    for devices, dtype in keys:
        rivals = select(cell, "automatic", devices, dtype)
        products = select(cell, "products", devices, dtype)
        found.append(
            Comparison(
                size=Size(**cell["size"]),
                devices=devices,
                dtype=dtype,
                kernel=fastest(select(cell, "kernel", devices, dtype)),
                automatic=fastest(rivals),
                leanest=leanest(select(lean or cell, "automatic", devices, dtype)),
                unsharded=fastest(select(cell, "unsharded", 1, dtype)),
                products=products[0] if products else None,
            )
        )
    return found
