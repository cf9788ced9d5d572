// Watches files by inotify, for the tests of what a container is told of the host's changes:
//
//     watch LOG FILE PATH...
//
// Appends a line to LOG for each event: which PATH, counted from 0, the events, the name, and what FILE holds at that
// moment, opened anew and by a descriptor that was opened before. A first line says that it watches.

#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

static const struct {
    unsigned bit;
    const char *name;
} EVENTS[] = {
    {IN_MODIFY, "MODIFY"},           {IN_ATTRIB, "ATTRIB"},         {IN_CLOSE_WRITE, "CLOSE_WRITE"},
    {IN_MOVED_FROM, "MOVED_FROM"},   {IN_MOVED_TO, "MOVED_TO"},     {IN_CREATE, "CREATE"},
    {IN_DELETE, "DELETE"},           {IN_DELETE_SELF, "DELETE_SELF"}, {IN_MOVE_SELF, "MOVE_SELF"},
    {IN_IGNORED, "IGNORED"},         {IN_Q_OVERFLOW, "Q_OVERFLOW"}, {IN_UNMOUNT, "UNMOUNT"},
    {IN_ISDIR, "ISDIR"},
};

static const unsigned WANTED = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVE | IN_CREATE | IN_DELETE | IN_DELETE_SELF |
                               IN_MOVE_SELF;

// The beginning of an open file as one word, or "-".
static void content(int fd, char *word, size_t size) {
    ssize_t len = fd < 0 ? -1 : pread(fd, word, size - 1, 0);
    word[len > 0 ? len : 0] = 0;
    word[strcspn(word, " \n")] = 0;
    if (!*word)
        strcpy(word, "-");
}

int main(int argc, char **argv) {
    if (argc < 4)
        errx(2, "usage: watch LOG FILE PATH...");
    int log = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0644);
    int notify = inotify_init();
    if (log < 0 || notify < 0)
        err(1, "%s, inotify", argv[1]);
    int *watches = calloc(argc, sizeof *watches);
    for (int i = 3; i < argc; i++)
        if ((watches[i] = inotify_add_watch(notify, argv[i], WANTED)) < 0)
            err(1, "%s", argv[i]);
    int held = open(argv[2], O_RDONLY);
    char first[64], again[64];
    content(held, first, sizeof first);
    dprintf(log, "watching %s\n", first);

    char buffer[1 << 16] __attribute__((aligned(8)));
    for (;;) {
        ssize_t len = read(notify, buffer, sizeof buffer);
        if (len <= 0)
            err(1, "read");
        const struct inotify_event *event;
        for (char *at = buffer; at < buffer + len; at += sizeof *event + event->len) {
            event = (const struct inotify_event *)at;
            char line[1024];
            int which = 3, used;
            while (which < argc && watches[which] != event->wd)
                which++;
            used = snprintf(line, sizeof line, "%d ", which - 3);
            const char *comma = "";
            for (size_t i = 0; i < sizeof EVENTS / sizeof *EVENTS; i++)
                if (event->mask & EVENTS[i].bit) {
                    used += snprintf(line + used, sizeof line - used, "%s%s", comma, EVENTS[i].name);
                    comma = ",";
                }
            int fd = open(argv[2], O_RDONLY);
            content(fd, first, sizeof first);
            close(fd);
            content(held, again, sizeof again);
            dprintf(log, "%s %s %s %s\n", line, event->len ? event->name : ".", first, again);
        }
    }
}
