// SPDX-License-Identifier: GPL-2.0-or-later
/* Begin COUNT flushes, and wait for them. */
#include "../bare.h"

#ifndef COUNT
#define COUNT 64
#endif

void run(void)
{
	static u64 token[COUNT];
	int i;

	for (i = 0; i < COUNT; i++)
		token[i] = begin_flush(0);
	print("begun\n");
	for (i = 0; i < COUNT; i++)
		end_flush(0, token[i]);
}
