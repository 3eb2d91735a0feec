/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * isa_probe - find out which instructions this QEMU can execute.
 *
 * A freestanding big-endian program for `-machine pseries,x-vof=on -kernel`. It is entered in real
 * mode at any load address, so it is position-independent. A handler at the program interrupt's
 * vector records an illegal instruction and skips it. The result is one line on the spapr-vty at
 * TERM, "isa-probe: NAME=1 NAME=0 ... end"; then the machine is switched off.
 *
 * The instructions come from isa_probe_table.inc, one "probe NAME, WORD" each. They may use r28,
 * the address of scratch memory.
 */
	.set	H_PUT_TERM_CHAR, 0x58
	.set	H_RTAS, 0xf000		/* QEMU's own: include/hw/ppc/spapr.h */
	.set	RTAS_POWER_OFF, 0x2003
	.set	TERM, 0x3000		/* upper half of spapr-vty's reg=0x30000000 */
	.set	PROGRAM_VECTOR, 0x700

	.macro	say text
	bl	print
	.asciz	"\text"
	.balign	4
	.endm

	.macro	probe name, word
	li	%r31, 1
	.long	\word
	say	"\name="
	addi	%r6, %r31, '0'
	bl	putc
	li	%r6, ' '
	bl	putc
	.endm

	.text
	.globl	_start
_start:
	bcl	20, 31, 1f
1:	mflr	%r30
	addi	%r28, %r30, scratch - 1b

	/* Copy the handler to its vector and make it visible to instruction fetch. */
	addi	%r4, %r30, handler - 1b
	li	%r5, PROGRAM_VECTOR
	li	%r6, (handler_end - handler) / 4
	mtctr	%r6
2:	lwz	%r7, 0(%r4)
	stw	%r7, 0(%r5)
	dcbst	0, %r5
	sync
	icbi	0, %r5
	addi	%r4, %r4, 4
	addi	%r5, %r5, 4
	bdnz	2b
	sync
	isync

	say	"isa-probe: "
	.include "isa_probe_table.inc"
	say	"end\n"

	li	%r3, 0
	ori	%r3, %r3, H_RTAS
	addi	%r4, %r30, power_off - 1b
	sc	1
3:	b	3b

/* Print the string that follows the call, and return after it. */
print:
	mflr	%r27
4:	lbz	%r6, 0(%r27)
	addi	%r27, %r27, 1
	cmpwi	%r6, 0
	beq	5f
	bl	putc
	b	4b
5:	addi	%r27, %r27, 3
	clrrdi	%r27, %r27, 2
	mtlr	%r27
	blr

/* Print the character in r6. The hypervisor may change r3 to r12. */
putc:
	sldi	%r26, %r6, 56
6:	mr	%r6, %r26
	li	%r7, 0
	li	%r3, H_PUT_TERM_CHAR
	lis	%r4, TERM
	li	%r5, 1
	sc	1
	cmpdi	%r3, 1			/* H_BUSY: the host does not read now */
	beq	6b
	blr

handler:
	li	%r31, 0
	mfsrr0	%r29
	addi	%r29, %r29, 4
	mtsrr0	%r29
	rfid
handler_end:

	.balign	8
power_off:
	.long	RTAS_POWER_OFF, 2, 1	/* two arguments, one result */
	.long	-1, -1, 0

	.balign	128
scratch:
	.space	128
