// SPDX-License-Identifier: GPL-2.0
/*
 * HugeTLB folios on loan to files outside of hugetlbfs.
 *
 * A file that wants its memory from a HugeTLB pool opens a loan, which reserves
 * every huge page of the file, takes folios against that reservation, and gives
 * them back by removing them from its page cache.
 *
 * A folio on loan stays what it is, a HugeTLB folio of its pool, at all times:
 * whoever drops the last reference, e.g. the owner of a pin which outlived the
 * file, returns the folio to the pool through free_huge_folio(), and there is
 * nothing that would have to be undone before.  This file is never modular for
 * the same reason, the last reference may well go after the borrower's module.
 *
 * What a loan changes is how a folio may be mapped.  The borrower's VMAs are
 * not HugeTLB VMAs, a folio is mapped there as a whole, by an ordinary PMD or
 * PUD entry, which is accounted in the folio's first pages and never touches
 * the (possibly optimized away) struct pages behind them.  HugeTLB's own rmap
 * code can't deal with such entries, folio_test_hugetlb_on_loan() tells.
 */
#include <linux/delay.h>
#include <linux/direct_map.h>
#include <linux/error-injection.h>
#include <linux/hugetlb.h>
#include <linux/hugetlb_cgroup.h>
#include <linux/hugetlb_loan.h>
#include <linux/mempolicy.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>

#include "hugetlb_internal.h"
#include "internal.h"

/**
 * hugetlb_loan_open - Reserve huge pages for a file
 * @loan: The loan to set up, zeroed.
 * @page_size_log: log2 of the huge page size in bytes, or 0 for the default
 *	huge page size.
 * @size: Size of the file, in bytes.
 *
 * The reservation follows the rules of hugetlbfs: pages that the pool lacks may
 * be allocated as surplus pages, up to nr_overcommit_hugepages, and the whole
 * reservation is charged to the current task's HugeTLB cgroup.
 *
 * Context: May sleep.  Takes hugetlb_lock.
 * Return: 0 on success, -EINVAL if the system has no such huge pages or if @size
 * isn't a positive multiple of the huge page size, and -ENOMEM if the pool or
 * the cgroup can't take the reservation.  Nothing is reserved on failure.
 */
int hugetlb_loan_open(struct hugetlb_loan *loan, unsigned int page_size_log,
		      loff_t size)
{
	struct hugetlb_cgroup *reservation_cgroup = NULL;
	struct hugepage_subpool *subpool;
	unsigned long nr_huge_pages;
	struct hstate *h;

	if (!hugepages_supported())
		return -EINVAL;

	h = hstate_sizelog(page_size_log);
	if (!h)
		return -EINVAL;

	if (size <= 0 || !IS_ALIGNED(size, huge_page_size(h)))
		return -EINVAL;

	nr_huge_pages = size >> huge_page_shift(h);

	if (hugetlb_cgroup_charge_cgroup_rsvd(hstate_index(h), size >> PAGE_SHIFT,
					      &reservation_cgroup))
		return -ENOMEM;

	/*
	 * The maximum is the minimum: the file can't use more than it reserved,
	 * thus each of its pages is either in use or reserved, and an allocation
	 * never has to compete for a page that nobody holds for the file.
	 */
	subpool = hugepage_new_subpool(h, nr_huge_pages, nr_huge_pages);
	if (!subpool) {
		hugetlb_cgroup_uncharge_cgroup_rsvd(hstate_index(h),
						    size >> PAGE_SHIFT,
						    reservation_cgroup);
		return -ENOMEM;
	}

	loan->hstate = h;
	loan->subpool = subpool;
	loan->reservation_cgroup = reservation_cgroup;
	return 0;
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_open, "kvm");

/**
 * hugetlb_loan_close - Give up a file's reservation
 * @loan: The loan.  Nothing happens if it was never opened.
 *
 * To be called when the file's page cache is empty.  Folios that are pinned
 * past that don't matter, they go straight to the pool when the pin goes.
 *
 * Context: May sleep.  Takes hugetlb_lock.
 */
void hugetlb_loan_close(struct hugetlb_loan *loan)
{
	struct hstate *h = loan->hstate;
	unsigned long nr_huge_pages;

	if (!h)
		return;

	might_sleep();

	nr_huge_pages = loan->subpool->max_hpages;
	hugepage_subpool_drop_reservation(loan->subpool);
	hugepage_put_subpool(loan->subpool);
	hugetlb_cgroup_uncharge_cgroup_rsvd(hstate_index(h),
					    nr_huge_pages * pages_per_huge_page(h),
					    loan->reservation_cgroup);
	memset(loan, 0, sizeof(*loan));
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_close, "kvm");

/* How often to look, once a millisecond, for a folio to come back. */
#define HUGETLB_LOAN_RETRIES	100

static noinline
struct folio *hugetlb_loan_alloc_folio(struct hugetlb_loan *loan,
				       struct address_space *mapping,
				       pgoff_t index, struct mempolicy *policy)
{
	struct hstate *h = loan->hstate;
	struct mempolicy_interpreted interpreted;
	unsigned int pin_flag;
	struct folio *folio;
	u32 hash;
	int r;

	hash = hugetlb_fault_mutex_hash(mapping, index >> huge_page_order(h));
	lockdep_assert_held(&hugetlb_fault_mutex_table[hash]);

	if (hugepage_subpool_get_pages(loan->subpool, 1) < 0)
		return ERR_PTR(-EAGAIN);

	/*
	 * A fault on behalf of a longterm pin asks for pages that don't have to
	 * be movable.  The folio won't move in any case, and what is reserved is
	 * some page of the pool, not a page of that kind.
	 */
	pin_flag = current->flags & PF_MEMALLOC_PIN;
	current->flags &= ~PF_MEMALLOC_PIN;

	/* Consecutive huge pages go to consecutive nodes. */
	mpol_interpret(policy, mapping->host->i_ino + (index >> huge_page_order(h)),
		       htlb_alloc_mask(h), &interpreted);

	folio = hugetlb_alloc_folio(h, &interpreted, current->mm,
				    HUGETLB_ALLOC_USE_GLOBAL_RESERVATIONS);
	if (IS_ERR(folio) && interpreted.nodemask) {
		/*
		 * Whether it's because of the policy or not, it takes another
		 * attempt to tell.  The reservation is for any node, and a page
		 * in the wrong place beats a guest that dies for want of one.
		 */
		interpreted.nodemask = NULL;
		interpreted.mode = MPOL_DEFAULT;
		folio = hugetlb_alloc_folio(h, &interpreted, current->mm,
					    HUGETLB_ALLOC_USE_GLOBAL_RESERVATIONS);
	}

	current->flags |= pin_flag;

	if (IS_ERR(folio)) {
		/* The page was reserved, and so it is again. */
		WARN_ON_ONCE(hugepage_subpool_put_pages(loan->subpool, 1));
		return ERR_PTR(-ENOSPC);
	}

	/*
	 * From here on, the last folio_put() gives the page back to the subpool
	 * and thereby restores the reservation.  HugeTLB's restore_reserve flag
	 * would do the latter without the former.
	 */
	hugetlb_set_folio_subpool(folio, loan->subpool);
	folio_clear_hugetlb_restore_reserve(folio);

	/* The pool doesn't care what the folio was used for before. */
	folio_clear_uptodate(folio);

	__folio_set_locked(folio);
	r = __filemap_add_folio(mapping, folio,
				round_down(index, pages_per_huge_page(h)),
				mapping_gfp_constraint(mapping, GFP_KERNEL), NULL);
	if (r) {
		__folio_clear_locked(folio);
		folio_put(folio);
		return ERR_PTR(r);
	}

	/* Memory failure takes a clean folio for one that can be dropped. */
	folio_mark_dirty(folio);

	/* And it takes its time to get here: nobody may lock the folio before. */
	folio_set_hugetlb_on_loan(folio);
	return folio;
}
ALLOW_ERROR_INJECTION(hugetlb_loan_alloc_folio, ERRNO);

/**
 * hugetlb_loan_get_folio - Get the huge folio at an index of a file
 * @loan: The file's loan.
 * @mapping: The file's page cache.
 * @index: Index in the file in units of PAGE_SIZE, need not be aligned.
 * @policy: Memory policy for a new folio.  NULL for the current task's policy.
 *	Reservations are not bound to nodes, hence a policy that the pool can't
 *	satisfy doesn't make the allocation fail.
 *
 * Finds the folio or takes a new one from the pool.  A new folio isn't zeroed,
 * and isn't uptodate.
 *
 * Context: May sleep.  Takes the HugeTLB fault mutex of the huge page to
 * allocate, inside of which the caller must not hold the lock of any folio of
 * the file.
 * Return: The folio, locked and with a reference for the caller, or an ERR_PTR:
 * -ENOMEM if no page cache node could be allocated, if a HugeTLB or memory
 * cgroup limit is hit, if the cpuset of the current task has no huge page, or if
 * a huge page that was removed from the file is poisoned or still pinned and there
 * is none to take its place; -EINTR if the task is about to die.
 */
struct folio *hugetlb_loan_get_folio(struct hugetlb_loan *loan,
				     struct address_space *mapping,
				     pgoff_t index, struct mempolicy *policy)
{
	unsigned int order = huge_page_order(loan->hstate);
	int retries = HUGETLB_LOAN_RETRIES;
	struct folio *folio;
	u32 hash;

	hash = hugetlb_fault_mutex_hash(mapping, index >> order);
	might_lock(&hugetlb_fault_mutex_table[hash]);

	for (;;) {
		folio = filemap_lock_folio(mapping, index);
		if (!IS_ERR(folio))
			return folio;

		/*
		 * All of the file's pages may be in use but for this one, in
		 * which case there is none to spare for those who lose the race
		 * to add it.  Let one allocate at a time.  Don't wait for the
		 * folio lock with the mutex held, the owner of the former may be
		 * busy zeroing the folio, and the latter is shared.
		 */
		mutex_lock(&hugetlb_fault_mutex_table[hash]);
		folio = filemap_get_folio(mapping, index);
		if (!IS_ERR(folio)) {
			mutex_unlock(&hugetlb_fault_mutex_table[hash]);
			folio_put(folio);
			continue;
		}

		/*
		 * -EAGAIN: a folio that was removed from the file is still in
		 * use.  Most likely by somebody who was about to fault it in, and
		 * gives it up soon.  If it's pinned, or if memory failure keeps it,
		 * another page of the pool may take its place.  That is for whoever
		 * holds the mutex to find out: one replacement is enough for all
		 * who wait for this huge page.
		 */
		do {
			folio = hugetlb_loan_alloc_folio(loan, mapping, index,
							 policy);
		} while (folio == ERR_PTR(-EAGAIN) && retries <= 0 &&
			 !hugepage_subpool_grow(loan->subpool,
						loan->reservation_cgroup));
		mutex_unlock(&hugetlb_fault_mutex_table[hash]);

		/*
		 * -ENOSPC: the pool doesn't have the page.  free_huge_folio()
		 * gives it back to the subpool, and only then to the pool and its
		 * cgroup.
		 */
		if (folio != ERR_PTR(-EAGAIN) && folio != ERR_PTR(-ENOSPC))
			return folio;

		retries--;

		if (fatal_signal_pending(current))
			return ERR_PTR(-EINTR);
		if (retries < 0)
			return ERR_PTR(-ENOMEM);
		fsleep(1000);
	}
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_get_folio, "kvm");

static void hugetlb_loan_return_folio(struct folio *folio)
{
	/* Entries are added with the folio locked. */
	if (folio_mapped(folio))
		unmap_mapping_folio(folio);

	/* Takes its time, unlike what ->free_folio() is allowed to do. */
	if (mapping_no_direct_map(folio->mapping) && folio_test_uptodate(folio))
		folio_restore_direct_map(folio);

	folio_clear_dirty(folio);
	folio_clear_uptodate(folio);
	filemap_remove_folio(folio);
}

/**
 * hugetlb_loan_return_folios - Remove a range of folios from a file
 * @mapping: The file's page cache.
 * @start: First index in units of PAGE_SIZE, a multiple of the huge page size.
 * @end: Index behind the range, a multiple of the huge page size.
 *
 * User space mappings of the folios are zapped first, and if the file's memory is
 * not in the direct map, it's put back there.  The folios go back to the file's
 * reservation as soon as nobody else refers to them.  Indices that a concurrent
 * fault populates may stay populated.
 *
 * Context: May sleep.  Takes folio locks, i_mmap_rwsem and i_lock.
 */
void hugetlb_loan_return_folios(struct address_space *mapping,
				pgoff_t start, pgoff_t end)
{
	struct folio_batch fbatch;
	unsigned int i;

	might_sleep();

	folio_batch_init(&fbatch);
	while (start < end &&
	       filemap_get_folios(mapping, &start, end - 1, &fbatch)) {
		for (i = 0; i < folio_batch_count(&fbatch); i++) {
			struct folio *folio = fbatch.folios[i];

			folio_lock(folio);
			if (folio->mapping == mapping)
				hugetlb_loan_return_folio(folio);
			folio_unlock(folio);

			/* A fault may be waiting for it to be back. */
			folio_put(folio);
			cond_resched();
		}
		folio_batch_reinit(&fbatch);
	}
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_return_folios, "kvm");

/**
 * hugetlb_loan_can_map - Can folios of this size be mapped to user space?
 * @loan: The loan.
 *
 * A folio is mapped by one entry.  PTEs would need a mapcount for each page, and
 * HugeTLB folios don't have those.
 *
 * Context: Any.
 * Return: True if the huge page size is that of a PMD or PUD, and if the kernel
 * can deal with such entries in VMAs that are not HugeTLB VMAs.
 */
bool hugetlb_loan_can_map(const struct hugetlb_loan *loan)
{
	unsigned int order = huge_page_order(loan->hstate);

	if (!IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE))
		return false;

	return order == PMD_ORDER ||
	       (IS_ENABLED(CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD) &&
		order == PUD_ORDER);
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_can_map, "kvm");

/**
 * hugetlb_loan_map_folio - Map a huge folio to user space
 * @loan: The file's loan, for which hugetlb_loan_can_map() is true.
 * @vmf: A fault of the folio's order, in a VMA that begins and ends between huge
 *	pages, and that has the huge page size as its ->pagesize().
 * @folio: The folio at the index of the fault, locked and uptodate.
 *
 * Context: Called from ->huge_fault().  Takes page table locks.
 * Return: VM_FAULT_NOPAGE if the folio is mapped, VM_FAULT_HWPOISON_LARGE and the
 * huge page size if it is poisoned, or another error.
 */
vm_fault_t hugetlb_loan_map_folio(struct hugetlb_loan *loan,
				  struct vm_fault *vmf, struct folio *folio)
{
	bool write = vmf->flags & FAULT_FLAG_WRITE;

	VM_WARN_ON_ONCE_FOLIO(!folio_test_locked(folio), folio);

	if (folio_test_hwpoison(folio))
		return VM_FAULT_HWPOISON_LARGE |
		       VM_FAULT_SET_HINDEX(hstate_index(loan->hstate));

	if (WARN_ON_ONCE(!hugetlb_loan_can_map(loan)))
		return VM_FAULT_SIGBUS;

	if (IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE) && folio_order(folio) == PMD_ORDER)
		return vmf_insert_folio_pmd(vmf, folio, write);

	if (IS_ENABLED(CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD))
		return vmf_insert_folio_pud(vmf, folio, write);

	return VM_FAULT_SIGBUS;
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_map_folio, "kvm");
