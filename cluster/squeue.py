"""Slurm's own commands, each with a deadline: what became of a job, and which job is a run's."""
from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.run import Refused
from cluster.sbatch import JOB, job_name

ANSWER_S = 30.0                                   # for a command
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT"}                     # states of a job that does not come back


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


def job_of(name: str) -> tuple[str, str] | None:
    """The run's job that waits or runs, as id and state: by its name and folder, as no other has both.

    Raises Refused where there is no Slurm, or none that answers.
    """
    try:
        done = ask("squeue", f"--user={os.getuid()}", f"--name={job_name(name)}", "--states=all", "--noheader",
                   "--format=%i|%T|%Z")
    except FileNotFoundError as error:
        raise Refused("There is no Slurm on this machine. Type the command on a login node of the cluster, in a folder "
                      "that its nodes see too; --dry_run prints the script anywhere") from error
    except TimeoutError as error:
        raise Refused(f"{error}. Is the cluster up?  sinfo") from error
    if done.returncode:
        raise Refused(f"Slurm does not answer: {complaint(done.stderr)}")
    ended = words_of(Path("runs", name, JOB))                        # where the script says so before Slurm does
    for line in done.stdout.splitlines():
        job, state, folder = line.split("|", 2)
        if folder == os.getcwd() and state not in OVER and not (ended[:1] == [job] and len(ended) == 2):
            return job, state
    return None


def look(job: str) -> Seen | None:
    """None where Slurm has forgotten it. Raises TimeoutError where Slurm does not answer."""
    done = ask("scontrol", "--oneliner", "show", "job", job)
    if "Invalid job id" in done.stderr:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout.partition(" Command=")[0]))
    if done.returncode or "JobState" not in fields:
        raise TimeoutError(f"Slurm does not answer: {complaint(done.stderr)}")
    code, _, sign = fields.get("ExitCode", "").partition(":")
    return Seen(fields["JobState"], fields.get("Reason", "None"), int(fields.get("Restarts", 0)),
                fields.get("NodeList", ""), fields.get("StartTime", ""), fields.get("EndTime", ""),
                -int(sign or 0) or int(code or 0))


def ask(*command: str, timeout_s: float = ANSWER_S, env: Mapping[str, str] | None = None,
        ) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, out of reach of the terminal's Ctrl-C. Raises TimeoutError."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=timeout_s, start_new_session=True, env=env)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{command[0]} did not answer in {timeout_s:g} s") from error


def complaint(stderr: str) -> str:
    """'Invalid partition name specified' of what a command complained."""
    lines = [re.sub(r"^(\w+: )?((\w+ )?error: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(filter(None, lines)) or "it does not say why"


def words_of(path: Path) -> list[str]:
    """Of a small file; [] where there is none, or a file server that stumbles, for which no job should end."""
    try:
        return path.read_text().split()
    except OSError:
        return []
