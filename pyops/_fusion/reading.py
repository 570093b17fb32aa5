"""What `rewrite` reads in a method: which layers are called one after another on values that nothing else reads, and what replaces them."""

from __future__ import annotations

import ast
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyops._fusion import runs

ACTIVATIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU, F.hardswish: nn.Hardswish, F.gelu: nn.GELU,
    torch.sigmoid: nn.Sigmoid, F.sigmoid: nn.Sigmoid, torch.tanh: nn.Tanh, F.tanh: nn.Tanh, F.hardsigmoid: nn.Hardsigmoid,
    F.leaky_relu: nn.LeakyReLU,
}  # fmt: skip
POOLS: dict[Any, type[nn.Module]] = {F.max_pool2d: nn.MaxPool2d, F.avg_pool2d: nn.AvgPool2d}
HANDED: dict[tuple[str, str], str] = {}  # (class of a global, its method) -> the function of RUNTIME that makes another of its result


class _Run:
    """Layers called one after another on the value of an expression."""

    def __init__(self, names: list[str], input: ast.expr):
        self.names, self.input = names, input


class Rewriter:
    """Of one method of a class."""

    def __init__(self, function: ast.FunctionDef, cls: type, method: types.FunctionType):
        self.cls, self.globals, self.changed = cls, method.__globals__, False
        nodes = list(ast.walk(function))
        reads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        reads += [node.target for node in nodes if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)]
        self.reads = [(node.id, (node.lineno, node.col_offset)) for node in reads]
        self.loops = any(isinstance(node, (ast.For, ast.While)) for node in nodes)
        code = method.__code__
        self.locals = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        scopes = [node for node in ast.walk(function) if isinstance(node, inner) and node is not function]
        self.captured = {node.id for scope in scopes for node in ast.walk(scope) if isinstance(node, ast.Name)}

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements with their runs replaced, those in nested blocks too."""
        done: list[ast.stmt] = []
        i = 0
        while i < len(statements):
            count, replaced = self.run_from(statements[i:])
            if count:
                done += replaced
                i += count
                continue
            statement = statements[i]
            for name in ("body", "orelse"):
                if isinstance(getattr(statement, name, None), list) and not isinstance(statement, ast.FunctionDef):
                    setattr(statement, name, self.block(getattr(statement, name)))
            done.append(statement)
            i += 1
        return done

    # -- statements ----------------------------------------------------------------------------------------------------------------------

    def run_from(self, statements: list[ast.stmt]) -> tuple[int, list[ast.stmt]]:
        """How many of the first statements are a run, 0 for none, and what stands in their place."""
        target, value = _assigned(statements[0])
        if value is None:
            return 0, []
        begun = self.expression(value)
        if begun is None:
            return 0, []
        run, tail = begun  # tail: (sum, residual, names behind it), if the sum is in the expression already
        count = 1
        between: list[ast.stmt] = []
        while tail is None and target is not None and count < len(statements):
            more, names, result = self.goes_on(statements[count], target)
            if names is not None:
                if more is None:
                    run.names += names
                else:
                    tail = (*more, names)
                target, count = result, count + 1
                continue
            skipped = self.sum_behind(statements[count:], target, run.names)
            if skipped:
                between, count = statements[count : count + skipped], count + skipped
                continue
            break
        while tail is not None and target is not None and count < len(statements):
            more, names, result = self.goes_on(statements[count], target)
            if names is None or more is not None:
                break
            tail[2].extend(names)
            target, count = result, count + 1
        if tail is not None and any(_touches(node, "", run.names) for node in ast.walk(tail[1])):
            return 0, []  # a layer that runs in the residual too, and has to run in its order
        if len(run.names) + (0 if tail is None else 1 + len(tail[2])) < 2:
            return 0, []
        self.changed = True
        last = statements[count - 1]
        if tail is None:
            return count, [_located(_stored(last, target, _call("run", _names(run.names), run.input)), statements[0])]
        run_names = _names([*run.names, tail[0], *tail[2]])
        begin = _call("begin", run_names, run.input, ast.Constant(not between and isinstance(tail[1], ast.Name)))
        if not between:
            return count, [_located(_stored(last, target, _call("finish", run_names, begin, tail[1])), statements[0])]
        held = ast.Name("__pyops_held__", ast.Store())
        first = ast.Assign([held], begin)
        end = _stored(last, target, _call("finish", run_names, ast.Name(held.id, ast.Load()), tail[1]))
        return count, [_located(first, statements[0]), *between, _located(end, last)]

    def goes_on(self, statement: ast.stmt, name: str) -> tuple[tuple[str, ast.expr] | None, list[str] | None, str | None]:
        """((sum, residual) or None, names, where the result is) if the statement only leads the value called `name` on; else names is
        None. With a sum the names are of what is behind it."""
        nothing = None, None, None
        if isinstance(statement, ast.If):
            return None, self.optional(statement, name), name
        if isinstance(statement, ast.AugAssign):
            target, residual = statement.target, statement.value
            adds = isinstance(statement.op, ast.Add) and isinstance(target, ast.Name) and target.id == name
            return (("+=", residual), [], name) if adds and self.is_residual(residual, name) else nothing
        result, value = _assigned(statement)
        if value is None or name in self.captured or (result not in (name, None) and self.is_read_later(name, statement)):
            return nothing
        names, inner = self.peel(value)
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add):
            for branch, residual in ((inner.left, inner.right), (inner.right, inner.left)):
                if isinstance(branch, ast.Name) and branch.id == name and self.is_residual(residual, name):
                    plain = isinstance(residual, ast.Name) or branch is inner.left
                    return (("+", residual), names, result) if plain else nothing
            return nothing
        if isinstance(inner, ast.Name) and inner.id == name and names:
            return None, names, result
        return nothing

    def is_read_later(self, name: str, statement: ast.stmt) -> bool:
        """Whether something may read the variable behind the statement: what is written there or, where loops lead back, anywhere else."""
        places = [place for read, place in self.reads if read == name]
        end = (statement.end_lineno, statement.end_col_offset)
        return len(places) > 1 if self.loops else any(place >= end for place in places)

    def optional(self, statement: ast.If, name: str) -> list[str] | None:
        """``if self.se is not None: name = self.se(name)``"""
        test = statement.test
        if statement.orelse or len(statement.body) != 1 or not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.IsNot):
            return None
        child = self.child(test.left)
        value = test.comparators[0]
        if child is None or len(test.ops) != 1 or not (isinstance(value, ast.Constant) and value.value is None):
            return None
        target, call = _assigned(statement.body[0])
        if target != name or call is None:
            return None
        names, inner = self.peel(call)
        return [f"?{child}"] if names == [child] and isinstance(inner, ast.Name) and inner.id == name else None

    def sum_behind(self, statements: list[ast.stmt], name: str, layers: list[str]) -> int:
        """How many statements that do not touch `name`, nor `layers`, come before one that adds to it; 0: they do, or none adds."""
        for i, statement in enumerate(statements):
            more, names, _ = self.goes_on(statement, name)
            if names is not None:
                return i if more is not None else 0
            allowed = (ast.Assign, ast.Expr, ast.If, ast.AnnAssign)
            nodes = list(ast.walk(statement))
            leaves = any(
                isinstance(node, (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Yield, ast.Await, ast.With)) for node in nodes
            )
            if not isinstance(statement, allowed) or leaves or any(_touches(node, name, layers) for node in nodes):
                return 0
        return 0

    def is_residual(self, value: ast.expr, name: str) -> bool:
        """A variable, or what a child makes of one."""
        if isinstance(value, ast.Call) and self.child(value.func) and len(value.args) == 1 and not value.keywords:
            value = value.args[0]
        return isinstance(value, ast.Name) and value.id != name

    # -- expressions ---------------------------------------------------------------------------------------------------------------------

    def expression(self, value: ast.expr) -> tuple[_Run, tuple[str, ast.expr, list[str]] | None] | None:
        """A run that makes the value, and the sum that comes behind it, if any."""
        names, inner = self.peel(value)
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add):
            for branch, residual in ((inner.left, inner.right), (inner.right, inner.left)):
                before, start = self.peel(branch)
                if before and (branch is inner.left or isinstance(residual, ast.Name)) and self.is_residual(residual, ""):
                    return _Run(before, start), ("+", residual, names)
        return (_Run(names, inner), None) if names else None

    def peel(self, value: ast.expr) -> tuple[list[str], ast.expr]:
        """The layers that are called on each other's results, in the order of their calls, and what the first is called on."""
        names: list[str] = []
        while isinstance(value, ast.Call):
            found = self.layer(value)
            if found is None:
                break
            names.append(found)
            value = value.args[0]
        return names[::-1], value

    def layer(self, call: ast.Call) -> str | None:
        """The name of a child, or a function's key in `runs.FUNCTIONS`."""
        if not call.args or isinstance(call.args[0], ast.Starred):
            return None
        child = self.child(call.func)
        if child is not None:
            return child if len(call.args) == 1 and not call.keywords else None
        function = self.resolve(call.func)
        kind = ACTIVATIONS.get(function) or POOLS.get(function) if callable(function) else None
        if kind is None or any(word.arg is None for word in call.keywords):
            return None
        try:
            constants = [ast.literal_eval(value) for value in call.args[1:]]
            options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            module = kind(*constants, **options)
        except (TypeError, ValueError):
            return None  # not constants, or not of a layer
        if kind not in POOLS.values() and (constants or set(options) - {"inplace"}):
            return None
        key = f"{kind.__name__}({constants}, {options})"
        runs.FUNCTIONS.setdefault(key, module)
        return key

    def child(self, value: ast.expr) -> str | None:
        """The name in ``self.name``, where the class itself has none such."""
        plain = isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self"
        if not plain:
            return None
        name = value.attr  # type: ignore[attr-defined]
        return None if hasattr(self.cls, name) or name.startswith("__") else name

    def resolve(self, value: ast.expr) -> Any:
        """The global that ``name`` or ``module.name`` is."""
        if isinstance(value, ast.Name):
            return None if value.id in self.locals else self.globals.get(value.id)
        if isinstance(value, ast.Attribute):
            owner = self.resolve(value.value)
            return getattr(owner, value.attr, None) if isinstance(owner, types.ModuleType) else None
        return None


class Handing(ast.NodeTransformer):
    """Hands the results of HANDED's calls to their functions."""

    def __init__(self, rewriter: Rewriter):
        self.rewriter = rewriter

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        cls = type(self.rewriter.resolve(node.func.value))
        name = HANDED.get((f"{cls.__module__}.{cls.__qualname__}", node.func.attr))
        if name is None:
            return node
        self.rewriter.changed = True
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [node], []), node)


def _touches(node: ast.AST, name: str, layers: list[str]) -> bool:
    """Whether it is that variable or an attribute called as one of the layers."""
    return (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.Attribute) and node.attr in layers)


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """(variable, value) of ``variable = value``, (None, value) of ``return value``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    return (None, statement.value) if isinstance(statement, ast.Return) else (None, None)


def _stored(last: ast.stmt, target: str | None, value: ast.expr) -> ast.stmt:
    if isinstance(last, ast.Return):
        return ast.Return(value)
    assert target is not None
    return ast.Assign([ast.Name(target, ast.Store())], value)


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    names, *rest = arguments
    return ast.Call(ast.Name(f"__pyops_{name}__", ast.Load()), [ast.Name("self", ast.Load()), names, *rest], [])


def _names(names: list[str]) -> ast.expr:
    return ast.Tuple([ast.Constant(name) for name in names], ast.Load())


def _located(made: ast.stmt, like: ast.stmt) -> ast.stmt:
    return ast.fix_missing_locations(ast.copy_location(made, like))


class Views(ast.NodeTransformer):
    """`x.view(n, -1)` and its like, which no image in channels_last has: `runs.view` lays it out first."""

    def __init__(self, rewriter: Rewriter):
        self.rewriter = rewriter

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        method = node.func
        rest = [value for value in node.args if ast.unparse(value) == "-1"]
        if not isinstance(method, ast.Attribute) or method.attr != "view" or len(node.args) != 2 or not rest or node.keywords:
            return node
        self.rewriter.changed = True
        name = ast.Name("__pyops_view__", ast.Load())
        return ast.fix_missing_locations(ast.copy_location(ast.Call(name, [method.value, *node.args], []), node))
