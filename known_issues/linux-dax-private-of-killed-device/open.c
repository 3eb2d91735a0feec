// SPDX-License-Identifier: GPL-2.0-or-later
/* Open and map a DAX device until it goes. A file says that both have worked once. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define LENGTH (2UL << 20)

int main(int argc, char **argv)
{
	for (int count = 0;; count++) {
		int fd = open(argv[1], O_RDWR);
		void *map;

		if (fd < 0)
			return errno == ENXIO ? 0 : 2;
		map = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (map == MAP_FAILED)
			return errno == ENXIO ? 0 : 2;
		munmap(map, LENGTH);
		close(fd);
		if (!count)
			close(open(argv[2], O_CREAT | O_WRONLY, 0644));
	}
}
