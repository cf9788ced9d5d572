"""A shim that is killed at any point of a pod's start, or of its growth: `crictl rmp -f` succeeds, and nothing is left."""

import concurrent.futures
import contextlib
import os
import signal
import stat

from cri import Pod, PodCase
from harness import children, processes, wait_until

TASKS = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"


def shims():
    """{pid: sandbox} of the shims that serve."""
    lines = {pid: line.split() for pid, line in processes().items() if "containerd-shim-husk-v2" in line}
    return {pid: words[words.index("-id") + 1] for pid, words in lines.items()
            if "-id" in words and words[-1] not in ("start", "delete")}


def has_file(name):
    """The bundle has this file."""
    return lambda shim, bundle: os.path.exists(f"{bundle}/{name}")


def has_moved(shim, bundle):
    """It is in its pod's cgroup."""
    with open(f"/proc/{shim}/cgroup", encoding="ascii") as file:
        return os.path.basename(bundle) in file.read()


def has_mounted(shim, bundle):
    """It has mounted a root file system."""
    with open(f"/proc/{shim}/mountinfo", encoding="utf-8") as file:
        return f"{os.path.basename(bundle)}/rootfs" in file.read()


def has_another_processor(shim, bundle):
    """Its VM has grown."""
    (worker,) = children(shim)
    for thread in os.listdir(f"/proc/{worker}/task"):
        # A thread may end meanwhile.
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{worker}/task/{thread}/comm", encoding="ascii") as file:
            if file.read() == "vcpu-1\n":
                return True
    return False


def has_disk(shim, bundle):
    """Its worker has a disk to plug in."""
    (worker,) = children(shim)
    for descriptor in os.listdir(f"/proc/{worker}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISBLK(os.stat(f"/proc/{worker}/fd/{descriptor}").st_mode):
                return True
    return False


# What shows from outside how far it has come, in this order. Once true, each of them stays so. They begin when containerd
# has asked it for something: where a shim dies before, containerd does not have `delete` clean up, and its socket stays.
POINTS_OF_A_SANDBOX = {
    "has moved to its cgroup": has_moved,
    "is about to change the network": has_file("network"),
    "has a worker": lambda shim, bundle: children(shim),
    "has booted the machine": has_file("worker.pid"),
}
POINTS_OF_A_CONTAINER = {
    "has a bundle": has_file("config.json"),
    "has mounted the root": has_mounted,
    "has made the machine larger": has_another_processor,
    "is about to plug": has_file("worker.pid"),
    "plugs a disk": has_disk,
}
# How containerd says that it has lost a shim.
SHIM_LOST = "shim|ttrpc"
# More than the machine has at its start.
LARGE = {"cpu_period": 100000, "cpu_quota": 200000, "memory_limit_in_bytes": 1 << 30}


class KillPoints(PodCase):
    def setUp(self):
        super().setUp()
        if self.runtime != "husk":
            self.skipTest("runc's shim starts no machine")
        # The first pod makes the bridge.
        self.pod().remove(code=0)

    def kill(self, find, reached):
        """Kills the shim of which `find` says (pid, bundle), once it is there, as soon as it has come so far."""
        shim, bundle = wait_until(find, "the shim", pause=0.005)

        def killed():
            try:
                if not reached(shim, bundle):
                    return False
                os.kill(shim, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError) as error:
                self.fail(f"the shim has ended by itself: {error}")
            return True

        # So that it is there that it dies, and not some steps later.
        wait_until(killed, "the shim to come so far", pause=0.001)

    def remove_all(self):
        """What a kubelet does with pods that have failed."""
        for pod in self.crictl("pods", "--quiet", code=0).out.split():
            self.crictl("rmp", "-f", pod, code=0)

    def test_while_a_sandbox_starts(self):
        def find():
            return next(((shim, f"{TASKS}/{sandbox}") for shim, sandbox in shims().items()), None)

        for name, reached in POINTS_OF_A_SANDBOX.items():
            with self.subTest(point=name), self.nothing_left():
                with concurrent.futures.ThreadPoolExecutor(1) as background:
                    starting = background.submit(self.try_pod)
                    self.kill(find, reached)
                    result, _ = starting.result()
                # It may have been the last step.
                if result.code == 0:
                    wait_until(lambda: Pod(self, result.out, None).status["state"] == "SANDBOX_NOTREADY", "the pod's end to be seen")
                else:
                    self.assertRegex(result.err, SHIM_LOST)
                self.remove_all()

    def test_while_a_container_starts(self):
        path = os.path.join(self.folder, "disk")
        with open(path, "wb") as file:
            file.truncate(1 << 20)
        disk = {"container_path": "/dev/disk", "host_path": self.loop_device(path), "permissions": "rwm"}
        for name, reached in POINTS_OF_A_CONTAINER.items():
            with self.subTest(point=name), self.nothing_left():
                pod = self.pod()
                container = pod.create(devices=[disk], linux={"resources": LARGE})
                (shim,) = shims()

                def find(shim=shim, container=container):
                    return shim, f"{TASKS}/{container.id}"

                with concurrent.futures.ThreadPoolExecutor(1) as background:
                    starting = background.submit(self.crictl, "start", container.id)
                    self.kill(find, reached)
                    result = starting.result()
                if result.code == 0:
                    container.wait_for_exit()
                else:
                    self.assertRegex(result.err, SHIM_LOST)
                self.remove_all()

    def test_while_a_container_gets_more(self):
        with self.nothing_left():
            container = self.pod().start()
            (shim,) = shims()
            with concurrent.futures.ThreadPoolExecutor(1) as background:
                updating = background.submit(
                    self.crictl, "update", "--memory", LARGE["memory_limit_in_bytes"], "--cpu-period", LARGE["cpu_period"],
                    "--cpu-quota", LARGE["cpu_quota"], container.id)
                self.kill(lambda: (shim, None), has_another_processor)
                result = updating.result()
            # It may have been told of the processor before the shim was killed.
            if result.code:
                self.assertRegex(result.err, SHIM_LOST)
            # Until containerd has seen it, it refuses to remove the container.
            container.wait_for_exit()
            self.remove_all()
