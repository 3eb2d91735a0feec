// SPDX-License-Identifier: GPL-2.0-or-later
// load FILE: map FILE and load its first byte, before and after the file "gone" exists. Exit status 1:
// the second load succeeds; 0: it raises SIGBUS.
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static void on_bus(int signal)
{
	(void)signal;
	_exit(0);
}

int main(int argc, char **argv)
{
	int fd = argc == 2 ? open(argv[1], O_RDWR) : -1;
	volatile char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED)
		return 2;
	(void)*map;
	close(creat("mapped", 0600));
	while (access("gone", F_OK))
		usleep(20000);
	signal(SIGBUS, on_bus);
	(void)*map;
	return 1;
}
