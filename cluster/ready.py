"""Whether a machine that was started is fit for work: it answers, has booted, and has what it should."""
from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster import among
from cluster.ssh import Interrupted, Result, Shell, SomeFailed, TimedOut, Trouble, Unreachable, never

PATIENCE_S = 60                                   # for what is wrong with a machine that has booted, as it may settle
CLOCK_S = 5                                       # between a machine's clock and ours
LOOK_S = 180                                      # for one answer, of which cloud-init and drivers take their part
BOOTING, SILENT = "cloud-init is still at work", "it does not answer"
PROBE = """
set -f
PATH=$PATH:/opt/amazon/efa/bin
echo "began $(date +%s.%N)"
if command -v cloud-init > /dev/null; then
    words=$(timeout 20 cloud-init status --wait --long 2>&1)
    echo "cloud-init $?" $words
fi
if [ $gpus -gt 0 ]; then
    words=$(timeout 60 nvidia-smi -L 2>&1)
    echo "gpus $(printf '%s\\n' "$words" | grep -c '^GPU ')" $(printf '%s\\n' "$words" | tail -n 1)
fi
if [ $efa -gt 0 ]; then
    words=$(timeout 30 fi_info -p efa 2>&1)
    echo "efa $?" $(printf '%s\\n' "$words" | tail -n 1)
fi
if [ -n "$python" ]; then
    words=$(timeout 30 "$python" -c '' 2>&1)
    echo "python $?" $words
fi
echo "disk_kib $(df -Pk . | awk 'NR == 2 {print $4}')"
echo "ended $(date +%s.%N)"
"""


@dataclass(frozen=True)
class Needs:
    """What a machine must have."""
    gpus: int
    efa: bool
    disk_gib: float                               # free
    python: str | None                            # a command; None: none is looked for


class NotReady(Trouble):
    """A machine came, but not as needed, or not in time."""


def wait_ready(shells: Sequence[Shell], needs: Needs, *, deadline_s: float, say: Callable[[str], None] = print,
               interrupted: Callable[[], bool] = never, clock_now: Callable[[], float] = time.time,
               patience_s: float = PATIENCE_S) -> list[Shell]:
    """Until every machine answers, has booted, and is as needed: node 0, and by it the others, which let it in.

    Returns shells that know of that. Raises SomeFailed of all that are not ready by then. What is wrong once a machine
    has booted is given `patience_s` to settle, a key not accepted as well: then waiting on would only cost. Silence is
    given the whole of `deadline_s`.
    """
    began = time.monotonic()

    def not_ready(name: str, reason: str) -> NotReady:
        late = time.monotonic() - began > deadline_s
        return NotReady(name, f"not ready after {deadline_s:g} s: {reason}" if late else reason)

    def wait(group: Sequence[Shell]) -> dict[str, Trouble]:
        """Why those of them are not ready that are not in time."""
        pending, errors = {shell.name: shell for shell in group}, dict[str, Trouble]()
        reasons, wrong_since = dict[str, str](), dict[str, float]()
        while pending:
            left = began + deadline_s - time.monotonic()
            for name, reason, settles in _looks([*pending.values()], needs, clock_now, max(1, min(LOOK_S, left)),
                                                interrupted):
                now = time.monotonic()
                if reason is None:
                    say(f"{name} is ready ({now - began:.0f} s)")
                    del pending[name]
                    continue
                reasons[name] = reasons.get(name, reason) if reason == SILENT else reason
                since = wrong_since[name] = min(now, wrong_since.get(name, now)) if settles else math.inf
                if now - began > deadline_s or now - since >= patience_s:
                    errors[name] = not_ready(name, reasons[name])
                    del pending[name]
            if pending:
                _pause(1, interrupted)
        return errors

    if errors := wait(shells[:1]):                # whether something is wrong with all, the others can tell
        errors |= {name: not_ready(name, reason) for name, reason, _ in
                   _looks(shells[1:], needs, clock_now, LOOK_S, interrupted) if reason}
    else:
        shells = among.acquaint(shells, interrupted)
        errors = wait(shells[1:])
    if errors:
        raise SomeFailed(errors, len(shells))
    return list(shells)


def probe(needs: Needs) -> str:
    """The one command that asks a machine everything; shortcoming() reads its answer. POSIX sh."""
    return f"gpus={needs.gpus} efa={int(needs.efa)} python={shlex.quote(needs.python or '')}\n{PROBE}"


def shortcoming(answer: str, needs: Needs, sent: float, received: float) -> str | None:
    """What a machine lacks; None where nothing. `sent`, `received`: our clock around the question. Pure."""
    said = {word: rest for word, _, rest in (line.partition(" ") for line in answer.splitlines())}
    try:
        return next(_shortcomings(said, needs, sent, received), None)
    except (KeyError, ValueError):
        return f"what it answers makes no sense: {' '.join(answer.split())[:300] or 'nothing'}"


def _looks(shells: Sequence[Shell], needs: Needs, clock_now: Callable[[], float], timeout_s: float,
           interrupted: Callable[[], bool]) -> Iterator[tuple[str, str | None, bool]]:
    """Of each its name, what it lacks, and whether that is more than that it boots."""
    sent = clock_now()
    try:
        answers = among.ask(shells, probe(needs), timeout_s=timeout_s, interrupted=interrupted)
    except Trouble as error:                      # of node 0, which was ready
        yield from ((shell.name, f"it cannot be asked by way of {error}", True) for shell in shells)
        return
    for shell, answer in zip(shells, answers):
        said, after_s, until_s = answer
        if isinstance(said, Result):
            reason = shortcoming(said.out, needs, sent + after_s, sent + until_s)
            yield shell.name, reason, reason != BOOTING
        else:
            yield shell.name, SILENT if isinstance(said, TimedOut) else said.reason, not isinstance(
                said, (TimedOut, Unreachable))


def _pause(seconds: float, interrupted: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if interrupted():
            raise Interrupted("interrupted while waiting for the machines")
        time.sleep(0.1)


def _shortcomings(said: Mapping[str, str], needs: Needs, sent: float, received: float) -> Iterator[str]:
    status, _, words = said.get("cloud-init", "0").partition(" ")
    if status == "124":                           # of timeout(1)
        yield BOOTING
    elif status not in ("0", "2"):                # 2: it is done, and found something to complain about
        yield f"cloud-init failed: {words[:300]}"
    for name, enough in (("gpus", str(needs.gpus)), ("efa", "0"), ("python", "0")):
        found, _, words = said.get(name, enough).partition(" ")
        if found != enough:
            yield {"gpus": f"{found} of {needs.gpus} GPUs are there (nvidia-smi: {words})",
                   "efa": f"EFA was asked for and is not there (fi_info: {words})",
                   "python": f"{needs.python} does not run: {words}"}[name]
    if (free := int(said["disk_kib"]) / 2**20) < needs.disk_gib:
        yield f"{free:.1f} GiB are free on its disk, needed are {needs.disk_gib:g}"
    # Sent before it began, received after it ended: its clock is ahead of ours by `least` to `most` seconds. A slow way
    # there or back widens the two and accuses nobody.
    least, most = float(said["ended"]) - received, float(said["began"]) - sent
    if least >= CLOCK_S or most <= -CLOCK_S:
        ahead = (least + most) / 2
        yield f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} ours"
