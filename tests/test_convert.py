"""tools.convert: the outputs are those of UMT's formulas in fp64; every key is reported; bad files are refused."""

import glob
import math
import os
import re
import sys
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from helpers.benchmarks import write_json
from helpers.runs import assert_one_line, command
from helpers.videos import write
from tokenizers import Tokenizer, models, pre_tokenizers

import eval as evaluation
from data import DataConfig
from encoders import TextEncoderConfig, ViT, ViTConfig, bert_config
from files import load_state_dict_strict, read_checkpoint, read_json, read_safetensors
from model import ClusterSTM, ModelConfig, VideoToText, load_model
from tasks import TASKS
from tokenizer import SPECIAL_TOKENS, load_tokenizer
from tools import convert

KINDS = {"stage 1": 8, "stage 2": 4, "retrieval": 12, "QA": 12}                 # frames
TINY = dict(C=128, depth=3, D=64, layers=3, fusion=2, vocab=110, E=24, teacher=16)
BASE = dict(C=768, depth=12, D=768, layers=12, fusion=3, vocab=30522, E=512, teacher=512)
LARGE = dict(C=1024, depth=24, D=1024, layers=24, fusion=5, vocab=30522, E=768, teacher=768)


# ---------------------------------------------------------------------------------------------------------------------
# UMT's files: the keys and shapes of its modules

def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, C):
    return {f"{name}.weight": (C,), f"{name}.bias": (C,)}


def vit_shapes(C, depth, teacher, has_clip_decoder):
    shapes = {"encoder.patch_embed.proj.weight": (C, 3, 1, 16, 16), "encoder.patch_embed.proj.bias": (C,)}
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        shapes |= norm(f"{block}.norm1", C) | {f"{block}.attn.q_bias": (C,), f"{block}.attn.v_bias": (C,),
                                               f"{block}.attn.qkv.weight": (3 * C, C)}
        shapes |= linear(f"{block}.attn.proj", C, C) | norm(f"{block}.norm2", C)
        shapes |= linear(f"{block}.mlp.fc1", 4 * C, C) | linear(f"{block}.mlp.fc2", C, 4 * C)
    shapes |= norm("encoder.norm", C)
    for j in range(6 if has_clip_decoder else 0):
        shapes |= linear(f"clip_decoder.{j}.head", teacher, C) | norm(f"clip_decoder.{j}.norm", teacher)
    return shapes


def bert_shapes(name, D, layers, cross, vocab, context):
    """cross: the layers that have cross-attention to a context of `context` channels."""
    shapes = {f"{name}embeddings.position_ids": (1, 512), f"{name}embeddings.word_embeddings.weight": (vocab, D),
              f"{name}embeddings.position_embeddings.weight": (512, D),
              f"{name}embeddings.token_type_embeddings.weight": (2, D)} | norm(f"{name}embeddings.LayerNorm", D)
    for n in range(layers):
        layer = f"{name}encoder.layer.{n}"
        for kind, width in [("attention", D)] + [("crossattention", context)] * (n in cross):
            shapes |= linear(f"{layer}.{kind}.self.query", D, D) | linear(f"{layer}.{kind}.self.key", D, width)
            shapes |= linear(f"{layer}.{kind}.self.value", D, width) | linear(f"{layer}.{kind}.output.dense", D, D)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", D)
        shapes |= linear(f"{layer}.intermediate.dense", 4 * D, D) | linear(f"{layer}.output.dense", D, 4 * D)
        shapes |= norm(f"{layer}.output.LayerNorm", D)
    return shapes


def mlm_head_shapes(name, D, vocab):
    return {f"{name}.bias": (vocab,), **linear(f"{name}.transform.dense", D, D),
            **norm(f"{name}.transform.LayerNorm", D), **linear(f"{name}.decoder", vocab, D)}


def umt_shapes(kind, C, depth, D, layers, fusion, vocab, E, teacher):
    """The shapes of a file by key."""
    if kind == "stage 1":
        return vit_shapes(C, depth, teacher, True)
    shapes = {f"vision_encoder.{key}": shape for key, shape in vit_shapes(C, depth, teacher, kind == "stage 2").items()}
    text = "text_encoder.bert." if kind == "stage 2" else "text_encoder."
    shapes |= bert_shapes(text, D, layers, range(layers - fusion, layers), vocab, C)
    if kind == "QA":
        return shapes | bert_shapes("text_decoder.bert.", D, fusion, range(fusion), vocab, D) \
            | mlm_head_shapes("text_decoder.cls.predictions", D, vocab)
    shapes |= norm("vision_encoder.pool_norm", C) | linear("vision_proj", E, C) | linear("text_proj", E, D)
    shapes |= linear("itm_head", 2, D) | {"temp": ()}
    if kind == "stage 2":
        shapes |= mlm_head_shapes("text_encoder.cls.predictions", D, vocab)
        shapes |= {"clip_teacher.class_embedding": (teacher,), "clip_teacher.conv1.weight": (teacher, 3, 16, 16),
                   "clip_teacher.transformer.resblocks.0.attn.in_proj_weight": (3 * teacher, teacher),
                   "clip_teacher.proj": (teacher, teacher)}
    return shapes


def umt_weights(kind, seed=0, **changes):
    """Random tensors of a file, such that no bias is 0 and no LayerNorm the identity."""
    g, weights = torch.Generator().manual_seed(seed), {}
    for key, shape in umt_shapes(kind, **{**TINY, **changes}).items():
        std = shape[1] ** -0.5 if len(shape) == 2 else 0.05 if len(shape) > 2 else 0.2
        weights[key] = std * torch.randn(shape, generator=g) + (1.0 if "norm" in key.lower() else 0.0)
        if key.endswith("position_ids"):
            weights[key] = torch.arange(512)[None]
    for name in ("text_encoder", "text_decoder"):
        if f"{name}.cls.predictions.bias" in weights:
            embedding = weights[f"{name}.bert.embeddings.word_embeddings.weight"]
            weights[f"{name}.cls.predictions.decoder.weight"] = embedding
            weights[f"{name}.cls.predictions.decoder.bias"] = weights[f"{name}.cls.predictions.bias"]
    return weights


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read_report(out="out"):
    with open(f"{out}/report.txt") as f:
        return f.read().splitlines()


def convert_file(kind="stage 2", nested=False, out="out", task="", **changes):
    """Convert a file of this kind -> its tensors by key, the lines of the report."""
    weights = umt_weights(kind, **changes)
    torch.save({"model": weights, "epoch": 9} if nested else weights, "umt.pth")
    convert.main(convert.Config("umt.pth", out, task))
    return weights, read_report(out)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs

def umt_encoder(w, video, visible_ids=None):
    """UMT's encoder in fp64 from a file's tensors: video (B, T, 3, H, W) uint8, visible_ids (B, S) -> (B, S, C)."""
    w = {key: x.double() for key, x in w.items()}
    C, heads = w["patch_embed.proj.bias"].shape[0], w["patch_embed.proj.bias"].shape[0] // 64
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1, 1)
                 for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (video.double().transpose(1, 2) / 255 - mean) / std                            # (B, 3, T, H, W)
    x = nnf.conv3d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(1, 16, 16))
    x = x.flatten(2).transpose(1, 2)                                                        # (B, Thw, C)
    x = x + torch.tensor([[(math.cos if c % 2 else math.sin)(n / 10000 ** (2 * (c // 2) / C)) for c in range(C)]
                          for n in range(x.shape[1])], dtype=torch.float64)
    if visible_ids is not None:
        x = torch.stack([clip[ids] for clip, ids in zip(x, visible_ids, strict=True)])
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


@pytest.mark.parametrize("kind, C, T", [("stage 1", 128, 1), ("stage 1", 128, 4), ("stage 2", 128, 12),
                                        ("retrieval", 64, 4), ("QA", 192, 4)])
def test_vit_and_video_feature_equal_umts(kind, C, T):
    saved, _ = convert_file(kind, C=C)
    prefix = "encoder." if kind == "stage 1" else "vision_encoder.encoder."
    encoder = {key.removeprefix(prefix): x for key, x in saved.items() if key.startswith(prefix)}
    if kind == "stage 1":
        config, weights = read_checkpoint("out", "a test")
        vit = ViT(ViTConfig(**config["vit"]))
        load_state_dict_strict(vit, {key.removeprefix("vit."): x for key, x in weights.items()}, "out")
    else:
        model = load_model("out")
        vit = model.vit
    vit = vit.double().eval()
    g = torch.Generator().manual_seed(T)
    video = torch.randint(0, 256, (2, T, 3, 32, 48), generator=g, dtype=torch.uint8)        # 2 x 3 tokens a frame
    visible_ids = torch.rand(2, T * 6, generator=g).argsort(1)[:, :2 * T].sort(1).values
    with torch.no_grad():
        for ids in (None, visible_ids):
            torch.testing.assert_close(vit(video, ids), umt_encoder(encoder, video, ids), rtol=1e-5, atol=1e-5)
        if kind in ("stage 2", "retrieval"):                # the mean over frames of vectors of unit length
            w = {key: x.double() for key, x in saved.items()}
            frames = umt_encoder(encoder, video).view(2, T, 6, C).mean(2)
            frames = nnf.layer_norm(frames, (C,), w["vision_encoder.pool_norm.weight"],
                                    w["vision_encoder.pool_norm.bias"], 1e-6)
            frames = nnf.normalize(nnf.linear(frames, w["vision_proj.weight"], w["vision_proj.bias"]), dim=-1)
            _, feature = model.double().encode_video(video)
            torch.testing.assert_close(feature, frames.mean(1).float(), rtol=1e-5, atol=1e-5, check_dtype=False)


def umt_bert_layers(w, x, heads, layers, mask, context=None, context_mask=None):
    """
    Layers of UMT's BERT in fp64 from tensors under encoder.layer: x (M, L, D), mask (M, 1, 1 or L, L) of ones and
    zeros. Layers with cross-attention attend to context (M, S, C) where context_mask (M, S) is 1.
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


def umt_embeddings(w, ids):
    """UMT's embeddings of ids (M, L) in fp64 -> (M, L, D)."""
    e = "embeddings."
    x = w[e + "word_embeddings.weight"][ids] + w[e + "position_embeddings.weight"][:ids.shape[1]] \
        + w[e + "token_type_embeddings.weight"][0]
    return nnf.layer_norm(x, x.shape[-1:], w[e + "LayerNorm.weight"], w[e + "LayerNorm.bias"], 1e-12)


def umt_log_likelihood(saved, video, question, answers, heads, layers, fusion):
    """
    UMT's question answering in fp64 from a QA file's tensors: video (T, 3, H, W), question (1, L), answers (A, L'),
    padded with 0 -> log p (A, L' - 1) of each token of each answer.
    """
    part = lambda prefix: {key.removeprefix(prefix): x.double() for key, x in saved.items() if key.startswith(prefix)}
    tokens, text = umt_encoder(part("vision_encoder.encoder."), video[None]), part("text_encoder.")
    mask = (question != 0).double()                                                         # (1, L)
    states = umt_bert_layers(text, umt_embeddings(text, question), heads, range(layers), mask[:, None, None], tokens,
                             torch.ones(tokens.shape[:2]))
    decoder, head = part("text_decoder.bert."), part("text_decoder.cls.predictions.")
    A, L = answers.shape
    causal = (answers != 0).double()[:, None, None] * torch.ones(L, L).tril()               # (A, 1, L', L')
    x = umt_bert_layers(decoder, umt_embeddings(decoder, answers), heads, range(fusion), causal,
                        states.expand(A, -1, -1), mask.expand(A, -1))
    y = nnf.linear(x, head["transform.dense.weight"], head["transform.dense.bias"])
    y = nnf.layer_norm(y * (1 + torch.erf(y / math.sqrt(2))) / 2, y.shape[-1:], head["transform.LayerNorm.weight"],
                       head["transform.LayerNorm.bias"], 1e-12)
    logits = nnf.linear(y, head["decoder.weight"], head["decoder.bias"])[:, :-1]
    p = logits.softmax(-1).log().gather(2, answers[:, 1:, None])[..., 0]
    return p.masked_fill(answers[:, 1:] == 0, 0)


def test_answers_are_scored_as_umt_scores_them():
    saved = umt_weights("QA", seed=15, C=192, D=128, layers=4, fusion=2)
    saved |= {key: 8 * x for key, x in saved.items()                    # so that the question matters to the answers
              if re.match(r"text_decoder.*crossattention\.(output\.dense|self\.query)\.weight", key)}
    torch.save(saved, "umt.pth")
    convert.main(convert.Config("umt.pth", "out"))
    model = load_model("out").double()
    assert type(model) is VideoToText and model.bert is not None and not model.training
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 3, 3, 32, 48), generator=g, dtype=torch.uint8)
    questions = torch.randint(3, 100, (6, 9), generator=g)                              # no [SEP], padded
    answers = torch.randint(3, 100, (90, 5), generator=g)
    questions[:, 0] = answers[:, 0] = 101                                               # [CLS]
    answers[:, 1] = 3 + torch.randperm(97, generator=g)[:90]
    answers[4, 1] = answers[8, 1]                                       # two answers with the same first token
    for a, row in enumerate(answers):                                   # 3, 4 or 5 tokens with [SEP], or 5 without
        row[3 + a % 4:] = 0
        if a % 4 < 3:
            row[2 + a % 4] = 102
    for q, row in enumerate(questions):
        row[2 + q:] = 0
    clip_index, choices = torch.tensor([1, 0, 1, 1, 0, 0]), {}
    with torch.no_grad():
        context, mask = model.encode_context(model.encode_video(video)[0], questions, clip_index)
        for q, clip in enumerate(clip_index.tolist()):
            expected = umt_log_likelihood(saved, video[clip], questions[q:q + 1], answers, heads=2, layers=4, fusion=2)
            log_p = model.log_likelihood(answers, torch.full((90,), q), context, mask)
            torch.testing.assert_close(log_p.double(), expected, rtol=1e-5, atol=1e-5)
            for k, twice in ((90, True), (90, False), (5, True), (1, True)):
                top = expected[:, 0].argsort(descending=True)[:k]                       # by the first token
                best = top[(expected[top].sum(1) + twice * expected[top, 0]).argmax()].item()
                choice = evaluation.rank_answers(model, answers, context[q:q + 1], mask[q:q + 1], k, twice).item()
                choices.setdefault((k, twice), []).append(choice)
                assert choice == best
    assert choices[90, True] not in (choices[90, False], choices[1, True])              # k and `twice` matter here


# ---------------------------------------------------------------------------------------------------------------------
# Folder and report

@pytest.mark.parametrize("nested", [False, True], ids=["flat", "under model"])
@pytest.mark.parametrize("kind", ["stage 2", "retrieval", "QA"])
def test_a_converted_folder_is_a_model_with_umts_weights(kind, nested):
    saved, report = convert_file(kind, nested)
    model = load_model("out", VideoToText if kind == "QA" else ClusterSTM)
    weights, config = model.state_dict(), read_json("out/config.json")
    assert model.vit_cfg == ViTConfig(width=128, depth=3, heads=2)
    assert model.text_cfg == TextEncoderConfig(width=64, depth=3, heads=1, fusion_layers=2, vocab_size=110,
                                               mask_token_id=103, max_length=25 if kind == "QA" else 32)
    assert model.cfg == ModelConfig(embed_dim=512 if kind == "QA" else 24, target_dim=128)
    assert model.bert.cfg == bert_config(model.text_cfg, 128)
    prefix = "text_encoder.bert." if kind == "stage 2" else "text_encoder."
    expected = {f"bert.bert.{key.removeprefix(prefix)}": x for key, x in saved.items()
                if key.startswith(prefix) and not key.endswith("position_ids")}
    assert len(expected) == 5 + 3 * 16 + 2 * 10
    if kind == "stage 2":
        head = {key for key in saved if key.startswith("text_encoder.cls.") and ".decoder." not in key}
        expected |= {key.replace("text_encoder.", "bert."): saved[key] for key in head}
        assert len(head) == 5
    if kind == "QA":
        expected |= {key: x for key, x in saved.items() if key.startswith("text_decoder.")
                     and not key.endswith("position_ids") and ".predictions.decoder." not in key}
        assert len(expected) == 5 + 3 * 16 + 2 * 10 + 5 + 2 * 26 + 5
    else:
        expected |= {key.removeprefix("vision_encoder."): x for key, x in saved.items()
                     if re.match(r"vision_encoder\.pool_norm|vision_proj|text_proj|itm_head|temp", key)}
    for name, x in expected.items():
        assert torch.equal(weights[name], x), name
    new = {name for name in weights if name not in expected and not name.startswith("vit.")}
    assert new == {name for name in weights if name.startswith(tuple(config["new"]))}
    assert new == {line.split()[1] for line in report if line.startswith("new")}
    assert all(name.startswith(("decoder.", "bert.cls.")) for name in new)
    assert config["data"] == {"num_frames": KINDS[kind], "image_size": 224}
    assert DataConfig(**config["data"], frame_cache=False)
    assert config["task"] == "" and (kind == "stage 2" or report[-2].startswith("--task was not given"))
    assert any(line.startswith("ignored  epoch:") for line in report) == nested
    assert "tokenizer.json is missing" in report[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_names_every_key_and_every_new_weight(kind):
    saved, report = convert_file(kind)
    weights = read_checkpoint("out", "a test")[1]
    actions = [line.split()[0] for line in report]
    assert actions.count("new") == sum(
        name.startswith(tuple(convert.FAMILIES[f"UMT {kind}"].new_prefixes)) for name in weights)
    lines = {line.split(None, 2)[1]: line for line in report[:-1]}
    for key in saved:
        if key.endswith(("q_bias", "v_bias")):
            line, = [line for line in report if line.startswith(f"joined   {key[:-6]}(q_bias, 0, v_bias) (384,)")]
            assert line.endswith(f"-> vit.{key[:-6].split('encoder.')[-1].replace('attn.', '')}qkv.bias")
        else:
            assert re.match(rf"(taken|renamed|tied|skipped) +{re.escape(key)} \(", lines[key]), key
    skipped = {key for key in saved if lines.get(key, "").startswith("skipped")}
    assert skipped == {key for key in saved if key.startswith(("clip_", "vision_encoder.clip_"))
                       or key.endswith("position_ids")}
    summary, = [line for line in report if line.startswith("umt.pth, ")]
    assert summary.startswith(f"umt.pth, UMT {kind}, {len(saved)} keys: ")
    counts = {action: actions.count(action) for action in ("taken", "renamed", "joined", "tied", "skipped", "new")}
    for action, count in counts.items():
        assert (f" {count} {action}" in summary) == (count > 0)
    assert len(saved) == 2 * counts["joined"] + sum(counts[a] for a in ("taken", "renamed", "tied", "skipped"))
    assert counts["joined"] == TINY["depth"] and counts["tied"] == 2 * (kind in ("stage 2", "QA"))
    if kind in ("stage 2", "retrieval"):
        assert lines["temp"] == "taken    temp () float32 -> temp"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [BASE, LARGE], ids=["B/16", "L/16"])
def test_the_rules_cover_b16_and_l16(kind, size):
    report = []
    with torch.device("meta"), mock.patch("torch.equal", lambda a, b: True):        # shapes alone, without memory
        saved = {key: torch.empty(shape) for key, shape in umt_shapes(kind, **size).items()}
        model, configs = convert.convert(convert.FAMILIES[f"UMT {kind}"], saved, "umt.pth", report)
    large = size is LARGE
    expected = {"vit": ViTConfig(width=1024, depth=24, heads=16, drop_path=0.2) if large else ViTConfig()}
    if kind != "stage 1":
        sizes = dict(width=1024, depth=24, heads=16, fusion_layers=5) if large else {}
        expected["text"] = TextEncoderConfig(vocab_size=30522, mask_token_id=103, **sizes,
                                             max_length=25 if kind == "QA" else 32)
        expected["model"] = ModelConfig(embed_dim=768 if large else 512, target_dim=size["C"])
    assert configs == expected
    vit = model["vit"] if kind == "stage 1" else model.vit
    count = sum(x.numel() for key, x in saved.items() if re.match(r"(vision_encoder\.)?encoder\.", key))
    zeros = size["depth"] * size["C"]                                               # the biases of k
    assert count == sum(p.numel() for p in vit.parameters()) - zeros
    assert abs(count / 1e6 - (303.07 if large else 85.64)) < 0.2                    # the count in UMT's reports
    assert kind != "stage 1" or not any(line.startswith("new") for line in report)


def test_weights_of_any_dtype_become_fp32():
    saved = {key: x.half() if x.is_floating_point() else x for key, x in umt_weights("stage 1").items()}
    torch.save(saved, "umt.pth")
    convert.main(convert.Config("umt.pth", "out"))
    weights = read_checkpoint("out", "a test")[1]
    assert all(x.dtype == torch.float32 for x in weights.values())
    assert torch.equal(weights["vit.norm.weight"], saved["encoder.norm.weight"].float())
    assert any("encoder.norm.weight (128,) float16 -> vit.norm.weight" in line for line in read_report())


def test_new_weights_depend_on_no_random_state_and_leave_it_as_it_is():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    convert_file("QA", out="a")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    convert_file("QA", out="b")
    a, b = (read_safetensors(f"{out}/model.safetensors") for out in "ab")
    assert a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(x, b[0][name]) for name, x in a[0].items())


@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "retrieval"])
def test_a_student_can_start_from_a_converted_folder(kind):
    convert_file(kind)
    config, weights = read_checkpoint("out", "a test")
    vit = ViTConfig(width=128, depth=3, heads=2)
    text = TextEncoderConfig(width=64, depth=3, heads=1, fusion_layers=2, vocab_size=110, mask_token_id=103)
    cfg = ModelConfig(embed_dim=24, target_dim=40, decoder="joint", decoder_width=64)
    torch.manual_seed(1)
    model = ClusterSTM(vit, text, cfg)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.init_from("out")
    new = tuple(config["new"])
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name] if name.startswith(new) else weights[name]), name
    assert not torch.equal(model.vit.norm.weight, before["vit.norm.weight"])
    with pytest.raises(ValueError, match=r"out/config\.json: vit\.pos_embed.*'3d'.*'1d'"):
        ClusterSTM(replace(vit, pos_embed="3d"), text, cfg).init_from("out")


@pytest.mark.parametrize("kind, task", [("QA", "activitynet-qa"), ("retrieval", "didemo"), ("retrieval", "msrvtt-mc")])
def test_the_task_is_written_to_the_config(kind, task):
    _, report = convert_file(kind, task=task)
    config = read_json("out/config.json")
    assert config["task"] == task and config["data"]["num_frames"] == TASKS[task].num_frames == 12
    assert config["text"]["max_length"] == TASKS[task].max_text_length
    assert not any(line.startswith("--task") for line in report)


@pytest.mark.parametrize("kind, task, message", [
    ("QA", "msrvtt", "umt.pth: task .* question answering .*UMT QA.*msrvtt, retrieval$"),
    ("retrieval", "msvd-qa", "umt.pth: task .* retrieval or multiple choice .*UMT retrieval.*msvd-qa, question"),
    ("stage 2", "msrvtt-qa", "umt.pth: task .*empty.*UMT stage 2.*msrvtt-qa, question answering$"),
    ("stage 1", "msrvtt-caption", "umt.pth: task .*empty.*UMT stage 1.*msrvtt-caption, captioning$"),
    ("QA", "msrvt-qa", "task .*'msrvt-qa'.*'msrvtt-qa'"),
])
def test_a_task_that_does_not_fit_the_file_is_refused(kind, task, message):
    with pytest.raises(ValueError, match=message):
        convert_file(kind, task=task)
    assert glob.glob("*") == ["umt.pth"]


@pytest.mark.parametrize("kind, message", [("QA", "out .*ClusterSTM.*VideoToText"), ("stage 1", "out/config.*text")])
def test_a_folder_without_a_student_is_not_loaded_as_one(kind, message):
    convert_file(kind)
    with pytest.raises(ValueError, match=message):
        ClusterSTM.from_pretrained("out")


def save_tokenizer():
    """Write words.json, a tokenizer of 110 tokens with [MASK] where BERT has it."""
    special = [token for token in SPECIAL_TOKENS if token != "[MASK]"]
    tokens = special + [f"[unused{i}]" for i in range(103 - len(special))] + ["[MASK]", *"abcdef"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save("words.json")
    return tokenizer


@pytest.mark.parametrize("task", ["msrvtt-qa", ""])
def test_eval_scores_a_converted_qa_file(task):
    save_tokenizer()
    torch.save(umt_weights("QA"), "umt.pth")
    convert.main(convert.Config("umt.pth", "out", task, "words.json"))
    os.makedirs("data/videos_images/msrvtt")
    write("data/videos_images/msrvtt/v.mp4", 14, shape=(32, 32))
    for name, content in (("qa_test", [{"video": "v.mp4", "question": q, "answer": a} for q, a in ("ab", "cd", "ef")]),
                          ("qa_answer_list", ["a", "b", "d f"])):
        write_json(f"data/msrvtt_{name}.json", content)
    result = evaluation.main(evaluation.Config("msrvtt-qa", "out", "data", device="cpu", workers=0))
    assert result["frames"] == (12 if task else 4) and result["size"] == 224 and result["tokens"] == "all"
    assert result["questions"] == 3 and " 25 " in result["protocol"][0]
    assert {prediction["ranked"] for prediction in result["predictions"]} <= {"a", "b", "d f"}


def test_a_tokenizer_of_the_same_vocabulary_is_copied_into_the_folder():
    tokenizer = save_tokenizer()
    torch.save(umt_weights("stage 2"), "umt.pth")
    convert.main(convert.Config("umt.pth", "out", tokenizer="words.json"))
    assert load_tokenizer("out/tokenizer.json").get_vocab() == tokenizer.get_vocab()
    assert not any("tokenizer.json" in line for line in read_report())
    torch.save(umt_weights("stage 2", vocab=109), "other.pth")
    with pytest.raises(ValueError, match=r"words.json: .*\(109, 103\).*\(110, 103\)"):
        convert.main(convert.Config("other.pth", "other", tokenizer="words.json"))
    torch.save(umt_weights("stage 1"), "vit.pth")
    with pytest.raises(ValueError, match="tokenizer .*empty.*words.json"):
        convert.main(convert.Config("vit.pth", "vit", tokenizer="words.json"))
    assert not os.path.exists("other") and not os.path.exists("vit")


# ---------------------------------------------------------------------------------------------------------------------
# Files that are refused

def without(weights, key):
    return {k: x for k, x in weights.items() if k != key}


ABSENT = "must be absent.*got "
BAD_FILES = {                   # kind of file, then case: (change of its tensors, message)
    "stage 2": {
        "ViT weight missing": (
            lambda w: without(w, "vision_encoder.encoder.blocks.1.mlp.fc1.weight"),
            r"vision_encoder.encoder.blocks.1.mlp.fc1.weight .*\(512, 128\), got no weight"),
        "text weight missing": (
            lambda w: without(w, "text_encoder.bert.encoder.layer.1.crossattention.self.key.bias"),
            r"text_encoder.bert.encoder.layer.1.crossattention.self.key.bias .*\(64,\), got no weight"),
        "no cross-attention": (
            lambda w: {k: x for k, x in w.items() if "crossattention" not in k},
            r"bert.encoder.layer.2.crossattention.self.query.weight .*\(64, 64\), got no weight"),
        "projection missing": (lambda w: without(w, "vision_proj.weight"), "vision_proj.weight .* 2 .*got no weight"),
        "temperature missing": (lambda w: without(w, "temp"), r"temp .*\(\), got no weight"),
        "pool_norm missing": (lambda w: without(w, "vision_encoder.pool_norm.bias"),
                              r"vision_encoder.pool_norm.bias .*\(128,\), got no weight"),
        "patch embedding missing": (lambda w: without(w, "vision_encoder.encoder.patch_embed.proj.weight"),
                                    "vision_encoder.encoder.patch_embed.proj.weight .*got no weight"),
        "part of the MLM head missing": (
            lambda w: without(w, "text_encoder.cls.predictions.transform.LayerNorm.bias"),
            "text_encoder.cls.predictions.transform.LayerNorm.bias .*got no weight"),
        "q_bias missing": (lambda w: without(w, "vision_encoder.encoder.blocks.2.attn.q_bias"),
                           r"vision_encoder.encoder.blocks.2.attn.q_bias.* got \(0, 128\)"),
        "q_bias and v_bias missing": (
            lambda w: {k: x for k, x in w.items() if not re.search(r"blocks.0.attn.[qv]_bias", k)},
            r"vision_encoder.encoder.blocks.0.attn.\(q_bias, 0, v_bias\) .*\(384,\), got no weight"),
        "q_bias too long": (lambda w: w | {"vision_encoder.encoder.blocks.0.attn.q_bias": torch.ones(129),
                                           "vision_encoder.encoder.blocks.0.attn.v_bias": torch.ones(126)},
                            r"blocks.0.attn.q_bias and v_bias .* got \(129, 126\)"),
        "wrong shape": (lambda w: w | {"vision_encoder.encoder.blocks.0.attn.proj.weight": torch.ones(128, 127)},
                        r"vision_encoder.encoder.blocks.0.attn.proj.weight .*\(128, 128\), got \(128, 127\)"),
        "transposed": (lambda w: w | {"text_proj.weight": torch.ones(64, 24)},
                       r"text_proj.weight .*\(24, 64\), got \(64, 24\)"),
        "tubelets of two frames": (
            lambda w: w | {"vision_encoder.encoder.patch_embed.proj.weight": torch.ones(128, 3, 2, 16, 16)},
            r"patch_embed.proj.weight .*\(128, 3, 1, 16, 16\), got \(128, 3, 2, 16, 16\)"),
        "unknown key": (lambda w: w | {"text_prior.weight": torch.ones(3)}, rf"text_prior.weight {ABSENT}\(3,\)"),
        "unknown text key": (lambda w: w | {"text_encoder.bert.pooler.dense.bias": torch.ones(64)},
                             rf"text_encoder.bert.pooler.dense.bias {ABSENT}\(64,\)"),
        "unknown block key": (lambda w: w | {"vision_encoder.encoder.blocks.0.norm3.bias": torch.ones(128)},
                              rf"vision_encoder.encoder.blocks.0.norm3.bias {ABSENT}\(128,\)"),
        "head not tied": (
            lambda w: w | {"text_encoder.cls.predictions.decoder.bias": torch.ones(110)},
            "text_encoder.cls.predictions.decoder.bias .*equal to text_encoder.cls.predictions.bias"),
        "not a tensor": (lambda w: w | {"temp": 0.07}, "temp .*tensor.*float"),
        "width": (lambda w: umt_weights("stage 2", C=96), r"patch_embed.proj.weight .* 64 .*\(96, 3, 1, 16, 16\)"),
        "text width": (lambda w: umt_weights("stage 2", D=32), r"word_embeddings.weight .* 64 .*\(110, 32\)"),
        "ViT alone": (lambda w: {k: x for k, x in w.items() if k.startswith("vision_encoder.encoder.")},
                      "family .*vision_encoder.encoder.patch_embed.proj.weight"),
        "another model's": (lambda w: {"features.0.weight": torch.ones(1)},
                            "UMT stage 1, UMT stage 2, UMT QA, UMT retrieval.*features.0.weight"),
        "empty": (lambda w: {}, "family .*empty"),
        "a list": (lambda w: [1, 2], "content .*dict.*list"),
    },
    "QA": {
        "decoder weight missing": (
            lambda w: without(w, "text_decoder.bert.encoder.layer.1.crossattention.output.dense.bias"),
            r"text_decoder.bert.encoder.layer.1.crossattention.output.dense.bias .*\(64,\), got no weight"),
        "decoder layer missing": (
            lambda w: {k: x for k, x in w.items() if not k.startswith("text_decoder.bert.encoder.layer.1.")},
            r"text_decoder.bert.encoder.layer.1.attention.self.query.weight .*got no weight"),
        "head missing": (lambda w: without(w, "text_decoder.cls.predictions.bias"),
                         r"text_decoder.cls.predictions.bias .*\(110,\), got no weight"),
        "decoder embedding missing": (
            lambda w: without(w, "text_decoder.bert.embeddings.word_embeddings.weight"),
            r"text_decoder.bert.embeddings.word_embeddings.weight .*\(110, 64\), got no weight"),
        "additional layer": (lambda w: w | {"text_decoder.bert.encoder.layer.2.output.dense.bias": torch.ones(64)},
                             rf"text_decoder.bert.encoder.layer.2.output.dense.bias {ABSENT}\(64,\)"),
        "pooler": (lambda w: w | {"text_decoder.bert.pooler.dense.bias": torch.ones(64)},
                   rf"text_decoder.bert.pooler.dense.bias {ABSENT}\(64,\)"),
        "unknown key": (lambda w: w | {"text_decoder.prior": torch.ones(3)}, f"text_decoder.prior {ABSENT}"),
        "MLM head of the encoder": (lambda w: w | {"text_encoder.cls.predictions.bias": torch.ones(110)},
                                    rf"text_encoder.cls.predictions.bias {ABSENT}\(110,\)"),
        "matching head": (lambda w: w | {"itm_head.bias": torch.ones(2)}, rf"itm_head.bias {ABSENT}\(2,\)"),
        "decoder attends to the video": (
            lambda w: w | {"text_decoder.bert.encoder.layer.0.crossattention.self.key.weight": torch.ones(64, 128)},
            r"self.key.weight .*\(64, 64\), got \(64, 128\)"),
        "head not tied": (
            lambda w: w | {"text_decoder.cls.predictions.decoder.weight": torch.ones(110, 64)},
            "text_decoder.cls.predictions.decoder.weight .*equal to text_decoder.bert.embeddings.word_embeddings"),
        "head tied to the encoder": (
            lambda w: w | {"text_decoder.cls.predictions.decoder.weight":
                           w["text_encoder.embeddings.word_embeddings.weight"]}, "equal to text_decoder.bert"),
    },
}


@pytest.mark.parametrize("kind, case", [(kind, case) for kind, cases in BAD_FILES.items() for case in cases])
def test_a_wrong_file_is_refused_in_one_line(kind, case, capsys):
    change, message = BAD_FILES[kind][case]
    torch.save(change(umt_weights(kind)), "umt.pth")
    code, _, err = command("tools.convert", ["umt.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, "umt.pth: .*" + message)
    assert glob.glob("*") == ["umt.pth"]


@pytest.mark.parametrize("change", [dict(depth=11), dict(layers=11), dict(fusion=2)], ids=str)
def test_a_b16_that_lacks_whole_layers_is_refused(change):
    with torch.device("meta"):
        saved = {key: torch.empty(shape) for key, shape in umt_shapes("retrieval", **{**BASE, **change}).items()}
        with pytest.raises(ValueError, match=r"umt.pth: .*width 768 .*\[12, 12, 3\].*1[12]"):
            convert.convert(convert.FAMILIES["UMT retrieval"], saved, "umt.pth", [])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(zipped, capsys):
    torch.save(umt_weights("stage 1"), "whole.pth", _use_new_zipfile_serialization=zipped)
    with open("whole.pth", "rb") as f:
        whole = f.read()
    for content in (whole[:len(whole) // 2], whole[:-9], whole[:300], b"", b"no pickle at all", b"\x80\x02}", b"PK"):
        with open("umt.pth", "wb") as f:
            f.write(content)
        for flags in ([], ["--trust"]):
            code, _, err = command("tools.convert", ["umt.pth", "out", *flags], capsys)
            assert_one_line("tools.convert", code, err, "umt.pth( is not a checkpoint|: its family|: the content)")
    code, _, err = command("tools.convert", ["none.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, r"\[Errno 2\].*none.pth")
    assert not os.path.exists("out")


class MakeFolder:
    """An object whose pickle makes a folder when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_other_objects_needs_trust_and_runs_no_code(zipped, capsys, monkeypatch):
    module = types.ModuleType("utils.easydict")
    EasyDict = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
    module.EasyDict = EasyDict
    config = EasyDict(lr=1e-4)
    config.inner = EasyDict(seen={1, 2})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "utils.easydict", module)
        patch.setitem(sys.modules, "utils", types.ModuleType("utils"))
        saved = {"model": umt_weights("retrieval"), "config": config, "run": MakeFolder(), "epoch": 3}
        saved["model"]["temp"] = torch.nn.Parameter(saved["model"]["temp"])
        torch.save(saved, "umt.pth", _use_new_zipfile_serialization=zipped)
    code, _, err = command("tools.convert", ["umt.pth", "out"], capsys)
    assert_one_line("tools.convert", code, err, r"umt.pth: .*utils.easydict.EasyDict.*--trust")
    assert not os.path.exists("out") and not os.path.exists("made")
    code, out, err = command("tools.convert", ["umt.pth", "out", "--trust"], capsys)
    assert code == 0 and not os.path.exists("made"), err
    assert "replaced utils.easydict.EasyDict " in out and "replaced posix.mkdir " in out
    assert "ignored  config:" in out
    weights = ClusterSTM.from_pretrained("out").state_dict()
    assert torch.equal(weights["temp"], saved["model"]["temp"])
    assert torch.equal(weights["text_proj.weight"], saved["model"]["text_proj.weight"])


def test_a_folder_appears_complete_or_not_at_all_and_replaces_none(capsys, monkeypatch):
    torch.save(umt_weights("stage 1"), "umt.pth")
    os.makedirs("full")
    with open("full/notes.txt", "w") as f:
        f.write("mine")
    for out in ("full", "umt.pth"):
        code, _, err = command("tools.convert", ["umt.pth", out], capsys)
        assert_one_line("tools.convert", code, err, f"out .*{out}")
    assert os.listdir("full") == ["notes.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_weights", mock.Mock(side_effect=OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            convert.main(convert.Config("umt.pth", "new/deep/out"))
    assert os.listdir("new/deep") == []
    os.makedirs("empty")
    for out in ("empty", "new/deep/out/"):
        code, printed, _ = command("tools.convert", ["umt.pth", out], capsys)
        assert code == 0 and f"written to {out}" in printed
        assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "report.txt"]
        with open(f"{out}/report.txt") as f:
            assert f.read() in printed
    assert sorted(os.listdir(".")) == ["empty", "full", "new", "umt.pth"]


def test_help_explains_the_settings(capsys):
    code, out, _ = command("tools.convert", ["--help"], capsys)
    assert code == 0 and all(word in out for word in ("--task", "--tokenizer", "--trust", "stage 1", "folder to write"))
