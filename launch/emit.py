"""Sweeps for schedulers: texts of a Slurm array and of a Kubernetes JobSet.

Each task is `launch/sweep.py --only=NAME`, so that what is done is skipped and what was
interrupted goes on, here as there. What is in capitals is to be filled in.

The array was tried on Slurm 22.05, one machine, four runs; the JobSet was not tried on
a cluster, only checked as launch/jobset.yaml is.
"""

import json
import shlex
import string
from typing import Sequence

from minw import exit_codes

_SLURM = string.Template("""\
#!/usr/bin/env bash
# Submit with sbatch from minw's folder; again to go on with what is left.
#SBATCH --job-name=minw-sweep
#SBATCH --array=0-$last%$jobs
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# For GPUs: SBATCH --gpus-per-task=1

names=(
$names
)
srun $command --only="$${names[SLURM_ARRAY_TASK_ID]}"
code=$$?
if [ "$$code" = $preempted ]; then  # It was told to stop, and has saved.
  scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
""")

_JOBSET = string.Template("""\
# kubectl apply -f THIS_FILE; again, under another name, to go on with what is left.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: minw-sweep
  labels:
    kueue.x-k8s.io/queue-name: YOUR-QUEUE
spec:
  replicatedJobs:
  - name: runs
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: $count
        parallelism: $jobs
        backoffLimitPerIndex: 1
        maxFailedIndexes: $count
        podFailurePolicy:
          rules:
          - action: Ignore
            onExitCodes:
              operator: In
              values: [$preempted]
          - action: Ignore
            onPodConditions:
            - type: DisruptionTarget
              status: "True"
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            containers:
            - name: run
              image: YOUR-IMAGE
              workingDir: /minw
              command: ["bash", "-c"]
              args: [$script]
              resources:
                requests:
                  cpu: "1"
                  memory: 4Gi
              volumeMounts:
              - name: runs
                mountPath: /minw/runs
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: YOUR-CLAIM
""")


def slurm(names: Sequence[str], *, jobs: int, command: Sequence[str]) -> str:
  """A Slurm array of a task a run, `jobs` at a time, each `command --only=NAME`."""
  return _SLURM.substitute(
      last=len(names) - 1, jobs=jobs, command=shlex.join(command),
      preempted=exit_codes.PREEMPTED,
      names="\n".join(f"  {name}" for name in names))


def jobset(names: Sequence[str], *, jobs: int, command: Sequence[str]) -> str:
  """A JobSet of an indexed job with a pod a run, otherwise as `slurm`."""
  script = (f"names=({' '.join(names)}); exec {shlex.join(command)} "
            '--only="${names[JOB_COMPLETION_INDEX]}"')
  return _JOBSET.substitute(
      count=len(names), jobs=jobs, script=json.dumps(script),
      preempted=exit_codes.PREEMPTED)
