"""Class weights from an unlabelled target, with what they are worth."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_methods.core.batches import Selector, inputs_of, targets_of
from lightning_methods.core.gather import gather_rows
from lightning_methods.core.passes import batches
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    LightningMethodsWarning,
    ShapeMismatch,
    UnsupportedTraining,
    check_choice,
)
from lightning_methods.importance_weighting.functional import check_number, check_whole, two_logits
from lightning_methods.importance_weighting.shift import bbse, calibrate, condition_number, em_prior_shift, rlls
from lightning_methods.report import heatmap, log_figure, log_table


@dataclass(frozen=True)
class ShiftEstimate:
    """Estimated weights of the classes.

    Attributes:
        weights: `(C,)`, target share over source share.
        low, high: `(C,)`, the bootstrap interval.
        source_prior, target_prior: `(C,)`, shares of the classes.
        confusion: `(C, C)`, joint, rows are predictions, on the labelled source.
        condition_number: of the confusion matrix.
    """

    weights: Tensor
    low: Tensor
    high: Tensor
    source_prior: Tensor
    target_prior: Tensor
    confusion: Tensor
    condition_number: float


class LabelShift:
    r"""Estimate how the class shares of an unlabelled target differ from those of the labelled source.

    Under label shift the images of a class look alike in both and only the shares differ, so that the weight of class c
    is `P_target(c) / P_source(c)`. As `class_weights` of `ImportanceWeighting` it estimates them during the training,
    from the validation data and the target; `estimate` does the same for logits of any origin.

    Args:
        method: `"em"` (default; maximum likelihood on calibrated probabilities), `"bbse"` or `"rlls"`.
        target: in a training, the loader of unlabelled target batches, or `"test"` or `"predict"` for the trainer's
            own.
        source: in a training, labelled data that is not trained on. Default `"val"`.
        soft: whether BBSE and RLLS count probabilities rather than predictions. Default False.
        calibrated: whether EM calibrates the probabilities on the source. Default True.
        delta: of RLLS, see `rlls`. Default `1 / sqrt(n)` of the source.
        bootstrap: number of resamples for the intervals. Default 200; 0 for none.
        confidence: of the intervals. Default 0.95.
        start_epoch: weights are 1 before the end of so many epochs, since an untrained network knows nothing. Default
            1.
        every_n_epochs: how often the weights are estimated again. Default 1.
        seed: of the resamples.

    Raises:
        InvalidArgument: for settings outside of their range.

    Example:
        >>> z = 6 * torch.eye(2).repeat_interleave(50, 0)
        >>> y = torch.arange(2).repeat_interleave(50)
        >>> found = LabelShift("bbse", bootstrap=0).estimate(z, y, z[40:])
        >>> found.weights
        tensor([0.3333, 1.6667], dtype=torch.float64)
    """

    def __init__(
        self,
        method: Literal["em", "bbse", "rlls"] = "em",
        *,
        target: Any = "test",
        source: Any = "val",
        soft: bool = False,
        calibrated: bool = True,
        delta: float | None = None,
        bootstrap: int = 200,
        confidence: float = 0.95,
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        seed: int = 0,
    ) -> None:
        check_choice("method", method, ("em", "bbse", "rlls"))
        for name, number, least in (
            ("bootstrap", bootstrap, 0),
            ("start_epoch", start_epoch, 1),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            check_whole(name, number, least)
        check_number("confidence", confidence, 0, 1, open_="low high")
        if delta is not None:
            check_number("delta", delta, 0)
        check_whole("seed", seed, 0)
        self.method, self.target, self.source = method, target, source
        self.soft, self.calibrated, self.delta = soft, calibrated, delta
        self.bootstrap, self.confidence, self.seed = bootstrap, confidence, seed
        self.start_epoch, self.every_n_epochs = start_epoch, every_n_epochs

    def estimate(self, source_logits: Tensor, source_labels: Tensor, target_logits: Tensor) -> ShiftEstimate:
        """Return the weights of the classes with their bootstrap interval.

        Args:
            source_logits: `(N, C)` of labelled samples that were not trained on.
            source_labels: `(N,)` their classes.
            target_logits: `(M, C)` of unlabelled samples.

        Raises:
            ShapeMismatch: if they do not fit together.
            InvalidArgument: if there are no samples, logits are not finite, a class is absent from the source, or the
                matrix is singular.
        """
        zs, zt = two_logits(source_logits).cpu(), two_logits(target_logits).cpu()
        y, classes = source_labels.detach().cpu().long(), zs.shape[1]
        if zt.shape[1] != classes or y.shape != zs.shape[:1]:
            raise ShapeMismatch(
                f"source {tuple(zs.shape)}, labels {tuple(y.shape)}, target {tuple(zt.shape)}: (N, C), (N,), (M, C)."
            )
        if not bool(torch.isfinite(zs).all() and torch.isfinite(zt).all()):
            raise InvalidArgument("The logits are not all finite: nothing can be estimated from them.")
        whole = not source_labels.is_floating_point()
        if not whole or not len(zt) or not len(y) or not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise InvalidArgument(f"Samples of source and target, and labels from 0 to {classes - 1}, are needed.")
        absent = [c for c, n in enumerate(torch.bincount(y, minlength=classes).tolist()) if not n]
        if absent:
            raise InvalidArgument(
                f"The classes {absent} are absent from the labelled source: their weights are unknown."
            )
        generator = torch.Generator().manual_seed(self.seed)
        # row 0 counts every sample once: the estimate itself
        n_source = self._counts(len(y), generator, y)
        n_target = self._counts(len(zt), generator)
        ps, pt = self._votes(zs), self._votes(zt)
        confusion = torch.einsum("rn,ni,nj->rij", n_source, ps, F.one_hot(y, classes).double()) / len(y)
        prior = confusion.sum(1)
        if self.method == "em":
            shares = self._maximum_likelihood(zs, y, zt, prior[0], n_target)
            weights = shares / prior
        else:
            predicted = n_target @ pt / len(zt)
            first = self._solved(confusion[0], predicted[0], len(y))
            weights = torch.stack([first, *self._resampled(confusion, predicted, len(y))])
        edge = (1 - self.confidence) / 2
        low, high = torch.nanquantile(weights, torch.tensor([edge, 1 - edge], dtype=torch.float64), dim=0)
        found = weights[0] * prior[0]
        condition = condition_number(confusion[0])
        return ShiftEstimate(weights[0], low, high, prior[0], found / found.sum(), confusion[0], condition)

    def _counts(self, n: int, generator: torch.Generator, classes: Tensor | None = None) -> Tensor:
        """Return how often each sample occurs: once, then in the resamples, within classes so that none gets lost."""
        groups = [torch.arange(n)] if classes is None else [(classes == c).nonzero()[:, 0] for c in classes.unique()]
        counts = torch.ones(self.bootstrap + 1, n, dtype=torch.float64)
        for group in groups if self.bootstrap else ():
            drawn = group[torch.randint(len(group), (self.bootstrap, len(group)), generator=generator)]
            counts[1:, group] = 0
            counts[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        return counts

    def _votes(self, z: Tensor) -> Tensor:
        """Return what a sample counts for each class."""
        soft = self.soft and self.method != "em"
        return z.softmax(1) if soft else F.one_hot(z.argmax(1), z.shape[1]).double()

    def _maximum_likelihood(self, zs: Tensor, y: Tensor, zt: Tensor, prior: Tensor, counts: Tensor) -> Tensor:
        if self.calibrated:
            temperature, bias = calibrate(zs, y)
            zs, zt = zs / temperature + bias, zt / temperature + bias
            # the prior that the probabilities imply, which calibration makes that of the labels up to its pull
            prior = zs.softmax(1).mean(0)
        return em_prior_shift(zt.softmax(1), prior, counts=counts, tolerance=1e-10, max_iterations=5000)

    def _resampled(self, confusion: Tensor, predicted: Tensor, samples: int) -> list[Tensor]:
        """Return the weights of the resamples, NaN where the matrix of one is singular."""
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LightningMethodsWarning)  # said of the estimate itself already
            for c, q in zip(confusion[1:], predicted[1:], strict=True):
                try:
                    found.append(self._solved(c, q, samples))
                except InvalidArgument:
                    found.append(torch.full_like(q, torch.nan))
        return found

    def _solved(self, confusion: Tensor, predicted: Tensor, n: int) -> Tensor:
        if self.method == "bbse":
            return bbse(confusion, predicted)
        return rlls(confusion, predicted, n**-0.5 if self.delta is None else self.delta)


def read_logits(trainer: Any, module: Any, loader: Any, labels: Selector, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """Return logits and, if they are wanted, labels of a loader's samples, of all ranks.

    Raises:
        BatchFormat: if the module returns something else than logits.
        UnsupportedTraining: if the loader gives nothing.
    """
    logits, found = [], []
    for batch in batches(trainer, module, loader, description="ImportanceWeighting: reading the logits"):
        z = module(inputs_of(batch))
        if not isinstance(z, Tensor):
            raise BatchFormat(f"The module returned {type(z).__name__} for its inputs; logits (B, C) are needed.")
        logits.append(z.float())
        if labelled:
            found.append(targets_of(batch, labels))
    if not logits:
        raise UnsupportedTraining(f"LabelShift got no batch of {loader!r:.60}; give it a loader.")
    return gather_rows(torch.cat(logits)), gather_rows(torch.cat(found)) if labelled else torch.empty(0)


def show_estimate(trainer: Any, found: ShiftEstimate, prefix: str) -> list[Path]:
    """Send the estimated weights with their intervals, and the confusion matrix, to the loggers."""
    names = [str(c) for c in range(len(found.weights))]
    values = (found.weights, found.low, found.high, found.source_prior, found.target_prior)
    rows = [[name, *map(float, row)] for name, row in zip(names, zip(*values, strict=True), strict=True)]
    columns = ["class", "weight", "from", "to", "source share", "target share"]
    figure = heatmap(
        found.confusion,
        names,
        names,
        title=f"Confusion on the labelled source, condition number {found.condition_number:.3g}",
        x_label="true class",
        y_label="predicted",
        value_label="share",
        vmin=0.0,
    )
    written = log_table(trainer, f"{prefix}/label_shift", columns, rows)
    return written + log_figure(trainer, f"{prefix}/confusion", figure)
