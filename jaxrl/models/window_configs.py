"""How `config.json` says which layers see no more than a window.

Of each kind of family there is a reader, `(config, layers) -> (layer_types, sliding_window)` of
`DecoderConfig`, which raises ValueError where a config contradicts itself or names other kinds of layers,
and a writer to entries of a config.
"""

LAYERS = {"full_attention": "full", "sliding_attention": "sliding"}
FULL, SLIDING = ("full",), ("sliding",)


def one_window(default):
  """Of models whose layers are all windowed, if there is a window."""
  def read(hf, layers):
    window = hf.get("sliding_window", default)
    kinds = set(hf.get("layer_types") or ())
    expected = "sliding_attention" if window else "full_attention"
    if kinds - {expected}:
      raise ValueError(f"layer_types={sorted(kinds)} with sliding_window={window}: all layers of this "
                       f"architecture are {expected}")
    return (SLIDING, int(window)) if window else (FULL, 0)
  return read


def late_windows(hf, layers):
  """Of Qwen: layers from `max_window_layers` on are windowed, if `use_sliding_window`."""
  window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
  first = hf.get("max_window_layers", 28)
  default = [i >= first and window is not None for i in range(layers)]
  return _listed(hf, layers, window, default)


def used_window(hf, layers):
  """Of Qwen 3 MoE: all layers are windowed, if `use_sliding_window`."""
  window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
  return (SLIDING, int(window)) if window else (FULL, 0)


def periodic_windows(key, period):
  """Of Gemma: every layer but each `period`-th is windowed."""
  def read(hf, layers):
    every = hf.get(key, hf.get("_" + key, period)) if key else period
    return _listed(hf, layers, hf.get("sliding_window", 4096),
                   [bool((i + 1) % every) for i in range(layers)])
  return read


def _listed(hf, layers, window, default):
  """What `layer_types` says, else the default of the family: per layer whether it is windowed."""
  kinds = hf.get("layer_types")
  if kinds is None:
    sliding = default
  else:
    unknown = sorted(set(kinds) - LAYERS.keys())
    if unknown or len(kinds) != layers:
      raise ValueError(f"layer_types={kinds} must name {' or '.join(LAYERS)} for each of {layers} layers")
    sliding = [LAYERS[kind] == "sliding" for kind in kinds]
  if not any(sliding):
    return FULL, 0
  if not window:
    raise ValueError(f"layer_types={kinds} has sliding layers, but there is no window: sliding_window="
                     f"{hf.get('sliding_window')}, use_sliding_window={hf.get('use_sliding_window')}")
  return SLIDING if all(sliding) else tuple("sliding" if s else "full" for s in sliding), int(window)


def write_one_window(decoder):
  """The inverse of `one_window`."""
  return dict(sliding_window=decoder.sliding_window if all(decoder.is_sliding) else None)


def write_used_window(decoder):
  """The inverse of `used_window`."""
  return dict(write_one_window(decoder), use_sliding_window=all(decoder.is_sliding))


def write_late_windows(decoder):
  """The inverse of `late_windows`."""
  used = any(decoder.is_sliding)
  return dict(use_sliding_window=used, sliding_window=decoder.sliding_window if used else None,
              max_window_layers=decoder.is_sliding.index(True) if used else decoder.layers,
              layer_types=_names_of_layers(decoder))


def write_listed(decoder):
  """Which layers are windowed, one by one, whatever the period of a family is."""
  return dict(sliding_window=decoder.sliding_window or 4096, layer_types=_names_of_layers(decoder))


def _names_of_layers(decoder):
  return [f"{'sliding' if sliding else 'full'}_attention" for sliding in decoder.is_sliding]
