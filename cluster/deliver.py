"""Files for all machines: from here to node 0 once, from there to the others inside their network, then compared.

The functions raise ssh.Trouble, which names the machines, and ssh.Interrupted.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster.ssh import (
    COPY_S,
    NAME,
    RSYNC,
    Failed,
    Shell,
    SomeFailed,
    TimedOut,
    Trouble,
    Unreachable,
    config_text,
    each,
    never,
    run_here,
    wordless,
)

HOME = "txl"                                      # where the code is and everything runs, below the login's home
HASHED_GIB = 1                                    # what is larger is compared by sizes

# What a machine is sent of the checkout, and what is deleted there: all but what git ignores and what only it has.
# --delete-after: a .gitignore that is new itself is there by then.
CODE = ("--delete-after", "--exclude=.git", "--exclude=/runs", "--exclude=/data", "--exclude=/venv",
        "--filter=:- .gitignore")
DATA = ("--copy-links",)                          # a link's target is not on the machine

# A line for each path of standard input (ended by \0), in a folder below the home. Python 3.8.
DIGESTS = """
import hashlib, os, sys
root, links, hashed = sys.argv[1:]
os.chdir(os.path.join(os.path.expanduser("~"), root))
for path in sys.stdin.buffer.read().split(b"\\0")[:-1]:
    try:
        if links == "kept" and os.path.islink(path):
            print("link", os.readlink(path))
        elif hashed == "no":
            print(os.path.getsize(path))
        else:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            print(digest.hexdigest())
    except OSError as error:
        print(error.strerror)
"""

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

# From node 0 to one other machine: its name, rsync's status and last words.
COPY = """
set -f
node=$1 source=$2 target=$3
shift 3
for attempt in 1 2 3; do
    words=$(rsync "$@" -e "ssh -F .ssh/txl/config" -- "$source" "$node:$target" 2>&1 > /dev/null)
    status=$?
    case $status in 10|12|30|255) sleep 1 ;; *) break ;; esac
done
echo "$node $status" $(printf "%s\\n" "$words" | tail -n 3)
"""


@dataclass(frozen=True)
class Parcel:
    """What rsync is given: `source` here, whose paths are relative to `root`, into the folder `target` there."""
    source: str
    root: Path
    target: str
    options: tuple[str, ...]
    name: str = ""                                # of the one file that it is


class Contents(NamedTuple):
    """What is in a parcel: files, by name and by a digest or size of each."""
    paths: list[str]
    digests: list[str]
    gib: float
    hashed: bool


def send_code(shells: Sequence[Shell], checkout: Path, *, say: Callable[[str], None] = print,
              interrupted: Callable[[], bool] = never) -> None:
    """The checkout, without what .gitignore names, is ~/txl on every machine; runs/, data/ and venv/ there stay."""
    bring(shells, code(checkout), say, interrupted)


def send(shells: Sequence[Shell], local: Path, remote: str, *, say: Callable[[str], None] = print,
         interrupted: Callable[[], bool] = never, introduced: bool = False) -> None:
    """A file, or what is in a folder, into the folder `remote` (below the home) of every machine."""
    bring(shells, goods(local, remote), say, interrupted, introduced=introduced)


def code(checkout: Path) -> Parcel:
    return Parcel(f"{checkout.absolute()}/", checkout, HOME, CODE)


def goods(local: Path, remote: str) -> Parcel:
    local = local.absolute()                      # in a relative path rsync may take a colon for a machine's name
    return Parcel(f"{local}/", local, remote, DATA) if local.is_dir() else (
        Parcel(str(local), local.parent, remote, DATA, local.name))


def bring(shells: Sequence[Shell], parcel: Parcel, say: Callable[[str], None] = print,
          interrupted: Callable[[], bool] = never, *, introduced: bool = False) -> None:
    """To node 0, from there to the others, and compared on all with what is here; once more where that differs.

    `introduced`: node 0 has brought them something before, and need not be let in again.
    """
    if not introduced:
        introduce(shells, interrupted)
    before, wrong = _deliver_once(shells, parcel, say, interrupted)
    if wrong:
        say(f"{SomeFailed(wrong, len(shells))}. Sending them again")
        parcel = replace(parcel, options=(*parcel.options, "--checksum"))     # looks into files that seem the same
        before, wrong = _deliver_once(shells, parcel, say, interrupted)
    if wrong and before != _contents_here(parcel, interrupted):
        raise Trouble("this machine", f"files in {parcel.root} change while they are sent, twice by now. Try "
                                      f"again when they do not") from SomeFailed(wrong, len(shells))
    if wrong:
        raise SomeFailed(wrong, len(shells))


def files_sent(parcel: Parcel, interrupted: Callable[[], bool] = never) -> list[str]:
    """The paths that rsync would send: it is asked, so that nothing else need know its filters."""
    with tempfile.TemporaryDirectory() as nowhere:
        listed = run_here(["env", "LC_ALL=C", "rsync", "-an", "--out-format=%n", *parcel.options, "--", parcel.source,
                           nowhere], "this machine", f"rsync -n {parcel.source}", 600, interrupted)
    if listed.status:
        raise Failed("this machine", f"{parcel.source} cannot be read: {listed.err.strip()}", listed.status)
    # In this locale rsync writes any byte that is not plain ASCII as \#012.
    names = [os.fsdecode(re.sub(rb"\\#(\d{3})", lambda octal: bytes([int(octal[1], 8)]), line.encode()))
             for line in listed.out.splitlines()]
    return [name for name in names if not name.endswith("/")]


def differing(paths: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Which files are not there as they are here, in words; None: all are the same."""
    wrong = [path for path, our, their in zip(paths, ours, theirs) if our != their]
    if len(theirs) != len(ours):
        return f"{len(theirs)} files of {len(ours)} could be compared"
    return f"{len(wrong)} of {len(paths)} files are not as sent: {', '.join(map(repr, wrong[:3]))}" if wrong else None


def introduce(shells: Sequence[Shell], interrupted: Callable[[], bool]) -> None:
    """Let node 0 into the others, with a key of its own, and tell it their host keys as we know them."""
    first, *others = shells
    if not others:
        return
    public = first.run("umask 077; mkdir -p .ssh/txl && cd .ssh/txl && { [ -f id_ed25519.pub ] || "
                       "{ rm -f id_ed25519 && ssh-keygen -q -t ed25519 -N '' -C txl-node-0 -f id_ed25519; }; } && "
                       "cat id_ed25519.pub", interrupted=interrupted).out.strip()
    line = shlex.quote(f"restrict {public}")      # commands, and nothing that a person would do with it
    admit = (f"umask 077; cd .ssh && {{ grep -qxF {line} authorized_keys || "
             f"printf '\\n%s\\n' {line} >> authorized_keys; }}")
    each(others, lambda shell: shell.run(admit, interrupted=interrupted), name=NAME)
    settings = run_here(["ssh", "-G", "-F", str(first.config), first.name], first.name, "ssh -G", 10).out
    hosts = [shell.host for shell in others if shell.host]
    config = config_text({host.name: {"HostName": host.private, "HostKeyAlias": host.alias} for host in hosts} | {"*": {
        "Port": dict(line.split(" ", 1) for line in settings.splitlines())["port"],
        "IdentityFile": ".ssh/txl/id_ed25519", "IdentitiesOnly": "yes", "UserKnownHostsFile": ".ssh/txl/known_hosts",
        "StrictHostKeyChecking": "yes", "BatchMode": "yes", "ConnectTimeout": 10, "ServerAliveInterval": 5,
        "ServerAliveCountMax": 3, "LogLevel": "ERROR"}})
    aliases = {host.alias for host in hosts}
    known = [line for line in first.config.with_name("known_hosts").read_text().splitlines(keepends=True)
             if line.split(" ", 1)[0] in aliases]
    write(first, {".ssh/txl/config": config, ".ssh/txl/known_hosts": "".join(known)}, interrupted)


def fan_out(shells: Sequence[Shell], source: str, target: str, options: Sequence[str],
             interrupted: Callable[[], bool]) -> None:
    """From node 0 to the others, 8 at once. Not packed: their network is faster than a processor packs."""
    first, *others = shells
    if not others:
        return
    names = shlex.join(shell.name for shell in others)
    said = first.run(f"printf '%s\\n' {names} | " + shlex.join(
        ["xargs", "-P", "8", "-I", "{}", "sh", "-c", COPY, "sh", "{}", source, target, *RSYNC, *options]),
        tied=True, timeout_s=COPY_S, interrupted=interrupted).out
    ended = {name: (int(status), words) for name, status, words in re.findall(r"^(\S+) (\d+) ?(.*)$", said, re.M)}
    errors: dict[str, Trouble] = {}
    for shell in others:
        status, words = ended.get(shell.name, (-1, "no word of it"))
        if status not in (0, 24):
            reason = f"{first.name} could not copy to it: {words or wordless(status)} (rsync {status})"
            errors[shell.name] = Failed(shell.name, reason, status)
    if errors:
        raise SomeFailed(errors, len(shells))


def spread(shells: Sequence[Shell], path: Path, interrupted: Callable[[], bool] = never) -> None:
    """A file or folder below ~/txl that node 0 has made or fetched, to the others."""
    target = f"{HOME}/{path.parent.as_posix()}/"
    fan_out(shells, f"{HOME}/{path.as_posix()}", target, (f"--rsync-path=mkdir -p {shlex.quote(target)} && rsync",),
            interrupted)


def write(shell: Shell, files: Mapping[str, str], interrupted: Callable[[], bool] = never) -> None:
    """{path: text} below the home: whole or not at all, mode 0600, by standard input, as a text may be a secret."""
    shell.run(f"python3 -c {shlex.quote(WRITE)}", input=json.dumps(files), interrupted=interrupted)


def _deliver_once(shells: Sequence[Shell], parcel: Parcel, say: Callable[[str], None], interrupted: Callable[[], bool],
                  ) -> tuple[Contents, dict[str, Trouble]]:
    """What was here before it was sent, and the machines where something else is now."""
    ours = _contents_here(parcel, interrupted)
    if not ours.hashed:
        say(f"Sending {ours.gib:.1f} GiB of {parcel.source} to {shells[0].name}, less what is there already")
    # The folder is made on the way: a command of its own would be one more on every machine.
    options = (*parcel.options, f"--rsync-path=mkdir -p {shlex.quote(parcel.target)} && rsync")
    _insist(lambda: shells[0].put(parcel.source, f"{parcel.target}/", *options, interrupted=interrupted), say)
    fan_out(shells, f"{parcel.target}/{parcel.name}", f"{parcel.target}/", options, interrupted)
    command = shlex.join(["python3", "-c", DIGESTS, parcel.target, *_how(parcel, ours.hashed)])
    theirs = each(shells, lambda shell: shell.run(command, input=_listed(ours.paths), timeout_s=1800,
                                                  interrupted=interrupted).out.splitlines(), name=NAME)
    return ours, {shell.name: Trouble(shell.name, reason) for shell, digests in zip(shells, theirs)
                  if (reason := differing(ours.paths, ours.digests, digests))}


def _contents_here(parcel: Parcel, interrupted: Callable[[], bool]) -> Contents:
    paths = files_sent(parcel, interrupted)
    size = 0
    for path in paths:
        with contextlib.suppress(OSError):        # gone meanwhile, or a link to nowhere
            size += (parcel.root / path).stat().st_size
    hashed = size <= HASHED_GIB * 2**30
    words = [sys.executable, "-c", DIGESTS, str(parcel.root.absolute()), *_how(parcel, hashed)]
    listed = run_here(words, "this machine", f"reading {parcel.root}", 1800, interrupted, input=_listed(paths))
    if listed.status:
        raise Failed("this machine", f"{parcel.root} cannot be read: {listed.err.strip()}", listed.status)
    return Contents(paths, listed.out.splitlines(), size / 2**30, hashed)


def _how(parcel: Parcel, hashed: bool) -> tuple[str, str]:
    return "followed" if "--copy-links" in parcel.options else "kept", "yes" if hashed else "no"


def _listed(paths: Sequence[str]) -> str:
    return "".join(f"{path}\0" for path in paths)


def _insist(copy: Callable[[], object], say: Callable[[str], None]) -> None:
    for left in (2, 1, 0):
        try:
            copy()
            return
        except (Unreachable, TimedOut) as error:
            if not left:
                raise
            say(f"{error}. Going on where it was cut")
