"""A picture of schedules: a row a stage, a box a task, idle slots white, one axis of time.

Time is counted in forward passes of a whole stage, so that a task of one of v chunks is 1/v wide,
and schedules of the same model with and without chunks can be compared by eye.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from tpmlp.extras import require
from tpmlp.pipeline.route import Task
from tpmlp.pipeline.validity import Ticks

# Of a stage's first chunk and of its last, as red, green and blue; those between are between.
COLORS = {
    "F": ((0.75, 0.86, 0.97), (0.46, 0.66, 0.88)),
    "B": ((1.00, 0.84, 0.63), (0.95, 0.63, 0.32)),
    "W": ((0.81, 0.92, 0.75), (0.53, 0.75, 0.45)),
}
LABELS = {"F": "F: forward", "B": "B: gradient of the input", "W": "W: gradients of the weights"}
EDGE = "#606060"
# In inches: the width of a picture, a row, what a panel has around its rows, what is below all.
WIDTH, ROW, AROUND, BELOW = 11.0, 0.2, 0.38, 0.8
# In points: the sizes that a microbatch's number may have, and the widest edge of a box.
SMALLEST, LARGEST, EDGE_WIDTH = 3.5, 7.0, 0.5


def draw_tables(tables: Sequence[tuple[str, Ticks]]) -> Any:
    """Return a matplotlib Figure.

    Args:
        tables: captions and tables, one above the other.
    """
    make = require("matplotlib.figure", extra="plot", user="Schedule.plot").Figure
    heights = [ROW * len(ticks[0]) + AROUND for _, ticks in tables]
    figure = make(figsize=(WIDTH, sum(heights) + BELOW), layout="constrained")
    panels = figure.subplots(
        len(tables), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    end = max(len(ticks) / _num_chunks(ticks) for _, ticks in tables)
    for panel, (caption, ticks) in zip(panels, tables, strict=True):
        panel.set_title(caption, fontsize=8, loc="left")
        _draw_rows(panel, len(ticks[0]))
        _draw_boxes(panel, ticks, box_points=0.9 * 72 * WIDTH / end / _num_chunks(ticks))
    panels[-1].set_xlim(0, end)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].tick_params(axis="x", labelsize=7)
    panels[-1].set_xlabel("time, in forward passes of a whole stage (F = B = W)", fontsize=8)
    _draw_legend(figure, chunks=any(_num_chunks(ticks) > 1 for _, ticks in tables))
    return figure


def _draw_rows(panel: Any, num_stages: int) -> None:
    panel.set_ylim(num_stages - 0.5, -0.5)
    panel.set_yticks(range(num_stages), [f"stage {s}" for s in range(num_stages)], fontsize=7)
    panel.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_boxes(panel: Any, ticks: Ticks, box_points: float) -> None:
    """Draw all tasks of a table; numbers where a box has room for them."""
    width, spans = 1 / _num_chunks(ticks), defaultdict(list)
    size = _font_size(box_points, max(task.microbatch for _, _, task in _tasks(ticks)))
    for tick, stage, task in _tasks(ticks):
        spans[stage, task.kind, task.chunk].append((tick * width, width))
        if size is not None:
            style = {"ha": "center", "va": "center_baseline", "fontsize": size}
            panel.text((tick + 0.5) * width, stage, str(task.microbatch), **style)
    line = {"edgecolor": EDGE, "linewidth": min(EDGE_WIDTH, box_points / 20)}
    for (stage, kind, chunk), where in spans.items():
        along = chunk * width / (1 - width) if chunk else 0
        color = [(1 - along) * a + along * b for a, b in zip(*COLORS[kind], strict=True)]
        panel.broken_barh(where, (stage - 0.5, 1), facecolor=color, **line)


def _draw_legend(figure: Any, chunks: bool) -> None:
    patch = require("matplotlib.patches", extra="plot", user="Schedule.plot").Patch
    handles = [
        patch(facecolor=COLORS[kind][0], edgecolor=EDGE, label=label)
        for kind, label in LABELS.items()
    ]
    title = "number: microbatch" + ("; darker: later chunk" if chunks else "")
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        title=title,
        title_fontsize=7,
        frameon=False,
    )


def _tasks(ticks: Ticks) -> Iterator[tuple[int, int, Task]]:
    """Yield the tick, the stage and the task of each slot that is not idle."""
    for tick, row in enumerate(ticks):
        for stage, task in enumerate(row):
            if task is not None:
                yield tick, stage, task


def _num_chunks(ticks: Ticks) -> int:
    return 1 + max(task.chunk for _, _, task in _tasks(ticks))


def _font_size(box_points: float, largest: int) -> float | None:
    """Return the size at which the largest number fits into a box; None if it is unreadable.

    Examples:
        >>> _font_size(20, 7), _font_size(8, 31), _font_size(4, 31)
        (7.0, 5.333333333333333, None)
    """
    # A digit is about 0.6 of the size wide, and a third of a digit stays free.
    size = box_points / (0.6 * len(str(largest)) + 0.3)
    return min(size, LARGEST) if size >= SMALLEST else None
