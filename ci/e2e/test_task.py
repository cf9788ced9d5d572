"""`ctr task`: what is done to a running container."""

import json
import os
import re
import subprocess

import api
from harness import IMAGE, RUNTIMES, TIMEOUT_S, Case, Events, Task, as_alice, show_cgroup, wait_until


class TaskTest(Case):
    def test_detached_container_is_listed_until_it_is_removed(self):
        task = self.start()
        pid, status = task.row
        self.assertEqual(status, "RUNNING")
        self.assertTrue(os.path.isdir(f"/proc/{pid}"), "its pid is a process of this machine")
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        self.assertIsNone(task.row)

    def test_kill_sends_the_signal_that_was_named(self):
        task = self.start("sh", "-c", "trap 'exit 11' TERM; trap 'exit 12' USR1; while :; do sleep 0.2; done")
        # The trap is set when the shell runs its loop.
        wait_until(lambda: len(task.ctr("ps").out.splitlines()) > 2, "the loop to run")
        task.ctr("kill", "-s", "SIGUSR1", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 12)

    def test_kill_of_all_reaches_every_process(self):
        # The shell survives it, as its children do not: it outlives them only if they get it, too.
        task = self.start("sh", "-c", "trap : TERM; sleep 1000 & sleep 1000 & wait; wait; wait; exit 4")
        wait_until(lambda: len(task.ctr("ps").out.splitlines()) == 4, "three processes")
        task.ctr("kill", "--all", "-s", "SIGTERM", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 4)

    def test_ps_lists_the_processes_of_the_container(self):
        task = self.start("sh", "-c", "sleep 1000 & sleep 1000 & wait")
        wait_until(lambda: len(task.ctr("ps").out.splitlines()) == 4, "three processes")
        lines = task.ctr("ps", code=0).out.splitlines()
        self.assertEqual(lines[0].split(), ["PID", "INFO"])
        pids = [int(line.split()[0]) for line in lines[1:]]
        self.assertEqual(len(set(pids)), 3)

    def test_ps_numbers_them_as_their_kernel_does(self):
        # A container without a PID namespace of its own sees these numbers.
        def edit(spec):
            spec["linux"]["namespaces"] = [namespace for namespace in spec["linux"]["namespaces"] if namespace["type"] != "pid"]
            spec["mounts"].append({"destination": "/data", "type": "bind", "source": self.folder, "options": ["rbind", "rw"]})

        task = Task(self, self.name())
        self.run_spec(edit, "sh", "-c", "sleep 1000 & echo $$ $! >/data/new; mv /data/new /data/pids; wait",
                      name=task.name, detached=True, code=0)
        path = os.path.join(self.folder, "pids")
        wait_until(lambda: os.path.exists(path), "the processes to run")
        with open(path, encoding="ascii") as file:
            pids = set(map(int, file.read().split()))
        listed = [line.split()[0] for line in task.ctr("ps", code=0).out.splitlines()[1:]]
        self.assertEqual(set(map(int, listed)), pids)

    def test_exec_answers_with_output_and_status(self):
        task = self.start()
        result = task.exec("sh", "-c", "echo out; echo err >&2; exit 42")
        self.assertEqual((result.code, result.stdout, result.stderr), (42, b"out\n", b"err\n"))

    def test_exec_takes_stdin_to_its_end(self):
        task = self.start()
        data = os.urandom(1 << 20)
        self.assertEqual(task.exec("cat", stdin=data, code=0).stdout, data)

    def test_exec_as_a_user_in_a_folder(self):
        task = self.start("sleep", "1000", options=["--env", "FRUIT=pear"])
        result = task.exec("sh", "-c", "id -un; id -gn; pwd; echo $FRUIT", options=[*as_alice(), "--cwd", "/tmp"])
        self.assertEqual(result.out.splitlines(), ["alice", "alice", "/tmp", "pear"])
        result = task.exec("id", "-u", options=["--user", "65534:65534"])
        self.assertEqual(result.out, "65534")

    def test_exec_sees_the_container(self):
        task = self.start("sh", "-c", "echo here > /tmp/mark; sleep 1000; true")
        wait_until(lambda: task.exec("cat", "/tmp/mark").out == "here", "the mark")
        self.assertEqual(task.exec("sh", "-c", "tr '\\0' ' ' </proc/1/cmdline").out, "sh -c echo here > /tmp/mark; sleep 1000; true ")

    def test_exec_detached_can_be_killed(self):
        task = self.start()
        self.ctr("task", "exec", "-d", "--exec-id", "background", task.name, "sleep", "1000", code=0)
        wait_until(lambda: len(task.ctr("ps").out.splitlines()) == 3, "two processes")
        self.ctr("task", "kill", "--exec-id", "background", "-s", "SIGKILL", task.name, code=0)
        wait_until(lambda: len(task.ctr("ps").out.splitlines()) == 2, "one process")
        self.assertEqual(task.row[1], "RUNNING")

    def test_exec_of_a_program_that_is_not_there(self):
        task = self.start()
        result = task.exec("/no/such/program")
        self.assertNotEqual(result.code, 0)
        self.assertRegex(result.err, "no such file or directory")
        self.assertEqual(task.exec("echo", "still here").out, "still here")

    def test_many_execs_at_once(self):
        task = self.start()
        running = [
            subprocess.Popen(["ctr", "task", "exec", "--exec-id", f"p{n}", task.name, "sh", "-c", f"echo {n}; exit {n}"],
                             stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
            for n in range(8)]
        answers = [(process.communicate(timeout=TIMEOUT_S)[0], process.returncode) for process in running]
        self.assertEqual(answers, [(f"{n}\n".encode(), n) for n in range(8)])

    def test_attach_to_a_detached_container(self):
        task = self.start("sh", "-c", "while read -r line; do echo got $line; [ $line = last ] && exit 6; done")
        process = subprocess.Popen(["ctr", "task", "attach", task.name], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, bufsize=0)
        self.addCleanup(process.kill)
        process.stdin.write(b"first\n")
        self.assertEqual(process.stdout.readline(), b"got first\n")
        process.stdin.write(b"last\n")
        self.assertEqual(process.stdout.readline(), b"got last\n")
        self.assertEqual(process.wait(60), 6)

    def test_pause_stops_and_resume_goes_on(self):
        task = self.start("sh", "-c", "n=0; while :; do n=$((n + 1)); echo $n > /tmp/n; sleep 0.1; done",
                          options=["--mount", f"type=bind,src={self.folder},dst=/tmp,options=rbind:rw"])

        def count():
            with open(os.path.join(self.folder, "n"), encoding="ascii") as file:
                return file.read()
        wait_until(lambda: os.path.exists(os.path.join(self.folder, "n")) and count(), "the count to begin")
        task.ctr("pause", code=0)
        self.assertEqual(task.row[1], "PAUSED")
        # The time that passes is that of another container. What was on its way to the file may still arrive in the first.
        self.output_of("true")
        before = count()
        self.output_of("true")
        self.assertEqual(count(), before)
        task.ctr("resume", code=0)
        self.assertEqual(task.row[1], "RUNNING")
        wait_until(lambda: count() not in ("", before), "the count to go on")

    def test_metrics_tell_what_goes_to_a_disk(self):
        path = os.path.join(self.folder, "disk")
        with open(path, "wb") as file:
            file.truncate(16 << 20)
        task = self.start(options=["--device", self.loop_device(path)])
        device = task.exec("sh", "-c", "ls /dev/loop*", code=0).out
        task.exec("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=8", "conv=fsync", code=0)
        metrics = json.loads(task.ctr("metrics", "--format", "json", code=0).out)
        written = sum(entry.get("wbytes", 0) for entry in metrics["io"]["usage"])
        self.assertEqual(written, 8 << 20)

    def test_io_of_a_disk_is_limited(self):
        path = os.path.join(self.folder, "disk")
        with open(path, "wb") as file:
            file.truncate(1 << 20)
        numbers = os.stat(self.loop_device(path)).st_rdev
        numbers = {"major": os.major(numbers), "minor": os.minor(numbers)}

        def edit(spec):
            linux = spec["linux"]
            linux["devices"] = [{"path": "/dev/disk", "type": "b", "fileMode": 0o660, "uid": 0, "gid": 0, **numbers}]
            linux["resources"]["devices"].append({"allow": True, "type": "b", "access": "rwm", **numbers})
            linux["resources"]["blockIO"] = {
                "throttleWriteBpsDevice": [{"rate": 1 << 20, **numbers}],
                "throttleReadIOPSDevice": [{"rate": 70, **numbers}],
            }
            show_cgroup(spec)

        show = "cat /sys/fs/cgroup/io.max; printf '%d:%d' $(stat -c '0x%t 0x%T' /dev/disk)"
        limits, device = self.run_spec(edit, "sh", "-c", show, code=0).out.splitlines()
        self.assertEqual(limits, f"{device} rbps=max wbps=1048576 riops=70 wiops=max")

    def test_metrics_are_of_the_container(self):
        task = self.start("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=20 2>/dev/null; sleep 1000; true",
                          options=["--memory-limit", str(64 << 20)])
        wait_until(lambda: len(task.ctr("ps").out.splitlines()) == 3 and "sleep" in task.exec("ps").out, "dd to end")
        metrics = json.loads(task.ctr("metrics", "--format", "json", code=0).out)
        self.assertEqual(metrics["memory"]["usage_limit"], 64 << 20)
        self.assertGreater(metrics["memory"]["usage"], 20 << 20)
        self.assertLess(metrics["memory"]["usage"], 64 << 20)
        self.assertEqual(metrics["pids"]["current"], 2)
        self.assertGreater(metrics["cpu"]["usage_usec"], 0)

    def test_update_reaches_the_cgroup(self):
        task = self.start(options=["--memory-limit", str(64 << 20), "--mount",
                                   "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"])
        allocate = ("dd", "if=/dev/zero", "of=/dev/null", "bs=80M", "count=1")
        self.assertEqual(task.exec(*allocate).code, 137)
        self.assertEqual(api.update(task.name, {"memory": {"limit": 128 << 20}, "pids": {"limit": 33},
                                                "cpu": {"quota": 25000, "period": 100000}}).code, "OK")
        self.assertEqual(task.exec(*allocate).code, 0)
        out = task.exec("sh", "-c", "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) && cat memory.max pids.max cpu.max", code=0).out
        self.assertEqual(out.splitlines(), [str(128 << 20), "33", "25000 100000"])
        # What is not named stays.
        self.assertEqual(api.update(task.name, {"pids": {"limit": 44}}).code, "OK")
        metrics = json.loads(task.ctr("metrics", "--format", "json", code=0).out)
        self.assertEqual((metrics["memory"]["usage_limit"], metrics["pids"]["limit"]), (128 << 20, 44))

    def test_checkpoint_is_refused_by_name(self):
        if self.runtime != "husk":
            self.skipTest("runc checkpoints with CRIU, if that is there")
        task = self.start()
        result = self.ctr("task", "checkpoint", task.name)
        self.assertNotEqual(result.code, 0)
        self.assertRegex(result.err, "(?i)not implemented|unimplemented")

    def test_log_uri_file_gets_the_output(self):
        path = os.path.join(self.folder, "log")
        task = self.start("sh", "-c", "echo to the log; echo and this >&2; sleep 1000", options=["--log-uri", f"file://{path}"])

        def lines():
            if not os.path.exists(path):
                return set()
            with open(path, encoding="utf-8") as file:
                return set(file.read().splitlines())
        wait_until(lambda: lines() >= {"to the log", "and this"}, "both lines in the log")
        self.assertEqual(task.row[1], "RUNNING")

    def test_log_uri_binary_gets_the_output(self):
        # containerd's contract for logging binaries: 3 and 4 are the streams, closing 5 says ready.
        log = os.path.join(self.folder, "log")
        program = os.path.join(self.folder, "logger")
        with open(program, "w", encoding="utf-8") as file:
            file.write(f"#!/bin/bash\nexec 5>&-\ncat <&3 >{log}.out &\ncat <&4 >{log}.err &\nwait\n"
                       f"echo \"$CONTAINER_ID $CONTAINER_NAMESPACE\" >{log}.id\n")
        os.chmod(program, 0o755)
        name = self.name()
        self.addCleanup(self.remove, name)
        self.ctr("run", "-d", "--runtime", RUNTIMES[self.runtime], "--log-uri", f"binary://{program}", IMAGE, name,
                 "sh", "-c", "echo to the log; echo and this >&2", code=0)
        task = Task(self, name)
        task.wait_for("STOPPED")
        # The streams stay open as long as the task is there.
        self.assertEqual(task.end(), 0)

        def content(suffix):
            with open(log + suffix, encoding="utf-8") as file:
                return file.read()
        wait_until(lambda: os.path.exists(f"{log}.id") and content(".id"), "the logger to end")
        self.assertEqual([content(suffix) for suffix in (".out", ".err", ".id")],
                         ["to the log\n", "and this\n", f"{name} default\n"])

    def test_events_of_a_life(self):
        events = Events(self)
        task = self.start("sh", "-c", "sleep 1000; exit 1")
        task.exec("true", code=0)
        task.ctr("pause", code=0)
        task.ctr("resume", code=0)
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        wait_until(lambda: any(topic == "/tasks/delete" and fields.get("id") != "e1"
                               for topic, fields in events.of(task.name)), "the last event")
        happened = [(topic, fields) for topic, fields in events.of(task.name) if topic.startswith("/tasks/")]
        self.assertEqual([topic.removeprefix("/tasks/") for topic, _ in happened if topic != "/tasks/delete"], [
            "create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit"])
        exits = [fields.get("exit_status", 0) for topic, fields in happened if topic == "/tasks/exit"]
        self.assertEqual(exits, [0, 137])

    def test_shim_reports_its_version(self):
        program = f"containerd-shim-{self.runtime}-v2"
        out = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stdout
        self.assertRegex(out, re.compile(rf"{program}:?\s*\n\s+Version:\s+\S+", re.MULTILINE))

    def test_shim_informs_about_itself(self):
        if self.runtime != "husk":
            self.skipTest("runc's shim of containerd 1.6 has no such flag")
        # containerd.runtime.v1.RuntimeInfo: name, version, options, features.
        out = subprocess.run(["containerd-shim-husk-v2", "-info"], stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
        info = api.fields(out)
        self.assertEqual(info[1], b"io.containerd.husk.v2")
        version = subprocess.run(["containerd-shim-husk-v2", "-v"], capture_output=True, text=True, check=True).stdout
        self.assertIn(f"Version:  {api.fields(info[2])[1].decode()}\n", version)
        kind, features = api.fields(info[4]).values()
        self.assertEqual(kind, b"types.containerd.io/opencontainers/runtime-spec/1/features/Features")
        self.assertTrue(json.loads(features)["linux"]["seccomp"]["enabled"])


