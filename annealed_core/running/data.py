"""MNIST: the images shipped in `data/`, their binarisation, and batches that stay in memory.

The images are unpacked once, checked at every load against the checksums of the published files, and kept as `uint8`.
A likelihood is only ever taken of *binarised* images: training images are drawn afresh from Bernoulli(pixel / 255) each
time they are visited (Salakhutdinov & Murray 2008), validation and test images once with a fixed seed.
"""

import gzip
import hashlib
import os
import tempfile
import uuid
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
    folder with `MNIST/raw/` in it, by default `$ANNEALED_DATA`, else the repository's `data/`, else the cache, which is
    `$XDG_CACHE_HOME/annealed` (`~/.cache/annealed`). Archives are unpacked there once, or in the cache where the folder
    cannot be written.

    Raises `DataError` for a file that is missing, truncated or altered.
    """
    default = REPOSITORY_DATA if REPOSITORY_DATA.is_dir() else _cache()
    root = Path(os.path.expanduser(root or os.environ.get("ANNEALED_DATA") or default))
    _check_archives(root)
    unpacked = _unpack(root)

    from torchvision.datasets import MNIST  # slow to import, and needed only here

    train, test = (MNIST(unpacked, train=train, download=False) for train in (True, False))
    images, labels = train.data.flatten(1), train.targets
    return (
        Images(images[:TRAIN_SIZE], labels[:TRAIN_SIZE]),
        Images(images[TRAIN_SIZE:], labels[TRAIN_SIZE:]),
        Images(test.data.flatten(1), test.targets),
    )


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


def _check_archives(root: Path) -> None:
    """Hold the archives that are present against the SHA256SUMS beside them, where there is one."""
    folder = _raw(root)
    if not (folder / "SHA256SUMS").is_file():
        return
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, _, name = line.partition(" ")
        archive = folder / name.strip().lstrip("*")
        if archive.is_file() and (found := _sha256(archive.read_bytes())) != expected and not _is_published(archive):
            raise _error(root, archive, expected, found)


def _is_published(archive: Path) -> bool:
    """Whether these are the bytes that torchvision downloads: its way out leaves them where ours have been."""
    from torchvision.datasets import MNIST

    return hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() == dict(MNIST.resources).get(
        archive.name
    )


def _unpack(root: Path) -> Path:
    """The root where all four files lie unpacked and whole: `root` itself, or the cache if that cannot be written."""
    cache = _cache()
    for target in (root, cache):
        try:
            for name, expected in SHA256.items():
                file = _raw(target) / name
                if not file.exists():
                    _write(file, _read_archive(root, name))
                if (found := _sha256(file.read_bytes())) != expected:
                    raise _error(root, file, expected, found)
            return target
        except OSError as error:
            reason = error
    raise DataError(f"{_raw(root)} cannot be unpacked, neither there nor in {_raw(cache)}: {reason}") from reason


def _read_archive(root: Path, name: str) -> bytes:
    archive = _raw(root) / f"{name}.gz"
    if not archive.is_file():
        raise _error(root, archive, f"{SHA256[name]} (unpacked)", "no such file")
    try:
        content = gzip.decompress(archive.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _error(root, archive, f"{SHA256[name]} (unpacked)", f"no whole archive ({error})") from error
    if (found := _sha256(content)) != SHA256[name]:
        raise _error(root, archive, f"{SHA256[name]} (unpacked)", found)
    return content


def _write(file: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees a part of it, even with several processes at it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _error(root: Path, file: Path, expected: str, found: str) -> DataError:
    if not file.exists():
        way_out = "copy it from the repository's data/, or point ANNEALED_DATA to a folder with MNIST/raw"
    elif file.suffix == ".gz":
        way_out = "delete it and copy it again from the repository's data/"
    else:
        way_out = "delete it, and it is unpacked again from its archive"
    download = f"torchvision.datasets.MNIST({str(root)!r}, download=True)"
    return DataError(f"{file}: expected SHA-256 {expected}, found {found}; {way_out}, or with a network {download}")


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(tempfile.gettempdir() if folder.startswith("~") else folder) / "annealed"  # there may be no home


def _raw(root: Path) -> Path:
    return root / "MNIST" / "raw"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
