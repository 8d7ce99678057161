"The data: damaged files, the user's own images, the range of the pixels, and the real Fashion-MNIST."
import hashlib
import json
import os
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ddpm_tutorial.data import (
    CLASSES,
    PIXELS,
    RAW_FILES,
    DataError,
    ImageData,
    batches,
    check_raw_files,
    default_data_root,
    fingerprint,
    full_or_tiny,
    hold_out,
    image_grid,
    load_fashion_mnist,
    load_images,
    load_sample,
    to_float,
    to_pil,
    to_uint8,
    without_labels,
)
from ddpm_tutorial.run.config import PRESETS, fit_to_data
from ddpm_tutorial.run.data_sets import DATA_SETS, load_data
from ddpm_tutorial.run.device import new_model
from ddpm_tutorial.training import diffusion_objective, new_state, train_steps, validation_loss

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def random_images(n=6, height=9, width=11, channels=None, seed=0):
    "In numpy: uint8 (n, H, W) or (n, H, W, C). The sizes are neither square nor a multiple of anything."
    shape = (n, height, width) if channels is None else (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_tensor(images):
    "(n, H, W) or (n, H, W, C) -> (n, C, H, W)"
    return torch.from_numpy(np.array(images if images.ndim == 4 else images[..., None])).permute(0, 3, 1, 2)


def save_folder(folder, images, classes=("",), ending="png"):
    "Saves the images in the folders of the classes in turn."
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
    "Nothing is downloaded: each attempt fails as on a machine without a network."
    class NoNetwork:
        def __init__(self, root, train=True, download=False): raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", NoNetwork)


# --- the published files ------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage, message", [
    (None, None),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]),
     r"b has 999 bytes instead of 1,000; delete it and run again"),
    (lambda file: file.write_bytes(file.read_bytes() + b"x"), "b has 1,001 bytes"),
    (lambda file: file.write_bytes(b"y" + file.read_bytes()[1:]),
     r"b is not the published file \(its md5 differs\); delete it"),
    (lambda file: file.write_bytes(HTML), "b has 54 bytes"),
    (lambda file: file.write_bytes(HTML.ljust(1000)), "b is not the published file"),
    (lambda file: file.write_bytes(b""), "b has 0 bytes"),
    (lambda file: file.unlink(), "b is missing"),
], ids=["whole", "truncated", "longer", "one byte altered", "HTML page", "HTML page of the right size",
        "empty", "missing"])
def test_check_raw_files(tmp_path, damage, message):
    "Whatever the damage is, the damaged file is named. Whole files pass."
    for name in "abc": (tmp_path/name).write_bytes(name.encode()*1000)
    expected = {name: (1000, hashlib.md5(name.encode()*1000).hexdigest()) for name in "abc"}
    if damage is None: return check_raw_files(tmp_path, expected)
    damage(tmp_path/"b")
    with pytest.raises(DataError, match=message): check_raw_files(tmp_path, expected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_loading_checks_the_files_first(tmp_path, split, offline):
    "Files with the right names and sizes, but full of zeros: an error, not images."
    raw = raw_folder(tmp_path)
    for name, (size, _) in RAW_FILES.items():
        with open(raw/name, "wb") as file: file.truncate(size)
    with pytest.raises(DataError, match="md5 differs"): load_fashion_mnist(tmp_path, split)
    (raw/"t10k-labels-idx1-ubyte").write_bytes(HTML)
    (raw/"train-images-idx3-ubyte").write_bytes(HTML)
    with pytest.raises(DataError, match="train-images-idx3-ubyte has 54 bytes"):
        load_fashion_mnist(tmp_path, split)


@pytest.mark.parametrize("missing", RAW_FILES)
def test_missing_file_without_a_network(tmp_path, missing, offline):
    """The error names the files, the folder and their source.

    The existing files stay, and no half download is left.
    """
    raw = raw_folder(tmp_path)
    for name in RAW_FILES:
        if name != missing: (raw/name).write_bytes(b"mine")
    with pytest.raises(DataError) as caught: load_fashion_mnist(tmp_path)
    message = str(caught.value)
    assert all(name in message for name in RAW_FILES) and str(raw) in message
    assert "github.com/zalandoresearch/fashion-mnist" in message and "DDPM_DATA_ROOT" in message
    left = {file.name: file.read_bytes() for file in raw.iterdir()}
    assert left == {name: b"mine" for name in RAW_FILES if name != missing}
    assert [entry.name for entry in tmp_path.iterdir()] == ["FashionMNIST"]


def test_bad_download_is_not_kept(tmp_path, monkeypatch):
    "A server answers with a web page: an error, and nothing is put into the folder of the data."
    class Page:
        def __init__(self, root, train=True, download=False):
            raw = raw_folder(root)
            for name in RAW_FILES: (raw/name).write_bytes(HTML)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Page)
    with pytest.raises(DataError, match="not the published data"): load_fashion_mnist(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_default_root(monkeypatch, tmp_path, offline):
    """`DDPM_DATA_ROOT`, or `data` if it is unset or empty.

    Loading looks there unless it is called with a path.
    """
    monkeypatch.delenv("DDPM_DATA_ROOT", raising=False)
    assert default_data_root() == Path("data")
    monkeypatch.setenv("DDPM_DATA_ROOT", "")
    assert default_data_root() == Path("data")
    monkeypatch.setenv("DDPM_DATA_ROOT", str(tmp_path/"here"))
    assert default_data_root() == tmp_path/"here"
    with pytest.raises(DataError, match=str(tmp_path/"here")): load_fashion_mnist()
    with pytest.raises(DataError, match=str(tmp_path/"there")): load_fashion_mnist(tmp_path/"there")
    with pytest.raises(ValueError, match="split must be one of"): load_fashion_mnist(tmp_path, "valid")


def test_the_home_folder_has_a_short_name(monkeypatch, tmp_path, offline):
    "`~` in a path or in the variable means the home folder. No folder with that name is made."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    save_folder(tmp_path/"home"/"photos", random_images(20))
    assert len(load_images("~/photos")) == 20 and len(load_data("~/photos")[0]) == 18
    with pytest.raises(DataError, match=str(tmp_path/"home"/"root")): load_fashion_mnist("~/root")
    monkeypatch.setenv("DDPM_DATA_ROOT", "~/data")
    assert default_data_root() == tmp_path/"home"/"data"
    with pytest.raises(DataError, match=str(tmp_path/"home"/"data")): load_data()
    assert not (tmp_path/"~").exists()

def test_images_in_the_working_folder(tmp_path, monkeypatch):
    "`.` is a folder like any other. An empty path, such as an unset variable, is refused."
    for i in range(20): Image.new("L", (16, 16), i).save(tmp_path/f"{i}.png")
    monkeypatch.chdir(tmp_path)
    assert len(load_images(".")) == 20
    for load in (load_images, load_data):
        with pytest.raises(DataError, match="the path of the images is empty"): load("")


REAL = os.environ.get("DDPM_DATA_ROOT")
needs_the_real_images = pytest.mark.skipif(
    not REAL or not (Path(REAL)/"FashionMNIST"/"raw").is_dir(),
    reason="needs the real Fashion-MNIST: set DDPM_DATA_ROOT to the folder with FashionMNIST/raw")


@needs_the_real_images
def test_real_fashion_mnist():
    """All 70,000 images: count, mean and standard deviation.

    Every bundled image is one of them, with the same label.
    """
    for split, count in (("train", 60_000), ("published_test", 10_000)):
        data = load_fashion_mnist(split=split)
        assert data.images.shape == (count, 1, 28, 28) and data.classes == CLASSES
        assert torch.equal(data.labels.bincount(), torch.full((10,), count//10))
        if split == "train":
            pixels = data.images.double()
            assert abs(pixels.mean().item() - 72.940) < 5e-4 and abs(pixels.std().item() - 90.021) < 5e-4
        real = set(zip((image.numpy().tobytes() for image in data.images), data.labels.tolist()))
        sample = load_sample(split.removeprefix("published_"))
        bundled = list(zip((image.numpy().tobytes() for image in sample.images), sample.labels.tolist()))
        assert len(set(bundled)) == len(bundled) and set(bundled) <= real


@needs_the_real_images
def test_validation_and_test_are_the_published_test_images():
    """The validation images are the first 2,000, the test images the rest.

    What chooses the weights does not judge them.
    """
    splits = ("published_test", "validation", "test")
    published, validation, test = (load_fashion_mnist(split=split) for split in splits)
    assert (len(validation), len(test)) == (2000, 8000)
    assert torch.equal(torch.cat([validation.images, test.images]), published.images)
    assert torch.equal(torch.cat([validation.labels, test.labels]), published.labels)
    assert torch.equal(load_data()[1].images, validation.images)


# --- the bundled sample, batches, pixels --------------------------------------------------------------------

def test_bundled_sample():
    "100 and 20 images of each class, no image in both."
    train, test = load_sample("train"), load_sample("test")
    for data, each in ((train, 100), (test, 20)):
        assert data.images.shape == (10*each, 1, 28, 28) and data.images.dtype == torch.uint8
        assert data.classes == CLASSES
        assert torch.equal(data.labels.bincount(), torch.full((10,), each))
    first, second = ({image.numpy().tobytes() for image in data.images} for data in (train, test))
    assert not first & second
    with pytest.raises(ValueError, match="split must be"): load_sample("validation")


def test_pixel_range():
    """All 256 values go from 0 ... 255 to -1 ... 1 and back.

    Values outside become black or white. Nothing is scaled twice.
    """
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_float(pixels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.allclose(x, torch.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_uint8(x.bfloat16()).float() > 127, pixels > 127)
    assert to_uint8(torch.tensor([-5., -1.001, 1.001, 5.])).tolist() == [0, 0, 255, 255]
    assert to_uint8(torch.tensor([0.4, 0.6])/127.5 - 1).tolist() == [0, 1]          # rounded, not cut off
    with pytest.raises(TypeError, match="uint8"): to_float(x)


def test_batches():
    """Each image once, with its own label, in an order that depends on the generator.

    `start` continues within the epoch.
    """
    data = indexed(50)
    def run(seed, **kwargs):
        return list(batches(data, 20, generator=torch.Generator().manual_seed(seed), **kwargs))
    whole = run(0)
    assert [len(x) for x, _ in whole] == [20, 20, 10]
    numbers = to_uint8(torch.cat([x for x, _ in whole]))[:, 0, 0, 0].long()
    labels = torch.cat([cond["labels"] for _, cond in whole])
    assert torch.equal(numbers.sort().values, torch.arange(50)) and not torch.equal(numbers, torch.arange(50))
    assert torch.equal(labels, numbers % 10)
    assert all(x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 for x, _ in whole)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(run(0, start=1), whole[1:], strict=True))
    assert not torch.equal(run(1)[0][0], whole[0][0])


def test_a_batch_is_what_a_model_sees():
    "Images go through the codec, labels become conditions. Any size is allowed."
    pixels = torch.from_numpy(random_images(6, 4, 5))[:, None]
    data = ImageData(pixels, torch.arange(6) % 3, ("a", "b", "c"))
    (x0, cond), two = data.batch(torch.tensor([4, 1]), "cpu"), data.images[[4, 1]]
    assert torch.equal(x0, PIXELS.encode(two)) and torch.equal(PIXELS.decode(x0), two)
    assert list(cond) == ["labels"] and cond["labels"].tolist() == [1, 1]
    assert without_labels(data).batch(torch.tensor([0]), "cpu")[1] == {}


def test_a_new_data_set_is_one_entry(monkeypatch):
    "Ten lines: stripes of a random width, under a name that a configuration can give."
    def stripes(root, resize):
        width = torch.randint(1, 5, (40,), generator=torch.Generator().manual_seed(0))
        rows = (torch.arange(16)//width[:, None] % 2 * 255).to(torch.uint8)
        images = rows[:, None, None].expand(-1, 3, 16, -1)
        data = ImageData(images.contiguous(), width - 1, ("1", "2", "3", "4"))
        return data[:30], data[30:]
    monkeypatch.setitem(DATA_SETS, "stripes", stripes)
    train, validation = load_data("stripes")
    named = replace(PRESETS["tiny"], data="stripes")
    config = fit_to_data(named, tuple(train.images.shape[1:]), train.classes)
    assert (config.model.in_channels, config.model.image_size, config.model.num_classes) == (3, 16, 4)
    train_config = replace(config.train, batch_size=10, max_steps=2)
    state = new_state(new_model(config), train_config)
    objective = diffusion_objective(config.scheduler.build(), 0.1)
    assert len(list(train_steps(state, train, objective, train_config))) == 2
    assert validation_loss(state.ema, validation, config.scheduler.build()) > 0


def test_a_picture_of_floats_is_refused():
    "Pillow would read other numbers, or raise an error that names neither side."
    with pytest.raises(TypeError, match="to_pil takes a uint8 picture .*not torch.float32"):
        to_pil(torch.zeros(1, 8, 8))


def test_a_file_that_is_no_archive(tmp_path):
    "The message says so. It does not advise to unpickle it, as numpy's does."
    (tmp_path/"own.npz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="own.npz cannot be read as .npz .it is no zip archive") as raised:
        load_images(tmp_path/"own.npz")
    assert "pickle" not in str(raised.value)


def test_hold_out():
    """No image is in both parts, and none is lost.

    They are always the same images, but not simply the first ones. Labels go with their images.
    """
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


def few(*counts, classes=None):
    "As many images of each class as the counts say. Each image carries its own number."
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    return ImageData(images, labels, classes or tuple(f"class {i}" for i in range(len(counts))))


@pytest.mark.parametrize("counts, n", [((1, 30), 29), ((2, 2, 2), 3), ((1, 1, 1, 5), 4), ((3, 40), 41)])
def test_holding_out_leaves_each_class_an_image(counts, n):
    """The last image of a class is not held out.

    The next one in the order is held out instead, and none is lost.
    """
    data = few(*counts)
    rest, held = hold_out(data, n)
    assert len(held) == n and rest.labels.bincount(minlength=len(counts)).min() >= 1
    numbers = torch.cat([rest.images, held.images])[:, 0, 0, 0].long()
    assert torch.equal(numbers.sort().values, torch.arange(sum(counts)))
    assert torch.equal(torch.cat([rest.labels, held.labels]), data.labels[numbers])


@pytest.mark.parametrize("data, n", [(indexed(60), 15), (few(5, 50), 5), (load_sample(), 100)])
def test_holding_out_takes_the_images_that_it_always_took(data, n):
    "Where no class is at risk, results stay as they were: the first n of the shuffled order are held out."
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for part, index in zip(hold_out(data, n), (order[n:], order[:n])):
        assert torch.equal(part.images, data.images[index]) and torch.equal(part.labels, data.labels[index])


def test_a_class_without_an_image_to_train_on_is_an_error():
    """The class is named, and so is the usual reason, labels that start at 1.

    No class is emptied to hold out more.
    """
    with pytest.raises(DataError, match=r"no image has the label 1 \(hat\)$"):
        hold_out(few(4, 0, 4, classes=("bag", "hat", "shoe")), 2)
    with pytest.raises(DataError, match=r"label 0 \(class 0\); labels from 1 to 2 must start at 0: subtract"):
        hold_out(few(0, 5, 5), 2)
    for data, n in ((few(1, 1, 1), 1), (few(3, 2), 4)):
        with pytest.raises(DataError, match=f"cannot hold out {n} of {len(data)} images; each class"):
            hold_out(data, n)


@pytest.mark.parametrize("change, says", [(dict(labels=np.arange(20) % 10 + 1), r"label 0 .* subtract 1"),
                                          (dict(labels=np.arange(20) % 10*2), r"label 1 \(class 1\)"),
                                          (dict(classes=np.arange(11)), r"label 10 \(10\)")],
                         ids=["from 1", "a gap", "a name too many"])
def test_labels_that_leave_a_class_empty(tmp_path, change, says):
    "Such files can be looked at, like samples of a few classes, but not trained on. The file is named."
    path = save_npz(tmp_path/"own.npz", **dict(images=random_images(20), labels=np.arange(20) % 10) | change)
    assert len(load_images(path)) == 20
    with pytest.raises(DataError, match=f"own.npz: no image has the {says}"): load_data(str(path))


def test_fingerprint(tmp_path):
    """It is the same for the same images, wherever they are stored.

    It changes with a pixel, a label, the order, the shape or a name.
    """
    images = random_images(6, channels=3)
    data = load_images(save_folder(tmp_path/"own", images, ("a", "b")))
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(data))
    arrays = dict(images=images[[0, 2, 4, 1, 3, 5]], labels=np.repeat([0, 1], 3),
                  classes=np.array(["a", "b"]))
    strided = ImageData(data.images.contiguous(memory_format=torch.channels_last), data.labels, data.classes)
    from_arrays = load_images(save_npz(tmp_path/"own.npz", **arrays))
    for again in (load_images(f"{tmp_path}/own/"), from_arrays, strided):
        assert fingerprint(again) == fingerprint(data)
    pixel, label = data.images.clone(), data.labels.clone()
    pixel[3, 1, 4, 5] ^= 1
    label[2] = 1
    others = [ImageData(pixel, data.labels, data.classes), ImageData(data.images, label, data.classes),
              ImageData(data.images.reshape(6, 3, 11, 9), data.labels, data.classes),
              data[:5], data[[1, 0, 2, 3, 4, 5]],
              *(ImageData(data.images, data.labels, names) for names in (("a", "c"), ("ab", ""), ("b", "a")))]
    assert len({fingerprint(other) for other in [data, *others]}) == len(others) + 1


def test_fingerprints_of_many_images_are_quick():
    """All of Fashion-MNIST takes half a second at most, or the start of a run would be delayed.

    The best of three counts.
    """
    images = torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8)
    labels = torch.zeros(60_000, dtype=torch.int64)
    def seconds():
        start = time.perf_counter()
        fingerprint(ImageData(images, labels, ()))
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < 0.5


def test_load_data(tmp_path):
    """The bundled sample is loaded by its name, the user's own images by their path.

    A tenth of these is held out.
    """
    train, validation = load_data("sample")
    assert (len(train), len(validation)) == (1000, 200)
    path = save_npz(tmp_path/"own.npz", images=random_images(40))
    train, validation = load_data(str(path))
    assert (len(train), len(validation)) == (36, 4)
    with pytest.raises(DataError, match="neither a folder nor an .npz file"): load_data("fashion-mnist")
    for name in ("sample", str(path)):
        train, validation = load_data(name, resize=16)
        assert train.images.shape[2:] == validation.images.shape[2:] == (16, 16)


def test_image_data_fits_together():
    "Wrong types, shapes, sizes and labels are errors. Slices and indices keep images and labels together."
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 9])
    for bad, message in (((images.float(), labels), "must be uint8"),
                         ((images[0], labels), "must be uint8"),
                         ((images[:2], labels), "2 images need"),
                         ((images[:0], labels[:0]), "no images"),
                         ((images, labels.int()), "int64"),
                         ((images, labels + 1), "must be in 0 ... 9"),
                         ((images, labels - 1), "must be in 0 ... 9")):
        with pytest.raises(DataError, match=message): ImageData(*bad, CLASSES)
    with pytest.raises(DataError, match="must be in 0 ... 0"): ImageData(images, labels, ())
    assert ImageData(images, labels, CLASSES)[1:].labels.tolist() == [1, 9]
    assert ImageData(images, labels, CLASSES)[torch.tensor([2, 0])].labels.tolist() == [9, 0]


def test_image_grid(tmp_path):
    "Each image is in its place, enlarged pixel by pixel. What Pillow saves is what was drawn."
    images = as_tensor(random_images(3, 8, 10))
    grid = image_grid(images, columns=2, scale=2)
    assert grid.shape == (3, 2*(16 + 2) + 2, 2*(20 + 2) + 2) and torch.equal(grid[0], grid[2])
    assert torch.equal(grid[0, 20:36:2, 2:22:2], images[2, 0])
    assert torch.equal(image_grid(to_float(images), columns=2, scale=2), grid)
    for channels in (1, 3):
        to_pil(grid[:channels]).save(tmp_path/"grid.png")
        saved = np.asarray(Image.open(tmp_path/"grid.png"))
        assert np.array_equal(saved, grid[:channels].permute(1, 2, 0).numpy().squeeze())


def test_full_or_tiny(monkeypatch):
    "Full for a reader, tiny in a test."
    for name in ("DDPM_TINY", "IN_TEST"): monkeypatch.delenv(name, raising=False)
    assert full_or_tiny("full", "tiny") == "full"
    monkeypatch.setenv("DDPM_TINY", "0")
    assert full_or_tiny("full", "tiny") == "full"
    monkeypatch.setenv("DDPM_TINY", "1")
    assert full_or_tiny("full", "tiny") == "tiny"


# --- the user's own images ----------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("ending", ["png", "BMP"])
def test_folder(tmp_path, channels, ending):
    """Grey stays grey and colour stays colour, pixel for pixel.

    Sub-folders are the classes, in alphabetical order.
    """
    images = random_images(channels=channels)
    flat = load_images(save_folder(tmp_path/"flat", images, ending=ending))
    assert torch.equal(flat.images, as_tensor(images)) and flat.classes == () and not flat.labels.any()
    save_folder(tmp_path/"sorted", images, ("shoe", "bag", "hat"), ending)
    (tmp_path/"sorted"/".hidden").mkdir()
    (tmp_path/"sorted"/"bag"/"notes.txt").write_text("not an image")
    messages, data = said(load_images, str(tmp_path/"sorted"))
    assert messages == [f"{tmp_path/'sorted'}: left out 1 .txt"]
    assert data.classes == ("bag", "hat", "shoe") and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(data.images, as_tensor(images[[1, 4, 2, 5, 0, 3]]))


def said(function, *args, **kwargs):
    "The warnings of a call, and what it returns."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return [str(warning.message) for warning in caught], result


def refused(folder, *words, **kwargs):
    "The error is one line with these words in it."
    with pytest.raises(DataError) as caught: load_images(folder, **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [".DS_Store", "._000.png", "Thumbs.db", "thumbs.DB", "desktop.ini",
                                  ".x/x.png", "__MACOSX/._000.png", "__MACOSX/x.png",
                                  ".ipynb_checkpoints/000.png"])
@pytest.mark.parametrize("classes", [("",), ("a", "b")])
def test_what_systems_leave_behind_is_passed_over(tmp_path, junk, classes):
    "They are neither an error nor a class nor worth a message: at the top, and in the folder of a class."
    save_folder(tmp_path, random_images(), classes)
    for place in {tmp_path, tmp_path/classes[0]}:
        (place/junk).parent.mkdir(exist_ok=True)
        (place/junk).write_bytes(b"whatever a system writes")
    messages, data = said(load_images, tmp_path)
    assert messages == [] and len(data) == 6 and data.classes == tuple(filter(None, classes))


def write_words(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text("words")


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    """Files that are not images, and beside loose images also folders without any.

    If there are none, there is no message.
    """
    photos = save_folder(tmp_path/"photos", random_images())
    classes = save_folder(tmp_path/"sorted", random_images(), ("a", "b"))
    assert said(load_images, photos)[0] == []
    write_words(photos, "a.txt", "b.TXT", "list.csv", "README", "notes/deep/c.txt")
    messages, data = said(load_images, photos)
    assert messages == [f"{photos}: left out 2 .txt, 1 without an ending, 1 .csv, 1 folder notes"]
    assert len(data) == 6 and data.classes == ()
    write_words(classes, "a.txt", "a/b.heic", "a/c.heic", "b/extra/d.mp4", *(f"a/x.{i}" for i in range(9)))
    (message,), data = said(load_images, classes)
    assert "left out 2 .heic, 1 .txt, " in message and message.endswith(", ...")
    assert data.classes == ("a", "b")


def test_loose_images_beside_folders_of_images(tmp_path):
    "Are they a third class, or forgotten? One file of each kind is named, and what to do."
    for inner in ("a", "x/y"): save_folder(tmp_path/inner[0], random_images(), (inner,))
    for place in (tmp_path/"a", tmp_path/"x"): save_folder(place, random_images(1))
    refused(tmp_path/"a", "a/000.png lies beside folders with images", "a/a/000.png", "give it its own")
    refused(tmp_path/"x", "x/000.png lies beside", "x/x/y/000.png")


@pytest.mark.parametrize("deep", ["train/a/000.png", "a/more/000.png"])
def test_images_one_level_too_deep(tmp_path, deep):
    bad, good = str(Path(deep).parent), "b" if deep[0] == "a" else "train/b"
    save_folder(tmp_path, random_images(), (bad, good))
    refused(tmp_path, f"{deep} lies too deep", "or in its folders")


def test_a_folder_without_an_image_beside_others(tmp_path):
    "It may be meant as a class. It neither becomes one nor is ignored without a message."
    for name in ("empty", "words"): save_folder(tmp_path/name, random_images(), ("a", "b"))
    (tmp_path/"empty"/"c").mkdir()
    write_words(tmp_path, "words/notes/a.txt")
    refused(tmp_path/"empty", "empty/c holds no images", "fill it or remove it")
    refused(tmp_path/"words", "words/notes holds no images")


@pytest.mark.parametrize("place, classes", [("c", "ab"), ("a/c.png", "ab"), ("c.png", [""]), ("c", [""])])
def test_links_that_lead_nowhere(tmp_path, place, classes):
    "The link once led to a class or to an image."
    save_folder(tmp_path, random_images(), classes)
    (tmp_path/place).symlink_to(tmp_path/"nowhere")
    refused(tmp_path, f"{place} is a link that leads nowhere")


def test_links_to_folders_are_followed(tmp_path):
    """They count as the folder that they lead to.

    One that leads back to its own folder gives an error of one line.
    """
    images = random_images()
    real = save_folder(tmp_path/"real", images)
    (tmp_path/"sorted").mkdir()
    for name in ("a", "b"): (tmp_path/"sorted"/name).symlink_to(real)
    data = load_images(tmp_path/"sorted")
    assert data.classes == ("a", "b") and torch.equal(data.images, as_tensor(images).repeat(2, 1, 1, 1))
    (real/"round").symlink_to(real)
    refused(real, "real/000.png lies beside")
    refused(tmp_path/"sorted", "sorted/a/round/000.png lies too deep")


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    "At the top, and for a class."
    save_folder(tmp_path, random_images(), ("a", "b"))
    allowed = os.scandir
    for place in (tmp_path, tmp_path/"b"):
        def scandir(path, place=place):
            if Path(path) == place: raise PermissionError(13, "Permission denied", str(path))
            return allowed(path)
        monkeypatch.setattr(os, "scandir", scandir)
        refused(tmp_path, "cannot be read", f"Permission denied: '{place}'")


def test_only_no_images(tmp_path):
    "The error says what there is instead, for instance photos of a kind that Pillow cannot open."
    for name in ("cats", "dogs"): (tmp_path/name).mkdir()
    refused(tmp_path, "holds no images, only 1 folder cats, 1 folder dogs")
    write_words(tmp_path, "cats/a.heic")
    refused(tmp_path, "holds no images, only 1 .heic")
    refused(tmp_path/"dogs", "holds no images, only nothing")


def test_every_kind_of_picture_counts(tmp_path):
    """Every kind that Pillow calls a picture, in small letters or capitals.

    Films, papers and data do not count.
    """
    images, endings = random_images(6), ("PNG", "TIF", "pgm", "png", "tga", "tiff")      # in sorted order
    for image, ending in zip(images, endings): Image.fromarray(image).save(tmp_path/f"{ending}.{ending}")
    write_words(tmp_path, "x.h5", "x.mpg", "x.ps", "x.wmf")
    (message,), data = said(load_images, tmp_path)
    assert torch.equal(data.images, as_tensor(images))
    assert message.endswith("left out 1 .h5, 1 .mpg, 1 .ps, 1 .wmf")


@pytest.mark.parametrize("names, order", [(list(map(str, range(12))), list(map(str, range(12)))),
                                          (["10", "9", "8"], ["8", "9", "10"]),
                                          (["10", "9", "x"], ["10", "9", "x"]),
                                          (["-1", "10", "9"], ["-1", "10", "9"])])
def test_order_of_the_classes(tmp_path, names, order):
    "Whole numbers are sorted by their value, everything else by the alphabet. Each image keeps its class."
    save_folder(tmp_path, np.arange(len(names), dtype=np.uint8).repeat(64).reshape(-1, 8, 8), names)
    data = load_images(tmp_path)
    assert list(data.classes) == order
    assert [data.classes[label] for label in data.labels] == [names[int(i)] for i in data.images[:, 0, 0, 0]]


# --- the pixels of one file ---------------------------------------------------------------------------------

def save(file, image, **kwargs):
    file.parent.mkdir(exist_ok=True)
    image.save(file, **kwargs)
    return file.parent


WAY = Image.Transpose
UPRIGHT = {1: None, 2: WAY.FLIP_LEFT_RIGHT, 3: WAY.ROTATE_180, 4: WAY.FLIP_TOP_BOTTOM, # EXIF's tag 0x0112
           5: WAY.TRANSPOSE, 6: WAY.ROTATE_270, 7: WAY.TRANSVERSE, 8: WAY.ROTATE_90}


@pytest.mark.parametrize("turn", UPRIGHT)
@pytest.mark.parametrize("ending, options", [("png", {}), ("tif", {}), ("webp", dict(lossless=True))])
def test_a_photo_stands_upright(tmp_path, turn, ending, options):
    "A camera that was turned says so in the EXIF data. We load the picture that people see."
    image, exif = Image.fromarray(random_images(1, channels=3)[0]), Image.Exif()
    exif[0x0112] = turn
    found = load_images(save(tmp_path/"a"/f"a.{ending}", image, exif=exif, **options))
    upright = image if turn == 1 else image.transpose(UPRIGHT[turn])
    assert torch.equal(found.images, as_tensor(np.asarray(upright)[None]))


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_several_images_in_one_file_are_refused(tmp_path, ending):
    "An animation or several pages: nobody expects that only the first is used."
    first, *others = (Image.fromarray(image) for image in random_images(3, channels=3))
    folder = save(tmp_path/"a"/f"film.{ending}", first, save_all=True, append_images=others)
    refused(folder, f"film.{ending} holds 3 images")


def test_a_photo_with_a_second_one_behind_it_is_a_photo(tmp_path):
    "Phones store a map of depth or brightness in the same JPEG file. Nobody sees it."
    first, second = (Image.fromarray(image) for image in random_images(2, 16, 16, channels=3))
    folder = save(tmp_path/"a"/"photo.jpg", first, format="MPO", save_all=True, append_images=[second])
    with Image.open(folder/"photo.jpg") as image: assert image.format == "MPO" and image.n_frames == 2
    assert load_images(folder).images.shape == (1, 3, 16, 16)


def grey_palette(array):
    "The same greys, stored with a palette in another order."
    image = Image.fromarray(255 - array)
    image.putpalette([255 - i//3 for i in range(768)])
    return image


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_palettes(tmp_path, ending):
    """A palette only stores the same colours in another way.

    Its greys are grey among grey images, colours among colours.
    """
    grey, colour = random_images(2), Image.fromarray(random_images(1, channels=3)[0]).quantize(16)
    beside = {"palette": grey_palette(grey[1]), "grey": Image.fromarray(grey[1]), "colour": colour}
    for name, image in beside.items():
        save(tmp_path/name/f"0.{ending}", grey_palette(grey[0]))
        found = load_images(save(tmp_path/name/f"1.{ending}", image)).images
        if name == "colour": meant = np.stack([np.dstack([grey[0]]*3), np.asarray(image.convert("RGB"))])
        else: meant = grey
        assert torch.equal(found, as_tensor(meant))
    save(tmp_path/"mixed"/"0.png", Image.fromarray(grey[0]))
    refused(save(tmp_path/"mixed"/"1.png", colour), "0.png is grey", "mixed/1.png has colours", "all in grey")


def with_alpha(mode, through):
    "(image, options to save it, its pixels). Every pixel is opaque, or one of them is not."
    colour = random_images(1, channels=3)[0]//2 + 1                 # 0 is free to mean "transparent"
    alpha = np.full(colour.shape[:2], 255, np.uint8)
    if through: colour[2, 3], alpha[2, 3] = 0, 128
    if mode == "P":
        image = Image.fromarray(colour).quantize(16)
        options = dict(transparency=image.getpixel((3, 2)) if through else 200)
        return image, options, np.asarray(image.convert("RGB"))
    pixels = colour[..., 0] if mode[0] == "L" else colour
    if mode[-1] == "A": return Image.fromarray(np.dstack([pixels, alpha])), {}, pixels
    return Image.fromarray(pixels), dict(transparency=(0, 0, 0) if mode == "RGB" else 0), pixels


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA"])
def test_transparency_is_treated_alike_in_all_modes(tmp_path, mode):
    """If every pixel is opaque, nothing is lost without transparency.

    If not, the user has to choose a background.
    """
    image, options, pixels = with_alpha(mode, through=False)
    assert image.mode == mode
    messages, data = said(load_images, save(tmp_path/"opaque"/"a.png", image, **options))
    assert messages == [] and torch.equal(data.images, as_tensor(pixels[None]))
    image, options, _ = with_alpha(mode, through=True)
    folder = save(tmp_path/"through"/"b.png", image, **options)
    refused(folder, "b.png is transparent in places", "background")


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("CMYK", "tif"), ("F", "tif")])
def test_pixels_that_would_lose_something_are_refused(tmp_path, mode, ending):
    """16-bit grey would be cut off at 255, and ink is not light.

    The error names the file and what to save instead.
    """
    folder = save(tmp_path/"a"/f"deep.{ending}", Image.new(mode, (9, 11)))
    refused(folder, f"deep.{ending} has pixels of Pillow's kind {mode!r}", "8-bit grey or colour")


def test_black_and_white_is_grey(tmp_path):
    bits = random_images(1) > 99
    folder = save(tmp_path/"a"/"a.png", Image.fromarray(bits[0]))
    assert torch.equal(load_images(folder).images, as_tensor(np.where(bits, np.uint8(255), np.uint8(0))))


@pytest.mark.parametrize("limit", [90, 50])
def test_a_huge_picture_is_named(tmp_path, monkeypatch, limit):
    "Pillow warns from its limit on, and raises its own error from twice that. Our error names the file."
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)           # a small limit instead of a large picture
    folder = save(tmp_path/"a"/"huge.png", Image.new("L", (10, 11)))
    refused(folder, "huge.png is too large", "110 pixels", "make it smaller")


# --- sizes --------------------------------------------------------------------------------------------------

def test_unlike_sizes_name_the_option(tmp_path):
    "The error names the two files, too. Width comes first, as for cameras."
    save(tmp_path/"a"/"0.png", Image.new("L", (11, 9)))
    folder = save(tmp_path/"a"/"1.png", Image.new("L", (9, 11)))
    refused(folder, "1.png has 9x11 pixels", "0.png has 11x9", "--resize N", "resize=N")


@pytest.mark.parametrize("size", [(40, 40), (60, 40), (40, 64), (200, 80)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize(tmp_path, size, mode):
    "The same as making the short side N pixels long and cutting out the middle, in two steps of Pillow."
    small = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    # smooth, like a photo
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    found = load_images(save(tmp_path/"a"/"a.png", image), resize=20).images
    whole = image.resize((size[0]*20//min(size), size[1]*20//min(size)), Image.Resampling.LANCZOS)
    left, top = (whole.width - 20)//2, (whole.height - 20)//2
    expected = as_tensor(np.asarray(whole.crop((left, top, left + 20, top + 20)))[None])
    assert found.shape == expected.shape
    inner = (found.int() - expected.int())[..., 3:-3, 3:-3]     # at the edge, one of the two sees more
    assert inner.abs().max() <= 1


def test_resize_smooths_fine_stripes(tmp_path):
    "Stripes of one pixel, made four times smaller, become even grey, not a new pattern."
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    found = load_images(save(tmp_path/"a"/"a.png", stripes), resize=16).images.float()
    assert (found - 127.5).abs().max() < 12                             # the outermost pixels see less of it


def test_resize_brings_all_to_one_size(tmp_path):
    "Photos of any shape. Smaller ones are enlarged."
    for i, size in enumerate(((40, 30), (30, 40), (16, 16), (8, 100), (33, 31))):
        save(tmp_path/"a"/f"{i}.png", Image.new("RGB", size, (10*i, 20, 30)))
    colours = torch.tensor([[10*i, 20, 30] for i in range(5)], dtype=torch.uint8)
    found = load_images(tmp_path/"a", resize=16).images
    assert torch.equal(found, colours[..., None, None].expand(5, 3, 16, 16))
    for n in (7, 0, -3): refused(tmp_path/"a", f"cannot be resized to {n} pixels", "size is 8", resize=n)


@pytest.mark.parametrize("width", [16, 21])
def test_resize_leaves_pixels_alone_where_it_can(tmp_path, width):
    "If the short side has the right length already, the image is only cut. No pixel is mixed with another."
    images = random_images(2, 16, width)
    found = load_images(save_folder(tmp_path, images), resize=16)
    assert torch.equal(found.images, as_tensor(images[..., (width - 16)//2:][..., :16]))


@pytest.mark.parametrize("channels", [None, 3])
def test_resize_arrays(tmp_path, channels):
    "An .npz is resized like the same images in a folder, and so are images with a palette."
    images = random_images(channels=channels, height=20, width=31)
    folder = load_images(save_folder(tmp_path/"a", images), resize=9)
    assert folder.images.shape == (6, channels or 1, 9, 9)
    assert torch.equal(load_images(save_npz(tmp_path/"a.npz", images=images), resize=9).images, folder.images)
    if channels is None:
        for i in range(6): save(tmp_path/"p"/f"{i}.png", grey_palette(images[i]))
        assert torch.equal(load_images(tmp_path/"p", resize=9).images, folder.images)


# --- folders and arrays that cannot be used -----------------------------------------------------------------

def test_bad_folders(tmp_path):
    """The file that does not fit is named: another size, other channels, a web page, half a file.

    An empty folder is refused too.
    """
    images = random_images()
    for name, spoil in (("size", lambda file: Image.fromarray(images[0, :8]).save(file)),
                        ("channels",
                         lambda file: Image.fromarray(random_images(1, channels=3)[0]).save(file)),
                        ("page", lambda file: file.write_bytes(HTML)),
                        ("half", lambda file: file.write_bytes(file.read_bytes()[:60])),
                        ("nothing", lambda file: file.write_bytes(b""))):
        folder = save_folder(tmp_path/name, images)
        spoil(folder/"003.png")
        with pytest.raises(DataError, match=r"003\.png"): load_images(folder)
    (tmp_path/"empty").mkdir()
    with pytest.raises(DataError, match="holds no images"): load_images(tmp_path/"empty")
    with pytest.raises(DataError, match="smallest size is 8"):
        load_images(save_folder(tmp_path/"small", random_images(2, 7, 20)))
    with pytest.raises(DataError, match="neither a folder nor"): load_images(tmp_path/"not there")


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz(tmp_path, channels):
    "With either pair of names, with or without labels and the names of the classes."
    images, labels = random_images(channels=channels), np.array([0, 2, 1, 1, 0, 2], dtype=np.int32)
    plain = load_images(save_npz(tmp_path/"a.npz", images=images))
    assert torch.equal(plain.images, as_tensor(images)) and plain.classes == () and not plain.labels.any()
    data = load_images(save_npz(tmp_path/"b.npz", arr_0=images, arr_1=labels))
    assert torch.equal(data.images, as_tensor(images))
    assert data.labels.tolist() == labels.tolist() and data.classes == ("class 0", "class 1", "class 2")
    names = ["x", "y", "z", "none of these"]
    path = save_npz(tmp_path/"c.npz", images=images, labels=labels, classes=np.array(names))
    assert load_images(path).classes == tuple(names)


BAD = {
    "wrong name": (dict(pictures=random_images()), "holds pictures; it needs `images`"),
    "nothing": (dict(), "holds nothing; it needs `images`"),
    "floats": (dict(images=random_images()/255), "they must be uint8"),
    "flat": (dict(images=random_images().reshape(6, -1)), r"images are \(6, 99\), not \(n, H, W\)"),
    "0-d": (dict(images=np.uint8(7)), r"images are \(\), not"),
    "channels first": (dict(images=random_images(channels=3).transpose(0, 3, 1, 2)),
                       r"images are \(6, 3, 9, 11\).*save images.transpose\(0, 2, 3, 1\)"),
    "grey channel first": (dict(images=random_images()[:, None]), r"\(6, 1, 9, 11\).*save images.transpose"),
    "four channels": (dict(images=random_images(channels=4)), r"\(6, 9, 11, 4\).* with C 1 or 3$"),
    "no images": (dict(images=random_images(0)), "no images"),
    "a pickle": (dict(labels=np.array([print]*6, dtype=object)), "cannot be read as .npz"),
    "too few labels": (dict(labels=np.zeros(5, int)),
                       r"6 images need as many labels in one row, not \(5,\)$"),
    "labels in a column": (dict(labels=np.zeros((6, 1), int)), r"in one row, not \(6, 1\)$"),
    "0-d label": (dict(labels=np.int64(0)), r"6 images need as many labels in one row, not \(\)$"),
    "one-hot": (dict(labels=np.eye(6, dtype=int)), r"not \(6, 6\); if they are one-hot, save labels.argmax"),
    "one-hot floats": (dict(labels=np.eye(6)), r"one-hot, save labels.argmax\(1\)"),
    "float labels": (dict(labels=np.zeros(6)), "labels are float64; they must be integers"),
    "words": (dict(labels=np.array(["a"]*6)), "they must be integers"),
    "booleans": (dict(labels=np.ones(6, bool)), "labels are bool; they must be integers"),
    "negative": (dict(labels=np.full(6, -1)), "labels must be in"),
    "huge labels": (dict(labels=np.full(6, 10**9)), "labels go up to 1,000,000,000; number the classes 0"),
    "still larger": (dict(labels=np.full(6, 2**63, np.uint64)), "labels go up to 9,223,372,036,854,775,808"),
    "label": (dict(label=np.zeros(6, int)), "holds images, label, but no `labels`; give them this name"),
    "y": (dict(y=np.zeros((6, 1), int)), "holds images, y, but no `labels`"),
    "classes only": (dict(classes=np.array(["a"])), "holds images, classes, but no `labels`"),
    "one class name": (dict(labels=np.zeros(6, int), classes=np.array("a")), "must be names in one row"),
    "unknown class": (dict(labels=np.full(6, 2), classes=np.array(["a", "b"])), "labels must be in 0 ... 1"),
}


@pytest.mark.parametrize("arrays, message", BAD.values(), ids=BAD)
def test_bad_npz(tmp_path, arrays, message):
    """The message names the file, what is wrong with it and what to save instead.

    A pickle inside is not opened.
    """
    images = {} if {"images", "pictures"} & arrays.keys() or not arrays else dict(images=random_images())
    path = save_npz(tmp_path/"bad.npz", **images, **arrays)
    with pytest.raises(DataError, match=message) as caught: load_images(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_npz_of_other_people(tmp_path):
    """Capital letters in its name, class names as bytes, arrays that we do not need.

    The file is loaded, and one line says what was left out.
    """
    images, labels, names = random_images(), np.arange(6) % 3, ("hat", "Schuhgröße", "\\xff")
    as_bytes = np.array([*(name.encode() for name in names[:2]), b"\xff"])
    path = save_npz(tmp_path/"a.npz", images=images, labels=labels, classes=as_bytes, mu=np.zeros(3))
    messages, data = said(load_images, path.rename(tmp_path/"OWN.NPZ"))
    assert data.classes == names and messages == [f"{tmp_path/'OWN.NPZ'}: left out mu"]
    path = save_npz(tmp_path/"b.npz", arr_0=images, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert said(load_images, path)[0] == [f"{path}: left out mu, sigma"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:len(whole)//2],
                                    lambda whole: HTML,
                                    lambda whole: b"",
                                    lambda whole: whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]],
                         ids=["half", "HTML page", "empty", "one byte altered"])
def test_damaged_npz(tmp_path, damage):
    "There is one `DataError` with the path, whatever numpy, zipfile or zlib would have raised."
    path = save_npz(tmp_path/"own.npz", images=random_images())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"own\.npz cannot be read as \.npz"): load_images(path)


def captioned(folder, *lines):
    "A folder with three pictures and a metadata.jsonl of these lines."
    folder.mkdir()
    for i in range(3): Image.new("RGB", (12, 10), (80*i, 0, 0)).save(folder/f"{i}.png")
    (folder/"metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder

def told(name, text): return json.dumps({"file_name": name, "text": text}, ensure_ascii=False)

def test_captions_of_a_folder(tmp_path):
    "In the order of the lines. Empty lines and other fields don't matter, and sub-folders are no classes."
    folder = captioned(tmp_path/"a", told("2.png", " ein roter Hut "), "", told("deep/er/1.png", "Müll"),
                       json.dumps({"file_name": "0.png", "text": "black", "width": 12}))
    (folder/"deep"/"er").mkdir(parents=True)
    (folder/"1.png").rename(folder/"deep"/"er"/"1.png")
    data = load_images(folder)
    assert data.captions == ("ein roter Hut", "Müll", "black") and data.classes == ()
    assert data.images[:, 0, 0, 0].tolist() == [160, 80, 0]
    assert load_images(folder, 8).captions == data.captions

@pytest.mark.parametrize("line, says", [
    ("{'file_name': '1.png'}", "line 2, is no JSON"), ("[1]", "line 2, needs a file_name and a text"),
    ('{"file_name": "1.png"}', "line 2, needs"), ('{"file_name": "1.png", "text": ""}', "line 2, needs"),
    ('{"file_name": 1, "text": "red"}', "line 2, needs"), (told("9.png", "red"), "9.png, which is not there"),
    (told("0.png", "red"), "line 2, names 0.png a second time"), (told(".", "red"), "which is not there"),
    (told("../b.png", "red"), "lies outside of"), (told("/etc/hostname", "red"), "lies outside of")])
def test_captions_that_cannot_be_used(tmp_path, line, says):
    "The message names the file and the line."
    Image.new("RGB", (12, 10)).save(tmp_path/"b.png")
    folder = captioned(tmp_path/"a", told("0.png", "black"), line)
    with pytest.raises(DataError, match=re.escape(says)) as error: load_images(folder)
    assert str(folder/"metadata.jsonl") in str(error.value) and "\n" not in str(error.value)

@pytest.mark.parametrize("content", [b"", b"\n \n", "{}".encode("utf-16")])
def test_a_file_of_captions_without_any(tmp_path, content):
    folder = captioned(tmp_path/"a")
    (folder/"metadata.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="metadata.jsonl"): load_images(folder)

def test_images_without_a_caption(tmp_path):
    "They are counted, and the first one is named."
    folder = captioned(tmp_path/"a", told("1.png", "red"))
    with pytest.warns(UserWarning, match=r"left out 2 images that metadata.jsonl does not name, such as \d"):
        assert len(load_images(folder)) == 1
