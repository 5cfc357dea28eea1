"""Files on their way to machines, which are real sshds: their homes are folders of this machine, so the judge looks."""
from __future__ import annotations

import os
import shutil
import stat
from dataclasses import replace

import pytest

from cluster import deliver, reach
from cluster.ssh import SomeFailed, Trouble
from tests.cluster.sshd import Relay, contents, machines, needs_sshd, put

RSYNC = shutil.which("rsync")
pytestmark = needs_sshd


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "check out"
    put(root, {".gitignore": "/data/\n/runs/\n*.log\n__pycache__/\n", "a.py": "a = 1\n", "pack/b.py": "b = 1\n",
               "pack/.gitignore": "secret\n", "pack/secret": "s", "x.log": "l", "data/corpus": "c", "runs/r/lock": "",
               "pack/__pycache__/b.pyc": "p", ".git/HEAD": "h", "it's a \"file\"\n.py": "odd", "\u00e9": "e"})
    (root / "link").symlink_to("/nowhere")
    return root


CODE_SENT = {".gitignore", "a.py", "pack/b.py", "pack/.gitignore", "it's a \"file\"\n.py", "\u00e9", "link"}


def test_the_code_is_on_all_machines_as_here_and_what_only_they_have_stays(trio, checkout):
    for machine in trio.all[:2]:
        put(machine.home / "txl", {"stale.py": "old", "pack/stale.py": "old", "runs/r/status.json": "{}",
                                   "data/corpus.bin": "d", "venv/bin/python": "p", "pack/__pycache__/x.pyc": "c"})
    deliver.bring(trio.shells[:2], [deliver.code(checkout)])
    kept = {"runs/r/status.json": "{}", "data/corpus.bin": "d", "venv/bin/python": "p", "pack/__pycache__/x.pyc": "c"}
    here = {name: text for name, text in contents(checkout).items() if name in CODE_SENT}
    assert len(here) == len(CODE_SENT)
    for machine in trio.all[:2]:
        assert contents(machine.home / "txl") == here | kept
    (checkout / ".gitignore").write_text("*.log\n/pack/\n")
    (checkout / "a.py").unlink()
    deliver.bring(trio.shells[:2], [deliver.code(checkout)])
    for machine in trio.all[:2]:
        there = contents(machine.home / "txl")
        assert "a.py" not in there
        assert there[".gitignore"] == "*.log\n/pack/\n"
        assert there["pack/b.py"] == "b = 1\n"                        # ignored by now: theirs


def test_node_0_has_a_key_of_its_own_and_is_let_in_once(trio, checkout):
    deliver.bring(trio.shells[:2], [deliver.code(checkout)])
    before = [machine.authorized_keys.read_text() for machine in trio.all[:2]]
    deliver.bring(trio.shells[:2], [deliver.code(checkout)])
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
            deliver.bring(them.shells, [deliver.code(checkout)])
        assert not contents(them[1].home / "txl")


def test_what_leaves_the_laptop_does_not_grow_with_the_machines(trio, checkout):
    (checkout / "big.bin").write_bytes(os.urandom(400_000))
    relays = [Relay(f"127.78.0.{i + 1}", machine) for i, machine in enumerate(trio.all)]
    hosts = [replace(host, address=f"127.78.0.{i + 1}") for i, host in enumerate(trio.hosts)]
    shells = trio.shells_to(hosts)                # the others' own addresses are what node 0 is told
    try:
        deliver.bring(shells, [deliver.code(checkout)])
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
    deliver.bring(trio.shells[:2], [deliver.code(checkout)], say=said.append)
    assert all((machine.home / "txl/a.py").read_text() == "a = 2\n" for machine in trio.all[:2])
    assert said == ["2 of 2 machines: node-0, node-1: 1 of 7 files are not as sent: 'a.py'. Sending them again"]


def test_code_that_never_stops_changing_is_refused(trio, checkout):
    trio[0].has("rsync", f"date +%N >> '{checkout}/a.py'\nexec {RSYNC} \"$@\"")
    with pytest.raises(Trouble, match=r"this machine: files in .* change while they are sent"):
        deliver.bring(trio.shells[:2], [deliver.code(checkout)], say=print)


def test_a_file_that_was_tampered_with_is_mended_though_it_looks_the_same(trio, checkout):
    deliver.bring(trio.shells[:2], [deliver.code(checkout)])
    for i in (0, 1):
        there = trio[i].home / "txl/a.py"
        was = there.stat()
        there.write_text("a = 9\n")
        os.utime(there, ns=(was.st_atime_ns, was.st_mtime_ns))
    said = []
    deliver.bring(trio.shells[:2], [deliver.code(checkout)], say=said.append)
    assert [machine.home.joinpath("txl/a.py").read_text() for machine in trio.all[:2]] == ["a = 1\n"] * 2
    assert said == ["2 of 2 machines: node-0, node-1: 1 of 7 files are not as sent: 'a.py'. Sending them again"]


def test_a_machine_whose_files_are_never_right_is_named(trio, checkout):
    trio[1].has("rsync", f"{RSYNC} \"$@\"; status=$?; echo bad > ~/txl/a.py; exit $status")
    with pytest.raises(SomeFailed, match=r"^1 of 2 machines: node-1: 1 of 7 files are not as sent: 'a.py'$"):
        deliver.bring(trio.shells[:2], [deliver.code(checkout)], say=print)


def test_a_machine_that_node_0_cannot_copy_to_is_named_with_its_reason(trio, checkout):
    trio[2].has("rsync", "echo 'write failed: No space left on device (28)' >&2; exit 11")
    with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-2: node-0 could not copy to it: .*No space left"):
        deliver.bring(trio.shells, [deliver.code(checkout)])


def test_a_copy_between_machines_that_is_cut_is_taken_up_again(trio, checkout):
    once = f"[ -e {trio[1].folder}/cut ] || {{ touch {trio[1].folder}/cut; kill $PPID; sleep 1; exit 1; }}"
    trio[1].has("rsync", f"{once}\nexec {RSYNC} \"$@\"")
    deliver.bring(trio.shells[:2], [deliver.code(checkout)])
    assert (trio[1].folder / "cut").exists()
    assert (trio[1].home / "txl/a.py").read_text() == "a = 1\n"


def test_data_reaches_all_machines_links_as_files_and_nothing_there_is_removed(trio, tmp_path):
    put(tmp_path, {"elsewhere/train.txt": "words\n", "data/valid.txt": "more\n"})
    (tmp_path / "data/train.txt").symlink_to("../elsewhere/train.txt")
    put(trio[0].home, {"txl/data/x/cache.bin": "cached"})
    deliver.bring(trio.shells[:2], [deliver.goods(tmp_path / "data", "txl/data/x")])
    deliver.bring(trio.shells[:2], [deliver.goods(tmp_path / "elsewhere/train.txt", "txl/data/y z")])
    for machine in trio.all[:2]:
        there = contents(machine.home / "txl/data")
        assert there == there | {"x/valid.txt": "more\n", "x/train.txt": "words\n", "y z/train.txt": "words\n"}
        assert not (machine.home / "txl/data/x/train.txt").is_symlink()
    assert (trio[0].home / "txl/data/x/cache.bin").exists()


def test_large_data_is_announced_and_compared_by_size(trio, tmp_path, monkeypatch):
    monkeypatch.setattr(deliver, "HASHED_GIB", 1e-6)
    put(tmp_path, {"data/train.txt": "w" * 100_000})
    said = []
    deliver.bring(trio.shells[:2], [deliver.goods(tmp_path / "data", "txl/data")], say=said.append)
    assert said == [f"Sending 0.0 GiB of {tmp_path}/data/ to node-0, less what is there already"]
    trio[1].has("rsync", f"{RSYNC} \"$@\"; status=$?; echo bad > ~/txl/data/train.txt; exit $status")
    with pytest.raises(SomeFailed, match="node-1: 1 of 1 files are not as sent"):
        deliver.bring(trio.shells[:2], [deliver.goods(tmp_path / "data", "txl/data")], say=said.append)


def test_data_that_is_cut_on_the_way_goes_on_where_it_was(trio, tmp_path):
    put(tmp_path, {"data/train.txt": "words\n"})
    once = f"[ -e {trio[0].folder}/cut-data ] || {{ touch {trio[0].folder}/cut-data; kill $PPID; sleep 1; exit 1; }}"
    trio[0].has("rsync", f"{once}\nexec {RSYNC} \"$@\"")
    said = []
    deliver.bring(trio.shells[:1], [deliver.goods(tmp_path / "data", "txl/data")], say=said.append)
    assert (trio[0].home / "txl/data/train.txt").read_text() == "words\n"
    assert len(said) == 1
    assert said[0].startswith("node-0: ")
    assert said[0].endswith("Going on where it was cut")
