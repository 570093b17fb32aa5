"""pyops.fuse and every layer of torch.nn: alone and behind a convolution or a linear layer, in eval mode and in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyops

from .fusing import check_fused, facts

NOT_LAYERS = {
    "Module": "abstract", "Container": "abstract", "RNNBase": "abstract", "RNNCellBase": "abstract",
    "ModuleList": "holds modules, no forward", "ModuleDict": "holds modules, no forward",
    "ParameterList": "holds parameters, no forward", "ParameterDict": "holds parameters, no forward",
    "DataParallel": "moves modules to GPUs",
    "Sequential": "every case stands in one",
}  # fmt: skip


def image(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.randn(shape),)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    random: bool = False  # draws numbers whose values depend on the dtype


X1, X2, X3, FLAT = image(2, 4, 12), image(2, 4, 8, 8), image(2, 4, 6, 6, 6), image(3, 8)
INPUTS = {"1": X1, "2": X2, "3": X3}


def each(pattern: str, dims: str, *arguments: Any, **options: Any) -> dict[str, list[Case]]:
    """Cases of the layers of one family, in so many dimensions."""
    kinds = {dim: getattr(nn, pattern.format(dim)) for dim in dims}
    return {kind.__name__: [Case(lambda kind=kind: kind(*arguments, **options), INPUTS[dim])] for dim, kind in kinds.items()}


def plain(*names: str, inputs: Callable[[], tuple] = X2) -> dict[str, list[Case]]:
    return {name: [Case(getattr(nn, name), inputs)] for name in names}


def initialised(kind: type[nn.Module], inputs: Callable[[], tuple], *arguments: Any) -> Callable[[], nn.Module]:
    """A lazy layer after its first call."""

    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = kind(*arguments)
        layer(*inputs())
        return layer

    return make


class Unpool(nn.Module):
    """What an unpooling layer reads comes from a pooling one."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = getattr(nn, f"Conv{dim}d")(4, 4, 1)
        self.pool = getattr(nn, f"MaxPool{dim}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{dim}d")(2)

    def forward(self, x):
        x, indices = self.pool(self.conv(x))
        return self.unpool(x, indices)


def packed() -> tuple:
    return (pack_padded_sequence(torch.randn(7, 3, 5), torch.tensor([7, 2, 4]), enforce_sorted=False),)


SEQUENCE, MASK = image(6, 2, 5), torch.zeros(3, 6).index_fill_(1, torch.tensor([4, 5]), 1).bool()
RNNS = {
    name: [
        Case(lambda kind=kind: kind(5, 6), SEQUENCE),
        Case(lambda kind=kind: kind(5, 6, 2, bidirectional=True, batch_first=True, bias=False), SEQUENCE),
        Case(lambda kind=kind: kind(5, 6, 2, bidirectional=True), packed),
        Case(lambda kind=kind: kind(5, 6), image(4, 5)),
    ]
    for name, kind in (("RNN", nn.RNN), ("GRU", nn.GRU), ("LSTM", nn.LSTM))
}
RNNS["LSTM"].append(Case(lambda: nn.LSTM(5, 6, 2, proj_size=3), SEQUENCE))
RNNS["RNN"].append(Case(lambda: nn.RNN(5, 6, nonlinearity="relu"), SEQUENCE))
CELLS = {name: [Case(lambda name=name: getattr(nn, name)(5, 6), image(3, 5))] for name in ("RNNCell", "GRUCell", "LSTMCell")}


def attention(inputs: Callable[[], tuple], **options: Any) -> Case:
    return Case(lambda: nn.MultiheadAttention(8, 2, **options), inputs)


def queries(*more: Any, key: int = 8, value: int = 8) -> Callable[[], tuple]:
    return lambda: (torch.randn(3, 6, 8), torch.randn(3, 6, key), torch.randn(3, 6, value), *more)


def encoder_layer(norm_first: bool = False, activation: str = "relu") -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True, norm_first=norm_first)


def decoder_layer(norm_first: bool = False) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
TOKENS = image(3, 6, 8)
PADDED = lambda: (*TOKENS(), None, MASK)  # noqa: E731
PAIRS = lambda: (*TOKENS(), *TOKENS())  # noqa: E731
TRANSFORMERS = {
    "MultiheadAttention": [
        attention(queries(), batch_first=True),
        attention(queries(None, False), batch_first=True),
        attention(queries(MASK, False), batch_first=True),
        attention(queries(None, False, CAUSAL), batch_first=True),
        attention(queries(), add_bias_kv=True, add_zero_attn=True),
        attention(queries(key=5, value=7), kdim=5, vdim=7, bias=False),
    ],
    "TransformerEncoderLayer": [
        *(Case(lambda first=first: encoder_layer(first), inputs) for first in (False, True) for inputs in (TOKENS, PADDED)),
        Case(lambda: encoder_layer(activation="gelu"), lambda: (*TOKENS(), CAUSAL)),
    ],
    "TransformerEncoder": [
        Case(lambda: nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(8)), inputs)
        for inputs in (TOKENS, PADDED, lambda: (*TOKENS(), CAUSAL))
    ],
    "TransformerDecoderLayer": [Case(lambda first=first: decoder_layer(first), PAIRS) for first in (False, True)],
    "TransformerDecoder": [Case(lambda: nn.TransformerDecoder(decoder_layer(), 2), lambda: (*PAIRS(), CAUSAL))],
    "Transformer": [Case(lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), PAIRS)],
}

CASES: dict[str, list[Case]] = {
    **each("Conv{}d", "123", 4, 6, 3, 2, 1, bias=False),
    **each("ConvTranspose{}d", "123", 4, 6, 3, 2, 1, 1),
    **each("BatchNorm{}d", "123", 4),
    **each("InstanceNorm{}d", "123", 4, affine=True, track_running_stats=True),
    **each("AvgPool{}d", "123", 2),
    **each("MaxPool{}d", "123", 3, 2, 1),
    **each("LPPool{}d", "123", 2, 2),
    **each("AdaptiveAvgPool{}d", "123", 3),
    **each("AdaptiveMaxPool{}d", "123", 3),
    **each("CircularPad{}d", "123", 1),
    **each("ConstantPad{}d", "123", 1, 0.5),
    **each("ReflectionPad{}d", "123", 2),
    **each("ReplicationPad{}d", "123", 1),
    **each("ZeroPad{}d", "123", 1),
    **each("Dropout{}d", "123", 0.3),
    **{f"FractionalMaxPool{dim}d": [Case(lambda dim=dim: getattr(nn, f"FractionalMaxPool{dim}d")(2, 3), x, True)]
       for dim, x in ((2, X2), (3, X3))},
    **{f"MaxUnpool{dim}d": [Case(lambda dim=dim: Unpool(dim), INPUTS[str(dim)])] for dim in (1, 2, 3)},
    **{f"LazyConv{dim}d": [Case(initialised(getattr(nn, f"LazyConv{dim}d"), INPUTS[str(dim)], 6, 3), INPUTS[str(dim)])]
       for dim in (1, 2, 3)},
    **{f"LazyConvTranspose{dim}d": [
        Case(initialised(getattr(nn, f"LazyConvTranspose{dim}d"), INPUTS[str(dim)], 6, 3), INPUTS[str(dim)])] for dim in (1, 2, 3)},
    **{f"Lazy{kind}{dim}d": [Case(initialised(getattr(nn, f"Lazy{kind}{dim}d"), INPUTS[str(dim)]), INPUTS[str(dim)])]
       for kind in ("BatchNorm", "InstanceNorm") for dim in (1, 2, 3)},
    "LazyLinear": [Case(initialised(nn.LazyLinear, FLAT, 5), FLAT)],
    **plain("ReLU", "ReLU6", "SiLU", "Hardswish", "GELU", "Sigmoid", "LeakyReLU", "Tanh", "Hardsigmoid", "CELU", "ELU", "Hardshrink",
            "Hardtanh", "LogSigmoid", "Mish", "PReLU", "SELU", "Softplus", "Softshrink", "Softsign", "Tanhshrink", "GLU", "Softmax2d",
            "Identity", "Flatten"),
    "RReLU": [Case(nn.RReLU, X2, True)],
    "Threshold": [Case(lambda: nn.Threshold(0.1, 0.2), X2)],
    "Softmax": [Case(lambda: nn.Softmax(1), X2)], "Softmin": [Case(lambda: nn.Softmin(1), X2)],
    "LogSoftmax": [Case(lambda: nn.LogSoftmax(1), X2)],
    "Dropout": [Case(nn.Dropout, FLAT)], "AlphaDropout": [Case(nn.AlphaDropout, FLAT)],
    "FeatureAlphaDropout": [Case(nn.FeatureAlphaDropout, X2)],
    "GroupNorm": [Case(lambda: nn.GroupNorm(2, 4), X2)], "LayerNorm": [Case(lambda: nn.LayerNorm(8), X2)],
    "RMSNorm": [Case(lambda: nn.RMSNorm(8), X2)],
    "SyncBatchNorm": [Case(lambda: nn.SyncBatchNorm(4), X2)],
    "LocalResponseNorm": [Case(lambda: nn.LocalResponseNorm(3, 0.1), X2), Case(lambda: nn.LocalResponseNorm(2), X1)],
    "CrossMapLRN2d": [Case(lambda: nn.CrossMapLRN2d(3), X2)],
    "Linear": [Case(lambda: nn.Linear(8, 5), X2), Case(lambda: nn.Linear(8, 5, bias=False), FLAT)],
    "Bilinear": [Case(lambda: nn.Bilinear(4, 5, 6), lambda: (torch.randn(3, 4), torch.randn(3, 5)))],
    "Embedding": [Case(lambda: nn.Embedding(9, 4, padding_idx=1), lambda: (torch.randint(9, (3, 5)),))],
    "EmbeddingBag": [Case(lambda: nn.EmbeddingBag(9, 4, mode="sum"), lambda: (torch.randint(9, (3, 5)),))],
    "PixelShuffle": [Case(lambda: nn.PixelShuffle(2), X2)], "PixelUnshuffle": [Case(lambda: nn.PixelUnshuffle(2), X2)],
    "ChannelShuffle": [Case(lambda: nn.ChannelShuffle(2), X2)],
    "Upsample": [Case(lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode), X2) for mode in ("nearest", "bilinear", "bicubic")],
    "UpsamplingNearest2d": [Case(lambda: nn.UpsamplingNearest2d(scale_factor=2), X2)],
    "UpsamplingBilinear2d": [Case(lambda: nn.UpsamplingBilinear2d(scale_factor=2), X2)],
    "Unflatten": [Case(lambda: nn.Unflatten(1, (2, 2)), X2)],
    "Fold": [Case(lambda: nn.Fold((5, 4), 2), image(2, 4, 12))], "Unfold": [Case(lambda: nn.Unfold(3, padding=1), X2)],
    "CosineSimilarity": [Case(nn.CosineSimilarity, lambda: (torch.randn(3, 5), torch.randn(3, 5)))],
    "PairwiseDistance": [Case(nn.PairwiseDistance, lambda: (torch.randn(3, 5), torch.randn(3, 5)))],
    "AdaptiveLogSoftmaxWithLoss": [
        Case(lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], 2.0), lambda: (torch.randn(6, 8), torch.randint(20, (6,))))],
    **RNNS, **CELLS, **TRANSFORMERS,
}  # fmt: skip

ALL = [pytest.param(case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]
TRAIN = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


def alone(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make()


def test_every_layer_is_here():
    public = {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    losses = {name for name in public if "Loss" in name and name != "AdaptiveLogSoftmaxWithLoss"}
    assert public - losses - set(NOT_LAYERS) == set(CASES)


@TRAIN
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which torch.nn.TransformerEncoder makes of padded ones
@pytest.mark.parametrize("case", ALL)
def test_alone(case, train):
    check_fused(alone(case), case.inputs, train, case.random)


def conv_before(x: torch.Tensor) -> nn.Module:
    return getattr(nn, f"Conv{x.dim() - 2}d")(4, 4, 3, padding=1)


def behind_conv() -> list:
    found = []
    for name, cases in CASES.items():
        for i, case in enumerate(cases):
            inputs = case.inputs()
            x = inputs[0]
            if len(inputs) == 1 and isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 2 and x.shape[1] == 4:
                found.append(pytest.param(case, id=f"{name}-{i}"))
    return found


BEHIND_LINEAR = {
    name: nn.__dict__[name]
    for name in CASES
    if nn.__dict__[name].__module__ in ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear")
    and not {"MultiheadAttention", "Bilinear", "LazyLinear", "Softmax2d", "Dropout2d", "Dropout3d", "RReLU"} & {name}
}


@TRAIN
@pytest.mark.parametrize("case", behind_conv())
def test_behind_a_convolution(case, train):
    first, layer = conv_before(case.inputs()[0]), alone(case)
    fused = check_fused(nn.Sequential(first, layer), case.inputs, train, case.random)
    assert fused or not isinstance(first, nn.Conv2d)


@TRAIN
@pytest.mark.parametrize("name", BEHIND_LINEAR)
def test_behind_a_linear_layer(name, train):
    options = {"Threshold": (0.1, 0.2), "Linear": (4, 3), "Softmax": (1,), "Softmin": (1,), "LogSoftmax": (1,)}
    torch.manual_seed(0)
    check_fused(nn.Sequential(nn.Linear(8, 4), BEHIND_LINEAR[name](*options.get(name, ()))), FLAT, train)


def test_dropout_of_images_draws_as_many():
    """Not the same ones: channels_last images draw in the order of their elements in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.25))
    y = pyops.fuse(model)(torch.randn(4, 3, 32, 32))
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5


@pytest.mark.parametrize("kind", [nn.ParameterList, nn.ModuleList])
def test_containers_stay(kind):
    model = kind([nn.Linear(2, 2)] if kind is nn.ModuleList else [nn.Parameter(torch.ones(2))])
    before = facts(model)
    assert facts(pyops.fuse(model)) == before


CONVS = {
    "bias": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False),
    "multiplier": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "uneven": lambda: nn.Conv2d(4, 6, (1, 5), (2, 1), (0, 2), bias=False),
}
NORMS = {
    "plain": lambda n: nn.BatchNorm2d(n),
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "without_statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "without_parameters": lambda n: nn.BatchNorm2d(n, affine=False),
    "frozen": lambda n: nn.BatchNorm2d(n).requires_grad_(False),
    "still": lambda n: nn.BatchNorm2d(n, eps=0.1, momentum=0.0),
}
ENDS = {
    "relu": lambda: [nn.ReLU(inplace=True)],
    "leaky": lambda: [nn.LeakyReLU(0.3)],
    "gelu_tanh": lambda: [nn.GELU("tanh")],
    "pool": lambda: [nn.SiLU(), nn.MaxPool2d(2)],
    "ceil": lambda: [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)],
    "average": lambda: [nn.Identity(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
}


@TRAIN
@pytest.mark.parametrize("conv", CONVS)
def test_every_convolution(conv, train):
    torch.manual_seed(0)
    first = CONVS[conv]()
    assert check_fused(nn.Sequential(first, nn.BatchNorm2d(first.out_channels), nn.ReLU()), X2, train)


@TRAIN
@pytest.mark.parametrize("norm", NORMS)
def test_every_batch_norm(norm, train):
    torch.manual_seed(0)
    assert check_fused(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), NORMS[norm](6), nn.ReLU()), X2, train)


@TRAIN
@pytest.mark.parametrize("end", ENDS)
def test_every_end(end, train):
    torch.manual_seed(0)
    assert check_fused(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), *ENDS[end]()), X2, train)
