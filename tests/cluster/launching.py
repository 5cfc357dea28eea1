"""Launches for tests: the backend itself, on the rehearsal's strict EC2 with machines that are sshds on loopback.

The fixture `bench` (conftest.py) is as new for each test, and asserts after it that what still costs has a deadline.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import launch
from cluster import aws
from cluster.plan import Plan
from cluster.rehearsal.bench import Bench
from cluster.run import Stopped
from engine.cli import parse
from tests.waiting import wait_for

SETTLE_S = 120                                    # the most that anything here is waited for


class Person:
    """At the terminal: reads what is said, and presses Ctrl-C once `leaves` holds of it."""

    def __init__(self, leaves: str | None = None, then: Callable[[], None] = lambda: None):
        self.lines, self._leaves, self._then = list[str](), leaves, then

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self._leaves and self._leaves in text:
            self._then()

    def interrupted(self) -> bool:
        return self._leaves is not None and any(self._leaves in line for line in self.lines)


def plan_of(bench: Bench, *more: str, count: int = 2, kind: str = "c5.xlarge", name: str = "two") -> Plan:
    flags = parse(launch.Flags, ["--config=tiny", "--backend=aws", f"--name={name}", f"--instance_type={kind}",
                                 f"--machines={count}", "--set=machines.gpus=1", "--set=recipe.batch.size=none",
                                 "--set=recipe.batch.local_size=2", "--skip_setup", f"--ssh_user={bench.user}",
                                 "--wait=0", *more], prog="launch.py", about="")
    return launch.make_plan(flags, launch.find_config(flags))


def launched(bench: Bench, *more: str, until: str = "Bringing the code") -> None:
    """A launch that is given up once it says `until`, by default when its machines are ready."""
    with pytest.raises(Stopped):
        aws.apply(plan_of(bench, *more), Person(until))


def until(condition: Callable[[], Any], seconds: float = SETTLE_S) -> bool:
    return bool(wait_for(condition, seconds)[0])


def requests(bench: Bench, action: str = "RunInstances") -> list[dict[str, Any]]:
    return [call.params for call in bench.ec2.calls if call.action == action]


def is_spot(params: dict[str, Any]) -> bool:
    return params.get("InstanceMarketOptions.MarketType") == "spot"
