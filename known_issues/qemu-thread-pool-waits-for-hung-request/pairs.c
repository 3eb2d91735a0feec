// SPDX-License-Identifier: GPL-2.0-or-later
/* Begin pairs of flushes, and count those that take as long as two flushes. */
#include "../bare.h"

void run(void)
{
	int i, slow = 0;

	for (i = 0; i < 50; i++) {
		u64 one, two, start = timebase();

		end_flush(0, begin_flush(0));
		start = timebase();
		one = begin_flush(0);
		two = begin_flush(0);
		end_flush(0, one);
		end_flush(0, two);
		slow += timebase() - start > 180 * TICKS_PER_MS;
	}
	print("one after the other: ");
	print_number(slow);
	print(" of 50\n");
}
