"""The verbs that need EC2 alone: what there is, what it costs, and its end."""
from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster import doors, prices, ssh
from cluster.ec2 import CLUSTER, CallFailed, Cloud, Instance, Thing
from cluster.follow import FAILED, FINISHED
from cluster.journal import Journal, home, owner_name
from cluster.run import Refused, agree
from cluster.verbs_lists import Cluster, choose, clusters, doomed, hosts_text, loud, ls_text
from engine.cli import flag
from engine.values import nearest

TRIES, AGAIN_S = 40, 3                            # two minutes for a machine to go; it keeps its groups until then


@dataclass(frozen=True)
class Region:
    region: str | None = flag("of AWS; else as its environment says", None)


@dataclass(frozen=True)
class Whose(Region):
    all: bool = flag("other users' too", False)


@dataclass(frozen=True)
class Ending(Whose):
    yes: bool = flag("do not ask", False)


@dataclass(frozen=True)
class Sweeping(Ending):
    dry_run: bool = flag("say what would go, and do nothing", False)


@dataclass(frozen=True)
class Asking(Region):
    yes: bool = flag("do not ask", False)


@dataclass(frozen=True)
class Listing(Region):
    refresh: bool = flag("ask AWS for the region's list of today, and go by it from now on", False)


@dataclass(frozen=True)
class Nothing:
    """No flags."""


def ls(words: Sequence[str], flags: Whose) -> int:
    cloud, now = Cloud(flags.region), time.time()
    owner = None if flags.all else owner_name()
    there, things = cloud.instances(owner=owner), cloud.leftovers(owner=owner)
    print(f"{cloud.region}, account {cloud.account}, {'all users' if flags.all else owner_name()}")
    if there:
        shown = [x for cluster in choose(there, *words) for x in cluster.machines]
        print(ls_text(shown, now, rates(shown)))
    else:
        print("No machines.")
    for line in loud(there, things, now):
        print(line)
    return FINISHED


def kill(words: Sequence[str], flags: Ending) -> int:
    """Ends the machines at once; what they hold goes when they are gone."""
    cloud = Cloud(flags.region)
    chosen = choose(cloud.instances(owner=None if flags.all else owner_name()), *words)
    machines = [x for cluster in chosen for x in cluster.machines]
    agree(f"End {', '.join(map(str, chosen))}?", flags.yes, len(machines) > 1)
    end(cloud, chosen)
    return remove(cloud, [thing for cluster in chosen
                          for thing in cloud.leftovers(owner=cluster.owner, cluster=cluster.name)])


def gc(words: Sequence[str], flags: Sweeping) -> int:
    cloud, owner = Cloud(flags.region), None if flags.all else owner_name()
    things = cloud.leftovers(owner=owner)
    known = set() if flags.all else {x.cluster for x in things if x.cluster and Journal(x.cluster).notes("intent")}
    plan = doomed(cloud.instances(owner=owner), things, time.time(), known)
    for x in plan.machines:
        print(f"machine {x.id} of {x.tags.get(CLUSTER, 'no name')}, past its deadline")
    for thing in plan.things:
        print(f"{thing.what} {thing.id} of {thing.cluster}")
    open_doors = doors.forgotten(cloud)
    for door in open_doors:
        print(f"UDP port {door.port} of {door.cluster}, open to {door.cidr} for a mosh that is no more")
    if not plan.machines and not plan.things and not open_doors:
        print("Nothing to remove.")
    if flags.dry_run:
        return FINISHED
    agree(f"End {len(plan.machines)} machines?", flags.yes, len(plan.machines) > 1)
    end(cloud, clusters(plan.machines))
    for door in open_doors:
        cloud.close_door(door)
        doors.forget(door.cluster)
    return remove(cloud, plan.things)


def stop(words: Sequence[str], flags: Asking) -> int:
    cloud = Cloud(flags.region)
    found = one_cluster(cloud, words)
    name, machines = found.name, found.machines
    if any(x.market == "spot" for x in machines):
        raise Refused(f"{name} are spot machines, which EC2 cannot stop, only end:  python -m cluster kill {name}\n"
                      f"The launch command again then takes new ones and goes on from the newest checkpoint fetched.")
    agree(f"Stop {len(machines)} machines of {name}?", flags.yes, len(machines) > 1)
    cloud.stop_instances(x.id for x in machines)
    print(f"Stopping. Their disks go on costing, and gc ends them after their deadline. "
          f"Again:  python -m cluster start {name}")
    return FINISHED


def start(words: Sequence[str], flags: Asking) -> int:
    cloud = Cloud(flags.region)
    found = one_cluster(cloud, words)
    machines = [x for x in found.machines if x.state == "stopped"]
    if not machines:
        raise Refused(f"No machine of {found.name} is stopped")
    agree(f"Start {len(machines)} machines of {found.name}?", flags.yes, len(machines) > 1)
    cloud.start_instances(x.id for x in machines)
    print("Starting. Give the launch command again: without a training their watchdogs soon end them.")
    return FINISHED


def hosts(words: Sequence[str], flags: Region) -> int:
    print(hosts_text(x for cluster in choose(Cloud(flags.region).instances(owner=owner_name()), *words)
                     for x in cluster.machines))
    return FINISHED


def spot_prices(words: Sequence[str], flags: Region) -> int:
    kind, listed = words[0], prices.on_demand(words[0])
    now = Cloud(flags.region).spot_prices(kind)
    if not now:
        raise Refused(f"EC2 has no spot price for {kind} in this region. Is it offered there?")
    for zone, usd in sorted(now.items(), key=lambda item: item[1]):
        print(f"{zone:<16} ${usd:.4f} per hour")
    dated = prices.price_list().dated
    print(f"on demand        {'unknown' if listed is None else f'${listed:.4f} per hour, list of {dated}'}")
    return FINISHED


def list_prices(words: Sequence[str], flags: Listing) -> int:
    """Of one type, or of all whose names begin like the word."""
    if flags.region and not flags.refresh:
        raise Refused("--region says whose list to ask for:  python -m cluster prices --refresh --region=…")
    if flags.refresh:
        region = Cloud(flags.region).region
        found = prices.refresh(region)
        if not found:
            raise Refused(f"AWS's list has no machine of {region}. The list that was there stays.")
        path = prices.save(region, found, time.strftime("%-d %B %Y"))
        print(f"{len(found)} prices of {region} by AWS's list of today, kept in {path}")
        if not words:
            return FINISHED
    listed, word = prices.price_list(), words[0] if words else ""
    shown = {word: listed.usd_per_hour[word]} if word in listed.usd_per_hour else {
        kind: usd for kind, usd in sorted(listed.usd_per_hour.items()) if kind.startswith(word)}
    if not shown:
        raise Refused(f"{word} is not in the list of {listed.dated}.{nearest(word, listed.usd_per_hour)} AWS's own of "
                      f"today:  python -m cluster prices --refresh")
    for kind, usd in shown.items():
        print(f"{kind:<18} ${usd:.4f} per hour")
    print(f"On demand, Linux, by the list of {listed.dated}.")
    return FINISHED


def keys(words: Sequence[str], flags: Nothing) -> int:
    public = ssh.key(home()).with_suffix(".pub")
    print(public, public.read_text().strip(), sep="\n")
    return FINISHED


def one_cluster(cloud: Cloud, words: Sequence[str]) -> Cluster:
    """This user's that was launched last, of those that the word fits. Raises Refused."""
    return choose(cloud.instances(owner=owner_name()), *words)[0]


def rates(instances: Iterable[Instance]) -> dict[str, float]:
    """Dollars per hour by id: as noted here at the launch, else by the on-demand list, which spot never exceeds."""
    found: dict[str, float] = {}
    for cluster in clusters(instances):
        for x in cluster.machines:
            if (listed := prices.on_demand(x.kind)) is not None:
                found[x.id] = listed
        if cluster.owner == owner_name():
            for note in Journal(cluster.name).notes("launched"):
                ids = set(note["ids"]) & {x.id for x in cluster.machines} if note["usd_per_hour"] else ()
                found |= dict.fromkeys(ids, note["usd_per_hour"] / len(note["ids"]))
    return found


def end(cloud: Cloud, doomed_ones: Iterable[Cluster]) -> None:
    for cluster in doomed_ones:
        ids = [x.id for x in cluster.machines]
        cloud.terminate(ids)
        if cluster.owner == owner_name():
            Journal(cluster.name).note("gone", ids=ids)
        print(f"Terminated: {', '.join(ids)} of {cluster.name}")


def remove(cloud: Cloud, things: Iterable[Thing]) -> int:
    """Once nothing uses them any more; the clusters are locked meanwhile. Says what is left. Returns an exit status."""
    with contextlib.ExitStack() as locked:
        left = _of_idle(list(things), locked)
        for attempt in range(TRIES):
            left = [thing for thing in left if not _removed(cloud, thing)]
            if not left:
                return FINISHED
            if not attempt:
                print(f"Waiting until the machines are really gone, {TRIES * AGAIN_S:g} s at most: still in use are "
                      + ", ".join(f"{x.what} {x.id}" for x in left), flush=True)
            time.sleep(AGAIN_S)
    print(f"Still in use: {', '.join(f'{x.what} {x.id}' for x in left)}. Later:  python -m cluster gc", file=sys.stderr)
    return FAILED


def _of_idle(things: list[Thing], locked: contextlib.ExitStack) -> list[Thing]:
    """Without those of clusters that a launcher is at work on; the others' locks are taken."""
    idle = set()
    for name in {thing.cluster for thing in things if thing.cluster}:
        try:
            locked.enter_context(Journal(name).alone("tidied up"))
            idle.add(name)
        except Refused as error:
            print(f"{error}. Its groups and addresses stay", file=sys.stderr)
    return [thing for thing in things if thing.cluster in idle]


def _removed(cloud: Cloud, thing: Thing) -> bool:
    try:
        cloud.remove(thing)
    except CallFailed as error:
        if error.verdict != "busy":
            raise
        return False
    print(f"Removed: {thing.what} {thing.id} of {thing.cluster}")
    return True
