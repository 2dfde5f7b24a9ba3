// SPDX-License-Identifier: GPL-2.0
/*
 * guest_memfd_vmm - boot Linux on guest_memfd, with 4K, 2M or 1G pages
 *
 * A sample for authors of VMMs: one file of guest_memfd is all the memory that
 * the guest has.  In the order in which they matter:
 *
 *   probe_kvm()	what to ask before using the API
 *   create_memory()	the API: create the file, map it, bind it to memslots
 *   explain_enomem()	how to turn its one likely failure into advice
 *   allocate_memory()	what to do before the VMM itself writes to memory
 *   destroy_vm()	when the huge pages go back to their pool
 *
 * The rest is what it takes to get an x86 kernel to user space: boot_x86.c plays
 * firmware and boot loader, serial.c is the console.  ACPI tables describe the
 * vCPUs and how to power off, so the guest kernel needs CONFIG_ACPI and
 * CONFIG_SERIAL_8250_CONSOLE.
 *
 * A guest can mark its progress: each time it raises OUT1, the spare output of
 * the UART, with ioctl(TIOCMBIS) on its console, --stats takes a sample of the
 * figures that matter here: see guest_init.c.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "vmm.h"

#define PROG		"guest_memfd_vmm"
#define HUGEPAGES	"/sys/kernel/mm/hugepages/hugepages-%llukB/%s"
#define CGROUP_LIMIT	"look at the hugetlb and memory limits of the cgroup"
#define ESCAPE_KEY	0x1d		/* Ctrl-] */
#define MAX_VCPUS	254		/* APIC IDs of 8 bits; 255 is broadcast */

#define SHARED_MEMORY	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

struct vcpu {
	struct vm *vm;
	struct kvm_run *run;
	pthread_t thread;
	unsigned int id;
	int fd;
};

static const struct page_size page_sizes[] = {
	{ "4k", SZ_4K, SHARED_MEMORY },
	{ "2M", SZ_2M, SHARED_MEMORY | GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_2MB },
	{ "1G", SZ_1G, SHARED_MEMORY | GUEST_MEMFD_FLAG_HUGETLB | GUEST_MEMFD_HUGE_1GB },
	{ }
};

static struct termios saved_termios;
static __thread struct kvm_run *this_run;

void usage_error(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, PROG ": ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nTry '" PROG " --help'.\n");
	exit(EXIT_USAGE);
}

void call_failed(const char *call, const char *hint, ...)
{
	int err = errno;
	va_list ap;

	fprintf(stderr, PROG ": %s: %s", call, strerror(err));
	if (hint) {
		fprintf(stderr, ": ");
		va_start(ap, hint);
		vfprintf(stderr, hint, ap);
		va_end(ap);
	}
	fputc('\n', stderr);
	exit(EXIT_VMM);
}

static __noreturn void unsupported(const char *what, int val, const char *hint)
{
	fprintf(stderr, PROG ": %s: %#x: %s\n", what, val, hint);
	exit(EXIT_VMM);
}

/* A number from a file of sysfs, debugfs or procfs, or -1 */
__printf(1, 2)
static long long read_counter(const char *fmt, ...)
{
	long long val = -1;
	char path[256];
	va_list ap;
	FILE *file;

	va_start(ap, fmt);
	vsnprintf(path, sizeof(path), fmt, ap);
	va_end(ap);

	file = fopen(path, "re");
	if (!file)
		return -1;
	if (fscanf(file, "%lld", &val) != 1)
		val = -1;
	fclose(file);
	return val;
}

static long long pool_counter(const struct vm *vm, const char *name)
{
	return read_counter(HUGEPAGES, (unsigned long long)vm->page_size->size >> 10, name);
}

static bool is_hugetlb(const struct vm *vm)
{
	return vm->page_size->flags & GUEST_MEMFD_FLAG_HUGETLB;
}

/*
 * --stats
 */

static u64 now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

/* In pages.  The kernel counts per CPU, and adds up when it is asked to. */
static long long secondary_page_tables(void)
{
	long long kib = -1;
	char line[128];
	FILE *file;

	read_counter("/proc/sys/vm/stat_refresh");

	file = fopen("/proc/meminfo", "re");
	if (!file)
		return -1;
	while (kib < 0 && fgets(line, sizeof(line), file))
		sscanf(line, "SecPageTables: %lld kB", &kib);
	fclose(file);
	return kib < 0 ? -1 : kib * 1024 / sysconf(_SC_PAGESIZE);
}

/* In KiB, how much memory the kernel's direct map maps.  What is unmapped has no flags. */
static long long direct_map(void)
{
	unsigned long long begin, end;
	bool found = false;
	long long kib = 0;
	char line[128];
	FILE *file;

	file = fopen("/sys/kernel/debug/page_tables/kernel", "re");
	if (!file)
		return -1;
	while (fgets(line, sizeof(line), file)) {
		if (line[0] == '-')
			found = strstr(line, "Low Kernel Mapping");
		else if (found && (strstr(line, " RW ") || strstr(line, " ro ")) &&
			 sscanf(line, "%llx-%llx", &begin, &end) == 2)
			kib += (end - begin) / SZ_1K;
	}
	fclose(file);
	return kib ?: -1;
}

static void take_sample(struct vm *vm, const char *name)
{
	static const char * const vm_counters[] = {
		"pages_4k", "pages_2m", "pages_1g", "pf_taken", "pf_fixed",
	};
	u64 ms = (now_ns() - vm->start_ns) / 1000000;
	unsigned int i;

	if (!vm->stats)
		return;

	fprintf(vm->stats, "sample=%s ms=%llu", name, (unsigned long long)ms);
	if (is_hugetlb(vm))
		fprintf(vm->stats, " pool_total=%lld pool_free=%lld pool_rsvd=%lld",
			pool_counter(vm, "nr_hugepages"), pool_counter(vm, "free_hugepages"),
			pool_counter(vm, "resv_hugepages"));
	fprintf(vm->stats, " sec_page_tables=%lld direct_map=%lld", secondary_page_tables(),
		direct_map());
	if (vm->fd >= 0)
		for (i = 0; i < ARRAY_SIZE(vm_counters); i++)
			fprintf(vm->stats, " %s=%lld", vm_counters[i],
				read_counter("/sys/kernel/debug/kvm/%d-%d/%s", getpid(),
					     vm->fd, vm_counters[i]));
	fputc('\n', vm->stats);
	fflush(vm->stats);
}

/* The vCPU that reports it waits meanwhile, so that the figures are of now. */
void vm_milestone(struct vm *vm)
{
	char name[32];

	snprintf(name, sizeof(name), "milestone%u", ++vm->milestones);
	take_sample(vm, name);
}

/*
 * The API.
 */

static int check_extension(const struct vm *vm, long cap)
{
	int ret = ioctl(vm->fd, KVM_CHECK_EXTENSION, cap);

	if (ret < 0)
		call_failed("KVM_CHECK_EXTENSION", "capability %ld of the VM", cap);
	return ret;
}

/*
 * Ask the VM rather than /dev/kvm: what guest_memfd supports depends on the type
 * of the VM.  The capability reports the flags, never the supported page sizes:
 * those are the ones under /sys/kernel/mm/hugepages.
 */
static void probe_kvm(struct vm *vm)
{
	unsigned int flags;
	int ret;

	vm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm_fd < 0)
		call_failed("/dev/kvm", errno == EACCES ?
			    "run as root, or as a member of the group that owns it" :
			    "load kvm_amd or kvm_intel, and enable virtualization in the firmware");

	ret = ioctl(vm->kvm_fd, KVM_GET_API_VERSION, 0);
	if (ret != KVM_API_VERSION)
		unsupported("KVM_GET_API_VERSION", ret, "needs version 12");

	vm->fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, KVM_X86_DEFAULT_VM);
	if (vm->fd < 0)
		call_failed("KVM_CREATE_VM", NULL);

	if (!check_extension(vm, KVM_CAP_GUEST_MEMFD))
		unsupported("KVM_CAP_GUEST_MEMFD", 0, "needs a kernel with CONFIG_KVM_GUEST_MEMFD");

	flags = check_extension(vm, KVM_CAP_GUEST_MEMFD_FLAGS);
	if ((flags & SHARED_MEMORY) != SHARED_MEMORY)
		unsupported("KVM_CAP_GUEST_MEMFD_FLAGS", flags,
			    "no guest_memfd that can be mapped: needs Linux 6.18");
	if (is_hugetlb(vm) && !(flags & GUEST_MEMFD_FLAG_HUGETLB))
		unsupported("KVM_CAP_GUEST_MEMFD_FLAGS", flags,
			    "no huge pages: needs GUEST_MEMFD_FLAG_HUGETLB, or --page-size 4k");
	if (vm->no_direct_map && !(flags & GUEST_MEMFD_FLAG_NO_DIRECT_MAP))
		unsupported("KVM_CAP_GUEST_MEMFD_FLAGS", flags,
			    "--no-direct-map: needs GUEST_MEMFD_FLAG_NO_DIRECT_MAP");

	ret = check_extension(vm, KVM_CAP_MAX_VCPUS);
	if (vm->nr_vcpus > (unsigned int)ret)
		usage_error("--vcpus: %u, but KVM supports %d here", vm->nr_vcpus, ret);
}

static void explain_enomem(const struct vm *vm)
{
	long long needed = vm->mem_size / vm->page_size->size;
	long long total = pool_counter(vm, "nr_hugepages");
	long long unreserved = pool_counter(vm, "free_hugepages") -
			       pool_counter(vm, "resv_hugepages");
	unsigned long long kib = vm->page_size->size >> 10;

	errno = ENOMEM;
	if (total < 0)
		call_failed("KVM_CREATE_GUEST_MEMFD",
			    "needs %lld free pages in the %s pool, which sysfs does not show",
			    needed, vm->page_size->name);
	if (unreserved >= needed)
		call_failed("KVM_CREATE_GUEST_MEMFD",
			    "the %s pool has %lld free pages, %lld needed: " CGROUP_LIMIT,
			    vm->page_size->name, unreserved, needed);

	call_failed("KVM_CREATE_GUEST_MEMFD",
		    "the %s pool has %lld free pages, %lld needed: write %lld to " HUGEPAGES,
		    vm->page_size->name, unreserved, needed, total + needed - unreserved,
		    kib, "nr_hugepages");
}

static void bind_memory(struct vm *vm, u32 slot, u64 gpa, u64 offset, u64 size)
{
	struct kvm_userspace_memory_region2 region = {
		.slot			= slot,
		.flags			= KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr	= gpa,
		.memory_size		= size,
		.userspace_addr		= (uintptr_t)(vm->mem + offset),
		.guest_memfd		= vm->gmem_fd,
		.guest_memfd_offset	= offset,
	};

	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION2, &region))
		call_failed("KVM_SET_USER_MEMORY_REGION2", "slot %u, %lluM at %#llx%s", slot,
			    (unsigned long long)(size / SZ_1M), (unsigned long long)gpa,
			    errno == EINVAL ? ": is it more than this CPU can address?" : "");
}

static void create_memory(struct vm *vm)
{
	struct kvm_create_guest_memfd args = {
		.size	= vm->mem_size,
		.flags	= vm->page_size->flags,
	};
	u64 low = vm->mem_size;

	if (vm->no_direct_map)
		args.flags |= GUEST_MEMFD_FLAG_NO_DIRECT_MAP;

	/*
	 * All huge pages are reserved here or not at all: once this succeeds, no
	 * access by the guest or through the mapping fails for want of a page.  It
	 * may still hit a limit, see allocate_memory().
	 */
	vm->gmem_fd = ioctl(vm->fd, KVM_CREATE_GUEST_MEMFD, &args);
	if (vm->gmem_fd < 0 && errno == ENOMEM && is_hugetlb(vm))
		explain_enomem(vm);
	if (vm->gmem_fd < 0 && errno == EINVAL && is_hugetlb(vm))
		call_failed("KVM_CREATE_GUEST_MEMFD",
			    "needs %s pages in /sys/kernel/mm/hugepages, CONFIG_TRANSPARENT_HUGEPAGE",
			    vm->page_size->name);
	if (vm->gmem_fd < 0)
		call_failed("KVM_CREATE_GUEST_MEMFD", "size %#llx, flags %#llx",
			    (unsigned long long)args.size, (unsigned long long)args.flags);
	take_sample(vm, "created");

	/* Without a hint, the kernel picks an address that is aligned well. */
	vm->mem = mmap(NULL, vm->mem_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->gmem_fd, 0);
	if (vm->mem == MAP_FAILED)
		call_failed("mmap", "guest_memfd, %lluM",
			    (unsigned long long)(vm->mem_size / SZ_1M));

	/*
	 * KVM maps huge pages where the guest physical address and the offset in
	 * the file are aligned alike, so a hole must be a multiple of a huge page.
	 */
	if (low > PCI_HOLE_START)
		low = PCI_HOLE_START;
	bind_memory(vm, 0, 0, 0, low);
	if (vm->mem_size > low)
		bind_memory(vm, 1, SZ_4G, low, vm->mem_size - low);
}

/*
 * What is reserved has yet to be allocated, and cgroups have limits on that, too.
 * Through the mapping, to hit one is SIGBUS, fallocate() has an error to report.
 * What only the guest writes can wait: for that, KVM_RUN has one.
 */
void allocate_memory(const struct vm *vm, u64 offset, u64 size)
{
	u64 start = ALIGN_DOWN(offset, vm->page_size->size);
	u64 end = ALIGN(offset + size, vm->page_size->size);

	while (fallocate(vm->gmem_fd, FALLOC_FL_KEEP_SIZE, start, end - start))
		if (errno != EINTR)
			call_failed("fallocate", "guest_memfd, %lluK at %#llx%s",
				    (unsigned long long)(end - start) / SZ_1K,
				    (unsigned long long)start,
				    errno == ENOMEM && is_hugetlb(vm) ? ": " CGROUP_LIMIT : "");
}

/*
 * The pages go back to the pool with the last reference to the file: its fd and
 * its mappings.  The VM's memslots hold none.
 */
static void destroy_vm(struct vm *vm)
{
	int run_size = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	unsigned int i;

	for (i = 0; i < vm->nr_vcpus; i++) {
		munmap(vm->vcpus[i].run, run_size);
		close(vm->vcpus[i].fd);
	}
	free(vm->vcpus);
	close(vm->fd);
	vm->fd = -1;
	munmap(vm->mem, vm->mem_size);
	close(vm->gmem_fd);
	close(vm->kvm_fd);
	take_sample(vm, "closed");
}

/*
 * vCPUs.
 */

static void create_machine(struct vm *vm)
{
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };

	/* Intel needs three pages of guest physical space; none of our memory is there. */
	if (ioctl(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000))
		call_failed("KVM_SET_TSS_ADDR", NULL);
	if (ioctl(vm->fd, KVM_CREATE_IRQCHIP, 0))
		call_failed("KVM_CREATE_IRQCHIP", "needs CONFIG_KVM_IOAPIC");
	if (ioctl(vm->fd, KVM_CREATE_PIT2, &pit))
		call_failed("KVM_CREATE_PIT2", NULL);

	/*
	 * 0 is the host's rate, which is not the default: that is what the rate
	 * was when KVM was loaded.  Should the host have refined it since, and
	 * not be able to scale, then the guest's timers would not fire.
	 */
	if (ioctl(vm->fd, KVM_SET_TSC_KHZ, 0))
		call_failed("KVM_SET_TSC_KHZ", NULL);
}

static void create_vcpus(struct vm *vm)
{
	int run_size = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct vcpu *vcpu;
	unsigned int i;

	if (run_size < 0)
		call_failed("KVM_GET_VCPU_MMAP_SIZE", NULL);
	vm->vcpus = calloc(vm->nr_vcpus, sizeof(*vm->vcpus));
	if (!vm->vcpus)
		call_failed("calloc", NULL);

	for (i = 0; i < vm->nr_vcpus; i++) {
		vcpu = &vm->vcpus[i];
		vcpu->vm = vm;
		vcpu->id = i;
		vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, i);
		if (vcpu->fd < 0)
			call_failed("KVM_CREATE_VCPU", "vCPU %u", i);
		vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
		if (vcpu->run == MAP_FAILED)
			call_failed("mmap", "kvm_run of vCPU %u", i);
		boot_setup_vcpu(vm, vcpu->fd, i);
	}
}

/* From any thread, and without a lock that could be held up.  The first decides. */
void vm_stop(struct vm *vm, enum exit_status status)
{
	u64 one = 1;

	if (atomic_exchange(&vm->stopping, true))
		return;
	vm->status = status;
	if (write(vm->stop_fd, &one, sizeof(one)) != sizeof(one))
		call_failed("eventfd", NULL);
}

/* Ports that nothing answers read as all ones. */
static void port_in(struct vm *vm, u16 port, u8 *data, unsigned int size)
{
	memset(data, 0xff, size);

	if (port >= SERIAL_PORT && port < SERIAL_PORT + SERIAL_NR_PORTS) {
		pthread_mutex_lock(&vm->lock);
		data[0] = serial_in(vm, port - SERIAL_PORT);
		pthread_mutex_unlock(&vm->lock);
	} else if (port == ACPI_PM1_STATUS && size == 2) {
		memset(data, 0, size);
	} else if (port == ACPI_PM1_ENABLE && size == 2) {
		memcpy(data, &vm->pm1_enable, size);
	} else if (port == ACPI_PM1_CONTROL && size == 2) {
		memcpy(data, &(u16){ ACPI_PM1_SCI_EN }, size);
	}
}

static void port_out(struct vm *vm, u16 port, const u8 *data, unsigned int size)
{
	u16 control;

	if (port >= SERIAL_PORT && port < SERIAL_PORT + SERIAL_NR_PORTS) {
		pthread_mutex_lock(&vm->lock);
		serial_out(vm, port - SERIAL_PORT, data[0]);
		pthread_mutex_unlock(&vm->lock);
	} else if (port == ACPI_PM1_ENABLE && size == 2) {
		memcpy(&vm->pm1_enable, data, size);
	} else if (port == ACPI_PM1_CONTROL && size == 2) {
		memcpy(&control, data, size);
		if ((control & ACPI_PM1_SLP_EN) && ACPI_PM1_SLP_TYP(control) == ACPI_S5_SLP_TYP)
			vm_stop(vm, EXIT_POWEROFF);
	} else if (port == ACPI_RESET_PORT && data[0] == ACPI_RESET_VALUE) {
		fprintf(stderr, PROG ": the guest reset itself: reboot, or panic with panic=N\n");
		vm_stop(vm, EXIT_RESET);
	}
}

static void handle_exit(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct vm *vm = vcpu->vm;
	u8 *data;
	u32 i;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		data = (u8 *)run + run->io.data_offset;
		for (i = 0; i < run->io.count; i++, data += run->io.size) {
			if (run->io.direction == KVM_EXIT_IO_IN)
				port_in(vm, run->io.port, data, run->io.size);
			else
				port_out(vm, run->io.port, data, run->io.size);
		}
		return;
	case KVM_EXIT_MMIO:
		if (!run->mmio.is_write)
			memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
		return;
	case KVM_EXIT_SHUTDOWN:
		fprintf(stderr, PROG ": vCPU %u: triple fault: the guest crashed\n", vcpu->id);
		vm_stop(vm, EXIT_RESET);
		return;
	case KVM_EXIT_FAIL_ENTRY:
		fprintf(stderr, PROG ": vCPU %u: KVM_EXIT_FAIL_ENTRY: hardware reason %#llx\n",
			vcpu->id, run->fail_entry.hardware_entry_failure_reason);
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		fprintf(stderr, PROG ": vCPU %u: KVM_EXIT_INTERNAL_ERROR: suberror %u\n",
			vcpu->id, run->internal.suberror);
		break;
	default:
		fprintf(stderr, PROG ": vCPU %u: exit reason %u is not handled\n", vcpu->id,
			run->exit_reason);
	}
	vm_stop(vm, EXIT_VMM);
}

static void run_failed(struct vcpu *vcpu, int err)
{
	struct kvm_run *run = vcpu->run;

	fprintf(stderr, PROG ": KVM_RUN: vCPU %u: %s", vcpu->id, strerror(err));
	if ((err == EFAULT || err == EHWPOISON) && run->exit_reason == KVM_EXIT_MEMORY_FAULT)
		fprintf(stderr, ": guest physical address %#llx, %llu bytes",
			run->memory_fault.gpa, run->memory_fault.size);
	if (err == ENOMEM && is_hugetlb(vcpu->vm))
		fprintf(stderr, ": " CGROUP_LIMIT);
	fputc('\n', stderr);
	vm_stop(vcpu->vm, EXIT_VMM);
}

static void *vcpu_thread(void *arg)
{
	struct vcpu *vcpu = arg;

	this_run = vcpu->run;
	while (!vcpu->vm->stopping) {
		if (!ioctl(vcpu->fd, KVM_RUN, 0))
			handle_exit(vcpu);
		else if (errno != EINTR && errno != EAGAIN)
			run_failed(vcpu, errno);
	}
	return NULL;
}

/*
 * Also when the signal comes just before KVM_RUN, which then returns at once.
 * A thread that has not started yet will see vm->stopping.
 */
static void kick(int sig)
{
	(void)sig;

	if (this_run)
		this_run->immediate_exit = 1;
}

/*
 * Nothing like immediate_exit is there for write(), for which a signal that comes
 * just before it is lost: send another one for as long as it takes.
 */
static void end_vcpu(struct vcpu *vcpu)
{
	while (pthread_tryjoin_np(vcpu->thread, NULL)) {
		pthread_kill(vcpu->thread, SIGUSR1);
		usleep(1000);
	}
}

/*
 * The terminal.
 */

static void restore_terminal(void)
{
	tcsetattr(STDIN_FILENO, TCSANOW, &saved_termios);
}

/* Every key is for the guest, but only if the terminal is ours to change. */
static void setup_terminal(void)
{
	struct termios raw;

	if (tcgetattr(STDIN_FILENO, &saved_termios) || tcgetpgrp(STDIN_FILENO) != getpgrp())
		return;

	raw = saved_termios;
	cfmakeraw(&raw);
	raw.c_oflag |= OPOST;
	if (tcsetattr(STDIN_FILENO, TCSANOW, &raw))
		call_failed("tcsetattr", NULL);
	atexit(restore_terminal);
	fprintf(stderr, PROG ": Ctrl-] ends the guest\n");
}

/* Returns false at the end of the input. */
static bool read_terminal(struct vm *vm, unsigned int room)
{
	u8 buf[sizeof(vm->serial.rx)];
	ssize_t n;

	n = read(STDIN_FILENO, buf, room);
	if (n <= 0)
		return n < 0 && (errno == EINTR || errno == EAGAIN);

	if (isatty(STDIN_FILENO) && memchr(buf, ESCAPE_KEY, n)) {
		vm_stop(vm, EXIT_ENDED);
		return true;
	}

	pthread_mutex_lock(&vm->lock);
	serial_receive(vm, buf, n);
	pthread_mutex_unlock(&vm->lock);
	return true;
}

static void wait_for_end(struct vm *vm, int signal_fd)
{
	struct pollfd fds[] = {
		{ .fd = vm->stop_fd, .events = POLLIN },
		{ .fd = signal_fd, .events = POLLIN },
		{ .fd = STDIN_FILENO, .events = POLLIN },
	};
	pid_t foreground = tcgetpgrp(STDIN_FILENO);
	unsigned int room;

	/* A read from somebody else's terminal would stop all of the VMM. */
	if (foreground > 0 && foreground != getpgrp())
		fds[2].fd = -1;

	while (!fds[0].revents && !fds[1].revents) {
		/* With the receiver full, look again when the guest had some time. */
		pthread_mutex_lock(&vm->lock);
		room = serial_rx_room(vm);
		pthread_mutex_unlock(&vm->lock);

		if (poll(fds, room ? 3 : 2, room ? -1 : 20) < 0) {
			if (errno != EINTR)
				call_failed("poll", NULL);
			continue;
		}
		if (room && fds[2].revents && !read_terminal(vm, room))
			fds[2].fd = -1;
	}

	/* The exit status says so; nobody may be reading stderr any more. */
	if (fds[1].revents)
		vm_stop(vm, EXIT_ENDED);
}

static void run_vm(struct vm *vm)
{
	struct sigaction action = { .sa_handler = kick };
	sigset_t signals;
	unsigned int i;
	int signal_fd;

	signal(SIGPIPE, SIG_IGN);
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGHUP);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
	if (signal_fd < 0)
		call_failed("signalfd", NULL);
	vm->stop_fd = eventfd(0, EFD_CLOEXEC);
	if (vm->stop_fd < 0)
		call_failed("eventfd", NULL);
	setup_terminal();

	for (i = 0; i < vm->nr_vcpus; i++) {
		errno = pthread_create(&vm->vcpus[i].thread, NULL, vcpu_thread, &vm->vcpus[i]);
		if (errno)
			call_failed("pthread_create", "vCPU %u", i);
	}

	wait_for_end(vm, signal_fd);

	for (i = 0; i < vm->nr_vcpus; i++)
		end_vcpu(&vm->vcpus[i]);
	close(signal_fd);
	close(vm->stop_fd);
}

/*
 * Arguments.
 */

static void print_help(void)
{
	puts("Usage: " PROG " --kernel BZIMAGE [OPTION]...\n"
	     "Boot Linux in a VM whose only memory is a guest_memfd; its console is stdin and\n"
	     "stdout; Ctrl-] ends it if stdin is a terminal.\n"
	     "\n"
	     "  --kernel FILE      bzImage to boot\n"
	     "  --initrd FILE      initramfs\n"
	     "  --append STRING    kernel command line (default: console=ttyS0 panic=-1)\n"
	     "  --memory SIZE      guest memory, such as 512M or 4G (default: 512M);\n"
	     "                     a multiple of the page size\n"
	     "  --page-size SIZE   4k, 2M or 1G (default: 4k); 2M and 1G pages are reserved from\n"
	     "                     the pools in /sys/kernel/mm/hugepages\n"
	     "  --no-direct-map    keep the guest's memory out of the kernel's direct map;\n"
	     "                     without kvm-clock and nested virtualization for the guest\n"
	     "  --vcpus N          number of vCPUs (default: 1)\n"
	     "  --stats FILE       append a line of figures to FILE at the start, when the\n"
	     "                     memory is created, each time the guest raises OUT1 of its\n"
	     "                     UART, and when all is closed (needs debugfs mounted)\n"
	     "  --help             this text\n"
	     "\n"
	     "Exit status: 0 the guest powered off, 1 a call failed, 2 wrong arguments,\n"
	     "3 the guest reset itself or crashed, 4 ended by a signal or from the terminal.");
}

static u64 parse_memory(const char *arg)
{
	static const char units[] = "KMGT";
	unsigned long long val;
	const char *unit;
	char *end;
	int shift;

	errno = 0;
	val = strtoull(arg, &end, 10);
	if (arg[0] < '0' || arg[0] > '9')
		usage_error("--memory: '%s' is not a size: give one such as 512M", arg);
	unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
	if (!unit || end[1])
		usage_error("--memory: '%s' needs one of the units K, M, G, T", arg);
	shift = 10 * (unit - units + 1);
	if (errno || val << shift >> shift != val || val << shift > INT64_MAX)
		usage_error("--memory: '%s' is too large", arg);
	if (!val)
		usage_error("--memory: a guest needs some");
	return val << shift;
}

static const struct page_size *parse_page_size(const char *arg)
{
	const struct page_size *page_size;

	for (page_size = page_sizes; page_size->name; page_size++)
		if (!strcasecmp(arg, page_size->name))
			return page_size;
	usage_error("--page-size: '%s' is none of 4k, 2M, 1G", arg);
}

static unsigned int parse_vcpus(const char *arg)
{
	unsigned long val;
	char *end;

	errno = 0;
	val = strtoul(arg, &end, 10);
	if (errno || arg[0] < '0' || arg[0] > '9' || *end || !val || val > MAX_VCPUS)
		usage_error("--vcpus: '%s' is not a number from 1 to %d", arg, MAX_VCPUS);
	return val;
}

static void parse_args(struct vm *vm, int argc, char **argv)
{
	static const struct option options[] = {
		{ "kernel",	required_argument,	NULL, 'k' },
		{ "initrd",	required_argument,	NULL, 'i' },
		{ "append",	required_argument,	NULL, 'a' },
		{ "memory",	required_argument,	NULL, 'm' },
		{ "page-size",	required_argument,	NULL, 'p' },
		{ "no-direct-map", no_argument,		NULL, 'd' },
		{ "vcpus",	required_argument,	NULL, 'v' },
		{ "stats",	required_argument,	NULL, 's' },
		{ "help",	no_argument,		NULL, 'h' },
		{ }
	};
	int opt;

	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (opt) {
		case 'k':
			vm->kernel = optarg;
			break;
		case 'i':
			vm->initrd = optarg;
			break;
		case 'a':
			vm->append = optarg;
			break;
		case 'm':
			vm->mem_size = parse_memory(optarg);
			break;
		case 'p':
			vm->page_size = parse_page_size(optarg);
			break;
		case 'd':
			vm->no_direct_map = true;
			break;
		case 'v':
			vm->nr_vcpus = parse_vcpus(optarg);
			break;
		case 's':
			vm->stats_path = optarg;
			break;
		case 'h':
			print_help();
			exit(EXIT_SUCCESS);
		default:
			fprintf(stderr, "Try '" PROG " --help'.\n");
			exit(EXIT_USAGE);
		}
	}

	if (optind < argc)
		usage_error("'%s' is not an option", argv[optind]);
	if (!vm->kernel)
		usage_error("--kernel is missing");
	if (vm->mem_size % vm->page_size->size)
		usage_error("--memory: not a multiple of the page size, %s",
			    vm->page_size->name);
}

int main(int argc, char **argv)
{
	struct vm vm = {
		.append		= "console=ttyS0 panic=-1",
		.page_size	= &page_sizes[0],
		.mem_size	= 512 * SZ_1M,
		.nr_vcpus	= 1,
		.fd		= -1,
		.lock		= PTHREAD_MUTEX_INITIALIZER,
		.start_ns	= now_ns(),
	};
	struct boot_image *image;
	struct stat st;

	parse_args(&vm, argc, argv);
	if (vm.stats_path) {
		vm.stats = fopen(vm.stats_path, "ae");
		if (!vm.stats)
			usage_error("--stats: %s: %s", vm.stats_path, strerror(errno));
		/* It's written with vm->lock held, which must not take forever. */
		if (fstat(fileno(vm.stats), &st) || !S_ISREG(st.st_mode))
			usage_error("--stats: %s: not a regular file", vm.stats_path);
	}
	image = boot_open(&vm);

	take_sample(&vm, "start");
	probe_kvm(&vm);
	create_memory(&vm);
	create_machine(&vm);
	boot_load(&vm, image);
	create_vcpus(&vm);
	run_vm(&vm);
	destroy_vm(&vm);

	if (vm.stats)
		fclose(vm.stats);
	return vm.status;
}
