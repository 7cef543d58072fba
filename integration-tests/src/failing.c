/* A library that is preloaded into a process. While the file MARCO_FAULT_FILE exists, the system calls that it names fail on
 * files whose path contains MARCO_FAULT_OF: "fsync" and "write" with an I/O error, and "readonly" as on a file system that the
 * kernel has made read-only after an error. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static int asked(const char *what, const char *path) {
    char word[16] = "";
    const char *fault = getenv("MARCO_FAULT_FILE"), *of = getenv("MARCO_FAULT_OF");
    int file = fault ? syscall(SYS_openat, AT_FDCWD, fault, O_RDONLY) : -1;
    if (file < 0) return 0;
    syscall(SYS_read, file, word, sizeof word - 1);
    syscall(SYS_close, file);
    return strcmp(word, what) == 0 && of && strstr(path, of);
}
static int fails(int fd, const char *what, int error) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!asked(what, path)) return 0;
    errno = error;
    return 1;
}
int fsync(int fd) { return fails(fd, "fsync", EIO) ? -1 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return fails(fd, "fsync", EIO) ? -1 : (int)syscall(SYS_fdatasync, fd); }
ssize_t write(int fd, const void *from, size_t count) {
    return fails(fd, "write", EIO) || fails(fd, "readonly", EROFS) ? -1 : syscall(SYS_write, fd, from, count);
}
ssize_t pwrite64(int fd, const void *from, size_t count, off_t at) {
    return fails(fd, "write", EIO) || fails(fd, "readonly", EROFS) ? -1 : syscall(SYS_pwrite64, fd, from, count, at);
}
ssize_t pwrite(int fd, const void *from, size_t count, off_t at) { return pwrite64(fd, from, count, at); }
int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    if ((flags & O_ACCMODE) != O_RDONLY && asked("readonly", path)) {
        errno = EROFS;
        return -1;
    }
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    return open(path, flags, mode);
}
