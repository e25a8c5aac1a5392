"""Extra work shows itself when it takes long enough, and only where the user wants to see progress."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_methods.core import progress
from lightning_methods.core.progress import phase


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(progress, "_WORTH_SHOWING", 0.05)


def trainer(bar, *, is_global_zero=True):
    return SimpleNamespace(progress_bar_callback=bar, is_global_zero=is_global_zero)


def shown(capsys, caplog, owner, seconds):
    """Return the bar and the line that a phase left."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    with phase(owner, "Reading", 3) as advance:
        for _ in range(3):
            time.sleep(seconds / 3)
            advance()
    return "Reading:" in capsys.readouterr().err, "Reading: 0." in caplog.text


def disabled():
    bar = TQDMProgressBar()
    bar.disable()
    return bar


@pytest.mark.parametrize(
    ("owner", "seconds", "expected"),
    [
        (trainer(TQDMProgressBar()), 0.3, (True, True)),
        (trainer(TQDMProgressBar()), 0.0, (False, False)),
        (trainer(RichProgressBar()), 0.3, (False, True)),
        (trainer(disabled()), 0.3, (False, False)),
        (trainer(None), 0.3, (False, False)),
        (trainer(TQDMProgressBar(), is_global_zero=False), 0.3, (False, False)),
    ],
    ids=["long", "short", "beside rich", "bar disabled", "no bar", "another rank"],
)
def test_what_is_shown(capsys, caplog, owner, seconds, expected):
    assert shown(capsys, caplog, owner, seconds) == expected


def test_an_exception_passes_through_and_leaves_no_line(capsys, caplog):
    def fail():
        with phase(trainer(TQDMProgressBar()), "Reading"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "Reading" not in caplog.text
