"""fit as a whole.

- equality: a run of fit against a plain loop of NumPy gradients and optax. A failure on one mesh
  is about that mesh, on all of them about order, weights, R or the update.
- the long run: one run that several tests look at: what it records, compiles, keeps and frees.
- the rest: every way to stop, and every argument that is refused before anything is compiled.
"""

import json
import math
import signal
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tpmlp
from tests.cases import mesh_of, padding, relative_error
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.train.batches import epoch_order
from tpmlp.train.callbacks import EarlyStopping, JSONLines
from tpmlp.train.inference import evaluate
from tpmlp.train.loop import fit
from tpmlp.train.optimizer import standard_promotion

Sizes = tuple[int, int, int]

# 10 classes; sigmoid, which is not 0 at 0, so that padding would show.
MODEL = tpmlp.MLP((6, 9, 10), activation="sigmoid")
RNG = np.random.default_rng(0)
ARRAYS = [(RNG.normal(size=(o, i)), RNG.normal(size=o)) for i, o in ((6, 9), (9, 10))]
X = RNG.normal(size=(30, 6))
LABELS = RNG.integers(0, 10, 30)
WEIGHT = RNG.uniform(0.5, 2, 30)
R = tpmlp.l2(1e-3)

# What the tests of refusals and of stopping share: a model that compiles quickly.
SMALL = tpmlp.MLP((6, 1), bias=False)
SLOPE = X @ np.arange(1.0, 7.0)


def fit_small(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "loss": "mse",
        "mesh": mesh_of((1, 1, 2)),
        "batch_size": 10,
        "progress": False,
        "optimizer": optax.sgd(0.05),
    }
    if "epochs" not in changes:
        arguments["steps"] = 12
    data = changes.pop("data", (X, SLOPE))
    return fit(SMALL, data, **arguments | changes)


@cache
def plain_run() -> tuple[list[Any], list[dict[str, float]]]:
    """Return parameters and records of 20 steps in NumPy and optax, on one device."""
    tx = optax.adam(1e-2)
    params, history = ARRAYS, []
    with standard_promotion():
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(20):
            rows = epoch_order(5, step // 4 + 1, 30)[step % 4 * 8 :][:8]
            t = reference.trace(
                params,
                X[rows],
                LABELS[rows],
                activation="sigmoid",
                loss="cross_entropy",
                weight=WEIGHT[rows],
                regularizer=R,
            )
            right = t.z[2].argmax(axis=1) == LABELS[rows]
            accuracy = np.average(right, weights=WEIGHT[rows])
            history.append({"loss": t.loss, "penalty": t.penalty, "accuracy": accuracy})
            updates, state = update([(t.dW[l], t.db[l]) for l in t.dW], state)
            params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    return params, history


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 5, 1), (1, 1, 7), (1, 4, 2)])
def test_a_run_is_that_of_numpy_and_optax_on_every_mesh(sizes: Sizes) -> None:
    mesh = mesh_of(sizes)
    result = fit(
        MODEL,
        (X, LABELS, WEIGHT),
        loss="cross_entropy",
        mesh=mesh,
        optimizer=optax.adam(1e-2),
        steps=20,
        batch_size=8,
        regularizer=R,
        params=tpmlp.from_numpy(MODEL, ARRAYS, mesh),
        seed=5,
        progress=False,
        log_every=1,
    )
    params, history = plain_run()
    errors = jax.tree.map(relative_error, tpmlp.to_numpy(MODEL, result.params), params)
    assert max(jax.tree.leaves(errors)) <= FLOAT64
    for key in ("loss", "penalty", "accuracy"):
        got, wanted = ([record[key] for record in h] for h in (result.history, history))
        assert relative_error(got, wanted) <= FLOAT64, key


@dataclass
class Watch:
    """A callback that looks at a run from inside."""

    compiled: list[str] = field(default_factory=list)
    num_compiled: list[int] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)

    def listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compiled.append(event)

    def __call__(self, record: dict[str, Any], params: Any) -> None:
        self.num_compiled.append(len(self.compiled))
        self.params.append(params)
        for (W, b), (W_logical, b_logical) in zip(params, ARRAYS, strict=True):
            self.padding += [
                float(np.abs(padding(np.asarray(W), W_logical.shape)).sum()),
                float(np.abs(padding(np.asarray(b), b_logical.shape)).sum()),
            ]


@dataclass(frozen=True)
class LongRun:
    """A run with everything switched on, and what was seen of it."""

    start: Any
    result: Any
    watch: Watch
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> LongRun:
    mesh, watch = mesh_of((1, 4, 2)), Watch()
    path: Path = tmp_path_factory.mktemp("run") / "history.jsonl"
    start = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    jax.monitoring.register_event_duration_secs_listener(watch.listen)
    try:
        result = fit(
            MODEL,
            (X, LABELS),
            loss="cross_entropy",
            mesh=mesh,
            optimizer=optax.adagrad(0.1),
            epochs=3,
            batch_size=8,
            validation=(X[:11], LABELS[:11], WEIGHT[:11]),
            params=start,
            callbacks=[watch, JSONLines(path)],
            progress=False,
            log_every=1,
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(watch.listen)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return LongRun(start, result, watch, lines)


def test_nothing_is_compiled_after_the_first_step(long_run: LongRun) -> None:
    assert long_run.watch.num_compiled[0] > 0
    assert len(set(long_run.watch.num_compiled)) == 1


def test_padding_is_0_after_every_step(long_run: LongRun) -> None:
    assert len(long_run.watch.padding) == 12 * 4
    assert not any(long_run.watch.padding)


def test_a_step_reuses_the_memory_of_the_parameters_before_it(long_run: LongRun) -> None:
    *before, last = long_run.watch.params
    assert all(leaf.is_deleted() for params in before for leaf in jax.tree.leaves(params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(last))


def test_the_caller_s_parameters_are_left_alone(long_run: LongRun) -> None:
    for (W, b), (W_start, b_start) in zip(
        tpmlp.to_numpy(MODEL, long_run.start), ARRAYS, strict=True
    ):
        np.testing.assert_array_equal(W, W_start)
        np.testing.assert_array_equal(np.asarray(b), b_start)


def test_history_is_plain_data_with_validation_at_the_ends_of_epochs(long_run: LongRun) -> None:
    history = long_run.result.history
    assert [(r["step"], r["epoch"]) for r in history] == [
        (k, (k - 1) // 4 + 1) for k in range(1, 13)
    ]
    always = {"step", "epoch", "loss", "penalty", "accuracy", "samples_per_s", "seconds"}
    for record in history:
        validated = {"validation_loss", "validation_accuracy"} if record["step"] % 4 == 0 else set()
        assert set(record) == always | validated
        assert {type(value) for value in record.values()} == {int, float}
        assert record["samples_per_s"] > 0
    assert history == sorted(history, key=lambda record: record["seconds"])


def test_the_file_has_the_history(long_run: LongRun) -> None:
    assert long_run.lines == long_run.result.history


def test_the_last_validation_is_what_evaluate_says(long_run: LongRun) -> None:
    mesh = mesh_of((1, 4, 2))
    data = (X[:11], LABELS[:11], WEIGHT[:11])
    result = evaluate(MODEL, long_run.result.params, data, loss="cross_entropy", mesh=mesh)
    last = long_run.result.history[-1]
    assert relative_error(last["validation_loss"], result.loss) <= FLOAT64
    assert last["validation_accuracy"] == pytest.approx(result.accuracy)


def test_the_result_says_how_it_ended(long_run: LongRun) -> None:
    result = long_run.result
    assert (result.stopped, result.steps) == ("finished", 12)
    assert result.seconds >= result.history[-1]["seconds"] > 0
    assert len(repr(result)) < 300


def test_a_float32_run_repeats_bit_for_bit_and_depends_on_the_seed() -> None:
    first, again, other = (
        tpmlp.to_numpy(SMALL, fit_small(seed=seed, optimizer=None).params)[0][0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    assert (first != other).all()


def test_ctrl_c_leaves_a_usable_result() -> None:
    def press(record: dict[str, Any], params: Any) -> None:
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = fit_small(callbacks=[press], log_every=2)
    assert signal.getsignal(signal.SIGINT) is before
    assert (result.stopped, result.steps, result.history[-1]["step"]) == ("interrupted", 4, 4)
    assert "after step 4 of 12" in result.message
    assert np.isfinite(tpmlp.to_numpy(SMALL, result.params)[0][0]).all()


def test_a_press_between_records_is_recorded() -> None:
    def schedule_that_presses(count: Any) -> Any:
        # Runs on the host in every step, also in those without a record.
        jax.debug.callback(press, count)
        return 0.05

    def press(count: Any) -> None:
        if count == 4:
            signal.raise_signal(signal.SIGINT)

    result = fit_small(
        optimizer=optax.sgd(schedule_that_presses), log_every=50, steps=50, mesh=mesh_of((1, 1, 1))
    )
    assert result.stopped == "interrupted"
    assert result.history[-1]["step"] == result.steps < 50


def test_a_callback_can_stop_and_is_named() -> None:
    class AtFive:
        def __call__(self, record: dict[str, Any], params: Any) -> bool:
            return record["step"] == 5

        def __repr__(self) -> str:
            return "AtFive"

    result = fit_small(callbacks=[AtFive()], log_every=1)
    assert (result.stopped, result.steps) == ("callback", 5)
    assert result.message == "stopped by AtFive after step 5."


def test_the_best_parameters_are_returned_when_wanted() -> None:
    seen: dict[int, np.ndarray] = {}

    def keep(record: dict[str, Any], params: Any) -> None:
        seen[record["step"]] = tpmlp.to_numpy(SMALL, params)[0][0]

    # Rises from the start: the first record is the best.
    worse = optax.chain(optax.sgd(0.05), optax.scale(-1.0))
    stop = EarlyStopping(patience=1, restore_best=True)
    result = fit_small(callbacks=[keep, stop], optimizer=worse, epochs=9, validation=(X, SLOPE))
    assert (result.stopped, result.steps, stop.best_step) == ("callback", 9, 3)
    np.testing.assert_array_equal(tpmlp.to_numpy(SMALL, result.params)[0][0], seen[3])


def test_a_run_that_diverges_stops_and_keeps_its_history() -> None:
    result = fit_small(optimizer=optax.sgd(1e30), steps=50, log_every=25)
    assert result.stopped == "diverged"
    step = result.history[-1]["step"]
    assert 1 < step < 25
    assert not math.isfinite(result.history[-1]["loss"])
    assert f"at step {step}. Use a smaller learning rate" in result.message


def test_a_run_has_about_100_records() -> None:
    result = fit_small(steps=250)
    assert [r["step"] for r in result.history] == [*range(3, 250, 3), 250]
    assert result.history[-1]["loss"] < 1e-3 * result.history[0]["loss"]


def test_an_optimizer_that_asks_for_value_gets_the_objective() -> None:
    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.float32)

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(lambda u: -0.01 * u, updates), value

    tx = optax.GradientTransformationExtraArgs(init, cast(Any, update))
    result = fit_small(optimizer=tx, regularizer=tpmlp.l2(0.1), steps=3)
    last = result.history[-1]
    # One float32 sum of two numbers.
    assert float(result.opt_state) == pytest.approx(last["loss"] + last["penalty"], rel=1e-6)


def test_progress_ends_with_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    fit_small(progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("step 12/12  loss ")
    assert lines[-1] == "finished after step 12."


OTHER_MESH = (1, 1, 1)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "steps and epochs": ({"steps": 3, "epochs": 3}, "got steps=3, epochs=3"),
    "neither": ({"steps": None}, "got steps=None, epochs=None"),
    "no steps": ({"steps": 0}, "steps must be a positive integer: got steps=0"),
    "half an epoch": ({"epochs": 0.5}, "epochs must be a positive integer: got epochs=0.5"),
    "batch_size": ({"batch_size": 0}, "batch_size must be a positive integer"),
    "batch": ({"batch_size": 31}, "got batch_size=31, data with 30 samples.*batch_size=30"),
    "log_every": ({"log_every": -1}, "log_every must be a positive integer: got log_every=-1"),
    "seed": ({"seed": -1}, "seed must be an integer .*got seed=-1"),
    "loss": ({"loss": "hinge"}, "loss must be one of.*'hinge'"),
    "optimizer": ({"optimizer": "adam"}, "optimizer must be an optax.Grad.*got str"),
    "callback": ({"callbacks": [3]}, "callbacks must be functions.*got 3"),
    "monitor": ({"callbacks": [EarlyStopping(patience=1)]}, "validation=None"),
    "data": ({"data": (X[:, :5], SLOPE)}, "data: x must have shape.*d_0=6"),
    "validation": ({"validation": (X, SLOPE[:9])}, "validation: y must have one row"),
    "params": ({"params": SMALL.init(jax.random.key(0), mesh_of(OTHER_MESH))}, "tpmlp.reshard"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_arguments_are_refused_before_anything_is_compiled(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpmlp.train.run.compile_step", None)
    monkeypatch.setattr(tpmlp.MLP, "init", None)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit_small(**changes)


def test_without_optax_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ModuleNotFoundError, match=r"tpmlp.fit needs optax: pip install 'tpmlp"):
        fit_small(optimizer=None)
