"""The installer's image, on a node that is a folder."""

import os
import subprocess
import unittest

import harness
from harness import Case

# As ci/installer-image names it; the build step of ci/test has made it.
ARCHIVE = f"{os.environ.get('CARGO_TARGET_DIR', harness.ROOT + '/target')}/husk-installer.tar"


@unittest.skipIf(harness.RUNTIME != "husk", "concerns no runtime but husk")
class InstallTest(Case):
    def setUp(self):
        super().setUp()
        self.node = os.path.join(self.folder, "node")
        self.config = os.path.join(self.node, "etc/containerd/config.toml")
        os.makedirs(os.path.dirname(self.config))
        with open(self.config, "w", encoding="utf-8") as file:
            file.write("version = 2\n# The site's own.\n")
        self.restarts = os.path.join(self.folder, "restarts")
        # The node of the tests has no systemd: this stands for it, and only keeps what it was asked for.
        systemctl = "/usr/local/bin/systemctl"
        with open(systemctl, "w", encoding="utf-8") as file:
            file.write(f"#!/bin/sh\necho \"$@\" >>{self.restarts}\n")
        os.chmod(systemctl, 0o755)
        self.addCleanup(os.remove, systemctl)
        # It is unpacked when it is run.
        self.ctr("images", "import", "--no-unpack", ARCHIVE, code=0)
        names = self.ctr("images", "ls", "-q", code=0).out.splitlines()
        self.image = next(name for name in names if name.startswith("husk-installer:"))
        self.addCleanup(self.ctr, "images", "rm", self.image)

    def husk_node(self, verb):
        """Runs the image as the DaemonSet does: privileged, the node's root at /node, the node's processes in sight."""
        return self.run_container(
            "husk-node", verb, runtime="runc", image=(self.image,), code=0,
            # Which has room for it whatever the tests' snapshotter is.
            options=["--snapshotter", "overlayfs", "--privileged", "--with-ns", "pid:/proc/1/ns/pid",
                     "--mount", f"type=bind,src={self.node},dst=/node,options=rbind:rw"])

    def files(self):
        """Every file of the node."""
        return sorted(os.path.join(at, name).removeprefix(self.node)
                      for at, _, names in os.walk(self.node) for name in names)

    def restart_requests(self):
        """What systemctl was asked for."""
        try:
            with open(self.restarts, encoding="utf-8") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []

    def test_a_node_gets_husk_and_loses_it_again(self):
        before = self.files()
        self.husk_node("install")
        self.assertEqual(sorted(set(self.files()) - set(before)), [
            "/usr/local/bin/containerd-shim-husk-v2", "/usr/local/bin/husk",
            "/usr/share/husk/initramfs.cpio", "/usr/share/husk/vmlinux"])
        self.assertEqual(self.restart_requests(), ["restart containerd"])
        # containerd itself says that it understands what was written.
        dump = subprocess.run(["containerd", "--config", self.config, "config", "dump"],
                              capture_output=True, text=True, check=True).stdout
        self.assertIn("io.containerd.husk.v2", dump)
        # Beside the default, which up to 1.7 the first table of a runtime replaces.
        self.assertRegex(dump, r"runtimes\.runc\]")
        # Nothing changes any more, so nothing is restarted.
        self.husk_node("install")
        self.assertEqual(self.restart_requests(), ["restart containerd"])
        self.husk_node("uninstall")
        self.assertEqual(self.files(), before)
        self.assertEqual(self.restart_requests(), ["restart containerd"] * 2)
        with open(self.config, encoding="utf-8") as file:
            self.assertEqual(file.read(), "version = 2\n# The site's own.\n")
