"""One of the two processes: joins the other, and times what it is told to.

    python -m experiments.parallelism.process RANK FOLDER

FOLDER/order.json says what; FOLDER/answer-RANK.json is what came out.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import tpmlp
from experiments.parallelism.ways import LOSS, Way

Run = Callable[[], Any]

# Numbers of a gather: few, for latency, and many, for bandwidth.
FEW, MANY = 2**8, 2**20
# What is short is timed more often in a round.
PROBES = 3


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to time.

    Attributes:
        width: of every layer.
        layers: L + 1.
        batch_size: samples of a step.
        microbatches: of a pipeline.
        rounds: how often.
        ways: (stage, x, schedule) of each way.
        port: at which the processes meet.
    """

    width: int
    layers: int
    batch_size: int
    microbatches: int
    rounds: int
    ways: list[Any]
    port: int = 0

    def write(self, path: Path) -> None:
        """Write it, with a port on which the processes can meet."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        path.write_text(json.dumps({**asdict(self), "port": port}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Order":
        """Read it back."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one process measured.

    Attributes:
        steps: seconds of a step of each way, round by round.
        products: of one product as each way has them.
        sums: of one gradient of a layer that is added to another, likewise.
        gathers: of a gather of few bytes, and of one of many.
    """

    steps: list[list[float]]
    products: list[list[float]]
    sums: list[list[float]]
    gathers: list[list[float]]

    @classmethod
    def read(cls, path: Path) -> "Answer":
        """Read what a process wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def main(rank: int, folder: Path) -> None:
    """Join the other process, time everything, and write the answer."""
    order = Order.read(folder / "order.json")
    join(rank, order.port)
    ways = [Way(*given) for given in order.ways]
    runs: dict[str, list[Run]] = {
        "steps": [step(way, order) for way in ways],
        "products": [product(way, order) for way in ways],
        "sums": [gradient_sum(way, order) for way in ways],
        "gathers": [gather(size) for size in (FEW, MANY)],
    }
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in runs[name]] for name in runs}
    for _ in range(order.rounds):
        for name, listed in runs.items():
            for run, times in zip(listed, seconds[name], strict=True):
                times += [timed(run) for _ in range(1 if name == "steps" else PROBES)]
    answer = Answer(**seconds)
    (folder / f"answer-{rank}.json").write_text(json.dumps(asdict(answer)), encoding="utf-8")
    jax.distributed.shutdown()


def join(rank: int, port: int) -> None:
    """Take a core, one simulated device, and the other process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank]})
    tpmlp.simulate_devices(1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    # By default the first process would listen on every interface.
    bound = address if rank == 0 else None
    jax.distributed.initialize(address, 2, rank, coordinator_bind_address=bound)


def step(way: Way, order: Order) -> Run:
    """Return a step of a way."""
    model = tpmlp.MLP((order.width,) * (order.layers + 1))
    strategy = way.strategy(order.microbatches)
    given: Any = {"loss": LOSS, "mesh": way.mesh, "strategy": strategy}
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(order.batch_size, order.width)).astype(np.float32) for _ in "xy")
    batch = tpmlp.shard_batch(model, x, y, **given)
    params = model.init(jax.random.key(0), way.mesh, strategy=strategy)
    value_and_grad = tpmlp.value_and_grad(model, **given)
    return warm(lambda: value_and_grad(params, *batch))


def product(way: Way, order: Order) -> Run:
    """Return a product of the shape that a layer of this way has on one device."""
    num_out, num_in, rows = product_shape(way, order.width, order.batch_size, order.microbatches)
    W, h = jnp.ones((num_out, num_in), jnp.float32), jnp.ones((num_in, rows), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    return warm(lambda: matmul(W, h))


def gradient_sum(way: Way, order: Order) -> Run:
    """Return an addition of two gradients of a layer, as they are on one device."""
    dW = jnp.ones((order.width // way.x, order.width), jnp.float32)
    add = jax.jit(jnp.add)
    return warm(lambda: add(dW, dW))


def product_shape(way: Way, width: int, batch_size: int, microbatches: int) -> tuple[int, int, int]:
    """Return outputs, inputs and samples of a layer's product on one device."""
    return width // way.x, width, batch_size // (microbatches if way.schedule else 1)


def gather(size: int) -> Run:
    """Return a gather of so many numbers over both processes."""
    mesh = tpmlp.make_mesh(x=2)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    block = jax.make_array_from_callback(
        (size,), split, lambda index: np.zeros(size, np.float32)[index]
    )
    gathered = jax.jit(lambda a: a + 0, out_shardings=whole)
    return warm(lambda: gathered(block))


def warm(run: Run) -> Run:
    """Return a run that has been compiled and run once."""
    timed(run)
    return run


def timed(run: Run) -> float:
    """Return the seconds of one run."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
