// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * mounted - mount a file system, run a program, and unmount it.
 *
 *	mounted DEVICE TYPE OPTIONS FOLDER PROGRAM [ARGUMENT...]
 *
 * One program instead of mount(8), umount(8) and dmesg(1), which under TCG take longer to start than
 * to run. PROGRAM prints first. Then follows the report with the errno of mount(2) and of umount(2),
 * the program's status as in a shell, and the kernel's messages since before the mount, as dmesg -r
 * prints them. If the mount fails, "status" is null.
 *
 * Exit status: see report.h.
 */
#include "report.h"

#include <sys/mount.h>
#include <sys/wait.h>

const char tool_name[] = "mounted";
const char usage_text[] = "usage: mounted DEVICE TYPE OPTIONS FOLDER PROGRAM [ARGUMENT...]\n";

static int run(char **words)
{
	int status;
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (!pid) {
		execv(words[0], words);
		fail(words[0]);
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			fail("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* One a read(2): "LEVEL,NUMBER,TIME,FLAGS;TEXT\n" (Documentation/ABI/testing/dev-kmsg). */
static void report_messages(int log)
{
	char record[8192 + 1];
	ssize_t size;

	report_open("messages", '[');
	while ((size = read(log, record, sizeof(record) - 1)) > 0) {
		char line[sizeof(record) + 16], *text;

		record[size] = 0;
		text = strchr(record, ';');
		if (!text)
			continue;
		snprintf(line, sizeof(line), "<%d>%s", atoi(record), text + 1);
		/* After the text follow properties of the device. */
		line[strcspn(line, "\n")] = 0;
		report_string(NULL, line);
	}
	/* EPIPE: messages were overwritten before they were read. */
	if (size < 0 && errno != EAGAIN)
		fail("/dev/kmsg");
	report_close(']');
}

int main(int argc, char **argv)
{
	int log, mounted, unmounted = 0, status = 0;

	if (argc < 6)
		usage("expected a DEVICE, TYPE, OPTIONS, FOLDER and PROGRAM", NULL);
	log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (log < 0 || lseek(log, 0, SEEK_END) < 0)
		fail("/dev/kmsg");
	mounted = mount(argv[1], argv[4], argv[2], 0, argv[3]) ? errno : 0;
	if (!mounted) {
		status = run(argv + 5);
		unmounted = umount2(argv[4], 0) ? errno : 0;
	}
	report_begin();
	report_number("mount", mounted);
	report_string("mount_error", mounted ? errno_name(mounted) : "");
	report_number_if(!mounted, "status", status);
	report_number("umount", unmounted);
	report_string("umount_error", unmounted ? errno_name(unmounted) : "");
	report_messages(log);
	report_end();
	return EXIT_FINE;
}
