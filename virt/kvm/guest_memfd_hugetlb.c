// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files that are backed by HugeTLB.
 *
 * The file's folios are on loan from a HugeTLB pool, see mm/hugetlb_loan.c.  What
 * is here makes a file HugeTLB-backed, and maps its folios to user space.
 */
#include <linux/hugetlb.h>
#include <linux/hugetlb_loan.h>
#include <linux/kvm_host.h>
#include <linux/mman.h>
#include <linux/pagemap.h>

#include "guest_memfd.h"
#include "guest_memfd_hugetlb.h"

/*
 * Reserve all of the file's memory.  On failure, and when the inode is destroyed,
 * the reservation is given up by kvm_gmem_destroy_inode().
 */
int kvm_gmem_hugetlb_init_inode(struct inode *inode)
{
	struct gmem_inode *gi = GMEM_I(inode);
	int r;

	r = hugetlb_loan_open(&gi->hugetlb,
			      (gi->flags >> GUEST_MEMFD_HUGE_SHIFT) &
			      GUEST_MEMFD_HUGE_MASK, inode->i_size);
	if (r)
		return r;

	if ((gi->flags & GUEST_MEMFD_FLAG_MMAP) &&
	    !hugetlb_loan_can_map(&gi->hugetlb))
		return -EINVAL;

	return 0;
}

int kvm_gmem_hugetlb_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct inode *inode = file_inode(file);

	if (!IS_ALIGNED(vma->vm_start | vma->vm_end | (vma->vm_pgoff << PAGE_SHIFT),
			kvm_gmem_page_size(inode)))
		return -EINVAL;

	/*
	 * As for hugetlbfs.  Apart from mremap() and GUP, which ask for the page
	 * size, this keeps away whatever puts page tables where a huge entry is
	 * to go, e.g. guard regions, and what expects folios to be on the LRU,
	 * e.g. mlock() and khugepaged.
	 */
	vm_flags_set(vma, VM_DONTEXPAND);
	return 0;
}

unsigned long kvm_gmem_hugetlb_get_unmapped_area(struct file *file,
						 unsigned long addr,
						 unsigned long len,
						 unsigned long pgoff,
						 unsigned long flags)
{
	struct inode *inode = file_inode(file);
	unsigned long page_size = kvm_gmem_page_size(inode);
	unsigned long area;

	/* Also reached for mremap(), which doesn't call ->mmap(). */
	if (!IS_ALIGNED(len | (pgoff << PAGE_SHIFT), page_size))
		return -EINVAL;

	if (flags & MAP_FIXED)
		return IS_ALIGNED(addr, page_size) ? addr : -EINVAL;

	if (len + page_size < len)
		return -ENOMEM;

	/* There is an aligned area in any area that is larger by one page. */
	area = mm_get_unmapped_area(file, ALIGN(addr, page_size),
				    len + page_size - PAGE_SIZE, pgoff, flags);
	if (IS_ERR_VALUE(area))
		return area;

	return ALIGN(area, page_size);
}

vm_fault_t kvm_gmem_hugetlb_fault(struct vm_fault *vmf, unsigned int order)
{
	struct hugetlb_loan *loan = &GMEM_I(file_inode(vmf->vma->vm_file))->hugetlb;
	struct folio *folio;
	vm_fault_t ret;

	if (order != huge_page_order(loan->hstate))
		return VM_FAULT_FALLBACK;

	/*
	 * -ENOMEM is not VM_FAULT_OOM: the OOM killer can't do anything about a
	 * lack of huge pages, and to retry would be in vain.
	 */
	folio = kvm_gmem_get_user_folio(vmf);
	if (IS_ERR(folio))
		return VM_FAULT_SIGBUS;

	ret = hugetlb_loan_map_folio(loan, vmf, folio);

	folio_unlock(folio);
	folio_put(folio);
	return ret;
}

int kvm_gmem_hugetlb_may_split(struct vm_area_struct *vma, unsigned long addr)
{
	return IS_ALIGNED(addr, kvm_gmem_hugetlb_vma_page_size(vma)) ? 0 : -EINVAL;
}

unsigned long kvm_gmem_hugetlb_vma_page_size(struct vm_area_struct *vma)
{
	return kvm_gmem_page_size(file_inode(vma->vm_file));
}
