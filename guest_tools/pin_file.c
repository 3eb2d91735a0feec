// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * pin_file - write one page of a mapped file to a disk, which pins the page meanwhile.
 *
 * pin_file FILE DISK
 *   Maps the first page of FILE for reading, and writes it to DISK with O_DIRECT. A write that
 *   waits for the disk is waited for. One that uses the CPU in each of SPIN_CHECKS seconds in a
 *   row does not end: it is killed.
 */
#include "report.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define SPIN_CHECKS 10

static const struct option options[] = { END_OF_OPTIONS };

const char tool_name[] = "pin_file";
const char usage_text[] = "usage: pin_file FILE DISK\n";

static uint64_t cpu_ns(clockid_t clock)
{
	struct timespec time;

	if (clock_gettime(clock, &time))
		fail("clock_gettime");
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Wait for a child; false: it used the CPU all the time, and was killed. */
static bool ends(pid_t child, const sigset_t *signals)
{
	const struct timespec second = { .tv_sec = 1 };
	uint64_t used = 0, now;
	int checks = 0;
	clockid_t clock;

	errno = clock_getcpuclockid(child, &clock);
	if (errno)
		fail("clock_getcpuclockid");
	while (sigtimedwait(signals, NULL, &second) < 0) {
		now = cpu_ns(clock);
		/* If the host pauses, only one check sees the time that has passed. */
		checks = now - used > 100000000 ? checks + 1 : 0;
		used = now;
		if (checks == SPIN_CHECKS) {
			kill(child, SIGKILL);
			return false;
		}
	}
	return true;
}

int main(int argc, char **argv)
{
	size_t size = (size_t)sysconf(_SC_PAGESIZE);
	int file, disk, status;
	sigset_t signals;
	bool ended;
	pid_t child;
	void *map;

	next_option(argc, argv, options);
	if (optind != argc - 2)
		usage("expected FILE and DISK", NULL);
	file = open(argv[optind], O_RDONLY);
	if (file < 0)
		fail(argv[optind]);
	disk = open_direct(argv[optind + 1]);
	map = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		errno = 0;
		_exit(pwrite(disk, map, size, 0) == (ssize_t)size ? 0 : errno ? errno : EIO);
	}
	ended = ends(child, &signals);
	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	if (ended && !WIFEXITED(status)) {
		errno = EINTR;
		fail("the writer was killed");
	}
	report_begin();
	report_bool("ended", ended);
	report_number("errno", ended ? (uint64_t)WEXITSTATUS(status) : 0);
	report_end();
	return EXIT_FINE;
}
