"""A ResNet's last convolutions as matrix products, where a CPU is fast at those alone.

models.py exchanges them when it builds a ResNet; weights and their names stay as they are.
A picture of 96 pixels is 3 x 3 places there, with 512 channels: oneDNN's convolutions reach a third
of the speed of a product on so small a map, and with bf16 a whole step takes 1.4 times as long.
"""

import torch
from torch import nn
from torch.nn import functional as F

LARGEST = 3  # places a side of the map that comes out; from 4 on, the convolution is as fast


class SmallMapConv(nn.Conv2d):
    """A 3 x 3 convolution, padded by 1, without bias; on a CPU's small maps a matrix product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, O, H', W'), where H' is H / stride, rounded up."""
        step = self.stride[0]
        height, width = ((side - 1) // step + 1 for side in x.shape[2:])
        if x.device.type != "cpu" or max(height, width) > LARGEST:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
        under = [  # what lies under each of the kernel's nine weights: (B, H', W', C)
            padded[:, row : row + step * height : step, column : column + step * width : step]
            for row in range(3)
            for column in range(3)
        ]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (O, 9 * C)
        return F.linear(torch.cat(under, 3), weight).permute(0, 3, 1, 2)


def exchange(net: nn.Module) -> nn.Module:
    """The same network, each 3 x 3 convolution of one group a `SmallMapConv` with its weights."""
    for module in list(net.modules()):
        for name, conv in module.named_children():
            if type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and conv.groups == 1:
                channels = conv.in_channels, conv.out_channels
                small = nn.utils.skip_init(
                    SmallMapConv, *channels, 3, stride=conv.stride, padding=1, bias=False
                )
                small.weight = conv.weight
                setattr(module, name, small)
    return net
