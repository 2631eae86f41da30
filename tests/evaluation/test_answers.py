"""Free answers against the records': exact ones, the commonest one, and what a check of one's own
says by the kind of the question.
"""

import types

import numpy as np
import pytest

from mmjax.data.sequences import Piece
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import Tokenizer
from mmjax.evaluation.answers import answers

PAIRS = [("when?", "1"), ("what?", "a cat"), ("when?", "3"), ("what?", "a cat"), ("what?", "a dog")]
SAID = ["2", "A  cat", "9", "a dog", "unreadable"]


def judge(facts, question, answer, text):
  if question == "when?":
    return {"when": abs(int(text) - int(answer)) <= facts["far"]}
  return {"what": text.lower() == answer}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
  file = tmp_path_factory.mktemp("answers") / "t.model"
  words = "1 2 3 9 a A cat dog unreadable".split()
  train_tokenizer([" ".join(np.roll(words, i)) for i in range(200)], file, 400)
  tokenizer = Tokenizer.from_assets({"tokenizer.model": file.read_bytes()})
  tokens = np.full((8, 16), 7)
  for row, text in zip(tokens, SAID, strict=False):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    row[: len(ids)] = ids
  data = types.SimpleNamespace(
    items=[Piece(0, 0), Piece(0, 1), Piece(1, 0), Piece(1, 1), Piece(2, 0)],
    facts=[dict(far=1), dict(far=2), {}],
    question=lambda item: PAIRS[2 * item.record + item.part],
    prompts=lambda modalities: iter(()),
  )
  model = types.SimpleNamespace(eos_id=tokenizer.eos_id, end_ids=())
  sequences = types.SimpleNamespace(sequence=types.SimpleNamespace(length=16))
  return types.SimpleNamespace(
    name="it",
    config=types.SimpleNamespace(data=sequences, model=model),
    data=lambda *place: data,
    apply=lambda method, settings, batches: (tokens, np.arange(8) < 4),
    tokenizer=lambda: tokenizer,
  )


def test_answers_are_counted_over_what_can_be_read(context):
  found = answers(context, source="it", modalities=())
  assert found.metrics == dict(exact=0.25, majority=0.5, questions=4.0, unreadable=1.0)


def test_a_check_says_what_is_right_by_the_kind_of_the_question(context):
  check = f"{__name__}:judge"
  found = answers(context, source="it", modalities=(), check=check).metrics
  assert found["right"] == 0.5  # 2 for 1 may be, 9 for 3 may not; a cat is, a dog is not
  assert found["right/when"] == 0.5 and found["right/what"] == 0.5 and found["exact"] == 0.25
