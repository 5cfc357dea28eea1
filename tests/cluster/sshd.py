"""Machines for tests: an sshd of one's own per loopback address, all on one port, each with its own home folder.

They log in as whoever runs the tests, who need not be root. What a machine has beyond the usual commands is put
into its bin/, which comes first in its PATH.
"""
from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import among, ssh
from cluster.local import free_port
from cluster.rehearsal import sshd
from cluster.rehearsal.sshd import SSHD
from cluster.ssh import Host, Shell

BARE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))      # not the environment's
MISSING = [*([] if SSHD else ["sshd"]), *(name for name in ("ssh", "ssh-keygen", "rsync") if not shutil.which(name))]
LACKS = f"the machines are sshds: needs {', '.join(MISSING)}" if MISSING else None
needs_sshd = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


class Machine:
    """One sshd; `folder` has its home/, root/ (TXL_ROOT), bin/ and log. `private`: where other machines reach it."""

    def __init__(self, folder: Path, address: str, port: int, authorized: str, *private: str):
        self.folder, self.address, self.port = folder, address, port
        self.home, self.root, self.bin = (folder / name for name in ("home", "root", "bin"))
        for path in (self.home / ".ssh", self.root / "var/lib/txl/lease", self.bin):
            path.mkdir(parents=True)
        (folder / "usr").mkdir()
        (folder / "usr/python3").symlink_to(BARE_PYTHON)
        self.authorized_keys.write_text(authorized)
        self.new_host_key()
        login = folder / "login"
        login.write_text("\n".join([
            "#!/bin/sh",
            f"export HOME={shlex.quote(str(self.home))} TXL_ROOT={shlex.quote(str(self.root))}",
            f'PATH={shlex.quote(str(self.bin))}:{shlex.quote(str(folder))}/usr:"$PATH"',
            "cd",
            'exec sh -c "${SSH_ORIGINAL_COMMAND:-sh}"\n']))
        login.chmod(0o755)
        sshd.configure(folder / "config", [address, *private], port, key=folder / "host_key",
                       authorized_keys=self.authorized_keys, enter=login)
        self.process: subprocess.Popen | None = None

    @property
    def authorized_keys(self) -> Path:
        return self.home / ".ssh/authorized_keys"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def logins(self) -> int:
        return self.log.count("Accepted publickey")

    def new_host_key(self) -> None:
        sshd.new_key(self.folder / "host_key")

    def restart_listener_with_new_host_key(self) -> None:
        """Connections that are open stay open."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.new_host_key()
        self.start()

    def has(self, name: str, script: str) -> None:
        """Put a command into bin/."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def start(self) -> None:
        log = self.folder / "log"
        log.touch()
        before = self.log.count("Server listening")
        self.process = sshd.start(self.folder / "config", log)
        deadline = time.monotonic() + 120
        while self.log.count("Server listening") == before:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def cut(self) -> None:
        """Every connection, as when the network goes; what runs here finds out by itself."""
        self._signal(signal.SIGKILL)

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """It takes connections, and says nothing on any."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGCONT)

    def _signal(self, sign: int) -> None:
        """To what serves a connection."""
        assert self.process is not None
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                    os.kill(pid, sign)

    def stop(self) -> None:
        """The daemon and every connection with what runs in it, as when a machine's power goes."""
        if self.process is not None:
            for pid in [*_descendants(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Machines:
    """`count` machines, the key that they accept, and shells to them."""

    def __init__(self, folder: Path, count: int):
        laptop = folder / "a laptop's \"100%\""                            # what ssh_config must quote
        self.key = ssh.key(laptop)
        self.port = free_port("")
        authorized = self.key.with_suffix(".pub").read_text()
        self.all = [Machine(folder / f"machine-{i}", f"127.77.0.{i + 1}", self.port, authorized) for i in range(count)]
        self.hosts = [Host(i, machine.address, machine.address, f"i-{i:08x}") for i, machine in enumerate(self.all)]
        self.folder = laptop / "clusters/x"
        self.shells = self.shells_to(self.hosts)

    def shells_to(self, hosts: list[Host]) -> list[Shell]:
        config = ssh.write_config(self.folder, hosts, user=sshd.user(), key=self.key, port=self.port)
        return ssh.shells(config, hosts)

    def __getitem__(self, i: int) -> Machine:
        return self.all[i]


class Relay:
    """A way to a machine under another address, which counts the bytes that go there."""

    def __init__(self, address: str, to: Machine):
        self.sent = 0
        self._to, self._server = to, socket.create_server((address, to.port))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):        # closed
            while True:
                client, _ = self._server.accept()
                machine = socket.create_connection((self._to.address, self._to.port))
                for source, target in ((client, machine), (machine, client)):
                    threading.Thread(target=self._pump, args=(source, target, source is client), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):        # the other direction has ended
            while block := source.recv(1 << 16):
                self.sent += len(block) * counted
                target.sendall(block)
        source.close()
        target.close()


def letting_in(them: Machines) -> Machines:
    """As machines are that were launched: they let node 0 in."""
    for machine in them.all:
        machine.authorized_keys.write_text(f"{machine.authorized_keys.read_text()}{among.admission(them.folder)}\n")
    return them


@contextlib.contextmanager
def machines(folder: Path, count: int) -> Iterator[Machines]:
    """Started, and gone at the end with all that was started on them over ssh."""
    them = Machines(folder, count)
    try:
        for machine in them.all:
            machine.start()
        yield them
    finally:
        for shell in them.shells:
            shell.close()
        for machine in them.all:
            machine.stop()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (mine := children.get(todo.pop(), []))
        found += mine
    return found


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
            for path in root.rglob("*") if path.is_symlink() or path.is_file()}
