// SPDX-License-Identifier: GPL-2.0-or-later
/* Write the first byte of the label area. */
#include "../bare.h"

void run(void)
{
	print_status("H_SCM_WRITE_METADATA", hcall(H_SCM_WRITE_METADATA, DRC(0), 0, 1, 1));
}
