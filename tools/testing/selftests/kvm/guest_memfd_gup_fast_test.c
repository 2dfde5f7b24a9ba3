// SPDX-License-Identifier: GPL-2.0
/*
 * That memory may be out of the direct map must not slow down others
 *
 * get_user_pages_fast() can't tell what a small page without a mapping is, but that it
 * isn't of a file whose memory is out of the direct map.
 */
#include <stdio.h>
#include <string.h>

#include <linux/stddef.h>
#include <linux/io_uring.h>
#include <linux/sizes.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "test_util.h"

#define TRACING		"/sys/kernel/tracing"
#define EVENT		"mmap_lock_start_locking"

#define NR_PINS		200

static bool write_tracing(const char *name, const char *value)
{
	char path[128];
	ssize_t r;
	int fd;

	snprintf(path, sizeof(path), TRACING "/%s", name);
	fd = open(path, O_WRONLY | O_TRUNC);
	if (fd < 0)
		return false;
	r = write(fd, value, strlen(value));
	kvm_close(fd);
	return r == strlen(value);
}

static long nr_events(void)
{
	char line[512];
	FILE *file;
	long nr = 0;

	file = fopen(TRACING "/trace", "r");
	TEST_ASSERT(file, "Can't open " TRACING "/trace");
	while (fgets(line, sizeof(line), file))
		nr += line[0] != '#' && strstr(line, EVENT ":");
	fclose(file);
	return nr;
}

/* How often mmap_lock is taken, which is what the slow path does */
static long pin(void *mem)
{
	struct iovec iov = { .iov_base = mem, .iov_len = 8 };
	int pipes[2], i;
	u64 word;

	TEST_ASSERT(!pipe(pipes), "pipe() failed");
	TEST_ASSERT(write_tracing("trace", " ") &&
		    write_tracing("events/mmap_lock/" EVENT "/enable", "1"), "Can't trace");
	for (i = 0; i < NR_PINS; i++) {
		TEST_ASSERT_EQ(vmsplice(pipes[1], &iov, 1, 0), 8);
		TEST_ASSERT_EQ(read(pipes[0], &word, sizeof(word)), sizeof(word));
	}
	TEST_ASSERT(write_tracing("events/mmap_lock/" EVENT "/enable", "0"), "Can't trace");
	kvm_close(pipes[0]);
	kvm_close(pipes[1]);
	return nr_events();
}

TEST(no_mapping)
{
	struct io_uring_params params = {};
	char filter[64];
	u64 *page, *ring;
	long nr;
	int fd;

	mount("tracefs", TRACING, "tracefs", 0, NULL);
	snprintf(filter, sizeof(filter), "common_pid == %d", getpid());
	if (!write_tracing("events/mmap_lock/" EVENT "/filter", filter))
		SKIP(return, "no tracepoint of mmap_lock, see CONFIG_ENABLE_DEFAULT_TRACERS");

	fd = syscall(__NR_io_uring_setup, 1, &params);
	if (fd < 0)
		SKIP(return, "no io_uring, errno %d", errno);

	/* A page that the kernel has allocated and mapped, which is in no page cache */
	ring = __kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
	page = kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	WRITE_ONCE(*page, 1);

	/* Some are taken by the way. */
	nr = pin(page);
	TEST_ASSERT(nr < NR_PINS / 2, "Anonymous memory: %ld times for %d pins", nr, NR_PINS);
	nr = pin(ring);
	TEST_ASSERT(nr < NR_PINS / 2, "No mapping: %ld times for %d pins", nr, NR_PINS);

	write_tracing("events/mmap_lock/" EVENT "/filter", "0");
}

TEST_HARNESS_MAIN
