"""What the callback asks of the module, the trainer and the data around it, and what it says of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_methods.core._lightning import rank_zero_warn
from lightning_methods.core.layers import named_layers_first
from lightning_methods.errors import LayerNotFound, NoEffect
from lightning_methods.rog.features import Collected, in_order, varies

_LAST_LAYERS = 4  # how many blocks before the classifier are used if none are named


def blocks_before_classifier(module: nn.Module) -> list[str]:
    """Return the last blocks with parameters before the last linear layer, in the order of the module.

    Raises:
        LayerNotFound: if there is no linear layer, or nothing before it.
    """
    layers = dict(named_layers_first(module))
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    place = linear[-1] if linear else ""
    while place:
        parent, _, _ = place.rpartition(".")
        siblings = [name for name in layers if name.rpartition(".")[0] == parent]
        before = siblings[: siblings.index(place)]
        blocks = [name for name in before if any(True for _ in layers[name].parameters())]
        if blocks:
            return blocks[-_LAST_LAYERS:]
        place = parent
    raise LayerNotFound(
        f"No blocks with parameters before a final linear layer were found in {type(module).__name__}. Name them with "
        f"layers=, as in `model.named_modules()`."
    )


def is_last_epoch(trainer: Any) -> bool:
    """Tell whether the epoch that ends now is the last."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return bool(
        trainer.should_stop
        or (epochs is not None and 0 <= epochs <= trainer.current_epoch + 1)
        or (steps is not None and 0 <= steps <= trainer.global_step)
    )


def without_data(trainer: Any) -> bool:
    """Tell whether the trainer reads no training data."""
    return trainer.limit_train_batches == 0 or trainer.sanity_checking


def batch_limit(trainer: Any, source: Any, loader: Any) -> int | None:
    """Return how many batches the trainer allows of a loader of its own."""
    stage = source if isinstance(source, str) else None
    share = getattr(trainer, f"limit_{stage}_batches", None) if stage else None
    if share is None or (share == 1.0 and not isinstance(share, int)):
        return None
    if isinstance(share, int):
        return share or None
    try:
        return max(int(share * len(loader)), 1)
    except (TypeError, NotImplementedError):
        return None


def fingerprint(module: nn.Module) -> list[float]:
    """Return sums that tell whether weights have changed, the same on every device."""
    totals = [0.0, 0.0]
    for _, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            wide = value.detach().cpu().double()
            totals = [totals[0] + float(wide.sum()), totals[1] + float(wide.abs().sum())]
    return totals


def say_if_augmented(loaders: Iterable[Any]) -> bool:
    """Tell, and warn, whether the samples come out differently each time, which widens every class."""
    found = any(varies(getattr(in_order(one)[0], "dataset", None)) for one in loaders)
    if found:
        rank_zero_warn(
            "The training data give another input each time a sample is read: they are augmented at random. "
            "Pass train= a dataloader of the same samples without augmentation for a better fit."
        )
    return found


def say_if_useless(values: dict[str, float], *, prefers_softmax: bool) -> None:
    """Warn where the network itself agrees better with the labels of the validation split."""
    if prefers_softmax or values["fit/accuracy"] < values["fit/softmax"]:
        rank_zero_warn(
            f"RoG does not help here: on the validation split the network itself reaches "
            f"{100 * values['fit/softmax']:.1f}%, the generative classifiers {100 * values['fit/accuracy']:.1f}%.",
            category=NoEffect,
        )


def say_what_is_missing(found: Collected) -> None:
    """Warn of samples that were not used."""
    if found.left_out:
        rank_zero_warn(
            f"RobustGenerativeClassifier uses {len(found.labels)} training samples and leaves out {found.left_out}. "
            f"Raise max_per_class or max_feature_bytes for more."
        )
    if found.dropped:
        rank_zero_warn(f"{found.dropped} training samples have no label from 0 to C - 1 and are left out.")
