"""Files of the host in a container: names, and what fails on the host."""

import hashlib
import os
import resource
import shutil
import signal

from harness import (CONTAINERD_LOG, Case, as_alice, children, flushes, fstype_of_roots, processes, remove_fifos_of_ctr,
                     wait_until)

# Of 255 bytes, with every byte that a name may have, and many that are no UTF-8.
NAME = bytes(byte for byte in range(256) if byte not in b"\0/").ljust(255, b"~")


class Shared(Case):
    """With a folder of the host's."""

    def setUp(self):
        self.enterContext(self.nothing_left())
        super().setUp()
        self.share = os.path.join(self.folder, "share")
        os.mkdir(self.share)

    def mount(self, rights="rw"):
        """The options that bind the folder into a container."""
        return ["--mount", f"type=bind,src={self.share},dst=/share,options=rbind:{rights}"]

    def write(self, content):
        with open(f"{self.share}/file", "w", encoding="ascii") as file:
            file.write(content)

    def mount_with(self, *keys):
        """The options for a container with the folder, for whose VM these keys of the table [storage] hold."""
        if self.runtime != "husk":
            self.skipTest("runc has no cache of its own")
        path = os.path.join(self.folder, "husk.toml")
        with open(path, "w", encoding="ascii") as file:
            file.write("\n".join(["[storage]", *keys, ""]))
        return [*self.mount(), "--runtime-config-path", path]

    def use(self, task):
        """Has a container do what people do with the folder, and looks at it from the host."""
        out = task.exec("sh", "-ec", """
            cd /share
            exec 3<>gone; rm gone; echo kept >&3; cat /proc/self/fd/3
            mkdir folder; mv file folder/moved; ln -s moved folder/link; cat folder/link; echo
            chown 1:2 folder/moved; chmod 4711 folder/moved; stat -c '%u %g %a' folder/moved
            mkfifo fifo; stat -c %F fifo
            dd if=/dev/urandom of=large bs=1M count=8 conv=fsync 2>/dev/null; sync; sha256sum large
            """, code=0).out.splitlines()
        self.assertEqual(out[:4], ["kept", "other", "1 2 4711", "fifo"])
        with open(f"{self.share}/large", "rb") as file:
            self.assertEqual(out[4].split()[0], hashlib.sha256(file.read()).hexdigest())
        found = os.stat(f"{self.share}/folder/moved")
        self.assertEqual((found.st_uid, found.st_gid, found.st_mode & 0o7777), (1, 2, 0o4711))
        self.assertFalse(os.path.exists(f"{self.share}/gone"))
        self.assertIn("Permission denied", task.exec("touch", "/share/alices", options=as_alice()).err)
        task.exec("chmod", "0777", "/share", code=0)
        task.exec("touch", "/share/alices", options=as_alice(), code=0)
        found = os.stat(f"{self.share}/alices")
        self.assertEqual((found.st_uid, found.st_gid), (1000, 1000))

    def shell_with(self, *keys):
        """A shell in a container made with `mount_with`."""
        shell = self.terminal_container("sh", options=self.mount_with(*keys))
        shell.expect("# ")
        return shell


class Storage(Shared):
    def test_a_full_disk(self):
        self.mount_disk(self.share, "16M")
        task = self.start(options=self.mount())
        full = task.exec("dd", "if=/dev/zero", "of=/share/large", "bs=64k", code=1)
        self.assertIn("No space left on device", full.err)
        self.assertIn("No space left on device", task.exec("mkdir", "-p", *(f"/share/{n}" for n in range(50)), code=1).err)
        self.assertGreater(os.stat(f"{self.share}/large").st_size, 8 << 20)
        task.exec("sh", "-c", "rm /share/large && echo room >/share/small", code=0)

    def mount_quotas(self):
        """Makes the folder a disk of which there is 1 MiB, and ten files, for alice, and as much for a project of root's."""
        self.mount_disk(self.share, "16M", "usrquota", "prjquota",
                        made_with=["-O", "quota,project", "-E", "quotatype=usrquota:prjquota"])
        for kind, number in (("-u", "1000"), ("-P", "7")):
            self.command("setquota", kind, number, "0", "1024", "0", "10", self.share, code=0)
        for name in ("alices", "project"):
            os.mkdir(f"{self.share}/{name}")
        os.chown(f"{self.share}/alices", 1000, 1000)
        self.command("chattr", "+P", "-p", "7", f"{self.share}/project", code=0)

    def test_a_quota(self):
        self.mount_quotas()
        task = self.start(options=self.mount())
        for folder, user in (("alices", as_alice()), ("project", [])):
            path = f"/share/{folder}"
            full = task.exec("dd", "if=/dev/zero", f"of={path}/large", "bs=64k", options=user, code=1)
            self.assertIn("Disk quota exceeded", full.err)
            size = os.stat(f"{self.share}/{folder}/large").st_size
            self.assertTrue(512 << 10 < size <= 1 << 20, size)
            task.exec("rm", f"{path}/large", options=user, code=0)
            # The folder is one of the ten.
            for make, count in (("touch", 5), ("mkdir", 4)):
                made = [f"{path}/{make}-{n}" for n in range(count)]
                task.exec(make, *made, options=user, code=0)
            for make in (["touch"], ["mkdir"], ["ln", "-s", "nowhere"], ["mkfifo"]):
                self.assertIn("Disk quota exceeded", task.exec(*make, f"{path}/more", options=user, code=1).err)
            task.exec("sh", "-c", f"rm -r {path}/* && echo room >{path}/small", options=user, code=0)
        # Whose file it is counts, not who writes to it.
        root = task.exec("sh", "-c", "dd if=/dev/zero bs=64k count=32 >>/share/alices/small", code=1)
        self.assertIn("Disk quota exceeded", root.err)
        task.exec("dd", "if=/dev/zero", "of=/share/roots", "bs=64k", "count=32", code=0)
        given = task.exec("chown", "1000", "/share/roots", code=1)
        self.assertIn("Disk quota exceeded", given.err)
        # statfs(2): of a project there is no more than its limit.
        blocks, size = task.exec("stat", "-f", "-c", "%b %S", "/share/project", code=0).out.split()
        self.assertEqual(int(blocks) * int(size), 1 << 20)

    def test_a_quota_where_the_guest_keeps_what_is_written(self):
        self.mount_quotas()
        nine = 'sharing = "9p"'
        for keys in (["writeback = true"], [nine], [nine, 'cache = "always"'], [nine, 'cache = "none"']):
            options = self.mount_with(*keys)
            with self.subTest(keys):
                task = self.start(options=options)
                # There is room for all but the end of the last write, which Linux's 9P client, where it keeps nothing, takes for
                # written as well.
                full = task.exec("dd", "if=/dev/urandom", "of=/share/alices/large", "bs=64k", "count=16", "conv=fsync",
                                 options=as_alice(), code=1)
                self.assertIn("Disk quota exceeded", full.err)
                self.assertNotIn("error writing", full.err)
                task.exec("sh", "-c", "rm /share/alices/large && echo room >/share/alices/small && sync",
                          options=as_alice(), code=0)

    def test_fsync_reaches_the_disk(self):
        self.mount_disk(self.share, "64M")
        device = self.command("findmnt", "-n", "-o", "SOURCE", self.share, code=0).out
        kinds = ["", 'sharing = "9p"', "writeback = true"] if self.runtime == "husk" else [None]
        for kind in kinds:
            with self.subTest(kind):
                task = self.start(options=self.mount() if kind is None else self.mount_with(kind))

                def asked(*command):
                    before = flushes(device)
                    task.exec("sh", "-c", "cd /share; for n in 1 2 3 4 5 6 7 8 9 10; do " + " ".join(command) + "; done", code=0)
                    return flushes(device) - before

                self.assertLess(asked("echo $n >$n"), 10, "nobody asks for it")
                self.assertGreaterEqual(asked("echo $n | dd of=$n conv=fsync 2>&-"), 10)
                if "9p" not in (kind or ""):
                    # Of which Linux's client tells nobody.
                    self.assertGreaterEqual(asked("echo $n >$n; sync -f $n"), 10)

    def test_a_read_only_disk(self):
        self.mount_disk(self.share, "16M", "ro")
        for write in (["touch", "/share/new"], ["rmdir", "/share/lost+found"], ["chmod", "0700", "/share"]):
            self.assertIn("Read-only file system", self.run_container(*write, options=self.mount(), code=1).err)

    def test_a_read_only_mount(self):
        with open(f"{self.share}/old", "wb"):
            pass
        for write in (["touch", "/share/new"], ["rm", "-f", "/share/old"], ["dd", "if=/dev/zero", "of=/share/old", "count=1"]):
            self.assertIn("Read-only file system", self.run_container(*write, options=self.mount("ro"), code=1).err)

    def test_a_mount_below_a_read_only_mount(self):
        below = f"{self.share}/below"
        os.mkdir(below)
        self.mount_disk(below, "16M")
        self.run_container("touch", "/share/below/new", options=self.mount("ro"), code=0)
        self.assertTrue(os.path.exists(f"{below}/new"))
        refused = self.run_container("rm", "/share/below/new", options=self.mount("rro"), code=1)
        self.assertIn("Read-only file system", refused.err)

    def test_names_of_any_bytes(self):
        path = os.fsencode(self.share)
        with open(path + b"/" + NAME, "wb") as file:
            file.write(b"found\n")
        out = self.output_of(
            "sh", "-c", "cd /share; cat -- *; printf %s * | sha256sum; mkdir made; cp -- *~ made", options=self.mount())
        self.assertEqual(out.split(), ["found", hashlib.sha256(NAME).hexdigest(), "-"])
        self.assertEqual(os.listdir(path + b"/made"), [NAME])

    def test_a_folder_that_the_host_removes(self):
        with open(f"{self.share}/file", "w", encoding="ascii") as file:
            file.write("still there\n")
        task = self.start("sh", "-c", "exec <share/file; while sleep 1000; do :; done", options=self.mount())
        task.exec("cat", "/share/file", code=0)
        shutil.rmtree(self.share)
        # The guest takes a name that it has just looked up for valid for a second.
        cat = task.exec("sh", "-c", "while cat /share/file; do sleep 0.1; done", code=0)
        self.assertIn("No such file", cat.err)
        for use in ("touch", "mkdir"):
            self.assertIn("No such file", task.exec(use, "/share/new", code=1).err)
        # What is open stays.
        self.assertEqual(task.exec("cat", "/proc/1/fd/0", code=0).out, "still there")

    def test_many_files_cost_few_descriptors(self):
        for number in range(5000):
            path = f"{self.share}/{number // 100}"
            os.makedirs(path, exist_ok=True)
            with open(f"{path}/{number}", "wb"):
                pass
        task = self.start(options=self.mount())
        self.assertEqual(task.exec("sh", "-c", "find /share -type f | wc -l", code=0).out, "5000")
        task.exec("sh", "-c", "ls -lR /share >/dev/null", code=0)
        self.assertLess(len(os.listdir(f"/proc/{task.pid}/fd")), 500)
        task.exec("sh", "-c", "rm -r /share/*", code=0)
        self.assertEqual(os.listdir(self.share), [])

    def test_a_limit_of_file_size(self):
        if self.runtime != "husk":
            self.skipTest("a limit of a container's process ends it, as it should")
        task = self.start(options=self.mount())
        resource.prlimit(task.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        self.assertIn("File too large", task.exec("dd", "if=/dev/zero", "of=/share/large", "bs=64k", "count=32", code=1).err)
        task.exec("touch", "/share/new", code=0)

    def test_nothing_is_cached(self):
        self.write("first")
        shell = self.shell_with('cache = "none"')
        for content in ("first", "other", "third"):
            self.write(content)
            # At once, and with the length that it had: by default the guest relies on what it knows for a second.
            shell.type("cat /share/file\n")
            shell.expect(rf"/file\s+{content}")

    def test_a_dax_window(self):
        self.write("first")
        # Without the window, the guest would not look for a day whether a file has changed.
        shell = self.shell_with('cache = "always"', "dax_window_mib = 64")
        shell.type("cat /share/file\n")
        shell.expect(r"/file\s+first")
        with open(f"{self.share}/file", "r+", encoding="ascii") as file:
            file.write("other")
        shell.type("cat /share/file\n")
        shell.expect(r"/file\s+other")
        shell.type("echo -n gue | dd of=/share/file conv=notrunc 2>/dev/null; echo writ''ten\n")
        shell.expect("written")
        with open(f"{self.share}/file", encoding="ascii") as file:
            self.assertEqual(file.read(), "gueer")
        # Of a root file system of layers, what was read of the lower one is replaced. More than the window has room for.
        shell.type("cat /etc/passwd >/dev/null; echo more >>/etc/passwd; tail -n 1 /etc/passwd\n")
        shell.expect(r"\smore\s")
        shell.type("cp /bin/busybox /bin/busybox-copy; /bin/busybox-copy echo it wor''ks\n")
        shell.expect("it works")
        shell.type("dd if=/dev/urandom of=/large bs=1M count=80 2>/dev/null; cmp /large /large && echo eq''ual\n")
        shell.expect("equal")
        os.truncate(f"{self.share}/file", 0)
        shell.type("cat /share/file | wc -c; echo anew >/share/file; echo don''e\n")
        shell.expect("done")
        with open(f"{self.share}/file", encoding="ascii") as file:
            self.assertEqual(file.read(), "anew\n")

    def test_a_full_disk_behind_a_dax_window(self):
        self.mount_disk(self.share, "16M")
        task = self.start(options=self.mount_with("dax_window_mib = 16"))
        # In place, into a hole: no request of the guest's is a write.
        full = task.exec("sh", "-c", "truncate -s 64M /share/file; dd if=/dev/zero of=/share/file bs=1M conv=notrunc", code=1)
        self.assertIn("No space left on device", full.err)
        task.exec("sh", "-c", "rm /share/file && echo room >/share/small", code=0)

    def test_a_quota_behind_a_dax_window(self):
        self.mount_quotas()
        task = self.start(options=self.mount_with("dax_window_mib = 16"))
        full = task.exec("sh", "-c", "cd /share/alices; truncate -s 8M file; dd if=/dev/zero of=file bs=1M conv=notrunc",
                         options=as_alice(), code=1)
        self.assertIn("Disk quota exceeded", full.err)
        task.exec("sh", "-c", "rm /share/alices/file && echo room >/share/alices/small", options=as_alice(), code=0)

    def test_a_dax_window_without_inotify(self):
        options = self.mount_with("dax_window_mib = 16")
        limit = "/proc/sys/fs/inotify/max_user_instances"
        with open(limit, encoding="ascii") as file:
            before = file.read()

        def allow(instances):
            with open(limit, "w", encoding="ascii") as file:
                file.write(instances)

        self.addCleanup(allow, before)
        allow("0")
        refused = self.run_container("true", options=options)
        self.assertNotEqual(refused.code, 0)
        self.assertIn("raise fs.inotify.max_user_instances", refused.err)

    def test_files_by_9p(self):
        self.write("first")
        task = self.start(options=self.mount_with('sharing = "9p"'))
        mounts = task.exec("grep", "-E", "^[^ ]+ (/|/share) ", "/proc/mounts", code=0).out
        self.assertEqual([line.split()[2] for line in mounts.splitlines()], [fstype_of_roots("9p"), "9p"])
        self.assertEqual(task.exec("cat", "/share/file", code=0).out, "first")
        self.write("other")
        self.assertEqual(task.exec("cat", "/share/file", code=0).out, "other")
        self.use(task)
        path = os.fsencode(self.share)
        with open(path + b"/" + NAME, "wb"):
            pass
        task.exec("sh", "-c", "mv /share/*~ /share/folder", code=0)
        self.assertIn(NAME, os.listdir(path + b"/folder"))

    def test_all_is_cached(self):
        self.write("first")
        shell = self.shell_with('cache = "always"', "writeback = true")
        shell.type("cat /share/file\n")
        shell.expect(r"/file\s+first")
        self.write("other")
        # By then the default would have looked.
        shell.type("sleep 1.5; cat /share/file\n")
        shell.expect(r"/file\s+first")
        shell.type("for n in 1 2 3; do echo $n; done >>/share/new; sync; echo writ''ten\n")
        shell.expect("written")
        with open(f"{self.share}/new", encoding="ascii") as file:
            self.assertEqual(file.read(), "1\n2\n3\n")


class Server(Shared):
    """With virtiofsd as the file server."""

    def mount_by_server(self, *keys, server=None):
        """The options for a container with the folder, whose files a server serves; its path is Debian's virtiofsd unless given."""
        # What ci/node has fetched.
        server = server or os.environ["HUSK_TEST_VIRTIOFSD"]
        return self.mount_with(f'server = "{server}"', *keys)

    def servers(self, task):
        """The pids of a container's servers: virtiofsd, and its child in a PID namespace."""
        with open(f"/proc/{task.pid}/stat", encoding="ascii") as file:
            shim = int(file.read().rpartition(")")[2].split()[1])
        [outer] = [pid for pid in children(shim) if "--shared-dir" in processes().get(pid, "")]
        [inner] = children(outer)
        return outer, inner

    def test_files_by_a_server(self):
        self.write("first")
        task = self.start(options=self.mount_by_server())
        mounts = task.exec("grep", "-E", "^[^ ]+ (/|/share) ", "/proc/mounts", code=0).out
        self.assertEqual([line.split()[2] for line in mounts.splitlines()], [fstype_of_roots("virtiofs"), "virtiofs"])
        self.assertEqual(task.exec("cat", "/share/file", code=0).out, "first")
        self.write("other")
        # Attributes are valid for a second.
        task.exec("sh", "-c", "until [ $(cat /share/file) = other ]; do sleep 0.1; done", code=0)
        self.use(task)

        def of(pid, name):
            with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
                return file.read()

        # The worker has no file of the host's, and no right to any.
        self.assertEqual(os.listdir(f"/proc/{task.pid}/root"), ["dev"])
        self.assertRegex(of(task.pid, "status"), r"CapPrm:\s0+\n")
        for pid in self.servers(task):
            self.assertEqual(of(pid, "cgroup"), of(task.pid, "cgroup"))
            self.assertEqual(of(pid, "oom_score_adj"), "0\n")

    def test_a_container_that_joins_a_server(self):
        pod = ["--annotation", "io.kubernetes.cri.sandbox-id=served"]
        first = self.start(options=[*self.mount_by_server('cache = "none"'), *pod])
        later = os.path.join(self.folder, "later")
        os.mkdir(later)
        self.mount_disk(later, "16M")
        # Both its root file system and its volume appear below the shared folder after the server has its own mounts.
        second = self.start(options=["--mount", f"type=bind,src={later},dst=/later,options=rbind:rw", *pod])
        second.exec("sh", "-c", "echo seen >/later/file; sync; echo own >/own", code=0)
        with open(f"{later}/file", encoding="ascii") as file:
            self.assertEqual(file.read(), "seen\n")
        self.assertEqual(first.pid, second.pid)
        first.exec("sh", "-c", "echo both >/share/file", code=0)
        second.ctr("kill", "-s", "SIGKILL", code=0)
        second.wait_for("STOPPED")
        self.assertEqual(second.end(), 137)
        # Nobody holds it.
        self.command("umount", later, code=0)
        self.command("mount", "-o", "loop", f"{later}.ext4", later, code=0)
        self.assertEqual(first.exec("cat", "/share/file", code=0).out, "both")

    def test_a_server_that_is_killed(self):
        # The one that waits for the other tells how that ended by its own status.
        for which, said in enumerate(["signal: 9 (SIGKILL)", "exit status: 247"]):
            with self.subTest(which), self.nothing_left():
                log = os.path.getsize(CONTAINERD_LOG)
                task = self.start(options=self.mount_by_server())
                os.kill(self.servers(task)[which], signal.SIGKILL)
                task.wait_for("STOPPED")
                self.assertEqual(task.end(), 137)
                self.ctr("c", "rm", task.name, code=0)
                with open(CONTAINERD_LOG, encoding="utf-8", errors="replace") as file:
                    file.seek(log)
                    ends = [line for line in file if 'msg="the VM has ended: ' in line]
                self.assertEqual(len(ends), 1, ends)
                self.assertIn(f"the file server has ended ({said})", ends[0])

    def test_a_server_of_a_shim_that_is_killed(self):
        task = self.start(options=self.mount_by_server())
        servers = set(self.servers(task))
        with open(f"/proc/{task.pid}/stat", encoding="ascii") as file:
            shim = int(file.read().rpartition(")")[2].split()[1])
        os.kill(shim, signal.SIGKILL)
        wait_until(lambda: not processes().keys() & servers, "the end of the servers", timeout=20)
        self.remove(task.name)
        # Whose client is not there to do it.
        remove_fifos_of_ctr(task.name)

    def test_a_server_that_does_not_start(self):
        refused = self.run_container("true", options=self.mount_by_server(server="/no/such/server"), code=1)
        self.assertIn("/no/such/server, the one of storage.server in husk.toml: no such file or directory", refused.err)
        refused = self.run_container("true", options=self.mount_by_server(server="/bin/false"), code=1)
        self.assertIn("the file server has ended (exit status: 1)", refused.err)
        refused = self.run_container("true", options=self.mount_by_server('sharing = "9p"'), code=1)
        self.assertIn("storage.sharing is \"9p\"; allowed is", refused.err)
