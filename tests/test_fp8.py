"""tools/fp8.py: its figures on tensors made by hand, and its table for an untrained teacher."""

import pytest
import torch
from helpers.runs import assert_one_line, command
from helpers.tables import markdown_tables

from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from teacher import SigLIP
from tokenizer import load_tokenizer
from tools.fp8 import compare, share_changed


def test_share_changed_counts_expected_ids_that_are_not_kept():
    expected = torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4]])
    assert share_changed(expected, expected) == 0
    assert share_changed(torch.tensor([[0, 3, 6, 8], [2, 3, 4, 5]]), expected) == 3 / 8
    assert share_changed(expected.flip(0), expected) == 6 / 8


def test_cosines_are_means_and_low_quantiles():
    a, b = torch.ones(20, 10, 2), torch.ones(20, 10, 2)
    b[0, :3] = torch.tensor([1.0, -1.0])                                    # 3 of 200 are orthogonal
    mean, low = compare(a, 7 * b)
    assert mean == pytest.approx(197 / 200) and low == pytest.approx(0, abs=1e-6)
    b[0, :2] = 1
    assert compare(a, b)[1] == pytest.approx(1)


def test_the_table_has_a_row_for_bf16_and_one_for_fp8(sprites, tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(sprites)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = TextConfig(**small, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=12, pad_token_id=0)
    SigLIP(SigLIPConfig(VisionConfig(**small, image_size=32, patch_size=4), text), tokenizer).save_pretrained(tmp_path)
    code, out, err = command("tools.fp8", f"--teacher {tmp_path} --clips {sprites} --count 3".split(), capsys)
    assert code == 0, err
    (header, bf16, fp8), = markdown_tables(out)
    assert len(header) == 8 and "bf16" in bf16[0] and "fp8" in fp8[0] and "3 clips" in out
    assert 0 <= float(bf16[1].removesuffix(" %")) < float(fp8[1].removesuffix(" %")) <= 100
    for column in (2, 3, 4, 5):                                             # tokens and token targets
        assert 0.9 < float(fp8[column]) < float(bf16[column]) < 1
    assert fp8[6:] == bf16[6:]                                              # the text tower is the same


def test_wrong_settings_end_with_one_line(tmp_path, capsys):
    for flags, message in (("--count 0", "--count.* 0"), (f"--teacher {tmp_path}", "config.json|clips|sprites")):
        code, _, err = command("tools.fp8", f"--clips {tmp_path} {flags}".split(), capsys)
        assert_one_line("tools.fp8", code, err, message)
