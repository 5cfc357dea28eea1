"""What a launch does on machines that are ready: the environment, the supervisors' start, and the results back.

The functions raise ssh.Trouble, which names the machines, and ssh.Interrupted.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import among
from cluster.deliver import HOME, Copy, spread
from cluster.ssh import NAME, Failed, Interrupted, Shell, SomeFailed, Trouble, each, never

TRAINING = ("numpy", "tensorboard", "tokenizers", "fire")        # what it imports beside torch; fire: txl.data
VENV = "venv/bin/python"

LAUNCHERS = ("lock", "stop", "recipe.json", "plan.txt", "command.txt", "commit.txt")      # of a run's folder

# Whether a Python has what training needs; the last line of the traceback says what is missing.
CHECK = """
import os, sys
assert sys.version_info >= (3, 10), "Python is %d.%d, needed is 3.10" % sys.version_info[:2]
import {packages}, torch
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


def hold(shells: Sequence[Shell], interrupted: Callable[[], bool] = never) -> None:
    """Tell the watchdogs that somebody is at work here; for a while, they keep their machines on."""
    folder, text = '"${TXL_ROOT:-}/var/lib/txl/lease"', str(time.time_ns())
    command = f"if [ -d {folder} ]; then echo {text} > {folder}/hold; fi"
    among.run(shells, command, interrupted=interrupted)


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


@dataclass(frozen=True)
class Environment:
    """What training needs of a Python, and `image`, the one that a machine comes with."""
    torch: str                                    # the version, where one must be installed
    index_url: str | None                         # that it is installed from; None: pip's own
    requirements: tuple[str, ...]                 # beside torch, as pip takes them
    packages: tuple[str, ...]                     # all of it, as Python imports it
    image: str = "python3"

    @property
    def stamp(self) -> str:
        """In ~/txl/venv/stamp once this is there as a whole."""
        wanted = [f"torch=={self.torch}", *self.requirements, self.index_url or ""]
        return hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]

    def check(self, python: str) -> str:
        """A command, in ~/txl, that fails where that Python cannot train; its last word of errors says why."""
        return f"{shlex.quote(python)} -c {shlex.quote(CHECK.format(packages=', '.join(self.packages)))}"

    def copies(self, python: str) -> list[Copy]:
        """What node 0 gives the others, that this Python be there too."""
        venv = f"{HOME}/venv/"
        return [Copy(venv, venv, ("--delete", "--exclude=/stamp"), (f"{venv}stamp", self.stamp))] * (python == VENV)


def environment(torch: str, index_url: str | None, requirements: str, *, more: Sequence[str] = ()) -> Environment:
    """`requirements`: the text of requirements.txt, of which training needs a part; `more`: packages beside those."""
    packages = (*TRAINING, *more)
    return Environment(torch, index_url, tuple(training_requirements(requirements, packages)), packages)


def provide(first: Shell, wanted: Environment, *, skip: bool, say: Callable[[str], None] = print,
            interrupted: Callable[[], bool] = never) -> str:
    """The Python on node 0 to train with, as seen from ~/txl: one that is there and has everything, else a new one.

    A new one is made on node 0 for all, as only node 0 may have a way out to the package index. A copy works under
    another home too, as long as its programs are called as `venv/bin/python -m`: python finds its packages from where
    it is, only scripts have paths.
    """
    script = (f'cd {HOME}\n[ "$(cat venv/stamp 2> /dev/null)" = {wanted.stamp} ] && {wanted.check(VENV)} && '
              f"echo {VENV} || {{ {wanted.check(wanted.image)} && echo {shlex.quote(wanted.image)}; }}")
    found = first.run(script, check=False, timeout_s=300, interrupted=interrupted)
    if not found.status:
        return found.out.splitlines()[-1]
    if skip:
        raise Trouble(first.name, _as_it_is(wanted, _last_line(found.err)))
    install(first, wanted, say=say, interrupted=interrupted)
    return VENV


def install(first: Shell, wanted: Environment, *, say: Callable[[str], None] = print,
            interrupted: Callable[[], bool] = never) -> None:
    """~/txl/venv on node 0."""
    torch = f"torch=={wanted.torch}"
    say(f"Installing {', '.join([torch, *wanted.requirements])} on {first.name}: minutes")
    index = f" --index-url {shlex.quote(wanted.index_url)}" if wanted.index_url else ""
    script = (f"cd {HOME}\npython={shlex.quote(wanted.image)}\n{INSTALL}\npip {shlex.quote(torch)}{index}\n"
              f"pip {shlex.join(wanted.requirements)}\n{wanted.check(VENV)}\necho {wanted.stamp} > venv/stamp\n")
    done = first.run(script, check=False, tied=True, timeout_s=3600, interrupted=interrupted)
    if done.status:
        raise Failed(first.name, f"the installation failed: {pips_reason(done.err)}\nWith an image whose "
                                 f"{wanted.image} has torch, {', '.join(wanted.packages)}: --skip_setup", done.status)


def everywhere(shells: Sequence[Shell], wanted: Environment, python: str, *, skip: bool,
               say: Callable[[str], None] = print, interrupted: Callable[[], bool] = never) -> str:
    """The Python for all: node 0's, where the others can train with theirs of that name, else a new one for all."""
    if not (lacks := _lacking(shells[1:], wanted, python, interrupted)):
        return python
    if python != VENV:
        if skip:
            raise Trouble(lacks.name, _as_it_is(wanted, lacks.reason)) from lacks
        install(shells[0], wanted, say=say, interrupted=interrupted)
    spread(shells, [replace(copy, unless=None) for copy in wanted.copies(VENV)], interrupted)
    if lacks := _lacking(shells[1:], wanted, VENV, interrupted):
        raise lacks
    return VENV


def training_requirements(text: str, packages: Sequence[str] = TRAINING) -> list[str]:
    """The lines of a requirements.txt that training needs, in the order of `packages`. torch is the stack's."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [next((line for line in lines if re.match(rf"{name}\b", line)), name) for name in packages]


def pips_reason(err: str) -> str:
    """What pip says it is, else the last words."""
    errors = [line for line in err.splitlines() if line.startswith("ERROR: ")][:3]
    broken = re.findall(r"^WARNING: Retrying .* after connection broken by (.*)", err, re.M)[-1:]
    return "\n".join([*errors, *broken] or err.strip().splitlines()[-3:]) or "without a word"


def start(shells: Sequence[Shell], run_dir: str, launches: Sequence[Mapping], files: Mapping[str, str] | None = None, *,
          python3: str = "python3", interrupted: Callable[[], bool] = never) -> None:
    """Launch i goes to machine i with `files` (paths below ~/txl); when all have theirs, all supervisors start.

    run_dir: runs/NAME. A request to end that an earlier launch left is withdrawn.
    """
    among.write(shells, [{f"{HOME}/{path}": text for path, text in
                          {**(files or {}), f"{run_dir}/nodes/{i}.launch.json": json.dumps(launch)}.items()}
                         for i, launch in enumerate(launches)], interrupted)
    nodes = shlex.quote(f"{run_dir}/nodes")
    among.run(shells, f"cd {HOME} && rm -f {nodes}/$node.kill && "
                      f"{shlex.join([python3, 'cluster/host/supervisor.py', '--detach', run_dir])} $node",
              timeout_s=60, interrupted=interrupted)


def trains(shells: Sequence[Shell], run: str, timeout_s: float = 60) -> list[bool]:
    """On which machines a supervisor of this run is at work."""
    def busy(shell: Shell) -> bool:
        lock = shlex.quote(f"{HOME}/runs/{run}/nodes/{shell.name.removeprefix('node-')}.lock")
        return shell.run(f"[ -e {lock} ] && ! flock -n {lock} true", check=False, timeout_s=timeout_s).status == 0
    return each(shells, busy, name=NAME)


def fetch(shell: Shell, remote_run: str, local: Path, *, models: bool = False, without: Sequence[str] = (),
          interrupted: Callable[[], bool] = never) -> None:
    """The run's folder there (below the home) into `local`, without what the launcher has written or alone may read.

    A log that has grown costs what was added, and is replaced as a whole: who reads it here by name sees no half.
    """
    local.mkdir(parents=True, exist_ok=True)
    private = ("nodes/*.launch.json", "nodes/*.lock", "nodes/*.kill", "nodes/*.mirror", "nodes/ray.*")
    shell.get(f"{remote_run}/", f"{local}/", *(f"--exclude=/{name}" for name in (*LAUNCHERS, *private, *without)),
              "--exclude=.*.partial", *([] if models else ["--exclude=*.pt"]), interrupted=interrupted)


def bring(shell: Shell, local: Path, remote_run: str, logs: Sequence[str], *, rest: bool,
          interrupted: Callable[[], bool] = never) -> None:
    """A run's `logs` (names) to a machine that goes on with it, and with `rest` its numbers. What is there stays.

    Each log to the machine that writes it: fetched from two, the older one could take the place of the newer.
    """
    shell.run(f"mkdir -p {remote_run}", interrupted=interrupted)
    no = (*LAUNCHERS, "status.json", "nodes", "checkpoints", "logs/*", ".*")
    shell.put(f"{local}/", f"{remote_run}/", "--ignore-existing", "--include=/logs/",
              *(f"--include=/logs/{name}" for name in logs),
              *([f"--exclude=/{name}" for name in no] if rest else ["--exclude=*"]), interrupted=interrupted)


def _lacking(others: Sequence[Shell], wanted: Environment, python: str,
             interrupted: Callable[[], bool]) -> Trouble | None:
    """Which of the others cannot train with it, and why; None: all can, and have it on record."""
    record = f" && echo {wanted.stamp} > venv/stamp" if python == VENV else ""

    results = among.run(others, f"cd {HOME} && {wanted.check(python)}{record}", check=False, timeout_s=300,
                        interrupted=interrupted)
    lacking = {shell.name: Trouble(shell.name, _last_line(result.err)) for shell, result in zip(others, results)
               if result.status}
    return SomeFailed(lacking, len(others)) if lacking else None


def _last_line(err: str) -> str:
    return (err.strip().splitlines() or ["it is not there"])[-1]


def _as_it_is(wanted: Environment, reason: str) -> str:
    return f"{reason}\n--skip_setup takes {wanted.image} as it is; without it all is installed"
