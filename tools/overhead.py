"""What a run spends beside training: noting, logging, Weights & Biases (offline), saving, the report; as a share of the steps of `small`.

usage: python tools/overhead.py [preset]      about two minutes; nothing else should run meanwhile
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
from ddpm_tutorial.training import new_state, total_steps, train_steps

def seconds(work, times):
    "Mean time of one call."
    start = time.perf_counter()
    for i in range(times): work(i)
    return (time.perf_counter() - start)/times

def main():
    preset = (sys.argv[1:] or ["small"])[0]
    config, data, options = PRESETS[preset], load_sample(), TrainOptions()
    os.environ.setdefault("WANDB_MODE", "offline")
    state, scheduler, precision = new_state(new_model(config), config.train), config.scheduler.build(), choose_precision("auto", torch.device("cpu"))
    steps = timed(train_steps(state, data, scheduler, config.train, precision))
    records = [next(steps) for _ in range(16)]
    record, step = records[-1][0], statistics.median(took for _, took in records[2:]) # the first two warm up
    progress, total = Progress(precision, 60_000), total_steps(config.train, 60_000)
    per_epoch, images = total//config.train.epochs, config.train.batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("checkpoints", "samples"): (folder/part).mkdir()
        (folder/"config.json").write_text("{}")
        noting = seconds(lambda i: progress.add(record, config.scheduler.num_steps, 1.), 500)
        line = dict(epoch=1, loss=record.loss, lr=record.lr, grad_norm=record.grad_norm, images_per_second=100., seconds=1.)
        with Tracker(folder) as tracker: logging = seconds(lambda i: tracker.log(10*i, **line), total//options.log_every)
        report = seconds(lambda i: write_report(folder), 2)
        wandb_folder = folder/"with"
        wandb_folder.mkdir()
        with Tracker(wandb_folder, start_wandb(wandb_folder, asdict(config))) as tracker: with_wandb = seconds(lambda i: tracker.log(10*i, **line), 1000)
        of_its_own = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])/1000 # processor time of W&B's process
        saving = seconds(lambda i: save_run(folder/"checkpoints", state, config, asdict(progress), is_best=True), 5)
        size = (folder/"checkpoints"/"latest.pth").stat().st_size/2**20
    saves = total/per_epoch + sum(1 for k in range(options.save_every, total, options.save_every) if k % per_epoch)
    reports = config.train.epochs/options.sample_every
    rows = [("noting a step (loss by noise level)", noting, total), ("a line of metrics.jsonl", logging, total/options.log_every),
            ("the same line to W&B", max(0., with_wandb - logging), total/options.log_every), ("W&B's own process, a line", of_its_own, total/options.log_every),
            (f"a checkpoint of {size:.0f} MiB, on the disk", saving, saves), ("the report", report, reports)]
    print(f"{preset}: {total:,} steps of {images} images, {1000*step:.0f} ms each ({images/step:.0f} images/s) in {precision} on {torch.get_num_threads()} threads")
    for name, took, times in rows: print(f"{name:40}{1000*took:10.2f} ms {times:8.0f} times {100*took*times/(step*total):8.3f} %")
    print(f"{'together':40}{'':27}{100*sum(took*times for _, took, times in rows)/(step*total):8.3f} %")

if __name__ == "__main__": main()
