"""The backend `ray`: Ray Train's TorchTrainer, on a Ray cluster that is there or on one started here for the run.

A cluster that is there is named by --ray_address or RAY_ADDRESS, its dashboard's address; everything goes through
that, so no Ray is needed here and its version does not matter. The code travels with the job. Where the cluster keeps a
run is --storage_path: a folder that its nodes share, in which the run is `runs/NAME` as everywhere, or a URI like
s3://BUCKET/PREFIX, to which each checkpoint is copied. The run's small files come with the job's log (ray_job.py).
"""
from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import secrets
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import local, ray_keeper, run
from cluster.backends import Watch, Wish
from cluster.plan import Layout, Node, Plan, price
from cluster.ray_api import Dashboard, RayJob, RayNode, Trouble, token
from cluster.ray_job import Feed, RayTraining
from cluster.run import Broken, Refused, Standing, Stopped
from cluster.spec import LOCAL, Terms
from engine.files import write_whole
from engine.values import to_json

CHECKOUT = local.CHECKOUT
OLDEST = (2, 50)                                  # Ray Train's second version, by default, with all that is used of it
AT_LEAST = f"{OLDEST[0]}.{OLDEST[1]} or newer"
INSTALL = "pip install 'ray[default,train]'"
MAX_FAILURES = 3                                  # of ranks or nodes, that Ray Train recovers from
SAVE_S = 600                                      # for a training that was asked to stop, before Ray kills it
START_S = 180                                     # for a Ray on this machine to answer
BEGIN_S = 600                                     # for a job's driver to begin
HOME = "~/txl"                                    # on a cluster's nodes, where nothing else is said


@dataclass(frozen=True)
class Facts:
    """What a layout must know of a cluster."""
    address: str | None                           # None: a Ray of the run's own, on this machine
    here: local.Here
    version: str                                  # of Ray, there
    nodes: tuple[RayNode, ...] = ()
    grows: bool = False                           # an autoscaler may bring more


def survey(wish: Wish) -> Facts:
    """Looks at the cluster, or at this machine. Raises Refused."""
    least, count = wish.terms.min_machines, wish.config.machines.count
    if least is not None and least > count:
        raise Refused(f"--min_machines is {least}, and there {'is' if count == 1 else 'are'} {count} "
                      f"machine{'s' * (count > 1)}")
    if least is not None and wish.config.recipe.batch.size is None:
        raise Refused("--min_machines is for recipes whose batch does not depend on how many ranks there are: "
                      "--set recipe.batch.size=N")
    address = address_of(wish.terms)
    if address is None:
        return Facts(None, local.survey(wish), _ray_here())
    dashboard = Dashboard(address, token())
    try:
        version = dashboard.version()
        if _numbers(version) < OLDEST:
            raise Refused(f"The cluster at {address} runs Ray {version}; this needs {AT_LEAST}.")
        return Facts(address, local.survey(wish), version, tuple(dashboard.nodes()), dashboard.grows())
    except Trouble as error:
        raise Refused(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"The dashboard at {address} answers what this version does not understand: {error!r}") from error


def lay_out(wish: Wish, facts: Facts) -> Layout:
    """One job, whose driver asks Ray for the ranks. Raises Refused where the cluster can never hold them."""
    config, machines = wish.config, wish.config.machines
    if facts.address is None:
        alike = local.lay_out(wish, facts.here)
        env = {name: value for name, value in alike.nodes[0].env.items()
               if name not in ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")}
        ranks, on_gpus = alike.ranks, bool(alike.nodes[0].env["CUDA_VISIBLE_DEVICES"])
        where, address = alike.machines.replace("this machine: ", "a Ray of its own here: ", 1), "127.0.0.1"
        setup, python = f"none: {facts.here.python} as it is, with Ray {facts.version}", facts.here.python
    else:
        ranks, on_gpus = _ranks(wish, facts)
        env = {}
        where = (f"{ranks} {'GPU' if on_gpus else 'CPU'}{'s' * (ranks > 1)} of the Ray {facts.version} at "
                 f"{facts.address}: {len(facts.nodes)} node(s), {sum(node.cpus for node in facts.nodes):g} CPUs, "
                 f"{sum(node.gpus for node in facts.nodes):g} GPUs")
        address, python = facts.address, "python"
        setup = f"none: the cluster's own Python; the run is in {place_of(wish.terms)}/runs/{wish.name} there"
    uri = _is_uri(wish.terms.storage_path)
    job = job_of(wish, ranks, on_gpus, storage=wish.terms.storage_path if uri else None,
                 root=str(Path.cwd()) if facts.address is None else place_of(wish.terms))
    command = (python, "-m", "cluster.host.ray_driver")
    return Layout(nodes=(Node(0, address, ranks, env, command),), machines=where,
                  cost="$0 here" + ("" if machines.kind == LOCAL else f". The config's own machines, {price(config)}"),
                  setup=setup, notes=tuple(_notes(wish, facts, ranks, on_gpus)), facts=(facts, job),
                  standing=_standing_there(wish) if facts.address else None)


def job_of(wish: Wish | Plan, ranks: int, on_gpus: bool, *, root: str = HOME,
           storage: str | None = None) -> dict[str, Any]:
    """What the driver is told, but for the job's `id`. `root`: the folder of `runs` on the machines. Pure."""
    least, per_machine = wish.terms.min_machines, ranks // wish.config.machines.count
    return {
        "name": wish.name, "entry": wish.config.recipe.entry, "recipe": to_json(wish.config.recipe),
        "root": root, "storage": storage,
        "ranks": ranks, "per_machine": per_machine, "min_ranks": None if least is None else least * per_machine,
        "resources": {"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1}, "max_failures": MAX_FAILURES}


def apply(plan: Plan, watch: Watch) -> RayTraining:
    """Submits the run, or follows the job that it is already. Starts a Ray here where none was named."""
    facts, job = plan.layout.facts
    try:
        if facts.address is not None:
            return _submit_or_attach(plan, watch, Dashboard(facts.address, token()), job)
        return _here(plan, watch, job)
    except Trouble as error:
        raise Broken(f"{error}\nWhether a job was submitted is not known; the same command again finds out.") from error


def address_of(terms: Terms) -> str | None:
    """http://HOST:PORT of the dashboard that was named, if any. Raises Refused."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    said, text = next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", None))
    if terms.ray_address is not None:
        said, text = "--ray_address", terms.ray_address
    if text is None:
        return None
    if not re.fullmatch(r"https?://[^/\s]+/?", text):
        raise Refused(f"{said} is {text!r}. Give the dashboard's address, for example http://HEAD_NODE:8265"
                      + ("" if said.startswith("--") else ", or unset it for a Ray on this machine"))
    return text.rstrip("/")


def place_of(terms: Terms) -> str:
    """Where a cluster keeps the folder `runs`."""
    return HOME if _is_uri(terms.storage_path) else terms.storage_path or HOME


def package() -> tuple[str, bytes]:
    """The code as a zip, and its name, which is another for other code."""
    files = sorted(path for init in CHECKOUT.glob("*/__init__.py") if init.parent.name != "tests"
                   for path in init.parent.rglob("*.py"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            about = zipfile.ZipInfo(str(path.relative_to(CHECKOUT)))      # without times: the same code, the same name
            about.external_attr = 0o644 << 16
            archive.writestr(about, path.read_bytes())
    return f"txl_{hashlib.sha256(out.getvalue()).hexdigest()[:32]}.zip", out.getvalue()


def _here(plan: Plan, watch: Watch, job: dict[str, Any]) -> RayTraining:
    """On a Ray of the run's own."""
    about = run.read_json(plan.run_dir / "ray.json")
    if (pid := about.get("keeper")) and ray_keeper.alive(pid):
        with contextlib.suppress(OSError, ValueError, Trouble):
            dashboard = ray_keeper.dashboard(Path(about["temp"]))
            if (there := _newest(dashboard.jobs(), plan.name)) and not there.ended:
                _same(there, job)
                watch.say(f"It runs on the Ray that was started for it, {dashboard.address}: following.")
                return _training(plan, watch, dashboard, there.id, pid, begun=True)
        ray_keeper.end(pid)                       # its job has ended, or it never got one
    if temp := about.get("temp"):
        ray_keeper.sweep(Path(temp))
    local.refuse_if_running(plan.run_dir, plan.config.recipe.entry)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with local.lock(plan.run_dir) as held:
        run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, CHECKOUT)
        facts = plan.layout.facts[0]
        folder, keeper = ray_keeper.start(max(facts.here.cores, plan.layout.ranks), len(facts.here.gpus),
                                          (local.free_port(), local.free_port()), held)
        write_whole(plan.run_dir / "ray.json", json.dumps({"temp": str(folder), "keeper": keeper.pid}))
        os.truncate(held, 0)
        os.pwrite(held, f"Ray, kept by {keeper.pid}, started by {os.getpid()}".encode(), 0)
    try:                                          # from here on the keeper holds the lock
        dashboard = _answering(folder, keeper, watch)
        if plan.tensorboard:
            local.start_tensorboard(plan.run_dir, watch)
        watch.say(f"Ray {facts.version} is up; its dashboard, until the run ends: {dashboard.address}")
        return _submit(plan, watch, dashboard, job, 1, keeper.pid)
    except BaseException:
        ray_keeper.end(keeper.pid)
        raise


def _answering(folder: Path, keeper: Any, watch: Watch) -> Dashboard:
    dashboard, deadline = ray_keeper.dashboard(folder), time.monotonic() + START_S
    while True:
        with contextlib.suppress(Trouble):
            dashboard.version()
            if dashboard.nodes():
                return dashboard
        if watch.interrupted():
            raise Stopped("Nothing was started.")
        if keeper.poll() is not None or time.monotonic() > deadline:
            said = (folder / "log").read_text(errors="replace").splitlines()[-8:] if folder.exists() else []
            raise Refused("\n  ".join(["Ray did not start on this machine. Its last words:", *said]))
        time.sleep(.2)


def _submit_or_attach(plan: Plan, watch: Watch, dashboard: Dashboard, job: dict[str, Any]) -> RayTraining:
    """On a cluster that is there."""
    there = _newest(dashboard.jobs(), plan.name)
    if there is None or there.ended:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, CHECKOUT)
        return _submit(plan, watch, dashboard, job, 1 + _number(there), None)
    _same(there, job)
    watch.say(f"It runs as job {there.id}: following.")
    if not (plan.run_dir / "recipe.json").exists():
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, CHECKOUT)
    return _training(plan, watch, dashboard, there.id, None, begun=True)


def _submit(plan: Plan, watch: Watch, dashboard: Dashboard, job: dict[str, Any], number: int,
            keeper: int | None) -> RayTraining:
    id, (name, data) = f"txl-{plan.name}-{number}", package()
    about = plan.run_dir / "ray.json"
    write_whole(about, json.dumps(run.read_json(about) | {"id": id}))
    node = plan.layout.nodes[0]
    dashboard.upload(name, data)
    dashboard.submit(id, " ".join(["exec", *node.command]), name, node.env | {
        "TXL_RAY_JOB": json.dumps(job | {"id": id}), "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_V2_ENABLED": "1", "PYTHONUNBUFFERED": "1"}, _label(plan.name, job))
    return _training(plan, watch, dashboard, id, keeper, begun=False)


def _training(plan: Plan, watch: Watch, dashboard: Dashboard, id: str, keeper: int | None, begun: bool) -> RayTraining:
    """Once its driver has begun. Raises Refused where that finds that it cannot."""
    feed = Feed(plan.run_dir, f"{id} at {dashboard.address}", watch.say)
    stop = plan.run_dir / "stop"

    def ask() -> None:
        if keeper is not None:
            stop.touch()
            return
        try:
            dashboard.stop(id)
        except Trouble as error:
            raise OSError(str(error)) from error

    def kill() -> None:
        if keeper is not None:
            ray_keeper.end(keeper)
            return
        with contextlib.suppress(Trouble):
            dashboard.stop(id)
            name, data = package()
            dashboard.upload(name, data)
            dashboard.submit(f"{id}-kill-{secrets.token_hex(4)}", f"exec python -m cluster.host.ray_driver kill {id}",
                             name, {}, {})

    def close() -> None:
        if keeper is None and not any(plan.run_dir.glob("checkpoints/*/model.pt")):
            watch.say(f"Its checkpoints are in {plan.terms.storage_path or HOME} on the cluster.")
        if keeper is not None:
            with contextlib.suppress(OSError):    # an unheard request, on which a later trainer would stop at once
                stop.unlink()
            ray_keeper.end(keeper)

    training = RayTraining(plan.run_dir, dashboard, id, feed, stopper=ask, killer=kill, closer=close,
                           there=lambda: keeper is None or ray_keeper.alive(keeper))
    deadline = time.monotonic() + BEGIN_S
    while not begun and not feed.begun:
        if training.poll() is not None and not feed.begun:
            said = (plan.run_dir / "logs" / "node-0.log").read_text(errors="replace").split(run.LAUNCHED)[-1]
            raise Refused(feed.refused or "\n  ".join([f"The job {id} ended before its training began. Its last words:",
                                                       *said.splitlines()[-8:]]))
        if watch.interrupted() or time.monotonic() > deadline:
            kill()
            raise Stopped("Nothing was started.") if watch.interrupted() else Broken(
                f"The job {id} did not begin in {BEGIN_S:g} s and is stopped. {training.pending}")
        time.sleep(.1)
    return training


def _ranks(wish: Wish, facts: Facts) -> tuple[int, bool]:
    """How many, and whether on GPUs. Raises Refused where the cluster can never hold them."""
    machines, size = wish.config.machines, wish.config.recipe.batch.size
    per_machine = machines.gpus_per_machine
    if per_machine is None:                       # of this machine, or of an unknown kind: what the cluster has
        per_machine = int(max((node.gpus for node in facts.nodes), default=0))
    if size is not None:
        per_machine = min(per_machine, size // machines.count)            # no rank without a sequence
    ranks = machines.count * max(1, per_machine)
    kind, there = ("GPU", sum(int(node.gpus) for node in facts.nodes)) if per_machine else \
        ("CPU", sum(int(node.cpus) for node in facts.nodes))
    least = ranks if wish.terms.min_machines is None else wish.terms.min_machines * max(1, per_machine)
    if there < least and not facts.grows:
        raise Refused(f"{wish.name} wants {least} {kind}(s), and the cluster at {facts.address} has {there} on "
                      f"{len(facts.nodes)} node(s). Take fewer --machines"
                      + (", or --instance_type=local for what it has" if machines.kind != LOCAL else ""))
    return ranks, bool(per_machine)


def _notes(wish: Wish, facts: Facts, ranks: int, on_gpus: bool) -> Iterator[str]:
    machines, recipe, terms = wish.config.machines, wish.config.recipe, wish.terms
    asked = machines.gpus_per_machine
    if asked and machines.count * asked != ranks and recipe.batch.size is None:
        yield f"{ranks} ranks instead of {machines.count * asked}: a smaller batch, and with it another curve."
    if not on_gpus and recipe.precision in ("fp16", "tf32"):
        yield f"{recipe.precision} is for GPUs. On a processor take --set recipe.precision=fp32"
    if terms.min_machines is not None:
        yield (f"elastic: it goes on with {terms.min_machines} to {machines.count} machines, as many as there are; "
               f"memories start empty at each change")
    if facts.address is None and machines.kind != LOCAL:
        yield f"for a Ray on {machines.count} x {machines.kind} of AWS:  --backend=aws --ray"
    if facts.address is None and terms.storage_path and not _is_uri(terms.storage_path):
        yield "without effect on a Ray of its own: --storage_path, as the run is in runs/ here"
    if idle := terms.given("skip_setup", "yes", "detach", *Terms.ONLY_FOR["ray",]):
        yield f"without effect on Ray: {', '.join(idle)}"


def _standing_there(wish: Wish) -> Standing | None:
    """Where the checkpoints stayed on the cluster: what their meta.json here says."""
    if wish.standing.state != "unfinished" or wish.standing.step is not None:
        return None
    newest = run.newest_elsewhere(Path("runs", wish.name))
    return replace(wish.standing, step=newest["step"], ranks=newest["ranks"], place="the cluster") if newest else None


def _newest(jobs: list[RayJob], name: str) -> RayJob | None:
    return max((job for job in jobs if job.metadata.get("txl") == name), key=_number, default=None)


def _number(job: RayJob | None) -> int:
    return int(job.id.rpartition("-")[2]) if job else 0


def _label(name: str, job: dict[str, Any]) -> dict[str, str]:
    """A job's metadata: by it a launch knows its run, and another one of the same name."""
    curve = {key: value for key, value in job["recipe"].items() if key != "clock"}
    return {"txl": name, "recipe": hashlib.sha256(json.dumps(curve, sort_keys=True).encode()).hexdigest()[:16],
            "by": f"{getpass.getuser()} on {platform.node()}"}


def _same(there: RayJob, job: dict[str, Any]) -> None:
    if there.metadata.get("recipe") != _label(job["name"], job)["recipe"]:
        raise Refused(f"{there.id} runs on the cluster with another recipe, by {there.metadata.get('by')}. Choose "
                      f"another --name")


def _ray_here() -> str:
    """The version of this Python's Ray. Raises Refused without one that will do."""
    missing = [name for name in ("ray", "aiohttp", "pyarrow", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"{sys.executable} has no {', '.join(missing)}, which a Ray on this machine needs:  {INSTALL}\n"
                      f"On a cluster that is there:  --ray_address=http://HEAD_NODE:8265")
    version = importlib.metadata.version("ray")
    if _numbers(version) < OLDEST:
        raise Refused(f"{sys.executable} has Ray {version}; this needs {AT_LEAST}:  {INSTALL}")
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _is_uri(place: str | None) -> bool:
    return "://" in (place or "")

