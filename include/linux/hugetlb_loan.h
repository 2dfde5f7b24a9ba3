/* SPDX-License-Identifier: GPL-2.0 */
/*
 * HugeTLB folios on loan to files outside of hugetlbfs.
 */
#ifndef _LINUX_HUGETLB_LOAN_H
#define _LINUX_HUGETLB_LOAN_H

#include <linux/mm_types.h>
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
 *	that was taken through it is pinned.
 * @reservation_cgroup: The HugeTLB cgroup that is charged for the reservation.
 *	NULL if HugeTLB cgroups are disabled.
 */
struct hugetlb_loan {
	struct hstate *hstate;
	struct hugepage_subpool *subpool;
	struct hugetlb_cgroup *reservation_cgroup;
};

int hugetlb_loan_open(struct hugetlb_loan *loan, unsigned int page_size_log,
		      loff_t size);
void hugetlb_loan_close(struct hugetlb_loan *loan);
struct folio *hugetlb_loan_get_folio(struct hugetlb_loan *loan,
				     struct address_space *mapping,
				     pgoff_t index, struct mempolicy *policy);
void hugetlb_loan_return_folios(struct address_space *mapping,
				pgoff_t start, pgoff_t end);
bool hugetlb_loan_can_map(const struct hugetlb_loan *loan);
vm_fault_t hugetlb_loan_map_folio(struct hugetlb_loan *loan,
				  struct vm_fault *vmf, struct folio *folio);

#endif /* _LINUX_HUGETLB_LOAN_H */
