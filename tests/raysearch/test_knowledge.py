"""What is known before the first trial: settings of a person, earlier sweeps of the same and of other networks."""

import json
from pathlib import Path
from typing import Any

import pytest

from raysearch.errors import SweepError
from raysearch.knowledge import counterpart, seeds_for
from raysearch.records import write_json
from raysearch.resolve import resolve
from raysearch.search.ledger import Ledger
from raysearch.sensitivities import read_seeds, seed, write
from raysearch.sweep import Sweep
from tests.raysearch.builders import drive, formula, make_run, open_book, small_sweep
from tests.raysearch.sensitivity_tables import random_table

WIDE = {"conv1": [8, 8], "conv2": [4, 3], "fc1": [2, 2], "fc2": [5, 6]}


def finished(path: Path, sweep: Sweep) -> Path:
    """A sweep whose accuracies are a formula of the bits."""
    folder, resolved = make_run(path, sweep)
    ledger = Ledger(folder, resolved)
    rows = []
    for _ in range(sweep.trials):
        proposal = ledger.propose()
        assert proposal is not None
        row = {"trial": proposal.number, "point": "final", "points": 1, "status": "complete", "data": sweep.data}
        row |= {"accuracy": formula(proposal.cost.bits or {}), "params": proposal.params, "config": proposal.tree}
        row |= {
            name: getattr(proposal.cost, name) for name in ("bops", "relative_bops", "size_bytes", "bits", "digest")
        }
        rows.append(row)
    folder.records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("try.json", json.dumps([WIDE, {"bits/fc1/weight": 3}])),
        (
            "try.csv",
            "bits/conv1/weight,bits/conv2/weight,bits/conv2/activation,bits/fc1/weight,bits/fc1/activation,"
            "bits/fc2/weight,bits/fc2/activation\n8,4,3,2,2,5,6\n,,,3,,,\n",
        ),
    ],
)
def test_what_a_person_wants_tried_is_tried_first(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    sweep = small_sweep(space="all_layers")
    seeds = seeds_for(sweep, tries=tmp_path / name)
    folder, resolved = make_run(tmp_path / "run", sweep)
    seeds.write(folder.seeds)
    ledger = Ledger(folder, resolved)
    first, second, third = (ledger.propose() for _ in range(3))
    assert first.cost.bits == WIDE
    assert (second.params["bits/fc1/weight"], second.source) == (3, "person")
    assert (first.source, third.source) == ("person", "uniform")


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([{"bits/fc1/wieght": 3}], {}, "configuration 1 from person: bits/fc1/wieght is not searched"),
        ([{"fc1": [4, 4]}, {"fc9": [4, 4]}], {}, "configuration 2 from person: bits/fc9/weight is not searched"),
        ([{"fc1": [9, 4]}], {}, "bits/fc1/weight = 9: the space has IntDistribution"),
        ([WIDE], {"max_bops": 500_000}, "configuration 1 from person has "),
        ({"fc1": [4, 4]}, {}, "give a JSON list of settings by address"),
    ],
)
def test_what_cannot_be_tried_is_an_error_before_anything_runs(
    tmp_path: Path, rows: Any, changes: dict[str, Any], words: str
) -> None:
    write_json(tmp_path / "try.json", rows)
    with pytest.raises(SweepError) as caught:
        seeds_for(small_sweep(space="all_layers", **changes), tries=tmp_path / "try.json")
    assert words in str(caught.value)


def test_an_earlier_sweep_of_the_same_network_gives_its_front_and_its_sensitivities(tmp_path: Path) -> None:
    earlier = finished(tmp_path / "a", small_sweep(space="all_layers", trials=16))
    seeds = seeds_for(small_sweep(space="all_layers", trials=16), warm_start=[earlier])
    assert {source for source, _ in seeds.first} == {"warm-start"}
    assert 1 <= len(seeds.first) <= 4
    tried = [json.loads(line)["params"] for line in (earlier / "records.jsonl").read_text().splitlines()]
    assert all(values in tried for _, values in seeds.first)
    assert set(seeds.sensitivities) == set(resolve(small_sweep(space="all_layers")).space)
    assert min(seeds.sensitivities.values()) > 0


def test_all_that_is_known_before_a_sweep_is_told_apart_in_its_records(tmp_path: Path) -> None:
    """What `--try`, `--warm-start` and `--seed-from` give to one sweep, whose cost is a measure of one's own."""
    (tmp_path / "energy.py").write_text("def measure(layer, bits):\n    return layer.macs * bits.weight\n")
    write_json(tmp_path / "try.json", [WIDE])
    write(random_table(0, ("conv1", "conv2", "fc1", "fc2")), tmp_path / "s.json")
    earlier = finished(tmp_path / "earlier", small_sweep(space="all_layers", trials=8))
    sweep = small_sweep(
        space="all_layers",
        trials=24,
        epochs=1,
        seed_from=str(tmp_path / "s.json"),
        measures={"energy": str(tmp_path / "energy.py")},
        objectives={"accuracy": "max", "energy": "min"},
    )
    folder, resolved = make_run(tmp_path / "run", sweep)
    given = seeds_for(sweep, tries=tmp_path / "try.json", warm_start=[earlier])
    seed(folder, resolved, given.and_then(read_seeds(resolved)))
    drive(open_book(folder, resolved))
    rows = folder.read_records()
    assert list(dict.fromkeys(row["source"] for row in rows)) == [
        "person",
        "warm-start",
        "sensitivity",
        "uniform",
        "frontier",
    ]
    assert len({row["digest"] for row in rows}) == 24
    macs = {layer.name: layer.macs for layer in resolved.table.quantizable}
    assert all(row["energy"] == sum(macs[name] * w for name, (w, _) in row["bits"].items()) for row in rows)


def test_an_earlier_sweep_of_another_network_gives_widths_by_place(tmp_path: Path) -> None:
    earlier = finished(tmp_path / "a", small_sweep(space="all_layers", trials=8))
    sweep = Sweep(model="vgg7", data="cifar10", space="per_layer", trials=40)
    seeds = seeds_for(sweep, warm_start=[earlier])
    assert seeds.first
    assert seeds.sensitivities == {}
    rows = [json.loads(line) for line in (earlier / "records.jsonl").read_text().splitlines()]
    widths = {tuple(row["bits"]["conv2"]) for row in rows}
    for _, values in seeds.first:
        assert set(values) == set(resolve(sweep).space)
        assert (values["bits/conv4/weight"], values["bits/conv4/activation"]) in widths


def test_layers_take_each_others_place_by_name_then_by_kind_and_depth() -> None:
    small = resolve(Sweep(model="resnet20", data="cifar10")).table.quantizable
    large = resolve(Sweep(model="resnet20", data="cifar10", settings={"model/depth": 32})).table.quantizable
    assert [counterpart(x, small, large).name for x in small] == [x.name for x in small]
    lenet = resolve(Sweep()).table.quantizable
    places = {x.name: counterpart(x, large, lenet).name for x in large}
    assert (places["conv1"], places["fc"]) == ("conv1", "fc2")
    assert {places[x.name] for x in large if not (x.first or x.last)} == {"conv2"}
