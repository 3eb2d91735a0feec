// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * faults - page faults of a file system under load from several threads.
 *
 * faults load [OPTION]... --seed=N --sync=on|off --expected=DIR DIR
 *   Each thread has its own files, and knows every byte of them: it maps them, stores, extends,
 *   truncates, punches holes, renames, replaces, removes. All threads share one file, the stripes,
 *   in which each thread owns every n-th page. They also share another file, the arena, which no
 *   thread owns: there they truncate pages that other threads access. A store beyond the end of a
 *   file must raise SIGBUS; in the arena it may. Elsewhere SIGBUS is an error, and so is any wrong
 *   byte. At the end the expected content of all files is written to another folder.
 *
 * faults verify --seed=N --expected=DIR DIR
 *   Reads all files, and compares their names, sizes, bytes and checksums.
 *
 * Exit status 1: there were errors; they are in the report. See report.h for the others.
 */
#include "report.h"

#include <dirent.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define MOST_THREADS 64
/* Per thread, concurrently. */
#define FILES 4
#define FILE_PAGES 12
/* Large enough for pages of 2 MiB, which DAX can map as a unit. */
#define STRIPES_BYTES (8U << 20)
#define ARENA_PAGES 24
#define MOST_ERRORS 12
#define FINDING_BYTES 176
#define WORD sizeof(uint64_t)

enum operation {
	CREATE,
	STORE,
	LOAD,
	READ,
	EXTEND,
	TRUNCATE,
	PUNCH,
	RENAME,
	REPLACE,
	REMOVE,
	SYNC,
	STRIPE_STORE,
	STRIPE_LOAD,
	STRIPE_PUNCH,
	STRIPE_EXTEND,
	ARENA_STORE,
	ARENA_TRUNCATE,
	ARENA_PUNCH,
	OPERATIONS
};

static const struct {
	const char *name;
	unsigned int weight; /* frequency, relative to the sum of all weights */
} kinds[OPERATIONS] = {
	[CREATE] = { "create", 0 }, /* whenever a thread has fewer than FILES files */
	[STORE] = { "store", 30 },
	[LOAD] = { "load", 8 },
	[READ] = { "read", 4 },
	[EXTEND] = { "extend", 14 },
	[TRUNCATE] = { "truncate", 8 },
	[PUNCH] = { "punch", 10 },
	[RENAME] = { "rename", 5 },
	[REPLACE] = { "replace", 2 },
	[REMOVE] = { "remove", 2 },
	[SYNC] = { "sync", 2 },
	[STRIPE_STORE] = { "stripe_store", 12 },
	[STRIPE_LOAD] = { "stripe_load", 4 },
	[STRIPE_PUNCH] = { "stripe_punch", 3 },
	[STRIPE_EXTEND] = { "stripe_extend", 3 },
	[ARENA_STORE] = { "arena_store", 12 },
	[ARENA_TRUNCATE] = { "arena_truncate", 4 },
	[ARENA_PUNCH] = { "arena_punch", 2 },
};

struct command {
	bool verify, sync, have_sync, have_seed, any_file;
	const char *dir, *expected;
	uint64_t seed, operations, limit_s;
	unsigned int threads;
};

/* A file of one thread, and its expected content. */
struct file {
	bool there;
	char name[64]; /* with its folder */
	int fd;
	char *map, *shadow;
	uint64_t size;
};

struct worker {
	pthread_t thread;
	unsigned int number;
	uint64_t random, serial;
	struct file files[FILES];
	char *stripes, *stripes_shadow, *arena; /* this thread's own mappings */
	uint64_t counts[OPERATIONS], sigbus_expected, sigbus_arena;
};

static const struct option options[] = {
	OPTION("seed", 's'),	   OPTION("sync", 'y'),
	OPTION("expected", 'e'),   OPTION("threads", 't'),
	OPTION("operations", 'o'), OPTION("limit", 'l'),
	FLAG("any-file", 'a'),	   END_OF_OPTIONS,
};

const char tool_name[] = "faults";
const char usage_text[] =
	"usage: faults load [OPTION]... --seed=N --sync=on|off --expected=DIR DIR\n"
	"       faults verify --seed=N --expected=DIR DIR\n"
	"  --seed=N         seed of the random numbers\n"
	"  --sync=on|off    map with MAP_SYNC or without\n"
	"  --expected=DIR   folder for the expected content, on another file system\n"
	"  --threads=N      number of threads (default 8)\n"
	"  --operations=N   operations per thread (default 500)\n"
	"  --limit=SECONDS  stop after this time (default 20)\n"
	"  --any-file       accept files that are not DAX, too\n";

static uint64_t page_size;
static struct command command;
static int top; /* the folder */
static int stripes_fd, arena_fd;
/* Lower bound of the stripes' length, pages; it only grows. */
static atomic_uint_fast64_t stripes_pages;
static pthread_mutex_t findings_lock = PTHREAD_MUTEX_INITIALIZER;
static char findings[MOST_ERRORS][FINDING_BYTES];
static unsigned int error_count;

static void __attribute__((format(printf, 2, 3))) complain(unsigned int thread, const char *format,
							   ...)
{
	va_list arguments;

	pthread_mutex_lock(&findings_lock);
	if (error_count < MOST_ERRORS) {
		int length = snprintf(findings[error_count], FINDING_BYTES, "thread %u: ", thread);

		va_start(arguments, format);
		vsnprintf(findings[error_count] + length, FINDING_BYTES - (size_t)length, format,
			  arguments);
		va_end(arguments);
	}
	error_count++;
	pthread_mutex_unlock(&findings_lock);
}

static void failed(const struct worker *worker, const char *what, const char *name)
{
	complain(worker->number, "%s %s: errno %d %s", what, name, errno, errno_name(errno));
}

/* --- numbers --------------------------------------------------------------------------------- */

static uint64_t draw(struct worker *worker, uint64_t limit)
{
	return draw_below(&worker->random, limit);
}

/* The only value except zero that is valid at this place of the arena. */
static uint64_t arena_word(uint64_t seed, uint64_t place)
{
	return mix(mix(seed + 0xa5e4aULL) + place) | 1;
}

/* CRC-32 as in zlib, with a table. */
static uint32_t crc32_of(const char *data, size_t size)
{
	static uint32_t table[256];
	uint32_t crc = 0xffffffff;

	if (!table[1]) {
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t value = i;

			for (int bit = 0; bit < 8; bit++)
				value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
			table[i] = value;
		}
	}
	for (size_t i = 0; i < size; i++)
		crc = crc >> 8 ^ table[(crc ^ (unsigned char)data[i]) & 0xff];
	return ~crc;
}

/* --- accesses that may raise SIGBUS ---------------------------------------------------------- */

static __thread sigjmp_buf escape;
static __thread volatile bool guarded;

static void on_sigbus(int number)
{
	if (!guarded) {
		/* A fault of this program itself: let it die. */
		signal(number, SIG_DFL);
		return;
	}
	guarded = false;
	siglongjmp(escape, 1);
}

/* True if no SIGBUS was raised. */
static bool store_words(char *to, const char *from, uint64_t size)
{
	volatile uint64_t *target = (volatile uint64_t *)to;

	if (sigsetjmp(escape, 1))
		return false;
	guarded = true;
	for (uint64_t i = 0; i < size / WORD; i++)
		target[i] = ((const uint64_t *)from)[i];
	flush_cache(to, size);
	guarded = false;
	return true;
}

static bool load_words(char *to, const char *from, uint64_t size)
{
	const volatile uint64_t *source = (const volatile uint64_t *)from;

	if (sigsetjmp(escape, 1))
		return false;
	guarded = true;
	for (uint64_t i = 0; i < size / WORD; i++)
		((uint64_t *)to)[i] = source[i];
	guarded = false;
	return true;
}

/* Compare bytes with the expected ones. */
static void compare(unsigned int thread, const char *what, const char *name, uint64_t offset,
		    const char *expected, const char *found, uint64_t size)
{
	for (uint64_t i = 0; i < size; i++) {
		if (expected[i] != found[i]) {
			complain(thread, "%s %s: byte %#" PRIx64 " is 0x%02x, not 0x%02x", what,
				 name, offset + i, (unsigned char)found[i],
				 (unsigned char)expected[i]);
			return;
		}
	}
}

/* --- files ----------------------------------------------------------------------------------- */

static char *map_file(int fd, uint64_t length)
{
	const int flags = MAP_SHARED_VALIDATE | (command.sync ? MAP_SYNC : 0);
	char *map = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);

	return map == MAP_FAILED ? NULL : map;
}

static bool is_allowed(int fd)
{
	return command.any_file || is_dax(fd);
}

static void new_name(struct worker *worker, char *name, size_t size)
{
	snprintf(name, size, "%c/t%u-%" PRIu64, draw(worker, 2) ? 'a' : 'b', worker->number,
		 worker->serial++);
}

static void create(struct worker *worker, struct file *file)
{
	new_name(worker, file->name, sizeof(file->name));
	file->fd = openat(top, file->name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (file->fd < 0) {
		failed(worker, "create", file->name);
		return;
	}
	if (!is_allowed(file->fd))
		complain(worker->number, "create %s: not DAX", file->name);
	/* The longest mapping of the file: accesses beyond its end must raise SIGBUS. */
	file->map = map_file(file->fd, FILE_PAGES * page_size);
	if (!file->map) {
		failed(worker, "mmap", file->name);
		close(file->fd);
		return;
	}
	memset(file->shadow, 0, FILE_PAGES * page_size);
	file->size = 0;
	file->there = true;
	worker->counts[CREATE]++;
}

static void let_go(struct worker *worker, struct file *file)
{
	if (munmap(file->map, FILE_PAGES * page_size))
		failed(worker, "munmap", file->name);
	close(file->fd);
	file->there = false;
}

/* A range of whole words in one page; in half of the cases the whole page. */
static void draw_range(struct worker *worker, uint64_t pages, uint64_t *offset, uint64_t *size)
{
	uint64_t page = draw(worker, pages), begin = 0, end = page_size / WORD;

	if (draw(worker, 2)) {
		begin = draw(worker, end);
		end = begin + 1 + draw(worker, end - begin);
	}
	*offset = page * page_size + begin * WORD;
	*size = (end - begin) * WORD;
}

static uint64_t draw_size(struct worker *worker, uint64_t low, uint64_t high)
{
	uint64_t unit = draw(worker, 2) ? page_size : WORD;

	return low + draw(worker, (high - low) / unit + 1) * unit;
}

static void fill(struct worker *worker, char *data, uint64_t size)
{
	uint64_t base = draw(worker, UINT64_MAX);

	for (uint64_t i = 0; i < size / WORD; i++)
		((uint64_t *)data)[i] = mix(base + i);
}

/* Store to a file, which may be unlinked; a store beyond its end must raise SIGBUS. */
static void store(struct worker *worker, struct file *file, char *buffer)
{
	uint64_t offset, size, end = (file->size + page_size - 1) / page_size * page_size;

	/* One store in four can be anywhere in the mapping. */
	draw_range(worker, end && draw(worker, 4) ? end / page_size : FILE_PAGES, &offset, &size);
	if (offset < end && offset + size > file->size) {
		/* Never store between the end of the file and the end of its last page. */
		offset = offset < file->size ? offset : end - page_size;
		size = file->size - offset;
	}
	fill(worker, buffer, size);
	if (store_words(file->map + offset, buffer, size)) {
		if (offset >= end)
			complain(worker->number,
				 "store %s: no SIGBUS at %#" PRIx64 ", beyond the end at %#" PRIx64,
				 file->name, offset, file->size);
		else
			memcpy(file->shadow + offset, buffer, size);
	} else if (offset >= end) {
		worker->sigbus_expected++;
	} else {
		complain(worker->number,
			 "store %s: SIGBUS at %#" PRIx64 ", the end is at %#" PRIx64, file->name,
			 offset, file->size);
	}
	worker->counts[STORE]++;
}

static void load(struct worker *worker, struct file *file, char *buffer)
{
	uint64_t offset, size;

	if (!file->size)
		return;
	draw_range(worker, (file->size + page_size - 1) / page_size, &offset, &size);
	if (offset >= file->size)
		return;
	size = offset + size > file->size ? file->size - offset : size;
	if (load_words(buffer, file->map + offset, size))
		compare(worker->number, "load", file->name, offset, file->shadow + offset, buffer,
			size);
	else
		complain(worker->number, "load %s: SIGBUS at %#" PRIx64, file->name, offset);
	worker->counts[LOAD]++;
}

static void read_back(struct worker *worker, struct file *file, char *buffer)
{
	uint64_t offset = 0;

	while (offset < file->size) {
		uint64_t size = file->size - offset > page_size ? page_size : file->size - offset;
		ssize_t got = pread(file->fd, buffer, size, (off_t)offset);

		if (got != (ssize_t)size) {
			failed(worker, "read", file->name);
			return;
		}
		compare(worker->number, "read", file->name, offset, file->shadow + offset, buffer,
			size);
		offset += size;
	}
	worker->counts[READ]++;
}

static void resize(struct worker *worker, struct file *file, bool longer)
{
	uint64_t size = longer ? draw_size(worker, file->size, FILE_PAGES * page_size) :
				 draw_size(worker, 0, file->size);

	/* A resize that changes nothing is not counted. */
	if (size > FILE_PAGES * page_size || size == file->size)
		return;
	if (ftruncate(file->fd, (off_t)size)) {
		failed(worker, "ftruncate", file->name);
		return;
	}
	if (size < file->size)
		memset(file->shadow + size, 0, file->size - size);
	file->size = size;
	worker->counts[longer ? EXTEND : TRUNCATE]++;
}

static bool punch_range(struct worker *worker, int fd, const char *name, uint64_t offset,
			uint64_t size)
{
	if (!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size))
		return true;
	failed(worker, "punch", name);
	return false;
}

static void punch(struct worker *worker, struct file *file)
{
	uint64_t begin, size;

	if (!file->size)
		return;
	begin = draw_size(worker, 0, file->size - WORD);
	size = draw_size(worker, WORD, file->size);
	if (begin + size > file->size)
		size = file->size - begin;
	if (!size || !punch_range(worker, file->fd, file->name, begin, size))
		return;
	memset(file->shadow + begin, 0, size);
	worker->counts[PUNCH]++;
}

static void rename_to(struct worker *worker, struct file *file, const char *name,
		      enum operation kind)
{
	if (renameat(top, file->name, top, name)) {
		failed(worker, kinds[kind].name, file->name);
		return;
	}
	strcpy(file->name, name);
	worker->counts[kind]++;
}

/* Rename over another file of the thread; the mapping of the replaced file must still work. */
static void replace(struct worker *worker, struct file *file, char *buffer)
{
	struct file *other = &worker->files[draw(worker, FILES)];

	if (other == file || !other->there)
		return;
	rename_to(worker, file, other->name, REPLACE);
	strcpy(other->name, "(replaced)");
	store(worker, other, buffer);
	read_back(worker, other, buffer);
	let_go(worker, other);
}

static void remove_file(struct worker *worker, struct file *file)
{
	if (unlinkat(top, file->name, 0)) {
		failed(worker, "unlink", file->name);
		return;
	}
	let_go(worker, file);
	worker->counts[REMOVE]++;
}

static void sync_file(struct worker *worker, struct file *file)
{
	if (draw(worker, 2) ? fsync(file->fd) : msync(file->map, FILE_PAGES * page_size, MS_SYNC))
		failed(worker, "sync", file->name);
	worker->counts[SYNC]++;
}

/* --- the stripes ----------------------------------------------------------------------------- */

/* Draw a range in one of the thread's own pages; false if it has none yet. */
static bool draw_stripe(struct worker *worker, uint64_t *offset, uint64_t *size)
{
	uint64_t mine = atomic_load(&stripes_pages) / command.threads;

	if (!mine)
		return false;
	draw_range(worker, 1, offset, size);
	*offset += (draw(worker, mine) * command.threads + worker->number) * page_size;
	return true;
}

static void stripe_access(struct worker *worker, enum operation kind, char *buffer)
{
	uint64_t offset, size;

	if (!draw_stripe(worker, &offset, &size))
		return;
	if (kind == STRIPE_PUNCH) {
		if (punch_range(worker, stripes_fd, "stripes", offset, size))
			memset(worker->stripes_shadow + offset, 0, size);
	} else if (kind == STRIPE_STORE) {
		fill(worker, buffer, size);
		if (store_words(worker->stripes + offset, buffer, size))
			memcpy(worker->stripes_shadow + offset, buffer, size);
		else
			complain(worker->number, "store stripes: SIGBUS at %#" PRIx64, offset);
	} else if (load_words(buffer, worker->stripes + offset, size)) {
		compare(worker->number, "load", "stripes", offset, worker->stripes_shadow + offset,
			buffer, size);
	} else {
		complain(worker->number, "load stripes: SIGBUS at %#" PRIx64, offset);
	}
	worker->counts[kind]++;
}

/* Extend by fallocate(), which never shortens the file if another thread has extended it more. */
static void stripe_extend(struct worker *worker)
{
	uint64_t pages = atomic_load(&stripes_pages), most = STRIPES_BYTES / page_size;
	uint64_t wanted = pages + command.threads * (1 + draw(worker, 2));

	if (wanted > most)
		return;
	if (fallocate(stripes_fd, 0, (off_t)((wanted - 1) * page_size), (off_t)page_size)) {
		failed(worker, "fallocate", "stripes");
		return;
	}
	while (pages < wanted && !atomic_compare_exchange_weak(&stripes_pages, &pages, wanted))
		;
	worker->counts[STRIPE_EXTEND]++;
}

/* --- the arena ------------------------------------------------------------------------------- */

static void arena_store(struct worker *worker, char *buffer)
{
	uint64_t offset, size;

	draw_range(worker, ARENA_PAGES, &offset, &size);
	for (uint64_t i = 0; i < size / WORD; i++)
		((uint64_t *)buffer)[i] = arena_word(command.seed, offset / WORD + i);
	if (!store_words(worker->arena + offset, buffer, size))
		worker->sigbus_arena++;
	worker->counts[ARENA_STORE]++;
}

static void arena_truncate(struct worker *worker)
{
	if (ftruncate(arena_fd, (off_t)draw_size(worker, 0, ARENA_PAGES * page_size)))
		failed(worker, "ftruncate", "arena");
	worker->counts[ARENA_TRUNCATE]++;
}

static void arena_punch(struct worker *worker)
{
	uint64_t begin = draw_size(worker, 0, (ARENA_PAGES - 1) * page_size);

	punch_range(worker, arena_fd, "arena", begin, draw_size(worker, WORD, page_size));
	worker->counts[ARENA_PUNCH]++;
}

static void check_arena(unsigned int thread, uint64_t offset, const char *data, uint64_t size)
{
	for (uint64_t i = 0; i < size / WORD; i++) {
		uint64_t found = ((const uint64_t *)data)[i];

		if (found && found != arena_word(command.seed, offset / WORD + i)) {
			complain(thread,
				 "arena: the word at %#" PRIx64 " is %#" PRIx64
				 ", which no thread stored there",
				 offset + i * WORD, found);
			return;
		}
	}
}

/* --- load ------------------------------------------------------------------------------------ */

static enum operation draw_operation(struct worker *worker)
{
	unsigned int sum = 0, place;

	for (int kind = 0; kind < OPERATIONS; kind++)
		sum += kinds[kind].weight;
	place = (unsigned int)draw(worker, sum);
	for (int kind = 0; kind < OPERATIONS; kind++) {
		if (place < kinds[kind].weight)
			return (enum operation)kind;
		place -= kinds[kind].weight;
	}
	abort();
}

static void operate(struct worker *worker, char *buffer)
{
	struct file *file = &worker->files[draw(worker, FILES)];
	enum operation kind;
	char name[64];

	if (!file->there) {
		create(worker, file);
		return;
	}
	kind = draw_operation(worker);
	switch (kind) {
	case STORE:
		store(worker, file, buffer);
		break;
	case LOAD:
		load(worker, file, buffer);
		break;
	case READ:
		read_back(worker, file, buffer);
		break;
	case EXTEND:
	case TRUNCATE:
		resize(worker, file, kind == EXTEND);
		break;
	case PUNCH:
		punch(worker, file);
		break;
	case RENAME:
		new_name(worker, name, sizeof(name));
		rename_to(worker, file, name, RENAME);
		break;
	case REPLACE:
		replace(worker, file, buffer);
		break;
	case REMOVE:
		remove_file(worker, file);
		break;
	case SYNC:
		sync_file(worker, file);
		break;
	case STRIPE_STORE:
	case STRIPE_LOAD:
	case STRIPE_PUNCH:
		stripe_access(worker, kind, buffer);
		break;
	case STRIPE_EXTEND:
		stripe_extend(worker);
		break;
	case ARENA_STORE:
		arena_store(worker, buffer);
		break;
	case ARENA_TRUNCATE:
		arena_truncate(worker);
		break;
	case ARENA_PUNCH:
		arena_punch(worker);
		break;
	default:
		abort();
	}
}

static uint64_t deadline_ns;

static void *work(void *argument)
{
	struct worker *worker = argument;
	char *buffer = aligned_alloc(page_size, page_size);

	if (!buffer)
		fail("malloc");
	for (uint64_t i = 0; i < command.operations && now_ns() < deadline_ns; i++)
		operate(worker, buffer);
	free(buffer);
	return NULL;
}

static void set_up(struct worker *worker, unsigned int number, char *stripes_shadow)
{
	worker->number = number;
	worker->random = mix(command.seed ^ mix(number + 1));
	worker->stripes_shadow = stripes_shadow;
	worker->stripes = map_file(stripes_fd, STRIPES_BYTES);
	worker->arena = map_file(arena_fd, ARENA_PAGES * page_size);
	if (!worker->stripes || !worker->arena)
		fail("mmap");
	for (int i = 0; i < FILES; i++) {
		worker->files[i].shadow = calloc(FILE_PAGES, page_size);
		if (!worker->files[i].shadow)
			fail("malloc");
	}
}

static int shared_file(const char *name)
{
	int fd = openat(top, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

	if (fd < 0)
		fail(name);
	if (!is_allowed(fd)) {
		errno = EOPNOTSUPP;
		fail("not DAX");
	}
	return fd;
}

/* File names contain a folder; the files with the expected content are in a single folder. */
static void flat_name(char *flat, size_t size, const char *name)
{
	snprintf(flat, size, "%s", name);
	for (char *c = flat; *c; c++)
		*c = *c == '/' ? '+' : *c;
}

static void expect_file(int expected, FILE *index, const char *name, const char *data,
			uint64_t size)
{
	char flat[64];
	int fd;

	flat_name(flat, sizeof(flat), name);
	fd = openat(expected, flat, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0)
		fail("write the expected content");
	for (uint64_t done = 0; done < size;) {
		ssize_t count = write(fd, data + done, size - done);

		if (count <= 0)
			fail("write the expected content");
		done += (uint64_t)count;
	}
	close(fd);
	fprintf(index, "%s %" PRIu64 " %08" PRIx32 "\n", name, size, crc32_of(data, size));
}

static FILE *open_index(int expected, const char *mode, int flags)
{
	int fd = openat(expected, "index", flags | O_CLOEXEC, 0644);
	FILE *index = fd < 0 ? NULL : fdopen(fd, mode);

	if (!index)
		fail("index");
	return index;
}

static int open_folder(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		fail(path);
	return fd;
}

/* Without MAP_SYNC, data are durable only after fsync(). */
static void finish(struct worker *workers, const char *stripes_shadow)
{
	int expected = open_folder(command.expected);
	FILE *index = open_index(expected, "w", O_WRONLY | O_CREAT | O_EXCL);
	uint64_t pages = atomic_load(&stripes_pages);

	for (unsigned int i = 0; i < command.threads; i++) {
		for (int j = 0; j < FILES; j++) {
			struct file *file = &workers[i].files[j];

			if (!file->there)
				continue;
			if (!command.sync && fsync(file->fd))
				failed(&workers[i], "fsync", file->name);
			expect_file(expected, index, file->name, file->shadow, file->size);
			let_go(&workers[i], file);
		}
	}
	if (!command.sync && (fsync(stripes_fd) || fsync(arena_fd)))
		failed(&workers[0], "fsync", "stripes or arena");
	expect_file(expected, index, "stripes", stripes_shadow, pages * page_size);
	if (fclose(index))
		fail("index");
	close(expected);
}

static int finish_report(void)
{
	report_number("error_count", error_count);
	report_open("errors", '[');
	for (unsigned int i = 0; i < error_count && i < MOST_ERRORS; i++)
		report_string(NULL, findings[i]);
	report_close(']');
	report_end();
	return error_count ? EXIT_WRONG : EXIT_FINE;
}

static int load_all(void)
{
	struct worker *workers = calloc(command.threads, sizeof(*workers));
	char *stripes_shadow = calloc(1, STRIPES_BYTES);
	uint64_t expected = 0, arena = 0, begin;

	if (!workers || !stripes_shadow)
		fail("malloc");
	if (mkdirat(top, "a", 0755) || mkdirat(top, "b", 0755))
		fail("mkdir");
	stripes_fd = shared_file("stripes");
	arena_fd = shared_file("arena");
	signal(SIGBUS, on_sigbus);
	for (unsigned int i = 0; i < command.threads; i++)
		set_up(&workers[i], i, stripes_shadow);
	begin = now_ns();
	deadline_ns = begin + command.limit_s * NS_PER_S;
	for (unsigned int i = 0; i < command.threads; i++) {
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			fail("thread");
	}
	for (unsigned int i = 0; i < command.threads; i++)
		pthread_join(workers[i].thread, NULL);
	begin = now_ns() - begin;
	finish(workers, stripes_shadow);
	for (unsigned int i = 0; i < command.threads; i++) {
		expected += workers[i].sigbus_expected;
		arena += workers[i].sigbus_arena;
	}
	report_begin();
	report_string("verb", "load");
	report_number("seed", command.seed);
	report_bool("sync", command.sync);
	report_number("threads", command.threads);
	report_number("page_size", page_size);
	report_number("duration_ns", begin);
	report_number("sigbus_expected", expected);
	report_number("sigbus_arena", arena);
	report_open("operations", '{');
	for (int kind = 0; kind < OPERATIONS; kind++) {
		uint64_t count = 0;

		for (unsigned int i = 0; i < command.threads; i++)
			count += workers[i].counts[kind];
		report_number(kinds[kind].name, count);
	}
	report_close('}');
	return finish_report();
}

/* --- verify ---------------------------------------------------------------------------------- */

/* Content of a file; NULL if the file does not exist. */
static char *read_file(int dir, const char *name, uint64_t *size)
{
	int fd = openat(dir, name, O_RDONLY | O_CLOEXEC);
	struct stat facts;
	char *data;

	if (fd < 0)
		return NULL;
	if (fstat(fd, &facts))
		fail("fstat");
	*size = (uint64_t)facts.st_size;
	data = malloc(*size + 1);
	if (!data)
		fail("malloc");
	for (uint64_t done = 0; done < *size;) {
		ssize_t count = read(fd, data + done, *size - done);

		if (count < 0)
			fail("read");
		if (!count)
			break;
		done += (uint64_t)count;
	}
	close(fd);
	return data;
}

static void verify_file(int expected, const char *name, uint64_t size, uint32_t crc)
{
	uint64_t there = 0, wanted_size = 0;
	char *found = read_file(top, name, &there), *wanted, flat[64];

	flat_name(flat, sizeof(flat), name);
	wanted = read_file(expected, flat, &wanted_size);
	if (!wanted || wanted_size != size || crc32_of(wanted, size) != crc)
		fail("the expected content is damaged");
	if (!found) {
		complain(0, "verify %s: it is missing", name);
	} else if (there != size) {
		complain(0, "verify %s: it has %" PRIu64 " bytes, not %" PRIu64, name, there, size);
	} else {
		compare(0, "verify", name, 0, wanted, found, size);
		if (crc32_of(found, size) != crc)
			complain(0, "verify %s: the checksum is %08" PRIx32 ", not %08" PRIx32,
				 name, crc32_of(found, size), crc);
	}
	free(found);
	free(wanted);
}

static uint64_t count_names(const char *name)
{
	int fd = openat(top, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	uint64_t count = 0;

	if (!dir)
		fail(name);
	while ((entry = readdir(dir)))
		count += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
	closedir(dir);
	return count;
}

static int verify_all(void)
{
	int expected = open_folder(command.expected), fields;
	FILE *index = open_index(expected, "r", O_RDONLY);
	uint64_t files = 0, bytes = 0, size, there;
	char name[64], *arena;
	uint32_t crc;

	while ((fields = fscanf(index, "%63s %" SCNu64 " %" SCNx32, name, &size, &crc)) == 3) {
		verify_file(expected, name, size, crc);
		files++;
		bytes += size;
	}
	if (fields != EOF || ferror(index))
		fail("index");
	fclose(index);
	/* The stripes are outside of the two folders. */
	there = count_names("a") + count_names("b");
	if (there + 1 != files)
		complain(0, "verify: there are %" PRIu64 " files, not %" PRIu64, there, files - 1);
	arena = read_file(top, "arena", &size);
	if (!arena)
		complain(0, "verify arena: it is missing");
	else
		check_arena(0, 0, arena, size);
	free(arena);
	report_begin();
	report_string("verb", "verify");
	report_number("seed", command.seed);
	report_number("files", files);
	report_number("bytes", bytes);
	report_number("arena_bytes", arena ? size : 0);
	return finish_report();
}

static void parse_command(int argc, char **argv)
{
	int option;

	command = (struct command){ .threads = 8, .operations = 500, .limit_s = 20 };
	command.verify = parse_verb(argc, argv, "load", "verify");
	while ((option = next_option(argc, argv, options)) != -1) {
		switch (option) {
		case 's':
			command.seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			command.have_seed = true;
			break;
		case 'y':
			command.sync = parse_switch("--sync", optarg);
			command.have_sync = true;
			break;
		case 'e':
			command.expected = optarg;
			break;
		case 't':
			command.threads =
				(unsigned int)parse_number("--threads", optarg, 1, MOST_THREADS);
			break;
		case 'o':
			command.operations = parse_number("--operations", optarg, 0, UINT64_MAX);
			break;
		case 'l':
			command.limit_s = parse_number("--limit", optarg, 0, 3600);
			break;
		case 'a':
			command.any_file = true;
			break;
		}
	}
	if (optind != argc - 1)
		usage("expected exactly one DIR", NULL);
	command.dir = argv[optind];
	if (!command.have_seed || !command.expected || !(command.verify || command.have_sync))
		usage("an option is missing", NULL);
}

int main(int argc, char **argv)
{
	page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	parse_command(argc, argv);
	top = open_folder(command.dir);
	return command.verify ? verify_all() : load_all();
}
