// SPDX-License-Identifier: GPL-2.0
/*
 * Memory failure in HugeTLB pages of guest_memfd
 *
 * Each test costs the pool a page, which is the point: it must not come back.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/kernel-page-flags.h>
#include <linux/sizes.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>

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

FIXTURE(hwpoison) {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct hugetlb_pool pool;
	size_t page_size;
	bool is_private;
	/* The first page of the file gets poisoned, others are there to be unharmed. */
	long nr_pages;
	int fd;
	u64 flags;
	u64 pfn;
	char *mem;
};

FIXTURE_VARIANT(hwpoison) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(hwpoison, private_2M) {
	.page_size = SZ_2M,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(hwpoison, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(hwpoison, private_1G) {
	.page_size = SZ_1G,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(hwpoison, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

static int access_word(struct kvm_vcpu *vcpu, u64 gpa, u64 value, u64 *old)
{
	struct ucall uc;
	int r;

	*(u64 *)addr_gva2hva(vcpu->vm, (gva_t)&addresses[vcpu->id]) = gpa;
	*(u64 *)addr_gva2hva(vcpu->vm, (gva_t)&values[vcpu->id]) = value;

	r = _vcpu_run(vcpu);
	if (r)
		return r;

	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	*old = uc.args[1];
	return 0;
}

static void guest_exchange(struct kvm_vcpu *vcpu, u64 gpa, u64 old, u64 new)
{
	u64 got;
	int r;

	r = access_word(vcpu, gpa, new, &got);
	TEST_ASSERT(!r, "KVM_RUN failed, errno %d", errno);
	TEST_ASSERT_EQ(got, old);
}

static void expect_guest_poison(struct kvm_vcpu *vcpu, u64 gpa)
{
	u64 got;
	int r;

	r = access_word(vcpu, gpa, 0, &got);
	TEST_ASSERT(r == -1 && errno == EHWPOISON,
		    "KVM_RUN: wanted EHWPOISON, got %d, errno %d", r, errno);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
}

static sigjmp_buf sigbus_jmpbuf;
static siginfo_t sigbus_info;

static void sigbus_handler(int signum, siginfo_t *info, void *context)
{
	sigbus_info = *info;
	siglongjmp(sigbus_jmpbuf, 1);
}

/* SIGBUS with the size of all that is lost, because of an access to it */
#define EXPECT_POISON(_addr, _action)						\
do {										\
	struct sigaction sa_old, sa_new = {					\
		.sa_sigaction = sigbus_handler,					\
		.sa_flags = SA_SIGINFO,						\
	};									\
	unsigned long __addr = (unsigned long)(_addr);				\
										\
	sigaction(SIGBUS, &sa_new, &sa_old);					\
	if (!sigsetjmp(sigbus_jmpbuf, 1)) {					\
		_action;							\
		TEST_FAIL("'%s' should have triggered SIGBUS", #_action);	\
	}									\
	sigaction(SIGBUS, &sa_old, NULL);					\
	TEST_ASSERT(sigbus_info.si_code == BUS_MCEERR_AR &&			\
		    sigbus_info.si_addr_lsb == __builtin_ctzl(self->page_size) && \
		    (unsigned long)sigbus_info.si_addr / SZ_4K == __addr / SZ_4K, \
		    "SIGBUS: code %d, lsb %d, address %p, wanted %d, %d, 0x%lx", \
		    sigbus_info.si_code, sigbus_info.si_addr_lsb, sigbus_info.si_addr, \
		    BUS_MCEERR_AR, __builtin_ctzl(self->page_size), __addr);	\
} while (0)

/* Returns false for a pfn that is behind the end of memory. */
static bool read_page_flags(u64 pfn, u64 *flags)
{
	static int fd = -1;

	if (fd < 0)
		fd = open_path_or_exit("/proc/kpageflags", O_RDONLY);
	return pread(fd, flags, sizeof(*flags), pfn * sizeof(*flags)) == sizeof(*flags);
}

static bool is_poisoned(u64 pfn)
{
	u64 flags;

	TEST_ASSERT(read_page_flags(pfn, &flags), "Can't read /proc/kpageflags");
	return flags & BIT_ULL(KPF_HWPOISON);
}

/*
 * Allocate the first page of a file, and return its pfn.  Nobody has private memory
 * mapped to ask pagemap, but its page doesn't look as it did when it was free.
 */
static u64 allocate_and_find(int fd, size_t page_size)
{
	const u64 nr = page_size / SZ_4K;
	u64 *before = NULL, pfn = 0, flags, max, i;

	for (max = 0; read_page_flags(max * nr, &flags); max++) {
		if (!(max % SZ_4K))
			before = realloc(before, (max + SZ_4K) * sizeof(*before));
		before[max] = flags;
	}

	kvm_fallocate(fd, ALLOCATE, 0, page_size);

	for (i = 0; i < max; i++) {
		TEST_ASSERT(read_page_flags(i * nr, &flags), "Can't read /proc/kpageflags");
		if (!(flags & before[i] & BIT_ULL(KPF_HUGE)) || flags == before[i] ||
		    (flags & BIT_ULL(KPF_COMPOUND_TAIL)))
			continue;
		TEST_ASSERT(!pfn, "Both pfn 0x%lx and 0x%lx may be the page",
			    (unsigned long)pfn, (unsigned long)(i * nr));
		pfn = i * nr;
	}
	TEST_ASSERT(pfn, "Can't find the page in /proc/kpageflags");
	free(before);
	return pfn;
}

FIXTURE_SETUP(hwpoison)
{
	const char *missing = hugetlb_missing(variant->page_size, 2);
	struct vm_shape shape = VM_SHAPE_DEFAULT;
	void *hva;
	size_t size;
	int i;

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->is_private = !(variant->flags & GUEST_MEMFD_FLAG_INIT_SHARED);
	self->pool = hugetlb_pool_read(self->page_size);
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | variant->flags |
		      hugetlb_size_flag(self->page_size);
	self->nr_pages = self->page_size > SZ_2M ? 1 : 2;
	size = self->nr_pages * self->page_size;

	if (self->is_private) {
		shape.type = KVM_X86_SW_PROTECTED_VM;
		if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(shape.type)))
			SKIP(return, "no KVM_X86_SW_PROTECTED_VM");
		if (access("/sys/kernel/debug/hwpoison/corrupt-pfn", W_OK))
			SKIP(return, "no CONFIG_HWPOISON_INJECT, or no debugfs");
	}

	self->vm = __vm_create_with_vcpus(shape, NR_VCPUS, 0, guest_code, self->vcpus);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_args_set(self->vcpus[i], 1, i);
	virt_map_level(self->vm, BASE, BASE, size, PG_LEVEL_2M);

	self->fd = vm_create_guest_memfd(self->vm, size, self->flags);
	hva = kvm_mmap(size + self->page_size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	vm_set_user_memory_region2(self->vm, SLOT, KVM_MEM_GUEST_MEMFD, BASE, size,
				   align_ptr_up(hva, self->page_size), self->fd, 0);
	if (self->is_private)
		vm_mem_set_private(self->vm, BASE, size);
	else
		self->mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);

	self->pfn = allocate_and_find(self->fd, self->page_size);
	TEST_ASSERT(!is_poisoned(self->pfn), "Poisoned already");
}

/*
 * All is back but for the one page, whatever the pool is asked for.  Memory failure
 * keeps a reference to the page, i.e. it's in use for good and counts as such.
 */
static void assert_lost(size_t page_size, struct hugetlb_pool old, u64 pfn)
{
	struct hugetlb_pool pool = hugetlb_pool_read(page_size);
	long nr = pool.free - pool.reserved, i;
	char *mem;
	int fd;

	TEST_ASSERT_POOL(page_size, old, 1, 0);
	TEST_ASSERT(is_poisoned(pfn), "No longer poisoned");

	fd = hugetlbfs_create(nr * page_size, page_size);
	mem = kvm_mmap(nr * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (i = 0; i < nr; i++) {
		WRITE_ONCE(mem[i * page_size], 1);
		TEST_ASSERT(mem_to_pfn(mem + i * page_size) / (page_size / SZ_4K) !=
			    pfn / (page_size / SZ_4K), "The poisoned page is in use again");
	}
	kvm_munmap(mem, nr * page_size);
	kvm_close(fd);
}

FIXTURE_TEARDOWN_PARENT(hwpoison)
{
	assert_lost(self->page_size, self->pool, self->pfn);
}

#define ASSERT_POOL(_allocated, _reserved)					\
	TEST_ASSERT_POOL(self->page_size, self->pool, _allocated, _reserved)

static void inject(u64 pfn)
{
	TEST_ASSERT(!write_long("/sys/kernel/debug/hwpoison/corrupt-pfn", pfn),
		    "Can't poison pfn 0x%lx, errno %d", (unsigned long)pfn, errno);
}

static void expect_fallocate_poison(int fd, u64 offset, u64 size)
{
	int r = fallocate(fd, ALLOCATE, offset, size);

	TEST_ASSERT(r == -1 && errno == EHWPOISON,
		    "fallocate(): wanted EHWPOISON, got %d, errno %d", r, errno);
}

static long nr_leaves(struct kvm_vm *vm, size_t page_size)
{
	return page_size > SZ_2M ? vm_get_stat(vm, pages_1g) : vm_get_stat(vm, pages_2m);
}

/* To be told early is a matter of choice. */
static pid_t fork_early(char *mem, size_t page_size, int ready)
{
	pid_t pid = fork();
	siginfo_t info;
	sigset_t set;

	if (pid)
		return pid;

	sigemptyset(&set);
	sigaddset(&set, SIGBUS);
	sigprocmask(SIG_BLOCK, &set, NULL);
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	WRITE_ONCE(mem[8], 1);
	TEST_ASSERT_EQ(write(ready, mem, 1), 1);

	TEST_ASSERT_EQ(sigtimedwait(&set, &info, &(struct timespec) { .tv_sec = 30 }), SIGBUS);
	TEST_ASSERT(info.si_code == BUS_MCEERR_AO &&
		    info.si_addr_lsb == __builtin_ctzl(page_size) &&
		    (char *)info.si_addr >= mem && (char *)info.si_addr < mem + page_size,
		    "SIGBUS: code %d, lsb %d, address %p in %p", info.si_code,
		    info.si_addr_lsb, info.si_addr, mem);
	_exit(0);
}

TEST_F_TIMEOUT(hwpoison, memory_failure, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, bad = 5 * SZ_4K;
	const bool has_others = self->nr_pages > 1;
	char buffer[64], *mem = self->mem;
	struct iovec local = { .iov_base = buffer, .iov_len = sizeof(buffer) };
	struct iovec remote = { .iov_base = mem, .iov_len = sizeof(buffer) };
	int pipes[2], early_pipes[2], status;
	pid_t early, late;
	long leaves;
	char c;

	leaves = nr_leaves(self->vm, page_size);
	guest_exchange(self->vcpus[0], BASE + SZ_64K, 0, PATTERN);
	guest_exchange(self->vcpus[1], BASE + SZ_64K, PATTERN, PATTERN);
	if (has_others)
		guest_exchange(self->vcpus[0], BASE + page_size, 0, ~PATTERN);
	TEST_ASSERT_EQ(nr_leaves(self->vm, page_size), leaves + self->nr_pages);
	ASSERT_POOL(self->nr_pages, 0);

	if (self->is_private) {
		inject(self->pfn + bad / SZ_4K);
	} else {
		/* Soft offlining would have to move the page, which nobody can. */
		TEST_ASSERT(madvise(mem + bad, SZ_4K, MADV_SOFT_OFFLINE) == -1 &&
			    errno == EBUSY, "MADV_SOFT_OFFLINE: wanted EBUSY, got errno %d", errno);
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + SZ_64K)), PATTERN);
		ASSERT_POOL(self->nr_pages, 0);

		TEST_ASSERT(!pipe(pipes) && !pipe(early_pipes), "pipe() failed");
		early = fork_early(mem, page_size, early_pipes[1]);
		TEST_ASSERT_EQ(read(early_pipes[0], &c, 1), 1);
		late = fork();
		if (!late) {
			TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + SZ_64K)), PATTERN);
			TEST_ASSERT_EQ(write(early_pipes[1], &c, 1), 1);
			TEST_ASSERT_EQ(read(pipes[0], &c, 1), 1);
			EXPECT_POISON(mem + SZ_64K, READ_ONCE(mem[SZ_64K]));
			_exit(0);
		}
		TEST_ASSERT_EQ(read(early_pipes[0], &c, 1), 1);

		EXPECT_POISON(mem + bad, madvise(mem + bad, SZ_4K, MADV_HWPOISON));

		TEST_ASSERT(waitpid(early, &status, 0) == early && !status,
			    "The one who wanted to know wasn't told");
		TEST_ASSERT_EQ(write(pipes[1], &c, 1), 1);
		TEST_ASSERT(waitpid(late, &status, 0) == late && !status,
			    "The one who didn't want to know wasn't told");
	}
	TEST_ASSERT(is_poisoned(self->pfn), "Not poisoned");

	/* The guest is kept off it, all of it, and off nothing else. */
	TEST_ASSERT_EQ(nr_leaves(self->vm, page_size), leaves + self->nr_pages - 1);
	expect_guest_poison(self->vcpus[0], BASE + SZ_64K);
	expect_guest_poison(self->vcpus[0], BASE + SZ_64K);
	if (has_others)
		guest_exchange(self->vcpus[1], BASE + page_size, ~PATTERN, 1);

	/* And so is user space. */
	if (mem) {
		EXPECT_POISON(mem, READ_ONCE(*mem));
		EXPECT_POISON(mem + page_size - 1, WRITE_ONCE(mem[page_size - 1], 1));
		TEST_ASSERT(process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == -1 &&
			    errno == EFAULT, "process_vm_readv(): wanted EFAULT, got errno %d",
			    errno);
		if (has_others)
			TEST_ASSERT_EQ(READ_ONCE(mem[page_size]), 1);
	}

	/* It stays in the file until it is punched out, and another one replaces it. */
	expect_fallocate_poison(self->fd, 0, self->nr_pages * page_size);
	if (has_others)
		kvm_fallocate(self->fd, ALLOCATE, page_size, page_size);
	ASSERT_POOL(self->nr_pages, 0);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, page_size);
	ASSERT_POOL(self->nr_pages, 0);
	guest_exchange(self->vcpus[0], BASE + SZ_64K, 0, PATTERN);
	ASSERT_POOL(self->nr_pages + 1, 0);
	TEST_ASSERT_EQ(nr_leaves(self->vm, page_size), leaves + self->nr_pages);
	if (mem)
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + SZ_64K)), PATTERN);

	kvm_close(self->fd);
	if (mem)
		kvm_munmap(mem, self->nr_pages * page_size);
	ASSERT_POOL(1, 0);
}

/* Pages of 2M are cheap, there may be more of them. */
FIXTURE(unmapped) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
	u64 flags;
	u64 pfn;
	int fd;
};

FIXTURE_SETUP(unmapped)
{
	const char *missing = hugetlb_missing(SZ_2M, 3);

	if (missing)
		SKIP(return, "%s", missing);
	if (access("/sys/kernel/debug/hwpoison/corrupt-pfn", W_OK))
		SKIP(return, "no CONFIG_HWPOISON_INJECT, or no debugfs");

	self->page_size = SZ_2M;
	self->pool = hugetlb_pool_read(self->page_size);
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_2MB;
	self->vm = vm_create_barebones();
	self->fd = vm_create_guest_memfd(self->vm, 2 * self->page_size, self->flags);
	self->pfn = allocate_and_find(self->fd, self->page_size);
	inject(self->pfn + 511);
}

FIXTURE_TEARDOWN_PARENT(unmapped)
{
	assert_lost(self->page_size, self->pool, self->pfn);
}

TEST_F_TIMEOUT(unmapped, close, HUGETLB_TEST_TIMEOUT)
{
	ASSERT_POOL(1, 1);
	kvm_close(self->fd);
	ASSERT_POOL(1, 0);
}

/* Poison ends it, what's behind is not allocated any more. */
TEST_F_TIMEOUT(unmapped, fallocate, HUGETLB_TEST_TIMEOUT)
{
	expect_fallocate_poison(self->fd, 0, self->page_size);
	expect_fallocate_poison(self->fd, 0, 2 * self->page_size);
	ASSERT_POOL(1, 1);
	kvm_fallocate(self->fd, ALLOCATE, self->page_size, self->page_size);
	ASSERT_POOL(2, 0);
	expect_fallocate_poison(self->fd, 0, 2 * self->page_size);
	kvm_close(self->fd);
	ASSERT_POOL(1, 0);
}

TEST_F_TIMEOUT(unmapped, punch_hole, HUGETLB_TEST_TIMEOUT)
{
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, 2 * self->page_size);
	ASSERT_POOL(1, 1);
	kvm_fallocate(self->fd, ALLOCATE, 0, 2 * self->page_size);
	ASSERT_POOL(3, 0);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, 2 * self->page_size);
	ASSERT_POOL(1, 2);
	kvm_close(self->fd);
	ASSERT_POOL(1, 0);
}

/* There is no page to replace the lost one, the others are someone else's. */
TEST_F_TIMEOUT(unmapped, no_replacement, HUGETLB_TEST_TIMEOUT)
{
	const long others = self->pool.free - self->pool.reserved - 2;
	int fd;

	fd = vm_create_guest_memfd(self->vm, others * self->page_size, self->flags);
	ASSERT_POOL(1, 1 + others);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->page_size);
	ASSERT_POOL(1, 1 + others);

	TEST_ASSERT(fallocate(self->fd, ALLOCATE, 0, 2 * self->page_size) == -1 &&
		    errno == ENOMEM, "Allocated more than there is, errno %d", errno);

	/* Nobody else has to pay for it. */
	kvm_fallocate(fd, ALLOCATE, 0, others * self->page_size);
	kvm_close(fd);
	kvm_fallocate(self->fd, ALLOCATE, 0, 2 * self->page_size);
	ASSERT_POOL(3, 0);
	kvm_close(self->fd);
	ASSERT_POOL(1, 0);
}

TEST_HARNESS_MAIN
