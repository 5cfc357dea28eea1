"""A training on a Ray cluster as the launcher sees it: the job's state, its log, and what in that log is for us.

The log of the job's driver comes from the dashboard, and lines in it that begin with FRAME (host/ray_driver.py) say how
the run's files change. So the run's folder here is up to date wherever the cluster keeps its own, through any tunnel
that leads to the dashboard, and a launcher that comes later reads the same from the beginning.
"""
from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from cluster import run
from cluster.backends import LOST
from cluster.host.ray_driver import FRAME
from cluster.ray_api import Dashboard, NotFound, RayJob, Trouble
from engine.files import write_whole

ASK_S = 1                                         # between two questions for the job's state
LOST_S = 600                                      # of silence, after which nobody waits any longer
WORRY_S = 15                                      # of silence, after which it is said
# What a cluster may write to here: nothing that the launcher itself goes by but status.json.
OURS = re.compile(r"logs/rank-\d+\.log|metrics\.jsonl|(?:machine|lr_finder|status)\.json"
                  r"|checkpoints/step-\d+/meta\.json|tensorboard/[\w.-]+")

COLOURS = re.compile(rb"\x1b\[[\d;]*m")


# How Ray begins a line that another process has printed; the address where that is not on the driver's machine.
PRINTED_BY = re.compile(rb"\(\w+ pid=(\d+)(?:, ip=([^)]+))?\)")


class Feed:
    """Takes the bytes of the job's log: what a machine's ranks print goes to its logs/node-I.log, what the driver and
    Ray's own processes do to node 0's, frames to the run's files."""

    def __init__(self, run_dir: Path, headline: str, say: Callable[[str], object]):
        self.begun, self.refused, self.ended = False, "", None
        self._run_dir, self._say = run_dir, say
        self._rest, self._blank = b"", False
        # Where byte 0 of a file of some disk is here: a cluster that has lost its disk begins its files anew.
        self._bases: dict[str, int] = run.read_json(run_dir / "ray.json").get("bases", {})
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._headline = f"{run.LAUNCHED} {time.strftime('%Y-%m-%d %H:%M:%S %z')}: {headline}\n".encode()
        self._logs: dict[int, BinaryIO] = {}      # by node
        self._nodes: dict[tuple[bytes, bytes], int] = {}     # of the ranks, by process and address
        self._driver = b""                        # the address of its machine
        self._log(0)

    def add(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(FRAME.encode()):
                self._blank = False               # the newline before it was the frame's
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):    # a program's own words
                    self._take(json.loads(line[len(FRAME):]))
                continue
            line = COLOURS.sub(b"", line)
            printed = PRINTED_BY.match(line)
            node = self._nodes.get((printed[1], printed[2] or self._driver), 0) if printed else 0
            self._log(node).write(b"\n" * self._blank + (line + b"\n" if line else b""))
            self._blank = not line

    def _log(self, node: int) -> BinaryIO:
        if node not in self._logs:
            self._logs[node] = (self._run_dir / "logs" / f"node-{node}.log").open("ab", buffering=0)
            self._logs[node].write(self._headline)
        return self._logs[node]

    def _take(self, frame: dict[str, Any]) -> None:
        if "file" in frame:
            self._file(frame)
        if "kept" in frame:
            self._prune(set(frame["kept"]))
        if "node" in frame:
            self._nodes[str(frame["pid"]).encode(), frame["ip"].encode()] = int(frame["node"])
            self._log(int(frame["node"]))
        if "begun" in frame:
            self.begun, self._driver = True, frame["begun"].encode()
        self.refused = frame.get("refused", self.refused)
        self.ended = frame.get("ended", self.ended)
        if word := frame.get("word") or (frame.get("refused") if self.begun else None):
            self._say(word)

    def _file(self, frame: dict[str, Any]) -> None:
        name = frame["file"]
        if not OURS.fullmatch(name):
            return
        path = self._run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "whole" in frame:
            write_whole(path, base64.b64decode(frame["whole"]).decode())
            return
        at, data, key = int(frame["at"]), base64.b64decode(frame["data"]), f"{name} {frame['disk']}"
        with open(path, "r+b" if path.exists() else "w+b") as file:
            if key not in self._bases:
                self._bases[key] = _base(name, file.read(), data)
                about = self._run_dir / "ray.json"
                write_whole(about, json.dumps(run.read_json(about) | {"bases": self._bases}))
            if at == 0 and not name.endswith(".log"):
                file.truncate(self._bases[key])   # the rest follows
            file.seek(self._bases[key] + at)
            file.write(data)

    def _prune(self, kept: set[str]) -> None:
        """What is known here of checkpoints that the cluster does not have any more; never a checkpoint itself."""
        for about in (self._run_dir / "checkpoints").glob("step-*/meta.json"):
            if about.parent.name not in kept and list(about.parent.iterdir()) == [about]:
                shutil.rmtree(about.parent, ignore_errors=True)


def _base(name: str, here: bytes, data: bytes) -> int:
    """Where a file that begins with `data` goes on in what is `here`, of another disk."""
    if name.startswith("tensorboard/"):
        return 0
    if name != "metrics.jsonl":
        return len(here)
    at, first = 0, json.loads(data.split(b"\n")[0])["step"]
    for line in here.splitlines(keepends=True):
        if json.loads(line)["step"] >= first:     # what was not in the checkpoint that it went on from
            break
        at += len(line)
    return at


class RayTraining:
    """A plan being carried out by Ray (cluster.backends.Job). `stopper` asks it to save and stop, `killer` ends it now,
    `closer` gives back what outlives it; `there` tells whether the cluster can still exist."""

    def __init__(self, run_dir: Path, dashboard: Dashboard, id: str, feed: Feed, *, stopper: Callable[[], None],
                 killer: Callable[[], None], closer: Callable[[], None] = lambda: None,
                 there: Callable[[], bool] = lambda: True):
        self.id, self.feed = id, feed
        self.stop, self.kill, self.close = stopper, killer, closer
        self._run_dir, self._dashboard, self._there = run_dir, dashboard, there
        self._job: RayJob | None = None
        self._heard, self._unknown = time.monotonic(), False
        self._lock, self._read, self._drained = threading.Lock(), 0, False
        for loop in (self._watch, self._follow):
            threading.Thread(target=loop, daemon=True).start()

    def poll(self) -> tuple[int, ...] | None:
        job = self._job
        if job is None or not job.ended:
            if not self._there():
                return (self._by_the_folder(),)
            return (LOST,) if self._unknown or time.monotonic() - self._heard > LOST_S else None
        if not self._drained:
            if job.node is not None:
                with contextlib.suppress(Trouble):
                    self._pieces(job, follow=False)
            with self._lock:
                self._drained = True
            if job.node is None:                  # it ended before its driver ran: Ray says why
                self.feed.refused = self.feed.refused or job.message
        return (self._status(job),)

    def machines(self) -> str:
        silence = time.monotonic() - self._heard
        return f"dashboard silent for {silence:.0f} s" if silence > WORRY_S else ""

    @property
    def pending(self) -> str:
        """What Ray says while the job has not begun."""
        return self._job.message if self._job else ""

    def _status(self, job: RayJob) -> int:
        if self.feed.ended is not None:
            return self.feed.ended
        if job.state == "STOPPED":
            return -signal.SIGTERM
        return 0 if job.state == "SUCCEEDED" else job.exit_status or 1

    def _by_the_folder(self) -> int:
        """Another launcher has ended the cluster: after the training, or with it."""
        return 0 if run.read_status(self._run_dir).get("state") in ("finished", "stopped") else -signal.SIGKILL

    def _watch(self) -> None:
        while self._job is None or not self._job.ended:
            try:
                self._job = self._dashboard.job(self.id)
                self._heard = time.monotonic()
            except NotFound:                      # another cluster has taken this one's place
                self._unknown = True
                return
            except Trouble:                       # silent, or a proxy's words: poll() waits for so long
                pass
            time.sleep(ASK_S)

    def _follow(self) -> None:
        while not self._drained:
            job = self._job
            if job is not None and job.node is not None:
                with contextlib.suppress(Trouble):
                    self._pieces(job, follow=True)
            time.sleep(ASK_S / 2)

    def _pieces(self, job: RayJob, follow: bool) -> None:
        """Reads the log from its beginning, and passes on what is new."""
        at = 0
        for piece in self._dashboard.log(job, follow):
            with self._lock:
                if self._drained:
                    return
                if new := piece[max(0, self._read - at):]:
                    self.feed.add(new)
                    self._read += len(new)
            at += len(piece)
