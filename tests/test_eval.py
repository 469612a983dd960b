"""Metrics against brute force, retrieval against a loop over pairs, and what eval.py says, writes and refuses."""

import json
import os
import random
import shutil

import pytest
import torch
from test_teacher import shaken
from test_train import assert_one_line, command, first_run, small_sprites  # noqa: F401  (the last two are fixtures)

import data
import eval as score
from data import Clips, DataConfig, collate
from masking import MASKS, keep_count
from model import ClusterSTM
from tasks import TASKS, files, find_task
from teacher import SigLIP, guide

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def rank_by_hand(scores, right):
    """1 + the number of wrong answers that score no less than the best right one."""
    best = max(s for s, r in zip(scores, right, strict=True) if r)
    return 1 + sum(s >= best and not r for s, r in zip(scores, right, strict=True))


@pytest.mark.parametrize("levels", [3, 10 ** 6], ids=["many ties", "few ties"])
@pytest.mark.parametrize("Q, M", [(7, 5), (40, 60), (1, 1), (5, 1)])
def test_ranks_are_those_of_a_loop(levels, Q, M):
    g = torch.Generator().manual_seed(0)
    values = torch.randint(-levels, levels, (Q, M), generator=g) / levels
    right = torch.rand(Q, M, generator=g) < 0.2
    right[torch.arange(Q), torch.randint(M, (Q,), generator=g)] = True      # every query has an answer
    wanted = [rank_by_hand(s, r) for s, r in zip(values.tolist(), right.tolist(), strict=True)]
    assert score.ranks(values, right).tolist() == wanted


def test_a_model_that_says_the_same_of_everything_is_last():
    assert score.ranks(torch.zeros(6, 6), torch.eye(6, dtype=torch.bool)).tolist() == [6] * 6
    assert score.ranks(torch.full((2, 4), -3.0), torch.tensor([[True, True, False, False]] * 2)).tolist() == [3, 3]


def test_recalls_are_shares_of_the_ranks():
    rank = torch.tensor([1, 1, 2, 5, 6, 10, 11, 400])
    assert score.recalls(rank) == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "median": 5.5}
    assert score.recalls(torch.tensor([3])) == {"R@1": 0.0, "R@5": 100.0, "R@10": 100.0, "median": 3.0}


@pytest.mark.parametrize("k", [1, 3, 7, 8, 20])
def test_the_top_k_are_ordered_by_match_and_the_rest_as_before(k):
    g = torch.Generator().manual_seed(k)
    before, match = torch.randn(5, 8, generator=g), 100 * torch.randn(5, 8, generator=g)
    asked = []
    def logit(q, m):
        asked.extend(zip(q.tolist(), m.tolist(), strict=True))
        return match[q, m]
    after = score.reranked(before, k, logit)
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 5 * min(k, 8)
    for q in range(5):
        order = before[q].argsort(descending=True).tolist()
        wanted = sorted(order[:k], key=lambda m: -match[q, m]) + order[k:]
        assert after[q].argsort(descending=True).tolist() == wanted


def test_ties_stay_ties_when_reranked():
    before = torch.tensor([[5.0, 4.0, 3.0, 1.0, 1.0, 0.0]])
    after = score.reranked(before, 3, lambda q, m: torch.zeros(len(q)))[0]
    assert after[0] == after[1] == after[2] > after[3] == after[4] > after[5]
    right = torch.tensor([[True, False, False, False, False, False]])
    assert score.ranks(after[None], right).item() == 3                      # the head says the same of all three


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval

@pytest.fixture
def trained(sprites, first, tmp_path, monkeypatch):
    """In a folder of its own: a copy of the first run with weights that tell clips apart. Its teacher is beside it."""
    shutil.copytree(f"{first}/out/first", tmp_path / "out" / "first")
    monkeypatch.chdir(tmp_path)
    model = shaken(ClusterSTM.from_pretrained("out/first")).float()
    model.save("out/first")
    return "out/first"


def captions(sprites):
    """300 captions, no two alike: more than are encoded at once, and in pairs more than are matched at once."""
    words = sorted({w for row in rows(sprites) for w in row["caption"].split()})
    draw = random.Random(0)
    return list(dict.fromkeys(" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(300)))


def rows(sprites):
    with open(f"{sprites}/sprites_test.json") as f:
        return json.load(f)


def own_annotations(sprites):
    """Five videos, the second and the fourth in two rows, 1 to 280 captions a row."""
    names, texts = [row["video"] for row in rows(sprites)], captions(sprites)
    listed = [(names[0], texts[:1]), (names[1], texts[1:3]), (names[2], texts[3]), (names[1], texts[4:6]),
              (names[3], texts[6:9]), (names[4], texts[9:290]), (names[3], texts[290:292])]
    with open("own.json", "w") as f:
        json.dump([{"video": video, "caption": text} for video, text in listed], f)
    return [(v, [t] if isinstance(t, str) else t) for v, t in listed]


def by_hand(model, listed, sprites, tokenizer, length, k, frames=4, size=16, keep=None):
    """Scores of a loop over videos and captions, one at a time."""
    videos = list(dict.fromkeys(v for v, _ in listed))
    texts = [(t, v) for v, some in listed for t in some]
    tokens, video, states, text, words = [], [], [], [], []
    with torch.no_grad():
        for i, name in enumerate(videos):
            shown = data.read_frames(f"{sprites}/videos/{name}", frames)
            x, v = model.encode_video(data.test_view(shown, size)[None], None if keep is None else keep[i:i + 1])
            tokens.append(x)
            video.append(v[0])
        for caption, _ in texts:
            words.append(data.encode(tokenizer, [data.clean(caption)], length))
            s, t = model.encode_text(words[-1])
            states.append(s)
            text.append(t[0])
        near = torch.stack([torch.stack([t @ v for v in video]) for t in text])              # (M, V)
        match = torch.stack([model.match(torch.cat(states), torch.cat(words), x.expand(len(texts), -1, -1))[:, 1]
                             for x in tokens], 1)                                            # (M, V)
    right = [[v == name for name in videos] for _, v in texts]

    def both(order):
        found = {}
        for way, turn in (("T2V", lambda x: x), ("V2T", lambda x: list(zip(*x, strict=True)))):
            ranks = [order(near, match, right) for near, match, right in zip(
                turn(near.tolist()), turn(match.tolist()), turn(right), strict=True)]
            found[way] = {f"R@{n}": 100 * sum(r <= n for r in ranks) / len(ranks) for n in (1, 5, 10)}
            ranks.sort()
            found[way]["median"] = (ranks[len(ranks) // 2] + ranks[(len(ranks) - 1) // 2]) / 2
        return found

    def again(near, match, right):
        top = sorted(range(len(near)), key=lambda i: -near[i])[:k]
        return rank_by_hand([(1, match[i]) if i in top else (0, near[i]) for i in range(len(near))], right)

    return {"similarity": both(lambda near, match, right: rank_by_hand(near, right)), f"match, top {k}": both(again)}


def approx(scores):
    return {how: {way: pytest.approx(values) for way, values in both.items()} for how, both in scores.items()}


@pytest.mark.parametrize("k", [2, 4, 300])
def test_retrieval_is_what_a_loop_over_pairs_finds(trained, sprites, k):
    listed = own_annotations(sprites)
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    clips = Clips(data.read_annotations("own.json", f"{sprites}/videos"), DataConfig(frames=4, size=16, cache=False),
                  train=False)
    found = score.retrieval(model, clips, tokenizer, 24, k, batch=2)
    wanted = by_hand(model, listed, sprites, tokenizer, 24, k)
    M = sum(len(texts) for _, texts in listed)
    assert M > 256 and found["videos"] == 5 and found["captions"] == M
    chance = found["scores"].pop("chance")
    assert found["scores"] == approx(wanted)
    assert len({str(both) for both in wanted.values()}) == 2                # the two ways of scoring differ
    assert chance == {"T2V": {"R@1": 20.0, "R@5": 100.0, "R@10": 100.0, "median": 3.0},
                      "V2T": {"R@1": 100 / M, "R@5": 500 / M, "R@10": 1000 / M, "median": (M + 1) / 2}}


def test_a_task_is_scored_as_the_loop_scores_it_and_written_as_it_is_returned(trained, sprites, capsys):
    found = score.main(score.Config(checkpoint=trained, data_root=sprites, rerank=5, batch=5))
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    listed = [(row["video"], [row["caption"]]) for row in rows(sprites)]
    wanted = by_hand(model, listed, sprites, tokenizer, 24, 5)
    with open(f"{trained}/eval-sprites-all.json") as f:
        assert json.load(f) == found
    assert {k: found["scores"][k] for k in wanted} == approx(wanted)
    assert found["videos"] == found["captions"] == 12 and found["tokens"] == "all" and found["frames"] == 4
    out = capsys.readouterr().out
    for both in (*wanted.values(), found["scores"]["chance"]):
        assert " ".join(f"{both[way][c]:.1f}" for way in ("T2V", "V2T") for c in both[way]) in " ".join(out.split())
    assert not [name for name in os.listdir(trained) if name.endswith(".tmp")]


def test_own_annotations_are_scored_and_the_options_are_heard(trained, sprites):
    listed = own_annotations(sprites)
    found = score.main(score.Config(checkpoint=trained, data="own.json", data_root=f"{sprites}/videos", rerank=0,
                                    frames=2, out="here.json"))
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    wanted = by_hand(model, listed, sprites, tokenizer, 24, 1, frames=2)
    assert set(found["scores"]) == {"similarity", "chance"} and found["frames"] == 2 and found["task"] == "own"
    assert found["scores"]["similarity"] == approx(wanted)["similarity"]
    with open("here.json") as f:
        assert json.load(f) == found
    score.main(score.Config(checkpoint=trained, data="own.json", data_root=f"{sprites}/videos", rerank=0))
    assert os.path.exists(f"{trained}/eval-own-all.json")


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_masked_scores_are_those_of_the_model_given_these_tokens(trained, sprites, ratio):
    found = score.main(score.Config(checkpoint=trained, data_root=sprites, rerank=5, batch=5, mask="cluster_stm",
                                    mask_ratio=ratio))
    with open(f"{trained}/config.json") as f:
        config = json.load(f)
    mask = score.MaskConfig(**{**config["mask"], "ratio": ratio or 0.75})
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    clips = Clips(data.read_annotations(f"{sprites}/sprites_test.json", f"{sprites}/videos"),
                  DataConfig(frames=4, size=16, cache=False), train=False)
    batch = collate([clips[i] for i in range(12)], tokenizer, 24, seed=0)
    keep = guide(SigLIP.from_pretrained(config["teacher"]), batch, mask, mask.ratio).keep
    assert keep.shape == (12, 4 * keep_count(16, mask.ratio))
    listed = [(row["video"], [row["caption"]]) for row in rows(sprites)]
    wanted = by_hand(model, listed, sprites, tokenizer, 24, 5, keep=keep)
    assert {k: found["scores"][k] for k in wanted} == approx(wanted)
    assert found["tokens"] == f"cluster_stm, {100 * mask.ratio:g} % hidden"
    with open(f"{trained}/eval-sprites-cluster_stm.json") as f:
        assert json.load(f) == found


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_scores_alike_under_one_seed(trained, sprites, monkeypatch, mask):
    real, seen = ClusterSTM.encode_video, []
    monkeypatch.setattr(ClusterSTM, "encode_video", lambda self, video, keep: (
        seen.append(keep), real(self, video, keep))[1])
    run = lambda seed: score.main(score.Config(checkpoint=trained, data_root=sprites, batch=6, rerank=3, mask=mask,
                                               seed=seed, out="x.json"))
    assert run(0) == run(0) and len(seen) == 4
    run(1)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and seen[0].shape == (6, 4 * 4)
    assert torch.equal(seen[4], seen[0]) == (mask == "cluster_stm")         # the others are drawn
    assert not torch.equal(seen[0], seen[1])                                # and for each batch anew


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def test_the_command_scores_and_says_where_it_wrote(trained, sprites, capsys):
    code, out, _ = command("eval.py", ["--checkpoint", f"{trained}/masked", "--data-root", sprites], capsys)
    assert code == 0 and f"written to {trained}/masked/eval-sprites-all.json" in out
    code, out, _ = command("eval.py", ["--help"], capsys)
    assert code == 0 and "--data-root" in out


@pytest.mark.parametrize("flags, message", [
    ("--task sprite", "there is no task 'sprite'; did you mean 'sprites'[?] There are: sprites"),
    ("--task zzz", "there is no task 'zzz' There are: sprites|there is no task 'zzz'[;.] "),
    ("--data own.json", "--data own.json wants --data-root"),
    ("--data nowhere.json --data-root .", "nowhere.json: no such annotation file"),
    ("--data bad.json --data-root .", "bad.json: not JSON"),
    ("--data-root nowhere", "nowhere/sprites_test.json is not there: nowhere wants sprites_test.json and videos/"),
    ("--data-root SPRITES --checkpoint nowhere", "nowhere.* it has no config.json"),
    ("--data-root SPRITES --checkpoint untokenized", "untokenized/tokenizer.json: no such tokenizer.json"),
    ("--data-root SPRITES --checkpoint out/first/teacher", "config.json has no 'model' part: no run of train.py"),
    ("--data-root SPRITES --mask clusters", "there is no mask 'clusters'; there are cluster_stm"),
    ("--data-root SPRITES --mask cluster_stm --mask-ratio 1", r"mask ratio is in \[0, 1\), got 1"),
    ("--data-root SPRITES --mask cluster_stm --teacher nowhere", "nowhere is no folder of a SigLIP: none is at "),
    ("--data-root SPRITES --frames 9", "9"),
    ("--data short.json --data-root SPRITES/videos", "row 1: no file .*absent.mp4"),
])
def test_what_cannot_be_scored_says_so_in_one_line(trained, sprites, capsys, flags, message):
    shutil.copytree(trained, "untokenized", ignore=lambda *_: ["tokenizer.json"])
    with open("bad.json", "w") as f:
        f.write("[{")
    with open("short.json", "w") as f:
        json.dump([rows(sprites)[0], {"video": "absent.mp4", "caption": "a"}], f)
    flags = flags if "--checkpoint" in flags else f"{flags} --checkpoint {trained}"
    code, _, err = command("eval.py", flags.replace("SPRITES", sprites).split(), capsys)
    assert_one_line("eval.py", code, err, message)
    assert not [name for name in os.listdir(trained) if name.startswith("eval-")]


def test_a_gpu_that_is_not_there_is_refused(trained, sprites, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = command("eval.py", ["--checkpoint", trained, "--data-root", sprites, "--device", "cuda"], capsys)
    assert_one_line("eval.py", code, err, "no CUDA GPU")


def test_a_checkpoint_is_scored_on_a_machine_without_its_training_data(trained, sprites):
    here = score.main(score.Config(checkpoint=trained, data_root=sprites, rerank=0))
    with open(f"{trained}/config.json") as f:
        config = json.load(f)
    config["data"].update(train="/not/on/this/machine/train.json", root="/not/on/this/machine")
    with open(f"{trained}/config.json", "w") as f:
        json.dump(config, f)
    assert score.main(score.Config(checkpoint=trained, data_root=sprites, rerank=0)) == here


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

def test_a_task_is_found_by_name_and_the_nearest_is_offered():
    for name, task in TASKS.items():
        assert find_task(name) is task and task.kind == "retrieval" and task.rerank >= 0
    with pytest.raises(ValueError, match="no task 'sprits'; did you mean 'sprites'"):
        find_task("sprits")


def test_files_of_a_task_are_those_under_the_root_and_must_be_there(sprites, tmp_path, monkeypatch):
    task = TASKS["sprites"]
    assert files(task, sprites) == (f"{sprites}/sprites_test.json", f"{sprites}/videos")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^data/sprites/sprites_test.json is not there"):
        files(task, "")
    os.makedirs("data")
    os.symlink(sprites, "data/sprites")
    assert files(task, "") == ("data/sprites/sprites_test.json", "data/sprites/videos")
