// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * same_block - several threads write the same block of a disk while they are moved between CPUs.
 *
 * same_block [--threads=N] [--seconds=N] [--progress=FILE] DISK
 *   Each thread repeatedly writes the block at offset 0 with O_DIRECT; every 64-bit word of it
 *   holds the thread's number and its count of writes. Another thread moves them between CPUs,
 *   every 1 to 30 ms, and writes their progress to FILE, a line each half second. FILE can be
 *   /dev/kmsg, whose output still works in a guest that otherwise hangs. At the end the block is
 *   read: all its words must be from one write.
 *
 *   FILE gets each line with one write(2). stdio may seek first (dprintf() of glibc before 2.37
 *   does), and /dev/kmsg refuses that.
 *
 * Exit status 1: a write failed, or the block is mixed. See report.h for the others.
 */
#include "report.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>

#define MOST_THREADS 64
#define BLOCK 4096
#define WORDS (BLOCK / sizeof(uint64_t))
#define REPORT_NS 500000000ULL

static const struct option options[] = {
	OPTION("threads", 't'),
	OPTION("seconds", 's'),
	OPTION("progress", 'p'),
	END_OF_OPTIONS,
};

static const char *disk, *progress;
static unsigned int thread_count = 4;
static uint64_t seconds = 5;

static struct worker {
	pthread_t thread;
	unsigned int number;
	atomic_ullong writes;
	int error;
} workers[MOST_THREADS];
static atomic_bool stop;

const char tool_name[] = "same_block";
const char usage_text[] = "usage: same_block [--threads=N] [--seconds=N] [--progress=FILE] DISK\n";

/* Write one line to the progress file. */
static void __attribute__((format(printf, 2, 3))) print_progress(int log, const char *format, ...)
{
	char line[64];
	va_list arguments;
	int length;

	if (log < 0)
		return;
	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	errno = EIO; /* for a short write */
	if (write(log, line, (size_t)length) != length)
		fail(progress);
}

static uint64_t *new_block(void)
{
	void *block;

	errno = posix_memalign(&block, 65536, BLOCK);
	if (errno)
		fail("memory");
	return block;
}

static void *write_block(void *argument)
{
	struct worker *worker = argument;
	uint64_t *block = new_block();
	int fd = open(disk, O_WRONLY | O_DIRECT);

	if (fd < 0) {
		worker->error = errno;
		return NULL;
	}
	while (!atomic_load(&stop)) {
		ssize_t done;

		for (size_t i = 0; i < WORDS; i++)
			block[i] = (uint64_t)worker->number << 48 | (worker->writes + 1);
		done = pwrite(fd, block, BLOCK, 0);
		if (done != BLOCK) {
			worker->error = done < 0 ? errno : EIO;
			break;
		}
		atomic_fetch_add(&worker->writes, 1);
	}
	close(fd);
	free(block);
	return NULL;
}

static uint64_t all_writes(void)
{
	uint64_t sum = 0;

	for (unsigned int i = 0; i < thread_count; i++)
		sum += atomic_load(&workers[i].writes);
	return sum;
}

/* Move the threads, and print their progress; return the number of moves. */
static uint64_t move_threads(int log, uint64_t end_ns)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	uint64_t moves = 0, reported_ns = 0, random = 0;

	for (uint64_t now = now_ns(); now < end_ns; now = now_ns()) {
		struct timespec pause = { 0, 0 };
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET((int)draw_below(&random, cpus > 0 ? (uint64_t)cpus : 1), &set);
		if (!pthread_setaffinity_np(workers[draw_below(&random, thread_count)].thread,
					    sizeof(set), &set))
			moves++;
		if (now - reported_ns >= REPORT_NS) {
			print_progress(log, "<1>same_block: %" PRIu64 " writes\n", all_writes());
			reported_ns = now;
		}
		pause.tv_nsec = 1000000 + (long)draw_below(&random, 29000000);
		nanosleep(&pause, NULL);
	}
	return moves;
}

static bool block_is_whole(void)
{
	uint64_t *block = new_block();
	int fd = open(disk, O_RDONLY | O_DIRECT);
	bool whole = fd >= 0 && pread(fd, block, BLOCK, 0) == BLOCK;

	for (size_t i = 1; whole && i < WORDS; i++)
		whole = block[i] == block[0];
	if (fd >= 0)
		close(fd);
	free(block);
	return whole;
}

int main(int argc, char **argv)
{
	uint64_t begin_ns, moves;
	int option, error = 0, log = -1;
	bool whole;

	while ((option = next_option(argc, argv, options)) != -1) {
		switch (option) {
		case 't':
			thread_count =
				(unsigned int)parse_number("--threads", optarg, 1, MOST_THREADS);
			break;
		case 's':
			seconds = parse_number("--seconds", optarg, 1, 3600);
			break;
		case 'p':
			progress = optarg;
			break;
		}
	}
	if (optind != argc - 1)
		usage("expected exactly one DISK", NULL);
	disk = argv[optind];
	if (progress) {
		log = open(progress, O_WRONLY | O_APPEND);
		if (log < 0)
			fail(progress);
	}
	begin_ns = now_ns();
	for (unsigned int i = 0; i < thread_count; i++) {
		workers[i].number = i + 1;
		errno = pthread_create(&workers[i].thread, NULL, write_block, &workers[i]);
		if (errno)
			fail("thread");
	}
	moves = move_threads(log, begin_ns + seconds * NS_PER_S);
	atomic_store(&stop, true);
	for (unsigned int i = 0; i < thread_count; i++) {
		pthread_join(workers[i].thread, NULL);
		error = error ? error : workers[i].error;
	}
	whole = block_is_whole();
	report_begin();
	report_number("threads", thread_count);
	report_number("moves", moves);
	report_number("duration_ns", now_ns() - begin_ns);
	report_open("writes", '[');
	for (unsigned int i = 0; i < thread_count; i++)
		report_number(NULL, atomic_load(&workers[i].writes));
	report_close(']');
	report_number("errno", (uint64_t)error);
	report_bool("whole", whole);
	report_end();
	/* Last, so that the report is complete when this line is read. */
	print_progress(log, "<1>same_block: done\n");
	return error || !whole ? EXIT_WRONG : EXIT_FINE;
}
