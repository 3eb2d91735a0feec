// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * same_block DISK SECONDS: write the first block of a disk from two threads. One runs on CPU 1, the
 * other is moved between the CPUs 0 and 1: the CPU on which a write begins chooses its lane, which
 * has a lock as well.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096

static int fd;
static volatile long writes[2];

static void run_on(pthread_t thread, int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	pthread_setaffinity_np(thread, sizeof(set), &set);
}

static void *writer(void *count)
{
	void *block = aligned_alloc(BLOCK, BLOCK);

	while (block && pwrite(fd, block, BLOCK, 0) == BLOCK)
		++*(volatile long *)count;
	return NULL;
}

int main(int argc, char **argv)
{
	time_t end = time(NULL) + atoi(argv[argc - 1]);
	pthread_t threads[2];
	int moves;

	fd = open(argv[1], O_WRONLY | O_DIRECT);
	run_on(pthread_self(), 0);
	for (int n = 0; n < 2; n++)
		if (fd < 0 || pthread_create(&threads[n], NULL, writer, (void *)&writes[n]))
			return 2;
	run_on(threads[1], 1);
	for (moves = 0; time(NULL) < end; moves++) {
		run_on(threads[0], moves & 1);
		usleep(15000);
	}
	printf("%ld and %ld writes, %d moves\n", writes[0], writes[1], moves);
	fflush(stdout);
	_exit(0);
}
