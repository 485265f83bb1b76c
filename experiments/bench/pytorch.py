"""Is the kernel faster than PyTorch's own tensor parallelism on the same cores?

Question: the time of one value_and_grad against one forward and backward pass of DTensor with
    column and row parallel layers, gloo between the ranks.
Method: PyTorch runs one process a rank with max(1, cores / ranks) threads each, this package as
    many simulated devices in this process. They take turns: a round is one step of each, while
    the others wait. Both compute the same network from the same seed, and their losses are
    compared. Of PyTorch's two variants (experiments.bench.pytorch_ranks) the faster counts.
Command: make bench-torch
Prediction: 0.45 at most, at 4 ranks and d = 1024.
Finding: see README.md, What is measured so far.
"""

import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tpmlp
from experiments.bench import kernel
from experiments.bench.machine import describe_machine
from experiments.bench.problem import Size, make_problem
from experiments.bench.settings import make_folder, parse_size, require_at_least_one
from experiments.bench.summary import Ratio, Row, fastest, median_s
from experiments.bench.timing import Program, timed
from experiments.command import INTERRUPTED, SettingError, parse, refuse, require
from experiments.record import save_json
from tpmlp.table import text_table

# Sums of the same million float32 terms in another order differ by far less, a wrong network by
# far more.
SAME_LOSS = 1e-4
TARGET = 0.45


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Time the kernel against PyTorch's tensor parallelism, on the cores of this machine.

    Attributes:
        sizes: d x layers x batch of each network; layers come in pairs.
        ranks: numbers of ranks, and of simulated devices.
        rounds: how often each runs; ratios are medians over them.
        python: the interpreter that has PyTorch.
        seed: of weights and data.
        out: folder for pytorch.json.
    """

    sizes: tuple[str, ...] = ("1024x8x1024",)
    ranks: tuple[int, ...] = (2, 4)
    rounds: int = 7
    python: Path = Path(".venv-torch/bin/python")
    seed: int = 0
    out: Path = Path("results/bench")

    def __post_init__(self) -> None:
        require_at_least_one(self, "rounds")
        for size in map(parse_size, self.sizes):
            require(
                size.layers % 2 == 0,
                "layers must be even: PyTorch splits them in pairs",
                "Use another size.",
                size=size,
            )
            for ranks in self.ranks:
                require(
                    ranks >= 1 and size.d % ranks == 0 == size.batch % ranks,
                    "ranks must divide d and the batch",
                    "Use other sizes or ranks.",
                    size=size,
                    ranks=ranks,
                )


class Ranks:
    """PyTorch's processes, as one program that can be told to run a step.

    Attributes:
        version: of PyTorch.
        variants: the names that `step` takes.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._first = processes[0]
        hello = self._answer()
        self.version: str = hello["version"]
        self.variants: list[str] = hello["variants"]

    def step(self, variant: str) -> tuple[float, float]:
        """Run one step on all ranks; return its seconds, by rank 0's clock, and its loss."""
        assert self._first.stdin is not None
        self._first.stdin.write(variant + "\n")
        self._first.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["loss"]

    def _answer(self) -> dict[str, Any]:
        assert self._first.stdout is not None
        line = self._first.stdout.readline()
        if not line:
            raise RuntimeError(
                f"PyTorch's rank 0 ended with status {self._first.wait()}; its own words are above."
            )
        return json.loads(line)


@contextmanager
def start_ranks(command: Sequence[str], ranks: int) -> Iterator[Ranks]:
    """Start one process a rank; end them all on leaving.

    Args:
        command: what to run; the rank is added.
        ranks: how many.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(ranks):
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(
                subprocess.Popen([*command, f"--rank={rank}"], stdin=pipe, stdout=pipe, text=True)
            )
        yield Ranks(processes)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()


def measure(config: Config, size: Size, ranks: int, cores: int) -> dict[str, Any]:
    """Return the rows of one size and number of ranks, both sides in turns."""
    problem = make_problem(size, config.seed)
    program = kernel.by_default(problem, ranks, "float32")
    threads = max(1, cores // ranks)
    settings = {"size": size, "seed": config.seed, "ranks": ranks, "port": free_port()}
    flags = [f"--{name}={value}" for name, value in {**settings, "threads": threads}.items()]
    command = [str(config.python), "-m", "experiments.bench.pytorch_ranks", *flags]
    with start_ranks(command, ranks) as torch:
        require_same_loss(program, torch)
        seconds = take_turns(program, torch, config.rounds)
        version = torch.version
    return {
        "size": asdict(size),
        "ranks": ranks,
        "threads_per_rank": threads,
        "pytorch": version,
        "kernel": {**program.measurement.as_row(), "seconds": seconds.pop("kernel")},
        "rows": [{"variant": variant, "seconds": taken} for variant, taken in seconds.items()],
    }


def require_same_loss(program: Program, torch: Ranks) -> None:
    """Warm both sides up, and see that they compute the same.

    Raises:
        RuntimeError: they do not.
    """
    mine = float(np.asarray(program.run()[0]))
    for variant in torch.variants:
        torch.step(variant)
        _, theirs = torch.step(variant)
        if not math.isclose(mine, theirs, rel_tol=SAME_LOSS):
            raise RuntimeError(
                f"PyTorch must compute the same loss: got {theirs} ({variant}), {mine} here."
            )


def take_turns(program: Program, torch: Ranks, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round of the kernel and of each variant."""
    seconds: dict[str, list[float]] = {"kernel": [], **{v: [] for v in torch.variants}}
    for _ in range(rounds):
        seconds["kernel"].append(timed(program.run))
        for variant in torch.variants:
            seconds[variant].append(torch.step(variant)[0])
    return seconds


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(cells: Sequence[Row]) -> str:
    """Return a line for each size and number of ranks."""
    headers = ("size", "ranks", "ms", "PyTorch, ms", "faster variant", "time / PyTorch")
    return text_table(headers, map(_table_row, cells))


def _table_row(cell: Row) -> tuple[object, ...]:
    best = fastest(cell["rows"])
    return (
        Size(**cell["size"]),
        cell["ranks"],
        f"{1e3 * median_s(cell['kernel']):.1f}",
        f"{1e3 * median_s(best):.1f}",
        best["variant"],
        Ratio.of(cell["kernel"]["seconds"], best["seconds"]),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 1 if PyTorch failed, 2 if refused, 130 after Ctrl-C."""
    try:
        config = parse(Config, "experiments.bench.pytorch", args)
        prepare(config)
    except (SettingError, RuntimeError) as error:
        return refuse(error)
    try:
        cells = run(config)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    print(table(cells))
    print(f"\ntarget: {TARGET} at 4 ranks and d = 1024; record in {config.out}/pytorch.json")
    return 0


def prepare(config: Config) -> None:
    """Start the devices and make the folder.

    Raises:
        SettingError: there is no PyTorch, or the folder cannot be made.
        RuntimeError: JAX has started with other devices.
    """
    require(
        config.python.exists(),
        "python must be an interpreter with PyTorch",
        "make bench-torch installs one.",
        python=config.python,
    )
    tpmlp.simulate_devices(max(8, *config.ranks))
    make_folder(config.out)


def run(config: Config) -> list[Row]:
    """Measure every size and number of ranks, writing the record after each."""
    began = time.perf_counter()
    machine = describe_machine()
    cells: list[Row] = []
    for size in map(parse_size, config.sizes):
        for ranks in config.ranks:
            print(f"{size}: {ranks} ranks, {config.rounds} rounds", flush=True)
            cells.append(measure(config, size, ranks, machine["cores"]))
            record = {"config": asdict(config), "machine": machine, "cells": cells}
            save_json(config.out / "pytorch.json", record, time.perf_counter() - began)
    return cells


if __name__ == "__main__":
    sys.exit(main())
