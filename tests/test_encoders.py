"""The ViT and the BERT against loops in fp64 that state their formulas, and against transformers."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from helpers.models import (
    FP32,
    KEEP,
    TEXT,
    TIGHT,
    VIT,
    N,
    T,
    block_ref,
    hugging_face,
    layer_norm,
    random_ids,
    random_keep,
    random_video,
    seeded,
    shaken,
    student,
)

import blocks
import encoders
from blocks import Block
from encoders import Bert, BertConfig, ViT, mask_tokens, max_masked_tokens
from masking import token_sizes
from model import VideoToText
from positions import sincos_pos_embed

pytestmark = pytest.mark.usefixtures("seed_0")
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# ViT

def sinusoid(n, c, C, base=10000):
    """Channel c of position n in get_sinusoid_encoding_table of VideoMAE."""
    angle = n / base ** (2 * (c // 2) / C)
    return math.sin(angle) if c % 2 == 0 else math.cos(angle)


@pytest.mark.parametrize("size", [(1, 4, 4), (2, 8, 12), (3, 12, 4), (5, 4, 8)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "visible"])
def test_vit_equals_umts(size, masked):
    vit, video = shaken(ViT(VIT)), random_video(2, *size)
    count = size[0] * size[1] // 4 * size[2] // 4
    visible_ids = random_keep(2, T=1, N=count, K=max(1, count // 2)) if masked else None
    weight = vit.patch_embed.weight.view(16, 3, 4, 4)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
                 for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = vit(video, visible_ids)
        for b in range(2):
            frames = nnf.conv2d((video[b] / 255.0 - mean) / std, weight, vit.patch_embed.bias, stride=4)
            x = frames.permute(0, 2, 3, 1).reshape(count, 16)
            x = x + torch.tensor([[sinusoid(n, c, 16) for c in range(16)] for n in range(count)], dtype=torch.float64)
            x = x if visible_ids is None else x[visible_ids[b]]
            for block in vit.blocks:
                x = block_ref(block, x)
            torch.testing.assert_close(tokens[b], layer_norm(x, vit.norm), rtol=1e-6, atol=1e-6)


def test_ids_of_all_tokens_equal_no_mask():
    vit, video = ViT(VIT), random_video(2)
    assert torch.equal(vit(video), vit(video, torch.arange(T * N).expand(2, -1)))


@pytest.mark.parametrize("visible_ids", [[[0, 3, 7, 8], [1, 2, 9, 11]], [[5, 6, 7, 10], [0, 1, 3, 8]]], ids=str)
def test_token_size_weights_a_token_like_that_many_copies(visible_ids, monkeypatch):
    """If the masked patches are copies of visible ones and positions are 0, the result is that of all tokens."""
    monkeypatch.setattr(encoders, "sincos_pos_embed", lambda grid, C, *_: torch.zeros(math.prod(grid), C))
    model, visible_ids = student(), torch.tensor(visible_ids)
    patches = random_video(2).unflatten(3, (2, 4)).unflatten(5, (3, 4)).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3)
    size = torch.zeros(2, 4, dtype=torch.float64)
    for b, ids in enumerate(visible_ids.tolist()):
        for i in range(T * N):
            in_frame = [s for s, k in enumerate(ids) if k // N == i // N]
            s = ids.index(i) if i in ids else in_frame[(i * i + b) % len(in_frame)]
            size[b, s] += 1
            patches[b, i] = patches[b, ids[s]]
    assert size.max() > 2
    assert torch.equal(size, token_sizes(patches.flatten(2).double().unflatten(1, (T, N)) - 128, visible_ids))
    video = patches.unflatten(1, (T, 2, 3)).permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    with torch.no_grad():
        all_tokens, all_feature = model.encode_video(video)
        tokens, feature = model.encode_video(video, visible_ids, size)
        expected = all_tokens.gather(1, visible_ids[..., None].expand_as(tokens))
        torch.testing.assert_close(tokens, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(feature, all_feature, rtol=1e-6, atol=1e-6)
        unweighted, unweighted_feature = model.encode_video(video, visible_ids)
        assert (unweighted - tokens).abs().max() > 1e-3 and (unweighted_feature - feature).abs().max() > 1e-3
        assert torch.equal(VideoToText.encode_video(model, video, visible_ids, size)[0], tokens)


def test_token_sizes_of_one_change_nothing():
    model, video, visible_ids = student(), random_video(2), random_keep(2)
    with torch.no_grad(), mock.patch.object(blocks, "sdpa", wraps=blocks.sdpa) as sdpa:
        plain, sized = (model.encode_video(video, visible_ids, size) for size in (None, torch.ones(2, T * KEEP)))
    for a, b in zip(plain, sized, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    biases = [call.kwargs["attn_mask"] for call in sdpa.call_args_list]
    assert biases[:2] == [None] * 2 and [b.shape for b in biases[2:]] == [(2, 1, 1, T * KEEP)] * 2


@pytest.mark.parametrize("pos_embed", ["1d", "3d"])
def test_pixels_of_masked_tokens_have_no_influence(pos_embed):
    vit, video, visible_ids = ViT(replace(VIT, pos_embed=pos_embed)), random_video(3), random_keep(3)
    visible = torch.zeros(3, T * N, dtype=torch.bool).scatter(1, visible_ids, True).view(3, T, 2, 3)
    visible = visible.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, None].expand_as(video)
    other = torch.where(visible, video, random_video(3, seed=1))
    assert (other != video).any() and torch.equal(vit(video, visible_ids), vit(other, visible_ids))
    other = torch.where(visible, random_video(3, seed=1), video)
    assert not torch.isclose(vit(video, visible_ids), vit(other, visible_ids)).all(-1).any()


@pytest.mark.parametrize("C", [16, 10])
def test_1d_positions_equal_videomaes(C):
    expected = torch.tensor([[sinusoid(n, c, C) for c in range(C)] for n in range(3 * 2 * 4)])
    torch.testing.assert_close(sincos_pos_embed((3, 2, 4), C, "1d", CPU), expected)


@pytest.mark.parametrize("C", [16, 20, 30])
def test_3d_positions_mean_the_same_at_every_length_and_resolution(C):
    table = sincos_pos_embed((3, 4, 5), C, "3d", CPU).view(3, 4, 5, C)
    Ct, Ch = C // 4, (C - C // 4) // 2
    for channels, other_axes in ((slice(0, Ct), (1, 2)), (slice(Ct, Ct + Ch), (0, 2)), (slice(Ct + Ch, C), (0, 1))):
        part = table[..., channels]
        assert all(torch.equal(part, part.narrow(axis, 0, 1).expand_as(part)) for axis in other_axes)
        line = part[tuple(0 if axis in other_axes else slice(None) for axis in range(3))]
        width = line.shape[1]
        expected = torch.tensor([[sinusoid(n, c, width, 100) for c in range(width)] for n in range(len(line))])
        torch.testing.assert_close(line, expected)
    assert len(table.view(60, C).unique(dim=0)) == 60
    assert torch.equal(sincos_pos_embed((6, 7, 8), C, "3d", CPU).view(6, 7, 8, C)[:3, :4, :5], table)


def test_drop_path_drops_whole_clips_in_training_and_keeps_the_mean():
    assert [b.drop_path for b in ViT(replace(VIT, depth=3, drop_path=0.2)).blocks] == [0, 0.1, 0.2]
    block, x = Block(16, 2, drop_path=0.25), torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    y = block.apply_drop_path(x)
    assert ((y == y[:, :1, :1]) & ((y == 0) | torch.isclose(y, torch.tensor(4 / 3)))).all()
    assert abs((y[:, 0, 0] == 0).float().mean() - 0.25) < 0.03
    assert torch.equal(block.eval().apply_drop_path(x), x)


def test_frames_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match=r"8 x 10\b.*\b4$"):
        ViT(VIT)(random_video(1, W=10))


@pytest.mark.parametrize("cfg, changes, names", [
    (VIT, {"width": 15}, r"vit\.width.*vit\.heads.*\b2\b.*\b15"),
    (VIT, {"pos_embed": "2d"}, r"vit\.pos_embed.*1d, 3d, relative, learned.*'2d'"),
    (VIT, {"grid": (4, 3)}, r"vit\.grid.*three positive.*\(4, 3\)$"),
    (VIT, {"grid": (0, 3, 4)}, r"vit\.grid.*three positive.*\(0, 3, 4\)$"),
    (VIT, {"grid": (2.5, 3, 4)}, r"vit\.grid.*three positive.*\(2\.5, 3, 4\)$"),
    (TEXT, {"width": 13}, r"text\.width.*text\.heads.*\b2\b.*\b13"),
    (TEXT, {"fusion_layers": 3}, r"text\.fusion_layers.*1 to 2\b.*\b3$"),
    (TEXT, {"fusion_layers": 0}, r"text\.fusion_layers.*1 to 2\b.*\b0$"),
], ids=str)
def test_impossible_configs_are_refused_by_field(cfg, changes, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        replace(cfg, **changes)


def test_a_grid_read_from_json_is_a_tuple():
    assert replace(VIT, grid=[4, 2, 3]) == replace(VIT, grid=(4, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# BERT

def bert(**changes):
    cfg = BertConfig(vocab_size=40, hidden_size=12, num_hidden_layers=4, num_attention_heads=3, intermediate_size=20,
                     max_position_embeddings=9, fusion_layers=2, encoder_width=12)
    return shaken(Bert(replace(cfg, **changes)))


def hf_bert(model):
    """transformers' BERT with the same weights, by name."""
    hf, c = hugging_face(), model.cfg
    config = hf.BertConfig(vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
                           num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size,
                           max_position_embeddings=c.max_position_embeddings, attn_implementation="sdpa")
    theirs = hf.BertForMaskedLM(config).double().eval()
    weights = {k: v for k, v in model.state_dict().items() if "crossattention" not in k}
    result = theirs.load_state_dict(weights, strict=False)
    tied = {f"cls.predictions.decoder.{part}" for part in ("weight", "bias")}
    assert not result.unexpected_keys and set(result.missing_keys) <= tied
    return theirs


def encode(model, ids, *context):
    return model.forward_fusion(model.forward_text(ids), ids, *context)


def test_bert_without_a_video_equals_transformers():
    model, ids = bert(), random_ids(6)
    with torch.no_grad():
        expected = hf_bert(model)(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
        states = model.forward_text(ids)
        torch.testing.assert_close(states, expected.hidden_states[2], **TIGHT)
        states = model.forward_fusion(states, ids)
        torch.testing.assert_close(states, expected.hidden_states[4], **TIGHT)
        torch.testing.assert_close(model.lm_logits(states), expected.logits, **TIGHT)


def test_text_only_mlm_loss_equals_transformers():
    model, ids = bert(), random_ids(6)
    masked, labels = mask_tokens(ids, 40, 4, seeded())
    with torch.no_grad():
        expected = hf_bert(model)(masked, attention_mask=(ids != 0).long(), labels=labels).loss
        torch.testing.assert_close(model(masked, labels)["mlm"].double(), expected, **FP32)


def test_fusion_layers_equal_transformers_layers_with_cross_attention():
    model, ids = bert(), random_ids(5)
    video, states = torch.randn(5, 8, 12, dtype=torch.float64), torch.randn(5, 7, 12, dtype=torch.float64)
    hf = hugging_face()
    theirs = hf.models.bert.modeling_bert.BertLayer(hf.BertConfig(
        hidden_size=12, num_attention_heads=3, intermediate_size=20, is_decoder=True, add_cross_attention=True,
        attn_implementation="eager")).double().eval()
    mask = torch.zeros(5, 1, 1, 7, dtype=torch.float64).masked_fill((ids == 0)[:, None, None], -1e9)
    expected = states
    with torch.no_grad():
        for layer in model.bert.encoder.layer[2:]:
            theirs.load_state_dict(layer.state_dict())
            expected = theirs(expected, mask, encoder_hidden_states=video)
            expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(model.forward_fusion(states, ids, video), expected, **TIGHT)


def test_several_texts_may_attend_to_one_clip():
    model, ids = bert(encoder_width=16), random_ids(6)
    video, index = torch.randn(3, 8, 16, dtype=torch.float64), torch.tensor([2, 0, 0, 1, 2, 2])
    states = encode(model, ids, video, index)
    torch.testing.assert_close(states, encode(model, ids, video[index]), **TIGHT)
    assert not torch.isclose(states, encode(model, ids, video[index.flip(0)])).all()


@pytest.mark.parametrize("per_clip, index", [(1, [2, 0]), (2, [1]), (3, []), (0, [2, 2, 1, 0])], ids=str)
def test_texts_in_order_share_a_clip_and_the_last_have_an_index(per_clip, index):
    model, ids = bert(encoder_width=16), random_ids(3 * per_clip + len(index))
    video, index = torch.randn(3, 8, 16, dtype=torch.float64), torch.tensor(index, dtype=torch.long)
    expected = encode(model, ids, video[torch.cat([torch.arange(3).repeat_interleave(per_clip), index])])
    torch.testing.assert_close(encode(model, ids, video, index), expected, **TIGHT)
    if not len(index):
        torch.testing.assert_close(encode(model, ids, video), expected, **TIGHT)


def test_gradients_of_texts_in_order_equal_those_of_repeated_clips():
    model, ids = bert(encoder_width=16), random_ids(8)
    video, index = torch.randn(3, 8, 16, dtype=torch.float64, requires_grad=True), torch.tensor([1, 1])
    rows, weight = torch.cat([torch.arange(3).repeat_interleave(2), index]), torch.randn(8, 7, 12)
    a, b = ((encode(model, ids, *context) * weight).sum() for context in ((video, index), (video[rows],)))
    inputs = [video, *model.bert.encoder.layer[-1].crossattention.parameters()]
    for x, y in zip(*(torch.autograd.grad(loss, inputs) for loss in (a, b)), strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.mark.parametrize("per_clip, index, full", [
    (3, [2, 0, 1], [1, 4, 7]), (2, [1], [0, 2, 4]), (1, [], None), (0, [2, 2, 1, 0], None)], ids=str)
def test_states_of_cls_are_those_of_all_layers(per_clip, index, full):
    """And so are all states of the texts in `full`, and the gradients."""
    model, ids = bert(encoder_width=16), random_ids(3 * per_clip + len(index))
    video, index = torch.randn(3, 8, 16, dtype=torch.float64, requires_grad=True), torch.tensor(index, dtype=torch.long)
    full = None if full is None else torch.tensor(full)
    states = model.forward_text(ids)
    cls, others = model.forward_cls(states, ids, video, index, full)
    expected = model.forward_fusion(states, ids, video, index)
    torch.testing.assert_close(cls, expected[:, 0], **TIGHT)
    weight, total, expected_total = torch.randn_like(cls), 0, 0
    if full is None:
        assert others is None
    else:
        torch.testing.assert_close(others, expected[full], **TIGHT)
        total, expected_total = (others ** 3).sum(), (expected[full] ** 3).sum()
    inputs = [video, *model.bert.encoder.layer[-1].parameters(), *model.bert.encoder.layer[0].parameters()]
    found, wanted = (torch.autograd.grad((x * weight).sum() + y, inputs, retain_graph=True)
                     for x, y in ((cls, total), (expected[:, 0], expected_total)))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


def test_attention_weights_are_dropped_in_training_alone():
    """Their mean over many draws is that of evaluation, for texts in order, which share their keys, and by an index."""
    cfg, draws = BertConfig(hidden_size=12, num_attention_heads=2, hidden_dropout_prob=0.4), 2000
    attention, index = encoders.BertSelfAttention(cfg, 12), torch.zeros(draws, dtype=torch.long)
    x, context = torch.randn(1, 5, 12).expand(2 * draws, -1, -1), torch.randn(1, 7, 12)
    with torch.no_grad():
        expected, dropped = (attention.train(training)(x, context, None, index) for training in (False, True))
    torch.testing.assert_close(expected, expected[:1].expand_as(x))
    for part in dropped.split(draws):
        std = part.std(0)
        assert (std > 0).all() and ((part.mean(0) - expected[0]).abs() < 6 * std / draws ** 0.5).all()


def test_a_context_mask_needs_one_context_a_text():
    model, ids, video = bert(encoder_width=16), random_ids(4), torch.randn(2, 8, 16, dtype=torch.float64)
    mask = torch.arange(8)[None, None, None] < torch.tensor([3, 8, 5, 6])[:, None, None, None]
    index = torch.arange(4) % 2
    states = model.forward_fusion(model.forward_text(ids), ids, video, index, mask)
    for i, visible in enumerate((3, 8, 5, 6)):
        alone = encode(model, ids[i:i + 1], video[i % 2:i % 2 + 1, :visible])
        torch.testing.assert_close(states[i:i + 1], alone, **TIGHT)
    for context_index in (None, index[:2]):             # the mask would be of two texts and mean four
        with pytest.raises(ValueError, match="context_mask.* 4 texts, 2 contexts"):
            model.forward_fusion(model.forward_text(ids), ids, video, context_index, mask[:2])


def test_padding_changes_nothing():
    model, ids = bert(encoder_width=16), random_ids(6)
    video, short = torch.randn(6, 8, 16, dtype=torch.float64), ids[:1, :3]          # the first text has three tokens
    torch.testing.assert_close(encode(model, ids, video)[:1, :3], encode(model, short, video[:1]), **TIGHT)


def test_only_fusion_layers_have_cross_attention():
    assert [hasattr(layer, "crossattention") for layer in bert().bert.encoder.layer] == [False, False, True, True]


def test_texts_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match=r"max_position_embeddings.*\b10$"):
        bert().forward_text(torch.ones(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\b9 .*\b10$"):
        bert().bert.embeddings(torch.ones(1, 2, dtype=torch.int64), 8)


# ---------------------------------------------------------------------------------------------------------------------
# Masked tokens

def test_half_of_the_tokens_are_masked_80_10_10():
    ids, vocab_size, mask_id = torch.randint(0, 5000, (500, 400), generator=seeded(1)), 5000, 103
    masked_ids, labels = mask_tokens(ids, vocab_size, mask_id, seeded())
    is_word, chosen = ids > mask_id, labels != -100
    assert not (chosen & ~is_word).any() and torch.equal(masked_ids[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen]) and (labels[~chosen] == -100).all()
    n = chosen.sum().item()
    masked, unchanged = (masked_ids == mask_id) & chosen, (masked_ids == ids) & chosen
    replaced = masked_ids[chosen & ~masked & ~unchanged]
    for count, share, total in ((n, 0.5, is_word.sum().item()), (masked.sum().item(), 0.8, n),
                                (len(replaced), 0.1, n), (unchanged.sum().item(), 0.1, n)):
        assert abs(count / total - share) < 4 * math.sqrt(share * (1 - share) / total)
    assert replaced.min() > mask_id and replaced.max() > 4980 and len(replaced.unique()) > 3500     # no special token


def test_masked_tokens_are_a_function_of_the_generator():
    ids = random_ids(9)
    a, b, c = (mask_tokens(ids, 40, 4, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])


def test_the_first_max_masked_tokens_of_the_chosen_are_masked(monkeypatch):
    ids = random_ids(9, L=11)
    all_masked, all_labels = mask_tokens(ids, 40, 4, seeded(5))
    positions = (all_labels != -100).flatten().nonzero()[:, 0]
    assert 20 < len(positions) <= max_masked_tokens(99)
    for limit in (0, 1, 7, len(positions) - 1, len(positions), 99):
        monkeypatch.setattr(encoders, "max_masked_tokens", lambda count, limit=limit: limit)
        masked_ids, labels = mask_tokens(ids, 40, 4, seeded(5))
        chosen = torch.zeros(99, dtype=torch.bool).index_fill(0, positions[:limit], True).view(9, 11)
        assert torch.equal(labels, torch.where(chosen, ids, -100))
        assert torch.equal(masked_ids, torch.where(chosen, all_masked, ids))


def test_a_fair_draw_never_reaches_max_masked_tokens():
    ids = torch.full((64, 32), 7)                                           # no padding: the most that can be chosen
    counts = [(mask_tokens(ids, 40, 4, seeded(s))[1] != -100).sum().item() for s in range(1500)]
    mean, std = 64 * 32 / 2, (64 * 32) ** 0.5 / 2
    assert max_masked_tokens(64 * 32) == math.ceil(mean + 6 * std) == 1160
    assert abs(sum(counts) / len(counts) - mean) < 5 * std / 1500 ** 0.5 and max(counts) < mean + 4.5 * std
    assert [max_masked_tokens(n) for n in (1, 4, 36, 37, 100)] == [1, 4, 36, 37, 80]


def mlm_example(share, M=16, L=9):
    """A BERT in fp64, states (M, L, D), and labels (M, L) of which `share` is a token."""
    model = bert(num_hidden_layers=2, fusion_layers=1)
    labels = torch.randint(5, 40, (M, L))
    labels[torch.rand(M, L).argsort().argsort() >= share * L] = -100
    return model, torch.randn(M, L, 12, dtype=torch.float64, requires_grad=True), labels


@pytest.mark.parametrize("share", [0, 0.1, 0.6])
def test_mlm_loss_and_gradient_are_those_of_each_masked_token(share):
    model, states, labels = mlm_example(share)
    loss = model.mlm_loss(states, labels)
    expected = states.new_zeros(())
    for m, i in (labels != -100).nonzero().tolist():
        expected = expected - model.lm_logits(states[m, i]).log_softmax(-1)[labels[m, i]]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    inputs = [states, *model.cls.parameters()]
    gradients = torch.autograd.grad(loss, inputs)
    if share:
        for gradient, other in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)
    else:
        assert not any(gradient.any() for gradient in gradients)
    assert not gradients[0][labels == -100].any() and all(gradient.isfinite().all() for gradient in gradients)


def test_the_number_of_mlm_logits_does_not_depend_on_the_labels():
    for share in (0, 0.1, 0.6):
        model, states, labels = mlm_example(share)
        with mock.patch.object(model, "lm_logits", wraps=model.lm_logits) as lm_logits:
            model.mlm_loss(states, labels)
        (masked_states,), _ = lm_logits.call_args
        assert len(masked_states) == max_masked_tokens(16 * 9) == 108               # 72 + 3 * 12


def test_text_only_loss_of_empty_texts_is_0():
    masked_ids, labels = mask_tokens(torch.tensor([[2, 0, 0, 0, 0, 0, 0]] * 3), 40, 4, seeded())
    assert (labels == -100).all() and (masked_ids[:, 0] == 2).all()
    assert bert()(masked_ids, labels)["mlm"].item() == 0
