"""What `ctr run` and the OCI specification ask of a container."""

import json
import os
import stat

from harness import Case, Events, show_cgroup, since, wait_until

# linux/capability.h
CAP_CHOWN, CAP_SYS_ADMIN = 0, 21


def status_field(text, name):
    """A field of /proc/PID/status."""
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{name}:"))


class Options(Case):
    def test_read_only(self):
        result = self.run_container("touch", "/x", options=["--read-only"])
        self.assertEqual(result.code, 1)
        self.assertIn("Read-only file system", result.err)

    def test_cwd_and_env(self):
        out = self.output_of("sh", "-c", "pwd; echo $ONE-$TWO", options=[
            "--cwd", "/home/alice", "--env", "ONE=1", "--env", "TWO=a b = c"])
        self.assertEqual(out.splitlines(), ["/home/alice", "1-a b = c"])

    def test_cwd_that_is_not_there_is_made(self):
        self.assertEqual(self.output_of("pwd", options=["--cwd", "/new/folder"]), "/new/folder")

    @since(1, 7, "has a ctr without --user and --hostname; spec.user_and_hostname has the same by specification")
    def test_user_and_hostname(self):
        out = self.output_of("sh", "-c", "id; hostname", options=["--user", "alice", "--hostname", "pear"])
        self.assertEqual(out.splitlines(), ["uid=1000(alice) gid=1000(alice) groups=29(audio),44(video),1000(alice)", "pear"])

    def test_hostname_is_the_guests(self):
        if self.runtime != "husk":
            self.skipTest("runc's containers have the machine's")
        self.assertEqual(self.output_of("hostname"), "husk")

    def test_writable_folder_of_the_host(self):
        os.mkdir(f"{self.folder}/inside")
        with open(f"{self.folder}/inside/old", "w", encoding="ascii") as file:
            file.write("from the host\n")
        out = self.output_of(
            "sh", "-ec", "cat /data/old; echo new > /data/new; chown 1000:1000 /data/new; chmod 640 /data/new; "
            "mkdir /data/folder; mv /data/old /data/folder/moved; ln -s new /data/link; rm /data/link; ln /data/new /data/hard",
            options=["--mount", f"type=bind,src={self.folder}/inside,dst=/data,options=rbind:rw"])
        self.assertEqual(out, "from the host")
        self.assertEqual(sorted(os.listdir(f"{self.folder}/inside")), ["folder", "hard", "new"])
        found = os.stat(f"{self.folder}/inside/new")
        self.assertEqual((found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_nlink), (1000, 1000, 0o640, 2))
        with open(f"{self.folder}/inside/folder/moved", encoding="ascii") as file:
            self.assertEqual(file.read(), "from the host\n")

    def test_read_only_folder_and_single_file_of_the_host(self):
        os.mkdir(f"{self.folder}/inside")
        for name in "one", "two":
            with open(f"{self.folder}/inside/{name}", "w", encoding="ascii") as file:
                file.write(name)
        result = self.run_container(
            "sh", "-c", "cat /ro/one; touch /ro/three; rm /ro/one; echo x >/ro/two; echo changed >/file; ls /ro", options=[
                "--mount", f"type=bind,src={self.folder}/inside,dst=/ro,options=rbind:ro",
                "--mount", f"type=bind,src={self.folder}/inside/two,dst=/file,options=rbind:rw"], code=0)
        self.assertEqual(result.out, "oneone\ntwo")
        self.assertEqual(result.err.count("Read-only file system"), 3, result.err)
        with open(f"{self.folder}/inside/two", encoding="ascii") as file:
            self.assertEqual(file.read(), "changed\n")

    def test_memory_limit_kills_and_is_told(self):
        events = Events(self)
        task = self.start("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1", options=["--memory-limit", str(32 << 20)])
        task.wait_for("STOPPED")
        self.assertEqual(task.end(), 137)
        wait_until(lambda: "/tasks/oom" in [topic for topic, _ in events.of(task.name)], "the event", timeout=30)

    def test_memory_limit_lets_the_rest_live(self):
        result = self.run_container("sh", "-c", "dd if=/dev/zero of=/dev/null bs=8M count=1 2>/dev/null; echo $?",
                                    options=["--memory-limit", str(32 << 20)], code=0)
        self.assertEqual(result.out, "0")

    def test_cpus_are_limited_by_cgroup(self):
        out = self.output_of("sh", "-c", "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/cpu.max", options=[
            "--cpus", "0.5", "--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"])
        self.assertEqual(out, "50000 100000")

    def test_seccomp_forbids_what_the_default_profile_does(self):
        result = self.run_container("sh", "-c", "grep Seccomp: /proc/self/status; unshare -U true; echo $?",
                                    options=["--seccomp"], code=0)
        self.assertEqual(result.out.split(), ["Seccomp:", "2", "1"])
        self.assertIn("Operation not permitted", result.err)
        self.assertEqual(self.output_of("sh", "-c", "grep Seccomp: /proc/self/status; unshare -U true; echo $?").split(),
                         ["Seccomp:", "0", "0"])

    def test_seccomp_profile_of_ones_own(self):
        profile = os.path.join(self.folder, "profile.json")
        with open(profile, "w", encoding="ascii") as file:
            json.dump({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42}]}, file)
        result = self.run_container("mkdir", "/tmp/x", options=["--seccomp", "--seccomp-profile", profile])
        self.assertEqual(result.code, 1)
        self.assertIn("No message of desired type", result.err)  # what 42 means

    def test_capabilities_that_are_dropped_are_gone(self):
        command = ["sh", "-c", "cat /proc/self/status; chown 1000 /tmp/; echo chown=$?"]
        whole = self.run_container(*command, code=0)
        dropped = self.run_container(*command, options=["--cap-drop", "CAP_CHOWN"], code=0)
        self.assertTrue(int(status_field(whole.out, "CapEff"), 16) >> CAP_CHOWN & 1)
        for name in "CapEff", "CapPrm", "CapBnd":
            self.assertEqual(int(status_field(dropped.out, name), 16),
                             int(status_field(whole.out, name), 16) & ~(1 << CAP_CHOWN), name)
        self.assertTrue(whole.out.endswith("chown=0"), whole)
        self.assertTrue(dropped.out.endswith("chown=1"), dropped)

    def test_capabilities_that_are_added_work(self):
        out = self.output_of("sh", "-c", "mount -t tmpfs none /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs none /mnt && echo mounted",
                             options=["--cap-add", "CAP_SYS_ADMIN"])
        self.assertEqual(out, "mounted")

    def test_no_new_privileges(self):
        text = self.output_of("cat", "/proc/self/status")
        self.assertEqual(status_field(text, "NoNewPrivs"), "1")
        text = self.output_of("cat", "/proc/self/status", options=["--allow-new-privs"])
        self.assertEqual(status_field(text, "NoNewPrivs"), "0")

    def test_privileged(self):
        out = self.output_of("sh", "-ec", "mkdir /mnt; mount -t tmpfs none /mnt; cat /proc/self/status; echo 0 >/proc/sys/kernel/printk",
                             options=["--privileged"])
        self.assertTrue(int(status_field(out, "CapEff"), 16) >> CAP_SYS_ADMIN & 1)
        self.assertEqual(status_field(out, "Seccomp"), "0")

    def test_privileged_has_the_devices_of_its_machine(self):
        listing = "stat -c '%n|%F|%t:%T' *"
        out = self.output_of("sh", "-ec", f"cd /dev; {listing}; echo; mkdir /mnt; mount -t devtmpfs none /mnt; cd /mnt; {listing}; "
                             "mknod /tmp/kmsg c 1 11; head -c 1 /tmp/kmsg >/dev/null", options=["--privileged"])

        def devices(text):
            found = (line.split("|") for line in text.splitlines())
            # Every container has these two of its own.
            return {name: (kind, numbers) for name, kind, numbers in found if "special" in kind and name not in ("console", "ptmx")}

        container, machine = map(devices, out.split("\n\n"))
        # Those that containerd sees, but as the container's machine has them: what that lacks is left out.
        listed = os.listdir("/dev")
        self.assertEqual(container, {name: what for name, what in machine.items() if name in listed})
        self.assertIn("fuse", container)
        self.assertIn("kvm", listed)
        self.assertEqual("kvm" in container, self.runtime == "runc")

    def test_device(self):
        out = self.output_of("sh", "-c", "test -c /dev/fuse && : 3<>/dev/fuse && echo opened", options=["--device", "/dev/fuse"])
        self.assertEqual(out, "opened")

    def test_device_that_the_guest_has_not(self):
        if self.runtime != "husk":
            self.skipTest("runc's containers have the machine's devices")
        # Of the node, which is where ctr looks.
        refused = self.run_container("true", options=["--device", "/dev/kvm"], code=1)
        self.assertIn("device /dev/kvm does not exist in the guest", refused.err)

    def test_devices_of_every_container(self):
        out = self.output_of(
            "sh", "-ec", "for d in null zero full random urandom tty; do test -c /dev/$d; done; echo x >/dev/null; "
            "head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; ! echo x 2>/dev/null >/dev/full; "
            "for l in fd stdin ptmx; do readlink /dev/$l; done; test ! -e /dev/vda; test ! -e /dev/mem")
        self.assertEqual(out.split(), ["4", "4", "/proc/self/fd", "/proc/self/fd/0", "pts/ptmx"])

    def test_devices_that_were_not_given_cannot_be_made(self):
        result = self.run_container("sh", "-c", "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg")
        self.assertNotEqual(result.code, 0)
        self.assertIn("Operation not permitted", result.err)

    def test_kernel_files_are_masked(self):
        out = self.output_of("sh", "-c", "cat /proc/keys | wc -c; cat /proc/timer_list 2>/dev/null | wc -c; "
                             "echo 1 2>/dev/null >/proc/sys/vm/swappiness; echo $?; echo b 2>/dev/null >/proc/sysrq-trigger; echo $?")
        self.assertEqual(out.split(), ["0", "0", "1", "1"])

    def test_a_container_sees_only_itself(self):
        out = self.output_of("sh", "-c", "echo $$; ls /proc | grep -c '^[0-9]'; ls /sys/class/net; cat /proc/1/comm; true")
        pid, count, *rest = out.split()
        self.assertEqual((pid, rest), ("1", ["lo", "sh"]))
        self.assertLessEqual(int(count), 4)

    def test_a_rootfs_that_is_a_plain_folder(self):
        rootfs = self.rootfs()
        self.addCleanup(os.unlink, f"{rootfs}/mark")
        out = self.output_of("/bin/sh", "-c", "echo written > /mark; cat /mark", options=["--rootfs"], image=(rootfs,))
        self.assertEqual(out, "written")
        with open(f"{rootfs}/mark", encoding="ascii") as file:
            self.assertEqual(file.read(), "written\n")

    def test_labels_and_annotations_do_no_harm(self):
        self.assertEqual(self.output_of("echo", "ok", options=["--label", "a=b", "--annotation", "c.d/e=f"]), "ok")


class Spec(Case):
    def test_user_and_hostname(self):
        def edit(spec):
            spec["hostname"] = "pear"
            spec["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [29, 44], "umask": 0o27}

        out = self.run_spec(edit, "sh", "-c", "id -u; id -g; grep Groups: /proc/self/status; hostname; umask", code=0).out
        self.assertEqual(out.split(), ["1000", "1000", "Groups:", "29", "44", "pear", "0027"])

    def test_limits_of_the_process(self):
        def edit(spec):
            spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456},
                                          {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]
            spec["process"]["oomScoreAdj"] = 321

        out = self.run_spec(edit, "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj", code=0).out
        self.assertEqual(out.split(), ["123", "456", "0", "321"])

    def test_limits_of_the_cgroup(self):
        def edit(spec):
            spec["linux"]["resources"].update({
                "pids": {"limit": 17}, "memory": {"limit": 64 << 20, "reservation": 32 << 20},
                "cpu": {"shares": 512, "quota": 30000, "period": 100000}})
            show_cgroup(spec)

        out = self.run_spec(edit, "sh", "-c", "cd /sys/fs/cgroup; cat pids.max memory.max memory.low cpu.weight cpu.max", code=0).out
        pids, limit, reservation, weight, quota = out.splitlines()
        self.assertEqual((pids, limit, reservation, quota), ("17", str(64 << 20), str(32 << 20), "30000 100000"))
        # Of 512 shares: by runc before 1.3, and by runc since and libcontainer, which keep the default at the default.
        self.assertIn(weight, ("20", "59"))

    def test_process_limit_holds(self):
        def edit(spec):
            spec["linux"]["resources"]["pids"] = {"limit": 8}

        result = self.run_spec(edit, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done; echo never")
        self.assertNotIn("never", result.out)
        self.assertIn("fork", result.err)

    def test_mounts_of_every_kind(self):
        os.mkdir(f"{self.folder}/host")

        def edit(spec):
            spec["mounts"] += [
                {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "nodev", "noexec", "size=1m", "mode=1750"]},
                {"destination": "/host/deep/down", "type": "bind", "source": f"{self.folder}/host",
                 "options": ["rbind", "ro", "nosuid", "nodev", "noexec"]}]

        out = self.run_spec(edit, "sh", "-c", "stat -c %a /scratch; df -k /scratch | awk 'END {print $2}'; "
                            "grep -E ' (/scratch|/host/deep/down|/dev/shm|/dev/mqueue|/proc|/sys) ' /proc/self/mounts", code=0).out
        mode, size, *mounts = out.splitlines()
        self.assertEqual((mode, size), ("1750", "1024"))
        options = {line.split()[1]: set(line.split()[3].split(",")) for line in mounts}
        self.assertLessEqual({"rw", "nosuid", "nodev", "noexec"}, options["/scratch"])
        self.assertLessEqual({"ro", "nosuid", "nodev", "noexec"}, options["/host/deep/down"])
        self.assertLessEqual({"/dev/shm", "/dev/mqueue", "/proc", "/sys"}, set(options))

    def test_sysctl_masked_and_read_only_paths(self):
        def edit(spec):
            spec["linux"]["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"}
            spec["linux"]["maskedPaths"] = ["/etc/passwd", "/home"]
            spec["linux"]["readonlyPaths"] = ["/var"]

        result = self.run_spec(edit, "sh", "-c", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; "
                               "wc -c </etc/passwd; ls /home | wc -l; touch /var/x", code=1)
        self.assertEqual(result.out.split(), ["80", "1", "0", "0"])
        self.assertIn("Read-only file system", result.err)

    def test_namespaces_that_are_shared_are_the_sandboxes(self):
        def edit(spec):
            spec["linux"]["namespaces"] = [ns for ns in spec["linux"]["namespaces"] if ns["type"] != "network"]

        if self.runtime == "husk":
            # The host's network is what a VM cannot share, unless no network will do.
            self.assertIn('host_network = "isolate"', self.run_spec(edit, "true", code=1).err)
        else:
            self.assertIn("lo", self.run_spec(edit, "ls", "/sys/class/net", code=0).out.split())

    def test_hooks_of_the_host_run_in_order(self):
        log = os.path.join(self.folder, "hooks")

        def edit(spec):
            spec["hooks"] = {kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"grep -q ociVersion && echo {kind} >>{log}"]}]
                             for kind in ("prestart", "createRuntime", "poststart", "poststop")}

        self.run_spec(edit, "true", code=0)
        with open(log, encoding="ascii") as file:
            self.assertEqual(file.read().split(), ["prestart", "createRuntime", "poststart", "poststop"])

    def test_devices_with_their_modes(self):
        number = os.stat("/dev/fuse").st_rdev

        def edit(spec):
            spec["linux"]["devices"] = [{"path": "/dev/fuse", "type": "c", "major": os.major(number), "minor": os.minor(number),
                                         "fileMode": 0o640, "uid": 1000, "gid": 44}]
            spec["linux"]["resources"]["devices"].append(
                {"allow": True, "type": "c", "major": os.major(number), "minor": os.minor(number), "access": "rwm"})

        out = self.run_spec(edit, "sh", "-c", "stat -c '%a %u %g' /dev/fuse; : 3<>/dev/fuse && echo opened", code=0).out
        self.assertEqual(out.splitlines(), ["640 1000 44", "opened"])

