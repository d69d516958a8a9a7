"""The peers' environments: made on demand, one virtual environment for each, versions pinned."""

from collections.abc import Sequence
import pathlib
import subprocess
import sys

REQUIREMENTS = {
    "tunix": ("google-tunix==0.1.7",),
    "trl": ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "datasets==5.2.0",
            "accelerate==1.15.0"),
}


def interpreter(name: str, directory: pathlib.Path) -> str:
  """The Python that has a peer, installed under `directory` unless it is there already.

  Raises:
    RuntimeError: pip cannot install it.
  """
  home = directory / name
  python = home / "bin" / "python"
  if _holds(python, REQUIREMENTS[name]):
    return str(python)
  print(f"installing {' '.join(REQUIREMENTS[name])} into {home} ...", flush=True)
  _run([sys.executable, "-m", "venv", "--clear", str(home)], name)
  _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        *REQUIREMENTS[name]], name)
  return str(python)


def _holds(python: pathlib.Path, requirements: Sequence[str]) -> bool:
  """Whether an environment has these packages in these versions."""
  if not python.exists():
    return False
  pairs = [requirement.split("==") for requirement in requirements]
  # A local part, as in 2.13.0+cpu, says how a package was built.
  code = ("import sys; from importlib.metadata import version; "
          f"sys.exit(not all(version(n).split('+')[0] == v for n, v in {pairs!r}))")
  return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def _run(command, name):
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}\nInstall it by hand, "
                       f"or leave {name} out with --systems")
