"""Whether the settings of `ImportanceWeighting` can be read, and go together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice
from lightning_methods.importance_weighting.estimation import LabelShift
from lightning_methods.importance_weighting.functional import (
    check_number,
    check_pair,
    check_weights,
    check_whole,
    class_numbers,
)


def checked_class_weights(class_weights: Any) -> Any:
    """Return the class weights as a tensor, a name without its beta, or the estimator."""
    if class_weights is None or isinstance(class_weights, LabelShift):
        return class_weights
    if isinstance(class_weights, str):
        name = class_weights.partition(":")[0]
        check_choice("class_weights", name, ("balanced", "effective_number"))
        return name
    w = check_weights(class_weights, "class_weights")
    if w.ndim != 1 or len(w) < 2:
        raise InvalidArgument(f"class_weights={class_weights!r:.80}: a number for each of at least two classes.")
    return w


def beta_of(class_weights: Any) -> float:
    """Return the beta of the effective number."""
    name, _, number = class_weights.partition(":") if isinstance(class_weights, str) else ("", "", "")
    if not number:
        return 0.999
    try:
        beta = float(number)
    except ValueError:
        beta = -1.0
    if name != "effective_number" or not 0 <= beta < 1:
        raise InvalidArgument(
            f"class_weights={class_weights!r}: 'effective_number:0.999', from 0 to below 1, is meant."
        )
    return beta


def check_settings(mode: str, head: Any, sample_weights: Any, normalize: str, class_weights: Any) -> None:
    """Refuse what does not go together."""
    if (mode == "gradient") != (head is not None):
        raise InvalidArgument(
            f"mode={mode!r} with head={head!r}: the layer that gives the logits is needed for 'gradient', and only "
            f"there."
        )
    if mode == "sampler" and (sample_weights is not None or isinstance(class_weights, LabelShift)):
        raise InvalidArgument(
            "mode='sampler' draws by class weights that are known at the start. For weights by sample give the "
            "loader a "
            "DistributedWeightedSampler(weights)."
        )
    if mode == "sampler" and normalize == "batch":
        raise InvalidArgument("mode='sampler' weights no batch, so that normalize='batch' has no meaning there.")


def checked_counts(class_counts: Any, class_weights: Any) -> Tensor | None:
    """Return the class counts, as many as there are class weights where those are numbers."""
    if class_counts is None:
        return None
    counts = class_numbers(class_counts, "class_counts")
    if isinstance(class_weights, Tensor) and counts.shape != class_weights.shape:
        raise ShapeMismatch(
            f"There are {len(class_weights)} class weights and class_counts of {len(counts)} classes. One for each "
            f"class is needed of both."
        )
    return counts


def check_numbers(exponent: Any, clip: Any, mean_weight: Any, start: int, warmup: int, schedule: Any) -> None:
    """Refuse numbers outside of their range."""
    check_number("exponent", exponent, 0)
    if clip is not None:
        check_pair("clip", clip)
    if mean_weight is not None:
        check_number("mean_weight", mean_weight, 0, open_="low")
    check_whole("start_epoch", start, 0)
    check_whole("warmup_epochs", warmup, 0)
    if schedule is not None and not callable(schedule):
        raise InvalidArgument(f"schedule={schedule!r}: a function from the epoch to a strength is needed.")
    if schedule is not None and (start or warmup):
        raise InvalidArgument("schedule and start_epoch or warmup_epochs both say when the weights act. Give one.")
