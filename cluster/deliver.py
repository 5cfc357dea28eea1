"""Files for all machines: from here to node 0 once, from there to the others inside their network, then compared.

The functions raise ssh.Trouble, which names the machines, and ssh.Interrupted.
"""
from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster import among
from cluster.ssh import (
    COPY_S,
    RSYNC,
    Failed,
    Shell,
    SomeFailed,
    TimedOut,
    Trouble,
    Unreachable,
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

# A line for each path of standard input (each ended by \0). A word that begins with a slash says how those after it are
# looked at, and in which folder below the home. Python 3.8.
DIGESTS = """
import hashlib, os, sys
for word in sys.stdin.buffer.read().split(b"\\0")[:-1]:
    if word[:1] == b"/":
        links, hashed, root = word[1:].split(b" ", 2)
        os.chdir(os.path.join(os.path.expanduser(b"~"), root))
        continue
    try:
        if links == b"kept" and os.path.islink(word):
            print("link", ascii(os.readlink(word)))
        elif hashed == b"no":
            print(os.path.getsize(word))
        else:
            digest = hashlib.sha256()
            with open(word, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            print(digest.hexdigest())
    except OSError as error:
        print(error.strerror)
"""

# At node 0, for the machine $1: all copies over one connection, which ends by itself. It is opened apart from them, as
# an ssh that stays behind would keep their output open; without it each copy makes its own. Says rsync's status, words.
TO_ONE = """
set -f
node=$1
ssh="ssh -F .ssh/txl/config"
copy() {
    for attempt in 1 2 3; do
        words=$("$@" 2>&1 > /dev/null)
        status=$?
        case $status in 10|12|30|255) sleep 1 ;; *) break ;; esac
    done
    case $status in 0|24) ;; *) echo "$node $status" $(printf "%s\\n" "$words" | tail -n 3); exit ;; esac
}
$ssh -O check "$node" 2> /dev/null || $ssh -o ControlPersist=60 -fNM "$node" < /dev/null > /dev/null 2>&1
"""


@dataclass(frozen=True)
class Parcel:
    """What rsync is given: `source` here, whose paths are relative to `root`, into the folder `target` there."""
    source: str
    root: Path
    target: str
    options: tuple[str, ...]
    name: str = ""                                # of the one file that it is


@dataclass(frozen=True)
class Copy:
    """What rsync at node 0 is given, for each of the others. Paths are relative to the home."""
    source: str
    target: str
    options: tuple[str, ...] = ()
    unless: tuple[str, str] | None = None         # a file and its text: a machine that has it needs no copy

    def script(self) -> str:
        """In TO_ONE."""
        options = shlex.join([*RSYNC, *self.options, f"--rsync-path=mkdir -p {shlex.quote(self.target)} && rsync"])
        copy = f'copy rsync {options} -e "$ssh" -- {shlex.quote(self.source)} "$node":{shlex.quote(self.target)}\n'
        if self.unless is None:
            return copy
        path, text = self.unless
        there = f'$ssh "$node" cat {shlex.quote(shlex.quote(path))} 2> /dev/null'
        return f'[ "$({there})" = {shlex.quote(text)} ] || {copy}'


class Contents(NamedTuple):
    """What is in a parcel: files, by name and by a digest or size of each."""
    paths: list[str]
    digests: list[str]
    gib: float
    hashed: bool


def code(checkout: Path) -> Parcel:
    """The checkout, without what .gitignore names, for ~/txl; runs/, data/ and venv/ there stay."""
    return Parcel(f"{checkout.absolute()}/", checkout, HOME, CODE)


def goods(local: Path, remote: str) -> Parcel:
    """A file, or what is in a folder, for the folder `remote` (below the home)."""
    local = local.absolute()                      # in a relative path rsync may take a colon for a machine's name
    return Parcel(f"{local}/", local, remote, DATA) if local.is_dir() else (
        Parcel(str(local), local.parent, remote, DATA, local.name))


def bring(shells: Sequence[Shell], parcels: Sequence[Parcel], *, made: Callable[[], Sequence[Copy]] = tuple,
          say: Callable[[str], None] = print, interrupted: Callable[[], bool] = never) -> None:
    """To node 0, from there to the others, and compared on all with what is here; once more where that differs.

    `made`: called once node 0 has the parcels; what is made there of them, for the others as well.
    """
    shells = among.introduce(shells, interrupted)
    sent = [_to_first(shells[0], parcel, say, interrupted) for parcel in parcels]
    spread(shells, [*map(_copy, parcels), *made()], interrupted)
    wrong = _wrong(shells, parcels, sent, interrupted)
    if wrong:
        say(f"{SomeFailed(wrong, len(shells))}. Sending them again")
        # --checksum looks into files that seem the same.
        parcels = [replace(parcel, options=(*parcel.options, "--checksum")) for parcel in parcels]
        sent = [_to_first(shells[0], parcel, say, interrupted) for parcel in parcels]
        spread(shells, [*map(_copy, parcels)], interrupted)
        wrong = _wrong(shells, parcels, sent, interrupted)
    for parcel, before in zip(parcels, sent if wrong else []):
        if before != _contents_here(parcel, interrupted):
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


def spread(shells: Sequence[Shell], copies: Sequence[Copy], interrupted: Callable[[], bool] = never) -> None:
    """From node 0, acquainted with them, to the others, 8 at once. Not packed: their network is faster."""
    first, *others = shells
    if not others or not copies:
        return
    script = "".join([TO_ONE, *(copy.script() for copy in copies), 'echo "$node 0"\n'])
    names = shlex.join(shell.name for shell in others)
    said = first.run(f"printf '%s\\n' {names} | " + shlex.join(
        ["xargs", "-P", "8", "-n", "1", "sh", "-c", script, "sh"]),
        tied=True, timeout_s=COPY_S, interrupted=interrupted).out
    ended = {name: (int(status), words) for name, status, words in re.findall(r"^(\S+) (\d+) ?(.*)$", said, re.M)}
    errors: dict[str, Trouble] = {}
    for shell in others:
        status, words = ended.get(shell.name, (-1, "no word of it"))
        if status:
            reason = f"{first.name} could not copy to it: {words or wordless(status)} (rsync {status})"
            errors[shell.name] = Failed(shell.name, reason, status)
    if errors:
        raise SomeFailed(errors, len(shells))


def below_code(path: Path) -> Copy:
    """A file or folder below ~/txl that node 0 has made or fetched."""
    return Copy(f"{HOME}/{path.as_posix()}", f"{HOME}/{path.parent.as_posix()}/")


def _copy(parcel: Parcel) -> Copy:
    return Copy(f"{parcel.target}/{parcel.name}", f"{parcel.target}/", parcel.options)


def _to_first(first: Shell, parcel: Parcel, say: Callable[[str], None], interrupted: Callable[[], bool]) -> Contents:
    """Returns what was here before it was sent."""
    ours = _contents_here(parcel, interrupted)
    if not ours.hashed:
        say(f"Sending {ours.gib:.1f} GiB of {parcel.source} to {first.name}, less what is there already")
    # The folder is made on the way: a command of its own would be one more.
    options = (*parcel.options, f"--rsync-path=mkdir -p {shlex.quote(parcel.target)} && rsync")
    _insist(lambda: first.put(parcel.source, f"{parcel.target}/", *options, interrupted=interrupted), say)
    return ours


def _wrong(shells: Sequence[Shell], parcels: Sequence[Parcel], sent: Sequence[Contents],
           interrupted: Callable[[], bool]) -> dict[str, Trouble]:
    """The machines where something else is now than was sent."""
    asked = "".join(_listed(parcel, parcel.target, ours.paths, ours.hashed) for parcel, ours in zip(parcels, sent))
    command = f"python3 -c {shlex.quote(DIGESTS)}"
    theirs = [said.out.splitlines() for said in among.run(shells, command, [asked] * len(shells), timeout_s=1800,
                                                          interrupted=interrupted)]
    paths = [path for ours in sent for path in ours.paths]
    digests = [digest for ours in sent for digest in ours.digests]
    return {shell.name: Trouble(shell.name, reason) for shell, found in zip(shells, theirs)
            if (reason := differing(paths, digests, found))}


def _contents_here(parcel: Parcel, interrupted: Callable[[], bool]) -> Contents:
    paths = files_sent(parcel, interrupted)
    size = 0
    for path in paths:
        with contextlib.suppress(OSError):        # gone meanwhile, or a link to nowhere
            size += (parcel.root / path).stat().st_size
    hashed = size <= HASHED_GIB * 2**30
    listed = run_here([sys.executable, "-c", DIGESTS], "this machine", f"reading {parcel.root}", 1800, interrupted,
                      input=_listed(parcel, str(parcel.root.absolute()), paths, hashed))
    if listed.status:
        raise Failed("this machine", f"{parcel.root} cannot be read: {listed.err.strip()}", listed.status)
    return Contents(paths, listed.out.splitlines(), size / 2**30, hashed)


def _listed(parcel: Parcel, root: str, paths: Sequence[str], hashed: bool) -> str:
    """For DIGESTS."""
    links = "followed" if "--copy-links" in parcel.options else "kept"
    return "".join(f"{word}\0" for word in (f"/{links} {'yes' if hashed else 'no'} {root}", *paths))


def _insist(copy: Callable[[], object], say: Callable[[str], None]) -> None:
    for left in (2, 1, 0):
        try:
            copy()
            return
        except (Unreachable, TimedOut) as error:
            if not left:
                raise
            say(f"{error}. Going on where it was cut")
