// SPDX-License-Identifier: GPL-2.0
/*
 * guest_init - the whole user space of a demonstration guest
 *
 * As /init of an initramfs: fill nearly all free memory with a pattern, from all
 * CPUs at once, read it back, say so, power off.  Milestones for the VMM, see
 * guest_memfd_vmm.c: user space is reached; memory is written and verified.
 *
 * What goes wrong ends in exit(), which panics the kernel: nothing but success
 * powers off.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/utsname.h>
#include <termios.h>
#include <unistd.h>

#include <linux/sizes.h>
#include <linux/types.h>

#ifndef TIOCM_OUT1
#define TIOCM_OUT1	0x2000	/* glibc has no name for it */
#endif

#define PAGE_WORDS	(SZ_4K / sizeof(u64))

static u64 *memory;
static unsigned long nr_pages;
static int nr_cpus;

static void fatal(const char *what)
{
	printf("guest_init: %s: %s\n", what, strerror(errno));
	exit(EXIT_FAILURE);
}

static void pin_to(unsigned long cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		fatal("sched_setaffinity");
}

/* No two words of memory have the same, and none has zero. */
static u64 pattern(unsigned long word)
{
	return (word + 1) * 0x9e3779b97f4a7c15ULL;
}

/* Run on CPU n, and take every nr_cpus-th page, so that all work on each huge page. */
static void *touch(void *arg)
{
	unsigned long cpu = (unsigned long)arg;
	unsigned long page, word;

	pin_to(cpu);
	for (page = cpu; page < nr_pages; page += nr_cpus)
		for (word = page * PAGE_WORDS; word < (page + 1) * PAGE_WORDS; word++)
			memory[word] = pattern(word);
	return NULL;
}

/* Read what the next CPU has written. */
static void *verify(void *arg)
{
	unsigned long cpu = (unsigned long)arg;
	unsigned long page, word;

	pin_to(cpu);
	for (page = (cpu + 1) % nr_cpus; page < nr_pages; page += nr_cpus)
		for (word = page * PAGE_WORDS; word < (page + 1) * PAGE_WORDS; word++)
			if (memory[word] != pattern(word))
				return &memory[word];
	return NULL;
}

static void on_all_cpus(void *(*func)(void *))
{
	pthread_t threads[nr_cpus];
	u64 *wrong = NULL;
	void *ret;
	int i;

	for (i = 0; i < nr_cpus; i++) {
		errno = pthread_create(&threads[i], NULL, func, (void *)(unsigned long)i);
		if (errno)
			fatal("pthread_create");
	}
	for (i = 0; i < nr_cpus; i++) {
		pthread_join(threads[i], &ret);
		if (ret)
			wrong = ret;
	}
	if (wrong) {
		printf("guest_init: word %zu of memory is %#llx, but %#llx was written\n",
		       wrong - memory, (unsigned long long)*wrong,
		       (unsigned long long)pattern(wrong - memory));
		exit(EXIT_FAILURE);
	}
}

static void milestone(void)
{
	int out1 = TIOCM_OUT1;

	/* So that the console has what was said before the milestone. */
	fflush(stdout);
	if (tcdrain(STDOUT_FILENO))
		fatal("tcdrain");
	if (ioctl(STDOUT_FILENO, TIOCMBIS, &out1) || ioctl(STDOUT_FILENO, TIOCMBIC, &out1))
		fatal("TIOCMBIS, TIOCMBIC");
}

int main(void)
{
	unsigned long size, kept;
	struct utsname uts;

	if (getpid() != 1) {
		fprintf(stderr, "guest_init: is for the init of a guest, it powers off\n");
		return EXIT_FAILURE;
	}

	milestone();
	nr_cpus = sysconf(_SC_NPROCESSORS_ONLN);
	size = sysconf(_SC_AVPHYS_PAGES) * SZ_4K;
	uname(&uts);
	printf("guest_init: Linux %s, %d CPUs, %lu MiB of memory, %lu MiB free\n",
	       uts.release, nr_cpus, sysconf(_SC_PHYS_PAGES) * SZ_4K / SZ_1M, size / SZ_1M);

	/* The page allocator keeps some back, and nothing here can be reclaimed. */
	kept = size / 16 + 16 * SZ_1M;
	if (size < kept + SZ_4K) {
		printf("guest_init: too little memory is free, %lu MiB are kept back\n",
		       kept / SZ_1M);
		return EXIT_FAILURE;
	}
	nr_pages = (size - kept) / SZ_4K;
	memory = mmap(NULL, nr_pages * SZ_4K, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		fatal("mmap");

	on_all_cpus(touch);
	on_all_cpus(verify);
	printf("guest_init: %lu MiB written, read back and found right\n",
	       nr_pages * SZ_4K / SZ_1M);
	milestone();

	reboot(RB_POWER_OFF);
	fatal("reboot");
	return EXIT_FAILURE;
}
