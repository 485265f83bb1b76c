"""Collectives as predicted beside those of the compiled program: what differs is named.

Compilers rewrite collectives, and what they do shows in the words (elements) that a device
receives, whatever is merged or split:

    in another type    as many words in fewer or more bytes. TPUs round the operands of float32
                       products to bfloat16, so that is what their compiler gathers.
    as all_reduce      words of a kind are missing, and all_reduces over the same axes move twice as
                       many more: a reduce_scatter is then an all_reduce and a slice, an all_gather
                       an all_reduce of zeros and one block.

What no such rule accounts for is said to be not predicted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from tpmlp.inspection import collective as compiled
from tpmlp.inspection.audit import Audit
from tpmlp.inspection.collective import number
from tpmlp.inspection.hlo.counts import known
from tpmlp.kernels import cost
from tpmlp.mesh import AXES
from tpmlp.table import format_bytes, text_table

ALL_REDUCE, PERMUTE = "all_reduce", "ppermute"
NOT_PREDICTED = "not predicted"

Axes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What moves by one kind of collective over the same axes, in one step.

    Attributes:
        kind: as in an audit.
        axes: mesh axes, in the mesh's order.
        predicted_count: how often it was written to run.
        predicted_bytes: that a device was predicted to receive.
        count: how often it runs in the compiled program; less where collectives are merged.
        bytes: that a device receives there.
        overlapped: executions beside which the schedule puts a product.
        note: why the bytes are not those predicted; empty where they are.
    """

    kind: str
    axes: Axes
    predicted_count: int
    predicted_bytes: int | float
    count: int
    bytes: int | float
    overlapped: int
    note: str

    @property
    def is_explained(self) -> bool:
        """Whether the bytes are those predicted, or it is known what the compiler did."""
        return NOT_PREDICTED not in self.note


@dataclass(slots=True)
class _Tally:
    """Sums over collectives.

    Attributes:
        count: executions.
        bytes: received.
        words: elements received.
        dtypes: names of types that move.
        overlapped: executions beside a product.
    """

    count: int = 0
    bytes: Fraction = field(default_factory=Fraction)
    words: Fraction = field(default_factory=Fraction)
    dtypes: set[str] = field(default_factory=set)
    overlapped: int = 0


_Tallies = dict[tuple[Axes, str], _Tally]


def compare_collectives(
    predicted: Iterable[cost.Collective], audit: Audit, *, messages_bytes: int = 0
) -> tuple[Moved, ...]:
    """Return what moves as predicted and as compiled, by axes and kind.

    Args:
        predicted: the collectives of the program.
        audit: of the compiled program.
        messages_bytes: predicted of permutes between stages, whatever other axes they turn over.
    """
    there, expected = _tally_audit(audit), _tally_predicted(predicted)
    if messages_bytes:
        expected[("stage",), PERMUTE] = _Tally(bytes=Fraction(messages_bytes))
    keys = sorted({*expected, *there}, key=lambda key: (_places(key[0]), key[1]))
    notes = {key: note for axes, _ in keys for key, note in _notes(axes, expected, there).items()}
    return tuple(
        _moved(key, expected.get(key, _Tally()), there.get(key, _Tally()), notes.get(key, ""))
        for key in keys
    )


def moved_table(rows: Sequence[Moved]) -> str:
    """Return one line for each kind and axes."""
    headers = ("collective", "over", "written", "predicted", "runs", "compiled", "beside products")
    cells = (
        (
            row.kind,
            "*".join(row.axes),
            row.predicted_count or "-",
            format_bytes(row.predicted_bytes),
            row.count,
            format_bytes(row.bytes),
            f"{row.overlapped} of {row.count}",
            row.note,
        )
        for row in rows
    )
    return text_table((*headers, "note"), cells)


def _moved(key: tuple[Axes, str], expected: _Tally, there: _Tally, note: str) -> Moved:
    return Moved(
        axes=key[0],
        kind=key[1],
        predicted_count=expected.count,
        predicted_bytes=number(expected.bytes),
        count=there.count,
        bytes=number(there.bytes),
        overlapped=there.overlapped,
        note=note,
    )


def _tally_predicted(rows: Iterable[cost.Collective]) -> _Tallies:
    tallies: _Tallies = {}
    for row in rows:
        tally = tallies.setdefault((_ordered(row.axes), row.kind), _Tally())
        words = row.exact_words * row.times
        tally.count += row.times * (row.num_devices - 1 if row.kind == PERMUTE else 1)
        tally.words += words
        tally.bytes += words * row.item_bytes
    return tallies


def _tally_audit(audit: Audit) -> _Tallies:
    tallies: _Tallies = {}
    for row in audit.collectives:
        between_stages = row.kind == PERMUTE and "stage" in row.axes
        axes = ("stage",) if between_stages else row.axes
        tally = tallies.setdefault((axes, row.kind), _Tally())
        count = known(row.count, str(row))
        tally.count += count
        tally.bytes += row.exact_bytes * count
        tally.words += row.exact_bytes * count / _item_bytes(row)
        tally.dtypes.add(row.dtype)
        tally.overlapped += count if row.overlaps else 0
    return tallies


def _places(axes: Axes) -> tuple[int, ...]:
    """Return where axes are in a mesh; after all of them what an audit cannot match."""
    return tuple(AXES.index(axis) if axis in AXES else len(AXES) for axis in axes)


def _ordered(axes: Axes) -> Axes:
    return tuple(sorted(axes, key=AXES.index))


def _item_bytes(row: compiled.Collective) -> int:
    """Return the bytes of an element; of several types that move together, the widest's."""
    return max(_size(name) for name in row.dtype.split("+"))


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _notes(axes: Axes, expected: _Tallies, there: _Tallies) -> dict[tuple[Axes, str], str]:
    """Return why bytes differ over the same axes, for each kind that differs."""
    kinds = [kind for where, kind in {**expected, **there} if where == axes]
    pairs = {k: (expected.get((axes, k), _Tally()), there.get((axes, k), _Tally())) for k in kinds}
    differ = {k: e.bytes != t.bytes for k, (e, t) in pairs.items()}
    missing = {k: e.words - t.words for k, (e, t) in pairs.items() if differ[k]}
    reduced = _run_as_all_reduce(missing)
    notes: dict[tuple[Axes, str], str] = {}
    for kind, words in missing.items():
        found = [_of_type(*pairs[kind])]
        if kind in reduced:
            share = "" if words == pairs[kind][0].words else "partly "
            found.insert(0, f"{share}run as {ALL_REDUCE}, twice the bytes")
        elif kind == ALL_REDUCE and reduced:
            found = [f"runs what was {' and '.join(reduced)}"]
        elif words:
            found = [NOT_PREDICTED]
        notes[axes, kind] = ", ".join(filter(None, found))
    return notes


def _run_as_all_reduce(missing: dict[str, Fraction]) -> list[str]:
    """Return the kinds that lost words to all_reduces, which move twice as many."""
    lost = {kind: words for kind, words in missing.items() if words > 0}
    gained = {kind: -words for kind, words in missing.items() if words < 0}
    return list(lost) if gained == {ALL_REDUCE: 2 * sum(lost.values())} else []


def _of_type(expected: _Tally, there: _Tally) -> str:
    """Return in which type elements move, if it is not the one predicted."""
    if not there.words or not expected.words:
        return ""
    same = there.bytes / there.words == expected.bytes / expected.words
    return "" if same else f"moves {' and '.join(sorted(there.dtypes))}"
