# Targets, in one line each: make help.
#
# STRICT=1 in the environment turns every skipped test and every missing test
# tool into a failure. NO_INSTALL=1 keeps test and interop from installing tools.

SHELL := /bin/sh
.DEFAULT_GOAL := help

VERSION  := $(shell cat VERSION)
LDFLAGS  := -s -w -X xapi-nbd/cmd/internal/buildinfo.version=$(VERSION)
GO       ?= go
FUZZTIME ?= 20s
ARGS     ?=
SOAK     ?= 10m
SOAK_STEPS ?= 100000
DESTDIR  ?=
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

# The programs are the folders in cmd/ that hold a main package.
PROGRAMS := $(patsubst cmd/%/main.go,%,$(wildcard cmd/*/main.go))

.PHONY: help build test test-short soak bench interop interop-ends interop-xo test-vm mutations race fuzz lint cover man demo install deb rpm clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: ## static programs in bin/
	@mkdir -p bin
	@set -e; for p in $(PROGRAMS); do \
		echo "bin/$$p $(VERSION)"; \
		CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$$p ./cmd/$$p; \
	done

test-short: ## vet and the short tests: no root, no tools besides Go and gcc, no race detector
	$(GO) vet ./...
	STRICT= $(GO) test -short ./...

test: ## all tests with the race detector, after installing test tools (NO_INSTALL=1 does not)
	test/install-tools.sh
	$(GO) vet ./...
	$(GO) mod tidy -diff
	$(GO) run ./test/report -race -shuffle=on -timeout 30m ./...
	@echo 'without the race detector: tests that measure memory or time, and of the system calls that it needs in another form'
	$(GO) run ./test/report -run '^Test(Endurance|ClientsBesideHostileOnes|NoAllocations|Socket|Splice)' ./cmd/xapi-nbd ./nbd ./nbd/wire ./vdi/blockdev

soak: ## stress test (SOAK, 10m each), random walk, images that change while they are read, mirror
	SOAK=$(SOAK) $(GO) test -v -timeout 0 -run '^TestStress$$' ./cmd/xapi-nbd
	SOAK_STEPS=$(SOAK_STEPS) $(GO) test -v -timeout 0 -run '^TestRandomWalk$$' ./vdi
	SOAK_SCHEDULES=$(SOAK_STEPS) $(GO) test -v -timeout 0 -run '^TestHolesAreCertain$$' ./vdi/allocation
	SOAK_STEPS=$(SOAK_STEPS) $(GO) test -v -timeout 0 -run '^TestModel$$' ./mirror
	SOAK_STEPS=$(SOAK_STEPS) $(GO) test -v -timeout 0 ./mirror/intent

bench: ## against nbdkit and qemu-nbd; takes about 35 minutes (ARGS="-run bulk -rounds 3")
	$(GO) run ./test/bench -o docs/results/BENCHMARKS.md $(ARGS)

interop: ## real clients, OCaml, Xen Orchestra's client, the VMs; writes docs/results/INTEROP.md
	test/install-tools.sh
	INTEROP_XO=1 VM=1 $(GO) run ./test/interop/report docs/results/INTEROP.md -count=1 -p 1 -timeout 80m -skip '^TestEnds$$' ./test/interop ./ocaml-interop-tests ./test/vm

interop-ends: ## what clients do when the service ends their connections; writes docs/results/ENDS.md
	test/install-tools.sh
	INTEROP_XO=1 $(GO) run ./test/interop/report docs/results/ENDS.md -count=1 -timeout 40m -run '^TestEnds$$' ./test/interop

interop-xo: ## Xen Orchestra's own NBD client, from the npm registry
	INTEROP_XO=1 $(GO) test -count=1 -v -run '^TestXO$$' ./test/interop

test-vm: ## under a real systemd, and in emulated machines: real Xen, the kernel's NBD devices (root; about ten minutes)
	VM=1 $(GO) test -count=1 -v -timeout 60m ./test/vm

mutations: ## applies each patch of test/mutations to a copy and shows which tests fail
	test/mutations/run.sh

race: ## all tests with the race detector, three times, without the cache
	$(GO) test -race -shuffle=on -count=3 ./...

fuzz: ## every fuzz target for FUZZTIME (20s) each
	@set -e; for dir in $$($(GO) list -f '{{.Dir}}' ./...); do \
		for target in $$(cat /dev/null "$$dir"/*_test.go 2>/dev/null | sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p'); do \
			echo "== $$dir $$target"; \
			(cd "$$dir" && $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) .); \
		done; \
	done

lint: ## golangci-lint, pinned; the first run compiles it, which takes minutes
	$(GO) run $(GOLANGCI) run

cover: ## bin/cover.html, and the total
	@mkdir -p bin
	$(GO) test -coverpkg=./... -coverprofile=bin/cover.out ./...
	$(GO) tool cover -html=bin/cover.out -o bin/cover.html
	@$(GO) tool cover -func=bin/cover.out | tail -n 1

man: ## man pages in bin/man, from the programs' own definitions
	packaging/man.sh bin/man

demo: build ## simulated host, service and client on loopback (ARGS=--once to end at once)
	bin/xapi-nbd demo $(ARGS)

install: ## builds and installs into DESTDIR, as packages do
	packaging/install.sh $(DESTDIR)

deb: ## bin/xapi-nbd_*.deb, with the pinned nfpm
	packaging/build-deb.sh bin

rpm: ## bin/rpm: source and binary package, with rpmbuild
	packaging/build-rpm.sh bin/rpm

clean: ## removes bin/
	rm -rf bin
