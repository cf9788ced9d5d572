"""What goes wrong is told in a sentence, with the code that containerd expects, and leaves nothing."""

import contextlib
import os
import shutil
import signal
import struct
import subprocess

import api
from harness import IMAGE, RUNTIMES, Case, Events, children, processes, remove_fifos_of_ctr, wait_until

CONFIG = "/etc/husk/husk.toml"


class Failures(Case):
    """Whatever went wrong, the containers that are still there can be removed, and then nothing is left."""

    def setUp(self):
        self.enterContext(self.nothing_left())
        super().setUp()


class Requests(Failures):
    """What both runtimes refuse."""

    def test_a_name_that_is_taken(self):
        task = self.start()
        result = self.run_container("true", name=task.name)
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "already exists")
        self.assertEqual(task.exec("echo", "unharmed").out, "unharmed")

    def test_an_exec_id_that_is_taken(self):
        task = self.start()
        self.ctr("task", "exec", "-d", "--exec-id", "same", task.name, "sleep", "1000", code=0)
        result = self.ctr("task", "exec", "--exec-id", "same", task.name, "true")
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "already exists")
        # The one ctr that would remove them has detached.
        remove_fifos_of_ctr("same")

    def test_unknown_task_and_exec(self):
        result = self.ctr("task", "kill", "nobody")
        self.assertRegex(result.err, "not found")
        task = self.start()
        result = self.ctr("task", "kill", "--exec-id", "nobody", task.name)
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "not found")

    def test_exec_in_a_stopped_task(self):
        task = self.start()
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        result = task.exec("true")
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "stopped|not running|not found")

    def test_kill_of_a_stopped_task(self):
        task = self.start()
        task.ctr("kill", "-s", "SIGKILL", code=0)
        task.wait_for("STOPPED")
        result = task.ctr("kill")
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "process already finished: not found|not found")

    def test_rm_of_a_running_task(self):
        task = self.start()
        result = task.ctr("rm")
        self.assertEqual(result.code, 1)
        self.assertRegex(result.err, "must be stopped|not stopped|running")
        self.assertEqual(task.row[1], "RUNNING")

    def test_pause_and_resume_in_the_wrong_state(self):
        task = self.start()
        self.assertEqual(task.ctr("resume").code, 1)
        task.ctr("pause", code=0)
        self.assertEqual(task.ctr("pause").code, 1)
        task.ctr("resume", code=0)
        self.assertEqual(task.exec("echo", "fine").out, "fine")

    def test_a_mount_whose_source_is_not_there(self):
        with self.nothing_left():
            result = self.run_container("true", options=["--mount", "type=bind,src=/no/such/folder,dst=/data,options=rbind:rw"])
            self.assertEqual(result.code, 1)
            self.assertRegex(result.err, "/no/such/folder")
            self.assertRegex(result.err, "no such file or directory")

    def test_a_rootfs_that_is_not_there(self):
        with self.nothing_left():
            result = self.run_container("true", options=["--rootfs"], image=("/no/such/rootfs",))
            self.assertEqual(result.code, 1)
            self.assertRegex(result.err, "/no/such/rootfs")

    def test_an_exec_in_a_folder_that_is_not_there(self):
        task = self.start()
        result = task.exec("true", options=["--cwd", "/no/such/folder"])
        # runc makes the folder of the first process, not that of an exec.
        self.assertNotEqual(result.code, 0)
        self.assertRegex(result.err, "no such file or directory")

    def test_a_seccomp_action_that_does_not_exist(self):
        def edit(spec):
            spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_NONSENSE"}

        with self.nothing_left():
            result = self.run_spec(edit, "true")
            self.assertEqual(result.code, 1)
            self.assertIn("SCMP_ACT_NONSENSE", result.err)


class Husk(Failures):
    """What only a runtime with VMs can suffer."""

    def setUp(self):
        super().setUp()
        if self.runtime != "husk":
            self.skipTest("runc has no VM")

    @contextlib.contextmanager
    def moved(self, path):
        """A file that is away for a while."""
        os.rename(path, f"{path}.away")
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.rename(f"{path}.away", path)

    @contextlib.contextmanager
    def configured(self, text):
        """Another husk.toml for a while."""
        with self.moved(CONFIG):
            with open(CONFIG, "w", encoding="utf-8") as file:
                file.write(text)
            yield

    def assertRefused(self, *patterns, options=()):
        """A start that fails, says why, and leaves nothing."""
        with self.nothing_left():
            result = self.run_container("true", options=options)
            self.assertEqual(result.code, 1)
            for pattern in patterns:
                self.assertRegex(result.err, pattern)
            return result

    def assertCode(self, code):
        """A start that fails with this code."""
        with self.nothing_left():
            task, created = self.create_task([api.mount("bind", self.rootfs(), "rbind", "rw")])
            self.assertEqual(created.code, code, created)
            self.remove(task.name)

    def check(self, code, *patterns):
        """`husk check` ends so, and says so."""
        result = self.command("husk", "check", code=code)
        for pattern in patterns:
            self.assertRegex(result.out, pattern)

    def initramfs(self, script):
        """An initramfs whose /init is this shell script."""
        root = os.path.join(self.folder, "initramfs")
        os.makedirs(f"{root}/bin")
        os.makedirs(f"{root}/dev")
        shutil.copy("/bin/busybox", f"{root}/bin/busybox")
        os.symlink("busybox", f"{root}/bin/sh")
        with open(f"{root}/init", "w", encoding="ascii") as file:
            file.write(f"#!/bin/sh\n{script}\n")
        os.chmod(f"{root}/init", 0o755)
        image = os.path.join(self.folder, "initramfs.cpio")
        subprocess.run("find . | cpio --quiet -o -H newc >" + image, shell=True, cwd=root, check=True)
        return image

    def test_no_kvm(self):
        with self.moved("/dev/kvm"):
            self.assertRefused("/dev/kvm")
            self.assertCode("UNKNOWN")
            self.check(1, "FAIL  kvm: .*/dev/kvm", "skip  boot")

    def test_a_kvm_that_is_none(self):
        with self.moved("/dev/kvm"):
            os.mknod("/dev/kvm", 0o666 | 0o020000, os.makedev(1, 3))  # what /dev/null is
            self.assertRefused("/dev/kvm")

    def test_no_kernel(self):
        with self.configured('[vm]\nkernel = "/no/such/vmlinux"\n'):
            self.assertRefused("/no/such/vmlinux", "(?i)no such file")
            self.check(1, "FAIL  kernel: /no/such/vmlinux", "build one with ci/guest", "skip  boot")

    def test_no_initramfs(self):
        with self.configured('[vm]\ninitramfs = "/no/such/initramfs"\n'):
            self.assertRefused("/no/such/initramfs", "(?i)no such file")
            self.check(1, "FAIL  initramfs: /no/such/initramfs", "skip  boot")

    def test_no_shim(self):
        with self.moved(shutil.which("containerd-shim-husk-v2")):
            self.check(1, "FAIL  shim: there is no containerd-shim-husk-v2 on the PATH", "skip  boot")

    def test_all_is_well(self):
        self.check(0, "ok +boot: a guest was ready after [0-9]+ ms", "ok +shim: /.*/containerd-shim-husk-v2, version")

    def test_a_kernel_that_is_none(self):
        with self.configured('[vm]\nkernel = "/etc/passwd"\n'):
            self.assertRefused("/etc/passwd|kernel")

    def test_a_key_that_does_not_exist(self):
        with self.configured('[vm]\n\nvpcus = 2\n'):
            self.assertRefused("/etc/husk/husk.toml:3: vm.vpcus: unknown field")
            self.assertCode("INVALID_ARGUMENT")
            self.check(1, "FAIL  configuration: .*/etc/husk/husk.toml:3: vm.vpcus: unknown field", "skip  boot")

    def test_a_value_of_the_wrong_kind(self):
        with self.configured('[vm]\nmemory_mib = "much"\n'):
            self.assertRefused("/etc/husk/husk.toml:2: vm.memory_mib is \"much\"; allowed is an integer")

    def test_a_file_that_is_no_toml(self):
        with self.configured('[vm]\nvcpus =\n'):
            self.assertRefused("/etc/husk/husk.toml:2: vm.vcpus: ")

    def test_a_configuration_of_ones_own(self):
        path = os.path.join(self.folder, "other.toml")
        with open(path, "w", encoding="ascii") as file:
            file.write('[vm]\nvcpus = 2\nboot_timeout_s = 120\n')
        self.assertEqual(self.output_of("nproc", options=["--runtime-config-path", path]), "2")

    def test_a_configuration_of_ones_own_that_is_not_there(self):
        self.assertRefused("/no/such.toml", options=["--runtime-config-path", "/no/such.toml"])

    def test_a_guest_that_does_not_come_up(self):
        image = self.initramfs('echo "stuck on purpose" >/dev/console; exec /bin/busybox sleep 100000')
        with self.configured(f'[vm]\ninitramfs = "{image}"\nboot_timeout_s = 20\n'):
            self.assertRefused("stuck on purpose", "20 ?s")
            self.assertCode("DEADLINE_EXCEEDED")
            self.check(1, "FAIL  boot: ", "stuck on purpose")

    def test_a_guest_that_panics_at_boot(self):
        image = self.initramfs('echo "giving up on purpose" >/dev/console; exit 1')
        with self.configured(f'[vm]\ninitramfs = "{image}"\nboot_timeout_s = 120\n'):
            self.assertRefused("giving up on purpose", "the VM has ended: the guest's kernel panicked")

    def test_a_guest_that_powers_off_at_boot(self):
        image = self.initramfs('exec /bin/busybox poweroff -f')
        with self.configured(f'[vm]\ninitramfs = "{image}"\nboot_timeout_s = 120\n'):
            self.assertRefused("the VM has ended: the guest powered off")
            self.assertCode("UNAVAILABLE")

    def test_a_vcpu_that_fails(self):
        # A kernel that goes where there is no memory: KVM can run no instruction from there.
        entry, nowhere = 0x1000000, 0x30000000
        code = b"\x48\xc7\xc0" + struct.pack("<I", nowhere) + b"\xff\xe0"  # mov rax, nowhere; jmp rax
        header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
        segment = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, entry, entry, len(code), len(code), 0x1000)
        path = os.path.join(self.folder, "vmlinux")
        with open(path, "wb") as file:
            file.write((header + segment).ljust(0x1000, b"\0") + code)
        with self.configured(f'[vm]\nkernel = "{path}"\n'):
            self.assertRefused("vCPU 0 failed")

    def shim_of(self, task):
        """The shim that stands over a task's worker."""
        worker = task.pid
        return next(pid for pid, line in processes().items()
                    if "containerd-shim-husk-v2" in line and worker in children(pid)), worker

    def test_kill_of_the_worker_ends_the_tasks(self):
        events = Events(self)
        task = self.start()
        self.ctr("task", "exec", "-d", "--exec-id", "extra", task.name, "sleep", "1000", code=0)
        _, worker = self.shim_of(task)
        os.kill(worker, signal.SIGKILL)
        task.wait_for("STOPPED")
        wait_until(lambda: sorted((fields.get("id"), fields.get("exit_status")) for topic, fields in events.of(task.name)
                                  if topic == "/tasks/exit") == sorted([("extra", 137), (task.name, 137)]), "the exits' events")
        self.assertEqual(task.end(), 137)
        # The one ctr that would remove them has detached.
        remove_fifos_of_ctr("extra")

    def test_kill_of_the_shim_leaves_no_worker(self):
        task = self.start()
        shim, worker = self.shim_of(task)
        os.kill(shim, signal.SIGKILL)
        wait_until(lambda: worker not in processes(), "the worker to end", timeout=10)
        wait_until(lambda: (task.row or (0, "STOPPED"))[1] != "RUNNING", "containerd to notice")
        self.remove(task.name)
        # ctr removes them with the task: here it finds none any more.
        remove_fifos_of_ctr(task.name)

    def test_a_guest_that_panics_while_it_runs(self):
        task = self.start("sh", "-c", "echo 2 >/proc/sys/vm/panic_on_oom; while :; do sleep 1; done", options=["--privileged"])
        # Without a limit of its own, the container may ask for more than the guest has, if not all at once.
        task.exec("sh", "-c", "for half in 1 2; do dd if=/dev/zero of=/dev/null bs=400M count=1 & done; wait")
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        self.assertIn("the VM has ended: the guest's kernel panicked", self.report())

    def test_an_agent_that_dies(self):
        # A container without a PID namespace of its own sees the agent, and with this capability it may write over it.
        def edit(spec):
            spec["linux"]["namespaces"] = [namespace for namespace in spec["linux"]["namespaces"] if namespace["type"] != "pid"]
            for kind in "bounding", "effective", "permitted":
                spec["process"]["capabilities"][kind].append("CAP_SYS_PTRACE")

        overwrite = """
            read -r range rest <<MAP
            $(grep ' r-xp ' /proc/1/maps)
MAP
            begin=$((0x${range%-*} / 4096)) end=$((0x${range#*-} / 4096))
            dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$begin count=$((end - begin)) conv=notrunc
            exec sleep 1000"""
        result = self.run_spec(edit, "sh", "-c", overwrite)
        self.assertEqual(result.code, 137)
        self.assertIn("the VM has ended: the guest's kernel panicked", self.report())
        self.assertIn("Attempted to kill init", self.report())

    def test_kill_of_ctr_does_not_end_the_container(self):
        name = self.name()
        self.addCleanup(self.remove, name)
        process = subprocess.Popen(["ctr", "run", "--runtime", RUNTIMES[self.runtime], IMAGE, name, "sh", "-c", "echo up; sleep 1000"],
                                   stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self.assertEqual(process.stdout.readline(), b"up\n")
        process.kill()
        process.wait()
        process.stdout.close()
        self.assertEqual(self.ctr("task", "exec", "--exec-id", "look", name, "echo", "alive").out, "alive")
