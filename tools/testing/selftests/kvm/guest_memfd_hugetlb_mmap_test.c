// SPDX-License-Identifier: GPL-2.0
/*
 * guest_memfd with HugeTLB pages: everything about mapping them to user space
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/align.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/stddef.h>
#include <linux/io_uring.h>
#include <linux/sizes.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <sys/wait.h>

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

FIXTURE(map) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
	size_t size;
	u64 flags;
	char *mem;
	int fd;
};

FIXTURE_VARIANT(map) {
	size_t page_size;
};

FIXTURE_VARIANT_ADD(map, 2M) {
	.page_size = SZ_2M,
};

FIXTURE_VARIANT_ADD(map, 1G) {
	.page_size = SZ_1G,
};

FIXTURE_SETUP(map)
{
	const char *missing = hugetlb_missing(variant->page_size, NR_PAGES);

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->size = NR_PAGES * self->page_size;
	self->pool = hugetlb_pool_read(self->page_size);
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | SHARED_MEMORY |
		      hugetlb_size_flag(self->page_size);
	self->vm = vm_create_barebones();
	self->fd = vm_create_guest_memfd(self->vm, self->size, self->flags);
	self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
}

FIXTURE_TEARDOWN_PARENT(map)
{
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

/* Zeroing is what takes time.  Those who can't see a difference go easy on 1G. */
#define is_cheap	(self->page_size <= SZ_2M)

/* How many of the file's pages are allocated.  The others are reserved. */
#define ASSERT_ALLOCATED(_nr_pages)						\
do {										\
	long __nr = (_nr_pages);						\
										\
	TEST_ASSERT_POOL(self->page_size, self->pool, __nr, NR_PAGES - __nr);	\
} while (0)

#define expect_error(_call, _errno)						\
do {										\
	long __errno = (_errno), __r = (long)(_call);				\
										\
	TEST_ASSERT(__r == -1 && errno == __errno,				\
		    "%s: wanted errno %ld, got 0x%lx, errno %d", #_call,	\
		    __errno, __r, errno);					\
} while (0)

#define EXPECT_SIGNAL(_signal, _action)						\
do {										\
	struct sigaction sa_old, sa_new = { .sa_handler = expect_sigbus_handler }; \
	int __signal = _signal;							\
										\
	sigaction(__signal, &sa_new, &sa_old);					\
	if (!sigsetjmp(expect_sigbus_jmpbuf, 1)) {				\
		_action;							\
		TEST_FAIL("'%s' should have triggered %s", #_action, #_signal);	\
	}									\
	sigaction(__signal, &sa_old, NULL);					\
} while (0)

static void write_every_4k(char *mem, size_t size, u64 value)
{
	size_t i;

	for (i = 0; i < size; i += SZ_4K)
		WRITE_ONCE(*(u64 *)(mem + i), value + i);
}

static void check_every_4k(const char *mem, size_t size, u64 value)
{
	size_t i;

	for (i = 0; i < size; i += SZ_4K) {
		u64 got = READ_ONCE(*(u64 *)(mem + i));

		TEST_ASSERT(got == value + i, "Wanted 0x%lx at offset 0x%lx, got 0x%lx",
			    (unsigned long)(value + i), i, (unsigned long)got);
	}
}

static long minor_faults(void)
{
	/* Written to, for getrusage() not to fault it in after it has counted. */
	struct rusage usage = {};

	TEST_ASSERT(!getrusage(RUSAGE_THREAD, &usage), "getrusage() failed");
	return usage.ru_minflt;
}

/* One entry of the page table maps all of it, if one fault does. */
#define ASSERT_ONE_FAULT(_action)						\
do {										\
	long __faults = minor_faults();						\
										\
	_action;								\
	__faults = minor_faults() - __faults;					\
	TEST_ASSERT(__faults == 1, "%s: wanted 1 fault, got %ld", #_action, __faults); \
} while (0)

/* In kB, of the VMA that begins at this address */
static long smaps_kb(const void *mem, const char *field)
{
	char line[256], format[64];
	bool found = false;
	long value = -1;
	FILE *file;

	file = fopen("/proc/self/smaps", "r");
	TEST_ASSERT(file, "Can't open /proc/self/smaps");

	snprintf(format, sizeof(format), "%s: %%ld kB", field);
	while (fgets(line, sizeof(line), file)) {
		unsigned long begin, end;

		if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
			found = begin == (unsigned long)mem;
		else if (found && sscanf(line, format, &value) == 1)
			break;
	}
	fclose(file);
	return value;
}

/* What all mappings of the process have of huge pages, without a walk */
static long hugetlb_kb(void)
{
	long value = -1;
	char line[256];
	FILE *file;

	file = fopen("/proc/self/status", "r");
	TEST_ASSERT(file, "Can't open /proc/self/status");
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "HugetlbPages: %ld kB", &value) == 1)
			break;
	fclose(file);
	TEST_ASSERT(value >= 0, "No HugetlbPages in /proc/self/status");
	return value;
}

#define ASSERT_HUGETLB(_size)							\
	TEST_ASSERT_EQ(hugetlb_kb(), (_size) / SZ_1K)

TEST_F_TIMEOUT(map, leaves, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem;

	TEST_ASSERT(IS_ALIGNED((unsigned long)mem, page_size), "Mapped at %p", mem);
	ASSERT_ALLOCATED(0);

	/* The first one also pays for what the test itself needs. */
	write_every_4k(mem, page_size, PATTERN);
	check_every_4k(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);

	kvm_madvise(mem, self->size, MADV_DONTNEED);
	ASSERT_ONE_FAULT(check_every_4k(mem, page_size, PATTERN));
	write_every_4k(mem, page_size, ~PATTERN);
	kvm_madvise(mem, self->size, MADV_DONTNEED);
	ASSERT_ONE_FAULT(write_every_4k(mem, page_size, PATTERN));
	check_every_4k(mem, page_size, PATTERN);

	/* In the middle of the page, and in another mapping */
	kvm_munmap(mem, self->size);
	mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	ASSERT_ONE_FAULT(READ_ONCE(mem[page_size / 2 + 12345]));
	ASSERT_ALLOCATED(1);

	TEST_ASSERT_EQ(smaps_kb(mem, "KernelPageSize"), page_size / SZ_1K);
	TEST_ASSERT_EQ(smaps_kb(mem, "MMUPageSize"), page_size / SZ_1K);
	TEST_ASSERT_EQ(smaps_kb(mem, "AnonHugePages"), 0);
	check_every_4k(mem, page_size, PATTERN);
}

/* What the kernel has to say about a mapping, and that asking does it no harm */
TEST_F_TIMEOUT(map, introspection, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	struct page_region region = {};
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.start = (u64)self->mem,
		.end = (u64)self->mem + self->size,
		.vec = (u64)&region,
		.vec_len = 1,
		.category_mask = PAGE_IS_PRESENT | PAGE_IS_HUGE,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_HUGE,
	};
	unsigned char *vec = malloc(self->size / SZ_4K);
	u64 pfn;
	int fd;

	write_every_4k(self->mem, page_size, PATTERN);
	ASSERT_HUGETLB(page_size);
	TEST_ASSERT_EQ(smaps_kb(self->mem, "Rss"), 0);
	TEST_ASSERT_EQ(smaps_kb(self->mem, "Private_Hugetlb"), page_size / SZ_1K);
	ASSERT_HUGETLB(page_size);

	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	TEST_ASSERT(!mincore(self->mem, self->size, vec), "mincore() failed");
	TEST_ASSERT(vec[0] & vec[page_size / SZ_4K - 1] & 1, "Not in core");
	TEST_ASSERT(!((vec[page_size / SZ_4K] | vec[self->size / SZ_4K - 1]) & 1), "In core");

	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	fd = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	TEST_ASSERT_EQ(ioctl(fd, PAGEMAP_SCAN, &scan), 1);
	TEST_ASSERT(region.start == (u64)self->mem &&
		    region.end == (u64)self->mem + page_size,
		    "Huge page at %p, PAGEMAP_SCAN found it at 0x%llx to 0x%llx",
		    self->mem, region.start, region.end);
	ASSERT_HUGETLB(page_size);

	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	ASSERT_HUGETLB(page_size);
	pfn = mem_to_pfn(self->mem + page_size / 2);
	TEST_ASSERT(pfn % (page_size / SZ_4K) == page_size / SZ_4K / 2,
		    "The middle of the huge page has pfn 0x%lx", (unsigned long)pfn);
	ASSERT_HUGETLB(page_size);

	/* However it went, the page was not lost, and is mapped by one entry again. */
	kvm_madvise(self->mem, self->size, MADV_DONTNEED);
	ASSERT_ONE_FAULT(check_every_4k(self->mem, page_size, PATTERN));
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(map, bad_mmap, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = self->size;
	const int prot = PROT_READ | PROT_WRITE;
	char *area, *aligned, *mem;
	int private_fd, i;

	expect_error(mmap(NULL, size, prot, MAP_PRIVATE, self->fd, 0), EINVAL);
	expect_error(mmap(NULL, size, PROT_READ, MAP_PRIVATE, self->fd, 0), EINVAL);

	expect_error(mmap(NULL, 0, prot, MAP_SHARED, self->fd, 0), EINVAL);
	expect_error(mmap(NULL, 4096, prot, MAP_SHARED, self->fd, 0), EINVAL);
	expect_error(mmap(NULL, page_size - 4096, prot, MAP_SHARED, self->fd, 0), EINVAL);
	expect_error(mmap(NULL, page_size + 4096, prot, MAP_SHARED, self->fd, 0), EINVAL);
	expect_error(mmap(NULL, page_size, prot, MAP_SHARED, self->fd, 4096), EINVAL);
	expect_error(mmap(NULL, page_size, prot, MAP_SHARED, self->fd, page_size / 2), EINVAL);
	expect_error(mmap(NULL, page_size, prot, MAP_SHARED, self->fd, page_size - 4096), EINVAL);
	expect_error(mmap(NULL, 1ul << 62, prot, MAP_SHARED, self->fd, 0), ENOMEM);
	expect_error(mmap(NULL, -page_size, prot, MAP_SHARED, self->fd, 0), ENOMEM);

	/* Fixed addresses, where there is something else already */
	area = kvm_mmap(3 * page_size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	aligned = align_ptr_up(area, page_size);
	WRITE_ONCE(aligned[4096], 1);
	expect_error(mmap(aligned + 4096, page_size, prot, MAP_SHARED | MAP_FIXED,
			  self->fd, 0), EINVAL);
	expect_error(mmap(aligned + page_size / 2, page_size, prot, MAP_SHARED | MAP_FIXED,
			  self->fd, 0), EINVAL);
	expect_error(mmap(aligned + 4096, page_size, prot, MAP_SHARED | MAP_FIXED_NOREPLACE,
			  self->fd, 0), EINVAL);
	expect_error(mmap(aligned, page_size, prot, MAP_SHARED | MAP_FIXED_NOREPLACE,
			  self->fd, 0), EEXIST);
	TEST_ASSERT_EQ(aligned[4096], 1);

	/* Addresses that aren't fixed are only hints. */
	for (i = 0; i < 2; i++) {
		kvm_munmap(area, 3 * page_size);
		mem = mmap(aligned + i * 4096, page_size, prot, MAP_SHARED, self->fd, 0);
		TEST_ASSERT(mem != MAP_FAILED && IS_ALIGNED((unsigned long)mem, page_size),
			    "Mapped at %p, errno %d", mem, errno);
		kvm_munmap(mem, page_size);
		area = kvm_mmap(3 * page_size, prot,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
		aligned = align_ptr_up(area, page_size);
	}

	/* The mapping of the fixture is unharmed, and so is the file. */
	expect_error(mmap(self->mem + 4096, page_size, prot, MAP_SHARED | MAP_FIXED,
			  self->fd, 0), EINVAL);
	expect_error(mmap(self->mem + 4096, 4096, prot,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), EINVAL);
	expect_error(syscall(__NR_remap_file_pages, self->mem, 4096, 0, 1, 0), EINVAL);
	ASSERT_ALLOCATED(0);
	WRITE_ONCE(self->mem[page_size], 1);
	ASSERT_ALLOCATED(1);

	/* No mapping at all without GUEST_MEMFD_FLAG_MMAP */
	kvm_munmap(self->mem, size);
	kvm_close(self->fd);
	private_fd = vm_create_guest_memfd(self->vm, size, GUEST_MEMFD_FLAG_HUGETLB |
					   hugetlb_size_flag(page_size));
	expect_error(mmap(NULL, size, prot, MAP_SHARED, private_fd, 0), ENODEV);
	expect_error(mmap(NULL, page_size, PROT_READ, MAP_SHARED, private_fd, 0), ENODEV);
	ASSERT_ALLOCATED(0);
}

TEST_F_TIMEOUT(map, not_shared, HUGETLB_TEST_TIMEOUT)
{
	int fd;
	char *mem;

	kvm_munmap(self->mem, self->size);
	kvm_close(self->fd);
	fd = vm_create_guest_memfd(self->vm, self->size,
				   self->flags & ~GUEST_MEMFD_FLAG_INIT_SHARED);
	mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	TEST_EXPECT_SIGBUS(READ_ONCE(*mem));
	TEST_EXPECT_SIGBUS(WRITE_ONCE(mem[self->size - 1], 1));
	expect_error(madvise(mem, self->size, MADV_POPULATE_WRITE), EFAULT);
	ASSERT_ALLOCATED(0);

	/* Also if there is memory */
	kvm_fallocate(fd, ALLOCATE, 0, self->page_size);
	TEST_EXPECT_SIGBUS(READ_ONCE(*mem));
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(map, beyond_end, HUGETLB_TEST_TIMEOUT)
{
	const size_t size = self->size;
	char *mem;

	kvm_munmap(self->mem, size);
	mem = kvm_mmap(2 * size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);

	TEST_EXPECT_SIGBUS(READ_ONCE(mem[size]));
	TEST_EXPECT_SIGBUS(WRITE_ONCE(mem[2 * size - 1], 1));
	ASSERT_ALLOCATED(0);
	WRITE_ONCE(mem[size - 1], 1);
	ASSERT_ALLOCATED(1);
	TEST_EXPECT_SIGBUS(WRITE_ONCE(mem[size], 1));
	ASSERT_ALLOCATED(1);

	mem = __kvm_mmap(size, PROT_READ, MAP_SHARED, self->fd, size);
	TEST_EXPECT_SIGBUS(READ_ONCE(mem[0]));
	ASSERT_ALLOCATED(1);
}

/* A page table hangs where the huge page is to be mapped, until it is replaced. */
TEST_F_TIMEOUT(map, over_small_pages, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	char *area, *aligned, *mem;
	size_t i;

	write_every_4k(self->mem, page_size, PATTERN);

	area = kvm_mmap(3 * page_size, PROT_READ | PROT_WRITE, flags, -1);
	aligned = align_ptr_up(area, page_size);
	kvm_madvise(area, 3 * page_size, MADV_NOHUGEPAGE);
	for (i = 0; i < page_size; i += page_size / 16)
		WRITE_ONCE(aligned[i], 1);
	TEST_ASSERT(!mprotect(aligned + page_size / 2, 4096, PROT_READ), "mprotect() failed");

	mem = mmap(aligned, page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		   self->fd, 0);
	TEST_ASSERT(mem == aligned, "mmap(MAP_FIXED) failed, errno %d", errno);
	ASSERT_ONE_FAULT(check_every_4k(mem, page_size, PATTERN));

	/* And the other way round */
	mem = mmap(aligned, page_size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0);
	TEST_ASSERT(mem == aligned, "mmap(MAP_FIXED) failed, errno %d", errno);
	for (i = 0; i < page_size; i += page_size / 16)
		TEST_ASSERT_EQ(READ_ONCE(mem[i]), 0);

	mem = mremap(self->mem, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED, aligned);
	TEST_ASSERT(mem == aligned, "mremap(MREMAP_FIXED) failed, errno %d", errno);
	check_every_4k(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(map, fork, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	u64 *mem = (u64 *)self->mem;
	int status, i;
	pid_t pid;

	/* The page of the parent is the page of the child, in both directions. */
	for (i = 0; i < 3; i++) {
		WRITE_ONCE(mem[i], PATTERN);
		pid = fork();
		if (!pid) {
			TEST_ASSERT_EQ(READ_ONCE(mem[i]), PATTERN);
			WRITE_ONCE(mem[i], ~PATTERN);
			kvm_munmap(mem, page_size);
			_exit(0);
		}
		TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
		TEST_ASSERT_EQ(READ_ONCE(mem[i]), ~PATTERN);
		ASSERT_ALLOCATED(1);
	}

	/* A page that the child allocates */
	if (is_cheap) {
		pid = fork();
		if (!pid) {
			write_every_4k(self->mem + page_size, page_size, PATTERN);
			_exit(0);
		}
		TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
		check_every_4k(self->mem + page_size, page_size, PATTERN);
		ASSERT_ALLOCATED(2);
		kvm_fallocate(self->fd, PUNCH_HOLE, page_size, page_size);
	}

	/* The child is the last one that has the page mapped. */
	pid = fork();
	if (!pid) {
		while (getppid() != 1 && READ_ONCE(mem[0]) != 42)
			;
		TEST_ASSERT_EQ(READ_ONCE(mem[2]), ~PATTERN);
		_exit(0);
	}
	WRITE_ONCE(mem[0], 42);
	kvm_munmap(self->mem, self->size);
	kvm_close(self->fd);
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);
}

TEST_F_TIMEOUT(map, mremap, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = self->size;
	char *mem = self->mem, *area, *target;

	write_every_4k(mem, page_size, PATTERN);
	area = kvm_mmap(6 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	target = align_ptr_up(area, page_size);

	/* What's not allowed changes nothing. */
	expect_error(mremap(mem, size, 2 * size, MREMAP_MAYMOVE), EFAULT);
	expect_error(mremap(mem, size, 2 * size, 0), EFAULT);
	expect_error(mremap(mem, size, size + 4096, MREMAP_MAYMOVE), EFAULT);
	expect_error(mremap(mem, page_size, size, MREMAP_MAYMOVE), EFAULT);
	expect_error(mremap(mem, 0, size, MREMAP_MAYMOVE), EFAULT);
	expect_error(mremap(mem, size, size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0), EINVAL);
	expect_error(mremap(mem, size, size - 4096, MREMAP_MAYMOVE), EINVAL);
	expect_error(mremap(mem, size, 4096, 0), EINVAL);
	expect_error(mremap(mem, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target + 4096),
		     EINVAL);
	expect_error(mremap(mem, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
			    target + page_size / 2), EINVAL);
	expect_error(mremap(mem + 4096, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED,
			    target), EINVAL);
	expect_error(mremap(mem, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, target), EINVAL);
	ASSERT_ALLOCATED(1);
	check_every_4k(mem, page_size, PATTERN);

	/* All of it, over something else */
	TEST_ASSERT(mremap(mem, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target,
		    "Can't move, errno %d", errno);
	EXPECT_SIGNAL(SIGSEGV, READ_ONCE(*mem));
	mem = target;
	check_every_4k(mem, page_size, PATTERN);

	/* One page of it */
	target += 3 * page_size;
	TEST_ASSERT(mremap(mem, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED,
			   target) == target, "Can't move, errno %d", errno);
	EXPECT_SIGNAL(SIGSEGV, READ_ONCE(*mem));
	check_every_4k(target, page_size, PATTERN);

	/* And back again, such that there is one mapping once more */
	TEST_ASSERT(mremap(target, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED,
			   mem) == mem, "Can't move, errno %d", errno);
	check_every_4k(mem, page_size, PATTERN);

	/* Less of it */
	TEST_ASSERT(mremap(mem, size, page_size, 0) == mem, "Can't shrink, errno %d", errno);
	check_every_4k(mem, page_size, PATTERN);
	EXPECT_SIGNAL(SIGSEGV, READ_ONCE(mem[page_size]));
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(map, partial_munmap, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = self->size;
	char *mem = self->mem;

	write_every_4k(mem + page_size, page_size, PATTERN);

	expect_error(munmap(mem + page_size, 4096), EINVAL);
	expect_error(munmap(mem + page_size + 4096, 4096), EINVAL);
	expect_error(munmap(mem + page_size + 4096, page_size - 4096), EINVAL);
	expect_error(munmap(mem, size - 4096), EINVAL);
	expect_error(munmap(mem + page_size - 4096, 8192), EINVAL);
	check_every_4k(mem + page_size, page_size, PATTERN);
	kvm_madvise(mem, size, MADV_DONTNEED);
	check_every_4k(mem + page_size, page_size, PATTERN);
	ASSERT_ALLOCATED(1);

	kvm_munmap(mem, page_size);
	EXPECT_SIGNAL(SIGSEGV, READ_ONCE(*mem));
	check_every_4k(mem + page_size, page_size, PATTERN);
	ASSERT_ALLOCATED(1);

	/* The memory is the file's, not the mapping's. */
	kvm_munmap(mem + page_size, page_size);
	ASSERT_ALLOCATED(1);
	mem = kvm_mmap(size, PROT_READ, MAP_SHARED, self->fd);
	check_every_4k(mem + page_size, page_size, PATTERN);
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(map, mprotect, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = self->size;
	char *mem = self->mem;
	int status;
	pid_t pid;
	u64 val;

	write_every_4k(mem, page_size, PATTERN);

	expect_error(mprotect(mem, 4096, PROT_READ), EINVAL);
	expect_error(mprotect(mem + 4096, 4096, PROT_READ), EINVAL);
	expect_error(mprotect(mem + 4096, page_size - 4096, PROT_NONE), EINVAL);
	expect_error(mprotect(mem, page_size + 4096, PROT_READ), EINVAL);
	write_every_4k(mem, page_size, PATTERN);

	TEST_ASSERT(!mprotect(mem, page_size, PROT_READ), "mprotect() failed");
	check_every_4k(mem, page_size, PATTERN);
	EXPECT_SIGNAL(SIGSEGV, WRITE_ONCE(mem[page_size - 1], 0));
	EXPECT_SIGNAL(SIGSEGV, WRITE_ONCE(mem[0], 0));

	TEST_ASSERT(!mprotect(mem, size, PROT_NONE), "mprotect() failed");
	EXPECT_SIGNAL(SIGSEGV, READ_ONCE(mem[4096]));
	EXPECT_SIGNAL(SIGSEGV, READ_ONCE(mem[page_size]));
	ASSERT_ALLOCATED(1);

	/* A debugger is let through. */
	pid = fork();
	if (!pid) {
		ptrace(PTRACE_TRACEME);
		raise(SIGSTOP);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status), "No child");
	errno = 0;
	val = ptrace(PTRACE_PEEKDATA, pid, mem, NULL);
	TEST_ASSERT(!errno, "PTRACE_PEEKDATA failed, errno %d", errno);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);

	TEST_ASSERT(!mprotect(mem, size, PROT_READ), "mprotect() failed");
	TEST_ASSERT_EQ(val, READ_ONCE(*(u64 *)mem));
	check_every_4k(mem, page_size, PATTERN);
	EXPECT_SIGNAL(SIGSEGV, WRITE_ONCE(mem[4096], 0));

	TEST_ASSERT(!mprotect(mem, size, PROT_READ | PROT_WRITE), "mprotect() failed");
	check_every_4k(mem, page_size, PATTERN);
	write_every_4k(mem, page_size, ~PATTERN);
	check_every_4k(mem, page_size, ~PATTERN);

	/* First read and then written, in a mapping that always was read-only */
	kvm_munmap(mem, size);
	mem = kvm_mmap(size, PROT_READ, MAP_SHARED, self->fd);
	check_every_4k(mem, page_size, ~PATTERN);
	EXPECT_SIGNAL(SIGSEGV, WRITE_ONCE(mem[0], 0));
	TEST_ASSERT(!mprotect(mem, size, PROT_READ | PROT_WRITE), "mprotect() failed");
	check_every_4k(mem, page_size, ~PATTERN);
	write_every_4k(mem, page_size, PATTERN);
	check_every_4k(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);
}

/* Memory that isn't mapped at the moment is in the file all the same. */
TEST_F_TIMEOUT(map, coredump, HUGETLB_TEST_TIMEOUT)
{
	char dir[] = "/tmp/guest_memfd.XXXXXX", core[64];
	u64 *page = (u64 *)(self->mem + SZ_4K);
	int i;

	if (self->page_size > SZ_2M)
		SKIP(return, "the same for all files");
	if (access(CORE_PATTERN, W_OK))
		SKIP(return, "no " CORE_PATTERN ", see CONFIG_COREDUMP");

	for (i = 0; i < SZ_4K / sizeof(*page); i++)
		page[i] = PATTERN;
	kvm_madvise(self->mem, self->size, MADV_DONTNEED);

	/* Shared HugeTLB memory, too */
	TEST_ASSERT(!write_long("/proc/self/coredump_filter", 0x40), "No coredump_filter");
	TEST_ASSERT(mkdtemp(dir), "mkdtemp() failed");
	snprintf(core, sizeof(core), "%s/core", dir);
	dump_core(core);
	TEST_ASSERT(file_has_page(core, PATTERN), "The core dump lacks the file's memory");
	unlink(core);
	rmdir(dir);
}

TEST_F_TIMEOUT(map, madvise, HUGETLB_TEST_TIMEOUT)
{
	/* None of these has an effect that can be seen. */
	const int no_effect[] = {
		MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED,
		MADV_DONTFORK, MADV_DOFORK, MADV_DONTDUMP, MADV_DODUMP,
		MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE, MADV_MERGEABLE,
		MADV_UNMERGEABLE, MADV_COLD, MADV_PAGEOUT, MADV_FREE,
		MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_DONTNEED,
		MADV_DONTNEED_LOCKED, MADV_GUARD_REMOVE, MADV_POPULATE_READ,
		MADV_POPULATE_WRITE,
	};
	const size_t page_size = self->page_size;
	char *mem = self->mem;
	const struct {
		size_t offset, size;
	} ranges[] = {
		{ 0, page_size },
		{ 0, 4096 },
		{ 4096, 8192 },
		{ page_size / 2, page_size / 4 },
		{ page_size - 4096, 4096 },
	};
	int i, j;

	write_every_4k(mem, page_size, PATTERN);

	for (i = 0; i < ARRAY_SIZE(no_effect); i++) {
		for (j = 0; j < ARRAY_SIZE(ranges); j++) {
			/* Some are refused.  What matters is what comes of it. */
			if (madvise(mem + ranges[j].offset, ranges[j].size, no_effect[i]))
				TEST_ASSERT(errno == EINVAL,
					    "madvise(%d) failed with errno %d",
					    no_effect[i], errno);
			TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + 4096)), PATTERN + 4096);
			WRITE_ONCE(mem[page_size - 1], i);
		}
	}
	check_every_4k(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);

	/* Still huge */
	kvm_madvise(mem + page_size / 2, 4096, MADV_DONTNEED);
	ASSERT_ONE_FAULT(check_every_4k(mem, page_size, PATTERN));

	expect_error(madvise(mem, page_size, MADV_GUARD_INSTALL), EINVAL);
	expect_error(madvise(mem + 4096, 4096, MADV_GUARD_INSTALL), EINVAL);
	check_every_4k(mem, page_size, PATTERN);

	/* REMOVE punches a hole, and like that, it takes whole huge pages only. */
	expect_error(madvise(mem, 4096, MADV_REMOVE), EINVAL);
	expect_error(madvise(mem + 4096, page_size - 4096, MADV_REMOVE), EINVAL);
	check_every_4k(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);
	kvm_madvise(mem, page_size, MADV_REMOVE);
	ASSERT_ALLOCATED(0);

	if (!is_cheap)
		return;

	kvm_madvise(mem, 4096, MADV_POPULATE_READ);
	ASSERT_ALLOCATED(1);
	TEST_ASSERT_MEMORY(mem, page_size, 0);
	kvm_madvise(mem, self->size, MADV_POPULATE_WRITE);
	ASSERT_ALLOCATED(2);
}

/* The policy on transparent huge pages is about other huge pages than these. */
TEST_F_TIMEOUT(map, thp_disabled, HUGETLB_TEST_TIMEOUT)
{
	static const char path[] = "/sys/kernel/mm/transparent_hugepage/enabled";
	const size_t page_size = self->page_size;
	char *mem = self->mem, old[64] = {}, *word;
	int fd = -1, way;

	/* Allocates, and brings in what the test itself needs. */
	kvm_madvise(mem, self->size, MADV_NOHUGEPAGE);
	write_every_4k(mem, page_size, PATTERN);
	check_every_4k(mem, page_size, PATTERN);

	for (way = 0; way < 3; way++) {
		kvm_munmap(mem, self->size);
		mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);

		switch (way) {
		case 0:
			kvm_madvise(mem, self->size, MADV_NOHUGEPAGE);
			break;
		case 1:
			TEST_ASSERT(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0), "prctl() failed");
			break;
		case 2:
			prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
			fd = open(path, O_RDWR);
			if (fd < 0)
				break;
			TEST_ASSERT(read(fd, old, sizeof(old) - 1) > 0, "Can't read %s", path);
			TEST_ASSERT(pwrite(fd, "never", 5, 0) == 5, "Can't write %s", path);
			break;
		}

		ASSERT_ONE_FAULT(check_every_4k(mem, page_size, PATTERN));
		kvm_madvise(mem, self->size, MADV_DONTNEED);
		ASSERT_ONE_FAULT(write_every_4k(mem, page_size, PATTERN));
	}

	/* What was chosen is in brackets. */
	word = strchr(old, '[');
	if (word) {
		word++;
		*strchr(word, ']') = 0;
		TEST_ASSERT(pwrite(fd, word, strlen(word), 0) == strlen(word),
			    "Can't restore %s", path);
	}
	ASSERT_ALLOCATED(1);
}

TEST_F_TIMEOUT(map, mlock, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = self->size;
	char *mem = self->mem;

	/* MCL_ONFAULT or not, mlockall() populates what can't be locked. */
	kvm_munmap(mem + page_size, page_size);

	TEST_ASSERT(!mlock(mem + 4096, 4096), "mlock() failed, errno %d", errno);
	ASSERT_ALLOCATED(1);
	write_every_4k(mem, page_size, PATTERN);
	TEST_ASSERT(!munlock(mem + 4096, 4096), "munlock() failed, errno %d", errno);
	check_every_4k(mem, page_size, PATTERN);

	TEST_ASSERT(!mlock2(mem, page_size, MLOCK_ONFAULT), "mlock2() failed, errno %d", errno);
	TEST_ASSERT(!mlock(mem, page_size), "mlock() failed, errno %d", errno);
	check_every_4k(mem, page_size, PATTERN);
	expect_error(madvise(mem, page_size, MADV_COLD), EINVAL);
	check_every_4k(mem, page_size, PATTERN);
	TEST_ASSERT(!munlock(mem, page_size), "munlock() failed, errno %d", errno);

	TEST_ASSERT(!mlockall(MCL_CURRENT | MCL_ONFAULT), "mlockall() failed, errno %d", errno);
	check_every_4k(mem, page_size, PATTERN);
	expect_error(madvise(mem, page_size, MADV_COLD), EINVAL);
	kvm_munmap(mem, page_size);

	/* New mappings are populated. */
	TEST_ASSERT(!mlockall(MCL_FUTURE), "mlockall() failed, errno %d", errno);
	mem = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	check_every_4k(mem, page_size, PATTERN);
	TEST_ASSERT(!munlockall(), "munlockall() failed, errno %d", errno);
	kvm_munmap(mem, page_size);
	ASSERT_ALLOCATED(1);

	mem = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_LOCKED, self->fd);
	check_every_4k(mem, page_size, PATTERN);
	kvm_munmap(mem, page_size);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, page_size);
	ASSERT_ALLOCATED(0);
	if (is_cheap) {
		mem = kvm_mmap(size, PROT_READ, MAP_SHARED | MAP_POPULATE, self->fd);
		ASSERT_ALLOCATED(2);
		TEST_ASSERT_MEMORY(mem, size, 0);
	}
}

TEST_F_TIMEOUT(map, punch_hole, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem, *other;
	int status, pipes[2][2];
	pid_t pid;
	char c;

	/* Mapped twice here, and once elsewhere */
	other = kvm_mmap(self->size, PROT_READ, MAP_SHARED, self->fd);
	write_every_4k(mem, page_size, PATTERN);
	check_every_4k(other, page_size, PATTERN);

	TEST_ASSERT(!pipe(pipes[0]) && !pipe(pipes[1]), "pipe() failed");
	pid = fork();
	if (!pid) {
		check_every_4k(mem, page_size, PATTERN);
		TEST_ASSERT_EQ(write(pipes[0][1], &c, 1), 1);
		TEST_ASSERT_EQ(read(pipes[1][0], &c, 1), 1);
		TEST_ASSERT_MEMORY(mem, page_size, 0);
		_exit(0);
	}
	TEST_ASSERT_EQ(read(pipes[0][0], &c, 1), 1);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, page_size);
	ASSERT_ALLOCATED(0);

	TEST_ASSERT_EQ(write(pipes[1][1], &c, 1), 1);
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
	ASSERT_ALLOCATED(1);
	TEST_ASSERT_MEMORY(other, page_size, 0);
	TEST_ASSERT_MEMORY(mem, page_size, 0);
	ASSERT_ALLOCATED(1);
}

#define NR_THREADS	8

struct race {
	pthread_barrier_t barrier;
	size_t page_size, size;
	char *mem;
	int nr_rounds;
	bool stop;
	unsigned int next_thread;
};

static void race_join(struct race *race, pthread_t *threads, int nr_threads)
{
	int i;

	for (i = 0; i < nr_threads; i++)
		kvm_pthread_join(threads[i], NULL);
}

static void *fault_thread(void *data)
{
	struct race *race = data;
	int id = __sync_fetch_and_add(&race->next_thread, 1), round;
	u64 *mem = (u64 *)(race->mem + id * (race->page_size / NR_THREADS));

	for (round = 0; round < race->nr_rounds; round++) {
		pthread_barrier_wait(&race->barrier);

		/* Half of the threads read first. */
		if (id & 1)
			TEST_ASSERT_EQ(READ_ONCE(*mem), 0);
		WRITE_ONCE(*mem, round << 8 | id);

		pthread_barrier_wait(&race->barrier);
		pthread_barrier_wait(&race->barrier);
	}
	return NULL;
}

/*
 * All threads fault on one huge page, with not a page to spare in the file or in
 * the pool.  None of them may fail, and all of them get the same page.
 */
TEST_F_TIMEOUT(map, concurrent_faults, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long rest = self->pool.free - self->pool.reserved - 1;
	pthread_t threads[NR_THREADS];
	struct race race = {
		.page_size = page_size,
		.nr_rounds = is_cheap ? 200 : 2,
	};
	int round, i, fd;

	kvm_munmap(self->mem, self->size);
	kvm_close(self->fd);
	fd = vm_create_guest_memfd(self->vm, page_size, self->flags);
	(void)vm_create_guest_memfd(self->vm, rest * page_size, self->flags);
	race.mem = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	pthread_barrier_init(&race.barrier, NULL, NR_THREADS + 1);
	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_create(&threads[i], NULL, fault_thread, &race);

	for (round = 0; round < race.nr_rounds; round++) {
		TEST_ASSERT_POOL(page_size, self->pool, 0, rest + 1);
		pthread_barrier_wait(&race.barrier);

		pthread_barrier_wait(&race.barrier);
		TEST_ASSERT_POOL(page_size, self->pool, 1, rest);
		for (i = 0; i < NR_THREADS; i++)
			TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(race.mem + i * (page_size / NR_THREADS))),
				       (round << 8 | i));
		kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
		pthread_barrier_wait(&race.barrier);
	}
	race_join(&race, threads, NR_THREADS);
}

/* Each thread has a word per 4K for its own, which is as it was, or zero. */
static void *access_thread(void *data)
{
	struct race *race = data;
	u32 id = __sync_fetch_and_add(&race->next_thread, 1);
	struct kvm_random_state random = new_kvm_random_state(id);

	while (!READ_ONCE(race->stop)) {
		size_t offset = kvm_random_u64_in_range(&random, 0, race->size / SZ_4K - 1) * SZ_4K;
		u64 *word = (u64 *)(race->mem + offset) + id, got;

		got = READ_ONCE(*word);
		TEST_ASSERT(!got || got == offset + id + 1, "Wanted 0x%lx or 0, got 0x%lx",
			    offset + id + 1, (unsigned long)got);
		WRITE_ONCE(*word, offset + id + 1);
	}
	return NULL;
}

/* What is removed comes back, hence no access ever fails. */
TEST_F_TIMEOUT(map, punch_while_accessed, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	pthread_t threads[NR_THREADS];
	struct race race = {
		.page_size = page_size,
		.size = self->size,
		.mem = self->mem,
	};
	const int nr_rounds = is_cheap ? 500 : 3;
	int i;

	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_create(&threads[i], NULL, access_thread, &race);

	for (i = 0; i < nr_rounds; i++) {
		kvm_fallocate(self->fd, PUNCH_HOLE, i % NR_PAGES * page_size, page_size);
		if (!is_cheap)
			READ_ONCE(*(u64 *)(self->mem + i % NR_PAGES * page_size));
		else if (i % 8 == 7)
			kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
	}
	WRITE_ONCE(race.stop, true);
	race_join(&race, threads, NR_THREADS);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
	ASSERT_ALLOCATED(0);
}

static void *check_thread(void *data)
{
	struct race *race = data;
	u32 id = __sync_fetch_and_add(&race->next_thread, 1), i;
	struct kvm_random_state random = new_kvm_random_state(id);

	for (i = 1; !READ_ONCE(race->stop); i++) {
		u64 *word = (u64 *)(race->mem + id * SZ_4K), *other;

		WRITE_ONCE(*word, i);
		other = word + kvm_random_u64_in_range(&random, 1, SZ_4K / sizeof(*word) - 1);
		TEST_ASSERT_EQ(READ_ONCE(*other), PATTERN);
		TEST_ASSERT_EQ(READ_ONCE(*word), i);
	}
	return NULL;
}

static void read_file(const char *path)
{
	static char buf[SZ_64K];
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		return;
	while (read(fd, buf, sizeof(buf)) > 0)
		;
	kvm_close(fd);
}

/* Those who walk page tables meet huge entries come and go. */
TEST_F_TIMEOUT(map, walk_while_accessed, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	pthread_t threads[NR_THREADS];
	struct race race = {
		.page_size = page_size,
		.mem = self->mem,
	};
	unsigned char *vec = malloc(page_size / SZ_4K);
	int i;

	fill_memory(self->mem, NR_THREADS * SZ_4K, PATTERN);
	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_create(&threads[i], NULL, check_thread, &race);

	for (i = 0; i < (is_cheap ? 100 : 30); i++) {
		switch (i % 10) {
		case 0:
			TEST_ASSERT(smaps_kb(self->mem, "Size") >= 0, "No mapping");
			break;
		case 1:
			read_file("/proc/self/numa_maps");
			break;
		case 2:
			mem_to_pfn(self->mem + page_size / 2);
			break;
		case 3:
			TEST_ASSERT(!mincore(self->mem, page_size, vec), "mincore() failed");
			break;
		case 4:
			kvm_madvise(self->mem + page_size - 4096, 4096, MADV_DONTNEED);
			break;
		case 5:
			expect_error(madvise(self->mem, 4096, MADV_COLD), EINVAL);
			break;
		case 6:
			expect_error(madvise(self->mem, page_size, MADV_PAGEOUT), EINVAL);
			break;
		case 7:
			TEST_ASSERT(!mlock(self->mem, page_size), "mlock() failed");
			munlock(self->mem, page_size);
			break;
		case 8:
			write_long("/proc/self/clear_refs", 1);
			write_long("/proc/self/clear_refs", 4);
			break;
		case 9:
			if (!fork())
				_exit(READ_ONCE(*self->mem) == 42);
			TEST_ASSERT(wait(NULL) > 0, "wait() failed");
			break;
		}
		ASSERT_ALLOCATED(1);
	}
	WRITE_ONCE(race.stop, true);
	race_join(&race, threads, NR_THREADS);
}

/* Huge pages on loan stay where they are. */
TEST_F_TIMEOUT(map, migration, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const unsigned long masks[] = { 1, 2 };
	char *mem = self->mem;
	void *addr = mem;
	int node, target, i;

	write_every_4k(mem, page_size, PATTERN);
	if (is_multi_numa_node_system()) {
		kvm_get_mempolicy(&node, NULL, 0, mem, MPOL_F_NODE | MPOL_F_ADDR);
		target = !node;

		/* It's up to each of them whether that's an error. */
		if (!move_pages(0, 1, &addr, &target, &i, MPOL_MF_MOVE))
			TEST_ASSERT(i != target, "The page has moved to node %d", target);
		WRITE_ONCE(*mem, *mem);
		if (!move_pages(0, 1, &addr, &target, &i, MPOL_MF_MOVE_ALL))
			TEST_ASSERT(i != target, "The page has moved to node %d", target);

		WRITE_ONCE(*mem, *mem);
		mbind(mem, self->size, MPOL_BIND, &masks[target], 8, MPOL_MF_MOVE);
		WRITE_ONCE(*mem, *mem);
		mbind(mem, self->size, MPOL_BIND, &masks[target], 8,
		      MPOL_MF_MOVE_ALL | MPOL_MF_STRICT);
		WRITE_ONCE(*mem, *mem);
		migrate_pages(0, 8, &masks[node], &masks[target]);

		WRITE_ONCE(*mem, *mem);
		kvm_get_mempolicy(&i, NULL, 0, mem, MPOL_F_NODE | MPOL_F_ADDR);
		TEST_ASSERT_EQ(i, node);
	}

	write_long("/proc/sys/vm/compact_memory", 1);
	write_long("/proc/sys/vm/drop_caches", 3);
	check_every_4k(mem, page_size, PATTERN);
	ASSERT_ALLOCATED(1);
}

/* There is nothing that userfaultfd could do with such a mapping. */
TEST_F_TIMEOUT(map, userfaultfd, HUGETLB_TEST_TIMEOUT)
{
	struct uffdio_api api = { .api = UFFD_API };
	const int modes[] = {
		UFFDIO_REGISTER_MODE_WP,
		UFFDIO_REGISTER_MODE_MISSING,
		UFFDIO_REGISTER_MODE_MINOR,
	};
	int uffd, i;

	/* With WP_ASYNC if there is such a thing, it works for most mappings. */
	uffd = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		SKIP(return, "no userfaultfd, errno %d", errno);
	if (api.features & UFFD_FEATURE_WP_ASYNC) {
		kvm_close(uffd);
		uffd = syscall(__NR_userfaultfd, O_CLOEXEC);
		api.features = UFFD_FEATURE_WP_ASYNC;
		TEST_ASSERT(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API failed");
	}

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		struct uffdio_register reg = {
			.range = { .start = (u64)self->mem, .len = self->size },
			.mode = modes[i],
		};

		expect_error(ioctl(uffd, UFFDIO_REGISTER, &reg), EINVAL);
		reg.range.len = 4096;
		expect_error(ioctl(uffd, UFFDIO_REGISTER, &reg), EINVAL);
	}
	WRITE_ONCE(*self->mem, 1);
	ASSERT_ALLOCATED(1);
}

/* /dev/ram0 is used in small parts, and gets its contents back. */
TEST_F_TIMEOUT(map, direct_io, HUGETLB_TEST_TIMEOUT)
{
	static char saved[SZ_64K] __aligned(4096), pattern[SZ_64K] __aligned(4096);
	const size_t page_size = self->page_size, size = sizeof(saved);
	/* The last one crosses from one huge page to the next. */
	const size_t offsets[] = { 0, page_size / 2 + 4096, page_size - size / 2 };
	int fd, i;

	fd = open("/dev/ram0", O_RDWR | O_DIRECT | O_EXCL);
	if (fd < 0)
		SKIP(return, "/dev/ram0 can't be had for exclusive use, errno %d", errno);
	TEST_ASSERT_EQ(pread(fd, saved, size, 0), size);

	for (i = 0; i < ARRAY_SIZE(offsets); i++) {
		char *mem = self->mem + offsets[i];

		if (!is_cheap && i == ARRAY_SIZE(offsets) - 1)
			break;

		fill_memory(pattern, size, PATTERN + i);
		TEST_ASSERT_EQ(pwrite(fd, pattern, size, 0), size);

		/* The kernel's access is the first one, and the page isn't mapped. */
		kvm_madvise(self->mem, self->size, MADV_DONTNEED);
		TEST_ASSERT_EQ(pread(fd, mem, size, 0), size);
		TEST_ASSERT_MEMORY(mem, size, PATTERN + i);

		fill_memory(mem, size, ~PATTERN + i);
		TEST_ASSERT_EQ(pwrite(fd, mem, size, 0), size);
		TEST_ASSERT_EQ(pread(fd, pattern, size, 0), size);
		TEST_ASSERT_MEMORY(pattern, size, ~PATTERN + i);
	}
	TEST_ASSERT_EQ(pwrite(fd, saved, size, 0), size);
	kvm_close(fd);

	/* No pin is left. */
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
	ASSERT_ALLOCATED(0);
}

struct uring {
	int fd;
	struct io_uring_params params;
	void *ring;
	struct io_uring_sqe *sqes;
};

static bool uring_setup(struct uring *uring)
{
	struct io_uring_params *params = &uring->params;
	size_t size;

	uring->fd = syscall(__NR_io_uring_setup, 1, params);
	if (uring->fd < 0)
		return false;

	TEST_ASSERT(params->features & IORING_FEAT_SINGLE_MMAP, "An old kernel");
	size = max_t(size_t, params->sq_off.array + params->sq_entries * sizeof(u32),
		     params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe));
	uring->ring = __kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, uring->fd,
				 IORING_OFF_SQ_RING);
	uring->sqes = __kvm_mmap(params->sq_entries * sizeof(*uring->sqes),
				 PROT_READ | PROT_WRITE, MAP_SHARED, uring->fd,
				 IORING_OFF_SQES);
	return true;
}

static int uring_register(struct uring *uring, void *mem, size_t size)
{
	struct iovec iov = { .iov_base = mem, .iov_len = size };

	return syscall(__NR_io_uring_register, uring->fd, IORING_REGISTER_BUFFERS, &iov, 1);
}

/* Transfers between the registered buffer, and the beginning of a file */
static int uring_transfer(struct uring *uring, int opcode, int fd, void *mem, size_t size)
{
	u32 *sq_tail = uring->ring + uring->params.sq_off.tail;
	u32 *cq_head = uring->ring + uring->params.cq_off.head;
	u32 *array = uring->ring + uring->params.sq_off.array;
	struct io_uring_cqe *cqes = uring->ring + uring->params.cq_off.cqes;
	int r;

	uring->sqes[0] = (struct io_uring_sqe) {
		.opcode = opcode,
		.fd = fd,
		.addr = (u64)mem,
		.len = size,
	};
	array[0] = 0;
	__atomic_store_n(sq_tail, *sq_tail + 1, __ATOMIC_RELEASE);
	TEST_ASSERT_EQ(syscall(__NR_io_uring_enter, uring->fd, 1, 1, IORING_ENTER_GETEVENTS,
			       NULL, 0), 1);
	r = cqes[*cq_head & (uring->params.cq_entries - 1)].res;
	__atomic_store_n(cq_head, *cq_head + 1, __ATOMIC_RELEASE);
	return r;
}

/* The pin outlives the mapping, the file, and the VM. */
TEST_F_TIMEOUT(map, io_uring, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = SZ_64K;
	char *buffer = malloc(size), *mem = self->mem;
	struct uring uring = {};
	int file, fd;

	if (!uring_setup(&uring))
		SKIP(return, "no io_uring, errno %d", errno);

	file = memfd_create("file", 0);
	fill_memory(buffer, size, PATTERN);
	TEST_ASSERT_EQ(pwrite(file, buffer, size, 0), size);

	/* The first page of the file stays a hole. */
	mem += page_size;
	TEST_ASSERT(!uring_register(&uring, mem, page_size),
		    "Can't register a buffer, errno %d", errno);
	ASSERT_ALLOCATED(1);
	TEST_ASSERT_EQ(uring_transfer(&uring, IORING_OP_READ_FIXED, file,
				      mem + page_size - size, size), size);
	TEST_ASSERT_MEMORY(mem + page_size - size, size, PATTERN);
	fill_memory(mem + page_size / 2, size, ~PATTERN);

	kvm_munmap(self->mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);

	/* The reservation is gone, the pinned page isn't. */
	TEST_ASSERT_POOL(page_size, self->pool, 1, 0);

	/* Nobody else is given the page. */
	self->vm = vm_create_barebones();
	fd = vm_create_guest_memfd(self->vm, (self->pool.free - self->pool.reserved - 1) *
				   page_size, self->flags);
	if (is_cheap)
		kvm_fallocate(fd, ALLOCATE, 0, (self->pool.free - self->pool.reserved - 1) *
			      page_size);
	expect_error(__vm_create_guest_memfd(self->vm, page_size, self->flags), ENOMEM);

	TEST_ASSERT_EQ(uring_transfer(&uring, IORING_OP_WRITE_FIXED, file,
				      mem + page_size / 2, size), size);
	TEST_ASSERT_EQ(pread(file, buffer, size, 0), size);
	TEST_ASSERT_MEMORY(buffer, size, ~PATTERN);
	TEST_ASSERT_EQ(uring_transfer(&uring, IORING_OP_WRITE_FIXED, file,
				      mem + page_size - size, size), size);
	TEST_ASSERT_EQ(pread(file, buffer, size, 0), size);
	TEST_ASSERT_MEMORY(buffer, size, PATTERN);
	kvm_close(fd);
	TEST_ASSERT_POOL(page_size, self->pool, 1, 0);

	TEST_ASSERT(!syscall(__NR_io_uring_register, uring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0),
		    "Can't unregister the buffer, errno %d", errno);
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);
}

/*
 * A page that is in use is not back after it was punched.  Another one takes its
 * place until it is, see guest_memfd_reservation_test for all else.
 */
TEST_F_TIMEOUT(map, punch_in_use, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem, buffer[64] = {};
	struct iovec iov = {
		.iov_len = sizeof(buffer),
	};
	int pipes[2], round;

	kvm_munmap(mem, self->size);
	kvm_close(self->fd);
	self->fd = vm_create_guest_memfd(self->vm, page_size, self->flags);
	mem = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	iov.iov_base = mem + page_size / 2;
	TEST_ASSERT(!pipe(pipes), "pipe() failed");

	for (round = 0; round < 2; round++) {
		fill_memory(iov.iov_base, sizeof(buffer), PATTERN);
		TEST_ASSERT_EQ(vmsplice(pipes[1], &iov, 1, 0), sizeof(buffer));
		TEST_ASSERT_POOL(page_size, self->pool, 1, 0);
		kvm_fallocate(self->fd, PUNCH_HOLE, 0, page_size);
		TEST_ASSERT_POOL(page_size, self->pool, 1, 0);
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)iov.iov_base), 0);
		TEST_ASSERT_POOL(page_size, self->pool, 2, 0);
		TEST_ASSERT_EQ(read(pipes[0], buffer, sizeof(buffer)), sizeof(buffer));
		TEST_ASSERT_MEMORY(buffer, sizeof(buffer), PATTERN);
		TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 1, 0);
	}
}

TEST_F_TIMEOUT(map, vmsplice, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char *mem = self->mem, *buffer = malloc(4 * SZ_4K);
	struct iovec iovs[4];
	int pipes[2], i;

	for (i = 0; i < ARRAY_SIZE(iovs); i++) {
		iovs[i].iov_base = mem + i * (page_size / 4);
		iovs[i].iov_len = SZ_4K;
		fill_memory(iovs[i].iov_base, SZ_4K, PATTERN + i);
	}

	TEST_ASSERT(!pipe(pipes), "pipe() failed");
	TEST_ASSERT_EQ(vmsplice(pipes[1], iovs, ARRAY_SIZE(iovs), 0), 4 * SZ_4K);

	kvm_munmap(mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
	TEST_ASSERT_POOL(page_size, self->pool, 1, 0);

	/* The last one is never read. */
	TEST_ASSERT_EQ(read(pipes[0], buffer, 3 * SZ_4K), 3 * SZ_4K);
	for (i = 0; i < 3; i++)
		TEST_ASSERT_MEMORY(buffer + i * SZ_4K, SZ_4K, PATTERN + i);
	TEST_ASSERT_POOL(page_size, self->pool, 1, 0);

	kvm_close(pipes[0]);
	kvm_close(pipes[1]);
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);
}

TEST_F_TIMEOUT(map, access_by_others, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, size = SZ_16K;
	char *mem = self->mem + page_size - SZ_4K - 12, *buffer = malloc(size);
	struct iovec local = { .iov_base = buffer, .iov_len = size };
	struct iovec remote = { .iov_len = size };
	pid_t pid = getpid();
	int fd, status;

	/* Don't cross into the second page if that would take a second. */
	if (!is_cheap)
		mem = self->mem + SZ_4K - 12;
	remote.iov_base = mem;

	if (!fork()) {
		fill_memory(buffer, size, PATTERN);
		TEST_ASSERT_EQ(process_vm_writev(pid, &local, 1, &remote, 1, 0), size);
		fill_memory(buffer, size, 0);
		TEST_ASSERT_EQ(process_vm_readv(pid, &local, 1, &remote, 1, 0), size);
		TEST_ASSERT_MEMORY(buffer, size, PATTERN);
		_exit(0);
	}
	TEST_ASSERT(wait(&status) > 0 && !status, "The child failed");
	TEST_ASSERT_MEMORY(mem, size, PATTERN);
	ASSERT_ALLOCATED(is_cheap ? 2 : 1);

	fd = open_path_or_exit("/proc/self/mem", O_RDWR);
	fill_memory(buffer, size, ~PATTERN);
	TEST_ASSERT_EQ(pwrite(fd, buffer, size, (off_t)mem), size);
	fill_memory(buffer, size, 0);
	TEST_ASSERT_EQ(pread(fd, buffer, size, (off_t)mem), size);
	TEST_ASSERT_MEMORY(buffer, size, ~PATTERN);
	kvm_close(fd);

	/* From a pipe, and to it, i.e. with the kernel's own accesses */
	fd = memfd_create("file", 0);
	TEST_ASSERT_EQ(pwrite(fd, mem, size, 0), size);
	fill_memory(mem, size, 0);
	kvm_madvise(self->mem, self->size, MADV_DONTNEED);
	TEST_ASSERT_EQ(pread(fd, mem, size, 0), size);
	TEST_ASSERT_MEMORY(mem, size, ~PATTERN);
}

TEST_HARNESS_MAIN
