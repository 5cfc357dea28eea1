from __future__ import annotations

import contextlib
import time
from pathlib import Path


def until(condition, limit_s: float = 120):
    """What `condition` returns once it holds; fails where it does not in time."""
    end = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return result


def alive(pid: int) -> bool:
    """A process that has ended and was not waited for is not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
