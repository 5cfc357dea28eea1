"""What a launch does on machines, on real sshds: their homes are folders of this machine, so the judge just looks."""
from __future__ import annotations

import json
import os
import re
import shutil
import stat
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import reach
from cluster.reach import BOOTING, Needs, shortcoming
from cluster.ssh import Interrupted, SomeFailed, Trouble
from tests.cluster.sshd import BARE_PYTHON, Relay, machines, needs_sshd

RSYNC = shutil.which("rsync")
NOTHING = Needs(gpus=0, efa=False, disk_gib=0, python=None)
EIGHT = Needs(gpus=8, efa=True, disk_gib=100, python="python3")
pytestmark = needs_sshd


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
def checkout(tmp_path):
    root = tmp_path / "check out"
    put(root, {".gitignore": "/data/\n/runs/\n*.log\n__pycache__/\n", "a.py": "a = 1\n", "pack/b.py": "b = 1\n",
               "pack/.gitignore": "secret\n", "pack/secret": "s", "x.log": "l", "data/corpus": "c", "runs/r/lock": "",
               "pack/__pycache__/b.pyc": "p", ".git/HEAD": "h", "it's a \"file\"\n.py": "odd", "\u00e9": "e"})
    (root / "link").symlink_to("/nowhere")
    return root


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
            for path in root.rglob("*") if path.is_symlink() or path.is_file()}


CODE_SENT = {".gitignore", "a.py", "pack/b.py", "pack/.gitignore", "it's a \"file\"\n.py", "\u00e9", "link"}
WELL = ("began 1000.0\ncloud-init 0 status: done\ngpus 8 GPU 7: A100\nefa 0 libfabric\npython 0\n"
        "disk_kib 209715200\nended 1020.0\n")


@pytest.mark.parametrize(("change", "reason"), [
    ({}, None),
    ({"cloud-init 0 status: done\n": ""}, None),
    ({"cloud-init 0": "cloud-init 2"}, None),
    ({"cloud-init 0 status: done": "cloud-init 124 ....."}, BOOTING),
    ({"cloud-init 0 status: done": "cloud-init 1 status: error detail: no network"},
     "cloud-init failed: status: error detail: no network"),
    ({"gpus 8 GPU 7: A100": "gpus 7 GPU 6: A100"}, "7 of 8 GPUs are there (nvidia-smi: GPU 6: A100)"),
    ({"gpus 8 GPU 7: A100": "gpus 0 sh: nvidia-smi: not found"},
     "0 of 8 GPUs are there (nvidia-smi: sh: nvidia-smi: not found)"),
    ({"efa 0 libfabric": "efa 61 fi_getinfo: -61 (No data available)"},
     "EFA was asked for and is not there (fi_info: fi_getinfo: -61 (No data available))"),
    ({"python 0": "python 127 sh: python3: not found"}, "python3 does not run: sh: python3: not found"),
    ({"209715200": "10485760"}, "10.0 GiB are free on its disk, needed are 100"),
    ({"1000.0": "1006.0", "1020.0": "1026.0"}, "its clock is 6 s ahead of ours"),
    ({"1000.0": "87400.0", "1020.0": "87420.0"}, "its clock is 86400 s ahead of ours"),
    ({"1000.0": "993.0", "1020.0": "1013.0"}, "its clock is 7 s behind ours"),
    ({"1000.0": "1004.0", "1020.0": "1024.0"}, None),
    ({WELL: "Please login as the user ubuntu"}, "what it answers makes no sense: Please login as the user ubuntu"),
    ({WELL: ""}, "what it answers makes no sense: nothing"),
    ({"disk_kib 209715200": "disk_kib"}, None),
])
def test_what_a_machine_lacks_is_read_from_its_answer(change, reason):
    answer = WELL
    for old, new in change.items():
        assert old in answer
        answer = answer.replace(old, new)
    found = shortcoming(answer, EIGHT, sent=999.0, received=1021.0)
    if "disk_kib\n" in answer:
        assert found.startswith("what it answers makes no sense")
    else:
        assert found == reason


def test_the_way_there_and_back_is_not_taken_for_a_wrong_clock():
    assert shortcoming(WELL, EIGHT, sent=992.0, received=1028.0) is None
    assert shortcoming(WELL, EIGHT, sent=940.0, received=1021.0) is None         # a minute until the login was served
    assert shortcoming(WELL, EIGHT, sent=999.0, received=1081.0) is None
    assert "behind" in shortcoming(WELL, EIGHT, sent=1006.0, received=1081.0)    # it began before it was asked
    assert "ahead" in shortcoming(WELL, EIGHT, sent=940.0, received=1014.0)      # it ended after it was heard


def test_machines_are_ready_when_each_of_them_is(trio):
    for machine in trio.all:
        machine.has("cloud-init", f"[ -e {machine.folder}/booted ] || {{ touch {machine.folder}/booted; exit 124; }}")
        machine.has("nvidia-smi", "for i in 0 1; do echo \"GPU $i: V100 (UUID: x)\"; done")
        machine.has("fi_info", "[ \"$*\" = '-p efa' ] && echo 'provider: efa'")
    said = []
    reach.wait_ready(trio.shells, Needs(2, True, 0.001, "python3"), deadline_s=30, say=said.append, patience_s=0)
    assert sorted(re.sub(r"\d+ s", "N s", line) for line in said) == [f"node-{i} is ready (N s)" for i in range(3)]
    assert all((machine.folder / "booted").exists() for machine in trio.all)        # it was still booting at first


def test_every_machine_that_is_not_as_needed_is_named_with_what_it_lacks(trio):
    trio[0].has("nvidia-smi", "echo 'GPU 0: V100'")
    trio[1].has("nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver *'; exit 9")
    trio[2].has("nvidia-smi", "echo 'GPU 0: V100'")
    trio[2].has("cloud-init", "echo 'status: error'; exit 1")
    with pytest.raises(SomeFailed) as caught:
        reach.wait_ready(trio.shells, Needs(1, False, 0, None), deadline_s=30, say=print, patience_s=0)
    assert str(caught.value) == (
        "2 of 3 machines: node-1: 0 of 1 GPUs are there (nvidia-smi: NVIDIA-SMI has failed: no driver *)\n"
        "  node-2: cloud-init failed: status: error")


def test_a_driver_that_is_late_is_waited_for(trio):
    trio[0].has("nvidia-smi", f"[ -e {trio[0].folder}/driver ] && echo 'GPU 0: V100' || touch {trio[0].folder}/driver")
    reach.wait_ready(trio.shells[:1], Needs(1, False, 0, None), deadline_s=30, say=print, patience_s=20)


def test_a_wrong_clock_is_found_on_a_real_machine(trio):
    with pytest.raises(SomeFailed, match=r"1 of 1 machines: node-0: its clock is 3600 s behind ours"):
        reach.wait_ready(trio.shells[:1], NOTHING, deadline_s=30, patience_s=0, clock_now=lambda: time.time() + 3600)


def test_a_machine_that_is_slow_to_start_is_waited_for_and_one_that_never_does_is_named_with_what_ssh_says(tmp_path):
    with machines(tmp_path, 3) as them:
        them[1].stop()
        them[2].stop()
        late = threading.Timer(1, them[1].start)
        late.start()
        with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-2: not ready after 3 s: ssh: connect to host "
                                             r"127\.77\.0\.3 port \d+: Connection refused$"):
            reach.wait_ready(them.shells, NOTHING, deadline_s=3)
        late.join()


def test_a_key_that_is_not_accepted_is_not_waited_for_long(tmp_path):
    with machines(tmp_path, 1) as them:
        them[0].authorized_keys.write_text("")
        with pytest.raises(SomeFailed, match="does not accept our key"):
            reach.wait_ready(them.shells, NOTHING, deadline_s=600, patience_s=1)


def test_waiting_can_be_interrupted(tmp_path):
    with machines(tmp_path, 2) as them:
        them[1].stop()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            reach.wait_ready(them.shells, NOTHING, deadline_s=600, interrupted=lambda: time.monotonic() - began > 1.5)
        assert time.monotonic() - began < 4


def test_a_hold_changes_the_lease_where_there_is_one(trio):
    leases = [machine.root / "var/lib/txl/lease" for machine in trio.all]
    shutil.rmtree(leases[1])
    reach.hold(trio.shells)
    first = (leases[0] / "hold").read_text()
    assert not leases[1].exists()
    leases[1].mkdir()
    with reach.holding(trio.shells, every_s=0.05):
        seen, deadline = {first}, time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add((leases[0] / "hold").read_text())
    assert len(seen - {""}) >= 2
    last = (leases[0] / "hold").read_text()
    time.sleep(0.3)
    assert (leases[0] / "hold").read_text() == last                   # nobody holds it any more


def test_the_code_is_on_all_machines_as_here_and_what_only_they_have_stays(trio, checkout):
    for machine in trio.all[:2]:
        put(machine.home / "txl", {"stale.py": "old", "pack/stale.py": "old", "runs/r/status.json": "{}",
                                   "data/corpus.bin": "d", "venv/bin/python": "p", "pack/__pycache__/x.pyc": "c"})
    reach.send_code(trio.shells[:2], checkout)
    kept = {"runs/r/status.json": "{}", "data/corpus.bin": "d", "venv/bin/python": "p", "pack/__pycache__/x.pyc": "c"}
    here = {name: text for name, text in contents(checkout).items() if name in CODE_SENT}
    assert len(here) == len(CODE_SENT)
    for machine in trio.all[:2]:
        assert contents(machine.home / "txl") == here | kept
    (checkout / ".gitignore").write_text("*.log\n/pack/\n")
    (checkout / "a.py").unlink()
    reach.send_code(trio.shells[:2], checkout)
    for machine in trio.all[:2]:
        there = contents(machine.home / "txl")
        assert "a.py" not in there
        assert there[".gitignore"] == "*.log\n/pack/\n"
        assert there["pack/b.py"] == "b = 1\n"                        # ignored by now: theirs


def test_node_0_has_a_key_of_its_own_and_is_let_in_once(trio, checkout):
    reach.send_code(trio.shells[:2], checkout)
    before = [machine.authorized_keys.read_text() for machine in trio.all[:2]]
    reach.send_code(trio.shells[:2], checkout)
    assert [machine.authorized_keys.read_text() for machine in trio.all[:2]] == before
    folder = trio[0].home / ".ssh/txl"
    public = (folder / "id_ed25519.pub").read_text()
    assert [text.count(public.strip()) for text in before] == [0, 1]
    assert stat.S_IMODE((folder / "id_ed25519").stat().st_mode) == 0o600
    assert not list(trio[1].home.glob(".ssh/txl"))
    assert (folder / "known_hosts").read_text().count("\n") == 1


def test_a_machine_in_the_cluster_with_another_host_key_is_not_talked_to(tmp_path, checkout):
    with machines(tmp_path, 2) as them:
        reach.hold(them.shells)                   # the laptop knows the machine; its connection outlives the new key
        them[1].restart_listener_with_new_host_key()
        with pytest.raises(SomeFailed, match=r"1 of 2 machines: node-1: node-0 could not copy to it: .*Host key"):
            reach.send_code(them.shells, checkout)
        assert not contents(them[1].home / "txl")


def test_what_leaves_the_laptop_does_not_grow_with_the_machines(trio, checkout):
    (checkout / "big.bin").write_bytes(os.urandom(400_000))
    relays = [Relay(f"127.78.0.{i + 1}", machine) for i, machine in enumerate(trio.all)]
    hosts = [replace(host, address=f"127.78.0.{i + 1}") for i, host in enumerate(trio.hosts)]
    shells = trio.shells_to(hosts)                # the others' own addresses are what node 0 is told
    try:
        reach.send_code(shells, checkout)
    finally:
        for shell, relay in zip(shells, relays):
            shell.close()
            relay.close()
        trio.shells_to(trio.hosts)
    for machine in trio.all:
        assert (machine.home / "txl/big.bin").read_bytes() == (checkout / "big.bin").read_bytes()
    assert 400_000 < relays[0].sent < 450_000
    assert relays[1].sent + relays[2].sent < 40_000


def test_code_that_changes_while_it_is_sent_is_sent_again(trio, checkout):
    edit = f"[ -e {trio[0].folder}/edited ] || {{ touch {trio[0].folder}/edited; echo 'a = 2' > '{checkout}/a.py'; }}"
    trio[0].has("rsync", f"{edit}\nexec {RSYNC} \"$@\"")
    said = []
    reach.send_code(trio.shells[:2], checkout, say=said.append)
    assert all((machine.home / "txl/a.py").read_text() == "a = 2\n" for machine in trio.all[:2])
    assert said == ["2 of 2 machines: node-0, node-1: 1 of 7 files are not as sent: 'a.py'. Sending them again"]


def test_code_that_never_stops_changing_is_refused(trio, checkout):
    trio[0].has("rsync", f"date +%N >> '{checkout}/a.py'\nexec {RSYNC} \"$@\"")
    with pytest.raises(Trouble, match=r"this machine: files in .* change while they are sent"):
        reach.send_code(trio.shells[:2], checkout, say=print)


def test_a_file_that_was_tampered_with_is_mended_though_it_looks_the_same(trio, checkout):
    reach.send_code(trio.shells[:2], checkout)
    for i in (0, 1):
        there = trio[i].home / "txl/a.py"
        was = there.stat()
        there.write_text("a = 9\n")
        os.utime(there, ns=(was.st_atime_ns, was.st_mtime_ns))
    said = []
    reach.send_code(trio.shells[:2], checkout, say=said.append)
    assert [machine.home.joinpath("txl/a.py").read_text() for machine in trio.all[:2]] == ["a = 1\n"] * 2
    assert said == ["2 of 2 machines: node-0, node-1: 1 of 7 files are not as sent: 'a.py'. Sending them again"]


def test_a_machine_whose_files_are_never_right_is_named(trio, checkout):
    trio[1].has("rsync", f"{RSYNC} \"$@\"; status=$?; echo bad > ~/txl/a.py; exit $status")
    with pytest.raises(SomeFailed, match=r"^1 of 2 machines: node-1: 1 of 7 files are not as sent: 'a.py'$"):
        reach.send_code(trio.shells[:2], checkout, say=print)


def test_a_machine_that_node_0_cannot_copy_to_is_named_with_its_reason(trio, checkout):
    trio[2].has("rsync", "echo 'write failed: No space left on device (28)' >&2; exit 11")
    with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-2: node-0 could not copy to it: .*No space left"):
        reach.send_code(trio.shells, checkout)


def test_a_copy_between_machines_that_is_cut_is_taken_up_again(trio, checkout):
    once = f"[ -e {trio[1].folder}/cut ] || {{ touch {trio[1].folder}/cut; kill $PPID; sleep 1; exit 1; }}"
    trio[1].has("rsync", f"{once}\nexec {RSYNC} \"$@\"")
    reach.send_code(trio.shells[:2], checkout)
    assert (trio[1].folder / "cut").exists()
    assert (trio[1].home / "txl/a.py").read_text() == "a = 1\n"


def test_data_reaches_all_machines_links_as_files_and_nothing_there_is_removed(trio, tmp_path):
    put(tmp_path, {"elsewhere/train.txt": "words\n", "data/valid.txt": "more\n"})
    (tmp_path / "data/train.txt").symlink_to("../elsewhere/train.txt")
    put(trio[0].home, {"txl/data/x/cache.bin": "cached"})
    reach.send(trio.shells[:2], tmp_path / "data", "txl/data/x")
    reach.send(trio.shells[:2], tmp_path / "elsewhere/train.txt", "txl/data/y z")
    for machine in trio.all[:2]:
        there = contents(machine.home / "txl/data")
        assert there == there | {"x/valid.txt": "more\n", "x/train.txt": "words\n", "y z/train.txt": "words\n"}
        assert not (machine.home / "txl/data/x/train.txt").is_symlink()
    assert (trio[0].home / "txl/data/x/cache.bin").exists()


def test_large_data_is_announced_and_compared_by_size(trio, tmp_path, monkeypatch):
    monkeypatch.setattr(reach, "HASHED_GIB", 1e-6)
    put(tmp_path, {"data/train.txt": "w" * 100_000})
    said = []
    reach.send(trio.shells[:2], tmp_path / "data", "txl/data", say=said.append)
    assert said == [f"Sending 0.0 GiB of {tmp_path}/data/ to node-0, less what is there already"]
    trio[1].has("rsync", f"{RSYNC} \"$@\"; status=$?; echo bad > ~/txl/data/train.txt; exit $status")
    with pytest.raises(SomeFailed, match="node-1: 1 of 1 files are not as sent"):
        reach.send(trio.shells[:2], tmp_path / "data", "txl/data", say=said.append)


def test_data_that_is_cut_on_the_way_goes_on_where_it_was(trio, tmp_path):
    put(tmp_path, {"data/train.txt": "words\n"})
    once = f"[ -e {trio[0].folder}/cut-data ] || {{ touch {trio[0].folder}/cut-data; kill $PPID; sleep 1; exit 1; }}"
    trio[0].has("rsync", f"{once}\nexec {RSYNC} \"$@\"")
    said = []
    reach.send(trio.shells[:1], tmp_path / "data", "txl/data", say=said.append)
    assert (trio[0].home / "txl/data/train.txt").read_text() == "words\n"
    assert len(said) == 1
    assert said[0].startswith("node-0: ")
    assert said[0].endswith("Going on where it was cut")


REQUIREMENTS = "-r other.txt\ntorch==2.13.0   # newer\nnumpy>=1.26\ntensorboard>=2\ntokenizers>=0.20,<1 # bytes\nruff\n"


def test_what_training_needs_is_a_part_of_the_requirements():
    assert reach.training_requirements(REQUIREMENTS) == ["numpy>=1.26", "tensorboard>=2", "tokenizers>=0.20,<1"]
    here = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text()
    assert [re.match(r"\w+", line)[0] for line in reach.training_requirements(here)] == list(reach.TRAINING)
    assert all(re.search("[>=]", line) for line in reach.training_requirements(here))


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
    url = index(torch="2.13.0", numpy="2.0", tensorboard="2.20", tokenizers="0.22")
    for machine in trio.all:                      # torch has an index of its own, the others come from pip's
        put(machine.home, {".config/pip/pip.conf": f"[global]\nindex-url = {url}\n"})

    def setup(torch: str = "2.13.0", skip: bool = False) -> str:
        return reach.setup(trio.shells[:2], None, torch, url, REQUIREMENTS, skip=skip, say=said.append)

    assert setup() == "venv/bin/python"
    assert said == ["Installing torch==2.13.0, numpy>=1.26, tensorboard>=2, tokenizers>=0.20,<1 on node-0: minutes",
                    "Copying it to 1 more"]
    for i in (0, 1):
        where = trio.shells[i].run("cd txl && venv/bin/python -c 'import torch; print(torch.__file__)'").out
        assert where.startswith(f"{trio[i].home}/txl/venv/")
    shutil.rmtree(url.removeprefix("file://"))
    assert setup() == setup(skip=True) == "venv/bin/python"           # nothing is asked of an index that is gone
    assert len(said) == 2
    with pytest.raises(Trouble, match=r"node-0: the installation failed: ERROR: [^$]*torch==2\.14[^$]*--skip_setup"):
        setup(torch="2.14.0")


def test_an_image_that_has_everything_is_taken_as_it_is(trio):
    for machine in trio.all:
        put(machine.home, {"txl/x": ""})
        machine.has("trained", "exit 0")
    assert reach.setup(trio.shells, "trained", "2.13.0", None, REQUIREMENTS, skip=False) == "trained"
    assert not (trio[0].home / "txl/venv").exists()


def test_an_image_that_lacks_something_is_said_when_nothing_may_be_installed(bare):
    with pytest.raises(Trouble, match="2 of 2 machines: node-0, node-1: ModuleNotFoundError: No module named 'numpy'\n"
                                      "--skip_setup takes python3 as it is"):
        reach.setup(bare.shells[:2], None, "2.13.0", None, REQUIREMENTS, skip=True)


def test_a_python_that_is_too_old_is_named_before_anything_is_installed(trio):
    put(trio[0].home, {"txl/x": ""})
    trio[0].has("python3", "echo 'ERROR: Python is 3.8, needed is 3.10' >&2; exit 1")
    with pytest.raises(Trouble, match=r"node-0: the installation failed: ERROR: Python is 3\.8, needed is 3\.10"):
        reach.setup(trio.shells[:1], None, "2.13.0", None, REQUIREMENTS, skip=False, say=print)


def test_an_installation_that_is_interrupted_ends_there_too(trio):
    put(trio[0].home, {"txl/x": ""})
    there = trio[0].folder / "installing"
    trio[0].has("python3", f"case \"$*\" in *venv*) echo $$ > {there}; exec sleep 60;; *numpy*) exit 1;; esac")
    with pytest.raises(Interrupted):
        reach.setup(trio.shells[:1], None, "2.13.0", None, REQUIREMENTS, skip=False, interrupted=there.exists)
    deadline = time.monotonic() + 10
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
