// The torch face of the CPU recurrent layer: unpacks tensors into rnn.h's parameter blocks and allocates the results.
// Schemas, fakes and gradients are defined in pyops/ops/_rnn.py.
#include "common/tensor.h"
#include "rnn/rnn.h"
#include "rnn/rnn_tensors.h"

namespace pyops::rnn {
namespace {

// The lengths as the kernels want them. Values are checked here because only here is reading them free.
const int64_t* lengths_of(const MaybeTensor& lengths, const Dims& d) {
  if (!lengths.has_value()) return nullptr;
  STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 && lengths->size(0) == d.B,
                  "lengths: expected an int64 CPU tensor of shape [", d.B, "]");
  const int64_t* values = lengths->const_data_ptr<int64_t>();
  for (int64_t b = 0; b < d.B; ++b) {
    STD_TORCH_CHECK(values[b] >= 0 && values[b] <= d.T, "lengths: expected values in 0..", d.T, ", got ", values[b], " at position ", b);
  }
  return values;
}

ScalarType compute_type(const Tensor& input) { return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(int64_t cell_id, const Tensor& input_, const MaybeTensor& h0_, const MaybeTensor& c0_,
                                                   const Tensor& weight_ih_, const Tensor& weight_hh_, const MaybeTensor& bias_ih_,
                                                   const MaybeTensor& bias_hh_, const MaybeTensor& lengths_, bool batch_first, bool reverse,
                                                   bool save) {
  const Cell cell = cell_of(cell_id);
  const Dims d = dims_of(input_, weight_hh_, batch_first);
  const int64_t GH = gates(cell) * d.H;
  check_tensor("weight_ih", weight_ih_, input_, {GH, d.I});
  check_tensor("weight_hh", weight_hh_, input_, {GH, d.H});
  check_tensor("bias_ih", bias_ih_, input_, {GH});
  check_tensor("bias_hh", bias_hh_, input_, {GH});
  check_tensor("h0", h0_, input_, {d.B, d.H});
  check_tensor("c0", c0_, input_, {d.B, d.H});

  const Tensor input = with_contiguous_rows(input_), weight_ih = as_contiguous(weight_ih_), weight_hh = as_contiguous(weight_hh_);
  const MaybeTensor h0 = as_contiguous(h0_), c0 = as_contiguous(c0_), bias_ih = as_contiguous(bias_ih_), bias_hh = as_contiguous(bias_hh_);
  const MaybeTensor lengths = as_contiguous(lengths_);
  const bool lstm = cell == Cell::lstm;
  Tensor output = empty_rows(input, d, d.H);
  Tensor h_n = empty(input, {d.B, d.H}, input.scalar_type());
  Tensor c_n = lstm ? empty(input, {d.B, d.H}, input.scalar_type()) : empty(input, {0}, input.scalar_type());
  Tensor reserve =
      save && saved(cell) ? empty(input, {d.T, d.B, saved(cell), d.H}, compute_type(input)) : empty(input, {0}, compute_type(input));

  LayerForward p{};
  p.cell = cell;
  p.dtype = dtype_of(input);
  p.T = d.T, p.B = d.B, p.I = d.I, p.H = d.H;
  p.reverse = reverse;
  p.lengths = lengths_of(lengths, d);
  p.input = rows(input, d);
  p.h0 = data(h0), p.c0 = data(c0);
  p.weight_ih = weight_ih.const_data_ptr(), p.weight_hh = weight_hh.const_data_ptr();
  p.bias_ih = data(bias_ih), p.bias_hh = data(bias_hh);
  p.output = rows(output, d);
  p.h_n = h_n.mutable_data_ptr();
  p.c_n = lstm ? c_n.mutable_data_ptr() : nullptr;
  p.reserve = save && saved(cell) ? reserve.mutable_data_ptr() : nullptr;
  layer_forward(p);
  return {output, h_n, c_n, reserve};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_fwd(int64_t cell, Tensor input, MaybeTensor h0, MaybeTensor c0, Tensor weight_ih,
                                                   Tensor weight_hh, MaybeTensor bias_ih, MaybeTensor bias_hh, MaybeTensor lengths,
                                                   bool batch_first, bool reverse) {
  return forward(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse, true);
}

std::tuple<Tensor, Tensor, Tensor> rnn_infer(int64_t cell, Tensor input, MaybeTensor h0, MaybeTensor c0, Tensor weight_ih, Tensor weight_hh,
                                             MaybeTensor bias_ih, MaybeTensor bias_hh, MaybeTensor lengths, bool batch_first,
                                             bool reverse) {
  auto [output, h_n, c_n, reserve] =
      forward(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse, false);
  return {output, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_bwd(int64_t cell_id, MaybeTensor grad_output_, MaybeTensor grad_h_n_,
                                                                           MaybeTensor grad_c_n_, Tensor input_, MaybeTensor h0_,
                                                                           MaybeTensor c0_, Tensor weight_ih_, Tensor weight_hh_,
                                                                           Tensor output_, Tensor reserve_, MaybeTensor lengths_,
                                                                           bool has_bias, bool batch_first, bool reverse, bool needs_input,
                                                                           bool needs_weights) {
  const Cell cell = cell_of(cell_id);
  const Dims d = dims_of(input_, weight_hh_, batch_first);
  const int64_t GH = gates(cell) * d.H, T = d.T, B = d.B;
  check_tensor("weight_ih", weight_ih_, input_, {GH, d.I});
  check_tensor("weight_hh", weight_hh_, input_, {GH, d.H});
  check_tensor("h0", h0_, input_, {B, d.H});
  check_tensor("c0", c0_, input_, {B, d.H});
  check_tensor("grad_h_n", grad_h_n_, input_, {B, d.H});
  check_tensor("grad_c_n", grad_c_n_, input_, {B, d.H});
  for (const MaybeTensor& like_output : {grad_output_, MaybeTensor(output_)}) {
    if (d.step) check_tensor("output", like_output, input_, {B, d.H});
    else if (batch_first) check_tensor("output", like_output, input_, {B, T, d.H});
    else check_tensor("output", like_output, input_, {T, B, d.H});
  }
  const Tensor reserve = as_contiguous(reserve_);
  STD_TORCH_CHECK(reserve.numel() == T * B * saved(cell) * d.H && reserve.scalar_type() == compute_type(input_),
                  "reserve: not from rnn_fwd");

  const Tensor input = with_contiguous_rows(input_), output = with_contiguous_rows(output_);
  const Tensor weight_ih = as_contiguous(weight_ih_), weight_hh = as_contiguous(weight_hh_);
  const MaybeTensor h0 = as_contiguous(h0_), c0 = as_contiguous(c0_), grad_h_n = as_contiguous(grad_h_n_),
                    grad_c_n = as_contiguous(grad_c_n_);
  const MaybeTensor grad_output = grad_output_.has_value() ? MaybeTensor(with_contiguous_rows(*grad_output_)) : grad_output_;
  const MaybeTensor lengths = as_contiguous(lengths_);

  const ScalarType dtype = input.scalar_type();
  const auto nothing = [&] { return empty(input, {0}, dtype); };
  const bool biases = has_bias && needs_weights, two_biases = biases && gates(cell) == 3;
  Tensor grad_input = needs_input ? empty_rows(input, d, d.I) : nothing();
  Tensor grad_h0 = h0.has_value() ? empty(input, {B, d.H}, dtype) : nothing();
  Tensor grad_c0 = c0.has_value() ? empty(input, {B, d.H}, dtype) : nothing();
  Tensor grad_weight_ih = needs_weights ? empty(input, {GH, d.I}, dtype) : nothing();
  Tensor grad_weight_hh = needs_weights ? empty(input, {GH, d.H}, dtype) : nothing();
  Tensor grad_bias_ih = biases ? empty(input, {GH}, dtype) : nothing();
  Tensor grad_bias_hh = two_biases ? empty(input, {GH}, dtype) : nothing();  // elsewhere equal to grad_bias_ih

  LayerBackward p{};
  p.cell = cell;
  p.dtype = dtype_of(input);
  p.T = T, p.B = B, p.I = d.I, p.H = d.H;
  p.reverse = reverse;
  p.lengths = lengths_of(lengths, d);
  p.grad_output = grad_output.has_value() ? rows(*grad_output, d) : Rows{nullptr, 0, 0};
  p.grad_h_n = data(grad_h_n), p.grad_c_n = data(grad_c_n);
  p.input = rows(input, d), p.output = rows(output, d);
  p.h0 = data(h0), p.c0 = data(c0);
  p.weight_ih = weight_ih.const_data_ptr(), p.weight_hh = weight_hh.const_data_ptr();
  p.reserve = reserve.const_data_ptr();
  p.grad_input = needs_input ? rows(grad_input, d) : Rows{nullptr, 0, 0};
  p.grad_h0 = h0.has_value() ? grad_h0.mutable_data_ptr() : nullptr;
  p.grad_c0 = c0.has_value() ? grad_c0.mutable_data_ptr() : nullptr;
  p.grad_weight_ih = needs_weights ? grad_weight_ih.mutable_data_ptr() : nullptr;
  p.grad_weight_hh = needs_weights ? grad_weight_hh.mutable_data_ptr() : nullptr;
  p.grad_bias_ih = biases ? grad_bias_ih.mutable_data_ptr() : nullptr;
  p.grad_bias_hh = two_biases ? grad_bias_hh.mutable_data_ptr() : nullptr;
  layer_backward(p);
  return {grad_input, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh};
}

}  // namespace
}  // namespace pyops::rnn

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("rnn_fwd", TORCH_BOX(&pyops::rnn::rnn_fwd));
  m.impl("rnn_infer", TORCH_BOX(&pyops::rnn::rnn_infer));
  m.impl("rnn_bwd", TORCH_BOX(&pyops::rnn::rnn_bwd));
}
