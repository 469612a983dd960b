"""Every file of a run is damaged in turn: --resume says so in one line that names it, or ends with the same weights."""

import json
import os
import re
import shutil
from contextlib import suppress

import pytest
from helpers.damage import damaged_copies, write_bytes
from helpers.runs import Killed, assert_same, config, kill, weights

import train
from runtime import BadMediaLog, list_checkpoints, truncate_log, verify_checkpoint

FLAGS = """--name run --steps 4 --unmasked-steps 3 --toy.steps 2 --toy.text-steps 2 --save-every 1 --log-every 1
    --data.num-views 1"""
COUNT = 1           # damaged copies of each kind and file; 20 were seen to pass


def stop_before(stage, step, cfg):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, step)
        with pytest.raises(Killed):
            train.main(cfg)


def list_files(folder):
    """List the files below a folder, in order."""
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize("stage, step", [("pretrain", 3), ("unmasked", 2), ("finished", 0)])
def test_a_damaged_file_of_a_run_is_named_or_harmless(sprites, tmp_path, monkeypatch, stage, step):
    """The run is stopped in the second pass over its 24 clips, which reads cached targets, or later."""
    monkeypatch.chdir(tmp_path)
    flags = FLAGS.replace("--steps 4", "--steps 4 --batch 16")
    train.main(config(sprites, flags.replace("--name run", "--name undisturbed")))
    cfg = config(sprites, flags)
    train.main(cfg) if stage == "finished" else stop_before(stage, step, cfg)
    shutil.move("out/run", "stopped")
    assert len(list_files("stopped")) > 15
    named = set()
    for seed, path in enumerate(list_files("stopped")):
        if path.endswith("/lock"):
            continue
        for content in damaged_copies(open(path, "rb").read(), COUNT, seed):
            shutil.rmtree("out/run", ignore_errors=True)
            shutil.copytree("stopped", "out/run")
            damaged = path.replace("stopped", "out/run")
            write_bytes(damaged, content)
            try:
                train.main(config(sprites, f"{flags} --resume"))
            except (ValueError, OSError) as error:
                assert re.match(re.escape(damaged) + r"[ :][^\n]*$", str(error)), (path, error)
                named.add(path)
            else:
                assert_same(weights("out/run"), weights("out/undisturbed"))
    # What was cut or flipped in a file that the rest of the run reads cannot be harmless.
    assert "stopped/run_state.json" in named
    assert (stage != "unmasked") or "stopped/before_unmasked/model.safetensors" in named
    assert (stage != "finished") or "stopped/model.safetensors" in named
    assert not {path for path in named if "targets.bin" in path or "log.jsonl" in path}


def test_a_damaged_checkpoint_is_detected(sprites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stop_before("pretrain", 2, config(sprites, FLAGS))
    path = list_checkpoints("out/run")[0]
    assert verify_checkpoint(path) == ""
    for content in damaged_copies(open(path, "rb").read(), 40):
        write_bytes(path, content)
        assert verify_checkpoint(path)


def test_rows_of_a_damaged_log_are_kept_or_dropped_with_a_line(tmp_path, capsys):
    path = str(tmp_path / "log.jsonl")
    rows = [{"stage": stage, "step": step, "mrm": 1.5} for stage in ("pretrain", "unmasked") for step in range(1, 6)]
    lines = [json.dumps(row) for row in rows]
    odd = ["[]", "3", "null", '{"stage": "pretrain"}', '{"stage": "sleep", "step": 1}', '{"stage": [], "step": 1}',
           '{"stage": "pretrain", "step": "x"}', '{"stage": "pretrain", "step": null}', "\0\0", "\udcff"]
    for content in (*damaged_copies("\n".join(lines).encode(), 40), "\n".join([*odd, *lines]).encode(errors="replace")):
        write_bytes(path, content)
        truncate_log(path, "unmasked", 5)
        kept, output = open(path).read().splitlines(), capsys.readouterr().out
        assert all(isinstance(json.loads(line), dict) for line in kept)
        dropped = output.count("is damaged and was dropped\n")
        assert dropped == output.count("\n") and len(kept) + dropped <= content.count(b"\n") + 1
    assert kept == lines and dropped == len(odd)


def test_a_damaged_list_of_unreadable_videos_is_only_longer(tmp_path):
    records = [{"where": "a.json, row 1", "video": f"{name}.mp4", "reason": "cut"} for name in ("a", "b\udcff", "c")]
    BadMediaLog(str(tmp_path)).add(records)
    path = str(tmp_path / "bad_media.jsonl")
    whole = open(path, "rb").read()
    assert [json.loads(line)["video"] for line in whole.splitlines()] == ["a.mp4", "b\udcff.mp4", "c.mp4"]
    for content in damaged_copies(whole, 40):
        write_bytes(path, content)
        BadMediaLog(str(tmp_path)).add(records)
        videos = set()
        for line in open(path, "rb").read().split(b"\n"):
            with suppress(ValueError, KeyError, TypeError):
                videos.add(json.loads(line)["video"])
        assert videos >= {record["video"] for record in records}
