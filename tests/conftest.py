"""Eight simulated CPU devices in every test process, quick compilation, a compilation cache and the
embedded data shared by the run.
"""

import fcntl
import logging
import os
import pathlib
import signal
import tempfile

SHARED = pathlib.Path(tempfile.gettempdir()) / f"mmjax-tests-{os.getuid()}"
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads for the collectives of simulated devices, as multihost.initialize sets it.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(SHARED / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("fixed", derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
  """Without the slow tests most of the time is compiling, so programs are hardly optimised, and
  fusions are written by XLA's old emitters, which take 0.6 of the time of the new ones.

  With `launch/test.sh --all` everything is compiled as a user's programs are.
  """
  os.environ.pop("XLA_FLAGS", None)
  if "not slow" in config.option.markexpr:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for commands in processes of their own
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="session")
def devices():
  """Eight simulated devices."""
  return jax.devices()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
  """moto's S3 server on this machine, named by the usual variables, with a bucket "bucket"; its
  address.
  """
  import boto3
  import fsspec
  from moto.server import ThreadedMotoServer

  logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it notes every request
  server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  server.start()
  address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
  with pytest.MonkeyPatch.context() as patch:
    for name, value in dict(
      AWS_ENDPOINT_URL_S3=address,
      AWS_ACCESS_KEY_ID="key",
      AWS_SECRET_ACCESS_KEY="secret",
      AWS_REGION="us-east-1",
      AWS_DEFAULT_REGION="us-east-1",
      AWS_EC2_METADATA_DISABLED="true",
      AWS_CONFIG_FILE=os.devnull,
      MMJAX_CACHE=str(tmp_path_factory.mktemp("cache")),
    ).items():
      patch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield address
    fsspec.config.conf.clear()
  server.stop()


@pytest.fixture(scope="session")
def embedded_data(tmp_path_factory, worker_id):
  """MMJAX_DATA with openmoji and the quickstart's tokenizer, built once a run; the folder."""
  base = tmp_path_factory.getbasetemp()
  folder = (base if worker_id == "master" else base.parent) / "data"
  folder.mkdir(exist_ok=True)
  os.environ["MMJAX_DATA"] = str(folder)
  with open(folder.parent / "data.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # the other test process waits for this one's build
    from mmjax import cli

    assert cli.main(["data", "build", "openmoji"]) == 0
    if not (folder / "tokenizers" / "quickstart.model").exists():
      assert (
        cli.main(
          [
            "data",
            "tokenizer",
            "--source",
            "openmoji",
            "--split",
            "train+validation",
            "--languages",
            "en",
            "--vocab-size",
            "1024",
            "--name",
            "quickstart",
          ]
        )
        == 0
      )
  return folder


@pytest.fixture
def in_time():
  """A test that waits for a pipe fails rather than hangs."""

  def over(*_):
    raise AssertionError("20 s are over")

  before = signal.signal(signal.SIGALRM, over)
  signal.alarm(20)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)
