"""The backend `aws`: machines of one kind in one zone, all of them or none. Here it is planned; gang.py does it."""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster import bucket, ec2, ladder, prices, ray_gang
from cluster.backends import Watch, Wish
from cluster.ec2 import CallFailed, Cloud, Image, Instance, Network, Type
from cluster.journal import Journal, owner_name
from cluster.outfit import node_command
from cluster.plan import Layout, Node, Plan
from cluster.prices import Estimate
from cluster.remote import RemoteJob
from cluster.run import Refused, Standing
from cluster.spec import KINDS, Config, Terms
from cluster.stacks import Stack, stack_for

HOURS_UNKNOWN = 24.0                              # a machine's longest life where nobody knows how long the run takes
ASK_ABOVE_USD = 20.0                              # dollars that a launch may cost without a person's consent


@dataclass(frozen=True)
class Account:
    """Where machines are launched, as it was found."""
    cloud: Cloud
    image: Image
    network: Network
    cidr: str                                     # who may reach their port 22
    key_pair: str | None = None                   # ncluster's, of this owner


@dataclass(frozen=True)
class Facts:
    """What the world was like when the plan was made. Without `account` nobody was asked, and nothing is launched."""
    terms: Terms
    owner: str
    type: Type
    stack: Stack
    existing: tuple[Instance, ...] = ()
    account: Account | None = None
    zones: tuple[str, ...] = ()                   # best first
    spot_usd: dict[str, float] | None = None      # of one machine, by zone
    standing: Standing | None = None              # of the run in the bucket, where that has more of it
    of_s3: tuple[str, ...] = ()                   # what is to be said about it


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
        standing, of_s3 = survey_s3(wish, cloud)
        scores = cloud.scores(kind.name, machines.count) if machines.spot and not existing else {}
        account = Account(cloud, cloud.image(terms.image or stack.image), network,
                          terms.ssh_cidr or ec2.caller_address(), cloud.key_pair(owner))
        best_first = ladder.order_zones(zones, scores, spot_usd)
        return Facts(terms, owner, kind, stack, existing, account, best_first, spot_usd, standing, of_s3)
    except CallFailed as error:
        raise Refused(f"{error}\nNothing was started.") from error
    except Refused:
        kind_ = KINDS.get(machines.kind)
        if not (wish.dry or wish.standing.state == "finished") or kind_ is None:
            raise
        offline = Type(kind_.name, kind_.cores, kind_.memory_gib, kind_.gpus, kind_.gpu, kind_.gpu_memory_gib, "x86_64",
                       kind_.efa, max(1, kind_.efa), 0, True)
        return Facts(terms, owner, offline, stack_for(offline))


def survey_s3(wish: Wish, cloud: Cloud) -> tuple[Standing | None, tuple[str, ...]]:
    """How far the run is by its bucket, where that has more of it, and what to say. Raises Refused, CallFailed."""
    terms, standing, notes = wish.terms, None, list[str]()
    if terms.role and cloud.has_profile(terms.role) is False:
        raise Refused(f"--role: there is no instance profile {terms.role} in the account {cloud.account}")
    if terms.data:
        notes += bucket.look(cloud, bucket.parse(terms.data), "--data")
        bucket.has_data(cloud, bucket.parse(terms.data))
    if terms.bucket:
        place = bucket.parse(terms.bucket)
        notes += bucket.look(cloud, place, "--bucket")
        there = bucket.standing(cloud, place / wish.name, wish.config.recipe)
        standing = there if bucket.further(wish.standing, there) is there else None
    return standing, tuple(notes)


def lay_out(wish: Wish, facts: Facts) -> Layout:
    """A rank on each GPU, or one on each machine without. Addresses are names until there are machines."""
    machines, terms = wish.config.machines, wish.terms
    ranks = max(1, machines.gpus or facts.type.gpus)
    if machines.gpus and machines.gpus > max(1, facts.type.gpus):
        raise ValueError(f"machines.gpus={machines.gpus}, but a {facts.type.name} has {facts.type.gpus}")
    nodes = tuple(Node(i, f"node-{i}", ranks, environment(facts, machines.count, ranks),
                       node_command(wish, i, ranks, "python", f"node-{i}", "node-0")) for i in range(machines.count))
    estimate = estimated(facts, wish.config, ranks * machines.count)
    most_hours = limit_hours(terms, estimate)
    where = f"one of {', '.join(facts.zones)}" if facts.account else "a zone to be chosen"
    market = "spot" if machines.spot else "on demand"
    return Layout(
        nodes, f"{machines.count} x {facts.type.name}, {market}, in {where}",
        str(estimate) if estimate else "price unknown: it is not in the table, and EC2 does not say",
        ("none: the image has the environment" if terms.skip_setup else
         f"stack {facts.stack.name}: {facts.stack.about}") + (f"; {facts.account.image}" if facts.account else ""),
        (*_notes(facts, most_hours), *ray_gang.notes(wish)),
        question(machines.count, facts, estimate, most_hours), facts, facts.standing)


def environment(facts: Facts, count: int, ranks: int) -> dict[str, str]:
    env = {"OMP_NUM_THREADS": "1" if facts.type.gpus else str(max(1, facts.type.cores // 2 // ranks))}
    return env | (facts.stack.env if uses_efa(facts, count) else {})


def uses_efa(facts: Facts, count: int) -> bool:
    """Whether NCCL goes over EFA: where there are cards for it, and somebody to talk to."""
    return count > 1 and facts.type.efa > 0 and facts.type.gpus > 0


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
    terms = wish.terms
    role = [terms.role or "own"] if terms.role or terms.needs_s3 else []
    return hashlib.sha256(json.dumps([machines.kind, machines.count, terms.image, *role]).encode()).hexdigest()[:12]


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


def question(count: int, facts: Facts, estimate: Estimate | None, most_hours: float) -> str | None:
    """What to ask before money is spent; None where it is little. Nothing outlives `most_hours`."""
    if facts.account is None or facts.existing:
        return None
    if estimate is None:
        return f"What {count} x {facts.type.name} cost is not known. Launch?"
    most = min(most_hours * estimate.usd_per_hour, facts.terms.budget or math.inf)
    if most <= ASK_ABOVE_USD:
        return None
    about = "nobody knows for how long" if estimate.total_usd is None else f"about ${estimate.total_usd:.2f} in all"
    return (f"{count} x {facts.type.name} for ${estimate.usd_per_hour:.2f} per hour: {about}, ${most:.2f} at most. "
            f"Launch?")


def apply(plan: Plan, watch: Watch) -> RemoteJob:
    """Machines, and a training on them. Raises Refused, Stopped and Broken; what it has started is taken back."""
    from cluster.gang import Launch
    journal = Journal(plan.name)
    with journal.alone("launched"):
        return Launch(plan, journal, watch).carry_out()


def _notes(facts: Facts, hours: float) -> Iterator[str]:
    terms = facts.terms
    if facts.existing:
        yield (f"{len(facts.existing)} machine(s) of this name are up already: what trains there is followed, else "
               f"it goes on there")
    yield from facts.of_s3
    if facts.account is None:
        yield "nobody was asked: without AWS credentials the prices are the table's"
    cap = f", or when the run has cost ${terms.budget:.2f}" if terms.budget else ""
    yield (f"the machines power themselves off {terms.minutes_after_success:g} minutes after success, "
           f"{terms.minutes_after_failure:g} after failure, 20 without a sign of life, and in any case after "
           f"{hours:.1f} hours{cap}")
