"""Position embeddings against loops in fp64, torch's interpolation and its gradients."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as nnf
from helpers.models import VIT, random_video, seeded

import positions
from encoders import ViT
from loop import parameter_groups
from positions import interpolate_pos_embed, interpolation_matrix, sincos_pos_embed

CPU = torch.device("cpu")
REFERENCE = (8, 6, 10)
SIZE = (24, 18, 18)                                         # of the table
GRIDS = [*product(range(4, 25, 2), range(12, 19), range(12, 19)),
         (1, 1, 1), (1, 18, 18), (24, 1, 18), (23, 17, 5), (7, 3, 2), (24, 18, 17), (23, 18, 18)]


def sinusoids(coordinates, C):
    """Channels of a token at coordinates (t, i, j), one at a time."""
    row = []
    for x, width in zip(coordinates, (C // 4, (C - C // 4) // 2, C - C // 4 - (C - C // 4) // 2), strict=True):
        for c in range(width):
            angle = x / 100 ** (2 * (c // 2) / width)
            row.append(math.sin(angle) if c % 2 == 0 else math.cos(angle))
    return row


def interpolate(table, grid):
    """torch's interpolation of a table (T', h', w', C): linear in t, then bicubic in h and w -> (Thw, C)."""
    x = table.permute(1, 2, 3, 0)                                                           # (h', w', C, T')
    x = nnf.interpolate(x.flatten(0, 1), size=grid[0], mode="linear", align_corners=False).unflatten(0, x.shape[:2])
    x = nnf.interpolate(x.permute(3, 2, 0, 1), size=grid[1:], mode="bicubic", align_corners=False)  # (T, C, h, w)
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def random_table(size=SIZE, C=3, dtype=torch.float64):
    return torch.randn(*size, C, generator=seeded(), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sinusoids

@pytest.mark.parametrize("kind", ["relative", "learned"])
@pytest.mark.parametrize("grid", [REFERENCE, (1, 1, 1), (7, 13, 3)], ids=str)
@pytest.mark.parametrize("C", [16, 30])
def test_relative_positions_of_the_reference_grid_are_3d_positions(kind, grid, C):
    assert torch.equal(sincos_pos_embed(grid, C, kind, CPU, grid), sincos_pos_embed(grid, C, "3d", CPU))


@pytest.mark.parametrize("grid", [(4, 3, 5), (16, 12, 20), (1, 7, 9), (13, 1, 4), (8, 6, 11)], ids=str)
@pytest.mark.parametrize("C", [16, 30])
def test_relative_positions_are_sinusoids_at_coordinates_of_the_reference_grid(grid, C):
    expected = [sinusoids([(i + 0.5) * n_ref / n - 0.5 for i, n, n_ref in zip(index, grid, REFERENCE, strict=True)], C)
                for index in product(*map(range, grid))]
    table = sincos_pos_embed(grid, C, "relative", CPU, REFERENCE)
    torch.testing.assert_close(table.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("axis", range(3))
def test_half_as_many_frames_or_patches_lie_midway(axis):
    """The direction midway between two points of a circle is that of their sum."""
    full = sincos_pos_embed(REFERENCE, 32, "relative", CPU, REFERENCE).view(*REFERENCE, 16, 2).movedim(axis, 0)
    grid = tuple(n // 2 if a == axis else n for a, n in enumerate(REFERENCE))
    half = sincos_pos_embed(grid, 32, "relative", CPU, REFERENCE).view(*grid, 16, 2).movedim(axis, 0)
    torch.testing.assert_close(half, nnf.normalize(full[0::2] + full[1::2], dim=-1))


def test_tables_of_many_grids_stay_cached(monkeypatch):
    copies = []
    monkeypatch.setattr(positions, "to_device", lambda x, device: copies.append(x.shape) or x)
    sincos_pos_embed.cache_clear()
    interpolation_matrix.cache_clear()
    grids = [(T, n, n) for T in range(8, 26, 2) for n in range(2, 8)]
    tables = [[sincos_pos_embed(grid, C, "relative", CPU, SIZE) for grid in grids for C in (4, 6)] for _ in range(2)]
    assert all(a is b for a, b in zip(*tables, strict=True)) and len(copies) == 2 * len(grids)
    copies.clear()
    for grid in 2 * [(4, 12, 12), (6, 12, 13)]:
        interpolate_pos_embed(random_table(), grid)
    assert copies == [(24, 4), (18, 12), (24, 6), (18, 13)]                     # h and w share their matrices
    sincos_pos_embed.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The learned table

@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_a_table_is_interpolated_as_torch_does(dtype, atol):
    table = random_table(dtype=dtype)
    for grid in GRIDS:
        torch.testing.assert_close(interpolate_pos_embed(table, grid).double(), interpolate(table.double(), grid),
                                   rtol=0, atol=atol, msg=lambda m, grid=grid: f"{grid}: {m}")


@pytest.mark.parametrize("grid", [(4, 12, 13), (23, 18, 18), (24, 17, 18), (5, 1, 18), (24, 18, 18)], ids=str)
def test_the_gradient_of_a_table_is_that_of_torchs_interpolation(grid):
    table = random_table().requires_grad_()
    weight = torch.randn(math.prod(grid), 3, generator=seeded(1), dtype=torch.float64)
    found, expected = (torch.autograd.grad((f(table, grid) * weight).sum(), table)[0]
                       for f in (interpolate_pos_embed, interpolate))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_table_is_unchanged_at_its_own_grid():
    table = random_table(dtype=torch.float32)
    x = interpolate_pos_embed(table, SIZE)
    assert torch.equal(x, table.flatten(0, 2)) and x.data_ptr() == table.data_ptr()


def test_a_table_is_interpolated_in_fp32_under_autocast():
    table = random_table(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = interpolate_pos_embed(table, (5, 13, 12))
    assert torch.equal(x, interpolate_pos_embed(table, (5, 13, 12)))


@pytest.mark.parametrize("grid", [(25, 18, 18), (24, 19, 18), (1, 1, 20)], ids=str)
def test_a_grid_beyond_the_table_is_refused(grid):
    with pytest.raises(ValueError, match=rf"at most \(24, 18, 18\).*got \({', '.join(map(str, grid))}\)$"):
        interpolate_pos_embed(random_table(), grid)


# ---------------------------------------------------------------------------------------------------------------------
# In the ViT

def learned_vit(grid=(4, 3, 4), **changes):
    return ViT(replace(VIT, pos_embed="learned", grid=grid, **changes))


def test_a_learned_table_begins_as_3d_positions_and_draws_nothing():
    weights = []
    for cfg in (replace(VIT, pos_embed="3d"), replace(VIT, pos_embed="learned", grid=(4, 3, 4))):
        torch.manual_seed(0)
        weights.append(ViT(cfg).state_dict() | {"next": torch.rand(3)})
    table = weights[1].pop("position_embedding")
    assert torch.equal(table, sincos_pos_embed((4, 3, 4), VIT.width, "3d", CPU).view(4, 3, 4, VIT.width))
    assert [*weights[0]] == [*weights[1]] and all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())


def test_training_a_table_leaves_the_cached_sinusoids_alone():
    vit = learned_vit()
    before = sincos_pos_embed((4, 3, 4), VIT.width, "learned", CPU, (4, 3, 4)).clone()
    with torch.no_grad():
        vit.position_embedding.add_(1)
    assert torch.equal(learned_vit().position_embedding.flatten(0, 2), before)


@pytest.mark.parametrize("masked", [True, False], ids=["visible", "all"])
@pytest.mark.parametrize("grid", [(4, 3, 4), (3, 2, 4)], ids=str)
def test_tokens_get_the_interpolated_rows_of_their_ids_and_their_gradient(grid, masked):
    vit, count = learned_vit(depth=0).double(), math.prod(grid)
    video = random_video(3, grid[0], 4 * grid[1], 4 * grid[2])
    ids = torch.stack([torch.randperm(count, generator=seeded(b))[:5] for b in range(3)]) if masked else None
    with torch.no_grad():
        vit.position_embedding.copy_(random_table((4, 3, 4), VIT.width))
    table = vit.position_embedding
    rows = interpolate(table, grid)[torch.arange(count).expand(3, -1) if ids is None else ids]
    x = vit.norm(vit.embed_patches(video, ids) + rows)
    weight = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(vit(video, ids), x)
    found, expected = (torch.autograd.grad((y * weight).sum(), table)[0] for y in (vit(video, ids), x))
    torch.testing.assert_close(found, expected)
    assert found.any()


def test_a_vit_with_relative_positions_refers_to_its_grid():
    vit, video = ViT(replace(VIT, pos_embed="relative", grid=(4, 3, 4), depth=0)), random_video(2)
    positions = sincos_pos_embed((2, 2, 3), VIT.width, "relative", CPU, (4, 3, 4))
    torch.testing.assert_close(vit(video), vit.norm(vit.embed_patches(video) + positions))


def test_inference_mode_leaves_training_of_a_table_possible():
    vit, video = learned_vit(), random_video(1, 2)
    interpolation_matrix.cache_clear()
    with torch.inference_mode():
        vit(video)
    vit(video).square().sum().backward()
    assert vit.position_embedding.grad.any()


def test_a_learned_table_has_no_weight_decay():
    vit = learned_vit()
    decayed, others = (group["params"] for group in parameter_groups(vit, 0.1))
    assert any(p is vit.position_embedding for p in others) and not any(p is vit.position_embedding for p in decayed)


@pytest.mark.parametrize("kind", ["relative", "learned"])
def test_a_vit_without_the_grid_that_its_positions_need_is_refused(kind):
    with pytest.raises(ValueError, match=rf"^vit\.grid .*'{kind}'.*\(\)$"):
        ViT(replace(VIT, pos_embed=kind))
