from __future__ import annotations

import time


def until(condition, limit_s: float = 20):
    """What `condition` returns once it holds; fails where it does not in time."""
    end = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return result
