"""Optional packages: imported where they are used, with a clear message when they are missing."""

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str, user: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: for example "matplotlib.figure".
        extra: the extra of tpmlp that brings it.
        user: what needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.

    Examples:
        >>> require("no_such_thing", extra="plot", user="MLP.plot")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: MLP.plot needs no_such_thing: pip install 'tpmlp[plot]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        message = f"{user} needs {package}: pip install 'tpmlp[{extra}]'"
        raise ModuleNotFoundError(message, name=package) from error
