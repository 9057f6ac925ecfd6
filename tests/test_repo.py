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
from common import CODE, SCAN_CODE
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
PACKAGES = ["sam2unet_hf", "sam2unet_command", "dataset_scripts"]
ALLOWED_IMPORTS = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "torchvision", "transformers"}
# Those that read scans, whom nobody asks to segment pictures.
SCAN_IMPORTS = {"isal", "nibabel", "scipy", "tqdm"}


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
    assert {f"sam2unet_hf.{name.removesuffix('.py')}" for name in CODE} <= set(MODULES)
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


@pytest.mark.parametrize("name", CODE)
def test_code_that_travels_with_the_weights_imports_only_siblings_and_the_hubs_libraries(name):
    tree = ast.parse((ROOT / "sam2unet_hf" / name).read_text())
    siblings = {file.removesuffix(".py") for file in CODE}
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
    needed = {"image_processing_sam2unet.py", "modeling_sam2unet.py", "volume_task_sam2unet.py"}
    for name in sorted(needed):
        needed |= {Path(file).name for file in get_relative_import_files(package / name)}
    assert sorted(needed) == CODE


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


# The house


LARGEST_FILE, LARGEST_CLASS, FILES_OVER_400_LINES = 560, 250, 2


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path, modules):
    """Our own modules that a file imports, inside functions too."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    # `import a.b` and `from a import b` run `a/__init__.py`, which only gathers what is in `a`.
    return (found & modules) - {module_of(path)}


def import_circles(imports):
    """Sets of modules that import each other, in any number of steps."""

    def reached(start):
        seen, left = set(), [start]
        while left:
            new = imports[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reach = {module: reached(module) for module in imports}
    return {frozenset(other for other in reach[module] if module in reach[other]) for module in imports} - {
        frozenset()
    }


def test_circles_are_found():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d2"}, "d2": {"d"}}
    assert import_circles(imports) == {frozenset("bc"), frozenset({"d", "d2"})}


def test_no_modules_import_each_other():
    files = python_files(*PACKAGES)
    modules = {module_of(path) for path in files}
    # An `__init__.py` imports all that it exports.
    leaves = {module_of(path) for path in files if path.name != "__init__.py"}
    imports = {module_of(path): imported_modules(path, leaves) for path in files}
    assert {"sam2unet_hf.training.trainer", "sam2unet_hf.hub"} <= modules
    assert "sam2unet_hf.hub" in imports["sam2unet_hf.training.push"]
    assert import_circles(imports) == set()


def test_no_file_and_no_class_is_too_long():
    lines = {path: len(path.read_text().splitlines()) for path in python_files("sam2unet_hf")}
    assert {path.name: count for path, count in lines.items() if count > LARGEST_FILE} == {}
    assert len([path for path, count in lines.items() if count > 400]) <= FILES_OVER_400_LINES
    classes = {
        node.name: node.end_lineno - node.lineno + 1
        for path in lines
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: count for name, count in classes.items() if count > LARGEST_CLASS} == {}


# Every private name of another library that is overridden or used, and why no public one will do.
PRIVATE_NAMES = {
    # transformers: the Trainer
    "_save_checkpoint": "no callback runs before a checkpoint is written, to note the losses, or when that fails",
    "_save_rng_state": "all processes have written before trainer_state.json marks a checkpoint as complete",
    "_internal_call": "saving with push_to_hub must not push before results and pictures are there",
    # transformers: models, documented for models of one's own
    "_attn_implementation": "documented: what the user chose",
    "_can_set_attn_implementation": "transformers guesses from the source of the attention class, wrongly here",
    "_init_weights": "documented: initialisation",
    "_keys_to_ignore_on_save": "documented: what a checkpoint leaves out",
    "_no_split_modules": "documented: layers that stay on one device",
    "_supports_sdpa": "documented: attention implementations",
    # transformers: image processors, whose public `preprocess` knows no masks
    "_preprocess": "prepares images and returns them; the public method converts them twice",
    "_preprocess_image_like_inputs": "documented for processors that take more than images",
    "_raise_exceptions_for_missing_entries": "the public function raises where a file is optional",
    # torch and torchvision
    "_transformed_types": "documented: the types that a transform changes",
    # datasets and evaluate: abstract methods, and what their caches are made of
    "_info": "abstract",
    "_split_generators": "abstract",
    "_generate_examples": "abstract",
    "_download_and_prepare": "an error of a case must reach the user without the traceback of datasets around it",
    "_fs": "files beside the cached data, wherever the cache is",
    "_output_dir": "files beside the cached data",
}
# Documented in spite of their names.
PUBLIC_NAMES = {"_exit", "_replace", "_asdict", "_fields"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *PUBLIC_NAMES}


def upstream_names(cls):
    """Private names that the base classes of other libraries define or use on themselves."""
    names = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in (*PACKAGES, "builtins"):
            continue
        names |= {name for name in vars(base) if is_private(name)}
        try:
            names |= set(re.findall(r"\b(?:self|cls)\.(_[a-zA-Z]\w*)", inspect.getsource(base)))
        except (OSError, TypeError):  # written in C
            continue
    return names


def touched_names(path):
    """Private names of other libraries in a file: overridden, imported, passed, or used on anything."""
    tree = ast.parse(path.read_text())
    module = None if path.is_relative_to(ROOT / "examples") else importlib.import_module(module_of(path))
    touched, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and inspect.isclass(cls := getattr(module, node.name, None)):
            inherited = upstream_names(cls)
            for part in ast.walk(node):
                name = getattr(part, "attr", None) or (part.name if isinstance(part, ast.FunctionDef) else None)
                name = name or (part.id if isinstance(part, ast.Name) else "")
                touched |= {name} & inherited
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            touched |= {node.attr} - own
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            touched |= {part for part in parts if not node.level and is_private(part)}
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            touched.add(node.arg)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = node.slice.value
            is_keyword = ast.unparse(node.value).endswith("kwargs") and isinstance(key, str) and is_private(key)
            touched |= {key} if is_keyword else set()
    return touched


def test_private_names_are_found():
    assert {"_save_checkpoint", "_save_rng_state"} <= touched_names(ROOT / "sam2unet_hf" / "training" / "trainer.py")
    assert "_raise_exceptions_for_missing_entries" in touched_names(ROOT / "sam2unet_hf" / "weights_sam2unet.py")


def test_private_names_of_other_libraries_are_in_the_ledger():
    touched = {}
    for path in python_files(*PACKAGES, "examples"):
        for name in touched_names(path):
            touched.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert {name: files for name, files in touched.items() if name not in PRIVATE_NAMES} == {}
    assert [name for name in PRIVATE_NAMES if name not in touched] == [], "no longer touched"


def test_the_tests_that_the_page_of_faults_names_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
