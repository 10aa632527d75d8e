/* A clock that jumps. Preload this library into a process, and its time of day jumps by up to ten years, forward or
 * back, every few calls. Clocks that only count (CLOCK_MONOTONIC and such) and the times of files do not change.
 *
 *   JUMPING_CLOCK      n: jump every n calls; unset: no jumps
 *   JUMPING_CLOCK_LOG  a file that gets a line for each jump
 *
 * The environment is read at each call, so a process may change it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define TEN_YEARS 315576000L

static atomic_ulong calls;

/* Seconds to add to the time of this call. */
static long jump(void)
{
    const char *every = getenv("JUMPING_CLOCK"), *log = getenv("JUMPING_CLOCK_LOG");
    if (!every)
        return 0;
    unsigned long number = atomic_fetch_add(&calls, 1), jumps = number / strtoul(every, NULL, 10);
    long moved = (long)(jumps * 2654435761UL % (2 * TEN_YEARS)) - TEN_YEARS; /* Knuth's multiplicative hash */
    if (log && number % strtoul(every, NULL, 10) == 0) {
        FILE *file = fopen(log, "a");
        if (file) {
            fprintf(file, "%ld\n", moved);
            fclose(file);
        }
    }
    return moved;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && clock == CLOCK_REALTIME)
        now->tv_sec += jump();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int failed = REAL(gettimeofday)(now, zone);
    if (!failed)
        now->tv_sec += jump();
    return failed;
}

time_t time(time_t *kept)
{
    time_t now = REAL(time)(NULL) + jump();
    if (kept)
        *kept = now;
    return now;
}
