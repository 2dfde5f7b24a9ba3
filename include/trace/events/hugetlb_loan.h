/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM hugetlb_loan

#if !defined(_TRACE_HUGETLB_LOAN_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_HUGETLB_LOAN_H

#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/tracepoint.h>

DECLARE_EVENT_CLASS(hugetlb_loan_folio,

	TP_PROTO(struct folio *folio),
	TP_ARGS(folio),

	TP_STRUCT__entry(
		__field(u64,		ino)
		__field(loff_t,		offset)
		__field(unsigned long,	nr_pages)
		__field(int,		nid)
	),

	TP_fast_assign(
		__entry->ino		= folio->mapping->host->i_ino;
		__entry->offset		= folio_pos(folio);
		__entry->nr_pages	= folio_nr_pages(folio);
		__entry->nid		= folio_nid(folio);
	),

	TP_printk("ino %llu offset 0x%llx pages %lu node %d",
		  __entry->ino, __entry->offset, __entry->nr_pages, __entry->nid)
);

/* The folio is about to be removed from its file. */
DEFINE_EVENT(hugetlb_loan_folio, hugetlb_loan_return,

	TP_PROTO(struct folio *folio),
	TP_ARGS(folio)
);

/* The folio takes the place of one that was removed, and is still in use. */
DEFINE_EVENT(hugetlb_loan_folio, hugetlb_loan_replace,

	TP_PROTO(struct folio *folio),
	TP_ARGS(folio)
);

#endif /* _TRACE_HUGETLB_LOAN_H */

/* This part must be outside protection */
#include <trace/define_trace.h>
