"""Files that are there as a whole or not at all. Standard library only."""
from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces what was there in one moment: a reader sees the old text or the new one, also after a full disk.

    Raises OSError, of `path`, and then leaves the old one. Several processes may write the same file.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
