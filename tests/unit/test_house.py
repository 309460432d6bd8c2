"""Rules for the source code: the import order of modules, no import cycles, and device names in one package only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

MAP = Path(__file__).parents[2] / "docs/design.md"


def read_map(text: str) -> list[list[str]]:
    """Return the lines of the map in docs/design.md as lists of module names, lowest line first."""
    block = text.split("```text\n")[1].split("```")[0]
    levels: list[list[str]] = []
    package = ""
    for line in block.splitlines():
        names = line.partition("#")[0].split()
        if line.startswith(" "):
            levels.insert(0, [f"{package}.{name.replace('/', '.')}" for name in names])
        elif names:
            package = names[0].rstrip("/")
    return levels


# The name of a distribution's top package stands above the lines of its modules.
LEVELS = read_map(MAP.read_text(encoding="utf-8"))
LEVEL_OF = {module: number for number, level in enumerate(LEVELS) for module in level}
LEVEL_OF |= {"open_clip": LEVEL_OF["open_clip.push_to_hf_hub"] + 0.5, "training": LEVEL_OF["training.main"] + 0.5}
LEVEL_OF["open_clip_train"] = LEVEL_OF["training"] + 0.5

DEVICES = SOURCE / "open_clip/device"
DEVICE_MODULES = re.compile(r"\btorch\.cuda\b|\btorch\.npu\b|\btorch_npu\b|\btorch\.xpu\b|\btorch\.mps\b")
DEVICE_NAME = re.compile(r"(cpu|cuda|npu|mps|xpu)(:.*)?")

FILES = sorted(SOURCE.glob("*/**/*.py"))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def entry_of(module: str) -> str:
    """Return the name on the map for a module: the module itself, or the package that contains it."""
    while module not in LEVEL_OF and "." in module:
        module = module.rpartition(".")[0]
    return module


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Return the modules of this repository that a file imports at any place, except for type checking."""
    found: set[str] = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(_without_type_checking(ast.parse(source))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            candidates = []
            for alias in node.names:
                full_name = f"{base}.{alias.name}"
                # `from . import layers` imports a module. Any other name counts as an import of the package.
                candidates.append(full_name if full_name in MODULES else base)
        else:
            continue
        found |= {name for name in candidates if name in MODULES}
    return found - {module}


class _without_type_checking(ast.NodeTransformer):
    def __new__(cls, tree: ast.Module) -> ast.Module:
        return super().__new__(cls).visit(tree)

    def visit_If(self, node: ast.If):
        if "TYPE_CHECKING" in ast.unparse(node.test):
            return None
        return self.generic_visit(node)


IMPORTS = {
    module: imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    for module, path in MODULES.items()
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_is_on_the_map_and_imports_from_lower_lines(module):
    entry = entry_of(module)
    assert entry not in ("open_clip", "training") or module == entry, f"Add {module} to the map in docs/design.md."
    for imported in sorted(IMPORTS[module]):
        other = entry_of(imported)
        if other != entry:
            is_lower = LEVEL_OF.get(other, -1) < LEVEL_OF[entry]
            assert is_lower, f"{module} imports {imported}, which is not on a lower line of the map in docs/design.md."


def test_every_name_on_the_map_exists():
    assert [name for level in LEVELS for name in level if name not in MODULES] == []


def test_there_are_no_import_cycles():
    """Modules of one package are checked, too."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for imported in IMPORTS[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == set(MODULES)


def comparisons_with_a_device_name(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of comparisons, prefix tests and match cases with device names such as "cuda" or "npu:0"."""

    def names_a_device(node: ast.AST) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(names_a_device(element) for element in node.elts)
        value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
        return isinstance(value, str) and DEVICE_NAME.fullmatch(value) is not None

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            operands = list(node.args)
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        else:
            continue
        if any(names_a_device(operand) for operand in operands):
            found.append((operands[0].lineno, ast.unparse(node)))
    return found


def device_modules_in(source: str) -> list[str]:
    """Return lines that mention a device's torch module in code or strings. Docstrings and comments are ignored."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[0] = ast.Pass()
    return [line for line in ast.unparse(ast.fix_missing_locations(tree)).splitlines() if DEVICE_MODULES.search(line)]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != DEVICES], ids=module_of)
def test_device_dependent_code_is_in_the_device_package_only(path):
    text = path.read_text(encoding="utf-8")
    assert device_modules_in(text) == [], "Use open_clip.device instead."
    assert comparisons_with_a_device_name(text) == [], "Use open_clip.device instead."


def test_the_checks_detect_violations():
    assert imports_of("from . import device\nfrom .config import x", "open_clip.device2", False) >= {"open_clip.device"}
    assert imports_of("def f():\n  import open_clip", "training.x", False) == {"open_clip"}
    assert imports_of("if TYPE_CHECKING:\n  import open_clip", "training.x", False) == set()
    for wrong in (
        'a.type == "cuda"',
        'if "npu" in d: pass',
        'd.startswith("cuda:")',
        'd in ("cpu", "x")',
        'd.startswith(("npu", "a"))',
        'match d:\n  case "mps": pass',
    ):
        assert comparisons_with_a_device_name(wrong), wrong
    for right in ('f(device="cpu")', 'add("--device", default="cpu", choices=["cpu", "npu"])', 'a == "cudax"'):
        assert not comparisons_with_a_device_name(right), right
    for wrong in ("import torch_npu", "torch.cuda.synchronize()", "from torch.npu import amp", 'm["torch_npu"]'):
        assert device_modules_in(f'"""Words."""\n{wrong}'), wrong
    for right in ('"""About torch_npu."""', "x = 1  # as torch.cuda does"):
        assert not device_modules_in(right), right


# Modules with names of open_clip 3.3 for scripts.
FACES = ("training.train", "training.zero_shot", "training.distributed", "training.data.open_clip_stages")


@pytest.mark.parametrize("face", FACES)
def test_nothing_imports_a_face(face):
    assert [module for module, imported in IMPORTS.items() if face in imported] == []


# Functions whose parameters open_clip gives, so that their signature and documentation alone are long.
LONG_FUNCTIONS = {
    "open_clip.coca_model": {"generate"},
    "open_clip.factory": {"create_model", "create_model_and_transforms"},
    "open_clip.model": {"forward_intermediates"},
    "open_clip.transformer.text": {"__init__"},
    "open_clip.transformer.vision": {"__init__"},
}
MAX_FILE, MAX_FUNCTION = 450, 60  # lines


def long_functions(source: str) -> set[str]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_fit_a_reader(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE
    assert long_functions(source) == LONG_FUNCTIONS.get(module, set()), "Split functions of more than 60 lines."


def test_long_functions_are_found():
    body = "\n".join(["    x = 1"] * 60)
    assert long_functions(f"def f():\n{body}") == {"f"}
    assert long_functions(f"def f():\n{body[:-10]}") == set()
    assert long_functions(f"class A:\n  async def f(self):\n{body}") == {"f"}


def imported_within_data(module: str) -> set[str]:
    """Return the modules of training.data that a module imports, directly or not."""
    found: set[str] = set()
    pending = [module]
    while pending:
        new = {name for name in IMPORTS[pending.pop()] if name.startswith("training.data.")} - found
        found |= new
        pending += new
    return found


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("training.data.")))
def test_rows_and_shards_do_not_know_each_other(module):
    packages = {name.split(".")[2] for name in imported_within_data(module)} & {"rows", "shards"}
    if module.startswith(("training.data.rows", "training.data.shards")):
        assert packages <= {module.split(".")[2]}
    if module in ("training.data.loader", "training.data.position", "training.data.namespace"):
        assert packages == set()
