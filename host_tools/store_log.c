// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * store_log - part of flush_shim: writes the log of stores that store_log.h describes.
 *
 * A page is compared with a copy, because the host does not report which pages of a shared mapping
 * were written to. Only pages that the file has are read: in a sparse file, reading a hole through
 * a mapping allocates it.
 */
#define _GNU_SOURCE

#include "store_log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SYNC_NS 5000000

static struct logged {
	/* Descriptor of our own, for its position; -1 before the first mapping. */
	int fd;
	const unsigned char *now;
	unsigned char *copy;
	/* For each page of the copy: it may differ from zeros. */
	unsigned char *used;
	size_t pages;
} logged[64];

static int log_fd = -1;
/* One entry at a time: the order in the log is the order of the events. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what)
{
	/* A gap in the log would make images that never existed. */
	fprintf(stderr, "flush_shim: the log of stores: %s: %s\n", what, strerror(errno));
	abort();
}

static void put(const void *data, size_t size)
{
	while (size) {
		ssize_t done = write(log_fd, data, size);

		if (done < 0 && errno != EINTR)
			fail("write");
		if (done > 0) {
			data = (const char *)data + done;
			size -= (size_t)done;
		}
	}
}

void log_to(int fd)
{
	log_fd = fd;
	for (size_t i = 0; i < sizeof(logged) / sizeof(logged[0]); i++)
		logged[i].fd = -1;
}

bool log_is_on(void)
{
	return log_fd >= 0;
}

int log_sync(void)
{
	const struct timespec duration = { .tv_nsec = SYNC_NS };

	nanosleep(&duration, NULL);
	return 0;
}

static void *map(int fd, size_t size, int prot, int flags)
{
	void *place = map_unseen(fd, size, prot, flags);

	if (place == MAP_FAILED)
		fail("mmap");
	return place;
}

void log_file(uint32_t file, int fd)
{
	struct logged *one = &logged[file];
	struct stat info;
	char path[32];

	if (log_fd < 0)
		return;
	pthread_mutex_lock(&lock);
	if (one->fd < 0) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		one->fd = open(path, O_RDONLY | O_CLOEXEC);
		if (one->fd < 0 || fstat(one->fd, &info))
			fail("open");
		one->pages = (size_t)info.st_size / LOG_PAGE;
		one->now = map(one->fd, one->pages * LOG_PAGE, PROT_READ, MAP_SHARED);
		one->copy = map(-1, one->pages * LOG_PAGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
		one->used = map(-1, one->pages, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
	}
	pthread_mutex_unlock(&lock);
}

/* Log a page if it differs from the copy; the copy is what the log has. */
static uint32_t put_changed(uint32_t file, size_t page, bool hole)
{
	static const unsigned char zeros[LOG_PAGE];
	struct logged *one = &logged[file];
	unsigned char *copy = one->copy + page * LOG_PAGE;
	const unsigned char *now = hole ? zeros : one->now + page * LOG_PAGE;
	struct log_page entry = { .file = file, .page = (uint32_t)page };

	if (!memcmp(now, one->used[page] ? copy : zeros, LOG_PAGE))
		return 0;
	/* The guest goes on: only what was copied once is logged and remembered. */
	memcpy(entry.data, now, LOG_PAGE);
	memcpy(copy, entry.data, LOG_PAGE);
	one->used[page] = 1;
	put(&entry, sizeof(entry));
	return 1;
}

static uint32_t put_file(uint32_t file)
{
	struct logged *one = &logged[file];
	off_t size = (off_t)(one->pages * LOG_PAGE), start, end = 0;
	uint32_t count = 0;

	while (end < size) {
		size_t hole = (size_t)end / LOG_PAGE;

		start = lseek(one->fd, end, SEEK_DATA);
		if (start < 0 && errno != ENXIO)
			fail("lseek");
		if (start < 0 || start > size)
			start = size;
		start -= start % LOG_PAGE;
		for (; hole < (size_t)start / LOG_PAGE; hole++) {
			if (one->used[hole])
				count += put_changed(file, hole, true);
		}
		if (start == size)
			break;
		end = lseek(one->fd, start, SEEK_HOLE);
		if (end < 0)
			fail("lseek");
		end += (LOG_PAGE - end % LOG_PAGE) % LOG_PAGE;
		if (end > size)
			end = size;
		for (size_t page = (size_t)start / LOG_PAGE; page < (size_t)end / LOG_PAGE; page++)
			count += put_changed(file, page, false);
	}
	return count;
}

void log_begin(uint64_t number, uint32_t file)
{
	struct log_entry entry = { .kind = LOG_BEGIN, .number = number, .file = file };
	off_t place;

	if (log_fd < 0)
		return;
	pthread_mutex_lock(&lock);
	place = lseek(log_fd, 0, SEEK_CUR);
	put(&entry, sizeof(entry));
	for (uint32_t i = 0; i < sizeof(logged) / sizeof(logged[0]); i++) {
		if (logged[i].fd >= 0)
			entry.pages += put_file(i);
	}
	if (pwrite(log_fd, &entry, sizeof(entry), place) != sizeof(entry))
		fail("pwrite");
	pthread_mutex_unlock(&lock);
}

void log_end(uint64_t number, uint32_t file, uint32_t result)
{
	struct log_entry entry = {
		.kind = LOG_END, .number = number, .file = file, .result = result
	};

	if (log_fd < 0)
		return;
	pthread_mutex_lock(&lock);
	put(&entry, sizeof(entry));
	pthread_mutex_unlock(&lock);
}
