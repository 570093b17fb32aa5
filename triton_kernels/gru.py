"""GRU recurrence, the whole sequence in one launch; both conventions of the reset gate.

    r, z = sigmoid(x W_ih^T + b_ih + h W_hh^T + b_hh)    h' = n + z*(h - n)
    reset after:   n = tanh(x W_in^T + b_in + r*(h W_hn^T + b_hn))
    reset before:  n = tanh(x W_in^T + b_in + (r*h) W_hn^T + b_hn)

The input projection gates_x [T, B, 3H] is given, blocks in the order r, z, n; output [T, B, H], either batch-first by strides;
weight_hh [3H, H]; states [B, H]; reserve [T, B, 4, H] fp32 holds r, z, n and h W_hn^T + b_hn (reset before: r*h) for backward.

Tiling: one program owns BLOCK_B rows of the batch and all of W_hh, one [H, H] tile per gate, on chip for the whole sequence; the loop
over the steps is inside, the state stays in fp32 registers, and programs never meet. Each step's loads are issued one step ahead.

Floors, forward, e bytes an element: T*B*H*(3e + e + 16 when saved) bytes of memory, 6*T*B*H*H flops; but the chain of T dependent
steps (exchange of h, the products, gates; reset before: two exchanges) binds long before either.
"""

import triton
import triton.language as tl

from .common import load_bias, load_state, load_step, load_weight, product, slice_lengths, step_mask, store_state, store_step, tanh


@triton.jit(do_not_specialize=["T", "B"])
def gru_forward_kernel(
    gates_x_ptr, h0_ptr, weight_ptr, bias_ptr, lengths_ptr, output_ptr, h_n_ptr, reserve_ptr,
    stride_xt, stride_xb, stride_yt, stride_yb, T, B,
    RESET_BEFORE: tl.constexpr,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    length = slice_lengths(lengths_ptr, rows, T, B)  # [B, 1]
    steps = tl.max(length)  # a slice stops at its longest row

    w_r = tl.trans(load_weight(weight_ptr, 0, H, BLOCK_H))  # [H, H], (input, unit)
    w_z = tl.trans(load_weight(weight_ptr, 1, H, BLOCK_H))
    w_n = tl.trans(load_weight(weight_ptr, 2, H, BLOCK_H))
    b_r = load_bias(bias_ptr, 0, H, BLOCK_H)  # [1, H]
    b_z = load_bias(bias_ptr, 1, H, BLOCK_H)
    b_n = load_bias(bias_ptr, 2, H, BLOCK_H)
    h = load_state(h0_ptr, rows, B, H, BLOCK_B, BLOCK_H)  # [B, H]

    p_x = gates_x_ptr + row * stride_xb + col
    p_y = output_ptr + row * stride_yb + col
    first = steps - 1 if REVERSE else steps * 0
    mask = step_mask(first, length, H, BLOCK_H)
    x_r = load_step(p_x, first, stride_xt, mask)  # [B, H]
    x_z = load_step(p_x + H, first, stride_xt, mask)
    x_n = load_step(p_x + 2 * H, first, stride_xt, mask)

    for s in range(steps):
        t = first - s if REVERSE else first + s
        a_r = x_r + b_r
        a_z = x_z + b_z
        a_n = x_n.to(tl.float32)
        ahead = t - 1 if REVERSE else t + 1
        mask = step_mask(ahead, length, H, BLOCK_H)
        x_r = load_step(p_x, ahead, stride_xt, mask)
        x_z = load_step(p_x + H, ahead, stride_xt, mask)
        x_n = load_step(p_x + 2 * H, ahead, stride_xt, mask)

        r = tl.sigmoid(a_r + product(h, w_r))  # [B, H]
        z = tl.sigmoid(a_z + product(h, w_z))
        if RESET_BEFORE:
            kept = r * h
            n = tanh(a_n + b_n + product(kept, w_n))
        else:
            kept = product(h, w_n) + b_n
            n = tanh(a_n + r * kept)
        h = tl.where(t < length, n + z * (h - n), h)

        mask = step_mask(t, length, H, BLOCK_H)
        store_step(p_y, t, stride_yt, h, mask)
        if reserve_ptr is not None:
            stride_rt = B.to(tl.int64) * (4 * H)
            p_r = reserve_ptr + row * (4 * H) + col
            store_step(p_r, t, stride_rt, r, mask)
            store_step(p_r + H, t, stride_rt, z, mask)
            store_step(p_r + 2 * H, t, stride_rt, n, mask)
            store_step(p_r + 3 * H, t, stride_rt, kept, mask)
    store_state(h_n_ptr, h, rows, B, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "B"])
def gru_backward_kernel(
    grad_output_ptr, grad_h_n_ptr, weight_ptr, lengths_ptr, reserve_ptr, grad_gates_x_ptr, grad_h0_ptr,
    stride_gt, stride_gb, stride_dt, stride_db, T, B,
    output_ptr, h0_ptr, grad_gates_h_ptr, stride_yt, stride_yb, RESET_BEFORE: tl.constexpr,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    length = slice_lengths(lengths_ptr, rows, T, B)  # [B, 1]
    steps = tl.max(length)

    w_r = load_weight(weight_ptr, 0, H, BLOCK_H)  # [H, H], (unit, input): the transpose of forward's tile
    w_z = load_weight(weight_ptr, 1, H, BLOCK_H)
    w_n = load_weight(weight_ptr, 2, H, BLOCK_H)
    dh = load_state(grad_h_n_ptr, rows, B, H, BLOCK_B, BLOCK_H)  # [B, H]
    h0 = load_state(h0_ptr, rows, B, H, BLOCK_B, BLOCK_H)

    stride_rt = B.to(tl.int64) * (4 * H)
    p_r = reserve_ptr + row * (4 * H) + col
    p_y = output_ptr + row * stride_yb + col
    p_d = grad_gates_x_ptr + row * stride_db + col
    first = steps * 0 if REVERSE else steps - 1  # against the direction of the scan
    mask = step_mask(first, length, H, BLOCK_H)
    r = load_step(p_r, first, stride_rt, mask)  # [B, H]
    z = load_step(p_r + H, first, stride_rt, mask)
    n = load_step(p_r + 2 * H, first, stride_rt, mask)
    kept = load_step(p_r + 3 * H, first, stride_rt, mask)
    if grad_output_ptr is not None:
        p_g = grad_output_ptr + row * stride_gb + col
        dy = load_step(p_g, first, stride_gt, mask)

    for s in range(steps):
        t = first + s if REVERSE else first - s
        before = t + 1 if REVERSE else t - 1  # the step that fed this one: the loop's next
        mask = step_mask(before, length, H, BLOCK_H)
        h_prev = tl.where(mask, load_step(p_y, before, stride_yt, mask).to(tl.float32), h0)  # a row's first step saw h0
        r_before = load_step(p_r, before, stride_rt, mask)
        z_before = load_step(p_r + H, before, stride_rt, mask)
        n_before = load_step(p_r + 2 * H, before, stride_rt, mask)
        kept_before = load_step(p_r + 3 * H, before, stride_rt, mask)

        dh_t = dh
        if grad_output_ptr is not None:
            dh_t += dy
            dy = load_step(p_g, before, stride_gt, mask)
        d_n = dh_t * (1.0 - z) * (1.0 - n * n)  # [B, H], gradients before the activations
        d_z = dh_t * (h_prev - n) * z * (1.0 - z)
        if RESET_BEFORE:
            d_rh = product(d_n, w_n)  # gradient of r*h
            d_r = d_rh * h_prev * r * (1.0 - r)
            dh_prev = dh_t * z + d_rh * r + product(d_r, w_r) + product(d_z, w_z)
        else:
            d_hn = d_n * r  # gradient of h W_hn^T + b_hn
            d_r = d_n * kept * r * (1.0 - r)
            dh_prev = dh_t * z + product(d_r, w_r) + product(d_z, w_z) + product(d_hn, w_n)
        dh = tl.where(t < length, dh_prev, dh)

        mask = step_mask(t, length, H, BLOCK_H)
        store_step(p_d, t, stride_dt, d_r, mask)
        store_step(p_d + H, t, stride_dt, d_z, mask)
        store_step(p_d + 2 * H, t, stride_dt, d_n, mask)
        if not RESET_BEFORE:
            store_step(grad_gates_h_ptr + row * H + col, t, B.to(tl.int64) * H, d_hn, mask)
        r = r_before
        z = z_before
        n = n_before
        kept = kept_before
    store_state(grad_h0_ptr, dh, rows, B, H, BLOCK_H)
