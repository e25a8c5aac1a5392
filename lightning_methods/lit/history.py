"""What was measured epoch by epoch, for curves that are drawn at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class History:
    """Values by epoch under their keys; an epoch that is measured again, after resuming, counts once.

    Example:
        >>> history = History()
        >>> history.add(0, {"lit/ir/layer1": 2.0})
        >>> history.add(1, {"lit/ir/layer1": 1.0})
        >>> history.lines("lit/ir/")
        {'layer1': ([0, 1], [2.0, 1.0])}
    """

    def __init__(self) -> None:
        self._values: dict[str, dict[int, float]] = {}

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add the values of an epoch."""
        for key, value in values.items():
            self._values.setdefault(key, {})[epoch] = value

    def lines(self, prefix: str) -> dict[str, tuple[list[int], list[float]]]:
        """Return epochs and values of each key that begins so, under what follows."""
        return {
            key.removeprefix(prefix): (list(line), list(line.values()))
            for key, line in self._values.items()
            if key.startswith(prefix)
        }

    def last(self, key: str) -> float | None:
        """Return the last value of a key."""
        line = self._values.get(key)
        return list(line.values())[-1] if line else None

    def state_dict(self) -> dict[str, Any]:
        """Return plain builtins."""
        return {key: dict(line) for key, line in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._values = {key: dict(line) for key, line in state.items()}
