// SPDX-License-Identifier: GPL-2.0
/*
 * Mappings of guest_memfd with HugeTLB pages, side by side with those of hugetlbfs
 *
 * Each call is made on both.  Where they differ, Documentation/virt/kvm/guest_memfd.rst
 * says so.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/align.h>
#include <linux/falloc.h>
#include <linux/sizes.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PATTERN		0xa5a5a5a5a5a5a5a5ul

#define NR_PAGES	2

FIXTURE(rules) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
	size_t size;
	char *mem;
	int fd;
};

FIXTURE_VARIANT(rules) {
	size_t page_size;
	bool is_gmem;
};

FIXTURE_VARIANT_ADD(rules, hugetlbfs_2M) {
	.page_size = SZ_2M,
};

FIXTURE_VARIANT_ADD(rules, guest_memfd_2M) {
	.page_size = SZ_2M,
	.is_gmem = true,
};

FIXTURE_VARIANT_ADD(rules, hugetlbfs_1G) {
	.page_size = SZ_1G,
};

FIXTURE_VARIANT_ADD(rules, guest_memfd_1G) {
	.page_size = SZ_1G,
	.is_gmem = true,
};

FIXTURE_SETUP(rules)
{
	const char *missing = hugetlb_missing(variant->page_size, NR_PAGES);

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->size = NR_PAGES * self->page_size;
	self->pool = hugetlb_pool_read(self->page_size);
	self->vm = vm_create_barebones();
	if (variant->is_gmem)
		self->fd = vm_create_guest_memfd(self->vm, self->size,
						 GUEST_MEMFD_FLAG_HUGETLB | SHARED_MEMORY |
						 hugetlb_size_flag(self->page_size));
	else
		self->fd = hugetlbfs_create(self->size, self->page_size);
	self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
}

FIXTURE_TEARDOWN_PARENT(rules)
{
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

/* What it comes to: the errno, or 0 */
#define expect_rule(_call, _hugetlbfs, _gmem)					\
do {										\
	int __want = variant->is_gmem ? (_gmem) : (_hugetlbfs);			\
	int __got = (long)(_call) == -1 ? errno : 0;				\
										\
	TEST_ASSERT(__got == __want, "%s: wanted errno %d, got %d", #_call,	\
		    __want, __got);						\
} while (0)

#define expect_same(_call, _errno)						\
do {										\
	int __same = (_errno);							\
										\
	expect_rule(_call, __same, __same);					\
} while (0)

/* How many of the file's pages are allocated.  The others are reserved. */
#define ASSERT_ALLOCATED(_nr_pages)						\
do {										\
	long __nr = (_nr_pages);						\
										\
	TEST_ASSERT_POOL(self->page_size, self->pool, __nr, NR_PAGES - __nr);	\
} while (0)

/* The first page: what is in it, in three places, and what one of them has become */
static void fill_page(char *mem, size_t page_size)
{
	WRITE_ONCE(*(u64 *)mem, PATTERN);
	WRITE_ONCE(*(u64 *)(mem + SZ_4K), PATTERN);
	WRITE_ONCE(*(u64 *)(mem + page_size - SZ_4K), PATTERN);
}

static void check_page(const char *mem, size_t page_size, u64 second)
{
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)mem), PATTERN);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + SZ_4K)), second);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + page_size - SZ_4K)), PATTERN);
}

TEST_F_TIMEOUT(rules, mmap, HUGETLB_TEST_TIMEOUT)
{
	const int prot = PROT_READ | PROT_WRITE;
	const size_t page_size = self->page_size;
	int fd = self->fd;

	expect_same(mmap(NULL, page_size, prot, MAP_SHARED, fd, 0), 0);
	/* One is rounded up to whole pages. */
	expect_rule(mmap(NULL, SZ_4K, prot, MAP_SHARED, fd, 0), 0, EINVAL);
	expect_rule(mmap(NULL, page_size + SZ_4K, prot, MAP_SHARED, fd, 0), 0, EINVAL);
	expect_same(mmap(NULL, page_size, prot, MAP_SHARED, fd, SZ_4K), EINVAL);
	expect_same(mmap(NULL, page_size, prot, MAP_SHARED, fd, page_size), 0);
	expect_same(mmap((void *)(page_size + SZ_4K), page_size, prot, MAP_SHARED | MAP_FIXED,
			 fd, 0), EINVAL);
	expect_same(mmap(NULL, page_size, prot, MAP_SHARED | MAP_NORESERVE, fd, 0), 0);
	/* It would reserve pages of its own. */
	expect_rule(mmap(NULL, page_size, prot, MAP_PRIVATE | MAP_NORESERVE, fd, 0), 0, EINVAL);
	ASSERT_ALLOCATED(0);
}

TEST_F_TIMEOUT(rules, holes, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem;
	int fd = self->fd;
	long nr_reserved;

	fill_page(mem, page_size);
	ASSERT_ALLOCATED(1);

	/* Part of a page is zeroed by one. */
	expect_rule(fallocate(fd, PUNCH_HOLE, SZ_4K, SZ_4K), 0, EINVAL);
	check_page(mem, page_size, variant->is_gmem ? PATTERN : 0);
	ASSERT_ALLOCATED(1);

	fill_page(mem, page_size);
	expect_rule(madvise(mem + SZ_4K, SZ_4K, MADV_REMOVE), 0, EINVAL);
	check_page(mem, page_size, variant->is_gmem ? PATTERN : 0);
	ASSERT_ALLOCATED(1);

	/* The page that is given back isn't reserved any more by one. */
	nr_reserved = variant->is_gmem ? NR_PAGES : NR_PAGES - 1;
	expect_same(fallocate(fd, PUNCH_HOLE, 0, page_size), 0);
	TEST_ASSERT_POOL(page_size, self->pool, 0, nr_reserved);
	fill_page(mem, page_size);
	expect_same(madvise(mem, page_size, MADV_REMOVE), 0);
	TEST_ASSERT_POOL(page_size, self->pool, 0, nr_reserved);

	expect_rule(fallocate(fd, ALLOCATE, 0, SZ_4K), 0, EINVAL);
	expect_same(fallocate(fd, ALLOCATE, 0, page_size), 0);
	TEST_ASSERT_POOL(page_size, self->pool, 1, NR_PAGES - 1);
	expect_rule(fallocate(fd, 0, 0, page_size), 0, EOPNOTSUPP);
}

TEST_F_TIMEOUT(rules, ranges, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = self->size;
	const int maymove = MREMAP_MAYMOVE, fixed = MREMAP_MAYMOVE | MREMAP_FIXED;
	const unsigned long nodes = 1;
	char *mem = self->mem, *area, *target;

	fill_page(mem, page_size);
	area = kvm_mmap(4 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	target = align_ptr_up(area, page_size);

	expect_rule(mremap(mem, size, 2 * size, maymove), EINVAL, EFAULT);
	expect_rule(mremap(mem, 0, size, maymove), EINVAL, EFAULT);
	expect_rule(mremap(mem, size, size - SZ_4K, maymove), 0, EINVAL);
	expect_same(mremap(mem, size, size, maymove | MREMAP_DONTUNMAP, 0), EINVAL);
	expect_same(mremap(mem, size, size, fixed, target + SZ_4K), EINVAL);
	expect_same(mremap(mem + SZ_4K, page_size, page_size, fixed, target), EINVAL);
	expect_same(mremap(mem, page_size, page_size, fixed, target), 0);
	check_page(target, page_size, PATTERN);
	expect_same(mremap(target, page_size, page_size, fixed, mem), 0);
	check_page(mem, page_size, PATTERN);
	expect_same(mremap(mem, size, page_size, 0), 0);
	check_page(mem, page_size, PATTERN);

	expect_same(mprotect(mem, SZ_4K, PROT_READ), EINVAL);
	expect_same(mprotect(mem + SZ_4K, page_size - SZ_4K, PROT_READ), EINVAL);
	expect_same(mprotect(mem, page_size, PROT_READ), 0);
	expect_same(mprotect(mem, page_size, PROT_READ | PROT_WRITE), 0);
	expect_same(munmap(mem, SZ_4K), EINVAL);
	expect_same(munmap(mem + SZ_4K, page_size - SZ_4K), EINVAL);
	expect_same(mbind(mem, SZ_4K, MPOL_BIND, &nodes, 8, 0), EINVAL);

	expect_same(syscall(__NR_remap_file_pages, mem, page_size, 0, 0, 0), 0);
	expect_same(syscall(__NR_remap_file_pages, mem, SZ_4K, 0, 0, 0), EINVAL);
	check_page(mem, page_size, PATTERN);
	expect_same(munmap(mem, page_size), 0);
}

TEST_F_TIMEOUT(rules, advice, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem;

	fill_page(mem, page_size);

	expect_same(madvise(mem, page_size, MADV_DONTDUMP), 0);
	expect_same(madvise(mem, page_size, MADV_DODUMP), 0);

	/* It's a shared mapping: either way, nothing is lost. */
	expect_rule(madvise(mem + SZ_4K, SZ_4K, MADV_DONTNEED), EINVAL, 0);
	expect_rule(madvise(mem + SZ_4K, SZ_4K, MADV_DONTNEED_LOCKED), EINVAL, 0);
	expect_same(madvise(mem, SZ_4K, MADV_DONTNEED), 0);
	expect_same(madvise(mem, page_size, MADV_DONTNEED), 0);
	expect_same(madvise(mem, page_size, MADV_DONTNEED_LOCKED), 0);
	check_page(mem, page_size, PATTERN);

	expect_same(madvise(mem, page_size, MADV_NORMAL), 0);
	expect_same(madvise(mem, page_size, MADV_RANDOM), 0);
	expect_same(madvise(mem, page_size, MADV_SEQUENTIAL), 0);
	expect_same(madvise(mem, SZ_4K, MADV_RANDOM), EINVAL);
	expect_same(madvise(mem, page_size, MADV_NORMAL), 0);
	expect_same(madvise(mem, page_size, MADV_WILLNEED), 0);
	expect_same(madvise(mem, page_size, MADV_COLD), EINVAL);
	expect_same(madvise(mem, page_size, MADV_PAGEOUT), EINVAL);
	expect_same(madvise(mem, page_size, MADV_FREE), EINVAL);
	expect_same(madvise(mem, page_size, MADV_HUGEPAGE), 0);
	expect_same(madvise(mem, page_size, MADV_NOHUGEPAGE), 0);
	expect_same(madvise(mem, page_size, MADV_COLLAPSE), EINVAL);
	expect_same(madvise(mem, page_size, MADV_MERGEABLE), 0);
	expect_same(madvise(mem, page_size, MADV_UNMERGEABLE), 0);
	expect_same(madvise(mem, page_size, MADV_WIPEONFORK), EINVAL);
	expect_same(madvise(mem, page_size, MADV_KEEPONFORK), 0);
	expect_same(madvise(mem, page_size, MADV_GUARD_INSTALL), EINVAL);
	expect_same(madvise(mem, page_size, MADV_GUARD_REMOVE), EINVAL);
	check_page(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);

	expect_same(madvise(mem + SZ_4K, SZ_4K, MADV_POPULATE_READ), 0);
	expect_same(madvise(mem + SZ_4K, SZ_4K, MADV_POPULATE_WRITE), 0);
	check_page(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);

	/* There's no way back from this one. */
	expect_same(madvise(mem, page_size, MADV_DONTFORK), 0);
	expect_same(madvise(mem, page_size, MADV_DOFORK), EINVAL);
}

TEST_F_TIMEOUT(rules, process_madvise, HUGETLB_TEST_TIMEOUT)
{
	struct iovec iov = { .iov_base = self->mem, .iov_len = self->page_size };
	pid_t pid;
	int pidfd;

	fill_page(self->mem, self->page_size);
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		READ_ONCE(*self->mem);
		pause();
		_exit(0);
	}
	pidfd = syscall(__NR_pidfd_open, pid, 0);
	TEST_ASSERT(pidfd >= 0, "pidfd_open() failed, errno %d", errno);

	expect_same(syscall(__NR_process_madvise, pidfd, &iov, 1, MADV_WILLNEED, 0), 0);
	expect_same(syscall(__NR_process_madvise, pidfd, &iov, 1, MADV_COLD, 0), EINVAL);
	expect_same(syscall(__NR_process_madvise, pidfd, &iov, 1, MADV_PAGEOUT, 0), EINVAL);
	expect_same(syscall(__NR_process_madvise, pidfd, &iov, 1, MADV_COLLAPSE, 0), EINVAL);
	check_page(self->mem, self->page_size, PATTERN);

	kill(pid, SIGKILL);
	TEST_ASSERT(waitpid(pid, NULL, 0) == pid, "No child");
}

TEST_F_TIMEOUT(rules, locking, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem;

	/* All of a page is populated, and not locked. */
	expect_same(mlock(mem + SZ_4K, SZ_4K), 0);
	ASSERT_ALLOCATED(1);
	fill_page(mem, page_size);
	expect_same(madvise(mem, page_size, MADV_DONTNEED), 0);
	expect_same(munlock(mem + SZ_4K, SZ_4K), 0);
	expect_same(mlock2(mem, page_size, MLOCK_ONFAULT), 0);
	expect_same(munlock(mem, page_size), 0);
	check_page(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(rules, msync, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem;

	fill_page(mem, page_size);
	expect_same(msync(mem, page_size, MS_ASYNC), 0);
	expect_same(msync(mem, page_size, MS_INVALIDATE), 0);
	expect_rule(msync(mem, page_size, MS_SYNC), 0, EINVAL);
	expect_rule(msync(mem, SZ_4K, MS_SYNC), 0, EINVAL);
	expect_rule(fsync(self->fd), 0, EINVAL);
	check_page(mem, page_size, PATTERN);
}

TEST_F_TIMEOUT(rules, userfaultfd, HUGETLB_TEST_TIMEOUT)
{
	const u64 modes[] = {
		UFFDIO_REGISTER_MODE_MISSING,
		UFFDIO_REGISTER_MODE_MINOR,
		UFFDIO_REGISTER_MODE_WP,
	};
	struct uffdio_api api = { .api = UFFD_API };
	int uffd, i;

	uffd = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		SKIP(return, "no userfaultfd, errno %d", errno);

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		struct uffdio_register reg = {
			.range = { .start = (u64)self->mem, .len = self->size },
			.mode = modes[i],
		};

		if (modes[i] == UFFDIO_REGISTER_MODE_WP &&
		    !(api.features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM))
			continue;

		expect_rule(ioctl(uffd, UFFDIO_REGISTER, &reg), 0, EINVAL);
		ioctl(uffd, UFFDIO_UNREGISTER, &reg.range);
	}
}

TEST_F_TIMEOUT(rules, policy, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const int last = get_max_numa_node();
	unsigned long nodes = 1ul << last, got = 0;
	char *mem = self->mem, *other;
	int node = -1, mode = -1;

	/* The policy is that of the mapping for one, that of the file for the other. */
	expect_same(mbind(mem, page_size, MPOL_BIND, &nodes, 8, 0), 0);
	expect_same(get_mempolicy(&mode, &got, 64, mem, MPOL_F_ADDR), 0);
	TEST_ASSERT_EQ(mode, MPOL_BIND);
	TEST_ASSERT_EQ(got, nodes);
	other = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	expect_same(get_mempolicy(&mode, NULL, 0, other, MPOL_F_ADDR), 0);
	TEST_ASSERT_EQ(mode, variant->is_gmem ? MPOL_BIND : MPOL_DEFAULT);
	expect_same(get_mempolicy(&mode, NULL, 0, other + page_size, MPOL_F_ADDR), 0);
	TEST_ASSERT_EQ(mode, MPOL_DEFAULT);

	/* Where a page is.  If it's nowhere yet, it is from now on. */
	expect_same(get_mempolicy(&node, NULL, 0, mem + SZ_4K, MPOL_F_NODE | MPOL_F_ADDR), 0);
	TEST_ASSERT_EQ(node, last);
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(rules, core_dump, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	static const struct {
		long filter;
		int advice;
		bool is_dumped;
	} dumps[] = {
		{ 0x40, 0, true },
		{ 0x3f, 0, false },
		{ 0x7f, MADV_DONTDUMP, false },
		{ 0x7f, MADV_DODUMP, true },
	};
	char dir[] = "/tmp/guest_memfd.XXXXXX", core[64];
	u64 *word = (u64 *)(self->mem + SZ_4K);
	int i;

	if (page_size > SZ_2M)
		SKIP(return, "the same for all files");
	if (access(CORE_PATTERN, W_OK))
		SKIP(return, "no " CORE_PATTERN ", see CONFIG_COREDUMP");

	for (i = 0; i < SZ_4K / sizeof(*word); i++)
		word[i] = PATTERN;
	TEST_ASSERT(mkdtemp(dir), "mkdtemp() failed");
	snprintf(core, sizeof(core), "%s/core", dir);

	for (i = 0; i < ARRAY_SIZE(dumps); i++) {
		if (dumps[i].advice)
			expect_same(madvise(self->mem, self->size, dumps[i].advice), 0);
		TEST_ASSERT(!write_long("/proc/self/coredump_filter", dumps[i].filter),
			    "No coredump_filter");
		dump_core(core);
		TEST_ASSERT(file_has_page(core, PATTERN) == dumps[i].is_dumped,
			    "Dump %d %s the memory", i, dumps[i].is_dumped ? "lacks" : "has");
		unlink(core);

		/* The second page still is a hole. */
		ASSERT_ALLOCATED(1);
	}
	rmdir(dir);
}

/* What can't be read by the kernel, of whatever page size, can't be dumped. */
TEST_F_TIMEOUT(rules, no_direct_map, HUGETLB_TEST_TIMEOUT)
{
	u64 flags = GUEST_MEMFD_FLAG_NO_DIRECT_MAP | SHARED_MEMORY;
	int node, fd, i;
	char *mem;

	if (!variant->is_gmem || self->page_size > SZ_2M)
		SKIP(return, "the same for all files");
	if (!(vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_NO_DIRECT_MAP))
		SKIP(return, "no GUEST_MEMFD_FLAG_NO_DIRECT_MAP");

	for (i = 0; i < 2; i++) {
		fd = vm_create_guest_memfd(self->vm, SZ_2M, flags);
		mem = kvm_mmap(SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		fill_page(mem, SZ_2M);
		expect_same(madvise(mem, SZ_2M, MADV_DODUMP), EINVAL);
		expect_same(madvise(mem, SZ_2M, MADV_DONTDUMP), 0);
		expect_same(madvise(mem, SZ_2M, MADV_DODUMP), EINVAL);
		expect_same(get_mempolicy(&node, NULL, 0, mem, MPOL_F_NODE | MPOL_F_ADDR), EFAULT);
		expect_same(madvise(mem, SZ_2M, MADV_POPULATE_READ), EINVAL);
		check_page(mem, SZ_2M, PATTERN);
		kvm_munmap(mem, SZ_2M);
		kvm_close(fd);
		flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(SZ_2M);
	}
}

TEST_HARNESS_MAIN
