"""Captions from any server that speaks OpenAI's chat interface: vLLM, SGLang, llama.cpp, Ollama, a paid service.

One ``POST <endpoint>/chat/completions`` per caption, the picture inside as a JPEG. What may pass is tried again:
408, 409, 429, 5xx, no answer in time, a dropped connection, an answer that is no JSON; the wait doubles, with
jitter, and a Retry-After header is obeyed, by all workers that share the ledger. What would fail every request stops
the job at once: 401, 403, 404, any other 3xx or 4xx. Only 400 is a matter of the one picture once this process has
had a good answer, since the settings then work; a 400 for the content is one always.

HTTP is urllib3's: its pool may be used by many threads, and `requests` and `diffusers` bring it along.
"""

from __future__ import annotations

import base64
import concurrent.futures
import email.utils
import io
import itertools
import json
import os
import random
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_nucleus.data.curation.captioners.ledger import Ledger
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply, Request
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.utils.errors import ConfigError, UserError

# Own choices:
JPEG_QUALITY = 90  # what a captioner can see survives it, at a tenth of a PNG's bytes
MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 600.0  # a server that asks for more is left alone and the caption failed for now
MAX_ANSWER_BYTES = 4 << 20
_CONNECT_S = 10.0
_PASSING = (408, 409, 429)  # and every 5xx
_CONTENT_CODES = ("content_filter", "content_policy_violation")  # a 400 that speaks of the picture, not of us
_FIXES = {
    400: "does the model take pictures, and does the server know max_tokens_key and temperature?",
    401: "is the key in the variable that api_key_env names valid?",
    403: "may this key use this model?",
    404: "are endpoint (with /v1) and model right?",
    413: "lower image_side_px",
}


class _Passing(NamedTuple):
    """An attempt that failed for a reason that may pass. wait_s: what the server asks for."""

    detail: str
    wait_s: float | None = None


class _Unreachable(NamedTuple):
    """No connection at all."""

    detail: str


class HttpCaptioner:
    """See the module docstring; one request per thread, ``concurrency`` threads."""

    def __init__(self, settings: CaptionerConfig, ledger: Ledger, environ: Mapping[str, str] | None = None):
        """environ: where the key and the proxies are; the process' own by default.

        Raises:
            ConfigError: the key's variable is empty, or urllib3 is missing.
        """
        assert settings.endpoint is not None
        assert settings.model is not None
        self.name, self.revision = settings.model, settings.model_revision
        self._settings, self._ledger = settings, ledger
        self._url = settings.endpoint.rstrip("/") + "/chat/completions"
        self._key = _read_key(settings, os.environ if environ is None else environ)
        self._http = _connect(self._url, settings)
        self._worked = False  # whether any answer was good: then the settings are

    def caption(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | Failure]]:
        """As in `Captioner`. A request is begun only when an earlier answer has been taken, and so counted: what is
        spent over ``max_cost`` is at most what was in flight. After an error that stops the job none is begun; those
        in flight are waited for and yielded first, since they are paid for."""
        waiting, running = enumerate(requests), {}
        stop = threading.Event()
        fatal: UserError | None = None
        with concurrent.futures.ThreadPoolExecutor(self._settings.concurrency) as threads:
            try:
                while True:
                    free = 0 if fatal else self._settings.concurrency - len(running)
                    for number, request in itertools.islice(waiting, free):
                        running[threads.submit(self._ask, request, stop)] = number
                    if not running:
                        break
                    done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in sorted(done, key=running.__getitem__):
                        number = running.pop(future)
                        try:
                            answer = future.result()
                        except UserError as error:
                            fatal = fatal or error
                            stop.set()
                            continue
                        if answer is not None:
                            yield number, answer
            finally:
                stop.set()
        if fatal:
            raise fatal

    def _ask(self, request: Request, stop: threading.Event) -> Reply | Failure | None:
        """One caption with all its attempts; None where the job is stopping."""
        body = self._body(request)
        jitter = random.Random(body)  # of the request alone: no shared state, and no two in step
        attempts = self._settings.max_retries + 1
        for attempt in range(attempts):
            if stop.is_set() or not self._wait_for_turn(stop):
                return None
            outcome = self._attempt(body)
            if isinstance(outcome, Reply | Failure):
                return outcome
            asked_s = getattr(outcome, "wait_s", None)
            if asked_s is not None and asked_s > MAX_RETRY_AFTER_S:
                return Failure(f"{outcome.detail}; the server asks to wait {asked_s:.0f} s")
            if asked_s is not None:
                self._ledger.pause(asked_s)
            if attempt + 1 < attempts:
                backoff_s = min(self._settings.backoff_s * 2**attempt, MAX_BACKOFF_S) * jitter.uniform(
                    0.5, 1.0
                )
                stop.wait(max(backoff_s, asked_s or 0.0))
        if isinstance(outcome, _Unreachable) and not self._worked:
            raise ConfigError(
                f"endpoint {self._settings.endpoint}: {outcome.detail}, {attempts} times; is the server running there?"
            )
        return Failure(f"{outcome.detail} (attempt {attempts} of {attempts})")

    def _wait_for_turn(self, stop: threading.Event) -> bool:
        """Wait as the ledger says; False where the job is stopping. Raises ConfigError when the money is spent."""
        wait_s = self._ledger.turn_s()
        while wait_s > 0 or self._ledger.paused_s() > 0:  # a pause may begin while this one waits
            if stop.wait(wait_s or self._ledger.paused_s()):
                return False
            wait_s = 0.0
        self._ledger.check_budget()
        return not stop.is_set()

    def _body(self, request: Request) -> bytes:
        file = io.BytesIO()
        request.picture.save(file, "JPEG", quality=JPEG_QUALITY)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "text", "text": request.prompt}, {"type": "image_url", "image_url": {"url": url}}]
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": "user", "content": content}],
            settings.max_tokens_key: settings.max_new_tokens,
        }
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        return json.dumps(body).encode()

    def _attempt(self, body: bytes) -> Reply | Failure | _Passing | _Unreachable:
        """Send once and judge the answer."""
        from urllib3 import exceptions

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            status, answered, payload = self._send(body, headers)
        except exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY" in str(error).upper():
                raise ConfigError(
                    f"endpoint {self._settings.endpoint}: its certificate is not trusted ({self._clean(str(error))}); "
                    "mend it, or name its authority in SSL_CERT_FILE"
                ) from error
            return _Unreachable("no secure connection (is it http, not https?)")
        except (
            exceptions.NewConnectionError,
            exceptions.ConnectTimeoutError,
            exceptions.ProxyError,
        ) as error:
            return _Unreachable(f"no connection ({type(error).__name__})")
        except (exceptions.TimeoutError, TimeoutError):
            return _Passing(f"no answer within {self._settings.timeout_s:g} s")
        except (exceptions.HTTPError, OSError) as error:
            return _Passing(f"connection broken ({type(error).__name__})")
        if status == 200:
            return self._read(payload)
        return self._refused(status, answered, payload)

    def _send(self, body: bytes, headers: dict[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content; the time limit holds for the whole answer, however slowly it drips."""
        deadline = time.monotonic() + self._settings.timeout_s
        response = self._http.request(
            "POST", self._url, body=body, headers=headers, preload_content=False, redirect=False
        )
        whole = False
        try:
            content = bytearray()
            while chunk := response.read1(1 << 16):
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise OSError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            whole = True
            return response.status, response.headers, bytes(content)
        finally:
            # A connection with half an answer in it must not be used again.
            response.release_conn() if whole else response.close()

    def _read(self, payload: bytes) -> Reply | Failure | _Passing:
        try:
            answer = json.loads(payload)
            choice, usage = answer["choices"][0], answer.get("usage")
            message, reason = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            tokens = (0, 0) if usage is None else _counts(usage)
            served = answer.get("model")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            return _Passing(f"an answer that is no chat completion ({type(error).__name__})")
        self._worked = True
        settings = self._settings
        if usage is None and (settings.price_in or settings.price_out or settings.tokens_per_minute):
            raise ConfigError(
                f"endpoint {settings.endpoint}: its answers count no tokens (no 'usage'), so neither cost nor "
                "tokens_per_minute can be; leave prices and tokens_per_minute out"
            )
        if refusal:
            return Failure(f"refused: {self._clean(str(refusal))}", *tokens)
        if reason == "content_filter":
            return Failure("refused: the server's content filter", *tokens)
        if text is not None and not isinstance(text, str):
            return _Passing("an answer whose content is no text")
        named = (
            isinstance(served, str) and served != self.name and served.isprintable() and len(served) <= 200
        )
        revision = self.revision or (served if named else None)
        return Reply(text or "", *tokens, revision, complete=reason != "length")

    def _refused(self, status: int, headers: Mapping[str, str], payload: bytes) -> Failure | _Passing:
        """What a status other than 200 means; raises ConfigError for what would fail every request."""
        message, code = self._error_of(payload)
        detail = f"HTTP {status}{': ' + message if message else ''}"
        if (status in _PASSING or status >= 500) and code != "insufficient_quota":
            return _Passing(detail, _retry_after_s(headers.get("Retry-After"), time.time()))
        if status == 400 and (self._worked or code in _CONTENT_CODES):
            return Failure(detail)
        if 300 <= status < 400:
            detail += f" to {self._clean(headers.get('Location', 'nowhere').split('?')[0])}"
        fix = (
            "is the account paid up?"
            if code == "insufficient_quota"
            else _FIXES.get(status, "is it the right URL?")
        )
        raise ConfigError(f"endpoint {self._settings.endpoint}, model {self.name}: {detail}; {fix}")

    def _error_of(self, payload: bytes) -> tuple[str, str]:
        """(message, code) of an error's body, in OpenAI's form or any other."""
        text = payload.decode("utf-8", "replace")
        try:
            error = json.loads(text)["error"]
        except (ValueError, LookupError, TypeError, RecursionError):
            error = text  # not in that form: the text itself has to do
        if isinstance(error, dict):
            code = str(error.get("code") or error.get("type") or "")
            return self._clean(str(error.get("message", ""))), code
        return self._clean(str(error)), ""

    def _clean(self, text: str) -> str:
        """A server's words for a message: one line, printable, never the key (servers like to repeat it)."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "[key]")
        return "".join(c if c.isprintable() else "?" for c in line)[:200]


def _counts(usage: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens in, tokens out); raises ValueError or LookupError for what is no count."""
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    if not all(type(count) is int and 0 <= count < 1 << 40 for count in counts):
        raise ValueError(f"token counts {counts}")
    return counts


def _retry_after_s(value: str | None, now_s: float) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it is absent or unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now_s
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


def check_surroundings(settings: CaptionerConfig) -> None:
    """What `HttpCaptioner` needs of this process; connects to nothing.

    Raises:
        ConfigError: as `HttpCaptioner`.
    """
    _read_key(settings, os.environ)
    _connect(settings.endpoint or "", settings)


def _read_key(settings: CaptionerConfig, environ: Mapping[str, str]) -> str:
    name = settings.api_key_env
    if name is None:
        return ""
    key = environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"api_key_env {name}: this environment variable is empty or missing; export the key there"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"api_key_env {name}: this environment variable holds no key (spaces or odd characters)"
        )
    return key


def _connect(url: str, settings: CaptionerConfig) -> Any:
    """A pool of connections, through the proxy that the environment names for this address."""
    try:
        import urllib3
    except ImportError:
        raise ConfigError("captioner http needs urllib3: pip install 'megatron-nucleus[caption]'") from None
    # The read limit is per piece of an answer; `_send` keeps the one for the whole.
    options: dict[str, Any] = {
        "num_pools": 1,
        "maxsize": settings.concurrency,
        "retries": False,  # ours are counted, paced and logged
        "timeout": urllib3.Timeout(connect=min(_CONNECT_S, settings.timeout_s), read=settings.timeout_s),
    }
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy, **options)
    return urllib3.PoolManager(**options)
