"""What node 0 hands on to the others, on real sshds."""
from __future__ import annotations

import time

import pytest

from cluster import among
from cluster.ssh import Denied, Interrupted, Result, SomeFailed, TimedOut, Trouble, Unreachable
from tests.cluster.sshd import BARE_PYTHON, letting_in, machines, needs_sshd

pytestmark = needs_sshd


@pytest.fixture
def them(tmp_path):
    with machines(tmp_path, 3) as them:
        yield letting_in(them)


def test_each_gets_its_own_input_over_one_connection_from_here_and_one_to_each_from_node_0(them):
    shells = among.acquaint(them.shells)
    given = ["", "it's \u00e9\n", "\udcff" + "x" * 300_000]           # more than a pipe holds, and no UTF-8
    for _ in range(2):
        said = among.run(shells, 'echo "$node $(wc -c) $TXL_ROOT"', given)
        assert [answer.out for answer in said] == [
            f"{i} {len(text.encode('utf-8', 'surrogateescape'))} {machine.root}\n"
            for i, (text, machine) in enumerate(zip(given, them.all))]
    assert [machine.logins for machine in them.all] == [1, 1, 1]


def test_without_an_introduction_each_is_asked_from_here(them):
    assert [answer.out for answer in among.run(them.shells, "echo $node")] == ["0\n", "1\n", "2\n"]
    assert [machine.logins for machine in them.all] == [1, 1, 1]


def test_those_that_fail_hang_or_are_gone_are_named_with_the_reason_and_the_others_answer(them):
    shells = among.acquaint(them.shells)
    them[2].stop()
    began = time.monotonic()
    said = [answer.said for answer in among.ask(shells, "echo $node; [ $node = 0 ] || exec sleep 600", timeout_s=4)]
    assert time.monotonic() - began < 500         # of the 600 that it would take
    assert said[0] == Result(0, "0\n", "")
    assert isinstance(said[1], TimedOut)
    assert isinstance(said[2], Unreachable)
    with pytest.raises(SomeFailed, match=r"^2 of 3 machines: node-1: words \(status 3 of: \[ \$node = 0 \] [^\n]*\)\n"
                                         r"  node-2: node-0 cannot reach it: ssh: connect to host 127\.77\.0\.3 port"):
        among.run(shells, "[ $node = 0 ] || { echo words >&2; exit 3; }")


def test_a_machine_that_does_not_let_node_0_in_is_named(them):
    them[1].authorized_keys.write_text("")
    first, second, _ = [answer.said for answer in among.ask(among.acquaint(them.shells), "true")]
    assert first == Result(0, "", "")
    assert isinstance(second, Denied)
    assert second.name == "node-1"
    assert "node-0 cannot reach it" in second.reason


def test_where_node_0_is_gone_it_is_named(them):
    shells = among.acquaint(them.shells)
    them[0].stop()
    with pytest.raises(Trouble, match=r"^node-0: ") as caught:
        among.run(shells, "true")
    assert not isinstance(caught.value, SomeFailed)


def test_where_node_0_has_no_room_for_an_answer_that_is_said(them):
    shells = among.acquaint(them.shells)
    them[0].has("python3", f"ulimit -f 100; exec {BARE_PYTHON} \"$@\"")                # as on a full disk
    with pytest.raises(SomeFailed, match=r"^1 of 3 machines: node-1: node-0 could not ask it: OSError: .*too large"):
        among.run(shells, "true", ["", "x" * 1_000_000, ""])


def test_a_question_that_hangs_can_be_interrupted(them):
    shells, began = among.acquaint(them.shells), time.monotonic()
    with pytest.raises(Interrupted):
        among.run(shells, "sleep 600", timeout_s=700, interrupted=lambda: time.monotonic() - began > 1)
    assert time.monotonic() - began < 500         # of the 600 that it would take


def test_when_each_has_answered_is_known_although_all_answers_come_at_once(them):
    shells = among.acquaint(them.shells)
    among.run(shells, "true")                     # connected
    sent = time.time()
    answers = among.ask(shells, "[ $node != 1 ] || sleep 5; date +%s.%N")
    for said, after_s, until_s in answers:
        assert sent + after_s <= float(said.out) <= sent + until_s
    assert answers[2].until_s < answers[1].until_s - 1
