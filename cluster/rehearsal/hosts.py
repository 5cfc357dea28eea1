"""Machines without a cloud: each a folder, a HOME, a private sshd on loopback addresses of its own.

A host has what user-data, ssh and rsync find on a real one: boot hooks, authorized keys, `shutdown` that ends it,
`cloud-init status --wait`, `nvidia-smi`, `fi_info`. It shares this machine's file system, processors and network
interfaces: /tmp and ports that are bound to all addresses are common to all hosts.
"""
from __future__ import annotations

import contextlib
import email
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.local import free_port
from cluster.rehearsal import keeper, sshd

if TYPE_CHECKING:
    from cluster.rehearsal.world import Machine

BOOT_S = 30                                       # the most that a boot hook may take
TICK_S = 0.2                                      # of a machine's watchdog: it notices time travel soon
POLL_S = 0.02


@dataclass(frozen=True)
class Facts:
    """What a kind of machine has."""
    gpus: int = 0
    gpu: str = ""
    gpu_memory_mib: int = 0
    efa: int = 0


@dataclass(frozen=True)
class Knobs:
    """How a machine is other than it should be."""
    answers: bool = True                          # else its sshd is never started
    answers_after_s: float = 0.0                  # after its boot
    init_s: float = 0.0                           # from the boot until cloud-init is done
    init_status: str = "done"                     # or "error"
    drops_after_s: float | None = None            # from its boot: then it can no longer be reached, but runs on
    gpus: int | None = None                       # that nvidia-smi sees
    efa: bool | None = None                       # whether fi_info sees one
    disk_gib: int | None = None                   # that df reports as free
    clock_off_s: int = 0                          # of what date says
    new_host_key: bool = False                    # at every boot
    shutdown_works: bool = True                   # else it says so and does nothing; systemctl poweroff still works
    scripts: tuple[tuple[str, str], ...] = ()     # commands of its own: name, lines of sh


class Host:
    """One machine. `root` is what TXL_ROOT is on it."""

    def __init__(self, id: str, root: Path, tmp: Path, port: int, facts: Facts, knobs: Knobs, user_data: str,
                 public_key: str = "", env: Mapping[str, str] | None = None):
        self.id, self.root, self.knobs, self.addresses, self._env = id, root, knobs, list[str](), env or {}
        self._tmp, self._port, self._facts = tmp, port, facts
        self._hook, self._keys = _user_data(user_data, public_key)
        self._life = 0                            # counts boots and losses of power: a thread knows if it is late
        self._sshd: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        for path in (self.home / ".ssh", root / "bin", root / "etc", root / "run", root / "var/lib/txl",
                     root / "var/log", tmp):
            path.mkdir(parents=True, exist_ok=True)
        (root / "sys/class/dmi/id").mkdir(parents=True, exist_ok=True)
        (root / "sys/class/dmi/id/product_uuid").write_text(f"{id}\n")
        (self.home / ".ssh/authorized_keys").write_text("".join(f"{key}\n" for key in self._keys))
        (self.home / ".ssh/authorized_keys").chmod(0o600)
        for name, script in _stand_ins(facts, knobs).items():
            _script(root / "bin" / name, script)
        _script(root / "etc/enter", f'cd {shlex.quote(str(self.home))}\nexec env -i {self._words()} '
                                    f'TERM="${{TERM:-dumb}}" SSH_CONNECTION="$SSH_CONNECTION" '
                                    f'${{SSH_TTY:+SSH_TTY="$SSH_TTY"}} '
                                    f'bash ${{SSH_ORIGINAL_COMMAND:+-c "$SSH_ORIGINAL_COMMAND"}}\n')

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def environment(self) -> dict[str, str]:
        """The same for user-data and for whoever logs in. No GPU of this machine is the host's."""
        path = [str(self.root / "bin"), os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin",
                "/usr/local/sbin", "/usr/sbin", "/sbin"]
        return {"HOME": str(self.home), "PATH": os.pathsep.join(path), "USER": sshd.user(), "LOGNAME": sshd.user(),
                "SHELL": "/bin/bash", "LANG": "C.UTF-8", "TMPDIR": str(self._tmp), "TMUX_TMPDIR": str(self._tmp),
                "CUDA_VISIBLE_DEVICES": "", "TXL_ROOT": str(self.root), "TXL_HOST": self.id,
                **self._env}

    @property
    def booted(self) -> bool:
        """Its boot hook has been run."""
        return (self.root / "run/booted").exists()

    def boot(self, addresses: list[str]) -> None:
        """Returns at once; the machine comes up in its own time."""
        self._life += 1
        self.addresses = addresses
        threading.Thread(target=self._boot, args=(self._life,), daemon=True).start()

    def power_off(self) -> None:
        """As a machine loses power: every process is gone when this returns."""
        self.give_up()
        keeper.end(self.root)                     # a boot hook as well
        self.reap()
        keeper.end(self.root)                     # what a step of the boot that had begun has started
        for name in ("booted", "boot-finished", "power"):
            (self.root / "run" / name).unlink(missing_ok=True)

    def give_up(self) -> None:
        """What of a boot has not begun never does."""
        self._life += 1

    def reap(self) -> None:
        """Once nothing of it runs: wait for a step of the boot that had begun, and for its sshd."""
        with self._lock:
            if self._sshd:
                self._sshd.kill()
                self._sshd.wait(10)
                self._sshd = None

    def listen(self, addresses: list[str]) -> None:
        """Answer at these addresses from now on; connections that exist go on. Returns at once."""
        self.addresses = addresses
        threading.Thread(target=self._listen_anew, daemon=True).start()

    def travel(self, seconds: float) -> None:
        """Move the clock that the watchdog goes by."""
        clock = self.root / "var/lib/txl/clock"
        beside = clock.with_name("clock.partial")
        beside.write_text(str(seconds + (float(clock.read_text()) if clock.exists() else 0)))
        beside.replace(clock)

    def asked(self) -> str | None:
        """What the machine wants of its own power: "off" or "reboot". Told once."""
        wish = self.root / "run/power"
        if not wish.exists():
            return None
        text = wish.read_text().strip()
        wish.unlink()
        return text

    def guarded(self) -> bool:
        """Whether a living watchdog has a deadline for it, or will once the machine is up."""
        if not self.booted:
            return self._hook is not None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            deadline = json.loads((self.root / "var/lib/txl/deadline.json").read_text())
            return math.isfinite(deadline["in_s"]) and any(
                b"watchdog.py" in keeper.command(pid) for pid in self.processes())
        return False

    def processes(self) -> set[int]:
        return keeper.processes(self.root)

    def _boot(self, life: int) -> None:
        steps = [(0.0, self._run_hook), (self.knobs.init_s, self._finish)]
        if self.knobs.answers:
            steps.append((self.knobs.answers_after_s, self._answer))
        if self.knobs.drops_after_s is not None:
            steps.append((self.knobs.drops_after_s, self._drop))
        began = time.monotonic()
        for at, step in sorted(steps, key=lambda step: step[0]):
            while time.monotonic() < began + at and life == self._life:
                time.sleep(POLL_S)
            with self._lock:
                if life != self._life:
                    return
                step()

    def _run_hook(self) -> None:
        if self._hook is not None:
            hook = self.root / "run/boothook"
            hook.write_text(self._hook)
            with open(self.root / "var/log/cloud-init-output.log", "ab") as log:
                subprocess.run(["sh", hook], cwd=self.root, env=self.environment | {"INSTANCE_ID": self.id},
                               stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=BOOT_S,
                               start_new_session=True, check=False)
        (self.root / "run/booted").touch()

    def _finish(self) -> None:
        (self.root / "run/boot-finished").write_text(f"status: {self.knobs.init_status}\n")

    def _answer(self) -> None:
        key = self.root / "etc/host_key"
        if self.knobs.new_host_key or not key.exists():
            sshd.new_key(key, self.id)
        self._configure()
        self._sshd = sshd.start(self._config, self.root / "var/log/sshd.log", self.environment)
        deadline = time.monotonic() + BOOT_S
        while self._sshd.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((self.addresses[0], self._port), 1):
                return
            time.sleep(POLL_S)

    def _drop(self) -> None:
        if self._sshd:
            for pid in keeper.processes(self.root):
                if b"sshd" in keeper.command(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _listen_anew(self) -> None:
        with self._lock:
            if self._sshd and self._sshd.poll() is None:
                self._configure()
                self._sshd.send_signal(signal.SIGHUP)

    @property
    def _config(self) -> Path:
        return self.root / "etc/sshd_config"

    def _configure(self) -> None:
        sshd.configure(self._config, self.addresses, self._port, key=self.root / "etc/host_key",
                       authorized_keys=self.home / ".ssh/authorized_keys", enter=self.root / "etc/enter")

    def _words(self) -> str:
        return shlex.join(f"{name}={value}" for name, value in self.environment.items())


class Hosts:
    """What stands behind the world's machines (world.Power). `next` gives the knobs of the machines that are launched
    next, in the order of launch; when it is empty they are as they should be."""

    def __init__(self, folder: Path, tmp: Path, facts: Callable[[str], Facts]):
        self.port, self.next, self.all = free_port(""), list[Knobs](), dict[str, Host]()
        self.aws = ""                             # address of what stands for AWS; set before there are machines
        self._folder, self._tmp, self._facts = folder, tmp, facts

    def __getitem__(self, id: str) -> Host:
        return self.all[id]

    def made(self, machine: Machine) -> None:
        self.all[machine.id] = Host(
            machine.id, self._folder / machine.id, self._tmp / str(len(self.all)), self.port,
            replace(self._facts(machine.kind), efa=machine.efa), self.next.pop(0) if self.next else Knobs(),
            machine.user_data, machine.public_key, {
                "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.aws}/imds/{machine.id}/", "AWS_ENDPOINT_URL": self.aws,
                "AWS_EC2_METADATA_SERVICE_NUM_ATTEMPTS": "1"})

    def on(self, machine: Machine) -> None:
        self.all[machine.id].boot(machine.addresses)

    def off(self, machine: Machine) -> None:
        self.all[machine.id].power_off()

    def reboot(self, machine: Machine) -> None:
        self.off(machine)
        self.on(machine)

    def moved(self, machine: Machine) -> None:
        self.all[machine.id].listen(machine.addresses)

    def close(self) -> None:
        """Nothing runs, and nothing that was about to start does."""
        for host in self.all.values():
            host.give_up()
        keeper.end(self._folder)
        for host in self.all.values():
            host.reap()
        keeper.end(self._folder)

    def asked(self) -> Iterator[tuple[str, str]]:
        for id, host in list(self.all.items()):
            if wish := host.asked():
                yield id, wish


def _user_data(text: str, public_key: str) -> tuple[str | None, list[str]]:
    """The boot hook and the public keys that a machine is told: its key pair's as well, unless the user-data says no.
    The hook's watchdog gets the rehearsal's tick."""
    hook, keys = None, [public_key] if public_key else []
    for part in email.message_from_string(text).walk():
        content = str(part.get_payload(decode=False))
        if part.get_content_type() == "text/cloud-boothook" or content.startswith("#cloud-boothook"):
            hook = re.sub(r'("tick_s":\s*)[\d.]+', rf"\g<1>{TICK_S}", content)
        elif part.get_content_type() == "text/cloud-config" or content.startswith("#cloud-config"):
            import yaml  # moto brings it

            told = yaml.safe_load(content) or {}
            keys = keys * told.get("allow_public_ssh_keys", True) + told.get("ssh_authorized_keys", [])
    return hook, keys


def _stand_ins(facts: Facts, knobs: Knobs) -> dict[str, str]:
    """Scripts for a host's bin/, which comes first in its PATH."""
    gpus = facts.gpus if knobs.gpus is None else knobs.gpus
    power = 'wish() { echo "$1" > "$TXL_ROOT/run/power.new" && mv "$TXL_ROOT/run/power.new" "$TXL_ROOT/run/power"; }\n'
    scripts = {
        "shutdown": power + SHUTDOWN if knobs.shutdown_works else "exit 0\n",
        "poweroff": power + "wish off\n" if knobs.shutdown_works else "exit 0\n",
        "reboot": power + "wish reboot\n",
        "systemctl": power + SYSTEMCTL, "sudo": SUDO, "cloud-init": CLOUD_INIT,
        "nvidia-smi": f"count={gpus} name='NVIDIA {facts.gpu}' memory={facts.gpu_memory_mib}\n{NVIDIA_SMI}",
        "fi_info": 'printf "provider: efa\\n    fabric: efa\\n    domain: rdmap0s0-rdm\\n"\n'
        if (facts.efa > 0 if knobs.efa is None else knobs.efa) else
        'echo "fi_getinfo: -61 (No data available)" >&2; exit 61\n',
    }
    if knobs.disk_gib is not None:
        kib = knobs.disk_gib * 2 ** 20
        scripts["df"] = (f'echo "Filesystem 1024-blocks Used Available Capacity Mounted on"\n'
                         f'echo "/dev/root {2 * kib} {kib} {kib} 50% /"\n')
    if knobs.clock_off_s:
        scripts["date"] = f'exec /bin/date -d "@$(($(/bin/date +%s) + {knobs.clock_off_s}))" "$@"\n'
    return scripts | dict(knobs.scripts)


SHUTDOWN = """\
wish=off minutes=1
for word; do case $word in
-r|--reboot) wish=reboot ;;
-c) kill "$(cat "$TXL_ROOT/run/shutdown.pid")" 2>/dev/null; exit 0 ;;
now) minutes=0 ;;
+*) minutes=${word#+} ;;
esac; done
if [ "$minutes" = 0 ]; then wish "$wish"; exit; fi
(sleep $((minutes * 60)); wish "$wish") > /dev/null 2>&1 &
echo $! > "$TXL_ROOT/run/shutdown.pid"
"""
SYSTEMCTL = """\
case $1 in poweroff) wish off ;; reboot) wish reboot ;;
*) echo "System has not been booted with systemd as init system (PID 1). Can't operate." >&2; exit 1 ;;
esac
"""
SUDO = """\
while :; do case $1 in
-u|-g) shift 2 ;;
--) shift; break ;;
-*) shift ;;
*) break ;;
esac; done
exec env "$@"
"""
CLOUD_INIT = """\
[ "$1" = status ] || exit 1
case " $* " in *" --wait "*) until [ -e "$TXL_ROOT/run/boot-finished" ]; do sleep 0.05; done ;; esac
[ -e "$TXL_ROOT/run/boot-finished" ] || { echo "status: running"; exit 0; }
cat "$TXL_ROOT/run/boot-finished"
! grep -q error "$TXL_ROOT/run/boot-finished"
"""
NVIDIA_SMI = """\
if [ "$count" = 0 ]; then
    echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver." >&2
    exit 9
fi
fields= unit=" MiB" header=yes list=
for word; do case $word in
-L|--list-gpus) list=yes ;;
--query-gpu=*) fields=$(echo "${word#*=}" | tr , " ") ;;
--format=*) case $word in *noheader*) header= ;; esac; case $word in *nounits*) unit= ;; esac ;;
esac; done
[ -z "$fields" ] || [ -z "$header" ] || echo "$fields" | sed "s/ /, /g"
i=0
while [ $i -lt "$count" ]; do
    uuid=GPU-$(printf %08x $i)-$TXL_HOST line=
    for field in $fields; do
        case $field in
        index) value=$i ;; name) value=$name ;; uuid|gpu_uuid) value=$uuid ;; count) value=$count ;;
        memory.total|memory.free) value=$memory$unit ;; *) value="[N/A]" ;;
        esac
        line="${line:+$line, }$value"
    done
    if [ -n "$fields" ]; then echo "$line"; else echo "GPU $i: $name (UUID: $uuid)"; fi
    i=$((i + 1))
done
"""


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
