"""Makes the autoencoder that comes with the package from a run, with its card, and what lesson 30 shows.

usage: python tools/autoencoder.py outputs/v1_emoji_autoencoder [--data_root DIR]

Takes the averaged weights of the run's best checkpoint and writes them in half precision to
ddpm_tutorial/assets/emoji_autoencoder.safetensors. Measures them as they are stored, on 200 emoji of concepts
that no training has seen, on the held-out combinations, and on as many training images. The card beside the
weights has the figures, and so has nbs/autoencoder.json, with the mean and the spread of the latents.
"""
import argparse
import json
from pathlib import Path

import torch

from ddpm_tutorial.autoencoder import (autoencoder_figures, encode_images, latent_statistics, mean_step,
                                       rebuild_images)
from ddpm_tutorial.emoji import ATTRIBUTION, EMOJI_SPLITS, load_emoji
from ddpm_tutorial.run.checkpoint import PRETRAINED, load_checkpoint, load_pretrained, save_weights
from ddpm_tutorial.run.config import AUTOENCODERS, differences
from ddpm_tutorial.run.tracking import read_metrics
from ddpm_tutorial.training import total_steps
from pretrained import facts

NAME = "emoji_autoencoder"
STORED = Path(__file__).resolve().parent.parent/"nbs"/"autoencoder.json"

CARD = """# The autoencoder `{name}`

A convolutional autoencoder of {weights:,} weights: emoji of 64x64 pixels in colour become latents of \
{latent} numbers, and come back. Averaged weights in half precision, with the configuration in the file's \
metadata
(`load_pretrained("{name}")`).

- Trained on {num_images:,} pictures of OpenMoji by `ddpm_train --config {name}`: step {step:,} of \
{total:,}, {precision}, {minutes:.0f} minutes on {device}, threads: {threads}.
- Never trained on: all variants of one concept in ten, and one combination of person and skin tone \
in ten.
- {attribution} The pictures that it rebuilds are adapted from them.
- For learning: it knows emoji on white and nothing else. Small writing and thin patterns are lost.
- `{name}.safetensors` has {facts}.

| | images | PSNR in dB | latent in bits | edges, rebuilt/real |
|---|---|---|---|---|
"""

def some(data, n):
    "n images in a fixed random order."
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]]

def measure(autoencoder, config, data):
    figures = autoencoder_figures(autoencoder, data, config.kl_weight, config.gradient_weight)
    sharpness = mean_step(rebuild_images(autoencoder, data.images))/mean_step(data.images)
    return dict(num_images=len(data), **figures, edges=sharpness)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data_root", type=Path, default=None)
    args = parser.parse_args()
    checkpoint, metrics = load_checkpoint(args.run/"checkpoints"/"best_model.pth"), read_metrics(args.run)
    changed = differences(checkpoint["config"], AUTOENCODERS[NAME])
    if changed: raise SystemExit(f"this run is not one of the preset {NAME}: {', '.join(changed)} differ")
    train, concepts, combinations = (load_emoji(64, split, skin_tones=True, root=args.data_root)
                                     for split in EMOJI_SPLITS) # complain about what is missing
    save_weights(PRETRAINED[NAME], checkpoint["ema"], checkpoint["config"])
    autoencoder, config = load_pretrained(NAME)
    rows = {"new concepts": measure(autoencoder, config, some(concepts, 200)),
            "new combinations": measure(autoencoder, config, combinations),
            "training images": measure(autoencoder, config, some(train, 200))}
    mean, std = latent_statistics(encode_images(autoencoder, train.images))
    start = next(line for line in metrics if "device" in line)
    step, total = checkpoint["step"], total_steps(config.train, len(train))
    card = CARD.format(
        name=NAME, weights=sum(weight.numel() for weight in checkpoint["ema"].values()), step=step,
        total=total,
        latent="x".join(map(str, config.model.latent_shape(config.image_shape))), num_images=len(train),
        precision=start["precision"], device=start["device"], threads=start["threads"],
        minutes=checkpoint["progress"]["seconds"]/60, attribution=f"{ATTRIBUTION}.",
        facts=facts(PRETRAINED[NAME]))
    card += "".join(f"| {name} | {row['num_images']} | {row['psnr']:.2f} | {row['latent_bits']:,.0f} | "
                    f"{row['edges']:.3f} |\n" for name, row in rows.items())
    PRETRAINED[NAME].with_suffix(".md").write_text(card)
    stored = dict(rows=rows, latent_mean=mean, latent_std=std)
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    print(card)

if __name__ == "__main__": main()
