/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What guest_memfd takes and has to give back, and who may hold on to it
 *
 * The counters are compared exactly, i.e. nobody else may use KVM, the HugeTLB
 * pools, or memory that can't be reclaimed, in the meantime.
 */
#ifndef SELFTEST_KVM_GUEST_MEMFD_LIFECYCLE_H
#define SELFTEST_KVM_GUEST_MEMFD_LIFECYCLE_H

#include <stdlib.h>

#include <linux/io_uring.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "cgroup_util.h"
#include "guest_memfd_direct_map.h"
#include "guest_memfd_hugetlb.h"
#include "numaif.h"

#define GMEM_2M_POOL		"/sys/kernel/mm/hugepages/hugepages-2048kB"
#define GMEM_1G_POOL		"/sys/kernel/mm/hugepages/hugepages-1048576kB"
#define GMEM_INODE_CACHE	"/sys/kernel/slab/kvm_gmem_inode_cache"

/* There is no counter of small pages, but of the list that they are on. */
#define GMEM_UNEVICTABLE	"nr_unevictable"

/* Relative paths are files of the test's cgroup. */
static const char * const gmem_counter_paths[] = {
	GMEM_2M_POOL "/nr_hugepages",
	GMEM_2M_POOL "/free_hugepages",
	GMEM_2M_POOL "/resv_hugepages",
	GMEM_2M_POOL "/surplus_hugepages",
	GMEM_1G_POOL "/nr_hugepages",
	GMEM_1G_POOL "/free_hugepages",
	GMEM_1G_POOL "/resv_hugepages",
	GMEM_1G_POOL "/surplus_hugepages",
	"hugetlb.2MB.current",
	"hugetlb.2MB.rsvd.current",
	"hugetlb.1GB.current",
	"hugetlb.1GB.rsvd.current",
	GMEM_UNEVICTABLE,
	GMEM_INODE_CACHE "/objects",
	"/sys/module/kvm/refcnt",
	"/sys/module/kvm_amd/refcnt",
	"/sys/module/kvm_intel/refcnt",
};

struct gmem_counters {
	long value[ARRAY_SIZE(gmem_counter_paths)];
};

static char *gmem_cgroup;

/* Root can't be charged, and has no counters. */
static inline void gmem_cgroup_enter(void)
{
	char root[PATH_MAX];

	if (!cg_find_unified_root(root, sizeof(root), NULL)) {
		gmem_cgroup = cg_name(root, program_invocation_short_name);
		if (!cg_create(gmem_cgroup) && !cg_enter_current(gmem_cgroup))
			return;
		gmem_cgroup = NULL;
	}
	print_skip("No cgroup2, charges are not checked");
}

static inline void gmem_cgroup_leave(void)
{
	char root[PATH_MAX];

	if (!gmem_cgroup)
		return;

	TEST_ASSERT(!cg_find_unified_root(root, sizeof(root), NULL) &&
		    !cg_enter_current(root) && !cg_destroy(gmem_cgroup),
		    "Can't remove %s", gmem_cgroup);
	gmem_cgroup = NULL;
}

/*
 * New small pages sit in a per-CPU batch.  Those that are removed from their file
 * before they leave it, but are leaked, end up among the pages that can be reclaimed.
 * Moving no pages at all empties the batches.
 */
static inline void gmem_drain_batches(void)
{
	int node = 0;

	TEST_ASSERT(!syscall(__NR_move_pages, 0, 0, NULL, &node, NULL, 0),
		    "move_pages() failed");
}

static inline long gmem_unevictable_get(void)
{
	char line[128];
	long value = -1;
	FILE *file;

	gmem_drain_batches();

	/* Changes are added up per CPU. */
	write_long("/proc/sys/vm/stat_refresh", 1);

	file = fopen("/proc/vmstat", "r");
	TEST_ASSERT(file, "Can't open /proc/vmstat");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, GMEM_UNEVICTABLE " %ld", &value) == 1)
			break;
	}
	fclose(file);
	return value;
}

static inline long gmem_counter_get(const char *name)
{
	char path[PATH_MAX];

	if (!strcmp(name, GMEM_UNEVICTABLE))
		return gmem_unevictable_get();
	if (name[0] == '/')
		return read_long(name);
	if (!gmem_cgroup)
		return -1;

	snprintf(path, sizeof(path), "%s/%s", gmem_cgroup, name);
	return read_long(path);
}

static inline struct gmem_counters gmem_counters_read(void)
{
	struct gmem_counters counters;
	int i;

	/* Free objects that sit in a per-CPU cache count as allocated. */
	write_long(GMEM_INODE_CACHE "/shrink", 1);

	for (i = 0; i < ARRAY_SIZE(gmem_counter_paths); i++)
		counters.value[i] = gmem_counter_get(gmem_counter_paths[i]);

	return counters;
}

static inline void gmem_counter_add(struct gmem_counters *counters, const char *name,
				    long value)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(gmem_counter_paths); i++) {
		if (!strcmp(gmem_counter_paths[i], name) && counters->value[i] >= 0)
			counters->value[i] += value;
	}
}

/* Pages that are in use, whether they still belong to a file or not */
static inline void gmem_counters_add_pages(struct gmem_counters *counters,
					   size_t page_size, long nr_pages)
{
	if (page_size == SZ_4K) {
		gmem_counter_add(counters, GMEM_UNEVICTABLE, nr_pages);
	} else if (page_size == SZ_2M) {
		gmem_counter_add(counters, GMEM_2M_POOL "/free_hugepages", -nr_pages);
		gmem_counter_add(counters, "hugetlb.2MB.current", nr_pages * page_size);
	} else {
		gmem_counter_add(counters, GMEM_1G_POOL "/free_hugepages", -nr_pages);
		gmem_counter_add(counters, "hugetlb.1GB.current", nr_pages * page_size);
	}
}

/* Returns the name of a counter that differs, or NULL. */
static inline const char *gmem_counters_differ(const struct gmem_counters *a,
					       const struct gmem_counters *b)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(gmem_counter_paths); i++) {
		if (a->value[i] != b->value[i])
			return gmem_counter_paths[i];
	}
	return NULL;
}

/* Inodes are freed after a grace period, and a ring's pins by a worker. */
static inline void gmem_counters_wait(const struct gmem_counters *want)
{
	struct gmem_counters got;
	int i;

	for (i = 0; i < 2000; i++) {
		got = gmem_counters_read();
		if (!gmem_counters_differ(want, &got))
			return;
		usleep(i < 100 ? 1000 : 10000);
	}

	for (i = 0; i < ARRAY_SIZE(gmem_counter_paths); i++) {
		if (want->value[i] != got.value[i])
			fprintf(stderr, "# %s: wanted %ld, got %ld\n",
				gmem_counter_paths[i], want->value[i], got.value[i]);
	}
	TEST_FAIL("%s isn't what it was", gmem_counters_differ(want, &got));
}

/* Whether the kernel finds a word, which isn't 0, where its direct map has the page */
static inline bool is_in_direct_map(const u64 *word)
{
	u64 value = kcore_read_u64(mem_to_pfn(word) * SZ_4K + (u64)word % SZ_4K);

	TEST_ASSERT(!value || value == *word, "Wanted 0x%lx, got 0x%lx",
		    (unsigned long)*word, (unsigned long)value);
	return value;
}

/* Returns a ring that pins the memory as a fixed buffer. */
static inline int pin_by_io_uring(void *mem, size_t size)
{
	struct iovec iov = { .iov_base = mem, .iov_len = size };
	struct io_uring_params params = {};
	int ring, r;

	ring = syscall(__NR_io_uring_setup, 1, &params);
	TEST_ASSERT(ring >= 0, __KVM_SYSCALL_ERROR("io_uring_setup()", ring));

	r = syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1);
	if (r) {
		kvm_close(ring);
		return -1;
	}
	return ring;
}

/* The pages become buffers of the pipe until they are read. */
static inline ssize_t pin_by_vmsplice(int pipe_fds[2], void *mem, size_t size)
{
	struct iovec iov = { .iov_base = mem, .iov_len = size };

	return vmsplice(pipe_fds[1], &iov, 1, SPLICE_F_NONBLOCK);
}

/* What the cookie means is up to the caller. */
static inline int send_fd(int socket, int fd, u64 cookie)
{
	char control[CMSG_SPACE(sizeof(fd))] = {};
	struct iovec iov = { .iov_base = &cookie, .iov_len = sizeof(cookie) };
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(fd));
	*(int *)CMSG_DATA(header) = fd;

	return sendmsg(socket, &message, MSG_DONTWAIT) == sizeof(cookie) ? 0 : -1;
}

static inline int receive_fd(int socket, u64 *cookie, int flags)
{
	char control[CMSG_SPACE(sizeof(int))] = {};
	struct iovec iov = { .iov_base = cookie, .iov_len = sizeof(*cookie) };
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};

	if (recvmsg(socket, &message, flags) != sizeof(*cookie) ||
	    !CMSG_FIRSTHDR(&message))
		return -1;

	return *(int *)CMSG_DATA(CMSG_FIRSTHDR(&message));
}

static inline const char *vendor_module(void)
{
	if (!access("/sys/module/kvm_amd/refcnt", F_OK))
		return "kvm_amd";
	if (!access("/sys/module/kvm_intel/refcnt", F_OK))
		return "kvm_intel";
	return NULL;
}

static inline int module_unload(const char *name)
{
	return syscall(__NR_delete_module, name, O_NONBLOCK);
}

static inline void module_load(const char *name)
{
	char command[64];

	snprintf(command, sizeof(command), "modprobe %s", name);
	TEST_ASSERT(!system(command), "'%s' failed", command);
}

#endif /* SELFTEST_KVM_GUEST_MEMFD_LIFECYCLE_H */
