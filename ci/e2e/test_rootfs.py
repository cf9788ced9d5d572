"""Root file systems that containerd hands over as mounts other than the overlay of every other test."""

import contextlib
import os
import subprocess

import api
from harness import Case


class Rootfs(Case):
    def setUp(self):
        self.enterContext(self.nothing_left())
        super().setUp()

    def image(self, fill):
        """A block device of the machine."""
        path = os.path.join(self.folder, "image")
        with open(path, "wb") as file:
            file.truncate(64 << 20)
        fill(path)
        device = self.command("losetup", "--find", "--show", path, code=0).out
        self.addCleanup(subprocess.run, ["losetup", "--detach", device], check=True)
        return device

    def ext4(self):
        """A block device with the image's files."""
        return self.image(lambda path: self.command("mkfs.ext4", "-q", "-d", self.rootfs(), path, code=0))

    @contextlib.contextmanager
    def mounted(self, device):
        """A device's files, on the host."""
        folder = os.path.join(self.folder, "after")
        os.mkdir(folder)
        self.command("mount", "-o", "ro", device, folder, code=0)
        try:
            yield folder
        finally:
            self.command("umount", folder, code=0)

    def test_a_block_device(self):
        device = self.ext4()
        task, created = self.create_task([api.mount("ext4", device)])
        self.assertEqual(created.code, "OK", created)
        self.assertEqual(api.call("Start", task.name).code, "OK")
        self.assertEqual(task.exec("sh", "-c", "echo written >/mark; cat /mark", code=0).out, "written")
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        with self.mounted(device) as folder, open(f"{folder}/mark", encoding="ascii") as file:
            self.assertEqual(file.read(), "written\n")

    def test_a_block_device_that_is_read_only(self):
        task, created = self.create_task([api.mount("ext4", self.ext4(), "ro")])
        self.assertEqual(created.code, "OK", created)
        self.assertEqual(api.call("Start", task.name).code, "OK")
        self.assertIn("Read-only file system", task.exec("touch", "/mark", code=1).err)

    def test_a_block_device_without_a_file_system(self):
        device = self.image(lambda path: None)
        task, created = self.create_task([api.mount("ext4", device)])
        self.assertEqual(created.code, "UNKNOWN", created)
        if self.runtime == "husk":
            self.assertIn(f": failed to mount rootfs component 0 (ext4 of {device}): invalid argument", created.message)
        self.assertIsNone(task.row)
