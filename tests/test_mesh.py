"""Meshes: their axes, their sizes, and the self-test of the collectives.

A failure here means that devices are not where every other test assumes, or that a broken
runtime would go unnoticed.
"""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import tpmlp
from tpmlp import collectives
from tpmlp.mesh import AXES, check_mesh, describe_mesh


def test_a_mesh_has_the_four_axes_in_order_and_automatic(mesh):
    assert mesh.axis_names == AXES == ("data", "stage", "x", "y")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_takes_the_first_devices_in_row_major_order(mesh):
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({}, (1, 1, 8, 1)),
        ({"y": 2}, (1, 1, 4, 2)),
        ({"data": 3}, (3, 1, 2, 1)),
        ({"data": 2, "y": 4}, (2, 1, 1, 4)),
        ({"data": 8}, (8, 1, 1, 1)),
        ({"x": 5}, (1, 1, 5, 1)),
        ({"stage": 2, "x": 2}, (1, 2, 2, 1)),
    ],
)
def test_x_takes_the_devices_that_are_left_over(given, shape):
    assert tuple(tpmlp.make_mesh(**given).shape.values()) == shape


def test_a_mesh_can_be_made_of_chosen_devices():
    chosen = jax.devices()[3:7]
    assert list(tpmlp.make_mesh(y=2, devices=chosen).devices.flat) == chosen


def test_the_self_test_passes_on_working_collectives():
    assert tpmlp.make_mesh(x=2, check=True).size == 2


def test_the_self_test_fails_where_a_collective_gives_wrong_numbers(monkeypatch):
    right = collectives.all_reduce
    monkeypatch.setattr(collectives, "all_reduce", lambda *args, **axes: right(*args, **axes) + 1)
    assert tpmlp.make_mesh(x=2).size == 2
    with pytest.raises(RuntimeError, match="all_reduce over mesh axis x must give the numbers"):
        tpmlp.make_mesh(x=2, check=True)


@pytest.mark.parametrize(("axis", "size"), [("x", 0), ("y", -1), ("data", 2.0), ("stage", True)])
def test_an_axis_that_is_no_positive_integer_is_refused(axis, size):
    with pytest.raises(ValueError, match=f"mesh axis {axis} must be a positive.*{axis}={size!r}"):
        tpmlp.make_mesh(**{axis: size})


def test_a_mesh_larger_than_the_devices_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"x=4 \* y=3 = 12, devices=8.*simulate_devices\(12\)"):
        tpmlp.make_mesh(x=4, y=3)


@pytest.mark.parametrize("devices", [[], jax.devices()[:3]])
def test_a_mesh_larger_than_the_chosen_devices_is_refused(devices):
    with pytest.raises(ValueError, match=f"devices={len(devices)}"):
        tpmlp.make_mesh(x=4, devices=devices)


def test_a_foreign_mesh_is_refused_with_its_axes():
    foreign = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "model"))
    with pytest.raises(ValueError, match=r"\('x', 'model'\).*tpmlp.make_mesh"):
        check_mesh(foreign)


def test_a_mesh_of_explicit_axes_is_refused():
    # jax.make_mesh makes these by default, and shard_map then refuses every array.
    foreign = jax.make_mesh((1, 1, 4, 2), AXES)
    with pytest.raises(ValueError, match=r"tpmlp.make_mesh"):
        check_mesh(foreign)


@pytest.mark.parametrize("wrong", [None, 8, (4, 2), {"x": 4}])
def test_what_is_no_mesh_is_refused(wrong):
    with pytest.raises(ValueError, match=r"mesh must have the axes"):
        check_mesh(wrong)


def test_a_mesh_that_is_only_described_is_refused_where_arrays_are_placed():
    with pytest.raises(ValueError, match=r"mesh must be one of devices.*tpmlp.make_mesh"):
        check_mesh(describe_mesh(platform="cpu", x=4))


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "8", True])
def test_a_number_of_devices_that_is_no_positive_integer_is_refused(wrong):
    with pytest.raises(ValueError, match=f"num_devices={wrong!r}"):
        tpmlp.simulate_devices(wrong)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_devices_are_simulated_in_a_process_that_has_not_started_jax():
    code = "import jax, tpmlp; tpmlp.simulate_devices(3); print(len(jax.devices()))"
    assert run_python(code).stdout == "3\n"


def test_simulating_devices_after_jax_has_started_is_refused():
    code = "import jax, tpmlp; jax.devices('cpu'); jax.devices(); tpmlp.simulate_devices(5)"
    error = run_python(code).stderr
    assert "RuntimeError: simulate_devices must " in error
    assert "before JAX starts" in error
    assert "num_devices=5" in error
    assert "1 cpu device" in error
