"""Watch the capsules of a network: which are dead, which are kept, what a pose means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_methods.core._lightning import Callback
from lightning_methods.core.batches import inputs_of
from lightning_methods.core.gather import all_sum, world_size
from lightning_methods.core.passes import batches, preserved
from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from lightning_methods.ladder_capsule.base import best
from lightning_methods.ladder_capsule.drawing import entropy, image_grid, overlay
from lightning_methods.ladder_capsule.layers import check_positive
from lightning_methods.report import curves, is_reporting, log_figure, log_table

# as in Sabour et al. 2017, section 5.1
_STEPS = (-0.25, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


class CapsuleMonitor(Callback):
    r"""Show the health of the capsules of `LadderCapsuleNetwork` or `CapsuleNetwork`, and what their poses mean.

    Logs at the end of every epoch, of some batches that leave no trace in the training: `ladder_capsule/dead`, the
    share of primary capsules whose activity stays below `dead_below` in all images, `ladder_capsule/activity`, their
    mean activity, and of the ladder network also `ladder_capsule/starved`, the share that is never kept,
    `ladder_capsule/code_entropy`,

    .. math:: -\sum_i p_i \log p_i / \log N, \qquad p_i \propto \text{how often capsule } i \text{ is kept},

    which is 1 where all are kept equally often, and `ladder_capsule/unique_codes`, different code vectors an image
    (under DDP of each rank's images, averaged).

    Shows at the end of the fit the figures `health` (these by epoch) and `capsules` (how many capsules of each position
    are kept, or how active they are, over the image), and where the network has a decoder `reconstructions` and
    `perturbations` (the image as each number of its pose changes, section 5.1 of Sabour et al.); and a `health_table`.

    Args:
        data: `"val"`, `"train"`, `"test"` or a dataloader.
        limit: number of batches of each loader that are looked at.
        images: number of images that are drawn.
        dead_below: activity under which a capsule counts as dead.
        steps: what is added to a number of the pose.
        every_n_epochs: how often the capsules are looked at.
        log_prefix: first part of every logged key.

    Attributes:
        history: (epoch, what was logged).
        figure_paths: files of the figures of the last fit, where there are any.

    Raises:
        InvalidArgument: if a number is out of range.
        UnsupportedTraining: if the module is no capsule network of this package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=CapsuleMonitor(), logger=False)
    """

    method: ClassVar[str] = "ladder_capsule"

    def __init__(
        self,
        *,
        data: Any = "val",
        limit: int = 4,
        images: int = 8,
        dead_below: float = 0.01,
        steps: Sequence[float] = _STEPS,
        every_n_epochs: int = 1,
        log_prefix: str = "ladder_capsule",
    ) -> None:
        if data not in ("train", "val", "test") if isinstance(data, str) else not hasattr(data, "__iter__"):
            raise InvalidArgument(f"data={data!r}: 'train', 'val', 'test' or a dataloader is needed.")
        check_positive(limit=limit, images=images, every_n_epochs=every_n_epochs)
        if not 0 < dead_below < 1:
            raise InvalidArgument(f"dead_below={dead_below}: an activity between 0 and 1 is needed.")
        if not steps or not all(isinstance(step, (int, float)) and math.isfinite(step) for step in steps):
            raise InvalidArgument(f"steps={steps!r}: one or more finite numbers to add to a pose are needed.")
        self.data, self.limit, self.images, self.dead_below = data, limit, images, dead_below
        self.steps, self.every_n_epochs, self.log_prefix = tuple(steps), every_n_epochs, log_prefix
        self._begin()

    def _begin(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self.figure_paths: list[Path] = []
        self._epoch, self._looked = 0, -1  # the running epoch, and the last one that was looked at

    @property
    def state_key(self) -> str:
        """Tell several monitors in one trainer apart."""
        return self._generate_state_key(log_prefix=self.log_prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged so far."""
        history = [[epoch, dict(values)] for epoch, values in self.history]
        return {"history": history, "epoch": self._epoch, "looked": self._looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.history = [(epoch, dict(values)) for epoch, values in state_dict["history"]]
        self._epoch, self._looked = state_dict["epoch"], state_dict["looked"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look at the module, and begin anew; what a checkpoint brings comes after it."""
        missing = [name for name in ("grid", "capsules", "reconstruct") if not hasattr(pl_module, name)]
        if missing:
            raise UnsupportedTraining(
                f"CapsuleMonitor watches LadderCapsuleNetwork and CapsuleNetwork; {type(pl_module).__name__} has no "
                f"{', '.join(missing)}. Take it out of the callbacks, or train one of these."
            )
        if stage == "fit":
            self._begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch:
            self._look(trainer, pl_module, self._epoch)
        self._epoch = int(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the capsules, and log what was seen."""
        for name, value in self._look(trainer, pl_module, int(trainer.current_epoch)).items():
            pl_module.log(f"{self.log_prefix}/{name}", value, on_step=False, on_epoch=True, batch_size=1)

    def _look(self, trainer: Any, pl_module: Any, epoch: int) -> dict[str, float]:
        if epoch <= self._looked or (epoch + 1) % self.every_n_epochs or self._is_quiet(trainer):
            return {}
        self._looked = epoch
        values = self._health(trainer, pl_module)
        if values:
            self.history.append((epoch, values))
        return values

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the curves and the images."""
        if self._is_quiet(trainer):
            return
        # on every rank: they all read a batch, and rank zero shows it
        batch = next(batches(trainer, pl_module, self.data, description="CapsuleMonitor", limit=1), None)
        if not is_reporting(trainer):
            return
        if self.history:
            self._show_history(trainer)
        if batch is not None:
            self._show_images(trainer, pl_module, inputs_of(batch, pl_module.inputs)[: self.images])

    @staticmethod
    def _is_quiet(trainer: Any) -> bool:
        """Tell whether nothing would be shown; the same on every rank."""
        return bool(trainer.fast_dev_run or getattr(trainer, "barebones", False))

    # -- health --------------------------------------------------------------------------------------------------------

    def _health(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Return what is logged of some batches of all ranks, nothing where there is no batch."""
        alive = total = None
        codes: list[Tensor] = []
        images = 0
        for batch in batches(trainer, pl_module, self.data, description="CapsuleMonitor", limit=self.limit):
            out = pl_module(inputs_of(batch, pl_module.inputs))
            activity = out.activity.double()
            if total is None:
                alive, total = torch.zeros_like(activity[0]), torch.zeros_like(activity[0])
            alive = alive + (activity >= self.dead_below).sum(0)
            total = total + activity.sum(0)
            if hasattr(out, "code"):
                codes.append(out.code.bool())
            images += len(activity)
        if total is None or alive is None:
            return {}
        images = int(all_sum(torch.tensor(images, device=total.device)))
        found = {
            "dead": float((all_sum(alive) == 0).double().mean()),
            "activity": float(all_sum(total).mean() / images),
        }
        if codes:
            rows = torch.cat(codes)
            kept = all_sum(rows.sum(0, dtype=torch.float64))
            found["starved"] = float((kept == 0).double().mean())
            found["code_entropy"] = entropy(kept)
            share = torch.tensor(len(rows.unique(dim=0)) / len(rows), dtype=torch.float64, device=rows.device)
            found["unique_codes"] = float(all_sum(share)) / world_size()
        return found

    def _show_history(self, trainer: Any) -> None:
        names = list(self.history[-1][1])
        epochs = [epoch + 1 for epoch, _ in self.history]
        lines = {name: (epochs, [values[name] for _, values in self.history]) for name in names}
        figure = curves(lines, title="Health of the capsules", x_label="epoch", y_label="share")
        self._figure(trainer, "health", figure)
        rows = [[epoch + 1, *values.values()] for epoch, values in self.history]
        log_table(trainer, f"{self.log_prefix}/health_table", ["epoch", *names], rows)

    # -- images --------------------------------------------------------------------------------------------------------

    def _show_images(self, trainer: Any, pl_module: Any, x: Tensor) -> None:
        with preserved(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            pl_module.eval()
            out = pl_module(x)
            classes = [f"class {int(c)}" for c in out.scores.argmax(1)]
            self._show_capsules(trainer, pl_module, x, out, classes)
            if pl_module.decoder is not None:
                self._show_decoded(trainer, pl_module, x, out, classes)

    def _show_capsules(self, trainer: Any, pl_module: Any, x: Tensor, out: Any, classes: list[str]) -> None:
        kept = hasattr(out, "code")
        maps = (out.code if kept else out.activity).float().unflatten(1, pl_module.grid).sum(3)
        title = "Capsules that are kept, by position" if kept else "Activity of the capsules, by position"
        label = "capsules" if kept else "summed activity"
        figure = overlay(x.float(), maps, classes, pl_module.extent, title=title, value_label=label)
        self._figure(trainer, "capsules", figure)

    def _show_decoded(self, trainer: Any, pl_module: Any, x: Tensor, out: Any, classes: list[str]) -> None:
        shares = best(out.scores, 1).to(out.poses.dtype)
        images = pl_module.reconstruct(out.poses, shares)
        rows, names = [x.float(), images.float()], ["image", "decoded"]
        figure = image_grid(rows, names, classes, title="Images and their reconstructions")
        self._figure(trainer, "reconstructions", figure)
        pose, share = out.poses[:1], shares[:1]
        rows = []
        for d in range(pose.shape[2]):
            moved = pose.repeat(len(self.steps), 1, 1)
            moved[:, :, d] += torch.tensor(self.steps, device=pose.device, dtype=pose.dtype)[:, None]
            if hasattr(out, "errors"):  # poses of the ladder network have length 1
                moved = moved / moved.norm(dim=-1, keepdim=True).clamp(min=1e-8)
            rows.append(pl_module.reconstruct(moved, share.expand(len(self.steps), -1)).float())
        names = [f"number {d}" for d in range(len(rows))]
        columns = [f"{step:+.2f}" for step in self.steps]
        title = f"What each number of a pose means, {classes[0]}"
        self._figure(trainer, "perturbations", image_grid(rows, names, columns, title=title, x_label="added"))

    def _figure(self, trainer: Any, name: str, figure: Any) -> None:
        self.figure_paths += log_figure(trainer, f"{self.log_prefix}/{name}", figure)
