"""Ray on machines that a launch has (--ray): what their supervisors start in torchrun's place, and what they are told.

The rest is as without it: the same code, data, supervisors, watchdogs and following. host/ray_node.py is what runs.
"""
from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

from cluster.backends import Wish
from cluster.host.ray_node import JOB, TOKEN
from cluster.plan import Plan
from cluster.ray import job_of
from cluster.run import RAY_DASHBOARD, port_of

PACKAGES = ("ray", "pyarrow")                     # that a machine's Python must have beside the training's own


def command(python: str, run: str, node: int, address: str, head: str, port: int) -> tuple[str, ...]:
    """What the supervisor of a node starts, in ~/txl."""
    return (python, "-m", "cluster.host.ray_node", f"runs/{run}", f"--node={node}", f"--address={address}",
            f"--head={head}:{port}")


def told(plan: Plan | Wish, ranks: int, launch: str) -> dict[str, str]:
    """Files of every machine, by their path below ~/txl. The token is a new one for each launch."""
    job = job_of(plan, ranks, on_gpus=False) | {       # node 0 sees whether there are GPUs
        "id": f"{plan.name}-{launch}", "pinned": True, "dashboard_port": port_of(plan.name, RAY_DASHBOARD)}
    files = {JOB: json.dumps(job), TOKEN: secrets.token_hex(32),
             "ray.json": json.dumps({"id": job["id"]})}          # this folder is fetched: no need to send it by frames
    return {f"runs/{plan.name}/{name}": text for name, text in files.items()}


def notes(wish: Wish) -> Iterator[str]:
    """What a plan says of it."""
    if wish.terms.ray:
        run = wish.name
        yield ("Ray is started on the machines, and starts a rank that dies again. Its dashboard comes here through a "
               f"tunnel, and asks for a token:  python -m cluster cat {run} txl/runs/{run}/{TOKEN}")
