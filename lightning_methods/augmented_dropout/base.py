"""What callbacks that change the dropouts of a module have in common: choosing, swapping, scheduling, restoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_methods.augmented_dropout.layers import KINDS, Noise
from lightning_methods.augmented_dropout.schedules import RateSchedule, progress_of
from lightning_methods.augmented_dropout.swap import Exchange, Swapper, own_class
from lightning_methods.core._lightning import Callback
from lightning_methods.core.layers import match_names, named_layers
from lightning_methods.errors import InvalidArgument, LayerNotFound, did_you_mean
from lightning_methods.report import curves, log_figure

_ANY_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class DropoutCallback(Callback):
    """Abstract callback that swaps dropouts in place for the time of a fit, and moves their rates along schedules.

    Args:
        include: names or patterns of dropouts or of modules that hold them; all by default.
        exclude: the same of those to leave alone.
        schedules: of the forward and of the backward rate.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: for settings that cannot be read.
    """

    def __init__(
        self,
        *,
        include: str | list[str] | None,
        exclude: str | list[str] | None,
        schedules: tuple[RateSchedule | None, RateSchedule | None],
        log_prefix: str,
    ) -> None:
        for name, schedule in zip(("forward", "backward"), schedules, strict=True):
            if schedule is not None and not callable(schedule):
                raise InvalidArgument(
                    f"The {name} schedule is {schedule!r}; a function of progress is needed, such as EarlyRate()."
                )
        self.include = None if include is None else [include] if isinstance(include, str) else list(include)
        self.exclude = [] if exclude is None else [exclude] if isinstance(exclude, str) else list(exclude)
        self.schedules = schedules
        self.log_prefix = log_prefix
        self.noises: dict[str, Noise] = {}
        self.exchange = Exchange()
        self.swapper = Swapper(self.exchange)
        self._factors: torch.Tensor | None = None

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, log_prefix=self.log_prefix)

    @property
    def is_scheduled(self) -> bool:
        """Whether rates change during the training."""
        return any(schedule is not None for schedule in self.schedules)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def chosen(self, known: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Return those of the `known` modules that `include` names and `exclude` does not.

        Raises:
            LayerNotFound: if a pattern names none of them, or nothing is left.
        """
        included = list(known) if self.include is None else self._named(self.include, list(known), "include")
        excluded = self._named(self.exclude, list(known), "exclude")
        names = [name for name in known if name in included and name not in excluded]
        if known and not names:
            raise LayerNotFound(f"include={self.include} and exclude={self.exclude} leave none of {list(known)}.")
        return {name: known[name] for name in names}

    @staticmethod
    def _named(patterns: Sequence[str], names: list[str], argument: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            # a pattern may name a dropout, or any module above it
            matched = {n for n in names if any(match_names(pattern, [part]) for part in _name_and_above(n))}
            if not matched:
                raise LayerNotFound(
                    f"{argument} has {pattern!r}, which names no dropout and nothing that holds one. "
                    f"{did_you_mean(pattern, names)} The dropouts are: {', '.join(map(repr, names)) or 'none'}."
                )
            found |= matched
        return found

    # -- rates -------------------------------------------------------------------------------------------------------

    def start_schedules(self, module: nn.Module) -> None:
        """Give all noises one tensor with the factors of this moment, on the device of the module."""
        if not self.is_scheduled:
            return
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._factors = torch.ones(2, device=device)
        for noise in self.noises.values():
            noise.graphed = self._factors
            noise.one_schedule = self.schedules[0] is self.schedules[1]

    def move_rates(self, trainer: Any, batch_idx: int) -> None:
        """Set the rates of a batch."""
        if self._factors is None:
            return
        factors = self.factors_at(progress_of(trainer, batch_idx))
        if next(iter(self.noises.values())).factors == factors:
            return
        for name, noise in self.noises.items():
            noise.factors = factors
            for which, p in zip(("forward", "backward"), noise.rates, strict=True):
                if not 0 <= p <= 1:
                    raise InvalidArgument(f"The {which} schedule makes the rate of {name!r} {p:g}, no probability.")
        # in place: graphs hold on to this tensor
        self._factors.copy_(torch.tensor(factors), non_blocking=True)

    def factors_at(self, progress: float) -> tuple[float, float]:
        """Return what both rates are multiplied by."""
        forward, backward = (1.0 if s is None else float(s(progress)) for s in self.schedules)
        return forward, backward

    def mean_rates(self, factors: tuple[float, float] | None = None) -> tuple[float, float]:
        """Return both rates, averaged over the dropouts."""
        noises = list(self.noises.values())
        forward = sum(n.p_forward * (factors or n.factors)[0] for n in noises) / len(noises)
        return forward, sum(n.p_backward * (factors or n.factors)[1] for n in noises) / len(noises)

    def rate_curves(self, labels: dict[str, int]) -> Any:
        """Return the figure of the rates over the training: label -> 0 for the forward rate, 1 for the backward one."""
        grid = [i / 200 for i in range(201)]
        rates = [self.mean_rates(self.factors_at(progress)) for progress in grid]
        series = {label: (grid, [r[which] for r in rates]) for label, which in labels.items()}
        return curves(series, title="Rates of dropout", x_label="share of the training", y_label="probability")

    def show_rates(self, trainer: Any, labels: dict[str, int]) -> list[Any]:
        """Send that figure to the loggers, if rates changed."""
        if not (self.is_scheduled and self.noises):
            return []
        return log_figure(trainer, f"{self.log_prefix}/rates", self.rate_curves(labels))

    # -- life in the trainer -----------------------------------------------------------------------------------------

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
        """Give every module its class back; harmless when called twice."""
        self.swapper.restore()
        self._factors = None

    def share_exchange(self, trainer: Any) -> None:
        """Begin anew, in company with what another callback of this kind has already swapped.

        Raises:
            InvalidArgument: if both would log under the same keys.
        """
        self.release()
        self.exchange = Exchange()
        for other in trainer.callbacks:
            if other is self or not isinstance(other, DropoutCallback):
                continue
            if other.log_prefix == self.log_prefix:
                raise InvalidArgument(
                    f"{type(other).__name__} and {type(self).__name__} would both log under {self.log_prefix!r}. Give "
                    f"one of them another log_prefix."
                )
            if other.swapper.active:
                self.exchange = other.exchange
        self.swapper = Swapper(self.exchange)


def dropouts_of(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the dropouts of known exact types by name, each instance once, and those of the user's own subclasses."""
    known: dict[str, nn.Module] = {}
    others: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, layer in named_layers(module):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if own_class(layer) in KINDS:
            known[name] = layer
        elif isinstance(layer, _ANY_DROPOUT):
            others[name] = layer
    return known, others


def _name_and_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
