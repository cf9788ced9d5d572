"""Root file systems that containerd hands over as mounts other than the overlay of every other test."""

import contextlib
import os
import stat
import subprocess
import tempfile

import api
from harness import Case, enable_blockfile, enable_erofs, flushes, since


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


class Layers(Case):
    """Root file systems that are EROFS images on top of each other."""

    @since(2, 1, "has no snapshotter that makes EROFS images")
    def test_layers_of_a_snapshotter(self):
        enable_erofs()
        options = ["--snapshotter", "erofs"]
        # Where containerd mounts a layer when it is asked for first, it stays.
        self.output_of("true", options=options, runtime="runc")
        self.enterContext(self.nothing_left())
        task = self.start(options=options)
        task.exec("sh", "-c", "echo kept >/new && rm -r /etc && mkdir /etc && touch /etc/only && rm /bin/vi", code=0)
        if self.runtime == "husk":
            mounts = task.exec("sh", "-c", "awk '$2 == \"/\" {print $3}' /proc/mounts; ls /sys/block", code=0).out.split()
            self.assertEqual(mounts, ["overlay", "vda", "vdb"], "a layer, and what is written")
        # The container stays, and so does what it has written.
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        task.ctr("start", "--detach", code=0)
        self.assertEqual(task.exec("cat", "/new", code=0).out, "kept")
        self.assertEqual(task.exec("ls", "/etc", code=0).out, "only")
        self.assertEqual(task.exec("ls", "/bin/vi", code=1).out, "")

    def layers(self, *contents):
        """The options of an overlay of EROFS images, the topmost first, each of a folder that a function fills, as containerd's
        snapshotter has them."""
        scratch = os.path.join(self.folder, "scratch")
        os.mkdir(scratch)
        # The machine's own root is an overlay, which is no layer of another.
        self.command("mount", "-t", "tmpfs", "tmpfs", scratch, code=0)
        self.addCleanup(subprocess.run, ["umount", scratch], check=True)
        lower = []
        for number, fill in enumerate(contents):
            layer = os.path.join(self.folder, str(number))
            os.makedirs(f"{layer}/fs")
            content = os.path.join(scratch, str(number))
            os.mkdir(content)
            fill(content)
            self.command("mkfs.erofs", f"{layer}/layer.erofs", content, code=0)
            self.command("mount", "-t", "erofs", "-o", "loop,ro", f"{layer}/layer.erofs", f"{layer}/fs", code=0)
            self.addCleanup(subprocess.run, ["umount", f"{layer}/fs"], check=True)
            lower.append(f"{layer}/fs")
        self.upper = f"{scratch}/top/fs"
        work = f"{scratch}/top/work"
        for folder in self.upper, work:
            os.makedirs(folder)
        return [f"lowerdir={':'.join(lower)}", f"upperdir={self.upper}", f"workdir={work}"]

    def base(self, folder):
        """The image's files, and some that other layers change."""
        self.command("cp", "-a", f"{self.rootfs()}/.", folder, code=0)
        os.makedirs(f"{folder}/data/old")
        for name in "a", "b":
            with open(f"{folder}/{name}", "w", encoding="ascii") as file:
                file.write("below\n")

    def changes(self, folder):
        """One file changed, one removed, and a folder made anew."""
        with open(f"{folder}/a", "w", encoding="ascii") as file:
            file.write("above\n")
        os.mknod(f"{folder}/b", stat.S_IFCHR, 0)
        os.makedirs(f"{folder}/data/new")
        os.setxattr(f"{folder}/data", "trusted.overlay.opaque", b"y")

    LOOK = ["sh", "-c", "cat /a; ls /b /data; echo w >/w && sync && cat /w; ls /sys/block | wc -l"]

    def test_layers_on_top_of_each_other(self):
        task, created = self.create_task([api.mount("overlay", "overlay", *self.layers(self.changes, self.base))])
        self.assertEqual(created.code, "OK", created)
        self.assertEqual(api.call("Start", task.name).code, "OK")
        said = task.exec(*self.LOOK, code=0)
        self.assertEqual(said.out.split()[:4], ["above", "/data:", "new", "w"])
        self.assertIn("/b: No such file or directory", said.err)
        if self.runtime == "husk":
            self.assertEqual(said.out.split()[4], "3", "two layers, and what is written")
            kept = os.stat(f"{self.upper}/.husk.ext4")
            self.assertLess(kept.st_blocks * 512, 64 << 20, f"of {kept.st_size}")

    def test_more_layers_than_a_vm_has_slots(self):
        def one(folder):
            with open(f"{folder}/a", "w", encoding="ascii") as file:
                file.write("one of many\n")

        task, created = self.create_task([api.mount("overlay", "overlay", *self.layers(*[one] * 17, self.base))])
        self.assertEqual(created.code, "OK", created)
        self.assertEqual(api.call("Start", task.name).code, "OK")
        self.assertEqual(task.exec("cat", "/a", code=0).out, "one of many")
        if self.runtime == "husk":
            self.assertEqual(task.exec("ls", "/sys/block", code=0).out, "", "they are shared")

    def test_layers_that_were_written_to_on_the_host(self):
        options = self.layers(self.changes, self.base)
        with open(f"{self.upper}/a", "w", encoding="ascii") as file:
            file.write("by the host\n")
        task, created = self.create_task([api.mount("overlay", "overlay", *options)])
        self.assertEqual(created.code, "OK", created)
        self.assertEqual(api.call("Start", task.name).code, "OK")
        self.assertEqual(task.exec("cat", "/a", code=0).out, "by the host")
