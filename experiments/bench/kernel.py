"""This package's steps: one with a default Strategy, and one for each way to use the devices."""

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import tpmlp
from experiments.bench.problem import DType, Problem
from experiments.bench.timing import Label, Program, make_program
from tpmlp.placement import place

Keep = Literal["shard", "gathered", "recompute"]
Sizes = tuple[int, int, int]  # data, x, y

INVARIANT = 'reduction="invariant"'
LAYOUTS = ("auto", "column", "row", "alternate")
KEEPS: tuple[Keep, ...] = ("shard", "gathered", "recompute")


def default_mesh(num_devices: int) -> tuple[int, int]:
    """Return the X x Y on which the default strategy is measured: the squarest with X >= Y.

    Examples:
        >>> [default_mesh(num_devices) for num_devices in (1, 2, 4, 8)]
        [(1, 1), (2, 1), (2, 2), (4, 2)]
    """
    y = max(y for y in range(1, num_devices + 1) if num_devices % y == 0 and y * y <= num_devices)
    return num_devices // y, y


def meshes(num_devices: int) -> list[Sizes]:
    """Return every (data, x, y) of a number of devices, each once: X = 1 only where Y = 1.

    With one tensor axis x and y are the same mesh.

    Examples:
        >>> meshes(4)
        [(1, 2, 2), (1, 4, 1), (2, 2, 1), (4, 1, 1)]
    """
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    return [
        (data, x, num_devices // (data * x))
        for data, x in product(divisors, divisors)
        if num_devices % (data * x) == 0 and (x > 1 or data * x == num_devices)
    ]


def kernel(problem: Problem, sizes: Sizes, dtype: DType, variant: str, **fields: object) -> Program:
    """Return a step on a mesh with Strategy(**fields), compiled.

    Args:
        problem: weights and data.
        sizes: devices on data, x and y.
        dtype: of the products; bfloat16 is a field of the strategy.
        variant: what to call it.
        **fields: of the strategy.
    """
    strategy = _strategy(dtype, **fields)
    data, x, y = sizes
    mesh = tpmlp.make_mesh(data=data, x=x, y=y)
    model = tpmlp.MLP((problem.size.d,) * (problem.size.layers + 1))
    params = tpmlp.from_numpy(model, list(problem.layers), mesh, strategy=strategy)
    batch = tpmlp.shard_batch(model, problem.x, problem.y, mesh=mesh, strategy=strategy, loss="mse")
    step = tpmlp.value_and_grad(model, loss="mse", mesh=mesh, strategy=strategy)
    shape = f"{x}x{y}" if data == 1 else f"{data}x{x}x{y}"
    label = Label(group="kernel", variant=variant, mesh=shape, devices=mesh.size, dtype=dtype)
    summary = model.summary(mesh, batch_size=problem.size.batch, strategy=strategy, loss="mse")
    return make_program(
        label,
        step,
        params,
        *batch,
        predicted_temp_bytes=summary.temp_bytes,
        predicted_received_bytes=summary.bytes_moved,
    )


def by_default(problem: Problem, num_devices: int, dtype: DType) -> Program:
    """Return the step with Strategy() on the default mesh, compiled."""
    return kernel(problem, (1, *default_mesh(num_devices)), dtype, "Strategy()")


def invariant(problem: Problem, num_devices: int, dtype: DType) -> Program:
    """Return the same step with bits that do not depend on the mesh."""
    mesh = (1, *default_mesh(num_devices))
    return kernel(problem, mesh, dtype, INVARIANT, reduction="invariant")


def everywhere(problem: Problem, num_devices: int, dtype: DType) -> Iterator[Program]:
    """Yield a compiled step for each mesh, layout and keep; each program once."""
    widths = (problem.size.d,) * (problem.size.layers + 1)
    for sizes in meshes(num_devices):
        for words, name in layouts(widths, sizes).items():
            for keep in KEEPS:
                yield kernel(problem, sizes, dtype, f"{name}, {keep}", layout=words, keep=keep)


def layouts(widths: tuple[int, ...], sizes: Sizes) -> dict[tuple[str, ...], str]:
    """Return the layouts of a mesh as {role of each layer: name}, each program once."""
    data, x, y = sizes
    mesh = tpmlp.make_mesh(data=data, x=x, y=y)
    names = LAYOUTS if y == 1 else ("auto", "alternate")
    found: dict[tuple[str, ...], str] = {}
    for name in names[:1] if x * y == 1 else names:
        found.setdefault(place(widths, mesh, tpmlp.Strategy(layout=name)).words, name)
    return found


def _strategy(dtype: DType, **fields: Any) -> tpmlp.Strategy:
    return tpmlp.Strategy(compute_dtype=None if dtype == "float32" else dtype, **fields)
