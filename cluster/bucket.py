"""A run's place in S3: its name, what a machine's role may do there, and how far the run is by what is there.

The machines read and write it themselves, by host/bucket.py. boto3 is only loaded by cluster/ec2.py.
"""
from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import run
from cluster.run import Refused, Standing
from engine.config import Recipe

if TYPE_CHECKING:
    from cluster.ec2 import Cloud

NAME = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"        # of a bucket
KEY = r"[A-Za-z0-9!_.'()=+@,-]+"                  # a step of a prefix: nothing that policies take for a pattern


@dataclass(frozen=True)
class Place:
    """A folder in S3."""
    bucket: str
    prefix: str = ""                              # without a slash at its ends; "": all of the bucket

    def __str__(self) -> str:
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def __truediv__(self, name: str) -> Place:
        return Place(self.bucket, self.key(name))

    def key(self, path: str = "") -> str:
        """Of a file in it; of the folder itself what every key in it begins with."""
        return f"{self.prefix}/{path}" if self.prefix else path


def parse(text: str) -> Place:
    """Of "s3://bucket/some/prefix" or "bucket". Raises ValueError."""
    found = re.fullmatch(rf"(?:s3://)?({NAME})|s3://({NAME})/(|{KEY}(?:/{KEY})*)/?", text)
    place = Place(found[1] or found[2], found[3] or "") if found else None
    if place is None or {".", ".."} & {*place.prefix.split("/")}:
        raise ValueError(f"{text!r} is no place in S3. Give a bucket, or s3://BUCKET/SOME/PREFIX: the bucket in 3 to "
                         f"63 small letters, digits, '.' and '-', the prefix without *, ?, $ and '..'")
    return place


def role_name(owner: str, cluster: str, region: str) -> str:
    """Names of roles are the whole account's and have 64 letters at most."""
    return "txl-" + hashlib.sha256("\0".join((owner, cluster, region)).encode()).hexdigest()[:16]


def role_path(owner: str | None = None, cluster: str | None = None) -> str:
    """Under which IAM keeps the roles of a cluster, of an owner, of all."""
    return "/".join(["/txl", *(x for x in (owner, cluster if owner else None) if x), ""])


def trust() -> dict[str, Any]:
    """Who may take on the role: EC2's machines."""
    return _policy({"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"})


def policy(run_place: Place | None, data: Place | None, partition: str = "aws") -> dict[str, Any]:
    """All that the machines of a run may do in AWS. `run_place`: the run's own folder, which they write."""
    def listing(place: Place) -> dict[str, Any]:
        return {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:{partition}:s3:::{place.bucket}",
                "Condition": {"StringLike": {"s3:prefix": f"{place.key()}*"}}}

    def objects(place: Place, *actions: str) -> dict[str, Any]:
        return {"Effect": "Allow", "Action": [f"s3:{action}" for action in actions],
                "Resource": f"arn:{partition}:s3:::{place.bucket}/{place.key()}*"}

    return _policy(
        *([listing(run_place), objects(run_place, "GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")]
          if run_place else []),
        *([listing(data), objects(data, "GetObject")] if data else []))


def look(cloud: Cloud, place: Place, flag: str) -> Iterable[str]:
    """What is to be said of a bucket that is there. Raises Refused where it is not, or out of reach."""
    from cluster.ec2 import CallFailed
    try:
        reply = cloud.call("s3", "head_bucket", Bucket=place.bucket)
    except CallFailed as error:                   # a HEAD's answer has no body: its status is all that there is
        said = {"404": f"There is no bucket {place.bucket}. Make it:  aws s3 mb s3://{place.bucket} "
                       f"--region {cloud.region}   or name another",
                "403": f"The bucket {place.bucket} is not open to {cloud.caller}: s3:ListBucket is needed, "
                       f"docs/iam_policy.json has all. Or it is another account's: name another",
                "301": f"The bucket {place.bucket} is in another region than {cloud.region}, and does not say in which",
                }.get(error.code)
        if said is None:
            raise
        raise Refused(f"{flag}: {said}") from error
    region = reply["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", cloud.region)
    if region != cloud.region:
        yield (f"{place} is in {region}, the machines are in {cloud.region}: each GiB from one to the other costs, and "
               f"is slower")


def has_data(cloud: Cloud, place: Place) -> None:
    """Raises Refused where nothing is in it."""
    if not cloud.call("s3", "list_objects_v2", Bucket=place.bucket, Prefix=place.key(), MaxKeys=1).get("KeyCount"):
        raise Refused(f"--data: {place} is empty. It is to hold what the folder of the recipe's data holds:\n"
                      f"  aws s3 sync data/NAME {place}")


def standing(cloud: Cloud, place: Place, recipe: Recipe) -> Standing:
    """As run.standing, of a run's folder in S3. Only what is small is fetched; of the rest the size is enough."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for prefix in ("recipe.json", "status.json", "checkpoints/"):
            for found in cloud.pages("s3", "list_objects_v2", "Contents", Bucket=place.bucket,
                                     Prefix=place.key(prefix)):
                path = folder / found["Key"].removeprefix(place.key())
                if folder not in path.resolve().parents or path.suffix not in (".json", ".pt"):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".json":
                    body = cloud.call("s3", "get_object", Bucket=place.bucket, Key=found["Key"])["Body"]
                    path.write_bytes(body.read())
                else:
                    with open(path, "wb") as file:
                        file.truncate(found["Size"])              # takes no room
        return replace(run.standing(folder, recipe, str(place)), place=str(place))


def further(here: Standing, there: Standing) -> Standing:
    """Of a run's folder here and the one in S3, that of which more is done."""
    def done(x: Standing) -> tuple[bool, int]:
        return x.state == "finished", -1 if x.step is None else x.step
    return there if done(there) > done(here) else here


def _policy(*statements: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}
