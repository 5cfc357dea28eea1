"""A Ray cluster by its dashboard: the REST API of Ray Jobs, and two questions to the State API. Standard library only.

Ray's own client has no deadlines, and asks for a Ray here that fits the one there. This one sends what that sends.
Sources: docs.ray.io, "Ray Jobs REST API"; ray/dashboard/modules/state/state_head.py (nodes, logs) of Ray 2.60.
"""
from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 30
SILENCE_S = 20                                    # of a log that is followed, after which it is asked for again
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")        # states of a job that does not run any more
TOKEN_FILE = Path("~/.ray/auth_token")            # Ray's own place for it


class Trouble(Exception):
    """A dashboard does not do as asked. The message says which, why and what to do."""


class Silent(Trouble):
    """It does not answer at all; it may later."""


class NotFound(Trouble):
    """It does not know what it is asked for."""


@dataclass(frozen=True)
class RayNode:
    """One machine of a cluster, as Ray counts its resources."""
    cpus: float
    gpus: float


@dataclass(frozen=True)
class RayJob:
    """A job as the dashboard knows it."""
    id: str
    state: str
    message: str
    metadata: dict[str, str]
    node: str | None                              # where its driver runs, and its log lies
    exit_status: int | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Dashboard:
    """`address`: http://HOST:PORT. Every call raises Trouble."""

    def __init__(self, address: str, token: str | None = None):
        self.address, self._token = address, token

    def version(self) -> str:
        """Of the cluster's Ray."""
        try:
            return json.loads(self._ask("GET", "/api/version"))["ray_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise Trouble(f"What answers at {self.address} is not the dashboard of a Ray cluster.") from error

    def nodes(self) -> list[RayNode]:
        """Those that are alive."""
        answer = json.loads(self._ask("GET", "/api/v0/nodes?detail=1&limit=10000"))
        return [RayNode(node["resources_total"].get("CPU", 0), node["resources_total"].get("GPU", 0))
                for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def grows(self) -> bool:
        """Whether an autoscaler may bring more nodes."""
        status = json.loads(self._ask("GET", "/api/cluster_status"))["data"]["clusterStatus"] or {}
        return bool((status.get("autoscalerReport") or {}).get("nodeTypes")
                    or (status.get("autoscalingConfig") or {}).get("availableNodeTypes"))

    def jobs(self) -> list[RayJob]:
        return [_job(about) for about in json.loads(self._ask("GET", "/api/jobs/")) if about.get("submission_id")]

    def job(self, id: str) -> RayJob:
        return _job(json.loads(self._ask("GET", f"/api/jobs/{id}")))

    def submit(self, id: str, entrypoint: str, package: str, env: dict[str, str], metadata: dict[str, str]) -> None:
        """`package`: the name that upload() was given."""
        self._ask("POST", "/api/jobs/", json.dumps({
            "submission_id": id, "entrypoint": entrypoint, "metadata": metadata,
            "runtime_env": {"working_dir": f"gcs://{package}", "env_vars": env}}).encode(), "application/json")

    def upload(self, package: str, data: bytes) -> None:
        """A zip by its name, unless it is there."""
        try:
            self._ask("GET", f"/api/packages/gcs/{package}")
        except NotFound:
            self._ask("PUT", f"/api/packages/gcs/{package}", data, "application/zip")

    def stop(self, id: str) -> None:
        """SIGTERM to the job's driver; SIGKILL after the seconds that the job's RAY_JOB_STOP_WAIT_TIME_S says."""
        self._ask("POST", f"/api/jobs/{id}/stop", b"")

    def log(self, job: RayJob, follow: bool) -> Iterator[bytes]:
        """The job's log from its first byte, in pieces; with `follow` for as long as the dashboard goes on.

        A log that is followed and silent ends after SILENCE_S: the caller asks again, and skips what it has.
        """
        query = urllib.parse.urlencode({"node_id": job.node, "filename": f"job-driver-{job.id}.log", "lines": -1,
                                        **({"interval": 1} if follow else {})})
        kind = "stream" if follow else "file"
        try:
            with self._open("GET", f"/api/v0/logs/{kind}?{query}", timeout_s=SILENCE_S) as answer:
                while piece := answer.read1(1 << 16):
                    yield piece
        except TimeoutError:
            return
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str | None = None) -> bytes:
        try:
            with self._open(method, path, body, kind) as answer:
                return answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error

    def _open(self, method: str, path: str, body: bytes | None = None, kind: str | None = None,
              timeout_s: float = DEADLINE_S) -> Any:
        headers = ({"Authorization": f"Bearer {self._token}"} if self._token else {}) | (
            {"Content-Type": kind} if kind else {})
        request = urllib.request.Request(self.address + path, body, headers, method=method)
        opener = urllib.request.build_opener(_NoRedirect())
        try:
            return opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except urllib.error.URLError as error:
            raise self._silent(error.reason) from error

    def _refused(self, error: urllib.error.HTTPError) -> Trouble:
        said = error.read(400).decode(errors="replace").strip() or error.reason
        if error.code == 401:
            return Trouble(f"The cluster at {self.address} wants a token. Set RAY_AUTH_TOKEN, or put it into "
                           f"{TOKEN_FILE}. On its head node:  ray get-auth-token")
        if error.code == 403:
            return Trouble(f"The cluster at {self.address} does not take this token, from RAY_AUTH_TOKEN, "
                           f"RAY_AUTH_TOKEN_PATH or {TOKEN_FILE}. On its head node:  ray get-auth-token")
        if error.code == 404:
            return NotFound(f"{self.address} does not have what a Ray cluster has ({said}).")
        return Trouble(f"The cluster at {self.address} answered {error.code}: {said}")

    def _silent(self, error: Any) -> Silent:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Silent(f"No Ray dashboard answers at {self.address}: {why}. Is the cluster up, and its dashboard to be "
                      f"reached from here?  ssh -L 8265:localhost:8265 HEAD_NODE  makes it http://localhost:8265")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes where it was meant to go, or nowhere."""
    def redirect_request(self, *_: Any) -> None:
        return None


def token() -> str | None:
    """The token as Ray itself looks for it."""
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE).expanduser()
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None


def _job(about: dict[str, Any]) -> RayJob:
    return RayJob(about["submission_id"], about["status"], about.get("message") or "", about.get("metadata") or {},
                  about.get("driver_node_id"), about.get("driver_exit_code"))
