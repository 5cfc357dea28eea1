from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.race import Died, Ratio, in_turn, race
from tests.waiting import alive, until


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_that_of_the_medians():
    ratio = Ratio.of([10, 40, 30], [5, 10, 30])             # the machine was another in each round
    assert ratio.rounds == (2, 4, 1)
    assert ratio.median == 2                                # of the medians: 30 / 10
    assert str(ratio) == "2.00 (1.00 to 4.00)"


def test_a_ratio_needs_a_partner_for_every_round():
    with pytest.raises(ValueError, match="zip"):
        Ratio.of([1, 2, 3], [1, 2])


def test_the_order_is_reversed_every_round():
    assert [in_turn("abc", turn) for turn in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def runner(name: str, log: Path):
    def one_round() -> tuple[int, int]:
        with open(log, "a") as file:
            file.write(f"{name} begins\n{name} ends\n")
        print("what a contender says does not come in the way of what it answers")
        return os.getpid(), len(log.read_text().splitlines())
    return one_round


def test_contenders_are_processes_that_work_one_at_a_time_and_change_their_order(tmp_path):
    log = tmp_path / "log"
    rounds = race({name: partial(runner, name, log) for name in "abc"}, rounds=2)
    turns = "abc" + "cba" + "abc"                           # the first round is to warm up
    assert log.read_text().splitlines() == [f"{name} {what}" for name in turns for what in ("begins", "ends")]
    processes = [{pid for pid, _ in rounds[name]} for name in "abc"]
    assert all(len(pids) == 1 for pids in processes)
    assert len(set.union(*processes, {os.getpid()})) == 4
    assert [at for _, at in rounds["b"]] == [4, 10, 16]


def dying(how: str):
    def one_round():
        sys.stderr.write("first\n" * 30 + "the reason\n")
        sys.stderr.flush()
        if how == "exit":
            os._exit(7)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("so it is")
    return one_round() if how == "while it is made ready" else one_round


@pytest.mark.parametrize(("how", "status", "says"), [
    ("exit", 7, "the reason"), ("signal", -9, "the reason"), ("exception", 1, "ValueError: so it is"),
    ("while it is made ready", 1, "ValueError: so it is")])
def test_of_a_contender_that_dies_the_last_lines_are_told(how, status, says, tmp_path):
    with pytest.raises(Died) as died:
        race({"well": partial(runner, "well", tmp_path / "log"), "ill": partial(dying, how)}, rounds=1)
    message = str(died.value)
    assert message.startswith(f"ill ended with status {status}. Its last lines:\n")
    assert message.endswith(says)
    assert len(message.splitlines()) <= 13


def endless(pid: Path):
    pid.write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def test_a_contender_at_work_ends_when_its_parent_is_killed(tmp_path):
    pid = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", (
        "from functools import partial; from pathlib import Path; from benchmarks.race import race; "
        "from tests.benchmarks.test_race import endless; "
        f"race({{'a': partial(endless, Path({str(pid)!r}))}}, 1)")], cwd=Path(__file__).parents[2])
    try:
        child = int(until(lambda: pid.exists() and pid.read_text(), limit_s=60))
        assert alive(child)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not alive(child), limit_s=60)
