"""The backend `slurm`: a cluster whose login node the command is typed on, and whose nodes see the same folders.

The plan becomes one batch script, kept in the run's folder, that starts a torchrun on each node. Before its time limit
or a preemption the training saves and the job goes back into the queue, as often as that happens. The job is known by
its name and folder, so that the same command, typed again, follows it. docs/slurm.md has the whole story.
"""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from cluster import local, run, squeue
from cluster.backends import Watch, Wish
from cluster.plan import Layout, Node, Plan
from cluster.run import Broken, Refused, Stopped
from cluster.sbatch import JOB, Login, node_command, script
from cluster.spec import LOCAL, Terms
from cluster.squeue import OVER, Seen, ask, complaint, words_of
from engine.cli import this_python
from engine.files import write_whole

SCRIPT = "slurm.sbatch"                           # in the run's folder: what was submitted
ASK_S = 5.0                                       # between questions to Slurm, whose controller serves a whole cluster
SUBMIT_S = 120.0                                  # for sbatch, which tries again by itself where Slurm is busy
ENDING_S = 120.0                                  # for a job that ends: longer than Slurm's usual KillWait of 30 s
LATE = 6                                          # questions until a folder that several machines share must agree
WHY = {"CANCELLED": "was cancelled, by scancel or an administrator", "NODE_FAIL": "lost a node",
       "TIMEOUT": "met its time limit before it had saved", "OUT_OF_MEMORY": "took more memory than it had asked for",
       "PREEMPTED": "had to make room for another"}


def survey(wish: Wish) -> Login:
    """Looks at this machine and for a job of this run."""
    here = Login(sys.executable, os.getcwd(), str(local.CHECKOUT), local.pythonpath())
    try:
        found = squeue.job_of(wish.name)
    except Refused as error:
        if not wish.dry:
            raise
        return replace(here, unasked=str(error))
    return replace(here, job=found and found[0])


def lay_out(wish: Wish, login: Login) -> Layout:
    """A rank on each GPU of a node, or one on its processors where the config asks for none."""
    machines, terms = wish.config.machines, wish.terms
    gpus = 0 if machines.kind == LOCAL and machines.gpus is None else machines.gpus_per_machine
    if gpus is None:
        raise ValueError(f"{machines.kind} is not in the table of cluster/spec.py. How many GPUs has a node?  "
                         f"--set machines.gpus=8")
    ranks, count = max(1, gpus), machines.count
    nodes = tuple(Node(i, f"node {i} of the job", ranks, {}, node_command(wish, login, ranks)) for i in range(count))
    where = f" of partition {terms.partition}" if terms.partition else ""
    return Layout(
        nodes,
        f"{count} node{'s' * (count > 1)}{where}, {'each with ' if count > 1 else ''}"
        + (f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "one rank on its processors"),
        "what the cluster charges",
        f"none: {terms.container_image or login.python} as it is",
        tuple(_notes(wish, login, gpus)), facts=login, script=script(wish, login, gpus))


def apply(plan: Plan, watch: Watch) -> SlurmJob:
    """Submit the plan's script, or follow the job that an earlier launch has submitted."""
    new = not plan.run_dir.exists()
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        with local.lock(plan.run_dir):
            job = _followed(plan, watch) or _submitted(plan, watch)
    except (Refused, Stopped):
        if new:                                   # as if never asked
            shutil.rmtree(plan.run_dir)
            with contextlib.suppress(OSError):    # other runs
                plan.run_dir.parent.rmdir()
        raise
    if plan.tensorboard:
        watch.say(f"TensorBoard, from another terminal:  {this_python()} launch_tensorboard.py --name={plan.name}")
    return SlurmJob(plan, job, watch)


class SlurmJob:
    """A job in the queue or at work (cluster.backends.Job)."""

    def __init__(self, plan: Plan, id: str, watch: Watch):
        self.plan, self.id, self._watch = plan, id, watch
        self._seen: Seen | None = None
        self._silent = False                      # whether Slurm did not answer when last asked
        self._ask_at, self._over = 0.0, 0         # when to ask next; how often it was over by Slurm's word alone
        self._asked: int | None = None            # the signal that stands for what the person here has asked for

    def poll(self) -> tuple[int, ...] | None:
        words = words_of(self.plan.run_dir / JOB)
        if words[:1] == [self.id] and len(words) == 2:
            return self._statuses(int(words[1]))
        if time.monotonic() < self._ask_at:
            return None
        try:
            seen = squeue.look(self.id)
            self._silent = False
        except OSError as error:                  # it may be restarted: the job does not mind
            if not self._silent:
                self._watch.say(f"{run.why(error)}. It is asked again until it answers; the job does not need that.")
            self._silent = True
            seen = None
        finally:
            self._ask_at = time.monotonic() + ASK_S
        return None if self._silent else self._judged(seen)

    def stop(self) -> None:
        self._asked = signal.SIGTERM
        (self.plan.run_dir / "stop").touch()
        self._leave_the_queue()

    def kill(self) -> None:
        self._asked = signal.SIGKILL
        self._ask_at = 0.0
        try:
            ask("scancel", self.id)
        except OSError as error:
            self._watch.say(f"{run.why(error)}. By hand:  scancel {self.id}")

    def close(self) -> None:
        (self.plan.run_dir / "stop").unlink(missing_ok=True)

    def machines(self) -> str:
        if self._silent:
            return "Slurm is silent"
        return "" if self._seen is None or self._seen.state == "RUNNING" else f"job {self.id} {self._seen.state}"

    def _judged(self, seen: Seen | None) -> tuple[int, ...] | None:
        """The nodes' statuses where this look at the job shows its end. Raises Broken where Slurm ended it."""
        self._tell(seen)
        if seen is not None and seen.state not in OVER:
            if seen.state == "PENDING" and self._asked is not None:
                self._leave_the_queue()           # it came back after it was asked to stop
            return None
        if self._asked is not None and (seen is None or seen.state == "CANCELLED"):
            return (-self._asked,) * len(self.plan.layout.nodes)
        if seen is None or seen.state in ("COMPLETED", "FAILED"):
            self._over += 1                       # what it wrote at its end may still be on its way here
            if self._over < LATE:
                return None
            if seen is not None:
                return self._statuses(seen.status)
        what = "is unknown to Slurm by now, and left no word of its end" if seen is None else \
            WHY.get(seen.state, f"ended as {seen.state} ({seen.reason})")
        newest = run.newest_checkpoint(self.plan.run_dir)
        kept = f"The last checkpoint is of step {newest['step']}." if newest else "There is no checkpoint yet."
        self.close()
        raise Broken(f"Job {self.id} {what}. {kept} Go on with:  {self.plan.command}")

    def _tell(self, seen: Seen | None) -> None:
        """Changes, on the screen."""
        before, self._seen = self._seen, seen
        if seen is None or (before and (before.state, before.reason, before.restarts)
                            == (seen.state, seen.reason, seen.restarts)):
            return
        if before and seen.restarts > before.restarts:
            self._watch.say(f"Job {self.id} is put back into the queue, and goes on from its newest checkpoint.")
        if seen.state == "PENDING":
            why = f": {seen.reason}" if seen.reason != "None" else ""
            when = f", by Slurm's estimate until {seen.start}" if seen.start[:1].isdigit() else ""
            self._watch.say(f"Job {self.id} waits in the queue{why}{when}. Without this program it waits too.")
        elif seen.state == "RUNNING":
            self._watch.say(f"Job {self.id} runs on {seen.nodes}" + (f", until {seen.end} at most"
                                                                    if seen.end[:1].isdigit() else ""))

    def _leave_the_queue(self) -> None:
        """End the job if it has not begun. One that begins just now finds the file `stop`."""
        with contextlib.suppress(OSError):        # asked again with the next look
            ask("scancel", "--state=PENDING", self.id)
            self._ask_at = 0.0

    def _statuses(self, status: int) -> tuple[int, ...]:
        """Of the nodes' torchruns. `status`: of srun. Raises Broken where it started none."""
        nodes, logs = self.plan.layout.nodes, self.plan.run_dir / "logs"
        if status == 0:
            return (0,) * len(nodes)
        words = [words_of(logs / f"node-{node.rank}.status") for node in nodes]
        found = [int(of_one[0]) if of_one else None for of_one in words]
        if all(one is None for one in found):
            said = (logs / "slurm.log").read_text(errors="replace") if (logs / "slurm.log").exists() else ""
            raise Broken("\n".join([f"Job {self.id} ended with status {status} before a node had done anything. The "
                                    f"end of {logs}/slurm.log:", *(f"  {x}" for x in said.splitlines()[-5:]),
                                    f"Once it is mended, go on with:  {self.plan.command}"]))
        # A node without a status was ended for another's failure; the shell gives a signal's number 128 more.
        return tuple(-signal.SIGTERM if one is None else 128 - one if one > 128 else one for one in found)


def _notes(wish: Wish, login: Login, gpus: int) -> Iterator[str]:
    terms, machines = wish.terms, wish.config.machines
    if login.unasked:
        yield f"Slurm was not asked. {login.unasked}"
    if login.job:
        yield f"job {login.job} of this run is in the queue or running: it is followed"
    if machines.kind == LOCAL and not gpus:
        yield "the config asks for no GPUs; N of each node:  --set machines.gpus=N"
    elif machines.kind != LOCAL and machines.gpus is None:
        yield f"{gpus} GPUs a node, as a {machines.kind} has; where the cluster's have N:  --set machines.gpus=N"
    if terms.time is None:
        yield "without --time the partition's default limit holds, after which the job queues again"
    idle = terms.given("yes", "detach", "skip_setup", *Terms.ONLY_FOR["slurm",])
    if idle:
        yield f"without effect on Slurm: {', '.join(idle)}"


def _followed(plan: Plan, watch: Watch) -> str | None:
    """The id of the job that this run has already. One about to end or to queue again is waited for."""
    began = time.monotonic()
    while (found := squeue.job_of(plan.name)) and found[1] == "COMPLETING":
        if watch.interrupted():
            raise Stopped("Nothing was started.")
        if (waited := time.monotonic() - began) > ENDING_S:
            raise Refused(f"Job {found[0]} of this run has been ending for {waited:.0f} s, on a node that hangs? "
                          f"It might still write to {plan.run_dir}. Once it is gone, the same command. To see "
                          f"it:  scontrol show job {found[0]}")
        if waited < ASK_S:
            watch.say(f"Job {found[0]} of this run is just ending: waiting for that.")
        time.sleep(ASK_S)
    if found and not ((path := plan.run_dir / SCRIPT).exists() and path.read_text() == plan.layout.script):
        raise Refused(f"Job {found[0]} of this run was submitted with other flags: see {path}, and {plan.run_dir}/"
                      f"command.txt for the command.\nFollow it with those, or end it:  scancel {found[0]}")
    return found and found[0]


def _submitted(plan: Plan, watch: Watch) -> str:
    """The new job's id. Raises Refused with Slurm's own words."""
    assert plan.layout.script is not None
    if watch.interrupted():
        raise Stopped("Nothing was started.")
    run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, local.CHECKOUT)
    write_whole(plan.run_dir / SCRIPT, plan.layout.script)
    try:
        done = ask("sbatch", "--parsable", str(plan.run_dir / SCRIPT), timeout_s=SUBMIT_S,
                   env=_undisputed(plan.layout.script))
    except TimeoutError as error:
        raise Broken(f"{error}. If the job came through all the same, this follows it:  {plan.command}") from error
    if done.returncode:
        raise Refused(f"Slurm does not take the job: {complaint(done.stderr)}")
    job = done.stdout.strip().partition(";")[0]                   # ID, or ID;CLUSTER
    with open(plan.run_dir / "logs" / "slurm.log", "a") as log:
        log.write(f"{run.LAUNCHED} {time.strftime('%Y-%m-%d %H:%M:%S %z')}: job {job}\n")
    watch.say(f"Submitted as job {job}.")
    return job


def _undisputed(script: str) -> dict[str, str]:
    """This environment without what would have sbatch do other than the script says, SBATCH_TIMELIMIT for --time."""
    said = {f"SBATCH_{option.upper().replace('-', '_')}" for option in re.findall(r"(?m)^#SBATCH --([\w-]+)", script)}
    said |= {"SBATCH_TIMELIMIT"} if "SBATCH_TIME" in said else set()
    return {name: value for name, value in os.environ.items() if name not in said}
