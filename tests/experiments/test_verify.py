"""make verify: a failure means that a wrong tensor passes unseen, or that its record is lost."""

import json
from dataclasses import replace
from typing import Any

import pytest

import tpmlp
from experiments import verify


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Verify one small mesh in this process."""
    monkeypatch.setattr(verify, "meshes", lambda devices: [(1, 2, 1)])
    small = ["--widths", "3", "4", "2", "--batch-size", "4", "--processes", "1"]
    return lambda *args: verify.main([*small, "--out", str(tmp_path), *args])


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def spoil(monkeypatch, error: float) -> None:
    """Give one tensor of every report an error."""
    sound = tpmlp.verify

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        report = sound(*args, **kwargs)
        first, *others = report.checks
        return replace(report, checks=(replace(first, error=error), *others))

    monkeypatch.setattr(tpmlp, "verify", spoiled)


def test_every_tensor_within_its_bound_is_status_0_and_a_record(run, tmp_path, capsys):
    assert run() == 0
    output = capsys.readouterr()
    assert "s: 0 outside their bound" in output.out
    assert "WRONG" not in output.out + output.err
    record = json.loads((tmp_path / "verify.json").read_text(), parse_constant=refuse_constant)
    assert {(r["data"], r["x"], r["y"]) for r in record["rows"]} == {(1, 2, 1)}
    assert {r["kind"] for r in record["rows"]} == {"float64", "float32", "integers"}
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "verify.svg").read_text()


@pytest.mark.parametrize("error", [1e9, float("nan")])
def test_a_tensor_outside_its_bound_is_status_1_and_said(run, tmp_path, capsys, monkeypatch, error):
    spoil(monkeypatch, error)
    assert run() == 1
    output = capsys.readouterr()
    assert "WRONG" in output.out
    assert "WRONG" in output.err
    text = (tmp_path / "verify.json").read_text()
    rows = json.loads(text, parse_constant=refuse_constant)["rows"]
    assert sum(not row["ok"] for row in rows) > 0
    assert (tmp_path / "verify.png").exists()


BAD = {
    "batch_size": (["--batch-size", "0"], "batch_size=0"),
    "devices": (["--devices", "0"], "devices=0"),
    "processes": (["--processes", "-1"], "processes=-1"),
    "widths": (["--widths", "3"], "widths=(3,)"),
    "activation": (["--activation", "sine"], "sine"),
    "loss": (["--loss", "hinge"], "hinge"),
}


@pytest.mark.parametrize(("args", "words"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_refused_in_one_line(run, capsys, args, words):
    assert run(*args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert words in output.err


def test_the_worst_of_several_errors_is_the_one_that_is_not_finite():
    common = {"kind": "float64", "bound": 1.0, "end_to_end": 0.0, "layout": "auto"}
    place = {"data": 1, "x": 2, "y": 1, "tensor": "h_1"}
    rows = [{**common, **place, "error": e, "ok": e <= 1} for e in (0.5, float("nan"), 0.1)]
    for order in (rows, rows[::-1]):
        assert "WRONG" in verify.worst_table(order)


def test_no_mesh_with_more_than_one_tensor_device_divides_all_widths():
    widths = verify.Config().widths
    for _, x, y in verify.meshes(8):
        assert x * y == 1 or any(width % (x * y) for width in widths)
