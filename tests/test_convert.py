"""Conversion: UMT's encoder and its answers as an independent statement computes, every key told, what is refused."""

import collections
import glob
import json
import math
import os
import re
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from test_train import assert_one_line, command
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import decoding
import eval as scoring
from model import ClusterSTM, ModelConfig, VideoToText, ViT, bert_config, load_model
from tasks import TASKS
from teacher import known, load_weights, read_folder
from tools import convert

KINDS = {"stage 1": 8, "stage 2": 4, "retrieval": 12, "QA": 12}                 # frames
TINY = dict(C=128, depth=3, D=64, layers=3, fusion=2, words=110, E=24, teacher=16)
BASE = dict(C=768, depth=12, D=768, layers=12, fusion=3, words=30522, E=512, teacher=512)
LARGE = dict(C=1024, depth=24, D=1024, layers=24, fusion=5, words=30522, E=768, teacher=768)


# ---------------------------------------------------------------------------------------------------------------------
# UMT's files: the keys and shapes of its modules

def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, C):
    return {f"{name}.weight": (C,), f"{name}.bias": (C,)}


def umt_vit(C, depth, teacher, align):
    keys = {"encoder.patch_embed.proj.weight": (C, 3, 1, 16, 16), "encoder.patch_embed.proj.bias": (C,)}
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        keys |= norm(f"{block}.norm1", C) | {f"{block}.attn.q_bias": (C,), f"{block}.attn.v_bias": (C,),
                                             f"{block}.attn.qkv.weight": (3 * C, C)}
        keys |= linear(f"{block}.attn.proj", C, C) | norm(f"{block}.norm2", C)
        keys |= linear(f"{block}.mlp.fc1", 4 * C, C) | linear(f"{block}.mlp.fc2", C, 4 * C)
    keys |= norm("encoder.norm", C)
    for j in range(6 if align else 0):
        keys |= linear(f"clip_decoder.{j}.head", teacher, C) | norm(f"clip_decoder.{j}.norm", teacher)
    return keys


def umt_bert(name, D, layers, cross, words, context):
    """`cross`: the layers that look at something of `context` channels."""
    keys = {f"{name}embeddings.position_ids": (1, 512), f"{name}embeddings.word_embeddings.weight": (words, D),
            f"{name}embeddings.position_embeddings.weight": (512, D),
            f"{name}embeddings.token_type_embeddings.weight": (2, D)} | norm(f"{name}embeddings.LayerNorm", D)
    for n in range(layers):
        layer = f"{name}encoder.layer.{n}"
        for kind, into in [("attention", D)] + [("crossattention", context)] * (n in cross):
            keys |= linear(f"{layer}.{kind}.self.query", D, D) | linear(f"{layer}.{kind}.self.key", D, into)
            keys |= linear(f"{layer}.{kind}.self.value", D, into) | linear(f"{layer}.{kind}.output.dense", D, D)
            keys |= norm(f"{layer}.{kind}.output.LayerNorm", D)
        keys |= linear(f"{layer}.intermediate.dense", 4 * D, D) | linear(f"{layer}.output.dense", D, 4 * D)
        keys |= norm(f"{layer}.output.LayerNorm", D)
    return keys


def umt_cls(name, D, words):
    return {f"{name}.bias": (words,), **linear(f"{name}.transform.dense", D, D),
            **norm(f"{name}.transform.LayerNorm", D), **linear(f"{name}.decoder", words, D)}


def umt(kind, C, depth, D, layers, fusion, words, E, teacher):
    """The keys of a file and their shapes."""
    if kind == "stage 1":
        return umt_vit(C, depth, teacher, True)
    keys = {f"vision_encoder.{key}": shape for key, shape in umt_vit(C, depth, teacher, kind == "stage 2").items()}
    body = "text_encoder.bert." if kind == "stage 2" else "text_encoder."
    keys |= umt_bert(body, D, layers, range(layers - fusion, layers), words, C)
    if kind == "QA":
        return keys | umt_bert("text_decoder.bert.", D, fusion, range(fusion), words, D) \
            | umt_cls("text_decoder.cls.predictions", D, words)
    keys |= norm("vision_encoder.pool_norm", C) | linear("vision_proj", E, C) | linear("text_proj", E, D)
    keys |= linear("itm_head", 2, D) | {"temp": ()}
    if kind == "stage 2":
        keys |= umt_cls("text_encoder.cls.predictions", D, words)
        keys |= {"clip_teacher.class_embedding": (teacher,), "clip_teacher.conv1.weight": (teacher, 3, 16, 16),
                 "clip_teacher.transformer.resblocks.0.attn.in_proj_weight": (3 * teacher, teacher),
                 "clip_teacher.proj": (teacher, teacher)}
    return keys


def weights(kind, seed=0, **changes):
    """A file's tensors, drawn so that no bias is 0 and no LayerNorm the identity."""
    g, found = torch.Generator().manual_seed(seed), {}
    for key, shape in umt(kind, **{**TINY, **changes}).items():
        wide = shape[1] ** -0.5 if len(shape) == 2 else 0.05 if len(shape) > 2 else 0.2
        found[key] = wide * torch.randn(shape, generator=g) + (1.0 if "norm" in key.lower() else 0.0)
        if key.endswith("position_ids"):
            found[key] = torch.arange(512)[None]
    for name in ("text_encoder", "text_decoder"):
        if f"{name}.cls.predictions.bias" in found:
            found[f"{name}.cls.predictions.decoder.weight"] = found[f"{name}.bert.embeddings.word_embeddings.weight"]
            found[f"{name}.cls.predictions.decoder.bias"] = found[f"{name}.cls.predictions.bias"]
    return found


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(kind="stage 2", nested=False, out="out", task="", **changes):
    """Converts such a file -> its tensors, the report's lines."""
    saved = weights(kind, **changes)
    torch.save({"model": saved, "epoch": 9} if nested else saved, "umt.pth")
    convert.main(convert.Config("umt.pth", out, task))
    with open(f"{out}/report.txt") as f:
        return saved, f.read().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# What is computed

def umt_encoder(w, video, keep=None):
    """UMT's encoder, in fp64, from a file's tensors: video (B, T, 3, H, W) uint8, keep (B, S) -> (B, S, C)."""
    w = {key: x.double() for key, x in w.items()}
    C, heads = w["patch_embed.proj.bias"].shape[0], w["patch_embed.proj.bias"].shape[0] // 64
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1, 1)
                 for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (video.double().transpose(1, 2) / 255 - mean) / std                            # (B, 3, T, H, W)
    x = nnf.conv3d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(1, 16, 16))
    x = x.flatten(2).transpose(1, 2)                                                        # (B, Thw, C)
    x = x + torch.tensor([[(math.cos if c % 2 else math.sin)(n / 10000 ** (2 * (c // 2) / C)) for c in range(C)]
                          for n in range(x.shape[1])], dtype=torch.float64)
    if keep is not None:
        x = torch.stack([clip[kept] for clip, kept in zip(x, keep, strict=True)])
    for i in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))):
        layer = lambda x, name, i=i: nnf.linear(x, w[f"blocks.{i}.{name}.weight"], w[f"blocks.{i}.{name}.bias"])
        ln = lambda x, name, i=i: nnf.layer_norm(x, (C,), w[f"blocks.{i}.{name}.weight"], w[f"blocks.{i}.{name}.bias"],
                                                 1e-6)
        bias = torch.cat([w[f"blocks.{i}.attn.q_bias"], torch.zeros(C, dtype=torch.float64),
                          w[f"blocks.{i}.attn.v_bias"]])
        qkv = nnf.linear(ln(x, "norm1"), w[f"blocks.{i}.attn.qkv.weight"], bias)
        q, k, v = qkv.view(*x.shape[:2], 3, heads, 64).permute(2, 0, 3, 1, 4)               # (B, H, S, 64)
        mixed = (q * 64 ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
        x = x + layer(mixed.transpose(1, 2).flatten(2), "attn.proj")
        y = layer(ln(x, "norm2"), "mlp.fc1")
        x = x + layer(y * (1 + torch.erf(y / math.sqrt(2))) / 2, "mlp.fc2")
    return nnf.layer_norm(x, (C,), w["norm.weight"], w["norm.bias"], 1e-6)


@pytest.mark.parametrize("T", [1, 4, 12])
@pytest.mark.parametrize("kind, C", [("stage 1", 128), ("stage 2", 128), ("retrieval", 64), ("QA", 192)])
def test_the_vit_computes_what_umts_does(kind, C, T):
    saved, _ = run(kind, C=C)
    prefix = "encoder." if kind == "stage 1" else "vision_encoder.encoder."
    theirs = {key.removeprefix(prefix): x for key, x in saved.items() if key.startswith(prefix)}
    config, ours = read_folder("out", "a test")
    if kind == "stage 1":
        vit = ViT(**config["model"])
        load_weights(vit, {key.removeprefix("vit."): x for key, x in ours.items()}, "out")
    else:
        model = load_model("out")
        vit = model.vit
    vit = vit.double().eval()
    g = torch.Generator().manual_seed(T)
    video = torch.randint(0, 256, (2, T, 3, 32, 48), generator=g, dtype=torch.uint8)        # 2 x 3 tokens a frame
    keep = torch.rand(2, T * 6, generator=g).argsort(1)[:, :2 * T].sort(1).values
    with torch.no_grad():
        for kept in (None, keep):
            torch.testing.assert_close(vit(video, kept), umt_encoder(theirs, video, kept), rtol=1e-5, atol=1e-5)
        if kind in ("stage 2", "retrieval"):                # one vector a frame, of unit length, then their mean
            w = {key: x.double() for key, x in saved.items()}
            frames = umt_encoder(theirs, video).view(2, T, 6, C).mean(2)
            frames = nnf.layer_norm(frames, (C,), w["vision_encoder.pool_norm.weight"],
                                    w["vision_encoder.pool_norm.bias"], 1e-6)
            frames = nnf.normalize(nnf.linear(frames, w["vision_proj.weight"], w["vision_proj.bias"]), dim=-1)
            _, feature = model.double().encode_video(video)
            torch.testing.assert_close(feature, frames.mean(1).float(), rtol=1e-5, atol=1e-5, check_dtype=False)


def umt_bert_layers(w, x, heads, layers, mask, context=None, context_mask=None):
    """
    Layers of UMT's BERT, in fp64, from tensors under encoder.layer: x (M, L, D), mask (M, 1, 1 or L, L) of ones and
    zeros; those that have cross-attention look at context (M, S, C), where context_mask (M, S) is 1.
    """
    M, D = len(x), x.shape[-1]
    layer = lambda x, name: nnf.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    ln = lambda x, name: nnf.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def attention(name, x, context, mask):
        q, k, v = (layer(y, f"{name}.self.{part}").view(M, -1, heads, D // heads).transpose(1, 2)
                   for y, part in ((x, "query"), (context, "key"), (context, "value")))
        score = q @ k.transpose(2, 3) / math.sqrt(D // heads) + (1 - mask) * -10000.0       # as UMT masks
        mixed = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return ln(layer(mixed, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    for n in layers:
        name = f"encoder.layer.{n}"
        x = attention(f"{name}.attention", x, x, mask)
        if f"{name}.crossattention.self.query.weight" in w:
            x = attention(f"{name}.crossattention", x, context, context_mask[:, None, None].double())
        y = layer(x, f"{name}.intermediate.dense")
        x = ln(layer(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")
    return x


def umt_words(w, ids):
    """UMT's embeddings of ids (M, L), in fp64 -> (M, L, D)."""
    e = "embeddings."
    x = w[e + "word_embeddings.weight"][ids] + w[e + "position_embeddings.weight"][:ids.shape[1]] \
        + w[e + "token_type_embeddings.weight"][0]
    return nnf.layer_norm(x, x.shape[-1:], w[e + "LayerNorm.weight"], w[e + "LayerNorm.bias"], 1e-12)


def umt_answers(saved, video, question, answers, heads, layers, fusion):
    """
    UMT's question answering, in fp64, from a QA file's tensors: video (T, 3, H, W), question (1, L), answers (A, L'),
    padded with 0 -> log p (A, L' - 1) of each piece of each answer.
    """
    part = lambda prefix: {key.removeprefix(prefix): x.double() for key, x in saved.items() if key.startswith(prefix)}
    tokens, text = umt_encoder(part("vision_encoder.encoder."), video[None]), part("text_encoder.")
    mask = (question != 0).double()                                                         # (1, L)
    states = umt_bert_layers(text, umt_words(text, question), heads, range(layers), mask[:, None, None], tokens,
                             torch.ones(tokens.shape[:2]))
    decoder, head = part("text_decoder.bert."), part("text_decoder.cls.predictions.")
    A, L = answers.shape
    causal = (answers != 0).double()[:, None, None] * torch.ones(L, L).tril()               # (A, 1, L', L')
    x = umt_bert_layers(decoder, umt_words(decoder, answers), heads, range(fusion), causal, states.expand(A, -1, -1),
                        mask.expand(A, -1))
    y = nnf.linear(x, head["transform.dense.weight"], head["transform.dense.bias"])
    y = nnf.layer_norm(y * (1 + torch.erf(y / math.sqrt(2))) / 2, y.shape[-1:], head["transform.LayerNorm.weight"],
                       head["transform.LayerNorm.bias"], 1e-12)
    logits = nnf.linear(y, head["decoder.weight"], head["decoder.bias"])[:, :-1]
    p = logits.softmax(-1).log().gather(2, answers[:, 1:, None])[..., 0]
    return p.masked_fill(answers[:, 1:] == 0, 0)


def test_answers_are_scored_as_umt_scores_them():
    saved = weights("QA", seed=15, C=192, D=128, layers=4, fusion=2)
    saved |= {key: 8 * x for key, x in saved.items()                                        # it hears well
              if re.match(r"text_decoder.*crossattention\.(output\.dense|self\.query)\.weight", key)}
    torch.save(saved, "umt.pth")
    convert.main(convert.Config("umt.pth", "out"))
    model = load_model("out").double()
    assert type(model) is VideoToText and model.bert is not None and not model.training
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 3, 3, 32, 48), generator=g, dtype=torch.uint8)
    questions = torch.randint(3, 100, (6, 9), generator=g)                                  # [CLS] and no [SEP], padded
    answers = torch.randint(3, 100, (90, 5), generator=g)
    questions[:, 0] = answers[:, 0] = 101
    answers[:, 1] = 3 + torch.randperm(97, generator=g)[:90]
    answers[4, 1] = answers[8, 1]                                                           # of the same first piece
    for a, row in enumerate(answers):                       # two pieces, three, four, or what of five was not cut
        row[3 + a % 4:] = 0
        if a % 4 < 3:
            row[2 + a % 4] = 102                                                            # [SEP]
    for q, row in enumerate(questions):
        row[2 + q:] = 0
    rows, chosen = torch.tensor([1, 0, 1, 1, 0, 0]), {}
    with torch.no_grad():
        memory, there = model.ask(model.encode_video(video)[0], questions, rows)
        for q, clip in enumerate(rows.tolist()):
            wanted = umt_answers(saved, video[clip], questions[q:q + 1], answers, heads=2, layers=4, fusion=2)
            found = model.log_likelihood(answers, torch.full((90,), q), memory, there)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
            for how in ((90, True), (90, False), (5, True), (1, True)):
                k, twice = how
                top = wanted[:, 0].argsort(descending=True)[:k]                             # by the first piece
                best = top[(wanted[top].sum(1) + twice * wanted[top, 0]).argmax()].item()
                found = scoring.rank_answers(model, answers, memory[q:q + 1], there[q:q + 1], k, twice).item()
                chosen.setdefault(how, []).append(found)
                assert found == best
    assert chosen[90, True] not in (chosen[90, False], chosen[1, True])                     # both matter


# ---------------------------------------------------------------------------------------------------------------------
# What is taken, and told

@pytest.mark.parametrize("nested", [False, True], ids=["flat", "under model"])
@pytest.mark.parametrize("kind", ["stage 2", "retrieval", "QA"])
def test_a_converted_folder_is_a_model_of_ours_with_their_weights(kind, nested):
    saved, report = run(kind, nested)
    model = load_model("out", VideoToText if kind == "QA" else ClusterSTM)
    ours, cfg = model.state_dict(), model.cfg
    assert (cfg.width, cfg.depth, cfg.heads, cfg.patch, cfg.positions) == (128, 3, 2, 16, "1d")
    assert (cfg.text_width, cfg.text_depth, cfg.text_heads, cfg.fusion, cfg.vocab) == (64, 3, 1, 2, 110)
    assert cfg.mask_id == 103 and cfg.embed == (512 if kind == "QA" else 24) and model.bert.cfg == bert_config(cfg)
    assert cfg.text_length == (25 if kind == "QA" else 32) and not cfg.sep
    body = "text_encoder.bert." if kind == "stage 2" else "text_encoder."
    same = {f"bert.bert.{key.removeprefix(body)}": x for key, x in saved.items()
            if key.startswith(body) and not key.endswith("position_ids")}
    assert len(same) == 5 + 3 * 16 + 2 * 10
    if kind == "stage 2":
        head = {key for key in saved if key.startswith("text_encoder.cls.") and ".decoder." not in key}
        same |= {key.replace("text_encoder.", "bert."): saved[key] for key in head}
        assert len(head) == 5
    if kind == "QA":
        same |= {key: x for key, x in saved.items() if key.startswith("text_decoder.")
                 and not key.endswith("position_ids") and ".predictions.decoder." not in key}
        assert len(same) == 5 + 3 * 16 + 2 * 10 + 5 + 2 * 26 + 5
    else:
        same |= {key.removeprefix("vision_encoder."): x for key, x in saved.items()
                 if re.match(r"vision_encoder\.pool_norm|vision_proj|text_proj|itm_head|temp", key)}
    for name, x in same.items():
        assert torch.equal(ours[name], x), name
    fresh = {name for name in ours if name not in same and not name.startswith("vit.")}
    with open("out/config.json") as f:
        config = json.load(f)
    assert fresh == {name for name in ours if name.startswith(tuple(config["new"]))}
    assert fresh == {line.split()[1] for line in report if line.startswith("new")}
    assert config["data"] == {"frames": KINDS[kind], "size": 224} and data.DataConfig(**config["data"], cache=False)
    assert all(name.startswith(("decoder.", "bert.cls.")) for name in fresh)
    assert config["task"] == "" and (kind == "stage 2" or report[-2].startswith("task is not told"))
    assert ("beside   epoch: not of the model" in report) == nested and "tokenizer.json is missing" in report[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_tells_of_every_key_and_of_every_weight(kind):
    saved, report = run(kind)
    _, ours = read_folder("out", "a test")
    assert len([line for line in report if "drawn, seed 0" in line]) == sum(
        name.startswith(tuple(convert.FAMILIES[f"UMT {kind}"].new)) for name in ours)
    told = {line.split(None, 2)[1]: line for line in report[:-1]}
    for key in saved:
        if key.endswith(("q_bias", "v_bias")):
            line, = [line for line in report if line.startswith(f"joined   {key[:-6]}(q_bias, 0, v_bias) (384,)")]
            assert line.endswith(f"-> vit.{key[:-6].split('encoder.')[-1].replace('attn.', '')}qkv.bias")
        else:
            assert re.match(rf"(taken|renamed|tied|skipped) +{re.escape(key)} \(", told[key]), key
    skipped = {key for key in saved if told.get(key, "").startswith("skipped")}
    assert skipped == {key for key in saved if key.startswith(("clip_", "vision_encoder.clip_"))
                       or key.endswith("position_ids")}
    words = collections.Counter(line.split()[0] for line in report)
    last, = [line for line in report if line.startswith("umt.pth, ")]
    assert last.startswith(f"umt.pth, UMT {kind}, {len(saved)} keys: ")
    for how in ("taken", "renamed", "joined", "tied", "skipped", "new"):
        assert (f" {words[how]} {how}" in last) == bool(words[how])
    assert len(saved) == 2 * words["joined"] + sum(words[how] for how in ("taken", "renamed", "tied", "skipped"))
    assert words["joined"] == TINY["depth"] and words["tied"] == 2 * (kind in ("stage 2", "QA"))
    if kind != "QA":                                        # our name for what is neither in their vision nor text part
        assert kind == "stage 1" or told["temp"] == "taken    temp () float32 -> temp"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [BASE, LARGE], ids=["B/16", "L/16"])
def test_the_rules_cover_b16_and_l16(kind, size):
    """In shapes alone: a model on the meta device, with no memory for its weights."""
    with torch.device("meta"), mock.patch("torch.equal", lambda a, b: True):
        saved = {key: torch.empty(shape) for key, shape in umt(kind, **size).items()}
        told = []
        model, cfg = convert.convert(convert.FAMILIES[f"UMT {kind}"], saved, "umt.pth", told)
    wanted = ModelConfig(**({} if size is BASE else dict(width=1024, depth=24, heads=16, drop_path=0.2, text_width=1024,
                                                         text_depth=24, text_heads=16, fusion=5, embed=768)))
    if kind != "stage 1":
        wanted = known(ModelConfig, {**vars(wanted), "vocab": 30522, "mask_id": 103, "target": size["C"],
                                     "text_length": 25 if kind == "QA" else 32})
    assert cfg == wanted
    bare = sum(x.numel() for key, x in saved.items() if re.match(r"(vision_encoder\.)?encoder\.", key))
    assert bare == sum(p.numel() for p in (model["vit"] if kind == "stage 1" else model.vit).parameters()) \
        - size["depth"] * size["C"]                                                         # the zeros
    assert abs(bare / 1e6 - (85.64 if size is BASE else 303.07)) < 0.2                      # as UMT's reports count
    assert not any("new" in line.split()[0] for line in told) or kind != "stage 1"


def test_numbers_are_kept_whatever_their_type():
    saved = {key: x.half() if x.is_floating_point() else x for key, x in weights("stage 1").items()}
    torch.save(saved, "umt.pth")
    convert.main(convert.Config("umt.pth", "out"))
    _, ours = read_folder("out", "a test")
    assert all(x.dtype == torch.float32 for x in ours.values())
    assert torch.equal(ours["vit.norm.weight"], saved["encoder.norm.weight"].float())
    assert "encoder.norm.weight (128,) float16 -> vit.norm.weight" in open("out/report.txt").read()


def test_what_is_new_is_the_same_every_time_and_draws_from_no_one_elses_numbers():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run("QA", out="a")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    run("QA", out="b")
    assert open("a/model.safetensors", "rb").read() == open("b/model.safetensors", "rb").read()


@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "retrieval"])
def test_a_student_can_begin_with_it(kind):
    saved, _ = run(kind)
    config, ours = read_folder("out", "a test")
    cfg = ModelConfig(width=128, depth=3, heads=2, text_width=64, text_depth=3, text_heads=1, fusion=2, embed=24,
                      vocab=110, mask_id=103, target=40, decoder="joint", decoder_width=64)
    torch.manual_seed(1)
    model = ClusterSTM(cfg)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.start_from("out")
    fresh = tuple(config["new"])
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name] if name.startswith(fresh) else ours[name]), name
    assert not torch.equal(model.vit.norm.weight, before["vit.norm.weight"])
    with pytest.raises(ValueError, match="model.positions is '1d', wanted '3d'"):
        ClusterSTM(known(ModelConfig, {**vars(cfg), "positions": "3d"})).start_from("out")


@pytest.mark.parametrize("kind, task", [("QA", "activitynet-qa"), ("retrieval", "didemo"), ("retrieval", "msrvtt-mc")])
def test_a_task_that_is_told_is_what_eval_finds(kind, task):
    _, report = run(kind, task=task)
    with open("out/config.json") as f:
        config = json.load(f)
    assert config["task"] == task and config["data"]["frames"] == TASKS[task].frames == 12
    assert config["model"]["text_length"] == TASKS[task].length
    assert not any(line.startswith("task is not told") for line in report)


@pytest.mark.parametrize("kind, task, line", [
    ("QA", "msrvtt", "umt.pth: a file of UMT QA is not fine-tuned for msrvtt, retrieval$"),
    ("retrieval", "msvd-qa", "umt.pth: a file of UMT retrieval is not fine-tuned for msvd-qa, question answering$"),
    ("stage 2", "msrvtt-qa", "umt.pth: a file of UMT stage 2 is not fine-tuned for msrvtt-qa, question answering$"),
    ("stage 1", "msrvtt-caption", "umt.pth: a file of UMT stage 1 is not fine-tuned for msrvtt-caption, captioning$"),
    ("QA", "msrvt-qa", "there is no task 'msrvt-qa'; did you mean 'msrvtt-qa'[^\n]*$"),
])
def test_a_task_that_it_cannot_be_of_is_refused(kind, task, line):
    with pytest.raises(ValueError, match=line):
        run(kind, task=task)
    assert glob.glob("*") == ["umt.pth"]


def test_one_that_answers_is_no_student():
    run("QA")
    with pytest.raises(ValueError, match="out holds a model that speaks, wanted a ClusterSTM"):
        ClusterSTM.from_pretrained("out")


def test_a_folder_of_a_vit_alone_is_no_trained_model():
    run("stage 1")
    with pytest.raises(ValueError, match="a model wants vocab, mask_id and target"):
        ClusterSTM.from_pretrained("out")


def words():
    """A tokenizer of 110 pieces, [MASK] where BERT has it."""
    special = [piece for piece in data.SPECIALS if piece != "[MASK]"]
    pieces = special + [f"[unused{i}]" for i in range(103 - len(special))] + ["[MASK]", *"abcdef"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(data.SPECIALS))
    made.save("words.json")
    return made


@pytest.mark.parametrize("task", ["msrvtt-qa", ""])
def test_eval_scores_a_folder_that_answers(task):
    words()
    torch.save(weights("QA"), "umt.pth")
    convert.main(convert.Config("umt.pth", "out", task, "words.json"))
    os.makedirs("data/videos_images/msrvtt")
    decoding.write_video("data/videos_images/msrvtt/v.mp4", np.zeros((14, 32, 32, 3), np.uint8))
    for name, content in (("qa_test", [{"video": "v.mp4", "question": q, "answer": a} for q, a in ("ab", "cd", "ef")]),
                          ("qa_answer_list", ["a", "b", "d f"])):
        with open(f"data/msrvtt_{name}.json", "w") as f:
            json.dump(content, f)
    found = scoring.main(scoring.Config("msrvtt-qa", "out", "data", device="cpu", workers=0))
    assert found["frames"] == (12 if task else 4) and found["size"] == 224 and found["tokens"] == "all"
    assert found["questions"] == 3 and found["protocol"][0] == "texts of 25 pieces"
    assert {answer["ranked"] for answer in found["said"]} <= {"a", "b", "d f"}


def test_a_tokenizer_goes_into_the_folder_if_it_has_their_words():
    made = words()
    torch.save(weights("stage 2"), "umt.pth")
    convert.main(convert.Config("umt.pth", "out", tokenizer="words.json"))
    assert data.load_tokenizer("out/tokenizer.json").get_vocab() == made.get_vocab()
    assert "tokenizer.json is missing" not in open("out/report.txt").read()
    torch.save(weights("stage 2", words=109), "other.pth")
    with pytest.raises(ValueError, match=r"words.json: .* is \(110, 103\), wanted \(109, 103\)"):
        convert.main(convert.Config("other.pth", "other", tokenizer="words.json"))
    torch.save(weights("stage 1"), "vit.pth")
    with pytest.raises(ValueError, match="words.json: .* a ViT reads no text"):
        convert.main(convert.Config("vit.pth", "vit", tokenizer="words.json"))
    assert not os.path.exists("other") and not os.path.exists("vit")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def without(saved, key):
    return {k: x for k, x in saved.items() if k != key}


WRONG = {                   # what is wrong with a file -> what is said of it
    "missing": (lambda w: without(w, "vision_encoder.encoder.blocks.1.mlp.fc1.weight"),
                r"vision_encoder.encoder.blocks.1.mlp.fc1.weight is not there, wanted \(512, 128\)"),
    "missing, text": (lambda w: without(w, "text_encoder.bert.encoder.layer.1.crossattention.self.key.bias"),
                      r"text_encoder.bert.encoder.layer.1.crossattention.self.key.bias is not there, wanted \(64,\)"),
    "no fusion": (lambda w: {k: x for k, x in w.items() if "crossattention" not in k},
                  r"bert.encoder.layer.2.crossattention.self.query.weight is not there, wanted \(64, 64\)"),
    "missing, head": (lambda w: without(w, "vision_proj.weight"), "vision_proj.weight is not there, wanted of 2"),
    "missing, temp": (lambda w: without(w, "temp"), r"temp is not there, wanted \(\)"),
    "missing, pool_norm": (lambda w: without(w, "vision_encoder.pool_norm.bias"),
                           r"vision_encoder.pool_norm.bias is not there, wanted \(128,\)"),
    "missing, patches": (lambda w: without(w, "vision_encoder.encoder.patch_embed.proj.weight"),
                         "vision_encoder.encoder.patch_embed.proj.weight is not there"),
    "missing, MLM": (lambda w: without(w, "text_encoder.cls.predictions.transform.LayerNorm.bias"),
                     "text_encoder.cls.predictions.transform.LayerNorm.bias is not there"),
    "missing, q_bias": (lambda w: without(w, "vision_encoder.encoder.blocks.2.attn.q_bias"),
                        r"vision_encoder.encoder.blocks.2.attn.q_bias.* is \(0, 128\), wanted two of one length"),
    "q_bias and v_bias": (lambda w: {k: x for k, x in w.items() if not re.search(r"blocks.0.attn.[qv]_bias", k)},
                          r"vision_encoder.encoder.blocks.0.attn.\(q_bias, 0, v_bias\) is not there, wanted \(384,\)"),
    "q_bias too long": (lambda w: w | {"vision_encoder.encoder.blocks.0.attn.q_bias": torch.ones(129),
                                       "vision_encoder.encoder.blocks.0.attn.v_bias": torch.ones(126)},
                        r"blocks.0.attn.q_bias, v_bias is \(129, 126\)"),
    "shape": (lambda w: w | {"vision_encoder.encoder.blocks.0.attn.proj.weight": torch.ones(128, 127)},
              r"vision_encoder.encoder.blocks.0.attn.proj.weight is \(128, 127\), wanted \(128, 128\)"),
    "transposed in size": (lambda w: w | {"text_proj.weight": torch.ones(64, 24)},
                           r"text_proj.weight is \(64, 24\), wanted \(24, 64\)"),
    "tubelet": (lambda w: w | {"vision_encoder.encoder.patch_embed.proj.weight": torch.ones(128, 3, 2, 16, 16)},
                r"patch_embed.proj.weight is \(128, 3, 2, 16, 16\), wanted \(128, 3, 1, 16, 16\)"),
    "unexpected": (lambda w: w | {"text_prior.weight": torch.ones(3)},
                   r"text_prior.weight is \(3,\), wanted no such key"),
    "unexpected, text": (lambda w: w | {"text_encoder.bert.pooler.dense.bias": torch.ones(64)},
                         r"text_encoder.bert.pooler.dense.bias is \(64,\), wanted no such key"),
    "unexpected, block": (lambda w: w | {"vision_encoder.encoder.blocks.0.norm3.bias": torch.ones(128)},
                          r"vision_encoder.encoder.blocks.0.norm3.bias is \(128,\), wanted no such key"),
    "not tied": (lambda w: w | {"text_encoder.cls.predictions.decoder.bias": torch.ones(110)},
                 "text_encoder.cls.predictions.decoder.bias is another than text_encoder.cls.predictions.bias"),
    "not a tensor": (lambda w: w | {"temp": 0.07}, "temp is a float, wanted a tensor"),
    "width": (lambda w: weights("stage 2", C=96), r"patch_embed.proj.weight is \(96, 3, 1, 16, 16\), .* heads of 64"),
    "text width": (lambda w: weights("stage 2", D=32), r"word_embeddings.weight is \(110, 32\), .* heads of 64"),
    "half of it": (lambda w: {k: x for k, x in w.items() if k.startswith("vision_encoder.encoder.")},
                   "no known family: its keys are vision_encoder.encoder.patch_embed.proj.weight"),
    "another's": (lambda w: {"features.0.weight": torch.ones(1)},
                  "no known family: its keys are features.0.weight, .*UMT stage 1, UMT stage 2, UMT QA, UMT retrieval"),
    "nothing": (lambda w: {}, "no known family: its keys are none"),
    "a list": (lambda w: [1, 2], "holds a list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_not_as_it_should_be_is_refused_in_one_line(what, capsys):
    change, message = WRONG[what]
    torch.save(change(weights("stage 2")), "umt.pth")
    code, _, err = command("tools/convert.py", ["umt.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, "umt.pth.*" + message)
    assert glob.glob("*") == ["umt.pth"]


WRONG_ANSWERS = {
    "missing": (lambda w: without(w, "text_decoder.bert.encoder.layer.1.crossattention.output.dense.bias"),
                r"text_decoder.bert.encoder.layer.1.crossattention.output.dense.bias is not there, wanted \(64,\)"),
    "missing, layer": (lambda w: {k: x for k, x in w.items() if not k.startswith("text_decoder.bert.encoder.layer.1.")},
                       r"text_decoder.bert.encoder.layer.1.attention.self.query.weight is not there"),
    "missing, head": (lambda w: without(w, "text_decoder.cls.predictions.bias"),
                      r"text_decoder.cls.predictions.bias is not there, wanted \(110,\)"),
    "no decoder's words": (lambda w: without(w, "text_decoder.bert.embeddings.word_embeddings.weight"),
                           r"text_decoder.bert.embeddings.word_embeddings.weight is not there, wanted \(110, 64\)"),
    "a layer more": (lambda w: w | {"text_decoder.bert.encoder.layer.2.output.dense.bias": torch.ones(64)},
                     r"text_decoder.bert.encoder.layer.2.output.dense.bias is \(64,\), wanted no such key"),
    "pooler": (lambda w: w | {"text_decoder.bert.pooler.dense.bias": torch.ones(64)},
               r"text_decoder.bert.pooler.dense.bias is \(64,\), wanted no such key"),
    "unexpected": (lambda w: w | {"text_decoder.prior": torch.ones(3)}, "text_decoder.prior is .*, wanted no such key"),
    "a head of the encoder": (lambda w: w | {"text_encoder.cls.predictions.bias": torch.ones(110)},
                              r"text_encoder.cls.predictions.bias is \(110,\), wanted no such key"),
    "a head of matching": (lambda w: w | {"itm_head.bias": torch.ones(2)}, r"itm_head.bias is \(2,\), wanted no such"),
    "looks at the video": (lambda w: w | {"text_decoder.bert.encoder.layer.0.crossattention.self.key.weight":
                                          torch.ones(64, 128)}, r"self.key.weight is \(64, 128\), wanted \(64, 64\)"),
    "not tied": (lambda w: w | {"text_decoder.cls.predictions.decoder.weight": torch.ones(110, 64)},
                 "text_decoder.cls.predictions.decoder.weight is another than text_decoder.bert.embeddings.word_emb"),
    "tied to the encoder": (lambda w: w | {"text_decoder.cls.predictions.decoder.weight":
                                           w["text_encoder.embeddings.word_embeddings.weight"]}, "is another than"),
}


@pytest.mark.parametrize("what", WRONG_ANSWERS)
def test_a_file_of_answers_that_is_not_as_it_should_be_is_refused_in_one_line(what, capsys):
    change, message = WRONG_ANSWERS[what]
    torch.save(change(weights("QA")), "umt.pth")
    code, _, err = command("tools/convert.py", ["umt.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, "umt.pth.*" + message)
    assert glob.glob("*") == ["umt.pth"]


@pytest.mark.parametrize("change", [dict(depth=11), dict(layers=11), dict(fusion=2)], ids=str)
def test_a_b16_that_lacks_whole_layers_is_refused(change):
    with torch.device("meta"):
        saved = {key: torch.empty(shape) for key, shape in umt("retrieval", **{**BASE, **change}).items()}
        with pytest.raises(ValueError, match=r"fusion layers at width 768 is .*, wanted \(12, 12, 3\)"):
            convert.convert(convert.FAMILIES["UMT retrieval"], saved, "umt.pth", [])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_that_are_no_checkpoint_are_refused_in_one_line(zipped, capsys):
    torch.save(weights("stage 1"), "whole.pth", _use_new_zipfile_serialization=zipped)
    with open("whole.pth", "rb") as f:
        whole = f.read()
    for content in (whole[:len(whole) // 2], whole[:-9], whole[:300], b"", b"nothing of the sort", b"\x80\x02}", b"PK"):
        with open("umt.pth", "wb") as f:
            f.write(content)
        for trust in ([], ["--trust"]):
            code, _, err = command("tools/convert.py", ["umt.pth", "out", *trust], capsys)
            assert_one_line("tools.convert", code, err, "umt.pth (is no checkpoint|is of no known|holds a)")
    code, _, err = command("tools/convert.py", ["none.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, r"tools.convert: \[Errno 2\] No such file.*none.pth")
    assert not os.path.exists("out")


class Touch:
    def __reduce__(self):
        return os.mkdir, ("touched",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_of_more_than_tensors_wants_trust_and_runs_nothing_even_so(zipped, capsys, monkeypatch):
    module = types.ModuleType("utils.easydict")
    EasyDict = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
    module.EasyDict = EasyDict
    config = EasyDict(lr=1e-4)
    config.inner = EasyDict(seen={1, 2})
    with monkeypatch.context() as there:
        there.setitem(sys.modules, "utils.easydict", module)
        there.setitem(sys.modules, "utils", types.ModuleType("utils"))
        saved = {"model": weights("retrieval"), "config": config, "run": Touch(), "epoch": 3}
        saved["model"]["temp"] = torch.nn.Parameter(saved["model"]["temp"])
        torch.save(saved, "umt.pth", _use_new_zipfile_serialization=zipped)
    code, _, err = command("tools/convert.py", ["umt.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, r"umt.pth: its pickle wants utils.easydict.EasyDict.* --trust opens it")
    assert not os.path.exists("out") and not os.path.exists("touched")
    code, out, err = command("tools/convert.py", ["umt.pth", "out", "--trust"], capsys)
    assert code == 0 and not os.path.exists("touched"), err
    assert "stand-in utils.easydict.EasyDict\n" in out and "stand-in posix.mkdir\n" in out
    assert "beside   config: not of the model" in out
    ours = ClusterSTM.from_pretrained("out").state_dict()
    assert torch.equal(ours["temp"], saved["model"]["temp"])
    assert torch.equal(ours["text_proj.weight"], saved["model"]["text_proj.weight"])


def test_a_folder_appears_whole_or_not_at_all_and_replaces_none(capsys, monkeypatch):
    torch.save(weights("stage 1"), "umt.pth")
    os.makedirs("full")
    with open("full/notes.txt", "w") as f:
        f.write("mine")
    for out in ("full", "umt.pth"):
        code, _, err = command("tools/convert.py", ["umt.pth", out], capsys)
        assert_one_line("tools.convert", code, err, f"{out} is there already")
    assert os.listdir("full") == ["notes.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_weights", mock.Mock(side_effect=OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            convert.main(convert.Config("umt.pth", "deep/er/out"))
    assert os.listdir("deep/er") == []
    os.makedirs("empty")
    for out in ("empty", "deep/er/out/"):
        code, said, _ = command("tools/convert.py", ["umt.pth", out], capsys)
        assert code == 0 and f"written to {out}" in said
        assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "report.txt"]
        with open(f"{out}/report.txt") as f:
            assert f.read() in said
    assert sorted(os.listdir(".")) == ["deep", "empty", "full", "umt.pth"]


def test_help_names_the_settings(capsys):
    code, out, _ = command("tools/convert.py", ["--help"], capsys)
    assert code == 0 and all(word in out for word in ("--task", "--tokenizer", "--trust", "stage 1", "folder to write"))
