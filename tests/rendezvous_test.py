"""Processes that meet, those that do not come, and those that do not fit."""

import concurrent.futures
import socket
import time

import pytest

from kr_jax import exits
from kr_jax import rendezvous


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  for name, seconds in (('PATIENCE_S', 20.0), ('SAY_S', 0.1), ('_FIRST_S', 0.05), ('_BEAT_S', 0.02)):
    monkeypatch.setattr(rendezvous, name, seconds)


@pytest.fixture
def said(monkeypatch):
  found = []
  monkeypatch.setattr(rendezvous.progress, 'say', found.append)
  return found


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def meeting(*processes: tuple[int, int], port: int = 0) -> list[BaseException | None]:
  """What comes of processes (index, count)."""
  address = f'localhost:{port or free_port()}'
  with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
    found = [pool.submit(rendezvous.meet, address, count, index) for index, count in processes]
    return [x.exception() for x in found]


def test_all_meet_in_any_order(said):
  assert meeting((2, 3), (0, 3), (1, 3)) == [None] * 3
  port = free_port()
  for _ in range(2):  # the address is free at once, as JAX takes it then
    assert meeting((1, 2), (0, 2), port=port) == [None] * 2
    with socket.create_server(('localhost', port)):
      pass
  rendezvous.meet('localhost:1', 1, 0)  # alone, nothing is waited for


@pytest.mark.parametrize('process, message, missing', [
    ((0, 2), 'process 0 of 2 waits for process 1 at localhost:', 'process 1 did not come'),
    ((1, 3), 'process 1 of 3 waits for process 0 at localhost:', 'process 0 did not come')])
def test_one_that_is_alone_says_so_and_gives_up(said, monkeypatch, process, message, missing):
  monkeypatch.setattr(rendezvous, 'PATIENCE_S', 0.4)
  (stop,) = meeting(process)
  assert isinstance(stop, SystemExit) and stop.code == exits.AGAIN
  assert missing in stop.args[0] and 'Start all processes again' in stop.args[0]
  assert 2 <= len(said) <= 6 and all(line.startswith(message) for line in said)
  assert process[0] == 0 or 'Connection refused' in said[0]


def test_those_that_are_there_hear_who_is_missing(said, monkeypatch):
  monkeypatch.setattr(rendezvous, 'PATIENCE_S', 0.6)
  stops = meeting((0, 4), (2, 4))
  assert [stop.code for stop in stops] == [exits.AGAIN] * 2
  assert any(line.startswith('process 2 of 4 waits for processes 1 and 3 at') for line in said)
  assert any(line.startswith('process 0 of 4 waits for processes 1 and 3 at') for line in said)


def test_what_does_not_fit_is_refused_and_the_others_meet(said):
  """Another count, an index given twice; a second process 0 cannot listen."""
  port, address = free_port(), None
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    address = f'localhost:{port}'
    first = [pool.submit(rendezvous.meet, address, 3, index) for index in (0, 1)]
    while not said:
      time.sleep(0.01)
    for count, index, message in ((2, 1, '--processes=2, and process 0 has --processes=3'),
                                  (3, 1, '--process=1 is there already'),
                                  (3, 0, f'--coordinator=localhost:{port} cannot be listened at by process 0')):
      with pytest.raises(ValueError, match=message):
        rendezvous.meet(address, count, index)
    with socket.create_connection(('localhost', port)) as other:
      other.sendall(b'GET / HTTP/1.1\r\n\r\n')
    rendezvous.meet(address, 3, 2)
  assert [x.exception() for x in first] == [None] * 2
  assert any('was refused: it is no process of a run of this version' in line for line in said)


def test_a_process_that_starts_again_takes_its_place(said):
  address = f'localhost:{free_port()}'
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(rendezvous.meet, address, 3, 0)
    while not said:
      time.sleep(0.01)
    host, port = rendezvous.parsed(address)
    with socket.create_connection((host, port)) as killed:
      killed.sendall(b'{"kr_jax": 1, "process": 1, "processes": 3}\n')
      while not any('waits for process 2' in line for line in said):
        time.sleep(0.01)
    assert meeting((1, 3), (2, 3), port=port) == [None] * 2
  assert first.exception() is None


@pytest.mark.parametrize('address', ['localhost', 'localhost:', ':1', 'localhost:x', 'localhost:0', 'localhost:65536'])
def test_what_is_no_address(address):
  with pytest.raises(ValueError, match="is no 'HOST:PORT'"):
    rendezvous.meet(address, 2, 0)


def test_another_program_at_the_address(said, monkeypatch):
  monkeypatch.setattr(rendezvous, 'PATIENCE_S', 0.4)
  with socket.create_server(('localhost', 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
    found = pool.submit(rendezvous.meet, f'localhost:{server.getsockname()[1]}', 2, 1)
    with server.accept()[0] as connection:
      connection.sendall(b'\x00\x00\x12\x04\n')
      stop = found.exception()
  assert stop.code == exits.AGAIN and 'has the run of before not ended?' in said[0]


def test_many_are_named_in_short():
  assert [rendezvous.named([*range(1, n)]) for n in (2, 3, 10)] == [
      'process 1', 'processes 1 and 2', 'processes 1, 2, 3, 4, 5 and 4 more']


def test_what_the_environment_says_to_jax_holds(monkeypatch):
  """An address of its own, and one to listen at: behind a service of Kubernetes ports may differ."""
  from jax._src import clusters
  address, port = 'service:1234', free_port()
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', address)
  monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', f'[::]:{port}')
  monkeypatch.setattr(clusters.ClusterEnv, 'auto_detect_unset_distributed_params', lambda of, *_: (of, 2, 1, None))
  assert rendezvous.of_environment() == (address, 2, 1)
  with rendezvous._listening('service', 1234, 2) as server:
    assert server.getsockname()[1] == port
