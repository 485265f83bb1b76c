"""Does a sharded graph learn what the unsharded one learns, step for step?

Question: a language model on text and a sparse autoencoder on digits, split over 8 devices: is
    every loss of their training that of the same graph on one device?
Method: both graphs are trained twice from the same parameters, on x=4, y=2 and on one device, on
    the same batches, in float32. The text is that of README.md and of the documentation strings of
    Python's standard library, as bytes; the digits are scikit-learn's.
Command: make graph
Prediction: losses differ by rounding alone, which training amplifies: below 1e-3 of the loss in the
    steps shown. The language model goes below the entropy of single bytes, the autoencoder keeps
    few units active. 48 transformer blocks compile in less than 30 s.
Finding: the losses differ by at most 3.5e-6 of themselves in 150 steps (JAX 0.10.2, two cores); the
    language model ends at 2.48 nats a byte, below the 3.3 of single bytes. 48 blocks of width 256
    compile in 25 s on x=4, y=2.
"""

import ast
import collections
import json
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import optax
from jax.sharding import Mesh
from matplotlib.figure import Figure

import tpmlp
from experiments.command import SettingError, parse, refuse, require
from experiments.record import save_json
from tpmlp.graph import language_model, sparse_autoencoder
from tpmlp.table import text_table

Row = dict[str, Any]

# Bytes of the text; those above are one id.
VOCABULARY = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train a language model and a sparse autoencoder, sharded and unsharded.

    Attributes:
        width: features of a token.
        tokens: bytes of a sample of text.
        blocks: transformer blocks.
        heads: heads of attention; 8 devices divide them.
        code: features of the autoencoder's code.
        deep: blocks of the language model that is compiled and not trained.
        deep_width: its features of a token.
        steps: updates of each.
        batch_size: samples of a step.
        learning_rate: of Adam.
        out: folder for graph.json and the figures.
    """

    width: int = 64
    tokens: int = 32
    blocks: int = 2
    heads: int = 8
    code: int = 512
    deep: int = 48
    deep_width: int = 256
    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 3e-3
    out: Path = Path("results/graph")

    def __post_init__(self) -> None:
        counts = ("width", "tokens", "blocks", "heads", "code", "deep", "deep_width")
        for name in (*counts, "steps", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1", "Use 1 or more.", **{name: value})


def read_text() -> np.ndarray:
    """Return the bytes of README.md and of the standard library's documentation strings, as ids."""
    texts = [Path("README.md").read_text(encoding="utf-8")]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = (node for node in ast.walk(module) if isinstance(node, documented))
        texts += filter(None, map(ast.get_docstring, nodes))
    codes = np.frombuffer("\n".join(texts).encode(), np.uint8)
    return np.minimum(codes, VOCABULARY - 1).astype(np.int32)


def byte_entropy(ids: np.ndarray) -> float:
    """Return the entropy of single bytes, in nats: the loss of knowing how frequent each is."""
    share = np.array(list(collections.Counter(ids.tolist()).values())) / len(ids)
    return float(-(share * np.log(share)).sum())


def train(graph: tpmlp.Graph, data: Any, loss: str, config: Config, mesh: Mesh) -> Any:
    """Return the result of one run; the same start and the same batches on every mesh."""
    return tpmlp.fit(
        graph,
        data,
        loss=loss,
        mesh=mesh,
        optimizer=optax.adam(config.learning_rate),
        steps=config.steps,
        batch_size=config.batch_size,
        log_every=1,
    )


def measure(name: str, graph: tpmlp.Graph, data: Any, loss: str, config: Config) -> list[Row]:
    """Return the losses of both runs, step by step."""
    print(f"\n{name}: {graph.num_parameters:,} parameters")
    sharded = train(graph, data, loss, config, tpmlp.make_mesh(x=4, y=2))
    alone = train(graph, data, loss, config, tpmlp.make_mesh(x=1))
    return [
        {
            "model": name,
            "step": a["step"],
            "sharded": a["loss"] + a["penalty"],
            "one_device": b["loss"] + b["penalty"],
        }
        for a, b in zip(sharded.history, alone.history, strict=True)
    ]


def compile_deep(config: Config) -> float:
    """Return the seconds in which the step of a deep language model compiles, on 8 devices."""
    model = language_model(
        VOCABULARY, config.deep_width, config.tokens, num_blocks=config.deep, num_heads=config.heads
    )
    step = tpmlp.value_and_grad(model, loss="cross_entropy", mesh=tpmlp.make_mesh(x=4, y=2))
    started = time.perf_counter()
    step.compile(config.batch_size)
    return time.perf_counter() - started


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits in [0, 1], to be given back as they are."""
    from sklearn.datasets import load_digits

    samples, _ = load_digits(return_X_y=True)
    x = np.asarray(samples, np.float32) / 16
    return x, x


def table(rows: Sequence[Row]) -> str:
    """Return the first and last loss of each model, and how far the two runs are apart."""
    cells = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        apart = max(abs(r["sharded"] - r["one_device"]) / r["one_device"] for r in mine)
        first, last = (f"{mine[i]['sharded']:.4f}" for i in (0, -1))
        cells.append((name, len(mine), first, last, f"{apart:.1e}"))
    headers = ["model", "steps", "first loss", "last loss", "sharded against one device, at most"]
    return text_table(headers, cells)


def plot(rows: Sequence[Row], entropy: float) -> Figure:
    """Draw the losses of both runs of each model, and the entropy of single bytes."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        mine = [row for row in rows if row["model"] == name]
        steps = [row["step"] for row in mine]
        axes.plot(steps, [r["one_device"] for r in mine], linewidth=4, alpha=0.4, label="1 device")
        axes.plot(steps, [r["sharded"] for r in mine], linewidth=1, label="8 devices, x=4, y=2")
        if name == "language model":
            axes.axhline(entropy, color="black", linestyle=":", label="entropy of single bytes")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("objective of the batch")
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=8)
    figure.suptitle("Sharded and unsharded losses lie on one another", fontsize=11)
    return figure


def save(config: Config, result: Mapping[str, Any], graphs: Mapping[str, tpmlp.Graph]) -> None:
    """Write the rows as JSON, the figure from that file, and pictures of the graphs."""
    save_json(config.out / "graph.json", result, result["seconds"])
    read = json.loads((config.out / "graph.json").read_text(encoding="utf-8"))
    figures = {"losses": plot(read["rows"], read["entropy"])}
    figures |= {name: graph.plot() for name, graph in graphs.items()}
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        for name, figure in figures.items():
            figure.savefig(config.out / f"{name}.png", dpi=120)
            figure.savefig(config.out / f"{name}.svg")


def run(config: Config) -> list[Row]:
    """Train, print the tables and write the files."""
    started = time.perf_counter()
    text = read_text()
    windows = text[: len(text) // (config.tokens + 1) * (config.tokens + 1)]
    windows = windows.reshape(-1, config.tokens + 1)
    language = language_model(
        VOCABULARY,
        config.width,
        config.tokens,
        num_blocks=config.blocks,
        num_heads=config.heads,
    )
    autoencoder = sparse_autoencoder(64, config.code, sparsity=1e-3)
    print(language.summary(tpmlp.make_mesh(x=4, y=2), batch_size=config.batch_size))
    pairs = (windows[:, :-1], windows[:, 1:])
    rows = measure("language model", language, pairs, "cross_entropy", config)
    rows += measure("sparse autoencoder", autoencoder, digits(), "mse", config)
    print(f"\n{table(rows)}")
    compile_s = compile_deep(config)
    print(f"\n{config.deep} blocks of width {config.deep_width} compile in {compile_s:.1f} s")
    result = {"config": asdict(config), "rows": rows, "entropy": byte_entropy(text)}
    result["compile_s"] = compile_s
    result["seconds"] = time.perf_counter() - started
    save(config, result, {"autoencoder": autoencoder})
    print(f"\nwrote {config.out}/graph.json, losses and autoencoder as png and svg")
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment and return the exit status."""
    try:
        config = parse(Config, "experiments.graph", args)
        tpmlp.simulate_devices(8)
        run(config)
    except (SettingError, ValueError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
