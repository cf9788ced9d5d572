"""After a container, the machine is as it was."""

import contextlib
import subprocess

from harness import IMAGE, RUNTIMES, TIMEOUT_S, Case, kept_kib, wait_until

# Twenty containers that follow some others have been seen to leave less than 1 MiB, of caches of the kernel that still grew; one VM
# that stays leaves some 70.
MOST_KIB = 8 << 10


class Leaks(Case):
    @contextlib.contextmanager
    def no_memory_kept(self):
        """What is done inside leaves no memory in use."""
        before = kept_kib()
        yield

        def more():
            return {name: kib - before[name] for name, kib in kept_kib().items()}

        try:
            # The kernel gives back the last of a process's after its end.
            wait_until(lambda: sum(more().values()) < MOST_KIB, "memory to be given back", timeout=20)
        except AssertionError as failure:
            raise AssertionError(f"KiB that were kept: {more()}") from failure

    def test_twenty_in_a_row_leave_nothing(self):
        # The first few warm the caches of the kernel and of the daemon.
        for _ in range(3):
            self.run_container("true", code=0)
        with self.no_memory_kept():
            for turn in range(20):
                with self.subTest(turn=turn), self.nothing_left():
                    self.assertEqual(self.output_of("echo", str(turn)), str(turn))

    def test_four_at_once_leave_nothing(self):
        self.run_container("true", code=0)
        with self.no_memory_kept(), self.nothing_left():
            names = [self.name() for _ in range(4)]
            running = [subprocess.Popen(["ctr", "run", "--rm", "--runtime", RUNTIMES[self.runtime], IMAGE, name, "sh", "-c", f"echo {name}; exit {n}"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                       for n, name in enumerate(names)]
            answers = [(*process.communicate(timeout=TIMEOUT_S), process.returncode) for process in running]
            self.assertEqual(answers, [(f"{name}\n", "", n) for n, name in enumerate(names)])

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
