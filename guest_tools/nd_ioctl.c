// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nd_ioctl - ioctls of libnvdimm's character devices, /dev/nmemN and /dev/ndctlN.
 *
 * nd_ioctl run [--read-only] [--sealed] DEVICE < STEPS
 *   Each line of stdin is one step, two words:
 *     size|get|set|call BYTES   the ioctl ND_IOCTL_GET_CONFIG_SIZE, _GET_CONFIG_DATA,
 *                               _SET_CONFIG_DATA or _CALL with a buffer of that content
 *     NUMBER BYTES              the ioctl of that number
 *     read PATH                 read a file, such as one in sysfs; up to 4 KiB
 *   BYTES is hexadecimal; HEX*N repeats, and + joins parts: 00ff+a5*64. "-" is an empty buffer. No
 *   memory follows the buffer, so an access beyond it fails with EFAULT. With --sealed the kernel
 *   can read the buffer, and cannot write to it.
 *
 *   For each step the report has errno or 0, and the buffer's content after the call; null: it is
 *   unchanged.
 *
 * nd_ioctl race --most=ROUNDS DEVICE SMALL LARGE
 *   Write LARGE bytes of 0x5a at offset 0 of the label area, and then write again, while another
 *   thread changes in_length between SMALL and LARGE. After each round the LARGE bytes are read.
 *   The rounds end at the first byte that is not 0x5a; the report has the number of rounds, the
 *   number of writes that succeeded, and those bytes, if there are any. Before each write, a read
 *   of other bytes fills memory of the kernel that it may use again without clearing it.
 *
 * Exit status: see report.h.
 */
#include "report.h"

#include <linux/ndctl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* The header moved from asm/ to linux/ in Linux 6.10; only POWER hosts have the first one. */
#if __has_include(<linux/papr_pdsm.h>)
#include <linux/papr_pdsm.h>
#define HAVE_PDSM
#elif __has_include(<asm/papr_pdsm.h>)
#include <asm/papr_pdsm.h>
#define HAVE_PDSM
#endif

/* The layout of paprscm/driver/dimm_commands.py, as the headers have it. */
#define AT(type, field, offset) \
	_Static_assert(offsetof(struct type, field) == (offset), #type "." #field)
AT(nd_cmd_get_config_size, config_size, 4);
AT(nd_cmd_get_config_size, max_xfer, 8);
AT(nd_cmd_get_config_data_hdr, status, 8);
AT(nd_cmd_get_config_data_hdr, out_buf, 12);
AT(nd_cmd_set_config_hdr, in_length, 4);
AT(nd_cmd_set_config_hdr, in_buf, 8);
AT(nd_cmd_pkg, nd_command, 8);
AT(nd_cmd_pkg, nd_size_in, 16);
AT(nd_cmd_pkg, nd_size_out, 20);
AT(nd_cmd_pkg, nd_reserved2, 24);
AT(nd_cmd_pkg, nd_fw_size, 60);
AT(nd_cmd_pkg, nd_payload, 64);
_Static_assert(NVDIMM_FAMILY_PAPR == 5, "family");
_Static_assert(ND_CMD_CALL == 10, "the last command");
#ifdef HAVE_PDSM
AT(nd_pkg_pdsm, reserved, 4);
AT(nd_pkg_pdsm, payload, 8);
AT(nd_papr_pdsm_health, dimm_unarmed, 4);
AT(nd_papr_pdsm_health, dimm_encrypted, 9);
AT(nd_papr_pdsm_health, dimm_health, 10);
AT(nd_papr_pdsm_health, dimm_dsc, 16);
AT(nd_papr_pdsm_smart_inject, fatal_enable, 4);
AT(nd_papr_pdsm_smart_inject, unsafe_shutdown_enable, 5);
_Static_assert(sizeof(struct nd_pkg_pdsm) == 192, "header and payload");
_Static_assert(PAPR_PDSM_HEALTH == 1 && PAPR_PDSM_SMART_INJECT == 2, "commands");
#endif

/* The largest buffer, of a multiple of every page size. */
#define ROOM (8U << 20)
#define READ_BYTES 4096
#define PATTERN 0x5a
#define OTHER 0x33
#define OTHER_OFFSET 1024
#define MOST_RACED 128

static const struct option options[] = {
	FLAG("read-only", 'r'),
	FLAG("sealed", 's'),
	OPTION("most", 'm'),
	END_OF_OPTIONS,
};

static const struct {
	const char *name;
	unsigned long request;
} requests[] = {
	{ "size", ND_IOCTL_GET_CONFIG_SIZE },
	{ "get", ND_IOCTL_GET_CONFIG_DATA },
	{ "set", ND_IOCTL_SET_CONFIG_DATA },
	{ "call", ND_IOCTL_CALL },
};

static int fd;
/* The end of the memory before an inaccessible page, and a copy of its content. */
static unsigned char *end, *copy_end;

const char tool_name[] = "nd_ioctl";
const char usage_text[] = "usage: nd_ioctl run [--read-only] [--sealed] DEVICE < STEPS\n"
			  "       nd_ioctl race --most=ROUNDS DEVICE SMALL LARGE\n";

/* Memory, and behind it a page without access; return the end of the memory. */
static unsigned char *bounded(void)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	unsigned char *begin =
		mmap(NULL, ROOM + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (begin == MAP_FAILED || mprotect(begin + ROOM, page, PROT_NONE))
		fail("memory");
	return begin + ROOM;
}

static unsigned int hex_digit(char digit)
{
	const char digits[] = "0123456789abcdef";
	const char *place = digit ? strchr(digits, digit) : NULL;

	if (!place)
		usage("expected hexadecimal bytes in a step", NULL);
	return (unsigned int)(place - digits);
}

/* Decode BYTES to the begin of the memory; return the number of bytes. */
static size_t decode(const char *text, unsigned char *begin)
{
	size_t size = 0;

	if (!strcmp(text, "-"))
		return 0;
	while (*text) {
		size_t part = size, length;
		uint64_t count = 1;
		char *after;

		for (; *text && *text != '*' && *text != '+'; text += 2) {
			if (size == ROOM)
				usage("a step is too long", NULL);
			begin[size++] =
				(unsigned char)(hex_digit(text[0]) << 4 | hex_digit(text[1]));
		}
		length = size - part;
		if (*text == '*') {
			count = strtoull(text + 1, &after, 10);
			text = after;
			if (!count || !length || count > (ROOM - part) / length)
				usage("wrong number of repetitions in a step", NULL);
		}
		for (; count > 1; count--, size += length)
			memcpy(begin + size, begin + part, length);
		if (*text == '+')
			text++;
		else if (*text)
			usage("expected + or the end of a step", text);
	}
	return size;
}

static void report_bytes(const unsigned char *bytes, size_t size)
{
	const char digits[] = "0123456789abcdef";

	report_key(NULL);
	putchar('"');
	for (size_t i = 0; i < size; i++) {
		putchar(digits[bytes[i] >> 4]);
		putchar(digits[bytes[i] & 15]);
	}
	putchar('"');
}

static void step_ioctl(unsigned long request, const char *bytes, bool sealed)
{
	size_t size = decode(bytes, end - ROOM);
	unsigned char *buffer = end - size, *before = copy_end - size;
	int error;

	memmove(buffer, end - ROOM, size);
	memcpy(before, buffer, size);
	if (sealed && mprotect(end - ROOM, ROOM, PROT_READ))
		fail("mprotect");
	error = ioctl(fd, request, buffer) < 0 ? errno : 0;
	if (sealed && mprotect(end - ROOM, ROOM, PROT_READ | PROT_WRITE))
		fail("mprotect");
	report_number(NULL, (uint64_t)error);
	if (memcmp(before, buffer, size))
		report_bytes(buffer, size);
	else
		report_null(NULL);
}

static void step_read(const char *path)
{
	unsigned char text[READ_BYTES];
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = file < 0 ? -1 : read(file, text, sizeof(text));

	report_number(NULL, size < 0 ? (uint64_t)errno : 0);
	if (size < 0)
		report_null(NULL);
	else
		report_bytes(text, (size_t)size);
	if (file >= 0)
		close(file);
}

static void run_step(char *line, bool sealed)
{
	char *words = strchr(line, ' ');

	if (!words)
		usage("expected two words in a step", line);
	*words++ = 0;
	report_open(NULL, '[');
	if (!strcmp(line, "read")) {
		step_read(words);
	} else {
		unsigned long request = 0;

		for (size_t i = 0; i < LENGTH(requests); i++)
			if (!strcmp(line, requests[i].name))
				request = requests[i].request;
		if (!request)
			request = parse_number("request", line, 0, UINT32_MAX);
		step_ioctl(request, words, sealed);
	}
	report_close(']');
}

static void run(bool sealed)
{
	char *line = NULL;
	size_t room = 0;
	ssize_t length;

	report_begin();
	report_string("verb", "run");
	report_open("results", '[');
	while ((length = getline(&line, &room, stdin)) > 0) {
		if (line[length - 1] == '\n')
			line[length - 1] = 0;
		run_step(line, sealed);
	}
	if (ferror(stdin))
		fail("stdin");
	report_close(']');
	report_end();
	free(line);
}

/* --- race ------------------------------------------------------------------------------------ */

static union {
	struct nd_cmd_set_config_hdr header;
	uint32_t words[128];
} set;
static union {
	struct nd_cmd_get_config_data_hdr header;
	unsigned char bytes[512];
} get;
static uint32_t small, large;
static atomic_bool ended;

static void *alternate(void *nothing)
{
	volatile uint32_t *length = &set.words[1]; /* in_length */

	while (!ended) {
		*length = small;
		*length = large;
	}
	return nothing;
}

static void write_label(uint32_t offset, int byte)
{
	memset(&set, byte, sizeof(set));
	set.header.in_offset = offset;
	set.header.in_length = large;
	if (ioctl(fd, ND_IOCTL_SET_CONFIG_DATA, &set))
		fail("ND_IOCTL_SET_CONFIG_DATA");
}

/* True if LARGE bytes of the label area have this value. */
static bool has_label(uint32_t offset, int byte)
{
	get.header.in_offset = offset;
	get.header.in_length = large;
	if (ioctl(fd, ND_IOCTL_GET_CONFIG_DATA, &get))
		fail("ND_IOCTL_GET_CONFIG_DATA");
	for (uint32_t i = 0; i < large; i++)
		if (get.header.out_buf[i] != byte)
			return false;
	return true;
}

static void race(uint64_t most)
{
	uint64_t round = 0, succeeded = 0;
	pthread_t thread;
	bool same = true;

	write_label(OTHER_OFFSET, OTHER);
	write_label(0, PATTERN);
	if (!has_label(0, PATTERN))
		fail("the label area does not hold what was written");
	errno = pthread_create(&thread, NULL, alternate, NULL);
	if (errno)
		fail("pthread_create");
	for (; round < most && same; round++) {
		if (!has_label(OTHER_OFFSET, OTHER))
			fail("other bytes of the label area have changed");
		/* Where the status is depends on the length, so it may have replaced data. */
		memset(set.header.in_buf, PATTERN, sizeof(set) - sizeof(set.header));
		succeeded += !ioctl(fd, ND_IOCTL_SET_CONFIG_DATA, &set);
		same = has_label(0, PATTERN);
	}
	ended = true;
	pthread_join(thread, NULL);
	report_begin();
	report_string("verb", "race");
	report_number("rounds", round);
	report_number("succeeded", succeeded);
	report_open("foreign", '[');
	if (!same)
		report_bytes(get.header.out_buf, large);
	report_close(']');
	report_end();
}

int main(int argc, char **argv)
{
	bool is_race = parse_verb(argc, argv, "run", "race");
	bool read_only = false, sealed = false;
	uint64_t most = 0;
	int option;

	while ((option = next_option(argc, argv, options)) != -1) {
		switch (option) {
		case 'r':
			read_only = true;
			break;
		case 's':
			sealed = true;
			break;
		case 'm':
			most = parse_number("--most", optarg, 1, 1000000);
			break;
		}
	}
	if (argc - optind != (is_race ? 3 : 1) || is_race != (most > 0))
		usage("wrong number of arguments", NULL);
	if (is_race) {
		small = (uint32_t)parse_number("SMALL", argv[optind + 1], 1, MOST_RACED);
		large = (uint32_t)parse_number("LARGE", argv[optind + 2], 1, MOST_RACED);
	}
	end = bounded();
	copy_end = bounded();
	fd = open(argv[optind], (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	if (fd < 0)
		fail(argv[optind]);
	if (is_race)
		race(most);
	else
		run(sealed);
	return EXIT_FINE;
}
