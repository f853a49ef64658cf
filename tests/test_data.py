"""MNIST's files: split, checked and unpacked once; binarisation and batches that depend on a generator alone."""

import gzip
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A root with archives, checksums and unpacked files, apart from the repository's."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(data.REPOSITORY_DATA / "MNIST", root / "MNIST", ignore=shutil.ignore_patterns("*-ubyte", "*.tmp"))
    load_mnist(root)
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch):
    """A root of links to whole files: a test replaces the one it is about."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (whole / "MNIST" / "raw").iterdir():
        (raw / file.name).symlink_to(file)
    return tmp_path / "root"


def replace(file, content):
    file.unlink()
    file.write_bytes(content)


def one_line(root):
    with pytest.raises(DataError) as caught:
        load_mnist(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mnist_is_split_into_50k_10k_10k_bytes_with_labels(mnist):
    for part, size in zip(mnist, (50_000, 10_000, 10_000), strict=True):
        assert part.images.shape == (size, 784) and part.images.dtype == torch.uint8
        assert part.labels.shape == (size,) and part.labels.dtype == torch.int64
    train, valid, test = mnist
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    counts = train.labels.bincount() + valid.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_the_split_is_torchvisions_files_in_their_order(mnist, whole):
    published, (train, valid, test) = MNIST(whole, train=True), mnist
    assert torch.equal(torch.cat([train.images, valid.images]), published.data.flatten(1))
    assert torch.equal(torch.cat([train.labels, valid.labels]), published.targets)
    assert torch.equal(test.images, MNIST(whole, train=False).data.flatten(1))


def test_annealed_data_names_the_root(root, monkeypatch, mnist):
    monkeypatch.setenv("ANNEALED_DATA", str(root))
    assert torch.equal(load_mnist()[2].labels, mnist[2].labels)
    monkeypatch.setenv("ANNEALED_DATA", str(root / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        load_mnist()


def test_a_root_that_torchvision_has_unpacked_needs_no_archives(root):
    for file in (root / "MNIST" / "raw").iterdir():
        if file.suffix == ".gz" or file.name == "SHA256SUMS":
            file.unlink()
    assert len(load_mnist(root)[0].images) == 50_000


@pytest.mark.parametrize("damage", [altered, truncated], ids=["altered", "truncated"])
@pytest.mark.parametrize("unpacked", [True, False])
def test_a_damaged_archive_is_named_with_both_checksums(root, damage, unpacked):
    archive = root / "MNIST" / "raw" / f"{LABELS}.gz"
    content = archive.read_bytes()
    replace(archive, damage(content))
    if not unpacked:
        (archive.parent / LABELS).unlink()
    message = one_line(root)
    assert message.startswith(f"{archive}: expected SHA-256 {sha256(content)}, found {sha256(damage(content))}")
    assert "delete it" in message and f"torchvision.datasets.MNIST({str(root)!r}, download=True)" in message


@pytest.mark.parametrize("damage", [altered, truncated, other], ids=["altered", "truncated", "other"])
def test_a_damaged_archive_is_found_without_checksums_beside_it(root, damage):
    raw = root / "MNIST" / "raw"
    replace(raw / f"{LABELS}.gz", damage((raw / f"{LABELS}.gz").read_bytes()))
    (raw / "SHA256SUMS").unlink()
    (raw / LABELS).unlink()
    message = one_line(root)
    assert message.startswith(f"{raw / LABELS}.gz: ") and data.SHA256[LABELS] in message
    assert not (raw / LABELS).exists()


@pytest.mark.parametrize("damage", [altered, truncated], ids=["altered", "truncated"])
def test_a_damaged_unpacked_file_is_named_and_deleting_it_is_the_way_out(root, damage, mnist):
    file = root / "MNIST" / "raw" / LABELS
    found = damage(file.read_bytes())
    replace(file, found)
    assert one_line(root).startswith(f"{file}: expected SHA-256 {data.SHA256[LABELS]}, found {sha256(found)}; delete")
    file.unlink()
    assert torch.equal(load_mnist(root)[2].labels, mnist[2].labels)


def test_a_missing_file_is_named_with_the_ways_out(root):
    raw = root / "MNIST" / "raw"
    (raw / LABELS).unlink()
    (raw / f"{LABELS}.gz").unlink()
    message = one_line(root)
    assert message.startswith(
        f"{raw / LABELS}.gz: expected SHA-256 {data.SHA256[LABELS]} (unpacked), found no such file"
    )
    assert "ANNEALED_DATA" in message and "download=True" in message


def test_without_a_clone_no_error_says_to_write_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "REPOSITORY_DATA", tmp_path / "lib" / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ANNEALED_DATA", raising=False)
    message = one_line(None)
    assert "ANNEALED_DATA" in message and f"MNIST({str(tmp_path / 'cache' / 'annealed')!r}" in message


def test_archives_as_torchvision_downloads_them_are_accepted_beside_our_checksums(root, monkeypatch):
    archive = root / "MNIST" / "raw" / f"{LABELS}.gz"
    published = gzip.compress(gzip.decompress(archive.read_bytes()), compresslevel=1)
    replace(archive, published)
    one_line(root)
    monkeypatch.setattr(MNIST, "resources", [(archive.name, hashlib.md5(published).hexdigest())])
    assert len(load_mnist(root)[2].labels) == 10_000


def test_a_folder_that_cannot_be_written_is_unpacked_in_the_cache(root, tmp_path, monkeypatch):
    raw = root / "MNIST" / "raw"
    (raw / LABELS).unlink()
    before, write = sorted(raw.iterdir()), data._write

    def write_outside(file: Path, content: bytes, forbidden: str = str(root)) -> None:
        if str(file).startswith(forbidden):
            raise PermissionError(13, "Permission denied", str(file))
        write(file, content)

    monkeypatch.setattr(data, "_write", write_outside)
    assert len(load_mnist(root)[2].labels) == 10_000
    assert sorted(raw.iterdir()) == before
    assert sorted(file.name for file in (tmp_path / "cache/annealed/MNIST/raw").iterdir()) == sorted(data.SHA256)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(data, "_write", lambda file, content: write_outside(file, content, str(tmp_path)))
    assert "Permission denied" in one_line(root)


def test_two_processes_unpack_at_once_and_leave_nothing_behind(root):
    raw = root / "MNIST" / "raw"
    for name in data.SHA256:
        (raw / name).unlink()
    code = "import sys; from annealed_core.running import data; print(data.load_mnist(sys.argv[1])[0].images.sum())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(root)], **pipes) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    assert results[0] == results[1] and results[0][1] == b"" and b"tensor" in results[0][0]
    archives = [f"{name}.gz" for name in data.SHA256]
    assert {file.name for file in raw.iterdir()} == {*data.SHA256, *archives, "SHA256SUMS"}


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


def test_wrong_arguments_are_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        batches(torch.zeros(2, 784, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match=r"images must be uint8 with pixels 0 to 255, not torch\.float32"):
        binarise(torch.zeros(2, 784))
