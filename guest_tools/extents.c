// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * extents - random operations on the extents of two files, whose contents are known at any time.
 *
 * extents --block=BYTES [--base=BYTES] [--seed=N] [--steps=N] [--trace] FOLDER SCRATCH
 *   Creates the files FOLDER/a and FOLDER/b, sparse up to the offset --base, and keeps a copy of
 *   what follows in memory. Each step writes, truncates, punches, clones, … a random range, with
 *   arguments that a file system either accepts or does not support at all, and compares what
 *   changed; every 16th step compares both files as a whole, read and mapped. --block is the file
 *   system's block size. SCRATCH is a disk or a file elsewhere, which O_DIRECT writes to from
 *   mappings.
 *
 *   The same seed makes the same steps. --trace prints each of them.
 *
 * Exit status 1: a file has other contents or another size, or an operation failed; see the report.
 */
#include "report.h"

#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define BLOCKS 48
#define WHOLE_STEPS 16
#define DIRECT 65536

static const struct option options[] = {
	OPTION("block", 'b'), OPTION("base", 'o'), OPTION("seed", 's'),
	OPTION("steps", 'n'), FLAG("trace", 't'),  END_OF_OPTIONS,
};

enum operation {
	WRITE,
	STORE,
	TRUNCATE,
	ALLOCATE,
	PUNCH,
	ZERO,
	COLLAPSE,
	INSERT,
	UNSHARE,
	CLONE,
	DEDUPE,
	DEDUPE_EQUAL,
	COPY,
	DIRECT_WRITE,
	SYNC,
	OPERATIONS,
};

static const char *const names[OPERATIONS] = {
	"write",  "store",	  "truncate", "allocate",     "punch",
	"zero",	  "collapse",	  "insert",   "unshare",      "clone",
	"dedupe", "dedupe equal", "copy",     "direct write", "sync",
};

static struct file {
	const char *name;
	int fd;
	uint64_t size;	     /* above the base */
	unsigned char *data; /* BLOCKS blocks; zeros above the size */
} files[2] = { { .name = "a" }, { .name = "b" } };

static uint64_t block, base, limit, seed = 1, steps = 1000, drawn;
static uint64_t done[OPERATIONS], unsupported[OPERATIONS];
static unsigned char *buffer;
static int scratch;
static bool trace;
/* What went wrong. */
static const char *failure;
static uint64_t step, failed_at, wanted_value, found_value;
static int failed_errno;
static char description[160];

const char tool_name[] = "extents";
const char usage_text[] =
	"usage: extents --block=BYTES [--base=BYTES] [--seed=N] [--steps=N] [--trace] FOLDER SCRATCH\n";

static uint64_t draw(uint64_t below)
{
	return below ? draw_below(&drawn, below) : 0;
}

static bool wrong(const char *what, uint64_t at, uint64_t wanted, uint64_t found)
{
	failure = what;
	failed_at = at;
	wanted_value = wanted;
	found_value = found;
	return false;
}

/* Count a call that succeeded, or that the file system does not have; any other error is wrong. */
static bool worked(enum operation operation, bool success)
{
	if (success) {
		done[operation]++;
		return true;
	}
	if (errno == EOPNOTSUPP || errno == ENOTTY || errno == ENOSYS) {
		unsupported[operation]++;
		return false;
	}
	failed_errno = errno;
	return wrong("an operation failed", 0, 0, 0);
}

static bool same(const struct file *file, const unsigned char *found, uint64_t from,
		 uint64_t length, const char *what)
{
	const unsigned char *wanted = file->data + from;

	if (!memcmp(wanted, found, length))
		return true;
	for (uint64_t i = 0; i < length; i++) {
		if (wanted[i] != found[i])
			return wrong(what, from + i, wanted[i], found[i]);
	}
	return true;
}

static bool compare(const struct file *file, uint64_t from, uint64_t length)
{
	struct stat status;
	unsigned char *map;
	ssize_t got;
	bool equal;

	if (fstat(file->fd, &status))
		fail("fstat");
	if ((uint64_t)status.st_size != base + file->size)
		return wrong("the size is wrong", 0, base + file->size, (uint64_t)status.st_size);
	if (from >= file->size)
		return true;
	if (length > file->size - from)
		length = file->size - from;
	got = pread(file->fd, buffer, length, (off_t)(base + from));
	if (got != (ssize_t)length)
		return wrong("a read is short", from, length, got < 0 ? 0 : (uint64_t)got);
	if (!same(file, buffer, from, length, "a read returns other contents"))
		return false;
	map = mmap(NULL, limit, PROT_READ, MAP_SHARED, file->fd, (off_t)base);
	if (map == MAP_FAILED)
		fail("mmap");
	equal = same(file, map + from, from, length, "a mapping shows other contents");
	munmap(map, limit);
	return equal;
}

/* Fill a range of the buffer; often with one value, so that blocks are equal by chance. */
static void fill(unsigned char *at, uint64_t length)
{
	bool random = draw(3);
	unsigned char value = (unsigned char)(1 + draw(3));

	for (uint64_t i = 0; i < length; i++)
		at[i] = random ? (unsigned char)(draw(256) | 1) : value;
}

static void grow(struct file *file, uint64_t end)
{
	if (end > file->size)
		file->size = end;
}

static void describe(enum operation operation, const struct file *file, uint64_t from,
		     uint64_t length, const struct file *source, uint64_t source_from)
{
	int used = snprintf(description, sizeof(description), "%s %s %" PRIu64 "+%" PRIu64,
			    names[operation], file->name, from, length);

	if (source)
		snprintf(description + used, sizeof(description) - (size_t)used, " of %s %" PRIu64,
			 source->name, source_from);
	if (trace)
		fprintf(stderr, "%" PRIu64 " %s, sizes %" PRIu64 " %" PRIu64 "\n", step,
			description, files[0].size, files[1].size);
}

/* An operation of fallocate(2) that leaves the size, or extends it. */
static bool allocate(enum operation operation, struct file *file, uint64_t from, uint64_t length)
{
	static const int modes[OPERATIONS] = {
		[ALLOCATE] = 0,
		[PUNCH] = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		[ZERO] = FALLOC_FL_ZERO_RANGE,
		[UNSHARE] = FALLOC_FL_UNSHARE_RANGE,
	};

	describe(operation, file, from, length, NULL, 0);
	if (!worked(operation,
		    !fallocate(file->fd, modes[operation], (off_t)(base + from), (off_t)length)))
		return !failure;
	if (operation == PUNCH || operation == ZERO)
		memset(file->data + from, 0, length);
	if (operation != PUNCH)
		grow(file, from + length);
	return compare(file, from ? from - 1 : 0, length + 2);
}

/* Remove or insert whole blocks. */
static bool shift(enum operation operation, struct file *file)
{
	uint64_t blocks = file->size / block, from, length, rest;

	if (operation == COLLAPSE) {
		/* The range must end before the end of the file. */
		if (file->size < 2 * block)
			return true;
		length = block * (1 + draw(blocks > 4 ? 3 : 1));
		from = block * draw((file->size - length - 1) / block + 1);
		if (from + length >= file->size)
			return true;
	} else {
		length = block * (1 + draw(3));
		if (!blocks || file->size + length > limit)
			return true;
		from = block * draw(blocks);
	}
	describe(operation, file, from, length, NULL, 0);
	if (!worked(operation, !fallocate(file->fd,
					  operation == COLLAPSE ? FALLOC_FL_COLLAPSE_RANGE :
								  FALLOC_FL_INSERT_RANGE,
					  (off_t)(base + from), (off_t)length)))
		return !failure;
	if (operation == COLLAPSE) {
		rest = limit - from - length;
		memmove(file->data + from, file->data + from + length, rest);
		memset(file->data + from + rest, 0, length);
		file->size -= length;
	} else {
		rest = limit - from - length;
		memmove(file->data + from + length, file->data + from, rest);
		memset(file->data + from, 0, length);
		file->size += length;
	}
	return compare(file, from, limit);
}

static void rewrite(const struct file *file, uint64_t from, uint64_t length)
{
	if (pwrite(file->fd, file->data + from, length, (off_t)(base + from)) != (ssize_t)length)
		fail("pwrite");
}

/* Blocks of one file become those of the other, or of another place of the same one. */
static bool share(enum operation operation, struct file *file, struct file *source)
{
	uint64_t blocks = source->size / block, count, from, to;
	struct file_clone_range clone = { .src_fd = source->fd };
	struct {
		struct file_dedupe_range head;
		struct file_dedupe_range_info info;
	} dedupe = { .head = { .dest_count = 1 } };
	bool equal, success;

	if (operation != CLONE && file->size / block < blocks)
		blocks = file->size / block;
	if (!blocks)
		return true;
	count = 1 + draw(blocks);
	from = block * draw(blocks - count + 1);
	to = operation == CLONE ? block * draw(BLOCKS - count + 1) :
				  block * draw(file->size / block - count + 1);
	if (file == source && from < to + block * count && to < from + block * count)
		return true;
	describe(operation, file, to, block * count, source, from);
	if (operation == CLONE) {
		clone.src_offset = base + from;
		clone.src_length = block * count;
		clone.dest_offset = base + to;
		if (!worked(operation, !ioctl(file->fd, FICLONERANGE, &clone)))
			return !failure;
		memmove(file->data + to, source->data + from, block * count);
		grow(file, to + block * count);
		return compare(file, to, block * count);
	}
	if (operation == DEDUPE_EQUAL) {
		memcpy(file->data + to, source->data + from, block * count);
	}
	/*
	 * Written as they are, so that no range has a hole or unwritten space: the kernel may call such
	 * a range different from one that has zeros.
	 */
	rewrite(file, to, block * count);
	rewrite(source, from, block * count);
	equal = !memcmp(file->data + to, source->data + from, block * count);
	dedupe.head.src_offset = base + from;
	dedupe.head.src_length = block * count;
	dedupe.info.dest_fd = file->fd;
	dedupe.info.dest_offset = base + to;
	success = !ioctl(source->fd, FIDEDUPERANGE, &dedupe);
	if (success && dedupe.info.status < 0) {
		/* The file system's own answer for this file. */
		errno = -dedupe.info.status;
		success = false;
	}
	if (!worked(operation, success))
		return !failure;
	if ((dedupe.info.status == FILE_DEDUPE_RANGE_SAME) != equal)
		return wrong("dedupe compares wrongly", to, equal, !equal);
	return compare(file, to, block * count) && compare(source, from, block * count);
}

static bool copy(struct file *file, struct file *source)
{
	uint64_t from = draw(source->size), length = draw(limit / 4), to = draw(limit / 2);
	off_t in = (off_t)(base + from), out = (off_t)(base + to);
	ssize_t copied;

	if (!source->size)
		return true;
	if (length > source->size - from)
		length = source->size - from;
	if (file == source && from < to + length && to < from + length)
		return true;
	describe(COPY, file, to, length, source, from);
	copied = copy_file_range(source->fd, &in, file->fd, &out, length, 0);
	if (!worked(COPY, copied >= 0))
		return !failure;
	memmove(file->data + to, source->data + from, (size_t)copied);
	if (copied)
		grow(file, to + (uint64_t)copied);
	return compare(file, to, length);
}

/* The pages of a mapping are the source of I/O to a disk: they are pinned meanwhile. */
static bool direct_write(struct file *file)
{
	uint64_t from = draw(limit / DIRECT) * DIRECT;
	volatile unsigned char *map;
	bool success;

	if (from + DIRECT > file->size)
		return true;
	describe(DIRECT_WRITE, file, from, DIRECT, NULL, 0);
	map = mmap(NULL, limit, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, (off_t)base);
	if (map == MAP_FAILED)
		fail("mmap");
	/* Writable pages: Linux 6.12 hangs on others if they were ever shared (see pin_file.c). */
	for (uint64_t i = from; i < from + DIRECT; i += block)
		map[i] = file->data[i];
	success = pwrite(scratch, (const void *)(map + from), DIRECT, 0) == DIRECT;
	munmap((void *)map, limit);
	if (!worked(DIRECT_WRITE, success))
		return !failure;
	if (pread(scratch, buffer, DIRECT, 0) != DIRECT)
		fail("pread of SCRATCH");
	return same(file, buffer, from, DIRECT, "O_DIRECT from a mapping wrote other contents");
}

static bool store(struct file *file, uint64_t from, uint64_t length)
{
	unsigned char *map;

	if (from >= file->size)
		return true;
	if (length > file->size - from)
		length = file->size - from;
	describe(STORE, file, from, length, NULL, 0);
	map = mmap(NULL, limit, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, (off_t)base);
	if (map == MAP_FAILED)
		fail("mmap");
	fill(file->data + from, length);
	memcpy(map + from, file->data + from, length);
	munmap(map, limit);
	done[STORE]++;
	return compare(file, from, length);
}

static bool make_step(enum operation operation)
{
	struct file *file = &files[draw(2)], *source = &files[draw(2)];
	uint64_t from = draw(limit / 2), length = 1 + draw(limit / 4), size;

	switch (operation) {
	case WRITE:
		describe(operation, file, from, length, NULL, 0);
		fill(file->data + from, length);
		if (!worked(WRITE, pwrite(file->fd, file->data + from, length,
					  (off_t)(base + from)) == (ssize_t)length))
			return !failure;
		grow(file, from + length);
		return compare(file, from, length);
	case STORE:
		return store(file, from, length);
	case TRUNCATE:
		size = draw(limit);
		describe(operation, file, size, 0, NULL, 0);
		if (!worked(TRUNCATE, !ftruncate(file->fd, (off_t)(base + size))))
			return !failure;
		memset(file->data + size, 0, limit - size);
		file->size = size;
		return compare(file, size > block ? size - block : 0, block);
	case ALLOCATE:
	case PUNCH:
	case ZERO:
	case UNSHARE:
		/* Unsharing beyond the end of a file allocates there, as allocation does. */
		return allocate(operation, file, from, length);
	case COLLAPSE:
	case INSERT:
		return shift(operation, file);
	case CLONE:
	case DEDUPE:
	case DEDUPE_EQUAL:
		return share(operation, file, source);
	case COPY:
		return copy(file, source);
	case DIRECT_WRITE:
		return direct_write(file);
	default:
		describe(SYNC, file, 0, 0, NULL, 0);
		return worked(SYNC, !fsync(file->fd)) || !failure;
	}
}

static void make_file(struct file *file, const char *folder)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/%s", folder, file->name);
	file->fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (file->fd < 0 || ftruncate(file->fd, (off_t)base))
		fail(path);
	file->data = calloc(1, limit);
	if (!file->data)
		fail("memory");
}

int main(int argc, char **argv)
{
	int option;
	bool fine = true;

	while ((option = next_option(argc, argv, options)) != -1) {
		switch (option) {
		case 'b':
			block = parse_number("--block", optarg, 512, 1 << 20);
			break;
		case 'o':
			base = parse_number("--base", optarg, 0, UINT64_C(1) << 50);
			break;
		case 's':
			seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 't':
			trace = true;
			break;
		case 'n':
			steps = parse_number("--steps", optarg, 1, 1000000);
			break;
		}
	}
	if (!block || block % 512 || base % (block ? block : 1) || base % DIRECT)
		usage("--block and --base must be multiples of sectors and blocks", NULL);
	if (optind != argc - 2)
		usage("expected FOLDER and SCRATCH", NULL);
	limit = BLOCKS * block;
	drawn = seed;
	make_file(&files[0], argv[optind]);
	make_file(&files[1], argv[optind]);
	scratch = open_direct(argv[optind + 1]);
	errno = posix_memalign((void **)&buffer, DIRECT, limit > DIRECT ? limit : DIRECT);
	if (errno)
		fail("memory");
	for (step = 0; fine && step < steps; step++) {
		fine = make_step((enum operation)draw(OPERATIONS));
		if (fine && step % WHOLE_STEPS == 0)
			fine = compare(&files[0], 0, limit) && compare(&files[1], 0, limit);
	}
	report_begin();
	report_number("steps", step);
	report_number("block", block);
	report_open("done", '{');
	for (unsigned int i = 0; i < OPERATIONS; i++)
		report_number(names[i], done[i]);
	report_close('}');
	report_open("unsupported", '{');
	for (unsigned int i = 0; i < OPERATIONS; i++)
		report_number(names[i], unsupported[i]);
	report_close('}');
	report_string("failure", failure ? failure : "");
	report_string("step", description);
	report_number("at", failed_at);
	report_number("expected", wanted_value);
	report_number("found", found_value);
	report_number("errno", (uint64_t)failed_errno);
	report_end();
	return failure ? EXIT_WRONG : EXIT_FINE;
}
