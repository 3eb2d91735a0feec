// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * label FILE: give each label in a label area a sector size of 1000 bytes, and a right checksum.
 *
 * The offsets are those of struct nd_namespace_index and nd_namespace_label, version 1.2, in Linux
 * drivers/nvdimm/label.h.
 */
#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { LABEL = 256, SECTOR_SIZE = 96, RAW_SIZE = 112, CHECKSUM = 248 };

static unsigned char area[16 << 20];

static uint64_t get(size_t offset)
{
	uint64_t value;

	memcpy(&value, area + offset, sizeof(value));
	return le64toh(value);
}

static void put(size_t offset, uint64_t value)
{
	value = htole64(value);
	memcpy(area + offset, &value, sizeof(value));
}

static uint64_t fletcher64(size_t offset)
{
	uint32_t low = 0, word;
	uint64_t high = 0;

	for (size_t i = 0; i < LABEL; i += sizeof(word)) {
		memcpy(&word, area + offset + i, sizeof(word));
		low += le32toh(word);
		high += low;
	}
	return high << 32 | low;
}

int main(int argc, char **argv)
{
	FILE *file = argc == 2 ? fopen(argv[1], "r+b") : NULL;
	size_t size = file ? fread(area, 1, sizeof(area), file) : 0;
	size_t first = get(48);
	int labels = 0;

	if (memcmp(area, "NAMESPACE_INDEX", 16) || area[19] != 1) {
		fprintf(stderr, "no index of labels of version 1.2\n");
		return 2;
	}
	for (size_t label = first; label + LABEL <= size; label += LABEL) {
		uint64_t bytes = get(label + RAW_SIZE);

		/* An unused slot has zeros or ones. */
		if (!bytes || bytes == UINT64_MAX)
			continue;
		put(label + SECTOR_SIZE, 1000);
		put(label + CHECKSUM, 0);
		put(label + CHECKSUM, fletcher64(label));
		labels++;
	}
	rewind(file);
	if (!labels || fwrite(area, 1, size, file) != size || fclose(file)) {
		fprintf(stderr, "%d labels\n", labels);
		return 2;
	}
	return 0;
}
