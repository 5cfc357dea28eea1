"""What a rehearsal's machines may do: credentials of their role from a metadata service, and S3 checked against it.

As documented: IMDSv2 only, credentials only where the machine has an instance profile whose role EC2 may take on, and
nothing that the role's inline policy does not allow. What such a policy can say beyond that is not understood here.
"""
from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from werkzeug.datastructures import Headers

from cluster.rehearsal.world import Machine, Refusal, World

PATH = "/imds/"                                   # before a machine's ID
CREDENTIALS = "latest/meta-data/iam/security-credentials/"
# S3's operations that are allowed under another name.
ALLOWED_AS = {"HeadBucket": "ListBucket", "ListObjects": "ListBucket", "ListObjectsV2": "ListBucket",
              "HeadObject": "GetObject", "CreateMultipartUpload": "PutObject", "UploadPart": "PutObject",
              "CompleteMultipartUpload": "PutObject", "DeleteObjects": "DeleteObject"}


@dataclass(frozen=True)
class Keys:
    """What a machine's metadata service gave out."""
    machine: str
    secret: str
    token: str


class Roles:
    def __init__(self, world: World):
        self._world = world
        self._sessions: dict[str, str] = {}       # of the metadata service: token to machine
        self._issued: dict[str, Keys] = {}        # by access key ID

    def metadata(self, method: str, path: str, headers: Headers) -> tuple[int, str]:
        """Status and text. `path`: of the request, /imds/i-…/latest/…"""
        id, _, asked = path.removeprefix(PATH).partition("/")
        machine = self._world.machines.get(id)
        if machine is None:
            return 404, ""
        if (method, asked) == ("PUT", "latest/api/token"):
            if not headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
                return 400, ""
            session = secrets.token_urlsafe(24)
            self._sessions[session] = id
            return 200, session
        if method != "GET" or self._sessions.get(headers.get("X-aws-ec2-metadata-token", "")) != id:
            return 401, ""
        asked, role = asked.rstrip("/"), self._role(machine)
        known = {"latest/meta-data/placement/availability-zone": machine.zone,
                 "latest/meta-data/placement/region": machine.zone[:-1], "latest/meta-data/instance-id": id}
        if role:
            known |= {CREDENTIALS.rstrip("/"): role.name, CREDENTIALS + role.name: self._credentials(machine)}
        return (200, known[asked]) if asked in known else (404, "")

    def machine_of(self, key_id: str) -> str | None:
        """Whose access key it is; None: of nobody who has it from here."""
        return self._issued[key_id].machine if key_id in self._issued else None

    def check(self, key_id: str, token: str, action: str, params: Mapping[str, Any]) -> None:
        """Raises Refusal where the machine with these keys may not do this in S3."""
        keys = self._issued[key_id]
        if token != keys.token:
            raise Refusal("InvalidToken", "The provided token is malformed or otherwise invalid.")
        role = self._role(self._world.machines[keys.machine])
        statements = [x for text in role.policies.values() for x in json.loads(text)["Statement"]] if role else []
        if not any(allows(statement, action, params) for statement in statements):
            raise Refusal("AccessDenied", f"{keys.machine} is not authorized to perform: s3:{action} on resource: "
                                          f"{_arn(action, params)}", 403)

    def _role(self, machine: Machine) -> Any:
        """Of its instance profile, as it is now; None without one that EC2 may take on."""
        profile = profile_named(machine.profile) if machine.profile else None
        role = profile.roles[0] if profile and profile.roles else None
        return role if role and "ec2.amazonaws.com" in role.assume_role_policy_document else None

    def _credentials(self, machine: Machine) -> str:
        key_id = "ASIA" + hashlib.sha256(machine.id.encode()).hexdigest()[:16].upper()
        keys = self._issued.setdefault(key_id, Keys(machine.id, secrets.token_urlsafe(30), secrets.token_urlsafe(60)))
        now = datetime.now(timezone.utc)
        return json.dumps({"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                           "AccessKeyId": key_id, "SecretAccessKey": keys.secret, "Token": keys.token,
                           "Expiration": f"{now + timedelta(hours=6):%Y-%m-%dT%H:%M:%SZ}"})


def profile_named(name: str) -> Any:
    """moto's record of an instance profile; None where there is none."""
    profiles = iam_backends[DEFAULT_ACCOUNT_ID]["aws"].instance_profiles.values()
    return next((x for x in profiles if x.name == name), None)


def role_names() -> list[str]:
    return [role.name for role in iam_backends[DEFAULT_ACCOUNT_ID]["aws"].roles.values()]


def allows(statement: Mapping[str, Any], action: str, params: Mapping[str, Any]) -> bool:
    """Whether a statement of a policy allows it. Raises Refusal where it says what is not understood here."""
    if statement["Effect"] != "Allow" or not statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}:
        raise Refusal("NotImplemented", f"A rehearsal does not understand {json.dumps(dict(statement))}", 501)
    for operator, tests in statement.get("Condition", {}).items():
        if (operator, [*tests]) != ("StringLike", ["s3:prefix"]):
            raise Refusal("NotImplemented", f"A rehearsal does not understand the condition {operator} {tests}", 501)
        if "prefix" not in params or not _matches(tests["s3:prefix"], params["prefix"]):
            return False
    return _matches(statement["Action"], f"s3:{action}") and _matches(statement["Resource"], _arn(action, params))


def _arn(action: str, params: Mapping[str, Any]) -> str:
    return f"arn:aws:s3:::{params.get('Bucket', '')}" + (f"/{params.get('Key', '')}" if action != "ListBucket" else "")


def _matches(patterns: str | list[str], text: str) -> bool:
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text, re.DOTALL)
               for pattern in ([patterns] if isinstance(patterns, str) else patterns))
