"""What a CPU computes faster in another way: the same functions, weights and names.

models.py reads texts `in_halves` and exchanges layers in every model that it builds; on a GPU all
is PyTorch's own.

- A ResNet's last convolutions: a picture of 96 pixels is 3 x 3 places there, with 512 channels.
  oneDNN's convolutions reach a third of the speed of a matrix product on so small a map.
- Dropout: drawing its mask one number at a time takes a third of a small Transformer's time.
- A batch of texts is as long as its longest, twice the mean: half of what is read is padding.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import nn
from torch.nn import functional as F

from dataset import PAD

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


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind that `SmallMapConv` computes."""
    shape = conv.kernel_size, conv.padding, conv.dilation
    return shape == ((3, 3), (1, 1), (1, 1)) and conv.groups == 1 and conv.bias is None


class WordDropout(nn.Dropout):
    """Dropout whose mask is cut from random words of 64 bits, 16 bits a number.

    The rate is met to 1 / 2 ** 17; what is kept is divided by 1 - p, as in PyTorch's own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # even over 2 ** 16 numbers
        kept = draws >= round(self.p * 2**16) - 2**15
        return x * (kept.to(x.dtype) / (1 - self.p))


def in_halves(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """For a text tower's forward: reads the shorter half of a batch apart from the longer one.

    Forward, backward and step of an LSTM take 0.9 of the time in bf16 and 0.75 in float32, of a
    Transformer 0.8.
    """

    @wraps(forward)
    def read(tower: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.device.type != "cpu" or len(tokens) < 2:
            return forward(tower, tokens)
        lengths = (tokens != PAD).sum(1)
        order = lengths.argsort()
        halves = [forward(tower, tokens[h, : lengths[h].max()]) for h in order.tensor_split(2)]
        return torch.cat(halves)[order.argsort()]

    return read


def exchange(net: nn.Module) -> nn.Module:
    """The same network, its 3 x 3 convolutions and its dropouts exchanged for those above."""
    for module in list(net.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Conv2d and fits(layer):
                channels = layer.in_channels, layer.out_channels
                small = nn.utils.skip_init(
                    SmallMapConv, *channels, 3, stride=layer.stride, padding=1, bias=False
                )
                small.weight = layer.weight
                setattr(module, name, small)
            elif type(layer) is nn.Dropout:
                setattr(module, name, WordDropout(layer.p))
    return net
