"""What a compiled program moves, computes and holds, counted in the program itself.

A prediction of bytes is worth as much as the count it is compared with. The audit takes that count
from what XLA compiled, after every rewrite it makes: collectives merged, removed, promoted to a
wider type, made asynchronous or repeated by a loop; products merged or split. All numbers are for
one device and one call.

Bytes are those that a device receives under the ring model, V being the size of the whole array
on one device (the operand; for all_gather the result) and p the number of devices in a group:

    all_gather, reduce_scatter, all_to_all    V (p - 1) / p
    all_reduce                                2 V (p - 1) / p
    ppermute                                  V

Communication costs no time of its own while something else is computed. The schedule tells what
may be: the products between the start and the done of an asynchronous collective.

Collectives and products inside opaque custom calls (hand-written device kernels) cannot be seen
from here.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

import jax

from tpmlp.inspection.collective import Collective, number
from tpmlp.inspection.hlo.collectives import CollectiveInstruction, Kind, collectives
from tpmlp.inspection.hlo.counts import known, merged, total
from tpmlp.inspection.hlo.products import Product, products
from tpmlp.inspection.hlo.text import parse_module
from tpmlp.inspection.mesh_axes import UNMATCHED, AnyMesh, Positions, positions
from tpmlp.inspection.tables import collective_table, grouped, product_table
from tpmlp.table import format_bytes, text_table


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Audit:
    """The counts of one compiled program, for one device and one call; prints as a table.

    Attributes:
        collectives: what it communicates, alike ones in one row, in program order.
        products: the matrix products it computes, likewise.
        mesh_axes: names of the mesh's axes; empty when the program has no collective.
        argument_bytes: arguments.
        output_bytes: results, the table of a tuple's pointers included.
        temp_bytes: buffers that live within the call.
        alias_bytes: results that reuse donated arguments.
        peak_bytes: what the device must have, argument + output + temp - alias.
        host_argument_bytes: arguments in the host's memory; no other number counts them.
        host_output_bytes: results there.
        host_temp_bytes: buffers there that live within the call.
        flops: of all operations, as XLA counts them: the body of a loop once, whatever its trip
            count; None where it does not count, as for CUDA devices that are not there.
    """

    collectives: tuple[Collective, ...]
    products: tuple[Product, ...] = ()
    mesh_axes: tuple[str, ...]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    peak_bytes: int
    host_argument_bytes: int = 0
    host_output_bytes: int = 0
    host_temp_bytes: int = 0
    flops: float | None

    @property
    def product_flops(self) -> int:
        """FLOPs of the products, loops multiplied in; every branch of a conditional counts.

        Raises:
            ValueError: a loop whose trip count depends on data.
        """
        return sum(row.flops * _known(row) for row in self.products)

    @property
    def counts(self) -> dict[str, int]:
        """Executions by kind, of the kinds that occur; every branch of a conditional counts."""
        counts: Counter[str] = Counter()
        for row in self.collectives:
            counts[row.kind] += _known(row)
        return dict(counts)

    def bytes_by(self, kind: str | None = None, axis: str | None = None) -> int | float:
        """Add up the bytes received of one kind, across one mesh axis, or of everything.

        A collective over several axes counts fully for each of them. Every branch of a conditional
        counts, so that the sum is an upper bound where there are any.

        Args:
            kind: only this kind; None for all.
            axis: only collectives that cross this mesh axis; None for all.

        Returns:
            Bytes per device and call, exact before the last rounding.

        Raises:
            ValueError: an unknown kind or axis, or a loop whose trip count depends on data.
        """
        _check_choice("kind", kind, get_args(Kind))
        if self.mesh_axes:
            _check_choice("axis", axis, (*self.mesh_axes, UNMATCHED))
        rows = [
            row
            for row in self.collectives
            if kind in (None, row.kind) and axis in (None, *row.axes)
        ]
        return number(sum((row.exact_bytes * _known(row) for row in rows), Fraction()))

    def rows(self) -> list[dict[str, Any]]:
        """Return the collectives as plain dictionaries, ready for JSON."""
        return [row.as_row() for row in self.collectives]

    def product_rows(self) -> list[dict[str, Any]]:
        """Return the products as plain dictionaries, ready for JSON."""
        return [row.as_row() for row in self.products]

    def __str__(self) -> str:
        in_all = total(row.total_flops for row in self.products)
        return "\n".join(
            (
                "per device and call",
                collective_table(self.collectives) if self.collectives else "no collectives",
                "",
                product_table(self.products) if self.products else "no products",
                "",
                text_table(("memory", "bytes"), self._memory_cells()),
                "",
                f"flops of products: {grouped(in_all)}, loops multiplied in",
                f"flops as XLA counts them: {grouped(self.flops)}, the body of a loop once",
            )
        )

    __repr__ = __str__

    def _memory_cells(self) -> Iterator[tuple[str, str]]:
        for name in ("argument", "output", "temp", "alias", "peak"):
            yield name, format_bytes(getattr(self, f"{name}_bytes"))
        for name in ("host_argument", "host_output", "host_temp"):
            if num_bytes := getattr(self, f"{name}_bytes"):
                yield name.replace("_", " "), format_bytes(num_bytes)


def audit(
    function: Any,
    *args: Any,
    mesh: AnyMesh | None = None,
    **kwargs: Any,
) -> Audit:
    """Compile `function` for these arguments; count what it moves, computes and holds.

    Nothing is run. `args` may be arrays or `jax.ShapeDtypeStruct`s with shardings, on devices that
    are there or on a topology that is only described.

    Args:
        function: jitted, with a `lower` of its own, lowered, compiled, or plain (it is jitted).
        *args: its arguments; none when it is lowered or compiled already.
        mesh: names the axes; by default the mesh of its inputs' or outputs' shardings.
        **kwargs: its keyword arguments. One called mesh cannot be passed on: bind it before.

    Returns:
        The counts; `print` shows them as a table.

    Raises:
        ValueError: no mesh is known, or it is not one of the program's devices.

    Examples:
        >>> import jax.numpy as jnp
        >>> report = audit(lambda x: x + 1.0, jnp.zeros(8, jnp.float32))
        >>> report.collectives, report.argument_bytes, report.bytes_by()
        ((), 32, 0)
    """
    compiled = _compile(function, args, kwargs)
    module = parse_module(compiled.as_text() or "")
    moving = [found for found in collectives(module) if found.count != 0 and _moves(found)]
    place = positions(compiled, mesh, module.num_devices) if moving else None
    return Audit(
        collectives=merged(_collective(found, place) for found in moving if place),
        products=products(module),
        mesh_axes=place.names if place else (),
        flops=_flops(compiled),
        **_memory(compiled),
    )


def _compile(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> jax.stages.Compiled:
    if isinstance(function, jax.stages.Lowered | jax.stages.Compiled):
        if args or kwargs:
            raise ValueError(
                "args must be empty when function is lowered or compiled already: got "
                f"{len(args)} args and {len(kwargs)} kwargs. Call audit(function)."
            )
        return function if isinstance(function, jax.stages.Compiled) else function.compile()
    if not callable(function):
        raise ValueError(
            f"function must be callable, lowered or compiled: got function={function!r}. "
            "Pass the function itself, then its arguments."
        )
    lower = getattr(function, "lower", None) or jax.jit(function).lower
    return lower(*args, **kwargs).compile()


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError(
            "function must be compiled for a platform that reports its memory: got none. "
            "Compile it for CPU, TPU or CUDA."
        )
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        # Not XLA's own peak, which leaves temporaries out on CPU and on TPU adds what lies in the
        # vector memory or on the host.
        "peak_bytes": held - stats.alias_size_in_bytes,
        "host_argument_bytes": stats.host_argument_size_in_bytes,
        "host_output_bytes": stats.host_output_size_in_bytes,
        "host_temp_bytes": stats.host_temp_size_in_bytes,
    }


def _flops(compiled: jax.stages.Compiled) -> float | None:
    cost = compiled.cost_analysis()
    return None if cost is None else float(cost.get("flops", 0.0))


def _moves(found: CollectiveInstruction) -> bool:
    """Return whether any byte leaves a device: not within groups of one, nor from it to itself."""
    return any(len(set(group)) > 1 for group in found.groups)


def _collective(found: CollectiveInstruction, place: Positions) -> Collective:
    axes, group_size = place.crossed(found)
    return Collective(
        kind=found.kind,
        axes=axes,
        group_size=group_size,
        payload_bytes=found.payload_bytes,
        dtype=found.dtype,
        asynchronous=found.asynchronous,
        overlaps=found.overlaps,
        count=found.count,
        note=found.note,
    )


def _known(row: Collective | Product) -> int:
    return known(row.count, f"{row} ({row.note})")


def _check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}: got {name}={value!r}. "
            f"Leave {name} out to count all."
        )
