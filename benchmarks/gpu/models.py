"""The models of `benchmarks.gpu`, with random weights; the bare loops and the stages build the same ones.

Each takes what its workload's column holds and returns (label int64 [N], score float32 [N]): the normalisation of
images and the choice of the best class are part of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu.workloads import VOCABULARY, Workload

EAGER = "eager"
MODES = (EAGER, "default", "max-autotune-no-cudagraphs")
CLASSES = 1000
Best = tuple[torch.Tensor, torch.Tensor]


def best(scores: torch.Tensor) -> Best:
    score, label = scores.max(dim=1)
    return label, score.float()


class Images(nn.Module):
    """A classifier of uint8 images [N, H, W, 3]."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor([123.7, 116.3, 103.5]).reshape(3, 1, 1))
        self.register_buffer("scale", 1 / torch.tensor([58.4, 57.1, 57.4]).reshape(3, 1, 1))

    def forward(self, images: torch.Tensor) -> Best:
        # N, H, W, C seen as N, C, H, W is what channels_last means: nothing is moved.
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        return best(self.net((x - self.mean) * self.scale))


class Mlp(nn.Module):
    """`layers` layers of `width` x `width` over uint8 features [N, 256] that are projected to `width` first."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for layer in (self.project, *self.layers):
            # The default would let the values shrink from layer to layer; what is near zero is cheap to multiply.
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, features: torch.Tensor) -> Best:
        x = self.project(features.to(self.project.weight.dtype) / 255)
        for layer in self.layers:
            x = layer(F.gelu(x))
        return best(x)


class Block(nn.Module):
    """A layer of BERT: attention and a feed-forward net, each followed by a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.after_attention, self.after_feed = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        parts = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
        x = self.after_attention(x + self.out(seen.transpose(1, 2).reshape(rows, length, width)))
        return self.after_feed(x + self.down(F.gelu(self.up(x))))


class Text(nn.Module):
    """An encoder of DistilBERT's size over padded tokens int32 [N, L] and their lengths int64 [N], mean-pooled."""

    def __init__(self, width: int, layers: int, longest: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 12) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> Best:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inside = places < lengths[:, None]
        x = self.norm(self.words(tokens) + self.places(places))
        for block in self.blocks:
            x = block(x, inside[:, None, None, :])
        weight = inside.to(x.dtype) / lengths[:, None]
        return best(self.head((x * weight[:, :, None].to(x.dtype)).sum(dim=1)))


def build(load: Workload) -> nn.Module:
    """The model of a workload, float32 on the CPU; the same weights in every process."""
    torch.manual_seed(0)
    if load.name == "mlp":
        return Mlp(load.shape[0], load.width, load.layers)
    if load.name == "text":
        return Text(load.width, load.layers, load.buckets[-1])
    return Images(_image_net(load.name))


def _image_net(name: str) -> nn.Module:
    if name == "resnet50":
        from torchvision.models import resnet50  # not needed for the other models

        net: nn.Module = resnet50(weights=None)
        for block in net.modules():
            if hasattr(block, "bn3"):
                # Without training the residual sums would outgrow float16.
                nn.init.constant_(block.bn3.weight, 0.2)
        return net
    if name == "vit_b16":
        import timm  # not needed for the other models

        vit: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False)
        return vit
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def set_up(mode: str, device: str) -> None:
    """What holds for the whole process, alike for the bare loops and the stage: few shapes, the mode's options."""
    if device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    if mode == EAGER:
        return
    import torch._dynamo.config as dynamo
    import torch._inductor as inductor
    import torch._inductor.config as inductor_config

    # As dynamic=False for each torch.compile: every shape that comes is one of a few, and is compiled for itself.
    dynamo.automatic_dynamic_shapes = False
    dynamo.recompile_limit = 64
    for name, value in inductor.list_mode_options(mode).items():
        setattr(inductor_config, name, value)


def prepare(load: Workload, device: str, mode: str) -> Any:
    """The model on its device, as a TorchStage with `torch_options` prepares it."""
    model = build(load).to(device).eval().requires_grad_(False)
    options = torch_options(load, device, mode)
    model = model.to(getattr(torch, options["dtype"]))
    if options["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model, dynamic=False) if options["compile"] else model


def torch_options(load: Workload, device: str, mode: str) -> dict[str, Any]:
    """A stage's `torch:` entry."""
    dtype = "float32" if device == "cpu" else "float16"
    return {"dtype": dtype, "channels_last": load.column == "image", "compile": mode != EAGER}
