"""How this code is kept, as tests: each rule reads the sources and lists every line that breaks it."""

import ast
import dataclasses
import inspect
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import app.errors
import merge_algos.errors
import storage.errors
from merge_algos import learned, methods

ROOT = Path(__file__).parent.parent
PACKAGES = ("app/", "merge_algos/", "storage/")
FOLDERS = (*PACKAGES, "tests/", "benchmarks/", "examples/")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
METHOD_FILES = sorted(file.stem for file in (ROOT / "merge_algos" / "methods").glob("*.py") if file.stem != "__init__")


@dataclass(frozen=True)
class Source:
    """One Python file. path: relative to the repository, with slashes."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def _read(*folders: str) -> list[Source]:
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text()) for file in files]


EVERYWHERE = _read(*FOLDERS)
OURS = [source for source in EVERYWHERE if source.path.startswith(PACKAGES)]
OUTSIDE_TESTS = [source for source in EVERYWHERE if not source.path.startswith("tests/")]
TESTS = [source for source in EVERYWHERE if source.path.startswith("tests/")]

Rule = Callable[[Source], Iterator[str]]


def broken(rule: Rule, sources: list[Source]) -> list[str]:
    return [violation for source in sources for violation in rule(source)]


def dotted(node: ast.AST) -> str:
    """`torch.linalg.svd` for the expression of that spelling; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imported(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every import as a full name: `from a import b` is `a.b`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def is_below(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


# Import direction

_OUTSIDE = ("os", "io", "pathlib", "shutil", "tempfile", "subprocess", "socket", "urllib", "httpx2", "huggingface_hub")
_WEB = ("fastapi", "starlette", "uvicorn")
NEVER = {
    "storage/": ("app", "merge_algos", "torch", "numpy", "sklearn", *_WEB),
    "merge_algos/": ("app", "storage", "pydantic", "pydantic_settings", "safetensors", "sqlalchemy", *_OUTSIDE, *_WEB),
    "app/routes/": ("torch", "numpy", *(f"merge_algos.methods.{name}" for name in METHOD_FILES)),
    "app/engine/": _WEB,
}
ONLY_IN = {
    "dbos": "app/engine/",
    "ray": "app/engine/",
    "pydantic_settings": "app/settings.py",
    "typer": "app/cli.py",
    "uvicorn": "app/server.py",
    "sqlalchemy": "storage/",
    "alembic": "storage/",
    "huggingface_hub": "storage/sources/",
}


def imports_upwards(source: Source) -> Iterator[str]:
    banned = [name for folder, names in NEVER.items() if source.path.startswith(folder) for name in names]
    for node, name in imported(source):
        if name.startswith(".") or is_below(name, *banned):  # a relative import would hide where it points
            yield source.at(node, f"imports {name}")


def imports_out_of_place(source: Source) -> Iterator[str]:
    for node, name in imported(source):
        home = ONLY_IN.get(name.partition(".")[0])
        if home is not None and not source.path.startswith(home):
            yield source.at(node, f"imports {name}, which lives in {home}")


def opens_files(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "open":
            yield source.at(node, "opens a file")


def test_libraries_do_not_know_who_uses_them() -> None:
    assert broken(imports_upwards, OURS) == []


def test_dependencies_stay_in_their_rooms() -> None:
    assert broken(imports_out_of_place, OURS) == []


def test_algorithms_open_no_files() -> None:
    assert broken(opens_files, [source for source in OURS if source.path.startswith("merge_algos/")]) == []


# What is never done


def reads_environment(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {"os.environ", "os.environb", "os.getenv"}:
            yield source.at(node, dotted(node))
    yield from (source.at(node, name) for node, name in imported(source) if is_below(name, "os.environ", "os.getenv"))


_PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def runs_foreign_code(source: Source) -> Iterator[str]:
    yield from (source.at(node, f"imports {name}") for node, name in imported(source) if is_below(name, *_PICKLES))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in {"eval", "exec", "compile", "torch.load", "numpy.load", "np.load"}:
            yield source.at(node, f"calls {dotted(node.func)}")


_DRAWS = frozenset("rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like".split())
_DRAWS_IN_PLACE = frozenset("normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ geometric_ cauchy_".split())
_GENERATORS = frozenset("Random SystemRandom Generator default_rng SeedSequence PCG64 Philox".split())


def draws_without_generator(source: Source) -> Iterator[str]:
    for node, name in imported(source):
        module, _, drawn = name.rpartition(".")
        if module in {"random", "numpy.random"} and drawn not in _GENERATORS:
            yield source.at(node, f"imports {name}")
    for node in ast.walk(source.tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"(random|np\.random|numpy\.random)\.\w+", name) and name.rpartition(".")[2] not in _GENERATORS:
            yield source.at(node, name)
        if re.fullmatch(r"torch\.(\w+\.)?(manual_)?seed(_all)?|torch\.random\.\w+", name):
            yield source.at(node, name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, _, attribute = dotted(node.func).rpartition(".")
            drawn = (owner == "torch" and attribute in _DRAWS) or node.func.attr in _DRAWS_IN_PLACE
            if drawn and "generator" not in {keyword.arg for keyword in node.keywords}:
                yield source.at(node, f"{node.func.attr} without a generator")


_PRODUCTS = frozenset("torch.matmul torch.mm torch.bmm torch.einsum torch.linalg.multi_dot torch.addmm".split())
_DENSE_DOORS = ("merge_algos/lowrank.py", "merge_algos/blocks.py")


def forms_dense_delta(source: Source) -> Iterator[str]:
    """A product whose first operand is B and whose last is A, neither of them transposed: (d_out, d_in)."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands = [_leftmost(node.left), node.right]
        elif isinstance(node, ast.Call) and dotted(node.func) in _PRODUCTS:
            operands = [part for each in node.args for part in (each.elts if isinstance(each, ast.List) else [each])]
        else:
            continue
        letters = [_letter(operand) for operand in operands]
        if "B" in letters and "A" in letters[letters.index("B") :]:
            yield source.at(node, "multiplies B by A")


def _leftmost(node: ast.AST) -> ast.AST:
    return _leftmost(node.left) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) else node


def _letter(node: ast.AST) -> str:
    """`A` or `B` for a factor under whatever casts and scalars; empty for all else, a transpose included."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _letter(node.func.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
        return _letter(node.left) or _letter(node.right)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.removeprefix("lora_") if name in {"A", "B", "lora_A", "lora_B"} else ""


def skips_or_mocks(source: Source) -> Iterator[str]:
    for node, name in imported(source):
        if is_below(name, "mock", "unittest.mock", "pytest_mock"):
            yield source.at(node, f"imports {name}")
    for node in ast.walk(source.tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)|unittest\.skip\w*|monkeypatch\.setattr", name):
            yield source.at(node, name)


def test_only_settings_read_the_environment() -> None:
    assert broken(reads_environment, [s for s in OURS if s.path != "app/settings.py"]) == []


def test_no_foreign_code_is_ever_run() -> None:
    assert broken(runs_foreign_code, EVERYWHERE) == []


def test_randomness_is_passed_in() -> None:
    assert broken(draws_without_generator, OUTSIDE_TESTS) == []


def test_the_dense_product_has_one_door() -> None:
    assert broken(forms_dense_delta, [s for s in OUTSIDE_TESTS if s.path not in _DENSE_DOORS]) == []


def test_the_algebra_opens_that_door_once() -> None:
    (algebra,) = [source for source in OURS if source.path == _DENSE_DOORS[0]]
    (door,) = [n for n in ast.walk(algebra.tree) if isinstance(n, FUNCTIONS) and n.name == "to_dense"]
    (line,) = [int(violation.split(":")[1]) for violation in forms_dense_delta(algebra)]
    assert door.lineno <= line <= (door.end_lineno or 0)


def test_no_test_is_skipped_and_nothing_of_ours_is_mocked() -> None:
    assert broken(skips_or_mocks, TESTS) == []


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        *((imports_upwards, line) for line in ("import app.main", "from storage import files", "from . import x")),
        *((imports_out_of_place, line) for line in ("import dbos", "from ray.util import x", "import typer")),
        *((reads_environment, line) for line in ("os.environ['A']", "x = os.getenv('A')", "from os import environ")),
        *((runs_foreign_code, line) for line in ("import pickle", "torch.load(f)", "eval(s)", "from joblib import load")),
        *((draws_without_generator, line) for line in ("torch.manual_seed(0)", "np.random.rand(3)", "random.shuffle(x)")),
        *((draws_without_generator, line) for line in ("torch.randn(3)", "x.normal_()", "from random import choice")),
        *((forms_dense_delta, line) for line in ("d.B @ d.A", "s * lora_B.float() @ lora_A", "B @ core @ A.to(x)")),
        *((forms_dense_delta, line) for line in ("torch.mm(d.B, d.A)", "torch.linalg.multi_dot([B, C, A])")),
        *((skips_or_mocks, line) for line in ("pytest.skip()", "pytest.mark.xfail", "from unittest.mock import Mock")),
    ],
)
def test_a_rule_bites(rule: Rule, line: str) -> None:
    assert list(rule(Source("merge_algos/bad.py", line)))


@pytest.mark.parametrize("line", ["B.mT @ other.B", "A @ A.mT", "U @ A", "(B.mT @ B) @ A", "QB @ core @ QA.mT"])
def test_products_that_stay_small_are_free(line: str) -> None:
    assert list(forms_dense_delta(Source("app/good.py", line))) == []


# Size and shape


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(source.tree) if isinstance(node, FUNCTIONS))


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_unannotated(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    given = [each for each in named if each is not None and each.arg not in {"self", "cls"}]
    return function.returns is None or any(each.annotation is None for each in given)


def undocumented(source: Source) -> Iterator[str]:
    """Public names of a module longer than 8 lines. A class of nothing but fields documents itself, as do migrations."""
    for node in source.tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_") or lines(node) <= 8:
            continue
        fields_only = isinstance(node, ast.ClassDef) and all(isinstance(each, ast.AnnAssign | ast.Assign) for each in node.body)
        if not (fields_only or ast.get_docstring(node) or "/migrations/versions/" in source.path):
            yield source.at(node, f"{node.name} has no docstring")


def test_files_are_short() -> None:
    assert [f"{s.path}: {len(s.text.splitlines())}" for s in EVERYWHERE if len(s.text.splitlines()) > 400] == []


def test_every_file_says_why_it_exists() -> None:
    assert [source.path for source in EVERYWHERE if not ast.get_docstring(source.tree)] == []


def test_functions_are_short() -> None:
    lengths = [lines(function) for source in OURS for function in functions(source)]
    assert statistics.median(lengths) <= 8
    assert statistics.quantiles(lengths, n=10)[-1] <= 30


def test_every_signature_is_annotated() -> None:
    assert [s.at(f, f.name) for s in EVERYWHERE for f in functions(s) if is_unannotated(f)] == []


def test_what_is_public_and_not_obvious_has_a_docstring() -> None:
    assert broken(undocumented, OURS) == []


def test_files_are_named_after_what_is_in_them() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|managers?|common|misc)(_|$)")
    assert [source.path for source in EVERYWHERE if any(vague.search(Path(part).stem) for part in source.path.split("/"))] == []


# Methods and errors


EVERY_METHOD = {**methods.registry(), **learned.registry()}


@pytest.mark.parametrize("file", METHOD_FILES)
def test_a_file_of_methods_holds_one(file: str) -> None:
    (method,) = [method for method in methods.registry().values() if method.__module__ == f"merge_algos.methods.{file}"]
    assert method.name == file


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_method_is_a_frozen_dataclass_that_declares_itself(name: str) -> None:
    method = EVERY_METHOD[name]
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert not {"name", "paper", "version", "memory", "needs", "min_adapters"} & {f.name for f in dataclasses.fields(method)}
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\d{4}", method.paper)
    assert method.version >= 1 and method.min_adapters >= 1
    assert method.memory in {"factors", "dense"} and method.needs in {"nothing", "base", "data"}
    assert method.paper.removeprefix("arXiv:") in (method.__doc__ or "")


ERROR_MODULES = (merge_algos.errors, storage.errors, app.errors)
ERRORS = [
    error
    for module in ERROR_MODULES
    for error in vars(module).values()
    if inspect.isclass(error) and issubclass(error, Exception) and error.__module__ == module.__name__
]
LEAVES = [error for error in ERRORS if not error.__subclasses__()]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: error.__name__)
def test_every_error_has_a_status(error: type[Exception]) -> None:
    assert 400 <= app.errors.STATUS[error] <= 599


def test_the_table_holds_errors_of_ours_and_no_roots() -> None:
    assert set(app.errors.STATUS) == set(LEAVES)


def test_no_two_errors_share_a_slug() -> None:
    slugs = [app.errors.slug(error) for error in LEAVES]
    assert len(slugs) == len(set(slugs))


@pytest.mark.parametrize("module", ERROR_MODULES, ids=lambda module: module.__name__)
def test_the_tree_of_a_module_shows_every_error(module: ModuleType) -> None:
    shown = re.findall(r"^[│├└─ ]*(\w+)", module.__doc__ or "", re.MULTILINE)
    assert [error.__name__ for error in ERRORS if error.__module__ == module.__name__ and error.__name__ not in shown] == []


# Text

TEXTS = [
    file
    for pattern in ("*", "docs/*", ".ci/*", "examples/**/*.md", *(f"{folder}**/*.py" for folder in FOLDERS))
    for file in sorted(ROOT.glob(pattern))
    if file.is_file() and file.suffix in {"", ".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".ini"} and file.name != ".git"
]


def found(pattern: str) -> list[str]:
    numbered = ((file, number, line) for file in TEXTS for number, line in enumerate(file.read_text().splitlines(), 1))
    return [f"{file.relative_to(ROOT)}:{number}: {line.strip()}" for file, number, line in numbered if re.search(pattern, line)]


def test_no_path_of_one_machine_is_written_down() -> None:
    assert found(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|tmp/dev|opt/pypi[\w-]*|opt/wheels)(?:/|\b)") == []


def test_nothing_is_left_for_later() -> None:
    assert found(r"\b(?:TOD[O]|FIXM[E]|XX[X]|HAC[K])\b") == []
