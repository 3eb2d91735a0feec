// SPDX-License-Identifier: GPL-2.0-or-later
/* Begin flushes until QEMU does not return a token. */
#include "../bare.h"

void run(void)
{
	long count, status = 0;

	for (count = 0; count < 100000; count++) {
		status = hcall(H_SCM_FLUSH, DRC(0), 0, 0, 0);
		if (!is_busy(status) || result4 == 0)
			break;
	}
	print("begun: ");
	print_number(count);
	if (count < 100000)
		print_status(", then H_SCM_FLUSH", status);
	print("\n");
}
