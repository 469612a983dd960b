"""
The page of the demo: what its steps have left in a folder -> one HTML file, out/demo/report.html.

    read_results -> DemoResults -> write_page

The page holds its pictures and clips, has no scripts, and fetches nothing. It is written again after each step: until
the last one it has what is measured so far, says what is running, and loads itself again.
"""

import json
import math
import os
from base64 import b64encode
from dataclasses import dataclass, field

import numpy as np

import search_page
from annotations import iter_annotations
from config import Config
from data import count_tokens
from files import atomic_write_text, read_json
from masking import keep_count
from search_page import Hit, escape, read_preview, render_clip

NUM_SEARCHES, NUM_HITS = 3, 3
RELOAD_SECONDS = 10
RESUMED = " The demo was stopped and continued; the step in which it was stopped has the time of its last part."


@dataclass
class Recall:
    """R@1 of text-to-video retrieval, in per cent."""
    value: float
    low: float                          # 95 % interval
    high: float


@dataclass
class MaskResult:
    """What is known of one mask and its student. None: not measured yet."""
    title: str
    kept: Recall | None = None          # with only the tokens that the mask keeps
    before: Recall | None = None        # with all tokens, before the unmasked stage
    after: Recall | None = None         # with all tokens, after it
    objects: float | None = None        # share of the objects in view that keep a token
    on_object: float | None = None      # share of the kept tokens that lie on an object


@dataclass
class FoundClip(Hit):
    """A clip that a search found. Its name is the path of its file."""
    caption: str
    correct: bool                       # whether it is a clip of the query


@dataclass
class Search:
    """A held-out caption as a query, and the clips that were found, best first."""
    query: str
    rank: int                           # of the best clip that the caption belongs to, from 1
    hits: list[FoundClip]


@dataclass
class DemoResults:
    """What the page shows. Empty fields are what is not known yet."""
    seed: int
    cfg: Config                         # settings of the students
    train_clips: int
    test_clips: int
    masks: list[MaskResult]             # the structured mask, then the random one
    clip_caption: str = ""              # of the clip in the picture of masks
    masks_picture: str = ""             # paths
    losses_picture: str = ""
    searches: list[Search] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)     # title of a step that has ended -> seconds
    resumed: bool = False               # whether the demo was stopped and continued
    machine: str = ""
    running: str = ""                   # title of the step that runs now; empty: the demo has ended
    remaining: list[str] = field(default_factory=list)          # titles of the steps after it

    @property
    def seconds(self) -> float:
        """Return the time of the steps that have ended."""
        return sum(self.timings.values())

    @property
    def N(self) -> int:
        return count_tokens(1, self.cfg.data.image_size, self.cfg.vit.patch_size)

    @property
    def K(self) -> int:
        return keep_count(self.N, self.cfg.mask.ratio)


# ---------------------------------------------------------------------------------------------------------------------
# What the steps have left

def read_recall(path: str) -> Recall | None:
    """Read R@1 and its interval from a JSON file of eval.py. None if there is no such file."""
    if not os.path.isfile(path):
        return None
    result = read_json(path)
    value, interval = (result[key]["similarity"]["T2V"]["R@1"] for key in ("scores", "intervals"))
    return Recall(value, *interval)


def read_searches(path: str) -> list[Search]:
    """
    Read three searches from the file that eval.py --save-scores wrote: the captions at 0, 1/3 and 2/3 of the list, so
    that none is chosen by its result. An empty list if there is no such file.
    """
    if not os.path.isfile(path):
        return []
    with np.load(path) as f:
        similarity, positives, ranks = f["similarity"], f["positives"], f["rank, T2V, similarity"]     # (M, V), (M,)
        videos, captions = (json.loads(f[name].tobytes()) for name in ("videos", "captions"))
    searches, M = [], len(captions)
    for m in sorted({i * M // NUM_SEARCHES for i in range(NUM_SEARCHES)}):
        hits = [FoundClip(float(similarity[m, v]), videos[v], 0.0, math.inf, 1, captions[positives[:, v].argmax()],
                          bool(positives[m, v])) for v in np.argsort(-similarity[m], kind="stable")[:NUM_HITS]]
        searches.append(Search(captions[m], int(ranks[m]), hits))
    return searches


def read_results(folder: str, clips: str, cfg: Config, masks: dict[str, str], shares: dict[str, float],
                 on_object: dict[str, float], **progress) -> DemoResults:
    """
    Read what the steps have left in the demo's folder.

    clips: folder of the data set; cfg: settings of the students; masks: name -> title, the structured one first;
    shares, on_object: title -> MaskResult.objects, .on_object, empty if not counted yet; progress: other fields of
    DemoResults.
    """
    results = [MaskResult(title, *(read_recall(f"{folder}/{name}/{part}.json") for part in ("kept", "before", "after")),
                          shares.get(title), on_object.get(title)) for name, title in masks.items()]
    counts = [sum(1 for _ in iter_annotations(f"{clips}/sprites_{split}.json")) for split in ("train", "test")]
    pictures = [path if os.path.isfile(path) else "" for path in (f"{folder}/masks.png", f"{folder}/losses.png")]
    if not shares:                          # a picture of an earlier demo, if any
        pictures[0] = ""
    return DemoResults(cfg=cfg, train_clips=counts[0], test_clips=counts[1], masks=results, masks_picture=pictures[0],
                       losses_picture=pictures[1],
                       searches=read_searches(f"{folder}/{next(iter(masks))}/after-scores.npz"), **progress)


# ---------------------------------------------------------------------------------------------------------------------
# The page

HEAD = search_page.STYLE + """
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<style>
body { max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem; line-height: 1.5; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
.status { border-left: .3rem solid #d80; padding: .1rem 1rem; background: #d802; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8886; }
td small, .pending { opacity: .75; } td small { display: block; white-space: nowrap; }
figcaption, .small { font-size: .9rem; }
.picture { margin: 0; } .picture .scroll { background: #fff; border-radius: .3rem; }
.picture img { display: block; width: 100%; min-width: 38rem; }
.hits { grid-template-columns: repeat(3, minmax(0, 13rem)); }
.hits video { aspect-ratio: 1; image-rendering: pixelated; border: .2rem solid transparent; box-sizing: border-box; }
.hits .correct video { border-color: #2a4; }
.answer h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
@media (max-width: 36rem) {
    th, td { padding: .3rem .2rem; font-size: .8rem; } td small { white-space: normal; } ul { padding-left: 1.2rem; }
    .hits { gap: .5rem; } .hits figcaption { font-size: .75rem; line-height: 1.3; }
}
</style>"""
PENDING = '<span class="pending">not yet</span>'


def embed(path: str, media_type: str) -> str:
    """Read a file -> a data URI."""
    with open(path, "rb") as f:
        return f"data:{media_type};base64,{b64encode(f.read()).decode()}"


def format_status(results: DemoResults) -> str:
    """Say what is running, if anything is."""
    if not results.running:
        return ""
    rest = f" Still to come: {escape('; '.join(results.remaining))}." if results.remaining else ""
    return (f'<p class="status">After {results.seconds:.0f} s, <b>the demo is still running</b>. Now: '
            f"{escape(results.running)}.{rest} This page shows what is measured so far and loads itself again every "
            f"{RELOAD_SECONDS} s. If the demo was stopped, the same command continues it.</p>")


def format_introduction(results: DemoResults) -> str:
    """Say what was trained on what, and what the masks are."""
    cfg, N, K = results.cfg, results.N, results.K
    structured, other = (escape(mask.title) for mask in results.masks)
    return f"""<p>A small video-language model, the <i>student</i>, is pretrained twice on {results.train_clips:,} drawn
clips of moving shapes with their captions, once with each of two masks. Of the {N} tokens of a frame (squares of
{cfg.vit.patch_size} × {cfg.vit.patch_size} pixels) it sees only the {K} that its mask keeps, {100 * K / N:.0f} %, for
{cfg.steps} steps of {cfg.batch} clips. A short <i>unmasked stage</i> with all tokens follows ({cfg.unmasked_steps}
steps of {cfg.unmasked_batch or cfg.batch} clips). The mask <b>{structured}</b> divides the tokens of a frame into {K}
clusters and keeps one token of each, the one that recurs most in the other frames. It gets the tokens from a
<i>teacher</i>, a small image-text model (SigLIP), which is trained first, on single frames of the same clips. The mask
<b>{other}</b> keeps {K} random tokens of each frame. All else is equal: clips, steps, teacher, text encoder.</p>"""


def format_recall(recall: Recall | None) -> str:
    return PENDING if recall is None else f"{recall.value:.1f} %<small>{recall.low:.1f} to {recall.high:.1f}</small>"


def format_table(results: DemoResults) -> str:
    """The results of both masks, with a sentence on each column."""
    columns = {
        "Mask": "which tokens of a frame the student saw in pretraining.",
        "Objects kept": "the share of the objects in view, in held-out frames, on which the mask keeps at least one "
                        "token.",
        "R@1, kept tokens": f"the student before the unmasked stage, given only the tokens that its mask keeps "
                            f"({results.K} of {results.N} in a frame). {escape(results.masks[0].title)} needs the "
                            "teacher for that, also when it is used.",
        "R@1, all tokens, before": "the same student, given all tokens, which it has never seen together.",
        "R@1, all tokens, after": "the student after the unmasked stage, given all tokens: the finished model.",
    }
    rows = []
    for mask in results.masks:
        objects = PENDING if mask.objects is None else f"{100 * mask.objects:.0f} %"
        cells = [f"<b>{escape(mask.title)}</b>", objects, *map(format_recall, (mask.kept, mask.before, mask.after))]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head, body = "".join(f"<th>{name}</th>" for name in columns), "\n".join(rows)
    sentences = "\n".join(f"<li><b>{name}</b>: {sentence}</li>" for name, sentence in columns.items())
    return f"""<h2>Results</h2>
<div class="scroll"><table class="results">
<tr>{head}</tr>
{body}
</table></div>
<ul class="small">
{sentences}
</ul>
<p class="small">R@1 is the share of {results.test_clips} held-out captions whose own clip comes first when all
{results.test_clips} held-out clips are ranked for the caption. Guessing gives {100 / results.test_clips:.1f} %. No
held-out clip shares its meaning with a training clip. The small numbers are 95 % intervals over the captions; another
seed or teacher may move a result further.</p>"""


def format_picture(path: str, title: str, caption: str, missing: str) -> str:
    """A picture in the page with its caption, or when it will be there."""
    if not path:
        return f'<h2>{title}</h2>\n<p class="pending">{missing}</p>'
    return (f'<h2>{title}</h2>\n<figure class="picture"><div class="scroll"><img src="{embed(path, "image/png")}" '
            f'alt="{title}"></div><figcaption>{caption}</figcaption></figure>')


def format_masks(results: DemoResults) -> str:
    """The picture of clusters and kept tokens."""
    caption = f"""The held-out clip “{escape(results.clip_caption)}”, from left to right. Top row: its frames. Second
row: the {results.K} clusters of each frame; similar clusters have the same colour in all frames. Third row: what
{escape(results.masks[0].title)} keeps, one token of each cluster; all that is dark is hidden from the student. Below:
what other masks keep, as many tokens. UMT draws them by the teacher’s attention; a tube has the same places in all
frames."""
    return format_picture(results.masks_picture, "Clusters and kept tokens", caption,
                          "The picture comes when the teacher is trained.")


def format_losses(results: DemoResults) -> str:
    """The picture of the losses."""
    cfg = results.cfg
    easier = "; its batches are smaller, which alone makes VTC lower" * (0 < cfg.unmasked_batch < cfg.batch)
    caption = f"""The losses of both students, by step; lower is better. The dotted line is where the unmasked stage
begins{easier}. MRM, masked relevance modelling: how wrongly the student predicts, for each hidden token, how relevant
it is to the captions (1: no better than the clip’s mean; the unmasked stage hides nothing and has no MRM). VTC,
video-text contrast: which caption of the batch belongs to the clip? VTM, video-text matching: does this caption belong
to this clip? MLM, masked language modelling: which word is hidden in the caption? The last three are cross-entropies in
nats."""
    return format_picture(results.losses_picture, "Losses", caption, "The curves come when the students are trained.")


def render_search(search: Search) -> str:
    """A query and its clips, which play."""
    def preview(hit):
        jpeg = read_preview(hit.name, hit.start, hit.end)
        return "data:image/jpeg;base64," + b64encode(jpeg).decode()

    figures = []
    for rank, hit in enumerate(search.hits, 1):
        clip, problem = render_clip(hit, embed(hit.name, "video/mp4"), preview, playing=True)
        mark = "✓ the clip of this caption" if hit.correct else "another clip"
        figures.append(f'<figure{" class=correct" * hit.correct}>{clip}<figcaption>{rank}. <b>{mark}</b>, similarity '
                       f"{hit.score:.2f}<br>{escape(hit.caption)}{problem}</figcaption></figure>")
    note = "" if any(hit.correct for hit in search.hits) else f'<p class="note">The clip of this caption is ranked ' \
                                                              f"{search.rank}.</p>\n"
    return (f'<section class="answer">\n<h3>“{escape(search.query)}”</h3>\n{note}<div class="hits">\n'
            + "\n".join(figures) + "\n</div>\n</section>")


def format_searches(results: DemoResults) -> str:
    """Three searches with the clips that they found."""
    if not results.searches:
        return '<h2>Three searches</h2>\n<p class="pending">The searches come with the last scores.</p>'
    return f"""<h2>Three searches</h2>
<p>Held-out captions as queries, taken from the list at equal distances, not by their results. Below each are the best
{NUM_HITS} of {results.test_clips} held-out clips by the {escape(results.masks[0].title)} student after the unmasked
stage, with all tokens. Similarity is a cosine, at most 1. Each clip lasts one second; its own caption is below it.</p>
""" + "\n".join(map(render_search, results.searches))


def compare_before(structured: MaskResult, other: MaskResult) -> str:
    """Say what this run measured before the unmasked stage, if all of it is measured."""
    if not (structured.kept and structured.before and other.before):
        return "The reason is proportion."
    kept, before, rival = structured.kept.value, structured.before.value, other.before.value
    measured = (f"Before the unmasked stage, R@1 of the {escape(structured.title)} student is {kept:.1f} % with its "
                f"kept tokens and {before:.1f} % with all; the {escape(other.title)} student’s is {rival:.1f} %. ")
    return measured + ("The reason is proportion." if before < min(kept, rival) else
                       "So this run does not show it; where a run does, the reason is proportion.")


def format_explanation(results: DemoResults) -> str:
    """Why the structured mask's student has difficulties with all tokens, and what helps."""
    structured, other = results.masks
    title, on_object, after = escape(structured.title), "", ""
    if None not in (structured.on_object, other.on_object):
        on_object = (f": {100 * structured.on_object:.0f} % of the tokens that it keeps lie on an object, and "
                     f"{100 * other.on_object:.0f} % of random tokens, as of all")
    if structured.after and other.after:
        after = f": {structured.after.value:.1f} % against {other.after.value:.1f} % afterwards"
    return f"""<h2>Why {title} has difficulties with all tokens before the unmasked stage</h2>
<p>{compare_before(structured, other)} {title} keeps one token of each cluster, however large the cluster is, and so
few of the background{on_object}. Attention counts tokens, and so does the mean over tokens that
makes the feature of a clip. With all tokens the background therefore weighs much more than it ever did in training, and
hides the objects. Random tokens have the proportions of all tokens, so their student meets nothing new. The unmasked
stage lets the {title} student get used to the other proportions{after}.</p>
<p><b>What helps without an unmasked stage:</b> with <code>--model.proportional</code> each kept token counts, in
attention and in the mean, for the hidden tokens of its frame that are most like it, so the background has its full
weight from the first step. On a harder set of drawn clips (<code>crowd</code>, three seeds, commit ff96f01) the
{title} student then has R@1 65.8 ± 1.9 % with all tokens and no unmasked stage, instead of 23.0 ± 1.8 % without the
option; random tokens have 56.6 ± 1.8 % after theirs (mean of both directions, among 512 clips). The option is ours, not
the paper’s, and this demo does not use it.</p>"""


def format_limits(_: DemoResults) -> str:
    """What one should not conclude from the page."""
    return """<h2>What this page does not show</h2>
<ul>
<li>That the gap stays: with all tokens, after the unmasked stage, the comparison is one of learning speed. On the
harder set, after 600 steps, random tokens are ahead, 56.6 ± 1.8 % to 52.0 ± 0.8 %. Length of the run and textures of
the backgrounds were chosen with this comparison in sight.</li>
<li>That density peaks, the paper’s way to cluster, are needed: k-means and farthest points do at least as well here.
</li>
<li>That keeping the token which recurs most helps: −0.2 ± 0.5 points of R@1 against a random token of each
cluster.</li>
<li>That MRM helps: it does so only where captions are wrong.</li>
<li>Anything about real video: models are small, clips are drawn, and no published benchmark has been scored.</li>
</ul>
<p class="small">Commands, seeds and all tables are in docs/results.md.</p>"""


def format_timings(results: DemoResults) -> str:
    """How long each step took."""
    rows = [f"<tr><td>{escape(title)}</td><td>{seconds:.0f} s</td></tr>" for title, seconds in results.timings.items()]
    if results.running:
        rows.append(f"<tr><td>{escape(results.running)}</td><td>running</td></tr>")
    rows.append(f"<tr><td><b>all, so far</b></td><td>{results.seconds:.0f} s</td></tr>" if results.running else
                f"<tr><td><b>all</b></td><td>{results.seconds:.0f} s</td></tr>")
    return ('<h2>Time</h2>\n<div class="scroll"><table>\n<tr><th>Step</th><th>Time</th></tr>\n' + "\n".join(rows)
            + f'\n</table></div>\n<p class="small">{escape(results.machine)}.{RESUMED * results.resumed}</p>')


def format_page(results: DemoResults) -> str:
    """Return the page as HTML."""
    head = HEAD + f'\n<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' * bool(results.running)
    parts = [part(results) for part in (
        format_status, format_introduction, format_table, format_masks, format_losses, format_searches,
        format_explanation, format_limits, format_timings)]
    title = f"ClusterSTM, the embedded demo, seed {results.seed}"
    return search_page.PAGE.format(title=title, style=head, answers="\n".join(parts))


def write_page(path: str, results: DemoResults):
    """Write the page, complete or not at all."""
    atomic_write_text(path, format_page(results))
