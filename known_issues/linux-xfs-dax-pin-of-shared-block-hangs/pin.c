// SPDX-License-Identifier: GPL-2.0-or-later
/* pin FILE DISK: write the first page of a mapped file to a disk, with O_DIRECT. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int file = argc > 2 ? open(argv[1], O_RDONLY) : -1;
	int disk = argc > 2 ? open(argv[2], O_WRONLY | O_DIRECT) : -1;
	size_t size = (size_t)sysconf(_SC_PAGESIZE);
	void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);

	if (file < 0 || disk < 0 || map == MAP_FAILED ||
	    pwrite(disk, map, size, 0) != (ssize_t)size) {
		perror("pin");
		return 2;
	}
	return 0;
}
