"""What chips do in a second, what power they draw and what they cost: dated assumptions, to be overridden.

    python -m kr_jax.main --mode=report --workdir=runs/arithmetic --hardware=configs/hardware.py:v5e
    python -m kr_jax.main --mode=report --workdir=runs/arithmetic --hardware.profiles.cpu.dollars_per_hour=0.03

After the colon stand, with commas between them, the name of a profile, which is then used for every device, and a
region, whose grid gives the carbon: 'v5e,us-west4'. A figure that is None is not known, and what depends on it is not
known either. The fields are those of kr_jax/costs/hardware.py; all but sources are of one chip.

Where the figures come from:
- TPUs: FLOP/s, memory and links are Google's (docs.cloud.google.com/tpu/docs); of the memory that programs may use,
  the TPU compiler's own limits (libtpu 0.0.42). Prices are list prices on demand of February 2025; none of TPU7x was
  found. The power of v4 is published (measured, docs.cloud.google.com/tpu/docs/v4); that of v5e, v5p and v6e is
  inferred by others from thermal limits; none of TPU7x was found. No TPU's power can be read.
- GPUs: NVIDIA's data sheets, of dense bfloat16 (T4: float16) and of the SXM boards (T4: PCIe; A100: of 80 GB). Prices
  are those of RunPod's own data centres, as others report them; of T4 none was found. Full power is the board's limit,
  published; idle power is inferred, but for H200, whose 80 W were measured. NVML measures the energy of a run.
- CPU: a core is a vCPU, a hyper-thread. Power is the mean of Google's machines by Cloud Carbon Footprint's methodology,
  the price an n2-standard machine's.
- Sites: PUE is Google's of the year; carbon is that of the region's grid in 2024, location based.
"""

import ml_collections
from ml_collections import config_dict

# Grams of CO2 equivalents a kWh, 2024.
GRAMS_PER_KWH = {'us-central1': 413.0, 'us-central2': 372.0, 'us-east1': 576.0, 'us-east5': 323.0, 'us-west1': 79.0,
                 'us-west4': 357.0, 'europe-west4': 209.0}
_LIST = {'price_date': '2025-02', 'price_source': 'cloud.google.com/tpu/pricing, on demand'}
_RUNPOD = {'price_date': '2026-03', 'price_source': 'deploybase.ai/articles/runpod-gpu-pricing'}
PROFILES = {
    'v4': dict(
        device_kinds=('tpu v4',), compiled_devices_per_chip=2, tflops=275.0, hbm_gb=34.4, hbm_usable_gib=30.5,
        hbm_gb_per_s=1200.0, ici_gb_per_s=270.0, watts_idle=90.0, watts_max=192.0, power_source='published',
        dollars_per_hour=3.22, **_LIST),
    'v5e': dict(
        device_kinds=('tpu v5 lite', 'tpu v5e'), tflops=197.0, hbm_gb=17.2, hbm_usable_gib=15.75, hbm_gb_per_s=819.0,
        ici_gb_per_s=200.0, watts_idle=130.0, watts_max=225.0, power_source='inferred', dollars_per_hour=1.2, **_LIST),
    'v5p': dict(
        device_kinds=('tpu v5', 'tpu v5p'), tflops=459.0, hbm_gb=102.0, hbm_usable_gib=95.74, hbm_gb_per_s=2765.0,
        ici_gb_per_s=600.0, watts_idle=270.0, watts_max=540.0, power_source='inferred', dollars_per_hour=4.2, **_LIST),
    'v6e': dict(
        device_kinds=('tpu v6 lite', 'tpu v6e'), tflops=918.0, hbm_gb=34.4, hbm_usable_gib=31.25, hbm_gb_per_s=1638.0,
        ici_gb_per_s=400.0, watts_idle=300.0, watts_max=400.0, power_source='inferred', dollars_per_hour=2.7, **_LIST),
    'tpu7x': dict(
        device_kinds=('tpu7x', 'tpu v7x', 'tpu 7x'), devices_per_chip=2, compiled_devices_per_chip=2, tflops=2307.0,
        hbm_gb=206.2, hbm_usable_gib=189.5, hbm_gb_per_s=7380.0, ici_gb_per_s=600.0),
    'h100': dict(
        device_kinds=('nvidia h100',), tflops=989.0, hbm_gb=80.0, hbm_gb_per_s=3350.0, ici_gb_per_s=450.0,
        watts_idle=80.0, watts_max=700.0, power_source='inferred', dollars_per_hour=2.69, price_date='2026-05',
        price_source='spheron.network/blog/runpod-h100-pricing-2026'),
    'h200': dict(
        device_kinds=('nvidia h200',), tflops=989.0, hbm_gb=141.0, hbm_gb_per_s=4800.0, ici_gb_per_s=450.0,
        watts_idle=80.0, watts_max=700.0, power_source='published', dollars_per_hour=3.59, **_RUNPOD),
    'a100': dict(
        device_kinds=('nvidia a100',), tflops=312.0, hbm_gb=80.0, hbm_gb_per_s=2039.0, ici_gb_per_s=300.0,
        watts_idle=60.0, watts_max=400.0, power_source='inferred', dollars_per_hour=1.39, **_RUNPOD),
    't4': dict(
        device_kinds=('tesla t4', 'nvidia t4'), tflops=65.0, hbm_gb=16.0, hbm_gb_per_s=320.0, watts_idle=11.0,
        watts_max=70.0, power_source='inferred'),
    'cpu': dict(
        device_kinds=('cpu',), devices_per_chip=None, watts_idle=0.71, watts_max=4.26, power_source='inferred',
        dollars_per_hour=0.0486, price_date='2026-04', price_source='cloud.google.com/compute/vm-instance-pricing'),
}


def _profile(figures: dict) -> ml_collections.ConfigDict:
  # A flag needs to know the type of a figure that is not known.
  c = ml_collections.ConfigDict({name: config_dict.placeholder(float) for name in (
      'tflops', 'hbm_gb', 'hbm_usable_gib', 'hbm_gb_per_s', 'ici_gb_per_s', 'watts_idle', 'watts_max',
      'dollars_per_hour')})
  c.update({name: config_dict.placeholder(str) for name in ('power_source', 'price_date', 'price_source')})
  c.devices_per_chip = config_dict.placeholder(int)
  c.update({'device_kinds': (), 'devices_per_chip': 1, 'compiled_devices_per_chip': 1} | figures)
  return c


def get_config(name: str = '') -> ml_collections.ConfigDict:
  """All profiles, or one for every device.

  Raises ValueError for a name that is neither a profile nor a region.
  """
  names = [x for x in name.split(',') if x]
  if unknown := [x for x in names if x not in PROFILES and x not in GRAMS_PER_KWH]:
    raise ValueError(f'{unknown[0]!r} is neither a profile, of {sorted(PROFILES)}, nor a region, of '
                     f'{sorted(GRAMS_PER_KWH)}')
  kept = [x for x in names if x in PROFILES] or list(PROFILES)
  region = next((x for x in names if x in GRAMS_PER_KWH), 'us-central1')
  return ml_collections.ConfigDict({
      'site': {'pue': 1.1, 'grams_per_kwh': GRAMS_PER_KWH[region], 'region': region, 'date': '2024'},
      'profiles': {x: _profile(PROFILES[x]) for x in kept}}).lock()
