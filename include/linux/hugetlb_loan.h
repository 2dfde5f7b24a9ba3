/* SPDX-License-Identifier: GPL-2.0 */
/*
 * HugeTLB folios on loan to files outside of hugetlbfs.
 */
#ifndef _LINUX_HUGETLB_LOAN_H
#define _LINUX_HUGETLB_LOAN_H

#include <linux/fs.h>
#include <linux/hugetlb_inline.h>
#include <linux/mm.h>
#include <linux/types.h>

struct address_space;
struct folio;
struct hstate;
struct hugepage_subpool;
struct hugetlb_cgroup;
struct mempolicy;
struct vm_fault;

/**
 * struct hugetlb_loan - A file's claim on a HugeTLB pool
 * @hstate: The pool, i.e. the huge page size.  NULL if there is no loan.
 * @subpool: Holds the reservation.  Outlives the loan for as long as a folio
 *	that was taken through it, and was not replaced, is in use.
 * @reservation_cgroup: The HugeTLB cgroup that is charged for the reservation.
 *	NULL if HugeTLB cgroups are disabled.
 */
struct hugetlb_loan {
	struct hstate *hstate;
	struct hugepage_subpool *subpool;
	struct hugetlb_cgroup *reservation_cgroup;
};

/*
 * A VMA that names the page size it is mapped with, and has a ->huge_fault() to
 * go with it, can't be mapped with anything else.  There is no choice to be made
 * by THP policy, and nothing to fall back to.  DAX falls back to small pages.
 *
 * Files with folios on loan are the only ones that have such VMAs: whatever deals
 * with HugeTLB VMAs in a special way because of what is in them, and not because
 * of how it's mapped, is to do the same with these.
 */
static inline bool vma_maps_one_huge_size(const struct vm_area_struct *vma)
{
	return vma->vm_ops && vma->vm_ops->huge_fault && vma->vm_ops->pagesize &&
	       !vma_is_dax(vma);
}

/*
 * Every entry of such a VMA maps a HugeTLB folio as a whole, if it maps anything,
 * and is where huge_pte_offset() finds it.
 */
static inline bool vma_maps_hugetlb(const struct vm_area_struct *vma)
{
	return is_vm_hugetlb_page(vma) || vma_maps_one_huge_size(vma);
}

int hugetlb_loan_open(struct hugetlb_loan *loan, unsigned int page_size_log,
		      loff_t size);
void hugetlb_loan_close(struct hugetlb_loan *loan);
u64 hugetlb_loan_reserved(const struct hugetlb_loan *loan);
struct folio *hugetlb_loan_get_folio(struct hugetlb_loan *loan,
				     struct address_space *mapping,
				     pgoff_t index, struct mempolicy *policy,
				     bool strict, int state);
void hugetlb_loan_return_folios(struct address_space *mapping,
				pgoff_t start, pgoff_t end);
bool hugetlb_loan_can_map(const struct hugetlb_loan *loan);
vm_fault_t hugetlb_loan_map_folio(struct hugetlb_loan *loan,
				  struct vm_fault *vmf, struct folio *folio);

#endif /* _LINUX_HUGETLB_LOAN_H */
