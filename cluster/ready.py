"""Whether a machine that was started is fit for work: it answers, has booted, and has what it should."""
from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.ssh import NAME, Denied, Interrupted, Shell, TimedOut, Trouble, Unreachable, each, never

PATIENCE_S = 60                                   # for what is wrong with a machine that has booted, as it may settle
CLOCK_S = 5                                       # between a machine's clock and ours
BOOTING = "cloud-init is still at work"
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
               patience_s: float = PATIENCE_S) -> None:
    """Until every machine answers, has booted, and is as needed. Raises SomeFailed of all that are not by then.

    What is wrong once a machine has booted is given `patience_s` to settle, a key not accepted as well: then waiting
    on would only cost. Silence is given the whole of `deadline_s`.
    """
    began = time.monotonic()

    def wait(shell: Shell) -> None:
        reason, wrong_since = None, None
        while True:
            left, sent = began + deadline_s - time.monotonic(), clock_now()
            try:
                answer = shell.run(probe(needs), check=False, tied=True, timeout_s=max(1, min(180, left)),
                                   interrupted=interrupted)
                reason = shortcoming(answer.out, needs, sent, clock_now())
                settles = reason != BOOTING
            except Denied as error:
                reason, settles = error.reason, True
            except Unreachable as error:
                reason, settles = error.reason, False
            except TimedOut:
                reason, settles = reason or "it does not answer", False
            now = time.monotonic()
            if reason is None:
                return say(f"{shell.name} is ready ({now - began:.0f} s)")
            wrong_since = (wrong_since or now) if settles else None
            if now - began > deadline_s:
                raise NotReady(shell.name, f"not ready after {deadline_s:g} s: {reason}")
            if wrong_since and now - wrong_since >= patience_s:
                raise NotReady(shell.name, reason)
            _pause(1, interrupted)

    each(shells, wait, name=NAME)


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
