/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry, exception vectors and the hypervisor call itself; the rest is in hcalls.c.
 *
 * A freestanding big-endian program for `-machine pseries,x-vof=on -kernel`. VOF enters it in real
 * mode at its first byte, at any load address, so it is position-independent. VOF itself is not
 * used afterwards, and its image at 0 is overwritten by our vectors; a reset loads both again.
 *
 * r13 always points to this vCPU's mailbox, which begins with the record of an exception.
 */
	.set	MAILBOXES, 0x8000000	/* as in hcalls.c */
	.set	MAILBOX_SHIFT, 20
	.set	FRAME, 32		/* minimum stack frame of a caller: ELFv2 ABI, 2.2.2 */
	.set	MSR_ME, 0x1000
	.set	VECTORS, 0x100
	.set	DECREMENTER, 0x900
	.set	VECTORS_END, 0x1000
	.set	VECTOR_STEP, 0x20	/* smallest distance of two vectors */
	.set	REPORT, 0x2000		/* between the vectors and VOF's stack at 0x8000 */
	.set	H_CEDE, 0xe0

	/* Copy code to an absolute address below 0x8000; r30 is the address of _base. */
	.macro	install name, target
	addi	%r4, %r30, \name - _base
	li	%r5, \target
	li	%r6, (\name\()_end - \name) / 4
	bl	copy
	.endm

	.text
	.globl	_start
_start:
	li	%r3, 0
secondary:				/* r3: the vCPU's number, an argument of start-cpu */
	/* VOF runs with 32-bit addresses, start-cpu with 64-bit ones: select 64-bit mode. */
	li	%r4, 1
	sldi	%r4, %r4, 63
	ori	%r4, %r4, MSR_ME
	mtmsrd	%r4
	isync
	bcl	20, 31, _base
_base:	mflr	%r30
	lis	%r13, MAILBOXES >> 16
	sldi	%r4, %r3, MAILBOX_SHIFT
	add	%r13, %r13, %r4
	/* The stack grows down from the end of the mailbox. */
	addis	%r1, %r13, (1 << MAILBOX_SHIFT) >> 16
	addi	%r1, %r1, -FRAME
	cmpdi	%r3, 0
	bne	2f

	/* The vectors are the same for all vCPUs. */
	addi	%r4, %r30, vector - _base
	lwz	%r7, 0(%r4)
	lwz	%r8, 4(%r4)
	li	%r4, VECTORS
1:	or	%r9, %r7, %r4
	stw	%r9, 0(%r4)
	stw	%r8, 4(%r4)
	dcbst	0, %r4
	sync
	icbi	0, %r4
	addi	%r4, %r4, VECTOR_STEP
	cmpldi	%r4, VECTORS_END
	blt	1b
	install	report, REPORT
	install	decrementer, DECREMENTER
	sync
	isync

2:	mr	%r3, %r13
	addi	%r4, %r30, secondary - _base
	bl	serve
3:	b	3b			/* it does not return */

/* Copy r6 words from r4 to r5, and make them visible to instruction fetch. */
copy:
	mtctr	%r6
1:	lwz	%r7, 0(%r4)
	stw	%r7, 0(%r5)
	dcbst	0, %r5
	sync
	icbi	0, %r5
	addi	%r4, %r4, 4
	addi	%r5, %r5, 4
	bdnz	1b
	blr

/* Code of each vector; the vector's own address is inserted into the first instruction. */
vector:
	li	%r3, 0
	ba	REPORT

/*
 * An unexpected exception at the vector in r3: record it, and stop. The vector is written last,
 * because it marks the record as complete.
 */
report:
	mfsrr0	%r4
	std	%r4, 8(%r13)
	mfsrr1	%r4
	std	%r4, 16(%r13)
	mfdar	%r4
	std	%r4, 24(%r13)
	mfdsisr	%r4
	std	%r4, 32(%r13)
	lwsync
	std	%r3, 0(%r13)
1:	li	%r3, H_CEDE		/* in a loop, because the decrementer ends each H_CEDE */
	sc	1
	b	1b
report_end:

/* End a nap: set the decrementer to its maximum. The interrupted code does not notice. */
decrementer:
	mtsprg0	%r3
	lis	%r3, 0x7fff
	mtdec	%r3
	mfsprg0	%r3
	rfid
decrementer_end:

/*
 * void hypervisor_call(const u64 in[10], u64 out[10]): r3 to r12 are input and output.
 *
 * All other registers that the call may change are volatile in C, too (Linux
 * Documentation/arch/powerpc/papr_hcalls.rst).
 */
	.globl	hypervisor_call
hypervisor_call:
	std	%r31, -8(%r1)		/* below the stack pointer, where no handler of ours writes */
	mr	%r31, %r4
	mr	%r11, %r3
	ld	%r3, 0(%r11)
	ld	%r4, 8(%r11)
	ld	%r5, 16(%r11)
	ld	%r6, 24(%r11)
	ld	%r7, 32(%r11)
	ld	%r8, 40(%r11)
	ld	%r9, 48(%r11)
	ld	%r10, 56(%r11)
	ld	%r12, 72(%r11)
	ld	%r11, 64(%r11)
	sc	1
	std	%r3, 0(%r31)
	std	%r4, 8(%r31)
	std	%r5, 16(%r31)
	std	%r6, 24(%r31)
	std	%r7, 32(%r31)
	std	%r8, 40(%r31)
	std	%r9, 48(%r31)
	std	%r10, 56(%r31)
	std	%r11, 64(%r31)
	std	%r12, 72(%r31)
	ld	%r31, -8(%r1)
	blr
