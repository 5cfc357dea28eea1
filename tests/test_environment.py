"""environment.sh and the scripts that source it, offline: stand-ins for Python, and a pip that reaches nobody."""
from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
# Answers as the Python of a virtual environment at the folder above it, and notes every other command.
FAKE = """#!/bin/bash
home=$(cd "$(dirname "$0")/.." && pwd)
case "$*" in
    *sys.prefix*) echo "$home"; exit {supported} ;;
    --version) echo "Python {version}" ;;
    *importlib.metadata*) exit {without_torch} ;;
    *cuda.is_available*) echo 0 ;;
    *) echo "$*" >> "$home/commands" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """The scripts and their requirements in a folder of their own; `tmp` there takes the temporary files."""
    for name in ("environment.sh", "single_machine.sh", "requirements.txt", "requirements-launch.txt"):
        shutil.copy(CHECKOUT / name, tmp_path)
    (tmp_path / "tmp").mkdir()
    return tmp_path


def fake_python(folder: Path, version: str = "3.11.9", supported: bool = True, torch: bool = True) -> Path:
    """A virtual environment with a stand-in for Python."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(FAKE.format(version=version, supported=int(not supported),
                                                       without_torch=int(not torch)))
    (folder / "bin" / "python").chmod(0o755)
    return folder


def bash(checkout: Path, *command: str, active: Path | None, **env: str) -> subprocess.CompletedProcess:
    path = [*([f"{active}/bin"] if active else []), os.defpath]
    clean = {name: x for name, x in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME")
             and not name.startswith("PIP_")}
    return subprocess.run(["bash", *command], cwd=checkout, capture_output=True, text=True, timeout=300, env=clean | {
        "PATH": os.pathsep.join(path), "TMPDIR": str(checkout / "tmp")} | env
        | ({"VIRTUAL_ENV": str(active)} if active else {}))


SOURCED = ("-c", "set -euo pipefail; source environment.sh; echo ready with $(command -v python)")


def commands(env: Path) -> list[str]:
    return (env / "commands").read_text().splitlines() if (env / "commands").exists() else []


def test_it_installs_once_and_then_does_nothing(checkout):
    env = fake_python(checkout / "env")
    done = bash(checkout, *SOURCED, active=env)
    assert (done.returncode, done.stdout) == (0, f"Installing requirements.txt\nready with {env}/bin/python\n")
    assert len(commands(env)) == 1
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = bash(checkout, *SOURCED, active=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ready with {env}/bin/python\n", "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)          # of work, which a busy machine does not make more
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert len(commands(env)) == 1
    assert list((checkout / "tmp").iterdir()) == []
    (checkout / "requirements.txt").open("a").write("another\n")
    assert "Installing" in bash(checkout, *SOURCED, active=env).stdout


def test_without_an_active_environment_the_one_in_the_checkout_is_used_but_not_activated(checkout):
    fake_python(checkout / ".venv")
    done = bash(checkout, "-c", "source environment.sh; echo $(command -v python) ${VIRTUAL_ENV-none}", active=None)
    assert done.stdout.splitlines()[-1] == f"{checkout}/.venv/bin/python none"


def test_a_python_of_another_version_is_named_with_those_that_will_do(checkout):
    env = fake_python(checkout / "env", version="3.8.10", supported=False)
    for command in (SOURCED, ["single_machine.sh"]):
        done = bash(checkout, *command, active=env)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (f"Needed is Python 3.10 to 3.13, and {env}/bin/python is Python 3.8.10. Activate an "
                               f"environment that has one, or none: then .venv here is used.\n")
    assert commands(env) == []


def test_an_installation_that_fails_is_said_in_a_line_and_tried_again_next_time(checkout):
    (checkout / "requirements.txt").write_text("torch==2.13.0\nthere-is-no-such-package==1\n")
    environment = Path(sys.executable).parents[1]
    before = set(environment.glob(".installed-*"))
    done = bash(checkout, *SOURCED, active=environment, PIP_INDEX_URL="http://127.0.0.1:9", PIP_RETRIES="0")
    assert done.returncode == 1
    assert done.stderr.endswith("The installation failed (above is pip's reason). Without a network nothing can be "
                                "installed.\n")
    assert "there-is-no-such-package" in done.stderr
    assert set(environment.glob(".installed-*")) == before
    assert list((checkout / "tmp").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux" or Path("/proc/driver/nvidia").exists() or bool(shutil.which("nvidia-smi")),
                    reason="for a machine on Linux without an NVIDIA GPU")
def test_without_a_gpu_it_says_how_the_download_of_torch_becomes_small(checkout):
    large = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before the command makes it small."
    assert large in bash(checkout, *SOURCED, active=fake_python(checkout / "a", torch=False)).stdout
    assert large not in bash(checkout, *SOURCED, active=fake_python(checkout / "b", torch=True)).stdout
    assert large not in bash(checkout, *SOURCED, active=fake_python(checkout / "c", torch=False),
                             PIP_EXTRA_INDEX_URL="https://download.pytorch.org/whl/cpu").stdout


def test_the_whole_story_goes_on_with_an_interrupted_run_and_leaves_a_finished_one(checkout):
    env = fake_python(checkout / "env")
    for run, state in (("demo", "finished"), ("demo-2", "stopped")):
        (checkout / "runs" / run).mkdir(parents=True)
        (checkout / "runs" / run / "status.json").write_text(f'{{"state": "{state}"}}')
    done = bash(checkout, "single_machine.sh", active=env)
    assert done.returncode == 0, done.stderr
    assert [command.split(" --length")[0] for command in commands(env)[1:]] == [
        "-m txl.data --dataset=stdlib", "launch.py --config=demo --name=demo-2 --backend=local",
        "-m txl.evaluate --run=runs/demo-2", "-m txl.generate --run=runs/demo-2"]
    assert "The run is in runs/demo-2" in done.stdout
