"""What would the training step hold, move and take to compile on hardware that is not here?

Question: do the compilers for TPU, GPU and CPU keep what the kernel orders (the second gather of
    h_l apart from the first, gradients finished in turn, every reduce-scatter a reduce-scatter),
    and how much memory and how many bytes follow, at sizes that no machine at hand could run?
Method: the step that tpmlp.value_and_grad makes, compiled for devices that are only described, with
    bfloat16 products and, where the table does not say float32, bfloat16 parameters; 64 and 16
    layers of 32768, 16384 samples; 96 layers of 256 on 8 simulated CPU devices in float32; rings on
    8 devices. Everything is counted in the compiled program (tpmlp.audit). Seconds are from
    tracing to the compiled program, on whatever else this machine was doing. "update" is gradient
    descent whose result takes the memory of the parameters.
Command: make absent, or make absent ABSENT_ARGS="--hardware '64 H100' --layers 16"; `--help`
    explains.
Prediction: bytes moved are those of tpmlp.predict; three gathers a layer, two where the gathered
    h_l is kept; temporaries with keep="shard" of about one array a layer (drawn) and the arrays of
    the layer that runs; compiling takes at most 7 s (64 v5p), 12 s (256 v6e), 2 s (64 H100), 1 s
    (CPU).
Finding: (experiments/results/absent.json, libtpu 0.0.42.1) bytes are those predicted in 36 of 39
    programs. The others have their reduce-scatters turned into all-reduces by the TPU compiler: 64
    and 16 layers on 256 v6e with keep="recompute", every one; plain scatters over one axis of 8
    v5p. Gathers stay apart everywhere. Temporaries of 64 layers, "gathered" against "shard": 8.3
    and 0.28 GiB on 64 H100, 8.1 and 0.26 on 64 v5p, 4.0 and 0.09 on 256 v6e: below one array a
    layer, as kept arrays lie in the memory of results to come. For that reason "recompute" saves
    nothing where only gradients are wanted. They are 0.95 to 1.07 times the predicted for
    "gathered" and for "shard" on 64 H100 and v5p, 0.53 to 1.95 elsewhere: off CPUs the prediction
    is an estimate. Updating in place takes 1.3 GiB on v5p, 2.3 on H100, where XLA puts all updates
    last, and holds every gradient. Rings overlap 55 of 56 hops on 8 H100, 50 on 8 v5p (both ways
    round 52 and 47), in twice the memory of the plain step on H100, and half of it on v5p, but for
    the bidirectional one. Compiling missed every target: 2.6 s (64 H100), 21 (64 v5p), 56 (256
    v6e), 3.9 (CPU).
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import matplotlib as mpl

from experiments.absent.hardware import HARDWARE, start
from experiments.absent.programs import Program, Row, measure, programs
from experiments.absent.report import plot, table
from experiments.command import INTERRUPTED, SettingError, parse, refuse, require
from experiments.record import plain, save_json

COMPILERS = ("libtpu", "jax-cuda13-plugin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Compile the training step for hardware that is not here, and count what is in it.

    Attributes:
        hardware: what to compile for.
        layers: numbers of layers, where the hardware is large.
        resume: keep the programs that absent.json in OUT already has.
        out: folder for absent.json, absent.png and absent.svg.
    """

    hardware: tuple[str, ...] = tuple(HARDWARE)
    layers: tuple[int, ...] = (16, 64)
    resume: bool = False
    out: Path = Path("results/absent")

    def __post_init__(self) -> None:
        require(
            bool(self.hardware) and set(self.hardware) <= set(HARDWARE),
            f"hardware must be among {', '.join(map(repr, HARDWARE))}",
            "Quote each name.",
            hardware=self.hardware,
        )
        require(
            min(self.layers, default=0) >= 2,
            "layers must be one number or more, each at least 2",
            "Use for example 16 64.",
            layers=self.layers,
        )


def collect(config: Config) -> list[Row]:
    """Compile every program, saying which, and write the record after each."""
    began, rows = time.perf_counter(), earlier(config) if config.resume else []
    todo = [p for p in programs(config.hardware, config.layers) if not any(_is(p, r) for r in rows)]
    for number, program in enumerate(todo, 1):
        elapsed = time.perf_counter() - began
        print(f"[{elapsed:4.0f} s] {number} of {len(todo)}: {program}", flush=True)
        rows.append(measure(program))
        record = {"config": asdict(config), "compilers": compilers(), "rows": rows}
        save_json(config.out / "absent.json", record, time.perf_counter() - began)
        # A compiled program for 256 devices takes some 100 MB here.
        jax.clear_caches()
    return rows


def earlier(config: Config) -> list[Row]:
    """Return what an earlier run recorded; nothing if there is no record."""
    path = config.out / "absent.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _is(program: Program, row: Row) -> bool:
    return plain(asdict(program)) == {name: row[name] for name in asdict(program)}


def compilers() -> dict[str, str]:
    """Return the versions of the compilers that are installed beside JAX's own."""
    found = {}
    for name in COMPILERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report(out: Path) -> None:
    """Print the table and draw the figure, from the record alone."""
    rows = json.loads((out / "absent.json").read_text(encoding="utf-8"))["rows"]
    print(f"\n{table(rows)}\n")
    for row in rows:
        if row["turned"] > 0:
            made = ", ".join(f"{n} over {axes}" for axes, n in row["large_all_reduces"].items())
            print(f"{row['hardware']}, {row['layers']} layers: all-reduces for scatters: {made}")
    figure = plot(rows)
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        figure.savefig(out / "absent.png", dpi=150)
        figure.savefig(out / "absent.svg")
    print(f"record and figure are in {out}/")


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 2 if refused, 130 after Ctrl-C."""
    try:
        config = parse(Config, "experiments.absent", args)
        start(config.hardware)
    except (SettingError, RuntimeError) as error:
        return refuse(error)
    try:
        collect(config)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on with the next program.", file=sys.stderr)
        return INTERRUPTED
    report(config.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
