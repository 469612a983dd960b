"""The student against transformers, against loops in fp64 that state its formulas, and cut into micro-batches."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from test_teacher import hugging_face, shaken

from masking import sizes
from model import (
    Bert,
    BertConfig,
    Block,
    ClusterSTM,
    Decoder,
    ModelConfig,
    VideoToText,
    ViT,
    bert_config,
    corrupt,
    hard_negatives,
    sinusoids,
    stream,
    vtc_loss,
)
from teacher import Guide

CFG = ModelConfig(
    patch=4, width=16, depth=2, heads=2, drop_path=0.0, text_width=12, text_depth=3, text_heads=2, fusion=2,
    dropout=0.0, vocab=40, mask_id=4, text_length=7, embed=8, decoder_width=16, decoder_heads=2, decoder_share=0.4,
    target=10)
T, H, W = 2, 8, 12                                                                      # frames of 2 x 3 = 6 tokens
N, KEEP = 6, 2
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
FP32 = {"rtol": 2e-5, "atol": 2e-6}                                 # where the code itself computes in fp32
CPU = torch.device("cpu")
OBJECTIVES = {"relevance": "mrm", "visible": "align", "pixels": "pixels"}               # what their losses are called


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def student(**changes):
    model = shaken(ClusterSTM(replace(CFG, **changes)))
    model.temp.data.fill_(0.13)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_video(B, T=T, H=H, W=W, seed=0):
    return torch.randint(0, 256, (B, T, 3, H, W), generator=seeded(seed), dtype=torch.uint8)


def random_ids(M, L=7, vocab=40, seed=0):
    """[CLS] = 2, words from 5 up, texts of all lengths, [PAD] = 0."""
    ids = torch.randint(5, vocab, (M, L), generator=seeded(seed))
    ids[:, 0] = 2
    for m in range(M):
        ids[m, 3 + m % (L - 2):] = 0
    return ids


def random_keep(B, seed=0, T=T, N=N, K=KEEP):
    """K tokens of each frame."""
    ids = torch.rand(B, T, N, generator=seeded(seed)).argsort(-1)[..., :K].sort(-1).values
    return (ids + torch.arange(T)[:, None] * N).flatten(1)


def unit(*shape, seed=0):
    return nnf.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1)


def random_batch(B=4, seed=0, media=None):
    media = torch.arange(B) if media is None else torch.tensor(media)
    batch = SimpleNamespace(video=random_video(B, seed=seed), ids=random_ids(B, seed=seed), media=media, seed=seed + 5)
    told = Guide(random_keep(B, seed), unit(B, T, N, CFG.target, seed=seed), unit(B, CFG.target, seed=seed + 1))
    return batch, told


def cat(parts):
    """Micro-batches as one batch: what of it does not depend on its seed."""
    batches, guides = zip(*parts, strict=True)
    return (SimpleNamespace(**{k: torch.cat([getattr(b, k) for b in batches]) for k in ("video", "ids", "media")}),
            Guide(*(torch.cat([getattr(g, k) for g in guides]) for k in ("keep", "aligned", "text"))))


def masked(keep):
    """keep (B, S) -> (B, TN - S), the other ids, ascending."""
    return torch.stack([torch.tensor([i for i in range(T * N) if i not in kept]) for kept in keep.tolist()])


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(model.named_parameters(), found, strict=True)}


def check_same_gradients(a, b, tol=1e-5):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol * 0.1, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# ViT

def position(n, c, C, base=10000):
    """VideoMAE's table, get_sinusoid_encoding_table."""
    angle = n / base ** (2 * (c // 2) / C)
    return math.sin(angle) if c % 2 == 0 else math.cos(angle)


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def block_by_hand(block, x, context=None):
    """x (S, C), context (S', C) for cross-attention -> (S, C): one head at a time, exact GELU."""
    C, y = x.shape[-1], layer_norm(x, block.norm1)
    if context is None:
        q, k, v = (y @ block.qkv.weight.T + block.qkv.bias).split(C, -1)
    else:
        q = y @ block.q.weight.T + block.q.bias
        k, v = (layer_norm(context, block.norm_kv) @ block.kv.weight.T + block.kv.bias).split(C, -1)
    d = C // block.heads
    mixed = [(q[:, i:i + d] @ k[:, i:i + d].T / math.sqrt(d)).softmax(-1) @ v[:, i:i + d] for i in range(0, C, d)]
    x = x + torch.cat(mixed, -1) @ block.proj.weight.T + block.proj.bias
    z = layer_norm(x, block.norm2) @ block.fc1.weight.T + block.fc1.bias
    return x + (z * (1 + torch.erf(z / math.sqrt(2))) / 2) @ block.fc2.weight.T + block.fc2.bias


@pytest.mark.parametrize("size", [(1, 4, 4), (2, 8, 12), (3, 12, 4), (5, 4, 8)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "kept"])
def test_the_vit_is_umts(size, masked):
    vit, video = shaken(ViT(4, 16, 2, 2)), random_video(2, *size)
    grid = size[0], size[1] // 4, size[2] // 4
    count = math.prod(grid)
    keep = random_keep(2, T=1, N=count, K=max(1, count // 2)) if masked else None
    weight = vit.embed.weight.view(16, 3, 4, 4)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
                 for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        found = vit(video, keep)
        for b in range(2):
            frames = nnf.conv2d((video[b] / 255.0 - mean) / std, weight, vit.embed.bias, stride=4)      # (T, C, h, w)
            x = frames.permute(0, 2, 3, 1).reshape(count, 16)
            x = x + torch.tensor([[position(n, c, 16) for c in range(16)] for n in range(count)], dtype=torch.float64)
            x = x if keep is None else x[keep[b]]
            for block in vit.blocks:
                x = block_by_hand(block, x)
            torch.testing.assert_close(found[b], layer_norm(x, vit.norm), rtol=1e-6, atol=1e-6)


def test_keeping_all_tokens_is_keeping_none_back():
    vit, video = ViT(4, 16, 2, 2), random_video(2)
    assert torch.equal(vit(video), vit(video, torch.arange(T * N).expand(2, -1)))


@pytest.mark.parametrize("keep", [[[0, 3, 7, 8], [1, 2, 9, 11]], [[5, 6, 7, 10], [0, 1, 3, 8]]], ids=str)
def test_a_kept_token_counts_as_those_it_stands_for(keep, monkeypatch):
    """Where the hidden patches are copies of kept ones, and no place tells them apart: as if all had been looked at."""
    monkeypatch.setattr("model.sinusoids", lambda grid, C, *_: torch.zeros(math.prod(grid), C))
    model, keep = student(), torch.tensor(keep)
    patches = random_video(2).unflatten(3, (2, 4)).unflatten(5, (3, 4)).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3)
    count = torch.zeros(2, 4, dtype=torch.float64)
    for b, ids in enumerate(keep.tolist()):
        for i in range(T * N):
            own = [s for s, k in enumerate(ids) if k // N == i // N]
            s = ids.index(i) if i in ids else own[(i * i + b) % len(own)]
            count[b, s] += 1
            patches[b, i] = patches[b, ids[s]]
    assert torch.equal(count, sizes(patches.flatten(2).double().unflatten(1, (T, N)) - 128, keep)) and count.max() > 2
    video = patches.unflatten(1, (T, 2, 3)).permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    with torch.no_grad():
        (every, feature), (found, pooled) = model.encode_video(video), model.encode_video(video, keep, count)
        torch.testing.assert_close(found, every.gather(1, keep[..., None].expand_as(found)), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pooled, feature, rtol=1e-6, atol=1e-6)
        tokens, other = model.encode_video(video, keep)
        assert (tokens - found).abs().max() > 1e-3 and (other - pooled).abs().max() > 1e-3
        assert torch.equal(VideoToText.encode_video(model, video, keep, count)[0], found)


def test_tokens_that_stand_for_themselves_alone_change_nothing(monkeypatch):
    model, video, keep, biases = student(), random_video(2), random_keep(2), []
    monkeypatch.setattr("model.attend", lambda *qkv, attn_mask=None, real=nnf.scaled_dot_product_attention: (
        biases.append(attn_mask), real(*qkv, attn_mask=attn_mask))[1])
    with torch.no_grad():
        plain, sized = (model.encode_video(video, keep, size) for size in (None, torch.ones(2, T * KEEP)))
    for a, b in zip(plain, sized, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert biases[:2] == [None] * 2 and [b.shape for b in biases[2:]] == [(2, 1, 1, T * KEEP)] * 2


@pytest.mark.parametrize("positions", ["1d", "3d"])
def test_pixels_of_masked_tokens_cannot_be_seen(positions):
    vit, video, keep = ViT(4, 16, 2, 2, positions=positions), random_video(3), random_keep(3)
    seen = torch.zeros(3, T * N, dtype=torch.bool).scatter(1, keep, True).view(3, T, 2, 3)
    seen = seen.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, None].expand_as(video)
    other = torch.where(seen, video, random_video(3, seed=1))
    assert (other != video).any() and torch.equal(vit(video, keep), vit(other, keep))
    other = torch.where(seen, random_video(3, seed=1), video)
    assert not torch.isclose(vit(video, keep), vit(other, keep)).all(-1).any()              # but every kept one can


def test_positions_1d_are_videomaes():
    for C in (16, 10):
        expected = torch.tensor([[position(n, c, C) for c in range(C)] for n in range(3 * 2 * 4)])
        torch.testing.assert_close(sinusoids((3, 2, 4), C, "1d", CPU), expected)


@pytest.mark.parametrize("C", [16, 20, 30])
def test_positions_3d_mean_the_same_at_every_length_and_resolution(C):
    table = sinusoids((3, 4, 5), C, "3d", CPU).view(3, 4, 5, C)
    Ct, Ch = C // 4, (C - C // 4) // 2
    for channels, axes in ((slice(0, Ct), (1, 2)), (slice(Ct, Ct + Ch), (0, 2)), (slice(Ct + Ch, C), (0, 1))):
        part = table[..., channels]
        along = part[tuple(0 if a in axes else slice(None) for a in range(3))]
        width = along.shape[1]
        assert all(torch.equal(part, part.narrow(a, 0, 1).expand_as(part)) for a in axes)   # one axis only
        torch.testing.assert_close(along, torch.tensor([[position(n, c, width, 100) for c in range(width)]
                                                        for n in range(len(along))]))
    assert len(table.view(60, C).unique(dim=0)) == 60
    assert torch.equal(sinusoids((6, 7, 8), C, "3d", CPU).view(6, 7, 8, C)[:3, :4, :5], table)


def test_drop_path_drops_whole_clips_in_training_and_keeps_the_mean():
    assert [b.drop_path for b in ViT(4, 16, 3, 2, drop_path=0.2).blocks] == [0, 0.1, 0.2]
    block, x = Block(16, 2, drop_path=0.25), torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    y = block.drop(x)
    assert ((y == y[:, :1, :1]) & ((y == 0) | torch.isclose(y, torch.tensor(4 / 3)))).all()
    assert abs((y[:, 0, 0] == 0).float().mean() - 0.25) < 0.03
    assert torch.equal(block.eval().drop(x), x)


def test_frames_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match=r"^frames of 8 x 10 pixels do not divide into patches of 4$"):
        ViT(4, 16, 1, 2)(random_video(1, W=10))


# ---------------------------------------------------------------------------------------------------------------------
# BERT

def bert(**changes):
    cfg = BertConfig(**{**dict(vocab_size=40, hidden_size=12, num_hidden_layers=4, num_attention_heads=3,
                               intermediate_size=20, max_position_embeddings=9, fusion_layers=2, encoder_width=12),
                        **changes})
    return shaken(Bert(cfg))


def hf_bert(model, kind="BertForMaskedLM"):
    """transformers' BERT with the same weights, by name."""
    hf, c = hugging_face(), model.cfg
    config = hf.BertConfig(vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
                           num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size,
                           max_position_embeddings=c.max_position_embeddings, attn_implementation="sdpa")
    other = getattr(hf, kind)(config).double().eval()
    lacks = other.load_state_dict({k: v for k, v in model.state_dict().items() if "crossattention" not in k}, False)
    tied = {f"cls.predictions.decoder.{part}" for part in ("weight", "bias")}
    assert not lacks.unexpected_keys and set(lacks.missing_keys) <= tied or kind != "BertForMaskedLM"
    return other


def test_without_a_video_bert_is_transformers():
    model, ids = bert(), random_ids(6)
    other = hf_bert(model)
    with torch.no_grad():
        out = other(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
        states = model.text(ids)
        torch.testing.assert_close(states, out.hidden_states[2], **TIGHT)
        states = model.fuse(states, ids)
        torch.testing.assert_close(states, out.hidden_states[4], **TIGHT)
        torch.testing.assert_close(model.words(states), out.logits, **TIGHT)


def test_training_on_text_alone_has_transformers_loss():
    model, ids = bert(), random_ids(6)
    corrupted, labels = corrupt(ids, 40, 4, seeded())
    with torch.no_grad():
        expected = hf_bert(model)(corrupted, attention_mask=(ids != 0).long(), labels=labels).loss
        torch.testing.assert_close(model(corrupted, labels)["mlm"].double(), expected, **FP32)


def test_a_fusion_layer_is_transformers_layer_with_cross_attention():
    model, ids = bert(), random_ids(5)
    video, states = torch.randn(5, 8, 12, dtype=torch.float64), torch.randn(5, 7, 12, dtype=torch.float64)
    hf = hugging_face()
    layer = hf.models.bert.modeling_bert.BertLayer(hf.BertConfig(
        hidden_size=12, num_attention_heads=3, intermediate_size=20, is_decoder=True, add_cross_attention=True,
        attn_implementation="eager")).double().eval()
    mask = torch.zeros(5, 1, 1, 7, dtype=torch.float64).masked_fill((ids == 0)[:, None, None], -1e9)
    expected = states
    with torch.no_grad():
        for ours in model.bert.encoder.layer[2:]:
            layer.load_state_dict(ours.state_dict())
            expected = layer(expected, mask, encoder_hidden_states=video)
            expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(model.fuse(states, ids, video), expected, **TIGHT)


def test_several_texts_may_read_one_clip():
    model, ids = bert(encoder_width=16), random_ids(6)
    video, rows = torch.randn(3, 8, 16, dtype=torch.float64), torch.tensor([2, 0, 0, 1, 2, 2])
    states = model.text(ids)
    torch.testing.assert_close(model.fuse(states, ids, video, rows), model.fuse(states, ids, video[rows]), **TIGHT)
    assert not torch.isclose(model.fuse(states, ids, video, rows), model.fuse(states, ids, video[rows.flip(0)])).all()


def test_padding_changes_nothing():
    model, ids = bert(encoder_width=16), random_ids(6)
    video, short = torch.randn(6, 8, 16, dtype=torch.float64), ids[:1, :3]              # the first text has three words
    a, b = model.fuse(model.text(ids), ids, video), model.fuse(model.text(short), short, video[:1])
    torch.testing.assert_close(a[:1, :3], b, **TIGHT)


def test_the_first_layers_have_no_cross_attention():
    has = [hasattr(layer, "crossattention") for layer in bert().bert.encoder.layer]
    assert has == [False, False, True, True]


def test_a_saved_bert_comes_back_the_same(tmp_path):
    model = bert(encoder_width=16)
    model.save(tmp_path / "deep" / "folder")
    again = Bert.from_pretrained(tmp_path / "deep" / "folder").double()
    assert again.cfg == model.cfg
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_folder_of_transformers_is_read_and_gets_new_cross_attention(tmp_path, kind):
    model = bert()
    hf_bert(model, kind).save_pretrained(tmp_path)
    again = Bert.from_pretrained(tmp_path, fusion_layers=3, encoder_width=16).double()
    assert again.cfg == replace(model.cfg, fusion_layers=3, encoder_width=16)
    for name, a in again.state_dict().items():
        if "crossattention" not in name:
            assert torch.equal(a, model.state_dict()[name])
        elif name.endswith("query.weight"):
            assert 0.5 < a.std() / (0.02 * (768 / 12) ** 0.5) < 1.5          # BERT's 0.02 is of 768 channels
    assert again.bert.encoder.layer[1].crossattention.self.key.weight.shape == (12, 16)


def test_a_bert_that_is_not_there_and_too_long_a_text_are_refused_in_one_line(tmp_path):
    model = bert()
    for name in ("model.safetensors", "config.json"):
        model.save(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError) as error:
            Bert.from_pretrained(str(tmp_path))
        assert str(error.value) == f"{tmp_path} is no folder of a BERT: it has no {name}"
    with pytest.raises(ValueError, match=r"^this BERT takes 9 word pieces, got 10$"):
        model.text(torch.ones(1, 10, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Corrupted words

def test_half_of_the_words_are_chosen_of_which_80_10_10_percent_become_mask_another_word_or_stay():
    ids, vocab, mask = torch.randint(0, 5000, (500, 400), generator=seeded(1)), 5000, 103
    corrupted, labels = corrupt(ids, vocab, mask, seeded())
    word, chosen = ids > mask, labels != -100
    assert not (chosen & ~word).any() and torch.equal(corrupted[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen]) and (labels[~chosen] == -100).all()
    n = chosen.sum().item()
    masked, stayed = (corrupted == mask) & chosen, (corrupted == ids) & chosen
    other = corrupted[chosen & ~masked & ~stayed]
    for share, expected, of in ((n, 0.5, word.sum().item()), (masked.sum().item(), 0.8, n),
                                (len(other), 0.1, n), (stayed.sum().item(), 0.1, n)):
        assert abs(share / of - expected) < 4 * math.sqrt(expected * (1 - expected) / of)
    assert other.min() > mask and other.max() > 4980 and len(other.unique()) > 3500        # any word, no special token


def test_corruption_is_a_function_of_its_generator():
    ids = random_ids(9)
    a, b, c = (corrupt(ids, 40, 4, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])


# ---------------------------------------------------------------------------------------------------------------------
# Pooling

@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("sized", [False, True], ids=["alike", "sized"])
def test_a_video_is_the_mean_over_frames_of_unit_vectors_and_empty_frames_do_not_count(ragged, sized):
    model, video = student(), random_video(2, T=3)
    keep = torch.tensor([[0, 3, 5, 12], [1, 8, 9, 14]] if ragged else [[0, 3, 6, 7, 12, 17], [1, 5, 8, 9, 14, 15]])
    with torch.no_grad():
        size = torch.randint(1, 9, keep.shape, generator=seeded()).float() if sized else None
        tokens, found = model.encode_video(video, keep, size)
        torch.testing.assert_close(tokens, model.vit(video, keep, size), **TIGHT)
        n = torch.ones(keep.shape) if size is None else size
        for b in range(2):
            vectors = []
            for t in range(3):
                own = [s for s in range(keep.shape[1]) if keep[b, s] // N == t]
                if own:
                    mean = sum(n[b, s] * tokens[b, s] for s in own) / sum(n[b, s] for s in own)
                    x = model.vision_proj(layer_norm(mean, model.pool_norm))
                    vectors.append(x / x.norm())
            assert len(vectors) == (2 if ragged and b == 0 else 3)
            torch.testing.assert_close(found[b].double(), sum(vectors) / len(vectors), rtol=1e-6, atol=1e-6)


def test_an_unmasked_video_is_pooled_like_one_of_which_all_tokens_are_kept():
    model, video, every = student(), random_video(2), torch.arange(T * N).expand(2, -1)
    for a, b in zip(model.encode_video(video), model.encode_video(video, every), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_text_is_its_first_state_projected_to_unit_length():
    model, ids = student(), random_ids(3)
    states, found = model.encode_text(ids)
    torch.testing.assert_close(states, model.bert.text(ids), **TIGHT)
    x = states[:, 0] @ model.text_proj.weight.T + model.text_proj.bias
    torch.testing.assert_close(found.double(), x / x.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Decoder

@pytest.mark.parametrize("kind", ["cross", "joint"])
@pytest.mark.parametrize("positions", ["1d", "3d"])
@pytest.mark.parametrize("objective", ["relevance", "pixels"])
def test_the_decoder_is_what_it_says_one_clip_and_one_head_at_a_time(kind, positions, objective):
    decoder = shaken(Decoder(replace(CFG, decoder=kind, positions=positions, objective=objective)))
    visible, keep = torch.randn(3, 4, 16, dtype=torch.float64), random_keep(3)
    wanted = masked(keep)[:, torch.randperm(8)]
    table = sinusoids((T, 2, 3), 16, positions, CPU).double()
    with torch.no_grad():
        found = decoder(visible, keep, wanted, (T, 2, 3))
        for b in range(3):
            seen = visible[b] @ decoder.embed.weight.T + decoder.embed.bias + table[keep[b]]
            x = decoder.query + table[wanted[b]]
            if kind == "joint":
                x = torch.cat([x, seen])
            for block in decoder.blocks:
                x = block_by_hand(block, x, seen if kind == "cross" else None)
            x = layer_norm(x[:8], decoder.norm) @ decoder.proj.weight.T + decoder.proj.bias
            x = x if objective == "pixels" else x / x.norm(dim=1, keepdim=True)
            torch.testing.assert_close(found[b].double(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_only_queries_of_the_cross_decoder_do_not_see_one_another(kind):
    decoder = shaken(Decoder(replace(CFG, decoder=kind)))
    visible, keep = torch.randn(2, 4, 16, dtype=torch.float64), random_keep(2)
    wanted = masked(keep)
    a, b = decoder(visible, keep, wanted, (T, 2, 3)), decoder(visible, keep, wanted[:, [5, 2]], (T, 2, 3))
    assert torch.isclose(a[:, [5, 2]], b, atol=1e-6).all() == (kind == "cross")


@pytest.mark.parametrize("kind", ["cross", "joint"])
@pytest.mark.parametrize("share", [0.25, 0.4, 1.0, 0.01])
def test_the_wanted_tokens_are_masked_ones_none_twice_drawn_by_the_seed(kind, share):
    model, (batch, told) = student(decoder=kind, decoder_share=share), random_batch(6)
    wanted = model.wanted(batch, told)
    count = T * (N - KEEP)
    assert wanted.shape == (6, count if kind == "joint" else max(1, round(count * share)))
    for mine, kept in zip(wanted.tolist(), told.keep.tolist(), strict=True):
        assert len({*mine}) == len(mine) and not {*mine} & {*kept} and {*mine} <= {*range(T * N)}
    assert torch.equal(wanted, model.wanted(batch, told))
    batch.seed += 1
    assert not torch.equal(wanted, model.wanted(batch, told))


def test_every_masked_token_is_wanted_equally_often():
    model, (batch, told) = student(decoder_share=0.25), random_batch(1)
    seen = torch.zeros(T * N)
    for batch.seed in range(1200):
        seen[model.wanted(batch, told)[0]] += 1
    seen = seen[seen > 0]                                                               # 2 of 8 masked tokens a draw
    assert len(seen) == 8 and (seen / 1200 - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 1200)


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def vtc_by_hand(video, text, media, temp):
    """A double loop; video, text (B, E) in fp64."""
    B, loss = len(media), 0
    for rows, columns in ((video, text), (text, video)):
        for i in range(B):
            log_p = (columns @ rows[i] / temp).log_softmax(0)
            same = [j for j in range(B) if media[j] == media[i]]
            loss = loss - sum(log_p[j] for j in same) / len(same) / (2 * B)
    return loss


def cross_entropy(logits, label):
    return logits.double().exp().sum().log() - logits[label].double()


@pytest.mark.parametrize("media", [[0, 1, 2, 3, 4], [3, 5, 3, 7, 3], [1, 1, 1, 1, 1], [2, 9, 9, 2, 4]], ids=str)
def test_vtc_is_symmetric_infonce_where_clips_of_one_medium_share_the_target(media):
    video, text, temp = unit(5, 8) * 0.9, unit(5, 8, seed=1), torch.tensor(0.11)
    found = vtc_loss(video.float(), text.float(), torch.tensor(media), temp)
    torch.testing.assert_close(found.double(), vtc_by_hand(video.float().double(), text.float().double(), media,
                                                           temp.double()), **FP32)


def test_hard_negatives_are_of_another_medium_and_drawn_in_proportion_to_the_softmax():
    similarity = torch.randn(5, 5, generator=seeded()) * 1.5
    media, g, count, draws = torch.tensor([4, 7, 4, 1, 7]), seeded(1), torch.zeros(5, 5), 3000
    for _ in range(draws):
        column, valid = hard_negatives(similarity, media, g)
        assert valid.all()
        count[torch.arange(5), column] += 1
    other = media[:, None] != media[None]
    assert not count[~other].any()
    p = similarity.masked_fill(~other, -torch.inf).softmax(1)
    assert ((count / draws - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()


def test_hard_negatives_are_a_function_of_the_generator_and_there_may_be_none():
    similarity, media = torch.randn(4, 4) * 100, torch.tensor([2, 2, 2, 2])
    column, valid = hard_negatives(similarity, media, seeded())
    assert not valid.any() and column.min() >= 0 and column.max() < 4
    media = torch.tensor([0, 1, 2, 2])
    a, b = (hard_negatives(similarity * 0, media, seeded(3))[0] for _ in range(2))
    assert torch.equal(a, b)


def drawn_negatives(monkeypatch):
    """What `hard_negatives` is asked and answers from now on."""
    seen, honest = [], hard_negatives

    def spy(similarity, media, generator):
        seen.append((similarity, media, *honest(similarity, media, generator)))
        return seen[-1][2:]

    monkeypatch.setattr("model.hard_negatives", spy)
    return seen


@pytest.mark.parametrize("media", [[0, 1, 2, 3], [0, 0, 1, 1], [5, 5, 5, 5], [0]], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_vtm_tells_matching_pairs_from_a_hard_clip_and_a_hard_text_of_each(monkeypatch, media, masked):
    B, model = len(media), student()
    batch, told = random_batch(B, media=media)
    told = told if masked else None
    seen = drawn_negatives(monkeypatch)
    with torch.no_grad():
        losses = model(batch, told)
        tokens, video = model.encode_video(batch.video, told and told.keep)
        states, text = model.encode_text(batch.ids)
        similarity = video @ text.T / model.temp
        (to_clip, _, clip, _), (to_text, _, other, _) = seen
        torch.testing.assert_close(to_clip, similarity.T, rtol=1e-5, atol=1e-5)         # rows are texts, columns clips
        torch.testing.assert_close(to_text, similarity, rtol=1e-5, atol=1e-5)
        pairs = [(i, i, 1) for i in range(B)]                                           # text, clip, whether they match
        if len(set(media)) > 1:
            pairs += [(i, clip[i], 0) for i in range(B)] + [(other[i], i, 0) for i in range(B)]
            assert all(media[t] != media[c] for t, c, label in pairs if label == 0)
        each = [cross_entropy(model.match(states[t][None], batch.ids[t][None], tokens[c][None])[0], label)
                for t, c, label in pairs]
    torch.testing.assert_close(losses["vtm"].double(), sum(each) / len(each), **FP32)
    assert all(loss.isfinite() for loss in losses.values())


def test_vtm_without_a_negative_still_has_finite_gradients():
    for media in ([5, 5, 5], [0]):
        model, (batch, told) = student().train(), random_batch(len(media), media=media)
        sum(model(batch, told).values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_mlm_reads_the_matching_clip_and_predicts_each_masked_word():
    model, (batch, told) = student(), random_batch(5)
    with torch.no_grad():
        found, each = model(batch, told)["mlm"], []
        tokens, _ = model.encode_video(batch.video, told.keep)
        corrupted, labels = corrupt(batch.ids, 40, 4, stream(batch, 1))
        for b in range(5):
            ids = corrupted[b][None]
            logits = model.bert.words(model.bert.fuse(model.bert.text(ids), ids, tokens[b][None]))[0]
            each += [cross_entropy(logits[i], label) for i, label in enumerate(labels[b].tolist()) if label >= 0]
    assert len(each) > 3
    torch.testing.assert_close(found.double(), sum(each) / len(each), **FP32)


def test_a_batch_without_a_masked_word_has_no_mlm_and_is_finite():
    model, (batch, told) = student().train(), random_batch(3)
    batch.ids[:, 1:] = 0
    losses = model(batch, told)
    assert losses["mlm"] == 0 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def relevance_cost(a, b, texts, own, kind):
    """Squared difference of the relevances of vectors a, b (Q, E) of a clip: mean over texts, (Q,)."""
    if kind == "none":
        return (a - b).square().sum(1)
    texts = own[None] if kind == "own" else texts
    return torch.stack([sum((a[i] @ s - b[i] @ s) ** 2 for s in texts) / len(texts) for i in range(len(a))])


def mrm_by_hand(model, parts):
    """From the explicit tokens x texts matrix, over all micro-batches."""
    texts = torch.cat([told.text for _, told in parts])
    cost, norm = [], []
    for batch, told in parts:
        tokens, wanted = model.vit(batch.video, told.keep), model.wanted(batch, told)
        q = model.decoder(tokens, told.keep, wanted, model.vit.grid(batch.video)).double()
        for b in range(len(wanted)):
            p = told.aligned[b].flatten(0, 1)[wanted[b]]
            cost.append(relevance_cost(q[b], p, texts, told.text[b], model.cfg.relevance))
            norm.append(relevance_cost(p, p.mean(0).expand_as(p), texts, told.text[b], model.cfg.relevance))
    return torch.cat(cost).mean() / torch.cat(norm).mean()


@pytest.mark.parametrize("relevance", ["batch", "own", "none"])
@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_mrm_is_the_l2_of_the_tokens_x_texts_matrix_over_that_of_each_clips_mean(relevance, kind):
    model, part = student(relevance=relevance, decoder=kind), random_batch(4)
    with torch.no_grad():
        torch.testing.assert_close(model(*part)["mrm"].double(), mrm_by_hand(model, [part]), **FP32)


@pytest.mark.parametrize("relevance", ["batch", "own", "none"])
@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_mrm_is_1_for_each_clips_mean_and_0_for_the_truth(relevance, kind):
    model, (batch, told) = student(relevance=relevance, decoder=kind), random_batch(4)

    def said(f):
        def forward(visible, keep, wanted, grid):
            p = torch.stack([told.aligned[b].flatten(0, 1)[wanted[b]] for b in range(4)])
            return f(p).expand_as(p).float()
        model.decoder.forward = forward
        with torch.no_grad():
            return model(batch, told)["mrm"].item()

    assert said(lambda p: p.mean(1, keepdim=True)) == pytest.approx(1, abs=1e-6)
    assert said(lambda p: p) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("objective", ["relevance", "pixels"])
def test_a_guide_that_keeps_all_tokens_asks_for_no_mrm(objective):
    model, (batch, told) = student(objective=objective), random_batch(3)
    told.keep = torch.arange(T * N).expand(3, -1)
    losses = model(batch, told)
    assert [*losses] == ["vtc", "vtm", "mlm"] and all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_objective_stands_beside_vtc_vtm_and_mlm_and_none_where_there_are_no_targets(objective):
    model, (batch, told) = student(objective=objective), random_batch(3)
    rest = ["vtc", "vtm", "mlm"]
    assert [*model(batch, told)] == [OBJECTIVES[objective], *rest]
    assert [*model(batch, None)] == [*model(batch, Guide(told.keep))] == rest


def align_by_hand(model, parts):
    """UMT's, a visible token at a time: its place once more, linear, LayerNorm, 2 - 2 cos."""
    head, norm, cost = model.decoder.head, model.decoder.norm, []
    table = sinusoids((T, 2, 3), 16, model.cfg.positions, CPU).double()
    for batch, told in parts:
        for b, tokens in enumerate(model.vit(batch.video, told.keep)):
            for token, i in zip(tokens, told.keep[b].tolist(), strict=True):
                x = head.weight @ (token + table[i]) + head.bias
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
                p = told.aligned[b, i // N, i % N]
                cost.append(2 - 2 * (x @ p) / (x.norm() * p.norm()))
    return torch.stack(cost).mean()


def pixels_by_hand(model, parts):
    """MAE's, a pixel at a time."""
    mean, std, cost = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), []
    for batch, told in parts:
        wanted = model.wanted(batch, told)
        q = model.decoder(model.vit(batch.video, told.keep), told.keep, wanted, model.vit.grid(batch.video)).double()
        for b, video in enumerate(batch.video.double()):
            for said, i in zip(q[b], wanted[b].tolist(), strict=True):
                t, top, left = i // N, i % N // 3 * 4, i % 3 * 4
                x = [(video[t, c, top + y, left + x].item() / 255 - mean[c]) / std[c]
                     for c in range(3) for y in range(4) for x in range(4)]
                middle = sum(x) / 48
                spread = sum((v - middle) ** 2 for v in x) / 47
                cost += [(say - (v - middle) / math.sqrt(spread + 1e-6)) ** 2 for say, v in zip(said, x, strict=True)]
    return torch.stack(cost).mean()


@pytest.mark.parametrize("positions", ["1d", "3d"])
def test_align_is_umts_2_minus_2_cos_of_each_visible_token(positions):
    model, (batch, told) = student(objective="visible", positions=positions), random_batch(4)
    told.aligned = told.aligned * 1.1                               # what codes give back has not quite unit length
    with torch.no_grad():
        torch.testing.assert_close(model(batch, told)["align"].double(), align_by_hand(model, [(batch, told)]), **FP32)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_pixels_is_maes_squared_error_of_each_wanted_patch(kind):
    model, (batch, told) = student(objective="pixels", decoder=kind), random_batch(3)
    flat = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]              # their variance is near eps
    batch.video[:, 1, :, :4] = flat
    with torch.no_grad():
        torch.testing.assert_close(model(batch, told)["pixels"].double(), pixels_by_hand(model, [(batch, told)]),
                                   rtol=1e-4, atol=1e-5)


def test_pixels_are_those_of_the_patch_channel_row_and_column_in_their_order():
    model, (batch, told) = student(objective="pixels", decoder="joint"), random_batch(2)
    mean, std = (x.view(3, 16)[:, :1, None].float() for x in (model.vit.pixel_mean, model.vit.pixel_std))
    truth = nnf.unfold((batch.video.flatten(0, 1) / 255 - mean) / std, 4, stride=4).mT                  # (F, N, 48)
    truth = (truth - truth.mean(-1, keepdim=True)) / truth.std(-1, keepdim=True)
    truth = truth.view(2, T, 2, 3, 3, 4, 4)                         # clip, frame, patch's row and column, channel, y, x

    def cost(order):
        drawn = truth.permute(order).reshape(2, T * N, 48)
        model.decoder.forward = lambda visible, keep, wanted, grid: drawn[torch.arange(2)[:, None], wanted]
        with torch.no_grad():
            return model(batch, told)["pixels"].item()

    assert cost((0, 1, 2, 3, 4, 5, 6)) < 1e-6
    for order in ((1, 0, 2, 3, 4, 5, 6), (0, 1, 3, 2, 4, 5, 6), (0, 1, 2, 3, 4, 6, 5), (0, 1, 2, 3, 5, 6, 4)):
        assert cost(order) > 0.5


def test_pixels_want_nothing_of_the_teacher_but_what_is_kept():
    model, (batch, told) = student(objective="pixels"), random_batch(3)
    found = model(batch, told)["pixels"]
    assert torch.equal(found, model(batch, Guide(told.keep, told.aligned * torch.nan))["pixels"])


# ---------------------------------------------------------------------------------------------------------------------
# The batch in micro-batches

MEDIA = [[0, 1, 2, 3], [4, 1, 6, 7]]                                                    # one medium is in both parts


def two_parts():
    return [random_batch(4, seed=10 * i, media=media) for i, media in enumerate(MEDIA)]


def in_parts(model, parts, name):
    """A loss of each micro-batch, and the gradient of their mean, taken one by one as train.py does."""
    losses, mean = [], {}
    for part, whole in zip(parts, model.whole(*zip(*parts, strict=True)), strict=True):
        loss = model(*part, whole)[name]
        for key, gradient in gradients(loss / len(parts), model).items():
            mean[key] = mean.get(key, 0) + gradient
        losses.append(loss.detach().double())
    return torch.stack(losses), mean


def heavy(told, seed=0):
    """The guide of tokens that stand for one to eight."""
    return replace(told, size=torch.randint(1, 9, told.keep.shape, generator=seeded(seed)).float())


@pytest.mark.parametrize("masked, sized", [(True, False), (False, False), (True, True)])
def test_vtc_in_micro_batches_is_vtc_of_the_batch_and_so_is_its_gradient(masked, sized):
    model, parts = student().train(), two_parts()
    if sized:
        parts = [(batch, heavy(told, i)) for i, (batch, told) in enumerate(parts)]
    whole, guide = cat(parts)
    size = torch.cat([told.size for _, told in parts]) if sized else None
    each, found = in_parts(model, parts if masked else [(batch, None) for batch, _ in parts], "vtc")
    _, video = model.encode_video(whole.video, guide.keep if masked else None, size)
    _, text = model.encode_text(whole.ids)
    expected = vtc_by_hand(video.double(), text.double(), whole.media.tolist(), model.temp)
    torch.testing.assert_close(each, expected.detach().expand(2), **FP32)
    assert found["temp"] != 0 and found["vit.embed.weight"].any() and found["text_proj.weight"].any()
    check_same_gradients(found, gradients(expected, model))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_loss_hears_what_the_tokens_stand_for_in_bf16_too(objective):
    model, (batch, told) = student(objective=objective), random_batch(4)
    with torch.no_grad():
        plain, ones, found = (model(batch, g) for g in (told, replace(told, size=torch.ones(4, 4)), heavy(told)))
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            low, light = (model(batch, replace(g, aligned=g.aligned.float(), text=g.text.float()))
                          for g in (heavy(told), told))
    assert [*found] == [OBJECTIVES[objective], "vtc", "vtm", "mlm"]
    for name, loss in found.items():
        torch.testing.assert_close(ones[name], plain[name], rtol=1e-6, atol=0)
        assert abs(loss / plain[name] - 1) > 1e-4, name
        assert low[name] == pytest.approx(loss.item(), rel=0.03), name
    assert sum(abs(low[name] - light[name]) for name in low) > 0


def test_mlm_in_micro_batches_divides_by_the_masked_words_of_the_batch():
    model, parts = student().train(), two_parts()
    parts[1][0].ids[1:, 2:] = 0                                                         # far fewer words than the first
    each, found = in_parts(model, parts, "mlm")
    total, count = 0, []
    for batch, told in parts:
        corrupted, labels = corrupt(batch.ids, 40, 4, stream(batch, 1))
        states = model.bert.fuse(model.bert.text(corrupted), corrupted, model.vit(batch.video, told.keep))
        logits = model.bert.words(states[labels >= 0]).log_softmax(-1)
        total = total - sum(row[label] for row, label in zip(logits, labels[labels >= 0], strict=True))
        count.append(len(logits))
    assert count[0] > count[1] > 0
    torch.testing.assert_close(each.mean(), total.detach() / sum(count), **FP32)
    check_same_gradients(found, gradients(total / sum(count), model))


@pytest.mark.parametrize("relevance", ["batch", "own", "none"])
def test_mrm_in_micro_batches_has_the_texts_and_the_spread_of_the_batch(relevance):
    model, parts = student(relevance=relevance).train(), two_parts()
    aligned = parts[1][1].aligned
    parts[1][1].aligned = nnf.normalize(aligned[:, :, :1] + 0.3 * aligned, dim=-1)          # less spread than the first
    each, found = in_parts(model, parts, "mrm")
    expected = mrm_by_hand(model, parts)
    torch.testing.assert_close(each.mean(), expected.detach(), **FP32)
    check_same_gradients(found, gradients(expected, model))


@pytest.mark.parametrize("objective", ["visible", "pixels"])
def test_what_stands_in_mrms_place_is_the_batchs_in_micro_batches(objective):
    model, parts = student(objective=objective).train(), two_parts()
    each, found = in_parts(model, parts, OBJECTIVES[objective])
    expected = {"visible": align_by_hand, "pixels": pixels_by_hand}[objective](model, parts)
    assert each[0] != each[1] and found["vit.embed.weight"].any()
    torch.testing.assert_close(each.mean(), expected.detach(), **FP32)
    check_same_gradients(found, gradients(expected, model))


def test_vtm_in_micro_batches_draws_its_negatives_from_its_own():
    model, parts = student(), two_parts()
    each, found = in_parts(model, parts, "vtm")
    alone = []
    for part, loss in zip(parts, each, strict=True):
        alone.append(model(*part)["vtm"])
        torch.testing.assert_close(loss, alone[-1].detach().double())
    check_same_gradients(found, gradients(sum(alone) / 2, model))


def test_whole_holds_the_mean_over_the_batch_of_what_it_says():
    model, parts = student(), two_parts()
    batch, told = cat(parts)
    gram = sum(torch.outer(text, text) for text in told.text) / 8
    words = sum((corrupt(b.ids, 40, 4, stream(b, 1))[1] >= 0).sum() for b, _ in parts) / 2
    aimed = torch.cat([g.aligned[b].flatten(0, 1)[model.wanted(p, g)[b]][None] for p, g in parts for b in range(4)])
    away = aimed - aimed.mean(1, keepdim=True)
    variance = torch.einsum("bqe,ef,bqf->bq", away, gram, away).mean()
    for i, whole in enumerate(model.whole(*zip(*parts, strict=True))):
        assert (whole.scale, whole.index, whole.words) == (2, i, words)
        torch.testing.assert_close(whole.gram.double(), gram, **FP32)
        torch.testing.assert_close(whole.variance.double(), variance, **FP32)
        video, text, media = whole.others
        assert torch.equal(media, torch.tensor(MEDIA)) and not video.requires_grad and not text.requires_grad
        torch.testing.assert_close(video.flatten(0, 1), model.encode_video(batch.video, told.keep)[1].detach())
        torch.testing.assert_close(text.flatten(0, 1), model.encode_text(batch.ids)[1].detach())


def test_a_batch_of_one_micro_batch_needs_no_whole():
    model, part = student(), random_batch(4)
    a, b = model(*part), model(*part, *model.whole([part[0]], [part[1]]))
    assert [*a] == [*b] == ["mrm", "vtc", "vtm", "mlm"]
    for name in a:
        assert torch.equal(a[name], b[name])


def test_dropout_in_whole_is_that_of_the_forward_pass_that_follows():
    model, parts = student(dropout=0.3, drop_path=0.3).train(), two_parts()
    wholes = model.whole(*zip(*parts, strict=True))
    values = []
    for part, whole in zip(parts, wholes, strict=True):
        torch.manual_seed(part[0].seed)                                                 # as train.py
        values.append(model(*part, whole)["vtc"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)                              # of the same features
    torch.manual_seed(0)
    assert model(*parts[0], wholes[0])["vtc"].item() != pytest.approx(values[0], rel=1e-4)


def test_similarities_are_fp32_under_autocast():
    video, text, media, temp = unit(8, 16).float(), unit(8, 16, seed=1).float(), torch.arange(8), torch.tensor(0.02)
    with torch.autocast("cpu", torch.bfloat16):
        found = vtc_loss(video, text, media, temp)
    torch.testing.assert_close(found, vtc_loss(video, text, media, temp))


# ---------------------------------------------------------------------------------------------------------------------
# The whole student

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_learns(objective):
    model, part = student(objective=objective).train(), random_batch(4)
    sum(model(*part).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_guide_there_is_no_mrm_and_the_decoder_rests(objective):
    model, (batch, _) = student(objective=objective).train(), random_batch(4)
    losses = model(batch, None)
    assert [*losses] == ["vtc", "vtm", "mlm"]
    sum(losses.values()).backward()
    rest = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert rest == {name for name, _ in model.named_parameters() if name.startswith("decoder.")}


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
    model, part = ClusterSTM(replace(CFG, **changes)).train(), random_batch(4)
    optimizer, history = torch.optim.AdamW(model.parameters(), 5e-3), []
    for _ in range(21):
        losses = model(*part)
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values())
    assert all(history[-1][name] < history[0][name] for name in history[0] if name != "vtm")


def test_evaluation_in_inference_mode_leaves_training_possible():
    model, part = student().train(), random_batch(4)
    sinusoids.cache_clear()
    with torch.inference_mode():
        model(*part)
    sum(model(*part).values()).backward()
    assert all(p.grad is not None for p in model.vit.parameters())


def test_a_saved_student_comes_back_in_eval_mode_and_the_same(tmp_path):
    model, part = student().float(), random_batch(4)
    model.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(CFG), "lr": 1}))
    again = ClusterSTM.from_pretrained(str(tmp_path))
    assert again.cfg == CFG and not again.training
    a, b = model(*part), again(*part)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_student_starts_from_a_folder_but_for_what_its_config_calls_new(tmp_path):
    other, model = student(), student()
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    weights = {key: value for key, value in other.state_dict().items() if key.startswith("vit.")}
    config = {"model": {"heads": CFG.heads}, "new": sorted({key.split(".")[0] for key in drawn} - {"vit"})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    model.start_from(str(tmp_path))
    for key, value in model.state_dict().items():
        assert value.equal((weights if key in weights else drawn)[key]), key
    first = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != first}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{first} is not there, wanted "):
        model.start_from(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": {"heads": CFG.heads + 1}}))
    with pytest.raises(ValueError, match=f"config.json: model.heads is {CFG.heads + 1}, wanted {CFG.heads}"):
        model.start_from(str(tmp_path))


def test_weights_of_before_there_were_objectives_are_those_of_relevance(tmp_path):
    model = student().float()
    block = [f"{part}.{p}" for part in ("norm1", "norm_kv", "q", "kv", "proj", "norm2", "fc1", "fc2")
             for p in ("weight", "bias")]
    assert {key[8:] for key in model.state_dict() if key.startswith("decoder.")} == {
        "query", *(f"{part}.{p}" for part in ("embed", "norm", "proj") for p in ("weight", "bias")),
        *(f"blocks.{i}.{key}" for i in range(2) for key in block)}
    assert model.decoder.proj.weight.shape == (CFG.target, CFG.decoder_width)
    old = {key: value for key, value in asdict(CFG).items() if key != "objective"}
    model.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": old}))
    assert ClusterSTM.from_pretrained(str(tmp_path)).cfg == CFG
    student().start_from(str(tmp_path))


@pytest.mark.parametrize("objective", ["visible", "pixels"])
def test_a_student_starts_with_anothers_decoder_only_if_they_learned_the_same(tmp_path, objective):
    model, other = student(objective=objective, target=48), student(target=48)          # a patch has 48 pixels, too
    for wanted, there, told in ((model, other, asdict(other.cfg)), (other, model, asdict(model.cfg)),
                                (model, other, {k: v for k, v in asdict(other.cfg).items() if k != "objective"})):
        there.save(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model": told}))
        with pytest.raises(ValueError) as error:
            wanted.start_from(str(tmp_path))
        assert str(error.value) == (f"{tmp_path}/config.json: model.objective is {there.cfg.objective!r}, wanted "
                                    f"{wanted.cfg.objective!r}")
    mine = model.decoder.state_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(other.cfg), "new": ["decoder."]}))
    other.save(tmp_path)
    model.start_from(str(tmp_path))
    assert all(torch.equal(value, mine[key]) for key, value in model.decoder.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_of_any_objective_comes_back_and_can_be_fine_tuned(tmp_path, objective):
    model, part = student(objective=objective).float(), random_batch(4)
    model.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(model.cfg)}))
    again = ClusterSTM.from_pretrained(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model(*part).values(), again(*part).values(), strict=True))
    student(objective=objective).start_from(str(tmp_path))
    speaks = VideoToText.from_student(again, asks=True)
    assert torch.equal(speaks.vit.embed.weight, model.vit.embed.weight)


def test_a_folder_that_holds_no_student_is_refused_in_one_line(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        ClusterSTM.from_pretrained(folder)
    assert str(error.value) == f"{folder} is no folder of a trained model: it has no config.json"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError) as error:
        ClusterSTM.from_pretrained(folder)
    assert str(error.value) == f"{folder} is no folder of a trained model: it has no model.safetensors"
    student().save(folder)
    with pytest.raises(ValueError) as error:
        ClusterSTM.from_pretrained(folder)
    assert str(error.value) == f"{folder}/config.json has no 'model' part: no run of train.py wrote it"
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(replace(CFG, embed=9))}))
    with pytest.raises(ValueError, match=r"vision_proj[^\n]* is [^\n]*, wanted "):
        ClusterSTM.from_pretrained(folder)


@pytest.mark.parametrize("changes, line", [
    ({"width": 15}, "15 channels do not divide into 2 heads"),
    ({"text_width": 13}, "13 channels do not divide into 2 heads"),
    ({"decoder_width": 7}, "7 channels do not divide into 2 heads"),
    ({"positions": "2d"}, "positions wants to be one of 1d, 3d, is '2d'"),
    ({"decoder": "none"}, "decoder wants to be one of cross, joint, is 'none'"),
    ({"objective": "none"}, "objective wants to be one of relevance, visible, pixels, is 'none'"),
    ({"relevance": "all"}, "relevance wants to be one of batch, own, none, is 'all'"),
    ({"fusion": 3}, "of 3 text layers 1 to 2 can fuse, got 3"),
    ({"fusion": 0}, "of 3 text layers 1 to 2 can fuse, got 0"),
    ({"decoder_share": 0}, "decoder_share is in (0, 1], got 0"),
], ids=str)
def test_a_config_that_makes_no_sense_is_refused_in_one_line(changes, line):
    with pytest.raises(ValueError) as error:
        replace(CFG, **changes)
    assert str(error.value) == line


def test_a_student_wants_to_know_its_words_and_its_targets():
    for name in ("vocab", "mask_id", "target"):
        with pytest.raises(ValueError, match=r"^a model wants vocab, mask_id and target, got "):
            ClusterSTM(replace(CFG, **{name: 0}))


def test_a_given_text_encoder_is_used_and_must_fit():
    text = Bert(bert_config(CFG))
    assert isinstance(ClusterSTM(CFG).bert, Bert) and ClusterSTM(CFG, text).bert is text
    with pytest.raises(ValueError, match=r"^the text encoder is BertConfig.* the config wants BertConfig"):
        ClusterSTM(CFG, Bert(bert_config(replace(CFG, fusion=1))))
