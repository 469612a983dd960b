"""BERT checkpoints against transformers: folders that it writes, with old names, in shards, real and bad ones."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as nnf
from helpers.models import hugging_face, minilm_folder, seeded
from safetensors.torch import load_file, save_file

import encoders
from encoders import Bert, BertConfig
from tokenizer import encode_answers, load_tokenizer

SIZES = dict(vocab_size=40, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
             max_position_embeddings=16)
FUSION = dict(fusion_layers=2, encoder_width=16)
TOL = {"rtol": 0, "atol": 1e-5}
WORD_EMBEDDING = "bert.embeddings.word_embeddings.weight"


def write(folder, kind="BertForMaskedLM", seed=0, shard="1GB", **changes):
    """Save a random checkpoint with transformers, no bias 0 and no LayerNorm the identity -> its model."""
    hf = hugging_face()
    torch.manual_seed(seed)
    model = getattr(hf, kind)(hf.BertConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit_config(folder, without=(), **changes):
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in without}))


def edit_weights(folder, change):
    """Replace the weights in model.safetensors by change(weights)."""
    path = str(folder / "model.safetensors")
    save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path)


def drop_weight(folder, name):
    edit_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != name})


def old_names(weights):
    """The names of the first checkpoints: gamma and beta; position_ids; copies of tied weights."""
    weights = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
               for k, v in weights.items()}
    prefix = "bert." if WORD_EMBEDDING in weights else ""
    weights[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    if prefix:
        weights["cls.predictions.decoder.weight"] = weights[WORD_EMBEDDING]
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    return weights


def padded_ids():
    ids = torch.randint(1, 40, (5, 9), generator=seeded(3))
    for m in range(1, 5):
        ids[m, 10 - 2 * m:] = 0
    return ids


def encode(model, ids):
    return model.forward_fusion(model.forward_text(ids), ids)


def assert_refused(folder, pattern, error=ValueError, **changes):
    """Loading the folder raises one line, which names the folder first and then matches the pattern."""
    with pytest.raises(error, match=pattern) as raised:
        Bert.from_pretrained(folder, **{**FUSION, **changes})
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers

@pytest.mark.parametrize("form", ["as saved", "old names", "shards"])
@pytest.mark.parametrize("kind, changes", [
    ("BertForMaskedLM", {}),
    ("BertForPreTraining", dict(num_hidden_layers=4, hidden_size=20, num_attention_heads=5, vocab_size=77,
                                layer_norm_eps=1e-3, type_vocab_size=3))], ids=["masked LM", "pretraining"])
def test_states_and_logits_equal_transformers(tmp_path, form, kind, changes):
    theirs = write(tmp_path, kind, shard="4KB" if form == "shards" else "1GB", **changes)
    if form == "old names":
        edit_weights(tmp_path, old_names)
    assert (tmp_path / "model.safetensors").exists() == (form != "shards")
    ours, ids = Bert.from_pretrained(tmp_path, **FUSION), padded_ids()
    assert not ours.training and ours.missing_keys and all("crossattention" in key for key in ours.missing_keys)
    masked = (ids != 0) & (torch.rand(ids.shape, generator=seeded()) < 0.5)
    ids[masked] = 4
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
        states = ours.forward_text(ids)
        torch.testing.assert_close(states, expected.hidden_states[ours.num_text_layers], **TOL)
        states = ours.forward_fusion(states, ids)
        torch.testing.assert_close(states, expected.hidden_states[-1], **TOL)
        logits = expected.logits if kind == "BertForMaskedLM" else expected.prediction_logits
        torch.testing.assert_close(ours.lm_logits(states[masked]), logits[masked], **TOL)


@pytest.mark.parametrize("form", ["as saved", "prefix", "old names", "shards"])
def test_an_encoder_without_a_head_gets_a_new_head(tmp_path, form):
    theirs = write(tmp_path, "BertModel", shard="4KB" if form == "shards" else "1GB")
    if form == "prefix":
        edit_weights(tmp_path, lambda weights: {f"bert.{k}": v for k, v in weights.items()})
    if form == "old names":
        edit_weights(tmp_path, old_names)
    ours, ids = Bert.from_pretrained(tmp_path, **FUSION), padded_ids()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
        torch.testing.assert_close(encode(ours, ids), expected, **TOL)
    new = [key for key in ours.state_dict() if key.startswith("cls.") or "crossattention" in key]
    assert sorted(ours.missing_keys) == sorted(new)
    std = 0.02 * (768 / 12) ** 0.5                                          # BERT's 0.02 is of 768 channels
    for key in new:
        if key.endswith("dense.weight") or key.endswith("query.weight"):
            assert ours.state_dict()[key].std().item() == pytest.approx(std, rel=0.3)
    assert not ours.cls.predictions.bias.any()


def test_cross_attention_is_loaded_if_present_and_new_if_absent(tmp_path):
    model = Bert(BertConfig(**SIZES, fusion_layers=1, encoder_width=16))
    model.save_pretrained(tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    loaded = Bert.from_pretrained(folder)
    assert loaded.missing_keys == () and loaded.cfg == model.cfg
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    deeper = Bert.from_pretrained(folder, fusion_layers=2)
    assert deeper.cfg == replace(model.cfg, fusion_layers=2)
    assert all(torch.equal(deeper.state_dict()[key], value) for key, value in model.state_dict().items())
    assert len(deeper.missing_keys) == 10
    assert all(key.startswith("bert.encoder.layer.1.crossattention.") for key in deeper.missing_keys)
    layer = "bert.encoder.layer.2.crossattention."
    assert_refused(folder, rf"{layer}self\.key\.weight .*\(12, 24\).*\(12, 16\)", encoder_width=24)
    drop_weight(folder, layer + "output.dense.bias")
    assert_refused(folder, rf"{layer}output\.dense\.bias .*\(12,\)")


def test_weights_are_written_last(tmp_path, monkeypatch):
    def killed(model, folder):
        assert os.listdir(folder) == ["config.json"]

    monkeypatch.setattr(encoders, "save_weights", killed)
    Bert(BertConfig(**SIZES, **FUSION)).save_pretrained(str(tmp_path))


def test_half_precision_weights_become_fp32(tmp_path):
    write(tmp_path)
    edit_weights(tmp_path, lambda weights: old_names({k: v.half() for k, v in weights.items()}))
    model, saved = Bert.from_pretrained(tmp_path, **FUSION), load_file(tmp_path / "model.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()[WORD_EMBEDDING], saved[WORD_EMBEDDING].float())


def test_the_real_minilm_has_transformers_embeddings_which_mean_something():
    folder = minilm_folder()
    pairs = [("a man is playing a guitar on a stage", "someone plays the guitar in front of an audience"),
             ("two dogs run across a green field", "a pair of puppies is racing over the grass"),
             ("a woman slices an onion in the kitchen", "a lady is chopping vegetables"),
             ("a red car drives down an empty road", "an automobile travels along a deserted street"),
             ("children are swimming in a pool", "kids splash around in the water")]
    tokenizer = load_tokenizer(folder)
    ids = encode_answers(tokenizer, [text for pair in pairs for text in pair], 24)      # [CLS], text, [SEP]
    ours = Bert.from_pretrained(folder, fusion_layers=2, encoder_width=16, vocab_size=tokenizer.get_vocab_size())
    assert asdict(ours.cfg) == asdict(BertConfig(30522, 384, 6, 12, 1536, fusion_layers=2, encoder_width=16))
    theirs = hugging_face().BertModel.from_pretrained(folder).eval()
    mask = (ids != 0)[..., None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
        states = encode(ours, ids)
    torch.testing.assert_close(states * mask, expected * mask, **TOL)
    features = nnf.normalize((states * mask).sum(1), dim=-1)
    cosine = (features @ features.T).view(5, 2, 5, 2)
    same = cosine[range(5), 0, range(5), 1]
    different = cosine.transpose(1, 2)[~torch.eye(5, dtype=torch.bool)]
    assert same.min() > 0.4 and different.max() < 0.35


# ---------------------------------------------------------------------------------------------------------------------
# Configs

@pytest.mark.parametrize("field, value, pattern", [
    ("model_type", "roberta", "'bert'.*'roberta'"),
    ("hidden_act", "gelu_new", "'gelu'.*'gelu_new'"),
    ("position_embedding_type", "relative_key", "'absolute'.*'relative_key'"),
    ("is_decoder", True, "False.*True"),
    ("pad_token_id", 1, r"\b0\b.*\b1"),
    ("hidden_size", "12", "int.*'12'"),
    ("architectures", ["RobertaForMaskedLM"], r"\['RobertaForMaskedLM'\]"),
])
def test_a_config_of_something_else_is_refused_by_its_field(tmp_path, field, value, pattern):
    write(tmp_path)
    edit_config(tmp_path, ("model_type",) if field == "architectures" else (), **{field: value})
    assert_refused(tmp_path, rf"config\.json: {field} .*{pattern}")


@pytest.mark.parametrize("field, value, pattern", [
    ("num_attention_heads", 5, r"hidden_size .*num_attention_heads.*\b5\b.*\b12"),
    ("num_hidden_layers", 1, r"fusion_layers .*\b0 to\b.*\b1\b.*\b2"),
])
def test_sizes_that_do_not_fit_are_refused(tmp_path, field, value, pattern):
    write(tmp_path)
    edit_config(tmp_path, **{field: value})
    assert_refused(tmp_path, rf"config\.json: {pattern}")


def test_absent_fields_have_the_published_defaults(tmp_path):
    write(tmp_path)
    edit_config(tmp_path, ("model_type", "hidden_act", "position_embedding_type", "type_vocab_size", "layer_norm_eps",
                           "pad_token_id", "is_decoder", "hidden_dropout_prob"))
    model = Bert.from_pretrained(tmp_path, **FUSION)
    assert model.cfg == BertConfig(**SIZES, **FUSION)
    edit_config(tmp_path, ("architectures",))
    assert Bert.from_pretrained(tmp_path, **FUSION).cfg == model.cfg


def test_only_dropout_and_fusion_can_be_changed(tmp_path):
    write(tmp_path)
    model = Bert.from_pretrained(tmp_path, hidden_dropout_prob=0.0, vocab_size=40, hidden_size=12, **FUSION)
    assert model.cfg == BertConfig(**SIZES, **FUSION, hidden_dropout_prob=0.0)
    assert_refused(tmp_path, r"config\.json: vocab_size .*41, .*tokenizer.*\b40$", vocab_size=41)
    assert_refused(tmp_path, r"config\.json: layers .*\b2\b.*None", layers=2)


@pytest.mark.parametrize("form", ["as saved", "old names"])
def test_a_vocabulary_padded_beyond_the_tokenizer_is_cut_with_a_word(tmp_path, form, capsys):
    theirs, ids = write(tmp_path), padded_ids()
    if form == "old names":
        edit_weights(tmp_path, old_names)
    model = Bert.from_pretrained(tmp_path, vocab_size=37, **FUSION)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path} has 40 word embeddings and its tokenizer 37 entries: the last 3 ")
    assert model.cfg == BertConfig(**{**SIZES, "vocab_size": 37}, **FUSION) and model.missing_keys == tuple(
        key for key in model.state_dict() if "crossattention" in key)
    ids[ids >= 37] = 5
    with torch.no_grad():
        logits = theirs(ids, attention_mask=(ids != 0).long()).logits[..., :37]
        torch.testing.assert_close(model.lm_logits(encode(model, ids)), logits, **TOL)
    masked, _ = encoders.mask_tokens(ids.repeat(200, 1), model.cfg.vocab_size, 4, seeded())
    assert masked.max() == 36                               # all words of the tokenizer are drawn, and no padding
    Bert.from_pretrained(tmp_path, vocab_size=40, **FUSION)
    assert not capsys.readouterr().out
    model.save_pretrained(tmp_path / "again")
    again = Bert.from_pretrained(tmp_path / "again", vocab_size=37, **FUSION)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())


def test_a_padded_encoder_without_a_head_gets_a_head_of_the_tokenizers_size(tmp_path):
    theirs = write(tmp_path, "BertModel")
    model = Bert.from_pretrained(tmp_path, vocab_size=37, **FUSION)
    assert model.cls.predictions.bias.shape == (37,) and "cls.predictions.bias" in model.missing_keys
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight[:37])


def test_the_tokenizer_of_another_model_is_not_taken_for_padding(tmp_path):
    write(tmp_path, vocab_size=2000)
    assert_refused(tmp_path, r"config\.json: vocab_size .*976, .*tokenizer.* 1023 more, got 2000$", vocab_size=976)
    assert Bert.from_pretrained(tmp_path, vocab_size=977, **FUSION).cfg.vocab_size == 977


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_attention_heads", "layer_norm_eps"])
def test_sizes_of_0_are_refused(tmp_path, field):
    write(tmp_path)
    edit_config(tmp_path, **{field: 0})
    assert_refused(tmp_path, rf"config\.json: {field} must be positive, got 0")


# ---------------------------------------------------------------------------------------------------------------------
# Weights

@pytest.mark.parametrize("key, value, pattern", [
    ("bert.encoder.layer.1.output.dense.bias", None, r"\(12,\)"),
    ("bert.encoder.layer.1.output.dense.bias", torch.zeros(13), r"\(12,\).*\(13,\)"),
    (WORD_EMBEDDING, torch.zeros(41, 12), r"\(40, 12\).*\(41, 12\)"),
    ("cls.predictions.transform.dense.weight", None, r"\(12, 12\)"),
    ("bert.encoder.layer.3.output.dense.bias", torch.zeros(12), r"\(12,\)"),
    ("classifier.weight", torch.zeros(2, 12), r"\(2, 12\)"),
    ("cls.predictions.decoder.weight", torch.zeros(40, 12), WORD_EMBEDDING),
    ("cls.predictions.decoder.bias", torch.ones(40), r"cls\.predictions\.bias"),
])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, key, value, pattern):
    write(tmp_path)
    edit_weights(tmp_path, lambda weights: {k: v for k, v in {**weights, key: value}.items() if v is not None})
    assert_refused(tmp_path, rf"model\*\.safetensors: (bert\.)?{key} .*{pattern}")


def test_a_copy_of_a_tied_weight_may_replace_the_original(tmp_path):
    theirs = write(tmp_path)
    edit_weights(tmp_path, lambda weights: {
        "cls.predictions.decoder.bias" if k == "cls.predictions.bias" else k: v for k, v in weights.items()})
    assert torch.equal(Bert.from_pretrained(tmp_path, **FUSION).cls.predictions.bias, theirs.cls.predictions.bias)


def test_a_head_without_an_encoder_is_refused(tmp_path):
    write(tmp_path)
    edit_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if k.startswith("cls.")})
    assert_refused(tmp_path, rf"{WORD_EMBEDDING} .*\(40, 12\)")


def test_truncated_files_are_refused_in_one_line(tmp_path):
    write(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        assert_refused(tmp_path, r"/model\.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "be')
    assert_refused(tmp_path, r"/config\.json")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    assert_refused(tmp_path, f"{name}$", FileNotFoundError)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, shard="4KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(tmp_path, f"{shard.name}$", FileNotFoundError)


def test_a_pickle_alone_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    theirs = write(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")         # its decoder shares the embedding's memory
    Bert.from_pretrained(tmp_path, **FUSION)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin") as error:
        Bert.from_pretrained(tmp_path, **FUSION)
    command = str(error.value).split(': python -c "')[1]
    assert command.endswith('"') and '"' not in command[:-1]
    monkeypatch.chdir(tmp_path)
    exec(command[:-1], {})
    state = Bert.from_pretrained(tmp_path, **FUSION).state_dict()
    assert all("decoder" in key or torch.equal(state[key], value) for key, value in theirs.state_dict().items())


def test_a_name_without_a_folder_or_a_cached_repository_is_refused(tmp_path):
    assert_refused(tmp_path / "nope", "nope", FileNotFoundError)
