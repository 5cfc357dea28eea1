"""What is the same for all tests, wherever they are started from."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.once import once

os.environ["OMP_NUM_THREADS"] = "1"               # tiny tensors gain nothing from more, and sums come out the same
os.environ["TXL_PORTS"] = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]   # else two runs of one name may meet
for ignored in (signal.SIGINT, signal.SIGHUP):    # by nohup, or a shell's &: all that a test starts would inherit that
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

# What takes longest, longest first, as beginnings of what lot() says: begun last, it would be waited for alone.
LONGEST = ("ray", "cluster/test_ray.py", "cluster/test_gang_machines.py",
           "cluster/test_contract.py", "cluster/test_bucket.py", "cluster/test_slurm.py",
           "engine/test_loop.py", "test_rehearse.py", "engine/test_nodes.py", "test_launch.py",
           "cluster/test_smoke.py", "cluster/test_gang", "cluster/test_verbs.py", "cluster/test_ncluster.py",
           "engine/test_checkpoint.py")
ALONE = ("test_rehearse.py",)                     # whose tests share nothing


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory) -> Path:
    """A data/ with what `tiny` learns, its tokens as well: to be read, as all workers share it."""
    def make(folder: Path) -> None:
        folder.mkdir()
        command = [sys.executable, "-m", "txl.data", "--dataset=stdlib", f"--dir={folder}/stdlib", "--n_token=1024"]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=600)
    return once(tmp_path_factory, "stdlib", make)


def lot(nodeid: str) -> str:
    """Of tests that one worker has, one after the other: a module's, which share what it sets up."""
    module, _, test = nodeid.removeprefix("tests/").partition("::")
    if module == "cluster/test_ray_gang.py" or ("[ray" in test and module == "cluster/test_contract.py"):
        return "ray"                              # two lots of Ray's: it gives its parts 30 s to start, no more
    if module in ALONE:
        return f"{module}/{test}"
    if module == "cluster/test_contract.py" and (backend := re.search(r"\[([a-z]+)", test)):
        return f"{module}/{backend[1]}"           # which has a world of its own
    return module


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i, long in enumerate(LONGEST) if lot(item.nodeid).startswith(long)),
                                     len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Lots(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return lot(nodeid)
    return Lots(config, log) if config.getvalue("dist") == "loadscope" else None
