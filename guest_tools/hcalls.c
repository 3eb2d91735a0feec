// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Makes the hypervisor calls that the host requests, and returns their results.
 *
 * The guest's memory is shared with the host. Each vCPU has a mailbox at a fixed address: the host
 * writes calls and then a new request number; the vCPU makes the calls and then repeats the number.
 * Instead of a call, the vCPU can read 8 bytes of memory.
 * This program does not interpret the calls; paprscm/hcall/mailbox.py is the other end.
 *
 * All variables are in the mailbox or on the stack, so no relocation is needed.
 */

typedef unsigned long u64;

#define POLL 1 /* repeat while the answer is long-busy */
#define READ 2 /* no call: read 8 bytes at the real address in r4, into r4 */

#define H_CEDE 0xe0
#define LONG_BUSY 9900 /* H_LONG_BUSY_ORDER_1_MSEC, the first of six consecutive codes */
#define LONG_BUSY_LAST 9905

#define MAILBOXES 0x8000000UL
#define CALLS 3824 /* 0x1000 to 0xf0000; the stack grows down from 0x100000 */

/* Ticks of the timebase and of the decrementer: 512 MHz. */
#define NAP_MIN (512 * 50UL)
#define NAP_MAX (512 * 1000UL)
#define DECREMENTER_MAX 0x7fffffffUL

/* Duration of busy waiting for a request before the first nap. */
#define LOOK (512 * 100UL)

struct call {
	u64 in[10]; /* r3 (the opcode) to r12 */
	u64 times;  /* maximum number of calls; 1 or more */
	u64 flags;
	u64 pause;	  /* between two polls, ticks */
	u64 out[10];	  /* r3 (the return code) to r12, of the last call */
	u64 made;	  /* number of calls made */
	u64 busy;	  /* number of calls that answered long-busy */
	u64 began, ended; /* timebase before the first and after the last call */
	u64 unused[5];
};

struct mailbox {
	/* Record of an exception, valid if `vector` is not 0; written by hcalls.S. */
	u64 vector, srr0, srr1, dar, dsisr;
	u64 generation; /* incremented each time this vCPU starts */
	u64 entry;	/* entry point for another vCPU */
	u64 request;	/* written last by the host */
	u64 response;	/* written last by us */
	u64 count;	/* number of calls */
	u64 gate;	/* if not 0: wait until the host opens the gate of this number */
	u64 arrived;	/* the request that waits at the gate */
	u64 index;	/* of the call in progress; `count` after the last one */
	u64 open;	/* number of the open gate; used only in the first mailbox */
	u64 awake;	/* if not 0: do not sleep; written by the host */
	u64 asleep;	/* this vCPU sleeps, or is about to */
	u64 unused[512 - 16];
	struct call calls[CALLS];
};

_Static_assert(sizeof(struct call) == 256, "mailbox.py knows");
_Static_assert(__builtin_offsetof(struct mailbox, calls) == 0x1000, "mailbox.py knows");
_Static_assert(sizeof(struct mailbox) == 0xf0000, "the stack needs room");

void hypervisor_call(const volatile u64 in[10], volatile u64 out[10]);
void serve(volatile struct mailbox *box, u64 entry);

static void lwsync(void)
{
	asm volatile("lwsync" : : : "memory");
}

static u64 timebase(void)
{
	return __builtin_ppc_get_timebase();
}

/* Sleep until the next interrupt, and return with interrupts enabled. */
static void cede(void)
{
	register u64 r3 asm("r3") = H_CEDE;

	asm volatile("sc 1"
		     : "+r"(r3)
		     :
		     : "r0", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "cr0", "cr1",
		       "cr5", "cr6", "cr7", "ctr", "xer", "memory");
}

/*
 * Yield the host's processor for some time. A vCPU that is asleep during a migration may never wake
 * up (QEMU before 9.1 does not start its decrementer), so the host can keep it awake.
 */
static void nap(volatile struct mailbox *box, u64 ticks)
{
	u64 start = timebase(), gone;

	while ((gone = timebase() - start) < ticks) {
		u64 left = ticks - gone;

		/* Falling asleep and waking up takes about this long. */
		if (left < NAP_MIN / 2)
			continue;
		/* The host sets `awake` and then reads `asleep`: one of us sees the other's store. */
		box->asleep = 1;
		__sync_synchronize();
		if (box->awake) {
			box->asleep = 0;
			continue;
		}
		/* Disable interrupts: a decrementer interrupt before H_CEDE could not end it. */
		asm volatile("mtmsrd %0, 1" : : "r"(0UL) : "memory");
		asm volatile("mtdec %0" : : "r"(left < DECREMENTER_MAX ? left : DECREMENTER_MAX));
		cede();
		box->asleep = 0;
	}
}

static u64 await_request(volatile struct mailbox *box, u64 seen)
{
	u64 request, start = timebase(), ticks = NAP_MIN;

	while ((request = box->request) == seen) {
		if (timebase() - start < LOOK)
			continue;
		nap(box, ticks);
		ticks = ticks < NAP_MAX / 2 ? 2 * ticks : NAP_MAX;
	}
	/* Order the following reads after the read of the request. */
	asm volatile("isync" : : : "memory");
	return request;
}

static void make(volatile struct mailbox *box, volatile struct call *call)
{
	int poll = call->flags & POLL;
	u64 times = call->times, made = 0, busy = 0, began = timebase(), ended;

	for (;;) {
		int is_busy;

		if (call->flags & READ) {
			call->out[0] = 0;
			call->out[1] = *(volatile u64 *)call->in[1];
		} else {
			hypervisor_call(call->in, call->out);
		}
		ended = timebase();
		made++;
		is_busy = call->out[0] >= LONG_BUSY && call->out[0] <= LONG_BUSY_LAST;
		busy += is_busy;
		if (made >= times || (poll && !is_busy))
			break;
		if (poll) {
			/* The token is returned in r4, and is the second argument from now on. */
			call->in[2] = call->out[1];
			nap(box, call->pause);
		}
	}
	call->made = made;
	call->busy = busy;
	call->began = began;
	call->ended = ended;
}

void serve(volatile struct mailbox *box, u64 entry)
{
	volatile struct mailbox *first = (volatile struct mailbox *)MAILBOXES;
	/* Memory survives a reset: do not answer an old request. */
	u64 request = box->request;

	box->vector = 0;
	box->asleep = 0;
	box->entry = entry;
	lwsync();
	box->generation++;
	for (;;) {
		u64 count, i;

		request = await_request(box, request);
		count = box->count;
		if (box->gate) {
			lwsync();
			box->arrived = request;
			while (first->open != box->gate)
				;
			asm volatile("isync" : : : "memory");
		}
		for (i = 0; i < count; i++) {
			box->index = i;
			make(box, &box->calls[i]);
		}
		box->index = count;
		lwsync();
		box->response = request;
	}
}
