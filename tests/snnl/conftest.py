"""No test of this folder waits for a figure that nobody looks at."""

from __future__ import annotations

import pytest

from tests.support.drawing import leave_undrawn


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty files in place of figures, unless a test is marked `drawn`."""
    if request.node.get_closest_marker("drawn") is None:
        leave_undrawn(monkeypatch.setattr)
