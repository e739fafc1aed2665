"""Hosts of one's own making: Linux namespaces with a network address, processes, a home and an sshd of their own.

They share the file system otherwise, which is what a cluster's shared folder is for. Taking a host away kills its first
process, and with it all others of its PID namespace: as a power cut does, nobody says goodbye. Needs root, and the
programs that `missing` names.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "ip", "mount", "sshd", "ssh", "ssh-keygen", "rsync")
READY_S = 30
SETUP = """
set -e
mount -t tmpfs -o size=1g none /dev/shm
mkdir -p /tmp/ray {folder}/ray {folder}/home /run/sshd
{keep}
mount --bind {folder}/ray /tmp/ray
mount --bind {folder}/home {home}
{restore}
ip link set lo up
until ip link show {device} > /dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev {device}
ip link set {device} up
hostname {name}
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSHD = """
Port 22
ListenAddress {address}
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""


def missing() -> list[str]:
    """What this machine lacks to make hosts; empty where it can."""
    lacks = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    if os.getuid() != 0:
        return ["root", *lacks]
    trial = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "true"]
    if not lacks and subprocess.run(trial, capture_output=True).returncode:
        lacks.append("the right to make namespaces")
    return lacks


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Hosts:
    """Some hosts on a bridge that this machine is connected to, too.

    Args:
        folder: for what they keep; absolute.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self._tag = f"{os.getpid() % 36**4:x}"
        self._net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self._bridge = f"rs{self._tag}"
        self.addresses = [f"{self._net}.{number + 1}" for number in range(count)]
        self._inits: dict[int, subprocess.Popen[bytes]] = {}
        self.keys = folder / "keys"
        self.keys.mkdir(parents=True)
        for name in ("host", "user"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.keys / name))
        _do("ip", "link", "add", self._bridge, "type", "bridge")
        _do("ip", "address", "add", f"{self._net}.254/24", "dev", self._bridge)
        _do("ip", "link", "set", self._bridge, "up")
        for number in range(count):
            self.start(number)

    @property
    def key(self) -> Path:
        """The private key that opens all of them."""
        return self.keys / "user"

    def start(self, number: int) -> None:
        """Switch a host on."""
        folder, address, device = self.folder / f"host{number}", self.addresses[number], f"rs{self._tag}n{number}"
        shutil.rmtree(folder / "ray", ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / "sshd_config").write_text(SSHD.format(address=address, keys=self.keys))
        home = Path.home()
        python = Path(sys.base_prefix)
        inside = python.is_relative_to(home)  # an interpreter in the home must be seen in the host's own home
        script = SETUP.format(
            folder=folder,
            home=home,
            keep=f"mkdir -p {folder}/python && mount --bind {python} {folder}/python" if inside else "",
            restore=f"mkdir -p {python} && mount --bind {folder}/python {python}" if inside else "",
            device=device,
            address=address,
            name=f"host{number}",
            sshd=shutil.which("sshd", path=_path()),
        )
        spaces = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        with (folder / "log.txt").open("a") as log:
            self._inits[number] = subprocess.Popen(
                ["unshare", *spaces, "bash", "-c", script],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={"PATH": _path(), "HOME": str(home), "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        inside_pid = str(self._inside(number))
        _do("ip", "link", "add", device + "b", "type", "veth", "peer", "name", device, "netns", inside_pid)
        _do("ip", "link", "set", device + "b", "master", self._bridge, "up")
        self._until(lambda: self.ssh(number, "true").returncode == 0, f"host {number} does not answer")

    def ssh(self, number: int, command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2"]
        whole = ["ssh", *options, "-i", str(self.key), f"root@{self.addresses[number]}", command]
        return subprocess.run(whole, capture_output=True, text=True)

    def take_away(self, number: int) -> None:
        """Cut a host's power."""
        os.kill(self._inside(number), signal.SIGKILL)
        self._inits.pop(number).wait()

    def close(self) -> None:
        """Take all away, and the bridge."""
        for number in list(self._inits):
            self.take_away(number)
        _do("ip", "link", "delete", self._bridge)

    def _inside(self, number: int) -> int:
        """The first process of a host, as this machine numbers it."""
        children = Path(f"/proc/{self._inits[number].pid}/task/{self._inits[number].pid}/children")
        self._until(lambda: children.read_text().strip(), f"host {number} does not start")
        return int(children.read_text().split()[0])

    def _until(self, true: "object", message: str) -> None:
        until = time.monotonic() + READY_S
        while not true():  # type: ignore[operator]
            assert time.monotonic() < until, f"{message}: see {self.folder}"
            time.sleep(0.1)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _path()})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
