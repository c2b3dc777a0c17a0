"""Times one GRPO update of Tunix, a peer: forward, backward and optimiser on a batch of rollouts.

    PEERPYTHON tests/benchmarks/peers/tunix_update.py [--json-in SIZES] [--repeats N]
        [--microbatch N [N ...]] [--serve]

PEERPYTHON is the interpreter of an environment that holds google-tunix 0.1.7 and not this library:

    python -m venv DIR && DIR/bin/pip install google-tunix==0.1.7

The update is Tunix's own, as its users get it: a GRPOLearner registers the loss 'grpo' with the
trainer of an RLCluster, and the script calls what the learner's loop calls, RLCluster.update_actor,
with one TrainExample a microbatch. Rollouts are random, so neither sampling nor rewards are in the
time. KL is off (beta 0) and there is one iteration a batch, Tunix's default, for which its learner
computes no old log-probabilities: the loss takes the policy's own. So there is one forward pass.
The model is Tunix's Llama 3 class, without norms of queries and keys and without biases, so the least
work of its classes, in float32 and without rematerialisation, both its defaults. Its logits are of
all positions, prompts too. The learner has no way to leave out rollouts whose advantage is 0.

A microbatch counts rollouts; of several a trial picks the fastest, which takes minutes on 2 cores.
SIZES is a JSON object, or a file of one, that replaces values of the table below. The last line
printed is a JSON object:

  seconds, half_seconds     medians over N updates; in `half` half of the advantages are exactly 0
  tokens_per_s              prompt and completion tokens of the batch by seconds
  microbatch, trial         the microbatch used, and seconds of each that was tried
  tunix_version, jax_version

With --serve the script prints `ready` once compiled and tried; then for every line of stdin, `full`
or `half`, it makes one update and prints its seconds; at the end of stdin it prints the object, of
the updates it was asked for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster as rl_cluster_lib
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

SIZES = dict(
    num_layers=4, width=256, hidden_width=768, num_heads=4, num_kv_heads=4, head_width=64,
    vocab_size=1024, tie_embeddings=True, tasks=16, group=8, prompt_length=64,
    completion_length=64, learning_rate=1e-4, max_grad_norm=1.0, seed=0)
PAD, EOS = 0, 1  # random tokens are above them: Tunix reads its attention mask off the padding
TRIALS = 3  # updates of each microbatch by which one is picked


class Tokenizer:
  """What Tunix asks of a tokenizer, for a batch that is tokens already."""

  def encode(self, text, **kwargs):
    raise NotImplementedError('the batch is tokens already')

  decode = encode

  def bos_id(self):
    return EOS

  def eos_id(self):
    return EOS

  def pad_id(self):
    return PAD


def make_model(sizes: dict) -> nnx.Module:
  """A model with random parameters."""
  model = llama3.Llama3(
      llama3.ModelConfig(
          num_layers=sizes['num_layers'], vocab_size=sizes['vocab_size'],
          embed_dim=sizes['width'], hidden_dim=sizes['hidden_width'],
          num_heads=sizes['num_heads'], head_dim=sizes['head_width'],
          num_kv_heads=sizes['num_kv_heads'], rope_theta=10_000, norm_eps=1e-6,
          weight_tying=sizes['tie_embeddings'], remat_config=llama3.RematConfig.NONE),
      rngs=nnx.Rngs(sizes['seed']))
  # Tunix leaves these at 0, for a checkpoint to fill; at 0 they would get no gradient.
  rngs = nnx.Rngs(sizes['seed'] + 1)
  for layer in model.layers:
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
      shape = linear.kernel.shape
      linear.kernel.value = shape[0] ** -0.5 * jax.random.normal(rngs.params(), shape)
  return model


def make_batch(sizes: dict, *, half: bool) -> grpo_learner.TrainExample:
  """All rollouts, in the type that Tunix's learner makes of them."""
  rng = np.random.default_rng(sizes['seed'])
  rollouts = sizes['tasks'] * sizes['group']
  tokens = lambda rows, length: rng.integers(
      EOS + 1, sizes['vocab_size'], (rows, length), dtype=np.int32)
  prompt = np.repeat(tokens(sizes['tasks'], sizes['prompt_length']), sizes['group'], axis=0)
  completion = tokens(rollouts, sizes['completion_length'])
  sign = np.where(np.arange(rollouts) % 2, 1, -1)
  advantage = (sign * rng.uniform(0.5, 1.5, rollouts)).astype(np.float32)
  if half:
    # Whole groups, as where all rollouts of a task got the same reward; each microbatch of two
    # groups or more holds as many such groups as others.
    advantage[(np.arange(rollouts) // sizes['group']) % 2 == 1] = 0
  return grpo_learner.TrainExample(
      prompt_ids=jnp.array(prompt), prompt_mask=jnp.array(prompt != PAD),
      completion_ids=jnp.array(completion), completion_mask=jnp.array(completion != PAD),
      advantages=jnp.array(advantage), ref_per_token_logps=None, old_per_token_logps=None)


class Updater:
  """Tunix's cluster and learner with one size of microbatch."""

  def __init__(self, sizes: dict, microbatch: int):
    rollouts = sizes['tasks'] * sizes['group']
    if rollouts % microbatch or microbatch % sizes['group']:
      raise ValueError(f'microbatch={microbatch} is not of whole groups of {sizes["group"]}, or does '
                       f'not divide {rollouts} rollouts')
    # Tunix counts tasks here. For a whole batch both stay unset, its default: with them it would
    # accumulate gradients over one microbatch, at a price.
    split = {} if microbatch == rollouts else dict(
        mini_batch_size=sizes['tasks'], train_micro_batch_size=microbatch // sizes['group'])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
    role = rl_cluster_lib.Role
    self.cluster = rl_cluster_lib.RLCluster(
        actor=make_model(sizes), tokenizer=Tokenizer(),
        cluster_config=rl_cluster_lib.ClusterConfig(
            role_to_mesh={role.ACTOR: mesh, role.ROLLOUT: mesh, role.REFERENCE: mesh},
            training_config=rl_cluster_lib.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(sizes['max_grad_norm']),
                    optax.adamw(sizes['learning_rate'])),
                eval_every_n_steps=1_000_000, **split),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=sizes['completion_length'],
                max_prompt_length=sizes['prompt_length'],
                kv_cache_size=sizes['prompt_length'] + sizes['completion_length'],
                temperature=1.0)))
    # Held, as the loss the learner registers reads it.
    self.learner = grpo_learner.GRPOLearner(
        self.cluster, grpo_learner.GRPOConfig(num_generations=sizes['group'], beta=0.0),
        reward_fns=lambda prompts, completions, **_: [0.0] * len(prompts))
    self.batches = {
        kind: [rl_utils.get_batch_slice(batch, slice(i, i + microbatch))
               for i in range(0, rollouts, microbatch)]
        for kind in ('full', 'half') for batch in [make_batch(sizes, half=kind == 'half')]}
    jax.block_until_ready(self.batches)

  def update(self, kind: str) -> float:
    """Makes one update; returns its seconds."""
    trainer = self.cluster.actor_trainer
    steps = trainer.train_steps
    start = time.perf_counter()
    for example in self.batches[kind]:
      self.cluster.update_actor([example], None)  # as the learner does: one by one, and waits
    jax.block_until_ready((nnx.state(trainer.model), nnx.state(trainer.optimizer)))
    seconds = time.perf_counter() - start
    if trainer.train_steps != steps + 1:
      raise RuntimeError(f'{trainer.train_steps - steps} optimiser steps instead of 1')
    return seconds


def pick(sizes: dict, microbatches: list[int]) -> tuple[Updater, dict[int, float]]:
  """An updater, compiled, with the fastest microbatch; median seconds of all."""
  updaters = {n: Updater(sizes, n) for n in microbatches}
  for updater in updaters.values():
    # Twice, as Tunix's step compiles twice: on what it is first given, and on what it returned.
    for kind in ('full', 'half'):
      updater.update(kind)
  times = {n: [] for n in updaters}
  for _ in range(TRIALS if len(updaters) > 1 else 1):
    for n, updater in updaters.items():  # in turn, so that a machine's noise hits all alike
      times[n].append(updater.update('full'))
  median = {n: statistics.median(t) for n, t in times.items()}
  return updaters[min(median, key=median.get)], median


def report(sizes: dict, times: dict[str, list[float]], trial: dict[int, float]) -> dict:
  """The object that is printed; None stands for what was not measured."""
  median = {kind: statistics.median(t) if t else None for kind, t in times.items()}
  tokens = sizes['tasks'] * sizes['group'] * (sizes['prompt_length'] + sizes['completion_length'])
  return dict(
      tokens_per_s=tokens / median['full'] if median['full'] else None,
      seconds=median['full'], half_seconds=median['half'],
      microbatch=min(trial, key=trial.get), trial=trial,
      tunix_version=importlib.metadata.version('google-tunix'), jax_version=jax.__version__)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--json-in', default='{}', metavar='SIZES', help='JSON object or a file of one')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--microbatch', type=int, nargs='+', default=[16, 32, 64, 128])
  parser.add_argument('--serve', action='store_true')
  args = parser.parse_args()

  text = args.json_in
  if os.path.isfile(text):
    with open(text, encoding='utf-8') as file:
      text = file.read()
  replaced = json.loads(text)
  if unknown := set(replaced) - set(SIZES):
    parser.error(f'--json-in has {sorted(unknown)}, which are none of {sorted(SIZES)}')
  sizes = SIZES | replaced

  updater, trial = pick(sizes, args.microbatch)
  times = {'full': [], 'half': []}
  if args.serve:
    print('ready', flush=True)
    for line in sys.stdin:
      kind = line.strip()
      if kind not in times:
        raise ValueError(f'{kind!r} is neither full nor half')
      times[kind].append(updater.update(kind))
      print(json.dumps(times[kind][-1]), flush=True)
  else:
    for _ in range(args.repeats):
      for kind in times:
        times[kind].append(updater.update(kind))
  print(json.dumps(report(sizes, times, trial)), flush=True)


if __name__ == '__main__':
  main()
