"""A run on machines reached by SSH, followed by fetching its folder: breaking that off harms nothing."""
from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster import reach, ssh
from cluster.backends import LOST, Watch
from cluster.follow import Tail
from cluster.local import free_port
from cluster.run import Broken, read_json
from cluster.ssh import Interrupted, Shell, SomeFailed, Trouble, each

FETCH_S, FETCH_OTHERS_S = 1.0, 5.0                # between two looks at node 0, whose log is shown, and at the others
MODELS_S = 1800                                   # between two fetches of checkpoints while it trains
SILENT_S = 20                                     # without a sign of a machine or its supervisor, until one asks why
ASK_S = 5                                         # between two askings, and two tries at a tunnel
GRACE_S = 15                                      # between a node's failure and ending the others
END_S = 15                                        # for a machine to be told to end
SAYS = "bucket: "                                 # host/bucket.py: how its lines begin that are for a person


class RemoteJob:
    """A run whose supervisors work on machines (cluster.backends.Job).

    `gone`: asked with nodes that have been silent; says of each that is no more, why. `bye`: called once at the end.
    `pages`: by name, ports of node 0's loopback that are to be seen here.
    """

    def __init__(self, run_dir: Path, shells: Sequence[Shell], launch: str, watch: Watch,
                 gone: Callable[[list[int]], dict[int, str]] = lambda nodes: {},
                 bye: Callable[[], None] = lambda: None, *, pages: Mapping[str, int] | None = None):
        self.run_dir, self.launch, self._watch = run_dir, launch, watch
        self.shells = [replace(shell, by=None) for shell in shells]   # a node that is lost leads to no other
        self._remote = f"txl/{run_dir.as_posix()}"
        self._gone, self._bye = gone, bye
        self._nodes, now = range(len(shells)), time.monotonic()
        self._lost: dict[int, str] = {}
        self._heard, self._beaten = dict.fromkeys(self._nodes, now), dict.fromkeys(self._nodes, now)
        self._beats: dict[int, int] = {}
        self._why: dict[int, Trouble] = {}        # what the last look at a node met with
        self._silent: set[int] = set()            # nodes whose silence was told
        self._kill_at: float | None = None        # set when a node failed: when the others are ended
        self._told: set[int] = set()
        self._ended: set[int] = set()             # nodes that were told to end
        self._of_bucket = [Tail(run_dir / "logs" / f"bucket-{i}.log") for i in range(len(shells))]
        self._over = threading.Event()
        works: list[Callable[[], None]] = [
            *(partial(self._follow, i) for i in self._nodes), self._ask, self._fetch_models,
            *(partial(self._keep_tunnel, name, port) for name, port in (pages or {}).items())]
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def poll(self) -> tuple[int, ...] | None:
        self._tell_of_silence()
        self._tell_of_bucket()
        statuses = self._statuses()
        for i, status in enumerate(statuses):
            if status is not None and i not in self._told:
                self._told.add(i)
                if status:
                    self._watch.say(f"node-{i}: " + self._lost.get(
                        i, f"ended with status {status}" if i not in self._ended else "ended, as it was told to"))
        ended = tuple(status for status in statuses if status is not None)
        if len(ended) == len(statuses):
            return ended
        if any(ended):                            # the others would wait for it
            now = time.monotonic()
            self._kill_at = self._kill_at or now + GRACE_S
            if now > self._kill_at:
                self._kill_at = now + GRACE_S
                self._end()
        return None

    def stop(self) -> None:
        try:
            self.shells[0].run(f"touch {self._remote}/stop", timeout_s=END_S)
        except Trouble as error:
            raise OSError(str(error)) from error

    def kill(self) -> None:
        """What cannot be told is given up: whoever wants this wants it now."""
        for i, error in self._end().items():
            self._lost[i] = f"it could not be told to end, and may go on: {error.reason}"

    def close(self) -> None:
        """Fetch what the training has left, checkpoints too; the machines stay on meanwhile.

        Raises Broken where a training that ended well is not here as a whole.
        """
        self._over.set()
        for thread in self._threads:
            thread.join(END_S)
        here = [i for i in self._nodes if i not in self._lost]
        self._watch.say("Fetching the run's folder, with its newest checkpoints.")
        failed: Exception | None = None
        try:
            with reach.holding([self.shells[i] for i in here]):
                each(here, self._fetch_last, name=_name)
        except (Trouble, OSError) as error:
            failed = error
        self._tell_of_bucket()
        self._bye()
        for i in here:
            self.shells[i].close()
        if failed is not None:
            what = f"Not all of the run's folder could be fetched: {failed}\nThe same command again goes on with that."
            if not any(self._statuses()):
                raise Broken(f"The training has ended. {what}") from failed
            self._watch.say(what)

    def machines(self) -> str:
        now = time.monotonic()
        silent = [_name(i) for i, heard in self._heard.items() if now - heard > SILENT_S / 2 and i not in self._told]
        if not silent:
            return f"{len(self.shells) - len(self._told)} up"
        return f"no answer from {', '.join(silent) if len(silent) < 4 else f'{len(silent)} of {len(self.shells)}'}"

    def _statuses(self) -> list[int | None]:
        return [LOST if i in self._lost else self._status(i) for i in self._nodes]

    def _tell_of_bucket(self) -> None:
        for i, log in enumerate(self._of_bucket):
            for line in log.lines():
                if line.startswith(SAYS):
                    self._watch.say(f"node-{i}: {line}")

    def _status(self, node: int) -> int | None:
        said = self._said(node)
        if said.get("state") != "ended":
            return None
        return -signal.SIGTERM if node in self._ended and said["status"] == -signal.SIGKILL else said["status"]

    def _said(self, node: int) -> dict[str, Any]:
        said = read_json(self.run_dir / "nodes" / f"{node}.json")
        return said if said.get("launch") == self.launch else {}

    def _follow(self, node: int) -> None:
        while not self._over.wait(FETCH_OTHERS_S if node else FETCH_S) and node not in self._lost:
            try:
                self._look(node, self._over.is_set)
            except Interrupted:
                return
            except Trouble as error:
                self._why[node] = error
            except OSError as error:              # no room here, say: that may pass
                self._why[node] = Trouble("this machine", str(error))

    def _look(self, node: int, interrupted: Callable[[], bool] = ssh.never) -> None:
        if node == 0:                             # what the run has come to is believed once its models are here
            reach.fetch(self.shells[0], self._remote, self.run_dir, without=("status.json",), interrupted=interrupted)
        else:                                     # of the others only what node 0 has none of
            self.shells[node].get(f"{self._remote}/", f"{self.run_dir}/", "--include=/logs/***", "--include=/nodes/",
                                  f"--include=/nodes/{node}.json", "--exclude=*", timeout_s=60, interrupted=interrupted)
        self._heard[node] = time.monotonic()
        self._why.pop(node, None)
        beat = self._said(node).get("beat")
        if beat is not None and beat != self._beats.get(node):
            self._beats[node], self._beaten[node] = beat, time.monotonic()

    def _fetch_last(self, node: int) -> None:
        self._look(node)
        if node == 0:
            reach.fetch(self.shells[0], self._remote, self.run_dir, models=True, without=("status.json",))
            self.shells[0].get(f"{self._remote}/", f"{self.run_dir}/", "--include=/status.json", "--exclude=*")
            self.shells[0].run(f"rm -f {self._remote}/stop")          # an unheard request to stop

    def _ask(self) -> None:
        """After machines that have been silent, and after supervisors that no longer beat."""
        while not self._over.wait(ASK_S):
            now = time.monotonic()
            statuses = self._statuses()
            nodes = [i for i, status in enumerate(statuses) if status is None]
            patience_s = ASK_S if any(statuses) else SILENT_S     # where one has failed, another has likely gone
            if silent := [i for i in nodes if now - self._heard[i] > patience_s]:
                with contextlib.suppress(Exception):              # no network: nothing is known, and nothing is lost
                    self._lost |= self._gone(silent)
            for i in nodes:
                if i not in silent and now - self._beaten[i] > SILENT_S:
                    with contextlib.suppress(Trouble, OSError):
                        self._lost |= self._abandoned(i)

    def _abandoned(self, node: int) -> dict[int, str]:
        """Why nobody works for this launch there any more; {} where somebody does, or it has just ended."""
        lock = f"{self._remote}/nodes/{node}.lock"
        holder = self.shells[node].run(f"flock -n {lock} true || cat {lock}").out.strip()
        if holder == self.launch:
            return {}
        self._look(node)                          # a supervisor tells of the end before it lets go
        if self._status(node) is not None:
            return {}
        return {node: f"launch {holder} has taken its place" if holder else
                "nothing of it runs any more: the machine was started anew, or somebody killed it there"}

    def _tell_of_silence(self) -> None:
        now = time.monotonic()
        silent = {i: error for i, error in list(self._why.items())
                  if now - self._heard[i] > SILENT_S and i not in self._told}
        if new := {_name(i): error for i, error in silent.items() if i not in self._silent}:
            self._watch.say(f"Nothing for {SILENT_S} s from {SomeFailed(new, len(self.shells))}")
        if back := [_name(i) for i in sorted(self._silent - silent.keys() - self._told)]:
            self._watch.say(f"{', '.join(back)} answers again.")
        self._silent = set(silent)

    def _fetch_models(self) -> None:
        while not self._over.wait(MODELS_S):
            try:
                reach.fetch(self.shells[0], self._remote, self.run_dir, models=True, without=("status.json",),
                            interrupted=self._over.is_set)
            except Interrupted:
                return
            except (Trouble, OSError) as error:
                self._watch.say(f"The newest checkpoints could not be fetched: {error}")

    def _keep_tunnel(self, page: str, there: int) -> None:
        """A page of node 0's at one address here, for as long as this follows; opened again when it breaks."""
        port, first, told = free_port(), self.shells[0], False
        while not self._over.is_set():
            try:
                tunnel = ssh.forward(first.config, first.name, port, there)
            except Trouble as error:
                reason = error.reason
            else:
                self._watch.say(f"{page}: http://127.0.0.1:{port}")
                told = False
                while tunnel.poll() is None and not self._over.wait(ssh.POLL_S):
                    pass
                ssh.end(tunnel)
                reason = "the tunnel broke"
            if not told and not self._over.wait(ASK_S):
                self._watch.say(f"{page} is out of reach for now: {reason}")
            told = True

    def _end(self) -> dict[int, Trouble]:
        """Tell all that has not ended to; what of it cannot be told."""
        def end(i: int) -> Trouble | None:
            try:
                self._ended.add(i)
                self.shells[i].run(f"touch {self._remote}/nodes/{i}.kill", timeout_s=END_S)
                return None
            except Trouble as error:
                return error
        nodes = [i for i, status in enumerate(self._statuses()) if status is None]
        return {i: error for i, error in zip(nodes, each(nodes, end, name=_name)) if error}


def _name(node: int) -> str:
    return f"node-{node}"
