"""The shipped cluster is one that Ray takes, and does what it promises about ports, versions and secrets."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def on_aws() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


def on_premise() -> dict[str, Any]:
    """The cluster after the change that the file's last comment describes."""
    config = copy.deepcopy(on_aws())
    comment = CLUSTER.read_text().partition("about node types by")[2].partition("# and in the two")[0]
    changed = yaml.safe_load(re.sub(r"(?m)^#", "", comment))
    assert set(changed) == {"provider", "auth", "min_workers", "max_workers"}
    for name in ("available_node_types", "head_node_type"):
        del config[name]
    return config | changed


@pytest.mark.parametrize("config", [on_aws, on_premise])
def test_ray_takes_the_cluster(config):
    whole = prepare_config(config())
    validate_config(whole)
    assert whole["cluster_name"] == "raysearch"


def test_the_head_runs_no_trial_and_workers_are_spot_machines_that_come_when_needed():
    types = on_aws()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    worker = types["gpu_spot"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["node_config"]["ImageId"] == types["head"]["node_config"]["ImageId"]


def test_nothing_listens_beyond_loopback_and_every_node_wants_the_token():
    config = on_aws()
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert len(starts) == 2
    hosts = re.findall(r"--(?:dashboard-)?host[= ](\S+)", " ".join(config["head_start_ray_commands"]))
    assert hosts == ["127.0.0.1"] * 2
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]


def test_what_must_be_edited_is_marked():
    for line in CLUSTER.read_text().splitlines():
        if re.search(r"0{8}|eu-central", line):
            assert "EDIT" in line or line.strip().startswith("ImageId: &image"), line
