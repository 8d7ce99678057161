"""Whatever a user types after a command, it runs if the options can work.

If not, it ends with exit code 2 and a message. There is never a traceback, and never a file.
"""
import collections
import contextlib
import functools
import io
import math
import re
import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_tutorial.objectives import LOSS_WEIGHTS, TIME_DISTRIBUTIONS
from ddpm_tutorial.run import check, evaluate, sample, train
from ddpm_tutorial.run.config import AUTOENCODERS, PRESETS, CodecConfig
from ddpm_tutorial.scheduler import SPACINGS
from ddpm_tutorial.solvers import METHODS

COMMANDS = {"ddpm_train": (train, "train", train.TrainOptions),
            "ddpm_sample": (sample, "sample_to_file", sample.SampleOptions),
            "ddpm_evaluate": (evaluate, "evaluate", evaluate.EvaluateOptions),
            "ddpm_check": (check, "check", check.CheckOptions)}
REQUIRED = {"ddpm_sample": ["--checkpoint", "a.pth", "--init_image", "a.png"]} # for a mask
WORK = {train: ("load_data", "load_checkpoint", "load_latest", "check_folder", "make_folder", "lock_folder",
                "write_atomic", "save_run", "start_wandb"),
        sample: ("load_model", "load_image", "make_folder", "write_atomic"),
        evaluate: ("load_fashion_mnist", "extract_features", "make_folder", "write_atomic"),
        check: ("load_data", "load_fashion_mnist", "save_checkpoint", "load_model")}
quiet = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

FACTS = ("image_shape", "classes", "student_steps", "vocabulary", "max_words", "text_fingerprint", "latents")

def leaves(cls, hidden=FACTS):
    "(name, type, default) of every field that is an option, including the nested ones."
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]): yield from leaves(hints[field.name])
        elif field.name not in hidden: yield field.name, hints[field.name], field.default

def values_of(options):
    "Field name to value, including the nested ones."
    found = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value): found |= values_of(value)
        else: found[field.name] = value
    return found

OPTIONS = {command: {name: kind for name, kind, _ in leaves(cls)}
           for command, (_, _, cls) in COMMANDS.items()}

# What a user may type if every other option is as in `small` or left out. `v` is a value of the field's type.
SMALL_LEVELS = (28, 14, 7)
PRECISIONS = ("auto", "fp32", "bf16")

def above(low): return lambda v: low < v < math.inf
def at_least(low): return lambda v: v is None or v >= low
def between(low, high): return lambda v: v is None or low <= v <= high
def one_of(*names): return lambda v: v in names
def ends_in(ending): return lambda v: v is None or v.suffix == ending
def not_negative(v): return v is None or 0 <= v < math.inf
def rising(v): return v is None or len(v) == 2 and 0 <= v[0] < v[1] < math.inf
def share(v): return 0 <= v < 1
def seed(v): return 0 <= v < 2**31
def anything(v): return True

ALLOWED = {
    "ddpm_train": dict(
        config=one_of(*PRESETS, *AUTOENCODERS), precision=one_of(*PRECISIONS), output_dir=anything,
        data_root=anything,
        device=anything, data=anything, resume_from=anything, resize=between(8, 4096),
        save_every=at_least(1), sample_every=at_least(1), log_every=at_least(1), epochs=at_least(1),
        max_steps=at_least(1), batch_size=at_least(1), warmup_steps=at_least(0), seed=seed,
        accumulate=between(1, 64),                          # at most the batch
        lr=above(0), grad_clip=above(0), weight_decay=not_negative, label_dropout=share, ema_decay=share,
        guidance_scale=not_negative, num_inference_steps=between(1, 500),
        method=one_of("ddim", "dpm++"),                     # the others refuse the eta of `small`
        schedule=one_of("linear", "cosine", "flow"),
        shift=between(0.001, 200),                          # leaves times to guide: levels 0.3 to 2
        spacing=one_of(*SPACINGS), guidance_interval=rising, eta=between(0, 1),
        prediction_type=one_of("epsilon", "sample", "v_prediction", "flow"),
        time_mean=one_of(None), time_std=one_of(None),      # of other times, and of a weight
        time_distribution=one_of(*TIME_DISTRIBUTIONS), loss_weight=one_of(*LOSS_WEIGHTS),
        min_snr_gamma=one_of(None), variance_type=one_of("fixed_small", "fixed_large"), num_steps=at_least(2),
        image_size=at_least(8),                             # leaves 2 pixels for the last of three levels
        patch_size=one_of(1, 2, 4),                         # divides 28, and leaves as many
        in_channels=at_least(1), num_classes=at_least(0), context_dim=at_least(0), num_res_blocks=at_least(1),
        text_encoder=one_of("none"), autoencoder=one_of(None), # `small` knows classes, and clips its samples
        text_width=lambda v: 0 < v <= 2**14 and v % 32 == 0, text_layers=between(1, 2**14),
        base_channels=lambda v: v > 0 and v % 8 == 0,       # the middle has four times as many; heads have 32
        channel_multipliers=lambda v: 1 <= len(v) <= 5 and min(v) > 0,     # 2 pixels for the last level
        attention_resolutions=lambda v: set(v) <= set(SMALL_LEVELS), attention=one_of("self", "linear"),
        head_dim=lambda v: v > 0 and 128 % v == 0, num_groups=lambda v: v > 0 and 32 % v == 0),
    "ddpm_sample": dict(
        checkpoint=anything, config=anything, output_dir=anything, device=anything, autoencoder=anything,
        text_encoder=anything,
        prompt=anything, prompt_file=anything, negative_prompt=anything, init_image=anything, mask=anything,
        strength=lambda v: v is None or 0 < v <= 1,
        output=lambda v: v is None or v.suffix.lower() in (".png", ".npz"),
        mode=one_of("grid", "class_grid", "progressive"), method=one_of(None, *METHODS),
        clip_sample=one_of(None, True, False), precision=one_of(*PRECISIONS), num_samples=at_least(1),
        class_label=at_least(0), num_inference_steps=at_least(1), batch_size=at_least(1), seed=seed,
        guidance_scale=not_negative, spacing=one_of(None, *SPACINGS),
        guidance_interval=rising, eta=between(0, 1)),
    "ddpm_evaluate": dict(
        checkpoint=anything, config=anything, data_root=anything, device=anything, autoencoder=anything,
        samples=ends_in(".npz"), output=ends_in(".json"), data=one_of("fashion_mnist", "sample"),
        method=one_of(None, *METHODS), clip_sample=one_of(None, True, False), precision=one_of(*PRECISIONS),
        num_samples=at_least(20), num_inference_steps=at_least(1), batch_size=at_least(1), seed=seed,
        guidance_scale=not_negative, spacing=one_of(None, *SPACINGS),
        guidance_interval=rising, eta=between(0, 1)),
    "ddpm_check": dict(
        config=one_of(*PRESETS, *AUTOENCODERS), data=anything, resize=between(8, 4096), data_root=anything,
        device=anything, precision=one_of(*PRECISIONS)),
}

@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """The options with which the runs were called. The runs themselves are replaced by stubs.

    Real work makes the test fail, and so does a file.
    """
    calls, folder = [], tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        for module, run, _ in COMMANDS.values(): patch.setattr(module, run, calls.append)
        for module, names in WORK.items():
            for name in names:
                patch.setattr(module, name, lambda *_, **__: pytest.fail("something was read or written"))
        patch.chdir(folder)
        # tyro reads our source at each call, which takes half of the time
        tokens = getattr(getattr(tyro, "_docstrings", None), "_ClassTokenization", None)
        if tokens: patch.setattr(tokens, "make", staticmethod(functools.cache(tokens.make)))
        patch.setenv("COLUMNS", "200")
        yield calls
        assert list(folder.iterdir()) == []

def typed(command, args, calls):
    """Exit code (0 also if the stub was called), what was printed, and the options that the stub got."""
    # like a terminal's: letters that cannot be encoded must not end in a traceback either
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    calls.clear()
    code = 0
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with pytest.MonkeyPatch.context() as patch, redirected[0], redirected[1]:
        patch.setattr(sys, "argv", [command, *args])
        try: getattr(COMMANDS[command][0], command)()
        except SystemExit as stop: code = stop.code
    for stream in (out, err): stream.flush()
    said = (out.buffer.getvalue() + err.buffer.getvalue()).decode()
    assert "Traceback" not in said, said
    assert len(calls) <= 1 and Path.cwd().exists() and not any(Path.cwd().iterdir())
    return code, said, calls[0] if calls else None

def names_it(field, said):
    "Whether the message contains the field's name, whatever box is drawn around it."
    text = " ".join(said.replace("│", " ").replace("--", " ").split()).replace("-", "_")
    return re.search(rf"(?<![a-z_]){field}(?![a-z_])", text) is not None

def describe_kind(kind):
    "(type, whether None is allowed). The type is int, float, bool, str, Path, tuple, or a tuple of choices."
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal: return args, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return describe_kind(next(a for a in args if a is not type(None)))[0], True
    return (tuple, False) if typing.get_origin(kind) is tuple else (kind, False)

# --- random command lines ---

NASTY = st.sampled_from([
    "", " ", "-", "--", "-1", "-0", "+3", "0", "1_0", "٣", "1e3", "1e400", "-1e400", "nan", "NaN",
    "-nan", "inf", "-inf", "Infinity", "0x10", "1.5", "1,2", "None", "none", "null", "True", "false",
    "[]", "()", "{}", "[1, 2]", "(1,2)", '{"lr": [1, {"a": 2}]}', "__import__('os').abort()", "%s",
    "%(prog)s", "{0}", "{prog}", "$HOME", "~", "*", "@args", "@/etc/hostname", "a=b", "=", "==", "\\",
    "\n", "a\nb", "\t", "\x1b[31m", "\x7f", "é", "日本", "🧥", "\u202e", "caf\udce9", "/", ".", "..",
    "a/../b.png", "x"*3000, "9"*30, "-" + "9"*30, "9"*5000, "1" + "0"*15, str(2**50), str(2**63),
    str(2**64), "0."+"0"*400+"1", "/etc/passwd", "a.png", "b.npz", "c.gif", "-h5", "--help=1", "[red]",
    "[/]", "[link=x]y[/link]"])
# Small, or far above what memory can hold: a command that does not check would build what lies between.
NUMBERS = st.one_of(st.integers(-3, 1000), st.integers(10**15, 10**40), st.integers(-10**40, -10**15),
                    st.floats(allow_nan=True, allow_infinity=True)).map(str)
LETTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
RUBBISH = st.one_of(NASTY, NUMBERS, st.text(LETTERS, max_size=12))

def good_values(command, name):
    "What belongs there: the choices, or what the presets have."
    only = {"samples": "a.npz", "output": "a.json", "num_samples": "20"}
    if command == "ddpm_evaluate" and name in only: return st.just([only[name]])
    kind, optional = describe_kind(OPTIONS[command][name])
    found = [values_of(preset)[name] for preset in PRESETS.values() if name in values_of(preset)]
    texts = {str(v) for v in found if not isinstance(v, tuple)} | ({"None"} if optional else set())
    if isinstance(kind, tuple): texts |= set(kind)
    if kind in (int, float): texts |= {"1", "2"}
    if kind in (str, Path): texts |= {"a", "b/c.png"}
    lists = [[str(part) for part in v] for v in found if isinstance(v, tuple)] if kind is tuple else []
    return st.sampled_from(sorted([text] for text in texts) + lists)

@st.composite
def misspelt(draw, name):
    "One letter missing, added, doubled, or two in the wrong order, and more."
    at = draw(st.integers(0, len(name) - 1))
    before, letter, after = name[:at], name[at:at + 1], name[at + 1:]
    swapped = before + name[at:at + 2][::-1] + name[at + 2:]
    return draw(st.sampled_from([before + after, before + "x" + letter + after, before + letter*2 + after,
                                 swapped, before, name.upper(), name.replace("_", ".")]))

def misnamed(draw, way, name, good):
    "A good value after a name that is wrong."
    if way == "typo": return [f"--{draw(misspelt(name))}", *good]
    if way == "prefixed": return [draw(st.sampled_from(["-", "---", "", "—"])) + name, *good]
    part = draw(st.sampled_from(["model", "train", "scheduler", "", "settings"]))
    return [f"--settings.{part}.{name}", *good]

def with_value(draw, way, name, good, rubbish):
    "The name with a value that is good, bad, missing, or one of several."
    if way == "good": return [f"--{name}", *good]
    if way == "equals": return [f"--{name}={' '.join(good)}"]
    if way == "bad": return [f"--{name}", draw(rubbish)]
    if way == "bad equals": return [f"--{name}={draw(rubbish)}"]
    if way == "none": return [f"--{name}"]
    if way == "many": return [f"--{name}", *good, *draw(st.lists(RUBBISH, max_size=4))]
    return [f"--no-{name}{draw(st.sampled_from(['', '=1', '=False']))}"]

WAYS = ["good"]*8 + ["bad", "bad equals"]*3 + ["equals", "none", "many", "no", "typo", "prefixed", "rubbish",
                                               "nested", "help"]

@st.composite
def piece(draw, command):
    "One option and what follows it, in one of many right and wrong ways."
    name = draw(st.sampled_from(sorted(OPTIONS[command])))
    if draw(st.integers(0, 9)) == 0: # perhaps another command's
        name = draw(st.sampled_from(sorted(set().union(*OPTIONS.values()))))
    is_flag = OPTIONS[command].get(name) is bool
    is_number = describe_kind(OPTIONS[command].get(name, str))[0] in (int, float)
    rubbish = RUBBISH | NUMBERS if is_number else RUBBISH
    good = [] if name not in OPTIONS[command] or is_flag else draw(good_values(command, name))
    if draw(st.booleans()): name = name.replace("_", "-")
    way = draw(st.sampled_from(WAYS))
    if way == "good" and is_flag: return [f"--no-{name}" if draw(st.booleans()) else f"--{name}"]
    if way in ("typo", "prefixed", "nested"): return misnamed(draw, way, name, good)
    if way == "help": return draw(st.sampled_from([[], ["--help"], ["-h"]]))
    if way == "rubbish": return draw(st.lists(RUBBISH, min_size=1, max_size=3))
    return with_value(draw, way, name, good, rubbish)

@st.composite
def command_line(draw):
    "A command and its arguments."
    commands = ["ddpm_train", "ddpm_train", "ddpm_sample", "ddpm_evaluate", "ddpm_check"]
    command = draw(st.sampled_from(commands))
    fewest = draw(st.sampled_from([0, 1, 1, 1, 1, 1, 1, 1, 1, 1]))
    pieces = draw(st.lists(piece(command), min_size=fewest, max_size=4))
    if command == "ddpm_sample" and draw(st.integers(0, 7)): pieces.append(["--checkpoint", "a.pth"])
    if pieces and draw(st.integers(0, 7)) == 0: pieces.append(draw(st.sampled_from(pieces))) # given twice
    return command, [arg for part in draw(st.permutations(pieces)) for arg in part]

def is_valid_autoencoder(options):
    "The same for a run of an autoencoder, which has fewer options."
    settings = options.settings
    assert isinstance(settings, CodecConfig) and min(options.save_every, options.log_every) >= 1
    assert 0 <= settings.kl_weight < math.inf and 0 <= settings.gradient_weight < math.inf
    assert settings.train.label_dropout == 0 and 1 <= settings.train.accumulate <= settings.train.batch_size
    assert settings.model.base_channels % settings.model.num_groups == 0

def is_valid(command, options):
    "Raises AssertionError unless each option has its type and is in the range that always holds."
    if isinstance(options, train.AutoencoderTrainOptions): return is_valid_autoencoder(options)
    values, kinds = values_of(options), OPTIONS[command]
    depends = {"num_steps", "num_inference_steps", "image_size", "patch_size", "base_channels",
               "channel_multipliers", "attention_resolutions", "head_dim", "num_groups", "accumulate",
               "output", "method", "time_mean", "text_encoder", "autoencoder"} # presets differ in these
    for name, kind in kinds.items():
        kind, optional = describe_kind(kind)
        value = values[name]
        right_type = value in kind if isinstance(kind, tuple) else isinstance(value, kind)
        assert optional and value is None or right_type, f"{name} is {value!r}"
        if name not in depends and kind is not bool:
            assert ALLOWED[command][name](value), f"{name} is {value!r}"
    if command == "ddpm_train":
        levels = options.settings.model.resolutions
        assert values["base_channels"] % values["num_groups"] == 0
        assert set(values["attention_resolutions"]) <= set(levels) and levels[-1] >= 2
        assert values["image_size"] % values["patch_size"] == 0 and min(values["channel_multipliers"]) >= 1
        assert 1 <= values["accumulate"] <= values["batch_size"]
        assert values["time_mean"] is None or values["time_distribution"] != "uniform"
        assert values["text_encoder"] == "none" or values["num_classes"] == 0
        assert values["autoencoder"] is None or not values["clip_sample"]
        assert values["method"] in (METHODS if values["eta"] == 0 else ("ddim", "dpm++"))
        steps = len(options.settings.scheduler.build())
        assert 1 <= options.settings.inference_steps <= values["num_steps"] == steps
    if command == "ddpm_sample":
        assert values["output"] is None or values["output"].suffix in (".png", ".npz", ".gif")
        assert values["init_image"] is not None or values["strength"] is values["mask"] is None

seen = collections.Counter()

@settings(quiet, max_examples=1000)
@given(command_line())
def test_no_command_line_is_too_strange(called, line):
    "The command runs with valid options, or shows help, or ends with exit code 2 and says why."
    command, args = line
    code, said, options = typed(command, args, called)
    assert code in (0, 2)
    if code == 2: assert options is None and said.strip()
    elif options is None: assert "usage:" in said
    else:
        is_valid(command, options)
        if command == "ddpm_train": # options that were left out are as in the preset
            text, values = " ".join(args).replace("-", "_"), values_of(options)
            for name, value in values_of((PRESETS | AUTOENCODERS)[options.config]).items():
                if name not in text: assert values[name] == value, f"{name} is {values[name]!r}"
    outcome = "run" if options is not None else "help"
    seen[command, "refused" if code == 2 else outcome] += 1

def test_the_random_lines_were_of_every_kind():
    "Each command ran and refused often enough, and help was shown."
    if not seen: pytest.skip("the test before this one was not run")
    assert sum(seen.values()) >= 1000, seen
    assert sum(n for (_, outcome), n in seen.items() if outcome == "help") >= 10, seen
    for command in COMMANDS: assert seen[command, "run"] >= 20 and seen[command, "refused"] >= 50, seen

# --- one field at a time ---

FIELDS = [(command, name) for command, kinds in OPTIONS.items()
          for name, kind in kinds.items() if kind is not bool]
CHOICES = {"schedule": ("linear", "cosine"), "prediction_type": ("epsilon", "sample", "v_prediction"),
           "variance_type": ("fixed_small", "fixed_large"), "attention": ("self", "linear")}
SIZES = ("num_steps", "base_channels", "num_groups", "in_channels", "num_res_blocks")
WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="-"), min_size=1,
                max_size=8)
PATHS = [Path(f"a{end}") for end in (".png", ".npz", ".gif", ".jpeg", "")]
INTEGERS = st.one_of(st.integers(-2, 40), st.integers(-10**30, -1),
                     st.sampled_from([56, 64, 96, 99, 100, 101, 499, 500, 501, 1000, 2**31 - 1]))
FLOATS = st.floats() | st.sampled_from([0., -0., 1., 0.999, 1 + 1e-9, -1e-300, 1e-300, 1e300, math.inf,
                                        -math.inf, math.nan])
LEVELS = st.integers(-1, 9) | st.sampled_from(SMALL_LEVELS)

def has_type(command, name, *kinds):
    return describe_kind(OPTIONS[command][name])[0] in kinds

def test_every_option_has_a_rule():
    "A new option needs a line in the table above."
    for command, rules in ALLOWED.items():
        assert rules.keys() == {name for other, name in FIELDS if other == command}

def values_of_kind(kind, name):
    "Values in and out of range: around the small numbers, and far away."
    if isinstance(kind, tuple): return st.sampled_from(kind) | WORDS
    if name in CHOICES: return st.sampled_from(CHOICES[name]) | WORDS
    if kind is str: return WORDS
    if kind is bool: return st.booleans() | WORDS
    if kind is Path: return WORDS.map(Path) | st.sampled_from(PATHS)
    if kind is float: return FLOATS
    if kind is tuple: return st.lists(LEVELS, max_size=7).map(tuple)
    # sizes may have a limit; see the last test
    return INTEGERS.filter(lambda v: v < 10**5) if name in SIZES else INTEGERS

def field_values(command, name):
    "Values of the field's own type, its default among them, and None where it is allowed."
    kind, optional = describe_kind(OPTIONS[command][name])
    found = values_of_kind(kind, name)
    defaults = [default for field, _, default in leaves(COMMANDS[command][2]) if field == name]
    defaults = [default for default in defaults if default is not MISSING and default is not None]
    if defaults: found = found | st.sampled_from(defaults)
    return found | st.none() if optional else found

def as_arguments(value):
    "The value as a user types it."
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]

@pytest.mark.parametrize("command, name", FIELDS)
def test_a_field_takes_what_is_allowed_and_nothing_else(command, name, called):
    """In range, the run is called with exactly this value.

    Out of range, the exit code is 2 and the message names the field.
    """
    required = REQUIRED.get(command, [])

    @settings(quiet, max_examples=25)
    @given(field_values(command, name))
    def try_it(value):
        code, said, options = typed(command, [*required, f"--{name}", *as_arguments(value)], called)
        if ALLOWED[command][name](value):
            assert code == 0 and options is not None, said
            given = values_of(options)[name]
            assert given == value and type(given) is type(value)
        else:
            assert code == 2 and options is None, f"--{name} {value} was taken"
            assert names_it(name, said), said
    try_it()

@pytest.mark.parametrize("command, name", [field for field in FIELDS if has_type(*field, int, float)])
@pytest.mark.parametrize("text", ["", "fast", "1,5", "0x10", "1.5.2", "--", "9"*5000, "-" + "9"*40])
def test_what_is_no_number_is_refused(command, name, text, called):
    "Wrong types, and numbers too large for a float. The message names the field."
    if text == "9"*5000 and name in ("image_size", "lr", "grad_clip", "weight_decay", "guidance_scale",
                                     "label_dropout", "ema_decay"): text = "1e400"
    code, said, options = typed(command, [*REQUIRED.get(command, []), f"--{name}", text], called)
    assert code == 2 and options is None and names_it(name, said), said

@pytest.mark.parametrize("name", [name for command, name in FIELDS
                                  if command == "ddpm_train" and has_type(command, name, int)])
@pytest.mark.parametrize("value", [10**15, 2**50, 2**63, 32*10**30])
def test_numbers_beyond_all_memory(name, value, called):
    "Such a number is accepted or refused, but nothing of that size is built. A refusal names the field."
    code, said, options = typed("ddpm_train", [f"--{name}", str(value)], called)
    assert code == 0 and values_of(options)[name] == value or code == 2 and names_it(name, said), said
