"""The smoke as a whole, in the rehearsal's environment: the commands it gives are real, and so is what they leave."""
from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.smoke import question
from tests.cluster.launching import until
from tests.cluster.sshd import needs_sshd
from tests.cluster.test_ec2 import C5

pytestmark = needs_sshd
CHECKOUT = Path(__file__).parents[2]
CLUSTER = [sys.executable, "-m", "cluster"]


@pytest.fixture
def smoked(bench, tmp_path, monkeypatch):
    """The verb's process; what it makes for itself is below tmp_path."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    programs = []

    def start(*flags: str) -> subprocess.Popen[str]:
        programs.append(subprocess.Popen([*CLUSTER, "smoke", f"--ssh_user={bench.user}", *flags], text=True,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
        program.communicate()


@pytest.mark.slow
def test_a_smoke_passes_where_all_works_with_a_line_for_each_step_and_leaves_nothing(bench, smoked, tmp_path):
    before = len(bench.instances())
    said, _ = (program := smoked("--yes")).communicate(timeout=3000)
    assert program.returncode == 0, said
    told = re.findall(r"^ *\d+ s  (ok|FAILED) +([^:]+): ", said, re.MULTILINE)
    assert told == [("ok", about) for about in (
        "launch until it trains", "kill the launcher", "follow by the same command",
        "stop by Ctrl-C, with a checkpoint", "kill", "gc", "nothing is left")]
    assert len(re.findall(r"^node-\d .* c5\.xlarge +spot .*\$ ", said, re.MULTILINE)) == 2
    assert said.splitlines()[-1].startswith("PASSED: ")
    assert len(bench.instances()) == before + 2
    assert bench.alive() == []
    assert bench.leftovers() == []
    assert not list(tmp_path.glob("txl-smoke-*"))


def test_a_smoke_whose_launch_fails_says_so_and_names_what_is_left(bench, smoked):
    bench.ec2.fail("RunInstances", "UnauthorizedOperation", times=math.inf, status=403)
    bench.ec2.fail("DeleteSecurityGroup", "UnauthorizedOperation", times=math.inf, status=403)
    said, _ = (program := smoked("--yes")).communicate(timeout=300)
    assert program.returncode == 1, said
    assert re.search(r"^ *\d+ s  FAILED  launch until it trains: ", said, re.MULTILINE)
    assert "FAILED: launch until it trains. What was said is in" in said
    assert "EC2 refused the launch, and would anywhere: UnauthorizedOperation" in said
    group, = bench.leftovers()
    assert f"Left are {group.rsplit(' ', 1)[0]}." in said
    bench.ec2.heal()
    assert subprocess.run([*CLUSTER, "gc", "--yes"], timeout=300, check=False).returncode == 0
    assert bench.leftovers() == []


def test_a_smoke_that_is_broken_off_ends_what_it_has_started(bench, smoked):
    program = smoked("--yes")
    assert until(lambda: bench.alive())
    program.send_signal(signal.SIGTERM)
    said, _ = program.communicate(timeout=300)
    assert program.returncode == 130, said
    assert "FAILED: broken off." in said
    assert said.endswith("Nothing is left.\n")
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_a_smoke_whose_launcher_dies_with_machines_on_the_way_ends_them(bench, smoked):
    program = smoked("--yes")
    assert until(lambda: bench.alive())
    launcher, = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    os.kill(int(launcher), signal.SIGKILL)
    said, _ = program.communicate(timeout=300)
    assert program.returncode == 1, said
    assert "launch until it trains: the launcher ended with status -9 without a word of" in said
    assert said.endswith("Nothing is left.\n")
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_machines_that_cannot_be_ended_are_named_with_the_command_that_ends_them(bench, smoked):
    bench.ec2.fail("TerminateInstances", "UnauthorizedOperation", times=math.inf, status=403)
    program = smoked("--yes")
    assert until(lambda: len(bench.alive()) == 2)
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=300)
    assert program.returncode == 130, said
    left, = re.findall(r"^Left are (.*)$", said, re.MULTILINE)
    assert len(bench.alive()) == 2
    assert all(machine.id in left for machine in bench.alive())
    assert all(what in left for what in ("security group sg-", "placement group txl-"))
    bench.ec2.heal()
    command = re.search(r"python -m cluster (kill smoke-\w+)", left)
    assert subprocess.run([*CLUSTER, *command[1].split(), "--yes"], timeout=300, check=False).returncode == 0
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_nothing_is_started_without_a_yes(bench, smoked):
    said, _ = (program := smoked()).communicate(timeout=300)
    assert program.returncode == 2
    assert re.search(r"Launch 2 x c5\.xlarge on spot, .*: \$0\.\d\d per hour \(spot now in .*\), "
                     r"\$0\.39 at the very most", said)
    assert bench.ec2.count("RunInstances") == 0


def test_a_price_that_nobody_knows_is_not_made_up():
    assert "what they cost is not known" in question(replace(C5, name="c5.odd"), {})
