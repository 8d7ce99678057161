"""Makes what text to emoji ships, and what lesson 33 shows.

usage: python tools/text_to_image.py judge
       python tools/text_to_image.py model outputs/v1_emoji [--checkpoints PATH ...]
       python tools/text_to_image.py compare RUN [RUN ...]

`judge` trains the judge on all emoji (some five minutes) and writes
ddpm_tutorial/assets/emoji_judge.safetensors.
`model` takes the averaged weights of the run's last checkpoint and writes them in half precision to
ddpm_tutorial/assets/emoji.safetensors. It then measures them as they are stored: does the judge find the
prompt of each picture among 100, for prompts of the training, for new combinations, and for new prompts?
The same is asked of earlier checkpoints, if they are given. The card beside the weights has the figures, and
so has nbs/text_to_image.json. nbs/images/text_to_image.png is the picture of the README.
`compare` measures the last checkpoints of other runs, and adds their figures to the same file, under the
names of their folders. Lesson 33 shows runs by `ddpm_train --config emoji --max_steps 2000 --time_mean M
--output_dir outputs/time_mean_M`, with M from -0.4 to 1.
"""
import argparse
import json
from pathlib import Path
from textwrap import fill

import torch

from ddpm_tutorial.emoji import ATTRIBUTION, emoji_with_names
from ddpm_tutorial.metrics import nearest_distance
from ddpm_tutorial.run.checkpoint import (PRETRAINED, load_checkpoint, load_model, load_pretrained,
                                          save_weights)
from ddpm_tutorial.run.conditions import load_codec, text_conditions
from ddpm_tutorial.run.config import PRESETS, differences
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.run.tracking import read_metrics
from ddpm_tutorial.text import build_vocabulary, split_words, tokenize
from ddpm_tutorial.text_to_image import (JUDGE, EncodedData, Judge, judge_objective, load_judge, retrieval,
                                         save_judge)
from ddpm_tutorial.training import (Stream, TrainConfig, new_state, random_generator, total_steps,
                                    train_steps)
from pretrained import facts

NAME = "emoji"
STORED = Path(__file__).resolve().parent.parent/"nbs"/"text_to_image.json"
SEEN, COMBINATIONS, NEW = "seen in training", "new combinations", "new prompts"

CARD = """# Text to emoji: `{name}`

A text encoder and a U-Net, {weights:,} weights together, that draw an emoji of 64x64 pixels from a prompt, \
as latents of `emoji_autoencoder`. Averaged weights in half precision, with the configuration and the \
vocabulary in the file's metadata (`load_pretrained("{name}")`, or `ddpm_sample --checkpoint {name} \
--prompt "red heart"`).

- Trained on {captions:,} pictures of OpenMoji and their names by `ddpm_train --config {name}`: step \
{step:,} of {total:,}, {precision}, {minutes:.0f} minutes on {device}; processes: {processes}, threads of \
each: {threads}.
- Never trained on: all variants of one concept in ten, and one combination of person and skin tone \
in ten.
- {attribution} The pictures that it draws are adapted from them.
- For learning: it knows {words:,} words, and most of them from one picture. It draws that one nearly as it \
was. For concepts that it has never seen it seldom finds a picture.
- `{name}.safetensors` has {facts}.

Does the judge find the prompt of a picture among 100? Four pictures for each prompt.

| | real pictures | drawn | nearest training picture, grey levels |
|---|---|---|---|
"""

def train_judge(root):
    data, _ = emoji_with_names(64, "all", skin_tones=True, root=root)
    vocabulary = build_vocabulary(data.captions)
    max_words = max(len(split_words(caption)) for caption in data.captions)
    examples = EncodedData(data.images, {"tokens": tokenize(data.captions, vocabulary, max_words)})
    config = TrainConfig(epochs=60, batch_size=128, lr=1e-3, warmup_steps=100, lr_decay=True,
                         label_dropout=0.)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        state = new_state(Judge(len(vocabulary), max_words), config)
    precision = choose_precision("auto", torch.device("cpu"))
    for step in train_steps(state, examples, judge_objective(), config, precision):
        if step.step % 100 == 0: print(f"step {step.step:,}: loss {step.loss:.3f}", flush=True)
    save_judge(JUDGE, state.ema, vocabulary, max_words)
    print(JUDGE, facts(JUDGE))

def hundred(data, words):
    "At most 100 pictures in a fixed random order, whose captions have no other words than these."
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return data[torch.tensor([i for i in order if words.issuperset(split_words(data.captions[i]))][:100])]

def measure(model, config, sets, train, each, seed=0):
    "For each set of pictures with prompts, how the pictures do that the model draws from the prompts."
    judge, vocabulary, max_words = load_judge()
    codec, rows = load_codec(config), {}
    for name, data in sets.items():
        tokens, own = tokenize(data.captions, vocabulary, max_words), torch.arange(len(data))
        asked = own.repeat_interleave(each)
        cond = text_conditions(config, [data.captions[i] for i in asked])
        drawn = draw_samples(model, config, len(asked), cond, codec=codec, batch_size=100,
                             generator=random_generator(seed, Stream.SAMPLES),
                             precision=choose_precision("auto", torch.device("cpu")))
        rows[name] = dict(
            num_prompts=len(data), real=retrieval(judge, data.images, tokens, own).float().mean().item(),
            drawn=retrieval(judge, drawn, tokens, asked).float().mean().item(),
            nearest=nearest_distance(drawn, train.images).median().item())
        print(f"{name}: {rows[name]}", flush=True)
    return rows

PROMPTS = ("grinning face", "red heart", "woman firefighter, medium-dark skin tone",
           "thumbs up, dark skin tone", "dog face", "black cat", "pizza", "rocket", "house with garden",
           "crescent moon", "triangular flag", "man dancing, light skin tone")

def picture(model, config):
    "What the model draws for some prompts: the first picture for each, with seed 0."
    import matplotlib.pyplot as plt
    cond = text_conditions(config, PROMPTS)
    drawn = draw_samples(model, config, len(PROMPTS), cond, codec=load_codec(config),
                         generator=random_generator(0, Stream.SAMPLES))
    figure, axes = plt.subplots(2, 6, figsize=(9, 3.6), layout="compressed")
    for axis, prompt, image in zip(axes.flat, PROMPTS, drawn):
        axis.imshow(image.permute(1, 2, 0))
        axis.set_title(fill(prompt, 20), fontsize=9)
        axis.axis("off")
    figure.savefig(STORED.parent/"images"/"text_to_image.png", dpi=120, metadata={"Software": None})

def prompt_sets(words, root):
    "The training pictures, and for each kind of prompt at most 100 pictures with captions of these words."
    train, combinations, concepts = (emoji_with_names(64, split, skin_tones=True, root=root)[0]
                                     for split in ("train", "combinations", "validation"))
    return train, {SEEN: hundred(train, words), COMBINATIONS: hundred(combinations, words),
                   NEW: hundred(concepts, words)}

def stored_values(): return json.loads(STORED.read_text()) if STORED.exists() else {}

def store(**values): # in place of those of the same name
    STORED.write_text(json.dumps(stored_values() | values, indent=1) + "\n")

def compare(runs, root):
    "Measures runs that differ in one setting or another, and stores it for lesson 33."
    found = {}
    for run in runs:
        model, config = load_model(run/"checkpoints"/"latest.pth")
        train, sets = prompt_sets(set(config.vocabulary), root)
        rows = measure(model, config, {name: sets[name] for name in (SEEN, COMBINATIONS)}, train, each=2)
        last = [line for line in read_metrics(run) if "validation_loss" in line][-1]
        found[run.name] = dict(step=last["step"], minutes=last["seconds"]/60,
                               validation_loss=last["validation_loss"], rows=rows)
    store(compared=stored_values().get("compared", {}) | found)

def measure_model(run, checkpoints, root):
    checkpoint = load_checkpoint(run/"checkpoints"/"latest.pth")
    config = checkpoint["config"]
    words = set(config.vocabulary)
    train, sets = prompt_sets(words, root)
    choices = ("scheduler", "objective", "train", "sampling", "text")
    changed = [name for name in differences(config, PRESETS[NAME]) if name.split(".")[0] in choices]
    if changed: raise SystemExit(f"this run is not one of the preset {NAME}: {', '.join(changed)} differ")
    save_weights(PRETRAINED[NAME], checkpoint["ema"], config)
    model, config = load_pretrained(NAME)
    picture(model, config)
    rows = measure(model, config, sets, train, each=4)
    real = {name: nearest_distance(sets[name].images, train.images).median().item()
            for name in (COMBINATIONS, NEW)}
    over_time = []
    for path in checkpoints:
        step = load_checkpoint(path)["step"]
        over_time.append(dict(step=step, rows=measure(*load_model(path), sets, train, each=1)))
    over_time.append(dict(step=checkpoint["step"], rows=rows))
    start = next(line for line in read_metrics(run) if "device" in line)
    card = CARD.format(
        name=NAME, weights=sum(weight.numel() for weight in checkpoint["ema"].values()),
        step=checkpoint["step"], captions=len(train),
        total=total_steps(config.train, checkpoint["progress"]["num_images"]),
        precision=start["precision"], device=start["device"], processes=start["processes"],
        threads=start["threads"], words=len(words), minutes=checkpoint["progress"]["seconds"]/60,
        attribution=f"{ATTRIBUTION}.", facts=facts(PRETRAINED[NAME]))
    card += "".join(f"| {name} | {row['real']:.0%} | {row['drawn']:.0%} | {row['nearest']:.1f} |\n"
                    for name, row in rows.items())
    PRETRAINED[NAME].with_suffix(".md").write_text(card)
    store(rows=rows, real_nearest=real, over_time=over_time)
    print(card)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "model", "compare"))
    parser.add_argument("runs", type=Path, nargs="*", help="their folders")
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="earlier ones of the run")
    parser.add_argument("--data_root", type=Path, default=None)
    args = parser.parse_args()
    if args.what == "judge": train_judge(args.data_root)
    elif not args.runs: parser.error("name the folder of a run")
    elif args.what == "compare": compare(args.runs, args.data_root)
    elif len(args.runs) > 1: parser.error("model ships one run")
    else: measure_model(args.runs[0], args.checkpoints, args.data_root)

if __name__ == "__main__": main()
