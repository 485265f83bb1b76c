"""What people see: a bar where the output is a terminal, few lines elsewhere, or nothing."""

import re
import sys

import pytest

from tpmlp.train.progress import MAX_LINES, open_progress

NUMBERS = {"loss": 0.25, "accuracy": 0.5, "validation_accuracy": 0.75}


def test_nothing_is_shown_when_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(False, 2) as progress:
        progress.update(1, 8, 1.0, NUMBERS)
        progress.say("hello")
    assert capsys.readouterr().out == ""


def test_a_line_has_step_numbers_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(True, 4) as progress:
        progress.update(1, 3000, 30.0, NUMBERS)
    assert capsys.readouterr().out == (
        "step 1/4  loss 0.25  accuracy 0.500  validation accuracy 0.750  100 samples/s  "
        "0:01:30 left\n"
    )


@pytest.mark.parametrize("step_s", [0.001, 0.3, 100.0])
@pytest.mark.parametrize("num_steps", [1, 7, 40, 1001])
def test_lines_are_few_and_the_last_step_has_one(
    capsys: pytest.CaptureFixture[str], num_steps: int, step_s: float
) -> None:
    with open_progress(True, num_steps) as progress:
        for step in range(1, num_steps + 1):
            progress.update(step, step, step * step_s, NUMBERS)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= MAX_LINES + 1
    assert len(lines) <= num_steps * step_s + 2
    assert lines[-1].startswith(f"step {num_steps}/{num_steps}  ")


@pytest.mark.parametrize("columns", ["40", "80", "150"])
def test_a_terminal_of_any_width_gets_a_bar_and_all_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", columns)
    with open_progress(True, 4) as progress:
        progress.update(4, 3000, 30.0, NUMBERS)
        progress.say("done [ok]")
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    out = " ".join(out.split())
    for part in ("4/4", "0:00:00 left", "loss 0.25", "accuracy 0.500", "samples/s", "done [ok]"):
        assert part in out


def test_without_rich_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"needs rich: pip install 'tpmlp\[train\]'"),
        open_progress(True, 4),
    ):
        pass
