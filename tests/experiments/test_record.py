"""What experiments write down: a failure means files that other programs cannot read."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.record import plain, save_json


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("-inf")]
)
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path, value):
    save_json(tmp_path / "a.json", {"deep": [{"loss": value}, (value, 1.5)]}, 1.0)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=refuse_constant)["deep"] == [
        {"loss": None},
        [None, 1.5],
    ]


def test_arrays_paths_and_numpy_numbers_become_plain_data():
    result = {"a": np.arange(3), "b": Path("x/y"), "c": np.int64(4), "d": np.bool_(True), 5: None}
    expected = {"a": [0, 1, 2], "b": "x/y", "c": 4, "d": True, "5": None}
    assert plain(result) == expected


def test_a_record_has_its_circumstances_and_makes_its_folder(tmp_path):
    save_json(tmp_path / "new" / "a.json", {"x": 1}, 1.234)
    record = json.loads((tmp_path / "new" / "a.json").read_text())
    assert (record["x"], record["seconds"]) == (1, 1.23)
    assert record["device"].startswith("8 x cpu")
    assert set(record["versions"]) == {"python", "jax", "jaxlib", "numpy"}
