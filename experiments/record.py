"""What every experiment writes down beside its numbers: versions, device, date."""

import json
import platform
from collections.abc import Mapping
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
        result: plain data; paths and NumPy numbers are written as text and numbers.
        seconds: how long it took.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    record = {
        **result,
        "seconds": round(seconds, 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": versions(),
    }
    path.write_text(json.dumps(record, indent=1, default=_plain, allow_nan=True) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
