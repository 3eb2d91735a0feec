// SPDX-License-Identifier: GPL-2.0-or-later
/* Store to two DIMMs, and read both again after the migration. */
#include "../bare.h"

void run(void)
{
	volatile u64 *first = bind(0), *second = bind(1);

	*first = 0x1111;
	*second = 0x2222;
	print("ready\n");
	wait_ms(3000);
	print("DIMM 0 has ");
	print_hex(*first);
	print(", DIMM 1 has ");
	print_hex(*second);
	print("\n");
}
