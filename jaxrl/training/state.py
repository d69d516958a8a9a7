"""What training changes: parameters, optimiser state, counters."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from flax import traverse_util
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import optax

from jaxrl import programs
from jaxrl import sharding
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import init_parameters
from jaxrl.training import draws

KEY_DATA = jax.ShapeDtypeStruct((2,), jnp.uint32)  # of a threefry key


@flax.struct.dataclass
class TrainState:
  """State of one phase.

  Attributes:
    step: updates of this phase, skipped ones included.
    params: of the policy.
    opt_state: of the phase's optimiser.
    frozen: parameters of other models by name, the reference among them: those of the policy at the
      start of the phase, or what followed it since (see `training.frozen`). As the optimiser's, they are
      of what the phase trains; what it does not, as the base below adapters, is there once.
    others: parameters of frozen models by name that other runs have trained (see `training.teachers`).
    carried: what pieces of credit remember from batch to batch, by name of piece.
    bad_steps: updates in a row that were skipped because a gradient was not finite.
    skipped_steps: all updates of this phase that were skipped.
    rng: raw data of the run's PRNG key, so that a checkpoint is complete; everything random folds
      counters into the same key.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any
  frozen: dict[str, Any]
  bad_steps: Int[Array, ""]
  skipped_steps: Int[Array, ""]
  rng: Array
  carried: Any = flax.struct.field(default_factory=dict)
  others: dict[str, Any] = flax.struct.field(default_factory=dict)

  @property
  def reference(self) -> Any:
    """Parameters of the reference, None if nothing reads what it says, or it is another run's."""
    return self.model("reference") if "reference" in self.frozen else None

  def model(self, name: str) -> Any:
    """All parameters of a frozen model."""
    return self.others[name] if name in self.others else adapters.joined(self.params, self.frozen[name])


def start_phase(params: Any, rng: Array, optimizer: optax.GradientTransformation, *,
                frozen: Sequence[str] = (), carried: Any = None, part: Any = None) -> TrainState:
  """A fresh optimiser, counters, frozen models of these names and memory around given parameters.

  Args:
    part: of the parameters, what the phase trains; None is all.
  """
  def zero():
    return jnp.zeros((), jnp.int32)
  part = params if part is None else part
  return TrainState(step=zero(), params=params, opt_state=optimizer.init(part),
                    frozen={name: jax.tree.map(jnp.copy, part) for name in frozen},
                    bad_steps=zero(), skipped_steps=zero(), rng=rng,
                    carried=jax.tree.map(jnp.asarray, carried or {}))


def initial_parameters(config: DecoderConfig, rng: Array, mesh: jax.sharding.Mesh) -> Any:
  """Random parameters, made in place on the mesh."""
  return initializer(config, mesh)(rng)


@functools.lru_cache(maxsize=1)
def initializer(config: DecoderConfig, mesh: jax.sharding.Mesh) -> Any:
  """The jitted function from raw data of a PRNG key to random parameters."""
  def init(rng):
    initialize = _initialize(config)
    if mesh.size == 1:
      initialize = draws.at_once(initialize.trace(KEY_DATA))
    return nn.unbox(initialize(rng))
  # It runs once, and draws one by one take a CPU twice as long to compile in full.
  cpu = mesh.devices.flat[0].platform == "cpu"
  options = {"xla_backend_optimization_level": 1} if cpu else None
  return programs.jit(init, out_shardings=parameter_shardings(config, mesh), compiler_options=options)


@functools.lru_cache(maxsize=8)
def parameter_shardings(config: DecoderConfig, mesh: jax.sharding.Mesh) -> Any:
  """The sharding of every parameter."""
  return sharding.shardings_of(_boxed(config), mesh)


def abstract_parameters(config: DecoderConfig, mesh: jax.sharding.Mesh) -> Any:
  """Shape, type and sharding of every parameter."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      nn.unbox(_boxed(config)),
                      parameter_shardings(config, mesh))


def complete(params: Any, config: DecoderConfig, rng: Array, mesh: jax.sharding.Mesh) -> Any:
  """Parameters with those that they lack as `initial_parameters` makes them; no others are made."""
  shardings = traverse_util.flatten_dict(parameter_shardings(config, mesh))
  given = traverse_util.flatten_dict(params)
  lacking = {path: sharding for path, sharding in shardings.items() if path not in given}

  def init(rng):
    flat = traverse_util.flatten_dict(nn.unbox(_initialize(config)(rng)))
    return {path: flat[path] for path in lacking}
  made = jax.jit(init, out_shardings=lacking)(rng) if lacking else {}
  return traverse_util.unflatten_dict({path: given.get(path, made.get(path)) for path in shardings})


@functools.lru_cache(maxsize=8)
def _initialize(config):
  """Raw data of a PRNG key -> boxed parameters; jitted, so that it is traced once."""
  return jax.jit(functools.partial(_boxed_parameters, config))


def _boxed_parameters(config, rng):
  return init_parameters(config, jax.random.wrap_key_data(rng))


@functools.lru_cache(maxsize=8)
def _boxed(config):
  """Shapes and types of boxed parameters."""
  return programs.eval_shape(_initialize(config), KEY_DATA)


def abstract_state(config: DecoderConfig, mesh: jax.sharding.Mesh,
                   optimizer: optax.GradientTransformation, *, frozen: Sequence[str] = (),
                   carried: Any = None, trains: Sequence[str] = (),
                   others: Mapping[str, DecoderConfig] | None = None,
                   offload: bool = False) -> TrainState:
  """Shapes, types and shardings of a state, without computing it: what a restore fills in.

  Args:
    trains: names of the adapters that are trained; () is all.
    others: architectures of the models of other runs, by name.
    offload: the optimiser's arrays lie in host memory.
  """
  state = _abstract_state(config, mesh, optimizer, tuple(frozen), tuple(trains))
  if offload:
    state = state.replace(opt_state=sharding.on_host(state.opt_state))
  replicated = jax.NamedSharding(mesh, jax.P())
  carried = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=replicated), carried or {})
  return state.replace(carried=carried, others={
      name: abstract_parameters(decoder, mesh) for name, decoder in (others or {}).items()})


@functools.lru_cache(maxsize=8)
def _abstract_state(config, mesh, optimizer, frozen, trains):
  def make(params, rng):
    return start_phase(params, rng, optimizer, frozen=frozen,
                       part=adapters.trained(params, config.adapters, trains))
  boxed = jax.eval_shape(make, _boxed(config), KEY_DATA)
  shardings = sharding.shardings_of(boxed, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      nn.unbox(boxed), shardings)
