"""The machines of a cluster: what they can give a sweep, now or after the autoscaler, and whether each can train it.

Both are found out before anything is written, so that a sweep that could never run says so at once. Every other node is
asked by a small task: for its versions, for the run folder and the data set, and, where Ray's autoscaler runs, for what
that may add.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysearch import facts
from raysearch.errors import SweepError
from raysearch.sweep import Sweep

ANSWER_S = 45.0
COMPARED = ("python", "torch", "torchvision", "raysearch")
"""What must be the same on the driver and on a node that trains."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Machines of a kind: how many there are, or may be after the autoscaler has added some."""

    cpus: float
    gpus: float
    count: int

    def places(self, cpus: int, gpus: float) -> int:
        """How many workers of so many CPU cores and GPUs one such machine holds."""
        by_cpus = int(self.cpus // cpus)
        if not gpus:
            return by_cpus
        # A share is of one GPU: 0.4 leaves a fifth of each unused.
        by_gpus = int(self.gpus) * int(1 / gpus + 1e-9) if gpus < 1 else int(self.gpus / gpus + 1e-9)
        return min(by_cpus, by_gpus)


@dataclass(frozen=True)
class Capacity:
    """What the cluster gives a sweep: concurrent trials, and GPUs of a worker."""

    concurrent: int
    gpus: float


def survey(sweep: Sweep, folder: Path, data_root: Path | None, shipped: bool) -> Capacity:
    """Ask all nodes, and work out what the cluster can give.

    Args:
        sweep: what is asked for.
        folder: the run folder, or where it is going to be made.
        data_root: where the data set lies; None for data that no node needs to have.
        shipped: whether the nodes run the driver's own code.

    Raises:
        SweepError: the cluster can never give what a trial needs, or a node cannot train.
    """
    answers = _ask_all(folder, data_root)
    _check(answers, folder, data_root, shipped)
    return capacity_of(sweep, _kinds([answer["autoscaler"] for _, answer in answers]))


def capacity_of(sweep: Sweep, kinds: Sequence[Kind]) -> Capacity:
    """How many trials of a sweep such machines hold at the same time.

    Raises:
        SweepError: they cannot hold one, or not as many as asked for.
    """
    have_cpus, have_gpus = (sum(getattr(kind, name) * kind.count for kind in kinds) for name in ("cpus", "gpus"))
    asked = sweep.gpus_per_worker
    gpus = float(have_gpus >= sweep.workers) if asked is None else asked
    places = sum(kind.places(sweep.cpus_per_worker, gpus) * kind.count for kind in kinds)
    most = places // sweep.workers
    if not most:
        need_cpus, need_gpus = sweep.workers * sweep.cpus_per_worker, sweep.workers * gpus
        enough = need_cpus <= have_cpus and need_gpus <= have_gpus
        spread = " in all, but too few on each machine" if enough else ""
        raise SweepError(
            f"a trial of {sweep.workers} workers needs {need_cpus} CPUs and {need_gpus:g} GPUs; the cluster has "
            f"{have_cpus:g} and {have_gpus:g}{spread}: lower --workers, --cpus-per-worker or --gpus-per-worker"
        )
    if sweep.concurrent is not None and sweep.concurrent > most:
        raise SweepError(f"concurrent = {sweep.concurrent}: the cluster holds {most} such trials at the same time")
    return Capacity(min(sweep.concurrent or most, sweep.trials), gpus)


def _kinds(autoscalers: Sequence[dict[str, Any] | None]) -> list[Kind]:
    """The machines that are there, and those that an autoscaler may add."""
    import ray

    counts: dict[tuple[float, float], int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            size = (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            counts[size] = counts.get(size, 0) + 1
    for config in filter(None, autoscalers):
        for kind in config["kinds"]:
            size = (float(kind["CPU"]), float(kind["GPU"]))
            counts[size] = max(counts.get(size, 0), min(kind["max_workers"], config["max_workers"]))
    return [Kind(*size, count) for size, count in counts.items()]


def _ask_all(folder: Path, data_root: Path | None) -> list[tuple[str, Answer]]:
    """Address and answer of each node; one machine may have several nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    parent = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    question = _question()
    task = ray.remote(question)
    asked: dict[Any, str] = {}
    answers: list[tuple[str, Answer]] = []
    with tempfile.NamedTemporaryFile(dir=parent, prefix=".raysearch-") as probe:
        given = (probe.name, data_root and str(data_root), COMPARED, context.gcs_address)
        for node in (node for node in ray.nodes() if node["Alive"]):
            address = node["NodeManagerAddress"]
            if node["NodeID"] == context.get_node_id():
                answers.append((address, question(*given)))
                continue
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(*given)] = address
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        if silent:
            where = ", ".join(asked[each] for each in silent)
            raise SweepError(f"node {where} did not answer within {ANSWER_S:g} s: see `ray status`, or remove the node")
        for each in answered:
            try:
                answers.append((asked[each], ray.get(each)))
            except ray.exceptions.RayError as error:
                why = " ".join(str(error).split())
                raise SweepError(f"node {asked[each]} cannot run a task: {why}") from error
    return answers


def _question() -> Any:
    """A task that travels by value: a node may not have our packages."""

    def answer(probe: str, data_root: str | None, packages: tuple[str, ...], cluster: str) -> dict[str, Any]:
        import importlib.metadata
        import importlib.util
        import os
        import platform

        import psutil
        import yaml

        versions = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions.setdefault(package, "?" if importlib.util.find_spec(package) else "")
        autoscaler = None
        commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        ours = [arguments for arguments in commands if f"--gcs-address={cluster}" in arguments]
        for path in {a.partition("=")[2] for each in ours for a in each if a.startswith("--autoscaling-config=")}:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                config = yaml.safe_load(file)
            most = config.get("max_workers", 2)
            kinds = [
                {name: kind.get("resources", {}).get(name, 0) for name in ("CPU", "GPU")}
                | {"max_workers": kind.get("max_workers", most)}
                for name, kind in config["available_node_types"].items()
                if name != config["head_node_type"]
            ]
            autoscaler = {"max_workers": most, "kinds": kinds}
        return {
            "versions": versions,
            "folder": os.access(probe, os.W_OK),
            "data": data_root is None or os.access(data_root, os.R_OK),
            "autoscaler": autoscaler,
        }

    return answer


def _check(answers: Sequence[tuple[str, Answer]], folder: Path, data_root: Path | None, shipped: bool) -> None:
    """Every node must see and write the run folder, see the data, and have the driver's versions."""
    mine = facts.versions()
    faults = []
    for address, answer in answers:
        if not answer["folder"]:
            faults.append(
                f"node {address} does not see {folder} or cannot write it: take an --out that all nodes share"
            )
        if not answer["data"]:
            faults.append(f"node {address} cannot read --data-root {data_root}: mount it there")
        for package in COMPARED[: 3 if shipped else 4]:
            ours, theirs = (_release(found.get(package, "")) for found in (mine, answer["versions"]))
            if ours and theirs not in (ours, "?"):
                here = f"has {package} {theirs}" if theirs else f"lacks {package}"
                faults.append(f"node {address} {here}, the driver has {ours}: install the same on all nodes")
    if faults:
        raise SweepError("; ".join(faults[:3]))


def _release(version: str) -> str:
    """A version without its build, as in 2.5.0+cpu: a head without a GPU may have another build than the nodes."""
    return version.partition("+")[0]
