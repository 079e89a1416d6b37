"""Two hosts on one machine: network namespaces with a host name and an address each, and a link between them.

What is sent stays inside. Root makes them, with Debian's iproute2; their names carry the process id.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from faults import runs

LINK = "wire0"
# After so many repeats the kernel gives a connection up: 13 s after a cut, which is later than the run itself
# notices. By itself Linux takes 15 repeats, up to a quarter of an hour.
REPEATS = 5
# What mpirun calls in place of ssh, with a host and a command; each namespace is named as its host.
AGENT = """#!/bin/sh
host=$1; shift
exec unshare --uts sh -c 'hostname "$0" && exec ip netns exec "$0" sh -c "$1"' "$host" "$*"
"""
MPIRUN = """. tests/mpi_env.sh
exec unshare --uts sh -c 'hostname "$0" && exec ip netns exec "$0" mpirun "$@"' "$0" "$@"
"""


def ip(*words):
    """Call `ip`; return what it prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def refusal():
    """Say why there can be no hosts here, or nothing."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"needs {missing[0]}"
    name = f"mfl{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
        subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True)
    except (AssertionError, subprocess.CalledProcessError) as error:
        return f"namespaces are refused: {error}"
    return ""


@contextmanager
def two_hosts():
    """Make two hosts that see each other; remove them and all that runs there."""
    names = [f"mfl{os.getpid()}-{letter}" for letter in "ab"]
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        hosts = Hosts(names, Path(folder) / "agent")
        try:
            hosts.make()
            yield hosts
        finally:
            hosts.remove()


class Hosts:
    """Two hosts: the server runs on the first, the workers on the second.

    Args:
        names: of the hosts.
        agent: file for what is called in place of ssh.
    """

    def __init__(self, names, agent):
        self.names, self.agent = names, agent

    def make(self):
        self.agent.write_text(AGENT)
        self.agent.chmod(0o755)
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
        for number, name in enumerate(self.names, start=1):
            ip("-n", name, "addr", "add", f"10.231.0.{number}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
            limit = f"echo {REPEATS} > /proc/sys/net/ipv4/tcp_retries2"
            subprocess.run(["ip", "netns", "exec", name, "sh", "-c", limit], check=True)

    def remove(self):
        made = [name for name in self.names if name in ip("netns", "list").split()]
        for name in made:
            for word in ip("netns", "pids", name).split():
                runs.send(int(word), signal.SIGKILL)
            ip("netns", "del", name)

    def launch(self, program, folder, out, *settings, options=()):
        """Start a run: the server on the first host, two workers on the second; its output can be read."""
        first, second = self.names
        mpirun = ["--with-ft", "ulfm", "--host", f"{first}:1,{second}:2", "--map-by", "slot", "-n", "3"]
        mpirun += ["--prtemca", "plm_ssh_agent", str(self.agent), "--prtemca", "prte_if_include", LINK]
        mpirun += ["--mca", "pml", "ob1", "--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", LINK]
        command = [sys.executable, *program, "run", str(folder / "run.toml"), "--out", str(out), *options]
        command += [part for setting in settings for part in ("--set", setting)]
        return subprocess.Popen(
            ["bash", "-c", MPIRUN, first, *mpirun, *command],
            cwd=runs.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def cut(self):
        """Set the link down, on the server's side."""
        ip("-n", self.names[0], "link", "set", LINK, "down")

    def mend(self):
        """Set the link up."""
        ip("-n", self.names[0], "link", "set", LINK, "up")

    def is_up(self):
        """Say whether both hosts see the link."""
        return all(self._link(name)["operstate"] == "UP" for name in self.names)

    def crossed(self):
        """Return how many bytes have come to the first host, and have left it."""
        stats = self._link(self.names[0])["stats64"]
        return stats["rx"]["bytes"], stats["tx"]["bytes"]

    def _link(self, name):
        return json.loads(ip("-n", name, "-j", "-s", "link", "show", "dev", LINK))[0]

    def process_ids(self):
        """Return the ids of what runs on the hosts."""
        return [int(word) for name in self.names for word in ip("netns", "pids", name).split()]
