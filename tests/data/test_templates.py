"""Chat templates: targets, special tokens, refusals; texts and tokens beside transformers'."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.data.parts import MEDIA, Medium, Span
from mmjax.data.templates import FAMILIES, ChatTemplate
from mmjax.data.tokenizers import Tokenizer

SPECIAL = (
  "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
  "<start_of_turn> <end_of_turn> <|system|> <|user|> <|tool|> <|assistant|> <|end|> "
  "<\uff5cUser\uff5c> <\uff5cAssistant\uff5c> <|image_pad|> <|vision_start|> <|vision_end|>"
).split()
# What stands around an answer, besides the token that ends it, and whether the answer is trimmed.
AROUND = {
  "llama-2": (" ", " ", True),
  "llama-3": ("", "", True),
  "mistral": (" ", "", True),
  "gemma": ("", "", True),
  "vicuna": (" ", "", False),
}

# Of the field, shortened: thoughts of earlier turns are left out; a tool's result is a user's turn.
QWEN_3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last == messages|length - 1 %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set thought = thought.lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN_2_VL = (
  "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
  "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
  "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for "
  "content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
  "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
  "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
  "<|im_start|>assistant\n{% endif %}"
)
MARKED = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
  "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(**facts) -> dict[str, bytes]:
  """A tiny byte-level BPE tokenizer of the special tokens of all families, as files."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=SPECIAL,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(["user assistant system a cat and its left", "what is it?"] * 3, trainer)
  config = dict(bos_token="<s>", eos_token="</s>", **facts)
  return {
    "tokenizer.json": made.to_str().encode(),
    "tokenizer_config.json": json.dumps(config).encode(),
  }


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
  return Tokenizer.from_assets(byte_level())


@pytest.fixture(scope="module")
def pieces(tiny) -> Tokenizer:
  model = (tiny / "tokenizers" / "tiny.model").read_bytes()
  return Tokenizer.from_assets({"tokenizer.model": model})


@pytest.fixture(scope="module")
def theirs():
  assets = byte_level()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode()),
    bos_token="<s>",
    eos_token="</s>",
  )


def turn(role: str, content) -> dict:
  return {"role": role, "content": content}


TALK = [
  turn("system", "Be  short."),
  turn("user", " What is\nit? "),
  turn("assistant", "A cat."),
  turn("user", "And its left?\n"),
  turn("assistant", " caf\u00e9 \u732b "),
]
WITH_PICTURES = [
  turn(
    "user", [{"type": "image"}, {"type": "text", "text": "What is <image>?"}, {"type": "image"}]
  ),
  turn("assistant", "A cat."),
  turn("user", [{"type": "text", "text": "And"}, {"type": "audio"}]),
  turn("assistant", "A dog."),
]


def tokens_of(parts, target=None) -> list[int]:
  return [
    token
    for part in parts
    if isinstance(part, Span) and target in (None, part.target)
    for token in part.tokens
  ]


# -- Any conversation ------------------------------------------------------------------------------

BY_NAME = {family: ChatTemplate.read(family) for family in FAMILIES}
BITS = ["<|im_end|>", "</s>", "<eos>", "<image>", "<think>", "</think>", "{{ x }}", "\U000f0000"]
TEXTS = st.lists(
  st.sampled_from(BITS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=4
).map("".join)
SAID = TEXTS.filter(str.strip)
MEDIUM = st.sampled_from(MEDIA).map(lambda name: {"type": name})
ASKED = SAID | st.lists(
  SAID.map(lambda text: {"type": "text", "text": text}) | MEDIUM, min_size=1, max_size=4
)


@st.composite
def conversations(draw):
  messages = [turn("system", draw(SAID))] if draw(st.booleans()) else []
  for _ in range(draw(st.integers(1, 3))):
    messages += [turn("user", draw(ASKED)), turn("assistant", draw(SAID))]
    if draw(st.integers(0, 3)) == 0:
      messages += [turn("tool", draw(SAID)), turn("assistant", draw(SAID))]
  return messages


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ("bpe", "pieces"))
@settings(
  max_examples=15,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(messages=conversations())
def test_targets_are_the_assistants_turns_with_their_ends(family, kind, bpe, pieces, messages):
  tokenizer = bpe if kind == "bpe" else pieces
  template = BY_NAME[family]
  parts = template.render(messages, tokenizer)
  (end,) = template.end_ids(tokenizer)
  before, after, trimmed = AROUND.get(family, ("", "", False))

  said, turns = [], []
  for part in parts:
    if isinstance(part, Span) and part.target:
      said += part.tokens
  while said:
    stop = said.index(end)
    turns.append(tokenizer.decode(said[:stop]))
    said = said[stop + 1 :]
  answers = [m["content"] for m in messages if m["role"] == "assistant"]
  expected = [before + (a.strip() if trimmed else a) + after for a in answers]
  assert turns == [tokenizer.decode(tokenizer.encode_plain(text)) for text in expected]
  if kind == "bpe":  # which loses nothing
    assert turns == expected

  media = [p["type"] for m in messages if isinstance(m["content"], list) for p in m["content"]]
  media = [name for name in media if name != "text"]
  assert [p.modality for p in parts if isinstance(p, Medium)] == media
  # The prompt of the last answer is what training shows before it.
  prompt = template.render(messages[:-1], tokenizer, add_generation_prompt=True)
  assert parts[: len(prompt)] == prompt
  assert isinstance(parts[len(prompt)], Span) and parts[len(prompt)].target
  last = template.render(messages, tokenizer, loss="last")
  assert tokens_of(last, True) == parts[len(prompt)].tokens and tokens_of(last) == tokens_of(parts)


# -- Beside transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*FAMILIES, QWEN_3, MARKED, QWEN_2_VL])
@pytest.mark.parametrize("prompt", (False, True))
def test_texts_are_those_of_transformers(source, prompt, bpe, theirs):
  template = ChatTemplate.read(source)
  talk = TALK[:-1] if prompt else TALK
  text = theirs.apply_chat_template(
    talk, chat_template=FAMILIES.get(source, source), tokenize=False, add_generation_prompt=prompt
  )
  assert template.text(talk, bpe, prompt) == text


@pytest.mark.parametrize("source", ["chatml", "llama-3", "gemma", "zephyr", "phi-3", QWEN_2_VL])
def test_tokens_are_those_of_transformers(source, bpe, theirs):
  template = ChatTemplate.read(source)
  talk = [*TALK[:-1], turn("assistant", "<|im_end|> is plain")]
  ids = theirs.apply_chat_template(talk[:-1], chat_template=FAMILIES.get(source, source))
  ids = ids["input_ids"]
  assert tokens_of(template.render(talk[:-1], bpe)) == ids
  last = template.render(talk, bpe, loss="last")
  assert bpe.decode(tokens_of(last, True)[:-1]) == "<|im_end|> is plain"


def test_thoughts_are_learned_where_the_template_keeps_them(bpe):
  template = ChatTemplate.read(QWEN_3)
  thought = "<think>\nIt purrs.\n</think>\n\nA cat."
  talk = [turn("user", "What?"), turn("assistant", thought), turn("user", "Sure?")]
  talk.append(turn("assistant", thought.replace("A cat", "Yes")))
  parts = template.render(talk, bpe)
  texts = [bpe.decode(part.tokens[:-1]) for part in parts if isinstance(part, Span) and part.target]
  assert texts == ["A cat.", "<think>\nIt purrs.\n</think>\n\nYes."]


def test_white_space_of_one_conversation_does_not_count_for_another(bpe):
  """What is prompt before an answer is worked out once for conversations that are alike."""
  template, alone = ChatTemplate.read(QWEN_3), ChatTemplate.read(QWEN_3)
  thought = turn("assistant", "<think>\nIt purrs.\n</think>\n\nA cat.")
  template.render([turn("user", "What?\n\n"), thought], bpe)
  talk = [turn("user", "What?"), thought]
  assert template.render(talk, bpe) == alone.render(talk, bpe)
  zephyr, fresh = ChatTemplate.read("zephyr"), ChatTemplate.read("zephyr")
  zephyr.render([turn("user", "What?\n"), turn("assistant", "A cat.")], bpe)
  talk = [turn("user", "What?"), turn("assistant", "</think>A cat.")]
  assert zephyr.render(talk, bpe) == fresh.render(talk, bpe)


def test_a_template_may_read_the_parts_itself(bpe):
  talk = [*WITH_PICTURES[:2]]
  template = ChatTemplate.read(QWEN_2_VL)
  parts = template.render(talk, bpe)
  start, stop = SPECIAL.index("<|vision_start|>"), SPECIAL.index("<|vision_end|>")
  assert [p for p in parts if isinstance(p, Medium)] == [Medium("image", 0), Medium("image", 1)]
  assert parts[0].tokens[-1] == start and parts[2].tokens[0] == stop
  assert "What is <image>?" in bpe.decode(parts[2].tokens)
  with pytest.raises(UserError, match=r"leaves out the audio of turn 3 \(user\)"):
    template.render(WITH_PICTURES, bpe)


def test_the_template_of_a_tokenizer_folder(tmp_path, bpe):
  own = Tokenizer.from_assets(byte_level(chat_template=MARKED))
  assert ChatTemplate.read("tokenizer", own).source == MARKED
  assert Tokenizer.from_assets(own.to_assets()).chat_template == MARKED
  several = [{"name": "rag", "template": "x"}, {"name": "default", "template": MARKED}]
  assert Tokenizer.from_assets(byte_level(chat_template=several)).chat_template == MARKED
  beside = Tokenizer.from_assets({**byte_level(), "chat_template.jinja": QWEN_3.encode()})
  assert beside.chat_template == QWEN_3
  (tmp_path / "mine.jinja").write_text(MARKED)
  assert ChatTemplate.read(str(tmp_path / "mine.jinja")).source == MARKED
  with pytest.raises(UserError, match="the tokenizer has no chat template of its own"):
    ChatTemplate.read("tokenizer", bpe)


# -- Special tokens --------------------------------------------------------------------------------


def test_what_people_write_is_plain_text(bpe, pieces):
  text = "<|im_end|></s><spare_0><eos>\n<image> [INST]"
  for tokenizer in (bpe, pieces):
    ids = tokenizer.encode_plain(text)
    assert set(ids).isdisjoint(tokenizer.special_pieces.values())
  assert bpe.decode(bpe.encode_plain(text)) == text
  assert SPECIAL.index("</s>") in bpe.encode(text)
  parts = ChatTemplate.read("chatml").render(WITH_PICTURES, pieces)
  assert [p for p in parts if isinstance(p, Medium)] == [
    Medium("image", 0),
    Medium("image", 1),
    Medium("audio", 0),
  ]


def test_markers_that_a_tokenizer_lacks_are_its_spare_pieces(pieces):
  template = ChatTemplate.read("chatml")
  markers = template.markers(pieces)
  assert markers["<|im_start|>"] == pieces.special_pieces["<spare_0>"]
  assert template.end_ids(pieces) == (pieces.special_pieces["<spare_1>"],)
  assert ChatTemplate.read("plain").end_ids(pieces) == (pieces.eos_id,)


# -- What is refused -------------------------------------------------------------------------------

OPEN = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


@pytest.mark.parametrize(
  ("messages", "message"),
  (
    ([], "the conversation has no turns"),
    ([turn("system", "x")], "a system turn only"),
    ([turn("assistant", "x")], "roles out of order: turn 1 is the assistant's, and none was"),
    ([turn("user", "x"), turn("user", "y")], "turn 2 is the user's and follows the user's"),
    ([turn("user", "x"), turn("system", "y")], "turn 2 is the system's and follows the user's"),
    ([turn("user", "x"), turn("bot\n", "y")], "turn 2 is by 'bot\\\\n'; roles are system"),
    ([turn("user", "x"), turn("assistant", " \n")], r"turn 2 \(assistant\) is empty"),
    ([turn("user", [])], r"turn 1 \(user\) is empty"),
    ([turn("user", None)], r"turn 1 \(user\) has neither text nor a list of parts"),
    ([turn("user", [{"type": "pdf"}])], r"turn 1 \(user\) has a part of type 'pdf'"),
    ([turn("user", "x"), turn("assistant", [{"type": "image"}])], "turn 2 .* has no text to learn"),
    ([turn("user", "\ud83d")], "broken text"),
  ),
)
def test_conversations_that_are_none(messages, message, bpe):
  with pytest.raises(UserError, match=message):
    ChatTemplate.read("chatml").render(messages, bpe)


@pytest.mark.parametrize(
  ("source", "message"),
  (
    ("", "no chat template: data.text.template is empty"),
    ("chatmll", "no chat template 'chatmll'. Name one of plain, chatml"),
    ("none.jinja", "chat template none.jinja cannot be read"),
    ("{% for m in %}", "no Jinja template .line 1"),
    ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "no Jinja template"),
    ("{{ x }}" * 2**14, "at most 65,536 are read"),
    (OPEN, "does not end the assistant's turns with a special token"),
    (OPEN + "</s>", "does not end the assistant's turns with a special token"),
    (OPEN.replace("}}{% e", "+ '<|done|>' }}{% e"), "with <|done|>, which the tokenizer lacks"),
    ("{{ messages[0].content }}</s>", r"leaves out turn 2 \(assistant\)"),
    ("{{ raise_exception('no\nsystem') }}", "refuses this conversation: no system"),
    ("{{ messages[0].nothing.at.all }}", "fails .UndefinedError"),
    ("{% include '/etc/passwd' %}", "fails .TypeError: no loader"),
  ),
)
def test_templates_that_are_none(source, message, bpe):
  with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
    ChatTemplate.read(source).render(TALK[1:], bpe)
  assert "\n" not in str(caught.value)


def test_an_empty_text_beside_a_medium_is_left_out(bpe):
  """As of a turn that is spoken, or a picture alone."""
  for name in ("plain", "chatml"):
    template = ChatTemplate.read(name, bpe)
    parts = [{"type": "image"}, {"type": "audio"}]
    told = [
      template.render([dict(role="user", content=content)], bpe, add_generation_prompt=True)
      for content in (parts, [*parts, {"type": "text", "text": ""}])
    ]
    assert told[0] == told[1]


BIG = "{% set ns = namespace(s='xxxxxxxx', l=[1]) %}"
ENDLESS = (
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
  "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
  "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
  BIG + "{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
  BIG + "{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
  BIG + "{% for i in range(99) %}{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
  BIG + "{% for i in range(99) %}{% set ns.s = ns.s | replace('x', ns.s) %}{% endfor %}",
  BIG + "{% for i in range(99) %}{% set ns.s = ns.s.join(ns.s | list) %}{% endfor %}",
  BIG + "{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
  BIG + "{% for i in range(99) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l }}",
  BIG + "{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
  "{{ 'x' * 10**10 }}",
  "{{ 10 ** 10 ** 10 }}",
  "{{ [0] * 10000000000 }}",
  "{{ '%9999999999d' % 1 }}",
  "{{ '{:9999999999}'.format(1) }}",
  "{{ 'x'.ljust(9999999999) }}",
  "{{ 'x' | center(9999999999) }}",
  "{% for i in range(9999999999) %}{% endfor %}",
  "{% set x %}{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}{% endset %}",
)


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_without_end_ends_in_one_line(source, bpe):
  with pytest.raises(UserError) as caught:
    ChatTemplate.read(source + OPEN + "</s>").render(TALK[1:], bpe)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "source",
  (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].__class__.x }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ self._TemplateReference__context.x }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__.os }}",
  ),
)
def test_nothing_outside_the_sandbox_is_reached(source, bpe):
  with pytest.raises(UserError, match="fails"):
    ChatTemplate.read(source + OPEN + "</s>").render(TALK[1:], bpe)
