/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the three parts of guest_memfd_vmm share.
 */
#ifndef GUEST_MEMFD_VMM_H
#define GUEST_MEMFD_VMM_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/types.h>

#include <linux/align.h>
#include <linux/bits.h>
#include <linux/compiler.h>
#include <linux/kernel.h>
#include <linux/kvm.h>
#include <linux/sizes.h>
#include <linux/types.h>

/*
 * Guest memory below 4G ends here; the local APICs, the I/O APIC and the pages
 * that KVM needs for itself on Intel live in the hole.  A multiple of 1G, so
 * that what comes after it keeps its alignment in the file as well.
 */
#define PCI_HOLE_START	(3ULL * SZ_1G)

enum exit_status {
	EXIT_POWEROFF	= 0,	/* the guest powered off */
	EXIT_VMM	= 1,	/* a call failed, or KVM cannot run the guest */
	EXIT_USAGE	= 2,	/* the arguments make no sense */
	EXIT_RESET	= 3,	/* reboot, panic or triple fault of the guest */
	EXIT_ENDED	= 4,	/* ended by a signal or from the terminal */
};

struct serial {
	u8 ier, lcr, mcr, scr, fcr, dll, dlm;
	bool thr_pending;
	bool irq_level;
	unsigned int rx_head, rx_tail;
	u8 rx[256];
};

struct page_size {
	const char *name;
	u64 size;
	u64 flags;
};

struct boot_image;

struct vm {
	const char *kernel;
	const char *initrd;
	const char *append;
	const char *stats_path;
	const struct page_size *page_size;
	u64 mem_size;
	bool no_direct_map;
	unsigned int nr_vcpus;

	int kvm_fd;
	int fd;
	int gmem_fd;
	u8 *mem;
	struct vcpu *vcpus;

	pthread_mutex_t lock;		/* the UART and the milestones */
	atomic_bool stopping;
	enum exit_status status;	/* of whoever set stopping */
	int stop_fd;

	struct serial serial;
	u16 pm1_enable;			/* kept because Linux reads it back */
	unsigned int milestones;
	FILE *stats;
	u64 start_ns;
};

/* guest_memfd_vmm.c */
__printf(1, 2) __noreturn
void usage_error(const char *fmt, ...);
__printf(2, 3) __noreturn
void call_failed(const char *call, const char *hint, ...);
void allocate_memory(const struct vm *vm, u64 offset, u64 size);
void vm_stop(struct vm *vm, enum exit_status status);
void vm_milestone(struct vm *vm);

/* boot_x86.c */
struct boot_image *boot_open(const struct vm *vm);
void boot_load(struct vm *vm, struct boot_image *image);
void boot_setup_vcpu(struct vm *vm, int vcpu_fd, unsigned int apic_id);

#define ACPI_PM1_STATUS		0x600
#define ACPI_PM1_ENABLE		0x602
#define ACPI_PM1_CONTROL	0x604
#define ACPI_PM1_SCI_EN		BIT(0)
#define ACPI_PM1_SLP_TYP(val)	(((val) >> 10) & 7)
#define ACPI_PM1_SLP_EN		BIT(13)
#define ACPI_S5_SLP_TYP		5
#define ACPI_RESET_PORT		0x64	/* as if an i8042 pulsed the reset line */
#define ACPI_RESET_VALUE	0xfe

/* serial.c */
#define SERIAL_PORT		0x3f8
#define SERIAL_NR_PORTS		8
#define SERIAL_IRQ		4

u8 serial_in(struct vm *vm, unsigned int reg);
void serial_out(struct vm *vm, unsigned int reg, u8 val);
unsigned int serial_rx_room(struct vm *vm);
void serial_receive(struct vm *vm, const u8 *buf, unsigned int len);

#endif
