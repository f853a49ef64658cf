"""MNIST: the images shipped in `data/`, their binarisation, and batches that stay in memory.

The files are checked at every load against the checksums of the published ones, and images are kept as `uint8`.
A likelihood is only ever taken of *binarised* images: training images are drawn afresh from Bernoulli(pixel / 255) each
time they are visited (Salakhutdinov & Murray 2008), validation and test images once with a fixed seed.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Checksums of the published files, unpacked; archives of the same content may differ."""

TRAIN_SIZE = 50_000
REPOSITORY_DATA = Path(__file__).resolve().parents[2] / "data"


class DataError(RuntimeError):
    """A data file is missing, truncated or altered; the message is one line with the file and the way out."""


class Images(NamedTuple):
    """Images with their labels: `images` is uint8 (N, 784) with pixels 0 to 255, `labels` is int64 (N,) from 0 to 9."""

    images: Tensor
    labels: Tensor


def load_mnist(root: str | Path | None = None) -> tuple[Images, Images, Images]:
    """Training, validation and test images: 50,000, 10,000 and 10,000.

    The first 50,000 and the last 10,000 images of MNIST's training file, and its test file, in their order. `root` is a
    folder with `MNIST/raw/` in it, where the four files are, each as a gzip archive or unpacked; by default
    `$ANNEALED_DATA`, else the repository's `data/`, else `$XDG_CACHE_HOME/annealed` (`~/.cache/annealed`).

    Raises `DataError` for a file that is missing, truncated or altered.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "annealed")
    default = REPOSITORY_DATA if REPOSITORY_DATA.is_dir() else cache
    folder = Path(os.path.expanduser(root or os.environ.get("ANNEALED_DATA") or default))
    images, labels, test_images, test_labels = (_read(folder, name) for name in SHA256)
    return (
        Images(images[:TRAIN_SIZE], labels[:TRAIN_SIZE]),
        Images(images[TRAIN_SIZE:], labels[TRAIN_SIZE:]),
        Images(test_images, test_labels),
    )


def _read(root: Path, name: str) -> Tensor:
    """Images uint8 (N, 784), or labels int64 (N,), from a file in the format IDX: a header, and a byte for a number."""
    archive, unpacked = root / "MNIST" / "raw" / f"{name}.gz", root / "MNIST" / "raw" / name
    file = unpacked if unpacked.exists() and not archive.exists() else archive
    content = b""
    try:
        content = gzip.decompress(file.read_bytes()) if file == archive else file.read_bytes()
        found = hashlib.sha256(content).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        found = f"no whole file ({getattr(error, 'strerror', None) or error})"
    if found != SHA256[name]:
        raise DataError(
            f"{file}: expected SHA-256 {SHA256[name]} (unpacked), found {found}; put that of the repository's data/ in "
            "its place, point ANNEALED_DATA to another folder with MNIST/raw, or delete it and call, with a network, "
            f"torchvision.datasets.MNIST({str(root)!r}, download=True)"
        )
    is_images = "images" in name
    numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16 if is_images else 8)
    return numbers.view(-1, 784) if is_images else numbers.long()


def binarise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw from Bernoulli(pixel / 255) for each pixel of uint8 `images` (…, 784): float32 of that shape, 0 or 1.

    A uniform integer among the 255 values 0 to 254 is smaller than the pixel with exactly that probability. All
    randomness comes from `generator`, which may live on another device than the images, or else from torch's global
    generator. Raises `ValueError` for images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 with pixels 0 to 255, not {images.dtype}")
    device = images.device if generator is None else generator.device
    uniform = torch.randint(255, images.shape, dtype=torch.uint8, generator=generator, device=device)
    return (uniform.to(images.device) < images).float()


def fixed_binarisation(images: Tensor, seed: int) -> Tensor:
    """The one draw of `binarise` that belongs to `seed`, whatever the device and the state of other generators."""
    return binarise(images, torch.Generator().manual_seed(seed))


def batches(
    images: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    shuffled: bool = True,
    binary: bool = True,
) -> Iterator[Tensor]:
    """One epoch: every image of uint8 `images` (N, 784) once, shuffled and freshly binarised.

    Not `shuffled`, they come in their order; not `binary`, as grey values from 0 to 1: both only to show what it does.

    Yields float32 (batch_size, 784); the last batch has what is left, N modulo `batch_size`, if that is not zero.
    Order and pixels depend on nothing but the state of `generator` (or of torch's global one): whoever saves that state
    before an epoch can repeat it exactly.

    Raises `ValueError` for a `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device = images.device if generator is None else generator.device
    order = torch.randperm(len(images), generator=generator, device=device).to(images.device)
    if not shuffled:
        order = torch.arange(len(images), device=images.device)
    return (
        binarise(chosen, generator) if binary else chosen.float() / 255
        for chosen in (images.index_select(0, some) for some in order.split(batch_size))
    )
