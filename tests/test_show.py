"""tools.show: visible tokens are bright and at their place, texts are right and do not overlap, logs become lines."""

import json
import os
import re

import av
import numpy as np
import pytest
import torch
from helpers.damage import damaged_copies
from helpers.runs import assert_one_line, command
from matplotlib.colors import to_hex
from PIL import Image, ImageDraw

from masking import MASK_INPUTS, MASKS, MaskConfig, keep_count
from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from teacher import SigLIP
from tokenizer import build_wordpiece, load_tokenizer
from tools import show
from video import eval_transform, read_frames, resize, write_video

VISIBLE = torch.tensor([[1, 4], [4, 15], [4, 11]])      # of 4 x 4 tokens in 3 frames


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a teacher of 4 x 4 tokens of 8 x 8 pixels, with random weights."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("teacher"))
    build_wordpiece(["a red square moves up"], f"{folder}/words.json")
    tokenizer = load_tokenizer(f"{folder}/words.json")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TextConfig(**size, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=8, pad_token_id=0)
    model = SigLIP(SigLIPConfig(VisionConfig(**size, image_size=32, patch_size=8), text), tokenizer)
    torch.nn.init.zeros_(model.vision_model.encoder.layers[0].self_attn.out_proj.weight)    # tokens do not mix
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def video(tmp_path, monkeypatch):
    """(height, width, frames) -> a video of bright noise. The mask "fixed" keeps VISIBLE of 3 frames."""
    def fixed(tokens, keep, **aux):
        assert keep == VISIBLE.shape[1] and tokens.shape[:3] == (1, 3, 16)
        return (VISIBLE + 16 * torch.arange(3)[:, None]).view(1, -1)

    def write(H, W, T, path="clip.mp4"):
        frames = np.random.default_rng(0).integers(130, 230, (T, H // 8, W // 8, 3), np.uint8)
        write_video(path, frames.repeat(8, 1).repeat(8, 2), fps=2)
        return path

    monkeypatch.setitem(MASKS, "fixed", fixed)
    monkeypatch.chdir(tmp_path)
    return write


@pytest.fixture
def sheets(monkeypatch):
    """The sheets that are drawn."""
    result, sheet = [], show.Sheet
    monkeypatch.setattr(show, "Sheet", lambda *args: result.append(sheet(*args)) or result[-1])
    return result


@pytest.fixture
def texts(monkeypatch):
    """The texts that are drawn, as (left, top, right, bottom, text)."""
    result, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, line, *args, **kwargs):
        result.append((*self.textbbox(xy, line, font=args[1], anchor=kwargs.get("anchor")), line))
        return draw_text(self, xy, line, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return result


def lines(texts):
    return [line for *_, line in texts]


def draw(teacher, path, out="m.png", **options):
    """Run the command `mask` -> the picture, (H, W, 3)."""
    options = {"mask": ("fixed",), "ratio": 0.875, "frames": 3, **options}
    show.main(show.MaskCommand(path, teacher, out=out, **options))
    return np.asarray(Image.open(out).convert("RGB")).astype(int) if out.endswith(".png") else None


def panels(sheet, picture, column):
    """The frames of a column, (rows, h, w, 3), cut out of a picture."""
    h, w = sheet.shape
    corners = [sheet.place(column, row) for row in range(sheet.rows)]
    return np.stack([picture[y:y + h, x:x + w] for x, y in corners])


def visible_pixels(H, W):
    """(3, H, W) bool: the pixels of VISIBLE."""
    return np.array([[[y * 4 // H * 4 + x * 4 // W in ids for x in range(W)] for y in range(H)]
                     for ids in VISIBLE.tolist()])


# ---------------------------------------------------------------------------------------------------------------------
# Masks side by side

@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (360, 640), (656, 368)], ids=str)
def test_visible_tokens_are_bright_and_outlined_and_all_else_is_dim(teacher, video, sheets, shape):
    picture = draw(teacher, video(*shape, 3))
    sheet, = sheets
    h, w = sheet.shape
    assert w / h == pytest.approx(shape[1] / shape[0], rel=0.02) and (sheet.rows, len(sheet.columns)) == (3, 3)
    frames, _, mask = (panels(sheet, picture, c) for c in range(3))
    resized = resize(read_frames("clip.mp4", 3), (h, w)).permute(0, 2, 3, 1).numpy()
    assert np.abs(frames - resized).mean() < 8                              # they are enlarged in another way
    bright = visible_pixels(h, w)
    np.testing.assert_array_equal(mask[bright], frames[bright])
    outline = (mask == 128).all(-1)
    np.testing.assert_allclose(mask[~bright & ~outline], 0.22 * frames[~bright & ~outline], atol=0.51)
    near = np.zeros_like(bright)
    for axis, shift in ((1, 1), (1, -1), (2, 1), (2, -1)):
        near |= np.roll(bright, shift, axis)
    assert not (outline & ~near).any() and (outline & ~bright).sum() > 100


@pytest.mark.parametrize("place", [(0, 3), (2, 0)], ids=str)
def test_a_token_is_drawn_where_the_teacher_sees_it(teacher, video, sheets, monkeypatch, place):
    """The mask keeps the token that differs most between the frames: the block of pixels that changes."""
    def changed(tokens, keep, **aux):
        token = (tokens[:, 1] - tokens[:, 0]).norm(dim=-1).argmax(1, keepdim=True)              # (1, 1)
        return torch.cat([token, token + tokens.shape[2]], 1)

    monkeypatch.setitem(MASKS, "changed", changed)
    frames = np.full((2, 48, 96, 3), 120, np.uint8)
    y, x = place
    frames[1, 12 * y:12 * y + 12, 24 * x:24 * x + 24] = np.random.default_rng(0).integers(0, 255, (12, 24, 3))
    write_video("changed.mp4", frames, fps=2)
    picture = draw(teacher, "changed.mp4", mask=("changed",), ratio=0.95, frames=2)
    sheet, = sheets
    h, w = sheet.shape
    shown, mask = panels(sheet, picture, 0), panels(sheet, picture, 2)
    block = np.zeros((2, h, w), bool)
    block[:, y * h // 4:(y + 1) * h // 4, x * w // 4:(x + 1) * w // 4] = True
    np.testing.assert_array_equal(mask[block], shown[block])
    assert (mask[~block] == shown[~block]).all(-1).mean() < 0.01


def test_clusters_have_a_colour_a_border_and_a_dot_on_the_centre():
    frames = np.full((1, 24, 36, 3), 0.5)
    labels, centres = np.array([[0, 0, 1, 0, 0, 1]]), np.array([[3, 2]])    # 2 x 3 tokens of 12 x 12 pixels
    tinted = show.colour_clusters(frames, labels, centres, (2, 3))
    marked = show.mark_centres(tinted, labels, centres, (2, 3))[0]
    assert (marked[18, 6] == 1).all() and (marked[6, 30] == 1).all()
    assert (marked[:, 24] == 0).all() and not (marked[12, :20] == 0).all(-1).any()
    assert (marked[6, 6] == tinted[0, 18, 20]).all() and (marked[6, 6] != tinted[0, 18, 30]).any()
    for K in (1, 6, 26, 80):
        assert len(np.unique(show.colours(K).round(3), axis=0)) == K


def test_a_cluster_keeps_its_number_from_frame_to_frame():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(3, 8, generator=generator)
    object_of = torch.stack([torch.randperm(3, generator=generator).repeat(4) for _ in range(5)])       # (T, N)
    tokens = objects[object_of] + 0.01 * torch.randn(5, 12, 8, generator=generator)
    labels = torch.arange(3).repeat(5, 4)                                   # numbered by the places of the centres
    centres = torch.tensor([0, 4, 8]).expand(5, 3)
    matched, matched_centres = show.match_clusters(tokens, labels, centres)
    number = {i: matched[0, object_of[0] == i].unique().item() for i in range(3)}
    assert all(number[i] == n for i, n in zip(object_of.flatten().tolist(), matched.flatten().tolist(), strict=True))
    assert torch.equal(matched.gather(1, matched_centres), torch.arange(3).expand(5, 3))


def test_a_cluster_is_known_again_by_all_its_tokens_in_all_frames_before():
    """Six objects of four tokens, numbered at random: two are gone for two frames, and each centre is an odd token."""
    generator = torch.Generator().manual_seed(1)
    T, K = 6, 6
    objects = torch.randn(K + 2, 16, generator=generator)
    present = [[*range(K)]] * 2 + [[0, 1, 2, 3, K, K + 1]] * 2 + [[*range(K)]] * 2          # two others in their place
    object_of = torch.stack([torch.tensor(ids)[torch.randperm(K, generator=generator)] for ids in present])    # (T, K)
    tokens = objects[object_of].repeat_interleave(4, 1) + 0.3 * torch.randn(T, 4 * K, 16, generator=generator)
    tokens *= 0.1 + 3 * torch.rand(T, 4 * K, 1, generator=generator)                        # lengths do not matter
    centres = 4 * torch.arange(K).expand(T, K)
    tokens.scatter_(1, centres[..., None].expand(-1, -1, 16), objects[object_of.roll(1, 1)])
    labels = torch.arange(K).repeat_interleave(4).expand(T, 4 * K)
    matched, matched_centres = show.match_clusters(tokens, labels, centres)
    number = {i: matched[0, 4 * k].item() for k, i in enumerate(object_of[0].tolist())}
    for t in range(T):
        assert sorted(matched[t, ::4].tolist()) == [*range(K)]
        assert torch.equal(matched[t].gather(0, matched_centres[t]), torch.arange(K))
        for k, i in enumerate(object_of[t].tolist()):
            assert (matched[t, 4 * k:4 * k + 4] == matched[t, 4 * k]).all()
            assert matched[t, 4 * k] == number[i] if i < K else matched[t, 4 * k] in (number[4], number[5])


@pytest.mark.parametrize("sizes, lengths", [([2, 10], [1, 1]), ([10, 2], [1, 1]), ([6, 6], [1, 9]), ([6, 6], [9, 1])],
                         ids=str)
def test_a_cluster_is_known_again_if_it_grows_or_brightens(sizes, lengths):
    """Two objects at an angle of 60 degrees change their sizes, or their tokens' lengths, with each other."""
    objects = torch.tensor([[1.0, 0], [0.5, 0.75 ** 0.5]])
    order = [(0, sizes, lengths), (1, sizes[::-1], lengths[::-1])]          # of cluster 0: the object
    tokens = torch.stack([torch.cat([objects[first].expand(size[first], 2) * length[first],
                                     objects[1 - first].expand(size[1 - first], 2) * length[1 - first]])
                          for first, size, length in order])
    counts = [(size[first], size[1 - first]) for first, size, _ in order]
    labels = torch.stack([torch.tensor([0] * a + [1] * b) for a, b in counts])
    centres = torch.tensor([[0, a] for a, _ in counts])
    matched, matched_centres = show.match_clusters(tokens, labels, centres)
    assert torch.equal(matched, torch.stack([labels[0], 1 - labels[1]]))
    assert matched_centres.tolist() == [[0, counts[0][0]], [counts[1][0], 0]]


def test_a_cluster_is_known_again_if_it_comes_to_look_as_another_did_at_first():
    """Over six frames the first object turns from e0 to e2, the second from e1 to e0."""
    angle = torch.linspace(0, 1.4, 6)
    first = torch.stack([angle.cos(), 0 * angle, angle.sin()], -1)
    second = torch.stack([angle.sin(), angle.cos(), 0 * angle], -1)
    tokens = torch.stack([first, second], 1)                                # (T, N, C)
    tokens[1::2] = tokens[1::2].flip(1)
    labels = torch.arange(2).expand(6, 2)
    matched, _ = show.match_clusters(tokens, labels, labels)
    assert matched.tolist() == [[0, 1], [1, 0]] * 3


@pytest.mark.parametrize("K", [1, 2, 3, 9, 26])
def test_no_exchange_of_two_pairs_is_better(K):
    generator = torch.Generator().manual_seed(K)
    for score in (torch.randn(K, K, generator=generator), torch.randint(-2, 3, (K, K), generator=generator).float(),
                  -1e3 * torch.rand(K, K, generator=generator)):
        column = show.assign_pairs(score).tolist()
        assert sorted(column) == [*range(K)]
        total = sum(score[i, j].item() for i, j in enumerate(column))
        assert K == 1 or total >= score.diagonal().sum().item() - 1e-3
        for i in range(K):
            for j in range(i):
                kept = score[i, column[i]] + score[j, column[j]]
                assert kept >= score[i, column[j]] + score[j, column[i]] - 1e-3
    assert show.assign_pairs(torch.tensor([[0.9, 0.8], [0.85, 0.1]])).tolist() == [1, 0]        # not 0.9 first


def test_equal_clusters_are_paired_in_finite_time():
    """Large equal scores but for rounding, as of a black clip: two exchanges once took turns for ever."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sizes, others = (torch.randint(1, 400, (50,), generator=generator).float() for _ in range(2))
        score = sizes[:, None] * (1 - 1e-7 * torch.rand(50, 50, generator=generator)) * (others / others)
        assert sorted(show.assign_pairs(score).tolist()) == [*range(50)]


def test_the_figures_above_a_mask_are_those_counted_by_hand():
    masks = {"a": np.array([[1, 1, 0, 0], [1, 0, 0, 1]], bool), "b": np.array([[1, 1, 1, 0], [0, 0, 0, 1]], bool)}
    clip = show.ClipMasks((2, 2), np.array([[0, 0, 1, 1], [0, 1, 1, 1]]), np.array([[0, 2], [0, 1]]), masks,
                          {"a": 3.14, "b": 314.2})
    assert clip.figures("a") == ("2 of 4 tokens", "75 % of clusters", "50 % stay", "3.1 ms")
    assert clip.figures("b") == ("1-3 of 4 tokens", "75 % of clusters", "0 % stay", "314 ms")
    frame = show.ClipMasks((2, 2), clip.labels[:1], clip.centres[:1], {"a": masks["a"][:1]}, {"a": 0.0})
    assert frame.figures("a")[1:3] == ("50 % of clusters", "- stay")


@pytest.mark.parametrize("shape, count", [((48, 96), 1), ((48, 96), 23), ((360, 640), 4), ((656, 368), 1),
                                          ((656, 368), 23)], ids=str)
def test_every_mask_is_named_and_nothing_overlaps(teacher, video, sheets, texts, monkeypatch, shape, count):
    names = [f"mask_of_a_long_name_{i}" for i in range(count)]
    for name in names:
        monkeypatch.setitem(MASKS, name, MASKS["fixed"])
    picture = draw(teacher, video(*shape, 3), mask=(*names, "tube"))
    sheet, = sheets
    (h, w), (H, W) = sheet.shape, picture.shape[:2]
    assert W <= show.WIDE and (count < 23 or sheet.bands > 1)
    assert W > 0.7 * show.WIDE or w in (96, 135) or count == 1
    said = lines(texts)
    titles = ["frame", "clusters", *names, "tube"]
    assert [line for line in said if line in titles] == titles
    assert said.count("2 of 16 tokens") == count + 1 and said.count("33 % stay") == 0
    assert said.count("50 % stay") == count and said.count("100 % stay") == 1           # tube keeps the same places
    corners = [sheet.place(c, r) for c in range(count + 3) for r in range(3)]
    boxes = np.array([(x, y, x + w, y + h) for x, y in corners] + [text[:4] for text in texts])
    assert (boxes >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= (W, H)).all()
    apart = (boxes[:, None, 2:] <= boxes[None, :, :2]).any(-1)
    assert (apart | apart.T | np.eye(len(boxes), dtype=bool)).all()


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (120, 170)], ids=str)
def test_a_video_shows_the_columns_of_one_moment_after_the_other(teacher, video, sheets, texts, shape):
    draw(teacher, video(*shape, 3), "m.mp4", mask=("fixed", "tube"))
    sheet = sheets[-1]
    with av.open("m.mp4") as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 2 and stream.codec_context.pix_fmt == "yuv420p"
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(pictures) == 3 and pictures[0].shape[0] % 2 == pictures[0].shape[1] % 2 == 0
    h, w = sheet.shape
    for t, picture in enumerate(pictures):
        for c, column in enumerate(sheet.columns):
            assert np.abs(panels(sheet, picture, c)[0] - column.frames[t]).mean() < (25 if c == 1 else 10)
        bright = visible_pixels(h, w)[t]
        mask = panels(sheet, picture, 2)[0]
        assert mask[bright].mean() > 2.5 * mask[~bright].mean()
    assert [line for line in lines(texts) if line.endswith(" s")] == ["0.0 s", "0.5 s", "1.0 s"]


def test_frames_are_the_middles_of_equal_parts_or_all_of_a_short_video(teacher, video, sheets, texts, capsys):
    draw(teacher, video(48, 96, 3), frames=8)
    out = capsys.readouterr().out
    assert sheets[-1].rows == 3 and "clip.mp4" in out and "3 frames" in out and "8" in out
    draw(teacher, video(48, 96, 9))
    times = [line for line in lines(texts) if line.endswith(" s")]
    assert times == ["0.0 s", "0.5 s", "1.0 s", "0.5 s", "2.0 s", "3.5 s"]
    assert "frames" not in capsys.readouterr().out
    draw(teacher, video(48, 96, 1), mask=("tube",), frames=1)
    assert "- stay" in lines(texts)


def test_a_larger_size_is_a_finer_grid_and_flags_reach_the_masks(teacher, video, texts, monkeypatch):
    path, calls = video(48, 96, 3), []
    compute_masks = show.compute_masks
    monkeypatch.setattr(show, "compute_masks", lambda *args: calls.append(args) or compute_masks(*args))
    draw(teacher, path, size=64, mask=("cluster_stm", "random_frame"), ratio=0.75, quantile=0.3, seed=5)
    said = lines(texts)
    assert "8 x 8 tokens" in said and said.count("16 of 64 tokens") == 2 and "16 a frame" in said
    (*inputs, configs, clusters, grid, caption, seed), = calls
    assert (grid, caption, seed) == ((8, 8), "", 5)
    assert configs == {m: MaskConfig(m, 0.75, quantile=0.3) for m in ("cluster_stm", "random_frame")}
    assert clusters == configs["cluster_stm"]
    first, same, other = (compute_masks(*inputs, configs, clusters, grid, caption, s).masks for s in (5, 5, 6))
    assert all((first[name] == same[name]).all() for name in configs)
    assert (first["cluster_stm"] == other["cluster_stm"]).all()
    assert (first["random_frame"] != other["random_frame"]).any()


def test_masks_get_text_aligned_tokens_and_log_attention(teacher, video, texts, monkeypatch):
    inputs = {}

    def sampled(tokens, keep, *, logits=None, **aux):
        inputs.update(aux, logits=logits)
        return MASKS["fixed"](tokens, keep)

    def guided(tokens, keep, *, text=None, aligned=None, **aux):
        if text is None:
            raise ValueError("the mask guided needs text (B, E), got none")
        inputs.update(text=text, aligned=aligned)
        return MASKS["fixed"](tokens, keep)

    for mask, names in ((sampled, {"logits"}), (guided, {"text", "aligned"})):
        monkeypatch.setitem(MASKS, mask.__name__, mask)
        monkeypatch.setitem(MASK_INPUTS, mask.__name__, names)
    path = video(48, 96, 3)
    draw(teacher, path, mask=("sampled", "guided"), caption="a red square")
    assert lines(texts).count("by log attention") == 1
    torch.testing.assert_close(inputs["logits"], inputs["attention"].log())
    siglip = SigLIP.from_pretrained(teacher)
    torch.testing.assert_close(inputs["text"], siglip.encode_text(siglip.tokenize(["a red square"])))
    assert inputs["aligned"].shape == (1, 3, 16, 32) and inputs["grid"] == (4, 4)
    with pytest.raises(ValueError, match="guided.* --caption"):
        draw(teacher, path, mask=("guided",))


@pytest.mark.parametrize("flags, message", [
    ("--mask tube", f"{show.DEMO_TEACHER}: .*--teacher"), ("--teacher TEACHER --mask tube clusters", "mask.*clusters"),
    ("--teacher TEACHER --size 20", "--size .*8.*20"), ("--teacher TEACHER --size -8", "--size .*8.*-8"),
    ("--teacher TEACHER --frames 0", "0"), ("--teacher TEACHER --out m.xyz", "xyz"),
    ("--teacher TEACHER --out nowhere/m.mp4", "nowhere/m.mp4: .*nowhere"), ("--teacher nowhere", "nowhere"),
])
def test_wrong_flags_are_one_line(teacher, video, capsys, flags, message):
    args = ["mask", video(48, 96, 3), *flags.replace("TEACHER", teacher).split()]
    code, _, err = command("tools.show", args, capsys)
    assert_one_line("tools.show", code, err, message)
    assert not os.path.exists("masks.png")


@pytest.mark.parametrize("content", [None, b"\0" * 300], ids=["missing", "damaged"])
def test_a_video_that_cannot_be_read_is_one_line(teacher, tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "bad.mp4").write_bytes(content)
    code, _, err = command("tools.show", ["mask", "bad.mp4", "--teacher", teacher], capsys)
    assert_one_line("tools.show", code, err, "bad.mp4")


# ---------------------------------------------------------------------------------------------------------------------
# Figures

@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved."""
    result, save = [], show.save
    monkeypatch.setattr(show, "save", lambda figure, path: (result.append(figure), save(figure, path)))
    return result


def assert_picture(path):
    """A PNG of some size in which something is drawn."""
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 100
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_plot_masks_draws_frames_clusters_and_each_mask(teacher, video, figures):
    clip = eval_transform(read_frames(video(48, 96, 3), 3), 32)
    configs = {title: MaskConfig(name, 0.75) for title, name in (("ours", "cluster_stm"), ("theirs", "random_frame"))}
    show.plot_masks(clip, SigLIP.from_pretrained(teacher), configs, "masks.png")
    assert_picture("masks.png")
    images = [axis.get_images()[0].get_array() for axis in figures[0].axes]
    assert len(images) == 4 * 3                                             # rows of T pictures
    for t in range(3):
        frame = np.asarray(clip[t].permute(1, 2, 0)) / 255
        np.testing.assert_allclose(images[t], frame)
        tints = (images[3 + t] - 0.35 * frame).reshape(-1, 3).round(6)
        assert 1 < len(np.unique(tints, axis=0)) <= 4                       # one colour for each cluster
        for image in (images[6 + t], images[9 + t]):
            bright = (image == frame).all(-1).reshape(4, 8, 4, 8).all((1, 3))                   # (4, 4) tokens
            assert bright.sum() == keep_count(16, 0.75)


@pytest.mark.parametrize("shape", [(18, 32), (32, 18), (20, 20)], ids=str)
def test_frames_of_any_shape_fill_the_picture(monkeypatch, tmp_path, figures, shape):
    """Six rows of five frames: clusters and the tokens of four masks, each mask its own."""
    generator = np.random.default_rng(0)
    video = torch.from_numpy(generator.integers(100, 255, (5, 3, *shape), np.uint8))
    names = {"ClusterSTM": "cluster_stm", "UMT": "umt", "tube": "tube", "random": "random_frame"}
    masks = {title: np.eye(4, dtype=bool)[[i] * 5] for i, title in enumerate(names)}
    clip = show.ClipMasks((2, 2), np.tile([0, 1, 1, 1], (5, 1)), np.tile([0, 1], (5, 1)), masks, {})
    monkeypatch.setattr(show, "compute_masks", lambda *args: clip)
    show.plot_masks(video, None, {title: MaskConfig(name) for title, name in names.items()}, str(tmp_path / "m.png"))
    figure, = figures
    axes = np.array(figure.axes).reshape(6, 5)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == [
        "frames", "2 clusters a frame", *(f"{title} keeps" for title in names)]
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert all(box.height / box.width == pytest.approx(shape[0] / shape[1], rel=0.02) for box in boxes)
    assert sum(box.width * box.height for box in boxes) > 0.6 * figure.bbox.width * figure.bbox.height
    for t in range(5):
        frame = video[t].permute(1, 2, 0).numpy() / 255
        for i in range(4):
            y, x = (slice(k * side // 2, (k + 1) * side // 2) for k, side in zip(divmod(i, 2), shape, strict=True))
            image = axes[2 + i, t].get_images()[0].get_array()
            assert (image == frame).all(-1).sum() == shape[0] * shape[1] // 4 and (image == frame)[y, x].all()


def test_masked_tokens_are_darkened_and_clusters_tinted():
    frames = np.random.default_rng(0).uniform(0.2, 1, (2, 6, 6, 3))
    visible = np.zeros((2, 6), bool)
    visible[0, 1] = visible[1, 5] = True                                    # of 2 x 3 tokens of 3 x 2 pixels
    expected = 0.22 * frames
    expected[0, 0:3, 2:4] = frames[0, 0:3, 2:4]
    expected[1, 3:6, 4:6] = frames[1, 3:6, 4:6]
    np.testing.assert_allclose(show.dim(frames, visible, (2, 3)), expected)
    labels = np.array([[0, 0, 1, 1, 2, 2], [2, 1, 0, 2, 1, 0]])
    tint = show.colour_clusters(frames, labels, np.zeros((2, 3), int), (2, 3)) - 0.35 * frames
    label_of = {tuple(tint[t, 3 * (n // 3), 2 * (n % 3)].round(6)): labels[t, n] for t in range(2) for n in range(6)}
    assert len(label_of) == 3 and len(set(label_of.values())) == 3
    np.testing.assert_allclose(tint[0, :3, :4], np.broadcast_to(tint[0, 0, 0], (3, 4, 3)))


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def write_log(folder, stages):
    os.makedirs(folder)
    with open(f"{folder}/log.jsonl", "w") as f:
        for stage, steps, names in stages:
            for step in range(1, steps + 1):
                f.write(json.dumps({"stage": stage, "step": step, **{n: 2 / step for n in names}, "lr": 1e-3}) + "\n")


def test_plot_losses_has_a_panel_per_loss_and_a_line_per_run(tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    write_log("a", [("pretrain", 9, ("mrm", "vtc", "vtm", "mlm")), ("unmasked", 3, ("vtc", "vtm", "mlm"))])
    write_log("b", [("pretrain", 4, ("vtc", "vtm", "mlm"))])                # a run without masked tokens
    show.plot_losses({"one": "a", "two": "b"}, "losses.png")
    assert_picture("losses.png")
    axes = figures[0].axes
    assert len(axes) == 4 and [len(axis.get_lines()) for axis in axes] >= [1, 2, 2, 2]
    xy = {line.get_label(): line.get_xydata() for line in axes[1].get_lines()}
    assert xy["one"][:, 0].tolist() == list(range(1, 13)) and xy["two"][:, 0].tolist() == [1, 2, 3, 4]
    assert xy["one"][:, 1].tolist() == [2 / s for s in (*range(1, 10), 1, 2, 3)]
    assert [axis.get_ylabel() for axis in axes] == ["normalised squared error", "nats", "nats", "nats"]
    assert legend_texts(figures[0]) == ["one", "two"]


def test_runs_of_different_lengths_have_a_colour_each_and_the_same_axis(tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        write_log(f"r{i}", [("pretrain", 3 + i, ("vtc",)), ("unmasked", 2, ("vtc", "mlm"))])
    with open("r0/log.jsonl", "a") as f:
        f.write(json.dumps({"stage": "unmasked", "step": 2, "val_T2V_R@1": 40.0, "seconds": 1.0}) + "\n")
    for count in (1, 2, 12):
        show.main(show.RunCommand(tuple(f"r{i}" for i in range(count)), "runs.png"))
        assert_picture("runs.png")
        axes = {axis.get_title(): axis for axis in figures[-1].axes if axis.get_visible()}
        assert list(axes) == ["VTC", "MLM", show.TITLES["val_T2V_R@1"], show.TITLES["lr"]]
        assert all(axis.get_xlim() == pytest.approx((0, 1.02 * (count + 4))) for axis in axes.values())
        handles = figures[-1].legends[0].get_lines()
        colours = {line.get_label(): to_hex(line.get_color()) for line in handles}
        assert len({*colours.values()}) == count
        for axis in axes.values():
            lines = [line for line in axis.get_lines() if line.get_label() in colours]
            assert len(lines) == count
            assert all(to_hex(line.get_color()) == colours[line.get_label()] for line in lines)
            starts = {to_hex(line.get_color()): line.get_xdata()[0] for line in axis.get_lines() if line not in lines}
            assert starts == {colours[f"r{i}"]: 3 + i for i in range(count)}
            assert [text.get_text() for text in axis.texts] == ["pretrain", "unmasked"] * count
        points, = (line for line in axes[show.TITLES["val_T2V_R@1"]].get_lines() if len(line.get_xdata()) == 1)
        assert points.get_xydata().tolist() == [[5, 40]] and points.get_marker() == "."         # no line, so a dot


def test_stages_that_begin_at_the_same_step_are_named_once(tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_log(name, [("pretrain", 30, ("vtc",)), ("unmasked", 2, ("vtc",))])
    write_log("c", [("pretrain", 5, ("vtc",))])
    show.main(show.RunCommand(("a", "b", "c"), "runs.png"))
    names = {text.get_text(): (text.get_ha(), text.get_position()[0]) for text in figures[0].axes[0].texts}
    assert names == {"pretrain": ("right", 30), "unmasked": ("left", 30)} and len(figures[0].axes[0].texts) == 2
    assert {line.get_marker() for line in figures[0].axes[0].get_lines()[:1]} == {"None"}


def test_a_log_is_read_as_it_was_written(first_run):
    rows = show.read_log(f"{first_run}/out/first")
    assert [(row["stage"], row["step"]) for row in rows] == \
        [("pretrain", s) for s in range(1, 5)] + [("unmasked", s) for s in (1, 2)]


def test_the_commands_draw_runs_and_masks(first_run, sprites, tmp_path, monkeypatch, capsys, figures):
    monkeypatch.chdir(tmp_path)
    show.main(show.RunCommand((f"{first_run}/out/first",), "l.png"))
    assert_picture("l.png")
    titles = {axis.get_title() for axis in figures[0].axes}
    assert {"VTC", show.TITLES["mrm"], show.TITLES["data_wait"], show.TITLES["lr"]} <= titles
    flags = f"--teacher {first_run}/out/first/teacher --mask cluster_stm tube --ratio 0.5 --frames 3 --out m.png"
    code, out, err = command("tools.show", ["mask", f"{sprites}/videos/test_00001.mp4", *flags.split()], capsys)
    assert code == 0 and "m.png" in out, err
    assert_picture("m.png")


def test_a_folder_without_a_log_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("tools.show", ["run", "nowhere"], capsys)
    assert_one_line("tools.show", code, err, "nowhere/log.jsonl")
    write_log("empty", [])
    code, _, err = command("tools.show", ["run", "empty"], capsys)
    assert_one_line("tools.show", code, err, "empty")


def test_a_damaged_row_of_a_log_is_left_out_and_named(tmp_path, monkeypatch, capsys, figures):
    """40 changed bytes and 40 cuts of a log: the rows that are read are rows of it, up to a changed digit."""
    monkeypatch.chdir(tmp_path)
    write_log("run", [("pretrain", 6, ("vtc", "vtm")), ("unmasked", 2, ("vtc",))])
    with open("run/log.jsonl", "rb") as f:
        content = f.read()
    intact = show.read_log("run")
    for damaged in [*damaged_copies(content, 40), content + b"\0" * 99,
                    content + b'{"stage": "pretrain", "step": 7, "vtc": "x"}\n', content + b'{"vtc": 1}\n[]\n7\n']:
        with open("run/log.jsonl", "wb") as f:
            f.write(damaged)
        capsys.readouterr()
        rows, out = show.read_log("run"), capsys.readouterr().out
        kept = sum(row in intact for row in rows)
        assert len(intact) - kept <= 2 or len(damaged) < len(content)
        assert re.fullmatch(r"(run/log.jsonl, line \d+ is damaged and left out\n)*", out)
        assert out or len(damaged) < len(content) or len(rows) == len(intact)
    show.plot_losses({"run": "run"}, "l.png")
    assert kept == 8 and out.count("left out") == 3


def test_names_of_runs_are_drawn_as_they_are(tmp_path, monkeypatch, figures, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["_first", r"a$\frac{$b", "c\x1b[31m\u202e\udcff", "$5"]
    for name in names:
        write_log(name, [("pretrain", 2, ("vtc",))])
    show.main(show.RunCommand(tuple(names), "l\u202e.png"))
    assert capsys.readouterr().out == "written to l\\u202e.png\n"
    assert legend_texts(figures[0]) == [" _first", r"a\$\frac{\$b", r"c\x1b[31m\u202e\udcff", r"\$5"]      # \$: $


@pytest.mark.parametrize("command_line", [["run", "a"], ["mask", "VIDEO", "--mask", "tube"]], ids=["run", "mask"])
def test_a_picture_that_cannot_be_written_is_one_line(teacher, video, tmp_path, monkeypatch, capsys, command_line):
    write_log("a", [("pretrain", 2, ("vtc",))])
    args = [video(32, 32, 3) if a == "VIDEO" else a for a in command_line]
    args += ["--teacher", teacher] if "mask" in args else []
    code, _, err = command("tools.show", [*args, "--out", "/proc/no/x.png"], capsys)
    assert_one_line("tools.show", code, err, "/proc/no")
    os.symlink("/dev/full", "full.png")
    code, _, err = command("tools.show", [*args, "--out", "full.png"], capsys)
    assert_one_line("tools.show", code, err, "No space left")
