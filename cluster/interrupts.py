"""Being asked to end: what must be closed or taken back is, whoever asks and however often."""
from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)           # Ctrl-C, kill, a closed terminal


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Each of them raises KeyboardInterrupt in the block."""
    with _handled_by(_interrupt):
        yield


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """For a block that ends by itself and must not be broken off."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled_by(handler: object) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ASKING}      # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
