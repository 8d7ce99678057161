"A model of text: network, data, judge, what a run finds out about captions, and the commands."
import json
import math
import shutil
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from peers import randomised
from PIL import Image
from processes import same_tensors
from scripts import TOOLS
from test_commands import command
from test_faults import one_error
from test_text import bert_folder
from torch import nn
from torch.testing import assert_close

from ddpm_tutorial.autoencoder import Autoencoder, AutoencoderConfig, encode_images, rebuild_images
from ddpm_tutorial.data import (
    PIXELS,
    Codec,
    DataError,
    ImageData,
    fingerprint,
    resized,
    to_float,
    without_labels,
)
from ddpm_tutorial.emoji import emoji_with_names
from ddpm_tutorial.run import check, data_sets, evaluate, report, sample, train
from ddpm_tutorial.run.checkpoint import (
    load_checkpoint,
    load_model,
    load_pretrained,
    save_checkpoint,
    save_weights,
)
from ddpm_tutorial.run.conditions import (
    encode_data,
    load_autoencoder,
    load_codec,
    measure_latents,
    read_facts,
    text_conditions,
    text_facts,
    weights_fingerprint,
)
from ddpm_tutorial.run.config import (
    AUTOENCODERS,
    PRESETS,
    CodecConfig,
    Config,
    ConfigError,
    LatentSpace,
    SamplingConfig,
    config_from_dict,
    differences,
)
from ddpm_tutorial.run.tracking import read_metrics
from ddpm_tutorial.sampler import guided, null_conditions
from ddpm_tutorial.text import TextConfig, tokenize
from ddpm_tutorial.text_to_image import (
    EncodedData,
    Judge,
    TextToImage,
    judge_objective,
    load_judge,
    retrieval,
)
from ddpm_tutorial.training import (
    TrainConfig,
    diffusion_objective,
    drop_conditions,
    find_gradient,
    new_state,
    random_generator,
    train_steps,
)
from ddpm_tutorial.unet import UNet, UNetConfig

CAPTIONS = ("red dog", "Blue dog", "a small blue car", "red car", "red cat", "cat, blue")
WORDS = ("a", "blue", "car", "cat", "dog", "red", "small")
CODEC = CodecConfig(model=AutoencoderConfig(base_channels=8, num_groups=2), image_shape=(3, 32, 32))
NETWORK = UNetConfig(image_size=8, in_channels=4, num_classes=0, base_channels=8, channel_multipliers=(1, 1),
                     head_dim=8, num_groups=2, context_dim=32)
OWN, BERT = TextConfig("own", 32, 1), TextConfig("some/bert")

def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def captioned(n=32, side=32):
    "Images of noise in two classes. The last four are the first four once more."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    images[-4:] = images[:4].clone()
    captions = tuple(CAPTIONS[i % 6] for i in range(n))
    return ImageData(images, torch.arange(n) % 2, ("even", "odd"), captions)

def fake_data(root, resize):
    "As a function of `DATA_SETS`: 24 images to train on, and 8 to validate with."
    data = captioned(side=resize or 32)
    return data[:24], data[24:]

@pytest.fixture(scope="module", autouse=True)
def data_set():
    "The commands know the images as `--data fake`. The curves are not drawn, which would take a while."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda rows: "<svg/>")
        patch.setitem(data_sets.DATA_SETS, "fake", fake_data)
        patch.setitem(data_sets.DATA_SETS, "silent", lambda *args: tuple(
            replace(part, captions=()) for part in fake_data(*args)))
        yield

def saved_autoencoder(path, change=0., config=CODEC):
    "The path of a small one with random weights, one of which may be changed."
    torch.manual_seed(0)
    model = Autoencoder(config.model).requires_grad_(False)
    next(model.parameters()).view(-1)[0] += change
    save_weights(path, model.state_dict(), config)
    return path

@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return saved_autoencoder(tmp_path_factory.mktemp("codec")/"autoencoder.safetensors")

# --- captions ---

def test_captions_stay_with_their_images():
    "However images are chosen or scaled. They belong to the fingerprint."
    data = captioned()
    for index in (slice(3, 9), torch.tensor([5, 0, 5]), torch.arange(32) % 7 == 0):
        part = data[index]
        assert part.captions == tuple(CAPTIONS[i % 6] for i in torch.arange(32)[index].tolist())
        assert torch.equal(part.images, data.images[index])
    assert without_labels(data).captions == resized(data, 8).captions == data.captions
    assert captioned(6)[:6].captions == CAPTIONS and not replace(data, captions=())[2:].captions
    one, other = fingerprint(data), fingerprint(replace(data, captions=data.captions[::-1]))
    assert len({one, other, fingerprint(replace(data, captions=()))}) == 3 and one == fingerprint(captioned())
    with pytest.raises(DataError, match="32 images need as many captions, not 31"):
        replace(data, captions=data.captions[1:])

# --- network ---

def made(text=OWN, seed=0):
    "A model with random weights everywhere, and conditions of three prompts for it."
    model = randomised(TextToImage(NETWORK, text, len(WORDS), 4), seed)
    if text is OWN: return model, {"tokens": tokenize(["red dog", "", "a blue car"], WORDS, 4)}
    mask = torch.arange(5) < torch.tensor([[3], [1], [5]])
    return model, {"context": normal(3, 5, 32, seed=2)*mask[..., None], "context_mask": mask}

each_kind = pytest.mark.parametrize("text", [OWN, BERT], ids=["own", "bert"])

@each_kind
def test_no_caption(text):
    "`null_cond` has the shape of the conditions, and a row of it can take the place of theirs."
    model, cond = made(text)
    assert model.null_cond.keys() == cond.keys() and (model.text is None) == (text is BERT)
    nothing = null_conditions(model.null_cond, cond)
    for name, rows in cond.items():
        assert torch.equal(nothing[name], model.null_cond[name].expand_as(rows))
    if text is OWN:
        assert torch.equal(model.null_cond["tokens"], tokenize([""], WORDS, 4)[0])
        assert torch.equal(cond["tokens"][1], model.null_cond["tokens"])
    else: assert model.null_cond["context_mask"].tolist() == [True, *[False]*4]

@each_kind
def test_captions_are_dropped(text):
    "All conditions of an image at once, or none of them."
    model, cond = made(text)
    cond = {name: rows[[0, 2]].repeat(100, *[1]*(rows.ndim - 1)) for name, rows in cond.items()}
    nothing = null_conditions(model.null_cond, cond)
    def is_null(found):
        equal = [(found[name] == nothing[name]).flatten(1).all(dim=1) for name in cond]
        assert all(torch.equal(equal[0], other) for other in equal)
        return equal[0].double().mean().item()
    for probability, low, high in ((0., 0., 0.), (0.5, 0.4, 0.6), (1., 1., 1.)):
        dropped = drop_conditions(cond, model.null_cond, probability, torch.Generator().manual_seed(0))
        assert low <= is_null(dropped) <= high
        assert all(dropped[name].dtype == cond[name].dtype for name in cond)

@each_kind
def test_guidance_leads_away_from_no_caption(text):
    "Without + s (with - without), each computed by itself. At scale 0 the caption does not matter."
    (model, cond), x, t = made(text), normal(3, 4, 8, 8), torch.tensor([0, 50, 99])
    nothing = null_conditions(model.null_cond, cond)
    without, plain = model(x, t, **nothing), model(x, t, **cond)
    assert (without - plain).abs().max() > 0.01
    for scale in (0., 1., 3.):
        found = guided(model, scale, model.null_cond)(x, t, **cond)
        assert_close(found, without + scale*(plain - without), rtol=1e-4, atol=1e-4)

def test_pixels_ask_the_words():
    "The U-Net gets what the text encoder makes of the tokens. Without tokens it is refused."
    (model, cond), x, t = made(), normal(3, 4, 8, 8), torch.tensor([0, 50, 99])
    context, mask = model.text(cond["tokens"])
    assert torch.equal(model(x, t, **cond), model.unet(x, t, context=context, context_mask=mask))
    with pytest.raises(ValueError, match="it needs a context"): model(x, t)
    with pytest.raises(ValueError, match="tokens"): guided(model, 2., model.null_cond)(x, t)

def test_both_parts_learn():
    "Every weight of the U-Net and of the text encoder gets a gradient, in one part or in three."
    x0, found = normal(6, 4, 8, 8), []
    cond = {"tokens": tokenize([*CAPTIONS], WORDS, 4)}
    objective = diffusion_objective(PRESETS["emoji"].scheduler.build(), 0.5)
    for parts in (1, 3):
        config = TrainConfig(batch_size=6, accumulate=parts)
        state = new_state(made()[0].requires_grad_(), config)
        losses, _ = find_gradient(state, objective, x0, cond, config, 1e-3)
        found.append([losses, *[weight.grad for weight in state.model.parameters()]])
    assert all(part.any() for part in found[0])
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)

# --- data ---

def test_encoded_data_are_served_as_they_are():
    "Latents as they are, uint8 images in [-1, 1], and the rows of each condition that belong to them."
    cond = {"tokens": torch.arange(12).view(6, 2), "labels": torch.arange(6)}
    images, latents, index = captioned(6, 8).images, normal(6, 4, 2, 2), torch.tensor([4, 0, 4])
    x0, found = EncodedData(latents, cond).batch(index, "cpu")
    assert torch.equal(x0, latents[index]) and found.keys() == cond.keys()
    assert all(torch.equal(found[name], cond[name][index]) for name in cond)
    x0, found = EncodedData(images, {}).batch(index, "cpu")
    assert torch.equal(x0, to_float(images[index])) and found == {} and len(EncodedData(images, {})) == 6

# --- judge ---

class Fixed(nn.Module):
    "A judge with a fixed table of scores. It keeps the images that it is shown."
    def __init__(self, table):
        super().__init__()
        self.table, self.seen = table, []

    def forward(self, x, tokens):
        self.seen.append(x)
        return self.table

def judged(table, x0=None, seed=0, **kwargs):
    "The losses that this table of scores gets, and the images that the judge was shown."
    n = len(table)
    model, x0 = Fixed(table), torch.zeros(n, 3, 16, 16) if x0 is None else x0
    losses, level = judge_objective(**kwargs)(model, x0, {"tokens": torch.zeros(n, 3).long()},
                                              torch.Generator().manual_seed(seed))
    assert level.tolist() == [0.]*n and losses.shape == (n,)
    return losses, model.seen[0]

@pytest.mark.parametrize("n", [1, 2, 9])
def test_what_a_judge_loses(n):
    "One that knows nothing loses log n. A perfect one loses nothing, and one that is always wrong a lot."
    assert_close(judged(torch.full((n, n), 3.))[0], torch.full((n,), math.log(n)))
    assert judged(50*torch.eye(n))[0].max() < 1e-6
    if n > 1: assert judged(50*torch.eye(n).roll(1, dims=0))[0].min() > 49

def test_a_judge_loses_both_ways():
    "Half for finding the caption among those of the batch, half for finding the picture."
    table, rows = normal(4, 4), torch.arange(4)
    expected = -(table.log_softmax(dim=1)[rows, rows] + table.log_softmax(dim=0)[rows, rows])/2
    assert_close(judged(table)[0], expected)

def test_what_a_judge_is_shown():
    "Images moved by up to four pixels, with white where they were not, and noise of up to 0.3."
    black, table = torch.full((200, 3, 16, 16), -1.), torch.zeros(200, 200)
    _, seen = judged(table, black)
    for dim in (1, 2): # white rows, and white columns
        middle = seen.mean(dim=1).narrow(dim, 4, 8).mean(dim=dim) # of the other direction
        white = middle > 0
        assert set(white.sum(dim=1).tolist()) == {0, 1, 2, 3, 4} and not white[:, 4:12].any()
        assert white[:, 0].any() and white[:, -1].any() and not (white[:, 0] & white[:, -1]).any()
    _, still = judged(table, black, max_shift=0)
    strength = (still - black).flatten(1).std(dim=1)
    assert strength.min() < 0.05 < 0.25 < strength.max() < 0.32
    assert torch.equal(judged(table, black)[1], seen) and not torch.equal(judged(table, black, 1)[1], seen)

def test_scores_of_a_judge():
    "The scaled product of two vectors of length 1, for each picture and each caption."
    judge = randomised(Judge(7, 4, 32))
    x, tokens = normal(3, 3, 64, 64), tokenize([*CAPTIONS[:5]], WORDS, 4)
    looks, reads = judge.look(x), judge.read(tokens)
    for vectors, n in ((looks, 3), (reads, 5)): assert_close(vectors.norm(dim=1), torch.ones(n))
    assert_close(judge(x, tokens), judge.log_scale.exp()*looks @ reads.T)
    assert Judge(7, 4).log_scale.exp().item() == pytest.approx(10)

def test_retrieval():
    "Whether no other prompt fits better, for any number of pictures; each is seen in [-1, 1]."
    class ByRed:
        def look(self, x):
            assert -1 <= x.min() <= x.max() <= 1 and len(x) <= 250
            return torch.stack([x[:, 0].mean(dim=(1, 2)), -x[:, 0].mean(dim=(1, 2))], dim=1)
        def read(self, tokens): return torch.eye(2)[tokens[:, 0]] # 0: red, 1: not red
    images = torch.zeros(600, 3, 8, 8, dtype=torch.uint8)
    images[::3, 0] = 255
    is_red, tokens = torch.arange(600) % 3 == 0, torch.tensor([[1], [0]])
    found = retrieval(ByRed(), images, tokens, own=is_red.long())
    assert found.dtype == torch.bool and found.shape == (600,) and found.all()
    assert torch.equal(retrieval(ByRed(), images, tokens, own=torch.ones(600).long()), is_red)

def test_a_judge_learns():
    "After a few steps it tells eight pictures apart: a black square on white, in eight places."
    images = torch.full((8, 3, 64, 64), 255, dtype=torch.uint8)
    for i, image in enumerate(images): image[:, 32*(i % 2):, 16*(i//2):][:, :32, :16] = 0
    tokens = tokenize([*"abcdefgh"], tuple("abcdefgh"), 1)
    torch.manual_seed(0)
    config = TrainConfig(epochs=30, batch_size=8, lr=3e-3)
    state = new_state(Judge(8, 1, 32), config)
    before = retrieval(state.model, images, tokens, torch.arange(8)).sum()
    steps = train_steps(state, EncodedData(images, {"tokens": tokens}), judge_objective(2), config)
    losses = [step.loss for step in steps]
    assert retrieval(state.model, images, tokens, torch.arange(8)).all() and before < 5
    assert losses[-1] < 0.3 < 1.5 < losses[0]

# --- configuration ---

LATENTS = LatentSpace("0123456789abcdef", (4, 8, 8), (0.5, 0., -1., 2.), (1., 2., 3., 4.))

@pytest.mark.parametrize("changes, says", [
    (dict(autoencoder="emoji_autoencoder"), "clip_sample must be off"),
    (dict(text=OWN), "set num_classes to 0")])
def test_settings_that_do_not_fit_together(changes, says):
    "Latents cannot be clipped, and a model is told words or classes."
    with pytest.raises(ValueError, match=says): replace(Config(), **changes)

@pytest.mark.parametrize("text", [OWN, BERT, TextConfig()], ids=lambda text: text.text_encoder)
def test_settings_survive_json(text):
    "With everything that was found out about captions and latents."
    emoji = PRESETS["emoji"]
    assert config_from_dict(json.loads(json.dumps(asdict(emoji)))) == emoji and emoji.latents is None
    config = replace(emoji, text=text, autoencoder="a/b.pth", latents=LATENTS, image_shape=(3, 32, 32),
                     vocabulary=WORDS, max_words=4, text_fingerprint="89abcdef01234567")
    again = config_from_dict(json.loads(json.dumps(asdict(config))))
    assert again == config and isinstance(again.latents, LatentSpace) and again.sample_shape == (4, 8, 8)
    assert again.uses_text == (text.text_encoder != "none") and not again.uses_labels
    other = replace(config, latents=replace(LATENTS, fingerprint="x"), vocabulary=WORDS[1:])
    assert differences(config, other).keys() == {"latents.fingerprint", "vocabulary"}
    for change in ({"latents": {"fingerprint": "x"}}, {"latents": 3}, {"text": {"text_width": 33}}):
        with pytest.raises(ConfigError): config_from_dict(asdict(config) | change)

# --- autoencoder ---

def test_a_fingerprint_is_that_of_the_weights():
    "Equal for equal weights, however they lie in memory. Different for a single one, or for another name."
    model, same, other = Autoencoder(CODEC.model), Autoencoder(CODEC.model), Autoencoder(CODEC.model)
    for one in (same, other): one.load_state_dict(model.state_dict())
    list(other.parameters())[-1].data[-1] += 1e-6
    same.to(memory_format=torch.channels_last)
    found = [weights_fingerprint(one) for one in (model, same, other, nn.Sequential(model))]
    assert found[0] == found[1] and len(set(found)) == 3 and len(found[0]) == 16

@pytest.mark.parametrize("name, shape, says", [
    ("nowhere.pth", (3, 32, 32), ["nowhere.pth is not there", "name one with --autoencoder"]),
    ("damaged", (3, 32, 32), ["damaged", "name one with --autoencoder"]),
    ("folder", (3, 32, 32), ["folder is a folder", "name one with --autoencoder"]),
    ("small", (3, 32, 32), ["small is a diffusion model; name a checkpoint of an autoencoder"]),
    ("good", (1, 32, 32), ["takes images of 3 channels, and these have 1"]),
    ("good", (3, 32, 30), ["32x30 pixels", "multiples of 4", "add --resize"]),
    ("emoji_autoencoder", (3, 66, 64), ["emoji_autoencoder: ", "66x64 pixels", "add --resize"])])
def test_autoencoders_that_cannot_be_used(autoencoder, tmp_path, name, shape, says):
    "One line names the file and says what to do."
    (tmp_path/"folder").mkdir()
    (tmp_path/"damaged").write_bytes(autoencoder.read_bytes()[:-500])
    if name in ("damaged", "folder"): name = str(tmp_path/name)
    with pytest.raises(ConfigError) as caught:
        load_autoencoder(str(autoencoder) if name == "good" else name, shape)
    said = str(caught.value)
    assert said.startswith("autoencoder: ") and "\n" not in said and all(part in said for part in says)

def test_an_autoencoder_by_name_or_path(autoencoder):
    "It comes with its fingerprint and the shape of its latents."
    model, found, shape = load_autoencoder(str(autoencoder), (3, 32, 48))
    assert shape == (4, 8, 12) and found == weights_fingerprint(load_model(autoencoder)[0])
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    _, other, shape = load_autoencoder("emoji_autoencoder", (3, 64, 64))
    assert shape == (4, 16, 16) and other != found

def test_a_constant_channel_of_latents(tmp_path):
    "It could not be scaled."
    torch.manual_seed(0)
    model = Autoencoder(CODEC.model).requires_grad_(False)
    for layer in model.encoder: # nothing but the last bias
        if isinstance(layer, nn.Conv2d): layer.weight.zero_()
    save_weights(tmp_path/"a.safetensors", model.state_dict(), CODEC)
    with pytest.raises(ConfigError, match="^autoencoder: .*a channel of the latents is constant"):
        measure_latents(str(tmp_path/"a.safetensors"), captioned())

# --- facts and conditions ---

def unfitted(autoencoder=None, text=OWN, **changes):
    "Settings of a small model, before it has seen its images."
    sampling = SamplingConfig(clip_sample=False, num_inference_steps=2)
    model = replace(NETWORK, image_size=28, in_channels=1, context_dim=0)
    return Config(model=model, text=text, sampling=sampling, data="fake", **changes,
                  autoencoder=None if autoencoder is None else str(autoencoder))

def test_facts(autoencoder):
    "The words, the longest caption, the vectors' width, and the latents are read off the data."
    data, _ = fake_data(None, None)
    config = read_facts(unfitted(autoencoder), without_labels(data))
    assert (config.vocabulary, config.max_words, config.model.context_dim) == (WORDS, 4, 32)
    assert (config.model.in_channels, config.model.image_size) == (4, 8) and config.image_shape == (3, 32, 32)
    latents = encode_images(load_model(autoencoder)[0], data.images)
    assert config.latents == measure_latents(str(autoencoder), data)
    assert config.latents.shape == config.sample_shape == (4, 8, 8)
    assert_close(torch.tensor(config.latents.mean), latents.mean(dim=(0, 2, 3)))
    assert_close(torch.tensor(config.latents.std), latents.transpose(0, 1).flatten(1).std(dim=1))
    model = config.build_model()
    assert isinstance(model, TextToImage) and model.text.words.weight.shape == (2 + len(WORDS), 32)

def test_facts_without_text_or_without_latents(autoencoder):
    "Words on pixels, labels on latents, and an autoencoder itself."
    data, _ = fake_data(None, None)
    config = read_facts(unfitted(), without_labels(data))
    assert config.latents is None and config.sample_shape == (3, 32, 32) and config.vocabulary == WORDS
    labels = unfitted(autoencoder, TextConfig())
    config = read_facts(replace(labels, model=replace(labels.model, num_classes=10)), data)
    assert config.classes == ("even", "odd") and config.model.num_classes == 2 and config.vocabulary == ()
    assert type(config.build_model()) is UNet and config.latents.shape == (4, 8, 8)
    assert read_facts(AUTOENCODERS["emoji_autoencoder"], data).image_shape == (3, 32, 32)

def test_known_latents_are_not_measured_again():
    "A run that goes on keeps them, and needs no autoencoder for that."
    data, _ = fake_data(None, None)
    config = read_facts(unfitted("nowhere.pth"), without_labels(data), known=LATENTS)
    assert config.latents == LATENTS
    with pytest.raises(ConfigError, match="nowhere.pth is not there"): load_codec(config)

def test_facts_that_were_set_to_something_else(autoencoder):
    data, _ = fake_data(None, None)
    config = unfitted(autoencoder)
    with pytest.raises(ConfigError, match="context_dim is 64, but fake needs 32"):
        read_facts(replace(config, model=replace(config.model, context_dim=64)), without_labels(data))

def test_captions_that_are_missing(autoencoder):
    with pytest.raises(ConfigError, match="^text_encoder: fake has no captions; add --text_encoder none, or"):
        read_facts(unfitted(autoencoder), replace(captioned(), captions=()))
    assert text_facts(unfitted(text=TextConfig()), ()) == {}

def test_codec_of_a_run(autoencoder, tmp_path):
    "Mean 0 and standard deviation 1 on the way in. The way out is that of the autoencoder."
    data, _ = fake_data(None, None)
    config = read_facts(unfitted(autoencoder), without_labels(data))
    codec = load_codec(config)
    x = codec.encode(data.images)
    flat = x.transpose(0, 1).flatten(1)
    assert_close(flat.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-4)
    assert_close(flat.std(dim=1), torch.ones(4), rtol=1e-4, atol=0)
    assert_close(codec.decode(x), rebuild_images(load_model(autoencoder)[0], data.images), rtol=0, atol=1)
    assert load_codec(unfitted()) is PIXELS
    moved = shutil.copy(autoencoder, tmp_path/"moved")
    assert torch.equal(load_codec(replace(config, autoencoder=str(moved))).encode(data.images), x)

def test_another_autoencoder_is_refused(autoencoder, tmp_path):
    "Even if a single weight differs. Both fingerprints are named."
    config = read_facts(unfitted(autoencoder), without_labels(captioned()))
    other = saved_autoencoder(tmp_path/"other.safetensors", 0.01)
    found = weights_fingerprint(load_model(other)[0])
    with pytest.raises(ConfigError, match="name the right one with --autoencoder$") as caught:
        load_codec(replace(config, autoencoder=str(other)))
    said = str(caught.value)
    assert found != config.latents.fingerprint and found in said and config.latents.fingerprint in said
    assert str(other) in said and "\n" not in said

def test_what_a_model_is_told(autoencoder):
    "A row for each prompt. One that it cannot read is refused in one line."
    config = read_facts(unfitted(autoencoder), without_labels(captioned()))
    found = text_conditions(config, ("red dog", "", "Red, DOG"))
    assert found.keys() == {"tokens"} and torch.equal(found["tokens"][0], found["tokens"][2])
    assert torch.equal(found["tokens"][1], config.build_model().null_cond["tokens"])
    for prompt, says in (("red dgo", "prompt: the model has never read 'dgo' (near: dog)"),
                         ("dog "*10_000, "prompt: a prompt has 10,000 words, and the model reads")):
        with pytest.raises(ConfigError) as caught: text_conditions(config, ("red dog", prompt))
        assert str(caught.value).startswith(says) and len(str(caught.value)) < 200
    with pytest.warns(UserWarning, match="'dgo' .*left out"):
        assert text_conditions(config, ("red dgo",), True)["tokens"].tolist() == [[1, 7, 0, 0, 0]]

def test_equal_images_are_encoded_once(autoencoder):
    "Each with its own caption. The latents are those of each image alone."
    data = captioned()
    config, encoded = read_facts(unfitted(autoencoder), without_labels(data)), []
    codec = load_codec(config)
    def encode(images):
        encoded.append(len(images))
        return codec.encode(images)
    found = encode_data(config, without_labels(data), Codec(encode, codec.decode))
    assert encoded == [28] and len(found) == 32 and found.cond.keys() == {"tokens"}
    assert torch.equal(found.cond["tokens"], tokenize(data.captions, WORDS, 4))
    alone = torch.cat([codec.encode(image[None]) for image in data.images])
    assert_close(found.x0, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.x0[-4:], found.x0[:4]) and not torch.equal(found.x0[4], found.x0[0])
    assert not torch.equal(found.cond["tokens"][-4:], found.cond["tokens"][:4])

def test_data_of_each_kind(autoencoder):
    "Pixels without words stay as they are. With words they stay uint8. Labels go along with latents."
    data = captioned()
    bare = without_labels(data)
    assert encode_data(read_facts(unfitted(text=TextConfig()), bare), bare, PIXELS) is bare
    found = encode_data(read_facts(unfitted(), bare), bare, PIXELS)
    assert found.x0 is bare.images and found.cond.keys() == {"tokens"}
    labels = unfitted(autoencoder, TextConfig())
    config = read_facts(replace(labels, model=replace(labels.model, num_classes=2)), data)
    found = encode_data(config, data, load_codec(config))
    assert found.cond.keys() == {"labels"} and torch.equal(found.cond["labels"], data.labels)
    assert found.x0.shape == (32, 4, 8, 8) and found.x0.dtype == torch.float32

# --- commands ---

SMALL = ["--data", "fake", "--base_channels", 8, "--channel_multipliers", 1, 1, "--attention_resolutions",
         "--head_dim", 8, "--num_groups", 2, "--batch_size", 8, "--num_inference_steps", 2, "--device", "cpu",
         "--precision", "fp32", "--no-wandb", "--log_every", 1, "--sample_every", 1, "--no-lr_decay",
         "--no-clip_sample"]
EMOJI = ["--config", "emoji", *SMALL, "--resize", 32, "--text_width", 32, "--text_layers", 1]

def newest(folder): return load_checkpoint(folder/"checkpoints"/"latest.pth")

def trained(folder, *args): return command(train, *args, "--output_dir", folder)

@pytest.fixture(scope="module")
def run(autoencoder, tmp_path_factory):
    "The folder of a short run on latents: two epochs of three steps."
    folder = tmp_path_factory.mktemp("runs")/"emoji"
    assert trained(folder, *EMOJI, "--autoencoder", autoencoder, "--max_steps", 6) == 0
    return folder

@pytest.fixture(scope="module")
def weights(run):
    "The path of a model like that of the run, with random weights: its prompts matter."
    model, config = load_model(run/"checkpoints"/"latest.pth")
    save_weights(run/"random.safetensors", randomised(model).state_dict(), config)
    return run/"random.safetensors"

def arrays(weights, path, *args):
    "The images and labels that the command draws."
    output = path/"a.npz"
    assert command(sample, "--checkpoint", weights, "--device", "cpu", "--output", output, *args) == 0
    with np.load(output) as file: return file["arr_0"], file["arr_1"]

def refused(capsys, module, *args, code=2):
    "The only line of an error."
    capsys.readouterr()
    assert command(module, *args) == code
    said = capsys.readouterr().err
    assert one_error(said) and said.count("\n") == 1
    return said

def test_a_run_of_text_leaves_what_any_run_leaves(run, autoencoder):
    "Its settings say what it knows about words and latents. Its picture has 32 samples of images."
    config = newest(run)["config"]
    assert config == config_from_dict(json.loads((run/"config.json").read_text()))
    assert (config.vocabulary, config.max_words, config.model.context_dim) == (WORDS, 4, 32)
    assert config.latents.shape == (4, 8, 8) and config.autoencoder == str(autoencoder)
    found = [line for line in read_metrics(run) if "validation_loss" in line]
    assert [line["step"] for line in found] == [3, 6] and len(found[0]["loss_by_noise"]) == 10
    for name in ("epoch_001.png", "epoch_002.png"):
        with Image.open(run/"samples"/name) as picture: assert picture.size == (66*8 + 2, 66*4 + 2)
    model, _ = load_model(run/"checkpoints"/"best_model.pth")
    assert isinstance(model, TextToImage) and (run/"report.html").exists()

def test_the_first_lines_describe_words_and_latents(autoencoder, tmp_path, capsys):
    "And it works in bf16."
    args = *EMOJI, "--autoencoder", autoencoder, "--max_steps", 1, "--precision", "bf16"
    assert trained(tmp_path/"run", *args) == 0
    said = capsys.readouterr().out
    for fact in ("24 images, 32x32 colour, no classes, 6 different captions", f"by {autoencoder}",
                 "latents of 4x8x8", "in bf16"): assert fact in said

@pytest.mark.parametrize("stops", [[3], [1, 4]]) # at the end of an epoch, and inside one
def test_a_run_goes_on_bit_for_bit(run, autoencoder, tmp_path, stops):
    "As the run that was never stopped."
    args = [*EMOJI, "--autoencoder", autoencoder, "--max_steps"]
    for i, stop in enumerate([*stops, 6]):
        assert trained(tmp_path/"cut", *args, stop, *["--resume"]*(i > 0)) == 0
    one, two = newest(run), newest(tmp_path/"cut")
    assert one["config"] == two["config"] and one["step"] == two["step"] == 6
    for name in ("model", "ema", "optimizer"): assert same_tensors(one[name], two[name])
    assert two["progress"]["best_loss"] == one["progress"]["best_loss"]

def test_an_autoencoder_may_be_moved(tmp_path, capsys):
    "The run goes on, and draws, if it is told the new place. Another one is refused in both."
    path = saved_autoencoder(tmp_path/"a.safetensors")
    assert trained(tmp_path/"run", *EMOJI, "--autoencoder", path, "--max_steps", 1) == 0
    weights = "--checkpoint", tmp_path/"run"/"checkpoints"/"latest.pth"
    prompt = "--prompt", "red dog", "--num_samples", 1
    moved = path.rename(tmp_path/"b.safetensors")
    goes_on = [*EMOJI, "--max_steps", 2, "--output_dir", tmp_path/"run", "--resume", "--autoencoder"]
    said = refused(capsys, sample, *weights, *prompt)
    assert f"{path} is not there" in said and "name one with --autoencoder" in said
    other = saved_autoencoder(tmp_path/"other.safetensors", 0.01)
    for module, args in ((train, goes_on), (sample, [*weights, *prompt, "--autoencoder"])):
        assert "x.pth is not there" in refused(capsys, module, *args, tmp_path/"x.pth")
        assert "latents of another one" in refused(capsys, module, *args, other)
        assert "small is a diffusion model" in refused(capsys, module, *args, "small")
        assert command(module, *args, moved) == 0
    assert newest(tmp_path/"run")["step"] == 2 and newest(tmp_path/"run")["config"].autoencoder == str(moved)

def test_text_on_pixels(tmp_path, capsys):
    "Without an autoencoder it works just as well."
    args = ["--config", "small", *SMALL, "--num_classes", 0, "--text_encoder", "own", "--text_width", 32,
            "--max_steps"]
    assert trained(tmp_path/"run", *args, 2) == 0 and trained(tmp_path/"run", *args, 4, "--resume") == 0
    checkpoint = tmp_path/"run"/"checkpoints"/"latest.pth"
    config = load_checkpoint(checkpoint)["config"]
    assert config.latents is None and config.autoencoder is None and config.model.image_size == 32
    images, _ = arrays(checkpoint, tmp_path, "--prompt", "red dog", "--num_samples", 2)
    assert images.shape == (2, 32, 32, 3)
    said = refused(capsys, sample, "--checkpoint", checkpoint, "--prompt", "cat", "--autoencoder", "small")
    assert "this model works on pixels, leave it out" in said

def test_labels_on_latents(autoencoder, tmp_path, capsys):
    "Without text. A row for each class, and no prompt."
    args = ["--config", "small", *SMALL, "--autoencoder", autoencoder, "--max_steps", 2]
    assert trained(tmp_path/"run", *args) == 0
    checkpoint = tmp_path/"run"/"checkpoints"/"latest.pth"
    images, labels = arrays(checkpoint, tmp_path, "--mode", "class_grid", "--num_samples", 4)
    assert images.shape == (4, 32, 32, 3) and labels.tolist() == [0, 0, 1, 1]
    assert arrays(checkpoint, tmp_path, "--class_label", 1)[1].tolist() == [1]*16
    for option in ("--prompt", "--negative_prompt", "--prompt_file"):
        said = refused(capsys, sample, "--checkpoint", checkpoint, option, "cat")
        assert f"{option[2:]}: this model reads no text" in said
    assert "drop_unknown: this" in refused(capsys, sample, "--checkpoint", checkpoint, "--drop_unknown")
    assert "this model draws even, odd" in refused(capsys, evaluate, "--checkpoint", checkpoint,
                                                   "--data", "sample", "--device", "cpu")

@pytest.mark.parametrize("args, says", [
    (["--clip_sample"], "clip_sample must be off"), (["--num_classes", 10], "set num_classes to 0"),
    (["--text_width", 33], "text_width must be a multiple of 32"), (["--text_layers", 0], "text_layers must"),
    (["--data", "silent"], "silent has no captions"), (["--context_dim", 64], "context_dim is 64, but fake"),
    (["--autoencoder", "small"], "small is a diffusion model"), (["--resize", 30], "add --resize"),
    (["--text_encoder", "/nowhere"], "text_encoder: the BERT /nowhere cannot be loaded")])
def test_trainings_that_cannot_be(autoencoder, tmp_path, args, says, capsys):
    "Exit code 2, and no checkpoint."
    if args[0] == "--text_encoder": bert_folder()
    assert trained(tmp_path/"run", *EMOJI, "--autoencoder", autoencoder, *args) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.rglob("*.pth"))

def test_a_prompt_decides_what_is_drawn(weights, tmp_path):
    "The same seed and prompt give the same images, in any case and with any commas. Other words differ."
    def drawn(prompt, *args):
        return arrays(weights, tmp_path, "--prompt", prompt, "--num_samples", 3, *args)[0]
    dog = drawn("red dog")
    assert dog.shape == (3, 32, 32, 3) and dog.dtype == np.uint8 and dog.std() > 1
    assert np.array_equal(drawn("Red,  DOG!"), dog)
    assert np.array_equal(drawn("red dog", "--batch_size", 3), dog)
    for other in ("red cat", "dog red", ""): assert not np.array_equal(drawn(other), dog)
    assert not np.array_equal(drawn("red dog", "--seed", 1), dog)
    assert not np.array_equal(drawn("red dog", "--guidance_scale", 1), dog)

def test_prompts_of_a_file(weights, tmp_path, capsys):
    "In turn, or a row for each; empty lines and spaces don't count."
    file = tmp_path/"prompts.txt"
    file.write_text("red dog\n\n  Blue cat \r\n\tcar\n", encoding="utf-8")
    images, labels = arrays(weights, tmp_path, "--prompt_file", file, "--num_samples", 7)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    grid = "--prompt_file", file, "--mode", "class_grid"
    _, labels = arrays(weights, tmp_path, *grid)
    assert labels.tolist() == [0]*8 + [1]*8 + [2]*8
    assert "rows: red dog; Blue cat; car" in capsys.readouterr().out
    said = refused(capsys, sample, "--checkpoint", weights, *grid, "--num_samples", 7)
    assert "must be a multiple of 3 in mode class_grid (so many prompts), not 7" in said
    assert command(sample, "--checkpoint", weights, *grid, "--num_samples", 6, "--output_dir", tmp_path) == 0
    with Image.open(tmp_path/"samples"/"class_grid_prompts.png") as picture:
        assert picture.size == (66*2 + 2, 66*3 + 2)
    file.write_text("red dog") # the first sample has the same noise
    one, _ = arrays(weights, tmp_path, "--prompt_file", file, "--num_samples", 7)
    assert np.array_equal(one[[0, 3, 6]], images[[0, 3, 6]]) and not np.array_equal(one[1], images[1])

@pytest.mark.parametrize("content", [None, b"", b"\n \n\t\n", "red dog".encode("utf-16"), "folder"])
def test_files_without_prompts(weights, tmp_path, content, capsys):
    "One line names the file."
    file = tmp_path/"prompts.txt"
    if content == "folder": file.mkdir()
    elif content is not None: file.write_bytes(content)
    said = refused(capsys, sample, "--checkpoint", weights, "--prompt_file", file)
    assert f"prompt_file {file}" in said and ("cannot be read" in said or "has no prompt in it" in said)
    assert not list(tmp_path.rglob("*.png"))

def test_a_negative_prompt_is_what_guidance_leads_away_from(weights, tmp_path, capsys):
    "An empty one is the same as none. Without guidance it is refused."
    def drawn(*args): return arrays(weights, tmp_path, "--prompt", "red dog", "--num_samples", 2, *args)[0]
    plain, away = drawn(), drawn("--negative_prompt", "red")
    assert not np.array_equal(plain, away) and np.array_equal(drawn("--negative_prompt", ""), plain)
    same = drawn("--negative_prompt", "Red dog") # then there is nothing to lead away from
    assert np.abs(same.astype(int) - drawn("--guidance_scale", 1)).max() <= 1
    negative = "--checkpoint", weights, "--prompt", "red dog", "--negative_prompt"
    assert "raise --guidance_scale above 1" in refused(capsys, sample, *negative, "cat",
                                                       "--guidance_scale", 1)
    assert "never read 'zebra'" in refused(capsys, sample, *negative, "zebra")

def test_the_way_from_noise_is_decoded(weights, run, tmp_path, autoencoder):
    "Each snapshot is an image; the last one is the sample. It is written as a strip, or as a moving picture."
    model, config = load_model(weights)
    cond, codec = text_conditions(config, ("red dog", "cat", "blue car")), load_codec(config)
    def how(): return dict(codec=codec, batch_size=2, generator=random_generator(0))
    frames = sample.draw_progress(model, config, 3, cond, 10, **how())
    assert frames.shape == (2, 3, 3, 32, 32) and frames.dtype == torch.uint8
    assert torch.equal(frames[-1], sample.draw_samples(model, config, 3, cond, **how()))
    args = ["--checkpoint", weights, "--mode", "progressive", "--prompt", "red dog"]
    assert command(sample, *args) == 0
    with Image.open(run/"samples"/"progressive_red_dog.png") as strip:
        assert strip.size == (66*2 + 2, 66*4 + 2)
    assert command(sample, *args, "--output", tmp_path/"a.gif") == 0
    with Image.open(tmp_path/"a.gif") as gif: assert gif.n_frames == 2 and gif.size == (134, 134)

@pytest.mark.parametrize("args, says", [
    ([], 'this model draws what you ask for; add --prompt "...", or a --prompt_file'),
    (["--class_label", 0], 'add --prompt "..."'), (["--negative_prompt", "cat"], 'add --prompt "..."'),
    (["--prompt", "red dgo"], "prompt: the model has never read 'dgo' (near: dog)"),
    (["--prompt", "🐶 日本"], "has never read '🐶', '日本'"), (["--prompt", "рыжая собака"], "read 'рыжая'"),
    (["--prompt", "dog "*10_000], "a prompt has 10,000 words, and the model reads"),
    (["--prompt", "zebra "*10_000], "has never read 'zebra'"), (["--prompt", "z"*10_000], "read 'zzz"),
    (["--prompt", "a\nb\x1b[31m\u202e"], "has never read 'b\\x1b[31m\\u202e'"),
    (["--prompt", "red dog", "--clip_sample"], "clip_sample must be off")])
def test_prompts_that_cannot_be_drawn(weights, args, says, capsys):
    "Exit code 2 and one line."
    said = refused(capsys, sample, "--checkpoint", weights, *args)
    assert says in said and len(said) < 300

@pytest.mark.parametrize("args, says", [
    (["--prompt", "dog", "--prompt_file", "x"], "prompt and prompt_file exclude each other"),
    (["--prompt", "dog", "--class_label", 1], "prompt and class_label exclude each other")])
def test_one_way_to_say_what_is_drawn(weights, args, says, capsys):
    assert command(sample, "--checkpoint", weights, *args) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())

def test_unknown_words_can_be_left_out(weights, tmp_path, capsys):
    "With one warning."
    args = "--num_samples", 3, "--drop_unknown"
    with warnings.catch_warnings(): # pytest shows each warning, a command each one once
        warnings.simplefilter("default")
        found, _ = arrays(weights, tmp_path, "--prompt", "red shiny dog", *args)
    assert capsys.readouterr().err == "warning: the model has never read 'shiny'; left out\n"
    assert np.array_equal(found, arrays(weights, tmp_path, "--prompt", "red dog", *args)[0])

def test_a_model_of_text_is_not_evaluated(weights, capsys):
    "The classifier knows clothes."
    args = "--checkpoint", weights, "--data", "sample", "--device", "cpu"
    for more in ([], ["--bits_per_dim"]):
        assert "this model draws what a prompt says" in refused(capsys, evaluate, *args, *more)

def test_check(autoencoder, capsys, monkeypatch):
    "Every part is tried, the encoding too; and so it is on pixels. Without captions it says so."
    args = ["--config", "emoji", "--data", "fake", "--device", "cpu"]
    for name in (str(autoencoder), None):
        preset = replace(PRESETS["emoji"], autoencoder=name, model=replace(PRESETS["emoji"].model,
                         base_channels=16, attention_resolutions=(14,)))
        monkeypatch.setitem(check.PRESETS, "emoji", preset)
        assert command(check, *args) == 0
        said = capsys.readouterr().out
        assert said.count("ok ") == 9 and "(10, 3, 32, 32)" in said and "tokens (5,)" in said
        assert ("latents (4, 8, 8), standard deviation 1." in said) == (name is not None)
    assert command(check, *args, "--data", "silent") == 1
    assert "silent has no captions" in (said := capsys.readouterr().err) and said.count("\n") == 1

@pytest.mark.parametrize("spoil, says", [
    (lambda x: x*math.nan, "the latents are not finite"),
    (lambda x: 9*x, "standard deviation of 8|standard deviation of 9")])
def test_check_notices_latents_that_are_wrong(autoencoder, monkeypatch, spoil, says):
    config = replace(unfitted(autoencoder), train=TrainConfig(batch_size=16))
    codec = load_codec(read_facts(config, without_labels(captioned())))
    wrong = Codec(lambda images: spoil(codec.encode(images)), codec.decode)
    monkeypatch.setattr(check, "load_codec", lambda *_: wrong)
    with pytest.raises(check.CheckError, match=says): check.check_inputs(config, torch.device("cpu"), "")

# --- a BERT ---

@pytest.fixture(scope="module")
def bert_run(autoencoder, tmp_path_factory):
    "The folder of a short run that is told the vectors of a real BERT."
    folder = tmp_path_factory.mktemp("runs")/"bert"
    args = [*EMOJI, "--text_encoder", bert_folder(), "--autoencoder", autoencoder, "--max_steps"]
    assert trained(folder, *args, 2) == 0 and trained(folder, *args, 4, "--resume") == 0
    return folder

def test_a_run_with_a_bert(bert_run):
    "Its facts are those of the BERT, whose weights are not in the checkpoint."
    checkpoint = newest(bert_run)
    config = checkpoint["config"]
    assert config.model.context_dim == 384 and config.vocabulary == () and len(config.text_fingerprint) == 16
    assert config.max_words == 5 and checkpoint["step"] == 4 # four words, between two pieces of its own
    assert not any(name.startswith("text.") for name in checkpoint["model"])
    assert (bert_run/"samples"/"epoch_002.png").exists()

def test_drawing_with_a_bert(bert_run, tmp_path, capsys):
    "Any word can be read, and a negative prompt works. A prompt that is too long is refused."
    model, config = load_model(bert_run/"checkpoints"/"latest.pth")
    weights = tmp_path/"weights.safetensors"
    save_weights(weights, randomised(model).state_dict(), config)
    def drawn(prompt, *args):
        return arrays(weights, tmp_path, "--prompt", prompt, "--num_samples", 2, *args)[0]
    dog = drawn("red dog")
    assert dog.shape == (2, 32, 32, 3) and np.array_equal(drawn("red dog"), dog)
    assert not np.array_equal(drawn("zebra 🐶"), dog)
    assert not np.array_equal(drawn("red dog", "--negative_prompt", "zebra"), dog)
    assert drawn("").shape == dog.shape
    args = ["--checkpoint", weights, "--prompt", "dog "*10_000]
    assert command(sample, *args) == 2
    assert one_error(capsys.readouterr().err, "prompt: a prompt has 10,002 pieces of words")

def test_vectors_of_a_bert_are_those_of_the_prompts(bert_run):
    "In their order, also for a prompt that comes twice. Another BERT is refused, and both are named."
    config = newest(bert_run)["config"]
    found = text_conditions(config, ("red dog", "cat", "red dog"))
    assert found["context"].shape == (3, 6, 384) and found["context_mask"].sum(dim=1).tolist() == [4, 3, 4]
    assert torch.equal(found["context"][0], found["context"][2])
    assert torch.equal(found["context"][1], text_conditions(config, ("cat",))["context"][0])
    null_conditions(config.build_model().null_cond, found)
    known = config.text_fingerprint
    with pytest.raises(ConfigError, match=f"another BERT .fingerprint {'0'*16}. than .*fingerprint {known}"):
        text_conditions(replace(config, text_fingerprint="0"*16), ("cat",))

def test_a_run_on_latents_does_not_go_on_without_them(autoencoder, tmp_path, capsys):
    "Nor one on pixels with an autoencoder: each is refused in one line that names the option."
    labels = ["--config", "small", *SMALL, "--max_steps"]
    with_one = "--autoencoder", autoencoder
    for name, first, then in (("latents", with_one, ()), ("pixels", (), with_one)):
        folder = tmp_path/name
        assert trained(folder, *labels, 1, *first) == 0
        said = refused(capsys, train, *labels, 2, *then, "--output_dir", folder, "--resume")
        assert "autoencoder" in said and "other images" not in said

def test_latents_that_are_too_small(autoencoder, tmp_path, capsys):
    "Exit code 2: the message names images or latents, not a setting that nobody made."
    args = [*EMOJI, "--resize", 16, "--autoencoder", autoencoder, "--output_dir", tmp_path/"run"]
    assert "latents" in refused(capsys, train, *args)

def test_check_with_few_images(monkeypatch):
    "Fewer than are drawn. This worked in 0.12."
    def few(*args): return tuple(part[:8] for part in fake_data(*args))
    monkeypatch.setitem(data_sets.DATA_SETS, "few", few)
    assert command(check, "--config", "tiny", "--data", "few", "--device", "cpu") == 0

def test_a_file_of_prompts_from_windows(weights, tmp_path):
    "Its first line may begin with a byte order mark."
    file = tmp_path/"prompts.txt"
    file.write_bytes("red dog\r\ncat\r\n".encode("utf-8-sig"))
    assert arrays(weights, tmp_path, "--prompt_file", file)[1].tolist() == [0, 1]*8

def test_a_new_word_in_the_validation(autoencoder, tmp_path, monkeypatch, capsys):
    "It is left out with a warning, and the run goes on."
    def odd(*args):
        data, others = fake_data(*args)
        return data, replace(others, captions=("zebra", *others.captions[1:]))
    monkeypatch.setitem(data_sets.DATA_SETS, "odd", odd)
    args = [*EMOJI, "--data", "odd", "--autoencoder", autoencoder, "--max_steps", 1]
    assert trained(tmp_path/"run", *args) == 0
    assert capsys.readouterr().err.count("never read 'zebra'; left out") == 1

def test_your_own_captioned_folder(tmp_path, monkeypatch):
    "A folder with a metadata.jsonl is all that a run of text needs. Another size is scaled on the way."
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path/f"{i}.png")
    told = ("red dog", "black cat")*10
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(told)]
    (tmp_path/"metadata.jsonl").write_text("\n".join(lines))
    folder = tmp_path/"run"
    args = [*EMOJI, "--data", tmp_path, "--resize", 16, "--autoencoder", "None", "--max_steps", 1]
    assert trained(folder, *args) == 0
    config = load_checkpoint(folder/"checkpoints"/"latest.pth")["config"]
    assert config.vocabulary == ("black", "cat", "dog", "red") and config.image_shape == (3, 16, 16)

def test_a_bert_is_quiet(bert_run, capfd):
    "Nothing on stderr but the error."
    weights = bert_run/"checkpoints"/"latest.pth"
    assert command(sample, "--checkpoint", weights, "--prompt", "red dog", "--num_samples", 1) == 0
    assert capfd.readouterr().err == ""
    assert command(sample, "--checkpoint", weights, "--prompt", "dog "*10_000) == 2
    assert capfd.readouterr().err.count("\n") == 1

def test_a_long_caption_in_the_validation(autoencoder, tmp_path, monkeypatch):
    "Longer than each one of the training. It fits in."
    def odd(*args):
        data, others = fake_data(*args)
        return data, replace(others, captions=(" ".join(["red"]*9), *others.captions[1:]))
    monkeypatch.setitem(data_sets.DATA_SETS, "odd", odd)
    folder = tmp_path/"run"
    args = [*EMOJI, "--data", "odd", "--autoencoder", autoencoder, "--max_steps", 1]
    assert trained(folder, *args) == 0
    assert load_checkpoint(folder/"checkpoints"/"latest.pth")["config"].max_words == 9

def test_latents_have_no_bits():
    "A learned variance is trained by the likelihood of pixels."
    emoji = PRESETS["emoji"]
    with pytest.raises(ValueError, match="learned_variance"):
        replace(emoji, model=replace(emoji.model, learned_variance=True),
                objective=PRESETS["small"].objective)
    with pytest.raises(ValueError, match="a mean and a std for each channel"):
        LatentSpace("", (4, 16, 16), (0.,)*3, (1.,)*4)

@pytest.mark.parametrize("name", ["own", "none"])
def test_a_bert_cannot_become_something_else(bert_run, name, capsys):
    weights = bert_run/"checkpoints"/"latest.pth"
    said = refused(capsys, sample, "--checkpoint", weights, "--prompt", "red dog", "--text_encoder", name)
    assert "name its place" in said

def test_a_bert_may_be_moved(bert_run, tmp_path):
    "The model draws the same, and the run goes on, if it is told the new place."
    weights, moved = bert_run/"checkpoints"/"latest.pth", shutil.copytree(bert_folder(), tmp_path/"moved")
    def draw(*args):
        file = tmp_path/f"{len(args)}.npz"
        given = "--prompt", "red dog", "--num_samples", 1, "--output", file, *args
        assert command(sample, "--checkpoint", weights, *given) == 0
        with np.load(file) as arrays: return arrays["arr_0"], arrays["prompts"].tolist()
    (one, prompts), (other, _) = draw(), draw("--text_encoder", moved)
    assert (one == other).all() and prompts == ["red dog"]

def test_a_prompt_without_words(weights, tmp_path, capsys):
    "Anything may be drawn, and a warning says so."
    assert command(sample, "--checkpoint", weights, "--prompt", "!?", "--num_samples", 1,
                   "--output", tmp_path/"a.png") == 0
    assert "no word in it" in capsys.readouterr().err

def test_the_models_of_the_package():
    "They read what they should, and the judge finds real pictures that it is shown, but not those of others."
    model, config = load_pretrained("emoji")
    judge, vocabulary, max_words = load_judge()
    assert config == replace(PRESETS["emoji"], **{name: getattr(config, name) for name in
                             ("model", "image_shape", "classes", "vocabulary", "max_words", "latents")})
    known = len(config.vocabulary)
    assert len(model.text.words.weight) == 2 + known < 2 + len(vocabulary)
    data, _ = emoji_with_names(64, "combinations", skin_tones=True)
    tokens, own = tokenize(data.captions[:50], vocabulary, max_words), torch.arange(50)
    assert retrieval(judge, data.images[:50], tokens, own).double().mean() > 0.9
    assert retrieval(judge, data.images[:50], tokens, own.roll(1)).double().mean() < 0.1

def test_the_tool_that_measures(monkeypatch):
    "Rows for each set of prompts, with as many pictures as asked for, and only words that the model knows."
    monkeypatch.syspath_prepend(str(TOOLS))
    import text_to_image as tool
    train_set, _ = emoji_with_names(64, "train", skin_tones=True)
    few = tool.hundred(train_set, {"red", "heart", "black", "cat", "dog", "face"})
    assert set(few.captions) >= {"red heart", "black cat", "dog face"} and len(few) < 10
    model, config = load_pretrained("emoji")
    config = replace(config, sampling=replace(config.sampling, num_inference_steps=2))
    rows = tool.measure(model, config, {"few": few}, train_set[:50], each=2)
    row = rows["few"]
    assert row["num_prompts"] == len(few) and row["real"] == 1 and 0 <= row["drawn"] <= 1

def test_the_tool_that_compares(tmp_path, monkeypatch):
    "Each run adds its figures under the name of its folder, and what was there before stays."
    monkeypatch.syspath_prepend(str(TOOLS))
    import text_to_image as tool
    model, config = load_pretrained("emoji")
    config = replace(config, sampling=replace(config.sampling, num_inference_steps=1))
    with torch.random.fork_rng(devices=[]): state = new_state(model.requires_grad_(True), config.train)
    state.step = 7
    folder = tmp_path/"a_run"
    (folder/"checkpoints").mkdir(parents=True)
    save_checkpoint(folder/"checkpoints"/"latest.pth", state, config, {"seconds": 90.})
    lines = [{"step": step, "validation_loss": loss, "seconds": 90.} for step, loss in ((3, 0.5), (7, 0.25))]
    (folder/"metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = tool.hundred
    monkeypatch.setattr(tool, "hundred", lambda data, words: whole(data, words)[:3])
    monkeypatch.setattr(tool, "STORED", tmp_path/"figures.json")
    tool.STORED.write_text(json.dumps({"rows": 1, "compared": {"before": 2, "a_run": 3}}))
    tool.compare([folder], None)
    stored = json.loads(tool.STORED.read_text())
    found = stored["compared"]["a_run"]
    assert stored["rows"] == 1 and stored["compared"]["before"] == 2
    assert found["step"] == 7 and found["minutes"] == 1.5 and found["validation_loss"] == 0.25
    assert list(found["rows"]) == [tool.SEEN, tool.COMBINATIONS]
    assert all(row["num_prompts"] == 3 for row in found["rows"].values())
