// SPDX-License-Identifier: GPL-2.0-or-later
/* Write eight bytes to the label area. */
#include "../bare.h"

void run(void)
{
	print_status("H_SCM_WRITE_METADATA",
		     hcall(H_SCM_WRITE_METADATA, DRC(0), 0, 0x0123456789abcdef, 8));
}
