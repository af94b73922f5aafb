.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick lint bench

python := .venv/bin/python

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## make .venv ready for this machine (GPU or CPU; LMSWEEP_DEVICE=cpu|gpu decides it)
	@deploy/setup.sh

demo: setup ## set up, make four tiny models, and run the demo sweep over them
	$(python) -m sweep.demo
	$(python) launch.py conf=demo

test: lint ## set up, lint, check types, and run all tests, two files at a time
	@failed=; \
	$(python) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not long and not alone" || failed=1; \
	$(python) -m pytest -m alone || failed=1; \
	[ -z "$$failed" ]

test-quick: setup ## the inner loop: tests without vLLM, Ray and the slow ones
	$(python) -m pytest -m "not vllm and not ray and not slow"

lint: setup ## ruff and mypy
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

bench: setup ## every claim about speed, measured here against stock lm-eval and vLLM (needs real data)
	@failed=; for what in schedule store tokenize memory scoring generation concurrency; do \
		$(python) -m bench.$$what || failed="$$failed $$what"; \
	done; if [ -n "$$failed" ]; then echo "below their bars:$$failed"; exit 1; fi
