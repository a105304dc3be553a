"""Tokens a second of text SFT on a CPU, beside trl's SFTTrainer: the same tiny model, data and batches, in one run.

    python benchmarks/text_step.py --json

Needs the dependency group `benchmarks`. Each side trains the same steps in turn, several rounds, so that what else the
machine does meets both; the medians are compared. Counted are tokens of texts, not padding. Packed, both sides fill
sequences of the same length; trl's texts do not see one another either, as transformers masks them by their positions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data" / "text_plans"
MODEL = {"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
LENGTH = 256


def ours(batch: int, steps: int, *, packing: bool, vocabulary: int, folder: Path) -> float:
    """Tokens a second of core's trainer, its first step left out."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.training.distributed.processes import processes
    from rlinf_core.training.run_folder import prepare_folder

    given = {
        "runner.output_dir": folder,
        "runner.name": "ours",
        "runner.max_steps": steps + 1,
        "runner.val_check_interval": 0,
        "policy.packing": str(packing).lower(),
        "policy.config.vocab_size": vocabulary,
        "trainer.global_batch_size": batch,
        "trainer.micro_batch_size": batch,
        "data.validation_fraction": 0.0,
        "runner.save_interval": 0,
    }
    run = load_config(ROOT / "examples" / "text_sft.toml", [f"{key}={value}" for key, value in given.items()])
    plugins, times, counts = get_plugins(), [], []
    with processes("cpu") as group:
        trainer = run.trainer.build(run, start=prepare_folder(run, overwrite=True), group=group, plugins=plugins)
        step = trainer._train_step

        def timed(batches, stop):
            before = time.perf_counter()
            result = step(noted(batches), stop)
            times.append(time.perf_counter() - before)
            return result

        def noted(batches):
            for one in batches:
                counts.append(int(one["document_lengths"][:, :-1].sum()))
                yield one

        trainer._train_step = timed
        trainer.train()
    return sum(counts[1:]) / sum(times[1:])


def theirs(batch: int, steps: int, *, packing: bool, vocabulary: int, folder: Path) -> float:
    """Tokens a second of trl, its first step left out."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from rlinf_plugins_text.rows.chat import CHATML

    tokenizer = AutoTokenizer.from_pretrained(DATA)
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    rest = {key: value for key, value in MODEL.items() if key != "model_type"}
    settings = AutoConfig.for_model(MODEL["model_type"], vocab_size=vocabulary, **rest)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    rows = [json.loads(line) for line in (DATA / "plans.jsonl").read_text(encoding="utf-8").splitlines()]
    config = SFTConfig(
        output_dir=str(folder / "theirs"),
        max_steps=steps + 1,
        per_device_train_batch_size=batch,
        max_length=LENGTH,
        packing=packing,
        assistant_only_loss=True,
        learning_rate=3e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    times: list[float] = []
    counts: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
    )
    collate = trainer.data_collator

    def noted(examples):
        counts.append(sum(len(one["input_ids"]) for one in examples))
        return collate(examples)

    trainer.data_collator = noted
    trainer.train()
    # The loader collates a batch ahead; those of the timed steps are the second to the last trained.
    return sum(counts[1 : steps + 1]) / (times[-1] - times[0])


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="results for programs")
    parser.add_argument("--steps", type=int, default=12, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side")
    parser.add_argument("--batch", type=int, default=16, help="texts (or packs) a step")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="words of the model")
    options = parser.parse_args()
    cases = {"unpacked": False, "packed": True}
    speeds: dict[str, dict[str, list[float]]] = {case: {"ours": [], "trl": []} for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for case, packing in cases.items():
                for side, measure in (("ours", ours), ("trl", theirs)):
                    share = {"packing": packing, "vocabulary": options.vocabulary, "folder": Path(folder)}
                    sys.stdout.flush()
                    speeds[case][side].append(_quietly(measure, options.batch, options.steps, **share))
    median = {case: {side: statistics.median(found) for side, found in sides.items()} for case, sides in speeds.items()}
    ratio = {case: sides["ours"] / sides["trl"] for case, sides in median.items()}
    result = {
        "tokens_per_second_vs_trl": round(ratio["unpacked"], 3),
        "packed_vs_trl_packed": round(ratio["packed"], 3),
        "tokens_per_second": {
            case: {side: round(one) for side, one in sides.items()} for case, sides in median.items()
        },
        "rounds": {
            case: {s: [round(one) for one in found] for s, found in sides.items()} for case, sides in speeds.items()
        },
        "settings": {"batch": options.batch, "steps": options.steps, "vocabulary": options.vocabulary, "model": MODEL},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1) if options.json else _table(result))


def _quietly(measure, *arguments, **options):
    """Run without what the trainers print."""
    out = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        try:
            return measure(*arguments, **options)
        finally:
            sys.stdout.flush()
            os.dup2(out, 1)
            os.close(out)


def _table(result) -> str:
    speeds = result["tokens_per_second"].items()
    lines = [f"{case}: {sides['ours']} tokens/s, trl {sides['trl']}" for case, sides in speeds]
    unpacked, packed = result["tokens_per_second_vs_trl"], result["packed_vs_trl_packed"]
    return "\n".join([*lines, f"times as fast as trl: unpacked {unpacked}, packed {packed}"])


if __name__ == "__main__":
    main()
