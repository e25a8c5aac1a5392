"""Checks of arguments that several classes take."""

from __future__ import annotations

from lightning_methods.errors import InvalidArgument


def check_at_least(argument: str, given: int, least: int) -> None:
    """Raise `InvalidArgument` unless `given` is a whole number of at least `least`."""
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise InvalidArgument(f"{argument}={given!r}: a whole number of at least {least} is needed.")


def check_fraction(argument: str, given: float) -> None:
    """Raise `InvalidArgument` unless `given` is a share from 0 up to, not including, 1."""
    if not 0 <= given < 1:
        raise InvalidArgument(f"{argument}={given!r}: a share of at least 0 and below 1 is needed.")
