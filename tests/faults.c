/* Preloaded into a process, this makes one of its file operations fail.

   `faults_arm` names a folder. From then on, every operation that changes a file or a
   directory in or below it is counted: opening for writing, writing, renaming, removing,
   making directories, truncating, syncing. Something happens at the n-th of them:

     count   nothing; `faults_count` says how many there were
     kill    the process gets SIGKILL before the operation
     torn    the first half of the bytes is written, and the process gets SIGKILL
     term    the process gets SIGTERM, and the operation succeeds
     int     the process gets SIGINT, and the operation succeeds
     past    the clock is a minute behind from then on. Libraries of others may wait
             for a time of this clock, and then wait a minute longer if it is set back
             meanwhile.
     full    no bytes, files or directories can be added from then on (ENOSPC)
     bad     all operations fail from then on (EIO)
     locked  all operations fail from then on (EROFS)
     full1, bad1, locked1    only this operation fails

   What is written through a memory map, or by a system call without the C library, is
   not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { ADDS, CHANGES };       /* Whether an operation needs space on the disk. */
enum verdict { GO, FAIL, TEAR };

static char folder[PATH_MAX];
static char mode[16];
static long chosen;
static atomic_long counted;
static atomic_int behind;          /* Whether the clock is. */

void faults_arm(const char *folder_, const char *mode_, long chosen_) {
  snprintf(mode, sizeof mode, "%s", mode_);
  chosen = chosen_;
  counted = 0;
  snprintf(folder, sizeof folder, "%s", folder_);
}

long faults_count(void) { return counted; }

/* Whether a path is in the folder. A relative one is below the directory `dir`. */
static int inside(int dir, const char *path) {
  size_t length = strlen(folder);
  char absolute[PATH_MAX];
  if (!length || !path) return 0;
  if (path[0] != '/') {
    char link[64];
    if (dir == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t size = readlink(link, absolute, sizeof absolute - 1);
    if (size < 0) return 0;
    absolute[size] = 0;
    path = absolute;               /* Its last part decides nothing. */
  }
  return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int open_inside(int file) { return inside(file, ""); }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static int fails(int error, int only_once, int is_chosen) {
  if (only_once && !is_chosen) return 0;
  errno = error;
  return 1;
}

/* Counts an operation and says what is to become of it. */
static enum verdict next(enum kind kind) {
  long number = atomic_fetch_add(&counted, 1) + 1;
  int is_chosen = number == chosen;
  if (!chosen || number < chosen) return GO;
  if (is_chosen && !strcmp(mode, "kill")) die();
  if (is_chosen && !strcmp(mode, "torn")) return TEAR;
  if (is_chosen && !strcmp(mode, "term")) kill(getpid(), SIGTERM);
  if (is_chosen && !strcmp(mode, "int")) kill(getpid(), SIGINT);
  if (is_chosen && !strcmp(mode, "past")) behind = 1;
  int once = mode[0] && mode[strlen(mode) - 1] == '1';
  if (!strncmp(mode, "full", 4) && kind == ADDS)
    return fails(ENOSPC, once, is_chosen) ? FAIL : GO;
  if (!strncmp(mode, "bad", 3)) return fails(EIO, once, is_chosen) ? FAIL : GO;
  if (!strncmp(mode, "locked", 6)) return fails(EROFS, once, is_chosen) ? FAIL : GO;
  return GO;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* A function that writes bytes: `half` is the call that writes the first part. */
#define WRITES(result, name, parameters, arguments, half) \
  result name parameters { \
    REAL(name); \
    if (open_inside(file)) { \
      enum verdict verdict = next(ADDS); \
      if (verdict == FAIL) return -1; \
      if (verdict == TEAR) { \
        (void)!half; \
        die(); \
      } \
    } \
    return real arguments; \
  }

WRITES(ssize_t, write, (int file, const void *data, size_t size), (file, data, size),
       real(file, data, size / 2))
WRITES(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at),
       (file, data, size, at), real(file, data, size / 2, at))
WRITES(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at),
       (file, data, size, at), real(file, data, size / 2, at))
WRITES(ssize_t, writev, (int file, const struct iovec *parts, int count),
       (file, parts, count), real(file, parts, count / 2))
WRITES(ssize_t, pwritev, (int file, const struct iovec *parts, int count, off_t at),
       (file, parts, count, at), real(file, parts, count / 2, at))

/* Any other function. It is torn by being left out. */
#define DOES(name, kind, parameters, arguments, concerned) \
  int name parameters { \
    REAL(name); \
    if (concerned) { \
      enum verdict verdict = next(kind); \
      if (verdict == FAIL) return -1; \
      if (verdict == TEAR) die(); \
    } \
    return real arguments; \
  }

DOES(rename, CHANGES, (const char *from, const char *to), (from, to),
     inside(AT_FDCWD, to))
DOES(renameat, CHANGES, (int a, const char *from, int b, const char *to),
     (a, from, b, to), inside(b, to))
DOES(renameat2, CHANGES, (int a, const char *from, int b, const char *to, unsigned flags),
     (a, from, b, to, flags), inside(b, to))
DOES(link, ADDS, (const char *from, const char *to), (from, to), inside(AT_FDCWD, to))
DOES(symlink, ADDS, (const char *from, const char *to), (from, to), inside(AT_FDCWD, to))
DOES(mkdir, ADDS, (const char *path, mode_t bits), (path, bits), inside(AT_FDCWD, path))
DOES(mkdirat, ADDS, (int dir, const char *path, mode_t bits), (dir, path, bits),
     inside(dir, path))
DOES(unlink, CHANGES, (const char *path), (path), inside(AT_FDCWD, path))
DOES(unlinkat, CHANGES, (int dir, const char *path, int flags), (dir, path, flags),
     inside(dir, path))
DOES(rmdir, CHANGES, (const char *path), (path), inside(AT_FDCWD, path))
DOES(truncate, CHANGES, (const char *path, off_t size), (path, size),
     inside(AT_FDCWD, path))
DOES(ftruncate, CHANGES, (int file, off_t size), (file, size), open_inside(file))
DOES(fsync, CHANGES, (int file), (file), open_inside(file))
DOES(fdatasync, CHANGES, (int file), (file), open_inside(file))

#define OPENS(name, parameters, dir, ...) \
  int name parameters { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) && inside(dir, path)) { \
      enum verdict verdict = next(flags & O_CREAT ? ADDS : CHANGES); \
      if (verdict == FAIL) return -1; \
      if (verdict == TEAR) die(); \
    } \
    return real(__VA_ARGS__, flags, bits); \
  }

OPENS(open, (const char *path, int flags, ...), AT_FDCWD, path)
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD, path)
OPENS(openat, (int at, const char *path, int flags, ...), at, at, path)
OPENS(openat64, (int at, const char *path, int flags, ...), at, at, path)

int clock_gettime(clockid_t clock, struct timespec *time) {
  REAL(clock_gettime);
  int result = real(clock, time);
  if (behind && clock == CLOCK_REALTIME) time->tv_sec -= 60;
  return result;
}
