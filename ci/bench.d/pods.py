"""Pods made by crictl, as a kubelet makes them, for the programs that measure them."""

import json
import os
import uuid

from machine import IMAGE, run


def crictl(*arguments):
    """What crictl says, which must succeed."""
    return run("crictl", *arguments)


class Pod:
    """A pod with one container at most, from `with` to its end; its files are in `folder`."""

    def __init__(self, runtime, name, folder, annotations=None, host_network=False):
        self.runtime, self.name, self.folder = runtime, name, folder
        # Numbers of CRI: 2 is the node's.
        namespaces = {"security_context": {"namespace_options": {"network": 2}}} if host_network else {}
        self.config = self.write("pod", {
            "metadata": {"name": name, "namespace": "bench", "uid": str(uuid.uuid4())},
            "annotations": annotations or {},
            "log_directory": folder,
            "linux": namespaces,
        })

    def write(self, kind, what):
        """A file for crictl."""
        path = os.path.join(self.folder, f"{self.name}-{kind}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(what, file)
        return path

    def __enter__(self):
        self.id = crictl("runp", "--runtime", self.runtime, self.config)
        return self

    def __exit__(self, *_):
        crictl("rmp", "-f", self.id)

    def start(self, *command, image=IMAGE):
        """Starts the container. What it says is in `log`."""
        config = self.write("container", {
            "metadata": {"name": "only"},
            "image": {"image": image},
            "command": command,
            "log_path": os.path.basename(self.log),
        })
        self.container = crictl("create", self.id, config, self.config)
        crictl("start", self.container)

    def exec(self, *command):
        """What a command in the container says, which must succeed."""
        return crictl("exec", self.container, *command)

    @property
    def log(self):
        """The path of the container's log."""
        return os.path.join(self.folder, f"{self.name}.log")

    @property
    def status(self):
        """`crictl inspectp`."""
        return json.loads(crictl("inspectp", self.id))
