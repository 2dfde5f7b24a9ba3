// SPDX-License-Identifier: GPL-2.0
/*
 * What guest_memfd costs, next to the memory that a VM would have instead
 *
 * Each backing goes through the same life: it becomes a memslot, the vCPUs write
 * to every 4K page of it, twice, it is punched out, user space populates it, and
 * it goes away.  Nothing is judged: there are only times, counts and ratios.
 */
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define MAX_VCPUS	16
#define SLOT		1
#define GPA		((u64)SZ_4G)

enum measure {
	CREATE, TOUCH, AGAIN, PUNCH, POPULATE, TEARDOWN, NR_TIMES,
	FAULTS = NR_TIMES, FIXED, LEAVES_4K, LEAVES_2M, LEAVES_1G, STAGE2_TABLES,
	USER_TABLES, POPULATED_TABLES, VMEMMAP, SPLITS, ENTRIES, CALLS, NR_MEASURES,
};

static const char * const headings[NR_MEASURES] = {
	"create", "touch", "again", "punch", "populate", "teardown",
	"faults", "fixed", "4K", "2M", "1G", "stage-2", "user", "populated",
	"vmemmap", "splits", "entries", "calls",
};

static struct backing {
	const char *name;
	/* The backing that it is made to take the place of */
	const char *instead_of;
	enum { ANONYMOUS, HUGETLBFS, GUEST_MEMFD } type;
	size_t page_size;
	u64 flags;
	bool wanted;
	bool measured;
	u64 value[NR_MEASURES];
} backings[] = {
	{ "anonymous-4K", NULL, ANONYMOUS, SZ_4K, MADV_NOHUGEPAGE },
	{ "anonymous-THP", NULL, ANONYMOUS, SZ_4K, MADV_HUGEPAGE },
	{ "hugetlbfs-2M", NULL, HUGETLBFS, SZ_2M },
	{ "hugetlbfs-1G", NULL, HUGETLBFS, SZ_1G },
	{ "guest_memfd-4K", "anonymous-4K", GUEST_MEMFD, SZ_4K },
	{ "guest_memfd-2M", "hugetlbfs-2M", GUEST_MEMFD, SZ_2M, GUEST_MEMFD_FLAG_HUGETLB },
	{ "guest_memfd-1G", "hugetlbfs-1G", GUEST_MEMFD, SZ_1G, GUEST_MEMFD_FLAG_HUGETLB },
	/* An entry of the direct map that was split stays so: large pages first. */
	{ "no-direct-map-1G", "guest_memfd-1G", GUEST_MEMFD, SZ_1G,
	  GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_FLAG_NO_DIRECT_MAP },
	{ "no-direct-map-2M", "guest_memfd-2M", GUEST_MEMFD, SZ_2M,
	  GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_FLAG_NO_DIRECT_MAP },
	{ "no-direct-map-4K", "guest_memfd-4K", GUEST_MEMFD, SZ_4K,
	  GUEST_MEMFD_FLAG_NO_DIRECT_MAP },
};

static size_t size = SZ_1G;
static u32 nr_vcpus = 1;

/* The sum of the numbers that follow @name in its line, or lines, of a file */
static u64 read_count(const char *path, const char *name)
{
	size_t capacity = 0;
	char *line = NULL;
	char *number, *end;
	u64 sum = 0;
	FILE *file;

	file = fopen(path, "r");
	if (!file)
		return 0;

	while (getline(&line, &capacity, file) > 0) {
		number = strstr(line, name);
		if (!number)
			continue;
		number += strlen(name);
		for (;; number = end) {
			u64 value = strtoull(number, &end, 10);

			if (end == number)
				break;
			sum += value;
		}
	}
	free(line);
	fclose(file);
	return sum;
}

/* In pages; CPUs keep small differences to themselves until they are asked. */
static u64 read_stage2_tables(void)
{
	read_count("/proc/sys/vm/stat_refresh", "");
	return read_count("/proc/meminfo", "SecPageTables:") * SZ_1K / getpagesize();
}

static u64 read_user_tables(void)
{
	return read_count("/proc/self/status", "VmPTE:") * SZ_1K / getpagesize();
}

static u64 read_vmemmap(void)
{
	return read_count("/proc/vmstat", "nr_memmap_pages ") +
	       read_count("/proc/vmstat", "nr_memmap_boot_pages ");
}

static void add_direct_map_counts(struct backing *backing, int sign)
{
	const char *cpa_stats = "/sys/kernel/debug/x86/cpa_stats";

	backing->value[SPLITS] += sign *
		(read_count("/proc/vmstat", "direct_map_level2_splits ") +
		 read_count("/proc/vmstat", "direct_map_level3_splits "));
	backing->value[ENTRIES] += sign * (read_count(cpa_stats, "preserved:") +
					   read_count(cpa_stats, "set-checked:"));
	backing->value[CALLS] += sign * read_count("/proc/interrupts", "CAL:");
}

static void add_stage2_counts(struct backing *backing, struct kvm_vm *vm,
			      struct kvm_vcpu **vcpus, int sign)
{
	u32 i;

	for (i = 0; i < nr_vcpus; i++) {
		backing->value[FAULTS] += sign * vcpu_get_stat(vcpus[i], pf_taken);
		backing->value[FIXED] += sign * vcpu_get_stat(vcpus[i], pf_fixed);
	}
	backing->value[LEAVES_4K] += sign * vm_get_stat(vm, pages_4k);
	backing->value[LEAVES_2M] += sign * vm_get_stat(vm, pages_2m);
	backing->value[LEAVES_1G] += sign * vm_get_stat(vm, pages_1g);
	backing->value[STAGE2_TABLES] += sign * read_stage2_tables();
	backing->value[USER_TABLES] += sign * read_user_tables();
}

static void guest_code(u64 nr_bytes)
{
	u64 gva;

	for (;;) {
		GUEST_SYNC(0);
		for (gva = GPA; gva < GPA + nr_bytes; gva += SZ_4K)
			WRITE_ONCE(*(u64 *)gva, gva);
	}
}

static void *run_vcpu(void *vcpu)
{
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, NULL), UCALL_SYNC);
	return NULL;
}

static void run_vcpus(struct kvm_vcpu **vcpus)
{
	pthread_t threads[MAX_VCPUS];
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		kvm_pthread_create(&threads[i], NULL, run_vcpu, vcpus[i]);
	for (i = 0; i < nr_vcpus; i++)
		kvm_pthread_join(threads[i], NULL);
}

static void *create(struct backing *backing, struct kvm_vm *vm, int *fd)
{
	u64 flags = SHARED_MEMORY | backing->flags;
	void *mem;

	if (backing->type == ANONYMOUS) {
		*fd = -1;
		mem = kvm_mmap(size, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);
		kvm_madvise(mem, size, backing->flags);
	} else {
		if (flags & GUEST_MEMFD_FLAG_HUGETLB)
			flags |= hugetlb_size_flag(backing->page_size);
		*fd = backing->type == HUGETLBFS ?
		      hugetlbfs_create(size, backing->page_size) :
		      vm_create_guest_memfd(vm, size, flags);
		mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd);
	}

	if (backing->type == GUEST_MEMFD)
		vm_set_user_memory_region2(vm, SLOT, KVM_MEM_GUEST_MEMFD, GPA, size,
					   mem, *fd, 0);
	else
		vm_set_user_memory_region(vm, SLOT, 0, GPA, size, mem);
	return mem;
}

static void punch(struct backing *backing, void *mem, int fd)
{
	if (backing->type == ANONYMOUS)
		kvm_madvise(mem, size, MADV_DONTNEED);
	else
		kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, size);
}

static void populate(void *mem)
{
	void *page;

	for (page = mem; page < mem + size; page += SZ_4K)
		WRITE_ONCE(*(u64 *)page, 1);
}

static void teardown(struct backing *backing, struct kvm_vm *vm, void *mem, int fd)
{
	if (backing->type == GUEST_MEMFD)
		vm_set_user_memory_region2(vm, SLOT, KVM_MEM_GUEST_MEMFD, GPA, 0,
					   mem, fd, 0);
	else
		vm_set_user_memory_region(vm, SLOT, 0, GPA, 0, mem);
	kvm_munmap(mem, size);
	if (fd >= 0)
		kvm_close(fd);
}

#define measure_time(_backing, _measure, _statement)				\
do {										\
	struct timespec start;							\
										\
	clock_gettime(CLOCK_MONOTONIC, &start);					\
	_statement;								\
	(_backing)->value[_measure] = timespec_to_ns(timespec_elapsed(start));	\
} while (0)

static void measure(struct backing *backing)
{
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	struct kvm_vm *vm;
	u64 user_tables;
	void *mem;
	u32 i;
	int fd;

	vm = vm_create_with_vcpus(nr_vcpus, guest_code, vcpus);
	virt_map_level(vm, GPA, GPA, round_up(size, SZ_1G), PG_LEVEL_1G);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_args_set(vcpus[i], 1, size);
	/* So that the guest's own pages are no part of what is counted */
	run_vcpus(vcpus);

	add_direct_map_counts(backing, -1);
	user_tables = read_user_tables();
	measure_time(backing, CREATE, mem = create(backing, vm, &fd));
	add_stage2_counts(backing, vm, vcpus, -1);
	measure_time(backing, TOUCH, run_vcpus(vcpus));
	add_stage2_counts(backing, vm, vcpus, 1);
	measure_time(backing, AGAIN, run_vcpus(vcpus));
	measure_time(backing, PUNCH, punch(backing, mem, fd));
	measure_time(backing, POPULATE, populate(mem));
	backing->value[POPULATED_TABLES] = read_user_tables() - user_tables;
	measure_time(backing, TEARDOWN, teardown(backing, vm, mem, fd));
	add_direct_map_counts(backing, 1);

	kvm_vm_free(vm);
}

/* Best times, and the counts of the first time, when the direct map was whole */
static void measure_once_more(struct backing *backing)
{
	size_t page_size = backing->page_size;
	struct backing run = *backing;
	struct hugetlb_pool pool = {};
	u64 stage2_tables;
	long missing = 0;
	int i;

	memset(run.value, 0, sizeof(run.value));
	if (page_size > SZ_4K) {
		u64 vmemmap = read_vmemmap();

		pool = hugetlb_pool_read(page_size);
		missing = size / page_size - (pool.free - pool.reserved);
		if (missing > 0)
			hugetlb_pool_set(page_size, "nr_hugepages", pool.total + missing);
		run.value[VMEMMAP] = vmemmap - read_vmemmap();
		if (hugetlb_pool_get(page_size, "free_hugepages") - pool.reserved <
		    (long)(size / page_size)) {
			ksft_print_msg("%s: not enough huge pages\n", run.name);
			goto out;
		}
	}

	stage2_tables = read_stage2_tables();
	measure(&run);
	for (i = 0; i < NR_MEASURES; i++) {
		if (!backing->measured ||
		    (i < NR_TIMES && run.value[i] < backing->value[i]))
			backing->value[i] = run.value[i];
	}
	backing->measured = true;

	/* The VM's page tables go after an RCU grace period. */
	for (i = 0; i < 1000 && read_stage2_tables() > stage2_tables; i++)
		usleep(10000);
out:
	if (missing > 0)
		hugetlb_pool_set(page_size, "nr_hugepages", pool.total);
}

static struct backing *find_backing(const char *name)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(backings); i++) {
		if (name && !strcmp(backings[i].name, name))
			return &backings[i];
	}
	return NULL;
}

static void print_headings(const char *title, int first, int end)
{
	printf("\n%-17s", title);
	for (; first < end; first++)
		printf(" %9s", headings[first]);
	printf("\n");
}

static void print_table(const char *title, int first, int end)
{
	int i, m;

	print_headings(title, first, end);
	for (i = 0; i < ARRAY_SIZE(backings); i++) {
		if (!backings[i].measured)
			continue;
		printf("%-17s", backings[i].name);
		for (m = first; m < end; m++) {
			if (m < NR_TIMES)
				printf(" %9.3f", backings[i].value[m] / 1e6);
			else
				printf(" %9ld", (long)backings[i].value[m]);
		}
		printf("\n");
	}
}

/* The times of each backing, relative to another one, or to what it replaces */
static void print_ratios(const char *title, const char *base_name)
{
	const struct backing *base;
	int i, m;

	print_headings(title, 0, NR_TIMES);
	for (i = 0; i < ARRAY_SIZE(backings); i++) {
		base = find_backing(base_name ?: backings[i].instead_of);
		if (!backings[i].measured || !base || !base->measured)
			continue;
		printf("%-17s", backings[i].name);
		for (m = 0; m < NR_TIMES; m++)
			printf(" %9.4f", (double)backings[i].value[m] / base->value[m]);
		if (!base_name)
			printf("  to %s", base->name);
		printf("\n");
	}
}

static void help(const char *program, int status)
{
	int i;

	printf("Usage: %s [-s SIZE] [-v VCPUS] [-n REPETITIONS] [BACKING]...\n\n"
	       "Default: 1G, 1 vCPU, once, all of:", program);
	for (i = 0; i < ARRAY_SIZE(backings); i++)
		printf(" %s", backings[i].name);
	printf("\n");
	exit(status);
}

int main(int argc, char *argv[])
{
	u64 flags = kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS);
	struct backing *backing;
	u32 repetitions = 1;
	int option, i;

	while ((option = getopt(argc, argv, "s:v:n:h")) != -1) {
		switch (option) {
		case 's':
			size = parse_size(optarg);
			break;
		case 'v':
			nr_vcpus = atoi_positive("Number of vCPUs", optarg);
			break;
		case 'n':
			repetitions = atoi_positive("Repetitions", optarg);
			break;
		case 'h':
			help(argv[0], KSFT_SKIP);
			break;
		default:
			help(argv[0], KSFT_FAIL);
		}
	}
	if (!size || size % SZ_4K || nr_vcpus > MAX_VCPUS)
		help(argv[0], KSFT_FAIL);

	for (i = optind; i < argc; i++) {
		backing = find_backing(argv[i]);
		if (!backing)
			help(argv[0], KSFT_FAIL);
		backing->wanted = true;
	}

	while (repetitions--) {
		for (backing = backings; backing < backings + ARRAY_SIZE(backings); backing++) {
			if ((optind < argc && !backing->wanted) || size % backing->page_size)
				continue;
			if (backing->type == GUEST_MEMFD &&
			    (backing->flags | SHARED_MEMORY) & ~flags)
				continue;
			ksft_print_msg("%s\n", backing->name);
			measure_once_more(backing);
		}
	}

	print_table("milliseconds", 0, NR_TIMES);
	print_ratios("to guest_memfd-4K", "guest_memfd-4K");
	print_ratios("to what it is for", NULL);
	print_table("counts", FAULTS, VMEMMAP);
	print_table("more counts", VMEMMAP, NR_MEASURES);
	return 0;
}
