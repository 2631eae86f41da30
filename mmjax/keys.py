"""Every key of a config, except the settings of kinds: the table that config.py resolves with.

A new key is one line. The settings of a kind stand in its own function (kinds.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from mmjax.ranges import (
  Area,
  Batch,
  Channels,
  Count,
  Decay,
  Degrees,
  Deviations,
  Devices,
  Dropout,
  Factors,
  Few,
  Frames,
  Gains,
  Grey,
  Hertz,
  Length,
  Magnitude,
  Means,
  NonNegative,
  Portion,
  Positive,
  Processes,
  Range,
  Seconds,
  Seed,
  Share,
  Side,
  Size,
  Sizes,
  Steps,
  StepsOrNever,
  Strengths,
  Threads,
  TokenId,
  Vocabulary,
)


class Key(NamedTuple):
  path: str
  default: Any
  type: Any
  doc: str


# Every key of a config, except the settings of a kind: those stand in the kind's own function (see
# KINDS).
# `*` stands for the name that a config gives an entry.
KEYS = (
  Key("seed", 0, Seed, "Seed of the initialisation, the data order, augmentation and dropout."),
  Key("train.steps", 1000, Steps, "Length of the run: steps, '10 epochs' or '1e6 examples'."),
  Key("train.batch_size", 256, Batch, "Examples in a global batch, over all hosts and devices."),
  Key(
    "train.microbatches",
    1,
    Size,
    "Splits a batch to save memory; the update stays the same, but for dropout, drawn for each "
    "part. Encoders with batch statistics (resnet, htsat) that are not frozen are not split: "
    "theirs are of the whole batch.",
  ),
  Key(
    "train.deterministic",
    True,
    bool,
    "On GPUs: only deterministic kernels (xla_gpu_deterministic_ops), chosen without timing, for "
    "steps and evaluation. TPUs always give the same numbers, CPUs with as many threads, which a "
    "run keeps.",
  ),
  Key(
    "train.ema",
    0.0,
    Decay,
    "Decay of an exponential moving average of the parameters, used by evaluation; 0 = none.",
  ),
  Key(
    "train.mixup",
    0.0,
    NonNegative,
    "Beta(a, a) parameter of image mixup (Zhang et al. 2018); 0 = off. For objectives whose "
    "targets follow the blend: contrastive, distillation, classification of pictures alone.",
  ),
  Key(
    "train.max_skipped",
    20,
    Size,
    "Consecutive non-finite steps (skipped and counted) after which the run ends.",
  ),
  Key(
    "train.rollback",
    0,
    Count,
    "Go back to the last good checkpoint's parameters after so many skipped steps in a row; 0 = "
    "never.",
  ),
  Key(
    "train.hang_seconds",
    600.0,
    NonNegative,
    "Longest wait for a step, batch, save or evaluation batch before stacks are dumped and the "
    "process ends (compiling: 4 times); 0 = off.",
  ),
  Key(
    "train.compiler",
    "auto",
    Literal["auto", "none", "data", "fsdp", "tiles"],
    "Options of the compiler of TPUs and GPUs: auto = by the sharding, none, or those for data "
    "parallelism, for FSDP or, on TPUs, for products in tiles.",
  ),
  Key("train.on_restart", 10, Count, "Restarts after exit code 1 that a launcher may make."),
  Key(
    "allow_code",
    (),
    tuple[str, ...],
    "Modules outside this package whose code may run because a checkpoint that this run reads (a "
    "teacher) names it.",
  ),
  Key(
    "data.dir",
    "",
    str,
    "Folder or URL (s3://, gs://) of the data sets; '' = $MMJAX_DATA, else ~/.cache/mmjax.",
  ),
  Key(
    "data.mix",
    "examples",
    Literal["examples", "steps"],
    "How sources mix by weight: 'examples' draws every row, 'steps' one source for all rows of a "
    "step.",
  ),
  Key(
    "data.modalities", (), tuple[str, ...], "Modalities of a batch; () = those of model.encoders."
  ),
  Key(
    "data.missing",
    "skip",
    Literal["skip", "mask"],
    "A record that lacks a modality: its row does not count, or `<modality>.present` says so.",
  ),
  Key(
    "data.label",
    "none",
    Literal["none", "label", "labels", "answer"],
    "Classes of a batch: the record's label, several of them ('a|b'), or the answer to the "
    "question that is its text.",
  ),
  Key(
    "data.classes",
    0,
    Count,
    "Classes that a classifier tells apart: at least as many as the sources have.",
  ),
  Key(
    "data.class_names",
    (),
    tuple[str, ...],
    "Classes in the order of their numbers, such as grades from the lowest on; () = all that the "
    "sources have, sorted.",
  ),
  Key("data.values", 0, Count, "Values of a record that a regression predicts; 0 = none."),
  Key(
    "data.workers",
    0,
    Processes,
    "Data processes a host; 0 = threads of the main process. No more than four for each of its "
    "cores are started, or eight.",
  ),
  Key("data.threads", 2, Threads, "Reading threads a data process."),
  Key("data.prefetch", 4, Few, "Batches prepared ahead."),
  Key(
    "data.max_unreadable",
    100,
    Count,
    "Unreadable records (kept as rows that do not count) after which the run ends.",
  ),
  Key(
    "data.sources.*.name",
    "",
    str,
    "A data set under data.dir, or 'tars' (WebDataset files read where they are).",
  ),
  Key(
    "data.sources.*.split",
    "train",
    str,
    "Split, or several: 'train+validation'; or a fixed random part of one: 'train[:10%]', "
    "'train[10%:20%]', 'train[:500]'.",
  ),
  Key(
    "data.sources.*.path",
    "",
    str,
    "For 'tars': a glob or a brace pattern of the tar files, also at a URL (s3://, gs://).",
  ),
  Key(
    "data.sources.*.languages",
    (),
    tuple[str, ...],
    "Languages that captions are drawn from; () = all that there are.",
  ),
  Key(
    "data.sources.*.captions",
    0,
    Count,
    "Training draws from so many of the first captions of a language; 0 = from all.",
  ),
  Key(
    "data.sources.*.text",
    "caption",
    Literal["caption", "question", "document", "conversation", "preference"],
    "What the text of a row is; documents, conversations and preferences (judged answers) are for "
    "language models.",
  ),
  Key(
    "data.sources.*.modalities",
    (),
    tuple[str, ...],
    "For mix 'steps': modalities of this source's batches; () = data.modalities.",
  ),
  Key(
    "data.sources.*.length",
    0,
    Count,
    "For mix 'steps': tokens a text of this source's batches; 0 = data.text.length, the most.",
  ),
  Key(
    "data.sources.*.group",
    1,
    Size,
    "Neighbouring records that stay together when shuffled, such as one thing in all its motions.",
  ),
  Key(
    "data.sources.*.weight",
    1.0,
    NonNegative,
    "Share of the rows of a batch, relative to the other sources.",
  ),
  Key(
    "data.sources.*.balance",
    False,
    bool,
    "Draw the records of every label equally often; those without a label are not drawn.",
  ),
  Key("data.sources.*.cache", False, bool, "Keep decoded examples in memory (small data sets)."),
  Key("data.image.size", 224, Side, "Height and width in pixels that the model sees."),
  Key(
    "data.image.resize",
    "shortest",
    Literal["shortest", "squash", "longest", "naflex"],
    "Evaluation: shortest side then centre crop, squash to a square, or longest side then pad; "
    "naflex: no square, but as many patches at the picture's aspect ratio as `tokens` allows "
    "(encoder 'naflex'; also in training).",
  ),
  Key(
    "data.image.patch",
    16,
    Side,
    "With 'naflex': height and width of a patch in pixels; the encoder's.",
  ),
  Key(
    "data.image.tokens",
    256,
    Length,
    "With 'naflex': patches of a picture at most; shorter ones are padded.",
  ),
  Key(
    "data.image.merge",
    1,
    Size,
    "With 'naflex': rows and columns of patches that make a square, whose patches come one after "
    "another for a connector that joins them; pictures are resized to whole squares (Qwen2-VL).",
  ),
  Key("data.image.least", 1, Size, "With `merge`: patches of a picture at least."),
  Key(
    "data.image.tiles.most",
    1,
    Size,
    "Language models: tiles of `size` that a picture is cut into at most, as its aspect ratio is; "
    "one of several has another of the whole picture. 1 = one picture, one square.",
  ),
  Key("data.image.tiles.least", 1, Size, "Tiles of a picture at least."),
  Key(
    "data.image.tiles.longest",
    0,
    Count,
    "Pixels that a picture's longest side gets before it is cut (Idefics 3); 0 = the tiles whose "
    "aspect ratio is nearest to the picture's (InternVL).",
  ),
  Key(
    "data.image.tiles.grids",
    (),
    Sizes,
    "(rows, columns) of tiles that a picture may have: that which keeps most of its pixels is "
    "filled up with black, and the tokens of the tiles make one grid, whose rows end with the last "
    "token of model.connectors.image; the whole picture comes before it (LLaVA-OneVision).",
  ),
  Key(
    "data.image.tiles.budget",
    9,
    Size,
    "With `grids`: a grid of more tokens than so many tiles have is resized to these.",
  ),
  Key(
    "data.image.crop",
    1.0,
    Portion,
    "Evaluation with 'shortest': share of the shortest side that the centre crop keeps.",
  ),
  Key(
    "data.image.interpolation",
    "bicubic",
    Literal["bicubic", "bilinear", "lanczos"],
    "Resize filter, always antialiased.",
  ),
  Key(
    "data.image.mean",
    (0.5, 0.5, 0.5),
    Means,
    "Subtracted from pixels in [0, 1], per channel, on the device.",
  ),
  Key(
    "data.image.std",
    (0.5, 0.5, 0.5),
    Deviations,
    "Divides pixels after the mean, per channel, on the device.",
  ),
  Key(
    "data.image.augment.crop",
    (1.0, 1.0),
    Area,
    "Random resized crop: range of the area; (1, 1) = off.",
  ),
  Key(
    "data.image.augment.aspect",
    (0.75, 1.3333333),
    Factors,
    "Random resized crop: range of the aspect ratio.",
  ),
  Key("data.image.augment.flip", 0.0, Share, "Probability of a horizontal flip."),
  Key("data.image.augment.rotate", 0.0, Degrees, "Rotation drawn from +- this many degrees."),
  Key(
    "data.image.augment.scale",
    (1.0, 1.0),
    Factors,
    "Range of the zoom about the centre; below 1 shrinks.",
  ),
  Key(
    "data.image.augment.shift", 0.0, Share, "Shift drawn from +- this share of the size, both ways."
  ),
  Key(
    "data.image.augment.jitter",
    (0.0, 0.0, 0.0, 0.0),
    Strengths,
    "Strengths of brightness, contrast, saturation and hue jitter.",
  ),
  Key("data.image.augment.randaugment", 0, Count, "RandAugment: number of operations; 0 = off."),
  Key("data.image.augment.randaugment_magnitude", 9, Magnitude, "RandAugment: magnitude, 0 to 10."),
  Key("data.image.augment.erase", 0.0, Share, "Probability of random erasing."),
  Key(
    "data.image.augment.fill", 255, Grey, "Grey level of what rotation, scale and shift uncover."
  ),
  Key(
    "data.text.tokenizer",
    "",
    str,
    "A tokenizer under data.dir/tokenizers, or a path (.model or tokenizer.json).",
  ),
  Key(
    "data.text.vocab_size",
    4096,
    Vocabulary,
    "Rows of the embedding table; at least the tokenizer's pieces.",
  ),
  Key(
    "data.text.length",
    16,
    Length,
    "Tokens a caption: longer ones are cut (the end token kept), shorter ones padded.",
  ),
  Key(
    "data.text.bos",
    False,
    bool,
    "Put <bos> before a caption; not with a decoder, whose prompt does.",
  ),
  Key("data.text.eos", True, bool, "Put <eos> after a caption."),
  Key("data.text.lowercase", False, bool, "Lower-case captions before tokenising."),
  Key(
    "data.text.punctuation",
    True,
    bool,
    "False: take ASCII punctuation out of captions before tokenising (as SigLIP does).",
  ),
  Key(
    "data.text.mask_padding",
    True,
    bool,
    "False: padding is seen by the model (as SigLIP was trained).",
  ),
  Key("data.text.pad_id", -1, TokenId, "Token of the padding; -1 = the tokenizer's own."),
  Key(
    "data.text.words",
    False,
    bool,
    "Batches also tell which word each token belongs to (whole-word masking).",
  ),
  Key(
    "data.text.per_example",
    1,
    Size,
    "Texts a row: several questions about one picture, which is then encoded once. Of a language "
    "model: questions an example in training, of which none sees another.",
  ),
  Key(
    "data.text.drop_words",
    0.0,
    Dropout,
    "Training: probability that a word of a caption is left out (one always stays).",
  ),
  Key(
    "data.text.template",
    "",
    str,
    "Of conversations: a chat template's name (plain, chatml, ...), 'tokenizer' (its own), a file.",
  ),
  Key(
    "data.text.loss",
    "every",
    Literal["every", "last", "each"],
    "Of conversations: the assistant's turns that are learned; each: as an example of its own.",
  ),
  Key(
    "data.sequence.length",
    0,
    Count,
    "Places of a row of a language model, for text and media; 0 = other models.",
  ),
  Key(
    "data.sequence.pack",
    True,
    bool,
    "Several examples share a row, and do not see each other; False: one a row. Answers that the "
    "model draws (objective grpo) have one each.",
  ),
  Key(
    "data.sequence.slots",
    1,
    Size,
    "Media of a modality that a row has room for, over all examples in it.",
  ),
  *(
    Key(
      f"data.sequence.{name}",
      0,
      Count,
      f"Places that {what} takes in a row: the tokens that model.connectors.{name} gives.",
    )
    for name, what in (
      ("image", "a picture"),
      ("audio", "a sound"),
      ("video", "a clip"),
      ("series", "a series"),
    )
  ),
  Key(
    "data.sequence.audio_step",
    0,
    Count,
    "Samples that a place of a sound stands for: short sounds then take fewer than "
    "data.sequence.audio; 0 = all take as many.",
  ),
  *(
    Key(
      f"data.sequence.written.{name}",
      "{}",
      str,
      f"Text around the places of {what}, which stand where {{}} is.",
    )
    for name, what in (("image", "a picture"), ("audio", "a sound"))
  ),
  Key(
    "data.sequence.written.video",
    "{}",
    str,
    "Text around the places of each group of frames of a clip, which stand where {} is; {time} is "
    "their time in seconds.",
  ),
  Key(
    "data.sequence.tiles",
    ("",) * 4,
    tuple[str, str, str, str],
    "Texts of a picture in tiles: before each ({row} and {column} count from 1), after those of a "
    "row, before the whole picture that follows; the last: before a picture in no tiles.",
  ),
  Key(
    "data.sequence.prompt",
    "{}",
    str,
    "How the text of a prompt after its media is written, {} being the text itself.",
  ),
  Key("data.audio.rate", 16_000, Hertz, "Samples a second; files of other rates are resampled."),
  Key(
    "data.audio.seconds",
    2.0,
    Seconds,
    "Length of a waveform: longer ones are cut, shorter ones padded.",
  ),
  Key("data.audio.augment.speed", (1.0, 1.0), Factors, "Range of the playing speed (and pitch)."),
  Key("data.audio.augment.gain", (1.0, 1.0), Gains, "Range of the factor of the loudness."),
  Key(
    "data.audio.augment.noise",
    0.0,
    NonNegative,
    "White noise of up to this share of the signal's root mean square.",
  ),
  Key(
    "data.audio.augment.shift",
    0.0,
    NonNegative,
    "Silence of up to so many seconds put before the sound.",
  ),
  Key("data.video.size", 64, Side, "Height and width of a frame in pixels."),
  Key("data.video.frames", 8, Frames, "Frames of a clip; with data.video.group the most."),
  Key(
    "data.video.group",
    0,
    Count,
    "Frames that the encoder of pictures reads as one picture, with their time in the text "
    "(Qwen3-VL), in generation alone; 0 = clips have an encoder of their own.",
  ),
  Key(
    "data.video.fps",
    0.0,
    NonNegative,
    "With data.video.group: frames taken of a second; 0 = data.video.frames of every clip.",
  ),
  Key("data.video.least", 1, Size, "With data.video.group: the fewest frames of a clip."),
  Key(
    "data.video.patches",
    (1, 65_536, 0),
    Annotated[tuple[int, int, int], Range(least=0)],
    "With data.video.group: patches of all frames of a clip at least and at most, and of one frame "
    "at most (0 = no limit of its own).",
  ),
  Key(
    "data.video.sampling",
    "uniform",
    Literal["uniform", "random"],
    "Training: frames evenly over the clip, or one at random in each of its equal parts; "
    "evaluation is always uniform.",
  ),
  Key(
    "data.video.augment.crop",
    (1.0, 1.0),
    Area,
    "Range of the area of a crop that all frames share; (1, 1) = off.",
  ),
  Key("data.video.augment.flip", 0.0, Share, "Probability of a horizontal flip of the whole clip."),
  Key(
    "data.video.augment.temporal",
    (1.0, 1.0),
    Area,
    "Range of the share of the clip that is kept; (1, 1) = all.",
  ),
  Key(
    "data.series.length",
    64,
    Length,
    "Time steps of a sensor series: longer ones are cut, shorter ones padded.",
  ),
  Key("data.series.channels", 3, Channels, "Values a time step."),
  Key(
    "data.series.mean",
    (),
    Means,
    "Subtracted from a series, per channel; () = nothing. `mmjax init` measures it.",
  ),
  Key(
    "data.series.std", (), Deviations, "Divides a series after the mean, per channel; () = nothing."
  ),
  Key("model.name", "dual_encoder", str, "The whole model."),
  Key("model.encoders", {}, dict, "One encoder a modality."),
  Key("objectives.*.weight", 1.0, NonNegative, "Factor of this objective in the loss."),
  Key(
    "objectives.*.sources",
    (),
    tuple[str, ...],
    "For data.mix 'steps': sources whose steps this objective takes; () = all.",
  ),
  Key("optimizer.name", "adamw", str, "The update rule."),
  Key("optimizer.lr", 1e-3, NonNegative, "Peak learning rate."),
  Key(
    "optimizer.weight_decay", 0.0, NonNegative, "Decoupled decay, multiplied by the learning rate."
  ),
  Key("optimizer.decay", r".*/(kernel|embedding)", str, "Regex of the parameters that decay."),
  Key("optimizer.clip", 1.0, NonNegative, "Clips the global norm of the gradient; 0 = off."),
  Key(
    "optimizer.rates",
    (),
    tuple,
    "((regex, factor), ...): first match multiplies the learning rate; 0 freezes. A module whose "
    "parameters are all frozen runs as in evaluation: nothing is dropped, and batch statistics "
    "stay as they are; a stack of which some layers are trained keeps its dropout.",
  ),
  Key(
    "optimizer.state_dtype", "float32", Literal["float32", "bfloat16"], "Dtype of the first moment."
  ),
  Key(
    "optimizer.moments",
    "shared",
    Literal["shared", "source"],
    "For data.mix 'steps': one state for all steps, or one for each source's, so that no task "
    "drowns another.",
  ),
  Key(
    "optimizers.*.name",
    "adamw",
    str,
    "The update rule of a group of parameters with an optimizer of its own (adversaries).",
  ),
  Key(
    "optimizers.*.params",
    "",
    str,
    "Regex of the parameters of the group, which `optimizer` then leaves alone.",
  ),
  *(
    Key(f"optimizers.*.{key}", default, kind, f"As optimizer.{key}, for this group.")
    for key, default, kind in (
      ("lr", 1e-3, NonNegative),
      ("weight_decay", 0.0, NonNegative),
      ("decay", r".*/(kernel|embedding)", str),
      ("clip", 1.0, NonNegative),
      ("rates", (), tuple),
      ("state_dtype", "float32", Literal["float32", "bfloat16"]),
      ("moments", "shared", Literal["shared", "source"]),
    )
  ),
  Key(
    "lora.params",
    "",
    str,
    "Regex of the kernels of dense layers, and of a language model's tables of tokens, that learn "
    "by low-rank factors beside them (LoRA), while everything else is frozen; '' = all is trained.",
  ),
  Key("lora.rank", 16, Size, "Rank of the factors."),
  Key("lora.alpha", 16.0, Positive, "The factors' product is multiplied by alpha / rank."),
  Key("lora.rslora", False, bool, "By alpha / sqrt(rank) instead (arXiv:2312.03732)."),
  Key("lora.dropout", 0.0, Dropout, "Training: share of the factors' input that is dropped."),
  Key(
    "lora.full",
    (),
    tuple[str, ...],
    "Regexes of parameters that are trained in full beside the factors, such as a new connector.",
  ),
  Key(
    "lora.base",
    "float32",
    Literal["float32", "int8", "nf4"],
    "How frozen kernels of layer stacks are held: as they are, in 8 bits by output channel, or in "
    "4 bits by blocks of 64 (QLoRA).",
  ),
  Key("schedule.name", "cosine", str, "Learning rate over time."),
  Key("schedule.warmup", "5%", StepsOrNever, "Linear warm-up from zero."),
  Key(
    "precision.compute",
    "bfloat16",
    Literal["float32", "bfloat16"],
    "Dtype of activations; parameters and losses are float32.",
  ),
  Key("mesh.replica", 1, Devices, "Devices across slices (gradients only); -1 = what is left."),
  Key("mesh.data", -1, Devices, "Devices that split the batch; -1 = what is left."),
  Key("mesh.fsdp", 1, Devices, "Devices that split batch and parameters; -1 = what is left."),
  Key("mesh.tensor", 1, Devices, "Devices that split heads and hidden units; -1 = what is left."),
  Key("mesh.context", 1, Devices, "Devices that split sequences; -1 = what is left."),
  Key(
    "sharding",
    "replicated",
    Literal["replicated", "fsdp", "fsdp_tensor"],
    "Where parameters live: whole on every device (replicated), split over mesh.fsdp, or over "
    "mesh.tensor as well.",
  ),
  Key("checkpoint.every", "10%", StepsOrNever, "Steps between checkpoints; 0 = one at the end."),
  Key(
    "checkpoint.minutes",
    0.0,
    NonNegative,
    "Also save after this many minutes without one; 0 = off.",
  ),
  Key("checkpoint.keep", 2, Size, "Latest checkpoints to keep."),
  Key(
    "checkpoint.keep_every",
    0,
    StepsOrNever,
    "Keep every checkpoint at a multiple of this for good; 0 = none.",
  ),
  Key(
    "checkpoint.best",
    "",
    str,
    "Keep the best by this metric of an evaluation, e.g. 'retrieval/val/image_to_text/R@1'; every "
    "command reads it as --checkpoint RUN/best.",
  ),
  Key(
    "checkpoint.best_mode",
    "auto",
    Literal["auto", "max", "min"],
    "Whether the best is the largest or the smallest; auto: the smallest of what is named a loss, "
    "an error (mae, rmse, ...) or a perplexity.",
  ),
  Key("evaluation.every", "100%", StepsOrNever, "Steps between evaluations in the loop; 0 = none."),
  Key(
    "evaluation.patience",
    0,
    Count,
    "Evaluations in a row without a better checkpoint.best after which the run ends; 0 = never.",
  ),
  Key("evaluation.batch_size", 0, Count, "Examples an evaluation batch; 0 = train.batch_size."),
  Key("evaluation.evaluators", {}, dict, "Named evaluators."),
  Key("log.every", 10, Steps, "Steps between lines of metrics.jsonl."),
  Key("log.tensorboard", True, bool, "Also write TensorBoard events."),
  Key("log.wandb", "", str, "Also log to this Weights & Biases project; '' = do not."),
  Key(
    "export.hf", False, bool, "Refuse to train a model that `mmjax export --to hf` could not write."
  ),
  Key(
    "init.from",
    "",
    str,
    "Checkpoint (run, step or import folder) that parameters and batch statistics start from.",
  ),
  Key(
    "init.map",
    ((".*", r"\g<0>"),),
    tuple,
    "((regex of a parameter here, its name there or None for new[, a checkpoint of its own]), "
    "...): the first match decides.",
  ),
  Key(
    "init.tokenizer",
    "same",
    Literal["same", "new"],
    "What data.text.tokenizer must be where init.from has embeddings of tokens: 'same' refuses "
    "another one than the checkpoint's; 'new' leaves these embeddings new.",
  ),
)


COLLECTIONS = (
  "data.sources",
  "objectives",
  "optimizers",
  "model.encoders",
  "evaluation.evaluators",
)

# Keys that a resumed run may change, because they do not alter the numbers of training.
FREE_ON_RESUME = (
  "allow_code",
  "mesh.*",
  "sharding",
  "data.workers",
  "data.threads",
  "data.prefetch",
  "data.dir",
  "data.max_unreadable",
  "log.*",
  "checkpoint.*",
  "evaluation.*",
  "train.steps",
  "train.max_skipped",
  "train.on_restart",
  "train.hang_seconds",
  "train.compiler",
)
