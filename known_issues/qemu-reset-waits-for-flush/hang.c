// SPDX-License-Identifier: GPL-2.0-or-later
/* Begin a flush, once, and wait for a reset. */
#include "../bare.h"

void run(void)
{
	begin_flush(0);
	print("begun\n");
	for (;;)
		;
}
