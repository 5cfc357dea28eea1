"""What machines that answer are given, up to running supervisors: code, environment, data, and the run so far.

The same for all machines that are reached by SSH. What is large leaves here once, and node 0 once for each of the rest.
"""
from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import among, bucket, deliver, ray_gang, reach, run, ssh
from cluster.backends import Watch, Wish
from cluster.deliver import Copy
from cluster.local import CHECKOUT
from cluster.plan import Node, Plan, torchrun
from cluster.run import Broken
from cluster.ssh import NAME, Shell

PREPARE_S = 3 * 3600                              # for data to be downloaded and encoded


@dataclass(frozen=True)
class Ground:
    """What a backend knows of its machines."""
    torch: str                                    # to install where there is none that will do
    index_url: str | None                         # from there; None: pip's own
    region: str | None = None                     # of AWS
    first_alone: bool = False                     # only node 0 has a way out, to S3 too


def node_command(wish: Wish | Plan, node: int, ranks: int, python: str, address: str, master: str) -> tuple[str, ...]:
    """What the supervisor of a node starts, in ~/txl. `address`: its own among the machines, `master`: node 0's."""
    port = run.port_of(wish.name, run.MASTER)
    if wish.terms.ray:
        return ray_gang.command(python, wish.name, node, address, master, port)
    return torchrun(python, wish.config.recipe.entry, Path("runs", wish.name, "recipe.json"), ranks=ranks,
                    nnodes=wish.config.machines.count, node_rank=node, master_addr=master, master_port=port)


def place_of(plan: Plan) -> bucket.Place | None:
    """Where the run is kept in S3."""
    return bucket.parse(plan.terms.bucket) / plan.name if plan.terms.bucket else None


def pages(plan: Plan) -> dict[str, int]:
    """What there is to see on node 0's loopback, and at which port."""
    return ({"TensorBoard": run.port_of(plan.name, run.TENSORBOARD)} if plan.tensorboard else {}) | (
        {"Ray's dashboard": run.port_of(plan.name, run.RAY_DASHBOARD)} if plan.terms.ray else {})


class Outfit:
    """Of a plan's machines, where shell i is node i's. The methods raise Trouble, Broken and Interrupted."""

    def __init__(self, plan: Plan, shells: Sequence[Shell], ground: Ground, watch: Watch):
        self.plan, self.shells, self.ground, self.watch = plan, shells, ground, watch
        self.place, self.say, self.interrupted = place_of(plan), watch.say, watch.interrupted

    def at_work(self) -> str | None:
        """The launch that trains there already, or has finished there; None where one must be started.

        The rest of a training that has failed elsewhere is ended.
        """
        run_dir = f"{deliver.HOME}/{self.plan.run_dir.as_posix()}"
        script = (f"cd {run_dir} 2>/dev/null || exit 0; cat nodes/$node.json; echo; "
                  f"flock -n nodes/$node.lock true && echo idle || echo busy; cat status.json 2>/dev/null; echo")
        said = [answer.out.splitlines() for answer in among.run(self.shells, script)]
        nodes = [run.parse_json(lines[0]) if lines else {} for lines in said]
        launches = {node.get("launch", "") for node in nodes}
        busy = [len(lines) > 1 and lines[1] == "busy" for lines in said]
        finished = len(said[0]) > 2 and run.parse_json(said[0][2]).get("state") == "finished"
        if len(launches) == 1 and "" not in launches and (all(busy) or (finished and not any(busy))):
            self.say("It is training there already: following it." if all(busy) else "It has finished there.")
            return launches.pop()

        def end(i: int) -> None:
            self.shells[i].run(f"touch {run_dir}/nodes/{i}.kill; flock -w 20 {run_dir}/nodes/{i}.lock true")

        ssh.each([i for i, still in enumerate(busy) if still], end, name=self._name)
        return None

    def start(self) -> str:
        """Everything there, then all supervisors at once. Returns the launch that they work for."""
        plan, say = self.plan, self.say
        run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, CHECKOUT)
        self.shells = among.introduce(self.shells, self.interrupted)
        with reach.holding(self.shells):
            python = self._brought()
            if plan.standing.place:               # what is there already stays: the further one comes first
                say(f"The run is further in {self.place} than here: the machines fetch step {plan.standing.step}.")
                self._bring_kept(python)
                self._bring_run()
            else:
                self._bring_run()
                self._bring_kept(python)
            say("Starting the training.")
            launch = uuid.uuid4().hex[:12]
            reach.start(self.shells, plan.run_dir.as_posix(), [self._launch(launch, node, python) for node in
                                                               plan.layout.nodes], self._records(launch),
                        interrupted=self.interrupted)
        return launch

    def _brought(self) -> str:
        """Code, environment and data. Returns the Python to train with."""
        terms, interrupted, missing = self.plan.terms, self.interrupted, self._missing()
        wanted = reach.environment(
            self.ground.torch, self.ground.index_url,
            "".join((CHECKOUT / f"requirements{of}.txt").read_text() for of in ("", "-launch")),
            more=(*(("boto3",) if terms.needs_s3 else ()), *(ray_gang.PACKAGES if terms.ray else ())))
        here = [path for path in self._inputs() if path.exists()]
        python = ""

        def made() -> list[Copy]:
            nonlocal python
            self.say("Checking the environment.")
            python = reach.provide(self.shells[0], wanted, skip=terms.skip_setup, say=self.say, interrupted=interrupted)
            if missing:
                self._prepare(missing, python)
            if fetched := self.ground.first_alone and self._fetched():
                self._fetch(fetched, python)
            if others := len(self.shells) - 1:
                self.say(f"Copying all of it to {others} more.")
            return [*wanted.copies(python), *map(deliver.below_code, [*missing, *([fetched] if fetched else [])])]

        self.say(" ".join(["Bringing the code", *(f"and {path}" for path in here)]) + ".")
        deliver.bring(self.shells, [deliver.code(CHECKOUT), *map(self._goods, here)], made=made, say=self.say,
                      interrupted=interrupted)
        python = reach.everywhere(self.shells, wanted, python, skip=terms.skip_setup, say=self.say,
                                  interrupted=interrupted)
        if not self.ground.first_alone and (path := self._fetched()):
            self._fetch(path, python)
        return python

    def _inputs(self) -> list[Path]:
        """Data, and weights to start from, that come from here or are made there."""
        paths = [Path(path) for path in self.plan.config.recipe.inputs]
        for path in paths:
            if path.is_absolute():
                raise Broken(f"{path} is an absolute path, which machines do not share. Give one below {Path.cwd()}")
        return paths[1:] if self.plan.terms.data else paths

    def _missing(self) -> list[Path]:
        """Of the inputs, which node 0 makes: it has a way to where they are published."""
        recipe = self.plan.config.recipe
        others = *recipe.given, recipe.init_from, recipe.init_under
        missing = [path for path in self._inputs() if not path.exists() and str(path) not in others]
        return missing if recipe.prepare else []  # weights to start from are no matter to a run that goes on

    def _prepare(self, missing: Sequence[Path], python: str) -> None:
        first = self.shells[0]
        self.say(f"{', '.join(map(str, missing))} is not here: made on {first.name}.")
        first.run(f"cd {deliver.HOME} && {shlex.join([python, *(self.plan.config.recipe.prepare or ())])}",
                  timeout_s=PREPARE_S, tied=True, interrupted=self.interrupted)

    def _fetched(self) -> Path | None:
        """The folder of the data, where that comes from S3."""
        return Path(self.plan.config.recipe.inputs[0]) if self.plan.terms.data else None

    def _fetch(self, path: Path, python: str) -> None:
        data = self.plan.terms.data
        self.say(f"Fetching {path} from {data}.")
        self._on_s3([[python, "-m", "cluster.host.bucket", "fetch", str(data), path.as_posix()]] * len(self.shells))

    def _goods(self, path: Path) -> deliver.Parcel:
        return deliver.goods(path, f"{deliver.HOME}/{path if path.is_dir() else path.parent}")

    def _bring_kept(self, python: str) -> None:
        """From the bucket: the run's logs, to go on, and whole checkpoints that the machines have not."""
        if self.place:
            self._on_s3([self._in_bucket("resume", node, python) for node in self.plan.layout.nodes])

    def _bring_run(self) -> None:
        """What is here of the run, where the machines have none of it: they go on with its numbers and logs."""
        run_dir, newest = self.plan.run_dir, self.plan.standing.step
        if self.plan.standing.state == "new":
            return
        there = self.shells[0].run(f"ls {deliver.HOME}/{run_dir}/checkpoints 2>/dev/null", check=False).out.split()
        if newest is not None and not [name for name in there if name >= f"step-{newest:08d}"]:
            deliver.bring(self.shells, [self._goods(folder) for folder in run.newest_and_best(run_dir)], say=self.say,
                          interrupted=self.interrupted)

        def bring(node: Node) -> None:
            ranks = range(node.rank * node.ranks, (node.rank + 1) * node.ranks)
            reach.bring(self.shells[node.rank], run_dir, f"{deliver.HOME}/{run_dir}",
                        [f"node-{node.rank}.log", *(f"rank-{rank}.log" for rank in ranks)], rest=node.rank == 0,
                        interrupted=self.interrupted)

        ssh.each(self.plan.layout.nodes, bring, name=lambda node: self._name(node.rank))

    def _launch(self, launch: str, node: Node, python: str) -> dict[str, Any]:
        """What a supervisor is told (docs/aws.md)."""
        private = [shell.host.private if shell.host else shell.name for shell in self.shells]
        board = [python, "-m", "tensorboard.main", f"--logdir={self.plan.run_dir}", "--host=127.0.0.1",
                 f"--port={run.port_of(self.plan.name, run.TENSORBOARD)}"]
        command = node_command(self.plan, node.rank, node.ranks, python, private[node.rank], private[0])
        return {"launch": launch, "command": list(command), "env": node.env | self._s3_env(),
                "private": private[node.rank],
                "tensorboard": board if self.plan.tensorboard and node.rank == 0 else None,
                "mirror": self._in_bucket("mirror", node, python) if self.place and self._reaches_s3(node) else None}

    def _records(self, launch: str) -> dict[str, str]:
        """Files of the run's folder that the machines must have: the recipe, and for the bucket how it came about."""
        names = ("recipe.json", "plan.txt", "command.txt", "commit.txt") if self.place else ("recipe.json",)
        records = {(self.plan.run_dir / name).as_posix(): (self.plan.run_dir / name).read_text() for name in names}
        return records | (ray_gang.told(self.plan, self.plan.layout.ranks, launch) if self.plan.terms.ray else {})

    def _s3_env(self) -> dict[str, str]:
        """What leads programs on the machines to S3. Their credentials come from their role."""
        if not self.plan.terms.needs_s3:
            return {}
        here = {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3") if name in os.environ}
        return {"AWS_DEFAULT_REGION": str(self.ground.region)} | here

    def _in_bucket(self, verb: str, node: Node, python: str) -> list[str]:
        """The command, in ~/txl, for a node's part of the run's folder."""
        return [python, "-m", "cluster.host.bucket", verb, self.plan.run_dir.as_posix(), str(self.place),
                f"--node={node.rank}", f"--ranks={node.ranks}"]

    def _on_s3(self, commands: Sequence[Sequence[str]]) -> None:
        """Command i on machine i, in ~/txl, where that reaches S3."""
        env = [f"{name}={value}" for name, value in self._s3_env().items()]
        shells = [self.shells[node.rank] for node in self.plan.layout.nodes if self._reaches_s3(node)]
        ssh.each(list(zip(shells, commands)), lambda one: one[0].run(
            f"cd {deliver.HOME} && {shlex.join(['env', *env, *one[1]])}", timeout_s=ssh.COPY_S, tied=True,
            interrupted=self.interrupted), name=lambda one: NAME(one[0]))

    def _reaches_s3(self, node: Node) -> bool:
        """Without a public address a machine would need an endpoint or a NAT of the network's."""
        return node.rank == 0 or not self.ground.first_alone

    def _name(self, node: int) -> str:
        return self.shells[node].name
