"""What a reader of a report must know before believing it, computed from the sweeps that it shows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.swept import Swept

FEW_SEEDS = 5


def caveats(groups: Mapping[str, Sequence[Swept]]) -> list[str]:
    """Sentences, the most important first.

    Args:
        groups: name of each question to its sweeps, one for each seed.
    """
    return [
        *_about_sharing(groups),
        *_about_splits(groups),
        *_about_seeds(groups),
        *_about_equality(groups),
        *_about_gaps(groups),
    ]


def _about_sharing(groups: Mapping[str, Sequence[Swept]]) -> Iterator[str]:
    for sweep in _all(groups):
        search = sweep.description.get("search")
        if search is not None:
            images = f" on {search['images']} validation images" if search["images"] else ""
            yield (
                f"{sweep.name}: accuracies{images} are those of the shared weights of one network, which rank points "
                "rather than measure them: `raysearch supernet finetune` trains points alone and says how well."
            )


def _about_splits(groups: Mapping[str, Sequence[Swept]]) -> Iterator[str]:
    tested = [row for sweep in _all(groups) for row in sweep.records if row.get("test_accuracy") is not None]
    chosen = (
        "Accuracies are of the validation split, by which the points were also chosen: expect a little less elsewhere."
    )
    if not tested:
        yield f"{chosen} No test accuracy has been measured; `raysearch pick` measures that of the point it picks."
        return
    points = f"{len(tested)} point{'s' * (len(tested) > 1)}"
    yield f"{chosen} Test accuracy was measured once, for {points}."
    if any(row.get("test_images") for row in tested):
        yield "Intervals of test accuracies speak of the number of test images alone, not of another training's luck."


def _about_seeds(groups: Mapping[str, Sequence[Swept]]) -> Iterator[str]:
    seeds = {name: len(members) for name, members in groups.items()}
    if set(seeds.values()) == {1}:
        yield (
            "Each question was asked with one seed: nothing here says how much of a difference is chance."
            if len(seeds) > 1
            else "One seed: nothing here says how much another one would change."
        )
    elif min(seeds.values()) < FEW_SEEDS:
        told = ", ".join(f"{name}: {count}" for name, count in seeds.items())
        yield f"Few seeds ({told}): intervals are wide, and bands show the best and the worst seed, not a confidence."
    if len(set(seeds.values())) > 1:
        yield "The shared front favours questions with more seeds: they had more trials. Compare the tables."


def _about_equality(groups: Mapping[str, Sequence[Swept]]) -> Iterator[str]:
    for field, words in (
        ("epochs", "Trials were trained for unequal numbers of epochs"),
        ("trials", "Sweeps had unequal numbers of trials"),
        ("model", "Models differ, and relative BOPs are relative to each model's own 32x32-bit BOPs"),
        ("objectives", "Sweeps searched for different objectives; the front here is that of the first one's"),
    ):
        values = {name: _one(members[0].asked.get(field)) for name, members in groups.items()}
        if len(set(values.values())) > 1:
            yield f"{words}: {', '.join(f'{name} {value}' for name, value in values.items())}."
    data = {_one({k: v for k, v in sweep.asked.items() if k.startswith("settings data/")}) for sweep in _all(groups)}
    if len(data) > 1:
        yield "Settings of the data differ, so accuracies are not all of the same images."


def _about_gaps(groups: Mapping[str, Sequence[Swept]]) -> Iterator[str]:
    for sweep in _all(groups):
        failed, pruned = sweep.count("failed"), sweep.count("pruned")
        ended = len({record["trial"] for record in sweep.records})
        wanted = sweep.description.get("trials", ended)
        gaps = [f"{failed} failed"] * bool(failed) + [f"{pruned} stopped early"] * bool(pruned)
        gaps += [f"{wanted - ended} of {wanted} not there yet"] * (ended < wanted and not sweep.over)
        if gaps:
            yield f"{sweep.name}: of its trials, {', '.join(gaps)}."
        if ended < wanted and sweep.over:
            why = (
                "the budget of epochs was spent" if sweep.asked.get("epoch_budget") else "there was nothing else to try"
            )
            yield f"{sweep.name}: {ended} trials instead of {wanted}, for {why}."


def _all(groups: Mapping[str, Sequence[Swept]]) -> list[Swept]:
    return [sweep for members in groups.values() for sweep in members]


def _one(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in sorted(value.items()))
    return "-" if value is None else str(value)
