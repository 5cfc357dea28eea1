from __future__ import annotations

import getpass
import json
import subprocess
import sys
import time
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from functools import partial
from pathlib import Path

import pytest

from cluster.rehearsal import keeper
from cluster.rehearsal.hosts import Host, Knobs
from tests.cluster.rehearsal.aws import Caller, eventually
from tests.cluster.sshd import needs_sshd

pytestmark = needs_sshd
HOOK = """\
txl="${TXL_ROOT:-}/var/lib/txl"
echo "boot $INSTANCE_ID" >> "$txl/boots"
echo '{"tick_s": 5, "max_s": 60}' > "$txl/terms.json"
setsid sleep 1000 < /dev/null > /dev/null 2>&1 &
"""


class Laptop:
    """A key, and ssh and rsync with it as anybody would use them."""

    def __init__(self, bench, folder: Path):
        self.bench, self.key, self.known = bench, folder / "key", folder / "known_hosts"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        self.aws = Caller(bench.ec2.url)
        parts = MIMEMultipart()
        parts.attach(MIMEText(HOOK, "cloud-boothook"))
        keys = {"ssh_authorized_keys": [self.key.with_suffix(".pub").read_text().strip()]}
        parts.attach(MIMEText(f"#cloud-config\n{json.dumps(keys)}\n", "cloud-config"))
        self.user_data = parts.as_string()

    def launch(self, *knobs: Knobs, count: int = 1, kind: str = "p4d.24xlarge", **more) -> list[str]:
        """Ids of machines that run and, unless their knobs say otherwise, answer."""
        self.bench.hosts.next += knobs
        ids = self.aws.run(count, kind=kind, **{
            "UserData": self.user_data, "InstanceInitiatedShutdownBehavior": "terminate"} | more)
        self.aws.until("running", *ids)
        for id in ids:
            if self.bench.hosts[id].knobs == Knobs():
                eventually(partial(self.answers, id))
        return ids

    def answers(self, id: str) -> bool:
        return self.ssh(id, "true").returncode == 0

    def address(self, id: str) -> str:
        return self.aws.one(id)["PublicIpAddress"]

    def options(self, id: str) -> list[str]:
        return ["-F", "none", "-i", str(self.key), "-p", str(self.bench.hosts.port), "-o", "BatchMode=yes", "-o",
                "StrictHostKeyChecking=accept-new", "-o", f"UserKnownHostsFile={self.known}", "-o",
                f"HostKeyAlias={id}", "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR", "-o",
                "KexAlgorithms=curve25519-sha256"]            # two thirds of the time of the default

    def ssh(self, id: str, command: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ssh", *self.options(id), f"{getpass.getuser()}@{address or self.address(id)}", command],
                              capture_output=True, text=True, timeout=120)

    def rsync(self, id: str, source: str, target: str) -> None:
        subprocess.run(["rsync", "-a", "-e", " ".join(["ssh", *self.options(id)]), source,
                        f"{getpass.getuser()}@{self.address(id)}:{target}"], check=True, timeout=120)


@pytest.fixture
def laptop(bench, tmp_path) -> Laptop:
    return Laptop(bench, tmp_path)


def test_each_machine_is_at_home_in_a_folder_of_its_own(bench, laptop, tmp_path):
    ids = laptop.launch(count=2)
    for id in ids:
        host: Host = bench.hosts[id]
        said = laptop.ssh(id, 'pwd; echo "$HOME"; echo "$TXL_ROOT $TXL_HOST"; echo "it\'s" a  "two  spaces"; exit 7')
        assert said.stdout.splitlines() == [str(host.home), str(host.home), f"{host.root} {id}", "it's a two  spaces"]
        assert said.returncode == 7
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code/a file").write_text(id)
        laptop.rsync(id, f"{tmp_path}/code/", "txl/")
    assert [laptop.ssh(id, "cat 'txl/a file'").stdout for id in ids] == ids
    inside = subprocess.run(["ssh", *laptop.options(ids[0]), "-tt", f"{getpass.getuser()}@{laptop.address(ids[0])}"],
                            input="echo $((6 * 7)) $TXL_HOST\nexit\n", capture_output=True, text=True, timeout=120)
    assert f"42 {ids[0]}" in inside.stdout


def test_only_the_key_of_the_user_data_opens(laptop, tmp_path):
    id, = laptop.launch()
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    laptop.key = stranger
    said = laptop.ssh(id, "true")
    assert said.returncode == 255
    assert "Permission denied" in said.stderr


@pytest.mark.parametrize("allowed", [True, False])
def test_a_key_pair_opens_unless_the_user_data_says_no(laptop, allowed, tmp_path):
    made = laptop.aws.ec2.create_key_pair(KeyName="theirs")
    keys = {"ssh_authorized_keys": [laptop.key.with_suffix(".pub").read_text().strip()]} | (
        {} if allowed else {"allow_public_ssh_keys": False})
    id, = laptop.launch(KeyName="theirs", UserData=f"#cloud-config\n{json.dumps(keys)}\n")
    laptop.key = tmp_path / "theirs.pem"
    laptop.key.write_text(made["KeyMaterial"])
    laptop.key.chmod(0o600)
    assert laptop.answers(id) == allowed


def test_the_machine_has_what_its_kind_has(laptop):
    with_efa = {"NetworkInterfaces": [{"DeviceIndex": 0, "SubnetId": laptop.aws.subnets["us-east-1c"],
                                       "InterfaceType": "efa", "AssociatePublicIpAddress": True}]}
    id, = laptop.launch(kind="p3dn.24xlarge", **with_efa)
    said = laptop.ssh(id, "nvidia-smi -L | grep -c '^GPU .*V100'; sudo -n -E A=1 sh -c 'echo $A'; "
                          "cloud-init status --wait; fi_info -p efa | head -1; "
                          "python3 -c 'import sys; print(sys.prefix)'; "
                          "nvidia-smi --query-gpu=index,memory.total --format=csv,noheader,nounits")
    assert said.stdout.splitlines() == ["8", "1", "status: done", "provider: efa", sys.prefix] + [
        f"{i}, 32768" for i in range(8)]
    plain, = laptop.launch(kind="c5.large")
    assert laptop.ssh(plain, "nvidia-smi; echo $?; fi_info -p efa; echo $?").stdout.split() == ["9", "61"]


def test_a_machine_that_is_terminated_takes_all_its_processes_with_it(bench, laptop):
    first, second = laptop.launch(count=2)
    laptop.ssh(first, "setsid sh -c 'sleep 1000; true' > /dev/null 2>&1 &")       # in a session of its own
    host = bench.hosts[first]
    began = subprocess.Popen(["ssh", *laptop.options(first), f"{getpass.getuser()}@{laptop.address(first)}",
                              "env -i sleep 1000"], stderr=subprocess.DEVNULL)    # without the marker, but of its sshd
    eventually(lambda: sum(b"sleep" in keeper.command(pid) for pid in host.processes()) == 4)
    laptop.aws.ec2.terminate_instances(InstanceIds=[first])
    laptop.aws.until("terminated", first)
    assert host.processes() == set()
    assert began.wait(120) == 255
    assert laptop.ssh(second, "true").returncode == 0


@pytest.mark.parametrize("command", ["shutdown -P now", "sudo -n poweroff", "systemctl poweroff --force --force"])
def test_power_off_from_inside_ends_the_bill(bench, laptop, command):
    id, = laptop.launch()
    laptop.ssh(id, command)
    laptop.aws.until("terminated", id)
    assert laptop.aws.one(id)["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
    assert bench.billable() == []
    assert bench.hosts[id].processes() == set()


def test_power_off_from_inside_stops_a_machine_that_is_to_stop(laptop):
    id, = laptop.launch(InstanceInitiatedShutdownBehavior="stop")
    laptop.ssh(id, "shutdown -P now")
    laptop.aws.until("stopped", id)


def test_a_reboot_runs_the_boot_hook_again_and_keeps_key_files_and_address(bench, laptop):
    id, = laptop.launch()
    host, address = bench.hosts[id], laptop.address(id)
    laptop.ssh(id, "touch kept; setsid sleep 999 > /dev/null 2>&1 &")
    laptop.aws.ec2.reboot_instances(InstanceIds=[id])
    boots = host.root / "var/lib/txl/boots"
    eventually(lambda: boots.read_text() == f"boot {id}\n" * 2)
    eventually(lambda: laptop.ssh(id, "true").returncode == 0)                    # known_hosts would refuse another key
    assert laptop.ssh(id, "ls").stdout == "kept\n"
    assert not any(b"999" in keeper.command(pid) for pid in host.processes())
    assert laptop.address(id) == address
    assert json.loads((host.root / "var/lib/txl/terms.json").read_text()) == {"tick_s": 0.2, "max_s": 60}
    laptop.ssh(id, "reboot")
    eventually(lambda: boots.read_text() == f"boot {id}\n" * 3)


def test_a_machine_answers_at_every_address_it_has(laptop):
    id, = laptop.launch()
    own, private = laptop.address(id), laptop.aws.one(id)["PrivateIpAddress"]
    assert laptop.ssh(id, "true", private).returncode == 0
    elastic = laptop.aws.ec2.allocate_address(Domain="vpc")
    laptop.aws.ec2.associate_address(InstanceId=id, AllocationId=elastic["AllocationId"])
    eventually(lambda: laptop.ssh(id, "true", elastic["PublicIp"]).returncode == 0)
    eventually(lambda: laptop.ssh(id, "true", own).returncode == 255)
    laptop.aws.ec2.stop_instances(InstanceIds=[id])
    laptop.aws.until("stopped", id)
    assert laptop.ssh(id, "true", private).returncode == 255
    laptop.aws.ec2.start_instances(InstanceIds=[id])
    eventually(lambda: laptop.ssh(id, "true", elastic["PublicIp"]).returncode == 0)


def test_two_machines_reach_one_another_privately(laptop):
    first, second = laptop.launch(count=2)
    laptop.rsync(first, str(laptop.key), ".ssh/id")
    private = laptop.aws.one(second)["PrivateIpAddress"]
    said = laptop.ssh(first, f"ssh -F none -i .ssh/id -p {laptop.bench.hosts.port} -o StrictHostKeyChecking=no "
                             f"-o UserKnownHostsFile=/dev/null {getpass.getuser()}@{private} 'echo $TXL_HOST'")
    assert said.stdout.strip() == second


def test_knobs_make_a_machine_other_than_it_should_be(bench, laptop):
    silent, late, poor, locked, dropped = laptop.launch(
        Knobs(answers=False), Knobs(answers_after_s=1.5, init_s=2.5, init_status="error"),
        Knobs(gpus=7, disk_gib=9, clock_off_s=3600, efa=True), Knobs(shutdown_works=False),
        Knobs(drops_after_s=1), count=5)
    eventually(lambda: laptop.ssh(poor, "true").returncode == 0)
    assert laptop.ssh(poor, "nvidia-smi -L | wc -l").stdout == "7\n"
    assert laptop.ssh(poor, "df -Pk . | awk 'NR == 2 { print $4 / 2 ^ 20 }'").stdout == "9\n"
    asked = time.time()
    assert asked + 3599 <= int(laptop.ssh(poor, "date +%s").stdout) <= time.time() + 3600
    assert laptop.ssh(poor, "fi_info -p efa").returncode == 0
    eventually(lambda: laptop.ssh(locked, "shutdown -P now").returncode == 0)
    eventually(lambda: laptop.ssh(late, "true").returncode == 0)
    root = bench.hosts[late].root
    assert (root / "etc/host_key").stat().st_mtime - (root / "run/boothook").stat().st_mtime > 1
    said = laptop.ssh(late, "cloud-init status --wait")
    assert (said.returncode, said.stdout) == (1, "status: error\n")
    log = bench.hosts[dropped].root / "var/log/sshd.log"
    eventually(lambda: log.exists() and "Server listening" in log.read_text())
    eventually(lambda: laptop.ssh(dropped, "true").returncode == 255)
    for id in (locked, dropped):
        assert laptop.aws.one(id)["State"]["Name"] == "running"   # what the first was told to do it did not
        assert any(b"sleep" in keeper.command(pid) for pid in bench.hosts[id].processes())
    assert laptop.ssh(silent, "true").returncode == 255
    assert bench.hosts[silent].booted


def test_a_machine_can_come_back_with_another_host_key(laptop):
    id, = laptop.launch(Knobs(new_host_key=True))
    eventually(lambda: laptop.ssh(id, "true").returncode == 0)
    laptop.aws.ec2.reboot_instances(InstanceIds=[id])
    eventually(lambda: "REMOTE HOST IDENTIFICATION HAS CHANGED" in laptop.ssh(id, "true").stderr)
