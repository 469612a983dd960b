"""SigLIP against transformers' and a MAP head run on one window at a time; what the student is told of a batch."""

import json
import math
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from masking import MASKS, NEEDS, cluster_stm, keep_count, sizes
from teacher import (
    PixelConfig,
    SigLIP,
    SigLIPConfig,
    TextConfig,
    VisionConfig,
    choose,
    guide,
    kept,
    patches,
    resized,
    sigmoid_loss,
)

WORDS = "[PAD] [UNK] a red blue square circle moves left right".split()
GRIDS = [(3, 3), (2, 5), (5, 2), (1, 4), (4, 1), (1, 1)]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def hugging_face():
    """transformers, told that Hugging Face's package `kernels` is not installed: ours has its name and comes first."""
    known = pytest.importorskip("transformers.utils.import_utils")
    known.is_kernels_available = lambda *_, **__: False
    return pytest.importorskip("transformers")


def shaken(model, seed=0):
    """Every parameter moved, so that no bias is 0 and no LayerNorm the identity; fp64, eval."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model.double().eval()


def words():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def siglip(text_width=16, act="gelu_pytorch_tanh", seed=0, size=12, patch=4):
    """Frames of 12 x 12 pixels, patches of 4, E = 16."""
    torch.manual_seed(seed)
    vision = VisionConfig(16, 24, 2, 2, image_size=size, patch_size=patch, hidden_act=act)
    text = TextConfig(text_width, 20, 2, 4, len(WORDS), max_position_embeddings=6, pad_token_id=0, hidden_act=act)
    return shaken(SigLIP(SigLIPConfig(vision, text), words()), seed)


def to_hugging_face(model):
    """transformers' SigLIP with the same weights, by name and strictly."""
    hf, c = hugging_face(), model.cfg
    text = {**vars(c.text_config), "projection_size": c.vision_config.hidden_size}
    config = hf.SiglipConfig(text_config=text, vision_config=vars(c.vision_config), attn_implementation="sdpa")
    other = hf.SiglipModel(config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def random_batch(seed=0, B=3, T=2):
    g = torch.Generator().manual_seed(seed)
    captions = [" ".join(WORDS[i] for i in torch.randint(2, 10, (1 + b,), generator=g)) for b in range(B)]
    return SimpleNamespace(video=torch.randint(0, 256, (B, T, 3, 12, 12), generator=g, dtype=torch.uint8),
                           captions=captions, seed=11)


def random_tokens(F, grid, seed=0, C=16):
    return torch.randn(F, grid[0] * grid[1], C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def map_head(head, x):
    """The MAP head on tokens x (S, C) and nothing else, by PyTorch's own attention -> (E,), its weights (S,)."""
    C = x.shape[-1]
    mha = nn.MultiheadAttention(C, head.attention.heads, batch_first=True).to(x.dtype)
    mha.load_state_dict(head.attention.state_dict())
    y, weights = mha(head.probe, x[None], x[None], average_attn_weights=True)
    return (y + head.mlp(head.layernorm(y)))[0, 0], weights[0, 0]


def windows(x, grid):
    """tokens x (N, C) -> for each token those of its 3 x 3 neighbourhood, (<= 9, C)."""
    h, w = grid
    x = x.view(h, w, -1)
    for i in range(h):
        for j in range(w):
            yield x[max(0, i - 1):i + 2, max(0, j - 1):j + 2].reshape(-1, x.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers

@pytest.mark.parametrize("text_width", [16, 20], ids=str)
@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "relu"])
def test_both_towers_are_those_of_transformers(text_width, act):
    model = siglip(text_width, act)
    other, g = to_hugging_face(model), torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 12, 12, generator=g, dtype=torch.float64)
    ids = torch.randint(0, len(WORDS), (4, 6), generator=g)
    with torch.no_grad():
        seen, read = other.vision_model(pixels), other.text_model(ids)
        tokens, pooled = model.encode_image(pixels)
        text = model.encode_text(ids)
        logits = other(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(tokens, seen.last_hidden_state, **TIGHT)
    torch.testing.assert_close(pooled, nnf.normalize(seen.pooler_output, dim=-1), **TIGHT)
    torch.testing.assert_close(text, nnf.normalize(read.pooler_output, dim=-1), **TIGHT)
    torch.testing.assert_close(model.logit_scale.exp() * pooled @ text.T + model.logit_bias, logits, **TIGHT)


@pytest.mark.parametrize("size, patch, frames", [
    (42, 14, (42, 42)), (48, 16, (48, 48)),         # their own
    (40, 14, (40, 40)), (58, 16, (58, 58)),         # a remainder is cut off
    (40, 14, (41, 55)), (28, 14, (70, 42)),         # other sizes: the table is interpolated
    (48, 16, (48, 80)), (48, 16, (37, 16)), (48, 16, (54, 50)), (48, 16, (16, 144)),
], ids=str)
def test_frames_of_any_size_are_seen_as_transformers_sees_them(size, patch, frames):
    model = siglip(size=size, patch=patch).float()
    other = to_hugging_face(model).float()
    pixels = torch.randn(2, 3, *frames, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = other.vision_model(pixels, interpolate_pos_encoding=frames != (size, size))
        tokens, pooled = model.encode_image(pixels)
    h, w = model.grid_of(pixels)
    assert tokens.shape == (2, h * w, 16) and (h, w) == (frames[0] // patch, frames[1] // patch)
    torch.testing.assert_close(tokens, seen.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, nnf.normalize(seen.pooler_output, dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [(12, 12), (16, 20)], ids=str)
def test_in_bf16_the_towers_are_as_close_to_the_truth_as_those_of_transformers(frames):
    model, g = siglip(), torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 3, *frames, generator=g).bfloat16()
    ids = torch.randint(0, len(WORDS), (16, 6), generator=g)

    def outputs(one, low):
        one = one.bfloat16() if low else one
        with torch.no_grad():
            if one is model:
                return [*model.encode_image(pixels.to(model.logit_bias.dtype)), model.encode_text(ids)]
            seen = one.vision_model(pixels, interpolate_pos_encoding=True)
            return [seen.last_hidden_state, *(nnf.normalize(x, dim=-1) for x in
                                              (seen.pooler_output, one.text_model(ids).pooler_output))]

    other = to_hugging_face(model.bfloat16().double()).bfloat16()
    truth, theirs, ours = outputs(model, False), outputs(other, True), outputs(model, True)
    for t, a, b in zip(truth, theirs, ours, strict=True):
        assert b.dtype == torch.bfloat16
        assert (b.double() - t).square().mean() <= 1.5 * (a.double() - t).square().mean()
        assert (b.double() - t).abs().max() <= 0.03 * t.abs().max()


def test_a_shorter_text_ends_at_its_own_last_token():
    model, ids = siglip(), torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        expected = to_hugging_face(model).text_model(ids).pooler_output
        torch.testing.assert_close(model.encode_text(ids), nnf.normalize(expected, dim=-1), **TIGHT)


@pytest.mark.parametrize("text_width", [16, 20], ids=str)
def test_transformers_reads_the_folder_that_save_writes_and_computes_the_same(tmp_path, text_width):
    model = siglip(text_width)
    model.save(tmp_path)
    other = hugging_face().SiglipModel.from_pretrained(tmp_path).double().eval()
    batch = random_batch()
    pixels, ids = model.pixels(batch.video[:, 0]), model.tokenize(batch.captions)
    with torch.no_grad():
        out = other(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(model.encode_image(pixels)[1], out.image_embeds, **TIGHT)
        torch.testing.assert_close(model.encode_text(ids), out.text_embeds, **TIGHT)


def test_a_folder_that_transformers_writes_is_read(tmp_path):
    model = siglip(20)
    to_hugging_face(model).save_pretrained(tmp_path)
    again = SigLIP.from_pretrained(tmp_path, torch.float64)
    assert again.tokenizer is None and again.cfg == model.cfg
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())


def test_attend_is_the_mean_over_heads_of_the_map_heads_attention():
    model, x = siglip(), random_tokens(4, (3, 3))
    with torch.no_grad():
        expected = torch.stack([map_head(model.vision_model.head, frame)[1] for frame in x])
        found = model.attend(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(4))


# ---------------------------------------------------------------------------------------------------------------------
# Pooling

@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_align_runs_the_map_head_on_each_window_alone(grid):
    model, x = siglip(), random_tokens(2, grid)
    head = model.vision_model.head
    with torch.no_grad():
        expected = torch.stack([torch.stack([map_head(head, window)[0] for window in windows(frame, grid)])
                                for frame in x])
        found = model.align(x, grid)
    torch.testing.assert_close(found, nnf.normalize(expected, dim=-1), **TIGHT)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(x.shape[:2], dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_align_by_mean_runs_the_map_head_on_each_windows_mean(grid):
    model, x = siglip(), random_tokens(2, grid)
    head = model.vision_model.head
    with torch.no_grad():
        expected = torch.stack([torch.stack([map_head(head, window.mean(0, keepdim=True))[0]
                                             for window in windows(frame, grid)]) for frame in x])
        found = model.align(x, grid, "mean")
    torch.testing.assert_close(found, nnf.normalize(expected, dim=-1), **TIGHT)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_align_by_token_runs_the_map_head_on_each_token_alone(grid):
    model, x = siglip(), random_tokens(2, grid)
    with torch.no_grad():
        expected = torch.stack([torch.stack([map_head(model.vision_model.head, token[None])[0] for token in frame])
                                for frame in x])
        found = model.align(x, grid, "token")
        one = model.align(x.reshape(-1, 1, 16), (1, 1), "map").view_as(x)               # frames of one token
    torch.testing.assert_close(found, nnf.normalize(expected, dim=-1), **TIGHT)
    torch.testing.assert_close(found, one, **TIGHT)


def test_a_window_whose_scores_are_far_below_the_frames_best_does_not_underflow():
    model, grid = siglip(), (6, 7)
    x = random_tokens(2, grid) * 200
    head = model.vision_model.head
    with torch.no_grad():
        expected = torch.stack([torch.stack([map_head(head, window)[0] for window in windows(frame, grid)])
                                for frame in x])
        score = head.attention.scores(head.probe[0, 0], x).transpose(1, 2)                  # (F, H, N)
        best = nnf.max_pool2d(score.view(2, 2, *grid), 3, 1, 1).flatten(2)                  # of each window
        assert (score.max(-1, keepdim=True).values - best > 150).any()                      # exp(-150) is 0 in fp32
        found = model.float().align(x.float(), grid)
    torch.testing.assert_close(found.double(), nnf.normalize(expected, dim=-1), rtol=0, atol=1e-3)


def test_a_window_of_the_whole_frame_is_the_pooled_frame():
    model = siglip()
    with torch.no_grad():
        tokens, pooled = model.encode_image(model.pixels(random_batch().video[:, 0]))
        torch.testing.assert_close(model.align(tokens, (3, 3))[:, 4], pooled, **TIGHT)


def test_align_refuses_a_grid_that_the_tokens_do_not_fill_and_an_unknown_pooling():
    model, x = siglip(), random_tokens(1, (3, 3))
    with pytest.raises(ValueError, match=r"^9 tokens a frame are no 2 x 4 grid$"):
        model.align(x, (2, 4))
    with pytest.raises(ValueError, match=r"^align pools by 'map', 'mean' or 'token', got 'max'$"):
        model.align(x, (3, 3), "max")


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and words

def test_patches_are_in_raster_order_and_flatten_like_a_convolutions_weight():
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    expected = nnf.conv2d(pixels, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(pixels, 2) @ weight.flatten(1).T, expected, **TIGHT)
    with pytest.raises(ValueError, match=r"^frames of 6 x 8 pixels do not divide into patches of 4$"):
        patches(pixels, 4)


def test_pixels_go_from_minus_one_to_one_and_the_frames_stay_as_they_were():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(siglip().pixels(frames).flatten(), torch.tensor([-1, -0.6, 1], dtype=torch.float64))
    assert frames.flatten().tolist() == [0, 51, 255]
    frames = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(siglip().bfloat16().pixels(frames), siglip().float().pixels(frames).bfloat16())  # rounded once


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(9, 31), (7, 11), (30, 90), (20, 28), (50, 13), (24, 24)], ids=str)
def test_an_image_becomes_the_pixels_that_the_processor_makes_of_it(tmp_path, resample, shape):
    hf, model = hugging_face(), siglip()
    pytest.importorskip("PIL")
    model.cfg.pixels = PixelConfig((0.48, 0.45, 0.4), (0.27, 0.26, 0.28), resample=resample, size=(20, 28))
    model.float().save(tmp_path)
    again = SigLIP.from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    processor = hf.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil.from_pretrained(tmp_path)
    g = torch.Generator().manual_seed(0)        # noise, flat fields that meet at an edge
    images = torch.randint(0, 256, (3, 3, *shape), generator=g, dtype=torch.uint8)
    images[1:] = (images[1:] > 127) * 255
    images[2] = 255 * (torch.arange(shape[1]) > shape[1] // 2)
    # Where Pillow 13 goes down first, values clipped between the passes differ; here none are.
    images = images // 2 + 64 if shape[0] > 20 and shape[1] < 30 else images
    expected = torch.from_numpy(np.stack(processor([x.permute(1, 2, 0).numpy() for x in images]).pixel_values))
    found = again.preprocess(images)
    levels = (found - expected).abs() * torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1) * 255
    assert found.dtype == torch.float32 and found.shape == expected.shape == (3, 3, 20, 28)
    assert levels.max() < 1.01
    assert torch.equal(again.preprocess(images[:1]), found[:1])


def test_frames_are_resized_to_the_patches_of_a_grid():
    model, g = siglip(), torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 2, 3, 12, 12), generator=g, dtype=torch.uint8)
    before = frames.clone()
    assert torch.equal(model.pixels(frames, (3, 3)), model.pixels(frames))      # theirs already
    found = model.pixels(frames, (2, 5))
    assert found.shape == (2, 2, 3, 8, 20) and model.grid_of(found) == (2, 5) and torch.equal(frames, before)
    assert torch.equal(found, model.pixels(resized(frames, (8, 20), "bicubic").to(torch.uint8)))
    # 14 pixels hold 3 patches of 4 as well, but not the patches of the student: it has 14 / 3 pixels in each.
    wider = nnf.pad(frames.flatten(0, 1).float(), (0, 2, 0, 2)).to(torch.uint8)
    assert model.pixels(wider, (3, 3)).shape[-2:] == (12, 12)
    grey = torch.full((1, 3, 7, 9), 77, dtype=torch.uint8)
    assert torch.equal(model.pixels(grey, (4, 2)), model.pixels(grey[..., :1, :1]).expand(1, 3, 16, 8))


def test_captions_are_padded_and_cut_to_the_models_length():
    ids = siglip().tokenize(["a red square", "a blue circle moves left right left", "a green"])
    assert ids.tolist() == [[2, 3, 5, 0, 0, 0], [2, 4, 6, 7, 8, 9], [2, 1, 0, 0, 0, 0]]


def test_padding_is_the_configs_whatever_the_tokenizer_says():
    model = siglip()
    model.cfg.text_config.pad_token_id = 1
    model.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    assert model.tokenize(["a red"]).tolist() == [[2, 3, 1, 1, 1, 1]]


def test_the_tokenizer_that_it_was_given_is_left_alone():
    tokenizer = words()
    model = SigLIP(siglip().cfg, tokenizer)
    assert model.tokenize(["a red square"]).shape == (1, 6)
    assert tokenizer.padding is None and tokenizer.truncation is None and tokenizer.encode("a red").ids == [2, 3]


# SigLIP's and SigLIP 2's tokenizers in small. The captions have what either is asked to remove.
PIECES = "<unk> </s> ▁a ▁red ▁dog ▁ a b d e g o r s it ▁it ς σ é ▁café , . ' ! < > /".split()
CAPTIONS = ["a red dog", " A  RED,\tdog!! ", "it's a dog.", "", "...", "É a \u2581 b\n", "ΟΔΟΣ ΣΟ Σ", "it " * 40,
            "zebra 7"]


def folder_of(tmp_path, tokenizer, options, vocab=None):
    """A small SigLIP's folder with this tokenizer.json, and this tokenizer_config.json where there is one."""
    model = siglip().float()
    vocab, length = vocab or tokenizer.get_vocab_size(), 16
    text = TextConfig(16, 20, 2, 4, vocab, max_position_embeddings=length)
    SigLIP(SigLIPConfig(model.cfg.vision_config, text)).save(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if options is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    return tmp_path


def unigram(pieces=PIECES):
    tokenizer = Tokenizer(models.Unigram([(p, -float(len(pieces) - len(p))) for p in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


@pytest.mark.parametrize("options", [None, {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True,
                                            "pad_token": {"content": "</s>"}}], ids=["none", "given"])
def test_captions_of_siglip_lose_case_and_punctuation_and_end_in_the_padding(tmp_path, options):
    tokenizer = unigram()
    model = SigLIP.from_pretrained(folder_of(tmp_path, tokenizer, options))
    bare = ["a red dog", "a red dog", "its a dog", "", "", "é a b", "οδος σο σ", "it " * 40, "zebra 7"]
    for row, caption in zip(model.tokenize(CAPTIONS).tolist(), bare, strict=True):
        ids = tokenizer.encode(caption.strip()).ids[:15]
        assert row == ids + [1] * (16 - len(ids))
    again = SigLIP.from_pretrained(save(model, tmp_path / "again"))
    assert torch.equal(again.tokenize(CAPTIONS), model.tokenize(CAPTIONS)) and again.cfg == model.cfg
    again = SigLIP.from_pretrained(save(again, tmp_path / "third"))
    assert again.tokenizer.to_str() == model.tokenizer.to_str()


def save(model, folder):
    model.save(folder)
    return folder


def test_captions_keep_their_case_where_the_checkpoint_says_so(tmp_path):
    model = SigLIP.from_pretrained(folder_of(tmp_path, unigram([*PIECES, "▁A"]), {"do_lower_case": False}))
    assert model.tokenize(["A, a"])[0, :3].tolist() == [len(PIECES), 2, 1]
    again = SigLIP.from_pretrained(save(model, tmp_path / "again"))
    assert torch.equal(again.tokenize(CAPTIONS), model.tokenize(CAPTIONS))


def test_ids_are_those_of_siglips_tokenizer(tmp_path):
    pytest.importorskip("google.protobuf")
    sentencepiece, hf = pytest.importorskip("sentencepiece"), hugging_face()
    corpus = [f"a {c} {o} moves {w}" for c in ("red", "blue", "green") for o in ("dog", "it", "its", "café", "square")
              for w in ("left", "right", "up", "ός")] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=60, hard_vocab_limit=False,
        unk_id=2, eos_id=1, bos_id=-1, pad_id=-1, minloglevel=2)
    slow = hf.SiglipTokenizer(str(tmp_path / "spiece.model"))
    fast = hf.convert_slow_tokenizer.SpmConverter(slow).converted()
    model = SigLIP.from_pretrained(folder_of(tmp_path, fast, {"do_lower_case": True}))
    for caption in [*CAPTIONS, "A BLUE Square; moves? (right)", "ﬁne ½ café", "日本語 a dog", "a\u00a0red"]:
        expected = slow(caption, padding="max_length", max_length=16, truncation=True).input_ids
        assert model.tokenize([caption]).tolist() == [expected], caption


def gemma(hf, kind):
    """transformers' tokenizer of SigLIP 2, or Gemma's as SigLIP 2's folders have it, with bytes to fall back on."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)),
             *"▁ a A b d e g o r s i t , . ! ' é σ red re ▁red ▁dog do dog ▁a it".split()]
    merges = [("r", "e"), ("re", "d"), ("▁", "red"), ("d", "o"), ("do", "g"), ("▁", "dog"), ("▁", "a"), ("i", "t")]
    return getattr(hf, kind)(vocab={v: i for i, v in enumerate(vocab)}, merges=merges, add_bos_token=False,
                             add_eos_token=True, padding_side="right")


@pytest.mark.parametrize("kind", ["Siglip2Tokenizer", "GemmaTokenizer"])
@pytest.mark.parametrize("options", [True, False], ids=["config", "alone"])
def test_ids_are_those_of_siglip_2s_tokenizer(tmp_path, kind, options):
    hf = hugging_face()
    if not hasattr(hf, "Siglip2Tokenizer"):
        pytest.skip("transformers has no Siglip2Tokenizer before 5.1")
    theirs = gemma(hf, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    model = SigLIP.from_pretrained(folder_of(tmp_path, tokenizer, saved if options else None))
    lowered = gemma(hf, "Siglip2Tokenizer")         # the one that lower-cases, as the model was trained
    expected = lowered(CAPTIONS, padding="max_length", max_length=16, truncation=True).input_ids
    assert model.tokenize(CAPTIONS).tolist() == expected
    assert expected[0][-1] == 0 and 1 in expected[0] and model.cfg.text_config.pad_token_id == 0
    model.save(tmp_path / "again")
    again = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert again(CAPTIONS, padding="max_length", max_length=16, truncation=True).input_ids == expected


def test_another_kind_of_tokenizer_is_taken_as_it_is(tmp_path):
    tokenizer = words()
    tokenizer.normalizer = normalizers.Prepend("a ")
    model = SigLIP.from_pretrained(folder_of(tmp_path, tokenizer, {"do_lower_case": True, "pad_token": "[PAD]"}))
    assert model.tokenize(["RED, red"])[0].tolist() == [2, 1, 1, 3] + [0] * 12


# ---------------------------------------------------------------------------------------------------------------------
# Training

def test_the_sigmoid_loss_is_a_sum_over_all_pairs():
    g = torch.Generator().manual_seed(0)
    image, text = (nnf.normalize(torch.randn(5, 8, generator=g), dim=-1) for _ in range(2))
    ids = torch.tensor([0, 1, 0, 2, 3])
    scale, bias = torch.tensor([1.7]), torch.tensor([-2.5])
    expected = 0
    for i in range(5):
        for j in range(5):
            logit = math.exp(scale.item()) * (image[i].double() @ text[j].double()).item() + bias.item()
            expected -= math.log(1 / (1 + math.exp(-logit if ids[i] == ids[j] else logit))) / 5
    found = sigmoid_loss(image, text, ids[:, None] == ids[None], scale, bias)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_training_pairs_frames_with_all_captions_of_the_same_words_and_reaches_every_parameter():
    model, batch = siglip().float(), random_batch(B=3)
    ids = model.tokenize([batch.captions[0], batch.captions[1], batch.captions[0]])
    loss = model(batch.video[:, 0], ids)["sigmoid"]
    image, text = model.encode_image(batch.video[:, 0] / 127.5 - 1)[1], model.encode_text(ids)
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    torch.testing.assert_close(loss, sigmoid_loss(image, text, same, model.logit_scale, model.logit_bias))
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def test_a_saved_teacher_comes_back_frozen_in_eval_mode_and_the_same(tmp_path):
    model, batch = siglip().float().train(), random_batch()
    model.save(tmp_path / "deep" / "folder")
    again = SigLIP.from_pretrained(tmp_path / "deep" / "folder")
    assert again.cfg == model.cfg and not again.training and not any(p.requires_grad for p in again.parameters())
    pixels, ids = model.pixels(batch.video[:, 0]), model.tokenize(batch.captions)
    assert torch.equal(again.tokenize(batch.captions), ids)
    with torch.no_grad():
        for a, b in zip(model.encode_image(pixels), again.encode_image(pixels), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(model.encode_text(ids), again.encode_text(ids))
    half = SigLIP.from_pretrained(tmp_path / "deep" / "folder", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_checkpoint_in_shards_is_read(tmp_path):
    model = siglip(20)
    to_hugging_face(model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    again = SigLIP.from_pretrained(tmp_path, torch.float64)
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError) as error:
        SigLIP.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path} is no folder of a SigLIP: it has no {gone.name}"
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^\S+/model.safetensors.index.json: weight_map wants to be [^\n]*, is None$"):
        SigLIP.from_pretrained(tmp_path)


def test_what_a_config_leaves_out_is_the_published_default(tmp_path):
    hf, model = hugging_face(), siglip()
    for ours, theirs in ((VisionConfig(), hf.SiglipVisionConfig()), (TextConfig(), hf.SiglipTextConfig())):
        assert all(getattr(theirs, f.name) == getattr(ours, f.name) for f in fields(ours))
    model.save(tmp_path)
    config, expected = json.loads((tmp_path / "config.json").read_text()), SigLIP.from_pretrained(tmp_path).cfg
    for part, default in (("vision_config", VisionConfig()), ("text_config", TextConfig())):
        config[part] = {k: v for k, v in config[part].items() if v != getattr(default, k, None)}
        assert "layer_norm_eps" not in config[part] and "hidden_act" not in config[part]
        config[part] |= {"model_type": "siglip", "layer_norm_eps": None, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").unlink()
    assert SigLIP.from_pretrained(tmp_path).cfg == expected
    assert expected.pixels == PixelConfig(size=(12, 12))


def test_the_position_ids_of_old_checkpoints_are_passed_over(tmp_path):
    model = siglip()
    model.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    weights["text_model.embeddings.position_ids"] = torch.arange(6)[None]
    save_file(weights, tmp_path / "model.safetensors")
    again = SigLIP.from_pretrained(tmp_path, torch.float64)
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())


def rewrite(path, **changes):
    """A JSON file with these fields changed, deep in its parts; ... takes one away."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        where = values[part] if part else values
        where[name] = value
        if value is ...:
            del where[name]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("file, changes, line", [
    ("config.json", {"model_type": ...}, r"model_type wants to be 'siglip', is None"),
    ("config.json", {"vision_config": [1]}, r"vision_config wants to be an object, is \[1\]"),
    ("config.json", {"vision_config__hidden_act": "swish"}, r"vision_config.hidden_act wants .* or .*, is 'swish'"),
    ("config.json", {"vision_config__vision_use_head": False}, r"vision_config.vision_use_head .* True, is False"),
    ("config.json", {"vision_config__num_channels": 1}, r"vision_config.num_channels wants to be 3, is 1"),
    ("config.json", {"vision_config__image_size": [12, 12]}, r"vision_config.image_size .* type int, is \[12, 12\]"),
    ("config.json", {"text_config__num_attention_heads": 3}, r"text_config.hidden_size .*attention_heads, 3, is 16"),
    ("config.json", {"text_config__vocab_size": 9}, r"tokenizer.json: its largest id .*vocab_size, 9, of config.json, "
                                                    r"is 9"),
    ("config.json", {"text_config__vocab_size": 11}, r"text_model.embeddings.token_embedding.weight is \(10, 16\), "
                                                     r"wanted \(11, 16\)"),
    ("config.json", {"vision_config__image_size": 16}, r"vision_model.embeddings.position_embedding.weight is "
                                                       r"\(9, 16\), wanted \(16, 16\)"),
    ("config.json", {"vision_config__patch_size": ...}, r"vision_model.embeddings.[^ ]* is .*, wanted .*"),
    ("preprocessor_config.json", {"resample": 1}, r"resample wants to be .*bicubic.*, is 1"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 9}}, r"size wants to be .*, is {'shortest_edge': 9}"),
    ("preprocessor_config.json", {"image_std": [1, 1]}, r"image_std wants to be 3 numbers, is \[1, 1\]"),
    ("preprocessor_config.json", {"do_normalize": False}, r"do_normalize wants to be true, is False"),
    ("tokenizer_config.json", {"pad_token": 5}, r"pad_token wants to be .*, is 5"),
    ("tokenizer.json", {"model": 5}, r"tokenizer.json is no tokenizer: .*"),
], ids=str)
def test_a_field_that_cannot_be_is_refused_in_one_line_that_names_it(tmp_path, file, changes, line):
    siglip().save(tmp_path)
    rewrite(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=rf"^{tmp_path}[^\n]*{line}$") as error:
        SigLIP.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and (file in str(error.value) or "model*.safetensors" in str(error.value))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
                                  "tokenizer_config.json"])
def test_a_file_cut_short_is_refused_in_one_line_that_names_it(tmp_path, name):
    siglip().save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for part in (whole[:len(whole) // 2], b"[]", b"\xff\xfe", b""):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}[^\n]*$") as error:
            SigLIP.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


def test_a_weight_too_few_or_too_many_is_refused_by_name(tmp_path):
    siglip().save(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "vision_model.head.probe"}, path)
    with pytest.raises(ValueError, match=r"^[^\n]*: vision_model.head.probe is not there, wanted \(1, 1, 16\)$"):
        SigLIP.from_pretrained(tmp_path)
    save_file({**weights, "vision_model.embeddings.class_embedding": torch.zeros(16)}, path)
    with pytest.raises(ValueError, match=r"^[^\n]*: \S+class_embedding is \(16,\), wanted no such weight$"):
        SigLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["google/siglip-base-patch16-224", "owner/no--such", "nowhere/at/all"])
def test_a_hub_id_that_cannot_be_had_is_refused_with_what_would_fetch_it(tmp_path, monkeypatch, name):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        SigLIP.from_pretrained(name)
    line = str(error.value)
    assert line.startswith(f"{name} is no folder of a SigLIP: ") and "\n" not in line
    if name.count("/") == 1:
        assert f"{tmp_path}/{name} or" in line and line.endswith(f"hf download {name} --local-dir {name}")


def test_a_hub_id_is_read_from_where_the_hub_put_it(tmp_path, monkeypatch):
    import huggingface_hub
    model = siglip()
    model.save(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    again = SigLIP.from_pretrained("google/siglip-base-patch16-224", torch.float64)
    assert asked == ["google/siglip-base-patch16-224"]
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused_by_name(tmp_path, name):
    siglip().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        SigLIP.from_pretrained(str(tmp_path))
    assert str(error.value) == f"{tmp_path} is no folder of a SigLIP: it has no {name}"


@pytest.mark.parametrize("kind", ["siglip2", "clip", None])
def test_another_kind_of_model_is_refused_by_name(tmp_path, kind):
    siglip().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(ValueError) as error:
        SigLIP.from_pretrained(str(tmp_path))
    line = str(error.value).replace(", as all SigLIP 2 but the NaFlex ones have it", "" if kind == "siglip2" else "?")
    assert line == f"{tmp_path}/config.json: model_type wants to be 'siglip', is {kind!r}"


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    siglip().save(tmp_path / "a")
    siglip(20).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"text_model[^\n]* is \(10, 20\), wanted \(10, 16\)$"):
        SigLIP.from_pretrained(tmp_path / "a")


def test_frames_too_small_too_long_texts_and_a_missing_tokenizer_are_refused_in_one_line():
    model = siglip()
    with pytest.raises(ValueError, match=r"^frames of 3 x 12 pixels hold no patch of 4$"):
        model.encode_image(torch.zeros(1, 3, 3, 12).double())
    with pytest.raises(ValueError, match=r"^this SigLIP takes 6 text tokens, got 7$"):
        model.encode_text(torch.zeros(1, 7, dtype=torch.int64))
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"^this SigLIP has no tokenizer: its folder wants a tokenizer.json$"):
        model.tokenize(["a"])


# ---------------------------------------------------------------------------------------------------------------------
# What the student is told

def test_the_guide_is_what_the_teacher_says_of_each_frame_and_caption():
    model, batch = siglip(), random_batch()
    told = guide(model, batch, cluster_stm, 0.6)
    assert told.keep.shape == (3, 2 * 4) and told.aligned.shape == (3, 2, 9, 16) and told.text.shape == (3, 16)
    with torch.no_grad():
        for b in range(3):
            for t in range(2):
                tokens, _ = model.encode_image(model.pixels(batch.video[b, t][None]))
                torch.testing.assert_close(told.aligned[b, t], model.align(tokens, (3, 3))[0], **TIGHT)
            torch.testing.assert_close(told.text[b], model.encode_text(model.tokenize([batch.captions[b]]))[0], **TIGHT)
        tokens = torch.stack([model.encode_image(model.pixels(clip))[0] for clip in batch.video])
    assert torch.equal(told.keep, cluster_stm(tokens, 4))
    with torch.no_grad():
        by_mean = model.align(tokens.flatten(0, 1), (3, 3), "mean").view(3, 2, 9, 16)
    torch.testing.assert_close(guide(model, batch, cluster_stm, 0.6, "mean").aligned, by_mean, **TIGHT)
    assert not (told.keep.is_floating_point() or told.aligned.requires_grad or told.text.requires_grad)


@pytest.mark.parametrize("grid", [(2, 5), (4, 4), (1, 1)], ids=str)
def test_the_guide_speaks_of_the_students_patches(grid):
    model, batch, seen = siglip(), random_batch(), {}

    def mask(tokens, keep, **aux):
        seen.update(aux, tokens=tokens)
        return cluster_stm(tokens, keep)

    told, N = guide(model, batch, mask, 0.6, grid=grid), grid[0] * grid[1]
    assert told.aligned.shape == (3, 2, N, 16) and told.keep.shape == (3, 2 * keep_count(N, 0.6))
    assert seen["grid"] == grid and seen["attention"].shape == (3, 2, N)
    with torch.no_grad():
        frames = resized(batch.video, (4 * grid[0], 4 * grid[1]), "bicubic").flatten(0, 1)
        tokens = model.encode_image(frames.double() / 127.5 - 1)[0]
        torch.testing.assert_close(told.aligned.flatten(0, 1), model.align(tokens, grid), **TIGHT)
    torch.testing.assert_close(seen["tokens"].flatten(0, 1), tokens, **TIGHT)
    assert torch.equal(choose(model, tokens.unflatten(0, (3, 2)), mask, 0.6, 11, grid), told.keep)


def test_the_teachers_own_grid_changes_nothing_and_another_size_of_frames_has_another():
    model, batch = siglip(), random_batch()
    a, b = guide(model, batch, cluster_stm, 0.6), guide(model, batch, cluster_stm, 0.6, grid=(3, 3))
    assert torch.equal(a.keep, b.keep) and torch.equal(a.aligned, b.aligned)
    batch.video = batch.video[..., :8, :]
    assert guide(model, batch, cluster_stm, 0.6).aligned.shape == (3, 2, 6, 16)


def test_a_mask_is_offered_all_that_it_may_ask_for():
    model, batch, seen = siglip(), random_batch(), {}

    def mask(tokens, keep, **aux):
        seen.update(aux, tokens=tokens, count=keep)
        return "kept"

    told = guide(model, batch, mask, 0.6)
    assert told.keep == "kept" and seen["count"] == keep_count(9, 0.6) and seen["grid"] == (3, 3)
    assert seen["text"] is told.text and seen["aligned"] is told.aligned and seen["generator"].initial_seed() == 11
    expected = model.attend(seen["tokens"].flatten(0, 1)).view(3, 2, 9).detach()
    assert torch.equal(seen["attention"], expected)


@pytest.mark.parametrize("mask", [cluster_stm, MASKS["evs"]])
def test_a_guide_says_how_many_tokens_each_kept_one_stands_for_in_fp32(mask):
    model, batch = siglip(size=64), random_batch()
    batch.video = torch.randint(0, 256, (3, 2, 3, 64, 64), generator=torch.Generator().manual_seed(1)).byte()
    tokens = model.tokens(model.pixels(batch.video.flatten(0, 1))).unflatten(0, (3, 2)).detach()
    told, seen = (guide(model, batch, mask, 0.8, sized=sized) for sized in (True, False))
    assert seen.size is None and torch.equal(told.keep, seen.keep) and torch.equal(told.aligned, seen.aligned)
    assert torch.equal(told.size, sizes(tokens, told.keep)) and told.size.max() > 4
    for bf16 in (False, True):                                              # as a step is on a GPU
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            asked = (guide(model, batch, mask, 0.8, sized=True),
                     kept(model, batch.video, mask, 0.8, 11, (16, 16), True))
        assert all(torch.equal(x.keep, told.keep) and torch.equal(x.size, told.size) for x in asked)
    plain = kept(model, batch.video, mask, 0.8, 11, (16, 16))
    assert torch.equal(plain.keep, told.keep) and plain.size is plain.aligned is plain.text is None


@pytest.mark.parametrize("name", [name for name in MASKS if "logits" not in NEEDS[name]])       # no teacher has such
def test_the_mask_of_a_batch_is_a_function_of_its_seed(name):
    model, batch = siglip(), random_batch()
    a, b = (guide(model, batch, MASKS[name], 0.6).keep for _ in range(2))
    assert torch.equal(a, b)
    batch.seed += 1
    drawn = "generator" in NEEDS[name] and name != "everest"        # it keeps more than it draws from
    assert torch.equal(guide(model, batch, MASKS[name], 0.6).keep, a) != drawn


def test_a_clips_mask_and_targets_do_not_depend_on_the_rest_of_the_batch():
    model, batch = siglip(), random_batch(B=3)
    alone = [SimpleNamespace(video=batch.video[b:b + 1], captions=batch.captions[b:b + 1], seed=b) for b in range(3)]
    told = guide(model, batch, cluster_stm, 0.6)
    for b, one in enumerate(alone):
        other = guide(model, one, cluster_stm, 0.6)
        assert torch.equal(other.keep[0], told.keep[b])
        torch.testing.assert_close(other.aligned[0], told.aligned[b], **TIGHT)
        torch.testing.assert_close(other.text[0], told.text[b], **TIGHT)


def test_stored_tokens_choose_as_the_guide_does():
    model, batch = siglip(), random_batch()
    with torch.no_grad():
        tokens = model.encode_image(model.pixels(batch.video.flatten(0, 1)))[0].view(3, 2, 9, 16)
    for name, mask in MASKS.items():
        if not NEEDS[name] & {"logits", "text"}:
            assert torch.equal(choose(model, tokens, mask, 0.6, batch.seed), guide(model, batch, mask, 0.6).keep), name
