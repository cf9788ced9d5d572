"""What the tests of pods share: `crictl`, which asks containerd for what a kubelet asks for.

They need a containerd that serves CRI (`ci/node --cri`), and `run --pods` picks them.
"""

import json
import os
import subprocess
import uuid

from harness import IMAGE, Case, wait_until

# Where there is CRI, crictl is told of it here.
CONFIG = "/etc/crictl.yaml"
# containerd's runtime handler of the pods, if it is not the one of the runtime's name (`run --handler`).
HANDLER = None


class Container:
    """A container of a pod."""

    def __init__(self, pod, ident):
        self.pod, self.case, self.id = pod, pod.case, ident

    def exec(self, *command, **kwargs):
        """`crictl exec`, without a terminal."""
        return self.case.crictl("exec", self.id, *command, **kwargs)

    def output_of(self, *command):
        """What a command in it says that must succeed."""
        return self.exec(*command, code=0).out

    def start(self):
        """`crictl start`."""
        self.case.crictl("start", self.id, code=0)

    @property
    def logs(self):
        """What it wrote to its log."""
        result = self.case.crictl("logs", self.id, code=0)
        return result.out + result.err

    @property
    def status(self):
        """`status` of `crictl inspect`: state, exitCode, reason and so on."""
        return json.loads(self.case.crictl("inspect", self.id, code=0).out)["status"]

    def wait_for_exit(self):
        """Waits until it has ended; returns its status."""
        def exited():
            status = self.status
            return status["state"] == "CONTAINER_EXITED" and status

        return wait_until(exited, f"container {self.id} to end")


class Pod:
    """A pod's sandbox."""

    def __init__(self, case, ident, config):
        self.case, self.id, self.config = case, ident, config
        self.containers = 0

    def create(self, *command, image=IMAGE, **config):
        """`crictl create`. `config` is merged into what CRI calls the container's configuration."""
        self.containers += 1
        name = f"c{self.containers}"
        wanted = {
            "metadata": {"name": name},
            "image": {"image": image},
            "command": list(command or ("sleep", "100000")),
            "log_path": f"{name}.log",
            "linux": {},
            **config,
        }
        path = self.case.write_json(wanted)
        return Container(self, self.case.crictl("create", self.id, path, self.config, code=0).out)

    def start(self, *command, **config):
        """`crictl create` and `crictl start`."""
        container = self.create(*command, **config)
        container.start()
        return container

    def inspect(self):
        """What `crictl inspectp` says."""
        return json.loads(self.case.crictl("inspectp", self.id, code=0).out)

    @property
    def status(self):
        """Its `status`: state, network and so on."""
        return self.inspect()["status"]

    @property
    def pid(self):
        """The process that the host has for it, with husk the VM's."""
        return self.inspect()["info"]["pid"]

    @property
    def addresses(self):
        """Its IPv4 and its IPv6 address."""
        network = self.status["network"]
        return [network["ip"], *(more["ip"] for more in network["additionalIps"])]

    def remove(self, **kwargs):
        """`crictl rmp -f`."""
        return self.case.crictl("rmp", "-f", self.id, **kwargs)


class PodCase(Case):
    """A test with a containerd at hand that serves CRI."""

    def setUp(self):
        super().setUp()
        self.uid = str(uuid.uuid4())
        self.pull(IMAGE)

    def crictl(self, *args, **kwargs):
        """Runs crictl."""
        return self.command("crictl", *args, **kwargs)

    def pull(self, image):
        """Has an image at hand."""
        if image not in self.crictl("images", "--output", "json", image, code=0).out:
            self.crictl("pull", image, code=0)

    def write_json(self, what):
        """A new file with it."""
        path = os.path.join(self.folder, f"{uuid.uuid4()}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(what, file)
        return path

    def kubelets(self, *names):
        """Where kubelet would have something of the pods of this test, all of which have the same uid."""
        return os.path.join(self.folder, self.uid, *names)

    def empty_dir(self, name):
        """A new folder where kubelet would have an emptyDir."""
        folder = self.kubelets("volumes", "kubernetes.io~empty-dir", name)
        os.makedirs(folder)
        return folder

    def direct_volume(self, device, *options):
        """A new folder where kubelet would have a PersistentVolume, whose disk a CSI driver has left to the guest."""
        folder = self.kubelets("volumes", "kubernetes.io~csi", "pv", "mount")
        os.makedirs(folder)
        self.command("husk", "volume", "add", folder, "--device", device, *options, code=0)
        self.addCleanup(self.command, "husk", "volume", "remove", folder, code=0)
        return folder

    def try_pod(self, **config):
        """`crictl runp`, which may fail: the result. `config` is merged into what CRI calls the pod's configuration."""
        name = self.name().replace("_", "-")
        wanted = {
            "metadata": {"name": name, "namespace": "e2e", "uid": self.uid},
            "log_directory": self.folder,
            "linux": {},
            **config,
        }
        path = self.write_json(wanted)
        return self.crictl("runp", "--runtime", HANDLER or self.runtime, path), path

    def configure(self, text):
        """Adds to husk's configuration, until the test is over."""
        with open("/etc/husk/husk.toml", "r+", encoding="ascii") as file:
            before = file.read()
            file.write(text)

        def restore():
            with open("/etc/husk/husk.toml", "w", encoding="ascii") as file:
                file.write(before)

        self.addCleanup(restore)

    def pod(self, **config):
        """A pod that runs, until the test is over."""
        result, path = self.try_pod(**config)
        self.assertEqual(result.code, 0, result.err)
        pod = Pod(self, result.out, path)
        self.addCleanup(subprocess.run, ["crictl", "rmp", "-f", pod.id], capture_output=True, check=False)
        return pod
