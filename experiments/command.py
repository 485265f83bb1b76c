"""What the programs share on the command line: settings, and how they are refused.

A refusal is one line on standard error and exit status 2, before anything is printed or compiled.
"""

import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")

REFUSED = 2
# What a shell reports of a program that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED = 130


class SettingError(Exception):
    """A setting cannot be used; not a ValueError, around which tyro draws a box of many lines."""


def parse(config: type[T], module: str, args: Sequence[str] | None) -> T:
    """Return the settings that a command line gives.

    Args:
        config: a dataclass; its docstring is the help.
        module: the program, as in python -m module.
        args: the command line; None is the program's own.
    """
    return tyro.cli(config, prog=f"python -m {module}", args=args)


def require(holds: bool, rule: str, remedy: str, **got: object) -> None:
    """Refuse settings for which a rule does not hold.

    Raises:
        SettingError: rule, settings and remedy in one line.
    """
    if not holds:
        given = ", ".join(f"{name}={value}" for name, value in got.items())
        raise SettingError(f"{rule}: got {given}. {remedy}")


def refuse(error: Exception) -> int:
    """Print an error as one line and return the exit status."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return REFUSED
