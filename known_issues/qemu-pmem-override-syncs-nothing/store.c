// SPDX-License-Identifier: GPL-2.0-or-later
/* Store to the DIMM in slot 0, and flush it. */
#include "../bare.h"

void run(void)
{
	*bind(0) = 0x53544f5245440000; /* "STORED" */
	print_status("H_SCM_FLUSH", end_flush(0, begin_flush(0)));
}
