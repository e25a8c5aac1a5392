"""Entanglement of one set of features as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_methods.errors import InvalidArgument, check_choice
from lightning_methods.snnl.functional import Distance, anchors_and_chance, class_labels, soft_nearest_neighbor_loss
from lightning_methods.snnl.temperature import median_temperature, optimal_temperature


class Entanglement(Metric):
    r"""Average the soft nearest neighbour loss of batches, each weighted by its number of anchors.

    .. math:: \frac{\sum_b M_b\, l_{sn}(x_b, y_b, T_b)}{\sum_b M_b} \quad \text{divided, if normalised, by} \quad
        \frac{\sum_b M_b\, \text{chance}(y_b)}{\sum_b M_b}

    The loss is a statistic of a batch: values of other batch sizes or class balances are comparable only when
    normalised, and then approximately. 1 is chance, less is disentangled, more is anti-clustered.

    Shapes:
        `update` takes features `(B, ...)` and labels `(B,)`; `compute` returns a scalar in float64.

    Args:
        temperature: `"optimal"` (the minimum over temperatures, equation 2), `"median"` distance, or a number.
        distance: squared Euclidean or `1 - cos`.
        normalized: whether to divide by the chance level.
        ignore_index: label of samples to leave out.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        InvalidArgument: for settings that cannot be read, soft targets, or `compute` before any anchor was seen.

    Example:
        >>> import torch
        >>> metric = Entanglement(temperature=1.0, normalized=False)
        >>> metric.update(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]))
        >>> print(f"{metric.compute():.4f}")
        0.0245
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    sum_loss: Tensor
    sum_chance: Tensor
    anchors: Tensor

    def __init__(
        self,
        temperature: float | Literal["optimal", "median"] = "optimal",
        *,
        distance: Distance = "sqeuclidean",
        normalized: bool = True,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("distance", distance, ("sqeuclidean", "cosine"))
        if isinstance(temperature, str):
            check_choice("temperature", temperature, ("optimal", "median"))
        elif not temperature > 0:
            raise InvalidArgument(f"temperature={temperature!r}: a positive number is needed, 'optimal' or 'median'.")
        self.temperature = temperature
        self.distance: Distance = distance
        self.normalized = normalized
        self.ignore_index = ignore_index
        for name in ("sum_loss", "sum_chance", "anchors"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch; one without two samples of a class adds nothing."""
        features, classes = features.detach(), class_labels(labels)
        settings: dict[str, Any] = {"distance": self.distance, "ignore_index": self.ignore_index}
        anchors, chance = anchors_and_chance(classes, self.ignore_index)
        if self.temperature == "optimal":
            loss = optimal_temperature(features, classes, **settings)[1]
        else:
            temperature: Any = self.temperature
            if temperature == "median":
                kept = features if self.ignore_index is None else features[classes != self.ignore_index]
                temperature = median_temperature(kept, distance=self.distance)
            loss = soft_nearest_neighbor_loss(features, classes, temperature, **settings)
        self.sum_loss += anchors * loss.double()
        self.sum_chance += anchors * chance
        self.anchors += anchors

    def compute(self) -> Tensor:
        """Return the average, divided by that of the chance level if normalised."""
        if self.anchors == 0:
            raise InvalidArgument(
                "Entanglement saw no batch with two samples of one class. Use larger batches, or batches that hold "
                "several samples of a class."
            )
        if not self.normalized:
            return self.sum_loss / self.anchors
        # one class only: nothing to entangle, and 0 by chance as well
        return torch.where(self.sum_chance > 0, self.sum_loss / self.sum_chance, torch.zeros_like(self.sum_loss))

    def set_dtype(self, dst_type: str | torch.dtype) -> Entanglement:
        """Keep the sums in float64: in half precision they would stop growing."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # .to(torch.bfloat16), as Lightning's true half precision does, casts states past set_dtype: only move them
        this = super()._apply(fn, exclude_state=(*exclude_state, *self._defaults))
        defaults: dict[str, Any] = self._defaults
        for name, default in defaults.items():
            setattr(self, name, getattr(self, name).to(self.device))
            defaults[name] = default.to(self.device)
        return this
