/* Counts the calls by which a process changes files below one folder, and ends the process at the n-th.

   Preloaded into the process under test (LD_PRELOAD); fault_arm chooses the folder, n, and what happens there. The
   process ends before the call is made, or with half of the bytes written where it is a write. With an error number the
   call fails instead, and with LASTING all that follow it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long seen, at;
static int failure, lasting;

void fault_arm(const char *path, long n, int error, int lasts) {
    seen = 0; at = n; failure = error; lasting = lasts;
    snprintf(folder, sizeof folder, "%s", path);
}
long fault_count(void) { return seen; }

static int below(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int concerns(int dir, const char *path) {
    char link[64], full[2 * PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/' || dir == AT_FDCWD) return below(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t length = readlink(link, full, PATH_MAX);
    if (length < 0) return 0;
    snprintf(full + length, PATH_MAX, "/%s", path);
    return below(full);
}

static int concerns_fd(int fd) {
    char link[64], full[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, full, sizeof full - 1);
    if (length < 0) return 0;
    full[length] = 0;
    return below(full);
}

static void end(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* 0 for a call that is to be made, 1 for one that fails, 2 for one at which the process ends. */
static int fate(void) {
    long number = __sync_add_and_fetch(&seen, 1);
    if (!at || number < at || (number > at && !(lasting && failure))) return 0;
    if (!failure) return 2;
    errno = failure;
    return 1;
}

/* Whether a call fails; does not return where the process ends before it. */
static int due(void) {
    int what = fate();
    if (what == 2) end();
    return what;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name)) dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

#define OPEN(name) int name(const char *path, int flags, ...) { REAL(name); MODE(flags) \
    if (CHANGES(flags) && concerns(AT_FDCWD, path) && due()) return -1; \
    return real(path, flags, mode); }
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { REAL(name); MODE(flags) \
    if (CHANGES(flags) && concerns(dir, path) && due()) return -1; \
    return real(dir, path, flags, mode); }
#define FOPEN(name) FILE *name(const char *path, const char *how) { REAL(name); \
    if (strpbrk(how, "wa+") && concerns(AT_FDCWD, path) && due()) return NULL; \
    return real(path, how); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)

#define PATHS(name, given, test, ...) int name given { REAL(name); \
    return (test) && due() ? -1 : real(__VA_ARGS__); }
PATHS(rename, (const char *a, const char *b), concerns(AT_FDCWD, a) || concerns(AT_FDCWD, b), a, b)
PATHS(renameat, (int c, const char *a, int d, const char *b), concerns(c, a) || concerns(d, b), c, a, d, b)
PATHS(renameat2, (int c, const char *a, int d, const char *b, unsigned f), concerns(c, a) || concerns(d, b), c, a, d, b, f)
PATHS(link, (const char *a, const char *b), concerns(AT_FDCWD, b), a, b)
PATHS(symlink, (const char *a, const char *b), concerns(AT_FDCWD, b), a, b)
PATHS(unlink, (const char *a), concerns(AT_FDCWD, a), a)
PATHS(unlinkat, (int d, const char *a, int f), concerns(d, a), d, a, f)
PATHS(rmdir, (const char *a), concerns(AT_FDCWD, a), a)
PATHS(mkdir, (const char *a, mode_t m), concerns(AT_FDCWD, a), a, m)
PATHS(mkdirat, (int d, const char *a, mode_t m), concerns(d, a), d, a, m)
PATHS(truncate, (const char *a, off_t n), concerns(AT_FDCWD, a), a, n)
PATHS(truncate64, (const char *a, off64_t n), concerns(AT_FDCWD, a), a, n)
PATHS(ftruncate, (int f, off_t n), concerns_fd(f), f, n)
PATHS(ftruncate64, (int f, off64_t n), concerns_fd(f), f, n)
PATHS(fallocate, (int f, int m, off_t o, off_t n), concerns_fd(f), f, m, o, n)
PATHS(fallocate64, (int f, int m, off64_t o, off64_t n), concerns_fd(f), f, m, o, n)
PATHS(posix_fallocate, (int f, off_t o, off_t n), concerns_fd(f), f, o, n)
PATHS(posix_fallocate64, (int f, off64_t o, off64_t n), concerns_fd(f), f, o, n)
PATHS(fsync, (int f), concerns_fd(f), f)
PATHS(fdatasync, (int f), concerns_fd(f), f)

#define WRITES(name, given, first, ...) ssize_t name given { REAL(name); \
    int what = concerns_fd(fd) ? fate() : 0; if (what == 1) return -1; \
    if (what == 2) { first; end(); } \
    return real(__VA_ARGS__); }
WRITES(write, (int fd, const void *bytes, size_t n), real(fd, bytes, n / 2), fd, bytes, n)
WRITES(pwrite, (int fd, const void *bytes, size_t n, off_t o), real(fd, bytes, n / 2, o), fd, bytes, n, o)
WRITES(pwrite64, (int fd, const void *bytes, size_t n, off64_t o), real(fd, bytes, n / 2, o), fd, bytes, n, o)
WRITES(writev, (int fd, const struct iovec *parts, int n), real(fd, parts, n / 2), fd, parts, n)
