"""The preflight: a failure here means that a backend which sums wrongly would train.

Faults are put into the lax that tpmlp.collectives calls, for one collective, type, size or device.
The last tests run two processes over gloo, as `tests/two_processes.py` tells.
"""

import inspect
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tpmlp
from tests.cases import mesh_of, name_of
from tpmlp import collectives, preflight
from tpmlp.preflight import check_collectives

# One number a device, and this.
SMALL = 1024

LAX = {
    "all_gather": "all_gather",
    "reduce_scatter": "psum_scatter",
    "all_reduce": "psum",
    "all_reduce_max": "pmax",
    "reduce_scatter_in_tree": "all_to_all",
    "shift": "ppermute",
}
Break = Callable[..., None]


@pytest.fixture
def break_lax(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Return a function that puts a fault into one function of the lax of tpmlp.collectives."""

    def put(name: str, fault: Callable[[jax.Array, jax.Array, Any], jax.Array]) -> None:
        def faulty(x: jax.Array, names: Any, *args: Any, **more: Any) -> jax.Array:
            return fault(getattr(lax, name)(x, names, *args, **more), x, names)

        monkeypatch.setattr(collectives, "lax", SimpleNamespace(**vars(lax) | {name: faulty}))

    return put


def plus_one(y: jax.Array) -> jax.Array:
    return y + jnp.ones((), y.dtype)


def fault_of(mesh: Any, largest_bytes: int | None = SMALL) -> str:
    with pytest.raises(RuntimeError) as raised:
        check_collectives(mesh, largest_bytes)
    return str(raised.value)


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one number a device in float32: a mesh with three axes has ten times the cases."""
    monkeypatch.setattr(preflight, "SIZES_BYTES", {"float32": (0, 0, 0)})


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 7), (1, 3, 2), (2, 2, 2)], ids=name_of
)
def test_working_collectives_pass_on_meshes_of_every_kind(sizes: Any) -> None:
    check_collectives(mesh_of(sizes), SMALL)


def test_working_collectives_pass_at_every_size() -> None:
    check_collectives(tpmlp.make_mesh(x=2))


@pytest.mark.parametrize("name", LAX)
def test_a_collective_that_gives_wrong_numbers_is_named(name: str, break_lax: Break) -> None:
    break_lax(LAX[name], lambda y, *_: plus_one(y))
    message = fault_of(mesh_of((1, 2, 1)))
    assert message.startswith(f"{name} over mesh axis x must give the numbers of its definition")
    assert "mesh={'data': 1, 'stage': 1, 'x': 2, 'y': 1}. Do not train on this mesh" in message


def is_collective(name: str) -> bool:
    """Return whether a name of lax is a collective: a function of (x, axis_name, ...)."""
    function = getattr(lax, name, None)
    parameters = list(inspect.signature(function).parameters) if callable(function) else []
    return parameters[1:2] == ["axis_name"] and name != "pcast"  # That moves nothing.


def public_collectives() -> list[str]:
    """Return the functions of tpmlp.collectives that call a collective of lax, by their source.

    Or that call `_permuted`, which does.
    """
    sources = {name: inspect.getsource(getattr(collectives, name)) for name in collectives.__all__}
    called = {
        name: re.findall(r"lax\.(\w+)\(", source.replace("_permuted(", "lax.ppermute("))
        for name, source in sources.items()
    }
    return [name for name, calls in called.items() if any(map(is_collective, calls))]


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize("name", public_collectives())
def test_no_collective_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(collectives, name)
    monkeypatch.setattr(collectives, name, lambda *args, **axes: plus_one(right(*args, **axes)))
    # Two axes, for one that would need both.
    assert fault_of(mesh_of((1, 2, 2))).startswith(f"{name} over mesh axis")


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize("axis", ["data", "x", "y"])
def test_the_axis_is_named(axis: str, break_lax: Break) -> None:
    break_lax("ppermute", lambda y, x, names: plus_one(y) if names == (axis,) else y)
    assert fault_of(mesh_of((2, 2, 2))).startswith(f"shift over mesh axis {axis} must")


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize("axes", [("x", "y"), ("data", "x", "y")])
def test_axes_that_are_summed_over_together_are_named(axes: Any, break_lax: Break) -> None:
    break_lax("psum", lambda y, x, names: plus_one(y) if tuple(names) == axes else y)
    assert f"all_reduce over mesh axis {', '.join(axes)} must" in fault_of(mesh_of((2, 2, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_is_named(dtype: str, break_lax: Break) -> None:
    break_lax("psum_scatter", lambda y, x, _: plus_one(y) if x.dtype == dtype else y)
    # Half of the two numbers that each device passes.
    assert f"got 1 wrong ones of {dtype} in" in fault_of(mesh_of((1, 2, 1)))


@pytest.mark.parametrize("size_bytes", [8, 64 * 1024, 16 * 1024**2])
def test_the_size_is_named(size_bytes: int, break_lax: Break) -> None:
    break_lax("psum", lambda y, x, _: plus_one(y) if x.size * 4 == size_bytes else y)
    message = fault_of(mesh_of((1, 2, 1)), None)
    assert f"{size_bytes // 4} wrong ones of float32 in an array of {size_bytes} bytes" in message


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize(("axis", "device"), [("x", 2), ("y", 1)])
def test_the_first_device_that_is_wrong_is_named(axis: str, device: int, break_lax: Break) -> None:
    def fault(y: jax.Array, x: jax.Array, names: Any) -> jax.Array:
        second = lax.axis_index(axis) == 1
        return jnp.where(second, plus_one(y), y) if names == (axis,) else y

    break_lax("psum_scatter", fault)
    mesh = mesh_of((1, 2, 2))
    assert f"first on device {mesh.devices.flat[device]} of process 0" in fault_of(mesh)


def summed(y: jax.Array, weights: jax.Array, x: jax.Array, names: Any) -> jax.Array:
    """Return a sum over axis x in which device k counts weights[k] times."""
    return lax.psum(x * weights[lax.axis_index("x")].astype(x.dtype), names)


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize(
    "weights",
    [w for w in product((0, 1, 2), repeat=4) if sum(w) == 4 and w != (1, 1, 1, 1)],
    ids=str,
)
def test_a_sum_that_counts_devices_wrongly_is_found_though_their_number_is_right(
    weights: Any, break_lax: Break
) -> None:
    break_lax("psum", lambda y, x, names: summed(y, jnp.array(weights), x, names))
    assert "all_reduce over mesh axis x must" in fault_of(mesh_of((1, 4, 1)))


def test_every_collective_is_in_the_compiled_program() -> None:
    # Over two devices the two shifts are one.
    mesh = mesh_of((1, 4, 1))
    case = preflight.Case(("x",), 4, "float32", 16)
    held, _ = preflight._numbers(mesh, case)
    audit = tpmlp.audit(preflight._collect(mesh, case), held)
    kinds = [found.kind for found in audit.collectives for _ in range(found.count or 0)]
    twice = ["all_gather", "all_reduce", "ppermute"]
    assert sorted(kinds) == sorted(["reduce_scatter", "all_to_all", *twice, *twice])


def test_axes_sizes_and_types_are_all_there() -> None:
    mesh = mesh_of((2, 2, 2))
    cases = list(preflight._cases(mesh, None))
    groups = [("data",), ("x",), ("y",), ("x", "y"), ("data", "x", "y")]
    assert {case.axes for case in cases} == set(groups)
    for axes, dtype in product(groups, ("float32", "bfloat16")):
        sizes = [case.size_bytes for case in cases if (case.axes, case.dtype) == (axes, dtype)]
        # From one number a device to megabytes, and of whole blocks.
        assert sizes == sorted(sizes)
        assert sizes[0] == 2 ** len(axes) * jnp.dtype(dtype).itemsize
        assert 4 * 2**20 <= sizes[-1] <= 32 * 2**20
    assert not list(preflight._cases(mesh_of((1, 1, 1)), None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_is_exact_in_its_type(dtype: str) -> None:
    case = preflight.Case(("x",), 3, dtype, 30_000)
    _, right = preflight._numbers(mesh_of((1, 3, 1)), case)
    largest = {"float32": 2**24, "bfloat16": 2**8}[dtype]
    for whole in right.values():
        assert np.abs(whole.astype(np.float64)).max() <= largest
    np.testing.assert_array_equal(
        right["all_reduce"].astype(np.int64), 3 * right["all_gather"].astype(np.int64)
    )


def fit(mesh: Any) -> Any:
    samples = np.ones((8, 3)), np.ones((8, 2))
    settings: Any = {"loss": "mse", "steps": 1, "batch_size": 8, "progress": False}
    return tpmlp.fit(tpmlp.MLP((3, 2)), samples, mesh=mesh, **settings)


def test_fit_does_without_on_one_process(break_lax: Break, monkeypatch: Any) -> None:
    monkeypatch.setattr(preflight, "check_collectives", lambda *_: 1 / 0)
    assert fit(mesh_of((1, 2, 1))).stopped == "finished"


def test_fit_on_many_processes_tries_the_mesh_up_to_its_largest_array_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []
    monkeypatch.setattr(preflight, "check_collectives", lambda *args: tried.append(args))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    preflight.check_collectives_once.cache_clear()
    mesh = mesh_of((1, 2, 1))
    fit(mesh)
    fit(mesh)
    # x is [8, 3] and its numbers have 4 bytes.
    assert tried == [(mesh, 96)]


def test_fit_on_many_processes_stops_before_it_trains(
    break_lax: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    preflight.check_collectives_once.cache_clear()
    break_lax("psum", lambda y, *_: plus_one(y))
    with pytest.raises(RuntimeError, match="all_reduce over mesh axis x must"):
        fit(mesh_of((1, 2, 1)))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes of two devices reports."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "two_processes.py"
    running = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(port), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_pass(processes: Any) -> None:
    assert [report["passed"] for report in processes] == [True, True]


def test_a_fault_that_one_process_sees_stops_both_with_its_device(processes: Any) -> None:
    first, second = (report["fault"] for report in processes)
    assert first == second
    assert "reduce_scatter over mesh axis x must" in first
    assert "of process 1, mesh=" in first


def test_two_processes_train_to_the_same_parameters_and_one_of_them_writes(processes: Any) -> None:
    hashes = [report["hash"] for report in processes]
    assert hashes[0] == hashes[1]
    assert [report["written"] for report in processes] == [True, False]
    assert [report["read"] for report in processes] == hashes
