"""The launcher as a process of its own: watched, asked to stop, killed, as a person at a terminal would."""
from __future__ import annotations

import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.follow import PROGRESS, Tail
from cluster.run import Broken

POLL_S = 0.1
LAST_WORDS = 60                                   # lines of what it printed that a failure is told with


class Launcher:
    """What it prints is in the file `log`, and given to `show` line by line by whatever waits for it here."""

    def __init__(self, command: Sequence[str], log: Path, *, cwd: Path, env: Mapping[str, str] | None = None,
                 show: Callable[[str], object] = lambda line: None):
        self._tail, self._show, self._lines = Tail(log), show, list[str]()
        self._said = deque[str](maxlen=LAST_WORDS)           # of steps in a row the last
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
                if found := re.search(marker, self._next()):
                    return found
            if ended or time.monotonic() > deadline:
                how = f"ended with status {self._process.returncode}" if ended else f"went on for {timeout_s:g} s"
                raise Broken(f"the launcher {how} without a word of {marker!r}{self._last_words()}")
            time.sleep(POLL_S)

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises Broken where it does not end."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = not self.runs
            self._lines += self._tail.lines()
            while self._lines:
                self._next()
            if ended:
                return self._process.returncode
            if time.monotonic() > deadline:
                raise Broken(f"the launcher did not end in {timeout_s:g} s{self._last_words()}")
            time.sleep(POLL_S)

    def ctrl_c(self) -> None:
        self.send(signal.SIGINT)

    def send(self, sign: int) -> None:
        self._process.send_signal(sign)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        return "".join(["\nIts last words:", *(f"\n  {line}" for line in self._said)])

    def _next(self) -> str:
        line = self._lines.pop(0)
        if line.startswith(PROGRESS) and self._said and self._said[-1].startswith(PROGRESS):
            self._said.pop()
        self._said.append(line)
        self._show(line)
        return line
