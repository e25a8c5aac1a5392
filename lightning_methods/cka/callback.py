"""Compare the layers of a network in training with themselves, its past, a checkpoint or another network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_methods.cka.functional import similarity_matrix
from lightning_methods.cka.influence import bootstrap_cka, leave_one_out_cka
from lightning_methods.core._lightning import Callback, rank_zero_info
from lightning_methods.core.batches import Selector, inputs_of
from lightning_methods.core.passes import batches
from lightning_methods.core.taps import FeatureTaps, Pool
from lightning_methods.errors import InvalidArgument, check_choice
from lightning_methods.report import curves, heatmap, is_reporting, log_figure, log_table, log_text

_COMPARED = ("self", "init", "previous")
_FEWEST_FOR_INFLUENCE = 5


class RepresentationSimilarity(Callback):
    r"""Show how similar the layers of a network are to each other, to its past, or to another network.

    Every few epochs the features of one fixed set of samples are taken in an extra pass that leaves no trace in the
    training, and compared layer by layer. CKA (equation in `lightning_methods.cka.cka`) by default, without bias.

    Logs `cka/similarity/<layer>` (each layer to itself in the reference; not for `compare="self"`) and, with CKA,
    `cka/influence/<layer>` (the largest change when one sample is left out); as figures the heat map of all layers, in
    execution order, and the curves at the end; as tables all pairs, and the layers with bootstrap interval and the most
    influential sample. `matrix`, `rows` and `columns` hold the latest comparison.

    Args:
        layers: names or patterns of the layers.
        compare: `"self"`, `"init"` (the network before training), `"previous"` (the last comparison), the path of a
            checkpoint of the same module, or another module, of any depth and width.
        other_layers: patterns for another module; those of `layers` if not given.
        index: `"cka"`, `"hsic"`, `"cca"`, `"svcca"`, `"pwcca"`, `"linear_regression"` or `"procrustes"`.
        settings: arguments of the index; `{"debiased": True}` for CKA if not given.
        data: `"val"`, `"train"` or a dataloader, whose first samples are kept for the whole fit.
        max_samples: how many samples.
        every_n_epochs: how often.
        freeze_threshold: name the layers whose similarity to the previous comparison is at least this, as candidates
            for freezing; needs `compare="previous"`.
        inputs: where the inputs are in a batch: index, key or function.
        select: item of a layer that returns a tuple or a dict.
        pool: `"flatten"`, `"gap"` or a function, see `lightning_methods.core.taps.FeatureTaps`.
        on_repeat: `"error"`, `"last"` or `"all"` for a layer that runs several times.
        log_prefix: first part of every logged key.

    Raises:
        InvalidArgument: for settings that cannot be read.
        LayerNotFound: at the start of the fit, if a pattern matches no layer.

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
        freeze_threshold: float | None = None,
        inputs: int | str | Callable[[Any], Any] | None = None,
        select: int | str | None = None,
        pool: Pool = "flatten",
        on_repeat: Literal["error", "last", "all"] = "error",
        log_prefix: str = "cka",
    ) -> None:
        if isinstance(compare, str) and compare not in _COMPARED and not Path(compare).is_file():
            check_choice("compare", compare, (*_COMPARED, "the path of a checkpoint", "a module"))
        if max_samples < _FEWEST_FOR_INFLUENCE or every_n_epochs < 1:
            raise InvalidArgument(
                f"max_samples={max_samples} and every_n_epochs={every_n_epochs}: at least {_FEWEST_FOR_INFLUENCE} "
                f"samples and every 1 epoch are needed."
            )
        if freeze_threshold is not None and compare != "previous":
            raise InvalidArgument(
                f"freeze_threshold={freeze_threshold} needs compare='previous': a layer is done when it changes no more."
            )
        self.compare, self.index = compare, index
        self.settings = {"debiased": True} if settings is None and index == "cka" else dict(settings or {})
        # an unknown index or argument is told now, not after an epoch
        similarity_matrix([torch.eye(6), torch.ones(6, 1).cumsum(0)], index=index, **self.settings)
        self.data = data
        self.max_samples = max_samples
        self.every_n_epochs = every_n_epochs
        self.freeze_threshold = freeze_threshold
        self.inputs: Selector = inputs
        self.log_prefix = log_prefix
        read: dict[str, Any] = {"select": select, "pool": pool, "on_repeat": on_repeat, "detach": True}
        self.taps = FeatureTaps(layers, **read)
        self.other_taps = FeatureTaps(layers if other_layers is None else other_layers, **read)
        self.figure_paths: list[Path] = []
        self._reset()

    def _reset(self) -> None:
        self.matrix: Tensor = torch.zeros(0, 0)
        self.rows: list[str] = []
        self.columns: list[str] = []
        #: per layer the epoch and value of each comparison with its own reference
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._initial: dict[str, Tensor] = {}
        self._probe: list[Any] = []
        self._reference: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Tell several callbacks of one kind in one trainer apart."""
        return self._generate_state_key(layers=self.taps.patterns, log_prefix=self.log_prefix)

    # -- life in the trainer -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, unless it goes on; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers, so that a wrong name is told before any work, and keep the initial weights if needed."""
        self.taps.attach(pl_module)
        self.taps.detach()
        if self.compare == "init" and not self._initial:
            self._initial = {k: v.detach().cpu().clone() for k, v in pl_module.state_dict().items()}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the samples, and the features of the reference."""
        if not trainer.is_global_zero:
            return
        self._probe = self._kept_batches(trainer, pl_module)
        if self.compare == "previous":
            self._reference = self._features(trainer, pl_module, pl_module, self.taps)
        elif self.compare != "self":
            other, taps = self._reference_module(pl_module)
            self._reference = self._features(trainer, pl_module, other, taps)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare, log and draw."""
        if (trainer.current_epoch + 1) % self.every_n_epochs or not trainer.is_global_zero:
            return
        features = self._features(trainer, pl_module, pl_module, self.taps)
        reference = None if self.compare == "self" else self._reference
        self.rows, self.columns = list(features), list(features if reference is None else reference)
        self.matrix = similarity_matrix(features, reference, index=self.index, **self.settings).cpu()
        if reference is not None:
            self._log(trainer, pl_module, features, reference)
        if self.compare == "previous":
            self._reference = features
        if is_reporting(trainer):
            self._show(trainer, features, reference)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the curves of the whole fit."""
        if self.history and is_reporting(trainer):
            series = {layer: ([e for e, _ in seen], [v for _, v in seen]) for layer, seen in self.history.items()}
            title = f"Similarity of each layer to {self._reference_name()}"
            figure = curves(series, title=title, x_label="epoch", y_label=self.index)
            self.figure_paths += log_figure(trainer, f"{self.log_prefix}/curves", figure)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of samples and features."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was also after a crash."""
        self._release()

    def _release(self) -> None:
        self.taps.detach()
        self.other_taps.detach()
        self._probe, self._reference = [], {}

    def state_dict(self) -> dict[str, Any]:
        """Return the initial weights, where they are the reference, and the history."""
        return {"initial": dict(self._initial), "history": {k: list(v) for k, v in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._initial = state_dict["initial"]
        self.history = {layer: [tuple(pair) for pair in seen] for layer, seen in state_dict["history"].items()}

    # -- features ----------------------------------------------------------------------------------------------------

    def _kept_batches(self, trainer: Any, pl_module: Any) -> list[Any]:
        """Return the first batches of the data, on the CPU, with `max_samples` rows together or a batch more."""
        kept, rows = [], 0
        for batch in batches(trainer, pl_module, self.data, description="RepresentationSimilarity: keeping samples"):
            inputs = inputs_of(batch, self.inputs)
            kept.append(trainer.strategy.batch_to_device(copy.copy(batch), torch.device("cpu")))
            rows += len(inputs) if isinstance(inputs, Tensor) else 1
            if rows >= self.max_samples:
                break
        if not kept:
            raise InvalidArgument("RepresentationSimilarity got no batch. Pass data= a dataloader, or raise its limit.")
        return kept

    def _features(self, trainer: Any, pl_module: Any, module: nn.Module, taps: FeatureTaps) -> dict[str, Tensor]:
        """Return the features `(n, d)` of every layer for the kept samples, in execution order."""
        collected: dict[str, list[Tensor]] = {}
        taps.attach(module)
        try:
            if module is not pl_module:
                module = module.to(pl_module.device).eval()
            for batch in batches(trainer, pl_module, [self._probe], description="RepresentationSimilarity"):
                with taps.recording():
                    module(inputs_of(batch, self.inputs))
                    for layer, x in taps.read().items():
                        collected.setdefault(layer, []).append(x.float() if x.dtype != torch.float64 else x)
        finally:
            taps.detach()
        return {layer: torch.cat(pieces)[: self.max_samples] for layer, pieces in collected.items()}

    def _reference_module(self, pl_module: Any) -> tuple[nn.Module, FeatureTaps]:
        if isinstance(self.compare, nn.Module):
            return self.compare, self.other_taps
        weights = self._initial
        if self.compare != "init":
            weights = torch.load(self.compare, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
        other = copy.deepcopy(pl_module)
        try:
            other.load_state_dict(weights)
        except RuntimeError as error:
            raise InvalidArgument(
                f"{self._reference_name()} is not of this module: {error}. Pass the other module itself as compare=."
            ) from error
        return other, self.taps

    def _reference_name(self) -> str:
        if isinstance(self.compare, nn.Module):
            return type(self.compare).__name__
        names = {"init": "the initial network", "previous": "the previous comparison", "self": "each other"}
        return names.get(self.compare, Path(self.compare).name)

    # -- showing -----------------------------------------------------------------------------------------------------

    def _twins(self) -> list[tuple[str, float]]:
        """Return the layers that bear the same name in the reference, and their similarity."""
        places = {name: i for i, name in enumerate(self.columns)}
        return [(row, float(self.matrix[i, places[row]])) for i, row in enumerate(self.rows) if row in places]

    def _log(self, trainer: Any, pl_module: Any, features: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
        kept = {"on_step": False, "on_epoch": True, "batch_size": 1, "rank_zero_only": True}
        done = []
        for layer, value in self._twins():
            self.history.setdefault(layer, []).append((trainer.current_epoch, value))
            pl_module.log(f"{self.log_prefix}/similarity/{layer}", value, **kept)
            if self.index == "cka" and len(features[layer]) >= _FEWEST_FOR_INFLUENCE:
                change = self._influence(features[layer], reference[layer])[0]
                pl_module.log(f"{self.log_prefix}/influence/{layer}", change, **kept)
            if self.freeze_threshold is not None and value >= self.freeze_threshold:
                done.append(layer)
        if done:
            text = (
                f"epoch {trainer.current_epoch}: {self.index} to the previous comparison is at least "
                f"{self.freeze_threshold} in {', '.join(done)}. They hardly change any more and could be frozen."
            )
            rank_zero_info(f"RepresentationSimilarity: {text}")
            log_text(trainer, f"{self.log_prefix}/freeze", text)

    def _influence(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """Return the largest change of CKA when one sample is left out, and which sample that is."""
        without = leave_one_out_cka(x, y)
        change = (without - without.nanmean()).abs().nan_to_num(0.0)
        return float(change.max()), int(change.argmax())

    def _show(self, trainer: Any, features: dict[str, Tensor], reference: dict[str, Tensor] | None) -> None:
        to = "" if reference is None else f" and of {self._reference_name()}"
        bounded = self.index != "hsic"
        figure = heatmap(
            self.matrix,
            self.rows,
            self.columns,
            title=f"Similarity of the layers{to}",
            value_label=self.index,
            x_label="" if reference is None else self._reference_name(),
            y_label="" if reference is None else f"epoch {trainer.current_epoch}",
            vmin=0.0 if bounded else None,
            vmax=1.0 if bounded else None,
        )
        written = log_figure(trainer, f"{self.log_prefix}/heatmap", figure)
        pairs = [[r, c, float(self.matrix[i, j])] for i, r in enumerate(self.rows) for j, c in enumerate(self.columns)]
        written += log_table(trainer, f"{self.log_prefix}/pairs", ["layer", "other", self.index], pairs)
        if reference is not None and self.index == "cka":
            rows = []
            for layer, value in self._twins():
                x, y = features[layer], reference[layer]
                low, high = bootstrap_cka(x, y) if len(x) >= _FEWEST_FOR_INFLUENCE else (math.nan, math.nan)
                change, sample = self._influence(x, y) if len(x) >= _FEWEST_FOR_INFLUENCE else (math.nan, -1)
                rows.append([layer, value, float(low), float(high), change, sample])
            columns = ["layer", "cka", "95% from", "to", "largest influence", "of sample"]
            written += log_table(trainer, f"{self.log_prefix}/layers", columns, rows)
        self.figure_paths = written
