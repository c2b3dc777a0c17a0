"""Does allocation pay for a real pretrained model, on a mixture of reasoning_gym tasks? A family of the proof.

    launch/proof.sh --family pretrained                # all of it
    launch/local.sh configs/proof_pretrained.py:small      # one run

Hardware: 2 CPU cores, 4 GB of memory.
Time: a run takes about 6 minutes on one core: 8 s a step of the small batch and 30 s an evaluation, beside other work.
Expect: not known before the test; tests/benchmarks/README.md has what tuning showed.

Fixed before the test: SmolLM2-135M, with adapters and after two examples in the prompt, answers eight kinds of short
questions. 145 tasks, of which a step takes equally many of each kind, passed over in 14 to 20 steps of the small batch
and in 3 to 5 of the large one. Before learning, held-out success is .21 at temperature .5: .75 of leap years, which are
all but solved or all but missed (yes or no), .3 of sums and products of one digit, .1 of bits, and .03 to .06 of
letters, least common multiples, three terms and two digits. Arms, seeds, metric and goals:
tests/benchmarks/proof/plan.py.
"""

import ml_collections

from configs import common

# To be fixed, with the rates, by the uniform runs of the tuning seeds before any other arm is run: one at 5e-4 had .365
# after 80 % of its rollouts, and lost most of the solved tasks, so that the rates below are lower.
TARGET = 0.36
BATCHES = {
    'small': {'tasks.per_step': 8, 'alloc.rollouts_per_step': 32, 'num_steps': 40, 'evaluate.every': 10,
              'optimizer.learning_rate': 2e-4},
    'large': {'tasks.per_step': 32, 'alloc.rollouts_per_step': 128, 'num_steps': 10, 'evaluate.every': 2,
              'optimizer.learning_rate': 4e-4}}
KINDS = (
    'chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1)',
    'chain_sum(min_terms=3, max_terms=3, min_digits=1, max_digits=1)',
    'chain_sum(min_terms=2, max_terms=2, min_digits=2, max_digits=2)',
    'products(min_terms=2, max_terms=2, min_digits=1, max_digits=1)',
    'lcm(min_value=2, max_value=12)',
    "calendar_arithmetic(tasks=['is_leap_year'])",
    'letter_counting(min_words=1, max_words=2)',
    'count_bits(min_n=1, max_n=63)')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.base()
  c.policy.checkpoint = 'smollm2-135m-instruct'
  c.policy.lora_rank = 8
  c.tasks.mixture = tuple((f'reasoning_gym/{kind}', 1.0) for kind in KINDS)
  c.tasks.reasoning_gym.train = 20  # of each kind, before those that repeat others are left out
  c.tasks.reasoning_gym.test = 8
  # Bare text: two examples show how short an answer is.
  c.tasks.chat = False
  c.tasks.template = ('Question: What is 3 + 5?\nAnswer: 8\n\nQuestion: What is 9 - 2?\nAnswer: 7\n\n'
                      'Question: {problem}\nAnswer:')
  c.alloc.high = 32
  c.sample.slots = 32
  c.sample.prefill = 8
  c.sample.prompt_length = 64
  c.sample.completion_length = 6
  c.sample.stop_strings = ('\n',)
  # At 1 the model often writes a digit at random.
  c.sample.temperature = 0.5
  c.pack.row_length = 72
  c.pack.microbatch_rows = 4
  c.optimizer.warmup_steps = 2
  c.evaluate.temperature = 0.5
  c.evaluate.rollouts = 4
  c.evaluate.pass_at = (2,)
  c.evaluate.tasks_per_batch = 32
  return common.finish(c, common.with_batch(c, variant, BATCHES))
