"""TensorBoard of a run, until Ctrl-C: through a tunnel to its machines, or of the folder here where it has none.

    python launch_tensorboard.py                            of the run launched last
    python launch_tensorboard.py --name=test_16
"""
from __future__ import annotations

import sys
from dataclasses import dataclass

from cluster import verbs_ssh
from cluster.__main__ import carry_out
from engine.cli import flag, parse


@dataclass(frozen=True)
class Flags(verbs_ssh.To):
    name: str | None = flag("of the run, or a part of it; else the one launched last", None)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="launch_tensorboard.py", about=__doc__)
    return carry_out(verbs_ssh.tensorboard, [flags.name] if flags.name else [], flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
