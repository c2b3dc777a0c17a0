"""A server of the Cloud Storage JSON API, for tests: gcsfs, tensorstore and google-cloud-storage use it unmodified.

    python -m tests.fakes.bucket DIRECTORY --port=8085      # prints the environment that clients need

What is stored lies in a directory: DIRECTORY/BUCKET/NAME, names percent-encoded; a bucket is there if its directory
is. A file's time of change, in microseconds, is the object's generation. Faults can be ordered (`Server.fail`).

Source: cloud.google.com/storage/docs/json_api/v1. Left out: permissions, versions, metadata, checksums of uploads.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import json
import os
import pathlib
import re
import secrets
import socketserver
import threading
import time
from urllib import parse

_BUCKET = re.compile(r'/storage/v1/b/([^/]+)')
_OBJECTS = re.compile(r'/storage/v1/b/([^/]+)/o')
_OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)')
_COPY = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/(copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)')
_MOVE = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)')
_COMPOSE = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/compose')
_UPLOAD = re.compile(r'/(?:resumable/)?upload/storage/v1/b/([^/]+)/o')


class Refused(Exception):
  """A status that is no success."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


@dataclasses.dataclass
class Fault:
  """Requests whose method and path a pattern is found in fail, so many times."""

  status: int
  pattern: str = ''
  times: int = 10 ** 9
  message: str = 'ordered by the test'


class Store:
  """The objects of some buckets, in a directory."""

  def __init__(self, directory: str | os.PathLike):
    self.directory, self._lock, self._last = pathlib.Path(directory), threading.Lock(), 0

  def _folder(self, bucket: str) -> pathlib.Path:
    folder = self.directory / bucket
    if not folder.is_dir():
      raise Refused(404, 'The specified bucket does not exist.')
    return folder

  def bucket(self, bucket: str) -> dict:
    self._folder(bucket)
    return {'kind': 'storage#bucket', 'id': bucket, 'name': bucket, 'location': 'US', 'storageClass': 'STANDARD'}

  def path(self, bucket: str, name: str) -> pathlib.Path:
    """Where an object lies."""
    return self._folder(bucket) / parse.quote(name, safe='')

  def about(self, bucket: str, name: str) -> dict:
    """The resource of an object."""
    path = self.path(bucket, name)
    try:
      status, content = path.stat(), path.read_bytes()
    except FileNotFoundError:
      raise Refused(404, f'No such object: {bucket}/{name}') from None
    generation = status.st_mtime_ns // 1000
    when = datetime.datetime.fromtimestamp(generation / 1e6, datetime.UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {'kind': 'storage#object', 'id': f'{bucket}/{name}/{generation}', 'name': name, 'bucket': bucket,
            'generation': str(generation), 'metageneration': '1', 'size': str(len(content)), 'timeCreated': when,
            'updated': when, 'md5Hash': md5, 'etag': f'"{generation}"', 'storageClass': 'STANDARD',
            'contentType': 'application/octet-stream'}

  def read(self, bucket: str, name: str) -> bytes:
    self.about(bucket, name)
    return self.path(bucket, name).read_bytes()

  def write(self, bucket: str, name: str, content: bytes, if_generation: str | None = None) -> dict:
    """Writes an object. if_generation: that it must have; '0': it must not be there."""
    with self._lock:
      path = self.path(bucket, name)
      if if_generation is not None:
        found = str(path.stat().st_mtime_ns // 1000) if path.exists() else '0'
        if found != if_generation:
          raise Refused(412, 'At least one of the pre-conditions you specified did not hold.')
      unfinished = self.directory / f'.{secrets.token_hex(8)}'
      unfinished.write_bytes(content)
      self._last = max(self._last + 1, time.time_ns() // 1000)
      os.utime(unfinished, ns=(self._last * 1000, self._last * 1000))
      unfinished.replace(path)
    return self.about(bucket, name)

  def delete(self, bucket: str, name: str) -> None:
    self.about(bucket, name)
    self.path(bucket, name).unlink(missing_ok=True)

  def names(self, bucket: str) -> list[str]:
    return sorted(parse.unquote(path.name) for path in self._folder(bucket).iterdir())

  def list(self, bucket: str, query: dict[str, str]) -> dict:
    """A page of objects and of common prefixes, in the order of their names."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    found: dict[str, bool] = {}  # name -> whether it is a prefix
    for name in self.names(bucket):
      if not name.startswith(prefix) or name < query.get('startOffset', '') or (
          'endOffset' in query and query['endOffset'] and name >= query['endOffset']):
        continue
      head, cut, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, '', '')
      found[prefix + head + cut if cut else name] = bool(cut)
    names = [name for name in sorted(found) if name > query.get('pageToken', '')]
    most = int(query.get('maxResults', 1000))
    page, rest = names[:most], names[most:]
    answer = {'kind': 'storage#objects', 'items': [self.about(bucket, name) for name in page if not found[name]],
              'prefixes': [name for name in page if found[name]]}
    return answer | ({'nextPageToken': page[-1]} if rest and page else {})


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
  """The server, in threads of this process.

  Attributes:
    environment: variables of its clients.
    requests: 'METHOD path?query' of each request so far.
    delay_s: seconds that each answer waits.
  """

  daemon_threads = True
  request_queue_size = 256

  def __init__(self, directory: str | os.PathLike, port: int = 0, buckets: tuple[str, ...] = ('bucket',)):
    self.store, self.faults, self.requests, self.delay_s, self.uploads = Store(directory), [], [], 0.0, {}
    for bucket in buckets:
      (self.store.directory / bucket).mkdir(parents=True, exist_ok=True)
    super().__init__(('127.0.0.1', port), Handler)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.environment = {
        'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url,
        # No client looks for an account of this machine.
        'NO_GCE_CHECK': 'true', 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'of-the-test', 'no_proxy': '127.0.0.1'}

  def make(self) -> str:
    """Makes a bucket, and returns its URL."""
    name = f'bucket-{secrets.token_hex(4)}'
    (self.store.directory / name).mkdir()
    return f'gs://{name}'

  def fail(self, status: int, pattern: str = '', times: int = 10 ** 9, message: str = 'ordered by the test') -> None:
    """Orders a fault. pattern: of 'METHOD path?query'."""
    self.faults.append(Fault(status, pattern, times, message))

  def fault(self, line: str) -> Fault | None:
    """The fault that a request meets."""
    for fault in self.faults:
      if fault.times > 0 and re.search(fault.pattern, line):
        fault.times -= 1
        return fault
    return None

  def handle_error(self, request, client_address) -> None:
    """A client that was killed is no matter of the server."""


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers requests."""

  protocol_version = 'HTTP/1.1'
  server: Server

  def log_message(self, *_) -> None:
    pass

  def _answer(self, status: int, content: bytes | dict = b'', **headers: str) -> None:
    if isinstance(content, dict):
      content, headers = json.dumps(content).encode(), headers | {'Content_Type': 'application/json; charset=UTF-8'}
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    if status not in (204, 304):
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD' and status not in (204, 304):
      self.wfile.write(content)

  def _handle(self) -> None:
    body = self._body()
    line = f'{self.command} {self.path}'
    self.server.requests.append(line)
    time.sleep(self.server.delay_s)
    try:
      if fault := self.server.fault(line):
        raise Refused(fault.status, fault.message)
      url = parse.urlsplit(self.path)
      query = {name: values[-1] for name, values in parse.parse_qs(url.query, keep_blank_values=True).items()}
      self._of(url.path, query, body)
    except Refused as error:
      self._answer(error.status, {'error': {'code': error.status, 'message': str(error), 'errors': []}})

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
      parts = []
      while size := int(self.rfile.readline().split(b';')[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def _of(self, path: str, query: dict[str, str], body: bytes) -> None:
    """Answers a request."""
    store, names = self.server.store, lambda found: [parse.unquote(x) for x in found.groups()]
    if path == '/batch/storage/v1':
      self._batch(body)
    elif found := _UPLOAD.fullmatch(path):
      self._upload(*names(found), query, body)
    elif found := _COPY.fullmatch(path):
      bucket, name, kind, to_bucket, to = names(found)
      about = store.write(to_bucket, to, store.read(bucket, name), query.get('ifGenerationMatch'))
      self._answer(200, about if kind == 'copyTo' else {
          'kind': 'storage#rewriteResponse', 'done': True, 'resource': about, 'objectSize': about['size'],
          'totalBytesRewritten': about['size']})
    elif found := _MOVE.fullmatch(path):
      bucket, name, to = names(found)
      about = store.write(bucket, to, store.read(bucket, name))
      store.delete(bucket, name)
      self._answer(200, about)
    elif found := _COMPOSE.fullmatch(path):
      bucket, name = names(found)
      parts = [store.read(bucket, part['name']) for part in json.loads(body)['sourceObjects']]
      self._answer(200, store.write(bucket, name, b''.join(parts), query.get('ifGenerationMatch')))
    elif found := _OBJECT.fullmatch(path):
      self._object(*names(found), query)
    elif found := _OBJECTS.fullmatch(path):
      self._answer(200, store.list(*names(found), query))
    elif found := _BUCKET.fullmatch(path):
      self._answer(200, store.bucket(*names(found)))
    else:
      raise Refused(404, f'there is nothing at {path}')

  def _object(self, bucket: str, name: str, query: dict[str, str]) -> None:
    about = self.server.store.about(bucket, name)
    generation = about['generation']
    if query.get('ifGenerationMatch', generation) != generation:
      raise Refused(412, 'At least one of the pre-conditions you specified did not hold.')
    if self.command == 'DELETE':
      self.server.store.delete(bucket, name)
      self._answer(204)
    elif query.get('ifGenerationNotMatch') == generation:
      self._answer(304)
    elif query.get('alt') != 'media':
      self._answer(200, about)
    else:
      self._media(self.server.store.read(bucket, name), generation)

  def _media(self, content: bytes, generation: str) -> None:
    """The content of an object, or the range of it that is asked for."""
    headers = {'Content_Type': 'application/octet-stream', 'X_Goog_Generation': generation,
               'X_Goog_Hash': f'md5={base64.b64encode(hashlib.md5(content).digest()).decode()}'}
    found = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not found:
      return self._answer(200, content, **headers)
    size = len(content)
    if not found[1]:  # the last so many bytes
      first, last = max(size - int(found[2]), 0), size - 1
    else:
      first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
    if first >= size or last < first:
      raise Refused(416, 'The requested range cannot be satisfied.')
    self._answer(206, content[first:last + 1], Content_Range=f'bytes {first}-{last}/{size}', **headers)

  def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
    kind, condition = query.get('uploadType'), query.get('ifGenerationMatch')
    store = self.server.store
    store.bucket(bucket)
    if 'upload_id' in query:
      self._chunk(query['upload_id'], body)
    elif kind == 'media':
      self._answer(200, store.write(bucket, query['name'], body, condition))
    elif kind == 'multipart':
      boundary = re.search(r'boundary="?([^";]+)"?', self.headers['Content-Type'])[1].encode()
      about, content = body.split(b'--' + boundary)[1:3]
      of = lambda part: re.split(b'\r?\n\r?\n', part, maxsplit=1)[1]
      content = of(content)
      content = content[:-2] if content.endswith(b'\r\n') else content[:-1]
      name = json.loads(of(about)).get('name') or query['name']
      self._answer(200, store.write(bucket, name, content, condition))
    elif kind == 'resumable':
      name = query.get('name') or json.loads(body)['name']
      key = secrets.token_hex(8)
      self.server.uploads[key] = (bucket, name, condition, bytearray())
      self._answer(200, {}, Location=f'{self.server.url}/upload/storage/v1/b/{parse.quote(bucket, safe="")}/o'
                   f'?uploadType=resumable&upload_id={key}')
    else:
      raise Refused(400, f'uploadType={kind}')

  def _chunk(self, key: str, body: bytes) -> None:
    """A part of a resumable upload; the last one says how many bytes there are."""
    if key not in self.server.uploads:
      raise Refused(404, 'there is no such upload')
    bucket, name, condition, parts = self.server.uploads[key]
    if self.command == 'DELETE':
      del self.server.uploads[key]
      return self._answer(499)
    found = re.fullmatch(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)', self.headers.get('Content-Range', ''))
    if found is None:
      parts[:] = body
    elif found[1]:
      del parts[int(found[1]):]
      parts += body
    if found is None or found[3] != '*' and len(parts) == int(found[3]):
      del self.server.uploads[key]
      return self._answer(200, self.server.store.write(bucket, name, bytes(parts), condition))
    self._answer(308, **({'Range': f'bytes=0-{len(parts) - 1}'} if parts else {}))

  def _batch(self, body: bytes) -> None:
    """Deletes objects, each answered in a part of its own."""
    answers = []
    for bucket, name in re.findall(r'DELETE /storage/v1/b/([^/]+)/o/([^\s?]+)', body.decode()):
      status = '204 No Content'
      try:
        self.server.store.delete(parse.unquote(bucket), parse.unquote(name))
      except Refused as error:
        status = f'{error.status} {error}'
      answers.append(f'--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n')
    self._answer(200, ''.join([*answers, '--batch--']).encode(), Content_Type='multipart/mixed; boundary=batch')


@contextlib.contextmanager
def served(directory: str | os.PathLike, **arguments):
  """A server that answers while in it; its clients need `environment`."""
  with Server(directory, **arguments) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': .02}, name='bucket', daemon=True)
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('directory')
  parser.add_argument('--port', type=int, default=0)
  parser.add_argument('--bucket', action='append')
  arguments = parser.parse_args()
  with Server(arguments.directory, arguments.port, tuple(arguments.bucket or ['bucket'])) as server:
    for name, value in server.environment.items():
      print(f'export {name}={value}', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      server.serve_forever()


if __name__ == '__main__':
  main()
