"""How often something runs in one call: a number, or None where that depends on data."""

from collections.abc import Iterable
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

Count: TypeAlias = int | None


class Counted(Protocol):
    """A dataclass with a count."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def count(self) -> Count:
        """How often it runs."""
        ...


Row = TypeVar("Row", bound=Counted)


def times(count: Count, factor: Count) -> Count:
    """Multiply two counts."""
    return None if count is None or factor is None else count * factor


def total(counts: Iterable[Count]) -> Count:
    """Add counts up."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def known(count: Count, what: str) -> int:
    """Return a count that is a number.

    Raises:
        ValueError: a loop whose trip count depends on data.
    """
    if count is None:
        raise ValueError(
            f"count must be known to be added up: got count=None for {what}. Give the loop a "
            "length that does not depend on data, or read the rows one by one."
        )
    return count


def merged(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Add the counts of rows that are otherwise equal, each kept where it first occurs."""
    counts: dict[Row, Count] = {}
    for row in rows:
        alike = replace(row, count=None)
        counts[alike] = total((counts.get(alike, 0), row.count))
    return tuple(replace(row, count=count) for row, count in counts.items())
