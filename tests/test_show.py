"""Masks side by side: what is bright is what is kept, where it is; what is written; what cannot be shown is said."""

import os

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_train import assert_one_line, command

import data
import decoding
from masking import MASKS, NEEDS, MaskConfig
from teacher import SigLIP, SigLIPConfig, TextConfig, VisionConfig
from tools import show

KEPT = torch.tensor([[1, 4], [4, 15], [4, 11]])         # of 4 x 4 tokens in 3 frames


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a teacher of 4 x 4 tokens of 8 x 8 pixels, with random weights."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("teacher"))
    data.train_tokenizer(["a red square moves up"], f"{folder}/words.json")
    tokenizer = data.load_tokenizer(f"{folder}/words.json")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TextConfig(**size, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=8, pad_token_id=0)
    model = SigLIP(SigLIPConfig(VisionConfig(**size, image_size=32, patch_size=8), text), tokenizer)
    torch.nn.init.zeros_(model.vision_model.encoder.layers[0].self_attn.out_proj.weight)        # a token is its patch
    model.save(folder)
    return folder


@pytest.fixture
def video(tmp_path, monkeypatch):
    """(height, width, frames) -> a video of bright noise; a mask `known` that keeps KEPT of 3 frames."""
    def known(tokens, keep, **aux):
        assert keep == KEPT.shape[1] and tokens.shape[:3] == (1, 3, 16)
        return (KEPT + 16 * torch.arange(3)[:, None]).view(1, -1)

    def write(H, W, T, path="clip.mp4"):
        frames = np.random.default_rng(0).integers(130, 230, (T, H // 8, W // 8, 3), np.uint8)
        decoding.write_video(path, frames.repeat(8, 1).repeat(8, 2), fps=2)
        return path

    monkeypatch.setitem(MASKS, "known", known)
    monkeypatch.chdir(tmp_path)
    return write


@pytest.fixture
def seen(monkeypatch):
    """What is drawn: sheets, and texts as (left, top, right, bottom, text)."""
    sheets, texts, sheet, text = [], [], show.Sheet, ImageDraw.ImageDraw.text

    def written(self, at, line, *args, **more):
        texts.append((*self.textbbox(at, line, font=args[1], anchor=more.get("anchor")), line))
        return text(self, at, line, *args, **more)

    monkeypatch.setattr(show, "Sheet", lambda *args: sheets.append(sheet(*args)) or sheets[-1])
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", written)
    return sheets, texts


def draw(teacher, path, out="m.png", **asked):
    asked = {"mask": ("known",), "ratio": 0.875, "frames": 3, **asked}
    show.main(show.Mask(path, teacher, out=out, **asked))
    return np.asarray(Image.open(out).convert("RGB")).astype(int) if out.endswith(".png") else None


def panels(sheet, picture, column):
    """The frames of a column, (rows, h, w, 3), cut out of a picture."""
    h, w = sheet.shape
    places = [sheet.place(column, row) for row in range(sheet.rows)]
    return np.stack([picture[y:y + h, x:x + w] for x, y in places])


def kept_pixels(H, W):
    """(3, H, W) bool: the pixels of KEPT, one after the other."""
    return np.array([[[y * 4 // H * 4 + x * 4 // W in ids for x in range(W)] for y in range(H)]
                     for ids in KEPT.tolist()])


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (360, 640), (656, 368)], ids=str)
def test_what_is_kept_is_bright_and_all_else_dim_in_the_frames_own_shape(teacher, video, seen, shape):
    picture = draw(teacher, video(*shape, 3))
    sheet, = seen[0]
    h, w = sheet.shape
    assert w / h == pytest.approx(shape[1] / shape[0], rel=0.02) and (sheet.rows, len(sheet.columns)) == (3, 3)
    frames, _, mask = (panels(sheet, picture, c) for c in range(3))
    true = decoding.resize(decoding.read_frames("clip.mp4", 3), (h, w)).permute(0, 2, 3, 1).numpy()
    assert np.abs(frames - true).mean() < 8                                 # enlarged another way
    bright = kept_pixels(h, w)
    np.testing.assert_array_equal(mask[bright], frames[bright])
    line = (mask == 128).all(-1)                                            # round what is kept
    np.testing.assert_allclose(mask[~bright & ~line], 0.22 * frames[~bright & ~line], atol=0.51)
    near = np.zeros_like(bright)
    for axis, by in ((1, 1), (1, -1), (2, 1), (2, -1)):
        near |= np.roll(bright, by, axis)
    assert not (line & ~near).any() and (line & ~bright).sum() > 100


@pytest.mark.parametrize("at", [(0, 3), (2, 0)], ids=str)
def test_a_token_lies_where_the_teacher_saw_it(teacher, video, seen, monkeypatch, at):
    """What has changed since the frame before, found by the tokens alone, is where it is in the frame."""
    def odd(tokens, keep, **aux):
        place = (tokens[:, 1] - tokens[:, 0]).norm(dim=-1).argmax(1, keepdim=True)               # (1, 1)
        return torch.cat([place, place + tokens.shape[2]], 1)

    monkeypatch.setitem(MASKS, "odd", odd)
    frames = np.full((2, 48, 96, 3), 120, np.uint8)
    y, x = at
    frames[1, 12 * y:12 * y + 12, 24 * x:24 * x + 24] = np.random.default_rng(0).integers(0, 255, (12, 24, 3))
    decoding.write_video("odd.mp4", frames, fps=2)
    picture = draw(teacher, "odd.mp4", mask=("odd",), ratio=0.95, frames=2)
    sheet, = seen[0]
    h, w = sheet.shape
    shown, mask = panels(sheet, picture, 0), panels(sheet, picture, 2)
    spot = np.zeros((2, h, w), bool)
    spot[:, y * h // 4:(y + 1) * h // 4, x * w // 4:(x + 1) * w // 4] = True
    np.testing.assert_array_equal(mask[spot], shown[spot])
    assert (mask[~spot] == shown[~spot]).all(-1).mean() < 0.01


def test_clusters_have_a_colour_a_line_between_them_and_a_dot_on_the_centre():
    frames = np.full((1, 24, 36, 3), 0.5)
    labels, centres = np.array([[0, 0, 1, 0, 0, 1]]), np.array([[3, 2]])    # 2 x 3 tokens of 12 x 12 pixels
    tinted = show.coloured(frames, labels, centres, (2, 3))
    shown = show.marked(tinted, labels, centres, (2, 3))[0]
    assert (shown[18, 6] == 1).all() and (shown[6, 30] == 1).all()
    assert (shown[:, 24] == 0).all() and not (shown[12, :20] == 0).all(-1).any()
    assert (shown[6, 6] == tinted[0, 18, 20]).all() and (shown[6, 6] != tinted[0, 18, 30]).any()
    for K in (1, 6, 26, 80):
        assert len(np.unique(show.colours(K).round(3), axis=0)) == K


def test_a_cluster_keeps_its_number_from_frame_to_frame():
    generator = torch.Generator().manual_seed(0)
    things = torch.randn(3, 8, generator=generator)
    what = torch.stack([torch.randperm(3, generator=generator).repeat(4) for _ in range(5)])    # (T, N)
    tokens = things[what] + 0.01 * torch.randn(5, 12, 8, generator=generator)
    labels = torch.arange(3).repeat(5, 4)                                   # as they come: by the centres' place
    centres = torch.tensor([0, 4, 8]).expand(5, 3)
    got, at = show.followed(tokens, labels, centres)
    colour = {thing: got[0, what[0] == thing].unique().item() for thing in range(3)}
    assert all(colour[w] == g for w, g in zip(what.flatten().tolist(), got.flatten().tolist(), strict=True))
    assert torch.equal(got.gather(1, at), torch.arange(3).expand(5, 3))


def test_the_figures_above_a_mask_by_hand():
    masks = {"a": np.array([[1, 1, 0, 0], [1, 0, 0, 1]], bool), "b": np.array([[1, 1, 1, 0], [0, 0, 0, 1]], bool)}
    found = show.Kept((2, 2), np.array([[0, 0, 1, 1], [0, 1, 1, 1]]), np.array([[0, 2], [0, 1]]), masks,
                      {"a": 3.14, "b": 314.2})
    assert found.figures("a") == ("2 of 4 tokens", "75 % of clusters", "50 % stay", "3.1 ms")
    assert found.figures("b") == ("1-3 of 4 tokens", "75 % of clusters", "0 % stay", "314 ms")
    one = show.Kept((2, 2), found.labels[:1], found.centres[:1], {"a": masks["a"][:1]}, {"a": 0.0})
    assert one.figures("a")[1:3] == ("50 % of clusters", "- stay")


@pytest.mark.parametrize("shape", [(48, 96), (360, 640), (656, 368)], ids=str)
@pytest.mark.parametrize("many", [1, 4, 23])
def test_each_mask_is_named_and_nothing_lies_over_anything_else(teacher, video, seen, monkeypatch, shape, many):
    names = [f"mask_of_a_long_name_{i}" for i in range(many)]
    for name in names:
        monkeypatch.setitem(MASKS, name, MASKS["known"])
    picture = draw(teacher, video(*shape, 3), mask=(*names, "tube"))
    sheet, = seen[0]
    (h, w), (H, W) = sheet.shape, picture.shape[:2]
    assert W <= show.WIDE and (many < 23 or sheet.bands > 1) and (W > 0.7 * show.WIDE or w in (96, 135) or many == 1)
    said = [line for *_, line in seen[1]]
    titles = ["frame", "clusters", *names, "tube"]
    assert [line for line in said if line in titles] == titles
    assert said.count("2 of 16 tokens") == many + 1 and said.count("33 % stay") == 0
    assert said.count("50 % stay") == many and said.count("100 % stay") == 1        # tube: all of it
    spots = [(*sheet.place(c, r), sheet.place(c, r)[0] + w, sheet.place(c, r)[1] + h)
             for c in range(many + 3) for r in range(3)]
    for spot in (*spots, *(box[:4] for box in seen[1])):
        assert 0 <= spot[0] < spot[2] <= W and 0 <= spot[1] < spot[3] <= H
    boxes = np.array(spots + [box[:4] for box in seen[1]])
    apart = (boxes[:, None, 2:] <= boxes[None, :, :2]).any(-1)
    assert (apart | apart.T | np.eye(len(boxes), dtype=bool)).all()


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (120, 170)], ids=str)
def test_a_video_has_the_columns_of_each_moment_one_after_the_other(teacher, video, seen, shape):
    draw(teacher, video(*shape, 3), "m.mp4", mask=("known", "tube"))
    sheet = seen[0][-1]
    with av.open("m.mp4") as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 2 and stream.codec_context.pix_fmt == "yuv420p"
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(pictures) == 3 and pictures[0].shape[0] % 2 == pictures[0].shape[1] % 2 == 0
    h, w = sheet.shape
    for t, picture in enumerate(pictures):
        for c, column in enumerate(sheet.columns):
            assert np.abs(panels(sheet, picture, c)[0] - column.frames[t]).mean() < (25 if c == 1 else 10)
        bright = kept_pixels(h, w)[t]
        mask = panels(sheet, picture, 2)[0]
        assert mask[bright].mean() > 2.5 * mask[~bright].mean()
    times = [line for *_, line in seen[1] if line.endswith(" s")]
    assert times == ["0.0 s", "0.5 s", "1.0 s"]


def test_a_video_of_fewer_frames_is_shown_as_it_is_and_one_of_more_at_its_middles(teacher, video, seen, capsys):
    draw(teacher, video(48, 96, 3), frames=8)
    assert seen[0][-1].rows == 3 and "clip.mp4 has 3 frames, not 8" in capsys.readouterr().out
    draw(teacher, video(48, 96, 9))
    times = [line for *_, line in seen[1] if line.endswith(" s")]
    assert times == ["0.0 s", "0.5 s", "1.0 s", "0.5 s", "2.0 s", "3.5 s"]
    assert "not" not in capsys.readouterr().out
    draw(teacher, video(48, 96, 1), mask=("tube",), frames=1)
    assert "- stay" in [line for *_, line in seen[1]]


def test_a_larger_size_is_a_finer_grid_and_settings_go_where_they_belong(teacher, video, seen, monkeypatch):
    path, asked = video(48, 96, 3), []
    real = show.kept
    monkeypatch.setattr(show, "kept", lambda *args: asked.append(args) or real(*args))
    draw(teacher, path, size=64, mask=("cluster_stm", "random_frame"), ratio=0.75, quantile=0.3, seed=5)
    said = [line for *_, line in seen[1]]
    assert "8 x 8 tokens" in said and said.count("16 of 64 tokens") == 2 and "16 a frame" in said
    (_, _, configs, clusters, grid, caption, seed), = asked
    assert (grid, caption, seed) == ((8, 8), "", 5)
    assert configs == {m: MaskConfig(m, 0.75, quantile=0.3) for m in ("cluster_stm", "random_frame")}
    assert clusters == configs["cluster_stm"]
    found = real(*asked[0])
    assert (found.masks["cluster_stm"] == real(*asked[0]).masks["cluster_stm"]).all()
    assert (found.masks["random_frame"] != real(*asked[0][:-1], 6).masks["random_frame"]).any()


def test_masks_are_given_text_aligned_tokens_and_log_attention(teacher, video, seen, monkeypatch):
    given = {}

    def sampled(tokens, keep, *, logits=None, **aux):
        given.update(aux, logits=logits)
        return MASKS["known"](tokens, keep)

    def told(tokens, keep, *, text=None, aligned=None, **aux):
        if text is None:
            raise ValueError("the mask told needs text (B, E), got none")
        given.update(text=text, aligned=aligned)
        return MASKS["known"](tokens, keep)

    for mask, needs in ((sampled, {"logits"}), (told, {"text", "aligned"})):
        monkeypatch.setitem(MASKS, mask.__name__, mask)
        monkeypatch.setitem(NEEDS, mask.__name__, needs)
    path = video(48, 96, 3)
    draw(teacher, path, mask=("sampled", "told"), caption="a red square")
    assert [line for *_, line in seen[1]].count("by log attention") == 1
    torch.testing.assert_close(given["logits"], given["attention"].log())
    whole = SigLIP.from_pretrained(teacher)
    torch.testing.assert_close(given["text"], whole.encode_text(whole.tokenize(["a red square"])))
    assert given["aligned"].shape == (1, 3, 16, 32) and given["grid"] == (4, 4)
    with pytest.raises(ValueError, match="told needs text .* got none; --caption gives the text"):
        draw(teacher, path, mask=("told",))


def test_what_cannot_be_shown_is_one_line(teacher, video, capsys):
    path = video(48, 96, 3)
    for args, message in ((["--mask", "tube"], f"{show.DEMO} is not there: run `make demo`, or give --teacher"),
                          (["--teacher", teacher, "--mask", "tube", "clusters"], "there is no mask 'clusters'"),
                          (["--teacher", teacher, "--size", "20"], "--size 20 is no multiple of .* patch, 8"),
                          (["--teacher", teacher, "--size", "-8"], "--size -8 is no multiple"),
                          (["--teacher", teacher, "--frames", "0"], "wanted 0"),
                          (["--teacher", teacher, "--out", "m.xyz"], "xyz"),
                          (["--teacher", teacher, "--out", "nowhere/m.mp4"], "nowhere/m.mp4: there is no folder"),
                          (["--teacher", teacher, "--out", "nowhere/m.png"], "nowhere/m.png: there is no folder")):
        code, _, err = command("tools/show.py", ["mask", path, *args], capsys)
        assert_one_line("tools.show", code, err, message)
    assert not os.path.exists("masks.png")
    with open(path, "r+b") as f:
        f.truncate(300)
    code, _, err = command("tools/show.py", ["mask", path, "--teacher", teacher], capsys)
    assert_one_line("tools.show", code, err, path)


def test_the_demos_call_draws_a_row_a_mask(teacher, video, tmp_path):
    clip = decoding.test_view(decoding.read_frames(video(48, 96, 3), 3), 32)
    masks = {title: MaskConfig(name, 0.875) for title, name in (("ours", "cluster_stm"), ("theirs", "known"))}
    show.masks(clip, SigLIP.from_pretrained(teacher), masks, "masks.png")
    with Image.open("masks.png") as image:
        assert image.width > 400 and image.height > 400
