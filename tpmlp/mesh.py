"""Meshes: how many devices on each axis, and the one place where a Mesh is made.

The axes are always (data, stage, x, y): samples, pipeline stages, and the two tensor axes. An
axis that is not used has size 1.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from tpmlp.checks import check_count
from tpmlp.preflight import check_collectives

AXES = ("data", "stage", "x", "y")


def simulate_devices(num_devices: int) -> None:
    """Let this process see num_devices CPU devices, whatever the machine has.

    Simulated devices share the processor's cores: results and memory are those of real devices,
    times are not. Call it before anything else uses JAX; calling it again with the same number
    is allowed.

    Args:
        num_devices: number of devices, at least 1.

    Raises:
        ValueError: num_devices is not a positive integer.
        RuntimeError: JAX has already started with other devices.

    Examples:
        >>> simulate_devices(8)
        >>> jax.device_count()
        8
    """
    num_devices = check_count("num_devices", num_devices, "Use for example simulate_devices(8).")
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:
        devices = jax.devices()
        if len(devices) != num_devices or devices[0].platform != "cpu":
            raise RuntimeError(
                f"simulate_devices must come before JAX starts: got num_devices={num_devices}, "
                f"while JAX runs on {len(devices)} {devices[0].platform} device(s). Call it first "
                "thing in the program; in a notebook, restart the kernel."
            ) from error


def make_mesh(
    *,
    data: int = 1,
    stage: int = 1,
    x: int | None = None,
    y: int = 1,
    devices: Sequence[Any] | None = None,
    check: bool = False,
    **unknown: Any,
) -> Mesh:
    """Make a mesh with the axes data, stage, x and y.

    Args:
        data: devices over which the batch is split.
        stage: pipeline stages.
        x: devices on the first tensor axis; None takes those that the other axes leave.
        y: devices on the second tensor axis.
        devices: the devices to use, all of JAX's by default. A mesh smaller than their number
            takes the first ones.
        check: whether to run every collective on this mesh, on arrays of a few bytes to 16 MiB,
            and compare it with its definition, so that a broken runtime is found before training
            (tpmlp.preflight). With many processes fit does so by itself.
        **unknown: nothing; another axis is refused.

    Returns:
        A jax.sharding.Mesh.

    Raises:
        ValueError: an unknown axis, one that is not a positive integer, or a mesh that is larger
            than the devices.
        RuntimeError: check found a collective that gives wrong numbers; says which and where.

    Examples:
        >>> dict(make_mesh(data=2, x=2, y=2).shape)
        {'data': 2, 'stage': 1, 'x': 2, 'y': 2}
        >>> make_mesh(x=4, y=2).size
        8
    """
    check_axes(unknown)
    if not isinstance(devices, Sequence | np.ndarray | None):
        raise ValueError(
            f"devices must be a sequence of JAX devices: got devices={devices!r}. Use for example "
            "jax.devices()[:4]."
        )
    pool = list(jax.devices() if devices is None else np.ravel(np.asarray(devices, object)))
    sizes = mesh_sizes(len(pool), data=data, stage=stage, x=x, y=y)
    shape, needed = tuple(sizes.values()), prod(sizes.values())
    if needed > len(pool):
        raise ValueError(
            "mesh must not be larger than the devices: got "
            f"{' * '.join(f'{name}={size}' for name, size in sizes.items())} = {needed}, "
            f"devices={len(pool)}. Use fewer, or call tpmlp.simulate_devices({needed}) before "
            "JAX starts."
        )
    # Not jax.make_mesh, which refuses 8 x 8 on a 4 x 4 x 4 torus of chips.
    grid = create_device_mesh(shape, pool[:needed], allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4)
    if check:
        check_collectives(mesh)
    return mesh


def stage_mesh(mesh: Mesh, stage: int) -> Mesh:
    """Return the mesh of one stage's devices, with the same axes."""
    return Mesh(np.take(mesh.devices, [stage], AXES.index("stage")), AXES)


def mesh_sizes(
    num_devices: int, *, data: int = 1, stage: int = 1, x: int | None = None, y: int = 1
) -> dict[str, int]:
    """Return the devices on each axis; arguments as in make_mesh, x=None takes what is left.

    Raises:
        ValueError: a size that is no positive integer.
    """
    for name, size in (("data", data), ("stage", stage), ("x", 1 if x is None else x), ("y", y)):
        check_count(f"mesh axis {name}", size, "Leave an axis out to give it size 1.")
    x = max(1, num_devices // (data * stage * y)) if x is None else x
    return {"data": int(data), "stage": int(stage), "x": int(x), "y": int(y)}


def check_axes(sizes: Mapping[str, Any]) -> None:
    """Refuse names that are no axes of a mesh."""
    unknown = {name: size for name, size in sizes.items() if name not in AXES}
    if unknown:
        given = ", ".join(f"{name}={size}" for name, size in unknown.items())
        raise ValueError(
            f"mesh axis must be one of {AXES}: got {given}. Use x and y for the tensor axes, data "
            "for the batch."
        )


def describe_mesh(*, platform: str, data: int = 1, stage: int = 1, x: int = 1, y: int = 1) -> Any:
    """Return a mesh of devices that are only described: any number, none of them there.

    What is predicted from a mesh (tpmlp.placement, tpmlp.predict, tpmlp.pipeline) is the same on
    it as on devices. Nothing can be placed on it or run.

    Args:
        platform: the kind of device, "cpu", "gpu" or "tpu", which predictions depend on.
        data: devices over which the batch is split.
        stage: pipeline stages.
        x: devices on the first tensor axis.
        y: devices on the second tensor axis.

    Returns:
        An AbstractMesh, which has all that predictions read of a Mesh.

    Examples:
        >>> describe_mesh(platform="tpu", data=64, x=8, y=8).size
        4096
    """
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    sizes, types = (data, stage, x, y), (AxisType.Auto,) * len(AXES)
    return AbstractMesh(sizes, AXES, types, abstract_device=device)


def mesh_platform(mesh: Mesh | AbstractMesh) -> str:
    """Return the kind of device: "cpu", "tpu", "gpu".

    Examples:
        >>> mesh_platform(describe_mesh(platform="tpu")), mesh_platform(make_mesh(x=1))
        ('tpu', 'cpu')
    """
    if isinstance(mesh, AbstractMesh):
        return mesh.abstract_device.platform
    return mesh.devices.flat[0].platform


def check_mesh(mesh: Mesh | AbstractMesh) -> Mesh:
    """Return the mesh, or refuse one whose axes are not data, stage, x, y, or not Auto."""
    if isinstance(mesh, AbstractMesh):
        raise ValueError(
            f"mesh must be one of devices, to place arrays on: got {mesh!r}. Make it with "
            "tpmlp.make_mesh; an AbstractMesh only describes one."
        )
    if not isinstance(mesh, Mesh) or tuple(mesh.axis_names) != AXES:
        axes = getattr(mesh, "axis_names", mesh)
        raise ValueError(
            f"mesh must have the axes {AXES}: got axes={axes!r}. Make it with tpmlp.make_mesh."
        )
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh must have axes of type Auto: got {mesh.axis_types}. Make it with "
            "tpmlp.make_mesh; jax.make_mesh makes Explicit ones."
        )
    return mesh
