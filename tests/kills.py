"""Kills a run that saves at every step, again and again, at random moments, and looks at what is left.

usage: OMP_NUM_THREADS=1 python tests/kills.py KILLS FOLDER

Prints a line of JSON.
"""
import json
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.figure  # noqa: F401  this import and the next take seconds; the forks need not repeat them
import torch._dynamo  # noqa: F401
from processes import lines, newest, same_tensors

from ddpm_tutorial.run import train as product
from ddpm_tutorial.run.checkpoint import load_checkpoint, load_latest
from ddpm_tutorial.run.config import PRESETS, SamplingConfig
from ddpm_tutorial.unet import UNetConfig

STEPS = 8 # for each kill; a process is killed before it has taken this many

def options(folder, steps):
    "A tiny network, a validation and a picture now and then, a save at every step."
    network = UNetConfig(base_channels=16, channel_multipliers=(1, 1), patch_size=4, attention_resolutions=(),
                         num_groups=8, head_dim=16)
    settings = replace(PRESETS["tiny"], model=network, data="sample",
                       sampling=SamplingConfig(num_inference_steps=1))
    settings = replace(settings, train=replace(settings.train, epochs=1000, max_steps=steps, batch_size=16))
    resume = (folder/"checkpoints"/"latest.pth").exists()
    return product.TrainOptions(config="tiny", settings=settings, output_dir=folder, wandb=False,
                                save_every=1, log_every=1, sample_every=3, device="cpu", precision="fp32",
                                resume=resume)

def start(folder, steps):
    "Forks a run, so that it does not have to import torch again."
    if child := os.fork(): return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    original, sync, rename = product.save_run, os.fsync, os.replace
    def slow_sync(file): # as on a slow disk: more kills fall into a save
        time.sleep(0.01)
        sync(file)
    def slow_rename(*names):
        time.sleep(0.003)
        rename(*names)
    os.fsync, os.replace = slow_sync, slow_rename
    def save_run(folder, state, *args, **kwargs):
        saved = original(folder, state, *args, **kwargs)
        if saved: (folder.parent/"saved").write_text(str(state.step)) # from now on this step must not be lost
        return saved
    product.save_run = save_run
    code = 1
    try:
        product.train(options(folder, steps))
        code = 0
    finally: os._exit(code)

def finish(folder, steps):
    "Runs to the end, from the beginning or from where it was killed."
    assert os.waitpid(start(folder, steps), 0)[1] == 0, "the run did not end well"

def main(kills, folder):
    warnings.simplefilter("error") # a damaged checkpoint must never be seen
    steps, dice, broken = kills*STEPS, random.Random(0), folder/"broken"
    begin = time.perf_counter()
    finish(folder/"unbroken", steps)
    a_step = (time.perf_counter() - begin)/steps
    def metrics_size():
        file = broken/"metrics.jsonl"
        return file.stat().st_size if file.exists() else 0
    def last_saved():
        file = broken/"saved"
        return int(file.read_text() or 0) if file.exists() else 0
    reached, half, lost = 0, 0, 0
    for _ in range(kills):
        child, deadline = start(broken, steps), time.monotonic() + 60
        lifetime = dice.uniform(0, 0.8*STEPS*a_step)
        before = metrics_size()
        # until it takes steps
        while metrics_size() == before and time.monotonic() < deadline: time.sleep(0.001)
        end = time.monotonic() + lifetime
        # never so far that the run ends before the last kill
        while time.monotonic() < end and last_saved() < reached + STEPS - 2: time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before it was killed"
        half += any((broken/"checkpoints").glob("*.partial"))
        for path in (broken/"checkpoints").glob("*.pth"): load_checkpoint(path)
        latest = (broken/"checkpoints"/"latest.pth").exists()
        step = load_latest(broken/"checkpoints")[1]["step"] if latest else 0
        lost += step < max(reached, last_saved())
        reached = step
    finish(broken, steps)
    one, other = newest(folder/"unbroken"), newest(broken)
    print(json.dumps({
        "kills": kills, "in_a_save": half, "lost": lost, "steps": steps, "step_at_last_kill": reached,
        "same_weights": one["step"] == other["step"] and same_tensors(one, other),
        "same_metrics": lines(folder/"unbroken") == lines(broken),
        "left_over": len(list(broken.rglob("*.partial")))}))

if __name__ == "__main__": main(int(sys.argv[1]), Path(sys.argv[2]))
