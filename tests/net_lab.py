"""Real hosts on one machine: namespaces of network, mounts, processes and host name, each with an sshd of its own.

Linux ends a host's processes with its first one, so that a host can be switched off; and all of them end with pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

CLIENT = "login"
SSHD = """Port 22
ListenAddress 0.0.0.0
HostKey {keys}/{name}
AuthorizedKeysFile {keys}/login.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
SSH_CONFIG = """Host *
  User root
  IdentityFile {keys}/login
  IdentitiesOnly yes
  UserKnownHostsFile {keys}/known_hosts
  StrictHostKeyChecking yes
"""


class NetLab:
    """Hosts ``n0``, ``n1``, ... with sshd, and one to call them from; all on one switch and with one file system.

    Args:
        folder: for keys and configs.
        count: hosts with sshd.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.names = folder, [f"n{number}" for number in range(count)]
        self.ssh_config = folder / "ssh_config"
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Switches everything on."""
        Path("/run/sshd").mkdir(exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in (CLIENT, *self.names))]
        (self.folder / "etc_hosts").write_text("\n".join(lines) + "\n")
        for name in (CLIENT, *self.names):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        keys = [f"{name} {(self.folder / f'{name}.pub').read_text()}" for name in self.names]
        (self.folder / "known_hosts").write_text("".join(keys))
        self.ssh_config.write_text(SSH_CONFIG.format(keys=self.folder))
        self._hold("switch", ["--net"], "exec sleep infinity")
        self._in_switch("ip", "link", "add", "br0", "type", "bridge")
        self._in_switch("ip", "link", "set", "br0", "up")
        self._hold(CLIENT, ["--net", "--uts", "--mount"], self._dress(CLIENT) + "exec sleep infinity")
        self._wire(CLIENT)
        for name in self.names:
            self.switch_on(name)

    def down(self) -> None:
        """Switches everything off."""
        for name in list(self._holders):
            self.switch_off(name)

    def address(self, name: str) -> str:
        """Of a host."""
        return f"10.77.0.{10 + [CLIENT, *self.names].index(name)}"

    def switch_on(self, name: str) -> None:
        """Starts a host; returns once its sshd listens."""
        config = self.folder / f"sshd_{name}"
        config.write_text(SSHD.format(keys=self.folder, name=name))
        script = self._dress(name) + f"exec /usr/sbin/sshd -D -f {config} -E {self.folder}/sshd_{name}.log"
        self._hold(name, ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"], script)
        self._wire(name)
        wait_for(lambda: self.run_on(name, "sh", "-c", "ss -ltn | grep -q :22").returncode == 0, 10)

    def switch_off(self, name: str) -> None:
        """As by pulling the plug: every process of the host is gone, nobody is told."""
        wired = name in self.names and "switch" in self._holders
        if wired:
            self.link(name, up=False)  # the kernel would still tell the others that connections have ended
        holder = self._holders.pop(name)
        holder.kill()
        holder.wait()
        if wired:
            subprocess.run([*self._enter("switch"), "ip", "link", "del", name], capture_output=True)

    def link(self, name: str, *, up: bool) -> None:
        """Plugs a host's cable in or out, at the switch."""
        self._in_switch("ip", "link", "set", name, "up" if up else "down")

    def run_on(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host."""
        return subprocess.run(self.on(name, words), capture_output=True, text=True)

    def on(self, name: str, words: Sequence[str]) -> list[str]:
        """A command as it is called on a host."""
        return [*self._enter(name), *words]

    def processes(self, name: str) -> dict[int, str]:
        """Command lines of a host's live processes by their number here, but for the first, which is its sshd."""
        first = self._inside(name)
        space = os.readlink(f"/proc/{first}/ns/pid")
        found = {}
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if process.pid != first and os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found[process.pid] = " ".join(process.cmdline())  # of a zombie there is none
        return found

    def from_client(self, words: Sequence[str]) -> list[str]:
        """A command as it is called on the login host."""
        return self.on(CLIENT, words)

    def _dress(self, name: str) -> str:
        """Shell words: name, mounts and loopback of a host; then it waits for its cable."""
        return (
            f"hostname {name} && mount --bind {self.folder}/etc_hosts /etc/hosts && ip link set lo up && "
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done && "
            f"ip addr add {self.address(name)}/24 dev eth0 && ip link set eth0 up && "
        )

    def _hold(self, name: str, spaces: Sequence[str], script: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", "-c", script]
        self._holders[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        wait_for(lambda: self._inside(name) is not None, 10)

    def _inside(self, name: str) -> int | None:
        """The first process within a host's namespaces."""
        holder = self._holders[name]
        assert holder.poll() is None, f"{name} did not come up"
        own = os.readlink("/proc/self/ns/net")
        for process in (psutil.Process(holder.pid), *psutil.Process(holder.pid).children()):
            try:
                forked = name not in self.names or process.pid != holder.pid
                if forked and os.readlink(f"/proc/{process.pid}/ns/net") != own:
                    return process.pid
            except OSError:
                continue
        return None

    def _wire(self, name: str) -> None:
        inside = str(self._inside(name))
        # Always the same: the others know a host that was switched off and on by it for a while.
        hardware = f"02:00:0a:4d:00:{int(self.address(name).rpartition('.')[2]):02x}"
        peer = ("peer", "name", "eth0", "address", hardware, "netns", inside)
        self._in_switch("ip", "link", "add", name, "type", "veth", *peer)
        self._in_switch("ip", "link", "set", name, "master", "br0", "up")
        wait_for(lambda: self.address(name) in self.run_on(name, "ip", "-4", "addr").stdout, 10)

    def _enter(self, name: str) -> list[str]:
        spaces = ["--net", "--uts", "--mount"] if name != "switch" else ["--net"]
        spaces += ["--pid"] if name in self.names else []
        return ["nsenter", "--target", str(self._inside(name)), *spaces, f"--wdns={os.getcwd()}"]

    def _in_switch(self, *words: str) -> None:
        _run(*self._enter("switch"), *words)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def wait_for(happened: Callable[[], object], seconds: float) -> None:
    """Looks again and again."""
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.05)


@contextmanager
def net_lab(folder: Path, count: int) -> Iterator[NetLab]:
    """A lab that is gone afterwards. Skips the test where that is not possible; in CI it must be."""
    missing = [word for word in ("ip", "ssh", "unshare", "nsenter", "setpriv") if shutil.which(word) is None]
    missing += [] if Path("/usr/sbin/sshd").exists() else ["sshd"]
    reason = f"missing: {', '.join(missing)}" if missing else "" if os.getuid() == 0 else "only root may"
    if not reason:
        tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
        reason = tried.stderr.decode().strip()
    if reason:
        assert "CI" not in os.environ, f"CI must have real hosts to try: {reason}"
        pytest.skip(f"hosts in namespaces: {reason}")
    lab = NetLab(folder, count)
    try:
        lab.up()
        yield lab
    finally:
        lab.down()
