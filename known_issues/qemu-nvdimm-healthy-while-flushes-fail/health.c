// SPDX-License-Identifier: GPL-2.0-or-later
/* Flush the DIMM, and ask for its health. */
#include "../bare.h"

void run(void)
{
	print_status("H_SCM_FLUSH", end_flush(0, begin_flush(0)));
	print_status("H_SCM_HEALTH", hcall(H_SCM_HEALTH, DRC(0), 0, 0, 0));
}
