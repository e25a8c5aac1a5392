"""Teachers: made by name, loaded from any checkpoint, recognised by a fingerprint."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.errors import InvalidArgument, MissingDependency, ShapeMismatch, did_you_mean, require

_SHOWN = 8  # names listed of each kind of difference


def load_teacher(
    teacher: nn.Module | str,
    checkpoint: str | Path | None = None,
    *,
    num_classes: int | None = None,
    strict: bool = True,
) -> nn.Module:
    """Return a teacher with its weights, in eval mode.

    Args:
        teacher: a network, or `"torchvision:resnet34"` or `"timm:resnet34"`: that model, with its published weights
            where no checkpoint is given (they are downloaded).
        checkpoint: a file with a state dict or a Lightning checkpoint; a prefix of all keys (`model.`, `student.`,
            `_orig_mod.`) is found and left out.
        num_classes: for a model by name.
        strict: whether every tensor must be there, and nothing else.

    Raises:
        InvalidArgument: if the name or the file is not known, or holds no weights.
        MissingDependency: if torchvision or timm is not installed.
        ShapeMismatch: if the checkpoint is not of this network, with what differs.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}, f"{folder}/a.ckpt")
        ...     loaded = load_teacher(nn.Linear(2, 2), f"{folder}/a.ckpt")
        >>> bool((loaded.weight == net.weight).all())
        True
    """
    network = _named(teacher, num_classes, pretrained=checkpoint is None) if isinstance(teacher, str) else teacher
    if checkpoint is not None:
        _load(network, read_weights(checkpoint), source=str(checkpoint), strict=strict)
    return network.eval()


def fingerprint(network: nn.Module) -> str:
    """Return a hash of all parameters and buffers; the same on any device.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = fingerprint(net)
        >>> _ = net.weight.data.add_(1)
        >>> fingerprint(net) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, Tensor):
            plain = name.replace("_orig_mod.", "")
            digest.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Outside:
    """Keeps a network out of a module's parameters, state and checkpoints.

    Args:
        network: what to keep; a plain attribute of this object, which is no module.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.fingerprint = fingerprint(network)  # before anything converts it


def refuse_another(made_with: str, own: str, otherwise: str = "") -> None:
    """Raise `InvalidArgument` where a checkpoint was made with a teacher of another fingerprint.

    Args:
        made_with: the fingerprint in the checkpoint.
        own: that of the teacher which is there.
        otherwise: what else can be done, as the end of the last sentence.
    """
    if made_with != own:
        raise InvalidArgument(
            f"The checkpoint was made with a teacher of the fingerprint {made_with[:12]}, this one has {own[:12]}. "
            f"Give the teacher that it began with{otherwise}."
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file that holds a state dict or a Lightning checkpoint.

    Args:
        path: the file; read without running code that it may hold.

    Raises:
        InvalidArgument: if there is no such file, or no tensor in it.
    """
    file = Path(path)
    if not file.is_file():
        near = [p.name for p in file.parent.glob("*") if p.is_file()] if file.parent.is_dir() else []
        raise InvalidArgument(f"There is no checkpoint {str(path)!r}. {did_you_mean(file.name, near)}")
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidArgument(
            f"{str(path)!r} cannot be read as a checkpoint of tensors and plain values ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Save the teacher with torch.save(teacher.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    weights = {k: v for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, Mapping) else {}
    if not weights:
        raise InvalidArgument(f"{str(path)!r} holds no state dict, but a {type(held).__name__}.")
    return weights


def _load(network: nn.Module, weights: dict[str, Tensor], *, source: str, strict: bool) -> None:
    own = network.state_dict()
    prefix = _prefix(own, weights)
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    missing = [k for k in own if k not in found]
    # of a Lightning checkpoint only what lies under the prefix belongs to the network
    unexpected = [k for k in found if k not in own]
    shapes = [
        f"{k}: {tuple(found[k].shape)} in the file, {tuple(own[k].shape)} in the network"
        for k in own
        if k in found and found[k].shape != own[k].shape
    ]
    if shapes or (strict and (missing or unexpected)) or len(missing) == len(own):
        lines = [f"{source!r} does not hold the weights of this {type(network).__name__}"]
        lines += [f"  missing in the file ({len(missing)}): {_listed(missing)}"] if missing else []
        lines += [f"  not in the network ({len(unexpected)}): {_listed(unexpected)}"] if unexpected else []
        lines += [f"  of another shape ({len(shapes)}): {_listed(shapes)}"] if shapes else []
        lines.append("Is it of another depth, width or number of classes? strict=False loads what is there.")
        raise ShapeMismatch("\n".join(lines))
    network.load_state_dict(found, strict=False)


def _prefix(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Return what stands before the network's own names in the file: the prefix under which most of them are found."""
    candidates = {""}
    for name in list(own)[:3]:
        candidates |= {key.removesuffix(name) for key in weights if key.endswith(name)}

    def found(prefix: str) -> tuple[int, int]:
        return sum(f"{prefix}{name}" in weights for name in own), -len(prefix)

    return max(sorted(candidates), key=found)


def _named(name: str, num_classes: int | None, *, pretrained: bool) -> nn.Module:
    library, _, model = name.partition(":")
    if library not in ("torchvision", "timm") or not model:
        raise InvalidArgument(
            f"teacher={name!r}: a network is needed, or a name such as 'torchvision:resnet34' or 'timm:resnet34'."
        )
    classes = {} if num_classes is None else {"num_classes": num_classes}
    if library == "timm":
        timm = _timm(name)
        if model not in timm.list_models():
            raise InvalidArgument(f"timm has no model {model!r}. {did_you_mean(model, timm.list_models())}")
        return timm.create_model(model, pretrained=pretrained, **classes)
    models = require("torchvision.models", extra="vision", why=f"teacher={name!r}")
    if model not in models.list_models():
        raise InvalidArgument(f"torchvision has no model {model!r}. {did_you_mean(model, models.list_models())}")
    return models.get_model(model, weights="DEFAULT" if pretrained else None, **classes)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingDependency(
            f"teacher={name!r} needs the package 'timm', which cannot be imported here ({error}). Install it with: "
            f"pip install timm"
        ) from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
