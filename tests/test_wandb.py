"""Weights & Biases may be slow, silent, gone or not installed.

The run still starts, continues and ends, with one warning at most and every line in its own file.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_server import WandbServer

from ddpm_tutorial.run.tracking import Tracker, read_metrics

RUN = """
import sys, time
from pathlib import Path
from ddpm_tutorial.run import train
steps, folder = train.timed, Path(sys.argv[1])
def timed(iterator):
    for record, seconds in steps(iterator):
        if record.step == 3: # now the test does something
            (folder.parent/"waits").touch()
            while (folder.parent/"waits").exists(): time.sleep(0.05)
        yield record, seconds
train.timed = timed
sys.argv = ["ddpm_train", "--config", "tiny", "--data", "sample", "--max_steps", "6", "--batch_size", "8",
            "--num_inference_steps", "2", "--device", "cpu", "--log_every", "1", "--no-lr_decay",
            "--output_dir", str(folder), *sys.argv[2:]]
train.ddpm_train()
"""

def run(folder, *args, between=lambda process: None, before="", **variables):
    """A run in its own process. `between` is called while the run is at step 3.

    Returns the process, the seconds to the first step and the seconds after the last.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(folder.parent), "NETRC": str(folder.parent/"netrc"),
                    "WANDB_CACHE_DIR": str(folder.parent/"cache"), **variables}
    folder.parent.mkdir(exist_ok=True)
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", before + RUN, str(folder), *args], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waits = folder.parent/"waits"
    while not waits.exists() and process.poll() is None: time.sleep(0.05)
    started = time.monotonic() - begin
    between(process)
    waits.unlink(missing_ok=True)
    process.out, process.err = process.communicate(timeout=120)
    report = folder/"report.html"
    ended = time.time() - report.stat().st_mtime if report.exists() else None
    return process, started, ended

def warned(process): return [line for line in process.err.splitlines() if line.startswith("warning: ")]

def complete(folder):
    "Every step is in the run's own file."
    steps = [line["step"] for line in read_metrics(folder) if "loss" in line]
    return steps == [1, 2, 3, 4, 5, 6] and "validation_loss" in read_metrics(folder)[-1]

@pytest.fixture
def server():
    with WandbServer() as server: yield server

def test_online(server, tmp_path):
    """The server gets every step, under the entity that W&B's own variable names.

    A run that continues keeps its id and sends no step twice.
    """
    folder = tmp_path/"run"
    process, _, _ = run(folder, "--max_steps", "4", WANDB_ENTITY="teamx", **server.environment)
    assert process.returncode == 0 and not warned(process) and "Traceback" not in process.err, process.err
    (name, first), = server.runs.items()
    assert first.entity == "teamx" and first.project == "diffusion-fashionmnist"
    assert first.name == "run" and not first.resumed
    process, _, _ = run(folder, "--resume", WANDB_ENTITY="teamx", **server.environment)
    assert process.returncode == 0 and not warned(process), process.err
    assert list(server.runs) == [name] and server.runs[name].resumed and server.runs[name].exit_code == 0
    sent = [line["_step"] for line in server.runs[name].history if "loss" in line]
    assert sent == [1, 2, 3, 4, 5, 6] and complete(folder)

def test_the_variables_of_wandb_overrule(server, tmp_path):
    """`WANDB_PROJECT`, `WANDB_NAME`, `WANDB_RUN_ID` and `WANDB_DIR`.

    A `~` in the last becomes the home folder.
    """
    process, _, _ = run(tmp_path/"run", WANDB_PROJECT="mine", WANDB_NAME="night", WANDB_RUN_ID="abc123",
                        WANDB_DIR="~/tracked", **server.environment)
    assert process.returncode == 0 and not warned(process), process.err
    (name, sent), = server.runs.items()
    assert sent.project == "mine" and sent.name == "night" and name == "abc123"
    assert list((tmp_path/"tracked").rglob("*.wandb")) and not list((tmp_path/"run").rglob("*.wandb"))
    assert complete(tmp_path/"run")

@pytest.mark.parametrize("trouble", ["silent", "errors", "gone"])
def test_a_server_that_is_not_there(server, tmp_path, trouble):
    "If it is missing from the start, there is one warning, and the run is tracked offline."
    if trouble == "gone": server.stop()
    else: server.mode = trouble
    process, started, _ = run(tmp_path/"run", **server.environment)
    assert process.returncode == 0 and len(warned(process)) == 1, process.err
    assert "W&B cannot be reached" in process.err and "Traceback" not in process.err, process.err
    assert complete(tmp_path/"run") and list((tmp_path/"run"/"wandb").glob("offline-run-*"))
    assert started < 40 # about 7 s of waiting, and the imports

@pytest.mark.parametrize("trouble", ["silent", "gone", "killed"])
def test_a_server_that_leaves_in_mid_run(server, tmp_path, trouble):
    "The run continues. At the end there is one warning, and the end is not delayed for long."
    def between(process):
        if trouble == "killed":
            subprocess.run(["pkill", "-9", "-P", str(process.pid), "-f", "wandb-core"], check=True)
        elif trouble == "gone": server.stop()
        else: server.mode = trouble
    process, _, ended = run(tmp_path/"run", between=between, **server.environment)
    assert process.returncode == 0 and len(warned(process)) == 1, process.err
    assert "metrics.jsonl has it all" in process.err and "Traceback" not in process.err, process.err
    assert complete(tmp_path/"run") and ended < 20 # 10 s, and a slow machine

def test_without_a_key(tmp_path):
    "The run is tracked offline, without a warning. A resume keeps its id."
    folder = tmp_path/"run"
    for args in (["--max_steps", "4"], ["--resume"]):
        process, _, _ = run(folder, *args)
        assert process.returncode == 0 and not warned(process), process.err
    runs = [path.name.rpartition("-")[2] for path in (folder/"wandb").glob("offline-run-*")]
    assert len(runs) == 2 and set(runs) == {(folder/"wandb"/"run_id").read_text()} and complete(folder)

def test_no_step_is_sent_twice(tmp_path):
    """A run was killed at step 5 and continues from step 3: W&B gets only what is new.

    The run's own file has every step once.
    """
    class Sent(list):
        def log(self, values, step): self.append(step)
        def finish(self, exit_code): pass
    with Tracker(tmp_path) as tracker:
        for step in (1, 2, 3, 4, 5): tracker.log(step, loss=0.5)
    sent = Sent()
    with Tracker(tmp_path, sent, lambda line: line["step"] <= 3) as tracker:
        for step in (4, 5, 6, 6): tracker.log(step, loss=0.5)
    assert sent == [6, 6] and [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 6]

def test_not_installed(tmp_path):
    "There is one warning."
    process, _, _ = run(tmp_path/"run", before="import sys; sys.modules['wandb'] = None\n")
    assert process.returncode == 0 and len(warned(process)) == 1, process.err
    assert "no W&B for this run" in process.err and complete(tmp_path/"run"), process.err

def test_disabled(tmp_path):
    "`WANDB_MODE=disabled` leaves nothing of W&B's."
    process, _, _ = run(tmp_path/"run", WANDB_MODE="disabled")
    assert process.returncode == 0 and not warned(process), process.err
    assert not list((tmp_path/"run").rglob("*.wandb")) and complete(tmp_path/"run")

def test_the_lesson_says_how_to_use_the_compose_file():
    "`docker-compose.yml` puts W&B's server on port 8080, and lesson 12 shows the two lines that it names."
    root = Path(__file__).parent.parent
    compose, lesson = (root/"docker-compose.yml").read_text(), (root/"nbs"/"12_tracking.ipynb").read_text()
    commands = [line.removeprefix("#").strip() for line in compose.splitlines() if line.startswith("#   ")]
    assert '"8080:8080"' in compose and len(commands) == 2 and "http://localhost:8080" in commands[1]
    assert all(command in lesson for command in commands)
