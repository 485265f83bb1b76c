"""Callbacks by themselves: when early stopping stops, and what JSON lines hold."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from tpmlp.train.callbacks import EarlyStopping, JSONLines, check_callbacks


def answers(stop: EarlyStopping, values: list[float]) -> list[bool]:
    return [stop({"step": k, stop.monitor: v}, ()) for k, v in enumerate(values, 1)]


def test_a_loss_improves_by_falling_and_an_accuracy_by_rising() -> None:
    assert answers(EarlyStopping("loss", patience=0), [3, 2, 1, 1]) == [False] * 3 + [True]
    accuracy = EarlyStopping("validation_accuracy", patience=0)
    assert answers(accuracy, [0.1, 0.2, 0.1]) == [False, False, True]
    assert (accuracy.best, accuracy.best_step) == (0.2, 2)


def test_patience_counts_records_since_the_last_improvement() -> None:
    stop = EarlyStopping("loss", patience=2)
    assert answers(stop, [3, 4, 4, 2, 4, 4, 4]) == [False] * 6 + [True]


def test_less_than_min_delta_is_no_improvement() -> None:
    stop = EarlyStopping("loss", patience=1, min_delta=0.5)
    assert answers(stop, [3, 2.6, 2.6]) == [False, False, True]


def test_nan_is_no_improvement() -> None:
    stop = EarlyStopping("loss", patience=1)
    assert answers(stop, [float("nan"), 3, float("nan"), float("nan")]) == [False] * 3 + [True]


def test_records_without_the_monitor_are_passed_over() -> None:
    stop = EarlyStopping(patience=0)
    assert not stop({"step": 1, "loss": 1.0}, ())
    assert stop.best is None


@pytest.mark.parametrize("monitor", ["accuracy", "los", "validation_accuracy"])
def test_a_monitor_that_no_record_has_is_refused(monitor: str) -> None:
    record = {"step": 1, "loss": 1.0, "validation_loss": 1.0}
    with pytest.raises(ValueError, match=f"monitor='{monitor}'.*'validation_loss'"):
        EarlyStopping(monitor, patience=1)(record, ())


def test_the_best_parameters_are_copied() -> None:
    stop = EarlyStopping("loss", patience=5, restore_best=True)
    params = ((jnp.ones(3), None),)
    stop({"step": 1, "loss": 1.0}, params)
    params[0][0].delete()
    assert stop.best_params is not None
    assert stop.best_params[0][0].tolist() == [1, 1, 1]


def test_a_second_run_starts_afresh() -> None:
    stop = EarlyStopping("loss", patience=0)
    answers(stop, [1, 2])
    stop.start()
    assert answers(stop, [5, 4]) == [False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": -1}, "patience=-1"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta=-0.1"),
    ],
)
def test_impossible_settings_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**arguments)


def test_each_record_is_a_line_as_soon_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    write = JSONLines(path)
    write.start()
    for k in (1, 2):
        write({"step": k, "loss": 0.1 * k}, ())
        assert len(path.read_text().splitlines()) == k
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
    ]


def test_a_new_run_begins_the_file_anew_and_nan_is_null(tmp_path: Path) -> None:
    write = JSONLines(tmp_path / "history.jsonl")
    for _ in range(2):
        write.start()
        write({"step": 1, "loss": float("nan")}, ())
    assert write.path.read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (print, "callbacks must be a sequence"),
        ([print, 3], "callbacks must be functions.*got 3"),
        ([EarlyStopping(patience=3)], "monitor='validation_loss', validation=None"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_callbacks(callbacks, validated=False)
