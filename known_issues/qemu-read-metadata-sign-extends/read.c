// SPDX-License-Identifier: GPL-2.0-or-later
/* Write four bytes to the label area, and read them back. */
#include "../bare.h"

void run(void)
{
	print_status("H_SCM_WRITE_METADATA", hcall(H_SCM_WRITE_METADATA, DRC(0), 0, 0x80000001, 4));
	print_status("H_SCM_READ_METADATA", hcall(H_SCM_READ_METADATA, DRC(0), 0, 4, 0));
}
