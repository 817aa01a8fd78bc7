"""What several tests of the laboratory share."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which is what takes the time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"<svg></svg>"))
