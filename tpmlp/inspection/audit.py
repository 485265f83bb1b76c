"""What a compiled program moves and holds, counted in the program itself.

A prediction of bytes is worth as much as the count it is compared with. The audit takes that count
from what XLA compiled, after every rewrite it makes: collectives merged, removed, promoted to a
wider type, or repeated by a loop. All numbers are for one device and one call.

Bytes are those that a device receives under the ring model, V being the size of the whole array
on one device (the operand; for all_gather the result) and p the number of devices in a group:

    all_gather, reduce_scatter, all_to_all    V (p - 1) / p
    all_reduce                                2 V (p - 1) / p
    ppermute                                  V

Collectives inside opaque custom calls (hand-written device kernels) cannot be seen from here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias, get_args

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from tpmlp.inspection import hlo
from tpmlp.table import format_bytes, text_table

UNMATCHED = "unmatched"
"""Stands in `Collective.axes` for groups of devices that no set of mesh axes produces."""

AnyMesh: TypeAlias = Mesh | AbstractMesh
Row: TypeAlias = dict[str, str | int | float | bool | list[str] | None]


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
        count: executions in one call, loops multiplied in; None where that depends on data.
        note: the condition under which `count` holds, such as a branch being taken; mostly empty.
    """

    kind: hlo.Kind
    axes: tuple[str, ...]
    group_size: int
    payload_bytes: int
    dtype: str
    asynchronous: bool
    count: int | None
    note: str = ""

    @property
    def bytes(self) -> int | float:
        """Bytes that one device receives in one execution; whole whenever p divides V."""
        return _number(self._received())

    @property
    def total_bytes(self) -> int | float | None:
        """Bytes that one device receives in all executions; None where `count` is."""
        return None if self.count is None else _number(self._received() * self.count)

    def _received(self) -> Fraction:
        if self.kind == "ppermute":
            return Fraction(self.payload_bytes)
        rounds = 2 if self.kind == "all_reduce" else 1
        return Fraction(rounds * self.payload_bytes * (self.group_size - 1), self.group_size)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Audit:
    """The counts of one compiled program, for one device and one call; prints as a table.

    Attributes:
        collectives: what it communicates, alike ones in one row, in program order.
        mesh_axes: names of the mesh's axes; empty when the program has no collective.
        argument_bytes: arguments.
        output_bytes: results, the table of a tuple's pointers included.
        temp_bytes: buffers that live within the call.
        alias_bytes: results that reuse donated arguments.
        peak_bytes: most memory in use at once; argument + output + temp - alias where XLA gives
            no peak.
        flops: as XLA counts them, the body of a loop once; None where it does not count.
    """

    collectives: tuple[Collective, ...]
    mesh_axes: tuple[str, ...]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    peak_bytes: int
    flops: float | None

    @property
    def counts(self) -> dict[str, int]:
        """Executions by kind, of the kinds that occur; every branch of a conditional counts."""
        counts: Counter[str] = Counter()
        for row in self.collectives:
            counts[row.kind] += _known_count(row)
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
        _check_choice("kind", kind, get_args(hlo.Kind))
        if self.mesh_axes:
            _check_choice("axis", axis, (*self.mesh_axes, UNMATCHED))
        rows = [
            row
            for row in self.collectives
            if kind in (None, row.kind) and axis in (None, *row.axes)
        ]
        return _number(sum((row._received() * _known_count(row) for row in rows), Fraction()))

    def rows(self) -> list[Row]:
        """Return the collectives as plain dictionaries, ready for JSON."""
        return [
            {
                "kind": row.kind,
                "axes": list(row.axes),
                "group_size": row.group_size,
                "dtype": row.dtype,
                "payload_bytes": row.payload_bytes,
                "bytes": row.bytes,
                "count": row.count,
                "total_bytes": row.total_bytes,
                "asynchronous": row.asynchronous,
                "note": row.note,
            }
            for row in self.collectives
        ]

    def __str__(self) -> str:
        header = ("collective", "axes", "dtype", "bytes", "count", "total", "mode", "note")
        collectives = text_table(header, map(_cells, self.collectives))
        flops = "unknown" if self.flops is None else f"{self.flops:,.0f}, loop bodies counted once"
        return "\n".join(
            (
                "per device and call",
                collectives if self.collectives else "no collectives",
                "",
                text_table(("memory", "bytes"), self._memory_cells()),
                f"flops: {flops}",
            )
        )

    __repr__ = __str__

    def _memory_cells(self) -> Iterator[tuple[str, str]]:
        for name in ("argument", "output", "temp", "alias", "peak"):
            yield name, format_bytes(getattr(self, f"{name}_bytes"))


def audit(
    function: Any,
    *args: Any,
    mesh: AnyMesh | None = None,
    **kwargs: Any,
) -> Audit:
    """Compile `function` for these arguments and count what the program moves and holds.

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
    module = hlo.parse_module(compiled.as_text() or "")
    moving = [found for found in hlo.collectives(module) if found.count != 0 and _moves(found)]
    names, positions = (), np.zeros(())
    if moving:
        names, positions = _positions(compiled, mesh, module.num_devices)
    return Audit(
        collectives=_merged(_collective(found, names, positions) for found in moving),
        mesh_axes=names,
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
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    # XLA's own number leaves temporaries out on CPU; on TPU it can be more than the sum.
    held = max(stats.peak_memory_in_bytes, total - stats.alias_size_in_bytes)
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "peak_bytes": held,
    }


def _flops(compiled: jax.stages.Compiled) -> float | None:
    cost = compiled.cost_analysis()
    return None if cost is None else float(cost.get("flops", 0.0))


# The text numbers devices by their position in the program's device assignment. JAX lets all
# shardings of a program share one order of devices, so any of their meshes gives that order.


def _positions(
    compiled: jax.stages.Compiled, mesh: AnyMesh | None, num_devices: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the mesh's axis names and, at each of its coordinates, the position of the device."""
    known = [found for found in _meshes(compiled) if found.size == num_devices]
    mesh = _checked_mesh(mesh or next(iter(known), None), num_devices)
    order = [list(found.devices.flat) for found in known if isinstance(found, Mesh)]
    if not order or not isinstance(mesh, Mesh):
        return mesh.axis_names, np.arange(num_devices).reshape(mesh.axis_sizes)
    position = {device: index for index, device in enumerate(order[0])}
    strangers = [device for device in mesh.devices.flat if device not in position]
    if strangers:
        raise ValueError(
            f"mesh must consist of the devices function is compiled for: got {strangers[0]} in "
            f"mesh={mesh}, compiled for {order[0]}. Pass the mesh of its arguments."
        )
    return mesh.axis_names, np.vectorize(position.__getitem__)(mesh.devices)


def _meshes(compiled: jax.stages.Compiled) -> list[AnyMesh]:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]


def _checked_mesh(mesh: AnyMesh | None, num_devices: int) -> AnyMesh:
    if mesh is None:
        raise ValueError(
            "mesh must be given when no input or output of function has one: got mesh=None and "
            f"collectives among {num_devices} devices. Pass mesh= or arrays placed on a mesh."
        )
    if mesh.size != num_devices:
        raise ValueError(
            f"mesh must have one coordinate a device: got mesh={mesh} of {mesh.size}, compiled for "
            f"{num_devices} devices. Pass the mesh of its arguments."
        )
    return mesh


def _moves(found: hlo.CollectiveInstruction) -> bool:
    """Return whether any byte leaves a device: not within groups of one, nor from it to itself."""
    return any(len(set(group)) > 1 for group in found.groups)


def _collective(
    found: hlo.CollectiveInstruction, names: tuple[str, ...], positions: np.ndarray
) -> Collective:
    match = _permuted_dims if found.kind == "ppermute" else _grouped_dims
    dims = match(found.groups, positions)
    if found.kind != "ppermute":
        group_size = max(len(group) for group in found.groups)
    else:
        group_size = math.prod(positions.shape[dim] for dim in dims or range(positions.ndim))
    return Collective(
        kind=found.kind,
        axes=tuple(names[dim] for dim in dims) if dims else (UNMATCHED,),
        group_size=group_size,
        payload_bytes=found.payload_bytes,
        dtype=found.dtype,
        asynchronous=found.asynchronous,
        count=found.count,
        note=found.note,
    )


def _varying_dims(groups: hlo.Groups, coordinates: dict[int, tuple[int, ...]]) -> list[int]:
    """Return the dims of the mesh along which devices of one group differ."""
    points = [np.array([coordinates[device] for device in group]) for group in groups]
    varies = np.any([np.ptp(group, axis=0) > 0 for group in points], axis=0)
    return [int(dim) for dim in np.flatnonzero(varies)]


def _coordinates(positions: np.ndarray) -> dict[int, tuple[int, ...]]:
    return {int(position): index for index, position in np.ndenumerate(positions)}


def _grouped_dims(groups: hlo.Groups, positions: np.ndarray) -> list[int]:
    """Return the dims whose product makes exactly these groups; none if there are no such dims."""
    dims = _varying_dims(groups, _coordinates(positions))
    last = range(-len(dims), 0)
    size = math.prod(positions.shape[dim] for dim in dims)
    expected = np.moveaxis(positions, dims, last).reshape(-1, size)
    same = {frozenset(group) for group in groups} == {frozenset(row.tolist()) for row in expected}
    return dims if same else []


def _permuted_dims(pairs: hlo.Groups, positions: np.ndarray) -> list[int]:
    """Return the dims along which every slice of the mesh is permuted alike, none if not alike."""
    coordinates = _coordinates(positions)
    moved = tuple(pair for pair in pairs if pair[0] != pair[1])
    dims = _varying_dims(moved, coordinates)
    moves: dict[tuple[int, ...], set[tuple[tuple[int, ...], ...]]] = {}
    for pair in moved:
        points = [coordinates[device] for device in pair]
        rest = tuple(np.delete(points[0], dims).tolist())
        steps = tuple(tuple(point[dim] for dim in dims) for point in points)
        moves.setdefault(rest, set()).add(steps)
    slices = positions.size // math.prod(positions.shape[dim] for dim in dims)
    alike = len(moves) == slices and len({frozenset(steps) for steps in moves.values()}) == 1
    return dims if alike else []


def _merged(rows: Iterable[Collective]) -> tuple[Collective, ...]:
    """Add the counts of rows that are otherwise equal, each kept where it first occurs."""
    counts: dict[Collective, int | None] = {}
    for row in rows:
        alike = replace(row, count=None)
        counts[alike] = None if row.count is None else (counts.get(alike) or 0) + row.count
    return tuple(replace(row, count=count) for row, count in counts.items())


def _known_count(row: Collective) -> int:
    if row.count is None:
        raise ValueError(
            f"count must be known to be added up: got count=None for {row.kind} over "
            f"{', '.join(row.axes)} ({row.note}). Give the loop a length that does not depend on "
            "data, or read the rows of .collectives."
        )
    return row.count


def _check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}: got {name}={value!r}. "
            f"Leave {name} out to count all."
        )


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _cells(row: Collective) -> tuple[str, ...]:
    return (
        row.kind,
        ",".join(row.axes),
        row.dtype,
        format_bytes(row.bytes),
        "?" if row.count is None else str(row.count),
        "?" if row.total_bytes is None else format_bytes(row.total_bytes),
        "async" if row.asynchronous else "sync",
        row.note,
    )
