"""pyops.fuse on torchvision's networks: every architecture by its smallest member, two blocks a stage, on small images.

Left out are only bigger members of the same code.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyops

from .fused import check_inference, check_training
from .models import liven

models = pytest.importorskip("torchvision.models")
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet, swin_transformer  # noqa: E402
from torchvision.models.detection import backbone_utils  # noqa: E402
from torchvision.models.video.swin_transformer import SwinTransformer3d  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402


def short(name: str, **options) -> nn.Module:
    """A network without weights, with two blocks of each stage."""
    model = models.get_model(name, weights=None, **options)
    for part in model.modules():
        if isinstance(part, nn.Sequential) and len(part) > 2 and len({type(block) for block in part}) == 1:
            del part[2:]
    return model


def slim(name: str) -> nn.Module:
    """A network with one small layer in place of its last ones, most of its parameters."""
    with torch.device("meta"):
        model = models.get_model(name, weights=None, init_weights=False) if name != "alexnet" else models.alexnet()
        first = next(layer for layer in model.classifier if isinstance(layer, nn.Linear))
        model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(first.in_features, 7))
    model.to_empty(device="cpu")
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            part.reset_parameters()
    return model


def dense(drop_rate: float = 0.0, memory_efficient: bool = False) -> nn.Module:
    return models.DenseNet(8, (2, 3), 16, 2, drop_rate, num_classes=7, memory_efficient=memory_efficient)


def efficient(dropout: float = 0.0) -> nn.Module:
    """Blocks of either version, with and without expansion and residual."""
    wide, tall = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    setting = [wide(1, 3, 1, 8, 8, 1), wide(4, 3, 2, 8, 16, 2), tall(1, 3, 1, 16, 16, 1), tall(4, 5, 2, 16, 24, 2)]
    return models.EfficientNet(setting, dropout, num_classes=7, last_channel=32)


def mobile_v2() -> nn.Module:
    return models.MobileNetV2(7, inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]])


def mobile_v3() -> nn.Module:
    rows = (16, 3, 16, 16, True, "RE", 1), (16, 3, 32, 24, False, "RE", 2), (24, 5, 48, 24, True, "HS", 1)
    setting = [mobilenetv3.InvertedResidualConfig(*row, 1, 1.0) for row in rows]
    return models.MobileNetV3(setting, 32, num_classes=7)


def reg(se_ratio: float | None = 0.25) -> nn.Module:
    return regnet.RegNet(regnet.BlockParams([1, 2], [16, 24], [8, 8], [1, 1], [2, 2], se_ratio), num_classes=7, stem_width=8)


def conv_next() -> nn.Module:
    setting = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 1)]
    return models.ConvNeXt(setting, layer_scale=0.3, num_classes=7)


def swin(version: int = 1) -> nn.Module:
    blocks = {1: swin_transformer.SwinTransformerBlock, 2: swin_transformer.SwinTransformerBlockV2}
    merging = {1: swin_transformer.PatchMerging, 2: swin_transformer.PatchMergingV2}
    options = dict(block=blocks[version], downsample_layer=merging[version], num_classes=7)
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **options)


def swin_v2() -> nn.Module:
    return swin(2)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7)


def video() -> nn.Module:
    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=7)


def maxvit() -> nn.Module:
    return models.MaxVit((32, 32), 8, 4, [8, 16], [1, 2], 4, 0.0, num_classes=7)


def images(size: int, batch: int):
    return torch.randn(batch, 3, size, size)


NETWORKS = {
    "alexnet": (lambda: slim("alexnet"), 64),
    "convnext": (conv_next, 32),
    "densenet": (dense, 32),
    "efficientnet_b0": (lambda: short("efficientnet_b0"), 32),
    "efficientnet_v2": (efficient, 32),
    "googlenet": (lambda: short("googlenet", aux_logits=False, init_weights=False), 32),
    "inception_v3": (lambda: short("inception_v3", aux_logits=False, init_weights=False), 75),
    "maxvit": (maxvit, 32),
    "mnasnet0_5": (lambda: short("mnasnet0_5"), 32),
    "mobilenet_v2": (mobile_v2, 32),
    "mobilenet_v3": (mobile_v3, 32),
    "regnet_x": (lambda: reg(None), 32),
    "regnet_y": (reg, 32),
    "resnet18": (lambda: short("resnet18"), 32),
    "resnet50": (lambda: short("resnet50"), 32),
    "resnext50_32x4d": (lambda: short("resnext50_32x4d"), 32),
    "shufflenet_v2_x0_5": (lambda: models.shufflenet_v2_x0_5(num_classes=7), 64),
    "squeezenet1_0": (lambda: short("squeezenet1_0"), 32),
    "squeezenet1_1": (lambda: short("squeezenet1_1"), 32),
    "swin_t": (swin, 32),
    "swin_v2_t": (swin_v2, 36),
    "vgg11": (lambda: slim("vgg11"), 32),
    "vgg11_bn": (lambda: slim("vgg11_bn"), 32),
    "vit": (vit, 32),
    "fcn_resnet50": (lambda: short("fcn_resnet50", weights_backbone=None), 32),
    "deeplabv3_mobilenet_v3_large": (lambda: models.get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None), 32),
    "lraspp_mobilenet_v3_large": (lambda: models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None), 32),
    "resnet18_fpn": (lambda: backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None), 64),
    "mobilenet_fpn": (lambda: backbone_utils.mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True), 64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    assert check_inference(make(), images(size, 6))


def test_inference_of_videos():
    torch.manual_seed(0)
    assert check_inference(video(), torch.randn(2, 3, 4, 32, 32))["SwinTransformerBlock"] == 4


BLOCKS = {
    "densenet": (dense, dict(DenseBlock=2, DenseLayer=5, DenseTransition=1)),
    "efficientnet": (efficient, dict(MBConv=3, FusedMBConv=3, SqueezeExcitation=3, DropPath=6)),
    "mobilenet_v2": (mobile_v2, dict(InvertedResidual=3, ConvBNAct=7)),
    "mobilenet_v3": (mobile_v3, dict(MBConv=3, SqueezeExcitation=2)),
    "regnet": (reg, dict(SqueezeExcitation=3)),
    "convnext": (conv_next, dict(ConvNeXtBlock=3, LayerNorm2d=3)),
    "swin": (swin, dict(SwinTransformerBlock=4, ShiftedWindowAttention=4, PatchMerging=1, BlockLinear=9)),
    "swin_v2": (swin_v2, dict(SwinTransformerBlockV2=4, ShiftedWindowAttentionV2=4, PatchMergingV2=1, BlockLinear=9)),
    "vit": (vit, dict(EncoderBlock=2, MultiheadAttention=2, Sequential=2)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_training(name):
    """And that each block became what it should."""
    make, expected = BLOCKS[name]
    torch.manual_seed(0)
    found = check_training(make(), images(32, 4))
    assert {kind: found[kind] for kind in expected} == expected


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_copies_and_autocast(name):
    """Hooks in blocks fire as they do in torchvision's; copies compute the same; autocast gives the dtype that it does there."""
    torch.manual_seed(0)
    model, x = BLOCKS[name][0]().eval(), images(32, 2)
    eager = copy.deepcopy(model)
    pyops.fuse(model)
    calls: list[list[str]] = []
    with torch.no_grad():
        expected = eager(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(x), eager(x)
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= 0.05 * theirs.norm()
        for network in (model, eager):
            seen: list[str] = []
            for part, module in network.named_modules():
                if part.endswith("out_proj"):
                    continue  # torch's attention does not call this layer, ours does
                module.register_forward_hook(lambda *_, part=part, seen=seen: seen.append(part))
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
            calls.append(seen)
    assert calls[0] == calls[1]


def test_a_residual_is_added_in_place():
    block = efficient().features[3][0].eval()
    assert block.use_res_connect
    x, eager = torch.randn(1, 16, 8, 8), copy.deepcopy(block)
    pyops.fuse(block)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == eager(x).dtype == torch.bfloat16


def test_frozen_batch_norms():
    """Folded into their convolutions, in training mode too, and with gradients of what is around them; under autocast they give float32."""
    torch.manual_seed(0)
    model = short("resnet18", norm_layer=FrozenBatchNorm2d)
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(0.5, 1.5), norm.bias.normal_(0, 0.1)
    check_training(copy.deepcopy(model), images(32, 4))
    check_inference(copy.deepcopy(model), images(32, 6))
    eager = copy.deepcopy(model)
    pyops.fuse(model)
    rows = [row for row in pyops.explain(model, images(32, 1)).rows if "FrozenBatchNorm2d" in row.kinds]
    assert rows and all(row.ours and row.kinds[0] == "Conv2d" for row in rows)
    for train in (True, False):
        x = images(32, 2).requires_grad_(train)
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (network.train(train).layer1(network.conv1(x)) for network in (model, eager))
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detectors(name):
    """Lists of images of different sizes in, dictionaries out: losses in training, scores without."""
    small = dict(min_size=96, max_size=128, rpn_nms_thresh=1.0, box_nms_thresh=1.0, box_score_thresh=0.0)
    options = small if "rcnn" in name else dict(nms_thresh=1.0, score_thresh=0.0)  # no box rules out another: rounding decides some
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **options)
    liven(model)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    eager = copy.deepcopy(model)
    pyops.fuse(model)
    pictures = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([i])} for i in (1, 3)]

    def outcome(network, train):
        torch.manual_seed(1)  # of the boxes that a loss is taken of
        with torch.set_grad_enabled(train):
            return network.train(train)(pictures, targets if train else None)

    losses, expected = outcome(model, True), outcome(eager, True)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    for found, wanted in zip(outcome(model, False), outcome(eager, False), strict=True):
        assert len(wanted["boxes"]) > 10
        torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-3, atol=1e-5)
