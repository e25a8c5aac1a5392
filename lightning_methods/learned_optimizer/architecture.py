"""What a learned optimizer is made of: its inputs, the sizes of its network, and how its outputs become a step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice
from lightning_methods.learned_optimizer.functional import DECAYS, SMALL_FC_DECAYS, TIMES

Features = Literal["paper", "signal", "small_fc"]

_ELEMENTS = {"paper": 8, "signal": 8, "small_fc": 28}
_OF_A_TENSOR = {"paper": 0, "signal": 8, "small_fc": 0}
_EPS = {"paper": 1e-5, "signal": 1e-12, "small_fc": 1e-5}


@dataclass(frozen=True)
class Architecture:
    """The form of a learned optimizer; its weights are one vector of `size` numbers.

    Args:
        features: `"paper"` (19 inputs: gradient, parameter, six momenta, eleven of time), `"signal"` (27: those and
            eight of each tensor that are free of scale), `"small_fc"` (39, Metz et al. 2022).
        hidden_size: units a hidden layer. The paper has 32.
        hidden_layers: 1 (the paper) or 2.
        step_mult: factor of the step. The paper's code has 0.001. With `normalize_step` the root mean square of a step
            that the network leaves alone.
        exp_mult: factor in the exponent of the second output. The paper's code has 0.001.
        normalize_step: scale the step of each tensor to a root mean square that a third output chooses; the direction
            starts from the momentum of decay 0.9.

    Raises:
        InvalidArgument: if a setting is out of range.

    Example:
        >>> Architecture().size, Architecture(hidden_layers=2).size, Architecture("small_fc").size
        (706, 1762, 1353)
    """

    features: Features = "paper"
    hidden_size: int = 32
    hidden_layers: int = 1
    step_mult: float = 1e-3
    exp_mult: float = 1e-3
    normalize_step: bool = False

    def __post_init__(self) -> None:
        check_choice("features", self.features, _ELEMENTS)
        if self.hidden_layers not in (1, 2):
            raise InvalidArgument(f"hidden_layers={self.hidden_layers}: 1 or 2 is needed.")
        if self.hidden_size < 1:
            raise InvalidArgument(f"hidden_size={self.hidden_size}: a positive number is needed.")
        for name in ("step_mult", "exp_mult"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidArgument(f"{name}={getattr(self, name)}: a finite number is needed.")

    @property
    def elements(self) -> int:
        """Return the number of inputs that each element has of its own."""
        return _ELEMENTS[self.features]

    @property
    def inputs(self) -> int:
        """Return the number of all inputs."""
        return self.elements + len(TIMES) + _OF_A_TENSOR[self.features]

    @property
    def outputs(self) -> int:
        """Return the number of outputs: direction and magnitude, and the step size where steps are normalised."""
        return 3 if self.normalize_step else 2

    @property
    def eps(self) -> float:
        """Return what is added to mean squares before inputs are normalised."""
        return _EPS[self.features]

    @property
    def momentum(self) -> int:
        """Return which of the inputs of an element is the momentum of decay 0.9."""
        return 2 + DECAYS.index(0.9) if self.features != "small_fc" else 2

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of the weights, in their order."""
        sizes = [self.inputs] + [self.hidden_size] * self.hidden_layers
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.hidden_layers):
            shapes |= {f"w{i}": (sizes[i], sizes[i + 1]), f"b{i}": (sizes[i + 1],)}
        shapes |= {"w_out": (self.hidden_size, self.outputs), "b_out": (self.outputs,)}
        if self.features == "small_fc":
            shapes |= {name: (len(decays),) for name, decays in SMALL_FC_DECAYS.items()}
        return shapes

    @property
    def size(self) -> int:
        """Return the number of weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector of weights, as views.

        Shapes:
            `(..., size)` -> `(..., *shape)` each.

        Raises:
            ShapeMismatch: if it is not of that size.
        """
        if not theta.ndim or theta.shape[-1] != self.size:
            raise ShapeMismatch(f"The weights are {tuple(theta.shape)}; {self.describe()} has {self.size} of them.")
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = theta.split(sizes, -1)
        return {n: x.unflatten(-1, s) for (n, s), x in zip(self.shapes.items(), parts, strict=True)}

    def initial(self, generator: torch.Generator) -> Tensor:
        """Return random weights: normal, cut at two deviations of one over the root of the fan-in; biases are zero."""
        parts = []
        for name, shape in self.shapes.items():
            x = torch.zeros(shape)
            if name.startswith("w"):
                torch.nn.init.trunc_normal_(
                    x,
                    std=1 / math.sqrt(shape[0]),
                    a=-2 / math.sqrt(shape[0]),
                    b=2 / math.sqrt(shape[0]),
                    generator=generator,
                )
            parts.append(x.flatten())
        return torch.cat(parts)

    def describe(self) -> str:
        """Return it in words.

        Example:
            >>> Architecture().describe()
            "features='paper' (19 inputs), 1 hidden layer of 32"
        """
        layers = f"{self.hidden_layers} hidden layer{'s' if self.hidden_layers > 1 else ''} of {self.hidden_size}"
        form = ", normalised steps" if self.normalize_step else ""
        return f"features={self.features!r} ({self.inputs} inputs), {layers}{form}"

    def to_dict(self) -> dict[str, Any]:
        """Return its settings as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Architecture:
        """Return it from plain values.

        Raises:
            InvalidArgument: if a name is unknown.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(settings) - known:
            raise InvalidArgument(f"An architecture has no {sorted(unknown)}; it has {sorted(known)}.")
        return cls(**settings)
