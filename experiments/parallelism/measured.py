"""Two processes, each pinned to a core of its own with one thread, time a step of every way.

On simulated devices an idle stage costs nothing, as they share cores: here it does. All ways are
compiled and warmed, then run in turns, so that whatever else the machine does meets them alike.

In the same rounds the processes time what the model needs: a product of the shape that each way
has, a sum of two gradients, and gathers of few and of many bytes. With their medians the model
says, in lockstep, what a step should take. To it comes what the executor does besides: in every
tick it adds a gradient, or zeros, to the sum of every layer of a stage, as a branch would copy it.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.bench.machine import describe_machine
from experiments.parallelism.modelled import Link, Problem, step_s
from experiments.parallelism.process import FEW, MANY, Answer, Order, product_shape
from experiments.parallelism.ways import Way
from experiments.parallelism.work import FLOAT_BYTES

LIMIT_S = 600
NUM_PROCESSES = 2


def obstacle() -> str | None:
    """Return why two processes cannot have a core each; None if they can."""
    if not hasattr(os, "sched_getaffinity"):
        return "this system cannot pin a process to a core"
    if (cores := len(os.sched_getaffinity(0))) < NUM_PROCESSES:
        return f"two processes need a core each: {cores} is there"
    return None


def measure(
    problem: Problem, spread: Sequence[Way], *, microbatches: int, rounds: int
) -> dict[str, Any]:
    """Return seconds of a step of each way to use two devices, and what the model says of them."""
    before = describe_machine()["load_1min"]
    order = Order(
        width=problem.width,
        layers=problem.layers,
        batch_size=problem.batch_size,
        microbatches=microbatches,
        rounds=rounds,
        ways=[(way.stage, way.x, way.schedule) for way in spread],
    )
    answers = _run(order)
    few, many = (statistics.median(_slower(answers, "gathers", i)) for i in (0, 1))
    received = FLOAT_BYTES * (MANY - FEW) / NUM_PROCESSES
    link = Link(flops_per_s=1.0, bytes_per_s=received / max(many - few, 1e-9), latency_s=few)
    rows = []
    for i, way in enumerate(spread):
        size = product_shape(way, problem.width, problem.batch_size, microbatches)
        rate = 2 * math.prod(size) / statistics.median(_slower(answers, "products", i))
        taken = problem.work(way, microbatches)
        predicted = step_s(taken, replace(link, flops_per_s=rate))
        added = num_sums(problem, way, microbatches)
        sums_s = added * statistics.median(_slower(answers, "sums", i))
        seconds = _slower(answers, "steps", i)
        rows.append(
            {
                "way": way.name,
                "seconds": seconds,
                "median_s": statistics.median(seconds),
                "flops_per_s": rate,
                "sums_s": sums_s,
                "predicted_s": predicted["lockstep_s"] + sums_s,
                "predicted_asynchronous_s": predicted["asynchronous_s"],
            }
        )
    return {
        "microbatches": microbatches,
        "rows": rows,
        "bytes_per_s": link.bytes_per_s,
        "latency_s": link.latency_s,
        "load_1min_before": before,
    }


def num_sums(problem: Problem, way: Way, microbatches: int) -> int:
    """Return how many gradients of a layer a step adds up: of every slot, in every tick."""
    if way.schedule is None:
        return 0
    placement: Any = problem.model.place(way.mesh, way.strategy(microbatches))
    return placement.schedule.num_ticks * placement.stages.num_slots


def _slower(answers: Sequence[Answer], name: str, index: int) -> list[float]:
    """Return the seconds of each round, of whichever process took longer."""
    return [max(pair) for pair in zip(*(getattr(a, name)[index] for a in answers), strict=True)]


def _run(order: Order) -> list[Answer]:
    """Start both processes, wait for them, and leave none behind."""
    command = [sys.executable, "-m", "experiments.parallelism.process"]
    # On simulated devices XLA's products would take every core that is there.
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    environment |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        order.write(Path(folder) / "order.json")
        logs = [Path(folder) / f"errors-{rank}.txt" for rank in range(NUM_PROCESSES)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), folder],
                stdout=subprocess.DEVNULL,
                stderr=stack.enter_context(log.open("w", encoding="utf-8")),
                env=environment,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            _wait(lambda: [rank.poll() for rank in ranks])
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        for rank, log in zip(ranks, logs, strict=True):
            if rank.returncode > 0:
                last = " ".join(log.read_text(encoding="utf-8").splitlines()[-1:])
                raise RuntimeError(f"one of two processes ended with {rank.returncode}: {last}")
        return [Answer.read(Path(folder) / f"answer-{r}.json") for r in range(NUM_PROCESSES)]


def _wait(poll: Callable[[], list[int | None]]) -> None:
    """Wait until all have ended, or one in error: the other would wait for it."""
    ends = time.monotonic() + LIMIT_S
    while None in (codes := poll()):
        if any(codes):
            # Time for the other to notice, so that the first error is the one that is told.
            time.sleep(1)
            return
        if time.monotonic() > ends:
            raise RuntimeError(f"two processes must end within {LIMIT_S} s: they did not.")
        time.sleep(0.1)
