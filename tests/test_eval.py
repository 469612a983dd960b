"""Metrics against brute force, each kind of task against a slow loop, and what eval.py says, writes and refuses."""

import json
import math
import os
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from test_tasks import (  # noqa: F401  (the last five are fixtures)
    ANSWERS,
    NAMES,
    as_list,
    captions_like,
    no_java,
    own_root,
    questions_like,
    read,
    root_with_holes,
    settings,
    tiny_models,
    whole_root,
    write,
)
from test_teacher import shaken
from test_train import (  # noqa: F401  (two are fixtures)
    assert_one_line,
    command,
    first_run,
    in_processes,
    small_sprites,
)

import data
import decoding
import eval as score
from data import Clips, DataConfig, clean, collate
from masking import MASKS, NEEDS, MaskConfig, keep_count
from model import ClusterSTM, load_model
from tasks import TASKS, split_files
from teacher import SigLIP, guide
from teacher import kept as teachers_choice

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
    assert score.recalls(rank) == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "median": 5.5, "mean": 54.5}
    assert score.recalls(torch.tensor([3])) == {"R@1": 0.0, "R@5": 100.0, "R@10": 100.0, "median": 3.0, "mean": 3.0}


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


@pytest.mark.parametrize("Q, M, temp", [(5, 3, 0.07), (3, 8, 0.01), (1, 4, 1.0), (4, 1, 0.5)])
def test_dual_softmax_is_its_formula(Q, M, temp):
    g = torch.Generator().manual_seed(Q)
    near = torch.rand(Q, M, generator=g, dtype=torch.float64) * 2 - 1
    found = score.dual_softmax(near, temp)
    assert found.shape == (Q, M)
    for q in range(Q):
        for m in range(M):
            prior = math.exp(near[q, m] / temp) / sum(math.exp(near[other, m] / temp) for other in range(Q))
            assert found[q, m].item() == pytest.approx(near[q, m].item() / temp * prior, rel=1e-9)


def test_an_item_that_all_queries_like_gives_way():
    near = torch.tensor([[0.6, 0.5], [0.9, 0.1]])                           # both like the first; it is the second's
    right = torch.eye(2, dtype=torch.bool).flip(0)
    assert score.ranks(near, right).tolist() == [2, 1]
    assert score.ranks(score.dual_softmax(near, 0.1), right).tolist() == [1, 1]


def test_the_number_that_a_model_is_chosen_by():
    both = lambda *x: dict(zip(("T2V", "V2T"), [dict(zip(("R@1", "R@5", "R@10", "median"), some, strict=True))
                                                for some in (x[:4], x[4:])], strict=True))
    found = {"similarity": both(1, 2, 3, 90, 4, 5, 6, 90), "match, top 5": both(10, 20, 30, 90, 40, 50, 60, 90),
             "chance": both(0, 0, 0, 0, 0, 0, 0, 0)}
    assert score.headline("retrieval", found) == ("mean R@1/5/10 by match, top 5", 35)
    found.pop("match, top 5")
    assert score.headline("retrieval", found) == ("mean R@1/5/10 by similarity", 3.5)
    found = {"0.7 match + 0.3 similarity": {"accuracy": 3}, "match": {"accuracy": 4}}
    assert score.headline("choice", found) == ("accuracy by 0.7 match + 0.3 similarity", 3)
    found = {"ranking, top 8": {"all": 3, "colour": 4}, "generation": {"all": 5}}
    assert score.headline("qa", found) == ("all by ranking, top 8", 3)
    found = {"greedy": {"CIDEr": 3, "METEOR": 4}, "beam 3": {"CIDEr": 5, "METEOR": 6}}
    assert score.headline("caption", found) == ("CIDEr by beam 3", 5)


# What is said of five clips, by several people; what a machine says of them; and both as words, split by hand.
REFERENCES = {"a": ["A man is riding a horse.", "The man's horse runs!", "a rider on a horse"],
              "b": ["Two dogs play in the snow", "dogs -- playing in snow"], "c": ["a woman cooks pasta (and sings)"],
              "d": ["Someone is cooking now", "cooking", "cooking"], "e": ["A red car drives down the road."]}
SAID = {"a": "a man rides a horse", "b": "Two dogs play in the snow.", "c": "a dog", "d": "a woman is cooking", "e": ""}
WORDS = {"a": ["a man is riding a horse", "the man s horse runs", "a rider on a horse"],
         "b": ["two dogs play in the snow", "dogs playing in snow"], "c": ["a woman cooks pasta and sings"],
         "d": ["someone is cooking now", "cooking", "cooking"], "e": ["a red car drives down the road"]}
SPOKEN = {"a": ["a man rides a horse"], "b": ["two dogs play in the snow"], "c": ["a dog"],
          "d": ["a woman is cooking"], "e": [""]}


def pycocoevalcap(references, said, meteor=None):
    """Each score through its own interface; words are split already."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    found = {"CIDEr": Cider().compute_score(references, said)[0], "ROUGE-L": Rouge().compute_score(references, said)[0],
             "BLEU-4": Bleu(4).compute_score(references, said, verbose=0)[0][3]}
    found |= {"METEOR": meteor.compute_score(references, said)[0]} if meteor else {}
    return {name: 100 * value for name, value in found.items()}


@pytest.fixture(scope="module", autouse=True)
def meteor():
    """One METEOR for all tests, started before the first: it reads for ten seconds before it answers."""
    if not shutil.which("java"):
        yield None
        return
    from pycocoevalcap.meteor.meteor import Meteor
    yield Meteor()


def test_captions_are_scored_by_pycocoevalcap_without_java(simple, capfd):
    found = score.caption_scores(REFERENCES, SAID)
    assert capfd.readouterr() == ("", "")
    wanted = pycocoevalcap(WORDS, SPOKEN)
    assert found == pytest.approx({f"{name} (simple tokenizer)": value for name, value in wanted.items()})
    assert all(5 < value < 200 for value in found.values())


def test_the_best_captions_are_those_of_people_and_the_worst_have_no_word_of_them(simple):
    only = {i: texts[:1] for i, texts in REFERENCES.items()}
    best = score.caption_scores(only, {i: texts[0] for i, texts in only.items()})
    assert best == pytest.approx({f"{name} (simple tokenizer)": value for name, value in (
        ("CIDEr", 1000), ("BLEU-4", 100), ("ROUGE-L", 100))})
    worst = score.caption_scores(REFERENCES, dict.fromkeys(REFERENCES, "zebras yawn loudly behind barns"))
    assert all(0 <= value < 1e-3 for value in worst.values())


def test_a_caption_that_two_people_gave_weighs_twice(simple):
    twice, once = ({**REFERENCES, "d": texts} for texts in (REFERENCES["d"], REFERENCES["d"][:2]))
    name = "CIDEr (simple tokenizer)"
    assert score.caption_scores(twice, SAID)[name] != pytest.approx(score.caption_scores(once, SAID)[name], rel=1e-3)


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
    """Six videos, the second and the fourth in two rows, 1 to 280 captions a row; and captions of several videos."""
    names, texts = [row["video"] for row in rows(sprites)], captions(sprites)
    listed = [(names[0], texts[:1]), (names[1], texts[1:3]), (names[2], texts[3]), (names[1], texts[4:6]),
              (names[3], texts[6:9]), (names[4], texts[9:290]), (names[3], texts[290:292]),
              ([names[5], names[0], names[3]], texts[292]), ([names[2], names[5]], texts[293:296])]
    with open("own.json", "w") as f:
        json.dump([{"video": video, "caption": text} for video, text in listed], f)
    return [(v, as_list(t)) for v, t in listed]


def shown(path, frames, seconds=0):
    """(1, T, 3, 16, 16): the frames that a model looks at."""
    return decoding.test_view(decoding.read_frames(path, frames, seconds=seconds), 16)[None]


def by_hand(model, listed, sprites, tokenizer, length, k, frames=8, keep=None, seconds=0):
    """Scores of a loop over videos and captions, one at a time. listed: (a video or several, captions) of each row."""
    videos = list(dict.fromkeys(v for some, _ in listed for v in as_list(some)))
    texts = [(t, as_list(some)) for some, captions in listed for t in captions]
    tokens, video, states, text, words = [], [], [], [], []
    with torch.no_grad():
        for name in videos:
            x, v = model.encode_video(shown(f"{sprites}/videos/{name}", frames, seconds), keep and keep(name))
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
        dual = near / model.temp.item()         # s, times its softmax over the queries: over captions, over videos
        t2v = torch.tensor([[s[v] * s[v].exp() / dual[:, v].exp().sum() for v in range(len(videos))] for s in dual])
        v2t = torch.tensor([[s[v] * s[v].exp() / s.exp().sum() for v in range(len(videos))] for s in dual])
    right = torch.tensor([[name in some for name in videos] for _, some in texts])

    def both(t2v, v2t, order):
        found = {}
        for way, near, again, true in (("T2V", t2v, match, right), ("V2T", v2t.T, match.T, right.T)):
            ranks = sorted(order(*row) for row in zip(near.tolist(), again.tolist(), true.tolist(), strict=True))
            found[way] = {f"R@{n}": 100 * sum(r <= n for r in ranks) / len(ranks) for n in (1, 5, 10)}
            found[way]["median"] = (ranks[len(ranks) // 2] + ranks[(len(ranks) - 1) // 2]) / 2
            found[way]["mean"] = sum(ranks) / len(ranks)
        return found

    def again(near, match, right):
        top = sorted(range(len(near)), key=lambda i: -near[i])[:k]
        return rank_by_hand([(1, match[i]) if i in top else (0, near[i]) for i in range(len(near))], right)

    plain = lambda near, match, right: rank_by_hand(near, right)
    return {"similarity": both(near, near, plain), "similarity, dual softmax": both(t2v, v2t, plain),
            f"match, top {k}": both(near, near, again)}


def approx(scores):
    return {how: {way: pytest.approx(values) for way, values in both.items()} for how, both in scores.items()}


@pytest.mark.parametrize("k", [2, 4, 300])
def test_retrieval_is_what_a_loop_over_pairs_finds(trained, sprites, k):
    listed = own_annotations(sprites)
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    clips = Clips(data.read_annotations("own.json", f"{sprites}/videos"), DataConfig(frames=4, size=16, cache=False),
                  train=False)
    found = score.retrieval(model, clips, tokenizer, score.Protocol(length=24, rerank=k, batch=2))
    wanted = by_hand(model, listed, sprites, tokenizer, 24, k, frames=4)
    M = sum(len(texts) for _, texts in listed)
    assert M > 256 and found["videos"] == 6 and found["captions"] == M
    chance = found["scores"].pop("chance")
    assert found["scores"] == approx(wanted)
    assert len({str(both) for both in wanted.values()}) > 1                 # the ways of scoring differ
    assert chance == {
        "T2V": {"R@1": pytest.approx(100 / 6), "R@5": pytest.approx(500 / 6), "R@10": 100, "median": 3.5, "mean": 3.5},
        "V2T": {"R@1": 100 / M, "R@5": 500 / M, "R@10": 1000 / M, "median": (M + 1) / 2, "mean": (M + 1) / 2}}


def test_a_task_is_scored_as_the_loop_scores_it_and_written_as_it_is_returned(trained, sprites, capsys):
    found = score.main(score.Config(checkpoint=trained, data_root=sprites, rerank=5, batch=5))
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    listed = [(row["video"], [row["caption"]]) for row in rows(sprites)]
    wanted = by_hand(model, listed, sprites, tokenizer, 36, 5)
    with open(f"{trained}/eval-sprites-all.json") as f:
        assert json.load(f) == found
    assert {k: found["scores"][k] for k in wanted} == approx(wanted)
    assert found["videos"] == found["captions"] == 12 and found["tokens"] == "all" and found["frames"] == 8
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
    assert set(found["scores"]) == {"similarity", "similarity, dual softmax", "chance"}
    assert found["frames"] == 2 and found["task"] == "own" and "not re-ranked" in found["protocol"]
    assert found["scores"]["similarity"] == approx(wanted)["similarity"]
    with open("here.json") as f:
        assert json.load(f) == found
    found = score.main(score.Config(checkpoint=trained, data="own.json", data_root=f"{sprites}/videos", rerank=0))
    assert os.path.exists(f"{trained}/eval-own-all.json") and found["frames"] == 4      # as it was trained


def kept(config, tokenizer, folder, frames, ratio):
    """name -> the ids (1, TK) that the teacher keeps of this video, shown to it alone."""
    teacher, mask = SigLIP.from_pretrained(config["teacher"]), MaskConfig(**{**config["mask"], "ratio": ratio})
    def ids(name):
        batch = collate([data.Sample(shown(f"{folder}/{name}", frames)[0], "a", "a", 0, 0, 0)], tokenizer, 24, seed=0)
        grid = (16 // config["model"]["patch"],) * 2
        return guide(teacher, batch, mask, mask.ratio, grid=grid).keep
    return ids


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_masked_scores_are_those_of_the_model_given_these_tokens(trained, sprites, ratio):
    found = score.main(score.Config(checkpoint=trained, data_root=sprites, rerank=5, batch=5, mask="cluster_stm",
                                    mask_ratio=ratio))
    with open(f"{trained}/config.json") as f:
        config = json.load(f)
    model, tokenizer = ClusterSTM.from_pretrained(trained), data.load_tokenizer(f"{trained}/tokenizer.json")
    keep = kept(config, tokenizer, f"{sprites}/videos", 8, ratio or 0.75)
    assert keep(rows(sprites)[0]["video"]).shape == (1, 8 * keep_count(16, ratio or 0.75))
    listed = [(row["video"], [row["caption"]]) for row in rows(sprites)]
    wanted = by_hand(model, listed, sprites, tokenizer, 36, 5, keep=keep)
    assert {k: found["scores"][k] for k in wanted} == approx(wanted)
    assert found["tokens"] == f"cluster_stm, {keep_count(16, ratio or 0.75)} of 16 a frame"
    with open(f"{trained}/eval-sprites-cluster_stm.json") as f:
        assert json.load(f) == found


@pytest.mark.parametrize("mask", [name for name in MASKS if not NEEDS[name] & {"logits", "text"}])
def test_every_mask_scores_alike_under_one_seed(trained, sprites, monkeypatch, mask):
    real, seen = ClusterSTM.encode_video, []
    monkeypatch.setattr(ClusterSTM, "encode_video", lambda self, video, keep, size: (
        seen.append(keep), real(self, video, keep, size))[1])
    run = lambda seed: score.main(score.Config(checkpoint=trained, data_root=sprites, batch=6, rerank=3, mask=mask,
                                               seed=seed, out="x.json"))
    assert run(0) == run(0) and len(seen) == 4
    run(1)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and seen[0].shape == (6, 8 * 4)
    assert torch.equal(seen[4], seen[0]) == ("generator" not in NEEDS[mask])
    assert "generator" not in NEEDS[mask] or not torch.equal(seen[0], seen[1])          # and for each batch anew


@pytest.mark.parametrize("proportional", [False, True])
def test_what_a_token_stands_for_is_told_where_it_counts(trained, sprites, monkeypatch, proportional):
    config, real, seen = read(f"{trained}/config.json"), ClusterSTM.encode_video, []
    config["model"]["proportional"] = proportional
    write(f"{trained}/config.json", config)
    monkeypatch.setattr(ClusterSTM, "encode_video", lambda self, *args: (seen.append(args), real(self, *args))[1])
    for mask in ("cluster_stm", ""):
        score.main(score.Config(checkpoint=trained, data_root=sprites, batch=5, rerank=0, mask=mask, out="x.json"))
    teacher, mask = SigLIP.from_pretrained(config["teacher"]), MaskConfig(**config["mask"])
    for video, keep, size in seen[:3]:
        told = teachers_choice(teacher, video, mask, mask.ratio, 0, (4, 4), True)
        assert torch.equal(keep, told.keep) and told.size.max() > 1
        assert torch.equal(size, told.size) if proportional else size is None
    assert [args[1:] for args in seen[3:]] == [(None, None)] * 3


@pytest.mark.parametrize("mask, wants", [("adamae", "logits"), ("text_guided", "aligned")])
def test_a_mask_that_asks_for_what_scoring_has_not_is_refused(trained, sprites, mask, wants):
    with pytest.raises(ValueError, match=f"^the mask {mask} needs {wants} .*, got none$"):
        score.main(score.Config(checkpoint=trained, data_root=sprites, mask=mask, out="x.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of task, against a loop over its videos and texts, one at a time

def scored(models, root, task, **more):
    """What eval.py finds, and all that a loop wants: model, tokenizer, rows of the test file, folder of its videos."""
    cfg = settings(models, root, task, **more)
    found = score.main(cfg)
    path, media = split_files(TASKS[task], "test", root)
    model, tokenizer = load_model(cfg.checkpoint), data.load_tokenizer(f"{cfg.checkpoint}/tokenizer.json")
    keep = None
    if cfg.mask:
        keep = kept(read(f"{cfg.checkpoint}/config.json"), tokenizer, media, found["frames"], 0.5)
        assert keep(NAMES[0]).shape == (1, 2 * found["frames"]) and found["tokens"] == "cluster_stm, 2 of 4 a frame"
    return found, model, tokenizer, read(path), media, keep


MASKED = pytest.mark.parametrize("mask", ["", "cluster_stm"])


@MASKED
@pytest.mark.parametrize("task, length, seconds", [
    ("msvd", 64, 0), ("ssv2-label", 25, 0), ("ssv2-template", 25, 0), ("didemo", 64, 30), ("activitynet", 150, 0)])
def test_retrieval_of_files_as_published(models, whole, simple, tmp_path, monkeypatch, task, length, seconds, mask):
    monkeypatch.chdir(tmp_path)
    found, model, tokenizer, listed, media, keep = scored(models, whole, task, mask=mask, rerank=2)
    join = task in ("didemo", "activitynet")
    pairs = [(row["video"], [" ".join(row["caption"])] if join else as_list(row["caption"])) for row in listed]
    os.symlink(media, "videos")
    wanted = by_hand(model, pairs, ".", tokenizer, length, 2, frames=4, keep=keep, seconds=seconds)
    assert {how: found["scores"][how] for how in wanted} == approx(wanted)


CHOICES = [2, 3, 5, 7]


@MASKED
def test_a_choice_is_what_a_loop_finds(models, root, mask):
    write(f"{root}/anno_downstream/msrvtt_mc_test.json", [
        {"video": NAMES[i % 6], "caption": captions_like(n), "answer": i % n}
        for i, n in enumerate(CHOICES * 10)])
    found, model, tokenizer, listed, media, keep = scored(models, root, "msrvtt-mc", mask=mask, batch=7)
    right = {"0.7 match + 0.3 similarity": 0, "match": 0, "similarity": 0}
    chosen = []
    with torch.no_grad():
        for row in listed:
            tokens, video = model.encode_video(shown(f"{media}/{row['video']}", 4), keep and keep(row["video"]))
            match, near = [], []
            for caption in row["caption"]:
                ids = data.encode(tokenizer, [clean(caption)], 32)
                states, text = model.encode_text(ids)
                no, yes = model.match(states, ids, tokens)[0].tolist()
                match.append(math.exp(yes) / (math.exp(yes) + math.exp(no)))
                near.append(math.exp((text[0] @ video[0]).item() / model.temp.item()))
            near = [x / sum(near) for x in near]
            both = [0.7 * m + 0.3 * s for m, s in zip(match, near, strict=True)]
            chosen.append([max(range(len(x)), key=x.__getitem__) for x in (both, match, near)])
            for how, choice in zip(right, chosen[-1], strict=True):
                right[how] += choice == row["answer"]
    assert len({tuple(x) for x in zip(*chosen, strict=True)}) == 3          # the three do not choose alike
    for how, n in right.items():
        assert found["scores"][how] == {"accuracy": pytest.approx(100 * n / 40)}
    chance = sum(1 / n for n in CHOICES) / 4
    assert found["scores"]["chance"] == {"accuracy": pytest.approx(100 * chance)} and found["questions"] == 40


def pieces(tokenizer, answer, length):
    """[CLS], the pieces, [SEP], cut."""
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    return [cls, *tokenizer.encode(answer, add_special_tokens=False).ids, sep][:length]


def after(model, memory, ids):
    """log p (vocab,) of the piece that follows these, memory (1, S, C)."""
    decoder, ids = model.text_decoder, torch.tensor([ids])
    return decoder.words(decoder.fuse(decoder.text(ids), ids, memory)[0, -1]).log_softmax(-1)


def greedily(model, tokenizer, memory, length):
    ids = pieces(tokenizer, "", 1)
    while len(ids) < length:
        p = after(model, memory, ids)
        p[0] = -math.inf                                                    # [PAD] is nothing to say
        ids.append(p.argmax().item())
        if ids[-1] == tokenizer.token_to_id("[SEP]"):
            break
    return words(tokenizer, ids)


def words(tokenizer, ids):
    said = [tokenizer.id_to_token(i) for i in ids]
    return " ".join(x for x in said if x not in ("[CLS]", "[SEP]")).replace(" ##", "")


@pytest.mark.parametrize("k, twice, mask", [
    (8, True, ""), (3, True, "cluster_stm"), (3, False, ""), (1, True, ""), (0, False, "cluster_stm")])
def test_answers_are_those_that_a_loop_finds(models, root, k, twice, mask):
    listed = [q | {"answer": ANSWERS[i % 8] if i % 5 else [ANSWERS[i % 8], "Dog"]} for i, q in enumerate(
        questions_like(NAMES * 4, 0, type=lambda i: f"kind {i % 3}"))]
    write(f"{root}/anno_downstream/msvd_qa_test.json", listed)
    found, model, tokenizer, listed, media, keep = scored(models, root, "msvd-qa", mask=mask, rerank=k, batch=4,
                                                          first_twice=twice)
    n = k or 8
    assert f"the likeliest {n} of 8 answers scored whole" in found["protocol"]
    assert f"their first piece counted {'twice' if twice else 'once'}" in found["protocol"]
    right, differ, said = Counter(), Counter(), {}
    spoken = {answer: words(tokenizer, pieces(tokenizer, answer, 5)) for answer in [*ANSWERS, "Dog"]}
    with torch.no_grad():
        for row in listed:
            tokens, _ = model.encode_video(shown(f"{media}/{row['video']}", 6), keep and keep(row["video"]))
            ids = torch.tensor([pieces(tokenizer, clean(row["question"]), 25)[:-1]])        # [CLS] and the words
            memory = model.bert.fuse(model.bert.text(ids), ids, tokens)
            first, full, start = {}, {}, after(model, memory, pieces(tokenizer, "", 1))
            for answer in ANSWERS:
                ids = pieces(tokenizer, answer, 5)
                rest = [after(model, memory, ids[:t])[ids[t]].item() for t in range(2, len(ids))]
                first[answer] = start[ids[1]].item()
                full[answer] = first[answer] * (1 + twice) + sum(rest)
            top = sorted(ANSWERS, key=lambda a: -first[a])[:n]
            assert n == 8 or min(first[a] for a in top) > max(first[a] for a in ANSWERS if a not in top) + 1e-6
            ranked, free = max(top, key=full.get), greedily(model, tokenizer, memory, 5)
            other = {answer: full[answer] + first[answer] * (1 - 2 * twice) for answer in top}
            differ["count"] += ranked != max(top, key=other.get)
            differ["cut"] += ranked != max(ANSWERS, key=full.get)
            said[row["question_id"]] = (ranked, free)
            right["ranking"] += ranked in as_list(row["answer"])
            right["generation"] += free in {spoken[a] for a in as_list(row["answer"])}
            right[row["type"]] += ranked in as_list(row["answer"])
    assert {s["question_id"]: (s["ranked"], s["said"]) for s in found["said"]} == said
    assert (differ["count"] or n == 1) and (differ["cut"] or n == 8 or mask)    # each switch moves a ranking
    assert len({a for a, _ in said.values()}) > (n > 1) and len({b for _, b in said.values()}) > 5
    ranking, free = found["scores"][f"ranking, top {n}"], found["scores"]["generation"]
    assert ranking["all"] == pytest.approx(100 * right["ranking"] / 24)
    assert free["all"] == pytest.approx(100 * right["generation"] / 24)
    for kind in ("kind 0", "kind 1", "kind 2"):
        assert ranking[kind] == pytest.approx(100 * right[kind] / 8)


def test_an_answer_in_free_words_is_right_if_it_is_what_can_be_said_of_it(models, root, monkeypatch):
    """Case and what is past the last piece that is generated do not count; another word does."""
    monkeypatch.setattr(score.VideoToText, "generate",
                        lambda self, memory, *_: torch.tensor([next(said) for _ in memory]))
    tokenizer = models["tokenizer"]
    asked = [("Zebra Crossing", "zebra sounds", True), ("dog", "dog", True), ("DOG", "dog", True),
             ("dog", "yes", False), ("a red ball", "a red ball", True), (["snow", "dog"], "dog", True)]
    said = iter([(pieces(tokenizer, text, 9) + [0] * 9)[:5] for _, text, _ in asked])
    write(f"{root}/anno_downstream/msvd_qa_test.json", [
        {"video": NAMES[0], "question": "what", "question_id": i, "answer": a} for i, (a, _, _) in enumerate(asked)])
    found = score.main(settings(models, root, "msvd-qa"))
    assert [row["right"][1] for row in found["said"]] == [right for *_, right in asked]


@MASKED
def test_captions_are_those_that_a_loop_finds(models, root, simple, mask):
    said = score.main(settings(models, root, "msvd-caption", mask=mask))["said"]
    path = f"{root}/anno_downstream/msvd_cap_test.json"                     # two people say what the model says
    write(path, [row | {"caption": [mine["greedy"]] * 2 + row["caption"]} if len(mine["greedy"]) > 9 else row
                 for row, mine in zip(read(path), said, strict=True)])
    found, model, tokenizer, listed, media, keep = scored(models, root, "msvd-caption", mask=mask, batch=4)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    said = {"greedy": {}, "beam 3": {}}
    with torch.no_grad():
        for row in listed:
            tokens, _ = model.encode_video(shown(f"{media}/{row['video']}", 6), keep and keep(row["video"]))
            said["greedy"][row["video"]] = greedily(model, tokenizer, tokens, 32)
            said["beam 3"][row["video"]] = words(tokenizer, model.generate(tokens, None, 32, 3, cls, sep)[0].tolist()
                                                 ).replace(" [PAD]", "")
    for way, some in said.items():
        assert [(s["video"], s[way]) for s in found["said"]] == [(os.path.basename(v), t) for v, t in some.items()]
        wanted = score.caption_scores({row["video"]: row["caption"] for row in listed}, some)
        assert found["scores"][way] == pytest.approx(wanted)
    assert len(set(said["greedy"].values())) > 2 and said["greedy"] != said["beam 3"]


@pytest.mark.parametrize("task, wanted", [("didemo", [3, 10, 18, 25]), ("activitynet", [5, 16, 27, 38])])
def test_of_a_long_video_only_the_first_seconds_are_looked_at(models, root, monkeypatch, task, wanted):
    """45 seconds of 45 frames, each of a grey of its own: the middles of four quarters, of 30 seconds or of all."""
    grey = np.arange(10, 235, 5, dtype=np.uint8)
    os.makedirs("long")
    decoding.write_video("long/v.mp4", np.broadcast_to(grey[:, None, None, None], (45, 16, 16, 3)), fps=1, crf="0")
    write("own.json", [{"video": "v.mp4", "caption": ["a dog", "a cat"]}])
    for name in TASKS[task].test.split("|"):
        write(f"root/anno_downstream/{name}.json", read("own.json"))
    monkeypatch.setattr(score, "split_files", lambda *_: ("own.json", "long"))
    seen, real = [], ClusterSTM.encode_video
    monkeypatch.setattr(ClusterSTM, "encode_video", lambda self, video, keep, size: (
        seen.append(video), real(self, video, keep, size))[1])
    score.main(settings(models, root, task))
    frames = seen[0].double().mean((2, 3, 4))                               # (1, 4)
    assert (frames / 5 - 2).round().long().tolist() == [wanted]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def test_two_processes_find_what_one_finds(models, holes, whole, simple):
    """Also where videos are lost, and where there is a video for only one of them."""
    write("lone.json", [{"video": NAMES[0], "question": "what", "answer": "dog", "caption": ["a dog"]}])
    write("lone-choice.json", [{"video": NAMES[0], "caption": ["a dog", "a cat"], "answer": 1}])
    tasks = ("msvd", "ssv2-label", "msrvtt-mc", "sprites-qa", "msvd-caption")
    configs = [settings(models, folder, task, batch=2, rerank=3, beams=2, missing="skip", out=f"{i}-{task}.json")
               for i, folder in enumerate((whole, holes)) for task in tasks]
    lone = "lone-choice.json", "lone.json"
    configs += [settings(models, f"{whole}/videos", task, data=lone[task != "msrvtt-mc"], out=f"2-{task}.json",
                         answers=f"{whole}/anno_downstream/msvd_qa_answer_list.json") for task in tasks]
    configs.append(settings(models, whole, "msvd", mask="cluster_stm", batch=3, out="3-msvd.json"))
    alone = {cfg.out: score.main(cfg) for cfg in configs}
    for cfg in configs:
        os.remove(cfg.out)
    in_processes(2, lambda: [score.main(cfg) for cfg in configs])
    for cfg in configs:
        one, two = alone[cfg.out], read(cfg.out)
        assert one["scores"].keys() == two["scores"].keys(), cfg.out
        for how, scores in one["scores"].items():
            for name, value in scores.items():
                assert two["scores"][how][name] == pytest.approx(value, rel=1e-6), (cfg.out, how, name)
        assert {k: v for k, v in one.items() if k != "scores"} == {k: v for k, v in two.items() if k != "scores"}
        assert len(one["lost"]) == (2 if cfg.out[0] == "1" else 0), cfg.out


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def test_the_command_scores_and_says_where_it_wrote(trained, sprites, capsys):
    code, out, _ = command("eval.py", ["--checkpoint", f"{trained}/masked", "--data-root", sprites], capsys)
    assert code == 0 and f"written to {trained}/masked/eval-sprites-all.json" in out
    code, out, _ = command("eval.py", ["--help"], capsys)
    assert code == 0 and "--data-root" in out


@pytest.mark.parametrize("flags, message", [
    ("--task sprite", "there is no task 'sprite'; did you mean 'sprites'[?] There are: msrvtt, "),
    ("--task zzz", "there is no task 'zzz'[.] There are: msrvtt, "),
    ("--data own.json", "--data own.json wants --data-root"),
    ("--data nowhere.json --data-root .", "nowhere.json: no such annotation file"),
    ("--data bad.json --data-root .", "bad.json: not JSON"),
    ("--data-root nowhere", "nowhere: no such folder, wanted as --data-root"),
    ("--data-root .", "[.] has no anno_downstream/sprites_test.json, nor sprites_test.json beside it"),
    ("--data-root SPRITES --checkpoint nowhere", "nowhere.* it has no config.json"),
    ("--data-root SPRITES --checkpoint untokenized", "untokenized/tokenizer.json: no such tokenizer.json"),
    ("--data-root SPRITES --checkpoint out/first/teacher", "config.json has no 'model' part: no run of train.py"),
    ("--data-root SPRITES --mask clusters", "there is no mask 'clusters'; there are cluster_stm"),
    ("--data-root SPRITES --mask cluster_stm --mask-ratio 1", r"mask ratio is in \[0, 1\), got 1"),
    ("--data-root SPRITES --mask cluster_stm --teacher nowhere", "nowhere is no folder of a SigLIP: none is at "),
    ("--data-root SPRITES --frames -1", "data.frames -1: wants at least 1"),
    ("--data-root SPRITES --batch 0", "beams 3, batch 0 want to be positive"),
    ("--data-root SPRITES --beams 0", "beams 0, batch 32 want to be positive"),
    ("--data-root SPRITES --workers -2", "workers -2 at least -1"),
    ("--data-root SPRITES --split train", "'test'|'val'|invalid choice|test,val"),
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
# Java, last: by now METEOR has started

def test_captions_are_scored_by_pycocoevalcap_with_java(meteor, monkeypatch):
    if meteor is None:
        pytest.skip("there is no Java")
    from pycocoevalcap.meteor import meteor as module
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    monkeypatch.setattr(module, "Meteor", lambda: meteor)
    split = lambda texts: PTBTokenizer().tokenize({i: [{"caption": t} for t in some] for i, some in texts.items()})
    references, said = split(REFERENCES), split({i: [text] for i, text in SAID.items()})
    wanted = pycocoevalcap(references, said, meteor)
    found = score.caption_scores(REFERENCES, SAID)
    assert found == pytest.approx(wanted) and set(found) == {"CIDEr", "BLEU-4", "ROUGE-L", "METEOR"}
    assert 5 < found["METEOR"] < 100
    only = {i: texts[:1] for i, texts in REFERENCES.items()}
    best = score.caption_scores(only, {i: texts[0] for i, texts in only.items()})
    assert best == pytest.approx({"CIDEr": 1000, "BLEU-4": 100, "ROUGE-L": 100, "METEOR": 100})
    worst = score.caption_scores(REFERENCES, dict.fromkeys(REFERENCES, "zebras yawn loudly behind barns"))
    assert all(0 <= value < 1e-3 for value in worst.values())


def test_the_same_words_in_another_row_are_no_wrong_answer(models, root):
    """Two videos of one caption tie with each other's; T2V, where each looks for its own, is as published."""
    captions = "a dog", "A dog!", "a cat"
    write("twice.json", [{"video": v, "caption": c} for v, c in zip(NAMES[:3], captions, strict=True)])
    found = score.main(settings(models, root, "msvd", data="twice.json", data_root=f"{root}/videos"))
    clips = [found["scores"][how]["V2T"] for how in ("similarity", "match, top 128")]
    with torch.no_grad():
        model, tokenizer = load_model(models["retrieval"]), data.load_tokenizer(f"{models['retrieval']}/tokenizer.json")
        ids = data.encode(tokenizer, ["a dog", "a dog", "a cat"], 24)
        states, text = model.encode_text(ids)
        first = [[], []]
        for i, v in enumerate(NAMES[:3]):
            tokens, video = model.encode_video(shown(f"{root}/videos/{v}", found["frames"]))
            for some, s in zip(first, (text @ video[0], model.match(states, ids, tokens.expand(3, -1, -1))[:, 1]),
                               strict=True):
                some.append((s[0] > s[2]).item() == (i < 2))                # "a dog" before "a cat", where it is true
    assert [c["R@1"] for c in clips] == [pytest.approx(100 * sum(some) / 3) for some in first]
    assert any(c["R@1"] > 0 for c in clips)
