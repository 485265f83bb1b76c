"""A picture of a plan: a step's time against what a device holds, and the Pareto front."""

from collections.abc import Sequence
from typing import Any

from tpmlp.extras import require
from tpmlp.planner.cost import Cost
from tpmlp.planner.search import describe

GIB = 2**30
WIDTH, HEIGHT = 8.0, 5.0  # in inches
COLORS = {"without stages": "#3b74b3", "with stages": "#d9822b"}


def draw_plan(costs: Sequence[Cost], front: Sequence[Cost], memory_limit: float) -> Any:
    """Return a matplotlib Figure.

    A bar from the overlapped time to the time of one after another is what the compiler may hide.

    Args:
        costs: those listed.
        front: those on the Pareto front.
        memory_limit: bytes of a device.
    """
    make = require("matplotlib.figure", extra="plot", user="Plan.plot").Figure
    figure = make(figsize=(WIDTH, HEIGHT), layout="constrained")
    panel = figure.subplots()
    for label, color in COLORS.items():
        drawn = [cost for cost in costs if (cost.mesh["stage"] > 1) == (label == "with stages")]
        sizes = [cost.memory.peak_bytes / GIB for cost in drawn]
        panel.vlines(
            sizes,
            [cost.time.overlapped_s for cost in drawn],
            [cost.time.step_s for cost in drawn],
            colors=color,
            alpha=0.3,
        )
        panel.plot(sizes, [cost.time.step_s for cost in drawn], "o", color=color, label=label)
    ahead = [(cost.memory.peak_bytes / GIB, cost.time.step_s) for cost in front]
    sizes, seconds = zip(*reversed(ahead), strict=True)
    panel.step(sizes, seconds, "--", where="post", color="#606060", label="Pareto front")
    panel.set_title(f"fastest: {describe(costs[0].mesh, costs[0].strategy)}", fontsize=9)
    panel.set_xlabel(f"on a device [GiB], of {memory_limit / GIB:.4g}")
    panel.set_ylabel("step [s]; the bar down to where collectives hide")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    return figure
