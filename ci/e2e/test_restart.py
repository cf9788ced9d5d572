"""containerd dies and comes back: the tasks live on, and are found again."""

import os

from harness import (CONTAINERD_LOG, Case, Events, containerd_pid, remove_fifos_of_ctr, runtime_version, start_containerd,
                     stop_containerd, wait_until)


class Restart(Case):
    def setUp(self):
        self.enterContext(self.nothing_left())
        super().setUp()
        # Whatever fails, the next test finds a containerd.
        self.addCleanup(lambda: containerd_pid() or start_containerd())

    def test_a_task_outlives_containerd(self):
        task = self.start("sh", "-c", "trap 'exit 33' TERM; while :; do sleep 0.2; done")
        self.ctr("task", "exec", "-d", "--exec-id", "background", task.name, "sleep", "1000", code=0)
        before = task.row
        stop_containerd()
        start_containerd()
        events = Events(self)

        self.assertEqual(task.row, before)
        self.assertEqual(task.exec("sh", "-c", "cat; exit 42", stdin=b"again\n").stdout, b"again\n")
        self.assertEqual(task.exec("sh", "-c", "exit 42").code, 42)
        self.assertIn("background", task.ctr("ps", code=0).out)
        task.ctr("pause", code=0)
        self.assertEqual(task.row[1], "PAUSED")
        task.ctr("resume", code=0)
        task.ctr("metrics", code=0)

        self.ctr("task", "kill", "--exec-id", "background", "-s", "SIGKILL", task.name, code=0)
        # Its status is the process's.
        self.assertEqual(self.ctr("task", "rm", "--exec-id", "background", task.name).code, 137)
        self.assertNotIn("background", task.ctr("ps", code=0).out)
        task.ctr("kill", code=0)
        task.wait_for("STOPPED")
        wait_until(lambda: [fields.get("exit_status") for topic, fields in events.of(task.name)
                            if topic == "/tasks/exit" and fields.get("id") == task.name] == [33], "the exit's event")
        self.assertEqual(task.end(), 33)
        # The one ctr that would remove them has detached.
        remove_fifos_of_ctr("background")

    def test_an_exit_while_containerd_is_away_is_known_afterwards(self):
        task = self.start("sh", "-c", "until test -e /data/go; do sleep 0.2; done; touch /data/gone; exit 7",
                          options=["--mount", f"type=bind,src={self.folder},dst=/data,options=rbind:rw"])
        stop_containerd()
        with open(os.path.join(self.folder, "go"), "w", encoding="ascii"):
            pass
        wait_until(lambda: os.path.exists(os.path.join(self.folder, "gone")), "the container to end")
        start_containerd()
        if runtime_version() < (1, 7):
            task.wait_for("STOPPED")
            self.assertEqual(task.end(), 7)
            return
        # Later ones take any shim without a process for one that was left over, and remove it.
        self.assertIsNone(task.row)
        remove_fifos_of_ctr(task.name)

    def test_the_shim_says_as_much_as_containerd_does(self):
        if self.runtime != "husk":
            self.skipTest("what is looked for are husk's words")

        def said():
            """What the shim logs of a request that asks for nothing that there is."""
            start = os.path.getsize(CONTAINERD_LOG)
            task = self.start()
            self.assertEqual(self.ctr("task", "kill", "--exec-id", "nobody", task.name).code, 1)
            task.ctr("kill", "-s", "SIGKILL", code=0)
            task.wait_for("STOPPED")
            self.assertEqual(task.end(), 137)
            with open(CONTAINERD_LOG, "rb") as file:
                file.seek(start)
                return file.read().decode(errors="replace")

        debug = "state: process nobody does not exist"
        self.assertIn(debug, said())
        self.addCleanup(start_containerd)
        self.addCleanup(stop_containerd)
        stop_containerd()
        start_containerd(level="info")
        text = said()
        self.assertNotIn(debug, text)
        self.assertIn("boot phases:", text)
