"""Programs driven in turn, round by round, each in a process of its own: what their speeds are to one another.

Shared machines drift by more than what is to be seen, so only rounds that lie side by side are compared: a ratio is the
median over the rounds of the ratio in each. One contender works at a time, and every round the order is reversed.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Contender = Callable[[], Callable[[], T]]         # called in its process, makes ready and returns what runs one round

LAST_LINES = 12                                   # of what a process said that died


class Died(RuntimeError):
    """A contender's process ended. The message holds its last lines."""


@dataclass(frozen=True)
class Ratio:
    """Of one contender to another, in each round."""
    rounds: tuple[float, ...]

    @staticmethod
    def of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        return Ratio(tuple(x / y for x, y in zip(ours, theirs, strict=True)))

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.rounds):.2f} to {max(self.rounds):.2f})"


def race(contenders: Mapping[str, Contender[T]], rounds: int) -> dict[str, list[T]]:
    """What each contender's rounds gave: one to warm up, and `rounds` more. Raises Died.

    Contenders are pickled. They are made ready one after the other, and end with this process at the latest.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(_Worker(name, x))) for name, x in contenders.items()]
        results: dict[str, list[T]] = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for worker in in_turn(workers, turn):
                results[worker.name].append(worker.round())
    return results


def in_turn(contenders: Sequence[T], turn: int) -> list[T]:
    return list(contenders if turn % 2 == 0 else reversed(contenders))


class _Worker:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, contender: Contender[Any]):
        self.name = name
        descriptor, self._said = tempfile.mkstemp(prefix="contender-")
        os.close(descriptor)
        processes = multiprocessing.get_context("spawn")                  # CUDA does not survive a fork
        self._pipe, its_end = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(its_end, contender, self._said), daemon=True)
        self._process.start()
        its_end.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def round(self) -> Any:
        with contextlib.suppress(BrokenPipeError):                        # the answer tells what it died of
            self._pipe.send("round")
        return self._answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()
        Path(self._said).unlink(missing_ok=True)

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            lines = Path(self._said).read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise Died(f"{self.name} ended with status {self._process.exitcode}. Its last lines:\n"
                       + "\n".join(f"  {line}" for line in lines or ["(none)"])) from error


def _serve(pipe: Any, contender: Contender[Any], said: str) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_round = contender()
    pipe.send("ready")
    while pipe.recv():
        pipe.send(one_round())


def _end_with_parent() -> None:
    """A round may take minutes, and a parent that is killed closes no process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
