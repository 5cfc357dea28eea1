"""What there is, as text and as choices: which clusters a word means, what ls says, what gc would do. Pure."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.ec2 import CLUSTER, OWNER, Instance, Thing, expires
from cluster.run import Refused

HEAD = ("name", "node", "owner", "type", "market", "zone", "age", "cost", "deadline", "state", "address")


@dataclass(frozen=True)
class Cluster:
    """The machines of one name and owner, by node."""
    name: str
    owner: str
    machines: tuple[Instance, ...]

    def __str__(self) -> str:
        kinds = sorted({x.kind for x in self.machines})
        return f"{self.name} of {self.owner} ({len(self.machines)} x {', '.join(kinds)})"


@dataclass(frozen=True)
class Doomed:
    """What has no right to exist any more."""
    machines: tuple[Instance, ...] = ()
    things: tuple[Thing, ...] = ()


def clusters(instances: Iterable[Instance]) -> list[Cluster]:
    """The one launched last first."""
    by_name: dict[tuple[str, str], list[Instance]] = {}
    for x in instances:
        by_name.setdefault((x.tags.get(CLUSTER, ""), x.tags.get(OWNER, "")), []).append(x)
    newest = sorted(by_name.items(), key=lambda item: max(x.launched for x in item[1]), reverse=True)
    return [Cluster(name, owner, tuple(sorted(xs, key=lambda x: x.node))) for (name, owner), xs in newest]


def choose(instances: Iterable[Instance], frag: str = "") -> list[Cluster]:
    """Those of exactly this name, else those with it in theirs; the one launched last first. Raises Refused."""
    there = clusters(instances)
    found = [x for x in there if x.name == frag] or [x for x in there if frag in x.name]
    if not found:
        names = ", ".join(dict.fromkeys(x.name for x in there))
        raise Refused(f"No cluster is called like {frag!r}; there is: {names}" if there else "There are no machines.")
    return found


def ls_text(instances: Iterable[Instance], now: float, usd_per_hour: Mapping[str, float]) -> str:
    """A table, oldest first. `usd_per_hour`, by id: what each costs at most while it runs; absent: nobody knows."""
    oldest = sorted(instances, key=lambda x: (x.launched, x.tags.get(CLUSTER, ""), x.node))
    rows = [HEAD, *(_row(x, now, usd_per_hour.get(x.id)) for x in oldest)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def loud(instances: Sequence[Instance], things: Iterable[Thing], now: float) -> Iterator[str]:
    """What costs and should not, a line each."""
    for x in instances:
        until, who = expires(x.tags), f"{x.id} ({x.tags.get(CLUSTER, 'no name')}, node {x.node})"
        if until is None:
            yield f"!!! {who} does not say when it ends (txl:expires). If nobody needs it:  {_kill(x)}"
        elif until < now:
            yield f"!!! {who} should have ended {span(now - until)} ago. End it:  python -m cluster gc"
    manned = {x.tags.get(CLUSTER) for x in instances}
    for thing in things:
        if thing.billable and thing.cluster not in manned:
            yield f"!!! {thing.what} {thing.id} of {thing.cluster} costs, without a machine:  python -m cluster gc"


def doomed(instances: Iterable[Instance], things: Iterable[Thing], now: float, known: Collection[str] = ()) -> Doomed:
    """Machines past their txl:expires, open spot requests, and the things of clusters that have no other machine.

    A launch that waits for capacity has groups and no machine yet. One from here holds its cluster's lock, so what is
    of clusters `known` here can go; other groups, which cost nothing, stay until they expire.
    """
    past = {x.id: x for x in instances if (expires(x.tags) or now) < now}
    manned = {x.tags.get(CLUSTER) for x in instances if x.id not in past}
    return Doomed(tuple(past.values()), tuple(
        thing for thing in things if thing.what == "spot request" or (thing.cluster not in manned and (
            thing.billable or thing.cluster in known or (thing.expires or now) < now))))


def hosts_text(instances: Iterable[Instance]) -> str:
    """Lines for /etc/hosts."""
    return "\n".join(f"{x.public}\t{cluster.name}-node-{x.node}" for cluster in clusters(instances)
                     for x in cluster.machines if x.public)


def span(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 48 * 60 else f"{minutes // 1440} days"


def _row(x: Instance, now: float, usd_per_hour: float | None) -> tuple[str, ...]:
    until = expires(x.tags)
    deadline = "NONE" if until is None else f"in {span(until - now)}" if until >= now else f"PAST, {span(now - until)}"
    if x.state == "stopped":
        cost = "disk only"
    else:
        cost = "unknown" if usd_per_hour is None else f"${usd_per_hour * (now - x.launched) / 3600:.2f}"
    return (x.tags.get(CLUSTER, ""), str(x.node), x.tags.get(OWNER, ""), x.kind, x.market, x.zone,
            span(now - x.launched), cost, deadline, x.state, x.public or "-")


def _kill(x: Instance) -> str:
    return f"python -m cluster kill {x.tags.get(CLUSTER, '')}"
