# `make demo` and `make test` are all that is needed on x86-64 Linux with Python >= 3.11, make and git.
# ARGS goes to the demo: make demo ARGS="--ports.http 8080".
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

ifneq ($(shell uname -sm),Linux x86_64)
$(warning ganwatch runs on x86-64 Linux: HAProxy and onnxruntime-gpu come as wheels for nothing else; this is $(shell uname -sm))
endif

.PHONY: demo test test-fast tritonclient object-storage reference-values theory bench-training bench-serving bench-monitoring clean

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"ganwatch needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Name another one: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "installing the pinned packages into .venv/ (a few minutes, once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	@$(BIN)/ganwatch demo $(ARGS)

# Not in .venv: it wants an older protobuf than Ray brings along.
TRITONCLIENT := .venv/tritonclient/bin/python

$(TRITONCLIENT): $(READY)
	@$(BIN)/python -m venv .venv/tritonclient
	@.venv/tritonclient/bin/pip install --quiet --disable-pip-version-check 'tritonclient[http,grpc]==2.73.0'

tritonclient: $(TRITONCLIENT)

# A real S3 server and a real Google one, on loopback, for what the tests read from object storage.
OBJECT_STORAGE := .venv/object-storage/.ready

$(OBJECT_STORAGE): $(READY)
	@$(BIN)/python -m venv --clear .venv/object-storage
	@.venv/object-storage/bin/pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5' gcp-storage-emulator==2026.7.19
	@touch $@

object-storage: $(OBJECT_STORAGE)

# Two files at a time: much of the time is spent waiting for processes to start.
test: $(READY) $(TRITONCLIENT) $(OBJECT_STORAGE)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

test-fast: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not e2e"

# torch-fidelity's numbers, with which the tests compare ours. It needs torchvision, which needs another torch: a venv of 5.5 GB.
REFERENCE := .venv/reference/bin/python

.venv/reference/.ready: $(READY)
	@echo "installing torch-fidelity with a torch of its own into .venv/reference/ (5.5 GB, once)"
	@$(BIN)/python -m venv --clear .venv/reference
	@.venv/reference/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 torch-fidelity==0.4.0 \
		numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 onnx==1.23.2 onnxruntime==1.32.0 jaxtyping==0.3.11
	@touch $@

reference-values: .venv/reference/.ready
	@rm -rf build/reference
	@GANWATCH_HOME=$(CURDIR)/build/reference $(BIN)/python training/train.py --dataset digits --seed 1
	@$(REFERENCE) tests/training/reference_values.py build/reference/registry/digits/v1

# The theory that the product rests on, measured and drawn: minutes on a CPU.
theory: $(READY)
	@$(BIN)/python -m training.theory

# Where the figures of the README come from; BENCH=--quick shows in a few minutes that everything runs. MNIST is left out unless it lies
# in /usr/share/datasets/mnist or is named: make bench-training BENCH="--data mnist.npz".
bench-training: $(READY)
	@PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_training.py $(BENCH)
	@PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_steps.py $(if $(filter --quick,$(BENCH)),--rounds 1)

bench-serving: $(READY)
	@$(BIN)/python -m tests.benchmarks.bench_serving $(BENCH)

# Hours on two cores, resumable. The rivals of PyPI have a venv of their own: alibi-detect wants an older numpy.
bench-monitoring: $(READY)
	@test -e .ganwatch/bench-venv/.ready || { $(PYTHON) -m venv --clear .ganwatch/bench-venv && .ganwatch/bench-venv/bin/pip install --quiet numpy==1.26.4 torch==2.13.0 river==0.23.0 frouros==0.9.0 alibi-detect==0.13.0 && touch .ganwatch/bench-venv/.ready; }
	@$(BIN)/python tests/benchmarks/bench_monitoring.py $(BENCH)
	@$(BIN)/python tests/benchmarks/bench_diagnosis.py $(BENCH)

clean:
	rm -rf .venv .ganwatch
