"""StrictEc2: an endpoint on loopback that behaves as EC2 documents, by moto where moto does, by actions.py where not.

Every request is written down in `calls`, and any can be made to fail by `fail`. STS, SSM, S3, IAM and the others are
moto's, but for public image parameters (SSM) and price lists, which it has not.
"""
from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from moto.core import DEFAULT_ACCOUNT_ID
from moto.core.base_backend import BackendDict
from moto.core.request import Request
from moto.core.routing import get_service_router
from moto.ec2.models import ec2_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from cluster.rehearsal.actions import IMAGES, Actions, PlacementGroup, price_list
from cluster.rehearsal.roles import ALLOWED_AS, PATH, Roles
from cluster.rehearsal.world import NoPower, Power, Refusal, World

TICK_S = 0.05
LOST = "ConnectionLost"                           # a call's `code` where it was done and the reply did not arrive
SCOPE = re.compile(r"Credential=(?P<key>[^/]+)/\d+/(?P<region>[^/]+)/(?P<service>[^/]+)/")


class Call(NamedTuple):
    """A request. `params` is flat for EC2 ("Placement.GroupName"), the JSON body for services that speak JSON; for S3
    the query with Bucket and Key. `action` as policies call it, so HeadObject is GetObject."""
    action: str                                   # RunInstances
    service: str                                  # ec2
    params: dict[str, Any]
    code: str | None                              # of the error that was answered
    machine: str | None = None                    # whose role asked; None: a user


@dataclass
class Fault:
    action: str
    code: str
    times: float
    status: int
    message: str
    when: Callable[[dict[str, Any]], bool]
    hang_s: float | None
    after: bool
    every: int
    seen: int = 0

    def strikes(self, action: str, params: dict[str, Any]) -> bool:
        if self.times <= 0 or self.action not in (action, "*") or not self.when(params):
            return False
        self.seen += 1
        if self.seen % self.every:
            return False
        self.times -= 1
        return True


class StrictEc2:
    """A context manager. moto's records are the process's own, so only one at a time; entering empties them.

    `backend` is its records of EC2 in the region: of images, only those that were asked for by a parameter's name.
    """

    def __init__(self, region: str = "us-east-1", power: Power | None = None):
        self.region = region
        self.world = World(power or NoPower())
        self.calls: list[Call] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.groups: dict[str, PlacementGroup] = {}
        self.roles = Roles(self.world)
        self._actions: type[Actions] = type("BenchActions", (Actions,), {
            "world": self.world, "groups": self.groups, "launches": {}})
        self._over = threading.Event()

    def __enter__(self) -> StrictEc2:
        ec2_backends.clear()                      # or reset() first makes EC2's 1300 images anew, to forget them
        BackendDict.reset()
        os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"            # read as the records are made, here
        try:
            self.backend = ec2_backends[DEFAULT_ACCOUNT_ID][self.region]
        finally:
            del os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"]
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        self._threads = [threading.Thread(target=self._server.serve_forever, args=(TICK_S,), daemon=True),
                         threading.Thread(target=self._ticks, daemon=True)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, action: str, code: str = "InternalError", *, times: float = 1, status: int = 400,
             message: str = "of the rehearsal", when: Callable[[dict[str, Any]], bool] = lambda params: True,
             hang_s: float | None = None, after: bool = False, every: int = 1) -> None:
        """Let the next `times` requests for `action` ("*": any) that `when` agrees to, or every n-th of them, fail.

        `hang_s` waits first; `after` does what was asked and then closes the connection without a reply.
        """
        with self.lock:
            self._faults.append(Fault(action, code, times, status, message, when, hang_s, after, every))

    def heal(self) -> None:
        """Forget all faults."""
        with self.lock:
            self._faults.clear()

    def count(self, action: str) -> int:
        return sum(call.action == action for call in self.calls)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        request = _Request(environ)
        if request.path.startswith(PATH):
            with self.lock:
                status, text = self.roles.metadata(request.method, request.path, request.headers)
            return Response(text, status, content_type="text/plain")(environ, start_response)
        scope = SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
        service, key = (scope["service"], scope["key"]) if scope else ("", "")
        machine = self.roles.machine_of(key)
        action, params = _named(service, request, body)
        environ["wsgi.input"] = io.BytesIO(body)              # read above
        with self.lock:
            fault = next((fault for fault in self._faults if fault.strikes(action, params)), None)
        if fault and fault.hang_s:
            self._over.wait(fault.hang_s)
        try:
            if fault and not fault.after:
                raise Refusal(fault.code, fault.message, fault.status)
            if machine:
                self._check(service, key, action, params, environ)
            reply, code = self._reply(service, action, params, request, environ)
            if machine and code and reply.status_code == 404:         # who may not list is not told what is not there
                self.roles.check(key, environ["HTTP_X_AMZ_SECURITY_TOKEN"], "ListBucket", {"Bucket": params["Bucket"]})
        except Refusal as refusal:
            reply, code = _error(service, refusal), refusal.code
        if fault and fault.after:
            self.calls.append(Call(action, service, params, LOST, machine))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        self.calls.append(Call(action, service, params, code, machine))
        return reply(environ, start_response)

    def _check(self, service: str, key: str, action: str, params: dict[str, Any], environ: dict[str, Any]) -> None:
        """A machine's role is for S3 alone."""
        if service != "s3":
            raise Refusal("UnauthorizedOperation" if service == "ec2" else "AccessDenied",
                          "You are not authorized to perform this operation.", 403)
        with self.lock:
            self.roles.check(key, environ.get("HTTP_X_AMZ_SECURITY_TOKEN", ""), action, params)

    def _reply(self, service: str, action: str, params: dict[str, Any], request: Request,
               environ: dict[str, Any]) -> tuple[Response, str | None]:
        if service == "ec2":
            with self.lock:
                self.world.tick()
                return self._ec2(action, request)
        if service == "pricing" and action == "GetProducts":
            return _json(price_list(params, self.region)), None
        if service == "ssm" and action in ("GetParameter", "GetParameters") and self._public_images(params):
            return self._parameters(action, params), None
        response = Response.from_app(self._moto, environ)
        return response, _code(response)

    def _ec2(self, action: str, request: Request) -> tuple[Response, str | None]:
        try:
            status, headers, content = self._actions.dispatch(request)
        except (NotImplementedError, HTTPException) as error:
            raise Refusal("InvalidAction", f"The action {action} is not valid for this web service. (No part of the "
                                           f"rehearsal: {error})") from error
        response = Response(content, status, headers)
        return response, _code(response)

    def _public_images(self, params: dict[str, Any]) -> bool:
        names = params.get("Names") or [params.get("Name", "")]
        return all(name.startswith(tuple(IMAGES)) for name in names)

    def _parameters(self, action: str, params: dict[str, Any]) -> Response:
        with self.lock:
            actions = self._actions()
            actions.current_account, actions.region = DEFAULT_ACCOUNT_ID, self.region
            found = [{"Name": name, "Type": "String", "Version": 1, "DataType": "aws:ec2:image",
                      "ARN": f"arn:aws:ssm:{self.region}::parameter{name}", "Value": actions.public_image(name)}
                     for name in params.get("Names") or [params["Name"]]]
        return _json({"Parameter": found[0]} if action == "GetParameter" else
                     {"Parameters": found, "InvalidParameters": []})

    def _ticks(self) -> None:
        while not self._over.wait(TICK_S):
            with self.lock:
                self.world.tick()


class _Request(Request):
    from_wsgi_server = True                       # so that moto leaves the Date header to the server


class _Quiet(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        """`calls` is the log."""


def _named(service: str, request: Request, body: bytes) -> tuple[str, dict[str, Any]]:
    """What a request asks for, as the IAM of its service calls it, and with which parameters."""
    if service == "s3":                           # whose bodies are files
        bucket, _, name = request.path.removeprefix("/").partition("/")
        action = str(get_service_router(service).match(request)[0].name)
        return ALLOWED_AS.get(action, action), {**request.args.to_dict(), "Bucket": bucket, "Key": name}
    form = request.values.to_dict()
    if body.startswith(b"{"):
        form = json.loads(body)
    try:
        return get_service_router(service).match(request)[0].name, form
    except Exception:                             # moto knows no such service, or the service no such operation
        return form.get("Action", "") or request.headers.get("X-Amz-Target", "").rpartition(".")[2], form


def _code(response: Response) -> str | None:
    if response.status_code < 400:
        return None
    found = re.search(r'<Code>([^<]+)</Code>|"__type": ?"([^"]+)"', response.get_data(as_text=True))
    return next(filter(None, found.groups())) if found else str(response.status_code)


def _error(service: str, refusal: Refusal) -> Response:
    """As the service would say it."""
    said = f"<Code>{refusal.code}</Code><Message>{escape(refusal.message)}</Message>"
    if service == "ec2":
        xml = f"<Response><Errors><Error>{said}</Error></Errors><RequestID>rehearsal</RequestID></Response>"
    elif service == "s3":
        xml = f"<Error>{said}</Error>"
    elif service in ("sts", "iam"):
        xml = f"<ErrorResponse><Error>{said}</Error></ErrorResponse>"
    else:
        return _json({"__type": refusal.code, "message": refusal.message}, refusal.status)
    return Response(xml, refusal.status, content_type="text/xml")


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status, content_type="application/x-amz-json-1.1")
