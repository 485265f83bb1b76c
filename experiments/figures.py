"""The figures of the main job: loss against step, and predictions against the truth.

None of them needs a model: they are drawn from numbers, so that they can be drawn again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def plot_loss(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the loss of the batches and of the held-out data against the step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training batch"), ("validation_loss", "held-out data")):
        points = [(r["step"], r[key]) for r in history if np.isfinite(r.get(key, np.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label}, last {points[-1][1]:.3g}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, without the regulariser")
    axes.set_title("Loss during training")
    if axes.lines:
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
    # In float64 the square of no float32 number overflows.
    error = float(np.sqrt(np.mean((y.astype(np.float64) - predicted) ** 2)))
    axes.set_title(f"Held-out samples: root mean squared error {error:.3g}")
    axes.legend()
    return figure
