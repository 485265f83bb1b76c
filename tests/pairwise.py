"""A covering array: few rows in which every two values of two fields meet.

Most mistakes need one value, or two values together, to show. Rows that have every compatible pair
find those at the price of the largest two fields' product, not of all fields' product.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Value = tuple[str, Any]
Pair = frozenset[Value]
Fields = Mapping[str, Sequence[Any]]
Row = Mapping[str, Any]
Compatible = Callable[[Value, Value], bool]

# Of this many candidates the best becomes the next row; more give no fewer rows here.
CANDIDATES = 40


def pairs(fields: Fields, compatible: Compatible) -> set[Pair]:
    """Return all pairs of values of different fields that may be in one row."""
    return {
        frozenset(((f, a), (g, b)))
        for f, g in combinations(fields, 2)
        for a, b in product(fields[f], fields[g])
        if compatible((f, a), (g, b))
    }


def pairs_of(row: Row) -> set[Pair]:
    """Return the pairs that a row has."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def covering(
    fields: Fields, compatible: Compatible, start: Sequence[Row] = ()
) -> list[dict[str, Any]]:
    """Return rows that have every pair of compatible values; the same ones at every call.

    Greedy: each row starts from a pair that is still missing, and of each further field takes the
    value with which most missing pairs come in.

    Args:
        fields: the values of each field.
        compatible: whether two values, each with the name of its field, may be in one row.
        start: the first rows.
    """
    rng, rows = random.Random(0), [dict(row) for row in start]
    missing = pairs(fields, compatible).difference(*map(pairs_of, rows))
    order = {(f, v): i for i, (f, v) in enumerate((f, v) for f in fields for v in fields[f])}
    while missing:
        first = min(missing, key=lambda pair: sorted(order[value] for value in pair))
        candidates = [_row(first, fields, compatible, missing, rng) for _ in range(CANDIDATES)]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        rows.append(best)
        missing -= pairs_of(best)
    return rows


def rows_of(fields: Fields, compatible: Compatible) -> Iterator[dict[str, Any]]:
    """Return all rows whose values are compatible."""
    for values in product(*fields.values()):
        row = dict(zip(fields, values, strict=True))
        if all(compatible(a, b) for a, b in combinations(row.items(), 2)):
            yield row


def _row(
    first: Pair, fields: Fields, compatible: Compatible, missing: set[Pair], rng: random.Random
) -> dict[str, Any]:
    """Complete a pair, field by field in a random order."""
    row = dict(first)
    open_fields = [field for field in fields if field not in row]
    # The first field is the one that others must be compatible with.
    rng.shuffle(open_fields)
    open_fields.sort(key=lambda field: field != next(iter(fields)))  # stable
    for field in open_fields:
        allowed = [
            value
            for value in fields[field]
            if all(compatible((field, value), other) for other in row.items())
        ]
        assert allowed, f"no {field} is compatible with {row}"
        gains = [
            sum(frozenset(((field, value), other)) in missing for other in row.items())
            for value in allowed
        ]
        best = [v for v, gain in zip(allowed, gains, strict=True) if gain == max(gains)]
        row[field] = rng.choice(best)
    return {field: row[field] for field in fields}
