"""EC2's own client for tests: what boto3 asks and what it understands is the judge."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}


class Caller:
    """boto3 clients of an endpoint, which try once, and what most tests ask of them."""

    def __init__(self, url: str):
        self._url = url
        self.ec2 = self.client("ec2")
        self.image = self.client("ssm").get_parameter(Name=UBUNTU)["Parameter"]["Value"]
        self.subnets = {x["AvailabilityZone"]: x["SubnetId"] for x in self.ec2.describe_subnets()["Subnets"]}

    def client(self, service: str, read_timeout: float = 5) -> Any:
        return boto3.client(service, region_name="us-east-1", endpoint_url=self._url, aws_access_key_id="x",
                            aws_secret_access_key="y",
                            config=Config(retries={"total_max_attempts": 1}, read_timeout=read_timeout))

    def run(self, count: int = 1, kind: str = "p4d.24xlarge", zone: str = "us-east-1a", **more: Any) -> list[str]:
        request = {"ImageId": self.image, "InstanceType": kind, "MinCount": count, "MaxCount": count} | more
        if "NetworkInterfaces" not in request and "Placement" not in request:
            request.setdefault("SubnetId", self.subnets[zone])
        return [x["InstanceId"] for x in self.ec2.run_instances(**request)["Instances"]]

    def one(self, id: str) -> dict[str, Any]:
        return self.ec2.describe_instances(InstanceIds=[id])["Reservations"][0]["Instances"][0]

    def all(self, **filters: str) -> list[dict[str, Any]]:
        asked = [{"Name": name.replace("_", "-"), "Values": [value]} for name, value in filters.items()]
        return [x for reservation in self.ec2.describe_instances(Filters=asked)["Reservations"]
                for x in reservation["Instances"]]

    def until(self, state: str, *ids: str) -> None:
        eventually(lambda: all(self.one(id)["State"]["Name"] == state for id in ids))


class refused:
    """EC2 says no, with exactly this error code; then there are `status` and `said`."""

    def __init__(self, code: str):
        self.code, self.status, self.said = code, 0, ""

    def __enter__(self) -> refused:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert error is not None, f"it was not refused with {self.code}"
        if not isinstance(error, ClientError):
            return False
        assert error.response["Error"]["Code"] == self.code, error
        self.status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        self.said = error.response["Error"]["Message"]
        return True


def eventually(true: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
