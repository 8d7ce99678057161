"""Starts the package's commands as real processes, to be hit by signals and limits. Each is a fork of one that has imported torch."""
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
from ddpm_tutorial.run.checkpoint import load_checkpoint, iter_tensors
from ddpm_tutorial.run.tracking import read_metrics

TIMES = {"seconds", "images_per_second", "memory_mib"} # what differs between two equal runs

def own_images(path, n=40):
    "An .npz of noise: 36 images to train on, five batches of eight."
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8), labels=np.arange(n) % 10)
    return path

def tiny(data, folder, *args):
    "A command line: a dwarf of a network; a save at every second step, and at the end of an epoch validation and samples."
    return ["--config", "tiny", "--data", data, "--base_channels", 16, "--channel_multipliers", 1, 1, "--patch_size", 4, "--num_groups", 8,
            "--head_dim", 16, "--attention_resolutions", "--batch_size", 8, "--num_inference_steps", 2, "--device", "cpu", "--precision", "fp32",
            "--no-wandb", "--log_every", 1, "--save_every", 2, "--sample_every", 1, "--output_dir", folder, *args]

def lines(folder):
    "What a run has written down, without times and starts."
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder) if "started" not in line]

def same_tensors(one, other):
    "All tensors in both, to the last bit."
    return all(torch.equal(a, b) for a, b in zip(iter_tensors(one), iter_tensors(other), strict=True))

def newest(folder): return load_checkpoint(folder/"checkpoints"/"latest.pth")

def assert_same(folder, other):
    "Weights, averages and optimizer to the last bit, progress, and each line of the metrics."
    one, two = newest(folder), newest(other)
    assert one["step"] == two["step"] and one["config"] == two["config"]
    assert same_tensors(one, two)
    assert {**one["progress"], "seconds": 0} == {**two["progress"], "seconds": 0} and lines(folder) == lines(other)

def until(condition, seconds=60):
    "Waits for what must come."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "what the test waits for did not come"
        time.sleep(0.01)
    return found

@dataclass
class Process:
    "A command that runs, as the leader of a group of its own."
    pid: int
    folder: Path # for what it prints, and for the files of `pause`
    launcher: "Launcher"

    @property
    def err(self): return (self.folder/"err").read_text()

    def waits(self):
        "Until it is where `pause` holds it."
        until(lambda: (self.folder/"waits").exists() or self.wait(0) is not None)
        assert (self.folder/"waits").exists(), f"it ended before: {self.err}"

    def go(self): (self.folder/"go").touch()

    def wait(self, seconds=60): # its exit code; negative: the signal that ended it; None: it has not ended
        return self.launcher.ask({"wait": self.pid, "seconds": seconds})

class Launcher:
    "`with Launcher(folder) as launcher:` ends what still runs."
    def __init__(self, folder): self.folder, self.count = folder, 0

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                                       start_new_session=True) # Ctrl-C is for pytest
        return self

    def __exit__(self, *_):
        self.server.stdin.close() # it kills what it has started
        self.server.wait(20)

    def ask(self, request):
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, args, before="", module="train"):
        "Starts `ddpm_train` or `ddpm_sample`, after the code `before`, which may change it."
        self.count += 1
        (folder := self.folder/f"process_{self.count}").mkdir()
        request = {"args": [f"ddpm_{module}", *map(str, args)], "module": module, "before": before, "folder": str(folder)}
        return Process(self.ask(request), folder, self)

    def run(self, args, before="", module="train", seconds=60):
        "To its end. Returns exit code and what it said on stderr."
        process = self.start(args, before, module)
        return process.wait(seconds), process.err

def serve():
    "Forks at each request, and answers with process ids and exit codes. In a fork it returns the request."
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

def become(request):
    "What a fork does: the command as typed, and what the interpreter does at its exit, but for taking torch apart, which takes a second."
    os.setsid()
    for number, name in enumerate(("nothing", "out", "err")):
        file = os.open(os.devnull, os.O_RDONLY) if name == "nothing" else os.open(Path(request["folder"])/name, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    package = Path(ddpm_tutorial.__file__).parent
    names = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.glob("**/[a-z]*.py")]
    modules = {name.rpartition(".")[2]: import_module(name) for name in names}
    def wait():
        (Path(request["folder"])/"waits").touch()
        while not (Path(request["folder"])/"go").exists(): time.sleep(0.01)
    def pause(place, name, call=1, hold=wait):
        "Call number `call` of a function waits, until the test lets it go on."
        original, calls = getattr(place, name), iter(range(1, 10**9))
        def paused(*args, **kwargs):
            if next(calls) == call: hold()
            return original(*args, **kwargs)
        setattr(place, name, paused)
    folder = Path(request["folder"])
    modules["report"].draw_curves = lambda rows: "<svg/>" # half of the time of so short a run
    exec(request["before"], {**globals(), **locals(), **modules}) # it may use all modules of the package by their names
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
    import matplotlib.figure # noqa: F401  imported here, the forks have them for nothing
    import torch._dynamo # noqa: F401

    from ddpm_tutorial.run import sample, train # noqa: F401
    gc.freeze()
    if request := serve(): become(request)
