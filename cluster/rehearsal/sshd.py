"""An sshd of one's own, at addresses of loopback, for whoever starts it and into the program that it is told."""
from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
KEY_S = 30                                        # the most that making a key may take


def configure(config: Path, addresses: Sequence[str], port: int, *, key: Path, authorized_keys: Path,
              enter: Path) -> None:
    config.write_text("\n".join([
        *(f"ListenAddress {address}:{port}" for address in addresses),
        f'HostKey "{key}"', f'AuthorizedKeysFile "{authorized_keys}"', f"ForceCommand {shlex.quote(str(enter))}",
        "PidFile none", "StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
        "PermitRootLogin yes", "MaxStartups 100", "LogLevel VERBOSE", "PrintMotd no",
        "SetEnv SHLVL=2\n"]))                     # else bash reads the ~/.bashrc of whoever starts it


def new_key(key: Path, comment: str = "") -> None:
    """A host's key, in the place of one that was there."""
    for path in (key, key.with_suffix(".pub")):
        path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", key], check=True, timeout=KEY_S)


def start(config: Path, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Returns at once; it listens a little later."""
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)           # its privilege separation insists
    with open(log, "ab") as out:
        return subprocess.Popen([SSHD or "sshd", "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stdout=out,
                                stderr=out, env=env, start_new_session=True)


def user() -> str:
    """Whom to log in as: an sshd that is not root's lets nobody else in."""
    return getpass.getuser()
