"""Commands and copies over real connections, to sshds on loopback."""
from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import ssh
from cluster.run import Refused
from cluster.ssh import Denied, Failed, Host, Interrupted, Shell, SomeFailed, TimedOut, Trouble, Unreachable, WrongHost
from tests.cluster.sshd import machines, needs_sshd
from tests.disks import small_disk
from tests.waiting import alive, until

CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = needs_sshd


@pytest.fixture
def one(tmp_path):
    with machines(tmp_path, 1) as them:
        yield them


def pid_in(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text().endswith("\n") and path.read_text()))


def test_the_second_command_shares_the_connection_of_the_first(one):
    shell = one.shells[0]
    assert shell.run("echo hello; pwd") == (0, f"hello\n{one[0].home}\n", "")
    shell.run("true")
    shell.put(CHECKOUT / "pyproject.toml", "x")
    assert one[0].logins == 1
    shell.close()
    shell.run("true")
    assert one[0].logins == 2


def test_a_command_gets_its_input_and_returns_both_outputs_and_its_status(trio):
    text = "a 'b' \"c\" $HOME \\ \u00e9\n"
    assert trio.shells[0].run("cat; echo no >&2; exit 3", input=text, check=False) == (3, text, "no\n")
    with pytest.raises(Failed, match=r"^node-0: no luck \(status 3 of: echo no luck >&2; exit 3\)$") as caught:
        trio.shells[0].run("echo no luck >&2; exit 3")
    assert caught.value.status == 3


def test_a_command_that_reads_its_input_finds_the_end_of_it(trio):
    assert trio.shells[0].run("cat", timeout_s=120).out == ""
    assert trio.shells[0].run("cat", timeout_s=120, tied=True).out == ""


def test_a_tied_command_returns_what_it_would_untied(trio):
    said = trio.shells[0].run("echo 'it is'; echo no >&2; false || exit 5", tied=True, check=False)
    assert said == (5, "it is\n", "no\n")


@pytest.mark.parametrize("ending", ["deadline", "interrupted", "killed"])
def test_a_tied_command_ends_there_with_whoever_asked_for_it_here(trio, tmp_path, ending):
    there, began = tmp_path / "pid", time.monotonic()
    command = f"(sleep 600 & echo $! > {there}; wait)"
    if ending == "deadline":
        for timeout_s in (1, 10, 100):            # on a busy machine it may not have begun by then
            with pytest.raises(TimedOut, match=rf"no end after {timeout_s} s of: \(sleep 600"):
                trio.shells[0].run(command, timeout_s=timeout_s, tied=True)
            if there.exists():
                break
    elif ending == "interrupted":
        with pytest.raises(Interrupted):
            trio.shells[0].run(command, tied=True, interrupted=there.exists)
    else:
        script = (f"import sys; from pathlib import Path; from cluster.ssh import Shell\n"
                  f"Shell(Path(sys.argv[1]), 'node-0').run({command!r}, tied=True)")
        with subprocess.Popen([sys.executable, "-c", script, trio.shells[0].config], cwd=CHECKOUT) as launcher:
            pid_in(there)
            launcher.kill()
    pid = pid_in(there)
    until(lambda: not alive(pid))
    assert time.monotonic() - began < 500         # of the 600 that it would take
    assert trio.shells[0].run("echo still here").out == "still here\n"


def test_ctrl_c_at_the_terminal_reaches_the_launcher_and_not_its_commands(trio, tmp_path):
    runs, go = tmp_path / "runs", tmp_path / "go"
    script = ("import signal, sys; from pathlib import Path; from cluster.ssh import Shell\n"
              "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
              "print(Shell(Path(sys.argv[1]), 'node-0').run(sys.argv[2]).out)")
    command = f"touch {runs}; until [ -e {go} ]; do sleep .05; done; echo done"
    with subprocess.Popen([sys.executable, "-c", script, trio.shells[0].config, command], cwd=CHECKOUT, text=True,
                          stdout=subprocess.PIPE, start_new_session=True) as launcher:
        until(runs.exists)
        os.killpg(launcher.pid, signal.SIGINT)    # what a terminal does
        assert launcher.stdout.readline() == "heard\n"
        go.touch()
        assert launcher.communicate(timeout=120)[0].split() == ["done"]


def test_a_machine_that_goes_away_under_a_command_is_unreachable(one, tmp_path):
    ended = threading.Thread(target=lambda: (pid_in(tmp_path / "pid"), one[0].stop()))
    ended.start()
    with pytest.raises(Unreachable):
        one.shells[0].run(f"echo $$ > {tmp_path}/pid; sleep 60")
    ended.join()
    with pytest.raises(Unreachable, match=r"node-0: ssh: connect to host 127\.77\.0\.1 port .* refused"):
        one.shells[0].run("true")


def test_a_machine_that_takes_connections_and_says_nothing_is_unreachable(tmp_path):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        config = ssh.write_config(tmp_path, [Host(0, "127.0.0.1", "127.0.0.1", "i-0")], user="x",
                                  key=ssh.key(tmp_path), port=deaf.getsockname()[1])
        assert "ConnectTimeout 10\n" in config.read_text()
        with pytest.raises(TimedOut, match="node-0: no end after 1 s of: true"):
            Shell(config, "node-0").run("true", timeout_s=1)
        config.write_text(config.read_text().replace("ConnectTimeout 10", "ConnectTimeout 1"))
        with pytest.raises(Unreachable, match="timed out"):
            Shell(config, "node-0").run("true")


def test_another_host_key_at_the_same_address_is_refused_and_explained(one):
    one.shells[0].run("true")
    one.shells[0].close()
    one[0].stop()
    one[0].new_host_key()
    one[0].start()
    for call in (lambda: one.shells[0].run("true"), lambda: one.shells[0].put(CHECKOUT / "Makefile", "x")):
        with pytest.raises(WrongHost, match=r"another machine answers .* line 1 of .*known_hosts"):
            call()
    one.shells_to([replace(one.hosts[0], alias="i-another")])[0].run("true")   # a new machine at an address used before


def test_a_key_that_is_not_accepted_is_told_from_a_machine_that_is_not_there(one):
    one[0].authorized_keys.write_text("")
    for call in (lambda: one.shells[0].run("true"), lambda: one.shells[0].get("x", one.folder / "x")):
        with pytest.raises(Denied, match=r"does not accept our key: .*Permission denied \(publickey\).*--ssh_user"):
            call()


def test_of_many_machines_every_one_that_failed_is_named_and_equal_reasons_once(trio):
    assert ssh.each(trio.shells, lambda shell: shell.run("echo $HOME").out.strip(), name=lambda shell: shell.name) == [
        str(machine.home) for machine in trio.all]
    trio[1].has("thing", "echo broken >&2; exit 1")
    with pytest.raises(SomeFailed) as caught:
        ssh.each(trio.shells, lambda shell: shell.run("thing"), name=lambda shell: shell.name)
    assert re.sub(r"\S*: \d+: |sh: ", "", str(caught.value)) == (
        "3 of 3 machines: node-0, node-2: thing: not found (status 127 of: thing)\n"
        "  node-1: broken (status 1 of: thing)")
    assert set(caught.value.errors) == {"node-0", "node-1", "node-2"}


def test_each_waits_for_all_and_lets_an_error_that_is_no_machines_through():
    done = []

    def work(i: int) -> int:
        if i == 0:
            raise Trouble("zero", "failed")
        if i == 1:
            raise ZeroDivisionError
        time.sleep(0.2)
        done.append(i)
        return i

    with pytest.raises(SomeFailed, match="1 of 2 machines: zero: failed"):
        ssh.each([0, 2], work, name=lambda i: "zero")
    with pytest.raises(ZeroDivisionError):
        ssh.each([0, 1, 2], work, name=str)
    assert done == [2, 2]
    assert ssh.each([], work, name=str) == []


def test_a_machine_without_an_address_of_its_own_is_reached_through_node_0(tmp_path):
    with machines(tmp_path, 2) as two:
        shells = two.shells_to([two.hosts[0], replace(two.hosts[1], address="192.0.2.1", jump=True)])
        assert shells[1].run("echo $HOME").out == f"{two[1].home}\n"
        shells[1].put(CHECKOUT / "Makefile", "x")
        assert [machine.logins for machine in two.all] == [1, 1]


def test_a_copy_that_was_cut_goes_on_where_it_was(one, tmp_path):
    big, there = tmp_path / "big", one[0].home / "in"
    big.write_bytes(os.urandom(12_000_000))
    there.mkdir()
    arrived = threading.Thread(target=lambda: (
        until(lambda: any(path.stat().st_size > 1_000_000 for path in there.glob(".big.*"))), one[0].cut()))
    arrived.start()
    with pytest.raises(Unreachable):
        one.shells[0].put(big, "in/", "--bwlimit=1000")
    arrived.join()
    until(lambda: (there / ".rsync-part/big").exists())
    stats = one.shells[0].put(big, "in/", "--stats")
    literal = int(re.search(r"Literal data: ([\d,]+)", stats)[1].replace(",", ""))
    assert 0 < literal < 11_500_000
    assert (there / "big").read_bytes() == big.read_bytes()


def test_an_interrupted_copy_ends_at_once(one, tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(5_000_000))
    began = time.monotonic()
    with pytest.raises(Interrupted):
        one.shells[0].put(tmp_path / "big", "big", "--bwlimit=100", interrupted=lambda: time.monotonic() - began > 0.5)
    assert time.monotonic() - began < 40          # of the 50 that it would take


def test_an_interrupted_copy_from_there_keeps_what_has_come_and_leaves_nothing_else(one, tmp_path):
    (one[0].home / "big").write_bytes(os.urandom(3_000_000))
    here = tmp_path / "here"
    here.mkdir()
    with pytest.raises(Interrupted):
        one.shells[0].get("big", here, "--bwlimit=2000",
                          interrupted=lambda: any(path.stat().st_size > 1_000_000 for path in here.glob(".big.*")))
    until(lambda: [path.name for path in here.iterdir()] == [".rsync-part"], 10)
    stats = one.shells[0].get("big", here, "--stats")
    assert 0 < int(re.search(r"Literal data: ([\d,]+)", stats)[1].replace(",", "")) < 2_500_000
    assert (here / "big").read_bytes() == (one[0].home / "big").read_bytes()


def test_names_go_both_ways_as_they_are(trio, tmp_path):
    names = {"a b", "it's", 'a "b"', "a\nb", "$HOME", "-n", "x:y", "*", "\u00e9"}
    (tmp_path / "here").mkdir()
    for name in names:
        (tmp_path / "here" / name).write_text(name)
    trio.shells[0].put(f"{tmp_path}/here/", "a 'folder' of $HOME/")
    assert {path.name for path in (trio[0].home / "a 'folder' of $HOME").iterdir()} == names
    trio.shells[0].get("a 'folder' of $HOME/", tmp_path / "back")
    assert {path.name: path.read_text() for path in (tmp_path / "back").iterdir()} == {name: name for name in names}


def test_a_full_disk_there_is_said(trio, tmp_path):
    small = trio[0].home / "small"
    with small_disk(small, "size=1m"):
        (tmp_path / "big").write_bytes(os.urandom(3_000_000))
        with pytest.raises(Failed, match=r"node-0: .*No space left on device.*\(rsync 11\)"):
            trio.shells[0].put(tmp_path / "big", "small/")
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        with pytest.raises(Failed, match=r"node-0: .*Read-only file system"):
            trio.shells[0].put(CHECKOUT / "Makefile", "small/")


def test_a_tunnel_is_open_when_it_is_returned_and_gone_with_its_handle(trio):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as free:
        port, local = server.getsockname()[1], free.getsockname()[1]
        with pytest.raises(Unreachable, match="Could not request local forwarding"):
            ssh.forward(trio.shells[0].config, "node-0", local, port)
        free.close()
        tunnel = ssh.forward(trio.shells[0].config, "node-0", local, port)
        try:
            with socket.create_connection(("127.0.0.1", local), timeout=10) as client:
                client.sendall(b"hello")
                there, _ = server.accept()
                assert there.recv(5) == b"hello"
                there.close()
        finally:
            tunnel.terminate()
            tunnel.communicate()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", local), timeout=10)


def test_a_person_gets_the_arguments_as_typed_and_the_status(trio, capfd):
    assert ssh.interactive(trio.shells[0].config, "node-0", ["sh", "-c", 'echo "$1"; exit 7', "sh", "a  'b'"]) == 7
    assert capfd.readouterr().out == "a  'b'\n"


def test_two_launchers_at_once_make_one_key(tmp_path):
    script = "import pathlib, sys; from cluster import ssh; print(ssh.key(pathlib.Path(sys.argv[1])).read_text())"
    both = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "home"], cwd=CHECKOUT, text=True,
                             stdout=subprocess.PIPE) for _ in range(2)]
    keys = {process.communicate(timeout=120)[0] for process in both}
    assert len(keys) == 1
    key = ssh.key(tmp_path / "home")
    assert {key.read_text() + "\n"} == keys
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    public = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True).stdout
    assert key.with_suffix(".pub").read_text().split()[:2] == public.split()[:2]


def test_the_config_is_ones_own_and_its_sockets_have_short_names_wherever_it_is(tmp_path, monkeypatch):
    folder = tmp_path / ("long " * 20) / "x"
    monkeypatch.setenv("TMPDIR", str(folder))
    hosts = [Host(0, "192.0.2.1", "10.0.0.1", "i-0"), Host(1, "192.0.2.1", "10.0.0.1", "i-1"),
             Host(2, "", "10.0.0.2", "i-2", jump=True)]
    config = ssh.write_config(folder, hosts, user="me", key=tmp_path / "100% {mine}", port=None)
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["ssh_config"]
    options = [dict(line.split(" ", 1) for line in subprocess.run(
        ["ssh", "-G", "-F", config, f"node-{i}"], capture_output=True, text=True, check=True).stdout.splitlines())
        for i in range(3)]
    assert [option["hostname"] for option in options] == ["192.0.2.1", "192.0.2.1", "10.0.0.2"]
    assert ["-W [%h]:%p node-0" in option.get("proxycommand", "").replace("'", "") for option in options] == [
        False, False, True]
    assert {option["forwardagent"] for option in options} == {"no"}
    assert options[0]["port"] == "22"
    sockets = [option["controlpath"] for option in options]
    assert len(set(sockets)) == 3                 # two machines that have had the same address do not share one
    assert max(map(len, sockets)) + len(".0123456789abcdef") < 104       # macOS; 108 on Linux
    folder = Path(sockets[0]).parent
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (os.getuid(), 0o700)


@pytest.mark.parametrize("what", ["a link", "open to others"])
def test_a_folder_for_sockets_that_another_could_use_is_refused(tmp_path, monkeypatch, what):
    uid = 4_000_000_000 + os.getpid()             # nobody's
    monkeypatch.setattr(os, "getuid", lambda: uid)
    folder = Path(f"/tmp/txl-{uid}")
    if what == "a link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        if os.geteuid() == 0:                     # else it is another's as well
            os.chown(folder, uid, -1)
        folder.chmod(0o777)
    try:
        with pytest.raises(Refused, match=f"{folder} must be a folder of yours alone"):
            ssh.write_config(tmp_path, [], user="x", key=tmp_path / "key", port=None)
    finally:
        folder.unlink() if folder.is_symlink() else folder.rmdir()


@pytest.mark.parametrize("name", ["a${HOME}", "a\nb"])
def test_a_path_that_ssh_config_cannot_hold_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(Refused, match="ssh_config cannot hold"):
        ssh.write_config(tmp_path / "x", [], user="me", key=tmp_path / name, port=None)
    assert not (tmp_path / "x/ssh_config").exists()
