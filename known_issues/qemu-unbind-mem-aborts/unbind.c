// SPDX-License-Identifier: GPL-2.0-or-later
/* Unbind two blocks of 256 MiB, the last of which would end beyond 2^64. */
#include "../bare.h"

#define BLOCK (256UL << 20)

void run(void)
{
	print_status("H_SCM_UNBIND_MEM", hcall(H_SCM_UNBIND_MEM, DRC(0), -BLOCK, 2, 0));
}
