"""User-data: what a machine does by itself at each boot, before anybody reaches it. Pure."""
from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path

WATCHDOG = Path(__file__).parent / "host" / "watchdog.py"
LIMIT_BYTES = 16384                               # of EC2, before base64
# systemd runs it, outside of what stops at a shutdown: it presses on where a shutdown hangs.
UNIT = """\
[Unit]
Description=Powers this machine off when nobody needs it
DefaultDependencies=no
After=local-fs.target
StartLimitIntervalSec=0
[Service]
ExecStart=/bin/sh /var/lib/txl/watch
Restart=always
RestartSec=5
TimeoutStopSec=5
OOMScoreAdjust=-1000
[Install]
WantedBy=multi-user.target
"""
# Keeps the watchdog running. Without a python3 that runs it, a machine lives for no_lease_s from its boot.
WATCH = """\
#!/bin/sh
trap '' HUP INT TERM
tries=0
while [ $tries -lt {tries} ]; do
  python3 "${{TXL_ROOT:-}}/var/lib/txl/watchdog.py" && exit
  tries=$((tries + 1))
  sleep {tick_s}
done
if [ -n "${{TXL_ROOT:-}}" ]; then
  case $(command -v shutdown) in /usr/*|/sbin/*|/bin/*) exit 1;; esac   # a rehearsal ends no real machine
fi
while :; do
  shutdown -P now
  sleep 60
  [ -n "${{TXL_ROOT:-}}" ] || systemctl poweroff --force --force
done
"""
# A file is replaced only by a whole one: a full disk at a later boot leaves the one before. The timer is the second
# line: no python, not cancelled by `shutdown -c`, counted anew at each boot. --no-block: systemd is still booting.
BOOTHOOK = """\
#!/bin/sh
umask 022
txl="${{TXL_ROOT:-}}/var/lib/txl"
put() {{ cat >"$1.partial" && mv "$1.partial" "$1"; }}
mkdir -p "$txl/lease"
chmod 1777 "$txl/lease"
put "$txl/watchdog.py" <<'=end='
{watchdog}=end=
put "$txl/terms.json" <<'=end='
{terms}
=end=
put "$txl/watch" <<'=end='
{watch}=end=
[ -n "${{TXL_ROOT:-}}" ] || echo 30 >/proc/sys/kernel/panic        # a kernel that panics reboots: the watchdog is back
if [ -z "${{TXL_ROOT:-}}" ] && [ -d /run/systemd/system ]; then
  put /etc/systemd/system/txl-watchdog.service <<'=end='
{unit}=end=
  systemctl daemon-reload
  systemctl enable txl-watchdog.service
  systemctl start --no-block txl-watchdog.service
  systemd-run --no-block --unit=txl-last --on-active={last_s} systemctl poweroff --force
else
  setsid sh "$txl/watch" </dev/null >/dev/null 2>&1 &
fi
"""


@dataclass(frozen=True)
class Limits:
    """terms.json: after how many seconds a machine powers itself off (docs/aws.md, "Watchdog")."""
    no_lease_s: float = 1200
    after_success_s: float = 600
    after_failure_s: float = 3600
    max_s: float = 86400
    budget_s: float | None = None
    tick_s: float = 5

    def __post_init__(self):
        for name, limit in asdict(self).items():
            positive = limit is None or limit > 0 or (limit == 0 and name.startswith("after_"))
            if not positive or limit == math.inf:
                raise ValueError(f"{name} is {limit:g}: it must be above 0, and a machine does not live for ever")


def user_data(limits: Limits, *keys: str) -> str:
    """What cloud-init gets: the watchdog, started first at every boot, and who may log in, as authorized_keys has it.
    Nothing in it is secret.

    Raises ValueError where one is not a public key, or all is more than EC2 takes.
    """
    if not all(re.fullmatch(r"(restrict )?(ssh|ecdsa|sk)-\S+ [A-Za-z0-9+/=]+( [^\n]*)?", key.strip()) for key in keys):
        raise ValueError("this is not the public half of an SSH key, one line of type, key and comment (id_….pub)")
    # The launch's key pair, if it has one, is a label: whoever may make key pairs in the account gets in by none.
    access = {"ssh_authorized_keys": [key.strip() for key in keys], "allow_public_ssh_keys": False}
    parts = MIMEMultipart(boundary="==txl==")
    parts.attach(MIMEText(_boothook(limits), "cloud-boothook", "us-ascii"))
    parts.attach(MIMEText(f"#cloud-config\n{json.dumps(access)}\n", "cloud-config", "us-ascii"))       # which is YAML
    text = parts.as_string()
    if len(text) > LIMIT_BYTES:
        raise ValueError(f"user-data has {len(text)} bytes, EC2 takes {LIMIT_BYTES}: {WATCHDOG.name} must be smaller")
    return text


def _boothook(limits: Limits) -> str:
    watch = WATCH.format(tries=math.ceil(limits.no_lease_s / limits.tick_s), tick_s=limits.tick_s)
    last_s = math.ceil(min(limit for limit in (limits.max_s, limits.budget_s) if limit is not None))
    return BOOTHOOK.format(watchdog=WATCHDOG.read_text(encoding="ascii"), terms=json.dumps(asdict(limits)), watch=watch,
                           unit=UNIT, last_s=last_s)
