"""Prompts, checks of replies, settings, the ledger and the desk; the captioners themselves have files of their own."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from megatron_nucleus.data.curation.captioners import desk, prompts
from megatron_nucleus.data.curation.captioners.desk import Desk, Wish
from megatron_nucleus.data.curation.captioners.ledger import FILE_NAME, Ledger, Spending
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply, checked
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.data.curation.captions import LENGTH_CLASSES
from megatron_nucleus.utils.errors import ConfigError, DataError

OWN = "/nowhere/mine.py:Mine"  # a captioner kind that needs no further settings


class Echo:
    """Answers with the prompt's length, size of the picture and how often it was asked, last request first."""

    name, revision = "echo", "7"

    def __init__(self):
        self.asked = []

    def caption(self, requests):
        for number in reversed(range(len(requests))):
            self.asked.append(requests[number])
            yield number, Reply(f"{requests[number].length} {requests[number].picture.size}", 10, 2)


def wish(shade=0, size=(64, 48), task="synthesise", length="short", caption=None):
    return Wish(f"{shade:064x}", lambda: Image.new("RGB", size, (shade,) * 3), task, length, caption)


def test_prompts_hold_their_class_and_the_caption_and_nothing_open():
    seen = set()
    for task in prompts.TASKS:
        for length in LENGTH_CLASSES:
            caption = "a {dog} </b> {0} %s" if task == "refine" else None
            text = prompts.render(task, length, caption)
            assert prompts.LENGTHS[length] in text
            assert "{caption}" not in text
            assert (caption or "") in text
            seen.add(prompts.prompt_hash(task, length))
    assert len(seen) == 6
    # Stored in data sets: a changed prompt must change it, an unchanged one must not.
    assert prompts.prompt_hash("synthesise", "short") == "55a5965b53a3e86f"
    with pytest.raises(ValueError, match="refine"):
        prompts.render("refine", "short", None)
    with pytest.raises(ValueError, match="synthesise"):
        prompts.render("synthesise", "short", "a dog")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "empty text"),
        (" \n\t ", "empty text"),
        ("word " * 2001, "10004 characters, limit 10000"),
        ("a dog\x00", "U+0000"),
        ("a\x1bdog", "U+001B"),
        ("a dog \ud800", "U+D800"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I’m sorry, no.", "refused"),
        ("As an AI, I cannot see.", "refused"),
    ],
)
def test_what_is_no_caption_fails_with_its_reason_and_its_cost(text, detail):
    failure = checked(Reply(text, 5, 6))
    assert isinstance(failure, Failure)
    assert detail in failure.detail
    assert failure[1:] == (5, 6)


def test_a_good_reply_only_loses_white_space():
    good = Reply("  A dog that cannot swim,\n sorry to say.\r\n\tÜber “x” 犬 ", 1, 2, "r")
    assert checked(good) == Reply("A dog that cannot swim, sorry to say. Über “x” 犬", 1, 2, "r")
    assert (
        checked(Reply("a dog and", 1, 400, complete=False)).detail
        == "cut off after 400 tokens; raise max_new_tokens"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captioner": "htp"}, "did you mean http"),
        ({"captioner": "http", "model": "m"}, "captioner http needs endpoint"),
        ({"captioner": "http", "endpoint": "http://h/v1"}, "captioner http needs model"),
        ({"captioner": "transformers"}, "captioner transformers needs model"),
        ({"captioner": "none", "endpoint": "http://h/v1"}, "endpoint is for captioner http, not none"),
        ({"captioner": "http", "model": "m", "endpoint": "h:80/v1"}, "give a URL"),
        ({"captioner": "http", "model": "m", "endpoint": "http://h/v1/chat/completions"}, "which is added"),
        ({"image_side_px": 8}, "image_side_px 8: at least 32"),
        ({"timeout_s": 0.0}, "timeout_s 0.0: more than 0"),
        ({"max_cost": 1.0, "cache_dir": "c"}, "max_cost 1: give price_in"),
        ({"max_cost": 1.0, "price_in": 1.0}, "max_cost is a limit for all workers together: set cache_dir"),
        ({"requests_per_minute": 5.0}, "requests_per_minute is a limit for all workers"),
        ({"price_out": -1.0}, "price_out -1.0: 0 or more"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        CaptionerConfig(**settings)


@pytest.mark.parametrize(
    "url", ["http://me:secret1@h/v1", "https://h/v1?key=secret1", "http://h/#secret1", "http://[secret1"]
)
def test_a_key_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        CaptionerConfig(captioner="http", model="m", endpoint=url)
    assert "secret1" not in str(caught.value)


def test_execution_names_knobs():
    assert set(CaptionerConfig.EXECUTION) < {field.name for field in dataclasses.fields(CaptionerConfig)}


def test_pace_of_two_workers_adds_up(tmp_path):
    now = [1000.0]
    settings = CaptionerConfig(cache_dir=str(tmp_path), requests_per_minute=120.0, tokens_per_minute=6000.0)
    one, two = (Ledger(settings, clock=lambda: now[0]) for _ in range(2))
    assert [one.turn_s(), two.turn_s(), one.turn_s()] == [0.0, 0.5, 1.0]
    now[0] += 10  # the queue is long over, and unused turns do not pile up
    assert [two.turn_s(), two.turn_s()] == [0.0, 0.5]
    one.record("k", Failure("no", 100, 50))  # 150 tokens earn themselves in 1.5 s
    two.record("k", Failure("no", 0, 50))
    assert one.turn_s() == pytest.approx(2.0)
    one.pause(30.0)
    two.pause(5.0)
    assert [one.paused_s(), two.paused_s()] == [30.0, 30.0]
    now[0] += 31
    assert two.paused_s() == 0.0


def test_spending_is_summed_over_workers_and_stops_at_the_limit(tmp_path):
    settings = CaptionerConfig(
        cache_dir=str(tmp_path), price_in=2.0, price_out=10.0, max_cost=0.0100, captioner=OWN
    )
    one, two = Ledger(settings), Ledger(settings)
    one.record("a", Reply("text", 1000, 100))  # 0.002 + 0.001
    two.record("b", Failure("empty text", 1000, 200))  # 0.002 + 0.002
    two.check_budget()
    assert one.spent() == Spending(2, 2000, 300, pytest.approx(0.007))
    one.record("c", Reply("text", 1500, 0))
    with pytest.raises(ConfigError, match="max_cost 0.01 is spent: 0.01 for 3 answers.*raise max_cost"):
        two.check_budget()
    assert (two.find("a"), two.find("b")) == (Reply("text", 1000, 100), None)
    later = Ledger(dataclasses.replace(settings, max_cost=0.02))
    later.check_budget()


def test_kill_in_the_middle_loses_nothing_that_was_recorded(tmp_path):
    """A process records answers until it is killed while it holds an open transaction."""
    code = f"""
        import os, signal
        from megatron_nucleus.data.curation.captioners.ledger import Ledger
        from megatron_nucleus.data.curation.captioners.protocol import Reply
        from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
        ledger = Ledger(CaptionerConfig(cache_dir={str(tmp_path)!r}))
        for number in range(20):
            ledger.record(f"key{{number}}", Reply(f"text {{number}}", number, 1))
        with ledger._transaction() as db:
            db.execute("INSERT INTO answers VALUES ('torn', 'half', 1, 1, NULL)")
            db.execute("UPDATE sums SET requests = 99")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(CaptionerConfig(cache_dir=str(tmp_path)))
    assert [ledger.find(f"key{n}") for n in range(20)] == [Reply(f"text {n}", n, 1) for n in range(20)]
    assert ledger.find("torn") is None
    assert ledger.spent()[:2] == (20, 190)
    ledger.record("torn", Reply("whole"))
    assert ledger.find("torn") == Reply("whole")


def test_a_damaged_or_unwritable_ledger_is_named(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=f"{FILE_NAME}: damaged.*remove it"):
        Ledger(CaptionerConfig(cache_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="cache_dir .*name another folder"):
        Ledger(CaptionerConfig(cache_dir=str(tmp_path / FILE_NAME / "below")))


def test_without_a_folder_no_answer_is_kept():
    ledger = Ledger(CaptionerConfig())
    ledger.record("a", Reply("text", 3, 4))
    assert ledger.find("a") is None
    assert ledger.spent() == Spending(1, 3, 4, 0.0)


def test_the_desk_keeps_order_and_asks_once_per_different_wish(tmp_path):
    settings = CaptionerConfig(captioner=OWN, cache_dir=str(tmp_path), image_side_px=32)
    echo, ledger = Echo(), Ledger(settings)
    one = Desk(settings, echo, ledger)
    wishes = [wish(1), wish(2, (20, 10)), wish(1, length="medium"), wish(3, task="refine", caption="a dog")]
    expected = ["short (32, 24)", "short (20, 10)", "medium (32, 24)", "short (32, 24)"]
    assert [answer.text for answer in one.answer(wishes)] == expected
    assert len(echo.asked) == 4
    undecodable = [w._replace(picture=lambda: pytest.fail("a kept answer needs no picture")) for w in wishes]
    assert [answer.text for answer in one.answer(undecodable)] == expected
    assert len(echo.asked) == 4
    # Anything that a captioner sees makes a new wish.
    one.answer([wish(9), wish(1, length="detailed"), wish(3, task="refine", caption="a cat")])
    Desk(dataclasses.replace(settings, image_side_px=40), echo, ledger).answer([wish(1)])
    echo.revision = "8"
    one.answer([wish(1)])
    assert len(echo.asked) == 9
    assert ledger.spent()[:3] == (9, 90, 18)


def test_a_failed_answer_is_asked_for_again(tmp_path):
    class Moody(Echo):
        def caption(self, requests):
            self.asked += requests
            yield from ((n, Reply("" if len(self.asked) == 1 else "fine")) for n in range(len(requests)))

    settings = CaptionerConfig(captioner=OWN, cache_dir=str(tmp_path))
    one = Desk(settings, Moody(), Ledger(settings))
    assert [one.answer([wish(1)])[0] for _ in range(3)] == [
        Failure("empty text"),
        Reply("fine"),
        Reply("fine"),
    ]
    assert len(one.captioner.asked) == 2


def test_answers_that_came_before_an_error_are_kept(tmp_path):
    class Dying(Echo):
        def caption(self, requests):
            yield 1, Reply("second", 1, 1)
            raise ConfigError("the key was revoked")

    settings = CaptionerConfig(captioner=OWN, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="revoked"):
        Desk(settings, Dying(), Ledger(settings)).answer([wish(1), wish(2)])
    echo = Echo()
    assert [a.text for a in Desk(settings, echo, Ledger(settings)).answer([wish(1), wish(2)])][1] == "second"
    assert len(echo.asked) == 1


def test_a_captioner_that_forgets_a_request_is_a_bug():
    class Forgetful(Echo):
        def caption(self, requests):
            yield 0, Reply("first")

    settings = CaptionerConfig(captioner=OWN)
    with pytest.raises(AssertionError, match="echo left 1 requests unanswered"):
        Desk(settings, Forgetful(), Ledger(settings)).answer([wish(1), wish(2)])


def test_a_captioner_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from megatron_nucleus.data.curation.captioners.protocol import Reply\n"
        "class Mine:\n"
        "    name, revision = 'mine', '1'\n"
        "    def __init__(self, settings, ledger): self.side = settings.image_side_px\n"
        "    def caption(self, requests):\n"
        "        for n, r in enumerate(requests): yield n, Reply(f'{r.length} {self.side} {r.picture.size}')\n"
    )
    settings = CaptionerConfig(captioner=f"{file}:Mine", image_side_px=50)
    mine = desk.open_desk(settings)
    assert mine.answer([wish(1, (100, 80))]) == [Reply("short 50 (50, 40)")]
    assert desk.open_desk(settings) is mine
    before = desk.identity(settings)
    file.write_text(file.read_text() + "# changed\n")
    assert desk.identity(settings) != before
    with pytest.raises(ConfigError, match="has no Other"):
        desk.open_desk(CaptionerConfig(captioner=f"{file}:Other"))
    with pytest.raises(ConfigError, match="no such file"):
        desk.open_desk(CaptionerConfig(captioner=f"{tmp_path}/none.py:Other"))
    assert desk.open_desk(CaptionerConfig()) is None
