"""Train a config on its machines, or on this one.

    python launch.py --config=test_16 --dry_run                         what it would do, and cost
    python launch.py --config=test_16 --nospot --budget=500             on-demand machines, 500 dollars at most
    python launch.py --config=test_2 --rehearse                         all of it here, without an account
    python launch.py --config=tiny                                      seconds, on this machine
    python launch.py --config=tiny --machines=2 --name=two              two nodes here, over loopback
    python launch.py --config=tiny --name=mine --set recipe.optim.lr=0.002 --set recipe.stop.max_steps=100

A run is the folder runs/NAME, and the same command again goes on where it stopped: on machines of that name which are
still up, it follows them. Ctrl-C stops with a checkpoint; losing this program or its connection harms nothing.
python -m cluster --help has what one does with machines afterwards.
Exit status: 0 finished, 1 failed, 2 refused before anything was started, 3 finished without reaching a target of
recipe.clock, 130 stopped.
"""
from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from cluster import backends, run
from cluster.backends import Wish
from cluster.follow import FAILED, FINISHED, STOPPED, Follower
from cluster.plan import Plan
from cluster.run import Broken, Refused, Stopped
from cluster.spec import LOCAL, Config, Terms
from configs import CONFIGS
from engine.cli import flag, misuse, parse, this_python
from engine.config import MISSED
from engine.values import BadValue, nearest, override
from txl import options

REHEARSED = ("launch_tensorboard", "wait", "fallback", "budget", "max_hours", "minutes_after_success",
             "minutes_after_failure", "disk_gib", "ray")


@dataclass(frozen=True)
class Flags:
    config: str = flag("what to train, one of those below")
    name: str | None = flag("of the run, whose folder is runs/NAME; else the config's", None)
    nospot: bool = flag("on-demand machines rather than spot", False)
    launch_tensorboard: bool = flag("TensorBoard on loopback until the run ends", False)
    machines: int | None = flag("how many, instead of the config's", None)
    instance_type: str | None = flag("which kind, instead of the config's", None)
    checkpoint: str | None = flag("start from the weights of another run or checkpoint", None)
    dry_run: bool = flag("print the plan and do nothing", False)
    backend: str | None = flag("who provides the machines; `local` is this one", None)
    set: tuple[str, ...] = flag("PATH=VALUE in the config, recipe.optim.lr=0.02; may be repeated", ())
    region: str | None = flag("of AWS; else as its environment says", None)
    wait: float = flag("minutes to go round the zones for spot capacity", Terms.wait)
    fallback: Literal["ondemand"] | None = flag("what to take when there is no spot capacity", None)
    budget: float | None = flag("dollars this run may ever cost; the machines themselves hold it", None)
    max_hours: float | None = flag("a machine lives no longer; else twice the expected, plus two", None)
    minutes_after_success: float = flag("until the machines go away", Terms.minutes_after_success)
    minutes_after_failure: float = flag("until the machines go away", Terms.minutes_after_failure)
    yes: bool = flag("do not ask", False)
    detach: bool = flag("return as soon as the training runs", False)
    skip_setup: bool = flag("the machines have the environment already: install nothing", False)
    disk_gib: int = flag("of each machine's disk", Terms.disk_gib)
    image: str | None = flag("ami-..., or an SSM parameter; else what the kind of machine needs", None)
    ssh_user: str | None = flag("on the machines; else the image's", None)
    ssh_cidr: str | None = flag("who may reach their port 22; else this machine's address", None)
    vpc: str | None = flag("else the region's default one", None)
    bucket: str | None = flag("in S3, or s3://BUCKET/PREFIX: the machines keep the run's folder there", None)
    data: str | None = flag("s3://BUCKET/PREFIX: the machines fetch the recipe's data from there", None)
    role: str | None = flag("instance profile for that; else one is made for the run", None)
    hosts: str | None = flag("machines that exist, as ssh knows them: a,b,c or a file of names", None)
    partition: str | None = flag("of a Slurm cluster; else its default one", None)
    account: str | None = flag("that Slurm charges; else the user's default one", None)
    time: str | None = flag("Slurm's limit, as 4:00:00 or 1-12:00; the job goes on after it, in the queue again", None)
    container_image: str | None = flag("that pyxis starts on each node, with a python that has all it needs", None)
    container_mounts: str | None = flag("beside this folder and the code, as pyxis takes them: /data:/data", None)
    sbatch: tuple[str, ...] = flag("another line for Slurm, --sbatch=--qos=high; may be repeated", ())
    ray_address: str | None = flag("http://HOST:8265 of a Ray; else RAY_ADDRESS, or a Ray started here", None)
    storage_path: str | None = flag("where a Ray cluster keeps runs: a folder all its nodes share, or s3://...", None)
    min_machines: int | None = flag("of a Ray cluster: go on with as few, where not all are there", None)
    ray: bool = flag("start Ray on the machines, of AWS or --hosts, and train by it", False)
    rehearse: bool = flag("all of it on this machine, without an account, with the model of `tiny`", False)
    drill: str | None = flag("a failure to rehearse; a wrong name lists them", None)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="launch.py", about=__doc__, more=list_configs, advice=options.advice)
    try:
        if (flags.rehearse or flags.drill) and not flags.dry_run:
            from cluster import rehearse
            return rehearse.main(find_config(flags), flags.drill, rehearsed_flags(flags))
        plan = make_plan(flags, find_config(flags))
        print(plan, flush=True)
        if flags.dry_run:
            print(plan.layout.script or "", end="")
            return FINISHED
        if plan.standing.state == "finished":
            print(f"Nothing to do: {plan.standing.place or plan.run_dir} is finished. For another run, another --name.")
            for target in plan.standing.missed:
                print(f"It missed {target}")
            return MISSED if plan.standing.missed else FINISHED
        confirm(plan)
        with Follower(plan) as follower:
            job = backends.load(plan.backend).apply(plan, follower)
            if plan.terms.detach:
                print(f"It trains. To follow it:  {plan.command.replace(' --detach', '')}")
                return FINISHED
            return follower.follow(job)
    except (BadValue, Refused) as error:
        misuse(str(error))
    except Broken as error:
        print(error, file=sys.stderr)
        return FAILED
    except Stopped as error:
        print(error, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:                     # before there was a follower, which counts them
        print("\nNothing was started.", file=sys.stderr)
        return STOPPED
    except OSError as error:
        misuse(f"{run.why(error)}. Nothing was started.\n{run.MEND}")


def find_config(flags: Flags) -> Config:
    """The config by name, with what the flags change in it. Raises BadValue."""
    if flags.config not in CONFIGS:
        raise BadValue(f"There is no config {flags.config!r}.{nearest(flags.config, CONFIGS)}\n"
                       f"{this_python()} {os.path.relpath(__file__)} --help lists them.")
    return override(CONFIGS[flags.config], *overrides_of(flags))


def overrides_of(flags: Flags) -> tuple[str, ...]:
    """What the flags change in a config, each as --set takes it."""
    return (*([f"machines.count={flags.machines}"] if flags.machines is not None else []),
            *([f"machines.kind={flags.instance_type}"] if flags.instance_type is not None else []),
            *(["machines.spot=false"] if flags.nospot else []),
            *([f"recipe.init_from={flags.checkpoint}"] if flags.checkpoint is not None else []),
            *flags.set)


def make_plan(flags: Flags, config: Config) -> Plan:
    """Looks at the world and changes nothing. Raises BadValue and Refused."""
    name = flags.name or flags.config
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise BadValue(f"{name!r} cannot be a run's name, which names a folder and machines. Take letters, digits, "
                       f"'.', '_' and '-', at most 63, a letter or digit first")
    chosen = flags.backend or ("local" if config.machines.kind == LOCAL else "aws")
    if chosen not in backends.BACKENDS:
        raise BadValue(f"There is no backend {chosen!r}; there is: {', '.join(backends.BACKENDS)}. On this machine:\n"
                       f"  {command_of(replace(flags, backend='local'))}")
    try:
        terms = Terms(**{f.name: getattr(flags, f.name) for f in fields(Terms)})
        standing = run.standing(Path("runs", name), config.recipe)
        if chosen != "aws" and (terms.needs_s3 or terms.role):
            raise BadValue(f"--bucket, --data and --role are for machines on AWS: --backend={chosen} has none")
        for backends_, names in Terms.ONLY_FOR.items():
            if chosen not in backends_ and (strange := [f"--{x}" for x in names if f"--{x}" in terms.given()]):
                raise BadValue(f"{', '.join(strange)}: not for --backend={chosen}, only for "
                               f"{' and '.join(f'--backend={x}' for x in backends_)}")
        wish, backend = Wish(name, config, standing, terms, flags.dry_run), backends.load(chosen)
        layout = backend.lay_out(wish, backend.survey(wish))
        return Plan(name, flags.config, config, chosen, layout, overrides_of(flags), command_of(flags),
                    layout.standing or standing,
                    flags.launch_tensorboard, terms)
    except ValueError as error:
        raise BadValue(str(error)) from error


def confirm(plan: Plan) -> None:
    """Asks what the layout wants asked, unless --yes. Raises Refused without a yes."""
    run.agree(plan.layout.ask or "", plan.terms.yes, plan.layout.ask is not None,
              if_so=f"If so:  {plan.command} --yes", otherwise="Nothing was started.")


def command_of(flags: Flags) -> str:
    """The command line to copy, without --dry_run."""
    words = []
    for f in fields(flags):
        value = getattr(flags, f.name)
        if value != f.default and f.name != "dry_run":
            words += [f"--{f.name}={x}" for x in value] if isinstance(value, tuple) else \
                     [f"--{f.name}" + (f"={value}" if value is not True else "")]
    return shlex.join([this_python(), os.path.relpath(__file__), *words])


def rehearsed_flags(flags: Flags) -> list[str]:
    """What a rehearsal is given beside the config. Raises BadValue for what it cannot honour."""
    of_config = ("config", "machines", "instance_type", "nospot", "set", "rehearse", "drill", "yes")
    given = [f.name for f in fields(flags) if getattr(flags, f.name) != f.default and f.name not in of_config]
    if strange := [name for name in given if name not in REHEARSED]:
        raise BadValue(f"--rehearse does not take {', '.join(f'--{name}' for name in strange)}: it has an EC2, a model "
                       f"and machines of its own. It takes {', '.join(f'--{name}' for name in REHEARSED)}")
    return [f"--{name}" + (f"={value}" if (value := getattr(flags, name)) is not True else "") for name in given]


def list_configs() -> str:
    """The configs by group, for --help."""
    lines = []
    for group in dict.fromkeys(config.group for config in CONFIGS.values()):
        lines += ["", group]
        for name, config in CONFIGS.items():
            if config.group == group:
                machines, gpus, params = config.machines, config.machines.gpus_per_machine, config.recipe.params
                columns = (f"{machines.count} x {machines.kind}" if machines.kind != LOCAL else
                           "this machine" if machines.count == 1 else f"{machines.count} of yours",
                           f"{gpus * machines.count} GPU{'s' * (gpus * machines.count > 1)}" if gpus else "",
                           f"{params / 1e6:.1f}M parameters" if params else "",
                           f"${machines.usd_per_hour:.2f}/h" if machines.usd_per_hour else "")
                lines.append("  {:<28}{:<19}{:<10}{:<19}{:>9}".format(name, *columns))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
