// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Let the decrementers of two CPUs expire in 3 s, the second of which cedes meanwhile. The machine is
 * saved before that.
 */
#include "../bare.h"

#define RTAS_START_CPU 0x2006

/* Each CPU has the address of its flag in SPRG2. H_CEDE enables interrupts, and returns after one. */
asm("second:\n"
    "	li 3, 0x9f4\n"
    "	mtsprg 2, 3\n"
    "	lis 3, 0x5b8e\n" /* 3 s */
    "	mtdec 3\n"
    "1:	li 3, 0xe0\n"
    "	sc 1\n"
    "	b 1b\n"
    /* Set the flag, and the decrementer to its largest value. */
    "handler:\n"
    "	mtsprg 0, 3\n"
    "	mtsprg 1, 4\n"
    "	mfsprg 4, 2\n"
    "	li 3, 1\n"
    "	stw 3, 0(4)\n"
    "	lis 3, 0x7fff\n"
    "	mtdec 3\n"
    "	mfsprg 3, 0\n"
    "	mfsprg 4, 1\n"
    "	rfid\n");

extern unsigned int second[], handler[];

void run(void)
{
	static unsigned int call[16] = { RTAS_START_CPU, 3, 1, 1 };
	volatile unsigned int *vector = (unsigned int *)0x900, *flag = (unsigned int *)0x9f0;
	u64 start = timebase(), msr;
	int i;

	for (i = 0; i < 10; i++)
		vector[i] = handler[i];
	flag[0] = flag[1] = 0;
	call[4] = (u64)second;
	hcall(H_RTAS, (u64)call, 0, 0, 0);
	asm volatile("mtsprg 2, %0" : : "r"(flag));
	asm volatile("mtdec %0" : : "r"(3000 * TICKS_PER_MS));
	asm volatile("mfmsr %0; ori %0, %0, 0x8000; mtmsrd %0, 1" : "=r"(msr) : : "memory");
	print("ready\n");
	while (!(flag[0] && flag[1]) && timebase() - start < 8000 * TICKS_PER_MS)
		;
	print("interrupts: ");
	print_number(flag[0]);
	print(", ");
	print_number(flag[1]);
	print("\n");
}
