"""Prompts and discretised states against the reference's tokenizer, id for id."""

import json
import os

import numpy as np
import pytest

from rlinf_plugins_openpi.inputs.tokenizer import PromptTokenizer, discretise, load_processor

VOCABULARY = "RLINF_PALIGEMMA_TOKENIZER"
"""Environment variable with the path of PaliGemma's sentencepiece model."""


@pytest.fixture
def recorded(tokenizer_case):
    return json.loads((tokenizer_case / "tokenizer_cases.json").read_text())


@pytest.fixture
def model(tokenizer_case, recorded):
    return str(tokenizer_case / recorded["sp_model"])


def same(case, model):
    state = None if case["state"] is None else np.array(case["state"], dtype=np.float32)
    tokens, mask = PromptTokenizer(model, case["max_len"])(case["prompt"], state)
    dtypes = (str(tokens.dtype), str(mask.dtype)) == (case["ids_dtype"], case["mask_dtype"])
    return dtypes and tokens.tolist() == case["ids"] and mask.tolist() == case["mask"]


def test_prompts_have_the_references_ids(recorded, model, report):
    for mode in sorted({case["mode"] for case in recorded["cases"]}):
        cases = [case for case in recorded["cases"] if case["mode"] == mode]
        report(f"tokenizer/{mode}", f"{len(cases)} prompts", sum(not same(case, model) for case in cases), 0)


@pytest.mark.vocabulary
def test_prompts_have_the_ids_of_the_published_vocabulary(tokenizer_case, report):
    path = os.environ.get(VOCABULARY)
    assert path, f"set {VOCABULARY} to the path of PaliGemma's tokenizer.model (in google/paligemma-3b-pt-224)"
    recorded = json.loads((tokenizer_case / "real_vocab_cases.json").read_text())
    processor = load_processor(path)
    assert processor.encode("\n") == [recorded["newline"]]
    special = (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id())
    assert special == tuple(recorded[name] for name in ("pad", "eos", "bos", "unk"))
    for mode in sorted({case["mode"] for case in recorded["cases"]}):
        cases = [case for case in recorded["cases"] if case["mode"] == mode]
        wrong = sum(not same_ids(case, path) for case in cases)
        report(f"tokenizer/real_vocab_cases.json/{mode}", f"{len(cases)} prompts", wrong, 0)


def same_ids(case, path):
    """The file has the ids before the padding only."""
    state = None if case["state"] is None else np.array(case["state"], dtype=np.float32)
    tokens, mask = PromptTokenizer(path, case["max_len"])(case["prompt"], state)
    return mask.sum() == case["n_valid"] and tokens[mask].tolist() == case["ids"] and not tokens[~mask].any()


def test_newline_and_special_ids(recorded, model):
    processor = load_processor(model)
    assert processor.encode("\n") == recorded["newline_ids"]
    assert (processor.bos_id(), processor.pad_id()) == (recorded["bos"], recorded["pad"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_falls_into_the_references_bins(dtype, recorded, report):
    table = recorded["digitize"]
    bins = discretise(np.array(table[f"x_{dtype}"], dtype=dtype))
    report("tokenizer/digitize", dtype, int(np.abs(bins - table[f"bins_from_{dtype}"]).max()), 0)
