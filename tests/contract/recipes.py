"""The registry of the contract: add one recipe here, and a method goes through every case of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from lightning_methods.augmented_dropout import (
    AugmentedDropout,
    DropoutSchedule,
    DualDropout1d,
    LinearRate,
    dual_linear,
)
from lightning_methods.augmented_dropout.schedules import progress_of
from lightning_methods.cka import RepresentationSimilarity
from lightning_methods.errors import UnsupportedTraining
from lightning_methods.geometric_scattering import ScatteringExplorer
from lightning_methods.importance_weighting import ImportanceWeighting, WeightEffectMonitor
from lightning_methods.ladder_capsule import CapsuleMonitor
from lightning_methods.learned_optimizer import LearnedOptimizerMonitor
from lightning_methods.lit import LITDistillation
from lightning_methods.reproducibility import SeedStreams
from lightning_methods.reproducibility.seeding import Stream
from lightning_methods.rog import RobustGenerativeClassifier
from lightning_methods.snnl import DeepKNN, Entanglement, SoftNearestNeighborLoss
from lightning_methods.snnl.functional import feature_rows, soft_nearest_neighbor_loss
from lightning_methods.snnl.temperature import median_temperature, paper_temperature_step
from tests.contract.capsules import (
    IMAGES,
    CapsNetByHand,
    CapsNetModule,
    LadderByHand,
    LadderModule,
    LikelihoodCapsNet,
    LikelihoodLadder,
)
from tests.contract.distillation import (
    CHOICES,
    DistilledByHand,
    DistilledModule,
    StudentByHand,
    StudentModule,
    Untaught,
    made_teacher,
)
from tests.contract.graphs import GRAPHS, ScatteringByHand, ScatteringModule, TinyGraphModule, Unscattered
from tests.contract.learned import LearnedModule, MetaModule, Unmoved
from tests.support.training import ROWS, WIDTH, Samples, Settings, TinyModule

Module = Callable[[Settings], Any]


@dataclass(frozen=True)
class Recipe:
    """One way to use a method, and what is to be expected of it.

    Attributes:
        name: id in the tests.
        method: folder of the method.
        row: row of the compatibility matrix, in Markdown; recipes may share one.
        callbacks: builds what goes into the Trainer's callback list.
        module: builds the module that is trained.
        reference: builds the module that, trained without the callbacks, must end equal: the term written by hand into
            its own `training_step`, or the plain module for a probe. `None` where a method has no such form: then two
            runs of the recipe must agree.
        probe: whether nothing at all may change: equal bit for bit, random numbers included.
        refused: group of cases -> the error that must be raised there.
        scalars, figures, tables: keys that must reach the loggers.
        local: whether under DDP it shows numbers of each rank's own rows, not those of the joined batch.
        plain: builds the module without the method, from which a training with it must differ.
        samples: what the module is trained on.
        inner: names of the parts of the module that are compiled.
        beside: names of the recipes that can be put beside it; by default the next ones whose callbacks look for what
            this module has.
    """

    name: str
    method: str
    row: str
    callbacks: Callable[[], list[Any]] = list
    module: Module = TinyModule
    reference: Module | None = TinyModule
    probe: bool = False
    refused: Mapping[str, type[Exception]] = field(default_factory=dict)
    scalars: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    local: bool = False
    plain: Module = TinyModule
    samples: Samples = ROWS
    inner: tuple[str, ...] = ("first", "second")
    beside: tuple[str, ...] = ()


# -- soft nearest neighbour loss: the forms written by hand ------------------------------------------------------------


class SafeByHand(TinyModule):
    """The default preset on both hidden layers."""

    def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
        terms = []
        for name in ("first", "second"):
            h = feature_rows(layers[name])  # half precision is cast once, for the loss and for its temperature
            terms.append(-0.03 * soft_nearest_neighbor_loss(h, y, median_temperature(h)))
        loss = self.own_loss(layers["head"], y)
        most, size = 0.1 * loss.detach().float(), -(terms[0] + terms[1]).detach()
        return loss + (terms[0] + terms[1]) * (most / size if size > most else 1.0)


class PaperByHand(TinyModule):
    """The paper's temperature, one step a batch, on the second layer."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.t: float | Tensor = 1.0

    def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
        h = layers["second"]
        self.t = paper_temperature_step(h, y, self.t)
        return self.own_loss(layers["head"], y) + PAPER_WEIGHT * soft_nearest_neighbor_loss(h, y, 100.0 / self.t)


class MeasuredModule(TinyModule):
    """A module that logs the entanglement of its second layer in validation and training."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.entanglement = Entanglement()

    def total_loss(self, layers: dict[str, Tensor], y: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.entanglement(layers["second"], y)
            if not self.trainer.barebones:
                self.log(
                    "entanglement",
                    self.entanglement,
                    on_step=False,
                    on_epoch=True,
                    batch_size=len(y),
                    metric_attribute="entanglement",
                )
        return super().total_loss(layers, y)


# -- importance weighting ----------------------------------------------------------------------------------------------

CLASS_WEIGHTS = [1.0, 2.0, 4.0]


class WeightedByHand(TinyModule):
    """Class weights of mean 1 in the cross-entropy."""

    def own_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
        weights = (weights / weights.mean()).to(torch.promote_types(logits.dtype, torch.float32))
        losses = weights[y] * F.cross_entropy(logits, y, reduction="none")
        return losses.mean() if self.settings.divisor is None else losses.sum() / self.settings.divisor


PAPER_WEIGHT = -0.1  # -10 is meant for wide convolutional layers

# -- augmented dropout: noise that depends on the place in the training alone, so that runs can be compared ------------


class DroppedModule(TinyModule):
    """Whole features are dropped between the two layers, for all samples alike, and read through a view."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.drop: nn.Module = nn.Dropout1d(0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(1000 * self.current_epoch + batch_idx)
        return super().training_step(batch, batch_idx)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        second = self.read(first)
        return {"first": first, "second": second, "head": self.head(second)}

    def read(self, first: Tensor) -> Tensor:
        dropped = self.drop(first.t()).t()
        if self.settings.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.second, dropped, use_reentrant=False)
        return self.second(dropped)


class DroppedByHand(DroppedModule):
    """The definition on the layer itself."""

    weight_grad: Any = "backward"

    def read(self, first: Tensor) -> Tensor:
        linear, tanh = getattr(self.second, "_orig_mod", self.second)
        if not self.training:
            return self.second(first)
        shape = (1, WIDTH)
        return tanh(
            dual_linear(first, linear.weight, linear.bias, 0.3, 0.6, mask_shape=shape, weight_grad=self.weight_grad)
        )


class ErrorsByHand(DroppedByHand):
    """The same with the weight gradient that a dropout alone leaves."""

    weight_grad = "forward"


class DualModule(DroppedModule):
    """A dual dropout as part of the module."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.drop = DualDropout1d(0.3, 0.6)


class SilentModule(TinyModule):
    """A dropout that drops nothing."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.drop = nn.Dropout(0.0)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        return super().layers(self.drop(x))


class PathModule(DroppedModule):
    """Stochastic depth beside dropout."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.path = StochasticDepth(0.4, "batch")

    def read(self, first: Tensor) -> Tensor:
        return super().read(first + self.path(first))


class PathByHand(PathModule):
    """Both rates grow with the training."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        progress = progress_of(self.trainer, batch_idx)
        self.drop.p, self.path.p = 0.3 * progress, 0.4 * progress
        return super().training_step(batch, batch_idx)


# -- seed streams ------------------------------------------------------------------------------------------------------


class SharedNoiseModule(TinyModule):
    """Whole features are dropped between the two layers, the same ones for all samples and on every rank."""

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        if self.training:
            keep = (torch.rand(WIDTH) < 0.7).to(first.dtype)
            if dist.is_initialized():
                dist.broadcast(keep, 0)
            first = first * keep / 0.7
        if self.settings.checkpointing and torch.is_grad_enabled():
            second = checkpoint(self.second, first, use_reentrant=False)
        else:
            second = self.second(first)
        return {"first": first, "second": second, "head": self.head(second)}


class SeededByHand(SharedNoiseModule):
    """Torch's generator is seeded for each batch, and put back after the fit."""

    def setup(self, stage: str) -> None:
        self.outside = torch.get_rng_state()

    def teardown(self, stage: str) -> None:
        torch.set_rng_state(self.outside)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        key = Stream("dropout", 5).within(self.global_rank, self.current_epoch, 0)
        torch.default_generator.manual_seed(key(batch_idx))
        return super().training_step(batch, batch_idx)


_SNNL_REFUSED = {"manual": UnsupportedTraining}

RECIPES = [
    Recipe(
        "snnl-safe",
        "snnl",
        "`SoftNearestNeighborLoss`",
        callbacks=lambda: [SoftNearestNeighborLoss(["first", "second"])],
        reference=SafeByHand,
        refused=_SNNL_REFUSED,
        scalars=("snnl/value/second", "snnl/normalized/first", "snnl/loss", "snnl/total_loss", "snnl/valid_fraction"),
        figures=("snnl/layers_by_epoch", "snnl/curves", "snnl/class_pairs/second"),
        tables=("snnl/layers",),
    ),
    Recipe(
        "snnl-paper",
        "snnl",
        "`SoftNearestNeighborLoss`",
        callbacks=lambda: [
            SoftNearestNeighborLoss(
                "second", preset="paper", weight=PAPER_WEIGHT, temperature="paper", log_prefix="paper"
            )
        ],
        reference=PaperByHand,
        refused=_SNNL_REFUSED,
        scalars=("paper/temperature/second", "paper/loss"),
        figures=("paper/layers_by_epoch", "paper/curves", "paper/class_pairs/second"),
        tables=("paper/layers",),
    ),
    Recipe(
        "snnl-probe",
        "snnl",
        "`SoftNearestNeighborLoss`, weight 0",
        callbacks=lambda: [SoftNearestNeighborLoss(["first", "second", "head"], weight=0, log_prefix="probe")],
        probe=True,
        refused=_SNNL_REFUSED,
        scalars=("probe/value/head", "probe/normalized/second"),
        figures=("probe/layers_by_epoch", "probe/class_pairs/head"),
        tables=("probe/layers",),
    ),
    Recipe(
        "deep-knn",
        "snnl",
        "`DeepKNN`",
        callbacks=lambda: [DeepKNN(["first", "second"], k=3)],
        probe=True,
    ),
    Recipe(
        "entanglement",
        "snnl",
        "`Entanglement`",
        module=MeasuredModule,
        probe=True,
        scalars=("entanglement",),
        local=True,
    ),
    Recipe(
        "cka",
        "cka",
        "`RepresentationSimilarity`",
        callbacks=lambda: [RepresentationSimilarity(["first", "second", "head"], compare="init")],
        probe=True,
        scalars=("cka/similarity/second", "cka/influence/head"),
        figures=("cka/heatmap", "cka/curves"),
        tables=("cka/pairs", "cka/layers"),
        local=True,
    ),
    Recipe(
        "importance-weighting",
        "importance_weighting",
        "`ImportanceWeighting`",
        callbacks=lambda: [ImportanceWeighting(CLASS_WEIGHTS)],
        reference=WeightedByHand,
        scalars=("importance_weighting/hits", "importance_weighting/strength", "importance_weighting/val_risk"),
    ),
    Recipe(
        "weight-effect",
        "importance_weighting",
        "`WeightEffectMonitor`",
        callbacks=lambda: [WeightEffectMonitor(class_weights=CLASS_WEIGHTS, log_prefix="effect")],
        probe=True,
        scalars=("effect/effect", "effect/gradient_cosine", "effect/share/2", "effect/fraction/noise/0"),
        figures=("effect/effect_by_epoch", "effect/fraction_in_domain", "effect/weights"),
        tables=("effect/classes", "effect/effect_table"),
    ),
    Recipe(
        "weight-effect-twin",
        "importance_weighting",
        "`WeightEffectMonitor`, twin",
        callbacks=lambda: [WeightEffectMonitor(class_weights=CLASS_WEIGHTS, log_prefix="twin", twin=True)],
        probe=True,
        refused={"manual": UnsupportedTraining},
        scalars=("twin/twin_gap/in_domain", "twin/twin_agreement/noise"),
        figures=("twin/effect_by_epoch",),
        tables=("twin/effect_table",),
    ),
    Recipe(
        "augmented-dropout",
        "augmented_dropout",
        "`AugmentedDropout`",
        callbacks=lambda: [AugmentedDropout(0.3, 0.6, include="drop")],
        module=DroppedModule,
        reference=DroppedByHand,
        scalars=("augmented_dropout/p_forward", "augmented_dropout/p_backward"),
        tables=("augmented_dropout/dropouts",),
    ),
    Recipe(
        "augmented-dropout-default",
        "augmented_dropout",
        "`AugmentedDropout`, equal rates",
        callbacks=lambda: [AugmentedDropout(log_prefix="neutral")],
        module=SilentModule,
        probe=True,
        scalars=("neutral/p_forward",),
        tables=("neutral/dropouts",),
    ),
    Recipe(
        "dropout-schedule",
        "augmented_dropout",
        "`DropoutSchedule`",
        callbacks=lambda: [DropoutSchedule(LinearRate(), include=["drop", "path"])],
        module=PathModule,
        reference=PathByHand,
        scalars=("dropout_schedule/p",),
        figures=("dropout_schedule/rates",),
    ),
    Recipe(
        "dual-dropout",
        "augmented_dropout",
        "`DualDropout`, 1d to 3d, `DualAlphaDropout`",
        module=DualModule,
        reference=ErrorsByHand,
    ),
    Recipe(
        "rog",
        "rog",
        "`RobustGenerativeClassifier`",
        callbacks=lambda: [RobustGenerativeClassifier(["first", "second"], every_n_epochs=1)],
        probe=True,
        scalars=("rog/fit/accuracy", "rog/fit/softmax", "rog/weight/first", "rog/noise_rate"),
        figures=("rog/transition", "rog/distances", "rog/weights", "rog/memorisation"),
        tables=("rog/suspected_mislabels", "rog/classes", "rog/layers"),
    ),
    Recipe(
        "seed-streams",
        "reproducibility",
        "`SeedStreams`",
        # fingerprints tell the loaders and the rounding of one process from those of two
        callbacks=lambda: [SeedStreams(dropout=5, fingerprint="off")],
        module=SharedNoiseModule,
        reference=SeededByHand,
        plain=SharedNoiseModule,
    ),
    Recipe(
        "scattering-classifier",
        "geometric_scattering",
        "`ScatteringClassifier`",
        module=ScatteringModule,
        reference=ScatteringByHand,
        refused={"foreign": UnsupportedTraining},
        scalars=("train/accuracy", "val/loss"),
        plain=Unscattered,
        samples=GRAPHS,
        inner=("encoder", "head"),
        beside=("importance-weighting", "scattering-explorer"),
    ),
    Recipe(
        "scattering-explorer",
        "geometric_scattering",
        "`ScatteringExplorer`",
        callbacks=lambda: [ScatteringExplorer(every_n_epochs=1)],
        module=TinyGraphModule,
        reference=TinyGraphModule,
        probe=True,
        scalars=("scattering/dimension/90", "scattering/own_nearest"),
        figures=tuple(
            f"scattering/{name}" for name in ("distances", "nearest", "preference", "filters", "attribution")
        ),
        tables=("scattering/dimensions", "scattering/distances_table", "scattering/nearest_table"),
        plain=TinyGraphModule,
        samples=GRAPHS,
    ),
    Recipe(
        "lit-distiller",
        "lit",
        "`LITDistiller`",
        module=DistilledModule,
        reference=DistilledByHand,
        refused={"manual": UnsupportedTraining, "foreign": UnsupportedTraining},
        scalars=("train/loss", "lit/kd_soft", "lit/phase", "val/agreement", "lit/student_fed/second"),
        figures=("lit/section_errors", "lit/drift"),
        tables=("lit/sections", "lit/networks"),
        plain=Untaught,
        inner=("student.first", "student.second"),
        beside=("weight-effect",),
    ),
    Recipe(
        "lit-distillation",
        "lit",
        "`LITDistillation`",
        callbacks=lambda: [LITDistillation(made_teacher(), ["first", "second"], student=None, **CHOICES)],
        module=StudentModule,
        reference=StudentByHand,
        refused={"manual": UnsupportedTraining},
        scalars=("lit/loss", "lit/kd_soft", "lit/phase"),
        figures=("lit/section_errors",),
        tables=("lit/sections", "lit/networks"),
        plain=StudentModule,
    ),
    Recipe(
        "ladder-capsule-network",
        "ladder_capsule",
        "`LadderCapsuleNetwork`",
        module=LadderModule,
        reference=LadderByHand,
        refused={"foreign": UnsupportedTraining},
        scalars=("train/loss", "train/code_reg", "val/accuracy", "val/margin_gap"),
        plain=LikelihoodLadder,
        samples=IMAGES,
        inner=("backbone", "head"),
        beside=("capsule-monitor",),
    ),
    Recipe(
        "capsule-network",
        "ladder_capsule",
        "`CapsuleNetwork`",
        module=CapsNetModule,
        reference=CapsNetByHand,
        refused={"foreign": UnsupportedTraining},
        scalars=("train/loss", "train/reconstruction", "val/accuracy", "val/margin_gap"),
        plain=LikelihoodCapsNet,
        samples=IMAGES,
        inner=("head",),
        beside=("capsule-monitor",),
    ),
    Recipe(
        "capsule-monitor",
        "ladder_capsule",
        "`CapsuleMonitor`",
        callbacks=lambda: [CapsuleMonitor(images=2, steps=(-0.2, 0.2))],
        module=LadderModule,
        reference=LadderModule,
        probe=True,
        refused={"foreign": UnsupportedTraining},
        scalars=("ladder_capsule/dead", "ladder_capsule/code_entropy"),
        figures=tuple(f"ladder_capsule/{name}" for name in ("health", "capsules", "reconstructions", "perturbations")),
        tables=("ladder_capsule/health_table",),
        plain=LadderModule,
        samples=IMAGES,
        inner=("backbone",),
        beside=("augmented-dropout-default",),
    ),
    Recipe(
        "learned-optimizer",
        "learned_optimizer",
        "`LearnedOptimizer`",
        module=LearnedModule,
        reference=None,
    ),
    Recipe(
        "learned-optimizer-monitor",
        "learned_optimizer",
        "`LearnedOptimizerMonitor`",
        callbacks=lambda: [LearnedOptimizerMonitor()],
        probe=True,
        scalars=tuple(
            f"learned_optimizer/{name}" for name in ("step_size", "relative_step", "learning_rate", "adam_cosine")
        ),
        figures=("learned_optimizer/curves",),
        tables=("learned_optimizer/tensors",),
    ),
    Recipe(
        "meta-training",
        "learned_optimizer",
        "`MetaTraining`",
        module=MetaModule,
        reference=None,
        refused={"manual": UnsupportedTraining, "foreign": UnsupportedTraining},
        scalars=("meta/loss", "meta/reparam_weight", "val/meta_loss"),
        plain=Unmoved,
        inner=(),
        beside=("learned-optimizer-monitor",),
    ),
]
