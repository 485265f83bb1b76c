"""What every experiment writes down beside its numbers: versions, device, date.

The files are valid JSON, which has no NaN and no infinity: such a number is written as null.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jax", "jaxlib", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def save_json(path: Path, result: Mapping[str, Any], seconds: float) -> None:
    """Write a result with its circumstances, creating the folder.

    Args:
        path: the file; replaced.
        result: anything that `plain` takes.
        seconds: how long it took.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    record = {
        **plain(result),
        "seconds": round(seconds, 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": versions(),
    }
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as JSON has it.

    Arrays become lists, what JSON does not know (a path) becomes text, and a number that is not
    finite becomes None.

    Examples:
        >>> plain({"loss": float("nan"), "widths": (64, 10), "out": Path("results")})
        {'loss': None, 'widths': [64, 10], 'out': 'results'}
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)
