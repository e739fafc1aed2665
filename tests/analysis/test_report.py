"""The report as text: what it says is what the records say, and no name can break it. In a browser: tests/pages."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from analysis.caveats import caveats
from analysis.front import Front
from analysis.report import report
from analysis.swept import groups
from tests.analysis.records import OBJECTIVES, sweep

VOID = {"meta", "input", "circle", "path"}


def data_of(page):
    """The JSON that the page draws from."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Tags(HTMLParser):
    """Collects text, and fails where tags are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


def text_of(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return " ".join(" ".join(tags.text).split())


def test_a_page_holds_every_point_and_knows_the_front():
    one = sweep()
    data = data_of(report([one], "one"))
    assert data["points"]["trial"] == list(range(20))
    assert data["points"]["accuracy"] == [row["accuracy"] for row in one.records]
    assert data["points"]["bits"][3] == [b for pair in one.records[3]["bits"].values() for b in pair]
    front = Front.of(one.records, OBJECTIVES).to_pandas()
    assert {t for t, flag in enumerate(data["points"]["front"]) if flag} == set(front["trial"])
    marked = {mark: int(index) for index, marks in data["marks"].items() for mark in marks}
    assert marked["most-accurate"] == front["trial"][0]
    assert marked["knee"] == Front.of(one.records, OBJECTIVES).knee()["trial"]


def test_budgets_are_those_of_the_sweep_in_the_unit_of_the_axis():
    made = sweep(asked={"max_bops": 20_480, "max_relative_bops": 0.5, "max_size_bytes": 4096})
    charts = [chart for chart in data_of(report([made], "t"))["charts"] if chart["kind"] == "front"]
    assert [(chart["budget"], chart["budget_words"]) for chart in charts] == [(0.02, "2 %"), (4096, "4.0 KiB")]


def test_an_objective_of_ones_own_has_a_chart_with_its_budget_a_column_and_a_line_for_each_point():
    made = sweep(asked={"limits": ["energy<=6.5"]}, measures=["energy"])
    for row in made.records:
        row["energy"] = row["bops"] / 8 if row["trial"] else None
    made.description["objectives"] = {"accuracy": "max", "energy": "min"}
    page = report([made], "t")
    data = data_of(page)
    charts = {chart["cost"]: chart for chart in data["charts"] if chart["kind"] == "front"}
    assert charts["energy"]["x"] == {"label": "energy", "unit": "plain", "log": True}
    assert (charts["energy"]["budget"], charts["energy"]["budget_words"]) == (6.5, "6.5")
    assert charts["energy"]["less"]
    assert data["points"]["own"] == {"energy": [row["energy"] for row in made.records[1:]]}
    assert "BOPs size energy bits (weights/activations)" in text_of(page)


def test_a_search_on_shared_weights_says_what_its_accuracies_are_and_how_it_is_repeated():
    made = replace(sweep(), command="raysearch supernet search runs/net")
    made.description["search"] = {"images": 500}
    text = text_of(report([made], "t"))
    assert "accuracies on 500 validation images are those of the shared weights of one network" in text
    assert "raysearch supernet search runs/net" in text


def test_a_measured_test_accuracy_stands_beside_the_other_with_its_interval():
    text = text_of(report([sweep(tested=1)], "t"))
    assert re.search(r"validation accuracy test accuracy relative BOPs", text)
    assert re.search(r"\d\d\.\d\d% \(95 %: \d\d\.\d\d\.\.\d\d\.\d\d\)", text)
    assert "Test accuracy was measured once, for 1 point." in text
    assert "No test accuracy has been measured" in text_of(report([sweep()], "t"))


def test_names_from_outside_cannot_break_the_page():
    name = '</script><img src=x onerror="alert(1)">&amp;'
    made = sweep(name, asked={"settings": {"<b>": "</table>"}})
    page = report([made, sweep("b", method="pact")], name)
    assert "<img" not in page
    assert name in text_of(page)
    assert data_of(page)["runs"][0] == f"runs/{name}"


def test_a_page_asks_no_other_machine():
    page = report([sweep()], "t")
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_sweeps_that_differ_by_the_seed_are_one_question():
    found = groups([sweep("a", seed=0), sweep("b", method="pact"), sweep("c", seed=1)])
    assert {name: [each.name for each in members] for name, members in found.items()} == {
        "lsq": ["a", "c"],
        "pact": ["b"],
    }


def test_questions_are_named_by_what_tells_them_apart():
    two = groups([sweep("a", asked={"sampler": "tpe"}), sweep("b", asked={"sampler": "nsga2"})])
    assert list(two) == ["lsq · sampler tpe", "lsq · sampler nsga2"]
    spaces = groups([sweep("a", asked={"space": "all_layers"}), sweep("b", method="bsq", asked={"space": "bsq"})])
    assert list(spaces) == ["lsq", "bsq"]
    rates = groups([sweep("a", asked={"settings": {"optimizer/lr": 0.1}}), sweep("b")])
    assert list(rates) == ["lsq · optimizer/lr 0.1", "lsq · optimizer/lr default"]


def test_a_report_of_several_compares_them_at_equal_cost():
    text = text_of(report([sweep("a", seed=0), sweep("b", seed=1), sweep("c", method="pact")], "t"))
    assert "in 3 sweeps" in text
    assert re.search(r"question seeds completed trials mean .*lsq 2 20 0\.\d{4} -?\d\.\d{4}\.\.\d\.\d{4}", text)
    assert "at most (relative BOPs) lsq pact" in text


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        ([sweep()], "One seed: nothing here says how much another one would change."),
        ([sweep(), sweep(method="pact")], "Each question was asked with one seed"),
        ([sweep(), sweep(seed=1)], "Few seeds (lsq: 2)"),
        ([sweep(), sweep(seed=1), sweep(method="pact")], "The shared front favours questions with more seeds"),
        ([sweep(), sweep(method="pact", asked={"epochs": 9})], "unequal numbers of epochs: lsq 2, pact 9."),
        ([sweep(trials=5), sweep(method="pact")], "unequal numbers of trials"),
        ([sweep(asked={"trials": 5, "settings": {"data/train_limit": 9}}), sweep()], "Settings of the data differ"),
    ],
)
def test_a_report_says_what_to_be_careful_of(sweeps, said):
    assert any(said in line for line in caveats(groups(sweeps)))


def test_trials_that_failed_were_stopped_or_are_missing_are_counted():
    made = sweep(trials=4)
    for trial, status in ((1, "failed"), (2, "pruned")):
        made.records[trial] |= {"status": status, "accuracy": None}
    made.description["trials"] = 9
    said = "a-sweep: of its trials, 1 failed, 1 stopped early, 5 of 9 not there yet."
    assert said in caveats(groups([made]))
    ended = replace(made, over=True)
    assert "a-sweep: 4 trials instead of 9, for there was nothing else to try." in caveats(groups([ended]))


def test_several_points_of_a_trial_and_networks_without_bits_are_shown():
    made = sweep(trials=3)
    made.records[0] |= {"point": "8-bit"}
    made.records.append({**made.records[0], "point": "4-bit", "accuracy": 0.999, "bits": {"conv1": None}})
    data = data_of(report([made], "t"))
    assert sorted(data["points"]["label"]) == ["", "", "4-bit", "8-bit"]
    assert [] in data["points"]["bits"]


def test_nothing_to_report_is_an_error():
    with pytest.raises(ValueError, match="nothing to report: no trial is complete in runs/a-sweep"):
        report([sweep(trials=0)], "t")
