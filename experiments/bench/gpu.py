"""How much of a GPU does a train step use, with the kernel and with plain JAX?

Question: the share that a train step reaches of the speed of a bare product of the same sizes,
    on one device; and its time over that of the same step in plain jitted JAX.
Method: value_and_grad and a step of gradient descent, weights float32 and donated, products
    bfloat16. The bare product is h <- W h, as often as the step has products, in one program: the
    same FLOPs in the order that is quickest. All three run in turns; ratios are taken within a
    round.
Command: make bench-gpu
Prediction: a share of 1 is the most there is; time over plain JAX 1.
Finding: none yet. experiments/results keeps the figures of machines that were at hand.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import tpmlp
from experiments.bench import automatic
from experiments.bench.machine import describe_machine
from experiments.bench.problem import FORMS, Form, Problem, Size, make_problem
from experiments.bench.settings import make_folder, require_at_least_one
from experiments.bench.summary import Cell, Ratio, Row, fastest, median_s
from experiments.bench.timing import Label, Program, interleave, measurement_of, timed
from experiments.command import INTERRUPTED, SettingError, parse, refuse, require
from experiments.record import save_json
from tpmlp.table import text_table

LEARNING_RATE = 1e-3
# Compiled, then run twice before anything counts: the first runs choose algorithms and allocate.
WARM_RUNS = 2
DTYPE = "bfloat16"
GROUPS = ("kernel", "unsharded", "products")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Time a train step on one GPU against a bare product and against plain JAX.

    Attributes:
        widths: d of each network.
        layers: number of W_l.
        batch: samples.
        rounds: how often each runs; ratios are medians over them.
        platform: gpu; cpu is for trying the program out.
        seed: of weights and data.
        out: folder for gpu.json and gpu.png.
    """

    widths: tuple[int, ...] = (4096, 8192, 16384)
    layers: int = 4
    batch: int = 8192
    rounds: int = 7
    platform: Literal["gpu", "cpu"] = "gpu"
    seed: int = 0
    out: Path = Path("results/bench-gpu")

    def __post_init__(self) -> None:
        require_at_least_one(self, "layers", "batch", "rounds")
        require(
            bool(self.widths) and min(self.widths) >= 1,
            "widths must be one positive integer or more",
            "Use for example 4096 8192.",
            widths=self.widths,
        )


class Training:
    """Gradient descent that owns its parameters, whose memory every step uses again.

    Attributes:
        params: the parameters as they are now.
        batch: what every step trains on.
    """

    def __init__(self, gradient: Callable[..., Any], params: Any, *batch: Any) -> None:
        def step(params: Any, *batch: Any) -> tuple[Any, Any]:
            loss, grads = gradient(params, *batch)
            return jax.tree.map(lambda w, dw: w - LEARNING_RATE * dw, params, grads), loss

        self._step = jax.jit(step, donate_argnums=0)
        self.params = params
        self.batch = batch

    def run(self) -> tuple[Any, Any]:
        """Take a step; return the parameters after it and the loss before it."""
        self.params, loss = self._step(self.params, *self.batch)
        return self.params, loss

    def program(self, label: Label) -> Program:
        """Return the step as a program to be timed."""
        measurement = measurement_of(label, self._step, self.params, *self.batch)
        return Program(run=self.run, measurement=measurement)


def kernel(problem: Problem, device: Any) -> Program:
    """Return the kernel's train step on a mesh of one device."""
    mesh = tpmlp.make_mesh(x=1, devices=[device])
    where = {"mesh": mesh, "strategy": tpmlp.Strategy(compute_dtype=DTYPE)}
    model = tpmlp.MLP((problem.size.d,) * (problem.size.layers + 1))
    params = tpmlp.from_numpy(model, list(problem.layers), **where)
    batch = tpmlp.shard_batch(model, problem.x, problem.y, loss="mse", **where)
    step = tpmlp.value_and_grad(model, loss="mse", **where)
    label = Label(group="kernel", variant="tpmlp", mesh="1x1", dtype=DTYPE)
    return Training(step, params, *batch).program(label)


def plain(problem: Problem, device: Any, form: Form) -> Program:
    """Return the same train step in plain jitted JAX."""
    gradient = jax.value_and_grad(partial(automatic.loss, form=form, dtype=DTYPE))
    args = jax.device_put(problem.arranged(form), device)
    label = Label(group="unsharded", variant="plain JAX", form=form, dtype=DTYPE)
    return Training(gradient, *args).program(label)


def bare_product(problem: Problem, device: Any) -> Program:
    """Return h <- W h as often as a step has products."""
    num_products = 3 * problem.size.layers - 1

    @jax.jit
    def chain(weights: list[jax.Array], h: jax.Array) -> jax.Array:
        for W in islice(cycle(weights), num_products):
            h = jnp.matmul(W, h, preferred_element_type=jnp.float32).astype(DTYPE)
        return h

    host = ([W.astype(DTYPE) for W, _ in problem.layers], problem.x.T.astype(DTYPE))
    args = jax.device_put(host, device)
    label = Label(group="products", variant="bare product", dtype=DTYPE)
    return Program(run=lambda: chain(*args), measurement=measurement_of(label, chain, *args))


def measure(config: Config, d: int, device: Any) -> Cell:
    """Return the rows of one width."""
    size = Size(d=d, layers=config.layers, batch=config.batch)
    problem = make_problem(size, config.seed)
    programs = [
        kernel(problem, device),
        *(plain(problem, device, form) for form in FORMS),
        bare_product(problem, device),
    ]
    for program in programs:
        for _ in range(WARM_RUNS):
            timed(program.run)
    interleave(programs, config.rounds)
    return {"size": asdict(size), "rows": [p.measurement.as_row() for p in programs]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one width came to.

    Attributes:
        size: the size.
        kernel: the row of the kernel's step.
        plain: the row of the faster form of plain JAX.
        product: the row of the bare product.
    """

    size: Size
    kernel: Row
    plain: Row
    product: Row

    @classmethod
    def of(cls, cell: Cell) -> "Usage":
        """Return what a cell of the record says."""
        groups = {group: [r for r in cell["rows"] if r["group"] == group] for group in GROUPS}
        best = {group: fastest(rows) for group, rows in groups.items()}
        return cls(
            size=Size(**cell["size"]),
            kernel=best["kernel"],
            plain=best["unsharded"],
            product=best["products"],
        )

    def share(self, row: Row) -> Ratio:
        """Return the speed of a step as a share of the bare product's; both do the same FLOPs."""
        return Ratio.of(self.product["seconds"], row["seconds"])

    @property
    def to_plain(self) -> Ratio:
        """Time over that of plain JAX."""
        return Ratio.of(self.kernel["seconds"], self.plain["seconds"])

    def teraflops(self, row: Row) -> float:
        """Return TFLOP/s of the products of a step."""
        return self.size.product_flops / median_s(row) / 1e12


def table(usages: Sequence[Usage]) -> str:
    """Return a line for each width."""
    headers = ("size", "ms", "TFLOP/s", "bare product", "share", "plain JAX's", "time / plain")
    return text_table(
        headers,
        [
            (
                u.size,
                f"{1e3 * median_s(u.kernel):.2f}",
                f"{u.teraflops(u.kernel):.4g}",
                f"{u.teraflops(u.product):.4g}",
                u.share(u.kernel),
                u.share(u.plain),
                u.to_plain,
            )
            for u in usages
        ],
    )


def plot(usages: Sequence[Usage], device: str) -> Figure:
    """Draw the share of a bare product's speed against the width."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    widths = [u.size.d for u in usages]
    for label, marker, row in (("tpmlp", "o", "kernel"), ("plain JAX", "s", "plain")):
        shares = [u.share(getattr(u, row)) for u in usages]
        low = [s.median - s.quartiles[0] for s in shares]
        high = [s.quartiles[1] - s.median for s in shares]
        axes.errorbar(
            widths, [s.median for s in shares], yerr=(low, high), fmt=f"{marker}-", label=label
        )
    axes.axhline(1, color="black", linewidth=1, label="a bare product of the same sizes")
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, list(map(str, widths)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("width d")
    axes.set_ylabel("share of a bare product's TFLOP/s")
    best = max(usages, key=lambda u: u.share(u.kernel).median)
    axes.set_title(
        f"A train step reaches {best.share(best.kernel).median:.0%} of a bare product "
        f"at d = {best.size.d}\n{device}, bfloat16, B = {best.size.batch}",
        fontsize="medium",
    )
    axes.legend()
    return figure


def find_device(config: Config) -> Any:
    """Return the first device of the platform.

    Raises:
        SettingError: there is none.
    """
    try:
        return jax.devices(config.platform)[0]
    except RuntimeError as error:
        raise SettingError(
            f"platform must be one that JAX finds here: got platform={config.platform}, found "
            f"{jax.default_backend()}. Run it on a machine with a GPU, or try it out with "
            "--platform cpu --widths 64 --batch 64."
        ) from error


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 2 if refused, 130 after Ctrl-C."""
    try:
        config = parse(Config, "experiments.bench.gpu", args)
        device = find_device(config)
        make_folder(config.out)
    except SettingError as error:
        return refuse(error)
    try:
        cells = run(config, device)
    except KeyboardInterrupt:
        return INTERRUPTED
    usages = list(map(Usage.of, cells))
    print(table(usages))
    plot(usages, device.device_kind).savefig(config.out / "gpu.png", dpi=150)
    print(f"record and figure are in {config.out}/")
    return 0


def run(config: Config, device: Any) -> list[Cell]:
    """Measure every width, writing the record after each."""
    began = time.perf_counter()
    cells: list[Cell] = []
    for d in config.widths:
        print(f"d = {d} on {device.device_kind}", flush=True)
        cells.append(measure(config, d, device))
        record = {
            "config": asdict(config),
            "gpu": device.device_kind,
            "machine": describe_machine(),
            "cells": cells,
        }
        save_json(config.out / "gpu.json", record, time.perf_counter() - began)
    return cells


if __name__ == "__main__":
    sys.exit(main())
