"""Signals, kills, limits, NaN and infinity, folders in use, all in real processes.

What a run has learned stays.
"""
import contextlib
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from processes import Launcher, assert_same, lines, newest, own_images, same_tensors, tiny, until

from ddpm_tutorial.run.checkpoint import iter_tensors, load_checkpoint, load_latest
from ddpm_tutorial.run.tracking import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes and signals of Unix")

@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("processes")) as launcher: yield launcher

@pytest.fixture(scope="module")
def data(tmp_path_factory): return own_images(tmp_path_factory.mktemp("data")/"own.npz")

@pytest.fixture(scope="module")
def whole(launcher, data, tmp_path_factory):
    "The folder of a run that was never disturbed."
    folder = tmp_path_factory.mktemp("runs")/"whole"
    assert launcher.run(tiny(data, folder, "--epochs", 2)) == (0, "")
    steps = [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10] # one line more for each epoch
    assert [line["step"] for line in lines(folder)] == steps
    return folder

def send(process, number, group):
    """Sends a signal to the process, or to all of its group.

    Then the process may continue, if it still wants to.
    """
    if group: os.killpg(process.pid, number)
    else: os.kill(process.pid, number)
    process.go()

def drawing(run, *args): # a command line for `ddpm_sample`
    return ["--checkpoint", run/"checkpoints"/"latest.pth", "--device", "cpu", *args]

def one_error(err, *says):
    "There is one line that begins with `error: `. It contains all these parts, and there is no traceback."
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in says) and "Traceback" not in err, err
    return True

def nothing_half(folder): return not list(folder.rglob("*.partial"))

# Where the run is when the signal comes: the call that waits for it, and the step that must be saved.
PHASES = {
    "a step": ("pause(training, 'diffusion_loss', 4)", 4),      # the run finishes the step first
    "between forward and update": ("pause(training.nn.utils, 'clip_grad_norm_', 3)", 3),
    "validation": ("pause(config, 'validation_loss')", 5),
    # the second of the sampler's two steps
    "sampling": ("pause(scheduler.NoiseScheduler, 'to_x0_and_noise', 2)", 5),
    "a save": ("pause(checkpoint.torch, 'save', 2)", 4),
    "a rename": ("pause(os, 'replace', 4)", 4),                 # after one for config.json and two for step 2
    "the save of an epoch": ("pause(tracking.Tracker, 'log_picture')", 5),
    "the last validation": ("pause(config, 'validation_loss', 2)", 10),
    "the last sampling": ("pause(scheduler.NoiseScheduler, 'to_x0_and_noise', 4)", 10),
}

@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal(launcher, data, whole, tmp_path, phase, group):
    """The run saves, and ends within 10 s with the exit code of the signal.

    Resumed, it ends with the same values, to the last bit, as the run that was never stopped.
    """
    before, step = PHASES[phase]
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[(list(PHASES).index(phase) + group) % 3]
    process = launcher.start(tiny(data, tmp_path/"run", "--epochs", 2), before)
    process.waits()
    logged = max(line["step"] for line in read_metrics(tmp_path/"run"))
    send(process, number, group)
    assert process.wait(10) == 128 + number and "Traceback" not in process.err, process.err
    assert "continue with --resume" in process.err and nothing_half(tmp_path/"run")
    assert newest(tmp_path/"run")["step"] == step >= logged
    assert launcher.run(tiny(data, tmp_path/"run", "--epochs", 2, "--resume")) == (0, "")
    assert_same(tmp_path/"run", whole)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step(launcher, data, whole, tmp_path, number):
    "Nothing can be lost yet, and the same command starts again."
    process = launcher.start(tiny(data, tmp_path/"run", "--epochs", 2), "pause(train, 'load_data')")
    process.waits()
    send(process, number, True)
    assert process.wait(10) == 128 + number and "Traceback" not in process.err
    assert launcher.run(tiny(data, tmp_path/"run", "--epochs", 2)) == (0, "")
    assert_same(tmp_path/"run", whole)

def test_a_signal_after_the_last_save(launcher, data, whole, tmp_path):
    "The signal comes while the report is made. All is saved, and nothing is left to do."
    process = launcher.start(tiny(data, tmp_path/"run", "--epochs", 2), "pause(report, 'write_report', 2)")
    process.waits()
    send(process, signal.SIGTERM, True)
    assert process.wait(10) == 143 and "Traceback" not in process.err
    assert_same(tmp_path/"run", whole)
    code, err = launcher.run(tiny(data, tmp_path/"run", "--epochs", 2, "--resume"))
    assert code == 2 and one_error(err, "nothing is left to do")

def test_a_signal_while_wandb_is_at_work(launcher, data, whole, tmp_path):
    "Its service is in the same group and gets the signal too. The run still saves and ends."
    args = [arg for arg in tiny(data, tmp_path/"run", "--epochs", 2) if arg != "--no-wandb"]
    offline = f"os.environ.update(WANDB_MODE='offline', HOME={str(tmp_path)!r})\n"
    process = launcher.start(args, offline + "pause(training, 'diffusion_loss', 4)")
    process.waits()
    send(process, signal.SIGINT, True)
    assert process.wait(10) == 130 and "Traceback" not in process.err, process.err
    assert newest(tmp_path/"run")["step"] == 4
    assert launcher.run(tiny(data, tmp_path/"run", "--epochs", 2, "--resume")) == (0, "")
    assert_same(tmp_path/"run", whole)

@pytest.mark.parametrize("number, mode", [(signal.SIGINT, "grid"), (signal.SIGTERM, "progressive"),
                                          (signal.SIGHUP, "grid")])
def test_a_signal_to_the_sampling_command(launcher, whole, tmp_path, number, mode):
    "It ends within 10 s and leaves no file."
    args = drawing(whole, "--mode", mode, "--output", tmp_path/"new"/"a.png")
    # while it draws, and while it writes
    for before in ("pause(scheduler.NoiseScheduler, 'to_x0_and_noise', 2)", "pause(os, 'fsync')"):
        process = launcher.start(args, before, "sample")
        process.waits()
        send(process, number, number == signal.SIGINT)
        assert process.wait(10) == 128 + number and process.err == ""
        assert not list((tmp_path/"new").iterdir())

LONG = """
def compute(): # one call that lasts minutes, and Python can do nothing meanwhile
    x = checkpoint.torch.rand(6000, 6000)
    (folder/"waits").touch()
    checkpoint.torch.linalg.eigvals(x)
pause(training, 'diffusion_loss', 4, compute)
"""

@pytest.mark.parametrize("before", [LONG, "pause(training, 'diffusion_loss', 4)", "pause(os, 'fsync', 5)"],
                         ids=["C", "a step", "a save"])
def test_a_second_signal_ends_it_at_once(launcher, data, tmp_path, before):
    "Whatever the run is doing. The checkpoint before is whole."
    process = launcher.start(tiny(data, tmp_path/"run"), before)
    process.waits()
    os.kill(process.pid, signal.SIGINT)
    # it wants to finish what it is doing; and this is longer than an echo takes
    assert process.wait(1) is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == 143 and "Traceback" not in process.err
    assert newest(tmp_path/"run")["step"] == 2
    assert launcher.run(tiny(data, tmp_path/"run", "--max_steps", 3, "--resume"))[0] == 0

def test_an_echo_is_no_second_signal(launcher, data, tmp_path):
    """A terminal sends the signal to all, and a launcher passes it on.

    Two at once count as one, and the run saves.
    """
    process = launcher.start(tiny(data, tmp_path/"run"), "pause(training, 'diffusion_loss', 4)")
    process.waits()
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    process.go()
    assert process.wait(10) in (130, 143) and newest(tmp_path/"run")["step"] == 4

def test_two_runs_in_one_folder(launcher, data, whole, tmp_path):
    """The second is refused and the first is not disturbed, whatever it is doing.

    After a kill, the folder is free again.
    """
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    at_work, holds = "another run is at work in", "already holds a run"
    cases = [("pause(os, 'replace')", at_work, []),         # while it writes config.json
             ("pause(training, 'diffusion_loss', 4)", at_work, ["--resume"]),
             ("pause(os, 'replace', 4)", holds, []),        # in a save
             ("pause(os, 'replace', 4)", at_work, ["--resume"])]
    for before, says, more in cases:
        shutil.rmtree(tmp_path/"run", ignore_errors=True)
        first = launcher.start(args, before)
        first.waits()
        code, err = launcher.run([*args, *more])
        assert code == 2 and one_error(err, says, str(tmp_path/"run"))
        first.go()
        assert first.wait() == 0 and first.err == ""
        assert_same(tmp_path/"run", whole)
    shutil.rmtree(tmp_path/"run")
    first = launcher.start(args, "pause(training, 'diffusion_loss', 4)")
    first.waits()
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and launcher.run([*args, "--resume"]) == (0, "")
    assert_same(tmp_path/"run", whole)

def test_samples_of_a_run_that_is_at_work(launcher, data, whole, tmp_path):
    "Another process may draw into the folder of a run, whatever the run is writing there."
    # samples/epoch_001.png
    process = launcher.start(tiny(data, tmp_path/"run", "--epochs", 2), "pause(os, 'replace', 6)")
    process.waits()
    assert (tmp_path/"run"/"samples"/"epoch_001.png.partial").exists()
    code, err = launcher.run(drawing(tmp_path/"run", "--num_samples", 1), module="sample")
    process.go()
    assert (code, err) == (0, "") and process.wait() == 0 and process.err == ""
    assert_same(tmp_path/"run", whole)

def test_sampling_leaves_the_files_of_others(launcher, whole, tmp_path):
    "Whatever their names are, for instance a browser's half downloads."
    (tmp_path/"film.mp4.partial").write_bytes(b"half")
    args = drawing(whole, "--num_samples", 1, "--output", tmp_path/"a.png")
    assert launcher.run(args, module="sample") == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "film.mp4.partial"]

def test_a_folder_that_is_not_there_or_not_writable(launcher, data, whole, tmp_path):
    "Missing folders are made. If one cannot be made, both commands say so before they read data."
    (tmp_path/"file").touch()
    places = [tmp_path/"file"/"run", tmp_path/"file"]
    if os.getuid():
        (tmp_path/"closed").mkdir(mode=0o500)
        places.append(tmp_path/"closed")
    for place in places:
        code, err = launcher.run(tiny(data, place), "pause(train, 'load_data', hold=lambda: os._exit(77))")
        assert code == 2 and one_error(err, "cannot write to", str(place), "choose another folder")
    code, err = launcher.run(drawing(whole, "--output", tmp_path/"file"/"a.png"),
                             "pause(sample, 'sampling_steps', hold=lambda: os._exit(77))", "sample")
    assert code == 2 and one_error(err, "cannot write to", str(tmp_path/"file"))
    assert launcher.run(tiny(data, tmp_path/"a"/"b"/"c", "--max_steps", 1)) == (0, "")
    assert newest(tmp_path/"a"/"b"/"c")["step"] == 1

def test_after_a_kill_before_the_first_checkpoint(launcher, data, whole, tmp_path):
    "The folder can be used again, and half-written files are removed."
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    process = launcher.start(args, "pause(os, 'replace', 2)")
    process.waits()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not nothing_half(tmp_path/"run")
    assert (tmp_path/"run"/"config.json").exists()
    for name in ("report.html", "checkpoints/step_00000099.pth", "samples/epoch_099.png"):
        (tmp_path/"run"/f"{name}.partial").write_bytes(b"half")
    code, err = launcher.run([*args, "--resume"])
    assert code == 2 and one_error(err, "nothing to resume")
    assert launcher.run(args) == (0, "") and nothing_half(tmp_path/"run")
    assert_same(tmp_path/"run", whole)

def test_killed_between_the_line_of_an_epoch_and_its_save(launcher, data, whole, tmp_path):
    """A run is stopped in a validation, resumed, and killed between its line and its checkpoint.

    In the end the line is there once.
    """
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    process = launcher.start(args, "pause(config, 'validation_loss')")
    process.waits()
    send(process, signal.SIGTERM, False)
    assert process.wait(10) == 143
    process = launcher.start([*args, "--resume"], "pause(checkpoint.torch, 'save')")
    process.waits()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and "validation_loss" in lines(tmp_path/"run")[-1]
    assert launcher.run([*args, "--resume"]) == (0, "")
    assert_same(tmp_path/"run", whole)

def test_killed_between_the_names_of_a_save(launcher, data, whole, tmp_path):
    """The checkpoint of an epoch is written, but not yet called the best, or not yet the latest.

    The resumed run leaves the same best model.
    """
    # config.json, two for each of steps 2 and 4, the picture, the checkpoint of step 5, and then its names
    for call in (8, 9):
        args = tiny(data, tmp_path/str(call), "--epochs", 2)
        process = launcher.start(args, f"pause(os, 'replace', {call})")
        process.waits()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and newest(tmp_path/str(call))["step"] == 4
        checkpoints = tmp_path/str(call)/"checkpoints"
        assert (checkpoints/"step_00000005.pth").exists()
        assert (checkpoints/"best_model.pth").exists() == (call == 9)
        assert launcher.run([*args, "--resume"]) == (0, "")
        assert_same(tmp_path/str(call), whole)
        best = load_checkpoint(checkpoints/"best_model.pth")
        wanted = load_checkpoint(whole/"checkpoints"/"best_model.pth")
        assert best["step"] == wanted["step"] and same_tensors(best["ema"], wanted["ema"])

def test_a_run_made_too_short(launcher, data, tmp_path):
    "Resuming with fewer steps than the run has taken is an error."
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    assert launcher.run([*args, "--max_steps", 4]) == (0, "")
    code, err = launcher.run([*args, "--max_steps", 3, "--resume"])
    assert code == 2 and one_error(err, "has taken 4 of 3 steps")

LIMIT = """
import resource
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {mib}*2**20, resource.RLIM_INFINITY))
"""
ONEDNN = """
def refuse(): # what oneDNN says at some limits, which differ from machine to machine
    raise RuntimeError('could not create a primitive')
pause(training, 'diffusion_loss', hold=refuse)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit the memory")

@linux
def test_out_of_memory_in_training(launcher, tmp_path):
    """Whatever operation fails: exit code 1, and one line with batch size, device and what to lower.

    The checkpoint is as it was.
    """
    args = tiny("sample", tmp_path/"run", "--batch_size", 1000, "--no-lr_decay")
    assert launcher.run([*args, "--max_steps", 1]) == (0, "")
    before = (tmp_path/"run"/"checkpoints"/"latest.pth").read_bytes()
    limits = [LIMIT.format(mib=mib) for mib in (25, 40, 50, 60, 80, 100, 150, 200, 300)]
    for limit in [*limits, ONEDNN]:
        code, err = launcher.run([*args, "--max_steps", 3, "--resume"], limit)
        says = ("out of memory on cpu with batch_size 1000", "lower --batch_size to 500 or less")
        assert code == 1 and one_error(err, *says), (limit, err)
        assert (tmp_path/"run"/"checkpoints"/"latest.pth").read_bytes() == before
        assert nothing_half(tmp_path/"run")

@linux
def test_out_of_memory_in_sampling(launcher, whole, tmp_path):
    "The same for the command that draws, which leaves no file."
    args = drawing(whole, "--num_samples", 50_000, "--batch_size", 50_000, "--output", tmp_path/"new"/"a.npz")
    code, err = launcher.run(args, LIMIT.format(mib=300), "sample")
    says = ("out of memory on cpu with batch_size 50000", "lower --batch_size to 25000 or less")
    assert code == 1 and one_error(err, *says)
    assert not list((tmp_path/"new").iterdir())

SPOIL = { # at step 4, something becomes NaN or infinite
    "loss": """def spoil(losses, n): return losses*value if n == 4 else losses
after(training, 'diffusion_loss', spoil)""",
    "gradient": """def spoil(losses, n):
    if n == 4: losses.register_hook(lambda gradient: gradient*value)
    return losses
after(training, 'diffusion_loss', spoil)""",
    "length of the weights": """def spoil(result, n):
    if n == 4: next(p for p in state.model.parameters()).data.view(-1)[3] = value
    return result
def remember(made, n):
    global state
    state = made
    step = state.optimizer.step
    def then(*args, **kwargs):
        step(*args, **kwargs)
        spoil(None, state.step + 1)
    state.optimizer.step = then
    return made
after(train, 'new_state', remember)""",
}
AFTER = """
def after(place, name, change):
    original, calls = getattr(place, name), iter(range(1, 10**9))
    setattr(place, name, lambda *args, **kwargs: change(original(*args, **kwargs), next(calls)))
value = float({value!r})
"""

@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("what", SPOIL)
def test_no_number(launcher, data, whole, tmp_path, what, value):
    """The run stops at that step and names step, learning rate and loss.

    No file contains NaN or infinity, and the run can continue from the save before.
    """
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    code, err = launcher.run(args, AFTER.format(value=value) + SPOIL[what])
    assert code == 1 and one_error(err, f"the {what} is", "at step 4 (lr ", "loss ", "lower the lr")
    for path in (tmp_path/"run"/"checkpoints").glob("*.pth"):
        assert all(tensor.isfinite().all() for tensor in iter_tensors(load_checkpoint(path)))
    metrics = (tmp_path/"run"/"metrics.jsonl").read_text()
    assert not {"NaN", "Infinity"} & set(metrics.replace(",", " ").replace("}", " ").split())
    assert newest(tmp_path/"run")["step"] == 2 and (tmp_path/"run"/"report.html").exists()
    assert launcher.run([*args, "--resume"]) == (0, "")
    assert_same(tmp_path/"run", whole)

def test_no_number_in_the_validation(launcher, data, tmp_path):
    "The same. There is neither a checkpoint nor a line of that epoch."
    before = AFTER.format(value="nan") + "after(config, 'validation_loss', lambda loss, n: value)"
    code, err = launcher.run(tiny(data, tmp_path/"run"), before)
    assert code == 1 and one_error(err, "the validation loss is nan at step 5", "lower the lr")
    assert newest(tmp_path/"run")["step"] == 4
    assert not any("validation_loss" in line for line in lines(tmp_path/"run"))

@pytest.fixture
def copy(whole, tmp_path):
    "A copy of the run, for tests that damage it."
    shutil.copytree(whole, tmp_path/"copy")
    for path in (tmp_path/"copy"/"checkpoints").glob("*.pth"): path.write_bytes(path.read_bytes())
    return tmp_path/"copy"

NO_DATA = "pause(train, 'load_data', hold=lambda: os._exit(77))" # ends the process if it reads data

def refused(launcher, args, *says, before=NO_DATA):
    "Exit code 2 before data are read, and one line."
    code, err = launcher.run(args, before)
    assert code == 2 and one_error(err, *says), (code, err)

def test_a_resume_with_other_settings_is_refused(launcher, data, copy, tmp_path):
    """The fields are named before data are read.

    Settings of length, saving and watching may differ.
    """
    kept = (copy/"checkpoints"/"latest.pth").read_bytes()
    branch = ["--resume_from", copy/"checkpoints"/"best_model.pth", "--output_dir", tmp_path/"branch"]
    for way in (["--resume"], branch):
        def args(*more): return [*tiny(data, copy, "--epochs", 2), *more, *way]
        refused(launcher, args("--lr", 1e-4, "--base_channels", 32),
                "was made with model.base_channels 16 (now 32), train.lr 0.002 (now 0.0001);")
        refused(launcher, args("--precision", "bf16"), "was made with precision fp32 (now bf16);")
        refused(launcher, args("--num_inference_steps", 3, "--guidance_scale", 4, "--schedule", "linear"),
                "was made with sampling.guidance_scale 2.0 (now 4.0), "
                "sampling.num_inference_steps 2 (now 3), scheduler.schedule cosine (now linear);")
    own_images(tmp_path/"more.npz", 41)
    data_before = data.read_bytes()
    try:
        shutil.copy(tmp_path/"more.npz", data) # the same file name, but with other images in it
        refused(launcher, tiny(data, copy, "--epochs", 3, "--resume"),
                "was trained on other images", "had 36 (", "has 37 images", before="")
    finally: data.write_bytes(data_before)
    assert (copy/"checkpoints"/"latest.pth").read_bytes() == kept
    may_differ = ["--max_steps", 11, "--save_every", 3, "--log_every", 2, "--sample_every", 2, "--resume"]
    longer = tiny(data, copy, "--epochs", 3, *may_differ)
    code, err = launcher.run(longer, "os.environ.update(WANDB_MODE='disabled')")
    assert (code, err) == (0, "") and newest(copy)["step"] == 11

def altered(path, **changes):
    values = torch.load(path, weights_only=True)
    path.unlink() # its other names keep the old file
    torch.save({**values, **changes}, path)

def test_a_newer_format_is_refused(launcher, data, copy):
    "No older checkpoint is taken instead."
    altered(copy/"checkpoints"/"latest.pth", format=99)
    code, err = launcher.run(tiny(data, copy, "--epochs", 3, "--resume"), NO_DATA)
    assert code == 1 and one_error(err, "latest.pth", "newer version", "update the package")

def test_weights_that_do_not_fit(launcher, data, copy):
    "Weights or an optimizer of another network are refused, and nothing is loaded in part."
    for part in ("model", "ema", "optimizer"):
        values = torch.load(copy/"checkpoints"/"step_00000008.pth", weights_only=True)
        spoilt = values[part]["state"] if part == "optimizer" else values[part]
        spoilt.pop(list(spoilt)[0])
        altered(copy/"checkpoints"/"latest.pth", step=8, **{part: values[part]})
        code, err = launcher.run(tiny(data, copy, "--epochs", 2, "--resume"))
        assert code == 1 and one_error(err, "latest.pth", "does not fit"), (part, code, err)

def test_a_damaged_checkpoint(launcher, data, whole, copy, tmp_path):
    "`--resume` takes the one before, with one warning; `--resume_from` does not."
    latest = copy/"checkpoints"/"latest.pth"
    for name in ("latest.pth", "step_00000010.pth"): (copy/"checkpoints"/name).unlink()
    latest.write_bytes((whole/"checkpoints"/"latest.pth").read_bytes()[:-300])
    os.link(latest, copy/"checkpoints"/"step_00000010.pth") # a run leaves one file with two names
    before = [line for line in lines(copy) if line["step"] <= 8]
    code, err = launcher.run(tiny(data, tmp_path/"branch", "--epochs", 2, "--resume_from", latest))
    assert code == 1 and one_error(err, str(latest), "damaged")
    assert not list((tmp_path/"branch").rglob("*.pth"))
    code, err = launcher.run(tiny(data, copy, "--epochs", 2, "--resume"))
    assert code == 0 and len(err.splitlines()) == 1 and err.startswith("warning: "), err
    assert str(latest) in err and "trying the one before" in err
    assert lines(copy)[:len(before)] == before
    assert_same(copy, whole)

@pytest.mark.parametrize("stops", [[3], [5], [6], [2, 7], [5, 10], [1, 2, 3]], ids=str)
def test_stopped_and_taken_up_again(launcher, data, whole, tmp_path, stops):
    """Killed after each of these steps, in the middle or at the end of an epoch.

    The result is that of the run that was never stopped, bit for bit, with each step once.
    """
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    begin = 0
    for stop in stops:
        if stop < 10: place = f"pause(training, 'drop_conditions', {stop - begin + 1})"
        else: place = f"pause(report, 'write_report', {2 if begin < 5 else 1})"
        process = launcher.start([*args, "--resume"] if begin else args, place)
        process.waits()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        begin = max(step for step in (0, 2, 4, 5, 6, 8, 10) if step <= stop) # the last save
        assert begin == 0 or newest(tmp_path/"run")["step"] == begin
    if stops[-1] < 10: assert launcher.run([*args, "--resume"]) == (0, "")
    assert_same(tmp_path/"run", whole)

@pytest.mark.parametrize("module", ["train", "sample"])
def test_debug_shows_the_traceback(launcher, data, tmp_path, module):
    "Without `--debug` there is none, even for an error that nobody foresaw."
    (tmp_path/"x.pth").write_bytes(b"")
    if module == "train": args = tiny(data, tmp_path/"run")
    else: args = ["--checkpoint", tmp_path/"x.pth", "--output", tmp_path/"a.png"]
    before = "def fail(*_, **__): raise ZeroDivisionError('nobody foresaw it')\n"
    before += {"train": "config.validation_loss = fail", "sample": "sample.load_model = fail"}[module]
    code, err = launcher.run(args, before, module)
    assert code == 1 and one_error(err, "ZeroDivisionError: nobody foresaw it", "--debug")
    shutil.rmtree(tmp_path/"run", ignore_errors=True)
    code, err = launcher.run([*args, "--debug"], before, module)
    assert code == 1 and "Traceback" in err and "nobody foresaw it" in err

def typed(data, folder, *args):
    "`python -m ddpm_tutorial.run.train`, for one epoch unless told otherwise."
    args = tiny(data, folder, "--epochs", 1, *args)
    return [sys.executable, "-m", "ddpm_tutorial.run.train", *map(str, args)]

GONE = { # what the shell gets for the command line, and variables of its environment
    "head": ("{} | head -1 >/dev/null", {}), "stderr closed": ("{} 2>&-", {}),
    "all closed": ("{} <&- >&- 2>&-", {}), "full disk": ("{} >/dev/full 2>/dev/full", {}),
    "no UTF-8": ("{}", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
}

def with_output_gone(command, how):
    "Runs a command line in a shell, in one of the ways of `GONE`."
    line, variables = GONE[how]
    script = "set -o pipefail; " + line.format(shlex.join(map(str, command)))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **variables})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done

@pytest.mark.parametrize("how", GONE)
def test_the_output_goes_away(tmp_path, how):
    """A pipe that nobody reads, a closed stream, letters that the terminal does not have.

    The run continues, and leaves what it always leaves.
    """
    data = own_images(tmp_path/"own.npz")
    with np.load(data) as file: np.savez(data, **file, classes=np.array([f"日本 {i}" for i in range(10)]))
    done = with_output_gone(typed(data, tmp_path/"rün"), how)
    assert newest(tmp_path/"rün")["step"] == 5
    assert [line["step"] for line in lines(tmp_path/"rün")] == [1, 2, 3, 4, 5, 5]
    assert (tmp_path/"rün"/"report.html").exists() and nothing_half(tmp_path/"rün")
    if how == "no UTF-8": assert "\\u65e5\\u672c 0" in done.stdout

@pytest.mark.parametrize("how", GONE)
def test_the_output_of_an_evaluation_goes_away(tmp_path, how):
    "The result is still written to its file."
    samples, output = own_images(tmp_path/"own.npz"), tmp_path/"found.json"
    command = [sys.executable, "-m", "ddpm_tutorial.run.evaluate", "--samples", samples, "--data", "sample",
               "--output", output]
    with_output_gone(command, how)
    assert output.exists()

def steps_logged(folder):
    "How many steps a run has logged so far."
    if not (folder/"metrics.jsonl").exists(): return 0
    return len([line for line in lines(folder) if "loss" in line])

def test_a_terminal_that_is_closed(data, tmp_path):
    "As when an SSH connection drops: the run saves, and ends with the exit code of SIGHUP."
    pid, terminal = pty.fork()
    if pid == 0:
        command = typed(data, tmp_path/"run", "--epochs", 100_000)
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    os.set_blocking(terminal, False)
    def read_on():
        # without reading, the run would wait for room on the screen
        with contextlib.suppress(BlockingIOError): os.read(terminal, 10_000)
        return steps_logged(tmp_path/"run") > 12
    until(read_on)
    logged, sent = steps_logged(tmp_path/"run"), time.monotonic()
    os.close(terminal)
    found = until(lambda: os.waitpid(pid, os.WNOHANG)[1], 20)
    assert os.waitstatus_to_exitcode(found) == 129 and time.monotonic() - sent < 10
    assert load_latest(tmp_path/"run"/"checkpoints")[1]["step"] >= logged > 12

def test_nohup(launcher, data, whole, tmp_path):
    "Where SIGHUP is ignored, it stays ignored, and the run continues."
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = launcher.start(tiny(data, tmp_path/"run", "--epochs", 2),
                             ignore + "pause(training, 'diffusion_loss', 4)")
    process.waits()
    send(process, signal.SIGHUP, True)
    assert process.wait() == 0
    assert_same(tmp_path/"run", whole)

def test_sighup_twice(launcher, data, tmp_path):
    "A terminal may send it twice, and nobody waits for the run: the save is not cut short."
    process = launcher.start(tiny(data, tmp_path/"run"), "pause(training, 'diffusion_loss', 4)")
    process.waits()
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(0.6) is None
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(0.3) is None
    process.go()
    assert process.wait(10) == 129 and newest(tmp_path/"run")["step"] == 4

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_as_typed(data, tmp_path, number):
    """`python -m ddpm_tutorial.run.train` in its own process group, without any trick.

    The signal comes after some steps.
    """
    command = typed(data, tmp_path/"run", "--epochs", 100_000)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    until(lambda: steps_logged(tmp_path/"run") > 12 or process.poll() is not None)
    logged, sent = steps_logged(tmp_path/"run"), time.monotonic()
    os.killpg(process.pid, number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in err, err
    assert time.monotonic() - sent < 10
    assert load_latest(tmp_path/"run"/"checkpoints")[1]["step"] >= logged > 12
