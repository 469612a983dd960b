"""The toy teacher: SigLIP's loss against its definition, and the frames and captions that it is trained on."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from helpers.siglip import WORDS, random_clips, tiny_siglip, word_tokenizer

from tools.toy_teacher import SigLIPTrainer, ToyConfig, build_toy_teacher, sample_single_frames, sigmoid_loss


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
    loss = sigmoid_loss(image, text, ids[:, None] == ids[None], scale, bias)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_are_pairs_and_every_parameter_gets_a_gradient():
    model, batch = tiny_siglip().float(), random_clips(B=3)
    ids = model.tokenize([batch.captions[0], batch.captions[1], batch.captions[0]])
    loss = SigLIPTrainer(model)(batch.video[:, 0], ids)["sigmoid"]
    image, text = model.encode_image(batch.video[:, 0] / 127.5 - 1)[1], model.encode_text(ids)
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    torch.testing.assert_close(loss, sigmoid_loss(image, text, same, model.logit_scale, model.logit_bias))
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def numbered_batch(first_sample, size, T=4):
    """Clips whose frames are equal to sample number * T + frame number; every third has no caption of single frames."""
    numbers = range(first_sample, first_sample + size)
    values = torch.tensor([[n * T + t for t in range(T)] for n in numbers], dtype=torch.uint8)
    return SimpleNamespace(video=values[..., None, None, None].expand(size, T, 3, 2, 2), first_sample=first_sample,
                           captions=[WORDS[2 + n % 4] for n in numbers],
                           frame_captions=["" if n % 3 == 0 else WORDS[6 + n % 4] for n in numbers])


def test_each_clip_gives_one_frame_and_one_of_its_captions():
    siglip, batch, T = tiny_siglip(), numbered_batch(0, 60), 4
    frames, ids = sample_single_frames(siglip, [batch], 0.4, seed=5)[0]
    assert frames.shape == (60, 3, 2, 2) and ids.shape == (60, 6)
    words, chosen = [WORDS[i] for i in ids[:, 0]], frames[:, 0, 0, 0].tolist()
    assert [value // T for value in chosen] == list(range(60)) and {value % T for value in chosen} == set(range(T))
    from_frames = [word == frame_caption for word, frame_caption in zip(words, batch.frame_captions, strict=True)]
    assert all(word in pair for word, *pair in zip(words, batch.captions, batch.frame_captions, strict=True))
    assert 0.2 < np.mean([taken for taken, caption in zip(from_frames, batch.frame_captions, strict=True) if caption]
                         ) < 0.6
    for probability, words in ((0.0, batch.captions), (1.0, [f or c for f, c in zip(
            batch.frame_captions, batch.captions, strict=True)])):
        _, ids = sample_single_frames(siglip, [batch], probability, seed=5)[0]
        assert [WORDS[i] for i in ids[:, 0]] == words


def test_frames_and_captions_are_functions_of_seed_and_sample():
    siglip = tiny_siglip()
    (frames, ids), = sample_single_frames(siglip, [numbered_batch(0, 12)], 0.5, seed=5)
    parts = sample_single_frames(siglip, [numbered_batch(0, 6), numbered_batch(6, 6)], 0.5, seed=5)
    assert torch.equal(torch.cat([f for f, _ in parts]), frames) and torch.equal(torch.cat([i for _, i in parts]), ids)
    (other, _), = sample_single_frames(siglip, [numbered_batch(0, 12)], 0.5, seed=6)
    assert not torch.equal(other, frames)


def test_the_toy_teacher_has_the_students_patches_and_no_mixing_at_first():
    cfg = SimpleNamespace(toy=ToyConfig(width=16, depth=2, text_depth=1, heads=2), seed=3,
                          data=SimpleNamespace(image_size=24), vit=SimpleNamespace(patch_size=4),
                          text=SimpleNamespace(max_length=7))
    siglip = build_toy_teacher(cfg, word_tokenizer())
    again = build_toy_teacher(cfg, word_tokenizer())
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in siglip.state_dict().items())
    assert siglip.patch_grid == (6, 6) and siglip.tokenize(["a red"]).tolist() == [[2, 3, 0, 0, 0, 0, 0]]
    for part, depth in ((siglip.vision_model, 2), (siglip.text_model, 1)):
        assert len(part.encoder.layers) == depth
    assert not any(layer.self_attn.out_proj.weight.any() for layer in siglip.vision_model.encoder.layers)
