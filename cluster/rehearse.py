"""`launch.py --rehearse`: a launch as it would be, on this machine, without an account and in under two minutes.

The same program, in an environment whose EC2 is a strict stand-in and whose machines are sshds on loopback. The model
is the one of `tiny`. At the end the ten minutes after success go by in a moment, the machines' own watchdogs end them,
and what is left is counted.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.driven import Launcher
from cluster.local import CHECKOUT
from cluster.prices import Spell, bill
from cluster.rehearsal.bench import Bench
from cluster.run import Refused
from cluster.spec import LOCAL, Config
from engine.values import nearest

KIND_FOR_LOCAL = "c5.xlarge"                      # of a config that is for the machine one types on
NAME = f"rehearsal-{os.getpid()}"                 # a training's port goes by it, and another may be under way here
LAUNCH_S = 600                                    # for a launcher to come to what is waited for
ENDLESS = ("--set=recipe.stop.max_steps=1000000", "--set=recipe.clock.eval_interval=1000000")   # not over too soon
PATIENCE_S = 60                                   # for watchdogs to act once their time has come


def main(config: Config, drill: str | None = None, more: Sequence[str] = ()) -> int:
    """The exit status: 0 where all went as it should and nothing is left. Raises Refused where it cannot be done.

    `more`: what launch.py is given beside the config.
    """
    if drill not in (None, *DRILLS):
        raise Refused(f"There is no drill {drill!r}.{nearest(drill or '', DRILLS)} There are:\n" + "\n".join(
            f"  {name:<16} {act.__doc__}" for name, act in DRILLS.items()))
    folder = Path(tempfile.mkdtemp(prefix="txl-rehearsal-"))
    print(f"A rehearsal in {folder}: no account, no cost. Its spot prices are made up.\n", flush=True)
    if Path("data").is_dir():                     # else node 0 makes its data
        (folder / "data").symlink_to(Path("data").resolve())
    try:
        with Bench(folder) as bench:
            stage = Stage(bench, folder, config, more)
            as_expected = DRILLS[drill](stage) if drill else stage.launch() == 0
            nothing_left = stage.curtain()
    except RuntimeError as error:                 # something it needs is not installed
        shutil.rmtree(folder, ignore_errors=True)
        raise Refused(str(error)) from error
    except KeyboardInterrupt:
        print("\nThe rehearsal is broken off; nothing of it is left running.", file=sys.stderr)
        return 130
    if as_expected and nothing_left:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    print(f"Not as it should be. What happened is in {folder}", file=sys.stderr)
    return 1


class Stage:
    """A bench, and the launcher's processes on it."""

    def __init__(self, bench: Bench, folder: Path, config: Config, more: Sequence[str] = ()):
        self.bench, self.folder, self.count = bench, folder, config.machines.count
        machines = config.machines
        self.kind = machines.kind if machines.kind != LOCAL else KIND_FOR_LOCAL
        self.market = "spot" if machines.spot else "ondemand"
        self.command = [sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", "--backend=aws", f"--name={NAME}",
                        f"--instance_type={self.kind}", f"--machines={machines.count}", "--set=machines.gpus=1",
                        "--set=recipe.batch.size=none", "--set=recipe.batch.local_size=2",
                        f"--ssh_user={bench.user}", "--skip_setup", "--yes", "--wait=0.2",
                        *(["--nospot"] if not machines.spot else []), *more]

    def launch(self, *more: str) -> int:
        """The launcher's exit status, its output on ours."""
        return self.start(*more).wait()

    def start(self, *more: str, stdout: int | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.command, *more], cwd=self.folder, env=self.bench.env, stdout=stdout, text=True)

    def launch_until(self, marker: str, *more: str) -> Launcher:
        """The launcher, once it has printed a line with `marker`. Raises Broken where it does not."""
        launcher = Launcher([*self.command, *more], self.folder / "launch.log", cwd=self.folder, env=self.bench.env,
                            show=lambda line: print(line, flush=True))
        launcher.until(marker, LAUNCH_S)
        return launcher

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(.1)
        return condition()

    def loses(self, which: int, how: str) -> bool:
        """Whether a training that loses a machine fails as it should."""
        launcher = self.launch_until("^step ", *ENDLESS)
        self.bench.reclaim(self.bench.instances()[which].id)
        print(f"\n({how})\n", flush=True)
        return launcher.wait(LAUNCH_S) == 1

    def later(self, seconds: float) -> None:
        """Time goes by for the machines, and for what the launcher has written down of them."""
        self.bench.advance(seconds)
        for journal in Path(self.bench.env["TXL_HOME"]).glob("clusters/*/journal.jsonl"):
            notes = [json.loads(line) for line in journal.read_text().splitlines()]
            journal.write_text("".join(json.dumps(note | {
                key: note[key] - seconds for key in ("at", "until") if note.get(key)}) + "\n" for note in notes))

    def watched(self) -> bool:
        """Whether on all that are still on a watchdog is at work."""
        return all(self.bench.hosts[machine.id].booted for machine in self.bench.alive()) and not self.bench.unguarded()

    def settled(self, since: float) -> bool:
        """Whether all that are still on stay on: their watchdogs have looked at the clock after `since` (unix time)."""
        for machine in self.bench.alive():
            deadline = self.bench.hosts[machine.id].root / "var/lib/txl/deadline.json"
            try:
                if deadline.stat().st_mtime < since + 1 or json.loads(deadline.read_text())["in_s"] < 60:
                    return False
            except (OSError, ValueError):
                return False
        return True

    def curtain(self) -> bool:
        """Time goes by; whether nothing that costs is left, and what it would have cost."""
        if unguarded := self.bench.unguarded():
            print(f"Without a deadline: {', '.join(map(str, unguarded))}")
            return False
        for minutes, why in ((11, "11 minutes later"), (50, "an hour later"), (60 * 24 * 8, "8 days later")):
            if not self.bench.alive():
                break
            print(f"\n({why})", flush=True)
            self.bench.advance(60 * minutes)
            self.until(partial(self.settled, time.time()))
        print("\nWhat it would have cost:")
        machines = {machine.id: machine for machine in self.bench.instances()}
        print(bill(Spell(machines[x.id].node, x.id, x.kind, machines[x.id].market, x.zone, x.hours,
                         x.usd / x.hours if x.hours else None) for x in self.bench.bill()))
        subprocess.run([sys.executable, "-m", "cluster", "gc", "--yes"], cwd=CHECKOUT, env=self.bench.env,
                       check=False)
        self.until(lambda: not self.bench.billable())             # what is shutting down needs a moment
        left = [*self.bench.billable(), *self.bench.leftovers()]
        print("Left over: " + (", ".join(left) or "nothing."))
        return not left


def capacity(stage: Stage) -> bool:
    """the best zone has no room for all machines: another one gets the whole gang"""
    stage.bench.ec2.fail("GetSpotPlacementScores", "UnauthorizedOperation", times=math.inf)     # else it is not asked
    best = stage.start("--dry_run", stdout=subprocess.PIPE).communicate()[0].partition("one of ")[2].partition(",")[0]
    stage.bench.world.capacity["spot", best] = stage.count - 1
    return stage.launch() == 0 and {machine.zone for machine in stage.bench.instances()} != {best}


def no_capacity(stage: Stage) -> bool:
    """no zone has room: refused, with the whole history, and nothing is left"""
    stage.bench.world.capacity |= {("spot", f"us-east-1{letter}"): 0 for letter in "abcdef"}
    return stage.launch() == 2 and not stage.bench.alive()


def launcher_dies(stage: Stage) -> bool:
    """the launcher is killed while the machines train: the same command follows them again, and Ctrl-C stops them"""
    launcher = stage.launch_until("^step ", *ENDLESS)
    launcher.kill()
    print("\n(the launcher is killed; the same command again, and Ctrl-C)\n", flush=True)
    launcher = stage.launch_until("It is training there already: following it", *ENDLESS)
    launcher.until("^step ", LAUNCH_S)
    launcher.ctrl_c()
    return launcher.wait(LAUNCH_S) == 130


def launcher_dies_early(stage: Stage) -> bool:
    """the launcher is killed as soon as the machines run: their watchdogs end them, 20 minutes after boot"""
    launcher = stage.launch_until("machine.s. run")
    launcher.kill()
    print("\n(the launcher is killed; 21 minutes later)\n", flush=True)
    if not stage.until(stage.watched):            # else a watchdog that starts later counts from then
        return False
    stage.bench.advance(21 * 60)
    return stage.until(lambda: not stage.bench.alive())


def interrupt(stage: Stage) -> bool:
    """EC2 takes a machine back in the middle of the training: said, and failed, and nothing goes on alone"""
    return stage.loses(-1, "the last machine is taken back")


def host_dies(stage: Stage) -> bool:
    """the first machine, where the others meet, dies in the middle of the training: said, and failed, and all ends"""
    return stage.loses(0, "the first machine loses its power, and EC2 gives it up")


def throttled(stage: Stage) -> bool:
    """every second request is one too many for EC2: it takes longer, and there is one gang"""
    stage.bench.ec2.fail("*", "RequestLimitExceeded", times=math.inf, status=503, every=2)
    finished = stage.launch() == 0
    stage.bench.ec2.heal()
    return finished and len(stage.bench.instances()) == stage.count


def budget(stage: Stage) -> bool:
    """the budget is used up while the launcher is away: the machines end themselves, and none are launched any more"""
    from cluster.rehearsal.world import price
    usd_per_hour = stage.count * (1.25 * price(stage.kind, stage.market, "us-east-1a") + .05)
    flags = (f"--budget={usd_per_hour / 4:.2f}", *ENDLESS)    # for less than the 20 minutes without a sign of life
    launcher = stage.launch_until("^step ", *flags)
    launcher.kill()
    print("\n(the launcher is killed; 19 minutes later, and the same command again)\n", flush=True)
    stage.later(19 * 60)
    return stage.until(lambda: not stage.bench.alive()) and stage.launch(*flags) == 2


DRILLS = {act.__name__: act for act in (capacity, no_capacity, throttled, launcher_dies, launcher_dies_early, interrupt,
                                        host_dies, budget)}
