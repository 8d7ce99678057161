"""Our network against diffusers and lucidrains' denoising-diffusion-pytorch on this machine: training, one
call of the network, memory, batches, guided samples.

usage: python tools/bench.py [--compiled] [--device cpu] [--data_root DIR] [--rounds 5] [--seconds 3]
                             [--output_dir DIR] [--docs] [--quick]

Takes a quarter of an hour on two cores, half an hour with --compiled. Nothing else should run meanwhile. The
contestants take turns, round after round, so that their ratios hold even if the machine's speed changes. Each
runs in fp32 and in bf16 (autocast), and the faster one counts. With --compiled, only the faster one is
compiled. Tables go to the screen and to bench.md, all numbers to bench.json, a plot to bench.png. --docs
writes tables and plot into nbs as well. --quick takes one tiny step of everything on the bundled images: it
shows that the script works, but its figures mean nothing.
"""
import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from denoising_diffusion_pytorch import Unet
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import FashionMNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from ddpm_tutorial.data import batches, default_data_root, load_fashion_mnist, load_sample
from ddpm_tutorial.run.config import PRESETS
from ddpm_tutorial.run.device import choose_device, memory_mib, new_model, sampling_steps
from ddpm_tutorial.training import diffusion_objective, new_state, train_steps
from measuring import EVERYWHERE

SMALL, PRECISIONS, NULL_LABEL = PRESETS["small"], ("fp32", "bf16"), 10
# The layers are residual blocks on each level. The default of diffusers is 2.
CONTESTANTS = ("ours", "diffusers, 1 layer", "diffusers, 2 layers", "lucidrains")
DIFFUSION = dict(num_train_timesteps=SMALL.scheduler.num_steps, beta_schedule="squaredcos_cap_v2")

def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

def call_with_labels(model, x, t, labels): return model(x, t, labels)

def call_without_labels(model, x, t, labels): return model(x, t)

def call_diffusers(model, x, t, labels): return model(x, t, labels).sample

def build(contestant, precision, device, compiled=False):
    """A new network in training mode, and the function that calls it.

    Widths and places of attention are those of `small`. Everything else is the default of each library.
    """
    torch.manual_seed(0)
    if contestant == "ours": model, call = new_model(SMALL), call_with_labels
    elif contestant == "lucidrains":    # takes no labels
        # flash attention as in its README, but on a GPU it refuses fp32
        flash = device.type == "cpu" or precision == "bf16"
        model, call = Unet(dim=32, dim_mults=(1, 2, 4), channels=1, flash_attn=flash), call_without_labels
    else:                               # its middle always has attention
        model, call = UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 128),
            down_block_types=["DownBlock2D"]*3, up_block_types=["UpBlock2D"]*3,
            num_class_embeds=NULL_LABEL + 1, layers_per_block=2 if "2" in contestant else 1), call_diffusers
    if compiled: model.compile(dynamic=False)
    return model.to(device), call

def our_steps(model, call, precision, batch, data):
    "The training loop of the course with everything: dropped labels, clipping, checks, averaged weights."
    config = replace(SMALL.train, batch_size=batch, epochs=10**6, max_steps=None)
    objective = diffusion_objective(SMALL.scheduler.build(), config.label_dropout)
    steps = train_steps(new_state(model, config), data, objective, config, precision)
    for step in steps: yield len(step.losses)

def their_steps(model, call, precision, batch, data):
    """A plain loop as users of these networks write it, but on our batches.

    It clips no gradient, averages no weights and reads no loss.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    scheduler = DDPMScheduler(**DIFFUSION)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:
        for x0, cond in batches(data, batch, generator=generator, device=device):
            noise, t = torch.randn_like(x0), torch.randint(len(scheduler.timesteps), (batch,), device=device)
            labels = cond["labels"].masked_fill(torch.rand(batch, device=device) < 0.1, NULL_LABEL)
            noisy = scheduler.add_noise(x0, noise, t)
            with autocast(device, precision): loss = F.mse_loss(call(model, noisy, t, labels), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield batch

# From here to `race`, each function makes a work: a function that does something once and returns the number
# of images.

def training(data, contestant, precision, batch, device, compiled=False):
    "One training step."
    steps = our_steps if contestant == "ours" else their_steps
    data = data[:len(data)//batch*batch]
    return partial(next, steps(*build(contestant, precision, device, compiled), precision, batch, data))

def forward(contestant, precision, batch, device, compiled=False):
    "One call of the network."
    model, call = build(contestant, precision, device, compiled)
    model.eval()
    x, t = torch.randn(batch, 1, 28, 28, device=device), torch.arange(batch, device=device)
    labels = torch.arange(batch, device=device) % 10
    @torch.no_grad()
    def work():
        with autocast(device, precision): call(model, x, t, labels)
        return batch
    return work

def our_samples(precision, labels, steps):
    "Guided samples as `ddpm_sample --method ddim` draws them."
    model, generator = new_model(SMALL, labels.device).eval(), torch.Generator().manual_seed(0)
    config = replace(SMALL, sampling=replace(EVERYWHERE, method="ddim", num_inference_steps=steps))
    def work():
        steps = sampling_steps(model, config, len(labels), {"labels": labels}, generator=generator,
                               precision=precision)
        for _ in steps: pass
        return len(labels)
    return work

@torch.no_grad()
def guided_samples(model, call, scheduler, labels, precision):
    "Samples of a network of diffusers."
    both = torch.cat([torch.full_like(labels, NULL_LABEL), labels])
    x = torch.randn(len(labels), 1, 28, 28, device=labels.device)
    for t in scheduler.timesteps:
        with autocast(x.device, precision):
            without, with_label = call(model, torch.cat([x, x]), t, both).float().chunk(2)
        guided = without + EVERYWHERE.guidance_scale*(with_label - without)
        x = scheduler.step(guided, t, x).prev_sample
    return x

def their_samples(contestant, precision, labels, steps):
    "The same in the loop of diffusers' pipelines: one batch holds both halves of the guidance."
    model, call = build(contestant, precision, labels.device)
    scheduler = DDIMScheduler(**DIFFUSION, prediction_type="v_prediction")
    model.eval()
    scheduler.set_timesteps(steps, device=labels.device)
    def work():
        guided_samples(model, call, scheduler, labels, precision)
        return len(labels)
    return work

def count_images(loader): return sum(len(x) for x, labels in loader)

def loading(data, root):
    "One epoch of batches. torchvision's workers stay alive between epochs, which is faster."
    generator = torch.Generator().manual_seed(0)
    dataset = FashionMNIST(root, transform=Compose([ToTensor(), Normalize(0.5, 0.5)]))
    works = {("ours", "no workers"): lambda: count_images(batches(data, 128, generator=generator))}
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=128, shuffle=True, num_workers=workers,
                            persistent_workers=workers > 0)
        works["torchvision, DataLoader", f"{workers or 'no'} workers"] = partial(count_images, loader)
    return works

def write_raw(data, root):
    """Writes the images as the files that torchvision reads.

    The format is IDX: two zero bytes, 8 for uint8, the number of axes, their lengths, the values.
    """
    raw = root/"FashionMNIST"/"raw"
    raw.mkdir(parents=True)
    for kind, values in (("images-idx3", data.images[:, 0]), ("labels-idx1", data.labels.to(torch.uint8))):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        content = head + values.numpy().tobytes()
        for split in ("train", "t10k"): (raw/f"{split}-{kind}-ubyte").write_bytes(content)

def matmul(precision, device):
    "One product of square matrices. It counts floating-point operations instead of images."
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    def work():
        a @ b
        return 2*n**3
    return work

def race(works, device, rounds, seconds):
    "What each work gets done in a second, once for each round. Each round starts with a different one."
    def visit(work):
        done, start = 0, time.perf_counter()
        while not done or time.perf_counter() - start < seconds: done += work()
        if device.type == "cuda": torch.cuda.synchronize()
        return done/(time.perf_counter() - start)
    for work in works.values(): visit(work)                    # not counted: compiling, first allocations
    names, speeds = list(works), {name: [] for name in works}
    for k in range(rounds):
        for name in names[k % len(names):] + names[:k % len(names)]: speeds[name].append(visit(works[name]))
    return speeds

def rows_of(speeds, **settings):
    """A row for each contestant: its faster variant, and how many times as fast ours is.

    The ratio is that of the medians. Its extremes are those of the rounds' ratios.
    """
    medians, rows = {key: statistics.median(values) for key, values in speeds.items()}, []
    best = {name: max((key for key in medians if key[0] == name), key=medians.get) for name, _ in speeds}
    for name, key in best.items():
        ratios = [ours/its for ours, its in zip(speeds[best["ours"]], speeds[key])]
        others = {variant: medians[other, variant]
                  for other, variant in medians if other == name and variant != key[1]}
        rows.append(dict(**settings, contestant=name, variant=key[1], images_per_second=medians[key],
                         low=min(speeds[key]), high=max(speeds[key]), others=others,
                         ratio=medians[best["ours"]]/medians[key],
                         ratio_low=min(ratios), ratio_high=max(ratios)))
    return rows

def flops(work):
    """Floating-point operations for one image, in matrix products and convolutions.

    A multiplication and its addition count as two. On a CPU, fused attention is left out; it is below 1 %.
    """
    with FlopCounterMode(display=False) as counter: images = work()
    return counter.get_total_flops()/images

def memory(contestant, precision, batch, device):
    "MiB that three steps of training add at their peak. The process must have done nothing else before."
    work, before = training(load_sample(), contestant, precision, batch, device), memory_mib()
    for _ in range(3): work()
    return memory_mib() - before

def measure_memory(tasks):
    "Each network gets a fresh process that has only imported: no other contestant's peak hides its own."
    context = multiprocessing.get_context("forkserver")
    preload = ["diffusers.models.unets.unet_2d", "denoising_diffusion_pytorch", "ddpm_tutorial.run.config"]
    context.set_forkserver_preload(preload)
    with context.Pool(1, maxtasksperchild=1) as pool: used = pool.starmap(memory, tasks, chunksize=1)
    return dict(zip([task[:2] for task in tasks], used))

def race_networks(what, mode, batch, make, run, device, keys):
    "Races networks and matrix products: how much of the machine's speed does each network reach?"
    works = {key: make(*key, batch, device, compiled=mode == "compiled") for key in keys}
    speeds = run(works | {("matmul", precision): matmul(precision, device) for precision in PRECISIONS})
    peak = {precision: statistics.median(speeds.pop(("matmul", precision))) for precision in PRECISIONS}
    rows = rows_of(speeds, what=what, mode=mode, batch=batch)
    for row in rows:
        model = build(row["contestant"], "fp32", device)[0]
        cost = flops(make(row["contestant"], "fp32", 4, device))
        parameters = sum(p.numel() for p in model.parameters())
        row |= dict(parameters=parameters, flops=cost, peak_flops=peak[row["variant"]])
        row |= dict(peak_share=row["images_per_second"]*cost/row["peak_flops"])
    return rows

def races(data, root, device, rounds, seconds, batch, samples, steps, compiled):
    "Yields the rows of one race after the other."
    networks = [(name, precision) for name in CONTESTANTS for precision in PRECISIONS]
    used = measure_memory([(*key, batch, device) for key in networks])
    run, train = partial(race, device=device, rounds=rounds, seconds=seconds), partial(training, data)
    trained = race_networks("training", "eager", batch, train, run, device, networks)
    for row in trained: row["memory_mib"] = used[row["contestant"], row["variant"]]
    yield trained
    yield race_networks("forward", "eager", batch, forward, run, device, networks)
    labels = torch.arange(samples, device=device) % 10
    samplers = {}
    for name, precision in networks:
        if name == "ours": samplers[name, precision] = our_samples(precision, labels, steps)
        elif name != "lucidrains": samplers[name, precision] = their_samples(name, precision, labels, steps)
    yield rows_of(run(samplers), what="guided samples", mode=f"{steps} steps", batch=samples)
    yield rows_of(run(loading(data, root)), what="batches", mode="one epoch", batch=128)
    if compiled:
        best = [(row["contestant"], row["variant"]) for row in trained]
        yield race_networks("training", "compiled", batch, train, run, device, best)

def machine(device):
    "One line with everything that the figures depend on."
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if device.type == "cuda": name = torch.cuda.get_device_name(device)
    else: name = (re.findall(r"model name\s*: (.*)", cpu) or [platform.machine()])[0]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu.split()]
    told = ("OMP_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "ONEDNN_", "TORCH_")
    variables = [(key, value) for key, value in sorted(os.environ.items()) if key.startswith(told)]
    settings = [f"{key}={value.split('/')[-1]}" for key, value in variables]
    packages = ("torch", "torchvision", "diffusers", "denoising-diffusion-pytorch")
    versions = [f"{name} {version(name)}" for name in packages]
    counts = [f"{os.cpu_count()} cores", *flags, f"{torch.get_num_threads()} threads"]
    return ", ".join([name, *counts, *versions, *settings])

COLUMNS = {   # head: (field that the race must have, cell)
    "": ("contestant", lambda r: r["contestant"]),
    "in": ("variant", lambda r: r["variant"]),
    "images/s (lowest to highest)":
        ("low", lambda r: f"{r['images_per_second']:,.0f} ({r['low']:,.0f} to {r['high']:,.0f})"),
    "the other":
        ("others", lambda r: ", ".join(f"{variant} {speed:,.0f}" for variant, speed in r["others"].items())),
    "ours is × as fast (round by round)":
        ("ratio", lambda r: f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"),
    "parameters": ("parameters", lambda r: f"{r['parameters']:,}"),
    "MFLOP/image": ("flops", lambda r: f"{r['flops']/1e6:,.0f}"),
    "of a matrix product, GFLOP/s":
        ("peak_share", lambda r: f"{100*r['peak_share']:.0f} % of {r['peak_flops']/1e9:,.0f}"),
    "MiB": ("memory_mib", lambda r: f"{r['memory_mib']:,}"),
}

def table(rows):
    "One race as Markdown."
    columns = {head: cell for head, (field, cell) in COLUMNS.items() if field in rows[0]}
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    title = f"**{rows[0]['what'].capitalize()}, {rows[0]['mode']}, {rows[0]['batch']} at a time**"
    lines = [f"| {' | '.join(line)} |" for line in [list(columns), ["---"]*len(columns), *cells]]
    return "\n".join([title, "", *lines]) + "\n"

def draw_bars(axis, modes, field, low, high, form):
    "A bar for each contestant in each mode. A thin line on it spans the lowest to the highest round."
    for i, (mode, raced) in enumerate(modes.items()):
        places = [k + 0.8*((i + 0.5)/len(modes) - 0.5) for k in range(len(raced))]
        color = ("#56B4E9", "#E69F00")[i]
        axis.barh(places, [row[field] for row in raced], 0.8/len(modes), color=color, label=mode)
        lows, highs = [row[low] for row in raced], [row[high] for row in raced]
        axis.hlines(places, lows, highs, color="black", linewidth=1)
        for place, row in zip(places, raced):
            axis.text(max(row[field], row[high]), place, form.format(row[field]), va="center", fontsize=9)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)

def plot(rows, path):
    "Training: images/s, and how many times as fast ours is."
    from matplotlib.figure import Figure
    modes = {}
    for mode in ("eager", "compiled"):
        raced = [row for row in rows if (row["what"], row["mode"]) == ("training", mode)]
        if raced: modes[mode] = raced
    figure = Figure(figsize=(10, 1.5 + len(modes)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_bars(left, modes, "images_per_second", "low", "high", "  {:,.0f}")
    draw_bars(right, modes, "ratio", "ratio_low", "ratio_high", "  {:.1f}×")
    left.set(xlabel=f"training, images/s, {modes['eager'][0]['batch']} at a time",
             yticks=range(len(CONTESTANTS)), yticklabels=CONTESTANTS)
    right.set(xlabel="ours is so many times as fast")
    left.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(modes), frameon=False)
    figure.savefig(path)

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="race training with torch.compile as well")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="for each contestant in each round")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--docs", action="store_true",
                        help="write nbs/_bench.md and nbs/images/bench.png as well")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.compiled and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        parser.error("--compiled needs a C++ compiler")
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    return args

def main():
    args = parse_arguments()
    device, rounds, seconds = choose_device(args.device), args.rounds, args.seconds
    batch, samples, steps = 64, 64, 25
    if args.quick: rounds, seconds, batch, samples, steps = 1, 0, 4, 4, 2
    result = dict(machine=machine(device), rounds=rounds, seconds=seconds, rows=[])
    nbs = Path(__file__).resolve().parent.parent/"nbs"
    tables, plots = [args.output_dir/"bench.md"], [args.output_dir/"bench.png"]
    if args.docs:
        tables.append(nbs/"_bench.md")
        plots.append(nbs/"images"/"bench.png")
    text = f"{result['machine']}. Medians of {rounds} rounds of {seconds:g} s for each contestant.\n"
    print(text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            data, root = load_sample(), Path(scratch)
            write_raw(data, root)
        else: data, root = load_fashion_mnist(args.data_root), args.data_root or default_data_root()
        for rows in races(data, root, device, rounds, seconds, batch, samples, steps, args.compiled):
            result["rows"] += rows
            text += "\n" + table(rows)
            print(table(rows), flush=True)
            # after each race, so that nothing is lost if it stops
            for path in tables: path.write_text(text, encoding="utf-8")
            (args.output_dir/"bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for path in plots: plot(result["rows"], path)

if __name__ == "__main__": main()
