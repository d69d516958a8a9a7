"""What launchers would run, and that it is what processes need to find each other and to stop in peace."""

import pathlib
import shlex
import subprocess

import pytest
import yaml

from jaxrl import sharding

LAUNCH = pathlib.Path(__file__).parents[2] / "scripts" / "launch"
TPU = ("tpu_pod.sh", "--name=pod", "--zone=us-east5-a", "--type=v5p-64", "--share=10.0.0.2:/runs")
KUBERNETES = ("kubernetes.sh", "--name=set", "--image=registry/jaxrl", "--pods=3", "--gpus=8", "--claim=disk")
ODD = "--config.reward.criteria=[dict(name='it''s')]"  # quotes have to survive every shell on the way


def dry_run(script, *arguments):
  return subprocess.run([LAUNCH / script, "--dry-run", *arguments], capture_output=True, text=True, timeout=60)


def lines(script, *arguments):
  result = dry_run(script, *arguments)
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_launchers_are_whole_scripts(script):
  assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=60).returncode == 0
  assert script.stat().st_mode & 0o111


def test_a_pod_is_made_prepared_and_runs_one_command_on_all_hosts():
  commands = lines(*TPU, "--spot", "--", "--config=c.py", "--workdir=/mnt/runs/a", ODD)
  verbs = [" ".join(c[3:5]) for c in commands]
  assert verbs == ["queued-resources create", "queued-resources describe", "tpu-vm scp", *["tpu-vm ssh"] * 3]
  created = set(commands[0])
  assert {"--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5", "--node-id=pod", "--spot"} <= created
  assert all("--worker=all" in c for c in commands[2:]) and all("--zone=us-east5-a" in c for c in commands)
  assert "mount -t nfs 10.0.0.2:/runs /mnt/runs" in commands[4][-1]
  remote = shlex.split(commands[5][-1].removeprefix("--command=").split("exec ", 1)[1])  # as the host's shell
  assert remote[1:] == ["run", "--quiet", "--config=c.py", "--workdir=/mnt/runs/a", ODD]


def test_a_job_of_slurm_has_a_process_for_each_gpu_and_time_to_save():
  submit, step = lines("slurm.sh", "--nodes=2", "--", "--config=c.py", "--workdir=/shared/a", ODD)
  assert submit[0] == "sbatch" and "--nodes=2" in submit and submit[-1] == ODD
  assert step[0] == "srun" and step[-3:] == ["--config=c.py", "--workdir=/shared/a", ODD]
  header = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in
                (LAUNCH / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH"))
  assert header["ntasks-per-node"] == header["gpus-per-node"] == "8"
  assert "--gpu-bind=none" in step  # JAX picks the GPU of the process's number on its node
  assert header["signal"] == "TERM@600" and "requeue" in header  # to the processes, not to the batch shell
  # What a step's processes see is taken by jaxrl for a cluster that JAX finds by itself.
  assert sharding.expects_processes({"SLURM_STEP_NUM_TASKS": "16"})


@pytest.mark.parametrize("status, queued", [(0, False), (1, False), (143, True)])
def test_a_job_is_queued_again_only_if_it_stopped_with_a_checkpoint(tmp_path, status, queued):
  for name, body in (("srun", f"exit {status}"), ("scontrol", f"echo $* > {tmp_path}/asked")):
    (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / name).chmod(0o755)
  result = subprocess.run([LAUNCH / "slurm.sh", "--workdir=w"], timeout=60, env={
      "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "JAXRL_SUBMITTED": "1"})
  assert result.returncode == status
  assert (tmp_path / "asked").exists() == queued
  assert not queued or (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_jobset_names_coordinator_and_processes_and_gives_them_time_to_save():
  result = dry_run(*KUBERNETES, "--grace=1200", "--", "--config=c.py", "--workdir=/runs/a", ODD)
  manifest = yaml.safe_load(result.stdout)
  assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "set")
  workers, = manifest["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
  pod = job["template"]["spec"]
  container, = pod["containers"]
  environment = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
  assert environment.keys() == set(sharding.PROCESS_VARIABLES)
  host, port = environment["JAX_COORDINATOR_ADDRESS"].split(":")
  assert host == "set-workers-0-0.set" and workers["name"] == "workers"  # JOBSET-JOB-REPLICA-POD.JOBSET
  assert manifest["spec"]["network"]["enableDNSHostnames"]
  assert int(port) in [p["containerPort"] for p in container["ports"]]
  index = environment.pop("JAX_PROCESS_ID")["fieldRef"]["fieldPath"]
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert sharding.expects_processes({**environment, "JAX_PROCESS_ID": "2"})
  assert container["command"] + container["args"] == [
      "jaxrl", "run", "--quiet", "--config=c.py", "--workdir=/runs/a", ODD]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert pod["terminationGracePeriodSeconds"] == 1200
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  shared, = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
  assert mounts[shared] == "/runs"


@pytest.mark.parametrize("arguments, message", [
    ((*TPU[:-1], "--", "--workdir=/mnt/runs/a"), "--share=... is missing"),
    ((*TPU, "--", "--workdir=/tmp/a"), "must be below /mnt/runs"),
    ((*TPU, "--tpye=v4-8", "--", "--workdir=/mnt/runs/a"), "unknown option --tpye=v4-8"),
    (("slurm.sh", "--", "--config=c.py"), "with --workdir=DIR"),
    ((*KUBERNETES[:-1], "--", "--workdir=/runs/a"), "--claim=... is missing"),
    ((*KUBERNETES, "--", "--workdir=runs/a"), "must be below /runs")])
def test_what_is_missing_is_named_before_anything_is_asked_for(arguments, message):
  result = dry_run(*arguments)
  assert result.returncode == 2 and message in result.stderr and not result.stdout
