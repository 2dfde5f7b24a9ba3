// SPDX-License-Identifier: GPL-2.0
/*
 * guest_memfd whose memory is not in the kernel's direct map
 *
 * There are two witnesses.  /proc/kcore reads memory at its address in the direct
 * map, and finds zeros where nothing is mapped.  The dump of the kernel's page
 * tables in debugfs tells what is mapped, and by entries of which size.  The tests
 * compare how much that is exactly, i.e. nobody else may change it meanwhile.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/stddef.h>
#include <linux/io_uring.h>
#include <linux/sizes.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "guest_memfd_direct_map.h"
#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PAGE_TABLES	"/sys/kernel/debug/page_tables/kernel"
#define CPA_STATS	"/sys/kernel/debug/x86/cpa_stats"
#define CORRUPT_PFN	"/sys/kernel/debug/hwpoison/corrupt-pfn"
#define UNPOISON_PFN	"/sys/kernel/debug/hwpoison/unpoison-pfn"

#define NR_PAGES	2
#define NR_ENTRIES	65536

static const gpa_t gpa = SZ_4G;

/* Neither in this file nor in what a test before this one left behind */
static u64 random_pattern(void)
{
	u64 pattern;

	TEST_ASSERT_EQ(getrandom(&pattern, sizeof(pattern), 0), sizeof(pattern));
	return pattern | 1;
}

/*
 * /proc/kcore
 */

static u64 kcore_find(size_t page_size, size_t offset, u64 value)
{
	u64 phys;
	int i;

	kcore_open();
	for (i = 0; i < kcore.nr_segments; i++) {
		Elf64_Phdr *segment = &kcore.segments[i];
		u64 end = segment->p_paddr + segment->p_memsz;

		for (phys = align_up(segment->p_paddr, page_size); phys + page_size <= end;
		     phys += page_size)
			if (kcore_read_u64(phys + offset) == value)
				return phys;
	}
	return 0;
}

/*
 * The direct map's page tables
 */

struct direct_map_entry {
	u64 begin;
	u64 end;
	char level[8];
	bool present;
};

struct direct_map {
	struct direct_map_entry entries[NR_ENTRIES];
	int nr_entries;
	u64 present;
};

/*
 * Not in the fixtures, which are shared with parents and children, and not in the
 * program's image, which is loaded into guests as a whole.
 */
static struct direct_map *before, *now;

static void direct_map_read(struct direct_map *map)
{
	char line[256], *flags;
	bool found = false;
	FILE *file;

	kcore_open();
	map->nr_entries = 0;
	map->present = 0;

	file = fopen(PAGE_TABLES, "r");
	TEST_ASSERT(file, "Can't open " PAGE_TABLES);
	while (fgets(line, sizeof(line), file)) {
		struct direct_map_entry *entry = &map->entries[map->nr_entries];
		int nr_fields;

		if (line[0] == '-') {
			found = strstr(line, "Low Kernel Mapping");
			continue;
		}
		if (!found)
			continue;

		TEST_ASSERT(map->nr_entries < NR_ENTRIES, "Too many entries");
		nr_fields = sscanf(line, "%lx-%lx", &entry->begin, &entry->end);
		TEST_ASSERT_EQ(nr_fields, 2);
		if (entry->begin < kcore.base)
			continue;
		entry->begin -= kcore.base;
		entry->end -= kcore.base;
		line[strcspn(line, "\n")] = 0;
		flags = strrchr(line, ' ');
		snprintf(entry->level, sizeof(entry->level), "%s", flags + 1);
		entry->present = strstr(line, " RW ") || strstr(line, " ro ");
		if (entry->present)
			map->present += entry->end - entry->begin;
		map->nr_entries++;
	}
	fclose(file);
	TEST_ASSERT(map->present, "No direct map in " PAGE_TABLES);
}

static struct direct_map_entry *direct_map_lookup(struct direct_map *map, u64 phys)
{
	int i;

	for (i = 0; i < map->nr_entries; i++)
		if (phys >= map->entries[i].begin && phys < map->entries[i].end)
			return &map->entries[i];

	TEST_FAIL("0x%lx is not in the direct map", (unsigned long)phys);
	return NULL;
}

/* How much of this range is present */
static u64 direct_map_present(struct direct_map *map, u64 begin, u64 end)
{
	u64 present = 0;
	int i;

	for (i = 0; i < map->nr_entries; i++) {
		struct direct_map_entry *entry = &map->entries[i];

		if (entry->present && entry->begin < end && entry->end > begin)
			present += min(entry->end, end) - max(entry->begin, begin);
	}
	return present;
}

/* The n-th page that was there before, and is not any more */
static u64 direct_map_find_hole(struct direct_map *before, struct direct_map *now,
				size_t page_size, int n)
{
	u64 phys;
	int i;

	for (i = 0; i < now->nr_entries; i++) {
		struct direct_map_entry *entry = &now->entries[i];

		if (entry->present)
			continue;
		for (phys = entry->begin; phys < entry->end; phys += page_size) {
			/* Where there is no memory, holes are large. */
			if (!direct_map_lookup(before, phys)->present) {
				phys = direct_map_lookup(before, phys)->end - page_size;
				continue;
			}
			if (!n--)
				return phys;
		}
	}
	TEST_FAIL("No hole in the direct map");
	return 0;
}

static long read_field(const char *path, const char *name)
{
	char line[256], *value;
	long found = -1;
	FILE *file;

	file = fopen(path, "r");
	if (!file)
		return -1;
	while (found < 0 && fgets(line, sizeof(line), file)) {
		value = line + strlen(name);
		if (!strncmp(line, name, strlen(name)) && (*value == ':' || *value == ' '))
			found = strtol(value + 1, NULL, 10);
	}
	fclose(file);
	return found;
}

/* Of any level; -1 without CONFIG_X86_CPA_STATISTICS */
static long entries_written(void)
{
	long entries = read_field(CPA_STATS, "4K pages set-checked");

	if (entries < 0)
		return -1;
	return entries + read_field(CPA_STATS, "2M pages preserved") +
	       read_field(CPA_STATS, "1G pages preserved");
}

static void refresh_vmstat(void)
{
	int fd = open_path_or_exit("/proc/sys/vm/stat_refresh", O_RDONLY);
	char byte;

	TEST_ASSERT_EQ(read(fd, &byte, 1), 0);
	kvm_close(fd);
}

struct direct_map_counters {
	long kib_4k;
	long kib_2m;
	long kib_1g;
	long splits_2m;
	long splits_1g;
};

static struct direct_map_counters direct_map_counters(void)
{
	/* What the CPUs have counted is added up every now and then, or now. */
	refresh_vmstat();

	return (struct direct_map_counters) {
		.kib_4k = read_field("/proc/meminfo", "DirectMap4k"),
		.kib_2m = read_field("/proc/meminfo", "DirectMap2M"),
		.kib_1g = max(read_field("/proc/meminfo", "DirectMap1G"), 0l),
		.splits_2m = read_field("/proc/vmstat", "direct_map_level2_splits"),
		.splits_1g = read_field("/proc/vmstat", "direct_map_level3_splits"),
	};
}

static const char *direct_map_missing(void)
{
	if (access(PAGE_TABLES, R_OK))
		return "no " PAGE_TABLES ", see CONFIG_PTDUMP_DEBUGFS";
	return no_direct_map_missing();
}

FIXTURE(direct_map) {
	u64 present;
	struct hugetlb_pool pool;
	struct kvm_vm *vm;
	size_t page_size;
	size_t size;
	u64 flags;
};

FIXTURE_VARIANT(direct_map) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(direct_map, shared_4K) {
	.page_size = SZ_4K,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map, private_4K) {
	.page_size = SZ_4K,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map, private_2M) {
	.page_size = SZ_2M,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map, private_1G) {
	.page_size = SZ_1G,
	.flags = PRIVATE_MEMORY,
};

#define is_hugetlb	(self->page_size > SZ_4K)
#define is_shared	(self->flags & GUEST_MEMFD_FLAG_MMAP)

FIXTURE_SETUP(direct_map)
{
	const char *missing = direct_map_missing();

	self->page_size = variant->page_size;
	if (!missing && is_hugetlb)
		missing = hugetlb_missing(self->page_size, NR_PAGES);
	if (missing)
		SKIP(return, "%s", missing);

	self->size = NR_PAGES * self->page_size;
	self->flags = GUEST_MEMFD_FLAG_NO_DIRECT_MAP | variant->flags;
	if (is_hugetlb) {
		self->flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(self->page_size);
		self->pool = hugetlb_pool_read(self->page_size);
	}
	self->vm = vm_create_barebones();
	direct_map_read(before);
	self->present = before->present;
}

/* Whichever way the child went, its memory is back. */
FIXTURE_TEARDOWN_PARENT(direct_map)
{
	int i;

	for (i = 0; i < 1000; i++) {
		direct_map_read(now);
		if (now->present == self->present)
			break;
		usleep(10000);
	}
	TEST_ASSERT_EQ(now->present, self->present);
	if (is_hugetlb)
		TEST_ASSERT_POOL_EVENTUALLY(self->page_size, self->pool, 0, 0);
}

/* This many pages of the file are in use, and not in the direct map. */
#define ASSERT_HOLE(_nr_pages)							\
do {										\
	direct_map_read(now);						\
	TEST_ASSERT_EQ((long)(before->present - now->present),	\
		       (long)((_nr_pages) * self->page_size));			\
} while (0)

#define find_hole(_n)								\
	direct_map_find_hole(before, now, self->page_size, _n)

#define create()								\
	vm_create_guest_memfd(self->vm, self->size, self->flags)

#define map(_fd)								\
	((char *)kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, _fd))

/* Where to look at a page: the first and the last word, and others in between */
static size_t next_sample(size_t offset, size_t page_size)
{
	if (offset == page_size - 8)
		return page_size;

	return min(offset + align_up(page_size / 8 + 8, 8), page_size - 8);
}

static void write_samples(char *mem, size_t page_size, u64 pattern)
{
	size_t offset;

	for (offset = 0; offset < page_size; offset = next_sample(offset, page_size))
		WRITE_ONCE(*(u64 *)(mem + offset), pattern + offset);
}

static void check_samples(char *mem, size_t page_size, u64 pattern)
{
	size_t offset;

	for (offset = 0; offset < page_size; offset = next_sample(offset, page_size))
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + offset)), pattern + offset);
}

static void check_zero_samples(char *mem, size_t page_size)
{
	size_t offset;

	for (offset = 0; offset < page_size; offset = next_sample(offset, page_size))
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + offset)), 0);
}

static void kcore_check_samples(u64 phys, size_t page_size, u64 pattern)
{
	size_t offset;

	for (offset = 0; offset < page_size; offset = next_sample(offset, page_size))
		TEST_ASSERT_EQ(kcore_read_u64(phys + offset), pattern + offset);
}

static void __kcore_check_zeros(u64 phys, size_t page_size, size_t step)
{
	char buf[SZ_4K];
	size_t offset;

	for (offset = 0; offset < page_size; offset += step) {
		kcore_read(phys + offset, buf, sizeof(buf));
		TEST_ASSERT_MEMORY(buf, sizeof(buf), 0);
	}
}

/* 1G takes its time, so look at some of it, and where the samples are. */
static void kcore_check_zeros(u64 phys, size_t page_size)
{
	size_t offset;

	__kcore_check_zeros(phys, page_size, max_t(size_t, page_size / 4096, SZ_4K));
	for (offset = 0; offset < page_size; offset = next_sample(offset, page_size))
		TEST_ASSERT_EQ(kcore_read_u64(phys + offset), 0);
}

TEST_F_TIMEOUT(direct_map, capability, HUGETLB_TEST_TIMEOUT)
{
	const unsigned long types[] = { KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM };
	struct kvm_vm *vm;
	int i, fd, flags;

	for (i = 0; i < ARRAY_SIZE(types); i++) {
		if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(types[i])))
			continue;
		vm = vm_create_barebones_type(types[i]);
		flags = vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_FLAGS);
		TEST_ASSERT(flags & GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
			    "Not reported for VMs of type %lu", types[i]);
		/* Not every type has shared memory. */
		fd = vm_create_guest_memfd(vm, self->size,
					   self->flags & (flags | ~(u64)SHARED_MEMORY));
		kvm_close(fd);
		kvm_vm_free(vm);
	}
}

/* The hole is as large as what the file uses, and made of entries that were there. */
TEST_F_TIMEOUT(direct_map, hole, HUGETLB_TEST_TIMEOUT)
{
	struct direct_map_counters was, is;
	const size_t page_size = self->page_size;
	long entries, splits = 0, restored;
	u64 phys[NR_PAGES];
	int fd, i;

	was = direct_map_counters();
	entries = entries_written();
	fd = create();
	ASSERT_HOLE(0);
	kvm_fallocate(fd, ALLOCATE, 0, page_size);
	ASSERT_HOLE(1);
	phys[0] = find_hole(0);
	kvm_fallocate(fd, ALLOCATE, 0, self->size);
	ASSERT_HOLE(NR_PAGES);

	for (i = 0; i < NR_PAGES; i++) {
		struct direct_map_entry *old, *new;

		phys[i] = find_hole(i);
		TEST_ASSERT(!(phys[i] % page_size), "A hole at 0x%lx", (unsigned long)phys[i]);
		TEST_ASSERT_EQ(direct_map_present(now, phys[i], phys[i] + page_size), 0);
		kcore_check_zeros(phys[i], page_size);

		/* An entry of 1G can't be left alone for the sake of a page of 2M. */
		old = direct_map_lookup(before, phys[i]);
		new = direct_map_lookup(now, phys[i]);
		if (page_size == SZ_1G || (page_size == SZ_2M && strcmp(old->level, "pud")))
			TEST_ASSERT(!strcmp(old->level, new->level), "A %s became a %s",
				    old->level, new->level);
		else if (page_size == SZ_2M)
			TEST_ASSERT(!strcmp(new->level, "pmd"), "A %s became a %s",
				    old->level, new->level);
		splits += strcmp(old->level, new->level) &&
			  (!i || phys[0] / SZ_1G != phys[i] / SZ_1G);
	}

	is = direct_map_counters();
	if (page_size >= SZ_2M) {
		TEST_ASSERT_EQ(is.kib_4k, was.kib_4k);
		TEST_ASSERT_EQ(is.splits_2m, was.splits_2m);
		TEST_ASSERT_EQ(is.splits_1g, was.splits_1g + splits);
		TEST_ASSERT_EQ(is.kib_1g, was.kib_1g - splits * SZ_1M);
		TEST_ASSERT_EQ(is.kib_2m, was.kib_2m + splits * SZ_1M);
		if (entries >= 0)
			TEST_ASSERT_EQ(entries_written(), entries + NR_PAGES);
	} else {
		TEST_ASSERT(is.splits_2m <= was.splits_2m + NR_PAGES,
			    "%ld splits", is.splits_2m - was.splits_2m);
		TEST_ASSERT_EQ(is.kib_4k + is.kib_2m + is.kib_1g,
			       was.kib_4k + was.kib_2m + was.kib_1g);
		if (entries >= 0)
			TEST_ASSERT(entries_written() >= entries + NR_PAGES, "%ld entries",
				    entries_written() - entries);
	}

	/* A page at a time, in either order.  What is back reads as zeros. */
	kvm_fallocate(fd, PUNCH_HOLE, page_size, page_size);
	ASSERT_HOLE(1);
	kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
	ASSERT_HOLE(0);

	/* Nothing is split on the way back, and nothing is joined. */
	restored = direct_map_counters().splits_2m + direct_map_counters().splits_1g;
	TEST_ASSERT_EQ(restored, is.splits_2m + is.splits_1g);
	if (page_size >= SZ_2M) {
		if (entries >= 0)
			TEST_ASSERT_EQ(entries_written(), entries + 2 * NR_PAGES);
		for (i = 0; i < NR_PAGES; i++)
			kcore_check_zeros(phys[i], page_size);
	}
}

/*
 * What user space writes isn't readable through the direct map, and it would be
 * without the flag.
 */
TEST_F_TIMEOUT(direct_map, contents, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	u64 phys, pattern = random_pattern();
	size_t offset;
	char *mem;
	int fd;

	if (!is_shared)
		SKIP(return, "private memory can't be mapped");

	fd = create();
	mem = map(fd);
	ASSERT_HOLE(0);
	write_samples(mem, page_size, pattern);
	check_samples(mem, page_size, pattern);
	ASSERT_HOLE(1);
	phys = find_hole(0);
	/* Mappings of 1G are not in pagemap. */
	if (page_size < SZ_1G)
		TEST_ASSERT_EQ(mem_to_pfn(mem) * SZ_4K, phys);
	kcore_check_zeros(phys, page_size);
	if (is_hugetlb)
		TEST_ASSERT_EQ(kcore_find(page_size, page_size - 8,
					  pattern + page_size - 8), 0);
	check_samples(mem, page_size, pattern);

	/* There is something to be zeroed in each small page. */
	for (offset = 0; offset < page_size; offset += SZ_4K)
		WRITE_ONCE(*(u64 *)(mem + offset + offset / SZ_4K * 8 % SZ_4K), pattern);
	kvm_munmap(mem, self->size);
	ASSERT_HOLE(1);
	kvm_close(fd);
	ASSERT_HOLE(0);
	if (is_hugetlb)
		__kcore_check_zeros(phys, page_size, SZ_4K);

	fd = vm_create_guest_memfd(self->vm, self->size,
				   self->flags & ~GUEST_MEMFD_FLAG_NO_DIRECT_MAP);
	mem = map(fd);
	write_samples(mem, page_size, pattern);
	ASSERT_HOLE(0);
	if (is_hugetlb)
		phys = kcore_find(page_size, page_size - 8, pattern + page_size - 8);
	else
		phys = mem_to_pfn(mem) * SZ_4K;
	TEST_ASSERT(phys, "/proc/kcore doesn't show what is there");
	kcore_check_samples(phys, page_size, pattern);
}

/*
 * Whoever gets the huge page next has it in the direct map, i.e. what he writes is
 * readable there.  He zeroes it himself: what the page had in it when it came back
 * is for kcore_check_zeros() to see, before.
 */
static void check_next_owner(u64 phys, size_t page_size)
{
	u64 pattern = random_pattern();
	int nr_pages, i, fd;
	bool found = false;
	char *mem;

	nr_pages = hugetlb_pool_get(page_size, "free_hugepages") -
		   hugetlb_pool_get(page_size, "resv_hugepages");
	fd = hugetlbfs_create(nr_pages * page_size, page_size);
	mem = kvm_mmap(nr_pages * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (i = 0; i < nr_pages && !found; i++) {
		char *page = mem + i * page_size;

		WRITE_ONCE(*page, 1);
		found = mem_to_pfn(page) * SZ_4K == phys;
		if (!found)
			continue;
		write_samples(page, page_size, pattern);
		kcore_check_samples(phys, page_size, pattern);
	}
	TEST_ASSERT(found, "The page is not in the pool");
	kvm_munmap(mem, nr_pages * page_size);
	kvm_close(fd);
}

static int create_in_vm(struct kvm_vm *vm, size_t size, u64 flags)
{
	int fd = vm_create_guest_memfd(vm, size, flags);

	vm_set_user_memory_region2(vm, 1, KVM_MEM_GUEST_MEMFD, gpa, size, NULL, fd, 0);
	return fd;
}

/* Fill the file's first page, by user space if it can. */
static void populate(int fd, char *mem, size_t page_size, u64 pattern)
{
	if (mem)
		write_samples(mem, page_size, pattern);
	else
		kvm_fallocate(fd, ALLOCATE, 0, page_size);
}

static void wait_for(pid_t pid, int signal)
{
	int status;

	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	if (signal)
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == signal,
			    "The child ended with status 0x%x", status);
	else
		TEST_ASSERT(!status, "The child ended with status 0x%x", status);
}

/*
 * Each way of freeing memory brings it back, zeroed, before anybody else gets it.
 * Small pages may have been used again already, huge ones are in the pool.
 */
TEST_F_TIMEOUT(direct_map, free, HUGETLB_TEST_TIMEOUT)
{
	enum { PUNCH, CLOSE, UNMAP, VM_FIRST, EXIT, KILL, NR_WAYS };
	const size_t page_size = self->page_size;
	u64 phys, pattern = random_pattern();
	int fd, way, ready[2];
	char *mem;
	pid_t pid;

	kvm_vm_free(self->vm);

	for (way = 0; way < NR_WAYS; way++) {
		TEST_ASSERT(!pipe(ready), "pipe() failed");

		/* The file is the child's only: fork() copies neither it nor the VM. */
		pid = fork();
		if (!pid) {
			struct kvm_vm *vm = vm_create_barebones();

			fd = create_in_vm(vm, self->size, self->flags);
			mem = is_shared ? map(fd) : NULL;
			populate(fd, mem, page_size, pattern);
			ASSERT_HOLE(1);
			phys = find_hole(0);
			kcore_check_zeros(phys, page_size);
			TEST_ASSERT_EQ(write(ready[1], &phys, sizeof(phys)), sizeof(phys));

			if (way == KILL)
				pause();
			if (way == EXIT)
				exit(0);
			if (way == PUNCH) {
				kvm_fallocate(fd, PUNCH_HOLE, 0, self->size);
				ASSERT_HOLE(0);
				if (mem)
					check_zero_samples(mem, page_size);
				ASSERT_HOLE(mem ? 1 : 0);
				exit(0);
			}
			if (way == VM_FIRST) {
				kvm_vm_free(vm);
				ASSERT_HOLE(1);
			}
			if (way == UNMAP && mem) {
				kvm_close(fd);
				ASSERT_HOLE(1);
				kvm_munmap(mem, self->size);
			} else {
				if (mem)
					kvm_munmap(mem, self->size);
				ASSERT_HOLE(1);
				kvm_close(fd);
			}
			ASSERT_HOLE(0);
			exit(0);
		}

		kvm_close(ready[1]);
		TEST_ASSERT(read(ready[0], &phys, sizeof(phys)) == sizeof(phys),
			    "The child failed");
		kvm_close(ready[0]);
		if (way == KILL)
			kill(pid, SIGKILL);
		wait_for(pid, way == KILL ? SIGKILL : 0);

		ASSERT_HOLE(0);
		TEST_ASSERT_EQ(direct_map_present(now, phys, phys + page_size), page_size);
		if (!is_hugetlb) {
			TEST_ASSERT(kcore_read_u64(phys) != pattern, "Readable after freeing");
			continue;
		}
		kcore_check_zeros(phys, page_size);
		/* Who takes all pages of the pool, which takes long if they are large. */
		if (way == PUNCH || page_size < SZ_1G)
			check_next_owner(phys, page_size);
	}
}

/*
 * Without having been put back, freed pages kill whoever allocates and clears them,
 * and that's the kernel.  Use nearly all memory, in the way in which it was used
 * before, to get those pages for sure: the page allocator keeps what can be moved
 * apart from what can't.
 */
TEST_F_TIMEOUT(direct_map, memory_pressure, HUGETLB_TEST_TIMEOUT)
{
	const size_t size = SZ_64M, nr_pages = size / SZ_4K;
	size_t available, offset, i, reused = 0;
	u64 pattern = random_pattern();
	unsigned char *freed;
	char *mem, *area;
	u64 *entries;
	int fd, pfn_fd;

	if (!is_shared || is_hugetlb)
		SKIP(return, "the page allocator has small pages only");

	/* By pfn, which of them were the file's */
	freed = kvm_mmap(BIT_ULL(32), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	entries = malloc(nr_pages * sizeof(*entries));

	fd = vm_create_guest_memfd(self->vm, size, self->flags);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	fill_memory(mem, size, pattern);
	direct_map_read(now);
	TEST_ASSERT_EQ(before->present - now->present, size);

	pfn_fd = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	TEST_ASSERT_EQ(pread(pfn_fd, entries, nr_pages * 8, (u64)mem / SZ_4K * 8), nr_pages * 8);
	for (i = 0; i < nr_pages; i++)
		freed[entries[i] & (BIT_ULL(32) - 1)] = 1;

	kvm_munmap(mem, size);
	kvm_close(fd);
	direct_map_read(now);
	TEST_ASSERT_EQ(now->present, before->present);

	/* If it is too much after all, it shall not be others who die. */
	write_long("/proc/self/oom_score_adj", 1000);
	available = read_field("/proc/meminfo", "MemAvailable") * SZ_1K / 8 * 7;
	available = align_down(available, SZ_2M);
	fd = vm_create_guest_memfd(self->vm, available,
				   self->flags & ~GUEST_MEMFD_FLAG_NO_DIRECT_MAP);
	area = kvm_mmap(available, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (offset = 0; offset < available; offset += SZ_4K)
		WRITE_ONCE(*(u64 *)(area + offset), pattern + offset);
	for (offset = 0; offset < available; offset += size) {
		size_t n = min(nr_pages, (available - offset) / SZ_4K);

		TEST_ASSERT_EQ(pread(pfn_fd, entries, n * 8, (u64)(area + offset) / SZ_4K * 8),
			       n * 8);
		for (i = 0; i < n; i++) {
			u64 pfn = entries[i] & (BIT_ULL(55) - 1);

			if (!(entries[i] & BIT_ULL(63)) || !freed[pfn])
				continue;
			reused++;
			TEST_ASSERT_EQ(kcore_read_u64(pfn * SZ_4K),
				       pattern + offset + i * SZ_4K);
		}
	}
	ksft_print_msg("%zu of %zu freed pages were used again\n", reused, nr_pages);
	TEST_ASSERT(reused > nr_pages / 2, "Too few, nothing was tested");
}

/*
 * GUP would give the kernel an address in the direct map.  The first access is one
 * to a page that isn't mapped yet, i.e. slow GUP's, and the second one is fast.
 */
static int try_vmsplice(char *mem)
{
	struct iovec iov = { .iov_base = mem, .iov_len = SZ_4K };
	int pipefd[2], r;

	TEST_ASSERT(!pipe(pipefd), "pipe() failed");
	r = vmsplice(pipefd[1], &iov, 1, 0) < 0 ? errno : 0;
	kvm_close(pipefd[0]);
	kvm_close(pipefd[1]);
	return r;
}

static int try_process_vm_readv(char *mem)
{
	static char buf[64];
	struct iovec local = { .iov_base = buf, .iov_len = sizeof(buf) };
	struct iovec remote = { .iov_base = mem, .iov_len = sizeof(buf) };

	return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) < 0 ? errno : 0;
}

static int try_process_vm_writev(char *mem)
{
	static char buf[64];
	struct iovec local = { .iov_base = buf, .iov_len = sizeof(buf) };
	struct iovec remote = { .iov_base = mem + 64, .iov_len = sizeof(buf) };

	return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) < 0 ? errno : 0;
}

static int try_proc_mem(char *mem, bool write)
{
	int fd = open_path_or_exit("/proc/self/mem", O_RDWR);
	char buf[64] = {};
	int r;

	if (write)
		r = pwrite(fd, buf, sizeof(buf), (u64)mem + 64) < 0 ? errno : 0;
	else
		r = pread(fd, buf, sizeof(buf), (u64)mem) < 0 ? errno : 0;
	kvm_close(fd);
	return r;
}

static int try_proc_mem_read(char *mem)
{
	return try_proc_mem(mem, false);
}

static int try_proc_mem_write(char *mem)
{
	return try_proc_mem(mem, true);
}

static int try_ptrace(char *mem)
{
	pid_t pid = fork();
	int r, status;

	if (!pid) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status), "Not traced");
	errno = 0;
	ptrace(PTRACE_PEEKDATA, pid, mem, NULL);
	r = errno;
	errno = 0;
	if (r)
		ptrace(PTRACE_POKEDATA, pid, mem, NULL);
	TEST_ASSERT_EQ(errno, r);
	kill(pid, SIGKILL);
	wait_for(pid, SIGKILL);
	return r;
}

/* On a disk, which is left as it is */
static int try_direct_io(char *mem)
{
	int fd, r;

	fd = open("/dev/ram0", O_RDWR | O_DIRECT);
	if (fd < 0)
		return -1;
	r = pread(fd, mem, SZ_4K, 0) < 0 ? errno : 0;
	if (r)
		TEST_ASSERT(pwrite(fd, mem, SZ_4K, 0) < 0 && errno == r, "Written");
	kvm_close(fd);
	return r;
}

static int try_io_uring(char *mem)
{
	struct iovec iov = { .iov_base = mem, .iov_len = SZ_4K };
	struct io_uring_params params = {};
	int fd, r;

	fd = syscall(__NR_io_uring_setup, 1, &params);
	if (fd < 0)
		return -1;
	r = syscall(__NR_io_uring_register, fd, IORING_REGISTER_BUFFERS, &iov, 1) ? errno : 0;
	kvm_close(fd);
	return r;
}

static int try_populate_read(char *mem)
{
	return madvise(mem, SZ_4K, MADV_POPULATE_READ) ? errno : 0;
}

static int try_populate_write(char *mem)
{
	return madvise(mem, SZ_4K, MADV_POPULATE_WRITE) ? errno : 0;
}

static const struct {
	const char *name;
	int (*try)(char *mem);
	int error;
} gup_users[] = {
	{ "vmsplice", try_vmsplice, EFAULT },
	{ "process_vm_readv", try_process_vm_readv, EFAULT },
	{ "process_vm_writev", try_process_vm_writev, EFAULT },
	{ "read of /proc/self/mem", try_proc_mem_read, EIO },
	{ "write to /proc/self/mem", try_proc_mem_write, EIO },
	{ "ptrace", try_ptrace, EIO },
	{ "O_DIRECT", try_direct_io, EFAULT },
	{ "io_uring's fixed buffers", try_io_uring, EFAULT },
	{ "MADV_POPULATE_READ", try_populate_read, EINVAL },
	{ "MADV_POPULATE_WRITE", try_populate_write, EINVAL },
};

TEST_F_TIMEOUT(direct_map, gup, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size, middle = page_size / 2 / SZ_4K * SZ_4K;
	u64 pattern = random_pattern();
	char *mem, *ordinary;
	int fd, i, r;

	if (!is_shared)
		SKIP(return, "private memory can't be mapped");

	fd = create();
	mem = map(fd);
	/* To see that it's not for another reason that the calls fail */
	ordinary = kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);

	for (i = 0; i < ARRAY_SIZE(gup_users); i++) {
		r = gup_users[i].try(ordinary);
		if (r < 0) {
			ksft_print_msg("%s can't be tested here\n", gup_users[i].name);
			continue;
		}
		TEST_ASSERT(!r, "%s: errno %d for ordinary memory", gup_users[i].name, r);

		r = gup_users[i].try(mem + middle);
		TEST_ASSERT(r == gup_users[i].error, "%s, not mapped: wanted errno %d, got %d",
			    gup_users[i].name, gup_users[i].error, r);
		ASSERT_HOLE(i ? 1 : 0);

		write_samples(mem, page_size, pattern);
		READ_ONCE(mem[middle]);
		r = gup_users[i].try(mem + middle);
		TEST_ASSERT(r == gup_users[i].error, "%s, mapped: wanted errno %d, got %d",
			    gup_users[i].name, gup_users[i].error, r);
		check_samples(mem, page_size, pattern);
		kvm_madvise(mem, self->size, MADV_DONTNEED);
		ASSERT_HOLE(1);
	}

	/* Populates what it locks. */
	TEST_ASSERT(!mlock(ordinary, SZ_4K), "mlock(): errno %d for ordinary memory", errno);
	r = mlock(mem, self->size) ? errno : 0;
	TEST_ASSERT(r == ENOMEM, "mlock(): wanted ENOMEM, got errno %d", r);
	ASSERT_HOLE(1);
}

/* Copying by the kernel goes by the user's address, and thus works. */
TEST_F_TIMEOUT(direct_map, plain_access, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	u64 pattern = random_pattern();
	char *mem;
	int fd, file;

	if (!is_shared)
		SKIP(return, "private memory can't be mapped");

	fd = create();
	mem = map(fd);
	file = memfd_create("file", 0);

	TEST_ASSERT_EQ(pwrite(file, &pattern, sizeof(pattern), 0), sizeof(pattern));
	TEST_ASSERT_EQ(pread(file, mem + page_size - 8, 8, 0), 8);
	ASSERT_HOLE(1);
	TEST_ASSERT_EQ(*(u64 *)(mem + page_size - 8), pattern);
	write_samples(mem, page_size, ~pattern);
	TEST_ASSERT_EQ(pwrite(file, mem, SZ_4K, 0), SZ_4K);
	TEST_ASSERT_EQ(pread(file, &pattern, sizeof(pattern), 0), sizeof(pattern));
	TEST_ASSERT_EQ(*(u64 *)mem, pattern);
	kcore_check_zeros(find_hole(0), page_size);
	ASSERT_HOLE(1);
}

static void guest_code(u64 *mem, u64 size, u64 pattern)
{
	size_t offset;

	for (offset = 0; offset < size; offset = next_sample(offset, size))
		mem[offset / 8] = ~(pattern + offset);
	GUEST_SYNC(1);
	for (offset = 0; offset < size; offset = next_sample(offset, size))
		GUEST_ASSERT_EQ(mem[offset / 8], ~(pattern + offset));
	GUEST_DONE();
}

/* The guest's writes are as invisible, and it maps pages as large as the file's. */
TEST_F_TIMEOUT(direct_map, guest, HUGETLB_TEST_TIMEOUT)
{
	struct vm_shape shape = VM_SHAPE_DEFAULT;
	const size_t page_size = self->page_size;
	u64 phys, pattern = random_pattern();
	struct kvm_vcpu *vcpu;
	char *mem = NULL;
	size_t offset;
	struct ucall uc;
	void *hva;
	int fd;

	if (!is_shared) {
		shape.type = KVM_X86_SW_PROTECTED_VM;
		if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(shape.type)))
			SKIP(return, "no KVM_X86_SW_PROTECTED_VM");
	}
	kvm_vm_free(self->vm);
	self->vm = vm_create_shape_with_one_vcpu(shape, &vcpu, guest_code);
	fd = create();
	hva = kvm_mmap(self->size + page_size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	vm_set_user_memory_region2(self->vm, 1, KVM_MEM_GUEST_MEMFD, gpa, self->size,
				   is_shared ? NULL : align_ptr_up(hva, page_size), fd, 0);
	if (is_shared)
		mem = map(fd);
	else
		vm_mem_set_private(self->vm, gpa, self->size);
	virt_map_level(self->vm, gpa, gpa, self->size,
		       is_hugetlb ? PG_LEVEL_2M : PG_LEVEL_4K);
	vcpu_args_set(vcpu, 3, gpa, page_size, pattern);

	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	ASSERT_HOLE(1);
	phys = find_hole(0);
	kcore_check_zeros(phys, page_size);
	if (page_size == SZ_2M)
		TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 1);
	if (page_size == SZ_1G)
		TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_1g), 1);
	if (mem)
		for (offset = 0; offset < page_size; offset = next_sample(offset, page_size))
			TEST_ASSERT_EQ(*(u64 *)(mem + offset), ~(pattern + offset));
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_DONE);

	kvm_vm_free(self->vm);
	ASSERT_HOLE(1);
	kcore_check_zeros(phys, page_size);

	/* What the guest wrote isn't there once the hole is closed. */
	if (mem)
		kvm_munmap(mem, self->size);
	kvm_close(fd);
	ASSERT_HOLE(0);
	if (is_hugetlb)
		kcore_check_zeros(phys, page_size);
}

static bool is_dumped(const void *mem)
{
	bool found = false, dumped = true;
	char line[512];
	FILE *file;

	file = fopen("/proc/self/smaps", "r");
	TEST_ASSERT(file, "Can't open /proc/self/smaps");
	while (fgets(line, sizeof(line), file)) {
		unsigned long begin, end;

		if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
			found = begin == (unsigned long)mem;
		else if (found && !strncmp(line, "VmFlags:", 8))
			dumped = !strstr(line, " dd");
	}
	fclose(file);
	return dumped;
}

/* A core dump has what is next to the mapping, but not what is in it. */
TEST_F_TIMEOUT(direct_map, coredump, HUGETLB_TEST_TIMEOUT)
{
	char dir[] = "/tmp/guest_memfd.XXXXXX", core[64];
	u64 pattern = random_pattern();
	char *mem, *ordinary;
	int fd, i;

	if (!is_shared)
		SKIP(return, "private memory can't be mapped");
	if (access(CORE_PATTERN, W_OK))
		SKIP(return, "no " CORE_PATTERN ", see CONFIG_COREDUMP");

	fd = vm_create_guest_memfd(self->vm, self->size,
				   self->flags & ~GUEST_MEMFD_FLAG_NO_DIRECT_MAP);
	mem = map(fd);
	TEST_ASSERT(is_hugetlb || is_dumped(mem), "In no core dump even with the direct map");
	kvm_munmap(mem, self->size);
	kvm_close(fd);

	fd = create();
	mem = map(fd);
	TEST_ASSERT(!is_dumped(mem), "VmFlags of smaps lack dd");
	ordinary = kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	fill_memory(mem, SZ_4K, pattern);
	fill_memory(ordinary, SZ_4K, ~pattern);

	TEST_ASSERT(mkdtemp(dir), "mkdtemp() failed");
	snprintf(core, sizeof(core), "%s/core", dir);

	for (i = 0; i < 2; i++) {
		dump_core(core);
		TEST_ASSERT(file_has_page(core, ~pattern), "The core dump lacks ordinary memory");
		TEST_ASSERT(!file_has_page(core, pattern), "The core dump has the file's memory");
		unlink(core);

		/* Nor can it be asked for. */
		TEST_ASSERT(madvise(mem, self->size, MADV_DODUMP) == -1 && errno == EINVAL,
			    "MADV_DODUMP: wanted EINVAL, errno %d", errno);
	}
	rmdir(dir);
	TEST_ASSERT_MEMORY(mem, SZ_4K, pattern);
}

/* An image of memory on disk would have what the direct map is not allowed to. */
TEST_F_TIMEOUT(direct_map, hibernation, HUGETLB_TEST_TIMEOUT)
{
	char state[128] = {};
	int fd, file, i;

	fd = open("/sys/power/disk", O_RDONLY);
	if (fd < 0)
		SKIP(return, "no CONFIG_HIBERNATION");
	if (is_hugetlb && !is_shared)
		SKIP(return, "the same for all files");

	for (i = 0; i < 3; i++) {
		if (i == 1)
			file = create();
		if (i == 2)
			kvm_close(file);
		TEST_ASSERT(pread(fd, state, sizeof(state) - 1, 0) > 0, "Can't read");
		if (!i && !strncmp(state, "[disabled]", 10))
			SKIP(return, "hibernation is disabled anyway");
		TEST_ASSERT_EQ(!strncmp(state, "[disabled]", 10), i == 1);
	}
}

/*
 * What memory out of the direct map costs.  CPUs tell each other by function call
 * interrupts to flush the TLB.  That goes to all of them, each time.  Others are rare
 * and mostly for one CPU: the fewest that any CPU has had in any round are flushes.
 */
struct cost {
	long ms;
	long entries;
	long splits;
	long calls;
	long punch_calls;
};

#define NO_COST		((struct cost) { .calls = LONG_MAX, .punch_calls = LONG_MAX })

#define MAX_CPUS	64

/* Flushes the TLBs of other CPUs without an interrupt */
#define X86_FEATURE_INVLPGB	KVM_X86_CPU_FEATURE(0x80000008, 0, EBX, 3)

static void read_function_calls(long calls[MAX_CPUS], int nr_cpus)
{
	char line[4096] = {}, *next;
	FILE *file;
	int i;

	file = fopen("/proc/interrupts", "r");
	TEST_ASSERT(file, "Can't open /proc/interrupts");
	while (fgets(line, sizeof(line), file))
		if (!strncmp(line + strspn(line, " "), "CAL:", 4))
			break;
	fclose(file);

	next = strchr(line, ':');
	TEST_ASSERT(next, "/proc/interrupts has no function calls");
	next++;
	for (i = 0; i < nr_cpus; i++)
		calls[i] = strtol(next, &next, 10);
}

/* Those of the CPU that got the fewest since then, but for the first CPU */
static long function_calls_since(const long before[MAX_CPUS], int nr_cpus)
{
	long calls[MAX_CPUS], fewest = LONG_MAX;
	int i;

	read_function_calls(calls, nr_cpus);
	for (i = 1; i < nr_cpus; i++)
		fewest = min(fewest, calls[i] - before[i]);
	return fewest;
}

static void measure_allocation(struct cost *cost, int fd, size_t size, int nr_cpus)
{
	struct direct_map_counters was = direct_map_counters(), is;
	long calls[MAX_CPUS], entries = entries_written();
	struct timespec start, elapsed;

	read_function_calls(calls, nr_cpus);
	clock_gettime(CLOCK_MONOTONIC, &start);
	kvm_fallocate(fd, ALLOCATE, 0, size);
	elapsed = timespec_elapsed(start);
	cost->calls = min(cost->calls, function_calls_since(calls, nr_cpus));
	cost->entries += entries_written() - entries;
	is = direct_map_counters();
	cost->splits += is.splits_2m + is.splits_1g - was.splits_2m - was.splits_1g;
	cost->ms += elapsed.tv_sec * 1000 + elapsed.tv_nsec / 1000000;

	read_function_calls(calls, nr_cpus);
	kvm_fallocate(fd, PUNCH_HOLE, 0, size);
	cost->punch_calls = min(cost->punch_calls, function_calls_since(calls, nr_cpus));
}

TEST_F_TIMEOUT(direct_map, cost, HUGETLB_TEST_TIMEOUT)
{
	const int nr_cpus = min_t(int, sysconf(_SC_NPROCESSORS_ONLN), MAX_CPUS);
	struct cost with = NO_COST, without = NO_COST, warm_up = NO_COST;
	int fd, i, nr_rounds = 1;
	size_t size = SZ_32M;
	long nr_pages, others;
	cpu_set_t cpus;

	if (is_shared)
		SKIP(return, "the same as for private memory");
	if (this_cpu_has(X86_FEATURE_INVLPGB))
		SKIP(return, "TLB flushes may go without interrupts");
	if (nr_cpus < 4)
		SKIP(return, "too few CPUs to tell TLB flushes from other interrupts");
	if (is_hugetlb) {
		nr_pages = self->pool.free - self->pool.reserved;
		size = max_t(size_t, min_t(size_t, nr_pages * self->page_size, SZ_128M),
			     self->page_size);
		nr_rounds = self->page_size > SZ_2M ? 4 : 10;
	}
	nr_pages = size / self->page_size;

	CPU_ZERO(&cpus);
	CPU_SET(0, &cpus);
	kvm_sched_setaffinity(0, sizeof(cpus), &cpus);

	/* The first time may be special, e.g. for a hypervisor below this one. */
	fd = vm_create_guest_memfd(self->vm, size,
				   self->flags & ~GUEST_MEMFD_FLAG_NO_DIRECT_MAP);
	measure_allocation(&warm_up, fd, size, nr_cpus);
	for (i = 0; i < nr_rounds; i++)
		measure_allocation(&without, fd, size, nr_cpus);
	kvm_close(fd);
	fd = vm_create_guest_memfd(self->vm, size, self->flags);
	for (i = 0; i < nr_rounds; i++)
		measure_allocation(&with, fd, size, nr_cpus);
	kvm_close(fd);

	ksft_print_msg("%zu kB pages, %d times %zu MiB\n", self->page_size / SZ_1K,
		       nr_rounds, size / SZ_1M);
	ksft_print_msg("with the flag %ld entries, %ld splits, %ld + %ld calls a time, %ld ms\n",
		       with.entries, with.splits, with.calls, with.punch_calls, with.ms);
	ksft_print_msg("without it %ld entries, %ld splits, %ld + %ld calls a time, %ld ms\n",
		       without.entries, without.splits, without.calls, without.punch_calls,
		       without.ms);

	/* One entry and one flush for a page of any size, give or take others. */
	if (entries_written() >= 0) {
		TEST_ASSERT_EQ(without.entries, 0);
		TEST_ASSERT_EQ(with.entries, nr_pages * nr_rounds);
	}
	others = nr_pages / 32;
	TEST_ASSERT(with.calls >= nr_pages &&
		    with.calls <= nr_pages + with.splits + others,
		    "%ld TLB flushes for %ld pages", with.calls, nr_pages);
	TEST_ASSERT(with.punch_calls <= others, "%ld TLB flushes to put back %ld pages",
		    with.punch_calls, nr_pages);
}

/* Poison stays, so that these come last. */
FIXTURE(direct_map_poison) {
	struct kvm_vm *vm;
	size_t page_size;
	size_t size;
	u64 flags;
};

FIXTURE_VARIANT(direct_map_poison) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(direct_map_poison, shared_4K) {
	.page_size = SZ_4K,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map_poison, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(direct_map_poison, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

FIXTURE_SETUP(direct_map_poison)
{
	const char *missing = direct_map_missing();

	self->page_size = variant->page_size;
	if (!missing && is_hugetlb)
		missing = hugetlb_missing(self->page_size, NR_PAGES);
	if (!missing && access(CORRUPT_PFN, W_OK))
		missing = "no " CORRUPT_PFN ", see CONFIG_HWPOISON_INJECT";
	if (missing)
		SKIP(return, "%s", missing);

	self->size = NR_PAGES * self->page_size;
	self->flags = GUEST_MEMFD_FLAG_NO_DIRECT_MAP | variant->flags;
	if (is_hugetlb)
		self->flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(self->page_size);
	self->vm = vm_create_barebones();
	direct_map_read(before);
}

FIXTURE_TEARDOWN(direct_map_poison)
{
}

/*
 * What is poisoned stays out of the direct map, and the rest comes back: memory of a
 * huge page that has the error somewhere else, too.
 */
TEST_F_TIMEOUT(direct_map_poison, inject, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	u64 phys, pattern = random_pattern();
	char *mem;
	int fd;

	fd = create();
	mem = map(fd);
	write_samples(mem, page_size, pattern);
	ASSERT_HOLE(1);
	phys = find_hole(0);
	write_samples(mem + page_size, page_size, pattern);
	ASSERT_HOLE(2);

	/* It goes by GUP. */
	TEST_ASSERT(madvise(mem, page_size, MADV_HWPOISON) == -1 && errno == EFAULT,
		    "MADV_HWPOISON: wanted EFAULT, got errno %d", errno);
	check_samples(mem, page_size, pattern);

	TEST_ASSERT(!write_long(CORRUPT_PFN, phys / SZ_4K), "Can't poison 0x%lx, errno %d",
		    (unsigned long)phys, errno);
	TEST_EXPECT_SIGBUS(READ_ONCE(*mem));
	TEST_EXPECT_SIGBUS(WRITE_ONCE(mem[page_size - 1], 1));
	check_samples(mem + page_size, page_size, pattern);
	TEST_ASSERT_EQ(kcore_read_u64(phys), 0);
	ASSERT_HOLE(2);

	kvm_munmap(mem, self->size);
	kvm_close(fd);
	kvm_vm_free(self->vm);
	direct_map_read(now);
	TEST_ASSERT_EQ((long)(before->present - now->present), SZ_4K);
	TEST_ASSERT_EQ(direct_map_present(now, phys, phys + SZ_4K), 0);

	/* Whoever gets the page after this uses the direct map. */
	TEST_ASSERT(!write_long(UNPOISON_PFN, phys / SZ_4K), "Can't unpoison 0x%lx, errno %d",
		    (unsigned long)phys, errno);
	direct_map_read(now);
	TEST_ASSERT_EQ(now->present, before->present);
}

/*
 * Several errors, some of them side by side, and at either end of the page.  They must
 * not be in the direct map for a moment, i.e. the page isn't put back as a whole.
 */
TEST_F_TIMEOUT(direct_map_poison, several, HUGETLB_TEST_TIMEOUT)
{
	const size_t page_size = self->page_size;
	const size_t errors[] = { 0, SZ_4K, page_size / 2 + SZ_4K, page_size - SZ_4K };
	const char *whole = page_size == SZ_1G ? "1G pages preserved" : "2M pages preserved";
	u64 phys, pattern = random_pattern();
	long written;
	char *mem;
	int fd, i;

	if (!is_hugetlb)
		SKIP(return, "not about huge pages");

	fd = create();
	mem = map(fd);
	write_samples(mem, page_size, pattern);
	direct_map_read(now);
	phys = find_hole(0);
	for (i = 0; i < ARRAY_SIZE(errors); i++)
		TEST_ASSERT(!write_long(CORRUPT_PFN, (phys + errors[i]) / SZ_4K) ||
			    (i && errno == EHWPOISON),
			    "Can't poison 0x%lx, errno %d", (long)(phys + errors[i]), errno);

	written = read_field(CPA_STATS, whole);
	kvm_fallocate(fd, PUNCH_HOLE, 0, page_size);
	TEST_ASSERT_EQ(read_field(CPA_STATS, whole), written);

	kvm_munmap(mem, self->size);
	kvm_close(fd);
	kvm_vm_free(self->vm);
	direct_map_read(now);
	TEST_ASSERT_EQ((long)(before->present - now->present), ARRAY_SIZE(errors) * SZ_4K);
	for (i = 0; i < ARRAY_SIZE(errors); i++)
		TEST_ASSERT_EQ(direct_map_present(now, phys + errors[i],
						  phys + errors[i] + SZ_4K), 0);

	TEST_ASSERT(!write_long(UNPOISON_PFN, phys / SZ_4K), "Can't unpoison 0x%lx, errno %d",
		    (unsigned long)phys, errno);
	direct_map_read(now);
	TEST_ASSERT_EQ(now->present, before->present);
}

int main(int argc, char **argv)
{
	before = malloc(sizeof(*before));
	now = malloc(sizeof(*now));
	TEST_ASSERT(before && now, "No memory");

	return test_harness_run(argc, argv);
}
