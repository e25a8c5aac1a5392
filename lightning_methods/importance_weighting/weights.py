"""Which weight belongs to which sample: of its class, of the batch, of both, in the normalisation that was chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_methods.core.batches import Selector, describe_batch, targets_of
from lightning_methods.core.gather import all_sum
from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch
from lightning_methods.importance_weighting.interception import LossCall

Normalize = Literal["mean1", "batch", "none"]


class BatchWeights:
    """The weights of the running step, and the arithmetic that puts them into its losses.

    Args:
        normalize: see `ImportanceWeighting`.
        match: which calls are weighted.
        labels: where the targets of a batch are.
        sample_weights: where its weights are, or `None`.
        transform: exponent and clip, for weights that come with the batch.
    """

    def __init__(
        self,
        normalize: Normalize,
        match: str,
        labels: Selector,
        sample_weights: Selector,
        transform: Callable[[Tensor], Tensor],
    ) -> None:
        self.normalize, self.match = normalize, match
        self.labels, self.selector, self.transform = labels, sample_weights, transform
        self.table = torch.ones(0, dtype=torch.float64)  # of the classes, normalised, at full strength
        self.mean_weight = 1.0
        self.strength = 1.0
        self._by_classes, self._equal = False, True
        self.quick: Tensor | None = None
        self.measuring = self.evaluating = False
        self.risk = torch.zeros(2, dtype=torch.float64)  # sums of weighted losses, and of weights
        self.total = torch.zeros(())  # of the weights that came with the batches of an epoch
        self.hits = 0
        self.called: list[str] = []
        self.result: Tensor | None = None
        self.seen = [0.0, 0.0]  # samples and their weights, of a window of accumulated batches
        self.deferred = False  # "batch" over several batches: the gradient is divided in the end
        self.first_batch = False
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    # -- what the callback sets --------------------------------------------------------------------------------------

    def set_table(self, table: Tensor | None, strength: float) -> None:
        """Take normalised class weights, and how much of them acts."""
        self.table = torch.ones(0, dtype=torch.float64) if table is None else table
        self._by_classes, self._equal = bool(len(self.table)), bool((self.table == 1).all())
        self._tables = {}
        self.set_strength(strength)

    def set_strength(self, strength: float) -> None:
        """Say how much of the weights acts, from 0 to 1."""
        self.strength, self.quick = strength, None

    def begin(self, batch: Any, *, first: bool = False) -> None:
        """Begin a step."""
        self.batch, self.first_batch = batch, first
        self.hits, self.called, self.result = 0, [], None
        self._samples: Tensor | None = None

    def end(self) -> None:
        """Let go of the batch and its graph."""
        self.batch = self.result = self._samples = None

    @property
    def sample_weighted(self) -> bool:
        """Whether weights come with the batches."""
        return self.selector is not None

    # -- the weigher of an interception ------------------------------------------------------------------------------

    def counts(self, name: str, x: Tensor) -> bool:
        """Tell whether the call is to be weighted: it trains something, and it is the one that was asked for."""
        if not self.evaluating and not (x.requires_grad and torch.is_grad_enabled()):
            return False
        self.called.append(name)
        if self.match not in ("auto", "all", "first", name):
            return False
        if self.hits and self.match == "auto" and not self.evaluating:
            raise InvalidArgument(
                f"training_step calls {len(self.called)} losses that train: {', '.join(self.called)}. Say which are to "
                f"be weighted: match='all', match='first', or the name of one."
            )
        if self.hits and self.match in ("auto", "first"):
            return False
        self.hits += 1
        return True

    def neutral(self) -> bool:
        """Tell whether all weights are 1, so that the call can stay as it is, bit for bit."""
        if self.evaluating or self.sample_weighted:
            return False
        return self.strength == 0 or self._equal

    def class_table(self, x: Tensor) -> Tensor | None:
        """Return the class weights of now on the device of `x`, in float32 or float64."""
        if not self._by_classes:
            return None
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        strength = 1.0 if self.evaluating else self.strength
        key = (x.device, kind, strength)
        if key not in self._tables:
            self._tables[key] = (1 + strength * (self.table - 1)).to(x.device, kind)
        simple = not self.sample_weighted and not self.evaluating and self.normalize != "batch"
        # only on a CPU are labels without a weight found without waiting for the device
        if simple and kind == torch.float32 and x.device.type == "cpu":
            self.quick = self._tables[key]
        return self._tables[key]

    def by_label(self, labels: Tensor) -> Tensor:
        """Return the weight of each label at full strength, 1 below 0, in float64.

        Raises:
            InvalidArgument: for a label without a weight.
        """
        if labels.is_floating_point():
            raise InvalidArgument(f"The targets are {labels.dtype}; class weights need whole numbers.")
        known = labels >= 0
        self.refuse_unknown(labels[known], len(self.table))
        return torch.where(known, self.table.to(labels.device)[labels.clamp(min=0)], 1.0)

    def weigh(self, call: LossCall) -> tuple[Tensor, Tensor | int]:
        """Return the weighted losses, and by what a mean divides their sum: the number that counts."""
        weight, number = self.of_call(call)
        losses = call.losses
        if losses.dtype != torch.float32 and losses.dtype != torch.float64:
            losses = losses.float()
        if self.evaluating:
            self.measure(call)
        elif self.normalize == "batch":
            losses = losses * self._batch_factor(weight, number, call)
        return (losses if weight is None else losses * weight), number

    def give(self, result: Tensor) -> Tensor:
        """Take note of a weighted loss, and return it."""
        self.result = result
        return result

    @torch.no_grad()
    def measure(self, call: LossCall) -> None:
        """Add a call of the validation to the weighted risk."""
        weight, _ = self.of_call(call)
        losses = call.losses.detach().double()
        if weight is None:
            weight = torch.ones_like(losses)
            total = self._soft_weights(call) if call.by_class else weight
        else:
            total = weight if not call.by_class else weight * self._soft_weights(call)
        sums = torch.stack([(losses * weight).sum(), total.double().sum() * (losses.numel() / total.numel())])
        self.risk = self.risk.to(sums.device) + sums

    def of_call(self, call: LossCall) -> tuple[Tensor | None, Tensor | int]:
        """Return the weight of each loss of a call, and how many losses count."""
        weight, number = self._by_class(call)
        samples = self.sample_weights()
        if samples is not None:
            own = self._fitted(samples, call.losses)
            weight = own if weight is None else weight * own
        return weight, number

    def sample_weights(self) -> Tensor | None:
        """Return the weights that came with the batch, checked, once a step."""
        if self.selector is None:
            return None
        if self._samples is None:
            w = self.transform(raw_sample_weights(self.batch, self.selector)) / self.mean_weight
            self._samples = 1 + (1.0 if self.evaluating else self.strength) * (w - 1)
            if not self.evaluating:
                self.total = self.total.to(w.device) + self._samples.sum()
        return self._samples

    # -- by class ----------------------------------------------------------------------------------------------------

    def _by_class(self, call: LossCall) -> tuple[Tensor | None, Tensor | int]:
        losses, target = call.losses, call.target
        table = self.class_table(losses)
        if call.kind is not None and call.kind.classes and not call.by_class and target is not None:
            return self._looked_up(table, target, call)
        if table is None or call.by_class:
            return None, losses.numel()
        binary = call.kind is not None and call.kind.binary
        if binary and target is not None and len(table) == 2 and (target.ndim != 2 or target.shape[1] == 1):
            return table[0] + (table[1] - table[0]) * target.to(table.dtype), losses.numel()
        if call.kind is None and target is not None and target.shape == losses.shape and not target.is_floating_point():
            return self._looked_up(table, target, call)
        labels = targets_of(self.batch, self.labels)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != losses.shape[:1]:
            what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)[:60]
            raise BatchFormat(
                f"{call.name} has no class as its target, and the targets of the batch are {what}: class_weights need "
                f"one whole number for each of the {losses.shape[:1]} samples. Say where it is with labels=, or give "
                f"the weights with the batch, sample_weights=."
            )
        weight, _ = self._looked_up(table, labels, call)
        return self._fitted(weight, losses) if weight is not None else None, losses.numel()

    def check_classes(self, name: str, table: Tensor | None, classes: int) -> None:
        """Refuse weights of another number of classes than there are logits."""
        if table is not None and len(table) != classes:
            raise ShapeMismatch(
                f"There are {len(table)} class weights and {classes} logits a sample in {name}. One weight for each "
                f"class is needed."
            )

    def _looked_up(self, table: Tensor | None, target: Tensor, call: LossCall) -> tuple[Tensor | None, Tensor | int]:
        """Return the weight of every target, 0 where it is ignored, and how many are not."""
        ignore, classes = call.ignore_index, call.num_classes or len(self.table)
        may_be_class = ignore is not None and 0 <= ignore < classes
        if target.device.type == "cpu" and not may_be_class and table is not None:
            try:  # the usual case, in one operation: an ignored or unknown label is out of the table's range
                if target.ndim == 1:
                    return table.index_select(0, target), target.numel()
                return table.index_select(0, target.reshape(-1)).view(target.shape), target.numel()
            except (IndexError, RuntimeError):
                pass
        counted = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
        if table is None:
            return None, counted.sum()
        if target.device.type == "cpu":
            self.refuse_unknown(target[counted], len(table))
        weight = table[torch.where(counted, target, 0)]
        return torch.where(counted, weight, 0), counted.sum()

    def refuse_unknown(self, labels: Tensor, classes: int) -> None:
        """Refuse labels that are no classes, naming one."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            wrong = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
            raise InvalidArgument(
                f"The batch holds the label {wrong}, and there are weights for the classes 0 to {classes - 1}. Give "
                f"one weight for each class."
            )

    def _fitted(self, weight: Tensor, losses: Tensor) -> Tensor:
        """Return one weight a sample in the shape that multiplies its losses."""
        weight = weight.to(losses.device, torch.float64 if losses.dtype == torch.float64 else torch.float32)
        if weight.shape == losses.shape:
            return weight
        if weight.shape != losses.shape[:1]:
            raise ShapeMismatch(
                f"There are weights of shape {tuple(weight.shape)} for losses of shape {tuple(losses.shape)}. One for "
                f"each sample, or one for each loss, is needed; a function as sample_weights= may make them fit."
            )
        return weight.view(-1, *[1] * (losses.ndim - 1))

    # -- normalised by the batch -------------------------------------------------------------------------------------

    def _batch_factor(self, weight: Tensor | None, number: Tensor | int, call: LossCall) -> Tensor | float:
        """Return `n / sum w` over the batch of all ranks; over several batches it is only counted."""
        if call.by_class:
            soft = self._soft_weights(call)
            weight = soft if weight is None else soft * weight
        if weight is None:
            return 1.0
        total = weight.detach().double().sum() * (call.losses.numel() / weight.numel())
        counted = torch.as_tensor(number, dtype=torch.float64, device=total.device)
        both = all_sum(torch.stack([counted, total]))
        if self.deferred:
            self.seen = [self.seen[0] + float(both[0]), self.seen[1] + float(both[1])]
            return 1.0
        if self.first_batch and float(both[0]) == 1:
            raise InvalidArgument(
                "normalize='batch' divides by the weights of the batch, which is one sample: its weight cancels and "
                "nothing is weighted. Use normalize='mean1', or larger batches."
            )
        # where all of the batch has weight 0 its losses are 0 and stay so
        return (both[0] / both[1].clamp(min=1e-300)).to(weight.dtype) if float(both[1]) > 0 else 0.0

    def _soft_weights(self, call: LossCall) -> Tensor:
        """Return the weight that a target of class probabilities has on average."""
        table, target = self.class_table(call.losses), call.target
        if table is None or target is None:
            return torch.ones_like(call.losses)
        return target.movedim(min(1, target.ndim - 1), -1).to(table) @ table


def raw_sample_weights(batch: Any, selector: Selector) -> Tensor:
    """Return the checked weights of a batch, `(B,)` or of any shape, in float64.

    Raises:
        BatchFormat: if there are none.
        InvalidArgument: for weights that are negative or not finite.
    """
    try:
        found = targets_of(batch, selector)
    except BatchFormat as error:
        raise BatchFormat(
            f"No sample weights under sample_weights={selector!r}: the batch is {describe_batch(batch)}."
        ) from error
    if not isinstance(found, Tensor):
        raise BatchFormat(f"sample_weights={selector!r} gave a {type(found).__name__}; a tensor is needed.")
    w = found.detach().double()
    if w.ndim == 2 and w.shape[1] == 1:
        w = w[:, 0]
    if not bool((torch.isfinite(w) & (w >= 0)).all()):
        raise InvalidArgument(
            f"The weights of the batch run from {float(w.min())} to {float(w.max())}. Finite numbers of at least 0 are "
            f"needed."
        )
    return w
