"""What a launch does on machines that answer: readiness, code, data, environment, start, and the results back.

Everything goes from here to node 0 once, and from there to the others, inside their network. The functions raise
ssh.Trouble, which names the machines, and ssh.Interrupted.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster.ssh import (
    COPY_S,
    RSYNC,
    Denied,
    Failed,
    Interrupted,
    Shell,
    SomeFailed,
    TimedOut,
    Trouble,
    Unreachable,
    config_text,
    each,
    never,
    run_here,
)

HOME = "txl"                                      # where the code is and everything runs, below the login's home
PATIENCE_S = 60                                   # for what is wrong with a machine that has booted, as it may settle
CLOCK_S = 5                                       # between a machine's clock and ours
HASHED_GIB = 1                                    # what is larger is compared by sizes
TRAINING = ("numpy", "tensorboard", "tokenizers") # what it imports beside torch
BOOTING = "cloud-init is still at work"

# What a machine is sent of the checkout, and what is deleted there: all but what git ignores and what only it has.
# --delete-after: a .gitignore that is new itself is there by then.
CODE = ("--delete-after", "--exclude=.git", "--exclude=/runs", "--exclude=/data", "--exclude=/venv",
        "--filter=:- .gitignore")
DATA = ("--copy-links",)                          # a link's target is not on the machine

PROBE = """
set -f
PATH=$PATH:/opt/amazon/efa/bin
echo "began $(date +%s.%N)"
if command -v cloud-init > /dev/null; then
    words=$(timeout 20 cloud-init status --wait --long 2>&1)
    echo "cloud-init $?" $words
fi
if [ $gpus -gt 0 ]; then
    words=$(timeout 60 nvidia-smi -L 2>&1)
    echo "gpus $(printf '%s\\n' "$words" | grep -c '^GPU ')" $(printf '%s\\n' "$words" | tail -n 1)
fi
if [ $efa -gt 0 ]; then
    words=$(timeout 30 fi_info -p efa 2>&1)
    echo "efa $?" $(printf '%s\\n' "$words" | tail -n 1)
fi
if [ -n "$python" ]; then
    words=$(timeout 30 "$python" -c '' 2>&1)
    echo "python $?" $words
fi
echo "disk_kib $(df -Pk . | awk 'NR == 2 {print $4}')"
echo "ended $(date +%s.%N)"
"""

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

# Whether a Python has what training needs; the last line of the traceback says what is missing.
CHECK = f"""
import os, sys
assert sys.version_info >= (3, 10), "Python is %d.%d, needed is 3.10" % sys.version_info[:2]
import {", ".join(TRAINING)}, torch
version = torch.__version__
assert tuple(map(int, version.split(".")[:2])) >= (2, 11), "torch is " + version + ", needed is 2.11"
assert torch.cuda.is_available() or not os.path.exists("/proc/driver/nvidia/version"), "torch sees no GPU"
"""

# The environment on node 0. What an interrupted installation left is used, except where it has no pip yet.
INSTALL = """
set -e
rm -f venv/stamp
"$python" -c 'import sys; sys.exit("ERROR: Python is %d.%d, needed is 3.10" % sys.version_info[:2]
                                   if sys.version_info < (3, 10) else 0)'
if ! venv/bin/python -m pip --version > /dev/null 2>&1; then
    rm -rf venv
    if ! "$python" -m venv venv >&2; then         # Debian and Ubuntu keep a part of it in a package of its own
        rm -rf venv
        sudo -n apt-get -o DPkg::Lock::Timeout=300 update
        sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y python3-venv
        "$python" -m venv venv >&2
    fi
fi
pip() { venv/bin/python -m pip --no-input --disable-pip-version-check install --progress-bar=off "$@"; }
"""


@dataclass(frozen=True)
class Needs:
    """What a machine must have."""
    gpus: int
    efa: bool
    disk_gib: float                               # free
    python: str | None                            # a command; None: none is looked for


class NotReady(Trouble):
    """A machine came, but not as needed, or not in time."""


def wait_ready(shells: Sequence[Shell], needs: Needs, *, deadline_s: float, say: Callable[[str], None] = print,
               interrupted: Callable[[], bool] = never, clock_now: Callable[[], float] = time.time,
               patience_s: float = PATIENCE_S) -> None:
    """Until every machine answers, has booted, and is as needed. Raises SomeFailed of all that are not by then.

    What is wrong once a machine has booted is given `patience_s` to settle, a key not accepted as well: then waiting
    on would only cost. Silence is given the whole of `deadline_s`.
    """
    began = time.monotonic()

    def wait(shell: Shell) -> None:
        reason, wrong_since = None, None
        while True:
            left, sent = began + deadline_s - time.monotonic(), clock_now()
            try:
                answer = shell.run(probe(needs), check=False, tied=True, timeout_s=max(1, min(180, left)),
                                   interrupted=interrupted)
                reason = shortcoming(answer.out, needs, sent, clock_now())
                settles = reason != BOOTING
            except Denied as error:
                reason, settles = error.reason, True
            except Unreachable as error:
                reason, settles = error.reason, False
            except TimedOut:
                reason, settles = reason or "it does not answer", False
            now = time.monotonic()
            if reason is None:
                return say(f"{shell.name} is ready ({now - began:.0f} s)")
            wrong_since = (wrong_since or now) if settles else None
            if now - began > deadline_s:
                raise NotReady(shell.name, f"not ready after {deadline_s:g} s: {reason}")
            if wrong_since and now - wrong_since >= patience_s:
                raise NotReady(shell.name, reason)
            _pause(1, interrupted)

    each(shells, wait, name=_name)


def probe(needs: Needs) -> str:
    """The one command that asks a machine everything; shortcoming() reads its answer. POSIX sh."""
    return f"gpus={needs.gpus} efa={int(needs.efa)} python={shlex.quote(needs.python or '')}\n{PROBE}"


def shortcoming(answer: str, needs: Needs, sent: float, received: float) -> str | None:
    """What a machine lacks; None where nothing. `sent`, `received`: our clock around the question. Pure."""
    said = {word: rest for word, _, rest in (line.partition(" ") for line in answer.splitlines())}
    try:
        return next(_shortcomings(said, needs, sent, received), None)
    except (KeyError, ValueError):
        return f"what it answers makes no sense: {' '.join(answer.split())[:300] or 'nothing'}"


def hold(shells: Sequence[Shell], interrupted: Callable[[], bool] = never) -> None:
    """Tell the watchdogs that somebody is at work here; for a while, they keep their machines on."""
    folder, text = '"${TXL_ROOT:-}/var/lib/txl/lease"', str(time.time_ns())
    command = f"if [ -d {folder} ]; then echo {text} > {folder}/hold; fi"
    each(shells, lambda shell: shell.run(command, interrupted=interrupted), name=_name)


@contextlib.contextmanager
def holding(shells: Sequence[Shell], every_s: float = 60) -> Iterator[None]:
    """hold() again and again during long work. A machine that cannot be told is left to the work to find."""
    done = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(Trouble, Interrupted):
                hold(shells, done.is_set)
            if done.wait(every_s):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def send_code(shells: Sequence[Shell], checkout: Path, *, say: Callable[[str], None] = print,
              interrupted: Callable[[], bool] = never) -> None:
    """The checkout, without what .gitignore names, is ~/txl on every machine; runs/, data/ and venv/ there stay."""
    _deliver(shells, Parcel(f"{checkout.absolute()}/", checkout, HOME, CODE), say, interrupted)


def send(shells: Sequence[Shell], local: Path, remote: str, *, say: Callable[[str], None] = print,
         interrupted: Callable[[], bool] = never) -> None:
    """A file, or what is in a folder, into the folder `remote` (below the home) of every machine."""
    local = local.absolute()                      # in a relative path rsync may take a colon for a machine's name
    parcel = Parcel(f"{local}/", local, remote, DATA) if local.is_dir() else (
        Parcel(str(local), local.parent, remote, DATA, local.name))
    _deliver(shells, parcel, say, interrupted)


def setup(shells: Sequence[Shell], stack_python: str | None, torch: str, index_url: str | None, requirements: str, *,
          skip: bool, say: Callable[[str], None] = print, interrupted: Callable[[], bool] = never) -> str:
    """The Python to run the training with, as seen from ~/txl: one that is there and has everything, else a new one.

    `requirements`: the text of requirements.txt, of which training needs a part. A new one is made on node 0 and
    copied, as only node 0 may have a way out to the package index. A copy works under another home too, as long as its
    programs are called as `venv/bin/python -m`: python finds its packages from where it is, only scripts have paths.
    """
    wanted = [f"torch=={torch}", *training_requirements(requirements)]
    stamp = hashlib.sha256("\n".join([*wanted, index_url or ""]).encode()).hexdigest()[:16]
    image = stack_python or "python3"
    made = f'[ "$(cat venv/stamp 2> /dev/null)" = {stamp} ] && venv/bin/python'
    if _lacks(shells, made, interrupted) is None:
        return "venv/bin/python"
    if (lacks := _lacks(shells, shlex.quote(image), interrupted)) is None:
        return image
    if skip:
        raise Trouble(lacks.name, f"{lacks.reason}\n--skip_setup takes {image} as it is; without it all is installed")
    say(f"Installing {', '.join(wanted)} on {shells[0].name}: minutes")
    first, rest = (shlex.quote(wanted[0]), shlex.join(wanted[1:]))
    script = (f"cd {HOME}\npython={shlex.quote(image)}\n{INSTALL}\n"
              f"pip {first}{f' --index-url {shlex.quote(index_url)}' if index_url else ''}\npip {rest}\n")
    done = shells[0].run(script, check=False, tied=True, timeout_s=3600, interrupted=interrupted)
    if done.status:
        raise Failed(shells[0].name, f"the installation failed: {pips_reason(done.err)}\nWith an image whose "
                                     f"{image} has torch, {', '.join(TRAINING)}: --skip_setup", done.status)
    if len(shells) > 1:
        say(f"Copying it to {len(shells) - 1} more")
        _introduce(shells, interrupted)
        _fan_out(shells, f"{HOME}/venv/", f"{HOME}/venv/", ("--delete", "--exclude=/stamp"), interrupted)
    if lacks := _lacks(shells, "venv/bin/python", interrupted):
        raise lacks
    each(shells, lambda shell: shell.run(f"echo {stamp} > {HOME}/venv/stamp", interrupted=interrupted), name=_name)
    return "venv/bin/python"


def training_requirements(text: str) -> list[str]:
    """The lines of a requirements.txt that training needs, in TRAINING's order. torch is the stack's."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [next((line for line in lines if re.match(rf"{name}\b", line)), name) for name in TRAINING]


def pips_reason(err: str) -> str:
    """What pip says it is, else the last words."""
    errors = [line for line in err.splitlines() if line.startswith("ERROR: ")]
    return "\n".join(errors[:3] or err.strip().splitlines()[-3:]) or "without a word"


def write(shell: Shell, files: Mapping[str, str], interrupted: Callable[[], bool] = never) -> None:
    """{path: text} below the home: whole or not at all, mode 0600, by standard input, as a text may be a secret."""
    shell.run(f"python3 -c {shlex.quote(WRITE)}", input=json.dumps(files), interrupted=interrupted)


def start(shells: Sequence[Shell], run_dir: str, launches: Sequence[Mapping], files: Mapping[str, str] | None = None, *,
          python3: str = "python3", interrupted: Callable[[], bool] = never) -> None:
    """Launch i goes to machine i with `files` (paths below ~/txl); when all have theirs, all supervisors start.

    run_dir: runs/NAME. A request to end that an earlier launch left is withdrawn.
    """
    def give(i: int) -> None:
        write(shells[i], {f"{HOME}/{path}": text for path, text in
                          {**(files or {}), f"{run_dir}/nodes/{i}.launch.json": json.dumps(launches[i])}.items()},
              interrupted)

    def begin(i: int) -> None:
        shells[i].run(f"cd {HOME} && rm -f {shlex.quote(f'{run_dir}/nodes/{i}.kill')} && "
                      + shlex.join([python3, "cluster/host/supervisor.py", "--detach", run_dir, str(i)]),
                      timeout_s=60, interrupted=interrupted)

    for step in (give, begin):
        each(range(len(shells)), step, name=lambda i: shells[i].name)


def fetch(shell: Shell, remote_run: str, local: Path, *, models: bool = False,
          interrupted: Callable[[], bool] = never) -> None:
    """The run's folder there (below the home) into `local`, without what the launcher has written or alone may read.

    A log that has grown costs what was added, and is replaced as a whole: who reads it here by name sees no half.
    """
    local.mkdir(parents=True, exist_ok=True)
    ours = ("lock", "stop", "recipe.json", "plan.txt", "command.txt", "commit.txt", "nodes/*.launch.json",
            "nodes/*.lock", "nodes/*.kill")
    shell.get(f"{remote_run}/", f"{local}/", *(f"--exclude=/{name}" for name in ours), "--exclude=.*.partial",
              *([] if models else ["--exclude=*.pt"]), interrupted=interrupted)


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


def _deliver(shells: Sequence[Shell], parcel: Parcel, say: Callable[[str], None],
             interrupted: Callable[[], bool]) -> None:
    """To node 0, from there to the others, and compared on all with what is here; once more where that differs."""
    make = f"mkdir -p {shlex.quote(parcel.target)}"
    each(shells, lambda shell: shell.run(make, interrupted=interrupted), name=_name)
    _introduce(shells, interrupted)
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


def _deliver_once(shells: Sequence[Shell], parcel: Parcel, say: Callable[[str], None], interrupted: Callable[[], bool],
                  ) -> tuple[Contents, dict[str, Trouble]]:
    """What was here before it was sent, and the machines where something else is now."""
    ours = _contents_here(parcel, interrupted)
    if not ours.hashed:
        say(f"Sending {ours.gib:.1f} GiB of {parcel.source} to {shells[0].name}, less what is there already")
    _insist(lambda: shells[0].put(parcel.source, f"{parcel.target}/", *parcel.options, interrupted=interrupted), say)
    _fan_out(shells, f"{parcel.target}/{parcel.name}", f"{parcel.target}/", parcel.options, interrupted)
    command = shlex.join(["python3", "-c", DIGESTS, parcel.target, *_how(parcel, ours.hashed)])
    theirs = each(shells, lambda shell: shell.run(command, input=_listed(ours.paths), timeout_s=1800,
                                                  interrupted=interrupted).out.splitlines(), name=_name)
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


def _introduce(shells: Sequence[Shell], interrupted: Callable[[], bool]) -> None:
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
    each(others, lambda shell: shell.run(admit, interrupted=interrupted), name=_name)
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


def _fan_out(shells: Sequence[Shell], source: str, target: str, options: Sequence[str],
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
            reason = f"{first.name} could not copy to it: {words} (rsync {status})"
            errors[shell.name] = Failed(shell.name, reason, status)
    if errors:
        raise SomeFailed(errors, len(shells))


def _lacks(shells: Sequence[Shell], python: str, interrupted: Callable[[], bool]) -> Trouble | None:
    """Which machines' `python` (as a shell's words, in ~/txl) cannot train, and why; None: all can."""
    def check(shell: Shell) -> str | None:
        result = shell.run(f"cd {HOME} && {python} -c {shlex.quote(CHECK)}", check=False, timeout_s=300,
                           interrupted=interrupted)
        return (result.err.strip().splitlines() or ["it is not there"])[-1] if result.status else None

    reasons = each(shells, check, name=_name)
    lacking = {shell.name: Trouble(shell.name, reason) for shell, reason in zip(shells, reasons) if reason}
    return SomeFailed(lacking, len(shells)) if lacking else None


def _insist(copy: Callable[[], object], say: Callable[[str], None]) -> None:
    for left in (2, 1, 0):
        try:
            copy()
            return
        except (Unreachable, TimedOut) as error:
            if not left:
                raise
            say(f"{error}. Going on where it was cut")


def _pause(seconds: float, interrupted: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if interrupted():
            raise Interrupted("interrupted while waiting for the machines")
        time.sleep(0.1)


def _shortcomings(said: Mapping[str, str], needs: Needs, sent: float, received: float) -> Iterator[str]:
    status, _, words = said.get("cloud-init", "0").partition(" ")
    if status == "124":                           # of timeout(1)
        yield BOOTING
    elif status not in ("0", "2"):                # 2: it is done, and found something to complain about
        yield f"cloud-init failed: {words[:300]}"
    for name, enough in (("gpus", str(needs.gpus)), ("efa", "0"), ("python", "0")):
        found, _, words = said.get(name, enough).partition(" ")
        if found != enough:
            yield {"gpus": f"{found} of {needs.gpus} GPUs are there (nvidia-smi: {words})",
                   "efa": f"EFA was asked for and is not there (fi_info: {words})",
                   "python": f"{needs.python} does not run: {words}"}[name]
    if (free := int(said["disk_kib"]) / 2**20) < needs.disk_gib:
        yield f"{free:.1f} GiB are free on its disk, needed are {needs.disk_gib:g}"
    # Sent before it began, received after it ended: its clock is ahead of ours by `least` to `most` seconds. A slow way
    # there or back widens the two and accuses nobody.
    least, most = float(said["ended"]) - received, float(said["began"]) - sent
    if least >= CLOCK_S or most <= -CLOCK_S:
        ahead = (least + most) / 2
        yield f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} ours"


def _name(shell: Shell) -> str:
    return shell.name
