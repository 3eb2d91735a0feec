/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Log of the contents of watched files: the pages that changed, at the begin of each sync.
 *
 * The log is a file of entries, each a struct log_entry with `pages` times a struct log_page after
 * it. An entry LOG_BEGIN has all pages of all logged files that differ from their last entry, so it
 * contains every store made before the sync began, and perhaps later ones. An entry LOG_END follows
 * when the sync has returned, and before its caller can act on that. paprscm/power_cut/store_log.py
 * reads the log.
 */
#ifndef STORE_LOG_H
#define STORE_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LOG_PAGE 4096

enum log_kind { LOG_BEGIN = 1, LOG_END = 2 };

struct log_entry {
	uint32_t kind, pages;
	/* Number of the sync (its record in the shim), its file, and its errno. */
	uint64_t number;
	uint32_t file, result;
};

struct log_page {
	uint32_t file, page;
	unsigned char data[LOG_PAGE];
};

/* Provided by flush_shim.c: mmap() that is not recorded. */
void *map_unseen(int fd, size_t size, int prot, int flags);

/* Log to this descriptor; without a call the other functions do nothing. */
void log_to(int fd);

bool log_is_on(void);

/*
 * Take the place of a sync, which is not executed: what is durable follows from the log. It takes
 * as long as on a disk, so that a guest goes on before its end if QEMU reports success too early.
 */
int log_sync(void);

/* Log the content of a watched file, from its first mapping on. */
void log_file(uint32_t file, int fd);

void log_begin(uint64_t number, uint32_t file);
void log_end(uint64_t number, uint32_t file, uint32_t result);

#endif
