"""Searches over depth and width: what a trial costs is what its own network costs, on one scale for all of them."""

from pathlib import Path

import pytest

from raysearch.choice import choose
from raysearch.ledger import Ledger
from raysearch.sweep import Sweep, resolve
from tests.raysearch.builders import make_run
from trainables.build import layer_table
from trainables.config import parse
from trainables.cost import LayerBits, bops


def test_costs_of_other_architectures_are_shares_of_the_base_network(tmp_path: Path) -> None:
    sweep = Sweep(model="resnet20", data="cifar10", space="joint", sampler="random")
    folder, resolved = make_run(tmp_path / "run", sweep)
    ledger = Ledger(folder, resolved)
    proposals = [ledger.propose() for _ in range(24)]
    assert len({(p.tree["model"]["depth"], p.tree["model"]["width"]) for p in proposals}) > 2
    for proposal in proposals:
        table = layer_table(parse(proposal.tree))
        bits = {name: LayerBits(weight=w, activation=a) for name, (w, a) in proposal.cost.bits.items()}
        assert proposal.cost.bops == bops(table, bits)
        assert proposal.cost.relative_bops == pytest.approx(proposal.cost.bops / (resolved.table.macs * 32 * 32))


def test_a_limit_holds_for_every_architecture(tmp_path: Path) -> None:
    sweep = Sweep(model="resnet20", data="cifar10", space="joint", sampler="random", max_relative_bops=0.004)
    folder, resolved = make_run(tmp_path / "run", sweep)
    ledger = Ledger(folder, resolved)
    found = [ledger.propose() for _ in range(24)]
    assert max(proposal.cost.bops for proposal in found) <= 0.004 * resolved.table.macs * 1024
    assert any(proposal.repaired for proposal in found)


def test_auto_leaves_architectures_to_a_sampler_that_needs_no_sums() -> None:
    choice = choose(resolve(Sweep(model="resnet20", data="cifar10", space="joint")))
    assert (choice.sampler, "changes the network" in choice.reason) == ("tpe", True)
