/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A program without an operating system for QEMU's pseries machine: it makes hypervisor calls and
 * prints their results.
 *
 *	cc=${CC:-powerpc64le-linux-gnu-gcc}
 *	$cc -mbig-endian -mabi=elfv2 -mcpu=power8 -msoft-float -mno-altivec -mno-vsx -O1 -Wall \
 *		-ffreestanding -fno-asynchronous-unwind-tables -nostdlib -static \
 *		-Wl,-Ttext=0,--build-id=none -o program program.c
 *	qemu-system-ppc64 -M pseries,x-vof=on -nodefaults -display none -serial stdio \
 *		-kernel program …
 *
 * VOF, QEMU's built-in Open Firmware, enters the program in real mode at its first byte.
 */
#ifndef BARE_H
#define BARE_H

typedef unsigned long u64;

#define H_RTAS 0xf000
#define H_PUT_TERM_CHAR 0x58
#define H_SCM_READ_METADATA 0x3e4
#define H_SCM_WRITE_METADATA 0x3e8
#define H_SCM_BIND_MEM 0x3ec
#define H_SCM_UNBIND_MEM 0x3f0
#define H_SCM_HEALTH 0x400
#define H_SCM_FLUSH 0x44c

/* DRC index of the DIMM in a slot (PAPR: type 9 is persistent memory). */
#define DRC(slot) (0x90000000UL | (slot))

/* The program is big-endian, and VOF selects 32-bit mode: select 64-bit mode, and set the stack. */
asm(".section .text.startup, \"ax\"\n"
    ".globl _start\n"
    "_start:\n"
    "	li	3, 1\n"
    "	sldi	3, 3, 63\n"
    "	mtmsrd	3\n"
    "	isync\n"
    "	bcl	20, 31, 1f\n"
    "1:	mflr	30\n"
    "	addis	2, 30, (.TOC. - 1b)@ha\n"
    "	addi	2, 2, (.TOC. - 1b)@l\n"
    "	lis	1, 0x800\n"
    "	addi	1, 1, -64\n"
    "	bl	run\n"
    "	b	power_off\n"
    ".text\n");

/* Results of the last call: r4, r5. */
static u64 result4, result5;

static inline long hcall(u64 number, u64 a, u64 b, u64 c, u64 d)
{
	register u64 r3 asm("r3") = number;
	register u64 r4 asm("r4") = a;
	register u64 r5 asm("r5") = b;
	register u64 r6 asm("r6") = c;
	register u64 r7 asm("r7") = d;
	register u64 r8 asm("r8") = 0;

	asm volatile("sc 1"
		     : "+r"(r3), "+r"(r4), "+r"(r5), "+r"(r6), "+r"(r7), "+r"(r8)
		     :
		     : "r0", "r9", "r10", "r11", "r12", "ctr", "xer", "cr0", "cr1", "cr5", "cr6",
		       "cr7", "memory");
	result4 = r4;
	result5 = r5;
	return r3;
}

/* The program. QEMU exits when it returns. */
void run(void);

/* The RTAS call power-off, by its token in QEMU (include/hw/ppc/spapr.h). */
void power_off(void)
{
	static unsigned int call[16] = { 0x2003, 2, 1 };

	for (;;)
		hcall(H_RTAS, (u64)call, 0, 0, 0);
}

/* Print to the console: vty 0x71000000, 16 bytes a call, and it may be busy. */
static inline void put(char c)
{
	while (hcall(H_PUT_TERM_CHAR, 0x71000000, 1, (u64)c << 56, 0) != 0)
		;
}

static inline void print(const char *text)
{
	for (; *text; text++)
		put(*text);
}

static inline void print_hex(u64 value)
{
	int shift;

	print("0x");
	for (shift = 60; shift > 0 && !(value >> shift); shift -= 4)
		;
	for (; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

static inline void print_number(long value)
{
	if (value < 0) {
		put('-');
		value = -value;
	}
	if (value > 9)
		print_number(value / 10);
	put('0' + value % 10);
}

/* Print "name = status (r4 0x…)" after a call. */
static inline void print_status(const char *name, long status)
{
	u64 r4 = result4;

	print(name);
	print(" = ");
	print_number(status);
	print(" (r4 ");
	print_hex(r4);
	print(")\n");
}

/* Address of a DIMM's first block of 256 MiB, or 0. Real mode may access it. */
static inline volatile u64 *bind(int slot)
{
	if (hcall(H_SCM_BIND_MEM, DRC(slot), 0, 1, -1UL) != 0)
		return 0;
	return (volatile u64 *)result5;
}

/* H_LONG_BUSY_ORDER_1_MSEC to H_LONG_BUSY_ORDER_100_SEC: call again, with the token in r4. */
static inline int is_busy(long status)
{
	return status >= 9900 && status <= 9905;
}

/* Begin a flush, and return its token. */
static inline u64 begin_flush(int slot)
{
	hcall(H_SCM_FLUSH, DRC(slot), 0, 0, 0);
	return result4;
}

/* Wait for a flush, and return its status. */
static inline long end_flush(int slot, u64 token)
{
	long status;

	do {
		status = hcall(H_SCM_FLUSH, DRC(slot), token, 0, 0);
	} while (is_busy(status));
	return status;
}

/* The timebase of each pseries machine has 512 MHz. */
#define TICKS_PER_MS 512000UL

static inline u64 timebase(void)
{
	u64 now;

	asm volatile("mftb %0" : "=r"(now));
	return now;
}

static inline void wait_ms(unsigned int ms)
{
	u64 start = timebase();

	while (timebase() - start < ms * TICKS_PER_MS)
		;
}

#endif
