"""MNIST's files: split and checked; binarisation and batches that depend on a generator alone."""

import gzip
import hashlib
import shutil

import pytest
import torch
from torchvision.datasets import MNIST

from annealed_core.running import data
from annealed_core.running.data import DataError, batches, binarise, fixed_binarisation, load_mnist

LABELS = "t10k-labels-idx1-ubyte"
# of fixed_binarisation(test images[:1000], seed=3) as uint8
FIXED_SHA256 = "c538edaea5b3bd2bb5a77de669e3858b14871696f53ae34b179a4bcda180352b"
altered = lambda content: content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
truncated = lambda content: content[:2000]
other = lambda content: gzip.compress(b"other content")
sha256 = lambda content: hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def mnist():
    return load_mnist()


@pytest.fixture
def raw(tmp_path):
    """A folder with the archives, which the test has to itself."""
    shutil.copytree(data.REPOSITORY_DATA / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    return tmp_path / "MNIST" / "raw"


def test_mnist_is_split_into_50k_10k_10k_bytes_with_labels(mnist):
    for part, size in zip(mnist, (50_000, 10_000, 10_000), strict=True):
        assert part.images.shape == (size, 784) and part.images.dtype == torch.uint8
        assert part.labels.shape == (size,) and part.labels.dtype == torch.int64
    train, valid, test = mnist
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    counts = train.labels.bincount() + valid.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_unpacked_files_will_do_and_are_split_in_torchvisions_order(raw, mnist, tmp_path):
    for name in data.SHA256:
        (raw / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
        (raw / f"{name}.gz").unlink()
    published, (train, valid, test) = MNIST(tmp_path, train=True), load_mnist(tmp_path)
    assert torch.equal(torch.cat([train.images, valid.images]), published.data.flatten(1))
    assert torch.equal(torch.cat([train.labels, valid.labels]), published.targets)
    assert torch.equal(test.images, MNIST(tmp_path, train=False).data.flatten(1))
    assert torch.equal(test.images, mnist[2].images)


def test_annealed_data_names_the_root(raw, tmp_path, monkeypatch, mnist):
    monkeypatch.setenv("ANNEALED_DATA", str(tmp_path))
    assert torch.equal(load_mnist()[2].labels, mnist[2].labels)
    monkeypatch.setenv("ANNEALED_DATA", str(raw / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        load_mnist()


def refusal(root):
    with pytest.raises(DataError) as caught:
        load_mnist(root)
    message = str(caught.value)
    assert "\n" not in message and "repository's data/" in message and "ANNEALED_DATA" in message
    assert f"torchvision.datasets.MNIST({str(root)!r}, download=True)" in message
    return message


@pytest.mark.parametrize("damage", [altered, truncated, other], ids=["altered", "truncated", "other"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_file_is_named_with_its_checksum_and_the_ways_out(raw, tmp_path, damage, packed):
    archive = raw / f"{LABELS}.gz"
    damaged = damage(archive.read_bytes() if packed else gzip.decompress(archive.read_bytes()))
    file = archive if packed else raw / LABELS
    archive.unlink()
    file.write_bytes(damaged)
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: expected SHA-256 {data.SHA256[LABELS]} (unpacked), found ")
    assert packed or sha256(damaged) in message


def test_a_missing_file_is_named_with_the_ways_out(raw, tmp_path):
    (raw / LABELS).unlink(missing_ok=True)
    (raw / f"{LABELS}.gz").unlink()
    assert refusal(tmp_path).startswith(f"{raw / LABELS}.gz: ") and "No such file" in refusal(tmp_path)


def test_archives_of_the_same_content_as_torchvision_downloads_them_will_do(raw, tmp_path):
    archive = raw / f"{LABELS}.gz"
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()), compresslevel=1))
    assert len(load_mnist(tmp_path)[2].labels) == 10_000


def test_without_a_clone_files_are_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "REPOSITORY_DATA", tmp_path / "lib" / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ANNEALED_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load_mnist()
    assert f"MNIST({str(tmp_path / 'cache' / 'annealed')!r}" in str(caught.value)


def test_pixels_are_drawn_with_probability_pixel_over_255():
    n = 40_000
    pixels = torch.arange(256, dtype=torch.uint8).expand(n, 256)
    drawn = binarise(pixels, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and drawn.shape == pixels.shape
    assert torch.all((drawn == 0) | (drawn == 1))
    probability = torch.arange(256) / 255
    z_scores = (drawn.mean(0) - probability) / (probability * (1 - probability) / n).sqrt().clamp_min(1e-9)
    assert z_scores.abs().max() < 5 and z_scores[[0, 255]].tolist() == [0, 0]


def test_every_draw_is_fresh_and_comes_from_the_generator_alone(mnist):
    images = mnist[0].images[:100]
    torch.manual_seed(0)
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(1)
    first, second = binarise(images, generator), binarise(images, generator)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, binarise(images, torch.Generator().manual_seed(1)))


def test_the_fixed_binarisation_depends_on_its_seed_alone(mnist):
    images = mnist[2].images[:1000]
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), fixed_binarisation(images, seed=3)
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(first, fixed_binarisation(images, seed=4))
    # The same bits on every machine, or else results could not be compared.
    assert sha256(first.to(torch.uint8).numpy().tobytes()) == FIXED_SHA256


def test_an_epoch_shows_every_image_once_and_keeps_the_rest():
    # 130 images of one full pixel each survive binarisation as they are, and tell which one they are.
    images = torch.zeros(130, 784, dtype=torch.uint8)
    images[torch.arange(130), torch.arange(130)] = 255
    seen = list(batches(images, 64, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in seen] == [64, 64, 2]
    order = torch.cat(seen).argmax(1)
    assert sorted(order.tolist()) == list(range(130)) != order.tolist()
    assert torch.equal(torch.cat(seen).sum(1), torch.ones(130))


def test_the_generator_state_at_its_beginning_is_all_an_epoch_depends_on(mnist):
    images, generator = mnist[0].images[:300], torch.Generator().manual_seed(0)
    list(batches(images, 64, generator))
    state = generator.get_state()
    second = torch.cat(list(batches(images, 64, generator)))
    assert not torch.equal(second, torch.cat(list(batches(images, 64, generator))))
    generator.set_state(state)
    torch.manual_seed(99)
    assert torch.equal(torch.cat(list(batches(images, 64, generator))), second)


def test_images_that_are_no_bytes_are_refused():
    with pytest.raises(ValueError, match=r"images must be uint8 with pixels 0 to 255, not torch\.float32"):
        binarise(torch.zeros(2, 784))
