// SPDX-License-Identifier: GPL-2.0
/*
 * What firmware and boot loader would do: put a bzImage, an initramfs, a command
 * line and ACPI tables into guest memory, and the vCPUs into the state in which
 * Documentation/arch/x86/boot.rst wants them at the 32-bit entry point.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <asm/bootparam.h>
#include <asm/e820.h>
#include <asm/kvm_para.h>

#include "vmm.h"

/* Guest physical addresses, all in the first MiB, which Linux leaves alone. */
#define BOOT_PARAMS_ADDR	0x7000
#define CMDLINE_ADDR		0x20000
#define LOW_RAM_END		0xa0000
#define ACPI_ADDR		0xe0000

#define BOOT_SIGNATURE		0xaa55
#define HDRS_MAGIC		0x53726448	/* "HdrS" */
#define HDRS_OFFSET		0x1f1
#define HDRS_JUMP_END		0x202		/* the jump is relative to this */
#define MIN_PROTOCOL		0x20a		/* pref_address, init_size */
#define SECTOR_SIZE		512

#define IOAPIC_ADDR		0xfec00000
#define LAPIC_ADDR		0xfee00000
#define SCI_IRQ			9

struct boot_image {
	struct setup_header hdr;
	int kernel_fd;
	int initrd_fd;
	u64 kernel_offset;		/* of the protected-mode part in the file */
	u64 kernel_size;
	u64 kernel_addr;
	u64 initrd_size;
	u64 initrd_addr;
};

static u64 low_mem_end(const struct vm *vm)
{
	return vm->mem_size < PCI_HOLE_START ? vm->mem_size : PCI_HOLE_START;
}

/* Guest memory is one mapping; only its guest physical addresses have a hole. */
static void *low_mem(const struct vm *vm, u64 addr, u64 size)
{
	allocate_memory(vm, addr, size);
	return vm->mem + addr;
}

static int open_image(const char *path, u64 *size)
{
	struct stat st;
	int fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		usage_error("%s: %s", path, strerror(errno));
	if (fstat(fd, &st))
		call_failed("fstat", "%s", path);
	if (!S_ISREG(st.st_mode))
		usage_error("%s: not a regular file", path);

	*size = st.st_size;
	return fd;
}

/*
 * By way of a buffer: some file systems read into memory by get_user_pages(), which
 * refuses memory that is out of the direct map.
 */
static void read_image(int fd, const char *path, void *buf, u64 size, u64 offset)
{
	static u8 chunk[SZ_64K];
	ssize_t n;

	while (size) {
		n = pread(fd, chunk, size < sizeof(chunk) ? size : sizeof(chunk), offset);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			call_failed("pread", "%s", path);
		if (!n)
			usage_error("%s: the file ends too early", path);
		memcpy(buf, chunk, n);
		buf = (u8 *)buf + n;
		offset += n;
		size -= n;
	}
}

static void parse_bzimage(const char *path, struct boot_image *image, u64 file_size)
{
	struct setup_header *hdr = &image->hdr;
	unsigned int setup_sects;
	size_t hdr_size;

	if (file_size < HDRS_OFFSET + sizeof(*hdr))
		usage_error("%s: not a bzImage: only %llu bytes", path,
			    (unsigned long long)file_size);

	read_image(image->kernel_fd, path, hdr, sizeof(*hdr), HDRS_OFFSET);
	if (hdr->boot_flag != BOOT_SIGNATURE || hdr->header != HDRS_MAGIC)
		usage_error("%s: not a bzImage: use arch/x86/boot/bzImage, not vmlinux", path);
	if (hdr->version < MIN_PROTOCOL || !(hdr->loadflags & LOADED_HIGH))
		usage_error("%s: boot protocol %u.%02u is too old, 2.10 is needed", path,
			    hdr->version >> 8, hdr->version & 0xff);
	if (hdr->pref_address < SZ_1M || hdr->pref_address >= PCI_HOLE_START)
		usage_error("%s: wants to be loaded at %#llx, outside low memory", path,
			    (unsigned long long)hdr->pref_address);

	/* An older kernel's header is shorter, and what follows it is code. */
	hdr_size = HDRS_JUMP_END + (hdr->jump >> 8) - HDRS_OFFSET;
	if (hdr_size < sizeof(*hdr))
		memset((u8 *)hdr + hdr_size, 0, sizeof(*hdr) - hdr_size);

	setup_sects = hdr->setup_sects ?: 4;
	image->kernel_offset = (setup_sects + 1) * SECTOR_SIZE;
	if (image->kernel_offset >= file_size)
		usage_error("%s: the file ends before the kernel begins", path);
	image->kernel_size = file_size - image->kernel_offset;
	image->kernel_addr = hdr->pref_address;
}

/* Everything that can be wrong with the files, before there is a VM. */
struct boot_image *boot_open(const struct vm *vm)
{
	u64 file_size, kernel_end, initrd_size, initrd_max;
	struct boot_image *image;
	struct setup_header *hdr;

	image = calloc(1, sizeof(*image));
	if (!image)
		call_failed("calloc", NULL);
	hdr = &image->hdr;
	image->initrd_fd = -1;

	image->kernel_fd = open_image(vm->kernel, &file_size);
	parse_bzimage(vm->kernel, image, file_size);

	/* init_size is what the kernel needs before it has a memory allocator. */
	kernel_end = image->kernel_size;
	if (kernel_end < hdr->init_size)
		kernel_end = hdr->init_size;
	kernel_end += image->kernel_addr;

	if (vm->initrd) {
		image->initrd_fd = open_image(vm->initrd, &image->initrd_size);
		if (!image->initrd_size)
			usage_error("%s: the file is empty", vm->initrd);
	}

	/* Memory above what the kernel takes for an initrd is of no use here. */
	initrd_max = low_mem_end(vm);
	if (initrd_max > (u64)hdr->initrd_addr_max + 1)
		initrd_max = ALIGN_DOWN((u64)hdr->initrd_addr_max + 1, SZ_4K);
	initrd_size = ALIGN(image->initrd_size, SZ_4K);
	if (kernel_end + initrd_size > initrd_max)
		usage_error("--memory: kernel and initrd need %lluM, and can use %lluM",
			    (unsigned long long)(kernel_end + initrd_size + SZ_1M - 1) / SZ_1M,
			    (unsigned long long)initrd_max / SZ_1M);
	image->initrd_addr = initrd_max - initrd_size;

	if (strlen(vm->append) > hdr->cmdline_size)
		usage_error("--append: %zu bytes, this kernel takes %u", strlen(vm->append),
			    hdr->cmdline_size);
	return image;
}

static void add_e820(struct boot_params *bp, u64 start, u64 end, u32 type)
{
	struct boot_e820_entry *entry = &bp->e820_table[bp->e820_entries++];

	entry->addr = start;
	entry->size = end - start;
	entry->type = type;
}

/*
 * ACPI: just enough to enumerate the CPUs, to power off and to reset.
 */

struct acpi_header {
	char signature[4];
	u32 length;
	u8 revision;
	u8 checksum;
	char oem_id[6];
	char oem_table_id[8];
	u32 oem_revision;
	char creator_id[4];
	u32 creator_revision;
} __packed;

struct acpi_rsdp {
	char signature[8];
	u8 checksum;
	char oem_id[6];
	u8 revision;
	u32 rsdt_addr;
	u32 length;
	u64 xsdt_addr;
	u8 ext_checksum;
	u8 reserved[3];
} __packed;

struct acpi_address {
	u8 space_id;
	u8 bit_width;
	u8 bit_offset;
	u8 access_width;
	u64 address;
} __packed;

struct acpi_facs {
	char signature[4];
	u32 length;
	u8 zero[24];
	u8 version;
	u8 reserved[31];
} __packed;

struct acpi_fadt {
	struct acpi_header header;
	u32 facs;
	u32 dsdt;
	u8 reserved1[2];
	u16 sci_irq;
	u8 no_smi[8];
	u32 pm1a_event;
	u32 pm1b_event;
	u32 pm1a_control;
	u8 no_pm2_timer_gpe[20];
	u8 pm1_event_len;
	u8 pm1_control_len;
	u8 no_lengths[6];
	u16 c2_latency;
	u16 c3_latency;
	u8 no_throttling[9];
	u16 boot_flags;
	u8 reserved2;
	u32 flags;
	struct acpi_address reset_reg;
	u8 reset_value;
	u8 reserved3[3];
	u64 x_facs;
	u64 x_dsdt;
	struct acpi_address x_unused[10];
	u64 hypervisor_id;
} __packed;

#define FADT_BOOT_LEGACY_DEVICES	BIT(0)
#define FADT_BOOT_NO_VGA		BIT(2)
#define FADT_BOOT_NO_CMOS_RTC		BIT(5)

#define FADT_WBINVD			BIT(0)
#define FADT_NO_POWER_BUTTON		BIT(4)
#define FADT_NO_SLEEP_BUTTON		BIT(5)
#define FADT_RESET_REG			BIT(10)

#define ACPI_SPACE_IO			1
#define ACPI_NO_C_STATE			0xffff

struct acpi_madt {
	struct acpi_header header;
	u32 lapic_addr;
	u32 flags;
} __packed;

struct acpi_madt_lapic {
	u8 type;
	u8 length;
	u8 uid;
	u8 apic_id;
	u32 flags;
} __packed;

struct acpi_madt_ioapic {
	u8 type;
	u8 length;
	u8 id;
	u8 reserved;
	u32 address;
	u32 gsi_base;
} __packed;

struct acpi_xsdt {
	struct acpi_header header;
	u64 fadt;
	u64 madt;
} __packed;

struct acpi_dsdt {
	struct acpi_header header;
	u8 aml[13];
} __packed;

/* The FACS is aligned to 64 bytes, and the size of the MADT depends on the vCPUs. */
struct acpi_tables {
	struct acpi_rsdp rsdp;
	u8 pad[64 - sizeof(struct acpi_rsdp)];
	struct acpi_facs facs;
	struct acpi_fadt fadt;
	struct acpi_dsdt dsdt;
	struct acpi_xsdt xsdt;
	struct acpi_madt madt;
} __packed;

static u8 checksum(const void *buf, size_t len)
{
	const u8 *p = buf;
	u8 sum = 0;

	while (len--)
		sum -= *p++;
	return sum;
}

static void finish_table(void *table, const char *signature, u8 revision, size_t len)
{
	struct acpi_header *header = table;

	memcpy(header->signature, signature, sizeof(header->signature));
	header->length = len;
	header->revision = revision;
	memcpy(header->oem_id, "LINUX ", sizeof(header->oem_id));
	memcpy(header->oem_table_id, "GMEMVMM ", sizeof(header->oem_table_id));
	header->oem_revision = 1;
	memcpy(header->creator_id, "VMM ", sizeof(header->creator_id));
	header->creator_revision = 1;
	header->checksum = 0;
	header->checksum = checksum(table, len);
}

static void build_dsdt(struct acpi_dsdt *dsdt)
{
	/* Name(_S5_, Package(4) { ACPI_S5_SLP_TYP, 0, 0, 0 }): how to power off */
	static const u8 s5[] = {
		0x08, '_', 'S', '5', '_', 0x12, 0x07, 0x04, 0x0a, ACPI_S5_SLP_TYP, 0, 0, 0,
	};

	memcpy(dsdt->aml, s5, sizeof(s5));
	finish_table(dsdt, "DSDT", 2, sizeof(*dsdt));
}

static void build_fadt(struct acpi_fadt *fadt, u64 facs, u64 dsdt)
{
	fadt->facs = facs;
	fadt->dsdt = dsdt;
	fadt->x_dsdt = dsdt;
	fadt->sci_irq = SCI_IRQ;
	fadt->pm1a_event = ACPI_PM1_STATUS;
	fadt->pm1_event_len = 4;
	fadt->pm1a_control = ACPI_PM1_CONTROL;
	fadt->pm1_control_len = 2;
	fadt->c2_latency = ACPI_NO_C_STATE;
	fadt->c3_latency = ACPI_NO_C_STATE;
	fadt->boot_flags = FADT_BOOT_LEGACY_DEVICES | FADT_BOOT_NO_VGA | FADT_BOOT_NO_CMOS_RTC;
	fadt->flags = FADT_WBINVD | FADT_NO_POWER_BUTTON | FADT_NO_SLEEP_BUTTON | FADT_RESET_REG;
	fadt->reset_reg.space_id = ACPI_SPACE_IO;
	fadt->reset_reg.bit_width = 8;
	fadt->reset_reg.access_width = 1;
	fadt->reset_reg.address = ACPI_RESET_PORT;
	fadt->reset_value = ACPI_RESET_VALUE;
	finish_table(fadt, "FACP", 6, sizeof(*fadt));
}

static void build_madt(struct acpi_madt *madt, unsigned int nr_vcpus)
{
	struct acpi_madt_lapic *lapic = (void *)(madt + 1);
	struct acpi_madt_ioapic *ioapic;
	unsigned int i;

	madt->lapic_addr = LAPIC_ADDR;
	madt->flags = 1;	/* there are 8259s as well */

	for (i = 0; i < nr_vcpus; i++, lapic++) {
		lapic->length = sizeof(*lapic);
		lapic->uid = i;
		lapic->apic_id = i;
		lapic->flags = 1;
	}

	/* KVM's default routing has ISA interrupt n on pin n: no overrides. */
	ioapic = (void *)lapic;
	ioapic->type = 1;
	ioapic->length = sizeof(*ioapic);
	ioapic->address = IOAPIC_ADDR;
	ioapic++;

	finish_table(madt, "APIC", 5, (u8 *)ioapic - (u8 *)madt);
}

static u64 table_addr(const struct vm *vm, const void *table)
{
	return (const u8 *)table - vm->mem;
}

static void build_acpi(struct vm *vm)
{
	struct acpi_tables *t = low_mem(vm, ACPI_ADDR, sizeof(*t) +
					vm->nr_vcpus * sizeof(struct acpi_madt_lapic) +
					sizeof(struct acpi_madt_ioapic));

	memcpy(t->facs.signature, "FACS", sizeof(t->facs.signature));
	t->facs.length = sizeof(t->facs);
	t->facs.version = 2;
	build_dsdt(&t->dsdt);
	build_fadt(&t->fadt, table_addr(vm, &t->facs), table_addr(vm, &t->dsdt));
	build_madt(&t->madt, vm->nr_vcpus);

	t->xsdt.fadt = table_addr(vm, &t->fadt);
	t->xsdt.madt = table_addr(vm, &t->madt);
	finish_table(&t->xsdt, "XSDT", 1, sizeof(t->xsdt));

	memcpy(t->rsdp.signature, "RSD PTR ", sizeof(t->rsdp.signature));
	memcpy(t->rsdp.oem_id, "LINUX ", sizeof(t->rsdp.oem_id));
	t->rsdp.revision = 2;
	t->rsdp.length = sizeof(t->rsdp);
	t->rsdp.xsdt_addr = table_addr(vm, &t->xsdt);
	t->rsdp.checksum = checksum(&t->rsdp, offsetof(struct acpi_rsdp, length));
	t->rsdp.ext_checksum = checksum(&t->rsdp, sizeof(t->rsdp));
}

/* Guest memory reads as zeros until it is written: only say what is not zero. */
void boot_load(struct vm *vm, struct boot_image *image)
{
	struct boot_params *bp = low_mem(vm, BOOT_PARAMS_ADDR, sizeof(*bp));
	size_t cmdline_size = strlen(vm->append) + 1;

	read_image(image->kernel_fd, vm->kernel,
		   low_mem(vm, image->kernel_addr, image->kernel_size),
		   image->kernel_size, image->kernel_offset);
	close(image->kernel_fd);

	bp->hdr = image->hdr;
	bp->hdr.type_of_loader = 0xff;
	bp->hdr.code32_start = image->kernel_addr;
	bp->hdr.cmd_line_ptr = CMDLINE_ADDR;
	memcpy(low_mem(vm, CMDLINE_ADDR, cmdline_size), vm->append, cmdline_size);

	if (image->initrd_size) {
		read_image(image->initrd_fd, vm->initrd,
			   low_mem(vm, image->initrd_addr, image->initrd_size),
			   image->initrd_size, 0);
		close(image->initrd_fd);
		bp->hdr.ramdisk_image = image->initrd_addr;
		bp->hdr.ramdisk_size = image->initrd_size;
	}

	add_e820(bp, 0, LOW_RAM_END, E820_RAM);
	add_e820(bp, LOW_RAM_END, SZ_1M, E820_RESERVED);
	add_e820(bp, SZ_1M, low_mem_end(vm), E820_RAM);
	if (vm->mem_size > PCI_HOLE_START)
		add_e820(bp, SZ_4G, SZ_4G + vm->mem_size - PCI_HOLE_START, E820_RAM);

	build_acpi(vm);
	bp->acpi_rsdp_addr = ACPI_ADDR;

	free(image);
}

/*
 * What KVM does to guest memory by page rather than by userspace_addr needs the
 * host's direct map: updating kvm-clock, and reading the structures of a nested
 * guest.  Neither fails at once, so the guest must not be led to try.
 */
static void hide_direct_map_users(struct kvm_cpuid_entry2 *entry)
{
	switch (entry->function) {
	case 0x1:
		entry->ecx &= ~BIT(5);		/* VMX */
		break;
	case KVM_CPUID_FEATURES:
		entry->eax &= ~(BIT(KVM_FEATURE_CLOCKSOURCE) |
				BIT(KVM_FEATURE_CLOCKSOURCE2) |
				BIT(KVM_FEATURE_CLOCKSOURCE_STABLE_BIT));
		break;
	case 0x80000001:
		entry->ecx &= ~BIT(2);		/* SVM */
		break;
	case 0x8000000a:
		entry->eax = 0;
		entry->ebx = 0;
		entry->ecx = 0;
		entry->edx = 0;
		break;
	}
}

/*
 * One package of nr_vcpus cores without threads, with the vCPU's index as its
 * APIC ID.  All else is as KVM supports it on this host.
 */
static void setup_cpuid(struct vm *vm, int vcpu_fd, unsigned int apic_id)
{
	unsigned int last_core = vm->nr_vcpus - 1;
	struct kvm_cpuid_entry2 *entry;
	struct kvm_cpuid2 *cpuid;
	const int max = 256;

	cpuid = calloc(1, sizeof(*cpuid) + max * sizeof(*entry));
	if (!cpuid)
		call_failed("calloc", NULL);

	cpuid->nent = max;
	if (ioctl(vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid))
		call_failed("KVM_GET_SUPPORTED_CPUID", NULL);

	for (entry = cpuid->entries; entry < cpuid->entries + cpuid->nent; entry++) {
		if (vm->no_direct_map)
			hide_direct_map_users(entry);

		switch (entry->function) {
		case 0x1:
			entry->ebx &= 0xffff;
			entry->ebx |= apic_id << 24 | vm->nr_vcpus << 16;
			if (last_core)
				entry->edx |= BIT(28);	/* HTT: more than one */
			break;
		case 0x4:
			entry->eax &= ~(0x3fU << 26);
			entry->eax |= (last_core < 0x3f ? last_core : 0x3f) << 26;
			break;
		case 0xb:
		case 0x1f:
			entry->edx = apic_id;
			break;
		case 0x80000008:
			entry->ecx &= ~0xffffU;
			entry->ecx |= last_core;
			break;
		case 0x8000001e:
			entry->eax = apic_id;
			entry->ebx = apic_id;
			break;
		}
	}

	if (ioctl(vcpu_fd, KVM_SET_CPUID2, cpuid))
		call_failed("KVM_SET_CPUID2", NULL);
	free(cpuid);
}

static void set_flat_segment(struct kvm_segment *seg, u16 selector, u8 type)
{
	*seg = (struct kvm_segment) {
		.limit		= 0xffffffff,
		.selector	= selector,
		.type		= type,
		.present	= 1,
		.db		= 1,
		.s		= 1,
		.g		= 1,
	};
}

void boot_setup_vcpu(struct vm *vm, int vcpu_fd, unsigned int apic_id)
{
	struct boot_params *bp = low_mem(vm, BOOT_PARAMS_ADDR, sizeof(*bp));
	struct kvm_regs regs = {
		.rip	= bp->hdr.code32_start,
		.rsi	= BOOT_PARAMS_ADDR,
		.rflags	= 2,
	};
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entry;
	} mtrr = {
		.header.nmsrs = 1,
		/* MTRRs on, and all memory write-back but what the guest sets */
		.entry = { .index = 0x2ff, .data = 0x806 },
	};
	struct kvm_sregs sregs;

	setup_cpuid(vm, vcpu_fd, apic_id);
	errno = EINVAL;		/* for 0, the number of MSRs that were set */
	if (ioctl(vcpu_fd, KVM_SET_MSRS, &mtrr) != 1)
		call_failed("KVM_SET_MSRS", "MTRR default type");

	/* The others wait for INIT and SIPI from the first. */
	if (apic_id)
		return;

	if (ioctl(vcpu_fd, KVM_GET_SREGS, &sregs))
		call_failed("KVM_GET_SREGS", NULL);
	set_flat_segment(&sregs.cs, 0x10, 0xb);
	set_flat_segment(&sregs.ds, 0x18, 0x3);
	sregs.es = sregs.ds;
	sregs.fs = sregs.ds;
	sregs.gs = sregs.ds;
	sregs.ss = sregs.ds;
	sregs.cr0 |= 1;		/* protected mode, no paging */
	if (ioctl(vcpu_fd, KVM_SET_SREGS, &sregs))
		call_failed("KVM_SET_SREGS", NULL);
	if (ioctl(vcpu_fd, KVM_SET_REGS, &regs))
		call_failed("KVM_SET_REGS", NULL);
}
