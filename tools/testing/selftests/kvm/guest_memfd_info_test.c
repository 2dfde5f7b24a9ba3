// SPDX-License-Identifier: GPL-2.0
/*
 * What whoever holds a guest_memfd, or watches the system, learns about its memory
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <linux/falloc.h>
#include <linux/magic.h>
#include <linux/sizes.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include "guest_memfd_hugetlb.h"
#include "kvm_syscalls.h"
#include "kvm_util.h"
#include "kselftest_harness.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

#define TRACING		"/sys/kernel/tracing"
#define NR_PAGES	3

FIXTURE(info) {
	struct kvm_vm *vm;
	size_t page_size;
	size_t size;
	bool is_hugetlb;
	int fd;
};

FIXTURE_VARIANT(info) {
	u64 flags;
	size_t huge_page_size;
	const char *names;
};

FIXTURE_VARIANT_ADD(info, private_4K) {
	.names = "",
};

FIXTURE_VARIANT_ADD(info, shared_4K) {
	.flags = SHARED_MEMORY,
	.names = " MMAP INIT_SHARED",
};

FIXTURE_VARIANT_ADD(info, no_direct_map_4K) {
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
	.names = " MMAP INIT_SHARED NO_DIRECT_MAP",
};

FIXTURE_VARIANT_ADD(info, private_2M) {
	.huge_page_size = SZ_2M,
	.names = " HUGETLB",
};

FIXTURE_VARIANT_ADD(info, shared_2M) {
	.flags = SHARED_MEMORY,
	.huge_page_size = SZ_2M,
	.names = " MMAP INIT_SHARED HUGETLB",
};

FIXTURE_VARIANT_ADD(info, no_direct_map_2M) {
	.flags = SHARED_MEMORY | GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
	.huge_page_size = SZ_2M,
	.names = " MMAP INIT_SHARED NO_DIRECT_MAP HUGETLB",
};

FIXTURE_VARIANT_ADD(info, private_1G) {
	.huge_page_size = SZ_1G,
	.names = " HUGETLB",
};

FIXTURE_SETUP(info)
{
	u64 flags = variant->flags;
	const char *missing;

	self->fd = -1;
	self->is_hugetlb = variant->huge_page_size;
	self->page_size = variant->huge_page_size ?: getpagesize();
	self->size = NR_PAGES * self->page_size;

	if (self->is_hugetlb) {
		missing = hugetlb_missing(self->page_size, NR_PAGES);
		if (missing)
			SKIP(return, "%s", missing);
		flags |= GUEST_MEMFD_FLAG_HUGETLB | hugetlb_size_flag(self->page_size);
	}
	if (variant->flags & ~kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS))
		SKIP(return, "memory stays in the direct map");

	self->vm = vm_create_barebones();
	self->fd = vm_create_guest_memfd(self->vm, self->size, flags);
}

FIXTURE_TEARDOWN(info)
{
	if (self->fd < 0)
		return;

	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

/* The value of a line "NAME: VALUE", which has to be there once */
static void fdinfo_read(int fd, const char *name, char *value, size_t size)
{
	char path[64], line[256];
	int found = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "r");
	TEST_ASSERT(file, "Can't open %s", path);
	while (fgets(line, sizeof(line), file)) {
		line[strcspn(line, "\n")] = '\0';
		if (strncmp(line, name, strlen(name)) || line[strlen(name)] != ':')
			continue;
		snprintf(value, size, "%s", line + strlen(name) + 1);
		found++;
	}
	fclose(file);
	TEST_ASSERT(found == 1, "%d lines of %s in fdinfo", found, name);
}

static u64 fdinfo(int fd, const char *name)
{
	char value[64];

	fdinfo_read(fd, name, value, sizeof(value));
	return strtoull(value, NULL, 10);
}

#define assert_memory(_nr_allocated)						\
do {										\
	u64 allocated = (_nr_allocated) * self->page_size;			\
	struct stat st;								\
										\
	TEST_ASSERT_EQ(fdinfo(self->fd, "guest_memfd_allocated"), allocated);	\
	TEST_ASSERT_EQ(fdinfo(self->fd, "guest_memfd_reserved"),		\
		       self->is_hugetlb ? self->size - allocated : 0);		\
	TEST_ASSERT_EQ(fdinfo(self->fd, "guest_memfd_no_direct_map"),		\
		       variant->flags & GUEST_MEMFD_FLAG_NO_DIRECT_MAP ?	\
		       allocated : 0);						\
	TEST_ASSERT(!fstat(self->fd, &st), "fstat(): errno %d", errno);		\
	TEST_ASSERT_EQ(st.st_blocks, allocated / 512);				\
	TEST_ASSERT_EQ(st.st_blksize, self->page_size);				\
	TEST_ASSERT_EQ(st.st_size, self->size);					\
} while (0)

TEST_F(info, memory)
{
	const size_t page_size = self->page_size;
	char names[128];
	u64 *mem;

	fdinfo_read(self->fd, "guest_memfd_flags", names, sizeof(names));
	TEST_ASSERT(!strcmp(names, variant->names), "Flags: wanted '%s', got '%s'",
		    variant->names, names);
	TEST_ASSERT_EQ(fdinfo(self->fd, "guest_memfd_page_size"), page_size);
	TEST_ASSERT_EQ(fdinfo(self->fd, "guest_memfd_size"), self->size);

	assert_memory(0);
	kvm_fallocate(self->fd, ALLOCATE, page_size, page_size);
	assert_memory(1);
	kvm_fallocate(self->fd, ALLOCATE, 0, 2 * page_size);
	assert_memory(2);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, page_size);
	assert_memory(1);

	if (variant->flags & GUEST_MEMFD_FLAG_MMAP) {
		mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
		WRITE_ONCE(*mem, 1);
		assert_memory(2);
		kvm_munmap(mem, self->size);
		assert_memory(2);
	}

	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->size);
	assert_memory(0);
}

/* All files share a superblock, whatever their page size is. */
TEST_F(info, statfs)
{
	struct statfs fs;

	TEST_ASSERT(!fstatfs(self->fd, &fs), "fstatfs(): errno %d", errno);
	TEST_ASSERT_EQ(fs.f_type, GUEST_MEMFD_MAGIC);
	TEST_ASSERT_EQ(fs.f_bsize, self->page_size);
}

TEST_F(info, seek)
{
	const off_t size = self->size;
	char buf[8];

	TEST_ASSERT_EQ(lseek(self->fd, 0, SEEK_END), size);
	TEST_ASSERT_EQ(lseek(self->fd, 0, SEEK_CUR), size);
	TEST_ASSERT_EQ(lseek(self->fd, 123, SEEK_SET), 123);
	TEST_ASSERT_EQ(lseek(self->fd, 5, SEEK_CUR), 128);
	TEST_ASSERT(lseek(self->fd, -1, SEEK_SET) == -1 && errno == EINVAL, "errno %d", errno);
	TEST_ASSERT(lseek(self->fd, 0, 99) == -1 && errno == EINVAL, "errno %d", errno);

	/* As for hugetlbfs, a file is data from end to end. */
	TEST_ASSERT_EQ(lseek(self->fd, 1, SEEK_DATA), 1);
	TEST_ASSERT_EQ(lseek(self->fd, 1, SEEK_HOLE), size);
	TEST_ASSERT(lseek(self->fd, size, SEEK_DATA) == -1 && errno == ENXIO, "errno %d", errno);
	TEST_ASSERT(lseek(self->fd, size, SEEK_HOLE) == -1 && errno == ENXIO, "errno %d", errno);

	/* A position is of no use to those. */
	TEST_ASSERT(read(self->fd, buf, 8) == -1 && errno == EINVAL, "errno %d", errno);
	TEST_ASSERT(write(self->fd, buf, 8) == -1 && errno == EINVAL, "errno %d", errno);
}

TEST_F(info, inode_number)
{
	struct stat st, other_st;
	int other_fd;

	other_fd = vm_create_guest_memfd(self->vm, getpagesize(), 0);
	TEST_ASSERT(!fstat(self->fd, &st) && !fstat(other_fd, &other_st), "fstat() failed");
	TEST_ASSERT_EQ(st.st_dev, other_st.st_dev);
	TEST_ASSERT(st.st_ino != other_st.st_ino, "Two inodes have number %lu", st.st_ino);
	TEST_ASSERT_EQ(fdinfo(self->fd, "ino"), st.st_ino);
	kvm_close(other_fd);
}

static void trace_write(const char *name, const char *value)
{
	char path[128];
	int fd;

	snprintf(path, sizeof(path), TRACING "/%s", name);
	fd = open(path, O_WRONLY | O_TRUNC);
	TEST_ASSERT(fd >= 0, "Can't open %s", path);
	TEST_ASSERT_EQ(write(fd, value, strlen(value)), strlen(value));
	kvm_close(fd);
}

struct event {
	unsigned long long ino;
	unsigned long long offset;
	unsigned long pages;
	int node;
	unsigned long long time;
};

/* Events of this name and inode, in order.  What an event lacks stays as it is. */
static int trace_read(const char *name, u64 ino, struct event *events, int max)
{
	char line[512], key[64];
	struct event event;
	int nr = 0;
	FILE *file;

	snprintf(key, sizeof(key), " %s: ", strchr(name, '/') + 1);
	file = fopen(TRACING "/trace", "r");
	TEST_ASSERT(file, "Can't open " TRACING "/trace");
	while (fgets(line, sizeof(line), file)) {
		const char *p = strstr(line, key);

		if (line[0] == '#' || !p)
			continue;

		p += strlen(key);
		memset(&event, 0xff, sizeof(event));
		TEST_ASSERT(sscanf(p, "ino %llu", &event.ino) == 1, "'%s'", line);
		if (event.ino != ino)
			continue;

#define read_field(_format, _field)						\
do {										\
	const char *at = strstr(p, #_field " ");				\
										\
	TEST_ASSERT(!at || sscanf(at, #_field " " _format, &event._field) == 1,	\
		    "'%s'", line);						\
} while (0)
		read_field("0x%llx", offset);
		read_field("%lu", pages);
		read_field("%d", node);
		read_field("%llu", time);
#undef read_field

		TEST_ASSERT(nr < max, "More than %d events '%s'", max, name);
		events[nr++] = event;
	}
	fclose(file);
	return nr;
}

TEST_F(info, trace)
{
	const unsigned long small_pages = self->page_size / getpagesize();
	static const char * const events[] = {
		"kvm/kvm_gmem_allocate", "kvm/kvm_gmem_punch_hole", "kvm/kvm_gmem_evict",
		"hugetlb_loan/hugetlb_loan_return",
	};
	struct event event[NR_PAGES + 1];
	struct stat st;
	char path[96];
	int i;

	if (access(TRACING "/events/kvm/kvm_gmem_allocate", F_OK))
		SKIP(return, "no " TRACING "/events/kvm/kvm_gmem_allocate");
	TEST_ASSERT(!fstat(self->fd, &st), "fstat(): errno %d", errno);

	trace_write("trace", " ");
	for (i = 0; i < ARRAY_SIZE(events); i++) {
		snprintf(path, sizeof(path), "events/%s/enable", events[i]);
		trace_write(path, "1");
	}

	kvm_fallocate(self->fd, ALLOCATE, self->page_size, 2 * self->page_size);
	kvm_fallocate(self->fd, PUNCH_HOLE, self->page_size, self->page_size);
	kvm_close(self->fd);
	self->fd = -1;
	kvm_vm_free(self->vm);

	for (i = 0; i < ARRAY_SIZE(events); i++) {
		snprintf(path, sizeof(path), "events/%s/enable", events[i]);
		trace_write(path, "0");
	}

	/* Small pages are zeroed, and may be used, when they are first touched. */
	if (self->is_hugetlb || variant->flags & GUEST_MEMFD_FLAG_NO_DIRECT_MAP) {
		TEST_ASSERT_EQ(trace_read(events[0], st.st_ino, event, NR_PAGES), 2);
		for (i = 0; i < 2; i++) {
			TEST_ASSERT_EQ(event[i].offset, (i + 1) * self->page_size);
			TEST_ASSERT_EQ(event[i].pages, small_pages);
			TEST_ASSERT(event[i].node >= 0 && event[i].node < 64,
				    "Node %d", event[i].node);
			TEST_ASSERT(event[i].time && event[i].time < 100000000000ull,
				    "%llu ns", event[i].time);
		}
	} else {
		TEST_ASSERT_EQ(trace_read(events[0], st.st_ino, event, NR_PAGES), 0);
	}

	TEST_ASSERT_EQ(trace_read(events[1], st.st_ino, event, NR_PAGES), 1);
	TEST_ASSERT_EQ(event[0].offset, self->page_size);
	TEST_ASSERT_EQ(event[0].pages, small_pages);
	TEST_ASSERT(event[0].time && event[0].time < 100000000000ull, "%llu ns", event[0].time);

	/* One by the hole, one with the file */
	TEST_ASSERT_EQ(trace_read(events[3], st.st_ino, event, NR_PAGES),
		       self->is_hugetlb ? 2 : 0);
	for (i = 0; i < (self->is_hugetlb ? 2 : 0); i++) {
		TEST_ASSERT_EQ(event[i].offset, (i + 1) * self->page_size);
		TEST_ASSERT_EQ(event[i].pages, small_pages);
		TEST_ASSERT(event[i].node >= 0 && event[i].node < 64, "Node %d", event[i].node);
	}

	TEST_ASSERT_EQ(trace_read(events[2], st.st_ino, event, NR_PAGES), 1);
	TEST_ASSERT_EQ(event[0].pages, small_pages);
	TEST_ASSERT(event[0].time && event[0].time < 100000000000ull, "%llu ns", event[0].time);
}

TEST_HARNESS_MAIN
