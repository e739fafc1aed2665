"""Addresses, names, lines and descriptions as MLflow takes them."""

import json
import posixpath
import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch.mirror import entries
from raysearch.mirror.links import Progress, front_url, pages, public, redact, tracking_uri
from raysearch.mirror.session import Lines
from tests.raysearch.mirror.swept import NAME, SWEEP


def test_addresses_lead_to_the_front_its_page_its_comparison_and_its_models(fresh: Path) -> None:
    assert front_url(fresh) == "http://127.0.0.1:5000/#/experiments"
    known = Progress(uri=f"sqlite:///{fresh}/mlflow.db", sweep=NAME, experiment_id="7", summary="c0", front=["a", "b"])
    known.save(fresh)
    mode = "workflowType=machine_learning"
    page = f"/#/experiments/7/runs?{mode}&viewStateShareKey=front"
    assert front_url(fresh, port=5001) == f"http://127.0.0.1:5001{page}"
    assert pages(fresh, url="http://127.0.0.1:5002") == {
        "front": f"http://127.0.0.1:5002{page}",
        "summary": f"http://127.0.0.1:5002/#/experiments/7/runs/c0/artifacts/summary.html?{mode}",
        "compare": f"http://127.0.0.1:5002/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%227%22%5D&{mode}",
        "models": f"http://127.0.0.1:5002/#/models/{NAME}?{mode}",
    }
    assert pages(fresh, "http://host:80") == {"front": "http://host:80/#/experiments"}


def test_the_store_of_the_environment_goes_before_our_own(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/mlflow.db")
    assert tracking_uri(fresh) == "sqlite:////elsewhere/mlflow.db"
    assert tracking_uri(fresh, "sqlite:////given.db") == "sqlite:////given.db"


SECRET = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12)


@given(user=SECRET, password=SECRET, token=SECRET)
def test_addresses_lose_their_secrets_wherever_they_stand(user: str, password: str, token: str) -> None:
    uri = f"https://{user}:{password}@host:5000/ml?token={token}"
    assert public(uri) == "https://host:5000/ml"
    text = redact(f"Error('cannot reach {uri}')")
    assert not any(secret in text for secret in (user, password, token))


@given(st.text(max_size=300) | st.text("a./ :", max_size=300))
def test_every_name_is_made_one_that_mlflow_takes_and_a_good_one_is_kept(text: str) -> None:
    name = entries.entry_name(text)
    assert re.fullmatch(r"[/\w.\- :]{1,250}", name)
    assert posixpath.normpath(name) == name
    assert not name.startswith(("/", "..")) or name.startswith("...") or re.match(r"\.\.[^/]", name)
    assert entries.entry_name(name) == name


@settings(max_examples=50)
@given(
    values=st.lists(st.text(max_size=20), max_size=8),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    most=st.integers(1, 99),
)
def test_lines_are_the_same_however_the_file_grows_and_however_much_is_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], cuts: list[int], most: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    data = b"".join(json.dumps({"value": value}).encode() + b"\n" for value in values)
    lines, found = Lines(path), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        with path.open("ab") as file:
            file.write(data[start:end])
        while more := lines.read(lines.size(), most):
            found += more
    assert [line["value"] for line in found] == values
    assert not lines.waiting()


@given(st.integers(0, 400))
def test_a_description_fits_into_a_tag_and_counts_what_it_leaves_out(points: int) -> None:
    front = pd.DataFrame({"trial": range(points), "accuracy": 0.5, "bops": 1000, "bits": "8/8 4/4x18 8/8"})
    text = entries.description(SWEEP, front, points)
    shown = sum(line.startswith("| ") for line in text.splitlines()) - 2
    left_out = re.search(r"and (\d+) more", text)
    assert len(text) <= entries.TAG_MAX
    assert shown + (int(left_out[1]) if left_out else 0) == points
