// The torch face of the CUDA recurrence: unpacks tensors into rnn.h's scan blocks and allocates results and workspace.
// The dense GEMMs around it, and the whole layer's ops, are composed in pyops/ops/_rnn_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "common/tensor.h"
#include "rnn/rnn.h"
#include "rnn/rnn_tensors.h"
#include "rnn/scan.cuh"

namespace pyops::rnn {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_scan_fwd(int64_t cell_id, Tensor gates_x_, MaybeTensor h0_, MaybeTensor c0_,
                                                        Tensor weight_hh_, MaybeTensor bias_hh_, MaybeTensor lengths_, bool batch_first,
                                                        bool reverse, bool save) {
  const Cell cell = cell_of(cell_id);
  const Dims d = dims_of(gates_x_, weight_hh_, batch_first);
  const int64_t GH = gates(cell) * d.H;
  STD_TORCH_CHECK(d.I == GH, "gates_x: expected [.., .., ", GH, "]");
  check_tensor("weight_hh", weight_hh_, gates_x_, {GH, d.H});
  check_tensor("bias_hh", bias_hh_, gates_x_, {GH});
  check_tensor("h0", h0_, gates_x_, {d.B, d.H});
  check_tensor("c0", c0_, gates_x_, {d.B, d.H});
  const Tensor gates_x = with_contiguous_rows(gates_x_), weight_hh = as_contiguous(weight_hh_);
  const MaybeTensor h0 = as_contiguous(h0_), c0 = as_contiguous(c0_), bias_hh = as_contiguous(bias_hh_);
  const MaybeTensor lengths = as_contiguous(lengths_);
  const bool lstm = cell == Cell::lstm, keeps = save && saved(cell);
  const ScalarType dtype = gates_x.scalar_type();
  const DeviceGuard guard(gates_x.get_device_index());

  Tensor output = empty_rows(gates_x, d, d.H);
  Tensor h_n = empty(gates_x, {d.B, d.H}, dtype);
  Tensor c_n = lstm ? empty(gates_x, {d.B, d.H}, dtype) : empty(gates_x, {0}, dtype);
  Tensor reserve = keeps ? empty(gates_x, {d.T, d.B, saved(cell), d.H}, ScalarType::Float) : empty(gates_x, {0}, ScalarType::Float);
  if (d.B == 0) return {output, h_n, c_n, reserve};
  if (d.T == 0) {
    start_state(h_n, h0);
    if (lstm) start_state(c_n, c0);
    return {output, h_n, c_n, reserve};
  }
  ScanForward p{};
  p.cell = cell;
  p.dtype = dtype_of(gates_x);
  p.T = static_cast<int32_t>(d.T), p.B = static_cast<int32_t>(d.B), p.H = static_cast<int32_t>(d.H);
  p.reverse = reverse;
  p.lengths = device_lengths(lengths, gates_x, d);
  p.gates_x = rows(gates_x, d);
  p.h0 = data(h0), p.c0 = data(c0);
  p.weight_hh = weight_hh.const_data_ptr(), p.bias_hh = data(bias_hh);
  p.output = rows(output, d);
  p.h_n = h_n.mutable_data_ptr(), p.c_n = lstm ? c_n.mutable_data_ptr() : nullptr;
  p.reserve = keeps ? reserve.mutable_data_ptr<float>() : nullptr;
  const Tensor workspace = scratch(gates_x, scan_workspace(cell, p.dtype, d.T, d.B, d.H, false));
  p.workspace = workspace.mutable_data_ptr();
  scan_forward(p, static_cast<cudaStream_t>(current_cuda_stream(gates_x)));
  return {output, h_n, c_n, reserve};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_scan_bwd(int64_t cell_id, MaybeTensor grad_output_, MaybeTensor grad_h_n_,
                                                        MaybeTensor grad_c_n_, Tensor output_, MaybeTensor h0_, MaybeTensor c0_,
                                                        Tensor weight_hh_, Tensor reserve_, MaybeTensor lengths_, bool batch_first,
                                                        bool reverse) {
  const Cell cell = cell_of(cell_id);
  const Dims d = dims_of(output_, weight_hh_, batch_first);
  const int64_t GH = gates(cell) * d.H;
  check_tensor("weight_hh", weight_hh_, output_, {GH, d.H});
  check_tensor("h0", h0_, output_, {d.B, d.H});
  check_tensor("c0", c0_, output_, {d.B, d.H});
  check_tensor("grad_h_n", grad_h_n_, output_, {d.B, d.H});
  check_tensor("grad_c_n", grad_c_n_, output_, {d.B, d.H});
  check_tensor("grad_output", grad_output_, output_, {output_.size(0), output_.size(1), d.H});
  const Tensor reserve = as_contiguous(reserve_), output = with_contiguous_rows(output_), weight_hh = as_contiguous(weight_hh_);
  STD_TORCH_CHECK(reserve.numel() == d.T * d.B * saved(cell) * d.H && reserve.scalar_type() == ScalarType::Float,
                  "reserve: not from rnn_scan_fwd");
  const MaybeTensor h0 = as_contiguous(h0_), c0 = as_contiguous(c0_), grad_h_n = as_contiguous(grad_h_n_);
  const MaybeTensor grad_c_n = as_contiguous(grad_c_n_), lengths = as_contiguous(lengths_);
  const MaybeTensor grad_output = grad_output_.has_value() ? MaybeTensor(with_contiguous_rows(*grad_output_)) : grad_output_;
  const bool lstm = cell == Cell::lstm;
  const ScalarType dtype = output.scalar_type();
  const DeviceGuard guard(output.get_device_index());

  Tensor grad_gates_x = empty_rows(output, d, GH);
  Tensor grad_gates_h = cell == Cell::gru ? empty(output, {d.T, d.B, d.H}, dtype) : empty(output, {0}, dtype);
  Tensor grad_h0 = empty(output, {d.B, d.H}, dtype);
  Tensor grad_c0 = lstm ? empty(output, {d.B, d.H}, dtype) : empty(output, {0}, dtype);
  if (d.B == 0) return {grad_gates_x, grad_gates_h, grad_h0, grad_c0};
  if (d.T == 0) {
    start_state(grad_h0, grad_h_n);
    if (lstm) start_state(grad_c0, grad_c_n);
    return {grad_gates_x, grad_gates_h, grad_h0, grad_c0};
  }
  ScanBackward p{};
  p.cell = cell;
  p.dtype = dtype_of(output);
  p.T = static_cast<int32_t>(d.T), p.B = static_cast<int32_t>(d.B), p.H = static_cast<int32_t>(d.H);
  p.reverse = reverse;
  p.lengths = device_lengths(lengths, output, d);
  p.grad_output = grad_output.has_value() ? rows(*grad_output, d) : Rows{nullptr, 0, 0};
  p.grad_h_n = data(grad_h_n), p.grad_c_n = data(grad_c_n);
  p.output = rows(output, d);
  p.h0 = data(h0), p.c0 = data(c0);
  p.weight_hh = weight_hh.const_data_ptr();
  p.reserve = saved(cell) ? reserve.const_data_ptr<float>() : nullptr;
  p.grad_gates_x = rows(grad_gates_x, d);
  p.grad_gates_h = cell == Cell::gru ? grad_gates_h.mutable_data_ptr() : nullptr;
  p.grad_h0 = grad_h0.mutable_data_ptr(), p.grad_c0 = lstm ? grad_c0.mutable_data_ptr() : nullptr;
  const Tensor workspace = scratch(output, scan_workspace(cell, p.dtype, d.T, d.B, d.H, true));
  p.workspace = workspace.mutable_data_ptr();
  scan_backward(p, static_cast<cudaStream_t>(current_cuda_stream(output)));
  return {grad_gates_x, grad_gates_h, grad_h0, grad_c0};
}

}  // namespace
}  // namespace pyops::rnn

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) {
  m.impl("rnn_scan_fwd", TORCH_BOX(&pyops::rnn::rnn_scan_fwd));
  m.impl("rnn_scan_bwd", TORCH_BOX(&pyops::rnn::rnn_scan_bwd));
}
#endif  // PYOPS_CUDA
