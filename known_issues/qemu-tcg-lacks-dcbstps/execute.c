// SPDX-License-Identifier: GPL-2.0-or-later
/* Execute instructions, and count program interrupts. */
#include "../bare.h"

/* Skip the instruction, and set r3. */
asm("handler:\n"
    "	mfsrr0 4\n"
    "	addi 4, 4, 4\n"
    "	mtsrr0 4\n"
    "	li 3, 1\n"
    "	rfid\n");

extern unsigned int handler[];

#define TRY(name, instruction)                                           \
	do {                                                             \
		register u64 r3 asm("r3") = 0;                           \
                                                                         \
		asm volatile(instruction : "+r"(r3) : : "r4", "memory"); \
		count = r3;                                              \
		print(name);                                             \
		print_number(count);                                     \
	} while (0)

void run(void)
{
	volatile unsigned int *vector = (unsigned int *)0x700;
	int i, count;

	for (i = 0; i < 5; i++)
		vector[i] = handler[i];
	TRY("dcbf: ", ".long 0x7c0008ac");
	TRY(", dcbstps: ", ".long 0x7cc008ac");
	TRY(", dcbfps: ", ".long 0x7c8008ac");
	print("\n");
}
