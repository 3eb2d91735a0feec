// SPDX-License-Identifier: GPL-2.0-or-later
#define COUNT 60
#include "hang64.c"
