"""eval.py at any grid and token budget: what the student sees, what selects it, which teacher it needs, errors."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from helpers.benchmarks import assert_refused, eval_config, load_json, write_json
from helpers.evaluation import approx, load_clip, retrieval_by_hand
from helpers.models import shaken

import eval as evaluation
from budgets import group_dynamic
from data import ReadableClips
from files import save_weights
from masking import MaskConfig, select
from model import ClusterSTM, VideoToText, load_model
from teacher import SigLIP
from tokenizer import load_tokenizer

DYNAMIC = {"mask": "flux_group_dynamic"}


@pytest.fixture
def changed_run(models, tmp_path, monkeypatch):
    """Enter an empty folder. changed_run(part={changes}) copies the model of retrieval, its config.json changed."""
    monkeypatch.chdir(tmp_path)

    def change(**changes):
        shutil.copytree(models["retrieval"], "changed", dirs_exist_ok=True)
        config = load_json("changed/config.json")
        for part, values in changes.items():
            config[part] = config[part] | values if isinstance(values, dict) else values
        write_json("changed/config.json", config)
        return "changed"
    return change


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Enter an empty folder. Of each call of encode_video: the model, the arguments, what it returned."""
    monkeypatch.chdir(tmp_path)
    recorded = []
    for cls in (ClusterSTM, VideoToText):
        def record(self, *args, encode_video=cls.encode_video):
            recorded.append((self, args, encode_video(self, *args)))
            return recorded[-1][-1]
        monkeypatch.setattr(cls, "encode_video", record)
    return recorded


def run(models, benchmarks, task="msvd", **changes):
    return evaluation.main(eval_config(models, benchmarks, task, **{"rerank": 0, **changes}))


def convolve(video, weight, bias, mean, std):
    """video (B, T, 3, H, W) uint8 -> (B, T, N, C): the patch embedding in fp64, a convolution of normalised pixels."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
    x = (video.flatten(0, 1).double() / 255 - mean) / std
    x = nnf.conv2d(x, weight.double(), bias.double(), stride=weight.shape[-1])
    return x.flatten(2).mT.unflatten(0, video.shape[:2])


def embed_by_student(vit, video):
    weight = vit.patch_embed.weight.view(-1, 3, vit.patch_size, vit.patch_size)
    return convolve(video, weight, vit.patch_embed.bias, vit.mean, vit.std)


def embed_by_teacher(models, video):
    conv = SigLIP.from_pretrained(models["teacher"]).vision_model.embeddings.patch_embedding
    return convolve(video, conv.weight, conv.bias, (0.5,) * 3, (0.5,) * 3)


# ---------------------------------------------------------------------------------------------------------------------
# What the student sees

GRIDS = [(3, 24, 7), (1, 32, 5), (5, 16, 20), (2, 8, 1)]        # frames, size and budget; patches of 8 x 8


@pytest.mark.parametrize("frames, size, S", GRIDS)
@pytest.mark.parametrize("mask", ["cluster_stm", "random", "block3d", "flux_group_dynamic", "umt", "kmeans"])
def test_the_student_sees_the_budget_that_the_mask_selects(models, benchmarks, calls, mask, frames, size, S):
    results = run(models, benchmarks, mask=mask, tokens=S, frames=frames, size=size, batch=4, seed=3)
    pool, config = frames * (size // 8) ** 2, load_json(f"{models['retrieval']}/config.json")
    assert results["tokens"] == f"{mask}, {S} of {pool} a clip"
    assert (results["frames"], results["size"], len(calls)) == (frames, size, 2)
    teacher, cfg = SigLIP.from_pretrained(config["teacher"]), MaskConfig(**{**config["mask"], "name": mask})
    for (_, (video, ids, *rest), (tokens, _)), row in zip(calls, (5, 1), strict=True):     # rows 5 to 2, then 1 and 0
        assert video.shape[1:] == (frames, 3, size, size) and rest == [None, None]
        assert ids.shape == tokens.shape[:2] == (len(video), S)
        grid = (size // 8,) * 2
        x = teacher.forward_features(teacher.normalize(video.flatten(0, 1), grid)).unflatten(0, video.shape[:2])
        attention = teacher.pool_attention(x.flatten(0, 1)).unflatten(0, video.shape[:2])
        generator = torch.Generator().manual_seed(3 + row)
        assert torch.equal(ids, select(cfg, x, S, attention=attention, grid=grid, generator=generator))


@pytest.mark.parametrize("features", ["teacher_embedding", "student_embedding"])
@pytest.mark.parametrize("frames, size, S", GRIDS)
def test_a_mask_compares_patch_embeddings(models, benchmarks, calls, features, frames, size, S):
    results = run(models, benchmarks, **DYNAMIC, features=features, tokens=S, frames=frames, size=size)
    assert results["tokens"] == f"flux_group_dynamic, {S} of {frames * (size // 8) ** 2} a clip, by {features}"
    (model, (video, ids, _, patch_embeds), (tokens, _)), = calls
    of_student = features == "student_embedding"
    x = embed_by_student(model.vit, video) if of_student else embed_by_teacher(models, video)
    assert torch.equal(ids, group_dynamic(x, S)) and ids.shape == (6, S)
    if not of_student:
        assert patch_embeds is None
        return
    torch.testing.assert_close(patch_embeds.double(), x.flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens, model.vit(video, ids), rtol=1e-4, atol=1e-4)       # if it embeds them itself


def test_scores_at_another_grid_are_those_of_a_loop(models, benchmarks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = run(models, benchmarks, **DYNAMIC, features="student_embedding", tokens=11, frames=3, size=24, rerank=2)
    model, tokenizer = load_model(models["retrieval"]), load_tokenizer(f"{models['retrieval']}/tokenizer.json")
    rows = [(row["video"], row["caption"]) for row in load_json(f"{benchmarks}/anno_downstream/msvd_ret_test.json")]

    def visible_ids(name):
        return group_dynamic(embed_by_student(model.vit, load_clip(f"{benchmarks}/videos/{name}", 3, size=24)), 11)

    expected = retrieval_by_hand(model, rows, f"{benchmarks}/videos", tokenizer, 64, 2, 3, visible_ids, size=24)
    assert {name: results["scores"][name] for name in expected} == approx(expected)


@pytest.mark.parametrize("task", ["msrvtt-mc", "msvd-qa", "msvd-caption"])
def test_all_kinds_of_tasks_take_a_grid_and_a_budget(models, benchmarks, calls, no_java, task):
    run(models, benchmarks, task, **DYNAMIC, features="student_embedding", tokens=7, frames=2, size=32)
    for _, (video, ids, token_size, patch_embeds), (tokens, _) in calls:
        assert tokens.shape[:2] == ids.shape == (len(video), 7) and video.shape[1:] == (2, 3, 32, 32)
        assert torch.equal(ids, group_dynamic(patch_embeds.unflatten(1, (2, 16)), 7)) and token_size is None


def test_a_run_with_many_grids_is_evaluated_at_its_standard_one(models, benchmarks, changed_run, calls):
    expected = run(models, benchmarks, mask="random", frames=3)
    folder = changed_run(data={"frames_range": [2, 10, 2], "size_range": [16, 32, 8], "pool": [9, 99]})
    results = run(models, benchmarks, mask="random", frames=3, checkpoint=folder)
    assert results["scores"] == expected["scores"] and results["size"] == 16
    assert calls[1][1][0].shape[1:] == (3, 3, 16, 16)
    cfg, config = evaluation.Config(checkpoint=folder), load_json(f"{folder}/config.json")
    data_cfg = evaluation.make_data_config(cfg, evaluation.tasks.get_task("msvd"), config)
    assert data_cfg.frames_range == data_cfg.size_range == data_cfg.pool == ()
    assert run(models, benchmarks, frames=1, checkpoint=changed_run(data={"image_corpora": ["a=b"]}))["frames"] == 1


@pytest.mark.parametrize("trained, changes, expected", [
    ({"tokens": [12, 6]}, {}, "random, 12 of 16 a clip"),
    ({"tokens": [12, 6]}, {"tokens": 5}, "random, 5 of 16 a clip"),
    ({"tokens": [12, 6]}, {"mask_ratio": 0.75}, "random, 1 of 4 a frame on average"),
    ({"tokens": [12, 6], "ratio": 0.75}, {"mask_ratio": 0.5, "mask": "tube"}, "tube, 2 of 4 a frame"),
    ({"ratio": 0.75}, {}, "random, 1 of 4 a frame on average"),
    ({"features": "student_embedding"}, DYNAMIC, "flux_group_dynamic, 2 of 4 a frame on average, by student_embedding"),
    ({"features": "student_embedding"}, {**DYNAMIC, "features": "teacher", "tokens": 9},
     "flux_group_dynamic, 9 of 16 a clip"),
])
def test_what_is_not_given_is_as_in_training(models, benchmarks, changed_run, calls, trained, changes, expected):
    folder = changed_run(mask=trained)
    assert run(models, benchmarks, **{"mask": "random", **changes}, checkpoint=folder)["tokens"] == expected
    (_, (video, ids, _, patch_embeds), _), = calls
    S = int(expected.split(", ")[1].split()[0])
    assert ids.shape[1] == (S if "a clip" in expected else 4 * S) and video.shape[1:] == (4, 3, 16, 16)
    assert (patch_embeds is None) == ("student" not in expected)


# ---------------------------------------------------------------------------------------------------------------------
# Teachers

@pytest.mark.parametrize("mask, features, proportional, needed", [
    ("flux_group_dynamic", "student_embedding", False, False), ("cluster_stm", "student_embedding", True, False),
    ("random", "", False, False), ("block3d", "", False, False), ("random", "student_embedding", True, False),
    ("random", "", True, True), ("flux_group_dynamic", "teacher_embedding", False, True), ("umt", "", False, True),
])
def test_a_teacher_is_asked_for_only_if_the_mask_needs_one(models, benchmarks, changed_run, capsys, mask, features,
                                                          proportional, needed):
    folder = changed_run(teacher="", model={"proportional": proportional})
    if not needed:
        run(models, benchmarks, checkpoint=folder, mask=mask, features=features, tokens=7)
        return
    flags = ["--checkpoint", folder, "--mask", mask, "--tokens", "7", *(["--features", features] if features else [])]
    message = f"--teacher must .* --mask {mask}, got '': changed names none"
    assert_refused(models, benchmarks, "msvd", capsys, message, *flags)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and names

@pytest.mark.parametrize("flags, message", [
    ("--size 20", "multiple of patch_size 8, got 20"),
    ("--mask random --size 20 --tokens 5", "multiple of patch_size 8, got 20"),
    ("--mask random --tokens 17", "--tokens must be at most 16, the tokens of 4 frames of 16 x 16, got 17$"),
    ("--mask umt --tokens 28 --frames 3 --size 24", "at most 27, the tokens of 3 frames of 24 x 24, got 28$"),
    ("--mask random --checkpoint BUDGETS", "at most 16, the tokens of 4 frames of 16 x 16, got 40, as in training$"),
    ("--checkpoint LEARNED --frames 6", r"at most \(5, 2, 2\), .*got \(6, 2, 2\)"),
    ("--checkpoint LEARNED --size 24", r"at most \(5, 2, 2\), .*got \(4, 3, 3\)"),
    ("--mask umt --features student_embedding --tokens 3", "must be teacher for mask umt, .*'student_embedding'"),
    ("--mask random --tokens 3 --mask-ratio 0.5", "--tokens must not be given with --mask-ratio, got 3 and 0.5"),
    ("--tokens 3", "--mask must name a mask if .*--tokens"), ("--features teacher", "--mask must .*--features"),
    ("--mask random --tokens -1", "tokens .*0.*-1"), ("--size -8", "size .*0.*-8"),
    ("--mask random --features pixels", "pixels.*teacher_embedding"),
])
def test_what_cannot_be_is_one_line_before_a_video_is_read(models, benchmarks, changed_run, monkeypatch, capsys, flags,
                                                          message):
    if "BUDGETS" in flags:
        flags = flags.replace("BUDGETS", changed_run(mask={"tokens": [40, 20]}))
    if "LEARNED" in flags:
        flags = flags.replace("LEARNED", folder := changed_run(vit={"pos_embed": "learned", "grid": [5, 2, 2]}))
        model, config = load_model(models["retrieval"]), load_json("changed/config.json")
        vit = replace(model.vit_cfg, pos_embed="learned", grid=(5, 2, 2))
        save_weights(shaken(ClusterSTM(vit, model.text_cfg, model.cfg)).float(), folder)
        write_json("changed/config.json", config)                           # with the checksum of other weights
        assert run(models, benchmarks, checkpoint=folder, frames=5)["frames"] == 5
        capsys.readouterr()
    monkeypatch.setattr(ReadableClips, "__getitem__", lambda *_: pytest.fail("a video was read"))
    assert_refused(models, benchmarks, "msvd", capsys, message, *flags.split())


def test_results_at_other_grids_and_budgets_have_other_files():
    settings = [{}, {"tokens": 7}, {"tokens": 8}, {"size": 24}, {"size": 32}, {"features": "student_embedding"},
                {"features": "teacher"}, {"features": "student_embedding", "tokens": 7}]
    names = {evaluation.result_file(evaluation.Config(**DYNAMIC, **changes), "x") for changes in settings}
    assert len(names) == len(settings) and "eval-x-flux_group_dynamic.json" in names
    cfg = evaluation.Config(mask="random", tokens=7, features="student_embedding", frames=3, size=24)
    assert evaluation.result_file(cfg, "msvd") == (
        "eval-msvd-random-tokens=7-features=student_embedding-frames=3-size=24.json")
