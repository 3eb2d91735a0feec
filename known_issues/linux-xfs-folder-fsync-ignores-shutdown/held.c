// SPDX-License-Identifier: GPL-2.0-or-later
/* Open a folder, wait until standard input ends, and call fsync(). */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int fd = open(argv[argc - 1], O_RDONLY);
	char byte;

	if (fd < 0) {
		printf("open: %s\n", strerror(errno));
		return 2;
	}
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	if (!fsync(fd)) {
		puts("fsync() returns 0");
		return 0;
	}
	printf("fsync(): %s\n", strerror(errno));
	return errno == EIO ? 1 : 2;
}
