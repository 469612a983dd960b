"""The student's losses against loops in fp64 that state their formulas, and of a batch cut into micro-batches."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from helpers.models import (
    FP32,
    KEEP,
    MEDIA_IDS,
    MODEL,
    OBJECTIVES,
    TEXT,
    TIGHT,
    VIT,
    N,
    T,
    block_ref,
    configs,
    heavy,
    layer_norm,
    random_batch,
    random_ids,
    random_keep,
    random_video,
    seeded,
    shaken,
    student,
    to_fp32,
    two_parts,
    unit,
)

import model as model_module
from decoders import Decoder
from encoders import Bert, bert_config, mask_tokens
from model import ClusterSTM, hard_negatives, vtc_loss
from positions import sincos_pos_embed
from runtime import Stream, seeded_generator
from targets import TeacherTargets

pytestmark = pytest.mark.usefixtures("seed_0")
CPU = torch.device("cpu")
GRID = (T, 2, 3)
DECODERS = pytest.mark.parametrize("decoder", ["cross", "joint"])
MRM_TEXTS = pytest.mark.parametrize("mrm_texts", ["batch", "own", "none"])
ALL_OBJECTIVES = pytest.mark.parametrize("objective", OBJECTIVES)


def concatenate(parts):
    """Micro-batches as one batch, without what depends on their seeds."""
    batches, targets = zip(*parts, strict=True)
    batch = {k: torch.cat([getattr(b, k) for b in batches]) for k in ("video", "text_ids", "media_ids")}
    names = ("visible_ids", "token_targets", "text_embeds")
    return SimpleNamespace(**batch), TeacherTargets(*(torch.cat([getattr(t, k) for t in targets]) for k in names))


def masked_ids(visible_ids):
    """visible_ids (B, S) -> (B, TN - S), the other ids, ascending."""
    return torch.stack([torch.tensor(sorted({*range(T * N)} - {*ids})) for ids in visible_ids.tolist()])


def token_targets(targets, b, ids):
    """The targets of clip b at flat ids, in fp64."""
    return targets.token_targets[b].flatten(0, 1)[ids]


def gradients(loss, model):
    values = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(model.named_parameters(), values, strict=True)}


def assert_same_gradients(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def untrained(model):
    """Names of the parameters without a gradient."""
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


# ---------------------------------------------------------------------------------------------------------------------
# Features

@pytest.mark.parametrize("empty_frame", [False, True], ids=["even", "empty frame"])
@pytest.mark.parametrize("sized", [False, True], ids=["plain", "sized"])
def test_a_video_feature_is_the_mean_of_unit_vectors_of_frames(empty_frame, sized):
    model, video = student(), random_video(2, T=3)
    visible_ids = torch.tensor([[0, 3, 5, 12], [1, 8, 9, 14]] if empty_frame else
                               [[0, 3, 6, 7, 12, 17], [1, 5, 8, 9, 14, 15]])
    with torch.no_grad():
        size = torch.randint(1, 9, visible_ids.shape, generator=seeded()).float() if sized else None
        tokens, feature = model.encode_video(video, visible_ids, size)
        torch.testing.assert_close(tokens, model.vit(video, visible_ids, size), **TIGHT)
        n = torch.ones(visible_ids.shape) if size is None else size
        for b in range(2):
            vectors = []
            for t in range(3):
                in_frame = [s for s in range(visible_ids.shape[1]) if visible_ids[b, s] // N == t]
                if in_frame:
                    mean = sum(n[b, s] * tokens[b, s] for s in in_frame) / sum(n[b, s] for s in in_frame)
                    x = model.vision_proj(layer_norm(mean, model.pool_norm))
                    vectors.append(x / x.norm())
            assert len(vectors) == (2 if empty_frame and b == 0 else 3)
            torch.testing.assert_close(feature[b].double(), sum(vectors) / len(vectors), rtol=1e-6, atol=1e-6)


def test_features_with_all_ids_equal_those_without_a_mask():
    model, video, all_ids = student(), random_video(2), torch.arange(T * N).expand(2, -1)
    for a, b in zip(model.encode_video(video), model.encode_video(video, all_ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_text_feature_is_the_projected_unit_length_cls_state():
    model, ids = student(), random_ids(3)
    states, feature = model.encode_text(ids)
    torch.testing.assert_close(states, model.bert.forward_text(ids), **TIGHT)
    x = states[:, 0] @ model.text_proj.weight.T + model.text_proj.bias
    torch.testing.assert_close(feature.double(), x / x.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Decoder

@DECODERS
@pytest.mark.parametrize("pos_embed, objective", [("1d", "relevance"), ("3d", "relevance"), ("3d", "pixels")])
def test_decoder_equals_a_loop_over_clips_and_heads(decoder, pos_embed, objective):
    vit, _, cfg = configs(vit={"pos_embed": pos_embed}, model={"decoder": decoder, "objective": objective})
    model = shaken(Decoder(vit, cfg))
    tokens, visible_ids = torch.randn(3, 4, 16, dtype=torch.float64), random_keep(3)
    query_ids = masked_ids(visible_ids)[:, torch.randperm(8)]
    table = sincos_pos_embed(GRID, 16, pos_embed, CPU).double()
    with torch.no_grad():
        predictions = model(tokens, visible_ids, query_ids, GRID)
        for b in range(3):
            context = tokens[b] @ model.in_proj.weight.T + model.in_proj.bias + table[visible_ids[b]]
            x = model.query + table[query_ids[b]]
            if decoder == "joint":
                x = torch.cat([x, context])
            for block in model.blocks:
                x = block_ref(block, x, context if decoder == "cross" else None)
            x = layer_norm(x[:8], model.norm) @ model.proj.weight.T + model.proj.bias
            x = x if objective == "pixels" else x / x.norm(dim=1, keepdim=True)
            torch.testing.assert_close(predictions[b].double(), x, rtol=1e-5, atol=1e-6)


@DECODERS
def test_only_queries_of_a_cross_decoder_are_independent(decoder):
    model = shaken(Decoder(VIT, replace(MODEL, decoder=decoder)))
    tokens, visible_ids = torch.randn(2, 4, 16, dtype=torch.float64), random_keep(2)
    query_ids = masked_ids(visible_ids)
    a, b = (model(tokens, visible_ids, ids, GRID) for ids in (query_ids, query_ids[:, [5, 2]]))
    assert torch.isclose(a[:, [5, 2]], b, atol=1e-6).all() == (decoder == "cross")


@DECODERS
@pytest.mark.parametrize("ratio", [0.25, 0.4, 1.0, 0.01])
def test_queries_are_different_masked_tokens_drawn_by_the_seed(decoder, ratio):
    model = student(model={"decoder": decoder, "decoder_query_ratio": ratio})
    batch, targets = random_batch(6)
    query_ids = model.sample_queries(batch, targets)
    count = T * (N - KEEP)
    assert query_ids.shape == (6, count if decoder == "joint" else max(2, round(count * ratio)))
    for queries, candidates in zip(query_ids.tolist(), masked_ids(targets.visible_ids).tolist(), strict=True):
        assert len({*queries}) == len(queries) and {*queries} <= {*candidates}
    assert torch.equal(query_ids, model.sample_queries(batch, targets))
    batch.seed += 1
    assert not torch.equal(query_ids, model.sample_queries(batch, targets))


def test_every_masked_token_is_a_query_equally_often():
    model, (batch, targets) = student(model={"decoder_query_ratio": 0.25}), random_batch(1)
    count = torch.zeros(T * N)
    for batch.seed in range(1200):
        count[model.sample_queries(batch, targets)[0]] += 1
    count = count[count > 0]                                                        # 2 of 8 masked tokens per draw
    assert len(count) == 8 and (count / 1200 - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 1200)


# ---------------------------------------------------------------------------------------------------------------------
# VTC and VTM

def vtc_ref(video, text, media_ids, temp):
    """A double loop; video, text (B, E') in fp64."""
    B, loss = len(media_ids), 0
    for rows, columns in ((video, text), (text, video)):
        for i in range(B):
            log_p = (columns @ rows[i] / temp).log_softmax(0)
            positives = [j for j in range(B) if media_ids[j] == media_ids[i]]
            loss = loss - sum(log_p[j] for j in positives) / len(positives) / (2 * B)
    return loss


def cross_entropy(logits, label):
    return logits.double().exp().sum().log() - logits[label].double()


@pytest.mark.parametrize("media_ids", [[0, 1, 2, 3, 4], [3, 5, 3, 7, 3], [1, 1, 1, 1, 1], [2, 9, 9, 2, 4]], ids=str)
def test_vtc_is_symmetric_infonce_with_clips_of_one_medium_as_positives(media_ids):
    video, text, temp = (unit(5, 8) * 0.9).float(), unit(5, 8, seed=1).float(), torch.tensor(0.11)
    loss = vtc_loss(video, text, torch.tensor(media_ids), temp)
    torch.testing.assert_close(loss.double(), vtc_ref(video.double(), text.double(), media_ids, temp.double()), **FP32)


def test_vtc_is_fp32_under_autocast():
    args = unit(8, 16).float(), unit(8, 16, seed=1).float(), torch.arange(8), torch.tensor(0.02)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vtc_loss(*args)
    torch.testing.assert_close(loss, vtc_loss(*args))


def test_hard_negatives_are_drawn_from_the_softmax_over_other_media():
    similarity = torch.randn(5, 5, generator=seeded()) * 1.5
    media_ids, g, count, draws = torch.tensor([4, 7, 4, 1, 7]), seeded(1), torch.zeros(5, 5), 3000
    for _ in range(draws):
        column, valid = hard_negatives(similarity, media_ids, g)
        assert valid.all()
        count[torch.arange(5), column] += 1
    is_negative = media_ids[:, None] != media_ids[None]
    assert not count[~is_negative].any()
    p = similarity.masked_fill(~is_negative, -torch.inf).softmax(1)
    assert ((count / draws - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()


def test_hard_negatives_depend_on_the_generator_and_may_not_exist():
    similarity = torch.randn(4, 4) * 100
    column, valid = hard_negatives(similarity, torch.tensor([2, 2, 2, 2]), seeded())
    assert not valid.any() and column.min() >= 0 and column.max() < 4
    a, b = (hard_negatives(similarity * 0, torch.tensor([0, 1, 2, 2]), seeded(3))[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.fixture
def negatives(monkeypatch):
    """A list of (similarity, columns) of the calls of hard_negatives."""
    calls = []

    def record(similarity, media_ids, generator):
        result = hard_negatives(similarity, media_ids, generator)
        calls.append((similarity, result[0]))
        return result

    monkeypatch.setattr(model_module, "hard_negatives", record)
    return calls


@pytest.mark.parametrize("media_ids", [[0, 1, 2, 3], [0, 0, 1, 1], [5, 5, 5, 5], [0]], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_vtm_classifies_pairs_hard_clips_and_hard_texts(negatives, media_ids, masked):
    B, model = len(media_ids), student()
    batch, targets = random_batch(B, media_ids=media_ids)
    targets = targets if masked else None
    with torch.no_grad():
        losses = model(batch, targets)
        tokens, video = model.encode_video(batch.video, targets and targets.visible_ids)
        states, text = model.encode_text(batch.text_ids)
        similarity = video @ text.T / model.temp
        (text_to_clip, clip), (clip_to_text, other_text) = negatives
        torch.testing.assert_close(text_to_clip, similarity.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip_to_text, similarity, rtol=1e-5, atol=1e-5)
        pairs = [(i, i, 1) for i in range(B)]                                       # text, clip, whether they match
        if len(set(media_ids)) > 1:
            pairs += [(i, clip[i], 0) for i in range(B)] + [(other_text[i], i, 0) for i in range(B)]
            assert all(media_ids[t] != media_ids[c] for t, c, label in pairs if label == 0)
        errors = [cross_entropy(model.match(states[t][None], batch.text_ids[t][None], tokens[c][None])[0], label)
                  for t, c, label in pairs]
    torch.testing.assert_close(losses["vtm"].double(), sum(errors) / len(errors), **FP32)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("media_ids", [[5, 5, 5], [0]], ids=str)
def test_vtm_without_a_negative_has_finite_gradients(media_ids):
    model, part = student().train(), random_batch(len(media_ids), media_ids=media_ids)
    sum(model(*part).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------------------------------------------------------------
# MLM

def mlm_ref(model, batch, targets):
    """The cross-entropies of the masked tokens of a micro-batch, one text at a time."""
    masked, labels = mask_tokens(batch.text_ids, 40, 4, seeded_generator(batch, Stream.MLM))
    tokens, errors = model.vit(batch.video, targets.visible_ids), []
    for b, ids in enumerate(masked):
        states = model.bert.forward_fusion(model.bert.forward_text(ids[None]), ids[None], tokens[b][None])
        logits = model.bert.lm_logits(states)[0]
        errors += [cross_entropy(logits[i], label) for i, label in enumerate(labels[b].tolist()) if label >= 0]
    return errors


def test_mlm_reads_the_matching_clip_and_predicts_each_masked_token():
    model, part = student(), random_batch(5)
    with torch.no_grad():
        loss, errors = model(*part)["mlm"], mlm_ref(model, *part)
    assert len(errors) > 3
    torch.testing.assert_close(loss.double(), sum(errors) / len(errors), **FP32)


def test_mlm_is_0_and_finite_without_a_masked_token():
    model, (batch, targets) = student().train(), random_batch(3)
    batch.text_ids[:, 1:] = 0
    losses = model(batch, targets)
    assert losses["mlm"] == 0 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_mlm_in_micro_batches_divides_by_the_masked_tokens_of_the_batch():
    model, parts = student().train(), two_parts()
    parts[1][0].text_ids[1:, 2:] = 0                                                # far fewer words than the first
    losses, mean_gradients = in_parts(model, parts, "mlm")
    first, second = (mlm_ref(model, *part) for part in parts)
    assert len(first) > len(second) > 0
    expected = sum(first + second) / len(first + second)
    torch.testing.assert_close(losses.mean(), expected.detach(), **FP32)
    assert_same_gradients(mean_gradients, gradients(expected, model))


# ---------------------------------------------------------------------------------------------------------------------
# MRM and what can replace it

def relevance_error(a, b, texts, own_text, mrm_texts):
    """Squared difference of the relevances of vectors a, b (Q, E) of a clip: mean over texts, (Q,)."""
    if mrm_texts == "none":
        return (a - b).square().sum(1)
    texts = own_text[None] if mrm_texts == "own" else texts
    return torch.stack([sum((a[i] @ s - b[i] @ s) ** 2 for s in texts) / len(texts) for i in range(len(a))])


def mrm_ref(model, parts):
    """From the explicit tokens x texts matrix, over all micro-batches."""
    texts = torch.cat([targets.text_embeds for _, targets in parts])
    errors, variances = [], []
    for batch, targets in parts:
        tokens, query_ids = model.vit(batch.video, targets.visible_ids), model.sample_queries(batch, targets)
        q = model.decoder(tokens, targets.visible_ids, query_ids, GRID).double()
        for b in range(len(query_ids)):
            p, settings = token_targets(targets, b, query_ids[b]), (texts, targets.text_embeds[b], model.cfg.mrm_texts)
            errors.append(relevance_error(q[b], p, *settings))
            variances.append(relevance_error(p, p.mean(0).expand_as(p), *settings))
    return torch.cat(errors).mean() / torch.cat(variances).mean()


def align_ref(model, parts):
    """UMT's alignment, a visible token at a time: its position again, linear layer, LayerNorm, 2 - 2 cos."""
    head, errors = model.decoder.head, []
    table = sincos_pos_embed(GRID, 16, model.vit_cfg.pos_embed, CPU).double()
    for batch, targets in parts:
        for b, tokens in enumerate(model.vit(batch.video, targets.visible_ids)):
            for token, i in zip(tokens, targets.visible_ids[b].tolist(), strict=True):
                x = layer_norm(head.weight @ (token + table[i]) + head.bias, model.decoder.norm)
                p = token_targets(targets, b, i)
                errors.append(2 - 2 * (x @ p) / (x.norm() * p.norm()))
    return torch.stack(errors).mean()


def pixels_ref(model, parts):
    """MAE's loss, a pixel at a time."""
    mean, std, errors = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), []
    for batch, targets in parts:
        query_ids = model.sample_queries(batch, targets)
        tokens = model.vit(batch.video, targets.visible_ids)
        predictions = model.decoder(tokens, targets.visible_ids, query_ids, GRID).double()
        for b, video in enumerate(batch.video.double()):
            for patch, i in zip(predictions[b], query_ids[b].tolist(), strict=True):
                t, top, left = i // N, i % N // 3 * 4, i % 3 * 4
                x = [(video[t, c, top + y, left + x].item() / 255 - mean[c]) / std[c]
                     for c in range(3) for y in range(4) for x in range(4)]
                center = sum(x) / 48
                variance = sum((value - center) ** 2 for value in x) / 47
                errors += [(prediction - (value - center) / math.sqrt(variance + 1e-6)) ** 2
                           for prediction, value in zip(patch, x, strict=True)]
    return torch.stack(errors).mean()


@MRM_TEXTS
@DECODERS
def test_mrm_is_the_relevance_error_over_that_of_each_clips_mean(mrm_texts, decoder):
    model, part = student(model={"mrm_texts": mrm_texts, "decoder": decoder}), random_batch(4)
    with torch.no_grad():
        torch.testing.assert_close(model(*part)["mrm"].double(), mrm_ref(model, [part]), **FP32)


@MRM_TEXTS
@DECODERS
def test_mrm_is_1_for_each_clips_mean_and_0_for_the_targets(mrm_texts, decoder):
    model, (batch, targets) = student(model={"mrm_texts": mrm_texts, "decoder": decoder}), random_batch(4)
    p = torch.stack([token_targets(targets, b, ids) for b, ids in enumerate(model.sample_queries(batch, targets))])
    for prediction, loss in ((p.mean(1, keepdim=True).expand_as(p), 1), (p, 0)):
        with torch.no_grad(), mock.patch.object(model.decoder, "forward", return_value=prediction.float()):
            assert model(batch, targets)["mrm"].item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("objective", ["relevance", "pixels"])
def test_without_a_masked_token_there_is_nothing_to_reconstruct(objective):
    model, (batch, targets) = student(model={"objective": objective}), random_batch(3)
    targets.visible_ids = torch.arange(T * N).expand(3, -1)
    losses = model(batch, targets)
    assert [*losses] == ["vtc", "vtm", "mlm"] and all(loss.isfinite() for loss in losses.values())


@ALL_OBJECTIVES
def test_the_objective_needs_token_targets(objective):
    model, (batch, targets) = student(model={"objective": objective}), random_batch(3)
    rest = ["vtc", "vtm", "mlm"]
    assert [*model(batch, targets)] == [OBJECTIVES[objective], *rest]
    without = [*model(batch, TeacherTargets(targets.visible_ids))]          # pixels are predicted without a teacher
    assert [*model(batch, None)] == rest and without == ["pixels"] * (objective == "pixels") + rest


@pytest.mark.parametrize("pos_embed", ["1d", "3d"])
def test_align_is_umts_2_minus_2_cos_of_each_visible_token(pos_embed):
    model = student(vit={"pos_embed": pos_embed}, model={"objective": "visible"})
    batch, targets = random_batch(4)
    targets.token_targets = targets.token_targets * 1.1                             # it does not need unit length
    with torch.no_grad():
        loss = model(batch, targets)["align"]
        torch.testing.assert_close(loss.double(), align_ref(model, [(batch, targets)]), **FP32)


@DECODERS
def test_pixels_is_maes_squared_error_of_each_query(decoder):
    model, (batch, targets) = student(model={"objective": "pixels", "decoder": decoder}), random_batch(3)
    flat_patch = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]    # its variance is close to eps
    batch.video[:, 1, :, :4] = flat_patch
    with torch.no_grad():
        loss = model(batch, targets)["pixels"]
        torch.testing.assert_close(loss.double(), pixels_ref(model, [(batch, targets)]), rtol=1e-4, atol=1e-5)


def test_pixels_are_ordered_by_channel_row_and_column_of_the_patch():
    model, (batch, targets) = student(model={"objective": "pixels", "decoder": "joint"}), random_batch(2)
    mean, std = (x.view(3, 16)[:, :1, None].float() for x in (model.vit.pixel_mean, model.vit.pixel_std))
    truth = nnf.unfold((batch.video.flatten(0, 1) / 255 - mean) / std, 4, stride=4).mT              # (F, N, 48)
    truth = (truth - truth.mean(-1, keepdim=True)) / truth.std(-1, keepdim=True)
    truth = truth.view(2, T, 2, 3, 3, 4, 4)                 # clip, frame, row and column of the patch, channel, y, x
    query_ids = model.sample_queries(batch, targets)

    def loss(order):
        predictions = truth.permute(order).reshape(2, T * N, 48)[torch.arange(2)[:, None], query_ids]
        with torch.no_grad(), mock.patch.object(model.decoder, "forward", return_value=predictions):
            return model(batch, targets)["pixels"].item()

    assert loss((0, 1, 2, 3, 4, 5, 6)) < 1e-6
    for order in ((1, 0, 2, 3, 4, 5, 6), (0, 1, 3, 2, 4, 5, 6), (0, 1, 2, 3, 4, 6, 5), (0, 1, 2, 3, 5, 6, 4)):
        assert loss(order) > 0.5


def test_pixels_do_not_depend_on_the_teachers_embeddings():
    model, (batch, targets) = student(model={"objective": "pixels"}), random_batch(3)
    other = TeacherTargets(targets.visible_ids, targets.token_targets * torch.nan)
    assert torch.equal(model(batch, targets)["pixels"], model(batch, other)["pixels"])


@ALL_OBJECTIVES
def test_every_loss_depends_on_token_size_in_bf16_too(objective):
    model, (batch, targets) = student(model={"objective": objective}), random_batch(4)
    with torch.no_grad():
        ones = replace(targets, token_size=torch.ones(4, 4))
        plain, unweighted, weighted = (model(batch, t) for t in (targets, ones, heavy(targets)))
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            bf16, bf16_plain = (model(batch, to_fp32(t)) for t in (heavy(targets), targets))
    assert [*weighted] == [OBJECTIVES[objective], "vtc", "vtm", "mlm"]
    for name, loss in weighted.items():
        torch.testing.assert_close(unweighted[name], plain[name], rtol=1e-6, atol=0)
        assert abs(loss / plain[name] - 1) > 1e-4, name
        assert bf16[name] == pytest.approx(loss.item(), rel=0.03), name
    assert sum(abs(bf16[name] - bf16_plain[name]) for name in bf16) > 0


# ---------------------------------------------------------------------------------------------------------------------
# The batch in micro-batches

def in_parts(model, parts, name):
    """A loss of each micro-batch, and the gradient of their mean, accumulated one by one as in train.py."""
    losses, mean = [], {}
    for part, stats in zip(parts, model.batch_stats(*zip(*parts, strict=True)), strict=True):
        loss = model(*part, stats)[name]
        for key, gradient in gradients(loss / len(parts), model).items():
            mean[key] = mean.get(key, 0) + gradient
        losses.append(loss.detach().double())
    return torch.stack(losses), mean


@pytest.mark.parametrize("masked, sized", [(True, False), (False, False), (True, True)])
def test_vtc_in_micro_batches_and_its_gradient_are_those_of_the_batch(masked, sized):
    model, parts = student().train(), two_parts()
    if sized:
        parts = [(batch, heavy(targets, i)) for i, (batch, targets) in enumerate(parts)]
    batch, targets = concatenate(parts)
    size = torch.cat([targets.token_size for _, targets in parts]) if sized else None
    losses, mean_gradients = in_parts(model, parts if masked else [(b, None) for b, _ in parts], "vtc")
    _, video = model.encode_video(batch.video, targets.visible_ids if masked else None, size)
    _, text = model.encode_text(batch.text_ids)
    expected = vtc_ref(video.double(), text.double(), batch.media_ids.tolist(), model.temp)
    torch.testing.assert_close(losses, expected.detach().expand(2), **FP32)
    for name in ("temp", "vit.patch_embed.weight", "text_proj.weight"):
        assert mean_gradients[name].any()
    assert_same_gradients(mean_gradients, gradients(expected, model))


@MRM_TEXTS
def test_mrm_in_micro_batches_uses_texts_and_variance_of_the_batch(mrm_texts):
    model, parts = student(model={"mrm_texts": mrm_texts}).train(), two_parts()
    x = parts[1][1].token_targets
    parts[1][1].token_targets = nnf.normalize(x[:, :, :1] + 0.3 * x, dim=-1)        # less variance than the first
    losses, mean_gradients = in_parts(model, parts, "mrm")
    expected = mrm_ref(model, parts)
    torch.testing.assert_close(losses.mean(), expected.detach(), **FP32)
    assert_same_gradients(mean_gradients, gradients(expected, model))


@pytest.mark.parametrize("objective, reference", [("visible", align_ref), ("pixels", pixels_ref)])
def test_other_objectives_in_micro_batches_are_those_of_the_batch(objective, reference):
    model, parts = student(model={"objective": objective}).train(), two_parts()
    losses, mean_gradients = in_parts(model, parts, OBJECTIVES[objective])
    expected = reference(model, parts)
    assert losses[0] != losses[1] and mean_gradients["vit.patch_embed.weight"].any()
    torch.testing.assert_close(losses.mean(), expected.detach(), **FP32)
    assert_same_gradients(mean_gradients, gradients(expected, model))


def test_vtm_draws_its_negatives_from_its_micro_batch():
    model, parts = student(), two_parts()
    losses, mean_gradients = in_parts(model, parts, "vtm")
    expected = [model(*part)["vtm"] for part in parts]
    torch.testing.assert_close(losses, torch.stack(expected).detach().double())
    assert_same_gradients(mean_gradients, gradients(sum(expected) / 2, model))


def test_batch_stats_are_those_of_the_whole_batch():
    model, parts = student(), two_parts()
    batch, targets = concatenate(parts)
    gram = sum(torch.outer(text, text) for text in targets.text_embeds) / 8
    masked = [mask_tokens(b.text_ids, 40, 4, seeded_generator(b, Stream.MLM)) for b, _ in parts]
    p = torch.stack([token_targets(t, i, ids) for b, t in parts for i, ids in enumerate(model.sample_queries(b, t))])
    deviation = p - p.mean(1, keepdim=True)
    variance = torch.einsum("bqe,ef,bqf->bq", deviation, gram, deviation).mean()
    for i, stats in enumerate(model.batch_stats(*zip(*parts, strict=True))):
        assert (stats.grad_scale, stats.index) == (2, i)
        assert stats.mlm_denominator == sum((labels >= 0).sum() for _, labels in masked) / 2
        assert all(torch.equal(a, b) for a, b in zip(stats.mlm_inputs, masked[i], strict=True))
        assert torch.equal(stats.query_ids, model.sample_queries(*parts[i]))
        torch.testing.assert_close(stats.text_gram.double(), gram, **FP32)
        torch.testing.assert_close(stats.target_variance.double(), variance, **FP32)
        video, text, media_ids = stats.gathered_features
        assert torch.equal(media_ids, torch.tensor(MEDIA_IDS)) and not video.requires_grad and not text.requires_grad
        expected = model.encode_video(batch.video, targets.visible_ids)[1].detach()
        torch.testing.assert_close(video.flatten(0, 1), expected)
        torch.testing.assert_close(text.flatten(0, 1), model.encode_text(batch.text_ids)[1].detach())


def test_a_single_micro_batch_needs_no_batch_stats():
    model, part = student(), random_batch(4)
    a, b = model(*part), model(*part, *model.batch_stats([part[0]], [part[1]]))
    assert [*a] == [*b] == ["mrm", "vtc", "vtm", "mlm"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batch_stats_use_the_dropout_of_the_forward_pass_that_follows():
    model, parts = student(text={"dropout": 0.3}, vit={"drop_path": 0.3}).train(), two_parts()
    stats = model.batch_stats(*zip(*parts, strict=True))

    def vtc(i, seed):
        torch.manual_seed(seed)
        return model(*parts[i], stats[i])["vtc"].item()

    first, second = (vtc(i, batch.seed) for i, (batch, _) in enumerate(parts))      # seeded as in train.py
    assert first == pytest.approx(second, rel=1e-6)                                 # both from the same features
    assert vtc(0, 0) != pytest.approx(first, rel=1e-4)


def test_without_mlm_the_other_losses_do_not_change():
    model, part, parts = student(), random_batch(4), two_parts()

    def run():
        stats = model.batch_stats(*zip(*parts, strict=True))
        assert all(s.mlm_denominator.isfinite() for s in stats)
        return [model(*part), *(model(*p, s) for p, s in zip(parts, stats, strict=True))]

    with torch.no_grad():
        with_mlm = run()
        model.losses -= {"mlm"}
        without = run()
        with mock.patch.object(model.bert, "forward_text", wraps=model.bert.forward_text) as forward_text:
            model(*part)
    assert [len(call.args[0]) for call in forward_text.call_args_list] == [4]       # no masked texts
    for a, b in zip(with_mlm, without, strict=True):
        assert [*a] == ["mrm", "vtc", "vtm", "mlm"] and [*b] == ["mrm", "vtc", "vtm"]
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert [*model(part[0], None)] == ["vtc", "vtm"]


# ---------------------------------------------------------------------------------------------------------------------
# The whole student

@ALL_OBJECTIVES
def test_every_parameter_gets_a_gradient_from_what_uses_it(objective):
    model, (batch, targets) = student(model={"objective": objective}).train(), random_batch(4)
    names = {name for name, _ in model.named_parameters()}
    for losses, t, prefix in ((model.losses, targets, ()), (model.losses, None, "decoder."),
                              (model.losses - {"mlm"}, targets, "bert.cls.")):
        model.losses = losses
        model.zero_grad()
        sum(model(batch, t).values()).backward()
        assert untrained(model) == {name for name in names if name.startswith(prefix)}


def test_losses_are_a_function_of_the_batch_and_its_seed():
    model, part = student(), random_batch(4)
    a, b = model(*part), model(*part)
    assert all(torch.equal(a[name], b[name]) for name in a)
    part[0].seed += 1
    c = model(*part)
    assert torch.equal(a["vtc"], c["vtc"]) and all(a[name] != c[name] for name in ("mrm", "vtm", "mlm"))


@pytest.mark.parametrize("temp, clamped", [(2.0, 0.5), (-1.0, 0.001), (0.2, 0.2)])
def test_the_temperature_stays_in_bounds(temp, clamped):
    model, part = student(), random_batch(4)
    model.temp.data.fill_(temp)
    model(*part)
    assert model.temp.item() == pytest.approx(clamped)


@pytest.mark.parametrize("changes", [{"decoder": "cross"}, {"decoder": "joint"}, {"objective": "visible"},
                                     {"objective": "pixels"}], ids=str)
def test_twenty_steps_on_one_batch_lower_every_loss(changes):
    torch.manual_seed(0)
    model, part = ClusterSTM(*configs(model=changes)).train(), random_batch(4)
    optimizer, history = torch.optim.AdamW(model.parameters(), 5e-3), []
    for _ in range(21):
        losses = model(*part)
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values())
    assert all(history[-1][name] < history[0][name] for name in history[0] if name != "vtm")


def test_inference_mode_leaves_training_possible():
    model, part = student().train(), random_batch(4)
    sincos_pos_embed.cache_clear()
    with torch.inference_mode():
        model(*part)
    sum(model(*part).values()).backward()
    assert all(p.grad is not None for p in model.vit.parameters())


@pytest.mark.parametrize("changes, names", [
    ({"decoder_width": 7}, r"model\.decoder_width.*model\.decoder_heads.*\b2\b.*\b7"),
    ({"decoder": "none"}, r"model\.decoder .*cross, joint.*'none'"),
    ({"objective": "none"}, r"model\.objective.*relevance, visible, pixels.*'none'"),
    ({"mrm_texts": "all"}, r"model\.mrm_texts.*batch, own, none.*'all'"),
    ({"decoder_query_ratio": 0}, r"model\.decoder_query_ratio.*\(0, 1\].*\b0"),
], ids=str)
def test_impossible_configs_are_refused_by_field(changes, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        replace(MODEL, **changes)


@pytest.mark.parametrize("part, name", [("text", "vocab_size"), ("text", "mask_token_id"), ("model", "target_dim")])
def test_a_student_needs_the_sizes_of_vocabulary_and_targets(part, name):
    with pytest.raises(ValueError, match=rf"^{part}\.{name}.*\b0$"):
        ClusterSTM(*configs(**{part: {name: 0}}))


def test_a_given_text_encoder_is_used_and_must_fit():
    bert = Bert(bert_config(TEXT, VIT.width))
    assert ClusterSTM(VIT, TEXT, MODEL, bert).bert is bert
    other = Bert(bert_config(replace(TEXT, fusion_layers=1), VIT.width))
    with pytest.raises(ValueError, match=r"text encoder.*fusion_layers=2.*fusion_layers=1"):
        ClusterSTM(VIT, TEXT, MODEL, other)
