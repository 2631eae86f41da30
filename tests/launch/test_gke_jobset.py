"""The JobSet manifest, filled in: what Kubernetes and JobSet check of it, and what its restart
rules say.
"""

import re

import pytest
import yaml

TRAIN = ("--config", "configs/quickstart.py", "--workdir", "/runs/a b", '--config.text="x\\y"')
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@pytest.fixture
def manifest(fakes):
  def fill(*words, **settings):
    fakes.environment.update(IMAGE="registry/mmjax:tpu", **settings)
    return yaml.safe_load(fakes.run("gke_jobset.sh", "--dry-run", *(words or TRAIN)))

  return fill


def test_structure(manifest):
  """Required keys, types and ties that the API servers check (batch/v1 Job,
  jobset.x-k8s.io/v1alpha2).
  """
  jobset = manifest(SLICES="2", TOPOLOGY="4x8")
  assert (jobset["apiVersion"], jobset["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  ) and NAME.fullmatch(jobset["metadata"]["name"])
  assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
  (slices,) = jobset["spec"]["replicatedJobs"]
  assert (
    set(slices) == {"name", "replicas", "template"}
    and NAME.fullmatch(slices["name"])
    and slices["replicas"] == 2
  )
  job = slices["template"]["spec"]
  assert (
    job["completionMode"] == "Indexed"
    and job["parallelism"] == job["completions"] == 8
    and job["backoffLimit"] == 0
  )
  assert job["podReplacementPolicy"] == "Failed"  # the only one allowed beside podFailurePolicy
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
  assert (
    pod["terminationGracePeriodSeconds"] == 300 and pod["securityContext"]["runAsNonRoot"] is True
  )
  (container,) = pod["containers"]
  assert container["image"] == "registry/mmjax:tpu" and container["args"] == ["train", *TRAIN]
  assert (
    container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": 4}
  )
  assert all(isinstance(variable["value"], str) for variable in container["env"])
  assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
  assert "${" not in yaml.safe_dump(jobset)


def test_exit_codes_lead_to_the_restart_rule(manifest):
  """What a host ends with -> the first matching podFailurePolicy rule -> the first JobSet rule
  whose pattern fits its message.
  """
  spec = manifest(MAX_RESTARTS="7")["spec"]
  assert spec["failurePolicy"]["maxRestarts"] == 7
  job = spec["replicatedJobs"][0]["template"]["spec"]
  containers = {c["name"] for c in job["template"]["spec"]["containers"]}

  def outcome(code=None, condition=None) -> str:
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
      codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
      assert rule["action"] == "FailJob" and bool(codes) != bool(conditions), (
        "exactly one of the two is allowed"
      )
      assert (
        not codes
        or codes["containerName"] in containers
        and codes["operator"] == "In"
        and 0 not in codes["values"]
      )
      assert not conditions or all(c["status"] == "True" for c in conditions)
      if (
        codes
        and code in codes["values"]
        or conditions
        and condition in {c["type"] for c in conditions}
      ):
        message, reason = (
          f"Container train for pod x/y failed with exit code {code} matching FailJob rule at "
          f"index {i}",
          "PodFailurePolicy",
        )
        break
    else:
      message, reason = "Job has reached the specified backoff limit", "BackoffLimitExceeded"
    for rule in spec["failurePolicy"]["rules"]:
      if reason in rule["onJobFailureReasons"] and any(
        re.search(p, message) for p in rule["onJobFailureMessagePatterns"]
      ):
        return rule["action"]
    return "RestartJobSet"  # JobSet's default, which counts

  assert outcome(75) == "RestartJobSetAndIgnoreMaxRestarts"
  assert outcome(137, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
  assert (
    outcome(2) == "FailJobSet" and outcome(1) == outcome(134) == outcome(137) == "RestartJobSet"
  )


def test_it_is_applied_with_kubectl(fakes, tmp_path):
  fakes.add("kubectl", 'cat > "$CALLS.manifest"')
  fakes.environment["IMAGE"] = "mmjax:tpu"
  fakes.run("gke_jobset.sh", *TRAIN)
  assert fakes.calls() == ["kubectl apply -f -"]
  assert yaml.safe_load((tmp_path / "calls.manifest").read_text())["metadata"]["name"] == "mmjax"


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(TOPOLOGY="4by4"), "is not like 4x4"),
    (dict(TOPOLOGY="2x3", CHIPS="4"), "does not divide"),
    (dict(SLICES="two"), "not a whole number"),
    (dict(CHIPS="0"), "does not divide"),
  ],
)
def test_wrong_settings_are_named(fakes, settings, message):
  fakes.environment.update(IMAGE="mmjax:tpu", **settings)
  assert message in fakes.run("gke_jobset.sh", "--dry-run", *TRAIN, code=2)
