"""The main job: train a sharded MLP on real data, and say how well it does on data held out.

Question: does the sharded kernel train a real model to the accuracy an MLP should have?
Method: scikit-learn's digits (1,797 images of 8 x 8, a quarter held out, stratified), 8 simulated
    devices as x=4, y=2, Adam; or the user's own file. Accuracy on the held-out part.
Command: make train (one run), make train SEEDS=5 (the mean of five)
Prediction: about 0.98 on the digits, as scikit-learn's own MLPClassifier reaches.
Finding: see README.md, What is measured so far.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import tpmlp
from experiments.data import Dataset, Loss, load, save_class_map
from experiments.record import save_json


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an MLP split over devices, on scikit-learn's digits or on your own data.

    Attributes:
        data: a .npz with x [n, d] and y, or a .csv with a header; the digits by default.
        target: the column of a .csv to predict.
        loss: cross_entropy, mse or logistic; by default the one that y asks for.
        widths: hidden widths, separated by commas or spaces; the ends follow from the data.
        activation: relu, gelu, silu, tanh, sigmoid, softplus or identity.
        x: devices on the first tensor axis.
        y: devices on the second tensor axis.
        data_parallel: devices over which each batch is split.
        devices: CPU devices to simulate; by default as many as the mesh has. 0 takes real ones.
        layout: column, row, alternate, auto, or one word a layer, separated by commas.
        l2: coefficient of sum_l |W_l|^2.
        steps: training steps.
        batch: samples of one step.
        lr: Adam's learning rate, falling to 0 along a cosine.
        seed: of the initial weights and the order of the samples.
        seeds: number of runs, with seeds seed, seed + 1, ...; the figures are of the first.
        out: folder for the results.
    """

    data: Path | None = None
    target: str | None = None
    loss: Loss | None = None
    widths: str = "128,128"
    activation: str = "relu"
    x: int = 4
    y: int = 2
    data_parallel: int = 1
    devices: int | None = None
    layout: str = "auto"
    l2: float = 1e-4
    steps: int = 600
    batch: int = 128
    lr: float = 3e-3
    seed: int = 0
    seeds: int = 1
    out: Path = Path("results/train")


@dataclass(frozen=True, kw_only=True)
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
    mesh: Any
    model: tpmlp.MLP
    strategy: tpmlp.Strategy

    @property
    def batch_size(self) -> int:
        """Samples of one step: no more than there are."""
        return min(self.config.batch, len(self.dataset.x_train))


def prepare(config: Config) -> Job:
    """Load the data and make the mesh and the model.

    Raises:
        ValueError: what is wrong with the configuration or the data, in one line.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1: got seeds={config.seeds}.")
    dataset = load(config.data, target=config.target, loss=config.loss)
    hidden = _integers(config.widths)
    widths = (dataset.x_train.shape[1], *hidden, dataset.num_outputs)
    model = tpmlp.MLP(widths, activation=config.activation)
    words = tuple(config.layout.replace(",", " ").split())
    strategy = tpmlp.Strategy(layout=words if len(words) > 1 else config.layout)
    needed = config.data_parallel * config.x * config.y
    if config.devices != 0:
        tpmlp.simulate_devices(needed if config.devices is None else config.devices)
    mesh = tpmlp.make_mesh(data=config.data_parallel, x=config.x, y=config.y)
    model.summary(mesh, batch_size=1, strategy=strategy)  # refuses a layout the mesh cannot have
    return Job(config=config, dataset=dataset, mesh=mesh, model=model, strategy=strategy)


def describe(job: Job) -> str:
    """Return the mesh, the model, and what one device holds and receives."""
    data, mesh, model = job.dataset, job.mesh, job.model
    loss = f"loss {data.loss} ({data.loss_reason})"
    summary = model.summary(mesh, batch_size=job.batch_size, strategy=job.strategy, loss=data.loss)
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        [
            f"data   {data.name}: {len(data.x_train)} samples to train on, {len(data.x_test)} "
            f"held out, {model.widths[0]} features; {loss}",
            f"mesh   {axes}: {mesh.size} x {mesh.devices.flat[0].device_kind}",
            f"model  widths {model.widths}, {model.activation}, {model.num_parameters:,} "
            "parameters",
            "",
            "What one device holds",
            summary.arrays_table(),
            "",
            f"What one device receives in a step of {job.batch_size} samples",
            summary.collectives_table(),
            "",
        ]
    )


def measure(job: Job, seed: int, history_file: Path | None = None) -> dict[str, Any]:
    """Train once and return what is written down, plus the parameters under "params"."""
    config, data = job.config, job.dataset
    where: dict[str, Any] = {"mesh": job.mesh, "strategy": job.strategy}
    held_out = (data.x_test, data.y_test)
    began = time.perf_counter()
    result = tpmlp.fit(
        job.model,
        (data.x_train, data.y_train),
        loss=data.loss,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.lr, config.steps)),
        steps=config.steps,
        batch_size=job.batch_size,
        regularizer=tpmlp.l2(config.l2) if config.l2 else None,
        validation=held_out,
        callbacks=[tpmlp.JSONLines(history_file)] if history_file else [],
        seed=seed,
        **where,
    )
    seconds = time.perf_counter() - began
    train = tpmlp.evaluate(
        job.model, result.params, (data.x_train, data.y_train), loss=data.loss, **where
    )
    test = tpmlp.evaluate(job.model, result.params, held_out, loss=data.loss, **where)
    return {
        "seed": seed,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_accuracy": train.accuracy,
        "train_loss": train.loss,
        "steps": result.steps,
        "stopped": result.stopped,
        "seconds": seconds,
        "history": result.history,
        "params": result.params,
    }


def plot_loss(history: Sequence[dict[str, Any]]) -> Figure:
    """Draw the loss of the batches and of the held-out data against the step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training batch"), ("validation_loss", "held-out data")):
        points = [(r["step"], r[key]) for r in history if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label}, last {points[-1][1]:.3g}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, without the regulariser")
    axes.set_title("Loss during training")
    axes.legend()
    return figure


def plot_confusion(y: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw how many held-out samples of each class were taken for which."""
    count = len(classes)
    table = np.zeros((count, count), int)
    np.add.at(table, (y, predicted), 1)
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.where(table, table, np.nan), cmap="Blues", vmin=0)
    figure.colorbar(image, label="samples")
    if count <= 20:
        axes.set_xticks(range(count), classes, rotation=45 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(count), classes)
        for (row, column), samples in np.ndenumerate(table):
            if samples:
                color = "white" if samples > table.max() / 2 else "black"
                axes.text(column, row, str(samples), ha="center", va="center", color=color)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    wrong = int((y != predicted).sum())
    axes.set_title(f"{wrong} of {len(y)} held-out samples are taken for another class")
    return figure


def plot_prediction(y: np.ndarray, predicted: np.ndarray) -> Figure:
    """Draw predicted against true values of the held-out samples."""
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(y.ravel(), predicted.ravel(), ".", label="held-out sample")
    ends = [min(y.min(), predicted.min()), max(y.max(), predicted.max())]
    axes.plot(ends, ends, color="black", linewidth=1, label="predicted = true")
    axes.set_xlabel("true value")
    axes.set_ylabel("predicted value")
    error = float(np.sqrt(np.mean((y - predicted) ** 2)))
    axes.set_title(f"Held-out samples: root mean squared error {error:.3g}")
    axes.legend()
    return figure


def save_figures(job: Job, run: dict[str, Any]) -> None:
    """Draw the loss, and the predictions on the held-out data."""
    out, data = job.config.out, job.dataset
    plot_loss(run["history"]).savefig(out / "loss.png", dpi=150)
    where: dict[str, Any] = {"mesh": job.mesh, "strategy": job.strategy}
    if data.loss == "mse":
        predicted = tpmlp.predict(job.model, run["params"], data.x_test, **where)
        plot_prediction(data.y_test, predicted).savefig(out / "prediction.png", dpi=150)
    elif data.classes is not None:
        predicted = _classes(job, tpmlp.predict(job.model, run["params"], data.x_test, **where))
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


def run_all(job: Job) -> None:
    """Train for each seed, print, and write everything down."""
    config = job.config
    config.out.mkdir(parents=True, exist_ok=True)
    print(describe(job))
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        first = seed == config.seed
        history_file = config.out / "history.jsonl"
        run = measure(job, seed, history_file if first else None)
        if first:
            save_figures(job, run)
            save_model(job, run["params"])
        runs.append({k: v for k, v in run.items() if k not in ("history", "params")})
        print(f"seed {seed}: {_outcome(run)}, {run['steps']} steps in {run['seconds']:.1f} s")
        if run["stopped"] == "interrupted":
            break
    save_json(config.out / "summary.json", _summary(job, runs), sum(r["seconds"] for r in runs))
    if len(runs) > 1 and runs[0]["test_accuracy"] is not None:
        accuracy = [run["test_accuracy"] for run in runs]
        print(
            f"held-out accuracy of {len(runs)} seeds: mean {np.mean(accuracy):.4f}, "
            f"from {min(accuracy):.4f} to {max(accuracy):.4f}"
        )
    print(
        f"results are in {config.out}/: {', '.join(sorted(p.name for p in config.out.iterdir()))}"
    )


def main() -> int:
    """Parse the command line and run; return the exit status."""
    config = tyro.cli(Config, description=__doc__)
    try:
        job = prepare(config)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run_all(job)
    return 0


def _summary(job: Job, runs: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        return None if runs[0][key] is None else float(np.mean([run[key] for run in runs]))

    return {
        "test_accuracy": mean("test_accuracy"),
        "test_loss": mean("test_loss"),
        "train_loss": mean("train_loss"),
        "steps": runs[0]["steps"],
        "mesh": dict(job.mesh.shape),
        "roles": job.model.summary(
            job.mesh, batch_size=job.batch_size, strategy=job.strategy
        ).roles,
        "widths": job.model.widths,
        "loss": job.dataset.loss,
        "loss_reason": job.dataset.loss_reason,
        "runs": runs,
        "config": asdict(job.config),
    }


def _outcome(run: dict[str, Any]) -> str:
    if run["test_accuracy"] is None:
        return f"held-out loss {run['test_loss']:.4g} (training {run['train_loss']:.4g})"
    return f"held-out accuracy {run['test_accuracy']:.4f} (training {run['train_accuracy']:.4f})"


def _classes(job: Job, outputs: np.ndarray) -> np.ndarray:
    """Return the class of each row of outputs: the largest, or for one output its sign."""
    one = job.model.widths[-1] == 1
    return (outputs[:, 0] > 0).astype(int) if one else outputs.argmax(axis=1)


def _integers(text: str) -> tuple[int, ...]:
    parts = text.replace(",", " ").split()
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"widths must be positive integers separated by commas or spaces: got widths={text!r}. "
            "Use for example --widths 128,128."
        )
    return tuple(map(int, parts))


if __name__ == "__main__":
    sys.exit(main())
