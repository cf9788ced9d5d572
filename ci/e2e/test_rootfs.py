"""Root file systems that containerd hands over as mounts other than the overlay of every other test."""

import contextlib
import os
import subprocess
import tempfile

import api
from harness import Case, enable_blockfile, since


def flushes(device):
    """How often a disk was told to make durable what was written to it."""
    with open(f"/sys/block/{os.path.basename(device)}/stat", encoding="ascii") as file:
        return int(file.read().split()[15])


class Rootfs(Case):
    def setUp(self):
        self.enterContext(self.nothing_left())
        super().setUp()

    def image(self, fill):
        """A block device of the machine."""
        descriptor, path = tempfile.mkstemp(dir=self.folder)
        with open(descriptor, "wb") as file:
            file.truncate(64 << 20)
        fill(path)
        return self.loop_device(path)

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
        if self.runtime == "husk":
            # It is the guest's to mount, and the host's no more.
            root = task.exec("awk", '$2 == "/" {print $1, $3}', "/proc/mounts", code=0).out
            self.assertRegex(root, r"^/dev/vd[a-z] ext4$")
            self.assertIn("busy", self.command("mount", device, "/mnt", code=32).err)
            before = flushes(device)
            task.exec("sh", "-c", "for n in 1 2 3 4 5 6 7 8 9 10; do echo $n | dd of=/n$n conv=fsync; done", code=0)
            self.assertGreaterEqual(flushes(device) - before, 10, "each fsync reaches the disk")
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        with self.mounted(device) as folder, open(f"{folder}/mark", encoding="ascii") as file:
            self.assertEqual(file.read(), "written\n")

    @since(1, 7, "has no snapshotter that makes image files")
    def test_an_image_file_of_a_snapshotter(self):
        enable_blockfile()
        # In the VM of the first one, which goes on.
        options = ["--snapshotter", "blockfile", "--annotation", "io.kubernetes.cri.sandbox-id=image"]
        first = self.start(options=options)
        root = self.output_of("sh", "-c", "echo x >/new && awk '$2 == \"/\" {print $1, $3, $4}' /proc/mounts", options=options)
        if self.runtime != "husk":
            self.assertRegex(root, r"^/dev/loop\d+ ext4 rw,")
            return
        self.assertRegex(root, r"^/dev/vdb ext4 rw,")
        self.assertEqual(first.exec("ls", "/sys/block", code=0).out, "vda", "the second one's disk is gone")

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
            self.assertIn("mounting the root file system (ext4) failed: Invalid argument", created.message)
        self.assertIsNone(task.row)

    def test_disks_as_devices(self):
        """What Kubernetes' volumeDevices come to: the container's own rules say what may be done with them."""
        written = self.image(lambda path: None)
        read = self.image(lambda path: self.command("dd", f"of={path}", "conv=notrunc", stdin=b"readable", code=0))

        def edit(spec):
            for path, disk, access in [("/dev/written", written, "rwm"), ("/dev/read", read, "rm")]:
                number = os.stat(disk).st_rdev
                device = {"type": "b", "major": os.major(number), "minor": os.minor(number)}
                spec["linux"].setdefault("devices", []).append({"path": path, "fileMode": 0o660, **device})
                spec["linux"]["resources"]["devices"].append({"allow": True, "access": access, **device})

        result = self.run_spec(
            edit, "sh", "-c", "echo written | dd of=/dev/written bs=8 conv=fsync && dd if=/dev/read bs=8 count=1; "
            "dd if=/dev/zero of=/dev/read bs=512 count=1")
        self.assertEqual((result.code, result.out), (1, "readable"), result.err)
        self.assertIn("Operation not permitted", result.err)
        with open(written, "rb") as file:
            self.assertEqual(file.read(8), b"written\n")
