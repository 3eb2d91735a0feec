// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * fail_nth - repeat one call; in round n, the call's n-th allocation fails.
 *
 * fail_nth [--most=N] [--undo=PATH=TEXT]... write PATH TEXT
 * fail_nth [--most=N] read PATH
 * fail_nth [--most=N] health|label /dev/nmemN
 * fail_nth [--most=N] pwrite|fsync DISK
 *   Round n makes the call once, and the kernel fails the thread's n-th request that passes the
 *   fault attributes in debugfs (Documentation/fault-injection, /proc/thread-self/fail-nth). The
 *   rounds end with the first one without a failure. A call that succeeds, except the last one, is
 *   undone by writing each TEXT to its PATH.
 *     write   to a sysfs file, such as a driver's bind
 *     read    from a sysfs file
 *     health  get the health of a DIMM: ND_CMD_CALL with PAPR_PDSM_HEALTH
 *     label   rewrite the first bytes of a DIMM's label area unchanged: ND_CMD_SET_CONFIG_DATA
 *     pwrite  write 4 KiB at offset 0 with O_DIRECT
 *     fsync   of a disk
 *
 * For each round the report has its number, whether a request failed in the kernel, the call's
 * errno or 0, and its duration, us. Exit status 1: the rounds did not end, or the last call failed.
 * See report.h for the others.
 */
#include "report.h"

#include <linux/ndctl.h>
#include <sys/ioctl.h>

/* include/uapi/linux/papr_pdsm.h, which only POWER hosts have in their header packages. */
#define FAMILY_PAPR 5
#define PDSM_HEALTH 1
#define PDSM_HEADER_BYTES 8
#define PDSM_PAYLOAD_BYTES 184

#define BLOCK 4096
#define LABEL_BYTES 16
#define MOST_ROUNDS 5000
#define MOST_UNDOS 4

static const struct option options[] = {
	OPTION("most", 'm'),
	OPTION("undo", 'u'),
	END_OF_OPTIONS,
};

static const char *path, *text;
static struct {
	const char *path, *text;
} undos[MOST_UNDOS];
static unsigned int undo_count;
static unsigned int most = 1000;
static int fd, nth_fd;
static char *block;

static union {
	struct {
		struct nd_cmd_pkg package;
		unsigned char payload[PDSM_HEADER_BYTES * 2 + PDSM_PAYLOAD_BYTES];
	} health;
	struct nd_cmd_get_config_data_hdr get;
	struct nd_cmd_set_config_hdr set;
	unsigned char bytes[512];
} command;
static unsigned char label[LABEL_BYTES];

const char tool_name[] = "fail_nth";
const char usage_text[] = "usage: fail_nth [--most=N] [--undo=PATH=TEXT]... write PATH TEXT\n"
			  "       fail_nth [--most=N] read|health|label|pwrite|fsync PATH\n";

static bool call_write(void)
{
	return write(fd, text, strlen(text)) == (ssize_t)strlen(text);
}

static bool call_read(void)
{
	return pread(fd, block, BLOCK, 0) >= 0;
}

static void prepare_health(void)
{
	memset(&command, 0, sizeof(command));
	command.health.package.nd_family = FAMILY_PAPR;
	command.health.package.nd_command = PDSM_HEALTH;
	command.health.package.nd_size_in = PDSM_HEADER_BYTES;
	command.health.package.nd_size_out = PDSM_HEADER_BYTES + PDSM_PAYLOAD_BYTES;
}

static bool call_health(void)
{
	return !ioctl(fd, ND_IOCTL_CALL, &command);
}

/* Read the label's bytes once; each round writes them back. */
static void read_label(void)
{
	memset(&command, 0, sizeof(command));
	command.get.in_length = LABEL_BYTES;
	if (ioctl(fd, ND_IOCTL_GET_CONFIG_DATA, &command) || command.get.status)
		fail("label area");
	memcpy(label, command.get.out_buf, LABEL_BYTES);
}

static void prepare_label(void)
{
	memset(&command, 0, sizeof(command));
	command.set.in_length = LABEL_BYTES;
	memcpy(command.set.in_buf, label, LABEL_BYTES);
}

static bool call_label(void)
{
	return !ioctl(fd, ND_IOCTL_SET_CONFIG_DATA, &command);
}

static bool call_pwrite(void)
{
	return pwrite(fd, block, BLOCK, 0) == BLOCK;
}

static bool call_fsync(void)
{
	return !fsync(fd);
}

static const struct operation {
	const char *name;
	int flags;
	void (*begin)(void);   /* once */
	void (*prepare)(void); /* each time */
	bool (*call)(void);
} operations[] = {
	{ "write", O_WRONLY, NULL, NULL, call_write },
	{ "read", O_RDONLY, NULL, NULL, call_read },
	{ "health", O_RDWR, NULL, prepare_health, call_health },
	{ "label", O_RDWR, read_label, prepare_label, call_label },
	{ "pwrite", O_RDWR | O_DIRECT, NULL, NULL, call_pwrite },
	{ "fsync", O_RDWR, NULL, NULL, call_fsync },
};

static void set_nth(unsigned int n)
{
	char number[16];
	int length = snprintf(number, sizeof(number), "%u", n);

	if (pwrite(nth_fd, number, (size_t)length, 0) != length)
		fail("fail-nth");
}

/* True if the n-th request existed: then the counter is 0. */
static bool has_failed(void)
{
	char number[16];
	ssize_t length = pread(nth_fd, number, sizeof(number) - 1, 0);

	if (length <= 0)
		fail("fail-nth");
	number[length] = 0;
	return !strtoul(number, NULL, 10);
}

static void undo(const char *where, const char *what)
{
	int other = open(where, O_WRONLY);

	if (other < 0 || write(other, what, strlen(what)) != (ssize_t)strlen(what))
		fail(where);
	close(other);
}

static void parse(int argc, char **argv)
{
	int option;

	while ((option = next_option(argc, argv, options)) != -1) {
		char *equals;

		switch (option) {
		case 'm':
			most = (unsigned int)parse_number("--most", optarg, 1, MOST_ROUNDS);
			break;
		case 'u':
			equals = strrchr(optarg, '=');
			if (!equals || undo_count == MOST_UNDOS)
				usage("expected --undo=PATH=TEXT, four times at most", optarg);
			*equals = 0;
			undos[undo_count].path = optarg;
			undos[undo_count++].text = equals + 1;
			break;
		}
	}
}

int main(int argc, char **argv)
{
	const struct operation *operation = NULL;
	unsigned int n, injected = 0;
	bool works = false, ended = false;

	parse(argc, argv);
	for (size_t i = 0; optind < argc && i < LENGTH(operations); i++)
		if (!strcmp(argv[optind], operations[i].name))
			operation = &operations[i];
	if (!operation)
		usage("unknown operation", argv[optind]);
	if (argc - optind != (operation->call == call_write ? 3 : 2))
		usage("wrong number of arguments", NULL);
	path = argv[optind + 1];
	text = argv[optind + 2];
	errno = posix_memalign((void **)&block, 65536, BLOCK);
	if (errno)
		fail("memory");
	memset(block, 0x5a, BLOCK);
	nth_fd = open("/proc/thread-self/fail-nth", O_RDWR);
	if (nth_fd < 0)
		fail("/proc/thread-self/fail-nth");
	report_begin();
	report_string("operation", operation->name);
	report_open("rounds", '[');
	for (n = 1; n <= most && !ended; n++) {
		uint64_t begin_ns, duration_ns;
		int error;

		fd = open(path, operation->flags | O_CLOEXEC);
		if (fd < 0)
			fail(path);
		if (n == 1 && operation->begin)
			operation->begin();
		if (operation->prepare)
			operation->prepare();
		begin_ns = now_ns();
		set_nth(n);
		errno = 0;
		works = operation->call();
		error = works ? 0 : errno;
		duration_ns = now_ns() - begin_ns;
		ended = !has_failed();
		set_nth(0);
		injected += !ended;
		report_open(NULL, '[');
		report_number(NULL, n);
		report_bool(NULL, !ended);
		report_number(NULL, (uint64_t)error);
		report_number(NULL, duration_ns / 1000);
		report_close(']');
		close(fd);
		for (unsigned int i = 0; works && !ended && i < undo_count; i++)
			undo(undos[i].path, undos[i].text);
	}
	report_close(']');
	report_number("injected", injected);
	report_bool("ended", ended);
	report_end();
	return ended && works ? EXIT_FINE : EXIT_WRONG;
}
