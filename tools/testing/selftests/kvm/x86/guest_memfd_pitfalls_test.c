// SPDX-License-Identifier: GPL-2.0
/*
 * What is easily got wrong in guest_memfd, and not noticed by other tests
 *
 * Each test is there for a line or two, scripts and reviewers may take them out to
 * see it fail.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/time.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PATTERN		0xa5a5a5a5a5a5a5a5ul

#define NR_VCPUS	2
#define SLOT		10
#define BASE		SZ_4G

/* An address, and what a vCPU is to write there after it has read it */
static u64 addresses[NR_VCPUS], values[NR_VCPUS];

static void guest_code(int id)
{
	for (;;) {
		u64 *word = (u64 *)READ_ONCE(addresses[id]), old = READ_ONCE(*word);

		WRITE_ONCE(*word, READ_ONCE(values[id]));
		GUEST_SYNC(old);
	}
}

/* Returns what was there before. */
static u64 guest_exchange(struct kvm_vcpu *vcpu, u64 gpa, u64 value)
{
	struct ucall uc;

	*(u64 *)addr_gva2hva(vcpu->vm, (gva_t)&addresses[vcpu->id]) = gpa;
	*(u64 *)addr_gva2hva(vcpu->vm, (gva_t)&values[vcpu->id]) = value;
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	return uc.args[1];
}

FIXTURE(pitfall) {
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct hugetlb_pool pool;
	struct kvm_vm *vm;
};

static void create_vm(struct kvm_vm **vm, struct kvm_vcpu *vcpus[NR_VCPUS], int type, u64 size)
{
	struct vm_shape shape = VM_SHAPE_DEFAULT;
	int i;

	shape.type = type;
	*vm = __vm_create_with_vcpus(shape, NR_VCPUS, 0, guest_code, vcpus);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_args_set(vcpus[i], 1, i);
	virt_map_level(*vm, BASE, BASE, size, PG_LEVEL_2M);
}

FIXTURE_SETUP(pitfall)
{
	const char *missing = hugetlb_missing(SZ_2M, 8);

	if (missing)
		SKIP(return, "%s", missing);
	self->pool = hugetlb_pool_read(SZ_2M);
}

FIXTURE_TEARDOWN_PARENT(pitfall)
{
	if (hugetlb_pool_get(SZ_2M, "nr_hugepages") != self->pool.total)
		hugetlb_pool_set(SZ_2M, "nr_hugepages", self->pool.total);
	TEST_ASSERT_POOL_EVENTUALLY(SZ_2M, self->pool, 0, 0);
}

static int nr_signals;

static void alarm_handler(int signal)
{
	WRITE_ONCE(nr_signals, READ_ONCE(nr_signals) + 1);
}

/* There is nothing fatal about the signal, it's just that somebody has to handle it. */
TEST_F_TIMEOUT(pitfall, signal, HUGETLB_TEST_TIMEOUT)
{
	const struct itimerval interval = {
		.it_interval.tv_usec = 1000,
		.it_value.tv_usec = 1000,
	}, off = {};
	const struct sigaction sa = { .sa_handler = alarm_handler };
	const size_t size = SZ_256M;
	int fd, before, tries, r;

	self->vm = vm_create_barebones();
	fd = vm_create_guest_memfd(self->vm, size, 0);
	sigaction(SIGALRM, &sa, NULL);

	/* A machine may be so fast as to be done before there is a signal. */
	for (tries = 0; tries < 100; tries++) {
		before = READ_ONCE(nr_signals);
		TEST_ASSERT(!setitimer(ITIMER_REAL, &interval, NULL), "setitimer() failed");
		r = fallocate(fd, ALLOCATE, 0, size);
		if (r && errno != EINTR)
			TEST_FAIL("fallocate(): wanted EINTR, got errno %d", errno);
		TEST_ASSERT(!setitimer(ITIMER_REAL, &off, NULL), "setitimer() failed");
		if (r)
			break;
		TEST_ASSERT(READ_ONCE(nr_signals) - before < 3,
			    "Allocated on through %d signals", nr_signals - before);
		kvm_fallocate(fd, PUNCH_HOLE, 0, size);
	}
	TEST_ASSERT(r, "Allocating %lu MiB takes less than 3 ms, 100 times", size / SZ_1M);
}

struct fault {
	struct kvm_vcpu *vcpu;
	atomic_int *round;
	atomic_int *done;
	int nr_rounds;
	u64 *word;
};

static void *fault_thread(void *data)
{
	struct fault *fault = data;
	int i;

	for (i = 1; i <= fault->nr_rounds; i++) {
		while (atomic_load(fault->round) < i)
			sched_yield();
		if (fault->vcpu)
			vcpu_run(fault->vcpu);
		else
			WRITE_ONCE(*fault->word, i);
		atomic_fetch_add(fault->done, 1);
	}
	return NULL;
}

/*
 * All fault on one huge page of a file that has others to spare: those who come late
 * must not take one of these, which would find no place in the file.
 */
TEST_F_TIMEOUT(pitfall, concurrent_faults, HUGETLB_TEST_TIMEOUT)
{
	enum { NR_FAULTS = 2 * NR_VCPUS };
	const long nr_pages = NR_FAULTS, nr_rounds = 500;
	struct fault faults[NR_FAULTS] = {};
	pthread_t threads[NR_FAULTS];
	atomic_int round = 0, done = 0;
	int fd, i, n;
	char *mem;

	create_vm(&self->vm, self->vcpus, VM_SHAPE_DEFAULT.type, nr_pages * SZ_2M);
	fd = vm_create_guest_memfd(self->vm, nr_pages * SZ_2M, SHARED_MEMORY |
				   GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_2MB);
	vm_set_user_memory_region2(self->vm, SLOT, KVM_MEM_GUEST_MEMFD, BASE,
				   nr_pages * SZ_2M, NULL, fd, 0);
	mem = kvm_mmap(nr_pages * SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (i = 0; i < NR_VCPUS; i++)
		guest_exchange(self->vcpus[i], BASE + i * SZ_64K, 0);
	kvm_fallocate(fd, PUNCH_HOLE, 0, SZ_2M);

	for (i = 0; i < NR_FAULTS; i++) {
		faults[i].vcpu = i < NR_VCPUS ? self->vcpus[i] : NULL;
		faults[i].nr_rounds = nr_rounds;
		faults[i].round = &round;
		faults[i].done = &done;
		faults[i].word = (u64 *)(mem + i * SZ_64K);
		kvm_pthread_create(&threads[i], NULL, fault_thread, &faults[i]);
	}
	for (n = 1; n <= nr_rounds; n++) {
		atomic_store(&round, n);
		while (atomic_load(&done) < n * NR_FAULTS)
			sched_yield();
		TEST_ASSERT_POOL(SZ_2M, self->pool, 1, nr_pages - 1);
		kvm_fallocate(fd, PUNCH_HOLE, 0, SZ_2M);
	}
	for (i = 0; i < NR_FAULTS; i++)
		kvm_pthread_join(threads[i], NULL);
}

/* However large and aligned a slot is, what is mapped is one page of the file. */
TEST_F_TIMEOUT(pitfall, level, HUGETLB_TEST_TIMEOUT)
{
	const long nr_pages = SZ_1G / SZ_2M;
	struct hugetlb_pool pool;
	long leaves_2m;
	int fd;
	u64 *mem;

	create_vm(&self->vm, self->vcpus, VM_SHAPE_DEFAULT.type, SZ_1G);
	hugetlb_pool_set(SZ_2M, "nr_hugepages", self->pool.total + nr_pages);
	pool = hugetlb_pool_read(SZ_2M);
	if (pool.free - pool.reserved < nr_pages)
		SKIP(return, "no memory for %ld huge pages", nr_pages);

	fd = vm_create_guest_memfd(self->vm, SZ_1G, SHARED_MEMORY |
				   GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_2MB);
	vm_set_user_memory_region2(self->vm, SLOT, KVM_MEM_GUEST_MEMFD, BASE, SZ_1G,
				   NULL, fd, 0);
	kvm_fallocate(fd, ALLOCATE, 0, SZ_1G);
	mem = kvm_mmap(SZ_1G, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	leaves_2m = vm_get_stat(self->vm, pages_2m);
	TEST_ASSERT_EQ(guest_exchange(self->vcpus[0], BASE + SZ_2M, 1), 0);
	TEST_ASSERT_EQ(guest_exchange(self->vcpus[0], BASE + SZ_1G - 8, 2), 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_1g), 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), leaves_2m + 2);
	TEST_ASSERT_EQ(READ_ONCE(mem[SZ_2M / 8]), 1);
	TEST_ASSERT_EQ(READ_ONCE(mem[SZ_1G / 8 - 1]), 2);
}

/*
 * What the VMM has mapped at the slot's address is its own business.  With shadow
 * paging, the guest's huge page is made of small ones, and KVM is tempted to map the
 * neighbours of one it has to map.
 */
TEST_F_TIMEOUT(pitfall, prefetch, HUGETLB_TEST_TIMEOUT)
{
	u64 *hva, i;
	int fd;

	create_vm(&self->vm, self->vcpus, VM_SHAPE_DEFAULT.type, SZ_2M);
	hva = kvm_mmap(SZ_2M, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < SZ_2M / 8; i++)
		hva[i] = PATTERN;

	fd = vm_create_guest_memfd(self->vm, SZ_2M, SHARED_MEMORY);
	vm_set_user_memory_region2(self->vm, SLOT, KVM_MEM_GUEST_MEMFD, BASE, SZ_2M,
				   hva, fd, 0);
	for (i = 0; i < SZ_2M; i += SZ_4K)
		TEST_ASSERT_EQ(guest_exchange(self->vcpus[0], BASE + i, i), 0);
	for (i = 0; i < SZ_2M; i += SZ_4K)
		TEST_ASSERT_EQ(hva[i / 8], PATTERN);
}

/*
 * Dirty logging ends while a gfn is private, but its slot has no guest_memfd, hence
 * nothing is mapped there, but the page table that was is still there.
 */
TEST_F_TIMEOUT(pitfall, private_without_file, HUGETLB_TEST_TIMEOUT)
{
	const long tainted = read_long("/proc/sys/kernel/tainted");
	void *hva;
	u64 i;

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		SKIP(return, "no KVM_X86_SW_PROTECTED_VM");

	create_vm(&self->vm, self->vcpus, KVM_X86_SW_PROTECTED_VM, SZ_4M);
	hva = kvm_mmap(SZ_4M + SZ_2M, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	hva = align_ptr_up(hva, SZ_2M);
	vm_set_user_memory_region(self->vm, SLOT, KVM_MEM_LOG_DIRTY_PAGES, BASE, SZ_4M, hva);
	for (i = 0; i < SZ_4M; i += SZ_64K)
		TEST_ASSERT_EQ(guest_exchange(self->vcpus[0], BASE + i, i), 0);
	vm_mem_set_private(self->vm, BASE, SZ_2M);
	vm_set_user_memory_region(self->vm, SLOT, 0, BASE, SZ_4M, hva);

	TEST_ASSERT_EQ(guest_exchange(self->vcpus[0], BASE + SZ_2M + SZ_64K, 0), SZ_2M + SZ_64K);
	vm_mem_set_shared(self->vm, BASE, SZ_2M);
	TEST_ASSERT_EQ(guest_exchange(self->vcpus[0], BASE + SZ_64K, 0), SZ_64K);
	TEST_ASSERT_EQ(read_long("/proc/sys/kernel/tainted"), tainted);
}

TEST_HARNESS_MAIN
