"""LSTM recurrence, the whole sequence in one launch.

    i, f, o = sigmoid(x W_ih^T + b_ih + h W_hh^T + b_hh)    g = tanh(likewise)    c' = f*c + i*g    h' = o*tanh(c')

The input projection gates_x [T, B, 4H] is given, blocks in the order i, f, g, o; output [T, B, H], either batch-first by strides;
weight_hh [4H, H]; states [B, H]; reserve [T, B, 5, H] fp32 holds i, f, g, o, c' for backward.

Tiling: one program owns BLOCK_B rows of the batch and all of W_hh, one [H, H] tile per gate, on chip for the whole sequence; the loop
over the steps is inside, states stay in fp32 registers, and programs never meet. Each step's loads are issued one step ahead.

Floors, forward, e bytes an element: T*B*H*(4e + e + 20 when saved) bytes of memory, 8*T*B*H*H flops; but the chain of T dependent
steps (exchange of h, four products, gates) binds long before either.
"""

import triton
import triton.language as tl

from .common import load_bias, load_state, load_step, load_weight, product, slice_lengths, step_mask, store_state, store_step, tanh


@triton.jit(do_not_specialize=["T", "B"])
def lstm_forward_kernel(
    gates_x_ptr, h0_ptr, weight_ptr, bias_ptr, lengths_ptr, output_ptr, h_n_ptr, reserve_ptr,
    stride_xt, stride_xb, stride_yt, stride_yb, T, B,
    c0_ptr, c_n_ptr,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    length = slice_lengths(lengths_ptr, rows, T, B)  # [B, 1]
    steps = tl.max(length)  # a slice stops at its longest row

    w_i = tl.trans(load_weight(weight_ptr, 0, H, BLOCK_H))  # [H, H], (input, unit)
    w_f = tl.trans(load_weight(weight_ptr, 1, H, BLOCK_H))
    w_g = tl.trans(load_weight(weight_ptr, 2, H, BLOCK_H))
    w_o = tl.trans(load_weight(weight_ptr, 3, H, BLOCK_H))
    b_i = load_bias(bias_ptr, 0, H, BLOCK_H)  # [1, H]
    b_f = load_bias(bias_ptr, 1, H, BLOCK_H)
    b_g = load_bias(bias_ptr, 2, H, BLOCK_H)
    b_o = load_bias(bias_ptr, 3, H, BLOCK_H)
    h = load_state(h0_ptr, rows, B, H, BLOCK_B, BLOCK_H)  # [B, H]
    c = load_state(c0_ptr, rows, B, H, BLOCK_B, BLOCK_H)

    p_x = gates_x_ptr + row * stride_xb + col
    p_y = output_ptr + row * stride_yb + col
    first = steps - 1 if REVERSE else steps * 0
    mask = step_mask(first, length, H, BLOCK_H)
    x_i = load_step(p_x, first, stride_xt, mask)  # [B, H]
    x_f = load_step(p_x + H, first, stride_xt, mask)
    x_g = load_step(p_x + 2 * H, first, stride_xt, mask)
    x_o = load_step(p_x + 3 * H, first, stride_xt, mask)

    for s in range(steps):
        t = first - s if REVERSE else first + s
        a_i = x_i + b_i
        a_f = x_f + b_f
        a_g = x_g + b_g
        a_o = x_o + b_o
        ahead = t - 1 if REVERSE else t + 1
        mask = step_mask(ahead, length, H, BLOCK_H)
        x_i = load_step(p_x, ahead, stride_xt, mask)
        x_f = load_step(p_x + H, ahead, stride_xt, mask)
        x_g = load_step(p_x + 2 * H, ahead, stride_xt, mask)
        x_o = load_step(p_x + 3 * H, ahead, stride_xt, mask)

        i = tl.sigmoid(a_i + product(h, w_i))  # [B, H]
        f = tl.sigmoid(a_f + product(h, w_f))
        g = tanh(a_g + product(h, w_g))
        o = tl.sigmoid(a_o + product(h, w_o))
        c_new = f * c + i * g
        c = tl.where(t < length, c_new, c)
        h = tl.where(t < length, o * tanh(c_new), h)

        mask = step_mask(t, length, H, BLOCK_H)
        store_step(p_y, t, stride_yt, h, mask)
        if reserve_ptr is not None:
            stride_rt = B.to(tl.int64) * (5 * H)
            p_r = reserve_ptr + row * (5 * H) + col
            store_step(p_r, t, stride_rt, i, mask)
            store_step(p_r + H, t, stride_rt, f, mask)
            store_step(p_r + 2 * H, t, stride_rt, g, mask)
            store_step(p_r + 3 * H, t, stride_rt, o, mask)
            store_step(p_r + 4 * H, t, stride_rt, c, mask)
    store_state(h_n_ptr, h, rows, B, H, BLOCK_H)
    store_state(c_n_ptr, c, rows, B, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_backward_kernel(
    grad_output_ptr, grad_h_n_ptr, weight_ptr, lengths_ptr, reserve_ptr, grad_gates_x_ptr, grad_h0_ptr,
    stride_gt, stride_gb, stride_dt, stride_db, T, B,
    grad_c_n_ptr, c0_ptr, grad_c0_ptr,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    length = slice_lengths(lengths_ptr, rows, T, B)  # [B, 1]
    steps = tl.max(length)

    w_i = load_weight(weight_ptr, 0, H, BLOCK_H)  # [H, H], (unit, input): the transpose of forward's tile
    w_f = load_weight(weight_ptr, 1, H, BLOCK_H)
    w_g = load_weight(weight_ptr, 2, H, BLOCK_H)
    w_o = load_weight(weight_ptr, 3, H, BLOCK_H)
    dh = load_state(grad_h_n_ptr, rows, B, H, BLOCK_B, BLOCK_H)  # [B, H]
    dc = load_state(grad_c_n_ptr, rows, B, H, BLOCK_B, BLOCK_H)
    c0 = load_state(c0_ptr, rows, B, H, BLOCK_B, BLOCK_H)

    stride_rt = B.to(tl.int64) * (5 * H)
    p_r = reserve_ptr + row * (5 * H) + col
    p_d = grad_gates_x_ptr + row * stride_db + col
    first = steps * 0 if REVERSE else steps - 1  # against the direction of the scan
    mask = step_mask(first, length, H, BLOCK_H)
    i = load_step(p_r, first, stride_rt, mask)  # [B, H]
    f = load_step(p_r + H, first, stride_rt, mask)
    g = load_step(p_r + 2 * H, first, stride_rt, mask)
    o = load_step(p_r + 3 * H, first, stride_rt, mask)
    c = load_step(p_r + 4 * H, first, stride_rt, mask)
    if grad_output_ptr is not None:
        p_g = grad_output_ptr + row * stride_gb + col
        dy = load_step(p_g, first, stride_gt, mask)

    for s in range(steps):
        t = first + s if REVERSE else first - s
        before = t + 1 if REVERSE else t - 1  # the step that fed this one: the loop's next
        mask = step_mask(before, length, H, BLOCK_H)
        i_before = load_step(p_r, before, stride_rt, mask)
        f_before = load_step(p_r + H, before, stride_rt, mask)
        g_before = load_step(p_r + 2 * H, before, stride_rt, mask)
        o_before = load_step(p_r + 3 * H, before, stride_rt, mask)
        c_before = load_step(p_r + 4 * H, before, stride_rt, mask)
        c_prev = tl.where(mask, c_before, c0)  # a row's first step saw c0

        dh_t = dh
        if grad_output_ptr is not None:
            dh_t += dy
            dy = load_step(p_g, before, stride_gt, mask)
        tanh_c = tanh(c)
        dc_t = dc + dh_t * o * (1.0 - tanh_c * tanh_c)
        d_i = dc_t * g * i * (1.0 - i)  # [B, H], gradients before the activations
        d_f = dc_t * c_prev * f * (1.0 - f)
        d_g = dc_t * i * (1.0 - g * g)
        d_o = dh_t * tanh_c * o * (1.0 - o)
        dh_prev = product(d_i, w_i) + product(d_f, w_f) + product(d_g, w_g) + product(d_o, w_o)
        dh = tl.where(t < length, dh_prev, dh)
        dc = tl.where(t < length, dc_t * f, dc)

        mask = step_mask(t, length, H, BLOCK_H)
        store_step(p_d, t, stride_dt, d_i, mask)
        store_step(p_d + H, t, stride_dt, d_f, mask)
        store_step(p_d + 2 * H, t, stride_dt, d_g, mask)
        store_step(p_d + 3 * H, t, stride_dt, d_o, mask)
        i = i_before
        f = f_before
        g = g_before
        o = o_before
        c = c_before
    store_state(grad_h0_ptr, dh, rows, B, H, BLOCK_H)
    store_state(grad_c0_ptr, dc, rows, B, H, BLOCK_H)
