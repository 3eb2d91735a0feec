// SPDX-License-Identifier: GPL-2.0-or-later
/* Store to 16 MiB of the DIMM. */
#include "../bare.h"

void run(void)
{
	volatile u64 *dimm = bind(0);
	u64 i;

	for (i = 0; i < 16 << 20; i += 4096) {
		dimm[i / 8] = 1;
		if (i % (1 << 20) == (1 << 20) - 4096)
			print("stored 1 MiB\n");
	}
}
