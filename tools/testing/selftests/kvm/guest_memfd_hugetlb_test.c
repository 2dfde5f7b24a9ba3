// SPDX-License-Identifier: GPL-2.0
/*
 * guest_memfd with HugeTLB pages: creation, reservation, allocation, life cycle
 *
 * There is no guest in here.  Every test is followed by a check that the pool is
 * as it was before, once the test's process is gone.
 */
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/kernel-page-flags.h>
#include <linux/sizes.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "cgroup_util.h"
#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PATTERN		0xa5a5a5a5a5a5a5a5ul

static const gpa_t gpa = SZ_4G;

FIXTURE(hugetlb) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
	long available;
	long overcommit;
	u64 flags;
};

FIXTURE_VARIANT(hugetlb) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(hugetlb, private_2M) {
	.page_size = SZ_2M,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(hugetlb, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(hugetlb, private_1G) {
	.page_size = SZ_1G,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(hugetlb, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

FIXTURE_SETUP(hugetlb)
{
	const char *missing = hugetlb_missing(variant->page_size, 2);

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->pool = hugetlb_pool_read(self->page_size);
	self->available = self->pool.free - self->pool.reserved;
	self->overcommit = hugetlb_pool_get(self->page_size, "nr_overcommit_hugepages");
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | variant->flags |
		      hugetlb_size_flag(self->page_size);
	self->vm = vm_create_barebones();
}

/* The child is gone, perhaps before it came to restore what it had changed. */
FIXTURE_TEARDOWN_PARENT(hugetlb)
{
	hugetlb_pool_set(self->page_size, "nr_overcommit_hugepages", self->overcommit);
	if (hugetlb_pool_get(self->page_size, "nr_hugepages") < self->pool.total)
		hugetlb_pool_set(self->page_size, "nr_hugepages", self->pool.total);
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

/* A function of the harness has "self" in scope, and this is for those. */
#define ASSERT_POOL(_allocated, _reserved)					\
	TEST_ASSERT_POOL(self->page_size, self->pool, _allocated, _reserved)

/* Zeroing is what takes time.  Those who can't see a difference go easy on 1G. */
#define is_cheap	(self->page_size <= SZ_2M)

#define create(_nr_pages)							\
	vm_create_guest_memfd(self->vm, (_nr_pages) * self->page_size, self->flags)

static int lowest_free_fd(void)
{
	int fd = kvm_dup(STDIN_FILENO);

	kvm_close(fd);
	return fd;
}

/* Creation fails with this errno, leaves no file behind, and reserves nothing. */
#define expect_create_error(_size, _flags, _errno)				\
do {										\
	int __fd, __next = lowest_free_fd(), __errno = (_errno);		\
	u64 __size = (_size), __flags = (_flags);				\
										\
	__fd = __vm_create_guest_memfd(self->vm, __size, __flags);		\
	TEST_ASSERT(__fd == -1 && errno == __errno,				\
		    "Creating size 0x%lx with flags 0x%lx: wanted errno %d, got fd %d, errno %d", \
		    (unsigned long)__size, (unsigned long)__flags, __errno,	\
		    __fd, errno);						\
	TEST_ASSERT_EQ(lowest_free_fd(), __next);				\
	ASSERT_POOL(0, 0);							\
} while (0)

#define expect_error(_call, _errno)						\
do {										\
	long __errno = (_errno), __r = (_call);					\
										\
	TEST_ASSERT(__r == -1 && errno == __errno,				\
		    "%s: wanted errno %ld, got %ld, errno %d", #_call,		\
		    __errno, __r, errno);					\
} while (0)

/* For the kernel not to be the judge of what it may accept; bit 3 is not in use. */
#define KNOWN_FLAGS								\
	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED |			\
	 GUEST_MEMFD_FLAG_NO_DIRECT_MAP | GUEST_MEMFD_FLAG_HUGETLB)

TEST_F_TIMEOUT(hugetlb, capability, HUGETLB_TEST_TIMEOUT)
{
	int flags = vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_FLAGS);

	TEST_ASSERT(flags & GUEST_MEMFD_FLAG_HUGETLB, "HUGETLB isn't reported");
	TEST_ASSERT(!(flags & ~KNOWN_FLAGS), "Unknown flags are reported: 0x%x", flags);

	/* The size isn't a flag, and bit 31 would make the return value negative. */
	TEST_ASSERT(!(flags & (GUEST_MEMFD_HUGE_MASK << GUEST_MEMFD_HUGE_SHIFT)),
		    "Size bits are reported as flags: 0x%x", flags);
}

TEST_F_TIMEOUT(hugetlb, bad_flags, HUGETLB_TEST_TIMEOUT)
{
	const u64 size_bits = (u64)GUEST_MEMFD_HUGE_MASK << GUEST_MEMFD_HUGE_SHIFT;
	u64 valid, flag, shift;

	valid = vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_FLAGS) & KNOWN_FLAGS;
	valid |= size_bits;

	for (flag = 1; flag; flag <<= 1) {
		if (!(flag & valid))
			expect_create_error(self->page_size, self->flags | flag, EINVAL);
	}
	expect_create_error(self->page_size, self->flags | ~valid, EINVAL);
	expect_create_error(self->page_size, -1ull, EINVAL);

	/* Size bits without HUGETLB, and sizes that the system lacks */
	for (shift = 1; shift <= GUEST_MEMFD_HUGE_MASK; shift++) {
		u64 flags = variant->flags | shift << GUEST_MEMFD_HUGE_SHIFT;

		expect_create_error(self->page_size, flags, EINVAL);

		if (hugetlb_pool_exists(1ul << shift))
			continue;

		flags |= GUEST_MEMFD_FLAG_HUGETLB;
		expect_create_error(self->page_size, flags, EINVAL);
		expect_create_error(1ull << min_t(u64, shift, 62), flags, EINVAL);
	}
}

TEST_F_TIMEOUT(hugetlb, bad_size, HUGETLB_TEST_TIMEOUT)
{
	const u64 page_size = self->page_size;
	const u64 bad_sizes[] = {
		0, 1, 4095, 4096, page_size / 2, page_size - 4096, page_size - 1,
		page_size + 1, page_size + 4096, page_size * 3 / 2,
		-1ull, -4096ull, -page_size, -2 * page_size,
		INT64_MAX, INT64_MAX - 4095, 1ull << 63, (1ull << 63) + page_size,
	};
	const u64 too_large[] = {
		(self->available + 1) * page_size,
		(self->pool.total + 1) * page_size,
		1ull << 46, 1ull << 62,
		(1ull << 63) - page_size,
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(bad_sizes); i++)
		expect_create_error(bad_sizes[i], self->flags, EINVAL);

	if (self->overcommit)
		SKIP(return, "nr_overcommit_hugepages isn't 0");

	for (i = 0; i < ARRAY_SIZE(too_large); i++)
		expect_create_error(too_large[i], self->flags, ENOMEM);

	expect_error(__vm_ioctl(self->vm, KVM_CREATE_GUEST_MEMFD,
				(struct kvm_create_guest_memfd *)8), EFAULT);
	ASSERT_POOL(0, 0);
}

/* Size field 0 is the default huge page size. */
TEST_F_TIMEOUT(hugetlb, default_size, HUGETLB_TEST_TIMEOUT)
{
	size_t default_size = get_def_hugetlb_pagesz();
	struct hugetlb_pool pool = hugetlb_pool_read(default_size);
	u64 flags = GUEST_MEMFD_FLAG_HUGETLB | variant->flags;
	int fd;

	if (pool.free - pool.reserved < 1)
		SKIP(return, "no huge page of the default size available");

	fd = vm_create_guest_memfd(self->vm, default_size, flags);
	TEST_ASSERT_POOL(default_size, pool, 0, 1);
	kvm_close(fd);
	TEST_ASSERT_POOL(default_size, pool, 0, 0);
}

TEST_F_TIMEOUT(hugetlb, reservation, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long all = self->available;
	struct stat st;
	int fd;

	fd = create(1);
	ASSERT_POOL(0, 1);

	/* What is reserved isn't available to anybody else. */
	if (!self->overcommit) {
		int hugetlbfs = hugetlbfs_create(all * page_size, page_size);

		expect_error(__vm_create_guest_memfd(self->vm, all * page_size,
						     self->flags), ENOMEM);
		TEST_ASSERT(mmap(NULL, all * page_size, PROT_READ, MAP_SHARED,
				 hugetlbfs, 0) == MAP_FAILED && errno == ENOMEM,
			    "hugetlbfs got pages that are reserved for guest_memfd");
		kvm_close(hugetlbfs);
		ASSERT_POOL(0, 1);
	}

	kvm_close(fd);
	ASSERT_POOL(0, 0);

	fd = create(all);
	ASSERT_POOL(0, all);
	TEST_ASSERT(!fstat(fd, &st) && st.st_size == all * page_size,
		    "Wanted a file of 0x%lx bytes, got 0x%lx", all * page_size,
		    (unsigned long)st.st_size);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

TEST_F_TIMEOUT(hugetlb, allocation, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long all = self->available;
	int fd;

	fd = create(all);
	ASSERT_POOL(0, all);

	/* In the middle of the file, and again */
	kvm_fallocate(fd, ALLOCATE, page_size, page_size);
	ASSERT_POOL(1, all - 1);
	kvm_fallocate(fd, ALLOCATE, page_size, page_size);
	ASSERT_POOL(1, all - 1);

	/* Over a page that is there already */
	kvm_fallocate(fd, ALLOCATE, 0, 2 * page_size);
	ASSERT_POOL(2, all - 2);

	kvm_fallocate(fd, PUNCH_HOLE, page_size, page_size);
	ASSERT_POOL(1, all - 1);
	kvm_fallocate(fd, PUNCH_HOLE, page_size, page_size);
	ASSERT_POOL(1, all - 1);

	/* Closed with pages in it, and without */
	if (is_cheap) {
		kvm_close(fd);
		ASSERT_POOL(0, 0);

		fd = create(all);
		kvm_fallocate(fd, ALLOCATE, 0, all * page_size);
		ASSERT_POOL(all, 0);
		kvm_fallocate(fd, PUNCH_HOLE, page_size, (all - 1) * page_size);
		ASSERT_POOL(1, all - 1);
		kvm_fallocate(fd, ALLOCATE, 0, all * page_size);
		ASSERT_POOL(all, 0);
	}

	/* Most of this may be a hole already. */
	kvm_fallocate(fd, PUNCH_HOLE, 0, all * page_size);
	ASSERT_POOL(0, all);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

TEST_F_TIMEOUT(hugetlb, bad_fallocate, HUGETLB_TEST_TIMEOUT)
{
	const s64 page_size = self->page_size;
	const struct {
		s64 offset, len;
		/* 0 if it is no error for PUNCH_HOLE */
		int error, punch_error;
	} bad[] = {
		{ 0, 1, EINVAL, EINVAL },
		{ 0, 4096, EINVAL, EINVAL },
		{ 0, page_size - 4096, EINVAL, EINVAL },
		{ 0, page_size + 4096, EINVAL, EINVAL },
		{ 0, page_size - 1, EINVAL, EINVAL },
		{ 1, page_size, EINVAL, EINVAL },
		{ 4096, page_size, EINVAL, EINVAL },
		{ 4096, page_size - 4096, EINVAL, EINVAL },
		{ page_size / 2, page_size / 2, EINVAL, EINVAL },
		{ page_size - 4096, 8192, EINVAL, EINVAL },
		{ page_size - 4096, page_size, EINVAL, EINVAL },

		/* Zero length, and less than that */
		{ 0, 0, EINVAL, EINVAL },
		{ page_size, 0, EINVAL, EINVAL },
		{ 0, -page_size, EINVAL, EINVAL },
		{ -page_size, page_size, EINVAL, EINVAL },

		/* Behind the end of the file */
		{ 2 * page_size, page_size, EINVAL, 0 },
		{ 16 * page_size, page_size, EINVAL, 0 },
		{ 2 * page_size, 4096, EINVAL, EINVAL },
		{ 2 * page_size + 4096, page_size, EINVAL, EINVAL },
		{ INT64_MAX - page_size + 1, page_size, EFBIG, EFBIG },
		{ page_size, INT64_MAX - page_size + 1, EFBIG, EFBIG },
	};
	const int bad_modes[] = {
		0,
		FALLOC_FL_PUNCH_HOLE,
		FALLOC_FL_ZERO_RANGE,
		FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
		FALLOC_FL_COLLAPSE_RANGE,
		FALLOC_FL_INSERT_RANGE,
		FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_KEEP_SIZE,
	};
	int fd = create(2), i, round;
	char *mem = NULL;

	if (variant->flags & GUEST_MEMFD_FLAG_MMAP)
		mem = kvm_mmap(2 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	/* First with an empty file, and then with a page in it */
	for (round = 0; round < 2; round++) {
		if (round) {
			kvm_fallocate(fd, ALLOCATE, page_size, page_size);
			if (mem) {
				fill_memory(mem + page_size, 8192, PATTERN);
				fill_memory(mem + 2 * page_size - 8192, 8192, PATTERN);
			}
		}

		for (i = 0; i < ARRAY_SIZE(bad); i++) {
			s64 offset = bad[i].offset, len = bad[i].len;

			expect_error(fallocate(fd, ALLOCATE, offset, len), bad[i].error);
			if (bad[i].punch_error)
				expect_error(fallocate(fd, PUNCH_HOLE, offset, len),
					     bad[i].punch_error);
			else
				kvm_fallocate(fd, PUNCH_HOLE, offset, len);

			ASSERT_POOL(round, 2 - round);
		}

		/* Crosses the end of the file */
		expect_error(fallocate(fd, ALLOCATE, page_size, 2 * page_size), EINVAL);

		for (i = 0; i < ARRAY_SIZE(bad_modes); i++)
			expect_error(fallocate(fd, bad_modes[i], 0, page_size), EOPNOTSUPP);

		ASSERT_POOL(round, 2 - round);
	}

	if (mem) {
		TEST_ASSERT_MEMORY(mem + page_size, 8192, PATTERN);
		TEST_ASSERT_MEMORY(mem + 2 * page_size - 8192, 8192, PATTERN);
	}

	/* All of the file that there is gets punched. */
	kvm_fallocate(fd, PUNCH_HOLE, page_size, 2 * page_size);
	ASSERT_POOL(0, 2);
}

TEST_F_TIMEOUT(hugetlb, bad_file_operations, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const off_t sizes[] = { 0, 4096, page_size, 2 * page_size, 4 * page_size };
	int fd = create(2), pipes[2], i;
	char buf[64] = {};
	struct stat st;

	expect_error(read(fd, buf, sizeof(buf)), EINVAL);
	expect_error(write(fd, buf, sizeof(buf)), EINVAL);

	/* Fails earlier, the file has no position. */
	expect_error(pread(fd, buf, sizeof(buf), page_size), ESPIPE);
	expect_error(pwrite(fd, buf, sizeof(buf), page_size), ESPIPE);

	TEST_ASSERT(!pipe(pipes), "pipe() failed");
	expect_error(splice(fd, NULL, pipes[1], NULL, 4096, 0), EINVAL);
	expect_error(sendfile(pipes[1], fd, NULL, 4096), EINVAL);
	TEST_ASSERT_EQ(write(pipes[1], buf, sizeof(buf)), sizeof(buf));
	expect_error(splice(pipes[0], NULL, fd, NULL, sizeof(buf), 0), EINVAL);

	for (i = 0; i < ARRAY_SIZE(sizes); i++)
		expect_error(ftruncate(fd, sizes[i]), EINVAL);

	TEST_ASSERT(!fstat(fd, &st) && st.st_size == 2 * page_size,
		    "The size of the file has changed to 0x%lx", (unsigned long)st.st_size);
	ASSERT_POOL(0, 2);
}

TEST_F_TIMEOUT(hugetlb, bad_binding, HUGETLB_TEST_TIMEOUT)
{
	const u64 page_size = self->page_size, size = 2 * page_size;
	struct kvm_vm *other_vm = vm_create_barebones();
	const struct {
		u64 offset, size;
	} bad[] = {
		/* Past the end of the file */
		{ page_size, size },
		{ 0, size + 4096 },
		{ 4096, size },
		{ size - 4096, 8192 },
		{ size, 4096 },
		{ INT64_MAX - 4095, 4096 },
		{ INT64_MAX - page_size + 1, page_size },
		{ -page_size, page_size },
		{ -page_size, size },
		{ 1ull << 63, page_size },

		/* Not even aligned to small pages */
		{ 1, page_size },
		{ 2048, page_size },
		{ 0, page_size - 1 },
	};
	int fd = create(2), null = open_path_or_exit("/dev/null", O_RDWR), i;
	const u64 allocated = is_cheap ? 2 : 1;
	u64 *mem = NULL;

	kvm_fallocate(fd, ALLOCATE, 0, allocated * page_size);
	if (variant->flags & GUEST_MEMFD_FLAG_MMAP) {
		mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		fill_memory(mem, allocated * page_size, PATTERN);
	}

#define bind(_vm, _slot, _gpa, _size, _fd, _offset)				\
	__vm_set_user_memory_region2(_vm, _slot, KVM_MEM_GUEST_MEMFD, _gpa,	\
				     _size, NULL, _fd, _offset)

	for (i = 0; i < ARRAY_SIZE(bad); i++)
		expect_error(bind(self->vm, 1, gpa, bad[i].size, fd, bad[i].offset), EINVAL);

	expect_error(bind(self->vm, 1, gpa, size, -1, 0), EBADF);
	expect_error(bind(self->vm, 1, gpa, size, null, 0), EINVAL);
	expect_error(bind(other_vm, 1, gpa, size, fd, 0), EINVAL);

	/* None of that has left a binding behind. */
	TEST_ASSERT(!bind(self->vm, 1, gpa, page_size, fd, 0), "Can't bind");

	/* Overlaps in the file, and in guest memory */
	expect_error(bind(self->vm, 2, gpa + size, page_size, fd, 0), EEXIST);
	expect_error(bind(self->vm, 2, gpa + size, 4096, fd, page_size - 4096), EEXIST);
	expect_error(bind(self->vm, 2, gpa + size, size, fd, 0), EEXIST);
	expect_error(bind(self->vm, 2, gpa, page_size, fd, page_size), EEXIST);
	expect_error(bind(self->vm, 2, gpa + page_size - 4096, page_size, fd, page_size), EEXIST);

	/* The slot can't be changed. */
	expect_error(bind(self->vm, 1, gpa, page_size, fd, 0), EINVAL);
	expect_error(bind(self->vm, 1, gpa + size, page_size, fd, 0), EINVAL);
	expect_error(bind(self->vm, 1, gpa, page_size, fd, page_size), EINVAL);
	expect_error(__vm_set_user_memory_region2(self->vm, 1, 0, gpa, page_size, NULL, 0, 0),
		     EINVAL);
	expect_error(__vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD |
						  KVM_MEM_LOG_DIRTY_PAGES, gpa,
						  page_size, NULL, fd, 0), EINVAL);

	/* What does not overlap can be bound, at any small page. */
	TEST_ASSERT(!bind(self->vm, 2, gpa + size, 8192, fd, page_size + 4096), "Can't bind");
	TEST_ASSERT(!bind(self->vm, 1, gpa, 0, fd, 0), "Can't unbind");
	TEST_ASSERT(!bind(self->vm, 1, gpa + 4096, page_size, fd, 0), "Can't bind again");
#undef bind

	/* None of that is about the memory. */
	ASSERT_POOL(allocated, 2 - allocated);
	if (mem)
		TEST_ASSERT_MEMORY(mem, allocated * page_size, PATTERN);

	/* A VM that was closed keeps its file, which is of no use to another VM. */
	kvm_vm_free(self->vm);
	expect_error(__vm_set_user_memory_region2(other_vm, 1, KVM_MEM_GUEST_MEMFD, gpa,
						  page_size, NULL, fd, 0), EINVAL);
	ASSERT_POOL(allocated, 2 - allocated);
	if (mem)
		kvm_munmap(mem, size);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

/* Whoever created the VM is dead, and so is the VM, but not its files. */
TEST_F_TIMEOUT(hugetlb, bind_to_dead_vm, HUGETLB_TEST_TIMEOUT)
{
	struct kvm_vm vm = {};
	int pipes[2], fds[2], status;
	pid_t pid;

	TEST_ASSERT(!pipe(pipes), "pipe() failed");

	/* Like fork(), but file descriptors are shared. */
	pid = syscall(__NR_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	TEST_ASSERT(pid >= 0, "clone() failed");
	if (!pid) {
		struct kvm_vm *child_vm = vm_create_barebones();

		fds[0] = child_vm->fd;
		fds[1] = vm_create_guest_memfd(child_vm, self->page_size, self->flags);
		_exit(write(pipes[1], fds, sizeof(fds)) != sizeof(fds));
	}

	TEST_ASSERT_EQ(read(pipes[0], fds, sizeof(fds)), sizeof(fds));
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
	ASSERT_POOL(0, 1);

	vm.fd = fds[0];
	expect_error(__vm_set_user_memory_region2(&vm, 1, KVM_MEM_GUEST_MEMFD, gpa,
						  self->page_size, NULL, fds[1], 0), EIO);
	expect_error(__vm_create_guest_memfd(&vm, self->page_size, self->flags), EIO);
	ASSERT_POOL(0, 1);

	kvm_close(vm.fd);
	ASSERT_POOL(0, 1);
	if (is_cheap) {
		kvm_fallocate(fds[1], ALLOCATE, 0, self->page_size);
		ASSERT_POOL(1, 0);
	}
	kvm_close(fds[1]);
	ASSERT_POOL(0, 0);
}

TEST_F_TIMEOUT(hugetlb, create_close_cycles, HUGETLB_TEST_TIMEOUT)
{
	const long all = self->available;
	u64 size = all * self->page_size;
	int fd, i;

	for (i = 0; i < 2000; i++) {
		fd = create(all);
		if (!(i % 100))
			ASSERT_POOL(0, all);

		/* Not enough pages left, by one and by all */
		expect_error(__vm_create_guest_memfd(self->vm, self->page_size,
						     self->flags), ENOMEM);
		expect_error(__vm_create_guest_memfd(self->vm, size, self->flags), ENOMEM);
		kvm_close(fd);
		if (!(i % 100))
			ASSERT_POOL(0, 0);
	}
}

struct cycle {
	struct kvm_vm *vm;
	size_t page_size;
	u64 flags;
	bool allocate;
	int nr_cycles;
	long nr_pages;
};

static void *create_close_thread(void *data)
{
	struct cycle *cycle = data;
	int i, fd;

	/* As many pages as there are for each thread, i.e. none may fail. */
	for (i = 0; i < cycle->nr_cycles; i++) {
		fd = vm_create_guest_memfd(cycle->vm, cycle->nr_pages * cycle->page_size,
					   cycle->flags);
		if (cycle->allocate && !(i % 10))
			kvm_fallocate(fd, ALLOCATE, 0, cycle->page_size);
		kvm_close(fd);
	}
	return NULL;
}

TEST_F_TIMEOUT(hugetlb, create_close_threads, HUGETLB_TEST_TIMEOUT)
{
	const int nr_threads = 2;
	struct cycle cycle = {
		.vm = self->vm,
		.page_size = self->page_size,
		.flags = self->flags,
		.allocate = is_cheap,
		.nr_cycles = 1000,
		.nr_pages = self->available / nr_threads,
	};
	pthread_t threads[nr_threads];
	int i;

	for (i = 0; i < nr_threads; i++)
		kvm_pthread_create(&threads[i], NULL, create_close_thread, &cycle);
	for (i = 0; i < nr_threads; i++)
		kvm_pthread_join(threads[i], NULL);

	ASSERT_POOL(0, 0);
}

TEST_F_TIMEOUT(hugetlb, allocate_processes, HUGETLB_TEST_TIMEOUT)
{
	const int nr_processes = 4;
	const long all = is_cheap ? self->available : 1;
	int fd = create(all), status, i;

	/* All of them want all pages of one file. */
	for (i = 0; i < nr_processes; i++) {
		if (!fork()) {
			kvm_fallocate(fd, ALLOCATE, 0, all * self->page_size);
			_exit(0);
		}
	}
	for (i = 0; i < nr_processes; i++) {
		TEST_ASSERT(wait(&status) > 0 && !status,
			    "A process could not allocate, status 0x%x", status);
	}

	ASSERT_POOL(all, 0);
	kvm_close(fd);
	ASSERT_POOL(0, 0);

	/* Each of them wants all pages of its own file. */
	for (i = 0; i < 2; i++) {
		if (!fork()) {
			struct cycle cycle = {
				.vm = vm_create_barebones(),
				.page_size = self->page_size,
				.flags = self->flags,
				.allocate = is_cheap,
				.nr_cycles = 10,
				.nr_pages = self->available / 2,
			};

			create_close_thread(&cycle);
			_exit(0);
		}
	}
	for (i = 0; i < 2; i++) {
		TEST_ASSERT(wait(&status) > 0 && !status,
			    "A process could not allocate, status 0x%x", status);
	}
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

TEST_F_TIMEOUT(hugetlb, create_without_fd, HUGETLB_TEST_TIMEOUT)
{
	struct rlimit old, new;
	int i, fd;

	TEST_ASSERT(!getrlimit(RLIMIT_NOFILE, &old), "getrlimit() failed");
	fd = create(1);

	new = old;
	new.rlim_cur = fd + 1;
	TEST_ASSERT(!setrlimit(RLIMIT_NOFILE, &new), "setrlimit() failed");
	for (i = 0; i < 1000; i++)
		expect_error(__vm_create_guest_memfd(self->vm, self->page_size,
						     self->flags), EMFILE);

	TEST_ASSERT(!setrlimit(RLIMIT_NOFILE, &old), "setrlimit() failed");
	ASSERT_POOL(0, 1);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

/*
 * Let the first allocation of the kernel's that can fail do so, then the second
 * one, and so on until there is none left and all goes well.
 */
#define for_each_failure(_call)							\
	for (nth = 1; fail_nth(nth), (_call), has_failed(); nth++)

static int fail_nth_fd = -1, nth;

static void fail_nth(int countdown)
{
	char buf[16];
	int len = snprintf(buf, sizeof(buf), "%d", countdown);

	TEST_ASSERT(pwrite(fail_nth_fd, buf, len, 0) == len, "Can't write fail-nth");
}

/* The countdown has come to an end if there was a failure. */
static bool has_failed(void)
{
	char buf[16] = {};

	TEST_ASSERT(pread(fail_nth_fd, buf, sizeof(buf) - 1, 0) > 0, "Can't read fail-nth");
	fail_nth(0);
	return !atoi(buf);
}

static bool enable_fault_injection(bool enable)
{
	static const char * const files[] = {
		"/sys/kernel/debug/failslab/ignore-gfp-wait",
		"/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait",
	};
	static const char * const verbose[] = {
		"/sys/kernel/debug/failslab/verbose",
		"/sys/kernel/debug/fail_page_alloc/verbose",
	};
	int i, fd;

	for (i = 0; i < ARRAY_SIZE(files); i++) {
		fd = open(files[i], O_WRONLY);
		if (fd < 0)
			return false;
		TEST_ASSERT(write(fd, enable ? "N" : "Y", 1) == 1, "Can't write %s", files[i]);
		kvm_close(fd);
		TEST_ASSERT(!write_long(verbose[i], enable ? 0 : 2), "Can't write %s",
			    verbose[i]);
	}

	if (fail_nth_fd < 0)
		fail_nth_fd = open("/proc/thread-self/fail-nth", O_RDWR);
	return fail_nth_fd >= 0;
}

TEST_F_TIMEOUT(hugetlb, failing_allocations, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	struct kvm_userspace_memory_region2 region = {
		.slot = 1,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = gpa,
		.memory_size = page_size + 4096,
		.guest_memfd_offset = 4096,
	};
	int fd, r;

	if (!enable_fault_injection(true))
		SKIP(return, "the kernel has no fault injection");

	for_each_failure(fd = __vm_create_guest_memfd(self->vm, 2 * page_size,
						      self->flags)) {
		if (fd >= 0) {
			kvm_close(fd);
			continue;
		}
		TEST_ASSERT(errno == ENOMEM || errno == ENFILE,
			    "Creating with failure %d: errno %d", nth, errno);
		ASSERT_POOL(0, 0);
	}
	TEST_ASSERT(fd >= 0 && nth > 3, "Creation saw %d failures, fd %d", nth - 1, fd);
	ASSERT_POOL(0, 2);

	for_each_failure(r = fallocate(fd, ALLOCATE, page_size, page_size)) {
		TEST_ASSERT(!r || errno == ENOMEM, "fallocate() with failure %d: errno %d",
			    nth, errno);
		ASSERT_POOL(!r, 1 + !!r);
		kvm_fallocate(fd, PUNCH_HOLE, page_size, page_size);
	}
	TEST_ASSERT(!r, "fallocate() without failure failed");
	ASSERT_POOL(1, 1);

	/* Leaves a large part of an xarray to be stored. */
	region.guest_memfd = fd;
	for_each_failure(r = __vm_ioctl(self->vm, KVM_SET_USER_MEMORY_REGION2, &region)) {
		if (!r) {
			vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, gpa, 0,
						   NULL, fd, 4096);
			continue;
		}
		TEST_ASSERT(errno == ENOMEM, "Binding with failure %d: errno %d", nth, errno);

		/* There is nothing left that a new binding would overlap with. */
		vm_set_user_memory_region2(self->vm, 2, KVM_MEM_GUEST_MEMFD, gpa,
					   2 * page_size, NULL, fd, 0);
		vm_set_user_memory_region2(self->vm, 2, KVM_MEM_GUEST_MEMFD, gpa, 0, NULL, fd, 0);
	}
	TEST_ASSERT(!r, "Binding without failure failed");

	kvm_close(fd);
	ASSERT_POOL(0, 0);
	enable_fault_injection(false);
}

/* Surplus pages come with the reservation, and go with the file. */
TEST_F_TIMEOUT(hugetlb, overcommit, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long extra = is_cheap ? 3 : 1;
	struct hugetlb_pool pool = self->pool;
	int fd;

	if (self->overcommit || pool.surplus)
		SKIP(return, "surplus pages are in use");
	if (hugetlb_pool_set(page_size, "nr_overcommit_hugepages", extra))
		SKIP(return, "can't set nr_overcommit_hugepages");

	expect_error(__vm_create_guest_memfd(self->vm, (self->available + extra + 1) * page_size,
					     self->flags), ENOMEM);
	ASSERT_POOL(0, 0);

	fd = __vm_create_guest_memfd(self->vm, (self->available + extra) * page_size,
				     self->flags);
	if (fd < 0) {
		/* The kernel found no memory, which is not for guest_memfd to blame. */
		TEST_ASSERT(errno == ENOMEM, "errno %d", errno);
		ASSERT_POOL(0, 0);
		SKIP(return, "no memory for %ld surplus pages", extra);
	}

	pool.total += extra;
	pool.free += extra;
	pool.surplus += extra;
	TEST_ASSERT_POOL(page_size, pool, 0, self->available + extra);

	if (is_cheap) {
		kvm_fallocate(fd, ALLOCATE, 0, (self->available + extra) * page_size);
		TEST_ASSERT_POOL(page_size, pool, self->available + extra, 0);
		kvm_fallocate(fd, PUNCH_HOLE, 0, extra * page_size);
		TEST_ASSERT_POOL(page_size, pool, self->available, extra);
	}
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

/* A page that the administrator takes away becomes surplus while it is reserved. */
TEST_F_TIMEOUT(hugetlb, shrink_pool, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	struct hugetlb_pool pool = self->pool;
	int fd;

	if (!is_cheap)
		SKIP(return, "a gigantic page that is freed may not be had again");

	fd = create(self->available);
	kvm_fallocate(fd, ALLOCATE, 0, page_size);

	TEST_ASSERT(!hugetlb_pool_set(page_size, "nr_hugepages", pool.total - 2),
		    "Can't set nr_hugepages");
	pool.surplus += 2;
	TEST_ASSERT_POOL(page_size, pool, 1, self->available - 1);

	/* No access fails for want of a huge page. */
	kvm_fallocate(fd, ALLOCATE, 0, self->available * page_size);
	TEST_ASSERT_POOL(page_size, pool, self->available, 0);
	kvm_close(fd);

	pool = self->pool;
	pool.total -= 2;
	pool.free -= 2;
	TEST_ASSERT_POOL(page_size, pool, 0, 0);
}

static char *cgroup_control(size_t page_size, const char *name)
{
	static char control[64];

	if (page_size >= SZ_1G)
		snprintf(control, sizeof(control), "hugetlb.%luGB.%s", page_size / SZ_1G, name);
	else
		snprintf(control, sizeof(control), "hugetlb.%luMB.%s", page_size / SZ_1M, name);
	return control;
}

/* Returns the cgroup that the process is in now, or NULL. */
static char *enter_new_cgroup(char *root, size_t page_size)
{
	char *cgroup, name[64];

	if (cg_find_unified_root(root, PATH_MAX, NULL))
		return NULL;

	snprintf(name, sizeof(name), "guest_memfd_hugetlb_test.%d", getpid());
	cgroup = cg_name(root, name);
	if (cg_create(cgroup) ||
	    cg_read_long(cgroup, cgroup_control(page_size, "rsvd.current"))) {
		cg_destroy(cgroup);
		return NULL;
	}

	TEST_ASSERT(!cg_enter_current(cgroup), "Can't enter %s", cgroup);
	return cgroup;
}

static void leave_cgroup(const char *root, const char *cgroup)
{
	TEST_ASSERT(!cg_enter_current(root), "Can't enter %s", root);
	TEST_ASSERT(!rmdir(cgroup), "Can't remove %s, errno %d", cgroup, errno);
}

#define ASSERT_CGROUP(_cgroup, _name, _nr_pages)				\
	TEST_ASSERT_EQ(cg_read_long(_cgroup, cgroup_control(self->page_size, _name)), \
		       (long)((_nr_pages) * self->page_size))

TEST_F_TIMEOUT(hugetlb, cgroup_reservation_limit, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char root[PATH_MAX], *cgroup;
	int fd, i;

	cgroup = enter_new_cgroup(root, page_size);
	if (!cgroup)
		SKIP(return, "no hugetlb controller for child cgroups");

	TEST_ASSERT(!cg_write_numeric(cgroup, cgroup_control(page_size, "rsvd.max"), page_size),
		    "Can't set a limit");

	for (i = 0; i < 100; i++)
		expect_create_error(2 * page_size, self->flags, ENOMEM);
	ASSERT_CGROUP(cgroup, "rsvd.current", 0);

	fd = create(1);
	ASSERT_CGROUP(cgroup, "rsvd.current", 1);
	expect_error(__vm_create_guest_memfd(self->vm, page_size, self->flags), ENOMEM);
	ASSERT_CGROUP(cgroup, "rsvd.current", 1);

	/* The reservation is charged once, by the file. */
	kvm_fallocate(fd, ALLOCATE, 0, page_size);
	ASSERT_CGROUP(cgroup, "rsvd.current", 1);
	ASSERT_CGROUP(cgroup, "current", 1);
	kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
	ASSERT_CGROUP(cgroup, "rsvd.current", 1);
	ASSERT_CGROUP(cgroup, "current", 0);

	kvm_close(fd);
	ASSERT_CGROUP(cgroup, "rsvd.current", 0);

	/* What the pool can't give isn't charged either. */
	TEST_ASSERT(!cg_write(cgroup, cgroup_control(page_size, "rsvd.max"), "max"),
		    "Can't remove the limit");
	expect_create_error((self->available + 1) * page_size, self->flags, ENOMEM);
	ASSERT_CGROUP(cgroup, "rsvd.current", 0);

	leave_cgroup(root, cgroup);
}

TEST_F_TIMEOUT(hugetlb, cgroup_usage_limit, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char root[PATH_MAX], *cgroup, *mem;
	int fd, i;

	cgroup = enter_new_cgroup(root, page_size);
	if (!cgroup)
		SKIP(return, "no hugetlb controller for child cgroups");

	fd = create(2);
	TEST_ASSERT(!cg_write_numeric(cgroup, cgroup_control(page_size, "max"), 0),
		    "Can't set a limit");

	for (i = 0; i < 10; i++)
		expect_error(fallocate(fd, ALLOCATE, page_size, page_size), ENOMEM);
	ASSERT_POOL(0, 2);
	ASSERT_CGROUP(cgroup, "current", 0);

	if (variant->flags & GUEST_MEMFD_FLAG_MMAP) {
		mem = kvm_mmap(2 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		TEST_EXPECT_SIGBUS(WRITE_ONCE(*mem, 1));
		kvm_munmap(mem, 2 * page_size);
		ASSERT_POOL(0, 2);
	}

	TEST_ASSERT(!cg_write_numeric(cgroup, cgroup_control(page_size, "max"), page_size),
		    "Can't set a limit");
	kvm_fallocate(fd, ALLOCATE, page_size, page_size);
	ASSERT_POOL(1, 1);
	ASSERT_CGROUP(cgroup, "current", 1);

	kvm_close(fd);
	ASSERT_POOL(0, 0);
	ASSERT_CGROUP(cgroup, "current", 0);
	leave_cgroup(root, cgroup);
}

/* Where the memory cgroup is charged for huge pages, it is once. */
TEST_F_TIMEOUT(hugetlb, cgroup_memory, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char root[PATH_MAX], *cgroup;
	long before, charged;
	int fd;

	if (proc_mount_contains("memory_hugetlb_accounting") <= 0)
		SKIP(return, "cgroup2 is mounted without memory_hugetlb_accounting");
	cgroup = enter_new_cgroup(root, page_size);
	if (!cgroup)
		SKIP(return, "no hugetlb controller for child cgroups");

	fd = create(1);
	before = cg_read_long(cgroup, "memory.current");
	TEST_ASSERT(before >= 0 && before < SZ_1M, "Creating the file charged %ld bytes", before);

	/* Page tables and the like are charged, too. */
	kvm_fallocate(fd, ALLOCATE, 0, page_size);
	charged = cg_read_long(cgroup, "memory.current") - before;
	TEST_ASSERT(charged >= (long)page_size && charged < (long)page_size + SZ_1M,
		    "A page of %lu bytes charged %ld", page_size, charged);

	kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
	charged = cg_read_long(cgroup, "memory.current") - before;
	TEST_ASSERT(charged < SZ_1M, "%ld bytes are charged for nothing", charged);

	kvm_close(fd);
	leave_cgroup(root, cgroup);
}

/* The file that the cgroup was charged for outlives the cgroup. */
TEST_F_TIMEOUT(hugetlb, cgroup_removed, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char root[PATH_MAX], *cgroup;
	int fd, round;

	for (round = 0; round < 3; round++) {
		cgroup = enter_new_cgroup(root, page_size);
		if (!cgroup)
			SKIP(return, "no hugetlb controller for child cgroups");

		fd = create(2);
		if (round == 1 || (round == 2 && is_cheap))
			kvm_fallocate(fd, ALLOCATE, 0, page_size);
		leave_cgroup(root, cgroup);

		/* Charges are moved by a worker. */
		if (round)
			usleep(300000);

		kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
		ASSERT_POOL(0, 2);
		if (is_cheap) {
			kvm_fallocate(fd, ALLOCATE, 0, page_size);
			ASSERT_POOL(1, 1);
		}
		kvm_close(fd);
		ASSERT_POOL(0, 0);
	}
}

static void send_fd(int socket, int fd)
{
	char control[CMSG_SPACE(sizeof(fd))] = {}, data = 0;
	struct iovec iov = { .iov_base = &data, .iov_len = sizeof(data) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	TEST_ASSERT(sendmsg(socket, &msg, 0) == sizeof(data), "sendmsg() failed");
}

static int receive_fd(int socket)
{
	int fd;
	char control[CMSG_SPACE(sizeof(fd))], data;
	struct iovec iov = { .iov_base = &data, .iov_len = sizeof(data) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};

	TEST_ASSERT(recvmsg(socket, &msg, 0) == sizeof(data) && CMSG_FIRSTHDR(&msg),
		    "recvmsg() failed");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
	return fd;
}

/* The memory is there for as long as there is any reference to the file. */
TEST_F_TIMEOUT(hugetlb, last_reference, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	int fd, sockets[2], pipes[2], status;
	char c = 0, *mem;
	pid_t pid;

	/* The VM goes first. */
	fd = create(2);
	if (is_cheap)
		kvm_fallocate(fd, ALLOCATE, 0, page_size);
	kvm_vm_free(self->vm);
	ASSERT_POOL(is_cheap, 2 - is_cheap);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
	self->vm = vm_create_barebones();

	/* A memslot is no reference. */
	fd = create(2);
	vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, gpa, 2 * page_size,
				   NULL, fd, 0);
	if (is_cheap)
		kvm_fallocate(fd, ALLOCATE, 0, page_size);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
	fd = create(2);
	vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, gpa, 0, NULL, -1, 0);
	vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, gpa, 2 * page_size,
				   NULL, fd, 0);
	ASSERT_POOL(0, 2);

	/* A child that inherits it is one. */
	TEST_ASSERT(!pipe(pipes), "pipe() failed");
	pid = fork();
	if (!pid) {
		TEST_ASSERT_EQ(read(pipes[0], &c, 1), 1);
		ASSERT_POOL(0, 2);
		if (is_cheap) {
			kvm_fallocate(fd, ALLOCATE, page_size, page_size);
			ASSERT_POOL(1, 1);
		}
		_exit(0);
	}
	kvm_close(fd);
	ASSERT_POOL(0, 2);
	TEST_ASSERT_EQ(write(pipes[1], &c, 1), 1);
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);

	/* So is a message that nobody has received yet, and perhaps never will. */
	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "socketpair() failed");
	fd = create(2);
	send_fd(sockets[0], fd);
	kvm_close(fd);
	ASSERT_POOL(0, 2);
	fd = receive_fd(sockets[1]);
	if (is_cheap)
		kvm_fallocate(fd, ALLOCATE, 0, page_size);
	send_fd(sockets[0], fd);
	kvm_close(fd);
	kvm_close(sockets[0]);
	ASSERT_POOL(is_cheap, 2 - is_cheap);
	kvm_close(sockets[1]);
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);

	if (!(variant->flags & GUEST_MEMFD_FLAG_MMAP))
		return;

	/* And a mapping, with and without memory in it */
	fd = create(2);
	mem = kvm_mmap(2 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	kvm_close(fd);
	kvm_vm_free(self->vm);
	ASSERT_POOL(0, 2);
	WRITE_ONCE(mem[page_size], 1);
	ASSERT_POOL(1, 1);
	kvm_munmap(mem, page_size);
	ASSERT_POOL(1, 1);
	kvm_munmap(mem + page_size, page_size);
	ASSERT_POOL(0, 0);
}

struct slot_race {
	struct kvm_vm *vm;
	size_t page_size;
	bool go;
};

static void *delete_slot_thread(void *data)
{
	struct slot_race *race = data;

	while (!READ_ONCE(race->go))
		;
	vm_set_user_memory_region2(race->vm, 1, KVM_MEM_GUEST_MEMFD, gpa, 0, NULL, -1, 0);
	return NULL;
}

/* The slot and the file go at the same time. */
TEST_F_TIMEOUT(hugetlb, unbind_race, HUGETLB_TEST_TIMEOUT)
{
	struct slot_race race = {
		.vm = self->vm,
		.page_size = self->page_size,
	};
	pthread_t thread;
	int i, fd;

	for (i = 0; i < 100; i++) {
		fd = create(2);
		vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, gpa,
					   2 * self->page_size, NULL, fd, 0);
		if (is_cheap)
			kvm_fallocate(fd, ALLOCATE, 0, self->page_size);

		WRITE_ONCE(race.go, false);
		kvm_pthread_create(&thread, NULL, delete_slot_thread, &race);
		WRITE_ONCE(race.go, true);
		kvm_close(fd);
		kvm_pthread_join(thread, NULL);
		ASSERT_POOL(0, 0);
	}
}

/* Returns the pfn of one of the pages. */
static u64 dirty_pool(long nr_pages, size_t page_size)
{
	size_t size = nr_pages * page_size;
	int fd = hugetlbfs_create(size, page_size);
	void *mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	u64 pfn;

	fill_memory(mem, size, PATTERN);
	pfn = mem_to_pfn(mem);
	TEST_ASSERT(pfn, "The page is not in pagemap");
	kvm_munmap(mem, size);
	kvm_close(fd);
	return pfn;
}

/* By anybody.  Mappings of 1G aren't in the pagemap of the one who has them. */
static bool is_mapped(u64 pfn)
{
	u64 flags;
	int fd;

	fd = open_path_or_exit("/proc/kpageflags", O_RDONLY);
	TEST_ASSERT(pread(fd, &flags, sizeof(flags), pfn * sizeof(flags)) == sizeof(flags),
		    "Can't read /proc/kpageflags");
	kvm_close(fd);
	return flags & BIT_ULL(KPF_MMAP);
}

TEST_F_TIMEOUT(hugetlb, zeroing, HUGETLB_TEST_TIMEOUT)
{
	/*
	 * The pool hands out first what it got back last, and looks at the node of
	 * the CPU first.  That's good enough where it would take too long to go
	 * for all pages.
	 */
	const long nr = is_cheap ? self->available : 1;
	const size_t size = nr * self->page_size;
	void *mem;
	u64 pfn;
	int fd;

	if (!(variant->flags & GUEST_MEMFD_FLAG_MMAP))
		SKIP(return, "private memory is for the guest to look at");

	pin_self_to_any_cpu();
	pfn = dirty_pool(nr, self->page_size);

	/* Allocated by faults */
	fd = create(nr);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	TEST_ASSERT_MEMORY(mem, size, 0);
	TEST_ASSERT(is_mapped(pfn), "Not the page that was dirty");
	fill_memory(mem, size, PATTERN);

	/* Given back to the file, and allocated again */
	if (is_cheap) {
		kvm_fallocate(fd, PUNCH_HOLE, 0, size);
		TEST_ASSERT_MEMORY(mem, size, 0);
		fill_memory(mem, size, PATTERN);
	}
	kvm_munmap(mem, size);
	kvm_close(fd);
	TEST_ASSERT(!is_mapped(pfn), "Still mapped");

	/* Given back to the pool, and allocated for another file by fallocate() */
	fd = create(nr);
	kvm_fallocate(fd, ALLOCATE, 0, size);
	mem = kvm_mmap(size, PROT_READ, MAP_SHARED, fd);
	TEST_ASSERT_MEMORY(mem, size, 0);
	TEST_ASSERT(is_mapped(pfn), "Not the page that was dirty");
	ASSERT_POOL(nr, 0);
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

/*
 * A task that is killed does not zero on, and what it leaves behind isn't taken
 * for a zeroed page by the next one.
 */
TEST_F_TIMEOUT(hugetlb, zeroing_interrupted, HUGETLB_TEST_TIMEOUT)
{
	enum { BY_FALLOCATE, BY_FAULT, NR_WAYS };
	const long nr = is_cheap ? self->available : 1;
	const size_t size = nr * self->page_size;
	/* One page of 2M is too small to die in, fallocate() zeroes many of them. */
	const int nr_ways = is_cheap ? BY_FAULT : NR_WAYS;
	int fd, status, way, i;
	double begin, duration;
	bool interrupted;
	void *mem;
	pid_t pid;
	u64 pfn;

	if (!(variant->flags & GUEST_MEMFD_FLAG_MMAP))
		SKIP(return, "private memory is for the guest to look at");

	pin_self_to_any_cpu();
	pfn = dirty_pool(nr, self->page_size);
	fd = create(nr);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	begin = now();
	kvm_fallocate(fd, ALLOCATE, 0, size);
	duration = now() - begin;

	for (way = 0; way < nr_ways; way++) {
		interrupted = false;
		for (i = 0; i < 8 && !interrupted; i++) {
			fill_memory(mem, size, PATTERN);
			kvm_fallocate(fd, PUNCH_HOLE, 0, size);
			ASSERT_POOL(0, nr);

			pid = fork();
			if (!pid) {
				if (way == BY_FAULT)
					READ_ONCE(*(u64 *)mem);
				else
					kvm_fallocate(fd, ALLOCATE, 0, size);
				_exit(0);
			}

			/* A page is allocated, and then zeroed. */
			while (hugetlb_pool_get(self->page_size, "free_hugepages") ==
			       self->pool.free)
				usleep(1000);
			usleep(duration * 1e6 / 4);
			TEST_ASSERT(!kill(pid, SIGKILL), "kill() failed");
			begin = now();
			TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid() failed");
			TEST_ASSERT(!status || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL),
				    "The child ended with status 0x%x", status);
			interrupted = status && now() - begin < duration / 4;
		}
		TEST_ASSERT(interrupted, "Zeroing takes %.3f s and can't be interrupted",
			    duration);

		/* The page that wasn't zeroed to the end is in the file, and not mapped. */
		if (nr == 1)
			ASSERT_POOL(1, 0);
		TEST_ASSERT(!is_mapped(pfn), "Mapped without being zeroed");

		TEST_ASSERT_MEMORY(mem, size, 0);
		TEST_ASSERT(is_mapped(pfn), "Not the page that was dirty");
		ASSERT_POOL(nr, 0);
	}
	kvm_munmap(mem, size);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

static void read_nodes(size_t page_size, long free[2])
{
	free[0] = hugetlb_node_free(0, page_size);
	free[1] = hugetlb_node_free(1, page_size);
}

static void assert_nodes(size_t page_size, const long before[2], long node0, long node1)
{
	long free[2];

	read_nodes(page_size, free);
	TEST_ASSERT(before[0] - free[0] == node0 && before[1] - free[1] == node1,
		    "Wanted %ld pages of node 0 and %ld of node 1, got %ld and %ld",
		    node0, node1, before[0] - free[0], before[1] - free[1]);
}

TEST_F_TIMEOUT(hugetlb, memory_policy, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = is_cheap ? 4 : 1;
	const size_t half = nr * page_size;
	const unsigned long masks[] = { 1, 2 }, both = 3;
	int fd, node, policy;
	long free[2], i;
	char *mem;

	read_nodes(page_size, free);
	if (!is_multi_numa_node_system() || free[0] < nr || free[1] < nr)
		SKIP(return, "two nodes with %ld free huge pages each needed", nr);

	/* A mapping has a policy, even if the memory can't be accessed there. */
	self->flags |= GUEST_MEMFD_FLAG_MMAP;
	fd = create(2 * nr);
	mem = kvm_mmap(2 * half, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	/* No part of a huge page has a policy of its own. */
	expect_error(mbind(mem, 4096, MPOL_BIND, &masks[0], 8, 0), EINVAL);
	expect_error(mbind(mem + 4096, page_size, MPOL_BIND, &masks[0], 8, 0), EINVAL);
	kvm_get_mempolicy(&policy, NULL, 0, mem, MPOL_F_ADDR);
	TEST_ASSERT_EQ(policy, MPOL_DEFAULT);

	for (node = 0; node < 2; node++) {
		kvm_mbind(mem, half, MPOL_BIND, &masks[node], 8, 0);
		kvm_mbind(mem + half, half, MPOL_BIND, &masks[!node], 8, 0);
		kvm_get_mempolicy(&policy, NULL, 0, mem, MPOL_F_ADDR);
		TEST_ASSERT_EQ(policy, MPOL_BIND);

		read_nodes(page_size, free);
		kvm_fallocate(fd, ALLOCATE, 0, half);
		assert_nodes(page_size, free, node ? 0 : nr, node ? nr : 0);

		if (is_cheap && variant->flags & GUEST_MEMFD_FLAG_INIT_SHARED) {
			for (i = 0; i < nr; i++)
				WRITE_ONCE(mem[half + i * page_size], 1);
			assert_nodes(page_size, free, nr, nr);
		} else if (is_cheap) {
			kvm_fallocate(fd, ALLOCATE, half, half);
			assert_nodes(page_size, free, nr, nr);
		}
		kvm_fallocate(fd, PUNCH_HOLE, 0, 2 * half);
	}

	if (!is_cheap)
		return;

	kvm_mbind(mem, 2 * half, MPOL_INTERLEAVE, &both, 8, 0);
	read_nodes(page_size, free);
	kvm_fallocate(fd, ALLOCATE, 0, 2 * half);
	assert_nodes(page_size, free, nr, nr);
	kvm_fallocate(fd, PUNCH_HOLE, 0, 2 * half);

	/* Without one of its own, the file goes by the task's policy. */
	kvm_mbind(mem, 2 * half, MPOL_DEFAULT, NULL, 0, 0);
	for (node = 0; node < 2; node++) {
		kvm_set_mempolicy(MPOL_BIND, &masks[node], 8);
		read_nodes(page_size, free);
		kvm_fallocate(fd, ALLOCATE, 0, half);
		assert_nodes(page_size, free, node ? 0 : nr, node ? nr : 0);
		kvm_fallocate(fd, PUNCH_HOLE, 0, half);
	}
	kvm_set_mempolicy(MPOL_DEFAULT, NULL, 0);
	kvm_munmap(mem, 2 * half);
	kvm_close(fd);
}

TEST_HARNESS_MAIN
