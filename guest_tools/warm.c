// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * warm - the first moments of a guest that was restored from a snapshot.
 *
 *   warm PORT PID
 *
 * It is started in the guest that will be saved, prints "listening", and waits in the background
 * for one line, which the host writes to PORT (a virtio-serial port) before it starts a restored
 * guest:
 *
 *   wake SECONDS NANOSECONDS REGIONS LIMIT_MS SEED
 *
 * The clock is set to that time. SEED is 64 random bytes in hex: all guests of a snapshot have the
 * same random state, so no process may draw a random number before the seed is mixed in. Therefore
 * the ssh server, process PID, is stopped (SIGSTOP) when the guest is saved, and continued from
 * here.
 *
 * The answers are
 *
 *   awake CPUS        the clock is set, the seed is mixed in, and timers fire on CPUS CPUs
 *   regions N         N nvdimm regions have their driver: REGIONS, or fewer after LIMIT_MS
 *   failed WHAT: ERROR (errno N)
 *
 * Then it exits.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define SEED_BYTES 64
#define CPU_FOLDER "/sys/devices/system/cpu"
#define ND_FOLDER "/sys/bus/nd/devices"

static int port = -1;

static void say(const char *format, ...)
{
	char line[256];
	va_list words;
	int length;

	va_start(words, format);
	length = vsnprintf(line, sizeof(line), format, words);
	va_end(words);
	if (write(port, line, length) != length)
		exit(1);
}

static void fail(const char *what)
{
	int number = errno;

	/* The starter reads stderr; once this runs in the background, the host reads the port. */
	fprintf(stderr, "%s: %s (errno %d)\n", what, strerrorname_np(number), number);
	if (port >= 0)
		say("failed %s: %s (errno %d)\n", what, strerrorname_np(number), number);
	exit(1);
}

static void seed_from(const char *hex)
{
	struct {
		struct rand_pool_info info;
		unsigned char bytes[SEED_BYTES];
	} seed = { .info = { .entropy_count = 8 * SEED_BYTES, .buf_size = SEED_BYTES } };
	int random;

	for (int i = 0; i < SEED_BYTES; i++)
		if (sscanf(hex + 2 * i, "%2hhx", &seed.bytes[i]) != 1) {
			errno = EINVAL;
			fail("seed");
		}
	random = open("/dev/random", O_RDWR | O_CLOEXEC);
	if (random < 0)
		fail("/dev/random");
	/* Without RNDRESEEDCRNG, the generator uses the saved state for up to a minute. */
	if (ioctl(random, RNDADDENTROPY, &seed) || ioctl(random, RNDRESEEDCRNG))
		fail("RNDADDENTROPY");
	close(random);
}

/* The first bytes of virtio-rng were fetched before the guest was saved, so drop them. */
static void drop_saved_random_bytes(void)
{
	char bytes[256];
	int hwrng = open("/dev/hwrng", O_RDONLY | O_CLOEXEC);

	if (hwrng < 0)
		return;
	for (size_t dropped = 0; dropped < sizeof(bytes);) {
		ssize_t length = read(hwrng, bytes, sizeof(bytes) - dropped);

		if (length <= 0)
			break;
		dropped += length;
	}
	close(hwrng);
}

/*
 * QEMU 10.0 does not restore a running secondary CPU, so a guest for it is saved with them offline
 * (known_issues/qemu-quiesced-not-migrated.md).
 */
static void bring_up(int cpu)
{
	char path[64], state = '1';
	int online;

	snprintf(path, sizeof(path), CPU_FOLDER "/cpu%d/online", cpu);
	online = open(path, O_RDWR | O_CLOEXEC);
	/* The boot CPU may have no such file. */
	if (online < 0)
		return;
	if (read(online, &state, 1) == 1 && state == '0' && pwrite(online, "1", 1, 0) != 1)
		fail(path);
	close(online);
}

/*
 * QEMU 7.2 does not restore the decrementer, and Linux writes it only for an event earlier than the
 * one that it believes to be programmed (known_issues/qemu-decr-not-migrated.md). So sleep until a
 * time in the past. Then a sleep of 1 ms proves that timers fire.
 */
static void wake_timers_of(int cpu)
{
	const struct timespec past = { 0, 1 }, moment = { 0, 1000000 };
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("sched_setaffinity");
	errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &past, NULL);
	if (errno || nanosleep(&moment, NULL))
		fail("sleep");
}

static int wake_cpus(void)
{
	int count = 0;
	cpu_set_t all;

	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		char path[64];

		snprintf(path, sizeof(path), CPU_FOLDER "/cpu%d", cpu);
		if (access(path, F_OK))
			break;
		/* The boot CPU first: it brings up the others, and must sleep meanwhile. */
		bring_up(cpu);
		wake_timers_of(cpu);
		count++;
	}
	CPU_ZERO(&all);
	for (int cpu = 0; cpu < count; cpu++)
		CPU_SET(cpu, &all);
	sched_setaffinity(0, sizeof(all), &all);
	return count;
}

static int count_regions(void)
{
	DIR *folder = opendir(ND_FOLDER);
	struct dirent *entry;
	int count = 0;

	/* libnvdimm may be a module that is not loaded yet. */
	if (!folder)
		return 0;
	while ((entry = readdir(folder))) {
		char path[sizeof(ND_FOLDER) + sizeof(entry->d_name) + 8];

		snprintf(path, sizeof(path), ND_FOLDER "/%s/driver", entry->d_name);
		count += !strncmp(entry->d_name, "region", 6) && !access(path, F_OK);
	}
	closedir(folder);
	return count;
}

static int wait_for_regions(int wanted, long limit_ms)
{
	const struct timespec pause = { 0, 2000000 };
	struct timespec begun, now;
	int count;

	clock_gettime(CLOCK_MONOTONIC, &begun);
	while ((count = count_regions()) < wanted) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		if ((now.tv_sec - begun.tv_sec) * 1000 + (now.tv_nsec - begun.tv_nsec) / 1000000 >=
		    limit_ms)
			break;
		nanosleep(&pause, NULL);
	}
	return count;
}

static void listen_on(pid_t server)
{
	char line[512], seed[2 * SEED_BYTES + 1];
	long long seconds, nanoseconds;
	long limit_ms;
	size_t length = 0;
	int regions;

	while (!memchr(line, '\n', length)) {
		ssize_t got = read(port, line + length, sizeof(line) - 1 - length);

		if (got <= 0) {
			errno = got ? errno : EPIPE;
			fail("read");
		}
		length += got;
	}
	line[length] = '\0';
	if (sscanf(line, "wake %lld %lld %d %ld %128[0-9a-f]", &seconds, &nanoseconds, &regions,
		   &limit_ms, seed) != 5 ||
	    strlen(seed) != 2 * SEED_BYTES) {
		errno = EINVAL;
		fail("wake");
	}
	seed_from(seed);
	if (clock_settime(CLOCK_REALTIME, &(struct timespec){ seconds, nanoseconds }))
		fail("clock_settime");
	/* The host is already connecting. */
	if (kill(server, SIGCONT))
		fail("SIGCONT");
	say("awake %d\n", wake_cpus());
	drop_saved_random_bytes();
	say("regions %d\n", wait_for_regions(regions, limit_ms));
}

int main(int argc, char **argv)
{
	const struct sched_param urgent = { .sched_priority = 1 };
	pid_t server, child;

	if (argc != 3) {
		fprintf(stderr, "usage: warm PORT PID\n");
		return 2;
	}
	server = atoi(argv[2]);
	port = open(argv[1], O_RDWR | O_CLOEXEC);
	if (port < 0)
		fail(argv[1]);
	/* Keep the pages that a restored guest needs first in memory, not on its disk. */
	if (mlockall(MCL_CURRENT) || sched_setscheduler(0, SCHED_FIFO, &urgent))
		fail("mlockall");
	child = fork();
	if (child < 0)
		fail("fork");
	if (child) {
		printf("listening\n");
		return 0;
	}
	/* Memory locks are not inherited. */
	if (mlockall(MCL_CURRENT))
		fail("mlockall");
	setsid();
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	listen_on(server);
	return 0;
}
