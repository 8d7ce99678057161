"The commands as a user types them: what they write, what they refuse, what they load."
import json
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_tutorial.run import check, sample, train
from ddpm_tutorial.run.checkpoint import PRETRAINED, CheckpointError, load_checkpoint, load_model
from ddpm_tutorial.run.config import PRESETS, ConfigError, config_from_dict, differences
from ddpm_tutorial.run.device import choose_device
from ddpm_tutorial.run.tracking import read_metrics

SHORT = ["--data", "sample", "--max_steps", "4", "--batch_size", "8", "--num_inference_steps", "3",
         "--device", "cpu", "--precision", "bf16", "--no-wandb"]

def command(module, *args):
    "Runs a command in this process. Returns its exit code."
    with pytest.MonkeyPatch.context() as patch:
        name = "ddpm_" + module.__name__.split(".")[-1]
        patch.setattr(sys, "argv", [name, *map(str, args)])
        try: getattr(module, name)()
        except SystemExit as stop: return stop.code
    return 0
def from_latest(run): return "--checkpoint", run/"checkpoints"/"latest.pth"

@pytest.fixture(scope="session")
def run(tmp_path_factory):
    "The folder of a short run of `tiny`."
    folder = tmp_path_factory.mktemp("runs")/"v1_tiny"
    assert command(train, "--config", "tiny", *SHORT, "--output_dir", folder) == 0
    return folder

def test_a_run_leaves_what_the_design_says(run):
    "Configuration, metrics, both checkpoints and samples. Nothing half-written is left."
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} == {
        ".lock", "config.json", "metrics.jsonl", "report.html", "checkpoints/best_model.pth",
        "checkpoints/latest.pth", "checkpoints/step_00000004.pth", "samples/epoch_001.png"}
    checkpoint = load_checkpoint(run/"checkpoints"/"latest.pth")
    assert checkpoint["step"] == 4 and checkpoint["config"].train.batch_size == 8
    assert json.loads((run/"config.json").read_text())["train"]["max_steps"] == 4
    last = read_metrics(run)[-1]
    assert last["step"] == 4
    assert last["validation_loss"] == pytest.approx(checkpoint["progress"]["best_loss"])

def test_the_report_opens_without_a_network(run):
    """One file with curves, samples, settings, versions, time and memory.

    It fetches nothing and runs nothing.
    """
    page = (run/"report.html").read_text()
    assert page.count("<svg") == 1
    assert page.count('src="data:image/png;base64,') == len(list((run/"samples").glob("*.png"))) == 1
    assert not re.search(r"(src|href)=.(?!data:|#)|<script|@import|<link", page)
    for word in ("Loss by noise level", "Learning rate", "validation_loss", "memory_mib", "seconds",
                 torch.__version__, "base_channels", "bf16"):
        assert word in page
    by_noise = next(line["loss_by_noise"] for line in read_metrics(run) if "loss_by_noise" in line)
    assert len(by_noise) == 10 and all(value is None or 0 < value < 10 for value in by_noise)

@pytest.mark.parametrize("args, name, size", [
    (["--num_samples", "16", "--guidance_scale", "3.0", "--mode", "grid"], "grid.png", (4, 4)),
    (["--class_label", "5", "--num_samples", "16", "--guidance_scale", "3.0"], "grid_5.png", (4, 4)),
    (["--mode", "class_grid", "--guidance_scale", "3.0"], "class_grid.png", (8, 10)),
    (["--mode", "progressive", "--class_label", "3", "--guidance_scale", "3.0"], "progressive_3.png",
     (3, 4)), # 3 of the 3 steps
    (["--use_ema", "--guidance_scale", "3.0"], "grid.png", (4, 4)),
    (["--no-use_ema", "--num_samples", "2"], "grid.png", (2, 1)),
])
def test_the_sampling_commands_people_know(run, args, name, size):
    "Each writes its picture into the run's samples folder, with the columns and rows that were asked for."
    best = run/"checkpoints"/"best_model.pth"
    assert command(sample, "--checkpoint", best, "--config", run/"config.json", *args) == 0
    columns, rows = size
    # 28 pixels doubled, and borders
    with Image.open(run/"samples"/name) as picture: assert picture.size == (58*columns + 2, 58*rows + 2)

def test_arrays_for_evaluation(run, tmp_path):
    """`.npz` holds uint8 images, channels last, and labels in turn.

    The same seed gives the same bytes, another seed gives other ones.
    """
    def arrays(seed):
        args = ["--num_samples", "12", "--batch_size", "5", "--seed", seed, "--output", tmp_path/"a.npz"]
        assert command(sample, *from_latest(run), *args) == 0
        with np.load(tmp_path/"a.npz") as file: return file["arr_0"], file["arr_1"]
    images, labels = arrays(1)
    assert images.shape == (12, 28, 28, 1) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert np.array_equal(arrays(1)[0], images) and not np.array_equal(arrays(2)[0], images)

def test_progress_as_gif(run, tmp_path):
    "One frame for each step, of the size of one grid."
    assert command(sample, *from_latest(run), "--mode", "progressive", "--output", tmp_path/"a.gif") == 0
    with Image.open(tmp_path/"a.gif") as gif: assert gif.n_frames == 3 and gif.size == (118, 118)

def test_a_run_goes_on_bit_for_bit(run, tmp_path):
    "Two steps, then `--resume` to four: the weights are those of the run that was never stopped."
    args = ["--config", "tiny", *SHORT, "--output_dir", tmp_path/"again"]
    assert command(train, *args, "--max_steps", "2", "--no-lr_decay") == 0
    assert command(train, *args, "--no-lr_decay", "--resume") == 0
    assert command(train, *args[:-1], tmp_path/"whole", "--no-lr_decay") == 0
    resumed = load_checkpoint(tmp_path/"again"/"checkpoints"/"latest.pth")
    whole = load_checkpoint(tmp_path/"whole"/"checkpoints"/"latest.pth")
    assert resumed["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(resumed[part].values(), whole[part].values()))

def test_a_folder_with_a_run_is_refused(run, capsys):
    "One line that shows both ways to continue, exit code 2, and nothing is changed."
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert command(train, "--config", "tiny", *SHORT, "--output_dir", run) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    assert "--resume" in message and "--output_dir" in message
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before

def test_going_on_from_a_checkpoint_needs_a_folder_of_its_own(run, tmp_path, capsys):
    "`--resume_from` starts a branch elsewhere. In a folder with a run, it would overwrite newer checkpoints."
    args = ["--config", "tiny", *SHORT, "--no-lr_decay", "--output_dir"]
    assert command(train, *args, tmp_path/"trunk") == 0
    start = ["--resume_from", tmp_path/"trunk/checkpoints/best_model.pth", "--max_steps", "6"]
    assert command(train, *args, tmp_path/"trunk", *start) == 2
    assert "another --output_dir" in capsys.readouterr().err
    assert command(train, *args, tmp_path/"branch", *start) == 0
    latest = [load_checkpoint(tmp_path/name/"checkpoints/latest.pth") for name in ("trunk", "branch")]
    assert [checkpoint["step"] for checkpoint in latest] == [4, 6]
    assert (tmp_path/"branch/checkpoints/best_model.pth").exists()

def test_weights_that_are_no_numbers_are_not_saved(tmp_path, capsys):
    "A learning rate that is far too high: exit code 1, one line, and no checkpoint rather than a bad one."
    args = ["--lr", "1e38", "--warmup_steps", "0", "--save_every", "1", "--output_dir", tmp_path/"run"]
    assert command(train, "--config", "tiny", *SHORT, *args) == 1
    assert "lower the lr" in capsys.readouterr().err
    assert not list((tmp_path/"run"/"checkpoints").iterdir())

def test_weights_of_another_network_are_refused(run, tmp_path, capsys):
    "A checkpoint whose configuration was swapped is refused in one line."
    values = torch.load(run/"checkpoints"/"latest.pth", weights_only=True)
    values["config"]["model"]["base_channels"] = 32
    torch.save(values, tmp_path/"swapped.pth")
    assert command(sample, "--checkpoint", tmp_path/"swapped.pth") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "do not fit its configuration" in message

@pytest.mark.parametrize("module", ["train", "sample", "check"])
def test_modules_are_commands(module):
    "`python -m` is the same as the command. A wrong device gives one line and exit code 2."
    args = ["--checkpoint", "x.pth"] if module == "sample" else []
    typed = [sys.executable, "-m", f"ddpm_tutorial.run.{module}", *args, "--device", "tpu"]
    done = subprocess.run(typed, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: device must be") and done.stderr.count("\n") == 1

def test_resuming_with_other_settings_names_them(run, capsys):
    "The message lists the settings that must not differ, with both values."
    args = ["--config", "tiny", *SHORT, "--output_dir", run, "--resume", "--lr", "1e-5"]
    assert command(train, *args) == 2
    assert "train.lr 0.002 (now 1e-05)" in capsys.readouterr().err

@pytest.mark.parametrize("args, says", [
    (["--epochs", "0"], "epochs must be at least 1"),
    (["--lr", "nan"], "lr must be above 0"),
    (["--batch_size", "-1"], "batch_size"),
    (["--base_channels", "48", "--num_groups", "32"], "groups"),
    (["--channel_multipliers", "1", "2", "2", "2", "2", "2"], "too small"),
    (["--attention_resolutions", "9"], "attention_resolutions"),
    (["--num_inference_steps", "501"], "num_inference_steps"),
    (["--guidance_scale", "-1"], "guidance_scale"),
    (["--ema_decay", "1"], "ema_decay"),
    (["--save_every", "0"], "save_every"),
    (["--config", "smal"], "did you mean small"),
    (["--config", "basline"], "did you mean baseline"),
    (["--config", "xyz"], "small"),
    (["--epoch", "3"], "--epochs"),
    (["--lr", "fast"], "--lr"),
    (["--device", "tpu"], "cpu"),
    (["--prediction_type", "noise"], "epsilon"),
    (["--num_steps", "0"], "num_steps"),
    (["--resume"], "nothing to resume"),
])
def test_a_bad_value_is_answered_before_data_are_read(args, says, tmp_path, monkeypatch, capsys):
    "Exit code 2, the field is named, there is no traceback, and no data were read."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_data", lambda *_: pytest.fail("the data were read"))
    assert command(train, "--config", "small", "--no-wandb", *args) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert says in message and "Traceback" not in message

@pytest.mark.parametrize("args, code, says", [
    (["--class_label", "10"], 2, "0 ... 9"),
    (["--num_samples", "0"], 2, "at least 1"),
    (["--num_inference_steps", "201"], 2, "1 ... 200"),
    (["--output", "a.jpeg"], 2, ".png"),
    (["--mode", "class_grid", "--num_samples", "11"], 2, "multiple of 10"),
    (["--guidance_scale", "inf"], 2, "guidance_scale"),
    (["--mode", "mosaic"], 2, "class_grid"),
    (["--checkpoint", "nowhere.pth"], 2, "nowhere.pth"),
    (["--config", "nowhere.json"], 2, "nowhere.json"),
])
def test_sampling_refuses(run, args, code, says, capsys):
    "One line says what cannot be drawn."
    assert command(sample, *from_latest(run), *args) == code
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message

def test_a_configuration_that_contradicts_the_checkpoint(run, tmp_path, capsys):
    "It is refused, and the message names the fields in which the two differ."
    settings = json.loads((run/"config.json").read_text())
    settings["scheduler"]["schedule"] = "linear"
    (tmp_path/"other.json").write_text(json.dumps(settings))
    assert command(sample, *from_latest(run), "--config", tmp_path/"other.json") == 2
    message = capsys.readouterr().err
    assert "belongs to another run" in message and "scheduler.schedule" in message

def own_images(path, n=30, shape=(12, 16, 3), seed=0, **arrays):
    "An .npz of noise, in three classes unless told otherwise."
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    np.savez(path, images=images, **{"labels": np.arange(n) % 3, **arrays})
    return path

def test_own_images(tmp_path, capsys):
    """Colour, not square, three classes: size, channels and classes are found in the images and printed.

    The model trains, samples and is checked.
    """
    own = own_images(tmp_path/"own.npz")
    args = ["--config", "small", *SHORT, "--data", own, "--output_dir", tmp_path/"run"]
    assert command(train, *args) == 0
    out = capsys.readouterr().out
    for fact in (str(own), "27 images", "12x16 colour", "3 classes (class 0, class 1, class 2)",
                 "3 more to validate"):
        assert fact in out
    args = [*from_latest(tmp_path/"run"), "--num_samples", "3", "--output", tmp_path/"a.npz"]
    assert command(sample, *args) == 0
    with np.load(tmp_path/"a.npz") as file: assert file["arr_0"].shape == (3, 12, 16, 3)
    assert command(check, "--config", "small", "--data", own, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "27 images of 3x12x16 pixels in 3 classes" in out and out.count("ok  ") == 8

def test_a_folder_of_photos(tmp_path, capsys):
    """If their sizes differ, one line names `--resize`. With it they are trained on.

    Attention stays at the same level.
    """
    (tmp_path/"photos").mkdir()
    for i in range(12):
        photo = Image.new("RGB", (40 + i, 50 - i), (20*i, 100, 200))
        photo.save(tmp_path/"photos"/f"{i}.png")
    args = ["--config", "tiny", *SHORT, "--data", f"{tmp_path/'photos'}/", "--output_dir", tmp_path/"run"]
    for module, given in ((train, args), (check, ["--data", tmp_path/"photos"])):
        assert command(module, *given) in (1, 2)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "--resize" in err and ".png" in err
    assert command(train, *args, "--resize", "16") == 0
    assert command(check, "--data", tmp_path/"photos", "--resize", "16", "--device", "cpu") == 0
    config = load_checkpoint(tmp_path/"run/checkpoints/latest.pth")["config"]
    assert config.image_shape == (3, 16, 16) and config.classes == ()
    assert config.model.attention_resolutions == (4,)
    assert "attention at 4" in capsys.readouterr().out

@pytest.mark.parametrize("shape, args, says", [
    ((13, 16), ["--config", "tiny"], "--patch_size 1"),
    ((8, 8), ["--config", "baseline"], "--channel_multipliers 1 2 4"),
    ((16, 16), ["--config", "small", "--in_channels", "3"], "in_channels is 3, but"),
    ((16, 16), ["--config", "small", "--num_classes", "7"], "num_classes is 7, but"),
])
def test_choices_that_cannot_work_with_the_images(tmp_path, shape, args, says, capsys):
    "Exit code 2 and what to change. That is never the size, the channels or the classes of the images."
    own = own_images(tmp_path/"own.npz", shape=shape)
    assert command(train, *args, *SHORT, "--data", own, "--output_dir", tmp_path/"run") == 2
    err = capsys.readouterr().err
    assert says in err and "--image_size" not in err and "Traceback" not in err

def trained(tmp_path, data, *args):
    "Exit code of a run of `small` in tmp_path/run."
    return command(train, "--config", "small", "--base_channels", "8", *SHORT, "--no-lr_decay",
                   "--data", data, "--output_dir", tmp_path/"run", *args)

def test_a_run_belongs_to_its_images_and_not_to_their_path(tmp_path, monkeypatch, capsys):
    """A run continues whatever the path of its images is, and wherever they have been moved.

    Other images are refused, even with the same number, size and path. Both sets are named.
    """
    (tmp_path/"a").mkdir()
    own = own_images(tmp_path/"a"/"own.npz")
    assert trained(tmp_path, own, "--max_steps", "1") == 0
    monkeypatch.chdir(tmp_path/"a")
    assert trained(tmp_path, "own.npz", "--max_steps", "2", "--resume") == 0
    assert trained(tmp_path, "./../a/own.npz", "--max_steps", "3", "--resume") == 0
    own.rename(tmp_path/"b.npz")
    assert trained(tmp_path, tmp_path/"b.npz", "--max_steps", "4", "--resume") == 0
    own_images(tmp_path/"b.npz", seed=1)
    capsys.readouterr()
    assert trained(tmp_path, tmp_path/"b.npz", "--max_steps", "5", "--resume") == 2
    err = capsys.readouterr().err
    assert "was trained on other images" in err
    assert err.count(str(tmp_path/"b.npz")) == 2 and err.count("fingerprint") == 2
    own_images(tmp_path/"b.npz", labels=(np.arange(30) + 1) % 3)
    # the images are the same, the labels are not
    assert trained(tmp_path, tmp_path/"b.npz", "--max_steps", "5", "--resume") == 2

def test_a_run_begun_before_there_were_fingerprints_goes_on(tmp_path, capsys):
    "It continues with a note. From then on it knows its images. Another number of images is refused."
    own = own_images(tmp_path/"own.npz")
    assert trained(tmp_path, own, "--max_steps", "2") == 0
    latest = tmp_path/"run"/"checkpoints"/"latest.pth"
    values = torch.load(latest, weights_only=True)
    del values["progress"]["fingerprint"], values["config"]["resize"] # as 0.6 wrote it
    for path in latest.parent.iterdir(): path.unlink()
    torch.save(values, latest)
    more = own_images(tmp_path/"more.npz", n=60)
    assert trained(tmp_path, more, "--max_steps", "3", "--resume") == 2
    capsys.readouterr()
    assert trained(tmp_path, own, "--max_steps", "3", "--resume") == 0
    assert "does not know its images" in capsys.readouterr().out
    checkpoint = load_checkpoint(latest)
    assert checkpoint["step"] == 3 and checkpoint["progress"]["fingerprint"]
    assert trained(tmp_path, own, "--max_steps", "4", "--resume") == 0
    assert "does not know" not in capsys.readouterr().out

def test_the_classes_of_a_run_stay(tmp_path, capsys):
    """A run without classes continues without classes, and is refused with them.

    The same holds the other way round.
    """
    own = own_images(tmp_path/"own.npz")
    assert trained(tmp_path, own, "--max_steps", "1", "--num_classes", "0") == 0
    assert trained(tmp_path, own, "--max_steps", "2", "--resume") == 2
    assert trained(tmp_path, own, "--max_steps", "2", "--num_classes", "0", "--resume") == 0

def test_home_is_written_out(tmp_path, monkeypatch, capsys):
    "`~` works in every option and variable that takes a path. No file or folder is called `~` afterwards."
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_DATA_ROOT", "~/nowhere")
    own_images(tmp_path/"own.npz")
    small, latest = ["--config", "small", "--base_channels", "8", *SHORT], "~/run/checkpoints/latest.pth"
    assert command(train, *small, "--data", "~/own.npz", "--output_dir=~/run") == 0
    branch = ["--data=~/own.npz", f"--resume_from={latest}", "--max_steps", "5", "--no-lr_decay",
              "--output_dir", "~/branch"]
    assert command(train, *small, *branch) == 2 # its lr_decay differs, so the checkpoint was found
    assert "lr_decay" in capsys.readouterr().err
    one = ["--checkpoint", latest, "--num_samples", "1"]
    assert command(sample, *one, "--config=~/run/config.json", "--output", "~/a.png") == 0
    assert command(sample, *one, "--output_dir", "~/drawn") == 0
    args = ["--data", "~/own.npz", "--data_root", "~/nowhere", "--device", "cpu", "--config", "small"]
    assert command(check, *args) == 0
    # other libraries keep their caches in hidden folders there
    found = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert found == {"own.npz", "run", "branch", "a.png", "drawn"}

def test_a_home_that_is_not_there_is_refused(capsys):
    "One line and exit code 2. This holds for `~` with a name, too."
    assert command(train, *SHORT, "--output_dir", "~nobody_of_this_name/run") == 2
    assert capsys.readouterr().err == "error: output_dir: there is no home folder ~nobody_of_this_name\n"


@pytest.mark.parametrize("args, says", [
    (["--data", "sample", "--batch_size", "1001"], "there are 1,000 images"),
    (["--data", "OWN", "--batch_size", "28"], "there are 27 images"),
])
def test_a_batch_larger_than_the_data(tmp_path, args, says, capsys):
    "It is an error, and the message gives the number of images. A batch of all images is allowed."
    own = own_images(tmp_path/"own.npz")
    args = [str(own) if arg == "OWN" else arg for arg in args]
    assert command(train, "--config", "tiny", *SHORT, *args, "--output_dir", tmp_path/"run") == 2
    assert says in capsys.readouterr().err
    assert trained(tmp_path, own, "--batch_size", "27", "--max_steps", "1") == 0

def test_a_step_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    "The message gives the batch that would fit, and that batch is accepted."
    monkeypatch.setattr(train, "free_memory", lambda device: 200 << 20) # 200 MiB
    args = ["--config", "small", *SHORT, "--output_dir", tmp_path/"run"]
    monkeypatch.setattr(train, "train_steps", lambda *_: pytest.fail("a step was begun"))
    assert command(train, *args, "--batch_size", "1000") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "a step with batch_size 1000 needs" in err
    assert "0.2 GiB are free on cpu" in err
    fits = int(re.search(r"lower --batch_size to (\d+)", err)[1])
    assert 10 < fits < 1000
    monkeypatch.undo()
    monkeypatch.setattr(train, "free_memory", lambda device: 200 << 20)
    assert command(train, *args, "--batch_size", fits, "--max_steps", "1") == 0
    parts = int(re.search(r"--accumulate (\d+)", err)[1])
    assert parts == -(-1000//fits)
    in_parts = [*args[:-1], tmp_path/"parts", "--batch_size", "1000", "--max_steps", "1", "--accumulate"]
    assert command(train, *in_parts, parts) == 0
    assert command(train, *in_parts, "2", "--no-wandb", "--output_dir", tmp_path/"two") == 1 # not enough
    monkeypatch.setattr(train, "free_memory", lambda device: 1 << 20)
    assert command(train, *args[:-1], tmp_path/"other") == 1
    assert "not even one image fits: take a smaller --config" in capsys.readouterr().err

def test_a_run_goes_on_with_less_memory(tmp_path):
    "Parts and blocks that are computed twice may change between two starts, in both directions."
    args = ["--config", "tiny", *SHORT, "--output_dir", tmp_path/"run"]
    assert command(train, *args, "--max_steps", "1") == 0
    less = ["--accumulate", "2", "--checkpoint_activations"]
    assert command(train, *args, "--max_steps", "2", *less, "--resume") == 0
    assert command(train, *args, "--max_steps", "3", "--resume") == 0
    checkpoint = load_checkpoint(tmp_path/"run/checkpoints/latest.pth")
    assert checkpoint["step"] == 3 and checkpoint["config"].train.accumulate == 1

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("batch_size", [128, 256])
def test_what_a_step_is_said_to_need_is_what_it_takes(batch_size):
    "A step takes at least as much memory, and at most twice as much. The advised batch allows for that."
    code = f"""from dataclasses import replace
from ddpm_tutorial.run.config import PRESETS
from ddpm_tutorial.run.device import NotEnoughMemory, check_memory, new_model
from ddpm_tutorial.data import load_sample
from ddpm_tutorial.training import diffusion_objective, new_state, train_steps
def most(): # MiB
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))/1024
small = PRESETS["small"]
config = replace(small, train=replace(small.train, batch_size={batch_size}, max_steps=2))
state, data = new_state(new_model(config), config.train), load_sample()
try: check_memory(state.model, config, "fp32", 0)
except NotEnoughMemory as error: print(error)
open("/proc/self/clear_refs", "w").write("5") # starts a new peak
before = most()
objective = diffusion_objective(config.scheduler.build(), config.train.label_dropout)
for _ in train_steps(state, data, objective, config.train): pass
print(most() - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, took = done.stdout.splitlines()
    needs = 1024*float(re.search(r"needs ([\d.]+) GiB", said)[1])
    assert needs - 50 < float(took) < 2*needs + 50

@pytest.mark.parametrize("flag, clipped", [("--no-clip_sample", False), ("--no-clip-sample", False),
                                           ("--clip_sample", True)])
def test_clip_sample_is_spelled_alike(run, tmp_path, flag, clipped, capsys):
    """The commands that train and draw spell it in the same way.

    `--clip_sample False`, as in 0.4, still works.
    """
    assert command(train, "--config", "tiny", *SHORT, flag, "--output_dir", tmp_path/"run") == 0
    config = load_checkpoint(tmp_path/"run/checkpoints/latest.pth")["config"]
    assert config.sampling.clip_sample == clipped
    for given in ([flag], ["--clip_sample", str(clipped)], [f"--clip_sample={clipped}"]):
        assert command(sample, *from_latest(run), "--num_samples", "1", *given) == 0
        assert ("not clipped" in capsys.readouterr().out) == (not clipped)

def test_a_folder_for_a_checkpoint(run, capsys):
    "The message says that it is a folder, and names the file that was probably meant."
    for folder in (run, run/"checkpoints"):
        assert command(sample, "--checkpoint", folder) in (1, 2)
        err = capsys.readouterr().err
        assert f"{folder} is a folder" in err and str(run/"checkpoints"/"best_model.pth") in err
    args = ["--config", "tiny", *SHORT, "--resume_from", run, "--output_dir", run.parent/"new"]
    assert command(train, *args) in (1, 2)
    assert "is a folder" in capsys.readouterr().err

@pytest.mark.parametrize("name, args, says", [
    ("small", ["--num_inference_steps", 2],
     "dpm++, 2 steps, guidance 2.2, at noise levels from 0.3 to 2, eta 0.7, averaged"),
    (None, ["--num_inference_steps", 2], "dpm++, 2 steps"),
    ("small_few", [], "ddim, 4 steps, guidance 1, spacing trailing"),
    ("small_one", [], "ddim, 1 step, guidance 1, spacing trailing")])
def test_a_network_of_the_package_by_its_name(tmp_path, monkeypatch, capsys, name, args, says):
    "Its pictures go into a folder of its name. Without a name it is `small`."
    monkeypatch.chdir(tmp_path)
    if name: args = ["--checkpoint", name, *args]
    assert command(sample, *args, "--num_samples", 1) == 0
    assert f"the trained {name or 'small'}, {says}" in capsys.readouterr().out
    assert (tmp_path/"outputs"/(name or "small")/"samples"/"grid.png").exists()
    assert command(sample, "--checkpoint", "smal") == 2
    assert "smal is not there" in (said := capsys.readouterr().err) and "small, small_few, small_one" in said

def test_eta_belongs_to_its_method(tmp_path, monkeypatch, capsys):
    "Another method leaves the eta of the training behind. One that was asked for is used, or refused."
    monkeypatch.chdir(tmp_path)
    short = ["--num_samples", 1, "--num_inference_steps", 2]
    for args, says in (([], "eta 0.7"), (["--eta", 0.2], "eta 0.2"),
                       (["--method", "ddim", "--eta", 1], "eta 1")):
        assert command(sample, *short, *args) == 0
        assert f", {says}, averaged weights" in capsys.readouterr().out
    for args in (["--eta", 0], ["--method", "heun"], ["--method", "ddpm"]):
        assert command(sample, *short, *args) == 0
        assert "eta" not in capsys.readouterr().out
    for args, says in ((["--method", "heun", "--eta", 0.5], "eta must be 0 for method heun, not 0.5"),
                       (["--checkpoint", "small_few", "--eta", 0.5], "it cannot take eta=0.5"),
                       (["--eta", 1.5], "eta must be in 0 ... 1, not 1.5")):
        assert command(sample, "--num_samples", 1, *args) == 2
        assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    settings = ["--data", "sample", "--config", "small", "--method", "heun"]
    assert command(train, *settings) == 2
    assert "eta must be 0 for method heun, not 0.7" in capsys.readouterr().err

def test_a_student_on_the_command_line(tmp_path, monkeypatch, capsys):
    "It draws in its own number of steps, and refuses what it has not learned."
    monkeypatch.chdir(tmp_path)
    for args in (["--num_inference_steps", 8], ["--num_inference_steps", 1], ["--method", "heun"],
                 ["--guidance_scale", 3]):
        assert command(sample, "--checkpoint", "small_few", "--num_samples", 1, *args) == 2
        assert "student that was distilled for num_inference_steps=4" in capsys.readouterr().err

def test_weights_by_any_name(run, tmp_path, capsys):
    """A file is known by its content, not by its name.

    For instance, weights in half precision may be called .pth, and a checkpoint .safetensors.
    """
    weights, checkpoint = tmp_path/"weights.pth", tmp_path/"checkpoint.safetensors"
    weights.write_bytes(PRETRAINED["small"].read_bytes())
    checkpoint.write_bytes((run/"checkpoints"/"latest.pth").read_bytes())
    assert load_model(weights)[1] == load_model(PRETRAINED["small"])[1]
    assert load_model(checkpoint)[1] == load_model(run/"checkpoints"/"latest.pth")[1]
    assert command(train, *SHORT, "--resume_from", weights, "--output_dir", tmp_path/"branch") == 1
    assert "holds weights only" in capsys.readouterr().err
    (tmp_path/"damaged.safetensors").write_bytes(PRETRAINED["small"].read_bytes()[:-1000])
    for name, says in (("damaged.safetensors", "cannot be read"), ("none.safetensors", "is not there")):
        with pytest.raises(CheckpointError, match=says): load_model(tmp_path/name)

def test_settings_of_sampling_that_stand_flat(run, tmp_path):
    """Versions before 0.8 wrote them like this, in config.json and in a checkpoint.

    Both can be read, and the run continues.
    """
    flat = json.loads((run/"config.json").read_text())
    flat |= flat.pop("sampling")
    assert {"guidance_scale", "method", "num_inference_steps", "clip_sample"} < flat.keys()
    config = load_checkpoint(run/"checkpoints"/"latest.pth")["config"]
    assert config_from_dict(flat) == config
    (tmp_path/"config.json").write_text(json.dumps(flat))
    values = torch.load(run/"checkpoints"/"latest.pth", weights_only=True) | {"config": flat}
    torch.save(values, tmp_path/"old.pth")
    assert load_checkpoint(tmp_path/"old.pth")["config"] == config
    old = ["--checkpoint", tmp_path/"old.pth", "--config", tmp_path/"config.json"]
    assert command(sample, *old, "--num_samples", 1, "--output", tmp_path/"a.png") == 0
    longer = [*SHORT[:3], "6", *SHORT[4:]]
    args = ["--config", "tiny", *longer, "--resume_from", tmp_path/"old.pth", "--output_dir", tmp_path/"on"]
    assert command(train, *args) == 0
    for change in ({"sampling": {}}, {"guidance_scale": "much"}, {"guidance": 1.}):
        with pytest.raises(ConfigError): config_from_dict(flat | change)

def test_differences_are_of_fields_and_not_of_places():
    """Two configurations may have different fields, or another order.

    Each field is compared with its namesake.
    """
    @dataclass(frozen=True)
    class Older:
        guidance_scale: float=3.
        method: str="dpm++"
        gone: int=1
    @dataclass(frozen=True)
    class Newer:
        new: int=2
        method: str="dpm++"
        guidance_scale: float=3.
    assert sorted(differences(Older(), Newer())) == ["gone", "new"]
    assert sorted(differences(Older(guidance_scale=1.), Newer())) == ["gone", "guidance_scale", "new"]

def test_endings_in_capitals(run, tmp_path):
    "`.PNG`, `.NPZ` and `.GIF` mean the same as in small letters."
    modes = {"a.PNG": "grid", "a.NPZ": "grid", "a.GIF": "progressive", "b.Png": "progressive"}
    for name, mode in modes.items():
        args = ["--num_samples", "2", "--mode", mode, "--output", tmp_path/name]
        assert command(sample, *from_latest(run), *args) == 0
    with np.load(tmp_path/"a.NPZ") as file: assert file["arr_0"].shape == (2, 28, 28, 1)
    with Image.open(tmp_path/"a.GIF") as gif: assert gif.n_frames == 3

def test_without_labels(tmp_path):
    "`--num_classes 0` trains a model without classes. It refuses to draw a class."
    args = ["--config", "tiny", *SHORT, "--num_classes", "0", "--output_dir", tmp_path/"run"]
    assert command(train, *args) == 0
    checkpoint = ["--checkpoint", tmp_path/"run/checkpoints/latest.pth"]
    assert command(sample, *checkpoint, "--num_samples", "2") == 0
    assert command(sample, *checkpoint, "--class_label", "1") == 2

def test_check_prints_a_line_for_each_part(capsys):
    "Every part is checked and ok."
    assert command(check, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["ok"]*8
    for name in ("model creation", "data", "forward pass", "loss", "sampling", "EMA"):
        assert any(name in line for line in lines)

def loaded_modules(code):
    "Names of the modules that a fresh Python has loaded after `code`."
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())

def test_commands_do_not_load_wandb(tmp_path):
    "Neither training without it nor sampling."
    short = [*SHORT, "--output_dir", str(tmp_path/"run")]
    modules = loaded_modules(f"""import sys
from ddpm_tutorial.run import sample, train
sys.argv = ["ddpm_train", "--config", "tiny", *{short}]
train.ddpm_train()
sys.argv = ["ddpm_sample", "--checkpoint", {str(tmp_path/'run/checkpoints/latest.pth')!r},
            "--num_samples", "1"]
sample.ddpm_sample()""")
    assert "torch" in modules and "wandb" not in modules

def test_sampling_loads_no_drawing_library(run):
    "Only a report draws. `ddpm_sample` needs no matplotlib."
    modules = loaded_modules(f"""import sys
from ddpm_tutorial.run import sample
sys.argv = ["ddpm_sample", "--checkpoint", {str(run/'checkpoints/latest.pth')!r},
            "--num_samples", "1"]
sample.ddpm_sample()""")
    assert "torch" in modules and not {"wandb", "matplotlib"} & modules

def test_wandb_offline_by_default(tmp_path, monkeypatch):
    """Without a key the run is tracked offline, inside its own folder.

    The graph of the model and the samples are stored too.
    """
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path)) # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path/"netrc"))
    args = [arg for arg in SHORT if arg != "--no-wandb"]
    assert command(train, "--config", "tiny", *args, "--output_dir", tmp_path/"run", "--watch_model") == 0
    found = [path.name for path in (tmp_path/"run"/"wandb").rglob("*")]
    assert any(name.startswith("offline-run") for name in found)
    assert any("graph" in name and name.endswith(".json") for name in found)
    assert any(name.endswith(".png") for name in found)

def test_memory_of_training_small(tmp_path):
    "Three steps of `small` at a batch of 128 stay under 3 GiB."
    code = f"""import resource, sys
from ddpm_tutorial.run import train
sys.argv = ["ddpm_train", "--config", "small", "--batch_size", "128", "--data", "sample", "--max_steps", "3",
            "--num_inference_steps", "1", "--device", "cpu", "--precision", "fp32", "--no-wandb",
            "--output_dir", {str(tmp_path/'run')!r}]
train.ddpm_train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak*(1 if sys.platform == "darwin" else 1024))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 3*2**30

def test_presets_are_what_people_quote():
    "The sizes by which the presets are known."
    def sizes(c):
        return (c.model.base_channels, c.model.channel_multipliers, c.model.num_res_blocks,
                set(c.model.attention_resolutions), c.scheduler.num_steps, c.train.epochs, c.train.batch_size)
    shapes = {name: sizes(config) for name, config in PRESETS.items()}
    assert shapes["small"] == (32, (1, 2, 4), 1, set(), 500, 20, 64)
    assert shapes["baseline"] == (64, (1, 2, 4, 8), 2, {7}, 1000, 50, 128)
    assert shapes["large"] == (128, (1, 2, 3, 4), 3, {7, 14}, 1000, 100, 128)

def test_auto_device_is_the_fastest_there_is():
    "It is cuda, then mps, then cpu."
    if torch.cuda.is_available(): fastest = "cuda"
    elif torch.backends.mps.is_available(): fastest = "mps"
    else: fastest = "cpu"
    assert choose_device().type == fastest
