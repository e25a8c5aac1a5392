"""Every error and warning that the collection raises on purpose.

Each error says what was given, what is needed and the nearest fix, and is also the built-in kind that a caller would
expect (`ValueError`, `RuntimeError`, `ImportError`), so that existing `except` clauses keep working.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class LightningMethodsError(Exception):
    """Base of all errors of the collection."""


class InvalidArgument(LightningMethodsError, ValueError):
    """An argument is outside what the method is defined for."""


class ShapeMismatch(LightningMethodsError, ValueError):
    """Tensors do not fit together."""


class BatchFormat(LightningMethodsError, ValueError):
    """Inputs or targets could not be found in a batch."""


class LayerNotFound(LightningMethodsError, ValueError):
    """A layer name or pattern matches no submodule."""


class TapNotCalled(LightningMethodsError, RuntimeError):
    """A tapped layer did not run in the step."""


class TensorOverwritten(LightningMethodsError, RuntimeError):
    """A tapped tensor was changed in place after it was captured."""


class UnsupportedTraining(LightningMethodsError, RuntimeError):
    """The way the model is trained cannot be combined with the method."""


class MissingDependency(LightningMethodsError, ImportError):
    """An optional package is needed and not installed."""


class LightningMethodsWarning(UserWarning):
    """Base of all warnings of the collection."""


class NoEffect(LightningMethodsWarning):
    """A method is attached and does nothing."""


class TermOutweighsLoss(LightningMethodsWarning):
    """An auxiliary term is larger than the loss it was added to."""


class NotFinite(LightningMethodsWarning):
    """A measured value is NaN or infinite."""


def did_you_mean(name: str, candidates: Iterable[str], *, limit: int = 5) -> str:
    """Return the sentence that lists the candidates closest to `name`, or all of them where none is close."""
    known = list(dict.fromkeys(candidates))
    if not known:
        return "There is none to choose from."
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    # difflib rates whole strings: a name that ends or starts alike (`head` for `model.head`) is close as well
    close += [k for k in known if k not in close and (name in k or k in name)]
    if close:
        return f"Did you mean {', '.join(repr(c) for c in close[:limit])}?"
    shown = ", ".join(repr(k) for k in known[:20])
    return f"There are: {shown}{', ...' if len(known) > 20 else ''}."


def check_choice(argument: str, given: object, choices: Iterable[str]) -> None:
    """Raise `InvalidArgument` unless `given` is one of `choices`."""
    allowed = list(choices)
    if given not in allowed:
        raise InvalidArgument(f"{argument}={given!r} is not known. {did_you_mean(str(given), allowed)}")


def require(package: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        package: the name as in an import statement.
        extra: the extra of `lightning-methods` that installs it.
        why: what needs it, as the subject of a sentence.

    Raises:
        MissingDependency: if the package cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"{why} needs the package {package!r}, which cannot be imported here ({error}). "
            f"Install it with: pip install 'lightning-methods[{extra}]'"
        ) from error
