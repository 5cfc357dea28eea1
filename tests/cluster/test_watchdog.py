"""The watchdog under a clock that the test turns; programs that power off are stand-ins that write down their calls."""
from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.host import watchdog
from cluster.host.watchdog import State, Watchdog, due
from tests.disks import fill, small_disk
from tests.waiting import until

HOUR = 3600
SOURCE = Path(watchdog.__file__)


class Machine:
    """A folder as a machine's root, and its clock. Ages are counted here, beside the watchdog: powered-on seconds."""

    def __init__(self, root: Path, **terms):
        self.root, self.home = root, root / "var/lib/txl"
        (self.home / "lease").mkdir(parents=True)
        (root / "proc").mkdir()
        (root / "bin").mkdir()
        for name in ("shutdown", "systemctl"):
            stand_in = root / "bin" / name
            stand_in.write_text(f'#!/bin/sh\necho {name} "$@" >>"{root}/calls"\n')
            stand_in.chmod(0o755)
        (self.home / "terms.json").write_text(json.dumps(watchdog.TERMS | terms))
        self.age, self.beat = 0.0, 0
        self.boot()

    def boot(self):
        self.clock = float(random.randrange(10**6))               # whole seconds: sums of them are exact
        self.watchdog = Watchdog(str(self.root), self.clock)
        self.watchdog.tick(self.clock)

    def goes_on(self, seconds: float, every: float = 5) -> bool:
        """False where it was told to power off meanwhile; then self.age is when."""
        end = self.age + seconds
        while self.age < end and not self.calls:
            step = min(every, end - self.age)
            self.age += step
            self.clock += step
            self.watchdog.tick(self.clock)
        return not self.calls

    def says(self, state: str):
        self.beat += 1
        self.writes("run", json.dumps({"state": state, "beat": self.beat}))

    def writes(self, name: str, text: str):
        (self.home / "lease" / name).write_text(text)

    @property
    def calls(self) -> list[str]:
        calls = self.root / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def deadline(self) -> dict:
        return json.loads((self.home / "deadline.json").read_text())


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return lambda **terms: Machine(tmp_path, **terms)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path, "size=64k"):
        yield tmp_path


def test_the_next_end_is_the_first_of_lease_hours_and_budget():
    terms = watchdog.TERMS | {"max_s": 10_000}
    assert due(terms, State(age=900, changed=700)) == (1000, "no lease")
    assert due(terms, State(age=900, changed=700, said="succeeded")) == (400, "succeeded")
    assert due(terms, State(age=900, changed=700, said="failed")) == (3400, "failed")
    assert due(terms, State(age=9000, changed=8990)) == (1000, "maximum hours")
    assert due(terms | {"budget_s": 9500}, State(age=9000, changed=8990)) == (500, "budget")
    assert due(terms | {"budget_s": 9500}, State(age=9600, changed=9590)) == (-100, "budget")


def test_a_machine_that_nobody_reaches_ends_after_20_minutes(machine):
    m = machine()
    assert m.goes_on(1195)
    assert m.deadline == {"in_s": 5.0, "why": "no lease"}
    assert not m.goes_on(10)
    assert (m.age, m.calls) == (1200, ["shutdown -P now"])
    assert "no lease" in (m.home / "watchdog.log").read_text()


def test_a_lease_that_is_renewed_keeps_it_for_hours_and_one_that_is_lost_ends_it(machine):
    m = machine()
    for _ in range(12):
        m.says("running")
        assert m.goes_on(600, every=60)
    assert not m.goes_on(HOUR, every=60)                              # the supervisor was killed
    assert m.age == 2 * HOUR - 600 + 60 + 1200                        # seen with the first tick after it was written


@pytest.mark.parametrize(("state", "minutes"), [("succeeded", 10), ("failed", 60)])
def test_a_run_that_ended_leaves_time_which_anybody_at_work_there_prolongs(machine, state, minutes):
    m = machine()
    m.says("running")
    m.goes_on(HOUR / 4)
    m.says(state)
    m.goes_on(5)
    assert m.deadline == {"in_s": minutes * 60.0, "why": state}
    assert m.goes_on(minutes * 60 - 30)
    for beat in range(10):                                            # a long fetch
        m.writes("hold", f"fetching {beat}")
        assert m.goes_on(120, every=60)
    assert not m.goes_on(2 * HOUR, every=20)
    assert m.age == HOUR / 4 + 5 + (minutes * 60 - 30) + 10 * 120 - 60 + minutes * 60


def test_a_new_launch_on_a_machine_whose_run_ended_is_running_again(machine):
    m = machine()
    m.says("succeeded")
    m.goes_on(500)
    m.says("running")
    m.goes_on(5)
    assert m.deadline == {"in_s": 1200.0, "why": "no lease"}


@pytest.mark.parametrize(("terms", "why"), [({"max_s": 2 * HOUR}, "maximum hours"), ({"budget_s": 2 * HOUR}, "budget")])
def test_no_lease_prolongs_the_hours_or_the_budget(machine, terms, why):
    m = machine(**terms)
    while m.age < 3 * HOUR and not m.calls:
        m.says("running")
        m.goes_on(600, every=60)
    assert m.age == 2 * HOUR
    assert m.deadline == {"in_s": 0.0, "why": why}


def test_a_reboot_changes_nothing_of_when_it_ends_but_by_its_minute(machine):
    m = machine(max_s=2 * HOUR)
    m.says("failed")
    m.goes_on(HOUR / 2)
    m.boot()
    assert m.deadline["why"] == "failed"
    assert HOUR / 2 - 120 <= m.deadline["in_s"] <= HOUR / 2
    while m.age < 4 * HOUR and not m.calls:
        m.says("running")
        m.goes_on(600, every=60)
    assert 2 * HOUR - 120 <= m.age <= 2 * HOUR


def test_a_machine_that_reboots_for_ever_ends(machine):
    m = machine(max_s=HOUR)
    boots = 0
    while not m.calls:
        m.says("running")                                             # each boot gets as far as that
        m.goes_on(10)
        m.boot()
        boots += 1
        assert boots < 1000
    assert m.age <= HOUR


def test_the_age_begins_with_the_boot_rather_than_with_the_watchdog(tmp_path):
    (tmp_path / "var/lib/txl").mkdir(parents=True)
    assert due(watchdog.TERMS, Watchdog(str(tmp_path), 45.0, uptime=45.0).state) == (1155, "no lease")


@pytest.mark.parametrize("garbage", [
    "", "{", "[]", "null", '{"age": 7, "changed": 9}', '{"age": NaN}', '{"age": -1e9}', '{"age": "7"}',
    '{"age": Infinity}', '{"years": 7}', '{"age": 7, "said": "retired"}', "[" * 5000, "\0" * 100])
def test_an_age_that_cannot_be_read_leaves_one_lease(machine, garbage):
    m = machine(max_s=5 * HOUR, budget_s=4 * HOUR)
    (m.home / "age.json").write_text(garbage)
    m.boot()
    m.says("running")
    m.goes_on(5)
    assert m.deadline == {"in_s": 1195.0, "why": "budget"}


def test_a_machine_made_from_an_image_of_another_starts_young(machine):
    m = machine(max_s=HOUR)
    ids = m.root / "sys/class/dmi/id"
    ids.mkdir(parents=True)
    (ids / "product_uuid").write_text("ec2a")
    m.boot()
    m.says("succeeded")
    m.goes_on(599)
    (ids / "product_uuid").write_text("ec2b")
    m.boot()
    assert m.deadline == {"in_s": 1200.0, "why": "no lease"}         # and what was said there does not count here


@pytest.mark.parametrize("garbage", ["", "{", "7", "[]", '{"state": []}', '{"state": "asleep"}', "[" * 5000, "\xff\0"])
def test_garbage_in_the_lease_renews_it_and_says_nothing_new(machine, garbage):
    m = machine()
    m.says("failed")
    m.goes_on(100)
    m.writes("run", garbage)
    m.goes_on(5)
    assert m.deadline == {"in_s": 3600.0, "why": "failed"}


def test_files_that_are_none_do_not_hold_it_up(machine):
    m = machine()
    os.mkfifo(m.home / "lease" / "run")
    (m.home / "lease" / "hold").mkdir()
    assert not m.goes_on(2 * HOUR)
    assert m.age == 1200


def test_only_a_change_of_content_renews(machine):
    m = machine()
    m.says("running")
    m.goes_on(5)
    for days in (-1, 1, 0):
        date = time.time() + days * 86400
        os.utime(m.home / "lease" / "run", (date, date))
        m.goes_on(5)
    assert m.deadline["in_s"] == 1185.0


@pytest.mark.parametrize("terms", ["", "[]", '{"max_s": "long"}', '{"max_s": null}', '{"max_s": NaN}', '{"max_s": -1}'])
def test_limits_that_cannot_be_read_are_the_usual_ones(machine, terms):
    m = machine()
    (m.home / "terms.json").write_text(terms)
    m.boot()
    assert m.watchdog.terms == watchdog.TERMS


def test_time_that_passed_in_one_leap_counts(machine):
    m = machine()
    m.says("running")
    m.goes_on(100)
    assert not m.goes_on(2 * HOUR, every=2 * HOUR)                    # suspended, or a rehearsal's travel


def test_where_shutdown_does_nothing_it_takes_harder_ways_again_and_again(machine):
    m = machine()
    with open(m.root / "bin/shutdown", "a") as stand_in:
        stand_in.write("exit 1\n")                                    # masked
    m.goes_on(1200)
    history: list[str] = []
    for _ in range(6):
        for _ in range(12):                                           # of 5 seconds each
            m.clock += 5
            m.watchdog.tick(m.clock)
            m.says("running")                                         # there is no way back
        trigger = m.root / "proc/sysrq-trigger"
        history.append(m.calls[-1] if not trigger.exists() else f"sysrq {trigger.read_text()}")
        trigger.unlink(missing_ok=True)
    assert history == ["systemctl poweroff --force --force", "sysrq o", "shutdown -P now"] * 2
    assert len(m.calls) == 5
    assert m.deadline == {"in_s": 0.0, "why": "no lease"}


def test_in_a_rehearsal_the_machines_own_shutdown_is_never_found(machine, monkeypatch):
    m = machine()
    monkeypatch.setenv("PATH", "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin")
    m.goes_on(1260)
    assert m.calls == []
    assert "in vain: no shutdown in" in (m.home / "watchdog.log").read_text()
    assert "in vain: no systemctl in" in (m.home / "watchdog.log").read_text()


def test_a_full_disk_stops_neither_the_watchdog_nor_its_count(disk, monkeypatch):
    monkeypatch.setenv("PATH", f"{disk}/bin:{os.environ['PATH']}")
    m = Machine(disk, max_s=3 * HOUR)
    m.writes("hold", "0")
    fill(disk)
    for beat in range(60):
        with open(m.home / "lease" / "hold", "r+") as hold:           # as a supervisor does
            hold.write(str(beat))
        m.goes_on(60, every=20)
    assert json.loads((m.home / "age.json").read_text())["age"] >= HOUR - 60
    (disk / "ballast").unlink()
    fill(disk)                                                  # with the room that its log had
    m.boot()
    assert m.watchdog.state.age >= HOUR
    m.goes_on(1100)
    (disk / "ballast").unlink()                                 # room for the stand-in to write down its call
    assert not m.goes_on(200)


def test_a_disk_that_was_full_before_the_first_age_was_saved_stops_nothing(disk, monkeypatch):
    monkeypatch.setenv("PATH", f"{disk}/bin:{os.environ['PATH']}")
    (disk / "calls").touch()
    m = Machine(disk)
    for name in ("age.json", "deadline.json", "watchdog.log"):
        (m.home / name).unlink(missing_ok=True)
    fill(disk)
    m.boot()
    m.goes_on(1195)
    assert not (m.home / "age.json").exists() or not (m.home / "age.json").read_text()
    (disk / "ballast").unlink()
    assert not m.goes_on(5)


# The process itself.

@pytest.fixture
def watch(tmp_path):
    """Starts the real process; {root} is a rehearsal's root, with a stand-in for shutdown."""
    started = []

    def start(*argv: str, **terms) -> subprocess.Popen:
        if not started:
            Machine(tmp_path, tick_s=0.05, **terms)
            for name in ("age.json", "deadline.json"):
                (tmp_path / "var/lib/txl" / name).unlink()
        env = os.environ | {"TXL_ROOT": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        started.append(subprocess.Popen([*(argv or [sys.executable]), str(SOURCE)], env=env, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def deadline_of(root: Path) -> dict | None:
    path = root / "var/lib/txl/deadline.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_of_two_watchdogs_one_leaves_and_signals_do_not_end_the_other(watch, tmp_path):
    first = watch()
    until(lambda: deadline_of(tmp_path))
    assert watch().wait(120) == 0
    for ignored in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        first.send_signal(ignored)
    before = deadline_of(tmp_path)["in_s"]
    until(lambda: deadline_of(tmp_path)["in_s"] < before)
    assert first.poll() is None


def test_whatever_the_date_does_only_the_clock_ends_it(watch, tmp_path):
    swinging = ("import itertools, runpy, sys, time; real, swing = time.time, itertools.cycle([86400, -86400]);"
                "time.time = lambda: real() + next(swing); runpy.run_path(sys.argv[1], run_name='__main__')")
    watch(sys.executable, "-c", swinging)
    until(lambda: (deadline_of(tmp_path) or {"in_s": 1200})["in_s"] <= 1199.5)
    assert deadline_of(tmp_path)["in_s"] > 1180
    assert not (tmp_path / "calls").exists()
    (tmp_path / "var/lib/txl/clock").write_text("1200")
    until(lambda: (tmp_path / "calls").exists())
    assert deadline_of(tmp_path) == {"in_s": 0.0, "why": "no lease"}


def test_of_pythons_clocks_it_asks_for_none_but_the_boot_clock():
    tree = ast.parse(SOURCE.read_text())
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id == "time"}
    assert asked == {"clock_gettime", "CLOCK_BOOTTIME", "sleep", "strftime"}         # strftime dates a line of the log
    assert "datetime" not in SOURCE.read_text()


def test_suspended_time_counts():
    """A time namespace sets what the kernel says of suspended seconds: the boot clock's lead over the monotonic one."""
    asks = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import watchdog; print(watchdog.clock(''))"
    command = ["unshare", "--time", "--boottime", "7200", "--fork", sys.executable, "-c", asks]
    slept = subprocess.run(command, capture_output=True, text=True) if shutil.which("unshare") else None
    if slept is None or "unshare" in slept.stderr:
        pytest.skip("no time namespaces here")
    assert float(slept.stdout) - watchdog.clock("") == pytest.approx(7200, abs=60)


@pytest.mark.parametrize("name", ["watchdog.py", "supervisor.py"])
def test_what_runs_on_machines_is_python_3_8(name):
    ast.parse((SOURCE.parent / name).read_text(), feature_version=(3, 8))
