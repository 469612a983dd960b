"""FluxViT's double mask: the teacher sees S1 tokens of a clip, the student some of these. Against loops in fp64."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from helpers.benchmarks import load_json
from helpers.kernels import LOW, seeded
from helpers.models import OBJECTIVES, random_batch, student
from helpers.models import N as STUDENT_N
from helpers.runs import (
    Killed,
    assert_close_weights,
    assert_one_line,
    assert_same,
    command,
    kill,
    log,
    on_ranks,
    weights,
    weights_without_key_bias,
)
from helpers.siglip import WORDS, map_head, random_clips, tiny_siglip, word_tokenizer

import targets as targets_module
import teacher as teacher_module
import train
from budgets import count_equal_groups, deal, group_dynamic, gumbel_noise
from config import Config, query_count
from data import DataConfig
from decoders import ModelConfig
from encoders import ViT, ViTConfig
from kernels.window_attention import window_attention_ref, window_attention_triton
from masking import MASK_INPUTS, MASKS, MaskConfig, cluster_stm, keep_count
from runtime import RunContext
from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from targets import TargetProvider, TeacherTargets, VisibleIdCache, compare_pool, compute_targets, compute_visible_ids
from teacher import SigLIP

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
FP32 = {"rtol": 1e-5, "atol": 1e-6}                 # where attention is fp32
POOLINGS = ("map", "mean", "token")
REFUSED = {"tube", "block3d", "dynamic", "flux_group_dynamic", "everest", "evs", "mgm_style", "mgmae_style"}
# (B, T), frames of 12 x 12 pixels and 9 patches, S1: one frame, one group, whole groups, frames of unequal groups.
CLIPS = [(1, 1, 5), (2, 3, 11), (1, 4, 12), (2, 5, 36), (1, 9, 24), (3, 4, 2), (1, 1, 1), (2, 2, 18)]


def pixels_of(model, batch):
    return model.normalize(batch.video.flatten(0, 1))


def random_kept(B, T, S, seed=0, n=9):
    """(B, S) flat ids, ascending, of any frames; some frames may have none."""
    return torch.rand(B, T * n, generator=seeded(seed)).argsort(1)[:, :S].sort(1).values


def by_frame(ids, n=9):
    """Flat ids (S,) -> {frame: [(index among the ids, place in the frame)]}."""
    frames = {}
    for i, flat in enumerate(ids.tolist()):
        frames.setdefault(flat // n, []).append((i, flat % n))
    return frames


def kept_by_hand(model, pixels, ids, n=9):
    """What forward_kept computes, a frame at a time, on the kept tokens alone."""
    m, out = model.vision_model, torch.full((*ids.shape, 16), torch.nan, dtype=pixels.dtype)
    T = len(pixels) // len(ids)
    for b, clip in enumerate(ids):
        for t, members in by_frame(clip, n).items():
            index, places = (list(x) for x in zip(*members, strict=True))
            x = m.embeddings(pixels[b * T + t][None])[:, places]
            out[b, index] = m.post_layernorm(m.encoder(x))[0]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The teacher on kept tokens

@pytest.mark.parametrize("grid", [(3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("B, T, S", [(1, 1, 4), (2, 3, 10), (1, 4, 7), (2, 5, 45)])
def test_kept_tokens_are_those_of_each_frame_alone(grid, B, T, S):
    model, n = tiny_siglip(), math.prod(grid)
    pixels = torch.randn(B * T, 3, 4 * grid[0], 4 * grid[1], generator=seeded(), dtype=torch.float64)
    ids = random_kept(B, T, min(S, T * n), n=n)
    with torch.no_grad():
        found = model.forward_kept(pixels, ids)
        torch.testing.assert_close(found, kept_by_hand(model, pixels, ids, n), **TIGHT)
        assert torch.equal(model.forward_kept(pixels, ids, model.embed_patches(pixels)), found)
        order = torch.randperm(ids.shape[1], generator=seeded())
        torch.testing.assert_close(model.forward_kept(pixels, ids[:, order]), found[:, order], **TIGHT)
        every = torch.arange(T * n).expand(B, -1)
        full = model.forward_features(pixels).reshape(B, T * n, -1)
        torch.testing.assert_close(model.forward_kept(pixels, every), full, **TIGHT)
        if T * n > ids.shape[1]:
            assert not torch.allclose(found, teacher_module.gather_tokens(full, ids), rtol=1e-3)


def test_pixels_of_other_patches_change_nothing():
    model, (B, T) = tiny_siglip(), (2, 4)
    pixels = pixels_of(model, random_clips(B=B, T=T))
    ids = random_kept(B, T, 17)
    kept = torch.zeros(B, T * 9, dtype=torch.bool).scatter(1, ids, True).view(B * T, 1, 3, 3)
    damaged = pixels.where(nnf.interpolate(kept.double(), scale_factor=4).bool(), torch.nan)
    assert damaged.isnan().any((1, 2, 3)).all()
    results = []
    with torch.no_grad():
        for x in (pixels, damaged):
            tokens = model.forward_kept(x, ids)
            results.append([tokens, model.pool_attention(tokens, ids, (T, 3, 3)),
                            *(model.token_embeddings(tokens, (T, 3, 3), pooling, ids) for pooling in POOLINGS)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found) and found.isfinite().all()


@pytest.mark.parametrize("B, T, S", [(1, 1, 6), (2, 4, 13), (1, 5, 45), (3, 3, 1)])
def test_attention_and_embeddings_are_of_the_kept_tokens_of_a_frame_and_a_window(B, T, S):
    model, ids = tiny_siglip(), random_kept(B, T, S, seed=1)
    x, head = torch.randn(B, S, 16, generator=seeded(), dtype=torch.float64) * 2, model.vision_model.head
    attention, embeds = torch.zeros(B, S).double(), {p: torch.zeros(B, S, 16).double() for p in POOLINGS}
    with torch.no_grad():
        for b in range(B):
            for members in by_frame(ids[b]).values():
                index = [i for i, _ in members]
                attention[b, index] = map_head(head, x[b, index])[1]
                for i, n in members:
                    window = [j for j, m in members if abs(m // 3 - n // 3) <= 1 and abs(m % 3 - n % 3) <= 1]
                    of = {"map": x[b, window], "mean": x[b, window].mean(0)[None], "token": x[b, i][None]}
                    for pooling in POOLINGS:
                        embeds[pooling][b, i] = nnf.normalize(map_head(head, of[pooling])[0], dim=-1)
        torch.testing.assert_close(model.pool_attention(x, ids, (T, 3, 3)).double(), attention, **FP32)
        for pooling in POOLINGS:
            torch.testing.assert_close(model.token_embeddings(x, (T, 3, 3), pooling, ids), embeds[pooling], **TIGHT)
    frames = sum(len(by_frame(clip)) for clip in ids)
    assert model.pool_attention(x, ids, (T, 3, 3)).sum().item() == pytest.approx(frames, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_the_kernel_gives_tokens_that_are_not_there_no_weight(dtype):
    g, grid = seeded(), (4, 5)
    scores, values = torch.randn(2, 20, 2, generator=g) * 5 + 9, torch.randn(2, 20, 8, generator=g)
    there = torch.rand(2, 20, generator=g) < 0.4
    there[1, :10] = False                                                       # windows of none alone
    scores = scores.to(dtype).masked_fill(~there[..., None], torch.finfo(dtype).min)
    values = values.to(dtype)
    found, expected = window_attention_triton(scores, values, grid), window_attention_ref(scores, values, grid)
    assert found.isfinite().all() and expected.isfinite().all()
    for f, n in there.nonzero().tolist():
        window = [m for m in range(20) if there[f, m] and max(abs(m // 5 - n // 5), abs(m % 5 - n % 5)) <= 1]
        weight = scores[f, window].double().softmax(0)                          # (n, H)
        exact = (weight[..., None] * values[f, window].double().view(-1, 2, 4)).sum(0).flatten()
        for result in (found, expected):
            torch.testing.assert_close(result[f, n].double(), exact, rtol=1e-5 if dtype == torch.float32 else 2e-3,
                                       atol=1e-5 if dtype == torch.float32 else 1e-3)


def test_compiled_layers_compute_the_kept_tokens(monkeypatch):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model, batch, mask, real = tiny_siglip(), random_clips(T=4), MaskConfig("umt", teacher_tokens=12), torch.compile
    plain = compute_targets(model, batch, mask, 0.5, total=5)
    monkeypatch.setattr(torch, "compile", lambda f, options, **kwargs: real(f, backend="aot_eager", **kwargs))
    train.wrap_layers(model, SimpleNamespace(compile=True, activation_checkpointing=False, shapes_vary=False))
    compiled = compute_targets(model, batch, mask, 0.5, total=5)
    assert torch.equal(compiled.visible_ids, plain.visible_ids)
    torch.testing.assert_close(compiled.token_targets, plain.token_targets, **TIGHT)
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]  # pixels, a layer of each tower
    torch._dynamo.reset()


def test_layers_in_fp8_and_fused_gelu_compute_the_kept_tokens(monkeypatch):
    torch.manual_seed(0)
    model = SigLIP(SigLIPConfig(VisionConfig(16, 64, 2, 2, image_size=12, patch_size=4),
                                TextConfig(16, 32, 2, 2, len(WORDS), max_position_embeddings=6, pad_token_id=0)),
                   word_tokenizer()).eval().requires_grad_(False)
    pixels, ids = torch.randn(8, 3, 12, 12, generator=seeded()), random_kept(2, 4, 20)
    exact = model.forward_kept(pixels, ids)
    monkeypatch.setattr(teacher_module, "fuses_gelu", lambda x, weight: True)
    monkeypatch.setattr(torch, "_addmm_activation", lambda bias, a, b, use_gelu: nnf.gelu(a @ b + bias,
                                                                                          approximate="tanh"))
    torch.testing.assert_close(model.forward_kept(pixels, ids), exact)
    monkeypatch.undo()
    teacher_module.use_fp8(model)
    found, expected = model.forward_kept(pixels, ids), kept_by_hand(model, pixels, ids)
    assert (found - expected).norm() < 0.005 * exact.norm() and 0 < (found - exact).norm() < 0.1 * exact.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens the student sees

def packed_by_hand(model, pixels, T, S1):
    """Pool ids (S1,) of one clip, its tokens in fp64 and, of each group of frames, their indices in the pool."""
    ids = group_dynamic(model.embed_patches(pixels)[None], S1)
    tokens, G = kept_by_hand(model, pixels, ids)[0], max(1, min(4, T // 2))
    groups = [[i for i, flat in enumerate(ids[0].tolist()) if g * T // G <= flat // 9 < (g + 1) * T // G]
              for g in range(G)]
    assert {len(group) for group in groups} == {S1 // G}
    return ids[0], tokens, groups


@pytest.mark.parametrize("name", ["cluster_stm", "umt", "umt_global"])
@pytest.mark.parametrize("B, T, S1", CLIPS)
def test_the_mask_chooses_among_the_teachers_tokens_with_groups_as_frames(B, T, S1, name):
    model, batch = tiny_siglip(), random_clips(B=B, T=T)
    G = max(1, min(4, T // 2))
    K = max(1, S1 // G // 2)
    S = G * K
    found = compute_targets(model, batch, MaskConfig(name, teacher_tokens=S1), 0.9, total=S)
    noise = gumbel_noise((B, G, S1 // G), torch.Generator().manual_seed(batch.seed)).double()
    for b in range(B):
        with torch.no_grad():
            pool, tokens, groups = packed_by_hand(model, model.normalize(batch.video[b]), T, S1)
            attention = torch.zeros(S1, dtype=torch.float64)
            for members in by_frame(pool).values():
                index = [i for i, _ in members]
                attention[index] = map_head(model.vision_model.head, tokens[index])[1]
        if name == "cluster_stm":
            packed = cluster_stm(torch.stack([tokens[group] for group in groups])[None], K)[0]
            kept = [groups[i // (S1 // G)][i % (S1 // G)] for i in packed.tolist()]
        else:
            score = torch.stack([attention[group] for group in groups]).log() + noise[b]
            if name == "umt":
                kept = [group[i] for group, row in zip(groups, score, strict=True) for i in row.topk(K).indices]
            else:
                kept = [sum(groups, [])[i] for i in score.flatten().topk(S).indices]
        assert found.visible_ids[b].tolist() == sorted(pool[kept].tolist())
        assert torch.equal(found.pool_ids[b], pool)
        expected = model.token_embeddings(tokens[None], (T, 3, 3), "map", pool[None])[0]
        torch.testing.assert_close(found.token_targets[b, 0], expected.detach(), **TIGHT)
    assert found.token_targets.shape == (B, 1, S1, 16) and found.patch_embeds is found.token_size is None
    ids = random_kept(B, 1, min(S1, 4), n=S1)                                   # places in the pool, in any order
    ids = ids[:, torch.randperm(ids.shape[1], generator=seeded())]
    assert torch.equal(found.gather(found.pool_ids.gather(1, ids)).double(),
                       torch.stack([found.token_targets[b, 0, row] for b, row in enumerate(ids)]).float().double())


@pytest.mark.parametrize("name", sorted({*MASKS} - REFUSED - {"adamae"}))       # its sampler is not the teacher's
def test_every_mask_keeps_exactly_its_budget_within_the_pool(name):
    model = tiny_siglip()
    for B, T, S1 in CLIPS:
        batch, mask = random_clips(1, B, T), MaskConfig(name, teacher_tokens=S1, ratio=0.6)
        for S in {1, S1 // 2, S1} - {0}:
            found = compute_targets(model, batch, mask, 0.6, with_tokens=False, with_texts=False, total=S)
            for row, pool in zip(found.visible_ids.tolist(), found.pool_ids.tolist(), strict=True):
                assert row == sorted({*row}) and len(row) == S and {*row} <= {*pool} and pool == sorted({*pool})
            assert found.token_targets is found.text_embeds is None
        by_ratio = compute_targets(model, batch, mask, 0.6).visible_ids
        assert by_ratio.shape == (B, keep_count(S1, 0.6)) == (B, mask.total(T, 9))


@pytest.mark.parametrize("name", ["umt", "umt_global", "cluster_stm", "random"])
def test_budgets_of_a_clip_are_nested(name):
    model, batch, mask = tiny_siglip(), random_clips(B=2, T=8), MaskConfig(name, assign="parent", teacher_tokens=32)
    kept = [compute_targets(model, batch, mask, 0.9, total=S, with_tokens=False, with_texts=False).visible_ids
            for S in range(1, 33)]
    for smaller, larger in zip(kept, kept[1:], strict=False):
        assert all({*a} < {*b} for a, b in zip(smaller.tolist(), larger.tolist(), strict=True))
    batch.seed += 1
    changed = compute_targets(model, batch, mask, 0.9, total=9).visible_ids
    assert torch.equal(changed, kept[8]) == (name == "cluster_stm")             # the others draw


@pytest.mark.parametrize("name", ["cluster_stm", "umt_global", "random"])
@pytest.mark.parametrize("with_sizes", [False, True])
def test_visible_ids_of_scoring_and_fine_tuning_are_those_of_pretraining(name, with_sizes):
    model, batch, mask = tiny_siglip(), random_clips(B=2, T=5, size=20), MaskConfig(name, teacher_tokens=16)
    expected = compute_targets(model, batch, mask, 0.7, grid=(3, 3), with_sizes=with_sizes)
    with mock.patch.object(model, "forward_kept", wraps=model.forward_kept) as layers, \
            mock.patch.object(model, "forward_features", side_effect=AssertionError("the teacher saw all tokens")):
        found = compute_visible_ids(model, batch.video, mask, 0.7, batch.seed, (3, 3), with_sizes)
    assert layers.called == (name != "random" or with_sizes)                    # no more than the mask needs
    assert targets_module.needs_teacher(mask)
    assert torch.equal(found.visible_ids, expected.visible_ids) and torch.equal(found.pool_ids, expected.pool_ids)
    if not with_sizes:
        assert found.token_size is expected.token_size is None
        return
    assert torch.equal(found.token_size, expected.token_size)
    pixels = model.normalize(batch.video, (3, 3))
    for b in range(2):
        with torch.no_grad():
            pool, tokens, groups = packed_by_hand(model, pixels[b], 5, 16)
        size = dict.fromkeys(found.visible_ids[b].tolist(), 0)
        for group in groups:
            visible = [i for i in group if int(pool[i]) in size]
            for i in group:
                nearest = max(visible, default=None, key=lambda j, i=i: (j == i, float(
                    nnf.cosine_similarity(tokens[i], tokens[j], 0))))
                if nearest is not None:
                    size[int(pool[nearest])] += 1
        assert found.token_size[b].tolist() == [*size.values()]


def test_fine_tuning_sees_the_same_tokens(run_config):
    cfg = run_config("--name a --mask.teacher-tokens 32 --mask.name umt")
    vit = ViT(cfg.vit)
    cache = VisibleIdCache(RunContext(cfg, "out/a", torch.device("cpu"), 0, 1), vit)
    video = torch.randint(0, 256, (2, 4, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    found = cache.compute(video, 5, 0)
    expected = compute_visible_ids(SigLIP.from_pretrained(cfg.teacher), video, cfg.mask, cfg.mask.ratio, 5, (4, 4))
    assert torch.equal(found.visible_ids, expected.visible_ids) and found.visible_ids.shape == (2, 8)


# ---------------------------------------------------------------------------------------------------------------------
# The losses

def pooled_targets(seed=0, S1=8, S=3):
    """A batch; its targets if the teacher sees S1 of 12 tokens; the same among all tokens, NaN where it sees none."""
    batch, full = random_batch(4, seed)
    pool = random_kept(4, 2, S1, seed, STUDENT_N)
    visible = pool.gather(1, random_kept(4, 1, S, seed + 1, S1))
    index = pool[..., None].expand(-1, -1, full.token_targets.shape[-1])
    known = full.token_targets.flatten(1, 2).gather(1, index)
    full = replace(full, visible_ids=visible, token_targets=torch.full_like(full.token_targets.flatten(1, 2), torch.nan)
                   .scatter(1, index, known).view_as(full.token_targets))
    return batch, TeacherTargets(visible, known[:, None], full.text_embeds, pool_ids=pool), full


@pytest.mark.parametrize("model, count", [
    ({"decoder_query_ratio": 0.4}, 2), ({"decoder_query_ratio": 1.0}, 5), ({"decoder_queries": 4}, 4),
    ({"decoder_queries": 40}, 5), ({"decoder": "joint"}, 5)], ids=str)
def test_queries_are_tokens_of_the_pool_that_are_not_visible(model, count):
    net, drawn = student(model=model), []
    for seed in range(6):
        batch, targets, _ = pooled_targets(seed)
        ids = net.sample_queries(batch, targets)
        assert ids.shape == (4, count) and torch.equal(ids, net.sample_queries(batch, targets))
        for row, pool, visible in zip(ids.tolist(), targets.pool_ids.tolist(), targets.visible_ids.tolist(),
                                      strict=True):
            assert len({*row}) == count and {*row} <= {*pool} - {*visible}
            drawn.append([pool.index(i) for i in row])
    if count == 2:
        assert len({tuple(row) for row in drawn}) > 10                          # and not the first ones always


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_read_the_targets_of_the_pool(objective, parts):
    net = student(model={"objective": objective})
    batches, pooled, full = zip(*(pooled_targets(seed) for seed in range(parts)), strict=True)
    queries = [net.sample_queries(*pair) for pair in zip(batches, pooled, strict=True)]
    results = []
    for targets in (pooled, full):
        with mock.patch.object(net, "sample_queries", side_effect=list(queries)):
            stats = net.batch_stats([*batches], [*targets])
        results.append([net(*arguments) for arguments in zip(batches, targets, stats, strict=True)])
    for a, b in zip(*results, strict=True):
        assert a.keys() == b.keys() and OBJECTIVES[objective] in a
        for name in a:
            assert a[name].isfinite()
            torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def test_equal_groups_are_those_that_the_deal_makes_equal():
    for T in range(1, 20):
        for n in (1, 3):
            G = max(1, min(4, T // 2))
            sizes = [n * ((g + 1) * T // G - g * T // G) for g in range(G)]
            for total in range(1, T * n + 1):
                if len({*deal(total, sizes)}) == 1:
                    assert count_equal_groups(total, T, n) == G
                else:
                    with pytest.raises(ValueError, match=rf"multiple of {G} .* clips of {T} frames of {n} .* {total}$"):
                        count_equal_groups(total, T, n)


def config_of(mask=None, model=None, stage="all", **data):
    data = {"cache_frames": 64, "num_frames": 8, "image_size": 48, **data}
    task = {"task": "sprites-qa"} if stage == "finetune" else {}
    return Config(data=DataConfig(**data), vit=ViTConfig(patch_size=8), mask=mask or MaskConfig(), stage=stage,
                  model=model or ModelConfig(), **task)


@pytest.mark.parametrize("options, message", [
    (dict(teacher_tokens=-4), "teacher_tokens must be at least 0, got -4"),
    (dict(teacher_tokens=24, features="student_embedding", name="random"), "features.*teacher_tokens 24.*student_emb"),
    (dict(teacher_tokens=24, tokens=(32, 16)), r"mask.tokens must be at most 24 .*got \(32, 16\)"),
    *((dict(teacher_tokens=24, name=name), f"no places.*teacher_tokens 24, got {name}") for name in sorted(REFUSED))],
    ids=str)
def test_masks_that_cannot_choose_among_the_teachers_tokens_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        MaskConfig(**options)
    assert "\n" not in str(error.value)
    assert {name for name in MASKS if "grid" in MASK_INPUTS[name]} < REFUSED


@pytest.mark.parametrize("S1, options, message", [
    (30, {}, "multiple of 4 and at most 288 for clips of 8 frames of 36 tokens, .*got 30"),
    (292, {}, "at most 288 .*got 292"),
    (126, dict(frames_range=(6, 7, 1)), "multiple of 4 .* 8 frames"),                    # of the clips that are scored
    (72, dict(frames_range=(2, 3, 1), size_range=(24, 48, 24)), "multiple of 1 and at most 18 for clips of 2 frames"),
    (300, dict(frames_range=(9, 9, 1)), "at most 288 .* 9 frames of 36.* 4 groups of at least 72 tokens, got 300")])
def test_every_grid_must_have_equal_groups(S1, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config_of(MaskConfig("umt", teacher_tokens=S1), **options)
    assert "\n" not in str(error.value)
    tuned = config_of(MaskConfig("umt", teacher_tokens=S1), stage="finetune", **options)     # which may see all tokens
    with pytest.raises(ValueError, match=message):
        tuned.check_grids()                                                     # if it does not
    config_of(MaskConfig("umt", teacher_tokens=60), frames_range=(2, 9, 1))    # 1, 2, 3 and 4 divide it


def test_hidden_tokens_are_those_that_the_teacher_sees():
    ranges = dict(frames_range=(8, 12, 4), size_range=(32, 48, 8))
    half, quarter = ModelConfig(decoder_query_ratio=0.5), ModelConfig(decoder_query_ratio=0.25)
    cfg = config_of(MaskConfig("umt", tokens=(72, 36), teacher_tokens=128), half, **ranges)
    assert [*cfg.hidden_counts().values()] == [128 - 72, 128 - 36] * 6 and query_count(cfg) == 37
    cfg = config_of(MaskConfig("umt", ratio=0.75, teacher_tokens=128), quarter, **ranges)
    assert {*cfg.hidden_counts().values()} == {96} and query_count(cfg) == 24 and cfg.mask.total(3, 5) == 32
    assert query_count(config_of(MaskConfig("umt", teacher_tokens=128))) == 0   # of one shape: a share
    images = config_of(MaskConfig("umt", teacher_tokens=128, ratio=0.75), image_corpora=("a.json=b",))
    assert [*images.hidden_counts().values()] == [96, 18]                       # of a clip, of an image
    assert not config_of(MaskConfig("umt", tokens=(128,), teacher_tokens=128)).hides_tokens
    with pytest.raises(ValueError, match="hide at least 2 tokens of every clip.* got 0 of 8 frames"):
        config_of(MaskConfig("umt", tokens=(128,), teacher_tokens=128), image_corpora=("a.json=b",))


def test_wrong_settings_on_the_command_line_are_one_line(sprites, tmp_path, monkeypatch, capsys):
    from helpers.runs import argv
    monkeypatch.chdir(tmp_path)
    for flags, message in (("--mask.teacher-tokens 31 --mask.name umt", "multiple of 2.*got 31"),
                           ("--mask.teacher-tokens 32 --mask.name tube", "no places.*got tube")):
        code, _, err = command("train.py", argv(sprites, flags), capsys)
        assert_one_line("train.py", code, err, message)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

# 2 to 6 frames of 12, 16 or 20 pixels with patches of 4, in 1 to 3 groups.
FLEXIBLE = "--data.frames-range 1 6 1 --data.size-range 12 20 4 --data.pool 30 100 --micro-batch 2 --mask.name umt " \
    "--mask.teacher-tokens 30 --mask.tokens 24 12 --vit.pos-embed relative --steps 9 --unmasked-steps 1 --save-every 3 "
FIXED = "--mask.teacher-tokens 32 --mask.name umt "


def provider_of(cfg, first_run, rank=0):
    run = RunContext(cfg, "out/a", torch.device("cpu"), rank, 2)
    return TargetProvider(run, SigLIP.from_pretrained(f"{first_run}/out/first/teacher"), range(24))


def clip_batch(T, seed=0, B=3):
    batch = random_clips(seed, B, T, 16)
    batch.captions, batch.budget = ["a red square"] * B, 0
    return batch


def test_how_far_kept_tokens_are_from_full_ones_is_said_once(run_config, first_run, capsys):
    cfg = run_config(f"--name a --data.num-views 1 {FIXED}")
    provider, batches = provider_of(cfg, first_run), [clip_batch(4, seed) for seed in range(3)]
    assert "not cached: the teacher sees a part of each clip" in capsys.readouterr().out and not provider.enabled
    results = provider(batches)
    line, = capsys.readouterr().out.splitlines()
    teacher, cosines = provider.teacher, []
    pixels = teacher.normalize(batches[0].video).flatten(0, 1)
    with torch.no_grad():
        kept, full = kept_by_hand(teacher, pixels, results[0].pool_ids, 16), teacher.forward_features(pixels)
    for b, ids in enumerate(results[0].pool_ids.tolist()):
        for i, flat in enumerate(ids):
            cosines.append(float(nnf.cosine_similarity(kept[b, i], full[4 * b + flat // 16, flat % 16], 0)))
    mean, low = sum(cosines) / len(cosines), sorted(cosines)[len(cosines) // 100]
    assert "32 of the 64 tokens" in line and f"mean {mean:.3f}, 1 % quantile {low:.3f}" in line and mean < 0.9999
    assert compare_pool(teacher, batches[0].video, (4, 4), results[0].pool_ids) == pytest.approx((mean, low), abs=1e-5)
    assert all(t.token_targets.shape == (3, 1, 32, 16) and t.visible_ids.shape == (3, 8) for t in results)
    provider(batches)
    other = provider_of(cfg, first_run, rank=1)
    capsys.readouterr()
    other(batches)
    assert capsys.readouterr().out == ""


def test_images_are_seen_whole_and_masked_by_their_own_ratio(run_config, first_run, capsys):
    cfg = run_config(f"--name a --data.image-corpora images.json=images --mask.image-ratio 0.5 {FIXED}")
    provider = provider_of(cfg, first_run)
    image, = provider([clip_batch(1)])
    assert image.pool_ids is None and image.token_targets.shape == (3, 1, 16, 16) and image.visible_ids.shape == (3, 8)
    assert "the teacher sees 32" not in capsys.readouterr().out
    clip, = provider([clip_batch(4)])
    assert clip.pool_ids.shape == (3, 32) and "the teacher sees 32" in capsys.readouterr().out


@pytest.fixture(scope="module")
def double_run(sprites, first_run, tmp_path_factory):
    """A run with a double mask, on grids and budgets that vary, of 9 + 1 steps on one rank -> its folder."""
    from helpers.runs import config, with_weights
    folder = tmp_path_factory.mktemp("double")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(config(sprites, with_weights(first_run, f"{FLEXIBLE}--name one")))
    return str(folder / "out" / "one")


def test_a_run_with_a_double_mask_is_the_same_on_two_ranks(run_config, double_run):
    on_ranks(2, run_config(f"{FLEXIBLE}--name two"))
    rows, expected_rows = log("out/two"), log(double_run)
    assert rows.keys() == expected_rows.keys() and ["mrm" in row for row in rows.values()] == [True] * 9 + [False]
    for key, row in rows.items():
        assert row == pytest.approx(expected_rows[key], rel=1e-5), key
    assert_close_weights(weights_without_key_bias("out/two"), weights_without_key_bias(double_run), atol=1e-5)


def test_a_run_with_a_double_mask_that_is_killed_goes_on_bit_for_bit(run_config, double_run):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, "pretrain", 5)
        train.main(run_config(f"{FLEXIBLE}--name one"))
    train.main(run_config(f"{FLEXIBLE}--name one --resume"))
    assert_same(weights("out/one"), weights(double_run))
    assert log("out/one") == log(double_run)


@pytest.mark.parametrize("flags", [
    "--mask.name cluster_stm --model.proportional --target-pooling mean",
    "--mask.name text_guided --model.decoder joint", "--model.objective visible --mask.tokens 32",
    "--mask.tokens 24 12 --all-budgets",
    "--model.objective pixels --data.num-frames 1 --mask.teacher-tokens 7"])
def test_runs_of_other_kinds_train_on_the_pool(run_config, flags):
    teacher_tokens, seen, compute = 7 if "tokens 7" in flags else 32, [], targets_module.compute_targets

    def spy(*args, **kwargs):
        seen.append(compute(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(SigLIP, "forward_features", side_effect=AssertionError("saw all tokens")), \
            mock.patch.object(targets_module, "compute_targets", spy), \
            mock.patch.object(targets_module, "compare_pool", return_value=(1.0, 1.0)):
        train.main(run_config(f"--name a --steps 2 --unmasked-steps 0 {FIXED} {flags}"))
    assert len(seen) == 4
    for targets in seen:
        assert targets.pool_ids.shape == (4, teacher_tokens)
        for t in (targets, *(targets.smaller or ())):
            for row, pool in zip(t.visible_ids.tolist(), targets.pool_ids.tolist(), strict=True):
                assert {*row} <= {*pool}


def test_scoring_by_the_mask_of_training_runs(sprites, double_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--task sprites --checkpoint {double_run} --data-root {sprites} --mask umt --frames 4"
    with mock.patch.object(SigLIP, "forward_features", side_effect=AssertionError("saw all tokens")):
        code, out, err = command("eval.py", flags.split(), capsys)
        assert code == 0 and "24 of 64 a clip" in out, err
        ablation = f"tokens --checkpoint {double_run} --data-root {sprites} --frames 4 --out a"
        code, out, err = command("tools.ablations", ablation.split(), capsys)
    assert code == 0 and load_json("a.json")["rows"][1]["tokens"] == 24, err
    # Another mask, or other features, of all tokens: as many are kept.
    for more in ("--mask random", "--mask flux_group_dynamic --features student_embedding"):
        code, out, err = command("eval.py", f"{flags.replace('--mask umt', more)}".split(), capsys)
        assert code == 0 and "24 of 64 a clip" in out, err
    code, _, err = command("eval.py", [*flags.split()[:-1], "8"], capsys)
    assert_one_line("eval.py", code, err, "multiple of 4 .* 8 frames .*got 30")
