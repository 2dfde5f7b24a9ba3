// SPDX-License-Identifier: GPL-2.0
/*
 * Orders of death of a guest_memfd file, its VM, its memslots and its pages
 *
 * Every test starts with a file that is bound, mapped where that's allowed, and
 * fully populated through the guest's page tables.  When the test's process is
 * gone, every counter must be what it was before.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "guest_memfd_hugetlb.h"
#include "guest_memfd_lifecycle.h"
#include "kvm_syscalls.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define PATTERN		0xa5a5a5a5a5a5a5a5ul
#define GPA		SZ_4G
#define SLOT		1

FIXTURE(lifecycle) {
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

FIXTURE_VARIANT(lifecycle) {
	size_t page_size;
	u64 flags;
};

FIXTURE_VARIANT_ADD(lifecycle, private_4K) {
	.page_size = SZ_4K,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(lifecycle, shared_4K) {
	.page_size = SZ_4K,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(lifecycle, private_2M) {
	.page_size = SZ_2M,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(lifecycle, shared_2M) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(lifecycle, private_1G) {
	.page_size = SZ_1G,
	.flags = PRIVATE_MEMORY,
};

FIXTURE_VARIANT_ADD(lifecycle, shared_1G) {
	.page_size = SZ_1G,
	.flags = SHARED_MEMORY,
};

FIXTURE_VARIANT_ADD(lifecycle, shared_4K_no_direct_map) {
	.page_size = SZ_4K,
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
};

FIXTURE_VARIANT_ADD(lifecycle, shared_2M_no_direct_map) {
	.page_size = SZ_2M,
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
};

#define context _test_data_lifecycle

/* Returns 0 when all of it is mapped into the guest, or an errno. */
static int pre_fault(struct kvm_vcpu *vcpu, u64 size)
{
	struct kvm_pre_fault_memory range = { .gpa = GPA, .size = size };

	while (range.size) {
		if (__vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range) &&
		    errno != EINTR && errno != EAGAIN)
			return errno;
	}
	return 0;
}

static void bind_file(struct kvm_vm *vm, int fd, size_t size)
{
	vm_set_user_memory_region2(vm, SLOT, KVM_MEM_GUEST_MEMFD, GPA, size, NULL,
				   fd, 0);
}

static void unbind_file(struct kvm_vm *vm)
{
	vm_set_user_memory_region2(vm, SLOT, KVM_MEM_GUEST_MEMFD, GPA, 0, NULL, 0, 0);
}

static void write_pattern(void *mem, size_t size)
{
	size_t offset;

	for (offset = 0; offset < size; offset += SZ_4K)
		WRITE_ONCE(*(u64 *)(mem + offset), PATTERN + offset);
}

static void check_pattern(const void *mem, size_t size)
{
	size_t offset;

	for (offset = 0; offset < size; offset += SZ_4K)
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(mem + offset)), PATTERN + offset);
}

/* The file is as good as ever, however few references are left. */
static void check_file(int fd, size_t size, bool shared)
{
	void *mem;

	kvm_fallocate(fd, ALLOCATE, 0, size);
	if (!shared)
		return;

	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	check_pattern(mem, size);
	kvm_munmap(mem, size);
}

static struct kvm_vm *create_vm(struct kvm_vcpu **vcpu, bool shared, size_t size)
{
	struct kvm_vm *vm;

	vm = vm_create_barebones_type(shared ? KVM_X86_DEFAULT_VM :
					       KVM_X86_SW_PROTECTED_VM);
	if (!shared)
		vm_mem_set_private(vm, GPA, size);
	*vcpu = __vm_vcpu_add(vm, 0);
	return vm;
}

FIXTURE_SETUP(lifecycle)
{
	const char *missing = NULL;

	self->page_size = variant->page_size;
	self->size = max_t(size_t, SZ_16M, self->page_size);
	self->shared = variant->flags & GUEST_MEMFD_FLAG_MMAP;
	self->flags = variant->flags;
	self->no_direct_map = variant->flags & GUEST_MEMFD_FLAG_NO_DIRECT_MAP;

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		missing = "no KVM_X86_SW_PROTECTED_VM";
	else if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		missing = "no KVM_CAP_PRE_FAULT_MEMORY";
	else if (self->no_direct_map && no_direct_map_missing())
		missing = no_direct_map_missing();
	else if (self->page_size > SZ_4K)
		missing = hugetlb_missing(self->page_size, self->size / self->page_size + 1);
	if (missing)
		SKIP(return, "%s", missing);

	if (self->page_size > SZ_4K)
		self->flags |= GUEST_MEMFD_FLAG_HUGETLB |
			       hugetlb_size_flag(self->page_size);

	self->counters = gmem_counters_read();

	self->vm = create_vm(&self->vcpu, self->shared, self->size);
	self->fd = vm_create_guest_memfd(self->vm, self->size, self->flags);
	bind_file(self->vm, self->fd, self->size);
	TEST_ASSERT_EQ(pre_fault(self->vcpu, self->size), 0);

	if (self->shared) {
		self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED,
				     self->fd);
		write_pattern(self->mem, self->size);
		/* There is no way to tell where pages are that a PUD maps. */
		if (self->page_size < SZ_1G)
			TEST_ASSERT_EQ(is_in_direct_map(self->mem), !self->no_direct_map);
	}

	gmem_drain_batches();
}

FIXTURE_TEARDOWN_PARENT(lifecycle)
{
	gmem_counters_wait(&self->counters);
}

/* In the parent, all there is to do is to wait. */
static void wait_for_child(pid_t pid, int want)
{
	int status;

	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(status == want, "Wanted wait status 0x%x, got 0x%x", want, status);
}

static pid_t fork_child(void)
{
	pid_t pid = fork();

	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static void unmap(void *mem, size_t size)
{
	if (mem)
		kvm_munmap(mem, size);
}

/* The file keeps what's left of the VM alive, for lack of another owner. */
TEST_F_TIMEOUT(lifecycle, vm_dies_first, HUGETLB_TEST_TIMEOUT)
{
	unmap(self->mem, self->size);
	kvm_vm_free(self->vm);
	check_file(self->fd, self->size, self->shared);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->page_size);
	kvm_fallocate(self->fd, ALLOCATE, 0, self->page_size);
	kvm_close(self->fd);
	gmem_counters_wait(&self->counters);
}

TEST_F_TIMEOUT(lifecycle, file_dies_first, HUGETLB_TEST_TIMEOUT)
{
	u64 size = self->page_size;

	unmap(self->mem, self->size);
	kvm_close(self->fd);

	/* Bound to a file that is gone */
	TEST_ASSERT_EQ(pre_fault(self->vcpu, size), EFAULT);

	unbind_file(self->vm);
	TEST_ASSERT_EQ(pre_fault(self->vcpu, size), self->shared ? ENOENT : EFAULT);

	self->fd = vm_create_guest_memfd(self->vm, size, self->flags);
	bind_file(self->vm, self->fd, size);
	TEST_ASSERT_EQ(pre_fault(self->vcpu, size), 0);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
	gmem_counters_wait(&self->counters);
}

/* The mapping is the last reference to the file, the file the last one to the VM. */
TEST_F_TIMEOUT(lifecycle, mapping_dies_last, HUGETLB_TEST_TIMEOUT)
{
	if (!self->shared)
		SKIP(return, "private memory can't be mapped");

	kvm_close(self->fd);
	kvm_vm_free(self->vm);
	check_pattern(self->mem, self->size);
	kvm_munmap(self->mem, self->size);
	gmem_counters_wait(&self->counters);
}

struct race {
	pthread_barrier_t barrier;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	size_t size;
	int fd;
};

static void *close_file_thread(void *arg)
{
	struct race *race = arg;

	pthread_barrier_wait(&race->barrier);
	kvm_close(race->fd);
	return NULL;
}

static void *delete_memslot_thread(void *arg)
{
	struct race *race = arg;

	pthread_barrier_wait(&race->barrier);
	unbind_file(race->vm);
	return NULL;
}

static void *fault_thread(void *arg)
{
	struct race *race = arg;
	int r;

	pthread_barrier_wait(&race->barrier);
	r = pre_fault(race->vcpu, race->size);
	TEST_ASSERT(!r || r == EFAULT || r == ENOENT, "KVM_PRE_FAULT_MEMORY: errno %d", r);
	return NULL;
}

static void *destroy_vm_thread(void *arg)
{
	struct race *race = arg;

	pthread_barrier_wait(&race->barrier);
	kvm_vm_free(race->vm);
	return NULL;
}

static void ignore_signal(int signal)
{
}

static void run_race(struct race *race, const pthread_fn_t *threads, int nr_threads)
{
	const struct sigaction sa = { .sa_handler = ignore_signal };
	pthread_t thread[3];
	int i;

	sigaction(SIGUSR1, &sa, NULL);
	pthread_barrier_init(&race->barrier, NULL, nr_threads);
	for (i = 0; i < nr_threads; i++)
		kvm_pthread_create(&thread[i], NULL, threads[i], race);
	for (i = nr_threads - 1; i >= 0; i--) {
		/*
		 * A prefault whose root is zapped under it, as it happens when a
		 * memslot goes, is retried until there is a signal.
		 */
		while (pthread_tryjoin_np(thread[i], NULL)) {
			pthread_kill(thread[i], SIGUSR1);
			usleep(1000);
		}
	}
	pthread_barrier_destroy(&race->barrier);
}

/* The memslot is deleted, and the guest faults, while the file is being closed. */
TEST_F_TIMEOUT(lifecycle, memslot_and_file_die_at_once, HUGETLB_TEST_TIMEOUT)
{
	static const pthread_fn_t threads[] = {
		close_file_thread, delete_memslot_thread, fault_thread,
	};
	struct race race = {
		.vm = self->vm,
		.vcpu = self->vcpu,
		.size = self->page_size,
	};
	int i, nr_races = self->page_size == SZ_1G ? 5 : 100;

	unmap(self->mem, self->size);
	kvm_close(self->fd);
	unbind_file(self->vm);

	for (i = 0; i < nr_races; i++) {
		race.fd = vm_create_guest_memfd(self->vm, race.size, self->flags);
		bind_file(self->vm, race.fd, race.size);
		if (i & 1)
			TEST_ASSERT_EQ(pre_fault(self->vcpu, race.size), 0);
		run_race(&race, threads, ARRAY_SIZE(threads));
	}
	kvm_vm_free(self->vm);
	gmem_counters_wait(&self->counters);
}

TEST_F_TIMEOUT(lifecycle, vm_and_file_die_at_once, HUGETLB_TEST_TIMEOUT)
{
	static const pthread_fn_t threads[] = { close_file_thread, destroy_vm_thread };
	int i, nr_races = self->page_size == SZ_1G ? 5 : 25;
	struct race race = { .size = self->page_size };

	unmap(self->mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);

	for (i = 0; i < nr_races; i++) {
		race.vm = create_vm(&race.vcpu, self->shared, race.size);
		race.fd = vm_create_guest_memfd(race.vm, race.size, self->flags);
		bind_file(race.vm, race.fd, race.size);
		TEST_ASSERT_EQ(pre_fault(race.vcpu, race.size), 0);
		run_race(&race, threads, ARRAY_SIZE(threads));
	}
	gmem_counters_wait(&self->counters);
}

/* Another process is the last to close the file.  It has never seen the VM. */
TEST_F_TIMEOUT(lifecycle, passed_to_another_process, HUGETLB_TEST_TIMEOUT)
{
	int sockets[2];
	u64 cookie;
	pid_t pid;
	int fd;

	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "socketpair() failed");
	TEST_ASSERT(!send_fd(sockets[0], self->fd, self->size), "Can't send the file");
	unmap(self->mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);

	pid = fork_child();
	if (!pid) {
		kvm_close(sockets[0]);
		fd = receive_fd(sockets[1], &cookie, 0);
		TEST_ASSERT(fd >= 0 && cookie == self->size, "Can't receive the file");
		check_file(fd, self->size, self->shared);
		_exit(0);
	}
	kvm_close(sockets[0]);
	kvm_close(sockets[1]);
	wait_for_child(pid, 0);
	gmem_counters_wait(&self->counters);
}

/* A socket that was sent over itself dies by the hand of a garbage collector. */
TEST_F_TIMEOUT(lifecycle, dies_in_a_socket, HUGETLB_TEST_TIMEOUT)
{
	int sockets[2];

	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "socketpair() failed");
	TEST_ASSERT(!send_fd(sockets[0], self->fd, 0) &&
		    !send_fd(sockets[0], sockets[0], 0) &&
		    !send_fd(sockets[0], sockets[1], 0), "Can't send the files");
	unmap(self->mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
	kvm_close(sockets[0]);
	kvm_close(sockets[1]);

	/* The death of any other socket starts the collector. */
	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "socketpair() failed");
	kvm_close(sockets[0]);
	kvm_close(sockets[1]);
	gmem_counters_wait(&self->counters);
}

static void exec_self(const char *fd, const char *size, const char *shared)
{
	execl("/proc/self/exe", program_invocation_name, "--after-exec", fd, size, shared,
	      NULL);
	TEST_FAIL("execl() failed");
}

/* The new program has the file, but neither the VM nor the mapping. */
TEST_F_TIMEOUT(lifecycle, exec_inherits, HUGETLB_TEST_TIMEOUT)
{
	char fd[16], size[32];
	pid_t pid;

	snprintf(fd, sizeof(fd), "%d", self->fd);
	snprintf(size, sizeof(size), "%lu", self->size);

	pid = fork_child();
	if (!pid)
		exec_self(fd, size, self->shared ? "1" : "0");

	unmap(self->mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
	wait_for_child(pid, 0);
	gmem_counters_wait(&self->counters);
}

TEST_F_TIMEOUT(lifecycle, exec_closes, HUGETLB_TEST_TIMEOUT)
{
	TEST_ASSERT(!fcntl(self->fd, F_SETFD, FD_CLOEXEC), "fcntl() failed");
	exec_self("-1", "0", "0");
}

TEST_F_TIMEOUT(lifecycle, exit_closes, HUGETLB_TEST_TIMEOUT)
{
	if (self->shared)
		check_pattern(self->mem, self->size);
	_exit(0);
}

/* Killed in the middle of allocating, zeroing, and removing pages */
TEST_F_TIMEOUT(lifecycle, killed, HUGETLB_TEST_TIMEOUT)
{
	int i, nr_kills = self->page_size == SZ_1G ? 3 : 10;
	pid_t pid;

	for (i = 0; i < nr_kills; i++) {
		pid = fork_child();
		while (!pid) {
			kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
			if (self->shared && (i & 1))
				write_pattern(self->mem, self->size);
			else
				kvm_fallocate(self->fd, ALLOCATE, 0, self->size);
		}
		usleep(20000 + i * 7000);
		kill(pid, SIGKILL);
		wait_for_child(pid, SIGKILL);
	}
	if (self->shared) {
		write_pattern(self->mem, self->size);
		check_file(self->fd, self->size, true);
	}
}

/* One page is pinned.  It's all that's left when everybody else is gone. */
static void check_pinned(const struct gmem_counters *counters, size_t page_size)
{
	struct gmem_counters want = *counters;

	gmem_counters_add_pages(&want, page_size, 1);
	gmem_counters_wait(&want);
}

TEST_F_TIMEOUT(lifecycle, pinned_by_io_uring, HUGETLB_TEST_TIMEOUT)
{
	int ring;

	if (!self->shared)
		SKIP(return, "can't be pinned");

	ring = pin_by_io_uring(self->mem, self->page_size);
	if (self->no_direct_map) {
		TEST_ASSERT(ring < 0 && errno == EFAULT, "Pinned, or errno %d", errno);
		return;
	}
	TEST_ASSERT(ring >= 0, "Can't register a fixed buffer, errno %d", errno);

	kvm_munmap(self->mem, self->size);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
	check_pinned(&self->counters, self->page_size);
	kvm_close(ring);
	gmem_counters_wait(&self->counters);
}

TEST_F_TIMEOUT(lifecycle, pinned_by_vmsplice, HUGETLB_TEST_TIMEOUT)
{
	u64 buffer[SZ_4K / sizeof(u64)];
	int pipe_fds[2];

	if (!self->shared)
		SKIP(return, "can't be pinned");

	TEST_ASSERT(!pipe(pipe_fds), "pipe() failed");
	if (self->no_direct_map) {
		TEST_ASSERT_EQ(pin_by_vmsplice(pipe_fds, self->mem, SZ_4K), -1);
		TEST_ASSERT_EQ(errno, EFAULT);
		return;
	}
	TEST_ASSERT_EQ(pin_by_vmsplice(pipe_fds, self->mem, SZ_4K), SZ_4K);

	kvm_vm_free(self->vm);
	kvm_close(self->fd);
	kvm_munmap(self->mem, self->size);
	check_pinned(&self->counters, self->page_size);

	/* Nobody else has got hold of the page in the meantime. */
	TEST_ASSERT_EQ(read(pipe_fds[0], buffer, SZ_4K), SZ_4K);
	TEST_ASSERT_EQ(buffer[0], PATTERN);
	gmem_counters_wait(&self->counters);
}

/* Returns what the counters are while the first page is pinned, with or without it. */
static struct gmem_counters pin_and_punch(struct context *self, int pipe_fds[2])
{
	struct gmem_counters counters;

	TEST_ASSERT(!pipe(pipe_fds), "pipe() failed");
	TEST_ASSERT_EQ(pin_by_vmsplice(pipe_fds, self->mem, SZ_4K), SZ_4K);
	counters = gmem_counters_read();

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->page_size);
	gmem_counters_wait(&counters);
	return counters;
}

/* The pin is gone: the page is free, and if it's a huge one, it may be reserved again. */
static void unpin(struct context *self, int pipe_fds[2], struct gmem_counters *want,
		  int nr_reserved)
{
	kvm_close(pipe_fds[0]);
	kvm_close(pipe_fds[1]);

	gmem_counters_add_pages(want, self->page_size, -1);
	if (self->page_size == SZ_2M)
		gmem_counter_add(want, GMEM_2M_POOL "/resv_hugepages", nr_reserved);
	else if (self->page_size == SZ_1G)
		gmem_counter_add(want, GMEM_1G_POOL "/resv_hugepages", nr_reserved);
	gmem_counters_wait(want);
}

/* The file outlives the pin, the page goes back to the file's reservation. */
TEST_F_TIMEOUT(lifecycle, pinned_and_punched, HUGETLB_TEST_TIMEOUT)
{
	struct gmem_counters counters, want;
	int pipe_fds[2];

	if (!self->shared || self->no_direct_map)
		SKIP(return, "can't be pinned");

	counters = pin_and_punch(self, pipe_fds);
	want = counters;
	unpin(self, pipe_fds, &want, 1);

	kvm_fallocate(self->fd, ALLOCATE, 0, self->page_size);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);
	gmem_counters_wait(&counters);
}

/* Another page takes the place of the pinned one, and is paid for until that is back. */
TEST_F_TIMEOUT(lifecycle, pinned_and_replaced, HUGETLB_TEST_TIMEOUT)
{
	struct gmem_counters want;
	int pipe_fds[2];

	if (!self->shared || self->no_direct_map)
		SKIP(return, "can't be pinned");

	want = pin_and_punch(self, pipe_fds);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);

	gmem_counters_add_pages(&want, self->page_size, 1);
	if (self->page_size == SZ_2M)
		gmem_counter_add(&want, "hugetlb.2MB.rsvd.current", SZ_2M);
	else if (self->page_size == SZ_1G)
		gmem_counter_add(&want, "hugetlb.1GB.rsvd.current", SZ_1G);
	gmem_counters_wait(&want);

	/* It isn't reserved for the file again, and not paid for any more. */
	if (self->page_size == SZ_2M)
		gmem_counter_add(&want, "hugetlb.2MB.rsvd.current", -SZ_2M);
	else if (self->page_size == SZ_1G)
		gmem_counter_add(&want, "hugetlb.1GB.rsvd.current", -SZ_1G);
	unpin(self, pipe_fds, &want, 0);
	TEST_ASSERT_EQ(READ_ONCE(*(u64 *)self->mem), 0);
}

static int after_exec(int fd, size_t size, bool shared)
{
	if (fd >= 0)
		check_file(fd, size, shared);
	return 0;
}

int main(int argc, char **argv)
{
	int r;

	if (argc == 5 && !strcmp(argv[1], "--after-exec"))
		return after_exec(atoi(argv[2]), atol(argv[3]), atoi(argv[4]));

	gmem_cgroup_enter();
	r = test_harness_run(argc, argv);
	gmem_cgroup_leave();
	return r;
}
