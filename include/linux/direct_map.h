/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Files whose memory is not in the kernel's direct map.
 */
#ifndef _LINUX_DIRECT_MAP_H
#define _LINUX_DIRECT_MAP_H

#include <linux/errno.h>
#include <linux/types.h>

struct folio;

#ifdef CONFIG_ARCH_HAS_SET_DIRECT_MAP
int folio_remove_direct_map(struct folio *folio);
void folio_restore_direct_map(struct folio *folio);
void direct_map_hole_users_inc(void);
void direct_map_hole_users_dec(void);
bool direct_map_has_hole_users(void);
#else
static inline int folio_remove_direct_map(struct folio *folio)
{
	return -EOPNOTSUPP;
}

static inline void folio_restore_direct_map(struct folio *folio)
{
}

static inline void direct_map_hole_users_inc(void)
{
}

static inline void direct_map_hole_users_dec(void)
{
}

static inline bool direct_map_has_hole_users(void)
{
	return false;
}
#endif /* CONFIG_ARCH_HAS_SET_DIRECT_MAP */

#endif /* _LINUX_DIRECT_MAP_H */
