"""The front door: what it refuses, what it prints, and `tiny` all the way through it."""
from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

import launch
from cluster import local, run
from cluster.backends import BACKENDS
from cluster.local import ranks_of
from cluster.plan import Plan
from configs import CONFIGS

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launched(*argv: str) -> int | None:
    """The exit status of launch.py."""
    try:
        return launch.main(list(argv))
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(("argv", "message"), [
    (["--confg=tiny"], "There is no flag --confg. Did you mean '--config'?"),
    (["--config=tiny", "--dryrun"], "There is no flag --dryrun. Did you mean '--dry_run'?"),
    (["--config=tinny"], "There is no config 'tinny'. Did you mean 'tiny'?"),
    (["--config=one_machin_p4d"], "Did you mean 'one_machine_p4d'?"),
    (["--config=zzz"], "There is no config 'zzz'."),
    ([], "--config is missing"),
    (["--config=tiny", "now"], "What is 'now' for?"),
    (["--config=tiny", "--config=tiny"], "--config is given twice"),
    (["--config=tiny", "--name"], "--name needs a value"),
    (["--config=tiny", "--machines=two"], "--machines takes a whole number"),
    (["--config=tiny", "--machines=0"], "machines.count=0: a cluster has at least 1 machine, not 0"),
    (["--config=tiny", "--machines=9"], "leaves some of the 9 ranks without a sequence"),
    (["--config=tiny", "--machines=2", "--set=recipe.model.cutoffs=(200,400)", "--set=recipe.clock.split_tails=true",
      "--set=recipe.batch.size=9", "--set=recipe.batch.micro_size=4"], "as many micro-batches on each rank"),
    (["--config=tiny", "--machines=2", "--set=machines.count=3"], "set the same thing"),
    (["--config=tiny", "--set", "recipe.optim.lr"], "is not an assignment"),
    (["--config=tiny", "--set", "recipe.optm.lr=1"], "Recipe has no field 'optm'. Did you mean 'optim'?"),
    (["--config=tiny", "--set", "recipe.optim.lr=fast"], "recipe.optim.lr takes a number or LinearLr, not 'fast'"),
    (["--config=tiny", "--set", "recipe.stop.max_steps=0"], "must be at least 1"),
    (["--config=tiny", "--name="], "--name= is empty"),
    (["--config=tiny", "--name=../up"], "'../up' cannot be a run's name"),
    (["--config=tiny", "--name=.."], "'..' cannot be a run's name"),
    (["--config=tiny", "--name=a b"], "cannot be a run's name"),
    (["--config=tiny", "--name=$(reboot)"], "cannot be a run's name"),
    (["--config=tiny", "--name=größer"], "cannot be a run's name"),
    (["--config=tiny", "--name=a\n"], "cannot be a run's name"),
    (["--config=tiny", f"--name={'a' * 64}"], "cannot be a run's name"),
    (["--config=tiny", "--backend=slurn"],
     f"There is no backend 'slurn'; there is: {', '.join(BACKENDS)}. On this machine:\n  "),
    (["--config=tiny", "--backend=slurn"], " launch.py --config=tiny --backend=local"),
    (["--config=tiny", "--budget=0"], "--budget is 0: it must be above 0"),
    (["--config=tiny", "--wait=-1"], "--wait is -1: a time is not negative"),
    (["--config=tiny", "--fallback=spot"], "--fallback takes"),
    (["--config=tiny", "--checkpoint=runs/gone"], "There is no checkpoint runs/gone"),
])
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_misuse_ends_with_status_2_before_anything_is_made(argv, message, dry_run, empty, capsys, monkeypatch):
    monkeypatch.setattr(launch, "__file__", str(empty / "launch.py"))
    assert launched(*dry_run, *argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_can_be_planned_here_and_a_dry_run_makes_nothing(name, empty, capsys):
    assert launched(f"--config={name}", "--backend=local", "--dry_run") == 0
    assert f"run       runs/{name}: new" in capsys.readouterr().out
    assert list(empty.iterdir()) == []


def test_what_flags_change_in_a_config_is_echoed_as_overrides(empty, capsys):
    (empty / "old").mkdir()
    assert launched("--config=one_machine", "--backend=local", "--dry_run", "--name=mine", "--machines=3", "--nospot",
                    "--instance_type=p4d.24xlarge", "--checkpoint=old", "--set=recipe.seed=7", "--skip_setup") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^set +(.*)$", out, re.MULTILINE) == [
        "machines.count=3", "machines.kind=p4d.24xlarge", "machines.spot=false", "recipe.init_from=old",
        "recipe.seed=7"]
    assert "3 nodes" in out
    assert "3 x p4d.24xlarge: $65.87 per hour" in out
    assert "runs/mine/recipe.json" in out


def test_an_unheard_of_instance_type_is_a_note_not_an_error(empty, capsys):
    assert launched("--config=tiny", "--backend=local", "--dry_run", "--instance_type=m5.xlarge") == 0
    assert "m5.xlarge is not in the table" in capsys.readouterr().out


def test_the_command_to_copy_leads_to_the_same_plan(empty, monkeypatch):
    monkeypatch.setattr(local, "free_port", lambda: 6000)
    (empty / "my run").mkdir()

    def planned(argv: list[str]) -> Plan:
        flags = launch.parse(launch.Flags, argv, prog="", about="")
        return launch.make_plan(flags, launch.find_config(flags))

    plan = planned(["--dry-run", "--set", "recipe.seed=7", "--config", "tiny", "--set=recipe.data.dir=my data",
                    "--nospot", "--checkpoint=my run", "--machines=2", "--launch-tensorboard", "--name=a",
                    "--backend", "local"])
    _, script, *argv = shlex.split(plan.command)
    assert (Path(script).resolve(), len(argv)) == (CHECKOUT / "launch.py", 9)
    assert planned(argv) == plan


EXAMPLES = re.findall(r"^    python launch\.py (.*?)(?:   .*)?$", launch.__doc__, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_commands_at_the_top_of_the_file_can_be_copied(example, empty, capsys):
    assert launched(*shlex.split(example), *["--dry_run"] * ("--dry_run" not in example)) == 0
    assert len(EXAMPLES) >= 4


def test_a_rehearsal_says_which_flags_it_cannot_honour_and_passes_the_others_on(empty, capsys):
    assert launched("--config=tiny", "--rehearse", "--budget=5", "--vpc=vpc-1", "--name=mine") == 2
    assert "--rehearse does not take --name, --vpc" in capsys.readouterr().err
    flags = launch.parse(launch.Flags, ["--config=tiny", "--nospot", "--rehearse", "--budget=5",
                                        "--launch_tensorboard"], prog="", about="")
    assert launch.rehearsed_flags(flags) == ["--launch_tensorboard", "--budget=5.0"]


def test_another_number_of_ranks_does_not_change_the_batch_under_a_run(empty, capsys):
    local_size = ["--config=tiny", "--set=recipe.batch.size=none", "--set=recipe.batch.local_size=8"]
    flags = launch.parse(launch.Flags, local_size, prog="", about="")
    run.record(empty / "runs/tiny", launch.find_config(flags).recipe, "", "", (), empty)
    checkpoint = empty / "runs/tiny/checkpoints/step-00000020"
    checkpoint.mkdir(parents=True)
    meta = {"step": 20, "ranks": 1, "valid_loss": None, "vocabulary": "", "files": {"model.pt": 0}}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    (checkpoint / "model.pt").touch()
    assert launched(*local_size, "--dry_run") == 0
    assert launched(*local_size, "--dry_run", "--machines=2") == 2
    assert "Go on with 1 rank(s), or choose another --name" in capsys.readouterr().err


def make(path: str, kind: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch() if kind == "file" else Path(path).mkdir()


@pytest.mark.parametrize(("path", "kind", "message"), [
    ("runs", "file", "Not a directory: runs/tiny/recipe.json. Nothing was started.\nA run needs a folder below runs/"),
    ("runs/tiny/recipe.json", "folder", "runs/tiny/recipe.json is not a recipe that this version reads: "),
    ("runs/tiny/lock", "folder", "Is a directory: runs/tiny/lock. Nothing was started.\n"),
    ("runs/tiny/plan.txt", "folder", "Is a directory: runs/tiny/plan.txt. Nothing was started.\n"),
    ("runs/tiny/logs/node-0.log", "folder", "Is a directory: runs/tiny/logs/node-0.log. Nothing was started.\n"),
])
def test_a_folder_that_cannot_be_used_is_said_in_a_line(path, kind, message, empty, capsys):
    make(path, kind)
    assert launched("--config=tiny") == 2
    assert message in capsys.readouterr().err


def test_what_had_started_before_a_failure_is_ended(empty, capsys):
    make("runs/tiny/logs/node-1.log", "folder")
    assert launched("--config=tiny", "--machines=2") == 1
    assert capsys.readouterr().err.startswith("Is a directory: runs/tiny/logs/node-1.log. What was started is ended")
    local.refuse_if_running(Path("runs/tiny"), "txl.train")
    assert "=== launched" in Path("runs/tiny/logs/node-0.log").read_text()


def test_help_lists_every_config_with_machines_gpus_model_and_price(capsys):
    assert launched("--help") == 0
    out = capsys.readouterr().out
    assert set(CONFIGS) <= set(re.findall(r"^  (\w+) ", out, re.MULTILINE))
    assert set(re.findall(r"^  --(\w+)", out, re.MULTILINE)) == {f.name for f in fields(launch.Flags)}
    assert re.search(r"^  test_16 +16 x p3dn.24xlarge +128 GPUs +297.1M parameters +\$499.39/h$", out, re.MULTILINE)
    assert re.search(r"^  tiny +this machine +0.1M parameters", out, re.MULTILINE)


WITHOUT = "import sys; sys.modules.update(dict.fromkeys({}.split())); import launch; sys.exit(launch.main({}))"


@pytest.mark.parametrize(("missing", "argv"), [
    ("torch numpy tokenizers tensorboard", ["--config=test_2", "--backend=local", "--dry_run"]),
    ("torch numpy tokenizers tensorboard fire boto3 ray", ["--help"]),
])
def test_a_laptop_needs_no_torch(missing, argv, empty):
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(repr(missing), argv)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test_2" in done.stdout


def test_help_comes_at_once(empty):
    def seconds() -> float:                       # of work, which a busy machine does not make more
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, CHECKOUT / "launch.py", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert min(seconds() for _ in range(5)) < .3


# --- all the way: what every backend keeps to is in cluster/test_contract.py ---

# Wide evaluation is fast, and 150 steps leave time to interfere after the first checkpoint, at step 20.
OPTIONS = ["--config=tiny", "--set=recipe.eval_streams=64", "--set=recipe.stop.max_steps=150",
           "--set=recipe.clock.eval_interval=75"]


@pytest.fixture(scope="module")
def here(tmp_path_factory, stdlib):
    """A folder with the prepared data and the run `straight`, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("front-door")
    (folder / "data").symlink_to(stdlib)
    done = launcher(folder, "--name=straight", *OPTIONS)
    out, _ = done.communicate(timeout=3000)
    assert done.returncode == 0, out
    return folder


def launcher(folder: Path, *argv: str) -> subprocess.Popen:
    """launch.py on one core, where no thread waits for another: as fast as on two, and on a busy machine faster."""
    one_core = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []
    return subprocess.Popen([*one_core, sys.executable, CHECKOUT / "launch.py", *argv], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def perplexity(folder: Path, name: str) -> float:
    status = json.loads((folder / "runs" / name / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["step"] == 150
    return float(re.search(r"test ppl ([\d.]+)", status["message"]).group(1))


def test_tiny_learns_on_the_text_that_comes_with_python(here):
    run = here / "runs" / "straight"
    assert perplexity(here, "straight") < 400                                     # of 1,024 tokens, from 1,024 at first
    assert json.loads((run / "recipe.json").read_text())["stop"] == {"max_steps": 150, "max_tokens": None}
    assert "recipe.eval_streams=64" in (run / "command.txt").read_text()


@pytest.mark.slow
def test_a_run_whose_power_failed_goes_on_and_ends_where_the_undisturbed_one_did(here):
    run = here / "runs" / "disturbed"
    first = launcher(here, "--name=disturbed", *OPTIONS)
    while not (run / "checkpoints" / "step-00000020").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(.01)
    agent = int((run / "lock").read_text().split()[1].rstrip(","))
    for pid in (first.pid, agent, *ranks_in(here, "disturbed")):
        os.kill(pid, signal.SIGKILL)
    first.communicate(timeout=300)

    second = launcher(here, "--name=disturbed", *OPTIONS)
    out, _ = second.communicate(timeout=3000)
    assert second.returncode == 0, out
    assert re.search(r"goes on from step [24681]\d*0", out)
    assert perplexity(here, "disturbed") == perplexity(here, "straight")


def ranks_in(folder: Path, name: str) -> list[int]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return ranks_of(Path("runs", name), "txl.train")
    finally:
        os.chdir(before)
