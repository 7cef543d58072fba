# One line each: what people run, and what CI runs too.
.PHONY: help deps build demo test quotas flaky mutants soak chaos extremes faults model showings bench-install host-test fuzz e2e failures trials powercut record-agent check agent
SHELL := bash
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

deps: ## Install what the tests need and is missing: PostgreSQL (apt), and grpcurl, buf, grpcio in .venv (pip)
	scripts/deps.sh

build: ## Build the three programs, for this machine, with debug checks
	cargo build --bins

demo: ## Try it: a controller and three virtual Pis, updated with a real root file system [DATABASE_URL=postgres://...]
	scripts/programs.sh
	target/debug/marco-demo $(if $(DATABASE_URL),--database-url '$(DATABASE_URL)')

test: deps ## Everything but the lints: unit tests, the store on both databases, fleets, real clients; what failed is repeated at the end
	scripts/programs.sh
	scripts/test.sh

flaky: deps ## Fleet tests FLEETS (10) times and the suite SUITES (3) times while stress holds every core [ONLY='race soak']
	scripts/deps.sh stress
	scripts/programs.sh
	FLEETS=$(or $(FLEETS),10) SUITES=$(or $(SUITES),3) ONLY='$(ONLY)' scripts/flaky.sh

quotas: deps ## Each kind of peer at each listener, greedy for QUOTA_SECONDS (30): memory, files, disk, log, an admin's calls [QUOTA_PEER=viewer]
	scripts/programs.sh
	QUOTA_SECONDS=$(or $(QUOTA_SECONDS),30) cargo test --workspace --test quotas -- --ignored --nocapture

mutants: ## Mutants of the pure modules (states, rollouts, schedules, jobs, roles) that no test notices [MUTANTS='--file src/rollout.rs']
	cargo mutants --version >/dev/null 2>&1 || cargo install --locked cargo-mutants
	scripts/mutants.sh $(MUTANTS)

soak: deps ## Schedules, virtual Pis, three controllers, and random faults for SOAK_SECONDS (600); then everything is checked
	scripts/programs.sh
	SOAK_SECONDS=$(or $(SOAK_SECONDS),600) cargo test --workspace --test soak -- --nocapture

chaos: deps ## Three controllers, each with a way of its own to Postgres; every fault of a machine room for CHAOS_SECONDS (600) [CHAOS_SEED]
	scripts/programs.sh
	CHAOS_SECONDS=$(or $(CHAOS_SECONDS),600) cargo test --workspace --test chaos -- --ignored --nocapture

extremes: deps ## Every field of every request and of every message of a node at its extremes, by each role, on both databases
	scripts/programs.sh
	cargo test --workspace --test extremes -- --nocapture

model: deps ## Random histories against the real store, checked after each step: HISTORIES (10000) [MODEL_SEED]
	HISTORIES=$(or $(HISTORIES),10000) cargo test --workspace --test store model:: -- --nocapture

showings: deps ## That the model and the fault driver find what they are there for: one mending at a time taken out, in a copy [HISTORIES=1000] [MODEL_SEED=1]
	scripts/showings.sh

record-agent: ## Record the agent of this build (its messages, journal and card) in integration-tests/testdata/agent-N, N its protocol
	scripts/programs.sh
	cargo test --workspace --test agents -- --ignored record

faults: ## An update with every fault at every step, and FAULTS (10000) random pairs of them [FAULT_PLAN='Kill at unpack root #1'] [FAULT_ONLY='CutTorn|config.txt'] [FAULT_SEED=7]
	$(if $(FAULT_SEED)$(FAULT_PLAN),,FAULTS=$(or $(FAULTS),10000)) cargo test --workspace --test faults -- --ignored --exact update_keeps_its_promises_under_faults --nocapture

bench-install: deps ## The 2015 steps (wget, gunzip, tar, sync) beside the agent's installation, on tmpfs and at a card's speed
	cargo build --release --bins
	cargo run --quiet --release --package integration-tests --bin marco-bench-install

host-test: ## The agent as a systemd service in a virtual machine: it registers, reboots, powers off
	scripts/programs.sh
	scripts/host-vm-test.sh target/debug target/host-vm

fuzz: ## Readers of archives, config.txt, crons and join files, fed with changed examples for FUZZ_SECONDS (60) each
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) cargo test --workspace --test fuzz -- --nocapture

e2e: ## Under QEMU, with a real kernel: an empty card installs itself, is updated, survives a broken image [ARCH=amd64|arm64] [BOARD=raspi3b|raspi0]
	scripts/e2e.sh boot $(or $(BOARD),$(ARCH),amd64)

failures: ## The same machine, an image that cannot be installed, each policy of install.toml, and a network without anybody [ARCH=arm64]
	scripts/e2e.sh failures $(or $(BOARD),$(ARCH),amd64)

trials: ## The same machine, with systems that hang on trial: each ends within LIMIT (60) seconds, and the installer is back [ONLY='emergency'] [ARCH=arm64]
	LIMIT=$(or $(LIMIT),60) ONLY='$(ONLY)' scripts/e2e.sh trials $(or $(BOARD),$(ARCH),amd64)

powercut: ## The same machine, its power cut while it is updated: at 30 random moments and at each phase [CUTS=3] [SEED=1] [ARCH=arm64]
	CUTS=$(CUTS) $(if $(SEED),SEED=$(SEED)) scripts/e2e.sh powercut $(or $(BOARD),$(ARCH),amd64)

check: ## The lints: formatting, clippy, the protos, licences and sources of dependencies
	scripts/lint.sh

agent: ## A static agent for a Pi: TARGET=aarch64-unknown-linux-gnu | armv7-unknown-linux-gnueabihf | arm-unknown-linux-gnueabi | x86_64-unknown-linux-gnu [PROFILE=quick]
	scripts/static-agent.sh $(TARGET)
