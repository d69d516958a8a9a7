"""What the implicit reward of a trained policy, log policy / reference, says of held-out pairs."""

import pathlib

import jax
from jaxtyping import Float
import numpy as np
from scipy import stats

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.sampling import Likelihood
from jaxrl.training import inputs
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters


def of_gaps(workdir: pathlib.Path) -> dict[str, float]:
  """How margins of a finished run's policy compare with how much better the chosen answer really is.

  Test pairs are rows of the run's data, without its transforms, with the number `gap`; those whose gap is 0
  are left out. The reference is the run that this one started from.

  Returns:
    `gap_correlation` (Spearman's, of margins and gaps), `accuracy` (of the margin's sign), `weakest_accuracy`
    and `strongest_accuracy` (over the quarters of smallest and of largest gaps), `margin` (mean, in nats).
  """
  gaps, margins = margins_of(workdir)
  right = (margins > 0) + 0.5 * (margins == 0)
  right = np.where(gaps > 0, right, 1 - right)
  low, high = np.quantile(abs(gaps), [0.25, 0.75])
  return {"gap_correlation": float(stats.spearmanr(gaps, margins).statistic), "accuracy": float(right.mean()),
          "weakest_accuracy": float(right[abs(gaps) <= low].mean()),
          "strongest_accuracy": float(right[abs(gaps) >= high].mean()), "margin": float(margins.mean())}


def margins_of(workdir: pathlib.Path) -> tuple[Float[np.ndarray, "pairs"], Float[np.ndarray, "pairs"]]:
  """Gaps of test pairs, and log policy / reference of the chosen answer less that of the rejected one."""
  config = configs.of_run(workdir)
  config.data.update(transforms=[], weaker="")
  tokenizer = data.load_tokenizer(workdir / "tokenizer")
  builder = inputs.pair_builder(config, inputs.builder(config, tokenizer))
  pairs = inputs.read_tasks(builder, inputs.open_split(config, "test"), config.evaluate.pairs)
  pairs = [pair for pair in pairs if pair.task.row["gap"]]
  both = [data.compared(pair, tokenizer, group=0) for pair in pairs]
  answers = [t for pair in both for t in pair]
  decoder = inputs.decoder_config(config.model, tokenizer)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  empty = states.initial_parameters(decoder, jax.random.key_data(jax.random.key(0)), mesh)
  reader, total = Likelihood(decoder), []
  for run in (workdir, pathlib.Path(config.start)):
    params = (read_parameters(run / "checkpoints", empty) if run == workdir
              else sources.continued(str(run), decoder, empty, mesh))
    found = reader.logprobs(params["params"], [t.tokens for t in answers])
    total.append(np.array([x[t.loss_mask].sum() for x, t in zip(found, answers)]))
  ratio = (total[0] - total[1]).reshape(-1, 2)
  return np.array([pair.task.row["gap"] for pair in pairs]), ratio[:, 0] - ratio[:, 1]
