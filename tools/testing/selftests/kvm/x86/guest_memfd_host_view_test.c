// SPDX-License-Identifier: GPL-2.0
/*
 * What the host shows of guest_memfd's HugeTLB pages, and that looking at them
 * disturbs neither user space nor the guest
 *
 * The same is asked for a mapping of hugetlbfs in the same state, i.e. of as many
 * pages, the first of which was written to: the answers are to be the same.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/align.h>
#include <linux/fs.h>
#include <linux/sizes.h>
#include <sys/ioctl.h>
#include <sys/resource.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define PATTERN		0xa5a5a5a5a5a5a5a5ul

#define SLOT		10
#define BASE		SZ_4G

#define NR_PAGES	2

/* What the guest knows, and what it costs it to know it */
struct guest_view {
	long pages_2m, pages_1g;
	long pf_taken;
	u64 value;
};

FIXTURE(view) {
	struct guest_view guest;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	size_t page_size;
	size_t size;
	char *reference;
	char *mem;
	int node;
};

FIXTURE_VARIANT(view) {
	size_t page_size;
};

FIXTURE_VARIANT_ADD(view, 2M) {
	.page_size = SZ_2M,
};

FIXTURE_VARIANT_ADD(view, 1G) {
	.page_size = SZ_1G,
};

static void guest_code(void)
{
	for (;;)
		GUEST_SYNC(READ_ONCE(*(u64 *)BASE));
}

static u64 guest_read(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	return uc.args[1];
}

static long minor_faults(void)
{
	/* Written to, for getrusage() not to fault it in after it has counted. */
	struct rusage usage = {};

	TEST_ASSERT(!getrusage(RUSAGE_THREAD, &usage), "getrusage() failed");
	return usage.ru_minflt;
}

static struct guest_view guest_look(struct kvm_vcpu *vcpu)
{
	struct guest_view view = {
		.pages_2m = vm_get_stat(vcpu->vm, pages_2m),
		.pages_1g = vm_get_stat(vcpu->vm, pages_1g),
	};

	view.value = guest_read(vcpu);
	view.pf_taken = vcpu_get_stat(vcpu, pf_taken);
	return view;
}

static void assert_undisturbed(struct _test_data_view *self, const char *what)
{
	long faults = minor_faults();
	struct guest_view now;

	READ_ONCE(*self->mem);
	faults = minor_faults() - faults;
	TEST_ASSERT(!faults, "%s: user space has to map the page again", what);

	now = guest_look(self->vcpu);
	TEST_ASSERT(!memcmp(&now, &self->guest, sizeof(now)),
		    "%s: leaves of 2M, 1G, faults, value: %ld, %ld, %ld, 0x%lx, now %ld, %ld, %ld, 0x%lx",
		    what, self->guest.pages_2m, self->guest.pages_1g,
		    self->guest.pf_taken, (unsigned long)self->guest.value,
		    now.pages_2m, now.pages_1g, now.pf_taken, (unsigned long)now.value);
}

#define ASSERT_UNDISTURBED(_what)	assert_undisturbed(self, _what)

FIXTURE_SETUP(view)
{
	const char *missing = hugetlb_missing(variant->page_size, NR_PAGES + 1);
	const int max_node = get_max_numa_node();
	unsigned long mask;
	int fd;

	if (missing)
		SKIP(return, "%s", missing);

	/* Where both mappings can have a page */
	self->page_size = variant->page_size;
	self->size = NR_PAGES * self->page_size;
	while (hugetlb_node_free(self->node, self->page_size) < 2) {
		if (self->node++ == max_node)
			SKIP(return, "no node has 2 huge pages");
	}
	mask = BIT(self->node);

	self->vm = vm_create_with_one_vcpu(&self->vcpu, guest_code);
	fd = vm_create_guest_memfd(self->vm, self->size, GUEST_MEMFD_FLAG_HUGETLB |
				   SHARED_MEMORY | hugetlb_size_flag(self->page_size));
	self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	self->reference = kvm_mmap(self->size, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE |
				   __builtin_ctzl(self->page_size) << MFD_HUGE_SHIFT, -1);
	if (is_numa_available()) {
		kvm_mbind(self->mem, self->size, MPOL_BIND, &mask, 8, 0);
		kvm_mbind(self->reference, self->size, MPOL_BIND, &mask, 8, 0);
	}
	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	WRITE_ONCE(*(u64 *)self->reference, PATTERN);

	/* The mapping is the slot's: what happens to it happens to the guest's. */
	vm_set_user_memory_region2(self->vm, SLOT, KVM_MEM_GUEST_MEMFD, BASE, self->size,
				   self->mem, fd, 0);
	virt_map_level(self->vm, BASE, BASE, SZ_1G, PG_LEVEL_2M);
	kvm_close(fd);

	/* Have everything mapped that is used below. */
	guest_look(self->vcpu);
	READ_ONCE(*self->mem);
	minor_faults();
	self->guest = guest_look(self->vcpu);
	TEST_ASSERT_EQ(self->guest.pages_2m, self->page_size == SZ_2M);
	TEST_ASSERT_EQ(self->guest.pages_1g, self->page_size == SZ_1G);
	TEST_ASSERT_EQ(self->guest.value, PATTERN);
	ASSERT_UNDISTURBED("Nothing");
}

FIXTURE_TEARDOWN(view)
{
}

/* The lines of smaps that count something */
static void read_smaps(char *text, size_t size, const char *mem)
{
	char line[256];
	bool found = false;
	FILE *file;

	*text = 0;
	file = fopen("/proc/self/smaps", "r");
	TEST_ASSERT(file, "Can't open /proc/self/smaps");
	while (fgets(line, sizeof(line), file)) {
		unsigned long begin, end;

		if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
			found = begin == (unsigned long)mem;
		else if (found && strncmp(line, "VmFlags:", 8))
			strncat(text, line, size - strlen(text) - 1);
	}
	fclose(file);
	TEST_ASSERT(*text, "%p isn't in /proc/self/smaps", mem);
}

static long field_kb(const char *text, const char *field)
{
	char *line = strstr(text, field);
	long value = -1;

	TEST_ASSERT(line && sscanf(line + strlen(field), ": %ld kB", &value) == 1,
		    "No %s in:\n%s", field, text);
	return value;
}

TEST_F_TIMEOUT(view, smaps, HUGETLB_TEST_TIMEOUT)
{
	char want[4096], got[4096];

	read_smaps(want, sizeof(want), self->reference);
	read_smaps(got, sizeof(got), self->mem);
	ASSERT_UNDISTURBED("smaps");
	TEST_ASSERT(field_kb(want, "Private_Hugetlb") == self->page_size / SZ_1K,
		    "hugetlbfs:\n%s", want);
	TEST_ASSERT(!strcmp(want, got), "hugetlbfs:\n%s\nguest_memfd:\n%s", want, got);
}

/* Both processes have the page mapped. */
TEST_F_TIMEOUT(view, smaps_shared, HUGETLB_TEST_TIMEOUT)
{
	char want[4096], got[4096];
	pid_t pid;
	int status;

	pid = fork();
	if (!pid) {
		READ_ONCE(*self->mem);
		READ_ONCE(*self->reference);
		read_smaps(want, sizeof(want), self->reference);
		read_smaps(got, sizeof(got), self->mem);
		if (field_kb(want, "Shared_Hugetlb") != self->page_size / SZ_1K) {
			pr_info("# hugetlbfs:\n%s\n", want);
			_exit(1);
		}
		if (strcmp(want, got)) {
			pr_info("# hugetlbfs:\n%s\nguest_memfd:\n%s\n", want, got);
			_exit(2);
		}
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid() failed");
	TEST_ASSERT_EQ(status, 0);

	/* fork() takes other memory away from the guest, but not this. */
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), self->guest.pages_2m);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_1g), self->guest.pages_1g);
}

TEST_F_TIMEOUT(view, smaps_rollup, HUGETLB_TEST_TIMEOUT)
{
	char text[4096] = {};
	int fd;

	fd = open_path_or_exit("/proc/self/smaps_rollup", O_RDONLY);
	TEST_ASSERT(read(fd, text, sizeof(text) - 1) > 0, "Can't read smaps_rollup");
	kvm_close(fd);
	ASSERT_UNDISTURBED("smaps_rollup");
	TEST_ASSERT(field_kb(text, "Private_Hugetlb") == 2 * self->page_size / SZ_1K,
		    "smaps_rollup:\n%s", text);
	TEST_ASSERT_EQ(field_kb(text, "FilePmdMapped"), 0);
}

static u64 *read_pagemap(const char *mem, size_t size)
{
	const size_t nr = size / SZ_4K;
	u64 *entries = calloc(nr, sizeof(*entries));
	size_t done = 0;
	ssize_t r;
	int fd;

	TEST_ASSERT(entries, "No memory");
	fd = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	while (done < nr * sizeof(*entries)) {
		r = pread(fd, (char *)entries + done, nr * sizeof(*entries) - done,
			  (u64)mem / SZ_4K * sizeof(*entries) + done);
		TEST_ASSERT(r > 0, "Can't read /proc/self/pagemap");
		done += r;
	}
	kvm_close(fd);
	return entries;
}

#define PFN_MASK	(BIT_ULL(55) - 1)

TEST_F_TIMEOUT(view, pagemap, HUGETLB_TEST_TIMEOUT)
{
	const size_t nr = self->page_size / SZ_4K;
	u64 *want, *got;
	size_t i;

	want = read_pagemap(self->reference, self->size);
	got = read_pagemap(self->mem, self->size);
	ASSERT_UNDISTURBED("pagemap");
	TEST_ASSERT((want[0] & BIT_ULL(63)) && IS_ALIGNED(want[0] & PFN_MASK, nr),
		    "hugetlbfs: 0x%lx", (unsigned long)want[0]);
	TEST_ASSERT(IS_ALIGNED(got[0] & PFN_MASK, nr) && (got[0] & PFN_MASK),
		    "guest_memfd: 0x%lx", (unsigned long)got[0]);
	for (i = 0; i < NR_PAGES * nr; i++) {
		TEST_ASSERT((got[i] & ~PFN_MASK) == (want[i] & ~PFN_MASK),
			    "4K page %lu: 0x%lx for hugetlbfs, 0x%lx for guest_memfd", i,
			    (unsigned long)want[i], (unsigned long)got[i]);
		TEST_ASSERT((got[i] & PFN_MASK) == (i < nr ? (got[0] & PFN_MASK) + i : 0),
			    "4K page %lu: 0x%lx, the first one 0x%lx", i,
			    (unsigned long)got[i], (unsigned long)got[0]);
	}

	/* A read from the middle of a page */
	got[0] = read_pagemap(self->mem + self->page_size - SZ_4K, SZ_4K)[0];
	ASSERT_UNDISTURBED("pagemap");
	TEST_ASSERT_EQ(got[0], got[nr - 1]);
}

static int scan(char *mem, size_t size, u64 mask, struct page_region *region)
{
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.start = (u64)mem,
		.end = (u64)mem + size,
		.vec = (u64)region,
		.vec_len = 4,
		.category_mask = mask,
		.return_mask = PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN | PAGE_IS_FILE |
			       PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO |
			       PAGE_IS_HUGE | PAGE_IS_SOFT_DIRTY,
	};
	int fd, r, i;

	memset(region, 0, 4 * sizeof(*region));
	fd = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	r = ioctl(fd, PAGEMAP_SCAN, &scan);
	TEST_ASSERT(r >= 0, __KVM_IOCTL_ERROR(PAGEMAP_SCAN, r));
	kvm_close(fd);
	for (i = 0; i < r; i++) {
		region[i].start -= (u64)mem;
		region[i].end -= (u64)mem;
	}
	return r;
}

TEST_F_TIMEOUT(view, pagemap_scan, HUGETLB_TEST_TIMEOUT)
{
	const u64 masks[] = { 0, PAGE_IS_PRESENT, PAGE_IS_HUGE, PAGE_IS_FILE | PAGE_IS_WRITTEN };
	struct page_region want[4], got[4];
	int i, nr;

	for (i = 0; i < ARRAY_SIZE(masks); i++) {
		nr = scan(self->reference, self->size, masks[i], want);
		TEST_ASSERT_EQ(scan(self->mem, self->size, masks[i], got), nr);
		ASSERT_UNDISTURBED("PAGEMAP_SCAN");
		TEST_ASSERT(!memcmp(want, got, sizeof(want)),
			    "Mask 0x%lx: hugetlbfs: 0x%llx to 0x%llx: 0x%llx, guest_memfd: 0x%llx to 0x%llx: 0x%llx",
			    (unsigned long)masks[i],
			    want[0].start, want[0].end, want[0].categories,
			    got[0].start, got[0].end, got[0].categories);
	}
}

/* All but the address and the file, i.e. policy and what is mapped */
static void read_numa_maps(char *text, size_t size, const char *mem)
{
	char line[1024], *word, *next;
	bool found = false;
	FILE *file;

	*text = 0;
	file = fopen("/proc/self/numa_maps", "r");
	TEST_ASSERT(file, "Can't open /proc/self/numa_maps");
	while (!found && fgets(line, sizeof(line), file)) {
		next = line;
		found = strtoul(strsep(&next, " "), NULL, 16) == (unsigned long)mem;
		while (found && (word = strsep(&next, "\n "))) {
			/* The name of the file, of which " (deleted)" is a part */
			if (!strncmp(word, "file=", 5) || !strncmp(word, "(deleted)", 9) || !*word)
				continue;
			strncat(text, word, size - strlen(text) - 1);
			strncat(text, " ", size - strlen(text) - 1);
		}
	}
	fclose(file);
	TEST_ASSERT(found, "%p isn't in /proc/self/numa_maps", mem);
}

TEST_F_TIMEOUT(view, numa_maps, HUGETLB_TEST_TIMEOUT)
{
	char want[1024], got[1024], node[32];

	if (access("/proc/self/numa_maps", F_OK))
		SKIP(return, "no NUMA");

	read_numa_maps(want, sizeof(want), self->reference);
	read_numa_maps(got, sizeof(got), self->mem);
	ASSERT_UNDISTURBED("numa_maps");
	snprintf(node, sizeof(node), " N%d=1 ", self->node);
	TEST_ASSERT(strstr(want, node), "No%sin: %s", node, want);
	TEST_ASSERT(!strcmp(want, got), "hugetlbfs: %s\nguest_memfd: %s", want, got);
}

TEST_F_TIMEOUT(view, mincore, HUGETLB_TEST_TIMEOUT)
{
	const size_t nr = self->page_size / SZ_4K;
	unsigned char *vec = malloc(NR_PAGES * nr);
	char * const mems[] = { self->reference, self->mem };
	size_t i, j;

	TEST_ASSERT(vec, "No memory");
	for (i = 0; i < ARRAY_SIZE(mems); i++) {
		memset(vec, 0xff, NR_PAGES * nr);
		TEST_ASSERT(!mincore(mems[i], self->size, vec), "mincore() failed");
		ASSERT_UNDISTURBED("mincore()");
		for (j = 0; j < NR_PAGES * nr; j++)
			TEST_ASSERT((vec[j] & 1) == (j < nr), "Mapping %lu, 4K page %lu: %u",
				    i, j, vec[j]);
	}

	/* Not mapped, neither by a page table nor in one, but there */
	for (i = 0; i < ARRAY_SIZE(mems); i++) {
		WRITE_ONCE(*(u64 *)(mems[i] + self->page_size - 8), 0);
		kvm_madvise(mems[i], self->page_size, MADV_DONTNEED);
		TEST_ASSERT(!mincore(mems[i], self->size, vec), "mincore() failed");
		for (j = 0; j < NR_PAGES * nr; j++)
			TEST_ASSERT((vec[j] & 1) == (j < nr),
				    "Mapping %lu, 4K page %lu, not mapped: %u", i, j, vec[j]);
	}
}

TEST_F_TIMEOUT(view, policy, HUGETLB_TEST_TIMEOUT)
{
	char * const mems[] = { self->reference, self->mem };
	unsigned long right = BIT(self->node), wrong = BIT(!self->node);
	int i, node, status[2];

	if (!is_multi_numa_node_system())
		SKIP(return, "there is one node only");

	for (i = 0; i < ARRAY_SIZE(mems); i++) {
		void *addrs[] = { mems[i] + self->page_size / 2,
				  mems[i] + self->page_size };

		kvm_get_mempolicy(&node, NULL, 0, mems[i], MPOL_F_NODE | MPOL_F_ADDR);
		TEST_ASSERT_EQ(node, self->node);
		ASSERT_UNDISTURBED("get_mempolicy()");

		kvm_move_pages(0, 2, addrs, NULL, status, 0);
		TEST_ASSERT_EQ(status[0], self->node);
		TEST_ASSERT_EQ(status[1], -ENOENT);
		ASSERT_UNDISTURBED("move_pages()");

		TEST_ASSERT(mbind(mems[i], self->size, MPOL_BIND, &wrong, 8,
				  MPOL_MF_STRICT) == -1 && errno == EIO,
			    "Mapping %d: MPOL_MF_STRICT found nothing on node %d", i, self->node);
		ASSERT_UNDISTURBED("mbind() to the wrong node");

		/* What isn't there isn't wrong. */
		kvm_mbind(mems[i] + self->page_size, self->page_size, MPOL_BIND, &wrong, 8,
			  MPOL_MF_STRICT);
		kvm_mbind(mems[i], self->size, MPOL_BIND, &right, 8, MPOL_MF_STRICT);
		ASSERT_UNDISTURBED("mbind() to the right node");
	}

	/* HugeTLB pages on loan don't migrate. */
	TEST_ASSERT(mbind(self->mem, self->size, MPOL_BIND, &wrong, 8,
			  MPOL_MF_STRICT | MPOL_MF_MOVE) == -1 && errno == EIO,
		    "MPOL_MF_MOVE of a page that can't move");
	ASSERT_UNDISTURBED("mbind() with MPOL_MF_MOVE");
}

/* What has nothing to say about HugeTLB */
TEST_F_TIMEOUT(view, others, HUGETLB_TEST_TIMEOUT)
{
	TEST_ASSERT(!write_long("/proc/self/clear_refs", 1), "Can't write clear_refs");
	ASSERT_UNDISTURBED("clear_refs");

	TEST_ASSERT(!mlock(self->mem, self->page_size), "mlock() failed");
	ASSERT_UNDISTURBED("mlock()");
	TEST_ASSERT(!munlock(self->mem, self->page_size), "munlock() failed");
	ASSERT_UNDISTURBED("munlock()");

	kvm_madvise(self->mem, self->page_size, MADV_WILLNEED);
	ASSERT_UNDISTURBED("MADV_WILLNEED");
	kvm_madvise(self->mem, self->page_size, MADV_POPULATE_READ);
	ASSERT_UNDISTURBED("MADV_POPULATE_READ");

	/* It's up to each of them whether that's an error. */
	madvise(self->mem, self->page_size, MADV_COLD);
	ASSERT_UNDISTURBED("MADV_COLD");
	madvise(self->mem, self->page_size, MADV_PAGEOUT);
	ASSERT_UNDISTURBED("MADV_PAGEOUT");
	madvise(self->mem, self->page_size, MADV_FREE);
	ASSERT_UNDISTURBED("MADV_FREE");
	madvise(self->mem, self->page_size, MADV_COLLAPSE);
	ASSERT_UNDISTURBED("MADV_COLLAPSE");
	madvise(self->mem, self->page_size, MADV_GUARD_INSTALL);
	ASSERT_UNDISTURBED("MADV_GUARD_INSTALL");
	madvise(self->mem, self->page_size, MADV_GUARD_REMOVE);
	ASSERT_UNDISTURBED("MADV_GUARD_REMOVE");
}

TEST_HARNESS_MAIN
