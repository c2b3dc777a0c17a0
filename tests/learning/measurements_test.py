"""The figures of updates, by hand."""

import numpy as np
import pytest

from kr_jax.learning import measurements


def test_summarize_by_hand():
  """Two updates of 4 and of 6 tokens; the ratios are 1 but for one of e^0.1 in the second."""
  ratios = np.zeros((2, 241), int)
  ratios[0, 120], ratios[1, 120] = 4, 5
  ratios[1, np.searchsorted(measurements.LOG_RATIO_EDGES, 0.1)] = 1
  first = {'loss': 0.5, 'grad_norm': 2.0, 'tokens_updated': 4, 'clipped_low': 1, 'clipped_high': 0,
           'policy_entropy': 4.0, 'logp_error': 0.4, 'kl': 0.8, 'tis_weight': 4.0, 'ratios': ratios[0],
           'divergence': 1.0, 'argmax_known': 3, 'argmax_same': 2, 'skipped': False}
  second = {'loss': 1.5, 'grad_norm': 4.0, 'tokens_updated': 6, 'clipped_low': 2, 'clipped_high': 5,
            'policy_entropy': 3.0, 'logp_error': 6.0, 'kl': 0.2, 'tis_weight': 5.0, 'ratios': ratios[1],
            'divergence': 6.0, 'argmax_known': 6, 'argmax_same': 0, 'skipped': False}
  record = measurements.summarize([first | {'padding_waste': 0.25, 'attention_waste': 0.5}, second])
  quantiles = {name: record.pop(name) for name in ('ratio_p01', 'ratio_p50', 'ratio_p99')}
  assert record == pytest.approx({
      'loss': 1.0, 'grad_norm': 3.0, 'tokens_updated': 10, 'padding_waste': 0.25, 'attention_waste': 0.5,
      'logp_error': 0.1, 'clip_fraction_first': 0.25, 'clip_fraction_low': 0.3, 'clip_fraction_high': 0.5,
      'policy_entropy': 0.7, 'kl': 0.1, 'tis_weight': 0.9, 'policy_fidelity': 1 - 0.25 ** 0.5,
      'argmax_agreement': 2 / 3, 'skipped': 0})
  assert {type(x) for x in record.values()} == {float, int}
  assert quantiles['ratio_p01'] == quantiles['ratio_p50'] == 1
  assert np.log(quantiles['ratio_p99']) == pytest.approx(0.1, rel=0.1)


def test_updates_that_were_skipped_are_in_no_figure():
  """Of three updates the first was skipped: what is measured of the first alone is not known."""
  ratios = np.zeros(241, int)
  ratios[120] = 4
  done = {'loss': 0.5, 'grad_norm': 2.0, 'tokens_updated': 4, 'clipped_low': 1, 'clipped_high': 0,
          'policy_entropy': 4.0, 'logp_error': 0.4, 'ratios': ratios, 'divergence': 1.0, 'argmax_known': 3,
          'argmax_same': 2, 'skipped': False, 'largest': np.ones(3, bool), 'grad_norms': np.ones(2)}
  skipped = done | {'loss': np.nan, 'logp_error': np.nan, 'divergence': np.inf, 'skipped': True}
  waste = {'padding_waste': 0.25, 'attention_waste': 0.5}
  record = measurements.summarize([skipped | waste, done, done | {'loss': 1.5}])
  assert (record['loss'], record['grad_norm'], record['tokens_updated'], record['skipped']) == (1.0, 2.0, 8, 1)
  assert record['logp_error'] is None and record['clip_fraction_low'] == 0.25 and record['ratio_p50'] == 1
  none = measurements.summarize([skipped | waste, skipped])
  assert set(none) == set(record)
  assert {name for name, x in none.items() if x is not None} == {*waste, 'tokens_updated', 'skipped'}
  assert (none['tokens_updated'], none['skipped']) == (0, 2)


def test_summarize_the_load_of_experts_by_hand():
  """Two layers of four experts, of which the second has one that no update sent a token to."""
  measured = {'loss': 0.0, 'grad_norm': 0.0, 'tokens_updated': 2, 'clipped_low': 0, 'clipped_high': 0,
              'policy_entropy': 0.0, 'logp_error': 0.0, 'ratios': np.zeros(241, int), 'divergence': 0.0,
              'argmax_known': 0, 'argmax_same': 0, 'skipped': False}
  load = lambda *rows: {'load': np.array(rows, np.int32)}
  waste = {'padding_waste': 0.0, 'attention_waste': 0.0}
  record = measurements.summarize([measured | waste | load([1, 1, 1, 1], [4, 0, 0, 0]),
                                   measured | load([1, 1, 1, 1], [2, 1, 0, 1])])
  assert (record['expert_load'], record['experts_unused']) == ((1 + 3) / 2, 1 / 8)
  assert (record['policy_fidelity'], record['argmax_agreement']) == (1, None)


@pytest.mark.parametrize('sigma', [0.001, 0.1, 2.0])
def test_quantiles_of_ratios_are_within_a_tenth_of_their_log(sigma):
  log_ratio = np.random.default_rng(0).normal(0.3 * sigma, sigma, 5000).astype(np.float32)
  count = np.bincount(np.searchsorted(measurements.LOG_RATIO_EDGES, log_ratio),
                      minlength=len(measurements.LOG_RATIO_EDGES) + 1)
  for name, ratio in measurements.ratio_quantiles(count).items():
    exact = np.quantile(log_ratio, int(name[-2:]) / 100, method='inverted_cdf')
    assert np.log(ratio) == pytest.approx(exact, rel=0.1, abs=1e-4), name
