"""Fit generative classifiers on the hidden layers of a trained network, and classify with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_methods.core._lightning import Callback, rank_zero_info, rank_zero_warn
from lightning_methods.core.passes import loaders_of
from lightning_methods.core.progress import phase
from lightning_methods.core.taps import FeatureTaps, Pool
from lightning_methods.errors import InvalidArgument, UnsupportedTraining, check_choice
from lightning_methods.rog.audit import LabelAudit, audit, from_verdicts, true_labels_of, verdict
from lightning_methods.rog.classifier import GenerativeClassifier, check_priors
from lightning_methods.rog.display import show
from lightning_methods.rog.ensemble import Fitted, LayerEnsemble, Mixing, fit_ensemble
from lightning_methods.rog.estimators import Estimator
from lightning_methods.rog.evaluate import accuracies, log_probabilities, outlier_auroc
from lightning_methods.rog.features import Collected, Reader, collect, mean_pool
from lightning_methods.rog.mcd import check_support_fraction
from lightning_methods.rog.module import RobustModule
from lightning_methods.rog.surroundings import (
    batch_limit,
    blocks_before_classifier,
    fingerprint,
    is_last_epoch,
    say_if_augmented,
    say_if_useless,
    say_what_is_missing,
    without_data,
)

_A_CLASS_PER_DIMENSION = 5  # samples of a class that each feature needs
_FEWEST_DIMENSIONS = 8


class RobustGenerativeClassifier(Callback):
    r"""Make a network that was trained on noisy labels accurate again, without retraining it.

    When the training ends, an extra pass reads the features of the training samples in some layers. On each layer a
    normal distribution for each class with one shared covariance is fitted by the minimum covariance determinant, which
    leaves out the samples that lie apart, most of which are mislabelled; the layers are mixed with weights that a
    validation split decides, whose labels may be noisy too (Lee et al. 2019):

    .. math:: P(y = c \mid x) = \sum_l \alpha_l\, \mathrm{softmax}_c\left(\mu_{lc}^T \Sigma_l^{-1} f_l(x)
        - \tfrac{1}{2} \mu_{lc}^T \Sigma_l^{-1} \mu_{lc} + \log \beta_c\right)

    The network itself does not change, and neither does what it logs or predicts. With `trainer.validate`, `test` and
    `predict` another pass classifies the same data; without an earlier fit, the training data are read then. What was
    fitted goes into checkpoints: `trainer.test(ckpt_path=...)` needs no training data.

    Logs, for the stages `fit` (on the validation split), `val` and `test`: `rog/<stage>/softmax`,
    `rog/<stage>/accuracy` (of the ensemble) and `rog/<stage>/layer/<layer>` beside each other; `rog/weight/<layer>`,
    `rog/noise_rate` and, where the dataset knows `true_targets`, `rog/suspects_precision` and `rog/suspects_recall`; as
    figures the transition matrix of the labels, distances and layers; as tables the suspected mislabels and the layers.
    `audit`, `ensemble`, `predictions` (log-probabilities, after `trainer.predict`) and `history` hold them.

    Args:
        layers: names or patterns; `None` takes up to four blocks before the classifier, and says which.
        estimator: `"mcd"`, `"official"` or `"sample"`, see `GenerativeClassifier`.
        support_fraction: `None` for the most robust support (the paper), a share from 0.5 to 1, `"confirmed"` for a
            plain estimate of the samples whose labels the most robust one confirms, or `"auto"`, which tries all
            these on the validation split, and the softmax itself.
        ensemble: `"noisy_val"` learns the weights on the half of the validation split that fits its labels best,
            `"clean_val"` on all of it; `"uniform"` or `"last"` without one.
        priors: `"uniform"`, `"empirical"` or a probability for each class.
        every_n_epochs: fit also during the training, which shows how far the network memorises.
        train: `"train"` or a dataloader of the training samples, better without augmentation.
        validation: `"val"` or a dataloader of samples that were not trained on.
        outliers: a dataloader of outliers; `trainer.test` then logs how well they are told from the test data.
        num_classes: number of classes, by default that of the logits.
        max_per_class: training samples of each class that are used, drawn at random where there are more.
        max_feature_bytes: most memory for features of training samples; above it fewer are used.
        max_dim: layers of more features are reduced to so many principal components; by default a fifth of the usual
            number of samples in a class, at most 512.
        shrinkage: see `GenerativeClassifier`.
        inputs: where the inputs are in a batch: index, key or function.
        labels: where the targets are in a batch: index, key or function.
        select: item of a layer that returns a tuple or a dict.
        pool: `"mean"` over the positions of maps (n, C, H, W) and the tokens of sequences (n, T, D), `"gap"`,
            `"flatten"` or a function, see `lightning_methods.core.taps.FeatureTaps`.
        on_repeat: `"error"`, `"last"` or `"all"` for a layer that runs several times.
        seed: of what is drawn at random.
        log_prefix: first part of every logged key, to tell two callbacks apart.

    Raises:
        InvalidArgument: for settings that cannot be read, and features that are not finite.
        LayerNotFound: if a pattern matches no layer, or no classifier is found after other blocks.
        UnsupportedTraining: when used without a fit, a checkpoint of one, or training data.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import RobustGenerativeClassifier
        >>> trainer = Trainer(callbacks=RobustGenerativeClassifier(["layer3", "layer4"]), logger=False)

    Deviations from the paper: robust starts and shrinkage in the search; principal components where a class has less
    than five samples a feature; `"auto"`, where the paper always keeps about half of each class.
    """

    def __init__(
        self,
        layers: str | list[str] | None = None,
        *,
        estimator: Estimator = "mcd",
        support_fraction: float | Literal["auto", "confirmed"] | None = "auto",
        ensemble: Mixing = "noisy_val",
        priors: Literal["uniform", "empirical"] | list[float] = "uniform",
        every_n_epochs: int | None = None,
        train: str | DataLoader = "train",
        validation: str | DataLoader = "val",
        outliers: DataLoader | None = None,
        num_classes: int | None = None,
        max_per_class: int = 5000,
        max_feature_bytes: int = 2 << 30,
        max_dim: int | None = None,
        shrinkage: float = 0.2,
        inputs: int | str | Callable[[Any], Any] | None = None,
        labels: int | str | Callable[[Any], Tensor] | None = None,
        select: int | str | None = None,
        pool: Pool | Literal["mean"] = "mean",
        on_repeat: Literal["error", "last", "all"] = "error",
        seed: int = 0,
        log_prefix: str = "rog",
    ) -> None:
        if support_fraction not in ("auto", "confirmed"):
            check_support_fraction(support_fraction)
        check_choice("ensemble", ensemble, ("noisy_val", "clean_val", "uniform", "last"))
        check_priors(priors)
        GenerativeClassifier(estimator=estimator, shrinkage=shrinkage)  # tells what cannot be read now
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("num_classes", num_classes, 2),
            ("max_per_class", max_per_class, 2),
            ("max_feature_bytes", max_feature_bytes, 1),
            ("max_dim", max_dim, 1),
        ):
            if value is not None and value < least:
                raise InvalidArgument(f"{name}={value}: at least {least} is needed.")
        self.layers = layers
        self.support_fraction = support_fraction
        self.mixing: Mixing = ensemble
        self.settings: dict[str, Any] = {"estimator": estimator, "priors": priors, "shrinkage": shrinkage, "seed": seed}
        self.every_n_epochs = every_n_epochs
        self.train, self.validation, self.outliers = train, validation, outliers
        self.num_classes = num_classes
        self.max_per_class, self.max_feature_bytes, self.max_dim = max_per_class, max_feature_bytes, max_dim
        self.seed = seed
        self.log_prefix = log_prefix
        self._tap_settings: dict[str, Any] = {
            "select": select,
            "pool": mean_pool if pool == "mean" else pool,
            "on_repeat": on_repeat,
            "detach": True,
        }
        self._where: dict[str, Any] = {"inputs": inputs, "labels": labels}
        if layers is not None:
            FeatureTaps(layers, **self._tap_settings)
        self._taps: FeatureTaps | None = None
        self._augmented: bool | None = None
        self._reset()

    def _reset(self) -> None:
        self.ensemble: LayerEnsemble | None = None
        self.prefers_softmax = False
        self.chosen_fraction: float | Literal["confirmed"] | None = None
        self.audit: LabelAudit | None = None
        self.predictions: Tensor | None = None
        self.figure_paths: list[Path] = []
        #: accuracies on the validation split at each fit, by name: pairs of epoch and value
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._weights_seen: list[float] = []
        self._epoch = self._measured = -1

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(
            layers=self.layers, estimator=self.settings["estimator"], log_prefix=self.log_prefix
        )

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers before any work; compiled code that was traced without the hooks would ignore them."""
        self._attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch and self._is_due(self._epoch):
            self._measure(trainer, pl_module, self._epoch)
        self._epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit if it is time, before the checkpoints of this epoch are saved."""
        if self._is_due(trainer.current_epoch) or is_last_epoch(trainer):
            for key, value in self._measure(trainer, pl_module, trainer.current_epoch).items():
                pl_module.log(f"{self.log_prefix}/{key}", value, on_step=False, on_epoch=True, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit to the final weights, if that was not done (stopped early, averaged), and show all."""
        self._refresh(trainer, pl_module)
        self._show(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the layers; fit again if a later callback has changed the weights after all."""
        self._refresh(trainer, pl_module)
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was also after a crash."""
        self._detach()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the layers after `trainer.validate`."""
        if trainer.state.fn == "validate":
            self._detach()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Classify the validation data in `trainer.validate`."""
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Classify the test data, and the outliers if there are any."""
        self._evaluate(trainer, pl_module, "test")
        if self.outliers is not None:
            self._tell_outliers(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the layers."""
        self._detach()

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the log-probabilities of the data of `trainer.predict` in `predictions`."""
        ensemble = self._ready(trainer, pl_module)
        found = self._collect(trainer, pl_module, "predict", labelled=False)
        self.predictions = log_probabilities(ensemble, found)
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what was fitted, as tensors and plain builtins."""
        history = {name: [list(pair) for pair in pairs] for name, pairs in self.history.items()}
        state: dict[str, Any] = {"history": history, "epoch": self._epoch, "measured": self._measured, "fitted": {}}
        if self.ensemble is not None:
            state["fitted"] = {
                "layers": list(self.ensemble.names),
                "ensemble": {key: value.cpu() for key, value in self.ensemble.state_dict().items()},
                "support_fraction": self.chosen_fraction,
                "prefers_softmax": self.prefers_softmax,
                "weights_seen": list(self._weights_seen),
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.history = {k: [(int(e), float(v)) for e, v in pairs] for k, pairs in state_dict["history"].items()}
        self._epoch, self._measured = state_dict["epoch"], state_dict["measured"]
        fitted = state_dict["fitted"]
        if fitted:
            self.ensemble = LayerEnsemble(fitted["layers"], **self.settings)
            self.ensemble.load_state_dict(fitted["ensemble"])
            self.chosen_fraction, self.prefers_softmax = fitted["support_fraction"], fitted["prefers_softmax"]
            self._weights_seen = list(fitted["weights_seen"])

    # -- for users ---------------------------------------------------------------------------------------------------

    # trainer.test runs in inference mode, whose tensors could neither be learned from nor kept
    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Read training and validation data, fit, and return the accuracies on the validation split."""
        self._attach(pl_module)
        training = self._collect(trainer, pl_module, "train")
        say_what_is_missing(training)
        classes = int(training.labels.unique().numel())
        if classes < 2:
            raise InvalidArgument(
                f"The training data that were read hold {classes} class(es); at least two "
                f"are needed. Raise limit_train_batches, or pass train= a dataloader of your own."
            )
        validation = self._validation(trainer, pl_module)
        with phase(trainer, "RobustGenerativeClassifier: fitting", None):
            fitted = self._fitted(pl_module, training, validation)
        self.ensemble = fitted.ensemble
        self.chosen_fraction, self.prefers_softmax = fitted.support_fraction, fitted.prefers_softmax
        self._weights_seen = fingerprint(pl_module)
        self.audit = audit(fitted.ensemble, training, true_labels_of(loaders_of(trainer, self.train)))
        values = {f"weight/{n}": float(w) for n, w in zip(fitted.ensemble.names, fitted.ensemble.weights, strict=True)}
        values |= {"noise_rate": self.audit.noise_rate, **self.audit.quality()}
        if validation is not None:
            values |= {f"fit/{name}": value for name, value in accuracies(fitted.ensemble, validation).items()}
            say_if_useless(values, prefers_softmax=self.prefers_softmax)
        return values

    @torch.inference_mode(False)
    @torch.no_grad()
    def examine(self, trainer: Any, pl_module: Any) -> LabelAudit:
        """Compare the labels of all training samples with the ensemble, also of those that the fit left out.

        Returns `audit`, after one more pass over the training data.
        """
        ensemble = self._ready(trainer, pl_module)
        found = self._collect(trainer, pl_module, "train", reduce=lambda x, y: {"verdict": verdict(ensemble, x, y)})
        say_what_is_missing(found)
        if not len(found.labels):
            raise UnsupportedTraining("The training data gave no sample with a label; nothing can be examined.")
        self.audit = from_verdicts(ensemble, found, true_labels_of(loaders_of(trainer, self.train)))
        return self.audit

    def is_current(self, pl_module: Any) -> bool:
        """Tell whether there is an ensemble, and it was fitted to these very weights."""
        now = fingerprint(pl_module)
        return (
            self.ensemble is not None
            and len(now) == len(self._weights_seen)
            and all(abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1.0) for a, b in zip(now, self._weights_seen, strict=True))
        )

    def deploy(self, pl_module: Any) -> RobustModule:
        """Return a LightningModule that classifies inputs by the ensemble.

        Raises:
            UnsupportedTraining: before a fit.
        """
        if self.ensemble is None:
            raise UnsupportedTraining(
                "Nothing was fitted yet. Run trainer.fit or trainer.test with the callback first."
            )
        taps = FeatureTaps(self.ensemble.names, **self._tap_settings)
        return RobustModule(pl_module, self.ensemble, taps, prefers_softmax=self.prefers_softmax)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _attach(self, pl_module: Any) -> FeatureTaps:
        if self._taps is None:
            names = self.ensemble.names if self.ensemble is not None and self.layers is None else self.layers
            if names is None:
                names = blocks_before_classifier(pl_module)
                rank_zero_info(f"RobustGenerativeClassifier reads the layers {', '.join(names)}.")
            self._taps = FeatureTaps(names, **self._tap_settings)
            self._taps.attach(pl_module)
        return self._taps

    def _detach(self) -> None:
        if self._taps is not None:
            self._taps.detach()
            self._taps = None

    def _is_due(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and epoch >= 0 and (epoch + 1) % self.every_n_epochs == 0

    def _measure(self, trainer: Any, pl_module: Any, epoch: int) -> dict[str, float]:
        if epoch <= self._measured or without_data(trainer):
            return {}
        self._measured = epoch
        values = self.fit(trainer, pl_module)
        for name in ("softmax", "accuracy"):
            if f"fit/{name}" in values:
                self.history.setdefault(name, []).append((epoch, values[f"fit/{name}"]))
        return values

    def _refresh(self, trainer: Any, pl_module: Any) -> None:
        """Fit if what is there is not of the present weights."""
        if without_data(trainer) or (self.is_current(pl_module)):
            return
        values = self.fit(trainer, pl_module)
        step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.log_prefix}/{key}": value for key, value in values.items()}, step=step)

    def _collect(
        self,
        trainer: Any,
        pl_module: Any,
        which: str,
        *,
        labelled: bool = True,
        loader: Any = None,
        reduce: Any = None,
    ) -> Collected:
        source = {"train": self.train, "fit": self.validation}.get(which, which) if loader is None else loader
        loaders, bounds = loaders_of(trainer, source), {}
        if which == "train" and reduce is None:
            bounds = {"max_per_class": self.max_per_class, "max_bytes": self.max_feature_bytes}
            if self._augmented is None:
                self._augmented = say_if_augmented(loaders)
        return collect(
            trainer,
            pl_module,
            loaders,
            Reader(self._attach(pl_module), reduce=reduce, **self._where),
            description=f"RobustGenerativeClassifier: {'validation' if which == 'fit' else which} data",
            limit=lambda one: batch_limit(trainer, source, one),
            labelled=labelled,
            num_classes=self.num_classes,
            seed=self.seed,
            **bounds,
        )

    def _validation(self, trainer: Any, pl_module: Any) -> Collected | None:
        """Return the validation split, or say that there is none where one is needed."""
        try:
            found = self._collect(trainer, pl_module, "fit")
        except UnsupportedTraining:
            found = None
        if found is not None and len(found.labels) > 0:
            return found
        if self.mixing in ("noisy_val", "clean_val") or self.support_fraction == "auto":
            rank_zero_warn(
                "RobustGenerativeClassifier has no validation data: the layers get equal weights, and the most robust "
                "support is used. Pass validation= a dataloader of samples that were not trained on, which may bear "
                "noisy labels."
            )
        return None

    def _fitted(self, pl_module: Any, training: Collected, validation: Collected | None) -> Fitted:
        # float64 is needed, which some accelerators lack
        device = pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu")
        features = {name: x.to(device) for name, x in training.features.items()}
        sizes = torch.bincount(training.labels, minlength=training.num_classes)
        usual = int(sizes[sizes > 0].median()) // _A_CLASS_PER_DIMENSION
        held_out = None
        if validation is not None:
            own = {name: x.to(device) for name, x in validation.features.items()}
            held_out = (own, validation.labels.to(device), validation.predicted.to(device))
        return fit_ensemble(
            features,
            training.labels.to(device),
            training.num_classes,
            validation=held_out,
            support_fraction=self.support_fraction,
            mixing=self.mixing,
            max_dim=self.max_dim or min(max(usual, _FEWEST_DIMENSIONS), 512),
            **self.settings,
        )

    def _ready(self, trainer: Any, pl_module: Any) -> LayerEnsemble:
        """Return the ensemble for the present weights: this one, that of the checkpoint, or a new one."""
        if not self.is_current(pl_module):
            self._load_from_checkpoint(trainer)
        if not self.is_current(pl_module):
            try:
                self.fit(trainer, pl_module)
            except UnsupportedTraining as error:
                raise UnsupportedTraining(
                    "RobustGenerativeClassifier was not fitted to the weights of this module, and there are no "
                    "training data to do it now. Pass a datamodule or train= a dataloader, or ckpt_path= a "
                    "checkpoint that was saved with the callback."
                ) from error
        self._attach(pl_module)
        assert self.ensemble is not None
        return self.ensemble

    @torch.inference_mode(False)
    def _load_from_checkpoint(self, trainer: Any) -> None:
        path = getattr(trainer, "ckpt_path", None)
        if not path:
            return
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            self.load_state_dict(state)

    def _evaluate(self, trainer: Any, pl_module: Any, stage: str) -> None:
        ensemble = self._ready(trainer, pl_module)
        loaders = loaders_of(trainer, stage)
        for number, loader in enumerate(loaders):
            found = self._collect(trainer, pl_module, stage, loader=[loader] if len(loaders) > 1 else None)
            if not len(found.labels):
                continue
            suffix = f"/dataloader_{number}" if len(loaders) > 1 else ""
            for name, value in accuracies(ensemble, found).items():
                pl_module.log(f"{self.log_prefix}/{stage}/{name}{suffix}", value, batch_size=len(found.labels))

    def _tell_outliers(self, trainer: Any, pl_module: Any) -> None:
        ensemble = self._ready(trainer, pl_module)
        inside = self._collect(trainer, pl_module, "test", labelled=False)
        outside = self._collect(trainer, pl_module, "outliers", labelled=False, loader=self.outliers)
        for name, value in outlier_auroc(ensemble, inside, outside).items():
            pl_module.log(f"{self.log_prefix}/test/{name}", value, batch_size=len(inside.index) + len(outside.index))

    def _show(self, trainer: Any) -> None:
        if self.ensemble is not None and self.audit is not None:
            self.figure_paths = show(trainer, self.log_prefix, self.audit, self.ensemble, self.history)
