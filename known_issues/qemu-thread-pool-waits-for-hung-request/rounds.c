// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * In round n, the pool has n idle workers, and n + 1 flushes of 1 s each begin at once. Count the
 * rounds in which one of them has not ended after 1.7 s.
 */
#include "../bare.h"

#define ROUNDS 8

void run(void)
{
	static u64 token[ROUNDS + 1];
	int n, i, late, rounds = 0;

	for (n = 0; n < ROUNDS; n++) {
		for (i = 0; i <= n; i++)
			token[i] = begin_flush(0);
		/* Without hypervisor calls, which would keep the main loop from its lock. */
		wait_ms(1700);
		late = 0;
		for (i = 0; i <= n; i++)
			late += is_busy(hcall(H_SCM_FLUSH, DRC(0), token[i], 0, 0));
		rounds += late != 0;
		wait_ms(500);
	}
	print("late: ");
	print_number(rounds);
	print("\n");
}
