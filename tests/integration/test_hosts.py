"""Two hosts and a network, simulated by two network namespaces with torchrun in each."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import RECIPE, World, assert_whole, readme_command, steps

LOST_AFTER = 4  # seconds
FIRST, SECOND = "10.207.0.1", "10.207.0.2"


class Hosts:
    """Two network namespaces and the link between them."""

    def __init__(self, name: str):
        self.names = f"{name}a", f"{name}b"
        self.cables = f"{name}v", f"{name}w"
        for namespace in self.names:
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            self.cables[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            self.cables[1],
            "netns",
            self.names[1],
        )
        for namespace, cable, address in zip(self.names, self.cables, (FIRST, SECOND), strict=True):
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", cable)
        self.link("up")

    def link(self, state: str) -> None:
        """Connect (`up`) or cut (`down`) the cable."""
        for namespace, cable in zip(self.names, self.cables, strict=True):
            ip("-n", namespace, "link", "set", cable, state)

    def torchrun(self, number: int, log: Path, *arguments: str | Path, folder: Path) -> subprocess.Popen[bytes]:
        """Start torchrun on a host, with one process."""
        torchrun, *command = readme_command("several nodes")
        assert torchrun == "torchrun"
        command = [FIRST + ":29400" if word == "HOST:29400" else "1" if word == "8" else word for word in command]
        at = command.index("run")  # the test gives its own arguments after this
        # torchrun compares host names to choose the host of the store; here both hosts have the same name.
        place = ("--local-addr", (FIRST, SECOND)[number], "--rdzv-conf", f"is_host={int(number == 0)}")
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": self.cables[number],
            "SPINLM_LOST_AFTER": str(LOST_AFTER),
            "OMP_NUM_THREADS": "1",
        }
        launcher = ("ip", "netns", "exec", self.names[number], sys.executable, "-m", "torch.distributed.run", *place)
        command = [*launcher, *command[:at], *map(str, arguments)]
        with log.open("wb") as output:
            return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)

    def remove(self) -> None:
        """End the processes and remove the namespaces."""
        for namespace in self.names:
            for pid in ip("netns", "pids", namespace).split():
                subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)
            ip("netns", "del", namespace)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    try:
        hosts = Hosts(f"s{os.getpid() % 10**6}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces: {error.stderr.strip()}")
    yield hosts
    hosts.remove()


def test_cut_link_ends_both_hosts_and_a_rerun_continues(hosts: Hosts, world: World, tmp_path: Path) -> None:
    recipe, run = world.folder / "long.yaml", tmp_path / "run"
    recipe.write_text(
        RECIPE.replace("epochs: 3", "epochs: 30").replace("iterations: 2", "iterations: 1"), encoding="utf-8"
    )
    logs = [tmp_path / f"{number}.log" for number in range(2)]

    def start() -> list[subprocess.Popen[bytes]]:
        arguments = ("run", recipe, "--run-dir", run)
        return [hosts.torchrun(number, logs[number], *arguments, folder=world.folder) for number in range(2)]

    launchers = start()
    wait_until(lambda: len(steps(run)) > 8, launchers, logs)
    hosts.link("down")
    began = time.monotonic()
    for launcher in launchers:
        assert launcher.wait(timeout=90) != 0
    assert time.monotonic() - began < 90
    for number, log in enumerate(logs):
        text = log.read_text()
        assert text.count("spinlm: ") == 1, text
        assert f"spinlm: process {number} on" in text
        assert "run the same command again to continue" in text
    done = len(steps(run))
    assert_whole(run)

    hosts.link("up")
    launchers = start()
    assert [launcher.wait(timeout=120) for launcher in launchers] == [0, 0], logs[0].read_text()
    assert "resuming after step" in logs[0].read_text()
    assert len(steps(run)) > done and (run / "best").exists()


def wait_until(happened, launchers: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline and all(one.poll() is None for one in launchers), logs[0].read_text()
        time.sleep(0.05)
