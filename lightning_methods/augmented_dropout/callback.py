"""Augmented dropout in the training of an unchanged module."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_methods.augmented_dropout.base import DropoutCallback, dropouts_of
from lightning_methods.augmented_dropout.comparison import GradientComparison
from lightning_methods.augmented_dropout.functional import COUPLINGS, SCALES, Coupling, Scale, WeightGrad
from lightning_methods.augmented_dropout.intercept import Interception
from lightning_methods.augmented_dropout.layers import KINDS, Kind, Noise, backward_rate, check_rates
from lightning_methods.augmented_dropout.reporting import Reading, hidden_dropouts, readers_of, reading_of, summary
from lightning_methods.augmented_dropout.schedules import RateSchedule
from lightning_methods.augmented_dropout.seeding import StepSeed
from lightning_methods.augmented_dropout.swap import own_class
from lightning_methods.core._lightning import rank_zero_info, rank_zero_warn
from lightning_methods.core.layers import named_layers
from lightning_methods.errors import LayerNotFound, LightningMethodsWarning, UnsupportedTraining, check_choice
from lightning_methods.report import log_figure, log_table


class AugmentedDropout(DropoutCallback):
    r"""Give every dropout of an unchanged module different noise in the forward and in the backward pass.

    .. math:: z = W (h \odot m_f) + b, \qquad \frac{\partial J}{\partial W} := \delta (h \odot m_b)^\top, \qquad
        \frac{\partial J}{\partial h} := (W^\top \delta) \odot m_b

    By default both rates are those of the module and nothing changes, bit for bit. With other rates, each dropout is
    swapped in place for the time of the fit, and every Linear or Conv that reads its output, also through views such as
    a Flatten, takes its weight gradient from the features of the backward mask. Where something is computed in between
    (an addition, a normalisation, a functional call) only the errors change; the report after the first batch says so
    of each dropout.

    Logs `augmented_dropout/p_forward` and `augmented_dropout/p_backward` (means over the dropouts); with
    `compare_every_n_steps` also `augmented_dropout/grad_cosine` and `augmented_dropout/grad_norm_ratio` between the
    gradient and that of standard dropout with the same forward masks (means over the steps); at the end of the fit the
    table `augmented_dropout/dropouts` and the figures `augmented_dropout/rates` (of a schedule) and
    `augmented_dropout/comparison`.

    Args:
        p_forward: rate of the forward pass; each dropout's own by default.
        p_backward: rate of the backward pass; `ratio` times the forward rate by default.
        ratio: the backward rate as a multiple of the forward rate. Default 1, standard dropout.
        coupling: `"nested"`, `"independent"` or `"complementary"`, see `dual_dropout`. Independent masks can make a
            training diverge.
        scale: `"inverted"`, `"none"`, `"classic"` or `"forward_only"`, see `dual_dropout`.
        weight_grad: `"backward"` (the paper) or `"forward"`: only the errors get the backward mask.
        include: names or patterns of dropouts, or of modules that hold them; all by default.
        exclude: the same of those to leave alone.
        schedule_forward: factor of the forward rate over the training, such as `EarlyRate()`.
        schedule_backward: factor of the backward rate.
        functional: whether calls of `F.dropout` in the training step are told about once (`"warn"`), replaced as well
            (`"patch"`), or not looked at (`"ignore"`).
        attention: whether the dropout within attention is left (`"skip"`), since fused kernels have one mask for both
            passes, or attention computed explicitly (`"math"`).
        compare_every_n_steps: compare the gradient with the standard one in every n-th batch of an epoch, at the cost
            of two more backward passes. Under DDP each rank compares its own.
        seed: draw the random numbers of each training batch from this seed, the rank, the epoch and the batch, so that
            a resumed training equals the uninterrupted one bit for bit. Holds for all that is drawn in a batch.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: for a rate outside [0, 1], both `p_backward` and `ratio`, or an unknown mode.
        LayerNotFound: at the start of the fit, if there is no dropout, or a pattern names none.
        UnsupportedTraining: at the start of the fit, for LBFGS, or for a comparison in compiled modules; in the
            backward pass, where it is differentiated again.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import AugmentedDropout
        >>> trainer = Trainer(callbacks=AugmentedDropout(p_forward=0.2, p_backward=0.5), logger=False)

    Deviations from the paper: see `dual_dropout`; joint law of the masks, scale and rates are not known from it.
    """

    def __init__(
        self,
        p_forward: float | None = None,
        p_backward: float | None = None,
        *,
        ratio: float = 1.0,
        coupling: Coupling = "nested",
        scale: Scale = "inverted",
        weight_grad: WeightGrad = "backward",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        schedule_forward: RateSchedule | None = None,
        schedule_backward: RateSchedule | None = None,
        functional: Literal["warn", "patch", "ignore"] = "warn",
        attention: Literal["skip", "math"] = "skip",
        compare_every_n_steps: int | None = None,
        seed: int | None = None,
        log_prefix: str = "augmented_dropout",
    ) -> None:
        super().__init__(
            include=include, exclude=exclude, schedules=(schedule_forward, schedule_backward), log_prefix=log_prefix
        )
        check_rates(p_forward, p_backward, ratio)
        check_choice("coupling", coupling, COUPLINGS)
        check_choice("scale", scale, SCALES)
        check_choice("weight_grad", weight_grad, ("backward", "forward"))
        check_choice("functional", functional, ("warn", "patch", "ignore"))
        check_choice("attention", attention, ("skip", "math"))
        if p_forward is not None:
            backward_rate(p_forward, p_backward, ratio)
        self.p_forward = p_forward
        self.p_backward = p_backward
        self.ratio = ratio
        self.coupling: Coupling = coupling
        self.scale: Scale = scale
        self.weight_grad = weight_grad
        self.functional = functional
        self.attention = attention
        self.comparison = GradientComparison(compare_every_n_steps)
        self.seeding = StepSeed(seed)
        #: after the first batch, what is known of each dropout
        self.readings: list[Reading] = []
        self.figure_paths: list[Path] = []
        self._mode: Interception | None = None
        self._step = ExitStack()
        self._told = False
        self._readers: dict[str, dict[str, None]] = {}
        self._left_alone: list[str] = []

    # -- the rates of a dropout --------------------------------------------------------------------------------------

    def noise_of(self, name: str, module: nn.Module) -> Noise:
        """Return the rates of one dropout of the module."""
        kind = KINDS[own_class(module)]
        own = getattr(module, "noise", None)
        if isinstance(own, Noise) and self.p_forward is None and self.p_backward is None and self.ratio == 1.0:
            return Noise(own.kind, own.p_forward, own.p_backward, own.coupling, own.scale)
        noise = self._noise(kind, float(module.p), where=f" of {name!r}")  # type: ignore[arg-type]
        noise.inplace = bool(module.inplace)
        return noise

    def _noise(self, kind: Kind, own_rate: float, where: str = "") -> Noise:
        p_forward = own_rate if self.p_forward is None else self.p_forward
        p_backward = backward_rate(p_forward, self.p_backward, self.ratio, where=where)
        return Noise(kind, p_forward, p_backward, self.coupling, self.scale)

    def _functional_noise(self, kind: Kind, own_rate: float) -> Noise:
        noise = self._noise(kind, own_rate, where=" of a functional dropout")
        known = next(iter(self.noises.values()), None)
        if known is not None:
            noise.factors, noise.graphed, noise.one_schedule = known.factors, known.graphed, known.one_schedule
        return noise

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.comparison.reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the dropouts; here, since modules may be built as late as `configure_model`."""
        self.attach(trainer, pl_module)
        if not self.swapper.active:
            rank_zero_info(
                f"AugmentedDropout: {len(self.noises)} dropouts keep their rates in both passes; nothing changes."
            )
            return
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            self.release()
            raise UnsupportedTraining(
                "LBFGS searches along its direction for a smaller loss, and augmented dropout's update is not the "
                "gradient of any loss (nor are two evaluations of it comparable). Use a first-order optimizer."
            )
        if self.comparison.every is not None and _compiled(pl_module):
            self.release()
            raise UnsupportedTraining(
                "compare_every_n_steps needs the two gradients of one graph, which compiled modules do not keep. "
                "Compare in a short training without torch.compile."
            )

    def attach(self, trainer: Any, pl_module: Any) -> None:
        """Find the dropouts, and swap those that are to change.

        Raises:
            LayerNotFound: if there is none, or a pattern names none.
        """
        self.share_exchange(trainer)
        known, others = dropouts_of(pl_module)
        intercepts = self.functional == "patch" or self.attention == "math"
        if not known and not intercepts:
            raise LayerNotFound(_nothing_found(pl_module, others))
        chosen = self.chosen(known)
        self.noises = {name: self.noise_of(name, module) for name, module in chosen.items()}
        self.readings, self._readers, self._left_alone = [], {}, []
        self._told, self._mode = False, None
        changed = any(not self._keeps(noise, chosen[name]) for name, noise in self.noises.items())
        if not (changed or self.is_scheduled or intercepts):
            return
        self.start_schedules(pl_module)
        faithful = self.weight_grad == "backward"
        for name, noise in self.noises.items():
            self.swapper.swap_dropout(name, chosen[name], noise, faithful=faithful)
        if self.functional != "ignore" or intercepts:
            for name, module in known.items():
                if name not in chosen and own_class(module) is type(module):
                    self.swapper.protect(name, module)
            self._mode = Interception(
                self.exchange,
                self._functional_noise,
                functional=self.functional == "patch",
                attention=self.attention == "math",
                faithful=faithful,
            )
        if faithful:
            self.swapper.swap_consumers(named_layers(pl_module))
            self.swapper.join_neighbours(pl_module)
        hidden = hidden_dropouts(pl_module, attention=self.attention == "math")
        self._left_alone = [*(f"{n} ({type(m).__name__}, a subclass)" for n, m in others.items()), *hidden.values()]

    @staticmethod
    def _keeps(noise: Noise, module: nn.Module) -> bool:
        # a dual module of the user's own still needs the layers after it to know
        return noise.is_standard and noise.p_forward == float(module.p) and not hasattr(module, "noise")  # type: ignore[arg-type]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the rates and the random numbers of the batch."""
        self._step.close()
        self.comparison.see_epoch_of(trainer)
        self.move_rates(trainer, batch_idx)
        self._step.enter_context(self.seeding.step(trainer, pl_module, batch_idx))
        if not self.swapper.active:
            return
        self._step.callback(self.exchange.end_step)
        switch = self.comparison.begin(batch_idx)
        if switch is not None:
            self.exchange.switch = switch
        if not self._told and self.exchange.watched is None:
            self.exchange.watched = {}
        looks = self._mode is not None and (self._mode.functional or self._mode.attention)
        if self._mode is not None and (looks or not (self._told or _compiled(pl_module))):
            self.exchange.intercepted = True
            self._step.enter_context(self._mode)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Compare the gradients, and find out once who reads the dropouts."""
        if not self.swapper.active:
            return
        if self.exchange.watched is not None:
            found = readers_of(loss, self.exchange.watched)
            for name, readers in found.items():
                self._readers.setdefault(name, {}).update(readers)
        self.comparison.compare(loss, pl_module, self.exchange.switch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Drop what the step held, and report after the first one."""
        self._step.close()
        if self.swapper.active and not self._told:
            self._report()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the rates, and the means of the comparison."""
        self._step.close()
        values = self.comparison.close_epoch()
        if self.noises:
            values["p_forward"], values["p_backward"] = self.mean_rates()
        for key, value in values.items():
            pl_module.log(f"{self.log_prefix}/{key}", value)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Show what was swapped, how the rates moved, and how far the gradient was from the standard one."""
        written = self.show_rates(trainer, {"forward pass": 0, "backward pass": 1})
        if self.comparison.history:
            written += log_figure(trainer, f"{self.log_prefix}/comparison", self.comparison.figure())
        if self.noises:
            columns = ["dropout", "kind", "p_forward", "p_backward", "weight gradient"]
            readings = self.readings or self._readings_now()
            rows = [[r.name, r.kind, r.p_forward, r.p_backward, r.weight_gradient] for r in readings]
            written += log_table(trainer, f"{self.log_prefix}/dropouts", columns, rows)
        self.figure_paths = written

    def state_dict(self) -> dict[str, Any]:
        """Return the comparison's history and running sums, as tensors and plain builtins."""
        return self.comparison.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.comparison.load_state_dict(state_dict)

    def release(self) -> None:
        """Give every module its class back; harmless when called twice."""
        self._step.close()
        super().release()

    # -- "classic" scales in evaluation too --------------------------------------------------------------------------

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Scale what `scale="classic"` scales in evaluation."""
        self._attach_for_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Scale what `scale="classic"` scales in evaluation."""
        self._attach_for_evaluation(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Scale what `scale="classic"` scales in evaluation."""
        self._attach_for_evaluation(trainer, pl_module)

    def _attach_for_evaluation(self, trainer: Any, pl_module: Any) -> None:
        if self.scale == "classic" and not self.swapper.active:
            self.attach(trainer, pl_module)

    # -- the first report --------------------------------------------------------------------------------------------

    def _readings_now(self) -> list[Reading]:
        faithful = self.weight_grad == "backward"
        return [
            reading_of(name, noise, self.exchange, list(self._readers.get(name, ())), faithful=faithful)
            for name, noise in self.noises.items()
        ]

    def _report(self) -> None:
        self._told = True
        self.readings = self._readings_now()
        missed = list(self._mode.missed) if self._mode is not None else []
        rank_zero_info(summary(self.readings, self._left_alone, missed))
        if missed and self.functional == "warn" and self.attention == "skip":
            rank_zero_warn(
                f"AugmentedDropout: the training step drops features by {', '.join(missed)}, which stay standard "
                f"dropout. Set functional='patch' or attention='math' to change them, or functional='ignore'.",
                category=LightningMethodsWarning,
            )


def _nothing_found(module: nn.Module, others: dict[str, nn.Module]) -> str:
    hidden = hidden_dropouts(module, attention=False)
    beside = [*(f"{name} ({type(m).__name__}, a subclass)" for name, m in others.items()), *hidden.values()]
    return (
        f"{type(module).__name__} holds no dropout of torch.nn"
        + (f" but {', '.join(beside)}" if beside else "")
        + ". Add nn.Dropout before the layers whose input is to be dropped, or set functional='patch' if the module "
        "calls F.dropout."
    )


def _compiled(module: nn.Module) -> bool:
    if getattr(module, "_compiler_ctx", None):  # Lightning's mark of torch.compile(module)
        return True
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in module.modules())
