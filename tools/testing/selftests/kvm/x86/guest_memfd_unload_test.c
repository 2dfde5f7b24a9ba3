// SPDX-License-Identifier: GPL-2.0
/*
 * Unload KVM while the inode of a guest_memfd is being evicted
 *
 * A file holds a reference to the vendor module, but drops it before its inode,
 * and the more pages there are to free, the longer the inode takes to follow.
 * Nothing but the file is left of the VM here.  The inode may also outlive the file
 * for as long as somebody likes.  Don't expect to survive a failure.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "guest_memfd_hugetlb.h"
#include "guest_memfd_lifecycle.h"
#include "kselftest.h"
#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "test_util.h"

#define MAX_SIZE	(3ull * SZ_512M)
#define PATTERN		0xa5a5a5a5a5a5a5a5ul

/* Eviction takes about as long as filling: that's minutes in a slow debug kernel. */
#define FILL_SECONDS	5
#define UNLOAD_TIMEOUT	60

/* How often a file is closed step by step, and how long each break is */
#define NR_SLICED	20
#define BREAK_MS	20

struct unload_test {
	const char *name;
	size_t page_size;
	bool pinned;
	bool path;
};

static const struct unload_test tests[] = {
	{ .name = "4K pages", .page_size = SZ_4K },
	{ .name = "4K pages, one is pinned", .page_size = SZ_4K, .pinned = true },
	{ .name = "4K pages, an O_PATH file is left", .page_size = SZ_4K, .path = true },
	{ .name = "2M pages", .page_size = SZ_2M },
	{ .name = "2M pages, one is pinned", .page_size = SZ_2M, .pinned = true },
	{ .name = "2M pages, an O_PATH file is left", .page_size = SZ_2M, .path = true },
	{ .name = "1G pages", .page_size = SZ_1G },
	{ .name = "1G pages, one is pinned", .page_size = SZ_1G, .pinned = true },
	{ .name = "1G pages, an O_PATH file is left", .page_size = SZ_1G, .path = true },
};

static atomic_bool unloading;

static bool is_loaded(const char *module)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "/sys/module/%s", module);
	return !access(path, F_OK);
}

/* Returns how often it took, the caller knows what a module should wait for. */
static long unload(const char *module)
{
	time_t deadline = time(NULL) + UNLOAD_TIMEOUT;
	long tries = 1;

	for (; module_unload(module); tries++) {
		TEST_ASSERT(errno == EWOULDBLOCK || errno == EBUSY,
			    "Unloading %s: errno %d", module, errno);
		TEST_ASSERT(time(NULL) < deadline, "%s is still in use", module);
		atomic_store(&unloading, true);
	}
	return tries;
}

static void *unload_thread(void *vendor)
{
	long vendor_tries, kvm_tries;

	vendor_tries = unload(vendor);
	kvm_tries = unload("kvm");
	ksft_print_msg("%s went at attempt %ld, kvm at attempt %ld\n",
		       (char *)vendor, vendor_tries, kvm_tries);
	return NULL;
}

static size_t file_size(size_t page_size)
{
	struct hugetlb_pool pool;
	size_t size;

	if (page_size == SZ_4K) {
		size = sysconf(_SC_AVPHYS_PAGES) * SZ_4K / 2;
	} else {
		pool = hugetlb_pool_read(page_size);
		size = (pool.free - pool.reserved) * page_size;
	}
	return align_down(min_t(size_t, size, MAX_SIZE), page_size);
}

static void fill(int fd, size_t size, size_t page_size)
{
	size_t offset, step = max_t(size_t, page_size, SZ_2M);
	struct timespec start;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (offset = 0; offset < size; offset += step) {
		if (timespec_elapsed(start).tv_sec >= FILL_SECONDS)
			break;
		kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, min(step, size - offset));
	}
	ksft_print_msg("Filled %zu of %zu MiB\n", min(offset, size) / SZ_1M, size / SZ_1M);
}

static void check_pinned(int pipe_fds[2], struct gmem_counters unloaded, size_t page_size)
{
	struct gmem_counters want = unloaded;
	u64 buffer[SZ_4K / sizeof(u64)];

	gmem_counters_add_pages(&want, page_size, 1);
	gmem_counters_wait(&want);
	TEST_ASSERT_EQ(read(pipe_fds[0], buffer, SZ_4K), SZ_4K);
	TEST_ASSERT_EQ(buffer[0], PATTERN);
	gmem_counters_wait(&unloaded);
	kvm_close(pipe_fds[0]);
	kvm_close(pipe_fds[1]);
}

static void expect_unloaded(struct gmem_counters *counters)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(gmem_counter_paths); i++) {
		const char *path = gmem_counter_paths[i];

		if (!strncmp(path, "/sys/module/", 12) || !strncmp(path, "/sys/kernel/slab/", 17))
			counters->value[i] = -1;
	}
}

/* Nothing is in flight: what the inode holds on to, it holds for good. */
static void run_path_test(const struct unload_test *test, const char *vendor)
{
	u64 flags = PRIVATE_MEMORY, size = test->page_size;
	struct gmem_counters counters, want;
	char path[64], refcnt[64];
	struct kvm_vm *vm;
	int fd, path_fd;

	counters = gmem_counters_read();
	want = counters;
	gmem_counters_add_pages(&want, size, 1);
	gmem_counter_add(&want, GMEM_INODE_CACHE "/objects", 1);
	snprintf(refcnt, sizeof(refcnt), "/sys/module/%s/refcnt", vendor);
	gmem_counter_add(&want, refcnt, 1);
	if (size > SZ_4K) {
		flags = GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(size);
		gmem_counter_add(&want, size == SZ_2M ? "hugetlb.2MB.rsvd.current" :
							"hugetlb.1GB.rsvd.current", size);
	}

	vm = vm_create_barebones();
	fd = vm_create_guest_memfd(vm, size, flags);
	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size);
	gmem_drain_batches();

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	path_fd = open_path_or_exit(path, O_PATH);
	kvm_vm_free(vm);
	kvm_close(fd);
	gmem_counters_wait(&want);

	TEST_ASSERT(module_unload(vendor), "%s is gone, but an inode isn't", vendor);
	TEST_ASSERT(errno == EWOULDBLOCK, "Unloading %s: errno %d", vendor, errno);
	gmem_counters_wait(&want);

	kvm_close(path_fd);
	gmem_counters_wait(&counters);

	TEST_ASSERT(!module_unload(vendor), "Unloading %s: errno %d", vendor, errno);
	TEST_ASSERT(!module_unload("kvm"), "Unloading kvm: errno %d", errno);
	expect_unloaded(&counters);
	gmem_counters_wait(&counters);

	module_load(vendor);
	ksft_test_result_pass("%s\n", test->name);
}

static void run_test(const struct unload_test *test, const char *vendor)
{
	u64 flags = test->pinned ? SHARED_MEMORY : PRIVATE_MEMORY;
	long tainted = read_long("/proc/sys/kernel/tainted");
	size_t size = file_size(test->page_size);
	struct gmem_counters counters, unloaded;
	struct kvm_vm *vm;
	pthread_t thread;
	int pipe_fds[2];
	void *mem;
	int fd;

	if (test->page_size > SZ_4K)
		flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(test->page_size);

	counters = gmem_counters_read();
	unloaded = counters;
	expect_unloaded(&unloaded);

	vm = vm_create_barebones();
	fd = vm_create_guest_memfd(vm, size, flags);
	kvm_vm_free(vm);
	fill(fd, size, test->page_size);
	gmem_drain_batches();

	if (test->pinned) {
		mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		WRITE_ONCE(*(u64 *)mem, PATTERN);
		TEST_ASSERT(!pipe(pipe_fds), "pipe() failed");
		TEST_ASSERT_EQ(pin_by_vmsplice(pipe_fds, mem, SZ_4K), SZ_4K);
		kvm_munmap(mem, size);
	}

	atomic_store(&unloading, false);
	kvm_pthread_create(&thread, NULL, unload_thread, (void *)vendor);
	while (!atomic_load(&unloading))
		sched_yield();
	kvm_close(fd);
	kvm_pthread_join(thread, NULL);
	TEST_ASSERT(!is_loaded(vendor) && !is_loaded("kvm"), "KVM is still there");

	if (test->pinned)
		check_pinned(pipe_fds, unloaded, test->page_size);
	else
		gmem_counters_wait(&unloaded);

	module_load(vendor);
	gmem_counters_wait(&counters);

	vm = vm_create_barebones();
	fd = vm_create_guest_memfd(vm, size, flags);
	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, max_t(size_t, test->page_size, SZ_2M));
	kvm_vm_free(vm);
	kvm_close(fd);
	gmem_counters_wait(&counters);

	TEST_ASSERT_EQ(read_long("/proc/sys/kernel/tainted"), tainted);
	ksft_test_result_pass("%s\n", test->name);
}

static void *break_thread(void *data)
{
	const struct sched_param param = { .sched_priority = 1 };
	struct timespec begin, moment = { .tv_nsec = 1 };
	atomic_bool *stop = data;

	TEST_ASSERT(!sched_setscheduler(0, SCHED_FIFO, &param), "No SCHED_FIFO, errno %d", errno);
	while (!atomic_load(stop)) {
		clock_gettime(CLOCK_MONOTONIC, &begin);
		while (timespec_to_ns(timespec_elapsed(begin)) < BREAK_MS * 1000000l)
			;
		nanosleep(&moment, NULL);
	}
	return NULL;
}

/*
 * The one who closes the file gets no more of its CPU than an instant at a time.  When
 * its inode has let go of the module, the superblock's own may still be there, until the
 * mount is dropped.  Modules go in such a break, in one out of a few files.
 */
static void run_sliced_test(const char *vendor)
{
	long tainted = read_long("/proc/sys/kernel/tainted");
	struct gmem_counters counters, unloaded;
	pthread_t unloader, breaker;
	cpu_set_t old, cpus;
	atomic_bool stop;
	struct kvm_vm *vm;
	int i, fd, cpu;

	TEST_ASSERT(!sched_getaffinity(0, sizeof(old), &old), "sched_getaffinity() failed");
	if (CPU_COUNT(&old) < 2) {
		ksft_test_result_skip("closed step by step: there is one CPU\n");
		return;
	}
	for (cpu = 0; !CPU_ISSET(cpu, &old); cpu++)
		;
	counters = gmem_counters_read();
	unloaded = counters;
	expect_unloaded(&unloaded);

	for (i = 0; i < NR_SLICED; i++) {
		vm = vm_create_barebones();
		fd = vm_create_guest_memfd(vm, SZ_4K, PRIVATE_MEMORY);
		kvm_vm_free(vm);

		cpus = old;
		CPU_CLR(cpu, &cpus);
		sched_setaffinity(0, sizeof(cpus), &cpus);
		atomic_store(&unloading, false);
		kvm_pthread_create(&unloader, NULL, unload_thread, (void *)vendor);
		while (!atomic_load(&unloading))
			sched_yield();

		CPU_ZERO(&cpus);
		CPU_SET(cpu, &cpus);
		sched_setaffinity(0, sizeof(cpus), &cpus);
		atomic_store(&stop, false);
		kvm_pthread_create(&breaker, NULL, break_thread, &stop);
		kvm_close(fd);
		atomic_store(&stop, true);
		kvm_pthread_join(breaker, NULL);
		sched_setaffinity(0, sizeof(old), &old);
		kvm_pthread_join(unloader, NULL);

		gmem_counters_wait(&unloaded);
		TEST_ASSERT_EQ(read_long("/proc/sys/kernel/tainted"), tainted);
		module_load(vendor);
		gmem_counters_wait(&counters);
	}
	ksft_test_result_pass("closed step by step\n");
}

/*
 * A superblock's functions are in the module of its type, and it outlives the mount
 * if anybody else has a reference to that.
 */
static void run_superblock_test(void)
{
	TEST_ASSERT_EQ(read_long("/sys/module/kvm/refcnt"), 2);
	ksft_test_result_pass("the vendor module and the superblock hold KVM\n");
}

static const char *why_skip(const struct unload_test *test)
{
	if (test->page_size > SZ_4K)
		return hugetlb_missing(test->page_size, 1);
	if (test->pinned &&
	    (kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & SHARED_MEMORY) != SHARED_MEMORY)
		return "guest_memfd can't be mapped";
	return NULL;
}

int main(int argc, char **argv)
{
	const char *vendor = vendor_module();
	int i;

	ksft_print_header();

	if (!vendor || access("/sys/module/kvm/refcnt", F_OK))
		ksft_exit_skip("KVM isn't modular, or not loaded\n");
	if (!kvm_has_cap(KVM_CAP_GUEST_MEMFD))
		ksft_exit_skip("no KVM_CAP_GUEST_MEMFD\n");

	ksft_set_plan(ARRAY_SIZE(tests) + 2);
	gmem_cgroup_enter();
	for (i = 0; i < ARRAY_SIZE(tests); i++) {
		const char *reason = why_skip(&tests[i]);

		if (reason)
			ksft_test_result_skip("%s: %s\n", tests[i].name, reason);
		else if (tests[i].path)
			run_path_test(&tests[i], vendor);
		else
			run_test(&tests[i], vendor);
	}
	run_superblock_test();
	run_sliced_test(vendor);
	gmem_cgroup_leave();
	ksft_finished();
}
