"""Names, pictures and splits of openmoji, found once a session."""

import pytest

from mmjax.data.builders import openmoji


@pytest.fixture(scope="session")
def emoji():
  return openmoji.catalogue()
