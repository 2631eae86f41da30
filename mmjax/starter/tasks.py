"""What a config of each task has: model, objectives, evaluators.

A task is a function `(ask) -> Task`; adding one is one function and one line of TASKS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.config import UserError
from mmjax.starter.machine import Machine
from mmjax.starter.parts import resnet_width
from mmjax.starter.sizes import Model
from mmjax.starter.survey import Survey

MUON = dict(
  name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
)
FOLD = 2  # side of the squares of tokens of a picture that a language model reads as one
SKEWED = 3  # times as many rows of the commonest class as of the rarest: then classes are weighted
CONVERT = "See mmjax/data/README.md for how `mmjax data convert` is told"
USUAL = "usual"  # what --hf says that names no family
FAMILIES: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {
  # (task, modalities by name): families of transformers that a model may be like, the usual first
  ("retrieval", ("image", "text")): ("clip", "siglip"),
  ("classification", ("image",)): ("vit", "resnet"),
  ("classification", ("text",)): ("bert",),
  ("multi-label", ("image",)): ("vit", "resnet"),
  ("multi-label", ("text",)): ("bert",),
  ("speech-recognition", ("audio",)): ("whisper",),
  ("dialogue", ()): ("llama",),
}


@dataclasses.dataclass(frozen=True)
class Task:
  """model: the entry, its encoders as settings. label, classes, values: of data.
  text: which texts of a record are read, "caption", "question", "conversation" or "" = none;
  `pieces`: how large their vocabulary may be. batch: examples wanted. evaluator: its settings but
  for source, split and languages. best: the metric that a checkpoint is kept by. text_settings: of
  data.text, beside those that are measured."""

  name: str
  model: dict[str, Any]
  objectives: dict[str, dict[str, Any]]
  evaluator: dict[str, Any]
  best: str
  label: str = "none"
  classes: int = 0
  values: int = 0
  text: str = ""
  pieces: int = 8192
  batch: int = 64
  optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  text_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ask:
  """What a task is made for. modalities: those that the model reads, texts among them where it
  reads them. encoders: of the media. family: of transformers, which has to know the model; "" =
  none."""

  survey: Survey
  machine: Machine
  sizes: Model
  modalities: tuple[str, ...]
  encoders: dict[str, dict[str, Any]]
  family: str

  @property
  def media(self) -> tuple[str, ...]:
    return tuple(name for name in self.modalities if name != "text")

  @property
  def adam(self) -> dict[str, Any]:
    rate = 1.5e-3 if self.sizes.width < 256 else 1e-3 if self.sizes.width < 512 else 5e-4
    return dict(name="adamw", lr=rate, weight_decay=0.05)

  @property
  def quick(self) -> dict[str, Any]:
    """Muon, where models are small."""
    return dict(MUON) if self.sizes.width < 256 else dict(self.adam, weight_decay=0.1, b2=0.98)

  def text_encoder(self, **settings: Any) -> dict[str, Any]:
    return dict(kind="transformer", depth=self.sizes.text, heads=self.sizes.heads, **settings)


def retrieval(ask: Ask) -> Task:
  """Media and captions, or two media, find each other."""
  modalities = ask.modalities
  if len(modalities) < 2:
    raise UserError(
      f"data set {ask.survey.name!r} has {' and '.join(modalities) or 'no media'} alone, but two "
      f"sides are needed that find each other, such as pictures and captions. {CONVERT}"
    )
  hub = "text" if "text" in modalities else modalities[0]
  others = [name for name in modalities if name != hub]
  encoders = dict(ask.encoders)
  model = dict(name="dual_encoder", width=ask.sizes.width, scale_init=10.0)
  if hub == "text":
    encoders["text"] = ask.text_encoder(**dict(pooling="mean"))
  contrastive: dict[str, Any] = dict(kind="contrastive")
  text_settings: dict[str, Any] = {}
  if ask.family == "clip":
    encoders["image"] = dict(encoders["image"], pooling="class", input_norm=True, patch_bias=False)
    encoders["text"] = ask.text_encoder(pooling="eos", causal=True)
  elif ask.family == "siglip":
    encoders["image"] = dict(encoders["image"], pooling="attention")
    encoders["text"] = ask.text_encoder(pooling="final")
    model.update(unprojected=("image",), projection_bias=True, bias=True, bias_init=-10.0)
    contrastive["loss"], text_settings["mask_padding"] = "sigmoid", False
  pairs = {(name, hub): f"{name}_{hub}" for name in others}
  first = others[0]
  return Task(
    "retrieval",
    dict(model, encoders=encoders),
    {
      "align" if len(pairs) == 1 else name: dict(contrastive, between=pair)
      for pair, name in pairs.items()
    },
    dict(kind="retrieval", between=(first, hub)),
    best=f"{first}_to_{hub}/R@1",
    text="caption" if hub == "text" else "",
    batch=128,
    optimizer=ask.quick,
    text_settings=text_settings,
  )


def classification(ask: Ask) -> Task:
  """One label of each record."""
  labels = ask.survey.measured.labels
  if len(labels) < 2:
    raise UserError(
      f"data set {ask.survey.name!r} has {_count(len(labels), 'label')}, but a classifier needs "
      f"two or more. {CONVERT}"
    )
  if ask.survey.several_labels:
    raise UserError(
      f"records of data set {ask.survey.name!r} have several labels each: `mmjax init multi-label`"
    )
  return _classifier(ask, "classification", "label", len(labels), "accuracy")


def multi_label(ask: Ask) -> Task:
  """Any number of labels of each record."""
  labels = ask.survey.measured.labels
  if not labels:
    raise UserError(f"data set {ask.survey.name!r} has no labels. {CONVERT}")
  return _classifier(ask, "multi-label", "labels", len(labels), "mean_average_precision")


def regression(ask: Ask) -> Task:
  """Numbers of each record."""
  names = ask.survey.measured.value_names
  if not names:
    raise UserError(f"data set {ask.survey.name!r} has no values to predict. {CONVERT}")
  task = _classifier(ask, "regression", "none", 0, "r2")
  modalities = task.evaluator["modalities"]
  return dataclasses.replace(
    task,
    objectives={"predict": dict(kind="regression", modalities=modalities)},
    evaluator=dict(kind="regression", modalities=modalities),
    values=len(names),
  )


def question_answering(ask: Ask) -> Task:
  """The answer, of all those in the data, to a question about the media of a record."""
  answers = ask.survey.answers
  if not ask.survey.questions or len(answers) < 2:
    raise UserError(
      f"data set {ask.survey.name!r} has no questions with answers of two kinds or more. {CONVERT}"
    )
  task = _classifier(ask, "question-answering", "answer", len(answers), "accuracy")
  task.evaluator["text"] = "question"
  return dataclasses.replace(task, text="question")


def captioning(ask: Ask) -> Task:
  """Texts about media."""
  return _writer(ask, "captioning", "caption", ask.media, best="cider_d")


def speech_recognition(ask: Ask) -> Task:
  """What is said in a sound."""
  if "audio" not in ask.media:
    raise UserError(f"data set {ask.survey.name!r} has no sounds to transcribe. {CONVERT}")
  task = _writer(ask, "speech-recognition", "transcribe", ("audio",), best="word_error_rate")
  task.objectives["transcribe"].update(label_smoothing=0.05, ctc=0.5)
  task.evaluator.update(beams=4, length_penalty=0.5)
  if ask.family:  # as Whisper has them
    blocks = dict(activation="gelu", eps=1e-5)
    task.model["encoders"]["audio"].update(
      strides=(1, 2), normalisation="whisper", mask_padding=False, **blocks
    )
    task.model["decoder"].update(project_memory=False, **blocks)
    task.objectives["transcribe"]["ctc"] = 0.0
  # Letters rather than syllables: a small model learns to spell before it knows words.
  return dataclasses.replace(task, pieces=1024 if ask.machine.accelerated else 384, batch=32)


def dialogue(ask: Ask) -> Task:
  """The assistant's turns of conversations, about pictures or about none."""
  if not ask.survey.conversations:
    raise UserError(f"data set {ask.survey.name!r} has no conversations. {CONVERT}")
  strange = [name for name in ask.media if name != "image"]
  if strange:
    raise UserError(
      f"`mmjax init dialogue` writes models that read texts and pictures, not {strange[0]}: choose "
      "--modality image or text, or see configs/README.md, Language models"
    )
  small = not ask.machine.accelerated
  folded = dict(image=dict(kind="mlp", fold=FOLD)) if ask.media else {}
  model = dict(
    name="language_model",
    width=ask.sizes.width,
    depth=3 if small else ask.sizes.depth,
    heads=ask.sizes.heads,
    encoders=dict(ask.encoders),
    connectors=folded,
  )
  return Task(
    "dialogue",
    model,
    dict(answers=dict(kind="language_modelling")),
    dict(kind="dialogue", modalities=ask.media, max_length=32, limit=200),
    best="accuracy",
    text="conversation",
    pieces=1024 if small else 8192,
    batch=16,
    optimizer=ask.quick,
  )


def _classifier(ask: Ask, name: str, label: str, classes: int, best: str) -> Task:
  modalities, encoders = ask.modalities, dict(ask.encoders)
  if not modalities:
    raise UserError(f"data set {ask.survey.name!r} has neither media nor texts to classify")
  if "text" in modalities:
    encoders["text"] = ask.text_encoder(pooling="mean")
  model: dict[str, Any] = dict(name="multitask", width=ask.sizes.width, joint=False)
  if len(modalities) > 1:
    kind = "cross_attention" if label == "answer" else "concat"
    depth = dict(depth=2, heads=ask.sizes.heads) if label == "answer" else {}
    model["fusion"] = dict(kind=kind, **depth)
  if ask.family:
    model, encoders = _exportable_classifier(ask, classes, encoders)
  skewed = label in ("label", "labels") and ask.survey.skew > SKEWED
  weights = dict(class_weights="balanced") if skewed else {}
  order = tuple(dict.fromkeys(("text", *modalities))) if label == "answer" else modalities
  return Task(
    name,
    dict(model, encoders=encoders),
    {"classify": dict(kind="classification", modalities=order, **weights)},
    dict(kind="classification", modalities=order),
    best=best,
    label=label,
    classes=classes,
    text="caption" if "text" in modalities else "",
    optimizer=ask.adam,
  )


def _exportable_classifier(
  ask: Ask, classes: int, encoders: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """(model, encoders) in the shape of a family of transformers: ViT, ResNet or BERT."""
  model = dict(name="encoder", width=ask.sizes.width, classes=classes)
  if ask.family == "bert":
    text = dict(kind="bert", depth=ask.sizes.text, heads=ask.sizes.heads, pooling="pooler")
    return model, dict(text=text)
  image = dict(encoders["image"])
  if image["kind"] == "resnet":
    model["width"] = resnet_width(image)
  else:
    image["pooling"] = "class"
  return model, dict(image=image)


def _writer(ask: Ask, name: str, objective: str, source: tuple[str, ...], best: str) -> Task:
  if not source or not ask.survey.languages:
    raise UserError(
      f"data set {ask.survey.name!r} has no {'captions' if source else 'media'} to learn from. "
      f"{CONVERT}"
    )
  decoder: dict[str, Any] = dict(depth=2, heads=ask.sizes.heads)
  if "audio" not in source:  # places in a picture are easily lost otherwise
    decoder["memory_positions"] = True
  return Task(
    name,
    dict(
      name="captioner",
      width=ask.sizes.width,
      encoders={kind: ask.encoders[kind] for kind in source},
      decoder=decoder,
    ),
    {objective: dict(kind="captioning", source=source)},
    dict(kind="captions", modalities=source),
    best=best,
    text="caption",
    optimizer=ask.quick,
  )


def family(task: str, modalities: tuple[str, ...], wanted: str) -> str:
  """The family of transformers that a model of this task is made like. wanted: USUAL, or its
  name.

  Raises UserError: there is none, or none of that name, which `mmjax export --to hf` writes.
  """
  there = FAMILIES.get((task, tuple(sorted(modalities))), ())
  if wanted in there or (wanted == USUAL and there):
    return there[0] if wanted == USUAL else wanted
  which = f"{task} of {' and '.join(modalities) or 'nothing'}"
  if there:
    raise UserError(f"--hf {wanted}: for {which} there are {', '.join(there)}")
  known = "; ".join(
    f"{name} of {' and '.join(read)} ({', '.join(some)})" for (name, read), some in FAMILIES.items()
  )
  raise UserError(
    f"--hf: transformers has no model for {which} that mmjax writes. There are: {known}. Choose "
    "another --modality, or leave --hf out"
  )


def _count(number: int, noun: str) -> str:
  return f"{number or 'no'} {noun}{'s' if number != 1 else ''}"


TASKS: dict[str, Callable[[Ask], Task]] = {
  "retrieval": retrieval,
  "classification": classification,
  "multi-label": multi_label,
  "regression": regression,
  "captioning": captioning,
  "speech-recognition": speech_recognition,
  "question-answering": question_answering,
  "dialogue": dialogue,
}
LOWER_IS_BETTER = ("word_error_rate",)
