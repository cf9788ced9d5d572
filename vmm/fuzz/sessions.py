#!/usr/bin/env python3
"""What programs do with files, for the seeds of the fuzz targets: see examples/record.rs.

    sessions.py fuse|p9     lists the sessions of a protocol
    sessions.py NAME FOLDER runs one in a folder, which has `file`, `dir/inner` and the link `link`

Each is short, since an input has 256 requests at most, of 4 KiB in all. With 9P not all of it is possible, and what is not is
passed over.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys

LIBC = ctypes.CDLL(None, use_errno=True)

SESSIONS = {}


def session(*protocols):
    """A session of the protocols, or of both."""
    def decorate(function):
        SESSIONS[function.__name__] = (function, protocols or ("fuse", "p9"))
        return function
    return decorate


# What 9P lacks, or its client.
possible = contextlib.suppress(OSError)


def called(name, *arguments):
    """Calls a function of the C library that Python has not."""
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def put(path, content):
    """Writes a file."""
    with open(path, "wb", buffering=0) as file:
        file.write(content)


@contextlib.contextmanager
def opened(path, flags, mode=0o644):
    """An open file."""
    file = os.open(path, flags, mode)
    try:
        yield file
    finally:
        os.close(file)


@session()
def create():
    with opened("new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640) as file:
        os.write(file, b"hello")
        os.fsync(file)
        os.pwrite(file, b"there", 3)
        os.fdatasync(file)
        os.pread(file, 100, 0)
        os.fstat(file)
    os.stat("new")
    with possible, opened("new", os.O_WRONLY | os.O_CREAT | os.O_EXCL):
        pass
    put("new", b"again")


@session()
def read():
    with opened("file", os.O_RDONLY | os.O_NOATIME) as file:
        os.read(file, 4)
        os.read(file, 100)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(file, 10, 2)
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with possible:
                os.lseek(file, 0, whence)
        with possible:
            os.lseek(file, 100, os.SEEK_DATA)
    with possible, opened("file", os.O_RDONLY | os.O_DIRECT) as file, mmap.mmap(-1, 4096) as room:
        os.readv(file, [room])
    with possible:
        os.read(os.open("missing", os.O_RDONLY), 1)


@session()
def write():
    with opened("file", os.O_WRONLY | os.O_APPEND) as file:
        os.write(file, b"more")
    with opened("file", os.O_RDWR | os.O_SYNC) as file:
        os.pwrite(file, b"x", 5000)
        os.ftruncate(file, 4097)
        os.ftruncate(file, 9000)
        os.pread(file, 10, 4990)
    os.truncate("file", 3)
    with opened("file", os.O_WRONLY | os.O_TRUNC) as file:
        os.write(file, b"anew")
    with possible, opened("file", os.O_RDWR | os.O_DIRECT) as file, mmap.mmap(-1, 512) as page:
        os.pwritev(file, [page], 512)


@session()
def mapping():
    with opened("file", os.O_RDWR) as file:
        # What is written is whole pages, but for the last.
        os.ftruncate(file, 200)
        with mmap.mmap(file, 200) as shared:
            shared[100:105] = b"dirty"
            shared.flush()
            shared[0] = 33
    with opened("file", os.O_RDONLY) as file, mmap.mmap(file, 200, mmap.MAP_PRIVATE, mmap.PROT_READ) as private:
        bytes(private)


@session()
def names():
    os.rename("file", "moved")
    os.link("moved", "dir/linked")
    os.stat("dir/linked")
    os.symlink("../moved", "dir/soft")
    os.readlink("dir/soft")
    put("other", b"other")
    os.rename("other", "moved")
    os.rename("dir", "folder")
    os.rename("folder/inner", "inner")
    os.unlink("folder/soft")
    with possible:
        os.unlink("missing")


@session()
def flags_of_rename():
    put("other", b"other")
    for flags in (1, 2):  # RENAME_NOREPLACE, RENAME_EXCHANGE
        with possible:
            called("renameat2", -100, b"file", -100, b"other", flags)
    with possible:
        os.rename("missing", "other")


@session()
def folders():
    os.mkdir("a", 0o1777)
    os.makedirs("a/b/c")
    put("a/b/file", b"")
    for entry in os.scandir("a/b"):
        entry.stat()
    os.listdir(".")
    with possible:
        os.rmdir("a/b")
    os.rename("a/b", "b")
    os.rmdir("b/c")
    os.unlink("b/file")
    os.rmdir("b")
    with opened(".", os.O_RDONLY | os.O_DIRECTORY) as folder:
        os.fsync(folder)
        os.listdir(folder)


@session()
def walk():
    for _ in os.walk("."):
        pass
    subprocess.run(["find", ".", "-ls"], stdout=subprocess.DEVNULL, check=True)


@session()
def removed_folder():
    os.mkdir("a")
    os.chdir("a")
    os.rmdir("../a")
    for use in (os.listdir, os.stat, os.mkdir):
        with possible:
            use("." if use is not os.mkdir else "b")
    os.chdir("..")


@session()
def attributes():
    os.chmod("file", 0o600)
    with possible:
        os.chown("file", 1000, 1000)
    os.utime("file", ns=(-1, 1_000_000_001))
    os.utime("file")
    os.chown("link", 1, 1, follow_symlinks=False)
    os.statvfs("file")
    subprocess.run(["stat", "-f", "."], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["stat", "file", "link"], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["ls", "-la"], stdout=subprocess.DEVNULL, check=True)
    os.access("file", os.W_OK)


@session()
def extended_attributes():
    os.setxattr("file", "user.name", b"value")
    os.setxattr("file", "user.name", b"other", os.XATTR_REPLACE)
    os.getxattr("file", "user.name")
    os.listxattr("file")
    os.removexattr("file", "user.name")
    for name in ("user.name", "trusted.name"):
        with possible:
            os.getxattr("file", name)
    with possible:
        os.setxattr("file", "trusted.name", b"value")
    with possible:
        os.setxattr("file", "user.empty", b"")


@session()
def acls():
    # Version 2: the owner rw, user 1000 r, the group r, the mask r, others nothing.
    none = b"\xff" * 4
    entries = [(1, 6, none), (2, 4, b"\xe8\x03\0\0"), (4, 4, none), (16, 4, none), (32, 0, none)]
    acl = b"\2\0\0\0" + b"".join(bytes([tag, 0, rights, 0]) + who for tag, rights, who in entries)
    with possible:
        os.setxattr("file", "system.posix_acl_access", acl)
        os.getxattr("file", "system.posix_acl_access")
        os.setxattr("dir", "system.posix_acl_default", acl)
    put("dir/inherits", b"")
    os.stat("dir/inherits")
    os.mkdir("dir/folder")
    os.chmod("file", 0o640)


@session()
def locks():
    with opened("file", os.O_RDWR) as file:
        # One after the other: with 9P they are of one kind.
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
        fcntl.lockf(file, fcntl.LOCK_UN, 10)
        # l_type, l_whence, l_start, l_len: what keeps who wants to write from all of it.
        fcntl.fcntl(file, fcntl.F_GETLK, b"\1\0" + bytes(30))


@session("fuse")
def allocate():
    with opened("file", os.O_RDWR) as file:
        os.posix_fallocate(file, 0, 20000)
        # FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE.
        for mode in (1, 3, 16, 17):
            called("fallocate", file, mode, ctypes.c_long(4096), ctypes.c_long(4096))
        for whence in (os.SEEK_HOLE, os.SEEK_DATA):
            with possible:
                os.lseek(file, 100, whence)


@session()
def unlinked():
    with opened("file", os.O_RDWR) as file:
        os.unlink("file")
        os.pread(file, 100, 0)
        os.pwrite(file, b"still there", 0)
        os.fsync(file)
        os.fstat(file)
        with possible:
            os.ftruncate(file, 5)
        with possible:
            os.fchmod(file, 0o600)
    put("file", b"another")
    with opened("file", os.O_RDONLY) as file:
        put("over", b"it")
        os.rename("over", "file")
        os.read(file, 100)


@session("fuse")
def unnamed():
    with opened("dir", os.O_RDWR | os.O_TMPFILE) as file:
        os.write(file, b"content")
        # AT_FDCWD, AT_SYMLINK_FOLLOW.
        called("linkat", -100, b"/proc/self/fd/%d" % file, -100, b"named", 0x400)
    with opened("named", os.O_RDONLY) as file:
        os.read(file, 10)
    with opened(".", os.O_RDWR | os.O_TMPFILE | os.O_EXCL) as file:
        os.write(file, b"gone")


@session()
def special():
    os.mkfifo("fifo")
    os.mknod("device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod("plain", stat.S_IFREG | 0o600)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("socket")
    with opened("fifo", os.O_RDWR) as file:
        os.write(file, b"x")
    for name in ("fifo", "device", "socket"):
        os.stat(name)
        os.unlink(name)


@session()
def copy():
    with opened("file", os.O_RDONLY) as source, opened("copy", os.O_RDWR | os.O_CREAT) as target:
        with possible:
            os.copy_file_range(source, target, 100, 0, 2)
        os.sendfile(target, source, 0, 100)
    os.mkdir("copied")
    subprocess.run(["cp", "-a", "file", "link", "copied"], check=True)


@session()
def programs():
    put("program", b"#!/bin/sh\nexit 0\n")
    os.chmod("program", 0o755)
    subprocess.run(["./program"], check=True)
    # Whose bits go as somebody else writes to it.
    os.chmod("program", 0o6777)
    if os.fork() == 0:
        os.setgid(1000)
        os.setuid(1000)
        with opened("program", os.O_WRONLY) as file:
            os.write(file, b"#")
            os.ftruncate(file, 1)
        os._exit(0)
    os.wait()
    os.stat("program")


@session()
def synced():
    put("new", b"content")
    os.mkdir("folder")
    with opened(".", os.O_RDONLY) as folder:
        os.fsync(folder)
        called("syncfs", folder)
    os.sync()


@session()
def forgotten():
    for number in range(5):
        put(f"dir/{number}", b"")
    for name in os.listdir("dir"):
        os.stat(f"dir/{name}")
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("2")
    os.stat("dir/3")
    with opened("dir/3", os.O_RDONLY) as file:
        os.unlink("dir/3")
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as caches:
            caches.write("3")
        os.fstat(file)


def host(change):
    """The host changes something: see Folder::change in src/lib.rs."""
    os.write(1, bytes([change]))
    os.read(0, 1)


WRITE, REMOVE, RENAME, BACK, MAKE_FOLDER, REMOVE_FOLDER, RENAME_FOLDER, _, LINK, REMOVE_LINK = range(10)

# The groups of notices: NoticeGids::EXAMPLE.
CHANGED, CREATED, GONE_FILE, GONE_FOLDER, MOVED_FILE, MOVED_FOLDER = range(1, 7)


@contextlib.contextmanager
def notice(group):
    """What is done is what the guest's agent does: guest-agent/src/changes.rs."""
    os.setegid(group)
    try:
        yield
    finally:
        os.setegid(0)


def place():
    """The folder in which something has changed."""
    with notice(CHANGED):
        return os.open("dir", os.O_PATH | os.O_DIRECTORY)


@session("fuse")
def host_removes():
    with opened("dir/inner", os.O_RDONLY) as file:
        host(REMOVE)
        os.fstat(file)
    for use in (os.stat, os.listxattr, os.unlink):
        with possible:
            use("dir/inner")
    host(WRITE)
    with possible, opened("dir/inner", os.O_RDONLY) as file:
        os.read(file, 10)


@session("fuse")
def host_renames():
    os.stat("dir/inner")
    with opened("dir/inner", os.O_PATH) as file:
        host(RENAME)
        with possible:
            os.fstat(file)
    with possible:
        os.chmod("dir/inner", 0o600)
    os.stat("dir/moved")
    host(BACK)
    os.listdir("dir")


@session("fuse")
def host_links():
    host(LINK)
    with opened("dir/link", os.O_RDONLY) as file:
        os.read(file, 10)
    os.readlink("dir/link")
    host(REMOVE_LINK)
    host(LINK)
    with possible:
        os.readlink("dir/link")


@session("fuse")
def notices_of_changes():
    os.stat("dir/inner")
    host(WRITE)
    with opened("dir/inner", os.O_PATH) as file:
        found = os.fstat(file)
        with notice(CHANGED):
            os.utime(f"/proc/self/fd/{file}", ns=(found.st_atime_ns, found.st_mtime_ns))
            # Alone, that of the content.
            called("utimensat", file, b"", (ctypes.c_long * 4)(0, 0x3ffffffe, found.st_mtime_ns // 10**9, 0), 0x1000)
    with notice(CHANGED), possible, opened("dir/inner", os.O_WRONLY | os.O_NONBLOCK):
        pass
    with opened("dir/inner", os.O_RDONLY) as file:
        os.read(file, 10)


@session("fuse")
def notices_of_what_is_new():
    os.stat("dir")
    folder = place()
    host(REMOVE)
    host(WRITE)
    host(MAKE_FOLDER)
    host(LINK)
    with notice(CREATED):
        os.mknod("inner", stat.S_IFREG, dir_fd=folder)
        os.symlink("anything", "link", dir_fd=folder)
        for name in ("sub", "gone-again"):
            os.mkdir(name, 0, dir_fd=folder)
    os.listdir("dir")


@session("fuse")
def notices_of_what_is_gone():
    os.stat("dir/inner")
    host(MAKE_FOLDER)
    os.stat("dir/sub")
    folder = place()
    with opened("dir/inner", os.O_RDONLY):
        host(REMOVE)
        host(REMOVE_FOLDER)
        with notice(GONE_FILE):
            os.unlink("inner", dir_fd=folder)
        with notice(GONE_FOLDER):
            os.rmdir("sub", dir_fd=folder)
        with notice(GONE_FILE), possible:
            os.unlink("never", dir_fd=folder)
    os.listdir("dir")


@session("fuse")
def notices_of_what_has_moved():
    os.stat("dir/inner")
    host(MAKE_FOLDER)
    os.stat("dir/sub")
    folder = place()
    host(RENAME)
    with notice(MOVED_FILE), possible:
        os.rename("inner", "moved", src_dir_fd=folder, dst_dir_fd=folder)
    os.stat("dir/moved")
    host(BACK)
    host(RENAME_FOLDER)
    with notice(MOVED_FOLDER), possible:
        os.rename("sub", "moved", src_dir_fd=folder, dst_dir_fd=folder)
    # From elsewhere, and to elsewhere.
    with notice(MOVED_FILE):
        with possible:
            os.rename(".from-elsewhere", "inner", dst_dir_fd=folder)
        with possible:
            os.rename("inner", ".to-elsewhere", src_dir_fd=folder)
    os.listdir("dir")


def main():
    if len(sys.argv) == 2:
        print("\n".join(name for name, (_, protocols) in SESSIONS.items() if sys.argv[1] in protocols))
        return
    name, folder = sys.argv[1:]
    os.chdir(folder)
    os.umask(0o022)
    SESSIONS[name][0]()
    os.chdir("/")


main()
