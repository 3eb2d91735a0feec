// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nd_pmu - count one event of a DIMM's performance monitor.
 *
 *	nd_pmu TYPE EVENT CPU STEP...
 *
 * perf_event_open(2) for an event of a CPU, which counts from then on. A STEP is
 *	read            read(2) the count
 *	close           close(2)
 *	write=PATH=TEXT write(2) to a file, such as `unbind` of a driver
 * The report has errno and count of each; the first result is that of perf_event_open. The count is
 * 0 unless a step is `read`. After a failed perf_event_open, no step follows.
 *
 * Exit status: see report.h.
 */
#include "report.h"

#include <linux/perf_event.h>
#include <sys/syscall.h>

const char tool_name[] = "nd_pmu";
const char usage_text[] = "usage: nd_pmu TYPE EVENT CPU STEP...\n"
			  "  STEP: read, close, or write=PATH=TEXT\n";

static void report_result(int result, uint64_t count)
{
	report_open(NULL, '[');
	report_number(NULL, result < 0 ? errno : 0);
	report_number(NULL, count);
	report_close(']');
}

static bool is_step(const char *word)
{
	return !strcmp(word, "read") || !strcmp(word, "close") ||
	       (!strncmp(word, "write=", 6) && strchr(word + 6, '='));
}

static int write_file(char *words)
{
	char *text = strchr(words, '=');
	int file, result;

	*text++ = 0;
	file = open(words, O_WRONLY | O_CLOEXEC);
	if (file < 0)
		return -1;
	result = write(file, text, strlen(text)) < 0 ? -1 : 0;
	close(file);
	return result;
}

int main(int argc, char **argv)
{
	struct perf_event_attr attributes = { .size = sizeof(attributes) };
	int event, cpu;

	if (argc < 4)
		usage("expected TYPE, EVENT and CPU", NULL);
	for (int i = 4; i < argc; i++)
		if (!is_step(argv[i]))
			usage("unknown STEP", argv[i]);
	attributes.type = parse_number("TYPE", argv[1], 0, UINT32_MAX);
	attributes.config = parse_number("EVENT", argv[2], 0, UINT64_MAX);
	cpu = parse_number("CPU", argv[3], 0, INT32_MAX);
	report_begin();
	report_open("results", '[');
	event = syscall(SYS_perf_event_open, &attributes, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC);
	report_result(event, 0);
	for (int i = 4; event >= 0 && i < argc; i++) {
		uint64_t count = 0;
		int result;

		if (!strcmp(argv[i], "read"))
			result = read(event, &count, sizeof(count)) == sizeof(count) ? 0 : -1;
		else if (!strcmp(argv[i], "close"))
			result = close(event);
		else
			result = write_file(argv[i] + 6);
		report_result(result, count);
	}
	report_close(']');
	report_end();
	return EXIT_FINE;
}
