"""The compact VGG in plain torch.nn."""

from torch import nn

from pyops.testing.twins import twin_of


@twin_of("vgg_compact")
class VGGCompact(nn.Module):
    def __init__(self, num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5, hidden: int = 512):
        super().__init__()
        layers, channels = [], 3
        for width in (64, 128, 256, 512, 512):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        classifier, features = [], 512 * 7 * 7
        for _ in range(3):
            classifier += [nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout)]
            features = hidden
        self.classifier = nn.Sequential(*classifier, nn.Linear(features, num_classes))
        for part in self.modules() if init_weights else ():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
