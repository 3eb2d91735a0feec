// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * flush - time calls that promise durability, from several threads concurrently.
 *
 * flush load [OPTION]... --op=OPERATION TARGET...
 *   Thread i works on target i modulo the number of targets, each on its own file or its own part
 *   of a block device. A step stores, takes the time, makes the call, and takes the time again:
 *   data stored before the first time must be durable at the second. With O_DSYNC one call both
 *   stores and syncs, and the first time is taken before that call.
 *
 * flush clock --rounds=N DEVICE
 *   Exchanges times with the host through the first words of a DAX device that both have mapped:
 *   {ping, pong, host_ns}. The guest writes the number of a round to ping; the host writes its time
 *   to host_ns, and then the number to pong.
 *
 * Times are from CLOCK_MONOTONIC_RAW, ns. Failed calls are in the report, and the exit status is 0.
 * See report.h for the other exit statuses.
 */
#include "report.h"

#include <pthread.h>
#include <sys/mman.h>

enum operation { DEEP_FLUSH, FSYNC, FDATASYNC, MSYNC, DSYNC, DIRECT_DSYNC, SYNCFS, OPERATIONS };

static const char *const names[OPERATIONS] = {
	"deep_flush", "fsync", "fdatasync", "msync", "dsync", "direct_dsync", "syncfs",
};

/* Operations of "mixed" for the two kinds of target. */
static const enum operation of_files[] = { FSYNC, FDATASYNC, MSYNC, DSYNC, SYNCFS };
static const enum operation of_disks[] = { FSYNC, FDATASYNC, DSYNC, DIRECT_DSYNC };

#define MOST_THREADS 256
#define MOST_TARGETS 16
/* Pages of a thread's file, or of its part of a disk. */
#define PAGES 8
#define CLOCK_LIMIT_NS (10 * NS_PER_S)

struct record {
	enum operation operation;
	uint64_t begin_ns, end_ns;
	int error;
};

struct worker {
	pthread_t thread;
	unsigned int number;
	uint64_t random;
	bool disk;
	/* dsync and direct are the same file, opened with O_DSYNC, and with O_DSYNC | O_DIRECT. */
	int plain, dsync, direct;
	off_t begin;
	char *map, *buffer;
	struct record *records;
	uint64_t done;
};

static const struct option options[] = {
	OPTION("op", 'o'),   OPTION("threads", 't'), OPTION("count", 'c'), OPTION("limit", 'l'),
	OPTION("seed", 's'), OPTION("rounds", 'r'),  END_OF_OPTIONS,
};

const char tool_name[] = "flush";
const char usage_text[] =
	"usage: flush load [OPTION]... --op=OPERATION TARGET...\n"
	"       flush clock --rounds=N DEVICE\n"
	"  --op=OPERATION   deep_flush (the target is this attribute of a region), or fsync,\n"
	"                   fdatasync, msync, dsync, direct_dsync, syncfs or mixed (the target is a\n"
	"                   folder of a file system, or a block device)\n"
	"  --threads=N      number of threads (default 1)\n"
	"  --count=N        calls per thread (default 1)\n"
	"  --limit=SECONDS  begin no call after this time (default 60)\n"
	"  --seed=N         seed of the random numbers (default 0)\n";

static struct {
	int operation; /* OPERATIONS: mixed; -1: not given */
	unsigned int threads;
	uint64_t count, limit_s, seed, rounds;
} command = { .operation = -1, .threads = 1, .count = 1, .limit_s = 60 };

static uint64_t page_size, deadline_ns;
static pthread_barrier_t start;

static uint64_t draw(struct worker *worker, uint64_t limit)
{
	return draw_below(&worker->random, limit);
}

/* --- load ------------------------------------------------------------------------------------ */

/* 0 or the errno of a write; a short write is EIO. */
static int put(int fd, const char *data, size_t size, off_t offset)
{
	ssize_t count = pwrite(fd, data, size, offset);

	return count < 0 ? errno : (size_t)count == size ? 0 : EIO;
}

static int or_errno(int result)
{
	return result ? errno : 0;
}

/* Now and then truncate the file, so that the next store allocates blocks again. */
static int renew(struct worker *worker)
{
	if (worker->disk || draw(worker, 16))
		return 0;
	return or_errno(ftruncate(worker->plain, 0) ||
			ftruncate(worker->plain, (off_t)(PAGES * page_size)));
}

static int store(struct worker *worker, enum operation operation, off_t offset)
{
	if (operation == MSYNC) {
		memcpy(worker->map + offset, worker->buffer, page_size);
		return 0;
	}
	return put(worker->plain, worker->buffer, page_size, worker->begin + offset);
}

static int call(struct worker *worker, enum operation operation, off_t offset)
{
	switch (operation) {
	case DEEP_FLUSH:
		return put(worker->plain, "1", 1, 0);
	case FSYNC:
		return or_errno(fsync(worker->plain));
	case FDATASYNC:
		return or_errno(fdatasync(worker->plain));
	case MSYNC:
		return or_errno(msync(worker->map + offset, page_size, MS_SYNC));
	case DSYNC:
		return put(worker->dsync, worker->buffer, page_size, worker->begin + offset);
	case DIRECT_DSYNC:
		return put(worker->direct, worker->buffer, page_size, worker->begin + offset);
	case SYNCFS:
		return or_errno(syncfs(worker->plain));
	default:
		abort();
	}
}

static enum operation choose(struct worker *worker)
{
	if (command.operation != OPERATIONS)
		return (enum operation)command.operation;
	return worker->disk ? of_disks[draw(worker, LENGTH(of_disks))] :
			      of_files[draw(worker, LENGTH(of_files))];
}

static void step(struct worker *worker, struct record *record)
{
	enum operation operation = choose(worker);
	off_t offset = (off_t)(draw(worker, PAGES) * page_size);
	bool by_call = operation == DEEP_FLUSH || operation == DSYNC || operation == DIRECT_DSYNC;

	record->operation = operation;
	if (operation != DEEP_FLUSH) {
		memset(worker->buffer, (int)draw(worker, 256), page_size);
		record->error = renew(worker);
	}
	if (!record->error && !by_call)
		record->error = store(worker, operation, offset);
	record->begin_ns = clock_ns(CLOCK_MONOTONIC_RAW);
	if (!record->error)
		record->error = call(worker, operation, offset);
	record->end_ns = clock_ns(CLOCK_MONOTONIC_RAW);
}

static void *work(void *argument)
{
	struct worker *worker = argument;

	pthread_barrier_wait(&start);
	while (worker->done < command.count && clock_ns(CLOCK_MONOTONIC_RAW) < deadline_ns) {
		step(worker, &worker->records[worker->done]);
		worker->done++;
	}
	return NULL;
}

static int open_at(int folder, const char *name, int flags)
{
	int fd = openat(folder, name, flags | O_CLOEXEC, 0644);

	if (fd < 0)
		fail(name);
	return fd;
}

static void open_file(struct worker *worker, const char *folder_name)
{
	int folder = open_at(AT_FDCWD, folder_name, O_RDONLY | O_DIRECTORY);
	char name[32];

	snprintf(name, sizeof(name), "flush.%u", worker->number);
	worker->plain = open_at(folder, name, O_RDWR | O_CREAT | O_TRUNC);
	worker->dsync = open_at(folder, name, O_RDWR | O_DSYNC);
	if (ftruncate(worker->plain, (off_t)(PAGES * page_size)))
		fail("ftruncate");
	worker->map =
		mmap(NULL, PAGES * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, worker->plain, 0);
	if (worker->map == MAP_FAILED)
		fail("mmap");
	close(folder);
}

static void open_target(struct worker *worker, const char *target)
{
	struct stat info;

	if (command.operation == DEEP_FLUSH) {
		worker->plain = open_at(AT_FDCWD, target, O_WRONLY);
		return;
	}
	if (stat(target, &info))
		fail(target);
	worker->disk = S_ISBLK(info.st_mode);
	if (!worker->disk && command.operation == DIRECT_DSYNC)
		usage("direct_dsync requires a block device", target);
	if (worker->disk && (command.operation == MSYNC || command.operation == SYNCFS))
		usage("this operation requires a folder", target);
	if (!worker->disk) {
		open_file(worker, target);
		return;
	}
	worker->begin = (off_t)(worker->number * PAGES * page_size);
	worker->plain = open_at(AT_FDCWD, target, O_RDWR);
	worker->dsync = open_at(AT_FDCWD, target, O_RDWR | O_DSYNC);
	worker->direct = open_at(AT_FDCWD, target, O_RDWR | O_DSYNC | O_DIRECT);
}

static int load(char **targets, unsigned int n_targets)
{
	struct worker *workers = calloc(command.threads, sizeof(*workers));
	uint64_t begin;

	if (!workers || pthread_barrier_init(&start, NULL, command.threads + 1))
		fail("set up");
	for (unsigned int i = 0; i < command.threads; i++) {
		struct worker *worker = &workers[i];

		worker->number = i;
		worker->random = command.seed ^ (uint64_t)(i + 1) << 40;
		worker->buffer = aligned_alloc(page_size, page_size);
		worker->records = calloc(command.count, sizeof(*worker->records));
		if (!worker->buffer || !worker->records)
			fail("malloc");
		open_target(worker, targets[i % n_targets]);
	}
	for (unsigned int i = 0; i < command.threads; i++) {
		errno = pthread_create(&workers[i].thread, NULL, work, &workers[i]);
		if (errno)
			fail("thread");
	}
	begin = clock_ns(CLOCK_MONOTONIC_RAW);
	deadline_ns = begin + command.limit_s * NS_PER_S;
	pthread_barrier_wait(&start);
	for (unsigned int i = 0; i < command.threads; i++)
		pthread_join(workers[i].thread, NULL);
	report_begin();
	report_string("verb", "load");
	report_number("seed", command.seed);
	report_number("threads", command.threads);
	report_number("targets", n_targets);
	report_number("duration_ns", clock_ns(CLOCK_MONOTONIC_RAW) - begin);
	report_open("calls", '[');
	for (unsigned int i = 0; i < command.threads; i++) {
		for (uint64_t j = 0; j < workers[i].done; j++) {
			struct record *record = &workers[i].records[j];

			report_open(NULL, '[');
			report_number(NULL, i);
			report_string(NULL, names[record->operation]);
			report_number(NULL, record->begin_ns);
			report_number(NULL, record->end_ns);
			report_number(NULL, (uint64_t)record->error);
			report_close(']');
		}
	}
	report_close(']');
	report_end();
	return EXIT_FINE;
}

/* --- clock ----------------------------------------------------------------------------------- */

static int exchange(const char *device)
{
	/* Devdax maps multiples of its alignment, which is at most 2 MiB here. */
	size_t size = 2U << 20;
	int fd = open_at(AT_FDCWD, device, O_RDWR);
	volatile uint64_t *words = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	uint64_t limit = clock_ns(CLOCK_MONOTONIC_RAW) + CLOCK_LIMIT_NS;

	if (words == MAP_FAILED)
		fail("mmap");
	/* The host waits for a new number, so remove the number of an earlier run. */
	words[0] = words[1] = 0;
	report_begin();
	report_string("verb", "clock");
	report_open("rounds", '[');
	for (uint64_t i = 1; i <= command.rounds; i++) {
		uint64_t host, end, begin = clock_ns(CLOCK_MONOTONIC_RAW);

		__atomic_store_n(&words[0], i, __ATOMIC_SEQ_CST);
		while (__atomic_load_n(&words[1], __ATOMIC_ACQUIRE) != i) {
			if (clock_ns(CLOCK_MONOTONIC_RAW) > limit) {
				errno = ETIMEDOUT;
				fail("the host does not answer");
			}
		}
		host = words[2];
		end = clock_ns(CLOCK_MONOTONIC_RAW);
		report_open(NULL, '[');
		report_number(NULL, begin);
		report_number(NULL, host);
		report_number(NULL, end);
		report_close(']');
	}
	report_close(']');
	report_end();
	return EXIT_FINE;
}

/* --- command line ---------------------------------------------------------------------------- */

static int parse_operation(const char *text)
{
	for (int i = 0; i < OPERATIONS; i++) {
		if (!strcmp(names[i], text))
			return i;
	}
	if (strcmp(text, "mixed"))
		usage("--op", text);
	return OPERATIONS;
}

int main(int argc, char **argv)
{
	bool clock = parse_verb(argc, argv, "load", "clock");
	int letter;

	while ((letter = next_option(argc, argv, options)) != -1) {
		switch (letter) {
		case 'o':
			command.operation = parse_operation(optarg);
			break;
		case 't':
			command.threads =
				(unsigned int)parse_number("--threads", optarg, 1, MOST_THREADS);
			break;
		case 'c':
			command.count = parse_number("--count", optarg, 1, 1000000);
			break;
		case 'l':
			command.limit_s = parse_number("--limit", optarg, 1, 86400);
			break;
		case 's':
			command.seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 'r':
			command.rounds = parse_number("--rounds", optarg, 1, 1000000);
			break;
		}
	}
	argc -= optind;
	argv += optind;
	page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	if (clock) {
		if (argc != 1 || !command.rounds || command.operation != -1)
			usage("clock requires --rounds and one device", NULL);
		return exchange(argv[0]);
	}
	if (argc < 1 || argc > MOST_TARGETS || command.operation == -1 || command.rounds)
		usage("load requires --op and 1 to 16 targets", NULL);
	return load(argv, (unsigned int)argc);
}
