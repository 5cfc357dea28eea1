from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster.boot import Limits, user_data
from cluster.rehearsal import keeper
from cluster.rehearsal.bench import Bench
from cluster.rehearsal.hosts import Knobs
from tests.cluster.rehearsal.aws import SPOT, Caller, eventually
from tests.cluster.sshd import needs_sshd

pytestmark = needs_sshd
CHECKOUT = Path(__file__).parents[3]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA nobody"
WATCHED = {"UserData": user_data(Limits(), KEY), "InstanceInitiatedShutdownBehavior": "terminate"}


@pytest.fixture
def aws(bench) -> Caller:
    return Caller(bench.ec2.url)


def test_the_environment_leads_to_the_rehearsal_and_to_nothing_of_the_users(bench, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "production")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "theirs")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    script = "import boto3; print(boto3.client('sts').get_caller_identity()['Arn'])"
    asked = subprocess.run([sys.executable, "-c", script], env=bench.env, capture_output=True, text=True,
                           timeout=120)
    assert asked.stdout == "arn:aws:sts::123456789012:user/moto\n", asked.stderr
    assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN"} & {*bench.env}
    assert Path(bench.env["TXL_HOME"]).is_relative_to(bench.folder)


def test_the_real_watchdog_ends_a_machine_that_nobody_uses_after_twenty_minutes(bench, aws):
    used, unused = aws.run(2, **SPOT, **WATCHED)
    assert len(bench.billable()) == 2
    assert bench.unguarded() == []                            # even before they run: it comes with the boot
    aws.until("running", used, unused)
    eventually(lambda: bench.hosts[used].booted and bench.hosts[unused].booted)
    eventually(lambda: not bench.unguarded())
    bench.advance(19 * 60)
    (bench.hosts[used].root / "var/lib/txl/lease/hold").write_text("here I am")
    deadline = bench.hosts[used].root / "var/lib/txl/deadline.json"
    eventually(lambda: json.loads(deadline.read_text())["in_s"] > 1190)
    bench.advance(2 * 60)
    aws.until("terminated", unused)
    assert aws.one(used)["State"]["Name"] == "running"
    assert [line.split()[0] for line in bench.billable()] == [used]
    later, = aws.run(**WATCHED)                               # born after the travels: they are not its own
    aws.until("running", later)
    eventually(lambda: bench.hosts[later].booted and not bench.unguarded())
    bench.advance(25 * 60)
    aws.until("terminated", used, later)
    assert bench.billable() == bench.leftovers() == []


def test_a_machine_without_a_living_watchdog_is_unguarded(bench, aws):
    bare, = aws.run()
    watched, = aws.run(**WATCHED)
    aws.until("running", bare, watched)
    eventually(lambda: bench.hosts[watched].booted and bench.unguarded() == [f"{bare} running"])
    for word in (b"txl/watch\0", b"watchdog.py"):               # first what would start it anew
        for pid in bench.hosts[watched].processes():
            if word in keeper.command(pid):
                os.kill(pid, signal.SIGKILL)
    assert bench.unguarded() == [f"{bare} running", f"{watched} running"]
    aws.ec2.terminate_instances(InstanceIds=[bare, watched])
    assert bench.unguarded() == []


def test_a_masked_shutdown_does_not_keep_a_machine_for_ever(bench, aws):
    bench.hosts.next = [Knobs(shutdown_works=False)]
    id, = aws.run(**WATCHED)
    aws.until("running", id)
    eventually(lambda: bench.hosts[id].booted and not bench.unguarded())
    bench.advance(21 * 60)
    log = bench.hosts[id].root / "var/lib/txl/watchdog.log"
    eventually(lambda: log.exists() and "shutdown -P now" in log.read_text())
    assert aws.one(id)["State"]["Name"] == "running"
    bench.advance(61)
    aws.until("terminated", id)


def test_addresses_and_volumes_cost_until_they_are_gone_and_must_say_when_they_expire(bench, aws):
    tags = [{"Key": "txl:expires", "Value": "2030-01-01T00:00:00Z"}]
    named = aws.ec2.allocate_address(TagSpecifications=[{"ResourceType": "elastic-ip", "Tags": tags}])["AllocationId"]
    nameless = aws.ec2.allocate_address()["AllocationId"]
    volume = aws.ec2.create_volume(AvailabilityZone="us-east-1a", Size=20)["VolumeId"]
    assert [line.split()[0] for line in bench.billable()] == [named, nameless, volume]
    assert bench.unguarded() == [nameless, volume]
    aws.ec2.create_security_group(GroupName="txl-x", Description="x")
    aws.ec2.create_placement_group(GroupName="txl-x", Strategy="cluster")
    assert [line.split()[0] for line in bench.leftovers()] == [
        "security", "placement", "address", "address", "volume"]


def test_the_bill_counts_hours_travelled_until_the_machine_ends(bench, aws):
    first, = aws.run(kind="p3dn.24xlarge", zone="us-east-1c", **SPOT)
    second, = aws.run(kind="p3dn.24xlarge", zone="us-east-1d")
    bench.advance(1800)
    aws.ec2.terminate_instances(InstanceIds=[first])
    bench.advance(1800)
    bill = {line.id: line for line in bench.bill()}
    assert bill[first].hours == pytest.approx(.5, abs=.01)
    assert bill[second].hours == pytest.approx(1, abs=.01)
    assert bill[second].usd == pytest.approx(31.212 * bill[second].hours)
    assert bill[first].usd == pytest.approx(31.212 * .35 * 1.02 * bill[first].hours, rel=1e-5)
    assert (bill[first].market, bill[second].market) == ("spot", "ondemand")


def test_ec2_takes_a_spot_machine_back(bench, aws):
    id, = aws.run(**SPOT)
    aws.until("running", id)
    bench.reclaim(id)
    aws.until("terminated", id)
    assert aws.one(id)["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    assert bench.hosts[id].processes() == set()


STAGE = """
    import sys, time
    from pathlib import Path
    from cluster.rehearsal.bench import Bench
    from tests.cluster.rehearsal.aws import Caller, eventually
    from tests.cluster.rehearsal.test_bench import WATCHED

    with Bench(Path(sys.argv[1]), remove=len(sys.argv) > 2) as bench:
        ids = Caller(bench.ec2.url).run(2, **WATCHED)
        eventually(lambda: all(bench.hosts[id].processes() and bench.hosts[id].booted for id in ids))
        eventually(lambda: not bench.unguarded())
        print("up", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays_however_the_bench_ends(tmp_path, sign):
    folder = tmp_path / "bench"
    stage = subprocess.Popen([sys.executable, "-c", textwrap.dedent(STAGE), folder, "remove"], cwd=CHECKOUT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             start_new_session=True)
    assert stage.stdout is not None
    assert stage.stdin is not None
    try:
        assert stage.stdout.readline() == "up\n"
        them = keeper.processes(folder)
        assert len(them) >= 6                     # on each: its sshd, the watchdog, and the shell that keeps it
        stage.send_signal(sign)
        stage.wait(120)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in them))
        eventually(lambda: not folder.exists())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)
        stage.stdin.close()
        stage.stdout.close()
        stage.wait()


def test_a_rehearsal_says_what_it_needs(tmp_path):
    (tmp_path / "moto.py").write_text("raise ImportError('No module named moto')")
    script = ("from pathlib import Path\nfrom cluster.rehearsal.bench import Bench\nprint('imported')\n"
              "try:\n    Bench(Path('b')).__enter__()\nexcept RuntimeError as error:\n    print(error)")
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"})
    assert said.stdout.startswith("imported\nA rehearsal needs moto"), said
    assert "pip install -r requirements.txt" in said.stdout


def test_two_rehearsals_one_after_the_other_know_nothing_of_each_other(tmp_path):
    for name in ("a", "b"):
        with Bench(tmp_path / name) as bench:
            aws = Caller(bench.ec2.url)
            assert aws.all() == []
            aws.run(2)
            assert len(bench.instances()) == 2
