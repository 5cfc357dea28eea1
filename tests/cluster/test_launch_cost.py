"""What a launch costs at the laptop does not grow with the machines, but for what each of them has to be told."""
from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.launch import PYTHON3, Relay, handshakes, log_of
from cluster import aws
from cluster.rehearsal.hosts import Knobs
from tests.cluster.launching import Person, plan_of
from tests.cluster.sshd import needs_sshd

pytestmark = [pytest.mark.slow, needs_sshd]
DATA_BYTES = 1 << 20


class Cost(NamedTuple):
    calls: Counter[str]
    sent: int                                     # bytes from the laptop
    steps: int                                    # commands and copies at node 0
    ssh: int                                      # processes here
    handshakes: list[tuple[int, int]]             # of each machine: with the laptop, and with node 0


def test_four_machines_cost_the_laptop_as_many_calls_and_bytes_as_one(bench, monkeypatch, tmp_path):
    bench.world.boot_s = 0                        # else it is the clock's to say how often EC2 is asked after them
    (tmp_path / "data/stdlib").mkdir(parents=True)
    (tmp_path / "data/stdlib/text").write_bytes(os.urandom(DATA_BYTES))
    one, four = (cost(bench, monkeypatch, count) for count in (1, 4))
    assert four.calls == one.calls + Counter(CreatePlacementGroup=1)
    assert four.steps <= 1.5 * one.steps          # what takes long where the machines have processors of their own
    assert one.handshakes == [(1, 0)]
    assert four.handshakes == [(1, 0), (0, 1), (0, 1), (0, 1)]        # until it is followed
    assert four.ssh <= one.ssh + 6                # what node 0 is told, hands on, copies
    assert one.sent > DATA_BYTES
    assert four.sent - one.sent < 12_000          # what node 0 is told of the others, and they of themselves


def cost(bench, monkeypatch, count: int) -> Cost:
    """Of a launch up to its supervisors, on machines that do nothing for the training."""
    bench.hosts.next += [Knobs(scripts=(("python3", PYTHON3),))] * count
    log = bench.folder / f"ssh-{count}"
    shim = bench.folder / f"bin-{count}/ssh"
    shim.parent.mkdir()
    shim.write_text(f"#!/bin/sh\necho >> {log}\nexec {shutil.which('ssh')} \"$@\"\n")
    shim.chmod(0o755)
    before = len(bench.instances())
    bench.ec2.calls.clear()
    with Relay(bench.hosts.port) as relay:
        monkeypatch.setenv("TXL_SSH_PORT", str(relay.port))
        monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
        job = aws.apply(plan_of(bench, count=count, name=f"of-{count}"), Person())
        machines = sorted(bench.instances()[before:], key=lambda machine: machine.node)
        sent, calls = sum(relay.sent[machine.public] for machine in machines), Counter(
            call.action for call in bench.ec2.calls)
        steps = log_of(bench, machines[0].id).count("Starting session: ")
        logins = handshakes(bench, [machine.id for machine in machines], Path(os.environ["TXL_HOME"]))
        processes = len(log.read_text().splitlines())
        job.close()
    return Cost(calls, sent, steps, processes, logins)
