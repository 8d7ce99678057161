"Whatever is typed after a command: it runs with options that can work, or ends with exit code 2 and a message. Never a traceback, never a file."
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
from hypothesis import HealthCheck, given, settings, strategies as st

from ddpm_tutorial.fast_sampling import METHODS
from ddpm_tutorial.run import check, evaluate, sample, train
from ddpm_tutorial.run.config import PRESETS

COMMANDS = {"ddpm_train": (train, "train", train.TrainOptions), "ddpm_sample": (sample, "sample_to_file", sample.SampleOptions),
            "ddpm_evaluate": (evaluate, "evaluate", evaluate.EvaluateOptions),
            "ddpm_check": (check, "check", check.CheckOptions)}
WORK = {train: ("load_data", "load_checkpoint", "load_latest", "check_folder", "make_folder", "lock_folder", "write_atomic", "save_run", "start_wandb"),
        sample: ("load_model", "make_folder", "write_atomic"), evaluate: ("load_fashion_mnist", "extract_features", "make_folder", "write_atomic"), check: ("load_data", "load_fashion_mnist", "save_checkpoint", "load_model")}
quiet = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

def leaves(cls, hidden=("image_shape", "classes")):
    "(name, type, default) of every field that is an option, the nested ones too."
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]): yield from leaves(hints[field.name])
        elif field.name not in hidden: yield field.name, hints[field.name], field.default

def values_of(options):
    "Field name to value, the nested ones too."
    found = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value): found |= values_of(value)
        else: found[field.name] = value
    return found

OPTIONS = {command: {name: kind for name, kind, _ in leaves(cls)} for command, (_, _, cls) in COMMANDS.items()}

# What may be typed, with everything else as in `small` or not given. `v` is a value of the field's type.
SMALL_LEVELS = (28, 14, 7)
above, at_least = lambda low: lambda v: low < v < math.inf, lambda low: lambda v: v is None or v >= low
share, anything, seed = lambda v: 0 <= v < 1, lambda v: True, lambda v: 0 <= v < 2**31
one_of = lambda *names: lambda v: v in names
ALLOWED = {
    "ddpm_train": dict(
        config=one_of(*PRESETS), precision=one_of("auto", "fp32", "bf16"), output_dir=anything, data_root=anything, device=anything, data=anything, resume_from=anything, resize=lambda v: v is None or 8 <= v <= 4096,
        save_every=at_least(1), sample_every=at_least(1), log_every=at_least(1), epochs=at_least(1), max_steps=at_least(1), batch_size=at_least(1),
        warmup_steps=at_least(0), seed=seed, lr=above(0), grad_clip=above(0), weight_decay=lambda v: 0 <= v < math.inf, label_dropout=share, ema_decay=share,
        guidance_scale=lambda v: 0 <= v < math.inf, num_inference_steps=lambda v: v is None or 1 <= v <= 500,
        schedule=one_of("linear", "cosine"), method=one_of(*METHODS), prediction_type=one_of("epsilon", "sample", "v_prediction"), variance_type=one_of("fixed_small", "fixed_large"),
        num_steps=at_least(1),
        image_size=at_least(8),                                      # leaves 2 pixels for the last of three levels
        patch_size=one_of(1, 2, 4),                                  # divides 28, and leaves 2 pixels for the last of three levels
        in_channels=at_least(1), num_classes=at_least(0), num_res_blocks=at_least(1),
        base_channels=lambda v: v > 0 and v % 8 == 0,                # the middle has four times as many, in heads of 32
        channel_multipliers=lambda v: 1 <= len(v) <= 5 and min(v) > 0, # 2 pixels for the last
        attention_resolutions=lambda v: set(v) <= set(SMALL_LEVELS), attention=one_of("self", "linear"),
        head_dim=lambda v: v > 0 and 128 % v == 0, num_groups=lambda v: v > 0 and 32 % v == 0),
    "ddpm_sample": dict(
        checkpoint=anything, config=anything, output=lambda v: v is None or v.suffix.lower() in (".png", ".npz"), output_dir=anything, device=anything,
        mode=one_of("grid", "class_grid", "progressive"), method=one_of(None, *METHODS), clip_sample=one_of(None, True, False), precision=one_of("auto", "fp32", "bf16"),
        num_samples=at_least(1), class_label=at_least(0), num_inference_steps=at_least(1), batch_size=at_least(1), seed=seed,
        guidance_scale=lambda v: v is None or 0 <= v < math.inf),
    "ddpm_evaluate": dict(
        checkpoint=anything, config=anything, samples=lambda v: v is None or v.suffix == ".npz", output=lambda v: v is None or v.suffix == ".json", data_root=anything, device=anything,
        method=one_of(None, *METHODS), clip_sample=one_of(None, True, False), precision=one_of("auto", "fp32", "bf16"), data=one_of("fashion_mnist", "sample"),
        num_samples=at_least(20), num_inference_steps=at_least(1), batch_size=at_least(1), seed=seed, guidance_scale=lambda v: v is None or 0 <= v < math.inf),
    "ddpm_check": dict(config=one_of(*PRESETS), data=anything, resize=lambda v: v is None or 8 <= v <= 4096, data_root=anything, device=anything, precision=one_of("auto", "fp32", "bf16")),
}

@pytest.fixture(scope="module")
def called(tmp_path_factory):
    "The options with which the runs were called. The runs themselves are stubs; whoever works all the same is reported, and no file may come about."
    calls, folder = [], tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        for module, run, _ in COMMANDS.values(): patch.setattr(module, run, calls.append)
        for module, names in WORK.items():
            for name in names: patch.setattr(module, name, lambda *_, **__: pytest.fail("something was read or written"))
        patch.chdir(folder)
        tokens = getattr(getattr(tyro, "_docstrings", None), "_ClassTokenization", None) # tyro reads our source at each call: half of the time
        if tokens: patch.setattr(tokens, "make", staticmethod(functools.cache(tokens.make)))
        patch.setenv("COLUMNS", "200")
        yield calls
        assert list(folder.iterdir()) == []

def typed(command, args, calls):
    "Exit code (0 also when the stub was called), what was printed, and the options that the stub was called with."
    # as a terminal's: what cannot be encoded must not end in a traceback either
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    calls.clear()
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [command, *args])
        try: getattr(COMMANDS[command][0], command)()
        except SystemExit as stop: code = stop.code
    for stream in (out, err): stream.flush()
    said = (out.buffer.getvalue() + err.buffer.getvalue()).decode()
    assert "Traceback" not in said, said
    assert len(calls) <= 1 and Path.cwd().exists() and not any(Path.cwd().iterdir())
    return code, said, calls[0] if calls else None

def names_it(field, said):
    "Whether the message has the field's name, whatever the box around it."
    text = " ".join(said.replace("│", " ").replace("--", " ").split()).replace("-", "_")
    return re.search(rf"(?<![a-z_]){field}(?![a-z_])", text) is not None

def describe_kind(kind):
    "(type, whether None may be typed) of a field: int, float, bool, str, Path, tuple, or a tuple of choices."
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal: return args, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType): return describe_kind(next(a for a in args if a is not type(None)))[0], True
    return (tuple, False) if typing.get_origin(kind) is tuple else (kind, False)

# --- random command lines ---

NASTY = st.sampled_from(["", " ", "-", "--", "-1", "-0", "+3", "0", "1_0", "٣", "1e3", "1e400", "-1e400", "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "0x10", "1.5", "1,2", "None",
    "none", "null", "True", "false", "[]", "()", "{}", "[1, 2]", "(1,2)", '{"lr": [1, {"a": 2}]}', "__import__('os').abort()", "%s", "%(prog)s", "{0}", "{prog}", "$HOME", "~", "*", "@args",
    "@/etc/hostname", "a=b", "=", "==", "\\", "\n", "a\nb", "\t", "\x1b[31m", "\x7f", "é", "日本", "🧥", "\u202e", "caf\udce9", "/", ".", "..", "a/../b.png", "x"*3000, "9"*30, "-" + "9"*30, "9"*5000,
    "1" + "0"*15, str(2**50), str(2**63), str(2**64), "0."+"0"*400+"1", "/etc/passwd", "a.png", "b.npz", "c.gif", "-h5", "--help=1", "[red]", "[/]", "[link=x]y[/link]"])
# far above what memory holds, or small: what lies between would really be built by a command that does not look
NUMBERS = st.one_of(st.integers(-3, 1000), st.integers(10**15, 10**40), st.integers(-10**40, -10**15), st.floats(allow_nan=True, allow_infinity=True)).map(str)
RUBBISH = st.one_of(NASTY, NUMBERS, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12))

def good_values(command, name):
    "What belongs there: the choices, or what the presets have."
    only = {"samples": "a.npz", "output": "a.json", "num_samples": "20"}.get(name) if command == "ddpm_evaluate" else None
    if only: return st.just([only])
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
    "One letter too few, too many, another, or two in the wrong order."
    at = draw(st.integers(0, len(name) - 1))
    return draw(st.sampled_from([name[:at] + name[at + 1:], name[:at] + "x" + name[at:], name[:at] + name[at:at + 1]*2 + name[at + 1:],
                                 name[:at] + name[at:at + 2][::-1] + name[at + 2:], name[:at], name.upper(), name.replace("_", ".")]))

@st.composite
def piece(draw, command):
    "One option with what follows it, in one of many right and wrong ways."
    name = draw(st.sampled_from(sorted(OPTIONS[command])))
    if draw(st.integers(0, 9)) == 0: name = draw(st.sampled_from(sorted(set().union(*OPTIONS.values())))) # perhaps another command's
    is_flag = OPTIONS[command].get(name) is bool
    rubbish = RUBBISH | NUMBERS if describe_kind(OPTIONS[command].get(name, str))[0] in (int, float) else RUBBISH
    good = [] if name not in OPTIONS[command] or is_flag else draw(good_values(command, name))
    if draw(st.booleans()): name = name.replace("_", "-")
    way = draw(st.sampled_from(["good"]*8 + ["bad", "bad equals"]*3 + ["equals", "none", "many", "no", "typo", "prefixed", "rubbish", "nested", "help"]))
    if way == "good": return [f"--{'no-'*draw(st.booleans())}{name}"] if is_flag else [f"--{name}", *good]
    if way == "equals": return [f"--{name}={' '.join(good)}"]
    if way == "bad": return [f"--{name}", draw(rubbish)]
    if way == "bad equals": return [f"--{name}={draw(rubbish)}"]
    if way == "none": return [f"--{name}"]
    if way == "many": return [f"--{name}", *good, *draw(st.lists(RUBBISH, max_size=4))]
    if way == "no": return [f"--no-{name}{draw(st.sampled_from(['', '=1', '=False']))}"]
    if way == "typo": return [f"--{draw(misspelt(name))}", *good]
    if way == "prefixed": return [draw(st.sampled_from(["-", "---", "", "—"])) + name, *good]
    if way == "nested": return [f"--settings.{draw(st.sampled_from(['model', 'train', 'scheduler', '', 'settings']))}.{name}", *good]
    if way == "help": return draw(st.sampled_from([[], ["--help"], ["-h"]]))
    return draw(st.lists(RUBBISH, min_size=1, max_size=3))

@st.composite
def command_line(draw):
    "A command and its arguments."
    command = draw(st.sampled_from(["ddpm_train", "ddpm_train", "ddpm_sample", "ddpm_evaluate", "ddpm_check"]))
    pieces = draw(st.lists(piece(command), min_size=draw(st.sampled_from([0, 1, 1, 1, 1, 1, 1, 1, 1, 1])), max_size=4))
    if command == "ddpm_sample" and draw(st.integers(0, 7)): pieces.append(["--checkpoint", "a.pth"])
    if pieces and draw(st.integers(0, 7)) == 0: pieces.append(draw(st.sampled_from(pieces))) # said twice
    return command, [arg for part in draw(st.permutations(pieces)) for arg in part]

def is_valid(command, options):
    "Raises AssertionError unless the options are of the right types, and each is in the range that holds whatever the others are."
    values, kinds = values_of(options), OPTIONS[command]
    depends = {"num_steps", "num_inference_steps", "image_size", "patch_size", "base_channels", "channel_multipliers", "attention_resolutions", "head_dim", "num_groups", "output"}
    for name, kind in kinds.items():
        kind, optional = describe_kind(kind)
        value = values[name]
        assert optional and value is None or (value in kind if isinstance(kind, tuple) else isinstance(value, kind)), f"{name} is {value!r}"
        if name not in depends and kind is not bool: assert ALLOWED[command][name](value), f"{name} is {value!r}"
    if command == "ddpm_train":
        levels = options.settings.model.resolutions
        assert values["base_channels"] % values["num_groups"] == 0 and set(values["attention_resolutions"]) <= set(levels) and levels[-1] >= 2
        assert values["image_size"] % values["patch_size"] == 0 and min(values["channel_multipliers"]) >= 1
        assert 1 <= options.settings.inference_steps <= values["num_steps"] == len(options.settings.scheduler.build())
    if command == "ddpm_sample" and values["output"]: assert values["output"].suffix in (".png", ".npz", ".gif")

seen = collections.Counter()

@settings(quiet, max_examples=1000)
@given(command_line())
def test_no_command_line_is_too_strange(called, line):
    "It runs with valid options, or shows help, or ends with exit code 2 and says why."
    command, args = line
    code, said, options = typed(command, args, called)
    assert code in (0, 2)
    if code == 2: assert options is None and said.strip()
    elif options is None: assert "usage:" in said
    else:
        is_valid(command, options)
        if command == "ddpm_train": # what was not typed is as in the preset that was
            text = " ".join(args).replace("-", "_")
            for name, value in values_of(PRESETS[options.config]).items():
                if name not in text: assert values_of(options)[name] == value, f"{name} is {values_of(options)[name]!r}"
    seen[command, "refused" if code == 2 else "help" if options is None else "run"] += 1

def test_the_random_lines_were_of_every_kind():
    "Each command ran and refused, and not only now and then; help came up."
    if not seen: pytest.skip("the test before this one was not run")
    assert sum(seen.values()) >= 1000 and sum(n for (_, what), n in seen.items() if what == "help") >= 10, seen
    for command in COMMANDS: assert seen[command, "run"] >= 20 and seen[command, "refused"] >= 50, seen

# --- one field at a time ---

FIELDS = [(command, name) for command, kinds in OPTIONS.items() for name, kind in kinds.items() if kind is not bool]

def test_every_option_has_a_rule():
    "A new option needs a line in the table above."
    for command, rules in ALLOWED.items(): assert rules.keys() == {name for other, name in FIELDS if other == command}

def field_values(command, name):
    "Values of the field's own type, in and out of range: around the small numbers, and far away."
    kind, optional = describe_kind(OPTIONS[command][name])
    defaults = [default for field, _, default in leaves(COMMANDS[command][2]) if field == name and default is not MISSING and default is not None]
    choices = {"schedule": ("linear", "cosine"), "prediction_type": ("epsilon", "sample", "v_prediction"), "variance_type": ("fixed_small", "fixed_large"), "attention": ("self", "linear")}
    words = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="-"), min_size=1, max_size=8)
    if isinstance(kind, tuple): found = st.sampled_from(kind) | words
    elif name in choices: found = st.sampled_from(choices[name]) | words
    elif kind is str: found = words
    elif kind is bool: found = st.booleans() | words
    elif kind is Path: found = words.map(Path) | st.sampled_from([Path(f"a{end}") for end in (".png", ".npz", ".gif", ".jpeg", "")])
    elif kind is int:
        found = st.integers(-2, 40) | st.sampled_from([56, 64, 96, 99, 100, 101, 499, 500, 501, 1000, 2**31 - 1]) | st.integers(-10**30, -1)
        if name in ("num_steps", "base_channels", "num_groups", "in_channels", "num_res_blocks"): found = found.filter(lambda v: v < 10**5) # may have a limit; see below
    elif kind is float: found = st.floats() | st.sampled_from([0., -0., 1., 0.999, 1 + 1e-9, -1e-300, 1e-300, 1e300, math.inf, -math.inf, math.nan])
    elif kind is tuple: found = st.lists(st.integers(-1, 9) | st.sampled_from([7, 14, 28]), max_size=7).map(tuple)
    found = found if not defaults else found | st.sampled_from(defaults)
    return found | st.none() if optional else found

def as_arguments(value):
    "What one would type."
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]

@pytest.mark.parametrize("command, name", FIELDS)
def test_a_field_takes_what_is_allowed_and_nothing_else(command, name, called):
    "In range: the run is called with just this value. Out of range: exit code 2, and the message names the field."
    required = ["--checkpoint", "a.pth"]*(command == "ddpm_sample")

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

@pytest.mark.parametrize("command, name", [(command, name) for command, name in FIELDS if describe_kind(OPTIONS[command][name])[0] in (int, float)])
@pytest.mark.parametrize("text", ["", "fast", "1,5", "0x10", "1.5.2", "--", "9"*5000, "-" + "9"*40])
def test_what_is_no_number_is_refused(command, name, text, called):
    "Wrong types, and numbers beyond all numbers; the field is named."
    if name in ("image_size", "lr", "grad_clip", "weight_decay", "guidance_scale", "label_dropout", "ema_decay", "weight_decay") and text == "9"*5000: text = "1e400"
    code, said, options = typed(command, [*["--checkpoint", "a.pth"]*(command == "ddpm_sample"), f"--{name}", text], called)
    assert code == 2 and options is None and names_it(name, said), said

@pytest.mark.parametrize("name", [name for command, name in FIELDS if command == "ddpm_train" and describe_kind(OPTIONS[command][name])[0] is int])
@pytest.mark.parametrize("value", [10**15, 2**50, 2**63, 32*10**30])
def test_numbers_beyond_all_memory(name, value, called):
    "Taken or refused, but nothing is built of that size, and who is refused learns why."
    code, said, options = typed("ddpm_train", [f"--{name}", str(value)], called)
    assert code == 0 and values_of(options)[name] == value or code == 2 and names_it(name, said), said
