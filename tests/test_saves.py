"""What a run has saved stays saved.

Kills at any moment, disks that refuse to write, bytes that change, files that want to run code.
"""
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import same_tensors

from ddpm_tutorial.run.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    load_checkpoint,
    load_latest,
    load_model,
    restore,
    save_checkpoint,
    save_run,
)
from ddpm_tutorial.run.config import PRESETS
from ddpm_tutorial.run.device import new_model
from ddpm_tutorial.run.files import remove_partial_files, write_atomic
from ddpm_tutorial.run.tracking import Tracker, read_metrics
from ddpm_tutorial.training import new_state
from ddpm_tutorial.unet import UNetConfig

NETWORK = UNetConfig(base_channels=8, channel_multipliers=(1, 1), patch_size=4, attention_resolutions=(),
                     head_dim=8, num_groups=4)
CONFIG = replace(PRESETS["tiny"], model=NETWORK)

def fresh_state():
    "A training state whose optimizer has taken a step."
    state = new_state(new_model(CONFIG), CONFIG.train)
    for weight in state.model.parameters(): weight.grad = torch.full_like(weight, 0.5)
    state.optimizer.step()
    return state

@pytest.fixture
def checkpoint(tmp_path):
    "The path of a whole checkpoint."
    save_checkpoint(tmp_path/"good.pth", fresh_state(), CONFIG, {"best_loss": 0.5})
    return tmp_path/"good.pth"

def python(program, *args, **variables):
    "Runs a program in its own process."
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **variables})

def test_killed_at_any_moment(tmp_path):
    """A run that saves at every step is killed 50 times (`make soak`: 200 times).

    No checkpoint is lost, and the end is the same as without any kill.
    """
    kills = os.environ.get("DDPM_KILLS", "50")
    command = [sys.executable, Path(__file__).parent/"kills.py", kills, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found) # `make soak` shows it
    assert found["kills"] == int(kills) and found["in_a_save"] >= int(kills)//20
    assert found["step_at_last_kill"] < found["steps"]
    assert found["lost"] == 0 and found["same_weights"] and found["same_metrics"] and found["left_over"] == 0

LIMITED = """
import resource, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_saves import CONFIG, fresh_state
from ddpm_tutorial.run.checkpoint import CheckpointError, load_latest, save_run
folder, state = Path(sys.argv[1]), fresh_state()
def limit(size): # the kernel refuses every byte beyond it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
state.step = 1
save_run(folder, state, CONFIG, {})
def files(): return {path.name: path.read_bytes() for path in folder.iterdir()}
before, state.step = files(), 2
size = len(before["latest.pth"])
for n in [0, 1, *range(97, size, 2003), size - 1]:
    limit(n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = save_run(folder, state, CONFIG, {})
    try: save_run(folder, state, CONFIG, {}, must=True)
    except CheckpointError as error: message = str(error)
    limit(resource.RLIM_INFINITY)
    assert not saved and len(caught) == 1
    assert "step 2 could not be saved" in str(caught[0].message) and "make room" in message
    assert files() == before, n
assert save_run(folder, state, CONFIG, {}) and load_latest(folder)[1]["step"] == 2 # now there is room again
print(n)
"""

def test_a_disk_that_refuses_at_every_nth_byte(tmp_path):
    """The old files stay byte for byte, and nothing else is left.

    A periodic save warns, a final one raises an error. With room again, the next save works as usual.
    """
    done = python(LIMITED, tmp_path, Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (tmp_path/"latest.pth").stat().st_size - 1

FULL = """
import resource, sys
from ddpm_tutorial.run import train
first_refused, room_again = map(int, sys.argv[2:4])
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
original = train.timed
def timed(steps):
    for record, seconds in original(steps):
        if record.step == first_refused: limit(500)
        if record.step == room_again: limit(resource.RLIM_INFINITY)
        yield record, seconds
train.timed = timed
sys.argv = ["ddpm_train", "--config", "tiny", "--data", "sample", "--max_steps", "8", "--batch_size", "8",
            "--num_inference_steps", "2", "--device", "cpu", "--no-wandb", "--save_every", "2",
            "--log_every", "1", "--output_dir", sys.argv[1], *sys.argv[4:]]
train.ddpm_train()
"""

def test_a_run_on_a_full_disk_goes_on(tmp_path):
    "The disk is full from step 3 to 6: two saves warn, the run ends well, and the metrics are complete."
    done = python(FULL, tmp_path/"run", 3, 7)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    unsaved = [line.split(" could")[0] for line in warned if "could not be saved" in line]
    assert unsaved == ["warning: step 4", "warning: step 6"]
    assert any("metrics.jsonl" in line for line in warned) and "Traceback" not in done.stderr
    written = [json.loads(line) for line in (tmp_path/"run"/"metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert load_latest(tmp_path/"run"/"checkpoints")[1]["step"] == 8
    assert (tmp_path/"run"/"report.html").exists()

def test_a_run_that_ends_on_a_full_disk_fails(tmp_path):
    """The last save fails: exit code 1, one line, and the checkpoint of step 4 is whole.

    With room again, `--resume` completes the run.
    """
    done = python(FULL, tmp_path/"run", 5, 99)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr
    assert "step 8 could not be saved" in errors[0] and "--resume" in errors[0]
    assert load_latest(tmp_path/"run"/"checkpoints")[1]["step"] == 4
    done = python(FULL, tmp_path/"run", 99, 99, "--resume")
    assert done.returncode == 0 and load_latest(tmp_path/"run"/"checkpoints")[1]["step"] == 8

def test_cut_and_damaged_lines(tmp_path):
    """A line that a kill has cut is dropped without a word, a damaged line with a warning.

    What is written next starts on its own line.
    """
    for content, warns in ((b'{"step": 1}\n{"step": 2, "lo', 0),
                           (b'{"step": 1}\n\x00\x00\xff\n{"step": 3}\n', 1),
                           (b'[1]\n{"step": 1}\n', 1)):
        (tmp_path/"metrics.jsonl").write_bytes(content)
        def keep(line): return line["step"] <= 2
        with warnings.catch_warnings(record=True) as caught, Tracker(tmp_path, keep=keep) as tracker:
            warnings.simplefilter("always")
            tracker.log(2, loss=0.5)
        assert len(caught) == warns and read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": 0.5}]

def test_an_error_or_ctrl_c_inside_of_a_write(tmp_path):
    "Whatever is raised, the old file stays, and there is no other."
    path = tmp_path/"file"
    write_atomic(path, lambda file: file.write(b"old"))
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()):
        def write(file):
            file.write(b"new")
            raise error
        with pytest.raises(type(error)): write_atomic(path, write)
        assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"

def test_damage_at_random_places(checkpoint):
    """A flipped bit, a run of zeros or a missing tail.

    Either an error names the file, or the values are the same to the last bit.
    """
    good, values = checkpoint.read_bytes(), load_checkpoint(checkpoint)
    dice, found = random.Random(0), {"refused": 0, "same": 0}
    bad = checkpoint.with_name("bad.pth")
    for attempt in range(300):
        at, content = dice.randrange(len(good)), bytearray(good)
        if attempt % 3 == 0: content[at] ^= 1 << dice.randrange(8)
        if attempt % 3 == 1: content[at:at + 512] = bytes(len(content[at:at + 512]))
        if attempt % 3 == 2: content = content[:at]
        bad.write_bytes(content)
        try: loaded = load_checkpoint(bad)
        except DamagedCheckpoint as error:
            assert str(bad) in str(error) and "\n" not in str(error)
            found["refused"] += 1
        else:
            assert attempt % 3 != 2
            assert loaded["config"] == values["config"] and loaded["progress"] == values["progress"]
            assert same_tensors(loaded, values)
            found["same"] += 1
    assert found["refused"] > 200

@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>404</html>", bytes(5000),
                                     pickle.dumps({"format": 2})],
                         ids=["empty", "start", "html", "zeros", "pickle"])
def test_no_checkpoint(tmp_path, content):
    "One error gives the path and the reason."
    (tmp_path/"x.pth").write_bytes(content)
    for load in (load_checkpoint, load_model):
        with pytest.raises(DamagedCheckpoint, match="x.pth is damaged or no checkpoint"):
            load(tmp_path/"x.pth")

class Trap:
    "A pickle that creates a folder when it is read."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle", "in a good one"])
def test_code_in_a_checkpoint_does_not_run(checkpoint, tmp_path, how):
    "The checkpoint is refused, and its code has not run."
    trap, path = Trap(tmp_path/"trapped"), tmp_path/"trap.pth"
    if how.startswith("torch"):
        torch.save({"format": 2, "model": trap}, path, _use_new_zipfile_serialization=how == "torch")
    elif how == "pickle": path.write_bytes(pickle.dumps(trap))
    else:
        # a good archive, with correct checksums, but with another pickle in it
        trapped = pickle.dumps(trap, protocol=2)
        with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, trapped if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(DamagedCheckpoint, match="trap.pth"): load_checkpoint(path)
    assert not (tmp_path/"trapped").exists()
    pickle.loads(pickle.dumps(trap)) # the trap does work when it is read like this
    assert (tmp_path/"trapped").exists()

def altered(checkpoint, **changes):
    "A copy with some values changed."
    values = torch.load(checkpoint, weights_only=True)
    torch.save({**values, **changes}, checkpoint.with_name("altered.pth"))
    return checkpoint.with_name("altered.pth")

def test_another_format_is_no_damage(checkpoint):
    """The error names a newer or older version.

    `load_latest` does not quietly take an older checkpoint instead.
    """
    for number, says in ((99, "newer version"), (1, "older version")):
        path = altered(checkpoint, format=number)
        with pytest.raises(CheckpointError, match=says) as raised: load_checkpoint(path)
        assert not isinstance(raised.value, DamagedCheckpoint)
        path.replace(path.with_name("latest.pth"))
        checkpoint.with_name("step_00000001.pth").write_bytes(checkpoint.read_bytes())
        with pytest.raises(CheckpointError, match=says): load_latest(checkpoint.parent)

def test_the_optimizer_remembers_in_the_order_of_the_weights(tmp_path):
    """A checkpoint from a GPU has another memory format than a network on the CPU.

    The fused AdamW would take each number for its neighbour's, without any error.
    """
    config = replace(CONFIG, model=replace(NETWORK, base_channels=16, num_groups=1))
    def state(): return new_state(new_model(config), config.train)
    def step(state):
        for number, weight in enumerate(state.model.parameters()):
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.grad = torch.empty_like(weight).copy_(drawn)
        state.optimizer.step()
    ours, other = state(), state()
    assert any(not weight.is_contiguous() for weight in ours.model.parameters())
    step(ours)
    save_checkpoint(tmp_path/"gpu.pth", ours, config, {})
    checkpoint = load_checkpoint(tmp_path/"gpu.pth")
    for memory in checkpoint["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"): memory[name] = memory[name].contiguous()
    restore(other, checkpoint)
    step(ours)
    step(other)
    for a, b in zip(ours.model.parameters(), other.model.parameters()): assert torch.equal(a, b)

def test_nothing_that_is_no_number_is_saved(tmp_path):
    "NaN or infinity in a weight, in an average or in the optimizer's memory: the older file stays."
    def a_weight(state): return next(state.model.parameters())
    def an_average(state): return next(state.ema.parameters())
    def a_memory(state): return next(iter(state.optimizer.state.values()))["exp_avg_sq"]
    for spoil in (a_weight, an_average, a_memory):
        for value in (float("nan"), float("inf")):
            state = fresh_state()
            save_run(tmp_path, state, CONFIG, {})
            before = (tmp_path/"latest.pth").read_bytes()
            with torch.no_grad(): spoil(state).view(-1)[3] = value
            with pytest.raises(FloatingPointError, match="not saved"): save_run(tmp_path, state, CONFIG, {})
            assert (tmp_path/"latest.pth").read_bytes() == before

def test_the_last_few_and_the_best_are_kept(tmp_path):
    "The last three, the newest and the best are kept. Several names of one save share one file."
    state = fresh_state()
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False), (6, False)):
        state.step = step
        assert save_run(tmp_path, state, CONFIG, {}, is_best=best)
    names = ["best_model.pth", "latest.pth", *(f"step_{step:08}.pth" for step in (4, 5, 6))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert load_checkpoint(tmp_path/"best_model.pth")["step"] == 3
    assert os.path.samefile(tmp_path/"latest.pth", tmp_path/"step_00000006.pth")

def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    "Without hard links, the names are copies."
    def refuse(*_): raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    assert save_run(tmp_path, fresh_state(), CONFIG, {}, is_best=True)
    names = ["best_model.pth", "latest.pth", "step_00000000.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(load_checkpoint(path)["step"] == 0 for path in tmp_path.iterdir())

def test_the_newest_whole_one_is_taken(tmp_path):
    "However many are damaged, each is named. If all are damaged, the error says so."
    state = fresh_state()
    for state.step in (1, 2, 3): save_run(tmp_path, state, CONFIG, {}, is_best=state.step == 1)
    for name, step in (("latest.pth", 2), ("step_00000002.pth", 1)):
        (tmp_path/name).write_bytes((tmp_path/name).read_bytes()[:-100])
        with pytest.warns(UserWarning, match="damaged") as caught: latest = load_latest(tmp_path)
        assert latest[1]["step"] == step
        assert len(caught) == {2: 1, 1: 2}[step] # a file with two names is tried once
    (tmp_path/"step_00000001.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"), pytest.warns(UserWarning):
        load_latest(tmp_path)

def test_leftovers_are_swept(tmp_path):
    "The next start removes half-written files of the run, and no others."
    for folder in ("checkpoints", "samples"): (tmp_path/folder).mkdir()
    for name in ("checkpoints/latest.pth.partial", "samples/epoch_001.png.partial", "config.json.partial",
                 "film.partial", "samples/grid.png.partial", "checkpoints/latest.pth"):
        (tmp_path/name).write_bytes(b"x")
    remove_partial_files(tmp_path)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"film.partial", "grid.png.partial", "latest.pth"}
