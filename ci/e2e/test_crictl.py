"""What a kubelet does with pods, done by crictl."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

from cri import PodCase
from harness import TIMEOUT_S, Terminal, wait_until

MIB = 1 << 20


class Crictl(PodCase):
    def serve(self, pod, text):
        """A container that serves a page on port 8080 of all of the pod's addresses."""
        return pod.start("sh", "-c", f"mkdir /www; echo {text} >/www/index.html; exec httpd -f -p 8080 -h /www")

    def fetch(self, container, url):
        """What a container gets from a server that may be about to start."""
        def answer():
            result = container.exec("wget", "-q", "-O", "-", url)
            return result.code == 0 and result.out

        return wait_until(answer, f"an answer from {url}")

    def test_containers_of_a_pod_share_localhost_and_a_volume(self):
        volume = os.path.join(self.folder, "volume")
        os.mkdir(volume)
        mounts = [{"host_path": volume, "container_path": "/shared"}]
        pod = self.pod()
        pod.start("httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/shared", mounts=mounts)
        writer = pod.start(mounts=mounts)
        writer.exec("sh", "-c", "echo from the other >/shared/page", code=0)
        self.assertEqual(self.fetch(writer, "http://127.0.0.1:8080/page"), "from the other")
        with open(f"{volume}/page", encoding="ascii") as file:
            self.assertEqual(file.read(), "from the other\n")

    def test_pods_talk_over_the_bridge(self):
        server = self.pod()
        self.serve(server, "hello")
        client = self.pod().start()
        ipv4, ipv6 = server.addresses
        self.assertEqual(self.fetch(client, f"http://{ipv4}:8080/"), "hello")
        self.assertEqual(self.fetch(client, f"http://[{ipv6}]:8080/"), "hello")

    def test_pods_send_each_other_much(self):
        size = 20 * MIB
        server, client = self.pod().start(), self.pod().start()
        server.exec("sh", "-c", f"head -c {size} /dev/urandom >/dev/shm/file && httpd -p 8080 -h /dev/shm", code=0)
        ipv4, ipv6 = server.pod.addresses
        digest = server.output_of("sha256sum", "/dev/shm/file").split()[0]
        for address in (ipv4, f"[{ipv6}]"):
            fetch = f"wget -q -O - http://{address}:8080/file | sha256sum"
            self.assertEqual(client.output_of("sh", "-c", fetch).split()[0], digest)

    def test_a_pods_rate_is_limited(self):
        annotations = {f"kubernetes.io/{way}-bandwidth": "80M" for way in ("ingress", "egress")}
        pod = self.pod(annotations=annotations)
        size = 4 * MIB
        pod.start("sh", "-c", f"mkdir /www; head -c {size} /dev/zero >/www/file; exec httpd -f -p 8080 -h /www")
        fetched = f"wget -q -O - http://{pod.addresses[0]}:8080/file | wc -c"
        client = self.pod().start()
        wait_until(lambda: client.exec("sh", "-c", fetched).out == str(size), "the file")
        # At the host's end of the interface, and of the one through which all goes that the pod sends.
        shown = self.command("tc", "-s", "qdisc", "show", code=0).out
        passed = [int(sent) for sent in re.findall(r"^qdisc tbf .* rate 80Mbit.*\n Sent (\d+) bytes", shown, re.M)]
        self.assertEqual(len(passed), 2, shown)
        self.assertGreater(max(passed), size)
        self.assertGreater(min(passed), 1000)

    def test_a_namespace_of_another_plugin(self):
        """`ptp`, whose gateway is not on the pod's link but by a route of its own."""
        name = f"e2e-ptp-{os.getpid()}"
        self.command("ip", "netns", "add", name, code=0)
        self.addCleanup(subprocess.run, ["ip", "netns", "del", name], check=False)
        ipam = {"type": "host-local", "subnet": "10.245.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
        config = json.dumps({"cniVersion": "1.0.0", "name": "ptp", "type": "ptp", "ipam": ipam})

        def call(command):
            environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": name, "CNI_NETNS": f"/run/netns/{name}",
                           "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}
            return subprocess.run(["/opt/cni/bin/ptp"], input=config, env={**os.environ, **environment},
                                  capture_output=True, text=True, check=True).stdout

        address = json.loads(call("ADD"))["ips"][0]
        self.addCleanup(call, "DEL")
        task = self.start(options=["--with-ns", f"network:/run/netns/{name}"])
        self.assertIn(address["address"].split("/")[0], task.exec("ip", "addr", "show", "eth0", code=0).out)
        task.exec("ping", "-c", "3", address["gateway"], code=0)

    def test_a_host_port_leads_to_the_pod(self):
        pod = self.pod(port_mappings=[{"protocol": 0, "container_port": 8080, "host_port": 18080}])
        self.serve(pod, "through")

        def answer():
            try:
                with urllib.request.urlopen("http://127.0.0.1:18080/", timeout=10) as page:
                    return page.read()
            except OSError:
                return None

        self.assertEqual(wait_until(answer, "an answer from the host's port"), b"through\n")

    def test_a_port_is_forwarded_to_the_pods_localhost(self):
        pod = self.pod()
        pod.start("sh", "-c", "mkdir /www; echo through >/www/index.html; exec httpd -f -p 127.0.0.1:8080 -h /www")
        forwarding = Terminal(self, ["crictl", "port-forward", pod.id, "18081:8080", "18083:9"])
        forwarding.expect("Forwarding from 127.0.0.1:18083 -> 9")

        def answer():
            with contextlib.suppress(OSError), urllib.request.urlopen("http://127.0.0.1:18081/", timeout=30) as page:
                return page.read()

        self.assertEqual(wait_until(answer, "an answer from the forwarded port"), b"through\n")
        with socket.create_connection(("127.0.0.1", 18083), timeout=30) as client:
            self.assertEqual(client.recv(1), b"")
        forwarding.expect("(?i)error.*port 9 ")

    def test_connections_in_the_pods_namespace_half_close_and_refuse(self):
        pod = self.pod()
        server = pod.start("nc", "-ll", "-p", "9000", "-e", "wc", "-c")
        wait_until(lambda: ":2328 " in server.exec("cat", "/proc/net/tcp", "/proc/net/tcp6").out, "the server to listen")
        namespaces = json.loads(self.crictl("inspectp", pod.id, code=0).out)["info"]["runtimeSpec"]["linux"]["namespaces"]
        (path,) = [each["path"] for each in namespaces if each["type"] == "network"]

        def client(port):
            # Sends, ends its side, and says what came back.
            program = ("import socket\n"
                       f"s = socket.create_connection(('127.0.0.1', {port}), 60)\n"
                       "s.sendall(bytes(3000000)); s.shutdown(socket.SHUT_WR)\n"
                       "print(s.recv(100).decode(), end='')")
            return self.command("nsenter", f"--net={path}", "python3", "-c", program)

        self.assertEqual(client(9000).out, "3000000")
        refused = client(9)
        self.assertNotEqual(refused.code, 0)
        self.assertRegex(refused.err, "Connection (reset|refused)|Broken pipe")

    def test_a_terminal_follows_its_window(self):
        # Its size is set after the start, and whoever attaches sees what is written from then on: so it is asked for all the time.
        script = "while :; do stty size; sleep 0.2; done"
        pod = self.pod()
        idle, asking = pod.start(), pod.start("sh", "-c", script, tty=True, stdin=True)
        for verb, *arguments in (("exec", idle.id, "sh", "-c", script), ("attach", asking.id)):
            terminal = Terminal(self, ["crictl", verb, "-it", *arguments], rows=33, columns=111)
            terminal.expect("33 111\r")
            for rows, columns in (40, 120), (50, 70):
                terminal.resize(rows, columns)
                terminal.expect(f"{rows} {columns}\r")
            terminal.type("\x03")
            terminal.wait()
        self.assertEqual(asking.wait_for_exit()["exitCode"], 128 + signal.SIGINT)

    def test_a_config_map_is_updated_at_once(self):
        # As the kubelet's atomic writer does it: the keys are links through `..data`, which is replaced by renaming, and what it
        # led to is removed.
        volume = os.path.join(self.folder, "config")
        os.mkdir(volume)
        keys = [f"key{number}" for number in range(4)]

        def publish(version, old=None):
            os.mkdir(f"{volume}/..{version}")
            for key in keys:
                with open(f"{volume}/..{version}/{key}", "w", encoding="ascii") as file:
                    file.write(f"{version}\n")
            os.symlink(f"..{version}", f"{volume}/..data_tmp")
            os.rename(f"{volume}/..data_tmp", f"{volume}/..data")
            if old:
                shutil.rmtree(f"{volume}/..{old}")

        publish("v0")
        for key in keys:
            os.symlink(f"..data/{key}", f"{volume}/{key}")
        mounts = [{"host_path": volume, "container_path": "/config", "readonly": True}]
        container = self.pod().start(mounts=mounts)
        self.assertEqual(container.output_of("cat", "/config/key0"), "v0")
        # It reads all the time, one key after the other and also the list of them. Who is on the way to the old ones when they are
        # removed finds nothing, on any file system, and who looks again finds the new ones.
        reader = ("read() { cat /config/key$1; }; list() { set -- /config/..data/key*; [ $# = 4 ]; }; "
                  "while :; do for key in 0 1 2 3; do v=$(read $key || read $key) || exit 1; [ $v != last ] || exit 0; "
                  "list || list || exit 2; done; done")
        with concurrent.futures.ThreadPoolExecutor(1) as background:
            reading = background.submit(container.exec, "sh", "-c", reader)
            for version in range(1, 12):
                publish(f"v{version}", f"v{version - 1}")
                # Later in the second for which the guest takes names to be valid, each time.
                time.sleep(0.3 + version / 20)
            publish("last", "v11")
            result = reading.result()
            self.assertEqual(result.code, 0, result.err)
        self.assertNotEqual(container.exec("touch", "/config/new").code, 0)

    def test_a_container_out_of_memory_is_oom_killed_alone(self):
        pod = self.pod()
        neighbour = pod.start()
        hungry = pod.start("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1",
                           linux={"resources": {"memory_limit_in_bytes": 64 * MIB}})
        status = hungry.wait_for_exit()
        self.assertEqual((status["exitCode"], status["reason"]), (137, "OOMKilled"))
        self.assertEqual(neighbour.output_of("echo", "alive"), "alive")

    def test_a_container_that_has_lost_a_process_for_want_of_memory_is_oom_killed(self):
        # containerd says so of any container that it had the event of, however that ends.
        container = self.pod().start("sh", "-c", "while [ ! -e /end ]; do sleep 0.2; done",
                                     linux={"resources": {"memory_limit_in_bytes": 64 * MIB}})
        self.assertNotEqual(container.exec("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1").code, 0)
        container.exec("touch", "/end", code=0)
        self.assertEqual(container.wait_for_exit()["exitCode"], 0)
        wait_until(lambda: container.status["reason"] == "OOMKilled", "the reason", timeout=30)

    def test_the_machine_out_of_memory_kills_what_took_it(self):
        if self.runtime != "husk":
            self.skipTest("other pods have the host's memory")
        pod = self.pod()
        neighbour = pod.start()
        # It looks for the end of a line that has none, and has no limit.
        hungry = pod.start("tail", "/dev/zero")
        self.assertEqual(hungry.wait_for_exit()["exitCode"], 137)
        wait_until(lambda: hungry.status["reason"] == "OOMKilled", "the reason", timeout=30)
        self.assertEqual(neighbour.output_of("echo", "alive"), "alive")
        self.assertEqual(pod.start().output_of("echo", "new"), "new")

    def test_stats_are_those_that_the_container_sees(self):
        parent, _ = self.parent_group()
        pod = self.pod(linux={"cgroup_parent": parent})
        container = pod.start()
        before = json.loads(self.crictl("stats", "--output", "json", "--id", container.id, code=0).out)["stats"][0]
        container.output_of("sh", "-c", "head -c 40000000 /dev/zero >/dev/shm/file; i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")

        def spent():
            shown = container.output_of("cat", "/sys/fs/cgroup/cpu.stat")
            return int(re.search(r"usage_usec (\d+)", shown)[1]) * 1000

        earlier = spent()
        after = json.loads(self.crictl("stats", "--output", "json", "--id", container.id, code=0).out)["stats"][0]
        later = spent()

        def cpu(stats):
            return int(stats["cpu"]["usageCoreNanoSeconds"]["value"])

        self.assertLess(cpu(before), cpu(after))
        self.assertLessEqual(earlier, cpu(after))
        self.assertLessEqual(cpu(after), later)
        used = int(container.output_of("cat", "/sys/fs/cgroup/memory.current"))
        told = int(after["memory"]["usageBytes"]["value"])
        self.assertGreater(told, 40000000)
        self.assertLess(abs(told - used), 8 * MIB)
        self.assertGreater(int(after["memory"]["workingSetBytes"]["value"]), 40000000)
        of_pod = json.loads(self.crictl("statsp", "--output", "json", "--id", pod.id, code=0).out)["stats"][0]["linux"]
        self.assertGreater(int(of_pod["memory"]["usageBytes"]["value"]), 40000000)
        self.assertEqual(of_pod["network"]["defaultInterface"]["name"], "eth0")

    def test_stats_of_the_network_are_those_that_the_pod_sees(self):
        parent, _ = self.parent_group()
        pod = self.pod(linux={"cgroup_parent": parent})
        container = pod.start()

        def told():
            (of_pod,) = json.loads(self.crictl("statsp", "--output", "json", "--id", pod.id, code=0).out)["stats"]
            interface = of_pod["linux"]["network"]["defaultInterface"]
            return [int(interface[key]["value"]) for key in ("rxBytes", "txBytes")]

        def seen():
            (counters,) = re.findall(r"eth0: *(\d.*)", container.output_of("cat", "/proc/net/dev"))
            return [int(counters.split()[column]) for column in (0, 8)]

        before = told()
        gateway = container.output_of("sh", "-c", "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'")
        container.exec("ping", "-c", "5", "-s", "8000", gateway, code=0)
        for after, earlier, guest in zip(told(), before, seen(), strict=True):
            self.assertGreater(after - earlier, 40000)
            # What came and went between the two looks: the guest's kernel looks for neighbours and routers.
            self.assertLess(abs(after - guest), 4096)

    def test_a_wrong_configuration_is_for_the_next_pod(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        pod = self.pod()
        with open("/etc/husk/husk.toml", encoding="ascii") as file:
            right = file.read()

        def write(text):
            with open("/etc/husk/husk.toml", "w", encoding="ascii") as file:
                file.write(text)

        self.addCleanup(write, right)
        write("[vm]\nvcpu = 2\n")
        self.assertEqual(pod.start().output_of("echo", "restarted"), "restarted")
        refused, _ = self.try_pod()
        self.assertNotEqual(refused.code, 0)
        self.assertIn("vcpu", refused.err)

    def test_a_pod_with_too_little_memory_is_told_how_much_it_needs(self):
        if self.runtime != "husk":
            self.skipTest("other pods have no machine")
        parent, group = self.parent_group()

        def allow(mib):
            with open(f"{group}/memory.max", "w", encoding="ascii") as file:
                file.write(str(mib * MIB))

        allow(95)
        with self.nothing_left():
            refused, _ = self.try_pod(linux={"cgroup_parent": parent})
            self.assertNotEqual(refused.code, 0)
            self.assertIn("95 MiB", refused.err)
            self.assertIn("96 MiB", refused.err)
            self.crictl("rmp", "-f", "-a", code=0)
        allow(96)
        pod = self.pod(linux={"cgroup_parent": parent})
        self.assertEqual(pod.start().output_of("echo", "enough"), "enough")
        pod.remove(code=0)

    def test_a_pod_may_set_by_annotation_what_it_is_allowed(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        self.configure('[annotations]\nallow = ["vm.vcpus"]\n')
        pod = self.pod(annotations={"io.husk.vm.vcpus": "2", "another.example/key": "value"})
        self.assertEqual(pod.start().output_of("nproc"), "2")
        for key, value, words in (
            ("io.husk.vm.vcpus", "many", ["vm.vcpus", "many"]),
            ("io.husk.vm.memory_mib", "1024", ["io.husk.vm.memory_mib", "vm.vcpus"]),
        ):
            refused, _ = self.try_pod(annotations={key: value})
            self.assertNotEqual(refused.code, 0)
            for word in words:
                self.assertIn(word, refused.err)

    def test_a_termination_message_reaches_the_host(self):
        path = os.path.join(self.folder, "message")
        with open(path, "wb"):
            pass
        mounts = [{"host_path": path, "container_path": "/dev/termination-log"}]
        self.pod().start("sh", "-c", "echo why >/dev/termination-log", mounts=mounts).wait_for_exit()
        with open(path, encoding="ascii") as file:
            self.assertEqual(file.read(), "why\n")

    def test_a_container_is_resized_in_place(self):
        container = self.pod().start(linux={"resources": {
            "memory_limit_in_bytes": 64 * MIB, "cpu_period": 100000, "cpu_quota": 50000}})
        eat = ["dd", "if=/dev/zero", "of=/dev/null", "bs=600M", "count=1"]

        def resize(memory, quota):
            self.crictl("update", "--memory", memory, "--cpu-period", 100000, "--cpu-quota", quota, container.id, code=0)
            self.assertEqual(container.output_of("cat", "/sys/fs/cgroup/memory.max"), str(memory))
            self.assertEqual(container.output_of("cat", "/sys/fs/cgroup/cpu.max"), f"{quota} 100000")

        self.assertNotEqual(container.exec(*eat).code, 0)
        resize(1024 * MIB, 100000)
        self.assertEqual(container.exec(*eat).code, 0)
        resize(64 * MIB, 25000)
        self.assertNotEqual(container.exec(*eat).code, 0)

    def test_the_machine_follows_the_limits_of_its_containers(self):
        if self.runtime != "husk":
            self.skipTest("other pods have the host's processors and memory")
        pod = self.pod()
        small = pod.start()

        def size():
            total = re.search(r"MemTotal:\s+(\d+) kB", small.output_of("cat", "/proc/meminfo"))
            return int(small.output_of("nproc")), int(total[1]) // 1024

        vcpus, memory = size()
        self.assertEqual(vcpus, 1)
        large = pod.start(linux={"resources": {
            "memory_limit_in_bytes": 1024 * MIB, "cpu_period": 100000, "cpu_quota": 200000}})
        # 512 MiB at the start; then what the container may use, and 128 MiB for the guest.
        wait_until(lambda: size() == (2, memory + 640), "the machine to grow")
        self.assertEqual(large.exec("dd", "if=/dev/zero", "of=/dev/null", "bs=700M", "count=1").code, 0)
        self.crictl("update", "--memory", 64 * MIB, "--cpu-period", 100000, "--cpu-quota", 50000, large.id, code=0)
        wait_until(lambda: size()[0] == 1, "the processor to go")
        wait_until(lambda: size()[1] < memory + 64, "the memory to go")

    def test_the_machine_is_in_the_pods_cgroup_with_the_least_of_its_oom_scores(self):
        if self.runtime != "husk":
            self.skipTest("other pods have no machine")
        parent, group = self.parent_group()
        pod = self.pod(linux={"cgroup_parent": parent})
        for score in (700, 500):
            pod.start(linux={"resources": {"oom_score_adj": score}})
        worker = pod.pid
        with open(f"/proc/{worker}/stat", encoding="ascii") as file:
            shim = int(file.read().split(") ")[1].split()[1])
        for process in (worker, shim):
            with open(f"/proc/{process}/cgroup", encoding="ascii") as file:
                self.assertEqual(file.read(), f"0::{parent}/{pod.id}\n")
        with open(f"/proc/{worker}/oom_score_adj", encoding="ascii") as file:
            self.assertEqual(file.read(), "500\n")
        pod.remove(code=0)
        self.assertEqual([at for at, _, _ in os.walk(group)], [group])

    def test_what_the_machine_knew_of_a_containers_files_goes_with_it(self):
        if self.runtime != "husk":
            self.skipTest("other pods have no machine")
        volume = os.path.join(self.folder, "volume")
        for number in range(300):
            os.makedirs(f"{volume}/{number}/below")
        mounts = [{"host_path": volume, "container_path": "/volume"}]
        pod = self.pod()
        worker = pod.pid
        known = []
        for _ in range(4):
            # Each folder that is looked into costs the worker a descriptor.
            container = pod.start("sh", "-c", "find /volume >/dev/null; echo looked; exec sleep 100000", mounts=mounts)
            wait_until(lambda: "looked" in container.logs, "find to end")  # pylint: disable=cell-var-from-loop
            known.append(len(os.listdir(f"/proc/{worker}/fd")))
            self.crictl("rm", "-f", container.id, code=0)
        self.assertGreater(known[0], 300)
        self.assertLess(known[3], known[0] + 100, known)

    def test_a_container_for_debugging_sees_the_processes_of_its_target(self):
        pod = self.pod()
        own = {"security_context": {"namespace_options": {"pid": 1}}}
        target = pod.start("sleep", "12345", linux=own)
        debugger = {"security_context": {"namespace_options": {"pid": 3, "target_id": target.id}}}
        self.assertIn("sleep 12345", pod.start(linux=debugger).output_of("ps", "-o", "pid,args").splitlines()[1])
        if self.runtime == "husk":
            pod.start(linux=own)
            refusal = self.crictl("start", pod.create(linux=debugger).id)
            self.assertNotEqual(refusal.code, 0)
            self.assertIn("which of the 2", refusal.err)

    def test_a_machine_that_the_hosts_oom_killer_takes(self):
        if self.runtime != "husk":
            self.skipTest("other pods have no machine")
        parent, group = self.parent_group()
        pod = self.pod(linux={"cgroup_parent": parent})
        containers = [pod.start(), pod.start()]
        with open(f"{group}/memory.current", encoding="ascii") as file:
            limit = int(file.read()) + 16 * MIB
        with open(f"{group}/memory.max", "w", encoding="ascii") as file:
            file.write(str(limit))
        self.assertNotEqual(containers[0].exec("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1").code, 0)
        for container in containers:
            status = container.wait_for_exit()
            self.assertEqual((status["exitCode"], status["reason"]), (137, "OOMKilled"))
        pod.remove(code=0)
        self.assertEqual([at for at, _, _ in os.walk(group)], [group])

    def parent_group(self):
        """A control group for a pod, as the kubelet makes it: its path in the hierarchy, and its folder."""
        parent = f"/e2e-{os.getpid()}"
        group = f"/sys/fs/cgroup{parent}"
        os.mkdir(group)
        self.addCleanup(os.rmdir, group)
        with open(f"{group}/cgroup.subtree_control", "w", encoding="ascii") as file:
            file.write("+cpu +memory +pids")
        return parent, group

    def test_thirty_pods_four_at_a_time_leave_nothing(self):
        def life(number):
            pod = self.pod()
            answer = pod.start().output_of("echo", f"pod {number}")
            pod.remove(code=0, timeout=2 * TIMEOUT_S)
            return answer

        # The first one makes the bridge.
        life(0)
        with self.nothing_left():
            with concurrent.futures.ThreadPoolExecutor(4) as lives:
                answers = list(lives.map(life, range(30)))
            self.assertEqual(answers, [f"pod {number}" for number in range(30)])
            self.assertIsNone(re.search("[0-9a-f]{64}", self.crictl("pods", "--quiet", code=0).out))
