"""What a launch does on machines, on real sshds: their homes are folders of this machine, so the judge just looks."""
from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import among, deliver, reach
from cluster.ssh import Interrupted, SomeFailed, Trouble
from tests.cluster.sshd import BARE_PYTHON, contents, needs_sshd, put

REQUIREMENTS = ("-r other.txt\ntorch==2.13.0   # newer\nnumpy>=1.26\ntensorboard>=2\ntokenizers>=0.20,<1 # bytes\n"
                "fire>=0.7\n")
WANTED = reach.environment("2.13.0", None, REQUIREMENTS)
pytestmark = needs_sshd


def test_a_hold_changes_the_lease_where_there_is_one(trio):
    leases = [machine.root / "var/lib/txl/lease" for machine in trio.all]
    shutil.rmtree(leases[1])
    reach.hold(trio.shells)
    first = (leases[0] / "hold").read_text()
    assert not leases[1].exists()
    leases[1].mkdir()
    with reach.holding(trio.shells, every_s=0.05):
        seen, deadline = {first}, time.monotonic() + 120
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add((leases[0] / "hold").read_text())
    assert len(seen - {""}) >= 2
    last = (leases[0] / "hold").read_text()
    time.sleep(0.3)
    assert (leases[0] / "hold").read_text() == last                   # nobody holds it any more


def test_what_training_needs_is_a_part_of_the_requirements():
    assert reach.training_requirements(REQUIREMENTS) == ["numpy>=1.26", "tensorboard>=2", "tokenizers>=0.20,<1",
                                                         "fire>=0.7"]
    root = Path(__file__).resolve().parents[2]
    here = "".join((root / name).read_text() for name in ("requirements.txt", "requirements-launch.txt"))
    assert [re.match(r"\w+", line)[0] for line in reach.training_requirements(here)] == list(reach.TRAINING)
    assert all(re.search("[>=]", line) for line in reach.training_requirements(here))


@pytest.fixture
def bare(trio):
    """Two machines whose python3 has nothing installed, and whose pip asks no real index."""
    for machine in trio.all[:2]:
        machine.has("python3", f"exec {BARE_PYTHON} -S \"$@\"")       # -S: no site-packages, until in a venv
        put(machine.home, {"txl/x": "", ".config/pip/pip.conf": "[global]\nindex-url = file:///nonexistent\n"})
    return trio


@pytest.mark.slow
def test_the_environment_is_made_on_node_0_once_and_works_on_the_others(bare, index):
    trio, said = bare, []
    url = index(torch="2.13.0", numpy="2.0", tensorboard="2.20", tokenizers="0.22", fire="0.7")
    for machine in trio.all:                      # torch has an index of its own, the others come from pip's
        put(machine.home, {".config/pip/pip.conf": f"[global]\nindex-url = {url}\n"})

    def setup(torch: str = "2.13.0", skip: bool = False) -> str:
        wanted, shells = reach.environment(torch, url, REQUIREMENTS), trio.shells[:2]
        python = reach.provide(shells[0], wanted, skip=skip, say=said.append)
        shells = among.introduce(shells)
        deliver.spread(shells, wanted.copies(python))
        return reach.everywhere(shells, wanted, python, skip=skip, say=said.append)

    assert setup() == "venv/bin/python"
    assert said == ["Installing torch==2.13.0, numpy>=1.26, tensorboard>=2, tokenizers>=0.20,<1, fire>=0.7 on node-0: "
                    "minutes"]
    for i in (0, 1):
        where = trio.shells[i].run("cd txl && venv/bin/python -c 'import torch; print(torch.__file__)'").out
        assert where.startswith(f"{trio[i].home}/txl/venv/")
    shutil.rmtree(url.removeprefix("file://"))
    assert setup() == setup(skip=True) == "venv/bin/python"           # nothing is asked of an index that is gone
    assert len(said) == 1
    for damaged in (0, 1):                        # what is on record is looked at all the same
        shutil.rmtree(next((trio[damaged].home / "txl/venv").glob("lib/python*/site-packages/numpy")))
        if damaged:
            assert setup(skip=True) == "venv/bin/python"
        else:
            with pytest.raises(Trouble, match="No module named 'numpy'"):
                setup(skip=True)
            shutil.copytree(next((trio[1].home / "txl/venv").glob("lib/python*/site-packages/numpy")),
                            next((trio[0].home / "txl/venv").glob("lib/python*/site-packages")) / "numpy")
    with pytest.raises(Trouble, match=r"node-0: the installation failed: ERROR: [^$]*torch==2\.14[^$]*--skip_setup"):
        setup(torch="2.14.0")


def test_an_image_that_has_everything_is_taken_as_it_is(trio):
    for machine in trio.all:
        put(machine.home, {"txl/x": ""})
        machine.has("trained", "exit 0")
    wanted = replace(WANTED, image="trained")
    assert reach.provide(trio.shells[0], wanted, skip=False) == "trained"
    assert reach.everywhere(trio.shells, wanted, "trained", skip=False) == "trained"
    assert wanted.copies("trained") == []
    assert not (trio[0].home / "txl/venv").exists()


def test_an_image_that_lacks_something_is_said_when_nothing_may_be_installed(bare):
    with pytest.raises(Trouble, match="node-0: ModuleNotFoundError: No module named 'numpy'\n"
                                      "--skip_setup takes python3 as it is"):
        reach.provide(bare.shells[0], WANTED, skip=True)
    put(bare[2].home, {"txl/x": ""})
    bare[2].has("python3", "exit 0")
    with pytest.raises(Trouble, match="1 of 2 machines: node-1: ModuleNotFoundError: No module named 'numpy'\n"
                                      "--skip_setup takes python3 as it is"):
        reach.everywhere([bare.shells[2], bare.shells[1], bare.shells[2]], WANTED, "python3", skip=True)


def test_a_python_that_is_too_old_is_named_before_anything_is_installed(trio):
    put(trio[0].home, {"txl/x": ""})
    trio[0].has("python3", "echo 'ERROR: Python is 3.8, needed is 3.10' >&2; exit 1")
    with pytest.raises(Trouble, match=r"node-0: the installation failed: ERROR: Python is 3\.8, needed is 3\.10"):
        reach.provide(trio.shells[0], WANTED, skip=False)


def test_an_installation_that_is_interrupted_ends_there_too(trio):
    put(trio[0].home, {"txl/x": ""})
    there = trio[0].folder / "installing"
    trio[0].has("python3", f"case \"$*\" in *venv*) echo $$ > {there}; exec sleep 60;; *numpy*) exit 1;; esac")
    with pytest.raises(Interrupted):
        reach.provide(trio.shells[0], WANTED, skip=False, interrupted=there.exists)
    deadline = time.monotonic() + 120
    while Path(f"/proc/{there.read_text().strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


SUPERVISOR = """
import json, os, sys
folder, i = sys.argv[2:]
launch = json.load(open(f"{folder}/nodes/{i}.launch.json"))
json.dump([sys.argv[1:], launch, oct(os.stat(f"{folder}/nodes/{i}.launch.json").st_mode),
           os.path.exists(f"{folder}/nodes/{i}.kill")], open("started", "w"))
sys.exit(launch.get("status", 0))
"""


def test_each_machine_gets_its_launch_for_itself_alone_and_its_supervisor_starts(trio):
    launches = [{"launch": "L", "env": {"SECRET": "it's \u00e9"}, "command": ["a b", str(i)]} for i in range(3)]
    for i, machine in enumerate(trio.all):
        put(machine.home / "txl", {"cluster/host/supervisor.py": SUPERVISOR, f"runs/x/nodes/{i}.kill": ""})
    reach.start(trio.shells, "runs/x", launches, {"runs/x/recipe.json": "{}\n"})
    for i, machine in enumerate(trio.all):
        assert json.loads((machine.home / "txl/started").read_text()) == [
            ["--detach", "runs/x", str(i)], launches[i], "0o100600", False]
        assert (machine.home / "txl/runs/x/recipe.json").read_text() == "{}\n"
    assert "SECRET" not in "".join(machine.log for machine in trio.all)


def test_no_supervisor_starts_where_one_machine_does_not_get_its_launch(trio):
    for machine in trio.all:
        put(machine.home / "txl", {"cluster/host/supervisor.py": SUPERVISOR})
    put(trio[1].home / "txl", {"runs": "a file in the way"})
    with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-1: .*NotADirectoryError"):
        reach.start(trio.shells, "runs/x", [{"launch": "L"}] * 3)
    assert not any((machine.home / "txl/started").exists() for machine in trio.all)


def test_a_run_comes_back_without_what_is_the_launchers_and_models_only_when_asked_for(trio, tmp_path):
    theirs = {"logs/rank-0.log": "step 1\n", "status.json": "{}", "checkpoints/step-1/meta.json": "{}",
              "tensorboard/events": "e", "nodes/0.json": "{}"}
    models = {"checkpoints/step-1/model.pt": "m", "checkpoints/step-1/rank-0.pt": "r"}
    ours = {"lock": "", "stop": "", "recipe.json": "R", "plan.txt": "P", "command.txt": "C", "commit.txt": "D",
            "nodes/0.launch.json": "secret", "nodes/0.lock": "", "nodes/0.kill": "", ".status.json.partial": "half"}
    put(trio[0].home / "txl/runs/x", theirs | models | ours)
    put(tmp_path, {"x/recipe.json": "mine"})
    reach.fetch(trio.shells[0], "txl/runs/x", tmp_path / "x")
    assert contents(tmp_path / "x") == theirs | {"recipe.json": "mine"}
    put(trio[0].home / "txl/runs/x", {"logs/rank-0.log": "step 1\nstep 2\n"})
    reach.fetch(trio.shells[0], "txl/runs/x", tmp_path / "x", models=True)
    assert contents(tmp_path / "x") == theirs | models | {"recipe.json": "mine", "logs/rank-0.log": "step 1\nstep 2\n"}
