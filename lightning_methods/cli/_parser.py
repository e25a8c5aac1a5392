"""The argument parser of the commands that are not LightningCLI's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lightning_methods.errors import InvalidArgument


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what the command line prints as one line."""
        raise InvalidArgument(message)
