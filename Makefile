# SPDX-License-Identifier: GPL-2.0

.PHONY: help demo check mutants stress bench builds tree refresh series lint packages clean distclean
.NOTPARALLEL:

help:
	@echo 'Huge pages and a sound life cycle for guest_memfd'
	@echo ''
	@echo '  make demo       boot a Linux guest on 4K, 2M and 1G guest_memfd pages'
	@echo '  make check      build the kernel and run its tests in QEMU'
	@echo '  make mutants    take lines out one at a time, and see a test fail'
	@echo '  make bench      measure what the series gains and costs'
	@echo '  make stress     do everything at random for DURATION seconds (60)'
	@echo '  make builds     compile each patch, and what cannot be run: arm64, SEV-SNP, TDX, !NUMA, ...'
	@echo ''
	@echo '  make tree       assemble the kernel source with the series, in build/linux'
	@echo '  make refresh    write commits in build/linux back to patches/ and new files'
	@echo '  make series     write the series for git am, to build/series'
	@echo '  make lint       check that all of this agrees, and its style'
	@echo ''
	@echo '  make clean      remove what was built, but not the source'
	@echo '  make distclean  remove build/'
	@echo ''
	@echo 'BUILDS= (builds) names some of them, see scripts/builds --help.'
	@echo 'DEBUG=1 (check, stress) takes the kernel with all debugging on.  LINUX_SRC= names'
	@echo 'the source of the base, TREE= (refresh) another repository with the series,'
	@echo 'FORCE=1 (tree, refresh) drops edits, MUTANTS= (mutants) selects some by name.'
	@echo 'See also scripts/boot --help.'

packages:
	@scripts/packages

tree refresh series: packages
	@scripts/series $@

lint: tree
	@scripts/series lint

debug := $(if $(filter-out 0,$(DEBUG)),--debug)

check: tree
	@scripts/check $(debug)

mutants: tree
	@scripts/build selftests
	@scripts/mutants $(MUTANTS)

demo: tree
	@scripts/build kernel
	@scripts/build vmm
	@scripts/demo

DURATION ?= 60
stress: tree
	@scripts/build kernel $(debug)
	@scripts/build selftests
	@scripts/boot $(debug) --memory 7G --cpus 4 --nodes 2 \
		--timeout $$(($(DURATION) + $(if $(debug),1800,600))) --append "hugepagesz=1G hugepages=3 hugepagesz=2M hugepages=64" \
		build/selftests/guest_memfd_stress --memory-failures 16 \
		--duration $(DURATION) $(if $(SEED),--seed $(SEED)) $(if $(ROUND),--round $(ROUND))

builds: tree
	@scripts/builds $(BUILDS)

bench: tree
	@scripts/build kernel
	@scripts/build selftests
	@scripts/bench

clean:
	rm -rf build/kernel* build/selftests* build/vmm build/series build/mutants

distclean:
	rm -rf build
