"""The small tokenizer that ships, and prompts as the policies read them."""

import importlib.util
import pickle
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
from huggingface_hub import constants

from rlinf_core import UserError
from rlinf_plugins_openpi import Pi05Config
from rlinf_plugins_openpi.inputs.tokenizer import (
    SMALL_MODEL,
    PromptTokenizer,
    clean,
    discretise,
    find_tokenizer,
    load_processor,
)

MAKE_SMALL_TOKENIZER = Path(__file__).parents[3] / "rlinf_plugins_openpi" / "make_small_tokenizer.py"


def test_small_model_reads_any_ascii_string():
    processor = load_processor(SMALL_MODEL)
    text = "".join(map(chr, range(1, 128)))
    assert processor.decode(processor.encode(text)) == text
    assert processor.decode(processor.encode("naïve café — 日本")) == "naïve café — 日本"


def test_small_model_follows_gemmas_conventions():
    processor = load_processor(SMALL_MODEL)
    assert processor.vocab_size() == 512
    assert (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id()) == (0, 1, 2, 3)
    assert len(processor.encode("\n")) == 1
    assert len(processor.encode("255")) == 3


def test_small_model_comes_from_its_script():
    spec = importlib.util.spec_from_file_location("make_small_tokenizer", MAKE_SMALL_TOKENIZER)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = sentencepiece.SentencePieceProcessor(model_proto=script.train())
    shipped = load_processor(SMALL_MODEL)
    assert [made.id_to_piece(i) for i in range(512)] == [shipped.id_to_piece(i) for i in range(512)]


def test_prompt_is_padded_with_zeros_behind_the_mask():
    tokens, mask = PromptTokenizer(SMALL_MODEL, 48)("push the puck to a goal")
    count = int(mask.sum())
    assert (tokens.shape, tokens.dtype, mask.dtype) == ((48,), np.int64, np.bool_)
    assert mask[:count].all()
    assert tokens[0] == 2
    assert not tokens[count:].any()
    assert load_processor(SMALL_MODEL).decode(tokens[1:count].tolist()) == "push the puck to a goal\n"


def test_long_prompt_is_cut():
    whole, _ = PromptTokenizer(SMALL_MODEL, 64)("turn on the stove")
    tokens, mask = PromptTokenizer(SMALL_MODEL, 3)("turn on the stove")
    assert mask.all()
    assert tokens.tolist() == whole[:3].tolist()


def test_state_becomes_part_of_the_prompt():
    tokens, mask = PromptTokenizer(SMALL_MODEL, 200)("open_it", np.array([-1.0, 0.0, 0.999, 1.7, -1.3]))
    text = load_processor(SMALL_MODEL).decode(tokens[mask].tolist())
    assert text == "Task: open it, State: 0 128 255 255 -1;\nAction: "


def test_equal_prompts_with_other_states_differ():
    tokenizer = PromptTokenizer(SMALL_MODEL, 64)
    first, second = (tokenizer("lift", np.array([value]))[0] for value in (0.1, 0.9))
    assert (first != second).any()
    assert (tokenizer("lift")[0] != first).any()


def test_tokens_of_one_prompt_do_not_share_memory():
    tokenizer = PromptTokenizer(SMALL_MODEL, 16)
    tokenizer("lift")[0][:] = 7
    assert tokenizer("lift")[0][0] == 2


def described(prompts, **fields):
    policy = Pi05Config(variant="dummy", **fields)
    tokenise = policy.transforms()[1]
    samples = [tokenise({"prompt": prompt, "state": np.full(2, state)}) for prompt, state in prompts]
    return policy.describe(samples)


def test_cut_prompts_are_counted_once_each():
    prompts = [("lift", 0.0), ("turn on the stove", 0.0), ("lift", 0.5)]
    lengths = [len(PromptTokenizer(SMALL_MODEL, 99).encode(prompt)) for prompt, _ in prompts]
    found, warning = described(prompts, discrete_state_input=False, max_token_len=lengths[0]).values()
    assert found.startswith(f"1 of 2 different prompts cut to policy.max_token_len = {lengths[0]}, ")
    assert f"the longest has {lengths[1]} tokens; in 3 rows" in found
    assert warning.startswith("warning: the end is cut off 1 of 2 prompts: set policy.max_token_len = 16 ")
    (found,) = described(prompts, discrete_state_input=False, max_token_len=lengths[1]).values()
    assert found.startswith("0 of 2 different prompts")


def test_prompts_with_states_are_counted_by_rows():
    prompts = [("lift", -1.0), ("lift", 0.99)]  # bins of one digit and of three
    short, long = (len(PromptTokenizer(SMALL_MODEL, 99).encode(p, np.full(2, state))) for p, state in prompts)
    assert short < long
    found, warning = described(prompts, max_token_len=short).values()
    assert found.startswith(f"1 of 2 prompts with their states cut to policy.max_token_len = {short}, ")
    assert f"the longest has {long} tokens; in 2 rows" in found
    assert warning.startswith("warning: the state and `Action:` are cut away in 1 of 2 prompts: set policy.")
    assert f"max_token_len = {-(-long // 16) * 16} (the longest has {long} tokens, it is {short})" in warning


def test_without_rows_there_is_nothing_to_say():
    assert described([]) == {}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's local cache, empty, of a machine without a network; returns the folder of a PaliGemma's files in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def fill(repository="google/paligemma-3b-pt-224"):
        model = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        files = model / "snapshots" / ("0" * 40)
        files.mkdir(parents=True)
        return files

    return fill


def test_a_tokenizer_is_a_file_a_folder_or_of_the_hub(cache, tmp_path):
    files = cache()
    for path in (files / "tokenizer.model", tmp_path / "tokenizer.model"):
        path.write_bytes(Path(SMALL_MODEL).read_bytes())
    assert find_tokenizer("") == SMALL_MODEL
    assert find_tokenizer("a/b.model") == "a/b.model"  # missing: said by whoever opens it
    for text in (str(tmp_path), str(tmp_path / "tokenizer.model")):
        assert find_tokenizer(text) == str(tmp_path / "tokenizer.model")
    for text in ("google/paligemma-3b-pt-224", "google/paligemma-3b-pt-224@main"):
        assert find_tokenizer(text) == str(files / "tokenizer.model")
    policy = Pi05Config(variant="dummy", tokenizer="google/paligemma-3b-pt-224")
    policy.check_files()
    assert policy.transforms()[1].tokenizer.path == policy.files()["tokenizer"] == str(files / "tokenizer.model")


def test_a_tokenizer_is_downloaded_alone_and_not_when_it_is_cached(cache, monkeypatch):
    asked = []

    def download(repository, file, revision=None, **options):
        asked.append((repository, file, revision))
        return SMALL_MODEL

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_tokenizer("some/gemma@v1") == SMALL_MODEL
    assert asked == [("some/gemma", "tokenizer.model", "v1")]
    path = cache("other/gemma") / "tokenizer.model"
    path.touch()
    assert find_tokenizer("other/gemma") == str(path)
    assert len(asked) == 1


def test_a_tokenizer_that_cannot_be_had_says_the_ways_out(cache, monkeypatch):
    with pytest.raises(UserError) as caught:
        Pi05Config(variant="dummy", tokenizer="google/paligemma-3b-pt-224").transforms()
    message = str(caught.value)
    assert message.startswith("policy.tokenizer: 'google/paligemma-3b-pt-224' is not a file or folder")
    for part in ("tokenizer.model of the model", "HF_HUB_OFFLINE", "hf auth login", "hf download google/paligemma"):
        assert part in message
    with pytest.raises(UserError, match=r"policy\.tokenizer: there is no file or folder \./nowhere"):
        find_tokenizer("./nowhere")

    def lacking(repository, file, revision=None, **options):
        raise huggingface_hub.errors.EntryNotFoundError(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lacking)
    with pytest.raises(UserError, match=r"some/model .* holds no tokenizer\.model; google/paligemma-3b-pt-224 does"):
        find_tokenizer("some/model")


def test_the_full_size_reads_paligemmas_tokens(tmp_path):
    own = tmp_path / "own.model"
    own.write_bytes(Path(SMALL_MODEL).read_bytes())
    for weights, tokenizer in (("random", SMALL_MODEL), ("weights", SMALL_MODEL), ("weights", str(own))):
        policy = Pi05Config(variant="base", weights=weights, tokenizer=tokenizer)
        with pytest.raises(UserError, match=r"512 entries.*full-size.*google/paligemma-3b-pt-224"):
            policy.build()
    with torch.device("meta"):
        Pi05Config(variant="base", weights="random", tokenizer=str(own)).build()


@pytest.mark.parametrize("entries", [256_000, 257_152])
def test_paligemmas_and_gemmas_entries_fit_the_full_size(entries, monkeypatch):
    processor = SimpleNamespace(vocab_size=lambda: entries)
    monkeypatch.setattr("rlinf_plugins_openpi.config.load_processor", lambda _: processor)
    with torch.device("meta"):
        Pi05Config(variant="base", weights="weights", tokenizer=SMALL_MODEL).build()


def test_clean_strips_before_it_replaces():
    assert clean("  pick_up\nit \n") == "pick up it"
    assert clean("_edge_") == " edge "


def test_bins_hold_their_left_edge():
    below = np.nextafter(0.5, 0)
    assert discretise(np.array([-1.0, below, 0.5])).tolist() == [0, 191, 192]


def test_tokenizer_pickles_small_and_equal():
    tokenizer = PromptTokenizer(SMALL_MODEL, 32)
    tokenizer("lift")
    data = pickle.dumps(tokenizer)
    assert len(data) < 500
    assert pickle.loads(data)("lift")[0].tolist() == tokenizer("lift")[0].tolist()


def test_missing_model_names_the_key():
    with pytest.raises(UserError, match=r"nowhere\.model.*policy\.tokenizer"):
        PromptTokenizer("nowhere.model", 48)


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.model.*as a sentencepiece model"):
        PromptTokenizer(str(path), 48)("lift")
