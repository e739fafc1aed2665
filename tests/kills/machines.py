"""A Ray cluster of several nodes on this machine, in a process of its own; a head without CPUs and nodes of one CPU.

    python -m tests.kills.machines NODES

It writes its address, and for each line on its standard input, a JSON object of environment variables, it adds a node;
at the end of its input it ends.
"""

import json
import os
import subprocess
import sys
from typing import Any

from raysearch.cluster.connection import RAY_ENVIRONMENT
from tests.kills.victims import end_all


class Machines:
    """A cluster, from outside.

    Args:
        nodes: how many there are at first, beside the head.
        environment: over that of this process.
    """

    def __init__(self, nodes: int, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kills.machines", str(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **RAY_ENVIRONMENT, **environment},
            start_new_session=True,
        )
        self.address = self._answer()
        self.raylets = [int(self._answer()) for _ in range(nodes)]

    def _answer(self) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("machines "):
                return line.split()[1]
        raise AssertionError("the cluster did not start")

    def add(self, **environment: str) -> None:
        """One more node, with an environment of its own."""
        assert self._process.stdin
        print(json.dumps(environment), file=self._process.stdin, flush=True)
        self.raylets.append(int(self._answer()))

    def close(self) -> None:
        """Take it down."""
        end_all(self._process.pid)
        self._process.communicate()


def main(nodes: int) -> None:
    """Serve a cluster until the end of standard input."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    def add(**environment: str) -> None:
        node: Any = cluster.add_node(num_cpus=1, env_vars=environment)
        (raylet,) = node.all_processes["raylet"]
        print("machines", raylet.process.pid, flush=True)

    print("machines", cluster.address, flush=True)
    for _ in range(nodes):
        add()
    for line in sys.stdin:
        add(**json.loads(line))
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
