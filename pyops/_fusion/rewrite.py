"""Forwards rewritten: where a method calls layers of its module one after another, it calls `runs` with their names instead.

The rest of the method stays what it is, so that whatever it decides by its arguments, attributes or modes it decides as before. Replaced
are only values that nothing else reads:

    out = self.conv1(x)                            out = run(self, ("conv1", "bn1", "relu"), x)
    out = self.bn1(out)                            out = begin(self, ("conv2", "bn2", "+=", "relu"), out, False)
    out = self.relu(out)                           if self.downsample is not None:
    out = self.conv2(out)                              identity = self.downsample(x)
    out = self.bn2(out)                    ->      out = finish(self, ("conv2", "bn2", "+=", "relu"), out, identity)
    if self.downsample is not None:
        identity = self.downsample(x)
    out += identity
    out = self.relu(out)

(in truth the first two runs are one). Nested calls, functional activations and pooling, `if self.se is not None: out = self.se(out)` are
read the same way. A method without source, with a decorator or another peculiarity is left as it is. Files of single libraries add calls
whose results are handed on (`reading.HANDED`), and decorators that class creation puts on again (RENEWED).
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from pyops._fusion import runs
from pyops._fusion._cached import cached
from pyops._fusion.reading import Handing, Rewriter, Views

RUNTIME = {f"__pyops_{name}__": getattr(runs, name) for name in ("run", "begin", "finish", "view")}

PECULIAR = (
    ast.Try, ast.Global, ast.Nonlocal, ast.Delete, ast.Match, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.ClassDef,
)  # fmt: skip
JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
PLACES = frozenset(("as_strided", "as_strided_", "data_ptr", "storage", "untyped_storage", "storage_offset"))
LOOKS_IN = frozenset(("locals", "vars", "eval", "exec", "dir"))  # functions that see a method's variables
RENEWED: set[tuple[str, str]] = set()  # (module, name) of wrappers that a class' `__init_subclass__` puts around its methods


def _methods(cls: type) -> Iterator[types.FunctionType]:
    """What a module of the class has from classes that are not torch's or pyops'."""
    for base in cls.__mro__:
        if not base.__module__.startswith(("torch.", "pyops.")):
            yield from (method for method in vars(base).values() if isinstance(method, types.FunctionType))


@cached
def asks_for_class(cls: type) -> bool:
    """Whether a method says ``super(type(self), self)``, which in a derived class means the method itself."""
    return any(_asks_for_class(method) for method in _methods(cls) if method.__name__ != "__init__")


def _asks_for_class(method: types.FunctionType) -> bool:
    names = method.__code__.co_names
    if "super" not in names or not {"type", "__class__"} & set(names):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):
        return True  # who knows
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "super" and node.args]
    return any(ast.unparse(call.args[0]) in ("type(self)", "self.__class__") for call in calls)


@cached
def reads_memory(cls: type) -> bool:
    """Whether a method reads a tensor's elements by their places in memory, which another layout moves."""
    return any(PLACES & set(method.__code__.co_names) for method in _methods(cls))


@cached
def methods_of(cls: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The methods of `cls`, its own and inherited, that have runs in them, rewritten."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith(("torch.", "pyops.")):
            break
        for name, method in vars(base).items():
            if name not in found:
                own = isinstance(method, types.FunctionType) and not name.startswith("__")
                found[name] = _rewritten(method, cls, base.__name__) if own else None
    return {name: method for name, method in found.items() if method is not None}


def _rewritten(method: types.FunctionType, cls: type, owner: str) -> types.FunctionType | None:
    """owner: the name of the class that the method stands in."""
    while (method.__globals__.get("__name__"), method.__code__.co_name) in RENEWED:
        method = method.__wrapped__  # type: ignore[attr-defined]
    code = method.__code__
    if hasattr(method, "__wrapped__") or code.co_varnames[:1] != ("self",):
        return None
    try:
        lines, first = inspect.getsourcelines(method)
        function = ast.parse("class _:\n" + "".join(lines)).body[0].body[0]  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or getattr(function, "type_params", None):
        return None
    if function.name != code.co_name or any(_is_peculiar(node) for node in ast.walk(function)):
        return None
    if not _same_code(_compiled(function, method, first, owner).__code__, code):
        return None  # the file was changed, or the method was, since it was compiled
    rewriter = Rewriter(function, cls, method)
    function = Handing(rewriter).visit(function)
    function.body = rewriter.block(function.body)
    function = Views(rewriter).visit(function)
    return _compiled(function, method, first, owner) if rewriter.changed else None


def _is_peculiar(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in LOOKS_IN or (node.id == "self" and not isinstance(node.ctx, ast.Load))
    return isinstance(node, PECULIAR)


def _same_code(found: types.CodeType, expected: types.CodeType) -> bool:
    """Whether two functions' code does the same: how a name's attribute is called depends on whether its module imports the name."""

    def facts(code: types.CodeType) -> Any:
        steps = [
            (step.opname.replace("METHOD", "ATTR"), None if step.opcode in JUMPS else facts_of(step.argval))
            for step in dis.get_instructions(code)
            if step.opname not in ("PUSH_NULL", "PRECALL", "EXTENDED_ARG")
        ]
        return steps, code.co_varnames, code.co_freevars, code.co_cellvars

    def facts_of(value: Any) -> Any:
        return facts(value) if isinstance(value, types.CodeType) else repr(value)

    return facts(found) == facts(expected)


def _compiled(function: ast.FunctionDef, method: types.FunctionType, first: int, owner: str) -> types.FunctionType:
    """A function of the method's globals, defaults and closure, which holds the functions of `runs` as well."""
    code = method.__code__
    cells = dict(zip(code.co_freevars, method.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in RUNTIME.items()}
    function.returns = None
    for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs, function.args.vararg, function.args.kwarg]:
        if argument is not None:
            argument.annotation = None
    function.args.defaults = [ast.Constant(None) for _ in function.args.defaults]
    function.args.kw_defaults = [None if value is None else ast.Constant(None) for value in function.args.kw_defaults]
    outer = ast.parse("def outer():\n    pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    place = ast.parse(f"class {owner}:\n    pass").body[0]  # names that begin with two underscores mean the class'
    assert isinstance(place, ast.ClassDef)
    place.body = [function]
    outer.body = [*ast.parse("\n".join(f"{name} = None" for name in cells if name != "__class__")).body, place]
    if owner not in cells:
        outer.body.insert(0, ast.Global([owner]))  # as the method means its class' name
    module = ast.Module([outer], [])
    ast.increment_lineno(function, first - function.lineno)
    ast.fix_missing_locations(module)
    body: Any = compile(module, code.co_filename, "exec", dont_inherit=True)
    for name in ("outer", owner, code.co_name):
        body = _code(body, name)
    if hasattr(code, "co_qualname"):  # Python 3.11
        body = body.replace(co_qualname=code.co_qualname)
    closure = tuple(cells[name] for name in body.co_freevars)
    made = types.FunctionType(body, method.__globals__, method.__name__, method.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__, made.__dict__ = method.__kwdefaults__, method.__annotations__, dict(method.__dict__)
    made.__module__, made.__qualname__, made.__doc__ = method.__module__, method.__qualname__, method.__doc__
    return made


def _code(code: types.CodeType, name: str) -> types.CodeType:
    return next(value for value in code.co_consts if isinstance(value, types.CodeType) and value.co_name == name)
