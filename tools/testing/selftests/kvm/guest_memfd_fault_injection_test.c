// SPDX-License-Identifier: GPL-2.0
/*
 * Failure at every step of what guest_memfd does
 *
 * For N = 1, 2, 3, ... the N-th allocation of an operation fails, until there is
 * no N-th allocation any more.  An operation that failed has changed nothing, and
 * one that succeeded nevertheless can be undone.
 */
#include <ctype.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "guest_memfd_hugetlb.h"
#include "guest_memfd_lifecycle.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

#define DEBUGFS		"/sys/kernel/debug/"
#define FAIL_NTH	"/proc/thread-self/fail-nth"
#define FAIL_FUNCTION	DEBUGFS "fail_function/"
#define INJECTABLE	DEBUGFS "error_injection/list"
#define MAKE_IT_FAIL	"/proc/self/make-it-fail"
#define RCU_EXPEDITED	"/sys/kernel/rcu_expedited"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define GPA		SZ_4G
#define SLOT		1

/* Allocations of the kernel's debugging facilities count, too. */
#define MAX_ALLOCATIONS	2000

/* There is a page among as many that is the first one of its direct map entry. */
#define MAX_PAGES_TO_SPLIT	4096
#define NR_SPLITS		3

FIXTURE(fault_injection) {
	struct gmem_counters counters_without_vm;
	struct gmem_counters counters;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	size_t page_size;
	bool no_direct_map;
	size_t size;
	bool shared;
	void *mem;
	u64 flags;
	int fd;
};

FIXTURE_VARIANT(fault_injection) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(fault_injection, private_4K) {
	.page_size = SZ_4K,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(fault_injection, shared_4K) {
	.page_size = SZ_4K,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(fault_injection, private_2M) {
	.page_size = SZ_2M,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(fault_injection, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(fault_injection, private_1G) {
	.page_size = SZ_1G,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(fault_injection, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

/* First those that split larger entries, nothing joins them again. */
FIXTURE_VARIANT_ADD(fault_injection, shared_1G_no_direct_map) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
};

FIXTURE_VARIANT_ADD(fault_injection, shared_2M_no_direct_map) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
};

FIXTURE_VARIANT_ADD(fault_injection, shared_4K_no_direct_map) {
	.page_size = SZ_4K,
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
};

#define context _test_data_fault_injection

/* What an operation finds, from a mere VM to everything */
enum stage {
	VM,
	CREATED,
	BOUND,
	MAPPED,
	POPULATED,
};

/* Whether there are allocations, and whether all of them are tried again */
enum need {
	MAY_ALLOCATE,
	ALLOCATES,
	FAILS,
};

/* Each is about the second page: the first one of a file needs no page cache node. */
struct operation {
	enum stage stage;
	int (*run)(struct context *self);
	enum need need;
	bool populates;
};

static sigjmp_buf sigbus_jmpbuf;

static void sigbus_handler(int signal)
{
	siglongjmp(sigbus_jmpbuf, 1);
}

static int run_create(struct context *self)
{
	self->fd = __vm_create_guest_memfd(self->vm, self->size, self->flags);
	return self->fd < 0 ? -errno : 0;
}

/* The library's function would open /dev/kvm, too. */
static int set_memslot(struct context *self, u64 size)
{
	struct kvm_userspace_memory_region2 region = {
		.slot = SLOT,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = GPA,
		.memory_size = size,
		.guest_memfd = self->fd,
	};

	return __vm_ioctl(self->vm, KVM_SET_USER_MEMORY_REGION2, &region) ? -errno : 0;
}

static int run_bind(struct context *self)
{
	return set_memslot(self, self->size);
}

static int run_unbind(struct context *self)
{
	return set_memslot(self, 0);
}

static int run_guest_fault(struct context *self)
{
	struct kvm_pre_fault_memory range = {
		.gpa = GPA + self->page_size,
		.size = SZ_4K,
	};

	return __vcpu_ioctl(self->vcpu, KVM_PRE_FAULT_MEMORY, &range) ? -errno : 0;
}

static int run_allocate(struct context *self)
{
	return fallocate(self->fd, ALLOCATE, self->page_size, self->page_size) ? -errno : 0;
}

static int run_punch(struct context *self)
{
	return fallocate(self->fd, PUNCH_HOLE, self->page_size, self->page_size) ? -errno : 0;
}

static int run_mmap(struct context *self)
{
	self->mem = mmap(NULL, self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd, 0);
	if (self->mem != MAP_FAILED)
		return 0;

	self->mem = NULL;
	return -errno;
}

static int run_mbind(struct context *self)
{
	unsigned long nodemask = 1;

	return mbind(self->mem + self->page_size, self->page_size, MPOL_BIND, &nodemask,
		     2, 0) ? -errno : 0;
}

/* There is no errno.  What can't be repeated until it succeeds is for lack of memory. */
static int run_user_fault(struct context *self)
{
	if (sigsetjmp(sigbus_jmpbuf, 1))
		return -ENOMEM;

	WRITE_ONCE(*(u64 *)(self->mem + self->page_size), 1);
	return 0;
}

static void prepare(struct context *self, enum stage stage)
{
	self->fd = -1;
	self->mem = NULL;

	if (stage >= CREATED)
		TEST_ASSERT_EQ(run_create(self), 0);
	if (stage >= BOUND)
		TEST_ASSERT_EQ(run_bind(self), 0);
	if (stage >= MAPPED && self->shared)
		TEST_ASSERT_EQ(run_mmap(self), 0);
	if (stage >= POPULATED) {
		TEST_ASSERT_EQ(run_guest_fault(self), 0);
		if (self->shared)
			TEST_ASSERT_EQ(run_user_fault(self), 0);
	}
}

static void clean_up(struct context *self)
{
	int r = set_memslot(self, 0);

	TEST_ASSERT(!r || r == -EINVAL, "Can't delete the memslot, errno %d", -r);
	if (self->mem)
		kvm_munmap(self->mem, self->size);
	if (self->fd >= 0)
		kvm_close(self->fd);
}

static void set_debugfs(const char *name, const char *value)
{
	char path[PATH_MAX];
	int fd;

	snprintf(path, sizeof(path), DEBUGFS "%s", name);
	fd = open_path_or_exit(path, O_WRONLY);
	TEST_ASSERT(write(fd, value, strlen(value)) == strlen(value),
		    "Can't write '%s' to %s", value, path);
	kvm_close(fd);
}

FIXTURE_SETUP(fault_injection)
{
	const struct sigaction sa = { .sa_handler = sigbus_handler };
	const char *missing = NULL;

	self->page_size = variant->page_size;
	self->size = 2 * self->page_size;
	self->shared = variant->flags & GUEST_MEMFD_FLAG_MMAP;
	self->flags = variant->flags;
	self->no_direct_map = variant->flags & GUEST_MEMFD_FLAG_NO_DIRECT_MAP;

	if (access(FAIL_NTH, F_OK))
		missing = "no " FAIL_NTH ", see CONFIG_FAULT_INJECTION";
	else if (access(DEBUGFS "failslab", F_OK))
		missing = "no " DEBUGFS "failslab, see CONFIG_FAILSLAB";
	else if (access(DEBUGFS "fail_page_alloc", F_OK))
		missing = "no " DEBUGFS "fail_page_alloc, see CONFIG_FAIL_PAGE_ALLOC";
	else if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		missing = "no KVM_X86_SW_PROTECTED_VM";
	else if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		missing = "no KVM_CAP_PRE_FAULT_MEMORY";
	else if (self->no_direct_map && no_direct_map_missing())
		missing = no_direct_map_missing();
	else if (self->page_size > SZ_4K)
		missing = hugetlb_missing(self->page_size, 2);
	if (missing)
		SKIP(return, "%s", missing);

	if (self->page_size > SZ_4K)
		self->flags |= GUEST_MEMFD_FLAG_HUGETLB |
			       hugetlb_size_flag(self->page_size);

	/* By default, what may sleep doesn't fail. */
	set_debugfs("failslab/ignore-gfp-wait", "N");
	set_debugfs("failslab/verbose", "0");
	set_debugfs("fail_page_alloc/ignore-gfp-wait", "N");
	set_debugfs("fail_page_alloc/ignore-gfp-highmem", "N");
	set_debugfs("fail_page_alloc/min-order", "0");
	set_debugfs("fail_page_alloc/verbose", "0");

	sigaction(SIGBUS, &sa, NULL);

	self->counters_without_vm = gmem_counters_read();
	self->vm = vm_create_barebones_type(self->shared ? KVM_X86_DEFAULT_VM :
							   KVM_X86_SW_PROTECTED_VM);
	if (!self->shared)
		vm_mem_set_private(self->vm, GPA, self->size);
	self->vcpu = __vm_vcpu_add(self->vm, 0);
	self->counters = gmem_counters_read();
}

FIXTURE_TEARDOWN_PARENT(fault_injection)
{
	gmem_counters_wait(&self->counters_without_vm);
}

static void fail_nth(int fd, int n)
{
	char buf[16];
	int len = snprintf(buf, sizeof(buf), "%d", n);

	TEST_ASSERT_EQ(pwrite(fd, buf, len, 0), len);
}

static bool has_failed(int fd)
{
	char buf[16] = {};

	TEST_ASSERT(pread(fd, buf, sizeof(buf) - 1, 0) > 0, "Can't read " FAIL_NTH);
	return !atoi(buf);
}

/* The file isn't bound, the page not allocated, ...: a failed operation can be redone. */
static void redo(struct context *self, const struct operation *operation)
{
	int r = operation->run(self);

	TEST_ASSERT(!r, "Failed without a reason after an injected failure: errno %d", -r);
}

/* The second page is in use, whatever has failed before. */
static void check_direct_map(struct context *self)
{
	u64 *word;

	/* It takes a mapping to tell where it is, and one that isn't by a PUD. */
	if (!self->shared || self->page_size == SZ_1G)
		return;
	if (!self->mem)
		TEST_ASSERT_EQ(run_mmap(self), 0);

	word = self->mem + self->page_size;
	WRITE_ONCE(*word, 1);
	TEST_ASSERT_EQ(is_in_direct_map(word), !self->no_direct_map);
}

/* An operation that failed has changed nothing. */
static void check_failed(struct context *self, const struct operation *operation,
			 const struct gmem_counters *prepared)
{
	/* But for a page that couldn't be taken out of the direct map, and stays. */
	if (self->no_direct_map && operation->populates)
		TEST_ASSERT_EQ(run_punch(self), 0);
	gmem_counters_wait(prepared);
}

/* What has leaked must not hide when everything else is gone. */
static void check_succeeded(struct context *self, const struct operation *operation)
{
	if (operation->populates)
		check_direct_map(self);
	gmem_drain_batches();
	clean_up(self);
	gmem_counters_wait(&self->counters);
}

static void fail_each_allocation(struct context *self, const struct operation *operation)
{
	int n, r, nr_failed = 0, fd = open_path_or_exit(FAIL_NTH, O_RDWR);
	struct gmem_counters prepared;
	bool injected = true;

	for (n = 1; injected; n++) {
		TEST_ASSERT(n < MAX_ALLOCATIONS, "This takes too many allocations");

		prepare(self, operation->stage);
		prepared = gmem_counters_read();

		fail_nth(fd, n);
		r = operation->run(self);
		injected = has_failed(fd);
		fail_nth(fd, 0);

		TEST_ASSERT(!r || (injected && r == -ENOMEM),
			    "Allocation %d %s, errno %d", n,
			    injected ? "failed" : "did not fail", -r);
		if (r) {
			nr_failed++;
			check_failed(self, operation, &prepared);
			redo(self, operation);
		}
		check_succeeded(self, operation);
	}
	kvm_close(fd);

	ksft_print_msg("%d injected, %d of them made the operation fail\n", n - 2, nr_failed);
	TEST_ASSERT(operation->need < ALLOCATES || n > 2, "Nothing was injected");
	TEST_ASSERT(operation->need < FAILS || nr_failed, "Nothing has ever failed");
}

static void fail_once(struct context *self, const struct operation *operation)
{
	struct gmem_counters prepared;
	int r;

	prepare(self, operation->stage);
	prepared = gmem_counters_read();

	set_debugfs("fail_function/times", "1");
	r = operation->run(self);
	TEST_ASSERT_EQ(read_long(FAIL_FUNCTION "times"), 0);
	set_debugfs("fail_function/times", "0");

	/* The kernel tries again when small pages are missing. */
	if (operation->run == run_user_fault && self->page_size == SZ_4K) {
		TEST_ASSERT_EQ(r, 0);
	} else {
		TEST_ASSERT_EQ(r, -ENOMEM);
		check_failed(self, operation, &prepared);
		redo(self, operation);
	}
	check_succeeded(self, operation);
}

static const struct operation op_create = { VM, run_create, FAILS };
static const struct operation op_bind = { CREATED, run_bind, FAILS };
static const struct operation op_unbind = { POPULATED, run_unbind };
static const struct operation op_guest_fault = { BOUND, run_guest_fault, FAILS, true };
static const struct operation op_allocate = { CREATED, run_allocate, ALLOCATES, true };
static const struct operation op_punch = { POPULATED, run_punch };
static const struct operation op_mmap = { CREATED, run_mmap, FAILS };
static const struct operation op_mbind = { MAPPED, run_mbind, FAILS };
static const struct operation op_user_fault = { MAPPED, run_user_fault, ALLOCATES, true };

static void set_make_it_fail(int fd, bool fail)
{
	TEST_ASSERT_EQ(pwrite(fd, fail ? "1" : "0", 1, 0), 1);
}

/*
 * Only the first page that leaves a large entry of the direct map makes for a split,
 * and it's up to the page allocator which page that is.  If the split fails, the page
 * stays in the file and in the direct map, where it is zeroed once more.
 */
TEST_F_TIMEOUT(fault_injection, direct_map_split, HUGETLB_TEST_TIMEOUT)
{
	int r, nr_failed = 0, fd = open_path_or_exit(MAKE_IT_FAIL, O_RDWR);
	size_t page_size = self->page_size;
	struct hugetlb_pool pool;
	u64 offset;

	if (!self->no_direct_map)
		SKIP(return, "memory stays in the direct map");
	if (page_size == SZ_1G)
		SKIP(return, "the largest entry isn't split");

	if (page_size == SZ_4K) {
		self->size = MAX_PAGES_TO_SPLIT * page_size;
	} else {
		pool = hugetlb_pool_read(page_size);
		self->size = (pool.free - pool.reserved) * page_size;
	}
	prepare(self, MAPPED);

	set_debugfs("fail_page_alloc/task-filter", "Y");
	set_debugfs("fail_page_alloc/interval", "0");
	set_debugfs("fail_page_alloc/probability", "100");
	for (offset = 0; offset < self->size && nr_failed < NR_SPLITS; offset += page_size) {
		/* Not the page itself, but the next one that is allocated */
		set_debugfs("fail_page_alloc/space", page_size == SZ_4K ? "2" : "0");
		set_debugfs("fail_page_alloc/times", "1");

		set_make_it_fail(fd, true);
		r = fallocate(self->fd, ALLOCATE, offset, page_size) ? -errno : 0;
		set_make_it_fail(fd, false);
		if (!r)
			continue;

		TEST_ASSERT_EQ(r, -ENOMEM);
		nr_failed++;
		TEST_ASSERT(!fallocate(self->fd, ALLOCATE, offset, page_size),
			    "Can't allocate after a failed split, errno %d", errno);
		WRITE_ONCE(*(u64 *)(self->mem + offset), 1);
		TEST_ASSERT(!is_in_direct_map(self->mem + offset), "In the direct map");
	}
	set_debugfs("fail_page_alloc/probability", "0");
	set_debugfs("fail_page_alloc/times", "-1");
	set_debugfs("fail_page_alloc/task-filter", "N");
	kvm_close(fd);

	clean_up(self);
	gmem_counters_wait(&self->counters);

	if (!nr_failed)
		SKIP(return, "there was nothing left to be split");
	ksft_print_msg("%d splits failed\n", nr_failed);
}

TEST_F_TIMEOUT(fault_injection, create, HUGETLB_TEST_TIMEOUT)
{
	fail_each_allocation(self, &op_create);
}

TEST_F_TIMEOUT(fault_injection, bind, HUGETLB_TEST_TIMEOUT)
{
	fail_each_allocation(self, &op_bind);
}

TEST_F_TIMEOUT(fault_injection, unbind, HUGETLB_TEST_TIMEOUT)
{
	fail_each_allocation(self, &op_unbind);
}

TEST_F_TIMEOUT(fault_injection, guest_fault, HUGETLB_TEST_TIMEOUT)
{
	fail_each_allocation(self, &op_guest_fault);
}

TEST_F_TIMEOUT(fault_injection, allocate, HUGETLB_TEST_TIMEOUT)
{
	fail_each_allocation(self, &op_allocate);
}

TEST_F_TIMEOUT(fault_injection, punch, HUGETLB_TEST_TIMEOUT)
{
	fail_each_allocation(self, &op_punch);
}

TEST_F_TIMEOUT(fault_injection, mmap, HUGETLB_TEST_TIMEOUT)
{
	if (!self->shared)
		SKIP(return, "private memory can't be mapped");

	fail_each_allocation(self, &op_mmap);
}

TEST_F_TIMEOUT(fault_injection, mbind, HUGETLB_TEST_TIMEOUT)
{
	if (!self->shared)
		SKIP(return, "private memory can't be mapped");

	fail_each_allocation(self, &op_mbind);
}

TEST_F_TIMEOUT(fault_injection, user_fault, HUGETLB_TEST_TIMEOUT)
{
	if (!self->shared)
		SKIP(return, "private memory can't be mapped");

	fail_each_allocation(self, &op_user_fault);
}

static bool is_injectable(const char *function)
{
	size_t len = strlen(function);
	bool found = false;
	char line[256];
	FILE *file;

	file = fopen(INJECTABLE, "r");
	if (!file)
		return false;

	while (!found && fgets(line, sizeof(line), file))
		found = !strncmp(line, function, len) && isspace(line[len]);
	fclose(file);
	return found;
}

static void inject_into(struct context *self, const char *function)
{
	char path[128];

	snprintf(path, sizeof(path), "fail_function/%s/retval", function);
	set_debugfs("fail_function/times", "0");
	set_debugfs("fail_function/verbose", "0");
	set_debugfs("fail_function/interval", "0");
	set_debugfs("fail_function/probability", "100");
	set_debugfs("fail_function/inject", function);
	set_debugfs(path, "0xfffffffffffffff4");

	fail_once(self, &op_allocate);
	fail_once(self, &op_guest_fault);
	if (self->shared)
		fail_once(self, &op_user_fault);

	snprintf(path, sizeof(path), "!%s", function);
	set_debugfs("fail_function/inject", path);
}

/* The page is there, but can't be added to the file. */
TEST_F_TIMEOUT(fault_injection, page_cache, HUGETLB_TEST_TIMEOUT)
{
	if (access(FAIL_FUNCTION, F_OK))
		SKIP(return, "no " FAIL_FUNCTION ", see CONFIG_FAIL_FUNCTION");

	inject_into(self, "__filemap_add_folio");
}

/* The page isn't there, whatever was reserved. */
TEST_F_TIMEOUT(fault_injection, pool, HUGETLB_TEST_TIMEOUT)
{
	if (self->page_size == SZ_4K)
		SKIP(return, "not about huge pages");
	if (access(FAIL_FUNCTION, F_OK))
		SKIP(return, "no " FAIL_FUNCTION ", see CONFIG_FAIL_FUNCTION");
	if (!is_injectable("hugetlb_loan_alloc_folio"))
		SKIP(return, "hugetlb_loan_alloc_folio() is not in " INJECTABLE);

	inject_into(self, "hugetlb_loan_alloc_folio");
}

/* The pool has a page, but the cgroup can't take it. */
TEST_F_TIMEOUT(fault_injection, cgroup, HUGETLB_TEST_TIMEOUT)
{
	const struct operation *operations[] = {
		&op_allocate, &op_guest_fault, &op_user_fault,
	};
	const char *limit = self->page_size == SZ_2M ? "hugetlb.2MB.max" : "hugetlb.1GB.max";
	struct gmem_counters prepared;
	char max[] = "max", zero[] = "0";
	int i;

	if (self->page_size == SZ_4K)
		SKIP(return, "not about huge pages");
	if (!gmem_cgroup || cg_write(gmem_cgroup, limit, max))
		SKIP(return, "no hugetlb cgroup");

	for (i = 0; i < (self->shared ? 3 : 2); i++) {
		prepare(self, operations[i]->stage);
		prepared = gmem_counters_read();

		TEST_ASSERT(!cg_write(gmem_cgroup, limit, zero), "Can't set %s", limit);
		TEST_ASSERT_EQ(operations[i]->run(self), -ENOMEM);
		TEST_ASSERT(!cg_write(gmem_cgroup, limit, max), "Can't set %s", limit);

		check_failed(self, operations[i], &prepared);
		redo(self, operations[i]);
		check_succeeded(self, operations[i]);
	}
}

int main(int argc, char **argv)
{
	long expedited = read_long(RCU_EXPEDITED);
	int r;

	/* Memslots come and go, and that's what takes time. */
	write_long(RCU_EXPEDITED, 1);
	gmem_cgroup_enter();
	r = test_harness_run(argc, argv);
	gmem_cgroup_leave();
	write_long(RCU_EXPEDITED, expedited);
	return r;
}
