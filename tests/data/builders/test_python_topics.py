"""The python_topics builder: docstrings are read from files that are not run, and no paragraph
stands twice.
"""

from mmjax.data.builders.python_topics import docstrings, documents


def test_docstrings_of_a_library_come_in_order_and_nothing_is_run(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "test").mkdir()
  (tmp_path / "b" / "one.py").write_text('"""Second."""\nraise SystemExit\n')
  (tmp_path / "a.py").write_text(
    '"""First."""\nclass A:\n  """Of A."""\n  def f(self):\n    "Of f."\n'
  )
  (tmp_path / "broken.py").write_text("def (:\n")
  (tmp_path / "none.py").write_text("x = 1\n")
  (tmp_path / "test" / "more.py").write_text('"""Left out."""\n')
  assert list(docstrings(tmp_path)) == [
    ("a.py", "First.\n\nOf A.\n\nOf f."),
    ("b/one.py", "Second."),
  ]


def test_a_paragraph_that_is_known_is_left_out():
  known = set()
  assert documents("one  two\n\nthree", known) == ["one two three"]
  assert documents("three\n\nfour", known) == ["four"]
