"The autoencoder: its network, losses, latents, training and commands."
import json
import math
from dataclasses import asdict, replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from processes import own_images, same_tensors, tiny
from test_commands import command
from torch.distributions import Normal, kl_divergence
from torchmetrics.image import PeakSignalNoiseRatio

from ddpm_tutorial.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    autoencoder_figures,
    autoencoder_objective,
    encode_images,
    latent_codec,
    latent_kl,
    latent_statistics,
    psnr,
    random_symmetries,
    rebuild_images,
    rebuilding_loss,
)
from ddpm_tutorial.data import ImageData, load_sample, to_float
from ddpm_tutorial.emoji import ATTRIBUTION, load_emoji
from ddpm_tutorial.run import check, evaluate, sample, train
from ddpm_tutorial.run.checkpoint import PRETRAINED, load_checkpoint, load_model, load_pretrained
from ddpm_tutorial.run.config import (
    AUTOENCODERS,
    CodecConfig,
    ConfigError,
    config_from_dict,
    differences,
    fit_to_data,
)
from ddpm_tutorial.run.tracking import read_metrics
from ddpm_tutorial.training import TrainConfig, find_gradient, new_state, train_steps

NETWORK = AutoencoderConfig(in_channels=1, base_channels=8, num_groups=2)
SETTINGS = ["--config", "emoji_autoencoder", "--base_channels", 8, "--num_groups", 2, "--batch_size", 8,
            "--device", "cpu", "--precision", "bf16", "--no-wandb"]

def bytes_like(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(NETWORK).requires_grad_(False)

# --- measures ---

def test_psnr_is_that_of_torchmetrics():
    "Image by image. Equal images are infinitely good, and floats are refused."
    images = bytes_like(5, 3, 8, 6)
    noisy = (images.int() + torch.randint(-9, 10, images.shape)).clamp(0, 255).to(torch.uint8)
    peer = PeakSignalNoiseRatio(data_range=255., reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(images, noisy).float(), peer(noisy.float(), images.float()))
    assert psnr(images, images).isinf().all()
    with pytest.raises(TypeError, match="psnr takes uint8"): psnr(images, to_float(images))

def test_kl_is_that_of_peers():
    "PyTorch's distributions and the class that diffusers uses."
    mean, log_var = 2*normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    ours = latent_kl(mean, log_var)
    closed = kl_divergence(Normal(mean, (log_var/2).exp()), Normal(0., 1.)).flatten(1).sum(dim=1)
    torch.testing.assert_close(ours, closed)
    peer = DiagonalGaussianDistribution(torch.cat([mean, log_var], dim=1))
    torch.testing.assert_close(ours, peer.kl())
    assert latent_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0., 0.]

@pytest.mark.parametrize("weight", [0., 1., 2.5])
def test_rebuilding_loss_is_its_formula(weight):
    "By numpy, image by image."
    rebuilt, x0 = normal(3, 2, 5, 4), normal(3, 2, 5, 4, seed=1)
    for found, e in zip(rebuilding_loss(rebuilt, x0, weight), (rebuilt - x0).numpy().astype(np.float64)):
        steps = np.abs(np.diff(e, axis=1)).mean() + np.abs(np.diff(e, axis=2)).mean()
        assert found.item() == pytest.approx(np.abs(e).mean() + weight/2*steps, rel=1e-5)

# --- network ---

@pytest.mark.parametrize("config, shape, latent", [
    (AutoencoderConfig(), (3, 64, 64), (4, 16, 16)),
    (replace(NETWORK, patch_size=7, channel_multipliers=(1, 2, 2), latent_channels=2), (1, 28, 28),
     (2, 1, 1)),
    (replace(NETWORK, patch_size=1, channel_multipliers=(1,), num_res_blocks=2), (1, 9, 5), (4, 9, 5)),
    (replace(NETWORK, channel_multipliers=(1, 2, 3)), (1, 24, 16), (4, 3, 2))])
def test_shapes_and_gradients(config, shape, latent):
    "Any size that the factor divides. Every weight learns, and the decoder sees nothing but the latent."
    model, x = Autoencoder(config), normal(2, *shape)
    for weight in model.parameters(): torch.nn.init.normal_(weight, std=0.1)
    mean, log_var = model.encode(x)
    assert mean.shape == log_var.shape == (2, *latent) and config.latent_shape(shape) == latent
    noise = normal(2, *latent, seed=1)
    rebuilt, *of_latent = model(x, noise)
    assert rebuilt.shape == x.shape
    torch.testing.assert_close(rebuilt, model.decode(mean + (log_var/2).exp()*noise))
    torch.testing.assert_close(of_latent, [mean, log_var])
    (rebuilding_loss(rebuilt, x).sum() + latent_kl(mean, log_var).sum()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())

def test_a_size_that_the_factor_does_not_divide(autoencoder):
    with pytest.raises(ValueError, match="must be multiples of 4"): autoencoder.encode(normal(1, 1, 28, 30))
    with pytest.raises(ValueError, match="must be multiples of 4"): NETWORK.latent_shape((1, 30, 28))

@pytest.mark.parametrize("changes, says", [
    (dict(base_channels=9), "base_channels: 9 channels cannot be split"),
    (dict(latent_channels=0), "latent_channels"), (dict(channel_multipliers=()), "channel_multipliers"),
    (dict(channel_multipliers=(1, 0)), "channel_multipliers")])
def test_networks_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says): replace(NETWORK, **changes)

# --- objective ---

def test_objective_is_the_sum_of_its_parts(autoencoder):
    "The noise comes from the generator alone. Without a KL term there is none."
    x0, latent = normal(3, 1, 8, 8), NETWORK.latent_shape((1, 8, 8))
    def losses(kl_weight, seed):
        objective = autoencoder_objective(latent, kl_weight, 0.5)
        found, level = objective(autoencoder, x0, {}, torch.Generator().manual_seed(seed))
        assert level.tolist() == [0., 0., 0.]
        return found
    noise = torch.randn((3, *latent), generator=torch.Generator().manual_seed(7))
    rebuilt, mean, log_var = autoencoder(x0, noise)
    expected = rebuilding_loss(rebuilt, x0, 0.5) + 0.2*latent_kl(mean, log_var)/64
    torch.testing.assert_close(losses(0.2, 7), expected)
    assert not torch.equal(losses(0.2, 7), losses(0.2, 8)) and torch.equal(losses(0., 7), losses(0., 8))

@pytest.mark.parametrize("shape, ways", [((2, 3, 3), 8), ((1, 2, 3), 4)])
def test_symmetries(shape, ways):
    "Every way of turning and mirroring comes up, each about as often, and nothing else does."
    image = torch.arange(math.prod(shape)).view(shape).float()
    turned = [x for k in range(4) for x in (image.rot90(k, (1, 2)), image.rot90(k, (1, 2)).flip(2))]
    known = [x for x in turned if x.shape == image.shape]
    found = random_symmetries(image.expand(800, *shape), torch.Generator().manual_seed(0))
    counts = [sum(torch.equal(x, way) for x in found) for way in known]
    assert len(known) == ways and sum(counts) == 800 and min(counts) > 600/ways

def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    "Although the network answers with three tensors."
    data, found = load_sample("test")[:12], []
    for parts in (1, 5):
        config = TrainConfig(batch_size=12, accumulate=parts, label_dropout=0.)
        torch.manual_seed(0)
        state = new_state(Autoencoder(NETWORK), config)
        objective = autoencoder_objective(NETWORK.latent_shape((1, 28, 28)), 0.01, symmetries=True)
        x0, _ = data.batch(torch.arange(12), "cpu")
        losses, _ = find_gradient(state, objective, x0, {}, config, 1e-3)
        found.append([losses, *[weight.grad for weight in state.model.parameters()]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)

def test_it_learns():
    "Forty steps more than halve the error of clothes that it hasn't seen."
    config = TrainConfig(max_steps=40, batch_size=32, lr=3e-3, label_dropout=0.)
    torch.manual_seed(0)
    state = new_state(Autoencoder(NETWORK), config)
    before = autoencoder_figures(state.model, load_sample("test"), 1e-3)
    objective = autoencoder_objective(NETWORK.latent_shape((1, 28, 28)), 1e-3)
    for _ in train_steps(state, load_sample("train"), objective, config): pass
    after = autoencoder_figures(state.model, load_sample("test"), 1e-3)
    assert after["validation_loss"] < before["validation_loss"]/2 and after["psnr"] > before["psnr"] + 6

def test_figures_are_what_they_are_called(autoencoder):
    "Whatever the size of the batches."
    data = load_sample("test")[:7]
    figures = autoencoder_figures(autoencoder, data, 0.3, 2., batch_size=3)
    x0 = to_float(data.images)
    mean, log_var = autoencoder.encode(x0)
    rebuilt, kl = autoencoder.decode(mean), latent_kl(mean, log_var)
    loss = rebuilding_loss(rebuilt, x0, 2.) + 0.3*kl/784
    assert figures["validation_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert figures["latent_bits"] == pytest.approx(kl.mean().item()/math.log(2), rel=1e-5)
    dB = psnr(data.images, rebuild_images(autoencoder, data.images, batch_size=2))
    assert figures["psnr"] == pytest.approx(dB.mean().item(), rel=1e-6)

# --- latents ---

def test_codec_scales_each_channel(autoencoder):
    "Mean 0 and standard deviation 1 on the way in; nothing is lost on the way out."
    images = load_sample("test").images
    latents = encode_images(autoencoder, images, batch_size=64)
    mean, std = latent_statistics(latents)
    codec = latent_codec(autoencoder, mean, std)
    x = codec.encode(images)
    flat = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(flat.std(dim=1), torch.ones(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(codec.decode(x), rebuild_images(autoencoder, images), rtol=0, atol=1)
    latents[:, 2] = 3.
    with pytest.raises(ValueError, match="constant"): latent_statistics(latents)

# --- configuration ---

def test_configuration_survives_json():
    "And is told from one of diffusion by its fields."
    config = fit_to_data(AUTOENCODERS["emoji_autoencoder"], (1, 32, 48), ("a", "b"))
    assert (config.model.in_channels, config.image_shape, config.classes) == (1, (1, 32, 48), ())
    assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert differences(config, replace(config, kl_weight=0.5)) == {"kl_weight": (config.kl_weight, 0.5)}
    with pytest.raises(ConfigError, match="guidance"):
        config_from_dict({"kl_weight": 1., "guidance_scale": 2.})
    with pytest.raises(ConfigError, match="multiple of 4"): fit_to_data(config, (1, 30, 32), ())
    with pytest.raises(ConfigError, match="in_channels is 1, but"): fit_to_data(config, (3, 32, 32), ())

@pytest.mark.parametrize("changes, says", [
    (dict(kl_weight=-1.), "kl_weight"), (dict(kl_weight=math.nan), "kl_weight"), (dict(resize=7), "resize"),
    (dict(gradient_weight=math.inf), "gradient_weight"),
    (dict(train=TrainConfig()), "label_dropout must be 0")])
def test_configurations_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says): replace(CodecConfig(), **changes)

# --- commands ---

@pytest.fixture(scope="module")
def data(tmp_path_factory): return own_images(tmp_path_factory.mktemp("data")/"own.npz", 26)

@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    "The folder of a short run: three epochs of three steps."
    folder = tmp_path_factory.mktemp("runs")/"codec"
    assert command(train, *SETTINGS, "--data", data, "--max_steps", 9, "--output_dir", folder) == 0
    return folder

def test_a_run_leaves_figures_and_pictures(run):
    checkpoint = load_checkpoint(run/"checkpoints"/"latest.pth")
    config = checkpoint["config"]
    assert isinstance(config, CodecConfig) and config.data.endswith("own.npz") and config.resize == 64
    found = [line for line in read_metrics(run) if "psnr" in line]
    assert [line["step"] for line in found] == [3, 6, 9]
    assert all(0 < line["psnr"] < 40 and line["latent_bits"] > 0 for line in found)
    best = min(line["validation_loss"] for line in found)
    assert checkpoint["progress"]["best_loss"] == pytest.approx(best)
    assert (run/"samples"/"epoch_003.png").exists() and "psnr" in (run/"report.html").read_text()
    model, _ = load_model(run/"checkpoints"/"best_model.pth")
    assert isinstance(model, Autoencoder)

@pytest.mark.parametrize("stop", [3, 5]) # at the end of an epoch, and inside one
def test_a_run_goes_on_bit_for_bit(run, data, tmp_path, stop):
    part = [*SETTINGS, "--data", data, "--no-lr_decay", "--output_dir"]
    whole, cut = tmp_path/"whole", tmp_path/"cut"
    assert command(train, *part, whole, "--max_steps", 9) == 0
    assert command(train, *part, cut, "--max_steps", stop) == 0
    assert command(train, *part, cut, "--max_steps", 9, "--resume") == 0
    one, two = (load_checkpoint(folder/"checkpoints"/"latest.pth") for folder in (whole, cut))
    for name in ("model", "ema", "optimizer"): assert same_tensors(one[name], two[name])

@pytest.mark.parametrize("args, says", [
    (["--guidance_scale", 2], "guidance"), (["--label_dropout", 0.1], "label_dropout must be 0"),
    (["--kl_weight", -1], "kl_weight"), (["--resize", 30], "multiple of 4")])
def test_what_cannot_be_is_refused(data, args, says, tmp_path, capsys):
    assert command(train, *SETTINGS, "--data", data, "--output_dir", tmp_path/"x", *args) == 2
    assert says in capsys.readouterr().err

@pytest.mark.parametrize("module, args", [(sample, []), (evaluate, ["--data", "sample"])])
def test_it_draws_nothing(run, module, args, capsys):
    assert command(module, "--checkpoint", run/"checkpoints"/"best_model.pth", "--device", "cpu", *args) == 2
    assert "is an autoencoder" in capsys.readouterr().err

def test_another_kind_of_run_is_not_resumed(run, data, tmp_path, capsys):
    "An autoencoder cannot go on as a diffusion model, nor the other way round."
    def resume(folder, *args):
        return command(train, *args, "--no-wandb", "--device", "cpu", "--output_dir", folder, "--resume")
    assert resume(run, "--config", "tiny") == 2
    said = capsys.readouterr().err
    assert "is a checkpoint of an autoencoder, and --config tiny is not one" in said and "object" not in said
    args = tiny(data, tmp_path/"tiny", "--max_steps", 1)
    assert command(train, *args) == 0 and resume(tmp_path/"tiny", "--config", "emoji_autoencoder") == 2
    assert "is a checkpoint of a diffusion model, and --config emoji" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another kind of network"):
        train.TrainOptions(config="small", settings=CodecConfig(kl_weight=0.1))

def test_a_blank_image_counts_as_finite():
    "It may come back without any error."
    class Blank(Autoencoder):
        def decode(self, z): return torch.ones(len(z), 1, 4*z.shape[2], 4*z.shape[3])
    white = ImageData(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(2).long(), ())
    assert autoencoder_figures(Blank(NETWORK), white, 0.)["psnr"] == 60.

def test_the_one_of_the_package():
    "As good as its card says, on pictures of concepts that it has never seen. The card names the file."
    autoencoder, config = load_pretrained("emoji_autoencoder")
    card = PRETRAINED["emoji_autoencoder"].with_suffix(".md").read_text()
    stored = PRETRAINED["emoji_autoencoder"].read_bytes()
    assert config == AUTOENCODERS["emoji_autoencoder"] and sha256(stored).hexdigest() in card
    assert len(stored) < 4e6 and ATTRIBUTION in card
    data = load_emoji(64, "validation", skin_tones=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:200]
    dB = psnr(data.images[order], rebuild_images(autoencoder, data.images[order])).mean().item()
    assert dB >= 33 and f"| new concepts | 200 | {dB:.2f} |" in card

def test_check(data, capsys):
    args = ["--config", "emoji_autoencoder", "--data", data, "--resize", 64, "--device", "cpu"]
    assert command(check, *args) == 0
    said = capsys.readouterr().out
    assert said.count("ok ") == 8 and "rebuilding" in said
