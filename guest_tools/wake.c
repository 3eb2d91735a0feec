// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * wake - start the timers of each CPU of a guest that was migrated, and prove that they fire.
 *
 *   wake
 *
 * QEMU before 8.2 does not start the decrementer after a migration, and Linux writes it only for an
 * event earlier than the one that it believes to be programmed
 * (known_issues/qemu-decr-not-migrated.md). So sleep on each CPU until a time in the past. Then a
 * sleep of 1 ms ends only if timers fire there. Prints the number of CPUs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <time.h>

int main(void)
{
	const struct timespec past = { 0, 1 }, moment = { 0, 1000000 };
	cpu_set_t all, one;
	int count = 0;

	if (sched_getaffinity(0, sizeof(all), &all)) {
		perror("sched_getaffinity");
		return 4;
	}
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (sched_setaffinity(0, sizeof(one), &one)) {
			perror("sched_setaffinity");
			return 4;
		}
		errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &past, NULL);
		if (errno || nanosleep(&moment, NULL)) {
			perror("sleep");
			return 4;
		}
		count++;
	}
	printf("%d\n", count);
	return 0;
}
