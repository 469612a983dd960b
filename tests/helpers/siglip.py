"""A tiny SigLIP with a word-level tokenizer, and batches for it; what transformers has for a SigLIP's folder."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from helpers.models import hugging_face, shaken
from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from teacher import SigLIP

WORDS = "[PAD] [UNK] a red blue square circle moves left right".split()


def word_tokenizer():
    """A tokenizer whose ids are the indices in WORDS."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def tiny_siglip(text_width=16, act="gelu_pytorch_tanh", size=12, patch=4):
    """A SigLIP in fp64 for frames of 12 x 12 pixels with patches of 4; E = 16."""
    torch.manual_seed(0)
    vision = VisionConfig(16, 24, 2, 2, image_size=size, patch_size=patch, hidden_act=act)
    text = TextConfig(text_width, 20, 2, 4, len(WORDS), max_position_embeddings=6, pad_token_id=0, hidden_act=act)
    return shaken(SigLIP(SigLIPConfig(vision, text), word_tokenizer()))


def map_head(head, x):
    """The MAP head on tokens x (S, C) and nothing else, with PyTorch's attention -> (E,), its weights (S,)."""
    C = x.shape[-1]
    mha = nn.MultiheadAttention(C, head.attention.heads, batch_first=True).to(x.dtype)
    mha.load_state_dict(head.attention.state_dict())
    y, weights = mha(head.probe, x[None], x[None], average_attn_weights=True)
    return (y + head.mlp(head.layernorm(y)))[0, 0], weights[0, 0]


def random_clips(seed=0, B=3, T=2, size=12):
    """A batch as compute_targets takes it: video (B, T, 3, size, size), captions of 1, 2, ... words, seed."""
    g = torch.Generator().manual_seed(seed)
    captions = [" ".join(WORDS[i] for i in torch.randint(2, 10, (1 + b,), generator=g)) for b in range(B)]
    return SimpleNamespace(video=torch.randint(0, 256, (B, T, 3, size, size), generator=g, dtype=torch.uint8),
                           captions=captions, seed=11)


def edit_json(path, **changes):
    """Change a JSON file as a person would, without a checksum: a__b is field b of part a; ... takes a field away."""
    values = json.loads(path.read_text())
    values.pop("checksum", None)
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        where = values[part] if part else values
        where[name] = value
        if value is ...:
            del where[name]
    path.write_text(json.dumps(values))


# ---------------------------------------------------------------------------------------------------------------------
# transformers

def to_hugging_face(model):
    """transformers' SigLIP with the same weights, which are loaded strictly by name."""
    hf, c = hugging_face(), model.cfg
    text = {**vars(c.text_config), "projection_size": c.vision_config.hidden_size}
    config = hf.SiglipConfig(text_config=text, vision_config=vars(c.vision_config), attn_implementation="sdpa")
    other = hf.SiglipModel(config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def image_processor_class():
    """transformers' image processor of SigLIP that resizes with Pillow."""
    hf = hugging_face()
    pytest.importorskip("PIL")
    return hf.SiglipImageProcessorPil if hasattr(hf, "SiglipImageProcessorPil") else hf.SiglipImageProcessor


def sentencepiece_tokenizer(folder):
    """transformers' tokenizer of SigLIP, with a small vocabulary."""
    pytest.importorskip("google.protobuf")
    sentencepiece, hf = pytest.importorskip("sentencepiece"), hugging_face()
    corpus = [f"a {c} {o} moves {w}" for c in ("red", "blue", "green") for o in ("dog", "it", "its", "café", "square")
              for w in ("left", "right", "up", "ός")] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=f"{folder}/trained", vocab_size=60, hard_vocab_limit=False,
        unk_id=2, eos_id=1, bos_id=-1, pad_id=-1, minloglevel=2)
    return hf.SiglipTokenizer(f"{folder}/trained.model")
