"""Elman recurrence, the whole sequence in one launch:  h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh),  act tanh, relu or sigmoid.

The input projection gates_x [T, B, H] is given; output [T, B, H], either batch-first by strides; weight_hh [H, H]; states [B, H].
Backward needs the output alone: each activation's derivative is a function of its value.

Tiling: one program owns BLOCK_B rows of the batch and all of W_hh, on chip for the whole sequence; the loop over the steps is inside,
the state stays in fp32 registers, and programs never meet. Each step's load is issued one step ahead.

Floors, forward, e bytes an element: 2*T*B*H*e bytes of memory, 2*T*B*H*H flops; but the chain of T dependent steps (exchange of h,
product, activation) binds long before either.
"""

import triton
import triton.language as tl

from .common import load_bias, load_state, load_step, load_weight, product, slice_lengths, step_mask, store_state, store_step, tanh


@triton.jit(do_not_specialize=["T", "B"])
def rnn_forward_kernel(
    gates_x_ptr, h0_ptr, weight_ptr, bias_ptr, lengths_ptr, output_ptr, h_n_ptr,
    stride_xt, stride_xb, stride_yt, stride_yb, T, B,
    ACTIVATION: tl.constexpr,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    length = slice_lengths(lengths_ptr, rows, T, B)  # [B, 1]
    steps = tl.max(length)  # a slice stops at its longest row

    w = tl.trans(load_weight(weight_ptr, 0, H, BLOCK_H))  # [H, H], (input, unit)
    b = load_bias(bias_ptr, 0, H, BLOCK_H)  # [1, H]
    h = load_state(h0_ptr, rows, B, H, BLOCK_B, BLOCK_H)  # [B, H]

    p_x = gates_x_ptr + row * stride_xb + col
    p_y = output_ptr + row * stride_yb + col
    first = steps - 1 if REVERSE else steps * 0
    x = load_step(p_x, first, stride_xt, step_mask(first, length, H, BLOCK_H))  # [B, H]

    for s in range(steps):
        t = first - s if REVERSE else first + s
        a = x + b
        ahead = t - 1 if REVERSE else t + 1
        x = load_step(p_x, ahead, stride_xt, step_mask(ahead, length, H, BLOCK_H))

        a += product(h, w)  # [B, H]
        if ACTIVATION == "tanh":
            h_new = tanh(a)
        elif ACTIVATION == "relu":
            h_new = tl.where(a <= 0.0, 0.0, a)  # NaN stays NaN
        else:
            h_new = tl.sigmoid(a)
        h = tl.where(t < length, h_new, h)
        store_step(p_y, t, stride_yt, h, step_mask(t, length, H, BLOCK_H))
    store_state(h_n_ptr, h, rows, B, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "B"])
def rnn_backward_kernel(
    grad_output_ptr, grad_h_n_ptr, weight_ptr, lengths_ptr, output_ptr, grad_gates_x_ptr, grad_h0_ptr,
    stride_gt, stride_gb, stride_dt, stride_db, T, B,
    stride_yt, stride_yb, ACTIVATION: tl.constexpr,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    length = slice_lengths(lengths_ptr, rows, T, B)  # [B, 1]
    steps = tl.max(length)

    w = load_weight(weight_ptr, 0, H, BLOCK_H)  # [H, H], (unit, input): the transpose of forward's tile
    dh = load_state(grad_h_n_ptr, rows, B, H, BLOCK_B, BLOCK_H)  # [B, H]

    p_y = output_ptr + row * stride_yb + col
    p_d = grad_gates_x_ptr + row * stride_db + col
    first = steps * 0 if REVERSE else steps - 1  # against the direction of the scan
    mask = step_mask(first, length, H, BLOCK_H)
    y = load_step(p_y, first, stride_yt, mask)  # [B, H]
    if grad_output_ptr is not None:
        p_g = grad_output_ptr + row * stride_gb + col
        dy = load_step(p_g, first, stride_gt, mask)

    for s in range(steps):
        t = first + s if REVERSE else first - s
        h = y.to(tl.float32)
        before = t + 1 if REVERSE else t - 1  # the step that fed this one: the loop's next
        mask = step_mask(before, length, H, BLOCK_H)
        y = load_step(p_y, before, stride_yt, mask)

        dh_t = dh
        if grad_output_ptr is not None:
            dh_t += dy
            dy = load_step(p_g, before, stride_gt, mask)
        if ACTIVATION == "tanh":
            d = dh_t * (1.0 - h * h)  # [B, H], gradient before the activation
        elif ACTIVATION == "relu":
            d = tl.where(h <= 0.0, 0.0, dh_t)
        else:
            d = dh_t * h * (1.0 - h)
        dh = tl.where(t < length, product(d, w), dh)
        store_step(p_d, t, stride_dt, d, step_mask(t, length, H, BLOCK_H))
    store_state(grad_h0_ptr, dh, rows, B, H, BLOCK_H)
