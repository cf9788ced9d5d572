"""What programs in a container are told, by inotify, of what the host changes in its files. The same with either runtime."""

import os
import re
import subprocess

from cri import PodCase
from harness import CONTAINERD_LOG, ROOT, Case, wait_until

PROGRAM = "/var/tmp/e2e-watch"


def program():
    """The folder of the program that watches (watch.c); all tests share it."""
    if not os.path.exists(PROGRAM):
        os.mkdir(PROGRAM)
        subprocess.run(["gcc", "-static", "-O1", "-o", f"{PROGRAM}/watch", f"{ROOT}/ci/e2e/watch.c"], check=True)
    return PROGRAM


class Notification:
    """A test with folders of the host that containers watch."""

    def setUp(self):
        super().setUp()
        self.logs = os.path.join(self.folder, "logs")
        os.mkdir(self.logs)

    def volume(self, name, size="64M"):
        """A folder of a disk of its own: what the node's root is made of cannot be watched by all kernels."""
        folder = os.path.join(self.folder, name)
        os.mkdir(folder)
        self.mount_disk(folder, size)
        return folder

    def in_memory(self, name):
        folder = os.path.join(self.folder, name)
        os.mkdir(folder)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
        self.addCleanup(subprocess.run, ["umount", folder], check=True)
        return folder

    def watcher(self, *paths):
        """A log, and the command that writes it; `paths` are what it reads and what it watches."""
        log = Log(self, self.name())
        return log, ["/program/watch", f"/logs/{log.name}", *paths]

    def host(self, folder, script):
        """Runs a script of the host in a folder."""
        self.command("sh", "-ec", f"cd {folder}; {script}", code=0)


class Log:
    """What a program that watches has written."""

    def __init__(self, case, name):
        self.name, self.path, self.seen = name, os.path.join(case.logs, name), 0

    def lines(self):
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8") as file:
            return [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]

    def await_line(self, start):
        """The lines since the last call, up to one that begins so; the same several times in a row count once."""
        def find():
            lines = [line.strip() for line in self.lines()]
            for index, line in enumerate(lines[self.seen:], self.seen):
                if line.startswith(start):
                    found, self.seen = lines[self.seen:index + 1], index + 1
                    return found
            return None

        try:
            found = wait_until(find, start, timeout=60)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; the log: {self.lines()}") from failure
        return [line for index, line in enumerate(found) if index == 0 or line != found[index - 1]]

    def events(self, last):
        """The same, without what the file held."""
        found = [" ".join(line.split()[:3]) for line in self.await_line(last)]
        return [line for index, line in enumerate(found) if index == 0 or line != found[index - 1]]


# What kubelet does when a ConfigMap has changed.
UPDATE = ("mkdir ..{new}; echo {word} | tee ..{new}/key >..{new}/other; ln -s ..{new} ..data_tmp; mv -T ..data_tmp ..data; "
          "rm -r ..{old}; touch done; rm done")
CONFIG_MAP = "mkdir ..1; echo one | tee ..1/key >..1/other; ln -s ..1 ..data; ln -s ..data/key key; ln -s ..data/other other"


class Events(Notification, Case):
    CHANGES = "echo one >new; mv new newer; rm newer; dd if=/dev/zero of=much bs=1 count=2000 2>/dev/null; rm much"
    EVENTS = ["0 CREATE new", "0 MODIFY new", "0 CLOSE_WRITE new", "0 MOVED_FROM new", "0 MOVED_TO newer", "0 DELETE newer",
              "0 CREATE much", "0 MODIFY much", "0 CLOSE_WRITE much", "0 DELETE much"]

    def setUp(self):
        self.enterContext(self.nothing_left())
        super().setUp()

    def watch(self, mounts, *watchers, options=()):
        """Starts a container with these mounts, (source, destination, rights), and a program for each of the watchers, which is
        what it reads and what it watches. Returns the container, and a log of each."""
        options = list(options)
        for source, destination, rights in [(program(), "/program", "ro"), (self.logs, "/logs", "rw"), *mounts]:
            options += ["--mount", f"type=bind,src={source},dst={destination},options=rbind:{rights}"]
        logs, commands = zip(*(self.watcher(*paths) for paths in watchers))
        task = self.start("sh", "-c", " & ".join([*map(" ".join, commands), "wait"]), options=options)
        for log in logs:
            log.await_line("watching ")
        return task, *logs

    def test_update_of_a_config_map(self):
        volume = self.in_memory("volume")
        self.host(volume, CONFIG_MAP)
        _, log = self.watch([(volume, "/volume", "ro")], ["/volume/key", "/volume", "/volume/key", "/volume/other"])
        self.host(volume, UPDATE.format(old=1, new=2, word="two"))
        lines = log.await_line("0 DELETE done")
        of_folder = [line for line in lines if line.startswith("0 ")]
        self.assertEqual([" ".join(line.split()[:3]) for line in of_folder if "done" not in line], [
            "0 CREATE,ISDIR ..2", "0 CREATE ..data_tmp", "0 MOVED_FROM ..data_tmp", "0 MOVED_TO ..data", "0 DELETE,ISDIR ..1"])
        # A program that reads the file as soon as it is told finds what is new.
        self.assertEqual({line.split()[3] for line in of_folder if "MOVED_TO" in line or "DELETE" in line}, {"two"})
        # The first one is held open.
        of_files = [[" ".join(line.split()[:2]) for line in lines if line.startswith(watch)] for watch in "12"]
        self.assertEqual(of_files, [["1 ATTRIB"], ["2 ATTRIB", "2 DELETE_SELF", "2 IGNORED"]])
        self.host(volume, UPDATE.format(old=2, new=3, word="three"))
        moved = [line for line in log.await_line("0 DELETE done") if "MOVED_TO" in line]
        self.assertEqual([line.split()[:4] for line in moved], [["0", "MOVED_TO", "..data", "three"]])

    def test_files_of_the_host(self):
        volume = self.volume("volume")
        self.host(volume, "echo aaaa >file; chmod 644 file; mkdir folder")
        # By two mounts, one of which is read-only.
        _, first, second = self.watch([(volume, "/a", "rw"), (volume, "/b", "ro")], ["/a/file", "/a", "/a/file", "/a/folder"],
                                      ["/b/file", "/b"])

        def does(script, *events):
            """What the host does, and the events of the folder in either mount. Returns those of what is in it."""
            self.host(volume, f"{script}; touch done; rm done")
            lines = [line for line in first.events("0 DELETE done") if "done" not in line]
            other = [line for line in second.events("0 DELETE done") if "done" not in line]
            of_folder = [line for line in lines if line.startswith("0 ")]
            self.assertEqual(([line[2:] for line in of_folder], other), (list(events), of_folder), script)
            return [line for line in lines if not line.startswith("0 ")]

        does("echo new >new", "CREATE new", "MODIFY new", "CLOSE_WRITE new")
        does("chmod 600 new", "ATTRIB new")
        does("mv new newer", "MOVED_FROM new", "MOVED_TO newer")
        of_folder = does("mv newer folder/moved", "MOVED_FROM newer")
        self.assertEqual(of_folder, ["2 MOVED_TO moved"])
        of_folder = does("mv folder/moved back", "MOVED_TO back")
        self.assertEqual(of_folder, ["2 MOVED_FROM moved"])
        does("rm back", "DELETE back")
        does("mkdir inner; ln -s inner link; mkfifo pipe; rmdir inner; rm link pipe",
             "CREATE,ISDIR inner", "CREATE link", "CREATE pipe", "DELETE,ISDIR inner", "DELETE link", "DELETE pipe")
        does("dd if=/dev/zero of=large bs=1M count=3 2>/dev/null", "CREATE large", "MODIFY large", "CLOSE_WRITE large")
        of_file = does("printf bbbb | dd of=file conv=notrunc 2>/dev/null", "MODIFY file", "CLOSE_WRITE file")
        self.assertEqual(of_file, ["1 MODIFY .", "1 CLOSE_WRITE ."])
        # The file is replaced, as editors do. What was done to it by its first name may be too long ago to be told.
        self.host(volume, "echo cccc >temporary; mv temporary file; touch done; rm done")
        lines = first.events("0 DELETE done")
        self.assertEqual([line for line in lines if "temporary" not in line and "done" not in line], ["0 MOVED_TO file", "1 ATTRIB ."])
        # The program has it open, so that it lives on.
        self.assertIn("0 MOVED_FROM temporary", lines)

    def test_content_is_there_with_the_event(self):
        volume = self.volume("volume")
        self.host(volume, "echo aaaa >file")
        _, log = self.watch([(volume, "/volume", "rw")], ["/volume/file", "/volume/file"])
        for word in "bbbb", "cccc", "longer", "d":
            # One write, of as many bytes as before or not.
            self.host(volume, f"printf '{word}\\n' | dd of=file conv=notrunc 2>/dev/null; truncate -s {len(word) + 1} file")
            # The same whether the file is opened anew or was open before.
            self.assertEqual(log.await_line(f"0 CLOSE_WRITE . {word}")[-1].split()[3:], [word, word])
            log.await_line("0 ")

    def test_many_files(self):
        volume = self.volume("volume")
        self.host(volume, "echo aaaa >file")
        _, log = self.watch([(volume, "/volume", "ro")], ["/volume/file", "/volume"])
        self.host(volume, "for n in $(seq 300); do echo $n >file$n; done; touch done")
        lines = log.events("0 CLOSE_WRITE done")
        for n in range(1, 301):
            self.assertEqual([line for line in lines if line.endswith(f" file{n}")],
                             [f"0 CREATE file{n}", f"0 MODIFY file{n}", f"0 CLOSE_WRITE file{n}"])

    def test_single_file(self):
        volume = self.volume("volume")
        self.host(volume, "echo aaaa >file; chmod 644 file")
        _, log = self.watch([(f"{volume}/file", "/file", "ro")], ["/file", "/file"])
        self.host(volume, "echo bbbb >file")
        self.assertIn("0 MODIFY . bbbb bbbb", log.await_line("0 CLOSE_WRITE"))

    def test_other_policies(self):
        if self.runtime != "husk":
            self.skipTest("runc has no cache of its own")
        for number, setting in enumerate(('cache = "none"', "writeback = true")):
            volume = self.volume(f"volume{number}")
            self.host(volume, CONFIG_MAP)
            settings = os.path.join(self.folder, f"husk{number}.toml")
            with open(settings, "w", encoding="ascii") as file:
                file.write(f"[storage]\n{setting}\n")
            _, log = self.watch([(volume, "/volume", "rw")], ["/volume/key", "/volume", "/volume/other"],
                                options=["--runtime-config-path", settings])
            self.host(volume, UPDATE.format(old=1, new=2, word="two"))
            lines = log.await_line("0 DELETE done")
            self.assertEqual([line.split()[:4] for line in lines if "MOVED_TO" in line], [["0", "MOVED_TO", "..data", "two"]], setting)
            self.assertIn("1 DELETE_SELF", [" ".join(line.split()[:2]) for line in lines], setting)

    def test_own_changes_are_told_once(self):
        volume = self.volume("volume")
        self.host(volume, "echo aaaa >file")
        task, log = self.watch([(volume, "/volume", "rw")], ["/volume/file", "/volume"])
        start = os.path.getsize(CONTAINERD_LOG)
        task.exec("sh", "-ec", f"cd /volume; {self.CHANGES}", code=0)
        self.assertEqual(log.events("0 DELETE much"), self.EVENTS)
        # However often it writes, nothing comes back.
        self.assertEqual(told(start), 0)
        self.host(volume, "touch done")
        self.assertEqual(log.events("0 CREATE done"), ["0 CREATE done"])

    def test_changes_by_another(self):
        volume = self.volume("volume")
        self.host(volume, "echo aaaa >file")
        task, log = self.watch([(volume, "/volume", "ro")], ["/volume/file", "/volume"])
        self.run_container("sh", "-ec", f"cd /volume; {self.CHANGES}", code=0, options=[
            "--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw"])
        # What is written by a name that is another's when it is told does not count.
        self.assertEqual([line for line in log.events("0 DELETE much") if line.split()[1] not in ("MODIFY", "CLOSE_WRITE")],
                         [line for line in self.EVENTS if line.split()[1] not in ("MODIFY", "CLOSE_WRITE")])
        self.assertEqual(task.exec("ls", "/volume").out.split(), ["file", "lost+found"])


class Pods(Notification, PodCase):
    def test_volume_of_several_containers(self):
        volume = self.in_memory("volume")
        self.host(volume, CONFIG_MAP)
        mounts = [
            {"host_path": program(), "container_path": "/program", "readonly": True},
            {"host_path": self.logs, "container_path": "/logs"},
            {"host_path": volume, "container_path": "/volume", "readonly": True},
        ]
        pod = self.pod()
        logs, containers = [], []
        for _ in range(2):
            log, command = self.watcher("/volume/key", "/volume", "/volume/other")
            containers.append(pod.start(*command, mounts=mounts))
            log.await_line("watching ")
            logs.append(log)

        def update(old, new, word):
            self.host(volume, UPDATE.format(old=old, new=new, word=word))
            for log in logs:
                moved = [line for line in log.await_line("0 DELETE done") if "MOVED_TO" in line]
                self.assertEqual([line.split()[:4] for line in moved], [["0", "MOVED_TO", "..data", word]])

        update(1, 2, "two")
        # The other one is told as before when one has ended.
        self.crictl("rm", "-f", containers[0].id, code=0)
        del logs[0]
        update(2, 3, "three")


def told(start):
    """Of how many changes the shims have told guests since the log was so long."""
    with open(CONTAINERD_LOG, "rb") as file:
        file.seek(start)
        return sum(map(int, re.findall(rb"the guest was told of (\d+) changes", file.read())))
