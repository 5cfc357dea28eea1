from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator

import pytest

from cluster import ladder
from cluster.rehearsal.bench import Bench
from tests.cluster.launching import until
from tests.cluster.sshd import machines
from tests.once import once


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture
def bench(stage, tmp_path, monkeypatch) -> Iterator[Bench]:
    """As new: no machine, no fault, a TXL_HOME without journals. What the test leaves must be guarded."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "TXL_"))]:
        monkeypatch.delenv(name)
    for name, value in (stage.env | {"TXL_HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder, "BACKOFF_S", .05)
    stage.ec2.calls.clear()
    yield stage
    stage.ec2.heal()
    until(lambda: not stage.unguarded())
    unguarded = stage.unguarded()
    stage.world.capacity, stage.world.hidden_s = {}, 0.0
    stage.hosts.next.clear()
    with stage.ec2.lock:
        for machine in stage.alive():
            stage.world.end(machine)
    assert until(lambda: not stage.billable())
    stage.ec2.groups.clear()
    for vpc in stage.ec2.backend.groups.values():
        for id in [group.id for group in vpc.values() if group.name != "default"]:
            del vpc[id]
    assert unguarded == []


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory) -> list[tuple[str, int, float]]:
    """The curve of the contract's recipe with two ranks, by torchrun alone: once, for all workers."""
    from tests.cluster.test_contract import curve, train_by_hand
    return curve(once(tmp_path_factory, "by-hand", train_by_hand) / "runs/x")


@pytest.fixture(scope="module")
def module_trio(tmp_path_factory):
    with machines(tmp_path_factory.mktemp("machines"), 3) as them:
        yield them


@pytest.fixture
def trio(module_trio):
    """Three machines that have nothing yet."""
    yield module_trio
    for machine in module_trio.all:
        for path in [*machine.bin.iterdir(), machine.root / "var/lib/txl/lease/hold"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(machine.home / "txl", ignore_errors=True)


@pytest.fixture
def index(tmp_path):
    """A package index in a folder, with packages that hold next to nothing."""
    def make(**versions: str) -> str:
        for name, version in versions.items():
            folder, info = tmp_path / "index" / name, f"{name}-{version}.dist-info"
            folder.mkdir(parents=True)
            wheel = f"{name}-{version}-py3-none-any.whl"
            with zipfile.ZipFile(folder / wheel, "w") as archive:
                archive.writestr(f"{name}/__init__.py", f"__version__ = '{version}'\nclass cuda:\n"
                                                        f"    def is_available(): return True\n")
                archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
                archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                archive.writestr(f"{info}/RECORD", "")
            (folder / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
        return f"file://{tmp_path}/index"
    return make
