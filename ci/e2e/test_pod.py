"""What the containers of a pod have in common, and what they do not: namespaces, volumes, the VM's size."""

import os
import signal
import socket
import subprocess

from cri import PodCase
from harness import wait_until

MIB = 1 << 20

# CRI's NamespaceMode and MountPropagation.
OWN, OF_NODE = 1, 2
HOST_TO_CONTAINER, BIDIRECTIONAL = 1, 2


class Pods(PodCase):
    def refused(self, container, *words):
        """Starting a container, which must fail in these words."""
        result = self.crictl("start", container.id)
        self.assertNotEqual(result.code, 0)
        for word in words:
            self.assertIn(word, result.err)

    def in_memory(self, name, options):
        """The folder of an emptyDir volume in memory, as kubelet makes it."""
        folder = self.empty_dir(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        self.addCleanup(subprocess.run, ["umount", folder], check=True)
        return folder

    def test_host_name_and_ipc_are_the_pods(self):
        pod = self.pod(hostname="the-pod", linux={"sysctls": {"kernel.shm_rmid_forced": "1"}})
        first, second = pod.start(), pod.start()
        for container in (first, second):
            self.assertEqual(container.output_of("hostname"), "the-pod")
            self.assertEqual(container.output_of("cat", "/etc/hostname"), "the-pod")
            self.assertEqual(container.output_of("cat", "/proc/sys/kernel/shm_rmid_forced"), "1")
        for name in ("ipc", "uts", "net"):
            inode = first.output_of("readlink", f"/proc/self/ns/{name}")
            self.assertEqual(second.output_of("readlink", f"/proc/self/ns/{name}"), inode)

    def test_processes_are_the_pods_or_a_containers(self):
        pod = self.pod()
        first, second = pod.start("sleep", "4321"), pod.start()
        self.assertIn("sleep 4321", second.output_of("ps"))
        self.assertEqual(second.output_of("cat", "/proc/1/comm"), "pause")
        # An orphan of a container is the pause's child, which must not leave it a zombie.
        first.exec("sh", "-c", "(sleep 0.1 &)", code=0)
        wait_until(lambda: "sleep 0.1" not in second.output_of("ps") and "[sleep]" not in second.output_of("ps"),
                   "the orphan to be reaped")
        context = {"security_context": {"namespace_options": {"pid": OWN}}}
        alone = pod.start("sleep", "1234", linux=context)
        self.assertNotIn("sleep 4321", alone.output_of("ps"))
        self.assertEqual(alone.output_of("cat", "/proc/1/comm"), "sleep")

    def test_pod_lives_on_when_its_containers_have_ended(self):
        pod = self.pod()
        boot = "/proc/sys/kernel/random/boot_id"
        first = pod.start("cat", boot)
        first.wait_for_exit()
        guest = first.logs
        self.crictl("rm", first.id, code=0)
        second = pod.start()
        self.assertIn(second.output_of("cat", boot), guest)
        self.assertEqual(pod.status["state"], "SANDBOX_READY")
        self.crictl("stopp", pod.id, code=0)
        self.assertEqual(pod.status["state"], "SANDBOX_NOTREADY")
        pod.remove(code=0)

    def test_shm_is_the_pods(self):
        pod = self.pod()
        first, second = pod.start(), pod.start()
        first.exec("sh", "-c", "echo shared >/dev/shm/file", code=0)
        self.assertEqual(second.output_of("cat", "/dev/shm/file"), "shared")
        self.assertEqual(second.output_of("sh", "-c", "df -m /dev/shm | awk 'NR == 2 { print $1, $2 }'"), "tmpfs 64")

    def test_volume_in_memory_is_the_guests(self):
        folder = self.in_memory("cache", "size=2m,mode=2775,gid=2000")
        mounts = [{"host_path": folder, "container_path": "/cache"}]
        pod = self.pod()
        first, second = pod.start(mounts=mounts), pod.start(mounts=mounts)
        self.assertEqual(first.output_of("stat", "-c", "%a %g", "/cache"), "2775 2000")
        first.exec("sh", "-c", "echo in the guest >/cache/file", code=0)
        self.assertEqual(second.output_of("cat", "/cache/file"), "in the guest")
        self.assertNotEqual(first.exec("dd", "if=/dev/zero", "of=/cache/big", "bs=1M", "count=3").code, 0)
        first.exec("rm", "/cache/big", code=0)
        if self.runtime == "husk":
            self.assertEqual(os.listdir(folder), [])
        # A folder of it (`subPath`), which kubelet makes and mounts elsewhere.
        sub = os.path.join(folder, "sub")
        elsewhere = os.path.join(self.folder, "elsewhere")
        for path in (sub, elsewhere):
            os.mkdir(path)
        subprocess.run(["mount", "--bind", sub, elsewhere], check=True)
        self.addCleanup(subprocess.run, ["umount", elsewhere], check=True)
        third = pod.start(mounts=[{"host_path": elsewhere, "container_path": "/sub"}])
        third.exec("sh", "-c", "echo below >/sub/file", code=0)
        self.assertEqual(first.output_of("cat", "/cache/sub/file"), "below")

    def test_empty_dir_that_is_a_disk(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        self.configure('[storage]\nempty_dir_disk_mib = 1024\n[annotations]\nallow = ["storage.empty_dir_disk_mib"]\n')
        volume = self.empty_dir("data")
        elsewhere = self.kubelets("volume-subpaths", "data", "c", "0")
        for folder in os.path.join(volume, "sub"), elsewhere:
            os.makedirs(folder)
        subprocess.run(["mount", "--bind", os.path.join(volume, "sub"), elsewhere], check=True)
        self.addCleanup(subprocess.run, ["umount", elsewhere], check=True)
        os.chmod(volume, 0o2777)
        os.chown(volume, 0, 2000)
        mounts = [{"host_path": volume, "container_path": "/data"}]
        pod = self.pod(annotations={"io.husk.storage.empty_dir_disk_mib": "32"})
        first = pod.start(mounts=mounts)
        second = pod.start(mounts=[*mounts, {"host_path": elsewhere, "container_path": "/sub"}])
        self.assertEqual(first.output_of("stat", "-c", "%a %u %g", "/data"), "2777 0 2000")
        self.assertEqual(first.output_of("sh", "-c", "ls /data; awk '$2 == \"/data\" {print $3}' /proc/mounts"), "sub\next4")
        first.exec("sh", "-c", "echo common >/data/sub/file", code=0)
        self.assertEqual(second.output_of("cat", "/sub/file", "/data/sub/file"), "common\ncommon")
        # There is an end to it, and what is removed is free on the host, too.
        full = first.exec("dd", "if=/dev/urandom", "of=/data/big", "bs=1M", "count=40", "conv=fsync")
        self.assertIn("No space left on device", full.err)
        image = os.path.join(volume, ".husk.ext4")

        def taken():
            return os.stat(image).st_blocks * 512

        self.assertEqual(os.stat(image).st_size, 32 * MIB)
        self.assertGreater(taken(), 16 * MIB)
        first.exec("sh", "-c", "rm /data/big; sync", code=0)
        wait_until(lambda: taken() < 8 * MIB, "the host to have its blocks back")
        # A sandbox that is made anew for the pod has the same volume, whatever the size would be now.
        pod.remove(code=0)
        self.assertEqual(sorted(os.listdir(volume)), [".husk.ext4", "sub"])
        again = self.pod().start(mounts=mounts)
        self.assertEqual(again.output_of("cat", "/data/sub/file"), "common")
        # What the host has put there is not hidden.
        other = self.empty_dir("other")
        with open(os.path.join(other, "file"), "w", encoding="ascii") as file:
            file.write("of the host\n")
        shared = self.pod().start(mounts=[{"host_path": other, "container_path": "/data"}])
        self.assertEqual(shared.output_of("cat", "/data/file"), "of the host")

    def test_empty_dir_that_is_a_disk_keeps_what_was_synced(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        self.configure("[storage]\nempty_dir_disk_mib = 64\n")
        mounts = [{"host_path": self.empty_dir("data"), "container_path": "/data"}]
        pod = self.pod()
        first = pod.start(mounts=mounts)
        written = first.output_of("sh", "-c", "dd if=/dev/urandom of=/data/file bs=1M count=4 conv=fsync 2>&-; sha256sum /data/file")
        os.kill(pod.pid, signal.SIGKILL)
        first.wait_for_exit()
        again = self.pod().start(mounts=mounts)
        self.assertEqual(again.output_of("sha256sum", "/data/file"), written)

    def test_empty_dir_that_is_a_disk_on_a_full_one(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        self.configure("[storage]\nempty_dir_disk_mib = 256\n")
        volume = self.empty_dir("data")
        self.mount_disk(os.path.dirname(volume), "32M")
        os.mkdir(volume)
        pod = self.pod()
        container = pod.start(mounts=[{"host_path": volume, "container_path": "/data"}])
        container.exec("sh", "-c", "echo early >/data/early; sync", code=0)
        full = container.exec("dd", "if=/dev/urandom", "of=/data/file", "bs=1M", "count=64", "conv=fsync")
        self.assertIn("Input/output error", full.err)
        # It is only the volume that fails.
        self.assertEqual(container.output_of("cat", "/data/early"), "early")
        container.exec("sh", "-c", "echo fine >/root/file; sync /root/file", code=0)
        pod.remove(code=0)

    def test_volume_that_the_guest_mounts(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        content = os.path.join(self.folder, "content")
        os.mkdir(content)
        with open(os.path.join(content, "file"), "w", encoding="ascii") as file:
            file.write("of the volume\n")
        os.chmod(file.name, 0o600)
        image = os.path.join(self.folder, "image")
        self.command("mkfs.ext4", "-q", "-d", content, image, "32M", code=0)
        device = self.loop_device(image)
        volume = self.direct_volume(device, "-o", "noatime", "--fs-group", "2000")
        elsewhere = self.kubelets("volume-subpaths", "pv", "c", "0")
        for folder in os.path.join(volume, "sub"), elsewhere:
            os.makedirs(folder)
        subprocess.run(["mount", "--bind", os.path.join(volume, "sub"), elsewhere], check=True)
        self.addCleanup(subprocess.run, ["umount", elsewhere], check=True)
        mounts = [{"host_path": volume, "container_path": "/data"}]
        pod = self.pod()
        first = pod.start(mounts=mounts)
        second = pod.start(mounts=[{**mounts[0], "readonly": True}, {"host_path": elsewhere, "container_path": "/sub"}])
        self.assertRegex(first.output_of("grep", " /data ", "/proc/mounts"), r"^/dev/vd\w+ /data ext4 rw,noatime")
        self.assertEqual(first.output_of("cat", "/data/file"), "of the volume")
        self.assertEqual(first.output_of("stat", "-c", "%a %u %g", "/data", "/data/file"), "2775 0 2000\n660 0 2000")
        first.exec("sh", "-c", "mkdir -p /data/sub; echo common >/data/sub/file", code=0)
        self.assertEqual(second.output_of("cat", "/sub/file", "/data/sub/file"), "common\ncommon")
        self.assertIn("Read-only file system", second.exec("touch", "/data/x").err)
        second.exec("sh", "-c", "echo more >>/sub/file", code=0)
        # Nobody else has it meanwhile: not the host, not another pod that is to have it, nor one that is led there.
        self.assertNotEqual(self.command("mount", device, volume).code, 0)
        self.assertEqual(sorted(os.listdir(volume)), ["sub"])
        refused = self.pod().create(mounts=mounts)
        result = self.crictl("start", refused.id)
        self.assertIn(f"cannot open the disk of a volume, {device}: the host has mounted it, or it is in use", result.err)
        uid, self.uid = self.uid, "other"
        other = self.pod().start(mounts=mounts)
        self.assertEqual(other.output_of("ls", "/data"), "sub")
        self.uid = uid
        # A container that is started again finds it as the last one has left it.
        first.exec("chmod", "600", "/data/sub/file", code=0)
        for container in first, second:
            self.crictl("rm", "-f", container.id, code=0)
        third = pod.start(mounts=[*mounts, {"host_path": elsewhere, "container_path": "/sub"}])
        self.assertEqual(third.output_of("sh", "-c", "stat -c %a /sub/file; ls /data"), "600\nfile\nlost+found\nsub")
        third.exec("sh", "-c", "dd if=/dev/urandom of=/data/big bs=1M count=4 2>&-", code=0)
        # When the pod has ended, so has that: there is nothing to be recovered.
        self.crictl("stopp", pod.id, code=0)
        self.assertNotIn("needs_recovery", self.command("dumpe2fs", "-h", device, code=0).out)
        wait_until(lambda: self.command("mount", device, volume).code == 0, "the disk to be free")
        with open(os.path.join(volume, "sub", "file"), encoding="ascii") as file:
            self.assertEqual(file.read(), "common\nmore\n")
        self.assertEqual(os.stat(os.path.join(volume, "big")).st_size, 4 * MIB)
        subprocess.run(["umount", volume], check=True)
        again = self.pod().start(mounts=mounts)
        self.assertEqual(again.output_of("cat", "/data/sub/file"), "common\nmore")
        # Nothing is in kubelet's way.
        self.command("husk", "volume", "remove", volume, code=0)
        os.rmdir(volume)

    def test_volume_that_the_guest_cannot_mount(self):
        if self.runtime != "husk":
            self.skipTest("it is husk's")
        image = os.path.join(self.folder, "image")
        with open(image, "wb") as file:
            file.truncate(32 * MIB)
        volume = self.direct_volume(image)
        mounts = [{"host_path": volume, "container_path": "/data"}]
        pod = self.pod()
        result = self.crictl("start", pod.create(mounts=mounts).id)
        self.assertIn(f"mounting {image}, the disk of a volume, as ext4 (rw) failed: Invalid argument", result.err)
        self.command("husk", "volume", "add", volume, "--device", image, "-o", "offset=512", code=0)
        result = self.crictl("start", pod.create(mounts=mounts).id)
        self.assertIn("is a volume that the guest cannot mount, as ext4 with the options \\\"offset=512\\\"", result.err)
        result = self.command("husk", "volume", "add", volume, "--device", image, "--fstype", "btrfs")
        self.assertIn("possible values: ext4, xfs", result.err)
        # The pod goes on, and so does the volume once it is one.
        self.command("mkfs.ext4", "-q", image, code=0)
        self.command("husk", "volume", "add", volume, "--device", image, "-o", "nodev,x-mount", code=0)
        container = pod.start(mounts=mounts)
        self.assertRegex(container.output_of("grep", " /data ", "/proc/mounts"), "ext4 rw,nodev")

    def test_unix_socket_on_a_volume_connects_containers(self):
        folder = self.empty_dir("disk")
        mounts = [{"host_path": folder, "container_path": "/shared"}]
        pod = self.pod()
        link = "ln -s /shared/socket /dev/log; "
        pod.start("sh", "-c", f"{link} exec syslogd -n -O /shared/messages", mounts=mounts)
        client = pod.start("sh", "-c", f"{link} exec sleep 100000", mounts=mounts)
        wait_until(lambda: os.path.exists(os.path.join(folder, "socket")), "the socket")
        client.exec("logger", "through the socket", code=0)
        wait_until(lambda: "through the socket" in client.exec("cat", "/shared/messages").out, "the message")

    def test_mount_of_the_host_appears_if_asked_for(self):
        folder = os.path.join(self.folder, "host")
        os.makedirs(os.path.join(folder, "below"))
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        self.addCleanup(subprocess.run, ["umount", "-R", folder], check=True)
        subprocess.run(["mount", "--make-rshared", folder], check=True)
        mount = {"host_path": folder, "container_path": "/host", "propagation": HOST_TO_CONTAINER}
        container = self.pod().start(mounts=[mount])
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", os.path.join(folder, "below")], check=True)
        with open(os.path.join(folder, "below", "file"), "w", encoding="ascii") as file:
            file.write("late\n")
        wait_until(lambda: container.exec("cat", "/host/below/file").out == "late", "the host's mount")

    def test_device_that_hides_a_file(self):
        mounts = [{"host_path": "/dev/null", "container_path": "/etc/group"}]
        container = self.pod().start(mounts=mounts)
        self.assertEqual(container.output_of("cat", "/etc/group"), "")

    def test_privileged_means_root_in_the_guest(self):
        context = {"privileged": True}
        pod = self.pod(linux={"security_context": context})
        container = pod.start(linux={"security_context": context})
        self.assertRegex(container.output_of("grep", "CapEff", "/proc/self/status"), "[0-9a-f]*1ffffffffff")
        container.exec("mount", "-t", "tmpfs", "tmpfs", "/tmp", code=0)
        if self.runtime == "husk":
            # Only what a guest has. The node's own disks and terminals are not among it.
            self.assertNotIn("kvm", container.output_of("ls", "/dev").split())

    def test_what_a_vm_cannot_do_is_refused_in_words(self):
        if self.runtime != "husk":
            self.skipTest("runc can")
        for field, word in (("pid", "hostPID"), ("ipc", "hostIPC")):
            context = {"namespace_options": {field: OF_NODE}}
            result, _ = self.try_pod(linux={"security_context": context})
            self.assertNotEqual(result.code, 0)
            self.assertIn(word, result.err)
        pod = self.pod()
        path = os.path.join(self.folder, "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            mounts = [{"host_path": path, "container_path": "/socket"}]
            self.refused(pod.create(mounts=mounts), path, "unix socket")
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        self.addCleanup(subprocess.run, ["umount", self.folder], check=True)
        subprocess.run(["mount", "--make-rshared", self.folder], check=True)
        mounts = [{"host_path": self.folder, "container_path": "/x", "propagation": BIDIRECTIONAL}]
        self.refused(pod.create(mounts=mounts), "Bidirectional")

    def test_vm_is_as_large_as_the_pods_limits(self):
        if self.runtime != "husk":
            self.skipTest("there is no VM")
        limits = {"cpu_period": 100000, "cpu_quota": 150000, "memory_limit_in_bytes": 1024 * MIB}
        container = self.pod(linux={"resources": limits}).start()
        self.assertEqual(container.output_of("nproc"), "2")
        total = int(container.output_of("awk", "/MemTotal/ { print $2 }", "/proc/meminfo"))
        self.assertGreater(total, 1024 * 1024)
