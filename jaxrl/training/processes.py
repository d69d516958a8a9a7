"""What keeps several processes one run: they meet before they act, and act on the same things.

Every process runs the same program on the same data and computes the same batches, each on its own
devices. Two things would break that: what differs by nature (a judge that times out in one process
only) comes from process 0, see `share`; what must not differ is compared before devices are asked
to work together on it, see `meet`, for devices that wait for different things wait for ever. With
one process all of this does nothing.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import pickle
import traceback
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxrl.batch import TokenBatch
from jaxrl.rewards import scorer as scorers
from jaxrl.sampling import Request
from jaxrl.sampling import Sample
from jaxrl.sampling import Sampler

PIECE = 1 << 16  # bytes that are sent at once: of one size, for each size is a program to compile
# What devices computed may differ in the last bit; what it led to may not.
INEXACT = ("behaviour_logprobs",)


class Diverged(RuntimeError):
  """Processes of one run are about to do different things; the message says which, and where."""


def meet(where: str, content: bytes = b"", flag: int = 0) -> int:
  """Waits for all processes, and compares what they are about to do.

  Args:
    where: what comes next, for people.
    content: what must be the same in all processes; only its hash travels.
    flag: 0 to 2**32 - 1.

  Returns:
    The largest `flag` of any process.

  Raises:
    Diverged: in all processes, if `where` or `content` is not the same in all.
  """
  if jax.process_count() == 1:
    return flag
  digest = np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), np.uint32)
  mine = np.array([zlib.crc32(where.encode()), *digest, flag], np.uint32)
  found = multihost_utils.process_allgather(mine)  # [processes, 4], the same program every time
  other = [int(i) for i in np.flatnonzero((found[:, :3] != found[0, :3]).any(axis=1))]
  if other:
    elsewhere = (found[:, 0] != found[0, 0]).any()
    how = "not at the same point as" if elsewhere else "at the same point as, but not equal to,"
    raise Diverged(
        f"process {', '.join(map(str, other))} is {how} process 0 (process {jax.process_index()} "
        f"is at: {where}). All processes must run the same code with the same config on the same "
        "files, and episodes must not depend on the time, on unseeded randomness or on the host. "
        "Nothing wrong was trained on: once that is mended, the same command on all processes "
        "continues from the last checkpoint")
  return int(found[:, 3].max())


def share(value: Any) -> Any:
  """The value that process 0 passed, in all processes; those of the others are ignored."""
  if jax.process_count() == 1:
    return value
  first = jax.process_index() == 0
  body = pickle.dumps(value) if first else b""
  body = len(body).to_bytes(8, "little") + body
  received, total = b"", 8
  while len(received) < total:
    piece = np.zeros(PIECE, np.uint8)
    mine = np.frombuffer(body, np.uint8)[len(received):len(received) + PIECE]
    piece[:len(mine)] = mine
    received += np.asarray(multihost_utils.broadcast_one_to_all(piece), np.uint8).tobytes()
    total = 8 + int.from_bytes(received[:8], "little")
  return pickle.loads(received[8:total])


def content_of(batch: TokenBatch) -> bytes:
  """What of a packed host batch must be the same in all processes."""
  if jax.process_count() == 1:
    return b""
  exact = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)
           if field.name not in INEXACT}
  parts = hashlib.blake2b()
  for path, leaf in jax.tree_util.tree_leaves_with_path(exact):
    array = np.ascontiguousarray(leaf)
    parts.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    parts.update(array.tobytes())
  return parts.digest()


class SharedScorer(scorers.Scorer):
  """A scorer of which process 0 judges for all: no two processes can see different rewards. Only what
  batched criteria say of a sample is computed together."""

  def score(self, pairs: Sequence[tuple], *, among: int = 0) -> list[scorers.Scored]:
    """As `Scorer.score`; what it raises in process 0 is raised in all."""
    if jax.process_count() == 1:
      return super().score(pairs, among=among)
    pairs = list(pairs)
    meet(f"{len(pairs)} samples to score",
         repr([(task.id, completion.text) for task, completion in pairs]).encode())
    batched = self._judge_batches(pairs)  # on devices of all processes, so by all of them
    scored, refusal, failure = None, None, None
    if jax.process_index() == 0:
      try:
        scored = super()._score(pairs, among, batched)
      except scorers.RewardFailure as error:
        refusal = error
      except Exception as error:
        failure = error
    problem = refusal or failure
    told = share((scored, refusal and str(refusal),
                  failure and "".join(traceback.format_exception(failure))))
    if problem is not None:
      raise problem
    scored, refusal, failure = told
    if refusal is not None:
      raise scorers.RewardFailure(refusal)
    if failure is not None:
      raise RuntimeError(f"process 0, which scores for all, failed:\n{failure}")
    return scored


class AgreeingSampler(Sampler):
  """A sampler that all processes must ask for the same; it compares before devices are involved."""

  def sample(self, params: Any, requests: Sequence[Request], base_key: jax.Array,
             **how) -> list[list[Sample]]:
    """As `Sampler.sample`.

    Raises:
      Diverged: processes ask for different samples.
    """
    if jax.process_count() > 1:
      asked = [(list(map(int, r.prompt)), r.n, tuple(r.key), r.params) for r in requests]
      meet(f"{len(requests)} requests to sample", repr(asked).encode())
    return super().sample(params, requests, base_key, **how)
