/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Whether memory is in the kernel's direct map
 */
#ifndef SELFTEST_KVM_GUEST_MEMFD_DIRECT_MAP_H
#define SELFTEST_KVM_GUEST_MEMFD_DIRECT_MAP_H

#include <linux/elf.h>

#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "test_util.h"

static struct {
	Elf64_Phdr segments[64];
	int nr_segments;
	u64 base;
	int fd;
} kcore = { .fd = -1 };

/* Segments of RAM have a physical address.  So has the kernel's image. */
static inline void kcore_open(void)
{
	Elf64_Ehdr header;
	Elf64_Phdr segment;
	int i;

	if (kcore.fd >= 0)
		return;

	kcore.fd = open_path_or_exit("/proc/kcore", O_RDONLY);
	TEST_ASSERT_EQ(pread(kcore.fd, &header, sizeof(header), 0), sizeof(header));
	for (i = 0; i < header.e_phnum; i++) {
		TEST_ASSERT_EQ(pread(kcore.fd, &segment, sizeof(segment),
				     header.e_phoff + i * sizeof(segment)), sizeof(segment));
		if (segment.p_type != PT_LOAD || segment.p_paddr == -1ul ||
		    segment.p_vaddr >= 0xffffffff80000000ul)
			continue;
		TEST_ASSERT(kcore.nr_segments < ARRAY_SIZE(kcore.segments), "Too many segments");
		kcore.segments[kcore.nr_segments++] = segment;
		kcore.base = segment.p_vaddr - segment.p_paddr;
	}
	TEST_ASSERT(kcore.nr_segments, "No memory in /proc/kcore");
}

static inline void kcore_read(u64 phys, void *buf, size_t size)
{
	ssize_t r;
	int i;

	kcore_open();
	for (i = 0; i < kcore.nr_segments; i++) {
		Elf64_Phdr *segment = &kcore.segments[i];

		if (phys < segment->p_paddr || phys + size > segment->p_paddr + segment->p_memsz)
			continue;

		r = pread(kcore.fd, buf, size, segment->p_offset + phys - segment->p_paddr);
		TEST_ASSERT(r == size, "Read %ld of %lu bytes at 0x%lx", r, size,
			    (unsigned long)phys);
		return;
	}
	TEST_FAIL("0x%lx is not in /proc/kcore", (unsigned long)phys);
}

static inline u64 kcore_read_u64(u64 phys)
{
	u64 value;

	kcore_read(phys, &value, sizeof(value));
	return value;
}

static inline const char *no_direct_map_missing(void)
{
	if (!(kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_NO_DIRECT_MAP))
		return "no GUEST_MEMFD_FLAG_NO_DIRECT_MAP";
	if (access("/proc/kcore", R_OK))
		return "no /proc/kcore, or no right to read it";
	return NULL;
}

#endif /* SELFTEST_KVM_GUEST_MEMFD_DIRECT_MAP_H */
