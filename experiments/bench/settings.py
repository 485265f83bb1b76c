"""What the three programs check of their settings."""

from pathlib import Path
from typing import Any

from experiments.bench.problem import Size
from experiments.command import SettingError, require


def parse_size(text: str) -> Size:
    """Return the size that a setting means.

    Raises:
        SettingError: it means none.
    """
    try:
        return Size.parse(text)
    except ValueError as error:
        raise SettingError(str(error)) from error


def require_at_least_one(config: Any, *names: str) -> None:
    """Refuse numbers below 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} must be at least 1", "Use 1 or more.", **{name: value})


def make_folder(out: Path) -> None:
    """Make the folder for the results.

    Raises:
        SettingError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"out must be a folder that can be made: got out={out} ({error.strerror}). "
            "Name another."
        ) from error
