/* How many operations on names a folder takes: `metadata FOLDER FILES` creates empty files in a new folder there, asks for
 * the status of each, lists the folder, and removes them, and prints what each of these takes: its name and operations per
 * second. */

#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void create(const char *name) {
    int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
    if (fd < 0 || close(fd) != 0)
        err(1, "create %s", name);
}

static void status(const char *name) {
    struct stat found;
    if (stat(name, &found) != 0)
        err(1, "stat %s", name);
}

static void remove_it(const char *name) {
    if (unlink(name) != 0)
        err(1, "unlink %s", name);
}

static void each(const char *what, void (*operation)(const char *), long files) {
    char name[32];
    double begun = now();
    for (long i = 0; i < files; i++) {
        snprintf(name, sizeof name, "file-%ld", i);
        operation(name);
    }
    printf("%s %.1f\n", what, files / (now() - begun));
}

/* Entries per second, with the kind of each, as `find` asks for it. */
static void list(long files) {
    double begun = now();
    long found = 0;
    DIR *dir = opendir(".");
    if (!dir)
        err(1, "opendir");
    for (struct dirent *entry; (entry = readdir(dir));)
        found += entry->d_type == DT_REG;
    closedir(dir);
    if (found != files)
        errx(1, "the folder lists %ld files of %ld", found, files);
    printf("readdir %.1f\n", files / (now() - begun));
}

int main(int argc, char **argv) {
    long files = argc == 3 ? atol(argv[2]) : 0;
    if (files < 1)
        errx(2, "usage: metadata FOLDER FILES");
    if (chdir(argv[1]) != 0 || mkdir("names", 0755) != 0 || chdir("names") != 0)
        err(1, "a folder in %s", argv[1]);
    each("create", create, files);
    each("stat", status, files);
    list(files);
    each("unlink", remove_it, files);
    if (rmdir("../names") != 0)
        err(1, "remove the folder");
}
