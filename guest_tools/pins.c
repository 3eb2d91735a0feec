// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * pins - I/O between the pages of a mapping and a disk: the pages are pinned meanwhile.
 *
 * pins --count=N [--seed=N] [--memory=BYTES] DEVICE SCRATCH
 *   Maps the DAX device DEVICE as a whole, or with --memory anonymous memory (DEVICE is "memory"), and stores a pattern of its own into the first and the last 64 KiB and
 *   N pieces of 64 KiB between them, at multiples of 64 KiB. O_DIRECT writes each of them from the
 *   mapping to SCRATCH, which is compared; then O_DIRECT reads another pattern from SCRATCH into the
 *   same piece. At the end all pieces must have that pattern.
 *
 * Exit status 1: a piece has other contents, or I/O failed; see the report.
 */
#include "report.h"

#include <sys/mman.h>

#define PIECE 65536
#define WORDS (PIECE / sizeof(uint64_t))

static const struct option options[] = {
	OPTION("count", 'c'),
	OPTION("seed", 's'),
	OPTION("memory", 'm'),
	END_OF_OPTIONS,
};

const char tool_name[] = "pins";
const char usage_text[] = "usage: pins --count=N [--seed=N] [--memory=BYTES] DEVICE SCRATCH\n";

static void fill(uint64_t *words, uint64_t key)
{
	for (uint64_t i = 0; i < WORDS; i++)
		words[i] = mix(key + i);
}

static bool is_filled(const uint64_t *words, uint64_t key)
{
	for (uint64_t i = 0; i < WORDS; i++) {
		if (words[i] != mix(key + i))
			return false;
	}
	return true;
}

static uint64_t device_bytes(const char *path)
{
	char name[4096];
	unsigned long long size;
	FILE *file;

	snprintf(name, sizeof(name), "/sys/bus/dax/devices/%s/size", strrchr(path, '/') + 1);
	file = fopen(name, "r");
	if (!file || fscanf(file, "%llu", &size) != 1)
		fail(name);
	fclose(file);
	return size;
}

int main(int argc, char **argv)
{
	uint64_t count = 0, drawn = 1, size, memory = 0, failed_at = 0, pieces = 0;
	const char *failure = "";
	int option, device = -1, scratch, failed_errno = 0;
	uint64_t *buffer = NULL, *offsets;
	unsigned char *map;

	while ((option = next_option(argc, argv, options)) != -1) {
		switch (option) {
		case 'c':
			count = parse_number("--count", optarg, 1, 100000);
			break;
		case 's':
			drawn = parse_number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 'm':
			memory = parse_number("--memory", optarg, 1, UINT64_MAX) / PIECE * PIECE;
			break;
		}
	}
	if (optind != argc - 2 || !count || (argv[optind][0] == '/') != !memory)
		usage("expected --count, DEVICE or --memory, and SCRATCH", NULL);
	size = memory ? memory : device_bytes(argv[optind]);
	if (!memory) {
		device = open(argv[optind], O_RDWR);
		if (device < 0)
			fail(argv[optind]);
	}
	map = mmap(NULL, size, PROT_READ | PROT_WRITE,
		   memory ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE : MAP_SHARED, device, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	scratch = open_direct(argv[optind + 1]);
	errno = posix_memalign((void **)&buffer, PIECE, PIECE);
	offsets = calloc(count + 2, sizeof(*offsets));
	if (errno || !offsets)
		fail("memory");
	offsets[1] = size - PIECE;
	for (uint64_t i = 2; i < count + 2; i++)
		offsets[i] = PIECE * draw_below(&drawn, size / PIECE);
	for (uint64_t i = 0; i < count + 2 && !*failure; i++) {
		unsigned char *piece = map + offsets[i];

		failed_at = offsets[i];
		fill((uint64_t *)piece, ~offsets[i]);
		if (pwrite(scratch, piece, PIECE, 0) != PIECE) {
			failure = "O_DIRECT write from the mapping";
			failed_errno = errno;
			break;
		}
		if (pread(scratch, buffer, PIECE, 0) != PIECE)
			fail("pread of SCRATCH");
		if (!is_filled(buffer, ~offsets[i])) {
			failure = "the file has other contents than the mapping";
			break;
		}
		fill(buffer, offsets[i]);
		if (pwrite(scratch, buffer, PIECE, PIECE) != PIECE)
			fail("pwrite of SCRATCH");
		if (pread(scratch, piece, PIECE, PIECE) != PIECE) {
			failure = "O_DIRECT read into the mapping";
			failed_errno = errno;
		}
		pieces++;
	}
	for (uint64_t i = 0; i < pieces && !*failure; i++) {
		failed_at = offsets[i];
		if (!is_filled((uint64_t *)(map + offsets[i]), offsets[i]))
			failure = "the mapping has other contents than the file";
	}
	report_begin();
	report_number("size", size);
	report_number("pieces", pieces);
	report_string("failure", failure);
	report_number("at", failed_at);
	report_number("errno", (uint64_t)failed_errno);
	report_open("offsets", '[');
	for (uint64_t i = 0; i < pieces; i++)
		report_number(NULL, offsets[i]);
	report_close(']');
	report_end();
	return *failure ? EXIT_WRONG : EXIT_FINE;
}
