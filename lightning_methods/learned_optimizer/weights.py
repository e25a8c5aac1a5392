"""Weights of learned optimizers: files that say what they are, some of them shipped with the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, did_you_mean
from lightning_methods.learned_optimizer.architecture import Architecture

_FOLDER = Path(__file__).parent / "weights"
_FORMAT = "lightning-methods/learned-optimizer/1"


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a learned optimizer.

    Attributes:
        name: of the file, without its ending.
        architecture: what they belong to.
        theta: `(size,)` float32 on the CPU.
        card: how they were made and what they were measured at.
    """

    name: str
    architecture: Architecture
    theta: Tensor
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        theta = self.theta
        if theta.shape != (self.architecture.size,):
            raise ShapeMismatch(
                f"The weights {self.name!r} are {tuple(theta.shape)}; {self.architecture.describe()} has "
                f"{self.architecture.size} of them."
            )
        if not bool(theta.isfinite().all()):
            raise InvalidArgument(f"The weights {self.name!r} hold values that are not finite.")

    @property
    def horizon(self) -> int | None:
        """Return the longest inner training that they were made on, where the card says."""
        return self.card.get("horizon")

    @property
    def clock(self) -> int | None:
        """Return the step at which the guard lets time stand still; the horizon, where the card says no other."""
        return self.card.get("clock", self.horizon)

    @property
    def width(self) -> int | None:
        """Return the most inputs of a unit that the guard leaves to them alone, where the card says."""
        return self.card.get("width")

    @property
    def fingerprint(self) -> str:
        """Return a digest of the numbers and of what they belong to."""
        text = json.dumps(self.architecture.to_dict(), sort_keys=True).encode()
        return hashlib.sha256(text + self.theta.float().numpy().tobytes()).hexdigest()


def available_weights() -> list[str]:
    """Return the names of the shipped weights, for `LearnedOptimizer(weights=...)`.

    Example:
        >>> "metz19" in available_weights()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def weights_card(name: str) -> dict[str, Any]:
    """Return how weights were made (tasks, horizon, seeds, command) and what they were measured at.

    Args:
        name: of shipped weights, or the path of a file.

    Raises:
        InvalidArgument: if there are no such weights.

    Example:
        >>> sorted(weights_card("metz19"))[:3]
        ['clock', 'command', 'cpu_seconds']
    """
    return dict(load_weights(name).card)


def load_weights(source: str | Path | Mapping[str, Any] | Weights) -> Weights:
    """Return weights by name, from a file, or from what `save_weights` writes as a mapping.

    Raises:
        InvalidArgument: if there is no such name or file, or it is no such file; names are listed.
        ShapeMismatch: if the numbers do not fit the architecture.

    Example:
        >>> load_weights("metz19").architecture.inputs
        19
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return _from_mapping("given", source)
    path = _FOLDER / f"{source}.json"
    if not path.is_file():
        path = Path(source)
    if not path.is_file():
        raise InvalidArgument(
            f"There are no weights {str(source)!r}: neither shipped nor a file. "
            f"{did_you_mean(str(source), available_weights())} Shipped: {', '.join(available_weights())}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgument(f"{path} is no file of weights, as MetaTraining.export writes: {error}") from error
    return _from_mapping(path.stem, content)


def save_weights(path: str | Path, weights: Weights) -> Path:
    """Write weights as JSON, every number exactly, and return the path.

    Args:
        path: with the ending `.json`.
        weights: what to write.

    Raises:
        InvalidArgument: if the path has another ending.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise InvalidArgument(f"{path}: weights are saved as a .json file.")
    content = {
        "format": _FORMAT,
        "architecture": weights.architecture.to_dict(),
        "card": dict(weights.card),
        "theta": [float(f"{x:.9g}") for x in weights.theta.tolist()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def _from_mapping(name: str, content: Any) -> Weights:
    if not isinstance(content, Mapping) or not {"architecture", "theta"} <= set(content):
        raise InvalidArgument(
            f"{name!r} is no file of weights: 'architecture' and 'theta' are needed, as MetaTraining.export writes."
        )
    theta = torch.as_tensor(content["theta"], dtype=torch.float32).detach().cpu().clone()
    return Weights(name, Architecture.from_dict(dict(content["architecture"])), theta, dict(content.get("card", {})))
