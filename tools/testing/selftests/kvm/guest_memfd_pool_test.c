// SPDX-License-Identifier: GPL-2.0
/*
 * guest_memfd and what is done to the HugeTLB pool that its pages come from
 *
 * What is reserved stays in the pool, whoever shrinks it.  Which of the pool's pages
 * a file gets is a matter of memory policy and of what can be pinned.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/stddef.h>
#include <linux/io_uring.h>
#include <linux/sizes.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "test_util.h"
#include "ucall_common.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define CORRUPT_PFN	"/sys/kernel/debug/hwpoison/corrupt-pfn"

#define expect_error(_call, _errno)						\
do {										\
	int __r = (_call), __e = errno;						\
										\
	TEST_ASSERT(__r == -1 && __e == (_errno), "Wanted " #_errno		\
		    ", got %d, errno %d", __r, __e);				\
} while (0)

#define write_word(_addr, _value)						\
	WRITE_ONCE(*(u64 *)(_addr), _value)
#define read_word(_addr)							\
	READ_ONCE(*(u64 *)(_addr))

FIXTURE(pool) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
	long available;
	u64 flags;
};

FIXTURE_VARIANT(pool) {
	size_t page_size;
	bool hugetlbfs;
};

FIXTURE_VARIANT_ADD(pool, guest_memfd_2M) {
	.page_size = SZ_2M,
};

FIXTURE_VARIANT_ADD(pool, hugetlbfs_2M) {
	.page_size = SZ_2M,
	.hugetlbfs = true,
};

FIXTURE_VARIANT_ADD(pool, guest_memfd_1G) {
	.page_size = SZ_1G,
};

FIXTURE_SETUP(pool)
{
	const char *missing = hugetlb_missing(variant->page_size, 2);

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->pool = hugetlb_pool_read(self->page_size);
	self->available = self->pool.free - self->pool.reserved;
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | SHARED_MEMORY |
		      hugetlb_size_flag(self->page_size);
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN_PARENT(pool)
{
	if (hugetlb_pool_get(self->page_size, "nr_hugepages") != self->pool.total)
		hugetlb_pool_set(self->page_size, "nr_hugepages", self->pool.total);
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

static int create_file(struct kvm_vm *vm, size_t size, size_t page_size, u64 flags)
{
	if (!vm)
		return hugetlbfs_create(size, page_size);

	return vm_create_guest_memfd(vm, size, flags);
}

#define create(_nr_pages)							\
	create_file(variant->hugetlbfs ? NULL : self->vm,			\
		    (_nr_pages) * self->page_size, self->page_size, self->flags)

#define map(_fd, _nr_pages)							\
	kvm_mmap((_nr_pages) * self->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, _fd)

/* All of it, whose reservation was a promise. */
static void access_pages(char *mem, size_t page_size, long nr)
{
	long i;

	for (i = 0; i < nr; i++)
		write_word(mem + i * page_size, i + 1);
	for (i = 0; i < nr; i++)
		TEST_ASSERT_EQ(read_word(mem + i * page_size), i + 1);
}

#define NR_NODES	2

/* Of a node that isn't there: -1 */
static long node_pool_get(int node, size_t page_size, const char *name)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path),
		 "/sys/devices/system/node/node%d/hugepages/hugepages-%lukB/%s",
		 node, page_size / SZ_1K, name);
	return read_long(path);
}

static int node_pool_set(int node, size_t page_size, const char *name, long value)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path),
		 "/sys/devices/system/node/node%d/hugepages/hugepages-%lukB/%s",
		 node, page_size / SZ_1K, name);
	return write_long(path, value);
}

TEST_F_TIMEOUT(pool, shrink, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = min(self->available, 4l);
	struct hugetlb_pool now;
	char *mem;
	int fd;

	if (page_size > SZ_2M)
		SKIP(return, "a gigantic page that is freed may not be had again");

	fd = create(nr);
	mem = map(fd, nr);
	node_pool_set(1, page_size, "nr_hugepages", 0);
	node_pool_set(0, page_size, "nr_hugepages", 0);
	hugetlb_pool_set(page_size, "nr_hugepages", 0);
	now = hugetlb_pool_read(page_size);
	TEST_ASSERT(now.free == nr && now.reserved == nr, "%ld free, %ld reserved",
		    now.free, now.reserved);
	access_pages(mem, page_size, nr);
	kvm_munmap(mem, nr * page_size);
	kvm_close(fd);
}

static void resize_pool(size_t page_size, long total)
{
	for (;;) {
		hugetlb_pool_set(page_size, "nr_hugepages", 0);
		hugetlb_pool_set(page_size, "nr_hugepages", total);
	}
}

TEST_F_TIMEOUT(pool, race_with_shrink, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const long nr = min(self->available, 4l);
	int fd, i, status, done = 0;
	pid_t pid;
	char *mem;

	if (page_size > SZ_2M)
		SKIP(return, "a gigantic page that is freed may not be had again");

	pid = fork();
	if (!pid)
		resize_pool(page_size, self->pool.total);

	/* On a busy machine it may take a while to meet the pool with pages in it. */
	for (i = 0; done < 200 && i < 100000; i++) {
		if (i > done)
			usleep(100);
		if (variant->hugetlbfs) {
			fd = hugetlbfs_create(nr * page_size, page_size);
			mem = mmap(NULL, nr * page_size, PROT_READ | PROT_WRITE,
				   MAP_SHARED, fd, 0);
			if (mem == MAP_FAILED) {
				kvm_close(fd);
				continue;
			}
		} else {
			fd = __vm_create_guest_memfd(self->vm, nr * page_size, self->flags);
			if (fd < 0)
				continue;
			mem = map(fd, nr);
		}
		access_pages(mem, page_size, nr);
		if (!variant->hugetlbfs) {
			kvm_fallocate(fd, PUNCH_HOLE, 0, nr * page_size);
			access_pages(mem, page_size, nr);
		}
		kvm_munmap(mem, nr * page_size);
		kvm_close(fd);
		done++;
	}
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	TEST_ASSERT(done, "There was never a free page");
}

/*
 * Memory policy, on two nodes
 */

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

static void assert_node(void *mem, int want)
{
	int node = -1, status = -1;

	kvm_get_mempolicy(&node, NULL, 0, mem, MPOL_F_NODE | MPOL_F_ADDR);
	TEST_ASSERT_EQ(node, want);
	kvm_move_pages(0, 1, &mem, NULL, &status, 0);
	TEST_ASSERT_EQ(status, want);
}

TEST_F_TIMEOUT(pool, bind, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const unsigned long masks[] = { 1, 2 };
	long free[2], nr, i;
	char *mem;
	int fd, node;

	if (variant->hugetlbfs)
		SKIP(return, "hugetlbfs has its own rules");

	read_nodes(page_size, free);
	if (!is_multi_numa_node_system() || !free[0] || !free[1])
		SKIP(return, "two nodes with free huge pages needed");

	/* The one with fewer pages: there's no need to zero more of 1G than that. */
	node = free[1] <= free[0];
	nr = free[node];

	/*
	 * Whoever allocates the memory beforehand gets what the policy allows for or
	 * nothing, be it the file's policy or the task's.
	 */
	fd = create(nr + 1);
	mem = map(fd, nr + 1);
	kvm_mbind(mem, (nr + 1) * page_size, MPOL_BIND, &masks[node], 8, 0);
	expect_error(fallocate(fd, ALLOCATE, 0, (nr + 1) * page_size), ENOMEM);
	assert_nodes(page_size, free, node ? 0 : nr, node ? nr : 0);
	expect_error(fallocate(fd, ALLOCATE, nr * page_size, page_size), ENOMEM);
	kvm_mbind(mem, (nr + 1) * page_size, MPOL_DEFAULT, NULL, 0, 0);
	kvm_set_mempolicy(MPOL_BIND, &masks[node], 8);
	expect_error(fallocate(fd, ALLOCATE, nr * page_size, page_size), ENOMEM);
	assert_nodes(page_size, free, node ? 0 : nr, node ? nr : 0);
	kvm_set_mempolicy(MPOL_DEFAULT, NULL, 0);

	/* Those who prefer a node get a page all the same. */
	if (page_size == SZ_2M) {
		kvm_mbind(mem, (nr + 1) * page_size, MPOL_PREFERRED, &masks[node], 8, 0);
		kvm_fallocate(fd, ALLOCATE, nr * page_size, page_size);
		kvm_fallocate(fd, PUNCH_HOLE, nr * page_size, page_size);
		kvm_mbind(mem, (nr + 1) * page_size, MPOL_PREFERRED_MANY, &masks[node], 8, 0);
		kvm_fallocate(fd, ALLOCATE, nr * page_size, page_size);
		kvm_fallocate(fd, PUNCH_HOLE, nr * page_size, page_size);
	}

	/* An access is what the page was reserved for.  The owner can find out. */
	kvm_mbind(mem, (nr + 1) * page_size, MPOL_BIND, &masks[node], 8, 0);
	for (i = 0; i <= nr; i++)
		write_word(mem + i * page_size, i + 1);
	assert_nodes(page_size, free, node ? 1 : nr, node ? nr : 1);
	for (i = 0; i < nr; i++)
		assert_node(mem + i * page_size, node);
	assert_node(mem + nr * page_size, !node);

	/* What is there already isn't moved. */
	kvm_fallocate(fd, ALLOCATE, 0, (nr + 1) * page_size);
	kvm_munmap(mem, (nr + 1) * page_size);
	kvm_close(fd);

	/* The task's policy counts for the reservation, as it does for hugetlbfs. */
	kvm_set_mempolicy(MPOL_BIND, &masks[node], 8);
	expect_error(__vm_create_guest_memfd(self->vm, (nr + 1) * page_size, self->flags),
		     ENOMEM);
	fd = create(nr);
	kvm_close(fd);
	kvm_set_mempolicy(MPOL_DEFAULT, NULL, 0);
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);
}

/* A guest must not die of it either. */
static void guest_code(u64 *addr)
{
	WRITE_ONCE(*addr, 1);
	GUEST_DONE();
}

TEST_F_TIMEOUT(pool, bind_guest, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const unsigned long masks[] = { 1, 2 };
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct ucall uc;
	long free[2];
	int fd, node;
	char *mem;

	if (variant->hugetlbfs)
		SKIP(return, "hugetlbfs has its own rules");
	if (page_size > SZ_2M)
		SKIP(return, "the same for all files");

	read_nodes(page_size, free);
	if (!is_multi_numa_node_system() || !free[0] || !free[1])
		SKIP(return, "two nodes with free huge pages needed");

	node = free[1] <= free[0];
	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	fd = vm_create_guest_memfd(vm, (free[node] + 1) * page_size, self->flags);
	mem = map(fd, free[node] + 1);
	kvm_mbind(mem, (free[node] + 1) * page_size, MPOL_BIND, &masks[node], 8, 0);
	kvm_fallocate(fd, ALLOCATE, page_size, free[node] * page_size);
	expect_error(fallocate(fd, ALLOCATE, 0, page_size), ENOMEM);

	vm_set_user_memory_region2(vm, 10, KVM_MEM_GUEST_MEMFD, SZ_4G, page_size, mem, fd, 0);
	virt_map(vm, SZ_4G, SZ_4G, 1);
	vcpu_args_set(vcpu, 1, (u64)SZ_4G);
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_DONE);
	TEST_ASSERT_EQ(read_word(mem), 1);
	assert_node(mem, !node);
	kvm_munmap(mem, (free[node] + 1) * page_size);
	kvm_close(fd);
	kvm_vm_free(vm);
}

/*
 * Demotion of pages of 1G.  It isn't certain that they can be had again, for which
 * the pages that they are demoted to are freed.
 */
FIXTURE(demote) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
	long available;
	u64 flags;
};

FIXTURE_VARIANT(demote) {
	bool hugetlbfs;
};

FIXTURE_VARIANT_ADD(demote, guest_memfd) {
};

FIXTURE_VARIANT_ADD(demote, hugetlbfs) {
	.hugetlbfs = true,
};

FIXTURE_SETUP(demote)
{
	const char *missing = hugetlb_missing(SZ_1G, 2);

	if (missing)
		SKIP(return, "%s", missing);
	if (hugetlb_pool_get(SZ_1G, "demote_size") < 0)
		SKIP(return, "pages of 1G can't be demoted");

	self->page_size = SZ_1G;
	self->pool = hugetlb_pool_read(SZ_1G);
	self->available = self->pool.free - self->pool.reserved;
	self->flags = GUEST_MEMFD_FLAG_HUGETLB | SHARED_MEMORY | hugetlb_size_flag(SZ_1G);
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN(demote)
{
}

TEST_F_TIMEOUT(demote, reserved, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	long small_pages[NR_NODES], pages[NR_NODES];
	struct hugetlb_pool now;
	int fd, node;
	char *mem;

	for (node = 0; node < NR_NODES; node++) {
		small_pages[node] = node_pool_get(node, SZ_2M, "nr_hugepages");
		pages[node] = node_pool_get(node, page_size, "nr_hugepages");
	}

	/* All of it is reserved, there is nothing to demote on any node. */
	fd = create(self->available);
	mem = map(fd, self->available);
	TEST_ASSERT(!hugetlb_pool_set(page_size, "demote", self->available),
		    "demote: errno %d", errno);
	TEST_ASSERT_POOL(page_size, self->pool, 0, self->available);
	for (node = 0; node < NR_NODES; node++)
		node_pool_set(node, page_size, "demote", self->available);
	TEST_ASSERT_POOL(page_size, self->pool, 0, self->available);
	kvm_munmap(mem, self->available * page_size);
	kvm_close(fd);
	TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);

	/* All but one page, which is reserved */
	fd = create(1);
	mem = map(fd, 1);
	TEST_ASSERT(!hugetlb_pool_set(page_size, "demote", self->available),
		    "demote: errno %d", errno);
	now = hugetlb_pool_read(page_size);
	TEST_ASSERT(now.free - now.reserved == 0 && now.reserved == self->pool.reserved + 1,
		    "%ld free, %ld reserved", now.free, now.reserved);
	access_pages(mem, page_size, 1);
	kvm_munmap(mem, page_size);
	kvm_close(fd);

	/* Free just those pages that the large ones were demoted to. */
	for (node = 0; node < NR_NODES; node++)
		node_pool_set(node, SZ_2M, "nr_hugepages", small_pages[node]);
	for (node = 0; node < NR_NODES; node++)
		node_pool_set(node, page_size, "nr_hugepages", pages[node]);
}

/* Memory that is meant to be movable, i.e. ZONE_MOVABLE, see kernelcore= */
FIXTURE(movable) {
};

FIXTURE_SETUP(movable)
{
}

FIXTURE_TEARDOWN(movable)
{
}

/* Is this physical page in the zone "Movable" of any node? */
static bool is_movable(u64 pfn)
{
	unsigned long start = 0, spanned = 0;
	bool movable = false, found = false;
	char line[256];
	FILE *file;

	file = fopen("/proc/zoneinfo", "r");
	TEST_ASSERT(file, "Can't open /proc/zoneinfo");
	while (fgets(line, sizeof(line), file)) {
		if (!strncmp(line, "Node ", 5))
			movable = strstr(line, " Movable");
		if (sscanf(line, " spanned %lu", &spanned) == 1)
			continue;
		if (sscanf(line, " start_pfn: %lu", &start) == 1 && movable)
			found |= pfn >= start && pfn < start + spanned;
	}
	fclose(file);
	return found;
}

/* A longterm pin, for as long as this file is open, -1 if there is no io_uring */
static int pin_longterm(void *mem, size_t size)
{
	struct iovec iov = { .iov_base = mem, .iov_len = size };
	struct io_uring_params params = {};
	int fd;

	fd = syscall(__NR_io_uring_setup, 1, &params);
	if (fd < 0)
		return -1;
	TEST_ASSERT(!syscall(__NR_io_uring_register, fd, IORING_REGISTER_BUFFERS, &iov, 1),
		    "Can't pin it, errno %d", errno);
	return fd;
}

/* At once, to close the file does it later */
static void unpin(int fd)
{
	TEST_ASSERT(!syscall(__NR_io_uring_register, fd, IORING_UNREGISTER_BUFFERS, NULL, 0),
		    "It stays pinned, errno %d", errno);
	kvm_close(fd);
}

TEST_F_TIMEOUT(movable, zone, HUGETLB_TEST_TIMEOUT)
{
	const u64 flags = GUEST_MEMFD_FLAG_HUGETLB | SHARED_MEMORY | hugetlb_size_flag(SZ_2M);
	const char *missing = hugetlb_missing(SZ_2M, 2);
	struct hugetlb_pool pool;
	long available, i, nr_movable = 0;
	int fd, uring;
	struct kvm_vm *vm;
	u64 pfn;
	char *mem;

	if (missing)
		SKIP(return, "%s", missing);

	pool = hugetlb_pool_read(SZ_2M);
	available = pool.free - pool.reserved;
	vm = vm_create_barebones();
	fd = vm_create_guest_memfd(vm, available * SZ_2M, flags);
	mem = kvm_mmap(available * SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	/* All that can be pinned comes first, of either node. */
	for (i = 0; i < available; i++) {
		if (i & 1)
			kvm_fallocate(fd, ALLOCATE, i * SZ_2M, SZ_2M);
		write_word(mem + i * SZ_2M, i);
		pfn = mem_to_pfn(mem + i * SZ_2M);
		TEST_ASSERT(pfn, "Page %ld has no pfn", i);
		if (is_movable(pfn))
			nr_movable++;
		else
			TEST_ASSERT(!nr_movable, "Page %ld comes after %ld movable ones",
				    i, nr_movable);
	}
	if (!nr_movable || nr_movable == available)
		SKIP(return, "no huge pages both in and outside of ZONE_MOVABLE");

	/* The last one is movable.  It stays where it is, and can be pinned. */
	pfn = mem_to_pfn(mem + (available - 1) * SZ_2M);
	uring = pin_longterm(mem + (available - 1) * SZ_2M, SZ_2M);
	TEST_ASSERT(uring >= 0, "No io_uring, errno %d", errno);
	TEST_ASSERT_EQ(mem_to_pfn(mem + (available - 1) * SZ_2M), pfn);
	TEST_ASSERT_EQ(read_word(mem + (available - 1) * SZ_2M), available - 1);
	unpin(uring);

	/* And so it can if it's the pin which allocates it. */
	kvm_fallocate(fd, PUNCH_HOLE, (available - 1) * SZ_2M, SZ_2M);
	uring = pin_longterm(mem + (available - 1) * SZ_2M, SZ_2M);
	TEST_ASSERT(is_movable(mem_to_pfn(mem + (available - 1) * SZ_2M)), "It moved");
	unpin(uring);

	kvm_munmap(mem, available * SZ_2M);
	kvm_close(fd);
	TEST_ASSERT_POOL_EVENTUALLY(SZ_2M, pool, 0, 0);
}

/*
 * A poisoned page leaves the file when it's punched out, and nothing that would make
 * accesses fail stays behind.  The page itself is lost.
 */
FIXTURE(punch_poison) {
	size_t page_size;
};

FIXTURE_VARIANT(punch_poison) {
	size_t page_size;
};

FIXTURE_VARIANT_ADD(punch_poison, shared_4K) {
	.page_size = SZ_4K,
};

FIXTURE_VARIANT_ADD(punch_poison, shared_2M) {
	.page_size = SZ_2M,
};

FIXTURE_SETUP(punch_poison)
{
}

FIXTURE_TEARDOWN(punch_poison)
{
}

TEST_F_TIMEOUT(punch_poison, heals, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = variant->page_size, size = 3 * page_size;
	u64 flags = SHARED_MEMORY;
	const char *missing;
	struct kvm_vm *vm;
	char *mem, *alias;
	int fd, i;
	u64 pfn;

	if (access(CORRUPT_PFN, W_OK))
		SKIP(return, "no CONFIG_HWPOISON_INJECT, or no debugfs");

	if (page_size > SZ_4K) {
		/* One more takes the place of the one that is lost. */
		missing = hugetlb_missing(page_size, 4);
		if (missing)
			SKIP(return, "%s", missing);
		flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(page_size);
	}

	vm = vm_create_barebones();
	fd = vm_create_guest_memfd(vm, size, flags);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	alias = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (i = 0; i < 3; i++) {
		write_word(mem + i * page_size, i + 1);
		TEST_ASSERT_EQ(read_word(alias + i * page_size), i + 1);
	}

	pfn = mem_to_pfn(mem + page_size);
	TEST_ASSERT(!write_long(CORRUPT_PFN, pfn), "Can't poison 0x%lx, errno %d",
		    (unsigned long)pfn, errno);
	TEST_EXPECT_SIGBUS(read_word(mem + page_size));
	TEST_EXPECT_SIGBUS(read_word(alias + page_size));

	/* A hole elsewhere is of no help. */
	kvm_fallocate(fd, PUNCH_HOLE, 2 * page_size, page_size);
	TEST_EXPECT_SIGBUS(read_word(mem + page_size));
	TEST_ASSERT_EQ(read_word(mem + 2 * page_size), 0);

	kvm_fallocate(fd, PUNCH_HOLE, page_size, page_size);
	TEST_ASSERT_EQ(read_word(mem + page_size), 0);
	write_word(mem + page_size, 4);
	TEST_ASSERT_EQ(read_word(alias + page_size), 4);
	TEST_ASSERT_EQ(read_word(mem), 1);

	kvm_munmap(mem, size);
	kvm_munmap(alias, size);
	kvm_close(fd);
	kvm_vm_free(vm);
}

TEST_HARNESS_MAIN
