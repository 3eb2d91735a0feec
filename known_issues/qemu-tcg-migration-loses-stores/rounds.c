// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Store the number of the round to one word of each page, for 10 s. Before each store, the word must have
 * the number of the last round; the machine is migrated meanwhile.
 */
#include "../bare.h"

#define PAGES 64
#define PAGE_WORDS 512

void run(void)
{
	volatile u64 *memory = (u64 *)(128UL << 20);
	u64 round = 0, start = timebase(), value;
	int page;

	print("ready\n");
	do {
		for (page = 0; page < PAGES; page++) {
			value = memory[page * PAGE_WORDS];
			if (value != round) {
				print("lost: page ");
				print_number(page);
				print(" has round ");
				print_number(value);
				print(" instead of ");
				print_number(round);
				print("\n");
				return;
			}
			memory[page * PAGE_WORDS] = round + 1;
		}
		round++;
	} while (timebase() - start < 10000 * TICKS_PER_MS);
	print("nothing lost in ");
	print_number(round);
	print(" rounds\n");
}
