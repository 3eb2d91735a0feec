// SPDX-License-Identifier: GPL-2.0-or-later
/* Begin a flush, and wait for it; the machine is saved meanwhile. */
#include "../bare.h"

void run(void)
{
	u64 token = begin_flush(0);

	print("pending\n");
	print_status("H_SCM_FLUSH", end_flush(0, token));
}
