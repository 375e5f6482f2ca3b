"""The HTTP captioner against a server on this machine that fails on demand."""

from __future__ import annotations

import dataclasses
import email.utils
import logging
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.curation.captioners import openai_http, prompts
from megatron_nucleus.data.curation.captioners.desk import Desk, Wish
from megatron_nucleus.data.curation.captioners.ledger import Ledger, Spending
from megatron_nucleus.data.curation.captioners.openai_http import HttpCaptioner
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.caption_server import (
    TOKENS_IN,
    TOKENS_OUT,
    CaptionServer,
    answer,
    drip,
    drop,
    hang,
    raw,
    says,
    status,
)

KEY = "sk-do-not-show-4711"
PROMPT = prompts.render("synthesise", "short", None)


def config(server, **settings):
    plain = {"backoff_s": 0.005, "timeout_s": 2.0, "max_retries": 2}
    return CaptionerConfig(captioner="http", endpoint=server.endpoint, model="seer-1", **(plain | settings))


def ask(server, count=1, environ=None, ledger_class=Ledger, **settings):
    """Captions of grey pictures of shades 0, 10, 20, ...; returns (answers, ledger)."""
    made = config(server, **settings)
    ledger = ledger_class(made)
    counter = Desk(made, HttpCaptioner(made, ledger, environ or {}), ledger)
    return counter.answer([wish(10 * n) for n in range(count)]), ledger


def wish(shade):
    return Wish(f"{shade:064x}", lambda: Image.new("RGB", (64, 48), (shade,) * 3), "synthesise", "short")


def good(shade=0):
    return Reply(says(shade, PROMPT), TOKENS_IN, TOKENS_OUT)


def test_what_is_sent():
    with CaptionServer() as server:
        made = config(server, api_key_env="MY_KEY", max_new_tokens=77, image_side_px=40)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), np.uint8))
        ledger = Ledger(made)
        captioner = HttpCaptioner(made, ledger, {"MY_KEY": f" {KEY}\n"})
        Desk(made, captioner, ledger).answer([wish(0)._replace(picture=lambda: picture)])
        (seen,) = server.seen
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    content = seen.body["messages"][0]["content"]
    assert content[0] == {"type": "text", "text": PROMPT}
    assert {k: v for k, v in seen.body.items() if k != "messages"} == {
        "model": "seer-1",
        "max_tokens": 77,
        "temperature": 0.0,
    }
    assert seen.picture.size == (40, 20)
    assert (seen.picture.format, seen.picture.mode) == ("JPEG", "RGB")
    with CaptionServer() as server:
        ask(server, max_tokens_key="max_completion_tokens", temperature=None)
        (seen,) = server.seen
    assert seen.body.keys() == {"model", "messages", "max_completion_tokens"}
    assert "Authorization" not in seen.headers


def test_order_is_kept_when_answers_come_in_another(tmp_path):
    with CaptionServer() as server:
        server.delay_s = lambda seen: 0.05 if np.asarray(seen.picture).mean() < 45 else 0.0
        answers, ledger = ask(
            server, count=20, concurrency=5, cache_dir=str(tmp_path), price_in=3.0, price_out=4.0
        )
    assert answers == [good(10 * n) for n in range(20)]
    assert 2 <= server.most_busy <= 5
    cost = 20 * (TOKENS_IN * 3.0 + TOKENS_OUT * 4.0) / 1e6
    assert ledger.spent() == Spending(20, 20 * TOKENS_IN, 20 * TOKENS_OUT, pytest.approx(cost))


PASSING = {
    "500 twice": [status(500), status(502, "bad gateway")],
    "408 and 409": [status(408), status(409)],
    "429": [status(429, {"message": "slow down", "code": "rate_limit_exceeded"})],
    "dropped before the answer": [drop(), drop()],
    "dropped inside the answer": [drop(b'{"choices": [')],
    "no JSON": [raw(b"<html>we are busy</html>"), raw(b"")],
    "no chat completion": [raw(b'{"choices": []}'), raw(b"[1, 2]")],
    "not UTF-8": [raw(b"\xff\xfe\x00")],
    "odd token counts": [
        raw(
            b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": %s, "completion_tokens": 1}}'
            % n
        )
        for n in (b"Infinity", b"-5")
    ],
    "content no text": [raw(b'{"choices": [{"message": {"content": 5}}]}')],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_tried_again(faults):
    with CaptionServer(*faults) as server:
        answers, _ = ask(server)
    assert answers == [good()]
    assert len(server.seen) == len(faults) + 1


def test_it_gives_up_after_max_retries_for_that_picture_alone():
    with CaptionServer(status(503, "all busy"), status(503, "all busy"), status(503, "all busy")) as server:
        answers, ledger = ask(server, count=2, concurrency=1)
    assert answers == [Failure("HTTP 503: all busy (attempt 3 of 3)"), good(10)]
    assert len(server.seen) == 4
    assert ledger.spent().requests == 2


def test_a_hang_ends_at_the_timeout():
    with CaptionServer(hang(5.0)) as server:
        answers, _ = ask(server, timeout_s=0.15)
        assert answers == [good()]
        assert 0.1 < server.seen[1].at_s - server.seen[0].at_s < 4.0


def test_an_answer_that_drips_ends_at_the_timeout_too():
    """Each byte comes well within the time that one read may take; all of them take five seconds."""
    with CaptionServer(drip(100, 0.05)) as server:
        answers, _ = ask(server, timeout_s=0.2)
        assert answers == [good()]
        assert 0.15 < server.seen[1].at_s - server.seen[0].at_s < 4.0


def test_retry_after_is_obeyed_by_all():
    class Noting(Ledger):
        def pause(self, seconds):
            super().pause(seconds)
            self.paused_at_s = time.monotonic()

    with CaptionServer(status(429, Retry_After="0.3")) as server:
        server.delay_s = lambda seen: 0.0 if seen is server.seen[0] else 0.02
        answers, ledger = ask(server, count=8, concurrency=2, ledger_class=Noting)
    assert answers == [good(10 * n) for n in range(8)]
    after = [seen.at_s - ledger.paused_at_s for seen in server.seen]
    assert sum(0 < t < 0.299 for t in after) <= 1  # what the other thread had begun
    assert sum(t >= 0.299 for t in after) >= 2


def test_a_server_that_wants_to_be_left_alone_is():
    with CaptionServer(status(503, Retry_After="86400")) as server:
        (failure,), _ = ask(server)
    assert failure.detail == "HTTP 503; the server asks to wait 86400 s"
    assert len(server.seen) == 1


def test_retry_after_in_its_forms():
    now = 1_700_000_000.0
    date = email.utils.formatdate(now + 90, usegmt=True)
    forms = {"7": 7.0, "0.25": 0.25, "-3": 0.0, date: 90.0, "soon": None, "nan": None}
    assert {value: openai_http._retry_after_s(value, now) for value in forms} == forms
    assert openai_http._retry_after_s(None, now) is None


UNUSABLE = {
    "empty text": (answer(""), "empty text"),
    "null text": (answer(None), "empty text"),
    "refusal": (answer(None, refusal="I will not"), "refused: I will not"),
    "refusal in words": (answer("I'm sorry, I can't describe people."), "refused: "),
    "filtered": (answer("a wal", finish="content_filter"), "refused: the server's content filter"),
    "cut off": (answer("a wall of", finish="length"), "cut off after 50 tokens; raise max_new_tokens"),
    "control characters": (answer("a\x07wall"), "U+0007"),
    "endless": (answer("wall " * 3000), "14999 characters"),
}


@pytest.mark.parametrize(("fault", "detail"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_answer_that_is_no_caption_fails_once_and_is_paid_for(fault, detail):
    with CaptionServer(fault) as server:
        answers, ledger = ask(server, count=2, concurrency=1)
    assert detail in answers[0].detail
    assert answers[1] == good(10)
    assert len(server.seen) == 2
    assert ledger.spent()[:3] == (2, 2 * TOKENS_IN, 2 * TOKENS_OUT)


FATAL = {
    "401": (status(401, {"message": "Incorrect API key provided: {authorization}"}), "HTTP 401.*api_key_env"),
    "403": (status(403, "no"), "HTTP 403: no; may this key use this model"),
    "404": (status(404, {"message": "no model seer-1"}), "HTTP 404: no model seer-1; are endpoint"),
    "400": (
        status(400, {"message": "unknown field"}),
        "HTTP 400: unknown field; does the model take pictures",
    ),
    "302": (
        status(302, Location="https://elsewhere/x?token=1"),
        "HTTP 302 to https://elsewhere/x; is it the right",
    ),
    "413": (status(413), "HTTP 413; lower image_side_px"),
    "no money": (
        status(429, {"message": "pay", "code": "insufficient_quota"}),
        "HTTP 429: pay; is the account paid",
    ),
}


@pytest.mark.parametrize(("fault", "message"), FATAL.values(), ids=FATAL.keys())
def test_what_would_fail_every_request_stops_at_once(fault, message):
    with CaptionServer(*[fault] * 9) as server, pytest.raises(ConfigError, match=message) as caught:
        ask(server, count=9, concurrency=2, api_key_env="K", environ={"K": KEY})
    assert len(server.seen) <= 3
    assert f"endpoint {server.endpoint}, model seer-1" in str(caught.value)


def test_a_400_is_about_one_picture_where_others_had_answers():
    filtered = status(400, {"message": "not this one", "code": "content_filter"})
    with CaptionServer(filtered, None, status(400, "odd picture")) as server:
        answers, _ = ask(server, count=4, concurrency=1)
    assert answers == [
        Failure("HTTP 400: not this one"),
        good(10),
        Failure("HTTP 400: odd picture"),
        good(30),
    ]


def test_answers_in_flight_are_kept_when_the_job_stops(tmp_path):
    together = threading.Barrier(3)

    def delay_s(seen):
        """All three arrive, then the 401 goes out first."""
        number = next(n for n, one in enumerate(server.seen) if one is seen)
        if number < 3:
            together.wait(5)
        return 0.1 if number in (0, 2) else 0.0

    with CaptionServer(None, status(401), None) as server:
        server.delay_s = delay_s
        with pytest.raises(ConfigError, match="401"):
            ask(server, count=9, concurrency=3, cache_dir=str(tmp_path))
        assert len(server.seen) == 3
        answers, ledger = ask(server, count=9, concurrency=1, cache_dir=str(tmp_path))
    assert answers == [good(10 * n) for n in range(9)]
    assert len(server.seen) == 3 + 7  # the two that came were kept
    assert ledger.spent().requests == 9


def test_no_server_at_all_stops_the_job():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    made = CaptionerConfig(
        captioner="http", endpoint=f"http://127.0.0.1:{port}/v1", model="m", backoff_s=0.001, max_retries=1
    )
    ledger = Ledger(made)
    with pytest.raises(ConfigError, match=f"{port}/v1: no connection .*, 2 times; is the server running"):
        Desk(made, HttpCaptioner(made, ledger, {}), ledger).answer([wish(0)])


def test_https_to_an_http_server_stops_the_job():
    with CaptionServer() as server:
        made = config(server, max_retries=0)
        made = dataclasses.replace(made, endpoint=made.endpoint.replace("http:", "https:"))
        ledger = Ledger(made)
        with pytest.raises(ConfigError, match="no secure connection"):
            Desk(made, HttpCaptioner(made, ledger, {}), ledger).answer([wish(0)])


def test_max_cost_stops_and_a_higher_one_goes_on(tmp_path):
    settings = {"price_in": 1000.0, "concurrency": 1, "cache_dir": str(tmp_path)}  # an answer costs 1
    with CaptionServer() as server:
        with pytest.raises(ConfigError, match="max_cost 3 is spent: 3 for 3 answers"):
            ask(server, count=8, max_cost=3.0, **settings)
        assert len(server.seen) == 3
        answers, ledger = ask(server, count=8, max_cost=8.0, **settings)
        assert len(server.seen) == 8
        assert answers == [good(10 * n) for n in range(8)]
        assert ledger.spent() == Spending(8, 8 * TOKENS_IN, 8 * TOKENS_OUT, pytest.approx(8.0))
        assert ask(server, count=8, max_cost=8.0, **settings)[0] == answers  # all kept: nothing more to pay
        assert len(server.seen) == 8


def test_requests_keep_the_pace(tmp_path):
    """Turns lie 50 ms apart, and no request comes before its turn."""
    ticks, turns = threading.local(), []

    class Noting(Ledger):
        def __init__(self, settings):
            super().__init__(settings, clock=self.tick)

        def tick(self):
            ticks.last = time.monotonic()
            return ticks.last

        def turn_s(self):
            wait_s = super().turn_s()
            turns.append(ticks.last + wait_s)
            return wait_s

    with CaptionServer() as server:
        ask(
            server,
            count=6,
            concurrency=6,
            ledger_class=Noting,
            cache_dir=str(tmp_path),
            requests_per_minute=1200.0,
        )
    assert np.diff(sorted(turns)).min() > 0.05 - 1e-6
    late = np.array(sorted(seen.at_s for seen in server.seen)) - sorted(turns)
    assert late.min() > -0.002


def test_cost_needs_counted_tokens():
    with CaptionServer(answer("a wall", usage=False)) as server:
        assert ask(server)[0] == [Reply("a wall")]
    with (
        CaptionServer(answer("a wall", usage=False)) as server,
        pytest.raises(ConfigError, match="count no tokens"),
    ):
        ask(server, price_in=1.0)


def test_the_servers_word_on_its_version():
    with CaptionServer(answer("a wall", model="seer-1-2026-02-01")) as server:
        assert ask(server)[0][0].revision == "seer-1-2026-02-01"
    with CaptionServer(answer("a wall", model="seer-1-2026-02-01")) as server:
        assert ask(server, model_revision="mine")[0][0].revision == "mine"


def test_the_key_is_shown_nowhere(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    echo = {"message": "bad key {authorization} given"}
    shown = []
    for faults in ([status(401, echo)], [status(500, echo)] * 3, [status(400, "what is {authorization}?")]):
        with CaptionServer(*faults) as server:
            try:
                shown.append(
                    ask(
                        server, api_key_env="K", environ={"K": KEY}, cache_dir=str(tmp_path / str(len(shown)))
                    )
                )
            except ConfigError as error:
                shown.append(error)
            assert KEY in server.seen[0].headers["Authorization"]
    everything = [str(shown), repr(shown), caplog.text, *capsys.readouterr()]
    everything += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert "[key]" in everything[0]
    assert not any(KEY in text for text in everything)
    for bad in ("", "two words", "caf\u00e9"):
        with CaptionServer() as server, pytest.raises(ConfigError, match="api_key_env K") as caught:
            ask(server, api_key_env="K", environ={"K": bad})
        assert not bad or bad not in str(caught.value)


def test_back_off_doubles():
    with CaptionServer(*[status(500)] * 4) as server:
        answers, _ = ask(server, max_retries=4, backoff_s=0.02)
    assert answers == [good()]
    waits = np.diff([seen.at_s for seen in server.seen])
    assert all(wait >= 0.02 * 2**number * 0.5 for number, wait in enumerate(waits))
