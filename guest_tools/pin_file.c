// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * pin_file - write one page of a mapped file to a disk, which pins the page meanwhile.
 *
 * pin_file FILE DISK
 *   Maps the first page of FILE for reading, and writes it to DISK with O_DIRECT.
 */
#include "report.h"

#include <sys/mman.h>

static const struct option options[] = { END_OF_OPTIONS };

const char tool_name[] = "pin_file";
const char usage_text[] = "usage: pin_file FILE DISK\n";

int main(int argc, char **argv)
{
	size_t size = (size_t)sysconf(_SC_PAGESIZE);
	uint64_t begin_ns;
	int file, disk;
	void *map;

	next_option(argc, argv, options);
	if (optind != argc - 2)
		usage("expected FILE and DISK", NULL);
	file = open(argv[optind], O_RDONLY);
	if (file < 0)
		fail(argv[optind]);
	disk = open_direct(argv[optind + 1]);
	map = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	begin_ns = now_ns();
	if (pwrite(disk, map, size, 0) != (ssize_t)size)
		fail("pwrite");
	report_begin();
	report_number("duration_ns", now_ns() - begin_ns);
	report_end();
	return EXIT_FINE;
}
