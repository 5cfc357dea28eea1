from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(at: Path, options: str) -> Iterator[None]:
    """A file system of its own at a folder. Skips where that is not allowed."""
    at.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", at], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def fill(disk: Path) -> None:
    """To the last byte, by the file `ballast`."""
    subprocess.run(["dd", "if=/dev/zero", f"of={disk}/ballast", "bs=512"], capture_output=True)
    assert shutil.disk_usage(disk).free == 0
