"""Inverted-residual blocks: torchvision's structure, parameter names and results, pyops' kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops import _backends, _library
from pyops.nn import _training
from pyops.nn._derived import Keeps, has_hooks, is_plain, kind_of
from pyops.nn.chain import Chained, ConvChain
from pyops.nn.conv import KINDS, ConvBNAct, DropPath, Folded, SqueezeExcitation, can_fold
from pyops.ops import _activations, _conv_call, _expand_depthwise_ops, _mbconv_ops, _pointwise_ops  # noqa: F401  (registers the ops)

PARTS = (*KINDS, ConvChain, SqueezeExcitation, nn.Sequential, nn.AdaptiveAvgPool2d, nn.Identity)


def finish_block(block: MBConv | FusedMBConv, kernels, pending: _training.Pending, input: Tensor) -> Tensor:
    """Batch norm, drop path and residual of a block's last convolution, in one pass."""
    if not block.use_res_connect:
        return _training.finish(kernels, pending)
    keep = block.stochastic_depth.draw(input)
    keep = None if keep is None else keep.flatten().float()
    if input.dtype != pending.image.dtype:  # autocast: torch's sum of the two takes the wider dtype
        return _training.finish(kernels, pending, keep) + input
    return _training.finish(kernels, pending, keep, input)


def is_standard(module: MBConv | FusedMBConv, kinds: tuple[type, ...]) -> bool:
    """Whether kernels can stand for the layers: of these kinds in this order, nothing in them replaced by what kernels do not know, no
    hooks inside, the last convolution without an activation."""
    block: Any = module.block
    if drops_otherwise(module) or has_hooks(block) or tuple(kind_of(part) for part in block) != kinds or not is_plain(block, PARTS):
        return False
    known = all(part.is_standard() if isinstance(part, SqueezeExcitation) else part.activation is not None for part in block)
    return known and block[-1].activation == "none"


def drops_otherwise(module: MBConv | FusedMBConv) -> bool:
    """Whether the drop path is another's, or has hooks."""
    return kind_of(module.stochastic_depth) is not DropPath or has_hooks(module.stochastic_depth)


def drops(module: MBConv | FusedMBConv) -> bool:
    """Whether the branch may be dropped, or who knows what: in training, or where that part alone is in training."""
    return drops_otherwise(module) or (module.use_res_connect and module.stochastic_depth.training and module.stochastic_depth.p > 0)


def check_sizes(op: str, kernel_size: int, stride: int, expand_ratio: int) -> None:
    if kernel_size % 2 == 0 or kernel_size < 1:
        raise ValueError(f"{op}: kernel_size: expected an odd size, got {kernel_size}")
    if stride < 1 or expand_ratio < 1:
        raise ValueError(f"{op}: stride, expand_ratio: expected 1 or more, got {stride} and {expand_ratio}")


def _fits(conv: nn.Conv2d, parts: list[Any]) -> bool:
    """Whether the convolutions are such as MBConv builds: one depthwise, square and padded to keep the size, the others 1x1."""
    K, S = conv.kernel_size[0], conv.stride[0]
    square = conv.kernel_size == (K, K) and conv.stride == (S, S) and conv.padding == (K // 2, K // 2) and conv.dilation == (1, 1)
    others = [part[0] for part in parts if part[0] is not conv]
    return square and _training.is_depthwise(conv) and all(_training.is_pointwise(other) for other in others)


class MBConv(Keeps, nn.Module):
    """An inverted-residual block: expand 1x1, depthwise, squeeze-excitation, project 1x1 (+ input): torchvision's names and results.

    ``[N, in_channels, H, W] -> [N, out_channels, OH, OW]``. ``expand_ratio=1`` has no expansion; ``squeeze_channels=None`` takes
    ``in_channels // 4`` (at least 1), 0 leaves squeeze-excitation out. The input is added where stride is 1 and channels agree, after
    ``DropPath(drop_path)`` of the branch. In eval mode without gradients on a CPU the block is one kernel on weights that are folded and
    packed once; in training the convolutions' outputs are all that is saved.

    Source: Sandler et al., 2018 (MobileNetV2); Tan and Le, 2019 (EfficientNet). Raises ValueError for sizes that make no block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: int = 6,
        squeeze_channels: int | None = None,
        activation: str = "silu",
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str | None = None,
    ):
        super().__init__()
        check_sizes("MBConv", kernel_size, stride, expand_ratio)
        expanded = in_channels * expand_ratio
        squeezed = max(1, in_channels // 4) if squeeze_channels is None else squeeze_channels
        norm: dict[str, Any] = dict(eps=eps, momentum=momentum, backend=backend)
        layers: list[nn.Module] = []
        if expand_ratio > 1:
            layers.append(ConvBNAct(in_channels, expanded, 1, activation=activation, **norm))
        layers.append(ConvBNAct(expanded, expanded, kernel_size, stride, groups=expanded, activation=activation, **norm))
        if squeezed:
            layers.append(SqueezeExcitation(expanded, squeezed, activation))
        layers.append(ConvBNAct(expanded, out_channels, 1, activation=None, **norm))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = DropPath(drop_path)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.expands = expand_ratio > 1
        self.kinds = tuple(type(layer) for layer in layers)
        self.out_channels, self.backend = out_channels, backend

    def forward(self, input: Tensor) -> Tensor:
        if (self.backend is None and _conv_call.is_plain_inference(input)) or self._wishes_kernel(input):
            kernel = self._kept.get(self, self._pack)
            if kernel is not None and kernel[0] == input.dtype:  # made for standard layers, and they have not changed
                return self._infer(input, *kernel[1:])
        if not is_standard(self, self.kinds):
            output = self.block(input)
            return self.stochastic_depth(output) + input if self.use_res_connect else output
        parts: list[Any] = [part for part in self.block if isinstance(part, ConvBNAct)]
        first = parts[0]
        folded = parts[-1].folded() if can_fold(first[0].weight, input) and not drops(self) else None
        if folded is not None:
            return self._run_folded(input, folded)
        if first.can_train(input) and all(part[0].bias is None for part in parts):
            kernels = _training.kernels_for(self.backend, input)
            if kernels is not None:
                return _conv_call.in_layout_of(self._train(kernels, input), input)
        output = self.block(input)
        return self.stochastic_depth(output) + input if self.use_res_connect else output

    def _wishes_kernel(self, input: Tensor) -> bool:
        """Whether a call is inference on a CPU, with a backend by name that the kernel obeys."""
        follows = torch.is_grad_enabled() or torch.compiler.is_compiling() or _conv_call.is_recorded()
        plain = input.is_cpu and not follows and not _conv_call.is_autocast("cpu")
        return plain and _backends.requested(self.backend) in ("auto", "cpu")

    def _run_folded(self, input: Tensor, folded: Folded) -> Tensor:
        """Inference, a kernel a convolution, or one for the first two: the last takes the gates on its way in and adds the residual on
        its way out."""
        expand, depthwise, squeeze, project = self._parts()
        fused = self._expand_depthwise(input, expand, depthwise, squeeze is not None)
        output, means = depthwise.run(input if expand is None else expand(input), means=squeeze is not None) if fused is None else fused
        gate = None if squeeze is None else squeeze.gate_of(means)
        output = project.run_dense(output, folded, gate, input if self.use_res_connect else None)
        return output if fused is None else _conv_call.in_layout_of(output, input)

    def _expand_depthwise(self, input: Tensor, expand, depthwise, means: bool) -> tuple[Tensor, Tensor] | None:
        """Output and means of the first two convolutions by the CUDA kernel that keeps the expanded image on the chip; None where that
        is not what runs the block, or does not serve it."""
        if expand is None or expand.activation != depthwise.activation or not _fits(depthwise[0], [expand, depthwise]):
            return None
        if input.dim() != 4 or input.shape[1] != expand[0].in_channels or _conv_call.choose("MBConv", self.backend, input) != "cuda":
            return None
        tf32 = _pointwise_ops.tf32_allowed(input)
        kernel, stride = depthwise[0].kernel_size[0], depthwise[0].stride[0]
        if _expand_depthwise_ops.unsuited(input.dtype, tuple(input.shape), kernel, stride, tf32) is not None:
            return None
        first, second = expand.folded(), depthwise.folded()
        if first is None or second is None:
            return None
        activation = _activations.NAMES.index(depthwise.activation)
        (weight, bias), options = first[:2], (stride, activation, 0.01, means, tf32)
        return torch.ops.pyops.expand_depthwise.default(input, weight.flatten(1), bias, *second[:2], *options)

    def _train(self, kernels, input: Tensor) -> Tensor:
        expand, depthwise, squeeze, project = self._parts()
        (cast,) = _conv_call.autocast(input)
        pending = _training.Pending(cast)
        if expand is not None:
            pending = expand.convolve(kernels, pending)
        pending = depthwise.convolve(kernels, pending)
        pending = project.convolve(kernels, pending, None if squeeze is None else squeeze.gates())
        return finish_block(self, kernels, pending, input)

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        """(expand or None, depthwise, squeeze or None, project)"""
        layers: list[Any] = list(self.block)
        expand = layers.pop(0) if self.expands else None
        return expand, layers[0], layers[1] if len(layers) == 3 else None, layers[-1]

    def _pack(self) -> tuple[torch.dtype, int, Tensor, tuple] | None:
        """(dtype and channels of the input, packed weights, the op's other arguments), or None where the kernel cannot stand for the
        block."""
        if _library.not_loaded_reason() is not None or not is_standard(self, self.kinds) or self.stochastic_depth.training:
            return None
        expand, depthwise, squeeze, project = self._parts()
        parts = [part for part in (expand, depthwise, project) if part is not None]
        if any(part.activation != depthwise.activation for part in parts[:-1]) or not _fits(depthwise[0], parts):
            return None  # the kernel has one activation, and one way to pad
        folded: Any = [part.folded() for part in parts]
        tensors = tuple(self.block.parameters())
        dtype = tensors[0].dtype
        if dtype == torch.float64 or any(pair is None for pair in folded) or any(t.dtype != dtype or not t.is_cpu for t in tensors):
            return None
        gates = (None, None, None, None)
        if squeeze is not None:
            gates = tuple(t.float() for layer in (squeeze.fc1, squeeze.fc2) for t in (layer.weight, layer.bias))
        weights = (*((None, None) if expand is None else folded[0][:2]), *folded[-2][:2], *gates, *folded[-1][:2])
        packed = torch.ops.pyops.mbconv_pack.default(*weights, dtype == torch.bfloat16)
        first, conv, names = parts[0][0], depthwise[0], (depthwise.activation, *(("none", "none") if squeeze is None else squeeze.names))
        return dtype, first.in_channels, packed, (
            conv.out_channels, 0 if squeeze is None else squeeze.fc1.out_channels, project[0].out_channels, conv.kernel_size[0],
            conv.stride[0], *(_activations.NAMES.index(name) for name in names), expand is not None, self.use_res_connect,
        )  # fmt: skip

    def _infer(self, input: Tensor, channels: int, packed: Tensor, options: tuple) -> Tensor:
        if input.dim() != 4 or input.shape[1] != channels:
            raise ValueError(f"MBConv: input: expected [N, {channels}, H, W], got shape {tuple(input.shape)}")
        output = torch.ops.pyops.mbconv_infer.default(input, packed, *options)
        return output if input.is_contiguous(memory_format=torch.channels_last) else output.contiguous()


class _View(MBConv):
    """A block of layers that belong elsewhere: [expand,] depthwise, and the last convolution and its batch norm on their own."""

    def __init__(self, layers: list[Any], adds: bool):
        nn.Module.__init__(self)
        *wide, conv, norm = layers
        self.block = nn.Sequential(*wide, ConvChain([conv, norm], 2))
        self.stochastic_depth = DropPath()
        self.use_res_connect, self.expands = adds, len(wide) == 2
        self.kinds = tuple(kind_of(layer) for layer in self.block)
        self.out_channels, self.backend = conv.out_channels, None


VIEWED = (ConvBNAct, ConvBNAct, nn.Conv2d, nn.BatchNorm2d)


class BlockView(Chained):
    """Of modules that own an `MBConv`'s layers under other names: in one Sequential, without squeeze-excitation and drop path."""

    def run_block(self, layers: nn.Sequential, adds: bool, input: Tensor) -> Tensor:
        """``layers(input)``, with the input added where `adds`, as one block where the layers are what it knows."""
        parts = list(layers)
        kinds = tuple(kind_of(part) for part in parts)
        if torch.compiler.is_compiling() or has_hooks(layers) or kinds not in (VIEWED, VIEWED[1:]):
            return input + layers(input) if adds else layers(input)
        before, view = self._kept.get("block", ([], None))
        if before != parts:
            view = _View(parts, adds)
            self._kept["block"] = parts, view
        return view(input)


class FusedMBConv(nn.Module):
    """EfficientNet-v2's block: one full convolution for expansion and depthwise, project 1x1 (+ input): torchvision's names and results.

    ``[N, in_channels, H, W] -> [N, out_channels, OH, OW]``. ``expand_ratio=1`` is that convolution alone, to out_channels. The input is
    added where stride is 1 and channels agree, after ``DropPath(drop_path)`` of the branch.

    Source: Gupta and Akin, 2020; Tan and Le, 2021 (EfficientNetV2). Raises ValueError for sizes that make no block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: int = 4,
        activation: str = "silu",
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str | None = None,
    ):
        super().__init__()
        check_sizes("FusedMBConv", kernel_size, stride, expand_ratio)
        norm: dict[str, Any] = dict(eps=eps, momentum=momentum, backend=backend)
        middle = in_channels * expand_ratio if expand_ratio > 1 else out_channels
        layers = [ConvBNAct(in_channels, middle, kernel_size, stride, activation=activation, **norm)]
        if expand_ratio > 1:
            layers.append(ConvBNAct(middle, out_channels, 1, activation=None, **norm))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = DropPath(drop_path)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.out_channels, self.backend = out_channels, backend

    def forward(self, input: Tensor) -> Tensor:
        first: Any = self.block[0]
        last: Any = self.block[-1]
        if is_standard(self, (ConvBNAct,) * len(self.block)):
            folded = last.folded() if can_fold(first[0].weight, input) and not drops(self) else None
            if folded is not None:
                return last.run_dense(first(input), folded, residual=input if self.use_res_connect else None)
            if first.can_train(input) and last[0].bias is None:
                kernels = _training.kernels_for(self.backend, input)
                if kernels is not None:
                    (cast,) = _conv_call.autocast(input)
                    pending = last.convolve(kernels, first.convolve(kernels, _training.Pending(cast)))
                    return _conv_call.in_layout_of(finish_block(self, kernels, pending, input), input)
        output = self.block(input)
        return self.stochastic_depth(output) + input if self.use_res_connect else output
