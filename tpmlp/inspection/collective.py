"""One row of an audit: executions of a collective, and what is computed meanwhile."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tpmlp.inspection.hlo.collectives import Kind
from tpmlp.inspection.hlo.counts import Count, total
from tpmlp.inspection.hlo.products import Product


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Executions of one collective that are alike in everything but their place in the program.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce, all_to_all or ppermute.
        axes: mesh axes it crosses, in the mesh's order, none of size 1; (UNMATCHED,) if its groups
            are not a product of axes.
        group_size: p, the devices that take part together.
        payload_bytes: V, what one device holds of the whole array, in bytes.
        dtype: of what moves, "+" between several.
        asynchronous: whether the program may do other work between its start and its end.
        overlaps: the products that the schedule puts there, with their counts in one execution.
        count: executions in one call, loops multiplied in; None where that depends on data.
        note: the condition under which `count` holds, such as a branch being taken; mostly empty.
    """

    kind: Kind
    axes: tuple[str, ...]
    group_size: int
    payload_bytes: int
    dtype: str
    asynchronous: bool
    overlaps: tuple[Product, ...] = ()
    count: Count
    note: str = ""

    @property
    def bytes(self) -> int | float:
        """Bytes that one device receives in one execution; whole whenever p divides V."""
        return number(self.exact_bytes)

    @property
    def total_bytes(self) -> int | float | None:
        """Bytes that one device receives in all executions; None where `count` is."""
        return None if self.count is None else number(self.exact_bytes * self.count)

    @property
    def overlapped_flops(self) -> Count:
        """FLOPs of the products in `overlaps`; None where a count is."""
        return total(product.total_flops for product in self.overlaps)

    @property
    def exact_bytes(self) -> Fraction:
        """`bytes` before it is rounded."""
        if self.kind == "ppermute":
            return Fraction(self.payload_bytes)
        rounds = 2 if self.kind == "all_reduce" else 1
        return Fraction(rounds * self.payload_bytes * (self.group_size - 1), self.group_size)

    def as_row(self) -> dict[str, Any]:
        """Return what it says as a plain dictionary, ready for JSON."""
        return {
            "kind": self.kind,
            "axes": list(self.axes),
            "group_size": self.group_size,
            "dtype": self.dtype,
            "payload_bytes": self.payload_bytes,
            "bytes": self.bytes,
            "count": self.count,
            "total_bytes": self.total_bytes,
            "asynchronous": self.asynchronous,
            "overlaps": [product.as_row() for product in self.overlaps],
            "overlapped_flops": self.overlapped_flops,
            "note": self.note,
        }

    def __str__(self) -> str:
        return f"{self.kind} over {', '.join(self.axes)}"


def number(value: Fraction) -> int | float:
    """Return an int where the value is whole."""
    return value.numerator if value.denominator == 1 else float(value)
