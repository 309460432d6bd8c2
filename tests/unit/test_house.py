"""Rules for the source code: the import order of modules, no import cycles, and device names in one package only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

# The levels of the import order, lowest first. A module may import modules of lower levels only, none of its own level.
# A package in PACKAGES has one level: its modules may import each other without cycles. The levels are finer than those
# in docs/design.md.
LEVELS = [
    ["open_clip.aliases", "open_clip.progress", "open_clip.text_groups", "open_clip.torch_versions"],
    ["open_clip.device", "open_clip.utils", "open_clip.constants", "open_clip.version", "open_clip.hf_configs"],
    ["open_clip.binary_file", "open_clip.whole_file", "open_clip.key_prefixes"],
    ["open_clip.tensor_records"],
    ["open_clip.zipped", "open_clip.inert_pickle"],
    ["open_clip.torch_archive", "open_clip.safetensors_file"],
    [
        "open_clip.bpe",
        "open_clip.text_cleaning",
        "open_clip.torchscript",
        "open_clip.npz",
        "open_clip.image_resize",
        "open_clip.pretrained",
    ],
    ["open_clip.hf_tokenizer", "open_clip.preprocess"],
    [
        "open_clip.config",
        "open_clip.tokenizer",
        "open_clip.transform",
        "open_clip.pos_embed",
        "open_clip.generation",
        "open_clip.zero_shot_classifier",
        "open_clip.zero_shot_metadata",
    ],
    ["open_clip.collectives"],
    ["open_clip.pairwise"],
    ["open_clip.loss", "open_clip.layers"],
    ["open_clip.blocks"],
    ["open_clip.text_transformer", "open_clip.multimodal_transformer"],
    ["open_clip.transformer", "open_clip.modified_resnet", "open_clip.timm_model", "open_clip.hf_model"],
    ["open_clip.towers"],
    ["open_clip.model"],
    ["open_clip.coca_model", "open_clip.convert", "open_clip.mismatch"],
    ["open_clip.checkpoint", "open_clip.recipe"],
    ["open_clip.factory", "open_clip.openai"],
    ["open_clip.push_to_hf_hub", "open_clip.export", "open_clip.legacy"],
    ["open_clip.convert.__main__"],
    ["open_clip"],
    ["training"],
    ["training.children"],
    ["training.flags"],
    ["training.flag_checks"],
    ["training.params"],
    [
        "training.distributed",
        "training.precision",
        "training.scheduler",
        "training.metrics",
        "training.logger",
        "training.file_utils",
        "training.rng",
        "training.batches",
        "training.ema",
        "training.flat_tensors",
    ],
    ["training.flat_adamw"],
    ["training.guard", "training.gradients", "training.signals"],
    [
        "training.zero_shot",
        "training.checkpoint",
        "training.optim",
        "training.data",
        "training.objective",
        "training.build",
        "training.flops",
        "training.trace",
        "training.half_weights",
    ],
    [
        "training.evaluate",
        "training.saver",
        "training.preflight",
        "training.run_warnings",
        "training.progress",
        "training.run_folder",
        "training.trainer",
    ],
    ["training.epoch"],
    ["training.loop", "training.train"],
    ["training.main", "training.profiler", "training.doctor"],
    ["open_clip_train"],
]
PACKAGES = (  # packages that have one entry in LEVELS
    "training.data",
    "open_clip_train",
    "open_clip.device",
    "open_clip.convert",
    "open_clip.push_to_hf_hub",
)
LEVEL_OF = {module: number for number, level in enumerate(LEVELS) for module in level}

DEVICES = SOURCE / "open_clip/device"
DEVICE_MODULES = re.compile(r"\btorch\.cuda\b|\btorch\.npu\b|\btorch_npu\b|\btorch\.xpu\b|\btorch\.mps\b")
DEVICE_NAME = re.compile(r"(cpu|cuda|npu|mps|xpu)(:.*)?")

FILES = sorted(SOURCE.glob("*/**/*.py"))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def entry_of(module: str) -> str:
    """Return the entry of LEVELS for a module: the module itself, or its package in PACKAGES."""
    if module in LEVEL_OF:
        return module
    for package in PACKAGES:
        if module == package or module.startswith(package + "."):
            return package
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
def test_a_module_has_a_level_and_imports_from_lower_levels(module):
    entry = entry_of(module)
    assert entry in LEVEL_OF, f"{module} has no level. Add it to LEVELS in test_house.py, below all its importers."
    for imported in sorted(IMPORTS[module]):
        other = entry_of(imported)
        if other != entry:
            is_lower = LEVEL_OF.get(other, -1) < LEVEL_OF[entry]
            assert is_lower, f"{module} imports {imported}, which is not on a lower level."


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
