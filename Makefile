.PHONY: style quality test test-slow

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .
	mypy

test:
	HF_HUB_OFFLINE=1 pytest

test-slow:
	HF_HUB_OFFLINE=1 pytest -m "not gpu"
