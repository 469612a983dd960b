"""Answers and captions against transformers, against loops in fp64 that form one prefix at a time, and learned."""

import json
import re
from dataclasses import asdict, replace
from functools import lru_cache

import pytest
import torch
from test_model import CFG, FP32, TIGHT, heavy, random_batch, random_ids, random_keep, random_video, student, two_parts
from test_teacher import hugging_face, shaken

import data
from data import Question, Sample
from model import Bert, ClusterSTM, VideoToText, load_model, save_weights
from teacher import Guide

CLS, SEP = 2, 3
# Answers of every length, the shortest of [SEP] alone, the longest cut, so without one; [CLS] and [UNK] may be said.
ANSWERS = torch.tensor([[2, 9, 3, 0, 0], [2, 3, 0, 0, 0], [2, 7, 8, 9, 10], [2, 2, 1, 3, 0], [2, 11, 5, 0, 0],
                        [2, 9, 9, 9, 3], [2, 9, 3, 0, 0]])
ASKED = torch.tensor([2, 0, 2, 1, 0, 2, 1])
ROWS = torch.tensor([1, 0, 1])                                                          # two clips, three questions
KINDS = pytest.mark.parametrize("asks", [True, False], ids=["answers", "captions"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def speaker(asks=True, seed=0, **changes):
    model = VideoToText(replace(CFG, **changes), asks)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and not name.startswith("vit."):
                p.mul_((12 / 768) ** 0.5)                                   # as small as a wide BERT's
    return shaken(model, seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("words") / "tokenizer.json")
    data.train_tokenizer(["a red cat", "a blue cat sat", "what is it", "rab"], path)
    return data.load_tokenizer(path)


def remembered(model, questions=None, seed=0):
    """What the decoder attends to, and where there is something: of three questions about two clips, or of clips."""
    questions = random_ids(3, seed=seed) if questions is None else questions
    rows = ROWS if len(questions) == 3 else torch.arange(len(questions))
    with torch.no_grad():
        return model.ask(model.vit(random_video(3 if model.bert is None else len(questions), seed=seed)), questions,
                         rows)


# ---------------------------------------------------------------------------------------------------------------------
# By hand: one text, one place, one head at a time; no padding, no mask, no batch, no cache

def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2


def looks(attention, x, context):
    """A place x (D,) looks at context (S, C) -> (D,)."""
    a, mixed = attention.self, []
    q, k, v = linear(x, a.query), linear(context, a.key), linear(context, a.value)
    d = len(q) // a.heads
    for i in range(0, len(q), d):
        weight = (k[:, i:i + d] @ q[i:i + d] / d ** 0.5).exp()
        mixed.append(weight / weight.sum() @ v[:, i:i + d])
    return norm(x + linear(torch.cat(mixed), attention.output.dense), attention.output.LayerNorm)


def states(bert, ids, memory, causal):
    """ids, a list without [PAD], memory (S, C) that the fusion layers look at -> (L, D)."""
    e = bert.bert.embeddings
    x = torch.stack([norm(e.word_embeddings.weight[i] + e.position_embeddings.weight[t]
                          + e.token_type_embeddings.weight[0], e.LayerNorm) for t, i in enumerate(ids)])
    for n, layer in enumerate(bert.bert.encoder.layer):
        after = []
        for t in range(len(ids)):
            y = looks(layer.attention, x[t], x[:t + 1] if causal else x)
            if n >= len(bert.bert.encoder.layer) - bert.cfg.fusion_layers:
                y = looks(layer.crossattention, y, memory)
            z = linear(gelu(linear(y, layer.intermediate.dense)), layer.output.dense)
            after.append(norm(y + z, layer.output.LayerNorm))
        x = torch.stack(after)
    return x


def speech(model, memory, there=None):
    """(M, S, C) -> log p of the next piece (vocab,), as a function of a place in memory and a prefix."""
    decoder = model.text_decoder
    p = decoder.cls.predictions

    @lru_cache(None)
    def next_piece(m, prefix):
        with torch.no_grad():
            known = memory[m] if there is None else memory[m][there[m]]
            x = states(decoder, prefix, known.double(), causal=True)[-1]
            x = norm(gelu(linear(x, p.transform.dense)), p.transform.LayerNorm)
            likely = (x @ decoder.bert.embeddings.word_embeddings.weight.T + p.bias).exp()
            return (likely / likely.sum()).log()

    return next_piece


def likelihood(say, m, answer):
    """log p of each piece of an answer, a list of ids, up to its first [PAD]."""
    answer = tuple(answer[:answer.index(0)] if 0 in answer else answer)
    return [say(m, answer[:t])[answer[t]].item() for t in range(1, len(answer))]


def beam_search(say, m, vocab, length, beams):
    """What is said: of the sentences so far and all that continue them, always the `beams` of the best mean log p."""
    found = [((CLS,), 0.0)]
    mean = lambda sentence: sentence[1] / max(1, len(sentence[0]) - 1)
    for _ in range(length - 1):
        longer = [(ids, p) for ids, p in found if ids[-1] == SEP]
        for ids, p in found:
            if ids[-1] != SEP:
                longer += [(ids + (piece,), p + say(m, ids)[piece].item()) for piece in range(1, vocab)]
        found = sorted(longer, key=mean, reverse=True)[:beams]
    return [*found[0][0]] + [0] * (length - len(found[0][0]))


def all_sentences(vocab, length):
    """Every one that ends in [SEP] or is as long as it may be."""
    open_, whole = [(CLS,)], []
    for _ in range(length - 1):
        open_ = [ids + (piece,) for ids in open_ for piece in range(1, vocab)]
        whole += [ids for ids in open_ if ids[-1] == SEP]
        open_ = [ids for ids in open_ if ids[-1] != SEP]
    return whole + open_


# ---------------------------------------------------------------------------------------------------------------------
# What the decoder sees

@KINDS
def test_a_place_sees_none_after_it_and_all_before_it(asks):
    model = speaker(asks)
    decoder, (memory, _) = model.text_decoder, remembered(model)
    ids = random_ids(3, L=7)
    ids[:] = torch.where(ids == 0, 5, ids)                                              # no padding
    with torch.no_grad():
        before = decoder.fuse(decoder.text(ids), ids, memory)
        for t in range(7):
            other = ids.clone()
            other[:, t] = 39 - ids[:, t] % 2
            after = decoder.fuse(decoder.text(other), other, memory)
            torch.testing.assert_close(after[:, :t], before[:, :t], **TIGHT)
            assert not torch.isclose(after[:, t:], before[:, t:], atol=1e-6).all(-1).any()


def test_a_decoder_has_a_mask_of_its_own_and_the_encoders_is_as_it_was():
    model, ids = speaker(), random_ids(4)
    assert torch.equal(model.bert.mask(ids), (ids != 0)[:, None, None])
    mask = model.text_decoder.mask(ids)
    assert mask.tolist() == [[[[j <= i and bool(row[j]) for j in range(7)] for i in range(7)]] for row in ids.tolist()]
    assert not model.bert.cfg.is_decoder and not student().bert.cfg.is_decoder


def test_the_encoder_sees_both_ways():
    model, ids = speaker(), random_ids(3)
    ids[:, 2] = 6
    other = torch.cat([ids[:, :2], torch.full((3, 1), 7), ids[:, 3:]], 1)
    (a, _), (b, _) = remembered(model, ids), remembered(model, other)
    assert not torch.isclose(a[:, 0], b[:, 0]).all(-1).any()


def test_padding_of_questions_changes_nothing():
    model, ids = speaker(), random_ids(3)
    a = remembered(model, ids)
    longer = remembered(model, torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], 1))
    with torch.no_grad():
        found, expected = (model.log_likelihood(ANSWERS, ASKED, *m) for m in (longer, a))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for beams in (1, 3):
            assert torch.equal(model.generate(*longer, 6, beams, CLS, SEP), model.generate(*a, 6, beams, CLS, SEP))
        # ... nor what stands where there is no word.
        noise = torch.where(a[1][..., None], a[0], torch.randn_like(a[0]))
        torch.testing.assert_close(model.log_likelihood(ANSWERS, ASKED, noise, a[1]), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(model.generate(noise, a[1], 6, 3, CLS, SEP), model.generate(*a, 6, 3, CLS, SEP))


def test_a_question_is_read_with_its_clip_by_all_layers():
    model, ids = speaker(), random_ids(3)
    with torch.no_grad():
        tokens = model.vit(random_video(2))
        memory, there = model.ask(tokens, ids, ROWS)
        assert there.tolist() == (ids != 0).tolist()
        for q, clip in enumerate(ROWS.tolist()):
            question = [i for i in ids[q].tolist() if i]
            expected = states(model.bert, question, tokens[clip], causal=False)
            torch.testing.assert_close(memory[q, :len(question)], expected, **TIGHT)
        bare = speaker(asks=False)
        memory, there = bare.ask(tokens, ids, ROWS)
        assert memory is tokens and there is None


# ---------------------------------------------------------------------------------------------------------------------
# log p and the loss

@KINDS
def test_log_likelihood_is_the_softmax_of_each_piece_after_its_prefix(asks):
    model = speaker(asks)
    memory, there = remembered(model)
    say = speech(model, memory, there)
    with torch.no_grad():
        found = model.log_likelihood(ANSWERS, ASKED, memory, there)
    assert found.shape == (7, 4) and found.dtype == torch.float32
    for row, answer, m in zip(found, ANSWERS.tolist(), ASKED.tolist(), strict=True):
        expected = likelihood(say, m, answer)
        torch.testing.assert_close(row[:len(expected)].double(), torch.tensor(expected, dtype=torch.float64), **FP32)
        assert not row[len(expected):].any()
    assert abs(found[0, 0] - found[6, 0]) > 1e-3                            # one answer to two questions


def samples(captions=False):
    """Three clips, of 2, 1 and 3 questions with one answer or several; or as many with captions to say."""
    videos = random_video(3)
    asked = [[Question("what is it", {"red cat": 1.0}), Question("it", {"a": 0.25, "blue cat": 0.75})],
             [Question("is a cat what", {"sat": 0.5, "a blue cat sat": 0.25, "rab": 0.25})],
             [Question("a", {"rabcab": 1.0}), Question("what", {"red": 1.0}), Question("is", {"blue": 1.0})]]
    if captions:
        asked = [[Question("", {a: w / len(some) for q in some for a, w in q.answers.items()})] for some in asked]
    return [Sample(video, "a cat", "a cat", m, m, 0, some)
            for m, (video, some) in enumerate(zip(videos, asked, strict=True))]


@KINDS
@pytest.mark.parametrize("told", [None, Guide(random_keep(3)), heavy(Guide(random_keep(3)))],
                         ids=["all", "kept", "sized"])
def test_the_loss_is_summed_over_pieces_weighted_over_answers_and_averaged_over_questions(asks, told, tokenizer):
    model, clips = speaker(asks, vocab=tokenizer.get_vocab_size()), samples(captions=not asks)
    batch = data.collate(clips, tokenizer, 6, 0, answer_length=6)
    with torch.no_grad():
        loss = model(batch, told)
        cost, count = 0.0, 0
        for b, clip in enumerate(clips):
            part = [x if x is None else x[b:b + 1] for x in (told.keep, told.size)] if told else []
            tokens = model.vit(clip.video[None], *part)[0]
            for question in clip.questions:
                memory, count = tokens, count + 1
                if asks:
                    ids = [CLS, *tokenizer.encode(question.text, add_special_tokens=False).ids][:6]
                    memory = states(model.bert, ids, tokens, causal=False)
                say = speech(model, memory[None])
                for answer, weight in question.answers.items():
                    ids = [CLS, *tokenizer.encode(answer, add_special_tokens=False).ids, SEP][:6]
                    cost -= weight * sum(likelihood(say, 0, ids))
    assert [*loss] == ["lm"] and count == (6 if asks else 3)
    assert loss["lm"].item() == pytest.approx(cost / count, rel=1e-5)


@KINDS
def test_every_parameter_that_speaks_learns(asks, tokenizer):
    model = speaker(asks, vocab=tokenizer.get_vocab_size()).train()
    model(data.collate(samples(not asks), tokenizer, 6, 0, answer_length=6))["lm"].backward()
    rest = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert rest == {name for name, _ in model.named_parameters() if name.startswith("bert.cls.")}


@KINDS
def test_under_autocast_log_p_is_fp32_and_near(asks):
    model = speaker(asks).float()
    with torch.no_grad():
        memory, there = remembered(model)
        exact = model.log_likelihood(ANSWERS, ASKED, memory, there)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.log_likelihood(ANSWERS, ASKED, *remembered(model))
            said = model.generate(*remembered(model), 5, 3, CLS, SEP)
    assert found.dtype == torch.float32 and said.shape == (3, 5)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


def test_the_decoder_is_transformers_bert_lm_head_model():
    hf, model = hugging_face(), speaker().float()
    decoder, c = model.text_decoder, model.text_decoder.cfg
    for attention in ("eager", "sdpa"):
        theirs = hf.BertLMHeadModel(hf.BertConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size, is_decoder=True,
            add_cross_attention=True, attn_implementation=attention)).eval()
        lacks = theirs.load_state_dict(decoder.state_dict(), strict=False)
        assert not lacks.unexpected_keys and all(".decoder." in key for key in lacks.missing_keys)      # tied
        theirs.tie_weights()
        there = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]])
        memory, said = torch.randn(3, 6, 12), ANSWERS != 0
        with torch.no_grad():
            expected = theirs(ANSWERS, attention_mask=said.long(), encoder_hidden_states=memory[ASKED],
                              encoder_attention_mask=there[ASKED], output_hidden_states=True)
            found = decoder.fuse(decoder.text(ANSWERS), ANSWERS, memory, ASKED, there.bool()[ASKED][:, None, None])
            torch.testing.assert_close(found[said], expected.hidden_states[-1][said], rtol=0, atol=1e-5)
            torch.testing.assert_close(decoder.words(found)[said], expected.logits[said], rtol=0, atol=1e-5)
            p = expected.logits[:, :-1].log_softmax(-1).gather(2, ANSWERS[:, 1:, None])[..., 0] * said[:, 1:]
            torch.testing.assert_close(model.log_likelihood(ANSWERS, ASKED, memory, there.bool()), p, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is said

def talker(asks=True, vocab=10, seed=2):
    """One that hears well and is never sure: it says things of all lengths, others with other numbers of beams."""
    model = speaker(asks, seed, vocab=vocab)
    with torch.no_grad():
        for layer in model.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(2)
        for p in model.text_decoder.cls.predictions.transform.LayerNorm.parameters():
            p.mul_(0.4)
    return model


def heard(model, Q=12, seed=2):
    """Memory of Q places: states of questions of all lengths, or tokens."""
    g = torch.Generator().manual_seed(seed)
    memory = 2 * torch.randn(Q, 7, 12 if model.bert else 16, generator=g, dtype=torch.float64)
    return memory, random_ids(Q) != 0 if model.bert else None


@KINDS
@pytest.mark.parametrize("beams", [1, 2, 3, 5, 8])
def test_what_is_said_is_what_a_search_that_forms_each_sentence_anew_finds(asks, beams):
    model = talker(asks)
    memory, there = heard(model)
    say = speech(model, memory, there)
    found = model.generate(memory, there, 7, beams, CLS, SEP).tolist()
    assert found == [beam_search(say, m, 10, 7, beams) for m in range(12)]
    assert len({tuple(row) for row in found}) > 4 and len({row.index(0) if 0 in row else 7 for row in found}) > 2


@pytest.mark.parametrize("length", [2, 3, 4])
def test_with_as_many_beams_as_sentences_the_best_of_all_is_said(length):
    model = talker(vocab=5, seed=4)
    memory, there = heard(model)
    say, every = speech(model, memory, there), all_sentences(5, length)
    assert len(every) == {2: 4, 3: 13, 4: 40}[length]
    found = model.generate(memory, there, length, len(every), CLS, SEP).tolist()
    for m, row in enumerate(found):
        best = max(every, key=lambda ids: sum(likelihood(say, m, [*ids])) / (len(ids) - 1))
        assert row == [*best] + [0] * (length - len(best))
    if length == 4:                         # it is not what greed says; some end early, some not at all
        assert found != model.generate(memory, there, length, 1, CLS, SEP).tolist()
        assert {row.index(SEP) if SEP in row else 0 for row in found} >= {0, 1}


@KINDS
def test_a_batch_is_told_what_each_of_it_is_told_alone(asks):
    model = talker(asks)
    memory, there = heard(model)
    for beams in (1, 4):
        together = model.generate(memory, there, 7, beams, CLS, SEP)
        for m in range(12):
            alone = model.generate(memory[m:m + 1], None if there is None else there[m:m + 1], 7, beams, CLS, SEP)
            assert torch.equal(alone[0], together[m])


@pytest.mark.parametrize("beams", [1, 2, 4, 60])
def test_after_sep_comes_pad_alone_and_pad_nowhere_else(beams):
    model = talker()
    memory, there = heard(model)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[0] += 9.0                   # it would like to say [PAD]
    found = model.generate(memory, there, 8, beams, CLS, SEP)
    assert found.shape == (12, 8) and (found[:, 0] == CLS).all()
    for row in found.tolist():
        end = row.index(SEP) + 1 if SEP in row else 8
        assert 0 not in row[:end] and not any(row[end:])
    assert (found == SEP).any(1).any() and not (found == SEP).any(1).all()


def test_what_is_finished_stays_while_others_go_on():
    """[SEP] at once is the likeliest by far: it is said with any number of beams, however long others may grow."""
    model = talker()
    memory, there = heard(model)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[SEP] += 30.0
    for beams in (1, 3):
        assert model.generate(memory, there, 8, beams, CLS, SEP).tolist() == [[CLS, SEP] + [0] * 6] * 12
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[SEP] -= 60.0                # and never
    assert not (model.generate(memory, there, 8, 3, CLS, SEP) == SEP).any()


def test_room_for_nothing_but_cls_is_filled_with_it():
    model = talker()
    assert model.generate(*heard(model), 1, 3, CLS, SEP).tolist() == [[CLS]] * 12


@KINDS
def test_kept_keys_and_values_are_those_of_all_places_at_once(asks):
    model = speaker(asks)
    decoder, (memory, there) = model.text_decoder, remembered(model)
    ids = random_ids(5)
    ids[ids == 0] = 5
    rows = torch.tensor([2, 0, 1, 1, 2])
    known = None if there is None else there[rows][:, None, None]
    past, steps = [([], []) for _ in decoder.bert.encoder.layer], []
    with torch.no_grad():
        for t in range(7):
            x = decoder.bert.embeddings(ids[:, t:t + 1], t)
            for layer, kept in zip(decoder.bert.encoder.layer, past, strict=True):
                x = layer(x, None, memory, rows, known, kept)
            steps.append(x)
        torch.testing.assert_close(torch.cat(steps, 1), decoder.fuse(decoder.text(ids), ids, memory, rows, known),
                                   **TIGHT)
    for own, other in past:
        assert own[0].shape == (5, 2, 7, 6) and other[0].shape == (3, 2, memory.shape[1], 6)


def test_more_than_there_are_places_for_is_refused():
    model = talker()
    with pytest.raises(ValueError, match=r"^this BERT takes 512 word pieces, got 513$"):
        model.text_decoder.bert.embeddings(torch.ones(1, 2, dtype=torch.int64), 511)


# ---------------------------------------------------------------------------------------------------------------------
# From a student

@pytest.mark.parametrize("asks, widths", [(True, (16, 12)), (True, (12, 12)), (False, (16, 12)), (False, (12, 12))],
                         ids=str)
def test_the_decoder_begins_as_the_students_last_layers_words_and_head(asks, widths):
    pretrained = student(width=widths[0], text_width=widths[1])
    held = {key: x.clone() for key, x in pretrained.state_dict().items()}
    fresh = VideoToText(pretrained.cfg, asks).state_dict()
    model = VideoToText.from_student(pretrained, asks)
    ours = model.state_dict()
    assert [key for key in ours if key.startswith("vit.")] and ours.keys() == fresh.keys()
    assert any(key.startswith("bert.") for key in ours) == asks
    new = set()
    for key, x in ours.items():
        place = lambda layer: f"bert.encoder.layer.{int(layer[1]) + 1}."                # the second and third of three
        home = re.sub(r"bert\.encoder\.layer\.(\d)\.", place, key) if key.startswith("text_decoder.") else key
        home = re.sub(r"^text_decoder\.", "bert.", home)
        if asks and widths[0] != widths[1] and re.search(r"text_decoder.*crossattention\.self\.(key|value)\.", key):
            new.add(key)                                                    # they are made of something else
            assert 0.5 < x.std() / (0.02 * (768 / 12) ** 0.5) < 1.5 if key.endswith("weight") else not x.any()
        else:
            assert torch.equal(x, held[home].float()), key
    # What is of another width than the video: what a question's states are turned into.
    changed = {f"text_decoder.bert.encoder.layer.{i}.crossattention.self.{name}.{part}" for i in (0, 1)
               for name in ("key", "value") for part in ("weight", "bias")}
    assert new == (changed if asks and widths == (16, 12) else set())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(x, held[key]) for key, x in pretrained.state_dict().items())     # a copy


def test_a_captions_decoder_looks_at_the_video_as_the_student_did():
    """A text of one piece has no other to see: there a causal layer is the student's own."""
    pretrained = student()
    model = VideoToText.from_student(pretrained, asks=False).double().eval()
    ids, bert, decoder = torch.tensor([[7], [8]]), pretrained.bert, model.text_decoder
    with torch.no_grad():
        tokens = pretrained.vit(random_video(2))
        torch.testing.assert_close(model.vit(random_video(2)), tokens, rtol=1e-5, atol=1e-5)
        expected = bert.words(bert.fuse(bert.bert.embeddings(ids), ids, tokens))
        torch.testing.assert_close(decoder.words(decoder.fuse(decoder.text(ids), ids, tokens)), expected, rtol=1e-4,
                                   atol=1e-4)
        assert decoder.bert.encoder.layer[1].crossattention.self.key.weight.shape == (12, 16)


@KINDS
def test_a_small_one_learns_to_answer(asks, tokenizer):
    """Clips of one colour, the same questions of all, or none: the answer is in the video."""
    torch.manual_seed(1)
    video = (torch.tensor([0, 128, 255])[:, None, None, None, None] * torch.ones(3, 2, 3, 8, 12)).to(torch.uint8)
    answers = [("red cat", "sat"), ("a blue cat", "rab"), ("it", "what is")]
    asked = [[Question("what is it", {a: 1.0}), Question("a cat", {b: 1.0})] if asks else [Question("", {a: 1.0})]
             for a, b in answers]
    batch = data.collate([Sample(v, "", "", m, m, 0, q) for m, (v, q) in enumerate(zip(video, asked, strict=True))],
                         tokenizer, 6, 0, answer_length=6)
    cfg = replace(CFG, vocab=tokenizer.get_vocab_size())
    model = VideoToText.from_student(ClusterSTM(cfg), asks).train()
    optimizer, history = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(200):
        history.append(model(batch)["lm"])
        optimizer.zero_grad()
        history[-1].backward()
        optimizer.step()
    model.eval()
    assert history[-1] < 0.02 * history[0]
    with torch.no_grad():
        memory, there = model.ask(model.encode_video(batch.video)[0], batch.ids, batch.rows)
        wanted = [answer for some in asked for q in some for answer in q.answers]
        for beams in (1, 3):
            said = data.decode_answers(tokenizer, model.generate(memory, there, 6, beams, CLS, SEP))
            assert said == wanted
        every = data.encode_answers(tokenizer, wanted, 6)
        score = torch.stack([model.log_likelihood(every, torch.full((len(wanted),), q), memory, there).sum(1)
                             for q in range(len(wanted))])
        assert score.argmax(1).tolist() == [*range(len(wanted))]


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def write(model, folder):
    save_weights(model, folder)
    (folder / "config.json").write_text(json.dumps({"model": asdict(model.cfg), "lr": 1}))
    return str(folder)


MODELS = {"answers": lambda: speaker(True), "captions": lambda: speaker(False), "student": student}


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_comes_back_as_what_it_was(tmp_path, kind):
    model = MODELS[kind]().float()
    folder = write(model, tmp_path)
    for again in (load_model(folder), type(model).from_pretrained(folder)):
        assert type(again) is type(model) and again.cfg == model.cfg and not again.training
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, model.state_dict()[key]) for key, x in again.state_dict().items())
        assert kind == "student" or (again.bert is None) == (kind == "captions")
    if kind != "student":
        a, b = (x.generate(*remembered(x), 6, 2, CLS, SEP) for x in (model, again))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_the_other_kind_is_refused_in_one_line(tmp_path, kind):
    folder = write(MODELS[kind](), tmp_path)
    wanted, does = (VideoToText, "compares") if kind == "student" else (ClusterSTM, "speaks")
    with pytest.raises(ValueError) as error:
        wanted.from_pretrained(folder)
    assert str(error.value) == f"{folder} holds a model that {does}, wanted a {wanted.__name__}"


def test_a_folder_that_lacks_a_part_is_refused_by_name(tmp_path):
    model = speaker()
    del model.text_decoder.cls
    folder = write(model, tmp_path)
    with pytest.raises(ValueError, match=r"text_decoder\.cls\.predictions\.bias is not there, wanted \(40,\)$"):
        load_model(folder)
    with pytest.raises(ValueError, match=r"text_decoder\.cls\.predictions\.bias is not there, wanted \(40,\)$"):
        VideoToText.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A student that is fine-tuned masks no words

def test_without_mlm_the_other_losses_are_what_they_were():
    model, part = student(), random_batch(4)
    with torch.no_grad():
        a = model(*part)
        model.mlm, count = False, []
        model.bert.text, text = lambda ids: [count.append(len(ids)), text(ids)][1], model.bert.text
        b = model(*part)
    assert count == [4]                                     # no corrupted ones beside them
    assert [*a] == ["mrm", "vtc", "vtm", "mlm"] and [*b] == ["mrm", "vtc", "vtm"]
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert [*model(part[0], None)] == ["vtc", "vtm"]


def test_without_mlm_a_batch_can_come_in_parts():
    model, parts = student(), two_parts()
    with torch.no_grad():
        a = [model(*part, whole) for part, whole in zip(parts, model.whole(*zip(*parts, strict=True)), strict=True)]
        model.mlm = False
        wholes = model.whole(*zip(*parts, strict=True))
        b = [model(*part, whole) for part, whole in zip(parts, wholes, strict=True)]
    for one, other in zip(a, b, strict=True):
        assert [*other] == ["mrm", "vtc", "vtm"] and all(torch.equal(one[name], other[name]) for name in other)
    assert all(whole.words.isfinite() for whole in wholes)


def test_without_mlm_the_head_of_words_rests():
    model, part = student().train(), random_batch(4)
    model.mlm = False
    sum(model(*part).values()).backward()
    rest = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert rest == {name for name, _ in model.named_parameters() if name.startswith("bert.cls.")}


# ---------------------------------------------------------------------------------------------------------------------
# Words

def test_answers_are_cut_into_pieces_that_end_in_sep_and_back(tokenizer):
    texts = ["cat", "a red cat", "crab", "cats sat it", "", "A Red CAT", "red  cat"]
    ids = data.encode_answers(tokenizer, texts, 14)
    assert data.decode_answers(tokenizer, ids) == data.decode_answers(tokenizer, ids[:, 1:]) == [
        "cat", "a red cat", "crab", "cats sat it", "", "a red cat", "red cat"]
    for row, text in zip(ids.tolist(), texts, strict=True):
        pieces = tokenizer.encode(text, add_special_tokens=False).ids
        assert row == ([CLS, *pieces, SEP] + [0] * 14)[:14]
    assert [tokenizer.id_to_token(i) for i in ids[2].tolist() if i] == ["[CLS]", "c", "##r", "##a", "##b", "[SEP]"]


def test_what_is_too_long_is_cut_and_its_end_is_not_learned(tokenizer):
    text = "crab sat"                                                       # 5 pieces
    for length, whole in ((8, "crab sat"), (7, "crab sat"), (6, "crab sat"), (5, "crab"), (4, "cra")):
        ids, = data.encode_answers(tokenizer, [text], length)
        assert (SEP in ids.tolist()) == (length >= 7) and ids.shape == (length,)
        assert data.decode_answers(tokenizer, ids[None]) == [whole]


def test_nothing_after_the_first_sep_is_said(tokenizer):
    cat, red, unknown = (tokenizer.token_to_id(piece) for piece in ("cat", "red", "[UNK]"))
    part = tokenizer.token_to_id("##b")
    rows = [[CLS, cat, SEP, red, SEP], [CLS, SEP, cat, 0, 0], [SEP, 0, 0, 0, 0], [CLS, part, red, part, 0],
            [cat, unknown, CLS, red, SEP]]
    assert data.decode_answers(tokenizer, torch.tensor(rows)) == ["cat", "", "", "##b redb", "cat [UNK] red"]


def test_pad_is_the_decoders_pad():
    assert Bert.PAD == 0 and data.SPECIALS[0] == "[PAD]" and data.SPECIALS[CLS:SEP + 1] == ("[CLS]", "[SEP]")
