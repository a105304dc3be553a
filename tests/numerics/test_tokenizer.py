"""Prompts and discretised states against the reference's tokenizer, id for id."""

import json

import numpy as np
import pytest

from rlinf_plugins_openpi.tokenizer import PromptTokenizer, discretise, load_processor


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


def test_newline_and_special_ids(recorded, model):
    processor = load_processor(model)
    assert processor.encode("\n") == recorded["newline_ids"]
    assert (processor.bos_id(), processor.pad_id()) == (recorded["bos"], recorded["pad"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_falls_into_the_references_bins(dtype, recorded, report):
    table = recorded["digitize"]
    bins = discretise(np.array(table[f"x_{dtype}"], dtype=dtype))
    report("tokenizer/digitize", dtype, int(np.abs(bins - table[f"bins_from_{dtype}"]).max()), 0)
