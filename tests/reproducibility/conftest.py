from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of trainings without a folder of their own go where the test's go."""
    monkeypatch.chdir(str(tmp_path))
