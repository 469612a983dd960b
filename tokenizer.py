"""
Texts -> ids and back: the student's word-piece tokenizer.

    captions -> build_wordpiece -> tokenizer.json -> load_tokenizer -> encode_texts -> (M, L) ids -> decode_ids
"""

import os
from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from files import atomic_write_text, format_error, read_json, require, verify_tokenizer
from runtime import RunContext

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def special_token_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Return the ids of [PAD], [CLS] and [SEP]."""
    return tuple(tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]"))


def build_wordpiece(captions: Iterable[str], path: str, vocab_size: int = 2000, extra_texts: Iterable[str] = ()):
    """
    Write a BERT word-piece tokenizer of at most vocab_size entries to `path`: special tokens, letters, and the most
    frequent words as whole pieces; other words are spelt in letters.

    The same captions give the same file, which tokenizers.trainers.WordPieceTrainer does not guarantee. Entries that
    only extra_texts need come last, so they do not change the ids of the captions.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()

    def letters_and_words(texts):
        words = Counter(word for text in texts
                        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        letters = sorted(set("".join(words)))
        return [*letters, *(f"##{letter}" for letter in letters)], sorted(words, key=lambda word: (-words[word], word))

    letters, words = letters_and_words(captions)
    smallest = len(SPECIAL_TOKENS) + len(letters)
    if smallest > vocab_size:
        raise ValueError(f"vocab_size must be at least {smallest} (special tokens and letters), got {vocab_size}")
    extra_letters, extra_words = letters_and_words(extra_texts)
    pieces = [*SPECIAL_TOKENS, *letters, *words, *extra_letters, *extra_words]
    pieces = list(dict.fromkeys(pieces))[:vocab_size]                       # one-letter words are already there
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    atomic_write_text(path, tokenizer.to_str(pretty=True))


def read_tokenizer(path: str) -> Tokenizer:
    """
    Read a tokenizer.json, or the word pieces of a vocab.txt. ValueError if it is none, or if a tokenizer.json is not
    the one that the weights beside it were saved with.
    """
    try:
        if path.endswith(".txt"):
            pieces = models.WordPiece.read_file(path)       # piece -> id; before the first one may be a byte-order mark
            pieces = {piece if i else piece.removeprefix("\ufeff"): i for piece, i in pieces.items()}
            return Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
        verify_tokenizer(path)
        return Tokenizer.from_file(path)
    except (ValueError, OSError):
        raise
    except BaseException as error:      # the library raises plain Exception, and PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "vocab.txt" if path.endswith(".txt") else "tokenizer.json"
        raise ValueError(f"{path}: not a {kind} ({format_error(error)})") from None


def load_tokenizer(path: str) -> Tokenizer:
    """
    Load a tokenizer.json, a vocab.txt, or a folder that has one: ours, or that of a BERT checkpoint, which then
    behaves like BertTokenizerFast.

    If a tokenizer_config.json is next to it, its case, accent and Chinese options override those of the tokenizer;
    without one, a vocab.txt is lowercased.
    """
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in ("tokenizer.json", "vocab.txt")]
        path = next(filter(os.path.isfile, names), names[0])
    kind = "vocab.txt" if path.endswith(".txt") else "tokenizer.json"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such {kind}")
    tokenizer = read_tokenizer(path)
    if kind == "vocab.txt":
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; a BERT tokenizer must have {', '.join(SPECIAL_TOKENS)}")
    # The model uses id 0 for padding, and ids above [MASK] as words.
    require(ids["[PAD]"] == 0 and ids["[MASK]"] == max(ids.values()), path, "the order of its special tokens",
            "[PAD], id 0, first and [MASK] last", ids)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    size, largest_id = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values())
    require(largest_id == size - 1, path, "its largest id", f"{size - 1}, as it has {size} different entries",
            largest_id)
    config = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    options = read_json(config) if os.path.isfile(config) else {}
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for key, attribute in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                               ("tokenize_chinese_chars", "handle_chinese_chars")):
            value = options.get(key, getattr(tokenizer.normalizer, attribute))
            require(value in ((True, False, None) if key == "strip_accents" else (True, False)), config, key,
                    "true or false", value)
            setattr(tokenizer.normalizer, attribute, value)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def resolve_tokenizer(run: RunContext, captions: Iterable[str], text_folder: str) -> Tokenizer:
    """
    Load the tokenizer of a run: cfg.tokenizer if set, else the one in text_folder (of the text encoder) or next to the
    training annotations. If there is none, rank 0 builds one from the captions in the run's folder.
    """
    cfg = run.cfg
    built = os.path.join("out", cfg.name, "tokenizer.json")
    files = [os.path.join(folder, name) for folder in (text_folder, cfg.data.cache_folder())
             if folder for name in ("tokenizer.json", "vocab.txt")]
    path = cfg.tokenizer or next((file for file in files if os.path.isfile(file)), built)
    if path == built and run.rank == 0 and not os.path.isfile(built):
        build_wordpiece(captions, built)
    run.barrier()
    return load_tokenizer(path)


def encode_texts(tokenizer: Tokenizer, texts: list[str], max_length: int) -> Tensor:
    """
    M texts -> (M, L) int64, L = max_length: [CLS] and the pieces, truncated to L, padded with [PAD]. As in UMT there is
    no [SEP].
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 ([CLS] and a word), got {max_length}")
    pad, cls, _ = special_token_ids(tokenizer)
    ids = torch.full((len(texts), max_length), pad)                         # (M, L)
    for row, text in zip(ids, texts, strict=True):
        pieces = [cls, *tokenizer.encode(text, add_special_tokens=False).ids[:max_length - 1]]
        row[:len(pieces)] = torch.tensor(pieces)
    return ids


def encode_answers(tokenizer: Tokenizer, answers: list[str], max_length: int) -> Tensor:
    """
    A answers to generate -> (A, L) int64: [CLS], the pieces, [SEP], padded with [PAD]. An answer that is too long is
    truncated and then has no [SEP], so that the model does not learn to stop there.
    """
    pad, cls, sep = special_token_ids(tokenizer)
    ids = torch.full((len(answers), max_length), pad)                       # (A, L)
    for row, answer in zip(ids, answers, strict=True):
        pieces = [cls, *tokenizer.encode(answer, add_special_tokens=False).ids, sep][:max_length]
        row[:len(pieces)] = torch.tensor(pieces)
    return ids


def decode_ids(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """(A, L) ids, with or without [CLS] -> A texts: the pieces before the first [SEP], joined to words."""
    texts = []
    for row in ids.tolist():
        words = []
        for piece in (tokenizer.id_to_token(i) or "[UNK]" for i in row):    # a model may have more ids than pieces
            if piece == "[SEP]":
                break
            if piece.startswith("##") and words:
                words[-1] += piece[2:]
            elif piece not in ("[PAD]", "[CLS]"):
                words.append(piece)
        texts.append(" ".join(words))
    return texts
