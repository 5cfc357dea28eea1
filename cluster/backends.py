"""The seam between a plan and the machines that carry it out. A backend is one module and one line in BACKENDS.

What a backend must do for the rest to work: start the nodes of a plan, and keep the run's folder on the machine that
launched (logs/, status.json, checkpoints' meta.json) up to date while it runs.
"""
from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

from cluster.plan import Layout, Plan
from cluster.run import Standing
from cluster.spec import Config

BACKENDS = {                                      # name: module, loaded when chosen
    "local": "cluster.local",
}


class Job(Protocol):
    """A plan being carried out."""
    def poll(self) -> tuple[int, ...] | None:
        """The nodes' exit statuses once none is running (negative: the signal that ended it); None before."""
    def stop(self) -> None:
        """Ask the training to save and end. Once: a training that is still starting up finds the request."""
    def kill(self) -> None:
        """End everything now."""
    def close(self) -> None:
        """Give back what outlives the training, an unheard request to stop too. After poll() gave the statuses."""


class Backend(Protocol):
    """What the module of a backend offers."""
    def survey(self, config: Config, standing: Standing) -> Any:
        """What the layout must know of the world; looks, and changes nothing. Raises Refused."""
    def lay_out(self, config: Config, run_dir: Path, facts: Any) -> Layout:
        """Which command runs where. Pure."""
    def apply(self, plan: Plan) -> Job:
        """Carry the plan out. Raises Refused, OSError and, when something had started, Broken; nothing is left."""


def load(name: str) -> Backend:
    """The backend `name`, one of BACKENDS."""
    return importlib.import_module(BACKENDS[name])
