// What pjdfstest does not ask of a file system and programs rely on: extended attributes, ACLs, locks, holes, unlinked
// files, times, devices. Each question is a process in a folder of its own below the working directory, and ends in a line
// as pjdfstest writes them.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <grp.h>
#include <time.h>
#include <unistd.h>

// Ends the question with the expression that is not true.
#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        if (!(what)) {                                                                                                 \
            fprintf(answer, "line %d: %s: %s\n", __LINE__, #what, strerror(errno));                                    \
            fflush(answer);                                                                                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)
#define FAILS(call, number) CHECK((call) == -1 && errno == (number))

static FILE *answer;
static const char *self;

// A new file with this in it, open for reading and writing.
static int file(const char *name, const char *text)
{
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    return fd;
}

static struct stat status(const char *name)
{
    struct stat got;
    CHECK(lstat(name, &got) == 0);
    return got;
}

// The status that a child ends with.
static int child(void (*work)(void))
{
    int got;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        work();
        _exit(0);
    }
    CHECK(waitpid(pid, &got, 0) == pid);
    return got;
}

static void become(uid_t uid, gid_t gid)
{
    CHECK(setgroups(0, NULL) == 0 && setresgid(gid, gid, gid) == 0 && setresuid(uid, uid, uid) == 0);
}

// --- extended attributes and ACLs

static void xattr_user(void)
{
    char got[64];
    file("f", "");
    FAILS(getxattr("f", "user.a", got, sizeof got), ENODATA);
    FAILS(setxattr("f", "user.a", "1", 1, XATTR_REPLACE), ENODATA);
    CHECK(setxattr("f", "user.a", "one", 3, XATTR_CREATE) == 0);
    FAILS(setxattr("f", "user.a", "1", 1, XATTR_CREATE), EEXIST);
    CHECK(setxattr("f", "user.empty", "", 0, 0) == 0);
    CHECK(getxattr("f", "user.a", got, sizeof got) == 3 && memcmp(got, "one", 3) == 0);
    CHECK(getxattr("f", "user.a", NULL, 0) == 3);
    FAILS(getxattr("f", "user.a", got, 2), ERANGE);
    CHECK(getxattr("f", "user.empty", got, sizeof got) == 0);
    CHECK(listxattr("f", NULL, 0) == 18);
    FAILS(listxattr("f", got, 5), ERANGE);
    CHECK(listxattr("f", got, sizeof got) == 18);
    CHECK(removexattr("f", "user.a") == 0);
    FAILS(removexattr("f", "user.a"), ENODATA);
}

static void xattr_of_open_unlinked_file(void)
{
    char got[8];
    int fd = file("f", "");
    CHECK(fsetxattr(fd, "user.a", "1", 1, 0) == 0);
    CHECK(unlink("f") == 0);
    CHECK(fgetxattr(fd, "user.a", got, sizeof got) == 1);
    CHECK(fsetxattr(fd, "user.b", "2", 1, 0) == 0);
}

static void xattr_limits(void)
{
    static char large[65537];
    file("f", "");
    CHECK(setxattr("f", "user.a", large, 2000, 0) == 0);
    FAILS(setxattr("f", "user.b", large, 65536, 0), ENOSPC);
    FAILS(setxattr("f", "user.b", large, 65537, 0), E2BIG);
    char name[300] = "user.";
    memset(name + 5, 'n', 250);
    CHECK(setxattr("f", name, "1", 1, 0) == 0);
    name[255] = 'n';
    FAILS(setxattr("f", name, "1", 1, 0), ERANGE);
}

static void xattr_of_special_files(void)
{
    CHECK(symlink("nowhere", "l") == 0 && mkfifo("p", 0644) == 0 && mkdir("d", 0755) == 0);
    FAILS(lsetxattr("l", "user.a", "1", 1, 0), EPERM);
    FAILS(setxattr("p", "user.a", "1", 1, 0), EPERM);
    CHECK(setxattr("d", "user.a", "1", 1, 0) == 0);
    FAILS(setxattr("d", "unknown.a", "1", 1, 0), EOPNOTSUPP);
}

static void xattr_trusted(void)
{
    char got[8];
    file("f", "");
    FAILS(setxattr("f", "trusted.a", "1", 1, 0), EPERM);
    FAILS(getxattr("f", "trusted.a", got, sizeof got), ENODATA);
}

// Version 2, effective, CAP_NET_BIND_SERVICE.
static const uint32_t capability[] = {0x02000001, 1 << 10, 0, 0, 0};

static void xattr_capability(void)
{
    uint32_t got[6];
    int fd = file("f", "");
    CHECK(setxattr("f", "security.capability", capability, sizeof capability, 0) == 0);
    CHECK(getxattr("f", "security.capability", got, sizeof got) == sizeof capability);
    CHECK(memcmp(got, capability, sizeof capability) == 0);
    // A write takes them away.
    CHECK(write(fd, "x", 1) == 1);
    FAILS(getxattr("f", "security.capability", got, sizeof got), ENODATA);
}

static void capability_ends_with_chown(void)
{
    uint32_t got[6];
    file("f", "");
    CHECK(setxattr("f", "security.capability", capability, sizeof capability, 0) == 0);
    CHECK(chown("f", 1000, 1000) == 0);
    FAILS(getxattr("f", "security.capability", got, sizeof got), ENODATA);
}

// linux/posix_acl_xattr.h
struct entry {
    uint16_t tag, perm;
    uint32_t id;
};
static const struct {
    uint32_t version;
    struct entry entries[5];
} acl = {2, {{1, 6, -1}, {2, 6, 1000}, {4, 0, -1}, {16, 6, -1}, {32, 0, -1}}};

static void opens_as_alice(void)
{
    become(1000, 1000);
    CHECK(open("f", O_RDWR) >= 0);
}

static void opens_not_as_alice(void)
{
    become(1000, 1000);
    FAILS(open("f", O_RDWR), EACCES);
}

static void acl_access(void)
{
    CHECK(chmod(".", 0755) == 0);
    file("f", "");
    CHECK(chmod("f", 0600) == 0);
    CHECK(child(opens_not_as_alice) == 0);
    CHECK(setxattr("f", "system.posix_acl_access", &acl, sizeof acl, 0) == 0);
    CHECK((status("f").st_mode & 0777) == 0660);
    CHECK(child(opens_as_alice) == 0);
    // The group's bits are the mask.
    CHECK(chmod("f", 0600) == 0);
    CHECK(child(opens_not_as_alice) == 0);
    CHECK(removexattr("f", "system.posix_acl_access") == 0);
}

static void acl_default(void)
{
    char got[256];
    umask(077);
    CHECK(chmod(".", 0755) == 0);
    CHECK(setxattr(".", "system.posix_acl_default", &acl, sizeof acl, 0) == 0);
    CHECK(close(open("f", O_CREAT | O_WRONLY, 0666)) == 0);
    CHECK(getxattr("f", "system.posix_acl_access", got, sizeof got) == sizeof acl);
    // The umask does not count then.
    CHECK((status("f").st_mode & 0777) == 0660);
    CHECK(child(opens_as_alice) == 0);
    CHECK(mkdir("d", 0777) == 0);
    CHECK(getxattr("d", "system.posix_acl_default", got, sizeof got) == sizeof acl);
    CHECK((status("d").st_mode & 0777) == 0660);
}

static void umask_counts(void)
{
    umask(027);
    CHECK(close(open("f", O_CREAT | O_WRONLY, 0666)) == 0);
    CHECK((status("f").st_mode & 0777) == 0640);
    CHECK(mkdir("d", 0777) == 0 && (status("d").st_mode & 0777) == 0750);
    CHECK(mkfifo("p", 0666) == 0 && (status("p").st_mode & 0777) == 0640);
}

// --- locks

static void lock_is_taken(void)
{
    int fd = open("f", O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 1};
    CHECK(fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_WRLCK && lock.l_pid == getppid() && lock.l_len == 10);
    lock = (struct flock){.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 1};
    FAILS(fcntl(fd, F_SETLK, &lock), EAGAIN);
    lock.l_start = 10;
    CHECK(fcntl(fd, F_SETLK, &lock) == 0);
}

static void locks_posix(void)
{
    int fd = file("f", "0123456789abcdef");
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 10};
    CHECK(fcntl(fd, F_SETLK, &lock) == 0);
    CHECK(child(lock_is_taken) == 0);
}

static void locks_flock(void)
{
    int one = file("f", ""), two = open("f", O_RDWR);
    CHECK(flock(one, LOCK_EX) == 0);
    FAILS(flock(two, LOCK_SH | LOCK_NB), EAGAIN);
    CHECK(flock(one, LOCK_SH) == 0 && flock(two, LOCK_SH | LOCK_NB) == 0);
}

static void locks_ofd(void)
{
    int one = file("f", "0123456789"), two = open("f", O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 5};
    CHECK(fcntl(one, F_OFD_SETLK, &lock) == 0);
    FAILS(fcntl(two, F_OFD_SETLK, &lock), EAGAIN);
    CHECK(close(one) == 0 && fcntl(two, F_OFD_SETLK, &lock) == 0);
}

static void lease(void)
{
    int fd = file("f", "");
    CHECK(fcntl(fd, F_SETLEASE, F_WRLCK) == 0 && fcntl(fd, F_GETLEASE) == F_WRLCK);
}

// --- data

static void direct_io(void)
{
    char *page = aligned_alloc(4096, 8192);
    memset(page, 'a', 8192);
    int fd = open("f", O_RDWR | O_CREAT | O_DIRECT, 0644);
    CHECK(fd >= 0);
    CHECK(pwrite(fd, page, 8192, 0) == 8192);
    memset(page, 0, 8192);
    CHECK(pread(fd, page, 4096, 4096) == 4096 && page[0] == 'a' && page[4095] == 'a');
    // What another descriptor has in the page cache is seen.
    int cached = open("f", O_RDWR);
    CHECK(pwrite(cached, "b", 1, 0) == 1 && pread(fd, page, 4096, 0) == 4096 && page[0] == 'b' && page[1] == 'a');
    page[0] = 'c';
    CHECK(pwrite(fd, page, 4096, 0) == 4096 && pread(cached, page, 1, 0) == 1 && page[0] == 'c');
    CHECK(fcntl(cached, F_SETFL, O_DIRECT) == 0);
}

static void tmpfile_linked(void)
{
    char path[64];
    int fd = open(".", O_TMPFILE | O_RDWR, 0600);
    CHECK(fd >= 0);
    CHECK(write(fd, "text", 4) == 4);
    sprintf(path, "/proc/self/fd/%d", fd);
    CHECK(linkat(AT_FDCWD, path, AT_FDCWD, "f", AT_SYMLINK_FOLLOW) == 0);
    CHECK(status("f").st_size == 4 && status("f").st_nlink == 1);
}

static void holes(void)
{
    int fd = file("f", "");
    CHECK(pwrite(fd, "data", 4, 1 << 20) == 4 && ftruncate(fd, 2 << 20) == 0 && fsync(fd) == 0);
    CHECK(lseek(fd, 0, SEEK_DATA) == 1 << 20);
    CHECK(lseek(fd, 0, SEEK_HOLE) == 0);
    CHECK(lseek(fd, 1 << 20, SEEK_HOLE) == (1 << 20) + 4096);
    FAILS(lseek(fd, (1 << 20) + 4096, SEEK_DATA), ENXIO);
    FAILS(lseek(fd, 3 << 20, SEEK_DATA), ENXIO);
    CHECK(status("f").st_blocks <= 16);
}

static void fallocate_modes(void)
{
    char got[4];
    int fd = file("f", "");
    CHECK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 65536) == 0);
    CHECK(status("f").st_size == 0 && status("f").st_blocks >= 128);
    CHECK(pwrite(fd, "data", 4, 0) == 4 && pwrite(fd, "data", 4, 8192) == 4);
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) == 0);
    CHECK(pread(fd, got, 4, 0) == 4 && memcmp(got, "\0\0\0", 4) == 0);
    CHECK(fallocate(fd, FALLOC_FL_ZERO_RANGE, 8192, 8192) == 0);
    CHECK(pread(fd, got, 4, 8192) == 4 && memcmp(got, "\0\0\0", 4) == 0);
    CHECK(status("f").st_size == 16384);
}

static void fallocate_collapse(void)
{
    char got[4];
    int fd = file("f", "");
    CHECK(ftruncate(fd, 65536) == 0 && pwrite(fd, "data", 4, 4096) == 4);
    CHECK(fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 0, 4096) == 0);
    CHECK(pread(fd, got, 4, 0) == 4 && memcmp(got, "data", 4) == 0);
    CHECK(fallocate(fd, FALLOC_FL_INSERT_RANGE, 0, 4096) == 0);
    CHECK(status("f").st_size == 65536);
}

static void copies(void)
{
    char got[4];
    int from = file("from", "0123456789"), to = file("to", "");
    loff_t start = 2;
    CHECK(copy_file_range(from, &start, to, NULL, 4, 0) == 4 && start == 6);
    CHECK(pread(to, got, 4, 0) == 4 && memcmp(got, "2345", 4) == 0);
    CHECK(lseek(from, 0, SEEK_SET) == 0 && sendfile(to, from, NULL, 10) == 10);
    CHECK(status("to").st_size == 14);
}

static void shared_mapping(void)
{
    char got[4];
    int fd = file("f", "0123456789");
    char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED);
    CHECK(pwrite(fd, "write", 5, 0) == 5 && memcmp(map, "write", 5) == 0);
    memcpy(map, "mmap", 4);
    CHECK(pread(fd, got, 4, 0) == 4 && memcmp(got, "mmap", 4) == 0);
    CHECK(msync(map, 4096, MS_SYNC) == 0);
    CHECK(ftruncate(fd, 2) == 0 && map[2] == 0);
}

static void append(void)
{
    char got[7] = "";
    int one = file("f", ""), two = open("f", O_WRONLY | O_APPEND), three = open("f", O_WRONLY | O_APPEND);
    CHECK(write(two, "ab", 2) == 2 && write(three, "cd", 2) == 2 && write(two, "ef", 2) == 2);
    CHECK(pread(one, got, 6, 0) == 6 && strcmp(got, "abcdef") == 0);
    CHECK(fcntl(one, F_SETFL, O_APPEND) == 0 && lseek(one, 0, SEEK_SET) == 0 && write(one, "g", 1) == 1);
    CHECK(status("f").st_size == 7);
}

static void far_offsets(void)
{
    int fd = file("f", "");
    CHECK(pwrite(fd, "x", 1, 5LL << 30) == 1 && status("f").st_size == (5LL << 30) + 1);
    FAILS(ftruncate(fd, 1LL << 62), EFBIG);
    FAILS(pwrite(fd, "x", 1, 1LL << 62), EFBIG);
}

static void size_limit(void)
{
    struct rlimit limit = {4096, 4096};
    int fd = file("f", "");
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(pwrite(fd, "0123456789", 10, 4090) == 6);
    FAILS(pwrite(fd, "x", 1, 4096), EFBIG);
    FAILS(ftruncate(fd, 4097), EFBIG);
}

static void synced(void)
{
    int fd = file("f", "data"), folder = open(".", O_RDONLY | O_DIRECTORY);
    CHECK(fsync(fd) == 0 && fdatasync(fd) == 0 && fsync(folder) == 0 && syncfs(fd) == 0);
    CHECK(sync_file_range(fd, 0, 4, SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) == 0);
    CHECK(pwritev2(fd, &(struct iovec){"more", 4}, 1, 4, RWF_DSYNC) == 4);
}

// --- names

static void unlinked_but_open(void)
{
    char path[64], got[4];
    int fd = file("f", "data");
    CHECK(unlink("f") == 0);
    struct stat now;
    CHECK(fstat(fd, &now) == 0 && now.st_nlink == 0 && now.st_size == 4);
    CHECK(pwrite(fd, "more", 4, 4) == 4 && pread(fd, got, 4, 4) == 4 && memcmp(got, "more", 4) == 0);
    CHECK(ftruncate(fd, 2) == 0 && fchmod(fd, 0600) == 0 && fchown(fd, 1000, 1000) == 0 && fsync(fd) == 0);
    CHECK(futimens(fd, (struct timespec[]){{1, 2}, {3, 4}}) == 0 && fallocate(fd, 0, 0, 8192) == 0);
    CHECK(fstat(fd, &now) == 0 && now.st_size == 8192 && now.st_uid == 1000 && now.st_mtim.tv_nsec != 4);
    sprintf(path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDONLY);
    CHECK(again >= 0);
    CHECK(pread(again, got, 2, 0) == 2 && memcmp(got, "da", 2) == 0);
    FAILS(linkat(AT_FDCWD, path, AT_FDCWD, "g", AT_SYMLINK_FOLLOW), ENOENT);
}

static void replaced_but_open(void)
{
    char got[3];
    int fd = file("f", "old");
    file("g", "new");
    CHECK(rename("g", "f") == 0);
    struct stat now;
    CHECK(pread(fd, got, 3, 0) == 3 && memcmp(got, "old", 3) == 0 && fstat(fd, &now) == 0 && now.st_nlink == 0);
}

static void removed_folder(void)
{
    CHECK(mkdir("d", 0755) == 0 && chdir("d") == 0 && rmdir("../d") == 0);
    FAILS(open("f", O_CREAT | O_WRONLY, 0644), ENOENT);
    struct stat now;
    CHECK(stat(".", &now) == 0 && now.st_nlink == 0);
}

static void rename_flags(void)
{
    file("a", "a"), file("bb", "bb");
    FAILS(renameat2(AT_FDCWD, "a", AT_FDCWD, "bb", RENAME_NOREPLACE), EEXIST);
    CHECK(renameat2(AT_FDCWD, "a", AT_FDCWD, "c", RENAME_NOREPLACE) == 0);
    CHECK(renameat2(AT_FDCWD, "c", AT_FDCWD, "bb", RENAME_EXCHANGE) == 0);
    CHECK(status("c").st_size == 2 && status("bb").st_size == 1);
    FAILS(renameat2(AT_FDCWD, "c", AT_FDCWD, "none", RENAME_EXCHANGE), ENOENT);
    CHECK(mkdir("d", 0755) == 0 && renameat2(AT_FDCWD, "c", AT_FDCWD, "d", RENAME_EXCHANGE) == 0);
    CHECK(S_ISDIR(status("c").st_mode) && S_ISREG(status("d").st_mode));
}

static void rename_whiteout(void)
{
    file("a", "");
    CHECK(renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_WHITEOUT) == 0);
    CHECK(S_ISCHR(status("a").st_mode) && status("a").st_rdev == 0);
}

static void names_of_any_bytes(void)
{
    char name[257] = "";
    for (int i = 0; i < 255; i++)
        name[i] = (char)(i % 2 ? 0xff - i / 2 : 1 + i / 2 % 40);
    CHECK(close(open(name, O_CREAT | O_EXCL | O_WRONLY, 0644)) == 0);
    DIR *folder = opendir(".");
    struct dirent *entry;
    int found = 0;
    while ((entry = readdir(folder)))
        found += strcmp(entry->d_name, name) == 0 && entry->d_ino == status(name).st_ino && entry->d_type == DT_REG;
    CHECK(found == 1);
    CHECK(unlink(name) == 0);
    memset(name, 'n', 256);
    FAILS(open(name, O_CREAT | O_WRONLY, 0644), ENAMETOOLONG);
}

static void large_folder(void)
{
    char name[16];
    for (int i = 0; i < 1000; i++) {
        sprintf(name, "%d", i);
        CHECK(close(open(name, O_CREAT | O_WRONLY, 0644)) == 0);
    }
    // Back to a place in the middle.
    DIR *folder = opendir(".");
    struct dirent *entry;
    for (int i = 0; i < 500; i++)
        CHECK(readdir(folder));
    long place = telldir(folder);
    CHECK((entry = readdir(folder)));
    strcpy(name, entry->d_name);
    while (readdir(folder))
        ;
    seekdir(folder, place);
    CHECK((entry = readdir(folder)) && strcmp(entry->d_name, name) == 0);
    // Emptied while it is read.
    rewinddir(folder);
    int removed = 0;
    while ((entry = readdir(folder)))
        if (entry->d_name[0] != '.') {
            CHECK(unlink(entry->d_name) == 0);
            removed++;
        }
    CHECK(removed == 1000);
}

static void links(void)
{
    file("a", "data");
    ino_t inode = status("a").st_ino;
    CHECK(link("a", "b") == 0);
    CHECK(status("a").st_nlink == 2 && status("b").st_nlink == 2 && status("b").st_ino == inode);
    CHECK(rename("a", "c") == 0 && status("c").st_ino == inode);
    CHECK(unlink("c") == 0 && status("b").st_nlink == 1 && status("b").st_ino == inode);
    CHECK(symlink("b", "s") == 0 && status("s").st_size == 1);
    CHECK(mkdir("d", 0755) == 0 && mkdir("d/e", 0755) == 0 && status("d").st_nlink == 3);
}

static void handles(void)
{
    struct {
        struct file_handle head;
        char rest[MAX_HANDLE_SZ];
    } handle = {.head.handle_bytes = MAX_HANDLE_SZ};
    int mount;
    file("f", "");
    CHECK(name_to_handle_at(AT_FDCWD, "f", &handle.head, &mount, 0) == 0);
}

// --- times and flags

static void times(void)
{
    file("f", "data");
    struct timespec want[] = {{1000000000, 123456789}, {2000000000, 987654321}};
    CHECK(utimensat(AT_FDCWD, "f", want, 0) == 0);
    struct stat got = status("f");
    CHECK(got.st_atim.tv_sec == 1000000000 && got.st_atim.tv_nsec == 123456789);
    CHECK(got.st_mtim.tv_sec == 2000000000 && got.st_mtim.tv_nsec == 987654321);
    // Before 1970, and after 2038.
    want[0] = (struct timespec){-1000000, 5}, want[1] = (struct timespec){5000000000, 6};
    CHECK(utimensat(AT_FDCWD, "f", want, 0) == 0);
    got = status("f");
    CHECK(got.st_atim.tv_sec == -1000000 && got.st_mtim.tv_sec == 5000000000 && got.st_mtim.tv_nsec == 6);
}

static int later(struct timespec a, struct timespec b)
{
    return a.tv_sec > b.tv_sec || (a.tv_sec == b.tv_sec && a.tv_nsec > b.tv_nsec);
}

static void times_move(void)
{
    char got;
    struct timespec tick = {.tv_nsec = 20000000};
    int fd = file("f", "data");
    struct stat before = status("f"), folder = status(".");
    nanosleep(&tick, NULL);
    CHECK(pwrite(fd, "x", 1, 0) == 1);
    struct stat after = status("f");
    CHECK(later(after.st_mtim, before.st_mtim) && later(after.st_ctim, before.st_ctim));
    before = after;
    nanosleep(&tick, NULL);
    CHECK(chmod("f", 0600) == 0);
    after = status("f");
    CHECK(later(after.st_ctim, before.st_ctim) && !later(after.st_mtim, before.st_mtim));
    CHECK(link("f", "g") == 0 && later(status(".").st_mtim, folder.st_mtim));
    // relatime
    CHECK(futimens(fd, (struct timespec[]){{1000, 0}, {2000, 0}}) == 0);
    CHECK(pread(fd, &got, 1, 0) == 1 && status("f").st_atim.tv_sec > 2000);
    // What is written through a mapping.
    char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED);
    before = status("f");
    nanosleep(&tick, NULL);
    map[0] = 'm';
    CHECK(msync(map, 4096, MS_SYNC) == 0 && later(status("f").st_mtim, before.st_mtim));
}

static void birth(void)
{
    struct statx got;
    file("f", "");
    CHECK(statx(AT_FDCWD, "f", 0, STATX_BTIME, &got) == 0);
    CHECK((got.stx_mask & STATX_BTIME) && got.stx_btime.tv_sec > 0);
}

static void inode_flags(void)
{
    int flags = 0, fd = file("f", "");
    CHECK(ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0);
    flags |= FS_NODUMP_FL;
    CHECK(ioctl(fd, FS_IOC_SETFLAGS, &flags) == 0);
}

static void statfs_tells(void)
{
    struct statfs got;
    CHECK(statfs(".", &got) == 0);
    CHECK(got.f_blocks > 1000 && got.f_bfree <= got.f_blocks && got.f_files > 1000 && got.f_namelen == 255);
    CHECK(got.f_bsize == 4096 && status(".").st_blksize == 4096);
}

static void noatime(void)
{
    char got;
    CHECK(close(file("f", "data")) == 0);
    CHECK(utimensat(AT_FDCWD, "f", (struct timespec[]){{1000, 0}, {2000, 0}}, 0) == 0);
    int fd = open("f", O_RDONLY | O_NOATIME);
    CHECK(fd >= 0);
    CHECK(read(fd, &got, 1) == 1 && status("f").st_atim.tv_sec == 1000);
}

// --- users

static void alice_makes(void)
{
    gid_t groups[] = {44};
    CHECK(setgroups(1, groups) == 0 && setresgid(1000, 1000, 1000) == 0 && setresuid(1000, 1000, 1000) == 0);
    // By right of a supplementary group.
    CHECK(close(open("f", O_CREAT | O_EXCL | O_WRONLY, 0644)) == 0);
    CHECK(mkdir("d", 0755) == 0 && mkfifo("p", 0644) == 0 && symlink("f", "s") == 0);
    CHECK(chown("f", -1, 44) == 0);
    FAILS(chown("f", 0, -1), EPERM);
    FAILS(open("/share/none", O_CREAT | O_WRONLY, 0644), EACCES);
    FAILS(mknod("c", S_IFCHR | 0644, makedev(1, 3)), EPERM);
}

static void files_of_users(void)
{
    CHECK(chown(".", 0, 44) == 0 && chmod(".", 0775) == 0);
    CHECK(child(alice_makes) == 0);
    CHECK(status("f").st_uid == 1000 && status("f").st_gid == 44 && status("d").st_gid == 1000);
    CHECK(status("p").st_uid == 1000 && status("s").st_uid == 1000);
}

static void setgid_folder(void)
{
    CHECK(chown(".", 0, 44) == 0 && chmod(".", 02775) == 0);
    CHECK(mkdir("d", 0755) == 0 && close(open("f", O_CREAT | O_WRONLY, 0644)) == 0);
    CHECK(status("d").st_gid == 44 && (status("d").st_mode & S_ISGID) && status("f").st_gid == 44);
}

static void alice_writes(void)
{
    become(1000, 1000);
    int fd = open("f", O_WRONLY);
    CHECK(write(fd, "x", 1) == 1);
}

static void setuid_ends_with_write(void)
{
    CHECK(chmod(".", 0755) == 0);
    CHECK(close(file("f", "data")) == 0);
    CHECK(chmod("f", 06777) == 0 && child(alice_writes) == 0 && (status("f").st_mode & 07777) == 0777);
    CHECK(chmod("f", 06777) == 0 && chown("f", 1000, 1000) == 0 && (status("f").st_mode & 07777) == 0777);
}

// --- other than files

static void devices(void)
{
    char got[4] = "abc";
    CHECK(mknod("c", S_IFCHR | 0666, makedev(1, 5)) == 0 && status("c").st_rdev == makedev(1, 5));
    CHECK(mknod("b", S_IFBLK | 0666, makedev(250, 70000)) == 0 && status("b").st_rdev == makedev(250, 70000));
    CHECK(mknod("w", S_IFCHR | 0, 0) == 0 && status("w").st_rdev == 0);
    int fd = open("c", O_RDONLY);
    CHECK(fd >= 0);
    CHECK(read(fd, got, 4) == 4 && memcmp(got, "\0\0\0", 4) == 0);
}

static void connects(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un there = {AF_UNIX, "socket"};
    CHECK(connect(fd, (struct sockaddr *)&there, sizeof there) == 0 && write(fd, "hi", 2) == 2);
}

static void sockets(void)
{
    char got[2];
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un here = {AF_UNIX, "socket"};
    CHECK(bind(fd, (struct sockaddr *)&here, sizeof here) == 0 && S_ISSOCK(status("socket").st_mode));
    CHECK(listen(fd, 1) == 0 && child(connects) == 0);
    CHECK(read(accept(fd, NULL, NULL), got, 2) == 2);
    FAILS(bind(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&here, sizeof here), EADDRINUSE);
}

static void writes_to_pipe(void)
{
    CHECK(write(open("p", O_WRONLY), "hi", 2) == 2);
}

static void pipes(void)
{
    char got[2];
    CHECK(mkfifo("p", 0644) == 0);
    int fd = open("p", O_RDONLY | O_NONBLOCK);
    CHECK(child(writes_to_pipe) == 0 && read(fd, got, 2) == 2);
}

static void watches(void)
{
    char got[1024];
    int fd = inotify_init1(IN_NONBLOCK);
    CHECK(inotify_add_watch(fd, ".", IN_CREATE | IN_MOVED_TO | IN_DELETE) > 0);
    file("f", "");
    CHECK(rename("f", "g") == 0 && unlink("g") == 0);
    struct inotify_event *event = (struct inotify_event *)got;
    CHECK(read(fd, got, sizeof got) == 3 * (ssize_t)(sizeof *event + 16) && event->mask == IN_CREATE);
}

static void runs(void)
{
    execl("./program", "program", "0", NULL);
}

static void programs(void)
{
    int from = open(self, O_RDONLY), to = open("program", O_CREAT | O_WRONLY, 0755);
    struct stat size;
    CHECK(fstat(from, &size) == 0 && sendfile(to, from, NULL, size.st_size) == size.st_size);
    FAILS(execl("./program", "program", "0", NULL), ETXTBSY);
    CHECK(close(to) == 0 && child(runs) == 0);
    CHECK(chmod("program", 0644) == 0);
    FAILS(execl("./program", "program", "0", NULL), EACCES);
}

#define QUESTION(name) {#name, name}
static const struct {
    const char *name;
    void (*ask)(void);
} questions[] = {
    QUESTION(xattr_user),
    QUESTION(xattr_of_open_unlinked_file),
    QUESTION(xattr_limits),
    QUESTION(xattr_of_special_files),
    QUESTION(xattr_trusted),
    QUESTION(xattr_capability),
    QUESTION(capability_ends_with_chown),
    QUESTION(acl_access),
    QUESTION(acl_default),
    QUESTION(umask_counts),
    QUESTION(locks_posix),
    QUESTION(locks_flock),
    QUESTION(locks_ofd),
    QUESTION(lease),
    QUESTION(direct_io),
    QUESTION(tmpfile_linked),
    QUESTION(holes),
    QUESTION(fallocate_modes),
    QUESTION(fallocate_collapse),
    QUESTION(copies),
    QUESTION(shared_mapping),
    QUESTION(append),
    QUESTION(far_offsets),
    QUESTION(size_limit),
    QUESTION(synced),
    QUESTION(unlinked_but_open),
    QUESTION(replaced_but_open),
    QUESTION(removed_folder),
    QUESTION(rename_flags),
    QUESTION(rename_whiteout),
    QUESTION(names_of_any_bytes),
    QUESTION(large_folder),
    QUESTION(links),
    QUESTION(handles),
    QUESTION(times),
    QUESTION(times_move),
    QUESTION(birth),
    QUESTION(inode_flags),
    QUESTION(statfs_tells),
    QUESTION(noatime),
    QUESTION(files_of_users),
    QUESTION(setgid_folder),
    QUESTION(setuid_ends_with_write),
    QUESTION(devices),
    QUESTION(sockets),
    QUESTION(pipes),
    QUESTION(watches),
    QUESTION(programs),
};

int main(int argc, char **argv)
{
    // As sleep(1), which pjdfstest copies under names of its own: busybox does not know what it is to do by these.
    if (argc > 1)
        return (int)sleep((unsigned)atoi(argv[1]));
    self = argv[0];
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < sizeof questions / sizeof *questions; i++) {
        const char *name = questions[i].name;
        int ended;
        answer = tmpfile();
        if (!answer) {
            perror("tmpfile");
            return 1;
        }
        pid_t pid = fork();
        if (pid == 0) {
            umask(0);
            CHECK(mkdir(name, 0755) == 0 && chdir(name) == 0);
            questions[i].ask();
            _exit(0);
        }
        if (pid < 0 || waitpid(pid, &ended, 0) != pid) {
            perror(name);
            return 1;
        }
        if (ended == 0) {
            printf("files::%s ok\n", name);
        } else {
            char why[512] = "";
            rewind(answer);
            if (!fgets(why, sizeof why, answer))
                sprintf(why, "ended with status %#x\n", ended);
            printf("files::%s FAILED\n\t%s", name, why);
        }
        fclose(answer);
    }
    return 0;
}
