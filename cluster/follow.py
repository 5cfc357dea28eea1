"""Following a run from its folder: rank 0's log on the screen, Ctrl-C, and at the end what became of it."""
from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

from cluster import run
from cluster.backends import LOST, Job
from cluster.plan import Plan
from engine.config import MISSED

FINISHED, FAILED, STOPPED = 0, 1, 130             # exit statuses of the launcher, and MISSED; 2 is a launch refused
POLL_S = 0.1
TAIL = 20                                         # lines of a log shown after a failure
FOLLOWED = "rank-0.log"
PROGRESS = "step "                                # how the trainer's lines of progress begin
# torchrun's report in a node's log: which of its ranks failed first, and how.
ROOT_CAUSE = re.compile(r"Root Cause.*?time\s*: (\S+).*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)


class Follower:
    """Entered before the plan is carried out, so that no line is missed and no Ctrl-C leaves a training unattended."""

    def __init__(self, plan: Plan, screen: TextIO | None = None):
        self.plan, self.screen = plan, Screen(screen or sys.stdout)
        self._interrupts = 0

    def __enter__(self) -> Follower:
        self._began = time.time()
        self._log = Tail(self.plan.run_dir / "logs" / FOLLOWED)
        self._handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def say(self, text: str) -> None:
        self.screen.say(text)

    def interrupted(self) -> bool:
        return self._interrupts > 0

    def follow(self, job: Job) -> int:
        """Shows the log until the run has ended. The exit status for the shell: 0 finished, 1 failed, 3 finished and
        missed a target, 130 stopped."""
        try:
            statuses = self._until_the_end(job)
        except OSError as error:
            job.kill()
            raise run.Broken(f"{run.why(error)}. The training is killed.\n{run.MEND}") from error
        return self._conclude(statuses)

    def _until_the_end(self, job: Job) -> tuple[int, ...]:
        heard = 0
        while (statuses := job.poll()) is None:
            self.screen.show(self._log.lines(), job.machines())
            asked = self._interrupts              # those from before the job began too
            if asked and not heard:
                self._stop(job)
            if asked > 1 and heard < 2:
                self.screen.say("Killing.")
                job.kill()
            heard = asked
            time.sleep(POLL_S)
        self.screen.show(self._log.lines())
        job.close()
        return statuses

    def _stop(self, job: Job) -> None:
        try:
            job.stop()
            self.screen.say("Stopping at the next step, with a checkpoint. Ctrl-C again kills.")
        except OSError as error:                  # a disk that takes no file takes no checkpoint either
            self.screen.say(f"It cannot be asked to stop: {run.why(error)}. Ctrl-C again kills.")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1

    def _conclude(self, statuses: tuple[int, ...]) -> int:
        run_dir, status = self.plan.run_dir, run.read_status(self.plan.run_dir)
        go_on = f"Go on with:  {self.plan.command}"
        if not any(statuses) and status.get("state") == "finished":
            self.screen.say(f"Finished at step {status['step']}: {status['message']}. Everything is in {run_dir}")
            return MISSED if run.missed(self.plan.config.recipe, status) else FINISHED
        if not any(statuses) and status.get("state") == "stopped":
            self.screen.say(f"Stopped at step {status['step']} of {self.plan.steps}. {go_on}")
            return STOPPED
        newest = run.newest_checkpoint(run_dir) or run.newest_elsewhere(run_dir)
        kept = f"The last checkpoint is of step {newest['step']}." if newest else "There is no checkpoint yet."
        if self._interrupts:
            self.screen.say(f"{'Killed' if self._interrupts > 1 else 'Ended'}. {kept} {go_on}")
            return STOPPED
        self.screen.say(failure(run_dir, len(statuses), statuses, self._began))
        if message := unlogged(run_dir, self._began):
            self.screen.say(message)
        self.screen.say(f"{kept} Once it is mended, {go_on[0].lower()}{go_on[1:]}")
        return FAILED


def failure(run_dir: Path, nodes: int, statuses: tuple[int, ...], since: float) -> str:
    """What failed first, the end of its log, and where the logs are. `since`: when the launch began, in Unix time."""
    if lost := [f"node {i}" for i, status in enumerate(statuses) if status == LOST]:
        return f"Lost: {', '.join(lost)}, and the training with it. All logs: {run_dir}/logs/"
    logs = {i: _this_launch(run_dir / "logs" / f"node-{i}.log") for i in range(nodes)}
    # Of failures within a second (torchrun's clock) a rank that a signal ended is the cause, and errors are echoes.
    causes = sorted((time_, int(exit_) >= 0, int(rank), int(exit_), i)
                    for i, text in logs.items() for time_, rank, exit_ in ROOT_CAUSE.findall(text))
    if not causes:
        # A node that was told to end because another had failed ends with a status too, and says SIGTERM.
        node = min(logs, key=lambda i: (not statuses[i], statuses[i] == -signal.SIGTERM or "SIGTERM" in logs[i], i))
        shown, text = run_dir / "logs" / f"node-{node}.log", logs[node]
        what = f"Node {node} failed: it {_ended(statuses[node])}."
    else:
        _, _, rank, exit_status, node = causes[0]
        what = f"Rank {rank} failed first: it {_ended(exit_status)}."
        shown = run_dir / "logs" / f"rank-{rank}.log"
        if exit_status < 0 or not shown.exists() or shown.stat().st_mtime < since:
            shown, text = run_dir / "logs" / f"node-{node}.log", _without_torchrun(logs[node])
        else:
            text = shown.read_text(errors="replace")
    lines = [f"  {line}" for line in text.rstrip().splitlines() if not line.startswith(PROGRESS)][-TAIL:]
    if shown.name == FOLLOWED or not lines:
        return f"{what} See {shown}, and {run_dir}/logs/ for the others."
    return "\n".join([what, f"The end of {shown}:", *lines, f"All logs: {run_dir}/logs/"])


def unlogged(run_dir: Path, since: float) -> str | None:
    """What the training said of its failure in status.json alone: a full disk may take that and no line of a log."""
    log, path = run_dir / "logs" / FOLLOWED, run_dir / "status.json"
    status = run.read_status(run_dir)
    if status.get("state") != "failed" or path.stat().st_mtime < since:
        return None
    return None if log.exists() and status["message"] in log.read_text(errors="replace") else status["message"]


class Tail:
    """The whole lines that a file gains from now on; it need not exist yet."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[:text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


class Screen:
    """Lines on a terminal, where a line of progress takes the place of the one before; elsewhere plain lines."""

    def __init__(self, out: TextIO):
        self._out, self._in_place = out, out.isatty()
        self._machines = self._last = ""
        self._progress = False                    # whether the cursor stands behind a line of progress

    def show(self, lines: list[str], machines: str = "") -> None:
        """`machines`: how they are, told on the line of progress where there is one."""
        if self._progress and machines != self._machines and not lines:
            lines = [self._last]
        self._machines = machines
        for line in lines:
            if self._in_place and line.startswith(PROGRESS):
                text = f"{machines} | {line}" if machines else line
                self._write(f"\r\x1b[2K{text[:shutil.get_terminal_size().columns - 1]}")
                self._progress, self._last = True, line
            else:
                self.say(line)

    def say(self, text: str) -> None:
        self._write(f"{os.linesep if self._progress else ''}{text}\n")
        self._progress = False

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:                           # `| tee log`, which Ctrl-C ends first, a closed terminal: it goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


def _this_launch(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return text[max(text.rfind(run.LAUNCHED), 0):]


def _without_torchrun(text: str) -> str:
    """A node's log up to where torchrun begins to report, if anything stands before."""
    lines = text.splitlines()[1:]
    own = [i for i, line in enumerate(lines) if re.match(r"[EW]\d{4} .*torch/distributed/elastic", line)]
    return "\n".join(lines[:own[0]] if own and own[0] else lines)


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was ended by {name}" + (", which the system sends when memory runs out" if name == "SIGKILL" else "")
