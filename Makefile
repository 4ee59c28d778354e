# ztgate: `make` alone prints what there is.
GO        ?= go
BIN       ?= bin/ztgate
comma     := ,
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS   := -s -w -X ztgate/router/control.Version=$(VERSION)
FUZZTIME  ?= 10s
RACE_PKGS := ./zerotier/... ./netstack/... ./router/...

.DEFAULT_GOAL := help
.PHONY: help build have-libzt build-libzt test-libzt lab test race e2e interop portable conformance conformance-linux soak attack simulate simulate-faults bench lint fuzz clean deps

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install the Debian packages the tests use (root, apt)
	@deploy/install-deps.sh

build: ## one static binary in bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/ztgate

# Where libzt is: pkg-config knows it, or it lies under LIBZT_PREFIX, or CGO_CFLAGS
# and CGO_LDFLAGS say it all. LIBZT_STATIC=1 links it statically.
LIBZT_BIN  ?= bin/ztgate-libzt
LIBZT_TAGS := libzt$(if $(LIBZT_STATIC),$(comma)libzt_static)
LIBZT_LIBS := $(if $(LIBZT_PREFIX),-L$(LIBZT_PREFIX)/lib -Wl$(comma)-rpath$(comma)$(LIBZT_PREFIX)/lib,$(shell pkg-config --libs-only-L --libs-only-other libzt 2>/dev/null))
LIBZT_ENV  := CGO_ENABLED=1 CGO_LDFLAGS='$(strip $(CGO_LDFLAGS) $(LIBZT_LIBS))'

have-libzt:
	@deploy/find-libzt.sh || { echo 'libzt is not installed: set LIBZT_PREFIX to where it is, or see docs/libzt.md'; exit 1; }

build-libzt: have-libzt ## a ztgate with libzt as its node too, in bin/ (docs/libzt.md)
	$(LIBZT_ENV) $(GO) build -trimpath -tags $(LIBZT_TAGS) -ldflags '$(LDFLAGS)' -o $(LIBZT_BIN) ./cmd/ztgate

test-libzt: build-libzt deps ## tests of the node on libzt, with the race detector and in namespaces (root)
	$(LIBZT_ENV) $(GO) vet -tags $(LIBZT_TAGS) ./bindings/ ./router/... ./cmd/...
	$(LIBZT_ENV) $(GO) tool staticcheck -tags $(LIBZT_TAGS) ./bindings/ ./router/...
	$(LIBZT_ENV) GODEBUG=cgocheck=1 $(GO) test -count=1 -tags $(LIBZT_TAGS) ./bindings/ ./router/... ./cmd/...
	$(LIBZT_ENV) GODEBUG=cgocheck=1 $(GO) test -count=1 -race -tags $(LIBZT_TAGS) ./bindings/
	ZTGATE=$(CURDIR)/$(LIBZT_BIN) $(GO) test -count=1 -tags e2e -timeout 10m -run Libzt -v ./router/e2e/
	ZTGATE_E2E_NODE=libzt ZTGATE=$(CURDIR)/$(LIBZT_BIN) $(GO) test -count=1 -tags e2e -timeout 10m -run 'TestGateway|TestForwards|TestReload|TestMemory' ./router/e2e/

lab: build ## the whole scenario on this machine, in network namespaces (root)
	$(BIN) lab

test: deps lint ## all tests: lint, unit, race detector, other platforms, end to end in namespaces (root)
	$(GO) test ./...
	$(MAKE) race
	$(MAKE) portable
	$(MAKE) fuzz FUZZTIME=3s
	$(GO) test -run '^$$' -bench . -benchtime 1x ./... >/dev/null
	$(MAKE) e2e

race:
	$(GO) test -race -short $(RACE_PKGS)

# The code that replaces assembly and Linux's system calls elsewhere, and whatever
# depends on the order of bytes or the layout of memory on another architecture.
# Left out are counts of allocations, since the portable AES makes one a packet,
# and a test that starts itself, which the emulator can't.
PORTABLE_TAGS := portableudp,purego
ARM64_PKGS    := ./internal/... ./netstack/internal/... ./zerotier/identity ./zerotier/internal/... \
	./zerotier/packet ./zerotier/transport ./zerotier/vl2 ./zerotier/ztnode ./.../tuntap

portable: deps ## build, vet and test without assembly and Linux's batches, and on arm64 (emulated)
	$(GO) build -tags $(PORTABLE_TAGS) ./...
	$(GO) vet -tags $(PORTABLE_TAGS) ./...
	$(GO) test -short -tags $(PORTABLE_TAGS) -skip 'Alloc|TestRelayIsBounded' ./zerotier/...
	GOARCH=arm64 $(GO) vet ./...
	GOARCH=arm64 $(GO) test -short -exec qemu-aarch64-static -skip 'Alloc|TestFollowAddresses' $(ARM64_PKGS)

e2e: build
	ZTGATE=$(CURDIR)/$(BIN) $(GO) test -count=1 -tags e2e -timeout 20m ./router/e2e/...

conformance: deps build ## the rows of docs/nat.md: every one on the forwarding plane, with real programs, loads and faults (root)
	cd netstack/conformance && $(GO) test -count=1 -tags e2e -timeout 10m -run 'TestConformance|TestPrograms|TestLoad|TestFaults|TestUnderlay' -strict
	cd router/faults && ZTGATE=$(CURDIR)/$(BIN) $(GO) test -count=1 -tags e2e -timeout 8m -table

SOAK       ?= 24h
SOAK_EVERY ?= 10m
soak: build ## 30 % load for SOAK with a fault every SOAK_EVERY, and everything flat (root)
	cd router/faults && ZTGATE=$(CURDIR)/$(BIN) $(GO) test -count=1 -tags e2e -timeout 0 -run TestSoak -v -table -soak $(SOAK) -soak-every $(SOAK_EVERY)

ROW ?= .
attack: deps build ## what others lose while the gateway is attacked, attack by attack; ROW=regexp chooses some, MEMORY=256M bounds the gateway's memory, TABLE=file keeps the table (root)
	cd router/attack && ZTGATE=$(CURDIR)/$(BIN) $(GO) test -count=1 -tags e2e -timeout 12m -run 'TestAttack/$(ROW)' -memory '$(MEMORY)' -table '$(TABLE)'

# Every process begins with seeds of its own. What a seed found happens again with
# go test ./router/sim -run Worlds -v -seed N -quiet 72h.
SIM       ?= 1h
SIM_PROCS ?= $(shell nproc)
SIM_SEED  ?= $(shell date +%s)
simulate: ## the gateway with everything around it on a simulated clock for SIM, from ever new seeds
	$(GO) test -c -o bin/sim.test ./router/sim
	cd router/sim && seq 0 $$(($(SIM_PROCS)-1)) | xargs -P $(SIM_PROCS) -I{} sh -c \
		'../../bin/sim.test -test.run "^TestWorlds$$" -test.timeout 0 -sim $(SIM) -quiet 72h -first $$(($(SIM_SEED)+{}*1000000))'

simulate-faults: ## which faults the simulator finds when they are put back, as a table in bench/results/simulator.md
	cd router/sim && $(GO) test -count=1 -timeout 0 -run '^TestPlanted$$' -planted ../../bench/results/simulator.md -v .

conformance-linux: deps ## the same rows on the kernel's nftables masquerade, as a control (root)
	cd netstack/conformance && $(GO) test -count=1 -tags e2e -timeout 5m -run TestLinux -table

# Its last output is a table of what was tried with what, also in the file TABLE.
interop: build ## against real nodes: ZT_ONE=path, also ZT_ONE_OLD=path, ZT_ONE_NEW=path, ZT_GO=path, LIBZT_PREFIX=dir, TABLE=file (root)
	@test -x "$(ZT_ONE)" || { echo 'set ZT_ONE to the path of a zerotier-one (and ZT_ONE_OLD, ZT_ONE_NEW to those of an older and a newer one, if you have them)'; exit 1; }
	@if deploy/find-libzt.sh; then $(MAKE) build-libzt; fi
	ZTGATE=$(CURDIR)/$(BIN) ZTGATE_LIBZT=$$(deploy/find-libzt.sh && echo $(CURDIR)/$(LIBZT_BIN)) \
		ZT_ONE='$(ZT_ONE)' ZT_ONE_OLD='$(ZT_ONE_OLD)' ZT_ONE_NEW='$(ZT_ONE_NEW)' ZT_GO='$(ZT_GO)' LIBZT_PREFIX='$(LIBZT_PREFIX)' ZTGATE_E2E_TABLE='$(TABLE)' \
		$(GO) test -count=1 -tags e2e -timeout 25m -parallel 5 -v -run Interop ./router/e2e/...

# With libzt installed both nodes are measured, in the same run.
bench: build deps ## benchmarks and the end-to-end comparison with kernel forwarding (root)
	@if deploy/find-libzt.sh; then $(MAKE) build-libzt; fi
	ZTGATE=$$(deploy/find-libzt.sh && echo $(CURDIR)/$(LIBZT_BIN) || echo $(CURDIR)/$(BIN)) $(GO) run ./bench/cmd/ztbench

lint: ## gofmt, go vet, staticcheck
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'run gofmt -w on these files'; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

fuzz: ## every fuzz target for FUZZTIME
	@FUZZTIME=$(FUZZTIME) GO=$(GO) deploy/fuzz.sh

clean: ## remove what make build made
	rm -rf bin
