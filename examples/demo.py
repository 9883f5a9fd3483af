"""`make demo`: fine-tune a small Llama with DIL-LSIF on preference pairs, from nothing to a picture.

Run by hand: `python examples/demo.py [--data FILE.jsonl] [--output-dir out/demo]`. No downloads: the
model is built here and gets a short supervised warm-up, the tokenizer is trained on the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait must not spin: on a busy machine that costs several times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # an uninstalled checkout works too

from dilkern import PreferenceLossOutput, linear_logps, preference_loss  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_LENGTH = 192
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(rows: list[dict]):
    """Train a byte-level BPE on the text of the pairs, larger where there is more of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [message["content"] for row in rows for part in row.values() for message in part]
    vocab_size = 640 if sum(map(len, texts)) < 200_000 else 1024
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def encode(tokenizer, row: dict, side: str) -> tuple[list[int], list[int]]:
    """Return input_ids and labels (-100 on the prompt)."""

    def ids(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(row["prompt"], add_generation_prompt=True)
    full = ids(row["prompt"] + row[side])
    labels = [-100] * len(prompt) + full[len(prompt) :]
    return full[:MAX_LENGTH], labels[:MAX_LENGTH]


def batch(tokenizer, examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in examples)

    def pad(values, filler):
        rows = [v + [filler] * (longest - len(v)) for v in values]
        return torch.tensor(rows, device=DEVICE)

    ids, labels = zip(*examples)
    return {
        "input_ids": pad(ids, tokenizer.pad_token_id),
        "attention_mask": pad([[1] * len(i) for i in ids], 0),
        "labels": pad(labels, -100),
    }


def warm_up(model, tokenizer, rows: list[dict], seconds: float) -> None:
    """Supervised epochs on the chosen answers, at most 10 or as many as fit into `seconds`."""
    examples = [encode(tokenizer, row, "chosen") for row in rows]
    epochs = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    shuffle, start, first, last = random.Random(0), time.perf_counter(), 0.0, 0.0
    model.train()
    for _ in range(10):
        shuffle.shuffle(examples)
        losses = []
        for at in range(0, len(examples), 8):
            loss = model(**batch(tokenizer, examples[at : at + 8])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if time.perf_counter() - start > seconds:
                break
        epochs += 1
        last = sum(losses) / len(losses)
        first = first or last
        if time.perf_counter() - start > seconds:
            break
    print(
        f"warm-up: {epochs} epochs in {time.perf_counter() - start:.0f} s, "
        f"mean loss of an epoch {first:.2f} -> {last:.2f}"
    )


@torch.no_grad()
def score(model, tokenizer, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs (S,) and lengths (S,), chosen first, and never a logit."""
    from dilkern.integrations.transformers import install_head

    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # of transformers, about its own names
    install_head(model)
    model.eval()
    logps, lengths = [], []
    for side in ("chosen", "rejected"):
        for at in range(0, len(rows), 8):
            part = batch(tokenizer, [encode(tokenizer, r, side) for r in rows[at : at + 8]])
            logps.append(model(**part, dil_head=True).token_logps.sum(1))
            lengths.append((part["labels"][:, 1:] != -100).sum(1))
    return torch.cat(logps), torch.cat(lengths).float()


def report(before: PreferenceLossOutput, after: PreferenceLossOutput) -> None:
    def line(name: str, values: list[float], form: str = "{:10.4f}") -> None:
        print(f"  {name:<34}" + "".join(form.format(v) for v in values))

    sides = (before, after)
    print(f"\nHeld-out pairs ({before.chosen_logps.numel()})" + " " * 15 + "    before     after")
    for side in ("chosen", "rejected"):
        means = [
            (getattr(o, f"{side}_logps") / getattr(o, f"{side}_lengths")).mean() for o in sides
        ]
        line(f"{side} log-prob per token (nats)", means)
    line(
        "accuracy of the ratio *",
        [(o.chosen_log_ratios > o.rejected_log_ratios).float().mean() for o in sides],
    )
    line("DIL-LSIF loss", [o.loss for o in sides])
    print(
        "  * share of pairs whose chosen answer gained more over the start than the rejected one;"
    )
    print("    0 before training, where nothing has gained\n")


def run_cli(*arguments: str) -> None:
    """Run the real command line, in a process of its own."""
    print("\n$ dilkern " + " ".join(arguments), flush=True)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "dilkern", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def measure(kind: str) -> None:
    """Forward and backward of the token log-probs at a real vocabulary; prints seconds and MiB."""
    tokens, vocab, width = 1024, 128256, 512
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE).requires_grad_()
    weight = torch.empty(vocab, width, device=DEVICE).normal_(std=width**-0.5)
    labels = torch.randint(0, vocab, (tokens,), device=DEVICE)

    def step() -> None:
        hidden.grad = None
        if kind == "fused":
            logps = linear_logps(hidden, weight, labels)
        else:
            logits = hidden @ weight.T
            logps = logits.log_softmax(-1).gather(1, labels[:, None])
        logps.sum().backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def peak() -> float:
        if DEVICE.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def now() -> float:
        if DEVICE.type == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    inputs, times = now(), []
    for _ in range(2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(times), "mib": peak() - inputs}))


def compare() -> None:
    """One line: the loss against full logits, each in a process of its own."""
    found = {}
    for kind in ("full", "fused"):
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", kind]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[kind] = json.loads(output.splitlines()[-1])
    full, fused = found["full"], found["fused"]
    print(
        f"T=1024 tokens, V=128256 words, D=512, fp32 on {DEVICE.type}, forward and backward: full "
        f"logits {full['mib']:.0f} MiB above inputs and {full['seconds']:.2f} s; dilkern "
        f"{fused['mib']:.0f} MiB and {fused['seconds']:.2f} s "
        f"({fused['mib'] / full['mib']:.2f}x the memory, "
        f"{fused['seconds'] / full['seconds']:.2f}x the time)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(HERE / "data" / "preferences.jsonl"))
    parser.add_argument("--output-dir", type=Path, default=Path("out/demo"))
    parser.add_argument("--measure", choices=("full", "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return

    from peft import PeftModel

    from dilkern.integrations.data import read_preferences

    start = time.perf_counter()
    out = options.output_dir
    shutil.rmtree(out / "adapter", ignore_errors=True)  # of an earlier demo
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for row in read_preferences(options.data)
    ]
    tokenizer = make_tokenizer(rows)
    rows = [
        r
        for r in rows
        if len(encode(tokenizer, {**r, "chosen": []}, "chosen")[0]) < MAX_LENGTH * 3 // 4
    ]
    random.Random(0).shuffle(rows)
    count = max(len(rows) // 4, 1)
    held_out, train = rows[:count], rows[count:]
    for name, part in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    model = make_model(tokenizer)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.data}: {len(train)} pairs to train on, {len(held_out)} held out")
    print(f"model: Llama of {size:.1f} M parameters on {DEVICE.type}, vocabulary {len(tokenizer)}")
    warm_up(model, tokenizer, train, seconds=40)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    ref_logps, lengths = score(model, tokenizer, held_out)
    zeros = torch.zeros_like(ref_logps)
    before = preference_loss(ref_logps, lengths, log_ratios=zeros, loss="lsif")

    run_cli(
        "train", "--model", str(out / "model"), "--dataset", str(out / "train.jsonl"),
        "--eval-dataset", str(out / "held_out.jsonl"), "--loss", "lsif", "--lora-r", "16",
        "--output-dir", str(out / "adapter"), "--max-steps", "48", "--batch-size", "4",
        "--learning-rate", "1e-3", "--logging-steps", "5", "--eval-steps", "24",
        "--save-steps", "48", "--precision", "fp32", "--no-gradient-checkpointing",
    )  # fmt: skip

    seen, sizes = score(model, tokenizer, train)
    tuned = PeftModel.from_pretrained(model, str(out / "adapter"))
    chosen, rejected = ((score(tuned, tokenizer, train)[0] - seen) / sizes).chunk(2)
    logps, _ = score(tuned, tokenizer, held_out)
    after = preference_loss(logps, lengths, log_ratios=logps - ref_logps, loss="lsif")
    report(before, after)
    gained = (chosen > rejected).float().mean()
    print(f"Training pairs ({len(train)}): accuracy of the ratio {gained:.4f}")
    print(f"adapter: {out / 'adapter' / 'adapter_model.safetensors'}")
    print(f"picture: {out / 'adapter' / 'training_dynamics.png'}")
    compare()
    print(f"demo: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
