"""The one place that imports Lightning.

`lightning.pytorch` and `pytorch_lightning` are two separate copies of the same code. We build on the first and fall
back to the second where only that is installed; callbacks and optimizers run in a Trainer of either family because
nothing here or in the methods asks `isinstance` of a trainer or a module.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lightning_methods.errors import UnsupportedTraining

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
else:
    try:
        import lightning.pytorch as pl
        from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    except ModuleNotFoundError as error:
        if error.name not in {"lightning", "lightning.pytorch"}:
            raise
        import pytorch_lightning as pl
        from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

    Callback = pl.Callback
    LightningDataModule = pl.LightningDataModule
    LightningModule = pl.LightningModule
    Trainer = pl.Trainer

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "OneFamily",
    "Trainer",
    "pl",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]


class OneFamily:
    """A LightningModule of ours that says which import it needs when the other family's Trainer gets it.

    A Trainer calls a module of the other family "not a LightningModule". Its question is an `isinstance`, which reads
    `__class__`: the only place where a module can answer. Name it before `LightningModule` among the bases.
    """

    @property
    def __class__(self) -> type:
        asking = sys._getframe(1)
        if asking.f_code.co_name == "_maybe_unwrap_optimized":
            trainer = asking.f_globals["__name__"].rpartition(".utilities")[0]
            ours = LightningModule.__module__.rpartition(".core")[0]
            if trainer != ours:
                raise UnsupportedTraining(
                    f"{type(self).__name__} is a LightningModule of `{ours}` and was given to a Trainer of `{trainer}`."
                    f" Import the Trainer with `from {ours} import Trainer`."
                )
        return type(self)

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)
