"""The real ncluster, which people still have: `ls` shows our machines, `kill` ends them and nobody else's."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from cluster import aws
from cluster.journal import owner_name
from cluster.rehearsal.bench import FREE
from cluster.run import Broken, Stopped
from tests.cluster.launching import Person, plan_of, requests
from tests.cluster.sshd import needs_sshd

# What its command line imports, of today; all that it asks for would bring a hundred MB more.
NEEDED = ("boto3", "boto3-type-annotations", "paramiko", "portalocker", "pytz")
SHIM = "import collections, collections.abc; collections.Iterable = collections.abc.Iterable\n"   # gone in Python 3.10
MAKE_KEY = "from ncluster import ncluster_cloud_setup; ncluster_cloud_setup.keypair_setup()"
OURS, THEIRS = f"ncluster-{owner_name()}", "ncluster-somebody"
READY = "Bringing the code"
pytestmark = [pytest.mark.slow, needs_sshd, pytest.mark.skipif(
    "-" in owner_name(), reason="ncluster takes no user's name with a '-'")]


class Ncluster:
    """Its environment, and the command in it."""

    def __init__(self, folder: Path):
        self._venv, self.home = folder / "venv", folder / "home"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self._venv], check=True, timeout=120)
        self._pip(*NEEDED)
        self._pip("--no-deps", "ncluster==0.1.91")
        (packages,) = self._venv.glob("lib/python*/site-packages")
        (packages / "shim.pth").write_text(SHIM)
        self.home.mkdir()

    def __call__(self, *words: str, answer: str = "") -> str:
        return self._python(self._venv / "bin/ncluster", *words, answer=answer)

    def make_key(self) -> Path:
        """As ncluster does before its first launch. Returns where the private half is."""
        self._python("-c", MAKE_KEY)
        (pem,) = (self.home / ".ncluster").iterdir()
        return pem

    def _python(self, *words: str | Path, answer: str = "") -> str:
        done = subprocess.run([self._venv / "bin/python", *words], input=answer, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"HOME": str(self.home), "USER": owner_name()})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _pip(self, *words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "pip", f"--python={self._venv / 'bin/python'}", "--no-input",
                               "install", "--no-cache-dir", "--no-compile", "--retries=1", "--timeout=10", *words],
                              capture_output=True, text=True, timeout=300)
        if done.returncode and "after connection broken" in done.stderr:
            pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Ncluster:
    return Ncluster(tmp_path_factory.mktemp("ncluster"))


@pytest.fixture
def ncluster(installed, bench) -> Iterator[Ncluster]:
    yield installed
    boto3.client("ec2").delete_key_pair(KeyName=OURS)
    for pem in installed.home.rglob("*.pem"):
        pem.unlink()


def test_ncluster_ls_shows_our_machines_and_kill_ends_them_and_nobody_elses(ncluster, bench):
    ncluster.make_key()
    said = list[str]()

    def act() -> None:
        ours = bench.alive()
        known = {("two", machine.kind[:5], machine.public, owner_name(), machine.private) for machine in ours}
        with another(key=THEIRS) as theirs, another(key=OURS, name="three") as other:
            rows = [line.split() for line in ncluster("ls").splitlines()]
            assert known < {(row[0], *row[3:7]) for row in rows if len(row) > 6}      # between them hours and dollars
            said.append(ncluster("kill", "two", answer="y\n"))
            assert [machine.id for machine in ours if machine.state not in FREE] == []
            assert [bench.world.machines[id].state for id in (theirs, other)] == ["running", "running"]

    while_there_are_machines(bench, act)
    assert "Skipping two launched by (somebody)" in said[0]
    assert "terminating 2 instances: success" in said[0]


def test_the_key_pair_by_which_ncluster_knows_us_opens_no_machine(ncluster, bench):
    pem, said = ncluster.make_key(), list[str]()

    def act() -> None:
        for machine in bench.alive():
            said.append(subprocess.run(
                ["ssh", "-F", "none", "-i", pem, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o",
                 "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-p", str(bench.hosts.port),
                 f"{bench.user}@{machine.public}", "true"], capture_output=True, text=True, timeout=300).stderr)

    while_there_are_machines(bench, act)
    assert [request["KeyName"] for request in requests(bench)] == [OURS]
    assert len(said) == 2
    assert all("Permission denied" in words for words in said)


def test_without_ncluster_s_key_pair_ls_and_reallykill_work(ncluster, bench):
    listed, ended = list[str](), list[str]()

    def act() -> None:
        ours = bench.alive()
        listed.extend(ncluster("ls", "two").splitlines())
        ncluster("reallykill", "two", answer="y\n")
        ended.extend(machine.id for machine in ours if machine.state in FREE)

    while_there_are_machines(bench, act)
    assert len([line for line in listed if line.startswith("two ")]) == 2
    assert len(ended) == 2
    assert "KeyName" not in requests(bench)[0]


def while_there_are_machines(bench, act: Callable[[], None]) -> None:
    """A launch that has `act` done once its machines are ready, and then is given up or finds them gone."""
    with pytest.raises((Stopped, Broken)):
        aws.apply(plan_of(bench), Person(READY, act))


@contextlib.contextmanager
def another(*, key: str, name: str = "two") -> Iterator[str]:
    """The id of a running machine that was launched in another way, perhaps by somebody else."""
    ec2 = boto3.client("ec2")
    made = key not in [pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]]
    if made:
        ec2.create_key_pair(KeyName=key)
    image = next(x for r in ec2.describe_instances()["Reservations"] for x in r["Instances"])["ImageId"]
    (machine,) = ec2.run_instances(ImageId=image, InstanceType="c5.large", KeyName=key, MinCount=1, MaxCount=1,
                                   TagSpecifications=[{"ResourceType": "instance", "Tags": [
                                       {"Key": "Name", "Value": name}]}])["Instances"]
    try:
        ec2.get_waiter("instance_running").wait(InstanceIds=[machine["InstanceId"]], WaiterConfig={"Delay": 1})
        yield machine["InstanceId"]
    finally:
        ec2.terminate_instances(InstanceIds=[machine["InstanceId"]])
        if made:
            ec2.delete_key_pair(KeyName=key)
