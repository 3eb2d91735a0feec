// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * moved - move a process that reads /dev/zero byte by byte from CPU to CPU.
 *
 * moved MOVES
 *   The process is moved again when it has read from /dev/zero on its new CPU, so each move
 *   interrupts a running process. CPUs 0 and 1 alternate.
 *
 * There is no report. Exit status 1: the process ended before it was moved MOVES times. See
 * report.h for the others.
 */
#include "report.h"

#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>

const char tool_name[] = "moved";
const char usage_text[] = "usage: moved MOVES\n";

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
	uint64_t moves;
	atomic_ulong *reads;
	pid_t reader;

	if (argc != 2)
		usage("expected exactly one number", NULL);
	moves = parse_number("MOVES", argv[1], 1, UINT64_MAX);
	reads = mmap(NULL, sizeof(*reads), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		     0);
	if (reads == MAP_FAILED)
		fail("mmap");
	reader = fork();
	if (reader < 0)
		fail("fork");
	if (!reader)
		read_bytes(reads);
	for (uint64_t n = 0; n < moves; n++) {
		unsigned long before;
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET((int)(n % 2), &set);
		if (sched_setaffinity(reader, sizeof(set), &set))
			fail("sched_setaffinity");
		before = atomic_load(reads);
		/* The first of two reads may have begun on the old CPU. */
		while (atomic_load(reads) < before + 2) {
			if (waitpid(reader, NULL, WNOHANG)) {
				fprintf(stderr,
					"moved: the process ended after %" PRIu64 " moves\n", n);
				return EXIT_WRONG;
			}
			sched_yield();
		}
	}
	kill(reader, SIGKILL);
	return EXIT_FINE;
}
