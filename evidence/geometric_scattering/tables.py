"""The tables of README.md, from the results."""

from __future__ import annotations

import json
from pathlib import Path


def markdown(folder: Path) -> str:
    """Return what is known of each part."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.json")))


def load(folder: Path, part: str) -> dict[str, dict]:
    """Return the results of a part, nothing where it was not run."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
