"""What an OCI specification asks for beyond what `ctr run` has options for: user namespaces, how mounts propagate,
processes of a container that is not started, and what of a pod's security context critest leaves out."""

import concurrent.futures
import os
import subprocess

import api
from cri import PodCase
from harness import RUNTIMES, Case, Task, show_cgroup, since, start_containerd, stop_containerd, wait_until

# Where containerd keeps the layers of images, and files of the pods.
DATA = "/var/lib/containerd"

# Root of a container with a user namespace is this user outside.
OUTSIDE = 100000
IDS = {"containerID": 0, "hostID": OUTSIDE, "size": 65536}


def disk(case, size="16M"):
    """A folder of a file system whose mounts can show other owners, which those that the node is made of cannot."""
    folder = f"{case.folder}/disk"
    os.mkdir(folder)
    case.mount_disk(folder, size)
    return folder


class Capabilities(Case):
    NONE = {"bounding": [], "effective": [], "permitted": []}

    def capabilities_of(self, task, process):
        text = task.exec("grep", "^Cap[PEB]", process, code=0).out
        return dict(line.split(":\t") for line in text.splitlines())

    def test_exec_without_any_named_has_the_containers(self):
        kill = {kind: ["CAP_KILL"] for kind in self.NONE}
        task = Task(self, self.name())
        self.run_spec(lambda spec: spec["process"].update(capabilities=kill), "sleep", "100000",
                      name=task.name, detached=True, code=0)
        self.execute(task, "cat /proc/self/status >/tmp/caps")
        self.assertEqual(self.capabilities_of(task, "/tmp/caps"),
                         dict.fromkeys(("CapPrm", "CapEff", "CapBnd"), f"{1 << 5:016x}"))

    def test_container_without_any_named_has_none(self):
        out = self.run_spec(lambda spec: spec["process"].pop("capabilities"), "grep", "^Cap[PEB]", "/proc/self/status", code=0).out
        self.assertEqual([int(line.split()[1], 16) for line in out.splitlines()], [0, 0, 0])

    def execute(self, task, script):
        """Runs a process that says nothing of capabilities, to its end."""
        for answer in (api.execute(task.name, "bare", "sh", "-c", script), api.call("Start", task.name, {2: "bare"}),
                       api.call("Wait", task.name, {2: "bare"})):
            self.assertEqual(answer.code, "OK", answer)


class UserNamespace(Capabilities):
    # Of `ctr run`.
    OPTIONS = ["--uidmap", f"0:{OUTSIDE}:65536", "--gidmap", f"0:{OUTSIDE}:65536"]

    def remapped(self):
        """A root file system that belongs to the container's root."""
        copy = os.path.join(self.folder, "rootfs")
        if not os.path.exists(copy):
            # runc looks for it as that root.
            os.chmod(self.folder, 0o711)
            subprocess.run(["cp", "-a", self.rootfs(), copy], check=True)
            subprocess.run(["chown", "-hR", f"{OUTSIDE}:{OUTSIDE}", copy], check=True)
        return copy

    def config(self, edit, *command, name):
        """With a user namespace."""
        def mapped(spec):
            spec["root"]["path"] = self.remapped()
            spec["linux"]["namespaces"].append({"type": "user"})
            spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = [IDS]
            edit(spec)

        return super().config(mapped, *command, name=name)

    def test_root_is_another_user_outside(self):
        out = self.output_of(
            "sh", "-ec", "id -u; cat /proc/self/uid_map; cd /tmp; touch mine; chown 5:6 mine; stat -c '%u %g' mine /etc/passwd; "
            "mkdir -m 700 other; chown 7 other; touch other/file; stat -c %u other/file; : </dev/null",
            options=self.OPTIONS)
        self.assertEqual([line.split() for line in out.splitlines()],
                         [["0"], ["0", str(OUTSIDE), "65536"], ["5", "6"], ["0", "0"], ["0"]])

    def test_exec_terminal_and_streams(self):
        task = self.start(options=self.OPTIONS)
        result = task.exec("sh", "-c", "id -u; echo more >/dev/stderr; echo again >/dev/stdout", code=0)
        self.assertEqual((result.out.split(), result.err), (["0", "again"], "more"))
        terminal = self.terminal("task", "exec", "-t", "--exec-id", "terminal", task.name, "sh", "-c",
                                 "stat -c %u $(tty); echo typed >/dev/tty")
        terminal.expect(r"0\s+typed")
        self.assertEqual(terminal.wait(), 0)

    def test_exec_is_in_the_user_namespace(self):
        task = Task(self, self.name())
        self.run_spec(lambda spec: None, "sleep", "100000", name=task.name, detached=True, code=0)
        look = "readlink /proc/{0}/ns/user; cat /proc/{0}/uid_map /proc/{0}/gid_map; grep -E '^(Uid|Gid|Cap)' /proc/{0}/status"
        first, own = (task.exec("sh", "-ec", look.format(pid), code=0).out for pid in ("1", "self"))
        self.assertEqual(own, first)
        self.assertIn(["0", str(OUTSIDE), "65536"], [line.split() for line in own.splitlines()])
        # The shared file system has the ids of the guest, which the mapping does not hide.
        task.exec("chmod", "1777", "/tmp", code=0)
        for options, path, owner in (([], "/tmp/root", OUTSIDE), (["--user", "7"], "/tmp/seven", OUTSIDE + 7)):
            task.exec("touch", path, options=options, code=0)
            self.assertEqual(os.stat(f"{self.folder}/rootfs{path}").st_uid, owner)

    def test_system_files_are_there(self):
        def edit(spec):
            for kind in self.NONE:
                spec["process"]["capabilities"][kind].append("CAP_SYS_ADMIN")

        out = self.run_spec(edit, "sh", "-ec",
                            "ls /sys/class/net; touch /sys/x 2>/dev/null || echo read-only; "
                            "echo 1 2>/dev/null >/proc/sys/kernel/panic || echo protected; "
                            "hostname other && hostname; head -c 1 /dev/zero | wc -c; "
                            "timeout 1 nc -l -p 80 || echo $?", code=0).out
        # The end of a server that was not refused its port.
        self.assertEqual(out.split(), ["lo", "read-only", "protected", "other", "1", "143"])

    def test_files_of_the_host_stay_foreign(self):
        os.mkdir(f"{self.folder}/host")

        def edit(spec):
            spec["mounts"].append({"destination": "/host", "type": "bind", "source": f"{self.folder}/host", "options": ["rbind"]})

        result = self.run_spec(edit, "sh", "-c", "stat -c %u /host; touch /host/x", code=1)
        self.assertEqual(result.out, "65534")
        self.assertIn("Permission denied", result.err)

    def test_mount_with_the_containers_owners(self):
        if self.runtime == "runc":
            self.skipTest("Debian's runc has no such mounts")
        folder = disk(self)

        def edit(spec):
            spec["mounts"].append({
                "destination": "/host", "type": "bind", "source": folder, "options": ["rbind"],
                "uidMappings": [IDS], "gidMappings": [IDS]})

        out = self.run_spec(edit, "sh", "-ec", "touch /host/root; touch /host/seven; chown 7:8 /host/seven; "
                            "stat -c '%u %g' /host /host/root /host/seven", code=0).out
        self.assertEqual(out.splitlines(), ["0 0", "0 0", "7 8"])
        owners = [(found.st_uid, found.st_gid) for found in map(os.stat, (f"{folder}/root", f"{folder}/seven"))]
        self.assertEqual(owners, [(0, 0), (7, 8)])

    def test_mount_that_cannot_have_the_containers_owners_is_refused(self):
        if self.runtime == "runc":
            self.skipTest("Debian's runc has no such mounts")

        # The file system that the node's root is has none.
        def edit(spec):
            spec["mounts"].append({"destination": "/host", "type": "bind", "source": self.folder, "options": ["rbind", "idmap"]})

        result = self.run_spec(edit, "true")
        self.assertNotEqual(result.code, 0)
        self.assertIn(f"cannot bind {self.folder} of the host to /host", result.err)
        self.assertIn("idmapped mounts", result.err)

    def test_layers_with_the_containers_owners(self):
        if self.runtime == "runc":
            self.skipTest("containerd 1.6 knows no such layers")
        folder, task = disk(self), Task(self, self.name())
        lower, upper, work = (os.path.join(folder, name) for name in ("lower", "upper", "work"))
        subprocess.run(["cp", "-a", self.rootfs(), lower], check=True)
        os.mkdir(upper)
        os.chown(upper, OUTSIDE, OUTSIDE)
        os.mkdir(work)
        config = self.config(lambda spec: spec["root"].update(path="rootfs"), "sleep", "100000", name=task.name)
        self.ctr("c", "create", "--runtime", RUNTIMES[self.runtime], "--config", config, task.name, code=0)
        ids = f"0:{OUTSIDE}:65536"
        layers = api.mount("overlay", "overlay", f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}", f"uidmap={ids}", f"gidmap={ids}")
        for answer in api.create(task.name, [layers]), api.call("Start", task.name):
            self.assertEqual(answer.code, "OK", answer)
        out = task.exec("sh", "-ec", "stat -c '%u %g' / /bin/busybox; touch /made; chown 7:8 /made /etc/passwd", code=0).out
        self.assertEqual(out.splitlines(), ["0 0", "0 0"])
        for name in "made", "etc/passwd":
            found = os.stat(f"{upper}/{name}")
            self.assertEqual((found.st_uid, found.st_gid), (OUTSIDE + 7, OUTSIDE + 8))
        self.assertEqual(os.stat(f"{lower}/etc/passwd").st_uid, 0)

    def test_user_that_is_not_in_it_is_refused(self):
        task = Task(self, self.name())
        self.run_spec(lambda spec: None, "sleep", "100000", name=task.name, detached=True, code=0)
        results = [task.exec("true", options=["--user", "70000"]),
                   self.run_spec(lambda spec: spec["process"]["user"].update(uid=70000), "true")]
        for result in results:
            self.assertNotEqual(result.code, 0)
            if self.runtime == "husk":
                self.assertIn("user 70000 is not in the container's user namespace", result.err)


class Process(Case):
    @since(1, 7, "leaves out of a specification what it does not know")
    def test_names_clocks_and_priorities(self):
        if self.runtime == "runc":
            self.skipTest("Debian's is older than most of these")
        day = 24 * 60 * 60

        def edit(spec):
            spec.update(hostname="pear", domainname="orchard")
            spec["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5}
            spec["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 6}
            spec["linux"]["personality"] = {"domain": "LINUX32"}
            spec["linux"]["namespaces"].append({"type": "time"})
            spec["linux"]["timeOffsets"] = {"boottime": {"secs": 10 * day}, "monotonic": {"secs": day}}

        # Of /proc/PID/stat, the 19th is how nice it is, and the 41st the policy: 3 is SCHED_BATCH.
        look = ("hostname; cat /proc/sys/kernel/domainname; uname -m; awk '{print $19, $41}' /proc/self/stat; ionice; "
                "cut -d. -f1 /proc/uptime; awk '{print $1, $2}' /proc/self/timens_offsets")
        host, domain, machine, scheduled, priority, uptime, *offsets = self.run_spec(edit, "sh", "-ec", look, code=0).out.splitlines()
        self.assertEqual((host, domain, machine, scheduled, priority), ("pear", "orchard", "i686", "5 3", "best-effort: prio 6"))
        self.assertEqual(offsets, [f"monotonic {day}", f"boottime {10 * day}"])
        self.assertIn(int(uptime), range(10 * day, 11 * day))


class Mounts(Case):
    def propagation(self, options, rootfs=None):
        """What the kernel says of a tmpfs with these options, and of the root."""
        def edit(spec):
            spec["mounts"].append({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": options})
            if rootfs:
                spec["linux"]["rootfsPropagation"] = rootfs

        out = self.run_spec(edit, "sh", "-c", "grep -E ' (/|/scratch) ' /proc/self/mountinfo", code=0).out
        found = {}
        for line in out.splitlines():
            fields = line.split()
            optional = fields[6:fields.index("-")]
            found[fields[4]] = [field.split(":")[0] for field in optional]
        return found["/scratch"], found["/"]

    def test_propagation_of_mounts(self):
        self.assertEqual(self.propagation(["rprivate"])[0], [])
        self.assertEqual(self.propagation(["rshared"])[0], ["shared"])
        self.assertEqual(self.propagation(["unbindable"])[0], ["unbindable"])

    def test_propagation_of_the_root(self):
        if self.runtime == "runc":
            self.skipTest("Debian's leaves the root itself private")
        self.assertEqual(self.propagation(["rprivate"], "rshared"), ([], ["shared"]))
        self.assertEqual(self.propagation([], "unbindable")[1], ["unbindable"])

    def test_symbolic_links_are_not_followed(self):
        def edit(spec):
            spec["mounts"].append({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["nosymfollow"]})

        result = self.run_spec(edit, "sh", "-c", "echo text >/scratch/file; ln -s file /scratch/link; cat /scratch/file /scratch/link")
        if self.runtime == "runc" and result.code == 0:
            self.skipTest("this runc has no such option")
        self.assertEqual((result.code, result.out), (1, "text"))
        self.assertIn("Too many levels of symbolic links", result.err)

    def test_an_option_that_is_not_supported_is_named(self):
        def edit(spec):
            spec["mounts"].append({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]})

        result = self.run_spec(edit, "true")
        if self.runtime == "husk":
            self.assertNotEqual(result.code, 0)
            self.assertIn("tmpcopyup of the mount /scratch", result.err)
        else:
            self.assertEqual(result.code, 0, result.err)

    def test_cwd_on_a_mount_that_is_empty_is_made(self):
        def edit(spec):
            spec["mounts"].append({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs"})
            spec["process"]["cwd"] = "/scratch/deep/down"

        self.assertEqual(self.run_spec(edit, "sh", "-c", "pwd; stat -c '%a %u' .", code=0).out.splitlines(),
                         ["/scratch/deep/down", "755 0"])


class Resources(Case):
    def test_weight_of_io(self):
        def edit(spec):
            spec["linux"]["resources"]["blockIO"] = {"weight": 500}
            show_cgroup(spec)

        out = self.run_spec(edit, "sh", "-c", "cat /sys/fs/cgroup/io.bfq.weight 2>/dev/null || cat /sys/fs/cgroup/io.weight", code=0).out
        # A kernel with BFQ takes the weight as it is, the others take it from another scale.
        self.assertIn(out, ("default 500", "default 4950"))


class Starting(Case):
    def test_a_process_of_a_container_whose_program_does_not_run_yet(self):
        if self.runtime == "runc":
            self.skipTest("its shim does one thing at a time")
        name = self.name()
        self.addCleanup(self.remove, name)

        def edit(spec):
            wait = "until test -e /tmp/go; do sleep 0.1; done"
            spec["hooks"] = {"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", wait]}]}

        with concurrent.futures.ThreadPoolExecutor(1) as background:
            running = background.submit(self.run_spec, edit, "echo", "at last", name=name)
            go = ("task", "exec", "--exec-id", "go", name, "sh", "-c", "cat /proc/1/comm; touch /tmp/go")
            done = wait_until(lambda: (result := self.ctr(*go)).code == 0 and result, "the container to be created")
            self.assertNotEqual(done.out, "echo")
            result = running.result()
        self.assertEqual((result.code, result.out), (0, "at last"))


class Labels(Case):
    def test_labels_of_security_modules_do_no_harm(self):
        if self.runtime == "runc":
            self.skipTest("the node's kernel has no security modules, and runc insists")

        def edit(spec):
            spec["process"].update({"apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u:system_r:container_t:s0"})
            spec["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0"

        self.assertEqual(self.run_spec(edit, "echo", "ok", code=0).out, "ok")

    def test_a_seccomp_listener_is_refused_by_name(self):
        if self.runtime == "runc":
            self.skipTest("it has listeners")

        def edit(spec):
            spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}

        result = self.run_spec(edit, "true")
        self.assertNotEqual(result.code, 0)
        self.assertIn("SCMP_ACT_NOTIFY", result.err)


class PodSecurity(PodCase):
    def test_groups_own_what_kubelet_gave_them(self):
        # What kubelet does to a volume for `fsGroup`.
        volume = os.path.join(self.folder, "volume")
        os.mkdir(volume)
        os.chown(volume, 0, 2000)
        os.chmod(volume, 0o2775)
        user = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 1001}, "supplemental_groups": [2000, 3000]}
        container = self.pod().start(mounts=[{"host_path": volume, "container_path": "/volume"}],
                                     linux={"security_context": user})
        out = container.output_of("sh", "-ec", "id -u; id -g; grep Groups: /proc/self/status; touch /volume/file; "
                                  "stat -c '%u %g' /volume/file")
        uid, gid, groups, owner = out.splitlines()
        self.assertEqual((uid, gid, owner), ("1000", "1001", "1000 2000"))
        self.assertLessEqual({"2000", "3000"}, set(groups.split()[1:]))
        found = os.stat(f"{volume}/file")
        self.assertEqual((found.st_uid, found.st_gid), (1000, 2000))

    def test_proc_is_masked_as_asked(self):
        look = ("sh", "-c", "head -c 1 /proc/meminfo | wc -c; echo 1 2>/dev/null >/proc/sys/kernel/domainname; echo $?")
        pod = self.pod()
        masked = pod.start(linux={"security_context": {"masked_paths": ["/proc/meminfo"], "readonly_paths": ["/proc/sys"]}})
        self.assertEqual(masked.output_of(*look).split(), ["0", "1"])
        # `procMount: Unmasked` is for pods with a user namespace; there it is that which forbids writing.
        unmasked = pod.start(linux={"security_context": {"masked_paths": [], "readonly_paths": []}})
        self.assertEqual(unmasked.output_of(*look).split(), ["1", "0"])


class PodUserNamespace(PodCase):
    @since(2, 0, "makes no user namespaces of pods")
    def setUp(self):
        super().setUp()
        if self.runtime == "runc":
            self.skipTest("Debian's runc makes no user namespaces of pods")
        # containerd has these shown with the pod's owners. Until the test is over, they are where that can be.
        moved = disk(self, "256M")
        self.addCleanup(start_containerd)
        self.addCleanup(subprocess.run, ["umount", DATA], check=True)
        self.addCleanup(stop_containerd)
        stop_containerd()
        subprocess.run(["cp", "-a", f"{DATA}/.", moved], check=True)
        subprocess.run(["mount", "--bind", moved, DATA], check=True)
        start_containerd()

    def pod_with_ids(self, **config):
        """A pod as kubelet asks for it with `hostUsers: false`."""
        ids = [{"container_id": 0, "host_id": OUTSIDE, "length": 65536}]
        self.options = {"namespace_options": {"pid": 1, "userns_options": {"mode": 0, "uids": ids, "gids": ids}}}
        return self.pod(linux={"security_context": self.options}, **config)

    def test_containers_of_a_pod_share_a_user_namespace(self):
        pod = self.pod_with_ids()
        first = pod.start(linux={"security_context": self.options})
        second = pod.start(linux={"security_context": self.options})
        for container in first, second:
            out = container.output_of("sh", "-ec", "cat /proc/self/uid_map; id -u; touch /x; stat -c %u /x; ls -d /sys/class/net/eth0")
            self.assertEqual(out.split(), ["0", str(OUTSIDE), "65536", "0", "0", "/sys/class/net/eth0"])
        for kind in "user", "ipc", "uts":
            links = {container.output_of("readlink", f"/proc/1/ns/{kind}") for container in (first, second)}
            self.assertEqual(len(links), 1, links)

    def test_volume_belongs_to_the_pod(self):
        folder, pod = os.path.join(self.folder, "disk", "volume"), self.pod_with_ids()
        os.mkdir(folder)
        ids = [{"container_id": 0, "host_id": OUTSIDE, "length": 65536}]
        user = {"run_as_user": {"value": 7}, "run_as_group": {"value": 8}}
        os.chown(folder, 7, 8)
        container = pod.start(mounts=[{"host_path": folder, "container_path": "/volume", "uidMappings": ids, "gidMappings": ids}],
                              linux={"security_context": {**self.options, **user}})
        out = container.output_of("sh", "-ec", "id -u; touch /volume/file; stat -c '%u %g' /volume /volume/file")
        self.assertEqual(out.splitlines(), ["7", "7 8", "7 8"])
        found = os.stat(f"{folder}/file")
        self.assertEqual((found.st_uid, found.st_gid), (7, 8))
