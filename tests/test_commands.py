"The commands as a user types them: what they leave, what they refuse, what they load."
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_tutorial import check, sample, train
from ddpm_tutorial.checkpoint import load_checkpoint
from ddpm_tutorial.config import PRESETS, choose_device
from ddpm_tutorial.tracking import read_metrics

SHORT = ["--data", "sample", "--max_steps", "4", "--batch_size", "8", "--num_inference_steps", "3", "--device", "cpu", "--precision", "bf16", "--no-wandb"]

def command(module, *args):
    "Runs a command in this process. Returns its exit code."
    with pytest.MonkeyPatch.context() as patch:
        name = "ddpm_" + module.__name__.split(".")[-1]
        patch.setattr(sys, "argv", [name, *map(str, args)])
        try: getattr(module, name)()
        except SystemExit as stop: return stop.code
    return 0

@pytest.fixture(scope="session")
def run(tmp_path_factory):
    "The folder of a short run of `tiny`."
    folder = tmp_path_factory.mktemp("runs")/"v1_tiny"
    assert command(train, "--config", "tiny", *SHORT, "--output_dir", folder) == 0
    return folder

def test_a_run_leaves_what_the_design_says(run):
    "Configuration, metrics, both checkpoints, samples; nothing half-written."
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} == {
        ".lock", "config.json", "metrics.jsonl", "report.html", "checkpoints/best_model.pth", "checkpoints/latest.pth",
        "checkpoints/step_00000004.pth", "samples/epoch_001.png"}
    checkpoint = load_checkpoint(run/"checkpoints"/"latest.pth")
    assert checkpoint["step"] == 4 and checkpoint["config"].train.batch_size == 8
    assert json.loads((run/"config.json").read_text())["train"]["max_steps"] == 4
    last = read_metrics(run)[-1]
    assert last["step"] == 4 and last["validation_loss"] == pytest.approx(checkpoint["progress"]["best_loss"])

def test_the_report_opens_without_a_network(run):
    "One file: curves, the samples, settings, versions, time and memory; nothing is fetched, nothing is run."
    page = (run/"report.html").read_text()
    assert page.count("<svg") == 1 and page.count('src="data:image/png;base64,') == len(list((run/"samples").glob("*.png"))) == 1
    assert not re.search(r"(src|href)=.(?!data:|#)|<script|@import|<link", page)
    for word in ("Loss by noise level", "Learning rate", "validation_loss", "memory_mib", "seconds", torch.__version__, "base_channels", "bf16"): assert word in page
    by_noise = next(line["loss_by_noise"] for line in read_metrics(run) if "loss_by_noise" in line)
    assert len(by_noise) == 10 and all(value is None or 0 < value < 10 for value in by_noise)

@pytest.mark.parametrize("args, name, size", [
    (["--num_samples", "16", "--guidance_scale", "3.0", "--mode", "grid"], "grid.png", (4, 4)),
    (["--class_label", "5", "--num_samples", "16", "--guidance_scale", "3.0"], "grid_5.png", (4, 4)),
    (["--mode", "class_grid", "--guidance_scale", "3.0"], "class_grid.png", (8, 10)),
    (["--mode", "progressive", "--class_label", "3", "--guidance_scale", "3.0"], "progressive_3.png", (3, 4)), # 3 of the 3 steps
    (["--use_ema", "--guidance_scale", "3.0"], "grid.png", (4, 4)),
    (["--no-use_ema", "--num_samples", "2"], "grid.png", (2, 1)),
])
def test_the_sampling_commands_people_know(run, args, name, size):
    "Each writes its picture into the run's samples folder; columns and rows are as asked."
    assert command(sample, "--checkpoint", run/"checkpoints"/"best_model.pth", "--config", run/"config.json", *args) == 0
    columns, rows = size
    with Image.open(run/"samples"/name) as picture: assert picture.size == (58*columns + 2, 58*rows + 2) # 28 pixels doubled, and borders

def test_arrays_for_evaluation(run, tmp_path):
    "`.npz` holds uint8 images, channels last, and labels in turn; the same seed gives the same bytes, another seed others."
    def arrays(seed):
        assert command(sample, "--checkpoint", run/"checkpoints"/"latest.pth", "--num_samples", "12", "--batch_size", "5", "--seed", seed, "--output", tmp_path/"a.npz") == 0
        with np.load(tmp_path/"a.npz") as file: return file["arr_0"], file["arr_1"]
    images, labels = arrays(1)
    assert images.shape == (12, 28, 28, 1) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert np.array_equal(arrays(1)[0], images) and not np.array_equal(arrays(2)[0], images)

def test_progress_as_gif(run, tmp_path):
    "One frame for each step, the size of one grid."
    assert command(sample, "--checkpoint", run/"checkpoints"/"latest.pth", "--mode", "progressive", "--output", tmp_path/"a.gif") == 0
    with Image.open(tmp_path/"a.gif") as gif: assert gif.n_frames == 3 and gif.size == (118, 118)

def test_a_run_goes_on_bit_for_bit(run, tmp_path):
    "Two steps, then `--resume` to four: the weights of the run that was never stopped."
    args = ["--config", "tiny", *SHORT, "--output_dir", tmp_path/"again"]
    assert command(train, *args, "--max_steps", "2", "--no-lr_decay") == 0
    assert command(train, *args, "--no-lr_decay", "--resume") == 0
    assert command(train, *args[:-1], tmp_path/"whole", "--no-lr_decay") == 0
    resumed, whole = (load_checkpoint(tmp_path/name/"checkpoints"/"latest.pth") for name in ("again", "whole"))
    assert resumed["step"] == whole["step"] == 4
    for part in ("model", "ema"): assert all(torch.equal(a, b) for a, b in zip(resumed[part].values(), whole[part].values()))

def test_a_folder_with_a_run_is_refused(run, capsys):
    "One line that shows both ways on, exit code 2, and nothing is touched."
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert command(train, "--config", "tiny", *SHORT, "--output_dir", run) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--resume" in message and "--output_dir" in message and "Traceback" not in message
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before

def test_going_on_from_a_checkpoint_needs_a_folder_of_its_own(run, tmp_path, capsys):
    "`--resume_from` starts a branch elsewhere; in a folder with a run it would write over newer checkpoints."
    args = ["--config", "tiny", *SHORT, "--no-lr_decay", "--output_dir"]
    assert command(train, *args, tmp_path/"trunk") == 0
    start = ["--resume_from", tmp_path/"trunk/checkpoints/best_model.pth", "--max_steps", "6"]
    assert command(train, *args, tmp_path/"trunk", *start) == 2 and "another --output_dir" in capsys.readouterr().err
    assert command(train, *args, tmp_path/"branch", *start) == 0
    assert [load_checkpoint(tmp_path/name/"checkpoints/latest.pth")["step"] for name in ("trunk", "branch")] == [4, 6]
    assert (tmp_path/"branch/checkpoints/best_model.pth").exists()

def test_weights_that_are_no_numbers_are_not_saved(tmp_path, capsys):
    "A learning rate beyond reason: exit code 1, one line, and no checkpoint rather than a bad one."
    assert command(train, "--config", "tiny", *SHORT, "--lr", "1e38", "--warmup_steps", "0", "--save_every", "1", "--output_dir", tmp_path/"run") == 1
    assert "lower the lr" in capsys.readouterr().err and not list((tmp_path/"run"/"checkpoints").iterdir())

def test_weights_of_another_network_are_refused(run, tmp_path, capsys):
    "A checkpoint whose configuration was swapped: one line."
    values = torch.load(run/"checkpoints"/"latest.pth", weights_only=True)
    values["config"]["model"]["base_channels"] = 32
    torch.save(values, tmp_path/"swapped.pth")
    assert command(sample, "--checkpoint", tmp_path/"swapped.pth") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "do not fit its configuration" in message

@pytest.mark.parametrize("module", ["train", "sample", "check"])
def test_modules_are_commands(module):
    "`python -m` is the same as the command: a wrong device is one line and exit code 2."
    args = ["--checkpoint", "x.pth"] if module == "sample" else []
    done = subprocess.run([sys.executable, "-m", f"ddpm_tutorial.{module}", *args, "--device", "tpu"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: device must be") and done.stderr.count("\n") == 1

def test_resuming_with_other_settings_names_them(run, capsys):
    "What may not differ is listed."
    assert command(train, "--config", "tiny", *SHORT, "--output_dir", run, "--resume", "--lr", "1e-5") == 2
    assert "train.lr" in capsys.readouterr().err

@pytest.mark.parametrize("args, says", [
    (["--epochs", "0"], "epochs must be at least 1"), (["--lr", "nan"], "lr must be above 0"), (["--batch_size", "-1"], "batch_size"),
    (["--base_channels", "48", "--num_groups", "32"], "groups"), (["--channel_multipliers", "1", "2", "2", "2", "2", "2"], "too small"),
    (["--attention_resolutions", "9"], "attention_resolutions"), (["--num_inference_steps", "501"], "num_inference_steps"),
    (["--guidance_scale", "-1"], "guidance_scale"), (["--ema_decay", "1"], "ema_decay"), (["--save_every", "0"], "save_every"),
    (["--config", "smal"], "did you mean small"), (["--config", "basline"], "did you mean baseline"), (["--config", "xyz"], "small"), (["--epoch", "3"], "--epochs"), (["--lr", "fast"], "--lr"), (["--device", "tpu"], "cpu"),
    (["--prediction_type", "noise"], "epsilon"), (["--num_steps", "0"], "num_steps"), (["--resume"], "nothing to resume"),
])
def test_a_bad_value_is_answered_before_data_are_read(args, says, tmp_path, monkeypatch, capsys):
    "Exit code 2, the field named, no traceback, and the data were not asked for."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_data", lambda *_: pytest.fail("the data were read"))
    assert command(train, "--config", "small", "--no-wandb", *args) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert says in message and "Traceback" not in message

@pytest.mark.parametrize("args, code, says", [
    (["--class_label", "10"], 2, "0 ... 9"), (["--num_samples", "0"], 2, "at least 1"), (["--num_inference_steps", "201"], 2, "1 ... 200"),
    (["--output", "a.jpeg"], 2, ".png"), (["--mode", "class_grid", "--num_samples", "11"], 2, "multiple of 10"), (["--guidance_scale", "inf"], 2, "guidance_scale"),
    (["--mode", "mosaic"], 2, "class_grid"), (["--checkpoint", "nowhere.pth"], 2, "nowhere.pth"), (["--config", "nowhere.json"], 2, "nowhere.json"),
])
def test_sampling_refuses(run, args, code, says, capsys):
    "What cannot be drawn, in a line."
    assert command(sample, "--checkpoint", run/"checkpoints"/"latest.pth", *args) == code
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message

def test_a_configuration_that_contradicts_the_checkpoint(run, tmp_path, capsys):
    "Is refused with the fields in which the two differ; the run's own is taken."
    settings = json.loads((run/"config.json").read_text())
    settings["scheduler"]["schedule"] = "linear"
    (tmp_path/"other.json").write_text(json.dumps(settings))
    assert command(sample, "--checkpoint", run/"checkpoints"/"latest.pth", "--config", tmp_path/"other.json") == 2
    message = capsys.readouterr().err
    assert "belongs to another run" in message and "scheduler.schedule" in message

def test_own_images(tmp_path, capsys):
    "Colour, not square, three classes: the first call says what to add, the second trains and samples."
    np.savez(tmp_path/"own.npz", images=np.random.default_rng(0).integers(0, 256, (30, 12, 16, 3), dtype=np.uint8), labels=np.arange(30) % 3)
    args = ["--config", "small", *SHORT, "--data", tmp_path/"own.npz", "--output_dir", tmp_path/"run"]
    assert command(train, *args) == 2
    added = capsys.readouterr().err.split("add ")[1].split(" (")[0].split()
    assert command(train, *args, *added) == 0
    assert command(sample, "--checkpoint", tmp_path/"run/checkpoints/latest.pth", "--num_samples", "3", "--output", tmp_path/"a.npz") == 0
    with np.load(tmp_path/"a.npz") as file: assert file["arr_0"].shape == (3, 12, 16, 3)

def test_without_labels(tmp_path):
    "`--num_classes 0` trains a model that knows no classes; a class cannot be asked of it."
    assert command(train, "--config", "tiny", *SHORT, "--num_classes", "0", "--output_dir", tmp_path/"run") == 0
    checkpoint = ["--checkpoint", tmp_path/"run/checkpoints/latest.pth"]
    assert command(sample, *checkpoint, "--num_samples", "2") == 0
    assert command(sample, *checkpoint, "--class_label", "1") == 2

def test_check_prints_a_line_for_each_part(capsys):
    "All parts, each ok."
    assert command(check, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["ok"]*8
    for name in ("model creation", "data", "forward pass", "loss", "sampling", "EMA"): assert any(name in line for line in lines)

def loaded_modules(code):
    "Names of the modules that a fresh Python has loaded after `code`."
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())

def test_commands_do_not_load_wandb(tmp_path):
    "Training without it, and sampling."
    short = [*SHORT, "--output_dir", str(tmp_path/"run")]
    modules = loaded_modules(f"""import sys
from ddpm_tutorial import train, sample
sys.argv = ["ddpm_train", "--config", "tiny", *{short}]
train.ddpm_train()
sys.argv = ["ddpm_sample", "--checkpoint", {str(tmp_path/'run/checkpoints/latest.pth')!r}, "--num_samples", "1"]
sample.ddpm_sample()""")
    assert "torch" in modules and "wandb" not in modules

def test_sampling_loads_no_drawing_library(run):
    "Only a report draws: `ddpm_sample` does without matplotlib, too."
    modules = loaded_modules(f"""import sys
from ddpm_tutorial import sample
sys.argv = ["ddpm_sample", "--checkpoint", {str(run/'checkpoints/latest.pth')!r}, "--num_samples", "1"]
sample.ddpm_sample()""")
    assert "torch" in modules and not {"wandb", "matplotlib"} & modules

def test_wandb_offline_by_default(tmp_path, monkeypatch):
    "Without a key the run is tracked offline, inside its own folder, with the graph of the model and its samples."
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path)) # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path/"netrc"))
    args = [arg for arg in SHORT if arg != "--no-wandb"]
    assert command(train, "--config", "tiny", *args, "--output_dir", tmp_path/"run", "--watch_model") == 0
    found = [path.name for path in (tmp_path/"run"/"wandb").rglob("*")]
    assert any(name.startswith("offline-run") for name in found)
    assert any("graph" in name and name.endswith(".json") for name in found) and any(name.endswith(".png") for name in found)

def test_memory_of_training_small(tmp_path):
    "Three steps of `small` at a batch of 128 stay under 3 GiB."
    code = f"""import resource, sys
from ddpm_tutorial import train
sys.argv = ["ddpm_train", "--config", "small", "--batch_size", "128", "--data", "sample", "--max_steps", "3", "--num_inference_steps", "1", "--device", "cpu", "--precision", "fp32", "--no-wandb", "--output_dir", {str(tmp_path/'run')!r}]
train.ddpm_train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak*(1 if sys.platform == "darwin" else 1024))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 3*2**30

def test_presets_are_what_people_quote():
    "The sizes by which the presets are known."
    shapes = {name: (c.model.base_channels, c.model.channel_multipliers, c.model.num_res_blocks, set(c.model.attention_resolutions), c.scheduler.num_steps,
                     c.train.epochs, c.train.batch_size) for name, c in PRESETS.items()}
    assert shapes["small"] == (32, (1, 2, 4), 1, set(), 500, 20, 64)
    assert shapes["baseline"] == (64, (1, 2, 4, 8), 2, {7}, 1000, 50, 128)
    assert shapes["large"] == (128, (1, 2, 3, 4), 3, {7, 14}, 1000, 100, 128)

def test_auto_device_is_the_fastest_there_is():
    "cuda before mps before cpu."
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
