// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kexec - start another kernel without the firmware and without a reset of the machine.
 *
 * kexec load KERNEL COMMAND-LINE [INITRAMFS]
 *   Loads a vmlinux for `kexec execute`.
 *
 * kexec crash KERNEL COMMAND-LINE [INITRAMFS]
 *   Loads a vmlinux into the memory of crashkernel=; it starts when this kernel panics.
 *
 * kexec execute
 *   Starts the loaded kernel, after the shutdown of all devices.
 *
 * See report.h for the exit statuses.
 */
#include "report.h"

#include <linux/kexec.h>
#include <linux/reboot.h>
#include <sys/syscall.h>

const char tool_name[] = "kexec";
const char usage_text[] = "usage: kexec (load | crash) KERNEL COMMAND-LINE [INITRAMFS]\n"
			  "       kexec execute\n";

static int open_file(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail(path);
	return fd;
}

int main(int argc, char **argv)
{
	bool crash = argc > 1 && !strcmp(argv[1], "crash");
	unsigned long flags = crash ? KEXEC_FILE_ON_CRASH : 0;
	int kernel, initramfs = -1;

	if (argc == 2 && !strcmp(argv[1], "execute")) {
		syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
			LINUX_REBOOT_CMD_KEXEC, NULL);
		fail("reboot");
	}
	if (argc < 4 || argc > 5 || (!crash && strcmp(argv[1], "load")))
		usage("wrong arguments", NULL);
	kernel = open_file(argv[2]);
	if (argc > 4)
		initramfs = open_file(argv[4]);
	else
		flags |= KEXEC_FILE_NO_INITRAMFS;
	/* The length includes the final NUL. */
	if (syscall(SYS_kexec_file_load, kernel, initramfs, strlen(argv[3]) + 1, argv[3], flags))
		fail("kexec_file_load");
	return EXIT_FINE;
}
