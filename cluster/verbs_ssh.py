"""The verbs that go to the machines: terminals, commands, files, logs, TensorBoard. All by the cluster's ssh_config."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster import doors
from cluster import ssh as openssh
from cluster.ec2 import CallFailed, Cloud
from cluster.follow import FAILED, FINISHED
from cluster.hosts import hosted
from cluster.journal import Journal, home, owner_name
from cluster.local import free_port
from cluster.run import TENSORBOARD, Refused, agree, port_of
from cluster.ssh import Host, Shell, Trouble, each
from cluster.stacks import stack_for
from cluster.verbs import Region, one_cluster
from cluster.verbs_lists import Cluster, span
from engine.cli import flag

T = TypeVar("T")
COMMAND_S = 3600                                  # a command on all machines ends after this
# The JSON of each file, null where it is not there or not whole; the machine's clock last. Python 3.8.
LOOK = """
import json, sys, time
said = []
for path in sys.argv[1:]:
    try:
        with open(path) as file:
            said.append(json.load(file))
    except (OSError, ValueError):
        said.append(None)
print(json.dumps(said + [time.time()]))
"""
# TensorBoard on a port, started where nothing answers there; it lives as long as the machine.
BOARD = """
answers() { "$python" -c 'import socket, sys; socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1)' $port; }
cd txl || exit
python=python3
[ -x venv/bin/python ] && python=venv/bin/python
answers 2> /dev/null && exit
nohup "$python" -m tensorboard.main "--logdir=$run" --host=127.0.0.1 --port=$port >> "$run/logs/tensorboard.log" 2>&1 &
for second in $(seq 60); do
    sleep 1
    answers 2> /dev/null && exit
    kill -0 $! 2> /dev/null || break
done
tail -n 3 "$run/logs/tensorboard.log" >&2
exit 1
"""
# The file $1 in an editor, on the machine itself.
EDIT = """
for editor in "${EDITOR:-}" nano vi; do
    [ -z "$editor" ] || ! command -v "${editor%% *}" > /dev/null || exec $editor "$1"
done
echo "No editor is on $2. Install one:  python -m cluster cmd $3 --node=${2#node-} sudo apt-get install -y nano" >&2
exit 127
"""


@dataclass(frozen=True)
class To(Region):
    ssh_user: str | None = flag("on the machines; else the launch's", None)


@dataclass(frozen=True)
class ToOne(To):
    node: int = flag("which machine", 0)


@dataclass(frozen=True)
class ToSome(ToOne):
    all_nodes: bool = flag("on all machines at once", False)
    yes: bool = flag("do not ask", False)


@dataclass(frozen=True)
class Logs(To):
    rank: int = flag("whose log", 0)
    follow: bool = flag("until Ctrl-C; -f is short for it", False)


def status(words: Sequence[str], flags: To) -> int:
    found, shells = connect(words, flags)
    run = f"txl/runs/{found.name}"

    def look(shell: Shell) -> list[Any]:
        paths = shlex.join([f"{run}/nodes/{shell.name.removeprefix('node-')}.json", f"{run}/status.json"])
        return json.loads(shell.run(f'python3 -c {shlex.quote(LOOK)} {paths} '
                                    f'"${{TXL_ROOT:-}}/var/lib/txl/deadline.json"').out)

    answers = {shell.name: answer for shell, answer in zip(shells, _asked(shells, look))}
    where = {f"node-{x.node}": (x.id, x.state) for x in found.machines} or {
        shell.name: (shell.host.address, "") for shell in shells if shell.host}
    for name, (id, state) in where.items():
        said = answers.get(name, f"it is {state}")
        print(f"{name} {id}: " + (node_text(*said, guarded=bool(found.machines)) if isinstance(said, list) else
                                  getattr(said, "reason", str(said))))
    first = answers.get("node-0")
    if isinstance(first, list):
        print(f"training: {training_text(first[1] or {})}")
    return FINISHED if all(isinstance(answer, list) for answer in answers.values()) else FAILED


def node_text(node: Mapping[str, Any] | None, training: object, deadline: Mapping[str, Any] | None, now: float, *,
              guarded: bool = True) -> str:
    """A machine in a line, from its nodes/I.json and, where it must be `guarded`, deadline.json at its own `now`."""
    if not node:
        doing = "no supervisor"
    elif node["state"] == "ended":
        doing = f"ended with status {node['status']}, {span(now - node['at'])} ago"
    else:
        doing = f"{node['state']}, last heard {now - node['at']:.0f} s ago"
    if not guarded:
        return doing
    return f"{doing}; " + (f"powers itself off in {span(deadline['in_s'])} as things stand ({deadline['why']})"
                           if deadline else "NO WATCHDOG answers for its end")


def training_text(training: Mapping[str, Any]) -> str:
    if not training:
        return "nothing said yet"
    return f"{training.get('state')} at step {training.get('step')}. {training.get('message', '')}".rstrip(". ")


def logs(words: Sequence[str], flags: Logs) -> int:
    """Of the machines; of this machine's folder where there are none."""
    where = cluster_or_run(words[0], flags)
    file, tail = f"logs/rank-{flags.rank}.log", ["tail", "-n", "20", "-F"] if flags.follow else ["cat"]
    if isinstance(where, Path):
        path = where / file
        if not path.exists():
            raise Refused(f"There is no {path}")
        return _until_ctrl_c([*tail, str(path)])
    found, shells = where
    path = Path("txl/runs", found.name, file)
    there = _asked(shells, lambda shell: shell.run(f"test -e {shlex.quote(str(path))}", check=False).status == 0)
    if True not in there:
        if silent := [answer for answer in there if isinstance(answer, Trouble)]:
            raise silent[0]
        raise Refused(f"No machine of {found.name} has {path} yet. What torchrun said:  "
                      f"python -m cluster cat {found.name} txl/runs/{found.name}/logs/node-0.log")
    shell = shells[there.index(True)]
    return _until_ctrl_c(["ssh", "-F", str(shell.config), "-T", shell.name, shlex.join([*tail, str(path)])])


def ssh(words: Sequence[str], flags: ToOne) -> int:
    _, shells = connect(words[:1], flags)
    return _at(one(shells, flags.node), words[1:])


def cmd(words: Sequence[str], flags: ToSome) -> int:
    """One word is a line for the shell there, several are a command and its arguments."""
    found, shells = connect(words[:1], flags)
    if not flags.all_nodes:
        return _at(one(shells, flags.node), words[1:])
    line = words[1] if len(words) == 2 else shlex.join(words[1:])
    agree(f"Run {line!r} on {len(shells)} machines of {found.name}?", flags.yes, len(shells) > 1)
    with interruptible() as interrupted:
        results = _asked(shells, lambda shell: shell.run(line, check=False, tied=True, timeout_s=COMMAND_S,
                                                         interrupted=interrupted))
    failed = False
    for shell, result in zip(shells, results):
        if isinstance(result, Trouble):
            failed = True
            print(result, file=sys.stderr)
            continue
        for text, file in ((result.out, sys.stdout), (result.err, sys.stderr)):
            print("".join(f"{shell.name}: {said}\n" for said in text.splitlines()), end="", file=file)
        if result.status:
            failed = True
            print(f"{shell.name}: status {result.status}", file=sys.stderr)
    return FAILED if failed else FINISHED


def cat(words: Sequence[str], flags: ToOne) -> int:
    shell = one(connect(words[:1], flags)[1], flags.node)
    return _until_ctrl_c(["ssh", "-F", str(shell.config), "-T", shell.name, shlex.join(["cat", "--", words[1]])])


def put(words: Sequence[str], flags: ToOne) -> int:
    shell = one(connect(words[:1], flags)[1], flags.node)
    if not Path(words[1]).exists():
        raise Refused(f"There is no {words[1]} here")
    with interruptible() as interrupted:
        shell.put(words[1], words[2], interrupted=interrupted)
    return FINISHED


def get(words: Sequence[str], flags: ToOne) -> int:
    shell = one(connect(words[:1], flags)[1], flags.node)
    with interruptible() as interrupted:
        shell.get(words[1], words[2], interrupted=interrupted)
    return FINISHED


def nano(words: Sequence[str], flags: ToOne) -> int:
    """The machine's $EDITOR, else nano, else vi."""
    if not sys.stdin.isatty():
        raise Refused("An editor needs a terminal. To copy a file:  python -m cluster get, and put")
    found, shells = connect(words[:1], flags)
    shell = one(shells, flags.node)
    path = words[1] if words[1].startswith("/") else f"./{words[1]}"          # else -x would be a flag
    return _at(shell, ["sh", "-c", EDIT, "sh", path, shell.name, found.name])


def attach(words: Sequence[str], flags: ToOne) -> int:
    """tmux's session of the run on a machine, made with its log in it where it is not there."""
    found, shells = connect(words[:1], flags)
    log = shlex.join(["tail", "-n", "100", "-F", f"runs/{found.name}/logs/node-{flags.node}.log"])
    session = "txl-" + re.sub(r"[.:]", "_", found.name)       # which tmux keeps for itself
    return _at(one(shells, flags.node),
               [f"cd txl && {shlex.join(['tmux', 'new-session', '-A', '-s', session, log])}"])


def tensorboard(words: Sequence[str], flags: To) -> int:
    """Until Ctrl-C: through a tunnel to node 0, or of this machine's folder where the run has no machines."""
    where = cluster_or_run(words[0] if words else None, flags)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if isinstance(where, Path):
        print(f"TensorBoard of {where} until Ctrl-C: {url}", flush=True)
        return _until_ctrl_c([sys.executable, "-m", "tensorboard.main", f"--logdir={where}", "--host=127.0.0.1",
                              f"--port={port}"])
    found, shells = where
    there, first = port_of(found.name, TENSORBOARD), one(shells, 0)
    print(f"Looking for TensorBoard on {first.name}.", flush=True)
    first.run(f"run={shlex.quote(f'runs/{found.name}')} port={there}\n{BOARD}", timeout_s=90)
    tunnel = openssh.forward(first.config, first.name, port, there)
    print(f"TensorBoard of {found.name} until Ctrl-C: {url}", flush=True)
    try:
        tunnel.wait()
    except KeyboardInterrupt:
        return FINISHED
    finally:
        tunnel.kill()
        tunnel.wait()
    raise Trouble(first.name, "the tunnel broke. Give the command again")


def connect(words: Sequence[str], flags: To) -> tuple[Cluster, list[Shell]]:
    """This user's cluster, and its running machines; no machine of AWS where a run was started on hosts that exist.

    Raises Refused and CallFailed.
    """
    if words and (shells := hosted(words[0])):
        return Cluster(words[0], owner_name(), ()), shells
    cloud = Cloud(flags.region)
    found = one_cluster(cloud, words)
    return found, shells_of(cloud, found, flags.ssh_user)


def shells_of(cloud: Cloud, found: Cluster, ssh_user: str | None) -> list[Shell]:
    """Its ssh_config is written anew: machines that were stopped have other addresses, another laptop has no file."""
    machines = [x for x in found.machines if x.state == "running"]
    if not machines:
        raise Refused(f"No machine of {found.name} runs: {', '.join(f'{x.id} {x.state}' for x in found.machines)}")
    doors.close_forgotten(cloud, found.name)
    folder, port = Journal(found.name).folder, os.environ.get("TXL_SSH_PORT")
    hosts = [Host(x.node, x.public or "", x.private, x.id, jump=x.node > 0 and not x.public) for x in machines]
    if bare := [host.alias for host in hosts if not host.jump and not host.address]:
        raise Refused(f"{', '.join(bare)} has no public address, so nothing of {found.name} can be reached")
    user = ssh_user or _noted_user(folder / "ssh_config") or stack_for(cloud.type(machines[0].kind)).ssh_user
    return openssh.shells(openssh.write_config(folder, hosts, user=user, key=openssh.key(home()),
                                               port=int(port) if port else None), hosts)


def one(shells: Sequence[Shell], node: int) -> Shell:
    for shell in shells:
        if shell.name == f"node-{node}":
            return shell
    raise Refused(f"node-{node} does not run; there is {', '.join(shell.name for shell in shells)}")


def cluster_or_run(name: str | None, flags: To) -> tuple[Cluster, list[Shell]] | Path:
    """A run's machines, or its folder here where it has none: of this name first, then with it in theirs."""
    if name and (shells := hosted(name)):
        return Cluster(name, owner_name(), ()), shells
    folders = [path for path in Path("runs").glob("*/recipe.json") if name in (None, path.parent.name)]
    here = max(folders, key=lambda path: path.stat().st_mtime).parent if folders else None
    try:
        cloud = Cloud(flags.region)
        found = one_cluster(cloud, [name] if name else [])
    except (Refused, CallFailed):
        if here is None:
            raise
        return here
    if here is not None and name not in (None, found.name):
        return here
    return found, shells_of(cloud, found, flags.ssh_user)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: for work in threads, which would not hear of it."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _asked(shells: Sequence[Shell], ask: Callable[[Shell], T]) -> list[T | Trouble]:
    """What each answers, or what is wrong with it: one that is silent does not silence the others."""
    def answer(shell: Shell) -> T | Trouble:
        try:
            return ask(shell)
        except Trouble as error:
            return error
    return each(shells, answer, name=lambda shell: shell.name)


def _at(shell: Shell, words: Sequence[str]) -> int:
    """A terminal there, or a command in it."""
    argv = ["sh", "-c", words[0]] if len(words) == 1 else words
    return FAILED if openssh.interactive(shell.config, shell.name, argv) else FINISHED


def _noted_user(config: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        if noted := re.search(r"^  User (\S+)$", config.read_text(), re.M):
            return noted[1]
    return None


def _until_ctrl_c(words: Sequence[str]) -> int:
    """A program in the foreground, which Ctrl-C ends as well."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        try:
            return FAILED if process.wait() else FINISHED
        except KeyboardInterrupt:
            process.terminate()
            return FINISHED
