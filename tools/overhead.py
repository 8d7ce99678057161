"""What does a run spend on everything but training? Noting, logging, Weights & Biases (offline), saving and
the report, each as a share of the time of all steps.

usage: python tools/overhead.py [preset]      default: small

Takes about two minutes. Nothing else should run meanwhile.
"""
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ddpm_tutorial.data import load_sample
from ddpm_tutorial.run.checkpoint import save_run
from ddpm_tutorial.run.config import PRESETS
from ddpm_tutorial.run.device import choose_precision, new_model
from ddpm_tutorial.run.report import write_report
from ddpm_tutorial.run.tracking import Progress, Tracker, start_wandb, timed
from ddpm_tutorial.run.train import TrainOptions
from ddpm_tutorial.training import diffusion_objective, new_state, total_steps, train_steps

def seconds(work, times):
    "Mean time of one call."
    start = time.perf_counter()
    for i in range(times): work(i)
    return (time.perf_counter() - start)/times

def measure_steps(config):
    "The state, the last step's record, the time of a step, and the precision."
    precision = choose_precision("auto", torch.device("cpu"))
    state = new_state(new_model(config), config.train)
    objective = diffusion_objective(config.scheduler.build(), config.train.label_dropout)
    steps = timed(train_steps(state, load_sample(), objective, config.train, precision))
    records = [next(steps) for _ in range(16)]
    step = statistics.median(took for _, took in records[2:]) # the first two warm up
    return state, records[-1][0], step, precision

def measure_wandb(folder, config, line):
    "The time that a line takes with Weights & Biases, and the processor time of its own process for a line."
    folder.mkdir()
    with Tracker(folder, start_wandb(folder, asdict(config))) as tracker:
        took = seconds(lambda i: tracker.log(10*i, **line), 1000)
    return took, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])/1000

def measure(folder, config, state, record, precision, total, log_every):
    "Seconds for one call of each kind of work, in the table's order, and a checkpoint's size in MiB."
    for part in ("checkpoints", "samples"): (folder/part).mkdir()
    (folder/"config.json").write_text("{}")
    progress = Progress(precision, 60_000)
    noting = seconds(lambda i: progress.add(record, 1.), 500)
    line = dict(epoch=1, loss=record.loss, lr=record.lr, grad_norm=record.grad_norm, images_per_second=100.,
                seconds=1.)
    with Tracker(folder) as tracker: logging = seconds(lambda i: tracker.log(10*i, **line), total//log_every)
    report = seconds(lambda i: write_report(folder), 2)
    with_wandb, wandb_process = measure_wandb(folder/"with", config, line)
    checkpoints = folder/"checkpoints"
    saving = seconds(lambda i: save_run(checkpoints, state, config, asdict(progress), is_best=True), 5)
    size = (checkpoints/"latest.pth").stat().st_size/2**20
    return [noting, logging, max(0., with_wandb - logging), wandb_process, saving, report], size

def main():
    preset = (sys.argv[1:] or ["small"])[0]
    config, options = PRESETS[preset], TrainOptions()
    os.environ.setdefault("WANDB_MODE", "offline")
    state, record, step, precision = measure_steps(config)
    total = total_steps(config.train, 60_000)
    per_epoch, images = total//config.train.epochs, config.train.batch_size
    with tempfile.TemporaryDirectory() as name:
        found, size = measure(Path(name), config, state, record, precision, total, options.log_every)
    lines, reports = total/options.log_every, config.train.epochs/options.sample_every
    in_between = [k for k in range(options.save_every, total, options.save_every) if k % per_epoch]
    saves = total/per_epoch + len(in_between)
    names = ("noting a step (loss by noise level)", "a line of metrics.jsonl", "the same line to W&B",
             "W&B's own process, a line", f"a checkpoint of {size:.0f} MiB, on the disk", "the report")
    rows = list(zip(names, found, (total, lines, lines, lines, saves, reports), strict=True))
    print(f"{preset}: {total:,} steps of {images} images, {1000*step:.0f} ms each "
          f"({images/step:.0f} images/s) in {precision} on {torch.get_num_threads()} threads")
    for name, took, times in rows:
        share = 100*took*times/(step*total)
        print(f"{name:40}{1000*took:10.2f} ms {times:8.0f} times {share:8.3f} %")
    print(f"{'together':40}{'':27}{100*sum(took*times for _, took, times in rows)/(step*total):8.3f} %")

if __name__ == "__main__": main()
