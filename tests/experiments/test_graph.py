"""make graph: a failure means that its files, its tables or its comparison are wrong."""

import json

import pytest

from experiments import graph


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("graph")
    config = graph.Config(
        width=16,
        tokens=8,
        blocks=1,
        code=96,
        steps=12,
        batch_size=16,
        out=out,
        deep=2,
        deep_width=16,
    )
    rows = graph.run(config)
    return out, rows


def test_sharded_training_is_unsharded_training_step_for_step(written):
    _, rows = written
    assert {row["model"] for row in rows} == {"language model", "sparse autoencoder"}
    for row in rows:
        assert row["sharded"] == pytest.approx(row["one_device"], rel=1e-3)


def test_both_models_learn(written):
    _, rows = written
    for name in ("language model", "sparse autoencoder"):
        losses = [row["sharded"] for row in rows if row["model"] == name]
        assert losses[-1] < 0.95 * losses[0]


def test_the_files_hold_what_was_measured(written):
    out, rows = written
    assert json.loads((out / "graph.json").read_text())["rows"] == rows
    for name in ("losses", "autoencoder"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert "</svg>" in (out / f"{name}.svg").read_text()


def test_the_loss_of_knowing_frequencies_is_the_entropy():
    assert graph.byte_entropy(graph.np.array([0, 1, 2, 3])) == pytest.approx(4**0.5 * 0.6931472)


def test_a_setting_that_cannot_be_is_refused(capsys):
    assert graph.main(["--steps", "0"]) == 2
    assert "steps must be at least 1: got steps=0" in capsys.readouterr().err
