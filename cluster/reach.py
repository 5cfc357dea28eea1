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
from pathlib import Path

from cluster.deliver import HOME, fan_out, introduce, write
from cluster.ssh import NAME, Failed, Interrupted, Shell, SomeFailed, Trouble, each, never

TRAINING = ("numpy", "tensorboard", "tokenizers") # what it imports beside torch

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
    each(shells, lambda shell: shell.run(command, interrupted=interrupted), name=NAME)


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


def setup(shells: Sequence[Shell], stack_python: str | None, torch: str, index_url: str | None, requirements: str, *,
          skip: bool, more: Sequence[str] = (), say: Callable[[str], None] = print,
          interrupted: Callable[[], bool] = never) -> str:
    """The Python to run the training with, as seen from ~/txl: one that is there and has everything, else a new one.

    `requirements`: the text of requirements.txt, of which training needs a part; `more`: packages beside those. A new
    one is made on node 0 and copied, as only node 0 may have a way out to the package index. A copy works under
    another home too, as long as its programs are called as `venv/bin/python -m`: python finds its packages from where
    it is, only scripts have paths.
    """
    packages = (*TRAINING, *more)
    wanted = [f"torch=={torch}", *training_requirements(requirements, packages)]
    stamp = hashlib.sha256("\n".join([*wanted, index_url or ""]).encode()).hexdigest()[:16]
    image = stack_python or "python3"
    made = f'[ "$(cat venv/stamp 2> /dev/null)" = {stamp} ] && venv/bin/python'
    if _lacks(shells, made, packages, interrupted) is None:
        return "venv/bin/python"
    if (lacks := _lacks(shells, shlex.quote(image), packages, interrupted)) is None:
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
                                     f"{image} has torch, {', '.join(packages)}: --skip_setup", done.status)
    if len(shells) > 1:
        say(f"Copying it to {len(shells) - 1} more")
        introduce(shells, interrupted)
        fan_out(shells, f"{HOME}/venv/", f"{HOME}/venv/", ("--delete", "--exclude=/stamp"), interrupted)
    if lacks := _lacks(shells, "venv/bin/python", packages, interrupted):
        raise lacks
    each(shells, lambda shell: shell.run(f"echo {stamp} > {HOME}/venv/stamp", interrupted=interrupted), name=NAME)
    return "venv/bin/python"


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


def fetch(shell: Shell, remote_run: str, local: Path, *, models: bool = False, without: Sequence[str] = (),
          interrupted: Callable[[], bool] = never) -> None:
    """The run's folder there (below the home) into `local`, without what the launcher has written or alone may read.

    A log that has grown costs what was added, and is replaced as a whole: who reads it here by name sees no half.
    """
    local.mkdir(parents=True, exist_ok=True)
    private = ("nodes/*.launch.json", "nodes/*.lock", "nodes/*.kill", "nodes/*.mirror")
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


def _lacks(shells: Sequence[Shell], python: str, packages: Sequence[str],
           interrupted: Callable[[], bool]) -> Trouble | None:
    """Which machines' `python` (as a shell's words, in ~/txl) cannot train, and why; None: all can."""
    program = CHECK.format(packages=", ".join(packages))

    def check(shell: Shell) -> str | None:
        result = shell.run(f"cd {HOME} && {python} -c {shlex.quote(program)}", check=False, timeout_s=300,
                           interrupted=interrupted)
        return (result.err.strip().splitlines() or ["it is not there"])[-1] if result.status else None

    reasons = each(shells, check, name=NAME)
    lacking = {shell.name: Trouble(shell.name, reason) for shell, reason in zip(shells, reasons) if reason}
    return SomeFailed(lacking, len(shells)) if lacking else None
