"""Torch ops of attention's kernels, which write into tensors that the caller has laid out. None is differentiable.

    pyops::attention_into        output = dropout(softmax(scores)) value, and the logarithm of each row's sum of exponentials
    pyops::attention_grad_into   the gradients of query, key, value and, where asked for, of the bias

For query head h of sequence s, its row i < n and column j < m counted within the sequence, and key head h * H_k // H:

    x[i, j] = scale * query[i] . key[j];  x = softcap * tanh(x / softcap) where softcap > 0
    score   = x - slopes[s, h] * |i + m - n - j| + bias[s, h, i, j];  -inf where j - i - (m - n) is below -left or above right (each
              unless it is -1), or where a boolean bias is False

Arguments:
    query [B, H, N, D], key [B, H_k, M, D], value [B, H_k, M, D_v]; of one dtype, any strides, H a multiple of H_k
    bias [1 or S, 1 or H, 1 or N', 1 or M'], N' and M' at least the longest sequence's; floating of any dtype, or bool (True: seen); any
          strides
    slopes [1 or S, H] float32
    spans [S, 4] int32, each (first row, rows n, first column, columns m) of a sequence. With B > 1 there are S = B of them, each within its
          own batch; with B = 1 any number, which do not overlap. None: each batch is one sequence of all its rows and columns.
          Kernels clamp them into the tensors.
    seed [1] int64, read with dropout_p > 0: `_philox` says which scores are dropped
    output [B, H, N, D_v], lse [B, H, N] float32. Rows that see nothing, and rows of no sequence: zeros and -inf; nothing beyond a
          sequence is read, so that NaN may stand there.
    grad (of output), grad_lse or None; grad_query, grad_key, grad_value: like query, key, value; grad_bias float32, contiguous, of bias'
          shape, or None. All of each is written. They have the strides that their tensors have, whatever those are.

Softmax, sums and lse are float32. The same call gives the same bits, on any number of threads.

Source: Vaswani et al., 2017; Dao, 2023 (tiling, and what backward computes again); Press et al., 2022 (slopes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _attention_reference as reference

_OPTIONS = "float scale, int left, int right, float softcap, float dropout_p"
_EXTRAS = "Tensor? bias, Tensor? slopes, Tensor? spans, Tensor? seed"


def _into(query, key, value, bias, slopes, spans, seed, scale, left, right, softcap, dropout_p, output, lse) -> None:
    options = reference.Options(scale, left, right, softcap, dropout_p)
    found = reference.forward(query, key, value, bias, slopes, spans, seed, options)
    for to, y in zip((output, lse), found, strict=True):
        to.copy_(y)


def _grad_into(
    grad, grad_lse, query, key, value, bias, slopes, spans, seed, output, lse, scale, left, right, softcap, dropout_p,
    grad_query, grad_key, grad_value, grad_bias,
) -> None:  # fmt: skip
    options = reference.Options(scale, left, right, softcap, dropout_p)
    found = reference.backward(grad, grad_lse, query, key, value, bias, slopes, spans, seed, options, grad_bias is not None)
    for to, y in zip((grad_query, grad_key, grad_value, grad_bias), found, strict=True):
        if to is not None:
            to.copy_(y)


def _triton(name: str):
    def call(*args):
        from pyops.triton_kernels import attention  # imports triton, so only at first use

        return getattr(attention, name)(*args)

    return call


def _nothing(*_) -> None:
    return None


_library.define(
    "attention_into",
    f"(Tensor query, Tensor key, Tensor value, {_EXTRAS}, {_OPTIONS}, Tensor(a!) output, Tensor(b!) lse) -> ()",
    fake=_nothing,
    reference=_into,
    overloads=("", "triton"),
)
_library.define(
    "attention_grad_into",
    f"(Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, {_EXTRAS}, Tensor output, Tensor lse, {_OPTIONS}, "
    "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!)? grad_bias) -> ()",
    fake=_nothing,
    reference=_grad_into,
    overloads=("", "triton"),
)
for _name in ("attention_into", "attention_grad_into"):
    _library.implement(f"{_name}.triton", _triton(_name), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1


def vector(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.promote_types(like.dtype, torch.float32))
