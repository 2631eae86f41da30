"""COCO's annotations: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption" or
"category_id"}], "categories"}.

Captions of a picture become its captions; instances its labels, "dog|person", without boxes. An
image may also hold its "sentences" itself (Karpathy's splits). Each annotation counts as a row, and
so does an image without any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmjax.data.readers.cells import Skip, text_of


def is_coco(document: Mapping[str, Any]) -> bool:
  return isinstance(document.get("images"), list) and (
    isinstance(document.get("annotations"), list)
    or any("sentences" in image for image in document["images"][:1])
  )


def rows(document: Mapping[str, Any], base: str) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
  """(where it stands, {"file_name", "caption" or "label"}) of each annotation, those of an image
  together.
  """
  names = {
    text_of(entry.get("id")): entry.get("name")
    for entry in document.get("categories") or ()
    if isinstance(entry, dict)
  }
  about: dict[str, list[tuple[str, dict[str, Any]]]] = {}
  for number, entry in enumerate(document.get("annotations") or ()):
    at = f"{base}: annotations[{number}]"
    if isinstance(entry, dict):
      about.setdefault(text_of(entry.get("image_id")), []).append((at, entry))
    else:
      yield at, Skip("broken row", "no JSON object")
  for number, image in enumerate(document["images"]):
    at = f"{base}: images[{number}]"
    if not isinstance(image, dict):
      yield at, Skip("broken row", "no JSON object")
      continue
    file = image.get("file_name", image.get("filename"))
    if isinstance(file, str) and isinstance(image.get("filepath"), str):
      file = os.path.join(image["filepath"], file)
    said = about.pop(text_of(image.get("id")), []) if text_of(image.get("id")) else []
    if image.get("sentences"):
      yield at, {"file_name": file, "caption": image["sentences"]}
    elif not said:
      yield at, Skip("no caption", "no annotation of this image")
    for place, entry in said:
      yield place, _row(file, entry, names)
  for entries in about.values():
    yield from (
      (at, Skip("missing file", f"no image has the id {text_of(entry.get('image_id'))!r}"))
      for at, entry in entries
    )


def _row(file: Any, entry: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any] | Skip:
  if "caption" in entry:
    return {"file_name": file, "caption": entry["caption"]}
  if "category_id" in entry:
    number = entry["category_id"]
    if names and text_of(number) not in names:
      return Skip("broken row", f"no category has the id {number!r:.100}")
    return {"file_name": file, "label": names.get(text_of(number), number)}
  return Skip("no caption", "neither a caption nor a category")
