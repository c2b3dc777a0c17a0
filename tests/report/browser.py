"""Headless Chromium, spoken to over a pipe (its DevTools protocol): what a page shows, asks for and complains of."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from typing import Any

PATH = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
_FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-quic',
          '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
          '--disable-extensions', '--disable-features=Translate,OptimizationHints,MediaRouter', '--hide-scrollbars',
          '--remote-debugging-pipe')


class Browser:
  """One page. `complaints`: of its console and its scripts. `requests`: all that it asked for beside itself."""

  def __init__(self, profile: str):
    to_browser, self._write = os.pipe()
    self._read, from_browser = os.pipe()
    # Chromium reads from 3 and writes to 4.
    command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    self._process = subprocess.Popen(
        ['bash', '-c', command, PATH, *_FLAGS, f'--user-data-dir={profile}', 'about:blank'],
        pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(to_browser)
    os.close(from_browser)
    self._buffer, self._id, self._session = b'', 0, None
    self._events: list[dict[str, Any]] = []
    self.requests: list[str] = []
    self.complaints: list[str] = []
    pages = self.call('Target.getTargets')['targetInfos']
    target = next(page['targetId'] for page in pages if page['type'] == 'page')
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')

  def __enter__(self) -> Browser:
    return self

  def __exit__(self, *_) -> None:
    self._session = None
    try:
      self.call('Browser.close')
      self._process.wait(10)
    except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
      os.killpg(self._process.pid, signal.SIGKILL)  # its children too: it leads a session of its own
      self._process.wait()
    finally:
      os.close(self._write)
      os.close(self._read)

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """A command's result; events that come in between are kept."""
    self._id += 1
    message = {'id': self._id, 'method': method, 'params': params}
    if self._session is not None:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      found = self._next(30)
      if found.get('id') == self._id:
        if 'error' in found:
          raise RuntimeError(f'{method}: {found["error"]}')
        return found['result']

  def _next(self, timeout_s: float) -> dict[str, Any]:
    while b'\0' not in self._buffer:
      if not select.select([self._read], [], [], timeout_s)[0]:
        raise TimeoutError('the browser says nothing')
      more = os.read(self._read, 1 << 20)
      if not more:
        raise RuntimeError('the browser ended')
      self._buffer += more
    message, self._buffer = self._buffer.split(b'\0', 1)
    found = json.loads(message)
    self._note(found.get('method'), found.get('params', {}))
    return found

  def _note(self, method: str | None, params: dict[str, Any]) -> None:
    if method == 'Network.requestWillBeSent' and not params['request']['url'].startswith(('file:', 'data:', 'about:')):
      self.requests.append(params['request']['url'])
    elif method == 'Runtime.exceptionThrown':
      self.complaints.append(json.dumps(params['exceptionDetails']))
    elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
      self.complaints.append(json.dumps(params['args']))
    elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
      self.complaints.append(json.dumps(params['entry']))

  def evaluate(self, expression: str) -> Any:
    """The value of JavaScript in the page, that of a promise when it is there."""
    found = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
    if 'exceptionDetails' in found:
      raise RuntimeError(json.dumps(found['exceptionDetails']))
    return found['result'].get('value')

  def wait(self, expression: str, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while not self.evaluate(expression):
      if time.monotonic() > until:
        raise TimeoutError(f'{expression} stays false; {self.complaints}')
      time.sleep(0.02)

  def look(self, *, width: int, dark: bool, height: int = 900, media: str = '') -> None:
    """Sets the window and the theme."""
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
              mobile=width < 600)
    self.call('Emulation.setEmulatedMedia', media=media, features=[
        {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])

  def open(self, path: str) -> None:
    self.call('Page.navigate', url=f'file://{path}')
    self.wait('document.readyState == "complete"')

  def screenshot(self, path: str) -> None:
    """The whole page as a PNG."""
    found = self.call('Page.captureScreenshot', captureBeyondViewport=True)
    with open(path, 'wb') as file:
      file.write(base64.b64decode(found['data']))
