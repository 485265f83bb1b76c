"""make bench: a failure means a baseline that computes something else, or a wrong verdict."""

import io
import json
import math
import sys
import textwrap
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import (
    automatic,
    gpu,
    kernel,
    measure,
    products,
    pytorch,
    report,
    summary,
    targets,
)
from experiments.bench.machine import describe_machine
from experiments.bench.problem import FORMS, Size, make_problem
from experiments.bench.summary import Ratio
from experiments.bench.timing import Label, Measurement, Program, finalists, interleave
from tpmlp import reference

# Three layers, so that what alternates ends on the other foot than it does with two.
SIZE = Size(d=16, layers=3, batch=8)
PROBLEM = make_problem(SIZE, seed=0)

# Sums of at most 16 products, up to 6 of them deep (3 layers forward, 3 back), of numbers of
# order 1: 16 * 6 * u of the largest entry, u = 6e-8 for float32 and, as products are added in
# float32 but operands rounded, 6 * u with u = 2^-9 for bfloat16; times 5 for what cancels.
TOLERANCE = {"float32": 5 * 16 * 6 * 6e-8, "bfloat16": 5 * 6 * 2.0**-9}

# bfloat16 changes how products are written, which is the same wherever the arrays are.
LABELS = [
    *automatic.automatic_labels(4, "float32"),
    *automatic.unsharded_labels("float32"),
    *automatic.unsharded_labels("bfloat16"),
]


@cache
def expected() -> tuple[float, Any]:
    """Return the reference's loss and gradients."""
    return reference.value_and_grad(PROBLEM.layers, PROBLEM.x, PROBLEM.y)


def assert_same(results: Any, tolerance: float, *, transposed: bool = False) -> None:
    """Compare a loss and gradients with the reference's, all relative to the largest entry."""
    loss, grads = results
    right_loss, right = expected()
    assert float(loss) == pytest.approx(right_loss, rel=tolerance)
    for (dW, db), (right_dW, right_db) in zip(grads, right, strict=True):
        dW = np.asarray(dW).T if transposed else np.asarray(dW)
        assert np.abs(dW - right_dW).max() <= tolerance * np.abs(right_dW).max()
        assert np.abs(np.asarray(db) - right_db).max() <= tolerance * np.abs(right_db).max()


# Every program computes the same


@pytest.mark.parametrize(
    "label", LABELS, ids=lambda label: f"{summary.name(asdict(label))}, {label.dtype}"
)
def test_a_baseline_computes_the_reference_loss_and_gradients(label):
    make = automatic.unsharded if label.group == "unsharded" else automatic.automatic
    results = make(PROBLEM, label).run()
    assert_same(results, TOLERANCE[label.dtype], transposed=label.form == "batch first")
    assert all(array.dtype == "float32" for layer in results[1] for array in layer)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_that_is_measured_computes_them_too(dtype):
    assert_same(kernel.by_default(PROBLEM, 8, dtype).run(), TOLERANCE[dtype])


def test_automatic_partitionings_cover_every_variant_form_and_two_dimensional_mesh():
    labels = automatic.automatic_labels(8, "float32")
    assert {(label.variant, label.mesh, label.form) for label in labels} == {
        *((variant, "8x1", form) for variant in automatic.ONE_AXIS for form in FORMS),
        *(
            (variant, mesh, form)
            for variant in automatic.TWO_AXES
            for mesh in ("4x2", "2x4")
            for form in FORMS
        ),
    }
    assert {label.mesh for label in automatic.automatic_labels(2, "float32")} == {"2x1"}


@pytest.mark.parametrize(
    ("mesh", "dtype"), [((2, 1), "float32"), ((4, 2), "float32"), ((2, 2), "bfloat16")]
)
def test_the_products_alone_have_the_flops_of_a_step_and_move_nothing(mesh, dtype):
    measured = products.products_alone(PROBLEM, mesh, dtype).measurement
    assert measured.product_flops * math.prod(mesh) == SIZE.product_flops
    assert measured.received_bytes == 0


def test_the_search_visits_each_mesh_of_a_number_of_devices_once():
    assert kernel.meshes(8) == [
        (1, 2, 4),
        (1, 4, 2),
        (1, 8, 1),
        (2, 2, 2),
        (2, 4, 1),
        (4, 2, 1),
        (8, 1, 1),
    ]


def test_the_search_compiles_each_layout_once():
    widths = (SIZE.d,) * (SIZE.layers + 1)
    for sizes in kernel.meshes(8):
        words = list(kernel.layouts(widths, sizes))
        assert len(words) == len(set(words)) > 0
    assert len(kernel.layouts(widths, (8, 1, 1))) == 1
    assert set(kernel.layouts(widths, (1, 8, 1)).values()) >= {"auto", "row"}


# Timing


def fake(group: Any, variant: str, times: list[float]) -> Program:
    """Return a program that is said to take these times, the last one for ever."""
    label = Label(group=group, variant=variant, dtype="float32")
    measurement = Measurement(
        label=label,
        compile_s=0.0,
        temp_bytes=1,
        peak_bytes=1,
        received_bytes=0,
        product_flops=0,
    )
    left = list(times)
    return Program(run=lambda: left.pop(0) if len(left) > 1 else left[0], measurement=measurement)


@pytest.fixture
def clock(monkeypatch):
    """Let a program's time be what its run returns."""
    monkeypatch.setattr("experiments.bench.timing.timed", lambda run: run())


def variants(programs: list[Program]) -> list[str]:
    return [program.measurement.label.variant for program in programs]


def test_screening_drops_what_is_clearly_slower_than_the_best_of_its_group(clock):
    programs = [
        fake("automatic", "fast", [1.0]),
        fake("automatic", "near", [1.05]),
        fake("automatic", "slow", [1.2]),
        fake("automatic", "hopeless", [2.0]),
        fake("kernel", "kernel", [9.0]),
    ]
    assert variants(finalists(programs, screen=1.1)) == ["fast", "near", "kernel"]
    assert [len(p.measurement.screen_s) for p in programs] == [2, 2, 2, 1, 1]


def test_screening_takes_the_least_of_the_runs_so_that_one_slow_run_excludes_nobody(clock):
    programs = [
        fake("automatic", "fast", [1.0]),
        fake("automatic", "unlucky", [1.29, 0.9]),
    ]
    assert variants(finalists(programs, screen=1.05)) == ["unlucky"]


def test_screening_keeps_no_more_than_it_may_and_those_the_fastest(clock):
    programs = [fake("automatic", str(t), [t]) for t in (1.03, 1.0, 1.02, 1.01)]
    assert variants(finalists(programs, screen=2, at_most=2)) == ["1.0", "1.01"]


def test_every_round_runs_every_program_once_and_turns_the_order_round(clock):
    order: list[str] = []
    programs = [fake("automatic", name, [0.0]) for name in "ab"]
    noted = [
        replace(p, run=lambda name=name: order.append(name) or 1.0)
        for name, p in zip("ab", programs, strict=True)
    ]
    interleave(noted, 3)
    assert "".join(order) == "abbaab"
    assert all(p.measurement.seconds == [1.0] * 3 for p in noted)


# Ratios and verdicts


def row(group: str, seconds: list[float], temp_bytes: int = 100, **fields: Any) -> dict[str, Any]:
    label = {"variant": "v", "form": None, "mesh": "", "devices": 8, "dtype": "float32"}
    return {"group": group, **label, "seconds": seconds, "temp_bytes": temp_bytes, **fields}


def cell(size: Size = SIZE, kernel_s: float = 1.0, **fields: Any) -> dict[str, Any]:
    """Return a cell whose best automatic partitioning takes 2 s; its leanest takes 40 bytes."""
    one = {"devices": 1, "dtype": fields.get("dtype", "float32")}
    rows = [
        row("kernel", [kernel_s] * 3, 10, **fields),
        row("automatic", [2.0, 2.0, 2.0], 100, variant="fast", **fields),
        row("automatic", [3.0, 1.0, 3.0], 50, variant="slow", **fields),
        row("automatic", [], 40, variant="lean, screened out", **fields),
        row("unsharded", [4.0, 0.5, 0.5], **one),
        row("unsharded", [0.8, 0.8, 0.8], **one),
        row("products", [0.5, 0.5, 0.5], **fields),
    ]
    return {"size": {"d": size.d, "layers": size.layers, "batch": size.batch}, "rows": rows}


def test_the_best_of_a_group_is_the_fastest_by_median_for_time_and_the_leanest_for_memory():
    (found,) = summary.compare(cell())
    assert found.automatic["variant"] == "fast"
    assert found.leanest["variant"] == "lean, screened out"
    assert found.unsharded["seconds"] == [4.0, 0.5, 0.5]
    assert found.to_automatic.median == 0.5
    assert found.to_unsharded.median == 2.0
    assert found.floor is not None
    assert found.floor.median == 0.25
    assert (found.temporaries, found.temporaries_to_fastest) == (0.25, 0.1)


def test_a_ratio_is_taken_round_by_round_so_that_drift_falls_out():
    drifting = [1.0, 2.0, 4.0]
    ratio = Ratio.of([0.5 * t for t in drifting], drifting)
    assert (ratio.median, ratio.quartiles) == (0.5, (0.5, 0.5))


def test_the_mean_of_ratios_is_geometric():
    mean = Ratio.geometric_mean([Ratio(rounds=(0.25, 1.0)), Ratio(rounds=(4.0, 1.0))])
    assert mean.rounds == (1.0, 1.0)


def found_by(what: str, cells: list[Any], **settings: Any) -> targets.Verdict:
    comparisons = [c for one in cells for c in summary.compare(one)]
    (verdict,) = [v for v in targets.verdicts(comparisons, **settings) if v.what.startswith(what)]
    return verdict


OTHER = replace(SIZE, d=32)


def test_a_target_of_time_is_judged_by_the_mean_and_by_the_worst_cell():
    cells = [cell(kernel_s=0.5), cell(OTHER, kernel_s=2.2)]
    mean = found_by("time / best automatic, M=8", cells)
    assert mean.value == pytest.approx(math.sqrt(0.25 * 1.1))
    assert (mean.cells, mean.holds, mean.word) == (2, True, "yes")
    worst = found_by("the same, worst cell", cells)
    assert worst.value == pytest.approx(1.1)
    assert (worst.holds, worst.word) == (False, "NO")
    assert str(OTHER) in worst.spread


def test_a_target_of_memory_is_judged_against_the_leanest():
    assert found_by("temporaries", [cell()]).value == 0.25
    assert found_by("temporaries", [cell()]).word == "NO"


def test_bfloat16_is_judged_on_large_sizes_and_only_where_there_are_matrix_units():
    large = Size(d=1024, layers=3, batch=1024)
    cells = []
    for size in (SIZE, large):
        both = cell(size, kernel_s=2.0)
        both["rows"] += cell(size, kernel_s=1.0, dtype="bfloat16")["rows"]
        cells.append(both)
    verdict = found_by("bfloat16 /", cells, matrix_units=True)
    assert (verdict.value, verdict.cells, verdict.word) == (0.5, 1, "NO")
    assert found_by("bfloat16 /", cells).word == "not judged: no matrix units"


def test_compile_time_is_judged_where_it_was_measured():
    assert found_by("seconds to compile", [cell()], compile_s=0.9).word == "yes"
    assert found_by("seconds to compile", [cell()], compile_s=1.1).word == "NO"


# The machine


def test_the_machine_is_described_by_model_and_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    text = "model name\t: Some CPU\nflags\t\t: fpu avx2 amx_tile\n\nmodel name\t: Other\nflags\t:\n"
    cpuinfo.write_text(text)
    described = describe_machine(cpuinfo)
    assert (described["cpu"], described["flags"]) == ("Some CPU", ["avx2", "amx_tile"])
    assert described["matrix_units"]
    assert describe_machine(tmp_path / "none")["flags"] == []
    assert not describe_machine(tmp_path / "none")["matrix_units"]


# The programs


def read(path: Any) -> Any:
    return json.loads(path.read_text())


TINY = ["--sizes", "4x2x4", "--devices", "2", "--rounds", "2", "--search-rounds", "1"]
TINY += ["--dtypes", "float32", "--deep", "4x2x4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder and the output of one whole run of a tiny size."""
    out = tmp_path_factory.mktemp("bench")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(kernel, "KEEPS", ("shard",))
        patch.setattr(kernel, "LAYOUTS", ("auto", "column"))
        patch.setattr(measure, "COMPILATIONS", 1)
        assert bench.main([*TINY, "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture
def run(tmp_path):
    return lambda *args: bench.main([*TINY, "--out", str(tmp_path), *args])


def test_the_tables_the_verdicts_and_the_figure_come_from_one_record(finished):
    out, printed = finished
    assert "time / automatic" in printed
    assert "the best layout, keep and mesh" in printed
    assert 'reduction="invariant" over the default' in printed
    assert "seconds to compile the deep network" in printed
    record = read(out / "bench.json")
    assert [len(row["seconds"]) for row in record["invariant"][0]["rows"]] == [2, 2]
    rows = record["default"][0]["rows"]
    assert {r["group"] for r in rows} == {"kernel", "automatic", "unsharded", "products"}
    assert {len(r["seconds"]) for r in rows} <= {0, 2}
    assert record["verdicts"][-1]["value"] == record["compilation"]["median_s"]
    assert {"cpu", "cores", "flags"} <= set(record["machine"])
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "bench.svg").read_text()


def test_a_run_that_was_cut_off_goes_on_with_the_size_that_is_missing(
    finished, run, tmp_path, monkeypatch
):
    record = read(finished[0] / "bench.json")
    (tmp_path / "bench.json").write_text(json.dumps({**record, "search": []}))
    again = []
    monkeypatch.setattr(bench, "measure_default", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(bench, "measure_compilation", lambda *_: record["compilation"])
    monkeypatch.setattr(
        bench, "measure_search", lambda size, *_: again.append(size) or record["search"][0]
    )
    assert run("--resume") == 0
    assert again == [Size.parse("4x2x4")]


def test_a_record_that_was_measured_otherwise_is_not_gone_on_with(finished, run, tmp_path, capsys):
    (tmp_path / "bench.json").write_bytes((finished[0] / "bench.json").read_bytes())
    assert run("--resume", "--rounds", "3") == 2
    assert "'rounds': 2" in capsys.readouterr().err


def test_the_second_table_alone_needs_every_size_of_the_first(finished, run, tmp_path, capsys):
    (tmp_path / "bench.json").write_bytes((finished[0] / "bench.json").read_bytes())
    assert run("--tables", "search", "--sizes", "4x2x4", "8x2x4") == 2
    assert "lacking=8x2x4" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_measured_and_says_how_to_go_on(
    finished, run, tmp_path, capsys, monkeypatch
):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    (measured,) = read(finished[0] / "bench.json")["default"]
    monkeypatch.setattr(bench, "measure_default", lambda *_: measured)
    monkeypatch.setattr(bench, "measure_compilation", interrupt)
    assert run() == 130
    assert "--resume" in capsys.readouterr().err
    assert read(tmp_path / "bench.json")["default"] == [measured]


BAD = {
    "size": (["--sizes", "4x2"], "'4x2'"),
    "zero": (["--sizes", "4x0x4"], "'4x0x4'"),
    "devices": (["--devices", "1"], "devices=(1,)"),
    "division": (["--devices", "3"], "devices=(3,)"),
    "rounds": (["--rounds", "0"], "rounds=0"),
    "screen": (["--screen", "0.9"], "screen=0.9"),
    "dtypes": (["--dtypes", "bfloat16"], "search_dtypes=('float32',)"),
    "nothing there": (["--tables", "search"], "bench.json"),
}


@pytest.mark.parametrize(("args", "words"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_refused_in_one_line(run, capsys, args, words):
    assert run(*args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert words in output.err


def test_bench_gpu_runs_on_a_cpu_where_it_is_asked_to(tmp_path, capsys):
    tiny = ["--widths", "4", "--batch", "4", "--layers", "2", "--rounds", "2"]
    assert gpu.main([*tiny, "--platform", "cpu", "--out", str(tmp_path)]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    record = read(tmp_path / "gpu.json")
    (one,) = record["cells"]
    assert {r["product_flops"] for r in one["rows"]} == {Size(**one["size"]).product_flops}
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_bench_gpu_says_that_there_is_no_gpu(tmp_path, capsys, monkeypatch):
    def none(platform: str) -> None:
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(gpu.jax, "devices", none)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "platform=gpu" in error
    assert error.count("\n") == 1


# Rank 0 of a PyTorch that computes what it is told, in no time.
STAND_IN = """
    import json, sys
    if "--rank=0" in sys.argv:
        print(json.dumps({"version": "0", "variants": ["a", "b"]}), flush=True)
        for line in sys.stdin:
            seconds = {"a": 2.0, "b": 1.0}[line.strip()]
            print(json.dumps({"seconds": seconds, "loss": LOSS}), flush=True)
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Let a stand-in answer for PyTorch, with a loss of one's choice."""

    def install(loss: float) -> None:
        text = textwrap.dedent(STAND_IN).replace("LOSS", repr(loss))
        start = pytorch.start_ranks
        command = [sys.executable, "-c", text]
        monkeypatch.setattr(pytorch, "start_ranks", lambda _, ranks: start(command, ranks))

    return install


@pytest.fixture
def run_pytorch(tmp_path):
    tiny = ["--sizes", "8x2x8", "--ranks", "2", "--rounds", "2", "--python", sys.executable]
    return lambda *args: pytorch.main([*tiny, "--out", str(tmp_path), *args])


def test_pytorch_is_timed_in_turns_and_its_faster_variant_counts(
    run_pytorch, stand_in, tmp_path, capsys
):
    problem = make_problem(Size(d=8, layers=2, batch=8), seed=0)
    stand_in(reference.value_and_grad(problem.layers, problem.x, problem.y)[0])
    assert run_pytorch() == 0
    assert "time / PyTorch" in capsys.readouterr().out
    (one,) = read(tmp_path / "pytorch.json")["cells"]
    assert [r["seconds"] for r in one["rows"]] == [[2.0, 2.0], [1.0, 1.0]]
    assert len(one["kernel"]["seconds"]) == 2
    assert "1000.0  b" in pytorch.table([one])


def test_pytorch_that_computes_another_loss_is_no_comparison(run_pytorch, stand_in, capsys):
    stand_in(1e9)
    assert run_pytorch() == 1
    assert "1000000000.0" in capsys.readouterr().err


def test_pytorch_that_ends_is_an_error_and_not_a_wait(run_pytorch, monkeypatch, capsys):
    start = pytorch.start_ranks
    ending = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(pytorch, "start_ranks", lambda _, ranks: start(ending, ranks))
    assert run_pytorch() == 1
    assert "status 3" in capsys.readouterr().err


def test_no_pytorch_and_odd_layers_are_refused(run_pytorch, capsys):
    assert run_pytorch("--python", "nowhere/python") == 2
    assert "nowhere/python" in capsys.readouterr().err
    assert run_pytorch("--sizes", "8x3x8") == 2
    assert "8x3x8" in capsys.readouterr().err


def test_a_verdict_is_a_line_with_its_bound():
    verdict = targets.Verdict(what="seconds", value=0.5, bound=1.0)
    (_, line) = report.verdict_table([verdict]).splitlines()
    assert line.split() == ["seconds", "0.50", "<=", "1.00", "yes", "1"]
