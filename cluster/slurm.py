"""The backend `slurm`: a cluster whose login node the command is typed on, and whose nodes see the same folders.

The plan becomes one batch script, kept in the run's folder, that starts a torchrun on each node. Before its time limit
or a preemption the training saves and the job goes back into the queue, as often as that happens. The job is known by
its name and folder, so that the same command, typed again, follows it. docs/slurm.md has the whole story.
"""
from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster import local, run
from cluster.backends import Watch, Wish
from cluster.plan import Layout, Node, Plan, torchrun
from cluster.run import Broken, Refused, Stopped
from cluster.spec import LOCAL, Config, Terms, slurm_minutes
from engine.files import write_whole

SCRIPT, JOB = "slurm.sbatch", "slurm.job"         # in the run's folder: what was submitted; job id, then its end
NOTICE_S = 300                                    # before the time limit: for a checkpoint, and to leave
ASK_S = 5.0                                       # between questions to Slurm, whose controller serves a whole cluster
ANSWER_S = 30.0                                   # for each
SUBMIT_S = 120.0                                  # for sbatch, which tries again by itself where Slurm is busy
LATE = 6                                          # questions until a folder that several machines share must agree
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT"}                     # states of a job that does not come back
WHY = {"CANCELLED": "was cancelled, by scancel or an administrator", "NODE_FAIL": "lost a node",
       "TIMEOUT": "met its time limit before it had saved", "OUT_OF_MEMORY": "took more memory than it had asked for",
       "PREEMPTED": "had to make room for another"}


@dataclass(frozen=True)
class Login:
    """What a script needs to know of where it is submitted."""
    python: str
    folder: str                                   # that the command is typed in
    checkout: str                                 # the code's
    pythonpath: str | None = None                 # where the code is, if not in that folder
    job: str | None = None                        # of this run, that is in the queue or running
    slurm: bool = True                            # False in a dry run elsewhere


@dataclass(frozen=True)
class Seen:
    """A job as Slurm has it."""
    state: str
    reason: str
    restarts: int
    nodes: str
    start: str
    end: str
    status: int                                   # of the batch script; negative: the signal that ended it


def survey(wish: Wish) -> Login:
    """Looks at this machine and for a job of this run."""
    slurm = shutil.which("sbatch") is not None
    if not slurm and not wish.dry:
        raise Refused("There is no sbatch on this machine. Type the command on a login node of the Slurm cluster, in a "
                      "folder that its nodes see too; --dry_run prints the script anywhere")
    return Login(sys.executable, os.getcwd(), str(local.CHECKOUT), local.pythonpath(),
                 _job_of(wish.name) if slurm else None, slurm)


def lay_out(wish: Wish, login: Login) -> Layout:
    """A rank on each GPU of a node, or one on its processors where the config asks for none."""
    machines, terms = wish.config.machines, wish.terms
    gpus = 0 if machines.kind == LOCAL and machines.gpus is None else machines.gpus_per_machine
    if gpus is None:
        raise ValueError(f"{machines.kind} is not in the table of cluster/spec.py. How many GPUs has a node?  "
                         f"--set machines.gpus=8")
    ranks, count = max(1, gpus), machines.count
    nodes = tuple(Node(i, f"node {i} of the job", ranks, {}, _torchrun(wish, login, ranks)) for i in range(count))
    where = f" of partition {terms.partition}" if terms.partition else ""
    return Layout(
        nodes,
        f"{count} node{'s' * (count > 1)}{where}, {'each with ' if count > 1 else ''}"
        + (f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "one rank on its processors"),
        "what the cluster charges" + (f" for {terms.time} at a time" if terms.time else ""),
        f"none: {terms.container_image or login.python} as it is",
        tuple(_notes(wish, login, gpus)), facts=login, script=script(wish, login, gpus))


def script(wish: Wish, login: Login, gpus: int) -> str:
    """What sbatch is given. Pure. A job's TERM asks to save and queue again, the file `stop` to save and end."""
    terms, name, count = wish.terms, wish.name, wish.config.machines.count
    options = [f"job-name={_job_name(name)}", f"chdir={shlex.quote(login.folder)}",
               f"nodes={count}", "ntasks-per-node=1",
               *([f"gpus-per-node={gpus}"] if gpus else []),
               *(["exclusive", "mem=0"] if _whole_nodes(wish.config, gpus) else []),
               *(f"{option}={shlex.quote(value)}" for option in ("partition", "account", "time")
                 if (value := getattr(terms, option))),
               f"output=runs/{name}/logs/slurm.log", "open-mode=append", "requeue",
               f"signal=B:TERM@{_notice_s(terms)}"]
    lines = [f"#SBATCH --{option}" for option in options] + [f"#SBATCH {option}" for option in terms.sbatch]
    env = {"OMP_NUM_THREADS": "1" if gpus else '"${SLURM_CPUS_ON_NODE:-1}"'}
    if login.pythonpath:
        env["PYTHONPATH"] = shlex.quote(login.pythonpath)
    srun = ["--kill-on-bad-exit=1", "--cpu-bind=none", f"--output=runs/{name}/logs/node-%n.log", "--open-mode=append"]
    if terms.container_image:
        own = dict.fromkeys([login.folder, login.checkout])
        mounts = ",".join([*(f"{folder}:{folder}" for folder in own), *filter(None, [terms.container_mounts])])
        srun += [f"--container-image={terms.container_image}", f"--container-mounts={mounts}",
                 f"--container-workdir={login.folder}"]
    words = [f'"{word}"' if word.endswith(OF_THE_JOB) else shlex.quote(word)
             for word in _torchrun(wish, login, max(1, gpus))]
    train = CONTINUED.join(" ".join(some) for some in (words[:3], words[3:-3], words[-3:]))
    node = NODE.format(launched=run.LAUNCHED, train=train, folder=f"runs/{name}")
    return BATCH.format(
        name=name, nodes="a node" if count == 1 else f"each of {count} nodes", options="\n".join(lines),
        env="\n".join(f"export {key}={value}" for key, value in env.items()),
        srun=CONTINUED.join(map(shlex.quote, srun)), node=shlex.quote(node), job=JOB)


CONTINUED = " \\\n    "
OF_THE_JOB = ("=$SLURM_NODEID", "=$first", "=$port")          # what only the job knows
# What srun starts on each node.
NODE = """
echo "{launched} $(date "+%F %T %z"): job $SLURM_JOB_ID on $SLURMD_NODENAME"
trap : TERM                                # is for torchrun; this shell stays for its status
{train}
status=$?
echo "$status" > "{folder}/logs/node-$SLURM_NODEID.status"
exit "$status"
"""
BATCH = r"""#!/bin/bash
# Run {name}: a torchrun on {nodes}. Made by launch.py; the same command makes and submits it again.
{options}

run=runs/{name}
{env}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))     # of this job, as another may have a part of the same node
export first port
echo "Job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), $(date "+%F %T %z")"
rm -f "$run"/logs/node-*.status
echo "$SLURM_JOB_ID" > "$run/{job}"           # a second word follows at the end

# TERM comes before the time limit, and before a preemption where the cluster says so. The file asks the training to
# save and end. Where somebody else has made it already, that is what they want, and the job does not go on later.
trap 'told=1; [[ -e $run/stop ]] || {{ later=1; touch "$run/stop"; }}' TERM
later=
srun {srun} \
    bash -c {node} &
while told=; wait $!; status=$?; [[ $told ]]; do :; done         # a signal ends the waiting, not what is waited for
rm -f "$run/stop"

state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
if [[ ${{state:-JobState=RUNNING}} != JobState=RUNNING ]]; then
    exit "$status"                         # Slurm ends the job: cancelled, or queued again by Slurm itself
fi
# Stopped by TERM, the shell's or, with a status other than 0, each process's own: the training is to go on.
if [[ $run/status.json -nt $run/{job} ]] && grep -q '"state": "stopped"' "$run/status.json" \
    && [[ $later || $status != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID" && exit
fi
echo "$SLURM_JOB_ID $status" > "$run/{job}"
exit "$status"
"""


def apply(plan: Plan, watch: Watch) -> SlurmJob:
    """Submit the plan's script, or follow the job that an earlier launch has submitted."""
    new = not plan.run_dir.exists()
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        with local.lock(plan.run_dir):
            job = _job_of(plan.name)
            if job is None:
                if watch.interrupted():
                    raise Stopped("Nothing was started.")
                job = _submit(plan)
                watch.say(f"Submitted as job {job}.")
            elif (plan.run_dir / SCRIPT).read_text() != plan.layout.script:
                raise Refused(f"Job {job} of this run was submitted with other flags: see {plan.run_dir / SCRIPT}, and "
                              f"{plan.run_dir}/command.txt for the command.\nFollow it with those, or end it:  "
                              f"scancel {job}")
    except BaseException:
        if new:                                   # as if never asked
            shutil.rmtree(plan.run_dir, ignore_errors=True)
            with contextlib.suppress(OSError):
                plan.run_dir.parent.rmdir()
        raise
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
        words = _words(self.plan.run_dir / JOB)
        if words[:1] == [self.id] and len(words) == 2:
            return self._statuses(int(words[1]))
        if time.monotonic() < self._ask_at:
            return None
        try:
            seen = _look(self.id)
            self._silent = False
        except TimeoutError as error:             # it may be restarted: the job does not mind
            if not self._silent:
                self._watch.say(f"{error}. It is asked again until it answers; the job does not need it.")
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
            _ask("scancel", self.id)
        except TimeoutError as error:
            self._watch.say(f"{error}. By hand:  scancel {self.id}")

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
        with contextlib.suppress(TimeoutError):
            _ask("scancel", "--state=PENDING", self.id)
            self._ask_at = 0.0

    def _statuses(self, status: int) -> tuple[int, ...]:
        """Of the nodes' torchruns. `status`: of srun. Raises Broken where it started none."""
        nodes, logs = self.plan.layout.nodes, self.plan.run_dir / "logs"
        if status == 0:
            return (0,) * len(nodes)
        found = [int(words[0]) if (words := _words(logs / f"node-{node.rank}.status")) else None for node in nodes]
        if all(one is None for one in found):
            said = (logs / "slurm.log").read_text(errors="replace") if (logs / "slurm.log").exists() else ""
            raise Broken("\n".join([f"Job {self.id} ended with status {status} before a node had done anything. The "
                                    f"end of {logs}/slurm.log:", *(f"  {x}" for x in said.splitlines()[-5:]),
                                    f"Once it is mended, go on with:  {self.plan.command}"]))
        # A node without a status was ended for another's failure; the shell gives a signal's number 128 more.
        return tuple(-signal.SIGTERM if one is None else 128 - one if one > 128 else one for one in found)


def _whole_nodes(config: Config, gpus: int) -> bool:
    """Whether nobody else should be on the nodes: not where one machine's GPUs are counted out."""
    return gpus > 0 and (config.machines.gpus is None or config.machines.count > 1)


def _notice_s(terms: Terms) -> int:
    """How long before the time limit the training is told."""
    return NOTICE_S if terms.time is None else min(NOTICE_S, slurm_minutes(terms.time) * 60 // 4)


def _torchrun(wish: Wish, login: Login, ranks: int) -> tuple[str, ...]:
    python = "python" if wish.terms.container_image else login.python
    return torchrun(python, wish.config.recipe.entry, Path("runs", wish.name, "recipe.json"), ranks=ranks,
                    nnodes=wish.config.machines.count, node_rank="$SLURM_NODEID", master_addr="$first",
                    master_port="$port")


def _notes(wish: Wish, login: Login, gpus: int) -> Iterator[str]:
    terms, machines = wish.terms, wish.config.machines
    if not login.slurm:
        yield "there is no sbatch on this machine: nobody was asked"
    if login.job:
        yield f"job {login.job} of this run is in the queue or running: it is followed"
    if machines.kind == LOCAL and not gpus:
        yield "the config asks for no GPUs; N of each node:  --set machines.gpus=N"
    elif machines.kind != LOCAL and machines.gpus is None:
        yield f"{gpus} GPUs a node, as a {machines.kind} has; where the cluster's have N:  --set machines.gpus=N"
    if terms.time is None:
        yield "without --time the partition's default limit holds, after which the job queues again"
    idle = terms.given("yes", "detach", "skip_setup", *Terms.FOR_SLURM)
    if idle:
        yield f"without effect on Slurm: {', '.join(idle)}"


def _submit(plan: Plan) -> str:
    """The job's id. Raises Refused with Slurm's own words."""
    assert plan.layout.script is not None
    run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, local.CHECKOUT)
    write_whole(plan.run_dir / SCRIPT, plan.layout.script)
    try:
        done = _ask("sbatch", "--parsable", str(plan.run_dir / SCRIPT), timeout_s=SUBMIT_S)
    except TimeoutError as error:
        raise Refused(f"{error}. If the job came through all the same, the same command will follow it") from error
    if done.returncode:
        raise Refused(f"Slurm does not take the job: {_words_of(done.stderr)}")
    job = done.stdout.strip().partition(";")[0]                   # ID, or ID;CLUSTER
    with open(plan.run_dir / "logs" / "slurm.log", "a") as log:
        log.write(f"{run.LAUNCHED} {time.strftime('%Y-%m-%d %H:%M:%S %z')}: job {job}\n")
    return job


def _job_name(name: str) -> str:
    return f"txl-{name}"


def _job_of(name: str) -> str | None:
    """The id of the run's job that waits or runs: by its name and folder, as no other has both."""
    try:
        done = _ask("squeue", f"--user={getpass.getuser()}", f"--name={_job_name(name)}", "--noheader",
                    "--format=%i|%T|%Z")
    except TimeoutError as error:
        raise Refused(f"{error}. Is the cluster up?  sinfo") from error
    if done.returncode:
        raise Refused(f"Slurm does not answer: {_words_of(done.stderr)}")
    ended = _words(Path("runs", name, JOB))                       # it says so before Slurm does
    for line in done.stdout.splitlines():
        job, state, folder = line.split("|", 2)
        if folder == os.getcwd() and state not in OVER and not (ended[:1] == [job] and len(ended) == 2):
            return job
    return None


def _look(job: str) -> Seen | None:
    """None where Slurm has forgotten it. Raises TimeoutError where Slurm does not answer."""
    done = _ask("scontrol", "--oneliner", "show", "job", job)
    if "Invalid job id" in done.stderr:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout.partition(" Command=")[0]))
    if done.returncode or "JobState" not in fields:
        raise TimeoutError(f"Slurm does not answer: {_words_of(done.stderr)}")
    code, _, sign = fields.get("ExitCode", "").partition(":")
    return Seen(fields["JobState"], fields.get("Reason", "None"), int(fields.get("Restarts", 0)),
                fields.get("NodeList", ""), fields.get("StartTime", ""), fields.get("EndTime", ""),
                -int(sign or 0) or int(code or 0))


def _ask(*command: str, timeout_s: float = ANSWER_S) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, out of reach of the terminal's Ctrl-C. Raises TimeoutError."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=timeout_s, start_new_session=True)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{command[0]} did not answer in {timeout_s:g} s") from error


def _words_of(stderr: str) -> str:
    """'Invalid partition name specified' of what a command complained."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(filter(None, lines)) or "it does not say why"


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []
