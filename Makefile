.PHONY: style quality test test-slow audit

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .
	mypy
	bandit -q -c pyproject.toml -r sam2unet_hf sam2unet_command dataset_scripts examples

test:
	HF_HUB_OFFLINE=1 pytest

test-slow:
	HF_HUB_OFFLINE=1 pytest -n 0 -m "not gpu"

# Known vulnerabilities of what is installed, from PyPI; what is not known there fails too.
audit:
	pip freeze --exclude-editable | pip-audit --strict --no-deps --disable-pip -r /dev/stdin
