"""Checks of the package as a whole: names, documentation, and what may travel to the Hub."""

import ast
import dataclasses
import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest
from common import SCAN_CODE, TRAVELLING_FILES
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
PACKAGES = ["sam2unet_hf", "dataset_scripts"]
ALLOWED_IMPORTS = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "torchvision", "transformers"}
# Those that read scans, whom nobody asks to segment pictures.
SCAN_IMPORTS = {"isal", "nibabel", "tqdm"}


def module_names():
    names = []
    for package in PACKAGES:
        if (ROOT / package / "__init__.py").exists():
            names.append(package)
            names += [info.name for info in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")]
    return [name for name in names if not name.endswith("__main__")]


def public_objects():
    """Functions and classes in `__all__`, and public methods of those classes that are written here."""
    objects = {}
    for module_name in module_names():
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name, None)
            if not (inspect.isfunction(value) or inspect.isclass(value)) or value.__module__ != module_name:
                continue
            objects[f"{module_name}.{name}"] = value
            if inspect.isclass(value):
                for method_name, method in vars(value).items():
                    method = getattr(method, "__func__", method)
                    if inspect.isfunction(method) and not method_name.startswith("_") and method.__doc__:
                        objects[f"{module_name}.{name}.{method_name}"] = method
    return objects


MODULES = module_names()
OBJECTS = public_objects()


def test_the_modules_are_found():
    assert {f"sam2unet_hf.{name.removesuffix('.py')}" for name in TRAVELLING_FILES} <= set(MODULES)
    assert "sam2unet_hf.modeling_sam2unet.Sam2UNetForSemanticSegmentation.forward" in OBJECTS
    assert "sam2unet_hf.conversion.convert_reference_checkpoint" in OBJECTS


def ruff_order(name):
    """Order of ruff's RUF022: constants, classes, functions."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")])
def test_all_is_sorted_and_names_what_there_is(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__), key=ruff_order)
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []


def test_package_exports_come_from_its_modules():
    package = importlib.import_module("sam2unet_hf")
    for name in package.__all__:
        assert name in importlib.import_module(getattr(package, name).__module__).__all__, name


def documented_arguments(documentation):
    """Names in the `Args:` section of a Google-style docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(documentation) + "\n", flags=re.MULTILINE)
    return re.findall(r"^    (\*{0,2}\w+):", section[1], flags=re.MULTILINE) if section else []


def test_documented_arguments_are_found():
    documentation = """Do it.

    Args:
        first: One
            thing: and another.
        *rest: More.

        **kwargs: Options.

    Returns:
        nothing: at all.
    """
    assert documented_arguments(documentation) == ["first", "*rest", "**kwargs"]


def actual_arguments(value):
    """Names of the arguments of a function or class, without `self`; `kwargs` of a class without stars."""
    if inspect.isclass(value) and issubclass(value, dict):
        return list(inspect.get_annotations(value))
    if dataclasses.is_dataclass(value):
        inherited = {name for base in value.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
        return [field.name for field in dataclasses.fields(value) if field.name not in inherited]
    parameters = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + p.name for p in parameters if p.name not in ("self", "cls")]


@pytest.mark.parametrize("name", OBJECTS)
def test_documented_arguments_are_those_of_the_signature(name):
    value = OBJECTS[name]
    assert value.__doc__, f"{name} has no docstring"
    documented, actual = documented_arguments(value.__doc__), actual_arguments(value)
    if not documented and inspect.isfunction(value) and "." in value.__qualname__:
        # A method whose summary says it all.
        return
    if inspect.isclass(value) and "__init__" not in vars(value):
        # The constructor is that of a base class.
        return
    if dataclasses.is_dataclass(value):
        documented = [entry for entry in documented if entry != "kwargs"]
    assert [entry.strip("*") for entry in documented] == [entry.strip("*") for entry in actual]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("sam2unet_hf")])
def test_examples_in_docstrings_run(name, monkeypatch):
    module = importlib.import_module(name)
    # The metrics are loaded by the path of their file.
    monkeypatch.chdir(Path(module.__file__).parent)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples_in_docstrings():
    for name in ("configuration", "image_processing", "modeling"):
        module = importlib.import_module(f"sam2unet_hf.{name}_sam2unet")
        assert sum(len(test.examples) for test in doctest.DocTestFinder().find(module)) > 2


@pytest.mark.parametrize("name", TRAVELLING_FILES)
def test_code_that_travels_with_the_weights_imports_only_siblings_and_the_hubs_libraries(name):
    tree = ast.parse((ROOT / "sam2unet_hf" / name).read_text())
    siblings = {file.removesuffix(".py") for file in TRAVELLING_FILES}
    # What they do without where it is missing.
    optional = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.Try) and any(ast.unparse(handler.type) == "ImportError" for handler in block.handlers)
        for node in block.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            # `dynamic_module_utils` copies what stands in `from .x import y`, on one line, and nothing else.
            assert node.level == 1, ast.unparse(node)
            assert node.module in siblings, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and node not in optional:
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                scans = SCAN_IMPORTS if name in SCAN_CODE else set()
                assert top in ALLOWED_IMPORTS | scans | sys.stdlib_module_names, ast.unparse(node)


def test_code_that_travels_is_what_the_model_imports():
    from transformers.dynamic_module_utils import get_relative_import_files

    package = ROOT / "sam2unet_hf"
    needed = {"image_processing_sam2unet.py", "modeling_sam2unet.py", "volume_sam2unet.py"}
    for name in sorted(needed):
        needed |= {Path(file).name for file in get_relative_import_files(package / name)}
    assert sorted(needed) == TRAVELLING_FILES


def unsound_requirements(pyproject):
    """Dependencies without a lower bound, and those with an upper one and no comment beside it that says why."""
    project = tomllib.loads(pyproject)["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    unsound = []
    for text in requirements:
        requirement = Requirement(text)
        operators = {specifier.operator for specifier in requirement.specifier}
        explained = any(f'"{text}"' in line and "#" in line for line in pyproject.splitlines())
        capped = operators - {">=", "!="} and not explained
        if requirement.name != project["name"] and (">=" not in operators or capped):
            unsound.append(text)
    return unsound


def test_unsound_requirements_are_found():
    pyproject = """
    [project]
    name = "x"
    dependencies = ["a>=1", "b", "c<2", "d>=1,<2",
        "e>=1,<2", # why
    ]
    [project.optional-dependencies]
    more = ["x[less]", "f==1", "g~=1.0"]
    """
    assert unsound_requirements(pyproject) == ["b", "c<2", "d>=1,<2", "f==1", "g~=1.0"]


def test_requirements_have_a_lower_bound_and_no_upper_one_without_a_reason():
    """`.ci/minimum` runs the tests with the lower bounds."""
    assert unsound_requirements((ROOT / "pyproject.toml").read_text()) == []


def test_version_is_that_of_pyproject():
    name, version = re.search(
        r'^name = "(.+)"\nversion = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M
    ).groups()
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert installed == version
