"""Move the rates of ordinary dropout and stochastic depth over a training."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lightning_methods.augmented_dropout.base import DropoutCallback, dropouts_of
from lightning_methods.augmented_dropout.functional import check_rate
from lightning_methods.augmented_dropout.layers import KINDS, Kind, Noise
from lightning_methods.augmented_dropout.schedules import RateSchedule
from lightning_methods.augmented_dropout.swap import own_class
from lightning_methods.core._lightning import rank_zero_info
from lightning_methods.core.layers import named_layers
from lightning_methods.errors import InvalidArgument, LayerNotFound


class DropoutSchedule(DropoutCallback):
    """Move the rates of ordinary dropout over a training: early and late dropout, curriculum, warm-up.

    The rate of every dropout and every stochastic depth module (`DropPath` as in timm, `StochasticDepth` of
    torchvision) is its own one times the schedule's factor. Dropout stays standard in every way, and draws the random
    numbers that it would draw at that rate; compiled modules read the rate from a tensor and are not compiled again.

    Logs `dropout_schedule/p` (mean over the modules) every epoch, and the figure `dropout_schedule/rates`.

    Args:
        schedule: function from the share of the training that is done to a factor from 0 to 1: `EarlyRate()`,
            `LateRate()`, `CurriculumRate()`, `LinearRate()`, `CosineRate()`, `ConstantRate()` or one of yours.
        p: the rate at full strength; each module's own by default.
        include: names or patterns of dropouts, or of modules that hold them; all by default.
        exclude: the same of those to leave alone.
        stochastic_depth: whether stochastic depth takes part.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: for a rate outside [0, 1], or what is no schedule.
        LayerNotFound: at the start of the fit, if there is no dropout, or a pattern names none.
        UnsupportedTraining: if the Trainer does not say when the training ends.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import DropoutSchedule
        >>> from lightning_methods.augmented_dropout import EarlyRate
        >>> trainer = Trainer(callbacks=DropoutSchedule(EarlyRate(cutoff=0.2)), logger=False, max_epochs=5)
    """

    def __init__(
        self,
        schedule: RateSchedule,
        *,
        p: float | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        stochastic_depth: bool = True,
        log_prefix: str = "dropout_schedule",
    ) -> None:
        if schedule is None:
            raise InvalidArgument("schedule=None moves nothing; give a function of progress, such as EarlyRate().")
        super().__init__(include=include, exclude=exclude, schedules=(schedule, schedule), log_prefix=log_prefix)
        check_rate("p", p)
        self.p = p
        self.stochastic_depth = stochastic_depth
        self._paths: dict[str, tuple[nn.Module, str, Any]] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the dropouts and swap them; here, since modules may be built as late as `configure_model`."""
        self.share_exchange(trainer)
        dropouts, others = dropouts_of(pl_module)
        paths = stochastic_depths_of(pl_module) if self.stochastic_depth else {}
        known = {**dropouts, **{name: module for name, (module, _) in paths.items()}}
        if not known:
            left = f" but {', '.join(others)}, of other classes" if others else ""
            raise LayerNotFound(
                f"{type(pl_module).__name__} holds no dropout of torch.nn{left}, whose rate could move."
            )
        chosen = self.chosen(known)
        self.noises = {}
        for name, module in chosen.items():
            attribute = paths[name][1] if name in paths else "p"
            kind = _path_kind(module) if name in paths else KINDS[own_class(module)]
            own = float(getattr(module, attribute) or 0.0)
            rate = own if self.p is None else self.p
            scale = "inverted" if getattr(module, "scale_by_keep", True) else "none"
            self.noises[name] = Noise(kind, rate, rate, scale=scale if name in paths else "inverted")  # type: ignore[arg-type]
            self.noises[name].inplace = bool(getattr(module, "inplace", False))
        self.start_schedules(pl_module)
        for name, module in chosen.items():
            if name in paths:
                self.swapper.swap_path(name, module, self.noises[name])
                self._paths[name] = (module, paths[name][1], getattr(module, paths[name][1]))
            else:
                self.swapper.swap_dropout(name, module, self.noises[name], faithful=False)
        left_alone = [f"{name} ({type(m).__name__}, a subclass)" for name, m in others.items()]
        rank_zero_info(
            f"DropoutSchedule: moves the rates of {', '.join(f'{n} ({x.p_forward:g})' for n, x in self.noises.items())}"
            + (f"; left alone: {', '.join(left_alone)}" if left_alone else "")
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the rates of the batch."""
        self.move_rates(trainer, batch_idx)
        for name, (module, attribute, _) in self._paths.items():
            setattr(module, attribute, self.noises[name].rates[0])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the rate."""
        pl_module.log(f"{self.log_prefix}/p", self.mean_rates()[0])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Show how the rate moved."""
        self.show_rates(trainer, {"p": 0})

    def release(self) -> None:
        """Give every module its class and its rate back; harmless when called twice."""
        super().release()
        for module, attribute, rate in self._paths.values():
            setattr(module, attribute, rate)
        self._paths = {}


def stochastic_depths_of(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the stochastic depth modules by name, with the attribute that holds their rate.

    There is no common class: a module counts whose class is named so, which takes one tensor and holds its rate as a
    number (or `None`) under `drop_prob` or `p`.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    seen: set[int] = set()
    for name, layer in named_layers(module):
        cls = own_class(layer)
        if id(layer) in seen or not (cls.__name__.endswith("DropPath") or cls.__name__ == "StochasticDepth"):
            continue
        seen.add(id(layer))
        attribute = next((a for a in ("drop_prob", "p") if _is_rate(getattr(layer, a, ""))), None)
        if attribute is not None and len(inspect.signature(cls.forward).parameters) == 2:
            found[name] = (layer, attribute)
    return found


def _is_rate(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _path_kind(module: nn.Module) -> Kind:
    return "batch" if getattr(module, "mode", "row") == "batch" else "sample"
