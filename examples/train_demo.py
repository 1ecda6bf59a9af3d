"""Train the packaged face detector, `fcvgg.demo.DemoNet`, from images that scikit-image ships.

Faces and non-faces come from `skimage.data.lfw_subset` (25x25 grey crops), further backgrounds
from the photographs in scikit-image's wheel. The astronaut photograph and scikit-learn's sample
photographs take no part in training: the final report runs the trained net over them.

Usage: python examples/train_demo.py [--output PATH] [--steps N] [--quick] [--report]
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import fcvgg
from fcvgg.demo import CATEGORIES, MEAN, SCALES, STD, WINDOW, DemoNet, demo_model, demo_photograph

SEED = 20
STEPS = 1500
QUICK_STEPS = 5
QUICK_SCALES = SCALES[:3]
BATCH = 128
FACE_SHARE = 0.3
HARD_SHARE = 0.5
FAINT_SHARE = 0.15
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 2e-3
LABEL_SMOOTHING = 0.05
AVERAGE_DECAY = 0.99
MINING_INTERVAL = 40
MINING_CANDIDATES = 1536
MINING_KEPT = 96
HARD_POOL = 960

FACE = CATEGORIES.index("face")
BACKGROUND = CATEGORIES.index("background")

MARGIN = 8
PATCH = WINDOW + 2 * MARGIN
"""Side of a training patch: one window plus the neighbours that a dense pass would show it."""

LARGEST_PATCH = PATCH + 8
"""Side of the largest square ever cut from a background photograph."""

HELD_OUT_CROPS = 20
HELD_OUT_STRIP = 0.2
"""Share of every background photograph, at its right edge, that training never sees."""

# Photographs are left out that hold a face, show the other photographs' scene again, or are
# drawings; weights follow how much everyday structure a photograph shows.
PHOTOGRAPHS: dict[str, float] = {
    "motorcycle_left.png": 4.0,
    "coffee.png": 3.0,
    "rocket.jpg": 3.0,
    "chelsea.png": 3.0,
    "camera.png": 3.0,
    "coins.png": 2.0,
    "ihc.png": 2.0,
    "brick.png": 1.0,
    "grass.png": 1.0,
    "gravel.png": 1.0,
    "hubble_deep_field.jpg": 1.0,
    "page.png": 1.0,
    "text.png": 1.0,
    "moon.png": 1.0,
    "retina.jpg": 1.0,
    "cell.png": 0.5,
    "color.png": 0.5,
    "clock_motion.png": 0.5,
}
PHOTOGRAPH_SIDES = (56, 64, 80, 100, 125, 156, 195, 244, 305, 380)
"""Smaller sides, in pixels, at which background photographs are sampled."""

CAMERA_MAN_HEAD = (slice(50, 205), slice(140, 290))


@dataclass(frozen=True)
class Backgrounds:
    """Background photographs (3, H, W) in [0, 1], each with its chance of being drawn."""

    photographs: list[Tensor]
    weights: Tensor


@dataclass(frozen=True)
class Tiles:
    """Square grey crops (N, 1, 25, 25) in [0, 1]."""

    faces: Tensor
    others: Tensor


def main() -> None:
    """Train, report and save."""
    arguments = parse_arguments()
    seed_everything(SEED)
    tiles, held_out_tiles = load_tiles()
    backgrounds, held_out_backgrounds = load_backgrounds()

    if arguments.report:
        report_held_out_crops(demo_model(), held_out_tiles, held_out_backgrounds)
        report_photographs(demo_model(), SCALES)
        return

    started = time.perf_counter()
    model = train(tiles, backgrounds, arguments.steps)
    print(f"trained {arguments.steps} steps in {time.perf_counter() - started:.0f} s")

    report_held_out_crops(model, held_out_tiles, held_out_backgrounds)
    report_photographs(model, QUICK_SCALES if arguments.quick else SCALES)
    save_atomically(model, arguments.output)
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size} bytes)")


def parse_arguments() -> argparse.Namespace:
    """Return the command line with every default filled in."""
    parser = argparse.ArgumentParser(description="Train fcvgg's packaged face detector.")
    parser.add_argument(
        "--output",
        type=Path,
        help="safetensors file to write (default: the packaged one; with --quick a temporary one)",
    )
    parser.add_argument("--steps", type=int, help=f"optimiser steps (default: {STEPS})")
    parser.add_argument(
        "--quick", action="store_true", help="train for seconds, only to show that training runs"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing; report on the packaged weights"
    )
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = QUICK_STEPS if arguments.quick else STEPS
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    if arguments.output is None:
        folder = Path(tempfile.mkdtemp()) if arguments.quick else packaged_assets()
        arguments.output = folder / "demo.safetensors"
    return arguments


def packaged_assets() -> Path:
    """Return the folder that `demo_model` loads from."""
    return Path(fcvgg.demo.__file__).parent


def seed_everything(seed: int) -> None:
    """Make two runs on one machine, with one number of threads, give the same weights."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


# --- data ---------------------------------------------------------------------------------------


def load_tiles() -> tuple[Tiles, Tiles]:
    """Return the LFW crops to train on and the ones held out."""
    crops = torch.from_numpy(skimage.data.lfw_subset()).float().unsqueeze(1)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(SEED))
    kept, held_out = order[HELD_OUT_CROPS:], order[:HELD_OUT_CROPS]
    faces, others = crops[:100], crops[100:]
    return Tiles(faces[kept], others[kept]), Tiles(faces[held_out], others[held_out])


def load_backgrounds() -> tuple[Backgrounds, Backgrounds]:
    """Return the photographs' left parts to train on and their right strips, held out."""
    kept: list[tuple[Tensor, float]] = []
    held_out: list[tuple[Tensor, float]] = []
    for name, weight in PHOTOGRAPHS.items():
        levels = [resize(part, side) for part in faceless_parts(name) for side in PHOTOGRAPH_SIDES]
        for level in levels:
            boundary = round(level.shape[2] * (1 - HELD_OUT_STRIP))
            kept.append((level[:, :, :boundary], weight / len(levels)))
            held_out.append((level[:, :, boundary:], weight / len(levels)))
    return large_enough(kept), large_enough(held_out)


def large_enough(weighted_photographs: list[tuple[Tensor, float]]) -> Backgrounds:
    """Keep the photographs that the largest square fits into."""
    usable = [
        (photograph, weight)
        for photograph, weight in weighted_photographs
        if min(photograph.shape[1:]) >= LARGEST_PATCH
    ]
    photographs, weights = zip(*usable, strict=True)
    return Backgrounds(list(photographs), torch.tensor(weights))


def faceless_parts(name: str) -> list[Image.Image]:
    """Return a photograph of scikit-image's data folder, less the head of the man with a camera.

    Parts do not overlap, so that none shows what another's held-out strip shows.
    """
    photograph = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    if name != "camera.png":
        return [photograph]
    rows, columns = CAMERA_MAN_HEAD
    width, height = photograph.size
    return [
        photograph.crop((0, 0, columns.start, rows.stop)),
        photograph.crop((columns.stop, 0, width, rows.stop)),
        photograph.crop((0, rows.stop, width, height)),
    ]


def resize(image: Image.Image, side: int) -> Tensor:
    """Return the image as (3, H, W) in [0, 1], antialiased to the given smaller side."""
    factor = side / min(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def random_patches(backgrounds: Backgrounds, count: int, side: int = PATCH) -> Tensor:
    """Cut random background squares (count, 3, side, side), turned and mirrored at random."""
    patches = []
    for index in torch.multinomial(backgrounds.weights, count, replacement=True).tolist():
        photograph = backgrounds.photographs[index]
        top = random.randint(0, photograph.shape[1] - side)
        left = random.randint(0, photograph.shape[2] - side)
        patch = photograph[:, top : top + side, left : left + side]
        # Half stay upright: photographs seen later are upright, and so is their structure.
        turns = random.choice((0, 0, 0, 1, 2, 3))
        patch = torch.rot90(patch, turns, (1, 2))
        patches.append(patch.flip(2) if random.random() < 0.5 else patch)
    return torch.stack(patches)


# --- synthesis of training patches --------------------------------------------------------------


def face_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Paste faces over backgrounds, centred on the window and filling it, give or take."""
    faces = mirrored(drawn(tiles.faces, count))
    sizes = uniform(count, 26, 36)
    shifts = torch.stack((uniform(count, -4.5, 4.5), uniform(count, -4.5, 4.5)), dim=1)
    return pasted(faces, random_patches(backgrounds, count), sizes, shifts)


def decoy_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Paste what must not count as a face the way faces are pasted, so that seams tell nothing."""
    kinds = (plain_tiles, background_tiles, broken_face_tiles, partial_faces)
    shares = (0.15, 0.35, 0.2, 0.3)
    counts = apportioned(count, shares)
    return torch.cat([kind(tiles, backgrounds, n) for kind, n in zip(kinds, counts, strict=True)])


def apportioned(count: int, shares: Sequence[float]) -> list[int]:
    """Split a count by shares that sum to one."""
    counts = [round(count * share) for share in shares[:-1]]
    return [*counts, count - sum(counts)]


def plain_tiles(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """LFW's own non-face crops."""
    return pasted_like_faces(mirrored(drawn(tiles.others, count)), backgrounds)


def background_tiles(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Grey background crops of the faces' own size."""
    side = tiles.faces.shape[-1]
    crops = random_patches(backgrounds, count, side).mean(dim=1, keepdim=True)
    return pasted_like_faces(crops, backgrounds)


def broken_face_tiles(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Faces upside down, sideways or with their quarters swapped: right texture, wrong layout."""
    faces = drawn(tiles.faces, count)
    breakings = (
        lambda face: face.flip(1),
        lambda face: torch.rot90(face, 1, (1, 2)),
        lambda face: torch.rot90(face, 3, (1, 2)),
        lambda face: face.roll(12, 1),
        lambda face: face.roll(12, 2),
        lambda face: face.roll((12, 12), (1, 2)),
    )
    broken = torch.stack([random.choice(breakings)(face) for face in faces])
    return pasted_like_faces(mirrored(broken), backgrounds)


def invented_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Make backgrounds that no photograph shows: the few there are cover little of the world."""
    kinds = (blended_patches, symmetric_patches, shape_patches, inverted_patches, cloud_patches)
    shares = (0.2, 0.25, 0.3, 0.1, 0.15)
    counts = apportioned(count, shares)
    return torch.cat([kind(tiles, backgrounds, n) for kind, n in zip(kinds, counts, strict=True)])


def blended_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Two backgrounds, one beside or over the other across a straight, hard or soft, border."""
    angles = uniform(count, 0, 2 * torch.pi).reshape(-1, 1, 1)
    centres = torch.linspace(-1, 1, PATCH)
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    offsets = uniform(count, -0.6, 0.6).reshape(-1, 1, 1)
    distances = x * angles.cos() + y * angles.sin() - offsets
    mask = (distances * uniform(count, 0.5, 20).reshape(-1, 1, 1)).sigmoid().unsqueeze(1)
    first, second = random_patches(backgrounds, count), random_patches(backgrounds, count)
    return mask * first + (1 - mask) * second


def symmetric_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Backgrounds mirrored about an upright axis, as symmetry alone makes no face."""
    patches = random_patches(backgrounds, count, LARGEST_PATCH)
    halves = patches[..., : LARGEST_PATCH // 2]
    start = random.randint(0, LARGEST_PATCH - PATCH)
    whole = torch.cat((halves, halves.flip(3)), dim=3)
    return whole[:, :, :PATCH, start : start + PATCH]


def shape_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Ovals and bars of any size and colour, half of them in mirrored pairs, as on badges."""
    patches = random_patches(backgrounds, count)
    centres = torch.arange(PATCH) + 0.5 - PATCH / 2
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    symmetric = (torch.rand(count) < 0.5).reshape(-1, 1, 1)
    x = torch.where(symmetric, x.abs(), x)
    for _ in range(random.randint(2, 9)):
        angles = uniform(count, 0, torch.pi).reshape(-1, 1, 1)
        across, up = (uniform(count, -18, 18).reshape(-1, 1, 1) for _ in range(2))
        along = (x - across) * angles.cos() + (y - up) * angles.sin()
        aside = (y - up) * angles.cos() - (x - across) * angles.sin()
        # Sizes spread evenly over their logarithm: small shapes are as likely as large ones.
        length, breadth = (uniform(count, 0, 2.9).exp().reshape(-1, 1, 1) for _ in range(2))
        oval = ((along / length) ** 2 + (aside / breadth) ** 2).sqrt()
        bar = torch.maximum(along.abs() / length, aside.abs() / breadth)
        reach = torch.where((torch.rand(count) < 0.5).reshape(-1, 1, 1), oval, bar)
        mask = ((1 - reach) * torch.minimum(length, breadth) + 0.5).clamp(0, 1).unsqueeze(1)
        opacity = uniform(count, 0.3, 1).reshape(-1, 1, 1, 1)
        patches = torch.lerp(patches, torch.rand(count, 3, 1, 1), mask * opacity)
    return patches


def inverted_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Backgrounds with light and dark exchanged."""
    return 1 - random_patches(backgrounds, count)


def cloud_patches(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Faces' own spatial frequencies at random places: their blobs without their layout."""
    faces = F.interpolate(drawn(tiles.faces, count), (PATCH, PATCH), mode="bicubic")
    spectrum = torch.fft.rfft2(faces - faces.mean(dim=(2, 3), keepdim=True))
    phases = 2 * torch.pi * torch.rand(spectrum.shape)
    scrambled = torch.polar(spectrum.abs(), phases)
    clouds = torch.fft.irfft2(scrambled, s=(PATCH, PATCH)) + faces.mean(dim=(2, 3), keepdim=True)
    return tinted(clouds.expand(-1, 3, -1, -1).clamp(0, 1))


def partial_faces(tiles: Tiles, backgrounds: Backgrounds, count: int) -> Tensor:
    """Faces off the window's centre or far too large for it, so that detections are sharp."""
    faces = mirrored(drawn(tiles.faces, count))
    angles = uniform(count, 0, 2 * torch.pi)
    enlarged = torch.rand(count) < 0.5
    sizes = torch.where(enlarged, uniform(count, 56, 100), uniform(count, 24, 38))
    distances = torch.where(enlarged, uniform(count, 0, 0.4), uniform(count, 0.45, 0.8)) * sizes
    shifts = distances.unsqueeze(1) * torch.stack((angles.cos(), angles.sin()), dim=1)
    return pasted(faces, random_patches(backgrounds, count), sizes, shifts)


def pasted_like_faces(tiles: Tensor, backgrounds: Backgrounds) -> Tensor:
    """Paste tiles over backgrounds about where, and as large as, faces go."""
    count = len(tiles)
    shifts = torch.stack((uniform(count, -8, 8), uniform(count, -8, 8)), dim=1)
    return pasted(tiles, random_patches(backgrounds, count), uniform(count, 24, 44), shifts)


def pasted(tiles: Tensor, patches: Tensor, sizes: Tensor, shifts: Tensor) -> Tensor:
    """Paste grey tiles into RGB patches at the given sizes and (x, y) shifts, both in pixels.

    A third of the tiles goes on with a rectangular edge, a third with an oval one and a third
    continues by reflection to the patch's border, so that no kind of edge stands for a face.
    """
    count = len(tiles)
    place = tile_coordinates(sizes, shifts, angles=uniform(count, -0.22, 0.22))
    warped = F.grid_sample(
        tiles, place, mode="bicubic", padding_mode="reflection", align_corners=False
    ).clamp(0, 1)
    coloured = tinted(warped.expand(-1, 3, -1, -1))
    x, y = place.unbind(dim=3)
    rectangle = 1 - torch.maximum(x.abs(), y.abs())
    oval = 1 - ((x / 0.92) ** 2 + (y / 1.12) ** 2).sqrt()
    everywhere = torch.ones_like(x)
    edges = torch.stack((rectangle, oval, everywhere), dim=1)
    inside = edges[torch.arange(count), torch.randint(3, (count,))]
    sharpness = uniform(count, 3, 20).reshape(-1, 1, 1)
    mask = (inside * sharpness + 0.5).clamp(0, 1).unsqueeze(1)
    return mask * coloured + (1 - mask) * patches


def tile_coordinates(sizes: Tensor, shifts: Tensor, angles: Tensor) -> Tensor:
    """Return, for every patch pixel, its place in the tile: (N, PATCH, PATCH, 2) in [-1, 1]."""
    half = PATCH / 2
    centres = torch.arange(PATCH) + 0.5 - half
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    offsets = torch.stack((x, y), dim=2) - shifts[:, None, None, :]
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack((cos, -sin, sin, cos), dim=1).reshape(-1, 2, 2)
    # Faces differ in build, and cameras in angle: stretch a little.
    stretch = 1 + torch.stack((uniform(len(sizes), -0.1, 0.1), torch.zeros(len(sizes))), dim=1)
    scaled = offsets * (2 / sizes)[:, None, None, None] * stretch[:, None, None, :]
    return torch.einsum("nhwi,nij->nhwj", scaled, turn)


def photometric(patches: Tensor) -> Tensor:
    """Vary what light and camera would: colour, exposure, shading, sharpness and noise."""
    patches = sometimes(0.4, patches, lambda some: tinted(grey(some)))
    patches = sometimes(0.3, patches, shuffled_channels)
    patches = sometimes(0.5, patches, shaded)
    patches = sometimes(0.7, patches, contrasted)
    patches = sometimes(0.3, patches, lambda some: softened(some, strength=(0.2, 1.0)))
    # LFW's faces are enlarged from 25 pixels; sharpening keeps softness from standing for a face.
    patches = sometimes(0.4, patches, lambda some: softened(some, strength=(-1.2, -0.2)))
    patches = sometimes(0.4, patches, lambda some: some + 0.03 * torch.randn_like(some))
    return patches.clamp(0, 1)


def sometimes(probability: float, patches: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply the change to each patch with the given probability."""
    chosen = torch.rand(len(patches)) < probability
    if not chosen.any():
        return patches
    patches = patches.clone()
    patches[chosen] = change(patches[chosen])
    return patches


def grey(patches: Tensor) -> Tensor:
    """Replace colours by their luma, on all three channels."""
    weights = torch.tensor((0.299, 0.587, 0.114)).reshape(1, 3, 1, 1)
    return (patches * weights).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)


def tinted(patches: Tensor) -> Tensor:
    """Colour patches: half by skin-like warm tints, half by any."""
    count = len(patches)
    warmth = uniform(count, 0, 0.35)
    warm = torch.stack((1 + 0.6 * warmth, 1 - 0.2 * warmth, 1 - warmth), dim=1)
    anyhow = 1 + 0.25 * (2 * torch.rand(count, 3) - 1)
    gains = torch.where((torch.rand(count) < 0.5).unsqueeze(1), warm, anyhow)
    return (patches * gains[:, :, None, None]).clamp(0, 1)


def shuffled_channels(patches: Tensor) -> Tensor:
    """Exchange the colour channels."""
    return patches[:, torch.randperm(3)]


def shaded(patches: Tensor) -> Tensor:
    """Light patches from one side."""
    ramp = torch.linspace(-1, 1, patches.shape[-1])
    slopes = 0.3 * (2 * torch.rand(2, len(patches), 1, 1, 1) - 1)
    light = 1 + slopes[0] * ramp.reshape(1, -1) + slopes[1] * ramp.reshape(-1, 1)
    return (patches * light).clamp(0, 1)


def contrasted(patches: Tensor) -> Tensor:
    """Vary gamma, contrast and brightness."""
    count = len(patches)

    def per_patch(low: float, high: float) -> Tensor:
        return uniform(count, low, high).reshape(-1, 1, 1, 1)

    toned = patches.clamp(1e-3, 1) ** per_patch(-0.5, 0.5).exp()
    centre = toned.mean(dim=(1, 2, 3), keepdim=True)
    return (toned - centre) * per_patch(0.6, 1.5) + centre + per_patch(-0.15, 0.15)


def softened(patches: Tensor, strength: tuple[float, float]) -> Tensor:
    """Mix patches with their blurred selves; a negative strength sharpens."""
    taps = torch.tensor((1.0, 4.0, 6.0, 4.0, 1.0)) / 16
    kernel = torch.outer(taps, taps).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(patches, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    mix = uniform(len(patches), *strength).reshape(-1, 1, 1, 1)
    return (1 - mix) * patches + mix * blurred


def drawn(items: Tensor, count: int) -> Tensor:
    """Draw items at random, with repetition."""
    return items[torch.randint(len(items), (count,))]


def mirrored(tiles: Tensor) -> Tensor:
    """Mirror half of the tiles left to right."""
    return torch.where((torch.rand(len(tiles)) < 0.5)[:, None, None, None], tiles.flip(3), tiles)


def uniform(count: int, low: float, high: float) -> Tensor:
    """Return `count` random numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(count)


def normalised(images: Tensor) -> Tensor:
    """Return images in [0, 1] as the net expects them."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------


def train(tiles: Tiles, backgrounds: Backgrounds, steps: int) -> DemoNet:
    """Return the running average of a net trained on synthesised patches."""
    # On CPUs the channels-last layout halves the time a step takes.
    model = DemoNet().train().to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    hard = random_patches(backgrounds, MINING_KEPT)
    recent: list[float] = []
    for step in range(1, steps + 1):
        patches, targets = training_batch(tiles, backgrounds, hard)
        loss = criterion(window_logits(model, normalised(photometric(patches))), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        recent.append(loss.item())
        update_average(average, model, min(AVERAGE_DECAY, step / (step + 10)))
        if step % MINING_INTERVAL == 0:
            mined = hardest_patches(average, tiles, backgrounds)
            hard = torch.cat((mined, hard))[:HARD_POOL]
            print(f"step {step}/{steps}: loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()
    return average


def training_batch(tiles: Tiles, backgrounds: Backgrounds, hard: Tensor) -> tuple[Tensor, Tensor]:
    """Return patches (BATCH, 3, PATCH, PATCH) in [0, 1] and targets (BATCH, 2)."""
    face_count = round(BATCH * FACE_SHARE)
    rest = BATCH - face_count
    hard_count = round(rest * HARD_SHARE)
    decoy_count = invented_count = (rest - hard_count) // 3
    patches = torch.cat(
        (
            face_patches(tiles, backgrounds, face_count),
            mirrored(drawn(hard, hard_count)),
            decoy_patches(tiles, backgrounds, decoy_count),
            invented_patches(tiles, backgrounds, invented_count),
            random_patches(backgrounds, rest - hard_count - decoy_count - invented_count),
        )
    )
    face_share = torch.zeros(BATCH)
    face_share[:face_count] = 1
    faint_count = round(face_count * FAINT_SHARE)
    mix = uniform(faint_count, 0.3, 1)
    # Faces that fade into a background teach the net to be less sure rather than sure throughout.
    veils = random_patches(backgrounds, faint_count)
    patches[:faint_count] = torch.lerp(veils, patches[:faint_count], mix[:, None, None, None])
    face_share[:faint_count] = mix
    return patches, torch.stack((1 - face_share, face_share), dim=1)


def window_logits(model: DemoNet, patches: Tensor) -> Tensor:
    """Return the logits of the patches' central windows.

    In a dense pass a window's border sees its neighbours where the window alone sees zero
    padding. Two batches in three are scored the first way, the others the second.
    """
    if random.random() < 1 / 3:
        return model(patches[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN])
    return context_logits(model, patches)


def context_logits(model: DemoNet, patches: Tensor) -> Tensor:
    """Return the logits (N, 2) of central windows that see their neighbours."""
    features = model.features(patches)
    margin = MARGIN * features.shape[-1] // PATCH
    return model.classifier(features[:, :, margin:-margin, margin:-margin].flatten(1))


@torch.no_grad()
def hardest_patches(model: DemoNet, tiles: Tiles, backgrounds: Backgrounds) -> Tensor:
    """Return the background patches that look most like faces to the model."""
    candidates = photometric(mining_candidates(tiles, backgrounds))
    logits = context_logits(model, normalised(candidates))
    likeness = logits[:, FACE] - logits[:, BACKGROUND]
    return candidates[likeness.topk(MINING_KEPT).indices]


def mining_candidates(tiles: Tiles, backgrounds: Backgrounds) -> Tensor:
    """Return backgrounds of every kind, `MINING_CANDIDATES` of them."""
    share = MINING_CANDIDATES // 4
    return torch.cat(
        (
            decoy_patches(tiles, backgrounds, share),
            invented_patches(tiles, backgrounds, share),
            random_patches(backgrounds, MINING_CANDIDATES - 2 * share),
        )
    )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of the weights towards the current ones."""
    for mean, current in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(current, 1 - decay)


# --- reports ------------------------------------------------------------------------------------


@torch.no_grad()
def report_held_out_crops(model: DemoNet, tiles: Tiles, backgrounds: Backgrounds) -> None:
    """Print the accuracy on LFW crops and background windows that training never saw."""
    crops = torch.cat((tiles.faces, tiles.others)).expand(-1, 3, -1, -1)
    crops = F.interpolate(crops, (WINDOW, WINDOW), mode="bicubic").clamp(0, 1)
    correct = model(normalised(crops)).argmax(dim=1) == torch.tensor(
        [FACE] * len(tiles.faces) + [BACKGROUND] * len(tiles.others)
    )
    faces, others = correct.split((len(tiles.faces), len(tiles.others)))
    windows = random_patches(backgrounds, 2000)
    rejected = context_logits(model, normalised(windows)).argmax(dim=1) == BACKGROUND
    print(
        f"held-out crops: {correct.sum()}/{len(correct)} right "
        f"(faces {faces.sum()}/{len(faces)}, non-faces {others.sum()}/{len(others)}); "
        f"held-out background windows: {rejected.sum()}/{len(rejected)} right"
    )


def report_photographs(model: DemoNet, scales: Sequence[int]) -> None:
    """Print where the face probability peaks in photographs that training never saw."""
    net = fcvgg.convert(model, preprocess=fcvgg.Preprocess(MEAN, STD), categories=CATEGORIES)
    for name, photograph in report_images():
        peaks = [(*dense_peak(net, photograph, scale), scale) for scale in scales]
        probability, (y, x), scale = max(peaks)
        by_scale = ", ".join(f"{scale}: {peak:.3f}" for peak, _, scale in peaks)
        print(
            f"{name}: peak {probability:.3f} at (y, x) = ({y:.0f}, {x:.0f}) "
            f"of {photograph.height}x{photograph.width}, smaller side {scale} ({by_scale})"
        )


def report_images() -> Iterator[tuple[str, Image.Image]]:
    """Yield the held-out photographs with their names."""
    yield "astronaut", demo_photograph()
    samples = load_sample_images()
    for filename, pixels in zip(samples.filenames, samples.images, strict=True):
        yield Path(filename).name, Image.fromarray(pixels)


def dense_peak(
    net: fcvgg.FullyConvolutional, image: Image.Image, scale: int
) -> tuple[float, tuple[float, float]]:
    """Return the highest face probability of a cell and its centre (y, x) in image pixels."""
    score_map = net.score_map(image, scale=scale)
    faces = score_map.probabilities()[FACE]
    y, x = score_map.geometry.centre_of(*divmod(int(faces.argmax()), faces.shape[1]))
    ratio = min(image.size) / scale
    return float(faces.max()), ((y + 0.5) * ratio - 0.5, (x + 0.5) * ratio - 0.5)


def save_atomically(model: DemoNet, path: Path) -> None:
    """Write the weights beside `path` first, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    partial.write_bytes(save(weights))
    os.replace(partial, path)


if __name__ == "__main__":
    main()
