"""The soft nearest neighbour loss as a term, or a probe, in the training of an unchanged module."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_methods.core._lightning import rank_zero_warn
from lightning_methods.core.losses import AuxiliaryLoss, LayerBatch, TrainingStep
from lightning_methods.core.taps import Pool
from lightning_methods.errors import InvalidArgument, NotFinite, check_choice
from lightning_methods.report import curves, heatmap, log_figure, log_table
from lightning_methods.snnl.functional import (
    Distance,
    anchor_losses,
    anchors_and_chance,
    class_entanglement,
    class_labels,
    feature_rows,
)
from lightning_methods.snnl.temperature import median_temperature, optimal_temperature, paper_temperature_step

Temperature = float | Literal["median", "optimal", "paper"]

#: (weight, temperature, largest share of the loss): a default that does not wreck a training, and the released MNIST
#: example
PRESETS: dict[str, tuple[float, Temperature, float | None]] = {
    "safe": (-0.03, "median", 0.1),
    "paper": (-10.0, 100.0, None),
}

_PAPER_INITIAL_TEMPERATURE = 100.0
# for the class-pair matrix: batches of an epoch, samples of a batch, and the most classes that make a picture
_CLASS_PAIR_BATCHES, _CLASS_PAIR_ROWS, _CLASS_PAIR_CLASSES = 10, 512, 1000
_QUANTITIES = ("value", "normalized", "temperature")


class SoftNearestNeighborLoss(AuxiliaryLoss):
    r"""Add the soft nearest neighbour loss of chosen layers to that of an unchanged module, or only measure it.

    .. math:: \mathcal{L} = \mathcal{L}_{module}(x, y) + \sum_l \alpha_l\, l_{sn}(h_l(x), y, T_l)
        \qquad \text{(equation 3)}

    A negative weight entangles the classes in the layer (the paper's recommendation for hidden layers), a positive one
    separates them, and 0 makes a probe: the curves of every layer with no effect on the training, bit for bit.

    Logs `snnl/value/<layer>`, `snnl/normalized/<layer>` (1 is chance, below disentangled), `snnl/temperature/<layer>`,
    `snnl/valid_fraction` (samples with another one of their class in the batch), and with a weight `snnl/loss` and
    `snnl/total_loss`; at the end of the fit a heat map of layers by epochs, the curves, a table, and for each layer
    which classes are entangled.

    Args:
        layers: names or patterns of the layers, see `lightning_methods.core.layers.match_layers`. All hidden layers in
            the paper, never the logits.
        preset: `"safe"` (weight -0.03 at the median distance, and never more than a tenth of the module's loss), or
            `"paper"`, the released MNIST example (weight -10 at the fixed temperature 100, meant for wide convolutional
            layers). `weight`, `temperature` and `max_share` override it.
        weight: :math:`\alpha`, for all layers or by layer name or pattern.
        max_share: the most that the terms may be of the module's loss in a step: where they would be more, the weights
            are scaled down by the logged `snnl/limit`. By default that of the preset, and no limit where a weight is
            given; `float("inf")` for none.
        temperature: a number in units of the distance; `"median"` of the distances in the batch; `"paper"` (one
            gradient step a batch on one persistent value per layer, from 100); `"optimal"` (the minimum, equation 2, as
            costly as some forty evaluations, hence the default where all weights are 0).
        distance: squared Euclidean or `1 - cos`.
        ignore_index: label of samples to leave out.
        chunk_size: see `soft_nearest_neighbor_loss`, for batches above some 8,000.
        figures_every_n_epochs: draw the figures also during the fit.
        warmup_steps: number of optimizer steps over which the weight grows linearly from 0.
        schedule: instead, a function of the optimizer step that returns a factor for the weight.
        labels: where the targets are in a batch: index, key or function.
        gather: whether DDP ranks join their rows, so that the training equals that of one process on the joined batch;
            without, each rank has the loss of its own rows, which is another statistic.
        every_n_steps: act in every n-th batch of an epoch only.
        log_on: log once per `"epoch"` (mean over its batches) or per `"step"`.
        log_prefix: first part of every logged key, to tell two callbacks on one layer apart.
        select: item of a layer that returns a tuple or a dict.
        pool: `"flatten"`, `"gap"`, `"none"` or a function, see `lightning_methods.core.taps.FeatureTaps`.
        on_repeat: `"error"`, `"last"` or `"all"` for a layer that runs several times in a step.
        capture: the layer's `"output"` or `"input"`.

    Raises:
        InvalidArgument: for settings that cannot be read.
        LayerNotFound: at the start of the fit, if a pattern matches no layer.
        UnsupportedTraining: at the start of the fit, for manual optimisation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import SoftNearestNeighborLoss
        >>> trainer = Trainer(callbacks=SoftNearestNeighborLoss("backbone.*", weight=-0.03), logger=False)

    Deviations from the paper: the default weight and temperature (see `preset`); the paper's temperature steps are kept
    positive; samples without another one of their class do not count.
    """

    method: ClassVar[str] = "snnl"

    def __init__(
        self,
        layers: str | list[str],
        *,
        preset: Literal["safe", "paper"] = "safe",
        weight: float | dict[str, float] | None = None,
        max_share: float | None = None,
        temperature: float | Literal["median", "optimal", "paper"] | None = None,
        distance: Distance = "sqeuclidean",
        ignore_index: int | None = None,
        chunk_size: int | None = None,
        figures_every_n_epochs: int | None = None,
        warmup_steps: int = 0,
        schedule: Callable[[int], float] | None = None,
        labels: int | str | Callable[[Any], Tensor] | None = None,
        gather: bool = True,
        every_n_steps: int = 1,
        log_on: Literal["epoch", "step"] = "epoch",
        log_prefix: str = "snnl",
        select: int | str | None = None,
        pool: Pool = "flatten",
        on_repeat: Literal["error", "last", "all"] = "error",
        capture: Literal["output", "input"] = "output",
    ) -> None:
        check_choice("preset", preset, PRESETS)
        check_choice("distance", distance, ("sqeuclidean", "cosine"))
        if weight is None:
            weight = PRESETS[preset][0]
            max_share = PRESETS[preset][2] if max_share is None else max_share
        if temperature is None:
            # what is only measured should not depend on the scale of the features
            temperature = PRESETS[preset][1] if _has_effect(weight) else "optimal"
        if isinstance(temperature, str):
            check_choice("temperature", temperature, ("median", "optimal", "paper"))
        elif not temperature > 0:
            raise InvalidArgument(
                f"temperature={temperature!r}: a positive number is needed, in units of the distance, or 'median', "
                f"'optimal' or 'paper'."
            )
        for name, number in (("chunk_size", chunk_size), ("figures_every_n_epochs", figures_every_n_epochs)):
            if number is not None and number < 1:
                raise InvalidArgument(f"{name}={number}: at least 1 is needed, or None.")
        super().__init__(
            layers,
            weight=weight,
            max_share=max_share,
            warmup_steps=warmup_steps,
            schedule=schedule,
            labels=labels,
            gather=gather,
            every_n_steps=every_n_steps,
            log_on=log_on,
            log_prefix=log_prefix,
            select=select,
            pool=pool,
            on_repeat=on_repeat,
            capture=capture,
        )
        self.temperature: Temperature = temperature
        self.distance: Distance = distance
        self.ignore_index = ignore_index
        self.chunk_size = chunk_size
        self.figures_every_n_epochs = figures_every_n_epochs
        self.figure_paths: list[Path] = []

    def reset(self) -> None:
        """Forget what was measured in an earlier fit."""
        super().reset()
        #: per layer and quantity the mean of each epoch, in execution order of the layers
        self.history: dict[str, dict[str, list[float]]] = {}
        #: per layer the share of each class among the neighbours of each class in the latest epoch
        self.class_pairs: dict[str, Tensor] = {}
        self._inverse: dict[str, Tensor] = {}  # the paper's t of each layer
        self._pair_batches: dict[str, int] = {}

    # -- the term ----------------------------------------------------------------------------------------------------

    def see_labels(self, labels: Tensor) -> dict[str, Tensor | float]:
        """Prepare what all layers share: classes, which samples count, and the chance level."""
        self._classes = class_labels(labels)
        self._keep = None if self.ignore_index is None else self._classes != self.ignore_index
        self._anchors, self._chance = anchors_and_chance(self._classes, self.ignore_index)
        return {"valid_fraction": self._anchors / max(len(self._classes), 1)}

    def layer_term(self, layer: str, batch: LayerBatch, step: TrainingStep) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return this rank's share of the layer's loss, and the layer's value, normalised value and temperature."""
        features = feature_rows(batch.features)
        temperature = self._temperature_of(layer, features)
        losses, _ = anchor_losses(
            features,
            self._classes,
            temperature,
            distance=self.distance,
            keep=self._keep,
            rows=batch.rows,
            chunk_size=self.chunk_size,
        )
        # DDP averages over the ranks: each returns ranks / M of its own anchors' sum
        term = losses.sum() * batch.ranks / self._anchors.clamp(min=1)
        quantities: dict[str, Tensor | float] = {
            "value": term.detach(),
            "normalized": term.detach() / self._chance.clamp(min=1e-12).to(term.dtype),
            "temperature": torch.as_tensor(temperature, dtype=torch.float32, device=term.device).detach(),
        }
        self._remember_class_pairs(layer, features.detach())
        return term, quantities

    def _temperature_of(self, layer: str, features: Tensor) -> float | Tensor:
        """Return the temperature from the rows of all ranks, hence the same one on every rank."""
        if self.temperature == "median":
            return median_temperature(features if self._keep is None else features[self._keep], distance=self.distance)
        if self.temperature == "optimal":
            return optimal_temperature(features, self._classes, distance=self.distance, ignore_index=self.ignore_index)[
                0
            ]
        if self.temperature == "paper":
            t = self._inverse.get(layer, torch.ones((), dtype=torch.float64))
            t = paper_temperature_step(
                features,
                self._classes,
                t.to(features.device),
                initial_temperature=_PAPER_INITIAL_TEMPERATURE,
                distance=self.distance,
                ignore_index=self.ignore_index,
                chunk_size=self.chunk_size,
            )
            self._inverse[layer] = t
            return _PAPER_INITIAL_TEMPERATURE / t
        return self.temperature

    @torch.no_grad()
    def _remember_class_pairs(self, layer: str, features: Tensor) -> None:
        seen = self._pair_batches.get(layer, 0)
        if seen < _CLASS_PAIR_BATCHES:
            if not seen:
                self.class_pairs.pop(layer, None)  # that of the epoch before
            self._pair_batches[layer] = seen + 1
            self._add_class_pairs(layer, features, seed=seen)

    def _add_class_pairs(self, layer: str, rows: Tensor, seed: int) -> None:
        classes = self._classes
        if self._keep is not None:
            classes, rows = classes[self._keep], rows[self._keep]
        if len(classes) > _CLASS_PAIR_ROWS:
            # drawn with random numbers of its own: every so-manieth row could miss a class
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(classes), generator=generator)[:_CLASS_PAIR_ROWS].to(classes.device)
            classes, rows = classes[chosen], rows[chosen]
        if len(classes) < 2 or int(classes.min()) < 0 or int(classes.max()) >= _CLASS_PAIR_CLASSES:
            return
        before = self.class_pairs.get(layer, torch.zeros(0, 0))
        # at the temperature that tells the classes apart best, whatever the term uses; float32 would place a flat
        # minimum differently on every machine
        rows = rows.double()
        temperature, _ = optimal_temperature(rows, classes, distance=self.distance)
        size = max(int(classes.max()) + 1, len(before))
        pairs = class_entanglement(rows, classes, temperature, distance=self.distance, num_classes=size).cpu()
        # sums of rows, divided when drawn: a class may be absent from a batch
        pairs[: len(before), : len(before)] += before
        self.class_pairs[layer] = pairs

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def see_epoch(self, means: dict[str, float]) -> None:
        """Add the epoch to the history."""
        for key, mean in means.items():
            quantity, _, layer = key.partition("/")
            if layer:
                self.history.setdefault(layer, {}).setdefault(quantity, []).append(mean)
            if quantity == "value" and not math.isfinite(mean):
                rank_zero_warn(
                    f"SoftNearestNeighborLoss: the loss of the layer {layer!r} is not finite in epoch {self._epoch}; "
                    f"its features are not. Lower the learning rate or the weight.",
                    category=NotFinite,
                )
        self._pair_batches = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch, and draw the figures if asked to."""
        super().on_train_epoch_end(trainer, pl_module)
        every = self.figures_every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            self.show(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the figures and the table of the whole fit."""
        self.show(trainer)

    def show(self, trainer: Any) -> None:
        """Send figures and table to the loggers, or to files where no logger takes them."""
        if not self.history:
            return
        layers = list(self.history)
        normalized = {layer: self.history[layer]["normalized"] for layer in layers}
        epochs = max(len(values) for values in normalized.values())
        matrix = [[float("nan")] * (epochs - len(values)) + values for values in normalized.values()]
        written = log_figure(
            trainer,
            f"{self.log_prefix}/layers_by_epoch",
            heatmap(
                matrix,
                layers,
                range(epochs),
                title="Entanglement of the classes in each layer",
                value_label="loss / chance",
                x_label="epoch",
                vmin=0.0,
            ),
        )
        series = {layer: (list(range(epochs - len(v), epochs)), v) for layer, v in normalized.items()}
        written += log_figure(
            trainer,
            f"{self.log_prefix}/curves",
            curves(
                series,
                title="Entanglement of the classes in each layer",
                x_label="epoch",
                y_label="soft nearest neighbour loss / chance",
                reference={"chance": 1.0},
            ),
        )
        for layer, pairs in self.class_pairs.items():
            shares = pairs / pairs.sum(1, keepdim=True)  # NaN, drawn grey, for a class that was absent
            figure = heatmap(
                shares,
                title=f"Whose neighbours are in which class: {layer}",
                value_label="share of the soft neighbours",
                x_label="class of the neighbours",
                y_label="class of the sample",
                vmin=0.0,
            )
            written += log_figure(trainer, f"{self.log_prefix}/class_pairs/{layer}", figure)
        rows = [
            [layer, *(self.history[layer][quantity][i] for quantity in _QUANTITIES for i in (0, -1))]
            for layer in layers
        ]
        columns = ["layer", *(f"{quantity}, {when} epoch" for quantity in _QUANTITIES for when in ("first", "last"))]
        written += log_table(trainer, f"{self.log_prefix}/layers", columns, rows)
        self.figure_paths = written

    def state_dict(self) -> dict[str, Any]:
        """Return the temperatures, the history and the running epoch, as tensors and plain builtins."""
        return {
            **super().state_dict(),
            "inverse_temperatures": {layer: t.cpu() for layer, t in self._inverse.items()},
            "history": {layer: {k: list(v) for k, v in series.items()} for layer, series in self.history.items()},
            "class_pairs": dict(self.class_pairs),
            "pair_batches": dict(self._pair_batches),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._inverse = dict(state_dict["inverse_temperatures"])
        self.history = state_dict["history"]
        self.class_pairs = state_dict["class_pairs"]
        self._pair_batches = state_dict["pair_batches"]


def _has_effect(weight: float | dict[str, float]) -> bool:
    return any(weight.values()) if isinstance(weight, dict) else weight != 0
