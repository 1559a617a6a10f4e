"""Machines that are network namespaces of this one: each with a host name, an address and mounts of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

NETNS_ETC = Path("/etc/netns")
"""What lies in ``<namespace>/`` here is seen in /etc by what `ip netns exec` starts."""


class NetLab:
    """`count` machines ``n0``, ``n1``, ... at 10.78.0.10 and on, on one switch; nothing of this machine is touched."""

    def __init__(self, count: int, prefix: str) -> None:
        self.prefix, self.names = prefix, [f"n{number}" for number in range(count)]

    def space(self, name: str) -> str:
        """The network namespace of a machine."""
        return f"{self.prefix}-{name}"

    def address(self, name: str) -> str:
        """Its address."""
        return f"10.78.0.{10 + self.names.index(name)}"

    def up(self) -> None:
        """Makes the switch and the machines."""
        switch = self.space("sw")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(self.names):
            space = self.space(name)
            _run("ip", "netns", "add", space)
            _run(*f"ip -n {switch} link add p{number} type veth peer name eth0 netns {space}".split())
            _run(*f"ip -n {switch} link set p{number} master br0 up".split())
            _run(*f"ip -n {space} addr add {self.address(name)}/24 dev eth0".split())
            _run(*f"ip -n {space} link set eth0 up".split())
            _run(*f"ip -n {space} link set lo up".split())
            self.write_hosts(name, {each: self.address(each) for each in self.names})

    def write_hosts(self, name: str, addresses: dict[str, str]) -> None:
        """/etc/hosts of a machine."""
        folder = NETNS_ETC / self.space(name)
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {each}" for each, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def down(self) -> None:
        """Takes away whatever is there of it."""
        for name in (*self.names, "sw"):
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True)
            shutil.rmtree(NETNS_ETC / self.space(name), ignore_errors=True)

    def command(self, name: str, words: Sequence[str], before: str = "true") -> list[str]:
        """A command on a machine, in mounts of its own, after the shell's `before`."""
        script = f'hostname "$1" && {before} && shift && exec "$@"'
        return [
            *("ip", "netns", "exec", self.space(name), "unshare", "--mount", "--uts"),
            *("sh", "-c", script, "sh", name, *words),
        ]


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def netlab(count: int) -> Iterator[NetLab]:
    """A lab that is gone afterwards. Skips the test where that is not possible; in CI it must be."""
    lab = NetLab(count, f"ct{os.getpid()}")
    try:
        lab.up()
        subprocess.run(lab.command("n0", ["true"]), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lab.down()
        assert "CI" not in os.environ, f"CI must have network namespaces: root, ip and unshare are needed: {error}"
        pytest.skip(f"network namespaces need root, ip and unshare: {error}")
    try:
        yield lab
    finally:
        lab.down()
