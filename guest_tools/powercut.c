// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * powercut - change files step by step, so that the host sees each step's completion; and read what
 *            a power cut has left.
 *
 *	powercut run FOLDER COUNTER STEP...
 *	powercut tree FOLDER
 *
 * `run` makes the steps one after the other. After each, it stores the number of completed steps in
 * the first word of COUNTER, a DAX device: a store there is in the host's memory at once. A step is
 * VERB=NAME[:…], with names relative to FOLDER:
 *
 *	create=A  mkdir=D  unlink=A  rmdir=D  rename=A:B  link=A:B  truncate=A:LENGTH
 *	write=A:OFFSET:LENGTH:BYTE    pwrite(2)
 *	dwrite=A:OFFSET:LENGTH:BYTE   the same through a descriptor with O_DSYNC
 *	direct=A:OFFSET:LENGTH:BYTE   with O_DIRECT
 *	ddirect=A:OFFSET:LENGTH:BYTE  with O_DIRECT and O_DSYNC
 *	store=A:OFFSET:LENGTH:BYTE    stores through a shared mapping
 *	dax=A:OFFSET:LENGTH:BYTE      the same; the file is a DAX device
 *	msync=A:OFFSET:LENGTH         msync(2) with MS_SYNC, of a new shared mapping
 *	fsync=A  fdatasync=A  syncfs=A
 *	sync=.                        sync(2)
 *	set=A:TEXT                    write(2) of TEXT to a file of sysfs
 *	deep_flush=A                  writes 1 to the file A.deep_flush, a link to the region's attribute
 *
 * It stops at the first failed step. The report has each step with its errno.
 *
 * `tree` reports each folder and file below FOLDER with its inode, links, size, and its content as
 * runs of sectors of 512 bytes that consist of one byte; "byte" is null for a sector of several.
 *
 * Exit status: see report.h; `run` ends with 1 if a step failed.
 */
#include "report.h"

#include <ftw.h>
#include <sys/mman.h>

const char tool_name[] = "powercut";
const char usage_text[] =
	"usage: powercut run FOLDER COUNTER STEP...\n       powercut tree FOLDER\n";

#define SECTOR 512
/* Devdax maps multiples of its alignment, which is at most 2 MiB here. */
#define COUNTER_SIZE (2UL << 20)

struct step {
	char *verb, *name, *other;
	long long numbers[3];
};

static int opened(const char *name, int flags)
{
	return open(name, flags | O_CLOEXEC, 0644);
}

/* A descriptor for reading, of a file or a folder. */
static int to_sync(const char *name)
{
	int fd = opened(name, O_RDWR);

	return fd < 0 && errno == EISDIR ? opened(name, O_RDONLY | O_DIRECTORY) : fd;
}

static int closed(int fd, int result)
{
	int number = errno;

	close(fd);
	errno = number;
	return result;
}

static int write_bytes(int fd, const struct step *step)
{
	long long length = step->numbers[1];
	/* O_DIRECT needs the alignment of the largest sector. */
	char *data = aligned_alloc(4096, (length + 4095) / 4096 * 4096);
	int result = -1, number;

	if (data) {
		memset(data, (int)step->numbers[2], length);
		result = pwrite(fd, data, length, step->numbers[0]) == length ? 0 : -1;
	}
	number = errno;
	free(data);
	errno = number;
	return result;
}

static int in_mapping(int fd, const struct step *step, bool stores)
{
	long long page = sysconf(_SC_PAGESIZE), head = step->numbers[0] % page;
	size_t size = head + step->numbers[1];
	char *map =
		mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, step->numbers[0] - head);
	int result = 0, number;

	if (map == MAP_FAILED)
		return -1;
	if (stores)
		memset(map + head, (int)step->numbers[2], step->numbers[1]);
	else
		result = msync(map, size, MS_SYNC);
	number = errno;
	munmap(map, size);
	errno = number;
	return result;
}

static int set(const char *name, const char *text)
{
	int fd = opened(name, O_WRONLY);

	return fd < 0 ? -1 : closed(fd, write(fd, text, strlen(text)) > 0 ? 0 : -1);
}

static int deep_flush(const char *name)
{
	char path[256];

	snprintf(path, sizeof(path), "%s.deep_flush", name);
	return set(path, "1");
}

static int make(const struct step *step)
{
	const char *verb = step->verb, *name = step->name;
	int fd = -1;

	if (!strcmp(verb, "mkdir"))
		return mkdir(name, 0755);
	if (!strcmp(verb, "unlink"))
		return unlink(name);
	if (!strcmp(verb, "rmdir"))
		return rmdir(name);
	if (!strcmp(verb, "rename"))
		return rename(name, step->other);
	if (!strcmp(verb, "link"))
		return link(name, step->other);
	if (!strcmp(verb, "truncate"))
		return truncate(name, step->numbers[0]);
	if (!strcmp(verb, "sync")) {
		sync();
		return 0;
	}
	if (!strcmp(verb, "set"))
		return set(name, step->other);
	if (!strcmp(verb, "deep_flush"))
		return deep_flush(name);
	if (!strcmp(verb, "create"))
		fd = opened(name, O_RDWR | O_CREAT | O_EXCL);
	else if (!strcmp(verb, "dwrite"))
		fd = opened(name, O_RDWR | O_DSYNC);
	else if (!strcmp(verb, "direct"))
		fd = opened(name, O_RDWR | O_DIRECT);
	else if (!strcmp(verb, "ddirect"))
		fd = opened(name, O_RDWR | O_DIRECT | O_DSYNC);
	else
		fd = to_sync(name);
	if (fd < 0 || !strcmp(verb, "create"))
		return fd < 0 ? -1 : closed(fd, 0);
	if (!strcmp(verb, "fsync"))
		return closed(fd, fsync(fd));
	if (!strcmp(verb, "fdatasync"))
		return closed(fd, fdatasync(fd));
	if (!strcmp(verb, "syncfs"))
		return closed(fd, syncfs(fd));
	if (!strcmp(verb, "store") || !strcmp(verb, "dax") || !strcmp(verb, "msync"))
		return closed(fd, in_mapping(fd, step, strcmp(verb, "msync")));
	return closed(fd, write_bytes(fd, step));
}

/* What follows the name: another name ("n"), or numbers ("1" to "3"). */
static const char *arguments(const char *verb)
{
	static const char *const verbs[][2] = {
		{ "create", "" },  { "mkdir", "" },	{ "unlink", "" },     { "rmdir", "" },
		{ "fsync", "" },   { "fdatasync", "" }, { "syncfs", "" },     { "sync", "" },
		{ "rename", "n" }, { "link", "n" },	{ "truncate", "1" },  { "msync", "2" },
		{ "write", "3" },  { "dwrite", "3" },	{ "direct", "3" },    { "ddirect", "3" },
		{ "store", "3" },  { "dax", "3" },	{ "deep_flush", "" }, { "set", "n" },
	};

	for (size_t i = 0; i < LENGTH(verbs); i++)
		if (!strcmp(verbs[i][0], verb))
			return verbs[i][1];
	return NULL;
}

static bool parse(char *word, struct step *step)
{
	char *equals = strchr(word, '='), *colon, rest;
	const char *kind;
	int found;

	*step = (struct step){ .verb = word };
	if (!equals)
		return false;
	*equals = '\0';
	step->name = equals + 1;
	kind = arguments(word);
	colon = strchr(step->name, ':');
	if (colon)
		*colon++ = '\0';
	if (!kind || !*step->name || !colon != !*kind)
		return false;
	if (!*kind)
		return true;
	if (*kind == 'n') {
		step->other = colon;
		return *colon && !strchr(colon, ':');
	}
	found = sscanf(colon, "%lld:%lld:%lld%c", &step->numbers[0], &step->numbers[1],
		       &step->numbers[2], &rest);
	return found == *kind - '0' && step->numbers[0] >= 0 && step->numbers[1] >= 0;
}

static int run(int argc, char **argv)
{
	struct step list[256];
	volatile uint64_t *counter;
	int fd, status = EXIT_FINE;

	if (argc < 5 || argc - 4 > (int)LENGTH(list))
		usage("expected a FOLDER, a COUNTER, and 1 to 256 steps", NULL);
	for (int i = 4; i < argc; i++) {
		char *word = strdup(argv[i]);

		if (!word || !parse(word, &list[i - 4]))
			usage("unknown step", argv[i]);
	}
	fd = open(argv[3], O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(argv[3]);
	counter = mmap(NULL, COUNTER_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (counter == MAP_FAILED)
		fail("mmap of the counter");
	if (chdir(argv[2]))
		fail(argv[2]);
	report_begin();
	report_string("verb", "run");
	report_open("steps", '[');
	for (int i = 0; i < argc - 4 && status == EXIT_FINE; i++) {
		int number = make(&list[i]) ? errno : 0;

		report_open(NULL, '{');
		report_string("step", argv[i + 4]);
		report_number("errno", number);
		report_string("error", number ? errno_name(number) : "");
		report_close('}');
		if (number)
			status = EXIT_WRONG;
		else
			__atomic_store_n(counter, *counter + 1, __ATOMIC_SEQ_CST);
	}
	report_close(']');
	report_end();
	return status;
}

static void report_run(uint64_t first, uint64_t count, int byte)
{
	report_open(NULL, '[');
	report_number(NULL, first);
	report_number(NULL, count);
	report_number_if(byte >= 0, NULL, byte < 0 ? 0 : byte);
	report_close(']');
}

static void report_content(const char *path)
{
	unsigned char data[65536];
	uint64_t sector = 0, first = 0;
	int fd = opened(path, O_RDONLY), run = -2;
	ssize_t got = 0;

	report_open("content", '[');
	while (fd >= 0 && (got = read(fd, data, sizeof(data))) > 0) {
		for (ssize_t at = 0; at < got; at += SECTOR, sector++) {
			size_t rest = got - at < SECTOR ? got - at : SECTOR;
			int byte = memcmp(&data[at], &data[at + 1], rest - 1) ? -1 : data[at];

			if (byte == run)
				continue;
			if (sector)
				report_run(first, sector - first, run);
			first = sector;
			run = byte;
		}
	}
	if (sector)
		report_run(first, sector - first, run);
	report_close(']');
	report_number("errno", fd < 0 || got < 0 ? errno : 0);
	if (fd >= 0)
		close(fd);
}

static int report_entry(const char *path, const struct stat *info, int type, struct FTW *place)
{
	(void)place;
	report_open(NULL, '{');
	report_string("path", path);
	report_bool("folder", type == FTW_D);
	report_number("inode", info->st_ino);
	report_number("links", info->st_nlink);
	report_number("size", type == FTW_D ? 0 : (uint64_t)info->st_size);
	if (type == FTW_F) {
		report_content(path);
	} else {
		report_open("content", '[');
		report_close(']');
		report_number("errno", type == FTW_D ? 0 : EIO);
	}
	report_close('}');
	return 0;
}

static int tree(int argc, char **argv)
{
	if (argc != 3)
		usage("expected a FOLDER", NULL);
	if (chdir(argv[2]))
		fail(argv[2]);
	report_begin();
	report_string("verb", "tree");
	report_open("entries", '[');
	if (nftw(".", report_entry, 16, FTW_PHYS))
		fail("nftw");
	report_close(']');
	report_end();
	return EXIT_FINE;
}

int main(int argc, char **argv)
{
	return parse_verb(argc, argv, "run", "tree") ? tree(argc, argv) : run(argc, argv);
}
