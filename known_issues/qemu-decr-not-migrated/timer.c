// SPDX-License-Identifier: GPL-2.0-or-later
/* Set the decrementer to 3 s, and wait 8 s for its interrupt; the machine is saved meanwhile. */
#include "../bare.h"

/* Note the interrupt at 0x9f0, and set the decrementer to its largest value. */
asm("handler:\n"
    "	mtsprg 0, 3\n"
    "	li 3, 1\n"
    "	stw 3, 0x9f0(0)\n"
    "	lis 3, 0x7fff\n"
    "	mtdec 3\n"
    "	mfsprg 3, 0\n"
    "	rfid\n");

extern unsigned int handler[];

void run(void)
{
	volatile unsigned int *vector = (unsigned int *)0x900, *seen = (unsigned int *)0x9f0;
	u64 start, msr;
	int i;

	for (i = 0; i < 7; i++)
		vector[i] = handler[i];
	*seen = 0;
	start = timebase();
	asm volatile("mtdec %0" : : "r"(3000 * TICKS_PER_MS));
	asm volatile("mfmsr %0; ori %0, %0, 0x8000; mtmsrd %0, 1" : "=r"(msr) : : "memory");
	print("ready\n");
	while (!*seen && timebase() - start < 8000 * TICKS_PER_MS)
		;
	print(*seen ? "interrupt\n" : "no interrupt\n");
}
