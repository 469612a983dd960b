"""
Evaluate a trained model.

    python eval.py --task sprites --checkpoint out/sprites
    python eval.py --task msrvtt --checkpoint out/base --data-root DATA         # any task of tasks.TASKS
    python eval.py --task sprites --checkpoint out/sprites --mask cluster_stm --mask-ratio 0.9
    python eval.py --task sprites --checkpoint out/sprites --frames 16 --size 48 \\
        --mask flux_group_dynamic --tokens 144 --features student_embedding     # any grid and budget, no teacher
    python eval.py --checkpoint out/captions --data captions.json --data-root FOLDER
    torchrun --nproc_per_node=8 eval.py --task msrvtt --checkpoint out/base --data-root DATA
    python eval.py --task list                                                  # the tasks, a line each

Inputs: a folder that train.py wrote, an annotation file and its videos. Outputs: a printed table, and a JSON file with
the scores, the protocol and, for question answering and captioning, every prediction. NaN is an error, never a score.
Under each row of scores are their 95 % intervals (bootstrap over queries; docs/method.md §4). --save-scores also writes
the matrices of retrieval, and the ranks of all queries, as an .npz file beside the JSON file.

Retrieval is text-to-video (T2V) and video-to-text (V2T): R@1/5/10 in per cent, median and mean rank. Candidates are
ranked by similarity (the mean over frames of the cosines), by similarity with a dual softmax over all queries, and with
the top k of each query re-ranked by the matching head. Multiple choice uses both scores. Question answering ranks a
list of answers, and generates one. Captioning decodes greedily and by beam search. With --mask the model sees only the
tokens that the mask selects. All videos have one grid: the standard one of the run, or that of --frames and --size.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import metrics
import tasks
from annotations import Annotation, iter_annotations
from budgets import count_equal_groups
from data import ClipDataset, DataConfig, init_loader_worker, require_readable
from files import atomic_write, atomic_write_text, config_from_dict, escape_control, read_json
from inputs import require_finite
from masking import CLIP_BUDGET, MASK_INPUTS, MASKS, MaskConfig
from media import is_shards
from model import ClusterSTM, VideoToText, load_model
from runtime import all_gather_lists, all_reduce_sum, bf16_autocast, rank_and_world, run_cli, select_device
from targets import TeacherTargets, compute_visible_ids, needs_teacher
from tasks import TASK_KINDS, TASKS, Task, split_files
from teacher import SigLIP
from tokenizer import decode_ids, encode_answers, encode_texts, load_tokenizer

TASK_HELP = f"benchmark to evaluate on; `list` prints a line about each: {', '.join(TASKS)}"
USABLE_MASKS = [name for name in MASKS if not MASK_INPUTS[name] & {"logits", "text", "aligned"}]
MASK_HELP = f"evaluate with only the tokens that a mask selects; empty: all tokens; masks: {', '.join(USABLE_MASKS)}"


@dataclass
class Config:
    """Evaluate a checkpoint: print a table of scores and write them as JSON."""
    task: Annotated[str, tyro.conf.arg(help=TASK_HELP)] = "sprites"
    checkpoint: str = "out/sprites"     # folder that train.py wrote
    data_root: str = ""     # folder of annotations and videos, or of the videos of --data; sprites tasks need none
    data: str = ""          # your own annotation file, in the task's format, or tar shards; empty: the task's
    answers: str = ""       # questions: JSON file that lists the answers to rank; empty: the task's list
    split: Literal["test", "val"] = "test"              # split of the task; not to be given with --data
    mask: Annotated[str, tyro.conf.arg(help=MASK_HELP)] = ""
    # share of the tokens that --mask hides, 0 to below 1, of those that the teacher sees; None: as in training
    mask_ratio: float | None = None
    tokens: int = 0         # tokens of a clip that --mask keeps; 0: as --mask-ratio, or the largest budget of training
    # what --mask compares: the teacher's last layer, its patch embedding, or the student's; empty: as in training
    features: Literal["", "teacher", "teacher_embedding", "student_embedding"] = ""
    teacher: str = ""       # SigLIP folder or hub id, which most masks need; empty: the teacher of the training
    # retrieval: candidates to re-rank, 0: none; questions: answers to score in full, 0: all; -1: the task's number
    rerank: int = -1
    count_first_token_twice: bool = True    # questions: count the log p of an answer's first token twice, as UMT does
    beams: int = 3          # captioning: beams of the beam search; 1: greedy decoding only
    frames: int = 0         # frames per clip; 0: as fine-tuned, or the task's zero-shot number if only pretrained
    size: int = 0           # height and width of a frame, pixels; 0: as trained
    on_missing: Literal["error", "skip"] = "error"      # if a video cannot be read: stop, or skip and report it
    batch: int = 32         # clips per forward pass
    workers: int = -1       # data loading processes; 0: load in the main process; -1: as in training
    seed: int = 0           # seed of masks that are drawn at random
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if there is a GPU
    out: str = ""           # JSON file to write; empty: eval-TASK-MASK-SETTINGS.json in the checkpoint's folder
    save_scores: bool = False   # retrieval, multiple choice: write all scores and ranks too, beside the JSON file

    def __post_init__(self):
        if self.data and not self.data_root and not is_shards(self.data):
            raise ValueError(f"--data-root must be the folder of the videos in --data {self.data}, got ''")
        if self.mask and self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        if not self.mask and (self.teacher or self.tokens or self.features or self.mask_ratio is not None):
            raise ValueError("--mask must name a mask if --mask-ratio, --tokens, --features or --teacher is given, "
                             "got ''")
        if self.tokens and self.mask_ratio is not None:
            raise ValueError(f"--tokens must not be given with --mask-ratio, got {self.tokens} and {self.mask_ratio}")
        if self.data and self.split != "test":
            raise ValueError(f"--split must not be given with --data, whose rows are all scored, got {self.split}")
        for name, least in (("beams", 1), ("batch", 1), ("workers", -1), ("rerank", -1), ("frames", 0), ("size", 0),
                            ("tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass
class Protocol:
    """How a model is evaluated."""
    max_text_length: int                # tokens of a caption or question
    max_answer_length: int = 0          # tokens of an answer or generated caption
    rerank_topk: int = 0                # retrieval: candidates to re-rank (0: none); answers to score in full (0: all)
    count_first_token_twice: bool = True
    beams: int = 1
    batch: int = 32
    workers: int = 0
    cider_only: bool = False            # captioning: compute CIDEr only
    skip_unreadable: bool = False       # leave out videos that do not decode, and list them in `unreadable`
    visible_fn: Callable | None = None  # batch -> TeacherTargets with the visible tokens; None: all tokens
    answers: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)     # (video, reason)
    saved_scores: dict[str, np.ndarray] | None = None       # --save-scores: filled by retrieval and multiple choice


# Encoding videos and captions

def encode_videos(model, dataset: ClipDataset, indices: Sequence[int], tokenizer, protocol: Protocol):
    """
    Encode this rank's share of `indices`; yield batches of (indices, tokens (B, S, C), features (B, E') or None).
    ValueError if a video cannot be read and protocol.skip_unreadable is not set, or if the model gives NaN or infinity.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    loader = DataLoader(data.ReadableClips(dataset, indices[rank::world]), protocol.batch, num_workers=protocol.workers,
                        worker_init_fn=init_loader_worker,
                        collate_fn=partial(data.collate_readable, tokenizer, protocol.max_text_length))
    for batch_indices, batch, errors in tqdm(loader, "videos", mininterval=1, leave=False, disable=rank > 0):
        if errors and not protocol.skip_unreadable:
            raise ValueError(errors[0][1])
        protocol.unreadable += errors
        if batch is None:
            continue
        batch = batch.to(device)
        with bf16_autocast(device):
            targets = protocol.visible_fn and protocol.visible_fn(batch)
            tokens, features = model.encode_video(batch.video, *clip_inputs(targets))
        videos = [dataset.annotations[i].video for i in batch_indices]
        for values in (x for x in (tokens, features) if x is not None):
            require_finite(values, videos, "the model's features of the video")
        yield batch_indices, tokens, features


def clip_inputs(targets: TeacherTargets | None) -> tuple[Tensor | None, ...]:
    """Return what encode_video takes beside the video; nothing if it sees all tokens."""
    return (targets.visible_ids, targets.token_size, targets.patch_embeds) if targets else ()


def encode_captions(model: ClusterSTM, tokenizer, captions: list[str], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """M captions -> ids (M, L), states (M, L, D), features (M, E'). ValueError if a feature is not finite."""
    ids = encode_texts(tokenizer, captions, length).to(model.temp.device)
    states, features = map(torch.cat, zip(*(model.encode_text(chunk) for chunk in ids.split(256)), strict=True))
    require_finite(features, captions, "the model's feature of the caption")
    return ids, states, features


def score_pairs(model: ClusterSTM, ids: Tensor, states: Tensor, tokens: Tensor, text_index: Tensor,
                video_index: Tensor) -> Tensor:
    """P pairs of a text (ids, states) and a video of tokens (V, S, C) -> (P, 2) logits of no match and match."""
    chunk_size = max(1, min(1024, 2 ** 28 // max(1, tokens[0].numel())))        # bounds the memory of keys and values
    order = video_index.argsort(stable=True)                                    # pairs of one video stay together
    logits = torch.empty(len(video_index), 2, device=video_index.device)
    hide_bar = rank_and_world()[0] > 0
    for chunk in tqdm(order.split(chunk_size), "matching", mininterval=1, leave=False, disable=hide_bar):
        texts = text_index[chunk]
        videos, row = video_index[chunk].unique(return_inverse=True)            # keys and values once per video
        with bf16_autocast(video_index.device):
            logits[chunk] = model.match(states[texts], ids[texts], tokens[videos], row).float()
    return logits


# The kinds of tasks

@dataclass
class EncodedVideos:
    """The V readable videos of an evaluation. Features are those of all ranks, tokens those of this rank."""
    features: Tensor                    # (V, E')
    columns: dict[int, int]             # media id -> its row of features, which is its column in score matrices
    local_columns: Tensor               # (V',) columns of the videos that this rank has encoded
    local_tokens: Tensor                # (V', S, C)


def encode_unique_videos(model: ClusterSTM, dataset: ClipDataset, tokenizer, protocol: Protocol) -> EncodedVideos:
    """Encode each video of the dataset once, shared among the ranks."""
    annotations, device = dataset.annotations, model.temp.device
    # Media id -> its first annotation: in reversed order, the first overwrites the later ones.
    first_index = {a.media_id: i for i, a in reversed(list(enumerate(annotations)))}
    slots = {media_id: slot for slot, media_id in enumerate(first_index)}
    local_slots, local_tokens = [], []
    features = torch.zeros(len(slots), model.cfg.embed_dim + 1, device=device)  # last column: 1 if the video was read
    for indices, tokens, feature in encode_videos(model, dataset, list(first_index.values()), tokenizer, protocol):
        batch_slots = [slots[annotations[i].media_id] for i in indices]
        local_slots += batch_slots
        local_tokens.append(tokens.to(torch.bfloat16) if tokens.is_cuda else tokens)
        features[batch_slots] = torch.cat([feature.float(), torch.ones(len(batch_slots), 1, device=device)], 1)
    readable = all_reduce_sum(features)[:, -1] > 0
    require_readable(int(readable.sum()), len(slots))
    column_of_slot = torch.full((len(slots),), -1, device=device)
    column_of_slot[readable] = torch.arange(int(readable.sum()), device=device)
    columns = {media_id: column for media_id, column in zip(slots, column_of_slot.tolist(), strict=True) if column >= 0}
    local_columns = column_of_slot[torch.tensor(local_slots, dtype=torch.long, device=device)]
    return EncodedVideos(features[readable, :-1], columns, local_columns, torch.cat(local_tokens or [torch.zeros(0)]))


def select_topk(similarity: Tensor, k: int) -> Tensor:
    """similarity (M, V) -> (M, V) bool, the top k videos of each text and the top k texts of each video."""
    M, V = similarity.shape
    selected = torch.zeros_like(similarity, dtype=torch.bool)
    selected.scatter_(1, similarity.topk(min(k, V), 1).indices, True)
    selected.T.scatter_(1, similarity.T.topk(min(k, M), 1).indices, True)
    return selected


def match_selected(model, ids: Tensor, states: Tensor, selected: Tensor, videos: EncodedVideos) -> Tensor:
    """
    Compute the matching head's logits (M, V) for the selected pairs (M, V) bool, 0 elsewhere: each by the rank that
    holds the video's tokens.
    """
    logits = torch.zeros(selected.shape, device=selected.device)
    if len(videos.local_tokens):
        text_index, video_index = selected[:, videos.local_columns].nonzero().unbind(1)
        pairs = score_pairs(model, ids, states, videos.local_tokens, text_index, video_index)
        logits[text_index, videos.local_columns[video_index]] = pairs[:, 1]
    return all_reduce_sum(logits)


@torch.no_grad()
def retrieval(model: ClusterSTM, dataset: ClipDataset, tokenizer, protocol: Protocol) -> dict:
    """T2V and V2T of all videos against all captions. A video of several annotations counts once."""
    videos = encode_unique_videos(model, dataset, tokenizer, protocol)
    captions, caption_columns = metrics.readable_captions(dataset.annotations, videos.columns)
    ids, states, text_features = encode_captions(model, tokenizer, captions, protocol.max_text_length)
    similarity = text_features @ videos.features.T
    M, V = similarity.shape

    positives, text_positives = (x.to(similarity.device) for x in metrics.positive_pairs(captions, caption_columns, V))

    def both_ways(t2v: Tensor, v2t: Tensor) -> dict[str, Tensor]:
        require_finite(t2v, captions, "the scores of the caption")
        return {"T2V": metrics.best_ranks(t2v, positives), "V2T": metrics.best_ranks(v2t, text_positives.T)}

    temp, arrays = model.temp.item(), {"similarity": similarity, "positives": positives}
    ranks = {"similarity": both_ways(similarity, similarity.T),
             "similarity, dual softmax": both_ways(metrics.dual_softmax(similarity, temp),
                                                   metrics.dual_softmax(similarity.T, temp))}
    if k := protocol.rerank_topk:
        selected = select_topk(similarity, k)
        logits = match_selected(model, ids, states, selected, videos)
        require_finite(logits, captions, "the matching scores of the caption")      # one NaN would spoil all re-ranked
        ranks[f"match, top {k}"] = both_ways(metrics.rerank(similarity, k, lambda m, v: logits[m, v]),
                                             metrics.rerank(similarity.T, k, lambda v, m: logits[m, v]))
        arrays["match"] = logits.masked_fill_(~selected, torch.nan)
    scores = metrics.map_ranks(metrics.recall_metrics, ranks)
    scores["chance"] = {way: metrics.recall_metrics(torch.arange(1, n + 1)) for way, n in (("T2V", V), ("V2T", M))}
    if protocol.saved_scores is not None:
        arrays |= {f"rank, {way}, {name}": rank for name, ways in ranks.items() for way, rank in ways.items()}
        names = {videos.columns[a.media_id]: a.video for a in dataset.annotations if a.media_id in videos.columns}
        protocol.saved_scores.update({name: x.cpu().numpy() for name, x in arrays.items()},
                                     videos=encode_names([names[v] for v in range(V)]), captions=encode_names(captions))
    return {"videos": V, "captions": M, "scores": scores,
            "intervals": metrics.map_ranks(metrics.recall_intervals, ranks)}


def encode_names(names: Sequence) -> np.ndarray:
    """Encode texts as bytes of JSON: one that is very long, or not valid Unicode, does no harm to the others."""
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


@torch.no_grad()
def multiple_choice(model: ClusterSTM, dataset: ClipDataset, tokenizer, protocol: Protocol) -> dict:
    """
    Choose one of an annotation's captions -> accuracy in per cent by 0.7 p(match) + 0.3 p(caption), where p(caption)
    is a softmax of the similarities over these captions (UMT, multi_modality/tasks/retrieval_mc.py); and by each alone.
    """
    annotations, choices = dataset.annotations, []
    for indices, tokens, features in encode_videos(model, dataset, range(len(dataset)), tokenizer, protocol):
        captions = [caption for i in indices for caption in annotations[i].captions]
        ids, states, text = encode_captions(model, tokenizer, captions, protocol.max_text_length)
        counts = torch.tensor([len(annotations[i].captions) for i in indices], device=ids.device)
        clip_index = torch.arange(len(indices), device=ids.device).repeat_interleave(counts)
        text_index = torch.arange(len(captions), device=ids.device)
        match = score_pairs(model, ids, states, tokens, text_index, clip_index).softmax(1)[:, 1]
        similarity = (text * features[clip_index]).sum(1) / model.temp
        require_finite(torch.stack([match, similarity], 1), captions, "the scores of the caption")
        for b, i in enumerate(indices):
            m, s = match[clip_index == b], similarity[clip_index == b].softmax(0)
            choices.append((i, {"0.7 match + 0.3 similarity": (0.7 * m + 0.3 * s).tolist(), "match": m.tolist(),
                                "similarity": s.tolist()}))
    choices, scores, intervals = sorted(all_gather_lists(choices), key=lambda choice: choice[0]), {}, {}
    require_readable(len(choices), len(dataset))
    answered = [annotations[i] for i, _ in choices]
    for name in choices[0][1]:
        rows = [choice[name] for _, choice in choices]
        correct = [100.0 * (np.argmax(row) == a.correct_index) for row, a in zip(rows, answered, strict=True)]
        scores[name], intervals[name] = {"accuracy": np.mean(correct).item()}, {
            "accuracy": metrics.mean_interval(correct)}
        if protocol.saved_scores is not None:           # (Q, choices), NaN after the last choice of a question
            protocol.saved_scores[name] = np.array(list(zip_longest(*rows, fillvalue=np.nan)), dtype=np.float32).T
    if protocol.saved_scores is not None:
        protocol.saved_scores.update(
            correct=np.array([a.correct_index for a in answered]), videos=encode_names([a.video for a in answered]),
            captions=encode_names([a.captions for a in answered]))
    scores["chance"] = {"accuracy": 100 * float(np.mean([1 / len(a.captions) for a in answered]))}
    return {"videos": len({a.media_id for a in answered}), "questions": len(answered), "scores": scores,
            "intervals": intervals}


def rank_answers(model: VideoToText, answers: Tensor, memory: Tensor, mask: Tensor, topk: int,
                 count_first_token_twice: bool, questions: Sequence[str] = ()) -> Tensor:
    """
    answers (A, L') ids, questions memory (Q, L, D) and its mask (Q, L) -> (Q,), the index of the best answer. An error
    names the first of the `questions`, or its index, whose scores are not finite.

    The topk answers with the likeliest first token are scored in full. In UMT's published protocol the first token
    counts twice: log p(first) + sum over all tokens of log p (multi_modality/models/umt_qa.py).
    """
    Q, k = len(memory), min(topk, len(answers))
    decoder = model.text_decoder
    start = answers[:1, :1].expand(Q, 1)                                        # [CLS]
    states = decoder.forward_fusion(decoder.forward_text(start), start, memory, None, mask[:, None, None])
    first = decoder.lm_logits(states[:, 0]).float().log_softmax(1)[:, answers[:, 1]]        # (Q, A)
    first_top, top = first.topk(k, 1)                                           # (Q, k)
    question_index = torch.arange(Q, device=top.device).repeat_interleave(k)
    full = model.log_likelihood(answers[top.flatten()], question_index, memory, mask).sum(1).view(Q, k)
    scores = full + first_top * count_first_token_twice
    require_finite(torch.cat([scores, first_top], 1), questions or range(Q), "the scores of the answers to question")
    return top.gather(1, scores.argmax(1, keepdim=True))[:, 0]


@torch.no_grad()
def answer_questions(model: VideoToText, dataset: ClipDataset, tokenizer, protocol: Protocol) -> list[dict]:
    """Answer every question -> a prediction for each, of all ranks, in the order of the annotations."""
    device = next(model.parameters()).device
    max_length, num_answers = protocol.max_answer_length, len(protocol.answers)
    answer_ids = encode_answers(tokenizer, protocol.answers, max_length).to(device)
    topk, twice = protocol.rerank_topk or num_answers, protocol.count_first_token_twice
    chunk_size = max(1, 1024 // min(topk, num_answers))                         # questions at once

    def as_generated(answer: str) -> str:
        """Return what the model generates if it gives this answer: cut, and without what the tokenizer drops."""
        return decode_ids(tokenizer, encode_answers(tokenizer, [answer], max_length))[0]

    predictions = []
    for indices, tokens, _ in encode_videos(model, dataset, range(len(dataset)), tokenizer, protocol):
        questions = [(b, q) for b, i in enumerate(indices) for q in dataset.annotations[i].questions]
        for chunk in (questions[start:start + chunk_size] for start in range(0, len(questions), chunk_size)):
            texts, clip_index = [q.text for _, q in chunk], torch.tensor([b for b, _ in chunk], device=device)
            names = [f"{q.source}: {q.text}" for _, q in chunk]
            ids = encode_texts(tokenizer, texts, protocol.max_text_length).to(device)
            with bf16_autocast(device):
                memory, mask = model.encode_context(tokens, ids, clip_index)
                best = rank_answers(model, answer_ids, memory, mask, topk, twice, names).tolist()
                generated = model.generate_texts(tokenizer, memory, mask, max_length, 1, names)
            for (b, q), answer_index, text in zip(chunk, best, generated, strict=True):
                ranked = protocol.answers[answer_index]
                predictions.append({
                    "row": indices[b], "source": q.source, "question_id": q.id, "question": q.text,
                    "type": q.question_type, "expected": list(q.answers), "ranked": ranked, "generated": text,
                    "correct": [ranked in q.answers, text in map(as_generated, q.answers)]})
    return sorted(all_gather_lists(predictions), key=lambda prediction: prediction["row"])


def question_answering(model: VideoToText, dataset: ClipDataset, tokenizer, protocol: Protocol) -> dict:
    """Score the best listed and the generated answer: accuracy in per cent, over all questions and by question type."""
    predictions = answer_questions(model, dataset, tokenizer, protocol)
    require_readable(len(predictions), len(dataset))
    types = [p["type"] for p in predictions]
    listed, unlisted = set(protocol.answers), []
    topk = min(protocol.rerank_topk or len(listed), len(listed))
    correct = {name: [p["correct"][i] for p in predictions]
               for i, name in enumerate((f"ranking, top {topk}", "generation"))}
    for prediction in predictions:
        source = prediction.pop("source")
        if not listed & set(prediction["expected"]):
            unlisted.append(f"{source}: {prediction['expected'][0]!r}")
    return {"videos": len({p["row"] for p in predictions}), "questions": len(predictions),
            "answers": len(protocol.answers), "answers not in the list": unlisted,
            "question_types": dict(Counter(types)) if any(types) else {},
            "scores": {name: metrics.accuracy_by_type(x, types) for name, x in correct.items()},
            "intervals": {name: metrics.accuracy_intervals(x, types) for name, x in correct.items()},
            "predictions": predictions}


@torch.no_grad()
def captioning(model: VideoToText, dataset: ClipDataset, tokenizer, protocol: Protocol) -> dict:
    """Score what the model generates for each video against all captions of the video: caption metrics."""
    beams = {"greedy": 1} | ({f"beam {protocol.beams}": protocol.beams} if protocol.beams > 1 else {})
    predictions = []
    for indices, tokens, _ in encode_videos(model, dataset, range(len(dataset)), tokenizer, protocol):
        videos = [dataset.annotations[i].video for i in indices]
        rows = [{"row": i, "video": os.path.basename(video)} for i, video in zip(indices, videos, strict=True)]
        for name, width in beams.items():
            with bf16_autocast(tokens.device):
                texts = model.generate_texts(tokenizer, tokens, None, protocol.max_answer_length, width, videos)
            rows = [{**row, name: text} for row, text in zip(rows, texts, strict=True)]
        predictions += rows
    predictions = sorted(all_gather_lists(predictions), key=lambda prediction: prediction["row"])
    require_readable(len(predictions), len(dataset))
    references = {str(p["row"]): dataset.annotations[p["row"]].captions for p in predictions}
    texts = {name: {str(p["row"]): p[name] for p in predictions} for name in beams}
    scores, intervals = {}, {}
    for name in beams:
        scores[name], by_video = metrics.caption_scores_by_video(references, texts[name], protocol.cider_only)
        intervals[name] = {metric: metrics.mean_interval(values) for metric, values in by_video.items()}
    return {"videos": len(predictions), "captions": sum(map(len, references.values())), "scores": scores,
            "intervals": intervals, "predictions": predictions}


EVALUATORS = {"retrieval": retrieval, "choice": multiple_choice, "qa": question_answering, "caption": captioning}


def evaluate(model, task: Task, annotations: list[Annotation], data_cfg: DataConfig, tokenizer, protocol) -> dict:
    """Evaluate a model on annotations of the task's kind -> counts and scores."""
    protocol.unreadable.clear()
    # Frames are sampled from the whole video, as published. The training's frame cache holds only some of them.
    dataset = ClipDataset(annotations, replace(data_cfg, frame_cache=False), train=False)
    results = EVALUATORS[task.kind](model, dataset, tokenizer, protocol)
    protocol.unreadable[:] = sorted(all_gather_lists(protocol.unreadable))
    return results


# The report

def format_report(result: dict) -> str:
    """Return the text that is printed. Names of files in it may hold control characters, which are escaped."""
    counts = ", ".join(f"{result[key]} {key}" for key in ("videos", "captions", "questions") if key in result)
    lines = [f"{result['task']}: {TASK_KINDS[result['kind']]}, {result['split']}: {counts}",
             f"  checkpoint: {result['checkpoint']}" + (f"; {result['chosen']}" if result["chosen"] else ""),
             f"  {result['frames']} frames of {result['size']} x {result['size']}, tokens: {result['tokens']}",
             f"  protocol: {', '.join(result['protocol'])}", *(f"  note: {note}" for note in result["notes"])]
    return "\n".join(map(escape_control, [*lines, *metrics.format_table(result["kind"], result["scores"],
                                                                            result["intervals"])]))


def describe_protocol(task: Task, protocol: Protocol, max_seconds: float) -> list[str]:
    """List the settings that change a score, in words."""
    n, topk = len(protocol.answers), protocol.rerank_topk
    phrases = [
        task.kind != "caption" and f"texts of up to {protocol.max_text_length} tokens",
        task.paragraph and "the captions of a video joined to a paragraph",
        max_seconds and f"the first {max_seconds:g} seconds",
        task.kind == "retrieval" and (f"top {topk} re-ranked" if topk else "not re-ranked"),
        task.kind == "qa" and f"the likeliest {min(topk or n, n)} of {n} answers scored in full",
        task.kind == "qa" and f"their first token counted {'twice' if protocol.count_first_token_twice else 'once'}",
        task.kind in ("qa", "caption") and f"up to {protocol.max_answer_length} tokens generated",
    ]
    return [phrase for phrase in phrases if phrase]


# The command

def load_model_for(task: Task, checkpoint: str) -> ClusterSTM | VideoToText:
    """Load the model of a checkpoint. ValueError if it was trained for another kind of task."""
    model = load_model(checkpoint)
    if isinstance(model, ClusterSTM):
        model.require_bert()
    actual = "retrieval" if isinstance(model, ClusterSTM) else "qa" if model.bert else "caption"
    expected = task.kind if task.kind in ("qa", "caption") else "retrieval"
    if actual != expected:
        raise ValueError(f"{checkpoint}: the model for {TASK_KINDS[task.kind]} must be trained for "
                         f"{TASK_KINDS[expected]}, got one for {TASK_KINDS[actual]}; see train.py --stage finetune")
    return model


def make_data_config(cfg: Config, task: Task, run_config: dict) -> DataConfig:
    """
    Return how videos are read: as in the model's training; if it was only pretrained, as the task says. All videos have
    one grid: the standard one of a run with several, or that of cfg.
    """
    values = run_config["data"]
    if run_config.get("task") in TASKS or cfg.data:
        num_frames, max_seconds = values["num_frames"], values.get("max_seconds", 0)
    else:
        num_frames, max_seconds = task.zero_shot_frames, task.seconds
    changes = {"num_frames": cfg.frames or num_frames, "image_size": cfg.size or values["image_size"],
               "frames_range": (), "size_range": (), "pool": (), "image_corpora": (), "max_seconds": max_seconds,
               "frame_cache": False}
    return config_from_dict(DataConfig, {**values, **changes}, os.path.join(cfg.checkpoint, "config.json"))


def make_protocol(cfg: Config, task: Task, run_config: dict, num_workers: int) -> Protocol:
    """Make the protocol of the task, with the changes that cfg asks for."""
    protocol = Protocol(
        max_text_length=run_config["text"]["max_length"] if cfg.data else task.max_text_length,
        max_answer_length=task.max_answer_length, count_first_token_twice=cfg.count_first_token_twice,
        beams=cfg.beams, batch=cfg.batch, workers=num_workers if cfg.workers < 0 else cfg.workers,
        skip_unreadable=cfg.on_missing == "skip")
    protocol.rerank_topk = cfg.rerank if cfg.rerank >= 0 else 128 if cfg.data else task.rerank_topk
    if task.kind == "qa":
        if cfg.data and not cfg.answers:
            raise ValueError(f"--answers must be the JSON list of answers to rank with --data {cfg.data}, got ''")
        path = cfg.answers or tasks.find_file(task.answer_list, tasks.resolve_data_root(task, cfg.data_root))
        protocol.answers = tasks.read_answers(path)
    return protocol


def find_teacher(checkpoint: str, recorded: str) -> str:
    """
    Return the teacher of a training: `recorded`, a folder or a hub id, as the config has it. For a toy teacher that is
    out/RUN/teacher. The run may have been moved, and another may be there now: one beside the checkpoint comes first.
    """
    folder, (run, name) = os.path.abspath(checkpoint), os.path.split(recorded)
    parent = os.path.dirname(folder)        # of a run; or a run, if the checkpoint is one of its stages
    for run_folder in (folder, parent, os.path.join(parent, os.path.basename(run))):
        teacher = os.path.join(run_folder, "teacher")
        if name == "teacher" and all(os.path.isfile(f"{x}/config.json") for x in (run_folder, teacher)):
            return teacher
    return recorded


def make_visible_fn(cfg: Config, run_config: dict, model, data_cfg: DataConfig,
                    load_teacher: Callable = SigLIP.from_pretrained) -> tuple[Callable | None, str]:
    """
    Make the function that selects the visible tokens of a batch (None: all tokens), and a description of it. A
    ValueError says that the model cannot take the grid of data_cfg, or that it has fewer tokens than are to be kept.
    """
    T, size, device = data_cfg.num_frames, data_cfg.image_size, next(model.parameters()).device
    N, pool = (data.count_tokens(frames, size, model.vit_cfg.patch_size) for frames in (1, T))
    model.vit.positions((T, *(size // model.vit_cfg.patch_size,) * 2), device)      # learned ones have a largest grid
    if not cfg.mask:
        return None, "all"
    changes = {"name": cfg.mask} | ({"features": cfg.features} if cfg.features else {})
    if cfg.mask_ratio is not None:
        changes |= {"ratio": cfg.mask_ratio, "tokens": ()}
    elif cfg.tokens:
        changes |= {"tokens": (cfg.tokens,)}
    trained, path = run_config["mask"], os.path.join(cfg.checkpoint, "config.json")
    if cfg.mask != trained.get("name") or cfg.features not in ("", trained.get("features", "teacher")):
        changes["teacher_tokens"] = 0           # another mask than in training sees all tokens, and keeps as many
        if trained.get("teacher_tokens") and not (cfg.tokens or cfg.mask_ratio is not None):
            changes["tokens"] = (config_from_dict(MaskConfig, trained, path).total(T, N),)
    mask = config_from_dict(MaskConfig, trained | changes, path)
    if mask.teacher_tokens:
        count_equal_groups(mask.teacher_tokens, T, N)
    S = mask.total(T, N)
    if S > pool:
        raise ValueError(f"--tokens must be at most {pool}, the tokens of {T} frames of {size} x {size}, got {S}"
                         f"{'' if cfg.tokens else ', as in training'}")
    teacher, with_sizes = None, model.cfg.proportional
    if needs_teacher(mask, with_sizes):
        folder = cfg.teacher or find_teacher(cfg.checkpoint, run_config["teacher"])
        if not folder:
            raise ValueError(f"--teacher must be a SigLIP for --mask {cfg.mask}, got '': {cfg.checkpoint} names none")
        teacher = load_teacher(folder, with_tokenizer=False).to(device)

    def visible_fn(batch):
        return compute_visible_ids(teacher, batch.video, mask, mask.ratio, cfg.seed + batch.seed,
                                   model.vit.grid_size(batch.video)[1:], with_sizes, S, model.vit.embed_patches)

    count = f"{S} of {pool} a clip"
    if not (mask.tokens or mask.teacher_tokens):
        count = f"{S // T} of {N} a frame{' on average' if cfg.mask in CLIP_BUDGET else ''}"
    return visible_fn, f"{cfg.mask}, {count}{f', by {mask.features}' if mask.features != 'teacher' else ''}"


def split_notes(cfg: Config, task: Task, path: str, annotations: list[Annotation], missing: list[Annotation],
                unreadable: dict[str, str], results: dict) -> list[str]:
    """List why the scores may not compare with published ones: unreadable videos, row counts, unlisted answers."""
    notes = []
    if unreadable:
        notes.append(f"SCORED WITHOUT {len(unreadable)} OF {len({a.video for a in (*annotations, *missing)})} VIDEOS, "
                     f"which could not be read, the first: {next(iter(unreadable.values()))}")
    count, unit = len(annotations) + len(missing), "videos"
    if task.kind != "caption" and not cfg.data:
        count, unit = sum(1 for _ in iter_annotations(path)), "rows"
    if not cfg.data and cfg.split == "test" and task.test_rows and count != task.test_rows:
        notes.append(f"{path} has {count} {unit}, the published split has {task.test_rows}: not comparable")
    if unlisted := results.get("answers not in the list"):
        notes.append(f"{len(unlisted)} of {results['questions']} questions have no answer in the list, so ranking gets "
                     f"them wrong; the first: {unlisted[0]}")
    return notes


def majority_baseline(task: Task, test: list[Annotation], data_root: str) -> tuple[dict, list[str]]:
    """Question answering, captioning: scores, by name, of always giving the most frequent training text; and notes."""
    try:
        path, media_root = split_files(task, "train", data_root)
        read = tasks.read_questions if task.kind == "qa" else tasks.read_captions   # only texts: videos may be absent
        train = read(path, media_root, task.texts_per_clip)
    except FileNotFoundError as error:
        return {}, [f"no baseline: {error}"]
    if task.kind == "qa":
        return {"most frequent answer to that kind": metrics.majority_answers(train, test)}, []
    return {"most frequent caption": metrics.majority_caption(train, test)}, []


def result_file(cfg: Config, name: str) -> str:
    """Name the file of the results by all settings that change them and are not the default ones."""
    parts = [f"eval-{name}-{cfg.mask or 'all'}"]
    for setting in ("split", "mask_ratio", "tokens", "features", "teacher", "frames", "size", "seed", "rerank",
                    "count_first_token_twice", "answers", "beams"):
        if (value := getattr(cfg, setting)) != getattr(Config, setting):
            parts.append(f"{setting}={os.path.basename(str(value).rstrip('/'))}")
    return "-".join(parts) + ".json"


def main(cfg: Config) -> dict:
    """Evaluate as `cfg` says -> the results, which rank 0 also prints and writes as JSON."""
    device = select_device(cfg.device)
    task = tasks.get_task(cfg.task)
    if cfg.save_scores and task.kind not in ("retrieval", "choice"):
        raise ValueError(f"--save-scores must be given for retrieval or multiple choice, got {cfg.task}: the JSON file "
                         f"has all predictions of {TASK_KINDS[task.kind]}")
    path, media_root = (cfg.data, cfg.data_root) if cfg.data else split_files(task, cfg.split, cfg.data_root)
    missing = [] if cfg.on_missing == "skip" else None      # annotations whose video file is absent
    notes = []
    annotations = tasks.read_rows(task, path, media_root, train=False, missing=missing, notes=notes)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    model = load_model_for(task, cfg.checkpoint).to(device)
    run_config = read_json(os.path.join(cfg.checkpoint, "config.json"))
    tokenizer = load_tokenizer(os.path.join(cfg.checkpoint, "tokenizer.json"))
    data_cfg = make_data_config(cfg, task, run_config)
    protocol = make_protocol(cfg, task, run_config, data_cfg.num_workers)
    protocol.saved_scores = {} if cfg.save_scores else None
    protocol.visible_fn, tokens = make_visible_fn(cfg, run_config, model, data_cfg)
    results = evaluate(model, task, annotations, data_cfg, tokenizer, protocol)

    unreadable = {}                     # video -> the reason of its first annotation
    for video, reason in [(a.video, f"{a.source}: no file {a.video}") for a in missing or []] + protocol.unreadable:
        unreadable.setdefault(video, reason)
    notes += split_notes(cfg, task, path, annotations, missing or [], unreadable, results)
    train_file = run_config["data"].get("train_file")       # None of a converted model
    if train_file and task.default_root and not cfg.data and not os.path.basename(train_file).startswith("sprites_"):
        notes.append(f"trained on {train_file}, but scored on the embedded set: --data and --data-root score your own")
    if run_config.get("finetune_masked") and not cfg.mask:
        notes.append(f"fine-tuned on masked clips only: --mask {run_config['mask']['name']} evaluates it on such clips")
    if task.kind in ("qa", "caption") and not cfg.data:
        test = [annotation for annotation in annotations if annotation.video not in unreadable]
        baseline, baseline_notes = majority_baseline(task, test, cfg.data_root)
        results["scores"] |= baseline
        notes += baseline_notes

    name = tasks.name_data(cfg.data) if cfg.data else cfg.task
    result = {
        "task": name, "kind": task.kind, "split": "own annotations" if cfg.data else f"{cfg.split} split",
        "annotations": path, "checkpoint": cfg.checkpoint, "chosen": run_config.get("chosen", ""),
        "frames": data_cfg.num_frames, "size": data_cfg.image_size, "tokens": tokens,
        "protocol": describe_protocol(task, protocol, data_cfg.max_seconds), "notes": notes,
        "unreadable": list(unreadable.values()), "config": asdict(cfg), **results,
    }
    if rank_and_world()[0] == 0:
        out = cfg.out or os.path.join(cfg.checkpoint, result_file(cfg, name))
        try:
            atomic_write_text(out, json.dumps(result, indent=1))
        finally:                        # a full disk does not lose the scores, nor a closed pipe the file
            print(format_report(result))
        print(f"written to {escape_control(out)}")
        if protocol.saved_scores is not None:
            path = f"{os.path.splitext(out)[0]}-scores.npz"
            with atomic_write(path) as f:       # array by array: needs no memory for a second copy
                np.savez(f, **protocol.saved_scores)
            print(f"scores written to {escape_control(path)}")
    return result


def list_tasks() -> str:
    """Return a line about each task: its name, kind, test file and folder of videos, as in the table tasks.TASKS."""
    rows = [(name, TASK_KINDS[task.kind], f"{task.test_file}.json", task.media_dirs, *(
        [f"{task.test_rows} rows"] if task.test_rows else [])) for name, task in TASKS.items()]
    return "\n".join(f"{name:<16}{kind:<20}{', '.join(files)}" for name, kind, *files in rows)


def cli():
    """Parse the command line and evaluate, or list the tasks: for --task without a value, or with the value list."""
    args = sys.argv[1:]
    for arg, value in zip(args, [*args[1:], "--"], strict=True):
        if arg in ("--task=", "--task=list") or arg == "--task" and (value == "list" or value.startswith("--")):
            print(list_tasks())
            return
    main(tyro.cli(Config, args=args, prog="python eval.py"))


if __name__ == "__main__":
    run_cli("eval.py", cli)
