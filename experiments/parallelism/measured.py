"""Two processes, each pinned to a core of its own with one thread, time one step of a way.

    python -m experiments.parallelism.measured RANK PORT SETTINGS

On simulated devices an idle stage costs nothing, as they share cores: here it does.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

import tpmlp
from experiments.parallelism.ways import LOSS, Way, samples

ROUNDS = 5
LIMIT_S = 300


def measure(way: Way, widths: Sequence[int], *, batch_size: int, microbatches: int) -> float:
    """Return the seconds of a step, the median of ROUNDS, of two processes on two cores."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = json.dumps(
        {
            "way": [way.stage, way.x, way.schedule],
            "widths": list(widths),
            "batch_size": batch_size,
            "microbatches": microbatches,
        }
    )
    one_thread = "--xla_cpu_multi_thread_eigen=false"
    environment = {**os.environ, "XLA_FLAGS": one_thread, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.parallelism.measured"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            raise RuntimeError(f"a process of {way.name} ended with {rank.returncode}: {errors}")
    return max(float(out.split()[-1]) for out, _ in outputs)


def main(rank: int, port: int, settings: dict[str, Any]) -> None:
    """Join the other process, and print the median time of a step."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    tpmlp.simulate_devices(1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    bound = address if rank == 0 else None
    jax.distributed.initialize(address, 2, rank, coordinator_bind_address=bound)
    way, model = Way(*settings["way"]), tpmlp.MLP(tuple(settings["widths"]))
    strategy = way.strategy(settings["microbatches"])
    given: Any = {"loss": LOSS, "mesh": way.mesh, "strategy": strategy}
    batch = tpmlp.shard_batch(model, *samples(model, settings["batch_size"]), **given)
    params = model.init(jax.random.key(0), way.mesh, strategy=strategy)
    step = tpmlp.value_and_grad(model, **given)
    jax.block_until_ready(step(params, *batch))
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(step(params, *batch))
        times.append(time.perf_counter() - started)
    print(statistics.median(times))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
