"""Meshes: how many devices on each axis, and the one place where a Mesh is made.

The axes are always (data, stage, x, y): samples, pipeline stages, and the two tensor axes. An
axis that is not used has size 1.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec

from tpmlp import collectives
from tpmlp.checks import check_count

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
        check: whether to run every collective once on this mesh and compare it with its
            definition, so that a broken runtime is found before training.
        **unknown: nothing; another axis is refused.

    Returns:
        A jax.sharding.Mesh.

    Raises:
        ValueError: an unknown axis, one that is not a positive integer, or a mesh that is larger
            than the devices.
        RuntimeError: check found a collective that gives wrong numbers.

    Examples:
        >>> dict(make_mesh(data=2, x=2, y=2).shape)
        {'data': 2, 'stage': 1, 'x': 2, 'y': 2}
        >>> make_mesh(x=4, y=2).size
        8
    """
    if unknown:
        given = ", ".join(f"{name}={size}" for name, size in unknown.items())
        raise ValueError(
            f"mesh axis must be one of {AXES}: got {given}. Use x and y for the tensor axes, data "
            "for the batch."
        )
    if not isinstance(devices, Sequence | np.ndarray | None):
        raise ValueError(
            f"devices must be a sequence of JAX devices: got devices={devices!r}. Use for example "
            "jax.devices()[:4]."
        )
    pool = list(jax.devices() if devices is None else np.ravel(np.asarray(devices, object)))
    for name, size in (("data", data), ("stage", stage), ("x", 1 if x is None else x), ("y", y)):
        check_count(f"mesh axis {name}", size, "Leave an axis out to give it size 1.")
    x = max(1, len(pool) // (data * stage * y)) if x is None else x
    shape = (int(data), int(stage), int(x), int(y))
    needed = int(np.prod(shape))
    if needed > len(pool):
        raise ValueError(
            f"mesh must not be larger than the devices: got data={data} * stage={stage} * x={x} * "
            f"y={y} = {needed}, devices={len(pool)}. Use fewer, or call "
            f"tpmlp.simulate_devices({needed}) before JAX starts."
        )
    # Not jax.make_mesh, which refuses 8 x 8 on a 4 x 4 x 4 torus of chips.
    grid = create_device_mesh(shape, pool[:needed], allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4)
    if check:
        check_collectives(mesh)
    return mesh


def check_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh, or refuse one whose axes are not data, stage, x, y, or not Auto."""
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


def check_collectives(mesh: Mesh) -> None:
    """Run each collective over each axis on integers and compare with its definition.

    Raises:
        RuntimeError: a collective gives wrong numbers on this mesh; names it and the axis.
    """
    for axis in AXES:
        blocks = np.arange(mesh.shape[axis] ** 2 * 6, dtype=np.float32)
        blocks = blocks.reshape(mesh.shape[axis], -1, 2)  # one block a device, [features, batch]
        total = blocks.sum(0)
        expected = {
            "all_gather": ("A/a B -> A B", blocks.reshape(-1, 2), PartitionSpec()),
            "reduce_scatter": ("A B +a -> A/a B", total, PartitionSpec(axis)),
            "all_reduce": ("A B +a -> A B", total, PartitionSpec()),
        }
        split = PartitionSpec(axis if mesh.shape[axis] > 1 else None)
        for name, (signature, right, out_spec) in expected.items():

            def body(x: jax.Array, name: str = name, signature: str = signature, axis: str = axis):
                return getattr(collectives, name)(signature, x, a=axis)

            out_spec = out_spec if mesh.shape[axis] > 1 else PartitionSpec()
            run = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=out_spec)
            got = np.asarray(jax.jit(run)(blocks.reshape(-1, 2)))
            if not np.array_equal(got, right):
                raise RuntimeError(
                    f"{name} over mesh axis {axis} gives wrong numbers on {mesh.shape}: "
                    f"max difference {np.abs(got - right).max()}. Do not train on this mesh; "
                    "check the devices and the versions of JAX and its plugin."
                )
