"""Which market and zone to ask next for machines, from what was answered so far. Pure: no clock, no cloud.

Spot in all zones, best first; no capacity anywhere: wait, and round again, until `give_up_at`. Then on-demand, where it
is allowed, in all zones. A quota ends its market at once, a refusal of the request or of whoever asks ends everything.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.ec2 import ADVICE, NOT_HERE, Market, Verdict

BACKOFF_S, BACKOFF_MAX_S = 15, 120                # before the second round; doubled before each one after
PATIENCE = 6                                      # times in a row that AWS may give no answer to the same question
AGAIN: tuple[Verdict, ...] = ("throttled", "unreachable", "missing", "busy")     # no answer to what was asked
HOPELESS: tuple[Verdict, ...] = ("denied", "expired", "invalid", "duplicate")    # anywhere else it would be the same
NAMES: dict[Market, str] = {"spot": "spot", "ondemand": "on demand"}


@dataclass(frozen=True)
class Attempt:
    market: Market
    zone: str
    verdict: Verdict | None                       # None: the machines came
    code: str                                     # EC2's
    said: str
    at: float                                     # when the answer came


@dataclass(frozen=True)
class Try:
    market: Market
    zone: str
    round: int                                    # the same for as long as nothing was answered: so is its ClientToken


@dataclass(frozen=True)
class Wait:
    seconds: float


@dataclass(frozen=True)
class GiveUp:
    reason: str


def next_move(attempts: Sequence[Attempt], *, spot: bool, zones: tuple[str, ...], now: float, give_up_at: float,
              ondemand: bool, why_not: str) -> Try | Wait | GiveUp:
    """What to do after `attempts`, none of which succeeded, oldest first. `zones`: best first.

    `spot` is tried first where it is asked for, `ondemand` says whether on-demand may follow, and `why_not` why it may
    not and what to type. When it gives up after no answer to a launch, machines may still have come: sweep.
    """
    if not zones:
        return GiveUp("No zone offers these machines.")
    last = attempts[-1] if attempts else None
    if last and last.verdict in HOPELESS:
        return GiveUp("\n".join([f"EC2 refused the launch, and would anywhere: {last.code}: {last.said}",
                                 *([ADVICE[last.verdict]] if last.verdict in ADVICE else [])]))
    if last and last.verdict in AGAIN:
        unanswered = _unanswered(attempts)
        if unanswered >= PATIENCE:
            return GiveUp(f"{unanswered} times in a row AWS did not answer a launch, the last time with\n"
                          f"{last.code}: {last.said}")
        if (wait := last.at + _backoff(unanswered) - now) > 0:
            return Wait(wait)
    markets: tuple[tuple[Market, bool], ...] = (("spot", spot), ("ondemand", ondemand or not spot))
    for market in (market for market, allowed in markets if allowed):
        move = _move_in(market, [x for x in attempts if x.market == market], zones, now, give_up_at)
        if move is not None:
            return move
    return GiveUp("\n".join(["No machines to be had:", history(attempts)] + [why_not] * (spot and not ondemand)))


def history(attempts: Sequence[Attempt]) -> str:
    """What was answered where and how often, and what EC2 said with each code."""
    places: dict[tuple[Market, str], Counter[str]] = {}
    for x in attempts:
        places.setdefault((x.market, x.zone), Counter())[x.code if x.verdict else "machines"] += 1
    lines = [f"  {NAMES[market]}, {zone}: " + ", ".join(f"{code} {_times(n)}" for code, n in codes.items())
             for (market, zone), codes in places.items()]
    said = {x.code: x.said for x in attempts if x.verdict}
    return "\n".join(lines + [f"  {code}: {text}" for code, text in said.items()])


def order_zones(zones: set[str], scores: Mapping[str, int], prices: Mapping[str, float]) -> tuple[str, ...]:
    """Where a gang most likely stays whole first; then the cheaper; then by name."""
    return tuple(sorted(zones, key=lambda zone: (-scores.get(zone, 0), prices.get(zone, math.inf), zone)))


def _move_in(market: Market, attempts: list[Attempt], zones: tuple[str, ...], now: float,
             give_up_at: float) -> Try | Wait | None:
    """None: nothing more to be had in this market."""
    if any(x.verdict == "quota" for x in attempts):
        return None                               # counted over the region: no other zone has more of it
    never = {x.zone for x in attempts if x.code == NOT_HERE}
    open_zones = [zone for zone in zones if zone not in never]
    if not open_zones:
        return None
    full = [x for x in attempts if x.verdict == "capacity" and x.zone in open_zones]
    rounds = Counter(x.zone for x in full)
    zone = min(open_zones, key=lambda zone: rounds[zone])         # the first of those asked least
    begun, done = max(rounds.values(), default=0), rounds[zone]
    if done and done == begun and not _mid_question(attempts):    # every zone was asked as often: a new round
        begins = full[-1].at + _backoff(done)
        if begins >= give_up_at:
            return None
        if begins > now:
            return Wait(begins - now)
    return Try(market, zone, done)


def _mid_question(attempts: list[Attempt]) -> bool:
    """Whether the last question is still to be answered: its round has begun."""
    return attempts[-1].verdict in AGAIN


def _unanswered(attempts: Sequence[Attempt]) -> int:
    return next((n for n, x in enumerate(reversed(attempts)) if x.verdict not in AGAIN), len(attempts))


def _backoff(times: int) -> float:
    return min(BACKOFF_S * 2 ** (times - 1), BACKOFF_MAX_S)


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
