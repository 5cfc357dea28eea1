"""One command on all machines at once. Node 0 hands it on to the others, so that however many they are, what is done
here is done once: one connection, one ssh, one set of files.

The functions raise ssh.Trouble, which names the machines, and ssh.Interrupted.
"""
from __future__ import annotations

import base64
import json
import shlex
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cluster import ssh
from cluster.ssh import NAME, Result, Shell, SomeFailed, TimedOut, Trouble, config_text, each, never, run_here

OWN_S = 15                                        # for node 0's own part in handing on

# The files of standard input, {path: text}, each there as a whole or not at all, and for nobody else to read.
WRITE = """
import json, os, sys
os.umask(0o077)
for path, text in json.load(sys.stdin).items():
    folder, name = os.path.split(path)
    beside = os.path.join(folder, "." + name + ".partial")
    os.makedirs(folder or ".", 0o755, exist_ok=True)
    with open(beside, "w") as file:
        file.write(text)
    os.replace(beside, path)
"""

# At node 0: a thread and an ssh for each machine, whose output goes to files, as it leaves a connection in the
# background that would keep a pipe open. Tells of each its status (null: it was ended here), output and errors, and
# in seconds how long after our start it was asked, and before our end it had answered. Python 3.8.
HAND_ON = """
import base64, json, os, signal, subprocess, sys, tempfile, threading, time, zlib
began = time.monotonic()
told = json.loads(zlib.decompress(base64.b64decode(sys.stdin.read())))
said = {}
def ask(name, given):
    way = ["sh", "-c"] if name == told["here"] else ["ssh", "-F", ".ssh/txl/config", "-T", name]
    start = time.monotonic()
    with tempfile.TemporaryFile() as into, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        into.write(given.encode("utf-8", "surrogateescape"))
        into.seek(0)
        command = "node=%s\\n%s" % (name.replace("node-", ""), told["command"])
        process = subprocess.Popen(way + [command], stdin=into, stdout=out, stderr=err, start_new_session=True)
        try:
            status = process.wait(told["timeout_s"])
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        end = time.monotonic()
        for file in (out, err):
            file.seek(0)
        said[name] = [status, out.read().decode("utf-8", "replace"), err.read().decode("utf-8", "replace"), start, end]
threads = [threading.Thread(target=ask, args=one) for one in told["inputs"].items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ended = time.monotonic()
print(json.dumps({name: [*answer, start - began, ended - end] for name, (*answer, start, end) in said.items()}))
"""


class Answer(NamedTuple):
    """What came of a command on one machine."""
    said: Result | Trouble
    after_s: float                                # since it was asked here: the machine had not begun yet
    until_s: float                                # and this long since, it had ended


def ask(shells: Sequence[Shell], command: str, inputs: Sequence[str] = (), *, timeout_s: float = 30,
        interrupted: Callable[[], bool] = never) -> list[Answer]:
    """Of each machine; there, $node is its number. Raises Trouble where what hands on fails, and Interrupted."""
    given = dict(zip(map(NAME, shells), inputs or [""] * len(shells)))
    way = next((shell.by for shell in shells if shell.by), None)
    handed = [shell for shell in shells if way and way in (shell.by, shell)]
    direct = [shell for shell in shells if shell not in handed]
    answers: dict[str, Answer] = {}

    def ask_one(shell: Shell) -> None:
        began = time.monotonic()
        try:
            said: Result | Trouble = shell.run(_numbered(shell, command), input=given[shell.name], check=False,
                                               timeout_s=timeout_s, interrupted=interrupted)
        except Trouble as error:
            said = error
        answers[shell.name] = Answer(said, 0.0, time.monotonic() - began)

    if way:
        answers |= _handed_on(way, handed, command, given, timeout_s, interrupted)
    each(direct, ask_one, name=NAME)
    return [answers[shell.name] for shell in shells]


def run(shells: Sequence[Shell], command: str, inputs: Sequence[str] = (), *, check: bool = True, timeout_s: float = 30,
        interrupted: Callable[[], bool] = never) -> list[Result]:
    """The same where all must answer, and end well if `check`. Raises SomeFailed."""
    results, errors = list[Result](), dict[str, Trouble]()
    for shell, (said, *_) in zip(shells, ask(shells, command, inputs, timeout_s=timeout_s, interrupted=interrupted)):
        if isinstance(said, Result) and check and said.status:
            said = ssh.failed(shell.name, said, command)
        if isinstance(said, Trouble):
            errors[shell.name] = said
        else:
            results.append(said)
    if errors:
        raise SomeFailed(errors, len(shells)) from next(iter(errors.values()))
    return results


def write(shells: Sequence[Shell], files: Sequence[Mapping[str, str]],
          interrupted: Callable[[], bool] = never) -> None:
    """To each machine its {path: text} below the home: whole or not at all, mode 0600, by standard input, as a text
    may be a secret."""
    run(shells, f"python3 -c {shlex.quote(WRITE)}", [json.dumps(texts) for texts in files], interrupted=interrupted)


def key(folder: Path) -> Path:
    """Node 0's to the others, made here, so that machines that are launched can let it in from the beginning."""
    return ssh.key(folder, "txl-node-0")


def admission(folder: Path) -> str:
    """Of that key, a line of authorized_keys: commands, and nothing that a person would do with it."""
    return f"restrict {key(folder).with_suffix('.pub').read_text().strip()}"


def introduce(shells: Sequence[Shell], interrupted: Callable[[], bool] = never) -> list[Shell]:
    """Let node 0 into the others, over a connection to each, and from then on hand on by it."""
    if len(shells) == 1 or all(shell.by for shell in shells[1:]):
        return list(shells)
    line = shlex.quote(admission(shells[0].config.parent))
    run(shells[1:], f"umask 077; mkdir -p .ssh && cd .ssh && {{ grep -qxF {line} authorized_keys || "
                    f"printf '\\n%s\\n' {line} >> authorized_keys; }}", interrupted=interrupted)
    return acquaint(shells, interrupted)


def acquaint(shells: Sequence[Shell], interrupted: Callable[[], bool] = never) -> list[Shell]:
    """Tell node 0 how the others are reached, that let it in, with their host keys as we know them."""
    first, *others = shells
    if not others:
        return [first]
    folder = first.config.parent
    hosts = [shell.host for shell in others if shell.host]
    settings = run_here(["ssh", "-G", "-F", str(first.config), first.name], first.name, "ssh -G", 10).out
    # A connection is named by its machine, as another may be node 1 while it still lasts.
    config = config_text({host.name: {
        "HostName": host.private, "HostKeyAlias": host.alias,
        **{name: value for name, value in host.settings if name in ("User", "Port")},
        "ControlPath": f".ssh/txl/{zlib.crc32(f'{host.alias} {host.private}'.encode()):08x}"}
        for host in hosts} | {"*": {
        "Port": dict(line.split(" ", 1) for line in settings.splitlines())["port"],
        # ssh adds keys to the first of the files: those of machines that node 0 meets before we do.
        "UserKnownHostsFile": (".ssh/txl/met", ".ssh/txl/known_hosts"), "StrictHostKeyChecking": "accept-new",
        "IdentityFile": ".ssh/txl/id_ed25519", "IdentitiesOnly": "yes", "BatchMode": "yes", "ConnectTimeout": 10,
        "ServerAliveInterval": 5, "ServerAliveCountMax": 3, "ControlMaster": "auto", "ControlPersist": 300,
        "LogLevel": "ERROR"}})
    aliases, known = {host.alias for host in hosts}, first.config.with_name("known_hosts")
    lines = [line for line in (known.read_text() if known.exists() else "").splitlines(keepends=True)
             if line.split(" ", 1)[0] in aliases]
    ours = key(folder)
    write([first], [{".ssh/txl/id_ed25519": ours.read_text(),
                     ".ssh/txl/id_ed25519.pub": ours.with_suffix(".pub").read_text(),
                     ".ssh/txl/known_hosts": "".join(lines), ".ssh/txl/config": config}], interrupted)
    return [first, *(replace(shell, by=first) for shell in others)]


def _handed_on(way: Shell, shells: Sequence[Shell], command: str, given: Mapping[str, str], timeout_s: float,
               interrupted: Callable[[], bool]) -> dict[str, Answer]:
    told = json.dumps({"here": way.name, "command": command, "timeout_s": timeout_s,
                       "inputs": {shell.name: given[shell.name] for shell in shells}})
    began = time.monotonic()
    said = way.run(f"python3 -c {shlex.quote(HAND_ON)}", timeout_s=timeout_s + OWN_S, interrupted=interrupted,
                   input=base64.b64encode(zlib.compress(told.encode("utf-8", "surrogateescape"))).decode())
    elapsed_s = time.monotonic() - began
    answers, heard = {}, json.loads(said.out)
    for name in map(NAME, shells):
        if name not in heard:                     # a disk that is full, say
            words = said.err.strip().splitlines()[-1:]
            answers[name] = Answer(Trouble(name, f"{way.name} could not ask it: {' '.join(words)}"), 0, elapsed_s)
            continue
        status, out, err, after_s, before_s = heard[name]
        answer: Result | Trouble = Result(status, out, err)
        if status is None:
            answer = TimedOut(name, f"no end after {timeout_s:g} s of: {ssh.short(command)}")
        elif status == 255:
            answer = ssh.unreachable(name, err, way.name)
        answers[name] = Answer(answer, after_s, elapsed_s - before_s)
    return answers


def _numbered(shell: Shell, command: str) -> str:
    return f"node={shell.name.removeprefix('node-')}\n{command}"
