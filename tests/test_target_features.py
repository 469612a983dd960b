"""What a mask compares (mask.features), at any budget; and that no more of the teacher runs than is needed."""

from unittest import mock

import pytest
import torch
from helpers.siglip import random_clips, tiny_siglip

from encoders import ViT, ViTConfig
from masking import MaskConfig, cluster_stm, group_dynamic, token_sizes
from targets import compute_targets, compute_visible_ids, needs_teacher


def student_vit():
    """A ViT for the patches of tiny_siglip, in fp64."""
    torch.manual_seed(1)
    return ViT(ViTConfig(patch_size=4, width=6, depth=1, heads=1)).double()


def features_by_hand(kind, teacher, vit, video):
    """What a mask with these features compares, from the pixels: (B, T, N, C)."""
    patches = video.double().unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 1, 3, 4, 2, 5, 6)       # (B, T, h, w, 3, 4, 4)
    if kind == "teacher_embedding":
        conv = teacher.vision_model.embeddings.patch_embedding
        return (patches / 255 - 0.5).flatten(4).flatten(2, 3) / 0.5 @ conv.weight.flatten(1).T + conv.bias
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (ViT.mean, ViT.std))
    return vit.patch_embed(((patches / 255 - mean) / std).flatten(4).flatten(2, 3))


@pytest.mark.parametrize("kind", ["teacher_embedding", "student_embedding"])
@pytest.mark.parametrize("total", [0, 1, 7, 17, 18])
def test_a_mask_compares_the_chosen_features_at_any_budget(kind, total):
    teacher, vit, batch = tiny_siglip(), student_vit(), random_clips(T=2)
    mask = MaskConfig("flux_group_dynamic", ratio=0.6, features=kind)
    expected = group_dynamic(features_by_hand(kind, teacher, vit, batch.video), total or 8)
    with mock.patch.object(teacher, "forward_features", wraps=teacher.forward_features) as forward:
        found = compute_visible_ids(teacher if kind == "teacher_embedding" else None, batch.video, mask, 0.6, 0, (3, 3),
                                    total=total, embed_patches=vit.embed_patches)
        assert not forward.called                               # neither needs the teacher's layers
    assert torch.equal(found.visible_ids, expected)
    if kind == "student_embedding":
        assert torch.equal(found.patch_embeds, vit.embed_patches(batch.video))
    targets = compute_targets(teacher, batch, mask, 0.6, total=total, embed_patches=vit.embed_patches)
    assert torch.equal(targets.visible_ids, expected) and targets.patch_embeds is None
    assert torch.equal(targets.token_targets, compute_targets(teacher, batch, cluster_stm, 0.6).token_targets)


def test_a_mask_of_shapes_needs_no_teacher_and_one_of_its_attention_no_other_features():
    video, ids = random_clips().video, []
    for teacher in (None, tiny_siglip()):
        ids.append(compute_visible_ids(teacher, video, MaskConfig("tube"), 0.6, 5, (3, 3), total=5).visible_ids)
    assert torch.equal(*ids) and ids[0].shape == (3, 5)
    for name in ("umt", "attention_high", "fastvid_style", "text_guided"):
        with pytest.raises(ValueError, match=f"features must be teacher .*{name}.*(attention|aligned).*student_emb"):
            MaskConfig(name, features="student_embedding")
    with pytest.raises(ValueError, match="total must be in 1 to 18.*got 19"):
        compute_visible_ids(None, video, MaskConfig("tube"), 0.6, 5, (3, 3), total=19)


@pytest.mark.parametrize("kind", ["teacher_embedding", "student_embedding"])
def test_sizes_are_those_of_the_features_that_are_compared(kind):
    teacher, vit, batch = tiny_siglip(), student_vit(), random_clips(T=2)
    mask, features = MaskConfig(ratio=0.6, features=kind), features_by_hand(kind, teacher, vit, batch.video)
    targets = compute_targets(teacher, batch, mask, 0.6, with_sizes=True, embed_patches=vit.embed_patches)
    found = compute_visible_ids(teacher, batch.video, mask, 0.6, 0, (3, 3), True, embed_patches=vit.embed_patches)
    for x in (targets, found):
        assert torch.equal(x.visible_ids, cluster_stm(features, 4))
        assert torch.equal(x.token_size, token_sizes(features, x.visible_ids))


@pytest.mark.parametrize("mask, options, runs", [
    (dict(name="random_frame"), {}, False), (dict(name="random_frame"), dict(with_sizes=True), True),
    (dict(features="teacher_embedding"), {}, False), (dict(features="student_embedding"), dict(with_sizes=True), False),
    (dict(name="umt"), {}, True), (dict(), {}, True), (dict(name="random_frame"), dict(with_tokens=True), True),
    (dict(features="student_embedding"), dict(with_tokens=True), True), (dict(name="text_guided"), {}, True)], ids=str)
def test_the_teachers_layers_run_only_if_something_reads_them(mask, options, runs):
    teacher, vit, batch = tiny_siglip(), student_vit(), random_clips(T=2)
    mask = MaskConfig(**mask)
    with mock.patch.object(teacher, "forward_features", wraps=teacher.forward_features) as forward:
        compute_targets(teacher, batch, mask, 0.6, embed_patches=vit.embed_patches,
                        **{"with_tokens": False, "with_texts": False, **options})
    assert forward.called is runs
    with_sizes = options.get("with_sizes", False)
    if not options.get("with_tokens") and mask.features != "teacher_embedding":
        assert needs_teacher(mask, with_sizes) is runs


def test_a_mask_of_shapes_embeds_nothing_though_its_features_are_the_students():
    embed, batch, mask = mock.Mock(side_effect=AssertionError), random_clips(), MaskConfig(
        "tube", ratio=0.6, features="student_embedding")
    found = compute_visible_ids(None, batch.video, mask, 0.6, batch.seed, (3, 3), embed_patches=embed)
    targets = compute_targets(tiny_siglip(), batch, mask, 0.6, embed_patches=embed)
    assert found.patch_embeds is None and torch.equal(found.visible_ids, targets.visible_ids)
