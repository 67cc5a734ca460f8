/* Makes one call of the file system fail, for a process that loads this before the C library.

   FAULT_UNDER    calls for paths below this one are counted
   FAULT_COUNTS   file to which the counts are written when the process ends
   FAULT_CALL     name of the call that fails
   FAULT_NUMBER   which of its calls, from 1 on
   FAULT_LASTING  whether all later ones fail, too
   FAULT_ERROR    errno that it fails with; 0: reads and writes are cut short instead
   FAULT_HIT      file that is made when it has failed                                        */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *const NAMES[] = {"open",   "read",   "write",  "fsync", "allocate",
                                    "rename", "unlink", "rmdir",  "mkdir"};
enum { OPEN, READ, WRITE, FSYNC, ALLOCATE, RENAME, UNLINK, RMDIR, MKDIR, CALLS };
static atomic_long counts[CALLS];

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int below(const char *path) {
    const char *top = getenv("FAULT_UNDER");
    char whole[PATH_MAX * 2];
    if (!top || !path) return 0;
    if (path[0] != '/') {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(whole, sizeof whole, "%s/%s", here, path);
        path = whole;
    }
    size_t length = strlen(top);
    return strncmp(path, top, length) == 0 && path[length] == '/';
}

static int open_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static void touch(const char *path) {
    REAL(int, "open", const char *, int, ...);
    int descriptor = path ? real(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600) : -1;
    if (descriptor >= 0) close(descriptor);
}

/* Counts a call; returns -1 where it is to go on, else the errno that it fails with. */
static int fault(int call) {
    long number = atomic_fetch_add(&counts[call], 1) + 1;
    const char *name = getenv("FAULT_CALL"), *which = getenv("FAULT_NUMBER");
    if (!name || !which || strcmp(name, NAMES[call])) return -1;
    long first = atol(which);
    if (number < first || (number > first && !getenv("FAULT_LASTING"))) return -1;
    touch(getenv("FAULT_HIT"));
    return atoi(getenv("FAULT_ERROR"));
}

__attribute__((destructor)) static void report(void) {
    const char *path = getenv("FAULT_COUNTS");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    for (int call = 0; call < CALLS; call++)
        fprintf(file, "%s %ld\n", NAMES[call], atomic_load(&counts[call]));
    fclose(file);
}

#define FAIL(call, counted, failed) \
    if (counted) { \
        int error = fault(call); \
        if (error > 0) { errno = error; return failed; } \
    }

#define CUT(call, counted, size) \
    if (counted) { \
        int error = fault(call); \
        if (error > 0) { errno = error; return -1; } \
        if (error == 0 && size > 1) size /= 2; \
    }

#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        FAIL(OPEN, below(path), -1) \
        return real(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

#define WRITING_AT(name, offset_type) \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, offset_type); \
        CUT(WRITE, open_below(descriptor), size) \
        return real(descriptor, data, size, offset); \
    }
WRITING_AT(pwrite, off_t)
WRITING_AT(pwrite64, off64_t)

#define READING_AT(name, offset_type) \
    ssize_t name(int descriptor, void *data, size_t size, offset_type offset) { \
        REAL(ssize_t, #name, int, void *, size_t, offset_type); \
        CUT(READ, open_below(descriptor), size) \
        return real(descriptor, data, size, offset); \
    }
READING_AT(pread, off_t)
READING_AT(pread64, off64_t)

#define READING_PARTS(name, offset_type) \
    ssize_t name(int descriptor, const struct iovec *parts, int count, offset_type offset) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, offset_type); \
        struct iovec first = parts[0]; \
        if (count != 1) return real(descriptor, parts, count, offset); \
        CUT(READ, open_below(descriptor), first.iov_len) \
        return real(descriptor, &first, 1, offset); \
    }
READING_PARTS(preadv, off_t)
READING_PARTS(preadv64, off64_t)

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    CUT(WRITE, open_below(descriptor), size)
    return real(descriptor, data, size);
}

ssize_t read(int descriptor, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    CUT(READ, open_below(descriptor), size)
    return real(descriptor, data, size);
}

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    FAIL(FSYNC, open_below(descriptor), -1)
    return real(descriptor);
}

#define ALLOCATING(name, offset_type) \
    int name(int descriptor, offset_type start, offset_type size) { \
        REAL(int, #name, int, offset_type, offset_type); \
        if (open_below(descriptor)) { \
            int error = fault(ALLOCATE); \
            if (error > 0) return error; \
        } \
        return real(descriptor, start, size); \
    }
ALLOCATING(posix_fallocate, off_t)
ALLOCATING(posix_fallocate64, off64_t)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    FAIL(RENAME, below(from), -1)
    return real(from, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    FAIL(RENAME, below(from), -1)
    return real(from_folder, from, to_folder, to, flags);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    FAIL(UNLINK, below(path), -1)
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    int counted = path[0] == '/' || folder == AT_FDCWD ? below(path) : open_below(folder);
    if (flags & AT_REMOVEDIR) {
        FAIL(RMDIR, counted, -1)
    } else {
        FAIL(UNLINK, counted, -1)
    }
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    FAIL(RMDIR, below(path), -1)
    return real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    FAIL(MKDIR, below(path), -1)
    return real(path, mode);
}
