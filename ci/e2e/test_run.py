"""`ctr run`: what a container says and how it ends comes through, whole."""

import hashlib
import os
import struct
import subprocess

from harness import IMAGE, ROOT, RUNTIMES, Case

DATA_BYTES = 100 << 20


def numbered_pages(path):
    """100 MiB in which every page is different, so that none can get lost, doubled or displaced."""
    with open(path, "wb") as file:
        for start in range(0, DATA_BYTES // 4096, 256):
            file.write(b"".join(struct.pack("<Q", page) * 512 for page in range(start, start + 256)))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run(Case):
    def test_uname_is_the_kernel_of_the_sandbox(self):
        if self.runtime == "husk":
            with open(f"{ROOT}/target/guest/kernel.release", encoding="ascii") as file:
                expected = file.read().strip()
            self.assertNotEqual(expected, os.uname().release)
        else:
            expected = os.uname().release
        self.assertEqual(self.output_of("uname", "-r"), expected)

    def test_exit_codes_come_through(self):
        for code in 0, 1, 42, 137:
            with self.subTest(code=code):
                result = self.run_container("sh", "-c", f"exit {code}")
                self.assertEqual((result.code, result.out, result.err), (code, "", ""))

    def test_death_by_signal_is_128_and_its_number(self):
        # The signal comes from inside; process 1 of a container takes only those it handles, so a child dies.
        result = self.run_container("sh", "-c", "sh -c 'kill -TERM $$'; exit $?")
        self.assertEqual(result.code, 143)

    def test_stdout_and_stderr_stay_apart(self):
        result = self.run_container("sh", "-c", "echo one; echo two >&2; echo three; printf four >&2", code=0)
        self.assertEqual((result.stdout, result.stderr), (b"one\nthree\n", b"two\nfour"))

    def test_stdout_comes_whole(self):
        source = os.path.join(self.folder, "data")
        digest = numbered_pages(source)
        name = self.name()
        self.addCleanup(self.remove, name)
        argv = ["ctr", "run", "--rm", "--runtime", RUNTIMES[self.runtime],
                "--mount", f"type=bind,src={source},dst=/data,options=rbind:ro", IMAGE, name, "cat", "/data"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            got = hashlib.file_digest(process.stdout, "sha256").hexdigest()
        self.assertEqual((process.returncode, got), (0, digest))

    def test_stdin_comes_whole_and_its_end_too(self):
        source = os.path.join(self.folder, "data")
        digest = numbered_pages(source)
        with open(source, "rb") as file:
            self.assertEqual(self.output_of("sha256sum", stdin=file), f"{digest}  -")

    def test_both_ways_at_once(self):
        source = os.path.join(self.folder, "data")
        numbered_pages(source)
        with open(source, "rb") as file:
            data = file.read(8 << 20)
        self.assertEqual(hash(self.run_container("cat", stdin=data, code=0).stdout), hash(data))

    def test_stdin_that_ends_without_a_byte(self):
        # ctr forgets an end that comes before the container runs, so it comes when that has spoken.
        name = self.name()
        self.addCleanup(self.remove, name)
        argv = ["ctr", "run", "--rm", "--runtime", RUNTIMES[self.runtime], IMAGE, name, "sh", "-c", "echo ready; wc -c"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            self.addCleanup(process.kill)
            self.assertEqual(process.stdout.readline(), b"ready\n")
            process.stdin.close()
            self.assertEqual(process.stdout.read(), b"0\n")

    def test_a_program_that_is_not_there(self):
        with self.nothing_left():
            result = self.run_container("/no/such/program")
            self.assertEqual(result.code, 1)
            self.assertRegex(result.err, "no such file or directory")

    def test_a_program_that_may_not_be_run(self):
        result = self.run_container("/etc/passwd")
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "(?i)permission denied")

    def test_background_processes_end_with_the_first(self):
        # The container is over when its first process is, whatever that left running.
        result = self.run_container("sh", "-c", "sleep 1000 & exit 3")
        self.assertEqual(result.code, 3)
