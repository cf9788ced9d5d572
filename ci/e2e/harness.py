"""What the end-to-end tests share: `ctr` with everything captured, terminals, waiting, leaks.

A test is a method of a `Case`. It drives containerd by `ctr` alone, as a user would, against the
runtime that `run` was started for; `self.runtime` is its short name. Every command is recorded, so
that a failure prints all that was done and answered, and what containerd and the shim logged.
"""

import contextlib
import dataclasses
import functools
import fcntl
import glob
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest

import api

RUNTIMES = {"husk": "io.containerd.husk.v2", "runc": "io.containerd.runc.v2"}
IMAGE = "husk.test/busybox:latest"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
CONTAINERD_LOG = "/run/containerd.log"
CONTAINERD_PID = "/run/containerd/pid"
CONTAINERD_CONFIG = "/run/containerd/config.toml"
# An empty file system.
SCRATCH = "/var/lib/containerd/scratch.ext4"

# Long enough for a start under emulation on a busy machine; a hang is still found.
TIMEOUT_S = 150

# Set by `run`.
RUNTIME = "husk"


def runtime_version():
    """The running containerd's version as a tuple, e.g. (1, 6)."""
    out = subprocess.run(["ctr", "version"], capture_output=True, text=True, check=True).stdout
    server = out[out.index("Server:"):]
    major, minor = re.search(r"Version:\s+v?(\d+)\.(\d+)", server).groups()
    return int(major), int(minor)


# How the reasons begin for which husk's tests may be skipped.
TOO_OLD = "containerd before "


def since(major, minor, why):
    """A test that older containerds cannot have, which is for `why`."""
    def decorate(test):
        @functools.wraps(test)
        def run(self):
            if runtime_version() < (major, minor):
                self.skipTest(f"{TOO_OLD}{major}.{minor} {why}")
            test(self)
        return run
    return decorate


@dataclasses.dataclass
class Result:
    """One finished command; without a status, one that hung."""

    argv: list
    code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def out(self):
        """Standard output as text, without the last line's end."""
        return self.stdout.decode(errors="replace").rstrip("\n")

    @property
    def err(self):
        """Standard error as text, without the last line's end."""
        return self.stderr.decode(errors="replace").rstrip("\n")

    def __str__(self):
        # What hangs has been made to say why.
        limit = 4000 if self.code is not None else 100_000

        def shown(name, data):
            text = data[:limit].decode(errors="replace").rstrip("\n")
            more = f"\n    ... ({len(data)} bytes)" if len(data) > limit else ""
            return "".join(f"\n    {name}| {line}" for line in text.splitlines()) + more

        return (f"$ {shlex.join(self.argv)}\n    -> {self.code} after {self.seconds:.1f} s"
                + shown("out", self.stdout) + shown("err", self.stderr))


def flushes(device):
    """How often a disk was told to make durable what was written to it."""
    with open(f"/sys/block/{os.path.basename(device)}/stat", encoding="ascii") as file:
        return int(file.read().split()[15])


# How often a command is told that its terminal has another size.
TELL_AGAIN_S = 0.5


class Terminal:
    """A command on a terminal of its own, of which the test is the keyboard and the screen."""

    def __init__(self, case, argv, rows=24, columns=80):
        self.argv, self.case = argv, case
        self.screen = b""
        self.position = 0
        self.started = time.monotonic()
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        # It asks for its first size itself.
        self.resized = None
        case.addCleanup(self.close)

    def resize(self, rows, columns):
        """Changes the size; the kernel tells the command by SIGWINCH.

        A client listens for that a moment after it has set the first size, and nothing shows when. So the command is told
        until what the test waits for next has come.
        """
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.resized = time.monotonic()

    def type(self, text):
        """Presses keys."""
        os.write(self.master, text.encode())

    def _read(self, deadline):
        """Takes what came; False when nothing will come any more."""
        ready = []
        while not ready:
            left = deadline - time.monotonic()
            if left < 0:
                self.case.fail(f"{shlex.join(self.argv)} said nothing more; its screen:\n{self.text}")
            ready, _, _ = select.select([self.master], [], [], min(left, TELL_AGAIN_S) if self.resized else left)
            if self.resized and time.monotonic() - self.resized > TELL_AGAIN_S:
                self.process.send_signal(signal.SIGWINCH)
                self.resized = time.monotonic()
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the last one on the other side is gone
            data = b""
        self.screen += data
        return bool(data)

    @property
    def text(self):
        """All that was on the screen."""
        return self.screen.decode(errors="replace")

    def expect(self, pattern, timeout=TIMEOUT_S):
        """Waits until what came since the last call matches, and returns the match."""
        deadline = time.monotonic() + timeout
        while True:
            found = re.compile(pattern.encode()).search(self.screen, self.position)
            if found:
                self.position = found.end()
                self.resized = None
                return found
            if not self._read(deadline):
                self.case.fail(f"{shlex.join(self.argv)} ended without {pattern!r}; its screen:\n{self.text}")

    def wait(self, timeout=TIMEOUT_S):
        """Waits for the end; returns the exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        code = self.process.wait(timeout)
        self.case.record(Result(self.argv, code, self.screen, b"", time.monotonic() - self.started))
        return code

    def close(self):
        """Ends it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self.master)


class Events:
    """`ctr events` in the background."""

    def __init__(self, case):
        self.file = tempfile.TemporaryFile()
        self.process = subprocess.Popen(["ctr", "events"], stdout=self.file, stderr=subprocess.STDOUT)
        case.addCleanup(self.close)
        # Subscribed is what answers: nothing tells, so a container of our own does.
        probe = f"probe-{os.getpid()}-{id(self)}"

        def subscribed():
            for verb in (["create", IMAGE, probe], ["rm", probe]):
                case.ctr("c", *verb, code=0)
            return any(probe in line for line in self.lines())

        wait_until(subscribed, "ctr events to report")

    def lines(self):
        """What came so far."""
        return os.pread(self.file.fileno(), 1 << 24, 0).decode().splitlines()

    def of(self, container):
        """The (topic, fields) of this container's events, in order."""
        found = []
        for line in self.lines():
            match = re.search(r" (/\S+) (\{.*\})$", line)
            if not match:
                continue
            fields = json.loads(match[2])
            if container in (fields.get("container_id"), fields.get("id"), fields.get("key")):
                found.append((match[1], fields))
        return found

    def close(self):
        """Stops listening."""
        self.process.kill()
        self.process.wait()
        self.file.close()


def wait_until(condition, what, timeout=TIMEOUT_S, pause=0.1):
    """Waits until `condition()` is true, for the things that nothing announces. It is asked again after `pause` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain for {what}")
        time.sleep(pause)


def processes():
    """{pid: command line} of every process but the kernel's threads and our own family."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                argv = file.read().rstrip(b"\0").split(b"\0")
            if argv != [b""] and int(pid) != os.getpid():
                found[int(pid)] = b" ".join(argv).decode(errors="replace")
    return found


def containerd_pid():
    """The daemon's process, if it runs."""
    with open(CONTAINERD_PID, encoding="ascii") as file:
        pid = int(file.read())
    return pid if processes().get(pid, "").startswith("containerd ") else None


def stop_containerd():
    """Kills the daemon, and nothing else."""
    pid = containerd_pid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in processes(), "containerd to end", timeout=10)


def start_containerd(level="debug"):
    """Starts the daemon again as the node has started it, but for what it logs; returns when it is ready."""
    with open(CONTAINERD_CONFIG, encoding="utf-8") as file:
        config = file.read()
    with open(CONTAINERD_CONFIG, "w", encoding="utf-8") as file:
        file.write(re.sub(r'(?m)^level = "\w+"$', f'level = "{level}"', config))
    with open(CONTAINERD_LOG, "ab") as log:
        subprocess.run([f"{ROOT}/ci/await-ready", CONTAINERD_PID, "containerd", "--config", CONTAINERD_CONFIG],
                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, check=True)


def restart_containerd():
    """Its containers go on meanwhile."""
    stop_containerd()
    start_containerd()


def enable_blockfile():
    """Gives containerd the snapshotter blockfile, by which a root file system is an ext4 in a file; 1.6 has none."""
    with open(CONTAINERD_CONFIG, "r+", encoding="utf-8") as file:
        if "blockfile" in file.read():
            return
        subprocess.run(["mkfs.ext4", "-q", SCRATCH, "48M"], capture_output=True, check=True)
        file.write(f'[plugins."io.containerd.snapshotter.v1.blockfile"]\nscratch_file = "{SCRATCH}"\n')
    restart_containerd()


def enable_erofs():
    """Gives containerd the snapshotter erofs, which it has where the kernel can mount that; before 2.1 it has none."""
    subprocess.run(["modprobe", "erofs"], check=True)
    restart_containerd()


SNAPSHOTTERS = {"blockfile": enable_blockfile, "erofs": enable_erofs}


def roots_are_disks():
    """Whether the root file systems are (`ci/e2e/run --snapshotter`)."""
    return os.environ.get("CONTAINERD_SNAPSHOTTER") == "blockfile"


def fstype_of_roots(shared):
    """What a container's root file system is in the guest, if it is `shared` where it comes by a folder."""
    return {"blockfile": "ext4", "erofs": "overlay"}.get(os.environ.get("CONTAINERD_SNAPSHOTTER"), shared)


def as_alice():
    """The options by which ctr's exec is for alice. To look a name up it mounts the root file system, which it cannot where
    that is a disk in use."""
    return ["--user", "1000:1000" if roots_are_disks() else "alice"]


def hanging():
    """What every thread of ctr, the shims and the VMs' workers waits for, for the report of a hang."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # A worker runs the shim's program. The command line, unlike this, may wait for the process's memory.
            name = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
            if name != "ctr" and not name.startswith("containerd-shim-"):
                continue
            for task in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
                found.append(f"{name} {pid}, thread {task}: {thread(pid, task)}")
    return found


def thread(pid, task):
    """A thread: its name, what it waits for, and by which functions of the kernel it came there."""
    words = []
    for name in ("comm", "wchan", "syscall", "schedstat", "stack"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/{name}", encoding="utf-8", errors="replace") as file:
            words.append(" < ".join(re.sub(r"^\[<0>\] ", "", line.strip()) for line in file))
    return " | ".join(words)


def explain_hang():
    """What `hanging` finds. By another process, because what hangs may hang who looks at it, too."""
    script = "import harness; print(*harness.hanging(), sep='\\n')"
    try:
        found = subprocess.run([sys.executable, "-B", "-c", script], cwd=os.path.dirname(__file__), timeout=20,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except subprocess.TimeoutExpired:
        return b"looking at the processes hangs as well\n"
    return found.stdout


def ends(process, timeout):
    """Waits for the end of a child, and for nothing else: whether it came in time."""
    pidfd = os.pidfd_open(process.pid)
    try:
        ended, _, _ = select.select([pidfd], [], [], timeout)
    finally:
        os.close(pidfd)
    if ended:
        process.wait()
    return bool(ended)


def children(pid):
    """The pids of the direct children."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        # A thread may end meanwhile.
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            found += map(int, file.read().split())
    return found


# What a container may leave a trace in. containerd's own store of snapshots and content is not
# among them: it is collected later, and not the runtime's.
FOLDERS = [
    "/run/husk",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/runc",
    "/run/containerd/fifo",
    "/run/containerd/s",
    "/run/netns",
    "/var/lib/cni/networks",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/dev/shm",
]


def traces():
    """All that a runtime can leave behind on a machine, by kind, as sets that can be compared."""
    def tree(folder):
        return {os.path.join(at, name) for at, folders, files in os.walk(folder) for name in folders + files}

    # Folders that hold what belongs to a namespace stay once they were there.
    standing = {f"{folder}/{namespace}" for folder in FOLDERS for namespace in ("default", "k8s.io")}
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        # The snapshotter erofs keeps the layers mounted that a container has used once.
        mounts = {" ".join(line.split()[3:5]) for line in file if "/io.containerd.snapshotter.v1.erofs/snapshots/" not in line}
    with open("/proc/net/unix", encoding="utf-8") as file:
        # Flags 00010000: it listens.
        sockets = {line.split()[7] for line in file if " 00010000 " in line and len(line.split()) > 7}
    cgroups = {at for at, _, _ in os.walk("/sys/fs/cgroup")} - {"/sys/fs/cgroup/default", "/sys/fs/cgroup/k8s.io"}
    return {
        # Tests that restart containerd leave another one.
        "processes": {f"{pid} {line}" for pid, line in processes().items() if not line.startswith("containerd ")},
        "mounts": mounts,
        "cgroups": cgroups,
        "sockets": sockets,
        "network devices": set(os.listdir("/sys/class/net")),
        "files": set().union(*(tree(folder) for folder in FOLDERS)) - standing,
    }


def await_no_more_than(before, timeout):
    """Returns when there are no traces but those of `before`; fails with what is left behind."""
    def left():
        after = traces()
        return {kind: sorted(after[kind] - before[kind]) for kind in after if after[kind] - before[kind]}

    try:
        wait_until(lambda: not left(), "all traces to be gone", timeout=timeout)
    except AssertionError as failure:
        raise AssertionError(f"left behind: {json.dumps(left(), indent=2)}") from failure


def remove_fifos_of_ctr(process):
    """The fifos of a container or exec, which its client has made and is not there to remove."""
    for fifo in glob.glob(f"/run/containerd/fifo/*/{process}-*"):
        os.unlink(fifo)
        with contextlib.suppress(OSError):  # Not empty yet.
            os.rmdir(os.path.dirname(fifo))


def kept_kib():
    """Memory that is neither free, nor of a process, nor given back when somebody needs it, by what it is for: the kernel's own,
    that of virtual machines included, and files in memory. What `traces` sees does not count: processes, and the daemon's log."""
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3\n")
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = {name: int(number) for name, number in re.findall(r"(?m)^(\w+): +(\d+)", file.read())}
    # Each processor has a stock of free pages, of tens of MiB, that counts neither as free nor as used.
    with open("/proc/zoneinfo", encoding="ascii") as file:
        stocks = sum(map(int, re.findall(r"(?m)^ +count: +(\d+)", file.read()))) * os.sysconf("SC_PAGESIZE") // 1024
    kept = {name: kib[name] for name in ("Shmem", "SUnreclaim", "KernelStack", "PageTables", "Percpu")}
    used = kib["MemTotal"] - kib["MemFree"] - stocks
    # Shmem is among what is cached.
    kept["others"] = used - kib["Cached"] - kib["Buffers"] - kib["SReclaimable"] - kib["AnonPages"] - (sum(kept.values()) - kept["Shmem"])
    kept["Shmem"] -= os.path.getsize(CONTAINERD_LOG) // 1024
    return kept


def show_cgroup(spec):
    """Gives the container of a specification its own control group at /sys/fs/cgroup, whatever ctr's version does."""
    if not any(namespace["type"] == "cgroup" for namespace in spec["linux"]["namespaces"]):
        spec["linux"]["namespaces"].append({"type": "cgroup"})
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                           "options": ["ro", "nosuid", "noexec", "nodev"]})


class Task:
    """A detached container."""

    def __init__(self, case, name):
        self.case, self.name = case, name
        self.execs = 0

    def ctr(self, verb, *args, **kwargs):
        """`ctr task VERB ARGS... NAME`."""
        return self.case.ctr("task", verb, *args, self.name, **kwargs)

    def exec(self, *command, options=(), **kwargs):
        """`ctr task exec` with an exec id of its own."""
        self.execs += 1
        return self.case.ctr("task", "exec", "--exec-id", f"e{self.execs}", *options, self.name, *command, **kwargs)

    def end(self):
        """`ctr task rm`; returns the exit status of the container, of which ctr only warns."""
        result = self.ctr("rm", code=0)
        warned = re.search(r"exit with non-zero exit code (\d+)", result.err)
        return int(warned[1]) if warned else 0

    @property
    def row(self):
        """(pid, status) from `ctr task ls`, or None."""
        for line in self.case.ctr("task", "ls").out.splitlines()[1:]:
            name, pid, status = line.split()
            if name == self.name:
                return int(pid), status
        return None

    @property
    def pid(self):
        """The process of the host that stands for it."""
        return self.row[0]

    def wait_for(self, status):
        """Waits until `ctr task ls` says so (None: until it is gone)."""
        wait_until(lambda: (self.row or (0, None))[1] == status, f"{self.name} to be {status}")


class Case(unittest.TestCase):
    """A test with containerd at hand."""

    maxDiff = None

    @property
    def runtime(self):
        """The short name of the runtime under test."""
        return RUNTIME

    def setUp(self):
        self.commands = []
        self.names = 0
        self.log_start = os.path.getsize(CONTAINERD_LOG)
        self.folder = tempfile.mkdtemp(prefix="e2e-", dir="/var/tmp")
        self.addCleanup(subprocess.run, ["rm", "-rf", self.folder], check=True)

    def record(self, result):
        """Keeps a command for the report of a failure."""
        self.commands.append(result)
        return result

    def report(self):
        """All that was done, and what the daemon and the shims said meanwhile."""
        with open(CONTAINERD_LOG, "rb") as file:
            file.seek(self.log_start)
            log = file.read().decode(errors="replace").splitlines()
        noise = re.compile(r'level=debug.*(garbage collect|event published|remove snapshot|"stat snapshot|metadata)')
        log = [line for line in log if not noise.search(line)]
        return "\n".join([
            *map(str, self.commands), f"--- containerd and shim (last {min(len(log), 80)} of {len(log)} lines)", *log[-80:],
        ])

    def name(self):
        """A container's name that no other test has."""
        self.names += 1
        return f"{self._testMethodName[5:45].rstrip('_')}-{self.names}"

    def ctr(self, *args, **kwargs):
        """Runs ctr."""
        return self.command("ctr", *args, **kwargs)

    def command(self, *args, stdin=b"", timeout=TIMEOUT_S, code=None):
        """Runs a command. `stdin`: bytes, or an open file; `code`: the status that is asked for."""
        argv = list(map(str, args))
        started = time.monotonic()
        # Files, because the end of a pipe comes only when the last of those who have it is gone, whoever that is.
        with contextlib.ExitStack() as stack:
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            if isinstance(stdin, bytes):
                given, stdin = stdin, stack.enter_context(tempfile.TemporaryFile())
                stdin.write(given)
                stdin.seek(0)
            # A session of its own, so that a hang ends with all that it started.
            process = subprocess.Popen(argv, stdin=stdin, stdout=out, stderr=err, start_new_session=True)
            status = process.returncode if ends(process, timeout) else self.stop_hanging(process, err)
            said = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in (out, err)]
        result = self.record(Result(argv, status, *said, time.monotonic() - started))
        if status is None:
            self.fail(f"{shlex.join(argv)} was not over after {timeout} s")
        if code is not None:
            self.assertEqual(result.code, code, f"exit status of {shlex.join(argv)}; {result.err}")
        return result

    @staticmethod
    def stop_hanging(process, err):
        """Writes what a command that hangs waits for to its standard error, and kills it."""
        os.write(err.fileno(), explain_hang())
        # Programs in Go say by this what each of their goroutines does.
        for kill in signal.SIGQUIT, signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, kill)
            # One that the kernel does not let go of stays.
            if process.returncode is None:
                ends(process, 5)

    def remove(self, name):
        """Whatever it takes to be rid of a container, so that the next test finds a clean machine."""
        hangs = False
        try:
            subprocess.run(["ctr", "task", "rm", "-f", name], capture_output=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            hangs = True
            for pid, line in processes().items():
                if "containerd-shim" in line and name in line.split():
                    os.kill(pid, signal.SIGKILL)
        subprocess.run(["ctr", "c", "rm", name], capture_output=True, timeout=30, check=False)
        self.assertFalse(hangs, f"`ctr task rm -f {name}` was not over after 30 s; its shim was killed")

    def run_container(self, *command, options=(), name=None, runtime=None, image=(IMAGE,), **kwargs):
        """`ctr run --rm`, to its end."""
        name = name or self.name()
        self.addCleanup(self.remove, name)
        return self.ctr("run", "--rm", "--runtime", RUNTIMES[runtime or self.runtime], *options,
                        *image, name, *command, **kwargs)

    def output_of(self, *command, **kwargs):
        """What a container that must succeed says."""
        return self.run_container(*command, code=0, **kwargs).out

    def start(self, *command, options=(), name=None, runtime=None):
        """`ctr run -d`."""
        name = name or self.name()
        self.addCleanup(self.remove, name)
        self.ctr("run", "-d", "--runtime", RUNTIMES[runtime or self.runtime], *options, IMAGE, name,
                 *(command or ("sleep", "100000")), code=0)
        return Task(self, name)

    def terminal(self, *args, **kwargs):
        """ctr on a terminal."""
        return Terminal(self, ["ctr", *map(str, args)], **kwargs)

    def terminal_container(self, *command, options=(), runtime=None, **kwargs):
        """`ctr run -t`."""
        name = self.name()
        self.addCleanup(self.remove, name)
        return self.terminal("run", "--rm", "-t", "--runtime", RUNTIMES[runtime or self.runtime], *options, IMAGE, name,
                             *command, **kwargs)

    def rootfs(self):
        """A folder with the image's files, for what ctr does not offer with an image; all tests share it."""
        copy = "/var/tmp/e2e-rootfs"
        if not os.path.exists(copy):
            target = os.path.join(self.folder, "mounted")
            os.mkdir(target)
            self.ctr("images", "mount", IMAGE, target, code=0)
            subprocess.run(["cp", "-a", target, copy], check=True)
            self.ctr("images", "unmount", "--rm", target, code=0)
        return copy

    def mount_disk(self, folder, size, *options, made_with=()):
        """Makes a folder the root of an ext4 of its own, until the test ends."""
        image = f"{folder}.ext4"
        self.command("mkfs.ext4", "-q", *made_with, image, size, code=0)
        self.command("mount", "-o", ",".join(["loop", *options]), image, folder, code=0)
        self.addCleanup(subprocess.run, ["umount", folder], check=True)

    def loop_device(self, path):
        """A block device of the machine that is a file, until the test ends."""
        device = self.command("losetup", "--find", "--show", path, code=0).out
        self.addCleanup(subprocess.run, ["losetup", "--detach", device], check=True)
        return device

    def create_task(self, rootfs, runtime=None):
        """Asks containerd itself for a task with this root (api.mount), which sleeps once started; returns it with the answer."""
        task = Task(self, self.name())
        self.addCleanup(self.remove, task.name)
        self.ctr("c", "create", "--runtime", RUNTIMES[runtime or self.runtime], IMAGE, task.name, "sleep", "1000", code=0)
        return task, api.create(task.name, rootfs)

    def config(self, edit, *command, name):
        """A file with ctr's own default specification of a container, changed by `edit(spec)`."""
        self.addCleanup(self.remove, name)
        self.ctr("c", "create", IMAGE, name, code=0)
        spec = json.loads(self.ctr("c", "info", "--spec", name, code=0).out)
        self.ctr("c", "rm", name, code=0)
        spec["root"]["path"] = self.rootfs()
        spec["process"]["args"] = list(command)
        spec["linux"]["cgroupsPath"] = f"/default/{name}"
        edit(spec)
        path = os.path.join(self.folder, "config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(spec, file)
        return path

    def run_spec(self, edit, *command, runtime=None, name=None, detached=False, **kwargs):
        """Runs a container from what `config` makes."""
        name = name or self.name()
        path = self.config(edit, *command, name=name)
        return self.ctr("run", "-d" if detached else "--rm", "--runtime", RUNTIMES[runtime or self.runtime],
                        "--config", path, name, **kwargs)

    @contextlib.contextmanager
    def nothing_left(self):
        """What is done inside leaves no trace on the machine."""
        before = traces()
        yield
        await_no_more_than(before, timeout=20)
