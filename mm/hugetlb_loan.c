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
#include <linux/direct_map.h>
#include <linux/error-injection.h>
#include <linux/hugetlb.h>
#include <linux/hugetlb_cgroup.h>
#include <linux/hugetlb_loan.h>
#include <linux/mempolicy.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>

#define CREATE_TRACE_POINTS
#include <trace/events/hugetlb_loan.h>

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
	unsigned int pin_flags;
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
	pin_flags = memalloc_pin_save();
	subpool = hugepage_new_subpool(h, nr_huge_pages, nr_huge_pages);
	memalloc_pin_restore(pin_flags);

	/* Surplus pages may have to come out of memory that is to be movable. */
	if (!subpool)
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

/**
 * hugetlb_loan_reserved - What a file's reservation has left
 * @loan: The loan.
 *
 * Context: Any.
 * Return: Size of the huge pages that are reserved and not allocated, in bytes.
 */
u64 hugetlb_loan_reserved(const struct hugetlb_loan *loan)
{
	return (u64)READ_ONCE(loan->subpool->rsv_hpages) *
	       huge_page_size(loan->hstate);
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_reserved, "kvm");

/*
 * How long an access waits for a page that was removed from the file to come back,
 * before another one takes its place in spite of there being no reason for it not
 * to come back.
 */
#define HUGETLB_LOAN_PATIENCE		HZ

/*
 * And how long before it gives up if there is none to take its place: if there's a
 * reason for the page not to come back, and if there isn't.  A task that comes across
 * a page drops it when it gets the CPU, which even realtime tasks leave others a
 * share of.  But whoever has a page in a pipe, say, may be waiting for what the
 * access holds, i.e. for the access itself.
 */
#define HUGETLB_LOAN_LAST_CHANCE	(HZ / 10)
#define HUGETLB_LOAN_DEADLINE		(30 * HZ)

/*
 * Will the folio stay away for longer than somebody needs who has come across it
 * in the page cache or in a page table?
 */
static bool hugetlb_loan_stray_is_lost(struct folio *stray)
{
	return folio_test_hwpoison(stray) || folio_maybe_dma_pinned(stray);
}

static struct folio *hugetlb_loan_find_stray(struct hugepage_subpool *subpool,
					     bool any)
{
	struct folio *stray;

	lockdep_assert_held(&hugetlb_lock);

	list_for_each_entry(stray, &subpool->strays, _deferred_list)
		if (any || hugetlb_loan_stray_is_lost(stray))
			return stray;

	return NULL;
}

static bool hugetlb_loan_has_stray(struct hugepage_subpool *subpool, bool any)
{
	guard(spinlock_irq)(&hugetlb_lock);

	return hugetlb_loan_find_stray(subpool, any);
}

/* Is there nothing to wait for? */
static bool hugetlb_loan_all_strays_lost(struct hugepage_subpool *subpool)
{
	struct folio *stray;

	guard(spinlock_irq)(&hugetlb_lock);

	list_for_each_entry(stray, &subpool->strays, _deferred_list)
		if (!hugetlb_loan_stray_is_lost(stray))
			return false;

	return !list_empty(&subpool->strays);
}

/*
 * Take another page of the pool in place of one that was removed from the file and
 * isn't coming back, or, with @any, of one that doesn't come back for whatever
 * reason.  The stray folio isn't the file's any more, and goes straight to the pool
 * when it is freed.  Until then, it is what the file's cgroup is charged for in
 * addition, and nothing is left of the replacement once it is freed.
 *
 * Returns 0 if an allocation may succeed now, -EBUSY if there is no such stray, and
 * -ENOMEM if there is none to take its place.
 */
static int hugetlb_loan_replace_stray(struct hugetlb_loan *loan, bool any)
{
	struct hugepage_subpool *subpool = loan->subpool;
	struct hstate *h = loan->hstate;
	bool charged = false;
	struct folio *stray;

	if (!hugetlb_loan_has_stray(subpool, any))
		return -EBUSY;

	/* This may sleep, and the stray may come back meanwhile. */
	if (hugetlb_cgroup_charge_more_rsvd(hstate_index(h), pages_per_huge_page(h),
					    loan->reservation_cgroup))
		return -ENOMEM;

	if (hugetlb_acct_memory(h, 1)) {
		hugetlb_cgroup_uncharge_cgroup_rsvd(hstate_index(h),
						    pages_per_huge_page(h),
						    loan->reservation_cgroup);
		return -ENOMEM;
	}

	spin_lock_irq(&hugetlb_lock);
	stray = hugetlb_loan_find_stray(subpool, any);
	if (stray) {
		list_del_init(&stray->_deferred_list);
		hugetlb_set_folio_subpool(stray, NULL);
		/* A poisoned page may never be freed, nor its charge undone. */
		charged = !folio_test_hwpoison(stray);
		if (charged)
			hugetlb_cgroup_commit_charge_rsvd(hstate_index(h),
							  pages_per_huge_page(h),
							  loan->reservation_cgroup,
							  stray);
		/* It was in use, and now there is one in reserve. */
		WARN_ON_ONCE(hugepage_subpool_put_pages(subpool, 1));
	}
	spin_unlock_irq(&hugetlb_lock);

	if (!charged)
		hugetlb_cgroup_uncharge_cgroup_rsvd(hstate_index(h),
						    pages_per_huge_page(h),
						    loan->reservation_cgroup);
	if (!stray)
		hugetlb_acct_memory(h, -1);
	return 0;
}

static noinline
struct folio *hugetlb_loan_alloc_folio(struct hugetlb_loan *loan,
				       struct address_space *mapping,
				       pgoff_t index, struct mempolicy *policy,
				       bool strict)
{
	struct hstate *h = loan->hstate;
	struct mempolicy_interpreted interpreted;
	struct folio *folio;
	long missing;
	u32 hash;
	int r;

	hash = hugetlb_fault_mutex_hash(mapping, index >> huge_page_order(h));
	lockdep_assert_held(&hugetlb_fault_mutex_table[hash]);

	missing = hugepage_subpool_get_pages(loan->subpool, 1);
	if (missing < 0)
		return ERR_PTR(-EAGAIN);

	/* A page came back that nobody can have, see free_huge_folio(). */
	if (missing && hugetlb_acct_memory(h, missing)) {
		hugepage_subpool_unget_pages(loan->subpool, missing);
		return ERR_PTR(-ENOMEM);
	}

	/* Consecutive huge pages go to consecutive nodes. */
	mpol_interpret(policy, mapping->host->i_ino + (index >> huge_page_order(h)),
		       htlb_alloc_mask(h), &interpreted);

	/*
	 * The reservation is for any node, and a page in the wrong place beats a
	 * guest that dies for want of one.  Whoever wants none allocates it before
	 * the guest needs it.
	 */
	if (interpreted.nodemask && !strict)
		interpreted.mode = MPOL_PREFERRED_MANY;

	/* The folio won't move, leave alone what somebody wants to be movable. */
	folio = hugetlb_alloc_folio(h, &interpreted, current->mm,
				    HUGETLB_ALLOC_USE_GLOBAL_RESERVATIONS |
				    HUGETLB_ALLOC_PINNABLE_FIRST);

	if (IS_ERR(folio)) {
		/* The page was reserved, and so it is again. */
		WARN_ON_ONCE(hugepage_subpool_put_pages(loan->subpool, 1));
		/*
		 * What the subpool has is in the pool, see free_huge_folio().  It's
		 * the task that may not have it, and waiting doesn't help.
		 */
		return ERR_PTR(-ENOMEM);
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

/*
 * Find the folio at an index and lock it.  To wait for the lock with a reference
 * would mean to make others wait, who want the folio back when it's removed.
 */
static struct folio *hugetlb_loan_lock_folio(struct address_space *mapping,
					     pgoff_t index, int state)
{
	struct folio *folio;

	for (;;) {
		folio = filemap_get_folio(mapping, index);
		if (IS_ERR(folio))
			return folio;

		if (!folio_trylock(folio)) {
			if (folio_put_wait_locked(folio, state))
				return ERR_PTR(-EINTR);
			continue;
		}

		if (folio->mapping == mapping)
			return folio;

		folio_unlock(folio);
		folio_put(folio);
	}
}

static struct folio *hugetlb_loan_find_or_alloc_folio(struct hugetlb_loan *loan,
						      struct address_space *mapping,
						      pgoff_t index,
						      struct mempolicy *policy,
						      bool strict, int state)
{
	unsigned int order = huge_page_order(loan->hstate);
	struct folio *folio;
	u32 hash;

	hash = hugetlb_fault_mutex_hash(mapping, index >> order);
	might_lock(&hugetlb_fault_mutex_table[hash]);

	for (;;) {
		folio = hugetlb_loan_lock_folio(mapping, index, state);
		if (folio != ERR_PTR(-ENOENT))
			return folio;

		/*
		 * All of the file's pages may be in use but for this one, in
		 * which case there is none to spare for those who lose the race
		 * to add it.  Let one allocate at a time.  Don't wait for the
		 * folio lock with the mutex held, the owner of the former may be
		 * busy zeroing the folio, and the latter is shared.
		 */
		mutex_lock(&hugetlb_fault_mutex_table[hash]);
		if (xa_load(&mapping->i_pages, index)) {
			mutex_unlock(&hugetlb_fault_mutex_table[hash]);
			continue;
		}

		folio = hugetlb_loan_alloc_folio(loan, mapping, index, policy,
						 strict);
		mutex_unlock(&hugetlb_fault_mutex_table[hash]);
		return folio;
	}
}

/**
 * hugetlb_loan_get_folio - Get the huge folio at an index of a file
 * @loan: The file's loan.
 * @mapping: The file's page cache.
 * @index: Index in the file in units of PAGE_SIZE, need not be aligned.
 * @policy: Memory policy for a new folio.  NULL for the current task's policy.
 * @strict: Fail if the policy rules out all nodes that have a page.  If false, a
 *	policy that the pool can't satisfy doesn't make the allocation fail, as the
 *	reservation is not bound to nodes.
 * @state: How to wait, TASK_INTERRUPTIBLE or TASK_KILLABLE.
 *
 * Finds the folio or takes a new one from the pool.  A new folio isn't zeroed,
 * and isn't uptodate.
 *
 * A page that was removed from the file is the file's again when its last reference
 * is gone.  If the allocation needs that one, it waits for it.  If the page stays
 * away, because it's poisoned or pinned, or for other reasons for a second,
 * another page of the pool takes its place.
 *
 * Context: May sleep.  Takes the HugeTLB fault mutex of the huge page to
 * allocate, inside of which the caller must not hold the lock of any folio of
 * the file.  The caller must not hold a reference to a folio of the file.
 * Return: The folio, locked and with a reference for the caller, or an ERR_PTR:
 * -ENOMEM if no page cache node could be allocated, if a HugeTLB or memory
 * cgroup limit is hit, if the cpuset of the current task, or a strict policy, has
 * no node with a huge page, or if all pages that the allocation would have to wait
 * for are poisoned or pinned, or don't come back for 30 seconds, and there is none
 * to take the place of one; -EINTR if a signal is pending that @state allows for.
 */
struct folio *hugetlb_loan_get_folio(struct hugetlb_loan *loan,
				     struct address_space *mapping,
				     pgoff_t index, struct mempolicy *policy,
				     bool strict, int state)
{
	struct hugepage_subpool *subpool = loan->subpool;
	DEFINE_WAIT_FUNC(wait, woken_wake_function);
	bool last_chance_gone = false, replaced = false;
	unsigned long begin;
	struct folio *folio;
	long timeout;
	int r;

	folio = hugetlb_loan_find_or_alloc_folio(loan, mapping, index, policy, strict,
						 state);
	if (folio != ERR_PTR(-EAGAIN))
		return folio;

	/*
	 * All of the file's pages are in use.  One of them was removed from the
	 * file, as this one isn't there.  Most likely somebody was about to fault it
	 * in and gives it up as soon as he gets the CPU.
	 *
	 * Whoever waits for the subpool has to look at each page that comes back,
	 * be it for his own or because another one who waits for the same page of
	 * the file has taken it.  Hence nobody waits exclusively.
	 */
	begin = jiffies;
	add_wait_queue(&subpool->wait, &wait);

	for (;;) {
		folio = hugetlb_loan_find_or_alloc_folio(loan, mapping, index, policy,
							 strict, state);
		if (folio != ERR_PTR(-EAGAIN))
			break;

		if (signal_pending_state(state, current)) {
			folio = ERR_PTR(-EINTR);
			break;
		}

		r = hugetlb_loan_replace_stray(loan, time_after_eq(jiffies, begin +
								   HUGETLB_LOAN_PATIENCE));
		if (!r) {
			replaced = true;
			continue;
		}

		/* There is something to wait for. */
		if (r == -ENOMEM && !hugetlb_loan_all_strays_lost(subpool) &&
		    time_before(jiffies, begin + HUGETLB_LOAN_DEADLINE))
			r = -EBUSY;

		/*
		 * Nothing has come back and nothing was added since all strays were
		 * last seen to be lost, and GUP-fast, which may take pins just to
		 * drop them again, has interrupts disabled for as long as it does.
		 */
		if (r == -ENOMEM && last_chance_gone && !(READ_ONCE(wait.flags) & WQ_FLAG_WOKEN)) {
			folio = ERR_PTR(-ENOMEM);
			break;
		}

		timeout = r == -ENOMEM ? HUGETLB_LOAN_LAST_CHANCE : HUGETLB_LOAN_PATIENCE;
		last_chance_gone = !wait_woken(&wait, state, timeout) &&
				   r == -ENOMEM;
		if (last_chance_gone)
			synchronize_rcu();
	}

	remove_wait_queue(&subpool->wait, &wait);

	if (replaced && !IS_ERR(folio))
		trace_hugetlb_loan_replace(folio);

	return folio;
}
EXPORT_SYMBOL_FOR_MODULES(hugetlb_loan_get_folio, "kvm");

static void hugetlb_loan_return_folio(struct folio *folio)
{
	struct hugepage_subpool *subpool = hugetlb_folio_subpool(folio);

	trace_hugetlb_loan_return(folio);

	/* Entries are added with the folio locked. */
	if (folio_mapped(folio))
		unmap_mapping_folio(folio);

	/* Takes its time, unlike what ->free_folio() is allowed to do. */
	if (mapping_no_direct_map(folio->mapping) && folio_test_uptodate(folio))
		folio_restore_direct_map(folio);

	folio_clear_dirty(folio);
	folio_clear_uptodate(folio);

	/*
	 * It's a stray before it's gone: a fault that doesn't find it in the page
	 * cache looks for it there.
	 */
	spin_lock_irq(&hugetlb_lock);
	list_add_tail(&folio->_deferred_list, &subpool->strays);
	wake_up(&subpool->wait);
	spin_unlock_irq(&hugetlb_lock);

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
 * Context: May sleep.  Takes folio locks, i_mmap_rwsem, i_lock and hugetlb_lock.
 */
void hugetlb_loan_return_folios(struct address_space *mapping,
				pgoff_t start, pgoff_t end)
{
	struct folio *folio;

	might_sleep();

	while (xa_find(&mapping->i_pages, &start, end - 1, XA_PRESENT)) {
		folio = hugetlb_loan_lock_folio(mapping, start, TASK_UNINTERRUPTIBLE);
		if (IS_ERR(folio))
			continue;

		hugetlb_loan_return_folio(folio);
		start = folio_next_index(folio);
		folio_unlock(folio);

		/* A fault may be waiting for it to be back. */
		folio_put(folio);
		cond_resched();

		if (start >= end)
			break;
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
