"""How people write stems, heads and what goes between them: each line is one idiom.

`IdiomNet` puts an idiom behind an unpadded trunk with 8x4x4 features at the native size 22, so that
the source on every window is the oracle. An idiom gets the network ``m`` and the images, the
features ``f`` or the logits ``z``; the network has the layers and parameters named in its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

NATIVE = 22
Idiom = Callable[[Any, Tensor], Any]


class Trunk(nn.Module):
    """Two convolutions without padding: 8 x 4 x 4 features of 22 x 22 pixels, a cell every 4."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return F.max_pool2d(F.relu(self.second(x)), 2)


class IdiomNet(nn.Module):
    """A trunk with an idiom before, behind or after it, and parameters that idioms use."""

    def __init__(
        self,
        head: Idiom,
        stem: Idiom = lambda m, x: x,
        in_channels: int = 3,
        trunk: Callable[[int], nn.Module] = Trunk,
        **layers: nn.Module,
    ) -> None:
        super().__init__()
        self.trunk = trunk(in_channels)
        self.stem, self.head = stem, head
        self.fc = nn.Linear(128, 4)
        self.fc8 = nn.Linear(8, 4)
        self.matrix = nn.Parameter(torch.randn(128, 4) / 9)
        self.prototypes = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.power = nn.Parameter(torch.tensor(3.0))
        self.wide = nn.Parameter(torch.randn(4, 700) / 9)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.head(self, self.trunk(self.stem(self, x)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of ``(N, F)`` features, of any number of them."""
        return F.linear(features, self.wide[:, : features.shape[1]], self.bias)


def by_window(idiom: Idiom) -> Idiom:
    """A head: the idiom on the features, flattened, and a fully connected layer."""
    return lambda m, f: m.classify(idiom(m, f).flatten(1))


def on_logits(idiom: Idiom) -> Idiom:
    return lambda m, f: idiom(m, m.fc(f.flatten(1)))


def flat(f: Tensor) -> Tensor:
    return f.flatten(1)


def layer_norm_by_hand(f: Tensor) -> Tensor:
    mean = f.mean(1, keepdim=True)
    variance = (f - mean).pow(2).mean(1, keepdim=True)
    return (f - mean) / torch.sqrt(variance + 1e-6)


def set_channels(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = x[:, 0] * 2 - 1
    x[:, 1] = (x[:, 1] - 0.5) / 0.2
    return x


def set_at(f: Tensor, index: Any, value: float) -> Tensor:
    f = f.clone()
    f[index] = value
    return f


def response_norm(f: Tensor) -> Tensor:
    squares = F.avg_pool3d(f.pow(2).unsqueeze(1), (5, 1, 1), stride=1, padding=(2, 0, 0))
    return f / (1 + squares.squeeze(1)).pow(0.75)


def spatial_weights(f: Tensor) -> Tensor:
    return f.mean(1, keepdim=True).flatten(2).softmax(-1).view(f.size(0), 1, 4, 4)


def pyramid(f: Tensor, levels: tuple[int, ...], pool: Callable[..., Tensor]) -> Tensor:
    return torch.cat([pool(f, n).flatten(1) for n in levels], 1)


def rows(f: Tensor) -> Tensor:
    """Channels of every position: (N, P, C)."""
    return f.flatten(2).transpose(1, 2)


def bilinear(f: Tensor) -> Tensor:
    products = torch.bmm(f.flatten(2), rows(f)) / 16
    return F.normalize(products.sign() * torch.sqrt(products.abs() + 1e-5)).flatten(1)


def gated_attention(m: Any, f: Tensor) -> Tensor:
    x = rows(f)
    gate = torch.tanh(x @ m.prototypes.t()) * torch.sigmoid(x @ m.prototypes.t())
    return torch.softmax(gate.sum(-1, keepdim=True).transpose(1, 2), -1) @ x


def soft_assignment(m: Any, f: Tensor) -> Tensor:
    shares = torch.einsum("bchw,kc->bkhw", f, m.prototypes).flatten(2).softmax(1)
    sums = torch.einsum("bkn,bcn->bkc", shares, f.flatten(2))
    return F.normalize(sums - shares.sum(-1, keepdim=True) * m.prototypes, dim=2)


def in_gradient_modes(m: Any, f: Tensor) -> Tensor:
    with torch.inference_mode():
        f = f * 2
    with torch.set_grad_enabled(m.training), torch.no_grad():
        return f - 1


STEMS: dict[str, Idiom] = {
    "zeros of the image's shape": lambda m, x: x + x.new_zeros(x.shape),
    "zeros like": lambda m, x: x + torch.zeros_like(x),
    "normalised by buffers": lambda m, x: (x - m.mean) / m.mean.view(-1, 1, 1),
    "normalised by torchvision": lambda m, x: torchvision.transforms.functional.normalize(
        x, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    ),
    "normalised by lists": lambda m, x: x - torch.as_tensor([0.4, 0.5, 0.6]).to(x).view(-1, 1, 1),
    "normalised by channel": lambda m, x: torch.stack([x[:, i] - 0.1 * i for i in range(3)], 1),
    "normalised in place": set_channels,
    "slices joined": lambda m, x: torch.cat([x[:, 0].unsqueeze(1) * 2, x[:, 1:] - 1], 1),
    "BGR": lambda m, x: x.flip(1) * 255 - 128,
    "divided": lambda m, x: x.float().to(x.dtype).true_divide(255.0),
    "L2 norm of colours": lambda m, x: F.normalize(x, dim=1),
}

GREY: dict[str, Idiom] = {
    "repeat": lambda m, x: x.repeat(1, 3, 1, 1),
    "expand": lambda m, x: x.expand(-1, 3, -1, -1),
    "expand by shape": lambda m, x: x.expand(x.shape[0], 3, x.shape[2], x.shape[3]),
    "cat": lambda m, x: torch.cat([x, x, x], 1),
    "stack": lambda m, x: torch.stack([x[:, 0]] * 3, 1),
    "tile": lambda m, x: x.tile((1, 3, 1, 1)),
    "repeat_interleave": lambda m, x: x.repeat_interleave(3, dim=1),
    "if grey": lambda m, x: x.repeat(1, 3, 1, 1) if x.shape[1] == 1 else x,
}
"""Stems that take one channel and give three."""

FEATURES: dict[str, Idiom] = {
    "L2 norm": lambda m, f: f / f.norm(dim=1, keepdim=True).clamp_min(1e-9),
    "L2 norm by linalg": lambda m, f: f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-6),
    "L2 norm by squares": lambda m, f: f / f.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-9),
    "layer norm by mean": lambda m, f: (
        m.scale * layer_norm_by_hand(f) + m.scale[:, :, 0, 0, None, None]
    ),
    "layer norm by var": lambda m, f: (
        (f - f.mean(1, keepdim=True)) / (f.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    ),
    "layer norm by std": lambda m, f: (f - f.mean(1, True)) / (f.std(dim=1, keepdim=True) + 1e-6),
    "layer norm by var_mean": lambda m, f: (
        (f - torch.var_mean(f, 1, keepdim=True)[1])
        / (torch.var_mean(f, 1, keepdim=True)[0] + 1e-6).sqrt()
    ),
    "layer norm, channels last": lambda m, f: F.layer_norm(f.permute(0, 2, 3, 1), (8,)).permute(
        0, 3, 1, 2
    ),
    "spatial attention": lambda m, f: (
        f
        * torch.sigmoid(
            torch.cat([f.mean(1, keepdim=True), f.max(1, keepdim=True)[0]], 1).sum(1, keepdim=True)
        )
    ),
    "scale after a channel shuffle": lambda m, f: F.channel_shuffle(f, 2) * m.scale,
    "response norm by AvgPool3d": lambda m, f: response_norm(f),
    "glu": lambda m, f: torch.cat([f, F.glu(f, 1)], 1),
    "gate of halves": lambda m, f: f.chunk(2, 1)[0] * torch.sigmoid(f.chunk(2, 1)[1]),
    "maxout": lambda m, f: f.view(f.size(0), 4, 2, 4, 4).max(2)[0],
    "maxout by unflatten": lambda m, f: f.unflatten(1, (2, 4)).amax(1),
    "softmax of channels": lambda m, f: f.softmax(1),
    "cumulative sum": lambda m, f: f.cumsum(1),
    "clamp_min and clamp_max": lambda m, f: torch.clamp_min(f, 0.1).clamp_max(2),
    "lerp": lambda m, f: torch.lerp(f, f**2, 0.3),
    "addcmul": lambda m, f: torch.addcmul(f, f, f + 1, value=0.5),
    "mask": lambda m, f: f * ((f > 0.3) & ~(f > 1)).type_as(f),
    "masked_fill": lambda m, f: f.masked_fill(~(f > 0.3), 0.0),
    "dropout in place": lambda m, f: F.dropout(f, 0.5, m.training, inplace=True).mul_(2),
    "drop_block2d": lambda m, f: torchvision.ops.drop_block2d(f, 0.1, 3, training=m.training),
    "channels padded": lambda m, f: F.pad(f, (0, 0, 0, 0, 2, 1), "constant", 0.5),
    "gradient modes": in_gradient_modes,
    "L2 norm by position": lambda m, f: f.div(torch.norm(f, 2, 1, True) + 1e-9),
    "rows of one axis": lambda m, f: f.softmax(3),
    "sums of column groups": lambda m, f: f.unflatten(3, (2, 2)).sum(3),
    "map twice": lambda m, f: torch.cat([f, f], 2),
    "the mean channel": lambda m, f: f.mean(1),
    "F.normalize of the window": lambda m, f: F.normalize(flat(f)),
    "norm of the window by hand": lambda m, f: flat(f) / flat(f).norm(2, 1).unsqueeze(1),
    "centred window": lambda m, f: flat(f) - flat(f).mean(1, keepdim=True),
    "scaled window": lambda m, f: flat(f) * m.matrix[:, 0],
    "layer norm of the window": lambda m, f: F.layer_norm(flat(f), (128,)),
    "layer norm of the map": lambda m, f: F.layer_norm(f, (8, 4, 4)),
    "weight of every position": lambda m, f: (
        f * m.matrix[:, 0].view(8, 4, 4) + m.matrix[:16, 1].view(4, 4)
    ),
    "weights of positions": lambda m, f: f.flatten(2) * m.matrix[:16, 0],
    "differences of columns": lambda m, f: f[..., 1:] - f[..., :-1],
    "layer over the positions": lambda m, f: F.linear(f.flatten(2), m.fc.weight[:, :16]).relu(),
    "conv1d over the positions": lambda m, f: F.conv1d(
        rows(f), m.fc.weight[:, :16, None], m.fc.bias
    ),
    "group norm of the window": lambda m, f: F.group_norm(flat(f), 4, m.matrix[:, 0]),
    "a mask set": lambda m, f: set_at(f, f < 0.3, 0),
    "a channel set": lambda m, f: set_at(f, (slice(None), 1), 0.5),
    "rows apart": lambda m, f: torch.cat([row.mean(-1) for row in f.unbind(2)], 1),
    "windows of unfold": lambda m, f: f.unfold(2, 2, 2).unfold(3, 2, 2),
    "in place": lambda m, f: f.clone().mul_(2).abs_().sqrt_().exp_(),
    "beside coordinates": lambda m, f: torch.cat(
        [flat(f), torch.linspace(-1, 1, 4, dtype=f.dtype).expand(len(f), -1)], 1
    ),
    "map as rows": lambda m, f: f.permute(0, 2, 3, 1).reshape(f.size(0), -1),
}
"""Between the features and a fully connected layer."""

POOLS: dict[str, Idiom] = {
    "logsumexp": lambda m, f: torch.logsumexp(f, (2, 3)),
    "logsumexp with a rate": lambda m, f: (f.mul(m.power).flatten(2).logsumexp(-1)) / m.power,
    "spatial softmax": lambda m, f: (f.flatten(2) * f.flatten(2).softmax(-1)).sum(-1),
    "spatial attention pool": lambda m, f: (f * spatial_weights(f)).sum((2, 3)),
    "soft argmax": lambda m, f: (
        f.flatten(2).softmax(-1) * torch.linspace(-1, 1, 16, dtype=f.dtype)
    ).sum(-1),
    "weighted mean": lambda m, f: (
        (f * torch.sigmoid(f[:, :1])).sum((2, 3)) / torch.sigmoid(f[:, :1]).sum((2, 3))
    ),
    "AdaptiveAvgPool1d": lambda m, f: F.adaptive_avg_pool1d(f.flatten(2), 1).squeeze(-1),
    "AdaptiveMaxPool1d": lambda m, f: nn.AdaptiveMaxPool1d(1)(f.view(f.size(0), 8, -1))[..., 0],
    "bins of flattened positions": lambda m, f: F.adaptive_avg_pool1d(f.flatten(2), 3).flatten(1),
    "avg_pool1d": lambda m, f: F.avg_pool1d(f.flatten(2), 16).squeeze(-1),
    "GeM": lambda m, f: F.avg_pool2d(f.clamp(min=1e-6).pow(m.power), (f.size(-2), f.size(-1))).pow(
        1.0 / m.power
    ),
    "GeM with clamp_min": lambda m, f: f.clamp_min(1e-6).pow(m.power).mean((2, 3)).pow(1 / m.power),
    "mean and deviation": lambda m, f: torch.cat([f.mean((2, 3)), f.std((2, 3))], 1),
    "variance": lambda m, f: f.flatten(2).var(-1),
    "minimum": lambda m, f: f.amin((2, 3)),
    "norm": lambda m, f: f.flatten(2).norm(dim=2),
    "norm as a function": lambda m, f: torch.norm(f, p=1, dim=(2, 3)),
    "norm of torch.linalg": lambda m, f: torch.linalg.norm(f, dim=(2, 3), dtype=f.dtype),
    "median": lambda m, f: f.flatten(2).median(-1).values,
    "mean of the largest": lambda m, f: f.flatten(2).topk(3, dim=2)[0].mean(2),
    "mean of the sorted": lambda m, f: (
        f.flatten(2).sort(-1, descending=True).values[..., :5].mean(-1)
    ),
    "k-th value": lambda m, f: f.flatten(2).kthvalue(13, 2)[0],
    "quantile": lambda m, f: f.flatten(2).quantile(0.75, dim=2),
    "quantiles": lambda m, f: torch.quantile(
        f.flatten(2), torch.tensor([0.2, 0.5], dtype=f.dtype), -1, interpolation="lower"
    ).permute(1, 2, 0),
    "nanmedian and nanmean": lambda m, f: (
        f.flatten(2).nanmedian(-1).values + f.flatten(2).nanmean(-1)
    ),
    "positions by a mask": lambda m, f: (f * m.matrix[:16, 0].view(4, 4)).sum((2, 3)),
    "group norm": lambda m, f: F.group_norm(f.mean((2, 3)), 2, m.bias.repeat(2), m.bias.repeat(2)),
    "sum in a dtype": lambda m, f: f.sum((2, 3), dtype=torch.float64),
    "bilinear": lambda m, f: bilinear(f),
    "bilinear by einsum": lambda m, f: torch.einsum("bchw,bdhw->bcd", f, f.sigmoid()),
    "attention weights by bmm": lambda m, f: torch.bmm(
        f.flatten(2), f[:, :1].flatten(2).softmax(-1).transpose(1, 2)
    ).squeeze(-1),
    "gated attention": gated_attention,
    "soft assignment to prototypes": soft_assignment,
    "maximum of maxima": lambda m, f: f.max(3)[0].max(2)[0],
    "flattened beside pooled": lambda m, f: torch.cat([flat(f), f.mean((2, 3))], 1),
    "pyramid 1, 2, 4": lambda m, f: pyramid(f, (1, 2, 4), F.adaptive_max_pool2d),
    "pyramid 3, 2, 1": lambda m, f: pyramid(f, (3, 2, 1), F.adaptive_avg_pool2d),
    "pyramid by channel": lambda m, f: torch.cat(
        [F.adaptive_max_pool2d(f, n).flatten(2) for n in (1, 2)], 2
    ),
    "normalised mean": lambda m, f: F.normalize(f.mean((2, 3))),
}
"""From the features to vectors ``(N, F)``."""

SCORES: dict[str, Idiom] = {
    "x @ W + b": lambda m, f: flat(f) @ m.matrix + m.bias,
    "einsum": lambda m, f: torch.einsum("bd,dk->bk", flat(f), m.matrix),
    "einsum over channels and positions": lambda m, f: torch.einsum("bchw,kc->bk", f, m.prototypes),
    "einsum over the window": lambda m, f: torch.einsum(
        "bchw,chwk->bk", f, m.matrix.view(8, 4, 4, 4)
    ),
    "class maps by einsum": lambda m, f: torch.einsum("bchw,kc->bkhw", f, m.prototypes).mean(
        (2, 3)
    ),
    "addmm": lambda m, f: torch.addmm(m.bias, flat(f), m.matrix, beta=0.5, alpha=2),
    "mm": lambda m, f: torch.mm(flat(f), m.matrix),
    "matmul with a transposed parameter": lambda m, f: (
        torch.matmul(flat(f), m.fc.weight.t()) + m.fc.bias
    ),
    "weight from the left": lambda m, f: (m.matrix.t() @ flat(f).unsqueeze(-1)).squeeze(-1),
    "weight from the left, images last": lambda m, f: (m.matrix.t() @ flat(f).t()).t(),
    "baddbmm": lambda m, f: torch.baddbmm(
        m.bias.view(1, 1, 4).expand(len(f), 1, 4),
        flat(f).unsqueeze(1),
        m.matrix.expand(len(f), 128, 4),
    ).squeeze(1),
    "bmm": lambda m, f: torch.bmm(
        flat(f).unsqueeze(1), m.matrix.unsqueeze(0).expand(len(f), -1, -1)
    ).squeeze(1),
    "einsum with an ellipsis": lambda m, f: torch.einsum("...d,dk->...k", flat(f), m.matrix),
    "einsum without a result": lambda m, f: torch.einsum("bd,dk", flat(f), m.matrix),
    "F.bilinear": lambda m, f: F.bilinear(
        f.mean((2, 3)), f.amax((2, 3)), m.matrix.view(8, 8, 8)[:4], m.bias
    ),
    "angles": lambda m, f: torch.cos(
        torch.acos(F.linear(F.normalize(flat(f)), F.normalize(m.fc.weight)).clamp(-0.99, 0.99))
    ),
    "tensordot": lambda m, f: torch.tensordot(flat(f), m.matrix, dims=1),
    "sum of products": lambda m, f: (flat(f).unsqueeze(2) * m.matrix).sum(1),
    "matmul of channels": lambda m, f: (f.permute(0, 2, 3, 1) @ m.prototypes.t()).mean((1, 2)),
    "conv1d": lambda m, f: F.conv1d(flat(f).unsqueeze(2), m.fc.weight.unsqueeze(2)).squeeze(2),
    "cosine of pooled features": lambda m, f: F.linear(
        F.normalize(f.mean((2, 3))), F.normalize(m.prototypes)
    ),
    "cosine of the window": lambda m, f: (
        F.linear(F.normalize(flat(f)), F.normalize(m.fc.weight)) * m.power
    ),
    "cosine by matmul": lambda m, f: F.normalize(flat(f)) @ F.normalize(m.matrix, dim=0),
    "cosine_similarity": lambda m, f: F.cosine_similarity(
        f.mean((2, 3)).unsqueeze(1), m.prototypes.unsqueeze(0), dim=-1
    ),
    "distances to prototypes": lambda m, f: -torch.cdist(f.mean((2, 3)), m.prototypes),
    "squared distances": lambda m, f: -(f.mean((2, 3)).unsqueeze(1) - m.prototypes).pow(2).sum(-1),
    "the middle of the features": lambda m, f: m.fc8(f[:, :, 2, 2]),
    "a crop of the features": lambda m, f: m.classify(flat(f[:, :, 1:, :3])),
    "embeddings": lambda m, f: f.mean((2, 3)),
    "flattened features": lambda m, f: flat(f),
    "normalised features": lambda m, f: F.normalize(flat(f)),
}
"""From the features to scores or embeddings."""

LOGITS: dict[str, Idiom] = {
    "new_zeros of the batch": lambda m, z: z + z.new_zeros(z.size(0), 4),
    "torch.zeros of the batch": lambda m, z: z + torch.zeros(len(z), 4, dtype=z.dtype),
    "new_full of the batch": lambda m, z: z * z.new_full((z.shape[0], 1), 2.0),
    "new_tensor": lambda m, z: z * z.new_tensor([1.0, 2, 3, 4]),
    "a class of zeros": lambda m, z: torch.cat([z.new_zeros(z.size(0), 1), z], 1),
    "difference of two": lambda m, z: z[:, 1] - z[:, 0],
    "a sum": lambda m, z: z.sum(1),
    "centred": lambda m, z: z - z.mean(1, keepdim=True),
    "dueling": lambda m, z: z[:, :1] + z[:, 1:] - z[:, 1:].mean(1, keepdim=True),
    "log softmax by hand": lambda m, z: z - z.logsumexp(1, keepdim=True),
    "shifted by the largest": lambda m, z: z - z.max(1, keepdim=True)[0],
    "temperature": lambda m, z: z / m.power.clamp(min=0.1),
    "mean of a stack": lambda m, z: torch.stack([z, z.tanh()]).mean(0),
    "mean of a stack after the batch": lambda m, z: torch.stack([z, z * 2], 1).mean(1),
    "mean of probabilities": lambda m, z: torch.stack([z, z * 2]).softmax(-1).mean(dim=0),
    "largest of a stack": lambda m, z: torch.stack([z, -z], dim=-1).max(-1).values,
    "sum of a stack": lambda m, z: torch.stack([z, z * 2, z - 1], 0).sum(0),
    "median of a stack": lambda m, z: torch.stack([z, z * 2, -z], 0).median(0).values,
    "weighted stack": lambda m, z: (torch.stack([z, z * 2]) * m.bias[:2].view(2, 1, 1)).sum(0),
    "mixture of experts": lambda m, z: torch.einsum(
        "be,bek->bk", z[:, :2].softmax(1), torch.stack([z, z.tanh()], 1)
    ),
    "cumulative product": lambda m, z: torch.cumprod(torch.sigmoid(z), 1),
    "below a threshold": lambda m, z: torch.where(z > 0.1, z, torch.full_like(z, -9.0)),
    "a stack": lambda m, z: torch.stack([z, z * 2], 1),
    "view_as": lambda m, z: (z + 1).view_as(z) * torch.ones(1).expand_as(m.bias).to(z),
}
"""After the fully connected layer."""

HEADS: dict[str, Idiom] = {
    **{f"features, {name}": by_window(idiom) for name, idiom in FEATURES.items()},
    **{f"pool, {name}": by_window(idiom) for name, idiom in POOLS.items()},
    **{f"scores, {name}": idiom for name, idiom in SCORES.items()},
    **{f"logits, {name}": on_logits(idiom) for name, idiom in LOGITS.items()},
}
