// SPDX-License-Identifier: GPL-2.0
/*
 * What is easily got wrong about memory failure in guest_memfd
 *
 * Poisoned pages are lost, which is the price.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/prctl.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE
#define CORRUPT_PFN	"/sys/kernel/debug/hwpoison/corrupt-pfn"

FIXTURE(pitfall_hwpoison) {
	struct kvm_vm *vm;
};

FIXTURE_SETUP(pitfall_hwpoison)
{
	if (access(CORRUPT_PFN, W_OK))
		SKIP(return, "no CONFIG_HWPOISON_INJECT, or no debugfs");
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN(pitfall_hwpoison)
{
}

struct punch {
	atomic_int round;
	atomic_int done;
	int nr_rounds;
	size_t size;
	int fd;
};

static void *punch_thread(void *data)
{
	struct punch *punch = data;
	int i;

	for (i = 1; i <= punch->nr_rounds; i++) {
		while (atomic_load(&punch->round) < i)
			sched_yield();
		kvm_fallocate(punch->fd, PUNCH_HOLE, 0, punch->size);
		atomic_store(&punch->done, i);
	}
	return NULL;
}

/*
 * Memory failure locks the folio and tells guest_memfd, which takes the invalidate
 * lock.  To punch a hole takes the invalidate lock and then the lock of each folio.
 * The page that fails is the last one to be punched, for them to meet.  Nobody who
 * fails this test comes back.
 */
TEST_F_TIMEOUT(pitfall_hwpoison, punch, HUGETLB_TEST_TIMEOUT)
{
	struct punch punch = {
		.nr_rounds = 200,
		.size = SZ_2M,
	};
	pthread_t thread;
	char *mem;
	u64 pfn;
	int i;

	punch.fd = vm_create_guest_memfd(self->vm, punch.size, SHARED_MEMORY);
	vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, SZ_4G, punch.size,
				   NULL, punch.fd, 0);
	kvm_pthread_create(&thread, NULL, punch_thread, &punch);

	for (i = 1; i <= punch.nr_rounds; i++) {
		/* Where a poisoned page was mapped, none can be. */
		mem = kvm_mmap(punch.size, PROT_READ | PROT_WRITE, MAP_SHARED, punch.fd);
		kvm_fallocate(punch.fd, ALLOCATE, 0, punch.size);
		WRITE_ONCE(mem[punch.size - 1], 1);
		pfn = mem_to_pfn(mem + punch.size - SZ_4K);
		TEST_ASSERT(pfn, "Not mapped");

		/* Whether the page is still there, and what becomes of it, is open. */
		atomic_store(&punch.round, i);
		(void)write_long(CORRUPT_PFN, pfn);
		while (atomic_load(&punch.done) < i)
			sched_yield();
		kvm_munmap(mem, punch.size);
	}
	kvm_pthread_join(thread, NULL);
}

/* Nobody has written to it, but it can't be had from anywhere else. */
TEST_F_TIMEOUT(pitfall_hwpoison, read_only, HUGETLB_TEST_TIMEOUT)
{
	const char *missing = hugetlb_missing(SZ_2M, 1);
	siginfo_t info;
	sigset_t set;
	char *mem;
	u64 pfn;
	int fd;

	if (missing)
		SKIP(return, "%s", missing);

	fd = vm_create_guest_memfd(self->vm, SZ_2M, SHARED_MEMORY |
				   GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_2MB);
	mem = kvm_mmap(SZ_2M, PROT_READ, MAP_SHARED, fd);
	TEST_ASSERT_EQ(READ_ONCE(mem[8]), 0);
	pfn = mem_to_pfn(mem);
	TEST_ASSERT(pfn, "Not mapped");

	sigemptyset(&set);
	sigaddset(&set, SIGBUS);
	sigprocmask(SIG_BLOCK, &set, NULL);
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);

	TEST_ASSERT(!write_long(CORRUPT_PFN, pfn + 3), "Can't poison, errno %d", errno);
	TEST_ASSERT(sigtimedwait(&set, &info, &(struct timespec) { .tv_sec = 30 }) == SIGBUS &&
		    info.si_code == BUS_MCEERR_AO, "Nobody was told");
	TEST_ASSERT((char *)info.si_addr >= mem && (char *)info.si_addr < mem + SZ_2M &&
		    info.si_addr_lsb == __builtin_ctzl(SZ_2M), "SIGBUS: lsb %d, address %p in %p",
		    info.si_addr_lsb, info.si_addr, mem);
}

/* A page that was on loan is a page of hugetlbfs like any other. */
TEST_F_TIMEOUT(pitfall_hwpoison, returned, HUGETLB_TEST_TIMEOUT)
{
	const char *missing = hugetlb_missing(SZ_2M, 2);
	struct hugetlb_pool pool;
	long nr_pages, i;
	siginfo_t info;
	sigset_t set;
	char *mem;
	u64 pfn;
	int fd;

	if (missing)
		SKIP(return, "%s", missing);

	pool = hugetlb_pool_read(SZ_2M);
	nr_pages = pool.free - pool.reserved;
	fd = vm_create_guest_memfd(self->vm, nr_pages * SZ_2M,
				   GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_2MB);
	kvm_fallocate(fd, ALLOCATE, 0, nr_pages * SZ_2M);
	kvm_close(fd);

	fd = hugetlbfs_create(nr_pages * SZ_2M, SZ_2M);
	mem = kvm_mmap(nr_pages * SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (i = 0; i < nr_pages; i++)
		WRITE_ONCE(mem[i * SZ_2M], 1);
	mem += SZ_2M;
	pfn = mem_to_pfn(mem);
	TEST_ASSERT(pfn, "Not mapped");

	sigemptyset(&set);
	sigaddset(&set, SIGBUS);
	sigprocmask(SIG_BLOCK, &set, NULL);
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);

	TEST_ASSERT(!write_long(CORRUPT_PFN, pfn + 3), "Can't poison, errno %d", errno);
	TEST_ASSERT_EQ(mem_to_pfn(mem), 0);
	TEST_ASSERT(sigtimedwait(&set, &info, &(struct timespec) { .tv_sec = 30 }) == SIGBUS &&
		    info.si_code == BUS_MCEERR_AO, "Nobody was told");
	TEST_ASSERT((char *)info.si_addr >= mem && (char *)info.si_addr < mem + SZ_2M,
		    "SIGBUS: address %p in %p", info.si_addr, mem);
}

TEST_HARNESS_MAIN
