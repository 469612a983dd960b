"""A user's videos and texts: embeddings equal eval.py's and search.py's, captions, answers, and what is refused."""

import copy
import os
import re
import shutil

import pytest
import torch
from helpers.benchmarks import ANSWERS, NAMES, RNG, captions_like, load_json, questions_like, write_json
from helpers.evaluation import load_clip
from helpers.models import layer_norm, random_video, save_model, student, video_to_text
from helpers.runs import ROOT

import eval as evaluation
import metrics
import search
from annotations import normalize_caption
from files import read_safetensors, write_safetensors
from inputs import require_clips
from model import ClusterSTM, VideoToText
from teacher import SigLIP
from video import read_frames, resize_like_pillow

FP32 = {"rtol": 1e-4, "atol": 1e-5}                 # of an fp32 model beside an fp64 one
TEXTS = ["A dog eats a pizza, slowly.", "a cat sees a BALL outside", "a man throws a cake"]
KINDS = pytest.mark.parametrize("kind", ["student", "SigLIP"])


@pytest.fixture
def paths(benchmarks):
    """Paths of six videos of three sizes, of 3 to 31 frames."""
    return [f"{benchmarks}/videos/{name}" for name in NAMES]


@pytest.fixture
def model(models):
    """A student for 7 frames of 16 x 16 pixels."""
    return ClusterSTM.from_pretrained(models["finetuned"])


def load(models, kind):
    return ClusterSTM.from_pretrained(models["finetuned"]) if kind == "student" else SigLIP.from_pretrained(
        models["teacher"])


def own_rows(monkeypatch, tmp_path, rows):
    """Enter an empty folder with these annotations -> the settings of eval.py that read them."""
    monkeypatch.chdir(tmp_path)
    write_json("rows.json", rows)
    write_json("answers.json", ANSWERS)
    return {"data": "rows.json", "out": "result.json", "workers": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings, beside other ways to them

def test_products_are_the_similarities_of_eval(models, model, paths, benchmarks, tmp_path, monkeypatch):
    RNG.seed(3)
    rows = [{"video": name, "caption": captions_like(1 + i % 2)} for i, name in enumerate(NAMES)]
    recorded = []
    monkeypatch.setattr(metrics, "dual_softmax", lambda x, temp: recorded.append(x) or x.softmax(0))
    settings = own_rows(monkeypatch, tmp_path, rows)
    evaluation.main(evaluation.Config(task="msrvtt", checkpoint=models["finetuned"], data_root=f"{benchmarks}/videos",
                                      **settings))
    texts = [caption for row in rows for caption in row["caption"]]
    assert any(text != normalize_caption(text) for text in texts)
    actual = model.embed_texts(texts) @ model.embed_videos(paths).T
    in_order = lambda x: x[:, x[0].argsort()]                                       # eval.py has its own order
    torch.testing.assert_close(in_order(actual), in_order(recorded[0]), rtol=1e-5, atol=1e-6)
    assert actual.shape == (9, 6) and actual.std(1).min() > 1e-3 < actual.std(0).min()      # they differ


def test_embeddings_of_a_student_equal_their_definition_in_fp64(model, paths):
    model64, cfg = copy.deepcopy(model).double(), model.text_cfg
    with torch.no_grad():
        videos, texts = [], []
        for path in paths:
            tokens = model64.vit(load_clip(path, 7))[0].view(7, 4, -1)
            frames = [layer_norm(x.mean(0), model64.pool_norm) @ model64.vision_proj.weight.T + model64.vision_proj.bias
                      for x in tokens]
            videos.append(sum(x / x.square().sum().sqrt() for x in frames) / 7)
        for text in TEXTS:
            words = model.inputs.tokenizer.encode(normalize_caption(text), add_special_tokens=False)
            ids = [model.inputs.tokenizer.token_to_id("[CLS]"), *words.ids]
            ids = torch.tensor([ids + [0] * (cfg.max_length - len(ids))])
            x = model64.bert.forward_text(ids)[0, 0] @ model64.text_proj.weight.T + model64.text_proj.bias
            texts.append(x / x.square().sum().sqrt())
    torch.testing.assert_close(model.embed_videos(paths).double(), torch.stack(videos), **FP32)
    torch.testing.assert_close(model.embed_texts(TEXTS).double(), torch.stack(texts), **FP32)
    assert model.embed_videos(paths).norm(dim=1).max() < 0.999      # the mean of unit vectors is not normalised again


def test_embeddings_of_a_siglip_equal_their_definition_in_fp64(models, paths):
    model = SigLIP.from_pretrained(models["teacher"])
    model64, size = copy.deepcopy(model).double(), model.cfg.image_processor.size
    with torch.no_grad():
        videos = []
        for path in paths:
            frames = [resize_like_pillow(x[None], size, "bicubic").double() / 255 * 2 - 1 for x in read_frames(path, 8)]
            pooled = [model64.vision_model.head(model64.forward_features(x))[0] for x in frames]
            videos.append(sum(x / x.square().sum().sqrt() for x in pooled) / 8)
        texts = torch.cat([model64.encode_text(model64.tokenize([text])) for text in TEXTS])
    torch.testing.assert_close(model.embed_videos(paths).double(), torch.stack(videos), **FP32)
    torch.testing.assert_close(model.embed_texts(TEXTS).double(), texts, **FP32)
    other = model.embed_videos(paths, num_frames=2)
    assert other.shape == (6, 16) and not torch.isclose(other, model.embed_videos(paths)).all(1).any()


@KINDS
def test_products_are_the_scores_of_search(models, paths, benchmarks, tmp_path, kind, capsys):
    model, query = load(models, kind), "a dog eats a pizza"
    checkpoint = models["finetuned" if kind == "student" else "teacher"]
    cfg = search.Config(f"{benchmarks}/videos", (query,), checkpoint, top=6, segment=0, workers=0,
                        index=f"{tmp_path}/index.safetensors")
    scores = (model.embed_videos(paths) @ model.embed_texts([query]).T)[:, 0].tolist()
    hits = {hit.name: hit.score for hit in search.main(cfg)[query]}
    assert hits == pytest.approx(dict(zip(NAMES, scores, strict=True)), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Batches, paths and tensors

@KINDS
@pytest.mark.parametrize("batch", [1, 4, 6, 100])
def test_batches_of_any_size_give_the_same_and_are_no_larger(models, paths, monkeypatch, kind, batch):
    model, sizes = load(models, kind), []
    name = "encode_video" if kind == "student" else "embed_frames"
    encode = getattr(type(model), name)
    monkeypatch.setattr(type(model), name, lambda self, x: sizes.append(len(x)) or encode(self, x))
    torch.testing.assert_close(model.embed_videos(paths, batch=batch), model.embed_videos(paths[:3] + paths[3:]),
                               rtol=1e-5, atol=1e-6)
    assert sizes == {1: [1] * 6, 4: [4, 2], 6: [6], 100: [6]}[batch] + [6]


@KINDS
def test_paths_and_tensors_give_the_same(models, paths, tmp_path, kind):
    model, num_frames = load(models, kind), 7 if kind == "student" else 8
    expected = model.embed_videos(paths)
    for i in range(3):                                                              # three sizes
        frames = torch.stack([read_frames(path, num_frames) for path in paths[i::3]])
        before = frames.clone()
        assert torch.equal(model.embed_videos(frames), model.embed_videos(paths[i::3])) and torch.equal(frames, before)
        torch.testing.assert_close(model.embed_videos(frames, batch=1), expected[i::3], rtol=1e-5, atol=1e-6)
        strided = frames.transpose(3, 4).contiguous().transpose(3, 4)
        assert torch.equal(model.embed_videos(strided), model.embed_videos(frames))
    os.symlink(os.path.dirname(paths[0]), tmp_path / "videos")
    assert torch.equal(model.embed_videos([tmp_path / "videos" / name for name in NAMES]), expected)
    repeated = model.embed_videos([paths[2], paths[0], paths[2]])
    torch.testing.assert_close(repeated, expected[[2, 0, 2]], rtol=1e-5, atol=1e-6)


def test_a_tensor_may_have_any_number_of_frames_and_any_size(model):
    for shape in ((1, 1, 3, 16, 16), (2, 9, 3, 50, 31), (3, 2, 3, 4, 200)):
        video = torch.randint(0, 256, shape, dtype=torch.uint8)
        assert model.embed_videos(video).shape == (shape[0], 8)
        assert not model.embed_videos(video).requires_grad


def test_frames_are_from_the_first_seconds_if_the_training_took_those(models, paths, tmp_path):
    folder = shutil.copytree(models["finetuned"], tmp_path / "model")
    config = load_json(folder / "config.json")
    config["data"].update(max_seconds=1.5, num_frames=3)
    write_json(str(folder / "config.json"), config)
    model = ClusterSTM.from_pretrained(folder)                                      # also a Path
    with torch.no_grad():
        expected = torch.cat([model.encode_video(load_clip(path, 3, 1.5))[1] for path in paths])
        whole = torch.cat([model.encode_video(load_clip(path, 3))[1] for path in paths])
    torch.testing.assert_close(model.embed_videos(paths), expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(expected[-1], whole[-1], atol=1e-3).any()


def test_texts_are_normalised_as_captions_are(model):
    a, b, c = model.embed_texts(["A dog, a CAT!", "a dog a cat", "a cat a dog"])
    assert torch.equal(a, b) and not torch.isclose(a, c).all()
    many = model.embed_texts([f"a dog {'eats ' * (i % 7)}" for i in range(300)])
    assert many.shape == (300, 8)
    torch.testing.assert_close(many[:7], many[287:294], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(300))


@KINDS
def test_no_videos_and_no_texts_are_no_rows(models, kind):
    model = load(models, kind)
    E = 8 if kind == "student" else 16
    assert model.embed_videos([]).shape == model.embed_texts([]).shape == (0, E)
    assert model.embed_videos(torch.zeros(0, 2, 3, 16, 16, dtype=torch.uint8)).shape == (0, E)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

@KINDS
@pytest.mark.parametrize("videos, message", [
    ("a.mp4", "list of paths.*str 'a.mp4'"), (["a.mp4", 3], "list of paths.*list .'a.mp4', 3."), (None, "NoneType"),
    ([torch.zeros(2, 3, 8, 8)], "list of paths.* list .tensor"),
    (torch.zeros(1, 2, 3, 16, 16), r"uint8.*\(1, 2, 3, 16, 16\) float32"),
    (torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8), r"\(B, T, 3, H, W\).*\(1, 3, 2, 16, 16\) uint8"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"\(2, 3, 16, 16\) uint8"),
    (torch.zeros(1, 0, 3, 16, 16, dtype=torch.uint8), r"\(1, 0, 3, 16, 16\) uint8")], ids=str)
def test_what_is_no_list_of_videos_is_refused(models, kind, videos, message):
    with pytest.raises(ValueError, match=f"^video.*{message}.*$"):
        load(models, kind).embed_videos(videos)


@KINDS
@pytest.mark.parametrize("texts, message", [
    ("a dog", "list of texts.*str 'a dog'"), (["a dog", 3], "list of texts.*3"), (None, "NoneType"),
    (["a dog", "a \udc80"], r"valid Unicode.*udc80")])
def test_what_is_no_list_of_texts_is_refused(models, kind, texts, message):
    with pytest.raises(ValueError, match=f"^texts must be .*{message}"):
        load(models, kind).embed_texts(texts)


@pytest.mark.parametrize("text", ["", " ", "...!"])
def test_a_text_without_a_word_is_refused(model, text):
    with pytest.raises(ValueError, match=f"^texts must have .*word.*{re.escape(repr(text))}$"):
        model.embed_texts(["a dog", text])


@KINDS
def test_an_unreadable_video_is_named_in_one_line(models, paths, tmp_path, kind):
    model = load(models, kind)
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    for name, error in (("none.mp4", FileNotFoundError), ("bad.mp4", ValueError)):
        with pytest.raises(error, match=f"^{tmp_path}/{name}: [^\n]*$"):
            model.embed_videos([*paths, f"{tmp_path}/{name}"], batch=4)
    with pytest.raises(ValueError, match="^batch must be at least 1, got 0$"):
        model.embed_videos(paths, batch=0)


@pytest.mark.parametrize("weight, embed, named", [
    ("vision_proj.weight", lambda model, paths: model.embed_videos(paths, batch=1), NAMES[0]),
    ("text_proj.bias", lambda model, paths: model.embed_texts(TEXTS), TEXTS[0])])
def test_features_that_are_not_finite_are_refused(model, paths, weight, embed, named):
    model.get_parameter(weight).data[..., 0] = torch.nan
    with pytest.raises(ValueError, match=f"feature.*{re.escape(named)}' must be finite, got nan"):
        embed(model, paths)


def test_what_a_folder_lacks_is_an_error_where_it_is_used(models, paths, tmp_path):
    folder = shutil.copytree(models["finetuned"], tmp_path / "model")
    tensors, _ = read_safetensors(f"{folder}/model.safetensors")
    write_safetensors(f"{folder}/model.safetensors", tensors, {})
    os.remove(f"{folder}/tokenizer.json")
    model = ClusterSTM.from_pretrained(str(folder))
    assert model.embed_videos(paths[:1]).shape == (1, 8)
    with pytest.raises(FileNotFoundError, match=f"^{folder}/tokenizer.json: no such tokenizer.json$"):
        model.embed_texts(TEXTS)
    save_model(student().float(), folder, data={"num_frames": 2})
    with pytest.raises(ValueError, match=rf"^{folder}/config.json: data must be .*num_frames and image_size, got .*2"):
        ClusterSTM.from_pretrained(str(folder)).embed_videos(paths[:1])
    for method in (lambda: student().embed_videos(paths), lambda: student().embed_texts(TEXTS),
                   lambda: video_to_text(True).answer(paths, TEXTS), lambda: video_to_text(False).caption(paths)):
        with pytest.raises(ValueError, match="^the model must be one of from_pretrained"):
            method()


def test_a_hub_id_is_loaded_or_refused_in_one_line(models, paths, monkeypatch):
    for cls in (ClusterSTM, VideoToText):
        with pytest.raises(FileNotFoundError, match="^some/model is not a folder of a trained model: .*hub's cache.*$"):
            cls.from_pretrained("some/model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: models[name.split("/")[1]])
    assert ClusterSTM.from_pretrained("some/finetuned").embed_texts(TEXTS).shape == (3, 8)
    assert len(VideoToText.from_pretrained("some/caption").caption(paths[:2])) == 2


# ---------------------------------------------------------------------------------------------------------------------
# encode_video

@pytest.mark.parametrize("encode", [
    lambda video: student().encode_video(video), lambda video: student().vit(video),
    lambda video: video_to_text(True).encode_video(video), lambda video: video_to_text(False).encode_video(video)])
def test_encode_video_refuses_floats_and_channels_before_frames(encode):
    video = random_video(2)
    encode(video)
    for wrong in (video.float(), video / 255, video.long(), video.transpose(1, 2), video[0], video[:, :, :1]):
        dtype = str(wrong.dtype).removeprefix("torch.")
        expected = rf"^video must be \(B, T, 3, H, W\) uint8.*got {re.escape(str(tuple(wrong.shape)))} {dtype}$"
        with pytest.raises(ValueError, match=expected):
            encode(wrong)


def test_the_check_reads_no_value():
    require_clips(torch.empty(2, 4, 3, 8, 8, dtype=torch.uint8, device="meta"))     # there is none to read


# ---------------------------------------------------------------------------------------------------------------------
# Captions and answers

def test_captions_are_those_of_eval(models, paths, benchmarks, tmp_path, monkeypatch, no_java):
    RNG.seed(5)
    settings = own_rows(monkeypatch, tmp_path, [{"video": name, "caption": captions_like(2)} for name in NAMES])
    result = evaluation.main(evaluation.Config(task="msvd-caption", checkpoint=models["caption"],
                                               data_root=f"{benchmarks}/videos", **settings))
    model = VideoToText.from_pretrained(models["caption"])
    beam, greedy = ([row[name] for row in result["predictions"]] for name in ("beam 3", "greedy"))
    assert model.caption(paths) == beam and model.caption(paths, beams=1) == greedy and beam != greedy
    assert model.caption(paths, batch=4) == beam and len(set(beam)) > 1 and model.caption([]) == []
    frames = torch.stack([read_frames(path, 6) for path in paths[::3]])
    assert model.caption(frames) == beam[::3]


def test_answers_are_those_of_eval(models, paths, benchmarks, tmp_path, monkeypatch):
    RNG.seed(7)
    rows = questions_like(NAMES * 2, 0)
    settings = own_rows(monkeypatch, tmp_path, rows)
    result = evaluation.main(evaluation.Config(task="msvd-qa", checkpoint=models["qa"], answers="answers.json",
                                               data_root=f"{benchmarks}/videos", **settings))
    expected = {row["question_id"]: row["generated"] for row in result["predictions"]}
    model, questions = VideoToText.from_pretrained(models["qa"]), [row["question"] for row in rows]
    for batch in (5, 32):
        assert model.answer(paths * 2, questions, batch=batch) == [expected[i] for i in range(12)]
    assert len({*expected.values()}) > 1 and model.answer([], []) == []
    swapped = model.answer(paths * 2, questions[::-1])
    assert swapped != [expected[i] for i in range(12)]                              # the question matters


def test_the_other_method_and_wrong_questions_are_refused(models, paths):
    qa, caption = (VideoToText.from_pretrained(models[kind]) for kind in ("qa", "caption"))
    with pytest.raises(ValueError, match=rf"^{models['qa']} is for question answering: use its \.answer$"):
        qa.caption(paths)
    with pytest.raises(ValueError, match=rf"^{models['caption']} is for captioning: use its \.caption$"):
        caption.answer(paths, ["what is it"] * 6)
    with pytest.raises(ValueError, match="^there must be a question for each video, got 5 for 6$"):
        qa.answer(paths, ["what is it"] * 5)
    for model, arguments in ((qa, (paths[0], ["what is it"])), (qa, (None, ["what is it"])), (caption, (paths[0],))):
        with pytest.raises(ValueError, match="^videos must be a list of paths.*got (str|NoneType)"):
            model.answer(*arguments) if model is qa else model.caption(*arguments)
    with pytest.raises(ValueError, match="^beams must be at least 1, got 0$"):
        caption.caption(paths, beams=0)
    with pytest.raises(ValueError, match="^questions must be a list of texts, got str"):
        qa.answer(paths, "what is it")
    with pytest.raises(ValueError, match="^questions must have at least one word each, got '?'"):
        qa.answer(paths, ["what is it"] * 5 + ["?"])


def test_a_model_whose_task_is_unknown_is_refused(models, paths, tmp_path):
    folder = shutil.copytree(models["caption"], tmp_path / "model")
    config = load_json(folder / "config.json")
    write_json(str(folder / "config.json"), {**config, "task": ""})
    with pytest.raises(ValueError, match=f"^{folder}/config.json: task must be the task of the fine-tuning, got ''$"):
        VideoToText.from_pretrained(str(folder)).caption(paths[:1])


# ---------------------------------------------------------------------------------------------------------------------
# The lines of the README

HEADING = "## In five lines of Python"


def test_the_lines_of_the_readme_run(sprites, first_run, tmp_path, monkeypatch, capsys):
    with open(os.path.join(ROOT, "README.md")) as f:
        section = f.read().partition(f"{HEADING}\n")[2]
    lines = re.search(r"```python\n(.*?)```", section, re.S)[1]
    os.makedirs(tmp_path / "data")
    os.symlink(sprites, tmp_path / "data" / "sprites")
    shutil.copytree(f"{first_run}/out/first", tmp_path / "out" / "sprites")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    model = ClusterSTM.from_pretrained(f"{first_run}/out/first")
    clips = [load_clip(f"{sprites}/videos/test_0000{i}.mp4", 4) for i in range(2)]
    with torch.no_grad():
        expected = torch.cat([model.encode_video(clip)[1] for clip in clips])
    torch.testing.assert_close(names["videos"], expected, rtol=1e-5, atol=1e-6)
    assert len(lines.splitlines()) == 5 and names["texts"].shape == (3, 8)
    assert re.search(r"tensor\(\[\[.*,.*\],\n +\[.*\],\n +\[.*\]\]\)", capsys.readouterr().out)
