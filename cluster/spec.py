"""Machines as values: the kinds known by name, and how many of one a config asks for. Standard library only."""
from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from cluster.bucket import parse
from engine.config import Recipe


@dataclass(frozen=True)
class Kind:
    """One kind of machine. Its price is in cluster/prices.py."""
    name: str
    gpus: int
    gpu: str | None
    gpu_memory_gib: int                           # of each
    cores: int                                    # vCPUs
    memory_gib: int
    efa: int = 0                                  # network cards that speak EFA


KINDS = {kind.name: kind for kind in (
    Kind("c5.xlarge", 0, None, 0, 4, 8),
    Kind("p3.2xlarge", 1, "V100", 16, 8, 61),
    Kind("p3.8xlarge", 4, "V100", 16, 32, 244),
    Kind("p3.16xlarge", 8, "V100", 16, 64, 488),
    Kind("p3dn.24xlarge", 8, "V100", 32, 96, 768, efa=1),
    Kind("p4d.24xlarge", 8, "A100", 40, 96, 1152, efa=4),
    Kind("p5.48xlarge", 8, "H100", 80, 192, 2048, efa=32),
)}
LOCAL = "local"                                   # the machine the command is typed on, whatever it is


@dataclass(frozen=True)
class Machines:
    """What to launch: `count` machines of one kind (a name from KINDS, any other EC2 type, or LOCAL)."""
    kind: str
    count: int = 1
    spot: bool = True
    gpus: int | None = None                       # used on each machine; None: all it has

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"a cluster has at least 1 machine, not {self.count}")
        if not self.kind:
            raise ValueError("machines.kind is empty; name an instance type, for example p4d.24xlarge")

    @property
    def gpus_per_machine(self) -> int | None:
        """None where the kind is not in the table."""
        if self.gpus is not None:
            return self.gpus
        return KINDS[self.kind].gpus if self.kind in KINDS else None

    @property
    def usd_per_hour(self) -> float | None:
        """On-demand dollars per hour for all of them; 0 for this machine, None where the kind is not in the list."""
        from cluster import prices  # here, as it knows this module
        if self.kind == LOCAL:
            return 0.0
        usd = prices.on_demand(self.kind)
        return None if usd is None else usd * self.count


@dataclass(frozen=True)
class Terms:
    """How machines are taken, reached and given back: nothing here can move the curve, everything can move the bill."""
    region: str | None = None                     # None: as the AWS environment says
    vpc: str | None = None                        # None: the default one
    ssh_cidr: str | None = None                   # who may reach port 22; None: the address this machine is seen at
    ssh_user: str | None = None                   # None: the image's
    image: str | None = None                      # ami-..., or an SSM parameter /aws/...; None: the stack's
    disk_gib: int = 200                           # of each machine's root volume
    wait: float = 10.0                            # minutes to go round the zones for spot capacity
    fallback: Literal["ondemand"] | None = None   # what follows when no zone has spot capacity
    budget: float | None = None                   # dollars that this run may ever cost; the machines hold it
    max_hours: float | None = None                # the most that a machine lives; None: twice the expected, plus two
    minutes_after_success: float = 10.0
    minutes_after_failure: float = 60.0
    skip_setup: bool = False                      # the image has the environment already
    yes: bool = False                             # do not ask
    detach: bool = False                          # return as soon as the training runs
    bucket: str | None = None                     # in S3, where the machines keep the run's folder
    data: str | None = None                       # in S3, where they fetch the recipe's data from
    role: str | None = None                       # an instance profile that is there; None: one of the run's own
    hosts: str | None = None                      # names as ssh takes them, or a file of such
    partition: str | None = None                  # of a Slurm cluster, as sbatch takes it; so the next two
    account: str | None = None
    time: str | None = None                       # limit of one start of the job
    container_image: str | None = None            # as pyxis takes it; so the next
    container_mounts: str | None = None
    sbatch: tuple[str, ...] = ()                  # further options of sbatch
    ray_address: str | None = None                # of a Ray's dashboard; None: RAY_ADDRESS, or a Ray started here
    storage_path: str | None = None               # where Ray keeps runs: a folder all nodes share, or a URI
    min_machines: int | None = None               # as few as a run on Ray goes on with; None: all of them
    ray: bool = False                             # Ray is started on the machines, and trains on them

    ONLY_FOR: ClassVar = {                        # the backends that have a use for them
        ("ssh",): ("hosts",),
        ("slurm",): ("partition", "account", "time", "container_image", "container_mounts", "sbatch"),
        ("ray",): ("ray_address", "storage_path", "min_machines"),
        ("aws", "ssh"): ("ray",),
    }

    @property
    def needs_s3(self) -> bool:
        return self.bucket is not None or self.data is not None

    def __post_init__(self):
        for name in ("wait", "minutes_after_success", "minutes_after_failure"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name):g}: a time is not negative")
        for name in ("budget", "max_hours", "disk_gib", "min_machines"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name):g}: it must be above 0")
        for name in ("bucket", "data"):
            if getattr(self, name) is not None:
                parse(getattr(self, name))
        if self.time is not None:
            slurm_minutes(self.time)
        if self.container_mounts and not self.container_image:
            raise ValueError("--container_mounts are for a container: which --container_image?")
        for name in ("partition", "account", "container_image", "container_mounts", "sbatch"):
            if re.search(r"[\n\r]", str("".join(getattr(self, name) or ""))):
                raise ValueError(f"--{name} has more than one line")
        if wrong := [option for option in self.sbatch if not option.startswith("-")]:
            raise ValueError(f"--sbatch takes an option of sbatch as it is, --sbatch=--qos=high; not {wrong[0]!r}")

    def given(self, *but: str) -> list[str]:
        """The flags that are not left at their defaults."""
        return [f"--{f.name}" for f in fields(self) if f.name not in but and getattr(self, f.name) != f.default]


def slurm_minutes(time: str) -> int:
    """A time limit as sbatch takes it, in minutes begun. Raises ValueError."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not form:
        raise ValueError(f"--time is {time!r}: Slurm takes minutes, hours:minutes:seconds or days-hours:minutes")
    days, *rest = form.groups()
    a, b, c = (int(x or 0) for x in rest)
    if days is None:                              # M, M:S or H:M:S
        hours, minutes, seconds = (a, b, c) if rest[2] is not None else (0, a, b)
    else:
        hours, minutes, seconds = a, b, c
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(f"--time is {time}: it must be above 0")
    return -(-total // 60)


@dataclass(frozen=True)
class Config:
    """One named line of configs.py: what to train, on what, and the published result it stands for."""
    recipe: Recipe
    machines: Machines
    group: str                                    # heading under which --help lists it
    about: str                                    # the result it reproduces and where that number comes from
    tokens_per_s: float | None = None             # published for exactly these machines; None: nobody said
    published_on: Machines | None = None          # these machines: it stays when a flag replaces `machines`

    def __post_init__(self):
        if self.published_on is None:
            object.__setattr__(self, "published_on", self.machines)
