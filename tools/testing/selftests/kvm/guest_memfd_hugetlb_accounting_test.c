// SPDX-License-Identifier: GPL-2.0
/*
 * What processes are charged for mappings of guest_memfd with HugeTLB pages
 *
 * For the host, it's HugeTLB memory: a process that maps it counts for as much as
 * one that maps the same amount of hugetlbfs, which each test does first.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/align.h>
#include <linux/falloc.h>
#include <linux/kernel-page-flags.h>
#include <linux/sizes.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "cgroup_util.h"
#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PATTERN		0xa5a5a5a5a5a5a5a5ul

#define NR_PAGES	2

enum { HUGETLBFS, GUEST_MEMFD, NR_KINDS };

static const char * const kind_names[NR_KINDS] = { "hugetlbfs", "guest_memfd" };

FIXTURE(accounting) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	size_t page_size;
};

FIXTURE_VARIANT(accounting) {
	size_t page_size;
	/* Enough to tell, even if the machine has much memory */
	long nr_large;
};

FIXTURE_VARIANT_ADD(accounting, 2M) {
	.page_size = SZ_2M,
	.nr_large = 48,
};

FIXTURE_VARIANT_ADD(accounting, 1G) {
	.page_size = SZ_1G,
	.nr_large = 2,
};

FIXTURE_SETUP(accounting)
{
	const char *missing = hugetlb_missing(variant->page_size, NR_PAGES);

	if (missing)
		SKIP(return, "%s", missing);

	self->page_size = variant->page_size;
	self->pool = hugetlb_pool_read(self->page_size);
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN_PARENT(accounting)
{
	TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

static int create(struct kvm_vm *vm, int kind, size_t page_size, long nr_pages)
{
	if (kind == HUGETLBFS)
		return hugetlbfs_create(nr_pages * page_size, page_size);

	return vm_create_guest_memfd(vm, nr_pages * page_size,
				     GUEST_MEMFD_FLAG_HUGETLB | SHARED_MEMORY |
				     hugetlb_size_flag(page_size));
}

static char *map(int fd, size_t size)
{
	return kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
}

/* In kB */
struct usage {
	long rss;
	long hugetlb;
};

static struct usage usage_read(void)
{
	struct usage usage = { .hugetlb = -1 };
	long file = -1, shmem = -1;
	char line[256];
	FILE *status;

	status = fopen("/proc/self/status", "r");
	TEST_ASSERT(status, "Can't open /proc/self/status");
	while (fgets(line, sizeof(line), status)) {
		if (sscanf(line, "RssFile: %ld kB", &file) == 1 ||
		    sscanf(line, "RssShmem: %ld kB", &shmem) == 1 ||
		    sscanf(line, "HugetlbPages: %ld kB", &usage.hugetlb) == 1)
			continue;
	}
	fclose(status);
	TEST_ASSERT(file >= 0 && shmem >= 0 && usage.hugetlb >= 0,
		    "/proc/self/status lacks a field");
	usage.rss = file + shmem;
	return usage;
}

/*
 * What the test has been seen to use of its own text, which is in some file, comes
 * on top.  It's less than a huge page at first, and none the second time round.
 */
static struct usage usage_before;
static long rss_noise;

#define MUCH_NOISE	(SZ_2M / SZ_1K - 4)

static void __assert_usage(int kind, long kb, int line)
{
	struct usage usage = usage_read();

	test_assert(usage.hugetlb == kb && labs(usage.rss - usage_before.rss) <= rss_noise,
		    "usage", __FILE__, line,
		    "%s: HugetlbPages: wanted %ld kB, got %ld, RssFile and RssShmem %ld to %ld",
		    kind_names[kind], kb, usage.hugetlb, usage_before.rss, usage.rss);
}

#define ASSERT_USAGE(_kind, _size)	__assert_usage(_kind, (_size) / SZ_1K, __LINE__)

static void run_child(int kind, int fd, char *mem, size_t page_size, bool punch)
{
	int status;
	pid_t pid;

	pid = fork();
	if (!pid) {
		if (punch) {
			kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
			_exit(0);
		}

		/* It refaults what it has inherited. */
		rss_noise = MUCH_NOISE;
		ASSERT_USAGE(kind, 0);
		READ_ONCE(*mem);
		ASSERT_USAGE(kind, page_size);
		kvm_munmap(mem, page_size);
		ASSERT_USAGE(kind, 0);
		mem = map(fd, page_size);
		WRITE_ONCE(*mem, 1);
		ASSERT_USAGE(kind, page_size);
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
}

static void use_mappings(struct kvm_vm *vm, int kind, size_t page_size)
{
	const size_t size = NR_PAGES * page_size;
	char *mem, *other, *area, *target;
	int fd;

	fd = create(vm, kind, page_size, NR_PAGES);
	area = kvm_mmap(3 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	target = align_ptr_up(area, page_size);

	usage_before = usage_read();
	TEST_ASSERT_EQ(usage_before.hugetlb, 0);

	/* Come */
	mem = map(fd, size);
	ASSERT_USAGE(kind, 0);
	READ_ONCE(mem[page_size / 2]);
	ASSERT_USAGE(kind, page_size);
	WRITE_ONCE(mem[page_size / 2], 1);
	ASSERT_USAGE(kind, page_size);
	WRITE_ONCE(mem[page_size], 1);
	ASSERT_USAGE(kind, size);
	other = map(fd, size);
	ASSERT_USAGE(kind, size);
	WRITE_ONCE(other[0], 1);
	ASSERT_USAGE(kind, size + page_size);
	kvm_munmap(other, size);
	ASSERT_USAGE(kind, size);

	/* Stay */
	TEST_ASSERT(!mprotect(mem, page_size, PROT_NONE), "mprotect() failed");
	ASSERT_USAGE(kind, size);
	TEST_ASSERT(!mprotect(mem, page_size, PROT_READ | PROT_WRITE), "mprotect() failed");
	TEST_ASSERT(!mlock(mem, page_size) && !munlock(mem, page_size), "mlock() failed");
	ASSERT_USAGE(kind, size);
	TEST_ASSERT(mremap(mem + page_size, page_size, page_size,
			   MREMAP_MAYMOVE | MREMAP_FIXED, target) == target,
		    "Can't move, errno %d", errno);
	ASSERT_USAGE(kind, size);
	WRITE_ONCE(*target, 1);
	ASSERT_USAGE(kind, size);
	kvm_munmap(target, page_size);
	ASSERT_USAGE(kind, page_size);
	run_child(kind, fd, mem, page_size, false);
	ASSERT_USAGE(kind, page_size);

	/* Go */
	kvm_madvise(mem, page_size, MADV_DONTNEED);
	ASSERT_USAGE(kind, 0);
	WRITE_ONCE(*mem, 1);
	ASSERT_USAGE(kind, page_size);
	if (kind == GUEST_MEMFD) {
		/* The entry is split, and goes as a whole. */
		kvm_madvise(mem + SZ_4K, SZ_4K, MADV_DONTNEED);
		ASSERT_USAGE(kind, 0);
		WRITE_ONCE(*mem, 1);
		ASSERT_USAGE(kind, page_size);
	}
	kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
	ASSERT_USAGE(kind, 0);
	WRITE_ONCE(*mem, 1);
	run_child(kind, fd, mem, page_size, true);
	ASSERT_USAGE(kind, 0);
	WRITE_ONCE(*mem, 1);
	kvm_madvise(mem, page_size, MADV_REMOVE);
	ASSERT_USAGE(kind, 0);
	WRITE_ONCE(*mem, 1);
	ASSERT_USAGE(kind, page_size);
	TEST_ASSERT(mmap(mem, page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
			 -1, 0) == mem, "mmap(MAP_FIXED) failed, errno %d", errno);
	ASSERT_USAGE(kind, 0);

	kvm_munmap(mem, page_size);
	munmap(area, 3 * page_size);
	kvm_close(fd);
	ASSERT_USAGE(kind, 0);
}

TEST_F_TIMEOUT(accounting, mappings, HUGETLB_TEST_TIMEOUT)
{
	int kind, i;

	for (kind = 0; kind < NR_KINDS; kind++) {
		for (i = 0; i < 2; i++) {
			rss_noise = i ? 0 : MUCH_NOISE;
			use_mappings(self->vm, kind, self->page_size);
		}
	}
}

/* Costs the pool a page for each kind. */
TEST_F_TIMEOUT(accounting, memory_failure, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	int kind, fd;
	char *mem;

	for (kind = 0; kind < NR_KINDS; kind++) {
		usage_before = usage_read();
		rss_noise = MUCH_NOISE;
		fd = create(self->vm, kind, page_size, 1);
		mem = map(fd, page_size);
		WRITE_ONCE(*mem, 1);
		ASSERT_USAGE(kind, page_size);
		TEST_EXPECT_SIGBUS(madvise(mem, SZ_4K, MADV_HWPOISON));
		ASSERT_USAGE(kind, 0);
		TEST_EXPECT_SIGBUS(READ_ONCE(*mem));
		ASSERT_USAGE(kind, 0);
		kvm_munmap(mem, page_size);
		kvm_close(fd);
		ASSERT_USAGE(kind, 0);
	}

	/* Memory failure keeps them. */
	self->pool.free -= NR_KINDS;
}

static long get_oom_score(struct kvm_vm *vm, int kind, size_t page_size, long nr_pages)
{
	int fd = create(vm, kind, page_size, nr_pages);
	int pipes[2], status;
	long i, score;
	char *mem;
	pid_t pid;

	TEST_ASSERT(!pipe(pipes), "pipe() failed");
	mem = map(fd, nr_pages * page_size);
	pid = fork();
	if (!pid) {
		for (i = 0; i < nr_pages; i++)
			READ_ONCE(mem[i * page_size]);
		score = read_long("/proc/self/oom_score");
		_exit(write(pipes[1], &score, sizeof(score)) != sizeof(score));
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
	TEST_ASSERT_EQ(read(pipes[0], &score, sizeof(score)), sizeof(score));
	kvm_munmap(mem, nr_pages * page_size);
	kvm_close(pipes[0]);
	kvm_close(pipes[1]);
	kvm_close(fd);
	return score;
}

TEST_F_TIMEOUT(accounting, oom_score, HUGETLB_TEST_TIMEOUT)
{
	long score[NR_KINDS];
	int kind;

	for (kind = 0; kind < NR_KINDS; kind++)
		score[kind] = get_oom_score(self->vm, kind, self->page_size, variant->nr_large);

	/* They may differ by a page of their own, i.e. the scores by one. */
	TEST_ASSERT(labs(score[HUGETLBFS] - score[GUEST_MEMFD]) <= 1,
		    "oom_score: %ld with hugetlbfs, %ld with guest_memfd",
		    score[HUGETLBFS], score[GUEST_MEMFD]);
}

#define OOM_LIMIT	(32l * SZ_1M)

/* Uses more small pages than the cgroup may have. */
static void hungry(void)
{
	char *mem = kvm_mmap(4 * OOM_LIMIT, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	long i;

	for (i = 0; i < 4 * OOM_LIMIT; i += SZ_4K)
		WRITE_ONCE(mem[i], 1);
}

static pid_t start_in(const char *cgroup, int go)
{
	pid_t pid = fork();
	char c;

	if (pid) {
		TEST_ASSERT(!cg_enter(cgroup, pid), "Can't move to %s", cgroup);
		return pid;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	TEST_ASSERT(read(go, &c, 1) == 1, "No go");
	return 0;
}

/* The VMM has more memory than anybody, but none that its end would free. */
TEST_F_TIMEOUT(accounting, oom_kill, HUGETLB_TEST_TIMEOUT)
{
	const long nr_pages = variant->nr_large;
	const size_t page_size = self->page_size;
	int kind, fd, go[2], ready[2], stop[2], vmm_status, status;
	char root[PATH_MAX], *cgroup, *mem, c;
	pid_t vmm, other;
	long i;

	TEST_ASSERT(nr_pages * page_size > 2 * OOM_LIMIT, "Too few pages");
	if (cg_find_unified_root(root, sizeof(root), NULL))
		SKIP(return, "no cgroup2");
	cg_write(root, "cgroup.subtree_control", "+memory");
	cgroup = cg_name(root, "guest_memfd_oom");

	for (kind = 0; kind < NR_KINDS; kind++) {
		TEST_ASSERT(!cg_create(cgroup), "Can't create %s", cgroup);
		TEST_ASSERT(!cg_write_numeric(cgroup, "memory.max", OOM_LIMIT),
			    "No memory.max in %s", cgroup);
		cg_write(cgroup, "memory.swap.max", "0");
		TEST_ASSERT(!pipe(go) && !pipe(ready) && !pipe(stop), "pipe() failed");

		/* Where huge pages are charged to a memory cgroup, it's not that one. */
		fd = create(self->vm, kind, page_size, nr_pages);
		kvm_fallocate(fd, ALLOCATE, 0, nr_pages * page_size);
		mem = map(fd, nr_pages * page_size);
		vmm = start_in(cgroup, go[0]);
		if (!vmm) {
			for (i = 0; i < nr_pages; i++)
				WRITE_ONCE(*(u64 *)(mem + i * page_size), PATTERN);
			TEST_ASSERT(write(ready[1], "", 1) == 1 && read(stop[0], &c, 1) == 1,
				    "No stop");
			for (i = 0; i < nr_pages; i++)
				TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + i * page_size)), PATTERN);
			_exit(0);
		}
		kvm_close(ready[1]);
		TEST_ASSERT(write(go[1], "", 1) == 1 && read(ready[0], &c, 1) == 1, "No VMM");

		other = start_in(cgroup, go[0]);
		if (!other) {
			hungry();
			_exit(0);
		}
		TEST_ASSERT_EQ(write(go[1], "", 1), 1);
		TEST_ASSERT(waitpid(other, &status, 0) == other, "No child");
		TEST_ASSERT_EQ(write(stop[1], "", 1), 1);
		TEST_ASSERT(waitpid(vmm, &vmm_status, 0) == vmm, "No child");
		TEST_ASSERT(!vmm_status, "%s: the VMM was killed, status 0x%x",
			    kind_names[kind], vmm_status);
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
			    "%s: the hungry process wasn't killed, status 0x%x",
			    kind_names[kind], status);
		TEST_ASSERT_EQ(cg_read_key_long(cgroup, "memory.events", "oom_kill "), 1);

		kvm_munmap(mem, nr_pages * page_size);
		kvm_close(fd);
		kvm_close(ready[0]);
		for (i = 0; i < 2; i++) {
			kvm_close(go[i]);
			kvm_close(stop[i]);
		}
		TEST_ASSERT_POOL_EVENTUALLY(page_size, self->pool, 0, 0);
		TEST_ASSERT(!cg_destroy(cgroup), "Can't remove %s", cgroup);
	}
}

static bool is_referenced(u64 pfn)
{
	u64 flags;
	int fd;

	fd = open_path_or_exit("/proc/kpageflags", O_RDONLY);
	TEST_ASSERT_EQ(pread(fd, &flags, sizeof(flags), pfn * sizeof(flags)), sizeof(flags));
	kvm_close(fd);
	return flags & BIT_ULL(KPF_REFERENCED);
}

/* To unmap a page that was accessed is not to access it. */
TEST_F_TIMEOUT(accounting, not_on_lru, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const int nr_pages = 16;
	char *file, *mem;
	u64 pfn = 0;
	int fd, i;

	/* A PUD entry doesn't say so when it's zapped, and not everybody can find it. */
	if (page_size != get_trans_hugepagesz())
		SKIP(return, "the same for all files");

	fd = create(self->vm, GUEST_MEMFD, page_size, nr_pages);
	file = map(fd, nr_pages * page_size);

	/* Others may have left a page of the pool referenced. */
	for (i = 0; i < nr_pages; i++) {
		mem = file + i * page_size;
		WRITE_ONCE(*mem, 1);
		pfn = mem_to_pfn(mem);
		TEST_ASSERT(pfn, "No pfn");
		if (!is_referenced(pfn))
			break;
	}
	TEST_ASSERT(i < nr_pages, "All pages were referenced before");

	WRITE_ONCE(*mem, 1);
	kvm_madvise(mem, page_size, MADV_DONTNEED);
	TEST_ASSERT(!is_referenced(pfn), "Referenced because it was unmapped");
	READ_ONCE(*mem);
	kvm_munmap(file, nr_pages * page_size);
	TEST_ASSERT(!is_referenced(pfn), "Referenced because it was unmapped");
}

TEST_HARNESS_MAIN
