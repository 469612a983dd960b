"""SigLIP against transformers' and a MAP head run on one window at a time; what the student is told of a batch."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from masking import MASKS, cluster_stm, keep_count
from teacher import SigLIP, SigLIPConfig, TextConfig, VisionConfig, choose, guide, patches, sigmoid_loss

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


def siglip(text_width=16, act="gelu_pytorch_tanh", seed=0):
    """Frames of 12 x 12 pixels, patches of 4, E = 16."""
    torch.manual_seed(seed)
    vision = VisionConfig(16, 24, 2, 2, image_size=12, patch_size=4, hidden_act=act)
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
    with pytest.raises(ValueError, match=r"^align pools by 'map' or 'mean', got 'max'$"):
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


def test_captions_are_padded_and_cut_to_the_models_length():
    ids = siglip().tokenize(["a red square", "a blue circle moves left right left", "a green"])
    assert ids.tolist() == [[2, 3, 5, 0, 0, 0], [2, 4, 6, 7, 8, 9], [2, 1, 0, 0, 0, 0]]


def test_padding_is_the_configs_whatever_the_tokenizer_says():
    model = siglip()
    model.cfg.text_config.pad_token_id = 1
    model.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    assert model.tokenize(["a red"]).tolist() == [[2, 3, 1, 1, 1, 1]]


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
        "config.json", "model.safetensors", "tokenizer.json"]


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
    assert str(error.value) == f"{tmp_path}/config.json: model_type wants to be 'siglip', is {kind!r}"


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    siglip().save(tmp_path / "a")
    siglip(20).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"text_model[^\n]* is \(10, 20\), wanted \(10, 16\)$"):
        SigLIP.from_pretrained(tmp_path / "a")


def test_frames_of_another_size_too_long_texts_and_a_missing_tokenizer_are_refused_in_one_line():
    model = siglip()
    with pytest.raises(ValueError, match=r"^this SigLIP takes frames of 12x12 pixels, got 8x12$"):
        model.encode_image(torch.zeros(1, 3, 8, 12).double())
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


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_of_a_batch_is_a_function_of_its_seed(name):
    model, batch = siglip(), random_batch()
    a, b = (guide(model, batch, MASKS[name], 0.6).keep for _ in range(2))
    assert torch.equal(a, b)
    batch.seed += 1
    assert torch.equal(guide(model, batch, MASKS[name], 0.6).keep, a) == (name == "cluster_stm")


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
    for mask in MASKS.values():
        assert torch.equal(choose(model, tokens, mask, 0.6, batch.seed), guide(model, batch, mask, 0.6).keep)
