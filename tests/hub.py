"""A Hugging Face hub of a few files on this machine, over HTTP, for tests."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

from huggingface_hub import constants


class Hub:
  """What the hub holds and what it was asked for; a test changes it.

  Attributes:
    files: {repository: {commit: {path: bytes}}}; that of a dataset is called 'datasets/ORG/NAME'.
    branches: {repository: {name of a branch: commit}}.
    gated, private: repositories that need a token.
    asked: [(method, path of the URL)]; the method is 'PART' where a part of a file was asked for.
  """

  def __init__(self):
    self.files: dict[str, dict[str, dict[str, bytes]]] = {}
    self.branches: dict[str, dict[str, str]] = {}
    self.gated: set[str] = set()
    self.private: set[str] = set()
    self.asked: list[tuple[str, str]] = []
    self.endpoint = ''

  def push(self, repository: str, files: dict[str, bytes], branch: str = 'main') -> str:
    """A commit of these files, at which the branch then stands."""
    files = {'.gitattributes': b'*.safetensors filter=lfs\n', **files}
    commit = hashlib.sha1(json.dumps({name: x.hex() for name, x in files.items()}).encode()).hexdigest()
    self.files.setdefault(repository, {})[commit] = files
    self.branches.setdefault(repository, {})[branch] = commit
    return commit

  def fetched(self) -> list[str]:
    """The paths of the files that were fetched whole."""
    return [path.split('/resolve/')[1].partition('/')[2] for method, path in self.asked
            if method == 'GET' and '/resolve/' in path]

  def fetched_in_part(self) -> list[str]:
    """The paths of the files of which a part was fetched."""
    return [path.split('/resolve/')[1].partition('/')[2] for method, path in self.asked if method == 'PART']

  def answer(self, path: str, has_token: bool) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for the path of a URL."""
    asked = re.fullmatch(r'/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/(revision|tree)/(.+)', path)
    file = re.fullmatch(r'/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
    if not asked and not file:
      return 404, {}, b'{}'
    repository, revision = (asked[1], asked[3]) if asked else (file[1], file[2])
    if repository not in self.files or repository in self.private and not has_token:
      return (404 if has_token else 401), {'X-Error-Code': 'RepoNotFound'}, b'{}'
    commit = self.branches[repository].get(revision, revision)
    if commit not in self.files[repository]:
      return 404, {'X-Error-Code': 'RevisionNotFound'}, b'{}'
    files = self.files[repository][commit]
    if asked and asked[2] == 'revision':
      found = {'id': repository, 'sha': commit, 'siblings': [{'rfilename': name} for name in files]}
      return 200, {'Content-Type': 'application/json'}, json.dumps(found).encode()
    if asked:
      found = [{'type': 'file', 'path': name, 'size': len(x), 'oid': hashlib.sha1(x).hexdigest()}
               for name, x in files.items()]
      return 200, {'Content-Type': 'application/json'}, json.dumps(found).encode()
    if repository in self.gated and not has_token:
      return 401, {'X-Error-Code': 'GatedRepo'}, b'{}'
    if file[3] not in files:
      return 404, {'X-Error-Code': 'EntryNotFound'}, b'{}'
    headers = {'X-Repo-Commit': commit, 'ETag': f'"{hashlib.sha1(files[file[3]]).hexdigest()}"'}
    return 200, headers, files[file[3]]


@contextlib.contextmanager
def serve(monkeypatch, cache: str) -> Iterator[Hub]:
  """A hub at hub.endpoint, which the client in this process asks, with a cache of its own and no token."""
  hub = Hub()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
      path = urllib.parse.unquote(self.path.partition('?')[0])
      part = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
      hub.asked.append(('PART' if part else self.command, path))
      status, headers, body = hub.answer(path, 'Authorization' in self.headers)
      if part and status == 200:
        status, body = 206, body[int(part[1]):int(part[2]) + 1]
      self.send_response(status)
      for name, value in ({'Content-Length': str(len(body))} | headers).items():
        self.send_header(name, value)
      self.end_headers()
      if self.command == 'GET':
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  hub.endpoint = f'http://127.0.0.1:{server.server_port}'
  url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
  for name, value in (('HUGGINGFACE_CO_URL_TEMPLATE', url), ('ENDPOINT', hub.endpoint), ('HF_HUB_CACHE', cache),
                      ('HF_TOKEN_PATH', f'{cache}/token')):
    monkeypatch.setattr(constants, name, value)
  monkeypatch.delenv('HF_TOKEN', raising=False)
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
