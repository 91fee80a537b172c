"""Sweeps for schedulers: files for a Slurm job array and for a Kubernetes JobSet.

Each task runs `launch/sweep.py --only=NAME`. Therefore runs that are done are skipped,
and interrupted runs resume. Replace the words in capitals, for example YOUR-IMAGE.

The array was tried on Slurm 22.05 with one machine and four runs. The JobSet was not
tried on a cluster, but checked in the same way as launch/jobset.yaml.
"""

import json
import shlex
import string
from typing import Sequence

from minw import exit_codes

_SLURM = string.Template("""\
#!/usr/bin/env bash
# Submit with sbatch from minw's folder. Submit it again to resume the remaining runs.
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
if [ "$$code" = $preempted ]; then  # The run was stopped and has saved its state.
  scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
""")

_JOBSET = string.Template("""\
# Start it with `kubectl apply -f THIS_FILE`. To resume the remaining runs, change
# metadata.name and apply it again.
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
  """Returns the script of a Slurm job array with one task for each run.

  Args:
    names: Names of the runs.
    jobs: Number of tasks at a time.
    command: Command of a task, to which `--only=NAME` is added.
  """
  return _SLURM.substitute(
      last=len(names) - 1, jobs=jobs, command=shlex.join(command),
      preempted=exit_codes.PREEMPTED,
      names="\n".join(f"  {name}" for name in names))


def jobset(names: Sequence[str], *, jobs: int, command: Sequence[str]) -> str:
  """Returns a Kubernetes JobSet with an indexed job that has one pod for each run.

  Args:
    names: Names of the runs.
    jobs: Number of pods at a time.
    command: Command of a pod, to which `--only=NAME` is added.
  """
  script = (f"names=({' '.join(names)}); exec {shlex.join(command)} "
            '--only="${names[JOB_COMPLETION_INDEX]}"')
  return _JOBSET.substitute(
      count=len(names), jobs=jobs, script=json.dumps(script),
      preempted=exit_codes.PREEMPTED)
