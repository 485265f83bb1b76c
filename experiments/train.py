"""The main job: train a sharded MLP on real data, and say how well it does on data held out.

Question: does the sharded kernel train a real model to the accuracy an MLP should have?
Method: scikit-learn's digits (1,797 images of 8 x 8, a quarter held out, stratified), 8 simulated
    devices as x=4, y=2, Adam; or the user's own file. Accuracy on the held-out part.
Command: make train (one run), make train SEEDS=5 (the mean of five)
Prediction: about 0.98 on the digits, as scikit-learn's own MLPClassifier reaches.
Finding: see README.md, What is measured so far.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import tpmlp
from experiments.command import INTERRUPTED, SettingError, parse, refuse, require
from experiments.data import Dataset, load, save_class_map
from experiments.figures import plot_confusion, plot_loss, plot_prediction
from experiments.record import save_json
from experiments.settings import Config

# Everything a run may write; what an earlier run in the same folder left of it is removed.
FILES = (
    "history.jsonl",
    "loss.png",
    "confusion.png",
    "prediction.png",
    "model.npz",
    "classes.json",
    "summary.json",
)
# An accuracy is a share of samples; float32 sums leave digits after it that mean nothing.
ACCURACY_DIGITS = 6

Outcome = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A configuration made into objects, all of them checked.

    Attributes:
        config: what the user asked for.
        dataset: training and held-out samples.
        mesh: the mesh.
        model: the MLP.
        strategy: the strategy.
    """

    config: Config
    dataset: Dataset
    mesh: Mesh
    model: tpmlp.MLP
    strategy: tpmlp.Strategy

    def __post_init__(self) -> None:
        # Refuses a layout that the mesh cannot have.
        self.model.summary(self.mesh, batch_size=1, strategy=self.strategy)

    @property
    def batch_size(self) -> int:
        """Samples of one step: no more than there are."""
        return min(self.config.batch, len(self.dataset.x_train))

    @property
    def regularizer(self) -> Any:
        """R(W), or None."""
        return tpmlp.l2(self.config.l2) if self.config.l2 else None

    @property
    def where(self) -> dict[str, Any]:
        """The mesh and the strategy, as keyword arguments."""
        return {"mesh": self.mesh, "strategy": self.strategy}

    @property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """The samples to train on."""
        return self.dataset.x_train, self.dataset.y_train

    @property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """The samples held out."""
        return self.dataset.x_test, self.dataset.y_test


def prepare(config: Config) -> Job:
    """Load the data, make the mesh and the model, and make room for the results.

    Raises:
        ValueError: what is wrong with the data, the model or the layout.
        SettingError: too few real devices, or a folder that cannot be written.
        RuntimeError: JAX has started with other devices.
    """
    dataset = load(config.data, target=config.target, loss=config.loss)
    widths = (dataset.x_train.shape[1], *config.hidden, dataset.num_outputs)
    model = tpmlp.MLP(widths, activation=config.activation)
    strategy = tpmlp.Strategy(layout=config.layout_words)
    start_devices(config)
    mesh = tpmlp.make_mesh(data=config.data_parallel, x=config.x, y=config.y)
    job = Job(config=config, dataset=dataset, mesh=mesh, model=model, strategy=strategy)
    make_room(config.out)
    return job


def start_devices(config: Config) -> None:
    """Simulate the devices, or see that there are enough real ones."""
    if config.devices != 0:
        tpmlp.simulate_devices(config.mesh_size if config.devices is None else config.devices)
        return
    require(
        len(jax.devices()) >= config.mesh_size,
        f"devices=0 takes real devices, of which the mesh needs {config.mesh_size}",
        "Make the mesh smaller, or leave devices out to simulate them.",
        devices=f"0 with {len(jax.devices())} real ones",
        x=config.x,
        y=config.y,
        data_parallel=config.data_parallel,
    )


def make_room(out: Path) -> None:
    """Make the folder for the results and remove what an earlier run wrote there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise SettingError(
            f"out must be a folder that can be written: got out={out} ({error.strerror}). "
            "Name another."
        ) from error
    writable = os.access(out, os.W_OK)
    require(writable, "out must be a folder that can be written", "Name another.", out=out)


def describe(job: Job) -> str:
    """Return the mesh, the model, and what one device holds and receives."""
    data, mesh, model = job.dataset, job.mesh, job.model
    summary = model.summary(
        mesh,
        batch_size=job.batch_size,
        strategy=job.strategy,
        loss=data.loss,
        regularizer=job.regularizer,
    )
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        [
            f"data   {data.name}: {len(data.x_train)} samples to train on, {len(data.x_test)} "
            f"held out, {model.widths[0]} features; loss {data.loss} ({data.loss_reason})",
            f"mesh   {axes}: {mesh.size} x {mesh.devices.flat[0].device_kind}",
            f"model  widths {model.widths}, {model.activation}, {model.num_parameters:,} "
            "parameters",
            "",
            "What one device holds",
            summary.arrays_table(),
            summary.notes(),
            "",
            f"What one device receives in a step of {job.batch_size} samples",
            summary.collectives_table(),
            "",
        ]
    )


def measure(job: Job, seed: int, history_file: Path | None = None) -> Outcome:
    """Train once and return what is written down, plus "history" and "params".

    Raises:
        KeyboardInterrupt: Ctrl-C before the first step, so that there is nothing to measure.
    """
    began = time.perf_counter()
    result = train(job, seed, history_file)
    seconds = time.perf_counter() - began
    if result.stopped == "interrupted" and result.steps == 0:
        raise KeyboardInterrupt
    return {
        "seed": seed,
        **score(job, result),
        "steps": result.steps,
        "stopped": result.stopped,
        "seconds": seconds,
        "history": result.history,
        "params": result.params,
    }


def train(job: Job, seed: int, history_file: Path | None) -> tpmlp.FitResult:
    """Train once, from weights and an order of the samples that the seed gives."""
    config = job.config
    return tpmlp.fit(
        job.model,
        job.training,
        loss=job.dataset.loss,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.lr, config.steps)),
        steps=config.steps,
        batch_size=job.batch_size,
        regularizer=job.regularizer,
        validation=job.held_out,
        callbacks=[tpmlp.JSONLines(history_file)] if history_file else [],
        seed=seed,
        **job.where,
    )


def score(job: Job, result: tpmlp.FitResult) -> Outcome:
    """Return loss and accuracy on both parts of the data; None after a divergence."""
    found: Outcome = {}
    for part, samples in (("test", job.held_out), ("train", job.training)):
        found |= {f"{part}_accuracy": None, f"{part}_loss": None}
        if result.stopped == "diverged":
            continue
        loss = job.dataset.loss
        measured = tpmlp.evaluate(job.model, result.params, samples, loss=loss, **job.where)
        found[f"{part}_loss"] = measured.loss
        if measured.accuracy is not None:
            found[f"{part}_accuracy"] = round(measured.accuracy, ACCURACY_DIGITS)
    return found


def save_predictions(job: Job, params: Any) -> None:
    """Draw the predictions on the held-out data beside the truth."""
    out, data = job.config.out, job.dataset
    if data.loss == "mse":
        predicted = tpmlp.predict(job.model, params, data.x_test, **job.where)
        plot_prediction(data.y_test, predicted).savefig(out / "prediction.png", dpi=150)
    elif data.classes is not None:
        predicted = tpmlp.predict(job.model, params, data.x_test, kind="classes", **job.where)
        figure = plot_confusion(data.y_test.astype(int).ravel(), predicted, data.classes)
        figure.savefig(out / "confusion.png", dpi=150)


def save_model(job: Job, params: Any) -> None:
    """Write the parameters at logical widths, and what their inputs went through."""
    arrays = {"mean": job.dataset.mean, "scale": job.dataset.scale}
    for l, (W, b) in enumerate(tpmlp.to_numpy(job.model, params), 1):
        arrays[f"W_{l}"] = W
        if b is not None:
            arrays[f"b_{l}"] = b
    np.savez(job.config.out / "model.npz", allow_pickle=False, **arrays)
    if job.dataset.classes is not None:
        save_class_map(job.dataset, job.config.out / "classes.json")


def run_all(job: Job) -> str:
    """Train for each seed, print, and write everything down; return why the last run stopped."""
    config = job.config
    print(describe(job))
    runs: list[Outcome] = []
    for seed in range(config.seed, config.seed + config.seeds):
        try:
            runs.append(run_one(job, seed))
        except KeyboardInterrupt:
            if not runs:
                raise
            break
        if runs[-1]["stopped"] in ("interrupted", "diverged"):
            break
    save_json(config.out / "summary.json", summary(job, runs), sum(r["seconds"] for r in runs))
    print_end(job, runs)
    return runs[-1]["stopped"]


def run_one(job: Job, seed: int) -> Outcome:
    """Train for one seed, print how good it is, and write the first seed's figures and model."""
    first = seed == job.config.seed
    run = measure(job, seed, job.config.out / "history.jsonl" if first else None)
    if first:
        save_first(job, run)
    print(f"seed {seed}: {outcome(job, run)}, {run['steps']} steps in {run['seconds']:.1f} s")
    return {k: v for k, v in run.items() if k not in ("history", "params")}


def save_first(job: Job, run: Outcome) -> None:
    """Write the figures of a run and its model; one that diverged has no model."""
    plot_loss(run["history"]).savefig(job.config.out / "loss.png", dpi=150)
    if run["stopped"] != "diverged":
        save_predictions(job, run["params"])
        save_model(job, run["params"])


def summary(job: Job, runs: Sequence[Outcome]) -> dict[str, Any]:
    """Return what summary.json says: means over the runs, then each run."""
    # Ctrl-C between two seeds leaves fewer runs than were asked for, each of them finished.
    missing = len(runs) < job.config.seeds and runs[-1]["stopped"] == "finished"
    return {
        "test_accuracy": _mean(runs, "test_accuracy", ACCURACY_DIGITS),
        "test_loss": _mean(runs, "test_loss"),
        "train_loss": _mean(runs, "train_loss"),
        "steps": runs[0]["steps"],
        "stopped": "interrupted" if missing else runs[-1]["stopped"],
        "mesh": dict(job.mesh.shape),
        "roles": job.model.summary(job.mesh, batch_size=1, strategy=job.strategy).roles,
        "widths": job.model.widths,
        "loss": job.dataset.loss,
        "loss_reason": job.dataset.loss_reason,
        "runs": runs,
        "config": asdict(job.config),
    }


def outcome(job: Job, run: Outcome) -> str:
    """Return in words how good a run is."""
    if run["stopped"] == "diverged":
        return "diverged"
    if run["test_accuracy"] is None:
        return f"held-out loss {run['test_loss']:.4g} (training {run['train_loss']:.4g})"
    columns = job.dataset.loss == "logistic" and job.dataset.classes is None
    share = ", share of right outputs" if columns else ""
    return (
        f"held-out accuracy {run['test_accuracy']:.4f}{share} "
        f"(training {run['train_accuracy']:.4f})"
    )


def print_end(job: Job, runs: Sequence[Outcome]) -> None:
    """Print the mean of several runs, what was written, and what to do about a divergence."""
    accuracy = [run["test_accuracy"] for run in runs if run["test_accuracy"] is not None]
    if len(accuracy) > 1:
        print(
            f"held-out accuracy of {len(accuracy)} seeds: mean {np.mean(accuracy):.4f}, "
            f"from {min(accuracy):.4f} to {max(accuracy):.4f}"
        )
    out, last = job.config.out, runs[-1]
    written = ", ".join(sorted(name for name in FILES if (out / name).exists()))
    print(f"results are in {out}/: {written}")
    if last["stopped"] == "diverged":
        lr = job.config.lr
        way_out = min(lr / 10, Config().lr)
        print(f"diverged at step {last['steps']}: got lr={lr:g}. Try lr={way_out:g}.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 1 if training diverged, 2 if refused, 130 after Ctrl-C."""
    try:
        job = prepare(parse(Config, "experiments.train", args))
    except (SettingError, ValueError, RuntimeError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return _interrupted()
    try:
        return 1 if run_all(job) == "diverged" else 0
    except KeyboardInterrupt:
        return _interrupted()


def _interrupted() -> int:
    print("interrupted: the run has no result.", file=sys.stderr)
    return INTERRUPTED


def _mean(runs: Sequence[Outcome], key: str, digits: int | None = None) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    if not values:
        return None
    mean = float(np.mean(values))
    return mean if digits is None else round(mean, digits)


if __name__ == "__main__":
    sys.exit(main())
