// SPDX-License-Identifier: GPL-2.0-or-later
/* sector_size FILE SIZE: write a sector size into each used label of a label area, with a right
 * checksum. Formats: Linux drivers/nvdimm/label.h, UEFI 2.7 section 13.19; little-endian hosts only. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char area[1 << 20];

static uint64_t get(const char *place, unsigned int bytes)
{
	uint64_t value = 0;

	memcpy(&value, place, bytes);
	return value;
}

/* Linux drivers/nvdimm/core.c, nd_fletcher64(). */
static uint64_t fletcher64(const char *data, unsigned int bytes)
{
	uint32_t low = 0;
	uint64_t high = 0;

	for (unsigned int i = 0; i < bytes; i += 4) {
		low += get(data + i, 4);
		high += low;
	}
	return high << 32 | low;
}

int main(int argc, char **argv)
{
	FILE *file = argc == 3 ? fopen(argv[1], "r+") : NULL;
	uint64_t size = argc == 3 ? strtoull(argv[2], NULL, 0) : 0;
	const char *index = area;
	unsigned int changed = 0;

	if (!file || !fread(area, 1, sizeof(area), file))
		return perror("label area"), 1;
	/* The second index, if the first one is invalid or older. */
	const char *other = area + get(area + 40, 8);

	if (memcmp(index, "NAMESPACE_INDEX", 16) ||
	    get(other + 20, 4) == get(index + 20, 4) % 3 + 1)
		index = other;
	unsigned int bytes = 128 << get(index + 19, 1);

	for (unsigned int slot = 0; slot < get(index + 56, 4); slot++) {
		char *label = area + get(index + 48, 8) + slot * bytes;

		/* A bit of the bitmap is set for a free slot. */
		if (index[72 + slot / 8] >> slot % 8 & 1 || bytes != 256)
			continue;
		memcpy(label + 96, &size, 8);
		memset(label + 248, 0, 8);
		uint64_t sum = fletcher64(label, bytes);

		memcpy(label + 248, &sum, 8);
		changed++;
	}
	rewind(file);
	if (!fwrite(area, 1, sizeof(area), file) || fclose(file))
		return perror("label area"), 1;
	printf("%u labels have the sector size %s\n", changed, argv[2]);
	return !changed;
}
