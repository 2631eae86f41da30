"""The guides say what the code says: links and paths lead somewhere, tables are what commands
print, commands parse, figures agree with each other and with the bars of the tests.
"""

import ast
import re
import shlex

import pytest

import mmjax
from mmjax import arguments, reference
from mmjax.data.builders import BUILDERS
from mmjax.data.readers import FORMATS
from mmjax.data.readers.columns import COLUMNS
from mmjax.kinds import KINDS
from tests import guides
from tests.bench import test_programs
from tests.e2e import small_data, test_extending, test_init, test_recipes, test_stranger
from tests.e2e import test_guides as e2e_guides
from tests.guides import GUIDES, ROOT, blocks, cells, commands, read
from tests.launch import test_scripts
from tests.plan import test_guide as plan_guide

RECIPES = [  # (name, score, time) of the README
  (re.match(r"\[(\w+)\]", row[0])[1], row[2], row[3])
  for row in cells(read("README.md", "## Recipes"))
  if row[0].startswith("[")
]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
LARGER = ("answers_lora_7b", "captioner_7b", "multimodal_8b", "siglip_b16", "siglip_so400m14")
LARGER += ("words_1b",)
TRAINED = [name for name in CONFIGS if name not in LARGER]


def numbers(text: str) -> set[str]:
  return set(re.findall(r"\d+\.\d+|\d+", text))


def test_the_house_has_these_guides():
  wanted = {f"{folder}/README.md" for folder in guides.FOLDERS[1:]} | {"README.md"}
  assert set(GUIDES) == wanted | {"configs/KEYS.md"}


def test_the_readme_is_short_and_begins_with_code():
  text = read("README.md")
  first = "\n".join(text.splitlines()[:40])
  assert len(text.splitlines()) <= 150
  assert "pip install" in first and "bash launch/quickstart.sh" in first
  assert len(blocks(first, "python")[0].strip().splitlines()) == 6
  for row in cells(text):
    assert all(len(re.sub(r"\]\([^)]*\)", "]", cell)) <= 100 for cell in row), row


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
  text = read(guide)
  for link in guides.links(text):
    path, _, anchor = link.partition("#")
    target = (ROOT / guide).parent / path if path else ROOT / guide
    assert target.exists(), f"{guide}: {link}"
    if anchor:
      assert anchor in guides.anchors(target.read_text(encoding="utf-8")), f"{guide}: {link}"


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_are_named_exist(guide):
  roots = (ROOT, ROOT / guide, (ROOT / guide).parent, ROOT / "mmjax")
  for name in re.findall(r"(?<![\w./-])((?:[\w-]+/)+[\w-]+\.(?:py|sh|yaml|sbatch))", read(guide)):
    if not name.startswith(("runs/", "path/")) and name != "configs/mine.py":
      assert any((root / name).exists() for root in roots), f"{guide} names {name}"


@pytest.mark.parametrize("guide", GUIDES)
def test_lines_are_short(guide):
  text = guides.FENCED.sub("", guides.PRINTED.sub("", read(guide)))
  for line in text.splitlines():
    assert len(line) <= 100 or line.startswith("|") or "](" in line, f"{guide}: {line}"


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if "<!-- begin" in read(guide)])
def test_tables_are_what_the_commands_print(guide):
  for _, command, text, _ in guides.PRINTED.findall(read(guide)):
    assert text == guides.printed(command), (
      f"{guide}: `mmjax {command}` prints something else; run python -m tests.guides"
    )


def test_every_key_kind_and_method_is_in_the_tables():
  text = read("configs/KEYS.md")
  for key in mmjax.config.flatten(mmjax.config.base()):
    assert f"| `{key[0]}` |" in text or not key[0] or key[1] == {}, key
  for group, names in KINDS.items():
    assert all(f"### {group} `{name}`" in text for name in names)
  methods = read("mmjax/README.md", "## Methods that objectives call")
  asked = {
    name
    for path in (ROOT / "mmjax" / "objectives").glob("*.py")
    for name in re.findall(r'forward(?:\.teacher)?\("(\w+)"', path.read_text())
  }
  assert asked and all(f"| `{name}(" in methods for name in asked)


def test_every_setting_has_a_meaning_of_its_own():
  """Words, not the name again, and not those of the setting that its docstring goes on with."""
  for kind in reference.kinds():
    others = "|".join(row["setting"] for row in kind["settings"])
    for row in kind["settings"]:
      meaning = row["meaning"]
      assert len(meaning) > 3 and not meaning.endswith(":"), (kind["kind"], row["setting"])
      assert not re.search(rf"[.;] `?({others})`?: ", meaning), (kind["kind"], row["setting"])


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_parse(guide):
  for command in " && ".join(commands(read(guide))).split(" && "):
    words = shlex.split(re.sub(r"^(\w+=\S+ )+", "", command))
    if words[:1] == ["mmjax"]:
      _, rest = arguments.make_parser().parse_known_args(words[1:])
      assert all(word.startswith("--config.") for word in rest), command
    elif words[:1] == ["python"]:
      text = (ROOT / words[1]).read_text()
      assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), command
    elif words[:2] == ["pip", "install"]:
      extras = re.findall(r"\w+", words[2])
      assert all(f'"{extra}": ' in (ROOT / "setup.py").read_text() for extra in extras), command
    elif words:
      script = next(word for word in words if word.startswith("launch/"))
      assert words[0] in ("bash", "sbatch", ".") and (ROOT / script).exists(), command


# Scripts that set a machine up. What they run on it is run by tests: the commands of the quickstart
# by test_recipes.py, the options of gpu_env.sh by tests/launch.
SET_UP = {"bash launch/quickstart.sh", "bash launch/test.sh", ". launch/gpu_env.sh"}


def run_by_tests() -> set[str]:
  """The commands of the guides that tests take from there and run."""
  stores = commands(read("launch/README.md", "## Object stores"))
  taken = [*e2e_guides.COMMANDS, *commands(test_init.SECTION), *test_stranger.COMMANDS, *stores]
  taken += [*test_extending.COMMANDS, *plan_guide.COMMANDS, *test_scripts.COMMANDS]
  return {*taken, *(shlex.join(words) for words, _ in test_programs.SHOWN)}


def recipes_of_tests() -> set[str]:
  """The recipes, with their arguments, that test_recipes.py trains."""
  names = [*(row[0] for row in test_recipes.SHORT), *test_recipes.LANGUAGE_MODELS]
  names += [*test_recipes.VARIANTS, *test_recipes.MADE_OF_OTHERS, "emoji_gan", "quickstart"]
  names += [recipe for recipe, _ in test_recipes.FULL]
  source = (ROOT / "tests/e2e/test_recipes.py").read_text()
  names += re.findall(r'(?:learn|learn_to_hear|config_of)\("([\w:]+)"', source)
  names += ["emoji_groups:full", "emoji_groups:linear", "multitask:captions"]  # in loops
  names += ["video_text"] if "video_text:transformer" in names else []  # the usual argument
  return set(names)


def test_every_command_is_run_by_a_test():
  taken, recipes = run_by_tests(), recipes_of_tests()
  built = {shlex.join(words) for name in CONFIGS for words in small_data.commands(name)}
  for guide in GUIDES:
    for line in commands(read(guide)):
      for one in [line] if line in taken else line.split(" && "):
        words = shlex.split(one)
        if words[:2] == ["mmjax", "train"] and words[3].startswith("configs/"):
          recipe = words[3].removeprefix("configs/").replace(".py", "")
          if recipe in recipes:
            continue
        known = one in taken or shlex.join(words) in taken or shlex.join(words[1:]) in built
        assert known or one in SET_UP or one.startswith(("pip install", "bash launch/check_gpu")), (
          f"{guide}: no test runs `{one}`"
        )


@pytest.mark.parametrize("guide", GUIDES)
def test_tables_are_whole(guide):
  """Every row has as many cells as the head of its table."""
  text = guides.FENCED.sub("", read(guide))
  for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize("guide", GUIDES)
def test_programs_parse_and_pieces_of_configs_resolve(guide):
  for code in blocks(read(guide), "python"):
    ast.parse(code)
    if "def get_config" in code and guide == "README.md":
      names = {}
      exec(code, names)
      mmjax.config.resolve(names["get_config"]())
    elif code.startswith("c."):
      c = mmjax.config.base()
      c.data.sources.emoji = dict(name="openmoji")
      c.data.text.tokenizer = "quickstart"
      image, text = dict(kind="vit", patch=16), dict(kind="transformer")
      c.model = dict(name="dual_encoder", encoders=dict(image=image, text=text))
      c.objectives.align = dict(kind="contrastive", between=("image", "text"))
      exec(code, dict(c=c))
      mmjax.config.resolve(c)


def test_each_recipe_has_a_row_and_a_section():
  assert [name for name, _, _ in RECIPES if name not in TRAINED] == []
  assert sorted(name for name, _, _ in RECIPES) == TRAINED
  larger = read("configs/README.md", "### Larger configs")
  assert all(f"`{name}.py`" in larger for name in CONFIGS if name not in TRAINED)


@pytest.mark.parametrize(("name", "score", "seconds"), RECIPES, ids=[row[0] for row in RECIPES])
def test_scores_and_times_of_the_readme_are_those_of_the_recipes(name, score, seconds):
  guide = read("configs/README.md", "## Recipes")
  section = read("configs/README.md", f"### {name}")
  assert re.search(r"\d", score) and numbers(score) <= numbers(section)
  (row,) = [row for row in cells(guide) if row[0].startswith(f"`{name}.py") and len(row) == 4]
  assert row[3] == seconds.removesuffix(" s")


@pytest.mark.parametrize("name", TRAINED)
def test_the_commands_of_a_recipe_are_those_of_its_config(name):
  text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
  lines = [line for line in text.splitlines() if line.startswith(("mmjax ", "bash "))]
  shown = blocks(read("configs/README.md", f"### {name}"), "bash")[0].strip().splitlines()
  assert shown == (lines or ["bash launch/quickstart.sh"])


@pytest.mark.parametrize(
  ("recipe", "bars"), test_recipes.FULL, ids=[r for r, _ in test_recipes.FULL]
)
def test_the_bars_of_full_runs_guard_published_scores(recipe, bars):
  published = [float(x) for x in numbers(read("configs/README.md", f"### {recipe.split(':')[0]}"))]
  for wanted in bars.values():
    for metric, bar in wanted.items():
      low, high = (0.6 * bar, bar) if metric in test_recipes.AT_MOST else (bar, 1.6 * bar)
      assert any(low <= score <= high for score in published), f"{metric} {bar}"


def test_every_form_and_option_of_convert_has_an_example():
  text = read("mmjax/data/README.md")
  used = [command for command in commands(text) if command.startswith("mmjax data convert ")]
  assert {command.split()[3] for command in used} == set(FORMATS)
  options = arguments.make_parser().parse_args(["data", "convert", "folder", "x", "--name", "x"])
  named = {name for action in options.parser._actions for name in action.option_strings}
  named -= {"-h", "--help"}
  assert {
    row[0].strip("`") for row in cells(read("mmjax/data/README.md", "## Options"))[1:]
  } == named
  assert {word for command in used for word in command.split() if word.startswith("--")} == named
  assert all(f"`{role}`" in text for role in COLUMNS)


def test_every_embedded_data_set_is_named():
  rows = cells(read("mmjax/data/README.md", "## Embedded data sets"))[1:]
  assert {row[0].strip("`") for row in rows} == set(BUILDERS)


def test_the_picture_of_a_report_is_drawn_text():
  text = guides.PICTURE.read_text()
  assert text.startswith("<svg ") and "polyline" in text and len(text) < 60_000
  assert "base64" not in text and "<script" not in text and "<image" not in text


def test_no_guide_has_places_left_to_fill():
  for guide in GUIDES:
    text = read(guide)
    assert not re.search(r"@@|TODO|FIXME|XXX|\?\?\?|\bTBD\b", text), guide


def test_every_guide_is_in_the_sentence_of_guides():
  shown = {link.partition("#")[0] for link in guides.links(read("README.md", "## Guides"))}
  assert shown == set(GUIDES) - {"README.md"}


def test_meanings_say_all_themselves():
  """No pointer into the source, and every setting is named where its kind explains it."""
  rows = [
    (f"{kind['group']} {kind['kind']}.{row['setting']}", row["meaning"])
    for kind in reference.kinds()
    for row in kind["settings"]
  ]
  rows += [(row["key"], row["meaning"]) for row in reference.keys()]
  assert [
    where for where, meaning in rows if re.search(r"\w\.py\b|\bsee `|[A-Z]{4,} in", meaning)
  ] == []
