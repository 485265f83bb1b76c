"""The tables that make bench prints."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from experiments.bench.kernel import INVARIANT
from experiments.bench.problem import Size
from experiments.bench.summary import (
    Cell,
    Comparison,
    Ratio,
    Row,
    compare,
    leanest,
    median_s,
    name,
    select,
)
from experiments.bench.targets import Verdict
from tpmlp.table import text_table

MEBIBYTE = 2**20


def default_table(comparisons: Iterable[Comparison]) -> str:
    """Return the first table: one default strategy against every baseline."""
    headers = (
        "size",
        "dtype",
        "M",
        "ms",
        "best automatic, ms",
        "",
        "time / automatic",
        "time / one device",
        "products / automatic",
        "MiB",
        "/ leanest",
        "/ best",
    )
    return text_table(headers, map(_default_row, comparisons))


def _default_row(c: Comparison) -> tuple[object, ...]:
    return (
        c.size,
        c.dtype,
        c.devices,
        f"{1e3 * median_s(c.kernel):.1f}",
        f"{1e3 * median_s(c.automatic):.1f}",
        name(c.automatic),
        c.to_automatic,
        c.to_unsharded,
        f"{c.floor.median:.2f}" if c.floor else "-",
        f"{c.kernel['temp_bytes'] / MEBIBYTE:.2f}",
        f"{c.temporaries:.2f}",
        f"{c.temporaries_to_fastest:.2f}",
    )


def search_table(cells: Sequence[Cell], default: Sequence[Cell]) -> str:
    """Return the second table: the fastest and the leanest way to use the devices.

    Args:
        cells: of the search.
        default: of the first table, whose automatic partitionings compete for memory.
    """
    headers = (
        "size",
        "dtype",
        "M",
        "fastest",
        "ms",
        "time / automatic",
        "time / one device",
        "leanest",
        "MiB",
        "/ leanest automatic",
    )
    first = {Size(**cell["size"]): cell for cell in default}
    return text_table(
        headers, (row for cell in cells for row in _search_rows(cell, first[Size(**cell["size"])]))
    )


def _search_rows(cell: Cell, default: Cell) -> Iterator[tuple[object, ...]]:
    for c in compare(cell, lean=default):
        lean = leanest(select(cell, "kernel", c.devices, c.dtype))
        yield (
            c.size,
            c.dtype,
            c.devices,
            name(c.kernel),
            f"{1e3 * median_s(c.kernel):.1f}",
            c.to_automatic,
            c.to_unsharded,
            name(lean),
            f"{lean['temp_bytes'] / MEBIBYTE:.2f}",
            f"{lean['temp_bytes'] / c.leanest['temp_bytes']:.2f}",
        )


def invariant_table(cells: Sequence[Cell]) -> str:
    """Return the third table: what bits that do not depend on the mesh cost."""
    headers = ("size", "dtype", "M", "ms", "time", "MiB", "temporaries", "bytes received")
    return text_table(headers, (row for cell in cells for row in _invariant_rows(cell)))


def _invariant_rows(cell: Cell) -> Iterator[tuple[object, ...]]:
    by_key: dict[Any, dict[str, Row]] = {}
    for row in cell["rows"]:
        by_key.setdefault((row["dtype"], row["devices"]), {})[row["variant"]] = row
    for (dtype, devices), rows in by_key.items():
        fast, invariant = rows["Strategy()"], rows[INVARIANT]
        yield (
            Size(**cell["size"]),
            dtype,
            devices,
            f"{1e3 * median_s(invariant):.1f}",
            Ratio.of(invariant["seconds"], fast["seconds"]),
            f"{invariant['temp_bytes'] / MEBIBYTE:.2f}",
            f"{invariant['temp_bytes'] / fast['temp_bytes']:.2f}",
            f"{invariant['received_bytes'] / fast['received_bytes']:.2f}",
        )


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """Return a line for each target."""
    cells = [
        (v.what, f"{v.value:.2f}", f"<= {v.bound:.2f}", v.word, v.cells, v.spread) for v in verdicts
    ]
    return text_table(("quantity", "measured", "target", "reached", "cells", "spread"), cells)
