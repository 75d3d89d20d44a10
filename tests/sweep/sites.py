"""Sites: every call in the source of the product that may fail, found in its syntax tree, and made to fail at will.

`Sweep` compiles the functions of the product's modules anew, with a hook around every call that `calls.WAYS` knows, and exchanges the
code of the live functions while it is active. So what is found in the source and what can be injected are the same thing, and
nothing of Python or its packages is touched.

Not handled here: functions that Numba compiles (their system calls are sites where they are called), statements of modules and classes.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple, Self

from tests.sweep.calls import SUSPECT, Fault, faults_of, is_harmless

ROOT: Final = Path(__file__).resolve().parents[2]
HOOK: Final = "__site__"
COMPILED_BY_NUMBA: Final = {"kernel", "inline", "intrinsic"}
FOLDERS: Final = ("host", "swapd")
OF_PROTO: Final = (
    "curve",
    "door",
    "files",
    "image",
    "inputlog",
    "link",
    "remote",
    "run",
    "segments",
    "trace_writer",
)
"""What host and daemons use of proto/ that calls the system."""


class Site(NamedTuple):
    """A call that may fail."""

    module: str
    function: str
    call: str
    number: int
    """Among the sites of the same text in the same function, from 1: stays when lines move."""

    def __str__(self) -> str:
        """host/sockets.py HostSockets.send: self.router.send #1."""
        return f"{self.module.replace('.', '/')}.py {self.function}: {self.call} #{self.number}"


@dataclass(frozen=True, slots=True)
class Shot:
    """The ``n``-th call at ``site`` fails with ``fault``."""

    site: Site
    fault: Fault
    n: int

    def __str__(self) -> str:
        """For reports."""
        return f"{self.site} {self.fault.name} n={self.n}"


def modules() -> list[str]:
    """Names of the modules that are swept."""
    names = [f"{folder}.{path.stem}" for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return [name for name in names if not name.endswith("__init__")] + [f"proto.{name}" for name in OF_PROTO]


class _Finder(ast.NodeTransformer):
    """Wraps sites into the hook. ``sites``: by their index; ``unknown``: suspects that no table knows."""

    def __init__(self, module: str) -> None:
        self.sites: list[tuple[Site, tuple[Fault, ...]]] = []
        self.unknown: list[str] = []
        self._module = module
        self._where: list[str] = []
        self._functions = 0
        self._seen: Counter[tuple[str, str]] = Counter()

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._where.append(node.name)
        self.generic_visit(node)
        self._where.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if any(isinstance(one, ast.Name) and one.id in COMPILED_BY_NUMBA for one in node.decorator_list):
            return node
        self._where.append(node.name)
        self._functions += 1
        node.body = [self.visit(statement) for statement in node.body]
        self._functions -= 1
        self._where.pop()
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        call = ast.unparse(node.func)
        self.generic_visit(node)
        if not self._functions:
            return node
        faults = faults_of(call, ast.unparse(node))
        if not faults:
            if "(" not in call and SUSPECT.fullmatch(call) and not is_harmless(call):
                self.unknown.append(f"{self._module}:{node.lineno} {call}")
            return node
        function = ".".join(self._where)
        self._seen[function, call] += 1
        self.sites.append((Site(self._module, function, call, self._seen[function, call]), faults))
        hook = ast.Call(
            ast.Name(HOOK, ast.Load()),
            [ast.Constant(self._module), ast.Constant(len(self.sites) - 1), node.func],
            [],
        )
        node.func = ast.copy_location(hook, node.func)
        return node


def found_in(module: str) -> tuple[ast.Module, _Finder]:
    """The module's tree with hooks, and what was found."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    finder = _Finder(module)
    tree = ast.fix_missing_locations(finder.visit(ast.parse(path.read_text())))
    return tree, finder


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Plain functions of a module, methods and properties of its classes."""
    for thing in list(vars(module).values()):
        if isinstance(thing, type) and thing.__module__ == module.__name__:
            for member in list(vars(thing).values()):
                plain = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(plain):
                    yield plain
        elif inspect.isfunction(thing) and thing.__module__ == module.__name__:
            yield thing


class Sweep:
    """Active as a context. `shoot` arms it for one run; `calls` counts the calls of every site since."""

    def __init__(self) -> None:
        self.faults: dict[Site, tuple[Fault, ...]] = {}
        self.unknown: list[str] = []
        self.calls: Counter[Site] = Counter()
        self.counts_of_last_run: dict[Site, int] = {}
        self.fired = False
        self._shot: Shot | None = None
        self._by_index: dict[tuple[str, int], Site] = {}
        self._new: list[tuple[FunctionType, CodeType, CodeType]] = []
        for name in modules():
            self._read(name)

    def _read(self, name: str) -> None:
        tree, finder = found_in(name)
        self.unknown += finder.unknown
        for index, (site, faults) in enumerate(finder.sites):
            self.faults[site] = faults
            self._by_index[name, index] = site
        module = importlib.import_module(name)
        code = compile(tree, str(module.__file__), "exec", dont_inherit=True, flags=_future(tree))
        fresh: dict[tuple[str, int], CodeType] = {
            (one.co_qualname, one.co_firstlineno): one for one in _codes(code)
        }
        for function in _functions(module):
            old: CodeType = function.__code__
            new = fresh.get((old.co_qualname, old.co_firstlineno))
            if old.co_filename == module.__file__ and new is not None:
                self._new.append((function, old, new))
        setattr(module, HOOK, self._reach)

    def __enter__(self) -> Self:
        """Exchange the code."""
        for function, _, new in self._new:
            function.__code__ = new
        return self

    def __exit__(self, *_error: object) -> None:
        for function, old, _ in self._new:
            function.__code__ = old

    def shoot(self, shot: Shot | None) -> None:
        """For the next run."""
        self.counts_of_last_run = dict(self.calls)
        self.calls.clear()
        if shot is not None:
            self.fired = False
        self._shot = shot

    def _reach(self, module: str, index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        site = self._by_index[module, index]
        if site.call == "self.poller.poll":
            return lambda *_: self._call(site, lambda: call(0), (), {})
        return lambda *args, **kwargs: self._call(site, call, args, kwargs)

    def _call(self, site: Site, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if site.call == "_collect":
            return self._collect(site, call, args)
        self.calls[site] += 1
        shot = self._shot
        if shot is None or shot.site != site or self.calls[site] != shot.n:
            return call(*args, **kwargs)
        self.fired = True
        return shot.fault.apply(call, args, kwargs)

    def _collect(self, site: Site, call: Callable[..., Any], args: Any) -> Any:
        """Counts only when something came back."""
        count = call(*args)
        if not count:
            return count
        self.calls[site] += 1
        shot = self._shot
        if shot is None or shot.site != site or self.calls[site] != shot.n:
            return count
        self.fired = True
        return shot.fault.apply(lambda *_: count, args, {})


def _future(tree: ast.Module) -> int:
    uses = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    return __future__.annotations.compiler_flag if uses else 0
