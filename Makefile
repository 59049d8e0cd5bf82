# cryptcsi. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# test/install.sh puts a Go toolchain and linters here where they are missing.
export PATH := $(CURDIR)/.cache/go/bin:$(CURDIR)/.tools/bin:$(PATH)
# Where VM=qemu finds its kernel, see `test/install.sh qemu`.
export VM_KERNEL_DIR ?= $(CURDIR)/.cache/kernel
# A test that misses something on this machine fails instead of being skipped.
export REQUIRE_ALL ?= 1

COMMIT  ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
VERSION ?= $(shell git describe --tags --dirty 2>/dev/null || echo dev)
LDFLAGS  = -X main.version=$(VERSION) -X main.commit=$(COMMIT)
GOBUILD  = go build -trimpath -ldflags '-s -w $(LDFLAGS)'

IMAGE_TARGET ?= csi-plugin
IMAGE    ?= cryptcsi/$(IMAGE_TARGET):dev
FUZZTIME ?= 30s
KEYS     ?= service

# find-pkgs NAME: sets pkgs to the packages in whose tests a function begins with NAME.
find-pkgs = pkgs=$$(grep -rlE --include='*_test.go' --exclude-dir='.?*' '^func $(1)' . | xargs dirname | sort -u) \
	|| { echo 'no test file has a function $(1)…'; exit 1; }

# packages GREP: the packages whose tests import test/peers (grep) or do not (grep -v).
MODULE   = github.com/cryptcsi/cryptcsi
packages = go list -f '{{.ImportPath}} {{join .TestImports " "}} {{join .XTestImports " "}}' ./... \
	| $(1) ' $(MODULE)/test/peers' | cut -d' ' -f1

# in-guest: how go test runs a test binary on a kernel that has dm-crypt.
in-guest = -exec '$(CURDIR)/bin/vm'

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

.PHONY: install
install: # what building and testing need; takes no time when it is there
	@test/install.sh packages go

.PHONY: build
build: install ## build all binaries into bin/
	CGO_ENABLED=0 $(GOBUILD) -o bin/csi-plugin ./cmd/csi-plugin
	$(GOBUILD) -o bin/key-service ./cmd/key-service
	$(GOBUILD) -o bin/crypt-worker ./cmd/crypt-worker
	CGO_ENABLED=0 $(GOBUILD) -o bin/loopdriver ./test/loopdriver/cmd/loopdriver
	CGO_ENABLED=0 $(GOBUILD) -o bin/vm ./test/vm
	CGO_ENABLED=0 $(GOBUILD) -o bin/demo ./test/demo
	CGO_ENABLED=0 $(GOBUILD) -o bin/attack ./test/attack
	CGO_ENABLED=0 $(GOBUILD) -o bin/bench ./test/bench
	CGO_ENABLED=0 $(GOBUILD) -o bin/e2e ./test/e2e

.PHONY: demo
demo: build ## watch volumes come up encrypted, on a kernel with device-mapper (KEYS=direct: without a key service)
	@bin/vm -- bin/demo --keys=$(KEYS)

.PHONY: attack
attack: build ## what a hostile host can do to volumes, against ours and plain cryptsetup (SEED=1 N=300 random changes)
	@bin/vm -timeout 15m -- bin/attack -seed=$(or $(SEED),1) -n=$(or $(N),300)

.PHONY: test
test: unit test-keys kernel ## all tests; sanity is one of the kernel's

.PHONY: unit
unit: build ## tests that need neither a kernel nor a server of their own, with the race detector
	@test/install.sh images
	go test -race -timeout 20m -skip '^TestKernel' $$($(call packages,grep -v))

.PHONY: peers
peers: install # the servers that test-keys talks to
	@test/install.sh peers

.PHONY: test-keys
test-keys: build peers ## every KMS and every store against real servers; prints the table KEK x store x check
	go test -race -timeout 20m -skip '^TestKernel' $$($(call packages,grep) | grep -vx $(MODULE)/test/keys)
	go test ./kms/kmip # again: the server of its fault tests cannot run with the race detector
	go test -count=1 -v ./test/keys | grep -vE '^(=== |PASS$$| *--- PASS)'

.PHONY: test-keys-full
test-keys-full: build peers ## the same with the full OpenBao server (7 minutes to build) and 1000 rounds of races
	@test/install.sh peers=openbao
	FULL=1 go test -count=1 -v -run '^TestFull' ./kms/transit
	KEYS_ROUNDS=1000 go test -count=1 -timeout 3h -v -run TestRace ./test/keys | grep -vE '^(=== |PASS$$| *--- PASS)'

.PHONY: cryptsetups
cryptsetups: # the oldest and the newest libcryptsetup of Debian, for a kernel test
	@test/install.sh cryptsetup-next

.PHONY: gcepd-build
gcepd-build: install # a module of its own; two minutes once, then nothing
	@cd test/gcepd && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ../../bin/gcepd .

.PHONY: kernel
kernel: build cryptsetups gcepd-build ## tests on a kernel with dm-crypt (VM=native, uml or qemu chooses)
	@$(call find-pkgs,TestKernel); set -x; \
	go test -count=1 -timeout 30m $(in-guest) -run '^TestKernel' $$pkgs

.PHONY: e2e
e2e: build ## a real Kubernetes with the plugin as deploy/kubernetes installs it (ONLY=regexp of scenarios)
	@test/install.sh e2e e2e-storage e2e-previous peers=transit peers=gofakes3
	@bin/e2e -only='$(ONLY)'

.PHONY: e2e-short
e2e-short: build ## the same in a few minutes, as .ci/run has it
	@test/install.sh e2e e2e-storage
	@bin/e2e -short -only='$(ONLY)'

.PHONY: e2e-full
e2e-full: build ## all of Kubernetes' own storage tests that can run here (13 minutes; ONLY=regexp of specs)
	@test/install.sh e2e e2e-storage
	@bin/e2e -full -only='$(ONLY)'

.PHONY: crash
crash: build ## kill worker and guest at every step of a volume's first life (make test: a sample)
	CRASH_EVERY=1 go test -count=1 -timeout 20m -v ./test/crash
	CRASH_EVERY=1 VM_ENV=CRASH_EVERY go test -count=1 -timeout 40m $(in-guest) -run 'TestKernel.*KilledAtSteps' -v ./cryptmapper/worker

.PHONY: sequences
sequences: install ## whatever sequences of CSI calls an orchestrator may make, against a model (SEED=1 N=10000, FIRST=0)
	SEQUENCES_SEED=$(or $(SEED),1) SEQUENCES_N=$(or $(N),10000) SEQUENCES_FIRST=$(or $(FIRST),0) \
		go test -count=1 -timeout 2h -v -run '^TestSequences$$' ./driver | grep -vE '^=== '

.PHONY: kill-hydration
kill-hydration: build ## cut the power of hydrating integrity volumes N=200 times (SEED=1; make test: a sample)
	$(GOBUILD) -o bin/hydration ./test/hydration
	@bin/vm -mem 3G -timeout 3h -- bin/hydration -n=$(or $(N),200) -seed=$(or $(SEED),1) $(HYDRATION)

.PHONY: sanity
sanity: build gcepd-build ## csi-sanity in full over each driver, with the list of what it skips (make kernel: a part of it over most)
	SANITY_ALL=1 VM_ENV=SANITY_ALL go test -count=1 -timeout 40m $(in-guest) -run '^TestKernel' -v ./test/sanity

.PHONY: gcepd
gcepd: build gcepd-build ## csi-sanity over csi-plugin and the real driver of Google's persistent disks
	go test -count=1 -timeout 9m $(in-guest) -run '^TestKernel' -v ./test/sanity -args -ginkgo.focus='GCE PD itself'

.PHONY: bench
bench: build ## staging against the same done by hand, on one kernel; not a test
	@bin/vm -mem 4G -timeout 30m -- bin/bench

.PHONY: bench-integrity
bench-integrity: build ## volumes with integrity: until they are usable, how fast they are, what each choice costs (about half an hour; BENCH=-parts=…)
	$(GOBUILD) -o bin/benchintegrity ./test/benchintegrity
	@bin/benchintegrity -host -clock=$(CURDIR)/.cache/bench/clock -- bin/vm -mem 6G -timeout 3h -rw .cache/bench -- \
		bin/benchintegrity -clock=$(CURDIR)/.cache/bench/clock -out=$(CURDIR)/.cache/bench/integrity.json $(BENCH)

.PHONY: bench-hydration
bench-hydration: build ## hydrate a volume of 16 GiB once (takes as much disk)
	$(GOBUILD) -o bin/benchintegrity ./test/benchintegrity
	@disk=$$(mktemp -p .cache) && trap 'rm -f "$$disk"' EXIT && truncate -s 16G "$$disk" && \
	bin/benchintegrity -host -clock=$(CURDIR)/.cache/bench/clock -- bin/vm -timeout 3h -rw .cache/bench -disk "$$disk" -- \
		bin/benchintegrity -clock=$(CURDIR)/.cache/bench/clock -out=$(CURDIR)/.cache/bench/hydration.json -parts=whole -disk=/dev/ubda

.PHONY: bench-keys
bench-keys: build ## the key service against an empty gRPC echo, a keyring, and a connection for each request; a storm of 1000 nodes
	CGO_ENABLED=0 $(GOBUILD) -o bin/benchkeys ./test/benchkeys
	@bin/benchkeys

.PHONY: fuzz
fuzz: install ## every fuzz target for FUZZTIME (30s)
	@grep -rHoE --include='*_test.go' --exclude-dir='.?*' '^func Fuzz[A-Za-z0-9_]+' . \
	| sed -E 's,^(.*)/[^/]*:func (.*)$$,\1 \2,' | sort \
	| while read -r dir name; do go test -run '^$$' -fuzz "^$$name$$" -fuzztime $(FUZZTIME) "$$dir"; done

.PHONY: cover
cover: build cryptsetups gcepd-build ## coverage of unit and kernel tests together, in .cache/cover
	@rm -rf .cache/cover && mkdir -p .cache/cover/unit .cache/cover/kernel
	go test -count=1 -cover -coverpkg=./... -skip '^TestKernel' ./... -args -test.gocoverdir='$(CURDIR)/.cache/cover/unit'
	@$(call find-pkgs,TestKernel); set -x; \
	go test -count=1 -cover -coverpkg=./... -timeout 30m $(in-guest) -run '^TestKernel' $$pkgs \
		-args -test.gocoverdir='$(CURDIR)/.cache/cover/kernel'
	go tool covdata textfmt -i=.cache/cover/unit,.cache/cover/kernel -o=.cache/cover/profile
	go tool cover -html=.cache/cover/profile -o=.cache/cover/index.html
	go tool cover -func=.cache/cover/profile | tail -n 1

.PHONY: lint
lint: install ## format, vet, linters, go.mod, shell scripts
	@test/install.sh tools
	@bad=$$(git ls-files -z --cached --others --exclude-standard '*.go' | xargs -0 gofmt -l); \
	if [ -n "$$bad" ]; then echo "not formatted by gofmt:" $$bad; exit 1; fi
	go vet ./... && cd test/gcepd && go vet ./...
	golangci-lint run
	go mod tidy -diff
	shellcheck .ci/run test/*.sh

.PHONY: generate
generate: install ## write generated code anew
	go generate ./...

.PHONY: manifests
manifests: install ## check deploy/ against the API's types, a real API server and our programs
	@test/install.sh peers=kube && test/install.sh peers=promql
	go test -count=1 ./deploy/...

# skopeo pushes, and knows how to log in (skopeo login, or docker's own file).
.PHONY: images
images: install ## images of csi-plugin and key-service for amd64 and arm64 in bin/images, pushed where REGISTRY= says
	@test/install.sh images
	for arch in amd64 arm64; do test/images/build.sh $$arch '-s -w $(LDFLAGS)'; done
	go run ./test/images/cmd/images -registry='$(REGISTRY)' -version='$(VERSION)' -commit='$(COMMIT)' -time="$$(git log -1 --format=%ct)"
	@for i in $(if $(REGISTRY),csi-plugin key-service); do \
		skopeo copy --all --insecure-policy $(SKOPEO) oci:bin/images/$$i 'docker://$(REGISTRY)'/$$i:'$(VERSION)'; done

.PHONY: image
image: ## container image IMAGE of csi-plugin, or of IMAGE_TARGET (buildah or docker)
	@tool=$$(command -v buildah || command -v docker) || { echo "neither buildah nor docker is here: apt-get install buildah"; exit 1; }; \
	"$$tool" build --target $(IMAGE_TARGET) --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) -t $(IMAGE) .

.PHONY: clean
clean: ## remove what was built; keeps .cache and .tools
	rm -rf bin
