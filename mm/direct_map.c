// SPDX-License-Identifier: GPL-2.0
/*
 * Files whose memory is not in the kernel's direct map.
 *
 * A folio of such a file leaves the direct map before anybody can use it, and is
 * back, zeroed, when it leaves the file.  In between, the kernel can get at it by
 * user space mappings only; mapping_no_direct_map() tells those who would try
 * otherwise, e.g. get_user_pages().
 */
#include <linux/direct_map.h>
#include <linux/export.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/set_memory.h>

#include <asm/tlbflush.h>

#include "internal.h"

/* Files, not folios: a file has a hole in the direct map in store, at least. */
static atomic_long_t direct_map_hole_users;

/**
 * folio_remove_direct_map - Take a folio out of the direct map
 * @folio: The folio, which the caller has to itself and which was zeroed.
 *
 * A folio that is as large as its direct map entry takes a write to that entry and
 * one TLB flush.
 *
 * Context: May sleep, as a larger direct map entry has to be split.
 * Return: 0 on success, -ENOMEM if there is no memory for the page tables to split
 * an entry, or another error.  The folio is in the direct map if it fails.
 */
int folio_remove_direct_map(struct folio *folio)
{
	unsigned long addr = (unsigned long)folio_address(folio);
	int r;

	might_sleep();

	/*
	 * There is nothing to undo if it fails.  Folios are aligned: either one entry
	 * is larger than the folio, and is split before anything is written, or all
	 * entries are part of the folio, and are written as they are.
	 */
	r = set_direct_map_valid_noflush(folio_page(folio, 0),
					 folio_nr_pages(folio), false);

	/* A stale entry would defeat the purpose. */
	flush_tlb_kernel_range(addr, addr + folio_size(folio));
	return r;
}
EXPORT_SYMBOL_FOR_MODULES(folio_remove_direct_map, "kvm");

/*
 * Put a poisoned folio back, but for the pages with an error.  Those must not be
 * present for a moment, the CPU could read ahead.  The entries of the others are
 * made present one run at a time: where an entry has to be split because one of its
 * pages has an error, it is split while nothing of it is present.
 *
 * A split takes memory for a page table.  If there is none, the rest of the folio
 * can't be put back, and nobody must get it.
 */
static int folio_restore_healthy_pages(struct folio *folio)
{
	long start, end;
	int r;

	for (start = 0; start < folio_nr_pages(folio); start = end + 1) {
		end = folio_next_hwpoison(folio, start);
		if (start == end)
			continue;

		r = set_direct_map_valid_noflush(folio_page(folio, start),
						 end - start, true);
		if (r)
			return r;
	}
	return 0;
}

/**
 * folio_restore_direct_map - Put a folio back into the direct map, and zero it
 * @folio: A folio for which folio_remove_direct_map() succeeded, and that nobody
 *	but the caller uses any more.
 *
 * It can't fail: the entries which were written when the folio was removed are
 * still there to be written again.  They weren't present, thus no TLB has to be
 * flushed.
 *
 * A poisoned folio must not be touched, and isn't zeroed.  All but the pages with
 * an error are put back nevertheless: memory failure may dissolve a HugeTLB folio
 * and free its healthy pages.  It doesn't if it lost track of which ones these are,
 * and that's what it is told if they can't be put back, for want of memory.
 *
 * Context: May sleep, as zeroing takes a while, and as architectures may serialize
 * changes of the direct map.
 */
void folio_restore_direct_map(struct folio *folio)
{
	long i;

	/* For all that's known, every page has an error. */
	if (folio_test_hugetlb(folio) && folio_test_hugetlb_raw_hwp_unreliable(folio))
		return;

	if (folio_test_hwpoison(folio)) {
		if (folio_restore_healthy_pages(folio)) {
			folio_set_hugetlb_raw_hwp_unreliable(folio);
			pr_warn_ratelimited("%#lx: no memory to put the rest of a poisoned huge page back into the direct map, it is lost\n",
					    folio_pfn(folio));
			return;
		}
	} else if (WARN_ON_ONCE(set_direct_map_valid_noflush(folio_page(folio, 0),
							     folio_nr_pages(folio),
							     true))) {
		return;
	}

	/*
	 * Memory failure marks a page as poisoned and then takes it out of the
	 * direct map.  If both happened just now, the latter was undone above.
	 */
	if (folio_test_hwpoison(folio)) {
		folio_set_mce_nospec(folio);
		return;
	}

	for (i = 0; i < folio_nr_pages(folio); i++) {
		if (i)
			cond_resched();
		clear_highpage(folio_page(folio, i));
	}
}
EXPORT_SYMBOL_FOR_MODULES(folio_restore_direct_map, "kvm");

/**
 * direct_map_hole_users_inc - Account for a file that will use the above
 *
 * Context: Any.
 */
void direct_map_hole_users_inc(void)
{
	atomic_long_inc(&direct_map_hole_users);
}
EXPORT_SYMBOL_FOR_MODULES(direct_map_hole_users_inc, "kvm");

/**
 * direct_map_hole_users_dec - Account for the end of such a file
 *
 * Context: Any.
 */
void direct_map_hole_users_dec(void)
{
	atomic_long_dec(&direct_map_hole_users);
}
EXPORT_SYMBOL_FOR_MODULES(direct_map_hole_users_dec, "kvm");

/**
 * direct_map_has_hole_users - Is memory meant to be kept out of the direct map?
 *
 * Context: Any.
 * Return: True if there is a file whose memory must not be read by the kernel, e.g.
 * to write it to a hibernation image.
 */
bool direct_map_has_hole_users(void)
{
	return atomic_long_read(&direct_map_hole_users) > 0;
}
