"""`smoke`: whether all of this works with your account. Two machines come, train, lose their launcher and go.

It is the launcher's own commands that are given, in a folder of their own, and EC2 that is asked what is left.
"""
from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import interrupts, prices, verbs
from cluster.driven import Launcher
from cluster.ec2 import CallFailed, Cloud, Instance, Type
from cluster.follow import FAILED, FINISHED, STOPPED
from cluster.journal import owner_name
from cluster.local import CHECKOUT
from cluster.prices import Spell, bill
from cluster.run import Broken, agree, newest_checkpoint
from cluster.spec import Terms
from cluster.verbs_lists import clusters
from engine.cli import flag

COUNT, MAX_HOURS = 2, 1
LAUNCH_S, ANSWER_S = 2400, 300                    # until it trains, installations included; for any other step
AFTER_S = 5                                       # that a training is left alone, without its launcher
# Long enough to be stopped by us, and so that it stops and goes on within seconds.
TRAINING = ("recipe.stop.max_steps=10000000", "recipe.clock.eval_interval=10000000",
            "recipe.clock.checkpoint_interval=10000")


@dataclass(frozen=True)
class Smoking(verbs.Region):
    instance_type: str = flag("of both machines", "c5.xlarge")
    yes: bool = flag("do not ask", False)
    vpc: str | None = flag("else the region's default one", None)
    ssh_user: str | None = flag("on the machines; else the image's", None)
    ssh_cidr: str | None = flag("who may reach their port 22; else this machine's address", None)


def smoke(words: Sequence[str], flags: Smoking) -> int:
    cloud = Cloud(flags.region)
    kind = cloud.type(flags.instance_type)
    agree(question(kind, cloud.spot_prices(kind.name)), flags.yes)
    trial = Trial(cloud, flags, f"smoke-{secrets.token_hex(2)}", Path(tempfile.mkdtemp(prefix="txl-smoke-")))
    print(f"{trial.name} in {cloud.region}; what its commands print is in {trial.folder}/log", flush=True)
    failed = None
    with interrupts.as_ctrl_c():
        try:
            failed = trial.steps()
        except KeyboardInterrupt:
            failed = "broken off"
        finally:
            with interrupts.unheard():
                left = trial.end()
    print(f"\n{trial.bill()}")
    if not failed and not left:
        shutil.rmtree(trial.folder, ignore_errors=True)
        print(f"PASSED: launch, training, loss of the launcher, stop and end work with {kind.name} in {cloud.region}, "
              f"and nothing is left.")
        return FINISHED
    print(f"FAILED: {failed or 'something is left'}. What was said is in {trial.folder}")
    print(f"Left are {', '.join(left)}. Machines power themselves off within {MAX_HOURS} hour of their boot. To end it "
          f"all:  python -m cluster kill {trial.name}, and where no machine is left:  python -m cluster gc"
          if left else "Nothing is left.")
    return STOPPED if failed == "broken off" else FAILED


def question(kind: Type, spot_usd: dict[str, float]) -> str:
    zone = min(spot_usd, key=lambda zone: spot_usd[zone], default=None)
    now, listed = (prices.rates(kind.name, spot_usd=usd, zone=zone, disk_gib=Terms.disk_gib) for usd in (spot_usd, {}))
    cost = "what they cost is not known"
    if now and listed:
        hourly, most = (COUNT * (x.machine_usd + x.disk_usd + prices.ADDRESS_USD_PER_HOUR) for x in (now, listed))
        cost = f"${hourly:.2f} per hour ({now.source}), ${most * MAX_HOURS:.2f} at the very most"
    return (f"Launch {COUNT} x {kind.name} on spot, for minutes, and for {MAX_HOURS} hour if all goes wrong: {cost}. "
            f"Go on?")


class Trial:
    """A cluster of its own name, and every command given to it."""

    def __init__(self, cloud: Cloud, flags: Smoking, name: str, folder: Path):
        self.cloud, self.name, self.folder = cloud, name, folder
        self.log, self.began = folder / "log", time.monotonic()
        given = {"region": cloud.region, "vpc": flags.vpc, "ssh_user": flags.ssh_user, "ssh_cidr": flags.ssh_cidr}
        self.command = [
            sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", "--backend=aws", f"--name={name}",
            f"--instance_type={flags.instance_type}", f"--machines={COUNT}", f"--max_hours={MAX_HOURS}",
            "--minutes_after_success=5", "--minutes_after_failure=5", "--wait=5", "--yes",
            *(f"--set={change}" for change in TRAINING),
            *(f"--{key}={value}" for key, value in given.items() if value is not None)]
        self.launcher: Launcher | None = None
        self.step_seen = 0
        self.machines: dict[str, Instance] = {}
        self.ended = 0.0                          # unix time; 0: they may be there

    def steps(self) -> str | None:
        """What failed, or None. A line for each step; after one that fails there is no other."""
        acts: tuple[Callable[[], str], ...] = (self.launch, self.lose, self.follow, self.stop, self.kill, self.sweep)
        for act in acts:
            about = act.__doc__ or ""
            try:
                said = act()
            except (Broken, CallFailed, OSError, subprocess.TimeoutExpired) as error:
                self.tell("FAILED", f"{about}: {error}")
                return about
            self.tell("ok", f"{about}: {said}")
        return None

    def tell(self, how: str, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {how:<6}  {what}", flush=True)

    # --- the steps, each told by its docstring and what it returns ---

    def launch(self) -> str:
        """launch until it trains"""
        self.launcher = self.launched()
        self.step_seen = self.trained(LAUNCH_S)
        there = self.there()
        if len(there) != COUNT:
            raise Broken(f"it trains, and EC2 knows {len(there)} machines instead of {COUNT}")
        return f"step {self.step_seen} on {', '.join(x.id for x in there)}, {there[0].market}, {there[0].zone}"

    def lose(self) -> str:
        """kill the launcher"""
        assert self.launcher is not None
        self.launcher.kill()
        time.sleep(AFTER_S)
        if len(self.there()) != COUNT:
            raise Broken(f"its machines did not stay: EC2 knows {len(self.there())}")
        return "the machines are still there"

    def follow(self) -> str:
        """follow by the same command"""
        self.launcher = self.launched()
        self.launcher.until("following it", ANSWER_S)
        before, self.step_seen = self.step_seen, self.trained(ANSWER_S)
        if self.step_seen <= before:
            raise Broken(f"step {self.step_seen}, but it had come to step {before} before")
        return f"at step {self.step_seen} by now, from {before}"

    def stop(self) -> str:
        """stop by Ctrl-C, with a checkpoint"""
        assert self.launcher is not None
        self.launcher.ctrl_c()
        stopped = int(self.launcher.until(r"^Stopped at step (\d+)", ANSWER_S)[1])
        status, newest = self.launcher.wait(ANSWER_S), newest_checkpoint(self.folder / "runs" / self.name)
        if status != STOPPED or newest is None or newest["step"] != stopped:
            raise Broken(f"status {status}, and the newest checkpoint here is of step {newest and newest['step']} "
                         f"rather than {stopped}")
        return f"that of step {stopped} is here"

    def kill(self) -> str:
        """kill"""
        self.verb("kill", self.name, "--yes")
        self.ended = time.time()
        return f"{COUNT} machines ended, their groups removed"

    def sweep(self) -> str:
        """gc"""
        if self.name in (said := self.verb("gc", "--dry_run")):
            raise Broken(f"it finds of {self.name} still: {' / '.join(said.splitlines())}")
        return "it finds nothing more of it"

    # --- the end, whatever happened ---

    def end(self) -> list[str]:
        """Ends what is there of it. What is left then, by name; it may be that nobody could be asked."""
        if self.launcher and self.launcher.runs:  # it takes back itself what it is about to make
            for ask in (self.launcher.ctrl_c, self.launcher.ctrl_c, self.launcher.kill):
                ask()
                with contextlib.suppress(Broken):
                    self.launcher.wait(60)
                    break
        try:
            mine = {"owner": owner_name(), "cluster": self.name}
            if there := self.there():
                verbs.end(self.cloud, clusters(there))
                self.ended = time.time()
            verbs.remove(self.cloud, self.cloud.leftovers(**mine))
        except CallFailed as error:
            self.tell("FAILED", f"the end: {error}")
        try:
            left = [f"{x.id} ({x.state})" for x in self.there()]
            left += [f"{thing.what} {thing.id}" for thing in self.cloud.leftovers(**mine)]
        except CallFailed as error:
            return [f"perhaps all of {self.name}, as EC2 could not be asked ({error.code})"]
        if not left:
            self.tell("ok", "nothing is left: no machine, disk, address, group or spot request of its name")
        return left

    def bill(self) -> str:
        rates, until = verbs.rates(self.machines.values()), self.ended or time.time()
        return "What it cost at most:\n" + bill(
            Spell(x.node, x.id, x.kind, x.market, x.zone, max(0.0, until - x.launched) / 3600, rates.get(x.id))
            for x in self.machines.values())

    # --- small things ---

    def launched(self) -> Launcher:
        return Launcher(self.command, self.log, cwd=self.folder)

    def trained(self, timeout_s: float) -> int:
        assert self.launcher is not None
        return int(self.launcher.until(r"^step (\d+)/", timeout_s)[1])

    def there(self) -> list[Instance]:
        found = self.cloud.instances(cluster=self.name, owner=owner_name())
        self.machines |= {x.id: x for x in found}
        return found

    def verb(self, *words: str) -> str:
        """What `python -m cluster` says. Raises Broken where it fails."""
        done = subprocess.run([sys.executable, "-m", "cluster", *words, f"--region={self.cloud.region}"], cwd=CHECKOUT,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S, check=False)
        with open(self.log, "a") as log:
            log.write(f"$ python -m cluster {' '.join(words)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            raise Broken(f"status {done.returncode}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
        return done.stdout
