"""A student at several grids: patch embeddings of the whole pool, pooling over tokens, positions and queries."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

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
    configs,
    layer_norm,
    random_ids,
    random_keep,
    random_video,
    seeded,
    shaken,
    student,
    unit,
    video_to_text,
)

import decoders
import encoders
from decoders import Decoder, LinearDecoder
from encoders import ViT
from positions import sincos_pos_embed
from targets import TeacherTargets

pytestmark = pytest.mark.usefixtures("seed_0")
CPU = torch.device("cpu")
TABLE = (6, 4, 4)                                           # the largest grid, and the reference
GRIDS = [(6, 4, 4), (2, 2, 3), (1, 3, 1), (5, 4, 2)]


def random_clips(grid, S, B=3, seed=0):
    """A micro-batch on a grid (T, h, w), of which S tokens are visible, and its TeacherTargets."""
    (T, h, w), E = grid, MODEL.target_dim
    batch = SimpleNamespace(video=random_video(B, T, 4 * h, 4 * w, seed), text_ids=random_ids(B, seed=seed),
                            media_ids=torch.arange(B), seed=seed)
    visible_ids = torch.rand(B, T * h * w, generator=seeded(seed)).argsort(1)[:, :S].sort(1).values
    targets = TeacherTargets(visible_ids, unit(B, T, h * w, E, seed=seed), unit(B, E, seed=seed + 1))
    return batch, targets


# ---------------------------------------------------------------------------------------------------------------------
# Embedding the pool, or the visible patches alone

@pytest.mark.parametrize("pos_embed", ["1d", "relative", "learned"])
@pytest.mark.parametrize("masked, sized", [(False, False), (True, False), (True, True)],
                         ids=["all", "visible", "sized"])
def test_embeddings_of_the_pool_give_what_embedding_visible_patches_gives(pos_embed, masked, sized):
    changes = {"vit": {"pos_embed": pos_embed, "grid": TABLE}}
    video, visible_ids = random_video(3), random_keep(3) if masked else None
    size = torch.randint(1, 9, visible_ids.shape, generator=seeded()).double() if sized else None
    for model in (student(**changes), video_to_text(**changes)):
        pool = model.vit.embed_patches(video)
        assert pool.shape == (3, T * N, 16)
        (tokens, feature), (expected, expected_feature) = (
            model.encode_video(video, visible_ids, size, x) for x in (pool, None))
        torch.testing.assert_close(tokens, expected, **TIGHT)
        other, _ = model.encode_video(video, visible_ids, size, pool.flip(-1))
        assert not torch.isclose(other, expected).all(-1).any()
        if expected_feature is not None:
            torch.testing.assert_close(feature, expected_feature, rtol=1e-6, atol=1e-6)
        weight = torch.randn(3, 16, dtype=torch.float64)
        expected, found = (
            torch.autograd.grad((model.vit(video, visible_ids, size, x).mean(1) * weight).sum(),
                                model.vit.patch_embed.weight)[0] for x in (None, pool))
        assert expected.any()
        torch.testing.assert_close(found, expected, **TIGHT)


def test_patch_embeddings_are_a_linear_layer_of_normalised_pixels_without_positions():
    vit, video, ids = shaken(ViT(replace(VIT, pos_embed="learned", grid=TABLE))), random_video(2), random_keep(2)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (ViT.mean, ViT.std))
    x = nnf.unfold((video.flatten(0, 1) / 255.0 - mean) / std, 4, stride=4).mT.unflatten(0, (2, T)).flatten(1, 2)
    x = x @ vit.patch_embed.weight.T + vit.patch_embed.bias
    torch.testing.assert_close(vit.embed_patches(video), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vit.embed_patches(video, ids), torch.stack([a[i] for a, i in zip(x, ids, strict=True)]),
                               rtol=1e-6, atol=1e-6)


def test_nothing_is_computed_from_masked_patches_but_in_the_pool(monkeypatch):
    vit, video, ids = shaken(ViT(VIT)), random_video(2), random_keep(2)
    expected, pool = vit(video, ids), vit.embed_patches(video)
    masked = torch.ones(2, T * N, 1, dtype=torch.bool).scatter(1, ids[..., None], False)
    patchify = encoders.patchify
    monkeypatch.setattr(encoders, "patchify", lambda *args: patchify(*args).double().masked_fill(
        masked.view(2 * T, N, 1), torch.nan))
    with mock.patch.object(vit.patch_embed, "forward", wraps=vit.patch_embed.forward) as forward:
        assert torch.equal(vit(video, ids), expected)
        assert [len(call.args[0][0]) for call in forward.call_args_list] == [ids.shape[1]]
        torch.testing.assert_close(vit(video, ids, None, pool.masked_fill(masked, torch.nan)), expected, **TIGHT)
        assert forward.call_count == 1                                          # the pool is not embedded again
    assert vit(video).isnan().any()


@pytest.mark.parametrize("shape", [(2, T * N - 1, 16), (1, T * N, 16), (2, T * N, 15), (2, 1, 16)], ids=str)
def test_embeddings_of_another_pool_are_refused(shape):
    with pytest.raises(ValueError, match=rf"^patch_embeds must be \(2, 12, 16\).*got \({', '.join(map(str, shape))}\)"):
        ViT(VIT)(random_video(2), random_keep(2), None, torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Pooling

@pytest.mark.parametrize("ids, sized", [(None, False), ([[0, 3, 5, 12], [1, 8, 9, 14]], False),
                                        ([[0, 3, 5, 12], [1, 8, 9, 14]], True), ([[17], [4]], True)],
                         ids=["all", "an empty frame", "sized", "one token"])
def test_pooled_over_tokens_a_feature_is_the_unit_vector_of_their_mean(ids, sized):
    model, video = student(model={"pooling": "tokens"}), random_video(2, T=3)
    ids = None if ids is None else torch.tensor(ids)
    size = torch.tensor([[1, 7, 2, 40], [3, 1, 900, 5]])[:, :ids.shape[1]].float() if sized else None
    with torch.no_grad():
        tokens, feature = model.encode_video(video, ids, size)
        for b in range(2):
            n = torch.ones(tokens.shape[1]) if size is None else size[b]
            mean = sum(n[s] * tokens[b, s] for s in range(len(n))) / sum(n)
            x = model.vision_proj(layer_norm(mean, model.pool_norm))
            torch.testing.assert_close(feature[b].double(), x / x.norm(), rtol=1e-6, atol=1e-6)
        model.cfg = replace(model.cfg, pooling="frames")
        same = torch.isclose(model.encode_video(video, ids, size)[1], feature, atol=1e-4).all()
    assert same == (tokens.shape[1] == 1)


# ---------------------------------------------------------------------------------------------------------------------
# Decoders

@pytest.mark.parametrize("objective", ["relevance", "visible"])
@pytest.mark.parametrize("pos_embed", ["relative", "learned"])
def test_decoders_have_relative_positions(pos_embed, objective, monkeypatch):
    def run(grid, pos_embed):
        torch.manual_seed(0)
        vit, _, cfg = configs(vit={"pos_embed": pos_embed, "grid": TABLE}, model={"objective": objective})
        tokens, count = torch.randn(2, 3, 16, dtype=torch.float64), math.prod(grid)
        ids = torch.arange(count - 3, count).expand(2, -1)
        return shaken((LinearDecoder if objective == "visible" else Decoder)(vit, cfg))(tokens, ids, ids, grid)

    assert torch.equal(run(TABLE, pos_embed), run(TABLE, "3d"))
    half = 3, 4, 4
    found = run(half, pos_embed)
    assert not torch.isclose(found, run(half, "3d")).all(-1).any()
    points = sincos_pos_embed(TABLE, 16, "3d", CPU).view(*TABLE, 8, 2)
    midway = nnf.normalize(points[0::2] + points[1::2], dim=-1).flatten(3).flatten(0, 2)     # of two frames
    monkeypatch.setattr(decoders, "sincos_pos_embed", lambda *_: midway)
    torch.testing.assert_close(run(half, "3d"), found)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pos_embed", ["relative", "learned"])
def test_a_student_trains_at_any_grid(pos_embed, objective):
    model = student(vit={"pos_embed": pos_embed, "grid": TABLE},
                    model={"pooling": "tokens", "decoder_queries": 2, "objective": objective}).train()
    for grid in GRIDS:
        model.zero_grad()
        losses = model(*random_clips(grid, 2))
        assert [*losses] == [OBJECTIVES[objective], "vtc", "vtm", "mlm"]
        sum(losses.values()).backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all() and p.grad.any(), (grid, name)


def test_a_clip_beyond_the_learned_table_is_refused():
    model = student(vit={"pos_embed": "learned", "grid": TABLE})
    with pytest.raises(ValueError, match=r"at most \(6, 4, 4\).*got \(7, 4, 4\)$"):
        model(*random_clips((7, 4, 4), 3))


# ---------------------------------------------------------------------------------------------------------------------
# Queries

@pytest.mark.parametrize("S", [1, 2])
def test_the_number_of_queries_does_not_depend_on_the_grid(S):
    cross = student(model={"decoder_queries": 5})
    joint = student(model={"decoder_queries": 5, "decoder": "joint"})
    visible = student(model={"decoder_queries": 5, "objective": "visible"})
    for grid in GRIDS:
        (batch, targets), masked = random_clips(grid, S), math.prod(grid) - S
        query_ids = cross.sample_queries(batch, targets)
        assert query_ids.shape == (3, min(masked, 5)) and joint.sample_queries(batch, targets).shape == (3, masked)
        assert torch.equal(visible.sample_queries(batch, targets), targets.visible_ids)
        for queries, ids in zip(query_ids.tolist(), targets.visible_ids.tolist(), strict=True):
            assert len({*queries}) == len(queries) and not {*queries} & {*ids}
            assert {*queries} <= {*range(math.prod(grid))}


@pytest.mark.parametrize("changes, names", [
    ({"pooling": "mean"}, r"model\.pooling.*frames, tokens.*'mean'"),
    ({"decoder_queries": -1}, r"model\.decoder_queries.*\b0\b.*-1")], ids=str)
def test_impossible_configs_are_refused_by_field(changes, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        replace(MODEL, **changes)
