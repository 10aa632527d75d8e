/* A disk that fills up. Preload this library into a process, and the n-th call that writes below a folder fails with
 * ENOSPC, in Python and in libraries of C++ or Rust. Other calls do not change.
 *
 *   FULL_DISK_FOLDER  the folder, absolute and without links
 *   FULL_DISK_AT      n, from 1; 0 or unset: no call fails
 *   FULL_DISK_ONCE    any value: later calls work; unset: the disk stays full
 *   FULL_DISK_ERROR   errno of another error: read-only, damaged
 *   FULL_DISK_LOG     a file outside the folder that gets a line for each such call
 *
 * The environment is read at each call, so a process may change it.
 */
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
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_long calls;

static void note(long number, const char *what, const char *path, long bytes, int fails)
{
    const char *log = getenv("FULL_DISK_LOG");
    char line[PATH_MAX + 80];
    if (!log)
        return;
    int length = snprintf(line, sizeof line, "%ld %s %ld %s%s\n", number, what, bytes, path, fails ? " FULL" : "");
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file >= 0) {
        syscall(SYS_write, file, line, (size_t)length);
        syscall(SYS_close, file);
    }
}

/* Return whether a call on a path fails; set errno if it does. */
static int full(const char *what, const char *path, long bytes)
{
    const char *folder = getenv("FULL_DISK_FOLDER"), *at = getenv("FULL_DISK_AT");
    size_t length = folder ? strlen(folder) : 0;
    if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/'))
        return 0;
    int before = errno;
    long number = atomic_fetch_add(&calls, 1) + 1, first = at ? atol(at) : 0;
    int fails = first > 0 && (getenv("FULL_DISK_ONCE") ? number == first : number >= first);
    note(number, what, path, bytes, fails);
    const char *error = getenv("FULL_DISK_ERROR");
    errno = !fails ? before : error ? atoi(error) : ENOSPC;
    return fails;
}

static int full_file(const char *what, int file, long bytes)
{
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0)
        return 0;
    path[length] = 0;
    return full(what, path, bytes);
}

static int full_at(const char *what, int folder, const char *name)
{
    char link[64], path[PATH_MAX * 2];
    if (!name || !getenv("FULL_DISK_FOLDER"))
        return 0;
    if (name[0] == '/')
        return full(what, name, 0);
    int before = errno;
    if (folder == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = before;
    if (length <= 0)
        return 0;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return full(what, path, 0);
}

static int writes(int flags)
{
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        return writes(flags) && full_at("open", AT_FDCWD, path) ? -1 : REAL(name)(path, flags, mode);                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...)                                                             \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        return writes(flags) && full_at("open", folder, path) ? -1 : REAL(name)(folder, path, flags, mode);            \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode)                                                                     \
    {                                                                                                                  \
        return strpbrk(mode, "wa+") && full_at("fopen", AT_FDCWD, path) ? NULL : REAL(name)(path, mode);               \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *data, size_t size)
{
    return full_file("write", file, (long)size) ? -1 : REAL(write)(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count)
{
    return full_file("writev", file, count) ? -1 : REAL(writev)(file, parts, count);
}

#define PWRITE(name, offset_type)                                                                                      \
    ssize_t name(int file, const void *data, size_t size, offset_type offset)                                          \
    {                                                                                                                  \
        return full_file("pwrite", file, (long)size) ? -1 : REAL(name)(file, data, size, offset);                      \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, offset_type)                                                                                    \
    int name(int file, offset_type size)                                                                               \
    {                                                                                                                  \
        return full_file("ftruncate", file, (long)size) ? -1 : REAL(name)(file, size);                                 \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(name, offset_type)                                                                                    \
    int name(int file, offset_type offset, offset_type size)                                                           \
    {                                                                                                                  \
        return full_file("allocate", file, (long)size) ? errno : REAL(name)(file, offset, size);                      \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define FALLOCATE(name, offset_type)                                                                                   \
    int name(int file, int mode, offset_type offset, offset_type size)                                                 \
    {                                                                                                                  \
        return full_file("fallocate", file, (long)size) ? -1 : REAL(name)(file, mode, offset, size);                   \
    }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)

/* Writes through a mapping are not seen. The mapping of a file for writing is. */
#define MMAP(name, offset_type)                                                                                        \
    void *name(void *at, size_t size, int protection, int flags, int file, offset_type offset)                         \
    {                                                                                                                  \
        int shared = file >= 0 && flags & MAP_SHARED && protection & PROT_WRITE;                                       \
        return shared && full_file("mmap", file, (long)size) ? MAP_FAILED                                              \
                                                             : REAL(name)(at, size, protection, flags, file, offset);  \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int fsync(int file)
{
    return full_file("fsync", file, 0) ? -1 : REAL(fsync)(file);
}

int fdatasync(int file)
{
    return full_file("fsync", file, 0) ? -1 : REAL(fdatasync)(file);
}

#define SENDFILE(name, offset_type)                                                                                    \
    ssize_t name(int to, int from, offset_type *offset, size_t size)                                                   \
    {                                                                                                                  \
        return full_file("sendfile", to, (long)size) ? -1 : REAL(name)(to, from, offset, size);                        \
    }
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *begin, int to, off64_t *offset, size_t size, unsigned flags)
{
    return full_file("copy", to, (long)size) ? -1 : REAL(copy_file_range)(from, begin, to, offset, size, flags);
}

int rename(const char *from, const char *to)
{
    return full_at("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int folder, const char *to)
{
    return full_at("rename", folder, to) ? -1 : REAL(renameat)(from_folder, from, folder, to);
}

/* mkdir of an existing folder fails with EEXIST, also on a full disk. */
int mkdir(const char *path, mode_t mode)
{
    return faccessat(AT_FDCWD, path, F_OK, 0) && full_at("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode)
{
    return faccessat(folder, path, F_OK, 0) && full_at("mkdir", folder, path) ? -1 : REAL(mkdirat)(folder, path, mode);
}

int symlink(const char *target, const char *path)
{
    return full_at("symlink", AT_FDCWD, path) ? -1 : REAL(symlink)(target, path);
}

int symlinkat(const char *target, int folder, const char *path)
{
    return full_at("symlink", folder, path) ? -1 : REAL(symlinkat)(target, folder, path);
}
