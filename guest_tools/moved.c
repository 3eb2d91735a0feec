// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * moved - a process reads /dev/zero byte by byte, and is moved from CPU to CPU.
 *
 * moved MOVES
 *   The next move comes when the process has read something on its new CPU, so each move interrupts
 *   a running process. CPUs 0 and 1 are used in turn.
 *
 * Exit status:
 *   0  it was moved MOVES times
 *   1  the process ended before that
 *   2  the command line was wrong, nothing was tried
 *   4  it could not be set up
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EXIT_FINE, EXIT_ENDED, EXIT_USAGE, EXIT_FAILED = 4 };

static void __attribute__((noreturn)) fail(const char *stage)
{
	fprintf(stderr, "moved: %s: %d %s\n", stage, errno, strerror(errno));
	exit(EXIT_FAILED);
}

static void __attribute__((noreturn)) read_bytes(atomic_ulong *reads)
{
	int fd = open("/dev/zero", O_RDONLY);
	char byte;

	while (read(fd, &byte, 1) == 1)
		atomic_fetch_add(reads, 1);
	_exit(EXIT_FAILED);
}

int main(int argc, char **argv)
{
	unsigned long moves = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
	atomic_ulong *reads;
	pid_t reader;

	if (!moves) {
		fprintf(stderr, "usage: moved MOVES\n");
		return EXIT_USAGE;
	}
	reads = mmap(NULL, sizeof(*reads), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (reads == MAP_FAILED)
		fail("mmap");
	reader = fork();
	if (reader < 0)
		fail("fork");
	if (!reader)
		read_bytes(reads);
	for (unsigned long n = 0; n < moves; n++) {
		unsigned long before;
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET((int)(n % 2), &set);
		if (sched_setaffinity(reader, sizeof(set), &set))
			fail("sched_setaffinity");
		before = atomic_load(reads);
		/* The first of two may have begun on the old CPU. */
		while (atomic_load(reads) < before + 2) {
			if (waitpid(reader, NULL, WNOHANG)) {
				fprintf(stderr, "moved: the process ended after %lu moves\n", n);
				return EXIT_ENDED;
			}
			sched_yield();
		}
	}
	kill(reader, SIGKILL);
	return EXIT_FINE;
}
