"""A rehearsal walks the whole way: machines, code, training over gloo, watchdogs, the bill, and nothing left."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.sshd import needs_sshd

CHECKOUT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, needs_sshd]


def rehearsed(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run([sys.executable, str(CHECKOUT / "launch.py"), *argv], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=300, check=False)


def test_a_rehearsal_trains_on_two_machines_and_leaves_nothing(tmp_path):
    done = rehearsed("--config=test_2", "--rehearse", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2 rank(s) on cpu" in done.stdout
    assert "Finished at step 60: test ppl" in done.stdout
    hours = [float(hours) for hours in re.findall(r"^node-\d .* ([\d.]+) h ", done.stdout, re.MULTILINE)]
    assert len(hours) == 2
    assert all(10 / 60 < h < 15 / 60 for h in hours)              # ten minutes after success, not sixty
    assert done.stdout.endswith("Left over: nothing.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("drill", "says", "alive_h"), [
    ("capacity", "InsufficientInstanceCapacity\nAsking for 2 x p3dn.24xlarge", (10 / 60, 15 / 60)),
    ("no_capacity", "Nothing of this launch is left.", None),
    ("launcher_dies", "It is training there already: following it.", (10 / 60, 15 / 60)),
    ("launcher_dies_early", "(the launcher is killed; 21 minutes later)", (20 / 60, 25 / 60)),
    ("interrupt", "node-1: its machine is gone", (1.0, 1.2)),
    ("host_dies", "node-0: its machine is gone", (1.0, 1.2)),
    ("throttled", "Finished at step 60", (10 / 60, 15 / 60)),
    ("budget", "not 10 minutes more at", (18 / 60, 25 / 60)),
])
def test_a_drill_ends_as_it_should_and_leaves_nothing(drill, says, alive_h, tmp_path, stdlib):
    (tmp_path / "data").symlink_to(stdlib)
    done = rehearsed("--config=test_2", f"--drill={drill}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    hours = [float(hours) for hours in re.findall(r"^node-\d .* ([\d.]+) h ", done.stdout, re.MULTILINE)]
    assert bool(hours) == (alive_h is not None)
    if alive_h:
        assert alive_h[0] < max(hours) < alive_h[1]               # of the machine that lived longest
    assert done.stdout.endswith("Left over: nothing.\n")


def test_an_unheard_of_drill_lists_those_there_are(tmp_path):
    done = rehearsed("--config=test_2", "--drill=capcity", cwd=tmp_path)
    assert done.returncode == 2
    assert "There is no drill 'capcity'. Did you mean 'capacity'?" in done.stderr
    assert "host_dies" in done.stderr
