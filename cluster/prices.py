"""Dollars: what machines cost by the hour, what a run is going to cost, what it has cost.

A price is of one machine in us-east-1, Linux, on demand, without tax. `python -m cluster prices` may have refreshed it.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.ec2 import CONNECT_S, READ_S, READS, Market, classified
from cluster.spec import KINDS, Config
from engine.config import Recipe
from engine.files import write_whole
from engine.peaks import PEAK_TFLOPS

# AWS's list. P3, P3dn and P4d as of July 2026; of the rest two published copies agree, of which the later has P4d and
# P5 as they are since the cut of June 2025.
DATED = "July 2026"
USD_PER_HOUR = {
    "c5.large": .085, "c5.xlarge": .17, "c5.2xlarge": .34,
    "c6i.large": .085, "c6i.xlarge": .17, "c6i.2xlarge": .34,
    "m5.large": .096, "m5.xlarge": .192, "m5.2xlarge": .384, "t3.medium": .0416,
    "g4dn.xlarge": .526, "g4dn.2xlarge": .752, "g4dn.4xlarge": 1.204, "g4dn.8xlarge": 2.176, "g4dn.12xlarge": 3.912,
    "g4dn.16xlarge": 4.352, "g4dn.metal": 7.824,
    "g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g5.8xlarge": 2.448, "g5.12xlarge": 5.672,
    "g5.16xlarge": 4.096, "g5.24xlarge": 8.144, "g5.48xlarge": 16.288,
    "g6.xlarge": .8048, "g6.2xlarge": .9776, "g6.4xlarge": 1.3232, "g6.8xlarge": 2.0144, "g6.12xlarge": 4.6016,
    "g6.16xlarge": 3.3968, "g6.24xlarge": 6.6752, "g6.48xlarge": 13.3504,
    "p3.2xlarge": 3.06, "p3.8xlarge": 12.24, "p3.16xlarge": 24.48, "p3dn.24xlarge": 31.212,
    "p4d.24xlarge": 21.957642,                    # 32.7726 before the cut
    "p5.48xlarge": 55.04,
}
DISK_USD_PER_GIB_HOUR = .08 / 730                 # gp3, $0.08 per GB and month
ADDRESS_USD_PER_HOUR = .005                       # public IPv4
# Of the dense peak, in what training needs: the lower of what NVIDIA's README has for its base and large Transformer-XL
# on 8 GPUs, V100 for fp32 (35%, 36%), A100 for tf32 (11%, 16%) and fp16 (8%, 14%; V100 12% both). bf16 as fp16.
UTILISATION = {"fp32": .35, "tf32": .11, "fp16": .08, "bf16": .08}


@dataclass(frozen=True)
class PriceList:
    usd_per_hour: Mapping[str, float]
    dated: str


@dataclass(frozen=True)
class Rates:
    """What one machine costs by the hour."""
    machine_usd: float
    source: str                                   # "spot now in us-east-1c", "on-demand list of July 2026"
    disk_usd: float


@dataclass(frozen=True)
class Estimate:
    """Of all machines with their disks and addresses. Prints for the plan."""
    rates: Rates
    usd_per_hour: float
    hours: float | None                           # None: not known
    basis: str                                    # of the hours
    tokens: int                                   # in all of the run

    @property
    def total_usd(self) -> float | None:
        return None if self.hours is None else self.hours * self.usd_per_hour

    def __str__(self) -> str:
        text = f"${self.usd_per_hour:.2f} per hour with disks and addresses, {self.rates.source}"
        if self.hours is None or self.total_usd is None:
            return f"{text}; how long it takes is not known: {self.basis}"
        return (f"{text}; about {self.hours:.1f} hours ({self.basis}): ${self.total_usd:.2f} in all, "
                f"${self.total_usd / self.tokens * 1e9:.2f} per billion tokens")


@dataclass(frozen=True)
class Spell:
    """One machine's life, for the bill."""
    node: int
    id: str
    kind: str
    market: Market
    zone: str
    hours: float
    usd_per_hour: float | None                    # None: nobody knows


def on_demand(kind: str) -> float | None:
    """Dollars per hour of one machine by the list; None where it is not in it."""
    return price_list().usd_per_hour.get(kind)


def price_list() -> PriceList:
    """The refreshed list where there is one that can be read, else the one in this file."""
    try:
        saved = json.loads(_saved().read_text())
        return PriceList({**USD_PER_HOUR, **saved["usd_per_hour"]}, f"{saved['dated']}, {saved['region']}")
    except (OSError, ValueError, KeyError, TypeError):
        return PriceList(USD_PER_HOUR, DATED)


def save(region: str, usd_per_hour: Mapping[str, float], dated: str) -> Path:
    """Keep what `refresh` returned: from now on it is the list. Returns where."""
    path = _saved()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, json.dumps({"region": region, "dated": dated, "usd_per_hour": usd_per_hour}, indent=1) + "\n")
    return path


def refresh(region: str) -> dict[str, float]:
    """AWS's on-demand list of today for a region, Linux. Raises cluster.ec2.CallFailed."""
    import boto3
    from botocore.config import Config as Settings
    settings = Settings(connect_timeout=CONNECT_S, read_timeout=READ_S, retries=READS)
    only = {"regionCode": region, "operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA",
            "capacitystatus": "Used", "marketoption": "OnDemand"}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in only.items()]
    with classified("get_products"):              # its endpoint is in us-east-1, for all regions
        pages = boto3.client("pricing", region_name="us-east-1", config=settings).get_paginator("get_products")
        products = [json.loads(text) for page in pages.paginate(ServiceCode="AmazonEC2", Filters=filters)
                    for text in page["PriceList"]]
    return {product["product"]["attributes"]["instanceType"]: float(dimension["pricePerUnit"]["USD"])
            for product in products for term in product["terms"].get("OnDemand", {}).values()
            for dimension in term["priceDimensions"].values() if dimension["unit"] == "Hrs"}


def rates(kind: str, *, spot_usd: Mapping[str, float], zone: str | None, disk_gib: int) -> Rates | None:
    """Of one machine: spot where its price in `zone` is given, else on demand by the list; None where nobody knows."""
    disk = disk_gib * DISK_USD_PER_GIB_HOUR
    if zone is not None and zone in spot_usd:
        return Rates(spot_usd[zone], f"spot now in {zone}", disk)
    prices = price_list()
    if kind not in prices.usd_per_hour:
        return None
    return Rates(prices.usd_per_hour[kind], f"on-demand list of {prices.dated}", disk)


def estimate(rates: Rates, config: Config, ranks: int, *, addresses: int) -> Estimate:
    """What the run is going to cost from its first step to its last. `addresses`: public ones, of all machines."""
    hourly = config.machines.count * (rates.machine_usd + rates.disk_usd) + addresses * ADDRESS_USD_PER_HOUR
    return Estimate(rates, hourly, *expected_hours(config, ranks), tokens_of(config.recipe, ranks))


def expected_hours(config: Config, ranks: int) -> tuple[float | None, str]:
    """Of training alone, and how we know; None and why not. A guess counts no loss to the network."""
    machines, recipe = config.machines, config.recipe
    hours = tokens_of(recipe, ranks) / 3600
    gpu = KINDS[machines.kind].gpu if machines.kind in KINDS else None
    if config.tokens_per_s is not None and machines == config.published_on:
        return hours / config.tokens_per_s, f"at {config.tokens_per_s:,.0f} tokens/s, as published for {ranks} {gpu}"
    peak, share = PEAK_TFLOPS.get(gpu or "", {}).get(recipe.precision), UTILISATION.get(recipe.precision)
    if peak is None or share is None or recipe.flops_per_token is None:
        return None, "nothing was published for these machines, and there is nothing to guess from"
    rate = ranks * share * peak * 1e12 / recipe.flops_per_token
    return hours / rate, (f"at {rate:,.0f} tokens/s, a guess: {share:.0%} of the peak of {ranks} {gpu} in "
                          f"{recipe.precision}")


def tokens_of(recipe: Recipe, ranks: int) -> int:
    """Targets from the first step to the last."""
    step = recipe.batch.total(ranks) * recipe.tokens_per_sequence
    stop = recipe.stop
    ends = [stop.max_steps, None if stop.max_tokens is None else -(-stop.max_tokens // step)]
    return step * min(end for end in ends if end is not None)


def bill(spells: Iterable[Spell]) -> str:
    """A line a machine, and the sum. What nobody knows the price of is named and left out of it."""
    lines, total, unknown = [], 0.0, 0
    for x in sorted(spells, key=lambda x: (x.node, x.id)):
        cost = None if x.usd_per_hour is None else x.hours * x.usd_per_hour
        total, unknown = total + (cost or 0), unknown + (cost is None)
        lines.append(f"node-{x.node:<3} {x.id:<20} {x.kind:<14} {x.market:<9} {x.zone:<11} {x.hours:7.2f} h  "
                     + (f"${cost:9.2f}" if cost is not None else "   unknown"))
    rest = f", and {unknown} machine(s) of unknown price" if unknown else ""
    return "\n".join([*lines, f"in all ${total:.2f}{rest}"])


def _saved() -> Path:
    return Path(os.environ.get("TXL_HOME") or Path.home() / ".txl") / "prices.json"
