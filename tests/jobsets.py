"""Checks manifests of JobSets as a cluster would."""

import re

import yaml

# What sigs.k8s.io documents for jobset.x-k8s.io/v1alpha2: names and types. A tuple
# lists the values there may be, None is anything. Its schema is in no package.
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str, "namespace": str, "labels": None, "annotations": None},
    "spec": {
        "replicatedJobs": [{
            "name": str, "groupName": str, "replicas": int,
            "template": {"metadata": None, "spec": None},
            "dependsOn": [{"name": str, "status": ("Ready", "Complete")}]}],
        "network": {"enableDNSHostnames": bool, "subdomain": str,
                    "publishNotReadyAddresses": bool},
        "successPolicy": {"operator": ("All", "Any"), "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [{
                "name": str,
                "action": ("FailJobSet", "RestartJobSet", "RestartJob",
                           "RestartJobSetAndIgnoreMaxRestarts",
                           "RestartJobAndIgnoreMaxRestarts"),
                "onJobFailureReasons": [(
                    "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                    "MaxFailedIndexesExceeded", "PodFailurePolicy")],
                "onJobFailureMessagePatterns": [str],
                "targetReplicatedJobs": [str]}]},
        "startupPolicy": {"startupPolicyOrder": ("AnyOrder", "InOrder")},
        "suspend": bool,
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "managedBy": str,
        "ttlSecondsAfterFinished": int,
        "volumeClaimPolicies": None,
    },
}


def assert_fits(value, form, path="manifest"):
  """Checks names and types as JOBSET gives them."""
  if isinstance(form, dict):
    assert isinstance(value, dict), path
    for name, part in value.items():
      assert name in form, f"{path}.{name}"
      assert_fits(part, form[name], f"{path}.{name}")
  elif isinstance(form, list):
    assert isinstance(value, list), path
    for i, part in enumerate(value):
      assert_fits(part, form[0], f"{path}[{i}]")
  elif isinstance(form, tuple):
    assert value in form, f"{path}: {value!r}"
  elif form is not None:
    assert type(value) is form, f"{path}: {value!r}"


def check_jobset(text):
  """Checks a manifest as far as it can be here; returns its Jobs' specs."""
  manifest = yaml.safe_load(text)
  assert_fits(manifest, JOBSET)
  dns = r"[a-z]([-a-z0-9]*[a-z0-9])?"
  assert re.fullmatch(dns, manifest["metadata"]["name"])
  jobs = []
  for job in manifest["spec"]["replicatedJobs"]:
    assert re.fullmatch(dns, job["name"])
    spec = job["template"]["spec"]
    jobs.append(spec)
    # The API server is strict about these, whatever the schema says.
    pod = spec["template"]["spec"]
    if "podFailurePolicy" in spec:
      assert pod["restartPolicy"] == "Never"
    mounts = {mount["name"] for c in pod["containers"]
              for mount in c.get("volumeMounts", ())}
    assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
    try:
      import kubernetes_validate
    except ImportError:
      continue
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"},
         "spec": spec}, "1.31", strict=True)
  return jobs
