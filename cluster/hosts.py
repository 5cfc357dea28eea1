"""The backend `ssh`: machines that exist, by --hosts. What is on them is used and left; none is ever powered off.

They are reached as the user's own `ssh HOST` reaches them: by the names, users, ports, keys, jumps and known host keys
of ~/.ssh/config, which is asked by `ssh -G` and written out, since a launch has a configuration of its own.
"""
from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster import ray_gang, reach, ssh
from cluster.backends import Watch, Wish
from cluster.deliver import HOME
from cluster.journal import Journal, home
from cluster.outfit import Ground, Outfit, node_command, pages
from cluster.plan import Layout, Node, Plan
from cluster.remote import RemoteJob
from cluster.run import Broken, Refused, Stopped
from cluster.ssh import NAME, Host, Interrupted, Shell, SomeFailed, Trouble
from cluster.stacks import CPU_INDEX, CURRENT, TORCH, VOLTA

HOSTED = "hosts"                                  # the journal's note of where a run was started
VOLTA_CAPABILITY = 7.0
ASK_S = 60

# What a machine has, and what is in the way: a line each.
PROBE = """
cd
echo "cores $(nproc)"
echo "address $(echo $SSH_CONNECTION | cut -d ' ' -f 3) $(hostname -I 2> /dev/null)"
echo "gpus $(nvidia-smi -L 2> /dev/null | grep -c '^GPU ')"
echo "capability $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | sort -n | head -n 1)"
for program in python3 rsync flock; do command -v $program > /dev/null || echo "lacks $program"; done
[ ! -e txl ] || [ -e txl/cluster/host/supervisor.py ] && [ ! -e txl/.git ] || echo "strange ~/txl"
for lock in txl/runs/*/nodes/*.lock; do [ -e "$lock" ] && { flock -n "$lock" true || echo "busy $lock"; }; done
true
"""
# Of `ssh -G`: what decides who is reached and how one is let in. What is for a person is left out.
SETTINGS = {"user": "User", "port": "Port", "identityfile": "IdentityFile", "identitiesonly": "IdentitiesOnly",
            "identityagent": "IdentityAgent", "certificatefile": "CertificateFile", "proxycommand": "ProxyCommand",
            "addressfamily": "AddressFamily", "bindaddress": "BindAddress"}


@dataclass(frozen=True)
class Machine:
    """One of the hosts, as it was found."""
    name: str                                     # as the user has it
    shell: Shell
    cores: int
    gpus: int
    capability: float                             # of the oldest GPU, as CUDA counts; 0 without

    @property
    def ground(self) -> Ground:
        """What to install where there is no torch that will do."""
        if not self.gpus:
            return Ground(TORCH, CPU_INDEX)
        stack = VOLTA if self.capability <= VOLTA_CAPABILITY else CURRENT
        return Ground(stack.torch, stack.index_url)


def survey(wish: Wish) -> tuple[Machine, ...]:
    """Asks each of the hosts what it has. Raises Refused where one is not fit, or works already."""
    named = parsed(wish.terms.hosts)
    if len(named) != wish.config.machines.count:
        raise Refused(f"--hosts names {len(named)} machine(s), and the config is for {wish.config.machines.count}. "
                      f"For these:  --machines={len(named)}")
    folder = Journal(wish.name).folder
    refuse_elsewhere(wish.name, [name for name, _ in named])
    found = [resolved(i, name, wish.terms.ssh_user) for i, (name, _) in enumerate(named)]
    hosts = [host for host, _ in found]
    config = ssh.write_config(folder, hosts, user=None, key=None, port=None)
    ssh.remember(folder, "".join(keys for _, keys in found))
    shells = ssh.shells(config, hosts)
    try:
        said = ssh.each(shells, lambda shell: shell.run(PROBE, timeout_s=ASK_S).out, name=NAME)
    except Trouble as error:
        names = ", ".join(f"node-{i} is {name}" for i, (name, _) in enumerate(named))
        raise Refused(f"{error}\n({names}. Each must be reached without a question:  ssh -o BatchMode=yes HOST true)"
                      f"\nNothing was started.") from error
    machines = tuple(machine(name, among, shell, answer) for (name, among), shell, answer in zip(named, shells, said))
    if problems := [f"{x.name}: {problem}" for x, answer in zip(machines, said)
                    for problem in in_the_way(answer, wish.name)]:
        raise Refused("\n".join([*problems, "Nothing was started."]))
    return machines


def lay_out(wish: Wish, machines: tuple[Machine, ...]) -> Layout:
    """A rank on each GPU, on as many of each machine as the one with the fewest has; without GPUs one on each."""
    gpus = min(x.gpus for x in machines)
    asked = wish.config.machines.gpus
    if asked and asked > max(1, gpus):
        raise ValueError(f"machines.gpus={asked}, but {min(machines, key=lambda x: x.gpus).name} has {gpus}")
    ranks = asked or max(1, gpus)
    nodes = tuple(Node(i, f"node-{i}", ranks, {"OMP_NUM_THREADS": str(1 if gpus else max(1, x.cores // ranks))},
                       node_command(wish, i, ranks, "python", f"node-{i}", "node-0")) for i, x in enumerate(machines))
    return Layout(
        nodes=nodes, facts=machines, cost="whatever they cost you: nobody here takes or gives them back",
        machines=", ".join(f"node-{i} is {x.name}" + (f" ({x.gpus} GPUs)" if x.gpus else "")
                           for i, x in enumerate(machines)),
        setup="none: python3 there as it is" if wish.terms.skip_setup else
              f"python3 there if it can train, else ~/{HOME}/venv with torch {machines[0].ground.torch}",
        notes=(*_notes(machines, ranks), *ray_gang.notes(wish)))


def apply(plan: Plan, watch: Watch) -> RemoteJob:
    """A training on the machines. Raises Refused, Stopped and Broken; supervisors that have begun are ended then."""
    machines: tuple[Machine, ...] = plan.layout.facts
    shells, journal = [x.shell for x in machines], Journal(plan.name)
    outfit = Outfit(plan, shells, machines[0].ground, watch)

    def rest() -> None:
        for shell in shells:
            shell.close()

    with journal.alone("launched"):
        try:
            launch = outfit.at_work()
            if launch is None:
                journal.note(HOSTED, names=[x.name for x in machines],
                             hosts=[asdict(shell.host) for shell in shells if shell.host])
                launch = outfit.start()
        except BaseException as error:
            ended(shells, plan)
            rest()
            if isinstance(error, Interrupted):
                raise Stopped("Given up. Nothing trains there.") from error
            if isinstance(error, (Trouble, OSError)):
                raise Broken(f"{error}\nNothing trains there. Once it is mended, the same command goes on.") from error
            raise
    return RemoteJob(plan.run_dir, shells, launch, watch, pages=pages(plan))


def hosted(run: str) -> list[Shell]:
    """The machines that the run was started on last, where those were of this backend."""
    if not re.fullmatch(r"[\w.-]+", run) or not (home() / "clusters" / run).exists():
        return []
    journal = Journal(run)
    notes = sorted([*journal.notes(HOSTED), *journal.notes("launched")], key=lambda note: note["at"])
    hosts = [Host(**of | {"settings": tuple(map(tuple, of["settings"]))})
             for of in (notes[-1].get("hosts", []) if notes else [])]
    return ssh.shells(journal.folder / "ssh_config", hosts)


def parsed(hosts: str | None) -> list[tuple[str, str | None]]:
    """Names as `ssh` takes them, and the machine's address for the others where that is said: a,b or a=10.0.0.5,b.

    `hosts` may be a file: a line each, the address second. Raises Refused.
    """
    if not hosts:
        raise Refused("Which machines?  --hosts=gpu1,gpu2  as ssh knows them, or a file with one on each line")
    path = Path(hosts)
    lines = path.read_text().splitlines() if path.is_file() else hosts.split(",")
    named = []
    for line in lines:
        words = re.split(r"[\s=]+", line.partition("#")[0].strip())
        if not words[0] and path.is_file():
            continue
        if len(words) > 2 or not re.fullmatch(r"(?!-)[\w.@:\[\]/-]+", words[0]):
            raise Refused(f"--hosts: {line.strip()!r} is no host, nor a host and its address among the machines")
        named.append((words[0], words[1] if len(words) == 2 else None))
    names = [name for name, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refused(f"--hosts has {', '.join(sorted(twice))} twice: a machine is one node")
    if not named:
        raise Refused(f"{hosts} names no machine")
    return named


def resolved(node: int, name: str, user: str | None) -> tuple[Host, str]:
    """The host, and lines for a known_hosts file: what one's own ssh knows of its keys. Raises Refused."""
    target, _, port = name.partition(":") if name.count(":") == 1 else (name, "", "")
    said = ssh.run_here(["ssh", *(["-p", port] if port else []), "-G", target], name, "ssh -G", 10)
    if said.status:
        raise Refused(f"ssh does not know what {name} is: {said.err.strip()}")
    settings: dict[str, list[str]] = {}
    for line in said.out.splitlines():
        key, _, value = line.partition(" ")
        settings.setdefault(key, []).append(value)
    address, jump = settings["hostname"][0], settings.get("proxyjump", ["none"])[0]
    options: dict[str, object] = {SETTINGS[key]: values if key == "identityfile" else values[0]
                                  for key, values in settings.items() if key in SETTINGS and values[0] != "none"}
    if user:
        options["User"] = user
    if jump != "none":                            # a name of the user's configuration, so found by that
        options["ProxyCommand"] = f"ssh -W '[%h]:%p' {shlex.quote(jump)}"
    alias = f"{address}-{options['Port']}"
    looked_up = settings.get("hostkeyalias", [address if options["Port"] == "22" else f"[{address}]:{options['Port']}"])
    return (Host(node, address, address, alias, settings=tuple(options.items())),
            "".join(known_keys(looked_up[0], alias, " ".join(settings.get("userknownhostsfile", [])).split())))


def known_keys(name: str, alias: str, files: list[str]) -> Iterator[str]:
    """Lines of these files about `name`, under `alias`."""
    for file in map(Path.expanduser, map(Path, files)):
        if file.exists():
            found = ssh.run_here(["ssh-keygen", "-F", name, "-f", str(file)], name, "ssh-keygen -F", 10).out
            for line in found.splitlines():
                marker = line.split()[:1] if line.startswith("@") else []
                if not line.startswith("#"):
                    yield " ".join([*marker, alias, *line.split()[len(marker) + 1:]]) + "\n"


def machine(name: str, among: str | None, shell: Shell, answer: str) -> Machine:
    """From what PROBE says there. Its address among the machines, if nobody knows better, is where it was reached:
    behind a NAT that is its own, not the one that we see."""
    said = dict(line.partition(" ")[::2] for line in answer.splitlines())
    own = next((x for x in said["address"].split() if ":" not in x), "")      # torchrun's interfaces are named by IPv4
    assert shell.host is not None
    host = replace(shell.host, private=among or own or shell.host.address)
    return Machine(name, replace(shell, host=host), int(said["cores"]), int(said["gpus"]),
                   float(said["capability"] or 0))


def in_the_way(answer: str, run: str) -> Iterator[str]:
    """Why a machine cannot be used for the run, from what PROBE says there."""
    said = [line.split(" ", 1) for line in answer.splitlines()]
    if lacking := [value for key, value in said if key == "lacks"]:
        yield f"it has no {', '.join(lacking)}. On Debian and Ubuntu:  sudo apt-get install python3 rsync util-linux"
    if ["strange", "~/txl"] in said:
        yield "its ~/txl is not a launch's, and would be overwritten. Move it away, or log in as another user"
    others = {path.split("/")[2] for key, path in said if key == "busy"} - {run}
    for other in sorted(others):
        yield f"run {other} trains there: two would share its GPUs and its code"


def refuse_elsewhere(run: str, names: list[str]) -> None:
    """Raises Refused where the run may still train on others, that it was started on before."""
    journal = Journal(run)
    notes = journal.notes(HOSTED)
    if not notes or notes[-1]["names"] == names:
        return
    before = notes[-1]["names"]
    shells = [Shell(journal.folder / "ssh_config", f"node-{i}") for i in range(len(before))]

    try:
        where = [name for name, yes in zip(before, reach.trains(shells, run)) if yes]
        why = f"trains on {', '.join(where)}" if where else ""
    except SomeFailed as error:
        why = f"was started on {', '.join(before)}, and whether it trains there cannot be asked: {error}"
    if why:
        raise Refused(f"{run} {why}.\nTo follow it there:  --hosts={','.join(before)}\nTo train beside it: another "
                      f"--name. If those machines are gone for good, remove {journal.folder}")


def ended(shells: list[Shell], plan: Plan) -> None:
    """Supervisors that have begun, where they can be told."""
    for i, shell in enumerate(shells):
        node = f"{HOME}/{plan.run_dir.as_posix()}/nodes/{i}"
        with contextlib.suppress(Trouble):
            shell.run(f"[ ! -e {node}.lock ] || flock -n {node}.lock true || touch {node}.kill", timeout_s=15)


def _notes(machines: tuple[Machine, ...], ranks: int) -> Iterator[str]:
    if len({x.gpus for x in machines}) > 1:
        most = ", ".join(f"{x.name} {x.gpus}" for x in machines)
        yield f"{ranks} GPU(s) of each are used: {most}"
    if not machines[0].gpus:
        yield "no GPUs: one rank on the processor of each"
    yield "the machines stay when it ends, with code and run in ~/txl: none is powered off"
    if len(machines) > 1:
        yield f"{machines[0].name} gets a key of its own to the others (txl-node-0 in their ~/.ssh/authorized_keys)"
