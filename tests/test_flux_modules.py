"""FluxViT's modules in the student's ViT, against statements of their equations in fp64."""

import json
import math
import os
import random
from dataclasses import asdict, replace
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from helpers.models import (
    MODEL,
    OBJECTIVES,
    TIGHT,
    VIT,
    N,
    T,
    config_json,
    configs,
    layer_norm,
    random_batch,
    random_ids,
    random_keep,
    random_video,
    save_model,
    seeded,
    shaken,
    student,
    to_fp32,
    unit,
    video_to_text,
)

import encoders
from blocks import Block, LocalPosition, RMSNorm
from decoders import Decoder
from encoders import ViT, ViTConfig
from files import config_from_dict
from loop import parameter_groups
from model import ClusterSTM, load_model
from positions import convolve_pos_embed, interpolate_pos_embed
from targets import TeacherTargets
from train import wrap_layers

pytestmark = pytest.mark.usefixtures("seed_0")
CHOICES = {
    "patch_norm": ("none", "layer", "rms"), "local_pos": ("none", "affine", "linear"),
    "global_pos": ("none", "affine", "conv"), "norm": ("layer", "rms"), "qk_norm": (False, True),
    "layer_scale": (0.0, 0.3), "qkv_bias": (True, False), "cls": (False, True),
}
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
TABLE = {"pos_embed": "learned", "grid": (5, 3, 3)}
RELEASE = {"patch_norm": "rms", "local_pos": "affine", "global_pos": "affine", "norm": "rms", "qk_norm": True,
           "layer_scale": 0.3, "qkv_bias": False, "cls": True}
PAPER = {"patch_norm": "layer", "local_pos": "linear", "global_pos": "conv", "cls": True}
ALONE = [{name: value} for name, values in CHOICES.items() for value in values[1:]]
GRIDS = [(1, 2, 3), (3, 3, 2), (4, 1, 1), (5, 3, 3), (2, 2, 3)]


def vit_of(modules, **changes):
    """A shaken ViT with learned positions and modules, in fp64."""
    return shaken(ViT(replace(VIT, **{**TABLE, **modules, **changes})))


def random_visible(grid, S, B=2):
    """Flat ids (B, S), in random order, of visible tokens of clips on a grid."""
    return torch.rand(B, math.prod(grid), generator=seeded(S)).argsort(1)[:, :S]


def clip_of(grid, B=2, seed=0):
    return random_video(B, grid[0], 4 * grid[1], 4 * grid[2], seed)


# ---------------------------------------------------------------------------------------------------------------------
# The ViT as its equations say, one clip and one head at a time

def norm_ref(kind, x, norm):
    """y_c = g_c (x_c - m) / s + b_c with mean m and deviation s (layer), or g_c x_c / sqrt(mean of squares) (rms)."""
    if kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    return x if kind == "none" else layer_norm(x, norm)


def patch_ref(vit, cfg, video, n):
    """The embedding of patch n of a clip (T, 3, H, W)."""
    h, w = video.shape[2] // 4, video.shape[3] // 4
    t, i, j = n // (h * w), n % (h * w) // w, n % w
    pixels = video[t, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4].double() / 255
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (ViT.mean, ViT.std))
    pixels = norm_ref(cfg.patch_norm, ((pixels - mean) / std).flatten(), vit.patch_norm_in)
    return norm_ref(cfg.patch_norm, vit.patch_embed.weight @ pixels + vit.patch_embed.bias, vit.patch_norm_out)


def convolve_ref(table, kernel, bias):
    """y[t, i, j, c] = b_c + sum of k[d, e, f, c] p[t + d - r, i + e - r, j + f - r, c] over the entries that exist."""
    y, r = torch.zeros_like(table), len(kernel) // 2
    for index in product(*map(range, table.shape[:3])):
        y[index] = bias
        for offset in product(range(len(kernel)), repeat=3):
            source = tuple(a + d - r for a, d in zip(index, offset, strict=True))
            if all(0 <= a < n for a, n in zip(source, table.shape, strict=False)):
                y[index] += kernel[offset] * table[source]
    return y


def positions_ref(vit, cfg, grid):
    """Positions (Thw, C) of a grid: the table, convolved, then interpolated by torch."""
    x = vit.position_embedding
    if cfg.global_pos != "none":
        x = convolve_ref(x, vit.position_embedding_kernel, vit.position_embedding_bias)
    x = nnf.interpolate(x.permute(1, 2, 3, 0).flatten(0, 1), size=grid[0], mode="linear")     # (h'w', C, T)
    x = x.unflatten(0, cfg.grid[1:]).permute(3, 2, 0, 1)
    return nnf.interpolate(x, size=grid[1:], mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2)


def attention_ref(block, cfg, x, log_size):
    """Z = (softmax(Q K^T / sqrt D + log n) + LPE) V by explicit matrices, then the projection: x (S, C) -> (S, C)."""
    (S, C), D = x.shape, x.shape[1] // cfg.heads
    eye = torch.eye(max(S, D), dtype=torch.float64)
    y = norm_ref(cfg.norm, x, block.norm1) @ block.qkv.weight.T + (block.qkv.bias if cfg.qkv_bias else 0)
    q, k, v = y[:, :C], y[:, C:2 * C], y[:, 2 * C:]
    if cfg.qk_norm:
        q, k = norm_ref("rms", q, block.q_norm), norm_ref("rms", k, block.k_norm)
    z = torch.empty_like(v)
    for h in range(cfg.heads):
        part = slice(h * D, (h + 1) * D)
        matrix = (q[:, part] @ k[:, part].T / D ** 0.5 + log_size).softmax(-1)
        if cfg.local_pos == "linear":       # on the S D values of a head: softmax (x) 1 + 1 (x) A^T
            matrix = torch.kron(matrix, eye[:D, :D]) + torch.kron(eye[:S, :S], block.local_pos.weight[h].T.contiguous())
            z[:, part] = (matrix @ v[:, part].flatten()).view(S, D)
            continue
        for c in range(h * D, (h + 1) * D):
            local = block.local_pos.weight[c] * eye[:S, :S] if cfg.local_pos == "affine" else 0
            z[:, c] = (matrix + local) @ v[:, c] + (block.local_pos.bias[c] if cfg.local_pos == "affine" else 0)
    return z @ block.proj.weight.T + block.proj.bias


def encode_ref(vit, cfg, video, ids=None, size=None):
    """Tokens (B, S, C) and the states of class tokens (B, C) or None."""
    grid, tokens = (video.shape[1], video.shape[3] // 4, video.shape[4] // 4), []
    positions = positions_ref(vit, cfg, grid)
    for b in range(len(video)):
        visible = range(math.prod(grid)) if ids is None else ids[b].tolist()
        x = torch.stack([patch_ref(vit, cfg, video[b], n) + positions[n] for n in visible])
        log_size = torch.zeros(len(x), dtype=torch.float64) if size is None else size[b].log()
        if cfg.cls:
            x, log_size = torch.cat([vit.cls_token[None], x]), nnf.pad(log_size, (1, 0))
        for block in vit.blocks:
            scale1, scale2 = (block.scale1, block.scale2) if cfg.layer_scale else (1, 1)
            x = x + scale1 * attention_ref(block, cfg, x, log_size)
            y = nnf.gelu(norm_ref(cfg.norm, x, block.norm2) @ block.fc1.weight.T + block.fc1.bias)
            x = x + scale2 * (y @ block.fc2.weight.T + block.fc2.bias)
        tokens.append(norm_ref(cfg.norm, x, vit.norm))
    tokens = torch.stack(tokens)
    return (tokens[:, 1:], tokens[:, 0]) if cfg.cls else (tokens, None)


@pytest.mark.parametrize("modules", [*ALONE, RELEASE, PAPER, {"cls": True, "local_pos": "affine"},
                                     {"cls": True, "local_pos": "linear", "qk_norm": True}], ids=str)
def test_a_vit_equals_its_equations(modules):
    cfg, vit = replace(VIT, **TABLE, **modules), vit_of(modules)
    for grid, B, S in zip(GRIDS, (2, 1, 2, 1, 2), (None, 5, 1, None, 7), strict=True):
        video, ids = clip_of(grid, B), None if S is None else random_visible(grid, S, B)
        size = None if S is None else torch.rand(B, S, generator=seeded(), dtype=torch.float64) * 9 + 1
        with torch.no_grad():
            (tokens, cls), expected = vit.encode(video, ids, size), encode_ref(vit, cfg, video, ids, size)
            torch.testing.assert_close(tokens, expected[0], **TIGHT)
            assert torch.equal(vit(video, ids, size), tokens)
            assert (cls is None) == (not cfg.cls)
            if cfg.cls:
                torch.testing.assert_close(cls, expected[1], **TIGHT)
            torch.testing.assert_close(vit(video, ids, size, vit.embed_patches(video)), tokens, **TIGHT)
        if S == 7:
            assert not torch.isclose(vit(video, ids), tokens).all(-1).any()


# ---------------------------------------------------------------------------------------------------------------------
# Every combination

def test_every_combination_trains_and_is_described_by_its_config():
    video, ids = random_video(2), random_keep(2)
    assert len(COMBINATIONS) == 864
    for modules in COMBINATIONS:
        cfg = replace(VIT, **TABLE, **modules, depth=1)
        assert config_from_dict(ViTConfig, json.loads(json.dumps(asdict(cfg))), "config.json") == cfg
        vit = ViT(cfg)
        tokens = vit(video, ids)
        (tokens.square() * torch.arange(16)).mean().backward()
        with torch.no_grad():
            for name, p in vit.named_parameters():
                assert p.grad.isfinite().all() and p.grad.any(), (modules, name)
                p.sub_(p.grad, alpha=0.1)
            assert not torch.isclose(vit(video, ids), tokens).all(-1).any(), modules


def test_every_pair_of_modules_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)               # what is read again at once needs no disk
    chosen, video = random.Random(0).sample(COMBINATIONS, 50), random_video(2)
    items = {pair for modules in COMBINATIONS for pair in combinations(modules.items(), 2)}
    assert items == {pair for modules in chosen for pair in combinations(modules.items(), 2)}
    for modules in chosen:
        cfg = {"vtc_weight": 0, "vtm_weight": 0, "mlm_weight": 0, "pooling": "cls" if modules["cls"] else "tokens"}
        model = shaken(ClusterSTM(*configs(vit={**TABLE, **modules}, model=cfg), with_bert=False)).float()
        loaded = load_model(save_model(model, tmp_path))
        assert config_json(loaded) == config_json(model) and loaded.vit_cfg == model.vit_cfg
        with torch.no_grad():
            for x, y in zip(loaded.encode_video(video), model.encode_video(video), strict=True):
                assert torch.equal(x, y), modules


def test_modules_change_no_other_initial_weight():
    """But for qkv_bias: a layer without biases draws fewer numbers."""
    def build(**modules):
        torch.manual_seed(0)
        return ViT(replace(VIT, **TABLE, **modules)).state_dict()

    plain = build()
    assert [*plain] == ["position_embedding", "patch_embed.weight", "patch_embed.bias", *(
        f"blocks.{i}.{layer}.{part}" for i in range(2) for layer in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
        for part in ("weight", "bias")), "norm.weight", "norm.bias"]
    for modules in [*ALONE, {**RELEASE, "qkv_bias": True}]:
        if modules == {"qkv_bias": False}:
            continue
        weights = build(**modules)
        assert [*weights] != [*plain]
        assert all(torch.equal(weights[key], value) for key, value in plain.items() if key in weights)


@pytest.mark.parametrize("modules", [RELEASE, PAPER], ids=["release", "paper"])
def test_a_student_trains_on_every_loss_at_any_grid(modules):
    pooling = {"pooling": "cls", "proportional": True}
    for objective in OBJECTIVES:
        model = student(vit={**TABLE, **modules}, model={"objective": objective, **pooling}).train()
        for grid in GRIDS[:4]:
            model.zero_grad()
            (T, h, w), E = grid, MODEL.target_dim
            batch = SimpleNamespace(video=clip_of(grid, 3), text_ids=random_ids(3), media_ids=torch.arange(3), seed=0)
            ids = random_visible(grid, 2, 3).sort(1).values
            losses = model(batch, TeacherTargets(ids, unit(3, T, h * w, E), unit(3, E), token_size=ids + 1.0))
            assert [*losses] == [OBJECTIVES[objective], "vtc", "vtm", "mlm"]
            sum(losses.values()).backward()
            for name, p in model.named_parameters():
                assert p.grad.isfinite().all() and p.grad.any(), (grid, name)


# ---------------------------------------------------------------------------------------------------------------------
# What a token's output depends on

@pytest.mark.parametrize("modules", [RELEASE, PAPER], ids=["release", "paper"])
def test_the_order_of_ids_does_not_matter(modules):
    vit, video, ids = vit_of(modules), clip_of((3, 2, 3), 2), random_visible((3, 2, 3), 8)
    size, order = torch.rand(2, 8, dtype=torch.float64) + 1, torch.randperm(8)
    for a, b in ((None, None), (size, size[:, order])):
        (tokens, cls), (permuted, same) = vit.encode(video, ids, a), vit.encode(video, ids[:, order], b)
        torch.testing.assert_close(permuted, tokens[:, order], **TIGHT)
        torch.testing.assert_close(same, cls, **TIGHT)


@pytest.mark.parametrize("modules", [RELEASE, PAPER], ids=["release", "paper"])
def test_pixels_of_masked_patches_may_be_nan(modules, monkeypatch):
    vit, video, ids = vit_of(modules), random_video(2), random_keep(2)
    expected, pool = vit.encode(video, ids), vit.embed_patches(video)
    masked = torch.ones(2, T * N, 1, dtype=torch.bool).scatter(1, ids[..., None], False)
    patchify = encoders.patchify
    monkeypatch.setattr(encoders, "patchify", lambda *args: patchify(*args).double().masked_fill(
        masked.view(2 * T, N, 1), torch.nan))
    for x, y in zip(vit.encode(video, ids), expected, strict=True):
        assert torch.equal(x, y)
    poisoned = vit.embed_patches(video)
    assert torch.equal(poisoned.isnan(), masked.expand_as(poisoned))
    torch.testing.assert_close(poisoned.where(~masked, 0), pool.where(~masked, 0), **TIGHT)
    for x, y in zip(vit.encode(video, ids, None, poisoned), expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    assert vit(video).isnan().all()


@pytest.mark.parametrize("kind", ["affine", "linear"])
def test_local_positions_are_a_function_of_a_tokens_values(kind):
    local = shaken(LocalPosition(kind, 6, 2))
    v, order = torch.randn(2, 2, 5, 3, dtype=torch.float64), torch.randperm(5)
    torch.testing.assert_close(local(v[:, :, order]), local(v)[:, :, order], **TIGHT)
    for s in range(5):
        torch.testing.assert_close(local(v[:, :, s:s + 1]), local(v)[:, :, s:s + 1], **TIGHT)


@pytest.mark.parametrize("kind", ["affine", "linear"])
def test_local_positions_begin_as_the_values(kind):
    v = torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(LocalPosition(kind, 16, 2)(v), v, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Patch norms

def scaled(vit, factor, shift, monkeypatch):
    """Patch embeddings of a clip whose normalised patches are multiplied and shifted, each by its own numbers."""
    pixels = ViT.patch_pixels
    with monkeypatch.context() as patch:
        patch.setattr(ViT, "patch_pixels", lambda self, video, ids: pixels(self, video, ids) * factor + shift)
        return vit.embed_patches(random_video(2))


@pytest.mark.parametrize("kind, ignores_scale, ignores_shift", [
    ("none", False, False), ("rms", True, False), ("layer", True, True)])
def test_patch_norms_ignore_scale_and_layer_norm_a_shift(kind, ignores_scale, ignores_shift, monkeypatch):
    vit = vit_of({"patch_norm": kind})
    factor, shift = torch.rand(2, T * N, 1, dtype=torch.float64) * 5 + 1, torch.randn(2, T * N, 1, dtype=torch.float64)
    expected = scaled(vit, 1, 0, monkeypatch)
    for args, ignored in (((factor, 0), ignores_scale), ((1, shift), ignores_shift),
                          ((factor, shift), ignores_shift)):
        x = scaled(vit, *args, monkeypatch)
        same = torch.isclose(x, expected, rtol=1e-4, atol=1e-4).all(-1)
        assert same.all() if ignored else not same.any()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_new_patch_norms_are_plain_and_leave_the_pixels_alone(kind):
    video, ids = random_video(2), random_keep(2)
    torch.manual_seed(0)
    plain = ViT(VIT).double()
    torch.manual_seed(0)
    vit = ViT(replace(VIT, patch_norm=kind)).double()
    assert torch.equal(vit.patch_pixels(video, ids), plain.patch_pixels(video, ids))    # the target of reconstruction
    center = (lambda x: x - x.mean(-1, keepdim=True)) if kind == "layer" else lambda x: x
    normalize = lambda x: center(x) / (center(x).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x = normalize(plain.patch_embed(normalize(plain.patch_pixels(video, ids))))
    torch.testing.assert_close(vit.embed_patches(video, ids), x, **TIGHT)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_flat_patch_has_a_finite_embedding_and_gradient(kind, monkeypatch):
    vit = ViT(replace(VIT, patch_norm=kind))
    monkeypatch.setattr(ViT, "patch_pixels", lambda *_: torch.zeros(1, T * N, 48))
    for value in (0, 255):
        x = vit(torch.full((1, T, 3, 8, 12), value, dtype=torch.uint8))
        x[..., 0].sum().backward()
    assert x.isfinite().all() and all(p.grad.isfinite().all() for p in vit.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Norms and factors of the blocks

def test_rms_norm_is_computed_in_the_precision_of_its_weight():
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(5, 8).bfloat16() * 1e-2
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = norm(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("modules", [RELEASE, PAPER], ids=["release", "paper"])
def test_modules_run_in_bf16_under_autocast(modules):
    torch.manual_seed(0)
    vit, video, ids = ViT(replace(VIT, **TABLE, **modules)), random_video(2), random_keep(2)
    dtypes, attend = [], nnf.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocks.sdpa", lambda *qkv, attn_mask: dtypes.append([x.dtype for x in qkv]) or attend(
            *qkv, attn_mask=attn_mask))
        tokens = vit(video, ids, torch.ones(2, 4))
        tokens.float().square().mean().backward()
    assert dtypes == [[torch.bfloat16] * 3] * 2
    torch.testing.assert_close(tokens.float(), vit(video, ids), rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in vit.parameters())


def test_queries_and_keys_are_normalised_over_all_heads():
    """So a factor of all queries has no effect, and one of a single head has."""
    block, x = shaken(Block(16, 2, qk_norm=True)), torch.randn(2, 5, 16, dtype=torch.float64)
    expected, weight, bias = block(x), block.qkv.weight, block.qkv.bias

    def multiplied(rows):
        with torch.no_grad():
            for p in (weight, bias):
                p[rows] *= 7
            y = block(x)
            for p in (weight, bias):
                p[rows] /= 7
        return y

    for rows in (slice(0, 16), slice(16, 32)):
        torch.testing.assert_close(multiplied(rows), expected, rtol=1e-4, atol=1e-4)
    for rows in (slice(0, 8), slice(24, 32), slice(32, 48)):
        assert not torch.isclose(multiplied(rows), expected, rtol=1e-4, atol=1e-4).all(-1).any()


def test_layer_scale_multiplies_each_channel_of_a_branch():
    torch.manual_seed(0)
    plain = Block(16, 2, drop_path=0.5).double()
    torch.manual_seed(0)
    block, x = Block(16, 2, drop_path=0.5, layer_scale=1e-5).double(), torch.randn(9, 5, 16, dtype=torch.float64)
    assert torch.equal(block.scale1, torch.full((16,), 1e-5).double()) and plain.scale1 is None
    assert torch.equal(block.scale1, block.scale2) and torch.equal(Block(16, 2, layer_scale=1).scale1, torch.ones(16))
    with torch.no_grad():
        block.scale1.copy_(torch.randn(16))
        block.scale2.zero_()
        torch.manual_seed(1)
        y = block(x) - x
        torch.manual_seed(1)
        branch = plain.apply_drop_path(plain.attend(plain.norm1(x), None, None))
    assert (branch == 0).all((1, 2)).any() and (branch != 0).all((1, 2)).any()
    torch.testing.assert_close(y, branch * block.scale1, **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------
# The table of positions

@pytest.mark.parametrize("size", [(3, 2, 4), (1, 1, 1), (1, 5, 2), (4, 1, 3)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_table_is_convolved_as_a_loop_does(size, k):
    draw = lambda *shape: torch.randn(*shape, generator=seeded(len(shape) + shape[0]), dtype=torch.float64)
    table, kernel, bias = (draw(*shape).requires_grad_() for shape in ((*size, 3), (k, k, k, 3), (3,)))
    y, expected = convolve_pos_embed(table, kernel, bias), convolve_ref(table, kernel, bias)
    torch.testing.assert_close(y, expected, **TIGHT)
    if k == 1:
        torch.testing.assert_close(y, table * kernel.flatten() + bias, **TIGHT)
    weight = draw(*size, 3) + 1
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (table, kernel, bias)) for x in (y, expected)),
                    strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        x = convolve_pos_embed(table.float(), kernel.float(), bias.float())
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["affine", "conv"])
def test_global_positions_begin_as_the_table_and_are_convolved_before_they_are_interpolated(kind):
    vit, device = ViT(replace(VIT, **TABLE, global_pos=kind)), torch.device("cpu")
    for grid in GRIDS:
        assert torch.equal(vit.positions(grid, device), interpolate_pos_embed(vit.position_embedding, grid))
    assert vit.position_embedding_kernel.shape == (*[3 if kind == "conv" else 1] * 3, 16)
    vit = shaken(vit)
    table = convolve_pos_embed(vit.position_embedding, vit.position_embedding_kernel, vit.position_embedding_bias)
    assert table.shape == (*TABLE["grid"], 16)
    for grid in GRIDS:
        torch.testing.assert_close(vit.positions(grid, device), interpolate_pos_embed(table, grid), **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------
# The class token

@pytest.mark.parametrize("masked, sized", [(False, False), (True, False), (True, True)])
def test_a_feature_pooled_by_the_class_token(masked, sized):
    model, video = student(vit={"cls": True}, model={"pooling": "cls"}), random_video(2, T=3)
    ids = random_visible((3, 2, 3), 5) if masked else None
    size = torch.rand(2, 5, dtype=torch.float64) * 9 + 1 if sized else None
    tokens, feature = model.encode_video(video, ids, size)
    expected, cls = model.vit.encode(video, ids, size)
    assert torch.equal(tokens, expected) and cls.shape == (2, 16)
    x = layer_norm(cls, model.pool_norm) @ model.vision_proj.weight.T + model.vision_proj.bias
    torch.testing.assert_close(feature.double(), x / x.norm(dim=-1, keepdim=True), rtol=1e-6, atol=1e-6)
    pool = model.vit.embed_patches(video)
    torch.testing.assert_close(model.encode_video(video, ids, size, pool)[1], feature, rtol=1e-6, atol=1e-6)
    for pooling in ("frames", "tokens"):
        model.cfg = replace(model.cfg, pooling=pooling)
        other = model.encode_video(video, ids, size)
        assert torch.equal(other[0], tokens) and not torch.isclose(other[1], feature).any(1).all()
    grad, = torch.autograd.grad(feature[:, 0].sum(), model.vit.cls_token)
    assert grad.any()


def test_decoders_and_texts_read_the_tokens_of_patches_alone():
    video, ids = random_video(2), random_keep(2)
    for model in (student(vit=RELEASE | TABLE, model={"pooling": "cls"}), video_to_text(vit=RELEASE | TABLE)):
        assert model.encode_video(video, ids)[0].shape == (2, ids.shape[1], 16)
        assert model.encode_video(video)[0].shape == (2, T * N, 16)
    for decoder in ("cross", "joint"):
        keys = Decoder(*(configs(vit=RELEASE | TABLE, model={"decoder": decoder})[i] for i in (0, 2))).state_dict()
        plain = Decoder(*(configs(model={"decoder": decoder})[i] for i in (0, 2))).state_dict()
        assert [*keys] == [*plain]


def test_the_class_token_counts_as_one_token():
    """A token of size 3 is like three equal tokens, beside one class token. Positions are 0."""
    vit = vit_of({"cls": True, "local_pos": "linear"})
    with torch.no_grad():
        vit.position_embedding.zero_()
    video, size = random_video(1, T=1), torch.tensor([[3.0, 1, 2]], dtype=torch.float64)
    tokens, cls = vit.encode(video, torch.tensor([[0, 1, 2]]), size)
    expected, expected_cls = vit.encode(video, torch.tensor([[0, 0, 0, 1, 2, 2]]))
    torch.testing.assert_close(tokens, expected[:, [0, 3, 4]], **TIGHT)
    torch.testing.assert_close(cls, expected_cls, **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------
# Weight decay, recomputed and compiled layers

def test_weight_decay_is_for_matrices():
    for modules, matrices in ((RELEASE, ()), (PAPER, ("local_pos.weight",))):
        vit = ViT(replace(VIT, **TABLE, **{**modules, "layer_scale": 0.3}))
        names = {id(p): name for name, p in vit.named_parameters()}
        decayed, others = ({names[id(p)] for p in group["params"]} for group in parameter_groups(vit, 0.1))
        matrices = (*matrices, "qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
        assert decayed == {"patch_embed.weight", *(f"blocks.{i}.{name}" for i in range(2) for name in matrices)}
        assert {"cls_token", "position_embedding", "position_embedding_kernel", "position_embedding_bias"} <= others


@pytest.mark.parametrize("modules", [RELEASE, PAPER], ids=["release", "paper"])
def test_recomputed_layers_have_the_same_losses_and_gradients(modules):
    def gradients(activation_checkpointing):
        torch.manual_seed(0)
        model = ClusterSTM(*configs(vit={**TABLE, **modules, "drop_path": 0.4}, model={"pooling": "cls"})).train()
        options = SimpleNamespace(compile=False, activation_checkpointing=activation_checkpointing, shapes_vary=False)
        wrap_layers(model, options)
        assert hasattr(model.vit.blocks[0].forward, "func") == activation_checkpointing
        batch, targets = random_batch()
        torch.manual_seed(1)
        losses = model(batch, to_fp32(targets))
        sum(losses.values()).backward()
        return [*losses.values(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("modules", [RELEASE, PAPER], ids=["release", "paper"])
def test_a_block_is_one_graph(modules):
    vit, x = ViT(replace(VIT, **TABLE, **modules)), torch.randn(2, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(vit.blocks[1].forward, fullgraph=True, backend="eager")
    for bias in (None, torch.randn(2, 1, 1, 5)):
        torch.testing.assert_close(compiled(x, bias=bias), vit.blocks[1](x, bias=bias))
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Settings and checkpoints

@pytest.mark.parametrize("changes, names", [
    ({"patch_norm": "batch"}, r"vit\.patch_norm.*none, layer, rms.*'batch'"),
    ({"local_pos": "conv"}, r"vit\.local_pos.*none, affine, linear.*'conv'"),
    ({"global_pos": "linear"}, r"vit\.global_pos.*none, affine, conv.*'linear'"),
    ({"norm": "none"}, r"vit\.norm .*layer, rms.*'none'"),
    ({"global_pos": "conv"}, r"vit\.pos_embed .*'learned' with vit\.global_pos 'conv', got '1d'$"),
    ({"global_pos": "affine", "pos_embed": "relative"}, r"vit\.pos_embed .*'learned'.*'affine', got 'relative'$"),
    ({"layer_scale": -1e-5}, r"vit\.layer_scale .*at least 0 .*-1e-05$"),
    ({"layer_scale": math.nan}, r"vit\.layer_scale .*at least 0 .*nan$"),
    ({"layer_scale": math.inf}, r"vit\.layer_scale .*finite.*inf$"),
], ids=str)
def test_impossible_settings_are_refused_by_field(changes, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        replace(VIT, **changes)


def test_a_feature_of_the_class_token_needs_one():
    with pytest.raises(ValueError, match=r"^vit\.cls must be True with model\.pooling 'cls', got False$"):
        student(model={"pooling": "cls"})


@pytest.mark.parametrize("kind", ["affine", "linear"])
@pytest.mark.parametrize("is_named", [True, False])
def test_local_positions_added_to_a_checkpoint_change_nothing_at_first(tmp_path, kind, is_named):
    trained, model = student(), student(vit={"local_pos": kind})
    config = config_json(trained)
    if not is_named:                                                # the checkpoint is older than the setting
        del config["vit"]["local_pos"]
    model.init_from(save_model(trained, tmp_path, **config))
    video, ids = random_video(2), random_keep(2)
    for x, y in zip(model.encode_video(video, ids), trained.encode_video(video, ids), strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    model.encode_video(video, ids)[0].square().sum().backward()
    for block in model.vit.blocks:
        for p in block.local_pos.parameters():
            assert not p.any() and p.grad.any()


def test_local_positions_of_a_checkpoint_are_loaded_and_never_made_up(tmp_path):
    trained, model = student(vit={"local_pos": "affine"}), student(vit={"local_pos": "affine"})
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1)
    folder, config = save_model(trained, tmp_path), config_json(trained)
    model.init_from(folder)
    assert all(torch.equal(x, trained.state_dict()[key]) for key, x in model.state_dict().items())
    save_model(student(), tmp_path, **config)                       # it claims to have them
    with pytest.raises(ValueError, match=r"blocks\.0\.local_pos\.weight must be \(16,\), got no weight$"):
        model.init_from(folder)
    save_model(student(), tmp_path, new=["vit."])
    expected = {key: x.clone() for key, x in model.vit.state_dict().items()}
    model.init_from(folder)
    assert all(torch.equal(x, expected[key]) for key, x in model.vit.state_dict().items())


@pytest.mark.parametrize("modules, names", [
    ({"patch_norm": "rms"}, r"config\.json: vit\.patch_norm .*'rms', got 'none'"),
    ({"norm": "rms"}, r"config\.json: vit\.norm .*'rms', got 'layer'"),
    ({"global_pos": "conv"}, r"position_embedding_kernel .*\(3, 3, 3, 16\), got no weight"),
    ({"qk_norm": True}, r"q_norm\.weight .*\(16,\), got no weight"),
    ({"layer_scale": 0.1}, r"scale1 .*\(16,\), got no weight"),
    ({"qkv_bias": False}, r"qkv\.bias .*absent, got \(48,\)"),
    ({"cls": True}, r"cls_token .*\(16,\), got no weight"),
], ids=str)
def test_other_modules_must_be_those_of_the_checkpoint(tmp_path, modules, names):
    plain, other = student(vit=TABLE), student(vit=TABLE | modules)
    for folder in ("plain", "other"):
        (tmp_path / folder).mkdir()
    save_model(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=names + "$"):
        other.init_from(str(tmp_path / "plain"))
    save_model(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"^[^\n]*(vit\.|absent)[^\n]*$"):
        plain.init_from(str(tmp_path / "other"))
    other.init_from(str(tmp_path / "other"))


def test_kinds_of_local_positions_must_agree(tmp_path):
    affine, linear, plain = (student(vit={"local_pos": kind}) for kind in ("affine", "linear", "none"))
    folder = save_model(affine, tmp_path)
    with pytest.raises(ValueError, match=r"local_pos\.weight must be \(2, 8, 8\), got \(16,\)$"):
        linear.init_from(folder)
    with pytest.raises(ValueError, match=r"local_pos\.\w+ must be absent, got \(16,\)$"):
        plain.init_from(folder)
