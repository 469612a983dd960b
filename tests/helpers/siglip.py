"""A tiny SigLIP with a word-level tokenizer, and batches for it."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.models import shaken
from teacher import SigLIP, SigLIPConfig, TextConfig, VisionConfig

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


def random_clips(seed=0, B=3, T=2, size=12):
    """A batch as compute_targets takes it: video (B, T, 3, size, size), captions of 1, 2, ... words, seed."""
    g = torch.Generator().manual_seed(seed)
    captions = [" ".join(WORDS[i] for i in torch.randint(2, 10, (1 + b,), generator=g)) for b in range(B)]
    return SimpleNamespace(video=torch.randint(0, 256, (B, T, 3, size, size), generator=g, dtype=torch.uint8),
                           captions=captions, seed=11)
