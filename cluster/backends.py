"""The seam between a plan and the machines that carry it out. A backend is one module and one line in BACKENDS.

What a backend must do for the rest to work: start the nodes of a plan, and keep the run's folder on the machine that
launched (logs/, status.json, checkpoints' meta.json) up to date while it runs.
"""
from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.plan import Layout, Plan
from cluster.run import Standing
from cluster.spec import Config, Terms

BACKENDS = {                                      # name: module, loaded when chosen
    "local": "cluster.local",
    "aws": "cluster.aws",
    "ssh": "cluster.hosts",
    "slurm": "cluster.slurm",
    "ray": "cluster.ray",
}

LOST = 255                                        # the exit status of a node of which nothing is left


class Watch(Protocol):
    """The person at the terminal, to a backend at work."""
    def say(self, text: str) -> None:
        """A line on the screen."""
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed. What has not begun training gives up then: it rolls back and raises Stopped."""


class Job(Protocol):
    """A plan being carried out."""
    def poll(self) -> tuple[int, ...] | None:
        """The nodes' exit statuses once none is running (negative: the signal that ended it; -SIGTERM also where the
        job ended it for another's failure); None before."""
    def stop(self) -> None:
        """Ask the training to save and end. Once: a training that is still starting up finds the request."""
    def kill(self) -> None:
        """End everything now."""
    def close(self) -> None:
        """Give back what outlives the training, an unheard request to stop too. After poll() gave the statuses."""
    def machines(self) -> str:
        """How the machines are, in a word or two before the line of progress; "" where there is nothing to say."""


@dataclass(frozen=True)
class Wish:
    """What a plan is to be made of."""
    name: str                                     # of the run
    config: Config
    standing: Standing
    terms: Terms
    dry: bool = False                             # nothing will be carried out: prices may be yesterday's


class Backend(Protocol):
    """What the module of a backend offers."""
    def survey(self, wish: Wish) -> Any:
        """What the layout must know of the world; looks, and changes nothing. Raises Refused."""
    def lay_out(self, wish: Wish, facts: Any) -> Layout:
        """Which command runs where. Pure."""
    def apply(self, plan: Plan, watch: Watch) -> Job:
        """Carry the plan out. Raises Refused, Stopped, OSError and, when something had started, Broken."""


def load(name: str) -> Backend:
    """The backend `name`, one of BACKENDS."""
    return importlib.import_module(BACKENDS[name])
