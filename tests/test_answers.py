"""VideoToText against transformers, against loops in fp64 that compute one prefix at a time, and trained."""

import re
from functools import lru_cache

import pytest
import torch
from helpers.models import (
    ANSWER_IDS,
    CLIP_INDEX,
    CLS,
    FP32,
    QUESTION_INDEX,
    SEP,
    TIGHT,
    configs,
    heavy,
    hugging_face,
    layer_norm,
    question_samples,
    random_ids,
    random_keep,
    random_video,
    seeded,
    student,
    video_to_text,
)

from annotations import Question
from data import Sample, collate
from model import ClusterSTM, VideoToText
from targets import TeacherTargets
from tokenizer import build_wordpiece, decode_ids, encode_answers, load_tokenizer

pytestmark = pytest.mark.usefixtures("seed_0")
BOTH = pytest.mark.parametrize("has_question", [True, False], ids=["answers", "captions"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    build_wordpiece(["a red cat", "a blue cat sat", "what is it", "rab"], path)
    return load_tokenizer(path)


def encoded_context(model, questions=None):
    """Context and mask of three questions about two clips, of as many clips as questions, or of three clips."""
    questions = random_ids(3) if questions is None else questions
    clip_index = CLIP_INDEX if len(questions) == 3 else torch.arange(len(questions))
    video = random_video(3 if model.bert is None else len(questions))
    with torch.no_grad():
        return model.encode_context(model.vit(video), questions, clip_index)


# ---------------------------------------------------------------------------------------------------------------------
# Oracles: one text, one position, one head at a time; no padding, no mask, no batch, no cache

def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2


def attention_ref(attention, x, context):
    """A position x (D,) attends to context (S, C) -> (D,)."""
    a, heads = attention.self, []
    q, k, v = linear(x, a.query), linear(context, a.key), linear(context, a.value)
    d = len(q) // a.heads
    for i in range(0, len(q), d):
        weight = (k[:, i:i + d] @ q[i:i + d] / d ** 0.5).exp()
        heads.append(weight / weight.sum() @ v[:, i:i + d])
    return layer_norm(x + linear(torch.cat(heads), attention.output.dense), attention.output.LayerNorm)


def states_ref(bert, ids, context, causal):
    """ids, a list without [PAD], context (S, C) of the fusion layers -> (L, D)."""
    e = bert.bert.embeddings
    x = torch.stack([layer_norm(e.word_embeddings.weight[i] + e.position_embeddings.weight[t]
                                + e.token_type_embeddings.weight[0], e.LayerNorm) for t, i in enumerate(ids)])
    for n, layer in enumerate(bert.bert.encoder.layer):
        outputs = []
        for t in range(len(ids)):
            y = attention_ref(layer.attention, x[t], x[:t + 1] if causal else x)
            if n >= len(bert.bert.encoder.layer) - bert.cfg.fusion_layers:
                y = attention_ref(layer.crossattention, y, context)
            z = linear(gelu(linear(y, layer.intermediate.dense)), layer.output.dense)
            outputs.append(layer_norm(y + z, layer.output.LayerNorm))
        x = torch.stack(outputs)
    return x


def log_p_ref(model, context, context_mask=None):
    """(Q, S, C) -> a function of q and a prefix: log p of the next token (vocab_size,)."""
    decoder = model.text_decoder
    p = decoder.cls.predictions

    @lru_cache(None)
    def log_p(q, prefix):
        with torch.no_grad():
            tokens = context[q] if context_mask is None else context[q][context_mask[q]]
            x = states_ref(decoder, prefix, tokens.double(), causal=True)[-1]
            x = layer_norm(gelu(linear(x, p.transform.dense)), p.transform.LayerNorm)
            weight = (x @ decoder.bert.embeddings.word_embeddings.weight.T + p.bias).exp()
            return (weight / weight.sum()).log()

    return log_p


def likelihood_ref(log_p, q, answer):
    """log p of each token of an answer, a list of ids, up to its first [PAD]."""
    answer = tuple(answer[:answer.index(0)] if 0 in answer else answer)
    return [log_p(q, answer[:t])[answer[t]].item() for t in range(1, len(answer))]


def beam_search_ref(log_p, q, vocab_size, length, beams):
    """Of all texts so far and all their continuations keep the `beams` with the best mean log p."""
    texts = [((CLS,), 0.0)]
    mean = lambda text: text[1] / max(1, len(text[0]) - 1)
    for _ in range(length - 1):
        longer = [(ids, p) for ids, p in texts if ids[-1] == SEP]
        for ids, p in texts:
            if ids[-1] != SEP:
                longer += [(ids + (token,), p + log_p(q, ids)[token].item()) for token in range(1, vocab_size)]
        texts = sorted(longer, key=mean, reverse=True)[:beams]
    return [*texts[0][0]] + [0] * (length - len(texts[0][0]))


def all_texts(vocab_size, length):
    """Every text that ends in [SEP] or has the full length."""
    unfinished, finished = [(CLS,)], []
    for _ in range(length - 1):
        unfinished = [ids + (token,) for ids in unfinished for token in range(1, vocab_size)]
        finished += [ids for ids in unfinished if ids[-1] == SEP]
        unfinished = [ids for ids in unfinished if ids[-1] != SEP]
    return finished + unfinished


# ---------------------------------------------------------------------------------------------------------------------
# Attention of the decoder

@BOTH
def test_a_position_depends_on_all_before_it_and_on_none_after_it(has_question):
    model = video_to_text(has_question)
    decoder, (context, _) = model.text_decoder, encoded_context(model)
    ids = random_ids(3, L=7)
    ids[ids == 0] = 5                                                               # no padding
    with torch.no_grad():
        states = decoder.forward_fusion(decoder.forward_text(ids), ids, context)
        for t in range(7):
            changed = ids.clone()
            changed[:, t] = 39 - ids[:, t] % 2
            other = decoder.forward_fusion(decoder.forward_text(changed), changed, context)
            torch.testing.assert_close(other[:, :t], states[:, :t], **TIGHT)
            assert not torch.isclose(other[:, t:], states[:, t:], atol=1e-6).all(-1).any()


def test_only_the_decoder_has_a_causal_mask():
    model, ids = video_to_text(), random_ids(4)
    assert torch.equal(model.bert.attention_mask(ids), (ids != 0)[:, None, None])
    mask = model.text_decoder.attention_mask(ids)
    assert mask.tolist() == [[[[j <= i and bool(row[j]) for j in range(7)] for i in range(7)]] for row in ids.tolist()]
    assert not model.bert.cfg.is_decoder and not student().bert.cfg.is_decoder


def test_the_encoder_attends_in_both_directions():
    model, ids = video_to_text(), random_ids(3)
    ids[:, 2] = 6
    other = torch.cat([ids[:, :2], torch.full((3, 1), 7), ids[:, 3:]], 1)
    (a, _), (b, _) = encoded_context(model, ids), encoded_context(model, other)
    assert not torch.isclose(a[:, 0], b[:, 0]).all(-1).any()


def test_padding_of_questions_changes_nothing():
    model, ids = video_to_text(), random_ids(3)
    context, mask = encoded_context(model, ids)
    longer = encoded_context(model, torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], 1))
    noise_at_padding = torch.where(mask[..., None], context, torch.randn_like(context)), mask
    with torch.no_grad():
        expected = model.log_likelihood(ANSWER_IDS, QUESTION_INDEX, context, mask)
        for other in (longer, noise_at_padding):
            found = model.log_likelihood(ANSWER_IDS, QUESTION_INDEX, *other)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            for beams in (1, 3):
                assert torch.equal(model.generate(*other, 6, beams, CLS, SEP),
                                   model.generate(context, mask, 6, beams, CLS, SEP))


def test_the_context_of_a_question_is_fused_with_its_clip():
    model, ids = video_to_text(), random_ids(3)
    with torch.no_grad():
        tokens = model.vit(random_video(2))
        context, mask = model.encode_context(tokens, ids, CLIP_INDEX)
        assert mask.tolist() == (ids != 0).tolist()
        for q, clip in enumerate(CLIP_INDEX.tolist()):
            question = [i for i in ids[q].tolist() if i]
            expected = states_ref(model.bert, question, tokens[clip], causal=False)
            torch.testing.assert_close(context[q, :len(question)], expected, **TIGHT)
        context, mask = video_to_text(has_question=False).encode_context(tokens, ids, CLIP_INDEX)
        assert context is tokens and mask is None


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood and loss

@BOTH
def test_log_likelihood_is_that_of_each_token_after_its_prefix(has_question):
    model = video_to_text(has_question)
    context = encoded_context(model)
    log_p = log_p_ref(model, *context)
    with torch.no_grad():
        rows = model.log_likelihood(ANSWER_IDS, QUESTION_INDEX, *context)
    assert rows.shape == (7, 4) and rows.dtype == torch.float32
    for row, answer, q in zip(rows, ANSWER_IDS.tolist(), QUESTION_INDEX.tolist(), strict=True):
        expected = torch.tensor(likelihood_ref(log_p, q, answer), dtype=torch.float64)
        torch.testing.assert_close(row[:len(expected)].double(), expected, **FP32)
        assert not row[len(expected):].any()
    assert abs(rows[0, 0] - rows[6, 0]) > 1e-3                              # one answer to two questions


@BOTH
@pytest.mark.parametrize("targets", [None, TeacherTargets(random_keep(3)), heavy(TeacherTargets(random_keep(3)))],
                         ids=["all", "visible", "sized"])
def test_the_loss_sums_tokens_weights_answers_and_averages_questions(has_question, targets, tokenizer):
    model = video_to_text(has_question, text={"vocab_size": tokenizer.get_vocab_size()})
    samples = question_samples(captions=not has_question)
    batch = collate(samples, tokenizer, 6, 0, max_answer_length=6)
    with torch.no_grad():
        losses = model(batch, targets)
        total, count = 0.0, 0
        for b, sample in enumerate(samples):
            visible = (targets.visible_ids, targets.token_size) if targets else ()
            tokens = model.vit(sample.video[None], *(x if x is None else x[b:b + 1] for x in visible))[0]
            for question in sample.questions:
                context, count = tokens, count + 1
                if has_question:
                    ids = [CLS, *tokenizer.encode(question.text, add_special_tokens=False).ids][:6]
                    context = states_ref(model.bert, ids, tokens, causal=False)
                log_p = log_p_ref(model, context[None])
                for answer, weight in question.answers.items():
                    ids = [CLS, *tokenizer.encode(answer, add_special_tokens=False).ids, SEP][:6]
                    total -= weight * sum(likelihood_ref(log_p, 0, ids))
    assert [*losses] == ["lm"] and count == (6 if has_question else 3)
    assert losses["lm"].item() == pytest.approx(total / count, rel=1e-5)


@BOTH
def test_every_parameter_but_the_question_encoders_head_gets_a_gradient(has_question, tokenizer):
    model = video_to_text(has_question, text={"vocab_size": tokenizer.get_vocab_size()}).train()
    model(collate(question_samples(not has_question), tokenizer, 6, 0, max_answer_length=6))["lm"].backward()
    untrained = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untrained == {name for name, _ in model.named_parameters() if name.startswith("bert.cls.")}


@BOTH
def test_log_likelihood_under_autocast_is_fp32_and_close(has_question):
    model = video_to_text(has_question).float()
    with torch.no_grad():
        exact = model.log_likelihood(ANSWER_IDS, QUESTION_INDEX, *encoded_context(model))
        with torch.autocast("cpu", torch.bfloat16):
            context = encoded_context(model)
            found = model.log_likelihood(ANSWER_IDS, QUESTION_INDEX, *context)
            generated = model.generate(*context, 5, 3, CLS, SEP)
    assert found.dtype == torch.float32 and generated.shape == (3, 5)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_decoder_equals_transformers_bert_lm_head_model(attention):
    hf, model = hugging_face(), video_to_text().float()
    decoder, c = model.text_decoder, model.text_decoder.cfg
    theirs = hf.BertLMHeadModel(hf.BertConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size, is_decoder=True,
        add_cross_attention=True, attn_implementation=attention)).eval()
    result = theirs.load_state_dict(decoder.state_dict(), strict=False)
    assert not result.unexpected_keys and all(".decoder." in key for key in result.missing_keys)    # tied
    theirs.tie_weights()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]])
    context, is_token = torch.randn(3, 6, 12), ANSWER_IDS != 0
    close = dict(rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = theirs(ANSWER_IDS, attention_mask=is_token.long(), encoder_hidden_states=context[QUESTION_INDEX],
                          encoder_attention_mask=mask[QUESTION_INDEX], output_hidden_states=True)
        states = decoder.forward_fusion(decoder.forward_text(ANSWER_IDS), ANSWER_IDS, context, QUESTION_INDEX,
                                        mask.bool()[QUESTION_INDEX][:, None, None])
        torch.testing.assert_close(states[is_token], expected.hidden_states[-1][is_token], **close)
        torch.testing.assert_close(decoder.lm_logits(states)[is_token], expected.logits[is_token], **close)
        log_p = expected.logits[:, :-1].log_softmax(-1).gather(2, ANSWER_IDS[:, 1:, None])[..., 0] * is_token[:, 1:]
        found = model.log_likelihood(ANSWER_IDS, QUESTION_INDEX, context, mask.bool())
        torch.testing.assert_close(found, log_p, **close)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def undecided(has_question=True, vocab_size=10, seed=2):
    """A model that depends on its context and is never sure: texts of all lengths, others with other beams."""
    model = video_to_text(has_question, seed, text={"vocab_size": vocab_size})
    with torch.no_grad():
        for layer in model.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(2)
        for p in model.text_decoder.cls.predictions.transform.LayerNorm.parameters():
            p.mul_(0.4)
    return model


def random_context(model):
    """Twelve contexts and their mask: states of questions of all lengths, or tokens."""
    width = (model.text_cfg if model.bert else model.vit_cfg).width
    context = 2 * torch.randn(12, 7, width, generator=seeded(2), dtype=torch.float64)
    return context, random_ids(12) != 0 if model.bert else None


@BOTH
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_generation_equals_a_beam_search_without_a_cache(has_question, beams):
    model = undecided(has_question)
    context = random_context(model)
    log_p = log_p_ref(model, *context)
    generated = model.generate(*context, 7, beams, CLS, SEP).tolist()
    assert generated == [beam_search_ref(log_p, q, 10, 7, beams) for q in range(12)]
    assert len({*map(tuple, generated)}) > 4 and len({row.index(0) if 0 in row else 7 for row in generated}) > 2


@pytest.mark.parametrize("length", [2, 3, 4])
def test_with_as_many_beams_as_texts_the_best_text_is_generated(length):
    model = undecided(vocab_size=5, seed=4)
    context = random_context(model)
    log_p, texts = log_p_ref(model, *context), all_texts(5, length)
    assert len(texts) == {2: 4, 3: 13, 4: 40}[length]
    generated = model.generate(*context, length, len(texts), CLS, SEP).tolist()
    for q, row in enumerate(generated):
        best = max(texts, key=lambda ids: sum(likelihood_ref(log_p, q, [*ids])) / (len(ids) - 1))
        assert row == [*best] + [0] * (length - len(best))
    if length == 4:                         # the greedy texts differ; some texts end early, some not at all
        assert generated != model.generate(*context, length, 1, CLS, SEP).tolist()
        assert {row.index(SEP) if SEP in row else 0 for row in generated} >= {0, 1}


@BOTH
@pytest.mark.parametrize("beams", [1, 4])
def test_a_text_does_not_depend_on_the_others_of_its_batch(has_question, beams):
    model = undecided(has_question)
    context, mask = random_context(model)
    together = model.generate(context, mask, 7, beams, CLS, SEP)
    for q in range(12):
        alone = model.generate(context[q:q + 1], None if mask is None else mask[q:q + 1], 7, beams, CLS, SEP)
        assert torch.equal(alone[0], together[q])


@pytest.mark.parametrize("beams", [1, 2, 4, 60])
def test_pad_comes_after_sep_and_nowhere_else(beams):
    model = undecided()
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[0] += 9.0                   # [PAD] is the likeliest token
    generated = model.generate(*random_context(model), 8, beams, CLS, SEP)
    assert generated.shape == (12, 8) and (generated[:, 0] == CLS).all()
    for row in generated.tolist():
        end = row.index(SEP) + 1 if SEP in row else 8
        assert 0 not in row[:end] and not any(row[end:])
    assert (generated == SEP).any(1).any() and not (generated == SEP).any(1).all()


def test_a_finished_text_stays_while_other_beams_continue():
    model = undecided()
    context, bias = random_context(model), model.text_decoder.cls.predictions.bias
    with torch.no_grad():
        bias[SEP] += 30.0                                                   # by far the likeliest
        for beams in (1, 3):
            assert model.generate(*context, 8, beams, CLS, SEP).tolist() == [[CLS, SEP] + [0] * 6] * 12
        bias[SEP] -= 60.0                                                   # never
        assert not (model.generate(*context, 8, 3, CLS, SEP) == SEP).any()


def test_a_max_length_of_1_leaves_cls():
    model = undecided()
    assert model.generate(*random_context(model), 1, 3, CLS, SEP).tolist() == [[CLS]] * 12


@BOTH
def test_states_with_a_kv_cache_equal_those_without(has_question):
    model = video_to_text(has_question)
    decoder, (context, mask) = model.text_decoder, encoded_context(model)
    ids = random_ids(5)
    ids[ids == 0] = 5
    index = torch.tensor([2, 0, 1, 1, 2])
    cross_mask = None if mask is None else mask[index][:, None, None]
    caches, steps = [([], []) for _ in decoder.bert.encoder.layer], []
    with torch.no_grad():
        for t in range(7):
            x = decoder.bert.embeddings(ids[:, t:t + 1], t)
            for layer, past in zip(decoder.bert.encoder.layer, caches, strict=True):
                x = layer(x, None, context, index, cross_mask, past)
            steps.append(x)
        expected = decoder.forward_fusion(decoder.forward_text(ids), ids, context, index, cross_mask)
    torch.testing.assert_close(torch.cat(steps, 1), expected, **TIGHT)
    for (self_keys, _), (cross_keys, _) in caches:
        assert self_keys.shape == (5, 2, 7, 6) and cross_keys.shape == (3, 2, context.shape[1], 6)


# ---------------------------------------------------------------------------------------------------------------------
# From a student

@BOTH
@pytest.mark.parametrize("vit_width, text_width", [(16, 12), (12, 12)])
def test_the_decoder_starts_from_the_students_fusion_layers(has_question, vit_width, text_width):
    pretrained = student(vit={"width": vit_width}, text={"width": text_width})
    weights = {key: x.clone() for key, x in pretrained.state_dict().items()}
    model = VideoToText.from_student(pretrained, has_question)
    state = model.state_dict()
    assert any(key.startswith("bert.") for key in state) == has_question
    new = set()
    if has_question and vit_width != text_width:            # these project question states instead of video tokens
        new = {f"text_decoder.bert.encoder.layer.{i}.crossattention.self.{name}.{part}" for i in (0, 1)
               for name in ("key", "value") for part in ("weight", "bias")}
    for key, x in state.items():
        source = key
        if key.startswith("text_decoder."):                 # its two layers are the second and third of three
            source = re.sub(r"encoder\.layer\.(\d)\.", lambda layer: f"encoder.layer.{int(layer[1]) + 1}.", key)
            source = source.replace("text_decoder.", "bert.", 1)
        if key not in new:
            assert torch.equal(x, weights[source].float()), key
        elif key.endswith("weight"):
            assert 0.5 < x.std() / (0.02 * (768 / 12) ** 0.5) < 1.5
        else:
            assert not x.any()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(x, weights[key]) for key, x in pretrained.state_dict().items())          # a copy


def test_a_caption_decoder_attends_to_the_video_as_the_student_does():
    """In a text of one token, a causal layer equals the student's own."""
    pretrained = student()
    model = VideoToText.from_student(pretrained, has_question=False).double().eval()
    ids, bert, decoder = torch.tensor([[7], [8]]), pretrained.bert, model.text_decoder
    with torch.no_grad():
        tokens = pretrained.vit(random_video(2))
        torch.testing.assert_close(model.vit(random_video(2)), tokens, rtol=1e-5, atol=1e-5)
        expected = bert.lm_logits(bert.forward_fusion(bert.bert.embeddings(ids), ids, tokens))
        logits = decoder.lm_logits(decoder.forward_fusion(decoder.forward_text(ids), ids, tokens))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert decoder.bert.encoder.layer[1].crossattention.self.key.weight.shape == (12, 16)


@BOTH
def test_a_small_model_learns_to_answer(has_question, tokenizer):
    """Clips of one colour with the same questions, or none: the answer is in the video."""
    torch.manual_seed(1)
    video = (torch.tensor([0, 128, 255])[:, None, None, None, None] * torch.ones(3, 2, 3, 8, 12)).to(torch.uint8)
    answers = [("red cat", "sat"), ("a blue cat", "rab"), ("it", "what is")]
    questions = [[Question("what is it", {a: 1.0}), Question("a cat", {b: 1.0})] if has_question else
                 [Question("", {a: 1.0})] for a, b in answers]
    samples = [Sample(x, "", "", m, m, 0, group) for m, (x, group) in enumerate(zip(video, questions, strict=True))]
    batch = collate(samples, tokenizer, 6, 0, max_answer_length=6)
    pretrained = ClusterSTM(*configs(text={"vocab_size": tokenizer.get_vocab_size()}))
    model = VideoToText.from_student(pretrained, has_question).train()
    optimizer, history = torch.optim.AdamW(model.parameters(), 5e-3), []
    for _ in range(120):
        history.append(model(batch)["lm"])
        optimizer.zero_grad()
        history[-1].backward()
        optimizer.step()
    model.eval()
    assert history[-1] < 0.02 * history[0]
    with torch.no_grad():
        context = model.encode_context(model.encode_video(batch.video)[0], batch.text_ids, batch.clip_index)
        expected = [answer for group in questions for question in group for answer in question.answers]
        for beams in (1, 3):
            assert decode_ids(tokenizer, model.generate(*context, 6, beams, CLS, SEP)) == expected
        ids, n = encode_answers(tokenizer, expected, 6), len(expected)
        score = torch.stack([model.log_likelihood(ids, torch.full((n,), q), *context).sum(1) for q in range(n)])
        assert score.argmax(1).tolist() == [*range(n)]
