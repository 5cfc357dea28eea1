"""A run's folder as the trainer sees it: its log, its status, and requests to stop."""
from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from engine.files import write_whole
from engine.world import World

State = Literal["training", "finished", "stopped", "failed"]


def processor() -> str:
    """The processor's name, as its maker gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Run:
    """`folder` holds recipe.json; everything else about the run is written beside it (docs/design.md has the list).

    `saved` is called with each checkpoint's folder once it is whole, on every rank at the same step.
    """

    def __init__(self, folder: Path, world: World, saved: Callable[[Path], None] = lambda path: None):
        self.folder, self.world, self.saved = folder, world, saved
        self.checkpoints = folder / "checkpoints"
        self.log = self._logger()
        self._signalled, self._step, self._began = False, 0, time.time()

    def status(self, state: State, step: int, message: str = "", **more: Any) -> None:
        """Replace status.json, which tells whoever launched the run how it is doing; by the leading rank only."""
        self._step = step
        if self.world.leads:
            self._write_status(state, step, message, **more)

    def describe_machine(self) -> None:
        """machine.json: what a number needs beside it to be compared with another."""
        if self.world.leads:
            cuda = self.world.device.type == "cuda"
            (self.folder / "machine.json").write_text(json.dumps({
                "ranks": self.world.size, "device": torch.cuda.get_device_name() if cuda else processor(),
                "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(),
                "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}, indent=1))

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT ask for a stop instead of ending the process.

        A training that is a thread of another program's (Ray's) leaves signals to that.
        """
        if threading.current_thread() is not threading.main_thread():
            return

        def note(signum: int, frame: FrameType | None) -> None:
            self._signalled = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)

    def fail(self, error: BaseException, traceback: bool = False) -> None:
        """Say in this rank's log what ended it, and in status.json unless another rank has already failed."""
        self.log.error(f"{type(error).__name__}: {error}", exc_info=error if traceback else None)
        status = self.folder / "status.json"
        ours = status.exists() and status.stat().st_mtime >= self._began
        if not (ours and json.loads(status.read_text())["state"] == "failed"):
            self._write_status("failed", self._step, f"{type(error).__name__}: {error}")

    def stop_requested(self) -> bool:
        """Whether this rank was signalled, or (asked by the leading rank only) the file `stop` is there."""
        return self._signalled or (self.world.leads and (self.folder / "stop").exists())

    def stop_honoured(self) -> None:
        """Take the request away, so that the next start does not stop again."""
        if self.world.leads:
            (self.folder / "stop").unlink(missing_ok=True)

    def _write_status(self, state: State, step: int, message: str, **more: Any) -> None:
        text = json.dumps({"state": state, "step": step, "message": message} | more)
        try:
            write_whole(self.folder / "status.json", text)
        except OSError:
            try:                                   # on a full disk the block that a file has can still be written
                with open(self.folder / "status.json", "r+") as file:
                    file.write(text)
                    file.truncate()
            except OSError as error:               # which must not hide what this is about
                print(f"status.json could not be written: {error}", file=sys.stderr)

    def _logger(self) -> logging.Logger:
        """logs/rank-R.log, and for the leading rank the standard output too."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        log = logging.getLogger(f"{__name__}.{self.folder}.{self.world.rank}")
        log.setLevel(logging.INFO)
        log.propagate = False
        handlers: list[logging.Handler] = [logging.FileHandler(self.folder / "logs" / f"rank-{self.world.rank}.log")]
        if self.world.leads:
            handlers.append(logging.StreamHandler(sys.stdout))
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(message)s"))
        log.handlers = handlers
        return log
