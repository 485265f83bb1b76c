"""Groups of devices, as HLO writes them.

Devices are numbered by their position in the program's device assignment, not by `device.id`.
XLA writes groups of them in three ways, all expanded here into the first:

    {{0,1},{2,3}}                            each group in full
    [2,4]<=[4,2]T(1,0)                       iota(8) reshaped, transposed, cut into 2 groups of 4
    mesh['data'=2,'x'=4] {'data','x':(2)2}   axes of a mesh, whole or the (before)size part of one
"""

import math
import re
from typing import TypeAlias

import numpy as np

from tpmlp.inspection.hlo.text import integers

Groups: TypeAlias = tuple[tuple[int, ...], ...]

_EXPLICIT = re.compile(r"\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"(?:\[(\d+),(\d+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_MESH_AXIS = re.compile(r"([^,=]+)=(\d+)")
_AXIS_PART = re.compile(r"([^,:]+)(?::\((\d+)\)(\d+))?")


def parse_groups(text: str, num_devices: int) -> Groups:
    """Expand the replica groups, or source and target pairs, that `text` begins with.

    Raises:
        ValueError: the text has none of the three forms.
    """
    if explicit := _EXPLICIT.match(text):
        groups = re.findall(r"\{([\d,]+)\}", explicit[1])
        # No group at all stands for one of all devices.
        return tuple(integers(group) for group in groups) or (tuple(range(num_devices)),)
    if (iota := _IOTA.match(text)) and iota[1]:
        return _rows(_iota(iota).reshape(int(iota[1]), int(iota[2])))
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh)
    raise ValueError(
        f"replica_groups must be lists, an iota or axes of a mesh: got {text[:60]!r}. "
        "This version of XLA writes them in a way that tpmlp does not know; use a version of JAX "
        "that tpmlp supports."
    )


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(entry) for entry in row) for row in array)


def _iota(match: re.Match[str]) -> np.ndarray:
    dims = integers(match[3])
    order = integers(match[4]) if match[4] else tuple(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order)


def _mesh_groups(match: re.Match[str]) -> Groups:
    """Group the devices of a mesh that differ only in their coordinates along the named parts.

    The part `(before)size` of an axis of n reads the axis as [before, size, n / before / size].
    """
    names = [name for name, _ in _MESH_AXIS.findall(match[1])]
    shape = tuple(int(size) for _, size in _MESH_AXIS.findall(match[1]))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, device in np.ndenumerate(_mesh_devices(match[2], shape)):
        rest = list(index)
        for name, before, size in _AXIS_PART.findall(match[3]):
            axis = names.index(name)
            stride = shape[axis] // (int(before) * int(size)) if size else 1
            coordinate = index[axis] // stride % (int(size) if size else shape[axis])
            rest[axis] -= coordinate * stride
        groups.setdefault(tuple(rest), []).append(int(device))
    return tuple(tuple(group) for group in groups.values())


def _mesh_devices(device_ids: str | None, shape: tuple[int, ...]) -> np.ndarray:
    if device_ids is None:
        return np.arange(math.prod(shape)).reshape(shape)
    iota = _IOTA.match(device_ids)
    return (_iota(iota) if iota else np.array(integers(device_ids))).reshape(shape)
