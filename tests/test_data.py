"""The data: files that are not what they should be, one's own images, the range of the pixels, and the real thing where it is at hand."""
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ddpm_tutorial.data import (CLASSES, RAW_FILES, DataError, ImageData, batches, check_raw_files, default_data_root, full_or_tiny, hold_out,
                                image_grid, load_data, load_fashion_mnist, load_images, load_sample, to_float, to_pil, to_uint8)

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def random_images(n=6, height=9, width=11, channels=None, seed=0):
    "As numpy: uint8 (n, H, W) or (n, H, W, C). Neither square nor a multiple of anything."
    shape = (n, height, width) if channels is None else (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_tensor(images): return torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)


def save_folder(folder, images, classes=("",), ending="png"):
    "Image i goes into class i modulo their number."
    for i, image in enumerate(images):
        (folder/classes[i % len(classes)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder/classes[i % len(classes)]/f"{i:03}.{ending}")
    return folder


def save_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def indexed(n):
    "Images that carry their own number."
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8)
    return ImageData(images, torch.arange(n) % 10, CLASSES)


def raw_folder(root):
    raw = Path(root)/"FashionMNIST"/"raw"
    raw.mkdir(parents=True)
    return raw


@pytest.fixture
def offline(monkeypatch):
    "Nothing is downloaded: whoever tries gets what a machine without a network gets."
    class NoNetwork:
        def __init__(self, root, train=True, download=False): raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", NoNetwork)


# --- the published files -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage, message", [
    (None, None),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"b has 999 bytes instead of 1,000; delete it and run again"),
    (lambda file: file.write_bytes(file.read_bytes() + b"x"), "b has 1,001 bytes"),
    (lambda file: file.write_bytes(b"y" + file.read_bytes()[1:]), r"b is not the published file \(its md5 differs\); delete it"),
    (lambda file: file.write_bytes(HTML), "b has 54 bytes"),
    (lambda file: file.write_bytes(HTML.ljust(1000)), "b is not the published file"),
    (lambda file: file.write_bytes(b""), "b has 0 bytes"),
    (lambda file: file.unlink(), "b is missing"),
], ids=["whole", "truncated", "longer", "one byte altered", "HTML page", "HTML page of the right size", "empty", "missing"])
def test_check_raw_files(tmp_path, damage, message):
    "A damaged file is named, whatever the damage; whole files pass."
    for name in "abc": (tmp_path/name).write_bytes(name.encode()*1000)
    expected = {name: (1000, hashlib.md5(name.encode()*1000).hexdigest()) for name in "abc"}
    if damage is None: return check_raw_files(tmp_path, expected)
    damage(tmp_path/"b")
    with pytest.raises(DataError, match=message): check_raw_files(tmp_path, expected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_loading_checks_the_files_first(tmp_path, split, offline):
    "Files of the right names and sizes and of zeros only: an error, not images."
    raw = raw_folder(tmp_path)
    for name, (size, _) in RAW_FILES.items():
        with open(raw/name, "wb") as file: file.truncate(size)
    with pytest.raises(DataError, match="md5 differs"): load_fashion_mnist(tmp_path, split)
    (raw/"t10k-labels-idx1-ubyte").write_bytes(HTML)
    (raw/"train-images-idx3-ubyte").write_bytes(HTML)
    with pytest.raises(DataError, match="train-images-idx3-ubyte has 54 bytes"): load_fashion_mnist(tmp_path, split)


@pytest.mark.parametrize("missing", RAW_FILES)
def test_missing_file_without_a_network(tmp_path, missing, offline):
    "Names the files, the folder and where they are to be had; the files that were there stay, and no half download."
    raw = raw_folder(tmp_path)
    for name in RAW_FILES:
        if name != missing: (raw/name).write_bytes(b"mine")
    with pytest.raises(DataError) as caught: load_fashion_mnist(tmp_path)
    assert all(word in str(caught.value) for word in (*RAW_FILES, str(raw), "github.com/zalandoresearch/fashion-mnist", "DDPM_DATA_ROOT"))
    assert {file.name: file.read_bytes() for file in raw.iterdir()} == {name: b"mine" for name in RAW_FILES if name != missing}
    assert [entry.name for entry in tmp_path.iterdir()] == ["FashionMNIST"]


def test_bad_download_is_not_kept(tmp_path, monkeypatch):
    "A server that answers with a web page: an error, and nothing is put where the data are looked for."
    class Page:
        def __init__(self, root, train=True, download=False):
            raw = raw_folder(root)
            for name in RAW_FILES: (raw/name).write_bytes(HTML)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Page)
    with pytest.raises(DataError, match="not the published data"): load_fashion_mnist(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_default_root(monkeypatch, tmp_path, offline):
    "`DDPM_DATA_ROOT`, or `data` where it is unset or empty; loading looks there, and an argument goes before it."
    monkeypatch.delenv("DDPM_DATA_ROOT", raising=False)
    assert default_data_root() == Path("data")
    monkeypatch.setenv("DDPM_DATA_ROOT", "")
    assert default_data_root() == Path("data")
    monkeypatch.setenv("DDPM_DATA_ROOT", str(tmp_path/"here"))
    assert default_data_root() == tmp_path/"here"
    with pytest.raises(DataError, match=str(tmp_path/"here")): load_fashion_mnist()
    with pytest.raises(DataError, match=str(tmp_path/"there")): load_fashion_mnist(tmp_path/"there")
    with pytest.raises(ValueError, match="split must be"): load_fashion_mnist(tmp_path, "validation")


def test_real_fashion_mnist():
    "All 70,000: count, mean, standard deviation, and every bundled image is one of them, with the same label."
    root = os.environ.get("DDPM_DATA_ROOT")
    if not root or not (Path(root)/"FashionMNIST"/"raw").is_dir():
        pytest.skip("the real Fashion-MNIST is not at hand: set DDPM_DATA_ROOT to the folder that holds FashionMNIST/raw")
    for split, count in (("train", 60_000), ("test", 10_000)):
        data = load_fashion_mnist(split=split)
        assert data.images.shape == (count, 1, 28, 28) and data.classes == CLASSES
        assert torch.equal(data.labels.bincount(), torch.full((10,), count//10))
        if split == "train":
            pixels = data.images.double()
            assert abs(pixels.mean().item() - 72.940) < 5e-4 and abs(pixels.std().item() - 90.021) < 5e-4
        real = set(zip((image.numpy().tobytes() for image in data.images), data.labels.tolist()))
        sample = load_sample(split)
        bundled = list(zip((image.numpy().tobytes() for image in sample.images), sample.labels.tolist()))
        assert len(set(bundled)) == len(bundled) and set(bundled) <= real


# --- the bundled sample, batches, pixels ---------------------------------------------------------------------------

def test_bundled_sample():
    "100 and 20 images of each class, no image in both."
    train, test = load_sample("train"), load_sample("test")
    for data, each in ((train, 100), (test, 20)):
        assert data.images.shape == (10*each, 1, 28, 28) and data.images.dtype == torch.uint8 and data.classes == CLASSES
        assert torch.equal(data.labels.bincount(), torch.full((10,), each))
    assert not {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}
    with pytest.raises(ValueError, match="split must be"): load_sample("validation")


def test_pixel_range():
    "0 ... 255 to -1 ... 1 and back, all 256 values; what lies outside becomes black or white; nothing is scaled twice."
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_float(pixels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.allclose(x, torch.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    assert torch.equal(to_uint8(x), pixels) and torch.equal(to_uint8(x.bfloat16()).float() > 127, pixels > 127)
    assert to_uint8(torch.tensor([-5., -1.001, 1.001, 5.])).tolist() == [0, 0, 255, 255]
    assert to_uint8(torch.tensor([0.4, 0.6])/127.5 - 1).tolist() == [0, 1]          # rounded, not cut off
    with pytest.raises(TypeError, match="uint8"): to_float(x)


def test_batches():
    "Each image once, with its own label, in an order that the generator decides; `start` goes on within the epoch."
    data = indexed(50)
    run = lambda seed, **kwargs: list(batches(data, 20, generator=torch.Generator().manual_seed(seed), **kwargs))
    whole = run(0)
    assert [len(x) for x, _ in whole] == [20, 20, 10]
    numbers, labels = to_uint8(torch.cat([x for x, _ in whole]))[:, 0, 0, 0].long(), torch.cat([labels for _, labels in whole])
    assert torch.equal(numbers.sort().values, torch.arange(50)) and not torch.equal(numbers, torch.arange(50))
    assert torch.equal(labels, numbers % 10)
    assert all(x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 for x, _ in whole)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(run(0, start=1), whole[1:], strict=True))
    assert not torch.equal(run(1)[0][0], whole[0][0])


def test_hold_out():
    "No image in both parts, none lost, always the same ones, not simply the first; labels go with their images."
    data = indexed(60)
    rest, held = hold_out(data, 15)
    assert (len(rest), len(held)) == (45, 15)
    numbers = [part.images[:, 0, 0, 0].long() for part in (rest, held)]
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(60))
    assert not torch.equal(numbers[1].sort().values, torch.arange(15))
    assert all(torch.equal(part.labels, number % 10) for part, number in zip((rest, held), numbers))
    torch.manual_seed(99)
    assert torch.equal(hold_out(data, 15)[1].images, held.images)
    assert torch.equal(hold_out(data, 20)[1].images[:15], held.images)
    for n in (0, 60, -1):
        with pytest.raises(DataError, match="cannot hold out"): hold_out(data, n)


def test_load_data(tmp_path):
    "The bundled sample by its name; one's own images by their path, with a tenth held out."
    train, validation = load_data("sample")
    assert (len(train), len(validation)) == (1000, 200)
    path = save_npz(tmp_path/"own.npz", images=random_images(40))
    train, validation = load_data(str(path))
    assert (len(train), len(validation)) == (36, 4)
    with pytest.raises(DataError, match="neither a folder nor an .npz file"): load_data("fashion-mnist")


def test_image_data_fits_together():
    "Wrong types, shapes, sizes and labels are errors; slices and indices keep images and labels together."
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 9])
    for bad, message in (((images.float(), labels), "must be uint8"), ((images[0], labels), "must be uint8"), ((images[:2], labels), "2 images need"),
                         ((images[..., :7], labels), "smallest size is 8"), ((images[:0], labels[:0]), "no images"),
                         ((images, labels.int()), "int64"), ((images, labels + 1), "must be in 0 ... 9"), ((images, labels - 1), "must be in 0 ... 9")):
        with pytest.raises(DataError, match=message): ImageData(*bad, CLASSES)
    with pytest.raises(DataError, match="must be in 0 ... 0"): ImageData(images, labels, ())
    assert ImageData(images, labels, CLASSES)[1:].labels.tolist() == [1, 9]
    assert ImageData(images, labels, CLASSES)[torch.tensor([2, 0])].labels.tolist() == [9, 0]


def test_image_grid(tmp_path):
    "Each image at its place, enlarged pixel by pixel; what Pillow saves is what was drawn."
    images = as_tensor(random_images(3, 8, 10))
    grid = image_grid(images, columns=2, scale=2)
    assert grid.shape == (3, 2*(16 + 2) + 2, 2*(20 + 2) + 2) and torch.equal(grid[0], grid[2])
    assert torch.equal(grid[0, 20:36:2, 2:22:2], images[2, 0])
    assert torch.equal(image_grid(to_float(images), columns=2, scale=2), grid)
    for channels in (1, 3):
        to_pil(grid[:channels]).save(tmp_path/"grid.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path/"grid.png")), grid[:channels].permute(1, 2, 0).numpy().squeeze())


def test_full_or_tiny(monkeypatch):
    "Full for a reader, tiny in a test."
    for name in ("DDPM_TINY", "IN_TEST"): monkeypatch.delenv(name, raising=False)
    assert full_or_tiny("full", "tiny") == "full"
    monkeypatch.setenv("DDPM_TINY", "0")
    assert full_or_tiny("full", "tiny") == "full"
    monkeypatch.setenv("DDPM_TINY", "1")
    assert full_or_tiny("full", "tiny") == "tiny"


# --- one's own images -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("ending", ["png", "BMP"])
def test_folder(tmp_path, channels, ending):
    "Grey stays grey, colour stays colour, pixel for pixel; sub-folders are the classes, in alphabetical order."
    images = random_images(channels=channels)
    flat = load_images(save_folder(tmp_path/"flat", images, ending=ending))
    assert torch.equal(flat.images, as_tensor(images)) and flat.classes == () and not flat.labels.any()
    save_folder(tmp_path/"sorted", images, ("shoe", "bag", "hat"), ending)
    (tmp_path/"sorted"/".hidden").mkdir()
    (tmp_path/"sorted"/"bag"/"notes.txt").write_text("not an image")
    data = load_images(str(tmp_path/"sorted"))
    assert data.classes == ("bag", "hat", "shoe") and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(data.images, as_tensor(images[[1, 4, 2, 5, 0, 3]]))


def test_folder_with_a_palette(tmp_path):
    "Another way to write the same colours."
    grey = random_images(1)[0]
    (tmp_path/"palette").mkdir()
    Image.fromarray(grey).convert("P").save(tmp_path/"palette"/"a.png")
    assert torch.equal(load_images(tmp_path/"palette").images, as_tensor(grey[None]).expand(1, 3, 9, 11))


def test_pixels_that_would_lose_something_are_refused(tmp_path):
    "16-bit grey would be cut off at 255, transparency would be dropped: the error names the file and what to save instead."
    rgba, deep = tmp_path/"rgba"/"a.png", tmp_path/"deep"/"b.png"
    for file in (rgba, deep): file.parent.mkdir()
    Image.fromarray(random_images(1, channels=4)[0]).save(rgba)
    Image.fromarray(random_images(1)[0].astype(np.uint16)*257).save(deep)
    for file in (rgba, deep):
        with pytest.raises(DataError, match=f"{file.name}.*8-bit grey"): load_images(file.parent)


def test_bad_folders(tmp_path):
    "The file that does not fit is named: another size, other channels, a web page, half a file; and an empty folder."
    images = random_images()
    for name, spoil in (("size", lambda file: Image.fromarray(images[0, :8]).save(file)),
                        ("channels", lambda file: Image.fromarray(random_images(1, channels=3)[0]).save(file)),
                        ("page", lambda file: file.write_bytes(HTML)),
                        ("half", lambda file: file.write_bytes(file.read_bytes()[:60])),
                        ("nothing", lambda file: file.write_bytes(b""))):
        folder = save_folder(tmp_path/name, images)
        spoil(folder/"003.png")
        with pytest.raises(DataError, match=r"003\.png"): load_images(folder)
    (tmp_path/"empty").mkdir()
    with pytest.raises(DataError, match="holds no images"): load_images(tmp_path/"empty")
    with pytest.raises(DataError, match="smallest size is 8"): load_images(save_folder(tmp_path/"small", random_images(2, 7, 20)))
    with pytest.raises(DataError, match="neither a folder nor"): load_images(tmp_path/"not there")


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz(tmp_path, channels):
    "By either pair of names, with or without labels and the classes' names."
    images, labels = random_images(channels=channels), np.array([0, 2, 1, 1, 0, 2], dtype=np.int32)
    plain = load_images(save_npz(tmp_path/"a.npz", images=images))
    assert torch.equal(plain.images, as_tensor(images)) and plain.classes == () and not plain.labels.any()
    data = load_images(save_npz(tmp_path/"b.npz", arr_0=images, arr_1=labels))
    assert torch.equal(data.images, as_tensor(images))
    assert data.labels.tolist() == labels.tolist() and data.classes == ("class 0", "class 1", "class 2")
    named = load_images(save_npz(tmp_path/"c.npz", images=images, labels=labels, classes=np.array(["x", "y", "z", "none of these"])))
    assert named.classes == ("x", "y", "z", "none of these")


@pytest.mark.parametrize("arrays, message", [
    (dict(pictures=random_images()), "holds .*pictures.*; it needs `images`"),
    (dict(images=random_images()/255), "they must be uint8"),
    (dict(images=random_images(channels=3).reshape(6, -1)), r"they must be \(n, H, W\)"),
    (dict(images=random_images(), labels=np.zeros(5, int)), "6 images need"),
    (dict(images=random_images(), labels=np.zeros(6)), "they must be integers"),
    (dict(images=random_images(), labels=np.full(6, -1)), "labels must be in"),
    (dict(images=random_images(), labels=np.full(6, 2), classes=np.array(["a", "b"])), r"labels must be in 0 ... 1"),
    (dict(images=random_images(0)), "no images"),
    (dict(images=random_images(), labels=np.array([print]*6, dtype=object)), "cannot be read as .npz"),
], ids=["wrong name", "floats", "flat", "too few labels", "broken labels", "negative", "unknown class", "no images", "a pickle"])
def test_bad_npz(tmp_path, arrays, message):
    "The message names what is wrong; a pickle inside is not opened."
    with pytest.raises(DataError, match=message): load_images(save_npz(tmp_path/"bad.npz", **arrays))


@pytest.mark.parametrize("damage", [lambda whole: whole[:len(whole)//2], lambda whole: HTML, lambda whole: b"",
                                    lambda whole: whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]],
                         ids=["half", "HTML page", "empty", "one byte altered"])
def test_damaged_npz(tmp_path, damage):
    "One `DataError` with the path, whatever numpy, zipfile or zlib would have said."
    path = save_npz(tmp_path/"own.npz", images=random_images())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"own\.npz cannot be read as \.npz"): load_images(path)
