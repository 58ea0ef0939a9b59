# Everything a fresh clone needs is one of these; each does its own set-up. Plain cargo works too once `make setup` has run.
.DEFAULT_GOAL := help
.PHONY: help tools setup build test light soak demo interop bench compare gpu-check fmt lint doc

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

tools:
	@command -v cargo >/dev/null || { echo 'make: cargo was not found; remedy: install Rust with rustup' >&2; exit 1; }
	@command -v c++ >/dev/null || { echo 'make: no C++ compiler was found; remedy: apt-get install g++' >&2; exit 1; }

setup: tools ## Fetch libtorch (543 MB, once) and link it as .libtorch
	@scripts/libtorch

build: setup ## Build the release daemon, target/release/skep
	cargo build --release -p skep

test: setup ## Run every test of the workspace
	cargo test --workspace

light: tools ## Test the crates that need neither libp2p nor libtorch
	cargo light

soak: tools ## Run the scenarios in their large forms and print what they measured (under an hour)
	SKEP_SCHEDULES=100000 cargo light --lib -- join::schedules
	SKEP_SOAK=1 cargo light --test scenarios -- --nocapture --test-threads 1 grid
	SKEP_SOAK=1 cargo light --test scenarios -- --nocapture --test-threads 1 --skip grid

demo: setup ## Train a digit classifier through a hive of servers, one of which dies half way
	cargo build --workspace --bins --examples
	scripts/demo

interop: setup ## Test against real hivemind (711 MB of Python packages, once)
	cargo build --workspace --bins --examples
	tests/interop/run

bench: setup ## Measure this machine: whole calls by skep bench, parts by criterion (release build, ten minutes)
	cargo build --release -p skep
	target/release/skep bench throughput --preset ffn_small_batch --clients 4
	target/release/skep bench moe
	target/release/skep bench dht
	target/release/skep bench network
	target/release/skep bench startup
	cargo bench -p skep --bench parts

compare: build ## Measure skep beside hivemind and torch.distributed.rpc (a quarter of an hour, 711 MB of Python packages once)
	scripts/compare_peers

gpu-check: tools ## Run the tests and presets that need a CUDA device
	scripts/gpu-check

fmt: ## Format the code
	cargo fmt --all

lint: setup ## Check the format and run clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

doc: setup ## Build the documentation of all rooms
	cargo doc --workspace --no-deps
