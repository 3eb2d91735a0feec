// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * promise - store through mappings until the machine dies, then check what must have survived.
 *
 * promise store [OPTION]... --ledger=FILE --nonce=N --seed=N --sync=on|off DIR
 *   Follows a plan that depends only on the seed: files are created, extended, allocated and
 *   removed; pages are stored in a random order through a mapping and flushed from the CPU's cache.
 *   There is no msync() or fsync() after the first store. After each step the program increments a
 *   count in the ledger, a page outside of the tested file systems that the killer can read. A
 *   counted step was complete before it was counted.
 *
 * promise verify --seed=N --done=N DIR
 *   Follows the same plan for the counted steps, and compares. A store promises that its file
 *   exists, its size, the extent of the page, and its bytes. The one step in progress may have
 *   happened completely, in part or not at all; nothing else may exist. Reports in one line of
 *   JSON.
 *
 * Exit status 1: verify found lost data, or data that were never stored. A failed step of store is
 * also in the ledger. See report.h for the others.
 */
#include "report.h"

#include <dirent.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>

/* Number of concurrent files: then the oldest is removed, and its blocks are reused. */
#define WINDOW 32
/* One file in eight is large enough for a page of 2 MiB, which DAX can map as a unit. */
#define BIG_BYTES (4U << 20)
#define SMALL_PAGES 24
/* Upper bound of the steps of one file. */
#define MOST_STEPS 160
#define MOST_FINDINGS 12
#define DWELL_NS 5000000

/* "PAPRPROM" in a little-endian machine's memory. */
#define MAGIC 0x4d4f525052504150ULL

enum phase { NOTHING, CREATE, EXTEND, ALLOCATE, FAULT, STORE, OVERWRITE, REMOVE, SETTLE };
enum state { STARTING, RUNNING, FINISHED, FAILED };

/* The page that the killer reads; paprscm/power_cut/sudden_end.py has the same layout. */
struct ledger {
	uint64_t magic, nonce, page_size;
	uint64_t rest_of_line[5];
	uint64_t done; /* steps */
	uint64_t phase;
	uint64_t state;
	uint64_t error; /* an errno */
	char stage[32];
};

_Static_assert(offsetof(struct ledger, done) == 64, "paprscm/power_cut/sudden_end.py looks there");

struct step {
	enum phase what;      /* STORE includes FAULT */
	uint64_t page;	      /* of STORE and OVERWRITE; pages for EXTEND and ALLOCATE */
	unsigned int version; /* of the page's content, from 1 */
	uint64_t file;	      /* to REMOVE */
	bool dwell;	      /* pause in the middle, so that more kills happen there */
};

/* All steps of one file until it is removed. */
struct plan {
	uint64_t number, pages;
	unsigned int count;
	struct step steps[MOST_STEPS];
};

struct command {
	bool verify, sync, have_sync, any_file;
	const char *ledger, *dir;
	uint64_t seed, nonce, done, steps;
	bool have_seed, have_nonce, have_done;
};

static const struct option options[] = {
	OPTION("ledger", 'l'), OPTION("nonce", 'n'),  OPTION("seed", 's'), OPTION("sync", 'y'),
	OPTION("steps", 'c'),  FLAG("any-file", 'a'), OPTION("done", 'd'), END_OF_OPTIONS,
};

const char tool_name[] = "promise";
const char usage_text[] =
	"usage: promise store [--steps=N] [--any-file] --ledger=FILE --nonce=N --seed=N\n"
	"                     --sync=on|off DIR\n"
	"       promise verify --seed=N --done=N DIR\n"
	"  --ledger=FILE   file in which steps are counted; created\n"
	"  --nonce=N       number that identifies this run in the ledger\n"
	"  --seed=N        seed of the plan and of the stored data\n"
	"  --sync=on|off   map with MAP_SYNC or without\n"
	"  --steps=N       stop after this number of steps (default: run until killed)\n"
	"  --any-file      accept files that are not DAX, too\n"
	"  --done=N        number of steps in the ledger\n";

static uint64_t page_size;
static struct ledger *ledger;

/* Print the failed step, and write it to the ledger, which the killer reads. */
static void __attribute__((noreturn)) fail_step(const char *stage)
{
	int error = errno;

	print_error(stage);
	if (ledger) {
		ledger->error = (uint64_t)error;
		strncpy(ledger->stage, stage, sizeof(ledger->stage) - 1);
		__sync_synchronize();
		ledger->state = FAILED;
	}
	exit(EXIT_FAILED);
}

/* --- the plan -------------------------------------------------------------------------------- */

/* Value at `word` of a page; never 0, and different for each seed, file, page and version. */
static uint64_t content(uint64_t base, uint64_t word)
{
	return (base + word * GOLDEN) * 0xbf58476d1ce4e5b9ULL | 1;
}

static uint64_t content_base(uint64_t seed, uint64_t file, uint64_t page, unsigned int version)
{
	return mix(mix(mix(seed + 1) + file) + (page << 16) + version);
}

/*
 * Number of words of a page that are stored, from its start: all of them in half of the cases. The
 * others must read as zeros, independent of the former content of the block.
 */
static uint64_t stored_words(uint64_t seed, uint64_t file, uint64_t page)
{
	uint64_t random = content_base(seed, file, page, 0), words = page_size / sizeof(uint64_t);

	return random % 2 ? words : 1 + mix(random) % words;
}

static void add(struct plan *plan, enum phase what, uint64_t page, unsigned int version)
{
	if (plan->count == MOST_STEPS)
		abort();
	plan->steps[plan->count++] =
		(struct step){ .what = what, .page = page, .version = version };
}

/* Store to `count` different pages out of `pages` from `first` on, in a random order. */
static void add_stores(struct plan *plan, uint64_t *random, uint64_t first, uint64_t pages,
		       uint64_t count)
{
	uint64_t *order = calloc(pages, sizeof(*order));

	if (!order)
		abort();
	for (uint64_t i = 0; i < pages; i++)
		order[i] = first + i;
	for (uint64_t i = 0; i < count; i++) {
		uint64_t other = i + draw_below(random, pages - i), page = order[other];

		order[other] = order[i];
		order[i] = page;
		add(plan, STORE, page, 1);
	}
	free(order);
}

/* Store again to pages that no longer need a page fault. */
static void add_overwrites(struct plan *plan, uint64_t *random)
{
	unsigned int stores = plan->count;

	for (uint64_t left = draw_below(random, 5); left; left--) {
		const struct step *old = &plan->steps[draw_below(random, stores)];
		unsigned int version = 1;

		if (old->what != STORE)
			continue;
		for (unsigned int i = 0; i < plan->count; i++) {
			if (plan->steps[i].what == OVERWRITE && plan->steps[i].page == old->page)
				version++;
		}
		add(plan, OVERWRITE, old->page, version + 1);
	}
}

/*
 * The next store after each EXTEND or ALLOCATE is to a page that is new or was not stored to: it
 * causes a page fault, and with that fault MAP_SYNC promises the new size.
 *
 * One file in eight is synced before its first store, and never afterwards: of such a file, a
 * mapping without MAP_SYNC loses sizes and extents, but not the whole file.
 */
static void make_plan(struct plan *plan, uint64_t seed, uint64_t number)
{
	uint64_t random = mix(seed ^ mix(number + 1)), kind = draw_below(&random, 3), most;
	bool big = !draw_below(&random, 8), settled = !draw_below(&random, 8);

	plan->number = number;
	plan->pages = big ? BIG_BYTES / page_size : 1 + draw_below(&random, SMALL_PAGES);
	plan->count = 0;
	most = plan->pages < SMALL_PAGES ? plan->pages : SMALL_PAGES;
	if (number >= WINDOW) {
		add(plan, REMOVE, 0, 0);
		plan->steps[0].file = number - WINDOW;
	}
	add(plan, CREATE, 0, 0);
	if (kind == 0) {
		uint64_t size = 0;

		if (settled)
			add(plan, SETTLE, 0, 0);
		while (size < plan->pages) {
			uint64_t more = 1 + draw_below(&random, big ? plan->pages / 4 : 6);

			if (more > plan->pages - size)
				more = plan->pages - size;
			add(plan, EXTEND, size + more, 0);
			add_stores(plan, &random, size, more,
				   1 + draw_below(&random, more < 6 ? more : 6));
			size += more;
			if (plan->count > MOST_STEPS - 16)
				break;
		}
	} else {
		add(plan, kind == 1 ? EXTEND : ALLOCATE, plan->pages, 0);
		if (settled)
			add(plan, SETTLE, 0, 0);
		add_stores(plan, &random, 0, plan->pages, 1 + draw_below(&random, most));
	}
	add_overwrites(plan, &random);
	for (unsigned int i = 0; i < plan->count; i++)
		plan->steps[i].dwell = !draw_below(&random, 8);
}

static void file_name(char *name, size_t size, uint64_t number)
{
	snprintf(name, size, "f%06" PRIu64, number);
}

/* --- storing --------------------------------------------------------------------------------- */

static void enter(enum phase phase)
{
	ledger->phase = phase;
	flush_cache(ledger, sizeof(*ledger));
}

/* From now on, all steps so far are promised. */
static void count_step(void)
{
	ledger->done++;
	ledger->phase = NOTHING;
	flush_cache(ledger, sizeof(*ledger));
}

static void open_ledger(const char *path, uint64_t nonce)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	char *zeros = calloc(1, page_size);

	/* Written and synced now, so that later stores to it need no file system operation. */
	if (fd < 0 || !zeros || pwrite(fd, zeros, page_size, 0) != (ssize_t)page_size || fsync(fd))
		fail_step("ledger");
	ledger = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ledger == MAP_FAILED) {
		ledger = NULL;
		fail_step("ledger");
	}
	free(zeros);
	close(fd);
	ledger->nonce = nonce;
	ledger->page_size = page_size;
	flush_cache(ledger, sizeof(*ledger));
	ledger->magic = MAGIC;
	flush_cache(ledger, sizeof(*ledger));
}

/* The stored page cannot be mapped: there is no space, or it is beyond the end of the file. */
static void on_sigbus(int number)
{
	static const char stage[] = "SIGBUS";

	(void)number;
	memcpy(ledger->stage, stage, sizeof(stage));
	__sync_synchronize();
	ledger->state = FAILED;
	_exit(EXIT_FAILED);
}

static void dwell(const struct step *step)
{
	const struct timespec time = { .tv_nsec = DWELL_NS };

	if (step->dwell)
		nanosleep(&time, NULL);
}

static void store_page(char *map, const struct plan *plan, const struct step *step, uint64_t seed)
{
	volatile uint64_t *words = (volatile uint64_t *)(map + step->page * page_size);
	uint64_t base = content_base(seed, plan->number, step->page, step->version);
	uint64_t count = stored_words(seed, plan->number, step->page);

	enter(step->what == STORE ? FAULT : OVERWRITE);
	words[0] = content(base, 0);
	if (step->what == STORE)
		enter(STORE);
	for (uint64_t i = 1; i < count; i++) {
		if (i == count / 2)
			dwell(step);
		words[i] = content(base, i);
	}
	flush_cache(words, page_size);
}

static void do_step(const struct command *command, int dir, const struct plan *plan,
		    const struct step *step, int *fd, char **map)
{
	const int flags = MAP_SHARED_VALIDATE | (command->sync ? MAP_SYNC : 0);
	uint64_t length = plan->pages * page_size;
	char name[32];

	if (step->what == STORE || step->what == OVERWRITE) {
		store_page(*map, plan, step, command->seed);
		return;
	}
	enter(step->what);
	switch (step->what) {
	case REMOVE:
		file_name(name, sizeof(name), step->file);
		if (unlinkat(dir, name, 0))
			fail_step("unlink");
		break;
	case CREATE:
		file_name(name, sizeof(name), plan->number);
		*fd = openat(dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
		if (*fd < 0)
			fail_step("create");
		if (!command->any_file && !is_dax(*fd)) {
			errno = EOPNOTSUPP;
			fail_step("not DAX");
		}
		*map = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, *fd, 0);
		if (*map == MAP_FAILED)
			fail_step("mmap");
		break;
	case EXTEND:
		if (ftruncate(*fd, (off_t)(step->page * page_size)))
			fail_step("ftruncate");
		break;
	case ALLOCATE:
		if (fallocate(*fd, 0, 0, (off_t)(step->page * page_size)))
			fail_step("fallocate");
		break;
	case SETTLE:
		if (fsync(*fd))
			fail_step("fsync");
		break;
	default:
		abort();
	}
	dwell(step);
}

static int store(const struct command *command)
{
	int dir = open(command->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), fd = -1;
	struct plan *plan = malloc(sizeof(*plan));
	char *map = NULL;

	open_ledger(command->ledger, command->nonce);
	if (dir < 0)
		fail_step("open the folder");
	if (!plan)
		fail_step("malloc");
	signal(SIGBUS, on_sigbus);
	ledger->state = RUNNING;
	for (uint64_t number = 0; ledger->done < command->steps; number++) {
		make_plan(plan, command->seed, number);
		for (unsigned int i = 0; i < plan->count && ledger->done < command->steps; i++) {
			do_step(command, dir, plan, &plan->steps[i], &fd, &map);
			count_step();
		}
		if (map)
			munmap(map, plan->pages * page_size);
		if (fd >= 0)
			close(fd);
		map = NULL;
		fd = -1;
	}
	ledger->state = FINISHED;
	free(plan);
	close(dir);
	return EXIT_FINE;
}

/* --- verifying ------------------------------------------------------------------------------- */

enum kind { LOST_FILE, LOST_SIZE, LOST_EXTENT, LOST_BYTES, STRANGE, KINDS };

static const char *const kind_names[KINDS] = { "file", "size", "extent", "bytes", "strange" };

struct finding {
	enum kind kind;
	uint64_t file, offset, expected, found;
};

struct result {
	uint64_t files, pages, intact, counts[KINDS];
	unsigned int findings;
	struct finding finding[MOST_FINDINGS];
};

/* Allowed and required state of a file. */
struct expectation {
	const struct plan *plan;
	bool created, promised, removed;
	uint64_t size, most;	 /* the promised size, and the largest size so far; pages */
	unsigned int *version;	 /* of each page; 0: not promised */
	unsigned int *under_way; /* version in progress of each page, or 0 */
};

static void found(struct result *result, enum kind kind, uint64_t file, uint64_t offset,
		  uint64_t expected, uint64_t what)
{
	if (result->findings < MOST_FINDINGS)
		result->finding[result->findings++] =
			(struct finding){ kind, file, offset, expected, what };
	result->counts[kind]++;
}

static void replay(struct expectation *file, const struct step *step, bool counted)
{
	switch (step->what) {
	case CREATE:
		file->created = true;
		break;
	case EXTEND:
	case ALLOCATE:
		file->most = step->page;
		break;
	case SETTLE:
		break;
	case STORE:
	case OVERWRITE:
		if (!counted) {
			file->under_way[step->page] = step->version;
			break;
		}
		file->version[step->page] = step->version;
		file->promised = true;
		file->size = file->most;
		break;
	default:
		abort();
	}
}

/* Compare one page of the file; true if all promised data of it are present. */
static bool page_is_right(struct result *result, uint64_t seed, const struct expectation *file,
			  uint64_t page, const uint64_t *words)
{
	unsigned int version = file->version[page], next = file->under_way[page];
	uint64_t number = file->plan->number, zeros = 0, wrong = 0, first_zero = 0, first_wrong = 0;
	uint64_t now = content_base(seed, number, page, version);
	uint64_t later = content_base(seed, number, page, next);
	uint64_t count = stored_words(seed, number, page);

	for (uint64_t i = 0; i < page_size / sizeof(*words); i++) {
		if (i < count && ((version && words[i] == content(now, i)) ||
				  (next && words[i] == content(later, i))))
			continue;
		if (!words[i]) {
			if (i < count && !zeros++)
				first_zero = i;
		} else if (!wrong++) {
			first_wrong = i;
		}
	}
	if (wrong)
		found(result, STRANGE, number, page * page_size + first_wrong * sizeof(*words),
		      version && first_wrong < count ? content(now, first_wrong) : 0,
		      words[first_wrong]);
	else if (version && zeros)
		found(result, LOST_BYTES, number, page * page_size + first_zero * sizeof(*words),
		      content(now, first_zero), 0);
	return !wrong && !(version && zeros);
}

static void verify_pages(struct result *result, uint64_t seed, const struct expectation *file,
			 int fd, uint64_t size, uint64_t *words)
{
	for (uint64_t page = 0; page < file->plan->pages; page++) {
		off_t offset = (off_t)(page * page_size), data = -1;
		ssize_t got;

		result->pages += !!file->version[page];
		if ((uint64_t)offset >= size)
			continue;
		data = lseek(fd, offset, SEEK_DATA);
		if (data < 0 && errno != ENXIO)
			fail("lseek");
		if (data < 0 || data >= offset + (off_t)page_size) {
			if (file->version[page])
				found(result, LOST_EXTENT, file->plan->number, (uint64_t)offset, 0,
				      0);
			continue;
		}
		memset(words, 0, page_size);
		got = pread(fd, words, page_size, offset);
		if (got < 0)
			fail("pread");
		if (page_is_right(result, seed, file, page, words))
			result->intact += file->version[page] && got == (ssize_t)page_size;
	}
}

static void verify_file(struct result *result, uint64_t seed, int dir,
			const struct expectation *file, uint64_t *words)
{
	uint64_t number = file->plan->number;
	struct stat facts;
	char name[32];
	int fd;

	if (file->removed)
		return;
	result->files += file->promised;
	file_name(name, sizeof(name), number);
	fd = openat(dir, name, O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		if (errno != ENOENT)
			fail("open");
		if (file->promised)
			found(result, LOST_FILE, number, 0, 0, 0);
		for (uint64_t page = 0; page < file->plan->pages; page++)
			result->pages += !!file->version[page];
		return;
	}
	if (fstat(fd, &facts))
		fail("fstat");
	if ((uint64_t)facts.st_size < file->size * page_size)
		found(result, LOST_SIZE, number, 0, file->size * page_size,
		      (uint64_t)facts.st_size);
	if ((uint64_t)facts.st_size > file->most * page_size)
		found(result, STRANGE, number, 0, file->most * page_size, (uint64_t)facts.st_size);
	verify_pages(result, seed, file, fd, (uint64_t)facts.st_size, words);
	close(fd);
}

/* Check that the folder has no other files. */
static void verify_names(struct result *result, int fd, uint64_t files)
{
	DIR *dir = fdopendir(dup(fd));
	struct dirent *entry;

	if (!dir)
		fail("opendir");
	while ((errno = 0, entry = readdir(dir))) {
		char name[32] = "";
		uint64_t number;

		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (sscanf(entry->d_name, "f%" SCNu64, &number) == 1)
			file_name(name, sizeof(name), number);
		if (strcmp(entry->d_name, name) || number >= files)
			found(result, STRANGE, *name ? number : UINT64_MAX >> 1, 0, 0, 0);
	}
	if (errno)
		fail("readdir");
	closedir(dir);
}

static void print_result(const struct command *command, const struct result *result)
{
	report_begin();
	report_number("seed", command->seed);
	report_number("done", command->done);
	report_number("page_size", page_size);
	report_number("files", result->files);
	report_number("pages", result->pages);
	report_number("intact", result->intact);
	report_open("lost", '{');
	for (int kind = 0; kind < KINDS; kind++)
		report_number(kind_names[kind], result->counts[kind]);
	report_close('}');
	report_open("findings", '[');
	for (unsigned int i = 0; i < result->findings; i++) {
		const struct finding *finding = &result->finding[i];

		report_open(NULL, '{');
		report_string("kind", kind_names[finding->kind]);
		report_number("file", finding->file);
		report_number("offset", finding->offset);
		report_number("expected", finding->expected);
		report_number("found", finding->found);
		report_close('}');
	}
	report_close(']');
	report_end();
}

static int verify(const struct command *command)
{
	int dir = open(command->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	uint64_t *words = malloc(page_size), seed = command->seed, steps = 0, created = 0;
	/* The plans of all files that can still exist; older files are removed. */
	struct plan *plans = calloc(WINDOW + 2, sizeof(*plans));
	struct expectation files[WINDOW + 2] = { 0 };
	struct result result = { 0 };
	uint64_t number;

	if (dir < 0 || !words || !plans)
		fail("open the folder");
	for (number = 0; steps <= command->done; number++) {
		struct expectation *file = &files[number % (WINDOW + 2)];
		struct plan *plan = &plans[number % (WINDOW + 2)];

		free(file->version);
		free(file->under_way);
		make_plan(plan, seed, number);
		*file = (struct expectation){ .plan = plan };
		file->version = calloc(plan->pages, sizeof(*file->version));
		file->under_way = calloc(plan->pages, sizeof(*file->under_way));
		if (!file->version || !file->under_way)
			fail("malloc");
		/* One step more than counted: it may have been in progress. */
		for (unsigned int i = 0; i < plan->count && steps <= command->done; i++) {
			const struct step *step = &plan->steps[i];

			if (step->what == REMOVE)
				files[step->file % (WINDOW + 2)].removed = true;
			else
				replay(file, step, steps < command->done);
			steps++;
		}
		created += file->created;
	}
	verify_names(&result, dir, created);
	for (uint64_t i = number > WINDOW + 2 ? number - WINDOW - 2 : 0; i < number; i++)
		verify_file(&result, seed, dir, &files[i % (WINDOW + 2)], words);
	print_result(command, &result);
	for (int kind = 0; kind < KINDS; kind++) {
		if (result.counts[kind])
			return EXIT_WRONG;
	}
	return EXIT_FINE;
}

static void parse_command(int argc, char **argv, struct command *command)
{
	int option;

	*command = (struct command){ .steps = UINT64_MAX };
	command->verify = parse_verb(argc, argv, "store", "verify");
	while ((option = next_option(argc, argv, options)) != -1) {
		switch (option) {
		case 'l':
			command->ledger = optarg;
			break;
		case 'n':
			command->nonce = parse_number("--nonce", optarg, 0, UINT64_MAX);
			command->have_nonce = true;
			break;
		case 's':
			command->seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			command->have_seed = true;
			break;
		case 'y':
			command->sync = parse_switch("--sync", optarg);
			command->have_sync = true;
			break;
		case 'c':
			command->steps = parse_number("--steps", optarg, 0, UINT64_MAX);
			break;
		case 'a':
			command->any_file = true;
			break;
		case 'd':
			command->done = parse_number("--done", optarg, 0, UINT64_MAX);
			command->have_done = true;
			break;
		}
	}
	if (optind != argc - 1)
		usage("expected exactly one DIR", NULL);
	command->dir = argv[optind];
	if (!command->have_seed)
		usage("--seed is missing", NULL);
	if (command->verify ? !command->have_done :
			      !(command->ledger && command->have_nonce && command->have_sync))
		usage("an option is missing", NULL);
}

int main(int argc, char **argv)
{
	struct command command;

	page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	parse_command(argc, argv, &command);
	return command.verify ? verify(&command) : store(&command);
}
