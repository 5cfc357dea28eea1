"""The carrying-out of a plan on AWS: what is there already, a gang, readiness, code and data, supervisors.

Until the training runs, giving up takes back what this launch has started; whatever happens here, the machines have
their own deadline. docs/aws.md has what they carry.
"""
from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster import among, bucket, doors, ec2, ladder, reach, ready, ssh
from cluster.aws import Facts, config_hash, estimated, limit_hours, refuse_others, uses_efa
from cluster.backends import Watch, Wish
from cluster.boot import Limits, user_data
from cluster.ec2 import CallFailed, Instance, Thing
from cluster.journal import Journal, home
from cluster.outfit import Ground, Outfit, pages, place_of
from cluster.plan import Plan
from cluster.remote import RemoteJob
from cluster.run import Broken, Refused, Stopped
from cluster.ssh import Host, Interrupted, Shell, SomeFailed, Trouble
from cluster.stacks import installation

COMING_S, READY_S = 600, 900                      # until machines run, and until they are ready, at most
WORTH_S = 600                                     # machines that a budget holds for less are not launched
SHOWN_S = 30                                      # after a launch, until EC2 shows its machines to every question
SPOT_MARGIN = 1.2                                 # a budget counts spot at this times its price now, and pays no more


class Unfit(Broken):
    """Machines came, and did not last until the training began: others may."""


class Launch:
    """One carrying-out of a plan."""

    def __init__(self, plan: Plan, journal: Journal, watch: Watch):
        facts: Facts = plan.layout.facts
        if facts.account is None:
            raise Refused("The account could not be asked when the plan was made. Give the command again.")
        self.plan, self.facts, self.account, self.journal, self.watch = plan, facts, facts.account, journal, watch
        self.cloud = facts.account.cloud
        self.terms, self.count = plan.terms, plan.config.machines.count
        self.group_name = f"txl-{facts.owner}-{plan.name}"
        self.jump = ec2.needs_jump(facts.type, self.count)        # node 0 alone has a public address
        self.ours: list[str] = []                 # what this launch itself has started
        self.asked = False                        # for machines of its own
        self.found = 0                            # machines that were up already
        self.ready = False                        # machines are there and in order

    def carry_out(self) -> RemoteJob:
        try:
            outfit = Outfit(self.plan, self.gang(), self.ground, self.watch)
            launch = (None if self.ours else outfit.at_work()) or outfit.start()
            return self.job(outfit.shells, launch)
        except Interrupted as error:
            raise Stopped(f"Given up. {self.roll_back()}") from error
        except Refused as error:
            said = self.roll_back()
            raise (Broken if self.ours or self.journal.unanswered() else Refused)(f"{error}\n{said}") from error
        except (Trouble, Broken, CallFailed, OSError) as error:
            if self.ready:                        # capacity is hard to come by, and what is wrong now can be mended
                raise Broken(f"{error}\nThe machines stay for 20 minutes: once it is mended, the same command takes "
                             f"them. To end them now:  python -m cluster kill {self.plan.name}") from error
            raise (Broken if self.asked or self.found else Refused)(f"{error}\n{self.roll_back()}") from error
        except BaseException:                     # a fault of ours must not cost money either
            self.roll_back()
            raise

    # --- machines ---

    def gang(self) -> list[Shell]:
        """Machines in order: those that are up, else new ones, and others once more where those were not: it happens.

        What is wrong with all of several machines is the image, the flags or the network here: that is not repeated.
        """
        if machines := self.adopted():
            return self.prepared(machines)
        try:
            return self.prepared(self.provisioned())
        except (Trouble, Unfit) as error:
            if isinstance(error, SomeFailed) and len(error.errors) == error.total > 1:
                raise
            first = error
        self.watch.say(f"{first}\nEnding {', '.join(self.ours)}, and once more with others.")
        self.end_ours()
        try:
            return self.prepared(self.provisioned())
        except (Refused, Broken, Trouble, CallFailed) as second:
            raise Broken(f"{second}\nThat was the second attempt. The first: {first}") from second

    def prepared(self, machines: list[Instance]) -> list[Shell]:
        return self.reached(self.hosts(self.running(machines)))

    def adopted(self) -> list[Instance]:
        """The machines of this name that are up already, those of a launcher that died after asking too."""
        self.recovered()
        expected = self.journal.machines()        # by id, and when they were launched
        while True:
            existing = self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner)
            missing = expected.keys() - {x.id for x in existing}
            if not any(expected[id] + SHOWN_S > time.time() for id in missing):
                break
            self.sleep(1)
        self.found = len(existing)
        self.journal.note("gone", ids=sorted(missing))
        self.journal.note("seen", ids=[x.id for x in existing], until=None)
        refuse_others(self.wish, existing)
        if existing:
            self.watch.say(f"{len(existing)} machine(s) of {self.plan.name} are up already: taking these.")
            self.security_group(existing[0].tags)
            self.profile(existing[0].tags)
        return existing

    def provisioned(self) -> list[Instance]:
        """Up the ladder of markets and zones. Raises Refused with its whole history."""
        plan, facts, intent = self.plan, self.facts, uuid.uuid4().hex
        max_s = 3600 * limit_hours(self.terms, estimated(facts, plan.config, plan.layout.ranks))
        expires = time.time() + max_s + 1800      # the watchdog's clock begins later than ours
        tags = ec2.tags_of(plan.name, facts.owner, config_hash(plan), expires,
                           f"{self.terms.minutes_after_success:g}/{self.terms.minutes_after_failure:g}")
        profile = self.profile(tags)              # first: EC2 takes a while to know it
        group = self.security_group(tags)
        placement = self.cloud.placement_group(self.group_name, tags) if self.count > 1 else None
        keys = [ssh.key(home()).with_suffix(".pub").read_text(),
                *([among.admission(self.journal.folder)] if self.count > 1 else [])]
        attempts: list[ladder.Attempt] = []
        ondemand, why_not = self.ondemand_allowed()
        give_up_at = time.time() + 60 * self.terms.wait
        while True:
            self.check()
            move = ladder.next_move(attempts, spot=plan.config.machines.spot, zones=facts.zones, now=time.time(),
                                    give_up_at=give_up_at, ondemand=ondemand, why_not=why_not)
            if isinstance(move, ladder.Wait):
                why = "AWS does not answer" if attempts[-1].verdict in ladder.AGAIN else "No capacity anywhere yet"
                self.watch.say(f"{why}; again in {move.seconds:.0f} s.")
                self.sleep(move.seconds)
                continue
            if isinstance(move, ladder.GiveUp):
                raise Refused(move.reason)
            rate, price_cap = self.rate_of(move.market, move.zone)
            budget_s = self.budget_s(rate)
            limits = Limits(after_success_s=60 * self.terms.minutes_after_success,
                            after_failure_s=60 * self.terms.minutes_after_failure, max_s=max_s,
                            budget_s=budget_s)
            token = ec2.token(intent, move.market, move.zone, move.round)
            request = ec2.run_instances_request(
                kind=facts.type, count=self.count, market=move.market, zone=move.zone,
                subnet=self.account.network.subnets[move.zone], group=group, placement=placement,
                image=self.account.image, disk_gib=self.terms.disk_gib, user_data=user_data(limits, *keys),
                tags=tags, token=token, profile=profile, key_pair=self.account.key_pair)
            if price_cap is not None:
                request["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] = f"{price_cap:.4f}"
            price = {"usd_per_hour": rate or 0.0, "until": min(expires, time.time() + (budget_s or max_s))}
            self.asked = True
            self.journal.note("intent", token=token, market=move.market, zone=move.zone, count=self.count,
                              image=self.account.image.id, **price)
            self.watch.say(f"Asking for {self.count} x {facts.type.name}, {ladder.NAMES[move.market]}, {move.zone}.")
            try:
                machines = self.cloud.run_instances(request)
            except CallFailed as error:
                said = error.said
                if error.verdict == "quota":
                    said += f" (Service Quotas: {ec2.quota(facts.type.name, move.market)})"
                attempts.append(ladder.Attempt(move.market, move.zone, error.verdict, error.code, said, time.time()))
                if error.verdict not in ladder.AGAIN:
                    self.journal.note("answer", token=token, ids=[])
                self.watch.say(f"  {error.code}")
                continue
            self.ours = [x.id for x in machines]
            self.journal.note("answer", token=token, ids=self.ours)
            self.journal.note("launched", ids=self.ours, **price)
            return machines

    def recovered(self) -> list[str]:
        """The machines of launches whose answer nobody heard. EC2 may show them only a while later."""
        found: list[str] = []
        for intent in self.journal.unanswered():
            while not (ids := [x.id for x in self.cloud.instances(token=intent["token"])]) and \
                    time.time() < intent["at"] + SHOWN_S:
                time.sleep(1)
            found += ids
            with contextlib.suppress(OSError):    # a full disk here must not keep the machines from being ended
                self.journal.note("answer", token=intent["token"], ids=ids)
                if ids:
                    self.journal.note("launched", ids=ids, **{x: intent[x] for x in ("at", "usd_per_hour", "until")})
        return found

    def security_group(self, tags: Mapping[str, str]) -> str:
        """Of this cluster, open to where we are now."""
        return self.cloud.security_group(self.group_name, self.account.network.vpc, self.account.cidr, dict(tags),
                                         doors.in_use(self.plan.name))

    def profile(self, tags: Mapping[str, str]) -> str | None:
        """The machines' instance profile: one that was named, or the run's own, which may do what the run needs of S3;
        None where it needs nothing. Raises Refused where it may not be made."""
        terms, owner, name = self.terms, self.facts.owner, self.plan.name
        if terms.role or not terms.needs_s3:
            return terms.role
        try:
            return self.cloud.role(
                bucket.role_name(owner, name, self.cloud.region), bucket.role_path(owner, name), bucket.trust(),
                bucket.policy(place_of(self.plan), bucket.parse(terms.data) if terms.data else None,
                              self.cloud.caller.split(":")[1]), tags)
        except CallFailed as error:
            if error.verdict != "denied":
                raise
            raise Refused(f"The machines need a role for S3, and {self.cloud.caller} may not make one: {error}\n"
                          f"Or name an instance profile that may do the same:  --role=NAME") from error

    def ondemand_allowed(self) -> tuple[bool, str]:
        """Whether on-demand machines may take the place of spot ones, and what to say where not."""
        if self.terms.fallback is None:
            return False, ("Take on-demand machines then with --fallback=ondemand, or at once with --nospot; or wait "
                           "longer for spot, --wait=MINUTES.")
        estimate = estimated(self.facts, self.plan.config, self.plan.layout.ranks, spot=False)
        total = None if estimate is None else estimate.total_usd
        if self.terms.budget is None or total is None:            # unknown: then the machines alone hold the budget
            return True, ""
        left = self.terms.budget - self.journal.spent(time.time())
        return total <= left, f"On demand it would cost ${total:.2f} in all, and of --budget ${left:.2f} are left."

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
        """How long the machines may live for the run to stay within its budget. Raises Refused where that is no use."""
        if self.terms.budget is None:
            return None
        if rate is None:
            raise Refused(f"--budget cannot be held: what a {self.facts.type.name} costs is not known")
        spent = self.journal.spent(time.time())
        seconds = 3600 * (self.terms.budget - spent) / rate
        if seconds < WORTH_S:
            raise Refused(f"{self.plan.name} has cost ${spent:.2f}, and --budget is ${self.terms.budget:.2f}: not "
                          f"{WORTH_S // 60} minutes more at ${rate:.2f} per hour. Give a higher one to go on")
        return seconds

    def running(self, machines: list[Instance]) -> list[Instance]:
        """The machines once all run. What was just launched may be invisible for a while."""
        ids, deadline, wait = {x.id for x in machines}, time.monotonic() + COMING_S, .2
        while True:
            self.check()
            seen = [x for x in self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner, alive=False)
                    if x.id in ids]
            if ended := [x for x in seen if x.state in ("shutting-down", "terminated", "stopping", "stopped")]:
                raise Unfit(f"{', '.join(x.id for x in ended)} ended before the training began (state "
                             f"{ended[0].state}): a spot interruption, or a fault of EC2")
            if len(seen) == len(ids) and all(x.state == "running" and x.private for x in seen):
                return sorted(seen, key=lambda x: x.node)
            if time.monotonic() > deadline:
                raise Unfit(f"After {COMING_S // 60} minutes not all machines run: "
                             + ", ".join(f"{x.id} {x.state}" for x in seen))
            self.sleep(wait)
            wait = min(2 * wait, 5)

    def hosts(self, machines: list[Instance]) -> list[Host]:
        if self.jump:
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
        needs = ready.Needs(self.facts.type.gpus, uses_efa(self.facts, self.count), 10, None)
        script = "" if self.terms.skip_setup else installation(self.facts.stack, needs.efa)
        if script:
            self.await_ready(shells, replace(needs, gpus=0, efa=False))
            self.watch.say("Installing what the image lacks: minutes.")
            self.install(shells, script)
        shells = self.await_ready(shells, needs)
        self.ready = True
        return shells

    def await_ready(self, shells: list[Shell], needs: ready.Needs) -> list[Shell]:
        return ready.wait_ready(shells, needs, deadline_s=READY_S, say=self.watch.say,
                                interrupted=self.watch.interrupted)

    def install(self, shells: list[Shell], script: str) -> None:
        with reach.holding(shells):
            ssh.each(shells, lambda shell: shell.run(script, timeout_s=READY_S, tied=True,
                                                     interrupted=self.watch.interrupted), name=lambda shell: shell.name)

    def job(self, shells: Sequence[Shell], launch: str) -> RemoteJob:
        self.ours = []                            # from here on they are the run's
        return RemoteJob(self.plan.run_dir, shells, launch, self.watch, self.gone, self.bye,
                         pages=pages(self.plan))

    def gone(self, nodes: list[int]) -> dict[int, str]:
        there = {x.node: x.state for x in self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner)}
        return {i: f"its machine is {there[i]}" if i in there else
                "its machine is gone: a spot interruption, its deadline, or somebody's kill"
                for i in nodes if there.get(i) not in ("pending", "running")}

    def bye(self) -> None:
        """What it has cost by now, and when the machines go."""
        try:
            left = self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner)
        except CallFailed as error:
            self.watch.say(f"Whether the machines are still there cannot be asked: {error}")
            return
        now, rates = time.time(), self.journal.notes("launched")
        lingering_s = 60 * max(self.terms.minutes_after_success, self.terms.minutes_after_failure)
        self.journal.note("seen", ids=[x.id for x in left], until=now + lingering_s)
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
            ended = self.end_ours()
        except CallFailed as error:
            who = ", ".join(self.ours) or "what was asked for"
            return (f"{error.action}: {error.code}. So {who} may still run; each machine powers itself off within 20 "
                    f"minutes. To end them:  python -m cluster kill {self.plan.name}")
        left = self.tidied(5 if ended else 0)
        said = f"The {ended} machine(s) of this launch are terminated." if ended else (
            f"The {self.found} machine(s) that were up already stay. To end them:  python -m cluster kill "
            f"{self.plan.name}" if self.found else "Nothing of this launch is left.")
        return said + (f"\nStill in use: {', '.join(left)}. In some minutes:  python -m cluster gc" if left else "")

    def end_ours(self) -> int:
        """Ends what this launch has started, and returns how many. What EC2 does not know yet is asked for again."""
        self.ours = ours = list(dict.fromkeys([*self.ours, *self.recovered()]))
        for pause_s in (0, *ec2.VISIBLE_S):
            time.sleep(pause_s)
            self.ours = self.cloud.terminate(self.ours)
            if not self.ours:
                with contextlib.suppress(OSError):
                    self.journal.note("gone", ids=ours)
                return len(ours)
        raise CallFailed("TerminateInstances", "NotFound", "EC2 does not know its own machines", "missing")

    def tidied(self, wait_s: float) -> list[str]:
        """Takes away groups and addresses, which can go once the machines are really gone. Returns what is left."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                if self.cloud.instances(cluster=self.plan.name, owner=self.facts.owner):
                    return []                     # and what they use
                things = self.cloud.leftovers(owner=self.facts.owner, cluster=self.plan.name)
            except CallFailed as error:
                return [f"its groups perhaps ({error.action}: {error.code})"]
            left = [f"{thing.what} {thing.id}" for thing in things if not self.removed(thing)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(.5)

    def removed(self, thing: Thing) -> bool:
        try:
            self.cloud.remove(thing)
        except CallFailed:                        # in use, most likely, until the machines are really gone
            return False
        return True

    # --- small things ---

    @property
    def ground(self) -> Ground:
        return Ground(self.facts.stack.torch, self.facts.stack.index_url, self.cloud.region, first_alone=self.jump)

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
