/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_GUEST_MEMFD_HUGETLB_H__
#define __KVM_GUEST_MEMFD_HUGETLB_H__

#include <linux/hugetlb.h>

#include "guest_memfd.h"

/* Constant if the kernel is built without HugeTLB, callers need no #ifdef. */
static inline bool kvm_gmem_is_hugetlb(struct inode *inode)
{
	return IS_ENABLED(CONFIG_KVM_GUEST_MEMFD_HUGETLB) &&
	       GMEM_I(inode)->hugetlb.hstate;
}

/* Size of the file's pages, in bytes. */
static inline unsigned long kvm_gmem_page_size(struct inode *inode)
{
	if (kvm_gmem_is_hugetlb(inode))
		return huge_page_size(GMEM_I(inode)->hugetlb.hstate);

	return PAGE_SIZE;
}

/* Memory that the file will get for sure when it needs it, in bytes. */
static inline u64 kvm_gmem_reserved(struct inode *inode)
{
	if (kvm_gmem_is_hugetlb(inode))
		return hugetlb_loan_reserved(&GMEM_I(inode)->hugetlb);

	return 0;
}

int kvm_gmem_hugetlb_init_inode(struct inode *inode);
int kvm_gmem_hugetlb_mmap(struct file *file, struct vm_area_struct *vma);
unsigned long kvm_gmem_hugetlb_get_unmapped_area(struct file *file,
						 unsigned long addr,
						 unsigned long len,
						 unsigned long pgoff,
						 unsigned long flags);
vm_fault_t kvm_gmem_hugetlb_fault(struct vm_fault *vmf, unsigned int order);
int kvm_gmem_hugetlb_may_split(struct vm_area_struct *vma, unsigned long addr);
unsigned long kvm_gmem_hugetlb_vma_page_size(struct vm_area_struct *vma);

#endif /* __KVM_GUEST_MEMFD_HUGETLB_H__ */
