"""Whether machines are ready, asked of real sshds."""
from __future__ import annotations

import re
import threading
import time

import pytest

from cluster import ready
from cluster.ready import BOOTING, Needs, shortcoming
from cluster.ssh import Interrupted, SomeFailed
from tests.cluster.sshd import Machines, letting_in, machines, needs_sshd

NOTHING = Needs(gpus=0, efa=False, disk_gib=0, python=None)
EIGHT = Needs(gpus=8, efa=True, disk_gib=100, python="python3")
pytestmark = needs_sshd


WELL = ("began 1000.0\ncloud-init 0 status: done\ngpus 8 GPU 7: A100\nefa 0 libfabric\npython 0\n"
        "disk_kib 209715200\nended 1020.0\n")


@pytest.mark.parametrize(("change", "reason"), [
    ({}, None),
    ({"cloud-init 0 status: done\n": ""}, None),
    ({"cloud-init 0": "cloud-init 2"}, None),
    ({"cloud-init 0 status: done": "cloud-init 124 ....."}, BOOTING),
    ({"cloud-init 0 status: done": "cloud-init 1 status: error detail: no network"},
     "cloud-init failed: status: error detail: no network"),
    ({"gpus 8 GPU 7: A100": "gpus 7 GPU 6: A100"}, "7 of 8 GPUs are there (nvidia-smi: GPU 6: A100)"),
    ({"gpus 8 GPU 7: A100": "gpus 0 sh: nvidia-smi: not found"},
     "0 of 8 GPUs are there (nvidia-smi: sh: nvidia-smi: not found)"),
    ({"efa 0 libfabric": "efa 61 fi_getinfo: -61 (No data available)"},
     "EFA was asked for and is not there (fi_info: fi_getinfo: -61 (No data available))"),
    ({"python 0": "python 127 sh: python3: not found"}, "python3 does not run: sh: python3: not found"),
    ({"209715200": "10485760"}, "10.0 GiB are free on its disk, needed are 100"),
    ({"1000.0": "1006.0", "1020.0": "1026.0"}, "its clock is 6 s ahead of ours"),
    ({"1000.0": "87400.0", "1020.0": "87420.0"}, "its clock is 86400 s ahead of ours"),
    ({"1000.0": "993.0", "1020.0": "1013.0"}, "its clock is 7 s behind ours"),
    ({"1000.0": "1004.0", "1020.0": "1024.0"}, None),
    ({WELL: "Please login as the user ubuntu"}, "what it answers makes no sense: Please login as the user ubuntu"),
    ({WELL: ""}, "what it answers makes no sense: nothing"),
    ({"disk_kib 209715200": "disk_kib"}, None),
])
def test_what_a_machine_lacks_is_read_from_its_answer(change, reason):
    answer = WELL
    for old, new in change.items():
        assert old in answer
        answer = answer.replace(old, new)
    found = shortcoming(answer, EIGHT, sent=999.0, received=1021.0)
    if "disk_kib\n" in answer:
        assert found.startswith("what it answers makes no sense")
    else:
        assert found == reason


def test_the_way_there_and_back_is_not_taken_for_a_wrong_clock():
    assert shortcoming(WELL, EIGHT, sent=992.0, received=1028.0) is None
    assert shortcoming(WELL, EIGHT, sent=940.0, received=1021.0) is None         # a minute until the login was served
    assert shortcoming(WELL, EIGHT, sent=999.0, received=1081.0) is None
    assert "behind" in shortcoming(WELL, EIGHT, sent=1006.0, received=1081.0)    # it began before it was asked
    assert "ahead" in shortcoming(WELL, EIGHT, sent=940.0, received=1014.0)      # it ended after it was heard


@pytest.fixture
def launched(trio) -> Machines:
    return letting_in(trio)


def test_machines_are_ready_when_each_of_them_is(launched):
    trio = launched
    for machine in trio.all:
        machine.has("cloud-init", f"[ -e {machine.folder}/booted ] || {{ touch {machine.folder}/booted; exit 124; }}")
        machine.has("nvidia-smi", "for i in 0 1; do echo \"GPU $i: V100 (UUID: x)\"; done")
        machine.has("fi_info", "[ \"$*\" = '-p efa' ] && echo 'provider: efa'")
    said = []
    ready.wait_ready(trio.shells, Needs(2, True, 0.001, "python3"), deadline_s=30, say=said.append, patience_s=0)
    assert sorted(re.sub(r"\d+ s", "N s", line) for line in said) == [f"node-{i} is ready (N s)" for i in range(3)]
    assert all((machine.folder / "booted").exists() for machine in trio.all)        # it was still booting at first


def test_every_machine_that_is_not_as_needed_is_named_with_what_it_lacks(launched):
    trio = launched
    trio[0].has("nvidia-smi", "echo 'GPU 0: V100'")
    trio[1].has("nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver *'; exit 9")
    trio[2].has("nvidia-smi", "echo 'GPU 0: V100'")
    trio[2].has("cloud-init", "echo 'status: error'; exit 1")
    with pytest.raises(SomeFailed) as caught:
        ready.wait_ready(trio.shells, Needs(1, False, 0, None), deadline_s=30, say=print, patience_s=0)
    assert str(caught.value) == (
        "2 of 3 machines: node-1: 0 of 1 GPUs are there (nvidia-smi: NVIDIA-SMI has failed: no driver *)\n"
        "  node-2: cloud-init failed: status: error")


def test_what_is_wrong_with_all_is_said_of_all_although_node_0_leads_to_the_others(launched):
    for machine in launched.all:
        machine.has("cloud-init", "echo 'status: error'; exit 1")
    with pytest.raises(SomeFailed) as caught:
        ready.wait_ready(launched.shells, NOTHING, deadline_s=30, patience_s=0)
    assert str(caught.value) == "3 of 3 machines: node-0, node-1, node-2: cloud-init failed: status: error"
    for machine in launched.all[1:]:
        machine.has("cloud-init", "exit 0")
    with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-0: cloud-init failed"):
        ready.wait_ready(launched.shells, NOTHING, deadline_s=30, patience_s=0)


def test_a_wrong_clock_is_found_by_way_of_node_0_too(launched):
    launched[2].has("date", 'exec /bin/date -d "@$(($(/bin/date +%s) - 60))" "$@"')
    with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-2: its clock is (59|60|61) s behind ours"):
        ready.wait_ready(launched.shells, NOTHING, deadline_s=30, patience_s=0)


def test_a_driver_that_is_late_is_waited_for(trio):
    trio[0].has("nvidia-smi", f"[ -e {trio[0].folder}/driver ] && echo 'GPU 0: V100' || touch {trio[0].folder}/driver")
    ready.wait_ready(trio.shells[:1], Needs(1, False, 0, None), deadline_s=30, say=print, patience_s=20)


def test_a_wrong_clock_is_found_on_a_real_machine(trio):
    with pytest.raises(SomeFailed, match=r"1 of 1 machines: node-0: its clock is 3600 s behind ours"):
        ready.wait_ready(trio.shells[:1], NOTHING, deadline_s=30, patience_s=0, clock_now=lambda: time.time() + 3600)


def test_a_machine_that_is_slow_to_start_is_waited_for_and_one_that_never_does_is_named_with_what_ssh_says(tmp_path):
    with machines(tmp_path, 3) as them:
        letting_in(them)[1].stop()
        them[2].stop()
        late = threading.Timer(1, them[1].start)
        late.start()
        with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-2: not ready after 3 s: node-0 cannot reach "
                                             r"it: ssh: connect to host 127\.77\.0\.3 port \d+: Connection refused$"):
            ready.wait_ready(them.shells, NOTHING, deadline_s=3)
        late.join()


def test_a_key_that_is_not_accepted_is_not_waited_for_long(tmp_path):
    with machines(tmp_path, 1) as them:
        them[0].authorized_keys.write_text("")
        with pytest.raises(SomeFailed, match="does not accept our key"):
            ready.wait_ready(them.shells, NOTHING, deadline_s=600, patience_s=1)


def test_waiting_can_be_interrupted(tmp_path):
    with machines(tmp_path, 2) as them:
        letting_in(them)[1].stop()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            ready.wait_ready(them.shells, NOTHING, deadline_s=600, interrupted=lambda: time.monotonic() - began > 1.5)
        assert time.monotonic() - began < ready.LOOK_S / 2              # nor is an answer waited for
