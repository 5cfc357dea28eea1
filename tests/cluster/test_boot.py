"""User-data as cloud-init takes it apart, and its script run by real shells below a folder that stands for the root."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from email import message_from_string
from pathlib import Path

import pytest

from cluster import boot
from cluster.boot import Limits, user_data
from cluster.host import watchdog
from cluster.rehearsal import keeper
from tests.waiting import until

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ4mYv me@laptop"
QUICK = Limits(no_lease_s=1, tick_s=0.2)
SHELLS = [shell for shell in (("dash",), ("bash", "--posix"), ("busybox", "sh")) if shutil.which(shell[0])]


def parts(limits: Limits = QUICK) -> dict[str, str]:
    return {part.get_content_type(): part.get_payload(decode=True).decode()
            for part in message_from_string(user_data(limits, KEY)).get_payload()}


class Machine:
    """A folder as a machine's root; programs that would end a machine are stand-ins that write down their calls."""

    def __init__(self, root: Path):
        self.root, self.home = root, root / "var/lib/txl"
        (root / "bin").mkdir()
        self.stand_in("shutdown", f'echo "shutdown $*" >>"{root}/calls"')
        self.stand_in("python3", f'exec "{sys.executable}" "$@"')
        self.path = f"{root}/bin:{os.environ['PATH']}"

    def stand_in(self, name: str, line: str):
        (self.root / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.root / "bin" / name).chmod(0o755)

    def boots(self, limits: Limits, shell: tuple[str, ...] = ("sh",)):
        hook = self.root / "hook"
        hook.write_text(parts(limits)["text/cloud-boothook"])
        done = subprocess.run([*shell, str(hook)], env={"TXL_ROOT": str(self.root), "PATH": self.path}, cwd="/",
                              capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def read(self, name: str):
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.home / name).read_text())

    def pids(self, word: str) -> list[int]:
        """Of living processes of this machine whose command line has the word."""
        return [pid for pid in keeper.processes(self.root) if word.encode() in keeper.command(pid)]


@pytest.fixture
def machine(tmp_path):
    m = Machine(tmp_path)
    yield m
    keeper.end(m.root)


def test_it_is_a_script_for_every_boot_and_a_key_of_who_may_log_in():
    yaml = pytest.importorskip("yaml")
    found = parts()
    assert list(found) == ["text/cloud-boothook", "text/cloud-config"]
    assert found["text/cloud-boothook"].startswith("#!/bin/sh\n")
    assert found["text/cloud-config"].startswith("#cloud-config\n")
    assert yaml.safe_load(found["text/cloud-config"]) == {
        "ssh_authorized_keys": [KEY], "allow_public_ssh_keys": False}


def test_the_same_machines_get_the_same_to_the_byte_and_it_fits():
    assert user_data(Limits(), KEY) == user_data(Limits(), KEY + "\n")
    rsa = f"ssh-rsa {'A' * 716} me@laptop"                            # of 4096 bits
    assert len(user_data(Limits(budget_s=12345.678), rsa).encode()) <= 16384
    with pytest.raises(ValueError, match="EC2 takes 16384"):
        user_data(Limits(), f"{KEY} {'x' * 16384}")


@pytest.mark.parametrize("key", ["", "AAAA", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r", f"{KEY}\n{KEY}"])
def test_what_is_not_a_public_key_is_neither_sent_nor_shown(key):
    with pytest.raises(ValueError, match="public half") as refused:
        user_data(Limits(), key)
    assert "b3Bl" not in str(refused.value)


@pytest.mark.parametrize("wrong", [{"max_s": float("inf")}, {"no_lease_s": 0}, {"tick_s": 0}, {"budget_s": -1.0},
                                   {"after_success_s": -1}, {"max_s": float("nan")}])
def test_limits_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_the_limits_of_both_sides_are_the_same():
    assert asdict(Limits()) == watchdog.TERMS


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_any_shell_brings_the_files_over_whole(machine, shell):
    limits = Limits(budget_s=5000.5)
    machine.boots(limits, shell)
    assert (machine.home / "watchdog.py").read_bytes() == Path(watchdog.__file__).read_bytes()
    assert machine.read("terms.json") == asdict(limits)
    assert (machine.home / "lease").stat().st_mode & 0o7777 == 0o1777
    assert until(lambda: machine.read("deadline.json"))["why"] == "no lease"


def test_a_machine_that_nobody_reaches_powers_itself_off(machine):
    machine.boots(Limits(tick_s=0.05))
    until(lambda: machine.read("deadline.json"))
    assert not (machine.root / "calls").exists()
    (machine.home / "clock").write_text("1200")                       # twenty minutes later
    until(lambda: (machine.root / "calls").exists())
    assert (machine.root / "calls").read_text() == "shutdown -P now\n"


def test_another_boot_keeps_the_watchdog_that_runs_and_a_killed_one_comes_back_with_its_age(machine):
    machine.boots(Limits(tick_s=0.05))
    until(lambda: machine.read("deadline.json"))
    (machine.home / "clock").write_text("1000")
    until(lambda: machine.read("age.json")["age"] >= 1000)
    first = machine.pids("watchdog.py")
    machine.boots(Limits(tick_s=0.05))
    until(lambda: len(machine.pids("/hook\0") + machine.pids("/watch\0")) == 1)      # the second one has left
    assert machine.pids("watchdog.py") == first
    os.kill(*first, signal.SIGKILL)
    until(lambda: machine.read("deadline.json")["in_s"] <= 200 - 60)  # a restart costs a minute
    assert machine.pids("watchdog.py") != first


@pytest.mark.parametrize("python", ["is missing", "is broken"])
def test_without_a_python_the_shell_alone_powers_it_off(machine, python):
    for name in ("cat", "chmod", "mkdir", "mv", "setsid", "sh", "sleep"):
        (machine.root / "bin" / name).symlink_to(shutil.which(name))
    if python == "is missing":
        (machine.root / "bin" / "python3").unlink()
    else:
        machine.stand_in("python3", "exit 1")
    machine.path = f"{machine.root}/bin"
    begin = time.monotonic()
    machine.boots(QUICK)
    until(lambda: (machine.root / "calls").exists())
    assert time.monotonic() - begin >= QUICK.no_lease_s
    assert (machine.root / "calls").read_text() == "shutdown -P now\n"


def test_a_full_disk_at_a_later_boot_leaves_the_files_of_the_one_before(machine):
    machine.boots(Limits())
    until(lambda: machine.read("deadline.json"))
    machine.stand_in("cat", "exit 1")
    machine.boots(Limits(max_s=7))
    assert (machine.home / "watchdog.py").read_bytes() == Path(watchdog.__file__).read_bytes()
    assert machine.read("terms.json") == asdict(Limits())


def test_with_systemd_there_is_a_unit_for_every_boot_and_a_timer_beside_it(machine, tmp_path):
    """The script as root, in a mount namespace in which what it writes to is covered by empty folders."""
    for name in ("systemctl", "systemd-run"):
        machine.stand_in(name, f'echo {name} "$@" >>"{tmp_path}/calls"')
    (tmp_path / "hook").write_text(parts(Limits(max_s=7200, budget_s=5400.5))["text/cloud-boothook"])
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", f"""
        for place in /run /etc/systemd /var/lib /proc/sys/kernel; do mount -t tmpfs covered $place; done
        mkdir -p /run/systemd/system /etc/systemd/system
        PATH={tmp_path}/bin:$PATH sh {tmp_path}/hook
        cp /etc/systemd/system/txl-watchdog.service /proc/sys/kernel/panic {tmp_path}
        ls /var/lib/txl"""], capture_output=True, text=True) if shutil.which("unshare") else None
    if done is None or "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["lease", "terms.json", "watch", "watchdog.py"]
    assert (tmp_path / "txl-watchdog.service").read_text() == boot.UNIT
    assert (tmp_path / "panic").read_text() == "30\n"             # seconds until a kernel that panics boots again
    assert (tmp_path / "calls").read_text().splitlines() == [
        "systemctl daemon-reload",
        "systemctl enable txl-watchdog.service",
        "systemctl start --no-block txl-watchdog.service",
        "systemd-run --no-block --unit=txl-last --on-active=5401 systemctl poweroff --force"]
    if shutil.which("systemd-analyze"):
        verdict = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "txl-watchdog.service")],
                                 capture_output=True, text=True, timeout=120)
        assert "txl-watchdog" not in verdict.stderr
