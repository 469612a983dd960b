"""eval.py: multiple choice, question answering and captioning against a loop over videos and texts, one at a time."""

import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.benchmarks import (
    ANSWERS,
    NAMES,
    as_list,
    captions_like,
    eval_config,
    load_json,
    questions_like,
    write_json,
)
from helpers.evaluation import evaluate_task, load_clip

import eval as evaluation
import metrics
from annotations import normalize_caption
from tokenizer import encode_texts

MASKED = pytest.mark.parametrize("mask", ["", "cluster_stm"])
NUM_CAPTIONS = [2, 3, 5, 7]     # of the rows of multiple choice


@MASKED
def test_multiple_choice_equals_a_loop(models, benchmarks_copy, mask):
    write_json(f"{benchmarks_copy}/anno_downstream/msrvtt_mc_test.json", [
        {"video": NAMES[i % 6], "caption": captions_like(n), "answer": i % n}
        for i, n in enumerate(NUM_CAPTIONS * 10)])
    results, model, tokenizer, rows, folder, visible_ids = evaluate_task(
        models, benchmarks_copy, "msrvtt-mc", mask=mask, batch=7, save_scores=True)
    with np.load("result-scores.npz") as f:
        saved = dict(f)
    correct, choices = Counter(), []
    with torch.no_grad():
        for row in rows:
            clip = load_clip(f"{folder}/{row['video']}", 4)
            tokens, video = model.encode_video(clip, visible_ids and visible_ids(row["video"]))
            p_match, similarity = [], []
            for caption in row["caption"]:
                ids = encode_texts(tokenizer, [normalize_caption(caption)], 32)
                states, text = model.encode_text(ids)
                no, yes = model.match(states, ids, tokens)[0].tolist()
                p_match.append(math.exp(yes) / (math.exp(yes) + math.exp(no)))
                similarity.append(math.exp((text[0] @ video[0]).item() / model.temp.item()))
            p_caption = [x / sum(similarity) for x in similarity]
            both = [0.7 * m + 0.3 * c for m, c in zip(p_match, p_caption, strict=True)]
            scores = {"0.7 match + 0.3 similarity": both, "match": p_match, "similarity": p_caption}
            for name, x in scores.items():
                expected = [*x, *[math.nan] * (max(NUM_CAPTIONS) - len(x))]
                assert saved[name][len(choices)] == pytest.approx(expected, rel=1e-4, nan_ok=True)
            choices.append({name: max(range(len(x)), key=x.__getitem__) for name, x in scores.items()})
            correct.update(name for name, choice in choices[-1].items() if choice == row["answer"])
    assert len({tuple(choice[name] for choice in choices) for name in choices[0]}) == 3      # they choose differently
    for name in choices[0]:
        assert results["scores"][name] == {"accuracy": pytest.approx(100 * correct[name] / 40)}
        low, high = results["intervals"][name]["accuracy"]
        assert low <= results["scores"][name]["accuracy"] <= high
    assert saved["correct"].tolist() == [row["answer"] for row in rows]
    assert json.loads(saved["videos"].tobytes()) == [f"{folder}/{row['video']}" for row in rows]
    assert json.loads(saved["captions"].tobytes()) == [list(map(normalize_caption, row["caption"])) for row in rows]
    chance = sum(1 / n for n in NUM_CAPTIONS) / 4
    assert results["scores"]["chance"] == {"accuracy": pytest.approx(100 * chance)} and results["questions"] == 40


# ---------------------------------------------------------------------------------------------------------------------
# Generation, by hand

def text_ids(tokenizer, text, length):
    """[CLS], the tokens of the text, [SEP]; truncated."""
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    return [cls, *tokenizer.encode(text, add_special_tokens=False).ids, sep][:length]


def join_tokens(tokenizer, ids):
    tokens = [tokenizer.id_to_token(i) for i in ids]
    return " ".join(token for token in tokens if token not in ("[PAD]", "[CLS]", "[SEP]")).replace(" ##", "")


def next_log_p(model, context, ids):
    """log p (vocab_size,) of the token after ids, given the context (1, S, C)."""
    decoder, ids = model.text_decoder, torch.tensor([ids])
    return decoder.lm_logits(decoder.forward_fusion(decoder.forward_text(ids), ids, context)[0, -1]).log_softmax(-1)


def generate_greedily(model, tokenizer, context, length):
    ids = text_ids(tokenizer, "", 1)
    while len(ids) < length:
        log_p = next_log_p(model, context, ids)
        log_p[0] = -math.inf                                                # [PAD] is never generated
        ids.append(log_p.argmax().item())
        if ids[-1] == tokenizer.token_to_id("[SEP]"):
            break
    return join_tokens(tokenizer, ids)


# ---------------------------------------------------------------------------------------------------------------------
# Question answering

@pytest.mark.parametrize("k, count_twice, mask", [
    (8, True, ""), (3, True, "cluster_stm"), (3, False, ""), (1, True, ""), (0, False, "cluster_stm")])
def test_question_answering_equals_a_loop(models, benchmarks_copy, k, count_twice, mask):
    questions = questions_like(NAMES * 4, 0, type=lambda i: f"type {i % 3}")
    for i, question in enumerate(questions):
        question["answer"] = ANSWERS[i % 8] if i % 5 else [ANSWERS[i % 8], "Dog"]
    write_json(f"{benchmarks_copy}/anno_downstream/msvd_qa_test.json", questions)
    results, model, tokenizer, rows, folder, visible_ids = evaluate_task(
        models, benchmarks_copy, "msvd-qa", mask=mask, rerank=k, batch=4, count_first_token_twice=count_twice)
    n = k or 8
    assert any(f"{n} of 8 answers" in phrase for phrase in results["protocol"])
    assert any(("twice" if count_twice else "once") in phrase for phrase in results["protocol"])
    as_generated = {answer: join_tokens(tokenizer, text_ids(tokenizer, answer, 5)) for answer in [*ANSWERS, "Dog"]}
    correct, changed, predictions = Counter(), Counter(), {}
    with torch.no_grad():
        for row in rows:
            clip = load_clip(f"{folder}/{row['video']}", 6)
            tokens, _ = model.encode_video(clip, visible_ids and visible_ids(row["video"]))
            ids = torch.tensor([text_ids(tokenizer, normalize_caption(row["question"]), 25)[:-1]])  # without [SEP]
            context = model.bert.forward_fusion(model.bert.forward_text(ids), ids, tokens)
            first, full = {}, {}
            for answer in ANSWERS:
                ids = text_ids(tokenizer, answer, 5)
                log_p = [next_log_p(model, context, ids[:t])[ids[t]].item() for t in range(1, len(ids))]
                first[answer], full[answer] = log_p[0], sum(log_p) + log_p[0] * count_twice
            top = sorted(ANSWERS, key=lambda answer: -first[answer])[:n]
            if n < 8:                                                       # no tie at the cut
                assert min(first[a] for a in top) > max(first[a] for a in ANSWERS if a not in top) + 1e-6
            ranked, generated = max(top, key=full.get), generate_greedily(model, tokenizer, context, 5)
            other_count = {answer: full[answer] + first[answer] * (1 - 2 * count_twice) for answer in top}
            changed["by the count"] += ranked != max(top, key=other_count.get)
            changed["by the cut"] += ranked != max(ANSWERS, key=full.get)
            predictions[row["question_id"]] = (ranked, generated)
            is_correct = ranked in as_list(row["answer"])
            correct.update({"ranking": is_correct, row["type"]: is_correct,
                            "generation": generated in {as_generated[answer] for answer in as_list(row["answer"])}})
    assert {p["question_id"]: (p["ranked"], p["generated"]) for p in results["predictions"]} == predictions
    assert (changed["by the count"] or n == 1 or mask) and (changed["by the cut"] or n == 8 or mask)
    assert len({ranked for ranked, _ in predictions.values()}) > (n > 1)
    assert len({generated for _, generated in predictions.values()}) > 5
    ranking, generation = results["scores"][f"ranking, top {n}"], results["scores"]["generation"]
    assert ranking["all"] == pytest.approx(100 * correct["ranking"] / 24)
    assert generation["all"] == pytest.approx(100 * correct["generation"] / 24)
    for name in ("type 0", "type 1", "type 2"):
        assert ranking[name] == pytest.approx(100 * correct[name] / 8)


def test_a_generated_answer_is_correct_up_to_case_and_truncation(models, benchmarks_copy, monkeypatch):
    tokenizer = models["tokenizer"]
    cases = [("Zebra Crossing", "zebra sounds", True), ("dog", "dog", True), ("DOG", "dog", True),
             ("dog", "yes", False), ("a red ball", "a red ball", True), (["snow", "dog"], "dog", True)]
    generated = iter([(text_ids(tokenizer, text, 9) + [0] * 9)[:5] for _, text, _ in cases])
    monkeypatch.setattr(evaluation.VideoToText, "generate",
                        lambda self, context, *_: torch.tensor([next(generated) for _ in context]))
    write_json(f"{benchmarks_copy}/anno_downstream/msvd_qa_test.json", [
        {"video": NAMES[0], "question": "what", "question_id": i, "answer": answer}
        for i, (answer, _, _) in enumerate(cases)])
    results = evaluation.main(eval_config(models, benchmarks_copy, "msvd-qa"))
    assert [p["correct"][1] for p in results["predictions"]] == [is_correct for *_, is_correct in cases]


# ---------------------------------------------------------------------------------------------------------------------
# Captioning

@MASKED
def test_captioning_equals_a_loop(models, benchmarks_copy, no_java, mask):
    predictions = evaluation.main(eval_config(models, benchmarks_copy, "msvd-caption", mask=mask))["predictions"]
    path = f"{benchmarks_copy}/anno_downstream/msvd_cap_test.json"
    rows = load_json(path)
    for row, prediction in zip(rows, predictions, strict=True):             # otherwise all scores would be 0
        if len(prediction["greedy"]) > 9:
            row["caption"] = [prediction["greedy"]] * 2 + row["caption"]
    write_json(path, rows)
    results, model, tokenizer, rows, folder, visible_ids = evaluate_task(models, benchmarks_copy, "msvd-caption",
                                                                         mask=mask, batch=4)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    captions = {"greedy": {}, "beam 3": {}}
    with torch.no_grad():
        for row in rows:
            name = row["video"]
            tokens, _ = model.encode_video(load_clip(f"{folder}/{name}", 6), visible_ids and visible_ids(name))
            captions["greedy"][name] = generate_greedily(model, tokenizer, tokens, 32)
            captions["beam 3"][name] = join_tokens(tokenizer, model.generate(tokens, None, 32, 3, cls, sep)[0].tolist())
    references = {row["video"]: row["caption"] for row in rows}
    for name, expected in captions.items():
        assert [(p["video"], p[name]) for p in results["predictions"]] == [
            (os.path.basename(video), caption) for video, caption in expected.items()]
        assert results["scores"][name] == pytest.approx(metrics.caption_scores(references, expected))
        intervals = results["intervals"][name]
        assert [metric.split()[0] for metric in intervals] == ["CIDEr", "ROUGE-L"]         # not the corpus' BLEU-4
        assert all(low <= results["scores"][name][metric] <= high for metric, (low, high) in intervals.items())
    assert len(set(captions["greedy"].values())) > 2 and captions["greedy"] != captions["beam 3"]


# References and predictions for five clips, and both as words, split by hand.
REFERENCES = {"a": ["A man is riding a horse.", "The man's horse runs!", "a rider on a horse"],
              "b": ["Two dogs play in the snow", "dogs -- playing in snow"], "c": ["a woman cooks pasta (and sings)"],
              "d": ["Someone is cooking now", "cooking", "cooking"], "e": ["A red car drives down the road."]}
PREDICTIONS = {"a": "a man rides a horse", "b": "Two dogs play in the snow.", "c": "a dog", "d": "a woman is cooking",
               "e": ""}
REFERENCE_WORDS = {
    "a": ["a man is riding a horse", "the man s horse runs", "a rider on a horse"],
    "b": ["two dogs play in the snow", "dogs playing in snow"], "c": ["a woman cooks pasta and sings"],
    "d": ["someone is cooking now", "cooking", "cooking"], "e": ["a red car drives down the road"]}
PREDICTION_WORDS = {"a": ["a man rides a horse"], "b": ["two dogs play in the snow"], "c": ["a dog"],
                    "d": ["a woman is cooking"], "e": [""]}
NOTHING_IN_COMMON = "zebras yawn loudly behind barns"


def pycocoevalcap_scores(references, predictions, meteor=None):
    """Each score through pycocoevalcap's own interface; the words are split already."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    scores = {"CIDEr": Cider().compute_score(references, predictions)[0],
              "ROUGE-L": Rouge().compute_score(references, predictions)[0],
              "BLEU-4": Bleu(4).compute_score(references, predictions, verbose=0)[0][3]}
    if meteor:
        scores["METEOR"] = meteor.compute_score(references, predictions)[0]
    return {name: 100 * value for name, value in scores.items()}


@pytest.fixture(scope="module", autouse=True)
def meteor():
    """METEOR, or None without Java. It is started before the first test: it reads for ten seconds before it answers."""
    if not shutil.which("java"):
        yield None
        return
    from pycocoevalcap.meteor.meteor import Meteor
    yield Meteor()


def test_caption_scores_without_java_are_those_of_pycocoevalcap(no_java, capfd):
    scores = metrics.caption_scores(REFERENCES, PREDICTIONS)
    assert capfd.readouterr() == ("", "")
    expected = pycocoevalcap_scores(REFERENCE_WORDS, PREDICTION_WORDS)
    assert scores == pytest.approx({f"{name} (simple tokenizer)": value for name, value in expected.items()})
    assert all(5 < value < 200 for value in scores.values())
    assert list(metrics.caption_scores(REFERENCES, PREDICTIONS, cider_only=True)) == ["CIDEr (simple tokenizer)"]


def test_scores_of_videos_have_the_mean_as_the_score_of_all(no_java):
    scores, by_video = metrics.caption_scores_by_video(REFERENCES, PREDICTIONS)
    assert list(by_video) == ["CIDEr (simple tokenizer)", "ROUGE-L (simple tokenizer)"]
    for name, values in by_video.items():
        assert len(values) == 5 and values.mean() == pytest.approx(scores[name]) and values[2] < values[1]


def test_caption_scores_are_highest_for_references_and_0_without_overlap(no_java):
    references = {i: captions[:1] for i, captions in REFERENCES.items()}
    scores = metrics.caption_scores(references, {i: captions[0] for i, captions in references.items()})
    assert scores == pytest.approx({"CIDEr (simple tokenizer)": 1000, "BLEU-4 (simple tokenizer)": 100,
                                    "ROUGE-L (simple tokenizer)": 100})
    scores = metrics.caption_scores(REFERENCES, dict.fromkeys(REFERENCES, NOTHING_IN_COMMON))
    assert all(0 <= value < 1e-3 for value in scores.values())


def test_a_repeated_reference_counts_as_often_as_it_is_there(no_java):
    name = "CIDEr (simple tokenizer)"
    cider = lambda captions: metrics.caption_scores({**REFERENCES, "d": captions}, PREDICTIONS)[name]
    assert cider(REFERENCES["d"]) != pytest.approx(cider(REFERENCES["d"][:2]), rel=1e-3)


# Every character that str.splitlines or the tokenizer's Java takes to be the end of a line, alone and doubled.
LINE_ENDS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\n\n", "\r\r"]
PLACES = [("A man", "A{}man"), ("A man", "{}A man"), ("a horse.", "a horse.{}"), ("riding", "riding {} ")]


def with_line_end(texts, old, new):
    """texts with `old` replaced by `new` in the first text of all."""
    first = next(iter(texts))
    changed = texts[first][0].replace(old, new) if isinstance(texts[first], list) else texts[first].replace(old, new)
    return {**texts, first: [changed, *texts[first][1:]] if isinstance(texts[first], list) else changed}


@pytest.mark.parametrize("old, new", PLACES, ids=[repr(new) for _, new in PLACES])
def test_a_line_end_in_a_caption_changes_no_score_without_java(no_java, old, new):
    perfect = {i: captions[0] for i, captions in REFERENCES.items()}
    expected = metrics.caption_scores(REFERENCES, perfect)
    for end in LINE_ENDS:
        assert metrics.caption_scores(with_line_end(REFERENCES, old, new.format(end)), perfect) == expected, end
        assert metrics.caption_scores(REFERENCES, with_line_end(perfect, old, new.format(end))) == expected, end


# The last tests: by now METEOR has started.

def test_a_line_end_in_a_caption_changes_no_score_with_java(meteor, monkeypatch):
    """Of captions that are all perfect, so that a shift by one would ruin each score."""
    if meteor is None:
        pytest.skip("there is no Java")
    from pycocoevalcap.meteor import meteor as module
    monkeypatch.setattr(module, "Meteor", lambda: meteor)
    perfect = {i: captions[0] for i, captions in REFERENCES.items()}
    expected = metrics.caption_scores(REFERENCES, perfect)
    assert expected["CIDEr"] > 400 and expected["METEOR"] == pytest.approx(100)
    ends = "".join(LINE_ENDS)
    for old, new in PLACES:
        for end in [ends] if new != "A{}man" else [*LINE_ENDS, ends]:
            assert metrics.caption_scores(with_line_end(REFERENCES, old, new.format(end)), perfect) == expected, end
    assert metrics.caption_scores(REFERENCES, with_line_end(perfect, "A man", f"A{ends}man")) == expected
    spaces = "".join(chr(c) for c in range(0x3001) if chr(c).isspace())     # others too, of which none is a line end
    assert metrics.caption_scores(with_line_end(REFERENCES, "A man", f"A{spaces}man"), perfect) == expected



def test_caption_scores_with_java_are_those_of_pycocoevalcap(meteor, monkeypatch):
    if meteor is None:
        pytest.skip("there is no Java")
    from pycocoevalcap.meteor import meteor as module
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    monkeypatch.setattr(module, "Meteor", lambda: meteor)

    def split_words(texts):
        return PTBTokenizer().tokenize({i: [{"caption": c} for c in captions] for i, captions in texts.items()})

    references, predictions = split_words(REFERENCES), split_words({i: [c] for i, c in PREDICTIONS.items()})
    scores = metrics.caption_scores(REFERENCES, PREDICTIONS)
    assert scores == pytest.approx(pycocoevalcap_scores(references, predictions, meteor))
    assert set(scores) == {"CIDEr", "BLEU-4", "ROUGE-L", "METEOR"} and 5 < scores["METEOR"] < 100
    references = {i: captions[:1] for i, captions in REFERENCES.items()}
    scores = metrics.caption_scores(references, {i: captions[0] for i, captions in references.items()})
    assert scores == pytest.approx({"CIDEr": 1000, "BLEU-4": 100, "ROUGE-L": 100, "METEOR": 100})
    scores = metrics.caption_scores(REFERENCES, dict.fromkeys(REFERENCES, NOTHING_IN_COMMON))
    assert all(0 <= value < 1e-3 for value in scores.values())
