"""A run on machines reached by SSH, followed by fetching its folder: breaking that off harms nothing."""
from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import reach
from cluster.backends import Watch
from cluster.ssh import Shell, Trouble, each

FETCH_S, FETCH_OTHERS_S = 1.0, 5.0                # between two looks at node 0, whose log is shown, and at the others
MODELS_S = 1800                                   # between two fetches of checkpoints while it trains
SILENT_S = 20                                     # without a machine's answer, until the cloud is asked about it
GRACE_S = 15                                      # between a node's failure and ending the others
LOST = 255                                        # the exit status of a node whose machine is gone


class RemoteJob:
    """A run whose supervisors work on machines (cluster.backends.Job).

    `gone`: asked with nodes that have been silent; says of each that is no more, why. `bye`: called once at the end.
    """

    def __init__(self, run_dir: Path, shells: Sequence[Shell], launch: str, watch: Watch,
                 gone: Callable[[list[int]], dict[int, str]] = lambda nodes: {},
                 bye: Callable[[], None] = lambda: None):
        self.run_dir, self.shells, self.launch, self._watch = run_dir, shells, launch, watch
        self._remote = f"txl/{run_dir.as_posix()}"
        self._gone, self._bye = gone, bye
        self._lost: dict[int, str] = {}
        self._heard = dict.fromkeys(range(len(shells)), time.monotonic())
        self._kill_at: float | None = None        # set when a node failed: when the others are ended
        self._told: set[int] = set()
        self._over = threading.Event()
        self._fetching = threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._follow, self._fetch_models)]
        for thread in self._threads:
            thread.start()

    def poll(self) -> tuple[int, ...] | None:
        statuses = [LOST if i in self._lost else self._status(i) for i in range(len(self.shells))]
        for i, status in enumerate(statuses):
            if status is not None and i not in self._told:
                self._told.add(i)
                if status:
                    self._watch.say(f"node-{i}: " + self._lost.get(i, f"ended with status {status}"))
        ended = tuple(status for status in statuses if status is not None)
        if len(ended) == len(statuses):
            return ended
        if any(ended):                            # the others would wait for it
            now = time.monotonic()
            self._kill_at = self._kill_at or now + GRACE_S
            if now > self._kill_at:
                self._kill_at = now + GRACE_S
                self._end([i for i, status in enumerate(statuses) if status is None])
        return None

    def stop(self) -> None:
        try:
            self.shells[0].run(f"touch {self._remote}/stop")
        except Trouble as error:
            raise OSError(str(error)) from error

    def kill(self) -> None:
        self._end([i for i in range(len(self.shells)) if i not in self._lost and self._status(i) is None])

    def close(self) -> None:
        """Fetch what the training has left, checkpoints too; the machines stay on meanwhile."""
        self._over.set()
        here = [shell for i, shell in enumerate(self.shells) if i not in self._lost]
        if 0 not in self._lost:
            self._watch.say("Fetching the run's folder, with its newest checkpoints.")
            try:
                with reach.holding(here):
                    self._look(range(len(self.shells)))
                    reach.fetch(self.shells[0], self._remote, self.run_dir, models=True)
                self.shells[0].run(f"rm -f {self._remote}/stop")      # an unheard request to stop
            except Trouble as error:
                self._watch.say(f"Not all of it could be fetched: {error}. The same command again goes on with that.")
        self._bye()
        for shell in here:
            shell.close()

    def machines(self) -> str:
        now = time.monotonic()
        silent = [f"node-{i}" for i, heard in self._heard.items() if now - heard > SILENT_S / 4 and i not in self._told]
        return f"no answer from {', '.join(silent)}" if silent else f"{len(self.shells) - len(self._told)} up"

    def _status(self, node: int) -> int | None:
        said = read_node(self.run_dir / "nodes" / f"{node}.json")
        return said.get("status") if said.get("launch") == self.launch and said.get("state") == "ended" else None

    def _follow(self) -> None:
        others_at = 0.0
        while not self._over.wait(FETCH_S):
            now = time.monotonic()
            due = now >= others_at
            others_at = now + FETCH_OTHERS_S if due else others_at
            self._look(range(len(self.shells)) if due else [0])
            silent = [i for i, heard in self._heard.items() if now - heard > SILENT_S and i not in self._lost]
            if silent and due:
                with contextlib.suppress(Exception):              # no network: nothing is known, and nothing is lost
                    self._lost |= self._gone(silent)

    def _look(self, nodes: Sequence[int]) -> None:
        def look(i: int) -> None:
            with contextlib.suppress(Trouble):
                if i == 0:
                    with self._fetching:
                        reach.fetch(self.shells[0], self._remote, self.run_dir)
                else:                             # of the others only what node 0 has none of
                    self.shells[i].get(f"{self._remote}/", f"{self.run_dir}/", "--include=/logs/***",
                                       "--include=/nodes/", f"--include=/nodes/{i}.json", "--exclude=*", timeout_s=60)
                self._heard[i] = time.monotonic()
        each([i for i in nodes if i not in self._lost], look, name=lambda i: f"node-{i}")

    def _fetch_models(self) -> None:
        while not self._over.wait(MODELS_S):
            with contextlib.suppress(Trouble):
                reach.fetch(self.shells[0], self._remote, self.run_dir, models=True, interrupted=self._over.is_set)

    def _end(self, nodes: Sequence[int]) -> None:
        def end(i: int) -> None:
            with contextlib.suppress(Trouble):    # it may be gone; its watchdog is not
                self.shells[i].run(f"touch {self._remote}/nodes/{i}.kill")
        each(nodes, end, name=lambda i: f"node-{i}")


def board_port(run: str) -> int:
    """Where node 0 has a run's TensorBoard: of this run, as two may share a machine."""
    return 6006 + zlib.crc32(run.encode()) % 1000


def read_node(path: Path) -> dict[str, Any]:
    """What a supervisor says of its node; {} where it has said nothing."""
    try:
        said = json.loads(path.read_text())
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError):
        return {}
