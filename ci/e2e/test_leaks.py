"""After a container, the machine is as it was."""

import subprocess

from harness import IMAGE, RUNTIMES, Case, available_mib


class Leaks(Case):
    def test_twenty_in_a_row_leave_nothing(self):
        # The first few warm the caches that the daemon keeps.
        for _ in range(2):
            self.run_container("true", code=0)
        free = available_mib()
        for turn in range(20):
            with self.subTest(turn=turn), self.nothing_left():
                self.assertEqual(self.output_of("echo", str(turn)), str(turn))
        # A single VM that stayed would hold more than this.
        self.assertLess(free - available_mib(), 48, "MiB that twenty containers kept")

    def test_four_at_once_leave_nothing(self):
        self.run_container("true", code=0)
        free = available_mib()
        with self.nothing_left():
            names = [self.name() for _ in range(4)]
            running = [subprocess.Popen(["ctr", "run", "--rm", "--runtime", RUNTIMES[self.runtime], IMAGE, name, "sh", "-c", f"echo {name}; exit {n}"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                       for n, name in enumerate(names)]
            answers = [(*process.communicate(), process.returncode) for process in running]
            self.assertEqual(answers, [(f"{name}\n", "", n) for n, name in enumerate(names)])
        self.assertLess(free - available_mib(), 48, "MiB that four containers kept")

    def test_a_detached_life_leaves_nothing(self):
        with self.nothing_left():
            task = self.start()
            task.exec("true", code=0)
            task.ctr("kill", "-s", "SIGKILL", code=0)
            task.wait_for("STOPPED")
            task.ctr("rm")
            self.ctr("c", "rm", task.name, code=0)

    def test_no_mount_of_a_container_shows_on_the_host(self):
        if self.runtime != "husk":
            self.skipTest("runc mounts on the host")
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            before = file.read()
        self.start("sleep", "1000", options=["--mount", f"type=bind,src={self.folder},dst=/data,options=rbind:rw"])
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            self.assertEqual(file.read(), before)
