"""What the kernel is meant to reach, and whether it did: a verdict for each target.

Means over the sizes are geometric. Targets of time and memory hold for each dtype by itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.bench.summary import Comparison, Ratio

TIME_TO_AUTOMATIC = {4: 0.75, 8: 0.65}
WORST_TIME_TO_AUTOMATIC = 1.0
TEMPORARIES_TO_AUTOMATIC = {4: 0.30, 8: 0.20}
TIME_TO_UNSHARDED = {8: 1.25}
BFLOAT16_TO_FLOAT32 = 0.33
COMPILE_S = 1.0
TEMPORARIES_TO_PREDICTED = (1.0, 1.15)
# bfloat16 pays where the products are large enough to be what takes the time.
LARGE = {"d": 1024, "batch": 1024, "devices": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A target and what was measured.

    Attributes:
        what: the quantity.
        value: measured.
        spread: its spread in words; empty where it has none.
        bound: the most it may be.
        cells: how many cells it was taken over.
        judged: whether the bound applies on this machine.
    """

    what: str
    value: float
    spread: str = ""
    bound: float
    cells: int = 1
    judged: bool = True

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if not self.judged:
            return "not judged: no matrix units"
        return "yes" if self.holds else "NO"


def verdicts(
    comparisons: Sequence[Comparison],
    *,
    compile_s: float | None = None,
    matrix_units: bool = False,
) -> list[Verdict]:
    """Return a verdict for every target that these comparisons can judge.

    Args:
        comparisons: of the default strategy.
        compile_s: of the deep network of the compile-time target, in seconds.
        matrix_units: whether the processor has them.
    """
    found: list[Verdict] = []
    for dtype in dict.fromkeys(c.dtype for c in comparisons):
        found += _of_dtype([c for c in comparisons if c.dtype == dtype], dtype)
        found += _predicted([c.kernel for c in comparisons if c.dtype == dtype], dtype)
    found += _bfloat16(comparisons, matrix_units)
    if compile_s is not None:
        found.append(
            Verdict(what="seconds to compile the deep network", value=compile_s, bound=COMPILE_S)
        )
    return found


def _of_dtype(comparisons: Sequence[Comparison], dtype: str) -> Iterator[Verdict]:
    def on(devices: int) -> list[Comparison]:
        return [c for c in comparisons if c.devices == devices]

    for devices, bound in TIME_TO_AUTOMATIC.items():
        yield from _mean(
            f"time / best automatic, M={devices}, {dtype}",
            [c.to_automatic for c in on(devices)],
            bound,
        )
    yield from _worst(
        f"the same, worst cell of all M, {dtype}",
        comparisons,
        lambda c: c.to_automatic.median,
        WORST_TIME_TO_AUTOMATIC,
    )
    for devices, bound in TEMPORARIES_TO_AUTOMATIC.items():
        yield from _mean(
            f"temporaries / leanest automatic, M={devices}, {dtype}",
            [Ratio(rounds=(c.temporaries,)) for c in on(devices)],
            bound,
        )
    for devices, bound in TIME_TO_UNSHARDED.items():
        yield from _mean(
            f"time / one device, M={devices}, {dtype}",
            [c.to_unsharded for c in on(devices)],
            bound,
        )


def _predicted(rows: Sequence[dict[str, Any]], dtype: str) -> Iterator[Verdict]:
    """Compare what was compiled with what was predicted, in the worst cells."""
    rows = [row for row in rows if "predicted_temp_bytes" in row]
    if not rows:
        return
    low, high = TEMPORARIES_TO_PREDICTED
    ratios = [row["temp_bytes"] / (row["predicted_temp_bytes"] or math.inf) for row in rows]
    exact = [row["received_bytes"] == row["predicted_received_bytes"] for row in rows]
    yield Verdict(
        what=f"cells with temporaries not {low:.2f} to {high:.2f} times the predicted, {dtype}",
        value=sum(not low <= ratio <= high for ratio in ratios),
        spread=f"{min(ratios):.3f} to {max(ratios):.3f}",
        bound=0,
        cells=len(rows),
    )
    yield Verdict(
        what=f"cells whose collective bytes are not as predicted, {dtype}",
        value=exact.count(False),
        bound=0,
        cells=len(rows),
    )


def _mean(what: str, ratios: Sequence[Ratio], bound: float) -> Iterator[Verdict]:
    if not ratios:
        return
    mean = Ratio.geometric_mean(ratios)
    values = [ratio.median for ratio in ratios]
    spread = f"cells {min(values):.2f} to {max(values):.2f}"
    if len(mean.rounds) > 1:
        spread = "rounds {:.2f} to {:.2f}, ".format(*mean.quartiles) + spread
    yield Verdict(what=what, value=mean.median, spread=spread, bound=bound, cells=len(ratios))


def _worst(
    what: str,
    comparisons: Sequence[Comparison],
    value: Callable[[Comparison], float],
    bound: float,
    judged: bool = True,
) -> Iterator[Verdict]:
    if not comparisons:
        return
    worst = max(comparisons, key=value)
    yield Verdict(
        what=what,
        value=value(worst),
        spread=f"{worst.size}, M={worst.devices}",
        bound=bound,
        cells=len(comparisons),
        judged=judged,
    )


def _bfloat16(comparisons: Sequence[Comparison], matrix_units: bool) -> Iterator[Verdict]:
    full = {(c.size, c.devices): c for c in comparisons if c.dtype == "float32"}
    large = [
        c
        for c in comparisons
        if c.dtype == "bfloat16"
        and (c.size, c.devices) in full
        and c.size.d >= LARGE["d"]
        and c.size.batch >= LARGE["batch"]
        and c.devices == LARGE["devices"]
    ]

    def to_float32(c: Comparison) -> float:
        exact = full[c.size, c.devices]
        return Ratio.of(c.kernel["seconds"], exact.kernel["seconds"]).median

    what = "bfloat16 / float32, M=8, d and B from 1024, worst cell"
    yield from _worst(what, large, to_float32, BFLOAT16_TO_FLOAT32, matrix_units)
