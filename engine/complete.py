"""Which checkpoints on disk are whole: one answer for the trainer and for the launcher. Standard library only."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def intact(path: Path) -> dict[str, Any] | None:
    """meta.json of the checkpoint folder `path`; None unless model.pt is there with the size that it lists.

    The other files do not matter, whether absent (on another machine's disk, or left behind by a laptop) or damaged:
    they hold a rank's memory, without which training goes on from the same step all the same.
    """
    try:
        meta = json.loads((path / "meta.json").read_text())
        whole = (path / "model.pt").stat().st_size == meta["files"]["model.pt"]
        return meta if whole and {"step", "ranks", "valid_loss", "vocabulary"} <= meta.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
