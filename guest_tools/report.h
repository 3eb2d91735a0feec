/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * report.h - command line, errors, time, random numbers and report of the guest tools.
 *
 * Each tool includes it first and defines tool_name and usage_text. paprscm/guest/tools.py sends a
 * tool to the guest as one file, with this header in place of the #include.
 *
 * A report is one line of JSON on stdout that begins with "tool" and "version"; nothing in it is a
 * fraction. A report_*() function adds one value: to an object with its key, to a list with NULL.
 *
 * Exit status of every tool:
 *   1  the tool ran, and its report (or stderr) describes a failure
 *   2  wrong command line; nothing was tried, stdout is empty
 *   2  wrong command line; nothing was tried, stdout is empty
 *   4  a step of the tool itself failed; stderr names it
 *   5  the report could not be written
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_FINE, EXIT_WRONG, EXIT_USAGE, EXIT_FAILED = 4, EXIT_NO_REPORT };

#define CACHE_LINE 64
#define NS_PER_S UINT64_C(1000000000)
#define OPTION(name, letter) { name, required_argument, NULL, letter }
#define FLAG(name, letter) { name, no_argument, NULL, letter }
#define END_OF_OPTIONS { NULL, 0, NULL, 0 }
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* Each tool uses only some of these; inlined, they would make gcc in the guest a third slower. */
#define SHARED static __attribute__((unused, noinline))

extern const char tool_name[], usage_text[];

/* --- errors and the command line ------------------------------------------------------------- */

SHARED const char *errno_name(int number)
{
	const char *name = strerrorname_np(number);

	return name ? name : "unknown";
}

SHARED void print_error(const char *stage)
{
	fprintf(stderr, "%s: %s: %d %s\n", tool_name, stage, errno, errno_name(errno));
}

SHARED void __attribute__((noreturn)) fail(const char *stage)
{
	print_error(stage);
	exit(EXIT_FAILED);
}

SHARED void __attribute__((noreturn)) usage(const char *what, const char *detail)
{
	fprintf(stderr, "%s: %s%s%s\n%s", tool_name, what, detail ? ": " : "", detail ? detail : "",
		usage_text);
	exit(EXIT_USAGE);
}

SHARED uint64_t parse_number(const char *option, const char *text, uint64_t least, uint64_t most)
{
	unsigned long long value;
	char *end;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (*text < '0' || *text > '9' || *end || errno || value < least || value > most)
		usage(option, text);
	return value;
}

SHARED bool parse_switch(const char *option, const char *text)
{
	if (strcmp(text, "on") && strcmp(text, "off"))
		usage(option, text);
	return !strcmp(text, "on");
}

/* True for the second of a tool's two verbs; options follow the verb. */
SHARED bool parse_verb(int argc, char **argv, const char *first, const char *second)
{
	const char *verb = argc > 1 ? argv[1] : NULL;

	if (!verb || (strcmp(verb, first) && strcmp(verb, second)))
		usage("unknown verb", verb);
	optind = 2;
	return !strcmp(verb, second);
}

/* The next option's letter, or -1 after the last; options come before all other words. */
SHARED int next_option(int argc, char **argv, const struct option *options)
{
	int letter;

	opterr = 0;
	letter = getopt_long(argc, argv, "+", options, NULL);
	if (letter == '?')
		usage("unknown option, or its value is missing", argv[optind - 1]);
	return letter;
}

/* --- time and random numbers ----------------------------------------------------------------- */

static inline uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static inline uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

#define GOLDEN UINT64_C(0x9e3779b97f4a7c15)

static inline uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

/* splitmix64: a number below `limit`. */
static inline uint64_t draw_below(uint64_t *state, uint64_t limit)
{
	*state += GOLDEN;
	return mix(*state) % limit;
}

/* --- files ----------------------------------------------------------------------------------- */

#define TMPFS 0x01021994 /* TMPFS_MAGIC of linux/magic.h */

/* Open a file or disk for I/O that pins the user's pages. tmpfs copies, even with O_DIRECT. */
SHARED int open_direct(const char *path)
{
	struct statfs fs;
	int fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0600);
	struct stat status;

	if (fd < 0 || fstatfs(fd, &fs) || fstat(fd, &status))
		fail(path);
	if (!S_ISBLK(status.st_mode) && fs.f_type == TMPFS) {
		errno = EOPNOTSUPP;
		fail("O_DIRECT on tmpfs");
	}
	return fd;
}

/* --- the kernel's messages -------------------------------------------------------------------- */

/* Open the kernel's log behind its last message. */
SHARED int open_log(void)
{
	int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (log < 0 || lseek(log, 0, SEEK_END) < 0)
		fail("/dev/kmsg");
	return log;
}

/*
 * The next message and its level, or NULL; valid until the next call. A record of /dev/kmsg is
 * "LEVEL,NUMBER,TIME,FLAGS;TEXT\n" and properties of the device. In TEXT, a byte that is not printable
 * is "\x0a" (Documentation/ABI/testing/dev-kmsg).
 */
SHARED const char *next_message(int log, int *level)
{
	static char record[8192 + 1];
	char *from, *to = record;
	unsigned int byte;
	ssize_t size = read(log, record, sizeof(record) - 1);

	/* EPIPE: messages were overwritten before they were read. */
	if (size < 0 && errno != EAGAIN)
		fail("/dev/kmsg");
	if (size <= 0)
		return NULL;
	record[size] = 0;
	*level = atoi(record);
	from = strchr(record, ';');
	for (from = from ? from + 1 : record; *from && *from != '\n'; to++)
		if (sscanf(from, "\\x%2x", &byte) == 1) {
			*to = byte;
			from += 4;
		} else {
			*to = *from++;
		}
	*to = 0;
	return record;
}

/* --- DAX ------------------------------------------------------------------------------------- */

/*
 * Flush the CPU's cache: on POWER, dcbf for each cache line and a sync. dcbstps would be enough and
 * cheaper, but TCG does not have it.
 */
static inline void flush_cache(const volatile void *data, size_t size)
{
	const volatile char *at = data;

	for (size_t offset = 0; offset < size; offset += CACHE_LINE) {
#if defined(__powerpc__)
		__asm__ volatile("dcbf 0,%0" : : "r"(at + offset) : "memory");
#elif defined(__x86_64__)
		__asm__ volatile("clflush (%0)" : : "r"(at + offset) : "memory");
#else
		(void)at;
#endif
	}
#if defined(__powerpc__)
	__asm__ volatile("sync" : : : "memory");
#else
	__sync_synchronize();
#endif
}

static inline bool is_dax(int fd)
{
	struct statx facts;

	return !statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &facts) &&
	       facts.stx_attributes_mask & facts.stx_attributes & STATX_ATTR_DAX;
}

/* --- the report ------------------------------------------------------------------------------ */

/* True if the innermost object or list already has a value. */
static bool report_needs_comma;

SHARED void report_key(const char *key)
{
	if (report_needs_comma)
		putchar(',');
	report_needs_comma = true;
	if (key)
		printf("\"%s\":", key);
}

SHARED void report_open(const char *key, char bracket)
{
	report_key(key);
	putchar(bracket);
	report_needs_comma = false;
}

SHARED void report_close(char bracket)
{
	putchar(bracket);
	report_needs_comma = true;
}

SHARED void report_number(const char *key, uint64_t value)
{
	report_key(key);
	printf("%" PRIu64, value);
}

SHARED void report_bool(const char *key, bool value)
{
	report_key(key);
	fputs(value ? "true" : "false", stdout);
}

SHARED void report_null(const char *key)
{
	report_key(key);
	fputs("null", stdout);
}

/* A number, or null. */
SHARED void report_number_if(bool there, const char *key, uint64_t value)
{
	if (there)
		report_number(key, value);
	else
		report_null(key);
}

/*
 * ASCII only: a byte above 0x7f, which may not be valid UTF-8, becomes \udcXX, as in Python's
 * "surrogateescape".
 */
SHARED void report_string(const char *key, const char *text)
{
	report_key(key);
	putchar('"');
	for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
		if (*c == '"' || *c == '\\')
			printf("\\%c", *c);
		else if (*c >= 0x80)
			printf("\\udc%02x", *c);
		else if (*c < 0x20 || *c == 0x7f)
			printf("\\u%04x", *c);
		else
			putchar(*c);
	}
	putchar('"');
}

SHARED void report_begin(void)
{
	report_open(NULL, '{');
	report_string("tool", tool_name);
	report_number("version", 1);
}

/* End a line; the tool may begin another one. */
SHARED void report_end(void)
{
	report_close('}');
	putchar('\n');
	report_needs_comma = false;
	if (fflush(stdout) || ferror(stdout)) {
		print_error("cannot write the report");
		exit(EXIT_NO_REPORT);
	}
}
