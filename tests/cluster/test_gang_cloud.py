"""What can go wrong in the cloud and at the laptop while machines are taken, against the strict EC2 with sshds behind.

After every test each machine that still costs has a living watchdog with a deadline for it.
"""
from __future__ import annotations

import pytest

from cluster import aws, ready
from cluster.rehearsal.hosts import Knobs
from cluster.run import Broken, Stopped
from tests.cluster.launching import Person, needs_machines, plan_of, requests

pytestmark = needs_machines


# --- machines that are not as they must be ---

@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setitem(ready.wait_ready.__kwdefaults__, "patience_s", .2)


def test_a_bad_machine_costs_its_gang_and_another_gang_is_asked_for(bench, impatient):
    bench.hosts.next = [Knobs(), Knobs(disk_gib=1)]
    person = Person("Bringing the code")
    before = len(bench.instances())
    with pytest.raises(Stopped, match=r"Given up. The 2 machine\(s\) of this launch are terminated"):
        aws.apply(plan_of(bench), person)
    first, second = requests(bench)
    assert first["ClientToken"] != second["ClientToken"]
    assert len(bench.instances()) == before + 4
    bad = bench.instances()[before + 1].id
    (told,) = [line for line in person.lines if "1.0 GiB are free on its disk" in line]
    assert "node-1" in told
    assert bad in told
    assert bench.alive() == []


def test_after_two_gangs_with_a_bad_machine_it_gives_up_with_both_reasons(bench, impatient):
    bench.hosts.next = [Knobs(), Knobs(disk_gib=1), Knobs(disk_gib=2), Knobs()]
    with pytest.raises(Broken) as broken:
        aws.apply(plan_of(bench), Person())
    assert "node-1: 1.0 GiB are free" in str(broken.value)
    assert "node-0: 2.0 GiB are free" in str(broken.value)
    assert len(requests(bench)) == 2
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_what_is_wrong_with_all_machines_is_not_tried_twice(bench, impatient):
    bench.hosts.next = [Knobs(disk_gib=1), Knobs(disk_gib=1)]
    with pytest.raises(Broken, match=r"node-0, node-1: 1\.0 GiB are free"):
        aws.apply(plan_of(bench), Person())
    assert len(requests(bench)) == 1
    assert bench.alive() == []
