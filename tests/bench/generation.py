"""Greedy generation by a language model of 30 million parameters in mmjax against transformers'
`generate`, in turn on this machine: the same random Llama, the same prompts.

  python tests/bench/generation.py [--rows 1 8] [--prompt 128] [--tokens 128] [--pairs 5]

Prints, for each number of rows, medians of tokens a second, of the time to the first token, and of
their ratios; and checks that both write the same tokens. Compiling is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
VOCABULARY = 16_384


def theirs(folder: Path):
  """A random Llama of transformers, saved in a folder."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=7,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  model.save_pretrained(folder)
  return model


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--tokens", type=int, default=128)
  parser.add_argument("--pairs", type=int, default=5)
  args = parser.parse_args()

  import jax
  import torch

  from mmjax.inference.engine import go_on_from_prompts
  from mmjax.interop.huggingface import import_hf
  from mmjax.models import make_model
  from mmjax.state import checkpoint

  with tempfile.TemporaryDirectory() as folder:
    model = theirs(Path(folder, "hf"))
    import_hf(Path(folder, "hf"), Path(folder, "ours"))
    own = make_model(checkpoint.load_config(Path(folder, "ours")))
    variables = {"params": jax.device_put(checkpoint.load_params(Path(folder, "ours")))}
  count = sum(x.numel() for x in model.parameters())
  print(f"{count / 1e6:.1f} million parameters, {os.cpu_count()} cores")

  def write(variables, sequence, length):
    return go_on_from_prompts(own, variables, {"sequence": sequence}, length)[0]

  ours = jax.jit(write, static_argnums=2)
  for rows in args.rows:
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (rows, args.prompt))
    ids = torch.asarray(prompts)
    sequence = dict(tokens=prompts.astype(np.int32), length=np.full(rows, args.prompt, np.int32))
    mask = torch.ones_like(ids)

    def time_ours(length, sequence=sequence):
      start = time.perf_counter()
      tokens = np.asarray(ours(variables, sequence, length))
      return time.perf_counter() - start, tokens

    def time_theirs(length, ids=ids, mask=mask):
      start = time.perf_counter()
      with torch.inference_mode():
        whole = model.generate(
          ids, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
      return time.perf_counter() - start, whole[:, args.prompt :].numpy()

    for length in (1, args.tokens):  # compiles, and warms both up
      same = (time_ours(length)[1] == time_theirs(length)[1]).mean()
      assert same == 1 or length == 1, f"{100 * same:.1f}% of the tokens are the same"
    seconds = {(who, n): [] for who in ("ours", "theirs") for n in (1, args.tokens)}
    for _ in range(args.pairs):
      for n in (1, args.tokens):
        seconds["ours", n].append(time_ours(n)[0])
        seconds["theirs", n].append(time_theirs(n)[0])
    for n, what in ((1, "to the first token"), (args.tokens, f"for {args.tokens} tokens")):
      a, b = (seconds[who, n] for who in ("ours", "theirs"))
      ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
      speeds = (rows * n / statistics.median(x) for x in (a, b))
      print(
        f"{rows} rows, {what}: {statistics.median(a):.3f} s, transformers "
        f"{statistics.median(b):.3f} s ({{:.0f}} and {{:.0f}} tokens/s): ".format(*speeds)
        + f"{ratio:.2f} times as fast"
      )


if __name__ == "__main__":
  main()
