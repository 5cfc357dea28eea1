"""`sync`: the code of this checkout, or any folder, on all machines of a run; with --watch after each change again."""
from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import deliver, reach
from cluster.deliver import Parcel
from cluster.follow import FINISHED
from cluster.journal import Journal
from cluster.local import CHECKOUT
from cluster.run import Refused
from cluster.ssh import NAME, Interrupted, Trouble
from cluster.verbs_ssh import To, connect, interruptible
from engine.cli import flag

WATCH_S, AGAIN_S = 1, 10                          # between two looks, and after one that failed


@dataclass(frozen=True)
class Syncing(To):
    watch: bool = flag("again after each change of a file here, until Ctrl-C", False)


def sync(words: Sequence[str], flags: Syncing) -> int:
    """RUN alone: the code, as a launch brings it. HERE THERE: a file, or what is in a folder, into a folder there."""
    if len(words) == 2:
        raise Refused(f"{words[1]} to where?  python -m cluster sync {words[0]} HERE THERE")
    if len(words) == 3 and not Path(words[1]).exists():
        raise Refused(f"There is no {words[1]} here")
    found, shells = connect(words[:1], flags)
    parcel = deliver.goods(Path(words[1]), words[2]) if len(words) == 3 else deliver.code(CHECKOUT)
    if len(shells) < len(found.machines):
        print(f"Only to {', '.join(map(NAME, shells))}: the other machines do not run.")
    if len(words) == 1 and (busy := [shell.name for shell, yes in zip(shells, reach.trains(shells, found.name))
                                     if yes]):
        print(f"A training runs on {', '.join(busy)}: what it has loaded stays as it was, what it loads later is new.")

    def send() -> None:
        with Journal(found.name).alone("synced"), reach.holding(shells):
            deliver.bring(shells, [parcel], interrupted=interrupted)
        print(f"{time.strftime('%H:%M:%S')} {parcel.source} is in ~/{parcel.target} of {len(shells)} machine(s), "
              f"compared", flush=True)

    with interruptible() as interrupted:
        if flags.watch:
            with contextlib.suppress(Interrupted):
                watch(parcel, send, interrupted)
        else:
            send()
    return FINISHED


def watch(parcel: Parcel, send: Callable[[], None], interrupted: Callable[[], bool]) -> None:
    """What fails is told and tried again: a file may have changed meanwhile, a laptop been away."""
    sent = None
    while not interrupted():
        pause_s = WATCH_S
        try:
            if (now := looked(parcel, interrupted)) != sent:
                send()
                sent = now
        except (Trouble, Refused) as error:
            print(error, file=sys.stderr, flush=True)
            pause_s = AGAIN_S
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not interrupted():
            time.sleep(.1)


def looked(parcel: Parcel, interrupted: Callable[[], bool]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file that would be sent."""
    found = {}
    for path in deliver.files_sent(parcel, interrupted):
        with contextlib.suppress(FileNotFoundError):              # gone since
            stat = os.lstat(parcel.root / path)
            found[path] = stat.st_size, stat.st_mtime_ns
    return found
