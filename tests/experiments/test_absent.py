"""make absent: a failure means that its table says of a program what is not in it.

On CPU devices, which are there; the compilers for others are not installed with the suite.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from experiments.absent import __main__ as absent
from experiments.absent import hardware
from experiments.absent.programs import Program, measure, programs
from tpmlp.planner import topology

SMALL: dict[str, Any] = {
    "hardware": "8 CPU",
    "layers": 3,
    "width": 32,
    "batch": 16,
    "dtype": "float32",
    "compute_dtype": "float32",
}
PROGRAMS = {
    "shard": Program(**SMALL),
    "gathered": Program(**SMALL, keep="gathered"),
    "ring": Program(**SMALL, overlap="ring"),
    "update": Program(**SMALL, result="update"),
}


@pytest.fixture(scope="module")
def rows():
    return {name: measure(program) for name, program in PROGRAMS.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_compiled_moves_what_was_predicted(rows, name):
    row = rows[name]
    assert row["bytes"] == row["bytes_predicted"] > 0
    assert row["counts"] == row["counts_predicted"]
    assert row["turned"] == 0


def test_what_is_kept_shows_in_the_gathers(rows):
    assert rows["shard"]["counts"]["all_gather"] == 3 * 3
    assert rows["gathered"]["counts"]["all_gather"] == 2 * 3
    assert rows["ring"]["permutes"] > 0


def test_an_update_takes_the_memory_of_the_parameters(rows):
    blocks = 3 * (32 * 32 + 32) * 4 // 8
    assert rows["update"]["alias_bytes"] == blocks
    assert rows["shard"]["alias_bytes"] == 0


def test_one_array_a_layer_is_counted_for_one_device():
    assert PROGRAMS["shard"].kept_bytes == 2 * 32 * 16 * 4 // 8


def test_the_program_writes_its_record_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(absent, "programs", lambda *_: [PROGRAMS["shard"], PROGRAMS["gathered"]])
    assert absent.main(["--hardware", "8 CPU", "--out", str(tmp_path)]) == 0
    assert (
        "2 of 2: 3 layers of 32 for 8 CPU, float32, gathered, gradients" in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "absent.json").read_text())
    assert [row["keep"] for row in record["rows"]] == ["shard", "gathered"]
    assert record["versions"]["jax"]
    assert (tmp_path / "absent.png").read_bytes().startswith(b"\x89PNG")


RECORD = json.loads((Path(absent.__file__).parents[1] / "results" / "absent.json").read_text())


def kept(name, layers, **others):
    """Return the one row of the kept record that is described."""
    wanted = {"hardware": name, "layers": layers, "keep": "shard", "result": "gradients"}
    wanted = {**wanted, "overlap": "none", "dtype": "bfloat16", **others}
    (row,) = (r for r in RECORD["rows"] if wanted.items() <= r.items())
    return row


def test_the_kept_record_has_every_program_and_the_bytes_that_were_predicted():
    assert {
        Program(**{f.name: row[f.name] for f in fields(Program)}) for row in RECORD["rows"]
    } == {*programs(tuple(hardware.HARDWARE), (16, 64))}
    for row in RECORD["rows"]:
        as_written = row["turned"] == 0 or row["overlap"] != "none"
        assert (row["bytes"] == row["bytes_predicted"]) == as_written
    turned = {(r["hardware"], r["keep"]) for r in RECORD["rows"] if r["turned"] > 0}
    assert turned == {("256 v6e", "recompute"), ("8 v5p", "shard")}


@pytest.mark.parametrize("name", ["64 H100", "64 v5p", "256 v6e"])
def test_gathers_stay_apart_in_the_kept_record(name):
    gathered, shard = kept(name, 64, keep="gathered"), kept(name, 64)
    assert shard["counts"]["all_gather"] == 3 * 64
    assert gathered["counts"]["all_gather"] == 2 * 64
    # The second gather is a saving of nearly one gathered array a layer.
    assert shard["temp_bytes"] < 0.1 * gathered["temp_bytes"]


@pytest.mark.parametrize(("name", "least"), [("8 H100", 52), ("8 v5p", 47)])
@pytest.mark.parametrize("overlap", ["ring", "bidirectional_ring"])
def test_hops_of_rings_overlap_products_in_the_kept_record(name, least, overlap):
    row = kept(name, 4, overlap=overlap)
    assert row["permutes"] == 56
    assert row["permutes_overlapping"] >= least


def test_a_compiler_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda _: None)
    assert absent.main(["--hardware", "64 v5p"]) == 2
    error = capsys.readouterr().err
    assert "libtpu is not installed" in error
    assert "pip install 'tpmlp[tpu]'" in error
    assert error.count("\n") == 1


def test_unknown_hardware_is_refused(capsys):
    assert absent.main(["--hardware", "9 v5p"]) == 2
    assert "9 v5p" in capsys.readouterr().err


def test_every_platform_is_compiled_for_with_each_keep_it_has():
    found = programs(tuple(hardware.HARDWARE), (16,))
    assert len(set(found)) == len(found)
    keeps = {name: {p.keep for p in found if p.hardware == name} for name in hardware.HARDWARE}
    assert keeps["64 v5p"] == {"shard", "gathered", "recompute"}
    assert keeps["64 H100"] == {"shard", "gathered", "recompute"}
