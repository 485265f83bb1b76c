"""Faults planted into the running package: one edit of a module's source, in force for a block."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tpmlp.graph.rules.rule import Rule


@contextmanager
def planted(file: str, old: str, new: str) -> Iterator[None]:
    """Run a block with a module of tpmlp edited; whoever imported its names has the new ones.

    Args:
        file: in tpmlp/.
        old: text that occurs there once.
        new: what replaces it.
    """
    module = importlib.import_module(f"tpmlp.{file.removesuffix('.py').replace('/', '.')}")
    source = inspect.getsource(module)
    assert source.count(old) == 1
    before = dict(vars(module))
    exec(compile(source.replace(old, new), file, "exec"), vars(module))
    swapped = {
        id(value): vars(module)[name] for name, value in before.items() if _is_own(value, module)
    }
    places = _rebind(swapped)
    _forget()
    try:
        yield
    finally:
        for namespace, name, value in places:
            namespace[name] = value
        vars(module).update(before)
        _forget()


def _is_own(value: Any, module: ModuleType) -> bool:
    """Return whether a value is a module's own function or class, or a rule that holds some."""
    is_defined = callable(value) and getattr(value, "__module__", None) == module.__name__
    return is_defined or isinstance(value, Rule)


def _rebind(swapped: dict[int, Any]) -> list[tuple[dict[Any, Any], Any, Any]]:
    """Replace values wherever a module, or a table of one, has them; return where, and what was."""
    places = []
    for module in _modules():
        tables = [table for table in vars(module).values() if type(table) is dict]
        for namespace in [vars(module), *tables]:
            for name, value in list(namespace.items()):
                if id(value) in swapped and swapped[id(value)] is not value:
                    places.append((namespace, name, value))
                    namespace[name] = swapped[id(value)]
    return places


def _forget() -> None:
    """Empty the package's caches: they hold what was made by the other source."""
    for module in _modules():
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _modules() -> list[ModuleType]:
    return [m for name, m in sys.modules.items() if name.partition(".")[0] == "tpmlp" and m]
