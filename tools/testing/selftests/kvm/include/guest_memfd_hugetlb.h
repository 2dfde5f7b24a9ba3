/* SPDX-License-Identifier: GPL-2.0 */
/*
 * HugeTLB pools, and memory that comes from them
 *
 * The tests compare a pool's counters exactly, i.e. nobody else may use the pool
 * in the meantime.
 */
#ifndef SELFTEST_KVM_GUEST_MEMFD_HUGETLB_H
#define SELFTEST_KVM_GUEST_MEMFD_HUGETLB_H

#include <fcntl.h>
#include <limits.h>
#include <signal.h>

#include <linux/memfd.h>
#include <linux/sizes.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "test_util.h"

#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT	26
#endif

#define SHARED_MEMORY	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
#define PRIVATE_MEMORY	0

/*
 * Zeroing 1G takes its time, above all in an emulator, with a debug kernel, on a machine
 * that has other things to do.  Whoever runs the tests knows better when to give up.
 */
#define HUGETLB_TEST_TIMEOUT	3600

struct hugetlb_pool {
	long total;
	long free;
	long reserved;
	long surplus;
};

static inline u64 hugetlb_size_flag(size_t page_size)
{
	return (u64)__builtin_ctzl(page_size) << GUEST_MEMFD_HUGE_SHIFT;
}

static inline void hugetlb_pool_path(char *path, size_t page_size, const char *name)
{
	snprintf(path, PATH_MAX, "/sys/kernel/mm/hugepages/hugepages-%lukB/%s",
		 page_size / SZ_1K, name);
}

static inline bool hugetlb_pool_exists(size_t page_size)
{
	char path[PATH_MAX];

	hugetlb_pool_path(path, page_size, "");
	return !access(path, F_OK);
}

/* Returns -1 if there is no such file. */
static inline long read_long(const char *path)
{
	char buf[32] = {};
	int fd;

	fd = open(path, O_RDONLY);
	if (fd < 0)
		return -1;

	TEST_ASSERT(read(fd, buf, sizeof(buf) - 1) > 0, "Can't read %s", path);
	kvm_close(fd);
	return strtol(buf, NULL, 10);
}

static inline int write_long(const char *path, long value)
{
	char buf[32];
	int fd, r, len;

	fd = open(path, O_WRONLY);
	if (fd < 0)
		return -1;

	len = snprintf(buf, sizeof(buf), "%ld", value);
	r = write(fd, buf, len) == len ? 0 : -1;
	kvm_close(fd);
	return r;
}

static inline long hugetlb_pool_get(size_t page_size, const char *name)
{
	char path[PATH_MAX];

	hugetlb_pool_path(path, page_size, name);
	return read_long(path);
}

static inline int hugetlb_pool_set(size_t page_size, const char *name, long value)
{
	char path[PATH_MAX];

	hugetlb_pool_path(path, page_size, name);
	return write_long(path, value);
}

static inline long hugetlb_node_free(int node, size_t page_size)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path),
		 "/sys/devices/system/node/node%d/hugepages/hugepages-%lukB/free_hugepages",
		 node, page_size / SZ_1K);
	return read_long(path);
}

static inline struct hugetlb_pool hugetlb_pool_read(size_t page_size)
{
	return (struct hugetlb_pool) {
		.total = hugetlb_pool_get(page_size, "nr_hugepages"),
		.free = hugetlb_pool_get(page_size, "free_hugepages"),
		.reserved = hugetlb_pool_get(page_size, "resv_hugepages"),
		.surplus = hugetlb_pool_get(page_size, "surplus_hugepages"),
	};
}

static inline bool hugetlb_pool_equal(struct hugetlb_pool a, struct hugetlb_pool b)
{
	return a.total == b.total && a.free == b.free &&
	       a.reserved == b.reserved && a.surplus == b.surplus;
}

static inline void __assert_pool(size_t page_size, struct hugetlb_pool want,
				 long nr_allocated, long nr_reserved, bool eventually,
				 const char *file, int line)
{
	struct hugetlb_pool pool;
	int i;

	want.free -= nr_allocated;
	want.reserved += nr_reserved;

	/* 10 seconds */
	for (i = 0; i < 1000; i++) {
		pool = hugetlb_pool_read(page_size);
		if (hugetlb_pool_equal(pool, want) || !eventually)
			break;
		usleep(10000);
	}
	test_assert(hugetlb_pool_equal(pool, want), "pool", file, line,
		    "Total/free/reserved/surplus: wanted %ld/%ld/%ld/%ld, got %ld/%ld/%ld/%ld",
		    want.total, want.free, want.reserved, want.surplus,
		    pool.total, pool.free, pool.reserved, pool.surplus);
}

/*
 * Assert that the pool is what it was before, but for this many pages that were
 * allocated from it, and this many that were reserved in it.
 */
#define TEST_ASSERT_POOL(_page_size, _before, _nr_allocated, _nr_reserved)	\
	__assert_pool(_page_size, _before, _nr_allocated, _nr_reserved, false,	\
		      __FILE__, __LINE__)

/* The same for references that are dropped asynchronously. */
#define TEST_ASSERT_POOL_EVENTUALLY(_page_size, _before, _nr_allocated, _nr_reserved) \
	__assert_pool(_page_size, _before, _nr_allocated, _nr_reserved, true,	\
		      __FILE__, __LINE__)

/* Returns why guest_memfd can't be tested with this page size, or NULL. */
static inline const char *hugetlb_missing(size_t page_size, long nr_pages)
{
	static char reason[128];
	struct hugetlb_pool pool;

	if (!(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGETLB))
		return "no GUEST_MEMFD_FLAG_HUGETLB";

	if (!hugetlb_pool_exists(page_size)) {
		snprintf(reason, sizeof(reason), "no huge pages of %lu kB",
			 page_size / SZ_1K);
		return reason;
	}

	pool = hugetlb_pool_read(page_size);
	if (pool.free - pool.reserved >= nr_pages)
		return NULL;

	snprintf(reason, sizeof(reason),
		 "%ld huge pages of %lu kB needed, %ld available, see nr_hugepages",
		 nr_pages, page_size / SZ_1K, pool.free - pool.reserved);
	return reason;
}

static inline int hugetlbfs_create(size_t size, size_t page_size)
{
	u32 shift = __builtin_ctzl(page_size);
	int fd;

	fd = memfd_create("hugetlb", MFD_HUGETLB | shift << MFD_HUGE_SHIFT);
	TEST_ASSERT(fd >= 0, __KVM_SYSCALL_ERROR("memfd_create()", fd));
	kvm_ftruncate(fd, size);
	return fd;
}

/* libkvm's memset() and memcmp() go byte by byte, and 1G has many of them. */
static inline void fill_memory(void *mem, size_t size, u64 value)
{
	u64 *word = mem, *end = mem + size;

	for (; word < end; word += 4) {
		word[0] = value;
		word[1] = value;
		word[2] = value;
		word[3] = value;
	}
}

static inline void __assert_memory(const void *mem, size_t size, u64 value,
				   const char *file, int line)
{
	const u64 *word = mem, *end = mem + size;

	for (; word < end; word += 4) {
		if ((word[0] ^ value) | (word[1] ^ value) |
		    (word[2] ^ value) | (word[3] ^ value))
			break;
	}
	if (word == end)
		return;

	while (*word == value)
		word++;
	test_assert(false, "memory", file, line,
		    "Wanted 0x%lx at offset 0x%lx of 0x%lx bytes, got 0x%lx",
		    (unsigned long)value, (const void *)word - mem, size,
		    (unsigned long)*word);
}

/* Each 64 bits of it have this value. */
#define TEST_ASSERT_MEMORY(_mem, _size, _value)					\
	__assert_memory(_mem, _size, _value, __FILE__, __LINE__)

/* Returns 0 if no page is mapped there.  The page itself must be accessed first. */
static inline u64 mem_to_pfn(const void *mem)
{
	u64 entry;
	int fd;

	fd = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	TEST_ASSERT(pread(fd, &entry, sizeof(entry),
			  (u64)mem / getpagesize() * sizeof(entry)) == sizeof(entry),
		    "Can't read /proc/self/pagemap");
	kvm_close(fd);

	return entry & BIT_ULL(63) ? entry & (BIT_ULL(55) - 1) : 0;
}

#define CORE_PATTERN	"/proc/sys/kernel/core_pattern"

/* Have a child with all of this process's memory dump core. */
static inline void dump_core(const char *path)
{
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	char old[128] = {};
	int fd, status;
	pid_t pid;

	fd = open_path_or_exit(CORE_PATTERN, O_RDWR);
	TEST_ASSERT(read(fd, old, sizeof(old) - 1) > 0, "Can't read core_pattern");
	TEST_ASSERT_EQ(pwrite(fd, path, strlen(path), 0), strlen(path));
	pid = fork();
	if (!pid) {
		setrlimit(RLIMIT_CORE, &unlimited);
		signal(SIGSEGV, SIG_DFL);
		raise(SIGSEGV);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status), "No signal");
	TEST_ASSERT_EQ(pwrite(fd, old, strlen(old), 0), strlen(old));
	TEST_ASSERT(WCOREDUMP(status), "No core dump");
	kvm_close(fd);
}

/* A page full of it, i.e. not only on the stack.  Pages are aligned in core dumps. */
static inline bool file_has_page(const char *path, u64 value)
{
	static u64 buf[SZ_4K / 8], page[SZ_4K / 8];
	bool found = false;
	int fd, i;

	for (i = 0; i < ARRAY_SIZE(page); i++)
		page[i] = value;
	fd = open_path_or_exit(path, O_RDONLY);
	while (!found && read(fd, buf, sizeof(buf)) == sizeof(buf))
		found = !memcmp(buf, page, sizeof(page));
	kvm_close(fd);

	/* This is in the next core dump, too. */
	memset(buf, 0, sizeof(buf));
	memset(page, 0, sizeof(page));
	return found;
}

#endif /* SELFTEST_KVM_GUEST_MEMFD_HUGETLB_H */
