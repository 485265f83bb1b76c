"""Is the sharded backward pass the reference's, on every mesh and in every layout?

Question: does any of the meshes (data, x, y) with at most 8 devices, in any layout, compute a
    number that the unsharded recursion does not?
Method: one training step of a small MLP; no mesh with more than one tensor device divides all of
    its widths. Every h_l, z_l, sigma'(z_l), g_l, dW_l, db_l and the loss against tpmlp.reference.
    float64 end to end; integers bit for bit; float32 each operation from its own inputs (see
    tpmlp.inspection.verify).
Command: make verify
Prediction: float64 errors of some units of roundoff, far below 1e-12; integers 0; float32 errors
    below the bound of a single sum, that is below 1.
Finding: see README.md, What is measured so far.
"""

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
from matplotlib.figure import Figure
from rich.progress import track

import tpmlp
from experiments.command import SettingError, parse, refuse, require
from experiments.record import save_json
from tpmlp.inspection.verify import KINDS
from tpmlp.placement import place
from tpmlp.table import text_table

Sizes = tuple[int, int, int]  # data, x, y
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Compare the sharded kernel with the reference on every mesh of at most DEVICES devices.

    Attributes:
        widths: widths of the MLP, inputs first.
        activation: sigma; sigmoid is the one that shows leaking padding.
        loss: the loss, but for the integers, whose loss is the output.
        batch_size: samples.
        devices: simulated devices.
        processes: processes to share the meshes among; 1 is this one, and starts no other.
        out: folder for verify.json, verify.png and verify.svg.
    """

    widths: tuple[int, ...] = (17, 12, 20, 10)
    activation: str = "sigmoid"
    loss: str = "cross_entropy"
    batch_size: int = 30
    devices: int = 8
    processes: int = 2
    out: Path = Path("results/verify")

    def __post_init__(self) -> None:
        for name in ("batch_size", "devices", "processes"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1", "Use 1 or more.", **{name: value})


def meshes(devices: int) -> list[Sizes]:
    """Return every (data, x, y) whose product is at most devices: 38 for 8."""
    sizes = range(1, devices + 1)
    return [(d, x, y) for d in sizes for x in sizes for y in sizes if d * x * y <= devices]


def layouts(config: Config, sizes: Sizes) -> dict[tuple[str, ...], str]:
    """Return the layouts of a mesh as {role of each layer: name}, each program once.

    Without a tensor axis all layouts are the same program; with two, layers must alternate.
    """
    data, x, y = sizes
    num_layers = len(config.widths) - 1
    reverse = tuple(("row", "column")[i % 2] for i in range(num_layers))
    if x == y == 1:
        wanted: list[Any] = ["auto"]
    elif x > 1 and y > 1:
        wanted = ["alternate", reverse, "auto"]
    else:
        wanted = ["column", "row", "alternate", reverse, "auto"]
    mesh = tpmlp.make_mesh(data=data, x=x, y=y)
    found: dict[tuple[str, ...], str] = {}
    for layout in wanted:
        words = place(config.widths, mesh, tpmlp.Strategy(layout=layout)).words
        found.setdefault(words, layout if isinstance(layout, str) else "reversed")
    return found


def verify_mesh(config: Config, sizes: Sizes) -> list[Row]:
    """Return a row for each layout, kind and tensor of one mesh."""
    data, x, y = sizes
    mesh = tpmlp.make_mesh(data=data, x=x, y=y)
    model = tpmlp.MLP(config.widths, activation=config.activation)
    rows: list[Row] = []
    for words, name in layouts(config, sizes).items():
        for kind in KINDS:
            report = tpmlp.verify(
                model,
                mesh,
                strategy=tpmlp.Strategy(layout=words),
                loss=config.loss,
                kind=kind,
                batch_size=config.batch_size,
            )
            where = {"data": data, "x": x, "y": y, "layout": name, "words": words, "kind": kind}
            rows += [{**where, **asdict(check), "ok": check.ok} for check in report.checks]
    return rows


def measure(config: Config) -> Iterator[list[Row]]:
    """Yield the rows of each mesh, in the order in which they are done."""
    # The largest meshes compile longest: they go first, so that no process waits at the end.
    work = sorted(meshes(config.devices), key=math.prod, reverse=True)
    if config.processes == 1:
        yield from (verify_mesh(config, sizes) for sizes in work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        config.processes, mp_context=context, initializer=_start, initargs=(config.devices,)
    ) as pool:
        jobs = [pool.submit(verify_mesh, config, sizes) for sizes in work]
        for job in as_completed(jobs):
            yield job.result()


def worst_table(rows: Iterable[Row]) -> str:
    """Return the worst error of each kind of tensor, over all meshes and layouts."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        tensor = row["tensor"].rstrip("0123456789").rstrip("_")
        key = (row["kind"], tensor)
        if key not in worst or _severity(row) > _severity(worst[key]):
            worst[key] = row
    cells = [
        (
            kind,
            tensor,
            f"{row['error']:.1e}",
            f"{row['bound']:.1e}",
            f"{row['end_to_end']:.1e}",
            "ok" if row["ok"] else "WRONG",
            f"{row['data']} x {row['x']} x {row['y']}",
            row["layout"],
        )
        for kind in KINDS
        for (k, tensor), row in worst.items()
        if k == kind
    ]
    headers = ["kind", "tensor", "worst error", "bound", "end to end", "verdict"]
    return text_table([*headers, "data x X x Y", "layout"], cells)


def plot(rows: list[Row]) -> Figure:
    """Draw the worst error of every mesh as a share of its bound, with the bound."""
    sizes = sorted({(r["data"], r["x"], r["y"]) for r in rows}, key=lambda s: (math.prod(s), s))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, marker in (("float64", "o"), ("float32", "s")):
        worst = [
            max(
                _share(r) for r in rows if (r["data"], r["x"], r["y"]) == size and r["kind"] == kind
            )
            for size in sizes
        ]
        axes.plot(range(len(sizes)), worst, marker, label=f"{kind}, worst tensor and layout")
    axes.axhline(1, color="black", linewidth=1, label="bound: above it is a bug")
    axes.set_yscale("log")
    axes.set_ylabel("error / bound")
    axes.set_xticks(range(len(sizes)), [f"{d}x{x}x{y}" for d, x, y in sizes], rotation=90)
    axes.set_xlabel("mesh: data x X x Y devices")
    exact = sum(r["kind"] == "integers" and r["ok"] for r in rows)
    of = sum(r["kind"] == "integers" for r in rows)
    axes.set_title(
        f"Sharded against unsharded on {len(sizes)} meshes; integers equal bit for bit in "
        f"{exact} of {of} tensors"
    )
    axes.legend()
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 1 if a tensor is outside its bound, 2 if refused."""
    try:
        config = parse(Config, "experiments.verify", args)
        prepare(config)
    except (SettingError, ValueError, RuntimeError) as error:
        return refuse(error)
    began = time.perf_counter()
    rows = collect(config)
    seconds = time.perf_counter() - began
    save(config, rows, seconds)
    wrong = sum(not row["ok"] for row in rows)
    programs = len({(r["data"], r["x"], r["y"], tuple(r["words"]), r["kind"]) for r in rows})
    print(worst_table(rows))
    print(
        f"\n{len(meshes(config.devices))} meshes, {programs} programs, {len(rows)} tensors "
        f"compared in {seconds:.0f} s: {wrong} outside their bound"
    )
    print(f"rows and figure are in {config.out}/")
    return 1 if wrong else 0


def prepare(config: Config) -> None:
    """Start the devices, check the model and the loss, and make the folder.

    Raises:
        ValueError: what is wrong with the model or the loss.
        SettingError: the folder cannot be made.
        RuntimeError: JAX has started with other devices.
    """
    _start(config.devices)
    model = tpmlp.MLP(config.widths, activation=config.activation)
    model.summary(tpmlp.make_mesh(x=1), batch_size=config.batch_size, loss=config.loss)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"out must be a folder that can be made: got out={config.out} ({error.strerror}). "
            "Name another."
        ) from error


def collect(config: Config) -> list[Row]:
    """Measure all meshes, showing progress, and what is wrong as soon as it is found."""
    rows: list[Row] = []
    total = len(meshes(config.devices))
    for of_mesh in track(measure(config), description="meshes", total=total):
        rows += of_mesh
        if wrong := [row for row in of_mesh if not row["ok"]]:
            print(worst_table(wrong), file=sys.stderr)
    return rows


def save(config: Config, rows: list[Row], seconds: float) -> None:
    """Write the rows as JSON, and the figure from that file."""
    save_json(config.out / "verify.json", {"config": asdict(config), "rows": rows}, seconds)
    figure = plot(json.loads((config.out / "verify.json").read_text(encoding="utf-8"))["rows"])
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        figure.savefig(config.out / "verify.png", dpi=150)
        figure.savefig(config.out / "verify.svg")


def _severity(row: Row) -> float:
    """Return the error; infinite for NaN, which no comparison would keep."""
    return math.inf if math.isnan(row["error"]) else row["error"]


def _share(row: Row) -> float:
    """Return error / bound; infinite for an error that was not finite, null in the file."""
    return math.inf if row["error"] is None else row["error"] / row["bound"]


def _start(devices: int) -> None:
    tpmlp.simulate_devices(devices)
    jax.config.update("jax_enable_x64", True)


if __name__ == "__main__":
    sys.exit(main())
