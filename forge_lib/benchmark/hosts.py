"""Machines with their own network on this machine: Linux network namespaces on one switch. Needs root and iproute2."""

import os
import subprocess
import time


class Hosts:
    """Machines 1, 2, … with the addresses 10.77.0.1, 10.77.0.2, … on one switch, as unnamed network namespaces."""

    def __init__(self, count: int):
        self._holders = [subprocess.Popen(["unshare", "-n", "sleep", "3600"]) for _ in range(count + 1)]
        for holder in self._holders:
            self._wait_for_namespace(holder)
        self.call(0, "ip link add br0 type bridge")
        self.call(0, "ip link set br0 up")
        for n in range(1, count + 1):
            self.call(0, f"ip link add v{n} type veth peer name e0 netns {self._holders[n].pid}")
            self.call(0, f"ip link set v{n} master br0 up")
            for words in (f"addr add 10.77.0.{n}/24 dev e0", "link set e0 up", "link set lo up"):
                self.call(n, f"ip {words}")

    @staticmethod
    def _wait_for_namespace(holder: subprocess.Popen) -> None:
        """Waits until the process is in its own network namespace."""
        own = os.readlink("/proc/self/ns/net")
        end = time.monotonic() + 5
        while os.readlink(f"/proc/{holder.pid}/ns/net") == own and time.monotonic() < end:
            time.sleep(0.01)

    def on(self, n: int) -> list[str]:
        """Returns the words that run the command after them on machine n; 0 is the switch."""
        return ["nsenter", "-t", str(self._holders[n].pid), "-n"]

    def call(self, n: int, command: str) -> str:
        """Runs a command on machine n (0: the switch), which must succeed; returns its output."""
        return subprocess.run([*self.on(n), *command.split()], stdout=subprocess.PIPE, text=True, check=True).stdout

    def cut(self, n: int) -> None:
        """Cuts the link of machine n without an error at either end."""
        self.call(0, f"ip link set v{n} down")

    def heal(self, n: int) -> None:
        """Restores the link of machine n."""
        self.call(0, f"ip link set v{n} up")

    def close(self) -> None:
        """Removes the machines."""
        for holder in self._holders:
            holder.kill()
            holder.wait()


def shape(machines: Hosts, n: int, rate: str) -> None:
    """Limits the link of machine n to a rate such as "20mbit", in both directions."""
    for place, device in ((n, "e0"), (0, f"v{n}")):
        machines.call(place, f"tc qdisc replace dev {device} root tbf rate {rate} burst 32kb latency 200ms")
