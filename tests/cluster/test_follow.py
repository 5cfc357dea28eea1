from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from cluster import follow
from cluster.follow import Follower, Screen, Tail
from cluster.plan import Layout, Node, Plan
from cluster.run import Broken
from configs import tiny

COMMAND = "python launch.py --config=tiny"
TWO_NODES = Layout(tuple(Node(i, "", 1, {}, ()) for i in range(2)), "", "", "")
PLAN = Plan("x", "tiny", tiny, "local", TWO_NODES, command=COMMAND)


class FakeJob:
    """Answers polls from a script of functions; the last result is the exit statuses."""

    def __init__(self, *script, statuses=(0, 0)):
        self.script, self.statuses, self.calls = list(script), statuses, []

    def poll(self):
        if not self.script:
            return self.statuses
        self.script.pop(0)()
        return None

    def stop(self):
        self.calls.append("stop")

    def kill(self):
        self.calls.append("kill")

    def close(self):
        self.calls.append("close")

    def machines(self):
        return ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "POLL_S", 0)
    (tmp_path / "runs" / "x" / "logs").mkdir(parents=True)


def says(text: str, log: str = "rank-0.log"):
    def write() -> None:
        with open(Path("runs/x/logs") / log, "a") as file:
            file.write(text)
    return write


def status(state: str, step: int, message: str = ""):
    return lambda: Path("runs/x/status.json").write_text(json.dumps({"state": state, "step": step, "message": message}))


def checkpoint(step: int):
    def make() -> None:
        folder = Path(f"runs/x/checkpoints/step-{step:08d}")
        folder.mkdir(parents=True)
        meta = {"step": step, "ranks": 2, "valid_loss": None, "vocabulary": "", "files": {"model.pt": 3}}
        (folder / "model.pt").write_text("abc")
        (folder / "meta.json").write_text(json.dumps(meta))
    return make


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def nothing() -> None:
    pass


def followed(job: FakeJob) -> tuple[int, str]:
    screen = io.StringIO()
    with Follower(PLAN, screen) as follower:
        return follower.follow(job), screen.getvalue()


def test_the_log_is_shown_from_where_this_launch_begins():
    says("of yesterday\n")()
    job = FakeJob(says("one\ntw"), says("o\n"), says("three\n"), status("finished", 60, "test ppl 500"))
    assert followed(job) == (0, "one\ntwo\nthree\nFinished at step 60: test ppl 500. Everything is in runs/x\n")
    assert job.calls == ["close"]


def test_ctrl_c_asks_for_a_stop_and_says_how_to_go_on():
    job = FakeJob(interrupt, nothing, nothing, status("stopped", 21))
    code, text = followed(job)
    assert code == 130
    assert text == ("Stopping at the next step, with a checkpoint. Ctrl-C again kills.\n"
                    f"Stopped at step 21 of 60. Go on with:  {COMMAND}\n")
    assert job.calls == ["stop", "close"]         # asked once: the trainer takes the request away when it has heard it


def test_ctrl_c_before_the_nodes_are_started_is_not_lost():
    job = FakeJob(nothing, nothing, status("stopped", 1))
    with Follower(PLAN, io.StringIO()) as follower:
        interrupt()
        assert follower.follow(job) == 130
    assert job.calls == ["stop", "close"]


def test_where_a_stop_cannot_be_asked_for_ctrl_c_again_still_kills():
    job = FakeJob(interrupt, nothing, interrupt, nothing, statuses=(-9, -9))
    def full() -> None:
        raise OSError(28, "No space left on device", "runs/x/stop")
    job.stop = full
    code, text = followed(job)
    assert code == 130
    assert text.splitlines()[:2] == [
        "It cannot be asked to stop: No space left on device: runs/x/stop. Ctrl-C again kills.", "Killing."]


def test_a_second_ctrl_c_kills_and_names_the_last_checkpoint():
    job = FakeJob(checkpoint(20), interrupt, nothing, interrupt, nothing, nothing, statuses=(-9, -9))
    code, text = followed(job)
    assert code == 130
    assert text.splitlines()[1:] == ["Killing.", f"Killed. The last checkpoint is of step 20. Go on with:  {COMMAND}"]
    assert job.calls.count("kill") == 1


def test_two_at_once_kill_too_and_before_any_checkpoint_it_says_so():
    code, text = followed(job := FakeJob(interrupt, interrupt, nothing, statuses=(-9, -9)))
    assert code == 130
    assert "Killed. There is no checkpoint yet." in text
    assert "kill" in job.calls


def test_ctrl_c_while_the_training_fails_is_no_success():
    code, text = followed(FakeJob(interrupt, nothing, statuses=(1, 0)))
    assert code == 130
    assert "Ended. There is no checkpoint yet." in text


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    followed(FakeJob(status("finished", 1)))
    assert signal.getsignal(signal.SIGINT) is before


# As torchrun writes it, shortened.
def torchrun_report(rank: int, exitcode: int, second: int) -> str:
    return (f"E0102 10:00:0{second}.000 77 torch/distributed/elastic/multiprocessing/api.py:1] failed\n"
            f"Root Cause (first observed failure):\n[0]:\n  time      : 2027-01-02_10:00:0{second}\n"
            f"  rank      : {rank} (local_rank: 0)\n  exitcode  : {exitcode} (pid: 77)\n  error_file: <N/A>\n")


def test_the_rank_that_failed_first_is_shown_with_the_end_of_its_log():
    job = FakeJob(says("=== launched\n" + torchrun_report(0, 1, 9), "node-0.log"),
                  says("=== launched\n" + torchrun_report(1, 1, 8), "node-1.log"),
                  says("".join(f"line {i}\nstep {i}\n" for i in range(30)), "rank-1.log"), checkpoint(20),
                  statuses=(1, 1))
    code, text = followed(job)
    assert code == 1
    assert text == "\n".join(["Rank 1 failed first: it ended with status 1.", "The end of runs/x/logs/rank-1.log:",
                              *(f"  line {i}" for i in range(10, 30)), "All logs: runs/x/logs/",
                              f"The last checkpoint is of step 20. Once it is mended, go on with:  {COMMAND}\n"])


def test_a_signal_within_the_same_second_is_the_cause_and_what_the_node_printed_is_shown():
    job = FakeJob(says("=== launched\n" + torchrun_report(0, 1, 8), "node-0.log"),
                  says("=== launched\nstep 3\nterminate called\n" + torchrun_report(1, -9, 8), "node-1.log"),
                  statuses=(1, 1))
    _, text = followed(job)
    assert text.splitlines()[:4] == [
        "Rank 1 failed first: it was ended by SIGKILL, which the system sends when memory runs out.",
        "The end of runs/x/logs/node-1.log:", "  terminate called", "All logs: runs/x/logs/"]


def test_rank_0s_log_is_not_shown_twice():
    job = FakeJob(says("=== launched\n" + torchrun_report(0, 1, 8), "node-0.log"), says("Diverged: at step 3\n"),
                  statuses=(1, 0))
    assert followed(job)[1].splitlines()[:2] == [
        "Diverged: at step 3",
        "Rank 0 failed first: it ended with status 1. See runs/x/logs/rank-0.log, and runs/x/logs/ for the others."]


@pytest.mark.parametrize("stopped", [-15, 1])
def test_a_node_that_fails_before_its_ranks_run_shows_its_own_log(stopped):
    says("=== launched\nof yesterday\n", "node-1.log")()
    job = FakeJob(says("=== launched\nReceived SIGTERM\n", "node-0.log"),
                  says("=== launched\nAddress already in use\n", "node-1.log"),
                  statuses=(stopped, 1))
    _, text = followed(job)
    assert "Address already in use" in text
    assert "of yesterday" not in text


def test_a_node_of_which_nothing_is_left_is_the_cause_and_what_the_others_say_of_it_an_echo():
    job = FakeJob(says("=== launched\n" + torchrun_report(0, 1, 8), "node-0.log"), statuses=(1, 255))
    assert followed(job)[1].splitlines()[0] == (
        "Lost: node 1, and the training with it. All logs: runs/x/logs/")


def test_on_a_terminal_progress_takes_the_place_of_the_line_before(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    screen = Screen(out := Terminal())
    screen.show(["start", "step 1/3 | loss 5", "step 2/3", "valid", "step 3/3"])
    screen.say("end")
    assert out.getvalue() == "start\n\r\x1b[2Kstep 1/3 | \r\x1b[2Kstep 2/3\nvalid\n\r\x1b[2Kstep 3/3\nend\n"


@pytest.mark.parametrize("pair", [os.pipe, os.openpty])
def test_a_screen_that_is_gone_does_not_end_the_following(pair):
    """Ctrl-C on `launch.py | tee log` ends tee too: the run must still be asked to stop; or a terminal is closed."""
    reader, writer = pair()
    os.close(reader)
    job = FakeJob(interrupt, nothing, status("stopped", 1))
    with os.fdopen(writer, "w") as screen, Follower(PLAN, screen) as follower:
        assert follower.follow(job) == 130
    assert job.calls == ["stop", "close"]


def test_a_folder_that_cannot_be_read_any_more_ends_the_training():
    job = FakeJob(nothing, lambda: Path("runs/x/logs/rank-0.log").mkdir(), nothing)
    with pytest.raises(Broken, match=r"Is a directory: runs/x/logs/rank-0.log. The training is killed"):
        followed(job)
    assert job.calls == ["kill"]


def test_a_tail_waits_for_its_file_and_for_whole_lines(tmp_path):
    tail = Tail(tmp_path / "log")
    assert tail.lines() == []
    (tmp_path / "log").write_bytes(b"a\nb\xff\nc")
    assert tail.lines() == ["a", "b\N{REPLACEMENT CHARACTER}"]
    assert tail.lines() == []
