# Two commands do everything on a fresh machine: `make serve` and `make test`.
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
URL ?=
# cuda or tpu: installs what JAX needs for that accelerator and runs on it; without, JAX takes what it finds.
DEVICE ?=

PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check --require-hashes --no-deps

RUN := $(if $(DEVICE),JAX_PLATFORMS=$(DEVICE)) $(PY)
READY := .venv/.serve $(addprefix .venv/.,$(filter-out cpu,$(DEVICE)))

.PHONY: serve ray test screenshots clients check bench bench-gpu soak portability sanitize fuzz audit notebook kernels lock clean
.DELETE_ON_ERROR:

serve: $(READY) kernels
	$(RUN) -m serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# Replicas behind one address, over Ray Serve: ARGS="--num-replicas 2".
ray: $(READY) .venv/.ray kernels
	$(RUN) -m serve.ray.app $(MODEL) --host $(HOST) --port $(PORT) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

test: .venv/.dev .venv/.guides .venv/.programs .venv/.ray .venv/.targets kernels
	$(PY) -m pytest

# The pictures of the README, as the tests see the page.
screenshots: .venv/.dev .venv/.programs kernels
	SCREENSHOTS=docs/images $(PY) -m pytest tests/integration/browser -k "hovering or side_by_side"

# The clients that people use, each in an environment of its own, and a fuzzer. Needs npm; downloads, and takes minutes.
clients: .venv/.dev kernels
	$(PY) -m pytest -m clients tools/clients

check: .venv/.dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	$(PY) -m mypy

# Against a server that runs (URL=http://...), or starts one itself on MODEL.
bench: $(READY) kernels
	$(RUN) -m tools.bench $(if $(URL),--url $(URL)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# The same table on an NVIDIA GPU, of which the bench's process needs a part, too.
bench-gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(MAKE) bench DEVICE=cuda

# Mixed traffic for half an hour, and whether all that must hold has held: ARGS="--minutes 5 --report soak.md".
soak: $(READY) kernels
	$(RUN) -m tools.soak $(if $(URL),--url $(URL)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# A model's steps, compiled for hardware that is not here: ARGS="--target h100 --target v5e:2x2".
portability: .venv/.serve .venv/.targets kernels
	$(PY) -m tools.portability $(or $(MODEL),examples/configs/Qwen2.5-0.5B) $(ARGS)

# The kernels' unit tests under AddressSanitizer and UBSan; needs g++ and takes minutes.
sanitize: .venv/.dev kernels
	$(PY) -m tools.sanitize

# Request bodies and model files by coverage, one target after the other: ARGS="gguf --minutes 20".
fuzz: .venv/.dev .venv/.fuzz kernels
	$(PY) -m tools.fuzz $(ARGS)

# What is known against the packages that the server is made of. Asks PyPI; fails where it cannot be asked about one, too.
AUDITED := requirements.lock requirements-files.lock requirements-ray.lock requirements-cuda.lock requirements-tpu.lock
audit: .venv/.audit
	.venv/clients/pip_audit/bin/pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,$(AUDITED))

notebook: .venv/.dev .venv/.targets kernels
	@$(PIP) -r requirements-notebook.lock
	.venv/bin/jupyter notebook compiled/inspect_hlo.ipynb

# Rewrites the locks from pyproject.toml; needs uv.
LOCK := uv pip compile -q --generate-hashes --no-header --no-annotate
# An extra's lock holds what it adds, so the locks of what it adds to are not installed twice.
ADDED = $(shell sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock)
lock:
	$(LOCK) --universal --python-version 3.12 pyproject.toml -o requirements.lock
	$(LOCK) --universal --python-version 3.12 pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock
	$(LOCK) --universal --python-version 3.12 pyproject.toml --extra dev --extra notebook -c requirements-dev.lock \
		-o requirements-notebook.lock
	for name in targets cuda tpu ray fuzz; do $(LOCK) --universal --python-version 3.12 pyproject.toml --extra $$name \
		-c requirements-dev.lock $(ADDED) -o requirements-$$name.lock; done
	for name in $(basename $(notdir $(wildcard requirements-clients/*.in))); do \
		uv pip compile -q --no-header --no-annotate --universal --python-version 3.12 requirements-clients/$$name.in \
			-o requirements-clients/$$name.txt; done
	for name in files test-models; do $(LOCK) --no-deps requirements-$$name.in -o requirements-$$name.lock; done

clean:
	rm -rf .venv model/kernels/cpu/_build

$(PY):
	@python=$$(scripts/find-python) && echo "making .venv with $$python" && "$$python" -m venv .venv

.venv/.serve: requirements.lock requirements-files.lock | $(PY)
	@echo "installing what requirements.lock names"
	@$(PIP) -r requirements.lock
	@$(PIP) -r requirements-files.lock
	@touch $@

.venv/.dev: requirements-dev.lock requirements-test-models.lock | .venv/.serve
	@echo "installing what requirements-dev.lock and requirements-test-models.lock name"
	@$(PIP) -r requirements-dev.lock
	@$(PIP) -r requirements-test-models.lock
	@touch $@

.venv/.cuda .venv/.tpu .venv/.ray: .venv/.%: requirements-%.lock | .venv/.serve
	@echo "installing what $< names"
	@$(PIP) -r $<
	@touch $@

# lm-evaluation-harness, for its guide: see tools/clients/environments.py. One run imports little of it, so that compiling all of
# it would take longer.
.venv/.guides: requirements-clients/lm_eval.txt | $(PY)
.venv/.audit: requirements-clients/pip_audit.txt | $(PY)
.venv/.guides .venv/.audit:
	@echo "installing what $< names, in an environment of its own"
	@PIP_COMPILE=0 $(PY) -c "from tools.clients.environments import python_environment; python_environment('$(basename $(notdir $<))')"
	@touch $@

# The compilers lie apart, in a folder that tools/portability/chips.py looks into: among the other packages, every process of JAX
# would try to start them. They are there for Linux on x86-64; elsewhere the tests that need them are skipped.
.venv/.targets: requirements-targets.lock | .venv/.serve
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		echo "installing what $< names"; \
		rm -rf .venv/targets && $(PIP) --target .venv/targets -r $<; \
	else \
		echo "no compilers for other chips here: the tests that need them are skipped"; \
	fi
	@touch $@

# Apart as well, in a folder that tools/fuzz/child.py looks into: it is not there for every Python and every machine.
.venv/.fuzz: requirements-fuzz.lock | .venv/.serve
	@echo "installing what $< names"
	@rm -rf .venv/fuzz && $(PIP) --target .venv/fuzz -r $<
	@touch $@

# Programs of Debian that tests need: a browser, and what compiles the kernels for ARM and runs them. Without one, the
# tests that need it are skipped. Only where packages can be installed without a question: as root on Debian, which is CI.
PROGRAMS := chromium fonts-noto-color-emoji g++-aarch64-linux-gnu qemu-user-static
.venv/.programs: | $(PY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing $(PROGRAMS)"; \
		{ apt-get update -q && apt-get install -q -y --no-install-recommends $(PROGRAMS); } > /dev/null 2>&1 \
			|| echo "$(PROGRAMS) cannot all be installed: tests that need one are skipped"; \
	fi
	@touch $@

# Optional: the first start does the same. Without a compiler this prints one line, and XLA is used instead.
kernels: .venv/.serve
	@$(PY) -m model.kernels.cpu.build
