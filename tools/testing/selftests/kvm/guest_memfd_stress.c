// SPDX-License-Identifier: GPL-2.0
/*
 * Everything that can be done to guest_memfd, at random and at once
 *
 * Time goes in rounds.  In a round, a few processes of a few threads each work on
 * a few VMs and files.  Then all of them exit, KVM is unloaded as soon as it lets
 * itself be, and every counter must be what it was.  What a thread tries to do is
 * a function of the seed, the round, the process and the thread.  What comes of
 * it, and what the errno is if nothing comes of it, depends on the others.
 *
 * Memory is tagged by the file that it belongs to, by user space and by guests.  It
 * never contains anything but zeroes and the tag of its file.
 */
#include <getopt.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "guest_memfd_hugetlb.h"
#include "guest_memfd_lifecycle.h"
#include "kselftest.h"
#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

#define LONG_DURATION		60
#define MAX_PROCESSES		8
#define MAX_THREADS		16
#define NR_VMS			2
#define PROTECTED_VM		1
#define NR_FILES		6
#define NR_MEMSLOTS		4
#define NR_MAPPINGS		3
#define NR_PINS			2
#define OPERATIONS_PER_ROUND	400

/* Processes have come to their end this many seconds after the time is up. */
#define EXIT_TIMEOUT		300

#define PUNCH_HOLE		(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE		FALLOC_FL_KEEP_SIZE

#define MEMSLOT_SIZE		((u64)SZ_2G)
/* Attributes are kept for each 4K page, and freed without a break. */
#define PRIVATE_SIZE		((u64)SZ_16M)
#define MEMSLOT_GPA(_slot)	(SZ_4G + (_slot) * MEMSLOT_SIZE)

#define TAG_MAGIC		0x6d67ull

#define IDLE			1
#define MAX_ERRNOS		6

struct vm {
	pthread_rwlock_t lock;
	/* Prefaults loop for as long as they hit a root of a memslot that's gone. */
	pthread_mutex_t prefault_lock;
	pthread_mutex_t run_lock;
	/* Memslots get no other file while the guest writes the tag of this one. */
	pthread_rwlock_t bind_locks[NR_MEMSLOTS];
	u64 tags[NR_MEMSLOTS];
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct kvm_regs regs;
};

struct file {
	u64 tag;
	size_t page_size;
	size_t size;
	int fd;
	int vm;
};

struct mapping {
	struct file file;
	void *mem;
};

struct thread {
	struct kvm_random_state random;
	struct mapping mappings[NR_MAPPINGS];
	int pins[NR_PINS][2];
	pthread_t thread;
	u32 round;
	u32 process;
	u32 index;
	u32 operation;
	/* Drawn anew for every operation, whether it needs them or not */
	u32 a;
	u32 b;
	u32 c;
};

struct operation {
	const char *name;
	int (*run)(struct thread *thread);
	u32 weight;
	/* Everything else is a bug. */
	int errnos[MAX_ERRNOS];
};

struct shared {
	struct {
		atomic_long done;
		atomic_long failed;
		atomic_long idle;
	} count[64];
	atomic_long memory_failures;
	atomic_int nr_started;
};

static struct {
	u32 seed;
	u32 processes;
	u32 threads;
	long duration;
	long round;
	long memory_failures;
} options = {
	.processes = 3,
	.threads = 4,
	.duration = 10,
	.round = -1,
};

static struct shared *shared;
static struct vm vms[NR_VMS];
static struct file files[NR_FILES];
static pthread_mutex_t files_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t create_vm_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t receive_lock = PTHREAD_MUTEX_INITIALIZER;
static int send_socket, receive_socket;
static size_t page_sizes[3] = { SZ_4K };
static int nr_page_sizes = 1;
static bool has_no_direct_map;
static int nr_nodes;
static struct timespec start;

static __thread sigjmp_buf sigbus_jmpbuf;
static __thread bool expect_sigbus;

static void sigbus_handler(int signal, siginfo_t *info, void *context)
{
	TEST_ASSERT(READ_ONCE(expect_sigbus), "Unexpected SIGBUS, code %d, address %p",
		    info->si_code, info->si_addr);
	siglongjmp(sigbus_jmpbuf, 1);
}

static bool is_time_up(void)
{
	struct timespec elapsed = timespec_elapsed(start);

	return elapsed.tv_sec >= options.duration;
}

static bool is_valid(u64 value, u64 tag)
{
	return !value || value == tag;
}

/* Address in RDI, value in RSI.  If that's 0, read to RAX instead. */
static void guest_code(void)
{
	asm volatile("1: xor %%eax, %%eax\n\t"
		     "test %%rsi, %%rsi\n\t"
		     "jz 2f\n\t"
		     "mov %%rsi, (%%rdi)\n\t"
		     "jmp 3f\n\t"
		     "2: mov (%%rdi), %%rax\n\t"
		     "3: outb %%al, $0x80\n\t"
		     "jmp 1b" ::: "rax", "memory");
}

static void create_vm(int index)
{
	struct vm_shape shape = VM_SHAPE_DEFAULT;
	struct vm *vm = &vms[index];
	gpa_t gpa;
	int slot;

	if (index == PROTECTED_VM)
		shape.type = KVM_X86_SW_PROTECTED_VM;

	pthread_mutex_lock(&create_vm_lock);
	vm->vm = __vm_create_shape_with_one_vcpu(shape, &vm->vcpu, 0, guest_code);
	for (gpa = MEMSLOT_GPA(0); gpa < MEMSLOT_GPA(NR_MEMSLOTS); gpa += SZ_1G)
		__virt_pg_map(vm->vm, &vm->vm->mmu, gpa, gpa, PG_LEVEL_1G);
	for (slot = 0; index == PROTECTED_VM && slot < NR_MEMSLOTS; slot++)
		vm_mem_set_private(vm->vm, MEMSLOT_GPA(slot), PRIVATE_SIZE);
	vcpu_regs_get(vm->vcpu, &vm->regs);
	memset(vm->tags, 0, sizeof(vm->tags));
	pthread_mutex_unlock(&create_vm_lock);
}

static void *create_vm_thread(void *arg)
{
	create_vm((struct vm *)arg - vms);
	return NULL;
}

/*
 * A ring that is closed interrupts the thread that has set it up, at any time, and
 * KVM_CREATE_VM doesn't take that well.  Let a thread do it that has no rings.
 */
static int run_destroy_vm(struct thread *t)
{
	struct vm *vm = &vms[t->a % NR_VMS];
	pthread_t thread;

	pthread_rwlock_wrlock(&vm->lock);
	kvm_vm_free(vm->vm);
	kvm_pthread_create(&thread, NULL, create_vm_thread, vm);
	kvm_pthread_join(thread, NULL);
	pthread_rwlock_unlock(&vm->lock);
	return 0;
}

/* Returns a copy of the file, with a reference of its own to be closed, or false. */
static bool get_file(u32 index, struct file *file)
{
	pthread_mutex_lock(&files_lock);
	*file = files[index % NR_FILES];
	if (file->fd >= 0)
		file->fd = kvm_dup(file->fd);
	pthread_mutex_unlock(&files_lock);
	return file->fd >= 0;
}

static void replace_file(u32 index, const struct file *file)
{
	int old;

	pthread_mutex_lock(&files_lock);
	old = files[index % NR_FILES].fd;
	files[index % NR_FILES] = *file;
	pthread_mutex_unlock(&files_lock);
	if (old >= 0)
		kvm_close(old);
}

static int run_create(struct thread *t)
{
	u32 choice = t->b % 20;
	struct file file = {
		.page_size = page_sizes[0],
		.tag = TAG_MAGIC << 48 | (u64)(t->round & 0xfff) << 36 |
		       (u64)t->process << 32 | (u64)t->index << 24 | t->operation << 8,
		/* There is more to do with memory that can be mapped. */
		.vm = t->c % 4 ? 0 : PROTECTED_VM,
	};
	u64 flags = PRIVATE_MEMORY;

	/* Zeroing 1G takes the time of many other operations. */
	if (choice >= 8 && nr_page_sizes > 1)
		file.page_size = page_sizes[choice == 19 ? nr_page_sizes - 1 : 1];

	file.tag |= __builtin_ctzl(file.page_size);
	file.size = file.page_size;
	if (file.page_size == SZ_4K)
		file.size *= 1 + t->c / 16 % SZ_1K;
	else if (file.page_size == SZ_2M)
		file.size *= 1 + t->c / 16 % 6;
	if (file.page_size > SZ_4K)
		flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(file.page_size);
	if (!file.vm && t->c / 4 % 16)
		flags |= t->c / 4 % 16 == 1 ? GUEST_MEMFD_FLAG_MMAP : SHARED_MEMORY;
	if (has_no_direct_map && t->b / 20 % 4 == 0)
		flags |= GUEST_MEMFD_FLAG_NO_DIRECT_MAP;

	pthread_rwlock_rdlock(&vms[file.vm].lock);
	file.fd = __vm_create_guest_memfd(vms[file.vm].vm, file.size, flags);
	pthread_rwlock_unlock(&vms[file.vm].lock);
	if (file.fd < 0)
		return -errno;

	replace_file(t->a, &file);
	return 0;
}

static int run_close(struct thread *t)
{
	const struct file none = { .fd = -1 };

	replace_file(t->a, &none);
	return 0;
}

static int set_memslot(struct vm *vm, u32 slot, u64 size, int fd)
{
	return __vm_set_user_memory_region2(vm->vm, 1 + slot, KVM_MEM_GUEST_MEMFD,
					    MEMSLOT_GPA(slot), size, NULL, fd, 0) ?
	       -errno : 0;
}

static int run_bind(struct thread *t)
{
	u32 slot = t->b % NR_MEMSLOTS;
	struct file file;
	struct vm *vm;
	int r;

	if (!get_file(t->a, &file))
		return IDLE;

	vm = &vms[file.vm];
	pthread_rwlock_rdlock(&vm->lock);
	pthread_rwlock_wrlock(&vm->bind_locks[slot]);
	r = set_memslot(vm, slot, file.size, file.fd);
	if (!r)
		vm->tags[slot] = file.tag;
	pthread_rwlock_unlock(&vm->bind_locks[slot]);
	pthread_rwlock_unlock(&vm->lock);
	kvm_close(file.fd);
	return r;
}

static int run_unbind(struct thread *t)
{
	struct vm *vm = &vms[t->a % NR_VMS];
	int r;

	pthread_rwlock_rdlock(&vm->lock);
	pthread_mutex_lock(&vm->prefault_lock);
	r = set_memslot(vm, t->b % NR_MEMSLOTS, 0, 0);
	pthread_mutex_unlock(&vm->prefault_lock);
	pthread_rwlock_unlock(&vm->lock);
	return r;
}

static gpa_t random_gpa(struct thread *t)
{
	u64 offset = (u64)t->c * SZ_4K;

	/* Most files are small. */
	return MEMSLOT_GPA(t->b % NR_MEMSLOTS) + offset % (t->c & 7 ? SZ_4M : SZ_1G);
}

static int run_set_attributes(struct thread *t)
{
	struct vm *vm = &vms[PROTECTED_VM];
	struct kvm_memory_attributes attributes = {
		.address = MEMSLOT_GPA(t->b % NR_MEMSLOTS) +
			   (u64)t->c * SZ_2M % PRIVATE_SIZE,
		.size = t->a & 2 ? SZ_2M : SZ_4K,
		.attributes = t->a & 28 ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0,
	};
	int r;

	if (t->a & 1) {
		attributes.address = MEMSLOT_GPA(t->b % NR_MEMSLOTS);
		attributes.size = PRIVATE_SIZE;
	}

	pthread_rwlock_rdlock(&vm->lock);
	r = __vm_ioctl(vm->vm, KVM_SET_MEMORY_ATTRIBUTES, &attributes) ? -errno : 0;
	pthread_rwlock_unlock(&vm->lock);
	return r;
}

static int run_pre_fault(struct thread *t)
{
	struct kvm_pre_fault_memory range = { .gpa = random_gpa(t), .size = SZ_4K };
	struct vm *vm = &vms[t->a % NR_VMS];
	int r;

	/* Prefaults fill in the exit reason, too. */
	pthread_rwlock_rdlock(&vm->lock);
	pthread_mutex_lock(&vm->prefault_lock);
	pthread_mutex_lock(&vm->run_lock);
	r = __vcpu_ioctl(vm->vcpu, KVM_PRE_FAULT_MEMORY, &range) ? -errno : 0;
	pthread_mutex_unlock(&vm->run_lock);
	pthread_mutex_unlock(&vm->prefault_lock);
	pthread_rwlock_unlock(&vm->lock);
	return r;
}

static int run_guest(struct thread *t)
{
	struct vm *vm = &vms[t->a % NR_VMS];
	u32 slot = t->b % NR_MEMSLOTS;
	struct kvm_regs regs;
	u64 tag;
	int r;

	pthread_rwlock_rdlock(&vm->lock);
	pthread_rwlock_rdlock(&vm->bind_locks[slot]);
	pthread_mutex_lock(&vm->run_lock);

	tag = vm->tags[slot];
	regs = vm->regs;
	regs.rdi = random_gpa(t);
	regs.rsi = t->a & 2 ? tag : 0;
	vcpu_regs_set(vm->vcpu, &regs);

	r = __vcpu_run(vm->vcpu) ? -errno : 0;
	if (!r && vm->vcpu->run->exit_reason == KVM_EXIT_MMIO) {
		r = -ENXIO;
	} else if (!r) {
		TEST_ASSERT_KVM_EXIT_REASON(vm->vcpu, KVM_EXIT_IO);
		vcpu_regs_get(vm->vcpu, &regs);
		TEST_ASSERT(is_valid(regs.rax, tag), "The guest found 0x%llx in file 0x%lx",
			    regs.rax, (unsigned long)tag);
	}
	if (!r || r == -ENXIO)
		vcpu_run_complete_io(vm->vcpu);

	pthread_mutex_unlock(&vm->run_lock);
	pthread_rwlock_unlock(&vm->bind_locks[slot]);
	pthread_rwlock_unlock(&vm->lock);
	return r;
}

static struct mapping *random_mapping(struct thread *t)
{
	struct mapping *mapping = &t->mappings[t->a % NR_MAPPINGS];

	return mapping->mem ? mapping : NULL;
}

static void *random_page(struct thread *t, struct mapping *mapping)
{
	return mapping->mem + (u64)t->b * mapping->file.page_size % mapping->file.size;
}

static int run_munmap(struct thread *t)
{
	struct mapping *mapping = random_mapping(t);

	if (!mapping)
		return IDLE;

	kvm_munmap(mapping->mem, mapping->file.size);
	mapping->mem = NULL;
	return 0;
}

static int run_mmap(struct thread *t)
{
	struct mapping *mapping = &t->mappings[t->a % NR_MAPPINGS];
	struct file file;
	void *mem;
	int r;

	if (!get_file(t->b, &file))
		return IDLE;

	mem = mmap(NULL, file.size, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd, 0);
	r = mem == MAP_FAILED ? -errno : 0;
	kvm_close(file.fd);
	if (r)
		return r;

	run_munmap(t);
	mapping->file = file;
	mapping->mem = mem;
	return 0;
}

static int run_access(struct thread *t)
{
	struct mapping *mapping = random_mapping(t);
	u64 *word, value;

	if (!mapping)
		return IDLE;

	/* Not only the first word of a page */
	word = random_page(t, mapping) + t->c % mapping->file.page_size / 64 * 64;

	WRITE_ONCE(expect_sigbus, true);
	if (sigsetjmp(sigbus_jmpbuf, 1)) {
		WRITE_ONCE(expect_sigbus, false);
		return -EFAULT;
	}
	value = READ_ONCE(*word);
	if (t->c & 1)
		WRITE_ONCE(*word, mapping->file.tag);
	WRITE_ONCE(expect_sigbus, false);

	TEST_ASSERT(is_valid(value, mapping->file.tag), "Found 0x%lx in file 0x%lx",
		    (unsigned long)value, (unsigned long)mapping->file.tag);
	return 0;
}

static int run_madvise(struct thread *t)
{
	static const int advices[] = {
		MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ,
		MADV_POPULATE_WRITE,
	};
	struct mapping *mapping = random_mapping(t);

	if (!mapping)
		return IDLE;

	return madvise(random_page(t, mapping), mapping->file.page_size,
		       advices[t->c % ARRAY_SIZE(advices)]) ? -errno : 0;
}

static int run_mbind(struct thread *t)
{
	static const int modes[] = { MPOL_BIND, MPOL_INTERLEAVE, MPOL_PREFERRED };
	unsigned long nodemask = 1 << t->c / 8 % nr_nodes;
	struct mapping *mapping = random_mapping(t);

	if (!mapping)
		return IDLE;

	return mbind(random_page(t, mapping), mapping->file.page_size,
		     modes[t->c % ARRAY_SIZE(modes)], &nodemask, 8 * sizeof(nodemask),
		     0) ? -errno : 0;
}

static int run_allocate(struct thread *t)
{
	struct file file;
	int r;

	if (!get_file(t->a, &file))
		return IDLE;

	r = fallocate(file.fd, ALLOCATE, (u64)t->b * file.page_size % file.size,
		      file.page_size) ? -errno : 0;
	kvm_close(file.fd);
	return r;
}

static int run_punch(struct thread *t)
{
	u64 offset, size;
	struct file file;
	int r;

	if (!get_file(t->a, &file))
		return IDLE;

	offset = (u64)t->b * file.page_size % file.size;
	size = t->c & 7 ? file.page_size : file.size - offset;
	r = fallocate(file.fd, PUNCH_HOLE, offset, size) ? -errno : 0;
	kvm_close(file.fd);
	return r;
}

static int run_unpin(struct thread *t)
{
	int *pin = t->pins[t->b % NR_PINS], i;

	if (pin[0] < 0)
		return IDLE;

	for (i = 0; i < 2; i++) {
		if (pin[i] >= 0)
			kvm_close(pin[i]);
		pin[i] = -1;
	}
	return 0;
}

static int run_pin(struct thread *t)
{
	struct mapping *mapping = random_mapping(t);
	int *pin = t->pins[t->b % NR_PINS], r;
	void *mem;

	if (!mapping)
		return IDLE;

	run_unpin(t);
	mem = random_page(t, mapping);

	if (t->c & 1) {
		pin[0] = pin_by_io_uring(mem, mapping->file.page_size);
		return pin[0] < 0 ? -errno : 0;
	}

	TEST_ASSERT(!pipe(pin), "pipe() failed");
	if (pin_by_vmsplice(pin, mem, SZ_4K) == SZ_4K)
		return 0;

	r = -errno;
	run_unpin(t);
	return r;
}

static int run_send(struct thread *t)
{
	struct file file;
	int r;

	if (!get_file(t->a, &file))
		return IDLE;

	r = send_fd(send_socket, file.fd, file.tag) ? -errno : 0;
	kvm_close(file.fd);
	return r;
}

static int run_receive(struct thread *t)
{
	/* Files of another process's VM can't be bound here, which is worth a try. */
	struct file file = { .vm = t->b % NR_VMS };
	struct stat st;

	pthread_mutex_lock(&receive_lock);
	file.fd = receive_fd(receive_socket, &file.tag, MSG_DONTWAIT);
	pthread_mutex_unlock(&receive_lock);
	if (file.fd < 0)
		return IDLE;

	TEST_ASSERT(!fstat(file.fd, &st), "fstat() failed");
	file.size = st.st_size;
	file.page_size = 1ul << (file.tag & 0xff);
	replace_file(t->a, &file);
	return 0;
}

/* A child that exits, or is killed, with everything that its parent has */
static int run_fork(struct thread *t)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		if (t->c & 1)
			raise(SIGKILL);
		run_access(t);
		_exit(0);
	}
	TEST_ASSERT(pid > 0, __KVM_SYSCALL_ERROR("fork()", pid));
	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(!status || status == SIGKILL, "Wait status 0x%x", status);
	return 0;
}

static int run_unload(struct thread *t)
{
	return module_unload(vendor_module()) ? -errno : 0;
}

static int run_memory_failure(struct thread *t)
{
	struct mapping *mapping = random_mapping(t);
	int r;

	if (!mapping)
		return IDLE;
	if (atomic_fetch_add(&shared->memory_failures, 1) >= options.memory_failures) {
		atomic_fetch_sub(&shared->memory_failures, 1);
		return IDLE;
	}

	WRITE_ONCE(expect_sigbus, true);
	r = sigsetjmp(sigbus_jmpbuf, 1) ||
	    !madvise(random_page(t, mapping), SZ_4K, MADV_HWPOISON) ? 0 : -errno;
	WRITE_ONCE(expect_sigbus, false);
	return r;
}

static const struct operation operations[] = {
	{ "create", run_create, 8, { ENOMEM } },
	{ "close", run_close, 2 },
	{ "bind", run_bind, 16, { EEXIST, EINVAL } },
	{ "unbind", run_unbind, 3, { EINVAL } },
	{ "set attributes", run_set_attributes, 2 },
	{ "guest access", run_guest, 20, { ENXIO, EFAULT, ENOMEM, EHWPOISON, EINTR } },
	{ "pre-fault", run_pre_fault, 8,
	  { ENOENT, EFAULT, ENOMEM, EHWPOISON, EAGAIN, EINTR } },
	{ "mmap", run_mmap, 12, { ENODEV } },
	{ "munmap", run_munmap, 2 },
	{ "access", run_access, 30, { EFAULT } },
	{ "madvise", run_madvise, 6, { EFAULT, ENOMEM, EHWPOISON, EINVAL } },
	{ "mbind", run_mbind, 4 },
	/* EINTR, as of the vCPU: io_uring signals a task that closes a ring. */
	{ "allocate", run_allocate, 8, { ENOMEM, EHWPOISON, EINTR } },
	{ "punch", run_punch, 8 },
	{ "pin", run_pin, 4, { EFAULT, ENOMEM, EHWPOISON, EAGAIN } },
	{ "unpin", run_unpin, 3 },
	{ "send", run_send, 3, { EAGAIN } },
	{ "receive", run_receive, 3 },
	{ "fork", run_fork, 1 },
	{ "destroy VM", run_destroy_vm, 1 },
	{ "unload", run_unload, 1, { EWOULDBLOCK } },
	{ "memory failure", run_memory_failure, 1,
	  { EFAULT, EBUSY, EHWPOISON, EIO, ENOMEM, EOPNOTSUPP } },
};

static int random_operation(u32 value)
{
	int i, sum = 0;

	for (i = 0; i < ARRAY_SIZE(operations); i++)
		sum += operations[i].weight;
	value %= sum;
	for (i = 0; value >= operations[i].weight; i++)
		value -= operations[i].weight;
	return i;
}

static void check_error(const struct operation *operation, int error)
{
	int i;

	for (i = 0; i < MAX_ERRNOS && operation->errnos[i]; i++) {
		if (operation->errnos[i] == error)
			return;
	}
	TEST_FAIL("%s: unexpected errno %d", operation->name, error);
}

static void *thread_main(void *arg)
{
	struct thread *t = arg;
	int i, r;

	for (t->operation = 0; t->operation < OPERATIONS_PER_ROUND; t->operation++) {
		if (options.round < 0 && is_time_up())
			break;

		i = random_operation(kvm_random_u32(&t->random));
		t->a = kvm_random_u32(&t->random);
		t->b = kvm_random_u32(&t->random);
		t->c = kvm_random_u32(&t->random);

		r = operations[i].run(t);
		if (r < 0)
			check_error(&operations[i], -r);

		if (r == IDLE)
			atomic_fetch_add(&shared->count[i].idle, 1);
		else if (r)
			atomic_fetch_add(&shared->count[i].failed, 1);
		else
			atomic_fetch_add(&shared->count[i].done, 1);
	}
	return NULL;
}

/* Similar seeds must not make for similar sequences. */
static u32 thread_seed(u32 round, u32 process, u32 thread)
{
	u64 hash = options.seed;

	hash = (hash + round) * 0x9e3779b97f4a7c15ull;
	hash = ((hash ^ hash >> 29) + process) * 0xbf58476d1ce4e5b9ull;
	hash = ((hash ^ hash >> 31) + thread) * 0x94d049bb133111ebull;
	return 1 + (hash >> 32) % INT_MAX % (INT_MAX - 1);
}

/* Exits with whatever is still bound, mapped, pinned, and in flight. */
static void process_main(u32 round, u32 process)
{
	const struct sigaction sa = {
		.sa_sigaction = sigbus_handler,
		.sa_flags = SA_SIGINFO,
	};
	static struct thread threads[MAX_THREADS];
	int i, slot;

	sigaction(SIGBUS, &sa, NULL);
	prctl(PR_SET_PDEATHSIG, SIGKILL);

	/* Keep KVM loaded when there is no VM for the moment. */
	open_kvm_dev_path_or_exit();
	atomic_fetch_add(&shared->nr_started, 1);

	for (i = 0; i < NR_VMS; i++) {
		pthread_rwlock_init(&vms[i].lock, NULL);
		pthread_mutex_init(&vms[i].prefault_lock, NULL);
		pthread_mutex_init(&vms[i].run_lock, NULL);
		for (slot = 0; slot < NR_MEMSLOTS; slot++)
			pthread_rwlock_init(&vms[i].bind_locks[slot], NULL);
		create_vm(i);
	}
	for (i = 0; i < NR_FILES; i++)
		files[i].fd = -1;

	for (i = 0; i < options.threads; i++) {
		threads[i] = (struct thread) {
			.random = new_kvm_random_state(thread_seed(round, process, i)),
			.pins = { { -1, -1 }, { -1, -1 } },
			.round = round,
			.process = process,
			.index = i,
		};
		kvm_pthread_create(&threads[i].thread, NULL, thread_main, &threads[i]);
	}
	for (i = 0; i < options.threads; i++)
		kvm_pthread_join(threads[i].thread, NULL);
	_exit(0);
}

static void run_processes(u32 round, const char *vendor)
{
	time_t deadline = time(NULL) + options.duration + EXIT_TIMEOUT;
	int sockets[MAX_PROCESSES][2];
	bool loaded = true;
	int i, status;
	pid_t pid;

	atomic_store(&shared->nr_started, 0);

	for (i = 0; i < options.processes; i++)
		TEST_ASSERT(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets[i]),
			    "socketpair() failed");

	/* Each sends to the next one. */
	for (i = 0; i < options.processes; i++) {
		send_socket = sockets[i][0];
		receive_socket = sockets[(i + 1) % options.processes][1];
		pid = fork();
		TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
		if (!pid)
			process_main(round, i);
	}
	for (i = 0; i < options.processes; i++) {
		kvm_close(sockets[i][0]);
		kvm_close(sockets[i][1]);
	}

	/* Don't leave the last one time to come to its end before KVM is unloaded. */
	for (i = 0; i < options.processes || (vendor && loaded); ) {
		TEST_ASSERT(time(NULL) < deadline, "%s is still in use", vendor ?: "KVM");

		if (vendor && loaded &&
		    atomic_load(&shared->nr_started) == options.processes)
			loaded = module_unload(vendor);

		pid = i < options.processes ? waitpid(-1, &status, WNOHANG) : 0;
		if (!pid) {
			usleep(500);
			continue;
		}
		TEST_ASSERT(pid > 0 && !status, "A process of round %u died: wait status 0x%x",
			    round, status);
		i++;
	}
}

/* Poisoned pages are lost, and stay charged. */
static void expect_lost_pages(struct gmem_counters *want)
{
	static long all_lost;
	struct gmem_counters got;
	long lost[2] = {};
	int i;

	sleep(1);
	got = gmem_counters_read();

	for (i = 0; i < ARRAY_SIZE(gmem_counter_paths); i++) {
		const char *path = gmem_counter_paths[i];
		bool is_1G = strstr(path, "1048576kB") || strstr(path, "1GB");

		if (strstr(path, "/free_hugepages")) {
			lost[is_1G] = want->value[i] - got.value[i];
			TEST_ASSERT(lost[is_1G] >= 0, "There are %ld more huge pages",
				    -lost[is_1G]);
			want->value[i] = got.value[i];
			all_lost += lost[is_1G];
			TEST_ASSERT(all_lost <= atomic_load(&shared->memory_failures),
				    "%ld huge pages are lost to %ld memory failures", all_lost,
				    atomic_load(&shared->memory_failures));
		} else if (want->value[i] >= 0 && !strncmp(path, "hugetlb.", 8) &&
			   !strstr(path, "rsvd")) {
			want->value[i] += lost[is_1G] * (is_1G ? SZ_1G : SZ_2M);
		}
	}
}

static void run_round(u32 round, const char *vendor)
{
	static struct gmem_counters want;
	static bool has_counters;

	if (!has_counters)
		want = gmem_counters_read();
	has_counters = true;

	run_processes(round, vendor);
	if (vendor)
		module_load(vendor);
	if (options.memory_failures)
		expect_lost_pages(&want);
	gmem_counters_wait(&want);
}

/* Given time, everything succeeds now and then, or it isn't tested. */
static void expect_all_operations(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(operations); i++) {
		/* Between rounds it does. */
		if (operations[i].run == run_unload ||
		    (operations[i].run == run_memory_failure && !options.memory_failures))
			continue;
		TEST_ASSERT(atomic_load(&shared->count[i].done), "\"%s\" never succeeded",
			    operations[i].name);
	}
}

static void find_page_sizes(void)
{
	if (!hugetlb_missing(SZ_2M, 1))
		page_sizes[nr_page_sizes++] = SZ_2M;
	if (!hugetlb_missing(SZ_1G, 1))
		page_sizes[nr_page_sizes++] = SZ_1G;
}

static void help(const char *name, int status)
{
	printf("Usage: %s [OPTION]...\n"
	       "  -s, --seed N             what to do (default: random)\n"
	       "  -d, --duration SECONDS   how long (default: %ld)\n"
	       "  -r, --round N            replay this round of the seed, and nothing else\n"
	       "  -p, --processes N        up to %d (default: %u)\n"
	       "  -t, --threads N          of a process, up to %d (default: %u)\n"
	       "  -m, --memory-failures N  poison up to N pages, which are lost (default: 0)\n",
	       name, options.duration, MAX_PROCESSES, options.processes, MAX_THREADS,
	       options.threads);
	exit(status);
}

static void parse_options(int argc, char **argv)
{
	static const struct option long_options[] = {
		{ "seed", required_argument, NULL, 's' },
		{ "duration", required_argument, NULL, 'd' },
		{ "round", required_argument, NULL, 'r' },
		{ "processes", required_argument, NULL, 'p' },
		{ "threads", required_argument, NULL, 't' },
		{ "memory-failures", required_argument, NULL, 'm' },
		{ "help", no_argument, NULL, 'h' },
		{}
	};
	int c;

	options.seed = kvm_random_seed;

	while ((c = getopt_long(argc, argv, "s:d:r:p:t:m:h", long_options, NULL)) != -1) {
		switch (c) {
		case 's':
			options.seed = strtoul(optarg, NULL, 0);
			break;
		case 'd':
			options.duration = atoi_positive("Duration", optarg);
			break;
		case 'r':
			options.round = atoi_non_negative("Round", optarg);
			break;
		case 'p':
			options.processes = atoi_positive("Number of processes", optarg);
			break;
		case 't':
			options.threads = atoi_positive("Number of threads", optarg);
			break;
		case 'm':
			options.memory_failures = atoi_non_negative("Memory failures", optarg);
			break;
		case 'h':
			help(argv[0], KSFT_SKIP);
			break;
		default:
			help(argv[0], KSFT_FAIL);
		}
	}
	if (optind < argc)
		help(argv[0], KSFT_FAIL);
	TEST_ASSERT(options.processes <= MAX_PROCESSES && options.threads <= MAX_THREADS,
		    "Too many processes or threads");
}

int main(int argc, char **argv)
{
	const char *vendor = vendor_module();
	long done = 0;
	u32 round = 0;
	int i;

	parse_options(argc, argv);

	ksft_print_header();
	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		ksft_exit_skip("no KVM_X86_SW_PROTECTED_VM\n");
	ksft_set_plan(1);

	find_page_sizes();
	has_no_direct_map = !no_direct_map_missing();
	nr_nodes = get_max_numa_node() + 1;
	shared = kvm_mmap(sizeof(*shared), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS, -1);
	gmem_cgroup_enter();
	clock_gettime(CLOCK_MONOTONIC, &start);

	ksft_print_msg("seed 0x%x, %u processes of %u threads, %d page sizes%s\n",
		       options.seed, options.processes, options.threads, nr_page_sizes,
		       vendor ? "" : ", KVM isn't modular");

	if (options.round >= 0) {
		run_round(options.round, vendor);
	} else {
		for (; !is_time_up(); round++)
			run_round(round, vendor);
	}

	for (i = 0; i < ARRAY_SIZE(operations); i++) {
		ksft_print_msg("%-15s %8ld done %8ld failed %8ld idle\n",
			       operations[i].name, atomic_load(&shared->count[i].done),
			       atomic_load(&shared->count[i].failed),
			       atomic_load(&shared->count[i].idle));
		done += atomic_load(&shared->count[i].done);
	}
	ksft_print_msg("seed 0x%x, %u rounds, %ld operations\n", options.seed, round, done);
	gmem_cgroup_leave();

	if (options.round < 0 && options.duration >= LONG_DURATION)
		expect_all_operations();

	ksft_test_result(done, "stress\n");
	ksft_finished();
}
