// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * flush_shim - preloaded into QEMU; records and changes how it flushes certain files.
 *
 * fdatasync(), fsync(), msync() and pmem_persist() on a watched file are counted and recorded, and
 * delayed, failed or held by the file's rule. A watched file is identified by device and inode, not
 * by its name. Calls on all other files are passed through.
 *
 * The state is one struct page in a memfd, shared with the test: paprscm/vm/sync_shim.py creates
 * it, PAPRSCM_SHIM=<fd or path> names it, and both sides map it. Its layout is checked twice: at
 * compile time against sync_shim.py's description (flush_shim_layout.inc), and at run time by the
 * digest of that description. Without such a page the library only passes calls on.
 *
 * A call uses no malloc, no stdio, and no lock except that of the table of mappings.
 *
 * Not tracked: mremap() of a mapping of a watched file, and pmem_memcpy_persist(), with which QEMU
 * writes labels.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "store_log.h"

#define EXPORT __attribute__((visibility("default")))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

#define load(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
#define store(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)
#define add(place, value) __atomic_add_fetch(place, value, __ATOMIC_SEQ_CST)
/* As in C11: on failure, *old is the current value. */
#define swap_if(place, old, value) \
	__atomic_compare_exchange_n(place, old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE)

/* LABEL: any of them on a part of the file behind the DIMM's data. */
enum operation { FDATASYNC, FSYNC, MSYNC, PMEM_PERSIST, LABEL, OPERATIONS };

/* Changes to a call, as bits. */
enum injected { DELAYED = 1, FAILED = 2, HUNG = 4 };

/*
 * The rule for calls that begin from now on. A mask has a bit for each operation; an epoch is the
 * generation in which that part of the rule was last set.
 */
struct rule {
	uint32_t delay_mask, delay_epoch, delay_low_us, delay_high_us;
	/* Calls first, first + step, … up to last fail, counted from 1 since the epoch. */
	uint32_t fail_mask, fail_epoch, fail_errno, fail_first, fail_step, fail_last;
	uint32_t hang_mask, hang_epoch;
};

struct counts {
	uint64_t begun, ended, failed, in_flight, most;
};

struct file {
	uint64_t dev, ino;
	/* Size of the DIMM's data; 0: the whole file. */
	uint64_t data;
	/* rules[generation & 1] is in force; the other one is for the next rule. */
	uint32_t generation;
	/* Calls held in this epoch or earlier may continue. */
	uint32_t released;
	struct rule rules[2];
	/* Calls counted for delays and failures: the rule's epoch << 32, plus the count. */
	uint64_t drawn, matched;
	/* By operation; the last is for all operations together. */
	struct counts counts[OPERATIONS + 1];
	/* Mappings made so far; 0 means that another process has the file. */
	uint64_t mapped;
};

struct record {
	/* (number + 1) << 1, plus 1 when the call has ended; written after the fields below. */
	uint64_t state;
	uint64_t begin_ns, end_ns;
	uint32_t file, operation, injected, delay_us, result, thread;
	/* The bytes of the file that the call covers. */
	uint64_t start, end;
};

struct page {
	uint64_t magic;
	uint64_t layout;
	uint64_t seed;
	/* Our pid; -1 if the page is for another build of this library. */
	int64_t loaded;
	/* Mappings of watched files that did not fit into the table. */
	uint64_t lost;
	/* Number of files in use, and of records begun. */
	uint64_t files, begun;
	uint64_t reserved;
	struct file file[64];
	struct record records[65536];
};

#include "flush_shim_layout.inc"

static struct page *page;

/* --- the real functions -------------------------------------------------------------------- */

void pmem_persist(const void *address, size_t length);

static struct {
	void *fdatasync, *fsync, *msync, *pmem_persist, *mmap, *munmap;
} real;

#define REAL(name) ((__typeof__(&name))find(&real.name, #name))

/* A sync of a watched file, or what takes its place while the stores are logged. */
#define EXECUTE(sync) (log_is_on() ? log_sync() : (sync))

/* Set by load_shim(); constructors of other libraries may call us earlier. */
static void *find(void **place, const char *name)
{
	if (!*place)
		*place = dlsym(RTLD_NEXT, name);
	/* Only pmem_persist can be missing, and then no caller can have it. */
	if (!*place)
		abort();
	return *place;
}

/* --- file of a call ------------------------------------------------------------------------- */

static struct file *by_fd(int fd)
{
	struct stat info;

	if (!page || fstat(fd, &info))
		return NULL;
	for (uint64_t i = 0, n = load(&page->files); i < n; i++) {
		struct file *file = &page->file[i];

		if (file->ino == info.st_ino && file->dev == info.st_dev)
			return file;
	}
	return NULL;
}

/* Mappings of watched files, unordered; they do not overlap. */
static struct range {
	uintptr_t start, end;
	struct file *file;
	/* Position of `start` in the file. */
	uint64_t offset;
} ranges[256];
static size_t n_ranges;
static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;

static uintptr_t end_of(const void *address, size_t length)
{
	uintptr_t unit = (uintptr_t)sysconf(_SC_PAGESIZE);

	return ((uintptr_t)address + length + unit - 1) & ~(unit - 1);
}

static void remember(uintptr_t start, uintptr_t end, struct file *file, uint64_t offset)
{
	if (n_ranges < ARRAY_SIZE(ranges))
		ranges[n_ranges++] = (struct range){ start, end, file, offset };
	else
		add(&page->lost, 1);
}

/* Only part of a mapping may be removed: QEMU trims its reservation for alignment. */
static void forget(uintptr_t start, uintptr_t end)
{
	for (size_t i = 0; i < n_ranges;) {
		struct range old = ranges[i];

		if (old.end <= start || end <= old.start) {
			i++;
			continue;
		}
		ranges[i] = ranges[--n_ranges];
		if (old.start < start)
			remember(old.start, start, old.file, old.offset);
		if (end < old.end)
			remember(end, old.end, old.file, old.offset + (end - old.start));
	}
}

/* The first mapping of a watched file in a range of addresses; its file is NULL if there is none. */
static struct range by_address(const void *address, size_t length)
{
	uintptr_t start = (uintptr_t)address, end = start + (length ? length : 1);
	struct range range = { 0 };

	if (!page)
		return range;
	pthread_mutex_lock(&ranges_lock);
	for (size_t i = 0; i < n_ranges && !range.file; i++) {
		if (ranges[i].start < end && start < ranges[i].end)
			range = ranges[i];
	}
	pthread_mutex_unlock(&ranges_lock);
	/* The part that the call covers. */
	if (start > range.start) {
		range.offset += start - range.start;
		range.start = start;
	}
	if (end < range.end)
		range.end = end;
	return range;
}

/*
 * The lock is held across the system call: otherwise another thread could get addresses for which
 * the table has an old entry. Calls that cannot affect the table do not take it.
 */
EXPORT void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
	struct file *file = flags & MAP_ANONYMOUS ? NULL : by_fd(fd);
	void *map;

	if (!page || (!file && !(flags & MAP_FIXED)))
		return REAL(mmap)(address, length, prot, flags, fd, offset);
	pthread_mutex_lock(&ranges_lock);
	map = REAL(mmap)(address, length, prot, flags, fd, offset);
	if (map != MAP_FAILED) {
		forget((uintptr_t)map, end_of(map, length));
		if (file) {
			log_file((uint32_t)(file - page->file), fd);
			remember((uintptr_t)map, end_of(map, length), file, (uint64_t)offset);
			add(&file->mapped, 1);
		}
	}
	pthread_mutex_unlock(&ranges_lock);
	return map;
}

/* A mapping for the log, which is not recorded. */
void *map_unseen(int fd, size_t size, int prot, int flags)
{
	return REAL(mmap)(NULL, size, prot, flags, fd, 0);
}

_Static_assert(sizeof(off_t) == sizeof(off64_t), "mmap and mmap64 are one");
EXPORT __typeof__(mmap64) mmap64 __attribute__((alias("mmap")));

EXPORT int munmap(void *address, size_t length)
{
	int result;

	if (!page)
		return REAL(munmap)(address, length);
	pthread_mutex_lock(&ranges_lock);
	result = REAL(munmap)(address, length);
	if (!result)
		forget((uintptr_t)address, end_of(address, length));
	pthread_mutex_unlock(&ranges_lock);
	return result;
}

/* --- rule of a file ------------------------------------------------------------------------- */

struct plan {
	uint32_t injected, delay_us, hang_epoch, error;
};

/* A copy of the rule in force; sync_shim.py changes a rule only after another is in force. */
static struct rule rule_of(const struct file *file)
{
	uint32_t generation;
	struct rule rule;

	do {
		generation = load(&file->generation);
		rule = file->rules[generation & 1];
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
	} while (generation != load(&file->generation));
	return rule;
}

/* Number of this call in the epoch, from 1; 0 if a newer epoch has already begun. */
static uint32_t nth_of(uint64_t *word, uint32_t epoch)
{
	uint64_t old = load(word), new;

	do {
		if ((uint32_t)(old >> 32) > epoch)
			return 0;
		new = (old >> 32 == epoch ? old : (uint64_t)epoch << 32) + 1;
	} while (!swap_if(word, &old, new));
	return (uint32_t)new;
}

/* Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014). */
static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* The n-th delay of an epoch: the same in every run with this seed, for any order of threads. */
static uint32_t draw(const struct file *file, const struct rule *rule, uint32_t n)
{
	uint64_t span = (uint64_t)rule->delay_high_us - rule->delay_low_us + 1;
	uint64_t which = (uint64_t)(file - page->file) << 56 | (uint64_t)rule->delay_epoch << 32 |
			 n;

	return rule->delay_low_us + (uint32_t)((mix(mix(page->seed) ^ which) >> 32) * span >> 32);
}

static struct plan decide(struct file *file, enum operation operation)
{
	struct plan plan;
	struct rule rule;
	uint32_t n;

again:
	plan = (struct plan){ 0 };
	rule = rule_of(file);
	if (rule.delay_mask >> operation & 1) {
		n = nth_of(&file->drawn, rule.delay_epoch);
		if (!n)
			goto again;
		plan.injected |= DELAYED;
		plan.delay_us = draw(file, &rule, n);
	}
	if (rule.fail_mask >> operation & 1) {
		n = nth_of(&file->matched, rule.fail_epoch);
		if (!n)
			goto again;
		if (n >= rule.fail_first && n <= rule.fail_last &&
		    (n - rule.fail_first) % rule.fail_step == 0) {
			plan.injected |= FAILED;
			plan.error = rule.fail_errno;
		}
	}
	if (rule.hang_mask >> operation & 1) {
		plan.injected |= HUNG;
		plan.hang_epoch = rule.hang_epoch;
	}
	return plan;
}

/* --- one call ------------------------------------------------------------------------------ */

struct call {
	struct file *file;
	enum operation operation;
	struct record *record;
	uint64_t state;
	int error;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void sleep_us(uint32_t us)
{
	struct timespec left = { us / 1000000, us % 1000000 * 1000 };

	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &left, &left) == EINTR)
		;
}

static void count_begun(struct counts *counts)
{
	uint64_t now = add(&counts->in_flight, 1), most = load(&counts->most);

	while (most < now && !swap_if(&counts->most, &most, now))
		;
	add(&counts->begun, 1);
}

static void count_ended(struct counts *counts, bool failed)
{
	add(&counts->in_flight, -1);
	add(&counts->failed, failed);
	add(&counts->ended, 1);
}

/* Record that a call begins, and apply the rule; true if the real call must not be made. */
static bool enter(struct call *call, struct file *file, enum operation operation, uint64_t start,
		  uint64_t end)
{
	uint64_t number = add(&page->begun, 1) - 1, begin_ns = now_ns();
	struct record *record = &page->records[number % ARRAY_SIZE(page->records)];
	struct plan plan;

	if (file->data && start >= file->data)
		operation = LABEL;
	plan = decide(file, operation);
	*call = (struct call){ file, operation, record, (number + 1) << 1, (int)plan.error };
	/* Invalidate the slot's last call, even if it is still in progress. */
	__atomic_exchange_n(&record->state, 0, __ATOMIC_SEQ_CST);
	record->begin_ns = begin_ns;
	record->file = (uint32_t)(file - page->file);
	record->operation = operation;
	record->injected = plan.injected;
	record->delay_us = plan.delay_us;
	record->thread = (uint32_t)syscall(SYS_gettid);
	record->start = start;
	record->end = end;
	store(&record->state, call->state);
	count_begun(&file->counts[operation]);
	if (operation != LABEL)
		count_begun(&file->counts[OPERATIONS]);
	log_begin(number, record->file);

	/* Poll, because sync_shim.py only writes memory, and does not wake us. */
	while (plan.injected & HUNG && load(&file->released) < plan.hang_epoch)
		sleep_us(1000);
	if (plan.injected & DELAYED)
		sleep_us(plan.delay_us);
	return plan.injected & FAILED;
}

/* Record that the call ended, and return its result with its errno. */
static int leave(const struct call *call, int result)
{
	int error = !result ? 0 : call->error ? call->error : errno;
	struct record *record = call->record;
	uint64_t state = call->state;

	/* If the ring has wrapped meanwhile, the slot belongs to another call. */
	if (load(&record->state) == state) {
		record->end_ns = now_ns();
		record->result = (uint32_t)error;
		swap_if(&record->state, &state, state | 1);
	}
	log_end((call->state >> 1) - 1, (uint32_t)(call->file - page->file), (uint32_t)error);
	count_ended(&call->file->counts[call->operation], error);
	if (call->operation != LABEL)
		count_ended(&call->file->counts[OPERATIONS], error);
	if (error)
		errno = error;
	return result;
}

EXPORT int fdatasync(int fd)
{
	struct file *file = by_fd(fd);
	struct call call;

	if (!file)
		return REAL(fdatasync)(fd);
	return leave(&call, enter(&call, file, FDATASYNC, 0, INT64_MAX) ?
				    -1 :
				    EXECUTE(REAL(fdatasync)(fd)));
}

EXPORT int fsync(int fd)
{
	struct file *file = by_fd(fd);
	struct call call;

	if (!file)
		return REAL(fsync)(fd);
	return leave(&call,
		     enter(&call, file, FSYNC, 0, INT64_MAX) ? -1 : EXECUTE(REAL(fsync)(fd)));
}

static bool enter_range(struct call *call, const struct range *range, enum operation operation)
{
	return enter(call, range->file, operation, range->offset,
		     range->offset + (range->end - range->start));
}

EXPORT int msync(void *address, size_t length, int flags)
{
	struct range range = by_address(address, length);
	struct call call;

	if (!range.file)
		return REAL(msync)(address, length, flags);
	if (enter_range(&call, &range, MSYNC))
		return leave(&call, -1);
	return leave(&call, EXECUTE(REAL(msync)(address, length, flags)));
}

/* QEMU needs pmem_persist@LIBPMEM_1.0; a definition without a version matches that, too. */
EXPORT void pmem_persist(const void *address, size_t length)
{
	struct range range = by_address(address, length);
	struct call call;

	if (!range.file) {
		REAL(pmem_persist)(address, length);
		return;
	}
	/* It cannot fail, so sync_shim.py does not allow a rule that makes it fail. */
	enter_range(&call, &range, PMEM_PERSIST);
	if (log_is_on())
		log_sync();
	else
		REAL(pmem_persist)(address, length);
	leave(&call, 0);
}

/* --- start ---------------------------------------------------------------------------------- */

/* Not strtol(): newer C libraries have it under a version that older ones lack. */
static int parse_fd(const char *text)
{
	int fd = 0;

	if (!*text)
		return -1;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || fd > 1000000)
			return -1;
		fd = fd * 10 + (*text - '0');
	}
	return fd;
}

/* A descriptor that we inherit, or the path of one of the process that started us; -1: not set. */
static int take_fd(const char *name)
{
	const char *text = getenv(name);
	int fd;

	if (!text)
		return -1;
	fd = *text == '/' ? open(text, O_RDWR | O_CLOEXEC) : parse_fd(text);
	/* For QEMU only, not for programs that it starts. */
	unsetenv(name);
	return fd;
}

static struct page *map_page(int fd)
{
	struct stat info;
	struct page *map;

	if (fd < 0 || fstat(fd, &info) || info.st_size != sizeof(*map))
		return NULL;
	map = REAL(mmap)(NULL, sizeof(*map), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return NULL;
	if (map->magic == MAGIC && map->layout == LAYOUT)
		return map;
	if (map->magic == MAGIC)
		store(&map->loaded, -1);
	REAL(munmap)(map, sizeof(*map));
	return NULL;
}

__attribute__((constructor)) static void load_shim(void)
{
	int fd = take_fd("PAPRSCM_SHIM"), log = take_fd("PAPRSCM_STORE_LOG");

	if (fd < 0)
		return;
	unsetenv("LD_PRELOAD");
	real.fdatasync = dlsym(RTLD_NEXT, "fdatasync");
	real.fsync = dlsym(RTLD_NEXT, "fsync");
	real.msync = dlsym(RTLD_NEXT, "msync");
	real.pmem_persist = dlsym(RTLD_NEXT, "pmem_persist");
	real.mmap = dlsym(RTLD_NEXT, "mmap");
	real.munmap = dlsym(RTLD_NEXT, "munmap");
	page = map_page(fd);
	if (!page)
		return;
	close(fd);
	if (log >= 0)
		log_to(log);
	store(&page->loaded, getpid());
}
