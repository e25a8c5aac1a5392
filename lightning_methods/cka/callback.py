"""Compare the layers of a network in training with themselves, its past, a checkpoint or another network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_methods.cka.influence import FEWEST, certainty
from lightning_methods.cka.matrix import similarity_matrix
from lightning_methods.cka.weights import weights_in, weights_of
from lightning_methods.core._lightning import Callback, rank_zero_info, rank_zero_warn
from lightning_methods.core.batches import Selector, inputs_of, mask_of
from lightning_methods.core.passes import batches, preserved
from lightning_methods.core.progress import phase
from lightning_methods.core.taps import FeatureTaps, Pool, joined
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, NoEffect
from lightning_methods.report import curves, heatmap, is_reporting, log_figure, log_table, log_text

_COMPARED = ("self", "init", "previous")
_OF_ITSELF = ("init", "previous")  # references whose weights go into the checkpoints


class RepresentationSimilarity(Callback):
    r"""Show how similar the layers of a network are to each other, to its past, or to another network.

    .. math:: \mathrm{CKA}(K, L) = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\, \mathrm{HSIC}(L, L)}}

    Every few epochs the features of one fixed set of samples are taken in an extra pass that leaves no trace in the
    training, and compared layer by layer. Under DDP rank 0 does so on its own data.

    Logs `cka/similarity/<layer>` (each layer to its namesake in the reference; not for `compare="self"`) and, with CKA,
    `cka/influence/<layer>` (the largest change of debiased linear CKA when one sample is left out); as figures the heat
    map of all layers, in execution order, and the curves at the end; as tables all pairs, and the layers with bootstrap
    interval and most influential sample. `matrix`, `rows`, `columns` and `freeze_candidates` hold the latest one.

    Args:
        layers: names or patterns of the layers, see `lightning_methods.core.layers.match_layers`.
        compare: `"self"`, `"init"` (the network before training), `"previous"` (the last comparison), the path of a
            checkpoint of the same module, or another module, of any depth and width. The first two keep a copy of the
            weights, also in checkpoints.
        other_layers: patterns for another module; those of `layers` if not given.
        index: `"cka"`, `"hsic"`, `"cca"`, `"svcca"`, `"pwcca"`, `"linear_regression"` or `"procrustes"`.
        settings: arguments of the index; `{"debiased": True}` for CKA if not given.
        data: `"val"`, `"train"` or a dataloader, whose first `max_samples` samples are kept for the whole fit.
        max_samples: at least 5.
        every_n_epochs: how often to compare.
        figures_every_n_epochs: draw the figures also during the fit.
        freeze_threshold: name the layers at least so similar to the previous comparison, as candidates for freezing.
        inputs: where the inputs are in a batch: index, key or function.
        mask: where the mask of padded sequences is in a batch: index, key or function, `(B, T)` with 1 at real
            positions. Layers that give `(B, T, D)` are then averaged over these, before `pool`.
        select: item of a layer that returns a tuple or a dict.
        pool: `"flatten"`, `"gap"` or a function, see `lightning_methods.core.taps.FeatureTaps`.
        on_repeat: `"error"`, `"last"` or `"all"` for a layer that runs several times.
        log_prefix: first part of every logged key, to tell two callbacks apart.

    Raises:
        InvalidArgument: for settings that cannot be read, or at the start of the fit a checkpoint of another module.
        LayerNotFound: at the start of the fit, if a pattern matches no layer.
        ShapeMismatch: at the first comparison, if a layer does not give a row for each sample, or there are too few.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import RepresentationSimilarity
        >>> trainer = Trainer(callbacks=RepresentationSimilarity("backbone.*", compare="init"), logger=False)

    Deviations from the paper: the debiased estimator by default, since the biased one grows with the width.
    """

    method: ClassVar[str] = "cka"

    def __init__(
        self,
        layers: str | list[str],
        *,
        compare: str | nn.Module = "self",
        other_layers: str | list[str] | None = None,
        index: str = "cka",
        settings: dict[str, Any] | None = None,
        data: Any = "val",
        max_samples: int = 1024,
        every_n_epochs: int = 1,
        figures_every_n_epochs: int | None = None,
        freeze_threshold: float | None = None,
        inputs: int | str | Callable[[Any], Any] | None = None,
        mask: int | str | Callable[[Any], Tensor] | None = None,
        select: int | str | None = None,
        pool: Pool = "flatten",
        on_repeat: Literal["error", "last", "all"] = "error",
        log_prefix: str = "cka",
    ) -> None:
        if isinstance(compare, str) and compare not in _COMPARED and not Path(compare).is_file():
            raise InvalidArgument(
                f"compare={compare!r} is neither 'self', 'init' or 'previous' nor a checkpoint: there is no such file."
            )
        for name, count, least in (
            ("max_samples", max_samples, FEWEST),
            ("every_n_epochs", every_n_epochs, 1),
            ("figures_every_n_epochs", figures_every_n_epochs, 1),
        ):
            if count is not None and count < least:
                raise InvalidArgument(f"{name}={count}: at least {least} is needed.")
        if freeze_threshold is not None and compare != "previous":
            raise InvalidArgument(f"freeze_threshold={freeze_threshold} needs compare='previous', not {compare!r}.")
        if other_layers is not None and isinstance(compare, str):
            raise InvalidArgument(f"other_layers={other_layers!r} needs another module as compare=, not {compare!r}.")
        self.compare, self.index = compare, index
        self.settings = {"debiased": True} if settings is None and index == "cka" else dict(settings or {})
        # an unknown index or argument is told now, not after an epoch
        similarity_matrix([torch.linspace(0, 1, 8)[:, None] ** k for k in (1, 2)], index=index, **self.settings)
        self.data = data
        self.max_samples = max_samples
        self.every_n_epochs = every_n_epochs
        self.figures_every_n_epochs = figures_every_n_epochs
        self.freeze_threshold = freeze_threshold
        self.inputs: Selector = inputs
        self.mask: Selector = mask
        self.log_prefix = log_prefix
        read: dict[str, Any] = {"select": select, "pool": pool, "on_repeat": on_repeat, "detach": True}
        self.taps = FeatureTaps(layers, **read)
        self.other_taps = FeatureTaps(layers if other_layers is None else other_layers, **read)
        self._probe: list[Any] = []
        self._reference: dict[str, Tensor] = {}
        self._reset()

    def _reset(self) -> None:
        self.matrix: Tensor = torch.zeros(0, 0)
        self.rows: list[str] = []
        self.columns: list[str] = []
        self.freeze_candidates: list[str] = []
        self.figure_paths: list[Path] = []
        #: per layer the epoch and value of each comparison with its namesake
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._scalars: dict[str, float] = {}  # of the latest comparison, to be logged
        self._table: list[list[Any]] = []  # the same, to be shown
        self._weights: dict[str, Tensor] = {}  # of the network that is compared with, if it is this one
        self._epoch = self._compared = -1  # the running epoch, and the latest that was compared

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(
            layers=self.taps.patterns, compare=self._reference_name(), index=self.index, log_prefix=self.log_prefix
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers before any work; compiled code that was traced without the hooks would ignore them."""
        if trainer.is_global_zero:
            self.taps.attach(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the samples, and the features of the reference."""
        if not trainer.is_global_zero:
            return
        self._keep_samples(trainer, pl_module)
        if self.compare == "self" or not self._probe:
            return
        if self.compare in _OF_ITSELF and not self._weights:
            self._weights = weights_of(pl_module)
            self._reference = self._features(trainer, pl_module, pl_module, self.taps)
        else:
            other = self._other_module(pl_module)
            self.other_taps.attach(other)
            self._reference = self._features(trainer, pl_module, other, self.other_taps)
            self.other_taps.detach()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Close an epoch that was saved at its last batch: after resuming, Lightning calls none of its hooks again."""
        if self._epoch != trainer.current_epoch:
            self._compare(trainer, pl_module, self._epoch)
        self._epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare and log, and draw the figures if asked to."""
        before = self._compared
        self._compare(trainer, pl_module, trainer.current_epoch)
        if self._compared != before:
            kept = {"on_step": False, "on_epoch": True, "batch_size": 1, "rank_zero_only": True}
            for key, value in self._scalars.items():
                pl_module.log(f"{self.log_prefix}/{key}", value, **kept)
        every = self.figures_every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            self.show(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the latest comparison and the curves of the whole fit."""
        self.show(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of layers, samples and features."""
        self.taps.detach()
        self.other_taps.detach()
        self._probe, self._reference = [], {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was also after a crash."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are compared with, where they are the network's own, and the history."""
        history = {layer: [list(pair) for pair in seen] for layer, seen in self.history.items()}
        return {"weights": dict(self._weights), "history": history, "epoch": self._epoch, "compared": self._compared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._weights = dict(state_dict["weights"])
        self.history = {k: [(int(e), float(v)) for e, v in seen] for k, seen in state_dict["history"].items()}
        self._epoch, self._compared = state_dict["epoch"], state_dict["compared"]

    def _keep_samples(self, trainer: Any, pl_module: Any) -> None:
        """Keep the first batches of the data, on the CPU, with `max_samples` rows together."""
        rows = 0
        self._probe = []
        with preserved(pl_module):
            torch.manual_seed(0)  # a loader that shuffles gives the same samples after resuming
            for batch in batches(trainer, pl_module, self.data, description="RepresentationSimilarity: samples"):
                inputs = inputs_of(batch, self.inputs)
                self._probe.append(pl_module.transfer_batch_to_device(copy.copy(batch), torch.device("cpu"), 0))
                rows += len(inputs) if isinstance(inputs, Tensor) else 1
                if rows >= self.max_samples:
                    break
        if self.mask is None and any(_is_padded(batch) for batch in self._probe):
            rank_zero_warn(
                "RepresentationSimilarity: the batches have an 'attention_mask' with padded positions, but mask= is "
                "not given: what a layer makes of the padding is compared too. Pass mask='attention_mask'.",
                category=LightningMethodsWarning,
            )
        if not self._probe:
            rank_zero_warn(
                "RepresentationSimilarity got no batch and does nothing. Pass data= a dataloader, or raise its limit.",
                category=NoEffect,
            )

    def _features(self, trainer: Any, pl_module: Any, module: nn.Module, taps: FeatureTaps) -> dict[str, Tensor]:
        """Return the features `(n, d)` of every layer for the kept samples, in execution order."""
        collected: dict[str, list[Tensor]] = {}
        with (
            preserved(module),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            phase(trainer, "RepresentationSimilarity", len(self._probe)) as advance,
        ):
            module.eval()
            for kept in self._probe:
                # not by the strategy: the module's hooks around the transfer have seen the batch already
                batch = pl_module.transfer_batch_to_device(copy.copy(kept), pl_module.device, 0)
                with taps.recording():
                    module(inputs_of(batch, self.inputs))
                    for layer, x in taps.read(mask=mask_of(batch, self.mask)).items():
                        # a copy: what a layer returns may be a buffer of its own
                        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
                        collected.setdefault(layer, []).append(x)
                advance()
        return {layer: joined(layer, pieces)[: self.max_samples] for layer, pieces in collected.items()}

    def _other_module(self, pl_module: Any) -> nn.Module:
        """Return a copy of the network that is compared with."""
        if isinstance(self.compare, nn.Module):
            return copy.deepcopy(self.compare).to(device=pl_module.device, dtype=pl_module.dtype)
        weights = self._weights if self.compare in _OF_ITSELF else weights_in(self.compare)
        other = copy.deepcopy(pl_module)
        try:
            other.load_state_dict(weights)
        except RuntimeError as error:
            raise InvalidArgument(
                f"{self._reference_name()} is not of this module: {error}. Pass the other module itself as compare=."
            ) from error
        return other

    def _reference_name(self) -> str:
        names = {"init": "the initial network", "previous": "the previous comparison", "self": "each other"}
        if isinstance(self.compare, nn.Module):
            return type(self.compare).__name__
        return names.get(self.compare, Path(self.compare).name)

    def _compare(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        """Compare as of the end of an epoch, if that is due and was not done."""
        if not self._probe or epoch <= self._compared or (epoch + 1) % self.every_n_epochs:
            return
        features = self._features(trainer, pl_module, pl_module, self.taps)
        reference = None if self.compare == "self" else self._reference
        self._compared = epoch
        self.rows, self.columns = list(features), list(features if reference is None else reference)
        self.matrix = similarity_matrix(features, reference, index=self.index, **self.settings).cpu()
        self._scalars = {}
        self._table = [] if reference is None else self._twins(features, reference)
        for layer, value, *rest in self._table:
            self.history.setdefault(layer, []).append((epoch, value))
            self._scalars[f"similarity/{layer}"] = value
            if rest:
                self._scalars[f"influence/{layer}"] = rest[-2]
        self._name_candidates(trainer)
        if self.compare == "previous":
            self._reference, self._weights = features, weights_of(pl_module)

    def _twins(self, features: dict[str, Tensor], reference: dict[str, Tensor]) -> list[list[Any]]:
        """Return for each layer with a namesake its name, similarity and, with CKA, how certain that is."""
        places = {name: i for i, name in enumerate(self.columns)}
        table: list[list[Any]] = []
        for i, layer in enumerate(self.rows):
            if layer in places:
                table.append([layer, float(self.matrix[i, places[layer]])])
                if self.index == "cka" and len(features[layer]) >= FEWEST:
                    table[-1] += certainty(features[layer], reference[layer])
        return table

    def _name_candidates(self, trainer: Any) -> None:
        least = self.freeze_threshold
        self.freeze_candidates = [] if least is None else [k for k, v in self.history.items() if v[-1][1] >= least]
        if self.freeze_candidates:
            text = (
                f"epoch {self._compared}: {self.index} to the previous comparison is at least {least} in "
                f"{', '.join(self.freeze_candidates)}. They hardly change any more and could be frozen."
            )
            rank_zero_info(f"RepresentationSimilarity: {text}")
            log_text(trainer, f"{self.log_prefix}/freeze", text)

    def show(self, trainer: Any) -> None:
        """Send figures and tables to the loggers, or to files where no logger takes them."""
        if not is_reporting(trainer) or not self.matrix.numel():
            return
        alone, name = self.compare == "self", self._reference_name()
        share = self.index != "hsic" and self.settings.get("kind", "similarity") == "similarity"
        figure = heatmap(
            self.matrix,
            self.rows,
            self.columns,
            title="Similarity of the layers" + ("" if alone else f" to those of {name}"),
            value_label=self.index,
            x_label="" if alone else name,
            y_label=f"epoch {self._compared}",
            vmin=0.0 if share else None,
            vmax=1.0 if share else None,
        )
        written = log_figure(trainer, f"{self.log_prefix}/heatmap", figure)
        if self.history:
            series = {layer: ([e for e, _ in seen], [v for _, v in seen]) for layer, seen in self.history.items()}
            figure = curves(series, title=f"Similarity to {name}", x_label="epoch", y_label=self.index)
            written += log_figure(trainer, f"{self.log_prefix}/curves", figure)
        pairs = [[r, c, float(self.matrix[i, j])] for i, r in enumerate(self.rows) for j, c in enumerate(self.columns)]
        written += log_table(trainer, f"{self.log_prefix}/pairs", ["layer", "other", self.index], pairs)
        if self._table:
            columns = ["layer", self.index, "95% from", "to", "largest influence", "of sample"]
            written += log_table(trainer, f"{self.log_prefix}/layers", columns[: len(self._table[0])], self._table)
        self.figure_paths = written


def _is_padded(batch: Any) -> bool:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return isinstance(mask, Tensor) and bool((mask == 0).any())
