"""A LightningCLI that seeds what it builds from the streams of the `SeedStreams` in its trainer's callbacks."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from lightning_methods.reproducibility.seeding import GlobalGenerators
from lightning_methods.reproducibility.streams import SeedStreams


class SeedStreamsCLI(LightningCLI):
    """Build the model from the `init` stream and the data from the `split` stream, whatever else draws numbers.

    Without a `SeedStreams` among the trainer's callbacks it is a LightningCLI. The constructor of the data module draws
    from `split` and leaves no trace, so that it does not matter which of the two is built first; `prepare_data` and
    `setup` draw from `split` too.

    Example:
        >>> cli = SeedStreamsCLI(args=["fit", "--config", "config.yaml"])  # doctest: +SKIP
    """

    _streams: SeedStreams | None = None

    def before_instantiate_classes(self) -> None:
        """Seed the `init` stream, and set the data module's constructor apart."""
        self._streams = _configured(self._get(self.config, "trainer"))
        if self._streams is None:
            return
        parser = self.parser if self.subcommand is None else self._parser(self.subcommand)
        with warnings.catch_warnings():  # the way that all supported versions of jsonargparse know
            warnings.simplefilter("ignore", DeprecationWarning)
            parser.add_instantiator(self._build_data, LightningDataModule)
        self._streams.seed("init")

    def before_fit(self) -> None:
        """Seed the `split` stream."""
        if self._streams is not None:
            self._streams.seed("split")

    before_validate = before_test = before_predict = before_fit

    def _build_data(self, kind: type[LightningDataModule], *args: Any, **kwargs: Any) -> LightningDataModule:
        streams = self._streams
        if streams is None:  # another parse with the same parser
            return kind(*args, **kwargs)
        outside = GlobalGenerators()
        streams.seed("split")
        try:
            return kind(*args, **kwargs)
        finally:
            outside.restore()


def _configured(trainer: Any) -> SeedStreams | None:
    """Return the streams that the trainer's configuration asks for."""
    entries = (trainer and trainer.get("callbacks")) or []
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, SeedStreams):
            return entry
        path = entry.get("class_path", "") if hasattr(entry, "get") else ""
        if str(path).rpartition(".")[2] == SeedStreams.__name__:
            arguments = entry.get("init_args")
            return SeedStreams(**(arguments.as_dict() if hasattr(arguments, "as_dict") else arguments or {}))
    return None
