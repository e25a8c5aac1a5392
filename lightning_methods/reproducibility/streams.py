"""Every source of variation of a training on a seed of its own, in a Trainer and a module that stay as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_methods.core._lightning import Callback, rank_zero_warn
from lightning_methods.core.gather import rank
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, UnsupportedTraining, check_choice
from lightning_methods.report import log_table
from lightning_methods.reproducibility.fingerprints import (
    Chain,
    generator_state,
    hash_batch,
    hash_dataset,
    hash_module,
)
from lightning_methods.reproducibility.loading import Place, owned_generator, streamed
from lightning_methods.reproducibility.numerical import KINDS, Kind, disturb
from lightning_methods.reproducibility.seeding import SOURCES, GlobalGenerators, Stream, check_seed, seed_all

_GLOBAL_SEED = "PL_GLOBAL_SEED"
_EVALUATION_STEPS = ("validation_step", "test_step", "predict_step")
# light fingerprints look at the generators in so many batches of each epoch
_LOOKS = 16
_STAGES = ("train", "sanity_check", "validate", "test", "predict")


class SeedStreams(Callback):
    r"""Give every source of variation its own stream of random numbers: varying one seed varies that source alone.

    With one global seed, whatever draws a number shifts all that is drawn after it: another dropout rate changes the
    order of the data, a sanity check the noise. Here each piece of randomness is keyed by where it belongs,

    .. math:: k = \operatorname{hash}(\text{source}, \text{seed}, \text{rank}, \text{epoch}, \text{batch})

    (the order without the rank), so that two trainings with the same seed of a source are paired in that source, and a
    training resumed at an epoch's end equals the uninterrupted one. Nothing in the module or the loaders changes: the
    strategy's steps are wrapped for the time of the run and loaders are copied.

    | source | what draws from it |
    |---|---|
    | init | the constructor, after `seed("init")`; `module.setup` and `configure_model` |
    | split | the datamodule, after `seed("split")`; the bootstrap of the training set |
    | order | samplers and batch samplers of the training loaders, of whatever kind |
    | augment | what happens while a training batch is fetched, also in workers, and moved to the device |
    | dropout | the training step with its backward pass and the optimizer's |
    | evaluation | everything in validation, test and prediction |
    | numerical | a disturbance as small as rounding |

    Under `lightning-methods fit` and `MethodsCLI`, `seed("init")` and `seed("split")` are called at the right places.
    Logs the table `seed_streams/fingerprints` at the end of the fit: the seed of each source and a hash of what was
    drawn from it.

    Args:
        init, split, order, augment, dropout, evaluation: the seeds.
        numerical: seed of the disturbance; none by default.
        numerical_kind: `"ulp"` moves one weight, drawn from the seed, to the next number of its type before training;
            `"threads"` draws the number of threads; `"hardware"` disturbs nothing: what still differs comes from it.
        bootstrap: draw the training set with replacement, from the split's stream (each rank the same).
        fingerprint: `"light"` hashes all indices, and the states of generators in the first 16 batches of each epoch;
            `"full"` the states in all of them and the content of each training batch (`batches`); `"off"` nothing.
        force: pass over a generator that a loader or sampler was given, which otherwise keeps its order and is warned
            about.

    Raises:
        InvalidArgument: for a seed that is no whole number from 0 on, an unknown mode, or two of these in a Trainer.
        UnsupportedTraining: if an iterable data set is to be bootstrapped.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_methods import SeedStreams
        >>> streams = SeedStreams(init=1, order=7)
        >>> streams.seed("init")  # just before the module is built
        >>> module = torch.nn.Linear(2, 2)
        >>> streams.seed("split")  # just before the data are
        >>> trainer = Trainer(callbacks=streams, logger=False)

    What it cannot reach: private generators of libraries (a `default_rng()` of one's own, albumentations); the
    shuffling inside an iterable data set, which draws from `augment`; lazy layers, which draw in their first forward
    pass; the loader's position when resuming in the middle of an epoch (Lightning starts it again); callbacks after
    this one that draw in their own `setup`. Noise that is added on the device in `on_after_batch_transfer` depends on
    the number of workers.
    """

    def __init__(
        self,
        *,
        init: int = 0,
        split: int = 0,
        order: int = 0,
        augment: int = 0,
        dropout: int = 0,
        evaluation: int = 0,
        numerical: int | None = None,
        numerical_kind: Kind = "ulp",
        bootstrap: bool = False,
        fingerprint: Literal["light", "full", "off"] = "light",
        force: bool = False,
    ) -> None:
        check_choice("numerical_kind", numerical_kind, KINDS)
        check_choice("fingerprint", fingerprint, ("light", "full", "off"))
        seeds = (init, split, order, augment, dropout, evaluation, numerical)
        #: source -> its seed, those that are given
        self.seeds = {s: check_seed(s, n) for s, n in zip(SOURCES, seeds, strict=True) if n is not None}
        self.numerical_kind = numerical_kind
        self.bootstrap = bootstrap
        self.fingerprint = fingerprint
        self.force = force
        self.streams = {source: Stream(source, seed) for source, seed in self.seeds.items()}
        self._chains: dict[str, Chain] = {}
        self._fixed: dict[str, str] = {}
        self._undo: list[Callable[[], Any]] = []
        self._passes: dict[Place, int] = {}
        self._loaders: dict[str, int] = {}
        self._batch = 0
        self._calls = 0
        self._keys: Callable[[int], int] | None = None
        self._foreign = False
        self._begun = False
        self._ordered = ""
        self._training: GlobalGenerators | None = None
        self._outside: GlobalGenerators | None = None
        self._threads = 0
        self._global_seed: str | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Source -> hash of what was drawn from it, and `final` -> that of the trained module; of rank zero's share."""
        found = {**{name: chain.digest for name, chain in self._chains.items()}, **self._fixed}
        known = [*SOURCES, "batches", "final"]
        return {name: found[name] for name in known if found.get(name)}

    def seed(self, source: Literal["init", "split"]) -> None:
        """Seed torch, NumPy and `random` for what is built next.

        Args:
            source: `"init"` just before the module is built, `"split"` just before the data are, and again before
                `fit` if the datamodule draws in `setup`.

        Raises:
            InvalidArgument: for another source; the others are seeded within the run.
        """
        check_choice("source", source, ("init", "split"))
        if source == "split":  # DDP seeds every generator again by this variable, just before the data are set up
            self._global_seed = os.environ.pop(_GLOBAL_SEED, self._global_seed)
        key = self.streams[source].enter()
        torch.manual_seed(key)  # also of devices that are not in use yet

    # -- the run -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap the strategy's steps and its handling of loaders; seed what the module builds from here on."""
        if sum(isinstance(c, SeedStreams) for c in trainer.callbacks) > 1:
            raise InvalidArgument("A Trainer takes one SeedStreams; give it the seeds of all sources.")
        self._detach()
        self._outside, self._threads = GlobalGenerators(), torch.get_num_threads()
        self._passes, self._loaders, self._foreign, self._begun = {}, {}, False, False
        self._keys = None
        self._fixed.pop("final", None)
        strategy = trainer.strategy
        self._wrap(strategy, "training_step", partial(self._training_step, trainer))
        for name in _EVALUATION_STEPS:
            self._wrap(strategy, name, partial(self._evaluation_step, trainer))
        self._wrap(strategy, "process_dataloader", partial(self._loader, trainer))
        self.streams["init"].enter(1)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the fingerprint of the start; disturb it."""
        if trainer.ckpt_path is not None:
            return  # the weights and the fingerprint of the start come from the checkpoint
        self._chains, self._fixed = {}, {}
        if self.fingerprint != "off":
            self._fixed["init"] = hash_module(pl_module)
        if "numerical" in self.streams:
            self._fixed["numerical"] = disturb(self.numerical_kind, self.streams["numerical"], pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the first batch of iterables, which is not that of an epoch when resuming within one."""
        self._keys = None
        self._augment(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Number loaders and passes from the first again."""
        self._keys = None
        self._loaders.pop("train", None)
        if self._begun:
            # of new loaders, Lightning has begun a pass already and drops it, though its workers were given indices
            self._passes = {place: n for place, n in self._passes.items() if place[0] != _STAGES.index("train")}
            self._chains["order"] = Chain(self._ordered)
        self._augment(trainer, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note where the training stands."""
        self._batch, self._calls, self._begun = batch_idx, 0, True
        if self.fingerprint == "full":
            self._chain("batches").add(hash_batch(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Seed the next batch of what is no DataLoader."""
        self._augment(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the order of the epochs that are over."""
        self._ordered = self._chain("order").digest

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the generators of the training aside."""
        self._begin_evaluation(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the generators of the training as if there had been no validation."""
        if self._training is not None:
            self._training.restore()
            self._training = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Number the passes."""
        self._begin_evaluation(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Number the passes."""
        self._begin_evaluation(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the fingerprints."""
        if self.fingerprint == "off":
            return
        self._fixed["final"] = hash_module(pl_module)
        found = self.fingerprints
        names = dict.fromkeys([*SOURCES, *found])
        rows = [[name, str(self.seeds.get(name, "")), found.get(name, "")] for name in names]
        log_table(trainer, "seed_streams/fingerprints", ["source", "seed", "fingerprint"], rows)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the strategy and the global generators as they were before the run."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave them so after a crash too."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Seeds, and fingerprints so far."""
        chains = {name: chain.digest for name, chain in self._chains.items()}
        fixed = {name: found for name, found in self._fixed.items() if name != "final"}
        return {"seeds": dict(self.seeds), "chains": chains, "fixed": fixed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the fingerprints; warn of other seeds than those of the checkpoint."""
        self._chains = {name: Chain(digest) for name, digest in state_dict["chains"].items()}
        self._ordered = state_dict["chains"].get("order", "")
        self._fixed = dict(state_dict["fixed"])
        changed = [s for s in SOURCES if self.seeds.get(s) != state_dict["seeds"].get(s)]
        if changed:
            rank_zero_warn(
                f"The checkpoint was trained with other seeds of {', '.join(changed)}: {state_dict['seeds']}. The run"
                " goes on with the new ones and equals neither training.",
                category=LightningMethodsWarning,
            )

    # -- what is wrapped ---------------------------------------------------------------------------------------------

    def _wrap(self, owner: Any, name: str, instead: Callable[..., Any]) -> None:
        original, own = getattr(owner, name), vars(owner).get(name)
        setattr(owner, name, wraps(original)(partial(instead, original)))
        self._undo.append(partial(setattr, owner, name, own) if own else partial(delattr, owner, name))

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._training = None
        if self._global_seed is not None:
            os.environ.setdefault(_GLOBAL_SEED, self._global_seed)
            self._global_seed = None
        if self._outside is not None:
            self._outside.restore()
            torch.set_num_threads(self._threads)
            self._outside = None

    def _evaluation_step(self, trainer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stage = trainer.state.stage.value
        self.streams["evaluation"].enter(rank(), *self._evaluated(trainer, stage), self._calls)
        self._calls += 1
        result = original(*args, **kwargs)
        if self.fingerprint != "off" and not trainer.sanity_checking:
            self._chain("evaluation").add(generator_state())
        return result

    def _training_step(self, trainer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        keys, calls = self._keys, self._calls
        if keys is None or calls:
            keys = self.streams["dropout"].within(rank(), _epoch(trainer), calls)
            self._keys = None if calls else keys
        looks = self.fingerprint == "full" or (self.fingerprint == "light" and self._batch < _LOOKS)
        if looks and calls == 0:
            self._chain("augment").add(generator_state())
        seed_all(keys(self._batch))
        self._calls += 1
        result = original(*args, **kwargs)
        if looks:
            self._chain("dropout").add(generator_state())
        return result

    def _evaluated(self, trainer: Any, stage: str) -> Place:
        place = _STAGES.index(stage), _epoch(trainer)
        return (*place, self._passes.get((*place, -1), 0))

    def _begin_evaluation(self, trainer: Any) -> None:
        stage = trainer.state.stage.value
        place = (_STAGES.index(stage), _epoch(trainer), -1)
        self._passes[place] = self._passes.get(place, 0) + 1
        self._calls = 0
        self._loaders.pop(stage, None)
        if trainer.state.fn == "fit":
            self._training = GlobalGenerators()

    def _augment(self, trainer: Any, batch: int) -> None:
        # a DataLoader seeds each batch as it is fetched; for other iterables this is the last place before it
        if self._foreign:
            self.streams["augment"].enter(rank(), _epoch(trainer), batch)

    def _loader(self, trainer: Any, original: Callable[[Any], Any], loader: Any) -> Any:
        loader = original(loader)
        stage = trainer.state.stage.value
        number = self._loaders[stage] = self._loaders.get(stage, -1) + 1
        if stage == "predict":  # Lightning reads the indices of each prediction from a sampler of its own
            self.streams["evaluation"].enter(rank(), number)
            return loader
        training = stage == "train"
        if not isinstance(loader, DataLoader):
            self._foreign |= training
            return loader
        begin = partial(self._begin, trainer, training, number)
        if not training:
            stream = self.streams["evaluation"]
            return self._keep(streamed(loader, stream, stream, begin, rank=rank(), force=self.force))
        if owned_generator(loader) and not self.force:
            rank_zero_warn(
                "The training dataloader has a generator of its own, which keeps its order: the seed of `order` is not"
                " used. Leave the generator out, or pass SeedStreams(force=True).",
                category=LightningMethodsWarning,
            )
        boot = self._bootstrap(loader, number) if self.bootstrap else None
        if self.fingerprint != "off":
            self._note_split(loader, number, boot)
        order, augment = self.streams["order"], self.streams["augment"]
        return self._keep(streamed(loader, order, augment, begin, rank=rank(), force=self.force, bootstrap=boot))

    def _keep(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._undo.append(partial(setattr, sampler, "active", False))
        return loader

    def _note_split(self, loader: DataLoader[Any], number: int, boot: np.ndarray | None) -> None:
        chain = Chain("" if number == 0 else self._fixed.get("split", ""))
        chain.add(hash_dataset(loader.dataset).encode())
        if boot is not None:
            chain.add(boot.tobytes())
        self._fixed["split"] = chain.digest

    def _bootstrap(self, loader: DataLoader[Any], number: int) -> np.ndarray:
        if isinstance(loader.dataset, IterableDataset):
            raise UnsupportedTraining(
                "bootstrap=True needs a data set with a length and indices; this is an iterable one. Resample where it"
                " is made."
            )
        size = len(loader.dataset)  # type: ignore[arg-type]
        return np.random.default_rng(self.streams["split"].key(2, number)).integers(size, size=size)

    def _begin(self, trainer: Any, training: bool, number: int) -> tuple[Place, Callable[[bytes], None]]:
        # an extra pass of another callback, which computes no gradients, is no part of the training
        extra = training and not torch.is_grad_enabled()
        stage = _STAGES.index("train" if training else trainer.state.stage.value)
        place = (stage + extra * len(_STAGES), _epoch(trainer), number)
        again = self._passes[place] = self._passes.get(place, -1) + 1
        watched = training and not extra and self.fingerprint != "off"
        return (*place, again), self._chain("order").add if watched else _nothing

    def _chain(self, name: str) -> Chain:
        chain = self._chains.get(name)
        if chain is None:
            chain = self._chains[name] = Chain()
        return chain


def _epoch(trainer: Any) -> int:
    # `current_epoch` is behind while a run is resumed at an epoch's end, when its loaders are begun
    return int(trainer.fit_loop.epoch_progress.current.processed)


def _nothing(_: bytes) -> None:
    """Stand for a fingerprint that is not taken."""
