// SPDX-License-Identifier: GPL-2.0
/*
 * guest_memfd with HugeTLB pages: once the file is there, its pages are to be had,
 * whoever else holds on to those that were removed from it, and whatever the
 * scheduler does.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <linux/stddef.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "guest_memfd_lifecycle.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PAGE		SZ_2M
#define PATTERN		0xa5a5a5a5a5a5a5a5ul
#define NR_THREADS	4

/* How long a fault waits before it looks for another page, see mm/hugetlb_loan.c */
#define PATIENCE	1000000

FIXTURE(reservation) {
	struct kvm_vm *vm;
	struct hugetlb_pool pool;
	/* What another file has reserved */
	long rest;
	int rest_fd;
	size_t size;
	char *mem;
	int fd;
};

#define context	_test_data_reservation

FIXTURE_SETUP(reservation)
{
	const char *missing = hugetlb_missing(PAGE, NR_THREADS + 2);

	if (missing)
		SKIP(return, "%s", missing);

	self->pool = hugetlb_pool_read(PAGE);
	self->vm = vm_create_barebones();
	self->rest_fd = -1;
}

FIXTURE_TEARDOWN_PARENT(reservation)
{
	TEST_ASSERT_POOL_EVENTUALLY(PAGE, self->pool, 0, 0);
}

static int create_file(struct context *self, long nr_pages)
{
	return vm_create_guest_memfd(self->vm, nr_pages * PAGE, GUEST_MEMFD_FLAG_HUGETLB |
				     SHARED_MEMORY | hugetlb_size_flag(PAGE));
}

/* Make a file, and leave this many pages of the pool to anybody else. */
static void create(struct context *self, long nr_pages, long nr_spare)
{
	self->size = nr_pages * PAGE;
	self->fd = create_file(self, nr_pages);
	self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	self->rest = self->pool.free - self->pool.reserved - nr_pages - nr_spare;
	if (self->rest)
		self->rest_fd = create_file(self, self->rest);
}

/* What is allocated and reserved, apart from the pages that are kept from the pool. */
#define ASSERT_POOL(_nr_allocated, _nr_reserved)				\
	TEST_ASSERT_POOL(PAGE, self->pool, _nr_allocated, (_nr_reserved) + self->rest)

#define ASSERT_POOL_EVENTUALLY(_nr_allocated, _nr_reserved)			\
	TEST_ASSERT_POOL_EVENTUALLY(PAGE, self->pool, _nr_allocated,		\
				    (_nr_reserved) + self->rest)

#define expect_error(_call, _errno)						\
do {										\
	long __errno = (_errno), __r = (long)(_call);				\
										\
	TEST_ASSERT(__r == -1 && errno == __errno,				\
		    "%s: wanted errno %ld, got 0x%lx, errno %d", #_call,	\
		    __errno, __r, errno);					\
} while (0)

static u64 now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ul + now.tv_nsec / 1000;
}

/* Pages that a pipe refers to, until it is read.  They aren't pinned for DMA. */
struct stray {
	int pipe_fds[2];
};

static void stray_get(struct stray *stray, char *mem)
{
	WRITE_ONCE(*(u64 *)mem, PATTERN);
	TEST_ASSERT(!pipe(stray->pipe_fds), "pipe() failed");
	TEST_ASSERT_EQ(pin_by_vmsplice(stray->pipe_fds, mem, sizeof(u64)), sizeof(u64));
}

static void stray_put(struct stray *stray)
{
	u64 value;

	TEST_ASSERT_EQ(read(stray->pipe_fds[0], &value, sizeof(value)), sizeof(value));
	TEST_ASSERT_EQ(value, PATTERN);
	kvm_close(stray->pipe_fds[0]);
	kvm_close(stray->pipe_fds[1]);
}

/* A thread that touches memory */
struct access {
	pthread_t thread;
	char *mem;
	bool done;
};

static void *access_thread(void *data)
{
	struct access *access = data;

	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)access->mem), 0);
	WRITE_ONCE(access->done, true);
	return NULL;
}

static void access_start(struct access *access, char *mem)
{
	access->mem = mem;
	access->done = false;
	kvm_pthread_create(&access->thread, NULL, access_thread, access);
}

/* Threads that are meant to be in each other's way */
struct race {
	struct context *self;
	bool stop;
	unsigned int next_thread;
	int fd;
	long nr_pages;
	int may_fail_with;
};

/*
 * The CPU is taken from those who have just got hold of a page, or are about to give
 * it back, and for longer than anybody should have to guess.
 */
struct preemptor {
	struct race *race;
	pthread_t thread;
	int cpu;
	u64 run_us;
	u64 sleep_us;
};

/* Returns the @nr-th CPU that this process may use. */
static int get_cpu(int nr)
{
	static cpu_set_t allowed;
	int cpu;

	if (!CPU_COUNT(&allowed))
		TEST_ASSERT(!sched_getaffinity(0, sizeof(allowed), &allowed),
			    "sched_getaffinity() failed");
	nr %= CPU_COUNT(&allowed);
	for (cpu = 0; ; cpu++) {
		if (CPU_ISSET(cpu, &allowed) && !nr--)
			return cpu;
	}
}

static void run_on_cpu(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	TEST_ASSERT(!sched_setaffinity(0, sizeof(cpus), &cpus), "Can't run on CPU %d", cpu);
}

static bool set_fifo(void)
{
	const struct sched_param param = { .sched_priority = 1 };

	return !sched_setscheduler(0, SCHED_FIFO, &param);
}

static bool can_set_fifo(void)
{
	const struct sched_param other = {};

	return set_fifo() && !sched_setscheduler(0, SCHED_OTHER, &other);
}

static void *preemptor_thread(void *data)
{
	struct preemptor *preemptor = data;
	struct kvm_random_state random = new_kvm_random_state(preemptor->cpu);

	run_on_cpu(preemptor->cpu);
	TEST_ASSERT(set_fifo(), "Can't be SCHED_FIFO, errno %d", errno);

	while (!READ_ONCE(preemptor->race->stop)) {
		u64 end = now_us() + kvm_random_u64_in_range(&random, 0, preemptor->run_us);

		while (now_us() < end && !READ_ONCE(preemptor->race->stop))
			;
		usleep(kvm_random_u64_in_range(&random, 1, preemptor->sleep_us));
	}
	return NULL;
}

static void preemptor_start(struct preemptor *preemptor, struct race *race, int cpu_nr,
			    u64 run_us, u64 sleep_us)
{
	*preemptor = (struct preemptor) {
		.race = race,
		.cpu = get_cpu(cpu_nr),
		.run_us = run_us,
		.sleep_us = sleep_us,
	};
	kvm_pthread_create(&preemptor->thread, NULL, preemptor_thread, preemptor);
}

/* Holds references for as long as it takes to fault in a page, or to find it. */
static void *holder_thread(void *data)
{
	struct race *race = data;
	struct context *self = race->self;
	u32 id = __sync_fetch_and_add(&race->next_thread, 1);

	run_on_cpu(get_cpu(0));
	while (!READ_ONCE(race->stop)) {
		if (id & 1) {
			kvm_fallocate(self->fd, ALLOCATE, 0, PAGE);
		} else {
			WRITE_ONCE(*(u64 *)self->mem, 1);
			madvise(self->mem, PAGE, MADV_DONTNEED);
		}
	}
	return NULL;
}

/* The file is one page.  Punch it and touch it. */
static void punch_and_touch(struct context *self, int nr_rounds)
{
	struct race race = {
		.self = self,
	};
	struct preemptor preemptor;
	pthread_t threads[NR_THREADS];
	u64 start, longest = 0;
	int i;

	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_create(&threads[i], NULL, holder_thread, &race);
	preemptor_start(&preemptor, &race, 0, 300000, 3000);
	run_on_cpu(get_cpu(1));

	for (i = 0; i < nr_rounds; i++) {
		kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
		start = now_us();
		READ_ONCE(*(u64 *)self->mem);
		longest = max(longest, now_us() - start);
	}
	pr_info("# The longest access took %lu ms\n", (unsigned long)longest / 1000);

	WRITE_ONCE(race.stop, true);
	kvm_pthread_join(preemptor.thread, NULL);
	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_join(threads[i], NULL);
}

TEST_F_TIMEOUT(reservation, transient, HUGETLB_TEST_TIMEOUT)
{
	if (!can_set_fifo())
		SKIP(return, "no SCHED_FIFO, errno %d", errno);

	create(self, 1, 0);
	punch_and_touch(self, 200);
	READ_ONCE(*(u64 *)self->mem);
	ASSERT_POOL(1, 0);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	ASSERT_POOL(0, 1);
}

/* With a page to spare, none is kept. */
TEST_F_TIMEOUT(reservation, transient_with_spare, HUGETLB_TEST_TIMEOUT)
{
	if (!can_set_fifo())
		SKIP(return, "no SCHED_FIFO, errno %d", errno);

	create(self, 1, 1);
	punch_and_touch(self, 200);
	READ_ONCE(*(u64 *)self->mem);
	ASSERT_POOL(1, 0);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	ASSERT_POOL(0, 1);
}

/* A page that is pinned gets one replacement, which isn't needed any more afterwards. */
TEST_F_TIMEOUT(reservation, pinned, HUGETLB_TEST_TIMEOUT)
{
	struct access accesses[NR_THREADS];
	int ring, i, round;

	create(self, 1, NR_THREADS);

	for (round = 0; round < 3; round++) {
		WRITE_ONCE(*(u64 *)self->mem, PATTERN);
		ring = pin_by_io_uring(self->mem, SZ_4K);
		if (ring < 0)
			SKIP(return, "no io_uring, errno %d", errno);

		kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
		ASSERT_POOL(1, 0);
		for (i = 0; i < NR_THREADS; i++)
			access_start(&accesses[i], self->mem);
		for (i = 0; i < NR_THREADS; i++)
			kvm_pthread_join(accesses[i].thread, NULL);
		ASSERT_POOL(2, 0);

		kvm_close(ring);
		ASSERT_POOL_EVENTUALLY(1, 0);
	}
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	ASSERT_POOL(0, 1);
}

#define TRACE_REPLACE	"/sys/kernel/tracing/events/hugetlb_loan/hugetlb_loan_replace/enable"

/* How many pages of a file have replaced others since this was turned on */
static int count_replaced(int fd)
{
	char line[512], key[64];
	struct stat st;
	FILE *file;
	int nr = 0;

	TEST_ASSERT(!fstat(fd, &st), "fstat(): errno %d", errno);
	snprintf(key, sizeof(key), " hugetlb_loan_replace: ino %lu offset 0x0 pages 512 ",
		 (unsigned long)st.st_ino);
	file = fopen("/sys/kernel/tracing/trace", "r");
	TEST_ASSERT(file, "Can't open the trace");
	while (fgets(line, sizeof(line), file))
		nr += !!strstr(line, key);
	fclose(file);
	return nr;
}

/* Nor is it if it's the replacement that goes first, or is never used. */
TEST_F_TIMEOUT(reservation, pinned_and_punched_again, HUGETLB_TEST_TIMEOUT)
{
	const bool traced = !write_long(TRACE_REPLACE, 1);
	int ring;

	create(self, 1, 1);
	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	ring = pin_by_io_uring(self->mem, SZ_4K);
	if (ring < 0)
		SKIP(return, "no io_uring, errno %d", errno);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);
	ASSERT_POOL(2, 0);
	if (traced) {
		TEST_ASSERT_EQ(count_replaced(self->fd), 1);
		write_long(TRACE_REPLACE, 0);
	}
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	ASSERT_POOL(1, 1);
	kvm_close(ring);
	ASSERT_POOL_EVENTUALLY(0, 1);
}

/* It's freed if it was a surplus page. */
TEST_F_TIMEOUT(reservation, pinned_surplus, HUGETLB_TEST_TIMEOUT)
{
	long overcommit = hugetlb_pool_get(PAGE, "nr_overcommit_hugepages");
	struct hugetlb_pool pool;
	int ring;

	create(self, 1, 0);
	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	ring = pin_by_io_uring(self->mem, SZ_4K);
	if (ring < 0)
		SKIP(return, "no io_uring, errno %d", errno);

	TEST_ASSERT(!hugetlb_pool_set(PAGE, "nr_overcommit_hugepages", 1),
		    "Can't set nr_overcommit_hugepages");
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);
	pool = hugetlb_pool_read(PAGE);
	TEST_ASSERT_EQ(pool.surplus, self->pool.surplus + 1);
	TEST_ASSERT_EQ(pool.total, self->pool.total + 1);

	/* Which of them is freed is a matter of their nodes. */
	kvm_close(ring);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	kvm_munmap(self->mem, self->size);
	kvm_close(self->fd);
	TEST_ASSERT_POOL_EVENTUALLY(PAGE, self->pool, 0, self->rest);
	TEST_ASSERT(!hugetlb_pool_set(PAGE, "nr_overcommit_hugepages", overcommit),
		    "Can't set nr_overcommit_hugepages");
}

/* There is no other page, and this one isn't coming back. */
TEST_F_TIMEOUT(reservation, pinned_without_spare, HUGETLB_TEST_TIMEOUT)
{
	u64 start;
	int ring;

	create(self, 1, 0);
	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	ring = pin_by_io_uring(self->mem, SZ_4K);
	if (ring < 0)
		SKIP(return, "no io_uring, errno %d", errno);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	start = now_us();
	TEST_EXPECT_SIGBUS(READ_ONCE(*self->mem));
	pr_info("# SIGBUS took %lu ms\n", (unsigned long)(now_us() - start) / 1000);
	start = now_us();
	expect_error(fallocate(self->fd, ALLOCATE, 0, PAGE), ENOMEM);
	pr_info("# ENOMEM took %lu ms\n", (unsigned long)(now_us() - start) / 1000);
	ASSERT_POOL(1, 0);

	/* It's not too late when another file gives some up. */
	kvm_close(self->rest_fd);
	self->rest = 0;
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);
	ASSERT_POOL(2, 0);
	kvm_close(ring);
	ASSERT_POOL_EVENTUALLY(1, 0);
}

/* One page is pinned, but another one may well come back. */
TEST_F_TIMEOUT(reservation, pinned_and_transient, HUGETLB_TEST_TIMEOUT)
{
	struct access access;
	struct stray stray;
	int ring;

	create(self, 2, 0);
	WRITE_ONCE(*(u64 *)self->mem, PATTERN);
	ring = pin_by_io_uring(self->mem, SZ_4K);
	if (ring < 0)
		SKIP(return, "no io_uring, errno %d", errno);
	stray_get(&stray, self->mem + PAGE);

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, 2 * PAGE);
	access_start(&access, self->mem);
	usleep(2 * PATIENCE);
	TEST_ASSERT(!READ_ONCE(access.done), "Where does the page come from?");
	stray_put(&stray);
	kvm_pthread_join(access.thread, NULL);
	ASSERT_POOL(2, 0);

	TEST_EXPECT_SIGBUS(READ_ONCE(*(self->mem + PAGE)));
	kvm_close(ring);
	ASSERT_POOL_EVENTUALLY(1, 1);
}

/* Nobody can tell how long it takes, but as it isn't pinned, it comes back. */
TEST_F_TIMEOUT(reservation, unpinned, HUGETLB_TEST_TIMEOUT)
{
	struct access access;
	struct stray stray;

	create(self, 1, 0);
	stray_get(&stray, self->mem);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	access_start(&access, self->mem);
	usleep(3 * PATIENCE);
	TEST_ASSERT(!READ_ONCE(access.done), "Where does the page come from?");
	ASSERT_POOL(1, 0);

	stray_put(&stray);
	kvm_pthread_join(access.thread, NULL);
	ASSERT_POOL(1, 0);
}

/* If it takes too long, a spare page is taken meanwhile. */
TEST_F_TIMEOUT(reservation, unpinned_with_spare, HUGETLB_TEST_TIMEOUT)
{
	struct stray stray;
	u64 start;

	create(self, 1, 1);
	stray_get(&stray, self->mem);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);
	start = now_us();
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);
	TEST_ASSERT(now_us() - start >= PATIENCE / 2, "It took %lu us only",
		    (unsigned long)(now_us() - start));
	ASSERT_POOL(2, 0);

	stray_put(&stray);
	ASSERT_POOL_EVENTUALLY(1, 0);
}

/* Several threads wait for one page, and several pages are waited for. */
TEST_F_TIMEOUT(reservation, many_waiters, HUGETLB_TEST_TIMEOUT)
{
	struct access accesses[2 * NR_THREADS];
	struct stray strays[NR_THREADS];
	int round, i;

	create(self, NR_THREADS, 0);

	for (round = 0; round < 10; round++) {
		for (i = 0; i < NR_THREADS; i++)
			stray_get(&strays[i], self->mem + i * PAGE);
		kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
		for (i = 0; i < ARRAY_SIZE(accesses); i++)
			access_start(&accesses[i], self->mem + i % NR_THREADS * PAGE);
		for (i = 0; i < NR_THREADS; i++) {
			if (round & 1)
				usleep(50000);
			stray_put(&strays[i]);
		}
		for (i = 0; i < ARRAY_SIZE(accesses); i++)
			kvm_pthread_join(accesses[i].thread, NULL);
		ASSERT_POOL(NR_THREADS, 0);
	}
}

TEST_F_TIMEOUT(reservation, killed, HUGETLB_TEST_TIMEOUT)
{
	struct stray stray;
	int status, i;
	pid_t pid;

	create(self, 1, 0);
	stray_get(&stray, self->mem);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, PAGE);

	for (i = 0; i < 2; i++) {
		pid = fork();
		TEST_ASSERT(pid >= 0, "fork() failed");
		if (!pid) {
			if (i)
				fallocate(self->fd, ALLOCATE, 0, PAGE);
			else
				READ_ONCE(*self->mem);
			_exit(0);
		}
		usleep(PATIENCE / 2);
		TEST_ASSERT_EQ(waitpid(pid, &status, WNOHANG), 0);
		TEST_ASSERT(!kill(pid, SIGKILL), "kill() failed");
		TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
			    "Wanted SIGKILL, got status 0x%x", status);
	}
	ASSERT_POOL(1, 0);
	stray_put(&stray);
	ASSERT_POOL_EVENTUALLY(0, 1);
}

/* Allocates pages of a file and gives them back. */
static void *churn_thread(void *data)
{
	struct race *race = data;
	u32 id = __sync_fetch_and_add(&race->next_thread, 1);
	struct kvm_random_state random = new_kvm_random_state(id);

	while (!READ_ONCE(race->stop)) {
		u64 page = kvm_random_u64_in_range(&random, 0, race->nr_pages - 1);

		TEST_ASSERT(!fallocate(race->fd, ALLOCATE, page * PAGE, PAGE) ||
			    (race->may_fail_with && errno == race->may_fail_with),
			    "fallocate() failed, errno %d", errno);
		page = kvm_random_u64_in_range(&random, 0, race->nr_pages - 1);
		kvm_fallocate(race->fd, PUNCH_HOLE, page * PAGE, PAGE);
	}
	return NULL;
}

static void *watch_thread(void *data)
{
	struct race *race = data;

	while (!READ_ONCE(race->stop)) {
		long reserved = hugetlb_pool_get(PAGE, "resv_hugepages");

		TEST_ASSERT(reserved >= 0 && reserved <= race->self->pool.total,
			    "%lu pages are reserved", reserved);
	}
	return NULL;
}

/*
 * While some allocate and free the pages of a file, another one has reserved the last
 * page of the pool, and is sure to get it.
 */
static void reserve_and_touch(struct context *self, int fd, int may_fail_with)
{
	struct race race = {
		.self = self,
		.fd = fd,
		.nr_pages = NR_THREADS,
		.may_fail_with = may_fail_with,
	};
	pthread_t threads[NR_THREADS], watch;
	struct preemptor preemptors[2];
	bool fifo = can_set_fifo();
	void *mem;
	int i;

	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_create(&threads[i], NULL, churn_thread, &race);
	kvm_pthread_create(&watch, NULL, watch_thread, &race);
	for (i = 0; fifo && i < ARRAY_SIZE(preemptors); i++)
		preemptor_start(&preemptors[i], &race, i, 3000, 1000);

	for (i = 0; i < 200; i++) {
		mem = __kvm_mmap(PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
				 21 << MAP_HUGE_SHIFT, -1, 0);
		TEST_ASSERT(mem != MAP_FAILED, "No page in round %d, errno %d", i, errno);
		/* SIGBUS if it isn't there. */
		WRITE_ONCE(*(u64 *)mem, PATTERN);
		kvm_munmap(mem, PAGE);
	}

	WRITE_ONCE(race.stop, true);
	for (i = 0; fifo && i < ARRAY_SIZE(preemptors); i++)
		kvm_pthread_join(preemptors[i].thread, NULL);
	for (i = 0; i < NR_THREADS; i++)
		kvm_pthread_join(threads[i], NULL);
	kvm_pthread_join(watch, NULL);
}

TEST_F_TIMEOUT(reservation, of_others, HUGETLB_TEST_TIMEOUT)
{
	create(self, NR_THREADS, 1);
	reserve_and_touch(self, self->fd, 0);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
	ASSERT_POOL(0, NR_THREADS);
}

/* It's not about guest_memfd only. */
TEST_F_TIMEOUT(reservation, of_others_hugetlbfs, HUGETLB_TEST_TIMEOUT)
{
	char dir[] = "/tmp/guest_memfd_reservation_test.XXXXXX", path[64], options[64];
	int fd;

	self->rest = self->pool.free - self->pool.reserved - NR_THREADS - 1;
	if (self->rest)
		self->rest_fd = create_file(self, self->rest);

	TEST_ASSERT(mkdtemp(dir), "mkdtemp() failed");
	snprintf(options, sizeof(options), "pagesize=2M,min_size=%d", NR_THREADS * PAGE);
	if (mount("hugetlbfs", dir, "hugetlbfs", 0, options)) {
		rmdir(dir);
		SKIP(return, "can't mount hugetlbfs, errno %d", errno);
	}
	snprintf(path, sizeof(path), "%s/file", dir);
	fd = open(path, O_RDWR | O_CREAT, 0600);
	TEST_ASSERT(fd >= 0, "Can't create %s", path);
	unlink(path);
	kvm_ftruncate(fd, NR_THREADS * PAGE);
	ASSERT_POOL(0, NR_THREADS);

	/* If a page takes time to come back, that's nobody's promise here. */
	reserve_and_touch(self, fd, ENOSPC);
	kvm_fallocate(fd, PUNCH_HOLE, 0, NR_THREADS * PAGE);
	ASSERT_POOL_EVENTUALLY(0, NR_THREADS);

	kvm_close(fd);
	TEST_ASSERT(!umount(dir), "Can't unmount %s, errno %d", dir, errno);
	rmdir(dir);
}

/* What a page that can't be had costs a mount of limited size: nothing. */
TEST_F_TIMEOUT(reservation, hugetlbfs_size, HUGETLB_TEST_TIMEOUT)
{
	char dir[] = "/tmp/guest_memfd_reservation_test.XXXXXX", path[64], options[64];
	int fd, i;

	self->rest = self->pool.free - self->pool.reserved;
	self->rest_fd = create_file(self, self->rest);

	TEST_ASSERT(mkdtemp(dir), "mkdtemp() failed");
	snprintf(options, sizeof(options), "pagesize=2M,size=%d", 2 * PAGE);
	if (mount("hugetlbfs", dir, "hugetlbfs", 0, options)) {
		rmdir(dir);
		SKIP(return, "can't mount hugetlbfs, errno %d", errno);
	}
	snprintf(path, sizeof(path), "%s/file", dir);
	fd = open(path, O_RDWR | O_CREAT, 0600);
	TEST_ASSERT(fd >= 0, "Can't create %s", path);
	unlink(path);
	kvm_ftruncate(fd, 2 * PAGE);

	for (i = 0; i < 10; i++)
		expect_error(fallocate(fd, ALLOCATE, 0, PAGE), ENOSPC);
	kvm_close(self->rest_fd);
	self->rest = 0;
	kvm_fallocate(fd, ALLOCATE, 0, 2 * PAGE);
	ASSERT_POOL(2, 0);

	kvm_close(fd);
	TEST_ASSERT(!umount(dir), "Can't unmount %s, errno %d", dir, errno);
	rmdir(dir);
}

/* Returns how often a limit was hit by one access, which fails. */
static long count_events(const char *cgroup, const char *file, char *mem)
{
	long before = cg_read_key_long(cgroup, file, "max ");

	TEST_ASSERT(before >= 0, "Can't read %s", file);
	TEST_EXPECT_SIGBUS(READ_ONCE(*mem));
	return cg_read_key_long(cgroup, file, "max ") - before;
}

/* A limit that is reached is not tried time and again. */
static void compare_events(struct context *self, const char *limit, long value,
			   const char *file)
{
	long wanted, got;
	char *mem;
	int fd;

	create(self, 1, 1);
	fd = hugetlbfs_create(PAGE, PAGE);
	mem = kvm_mmap(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	TEST_ASSERT(!cg_write_numeric(gmem_cgroup, limit, value), "Can't set %s", limit);
	wanted = count_events(gmem_cgroup, file, mem);
	got = count_events(gmem_cgroup, file, self->mem);
	TEST_ASSERT(!cg_write(gmem_cgroup, limit, "max"), "Can't reset %s", limit);

	pr_info("# %ld hits with hugetlbfs, %ld with guest_memfd\n", wanted, got);
	TEST_ASSERT(wanted > 0 && got > 0 && got < 2 * wanted,
		    "Wanted %ld hits of %s, got %ld", wanted, limit, got);

	kvm_munmap(mem, PAGE);
	kvm_close(fd);
	READ_ONCE(*self->mem);
	ASSERT_POOL(1, 0);
}

TEST_F_TIMEOUT(reservation, memory_limit, HUGETLB_TEST_TIMEOUT)
{
	if (!gmem_cgroup || proc_mount_contains("memory_hugetlb_accounting") <= 0)
		SKIP(return, "cgroup2 is mounted without memory_hugetlb_accounting");

	compare_events(self, "memory.max", cg_read_long(gmem_cgroup, "memory.current") + PAGE / 2,
		       "memory.events");
}

TEST_F_TIMEOUT(reservation, hugetlb_limit, HUGETLB_TEST_TIMEOUT)
{
	if (!gmem_cgroup || cg_read_long(gmem_cgroup, "hugetlb.2MB.current") < 0)
		SKIP(return, "no hugetlb controller for child cgroups");

	compare_events(self, "hugetlb.2MB.max", 0, "hugetlb.2MB.events");
}

int main(int argc, char **argv)
{
	int r;

	gmem_cgroup_enter();
	r = test_harness_run(argc, argv);
	gmem_cgroup_leave();
	return r;
}
