"""Zero-shot classification by hand-made vectors, and the prompts that ship."""

from __future__ import annotations

import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.evaluation import prompts
from mmjax.evaluation.zero_shot import class_embeddings, confusion, mean_class_accuracy
from tests.evaluation.fakes import Data, evaluation

LANGUAGES = ("en", "zh", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "ru", "tr", "ar")
LABELS = ("Animals & Nature", "Flags", "Food & Drink")


class Texts(dict):
  """A text encoder that knows a class by its word and is thrown off by templates in a fixed
  direction.
  """

  def __missing__(self, text):
    vector = np.zeros(4)
    for i, words in enumerate((("animal", "bird"), ("flag", "Flagge"), ("food", "drink"))):
      vector[i] += any(w in text for w in words)
    vector[3] = 0.3 * ("picture" in text)
    return vector if vector.any() else np.array([0, 0, 0, 1.0])


def data(batch_size=8):
  vectors = np.array(
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]],
    np.float32,
  )
  return Data(
    vectors,
    text_vectors=Texts(),
    batch_size=batch_size,
    labels=[0, 1, 2, 0, 2, 0],
    label_names=LABELS,
    valid=[True] * 5 + [False],
  )


def entry(**settings):
  return {"z": dict(kind="zero_shot", source="s", split="test", **settings)}


def test_accuracy_confusion_and_left_out_records_by_hand():
  result = evaluation(entry(), data()).run(1.0)["z"]
  assert result.metrics["accuracy"] == 0.8  # the fourth is an animal that looks like a flag
  assert "accuracy@5" not in result.metrics, "of so few classes it says nothing"
  assert result.metrics["mean_class_accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
  assert (result.metrics["examples"], result.metrics["unreadable"]) == (5, 1)
  assert result.figures["confusion"]["matrix"].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 2]]


def test_result_does_not_depend_on_batch_size_or_devices():
  results = [
    evaluation(entry(languages=("en", "de")), data(b), n).run(1.0)["z"].metrics
    for b, n in ((8, 8), (6, 1), (4, 2))
  ]
  assert results[0] == results[1] == results[2] and "de/accuracy" in results[0]


@pytest.mark.parametrize(
  ("modality", "kind"), [("audio", "whisper"), ("video", "frames"), ("series", "series")]
)
def test_sounds_clips_and_series_are_classified_as_pictures_are(modality, kind):
  encoder = {modality: dict(kind=kind)}
  result = evaluation(entry(modality=modality), data(), **encoder).run(1.0)["z"].metrics
  want = evaluation(entry(templates=("{}",)), data()).run(1.0)["z"].metrics
  assert result == want and result["accuracy"] == 0.8
  asked = prompts.templates("en", modality)
  assert asked[0] == "{}" and not any("picture" in t or "emoji" in t for t in asked)
  with pytest.raises(UserError, match='modality names "smell"'):
    evaluation(entry(modality="smell"), data(), **encoder)
  with pytest.raises(UserError, match="modality is 'text'"):
    evaluation(entry(modality="text"), data()).run(1.0)


def test_own_classes_and_templates():
  own = entry(classes=(("flags", ("drink",)), ("food-drink", ("flag",))), templates=("a {}",))
  # Only the clear animal is left.
  assert evaluation(own, data()).run(1.0)["z"].metrics["accuracy"] == 0.2
  with pytest.raises(UserError, match="names 'boats', which is no class"):
    evaluation(entry(classes=(("boats", ("boat",)),)), data()).run(1.0)
  odd = entry(templates=("{} {0.__class__} {:>99999999}",))  # words, whoever writes the config
  assert evaluation(odd, data()).run(1.0)["z"].metrics["accuracy"] >= 0
  with pytest.raises(UserError, match="has no {} for the name"):
    evaluation(entry(templates=("a picture",)), data()).run(1.0)


def test_a_class_is_the_normalised_mean_of_its_prompts():
  table = {"a": [1, 0], "b": [0, 1], "c": [0, -3]}
  out = class_embeddings(
    lambda texts: np.array([table[t] for t in texts], np.float32), [["a", "b"], ["c"]]
  )
  np.testing.assert_allclose(out, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-6)


def test_prompts_cover_the_languages_and_fall_back():
  assert set(prompts.TEMPLATES) == set(prompts.NAMES) == set(LANGUAGES)
  for language in LANGUAGES:
    assert set(prompts.NAMES[language]) == set(prompts.NAMES["en"])
    assert all("{}" in t for t in prompts.templates(language)) and all(
      all(names) for names in prompts.NAMES[language].values()
    )
  assert (
    prompts.names("animals-nature", "en")
    == prompts.names("Animals & Nature", "en")
    == prompts.NAMES["en"]["animals nature"]
  )
  assert prompts.names("golden_retriever", "ko") == ("golden retriever",)
  assert prompts.templates("xx") == ("{}",)


def test_confusion_counts_and_mean_class_accuracy():
  labels, predicted = np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2])
  assert confusion(labels, predicted, "abc")["matrix"].tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]
  assert mean_class_accuracy(labels, labels == predicted) == pytest.approx((2 / 3 + 1) / 2)
