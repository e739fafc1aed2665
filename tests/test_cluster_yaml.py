"""The shipped cluster is one that Ray takes, and does what it promises about ports, versions and secrets."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster import on_premise

ROOT = Path(__file__).parents[1]
SHIPPED = (ROOT / "cluster.yaml").read_text()
AWS, ON_PREMISE = SHIPPED, on_premise(SHIPPED)


def read(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


@pytest.mark.parametrize("text", [AWS, ON_PREMISE], ids=["aws", "on premise"])
def test_ray_takes_the_cluster(text):
    whole = prepare_config(copy.deepcopy(read(text)))
    validate_config(whole)
    assert whole["cluster_name"] == "raysearch"


def test_the_head_runs_no_trial_and_workers_are_spot_machines_that_come_when_needed():
    types = read(AWS)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    worker = types["gpu_spot"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["node_config"]["ImageId"] == types["head"]["node_config"]["ImageId"]


@pytest.mark.parametrize("text", [AWS, ON_PREMISE], ids=["aws", "on premise"])
def test_nothing_listens_beyond_loopback_and_every_node_wants_the_token(text):
    config = read(text)
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert len(starts) == 2
    hosts = re.findall(r"--(?:dashboard-)?host[= ](\S+)", " ".join(config["head_start_ray_commands"]))
    assert hosts == ["127.0.0.1"] * 2
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert all("RAY_AUTH_MODE=token" in c for c in config["setup_commands"] if "export" in c)


@pytest.mark.parametrize("text", [AWS, ON_PREMISE], ids=["aws", "on premise"])
def test_what_must_be_edited_is_marked(text):
    for line in text.splitlines():
        if re.search(r"0{8}|eu-central|10\.0\.0|id_ed25519", line):
            assert "EDIT" in line or line.strip().startswith("ImageId: &image"), line
