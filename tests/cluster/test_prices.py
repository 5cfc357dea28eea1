"""Dollars, by sums made by hand and by what was published."""
from __future__ import annotations

import http.server
import json
import os
import threading
from dataclasses import replace
from typing import ClassVar

import pytest

from cluster import prices
from cluster.prices import (
    Estimate,
    Rates,
    Spell,
    bill,
    estimate,
    expected_hours,
    on_demand,
    rates,
    refresh,
    save,
    tokens_of,
)
from cluster.spec import KINDS, LOCAL, Machines
from configs import CONFIGS
from engine.config import Stop


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TXL_HOME", str(tmp_path))
    return tmp_path


def test_every_kind_known_by_name_has_a_price():
    assert all(on_demand(kind) for kind in KINDS)
    assert on_demand("p9.huge") is None


def test_machines_cost_what_their_number_costs():
    assert Machines("p3dn.24xlarge", count=16).usd_per_hour == pytest.approx(16 * 31.212)
    assert Machines(LOCAL).usd_per_hour == 0
    assert Machines("p9.huge").usd_per_hour is None


def test_bigger_machines_of_a_family_cost_in_proportion():
    for small, big, times in [("c5.large", "c5.2xlarge", 4), ("c6i.large", "c6i.xlarge", 2),
                              ("m5.large", "m5.2xlarge", 4), ("p3.2xlarge", "p3.16xlarge", 8),
                              ("g5.24xlarge", "g5.48xlarge", 2), ("g6.24xlarge", "g6.48xlarge", 2)]:
        assert on_demand(big) == pytest.approx(times * on_demand(small))


def test_spot_is_taken_at_its_price_in_the_zone_and_else_the_list():
    spot = {"us-east-1c": 9.5}
    now = rates("p3dn.24xlarge", spot_usd=spot, zone="us-east-1c", disk_gib=730)
    assert (now.machine_usd, now.source) == (9.5, "spot now in us-east-1c")
    assert now.disk_usd == pytest.approx(.08)     # 730 GB for one of a month's 730 hours
    listed = rates("p3dn.24xlarge", spot_usd=spot, zone="us-east-1d", disk_gib=200)
    assert (listed.machine_usd, listed.source) == (31.212, f"on-demand list of {prices.DATED}")
    assert rates("p9.huge", spot_usd={}, zone=None, disk_gib=200) is None


def test_an_estimate_is_machines_disks_and_addresses_for_the_hours():
    config = replace(CONFIGS["test_16"], tokens_per_s=377_700.0)
    got = estimate(Rates(30.0, "by hand", .02), config, 128, addresses=16)
    assert got.usd_per_hour == pytest.approx(16 * 30.02 + 16 * .005)
    assert got.hours == pytest.approx(36e9 / 377_700 / 3600, rel=1e-3)
    assert got.total_usd == pytest.approx(got.hours * got.usd_per_hour)
    assert str(got) == ("$480.40 per hour with disks and addresses, by hand; about 26.5 hours (at 377,700 tokens/s, as "
                        "published for 128 V100): $12719.27 in all, $353.31 per billion tokens")


def test_an_estimate_without_hours_says_so_and_has_no_total():
    got = Estimate(Rates(1.0, "by hand", 0.0), 1.0, None, "nobody knows", 10)
    assert got.total_usd is None
    assert str(got) == "$1.00 per hour with disks and addresses, by hand; how long it takes is not known: nobody knows"


@pytest.mark.parametrize(("name", "hours"), [("one_machine", 2.9), ("nvidia_base", 76 / 60),
                                             ("nvidia_base_p3dn", 121 / 60), ("nvidia_large", 430 / 60)])
def test_published_times_come_back_from_published_throughputs(name, hours):
    config = CONFIGS[name]
    assert expected_hours(config, 8)[0] == pytest.approx(hours, rel=.06)              # theirs have evaluations in them


def test_a_throughput_holds_only_for_the_machines_it_was_published_for():
    config = CONFIGS["test_16"]
    moved = replace(config, machines=replace(config.machines, count=8))
    assert "published" in expected_hours(config, 128)[1]
    hours, basis = expected_hours(moved, 64)
    assert "a guess: 8% of the peak of 64 V100 in fp16" in basis
    assert hours > 0


@pytest.mark.parametrize(("name", "published"), [("nvidia_base", 449_890), ("nvidia_base_p3dn", 258_648),
                                                 ("nvidia_large", 191_148), ("nvidia_large_p3dn", 66_716)])
def test_the_guess_is_no_better_than_what_nvidia_published_and_at_least_half_of_it(name, published):
    config = replace(CONFIGS[name], tokens_per_s=None)
    hours, _ = expected_hours(config, 8)
    rate = tokens_of(config.recipe, 8) / 3600 / hours
    assert published / 2 < rate < 1.01 * published


def test_nothing_is_guessed_for_a_processor():
    assert expected_hours(CONFIGS["tiny"], 1)[0] is None


@pytest.mark.parametrize(("stop", "steps"), [(Stop(max_steps=7), 7), (Stop(max_tokens=1), 1),
                                             (Stop(max_steps=7, max_tokens=3 * 96 * 128), 3),
                                             (Stop(max_tokens=3 * 96 * 128 + 1), 4)])
def test_a_run_ends_with_the_step_that_reaches_its_end(stop, steps):
    recipe = replace(CONFIGS["one_machine"].recipe, stop=stop)
    assert tokens_of(recipe, 1) == steps * 96 * 128


def test_a_bill_is_by_machine_and_says_what_it_does_not_know():
    spells = [Spell(1, "i-2", "p3dn.24xlarge", "spot", "us-east-1c", 2.0, 10.0),
              Spell(0, "i-1", "p3dn.24xlarge", "spot", "us-east-1c", 1.5, 10.0)]
    assert bill(spells) == (
        "node-0   i-1                  p3dn.24xlarge  spot      us-east-1c     1.50 h  $    15.00\n"
        "node-1   i-2                  p3dn.24xlarge  spot      us-east-1c     2.00 h  $    20.00\n"
        "in all $35.00")
    assert bill([replace(spells[0], usd_per_hour=None), spells[1]]).endswith(
        "   unknown\nin all $15.00, and 1 machine(s) of unknown price")


def test_a_refreshed_list_goes_before_the_one_in_the_package_with_its_date(home):
    assert save("us-east-1", {"p3dn.24xlarge": 20.0, "p9.huge": 99.0}, "1 March 2027") == home / "prices.json"
    assert (on_demand("p3dn.24xlarge"), on_demand("p9.huge"), on_demand("c5.large")) == (20.0, 99.0, .085)
    assert rates("p9.huge", spot_usd={}, zone=None, disk_gib=1).source == "on-demand list of 1 March 2027, us-east-1"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"usd_per_hour": 3, "dated": "x", "region": "y"}', "{\"usd_per"])
def test_a_spoilt_list_is_passed_over(home, text):
    (home / "prices.json").write_text(text)
    assert (on_demand("p3dn.24xlarge"), prices.price_list().dated) == (31.212, prices.DATED)


def product(kind: str, usd: str, unit: str = "Hrs") -> str:
    """As GetProducts lists one, as far as anybody reads it."""
    return json.dumps({"product": {"attributes": {"instanceType": kind}}, "terms": {"OnDemand": {"X.T": {
        "priceDimensions": {"X.T.D": {"unit": unit, "pricePerUnit": {"USD": usd}}}}}}})


def test_a_refresh_reads_all_pages_of_amazons_list(monkeypatch):
    asked, pages = [], [{"PriceList": [product("a", "1.5000000000"), product("b", "9", "Quantity")], "NextToken": "2"},
                        {"PriceList": [product("c", "0.25")]}]

    class Pricing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(pages["NextToken" in asked[-1]]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        log_message: ClassVar = lambda *_: None

    with http.server.HTTPServer(("127.0.0.1", 0), Pricing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "x",
                            "AWS_SECRET_ACCESS_KEY": "x", "NO_PROXY": "127.0.0.1",
                            "AWS_CONFIG_FILE": os.devnull}.items():
            monkeypatch.setenv(name, value)
        assert refresh("eu-west-1") == {"a": 1.5, "c": .25}
        server.shutdown()
    assert {one["Field"]: one["Value"] for one in asked[0]["Filters"]} == {
        "regionCode": "eu-west-1", "operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA",
        "capacitystatus": "Used", "marketoption": "OnDemand"}
