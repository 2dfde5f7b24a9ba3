// SPDX-License-Identifier: GPL-2.0
/*
 * Memory out of the direct map in memslots that don't refer to the guest_memfd, but
 * to a mapping of it
 *
 * That's how a range of a file gets into a second address space, e.g. for SMM.  KVM
 * follows the host's page tables then.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)

#define BASE		SZ_4G
#define SLOT		10
#define PATTERN		0xa5a5a5a5a5a5a5a5ul

static u64 *guest_address;
static u64 guest_value;

/* Reads, writes, and returns what it read. */
static void guest_code(void)
{
	for (;;) {
		u64 *word = READ_ONCE(guest_address);
		u64 old = READ_ONCE(*word);

		if (READ_ONCE(guest_value))
			WRITE_ONCE(*word, guest_value);
		GUEST_SYNC(old);
	}
}

FIXTURE(ordinary_slot) {
	struct hugetlb_pool pool;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	size_t page_size;
	u64 *mem;
	int fd;
};

FIXTURE_VARIANT(ordinary_slot) {
	size_t page_size;
};

FIXTURE_VARIANT_ADD(ordinary_slot, 4K) {
	.page_size = SZ_4K,
};

FIXTURE_VARIANT_ADD(ordinary_slot, 2M) {
	.page_size = SZ_2M,
};

FIXTURE_VARIANT_ADD(ordinary_slot, 1G) {
	.page_size = SZ_1G,
};

FIXTURE_SETUP(ordinary_slot)
{
	u64 flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP;
	const char *missing;
	size_t size;

	if (!(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_NO_DIRECT_MAP))
		SKIP(return, "no GUEST_MEMFD_FLAG_NO_DIRECT_MAP");
	if (variant->page_size > SZ_4K) {
		missing = hugetlb_missing(variant->page_size, 2);
		if (missing)
			SKIP(return, "%s", missing);

		self->pool = hugetlb_pool_read(variant->page_size);
		flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(variant->page_size);
	}

	self->page_size = variant->page_size;
	size = 2 * self->page_size;
	self->vm = vm_create_with_one_vcpu(&self->vcpu, guest_code);
	self->fd = vm_create_guest_memfd(self->vm, size, flags);
	self->mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	vm_set_user_memory_region(self->vm, SLOT, 0, BASE, size, self->mem);
	virt_map_level(self->vm, BASE, BASE, max_t(size_t, size, SZ_2M), PG_LEVEL_2M);
}

FIXTURE_TEARDOWN_PARENT(ordinary_slot)
{
	if (self->page_size > SZ_4K)
		TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

static int __guest_run(struct kvm_vcpu *vcpu, size_t offset, u64 value)
{
	u64 *address = (u64 *)(BASE + offset);

	write_guest_global(vcpu->vm, guest_address, address);
	write_guest_global(vcpu->vm, guest_value, value);
	return _vcpu_run(vcpu);
}

static u64 guest_run(struct kvm_vcpu *vcpu, size_t offset, u64 value)
{
	int r = __guest_run(vcpu, offset, value);
	struct ucall uc;

	TEST_ASSERT(!r, "KVM_RUN failed, errno %d", errno);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	return uc.args[1];
}

#define word_at(_offset)	(self->mem[(_offset) / sizeof(u64)])

static long read_leaves(struct kvm_vm *vm, size_t page_size)
{
	switch (page_size) {
	case SZ_4K:
		return vm_get_stat(vm, pages_4k);
	case SZ_2M:
		return vm_get_stat(vm, pages_2m);
	default:
		return vm_get_stat(vm, pages_1g);
	}
}

TEST_F_TIMEOUT(ordinary_slot, same_memory, HUGETLB_TEST_TIMEOUT)
{
	const size_t last = self->page_size - sizeof(u64);

	/* The guest's access is the first. */
	TEST_ASSERT_EQ(guest_run(self->vcpu, last, PATTERN), 0);
	TEST_ASSERT_EQ(word_at(last), PATTERN);

	word_at(0) = 1;
	TEST_ASSERT_EQ(guest_run(self->vcpu, 0, 2), 1);
	TEST_ASSERT_EQ(word_at(0), 2);

	/* User space' access is the first. */
	word_at(self->page_size) = 3;
	TEST_ASSERT_EQ(guest_run(self->vcpu, self->page_size, 0), 3);
}

TEST_F_TIMEOUT(ordinary_slot, invalidation, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	long leaves;

	guest_run(self->vcpu, 0, PATTERN);
	leaves = read_leaves(self->vm, page_size);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, page_size);
	TEST_ASSERT_EQ(read_leaves(self->vm, page_size), leaves - 1);
	TEST_ASSERT_EQ(guest_run(self->vcpu, 0, 1), 0);
	TEST_ASSERT_EQ(word_at(0), 1);
	TEST_ASSERT_EQ(read_leaves(self->vm, page_size), leaves);

	/* Zapping user space' entries is enough, the memory stays as it is. */
	TEST_ASSERT(!madvise(self->mem, page_size, MADV_DONTNEED), "errno %d", errno);
	TEST_ASSERT_EQ(read_leaves(self->vm, page_size), leaves - 1);
	TEST_ASSERT_EQ(guest_run(self->vcpu, 0, 0), 1);
}

/* Leaves are as large as user space' entries. */
TEST_F_TIMEOUT(ordinary_slot, mapping_level, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	long leaves;

	guest_run(self->vcpu, page_size, PATTERN);
	leaves = read_leaves(self->vm, page_size);
	guest_run(self->vcpu, page_size - sizeof(u64), PATTERN);
	TEST_ASSERT_EQ(read_leaves(self->vm, page_size), leaves + 1);
	guest_run(self->vcpu, 0, PATTERN);
	TEST_ASSERT_EQ(read_leaves(self->vm, page_size), leaves + 1);
}

TEST_F_TIMEOUT(ordinary_slot, protection, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	int r;

	word_at(0) = PATTERN;

	/* What user space may not do, the guest may not, either. */
	TEST_ASSERT(!mprotect(self->mem, page_size, PROT_READ), "errno %d", errno);
	TEST_ASSERT_EQ(guest_run(self->vcpu, 0, 0), PATTERN);
	r = __guest_run(self->vcpu, 0, 1);
	TEST_ASSERT(r == -1 && errno == EFAULT, "Wanted EFAULT, got %d, errno %d", r, errno);

	TEST_ASSERT(!mprotect(self->mem, page_size, PROT_NONE), "errno %d", errno);
	r = _vcpu_run(self->vcpu);
	TEST_ASSERT(r == -1 && errno == EFAULT, "Wanted EFAULT, got %d, errno %d", r, errno);

	TEST_ASSERT(!mprotect(self->mem, page_size, PROT_READ | PROT_WRITE), "errno %d", errno);
	r = _vcpu_run(self->vcpu);
	TEST_ASSERT(!r, "KVM_RUN failed, errno %d", errno);
	TEST_ASSERT_EQ(word_at(0), 1);
}

TEST_HARNESS_MAIN
