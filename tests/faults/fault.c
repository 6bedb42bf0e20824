/* Counts the file operations of a process below a folder, and strikes one of them.

   Loaded by LD_PRELOAD, it stands before libc's functions that change files. A control file, mapped
   by every process of a command, says which folder, which operation to strike and how, and takes a
   line for each operation. It is named in the variable FAULT_CONTROL when a program starts, or given
   to `fault_arm` by one that runs already.

   An operation is the n-th of its process. The process that was armed is called "0", the one it
   forks first "0.1", that one's second "0.1.2": names that do not depend on who is quicker. A killed
   write has put half of its bytes there. A disk that is full from the operation on is so for every
   process, and for what takes room.

   Not seen: writes through a mapping, those of a C stream once it is open, and what calls the kernel
   without libc. Of these cola_train has one: the name that safetensors gives to what it has written
   (tests/faults/test_library.py compares with strace). */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL, FAIL_EIO, FAIL_ENOSPC, FULL };

#define NAME 64
#define LOG (1 << 20)

/* As in tests/faults/library.py. */
struct control {
    char folder[4096]; /* a real path, without a slash at its end */
    char process[NAME];
    uint32_t mode, at;
    atomic_uint struck, logged;
    char log[LOG];
};

static struct control *control;
static char name[NAME];
static unsigned children;
static atomic_uint count;

static void before_fork(void) { children++; }

static void after_fork(void)
{
    size_t length = strlen(name);
    snprintf(name + length, NAME - length, ".%u", children);
    children = 0;
    atomic_store(&count, 0);
}

/* Take the control file at `path`; every process forked from here on has it too. Its lock is held
   until the last of them has ended. */
int fault_arm(const char *path)
{
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0 || flock(file, LOCK_SH))
        return -1;
    struct control *found =
        mmap(NULL, sizeof *found, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (found == MAP_FAILED)
        return -1;
    strcpy(name, "0");
    children = 0;
    atomic_store(&count, 0);
    pthread_atfork(before_fork, NULL, after_fork);
    control = found;
    return 0;
}

__attribute__((constructor)) static void load(void)
{
    const char *path = getenv("FAULT_CONTROL");
    if (path != NULL && fault_arm(path) == 0)
        strcpy(name, "exec"); /* of one that started a program: none of ours does */
}

/* `path` without the folder if it lies below it, else NULL. */
static const char *below(const char *path)
{
    size_t length = strlen(control->folder);
    if (strncmp(path, control->folder, length) || (path[length] != '/' && path[length]))
        return NULL;
    return path[length] ? path + length + 1 : ".";
}

static int of_descriptor(int file, char *path)
{
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* The real path of what `at` and `path` name; its last part is not followed. */
static int real(int at, const char *path, char *out)
{
    char whole[2 * PATH_MAX] = "", folder[PATH_MAX];
    if (path[0] != '/') {
        if (at == AT_FDCWD ? getcwd(whole, PATH_MAX) == NULL : !of_descriptor(at, whole))
            return 0;
        strcat(whole, "/");
    }
    if (strlen(path) >= PATH_MAX)
        return 0;
    strcat(whole, path);
    size_t end = strlen(whole);
    while (end > 1 && whole[end - 1] == '/')
        whole[--end] = 0;
    char *last = strrchr(whole, '/');
    *last = 0;
    if (realpath(*whole ? whole : "/", folder) == NULL)
        return 0;
    return snprintf(out, PATH_MAX, "%s/%s", folder[1] ? folder : "", last + 1) < PATH_MAX;
}

static void tell(unsigned number, const char *operation, const char *path, int strikes)
{
    char line[PATH_MAX + 128];
    int length = snprintf(line, sizeof line, "%s\t%u\t%s\t%s\t%s\n", name, number, operation, path,
                          strikes ? "struck" : "");
    unsigned start = atomic_fetch_add(&control->logged, length);
    if (start + length <= LOG)
        memcpy(control->log + start, line, length);
}

static int takes_room(const char *operation)
{
    static const char *const all[] = {"create", "write", "mkdir", "link", "truncate", "allocate"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(operation, all[i]) == 0)
            return 1;
    return 0;
}

/* Count an operation; what it is to fail with, or 0. To be killed is -1. */
static int strike(const char *operation, const char *path)
{
    const char *place = below(path);
    if (place == NULL)
        return 0;
    unsigned number = atomic_fetch_add(&count, 1) + 1;
    int strikes = control->mode != OFF && number == control->at &&
                  strcmp(name, control->process) == 0;
    tell(number, operation, place, strikes);
    if (control->mode == FULL && (strikes || atomic_load(&control->struck)) && takes_room(operation)) {
        atomic_store(&control->struck, 1);
        return ENOSPC;
    }
    if (!strikes)
        return 0;
    atomic_store(&control->struck, 1);
    if (control->mode == FULL)
        return 0;
    if (control->mode == KILL)
        return -1;
    return control->mode == FAIL_EIO ? EIO : ENOSPC;
}

static int ends(int error)
{
    if (error < 0) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;)
            pause();
    }
    if (error)
        errno = error;
    return error;
}

static int strike_at(const char *operation, int at, const char *path)
{
    char place[PATH_MAX];
    int before = errno, error = 0;
    if (control != NULL && path != NULL && real(at, path, place))
        error = strike(operation, place);
    errno = before;
    return error;
}

static int strike_file(const char *operation, int file)
{
    char place[PATH_MAX];
    int before = errno, error = 0;
    if (control != NULL && of_descriptor(file, place))
        error = strike(operation, place);
    errno = before;
    return error;
}

static int strike_open(int at, const char *path, int flags)
{
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC)))
        return 0;
    return ends(strike_at(flags & O_CREAT ? "create" : "open", at, path));
}

static int do_open(int at, const char *path, int flags, mode_t mode)
{
    if (strike_open(at, path, flags))
        return -1;
    return syscall(SYS_openat, at, path, flags, mode);
}

#define MODE(last)                                                                                 \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                         \
        va_list rest;                                                                              \
        va_start(rest, last);                                                                      \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

int open(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return do_open(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return do_open(at, path, flags, mode); }
int __open_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __openat_2(int at, const char *path, int flags) { return do_open(at, path, flags, 0); }
int __openat64_2(int at, const char *path, int flags) { return do_open(at, path, flags, 0); }
int creat(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static FILE *do_fopen(const char *function, const char *path, const char *how)
{
    FILE *(*next)(const char *, const char *) = dlsym(RTLD_NEXT, function);
    int writes = strpbrk(how, "wa+") != NULL, creates = strpbrk(how, "wa") != NULL;
    if (strike_open(AT_FDCWD, path, writes ? O_RDWR | (creates ? O_CREAT : 0) : O_RDONLY))
        return NULL;
    return next(path, how);
}

FILE *fopen(const char *path, const char *how) { return do_fopen("fopen", path, how); }
FILE *fopen64(const char *path, const char *how) { return do_fopen("fopen64", path, how); }

/* Operations of a file that is open. */
#define ON_FILE(type, function, operation, call, parameters)                                       \
    type function parameters                                                                       \
    {                                                                                              \
        if (ends(strike_file(operation, file)))                                                    \
            return -1;                                                                             \
        return syscall call;                                                                       \
    }

/* Writes: one that is killed has written half, `half`. */
#define WRITE(type, function, call, half, parameters)                                              \
    type function parameters                                                                       \
    {                                                                                              \
        int error = strike_file("write", file);                                                    \
        if (error < 0)                                                                             \
            syscall half;                                                                          \
        if (ends(error))                                                                           \
            return -1;                                                                             \
        return syscall call;                                                                       \
    }

WRITE(ssize_t, write, (SYS_write, file, data, size), (SYS_write, file, data, size / 2),
      (int file, const void *data, size_t size))
WRITE(ssize_t, pwrite, (SYS_pwrite64, file, data, size, at), (SYS_pwrite64, file, data, size / 2, at),
      (int file, const void *data, size_t size, off_t at))
WRITE(ssize_t, pwrite64, (SYS_pwrite64, file, data, size, at), (SYS_pwrite64, file, data, size / 2, at),
      (int file, const void *data, size_t size, off64_t at))
WRITE(ssize_t, writev, (SYS_writev, file, parts, number), (SYS_writev, file, parts, number / 2),
      (int file, const struct iovec *parts, int number))
WRITE(ssize_t, pwritev, (SYS_pwritev, file, parts, number, at, 0), (SYS_pwritev, file, parts, number / 2, at, 0),
      (int file, const struct iovec *parts, int number, off_t at))
WRITE(ssize_t, pwritev64, (SYS_pwritev, file, parts, number, at, 0), (SYS_pwritev, file, parts, number / 2, at, 0),
      (int file, const struct iovec *parts, int number, off64_t at))
WRITE(ssize_t, sendfile, (SYS_sendfile, file, from, at, size), (SYS_sendfile, file, from, at, size / 2),
      (int file, int from, off_t *at, size_t size))
WRITE(ssize_t, sendfile64, (SYS_sendfile, file, from, at, size), (SYS_sendfile, file, from, at, size / 2),
      (int file, int from, off64_t *at, size_t size))
WRITE(ssize_t, copy_file_range, (SYS_copy_file_range, from, at, file, to, size, flags),
      (SYS_copy_file_range, from, at, file, to, size / 2, flags),
      (int from, off64_t *at, int file, off64_t *to, size_t size, unsigned flags))

ON_FILE(int, fsync, "fsync", (SYS_fsync, file), (int file))
ON_FILE(int, fdatasync, "fsync", (SYS_fdatasync, file), (int file))
ON_FILE(int, ftruncate, "truncate", (SYS_ftruncate, file, size), (int file, off_t size))
ON_FILE(int, ftruncate64, "truncate", (SYS_ftruncate, file, size), (int file, off64_t size))
ON_FILE(int, fallocate, "allocate", (SYS_fallocate, file, mode, at, size), (int file, int mode, off_t at, off_t size))
ON_FILE(int, fallocate64, "allocate", (SYS_fallocate, file, mode, at, size), (int file, int mode, off64_t at, off64_t size))
ON_FILE(int, fchmod, "chmod", (SYS_fchmod, file, mode), (int file, mode_t mode))

static int do_fallocate(int file, off_t at, off_t size)
{
    int error = ends(strike_file("allocate", file));
    return error ? error : syscall(SYS_fallocate, file, 0, at, size) ? errno : 0;
}
int posix_fallocate(int file, off_t at, off_t size) { return do_fallocate(file, at, size); }
int posix_fallocate64(int file, off64_t at, off64_t size) { return do_fallocate(file, at, size); }

/* Of one that could be written; as on Linux it is closed whatever is said. */
int close(int file)
{
    int before = errno, error = 0, flags = control == NULL ? -1 : fcntl(file, F_GETFL);
    errno = before;
    if (flags >= 0 && !(flags & O_PATH) && (flags & O_ACCMODE) != O_RDONLY)
        error = strike_file("close", file);
    if (error < 0)
        ends(error);
    int closed = syscall(SYS_close, file);
    return ends(error) ? -1 : closed;
}

/* Operations of a name. */
#define ON_NAME(function, operation, at, path, call, parameters)                                   \
    int function parameters                                                                        \
    {                                                                                              \
        if (ends(strike_at(operation, at, path)))                                                  \
            return -1;                                                                             \
        return syscall call;                                                                       \
    }

ON_NAME(unlink, "unlink", AT_FDCWD, path, (SYS_unlinkat, AT_FDCWD, path, 0), (const char *path))
ON_NAME(rmdir, "rmdir", AT_FDCWD, path, (SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR), (const char *path))
ON_NAME(unlinkat, flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path, (SYS_unlinkat, at, path, flags),
        (int at, const char *path, int flags))
ON_NAME(mkdir, "mkdir", AT_FDCWD, path, (SYS_mkdirat, AT_FDCWD, path, mode), (const char *path, mode_t mode))
ON_NAME(mkdirat, "mkdir", at, path, (SYS_mkdirat, at, path, mode), (int at, const char *path, mode_t mode))
ON_NAME(truncate, "truncate", AT_FDCWD, path, (SYS_truncate, path, size), (const char *path, off_t size))
ON_NAME(truncate64, "truncate", AT_FDCWD, path, (SYS_truncate, path, size), (const char *path, off64_t size))
ON_NAME(chmod, "chmod", AT_FDCWD, path, (SYS_fchmodat, AT_FDCWD, path, mode), (const char *path, mode_t mode))
ON_NAME(symlink, "link", AT_FDCWD, path, (SYS_symlinkat, target, AT_FDCWD, path), (const char *target, const char *path))
ON_NAME(symlinkat, "link", at, path, (SYS_symlinkat, target, at, path), (const char *target, int at, const char *path))
ON_NAME(link, "link", AT_FDCWD, path, (SYS_linkat, AT_FDCWD, old, AT_FDCWD, path, 0), (const char *old, const char *path))
ON_NAME(linkat, "link", at, path, (SYS_linkat, from, old, at, path, flags),
        (int from, const char *old, int at, const char *path, int flags))
ON_NAME(rename, "rename", AT_FDCWD, path, (SYS_renameat2, AT_FDCWD, old, AT_FDCWD, path, 0),
        (const char *old, const char *path))
ON_NAME(renameat, "rename", at, path, (SYS_renameat2, from, old, at, path, 0),
        (int from, const char *old, int at, const char *path))
ON_NAME(renameat2, "rename", at, path, (SYS_renameat2, from, old, at, path, flags),
        (int from, const char *old, int at, const char *path, unsigned flags))
