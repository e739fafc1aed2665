"""A sweep on a cluster that `ray up` made: hosts of our own, reached by ssh, one of which is taken away in the middle.

    python -m tests.cluster.ray_up

The configuration is the last section of the shipped `cluster.yaml` with addresses, key and folders of this test; the
commands are those of the README. One worker host loses its power in the middle of the sweep and comes back; the sweep
must end with the front of an undisturbed one, and the cluster with all its nodes. Prints a transcript.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from raysearch.result import Result
from tests.cluster import on_premise
from tests.cluster.hosts import Hosts, missing
from tests.kills.cells import outcome
from tests.raysearch.cluster import ROOT, check_books, lines

SHIPPED = on_premise((ROOT / "cluster.yaml").read_text())
TRIALS = 6
SWEEP = ["--space", "uniform", "--trials", str(TRIALS), "--epochs", "4", "--set", "training/batch_size=8"]
SWEEP += ["--set", "start/epochs=1", "--set", "data/train_limit=1000", "--set", "optimizer/lr=0.005"]
PATIENCE_S = 600
BIN = Path(sys.executable).parent


class Scenario:
    """The cluster, and the laptop that speaks to it.

    Args:
        folder: for everything; absolute.
        say: hears each step.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._began = time.monotonic()
        self._say = say
        self.shared, self.laptop = folder / "shared", folder / "laptop"
        self.shared.mkdir()
        self.laptop.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(self.laptop),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.hosts = Hosts(folder, 3)
        self.file = folder / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(self._config()))
        self.say(f"3 hosts: {', '.join(self.hosts.addresses)}")

    def say(self, text: str) -> None:
        """A line of the transcript."""
        self._say(f"{time.monotonic() - self._began:6.1f} s  {text}")

    def _config(self) -> dict[str, Any]:
        """The shipped configuration with what a person has to edit."""
        text = SHIPPED.replace("/shared", str(self.shared)).replace("/home/ubuntu", str(Path.home()))
        config: dict[str, Any] = yaml.safe_load(text)
        head, *workers = self.hosts.addresses
        config["cluster_name"] = f"raysearch-{os.getpid()}"
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        token, _ = config["file_mounts"]
        config["file_mounts"] = {token: str(self.laptop / ".ray" / "auth_token")}
        # What a wheel would install lies there already; of 20 MB of code and 6 GB of libraries nothing is copied.
        link = f"mkdir -p ~/raysearch && ln -sfn {BIN} ~/raysearch/bin"
        path = f"echo 'export PYTHONPATH={ROOT}' >> ~/.bashrc"
        config["setup_commands"] = [link, *config["setup_commands"][1:], path]
        for kind in ("head", "worker"):
            commands = config[f"{kind}_start_ray_commands"]
            device = f"$(ip -o -4 address show to {head}/24 | cut -d' ' -f2)"
            config[f"{kind}_start_ray_commands"] = [each.replace("eth0", device) for each in commands]
        return config

    def laptop_does(self, *command: str) -> str:
        """A command on the laptop; its output."""
        self.say("$ " + " ".join(command).replace(str(self.file), "cluster.yaml"))
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def on_head(self, command: str) -> str:
        """A command on the head through `ray exec`."""
        return self.laptop_does("ray", "exec", "--no-config-cache", str(self.file), command)

    def nodes(self) -> int:
        """How many nodes Ray has, without a line in the transcript."""
        program = "import ray; ray.init(log_to_driver=False); print('alive', sum(n['Alive'] for n in ray.nodes()))"
        said = self.hosts.ssh(0, f'source ~/.bashrc; RAY_ADDRESS=auto {BIN}/python -c "{program}"').stdout
        return int(said.rpartition("alive ")[2] or 0)

    def wait(self, what: str, true: Callable[[], Any]) -> None:
        """Until something is so."""
        until = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < until, f"{what}: not within {PATIENCE_S} s"
            time.sleep(0.5)
        self.say(what)

    def play(self) -> Path:
        """All of it; the run folder that it leaves.

        Raises:
            AssertionError: what went wrong.
        """
        run = self.shared / "runs" / "first"
        records = run / "records.jsonl"
        self.laptop_does("ray", "get-auth-token", "--generate")
        self.laptop_does("ray", "up", "-y", "--no-config-cache", str(self.file))
        self.wait("all 3 nodes are in the cluster", lambda: self.nodes() == 3)
        sweep = " ".join(["raysearch", "sweep", *SWEEP, "--concurrent", "2", "--out", str(run)])
        self.on_head(f"ray job submit --no-wait --submission-id first -- {sweep}")
        self.wait("one trial has ended", lambda: lines(records))
        self.hosts.take_away(2)
        self.say("host2 has lost its power")
        have = len(lines(records))
        self.wait("another trial has ended meanwhile", lambda: len(lines(records)) > have)
        self.hosts.start(2)
        self.say("host2 is back")
        self.wait("all trials have ended", lambda: len(lines(records)) == TRIALS)
        self.wait("the sweep has ended", (run / "end.json").exists)
        said = self.on_head("ray job logs --follow first")
        self.say(said[said.index(" on the front, hyper") - 9 :])
        assert "MLflow misses" not in said
        self.wait("all 3 nodes are in the cluster", lambda: self.nodes() == 3)
        self.laptop_does("ray", "rsync-down", str(self.file), f"{run}/", f"{self.laptop}/first/")
        self.laptop_does("ray", "down", "-y", str(self.file))
        return self.laptop / "first"

    def close(self) -> None:
        """Switch everything off."""
        self.hosts.close()


def undisturbed(folder: Path) -> Path:
    """The same sweep on this machine."""
    command = [sys.executable, "-c", "from raysearch.cli import main; main()", "sweep", *SWEEP, "--out", str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run(command, check=True, capture_output=True, env=environment | {"PYTHONPATH": str(ROOT)})
    return folder


def play(folder: Path, say: Callable[[str], None]) -> None:
    """The whole scenario, and what must be so in the end.

    Raises:
        AssertionError: what is not.
    """
    scenario = Scenario(folder, say)
    try:
        run = scenario.play()
    finally:
        scenario.close()
    check_books(Result(run), TRIALS)
    assert (folder / "shared" / "mlflow" / "mlflow.db").exists(), "the head has no MLflow server"
    assert json.loads((run / "mlflow.json").read_text()), "MLflow was not told"
    assert outcome(run) == outcome(undisturbed(folder / "undisturbed"))
    scenario.say("books are whole, numbers and front are those of an undisturbed sweep, bit for bit")


if __name__ == "__main__":
    if missing():
        sys.exit(f"this machine cannot make hosts: it lacks {', '.join(missing())}")
    scratch = Path(tempfile.mkdtemp(prefix="ray-up-"))
    play(scratch, lambda text: print(text, flush=True))
    shutil.rmtree(scratch)
