"""Containers in a network namespace that somebody has made, as CNI does: what is in it is what the container has."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
import urllib.request

from harness import TIMEOUT_S, Case, processes, wait_until

BRIDGE = "e2e0"
HOST4, HOST6 = "10.88.0.1", "fd00:88::1"
POD4, POD6 = "10.88.0.2", "fd00:88::2"
# /dev/shm of a container has room for 64 MiB.
TRANSFER_BYTES = 50 << 20


def sh(*argv):
    """Runs a command of the node; returns what it says."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


def name_of(pid, thread):
    """The name of a thread."""
    with open(f"/proc/{pid}/task/{thread}/comm", encoding="ascii") as file:
        return file.read().strip()


class Pod:
    """A network namespace with an interface on a bridge of the node, as the bridge plug-in leaves it."""

    def __init__(self, case, mtu=1500):
        self.name = f"e2e-{os.getpid()}"
        self.path = f"/run/netns/{self.name}"
        self.case = case
        case.addCleanup(subprocess.run, ["ip", "netns", "del", self.name], check=False)
        case.addCleanup(subprocess.run, ["ip", "link", "del", BRIDGE], check=False)
        sh("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        sh("ip", "link", "add", BRIDGE, "mtu", str(mtu), "type", "bridge")
        sh("ip", "addr", "add", f"{HOST4}/24", "dev", BRIDGE)
        sh("ip", "addr", "add", f"{HOST6}/64", "dev", BRIDGE, "nodad")
        sh("ip", "link", "set", BRIDGE, "up")
        self.add("eth0", mtu)
        sh("ip", "link", "set", "peth0", "master", BRIDGE)
        self.ip("addr", "add", f"{POD4}/24", "dev", "eth0")
        self.ip("addr", "add", f"{POD6}/64", "dev", "eth0", "nodad")
        self.ip("route", "add", "default", "via", HOST4)
        self.ip("route", "add", "default", "via", HOST6)
        # What the kernel adds by itself is there before anybody looks.
        wait_until(lambda: "tentative" not in self.ip("addr"), "the addresses to be usable")

    def add(self, name, mtu=1500):
        """An interface, whose other end stays in the node."""
        sh("ip", "link", "add", f"p{name}", "mtu", str(mtu), "type", "veth",
           "peer", "name", name, "mtu", str(mtu), "netns", self.name)
        # A shim that hangs keeps the namespace, and with it this.
        self.case.addCleanup(subprocess.run, ["ip", "link", "del", f"p{name}"], capture_output=True, check=False)
        sh("ip", "link", "set", f"p{name}", "up")
        self.ip("link", "set", name, "up")

    def exec(self, *argv):
        """Runs a command in the namespace."""
        return sh("ip", "netns", "exec", self.name, *argv)

    def ip(self, *arguments):
        """`ip` in the namespace."""
        return sh("ip", "-n", self.name, *arguments)

    @property
    def options(self):
        """For `ctr run`."""
        return ["--with-ns", f"network:{self.path}"]

    def traces(self):
        """What a runtime could have left in it."""
        return sorted(re.findall(r"^\d+: (\S+?)[:@]", self.ip("link"), re.M)), sh("tc", "-n", self.name, "qdisc")


class Server:
    """Serves each connection on a thread of its own, until the end of the test."""

    def __init__(self, case, address, serve):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.create_server((address, 0), family=family)
        self.port = str(self.socket.getsockname()[1])
        self.serve = serve
        case.addCleanup(self.socket.close)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        """Ends when the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self.serve_one, args=[connection], daemon=True).start()

    def serve_one(self, connection):
        """One connection, to its end."""
        with connection:
            self.serve(connection)


def serving(data):
    """Answers a request of HTTP with `data`."""
    def serve(connection):
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)

    return serve


class Network(Case):
    # What busybox says of a network, without what is a matter of the device and not of the network: queueing
    # disciplines, features, where the other end is, and the flags with which an address was added.
    SHOW = """
        ip -o addr | awk '{ $1 = ""; print }' | sed 's/ scope .*//'
        ip link | grep -o 'link/ether [^ ]*\\|^[0-9]*: [^@:]*\\|mtu [0-9]*' | sed 's/^[0-9]*: //'
        for family in -4 -6; do
            for table in main 100; do echo "$family $table"; ip $family route show table $table; done
            ip $family rule
        done
        ip neigh | grep PERMANENT
    """

    def test_everything_in_the_namespace_is_in_the_container(self):
        pod = Pod(self, mtu=1400)
        pod.add("net1")
        pod.ip("link", "set", "net1", "address", "02:00:00:00:88:01")
        pod.ip("addr", "add", "10.89.0.2/16", "dev", "net1")
        # As the ptp plug-in does it: the way to the network itself leads over the gateway.
        pod.ip("route", "del", "10.89.0.0/16", "dev", "net1")
        pod.ip("route", "add", "10.89.0.1", "dev", "net1", "src", "10.89.0.2")
        pod.ip("route", "add", "10.89.0.0/16", "via", "10.89.0.1", "src", "10.89.0.2", "mtu", "1300")
        pod.ip("route", "add", "10.90.0.0/16", "via", "169.254.1.1", "dev", "net1", "onlink", "metric", "7")
        pod.ip("route", "add", "blackhole", "10.91.0.0/16")
        pod.ip("route", "add", "default", "via", "10.89.0.1", "table", "100")
        pod.ip("rule", "add", "from", "10.89.0.2", "lookup", "100", "priority", "500")
        pod.ip("-6", "rule", "add", "from", "fd00:89::/64", "lookup", "100", "priority", "501")
        pod.ip("neigh", "add", "169.254.1.1", "lladdr", "02:00:00:00:88:ff", "dev", "net1", "nud", "permanent")
        inside = self.output_of("sh", "-c", self.SHOW, options=pod.options)
        outside = pod.exec("busybox", "sh", "-c", self.SHOW)
        self.assertEqual(
            inside.splitlines(),
            [line for line in outside.splitlines() if "_husk" not in line])
        for expected in ("mtu 1400", "02:00:00:00:88:01", "blackhole 10.91.0.0/16", f"default via {HOST4}", "fe80::"):
            self.assertIn(expected, inside)

    def check_transfers(self, task, size):
        """`size` bytes to the container and back, over each family."""
        data = os.urandom(1 << 20) * (size >> 20)
        # It writes more at once than netcat does, so that segments are large.
        task.exec("httpd", "-p", "80", "-h", "/dev/shm", code=0)
        for host, pod in (HOST4, POD4), (f"[{HOST6}]", f"[{POD6}]"):
            with self.subTest(pod=pod):
                server = Server(self, host.strip("[]"), serving(data))
                task.exec("wget", "-q", "-O", "/dev/shm/data", f"http://{host}:{server.port}/", code=0)
                with urllib.request.urlopen(f"http://{pod}/data", timeout=TIMEOUT_S) as answer:
                    digest = hashlib.file_digest(answer, "sha256").hexdigest()
                self.assertEqual(digest, hashlib.sha256(data).hexdigest())

    def test_packets_pass_both_ways(self):
        pod = Pod(self)
        task = self.start(options=pod.options)
        for address in HOST4, HOST6:
            # The second is longer than a packet may be.
            for size in "56", "8000":
                ping = task.exec("ping", "-c", "3", "-s", size, address, code=0)
                self.assertIn("3 packets received", ping.out)
        self.check_transfers(task, TRANSFER_BYTES)

    def test_large_packets_pass_whole(self):
        pod = Pod(self, mtu=9000)
        task = self.start(options=pod.options)
        task.exec("ping", "-c", "3", "-s", "8900", HOST4, code=0)
        self.assertIn("mtu 9000", task.exec("ip", "link", "show", "eth0", code=0).out)
        # FragCreates
        frags = task.exec("sh", "-c", "awk '/^Ip: [0-9]/ { print $20 }' /proc/net/snmp", code=0).out
        self.assertEqual(frags, "0", "fragments that the guest has made")
        self.check_transfers(task, 4 << 20)

    def test_nothing_stays_in_the_namespace_and_it_serves_the_next(self):
        pod = Pod(self)
        before = pod.traces()
        for turn in range(2):
            with self.subTest(turn=turn), self.nothing_left():
                self.output_of("ping", "-c", "1", HOST4, options=pod.options)
                self.assertEqual(pod.traces(), before)

    def test_a_killed_shim_leaves_nothing_in_the_namespace(self):
        pod = Pod(self)
        before = pod.traces()
        task = self.start(options=pod.options)
        shim = [pid for pid, line in processes().items() if "containerd-shim" in line and task.name in line.split()]
        for pid in shim:
            os.kill(pid, signal.SIGKILL)
        self.assertTrue(shim, processes())
        if self.runtime == "husk":
            wait_until(lambda: pod.traces() == before, "tap and redirection to be gone")

    def test_a_namespace_in_use_is_refused_to_the_next(self):
        if self.runtime != "husk":
            self.skipTest("processes can share a namespace")
        pod = Pod(self)
        task = self.start(options=pod.options)
        refused = self.run_container("true", options=pod.options, code=1)
        self.assertIn("another VM has it already", refused.err)
        # And the first one has not noticed.
        task.exec("ping", "-c", "1", HOST4, code=0)

    def test_interface_that_no_vm_can_have_is_named(self):
        if self.runtime != "husk":
            self.skipTest("a process can have any")
        pod = Pod(self)
        pod.add("base")
        sh("ip", "link", "add", "odd", "link", BRIDGE, "netns", pod.name, "type", "ipvlan", "mode", "l3")
        pod.ip("link", "set", "odd", "up")
        before = pod.traces()
        refused = self.run_container("true", options=pod.options, code=1)
        self.assertIn("interface odd (ipvlan) cannot be a VM's: it works on layer 3, without ARP", refused.err)
        self.assertEqual(pod.traces(), before)

    def test_what_comes_later_is_plugged_in_and_out(self):
        pod = Pod(self)
        before = pod.traces()
        task = self.start(options=pod.options)
        # The second finds the slot that the first has left.
        for turn in range(2):
            with self.subTest(turn=turn):
                pod.add("net1")
                pod.ip("addr", "add", "10.89.0.2/24", "dev", "net1")
                sh("ip", "addr", "add", "10.89.0.1/24", "dev", "pnet1")
                wait_until(lambda: "10.89.0.2/24" in task.exec("ip", "addr", "show", "net1").out, "the address")
                mac = re.search("link/ether ([^ ]*)", pod.ip("link", "show", "net1"))[1]
                self.assertIn(mac, task.exec("ip", "link", "show", "net1", code=0).out)
                task.exec("ping", "-c", "3", "10.89.0.1", code=0)
                pod.ip("route", "add", "10.90.0.0/16", "via", "10.89.0.1")
                wait_until(lambda: "10.90.0.0/16 via 10.89.0.1 dev net1" in task.exec("ip", "route").out, "the route")
                pod.ip("link", "del", "net1")
                wait_until(lambda: "net1" not in task.exec("ls", "/sys/class/net").out, "the interface to be gone")
                task.exec("ping", "-c", "1", HOST4, code=0)
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        task.end()
        self.assertEqual(pod.traces(), before)

    def test_either_datapath_can_be_forced(self):
        if self.runtime != "husk":
            self.skipTest("there is one kernel")
        pod = Pod(self)
        path = os.path.join(self.folder, "husk.toml")
        for datapath in ("worker", "vhost"):
            with self.subTest(datapath=datapath):
                with open(path, "w", encoding="ascii") as file:
                    # More than one pair of queues, too.
                    file.write(f'[vm]\nvcpus = 2\n[network]\ndatapath = "{datapath}"\n')
                task = self.start(options=[*pod.options, "--runtime-config-path", path])
                threads = [name_of(task.pid, thread) for thread in os.listdir(f"/proc/{task.pid}/task")]
                # With vhost-net one thread remains, for the control queue.
                self.assertEqual(threads.count("net"), 2 if datapath == "worker" else 1, threads)
                for address in (HOST4, HOST6):
                    task.exec("ping", "-c", "3", address, code=0)
                task.ctr("kill", "-s", "SIGKILL", code=0)
                task.wait_for("STOPPED")
                task.end()

    def test_what_changes_later_is_changed(self):
        pod = Pod(self)
        before = pod.traces()
        task = self.start(options=pod.options)
        pod.ip("link", "set", "eth0", "mtu", "9000")
        wait_until(lambda: "mtu 9000" in task.exec("ip", "link", "show", "eth0").out, "the larger packets")
        pod.ip("link", "set", "eth0", "mtu", "1500")
        wait_until(lambda: "mtu 1500" in task.exec("ip", "link", "show", "eth0").out, "the smaller packets")
        pod.ip("route", "replace", "default", "via", "10.88.0.9")
        pod.ip("route", "add", "local", "10.91.0.0/16", "dev", "lo", "table", "100")
        wait_until(lambda: "local 10.91.0.0/16" in task.exec("ip", "route", "show", "table", "100").out, "the route")
        routes = task.exec("ip", "route", code=0).out
        self.assertRegex(routes, r"default via 10\.88\.0\.9 dev eth0")
        self.assertNotIn(f"default via {HOST4}", routes)
        # Another interface in the first one's place.
        pod.ip("link", "del", "eth0")
        pod.add("eth0")
        sh("ip", "link", "set", "peth0", "master", BRIDGE)
        pod.ip("addr", "add", f"{POD4}/24", "dev", "eth0")
        wait_until(lambda: task.exec("ping", "-c", "1", "-W", "1", HOST4).code == 0, "the new interface")
        mac = re.search("link/ether ([^ ]*)", pod.ip("link", "show", "eth0"))[1]
        self.assertIn(mac, task.exec("ip", "link", "show", "eth0", code=0).out)
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        task.end()
        self.assertEqual(pod.traces(), before)

    def test_a_namespace_that_is_filled_later(self):
        name = f"e2e-late-{os.getpid()}"
        sh("ip", "netns", "add", name)
        self.addCleanup(subprocess.run, ["ip", "netns", "del", name], check=False)
        task = self.start(options=["--with-ns", f"network:/run/netns/{name}"])
        sh("ip", "link", "add", "late0", "type", "veth", "peer", "name", "eth0", "netns", name)
        self.addCleanup(subprocess.run, ["ip", "link", "del", "late0"], capture_output=True, check=False)
        sh("ip", "addr", "add", "10.89.0.1/24", "dev", "late0")
        sh("ip", "link", "set", "late0", "up")
        sh("ip", "-n", name, "addr", "add", "10.89.0.2/24", "dev", "eth0")
        sh("ip", "-n", name, "link", "set", "eth0", "up")
        wait_until(lambda: "10.89.0.2/24" in task.exec("ip", "addr").out, "the address")
        task.exec("ping", "-c", "3", "10.89.0.1", code=0)

    def test_namespace_without_interfaces_gives_loopback(self):
        name = f"e2e-empty-{os.getpid()}"
        sh("ip", "netns", "add", name)
        self.addCleanup(subprocess.run, ["ip", "netns", "del", name], check=False)
        out = self.output_of("ls", "/sys/class/net", options=["--with-ns", f"network:/run/netns/{name}"])
        self.assertEqual(out.split(), ["lo"])
