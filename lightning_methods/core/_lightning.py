"""The one place that imports Lightning.

`lightning.pytorch` and `pytorch_lightning` are two separate copies of the same code. We build on the first and fall
back to the second where only that is installed; callbacks and optimizers run in a Trainer of either family because
nothing here or in the methods asks `isinstance` of a trainer or a module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    "Trainer",
    "pl",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
