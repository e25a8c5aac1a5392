"""Meta-training of a learned optimizer as a LightningModule: one batch is one outer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_methods.core._lightning import LightningModule, OneFamily
from lightning_methods.errors import InvalidArgument, UnsupportedTraining, check_choice
from lightning_methods.learned_optimizer.architecture import Architecture, Features
from lightning_methods.learned_optimizer.estimators import ESTIMATORS, Episode, Estimates, Estimator, estimate
from lightning_methods.learned_optimizer.families import ClassifierFamily
from lightning_methods.learned_optimizer.functional import combine_sums, estimator_sums, variances
from lightning_methods.learned_optimizer.guard import inputs_of
from lightning_methods.learned_optimizer.problem import InnerTraining
from lightning_methods.learned_optimizer.samples import samples_of
from lightning_methods.learned_optimizer.schedule import TruncationSchedule
from lightning_methods.learned_optimizer.seeding import generator_of, seed_of
from lightning_methods.learned_optimizer.tasks import ModuleTask
from lightning_methods.learned_optimizer.weights import Weights, load_weights, save_weights

VARIANCES = ("same", "split", "ema")
_EMA = 0.9


class MetaTraining(OneFamily, LightningModule):
    r"""Train a learned optimizer on tasks of your own (Metz et al. 2019), in an ordinary Trainer.

    The outer loss is smoothed by normal noise on the weights and its gradient estimated from antithetic pairs:

    .. math::
        \bar L(\theta) = E_{\epsilon \sim N(0, \sigma^2)} L(\theta + \epsilon), \qquad
        g = w\, g_{reparam} + (1 - w)\, g_{ES}, \quad w = \frac{v_{reparam}^{-1}}{v_{reparam}^{-1} + v_{ES}^{-1}}

    One batch of the Trainer is one outer step, whatever is in the batch: `Trainer(max_steps=1000)` takes 1000 of them.
    Nothing but counters decides the random numbers, so that a resumed training goes on bit by bit, and two processes
    with S pairs each do what one with 2 S does.

    Logs `meta/loss`, `meta/unroll`, `meta/diverged`, `meta/reparam_weight`, `meta/variance_reparam`,
    `meta/variance_es`, `meta/grad_norm`, `meta/inner_steps`, and in validation `val/meta_loss`: the mean over held-out
    inner trainings from the start to `eval_steps`.

    Args:
        tasks: `ModuleTask`s or families; every episode draws one.
        features, hidden_size, hidden_layers, step_mult, exp_mult, normalize_step: see `Architecture`.
        start: weights to go on from, by name or file; they decide the architecture.
        estimator: `"merged"` (the paper's), `"reparam"`, `"es"`, `"pes"`, `"nres"`.
        num_pairs: antithetic pairs a task, on each device.
        tasks_per_step: tasks whose gradients are averaged.
        unroll: inner steps an outer step: the truncation, which grows in the paper.
        horizon: inner steps an episode: a number, a schedule, or None for episodes of one unroll.
        sigma: deviation of the noise. The paper has 0.01.
        outer_loss: on held-out samples (`"valid"`, which teaches generalisation) or on those trained on.
        val_fraction: share that each inner training holds out.
        variance: `"same"` pairs give gradient and variance (the paper); `"split"`: other pairs give it, unbiased;
            `"ema"`: that of earlier steps too, which one pair needs.
        second_order: whether gradients flow through inner gradients.
        outer_lr: of Adam on the weights; it falls to a tenth along a cosine.
        outer_clip: largest norm of the outer gradient.
        loss_clip: larger losses count as this much.
        log_floor: the outer loss is the logarithm of this much plus the mean of an unroll, so that relative gains
            count, on easy and on hard tasks, early and late. None, as in the paper, for the mean itself.
        clock: step of the inner trainings at which time stands still and Adam begins to take over, as the guard of
            `LearnedOptimizer` does it, so that what is trained is what will run. It is exported with the weights. None:
            learned steps as they are.
        decay_steps: of the cosine; by default the Trainer's `max_steps`.
        eval_tasks: for validation; by default `tasks`.
        eval_steps: inner steps of a validation. Default 200.
        eval_seeds: inner trainings of a validation, a task.
        steps_per_epoch: outer steps an epoch, without a datamodule.
        seed: of everything random.

    Raises:
        InvalidArgument: if a setting is out of range; one pair with `"merged"` needs `variance="ema"`.

    Example:
        >>> task = ModuleTask(nn.Linear(4, 3), torch.randn(60, 4), torch.arange(60) % 3)
        >>> model = MetaTraining([task], unroll=5)
        >>> model.theta.shape
        torch.Size([706])
    """

    def __init__(
        self,
        tasks: list[ModuleTask | ClassifierFamily],
        *,
        features: Features = "paper",
        hidden_size: int = 32,
        hidden_layers: int = 1,
        step_mult: float | None = None,
        exp_mult: float = 1e-3,
        normalize_step: bool = False,
        start: str | None = None,
        estimator: Estimator = "merged",
        num_pairs: int = 2,
        tasks_per_step: int = 1,
        unroll: TruncationSchedule | int = 100,
        horizon: TruncationSchedule | int | None = None,
        sigma: float = 0.01,
        outer_loss: Literal["valid", "train"] = "valid",
        val_fraction: float = 0.3,
        variance: Literal["same", "split", "ema"] = "same",
        second_order: bool = True,
        outer_lr: float = 3e-3,
        outer_clip: float = 1.0,
        loss_clip: float = 5.0,
        log_floor: float | None = None,
        clock: int | None = None,
        decay_steps: int | None = None,
        eval_tasks: list[ModuleTask | ClassifierFamily] | None = None,
        eval_steps: int = 200,
        eval_seeds: int = 4,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(tasks, estimator, num_pairs, tasks_per_step, variance, outer_loss, clock)
        _check_positive(sigma=sigma, outer_lr=outer_lr, outer_clip=outer_clip, log_floor=log_floor)
        _check_pairs(estimator, num_pairs, variance, processes=2 if variance == "split" else 1)
        # plain values only, so that checkpoints load with weights_only=True
        self.save_hyperparameters(
            *("features", "hidden_size", "hidden_layers", "step_mult", "exp_mult", "normalize_step", "estimator"),
            *("num_pairs", "tasks_per_step", "sigma", "outer_loss", "val_fraction", "variance", "second_order"),
            *("outer_lr", "outer_clip", "loss_clip", "log_floor", "clock", "decay_steps", "eval_steps", "eval_seeds"),
            "seed",
        )
        if start is not None:
            given = load_weights(start)
            self.architecture, theta = given.architecture, given.theta.clone()
        else:
            mult = step_mult if step_mult is not None else 3e-3 if normalize_step else 1e-3
            self.architecture = Architecture(features, hidden_size, hidden_layers, mult, exp_mult, normalize_step)
            theta = self.architecture.initial(generator_of(seed, "theta"))
        self.theta = nn.Parameter(theta)
        self.tasks, self.eval_tasks = list(tasks), list(eval_tasks) if eval_tasks is not None else list(tasks)
        self.estimator, self.num_pairs, self.tasks_per_step = estimator, num_pairs, tasks_per_step
        self.unroll = unroll if isinstance(unroll, TruncationSchedule) else TruncationSchedule("constant", unroll)
        self.horizon = TruncationSchedule("constant", horizon) if isinstance(horizon, int) else horizon
        self.sigma, self.variance, self.loss_clip = sigma, variance, loss_clip
        self.log_floor, self.clock = log_floor, clock
        self.inner: dict[str, Any] = {
            "outer_loss": outer_loss,
            "val_fraction": val_fraction,
            "second_order": second_order,
            "clock": clock,
        }
        self.outer_lr, self.outer_clip, self.decay_steps = outer_lr, outer_clip, decay_steps
        self.eval_steps, self.eval_seeds, self.steps_per_epoch, self.seed = (
            eval_steps,
            eval_seeds,
            steps_per_epoch,
            seed,
        )
        self.outer_step: Tensor
        self.register_buffer("outer_step", torch.zeros((), dtype=torch.int64))
        self.variance_ema: Tensor
        self.register_buffer("variance_ema", torch.zeros(2, self.architecture.size, dtype=torch.float64))
        self.longest = 0
        self.widest = 0
        self._slots: list[dict[str, Any] | None] = [None] * tasks_per_step
        self._taken = [0] * tasks_per_step

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the samples of the datamodule, where tasks have none."""
        if stage == "fit":
            _check_pairs(self.estimator, self.num_pairs, self.variance, self.trainer.world_size)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return
        inputs, targets = samples_of(datamodule)
        self.tasks = [task.with_data(inputs, targets) for task in self.tasks]
        self.eval_tasks = [task.with_data(inputs, targets) for task in self.eval_tasks]

    def train_dataloader(self) -> Any:
        """Return turns to take: an outer step reads no batch."""
        return _Turns(self.steps_per_epoch)

    def val_dataloader(self) -> Any:
        """Return one turn for each task of the validation."""
        return _Turns(len(self.eval_tasks))

    def configure_optimizers(self) -> Any:
        """Return Adam on the weights of the learned optimizer, its rate falling to a tenth along a cosine."""
        optimizer = torch.optim.Adam([self.theta], lr=self.outer_lr, betas=(0.9, 0.99))
        most = self.trainer.max_steps
        total = self.decay_steps or (most if most > 0 else self.trainer.estimated_stepping_batches)

        def share(step: int) -> float:
            return 0.1 + 0.9 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0))) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a number whose gradient is the estimated one, so that the Trainer does the rest as for any module."""
        if not self.automatic_optimization:
            raise UnsupportedTraining("MetaTraining optimises automatically; automatic_optimization=False was set.")
        with torch.autocast(self.device.type, enabled=False):
            gradient = self._outer_step()
        return (self.theta * gradient.to(self.theta)).sum()

    def _outer_step(self) -> Tensor:
        step = int(self.outer_step)
        unroll = self.unroll.length(step, generator_of(self.seed, "unroll", step))
        windows = [self._window(slot, step, unroll) for slot in range(self.tasks_per_step)]
        gradient, shown = self._gradient(windows)
        norm = gradient.norm()
        if bool(norm > self.outer_clip):
            gradient = gradient * (self.outer_clip / norm)
        self.outer_step += 1
        inner = sum(self._taken) * 2 * self.num_pairs
        shown |= {"unroll": float(unroll), "grad_norm": norm, "inner_steps": float(inner)}
        self._log({f"meta/{name}": torch.as_tensor(x) for name, x in shown.items()})
        return gradient

    @property
    def _precise(self) -> Tensor:
        """Return the weights in float32 or better, whatever the Trainer keeps them in."""
        return self.theta.detach().to(torch.promote_types(self.theta.dtype, torch.float32))

    # -- one outer step ----------------------------------------------------------------------------------------------

    def _window(self, slot: int, step: int, unroll: int) -> Estimates:
        first = self.num_pairs * self.global_rank
        pairs = range(first, first + self.num_pairs)
        if self._slots[slot] is None:
            self._slots[slot] = self._begin(slot, step, unroll, pairs)
        running = self._slots[slot]
        assert running is not None
        episode: Episode = running["episode"]
        seeds = [seed_of(self.seed, "window", step, slot, pair) for pair in pairs]
        before = episode.t
        given = estimate(
            self._problem(running),
            self._precise,
            episode,
            unroll,
            seeds,
            estimator=self.estimator,
            sigma=self.sigma,
            loss_clip=self.loss_clip,
            log_floor=self.log_floor,
        )
        self._taken[slot] = episode.t - before
        if episode.is_over:
            self._slots[slot] = None
        return given

    def _begin(self, slot: int, step: int, unroll: int, pairs: range) -> dict[str, Any]:
        place = (self.seed, "episode", step, slot)
        horizon = unroll if self.horizon is None else self.horizon.length(step, generator_of(*place, "horizon"))
        self.longest = max(self.longest, horizon)
        chosen = int(torch.randint(len(self.tasks), (), generator=generator_of(*place, "task")))
        running: dict[str, Any] = {"task": chosen, "seed": seed_of(*place, "sample")}
        seeds = [seed_of(*place, "pair", pair) for pair in pairs]
        state = self._problem(running).begin(self._precise, seeds)
        running["episode"] = Episode(0, horizon, state)
        self.widest = max(self.widest, *(inputs_of(shape) for shape in running["problem"].form.shapes))
        return running

    def _problem(self, running: dict[str, Any]) -> InnerTraining:
        if "problem" not in running:
            task = self.tasks[running["task"]].sample(running["seed"])
            running["problem"] = InnerTraining(self.architecture, task, **self.inner)
        return running["problem"]

    def _gradient(self, windows: list[Estimates]) -> tuple[Tensor, dict[str, Any]]:
        """Return the gradient from all pairs of all ranks, and what is shown."""
        losses = torch.stack([w.losses.double().mean() for w in windows]).mean()
        diverged = torch.stack([w.diverged for w in windows]).mean()
        first = self.num_pairs * self.global_rank
        halves = [[i for i in range(self.num_pairs) if (first + i) % 2 == half] for half in (0, 1)]
        sums = torch.stack([torch.stack([_sums(w, rows) for rows in halves]) for w in windows])
        counts = torch.tensor([float(len(rows)) for rows in halves], dtype=torch.float64, device=sums.device)
        sums, counts, scalars = self._added_up(sums, counts, torch.stack([losses, diverged]))
        shown = {"loss": scalars[0], "diverged": scalars[1]}
        total = counts.sum()
        if self.estimator != "merged":
            kind = 0 if self.estimator == "reparam" else 2
            name = "variance_reparam" if kind == 0 else "variance_es"
            if total > 1:
                shown[name] = variances(sums.sum(1).mean(0), total)[kind // 2].sum()
            return (sums.sum(1)[:, kind] / total).mean(0), shown
        mixed = [self._mixed(own, counts) for own in sums]
        v = [variances(own.sum(0), total) for own in sums] if total > 1 else []
        if v:
            shown |= {"variance_reparam": torch.stack([x[0].sum() for x in v]).mean()}
            shown |= {"variance_es": torch.stack([x[1].sum() for x in v]).mean()}
        shown["reparam_weight"] = torch.stack([weight.mean() for _, weight in mixed]).mean()
        return torch.stack([gradient for gradient, _ in mixed]).mean(0), shown

    def _mixed(self, halves: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the merged gradient of one task from the sums of even and odd pairs."""
        if self.variance == "split":
            (a, v), (b, w) = (
                combine_sums(halves[i], counts[i], variances(halves[1 - i], counts[1 - i])) for i in (0, 1)
            )
            first, second = (counts / counts.sum()).unbind()
            return first * a + second * b, first * v + second * w
        sums, total = halves.sum(0), counts.sum()
        if self.variance == "same":
            return combine_sums(sums, total)
        # deviations from zero rather than from a mean, which one pair does not have
        now = torch.stack([sums[1] / total, sums[3] / total]).clamp(max=1e30)
        self.variance_ema.lerp_(now, 1 - _EMA)
        return combine_sums(sums, total, (self.variance_ema[0], self.variance_ema[1]))

    def _added_up(self, sums: Tensor, counts: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return sums, counts, scalars
        flat = torch.cat([sums.flatten(), counts, scalars])
        dist.all_reduce(flat)
        parts = flat.split([sums.numel(), len(counts), len(scalars)])
        return parts[0].view_as(sums), parts[1], parts[2] / dist.get_world_size()

    # -- validation, export, checkpoints -----------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Train a task of the validation from the start, by the weights as they are; once for each task."""
        if batch_idx >= len(self.eval_tasks):  # batches of a datamodule may be more
            return
        losses = self.evaluate(self.eval_tasks[batch_idx])
        self._log({"val/meta_loss": losses.mean(), "val/meta_final": losses[:, -1].mean()})

    def evaluate(self, task: Any, *, steps: int | None = None, seeds: int | None = None) -> Tensor:
        """Return the outer losses of inner trainings with the weights as they are.

        Shapes:
            -> `(seeds, steps)`.

        Args:
            task: a task or a family.
            steps: of each training. Default `eval_steps`.
            seeds: trainings. Default `eval_seeds`.
        """
        pairs = [seed_of("evaluation", i) for i in range(seeds or self.eval_seeds)]
        # inner gradients are needed, which the Trainer's inference mode would not give
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            width = self.widest or None if self.clock else None  # beyond it the guard acts, where it is a part at all
            problem = InnerTraining(self.architecture, task.sample(pairs[0]), **self.inner, width=width)
            theta = self._precise.expand(2 * len(pairs), -1)
            state = problem.begin(theta, pairs)
            losses, _ = problem.unroll(theta, state, 0, steps or self.eval_steps, pairs, differentiable=False)
        losses = torch.where(losses <= self.loss_clip, losses, self.loss_clip)
        return losses[: len(pairs)]

    def export(self, path: str | Path, **card: Any) -> Path:
        """Write the weights to a file that `LearnedOptimizer` loads.

        The card says the longest inner training (`horizon`) and the most inputs of a unit (`width`) that there were:
        beyond them the guard of `LearnedOptimizer` hands over to Adam.

        Args:
            path: with the ending `.json`.
            card: what else is to be said of them.
        """
        said = {
            "made_by": "MetaTraining",
            "tasks": [task.name for task in self.tasks],
            "horizon": self.longest or None,
            "width": self.widest or None,
            "estimator": self.estimator,
            "outer_steps": int(self.outer_step),
            "seed": self.seed,
        }
        said |= {"clock": self.clock} if self.clock else {}
        theta = self.theta.detach().float().cpu().clone()
        return save_weights(path, Weights(Path(path).stem, self.architecture, theta, said | card))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the inner trainings that are on their way."""
        checkpoint["meta"] = {
            "longest": self.longest,
            "widest": self.widest,
            "slots": [_plain(slot) for slot in self._slots],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the inner trainings."""
        saved = checkpoint.get("meta")
        if saved is None:
            return
        self.longest = saved["longest"]
        self.widest = saved.get("widest", 0)
        self._slots = [None if s is None else {**s, "episode": Episode(**s["episode"])} for s in saved["slots"]]

    def _log(self, values: dict[str, Tensor]) -> None:
        if self._trainer is None or self._trainer.barebones:
            return
        for name, value in values.items():
            self.log(
                name,
                value.detach().float(),
                on_step=False,
                on_epoch=True,
                batch_size=1,
                prog_bar=name.endswith("loss"),
            )


class _Turns:
    """As many empty batches as there are turns; no DataLoader, so that Trainers do not divide it among processes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.count):
            yield torch.tensor([i])


def _sums(window: Estimates, rows: list[int]) -> Tensor:
    reparam = window.es if window.reparam is None else window.reparam
    es = window.reparam if window.es is None else window.es
    assert reparam is not None
    assert es is not None
    return estimator_sums(reparam[rows], es[rows])


def _plain(slot: dict[str, Any] | None) -> dict[str, Any] | None:
    if slot is None:
        return None
    return {"task": slot["task"], "seed": slot["seed"], "episode": dict(vars(slot["episode"]))}


def _check_pairs(estimator: str, num_pairs: int, variance: str, processes: int = 1) -> None:
    """Raise `InvalidArgument` unless the pairs have the variances that are asked for."""
    least = {"same": 2, "split": 4, "ema": 1}[variance]
    total = num_pairs * processes
    if estimator == "merged" and (total < least or (variance == "split" and total % 2)):
        raise InvalidArgument(
            f"num_pairs={num_pairs}: variance={variance!r} needs at least {least} pairs, of all devices together (an "
            "even number for 'split'). Use more, or variance='ema', which remembers that of earlier steps."
        )


def _check(
    tasks: Sequence[Any],
    estimator: str,
    num_pairs: int,
    tasks_per_step: int,
    variance: str,
    outer_loss: str,
    clock: int | None,
) -> None:
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("variance", variance, VARIANCES)
    check_choice("outer_loss", outer_loss, ("valid", "train"))
    if not tasks:
        raise InvalidArgument("MetaTraining needs at least one task.")
    if min(num_pairs, tasks_per_step) < 1:
        raise InvalidArgument(f"num_pairs={num_pairs}, tasks_per_step={tasks_per_step}: positive numbers are needed.")
    if clock is not None and clock < 1:
        raise InvalidArgument(f"clock={clock}: a positive number of steps is needed, or None.")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise InvalidArgument(f"{name}={value}: a positive number is needed.")
