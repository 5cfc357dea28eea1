"""What one does with machines after a launch.

    python -m cluster                                       this user's machines, their cost and their deadlines
    python -m cluster ssh test_16 --node=3                  a terminal there
    python -m cluster cmd test_16 --all_nodes nvidia-smi    a command on all of them
    python -m cluster kill test_16                          end them all

RUN is a run's name or a part of it; of several, the one launched last. Words first, then flags, then a COMMAND.
Exit status: 0 done, 1 failed, 2 refused before anything was done, 130 broken off.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster import smoke, verbs, verbs_mosh, verbs_ray, verbs_ssh, verbs_sync
from cluster.ec2 import CallFailed
from cluster.follow import FAILED, FINISHED, STOPPED
from cluster.run import Refused, why
from cluster.ssh import Interrupted, Trouble
from engine.cli import misuse, parse, this_python
from engine.values import BadValue, nearest


@dataclass(frozen=True)
class Verb:
    takes: str                                    # its words; in brackets: may be left out, "...": all that follow
    about: str
    flags: type
    do: Callable[[Any, Any], int]                 # words and flags to an exit status

    @property
    def most(self) -> int:
        return len(self.takes.split())

    @property
    def least(self) -> int:
        return sum(not word.startswith("[") for word in self.takes.split())

    @property
    def raw(self) -> bool:
        return "..." in self.takes


VERBS = {
    "ls": Verb("[RUN]", "machines, oldest first: age, cost so far, deadline, address", verbs.Whose, verbs.ls),
    "status": Verb("RUN", "how supervisors and training are, and when machines end", verbs_ssh.To, verbs_ssh.status),
    "logs": Verb("RUN", "a rank's log; -f follows it", verbs_ssh.Logs, verbs_ssh.logs),
    "ssh": Verb("[RUN] [COMMAND...]", "a terminal on a machine, or a command there", verbs_ssh.ToOne, verbs_ssh.ssh),
    "mosh": Verb("[RUN]", "a terminal that survives a bad network, on a machine that has mosh", verbs_mosh.Moshing,
                 verbs_mosh.mosh),
    "cmd": Verb("RUN COMMAND...", "a command on one machine, or on all", verbs_ssh.ToSome, verbs_ssh.cmd),
    "cat": Verb("RUN FILE", "a file of a machine, below the login's home", verbs_ssh.ToOne, verbs_ssh.cat),
    "put": Verb("RUN HERE THERE", "copy to a machine", verbs_ssh.ToOne, verbs_ssh.put),
    "get": Verb("RUN THERE HERE", "copy from a machine", verbs_ssh.ToOne, verbs_ssh.get),
    "sync": Verb("RUN [HERE] [THERE]", "this checkout's code, or a folder, to all machines of a run",
                 verbs_sync.Syncing, verbs_sync.sync),
    "nano": Verb("RUN FILE", "edit a file of a machine with an editor that is there", verbs_ssh.ToOne, verbs_ssh.nano),
    "attach": Verb("RUN", "tmux on a machine, with its log; Ctrl-B D leaves it", verbs_ssh.ToOne, verbs_ssh.attach),
    "tensorboard": Verb("[RUN]", "the run's TensorBoard, until Ctrl-C", verbs_ssh.To, verbs_ssh.tensorboard),
    "kill": Verb("RUN", "end all machines of all clusters of such a name", verbs.Ending, verbs.kill),
    "stop": Verb("RUN", "switch on-demand machines off, to be started again", verbs.Asking, verbs.stop),
    "start": Verb("RUN", "switch stopped machines on", verbs.Asking, verbs.start),
    "hosts": Verb("[RUN]", "lines for /etc/hosts", verbs.Region, verbs.hosts),
    "spot_prices": Verb("TYPE", "what a kind of machine costs now, by zone", verbs.Region, verbs.spot_prices),
    "prices": Verb("[TYPE]", "what machines cost on demand, by the list and its date", verbs.Listing,
                   verbs.list_prices),
    "keys": Verb("", "the public key that machines get, and where it is", verbs.Nothing, verbs.keys),
    "smoke": Verb("", "whether a launch works with your account: two machines for minutes, and a verdict",
                  smoke.Smoking, smoke.smoke),
    "ray_yaml": Verb("", "a file for Ray's own cluster launcher, from a config", verbs_ray.Yaml, verbs_ray.ray_yaml),
    "gc": Verb("", "end what is past its deadline, remove what ended clusters left", verbs.Sweeping, verbs.gc),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            print(list_verbs())
            return FINISHED
        argv = ["ls", *argv]
    name, rest = argv[0], ["--follow" if word == "-f" and argv[0] == "logs" else word for word in argv[1:]]
    if name not in VERBS:
        misuse(f"There is no verb {name!r}.{nearest(name, VERBS)} All:  {this_python()} -m cluster --help")
    verb = VERBS[name]
    words, flags = split(verb, rest)
    prog = f"-m cluster {name} {verb.takes}".rstrip()
    options: Any = parse(verb.flags, flags, prog=prog, about=verb.about)
    if len(words) < verb.least:
        misuse(f"Something is missing:  {this_python()} {prog}")
    if words and not words[0]:                    # an unset variable of a shell's: it would mean all clusters
        misuse("The name is empty.")
    return carry_out(verb.do, words, options)


def carry_out(do: Callable[[Any, Any], int], words: list[str], options: Any) -> int:
    """A verb's exit status, with what went wrong told on stderr."""
    try:
        return do(words, options)
    except (BadValue, Refused) as error:
        misuse(str(error))
    except (CallFailed, Trouble) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(why(error), file=sys.stderr)
    except (KeyboardInterrupt, Interrupted):
        return STOPPED
    return FAILED


def split(verb: Verb, rest: list[str]) -> tuple[list[str], list[str]]:
    """A command line behind its verb into words and flags. A COMMAND is what follows the flags, or a --."""
    named = verb.most - verb.raw                  # words before the COMMAND
    at = next((i for i, word in enumerate(rest) if i == named or word.startswith("-")), len(rest))
    if not verb.raw:
        return rest[:at], rest[at:]
    end = next((i for i, word in enumerate(rest) if i >= at and (word == "--" or not word.startswith("--"))), len(rest))
    return rest[:at] + rest[end + (rest[end:end + 1] == ["--"]):], rest[at:end]


def list_verbs() -> str:
    lines = [f"  {name + ' ' + verb.takes:<24} {verb.about}" for name, verb in VERBS.items()]
    return "\n".join([(__doc__ or "").strip(), "", "Verbs; each has its flags under VERB --help:", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
