"""The launcher as a process of its own: watched, asked to stop, killed, as a person at a terminal would."""
from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.follow import Tail
from cluster.run import Broken

POLL_S = 0.1


class Launcher:
    """What it prints is in the file `log`, and given to `show` line by line by whatever waits for it here."""

    def __init__(self, command: Sequence[str], log: Path, *, cwd: Path, env: Mapping[str, str] | None = None,
                 show: Callable[[str], object] = lambda line: None):
        self.log, self._tail, self._show, self._lines = log, Tail(log), show, list[str]()
        with open(log, "ab") as out:
            self._process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                             stderr=subprocess.STDOUT)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def until(self, marker: str, timeout_s: float) -> re.Match[str]:
        """The next line with `marker`, a regular expression. Raises Broken where it ends, or is silent, without it."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = not self.runs
            self._lines += self._tail.lines()
            while self._lines:
                self._show(line := self._lines.pop(0))
                if found := re.search(marker, line):
                    return found
            if ended:
                raise Broken(f"the launcher ended with status {self._process.returncode} before it said {marker!r}")
            if time.monotonic() > deadline:
                raise Broken(f"the launcher did not say {marker!r} in {timeout_s:g} s")
            time.sleep(POLL_S)

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises Broken where it does not end."""
        deadline = time.monotonic() + timeout_s
        while self.runs:
            self._tell()
            if time.monotonic() > deadline:
                raise Broken(f"the launcher did not end in {timeout_s:g} s")
            time.sleep(POLL_S)
        self._tell()
        return self._process.returncode

    def ctrl_c(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self) -> None:
        for line in [*self._lines, *self._tail.lines()]:
            self._show(line)
        self._lines = []
