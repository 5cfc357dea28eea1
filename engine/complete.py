"""Which checkpoints on disk are whole: one answer for the trainer and for the launcher. Standard library only."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def intact(path: Path) -> dict[str, Any] | None:
    """meta.json of the checkpoint folder `path`; None unless every file that it lists is there with its size."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        whole = all((path / name).stat().st_size == size for name, size in meta["files"].items())
        return meta if whole and {"step", "ranks", "valid_loss", "vocabulary"} <= meta.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
