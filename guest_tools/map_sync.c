// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * map_sync - map a file, store to it, and report the result in one line of JSON.
 *
 * One run reports whether mmap() grants MAP_SYNC on the file, together with the evidence: whether
 * the file is DAX (statx), the kernel's flags of the mapping (VmFlags in smaps), whether a store
 * arrived in the file, and, with --control, the same for a mapping without MAP_SYNC made just
 * before.
 *
 * With --cell it tries several mappings in turn, each of a file that is opened (and emptied) again,
 * and reports each in one line of JSON.
 *
 * Exit status of a single mapping (it is not a verdict, and is independent of the control):
 *   0  the mapping was made and every access to it succeeded
 *   1  mmap() refused
 *   3  an access to the mapping raised SIGBUS or SIGSEGV
 *   4  another step failed: open, truncate, fstat, munmap
 * With --cell it is 0 if all mappings were tried, with any result, and 4 if another step of one
 * failed. All these cases have a report. See report.h for the other exit statuses.
 */
#include "report.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

/* Neither in LEGACY_MAP_MASK (include/linux/mman.h) nor a flag of any architecture. */
#define UNKNOWN_BIT 0x02000000

/* In addition to the exit statuses of report.h. */
enum { EXIT_SIGNAL = 3 };

/* Properties of the file before it is mapped. */
struct file_facts {
	bool have_stat, have_statx, have_statfs;
	struct stat stat;
	struct statx statx;
	int statx_errno;
	struct statfs statfs;
};

/* One mapping to try. */
struct request {
	const char *type;
	int type_flag;
	bool sync, unknown_bit;
	const char *prot_name;
	int prot;
	uint64_t offset, length;
	bool have_length;
	bool read_only;		/* open the file O_RDONLY */
	bool anonymous;		/* no file at all */
	uint64_t address_align; /* of an address chosen by us; 0: the kernel chooses */
	bool fsync_it;
};

/* The parsed command line. */
struct command {
	const char *path;
	uint64_t pages;
	bool truncate_it, control;
	struct request request;
	struct request *cells;
	size_t cell_count;
};

enum answer { NOT_ASKED = -1, NO, YES };

/* Result of one mapping. */
struct outcome {
	const char *result, *stage;
	int error, signal;
	uint64_t fault_offset;
	char vm_flags[256];
	bool have_vm_flags;
	uint64_t seed; /* of the values that are stored */
	uint64_t pages_accessed, first_access_ns;
	enum answer in_mapping, in_file;
	int pread_errno;
	enum answer synced;
	int fsync_errno;
};

static const struct option options[] = {
	OPTION("pages", 'p'),  FLAG("no-truncate", 'n'), FLAG("read-only", 'r'),
	OPTION("offset", 'o'), OPTION("length", 'l'),	 OPTION("type", 't'),
	OPTION("sync", 's'),   FLAG("unknown-bit", 'u'), OPTION("prot", 'P'),
	FLAG("control", 'c'),  OPTION("cell", 'C'),	 END_OF_OPTIONS,
};

const char tool_name[] = "map_sync";
const char usage_text[] =
	"usage: map_sync [OPTION]... PATH\n"
	"  --pages=N       empty the file and make it N pages long first (default 1)\n"
	"  --no-truncate   use the file as it is; it must exist\n"
	"  --read-only     open it O_RDONLY for the mapping\n"
	"  --offset=BYTES  offset of the mapping in the file (default 0)\n"
	"  --length=BYTES  its length (default: to the end of the file, at least a page)\n"
	"  --type=TYPE     shared, shared_validate (default), private or none\n"
	"  --sync=on|off   with MAP_SYNC (default) or without\n"
	"  --unknown-bit   also set a flag that no kernel knows (0x2000000)\n"
	"  --prot=PROT     rw (default), r, w or none\n"
	"  --control       first try MAP_SHARED_VALIDATE alone, on the same range\n"
	"  --cell=WORDS    one mapping; may be repeated, and replaces all other options except\n"
	"                  --pages and --no-truncate. WORDS: a TYPE and any of sync, unknown-bit,\n"
	"                  read-only, anonymous, fsync (afterwards), prot=PROT, offset=BYTES,\n"
	"                  length=BYTES, address-align=BYTES (with MAP_FIXED); commas between them\n";

static uint64_t page_size;

static void parse_type(struct request *request, const char *text)
{
	static const struct {
		const char *name;
		int flag;
	} types[] = {
		{ "shared", MAP_SHARED },
		{ "shared_validate", MAP_SHARED_VALIDATE },
		{ "private", MAP_PRIVATE },
		{ "none", 0 },
	};

	for (size_t i = 0; i < LENGTH(types); i++) {
		if (!strcmp(text, types[i].name)) {
			request->type = types[i].name;
			request->type_flag = types[i].flag;
			return;
		}
	}
	usage("--type", text);
}

static void parse_prot(struct request *request, const char *text)
{
	static const struct {
		const char *name;
		int prot;
	} prots[] = {
		{ "rw", PROT_READ | PROT_WRITE },
		{ "r", PROT_READ },
		{ "w", PROT_WRITE },
		{ "none", PROT_NONE },
	};

	for (size_t i = 0; i < LENGTH(prots); i++) {
		if (!strcmp(text, prots[i].name)) {
			request->prot_name = prots[i].name;
			request->prot = prots[i].prot;
			return;
		}
	}
	usage("--prot", text);
}

static void parse_cell(struct request *cell, char *words)
{
	enum { SYNC, UNKNOWN, READ_ONLY, ANONYMOUS, FSYNC, PROT, OFFSET, LENGTH, ALIGN };
	static char *const tokens[] = {
		"sync", "unknown-bit", "read-only", "anonymous",     "fsync",
		"prot", "offset",      "length",    "address-align", NULL,
	};
	char *rest = strchr(words, ',');

	*cell = (struct request){ 0 };
	parse_prot(cell, "rw");
	if (rest)
		*rest++ = '\0';
	parse_type(cell, words);
	while (rest && *rest) {
		const char *word = rest;
		char *value;
		int token = getsubopt(&rest, tokens, &value);

		if (token < 0 || (token >= PROT) != (value != NULL))
			usage("--cell", word);
		switch (token) {
		case SYNC:
			cell->sync = true;
			break;
		case UNKNOWN:
			cell->unknown_bit = true;
			break;
		case READ_ONLY:
			cell->read_only = true;
			break;
		case ANONYMOUS:
			cell->anonymous = true;
			break;
		case FSYNC:
			cell->fsync_it = true;
			break;
		case PROT:
			parse_prot(cell, value);
			break;
		case OFFSET:
			cell->offset = parse_number("--cell, offset", value, 0, INT64_MAX);
			break;
		case LENGTH:
			cell->length = parse_number("--cell, length", value, 0, INT64_MAX);
			cell->have_length = true;
			break;
		case ALIGN:
			cell->address_align =
				parse_number("--cell, address-align", value, 0, INT64_MAX);
			if (!cell->address_align || cell->address_align % page_size)
				usage("--cell, address-align is not in pages", value);
			break;
		}
	}
	if (cell->anonymous && (cell->read_only || cell->fsync_it))
		usage("--cell", "an anonymous mapping has no file");
}

/* --- accesses that may raise a signal ------------------------------------------------------ */

static sigjmp_buf escape;
static volatile uintptr_t guard_start, guard_end;
static volatile sig_atomic_t caught_signal;
static volatile uintptr_t caught_address;

static void on_signal(int signal_number, siginfo_t *info, void *context)
{
	uintptr_t address = (uintptr_t)info->si_addr;

	(void)context;
	if (address < guard_start || address >= guard_end) {
		/* Not in the mapping: a fault of this program itself, so let it die. */
		signal(signal_number, SIG_DFL);
		return;
	}
	caught_signal = signal_number;
	caught_address = address;
	siglongjmp(escape, 1);
}

static void catch_signals(void)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };

	sigemptyset(&action.sa_mask);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
}

/* The value for the page at `offset`; it differs in each run and for each seed. */
static uint64_t page_value(uint64_t seed, uint64_t offset)
{
	return mix(seed + offset * GOLDEN);
}

/* Touch each page; progress is kept in `out`, in memory, and so survives a signal. */
static void access_pages(volatile char *map, const struct request *request, struct outcome *out)
{
	for (uint64_t at = 0; at < request->length; at += page_size) {
		volatile uint64_t *word = (volatile uint64_t *)(map + at);
		uint64_t begin = now_ns();

		if (request->prot & PROT_WRITE)
			*word = page_value(out->seed, at);
		else
			(void)*word;
		if (!at)
			out->first_access_ns = now_ns() - begin;
		out->pages_accessed++;
	}
	if (!(request->prot & PROT_WRITE))
		return;
	out->in_mapping = YES;
	for (uint64_t at = 0; at < request->length; at += page_size) {
		if (*(volatile uint64_t *)(map + at) != page_value(out->seed, at))
			out->in_mapping = NO;
	}
}

static void access_guarded(char *map, const struct request *request, struct outcome *out)
{
	uint64_t span = (request->length + page_size - 1) / page_size * page_size;

	guard_start = (uintptr_t)map;
	guard_end = guard_start + span;
	if (!sigsetjmp(escape, 1)) {
		access_pages(map, request, out);
	} else {
		out->result = caught_signal == SIGBUS ? "sigbus" : "sigsegv";
		out->stage = request->prot & PROT_WRITE ? "store" : "load";
		out->signal = caught_signal;
		out->fault_offset = caught_address - (uintptr_t)map;
		out->in_mapping = NOT_ASKED;
	}
	guard_start = 0;
	guard_end = 0;
}

/* Read the stored values from the file, not through the mapping. */
static void read_file_back(int fd, const struct request *request, struct outcome *out)
{
	out->in_file = YES;
	for (uint64_t at = 0; at < request->length; at += page_size) {
		uint64_t value = 0;
		ssize_t count = pread(fd, &value, sizeof(value), (off_t)(request->offset + at));

		if (count < 0) {
			/* A device DAX file, for example, cannot be read. */
			out->pread_errno = errno;
			out->in_file = NOT_ASKED;
			return;
		}
		if (count != sizeof(value) || value != page_value(out->seed, at))
			out->in_file = NO;
	}
}

/* --- one mapping ---------------------------------------------------------------------------- */

static void read_vm_flags(const void *map, struct outcome *out)
{
	uintptr_t wanted = (uintptr_t)map;
	bool inside = false;
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char *line = NULL;
	size_t size = 0;

	if (!smaps)
		return;
	while (getline(&line, &size, smaps) > 0) {
		uintptr_t start, end;

		if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2) {
			inside = start <= wanted && wanted < end;
		} else if (inside && !strncmp(line, "VmFlags:", 8)) {
			snprintf(out->vm_flags, sizeof(out->vm_flags), "%s", line + 8);
			out->have_vm_flags = true;
			break;
		}
	}
	free(line);
	fclose(smaps);
}

static int request_flags(const struct request *request)
{
	return request->type_flag | (request->sync ? MAP_SYNC : 0) |
	       (request->unknown_bit ? UNKNOWN_BIT : 0) | (request->anonymous ? MAP_ANONYMOUS : 0) |
	       (request->address_align ? MAP_FIXED : 0);
}

/* A free address range for the mapping. The unused rest stays reserved until the program ends. */
static char *reserve(const struct request *request)
{
	uint64_t align = request->address_align;
	char *place = mmap(NULL, request->length + align, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (place == MAP_FAILED)
		return NULL;
	return place + (align - (uintptr_t)place % align) % align;
}

/* The C library's mmap() refuses some offsets itself, so call the kernel directly. */
static char *kernel_mmap(char *place, int fd, const struct request *request)
{
	return (char *)syscall(SYS_mmap, place, request->length, request->prot,
			       request_flags(request), fd, request->offset);
}

static void failed(struct outcome *out, const char *result, const char *stage)
{
	out->error = errno;
	out->result = result;
	out->stage = stage;
}

static void start_outcome(struct outcome *out)
{
	static unsigned int count;

	*out = (struct outcome){ .result = "mapped", .stage = "done" };
	out->seed = now_ns() ^ (uint64_t)getpid() << 40 ^ (uint64_t)++count << 56;
	out->in_mapping = NOT_ASKED;
	out->in_file = NOT_ASKED;
	out->synced = NOT_ASKED;
}

static void try_mapping(int fd, const struct request *request, struct outcome *out)
{
	char *place = NULL;
	char *map;

	if (request->address_align && !(place = reserve(request))) {
		failed(out, "error", "reserve");
		return;
	}
	map = kernel_mmap(place, fd, request);
	if (map == MAP_FAILED) {
		failed(out, "refused", "mmap");
		return;
	}
	read_vm_flags(map, out);
	if (request->prot != PROT_NONE) {
		access_guarded(map, request, out);
		if (!out->signal && request->prot & PROT_WRITE && !request->anonymous)
			read_file_back(fd, request, out);
	}
	if (munmap(map, request->length) && !out->signal)
		failed(out, "error", "munmap");
}

/* --- the file -------------------------------------------------------------------------------- */

/* Returns the descriptor to map, or -1 with the failure in `out`. */
static int open_file(const struct command *command, bool read_only, struct outcome *out)
{
	/* O_NONBLOCK: open a FIFO without waiting, and report it. */
	const int always = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	int fd;

	if (command->truncate_it) {
		off_t size = (off_t)(command->pages * page_size);

		fd = open(command->path, O_RDWR | O_CREAT | always, 0644);
		if (fd < 0) {
			failed(out, "error", "open");
			return -1;
		}
		/* Truncate to zero first, to remove the data of an earlier run. */
		if (ftruncate(fd, 0) || ftruncate(fd, size)) {
			failed(out, "error", "truncate");
			close(fd);
			return -1;
		}
		if (!read_only)
			return fd;
		close(fd);
	}
	fd = open(command->path, (read_only ? O_RDONLY : O_RDWR) | always);
	if (fd < 0)
		failed(out, "error", "open");
	return fd;
}

static bool look_at_file(int fd, struct file_facts *file, struct outcome *out)
{
	if (fstat(fd, &file->stat)) {
		failed(out, "error", "fstat");
		return false;
	}
	file->have_stat = true;
	file->have_statx = !statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &file->statx);
	file->statx_errno = file->have_statx ? 0 : errno;
	file->have_statfs = !fstatfs(fd, &file->statfs);
	return true;
}

static void set_length(struct request *request, const struct file_facts *file)
{
	uint64_t size = (uint64_t)file->stat.st_size;
	uint64_t rest = size > request->offset ? size - request->offset : 1;

	if (!request->have_length)
		request->length = (rest + page_size - 1) / page_size * page_size;
}

/* --- the report ------------------------------------------------------------------------------ */

static void report_answer(const char *key, enum answer answer)
{
	if (answer == NOT_ASKED)
		report_null(key);
	else
		report_bool(key, answer == YES);
}

/* An errno and its name; both null if there was no error. */
static void report_errno(const char *key, int number)
{
	char name_key[32];

	snprintf(name_key, sizeof(name_key), "%s_name", key);
	report_number_if(number, key, (uint64_t)number);
	if (number)
		report_string(name_key, errno_name(number));
	else
		report_null(name_key);
}

static const char *file_type(mode_t mode)
{
	if (S_ISREG(mode))
		return "regular";
	if (S_ISBLK(mode))
		return "block";
	if (S_ISCHR(mode))
		return "character";
	return S_ISDIR(mode) ? "directory" : "other";
}

static void report_file(const struct file_facts *file)
{
	if (!file->have_stat) {
		report_null("file");
		return;
	}
	report_open("file", '{');
	report_string("type", file_type(file->stat.st_mode));
	report_number("size", (uint64_t)file->stat.st_size);
	if (file->have_statx) {
		uint64_t attributes = file->statx.stx_attributes;
		uint64_t mask = file->statx.stx_attributes_mask;

		report_open("statx", '{');
		report_number("attributes", attributes);
		report_number("attributes_mask", mask);
		report_answer("dax", !(mask & STATX_ATTR_DAX)	 ? NOT_ASKED :
				     attributes & STATX_ATTR_DAX ? YES :
								   NO);
		report_close('}');
	} else {
		report_null("statx");
	}
	report_errno("statx_errno", file->statx_errno);
	report_number_if(file->have_statfs, "fs_type", (uint64_t)file->statfs.f_type & 0xffffffff);
	report_number_if(file->have_statfs, "fs_block_size", (uint64_t)file->statfs.f_bsize);
	report_close('}');
}

static void report_vm_flags(struct outcome *out)
{
	if (!out->have_vm_flags) {
		report_null("vm_flags");
		return;
	}
	report_open("vm_flags", '[');
	for (char *word = strtok(out->vm_flags, " \t\n"); word; word = strtok(NULL, " \t\n"))
		report_string(NULL, word);
	report_close(']');
}

static void report_flag_names(const struct request *request)
{
	report_open("flag_names", '[');
	if (request->type_flag)
		report_string(NULL, request->type_flag == MAP_SHARED  ? "MAP_SHARED" :
				    request->type_flag == MAP_PRIVATE ? "MAP_PRIVATE" :
									"MAP_SHARED_VALIDATE");
	if (request->sync)
		report_string(NULL, "MAP_SYNC");
	if (request->unknown_bit)
		report_string(NULL, "UNKNOWN_BIT");
	if (request->anonymous)
		report_string(NULL, "MAP_ANONYMOUS");
	if (request->address_align)
		report_string(NULL, "MAP_FIXED");
	report_close(']');
}

static void report_mapping(const char *key, const struct request *request, struct outcome *out)
{
	report_open(key, '{');
	report_string("type", request->type);
	report_bool("sync", request->sync);
	report_bool("unknown_bit", request->unknown_bit);
	report_number("flags", (uint64_t)request_flags(request));
	report_flag_names(request);
	report_string("prot", request->prot_name);
	report_number("offset", request->offset);
	report_number("length", request->length);
	report_string("result", out->result);
	report_string("stage", out->stage);
	report_errno("errno", out->error);
	report_number_if(out->signal, "fault_offset", out->fault_offset);
	report_vm_flags(out);
	report_number("pages_accessed", out->pages_accessed);
	report_number_if(out->pages_accessed, "first_access_ns", out->first_access_ns);
	report_answer("store_in_mapping", out->in_mapping);
	report_answer("store_in_file", out->in_file);
	report_errno("pread_errno", out->pread_errno);
	report_close('}');
}

/* Begin a report of either kind. */
static void report_start(const char *verb, const struct command *command,
			 const struct request *request, const struct file_facts *file)
{
	report_begin();
	report_string("verb", verb);
	report_string("path", command->path);
	report_number("page_size", page_size);
	report_string("opened", request->anonymous ? "none" : request->read_only ? "r" : "rw");
	report_file(file);
}

static int exit_status(const struct outcome *out)
{
	if (out->signal)
		return EXIT_SIGNAL;
	if (!strcmp(out->result, "refused"))
		return EXIT_WRONG;
	return strcmp(out->result, "mapped") ? EXIT_FAILED : EXIT_FINE;
}

static void parse_command(int argc, char **argv, struct command *command)
{
	struct request *request = &command->request;
	bool one_mapping = false;
	int option;

	*command = (struct command){ .pages = 1, .truncate_it = true, .request.sync = true };
	command->cells = calloc((size_t)argc, sizeof(*command->cells));
	if (!command->cells)
		usage("no memory", NULL);
	parse_type(request, "shared_validate");
	parse_prot(request, "rw");
	while ((option = next_option(argc, argv, options)) != -1) {
		if (!strchr("pnC", option))
			one_mapping = true;
		switch (option) {
		case 'p':
			command->pages = parse_number("--pages", optarg, 0, INT64_MAX / page_size);
			break;
		case 'n':
			command->truncate_it = false;
			break;
		case 'r':
			request->read_only = true;
			break;
		case 'o':
			request->offset = parse_number("--offset", optarg, 0, INT64_MAX);
			break;
		case 'l':
			request->length = parse_number("--length", optarg, 0, INT64_MAX);
			request->have_length = true;
			break;
		case 't':
			parse_type(request, optarg);
			break;
		case 's':
			request->sync = parse_switch("--sync", optarg);
			break;
		case 'u':
			request->unknown_bit = true;
			break;
		case 'P':
			parse_prot(request, optarg);
			break;
		case 'c':
			command->control = true;
			break;
		case 'C':
			parse_cell(&command->cells[command->cell_count++], optarg);
			break;
		}
	}
	if (optind != argc - 1)
		usage("expected exactly one PATH", NULL);
	if (command->cell_count && one_mapping)
		usage("--cell excludes the options of a single mapping", NULL);
	command->path = argv[optind];
}

/* Try the single mapping, after its control; return the exit status. */
static int try_one(struct command *command)
{
	struct request *request = &command->request;
	struct outcome out, control_out;
	struct file_facts file = { 0 };
	struct request control;
	bool control_tried = false;
	int fd;

	start_outcome(&control_out);
	start_outcome(&out);
	fd = open_file(command, request->read_only, &out);
	if (fd >= 0 && look_at_file(fd, &file, &out)) {
		set_length(request, &file);
		if (command->control) {
			control = *request;
			parse_type(&control, "shared_validate");
			control.sync = false;
			control.unknown_bit = false;
			try_mapping(fd, &control, &control_out);
			control_tried = true;
		}
		try_mapping(fd, request, &out);
	}
	if (!strcmp(out.result, "refused"))
		/* The reference checker's text, independent of the C library's wording. */
		fprintf(stderr, "Failed to mmap with %s\n",
			out.error == EOPNOTSUPP ? "Operation not supported" : strerror(out.error));

	report_start("map", command, request, &file);
	if (control_tried)
		report_mapping("control", &control, &control_out);
	else
		report_null("control");
	report_mapping("mapping", request, &out);
	report_end();
	return exit_status(&out);
}

/* Try one of several mappings; return whether it was tried. */
static bool try_cell(const struct command *command, struct request *cell)
{
	struct file_facts file = { 0 };
	struct outcome out;
	int fd = -1;

	start_outcome(&out);
	if (cell->anonymous) {
		set_length(cell, &file);
		try_mapping(fd, cell, &out);
	} else {
		fd = open_file(command, cell->read_only, &out);
		if (fd >= 0 && look_at_file(fd, &file, &out)) {
			set_length(cell, &file);
			try_mapping(fd, cell, &out);
			if (cell->fsync_it) {
				out.synced = fsync(fd) ? NO : YES;
				out.fsync_errno = out.synced == YES ? 0 : errno;
			}
		}
	}
	if (fd >= 0)
		close(fd);
	report_start("cell", command, cell, &file);
	report_mapping("mapping", cell, &out);
	report_number("seed", out.seed);
	report_answer("fsync", out.synced);
	report_errno("fsync_errno", out.fsync_errno);
	report_end();
	return exit_status(&out) != EXIT_FAILED;
}

int main(int argc, char **argv)
{
	struct command command;
	int status = EXIT_FINE;

	page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	parse_command(argc, argv, &command);
	catch_signals();
	for (size_t i = 0; i < command.cell_count; i++) {
		if (!try_cell(&command, &command.cells[i]))
			status = EXIT_FAILED;
	}
	if (!command.cell_count)
		status = try_one(&command);
	return status;
}
