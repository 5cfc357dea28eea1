"""The batch script that carries a plan out on Slurm, as one text. Pure; cluster/slurm.py submits it."""
from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster import run
from cluster.backends import Wish
from cluster.plan import torchrun
from cluster.spec import Config, Terms, slurm_minutes

JOB = "slurm.job"                                 # in the run's folder: the job's id and, once it ended, its status
NOTICE_S = 300                                    # before the time limit: for a checkpoint, and to leave
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
later=
trap 'told=1; [[ -e $run/stop ]] || {{ later=1; touch "$run/stop"; }}' TERM
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


@dataclass(frozen=True)
class Login:
    """What a script needs to know of where it is submitted."""
    python: str
    folder: str                                   # that the command is typed in
    checkout: str                                 # the code's
    pythonpath: str | None = None                 # where the code is, if not in that folder
    job: str | None = None                        # of this run, that is in the queue or running
    unasked: str | None = None                    # why Slurm was not asked, in a dry run


def script(wish: Wish, login: Login, gpus: int) -> str:
    """What sbatch is given. Pure. A job's TERM asks to save and queue again, the file `stop` to save and end."""
    terms, name, count = wish.terms, wish.name, wish.config.machines.count
    options = [f"job-name={job_name(name)}", f"chdir={shlex.quote(login.folder)}",
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
             for word in node_command(wish, login, max(1, gpus))]
    train = CONTINUED.join(" ".join(some) for some in (words[:3], words[3:-3], words[-3:]))
    node = NODE.format(launched=run.LAUNCHED, train=train, folder=f"runs/{name}")
    return BATCH.format(
        name=name, nodes="a node" if count == 1 else f"each of {count} nodes", options="\n".join(lines),
        env="\n".join(f"export {key}={value}" for key, value in env.items()),
        srun=CONTINUED.join(map(shlex.quote, srun)), node=shlex.quote(node), job=JOB)


def job_name(name: str) -> str:
    return f"txl-{name}"


def node_command(wish: Wish, login: Login, ranks: int) -> tuple[str, ...]:
    python = "python" if wish.terms.container_image else login.python
    return torchrun(python, wish.config.recipe.entry, Path("runs", wish.name, "recipe.json"), ranks=ranks,
                    nnodes=wish.config.machines.count, node_rank="$SLURM_NODEID", master_addr="$first",
                    master_port="$port")


def _whole_nodes(config: Config, gpus: int) -> bool:
    """Whether nobody else should be on the nodes: not where one machine's GPUs are counted out."""
    return gpus > 0 and (config.machines.gpus is None or config.machines.count > 1)


def _notice_s(terms: Terms) -> int:
    """How long before the time limit the training is told."""
    return NOTICE_S if terms.time is None else min(NOTICE_S, slurm_minutes(terms.time) * 60 // 4)
