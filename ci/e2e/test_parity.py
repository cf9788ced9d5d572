"""The same script on runc and on husk: what `ctr` says and how it ends must be the same."""

import json
import re

from harness import Case, Events, wait_until


def shape(value):
    """The keys of a JSON value, without what is null or empty."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if item not in (None, {}, [])}
    return type(value).__name__


class Parity(Case):
    """With runc as the runtime under test it is compared with itself, which proves the script steady."""

    def compare(self, script):
        """Runs `script(runtime, note)` on both; what it notes must be equal."""
        both = []
        for runtime in "runc", self.runtime:
            notes = []

            def note(step, result, notes=notes):
                if not isinstance(result, str):
                    result = f"{result.code}\n{result.out}\n{self.normal(result.err)}"
                notes.append(f"{step}: {result}")
            script(runtime, note)
            both.append("\n".join(notes))
        self.assertEqual(both[1], both[0])

    @staticmethod
    def normal(text):
        """An answer without what must differ: names, ids and the words of one runtime."""
        text = re.sub(r"\b[\w-]+-\d+\b", "NAME", text)
        # Of an error, the code and the cause are the contract.
        match = re.search(r"(already exists|not found|failed precondition|no such file or directory|permission denied)", text)
        return match[1] if match else text

    def test_life_of_a_task(self):
        def script(runtime, note):
            task = self.start("sh", "-c", "trap 'exit 33' TERM; echo up; while :; do sleep 0.2; done", runtime=runtime)
            note("status", task.row[1])
            wait_until(lambda: len(task.ctr("ps").out.splitlines()) > 2, "the loop to run")
            note("header", task.ctr("ls").out.splitlines()[0])
            note("exec", task.exec("sh", "-c", "id; pwd; env | sort; echo err >&2; exit 5"))
            note("exec as alice", task.exec("sh", "-c", "id; pwd; echo $HOME", options=["--user", "alice", "--cwd", "/tmp"]))
            note("exec without program", task.exec("/no/such/program"))
            note("same exec id", str(task.ctr("kill", "--exec-id", "nobody").code))
            note("resume too early", str(task.ctr("resume").code))
            note("pause", task.ctr("pause"))
            note("status", task.row[1])
            note("pause again", str(task.ctr("pause").code))
            note("resume", task.ctr("resume"))
            note("status", task.row[1])
            note("rm too early", str(task.ctr("rm").code))
            note("kill", task.ctr("kill"))
            task.wait_for("STOPPED")
            note("status", task.row[1])
            note("exec too late", str(task.exec("true").code))
            note("kill too late", task.ctr("kill"))
            note("rm", str(task.ctr("rm").code))
            note("rm again", task.ctr("rm"))
        self.compare(script)

    def test_events_of_a_life(self):
        def script(runtime, note):
            events = Events(self)
            task = self.start("sh", "-c", "sleep 1000", runtime=runtime)
            task.exec("sh", "-c", "exit 3")
            task.ctr("pause")
            task.ctr("resume")
            task.ctr("kill", "-s", "SIGKILL")
            task.wait_for("STOPPED")
            task.ctr("rm")
            wait_until(lambda: any(topic == "/tasks/delete" and fields.get("id") != "e1"
                                   for topic, fields in events.of(task.name)), "the last event")
            for topic, fields in events.of(task.name):
                if topic.startswith("/tasks/"):
                    note("event", f"{topic} {fields.get('exit_status')} {fields.get('exec_id')} {sorted(fields)}")
            events.close()
        self.compare(script)

    def test_metrics_have_the_same_fields(self):
        found = []
        for runtime in "runc", self.runtime:
            task = self.start(runtime=runtime, options=["--memory-limit", str(128 << 20)])
            found.append(shape(json.loads(task.ctr("metrics", "--format", "json", code=0).out)))
        for part in "pids", "cpu", "memory":
            self.assertLessEqual(set(found[0][part]), set(found[1][part]) | OPTIONAL, part)

    def test_what_a_container_sees(self):
        # Left out here is what differs for a reason: docs/src/getting-started.md, "What differs from runc".
        def script(runtime, note):
            note("environment", self.run_container("sh", "-c", "env | sort", runtime=runtime))
            note("identity", self.run_container("sh", "-c", "id; pwd; umask; echo $$", runtime=runtime))
            note("limits", self.run_container("sh", "-c", "ulimit -a | grep -vE 'pending|processes'", runtime=runtime))
            note("status", self.run_container("sh", "-c", "grep -E '^(Cap|NoNew|Seccomp:|Groups)' /proc/self/status", runtime=runtime))
            note("devices", self.run_container("sh", "-c", "rm -f /dev/core; cd /dev; find . | sort; stat -c '%n %F %a %u %g' *", runtime=runtime))
            note("mounts", self.run_container("sh", "-c", "awk '$2 != \"/\" {print $2, $3, substr($4, 1, 2)}' /proc/self/mounts | grep -v -e resolv -e sysrq-trigger -e kcore",
                                              runtime=runtime))
            note("files", self.run_container("sh", "-c", "ls -la / /etc /tmp | awk '{print $1, $3, $4, $NF}' | grep -v -e ' [.]*$' -e total", runtime=runtime))
            note("streams", self.run_container("sh", "-c", "for n in 0 1 2; do test -p /dev/fd/$n && echo pipe; done; ls /proc/self/fd | wc -l",
                                               runtime=runtime))
        self.compare(script)

    def test_ends_of_a_container(self):
        def script(runtime, note):
            for command in (["true"], ["false"], ["sh", "-c", "exit 42"], ["sh", "-c", "kill -9 $$; echo unkillable"],
                            ["/no/such/program"], ["/etc/passwd"], ["/tmp"]):
                note(" ".join(command), self.run_container(*command, runtime=runtime))
        self.compare(script)


# Counters that depend on how the kernel was configured, or on what it happened to do, rather than on the runtime: ctr prints
# none that is zero.
OPTIONAL = {"thp_fault_alloc", "active_anon", "inactive_anon", "pgactivate",
            "psi", "zswap", "zswapped", "swap_max_usage", "max_usage", "workingset_restore", "swap_limit", "swap_usage"}
