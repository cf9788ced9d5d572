"""Containers made by ctr on the machine that is measured, and what they cost it, for the programs that measure."""

import subprocess
import sys

IMAGE = "husk.test/busybox:latest"


def run(*argv):
    """What a command says, which must succeed."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def pid_of(name):
    """The pid of a container's task: with husk the worker's."""
    rows = map(str.split, run("ctr", "task", "ls").splitlines())
    return next(int(pid) for task, pid, *_ in rows if task == name)


def remove(name):
    """Removes a container, whatever it does."""
    subprocess.run(["ctr", "task", "rm", "-f", name], check=False, capture_output=True)
    subprocess.run(["ctr", "c", "rm", name], check=False, capture_output=True)


def charged_kib(pid):
    """What the memory controller counts for a process's control group: its processes, their page tables and files."""
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
        group = file.read().strip().removeprefix("0::")
    with open(f"/sys/fs/cgroup{group}/memory.current", encoding="ascii") as file:
        return int(file.read()) // 1024
