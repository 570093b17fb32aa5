"""How calls of pyops' ops split over a mesh: sharding rules for PyTorch's DTensor, registered when the first DTensor comes along.

A rule names the dimensions of an op's tensors by letters and says along which of them a call falls into independent parts. A tensor with
that letter is split there, one without it is whole on every process; a result that has it behind a "+" is a sum over the parts. A result
"grad NAME" is the gradient of that argument: split with it, and a sum where it is whole. What no rule allows is gathered first, so that
results are never those of a part. Ops that write into their arguments have none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyops.ops._rnn_reference import GATES, SAVED, Cell


class Split(NamedTuple):
    """axes: letters along which a call may be split; tensors: the letters of each tensor argument, by name; results: of each result."""

    axes: str
    tensors: dict[str, str]
    results: list[str]
    even: bool = False  # only into equal parts: the tensors' sizes along an axis differ


RULES: dict[str, Callable[..., Split]] = {}
PUBLIC = (  # functions of images whose ops have rules; the others leave DTensors to PyTorch's ops
    "layer_norm_2d", "local_response_norm", "depthwise_conv_bn_act", "squeeze_excite"
)  # fmt: skip


def is_sharded(t: Tensor) -> bool:
    """Whether `t` is a DTensor, for which the rules are then in place."""
    if type(t) is Tensor or type(t) is torch.nn.Parameter or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(t, module.DTensor):
        return False
    _register()
    return True


@cache
def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    known: Any = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("pyops::"):
            continue
        packet, _, overload = name.removeprefix("pyops::").partition(".")
        op = getattr(getattr(torch.ops.pyops, packet), overload or "default")
        if op._schema.is_mutable:
            continue
        register_sharding(op)(_placements(op, RULES.get(packet)))
        # what PyTorch remembers of a call depends on every number in it: on which gradients are wanted, for one
        first = next((i for i, a in enumerate(op._schema.arguments) if "Tensor" not in str(a.type)), len(op._schema.arguments))
        known[op] = RuntimeSchemaInfo(first, needs_pytree=True)


def _placements(op, rule: Callable[..., Split] | None) -> Callable[..., list]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [argument.name for argument in op._schema.arguments]

    def ways(*args) -> list[tuple[list, list]]:
        found = {name: arg for name, arg in zip(names, args, strict=False) if hasattr(arg, "placements")}
        whole: Any = [Replicate()] * len(op._schema.returns), [Replicate()] * len(found)
        if rule is None:
            return [whole]
        split = rule(*args)
        letters = {name: _split_letters(split.tensors.get(name, ""), spec.shape) for name, spec in found.items()}
        done = [whole]
        for axis in split.axes:
            sizes = {spec.shape[letters[name].index(axis)] for name, spec in found.items() if axis in letters[name]}
            parts = next(iter(found.values())).mesh.size()
            if not sizes or ((split.even or len(sizes) > 1) and any(size % parts for size in sizes)):
                continue
            given = [Shard(at) if (at := letters[name].find(axis)) >= 0 else Replicate() for name in found]
            results = []
            for result in split.results:
                kind, _, name = result.partition("grad ")
                dims, _, sums = (letters[name] + "+" + split.axes if name else kind).partition("+")
                results.append(Shard(dims.index(axis)) if axis in dims else Partial() if axis in sums else Replicate())
            done.append((results, given))
        return done

    return ways


def _split_letters(letters: str, shape) -> str:
    """Without those of dimensions of one element, which are repeated."""
    return "".join("." if size == 1 else letter for letter, size in zip(letters, shape, strict=False))


def rule(function: Callable[..., Split]) -> Callable[..., Split]:
    RULES[function.__name__] = function
    return function


# ----------------------------------------------------------------------------------------------------------------------- attention


def _attention(query, key, bias, slopes, spans, dropout_p) -> tuple[str, dict[str, str]]:
    """(axes, letters): batches, unless they are one ragged one, and heads. Dropout counts both, so that no part could draw its own."""
    ragged = query.shape[0] == 1
    axes = "" if dropout_p else "h" if ragged else "bh"
    heads = "bh.." if key is not None else "b..h."
    letters = dict(query=heads, key=heads, value=heads, bias="bh..", slopes="bh", spans="b.", grad="bh..", grad_lse="bh.")
    letters |= dict(output="bh..", lse="bh.")
    return axes, {name: t.replace("b", ".") for name, t in letters.items()} if ragged else letters


@rule
def attention_fwd(query, key, value, bias, slopes, spans, seed, scale, left, right, softcap, dropout_p) -> Split:
    axes, letters = _attention(query, key, bias, slopes, spans, dropout_p)
    return Split(axes, letters, ["bh..", "bh."])


@rule
def attention_bwd(grad, grad_lse, query, key, value, bias, slopes, spans, seed, output, lse, *options) -> Split:
    axes, letters = _attention(query, key, bias, slopes, spans, options[4])
    others = ["", ""] if key is None else ["grad key", "grad value"]
    return Split(axes, letters, ["grad query", *others, "grad bias" if options[5] else ""])


@rule
def window_attention_fwd(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p) -> Split:
    return Split("" if dropout_p else "b", dict(qkv="b..."), ["b...", "b.."], even=True)  # lse's sizes are those of windows


@rule
def window_attention_bwd(grad, qkv, qkv_bias, table, logit_scale, seed, lse, heads, window, shift, scale, dropout_p, needs) -> Split:
    vectors = [f"grad {name}" if need else "" for name, need in zip(("qkv_bias", "table", "logit_scale"), needs, strict=True)]
    return Split("" if dropout_p else "b", dict(grad="b...", qkv="b...", lse="b.."), ["grad qkv", *vectors], even=True)


# ----------------------------------------------------------------------------------------------------------------- recurrent layers


def _recurrent(input, batch_first: bool) -> tuple[str, dict[str, str]]:
    rows = "b." if len(input.shape) == 2 else "b.." if batch_first else ".b."
    states = dict.fromkeys(("h0", "c0", "grad_h_n", "grad_c_n"), "b.")
    return rows, states | dict(input=rows, output=rows, grad_output=rows, lengths="b", reserve=".b..")


@rule
def rnn_infer(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse) -> Split:
    rows, letters = _recurrent(input, batch_first)
    return Split("b", letters, [rows, "b.", "b." if cell == Cell.lstm else ""])


@rule
def rnn_fwd(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse) -> Split:
    rows, letters = _recurrent(input, batch_first)
    return Split("b", letters, [rows, "b.", "b." if cell == Cell.lstm else "", ".b.." if SAVED[cell] else ""])


@rule
def rnn_bwd(
    cell, grad_output, grad_h_n, grad_c_n, input, h0, c0, weight_ih, weight_hh, output, reserve, lengths, has_bias, batch_first, reverse,
    needs_input, needs_weights,
) -> Split:  # fmt: skip
    _, letters = _recurrent(input, batch_first)
    states = [f"grad {name}" if state is not None else "" for name, state in (("h0", h0), ("c0", c0))]
    weights, biases = "+b" if needs_weights else "", "+b" if needs_weights and has_bias else ""
    found = ["grad input" if needs_input else "", *states, weights, weights, biases, biases if GATES[cell] == 3 else ""]
    return Split("b", letters, found)


# --------------------------------------------------------------------------------------------------------------------------- images


@rule
def layer_norm_fwd(input, weight, bias, eps) -> Split:
    return Split("bhw", dict(input="b.hw"), ["b.hw"])


@rule
def layer_norm_bwd(grad, input, weight, eps, needs_input) -> Split:
    return Split("bhw", dict(grad="b.hw", input="b.hw"), ["b.hw" if needs_input else "", "+bhw"])


@rule
def lrn_fwd(input, *options) -> Split:
    return Split("b", dict(input="b"), ["b"])


@rule
def lrn_bwd(grad, input, *options) -> Split:
    return Split("b", dict(grad="b", input="b"), ["b"])


@rule
def depthwise_infer(input, weight, bias, residual, stride, padding, dilation, activation, slope, means) -> Split:
    return Split("bc", dict(input="bc", weight="c", bias="c", residual="bc"), ["bc", "bc" if means else ""])


RULES["depthwise_fwd"] = depthwise_infer


@rule
def depthwise_bwd(grad_output, grad_means, input, weight, bias, residual, *options) -> Split:
    letters = dict(grad_output="bc", grad_means="bc", input="bc", weight="c", bias="c", residual="bc")
    needs_input, needs_weight = options[5:]
    exist = (needs_input, needs_weight, needs_weight and bias is not None, residual is not None)
    names = ("input", "weight", "bias", "residual")
    return Split("bc", letters, [f"grad {name}" if there else "" for name, there in zip(names, exist, strict=True)])


@rule
def squeeze_excite_fwd(input, fc1, bias1, fc2, bias2, means, *options) -> Split:
    return Split("b", dict(input="b", means="b"), ["b", "b"])


@rule
def squeeze_excite_bwd(grad, input, fc1, bias1, fc2, bias2, means, *options) -> Split:
    names = ("input", "fc1", "bias1", "fc2", "bias2", "means")
    return Split("b", dict(grad="b", input="b", means="b"), [f"grad {name}" for name in names])


@rule
def batch_norm_act_fwd(input, norm, weight, bias, keep, residual, *options) -> Split:
    """Backward, whose sums batch statistics need of the whole batch, has no rule."""
    return Split("bc", dict(input="bc", norm=".c", weight="c", bias="c", keep="b", residual="bc"), ["bc"])
