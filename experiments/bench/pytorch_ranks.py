"""One rank of PyTorch's tensor parallelism: the other side of make bench-torch.

The same network from the same seed, its layers split by outputs and by inputs in turn
(ColwiseParallel, RowwiseParallel of torch.distributed), gloo between the ranks. Two variants:
activations whole between the pairs of layers, and split by samples there (sequence parallel).

Rank 0 talks to experiments.bench.pytorch in lines: it writes {"version": ..., "variants": [...]},
then reads the name of a variant, runs one step of it on all ranks and writes {"seconds": ...,
"loss": ...}; until there is nothing more to read. Runs in an environment of its own, without JAX.
"""

# PyTorch is in .venv-torch alone, where the linters do not look.
# pyright: reportMissingImports=false

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from experiments.bench.problem import Problem, Size, make_problem

VARIANTS = ("tensor parallel", "sequence parallel")
STOP = -1


class Network(nn.Module):
    """The network of a problem, unsharded."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        d = problem.size.d
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in problem.layers)
        with torch.no_grad():
            for layer, (W, b) in zip(self.layers, problem.layers, strict=True):
                layer.weight.copy_(torch.from_numpy(W))
                layer.bias.copy_(torch.from_numpy(b))

    def forward(self, h: Any) -> Any:
        """Compute the outputs of samples [B, d]."""
        *hidden, last = self.layers
        for layer in hidden:
            h = torch.relu(layer(h))
        return last(h)


def make_step(problem: Problem, variant: str, mesh: Any) -> Callable[[], float]:
    """Return a function that runs one forward and backward pass and returns the loss."""
    by_samples = variant == "sequence parallel"
    network = Network(problem)
    column = ColwiseParallel(input_layouts=Shard(0)) if by_samples else ColwiseParallel()
    row = RowwiseParallel(output_layouts=Shard(0)) if by_samples else RowwiseParallel()
    parallelize_module(
        network,
        mesh,
        {f"layers.{index}": (column, row)[index % 2] for index in range(problem.size.layers)},
    )
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    scale = 1 / y.numel()
    if by_samples:
        x, y = (a.chunk(mesh.size())[mesh.get_rank()].contiguous() for a in (x, y))

    def step() -> float:
        network.zero_grad(set_to_none=True)
        loss = (network(x) - y).square().sum() * scale
        loss.backward()
        return float(loss.detach())

    return step


def serve(steps: dict[str, Callable[[], float]], commands: Iterator[str]) -> None:
    """Run on every rank what rank 0 is told to."""
    names = list(steps)
    while True:
        chosen = torch.tensor(STOP)
        if dist.get_rank() == 0 and (line := next(commands, "").strip()):
            chosen = torch.tensor(names.index(line))
        dist.broadcast(chosen, src=0)
        if chosen == STOP:
            return
        seconds, loss = timed(steps[names[int(chosen)]])
        total = torch.tensor(loss)
        if names[int(chosen)] == "sequence parallel":
            dist.all_reduce(total)
        say(json.dumps({"seconds": seconds, "loss": float(total)}))


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds until every rank is done, and this rank's loss."""
    dist.barrier()
    began = time.perf_counter()
    loss = step()
    dist.barrier()
    return time.perf_counter() - began, loss


def say(line: str) -> None:
    """Write a line, on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    """Join the other ranks and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=Size.parse, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{args.port}",
        rank=args.rank,
        world_size=args.ranks,
    )
    mesh = init_device_mesh("cpu", (args.ranks,))
    problem = make_problem(args.size, args.seed)
    steps = {variant: make_step(problem, variant, mesh) for variant in VARIANTS}
    say(json.dumps({"version": torch.__version__, "variants": VARIANTS}))
    serve(steps, iter(sys.stdin.readline, ""))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
