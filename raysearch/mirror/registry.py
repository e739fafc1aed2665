"""The front in MLflow's model registry: one registered model for a sweep, one version for each point.

A version is a packed file (`trainables.packed`) and `raysearch.registered_model`, so that

    mlflow.set_tracking_uri(URI)
    mlflow.pyfunc.load_model("models:/NAME@knee").predict(images)

works in a fresh process that has raysearch installed, without a pickle. Its tags say what it costs; the aliases are
`knee`, `most-accurate`, `fewest-bops` and `smallest`. Registering again adds what is missing and moves the aliases.
"""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.wording import short_bits
from raysearch import __version__
from raysearch.errors import RecordError, TrialError
from raysearch.facts import versions
from raysearch.mirror.entries import outcome
from raysearch.mirror.links import Progress, public, redact, tracking_uri
from raysearch.result import Result

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CODE = Path(__file__).parents[1] / "registered_model.py"
POINT, DIGEST, ON_FRONT = "raysearch.point", "raysearch.digest", "pareto"
TAGGED = ("trial", "method", "accuracy", "test_accuracy", "bops", "relative_bops", "size_bytes", "bits")


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What became of the points of a front.

    Attributes:
        uri: of the store, without credentials.
        name: of the registered model.
        versions: those that are in the registry now, by point of the front (`trial 7`, `trial 7, 4-bit`).
        refused: why others are not.
    """

    uri: str
    name: str
    versions: dict[str, str]
    refused: dict[str, str]


def register(run: Path, uri: str | None = None) -> Registered:
    """Put the points of a sweep's front into the registry of its MLflow store.

    Args:
        run: the sweep's folder.
        uri: the store; `links.tracking_uri` says what None means.

    Raises:
        RecordError: no complete trial.
        TrialError: MLflow cannot be reached, or has no runs of this sweep yet.
    """
    from mlflow import MlflowClient

    from raysearch.tracking import failures, mlflow_settings

    run = Path(run).resolve()
    store = tracking_uri(run, uri)
    result = Result(run)
    front = result.front()
    known = Progress.load(run)
    if known.experiment_id is None or known.uri != public(store):
        raise TrialError(f"MLflow at {public(store)} has no runs of {run}: first `raysearch mirror {run}`")
    with mlflow_settings(), _quiet():
        try:
            return _Registrar(result, MlflowClient(tracking_uri=store), known).register(
                front.to_pandas(), front.marks()
            )
        except failures() as error:
            reason = redact(f"{type(error).__name__}: {error}")
            raise TrialError(f"cannot register at {public(store)}: {reason}") from error


class _Registrar:
    """One sweep and one registry."""

    def __init__(self, result: Result, client: "MlflowClient", known: Progress) -> None:
        self.result, self.client, self.known = result, client, known
        self.name = known.sweep
        self.records = {(row["trial"], row["point"]): row for row in result.records()}

    def register(self, front: "pd.DataFrame", marks: Mapping[str, int]) -> Registered:
        self._ensure_model()
        there = self._versions()
        found: dict[str, str] = {}
        refused: dict[str, str] = {}
        by_position: dict[int, str] = {}
        for position, row in enumerate(front.to_dict(orient="records")):
            record = self.records[row["trial"], row["point"]]
            words = _words(record)
            version = there.get(words)
            if version is None or version.tags.get(DIGEST) != record["digest"]:
                try:
                    version = self._make(record)
                except ValueError as error:  # of ConfigError and RecordError: it cannot be packed, or is not there
                    refused[words] = str(error)
                    continue
            by_position[position] = found[words] = str(version.version)
            self._tag(version, record)
        self._unmark([version for words, version in there.items() if words not in found])
        self._alias({mark: by_position[position] for mark, position in marks.items() if position in by_position})
        return Registered(uri=self.known.uri, name=self.name, versions=found, refused=refused)

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        from trainables.build import normalisation
        from trainables.config import parse

        sweep = self.result.description
        tags = {name: str(sweep[name]) for name in ("method", "model", "data")}
        config = parse(next(iter(self.records.values()))["config"])
        told = " and ".join(f"{name} {values}" for name, values in normalisation(config).items())
        words = (
            f"The front of the sweep {self.name}. Input: float32 images (N, C, H, W) of {sweep['data']}, normalised"
            f"{f' from pixels of 0..1 with {told}' if told else ''}; output: logits (N, classes)."
        )
        try:
            self.client.create_registered_model(self.name, tags=tags, description=words)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self) -> dict[str, "ModelVersion"]:
        """The newest version of each point."""
        found: dict[str, ModelVersion] = {}
        token: str | None = None
        while True:
            page = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000, page_token=token)
            for version in sorted(page, key=lambda each: int(each.version)):
                found[version.tags.get(POINT, "")] = version
            token = page.token
            if not token:
                return found

    def _make(self, record: Mapping[str, Any]) -> "ModelVersion":
        """Pack a point, leave it with its trial's run, and make it a version."""
        run_id = self.known.runs.get(str(record["trial"]))
        if run_id is None:
            raise RecordError(f"trial {record['trial']} has no run in MLflow: first `raysearch mirror`")
        place = "model" if record["point"] == "final" else f"model-{record['point']}"
        with tempfile.TemporaryDirectory() as folder:
            packed, model = Path(folder) / "network.safetensors", Path(folder) / "model"
            self.result.export(record["trial"], record["point"], to=packed)
            _save(model, packed, self.result.shapes(record["trial"]))
            self.client.log_artifacts(run_id, str(model), place)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{place}"
        tags = {POINT: _words(record), DIGEST: record["digest"]}
        words = f"{outcome(record)}; bits {short_bits(record['bits'])}"
        return self.client.create_model_version(self.name, source, run_id=run_id, tags=tags, description=words)

    def _tag(self, version: "ModelVersion", record: Mapping[str, Any]) -> None:
        names = (*TAGGED, *record.get("measures", ()))
        facts = {name: record.get(name) for name in names} | {"bits": short_bits(record["bits"]), ON_FRONT: "true"}
        for name, value in facts.items():
            if value is not None and version.tags.get(name) != str(value):
                self.client.set_model_version_tag(self.name, version.version, name, str(value))

    def _unmark(self, versions: "list[ModelVersion]") -> None:
        """Versions stay when their points leave the front: somebody may use them."""
        for version in versions:
            if ON_FRONT in version.tags:
                self.client.delete_model_version_tag(self.name, version.version, ON_FRONT)

    def _alias(self, wanted: Mapping[str, str]) -> None:
        there = self.client.get_registered_model(self.name).aliases
        for alias, version in wanted.items():
            if str(there.get(alias)) != version:
                self.client.set_registered_model_alias(self.name, alias, version)


def _words(record: Mapping[str, Any]) -> str:
    label = "" if record["point"] == "final" else f", {record['point']}"
    return f"trial {record['trial']}{label}"


def _save(path: Path, packed: Path, shapes: tuple[int, tuple[int, int, int]]) -> None:
    """A model in MLflow's format: code, packed file, signature, and an image of noise as its example."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    classes, shape = shapes
    kind = np.dtype(np.float32)
    mlflow.pyfunc.save_model(
        path,
        python_model=str(CODE),
        artifacts={"network": str(packed)},
        signature=ModelSignature(Schema([TensorSpec(kind, (-1, *shape))]), Schema([TensorSpec(kind, (-1, classes))])),
        input_example=_example(shape),
        pip_requirements=[f"raysearch=={__version__}", f"torch=={versions()['torch'].partition('+')[0]}"],
    )


def _example(shape: tuple[int, int, int]) -> "np.ndarray":
    """Two images of noise as wide as normalised pixels, shape (2, channels, height, width)."""
    import numpy as np

    noise: np.ndarray = np.random.default_rng(0).standard_normal((2, *shape)).round(2).astype(np.float32)
    return noise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow recommends type hints to whoever saves a model, and shows progress bars of a single file."""
    noisy = logging.getLogger("mlflow")
    level = noisy.level
    noisy.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*type hint.*", category=UserWarning)
        try:
            yield
        finally:
            noisy.setLevel(level)
