// The inner loops of bench/fs.sh, free of an interpreter's own time.
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 4)
        errx(2, "usage: files create|stat|unlink DIRECTORY COUNT; files random FILE COUNT");
    const char *work = argv[1], *path = argv[2];
    long count = atol(argv[3]);
    static char block[4096];

    if (!strcmp(work, "random")) {
        int fd = open(path, O_RDONLY);
        struct stat st;
        if (fd < 0 || fstat(fd, &st) || st.st_size < (off_t)sizeof block)
            err(1, "%s", path);
        // Without this the kernel reads ahead, which random reads have nothing of.
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
        uint64_t state = 88172645463325252u;
        for (long i = 0; i < count; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            off_t at = state % (st.st_size / sizeof block) * sizeof block;
            if (pread(fd, block, sizeof block, at) != sizeof block)
                err(1, "%s at %jd", path, (intmax_t)at);
        }
        return 0;
    }
    if (!strcmp(work, "create") && mkdir(path, 0755))
        err(1, "%s", path);
    if (chdir(path))
        err(1, "%s", path);
    for (long i = 0; i < count; i++) {
        char name[32];
        struct stat st;
        snprintf(name, sizeof name, "file-%06ld", i);
        if (!strcmp(work, "create")) {
            int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
            if (fd < 0 || write(fd, block, 100) != 100 || close(fd))
                err(1, "%s", name);
        } else if (!strcmp(work, "stat")) {
            if (stat(name, &st) || st.st_size != 100)
                err(1, "%s", name);
        } else if (unlink(name)) {
            err(1, "%s", name);
        }
    }
    if (!strcmp(work, "unlink") && (chdir("/") || rmdir(path)))
        err(1, "%s", path);
    return 0;
}
