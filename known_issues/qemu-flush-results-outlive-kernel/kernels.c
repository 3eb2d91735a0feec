// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Do what kexec does, KERNELS times: a kernel binds the DIMM, begins a flush, and is replaced before it
 * has polled it. Every other flush has ended by then. Then count the tokens that QEMU still knows.
 */
#include "../bare.h"

#define KERNELS 100
#define H_P2 (-55)

void run(void)
{
	static u64 token[KERNELS];
	int i, kept = 0;

	for (i = 0; i < KERNELS; i++) {
		bind(0);
		token[i] = begin_flush(0);
		wait_ms(i % 2 * 20);
	}
	bind(0);
	print_status("H_SCM_FLUSH", end_flush(0, begin_flush(0)));
	for (i = 0; i < KERNELS; i++)
		kept += hcall(H_SCM_FLUSH, DRC(0), token[i], 0, 0) != H_P2;
	print("kept: ");
	print_number(kept);
	print("\n");
}
