"""What the laptop remembers of a cluster."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import journal
from cluster.journal import Journal
from cluster.run import Refused

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TXL_HOME", str(tmp_path / "txl"))


def test_an_intent_without_an_answer_is_found_again():
    notes = Journal("x")
    notes.note("intent", token="a")
    notes.note("intent", token="b")
    notes.note("answer", token="a", ids=["i-1"])
    assert [note["token"] for note in Journal("x").unanswered()] == ["b"]
    assert Journal("y").unanswered() == []


def test_a_line_that_a_crash_cut_off_costs_no_other_line():
    notes = Journal("x")
    notes.note("intent", token="a")
    with open(notes.folder / "journal.jsonl", "a") as file:
        file.write('{"what": "intent", "tok')
    notes.note("intent", token="b")
    assert [note["token"] for note in notes.notes("intent")] == ["a", "b"]


def test_machines_cost_from_their_launch_until_they_were_seen_gone_or_until_their_deadline(monkeypatch):
    notes = Journal("x")
    monkeypatch.setattr(journal.time, "time", lambda: 0.0)
    notes.note("launched", ids=["i-1", "i-2"], usd_per_hour=20.0, until=4 * 3600)
    monkeypatch.setattr(journal.time, "time", lambda: 3600.0)
    notes.note("gone", ids=["i-1"])
    assert notes.spent(now=1800) == pytest.approx(20 * .5)
    assert notes.spent(now=7200) == pytest.approx(10 * 1 + 10 * 2)         # one hour of the one, two of the other
    assert notes.spent(now=1e9) == pytest.approx(10 * 1 + 10 * 4)


def test_what_was_seen_last_bounds_what_machines_cost_and_the_first_who_missed_them_counts(monkeypatch):
    notes, clock = Journal("x"), [0.0]
    monkeypatch.setattr(journal.time, "time", lambda: clock[0])
    notes.note("launched", ids=["i-1", "i-2"], usd_per_hour=20.0, until=24 * 3600)
    clock[0] = 3600.0
    notes.note("seen", ids=["i-1", "i-2"], until=2 * 3600)        # the training has ended: an hour to go
    assert notes.spent(now=1e9) == pytest.approx(2 * 20)
    notes.note("seen", ids=["i-1"], until=None)                   # taken once more: as long as its launch allows
    assert notes.spent(now=1e9) == pytest.approx(10 * 24 + 10 * 2)
    assert notes.machines() == {"i-1": 0.0, "i-2": 0.0}
    for clock[0] in (5 * 3600.0, 9 * 3600.0):
        notes.note("gone", ids=["i-1"])
    assert notes.spent(now=1e9) == pytest.approx(10 * 5 + 10 * 2)
    assert notes.machines() == {"i-2": 0.0}


def test_one_launcher_at_a_time_and_a_killed_one_leaves_no_lock():
    script = ("import sys, time; from cluster.journal import Journal\n"
              "with Journal('x').alone('launched'):\n print('here', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    assert other.stdout is not None
    assert other.stdout.readline() == "here\n"
    with pytest.raises(Refused, match=f"x is being worked on: launched by process {other.pid} since"), \
         Journal("x").alone("ended"):
        pass
    with Journal("y").alone("ended"):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with Journal("x").alone("ended"):
        pass


def test_what_it_keeps_is_for_this_user_alone():
    Journal("x")
    for folder in (journal.home(), journal.home() / "clusters" / "x"):
        assert folder.stat().st_mode & 0o777 == 0o700
