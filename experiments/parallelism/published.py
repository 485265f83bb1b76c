"""Ratios of throughput between schedules: simulated, beside those published for zero bubbles.

Throughputs, samples a GPU and second on A100s, are of Qi et al., Zero Bubble Pipeline Parallelism,
ICLR 2024 (arXiv 2401.10241). The mean times of F, B, W and a message are its authors', in
microseconds in the list `settings` of megatron/core/pipeline_parallel/v_schedule.py of
github.com/sail-sg/zero-bubble-pipeline-parallelism at 5234a81; sizes, stages and microbatches
there are those of the throughputs.

ZB-1p and ZB-2p are tables that a search found for these times within the memory of p and of 2p
microbatches; their place takes the handmade ZB-H1 and ZB-H2. Interleaved has a chunk for each
layer, as the paper says of its experiments: three a stage, embeddings counted.

A step's time is taken in two ways. *Together*: all stages end it together, as where a norm of the
gradient or a check for overflow is shared before the update; the makespan. *On*: each stage goes
on to its next step when it has ended this one, as ZB-1p and ZB-2p do there by validating updates
afterwards; the longest span of a stage. By that repository's README, to do without costs about 8 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import tpmlp
from experiments.parallelism.ways import Row
from tpmlp.pipeline.simulate import Simulated


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A published row.

    Attributes:
        model: its size.
        stages: p.
        microbatches: m.
        samples: of a microbatch.
        F_s: seconds of a stage's F, in the mean.
        B_s: of its B.
        W_s: of its W.
        transfer_s: of a message.
        throughput: published samples a GPU and second.
    """

    model: str
    stages: int
    microbatches: int
    samples: int
    F_s: float
    B_s: float
    W_s: float
    transfer_s: float
    throughput: Mapping[str, float]


PROFILES = (
    Profile(
        model="1.5B",
        stages=8,
        microbatches=24,
        samples=6,
        F_s=18.522e-3,
        B_s=18.086e-3,
        W_s=9.337e-3,
        transfer_s=0.601e-3,
        throughput={"1F1B": 11.8, "interleaved": 13.1, "ZB-1p": 12.9, "ZB-2p": 14.5},
    ),
    Profile(
        model="14.6B",
        stages=16,
        microbatches=48,
        samples=1,
        F_s=11.347e-3,
        B_s=11.248e-3,
        W_s=8.132e-3,
        transfer_s=0.377e-3,
        throughput={"1F1B": 1.40, "interleaved": 1.54, "ZB-1p": 1.61, "ZB-2p": 1.81},
    ),
)

# Published name, schedule here, chunks.
RUNS = (
    ("1F1B", "1f1b", 1),
    ("interleaved", "interleaved", 3),
    ("ZB-1p", "zb-h1", 1),
    ("ZB-2p", "zb-h2", 1),
)


def measure() -> list[Row]:
    """Return published and simulated throughputs, and ratios to 1F1B."""
    rows: list[Row] = []
    for profile in PROFILES:
        found = {run: _simulate(profile, *run[1:]) for run in RUNS}
        base = found[RUNS[0]].makespan_s
        tasks_s = profile.microbatches * (profile.F_s + profile.B_s + profile.W_s)
        on_a_gpu = profile.microbatches * profile.samples / profile.stages
        for (name, schedule, chunks), simulated in found.items():
            published = profile.throughput[name]
            rows.append(
                {
                    "model": profile.model,
                    "name": name,
                    "schedule": schedule,
                    "chunks": chunks,
                    "published": published,
                    "simulated": on_a_gpu / simulated.makespan_s,
                    "published_ratio": published / profile.throughput["1F1B"],
                    "together_ratio": base / simulated.makespan_s,
                    "on_ratio": base / max(simulated.span_s),
                    "no_bubble_ratio": base / tasks_s,
                }
            )
    return rows


def _simulate(profile: Profile, schedule: str, chunks: int) -> Simulated:
    table = tpmlp.make_schedule(schedule, profile.stages, profile.microbatches, chunks)
    return tpmlp.simulate(
        table,
        F_s=profile.F_s / chunks,
        B_s=profile.B_s / chunks,
        W_s=profile.W_s / chunks,
        transfer_s=profile.transfer_s,
    )
