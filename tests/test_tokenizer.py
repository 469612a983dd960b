"""tokenizer.py: construction, the tokenizer of a run, loading as BertTokenizerFast does, and texts <-> ids."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import hugging_face, minilm_folder
from tokenizers import Tokenizer

from data import DataConfig
from encoders import Bert
from runtime import RunContext
from tokenizer import (
    SPECIAL_TOKENS,
    build_wordpiece,
    decode_ids,
    encode_answers,
    encode_texts,
    load_tokenizer,
    resolve_tokenizer,
    special_token_ids,
)

WORDS = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK]".split()
PAD, CLS, SEP = 0, 2, 3                             # of tokenizers that build_wordpiece made


def build(folder, texts, **options):
    path = str(folder / "tokenizer.json")
    build_wordpiece(texts, path, **options)
    return load_tokenizer(path)


# ---------------------------------------------------------------------------------------------------------------------
# Construction

def test_the_same_captions_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    captions = [" ".join(f"word{i}" for i in rng.integers(40, size=6)) for _ in range(200)]
    for name, order in (("a", captions), ("b", captions[::-1])):
        build_wordpiece(order, str(tmp_path / name))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() and sorted(os.listdir(tmp_path)) == ["a", "b"]
    with pytest.raises(ValueError, match="vocab_size.*20"):
        build_wordpiece(captions, str(tmp_path / "c"), vocab_size=20)


def test_frequent_words_come_first_and_extra_texts_last(tmp_path):
    captions = ["red ring", "red square", "a red ring"]
    plain = build(tmp_path, captions).get_vocab()
    letters = sorted(set("".join(captions)) - {" "})
    expected = [*SPECIAL_TOKENS, *letters, *(f"##{c}" for c in letters), "red", "ring", "square"]      # "a" is a letter
    assert sorted(plain, key=plain.get) == expected
    extended = build(tmp_path, captions, extra_texts=["red zoo"]).get_vocab()
    assert sorted(extended, key=extended.get) == [*expected, "o", "z", "##o", "##z", "zoo"]
    cut = build(tmp_path, captions, vocab_size=len(expected) - 1).get_vocab()
    assert sorted(cut, key=cut.get) == expected[:-1]


def test_the_tokenizer_of_a_run_is_the_given_one_the_encoders_the_datas_or_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("given", "encoder", "corpus"):
        os.makedirs(name)
        build_wordpiece([name], f"{name}/tokenizer.json")
    os.makedirs("out/a")
    os.makedirs("other")
    cfg = SimpleNamespace(name="a", tokenizer="", data=DataConfig(train_file="elsewhere/train.json"))
    words = lambda text_folder: resolve_tokenizer(RunContext(cfg, "", torch.device("cpu"), 0, 1), ["built"],
                                                  text_folder).get_vocab().keys()
    assert "built" in words("") and os.path.isfile("out/a/tokenizer.json")
    for folder in ("corpus", "other"):
        open(f"{folder}/0.tar", "w").close()
    for train_file in ("corpus/train.json", "{corpus,other}/0.tar"):        # shards: the folder of the first
        cfg.data = DataConfig(train_file=train_file)
        assert "corpus" in words("") and "encoder" in words("encoder")
    cfg.tokenizer = "given"
    assert "given" in words("encoder")


# ---------------------------------------------------------------------------------------------------------------------
# Texts and ids

def test_texts_are_encoded_without_sep_and_truncated(tmp_path):
    tokenizer = build(tmp_path, ["a red square grows", "a red ring"] * 2 + ["a blue ring moves"], vocab_size=60)
    ids = encode_texts(tokenizer, ["A RED ring", "a red square grows", "suds", "日"], 5)
    assert ids.dtype == torch.int64 and ids.shape == (4, 5)
    pieces = [[tokenizer.id_to_token(i) for i in row] for row in ids.tolist()]
    assert pieces[0] == ["[CLS]", "a", "red", "ring", "[PAD]"] and ids[0, -1] == 0
    assert pieces[1] == ["[CLS]", "a", "red", "square", "grows"]
    assert pieces[2] == ["[CLS]", "s", "##u", "##d", "##s"]                 # an unknown word is spelt
    assert pieces[3] == ["[CLS]", "[UNK]", "[PAD]", "[PAD]", "[PAD]"]
    assert (encode_texts(tokenizer, ["a red square grows"], 3) == ids[1:2, :3]).all()
    with pytest.raises(ValueError, match="max_length.*2.*1"):
        encode_texts(tokenizer, ["a"], 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("words"), ["a red cat", "a blue cat sat", "what is it", "rab"])


def test_answers_end_in_sep_and_are_decoded_to_the_text(tokenizer):
    texts = ["cat", "a red cat", "crab", "cats sat it", "", "A Red CAT", "red  cat"]
    ids = encode_answers(tokenizer, texts, 14)
    assert decode_ids(tokenizer, ids) == decode_ids(tokenizer, ids[:, 1:]) == [
        "cat", "a red cat", "crab", "cats sat it", "", "a red cat", "red cat"]
    for row, text in zip(ids.tolist(), texts, strict=True):
        pieces = tokenizer.encode(text, add_special_tokens=False).ids
        assert row == ([CLS, *pieces, SEP] + [0] * 14)[:14]
    assert [tokenizer.id_to_token(i) for i in ids[2].tolist() if i] == ["[CLS]", "c", "##r", "##a", "##b", "[SEP]"]


@pytest.mark.parametrize("length, text", [(8, "crab sat"), (7, "crab sat"), (6, "crab sat"), (5, "crab"), (4, "cra")])
def test_answers_that_are_too_long_have_no_sep(tokenizer, length, text):
    ids, = encode_answers(tokenizer, ["crab sat"], length)                  # 5 pieces
    assert (SEP in ids.tolist()) == (length >= 7) and ids.shape == (length,)
    assert decode_ids(tokenizer, ids[None]) == [text]


def test_nothing_after_the_first_sep_is_decoded(tokenizer):
    cat, red, unknown, b = (tokenizer.token_to_id(piece) for piece in ("cat", "red", "[UNK]", "##b"))
    rows = [[CLS, cat, SEP, red, SEP], [CLS, SEP, cat, 0, 0], [SEP, 0, 0, 0, 0], [CLS, b, red, b, 0],
            [cat, unknown, CLS, red, SEP], [cat, 9999, SEP, 0, 0]]
    assert decode_ids(tokenizer, torch.tensor(rows)) == ["cat", "", "", "##b redb", "cat [UNK] red", "cat [UNK]"]


def test_special_token_ids(tokenizer):
    assert special_token_ids(tokenizer) == (PAD, CLS, SEP) and Bert.PAD_ID == PAD


# ---------------------------------------------------------------------------------------------------------------------
# Loading, against BertTokenizerFast

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
    """AWKWARD, and random strings of its characters and pieces and of all of Unicode."""
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


def check_encoding(folder, path=None):
    """encode_texts equals BertTokenizerFast on every awkward string, at several lengths; returns the ids."""
    reference = hugging_face().BertTokenizerFast.from_pretrained(folder)
    tokenizer = load_tokenizer(str(path or folder))
    texts = awkward()
    assert len(texts) >= 200
    pieces = [reference(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    for length in (3, 32, 512):
        ids = encode_texts(tokenizer, texts, length)
        expected = [([reference.cls_token_id, *p] + [0] * length)[:length] for p in pieces]
        wrong = [text for text, a, b in zip(texts, ids.tolist(), expected, strict=True) if a != b]
        assert not wrong, (length, wrong)
    return ids


@pytest.mark.parametrize("options", [
    None, dict(do_lower_case=True), dict(do_lower_case=False), dict(strip_accents=False, do_lower_case=True),
    dict(strip_accents=True, do_lower_case=False), dict(tokenize_chinese_chars=False),
    dict(do_lower_case=True, strip_accents=None, model_max_length=512),
], ids=str)
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_encoding_equals_bert_tokenizer_fast(tmp_path, file, options):
    write_vocabulary(tmp_path, **(options or {}))
    if file == "tokenizer.json":                    # one that disagrees with the options, and pads and truncates
        load_tokenizer(str(tmp_path / "vocab.txt")).save(str(tmp_path / file))
        tokenizer = Tokenizer.from_file(str(tmp_path / file))
        if options and "do_lower_case" in options:
            tokenizer.normalizer.lowercase = not options["do_lower_case"]
        tokenizer.enable_truncation(7)
        tokenizer.enable_padding(length=9)
        tokenizer.save(str(tmp_path / file))
        (tmp_path / "vocab.txt").unlink()
    check_encoding(tmp_path, tmp_path / file)
    check_encoding(tmp_path)


def test_encoding_of_a_real_vocabulary_equals_bert_tokenizer_fast():
    folder = minilm_folder()
    assert check_encoding(folder).unique().numel() > 400
    assert torch.equal(encode_texts(load_tokenizer(f"{folder}/vocab.txt"), awkward(), 40),
                       encode_texts(load_tokenizer(f"{folder}/tokenizer.json"), awkward(), 40))


def test_options_change_the_pieces(tmp_path):
    pieces = {}
    for name, options in dict(a={}, b=dict(do_lower_case=False), c=dict(strip_accents=False),
                              d=dict(tokenize_chinese_chars=False)).items():
        (tmp_path / name).mkdir()
        write_vocabulary(tmp_path / name, **options)
        tokenizer = load_tokenizer(str(tmp_path / name))
        ids = encode_texts(tokenizer, ["A Café 中b"], 9)[0].tolist()
        pieces[name] = " ".join(tokenizer.id_to_token(i) for i in ids if i)
    assert pieces["a"] == "[CLS] a cafe 中 b" and pieces["b"].startswith("[CLS] A C ##a")
    assert pieces["c"] == "[CLS] a café 中 b" and pieces["d"] != pieces["a"]


def test_tokenizer_json_without_a_config_keeps_its_options(tmp_path):
    write_vocabulary(tmp_path, do_lower_case=False)
    (tmp_path / "saved").mkdir()
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save(str(tmp_path / "saved" / "tokenizer.json"))
    again = load_tokenizer(str(tmp_path / "saved"))
    assert torch.equal(encode_texts(again, awkward(), 20), encode_texts(tokenizer, awkward(), 20))


def test_tokenizer_json_is_preferred_to_vocab_txt(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "red"]))
    build_wordpiece(["a red square", "a blue one"], str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.token_to_id("blue") and not tokenizer.token_to_id("[unused0]")
    assert not load_tokenizer(str(tmp_path / "vocab.txt")).token_to_id("blue")


@pytest.mark.parametrize("words, message", [
    (WORDS[1:], r"lacks \[PAD\];"),
    (["[UNK]", "[CLS]"], r"lacks \[PAD\], \[SEP\], \[MASK\];"),
    (["a", *WORDS], r"special tokens.*'\[PAD\]': 1,"),
    ([*WORDS[:3], "[MASK]", "[CLS]", "[SEP]"], r"special tokens.*'\[MASK\]': 3"),
    ([*WORDS, "red", "blue", "red"], r"largest id must be 7, as it has 8 different entries, got 8"),
])
def test_unusable_vocabularies_are_refused(tmp_path, words, message):
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/vocab\.txt: .*{message}") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", b"{}", r"tokenizer\.json: not a tokenizer\.json"),
    ("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "normalizer": {"type": "Precompiled", '
                       b'"precompiled_charsmap": "AAAA"}, "model": {"type": "WordPiece", "vocab": {}, "unk_token": "", '
                       b'"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}',
     r"tokenizer\.json: not a tokenizer\.json \(PanicException"),
    ("vocab.txt", b"[PAD]\n\xff\xfe\n", r"vocab\.txt: not a vocab\.txt"),
    ("tokenizer_config.json", b'{"do_lower_case": "yes"}', r"tokenizer_config\.json: do_lower_case .*'yes'"),
])
def test_broken_files_are_refused_in_one_line(tmp_path, name, content, message):
    write_vocabulary(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_tokenizer_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such"):
            load_tokenizer(str(path))
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt: no such"):
        load_tokenizer(str(tmp_path / "vocab.txt"))
