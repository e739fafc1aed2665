"""Measures of a person's own: what each form is told and gives, tables of layers, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainables.config import parse
from trainables.cost import Layer, LayerBits, LayerTable, bops
from trainables.errors import ConfigError, PluginError
from trainables.fit import fit
from trainables.latency import Table, measured
from trainables.measures import known, load, load_all

TABLE = LayerTable(
    layers=(
        Layer(name="conv", kind="conv", macs=90, weights=9, biases=0, channels=1, first=True),
        Layer(name="mix", kind="matmul", macs=5, weights=0, biases=0, channels=1, quantizable=False),
        Layer(name="fc", kind="linear", macs=20, weights=20, biases=2, channels=2, last=True),
    )
)
SOURCES = {
    "layer": "def measure(layer, bits):\n    return layer.macs * bits.weight * bits.activation\n",
    "layers": (
        "def measure(layers, bits):\n"
        "    return sum(x.macs * bits[x.name].weight * bits[x.name].activation for x in layers)\n"
    ),
}

widths = st.builds(LayerBits, weight=st.integers(1, 8), activation=st.integers(1, 8))


def write(folder: Path, text: str) -> str:
    path = folder / "own.py"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module", params=SOURCES)
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("work", write(tmp_path_factory.mktemp(request.param), SOURCES[request.param]))


@given(conv=widths, fc=widths)
def test_bops_as_a_measure_of_ones_own_are_the_bops_of_the_platform(counted: Any, conv: Any, fc: Any) -> None:
    bits = {"conv": conv, "fc": fc}
    assert known([counted], TABLE, bits) == {"work": bops(TABLE, bits)}


def test_a_measure_of_the_trained_model_is_not_known_before_training(tmp_path: Path) -> None:
    source = write(tmp_path, "def measure(model, images, bits):\n    return len(images) + len(bits)\n")
    measure = load("seen", source)
    assert known([measure], TABLE, {}) == {}
    assert measure.of_model(TABLE, {"fc": LayerBits(weight=2, activation=2)}, nn.Identity(), torch.zeros(3, 1)) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def measure(weights):\n    return 1\n",
            "takes weights; define measure(layer, bits), measure(layers, bits) or",
        ),
        ("def measure(model, epoch):\n    return 1\n", "takes model, epoch; define"),
        ("def measure():\n    return 1\n", "must define measure(layer, bits)"),
        ("def other(layer, bits):\n    return 1\n", "does not define 'measure'"),
    ],
)
def test_a_function_of_another_form_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PluginError) as caught:
        load("own", write(tmp_path, text))
    assert words in str(caught.value)


def test_a_bare_name_is_refused() -> None:
    with pytest.raises(PluginError, match=r"measure 'x' = 'x': give FILE.py, FILE.json or package.module:function"):
        load("x", "x")


@pytest.mark.parametrize("value", ["None", "'fast'", "float('nan')", "float('inf')"])
def test_a_value_that_is_no_finite_number_is_an_error_with_the_layer(tmp_path: Path, value: str) -> None:
    measure = load("own", write(tmp_path, f"def measure(layer, bits):\n    return {value}\n"))
    with pytest.raises(ConfigError, match=r"measure 'own' gives .* for layer conv: a finite number is needed"):
        known([measure], TABLE, {})


def table(tmp_path: Path, **changes: Any) -> str:
    rows = {"conv": {"2/8": 1.0, "8/8": 2.0, "32/32": 4.0}, "fc": {"4/4": 10.0, "8/8": 20.0, "32/32": 40.0}}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"layers": rows, "rest": 0.5} | changes))
    return str(path)


@pytest.mark.parametrize(
    ("conv", "fc", "total"),
    [((2, 8), (4, 4), 11.5), ((3, 8), (5, 3), 22.5), ((8, 8), (8, 8), 22.5), ((8, 8), (32, 32), 42.5)],
)
def test_a_table_is_summed_and_a_width_that_it_lacks_counts_as_the_next_wider(
    tmp_path: Path, conv: tuple[int, int], fc: tuple[int, int], total: float
) -> None:
    bits = {"conv": LayerBits(weight=conv[0], activation=conv[1]), "fc": LayerBits(weight=fc[0], activation=fc[1])}
    assert known(load_all({"ms": table(tmp_path)}), TABLE, bits) == {"ms": total}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"layers": {"conv": {"8/8": 1.0}, "fcc": {"8/8": 1.0}}},
            "layer 'fc' is not in the table, .*did you mean 'fcc'",
        ),
        (
            {"layers": {"conv": {"8/8": 1.0}, "fc": {"4/4": 1.0}}},
            "layer fc: the table has 4/4 bits, nothing as wide as 8/8",
        ),
        ({"layers": {"conv": {"8": 1.0}}}, "is no table of layers: ValueError"),
        ({"layers": []}, "is no table of layers: AttributeError"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    bits = {name: LayerBits(weight=8, activation=8) for name in ("conv", "fc")}
    with pytest.raises(ConfigError, match=words):
        known(load_all({"ms": table(tmp_path, **changes)}), TABLE, bits)


def test_a_measured_table_has_every_layer_at_every_width_and_is_readable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    found = measured(model, (1, 8, 8), widths=(4, 8), runs=2)
    assert {name: list(row) for name, row in found["layers"].items()} == {
        "0": ["4/8", "8/8", "32/32"],
        "3": ["4/4", "4/8", "8/4", "8/8", "32/32"],
    }
    assert all(0 < ms < 1000 and math.isfinite(ms) for row in found["layers"].values() for ms in row.values())
    (tmp_path / "t.json").write_text(json.dumps(found))
    assert Table.read(tmp_path / "t.json").layers["3"][8, 4] == found["layers"]["3"]["8/4"]


def test_reports_hold_what_follows_from_the_widths_each_epoch_and_what_was_measured_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "bits.py").write_text("def measure(layers, bits):\n    return sum(b.weight for b in bits.values())\n")
    (tmp_path / "mean.py").write_text("def measure(model, images):\n    return model(images).shape[0]\n")
    measures = load_all({"bits": str(tmp_path / "bits.py"), "seen": str(tmp_path / "mean.py")})
    data = {"name": "digits", "train_limit": 64, "validation_limit": 32}
    config = parse({"method": "lsq", "model": "lenet5", "data": data, "training": {"epochs": 2}})
    reports = [report.points[0].measures for report in fit(config, measures=measures)]
    assert reports == [{"bits": 24}, {"bits": 24, "seen": 32}]
