"""The backend `aws`: machines of one kind in one zone, all of them or none. docs/aws.md has what they carry.

A launch is: what is there already, a gang, readiness, code and data, an environment, supervisors. Until the training
runs, giving up takes back what this launch has started; whatever happens here, the machines have their own deadline.
"""
from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shlex
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import ec2, ladder, prices, reach, run, ssh
from cluster.backends import Watch, Wish
from cluster.boot import Limits, user_data
from cluster.ec2 import CallFailed, Cloud, Image, Instance, Network, Type
from cluster.journal import Journal, home
from cluster.local import CHECKOUT, free_port
from cluster.plan import Layout, Node, Plan, torchrun
from cluster.prices import Estimate
from cluster.remote import RemoteJob
from cluster.run import Broken, Refused, Stopped
from cluster.spec import KINDS, Config, Terms
from cluster.ssh import Host, Interrupted, Shell, Trouble
from cluster.stacks import Stack, stack_for
from engine.values import to_json

HOURS_UNKNOWN = 24.0                              # a machine's longest life where nobody knows how long the run takes
ASK_ABOVE_USD = 20.0                              # expected dollars above which a person must agree
COMING_S, READY_S = 600, 900                      # until machines run, and until they are ready, at most
SPOT_MARGIN = 1.2                                 # a budget counts spot at this times its price now, and pays no more


@dataclass(frozen=True)
class Facts:
    """What the world was like when the plan was made. Without `cloud` nobody was asked, and nothing can be applied."""
    terms: Terms
    owner: str
    type: Type
    stack: Stack
    existing: tuple[Instance, ...] = ()
    cloud: Cloud | None = None
    image: Image | None = None
    network: Network | None = None
    zones: tuple[str, ...] = ()                   # best first
    spot_usd: dict[str, float] | None = None      # of one machine, by zone
    cidr: str = ""
    spent_usd: float = 0.0                        # by earlier machines of this run


def survey(wish: Wish) -> Facts:
    """Looks at the account and the market. Raises Refused, for a dry run only where its tables do not know the kind."""
    machines, terms, owner = wish.config.machines, wish.terms, owner_name()
    try:
        cloud = Cloud(terms.region)
        kind = cloud.type(machines.kind)
        stack = stack_for(kind)
        network, offered = cloud.network(terms.vpc), cloud.zones(kind.name)
        zones = offered & set(network.subnets)
        if not zones:
            raise Refused(f"{network.vpc} has no subnet in a zone of {cloud.region} that offers {kind.name} "
                          f"({', '.join(sorted(offered)) or 'no zone does'}). Take another --region or --vpc")
        spot_usd = cloud.spot_prices(kind.name)
        existing = tuple(cloud.instances(cluster=wish.name, owner=owner))
        refuse_others(wish, existing)
        scores = cloud.scores(kind.name, machines.count) if machines.spot and not existing else {}
        return Facts(terms, owner, kind, stack, existing, cloud, cloud.image(terms.image or stack.image), network,
                     ladder.order_zones(zones, scores, spot_usd), spot_usd, terms.ssh_cidr or ec2.caller_address(),
                     Journal(wish.name).spent(time.time()))
    except CallFailed as error:
        raise Refused(f"{error}\nNothing was started.") from error
    except Refused:
        kind_ = KINDS.get(machines.kind)
        if not (wish.dry or wish.standing.state == "finished") or kind_ is None:
            raise
        offline = Type(kind_.name, kind_.cores, kind_.memory_gib, kind_.gpus, kind_.gpu, kind_.gpu_memory_gib, "x86_64",
                       kind_.efa, max(1, kind_.efa), 0, True)
        return Facts(terms, owner, offline, stack_for(offline))


def lay_out(wish: Wish, facts: Facts) -> Layout:
    """A rank on each GPU, or one on each machine without. Addresses are names until there are machines."""
    machines, terms = wish.config.machines, wish.terms
    ranks = max(1, machines.gpus or facts.type.gpus)
    if machines.gpus and machines.gpus > max(1, facts.type.gpus):
        raise ValueError(f"machines.gpus={machines.gpus}, but a {facts.type.name} has {facts.type.gpus}")
    nodes = tuple(Node(i, f"node-{i}", ranks, environment(facts, machines.count, ranks),
                       node_command(wish, i, ranks, "python", "node-0")) for i in range(machines.count))
    estimate = estimated(facts, wish.config, ranks * machines.count)
    where = f"one of {', '.join(facts.zones)}" if facts.cloud else "a zone to be chosen"
    market = "spot" if machines.spot else "on demand"
    return Layout(
        nodes, f"{machines.count} x {facts.type.name}, {market}, in {where}",
        str(estimate) if estimate else "price unknown: it is not in the table, and EC2 does not say",
        f"stack {facts.stack.name}: {facts.stack.about}" if not terms.skip_setup else
        "none: the image has the environment",
        tuple(_notes(facts, limit_hours(terms, estimate))), question(machines.count, facts, estimate), facts)


def node_command(wish: Wish | Plan, node: int, ranks: int, python: str, master: str) -> tuple[str, ...]:
    """What the supervisor of a node starts, in ~/txl."""
    port = 20000 + zlib.crc32(wish.name.encode()) % 10000         # of this run, so that two may share a machine
    return torchrun(python, wish.config.recipe.entry, Path("runs", wish.name, "recipe.json"), ranks=ranks,
                    nnodes=wish.config.machines.count, node_rank=node, master_addr=master, master_port=port)


def environment(facts: Facts, count: int, ranks: int) -> dict[str, str]:
    env = {"OMP_NUM_THREADS": "1" if facts.type.gpus else str(max(1, facts.type.cores // 2 // ranks))}
    return env | (facts.stack.env if uses_efa(facts, count) else {})


def uses_efa(facts: Facts, count: int) -> bool:
    """Whether NCCL goes over EFA: it has the cards for it, and the stack the software."""
    return count > 1 and facts.type.efa > 0 and bool(facts.stack.env)


def refuse_others(wish: Wish, existing: Sequence[Instance]) -> None:
    """Raises Refused where machines of this name are up that are not the ones wished for."""
    wanted = config_hash(wish)
    if not existing:
        return
    fits = (len(existing) == wish.config.machines.count and len({x.zone for x in existing}) == 1
            and all(x.tags.get("txl:config") == wanted and x.state in ("pending", "running") for x in existing))
    if not fits:
        there = ", ".join(sorted(f"{x.id} ({x.kind}, {x.state}, {x.zone})" for x in existing))
        raise Refused(f"{wish.name} has machines that are not {wish.config.machines.count} running "
                      f"{wish.config.machines.kind} of one launch: {there}.\nChoose another --name, or end them:  "
                      f"python -m cluster kill {wish.name}")


def config_hash(wish: Wish | Plan) -> str:
    """What machines must agree in to be taken for the wished ones."""
    machines = wish.config.machines
    return hashlib.sha256(json.dumps([machines.kind, machines.count, wish.terms.image]).encode()).hexdigest()[:12]


def owner_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", getpass.getuser())[:32] or "someone"


def estimated(facts: Facts, config: Config, ranks: int, *, spot: bool | None = None,
              zone: str | None = None) -> Estimate | None:
    """Of the whole run, in the config's market unless told otherwise; None where no price is known."""
    spot = config.machines.spot if spot is None else spot
    rates = prices.rates(facts.type.name, spot_usd=facts.spot_usd or {} if spot else {},
                         zone=zone or next(iter(facts.zones), None), disk_gib=facts.terms.disk_gib)
    addresses = 1 if ec2.needs_jump(facts.type, config.machines.count) else config.machines.count
    return None if rates is None else prices.estimate(rates, config, ranks, addresses=addresses)


def limit_hours(terms: Terms, estimate: Estimate | None) -> float:
    """What no machine outlives."""
    if terms.max_hours is not None:
        return terms.max_hours
    return HOURS_UNKNOWN if estimate is None or estimate.hours is None else 2 * estimate.hours + 2


def question(count: int, facts: Facts, estimate: Estimate | None) -> str | None:
    """What to ask before money is spent; None where it is little."""
    total = None if estimate is None else estimate.total_usd
    if facts.cloud is None or facts.existing or (total is not None and total <= ASK_ABOVE_USD):
        return None
    if estimate is None:
        return f"What {count} x {facts.type.name} cost is not known. Launch?"
    return f"{count} x {facts.type.name} for ${estimate.usd_per_hour:.2f} per hour, " + (
        f"${total:.2f} in all. Launch?" if total is not None else "nobody knows for how long. Launch?")


def apply(plan: Plan, watch: Watch) -> RemoteJob:
    """Machines, and a training on them. Raises Refused, Stopped and Broken; what it has started is taken back."""
    journal = Journal(plan.name)
    with journal.alone("launched"):
        return Launch(plan, journal, watch).carry_out()


class Launch:
    """One carrying-out of a plan."""

    def __init__(self, plan: Plan, journal: Journal, watch: Watch):
        facts = plan.layout.facts
        if facts.cloud is None:
            raise Refused("The account could not be asked when the plan was made. Give the command again.")
        self.plan, self.facts, self.cloud, self.journal, self.watch = plan, facts, facts.cloud, journal, watch
        self.terms, self.count = plan.terms, plan.config.machines.count
        self.group_name = f"txl-{facts.owner}-{plan.name}"
        self.ours: list[Instance] = []            # what this launch itself has started
        self.tokens: list[str] = []               # launches that may have started more
        self.ready = False                        # machines are there and in order

    def carry_out(self) -> RemoteJob:
        try:
            machines = self.adopted() or self.provisioned()
            hosts = self.hosts(self.running(machines))
            shells = self.reached(hosts)
            if (job := self.attached(shells, hosts)) is not None:
                return job
            return self.started(shells, hosts)
        except Interrupted as error:
            raise Stopped(f"Given up. {self.roll_back()}") from error
        except Refused as error:
            raise Refused(f"{error}\n{self.roll_back()}") from error
        except (Trouble, Broken, CallFailed, OSError) as error:
            if self.ready:                        # capacity is hard to come by, and what is wrong now can be mended
                raise Broken(f"{error}\nThe machines stay for 20 minutes: once it is mended, the same command takes "
                             f"them. To end them now:  python -m cluster kill {self.plan.name}") from error
            raise Broken(f"{error}\n{self.roll_back()}") from error
        except BaseException:                     # a fault of ours must not cost money either
            self.roll_back()
            raise

    # --- machines ---

    def adopted(self) -> list[Instance]:
        """The machines of this name that are up already, those of a launcher that died after asking too."""
        for intent in self.journal.unanswered():
            found = self.cloud.instances(token=intent["token"])
            self.journal.note("answer", token=intent["token"], ids=[x.id for x in found])
        existing = self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner)
        refuse_others(self.wish, existing)
        if existing:
            self.watch.say(f"{len(existing)} machine(s) of {self.plan.name} are up already: taking these.")
            self.cloud.security_group(self.group_name, self.facts.network.vpc, self.facts.cidr, dict(existing[0].tags))
        return existing

    def provisioned(self) -> list[Instance]:
        """Up the ladder of markets and zones. Raises Refused with its whole history."""
        plan, facts, intent = self.plan, self.facts, uuid.uuid4().hex
        max_s = 3600 * limit_hours(self.terms, estimated(facts, plan.config, plan.layout.ranks))
        expires = time.time() + max_s + 1800      # the watchdog's clock begins later than ours
        tags = ec2.tags_of(plan.name, facts.owner, config_hash(plan), expires,
                           f"{self.terms.minutes_after_success:g}/{self.terms.minutes_after_failure:g}")
        group = self.cloud.security_group(self.group_name, facts.network.vpc, facts.cidr, tags)
        placement = self.cloud.placement_group(self.group_name, tags) if self.count > 1 else None
        public_key = ssh.key(home()).with_suffix(".pub").read_text().strip()
        attempts: list[ladder.Attempt] = []
        ondemand, why_not = self.ondemand_allowed()
        give_up_at = time.time() + 60 * self.terms.wait
        while True:
            self.check()
            move = ladder.next_move(attempts, spot=plan.config.machines.spot, zones=facts.zones, now=time.time(),
                                    give_up_at=give_up_at, ondemand=ondemand, why_not=why_not)
            if isinstance(move, ladder.Wait):
                self.watch.say(f"No capacity anywhere yet; again in {move.seconds:.0f} s.")
                self.sleep(move.seconds)
                continue
            if isinstance(move, ladder.GiveUp):
                raise Refused(move.reason)
            rate, price_cap = self.rate_of(move.market, move.zone)
            limits = Limits(after_success_s=60 * self.terms.minutes_after_success,
                            after_failure_s=60 * self.terms.minutes_after_failure, max_s=max_s,
                            budget_s=self.budget_s(rate))
            token = ec2.token(intent, move.market, move.zone, move.round)
            request = ec2.run_instances_request(
                kind=facts.type, count=self.count, market=move.market, zone=move.zone,
                subnet=facts.network.subnets[move.zone], group=group, placement=placement, image=facts.image,
                disk_gib=self.terms.disk_gib, user_data=user_data(limits, public_key), tags=tags, token=token)
            if price_cap is not None:
                request["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] = f"{price_cap:.4f}"
            self.journal.note("intent", token=token, market=move.market, zone=move.zone, count=self.count)
            self.tokens.append(token)
            self.watch.say(f"Asking for {self.count} x {facts.type.name}, {ladder.NAMES[move.market]}, {move.zone}.")
            try:
                self.ours = self.cloud.run_instances(request)
            except CallFailed as error:
                attempts.append(ladder.Attempt(move.market, move.zone, error.verdict, error.code, error.said,
                                               time.time()))
                if error.verdict not in ladder.AGAIN:
                    self.journal.note("answer", token=token, ids=[])
                    self.tokens.remove(token)
                self.watch.say(f"  {error.code}")
                continue
            ids = [x.id for x in self.ours]
            self.journal.note("answer", token=token, ids=ids)
            self.journal.note("launched", ids=ids, usd_per_hour=rate or 0.0, until=expires, market=move.market)
            self.tokens.remove(token)
            return self.ours

    def ondemand_allowed(self) -> tuple[bool, str]:
        """Whether on-demand machines may take the place of spot ones, and what to say where not."""
        if self.terms.fallback is None:
            return False, ("Take on-demand machines then with --fallback=ondemand, or at once with --nospot; or wait "
                           "longer for spot, --wait=MINUTES.")
        estimate = estimated(self.facts, self.plan.config, self.plan.layout.ranks, spot=False)
        total = None if estimate is None else estimate.total_usd
        if self.terms.budget is None or (total is not None and total + self.facts.spent_usd <= self.terms.budget):
            return True, ""
        return False, f"On demand it would not fit into --budget={self.terms.budget:g}"

    def rate_of(self, market: str, zone: str) -> tuple[float | None, float | None]:
        """What all machines cost an hour at most, and the highest bid for one of them where a budget depends on it."""
        spot = market == "spot"
        estimate = estimated(self.facts, self.plan.config, self.plan.layout.ranks, spot=spot, zone=zone)
        rate = None if estimate is None else estimate.usd_per_hour
        if not spot or self.terms.budget is None or rate is None:
            return rate, None
        now = (self.facts.spot_usd or {}).get(zone)
        return (rate, None) if now is None else (rate + self.count * now * (SPOT_MARGIN - 1), now * SPOT_MARGIN)

    def budget_s(self, rate: float | None) -> float | None:
        """How long the machines may live for the run to stay within its budget. Raises Refused where it is used up."""
        if self.terms.budget is None:
            return None
        if rate is None:
            raise Refused(f"--budget cannot be held: what a {self.facts.type.name} costs is not known")
        left = self.terms.budget - self.facts.spent_usd
        if left <= 0:
            raise Refused(f"{self.plan.name} has cost ${self.facts.spent_usd:.2f}, and --budget is "
                          f"${self.terms.budget:.2f}. Give a higher one to go on")
        return 3600 * left / rate

    def running(self, machines: list[Instance]) -> list[Instance]:
        """The machines once all run. What was just launched may be invisible for a while."""
        ids, deadline, wait = {x.id for x in machines}, time.monotonic() + COMING_S, .2
        while True:
            self.check()
            seen = [x for x in self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner, alive=False)
                    if x.id in ids]
            if ended := [x for x in seen if x.state in ("shutting-down", "terminated", "stopping", "stopped")]:
                raise Broken(f"{', '.join(x.id for x in ended)} ended before the training began (state "
                             f"{ended[0].state}): a spot interruption, or a fault of EC2. Try again")
            if len(seen) == len(ids) and all(x.state == "running" and x.private for x in seen):
                return sorted(seen, key=lambda x: x.node)
            if time.monotonic() > deadline:
                raise Broken(f"After {COMING_S // 60} minutes not all machines run: "
                             + ", ".join(f"{x.id} {x.state}" for x in seen))
            self.sleep(wait)
            wait = min(2 * wait, 5)

    def hosts(self, machines: list[Instance]) -> list[Host]:
        jump = ec2.needs_jump(self.facts.type, self.count)
        if jump:
            public = self.cloud.address(machines[0].id, dict(machines[0].tags))
            return [Host(x.node, x.private if x.node else public, x.private, x.id, jump=x.node > 0) for x in machines]
        if bare := [x.id for x in machines if not x.public]:
            raise Broken(f"{', '.join(bare)} came without a public address, out of SSH's reach. Is the subnet public?")
        return [Host(x.node, x.public or "", x.private, x.id) for x in machines]

    # --- on the machines ---

    def reached(self, hosts: list[Host]) -> list[Shell]:
        port = os.environ.get("TXL_SSH_PORT")
        config = ssh.write_config(self.journal.folder, hosts, user=self.terms.ssh_user or self.facts.stack.ssh_user,
                                  key=ssh.key(home()), port=int(port) if port else None)
        shells = [Shell(config, host.name, host) for host in hosts]
        self.watch.say(f"{len(shells)} machine(s) run. Waiting until they are ready:  ssh -F {config} node-0")
        needs = reach.Needs(self.facts.type.gpus, uses_efa(self.facts, self.count), 10, None)
        if self.facts.stack.packages and not self.terms.skip_setup:
            self.await_ready(shells, replace(needs, gpus=0))
            self.install_driver(shells)
        self.await_ready(shells, needs)
        self.ready = True
        return shells

    def await_ready(self, shells: list[Shell], needs: reach.Needs) -> None:
        reach.wait_ready(shells, needs, deadline_s=READY_S, say=self.watch.say, interrupted=self.watch.interrupted)

    def install_driver(self, shells: list[Shell]) -> None:
        """Where the image has none. On each machine: a kernel's module cannot be copied as an environment can."""
        apt = "sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -q -y"
        script = (f"nvidia-smi -L > /dev/null 2>&1 || {{ {apt} update && {apt} install "
                  f"{shlex.join(self.facts.stack.packages)} && sudo -n modprobe nvidia; }}")
        with reach.holding(shells):
            ssh.each(shells, lambda shell: shell.run(script, timeout_s=READY_S, tied=True,
                                                     interrupted=self.watch.interrupted), name=lambda shell: shell.name)

    def attached(self, shells: list[Shell], hosts: list[Host]) -> RemoteJob | None:
        """The training that runs there already, or has finished there; None where one must be started."""
        if self.ours:
            return None
        run_dir = f"txl/{self.plan.run_dir.as_posix()}"
        script = (f"cd {run_dir} 2>/dev/null || exit 0; cat nodes/$N.json; echo; "
                  f"flock -n nodes/$N.lock true && echo idle || echo busy; cat status.json 2>/dev/null; echo")
        said = [shell.run(f"N={host.node}; {script}").out.splitlines() for shell, host in zip(shells, hosts)]
        nodes = [json.loads(lines[0]) if lines and lines[0].startswith("{") else {} for lines in said]
        launches = {node.get("launch") for node in nodes}
        busy = [len(lines) > 1 and lines[1] == "busy" for lines in said]
        finished = bool(said[0]) and len(said[0]) > 2 and said[0][2].startswith("{") and \
            json.loads(said[0][2]).get("state") == "finished"
        if len(launches) == 1 and None not in launches and (all(busy) or (finished and not any(busy))):
            self.watch.say("It is training there already: following it." if all(busy) else "It has finished there.")
            return self.job(shells, launches.pop())
        for shell, host, still in zip(shells, hosts, busy):       # the rest of a training that has failed elsewhere
            if still:
                node = f"{run_dir}/nodes/{host.node}"
                shell.run(f"touch {node}.kill; flock -w 20 {node}.lock true")
        return None

    def started(self, shells: list[Shell], hosts: list[Host]) -> RemoteJob:
        plan, say, interrupted, stack = self.plan, self.watch.say, self.watch.interrupted, self.facts.stack
        run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, CHECKOUT)
        reach.hold(shells)
        with reach.holding(shells):
            say("Bringing the code.")
            reach.send_code(shells, CHECKOUT, say=say, interrupted=interrupted)
            python = reach.setup(shells, None, stack.torch, stack.index_url,
                                 (CHECKOUT / "requirements.txt").read_text(), skip=self.terms.skip_setup, say=say,
                                 interrupted=interrupted)
            self.bring_inputs(shells, python)
            launch, recipe_path = uuid.uuid4().hex[:12], plan.run_dir / "recipe.json"
            launches = [self.launch_of(launch, node, host, hosts[0], python) for node, host in
                        zip(plan.layout.nodes, hosts)]
            reach.start(shells, plan.run_dir.as_posix(), launches,
                        {recipe_path.as_posix(): json.dumps(to_json(plan.config.recipe), indent=1) + "\n"},
                        interrupted=interrupted)
        job = self.job(shells, launch)
        if plan.tensorboard:
            self.tunnel(shells[0])
        return job

    def launch_of(self, launch: str, node: Node, host: Host, first: Host, python: str) -> dict[str, Any]:
        board = [python, "-m", "tensorboard.main", f"--logdir={self.plan.run_dir}", "--host=127.0.0.1",
                 f"--port={self.board_port}"]
        command = node_command(self.plan, node.rank, node.ranks, python, first.private)
        return {"launch": launch, "command": list(command), "env": node.env, "private": host.private,
                "tensorboard": board if self.plan.tensorboard and node.rank == 0 else None}

    @property
    def board_port(self) -> int:
        return 6006 + zlib.crc32(self.plan.name.encode()) % 1000

    def tunnel(self, shell: Shell) -> None:
        port = free_port()
        try:
            ssh.forward(shell.config, shell.name, port, self.board_port)
            self.watch.say(f"TensorBoard: http://127.0.0.1:{port}")
        except Trouble as error:
            self.watch.say(f"No tunnel to TensorBoard: {error}")

    def bring_inputs(self, shells: list[Shell], python: str) -> None:
        """Data, weights to start from, and the checkpoint to go on from where the machines have none."""
        plan, recipe = self.plan, self.plan.config.recipe
        missing = []
        for path in map(Path, recipe.inputs):
            if path.is_absolute():
                raise Broken(f"{path} is an absolute path, which machines do not share. Give one below {Path.cwd()}")
            if path.exists():
                reach.send(shells, path, f"txl/{path if path.is_dir() else path.parent}", say=self.watch.say,
                           interrupted=self.watch.interrupted)
            else:
                missing.append(path)
        if missing and recipe.prepare:
            self.watch.say(f"{', '.join(map(str, missing))} is not here: made on the machines.")
            prepare = f"cd txl && {shlex.join([python, *recipe.prepare])}"
            ssh.each(shells, lambda shell: shell.run(prepare, timeout_s=3600, tied=True,
                                                     interrupted=self.watch.interrupted), name=lambda shell: shell.name)
        newest = plan.standing.step
        there = shells[0].run(f"ls txl/{plan.run_dir}/checkpoints 2>/dev/null", check=False).out.split()
        if newest is not None and not [name for name in there if name >= f"step-{newest:08d}"]:
            folder = plan.run_dir / "checkpoints" / f"step-{newest:08d}"
            reach.send(shells, folder, f"txl/{folder}", say=self.watch.say, interrupted=self.watch.interrupted)

    def job(self, shells: list[Shell], launch: str) -> RemoteJob:
        self.ours = []                            # from here on they are the run's
        return RemoteJob(self.plan.run_dir, shells, launch, self.watch, self.gone, self.bye)

    def gone(self, nodes: list[int]) -> dict[int, str]:
        there = {x.node: x for x in self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner)}
        return {i: "its machine is gone: a spot interruption, its deadline, or somebody's kill" for i in nodes
                if i not in there}

    def bye(self) -> None:
        """What it has cost by now, and when the machines go."""
        try:
            left = self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner)
        except CallFailed as error:
            self.watch.say(f"Whether the machines are still there cannot be asked: {error}")
            return
        now, rates = time.time(), self.journal.notes("launched")
        self.journal.note("seen", ids=[x.id for x in left])
        for x in left:
            hourly = next((n["usd_per_hour"] / len(n["ids"]) for n in rates if x.id in n["ids"]), None)
            hours = (now - x.launched) / 3600
            cost = "unknown" if hourly is None else f"${hourly * hours:.2f}"
            self.watch.say(f"  node-{x.node} {x.id} {x.kind} {x.market} {x.zone}: {hours * 60:.0f} min, {cost} so far")
        if left:
            self.watch.say(f"The machines go {self.terms.minutes_after_success:g} minutes after success, "
                           f"{self.terms.minutes_after_failure:g} after failure. Now:  "
                           f"python -m cluster kill {self.plan.name}")

    # --- giving up ---

    def roll_back(self) -> str:
        """Ends what this launch has started. Returns what is to say about it."""
        try:
            ids = [x.id for x in self.ours]
            for token in self.tokens:             # asked for, and no answer came
                ids += [x.id for x in self.cloud.instances(token=token)]
            if not ids:
                self.tidy(0)
                return "Nothing of this launch is left."
            self.cloud.terminate(ids)
            self.journal.note("gone", ids=ids)
            self.tidy(5)
            return f"The {len(ids)} machine(s) of this launch are terminated."
        except CallFailed as error:
            return (f"{error}\nSo what this launch has started may still be there; each machine powers itself off "
                    f"within 20 minutes. To end them:  python -m cluster kill {self.plan.name}")

    def tidy(self, wait_s: float) -> None:
        """Groups and addresses: free as soon as the machines are really gone, else swept by the next launch or gc."""
        deadline = time.monotonic() + wait_s
        while not self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner):
            busy = False
            for thing in self.cloud.leftovers(owner=self.facts.owner, cluster=self.plan.name):
                try:
                    self.cloud.remove(thing)
                except CallFailed as error:
                    busy |= error.verdict == "busy"
            if not busy or time.monotonic() > deadline:
                return
            time.sleep(.5)

    # --- small things ---

    @property
    def wish(self) -> Wish:
        return Wish(self.plan.name, self.plan.config, self.plan.standing, self.terms)

    def check(self) -> None:
        if self.watch.interrupted():
            raise Interrupted("interrupted")

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(.1, left))


def _notes(facts: Facts, hours: float) -> Iterator[str]:
    terms = facts.terms
    if facts.existing:
        yield f"{len(facts.existing)} machine(s) of this name are up already and will be taken"
    if facts.cloud is None:
        yield "nobody was asked: without AWS credentials the prices are the table's"
    cap = f", or when the run has cost ${terms.budget:.2f}" if terms.budget else ""
    yield (f"the machines power themselves off {terms.minutes_after_success:g} minutes after success, "
           f"{terms.minutes_after_failure:g} after failure, 20 without a sign of life, and in any case after "
           f"{hours:.1f} hours{cap}")
