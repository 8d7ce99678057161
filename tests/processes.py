"""Starts the package's commands as real processes that tests can hit with signals and limits.

Each process is forked from one that has imported torch already.
"""
import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

import ddpm_tutorial
from ddpm_tutorial.run.checkpoint import iter_tensors, load_checkpoint
from ddpm_tutorial.run.tracking import read_metrics

TIMES = {"seconds", "images_per_second", "memory_mib"} # these differ between two equal runs

def own_images(path, n=40):
    "An .npz of noise: 36 images to train on, five batches of eight."
    images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(n) % 10)
    return path

def tiny(data, folder, *args):
    "A command line: a tiny network that saves every two steps, and validates and samples after each epoch."
    return ["--config", "tiny", "--data", data, "--base_channels", 16, "--channel_multipliers", 1, 1,
            "--patch_size", 4, "--num_groups", 8, "--head_dim", 16, "--attention_resolutions",
            "--batch_size", 8, "--num_inference_steps", 2, "--device", "cpu", "--precision", "fp32",
            "--no-wandb", "--log_every", 1, "--save_every", 2, "--sample_every", 1,
            "--output_dir", folder, *args]

def lines(folder):
    "The metrics that a run has written, without times, and without the lines that note a start."
    return [{name: value for name, value in line.items() if name not in TIMES}
            for line in read_metrics(folder) if "started" not in line]

def same_tensors(one, other):
    "All tensors are the same in both, to the last bit."
    return all(torch.equal(a, b) for a, b in zip(iter_tensors(one), iter_tensors(other), strict=True))

def newest(folder): return load_checkpoint(folder/"checkpoints"/"latest.pth")

def assert_same(folder, other):
    "Two runs have equal weights, averages and optimizer, to the last bit, and equal progress and metrics."
    one, two = newest(folder), newest(other)
    assert one["step"] == two["step"] and one["config"] == two["config"]
    assert same_tensors(one, two)
    assert {**one["progress"], "seconds": 0} == {**two["progress"], "seconds": 0}
    assert lines(folder) == lines(other)

def until(condition, seconds=60):
    "Waits until the condition holds. Fails if it does not within these seconds."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.01)
    return found

@dataclass
class Process:
    "A command that runs, as the leader of its own process group."
    pid: int
    folder: Path # for what it prints, and for the files of `pause`
    launcher: "Launcher"

    @property
    def err(self): return (self.folder/"err").read_text()

    def waits(self):
        "Waits until the process stops where `pause` holds it."
        until(lambda: (self.folder/"waits").exists() or self.wait(0) is not None)
        assert (self.folder/"waits").exists(), f"it ended before it was held: {self.err}"

    def go(self): (self.folder/"go").touch()

    def wait(self, seconds=60):
        "Its exit code. A negative one is the signal that ended it. None: it has not ended."
        return self.launcher.ask({"wait": self.pid, "seconds": seconds})

class Launcher:
    "Use it as `with Launcher(folder) as launcher:`. At its end it kills every process that still runs."
    def __init__(self, folder): self.folder, self.count = folder, 0

    def __enter__(self):
        path = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, start_new_session=True) # Ctrl-C is for pytest
        return self

    def __exit__(self, *_):
        self.server.stdin.close() # then it kills what it has started
        self.server.wait(20)

    def ask(self, request):
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, args, before="", module="train"):
        "Starts `ddpm_train` or `ddpm_sample`. The code in `before` runs first and may change the command."
        self.count += 1
        (folder := self.folder/f"process_{self.count}").mkdir()
        request = {"args": [f"ddpm_{module}", *map(str, args)], "module": module, "before": before,
                   "folder": str(folder)}
        return Process(self.ask(request), folder, self)

    def run(self, args, before="", module="train", seconds=60):
        "Runs a command to its end. Returns its exit code and what it printed on stderr."
        process = self.start(args, before, module)
        return process.wait(seconds), process.err

def serve():
    """Forks at each request, and answers with process ids and exit codes.

    In the forked process it returns the request.
    """
    running, codes = set(), {}
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            pid, end = request["wait"], time.monotonic() + request["seconds"]
            while pid in running:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    running.remove(pid)
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() >= end: break
                else: time.sleep(0.005)
            answer = codes.get(pid)
        else:
            answer = os.fork()
            if answer == 0: return request
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running: os.kill(pid, signal.SIGKILL)

def redirect(folder):
    "Nothing comes in on stdin. What goes to stdout and stderr lands in two files."
    for number, name in enumerate(("nothing", "out", "err")):
        if name == "nothing": file = os.open(os.devnull, os.O_RDONLY)
        else: file = os.open(folder/name, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)

def become(request):
    """Runs the command as typed in a forked process, and then does what the interpreter does at its exit.

    Only taking torch apart is left out, because that takes a second.
    """
    os.setsid()
    folder = Path(request["folder"])
    redirect(folder)
    package = Path(ddpm_tutorial.__file__).parent
    files = [path.relative_to(package.parent) for path in package.glob("**/[a-z]*.py")]
    names = [".".join(path.with_suffix("").parts) for path in files]
    modules = {name.rpartition(".")[2]: import_module(name) for name in names}
    def wait():
        (folder/"waits").touch()
        while not (folder/"go").exists(): time.sleep(0.01)
    def pause(place, name, call=1, hold=wait):
        "Call number `call` of a function waits until the test lets it continue."
        original, calls = getattr(place, name), iter(range(1, 10**9))
        def paused(*args, **kwargs):
            if next(calls) == call: hold()
            return original(*args, **kwargs)
        setattr(place, name, paused)
    modules["report"].draw_curves = lambda rows: "<svg/>" # drawing takes half of the time of such a short run
    # the code may use the package's modules by their names
    exec(request["before"], {**globals(), **locals(), **modules})
    sys.argv = request["args"]
    try:
        getattr(modules[request["module"]], request["args"][0])()
        code = 0
    except SystemExit as stop: code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown() # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

if __name__ == "__main__":
    import matplotlib.figure  # noqa: F401  imported here, so that the forked processes need not
    import torch._dynamo  # noqa: F401

    from ddpm_tutorial.run import sample, train  # noqa: F401
    gc.freeze()
    if request := serve(): become(request)
