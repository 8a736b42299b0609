"""The page of the server in a browser: rows of the task, a conversation, an answer that is stopped, a server that has gone."""

import pytest
from browser import CHROMIUM, Browser
from serving_students import talking_student
from test_serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

TURNS = "[...document.querySelectorAll('.turn')].map(one => one.className + ':' + one.textContent)"
IDLE = "!document.getElementById('send').disabled"
FORM_IN_VIEW = "document.getElementById('chatform').getBoundingClientRect().bottom <= innerHeight + 1"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return talking_student(tmp_path_factory.mktemp("page") / "student.safetensors")


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "browser") as found:
        yield found


def test_rows_of_the_task(file, browser):
    with serving(file) as (server, _):
        browser.open(server)
        browser.wait("!document.getElementById('predict').hidden")
        browser.type("#columns textarea", "a film")
        browser.wait("document.querySelectorAll('.bar').length === 3")
        shares = browser.value(
            "[...document.querySelectorAll('.bar span:last-child')].map(one => parseFloat(one.textContent))"
        )
        assert sum(shares) == pytest.approx(100, abs=0.2)
        assert shares == sorted(shares, reverse=True)
        browser.size(320, 600)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        browser.value("document.querySelector('#columns textarea').value = 'x'.repeat(5000)")
        browser.value("document.getElementById('rowform').requestSubmit()")
        browser.wait("document.getElementById('problem').textContent.includes('cut')")
    assert browser.errors == []


def test_a_conversation(file, browser):
    with serving(file) as (server, process):
        browser.open(server)
        browser.wait("!document.getElementById('tabs').hidden")
        browser.value("document.querySelector('[data-show=chat]').click()")
        browser.size(320, 400)
        for number, text in enumerate(("one", "two"), start=1):
            browser.type("#message", text)
            browser.wait(f"document.querySelectorAll('.turn').length === {2 * number}")
            browser.wait(IDLE)
            assert browser.value(FORM_IN_VIEW)
        kinds = [one.split(":")[0] for one in browser.value(TURNS)]
        assert kinds == ["turn user", "turn assistant"] * 2
        assert browser.value("turns.map(one => one.role)") == ["user", "assistant"] * 2
        browser.type("#message", "x" * 300)  # with this the context of 512 tokens is too small for all turns
        browser.wait("document.querySelectorAll('.turn').length === 6")
        browser.wait(IDLE)
        assert browser.value("turns.length") < 6
        assert browser.value("turns[0].role") == "user"
        # a new conversation in the middle of an answer has nothing of the old one
        browser.type("#message", "four")
        browser.wait("document.querySelectorAll('.turn').length === 8")
        browser.value("document.getElementById('reset').click()")
        browser.wait(IDLE)
        assert browser.value("turns") == []
        assert browser.value(TURNS) == []
        assert browser.errors == []
        process.terminate()
        process.wait(30)
        browser.type("#message", "is anybody there")
        browser.wait("!document.getElementById('problem').hidden")
        browser.wait(IDLE)
        assert browser.value(TURNS) == []
        assert browser.value("document.getElementById('message').value") == "is anybody there"  # it can be sent again
