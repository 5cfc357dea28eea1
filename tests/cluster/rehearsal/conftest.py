from __future__ import annotations

import pytest

pytest.importorskip("moto", reason="a rehearsal needs moto[server]")

from cluster.rehearsal.bench import Bench
from cluster.rehearsal.ec2 import StrictEc2
from tests.cluster.rehearsal.aws import Caller


@pytest.fixture
def ec2():
    with StrictEc2() as strict:
        strict.world.boot_s = strict.world.shutdown_s = 0.05
        yield strict


@pytest.fixture
def aws(ec2) -> Caller:
    return Caller(ec2.url)


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path / "bench") as bench:
        bench.world.boot_s = bench.world.shutdown_s = 0.05
        yield bench
