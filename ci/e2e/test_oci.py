"""What an OCI specification asks for beyond what `ctr run` has options for: how mounts propagate, processes of a container
that is not started, and what of a pod's security context critest leaves out."""

import concurrent.futures
import os

from cri import PodCase
from harness import Case, wait_until


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
            if not any(namespace["type"] == "cgroup" for namespace in spec["linux"]["namespaces"]):
                spec["linux"]["namespaces"].append({"type": "cgroup"})
            spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                                   "options": ["ro", "nosuid", "noexec", "nodev"]})

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
