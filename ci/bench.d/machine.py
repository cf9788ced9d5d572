"""What processes cost in memory, for the programs that measure them."""


def charged_kib(pid):
    """What the memory controller counts for a process's control group: its processes, their page tables and files."""
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
        group = file.read().strip().removeprefix("0::")
    with open(f"/sys/fs/cgroup{group}/memory.current", encoding="ascii") as file:
        return int(file.read()) // 1024
