"""~/.txl on the laptop: for each cluster what was intended and what came of it, and one launcher at a time.

An intent is on disk before its call is made, so a launcher that is killed between the two leaves a trace to follow.
The cloud's tags are the truth about what exists; this tells what may be about to.
"""
from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.run import Refused


def home() -> Path:
    """TXL_HOME, else ~/.txl; made for this user alone."""
    path = Path(os.environ.get("TXL_HOME") or Path.home() / ".txl")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def owner_name() -> str:
    """Whose machines are ours: the user's name here, in letters that a tag and a group's name take."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", getpass.getuser())[:32] or "someone"


class Journal:
    """The notes of one cluster, oldest first."""

    def __init__(self, cluster: str):
        self.cluster = cluster
        self.folder = home() / "clusters" / cluster
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self.folder / "journal.jsonl"

    def note(self, what: str, **facts: Any) -> None:
        """Write one line, on disk when this returns."""
        with open(self._path, "ab+") as file:
            cut_off = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * cut_off + json.dumps({"what": what, "at": time.time(), **facts}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def notes(self, what: str) -> list[dict[str, Any]]:
        """All notes of one sort. A line cut off by a full disk or a crash is passed over."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    note = json.loads(line)
                    if isinstance(note, dict) and note.get("what") == what:
                        found.append(note)
        return found

    def unanswered(self) -> list[dict[str, Any]]:
        """Launches asked for, of which nobody noted the answer."""
        answered = {note["token"] for note in self.notes("answer")}
        return [note for note in self.notes("intent") if note["token"] not in answered]

    def machines(self) -> dict[str, float]:
        """Those launched and not known to be gone, by id, and when they were launched."""
        gone = {i for note in self.notes("gone") for i in note["ids"]}
        return {i: note["at"] for note in self.notes("launched") for i in note["ids"] if i not in gone}

    def spent(self, now: float) -> float:
        """Dollars that this cluster's machines have cost at most. What nobody saw go counts up to its own deadline."""
        gone: dict[str, float] = {}
        for note in self.notes("gone"):
            gone = dict.fromkeys(note["ids"], note["at"]) | gone              # the first who noticed
        until = {i: note["until"] for note in self.notes("seen") for i in note["ids"]}      # as it was seen last
        total = 0.0
        for launch in self.notes("launched"):
            hourly = launch["usd_per_hour"] / len(launch["ids"])
            for i in launch["ids"]:
                end = min(gone.get(i, now), now, until.get(i) or launch["until"])
                total += hourly * max(0.0, end - launch["at"]) / 3600
        return total

    @contextlib.contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """For as long as no other process may change this cluster. Raises Refused where one does."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                who = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
                raise Refused(f"{self.cluster} is being worked on: {who}. Wait for it, or end it") from error
            os.truncate(lock, 0)
            os.pwrite(lock, f"{doing} by process {os.getpid()} since {time.strftime('%H:%M:%S, %Y-%m-%d')}".encode(), 0)
            yield
        finally:
            os.close(lock)
