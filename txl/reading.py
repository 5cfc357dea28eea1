"""Texts of words, read once and in ranges (txl/words.py), by as many processes as there are cores where they are long.

One is this; the others are plain ones, of a module that loads in a tenth of a second: a fork of a process with threads
(torch, Ray) may hang, and multiprocessing's spawn would run the main module, with torch, in each of them.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, cast

from txl import words
from txl.datasets import DataError
from txl.words import Problem, Range

RANGE = 64 << 20                                  # bytes: a process remembers the words of so much text, and no more
SMALL = 8 << 20                                   # less is read sooner than processes start
MOST = 16                                         # processes: what is left to one would keep more waiting
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from txl.words import serve; serve()"


def read(paths: Iterable[Path], folder: Path, lower_case: bool) -> Iterator[Range]:
    """The ranges of texts in their order, each once it has been read into `folder`; not again if that is so already.

    Raises DataError and OSError.
    """
    parts = list(chain.from_iterable(_ranges(path, folder) for path in paths))
    if all(part.words_file.exists() for part in parts):
        yield from parts
        return
    count = min(_cores(), len(parts)) if sum(part.stop - part.start for part in parts) > SMALL else 1
    problems = (_by_processes(parts, lower_case, count) if count > 1
                else (words.attempt(part, lower_case) for part in parts))
    with closing(problems):                       # the processes write into the folder, which may go once this ends
        for part, problem in zip(parts, problems):
            if problem == "not UTF-8":
                raise DataError(not_utf8(part.path))
            if problem is not None:
                raise OSError(*problem)
            yield part


def not_utf8(path: Path) -> str:
    """What to tell the user, with the place."""
    start = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (f"{path} is not UTF-8 at byte {start + error.start} (line {number}). Convert it with iconv, or "
                        f"take its bytes as they are: --set recipe.data.vocab=byte")
            start += len(line)
    return f"{path} changed while it was read. Run the same command again"


def _ranges(path: Path, folder: Path) -> list[Range]:
    """A function of the text's size and the cores, so that a second time they are the same."""
    size, cores = path.stat().st_size, _cores()
    step = -(-size // (cores * -(-size // (cores * RANGE)))) if size > SMALL else SMALL
    name = f"{path.stat().st_ino}-{path.name}"
    with open(path, "rb") as text:
        return [Range(path, start, stop, str(folder / f"{name}-{start}"))
                for start, stop in pairwise([0, *words.edges(text, 0, size, step)]) if stop > start]


def _by_processes(parts: Sequence[Range], lower_case: bool, count: int) -> Generator[Problem, None, None]:
    """The problem of each range, if any. The i-th of `count` processes reads the ranges i, i + count, …; this is the
    first, and reads its own when they are asked for."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for i in range(1, count):
            # of a session of its own, so that Ctrl-C is for this process, which ends the others
            process = subprocess.Popen([sys.executable, "-c", PROGRAM, *sys.path], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True, start_new_session=True,
                                       env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
            processes.append(process)
            with suppress(BrokenPipeError), cast(IO[str], process.stdin) as stdin:       # it may have ended already
                json.dump([lower_case, *((str(x.path), x.start, x.stop, x.stem) for x in parts[i::count])], stdin)
        for i, part in enumerate(parts):
            if i % count == 0:
                yield words.attempt(part, lower_case)
                continue
            process = processes[i % count - 1]
            line = cast(IO[str], process.stdout).readline()
            if not line:
                raise DataError(f"A process that read {part.path} ended with status {process.wait()}, as it does when "
                                f"the machine has no memory left. Run the same command again")
            yield json.loads(line)
    finally:
        for process in processes:
            with process:                         # waits for it and closes its pipes
                process.kill()


def _cores() -> int:
    """Those that this process may use, and not more than are of use."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
