"""The main job: a failure means a traceback for a user, or results that are wrong or mixed."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpmlp
from experiments import train
from experiments.settings import Config

TINY = ["--widths", "8", "--steps", "3", "--x", "2", "--y", "1", "--devices", "8"]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=refuse_constant)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(out):
    return lambda *args: train.main([*TINY, "--out", str(out), *map(str, args)])


@pytest.fixture
def numbers(tmp_path) -> Path:
    """Return a file for regression."""
    x = np.random.default_rng(0).normal(size=(24, 3))
    path = tmp_path / "numbers.npz"
    np.savez(path, x=x, y=x @ [1.0, 2.0, 3.0])
    return path


@pytest.fixture
def fruit(tmp_path) -> Path:
    """Return a file with two classes of text."""
    path = tmp_path / "fruit.csv"
    rows = [f"{i},{i * i},{'pear' if i % 3 else 'fig'}" for i in range(24)]
    path.write_text("\n".join(["a,b,target", *rows]) + "\n")
    return path


# Settings

BAD = {
    "l2 negative": ({"l2": -1}, "l2=-1"),
    "l2 nan": ({"l2": "nan"}, "l2=nan"),
    "l2 inf": ({"l2": "inf"}, "l2=inf"),
    "steps": ({"steps": 0}, "steps=0"),
    "batch": ({"batch": 0}, "batch=0"),
    "seed negative": ({"seed": -1}, "seed=-1"),
    "seed large": ({"seed": 99999999999}, "seed=99999999999"),
    "last seed": ({"seed": 2**32 - 1, "seeds": 2}, "seed=4294967295, seeds=2"),
    "seeds": ({"seeds": 0}, "seeds=0"),
    "lr zero": ({"lr": 0}, "lr=0"),
    "lr negative": ({"lr": -1}, "lr=-1"),
    "lr inf": ({"lr": "inf"}, "lr=inf"),
    "lr nan": ({"lr": "nan"}, "lr=nan"),
    "x zero": ({"x": 0}, "x=0"),
    "x negative": ({"x": -1}, "x=-1"),
    "y": ({"y": 0}, "y=0"),
    "data_parallel": ({"data-parallel": 0}, "data_parallel=0"),
    "too few devices": ({"x": 4, "devices": 2}, "devices=2, x=4"),
    "too few real devices": ({"x": 9, "devices": 0}, "devices=0 with 8 real ones, x=9"),
    "negative devices": ({"devices": -8}, "devices=-8"),
    "other devices": ({"devices": 7}, "num_devices=7"),
    "width zero": ({"widths": "8,0"}, "widths='8,0'"),
    "width of text": ({"widths": "8,\u00b2"}, "widths='8,\u00b2'"),
    "activation": ({"activation": "sine"}, "sine"),
    "layout": ({"layout": "diagonal"}, "diagonal"),
    "layout of the mesh": ({"layout": "column", "y": 2}, "column"),
    "data": ({"data": "absent.csv"}, "absent.csv"),
    "target": ({"target": "price"}, "target='price'"),
}


@pytest.mark.parametrize(("settings", "words"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_refused_in_one_line(run, out, capsys, settings, words):
    assert run(*(f"--{name}={value}" for name, value in settings.items())) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert words in output.err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["a file", "a folder that cannot be made", "in the way"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, capsys, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "summary.json").mkdir(parents=True)
    place = {"a file": "file", "in the way": "folder"}.get(kind, "file/below")
    assert train.main([*TINY, "--out", str(tmp_path / place)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: out must be a folder")
    assert output.err.count("\n") == 1
    assert str(tmp_path / place) in output.err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_names_the_program_and_the_default_target(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m experiments.train")
    assert 'the one named "target"' in " ".join(text.replace("\u2502", "").split())
    assert max(map(len, text.splitlines())) <= 100


def test_no_widths_are_a_linear_model():
    assert Config(widths="").hidden == ()


def test_widths_and_layout_take_commas_or_spaces():
    config = Config(widths="8, 16 4", layout="row,column")
    assert (config.hidden, config.layout_words) == ((8, 16, 4), ("row", "column"))


# Results


def test_a_run_writes_its_numbers_figures_and_model(run, out, capsys):
    assert run() == 0
    result = read_json(out / "summary.json")
    assert 0 <= result["test_accuracy"] <= 1
    assert result["test_accuracy"] == round(result["test_accuracy"], 6)
    assert (result["steps"], result["stopped"], result["widths"]) == (3, "finished", [64, 8, 10])
    assert result["mesh"] == {"data": 1, "stage": 1, "x": 2, "y": 1}
    assert np.isfinite([result["train_loss"], result["test_loss"], result["seconds"]]).all()
    assert {"versions", "device", "date", "config", "roles", "runs"} <= set(result)
    records = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    for figure in ("loss.png", "confusion.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed
    assert f"results are in {out}/: {', '.join(sorted(names(out)))}\n" in printed


def test_the_table_lists_what_the_regulariser_moves(out):
    def tables(l2: float) -> str:
        config = Config(widths="8", x=2, y=1, devices=8, l2=l2, out=out)
        return train.describe(train.prepare(config))

    assert tables(0.1).count("all_reduce") == tables(0.0).count("all_reduce") + 1


def test_the_saved_model_gives_the_same_predictions(run, out, numbers):
    assert run("--data", numbers) == 0
    saved = np.load(out / "model.npz")
    arrays = [(saved[f"W_{l}"], saved[f"b_{l}"]) for l in (1, 2)]
    model, mesh = tpmlp.MLP((3, 8, 1)), tpmlp.make_mesh(x=2)
    params = tpmlp.from_numpy(model, arrays, mesh)
    data = train.load(numbers)
    outputs = np.asarray(tpmlp.apply(model, params, data.x_test, mesh=mesh))
    loss = read_json(out / "summary.json")["test_loss"]
    assert tpmlp.evaluate(
        model, params, (data.x_test, data.y_test), loss="mse", mesh=mesh
    ).loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_array_equal(outputs, tpmlp.predict(model, params, data.x_test, mesh=mesh))
    np.testing.assert_array_equal(saved["mean"], data.mean)
    np.testing.assert_array_equal(saved["scale"], data.scale)


def test_several_seeds_give_several_runs_and_their_mean(run, out, capsys):
    assert run("--seeds", 2, "--seed", 5) == 0
    result = read_json(out / "summary.json")
    assert [one["seed"] for one in result["runs"]] == [5, 6]
    mean = np.mean([one["test_accuracy"] for one in result["runs"]])
    assert result["test_accuracy"] == pytest.approx(mean, abs=1e-6)
    assert "held-out accuracy of 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["cross_entropy", "logistic"])
def test_classes_of_text_are_written_down(run, out, fruit, loss):
    assert run("--data", fruit, "--loss", loss) == 0
    assert read_json(out / "classes.json") == {"fig": 0, "pear": 1}
    assert "confusion.png" in names(out)


def test_another_run_in_the_folder_leaves_nothing_of_the_first(run, out, numbers, capsys):
    out.mkdir()
    for name in (*train.FILES, "notes.txt"):
        (out / name).write_text("of the first run, or the user's")
    assert run("--data", numbers) == 0
    written = {"history.jsonl", "loss.png", "model.npz", "prediction.png", "summary.json"}
    assert names(out) == written | {"notes.txt"}
    assert f"results are in {out}/: {', '.join(sorted(written))}\n" in capsys.readouterr().out


def test_the_accuracy_of_many_labels_says_what_it_counts(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "m.npz", x=rng.normal(size=(24, 3)), y=rng.integers(0, 2, size=(24, 3)))
    assert run("--data", tmp_path / "m.npz") == 0
    assert "share of right outputs" in capsys.readouterr().out


# Ends before the end


@pytest.mark.parametrize("source", ["digits", "numbers"])
def test_a_diverged_run_is_status_1_and_valid_json(run, out, capsys, numbers, source):
    data = [] if source == "digits" else ["--data", numbers]
    assert run("--lr", 1e30, *data) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    result = read_json(out / "summary.json")
    assert last == f"diverged at step {result['steps']}: got lr=1e+30. Try lr=0.003."
    assert (result["stopped"], result["test_accuracy"], result["test_loss"]) == (
        "diverged",
        None,
        None,
    )
    assert names(out) == {"history.jsonl", "loss.png", "summary.json"}


def press(monkeypatch, step: int) -> None:
    """Press Ctrl-C when a step is recorded; 0 is while the step is compiled."""
    if step:
        write = tpmlp.JSONLines.__call__

        def press_there(self: Any, record: Any, params: Any) -> None:
            write(self, record, params)
            if record["step"] == step:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(tpmlp.JSONLines, "__call__", press_there)
        return
    begin = tpmlp.JSONLines.start

    def press_first(self: Any) -> None:
        begin(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tpmlp.JSONLines, "start", press_first)


def test_an_interrupted_run_writes_what_it_has(run, out, monkeypatch):
    press(monkeypatch, 2)
    assert run() == 0
    result = read_json(out / "summary.json")
    assert (result["steps"], result["stopped"]) == (2, "interrupted")
    assert {"confusion.png", "loss.png", "model.npz"} <= names(out)


def test_ctrl_c_while_compiling_is_one_line_and_status_130(run, monkeypatch, capsys):
    press(monkeypatch, 0)
    assert run() == 130
    assert capsys.readouterr().err == "interrupted: the run has no result.\n"


def test_ctrl_c_while_reading_is_one_line_and_status_130(run, monkeypatch, capsys):
    def pressed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load", pressed)
    assert run() == 130
    assert capsys.readouterr().err == "interrupted: the run has no result.\n"


def test_ctrl_c_in_the_second_run_keeps_the_first(run, out, monkeypatch):
    sound = train.measure

    def pressed_second(job: Any, seed: int, history_file: Any) -> Any:
        if seed:
            raise KeyboardInterrupt
        return sound(job, seed, history_file)

    monkeypatch.setattr(train, "measure", pressed_second)
    assert run("--seeds", 3) == 0
    result = read_json(out / "summary.json")
    assert ([one["seed"] for one in result["runs"]], result["stopped"]) == ([0], "interrupted")
