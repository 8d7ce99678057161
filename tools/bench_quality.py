"""What do a few minutes of training give, here, with diffusers, and with lucidrains' program? And how long
does each take to the first 16 pictures? For lesson 91.

usage: python tools/bench_quality.py [--minutes 5] [--num_samples 1000] [--data_root DIR] [--output_dir DIR]
                                     [--docs] [--quick]

Takes forty minutes on two cores. Nothing else should run meanwhile. Each contestant trains for that long on
the same images, in bf16 if the processor computes in it, and the judge of `ddpm_evaluate` measures its
samples. Ours is `small` with its own settings. The network of diffusers has the widths of `small`. It is
trained with the settings of the example train_unconditional.py, and with labels, a tenth of them hidden; and
once more with our learning rate. lucidrains' network has the same widths and the default settings of its
Trainer; it takes no labels. A result that exists is not measured again. --docs writes
nbs/bench_quality.json. --quick takes two steps on the bundled images: it shows that the script works, but its
figures mean nothing.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch.nn import functional as F
from torchvision.utils import save_image

from bench import NULL_LABEL, SMALL, build, guided_samples
from ddpm_tutorial.data import CLASSES, ImageData, batches, to_uint8
from ddpm_tutorial.metrics import compute_metrics, extract_features, load_classifier, matched_subset
from ddpm_tutorial.run.device import choose_precision, new_model
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.training import Stream, autocast_to, new_state, random_generator, train_steps
from measuring import EVERYWHERE, load_result, parse_folder_arguments, real_images

CPU = torch.device("cpu")

def endless(data, batch_size):
    "Batches, epoch after epoch."
    generator = torch.Generator().manual_seed(0)
    while True: yield from batches(data, batch_size, generator=generator)

# Each contestant is a pair: `steps(total)`, a generator that trains, and `draw(labels)` -> uint8 images, with
# the averaged weights after the last step.

def ours(data, precision, sampling_steps=30):
    "`small` as it is, but shorter."
    state = new_state(new_model(SMALL), SMALL.train)
    def steps(total):
        train = replace(SMALL.train, max_steps=total, warmup_steps=min(SMALL.train.warmup_steps, total//10))
        config = replace(SMALL, train=train)
        yield from train_steps(state, data, config.build_objective(), train, precision)
    def draw(labels):
        sampling = replace(EVERYWHERE, num_inference_steps=sampling_steps) # as the others are guided
        return draw_samples(state.ema, replace(SMALL, sampling=sampling), len(labels), {"labels": labels},
                            precision=precision, generator=random_generator(0, Stream.SAMPLES))
    return steps, draw

def diffusers(data, precision, sampling_steps=100, lr=1e-4):
    "The settings of the example train_unconditional.py."
    model, call = build("diffusers, 2 layers", precision, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1., power=3/4)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    def steps(total):
        rates = get_cosine_schedule_with_warmup(optimizer, min(500, total//10), total)
        for (x0, cond), _ in zip(endless(data, 64), range(total)):
            noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
            labels = cond["labels"].masked_fill(torch.rand(len(x0)) < 0.1, NULL_LABEL)
            noisy = scheduler.add_noise(x0, noise, t)
            with autocast_to(precision, CPU): loss = F.mse_loss(call(model, noisy, t, labels).float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            yield
    def draw(labels):
        model.eval()
        ema.copy_to(model.parameters())
        # ancestral sampling, as in the example: DDIM carries the errors of so young a network to the end, and
        # many of its images saturate
        scheduler.set_timesteps(sampling_steps)
        return torch.cat([to_uint8(guided_samples(model, call, scheduler, part, precision))
                          for part in labels.split(250)])
    return steps, draw

def lucidrains(data, precision, sampling_steps=100):
    "The defaults of `GaussianDiffusion` and of its `Trainer`. No labels."
    network, _ = build("lucidrains", precision, CPU)
    # eta 1: ancestral sampling, as its Trainer draws, but with fewer than 1,000 steps
    diffusion = GaussianDiffusion(network, image_size=28, sampling_timesteps=sampling_steps,
                                  ddim_sampling_eta=1.)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    def steps(total):
        for (x0, _), _ in zip(endless(data, 16), range(total)):
            with autocast_to(precision, CPU): loss = diffusion((x0 + 1)/2)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            yield
    @torch.no_grad()
    def draw(labels):
        images = []
        for part in labels.split(250):
            with autocast_to(precision, CPU): x = ema.ema_model.sample(batch_size=len(part))
            images.append(to_uint8(2*x.float() - 1))
        return torch.cat(images)
    return steps, draw

CONTESTANTS = {"ours": ours, "diffusers": diffusers, "lucidrains": lucidrains,
               "diffusers, our learning rate": partial(diffusers, lr=SMALL.train.lr)}

def fitting_steps(make, data, precision, seconds, trial=30):
    "How many steps fit into that time, from some steps of a network that is thrown away."
    run = make(data, precision)[0](10**6)
    for _ in range(3): next(run)                        # not counted: first allocations
    start = time.perf_counter()
    for _ in range(trial): next(run)
    return int(seconds/(time.perf_counter() - start)*trial)

def quality(name, make, data, judge, labels, precision, args):
    "A row: trains for the time, draws and measures. Leaves the first 50 samples as a picture."
    total = 2 if args.quick else fitting_steps(make, data, precision, 60*args.minutes)
    steps, draw = make(data, precision, **(dict(sampling_steps=2) if args.quick else {}))
    start = time.perf_counter()
    for _ in steps(total): pass
    seconds = time.perf_counter() - start
    images = draw(labels)
    save_image(images[:50]/255, args.output_dir/f"{name}.png", nrow=10)
    metrics = compute_metrics(ImageData(images, labels, CLASSES), *judge)
    if make is lucidrains: del metrics["class_agreement"], metrics["class_agreement_error"] # it has no labels
    return dict(steps=total, training_seconds=seconds, **metrics)

# What a user runs who has a trained network on the disk, from the start of Python to the file. Ours is a
# command; of the others it is the shortest program that does the same.
OURS = """
import sys
from ddpm_tutorial.run.sample import ddpm_sample
sys.argv = ["ddpm_sample", *"--num_samples 16 --output ours.png {options}".split()]
ddpm_sample()
"""
DIFFUSERS = """
from diffusers import DDIMPipeline
from torch import stack
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image
images = DDIMPipeline.from_pretrained("pipeline")(batch_size=16, num_inference_steps={steps}).images
save_image(stack([to_tensor(image) for image in images]), "theirs.png")
"""
LUCIDRAINS = """
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torchvision.utils import save_image
network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1, flash_attn=True)
model = GaussianDiffusion(network, image_size=28, sampling_timesteps={steps})
model.load_state_dict(torch.load("lucidrains.pt", weights_only=True))
save_image(model.eval().sample(batch_size=16), "theirs.png")
"""

def first_programs(quick):
    "A name, the code, and the file that it writes."
    # the defaults of the first two; of the third, the example in its README
    ours, theirs, lucid = (2, 2, 2) if quick else (30, 50, 250)
    return {f"ours, DPM-Solver++, {ours} steps with guidance":
                (OURS.format(options=f"--num_inference_steps {ours}"), "ours.png"),
            "ours, small_few, 4 steps": (OURS.format(options="--checkpoint small_few"), "ours.png"),
            f"diffusers, DDIM, {theirs} steps": (DIFFUSERS.format(steps=theirs), "theirs.png"),
            f"lucidrains, DDIM, {lucid} steps": (LUCIDRAINS.format(steps=lucid), "theirs.png")}

def prepare_pictures(folder):
    "Networks with random weights on the disk: the time doesn't depend on how well they draw."
    network = UNet2DModel(sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 128),
                          down_block_types=["DownBlock2D"]*3, up_block_types=["UpBlock2D"]*3)
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(folder/"pipeline")
    model = GaussianDiffusion(build("lucidrains", "fp32", CPU)[0], image_size=28)
    torch.save(model.state_dict(), folder/"lucidrains.pt")

def first_pictures(quick):
    "Seconds to the first 16 pictures, each program in turn, round after round."
    programs = first_programs(quick)
    seconds = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        prepare_pictures(Path(folder))
        for name, (code, file) in [*programs.items()]*(1 if quick else 3):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
            seconds[name].append(time.perf_counter() - start)
            if done.returncode: raise SystemExit(f"{name}: {done.stderr}")
            (Path(folder)/file).unlink()    # an error if it left no pictures
    return seconds

def add_options(parser):
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--num_samples", type=int, default=1000)

def main():
    args = parse_folder_arguments(__doc__, "bench", add_options)
    if args.quick: args.num_samples = 20
    args.output_dir.mkdir(parents=True, exist_ok=True)
    paths = [args.output_dir/"bench_quality.json"]
    if args.docs: paths.append(Path(__file__).resolve().parent.parent/"nbs"/"bench_quality.json")
    data, fresh = real_images(args)
    classifier, precision = load_classifier(), choose_precision("auto", CPU)
    judge = data, extract_features(data.images, classifier), classifier
    settings = dict(minutes=args.minutes, num_samples=args.num_samples, precision=precision,
                    threads=torch.get_num_threads())
    result, labels = load_result(paths[0], settings), torch.arange(args.num_samples) % len(CLASSES)
    result["versions"] = {name: version(name)
                          for name in ("torch", "diffusers", "denoising-diffusion-pytorch")}
    def write():
        for path in paths: path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if "first_pictures" not in result: result["first_pictures"] = first_pictures(args.quick)
    for name, seconds in result["first_pictures"].items():
        print(f"{name}: {min(seconds):.1f} to {max(seconds):.1f} s to the first 16 pictures", flush=True)
    result["real"] = compute_metrics(matched_subset(fresh, labels), *judge)
    write()
    for name, make in CONTESTANTS.items():
        if any(row["name"] == name for row in result["rows"]): continue
        row = dict(name=name, **quality(name, make, data, judge, labels, precision, args))
        result["rows"].append(row)
        write()
        print(f"{name}: {row['steps']:,} steps in {row['training_seconds']:.0f} s, Fréchet distance "
              f"{row['frechet_distance']:.3f}, coverage {row['coverage']:.3f}", flush=True)

if __name__ == "__main__": main()
