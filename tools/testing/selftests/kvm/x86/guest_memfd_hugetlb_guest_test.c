// SPDX-License-Identifier: GPL-2.0
/*
 * Guests that run in, and across, HugeTLB pages of guest_memfd
 *
 * A vCPU executes one command at a time, and what KVM maps for that is counted:
 * leaves are the stage-2 entries that map memory, of 4K, 2M and 1G.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "cgroup_util.h"
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

#define NR_VCPUS	4
#define SLOT		10

/* What the guest has mapped one to one, for the tests to put memory there */
#define BASE		SZ_4G
#define LIMIT		(BASE + SZ_4G)

enum guest_operation {
	GUEST_WRITE,
	GUEST_CHECK,
	GUEST_EXECUTE,
};

struct guest_command {
	enum guest_operation operation;
	u64 gpa, size, stride;
	u64 value;
};

static struct guest_command commands[NR_VCPUS];

static void guest_execute(u64 gpa, u32 value)
{
	u8 *code = (u8 *)gpa;
	u32 (*function)(void) = (void *)gpa;

	/* mov $value, %eax; ret */
	code[0] = 0xb8;
	memcpy(code + 1, &value, sizeof(value));
	code[5] = 0xc3;
	GUEST_ASSERT_EQ(function(), value);
}

static void guest_code(int id)
{
	struct guest_command *command = &commands[id];
	u64 offset;

	for (;;) {
		for (offset = 0; offset < READ_ONCE(command->size); offset += command->stride) {
			u64 *word = (u64 *)(command->gpa + offset);

			switch (command->operation) {
			case GUEST_WRITE:
				WRITE_ONCE(*word, command->value);
				break;
			case GUEST_CHECK:
				__GUEST_ASSERT(READ_ONCE(*word) == command->value,
					       "Wanted 0x%lx at gpa 0x%lx, got 0x%lx",
					       command->value, (u64)word, *word);
				break;
			case GUEST_EXECUTE:
				guest_execute((u64)word, command->value);
				break;
			}
		}
		GUEST_SYNC(id);
	}
}

struct leaves {
	long pages_4k, pages_2m, pages_1g;
};

FIXTURE(guest) {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct hugetlb_pool pool;
	struct leaves leaves;
	size_t page_size;
	bool is_private;
	bool has_tdp;
	void *hva;
	u64 flags;
};

FIXTURE_VARIANT(guest) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(guest, private_2M) {
	.page_size = SZ_2M,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(guest, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(guest, private_1G) {
	.page_size = SZ_1G,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(guest, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

/* Zeroing is what takes time.  Those who can't see a difference go easy on 1G. */
#define is_cheap	(self->page_size <= SZ_2M)

#define ASSERT_POOL(_allocated, _reserved)					\
	TEST_ASSERT_POOL(self->page_size, self->pool, _allocated, _reserved)

static struct leaves read_leaves(struct kvm_vm *vm)
{
	return (struct leaves) {
		.pages_4k = vm_get_stat(vm, pages_4k),
		.pages_2m = vm_get_stat(vm, pages_2m),
		.pages_1g = vm_get_stat(vm, pages_1g),
	};
}

/*
 * Shadow paging may map a page twice, for small pages that are part of a large one
 * of the guest's: what it reads before it writes is mapped read-only for that.
 */
static bool is_leaf_count(long got, long want, bool has_tdp)
{
	return got >= want && got <= (has_tdp ? want : 2 * want);
}

static void __assert_leaves(struct kvm_vm *vm, struct leaves before, bool has_tdp,
			    struct leaves want, const char *file, int line)
{
	struct leaves got = read_leaves(vm);

	got.pages_4k -= before.pages_4k;
	got.pages_2m -= before.pages_2m;
	got.pages_1g -= before.pages_1g;
	test_assert(is_leaf_count(got.pages_4k, want.pages_4k, has_tdp) &&
		    is_leaf_count(got.pages_2m, want.pages_2m, has_tdp) &&
		    is_leaf_count(got.pages_1g, want.pages_1g, has_tdp),
		    "leaves", file, line,
		    "Leaves of 4K, 2M, 1G: wanted %ld, %ld, %ld, got %ld, %ld, %ld",
		    want.pages_4k, want.pages_2m, want.pages_1g,
		    got.pages_4k, got.pages_2m, got.pages_1g);
}

/* The leaves that were added since the fixture was set up */
#define ASSERT_LEAVES(_pages_4k, _pages_2m, _pages_1g)				\
do {										\
	struct leaves __want = { _pages_4k, _pages_2m, _pages_1g };		\
										\
	__assert_leaves(self->vm, self->leaves, self->has_tdp, __want,		\
			__FILE__, __LINE__);					\
} while (0)

/* Leaves of the size of the file's pages */
#define ASSERT_HUGE_LEAVES(_nr)							\
do {										\
	long __nr = (_nr);							\
										\
	ASSERT_LEAVES(0, is_cheap ? __nr : 0, is_cheap ? 0 : __nr);		\
} while (0)

static void guest_prepare(struct kvm_vcpu *vcpu, enum guest_operation operation,
			  u64 gpa, u64 size, u64 stride, u64 value)
{
	struct guest_command *command = addr_gva2hva(vcpu->vm, (gva_t)&commands[vcpu->id]);

	*command = (struct guest_command) {
		.operation = operation,
		.gpa = gpa,
		.size = size,
		.stride = stride,
		.value = value,
	};
}

static void guest_finish(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	vcpu_run(vcpu);
	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		break;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
		break;
	default:
		TEST_FAIL("Unexpected exit, reason %u (%s)", vcpu->run->exit_reason,
			  exit_reason_str(vcpu->run->exit_reason));
	}
}

static void guest_run(struct kvm_vcpu *vcpu, enum guest_operation operation,
		      u64 gpa, u64 size, u64 stride, u64 value)
{
	guest_prepare(vcpu, operation, gpa, size, stride, value);
	guest_finish(vcpu);
}

#define guest_write(_gpa, _value)						\
	guest_run(self->vcpus[0], GUEST_WRITE, _gpa, 8, 8, _value)
#define guest_check(_gpa, _value)						\
	guest_run(self->vcpus[0], GUEST_CHECK, _gpa, 8, 8, _value)

static int pre_fault(struct kvm_vcpu *vcpu, u64 gpa, u64 size)
{
	struct kvm_pre_fault_memory range = {
		.gpa = gpa,
		.size = size,
	};
	int r;

	do {
		r = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while ((!r && range.size) || (r && errno == EINTR));
	return r;
}

FIXTURE_SETUP(guest)
{
	const char *missing = hugetlb_missing(variant->page_size, 2);
	struct vm_shape shape = VM_SHAPE_DEFAULT;
	struct kvm_userspace_memory_region2 *region;
	size_t i;

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->is_private = !(variant->flags & GUEST_MEMFD_FLAG_INIT_SHARED);
	self->pool = hugetlb_pool_read(self->page_size);
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | variant->flags |
		      hugetlb_size_flag(self->page_size);

	if (self->is_private) {
		shape.type = KVM_X86_SW_PROTECTED_VM;
		if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(shape.type)))
			SKIP(return, "no KVM_X86_SW_PROTECTED_VM");
	}

	self->vm = __vm_create_with_vcpus(shape, NR_VCPUS, 0, guest_code, self->vcpus);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_args_set(self->vcpus[i], 1, i);

	/* Deleting a slot is to unmap what the slot maps, and nothing else. */
	vm_enable_cap(self->vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);

	/* Guest page tables are no limit: 1G pages, unless the vCPU has none. */
	virt_map_level(self->vm, BASE, BASE, LIMIT - BASE,
		       kvm_cpu_has(X86_FEATURE_GBPAGES) ? PG_LEVEL_1G : PG_LEVEL_2M);

	/* Addresses for slots, congruent to the gpa */
	self->hva = kvm_mmap(LIMIT - BASE + SZ_1G, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	self->hva = align_ptr_up(self->hva, SZ_1G);
	kvm_madvise(self->hva, LIMIT - BASE, MADV_NOHUGEPAGE);

	/*
	 * Populate and map all other memory, for the number of 4K leaves to be
	 * predictable from now on.
	 */
	region = &memslot2region(self->vm, 0)->region;
	for (i = 0; i < region->memory_size; i += getpagesize()) {
		u8 *page = (u8 *)region->userspace_addr + i;

		WRITE_ONCE(*page, READ_ONCE(*page));
	}
	self->has_tdp = !pre_fault(self->vcpus[0], region->guest_phys_addr,
				   region->memory_size);
	TEST_ASSERT(self->has_tdp || errno == EOPNOTSUPP, "KVM_PRE_FAULT_MEMORY: errno %d", errno);
	for (i = 0; i < NR_VCPUS; i++)
		guest_run(self->vcpus[i], GUEST_CHECK, BASE, 0, 8, 0);

	self->leaves = read_leaves(self->vm);
}

FIXTURE_TEARDOWN_PARENT(guest)
{
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

#define create(_nr_pages)							\
	vm_create_guest_memfd(self->vm, (_nr_pages) * self->page_size, self->flags)

#define add_slot_at(_slot, _hva, _gpa, _size, _fd, _offset)			\
do {										\
	u64 __gpa = (_gpa), __size = (_size);					\
										\
	vm_set_user_memory_region2(self->vm, _slot, KVM_MEM_GUEST_MEMFD, __gpa,	\
				   __size, _hva, _fd, _offset);			\
	if (self->is_private)							\
		vm_mem_set_private(self->vm, __gpa, __size);			\
} while (0)

/* At an address that is congruent to the gpa */
#define add_slot(_gpa, _size, _fd, _offset)					\
do {										\
	u64 __slot_gpa = (_gpa);						\
										\
	add_slot_at(SLOT, gpa_to_hva(__slot_gpa), __slot_gpa, _size, _fd, _offset); \
} while (0)

#define gpa_to_hva(_gpa)	(self->hva + ((_gpa) - BASE))

#define delete_slot()								\
	vm_set_user_memory_region2(self->vm, SLOT, KVM_MEM_GUEST_MEMFD, 0, 0, NULL, -1, 0)

TEST_F_TIMEOUT(guest, aligned, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = is_cheap ? 4 : 2;
	int fd = create(nr);
	u64 *mem;
	long i;

	add_slot(BASE, nr * page_size, fd, 0);
	ASSERT_POOL(0, nr);

	/* One page after the other, each touched first somewhere else */
	for (i = 0; i < nr; i++) {
		u64 gpa = BASE + i * page_size;

		guest_write(gpa + i * SZ_64K, i + 1);
		ASSERT_HUGE_LEAVES(i + 1);
		ASSERT_POOL(i + 1, nr - i - 1);
		guest_write(gpa + page_size - 8, ~i);
		guest_run(self->vcpus[0], GUEST_WRITE, gpa + 2048, page_size, SZ_4K, i);
		ASSERT_HUGE_LEAVES(i + 1);
		ASSERT_POOL(i + 1, nr - i - 1);
	}

	for (i = 0; i < nr; i++) {
		u64 gpa = BASE + i * page_size;

		guest_check(gpa + i * SZ_64K, i + 1);
		guest_check(gpa + page_size - 8, ~i);
		guest_run(self->vcpus[1], GUEST_CHECK, gpa + 2048, page_size, SZ_4K, i);
	}

	/* User space sees what the guest sees. */
	if (!self->is_private) {
		mem = kvm_mmap(nr * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		for (i = 0; i < nr; i++) {
			TEST_ASSERT_EQ(READ_ONCE(mem[i * (page_size + SZ_64K) / 8]), i + 1);
			WRITE_ONCE(mem[i * page_size / 8 + 1], ~PATTERN + i);
			guest_check(BASE + i * page_size + 8, ~PATTERN + i);
		}
	}
	ASSERT_HUGE_LEAVES(nr);
	ASSERT_POOL(nr, 0);

	/* Data and code from one huge page to the next */
	guest_write(BASE + page_size - 4, PATTERN);
	guest_check(BASE + page_size - 4, PATTERN);
	for (i = 1; i <= 6; i++)
		guest_run(self->vcpus[i % NR_VCPUS], GUEST_EXECUTE, BASE + page_size - i, 1, 1,
			  0x1234 + i);
	guest_run(self->vcpus[0], GUEST_EXECUTE, BASE + page_size / 2, 1, 1, 42);
	ASSERT_HUGE_LEAVES(nr);
	delete_slot();
	ASSERT_LEAVES(0, 0, 0);

	/* And from one slot's to the next, in reverse order */
	add_slot(BASE + page_size, page_size, fd, 0);
	add_slot_at(SLOT + 1, self->hva, BASE, page_size, fd, page_size);
	guest_check(BASE + page_size + page_size / 2 + 8, 0);
	guest_write(BASE + page_size - 4, ~PATTERN);
	guest_check(BASE + page_size - 4, ~PATTERN);
	guest_run(self->vcpus[1], GUEST_EXECUTE, BASE + page_size - 3, 1, 1, 0x5678);
	ASSERT_HUGE_LEAVES(2);
	ASSERT_POOL(nr, 0);
}

/* Leaves are as large as the slot allows.  The memory is the file's, not the slot's. */
TEST_F_TIMEOUT(guest, slot_alignment, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, half = page_size / 2;
	int fd = create(2), i;

	/* Not aligned at the end: the tail has what fits, 4K at last. */
	add_slot(BASE, page_size + half + SZ_4K, fd, 0);
	guest_write(BASE, 1);
	guest_write(BASE + half, 2);
	ASSERT_HUGE_LEAVES(1);
	guest_write(BASE + page_size, 3);
	guest_write(BASE + page_size + SZ_4K, 4);
	guest_write(BASE + page_size + half, 5);
	if (is_cheap)
		ASSERT_LEAVES(3, 1, 0);
	else
		ASSERT_LEAVES(1, 1, 1);
	delete_slot();
	ASSERT_LEAVES(0, 0, 0);

	/* Not aligned at the beginning, but congruent */
	add_slot(BASE + half, page_size + half, fd, half);
	guest_check(BASE + half, 2);
	guest_check(BASE + page_size - SZ_4K, 0);
	guest_check(BASE + page_size, 3);
	guest_check(BASE + page_size + half, 5);
	if (is_cheap)
		ASSERT_LEAVES(2, 1, 0);
	else
		ASSERT_LEAVES(0, 2, 1);
	delete_slot();

	/* The same, and there is no whole page in the slot, except for 2M out of 1G. */
	add_slot(BASE + SZ_4K, page_size - SZ_4K, fd, SZ_4K);
	guest_write(BASE + SZ_4K, 6);
	guest_check(BASE + half, 2);
	guest_check(BASE + page_size - SZ_4K, 0);
	if (is_cheap)
		ASSERT_LEAVES(3, 0, 0);
	else
		ASSERT_LEAVES(1, 2, 0);
	delete_slot();

	/* The offset is what's odd. */
	add_slot(BASE, 2 * page_size - SZ_4K, fd, SZ_4K);
	guest_check(BASE, 6);
	guest_check(BASE + half - SZ_4K, 2);
	guest_check(BASE + page_size, 4);
	ASSERT_LEAVES(3, 0, 0);
	delete_slot();

	/* The gfn is. */
	add_slot(BASE + SZ_4K, 2 * page_size, fd, 0);
	guest_check(BASE + SZ_4K, 1);
	guest_check(BASE + page_size + SZ_4K, 3);
	guest_check(BASE + page_size + half + SZ_4K, 5);
	ASSERT_LEAVES(3, 0, 0);
	delete_slot();

	/* Private memory's other half is at the slot's address, which counts, too. */
	add_slot_at(SLOT, self->hva + SZ_4K, BASE, page_size, fd, 0);
	guest_check(BASE, 1);
	guest_check(BASE + half, 2);
	if (self->is_private)
		ASSERT_LEAVES(2, 0, 0);
	else
		ASSERT_HUGE_LEAVES(1);
	delete_slot();

	/* Congruent modulo 2M, but not modulo 1G */
	if (!is_cheap) {
		add_slot(BASE, 2 * page_size - SZ_2M, fd, SZ_2M);
		guest_check(BASE, 0);
		guest_check(BASE + half - SZ_2M, 2);
		guest_check(BASE + page_size - SZ_2M, 3);
		guest_check(BASE + page_size - SZ_2M + SZ_4K, 4);
		ASSERT_LEAVES(0, 3, 0);
		delete_slot();
	}

	/* There and back again */
	for (i = 0; i < 10; i++) {
		u64 gpa = BASE + (i & 1) * page_size;

		add_slot(gpa, page_size, fd, 0);
		guest_check(gpa, 1);
		guest_check(gpa + half, 2);
		ASSERT_HUGE_LEAVES(1);
		delete_slot();
		ASSERT_LEAVES(0, 0, 0);
	}
	ASSERT_POOL(2, 0);
}

/*
 * The guest's own pages are smaller.  That's for its own page tables to know, unless
 * they are shadowed.
 */
TEST_F_TIMEOUT(guest, small_guest_pages, HUGETLB_TEST_TIMEOUT)
{
	const gva_t gva_4k = LIMIT, gva_2m = LIMIT + SZ_1G;
	int fd = create(1);

	virt_map(self->vm, gva_4k, BASE, 4);
	virt_map_level(self->vm, gva_2m, BASE, SZ_2M, PG_LEVEL_2M);
	add_slot(BASE, self->page_size, fd, 0);

	guest_write(gva_4k + SZ_4K, 1);
	guest_write(gva_4k + 3 * SZ_4K, 2);
	if (self->has_tdp)
		ASSERT_HUGE_LEAVES(1);
	else
		ASSERT_LEAVES(2, 0, 0);

	guest_check(gva_2m + SZ_4K, 1);
	guest_write(gva_2m + 3 * SZ_4K, 3);
	guest_check(gva_4k + 3 * SZ_4K, 3);
	if (self->has_tdp)
		ASSERT_HUGE_LEAVES(1);
	else
		ASSERT_LEAVES(2, 1, 0);

	guest_check(BASE + SZ_4K, 1);
	guest_check(BASE + 3 * SZ_4K, 3);

	kvm_fallocate(fd, PUNCH_HOLE, 0, self->page_size);
	ASSERT_LEAVES(0, 0, 0);
	ASSERT_POOL(0, 1);
	if (is_cheap) {
		guest_check(gva_4k + SZ_4K, 0);
		guest_check(gva_2m + 3 * SZ_4K, 0);
	}
}

/* A binding that is refused does nothing to the memory that is mapped by another. */
TEST_F_TIMEOUT(guest, refused_bindings, HUGETLB_TEST_TIMEOUT)
{
	const u64 page_size = self->page_size;
	const struct {
		u32 slot;
		u64 gpa, size, offset;
		int error;
	} refused[] = {
		/* Overlaps in the file, and in guest memory */
		{ SLOT + 1, BASE + 2 * page_size, page_size, 0, EEXIST },
		{ SLOT + 1, BASE + 2 * page_size, 2 * page_size, 0, EEXIST },
		{ SLOT + 1, BASE + 2 * page_size, SZ_4K, page_size - SZ_4K, EEXIST },
		{ SLOT + 1, BASE, page_size, page_size, EEXIST },
		{ SLOT + 1, BASE + page_size - SZ_4K, page_size, page_size, EEXIST },

		/* Past the end of the file */
		{ SLOT + 1, BASE + 2 * page_size, 2 * page_size, page_size, EINVAL },

		/* The slot can't be changed. */
		{ SLOT, BASE, page_size, 0, EINVAL },
		{ SLOT, BASE, page_size, page_size, EINVAL },
		{ SLOT, BASE + 2 * page_size, page_size, 0, EINVAL },
		{ SLOT, BASE, 2 * page_size, 0, EINVAL },
	};
	int fd = create(2), i, r;

	add_slot(BASE, page_size, fd, 0);
	guest_write(BASE + SZ_64K, PATTERN);

	for (i = 0; i < ARRAY_SIZE(refused); i++) {
		r = __vm_set_user_memory_region2(self->vm, refused[i].slot, KVM_MEM_GUEST_MEMFD,
						 refused[i].gpa, refused[i].size,
						 gpa_to_hva(refused[i].gpa), fd,
						 refused[i].offset);
		TEST_ASSERT(r == -1 && errno == refused[i].error,
			    "Binding %d: wanted errno %d, got %d, errno %d",
			    i, refused[i].error, r, errno);
		ASSERT_HUGE_LEAVES(1);
		guest_check(BASE + SZ_64K, PATTERN);
		ASSERT_POOL(1, 1);
	}

	/* What was refused isn't in the way of anything. */
	if (is_cheap) {
		add_slot_at(SLOT + 1, gpa_to_hva(BASE + page_size), BASE + page_size, page_size,
			    fd, page_size);
		guest_write(BASE + page_size, ~PATTERN);
		ASSERT_HUGE_LEAVES(2);
		ASSERT_POOL(2, 0);
	}
	guest_check(BASE + SZ_64K, PATTERN);
	delete_slot();
	ASSERT_HUGE_LEAVES(is_cheap ? 1 : 0);
}

/* No leaf spans private and shared memory. */
TEST_F_TIMEOUT(guest, attributes, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const u64 hole = BASE + page_size / 2 + SZ_4K;
	int fd = create(1);

	if (!self->is_private)
		SKIP(return, "a VM without private memory has no attributes");

	add_slot(BASE, page_size, fd, 0);
	guest_run(self->vcpus[0], GUEST_WRITE, BASE, page_size, SZ_4K, PATTERN);
	ASSERT_HUGE_LEAVES(1);

	vm_mem_set_shared(self->vm, hole, SZ_4K);
	ASSERT_LEAVES(0, 0, 0);

	/* Right beside the hole, far away, and the hole itself */
	guest_check(hole - SZ_4K, PATTERN);
	guest_check(hole + SZ_4K, PATTERN);
	guest_check(BASE, PATTERN);
	guest_write(hole, ~PATTERN);
	if (is_cheap)
		ASSERT_LEAVES(4, 0, 0);
	else
		ASSERT_LEAVES(3, 1, 0);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)gpa_to_hva(hole)), ~PATTERN);

	/* All private again: the next one that faults gets it all. */
	vm_mem_set_private(self->vm, hole, SZ_4K);
	guest_check(hole + 2 * SZ_4K, PATTERN);
	guest_check(hole, PATTERN);
	ASSERT_HUGE_LEAVES(1);
	guest_run(self->vcpus[0], GUEST_CHECK, BASE, page_size, SZ_4K, PATTERN);
	ASSERT_HUGE_LEAVES(1);

	/* The first and the last small page, one at a time */
	vm_mem_set_shared(self->vm, BASE, SZ_4K);
	guest_check(BASE + page_size - SZ_4K, PATTERN);
	ASSERT_LEAVES(is_cheap, !is_cheap, 0);
	vm_mem_set_private(self->vm, BASE, SZ_4K);
	vm_mem_set_shared(self->vm, BASE + page_size - SZ_4K, SZ_4K);
	guest_check(BASE, PATTERN);
	ASSERT_LEAVES(is_cheap, !is_cheap, 0);

	/* All of it, there and back.  The private memory is still the same. */
	vm_mem_set_shared(self->vm, BASE, page_size);
	ASSERT_LEAVES(0, 0, 0);
	guest_check(hole, ~PATTERN);
	ASSERT_LEAVES(1, 0, 0);
	vm_mem_set_private(self->vm, BASE, page_size);
	ASSERT_LEAVES(0, 0, 0);
	guest_run(self->vcpus[0], GUEST_CHECK, BASE, page_size, SZ_4K, PATTERN);
	ASSERT_HUGE_LEAVES(1);
	ASSERT_POOL(1, 0);
}

/* No byte of the memory comes with what somebody has left there. */
TEST_F_TIMEOUT(guest, punch_hole, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = is_cheap ? self->pool.free - self->pool.reserved : 1;
	const size_t size = nr * page_size;
	u64 *mem = NULL;
	int fd, hugetlbfs;

	if (is_cheap) {
		hugetlbfs = hugetlbfs_create(size, page_size);
		mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, hugetlbfs);
		fill_memory(mem, size, PATTERN);
		kvm_munmap(mem, size);
		kvm_close(hugetlbfs);
	}

	fd = create(nr);
	add_slot(BASE, size, fd, 0);
	if (is_cheap)
		guest_run(self->vcpus[0], GUEST_CHECK, BASE, size, 8, 0);

	guest_run(self->vcpus[0], GUEST_WRITE, BASE, size, 8, PATTERN);
	if (!self->is_private) {
		mem = kvm_mmap(size, PROT_READ, MAP_SHARED, fd);
		TEST_ASSERT_EQ(READ_ONCE(mem[size / 8 - 1]), PATTERN);
	}

	/* A hole at the end, and nobody else's page */
	kvm_fallocate(fd, PUNCH_HOLE, size - page_size, page_size);
	ASSERT_HUGE_LEAVES(nr - 1);
	ASSERT_POOL(nr - 1, 1);
	guest_run(self->vcpus[1], GUEST_CHECK, BASE + size - page_size, page_size, 8, 0);
	guest_run(self->vcpus[1], GUEST_CHECK, BASE, size - page_size, SZ_4K, PATTERN);
	ASSERT_HUGE_LEAVES(nr);
	ASSERT_POOL(nr, 0);
	if (!self->is_private)
		TEST_ASSERT_EQ(READ_ONCE(mem[size / 8 - 1]), 0);

	if (is_cheap) {
		kvm_fallocate(fd, PUNCH_HOLE, 0, size);
		ASSERT_HUGE_LEAVES(0);
		ASSERT_POOL(0, nr);
		guest_run(self->vcpus[0], GUEST_CHECK, BASE, size, 8, 0);
		ASSERT_HUGE_LEAVES(nr);
	}
}

static void *vcpu_thread(void *vcpu)
{
	guest_finish(vcpu);
	return NULL;
}

static void run_vcpus(struct kvm_vcpu *vcpus[NR_VCPUS])
{
	pthread_t threads[NR_VCPUS];
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_create(&threads[i], NULL, vcpu_thread, vcpus[i]);
	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_join(threads[i], NULL);
}

/*
 * All vCPUs fault on one huge page, with not a page to spare in the file or in the
 * pool.  None of them may fail, and all of them get the same page.
 */
TEST_F_TIMEOUT(guest, concurrent_faults, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long rest = self->pool.free - self->pool.reserved - 1;
	const int nr_rounds = is_cheap ? 50 : 2;
	int fd = create(1), round, i;

	(void)create(rest);
	add_slot(BASE, page_size, fd, 0);

	for (round = 0; round < nr_rounds; round++) {
		ASSERT_POOL(0, rest + 1);
		for (i = 0; i < NR_VCPUS; i++)
			guest_prepare(self->vcpus[i], GUEST_WRITE,
				      BASE + i * (page_size / NR_VCPUS), 8, 8, round << 8 | i);
		run_vcpus(self->vcpus);
		ASSERT_HUGE_LEAVES(1);
		ASSERT_POOL(1, rest);

		for (i = 0; i < NR_VCPUS; i++)
			guest_check(BASE + i * (page_size / NR_VCPUS), round << 8 | i);
		kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
		ASSERT_HUGE_LEAVES(0);
	}
}

struct fault {
	pthread_barrier_t *barrier;
	struct kvm_vcpu *vcpu;
	u64 *word;
	u64 value;
};

static void *fault_thread(void *data)
{
	struct fault *fault = data;

	pthread_barrier_wait(fault->barrier);
	if (fault->vcpu)
		guest_finish(fault->vcpu);
	else
		WRITE_ONCE(*fault->word, fault->value);
	return NULL;
}

/* The same when half of the faults are user space's. */
TEST_F_TIMEOUT(guest, concurrent_user_faults, HUGETLB_TEST_TIMEOUT)
{
	enum { NR_FAULTS = 2 * NR_VCPUS };
	const size_t page_size = self->page_size, stride = page_size / NR_FAULTS;
	const long rest = self->pool.free - self->pool.reserved - 1;
	const int nr_rounds = is_cheap ? 50 : 2;
	struct fault faults[NR_FAULTS] = {};
	pthread_t threads[NR_FAULTS];
	pthread_barrier_t barrier;
	int fd, round, i;
	char *mem;

	if (self->is_private)
		SKIP(return, "private memory can't be mapped");

	fd = create(1);
	(void)create(rest);
	add_slot(BASE, page_size, fd, 0);
	mem = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	pthread_barrier_init(&barrier, NULL, NR_FAULTS);

	for (round = 0; round < nr_rounds; round++) {
		ASSERT_POOL(0, rest + 1);
		for (i = 0; i < NR_FAULTS; i++) {
			faults[i].barrier = &barrier;
			faults[i].word = (u64 *)(mem + i * stride);
			faults[i].value = round << 8 | (i + 1);
			if (i & 1) {
				faults[i].vcpu = self->vcpus[i / 2];
				guest_prepare(faults[i].vcpu, GUEST_WRITE, BASE + i * stride,
					      8, 8, faults[i].value);
			}
			kvm_pthread_create(&threads[i], NULL, fault_thread, &faults[i]);
		}
		for (i = 0; i < NR_FAULTS; i++)
			kvm_pthread_join(threads[i], NULL);
		ASSERT_HUGE_LEAVES(1);
		ASSERT_POOL(1, rest);

		for (i = 0; i < NR_FAULTS; i++) {
			guest_check(BASE + i * stride, faults[i].value);
			TEST_ASSERT_EQ(READ_ONCE(*faults[i].word), faults[i].value);
		}
		kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
		ASSERT_HUGE_LEAVES(0);
	}
}

struct runner {
	struct kvm_vcpu *vcpu;
	bool *stop;
	u64 size;
};

static void *runner_thread(void *data)
{
	struct runner *runner = data;

	/* From the beginning to the end, again and again */
	while (!READ_ONCE(*runner->stop))
		guest_run(runner->vcpu, GUEST_WRITE, BASE + runner->vcpu->id * 8,
			  runner->size, SZ_16K, PATTERN + runner->vcpu->id);
	return NULL;
}

/* What is removed comes back, hence no access ever fails. */
TEST_F_TIMEOUT(guest, punch_while_running, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = is_cheap ? 2 : 1;
	const int nr_rounds = is_cheap ? 100 : 2;
	struct runner runners[NR_VCPUS];
	pthread_t threads[NR_VCPUS];
	bool stop = false;
	int fd = create(nr), i;

	add_slot(BASE, nr * page_size, fd, 0);
	for (i = 0; i < NR_VCPUS; i++) {
		runners[i] = (struct runner) {
			.vcpu = self->vcpus[i],
			.stop = &stop,
			.size = nr * page_size,
		};
		kvm_pthread_create(&threads[i], NULL, runner_thread, &runners[i]);
	}

	for (i = 0; i < nr_rounds; i++) {
		usleep(is_cheap ? 1000 : 500000);
		kvm_fallocate(fd, PUNCH_HOLE, i % nr * page_size, page_size);
	}
	WRITE_ONCE(stop, true);
	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_join(threads[i], NULL);

	kvm_fallocate(fd, PUNCH_HOLE, 0, nr * page_size);
	ASSERT_LEAVES(0, 0, 0);
	ASSERT_POOL(0, nr);
	kvm_close(fd);
	ASSERT_POOL(0, 0);
}

TEST_F_TIMEOUT(guest, pre_fault, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = is_cheap ? 3 : 1;
	struct kvm_pre_fault_memory range = {
		.gpa = BASE + SZ_64K,
		.size = SZ_4K,
	};
	int fd = create(nr);

	if (!self->has_tdp)
		SKIP(return, "KVM_PRE_FAULT_MEMORY needs two-dimensional paging");

	add_slot(BASE, nr * page_size, fd, 0);
	TEST_ASSERT(!__vcpu_ioctl(self->vcpus[0], KVM_PRE_FAULT_MEMORY, &range) && !range.size,
		    "KVM_PRE_FAULT_MEMORY: errno %d, 0x%llx bytes left", errno, range.size);
	ASSERT_HUGE_LEAVES(1);
	ASSERT_POOL(1, nr - 1);

	TEST_ASSERT(!pre_fault(self->vcpus[0], BASE, nr * page_size),
		    "KVM_PRE_FAULT_MEMORY: errno %d", errno);
	ASSERT_HUGE_LEAVES(nr);
	ASSERT_POOL(nr, 0);
	guest_run(self->vcpus[0], GUEST_CHECK, BASE, nr * page_size, SZ_4K, 0);
	ASSERT_HUGE_LEAVES(nr);
}

TEST_F_TIMEOUT(guest, file_closed, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	int fd = create(2), r;

	add_slot(BASE, 2 * page_size, fd, 0);
	guest_write(BASE, PATTERN);
	ASSERT_HUGE_LEAVES(1);

	/* The slot is no reference to the file. */
	kvm_close(fd);
	ASSERT_LEAVES(0, 0, 0);
	ASSERT_POOL(0, 0);

	guest_prepare(self->vcpus[0], GUEST_WRITE, BASE, 8, 8, PATTERN);
	r = _vcpu_run(self->vcpus[0]);
	TEST_ASSERT(r == -1 && errno == EFAULT, "Wanted EFAULT, got %d, errno %d", r, errno);
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpus[0], KVM_EXIT_MEMORY_FAULT);

	if (!is_cheap)
		return;

	/* And with another file, the same access goes on. */
	delete_slot();
	fd = create(2);
	add_slot(BASE, 2 * page_size, fd, 0);
	guest_finish(self->vcpus[0]);
	guest_check(BASE, PATTERN);
	ASSERT_POOL(1, 1);
}

/* The limit on usage is the one thing that does make a guest access fail. */
TEST_F_TIMEOUT(guest, cgroup_usage_limit, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	char root[PATH_MAX], *cgroup, control[64], name[64];
	int fd = create(2), r, i;

	if (cg_find_unified_root(root, sizeof(root), NULL))
		SKIP(return, "no cgroup v2");

	snprintf(name, sizeof(name), "guest_memfd_hugetlb_guest_test.%d", getpid());
	snprintf(control, sizeof(control), "hugetlb.%s.max", is_cheap ? "2MB" : "1GB");
	cgroup = cg_name(root, name);
	TEST_ASSERT(!cg_create(cgroup), "Can't create %s", cgroup);
	if (cg_write(cgroup, control, "0")) {
		rmdir(cgroup);
		SKIP(return, "no hugetlb controller for child cgroups");
	}
	TEST_ASSERT(!cg_enter_current(cgroup), "Can't enter %s", cgroup);

	add_slot(BASE, 2 * page_size, fd, 0);
	guest_prepare(self->vcpus[0], GUEST_WRITE, BASE, 8, 8, PATTERN);
	for (i = 0; i < 10; i++) {
		r = _vcpu_run(self->vcpus[0]);
		TEST_ASSERT(r == -1 && errno == ENOMEM, "Wanted ENOMEM, got %d, errno %d",
			    r, errno);
		TEST_ASSERT_KVM_EXIT_REASON(self->vcpus[0], KVM_EXIT_MEMORY_FAULT);
		TEST_ASSERT_EQ(self->vcpus[0]->run->memory_fault.gpa, BASE);
		TEST_ASSERT_EQ(self->vcpus[0]->run->memory_fault.size, SZ_4K);
		TEST_ASSERT_EQ(self->vcpus[0]->run->memory_fault.flags,
			       self->is_private ? KVM_MEMORY_EXIT_FLAG_PRIVATE : 0);
		ASSERT_POOL(0, 2);
	}

	/* It's up to user space to do something about it, and to go on. */
	TEST_ASSERT(!cg_write(cgroup, control, "max"), "Can't remove the limit");
	guest_finish(self->vcpus[0]);
	guest_check(BASE, PATTERN);
	ASSERT_HUGE_LEAVES(1);
	ASSERT_POOL(1, 1);

	kvm_close(fd);
	TEST_ASSERT(!cg_enter_current(root), "Can't enter %s", root);
	TEST_ASSERT(!rmdir(cgroup), "Can't remove %s, errno %d", cgroup, errno);
}

TEST_HARNESS_MAIN
