"""Import every technique whose packages are installed, with the data modules and models.

jsonargparse finds a class by its short name once it is imported, so one line makes the short names work in any
LightningCLI:

    import lightning_methods.catalog
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import lightning_methods
from lightning_methods.errors import MissingDependency

# the rooms of the house; any other package in it is a technique, and deleting its folder deletes it from here too
_ROOMS = {"cli", "core", "data", "models", "report"}
_BESIDE_TECHNIQUES = ("data", "models")
# what an extra brings; the import name of each
_OPTIONAL = {"PIL", "pandas", "sklearn", "torch_geometric", "torchvision", "wandb"}


def techniques() -> list[str]:
    """Return the names of the folders that hold a technique.

    Example:
        >>> "core" in techniques()
        False
    """
    found = pkgutil.iter_modules(lightning_methods.__path__)
    return sorted(module.name for module in found if module.ispkg and module.name not in _ROOMS)


def _import_all() -> dict[str, str]:
    skipped = {}
    for name in (*techniques(), *_BESIDE_TECHNIQUES):
        try:
            importlib.import_module(f"{lightning_methods.__name__}.{name}")
        except MissingDependency as error:
            skipped[name] = str(error)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _OPTIONAL:
                raise
            skipped[name] = str(error)
    # a class that the package itself shows is saved in configs by that shortest path, which never changes
    for name, module in lightning_methods._EXPORTS.items():
        if f"{lightning_methods.__name__}.{module}" in sys.modules:
            getattr(lightning_methods, name, None)
    return skipped


SKIPPED = _import_all()
"""What could not be imported for want of an optional package: name -> reason."""
