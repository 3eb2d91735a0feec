// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * removal - take a driver from its device while threads do I/O on it, and bind it again.
 *
 * removal --driver=FOLDER --device=NAME [OPTION]... WORKER...
 *   A WORKER is KIND:OFFSET:PATH. It has slots of 8 KiB, 64 KiB apart from OFFSET on. A step fills one
 *   slot with a new version, and makes a call that promises durability:
 *
 *	fdatasync   pwrite(2) and fdatasync(2)
 *	direct      the same with O_DIRECT
 *	dsync       pwrite(2) with O_DSYNC
 *	msync       stores through a shared mapping, and msync(2)
 *	store       stores through a mapping with MAP_SYNC, flushed from the CPU's cache
 *	open        the same through a mapping that each step makes, of the path at the start of the round
 *
 *   In each round all workers begin; at a random moment NAME is written to FOLDER/unbind. Each worker
 *   must end with an error. Then the old descriptors and mappings are tried, the driver is bound, they
 *   are tried again and closed, and each slot is compared: each word must be of the last acknowledged
 *   version, or of a later one that was tried. Workers of --other are on another device, and never end.
 *   With --mount, the file system is unmounted before the driver is bound, and mounted after that.
 *
 * The work is done by a child process: if one of its system calls hangs, it cannot be ended.
 *
 * Exit status 1: a call hung, a slot has other contents, or a step failed; see the report.
 */
#include "report.h"

#include <glob.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/wait.h>

#ifndef MAP_SYNC
#define MAP_SYNC 0x80000 /* linux/mman.h */
#endif

#define REGIONS "/sys/bus/nd/devices/region"
#define MOST_WORKERS 8
#define SLOTS 8
#define STRIDE 65536
#define SLOT 8192
#define WORDS (SLOT / sizeof(uint64_t))
#define MOST_ERRORS 8
#define MOST_ROUNDS 100
/* Devdax maps multiples of its alignment, which is at most 2 MiB here. */
#define MAPPED (2U << 20)

enum kind { FDATASYNC, DIRECT, DSYNC, MSYNC, STORE, OPEN, KINDS };

static const char *const names[KINDS] = {
	"fdatasync", "direct", "dsync", "msync", "store", "open",
};

struct slot {
	uint64_t acked, tried;
};

struct worker {
	enum kind kind;
	bool other;
	off_t offset;
	const char *path;
	uint64_t random, acks, round_acks;
	/* How often an old mapping was loaded from, and an old mapping or descriptor written to. */
	uint64_t stale_loads, stale_stores, stale_writes;
	/* Slot of the last acknowledged call, and the version that was acknowledged there before. */
	unsigned int last;
	uint64_t before;
	/* How often the data of that call, made through the page cache, were lost. */
	uint64_t dropped;
	struct slot slots[SLOTS];
	int errors[MOST_ERRORS];
	uint64_t error_counts[MOST_ERRORS];
};

/* Shared by the child and its parent, which reports. */
static struct {
	char phase[32], failure[256];
	uint64_t phase_ns, done;
	int failure_errno;
	uint64_t unbind_ns[MOST_ROUNDS];
	unsigned int n_workers;
	struct worker workers[MOST_WORKERS];
} *shared;

/* Of the child alone. */
static struct {
	pthread_t thread;
	char path[256];
	int fd;
	unsigned char *map, *buffer;
} locals[MOST_WORKERS];

static volatile bool stop;
static __thread sigjmp_buf bus;
static __thread volatile bool guarded;

static const struct option options[] = {
	OPTION("driver", 'd'), OPTION("device", 'n'), OPTION("rounds", 'r'), OPTION("seed", 's'),
	OPTION("other", 'o'),  OPTION("mount", 'm'),  OPTION("limit", 'l'),  END_OF_OPTIONS,
};

const char tool_name[] = "removal";
const char usage_text[] =
	"usage: removal --driver=FOLDER --device=NAME [OPTION]... KIND:OFFSET:PATH...\n"
	"  PATH             a file, or DRC/PATTERN: the name of a device below the region's folder\n"
	"  --rounds=N       number of removals (default 1)\n"
	"  --seed=N         seed of the random numbers\n"
	"  --other=WORKER   a worker on another device\n"
	"  --mount=FSTYPE:FOLDER:PATH   the file system of the files, and its disk\n"
	"  --limit=SECONDS  a phase that takes longer hangs (default 30)\n";

static struct {
	const char *driver, *device, *fstype, *folder, *disk;
	uint64_t rounds, seed, limit_s;
} command = { .rounds = 1, .limit_s = 30 };

/* --- the child ------------------------------------------------------------------------------- */

static void on_bus(int signal)
{
	static const char text[] = "removal: SIGBUS outside of a mapping\n";

	if (guarded)
		siglongjmp(bus, signal);
	if (write(2, text, sizeof(text) - 1) < 0)
		_exit(EXIT_NO_REPORT);
	_exit(EXIT_FAILED);
}

static void __attribute__((noreturn)) end_with(const char *failure, int number)
{
	snprintf(shared->failure, sizeof(shared->failure), "%s", failure);
	shared->failure_errno = number;
	_exit(EXIT_WRONG);
}

static void enter(const char *phase)
{
	snprintf(shared->phase, sizeof(shared->phase), "%s", phase);
	__atomic_store_n(&shared->phase_ns, now_ns(), __ATOMIC_SEQ_CST);
}

static uint64_t word(const struct worker *worker, unsigned int slot, uint64_t version, size_t i)
{
	uint64_t place = (uint64_t)(worker - shared->workers) << 8 | slot;

	return mix((place << 48 | version << 16) + i);
}

/* True if the bus of a region, /sys/bus/nd/devices/REGION/..., is that of a DRC index. */
static bool is_of_drc(const char *path, const char *drc, size_t length)
{
	const char *end = strchr(path + strlen(REGIONS), '/');
	char name[128], provider[128] = "";
	FILE *file;

	snprintf(name, sizeof(name), "%.*s/../provider", (int)(end - path), path);
	file = fopen(name, "r");
	if (!file)
		return false;
	if (!fgets(provider, sizeof(provider), file))
		provider[0] = '\0';
	fclose(file);
	return strchr(provider, '@') && !strncmp(strchr(provider, '@') + 1, drc, length);
}

/* The path of a file, or of the only device that matches DRC/PATTERN now; else false. */
static bool resolve(const char *path, char *buffer, size_t size)
{
	const char *slash = strchr(path, '/');
	unsigned int count = 0;
	char pattern[128];
	glob_t matches;

	if (slash == path)
		return (size_t)snprintf(buffer, size, "%s", path) < size;
	snprintf(pattern, sizeof(pattern), REGIONS "*%s", slash);
	if (glob(pattern, 0, NULL, &matches))
		return false;
	for (size_t i = 0; i < matches.gl_pathc; i++) {
		const char *match = matches.gl_pathv[i];

		if (!is_of_drc(match, path, (size_t)(slash - path)))
			continue;
		snprintf(buffer, size, "/dev/%s", strrchr(match, '/') + 1);
		count++;
	}
	globfree(&matches);
	return count == 1;
}

/* Open a device that may not be there yet; its path is then in the buffer. */
static int open_soon(const char *path, int flags, char *buffer, size_t size)
{
	for (;;) {
		bool resolved = resolve(path, buffer, size);
		int fd = resolved ? open(buffer, flags | O_CLOEXEC) : -1;

		if (fd >= 0 || (resolved && errno != ENOENT && errno != ENXIO && errno != ENODEV))
			return fd;
		/* The kernel probes asynchronously; the limit of the phase ends this. */
		usleep(1000);
	}
}

static bool is_mapping(const struct worker *worker)
{
	return worker->kind == MSYNC || worker->kind == STORE || worker->kind == OPEN;
}

static void *map_worker(const struct worker *worker, int fd)
{
	int flags = worker->kind == MSYNC ? MAP_SHARED : MAP_SHARED_VALIDATE | MAP_SYNC;

	return mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, flags, fd, worker->offset);
}

static void open_worker(unsigned int number)
{
	static const int flags[KINDS] = { [DIRECT] = O_DIRECT, [DSYNC] = O_DSYNC };
	struct worker *worker = &shared->workers[number];

	locals[number].fd = open_soon(worker->path, O_RDWR | flags[worker->kind],
				      locals[number].path, sizeof(locals[number].path));
	if (locals[number].fd < 0)
		end_with("open", errno);
	if (!is_mapping(worker))
		return;
	locals[number].map = map_worker(worker, locals[number].fd);
	if (locals[number].map == MAP_FAILED)
		end_with("mmap", errno);
}

static void close_worker(unsigned int number)
{
	if (locals[number].map)
		munmap(locals[number].map, MAPPED);
	locals[number].map = NULL;
	close(locals[number].fd);
}

static void copy(unsigned char *to, const unsigned char *from)
{
	volatile uint64_t *words = (volatile uint64_t *)to;

	for (size_t i = 0; i < WORDS; i++)
		words[i] = ((const uint64_t *)from)[i];
}

/* 0 or an errno; EFAULT for SIGBUS. */
static int store(unsigned char *to, const unsigned char *from)
{
	int error = EFAULT;

	if (!sigsetjmp(bus, 1)) {
		guarded = true;
		copy(to, from);
		error = 0;
	}
	guarded = false;
	return error;
}

/* Store and make durable. */
static int persist(enum kind kind, unsigned char *to, const unsigned char *from)
{
	int error = store(to, from);

	if (error)
		return error;
	if (kind == MSYNC)
		return msync(to, SLOT, MS_SYNC) ? errno : 0;
	if (sigsetjmp(bus, 1)) {
		guarded = false;
		return EFAULT;
	}
	guarded = true;
	flush_cache(to, SLOT);
	guarded = false;
	return 0;
}

/* Write a slot through a new mapping. */
static int write_anew(unsigned int number, off_t offset)
{
	const struct worker *worker = &shared->workers[number];
	int fd = open(locals[number].path, O_RDWR | O_CLOEXEC), error;
	unsigned char *map;

	if (fd < 0)
		return errno;
	map = map_worker(worker, fd);
	error = map == MAP_FAILED ? errno : 0;
	close(fd);
	if (error)
		return error;
	error = persist(worker->kind, map + offset, locals[number].buffer);
	munmap(map, MAPPED);
	return error;
}

static int write_slot(unsigned int number, unsigned int slot)
{
	struct worker *worker = &shared->workers[number];
	off_t offset = (off_t)slot * STRIDE;
	ssize_t count;

	if (worker->kind == OPEN)
		return write_anew(number, offset);
	if (is_mapping(worker))
		return persist(worker->kind, locals[number].map + offset, locals[number].buffer);
	count = pwrite(locals[number].fd, locals[number].buffer, SLOT, worker->offset + offset);
	if (count != SLOT)
		return count < 0 ? errno : ENOSPC;
	return worker->kind != DSYNC && fdatasync(locals[number].fd) ? errno : 0;
}

static void fill(unsigned int number, unsigned int slot, uint64_t version)
{
	for (size_t i = 0; i < WORDS; i++)
		((uint64_t *)locals[number].buffer)[i] =
			word(&shared->workers[number], slot, version, i);
}

static int step(unsigned int number, unsigned int index)
{
	struct worker *worker = &shared->workers[number];
	struct slot *slot = &worker->slots[index];
	int error;

	fill(number, index, slot->tried + 1);
	slot->tried++;
	error = write_slot(number, index);
	if (error)
		return error;
	worker->last = index;
	worker->before = slot->acked;
	slot->acked = slot->tried;
	worker->acks++;
	__atomic_add_fetch(&worker->round_acks, 1, __ATOMIC_SEQ_CST);
	return 0;
}

static void count_error(struct worker *worker, int error)
{
	for (int i = 0; i < MOST_ERRORS; i++) {
		if (worker->error_counts[i] && worker->errors[i] != error)
			continue;
		worker->errors[i] = error;
		worker->error_counts[i]++;
		return;
	}
}

static void *work(void *argument)
{
	unsigned int number = (unsigned int)(uintptr_t)argument;
	struct worker *worker = &shared->workers[number];
	int error = 0;

	while (!error && !(worker->other && stop))
		error = step(number, (unsigned int)draw_below(&worker->random, SLOTS));
	if (error)
		count_error(worker, error);
	return NULL;
}

static void start(unsigned int number)
{
	shared->workers[number].round_acks = 0;
	errno = pthread_create(&locals[number].thread, NULL, work, (void *)(uintptr_t)number);
	if (errno)
		end_with("pthread_create", errno);
}

static void compare(unsigned int number)
{
	struct worker *worker = &shared->workers[number];
	uint64_t *words = (uint64_t *)locals[number].buffer;
	bool cached = worker->kind == FDATASYNC || worker->kind == DSYNC || worker->kind == MSYNC;

	for (unsigned int slot = 0; slot < SLOTS; slot++) {
		struct slot *state = &worker->slots[slot];
		off_t offset = (off_t)slot * STRIDE;
		bool last = cached && slot == worker->last, dropped = false;

		if (is_mapping(worker))
			memcpy(words, locals[number].map + offset, SLOT);
		else if (pread(locals[number].fd, words, SLOT, worker->offset + offset) != SLOT)
			end_with("pread", errno);
		for (size_t i = 0; i < WORDS; i++) {
			uint64_t version = last ? worker->before : state->acked;

			while (version <= state->tried &&
			       words[i] != word(worker, slot, version, i))
				version++;
			dropped |= version < state->acked;
			if (version <= state->tried)
				continue;
			snprintf(shared->failure, sizeof(shared->failure),
				 "%s, slot %u, word %zu: neither of version %" PRIu64
				 ", which is acknowledged, nor of a later one up to %" PRIu64,
				 names[worker->kind], slot, i, state->acked, state->tried);
			_exit(EXIT_WRONG);
		}
		if (dropped) {
			worker->dropped++;
			state->acked = worker->before;
		}
	}
}

static bool loads(const unsigned char *from)
{
	bool loaded = false;

	if (!sigsetjmp(bus, 1)) {
		guarded = true;
		(void)*(volatile const unsigned char *)from;
		loaded = true;
	}
	guarded = false;
	return loaded;
}

/* A store or write here has the contents that the slot has, or may have. */
static void try_stale(unsigned int number)
{
	struct worker *worker = &shared->workers[number];

	fill(number, 0, worker->slots[0].tried);
	if (!is_mapping(worker)) {
		worker->stale_writes += !write_slot(number, 0);
		return;
	}
	worker->stale_loads += loads(locals[number].map);
	worker->stale_stores += !store(locals[number].map, locals[number].buffer);
}

static void bind(const char *verb)
{
	char path[256];
	ssize_t count;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", command.driver, verb);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	count = fd < 0 ? -1 : write(fd, command.device, strlen(command.device));
	if (count < 0)
		end_with(verb, errno);
	close(fd);
}

static void mount_disk(void)
{
	char path[256];
	int fd = open_soon(command.disk, O_RDONLY, path, sizeof(path));

	if (fd < 0)
		end_with("the disk", errno);
	close(fd);
	if (mount(path, command.folder, command.fstype, 0, "dax=always"))
		end_with("mount", errno);
}

static void for_removed(void (*function)(unsigned int number))
{
	for (unsigned int i = 0; i < shared->n_workers; i++)
		if (!shared->workers[i].other)
			function(i);
}

static void wait_first(unsigned int number)
{
	/* Polled: a worker signals nothing after its first call. */
	while (!__atomic_load_n(&shared->workers[number].round_acks, __ATOMIC_SEQ_CST))
		usleep(500);
}

static void join(unsigned int number)
{
	pthread_join(locals[number].thread, NULL);
}

static void make_round(uint64_t *random, uint64_t round)
{
	uint64_t begin;

	enter("first calls");
	for_removed(start);
	for_removed(wait_first);
	/* The moment of the removal is random. */
	usleep((useconds_t)draw_below(random, 20000));
	enter("unbind");
	begin = now_ns();
	bind("unbind");
	shared->unbind_ns[round] = now_ns() - begin;
	enter("end of the calls");
	for_removed(join);
	enter("calls after the removal");
	for_removed(try_stale);
	if (command.folder) {
		for_removed(close_worker);
		enter("umount");
		if (umount2(command.folder, 0))
			end_with("umount", errno);
	}
	enter("bind");
	bind("bind");
	if (command.folder) {
		enter("mount");
		mount_disk();
	} else {
		enter("calls after the bind");
		for_removed(try_stale);
		for_removed(close_worker);
	}
	enter("open");
	for_removed(open_worker);
	enter("compare");
	for_removed(compare);
	shared->done++;
}

static void make_rounds(void)
{
	uint64_t random = command.seed;

	signal(SIGBUS, on_bus);
	enter("start");
	for (unsigned int i = 0; i < shared->n_workers; i++) {
		if (posix_memalign((void **)&locals[i].buffer, STRIDE, STRIDE))
			end_with("memory", ENOMEM);
		shared->workers[i].random = mix(command.seed + i);
		open_worker(i);
		for (unsigned int slot = 0; slot < SLOTS; slot++) {
			int error = step(i, slot);

			if (error)
				end_with("first write", error);
		}
		if (shared->workers[i].other)
			start(i);
	}
	for (uint64_t round = 0; round < command.rounds; round++)
		make_round(&random, round);
	enter("end");
	stop = true;
	for (unsigned int i = 0; i < shared->n_workers; i++) {
		if (!shared->workers[i].other)
			continue;
		join(i);
		compare(i);
	}
	_exit(EXIT_FINE);
}

/* --- the parent ------------------------------------------------------------------------------ */

/* The kernel stack of each thread of the child, as one text. */
static void read_stacks(pid_t child, char *text, size_t size)
{
	char pattern[64];
	size_t length = 0;
	glob_t matches;

	snprintf(pattern, sizeof(pattern), "/proc/%d/task/*/stack", (int)child);
	if (glob(pattern, 0, NULL, &matches))
		return;
	for (size_t i = 0; i < matches.gl_pathc && length + 1 < size; i++) {
		FILE *file = fopen(matches.gl_pathv[i], "r");

		if (!file)
			continue;
		length += fread(text + length, 1, size - 1 - length, file);
		fclose(file);
	}
	text[length] = '\0';
}

static void report_worker(const struct worker *worker)
{
	report_open(NULL, '{');
	report_string("kind", names[worker->kind]);
	report_bool("other", worker->other);
	report_number("acks", worker->acks);
	report_number("stale_loads", worker->stale_loads);
	report_number("stale_stores", worker->stale_stores);
	report_number("stale_writes", worker->stale_writes);
	report_number("dropped", worker->dropped);
	report_open("errors", '{');
	for (int i = 0; i < MOST_ERRORS && worker->error_counts[i]; i++)
		report_number(errno_name(worker->errors[i]), worker->error_counts[i]);
	report_close('}');
	report_open("slots", '[');
	for (int i = 0; i < SLOTS; i++) {
		report_open(NULL, '[');
		report_number(NULL, worker->slots[i].acked);
		report_number(NULL, worker->slots[i].tried);
		report_close(']');
	}
	report_close(']');
	report_close('}');
}

static int supervise(pid_t child)
{
	uint64_t limit_ns = command.limit_s * NS_PER_S;
	static char stacks[8192];
	int status = 0;
	bool hung = false;

	while (!hung && waitpid(child, &status, WNOHANG) == 0) {
		/* waitpid() has no limit of its own. */
		usleep(5000);
		hung = now_ns() > __atomic_load_n(&shared->phase_ns, __ATOMIC_SEQ_CST) + limit_ns;
	}
	if (hung) {
		read_stacks(child, stacks, sizeof(stacks));
		kill(child, SIGKILL);
	} else if (!WIFEXITED(status) || WEXITSTATUS(status) > EXIT_WRONG) {
		fprintf(stderr, "%s: the child ended with status %#x in phase %s\n", tool_name,
			status, shared->phase);
		return EXIT_FAILED;
	}
	report_begin();
	report_number("seed", command.seed);
	report_number("rounds", shared->done);
	report_bool("hung", hung);
	report_string("phase", shared->phase);
	report_string("stacks", stacks);
	report_string("failure", shared->failure);
	report_number("errno", (uint64_t)shared->failure_errno);
	report_open("unbind_us", '[');
	for (uint64_t i = 0; i < shared->done; i++)
		report_number(NULL, shared->unbind_ns[i] / 1000);
	report_close(']');
	report_open("workers", '[');
	for (unsigned int i = 0; i < shared->n_workers; i++)
		report_worker(&shared->workers[i]);
	report_close(']');
	report_end();
	return hung || *shared->failure ? EXIT_WRONG : EXIT_FINE;
}

static void add_worker(char *text, bool other)
{
	struct worker *worker = &shared->workers[shared->n_workers];
	char *kind = strtok(text, ":"), *offset = strtok(NULL, ":"), *path = strtok(NULL, "");
	int number = 0;

	if (!path || !strchr(path, '/') || shared->n_workers++ == MOST_WORKERS)
		usage("expected at most 8 of KIND:OFFSET:PATH", path);
	while (number < KINDS && strcmp(names[number], kind))
		number++;
	if (number == KINDS)
		usage("unknown kind", kind);
	worker->kind = (enum kind)number;
	worker->offset = (off_t)parse_number("OFFSET", offset, 0, INT64_MAX);
	worker->path = path;
	worker->other = other;
}

int main(int argc, char **argv)
{
	int letter;
	pid_t child;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	if (shared == MAP_FAILED)
		fail("mmap");
	while ((letter = next_option(argc, argv, options)) != -1) {
		switch (letter) {
		case 'd':
			command.driver = optarg;
			break;
		case 'n':
			command.device = optarg;
			break;
		case 'r':
			command.rounds = parse_number("--rounds", optarg, 1, MOST_ROUNDS);
			break;
		case 's':
			command.seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 'l':
			command.limit_s = parse_number("--limit", optarg, 1, 3600);
			break;
		case 'o':
			add_worker(optarg, true);
			break;
		case 'm':
			command.fstype = strtok(optarg, ":");
			command.folder = strtok(NULL, ":");
			command.disk = strtok(NULL, "");
			if (!command.disk)
				usage("--mount", optarg);
			break;
		}
	}
	while (optind < argc)
		add_worker(argv[optind++], false);
	if (!command.driver || !command.device || !shared->n_workers)
		usage("expected --driver, --device and workers", NULL);
	shared->phase_ns = now_ns();
	child = fork();
	if (child < 0)
		fail("fork");
	if (child)
		return supervise(child);
	/* A child that cannot be ended must not keep the report's pipe open. */
	if (!freopen("/dev/null", "w", stdout))
		_exit(EXIT_FAILED);
	make_rounds();
	return EXIT_FAILED;
}
