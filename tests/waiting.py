from __future__ import annotations

import contextlib
import time
from pathlib import Path


def until(condition, limit_s: float = 120):
    """What `condition` returns once it holds; fails where it does not in time."""
    result, waited_s = wait_for(condition, limit_s)
    assert result, f"it did not come to pass in {waited_s:.0f} s"
    return result


def wait_for(condition, limit_s: float):
    """What `condition` returns once it holds, or at last, and the seconds until then. Who asks much, of a dashboard or
    all of /proc, asks seldom: what is waited for needs the processor more."""
    begun = time.monotonic()
    while True:
        asked = time.monotonic()
        result = condition()
        now = time.monotonic()
        if result or now - begun > limit_s:
            return result, now - begun
        time.sleep(min(max(.01, 4 * (now - asked)), 1))


def alive(pid: int) -> bool:
    """A process that has ended and was not waited for is not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
