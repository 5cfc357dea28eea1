"""The backend `slurm`: its script as a text, and what a real Slurm on loopback makes of it (slurm_bench.py)."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import launch
from cluster import local, slurm
from cluster.backends import Wish
from cluster.driven import Launcher
from cluster.plan import Plan
from cluster.run import NEW, Broken
from cluster.sbatch import Login, script
from cluster.slurm import SlurmJob, lay_out
from cluster.spec import Machines, Terms, slurm_minutes
from configs import CONFIGS, tiny
from tests.cluster import slurm_bench
from tests.cluster.launching import Person
from tests.cluster.slurm_bench import Slurm
from tests.cluster.test_contract import OVERRIDES, STEPS, curve, make_text
from tests.waiting import until

LOGIN = Login("/shared/env/bin/python", "/shared/work", "/shared/code", "/shared/code")
LAUNCH_S = 300                                    # for a launcher to come to what is waited for, on a busy machine
ENDLESS = 1_000_000                               # steps
needs_slurm = pytest.mark.skipif(slurm_bench.LACKS is not None, reason=str(slurm_bench.LACKS))


def wish(config=tiny, name: str = "x", dry: bool = False, **terms) -> Wish:
    return Wish(name, config, NEW, Terms(**terms), dry)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder on a machine that has no Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path


def plan(count: int = 2) -> Plan:
    of = wish(replace(tiny, machines=Machines("local", count=count)))
    return Plan("x", "tiny", of.config, "slurm", lay_out(of, LOGIN), command="python launch.py --config=tiny")


# --- the script, and what is refused without a Slurm -----------------------------------------------------------------

def test_a_script_is_this_text():
    config = replace(CONFIGS["nvidia_large_multinode"], machines=Machines("dgx2", count=8, gpus=16))
    of = wish(config, "big", partition="gpu", account="lm", time="4:00:00", container_image="nvcr.io#nvidia/pytorch:X",
              container_mounts="/data:/data", sbatch=("--qos=high", "--comment='no hurry'"))
    assert script(of, LOGIN, gpus=16) == r"""#!/bin/bash
# Run big: a torchrun on each of 8 nodes. Made by launch.py; the same command makes and submits it again.
#SBATCH --job-name=txl-big
#SBATCH --chdir=/shared/work
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=16
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH --account=lm
#SBATCH --time=4:00:00
#SBATCH --output=runs/big/logs/slurm.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --qos=high
#SBATCH --comment='no hurry'

run=runs/big
export OMP_NUM_THREADS=1
export PYTHONPATH=/shared/code
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))     # of this job, as another may have a part of the same node
export first port
echo "Job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date "+%F %T %z")"
rm -f "$run"/logs/node-*.status
echo "$SLURM_JOB_ID" > "$run/slurm.job"           # a second word follows at the end

# TERM comes before the time limit, and before a preemption where the cluster says so. The file asks the training to
# save and end. Where somebody else has made it already, that is what they want, and the job does not go on later.
later=
trap 'told=1; [[ -e $run/stop ]] || { later=1; touch "$run/stop"; }' TERM
srun --kill-on-bad-exit=1 \
    --cpu-bind=none \
    --output=runs/big/logs/node-%n.log \
    --open-mode=append \
    '--container-image=nvcr.io#nvidia/pytorch:X' \
    --container-mounts=/shared/work:/shared/work,/shared/code:/shared/code,/data:/data \
    --container-workdir=/shared/work \
    bash -c '
echo "=== launched $(date "+%F %T %z"): job $SLURM_JOB_ID on $SLURMD_NODENAME"
trap : TERM                                # is for torchrun; this shell stays for its status
python -m torch.distributed.run \
    --nnodes=8 --nproc-per-node=16 "--node-rank=$SLURM_NODEID" "--master-addr=$first" "--master-port=$port" \
    -m txl.train runs/big/recipe.json
status=$?
echo "$status" > "runs/big/logs/node-$SLURM_NODEID.status"
exit "$status"
' &
while told=; wait $!; status=$?; [[ $told ]]; do :; done         # a signal ends the waiting, not what is waited for
rm -f "$run/stop"

state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
if [[ ${state:-JobState=RUNNING} != JobState=RUNNING ]]; then
    exit "$status"                         # Slurm ends the job: cancelled, or queued again by Slurm itself
fi
# Stopped by TERM, the shell's or, with a status other than 0, each process's own: the training is to go on.
if [[ $run/status.json -nt $run/slurm.job ]] && grep -q '"state": "stopped"' "$run/status.json" \
    && [[ $later || $status != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID" && exit
fi
echo "$SLURM_JOB_ID $status" > "$run/slurm.job"
exit "$status"
"""


def differing(one: str, other: str) -> tuple[set[str], set[str]]:
    """The lines of one alone, and of the other."""
    return set(one.splitlines()) - set(other.splitlines()), set(other.splitlines()) - set(one.splitlines())


def test_without_a_container_the_python_that_launches_trains():
    of = wish(replace(tiny, machines=Machines("p4d.24xlarge", count=2)))
    inside = replace(of, terms=Terms(container_image="image.sqsh"))
    plain, packed = (script(one, replace(LOGIN, checkout=LOGIN.folder), gpus=8) for one in (of, inside))
    assert differing(plain, packed) == (
        {"/shared/env/bin/python -m torch.distributed.run \\"},
        {"    --container-image=image.sqsh \\", "    --container-mounts=/shared/work:/shared/work \\",
         "    --container-workdir=/shared/work \\", "python -m torch.distributed.run \\"})


@pytest.mark.parametrize(("machines", "gpus", "whole"), [
    (Machines("local"), 0, False),
    (Machines("local", gpus=2), 2, False),        # two GPUs of a node that others may have the rest of
    (Machines("p4d.24xlarge"), 8, True),
    (Machines("p4d.24xlarge", gpus=4), 4, False),
    (Machines("p4d.24xlarge", count=2, gpus=4), 4, True),
    (Machines("dgx2", gpus=16), 16, False),
    (Machines("c5.xlarge", count=2), 0, False),
])
def test_gpus_are_asked_for_and_nodes_taken_whole_where_all_of_them_are_wanted(machines, gpus, whole):
    layout = lay_out(wish(replace(tiny, machines=machines)), LOGIN)
    assert layout.ranks == machines.count * max(1, gpus)
    assert (f"\n#SBATCH --gpus-per-node={gpus}\n" in layout.script) == (gpus > 0)
    assert ("\n#SBATCH --exclusive\n#SBATCH --mem=0\n" in layout.script) == whole
    assert f"--nnodes={machines.count} --nproc-per-node={max(1, gpus)} " in layout.script


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_nvidias_multi_node_recipe_has_its_batch_on_1_2_4_and_8_machines_of_16_gpus(count, elsewhere, capsys):
    assert launch.main(["--config=nvidia_large_multinode", "--backend=slurm", "--dry_run", f"--machines={count}",
                        "--set=machines.gpus=16"]) == 0
    out = capsys.readouterr().out
    assert f"512 sequences over {count * 16} rank(s)" in out
    assert f"#SBATCH --nodes={count}\n" in out
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("value", ["a b", "it's", 'a"b', "$HOME", "`id`", "a;b"])
def test_no_value_can_say_more_than_itself(value, tmp_path):
    """Judged by bash, which runs the script with srun and the like as functions that print their words."""
    of = wish(container_image=value, container_mounts=value)
    login = replace(LOGIN, python=value, folder=f"/{value}", checkout=f"/{value}", pythonpath=value)
    fakes = ('scontrol() { :; }; python() { :; }; rm() { :; }; touch() { :; }; '
             'srun() { printf "%s\\n" "$PYTHONPATH" "$@"; }\n')
    (tmp_path / "runs/x/logs").mkdir(parents=True)
    done = subprocess.run(["bash"], input=fakes + script(of, login, gpus=1), cwd=tmp_path, capture_output=True,
                          text=True, timeout=300, env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"})
    lines = done.stdout.splitlines()
    assert lines[1] == value                                      # after "Job 7 on": PYTHONPATH
    assert f"--container-image={value}" in lines
    assert f"--container-mounts=/{value}:/{value},{value}" in lines
    assert shlex.split(script(of, login, gpus=1).partition("chdir=")[2].partition("\n")[0]) == [f"/{value}"]


@pytest.mark.parametrize(("time", "minutes"), [
    ("30", 30), ("1:30", 2), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("2-00:00:01", 2881)])
def test_a_time_limit_is_understood_as_slurm_does(time, minutes):
    assert slurm_minutes(time) == minutes


def test_a_short_time_limit_leaves_most_of_it_to_the_training():
    notices = {time: re.search(r"TERM@(\d+)", script(wish(time=time), LOGIN, 0))[1] for time in ("4", "20", "1-0")}
    assert notices == {"4": "60", "20": "300", "1-0": "300"}


@pytest.mark.parametrize(("flags", "message"), [
    (["--time=soon"], "--time is 'soon': Slurm takes minutes"),
    (["--time=0"], "--time is 0: it must be above 0"),
    (["--container_mounts=/a:/a"], "--container_mounts are for a container: which --container_image?"),
    (["--sbatch=qos"], "--sbatch takes an option of sbatch as it is, --sbatch=--qos=high; not 'qos'"),
    (["--sbatch=--qos=x\nreboot"], "--sbatch has more than one line"),
    (["--partition=a\nb"], "--partition has more than one line"),
    (["--instance_type=dgx2"], "dgx2 is not in the table of cluster/spec.py. How many GPUs has a node?"),
    (["--backend=local", "--partition=gpu"], "--partition: not for --backend=local, only for --backend=slurm"),
    (["--backend=aws", "--sbatch=--qos=x"], "--sbatch: not for --backend=aws, only for --backend=slurm"),
])
def test_flags_that_cannot_be_are_refused(flags, message, elsewhere, capsys):
    backend = [] if any("--backend" in flag for flag in flags) else ["--backend=slurm"]
    with pytest.raises(SystemExit) as ended:
        launch.main(["--config=tiny", "--dry_run", *backend, *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_slurm_the_script_is_printed_and_nothing_else_can_be_done(elsewhere, capsys):
    assert launch.main(["--config=tiny", "--backend=slurm", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "note      Slurm was not asked. There is no Slurm on this machine." in out
    assert "\n#!/bin/bash\n# Run tiny: " in out
    with pytest.raises(SystemExit) as ended:
        launch.main(["--config=tiny", "--backend=slurm"])
    assert ended.value.code == 2
    assert "There is no Slurm on this machine. Type the command on a login node" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def ended(folder: Path, *statuses: int | None, srun: int) -> tuple[int, ...] | None:
    """What poll() makes of a job 7 that has ended with these statuses of its nodes."""
    logs = folder / "runs/x/logs"
    logs.mkdir(parents=True)
    for node, status in enumerate(statuses):
        if status is not None:
            (logs / f"node-{node}.status").write_text(f"{status}\n")
    (logs / "slurm.log").write_text("srun: error: no such luck\n")
    (folder / "runs/x/slurm.job").write_text(f"7 {srun}\n")
    return SlurmJob(plan(len(statuses)), "7", Person()).poll()


@pytest.mark.parametrize(("statuses", "srun", "meaning"), [
    ((0, 0), 0, (0, 0)),
    ((1, 143), 143, (1, -15)),                    # the shell's word for SIGTERM
    ((None, 1), 137, (-15, 1)),                   # ended with its shell, as the other had failed
    ((139, 0), 139, (-11, 0)),
])
def test_the_nodes_statuses_are_told_apart(statuses, srun, meaning, elsewhere):
    assert ended(elsewhere, *statuses, srun=srun) == meaning


def test_where_no_node_did_anything_slurm_has_the_word(elsewhere):
    with pytest.raises(Broken, match=r"(?s)Job 7 ended with status 1 before a node had done anything.*"
                                     r"srun: error: no such luck.*go on with:  python launch\.py --config=tiny"):
        ended(elsewhere, None, None, srun=1)


# --- a real Slurm ----------------------------------------------------------------------------------------------------

class Desk:
    """A terminal on the login node, in a folder with data."""

    def __init__(self, bench: Slurm, folder: Path):
        self.bench, self.here, self._launchers = bench, folder, list[Launcher]()

    def launch(self, name: str, *flags: str, steps: int = STEPS, **env: str) -> Launcher:
        overrides = [x.replace(f"steps={STEPS}", f"steps={steps}") for x in OVERRIDES]
        self._launchers.append(Launcher(
            [sys.executable, str(local.CHECKOUT / "launch.py"), "--config=tiny", "--backend=slurm", "--machines=2",
             f"--name={name}", *(f"--set={x}" for x in overrides), *flags],
            self.here / f"{name}.screen", cwd=self.here, env=self.bench.env | env))
        return self._launchers[-1]

    def run(self, name: str) -> Path:
        return self.here / "runs" / name

    def screen(self, name: str) -> str:
        return (self.here / f"{name}.screen").read_text()

    def queue(self) -> list[str]:
        """Ids of the jobs that wait, run or are just ending."""
        return self.bench.ask("squeue", "--noheader", "--format=%i").split()

    def leave(self) -> None:
        for launcher in self._launchers:
            launcher.kill()
        self.bench.ask("scancel", "--user=" + str(os.getuid()))
        until(lambda: not self.queue())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with slurm_bench.slurm(tmp_path_factory.mktemp("slurm")) as bench:
        yield bench


@pytest.fixture
def desk(bench, tmp_path):
    make_text(tmp_path / "a folder/data/little")
    desk = Desk(bench, tmp_path / "a folder")
    yield desk
    desk.leave()


def up(bench: Slurm, node: str) -> bool:
    """Whether it takes jobs again. Slurm refuses to resume one that has come back by itself."""
    with contextlib.suppress(subprocess.CalledProcessError):
        bench.ask("scontrol", "update", f"nodename={node}", "state=resume")
    return "DOWN" not in bench.ask("scontrol", "show", "node", node)


@needs_slurm
@pytest.mark.slow
def test_told_of_its_time_limit_and_robbed_of_a_node_it_goes_on_to_the_same_curve(desk, by_hand):
    """What Slurm sends before the limit, sent by hand; and a node that goes down, after which Slurm queues it again."""
    launcher = desk.launch("disturbed")
    job = launcher.until(r"^Submitted as job (\d+)\.", LAUNCH_S)[1]
    launcher.until("^step 10/", LAUNCH_S)
    desk.bench.ask("scancel", "--batch", "--signal=TERM", job)
    at = launcher.until(r"^stopped at step (\d+) as asked", LAUNCH_S)[1]
    launcher.until(f"^Job {job} is put back into the queue", LAUNCH_S)
    launcher.until(f"^resuming from .*step {at}$", LAUNCH_S)
    until(lambda: json.loads((desk.run("disturbed") / "status.json").read_text())["state"] == "training", LAUNCH_S)
    desk.bench.ask("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=a test")
    until(lambda: up(desk.bench, "127.0.0.2"), LAUNCH_S)
    launcher.until("resuming from", LAUNCH_S)
    assert launcher.wait(LAUNCH_S) == 0, desk.screen("disturbed")
    assert curve(desk.run("disturbed")) == by_hand
    assert f"Finished at step {STEPS}: " in desk.screen("disturbed")


@needs_slurm
@pytest.mark.slow
def test_a_preemption_and_the_time_limit_itself_put_it_back_until_it_is_asked_to_stop(desk):
    launcher = desk.launch("limited", "--time=1", steps=ENDLESS)
    job = launcher.until(r"^Submitted as job (\d+)\.", LAUNCH_S)[1]
    launcher.until(rf"^Job {job} runs on 127\.0\.0\.\[1-2\], until 20\S+ at most$", LAUNCH_S)
    launcher.until("^step 10/", LAUNCH_S)
    desk.bench.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    for _ in range(2):                                                # by that, and by the limit of a minute
        launcher.until("^stopped at step", LAUNCH_S)
        launcher.until(f"^Job {job} is put back into the queue, and goes on from its newest checkpoint", LAUNCH_S)
    launcher.ctrl_c()
    assert launcher.wait(LAUNCH_S) == 130
    # The second is what a busy machine sees, on which the job is at work again by now.
    assert re.match(r"(Ended\. The last checkpoint is of step \d+|Stopped at step \d+ of \d+)\. Go on with:  ",
                    desk.screen("limited").splitlines()[-1])
    assert not (desk.run("limited") / "stop").exists()
    until(lambda: desk.queue() == [])


@needs_slurm
@pytest.mark.slow
def test_cancelled_by_somebody_is_said_in_a_line_and_a_second_ctrl_c_cancels(desk):
    launcher = desk.launch("endless", steps=ENDLESS)
    job = launcher.until(r"^Submitted as job (\d+)\.", LAUNCH_S)[1]
    launcher.until("^step 10/", LAUNCH_S)
    desk.bench.ask("scancel", job)
    assert launcher.wait(LAUNCH_S) == 1
    assert re.search(rf"^Job {job} was cancelled, by scancel or an administrator\. (There is no|The last) checkpoint.*"
                     rf" Go on with:  .*launch\.py .*--name=endless", desk.screen("endless").splitlines()[-1])
    assert desk.queue() == []                                         # the script did not put it back

    (desk.run("endless") / "logs/node-0.log").unlink()
    launcher = desk.launch("endless", steps=ENDLESS)
    until((desk.run("endless") / "logs/node-0.log").exists, LAUNCH_S) # it loads torch now, and hears nothing
    launcher.ctrl_c()
    launcher.until("^Stopping at the next step, with a checkpoint. Ctrl-C again kills", LAUNCH_S)
    launcher.ctrl_c()
    assert launcher.wait(LAUNCH_S) == 130
    assert "\nKilling.\n" in desk.screen("endless")
    until(lambda: desk.queue() == [])


@needs_slurm
def test_a_job_in_the_queue_outlives_its_launcher_and_leaves_it_by_ctrl_c(desk):
    waiting = desk.launch("held", "--sbatch=--hold")
    job = waiting.until(r"^Submitted as job (\d+)\.", LAUNCH_S)[1]
    waiting.until(f"^Job {job} waits in the queue: JobHeldUser", LAUNCH_S)
    waiting.kill()
    assert desk.queue() == [job]
    before = {path: path.read_bytes() for path in desk.run("held").rglob("*") if path.is_file()}

    other = desk.launch("held", "--sbatch=--hold", "--time=9")
    assert other.wait(LAUNCH_S) == 2
    assert f"Job {job} of this run was submitted with other flags: see runs/held/slurm.sbatch" in desk.screen("held")

    again = desk.launch("held", "--sbatch=--hold")
    again.until(f"^note      job {job} of this run is in the queue or running: it is followed", LAUNCH_S)
    again.until(f"^Job {job} waits in the queue", LAUNCH_S)
    assert {path: path.read_bytes() for path in desk.run("held").rglob("*") if path.is_file()} == before
    again.ctrl_c()
    assert again.wait(LAUNCH_S) == 130
    assert desk.queue() == []
    assert "There is no checkpoint yet. Go on with: " in desk.screen("held").splitlines()[-1]


@needs_slurm
def test_a_job_that_is_just_ending_is_waited_for(desk):
    old = desk.bench.ask("sbatch", "--parsable", "--job-name=txl-next", f"--chdir={desk.here}", "--output=/dev/null",
                         "--wrap=sleep 100").strip()
    until(lambda: desk.bench.ask("squeue", "--noheader", "--format=%T") == "RUNNING\n")
    (desk.bench.root / "slow").touch()
    desk.bench.ask("scancel", old)
    launcher = desk.launch("next", "--sbatch=--hold", "--detach")
    launcher.until(f"^Job {old} of this run is just ending: waiting for that", LAUNCH_S)
    assert desk.queue() == [old]
    (desk.bench.root / "slow").unlink()
    assert launcher.wait(LAUNCH_S) == 0
    assert desk.queue() != [old]


@needs_slurm
@pytest.mark.parametrize(("flags", "holds"), [
    ([], "urgent 7:00"),
    (["--partition=main"], "main 7:00"),
    (["--partition=main", "--time=9"], "main 9:00"),
])
def test_flags_hold_against_sbatchs_own_variables_which_hold_without(desk, flags, holds):
    launcher = desk.launch("mine", *flags, "--sbatch=--hold", "--detach",
                           SBATCH_PARTITION="urgent", SBATCH_TIMELIMIT="7")
    assert launcher.wait(LAUNCH_S) == 0
    assert desk.bench.ask("squeue", "--noheader", "--format=%P %l").strip() == holds


@needs_slurm
def test_what_slurm_does_not_take_is_said_in_its_words_and_leaves_nothing(desk):
    launcher = desk.launch("refused", "--partition=gold")
    assert launcher.wait(LAUNCH_S) == 2
    assert desk.screen("refused").splitlines()[-1] == (
        "Slurm does not take the job: invalid partition specified: gold; Batch job submission failed: Invalid "
        "partition name specified")
    assert not (desk.here / "runs").exists()


@needs_slurm
def test_a_slurm_that_does_not_answer_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm.conf").write_text("ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\n"
                                         f"SlurmctldPort={local.free_port()}\nMessageTimeout=1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr(slurm, "ASK_S", 0)
    person = Person()
    job = SlurmJob(plan(), "7", person)
    assert [job.poll(), job.poll()] == [None, None]
    assert person.lines == ["Slurm does not answer: Unable to contact slurm controller (connect failure). It is asked "
                            "again until it answers; the job does not need that."]
    assert job.machines() == "Slurm is silent"
