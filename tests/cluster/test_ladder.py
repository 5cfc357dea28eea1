"""The ladder, climbed by a fake clock against an EC2 that answers from a script."""
from __future__ import annotations

import random

import pytest

from cluster.ec2 import NOT_HERE, Verdict
from cluster.ladder import PATIENCE, Attempt, GiveUp, Try, Wait, history, next_move, order_zones

ZONES = ("a", "b", "c")
CODES: dict[Verdict, str] = {
    "capacity": "InsufficientInstanceCapacity", "quota": "VcpuLimitExceeded", "denied": "UnauthorizedOperation",
    "expired": "RequestExpired", "throttled": "RequestLimitExceeded", "invalid": "InvalidParameterValue",
    "duplicate": "InvalidGroup.Duplicate", "missing": "InvalidGroup.NotFound", "busy": "IncorrectState",
    "unreachable": "ReadTimeoutError"}


class Climb:
    """Goes on until something came or nothing will. `answers(market, zone, nth attempt there)` is a verdict; None:
    the machines come. A code may stand in a verdict's place."""

    def __init__(self, answers, *, spot=True, ondemand=False, wait_s=600.0, zones=ZONES, why_not="Type this."):
        self.attempts: list[Attempt] = []
        self.waits: list[float] = []
        self.tries: list[Try] = []
        self.now = 1000.0
        give_up_at = self.now + wait_s
        for _ in range(1000):
            self.end = next_move(self.attempts, spot=spot, zones=zones, now=self.now, give_up_at=give_up_at,
                                 ondemand=ondemand, why_not=why_not)
            if isinstance(self.end, GiveUp):
                return
            if isinstance(self.end, Wait):
                assert self.end.seconds > 0
                self.waits.append(self.end.seconds)
                self.now += self.end.seconds
                continue
            move = self.end
            verdict = answers(move.market, move.zone, self.path.count((move.market, move.zone)))
            self.tries.append(move)
            code = NOT_HERE if verdict == NOT_HERE else CODES.get(verdict, "")
            verdict = "capacity" if verdict == NOT_HERE else verdict
            self.attempts.append(Attempt(move.market, move.zone, verdict, code, f"said of {code}", self.now))
            if verdict is None:
                return
        raise AssertionError("it climbs for ever")

    @property
    def path(self) -> list[tuple[str, str]]:
        return [(x.market, x.zone) for x in self.tries]


def only(market, zone, *, at=0):
    """Room in one place, from the nth attempt there on."""
    return lambda m, z, n: None if (m, z) == (market, zone) and n >= at else "capacity"


def test_the_first_zone_with_room_has_it():
    climb = Climb(only("spot", "c"))
    assert climb.tries == [Try("spot", "a", 0), Try("spot", "b", 0), Try("spot", "c", 0)]
    assert climb.waits == []


def test_a_full_round_is_followed_by_ever_longer_waits():
    climb = Climb(lambda *_: "capacity")
    assert climb.waits == [15, 30, 60, 120, 120, 120, 120]        # the next would end after ten minutes
    assert [x.round for x in climb.tries] == [n for n in range(8) for _ in ZONES]
    assert climb.path[:4] == [("spot", "a"), ("spot", "b"), ("spot", "c"), ("spot", "a")]


def test_capacity_that_comes_in_the_third_round_is_taken():
    climb = Climb(only("spot", "b", at=2))
    assert climb.tries[-1] == Try("spot", "b", 2)
    assert climb.waits == [15, 30]


def test_without_fallback_it_gives_up_with_the_whole_story_and_what_to_type():
    climb = Climb(lambda *_: "capacity", wait_s=20, why_not="Add --fallback=ondemand")
    assert climb.end == GiveUp(
        "No machines to be had:\n"
        "  spot, a: InsufficientInstanceCapacity 2 times\n"
        "  spot, b: InsufficientInstanceCapacity 2 times\n"
        "  spot, c: InsufficientInstanceCapacity 2 times\n"
        "  InsufficientInstanceCapacity: said of InsufficientInstanceCapacity\n"
        "Add --fallback=ondemand")


def test_fallback_comes_after_the_wait_and_goes_round_once():
    climb = Climb(lambda *_: "capacity", ondemand=True, wait_s=20)
    assert climb.path == [("spot", zone) for zone in ZONES] * 2 + [("ondemand", zone) for zone in ZONES]
    assert isinstance(climb.end, GiveUp)
    assert "Type this" not in climb.end.reason


def test_fallback_takes_what_there_is():
    assert Climb(only("ondemand", "b"), ondemand=True, wait_s=0).path[-1] == ("ondemand", "b")


def test_without_spot_only_on_demand_is_tried_for_as_long_as_was_asked():
    climb = Climb(only("ondemand", "a", at=1), spot=False)
    assert climb.path == [("ondemand", "a"), ("ondemand", "b"), ("ondemand", "c"), ("ondemand", "a")]
    assert climb.waits == [15]


def test_a_quota_ends_its_market_in_all_zones_at_once():
    climb = Climb(lambda market, *_: "quota" if market == "spot" else "capacity", ondemand=True)
    assert climb.path[:3] == [("spot", "a"), ("ondemand", "a"), ("ondemand", "b")]
    assert climb.waits[:2] == [15, 30]            # time is left, so on-demand goes round as well


def test_a_quota_without_fallback_is_told_with_its_code():
    climb = Climb(lambda *_: "quota")
    assert climb.path == [("spot", "a")]
    assert "spot, a: VcpuLimitExceeded once" in climb.end.reason
    assert climb.end.reason.endswith("Type this.")


@pytest.mark.parametrize("verdict", ["denied", "expired", "invalid", "duplicate"])
def test_a_refusal_ends_everything_and_never_becomes_an_on_demand_bill(verdict):
    climb = Climb(lambda *_: verdict, ondemand=True)
    assert climb.path == [("spot", "a")]
    assert f"{CODES[verdict]}: said of {CODES[verdict]}" in climb.end.reason


@pytest.mark.parametrize("verdict", ["throttled", "unreachable", "missing", "busy"])
def test_no_answer_is_asked_for_again_there_with_the_same_token(verdict):
    climb = Climb(lambda market, zone, n: verdict if zone == "a" and n < 2 else only("spot", "b")(market, zone, n))
    assert climb.tries == [Try("spot", "a", 0)] * 3 + [Try("spot", "b", 0)]
    assert climb.waits == [15, 30]


@pytest.mark.parametrize("verdict", ["throttled", "unreachable"])
def test_silence_is_not_waited_out_for_ever(verdict):
    climb = Climb(lambda *_: verdict, ondemand=True, wait_s=1e9)
    assert climb.path == [("spot", "a")] * PATIENCE
    assert f"{PATIENCE} times in a row AWS did not answer" in climb.end.reason


def test_every_second_call_throttled_only_takes_longer():
    climb = Climb(lambda market, zone, n: "throttled" if n % 2 == 0 else only("spot", "c")(market, zone, n))
    assert climb.path == [("spot", zone) for zone in ("a", "a", "b", "b", "c", "c")]


def test_a_round_that_has_begun_is_not_waited_for_again_when_its_first_question_got_no_answer():
    answers = {("a", 1): "throttled", ("a", 2): "throttled", ("a", 3): None}
    climb = Climb(lambda _, zone, n: answers.get((zone, n), "capacity"))
    assert climb.waits == [15, 15, 30]            # for the round, then for the silences
    assert climb.tries[-1] == Try("spot", "a", 1)


def test_a_zone_that_does_not_offer_the_kind_is_asked_once():
    climb = Climb(lambda _, zone, n: NOT_HERE if zone == "b" else "capacity", wait_s=60)
    assert climb.path.count(("spot", "b")) == 1
    assert climb.path.count(("spot", "a")) > 1


def test_where_no_zone_offers_the_kind_nothing_is_waited_for():
    climb = Climb(lambda *_: NOT_HERE, ondemand=True)
    assert climb.path == [(market, zone) for market in ("spot", "ondemand") for zone in ZONES]
    assert climb.waits == []


def test_no_zones_at_all():
    assert Climb(lambda *_: None, zones=()).end == GiveUp("No zone offers these machines.")


@pytest.mark.parametrize("seed", range(300))
def test_whatever_ec2_answers_it_ends_in_bounded_time_and_in_order(seed):
    dice = random.Random(seed)
    odds = dice.choices([*CODES, NOT_HERE, None], [6, .1, .05, .05, 2, .05, .05, 1, 1, 2, .2, .1], k=1000)
    ondemand, wait_s = dice.random() < .5, dice.choice([0, 60, 600])
    climb = Climb(lambda *_: odds.pop(), ondemand=ondemand, wait_s=wait_s)
    markets = [x.market for x in climb.tries]
    assert markets == sorted(markets, reverse=True)               # spot, then on-demand, never back
    assert ondemand or "ondemand" not in markets
    for move, attempt in zip(climb.tries[1:], climb.attempts):    # what got no answer is asked again, unchanged
        if attempt.verdict in ("throttled", "unreachable", "missing", "busy"):
            assert (move.market, move.zone) == (attempt.market, attempt.zone)
    asked: dict = {}                                              # and one question never gets two answers
    for move, attempt in zip(climb.tries, climb.attempts):
        assert asked.get(move) in (None, "throttled", "unreachable", "missing", "busy")
        asked[move] = attempt.verdict
    # After give_up_at: at most a round that had begun, with its silences, in each market.
    silence = sum(min(15 * 2 ** n, 120) for n in range(PATIENCE))
    assert climb.now - 1000 <= wait_s + 2 * len(ZONES) * silence


def test_history_tells_every_place_every_answer_and_how_often():
    said = [("spot", "a", "capacity", "InsufficientInstanceCapacity", "no p3dn"),
            ("spot", "a", "throttled", "RequestLimitExceeded", "slow down"),
            ("spot", "a", "capacity", "InsufficientInstanceCapacity", "no p3dn"),
            ("ondemand", "b", "quota", "VcpuLimitExceeded", "0 vCPUs"), ("ondemand", "c", None, "", "")]
    assert history([Attempt(*x, at=0) for x in said]) == (
        "  spot, a: InsufficientInstanceCapacity 2 times, RequestLimitExceeded once\n"
        "  on demand, b: VcpuLimitExceeded once\n"
        "  on demand, c: machines once\n"
        "  InsufficientInstanceCapacity: no p3dn\n"
        "  RequestLimitExceeded: slow down\n"
        "  VcpuLimitExceeded: 0 vCPUs")


def test_zones_go_by_score_then_price_then_name():
    scores, prices = {"a": 3, "b": 9, "c": 9}, {"b": 9.1, "c": 9.0, "d": 1.0, "a": .5}
    assert order_zones({"e", "d", "c", "b", "a"}, scores, prices) == ("c", "b", "a", "d", "e")
    assert order_zones({"b", "a"}, {}, {}) == ("a", "b")
