"""The mesh axes that a collective crosses, found from the groups of devices it names.

A compiled program numbers devices by their position in its device assignment. JAX lets all
shardings of a program share one order of devices, so any of their meshes gives that order.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from tpmlp.inspection.hlo.collectives import CollectiveInstruction
from tpmlp.inspection.hlo.groups import Groups

UNMATCHED = "unmatched"
"""Stands for the axes of groups of devices that no set of mesh axes produces."""

AnyMesh: TypeAlias = Mesh | AbstractMesh


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Positions:
    """Where a program's devices lie in a mesh.

    Attributes:
        names: the mesh's axes.
        grid: at each coordinate of the mesh, the position of its device in the program.
    """

    names: tuple[str, ...]
    grid: np.ndarray

    def crossed(self, found: CollectiveInstruction) -> tuple[tuple[str, ...], int]:
        """Return the axes that a collective crosses and how many devices take part together."""
        match = _permuted_dims if found.kind == "ppermute" else _grouped_dims
        dims = match(found.groups, self.grid)
        if found.kind != "ppermute":
            size = max(len(group) for group in found.groups)
        else:
            size = math.prod(self.grid.shape[dim] for dim in dims or range(self.grid.ndim))
        return tuple(self.names[dim] for dim in dims) if dims else (UNMATCHED,), size


def positions(compiled: jax.stages.Compiled, mesh: AnyMesh | None, num_devices: int) -> Positions:
    """Place the devices of a program in `mesh`, or in the mesh of its shardings.

    Raises:
        ValueError: no mesh is known, or it is not one of the program's devices.
    """
    known = [found for found in _meshes(compiled) if found.size == num_devices]
    mesh = _checked_mesh(mesh or next(iter(known), None), num_devices)
    order = [list(found.devices.flat) for found in known if isinstance(found, Mesh)]
    if not order or not isinstance(mesh, Mesh):
        grid = np.arange(num_devices).reshape(mesh.axis_sizes)
        return Positions(names=mesh.axis_names, grid=grid)
    position = {device: index for index, device in enumerate(order[0])}
    strangers = [device for device in mesh.devices.flat if device not in position]
    if strangers:
        raise ValueError(
            f"mesh must consist of the devices function is compiled for: got {strangers[0]} in "
            f"mesh={mesh}, compiled for {order[0]}. Pass the mesh of its arguments."
        )
    grid = np.vectorize(position.__getitem__)(mesh.devices)
    return Positions(names=mesh.axis_names, grid=grid)


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


def _varying_dims(groups: Groups, coordinates: dict[int, tuple[int, ...]]) -> list[int]:
    """Return the dims of the mesh along which devices of one group differ."""
    points = [np.array([coordinates[device] for device in group]) for group in groups]
    varies = np.any([np.ptp(group, axis=0) > 0 for group in points], axis=0)
    return [int(dim) for dim in np.flatnonzero(varies)]


def _coordinates(grid: np.ndarray) -> dict[int, tuple[int, ...]]:
    return {int(position): index for index, position in np.ndenumerate(grid)}


def _grouped_dims(groups: Groups, grid: np.ndarray) -> list[int]:
    """Return the dims whose product makes exactly these groups; none if there are no such dims."""
    dims = _varying_dims(groups, _coordinates(grid))
    last = range(-len(dims), 0)
    size = math.prod(grid.shape[dim] for dim in dims)
    expected = np.moveaxis(grid, dims, last).reshape(-1, size)
    same = {frozenset(group) for group in groups} == {frozenset(row.tolist()) for row in expected}
    return dims if same else []


def _permuted_dims(pairs: Groups, grid: np.ndarray) -> list[int]:
    """Return the dims along which every slice of the mesh is permuted alike, none if not alike."""
    coordinates = _coordinates(grid)
    moved = tuple(pair for pair in pairs if pair[0] != pair[1])
    dims = _varying_dims(moved, coordinates)
    moves: dict[tuple[int, ...], set[tuple[tuple[int, ...], ...]]] = {}
    for pair in moved:
        points = [coordinates[device] for device in pair]
        rest = tuple(np.delete(points[0], dims).tolist())
        steps = tuple(tuple(point[dim] for dim in dims) for point in points)
        moves.setdefault(rest, set()).add(steps)
    slices = grid.size // math.prod(grid.shape[dim] for dim in dims)
    alike = len(moves) == slices and len({frozenset(steps) for steps in moves.values()}) == 1
    return dims if alike else []
