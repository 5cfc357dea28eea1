"""Powers this machine off when nobody needs it: docs/aws.md, "Watchdog". Python 3.8, standard library, by itself.

    python3 watchdog.py          as root, from boot to power-off; TXL_ROOT=FOLDER in a rehearsal
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
import zlib
from typing import Any, NamedTuple

HOME = "/var/lib/txl"
MACHINE = "/sys/class/dmi/id/product_uuid"
TERMS = {"no_lease_s": 1200, "after_success_s": 600, "after_failure_s": 3600, "max_s": 86400, "budget_s": None,
         "tick_s": 5}
AFTER = {"running": ("no_lease_s", "no lease"), "succeeded": ("after_success_s", "succeeded"),
         "failed": ("after_failure_s", "failed")}
RESTART_S = 60                                    # what a restart adds to the age, and the age between two savings
PATIENCE_S = 60                                   # between two ways of powering off
SYSRQ = ("/proc/sysrq-trigger",)
WAYS = (("shutdown", "-P", "now"), ("systemctl", "poweroff", "--force", "--force"), SYSRQ)


class State(NamedTuple):
    """What a restart must not forget. Times are ages of the machine: powered-on seconds."""
    age: float = 0.0
    changed: float = 0.0                          # the age at which the lease last changed
    said: str = "running"                         # the last state that lease/run named
    lease: int = 0                                # fingerprint() of lease/run and lease/hold at the last look
    machine: str = ""                             # whose age it is: an image made of a machine carries its files


def due(terms: dict[str, Any], state: State) -> tuple[float, str]:
    """Seconds until the machine is to be powered off as things stand (not above 0: now), and why."""
    patience, why = AFTER[state.said]
    ends = [(state.changed + terms[patience], why), (terms["max_s"], "maximum hours")]
    if terms["budget_s"] is not None:
        ends.append((terms["budget_s"], "budget"))
    end, why = min(ends)
    return end - state.age, why


def fingerprint(run: str, hold: str) -> int:
    return zlib.crc32(f"{run}\0{hold}".encode())


def seen(state: State, age: float, run: str, hold: str) -> State:
    """The state after a look at the lease. Any change renews, garbage too: whoever writes is alive. What lease/run
    said stays until it says something else that is understood."""
    lease = fingerprint(run, hold)
    if lease == state.lease:
        return state._replace(age=age)
    try:
        said = json.loads(run)["state"]
        said = said if said in AFTER else state.said
    except (ValueError, TypeError, LookupError, RecursionError):
        said = state.said
    return state._replace(age=age, changed=age, said=said, lease=lease)


def begun(saved: str | None, fresh: State, terms: dict[str, Any]) -> State:
    """The state to go on from: what age.json holds and a minute, or `fresh` where it holds nothing of this machine.

    An age that cannot be read may be any: all is taken to be over but one lease, time enough to fetch.
    """
    if saved is None:
        return fresh
    try:
        state = State(**json.loads(saved))
        if not (0 <= state.changed <= state.age < float("inf") and state.said in AFTER):
            raise ValueError(saved)
    except (ValueError, TypeError, RecursionError):
        end = min(limit for limit in (terms["max_s"], terms["budget_s"]) if limit is not None)
        age = max(end - terms["no_lease_s"], fresh.age)
        return fresh._replace(age=age, changed=age)
    return fresh if state.machine != fresh.machine else state._replace(age=max(state.age + RESTART_S, fresh.age))


class Watchdog:
    """What happens at a tick. It is told the time: `now` is in seconds of a clock that only goes forward."""

    def __init__(self, root: str, now: float, uptime: float = 0.0):
        self.root, self.home = root, root + HOME
        self.terms = _terms(_read(self.home + "/terms.json"))
        fresh = State(uptime, lease=fingerprint(*self._lease()), machine=_read(root + MACHINE) or "")
        self.state = begun(_read(self.home + "/age.json"), fresh, self.terms)
        self._born = now - self.state.age
        self._save_at = self.state.age
        self._off: str | None = None              # why; from then on there is no way back
        self._try_at, self._tries = 0.0, 0
        self._logged = ""

    def tick(self, now: float) -> None:
        age = now - self._born
        self.terms = _terms(_read(self.home + "/terms.json"))       # a new boot may bring new ones
        self.state = seen(self.state, age, *self._lease())
        in_s, why = due(self.terms, self.state)
        if self._off is None and in_s <= 0:
            self._off = why
        if self._off is not None:
            in_s, why = 0.0, self._off
        if age >= self._save_at:
            self._save_at = age + RESTART_S
            self._write("age.json", self.state._asdict(), lasting=True)
        self._write("deadline.json", {"in_s": round(in_s, 1), "why": why})
        if self._off is not None and age >= self._try_at:
            self._try_at = age + PATIENCE_S
            self._power_off(WAYS[self._tries % len(WAYS)])

    def log(self, what: str) -> None:
        """A line in watchdog.log; one, where the same happens at each tick."""
        if what != self._logged:
            self._logged = what
            with contextlib.suppress(OSError), open(self.home + "/watchdog.log", "a") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} age {self.state.age:.0f} s: {what}\n")

    def _lease(self) -> tuple[str, str]:
        return _read(self.home + "/lease/run") or "", _read(self.home + "/lease/hold") or ""

    def _power_off(self, way: tuple[str, ...]) -> None:
        self._tries += 1
        self.log(f"{self._off}: {' '.join(way)}, try {self._tries}")
        try:
            if way is SYSRQ:
                with open(self.root + way[0], "w") as trigger:
                    trigger.write("o")
            else:
                program = _program(way[0], self.root)
                subprocess.run([program, *way[1:]], stdin=subprocess.DEVNULL, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            self.log(f"in vain: {error}")

    def _write(self, name: str, value: dict[str, Any], lasting: bool = False) -> None:
        """Beside, then renamed. On a full disk in place: the blocks a file has can still be written. Or not at all."""
        path, data = f"{self.home}/{name}", json.dumps(value).encode()
        try:
            try:
                with open(path + ".partial", "wb") as file:
                    file.write(data)
                    file.flush()
                    if lasting:
                        os.fsync(file.fileno())
                os.replace(path + ".partial", path)
            except OSError:
                with open(path, "r+b") as file:
                    file.write(data)
                    file.truncate()
        except OSError as error:
            self.log(f"{name} was not written: {error}")


def clock(root: str) -> float:
    """Seconds since boot, suspended ones too, whatever becomes of the date. A rehearsal travels by the file `clock`."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    if root:
        with contextlib.suppress(ValueError):
            now += float(_read(root + HOME + "/clock") or 0)
    return now


def main() -> None:
    root = os.environ.get("TXL_ROOT", "")
    for ignored in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    lock = os.open(root + HOME, os.O_RDONLY)      # the folder itself: a full disk has no room for a lock file
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return                                    # another one watches
    now = clock(root)
    watchdog = Watchdog(root, now, uptime=0.0 if root else now)
    while True:
        try:
            watchdog.tick(clock(root))
        except Exception as error:                # whatever it is: money depends on the next tick
            watchdog.log(f"{type(error).__name__}: {error}")
        time.sleep(watchdog.terms["tick_s"])


def _terms(text: str | None) -> dict[str, Any]:
    """terms.json, with defaults for what is missing or no limit."""
    try:
        given = json.loads(text or "").items()
    except (ValueError, AttributeError):
        given = ()
    return {**TERMS, **{name: limit for name, limit in given if isinstance(limit, (int, float)) and limit >= 0}}


def _read(path: str) -> str | None:
    """The first 64 KiB of a file, "" of what cannot be read, None where there is none. Waits for nothing (pipes)."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return ""
    try:
        return os.read(file, 1 << 16).decode("latin-1")
    except OSError:
        return ""
    finally:
        os.close(file)


def _program(name: str, root: str) -> str:
    """Where a program is. In a rehearsal a stand-in's path, never of what ends the machine it is rehearsed on."""
    folders = [folder for folder in os.get_exec_path() if not (root and folder.startswith(("/usr", "/sbin", "/bin")))]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(f"no {name} in {os.pathsep.join(folders)}")
    return found


if __name__ == "__main__":
    main()
