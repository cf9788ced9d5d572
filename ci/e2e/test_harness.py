"""That the tests' own limit on a command holds."""

import os
import signal

from harness import Case


class Limit(Case):
    def test_a_command_ends_when_its_process_does(self):
        # One that is in another session keeps the streams open.
        done = self.command("sh", "-c", "setsid sleep 1000 & echo $!; exit 3", code=3)
        self.addCleanup(os.kill, int(done.out), signal.SIGKILL)

    def test_a_command_that_hangs_is_explained_and_ended(self):
        with self.assertRaisesRegex(AssertionError, "was not over after 10 s"):
            self.command("sh", "-c", "setsid sleep 1000 & echo $!; exec ctr events", timeout=10)
        hung = self.commands[-1]
        self.addCleanup(os.kill, int(hung.out.splitlines()[0]), signal.SIGKILL)
        self.assertIsNone(hung.code)
        self.assertLess(hung.seconds, 60)
        self.assertRegex(hung.err, r"ctr \d+, thread \d+: ctr \| \w+")
        self.assertIn("goroutine ", hung.err)
