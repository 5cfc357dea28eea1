"""Real ranks in network namespaces on slowed links: what a link can carry is the judge."""
from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import namespaces
from benchmarks.scaling import Workload
from configs import CONFIGS
from engine.values import BadValue

STRETCH, SHRINK = 8.0, 200.0
COMPUTE_MS, MBIT = 34 * STRETCH, 37e9 * 8e-6 / SHRINK / STRETCH   # nvidia_base on p4d
FLAGS = (f"--stretch={STRETCH}", f"--shrink={SHRINK}", "--ranks=2")


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.simulate", *FLAGS, *flags]


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def alive(mark: str) -> int:
    """Simulations with this in their command lines."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):                        # it has just ended
            told = path.read_bytes()
            found += b"benchmarks.simulate" in told and mark.encode() in told
    return found


@pytest.fixture
def possible():
    """Skips where namespaces and tc cannot be had, with the reason."""
    probe = "from benchmarks.namespaces import *; enter_switch()"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])


@pytest.mark.slow
def test_no_step_is_shorter_than_what_it_waits_for_and_nothing_is_left(possible):
    before, mark = links(), "--rounds=3"
    done = subprocess.run(command(mark), capture_output=True, text=True, timeout=200)
    if "qdisc kind is unknown" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert (links(), alive(mark)) == (before, 0)
    reached = float(re.findall(r"links slowed to \d+ Mbit/s reach (\d+)", done.stderr)[0])
    assert 0 < reached < 1.05 * MBIT

    cells = [[cell.strip() for cell in line.split("|")[5:-1]] for line in done.stdout.splitlines() if "nothing" in line
             or "dense" in line or "early" in line]
    ms = {name: float(measured) for name, measured, *_ in cells}
    in_16_bits = Workload(CONFIGS["nvidia_base"].recipe, 32, 1).gradients(16)

    def sent_ms(size: float) -> float:
        """Of so many bytes of gradients, which two ranks send each other once: sooner than this no link carries them,
        however busy the machine is or not."""
        return .9 * size / SHRINK / (MBIT * 125)                  # a tenth may pass at once, as tc's bucket is full
    whole, table = sent_ms(2 * in_16_bits.total), sent_ms(2 * (in_16_bits.head + in_16_bits.tails))
    assert ms["links not slowed: dense, 32 bits"] > COMPUTE_MS - 1
    assert ms["dense, 32 bits, nothing overlapped"] > COMPUTE_MS + whole
    assert ms["dense, 32 bits"] > COMPUTE_MS + table
    assert ms["dense, 16 bits"] > COMPUTE_MS + table / 2
    assert ms["early, 16 bits"] > COMPUTE_MS - 1


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_link(possible):
    before, mark = links(), "--rounds=10000"
    running = subprocess.Popen(command(mark), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while alive(mark) < 3 and time.monotonic() < deadline:        # it and its two machines
        time.sleep(.1)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert (links(), alive(mark)) == (before, 0)


def test_without_its_tools_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadValue, match=r"ip and tc of iproute2 is not here\. Install iproute2"):
        namespaces.enter_switch()
