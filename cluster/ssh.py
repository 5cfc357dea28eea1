"""OpenSSH and rsync as subprocesses: one config file says how each machine is reached, every command has a deadline."""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from cluster.run import Refused

A = TypeVar("A")
T = TypeVar("T")
POLL_S = 0.1                                      # how soon an interruption is noticed
STALLED_S = 120                                   # rsync gives up when nothing moved for so long
COPY_S = 6 * 3600                                 # and in any case after this
END_S = 2                                         # for a program to end in its own way
NAME = attrgetter("name")                        # of a shell, for each()
OF_RSYNC = re.compile(r"^rsync(:| error:| warning:).*\n?", re.M)


class Trouble(Exception):
    """Something went wrong with one machine: `name` and `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Unreachable(Trouble):
    """ssh could not connect, or the connection broke."""


class WrongHost(Trouble):
    """The machine does not show the host key that it showed before."""


class Denied(Trouble):
    """The machine does not accept our key or user name."""


class TimedOut(Trouble):
    """A command was ended here at its deadline."""


class Failed(Trouble):
    """A command ended with a status other than 0."""

    def __init__(self, name: str, reason: str, status: int):
        super().__init__(name, reason)
        self.status = status


class SomeFailed(Trouble):
    """`errors`, by the machine's name, of `total` machines that were asked at once."""

    def __init__(self, errors: dict[str, Trouble], total: int):
        groups: dict[str, list[str]] = {}
        for name, error in errors.items():
            groups.setdefault(error.reason, []).append(name)
        lines = [f"{', '.join(names)}: {reason}" for reason, names in groups.items()]
        super().__init__(f"{len(errors)} of {total} machines", "\n  ".join(lines))
        self.errors, self.total = errors, total


class Interrupted(Exception):
    """Somebody asked to stop; what was running here was ended."""


class Result(NamedTuple):
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Host:
    """A machine as ssh sees it. `alias`, the instance's id, is what its host key is remembered under."""
    node: int
    address: str
    private: str                                  # among the machines
    alias: str
    jump: bool = False                            # reached through node 0, at its private address
    settings: tuple[tuple[str, object], ...] = ()     # of ssh_config, its own

    @property
    def name(self) -> str:
        return f"node-{self.node}"


def never() -> bool:
    return False


@dataclass(frozen=True)
class Shell:
    """Commands and copies to one machine, over a connection that they share. Paths there are relative to its home."""
    config: Path
    name: str
    host: Host | None = None                      # for what machines do among themselves; ssh asks the config
    by: Shell | None = None                       # which hands commands on that several are given (among.py)

    def run(self, command: str, *, check: bool = True, timeout_s: float = 30, input: str | None = None,
            tied: bool = False, interrupted: Callable[[], bool] = never) -> Result:
        """What the login shell there makes of `command`. Raises Trouble; Failed only if `check`.

        `tied`: the command and its children end there when we end here, at the deadline, interrupted or killed; else
        they go on without us. 255 is ssh's own status, so no command should use it.
        """
        words = ["ssh", "-F", str(self.config), "-T", self.name, _tied(command) if tied else command]
        result = run_here(words, self.name, short(command), timeout_s, interrupted, input=input, held=tied)
        if result.status == 255:
            raise unreachable(self.name, result.err)
        if check and result.status:
            raise failed(self.name, result, command)
        return result

    def put(self, local: Path | str, remote: str, *options: str, timeout_s: float = COPY_S,
            interrupted: Callable[[], bool] = never) -> str:
        """rsync there; `local` with a slash at its end means what is in it. Returns what rsync printed."""
        return self._rsync([*options, "--", _local(local), f"{self.name}:{remote}"], timeout_s, interrupted)

    def get(self, remote: str, local: Path | str, *options: str, timeout_s: float = COPY_S,
            interrupted: Callable[[], bool] = never) -> str:
        """rsync from there; `remote` with a slash at its end means what is in it. Returns what rsync printed."""
        return self._rsync([*options, "--", f"{self.name}:{remote}", _local(local)], timeout_s, interrupted)

    def close(self) -> None:
        """End the shared connection. Nothing is raised: a connection that is not there is closed."""
        with contextlib.suppress(TimedOut):
            run_here(["ssh", "-F", str(self.config), "-O", "exit", self.name], self.name, "ssh -O exit", 10)

    def _rsync(self, words: list[str], timeout_s: float, interrupted: Callable[[], bool]) -> str:
        result = run_here(["rsync", *RSYNC, "-z", "-e", f"ssh -F {shlex.quote(str(self.config))}", *words],
                      self.name, f"rsync {short(shlex.join(words))}", timeout_s, interrupted)
        if result.status in (12, 255):            # 12: rsync's for a connection that ended
            raise unreachable(self.name, result.err)
        if result.status == 30:
            raise TimedOut(self.name, f"rsync moved nothing for {STALLED_S} s")
        if result.status not in (0, 24):         # 24: a file went away meanwhile
            said = _end(result.err) or wordless(result.status)
            raise Failed(self.name, f"{said} (rsync {result.status})", result.status)
        return result.out


# Owners mean nothing on another machine; -s: no shell there reads the names; what was cut goes on where it was.
RSYNC = ("-a", "--no-owner", "--no-group", "-s", "--partial-dir=.rsync-part", f"--timeout={STALLED_S}")


def shells(config: Path, hosts: Sequence[Host]) -> list[Shell]:
    return [Shell(config, host.name, host) for host in hosts]


def write_config(folder: Path, hosts: Sequence[Host], *, user: str | None, key: Path | None,
                 port: int | None) -> Path:
    """folder/ssh_config, complete in itself, with host keys kept beside it. Returns its path.

    A host's own settings come before `user`, `key` and `port`.

    ~/.ssh/config is not included: its `Host *` (RemoteCommand, LocalForward, RequestTTY, more keys than the server lets
    one try) is meant for a person, and a machine that only that file's proxy could reach is not named in it anyway.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder, control = folder.absolute(), _control_folder()
    path = folder / "ssh_config"
    # ProxyJump is this too, but hands on the config's path without quotes.
    through = f"ssh -F {shlex.quote(str(path)).replace('%', '%%')} -W '[%h]:%p' node-0"
    sections: dict[str, dict[str, object]] = {}
    for host in hosts:
        # By machine rather than %C: an address may belong to another machine tomorrow, or in another network.
        who = f"{folder}\n{host.alias}\n{host.address}\n{host.private}\n{user}\n{port}"
        sections[host.name] = {"HostName": host.private if host.jump else host.address, "HostKeyAlias": host.alias,
                               "ProxyCommand": through if host.jump else None,
                               "ControlPath": control / hashlib.sha256(who.encode()).hexdigest()[:20]}
        sections[host.name] |= dict(host.settings)
    sections["*"] = {
        "User": user, "Port": port, "IdentityFile": key and key.absolute(), "IdentitiesOnly": key and "yes",
        "UserKnownHostsFile": folder / "known_hosts", "StrictHostKeyChecking": "accept-new", "BatchMode": "yes",
        "ConnectTimeout": 10, "ServerAliveInterval": 5, "ServerAliveCountMax": 3, "ControlMaster": "auto",
        "ControlPersist": 300, "ForwardAgent": "no", "LogLevel": "ERROR"}
    text = config_text(sections)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".ssh_config", delete=False) as beside:      # 0600
        beside.write(text)
    os.replace(beside.name, path)
    return path


def remember(folder: Path, lines: str) -> None:
    """Host keys, as known_hosts has them, for the ssh_config in this folder."""
    path = folder / "known_hosts"
    old = path.read_text().splitlines() if path.exists() else []
    if new := [line for line in lines.splitlines() if line not in old]:
        path.write_text("".join(f"{line}\n" for line in [*old, *new]))


def config_text(sections: Mapping[str, Mapping[str, object]]) -> str:
    """An ssh_config of these hosts; a value of None is left out. Raises Refused for one that cannot be written."""
    lines = ["# Written anew by each launch."]
    for host, options in sections.items():
        lines += ["", f"Host {host}"]
        lines += [f"  {name} {value if name == 'ProxyCommand' else _config_value(value)}"    # that is a shell's line
                  for name, values in options.items() if values is not None
                  for value in (values if isinstance(values, list) else [values])]
    return "\n".join(lines) + "\n"


def key(home: Path, comment: str = "txl") -> Path:
    """home/keys/id_ed25519, made when it is not there; the public half is beside it as .pub."""
    folder = home / "keys"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, beside = folder / "id_ed25519", folder / ".partial"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)          # another launcher may be making it; the kernel frees the lock
        if not path.exists():
            for old in (beside, beside.with_suffix(".pub")):
                old.unlink(missing_ok=True)
            made = run_here(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(beside)],
                        "here", "ssh-keygen", 30)
            if made.status:
                raise Refused(f"No ssh key could be made in {folder}: {_end(made.err)}")
            os.rename(beside.with_suffix(".pub"), path.with_suffix(".pub"))
            os.rename(beside, path)               # last: where it is, both are
    return path


def each(items: Sequence[A], work: Callable[[A], T], *, name: Callable[[A], str]) -> list[T]:
    """work(item) for all at once, in threads; waits for all. Raises SomeFailed, or Interrupted if one was."""
    if not items:
        return []
    with ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(work, item) for item in items]
    errors = {}
    for item, future in zip(items, futures):
        error = future.exception()
        if isinstance(error, Trouble):
            errors[name(item)] = error
        elif error is not None:
            raise error
    if errors:
        raise SomeFailed(errors, len(items)) from next(iter(errors.values()))
    return [future.result() for future in futures]


def interactive(config: Path, name: str, argv: Sequence[str] = ()) -> int:
    """A terminal there, or `argv` in one, until the person leaves. Returns ssh's status."""
    terminal = ["-t"] if sys.stdin.isatty() else []
    return subprocess.call(["ssh", "-F", str(config), *terminal, name, *([shlex.join(argv)] if argv else [])])


def forward(config: Path, name: str, local_port: int, remote_port: int, timeout_s: float = 30) -> subprocess.Popen:
    """127.0.0.1:local_port here is 127.0.0.1:remote_port there, from now until the handle's process or we end."""
    with tempfile.TemporaryFile() as err:
        tunnel = subprocess.Popen(
            ["ssh", "-F", str(config), "-T", "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes",
             "-L", f"127.0.0.1:{local_port}:127.0.0.1:{remote_port}", name, "echo; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, start_new_session=True)
        assert tunnel.stdout is not None
        ready, _, _ = select.select([tunnel.stdout], [], [], timeout_s)
        if ready and tunnel.stdout.readline():    # the port is open before the command is run
            return tunnel
        end(tunnel)
        raise unreachable(name, _text(err) or f"no answer in {timeout_s:g} s")


def run_here(words: Sequence[str], name: str, what: str, timeout_s: float, interrupted: Callable[[], bool] = never, *,
             input: str | None = None, held: bool = False) -> Result:
    """A subprocess in a session of its own, so that Ctrl-C reaches only us; killed with all its group if it must end.

    `held`: its standard input stays open for as long as we live.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # Files, since a pipe does not end before the connection that ssh leaves in the background.
        given.write((input or "").encode("utf-8", "surrogateescape"))
        given.seek(0)
        try:
            process = subprocess.Popen(words, stdin=subprocess.PIPE if held else given, stdout=out, stderr=err,
                                       start_new_session=True)
        except FileNotFoundError as error:
            raise Refused(f"{words[0]} is not installed here. Install OpenSSH's client and rsync.") from error
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return Result(process.wait(POLL_S), _text(out), _text(err))
                if interrupted():
                    raise Interrupted(f"{name}: interrupted")
                if time.monotonic() > deadline:
                    said = _end(_text(err))
                    raise TimedOut(name, f"no end after {timeout_s:g} s of: {what}" + (f"\nIts last words: {said}"
                                                                                      if said else ""))
        finally:
            end(process)


def failed(name: str, result: Result, command: str) -> Failed:
    """Of a command there that ended with a status other than 0."""
    return Failed(name, f"{_end(result.err) or _end(result.out) or 'no message'} "
                        f"(status {result.status} of: {short(command)})", result.status)


def unreachable(name: str, err: str, by: str | None = None) -> Trouble:
    """Why, by what ssh said: here, or on the machine `by` that would hand on to it."""
    said = _end(OF_RSYNC.sub("", err)) or "the connection ended without a word"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in err or "Host key verification failed" in err:
        where = re.search(r"Offending .* key in (\S.*):(\d+)", err)
        return WrongHost(name, "another machine answers at its address, or its host key was replaced: ssh refuses to "
                               "talk to it. If you know why, remove the old key"
                               + (f", line {where[2]} of {where[1]}," if where else "") + " and try again")
    if by:
        said = f"{by} cannot reach it: {said}"
    if "Permission denied (" in err or "Too many authentication failures" in err:
        return Denied(name, f"the machine does not accept our key: {said}. Either the user name is not the image's "
                            f"(ubuntu, ec2-user; --ssh_user), or the machine has another launcher's key")
    return Unreachable(name, said)


def short(command: str) -> str:
    line = " ".join(command.split())
    return line if len(line) <= 80 else line[:77] + "..."


def wordless(status: int) -> str:
    """What to say of an rsync that ended so without a message: the other side's may be lost with it."""
    return "a file could not be written: is the disk full?" if status == 11 else "no message"


def end(process: subprocess.Popen) -> None:
    """With its group: by SIGTERM, at which rsync keeps what it has got of a file, and soon by SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S if sign == signal.SIGTERM else None)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _tied(command: str) -> str:
    """`command`, whose process group there (sshd gives each command one) ends when standard input does."""
    return "sh -c " + shlex.quote(f"exec 3<&0 < /dev/null\n(read -r _ <&3; kill 0) > /dev/null 2>&1 &\n"
                                  f"(exec 3<&-\n{command}\n)\nstatus=$?\nkill $!\nexit $status")


def _end(text: str) -> str:
    """The last words: three lines at most, in one."""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-3:] if line.strip())[-500:]


def _text(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _local(path: Path | str) -> str:
    """Absolute, so that rsync takes no colon for a machine's name; a slash at the end stays."""
    return os.path.abspath(path) + ("/" if str(path).endswith("/") else "")


def _config_value(value: object) -> str:
    """In ssh_config's quotes, with the % doubled that ssh would expand; several words of a tuple."""
    if isinstance(value, tuple):
        return " ".join(map(_config_value, value))
    text = str(value)
    if "\n" in text or "${" in text:
        raise Refused(f"ssh_config cannot hold {text!r}. Choose another folder by TXL_HOME, or another name")
    if re.fullmatch(r"[\w.:/+-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _control_folder() -> Path:
    """Where connections meet: short, as a socket's name has at most 108 bytes (TMPDIR may be longer), and private."""
    folder = Path(f"/tmp/txl-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Refused(f"{folder} must be a folder of yours alone, with mode 0700. See what it is, then remove it.")
    return folder
