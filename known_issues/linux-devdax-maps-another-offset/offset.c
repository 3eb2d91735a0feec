// SPDX-License-Identifier: GPL-2.0-or-later
/* Map a DAX device at an offset that is not a multiple of its alignment, and store to it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGN (2UL << 20)
#define OFFSET 0x10000UL

int main(int argc, char **argv)
{
	int fd = open(argv[argc - 1], O_RDWR);
	char *space = mmap(NULL, 4 * ALIGN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *aligned = (char *)(((unsigned long)space + ALIGN - 1) & -ALIGN);
	char *start, *shifted;

	if (fd < 0 || space == MAP_FAILED) {
		printf("no device, or no address space: %s\n", strerror(errno));
		return 2;
	}
	start = mmap(aligned, ALIGN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (start == MAP_FAILED) {
		printf("mmap at offset 0: %s\n", strerror(errno));
		return 2;
	}
	memset(start, 0, 64);
	memset(start + OFFSET, 0, 64);
	shifted = mmap(aligned + ALIGN, ALIGN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
		       OFFSET);
	if (shifted == MAP_FAILED) {
		printf("mmap at offset %#lx fails: %s\n", OFFSET, strerror(errno));
		return errno == EINVAL ? 0 : 2;
	}
	strcpy(shifted, "stored");
	printf("mmap at offset %#lx succeeds; a store to its start is at offset %s of the device\n",
	       OFFSET,
	       !strcmp(start, "stored")		 ? "0" :
	       !strcmp(start + OFFSET, "stored") ? "0x10000" :
						   "?");
	return strcmp(start, "stored") ? 2 : 1;
}
