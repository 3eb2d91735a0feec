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

static void report_messages(int log)
{
	const char *message;
	int level;

	report_open("messages", '[');
	while ((message = next_message(log, &level))) {
		char line[8192 + 32];

		snprintf(line, sizeof(line), "<%d>%s", level, message);
		report_string(NULL, line);
	}
	report_close(']');
}

int main(int argc, char **argv)
{
	int log, mounted, unmounted = 0, status = 0;

	if (argc < 6)
		usage("expected a DEVICE, TYPE, OPTIONS, FOLDER and PROGRAM", NULL);
	log = open_log();
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
