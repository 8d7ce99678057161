"The public data sets, read from small files in their own formats. Nothing is downloaded."
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from ddpm_tutorial.data import DataError, fingerprint
from ddpm_tutorial.other_data import OTHER_DATA, collect_images, load_other_data
from ddpm_tutorial.run.config import PRESETS, fit_to_data
from ddpm_tutorial.run.data_sets import DATA_SETS, load_data


def colour(i, size=(32, 32)):
    "A picture whose left half has the colour (20 i, 100, 200)."
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :size[0]//2] = 20*i % 256, 100, 200
    return pixels

def cifar10(root, monkeypatch):
    folder = root/"cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        rows = np.stack([colour(number).transpose(2, 0, 1).ravel()]*4)
        (folder/name).write_bytes(pickle.dumps({"data": rows, "labels": [number, 9, 0, 3]}))
    (folder/"batches.meta").write_bytes(pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]}))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    return (20, 4), (3, 32, 32), 10

def eurosat(root, monkeypatch):
    for name in ("Forest", "River"):
        (root/"eurosat"/"2750"/name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(colour(i, (64, 64))).save(root/"eurosat"/"2750"/name/f"{name}_{i}.png")
    return (18, 2), (3, 64, 64), 2

def flowers102(root, monkeypatch):
    from scipy.io import savemat
    folder = root/"flowers-102"
    (folder/"jpg").mkdir(parents=True)
    for i in range(1, 9): Image.fromarray(colour(i, (90 + i, 70))).save(folder/"jpg"/f"image_{i:05}.jpg")
    savemat(folder/"imagelabels.mat", {"labels": np.arange(1, 9)[None]})
    savemat(folder/"setid.mat", {"trnid": np.array([[1]]), "valid": np.array([[2, 3]]),
                                 "tstid": np.array([[4, 5, 6, 7, 8]])})
    monkeypatch.setattr(datasets.flowers102, "check_integrity", lambda *_: True)
    return (5, 2), (3, 64, 64), 102

def imagenette(root, monkeypatch):
    for split, n in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n03888257"):
            folder = root/"imagenette2-160"/split/wnid
            folder.mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(colour(i, (200, 160 + i)))
                (image.convert("L") if i == 1 else image).save(folder/f"{wnid}_{i}.JPEG")
    return (6, 4), (3, 64, 64), 2

WRITERS = {"cifar10": cifar10, "eurosat": eurosat, "flowers102": flowers102, "imagenette": imagenette}

@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_data_set_by_name(name, tmp_path, monkeypatch):
    "Both parts, sizes, names and captions, and what `--resize` does; the same images every time."
    counts, shape, classes = WRITERS[name](tmp_path, monkeypatch)
    parts = load_data(name, tmp_path)
    assert tuple(map(len, parts)) == counts
    for part in parts:
        assert part.images.shape[1:] == shape and len(part.classes) == classes
        assert part.captions == tuple(part.classes[label] for label in part.labels)
        left, right = part.images[0, :, 20, 4].tolist(), part.images[0, :, 20, -4].tolist()
        assert abs(left[1] - 100) < 6 and abs(left[2] - 200) < 6 and max(right) < 6
    assert fingerprint(load_data(name, tmp_path)[0]) == fingerprint(parts[0])
    small, _ = load_data(name, tmp_path, resize=16)
    assert small.images.shape[1:] == (3, 16, 16) and small.labels.tolist() == parts[0].labels.tolist()

def test_parts_do_not_overlap(tmp_path, monkeypatch):
    "Of a set without parts, a tenth validates."
    eurosat(tmp_path, monkeypatch)
    parts = load_data("eurosat", tmp_path)
    rows = [{tuple(image.flatten().tolist()) for image in part.images} for part in parts]
    assert len(rows[0] | rows[1]) == 10 # ten colours in each of two classes

@pytest.mark.parametrize("name", OTHER_DATA)
def test_without_a_network(name, tmp_path, monkeypatch):
    "One line names the data set, the folder and what to do. Nothing half-finished stays in the way."
    def fail(*args, **kwargs): raise OSError("no network\nsecond line")
    for module in (datasets.cifar, datasets.eurosat, datasets.flowers102, datasets.imagenette):
        for what in ("download_and_extract_archive", "download_url"):
            if hasattr(module, what): monkeypatch.setattr(module, what, fail)
    with pytest.raises(DataError) as error: load_other_data(name, tmp_path)
    said = str(error.value)
    assert said.startswith(f"{name} in {tmp_path} cannot be read or downloaded (no network)")
    assert "\n" not in said
    WRITERS[name](tmp_path/"other", monkeypatch)
    assert len(load_other_data(name, tmp_path/"other")) == 2

def test_a_list_of_images():
    "In colour, whatever they were. Different sizes and an empty list are refused."
    def images(*sizes):
        return [(Image.new(("RGB", "L", "P")[i % 3], size), 0) for i, size in enumerate(sizes)]
    assert collect_images(images((10, 12), (10, 12)), ("a",)).images.shape == (2, 3, 12, 10)
    assert collect_images(images((10, 12), (30, 9), (8, 8)), ("a",), 8).images.shape == (3, 3, 8, 8)
    with pytest.raises(DataError, match="image 1 has 10x13 pixels, the first one 10x12; add --resize N"):
        collect_images(images((10, 12), (10, 13)), ("a",))
    with pytest.raises(DataError, match="no images"): collect_images([], ("a",))

def test_presets_fit(tmp_path, monkeypatch):
    "All of them are data sets of the commands, and `emoji64` fits photos."
    assert OTHER_DATA.keys() <= DATA_SETS.keys()
    imagenette(tmp_path, monkeypatch)
    data, _ = load_data("imagenette", tmp_path)
    config = fit_to_data(PRESETS["emoji64"], tuple(data.images.shape[1:]), data.classes)
    assert config.classes == ("tench", "parachute") and config.model.num_classes == 2
    assert torch.equal(data.labels, torch.tensor([0, 0, 0, 1, 1, 1]))
