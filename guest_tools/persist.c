// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * persist - make system calls on one file, and report the result of each.
 *
 *	persist FILE STEP...
 *
 * A step is one of
 *
 *	write=OFFSET:LENGTH:BYTE    pwrite(2)
 *	dwrite=OFFSET:LENGTH:BYTE   the same through a descriptor with O_DSYNC
 *	store=OFFSET:LENGTH:BYTE    stores through a shared mapping
 *	msync=OFFSET:LENGTH         msync(2) with MS_SYNC, of a new shared mapping
 *	fsync, fdatasync, syncfs    on the descriptor
 *	read=OFFSET:LENGTH          pread(2); reports the value of all bytes, or null if they differ
 *	verity                      FS_IOC_ENABLE_VERITY, with SHA-256 and blocks of a page
 *	await                       closes descriptor 3 and waits for a byte on stdin
 *
 * The file is opened O_RDWR, or O_WRONLY if that is refused (sysfs), or O_RDONLY if it is a
 * directory or if one step is verity, which is refused while a writer has the file open; a missing
 * file is created. All descriptors are opened first and stay open. So the steps also work on a file
 * system that refuses a later open(2), and they see the errors that the kernel keeps for a
 * descriptor. A failed step does not stop the following ones; a store that raises SIGBUS is
 * reported as EFAULT.
 *
 * "steps" in the report has each step, with its errno, and CLOCK_MONOTONIC at its begin and end.
 * Exit status: see report.h; never 1.
 */
#include "report.h"

#include <linux/fsverity.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

const char tool_name[] = "persist";
const char usage_text[] = "usage: persist FILE STEP...\n";

struct step {
	const char *name;
	long long offset, length;
	int byte;
};

static sigjmp_buf bus;
static int dsync_fd = -1, dsync_errno;

static void on_bus(int signal)
{
	siglongjmp(bus, signal);
}

static void *filled(const struct step *step)
{
	void *data = malloc(step->length);

	if (data)
		memset(data, step->byte, step->length);
	return data;
}

static long long write_to(int fd, const struct step *step)
{
	void *data = filled(step);
	long long result = -1;
	int number;

	if (data)
		result = pwrite(fd, data, step->length, step->offset);
	number = errno;
	free(data);
	errno = number;
	return result;
}

static long long write_synchronously(const struct step *step)
{
	if (dsync_fd >= 0)
		return write_to(dsync_fd, step);
	errno = dsync_errno;
	return -1;
}

static long long await(void)
{
	char byte;

	close(3);
	return read(0, &byte, 1) < 0 ? -1 : 0;
}

static long long enable_verity(int fd)
{
	struct fsverity_enable_arg request = {
		.version = 1,
		.hash_algorithm = FS_VERITY_HASH_ALG_SHA256,
		.block_size = (uint32_t)sysconf(_SC_PAGESIZE),
	};

	return ioctl(fd, FS_IOC_ENABLE_VERITY, &request);
}

static long long in_mapping(int fd, const struct step *step)
{
	long long page = sysconf(_SC_PAGESIZE), head = step->offset % page, result = 0;
	char *map = mmap(NULL, head + step->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			 step->offset - head);
	int number;

	if (map == MAP_FAILED)
		return -1;
	if (!strcmp(step->name, "msync")) {
		result = msync(map, head + step->length, MS_SYNC);
	} else if (sigsetjmp(bus, 1)) {
		errno = EFAULT;
		result = -1;
	} else {
		memset(map + head, step->byte, step->length);
	}
	number = errno;
	munmap(map, head + step->length);
	errno = number;
	return result;
}

static long long read_from(int fd, struct step *step)
{
	unsigned char *data = malloc(step->length);
	long long result = data ? pread(fd, data, step->length, step->offset) : -1;
	int number = errno;

	step->byte = result > 0 ? data[0] : -1;
	for (long long i = 1; i < result; i++)
		if (data[i] != step->byte)
			step->byte = -1;
	free(data);
	errno = number;
	return result;
}

static long long make(int fd, struct step *step)
{
	if (!strcmp(step->name, "write"))
		return write_to(fd, step);
	if (!strcmp(step->name, "dwrite"))
		return write_synchronously(step);
	if (!strcmp(step->name, "read"))
		return read_from(fd, step);
	if (!strcmp(step->name, "fsync"))
		return fsync(fd);
	if (!strcmp(step->name, "fdatasync"))
		return fdatasync(fd);
	if (!strcmp(step->name, "syncfs"))
		return syncfs(fd);
	if (!strcmp(step->name, "await"))
		return await();
	if (!strcmp(step->name, "verity"))
		return enable_verity(fd);
	return in_mapping(fd, step);
}

static void report_step(const struct step *step, long long result, int number, uint64_t begin_ns)
{
	uint64_t end_ns = now_ns();

	report_open(NULL, '{');
	report_string("step", step->name);
	report_number("offset", (uint64_t)step->offset);
	report_number("length", (uint64_t)step->length);
	report_number_if(step->byte >= 0, "byte", (uint64_t)step->byte);
	report_number_if(result >= 0, "result", (uint64_t)result);
	report_number("errno", result < 0 ? (uint64_t)number : 0);
	report_string("error", result < 0 ? errno_name(number) : "");
	report_number("begin_ns", begin_ns);
	report_number("end_ns", end_ns);
	report_close('}');
}

/* Number of numbers that a step takes; -1 for an unknown step. */
static int numbers(const char *name)
{
	static const char *const names[] = { ",fsync,fdatasync,syncfs,await,verity,", "",
					     ",msync,read,", ",write,dwrite,store," };
	char word[16];

	snprintf(word, sizeof(word), ",%s,", name);
	for (int count = 0; count < 4; count++)
		if (strstr(names[count], word))
			return count;
	return -1;
}

static int parse(char *word, struct step *step)
{
	char *equals = strchr(word, '='), rest;
	int wanted, found = 0;

	*step = (struct step){ .name = word, .byte = -1 };
	if (equals) {
		*equals = '\0';
		found = sscanf(equals + 1, "%lld:%lld:%d%c", &step->offset, &step->length,
			       &step->byte, &rest);
	}
	wanted = numbers(word);
	return wanted >= 0 && found == wanted && !equals == !wanted && step->offset >= 0 &&
	       step->length >= 0;
}

int main(int argc, char **argv)
{
	struct step list[64], opened = { .name = "open", .byte = -1 };
	uint64_t begin_ns = now_ns();
	int fd, flags = O_RDWR | O_CREAT | O_CLOEXEC;

	if (argc < 2 || argc - 2 > (int)LENGTH(list))
		usage("expected a FILE and at most 64 steps", NULL);
	for (int i = 2; i < argc; i++) {
		if (!parse(argv[i], &list[i - 2]))
			usage("unknown step", argv[i]);
		if (!strcmp(list[i - 2].name, "verity"))
			flags = O_RDONLY | O_CLOEXEC;
	}
	signal(SIGBUS, on_bus);
	fd = open(argv[1], flags, 0644);
	if (fd < 0 && errno == EACCES)
		fd = open(argv[1], O_WRONLY | O_CLOEXEC);
	if (fd < 0 && errno == EISDIR)
		fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	report_begin();
	report_open("steps", '[');
	report_step(&opened, fd < 0 ? -1 : 0, errno, begin_ns);
	for (int i = 0; fd >= 0 && dsync_fd < 0 && i < argc - 2; i++) {
		if (strcmp(list[i].name, "dwrite"))
			continue;
		dsync_fd = open(argv[1], O_WRONLY | O_DSYNC | O_CLOEXEC);
		dsync_errno = errno;
	}
	for (int i = 0; fd >= 0 && i < argc - 2; i++) {
		long long result;

		begin_ns = now_ns();
		errno = 0;
		result = make(fd, &list[i]);
		report_step(&list[i], result, errno, begin_ns);
	}
	report_close(']');
	report_end();
	return EXIT_FINE;
}
