"""The one way to add a loss term to an unchanged `training_step`: one hub per module, and a callback built on it."""

from __future__ import annotations

import functools
import inspect
import types
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_methods.core._lightning import Callback, rank_zero_info
from lightning_methods.core.balance import Balance
from lightning_methods.core.batches import Selector, batch_size_of, targets_of
from lightning_methods.core.gather import all_sum, gather_rows, gather_sizes, local_rows, world_size
from lightning_methods.core.layers import match_names
from lightning_methods.core.means import EpochMeans
from lightning_methods.core.taps import FeatureTaps, Pool
from lightning_methods.errors import (
    BatchFormat,
    InvalidArgument,
    LayerNotFound,
    ShapeMismatch,
    UnsupportedTraining,
    check_choice,
    did_you_mean,
)


@dataclass(frozen=True)
class TrainingStep:
    """What one `training_step` was given and returned."""

    module: Any
    batch: Any
    batch_idx: int
    output: Any
    loss: Tensor


class LossParticipant(Protocol):
    """What joins a hub: something to do around the user's step, and a term to add to its loss."""

    def around_step(self, module: Any, batch: Any, batch_idx: int) -> AbstractContextManager[Any]:
        """Return what the user's `training_step` and all terms run inside of."""

    def step_ended(self) -> None:
        """Stop watching: what runs from now on, for the terms, is not the user's step."""

    def loss_term(self, step: TrainingStep) -> Tensor | None:
        """Return the scalar to add to `step.loss`, or `None`."""


class StepWrapper(Protocol):
    """What changes how the user's own step runs, and adds no term to what it returns."""

    def run_step(self, module: Any, batch: Any, batch_idx: int, step: Callable[[], Any]) -> Any:
        """Run the user's `training_step`, without the terms of participants, and return what it returned."""


class LossHub:
    """Stands in for `module.training_step` while participants are there, and adds their terms to the loss it returns.

    There is one hub per module, however many participants: independent wrappers cannot be removed in any order, a hub
    can. It is called where Lightning calls the step: inside DDP's forward and the precision plugin's autocast, before
    the loss is divided for accumulation and scaled. The terms themselves are computed with autocast off.

    Use `LossHub.join` (or `LossHub.wrap`) and `LossHub.leave`. Copies and pickles of the module have the user's own
    step.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.participants: list[LossParticipant] = []
        self.wrappers: list[StepWrapper] = []
        self.inner = module.training_step
        self.was_on_instance = "training_step" in vars(module)
        # Lightning reads the signature through __wrapped__ to decide whether to pass batch_idx
        functools.update_wrapper(self, self.inner)

    @classmethod
    def join(cls, module: Any, participant: LossParticipant) -> None:
        """Add a participant; the first one puts the hub in place. Order of joining is order of the terms.

        Raises:
            UnsupportedTraining: for manual optimisation and for `training_step(self, dataloader_iter)`.
        """
        if not module.automatic_optimization:
            raise UnsupportedTraining(
                f"{type(module).__name__} optimises manually (automatic_optimization=False), where a term added to the "
                f"returned loss would be lost. Use automatic optimisation, or add the term in your own training_step "
                f"with the function of the same name."
            )
        participants = cls._of(module).participants
        if participant not in participants:
            participants.append(participant)

    @classmethod
    def wrap(cls, module: Any, wrapper: StepWrapper) -> None:
        """Let `wrapper` run the user's step; also under manual optimisation, where only adding terms is impossible.

        Raises:
            UnsupportedTraining: for `training_step(self, dataloader_iter)`.
        """
        wrappers = cls._of(module).wrappers
        if wrapper not in wrappers:
            wrappers.append(wrapper)

    @classmethod
    def _of(cls, module: Any) -> LossHub:
        """Return the hub of a module, put in place if there is none."""
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise UnsupportedTraining(
                f"{type(module).__name__}.training_step takes dataloader_iter, which gives no batch to read targets "
                f"from. Write training_step(self, batch, batch_idx)."
            )
        current = vars(module).get("training_step")
        hub = current if isinstance(current, cls) else cls(module)
        # past nn.Module.__setattr__, which would look for parameters in the hub
        object.__setattr__(module, "training_step", hub)
        return hub

    @classmethod
    def leave(cls, module: Any, participant: LossParticipant | StepWrapper) -> None:
        """Remove what joined; the last one puts back what was there before. Harmless when called twice."""
        hub = vars(module).get("training_step")
        while hub is not None and not isinstance(hub, cls):
            hub = getattr(hub, "__wrapped__", None)  # somebody wrapped the hub: it stays, without participants
        if hub is None or participant not in [*hub.participants, *hub.wrappers]:
            return
        hub.participants[:] = [p for p in hub.participants if p is not participant]
        hub.wrappers[:] = [w for w in hub.wrappers if w is not participant]
        if hub.participants or hub.wrappers or vars(module).get("training_step") is not hub:
            return
        if hub.was_on_instance:  # a compiled module keeps its compiled step there
            object.__setattr__(module, "training_step", hub.inner)
        else:
            object.__delattr__(module, "training_step")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's `training_step` and return what it returned, with the terms added to its loss."""
        # users call training_step from validation_step too, where nothing is to be added or logged
        if not ((self.participants or self.wrappers) and torch.is_grad_enabled() and self.module.trainer.training):
            return self.inner(*args, **kwargs)
        batch = args[0] if args else kwargs.get("batch")
        batch_idx = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("batch_idx", 0)
        run = functools.partial(self.inner, *args, **kwargs)
        if len(self.wrappers) == 1 and not self.participants:  # as little as can be, for small networks
            return self.wrappers[0].run_step(self.module, batch, batch_idx, run)
        for wrapper in reversed(self.wrappers):
            run = functools.partial(wrapper.run_step, self.module, batch, batch_idx, run)
        with ExitStack() as stack:
            for participant in self.participants:
                stack.enter_context(participant.around_step(self.module, batch, batch_idx))
            output = run()
            for participant in self.participants:
                participant.step_ended()
            loss = self._loss_of(output) if self.participants else None
            if loss is None:
                return output
            step = TrainingStep(self.module, batch, batch_idx, output, loss)
            with torch.autocast(loss.device.type, enabled=False):
                terms = [term for p in self.participants if (term := p.loss_term(step)) is not None]
        if not terms:
            return output
        total = loss
        for term in terms:
            total = total + term
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _loss_of(self, output: Any) -> Tensor | None:
        """Return the loss in what the step returned; a skipped step (None) has none."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if output is None or isinstance(loss, Tensor):
            return loss
        held = f"a dict with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else f"{output!r:.80}"
        raise UnsupportedTraining(
            f"{type(self.module).__name__}.training_step returned {held}. A tensor, a dict with a tensor under 'loss', "
            f"or None is needed."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # deepcopy and pickle pass the module through their memo, so that a copy is bound to the copied module
        if isinstance(self.inner, types.MethodType):
            return _bound, (self.inner.__func__, self.module)
        return _identity, (self.inner,)


def _identity(x: Any) -> Any:
    return x


def _bound(function: Any, module: Any) -> Any:  # types.MethodType itself cannot be pickled
    return types.MethodType(function, module)


@dataclass(frozen=True)
class LayerBatch:
    """The rows of one layer that a term sees.

    Attributes:
        features: `(B, D)` in float32 or float64, the rows of all ranks in rank order where they were gathered.
        labels: `(B, ...)`, what belongs to these rows.
        rows: which of the rows are this rank's own.
        ranks: over how many ranks the rows were gathered.
    """

    features: Tensor
    labels: Tensor
    rows: slice
    ranks: int


class AuxiliaryLoss(Callback):
    r"""Abstract callback that adds `sum_l weight_l * term_l` over tapped layers to the loss of an unchanged module.

    Subclasses say what the term of a layer is. A layer of weight 0 is a probe: its term is computed without graph, and
    with all weights 0 the training is bit for bit the one without the callback.

    Args:
        layers: names or patterns of the layers, see `lightning_methods.core.layers.match_layers`.
        weight: factor of the term, for all layers or by layer name or pattern (a layer that no pattern matches has 0).
        max_share: the most that the terms may be of the module's loss in a step, in absolute values: where they would
            be more, all weights are scaled down. `None` for no limit.
        warmup_steps: number of optimizer steps over which the weight grows linearly from 0.
        schedule: instead, a function of the optimizer step that returns a factor for the weight.
        labels: where the targets are in a batch: index, key or function, see `lightning_methods.core.batches`.
        gather: whether the rows of all ranks are joined (with gradient), so that DDP equals one process.
        every_n_steps: act in every n-th batch of an epoch only.
        log_on: log once per `"epoch"` (mean over its batches) or per `"step"`.
        log_prefix: first part of every logged key; the method's own by default.
        select, pool, on_repeat, capture: how a layer's tensor is read, see `lightning_methods.core.taps.FeatureTaps`.

    Raises:
        InvalidArgument: for settings that cannot be read.
    """

    #: the method's name, first part of every logged key
    method: ClassVar[str]

    def __init__(
        self,
        layers: str | list[str],
        *,
        weight: float | dict[str, float],
        max_share: float | None = None,
        warmup_steps: int = 0,
        schedule: Callable[[int], float] | None = None,
        labels: int | str | Callable[[Any], Tensor] | None = None,
        gather: bool = True,
        every_n_steps: int = 1,
        log_on: Literal["epoch", "step"] = "epoch",
        log_prefix: str | None = None,
        select: int | str | None = None,
        pool: Pool = "flatten",
        on_repeat: Literal["error", "last", "all"] = "error",
        capture: Literal["output", "input"] = "output",
    ) -> None:
        check_choice("log_on", log_on, ("epoch", "step"))
        for key, value in (weight if isinstance(weight, dict) else {"weight": weight}).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise InvalidArgument(f"The weight of {key!r} is {value!r}; a finite number is needed.")
        if max_share is not None and not max_share > 0:
            raise InvalidArgument(f"max_share={max_share!r}: a positive share of the loss is needed, or None.")
        if warmup_steps < 0 or every_n_steps < 1:
            raise InvalidArgument(
                f"warmup_steps={warmup_steps} and every_n_steps={every_n_steps}: at least 0 and at least 1 are needed."
            )
        if warmup_steps and schedule is not None:
            raise InvalidArgument("warmup_steps and schedule both say how the weight grows. Give one of them.")
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        self.weight = weight
        self.max_share = max_share
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.labels: Selector = labels
        self.gather = gather
        self.every_n_steps = every_n_steps
        self.log_on = log_on
        self.log_prefix = log_prefix or self.method
        self.is_probe = not any(weight.values()) if isinstance(weight, dict) else weight == 0
        self.taps = FeatureTaps(
            layers, select=select, pool=pool, on_repeat=on_repeat, capture=capture, detach=self.is_probe
        )
        self._layer_weights: dict[str, float] = {}
        self._module: Any = None
        self._balance = Balance()
        self.reset()

    def reset(self) -> None:
        """Forget what was measured in an earlier fit."""
        self._epoch = 0
        self._means = EpochMeans()

    @abstractmethod
    def layer_term(self, layer: str, batch: LayerBatch, step: TrainingStep) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the unweighted term of one layer and what to log of it, as quantity -> value.

        With rows of several ranks, the mean over the ranks of what is returned must be the global value.
        """

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(
            layers=self.taps.patterns, capture=self.taps.capture, log_prefix=self.log_prefix
        )

    def see_labels(self, labels: Tensor) -> dict[str, Tensor | float]:
        """Take in the labels of a step before its layers, and return what to log once; nothing by default."""
        return {}

    def see_epoch(self, means: dict[str, float]) -> None:
        """Take in the means of all that was logged in an epoch, without the prefix; nothing by default."""

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Resolve the layers and join the hub; here, since modules may be built as late as `configure_model`."""
        LossHub.join(pl_module, self)
        self._module = pl_module
        try:
            self._layer_weights = self._weights_of(self.taps.attach(pl_module))
            self._refuse_shared_keys(trainer)
        except Exception:
            self.release()
            raise
        self._balance = Balance()
        by_weight = ", ".join(f"{layer} ({weight:g})" for layer, weight in self._layer_weights.items())
        rank_zero_info(f"{type(self).__name__}: layers, with their weights: {by_weight}")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch:
            self.see_epoch(self._means.close())
        self._epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the epoch."""
        means = self._means.close()
        self.see_epoch(means)
        if self.log_on == "epoch":
            for key, value in means.items():
                # the same number on every rank already
                pl_module.log(f"{self.log_prefix}/{key}", value, sync_dist=world_size() > 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the running epoch and its sums."""
        return {"epoch": self._epoch, "means": self._means.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._epoch = state_dict["epoch"]
        self._means.load_state_dict(state_dict["means"])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self.release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was also after a crash, where Lightning calls no `on_fit_end`."""
        self.release()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self.release()

    def release(self) -> None:
        """Remove every hook and the wrapper; harmless when called twice."""
        self.taps.detach()
        if self._module is not None:
            LossHub.leave(self._module, self)
            self._module = None
        self._layer_weights = {}

    # -- the step ----------------------------------------------------------------------------------------------------

    @contextmanager
    def around_step(self, module: Any, batch: Any, batch_idx: int) -> Iterator[None]:
        """Open the taps for the user's step."""
        if batch_idx % self.every_n_steps:
            yield
            return
        with self.taps.recording():
            yield

    def step_ended(self) -> None:
        """Capture nothing of what other terms run."""
        self.taps.pause()

    def loss_term(self, step: TrainingStep) -> Tensor | None:
        """Return the weighted sum of the layers' terms, or `None` for a probe, and log them."""
        if step.batch_idx % self.every_n_steps:
            return None
        factor = self._factor(step.module.global_step)
        layer_batches = self._layer_batches(self.taps.read(), targets_of(step.batch, self.labels))
        # of all ranks: a global value counts the same on each of them, also where their batches are unequal
        labels = next(iter(layer_batches.values())).labels
        self._log(step, self.see_labels(labels), labels)
        terms: list[Tensor] = []
        for layer, layer_batch in layer_batches.items():
            weight = factor * self._layer_weights[layer.split("#")[0]]
            with torch.set_grad_enabled(weight != 0):
                term, quantities = self.layer_term(layer, layer_batch, step)
            self._log(step, {f"{quantity}/{layer}": value for quantity, value in quantities.items()}, labels)
            if weight != 0:
                terms.append(weight * term)
        if not terms:
            return None
        weighted = functools.reduce(torch.add, terms)
        logged: dict[str, Tensor | float] = {}
        if self.max_share is not None:
            logged["limit"] = limit = self._limit(terms, step.loss, self.max_share)
            weighted = weighted * limit
        self._balance.see(weighted, step.loss, type(self).__name__)
        logged |= {"loss": weighted.detach(), "total_loss": (step.loss + weighted).detach()}
        self._log(step, logged, labels)
        return weighted

    def _limit(self, terms: list[Tensor], loss: Tensor, share: float) -> Tensor:
        """Return the factor, at most 1 and the same on all ranks, that keeps the terms within their share."""
        sizes = torch.stack([loss.detach().to(terms[0]), *(term.detach() for term in terms)])
        if self.gather:
            sizes = all_sum(sizes) / world_size()
        most, size = share * sizes[0].abs(), sizes[1:].abs().sum()
        # of a loss that is not finite there is no share; it must show, not turn the factor into something else
        return torch.where(size > most, most / size, 1.0)

    def _layer_batches(self, features: dict[str, Tensor], labels: Tensor) -> dict[str, LayerBatch]:
        """Return the rows of every layer, of all ranks if asked for, in at least float32."""
        if not isinstance(labels, Tensor) or labels.ndim == 0:
            raise BatchFormat(
                f"The targets are a {type(labels).__name__}; a tensor with one entry per sample is needed. Say "
                f"where it is with labels=, which may be a function of the batch."
            )
        ranks = world_size() if self.gather else 1
        sizes = gather_sizes(len(labels), labels.device) if ranks > 1 else [len(labels)]
        rows = local_rows(sizes) if ranks > 1 else slice(0, len(labels))
        all_labels = gather_rows(labels, sizes) if ranks > 1 else labels
        batches: dict[str, LayerBatch] = {}
        for layer, x in features.items():
            if len(x) != len(labels):
                raise ShapeMismatch(
                    f"The layer {layer!r} gave {len(x)} rows (shape {tuple(x.shape)}) for {len(labels)} targets. "
                    f"One row per target is needed: tap another layer, or pass pool= a function that makes them fit."
                )
            x = x if x.dtype == torch.float64 else x.float()
            batches[layer] = LayerBatch(gather_rows(x, sizes) if ranks > 1 else x, all_labels, rows, ranks)
        return batches

    def _factor(self, global_step: int) -> float:
        if self.schedule is not None:
            return float(self.schedule(global_step))
        return min(1.0, (global_step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def _refuse_shared_keys(self, trainer: Any) -> None:
        for other in trainer.callbacks:
            if other is self or getattr(other, "log_prefix", None) != self.log_prefix:
                continue
            theirs = getattr(other, "_layer_weights", {})  # empty before it has joined
            shared = sorted(set(theirs) & set(self._layer_weights))
            if any(theirs.values()) and any(self._layer_weights.values()):
                shared += ["loss", "total_loss"]
            if shared:
                raise InvalidArgument(
                    f"Two callbacks log {shared} under {self.log_prefix!r}, where their numbers would mix. "
                    f"Give one of them another log_prefix=."
                )

    def _weights_of(self, names: list[str]) -> dict[str, float]:
        if not isinstance(self.weight, dict):
            return dict.fromkeys(names, float(self.weight))
        weights = dict.fromkeys(names, 0.0)
        for pattern, value in self.weight.items():
            matched = match_names(pattern, names)
            if not matched:
                raise LayerNotFound(
                    f"weight has {pattern!r}, which no tapped layer matches. {did_you_mean(pattern, names)}"
                )
            weights.update(dict.fromkeys(matched, float(value)))
        return weights

    def _log(self, step: TrainingStep, values: Mapping[str, Tensor | float], labels: Tensor) -> None:
        self._means.add(values, weight=batch_size_of(labels))
        if self.log_on == "step":
            for key, value in values.items():
                step.module.log(f"{self.log_prefix}/{key}", value, batch_size=batch_size_of(labels))
