"""An extra pass over a dataloader in the middle of a training that leaves no trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_methods.core.progress import phase
from lightning_methods.errors import InvalidArgument, UnsupportedTraining


@contextmanager
def preserved(module: nn.Module, *loaders: Any) -> Iterator[None]:
    """Restore on exit, also after an exception, the train or eval mode of every submodule and every random state.

    Random states are those of torch (CPU and each CUDA device in use), NumPy and `random`, and of the generators that
    `loaders` and their samplers own.

    Example:
        >>> import torch
        >>> net = torch.nn.Dropout()
        >>> with preserved(net):
        ...     _ = net.eval()
        >>> net.training
        True
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    generators = [(g, g.get_state()) for loader in loaders for g in _generators(loader)]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        for generator, state in generators:
            generator.set_state(state)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def loaders_of(trainer: Any, loader: str | Any) -> list[Any]:
    """Return the dataloaders that `loader` means.

    Args:
        trainer: whose loaders to take.
        loader: `"train"`, `"val"`, `"test"` or `"predict"` (what the trainer runs, else what its datamodule or module
            gives), a dataloader, or a list of them.

    Raises:
        InvalidArgument: for another name.
        UnsupportedTraining: if the trainer has no such loader.
    """
    if not isinstance(loader, str):
        return list(loader) if isinstance(loader, (list, tuple)) else [loader]
    if loader not in ("train", "val", "test", "predict"):
        raise InvalidArgument(f"loader={loader!r} is not known. Name 'train', 'val', 'test' or 'predict', or pass one.")
    attribute = "train_dataloader" if loader == "train" else f"{loader}_dataloaders"
    found = getattr(trainer, attribute, None)
    if found is None:
        source = trainer.datamodule if getattr(trainer, "datamodule", None) is not None else trainer.lightning_module
        found = _built(source, loader)
    if found is None:
        raise UnsupportedTraining(
            f"The trainer has no {loader} dataloader here. Pass the dataloader itself, or use a datamodule."
        )
    if isinstance(found, dict):
        return list(found.values())
    return list(found) if isinstance(found, (list, tuple)) else [found]


def batches(
    trainer: Any, pl_module: Any, loader: str | Any, *, description: str, limit: int | None = None
) -> Iterator[Any]:
    """Yield the batches of a loader on the module's device, in eval mode without gradient, with a progress phase.

    The trainer's `limit_*_batches` and `fast_dev_run` hold for its own loaders, `fast_dev_run` also for others. Batches
    go through the module's transfer hooks and the trainer's precision. Modes and random states are restored at the end,
    also when the caller stops early (close the iterator, or let it go out of scope).

    Args:
        trainer: the running trainer.
        pl_module: the module that will see the batches.
        loader: see `loaders_of`.
        description: what the progress phase says.
        limit: at most so many batches of each loader.

    Raises:
        InvalidArgument: for a limit below 1.
        UnsupportedTraining: if the trainer has no such loader.
    """
    if limit is not None and limit < 1:
        raise InvalidArgument(f"limit={limit}: at least 1 batch is needed, or None for all.")
    if isinstance(loader, str) and getattr(trainer, f"limit_{loader}_batches", None) == 0:
        return  # Lightning then does not even make the loader
    loaders = loaders_of(trainer, loader)
    limits = [_limit_of(trainer, loader, one, limit) for one in loaders]
    known = None if any(n is None for n in limits) else sum(n or 0 for n in limits)
    precision = trainer.precision_plugin
    with preserved(pl_module, *loaders), phase(trainer, description, known) as advance:
        pl_module.eval()
        # not inference_mode: its tensors could neither be kept in checkpoints' states nor used with a graph later
        with torch.no_grad(), precision.forward_context():
            for one, count in zip(loaders, limits, strict=True):
                for batch in _first(one, count):
                    yield trainer.strategy.batch_to_device(precision.convert_input(batch), dataloader_idx=0)
                    advance()


def _first(loader: Iterable[Any], count: int | None) -> Iterator[Any]:
    if count == 0:
        return
    for i, batch in enumerate(loader, start=1):
        yield batch
        if i == count:  # before the next batch is fetched
            return


def _limit_of(trainer: Any, source: str | Any, loader: Any, limit: int | None) -> int | None:
    """Return how many batches of `loader` to read, `None` where nothing says so."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):  # an iterable dataset
        length = None
    bounds = [n for n in (length, limit) if n is not None]
    if isinstance(source, str):
        allowed = getattr(trainer, f"limit_{source}_batches")
        if isinstance(allowed, int):
            bounds.append(allowed)
        elif length is not None:
            bounds.append(int(allowed * length))
    if trainer.fast_dev_run:
        bounds.append(int(trainer.fast_dev_run))
    return min(bounds) if bounds else None


def _built(source: Any, name: str) -> Any:
    """Return what the user's own `train_dataloader`, `val_dataloader`, ... gives, `None` where there is none."""
    hook = f"{name}_dataloader"
    defined_in = getattr(getattr(type(source), hook, None), "__module__", "lightning.")
    if defined_in.startswith(("lightning.", "pytorch_lightning.")):
        return None
    if hasattr(source, "prepare_data_per_node") and not hasattr(source, "training_step"):
        # a datamodule that was set up for another stage, as in trainer.test
        source.setup("fit" if name in ("train", "val") else name)
    return getattr(source, hook)()


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Yield the generators that iterating over a loader would advance."""
    seen: set[int] = set()
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield generator
