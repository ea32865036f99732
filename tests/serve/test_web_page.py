"""The page in a headless Chromium, over the real application. Skipped where there is no browser."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
sync_api = pytest.importorskip("playwright.sync_api")

import httpx  # noqa: E402
from page_server import NAME, TEMPLATE, PageServer, page_server  # noqa: E402
from playwright.sync_api import Browser, Page, Request, Route, expect  # noqa: E402

from nanokimi import generate  # noqa: E402
from nanokimi.inference.chat import Chat, Talk  # noqa: E402
from nanokimi.inference.options import SamplingOptions  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
PATIENCE = 20_000  # milliseconds: what is waited for comes much sooner, unless the machine is busy with other tests
expect.set_options(timeout=PATIENCE)
SCRIPT = "<script>document.title = 'broken in'</script>"


@pytest.fixture(scope="module")
def base() -> Iterator[PageServer]:
    """A model that continues text."""
    with page_server() as server:
        yield server


@pytest.fixture(scope="module")
def talking() -> Iterator[PageServer]:
    """A model with a chat template."""
    with page_server(TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One window, and what its console complained of."""

    def __init__(self, browser: Browser, server: PageServer, **options: Any) -> None:
        self.server, self.complaints = server, []
        server.stage()
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(server.address)
        expect(self.page.locator("#model")).to_contain_text(NAME)

    def _note(self, message: Any) -> None:
        refused = message.text.startswith("Failed to load resource")  # what the page tells in its own words
        if message.type in ("error", "warning") and not refused:
            self.complaints.append(message.text)

    def choose(self, **settings: float | str) -> None:
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))
            self.page.press(f"#{name}", "Tab")

    def write(self, prompt: str, **settings: float | str) -> None:
        """Continues ``prompt`` to the end, experts included."""
        self.choose(**{"temperature": 0, "max_tokens": 12, **settings})
        self.page.fill("#prompt", prompt)
        self.page.click("#generate")
        self.wait()

    def wait(self) -> None:
        """Until the text has ended and was inspected."""
        expect(self.page.locator("body")).to_have_attribute("data-state", "ready")

    @property
    def text(self) -> str:
        return self.page.evaluate("document.getElementById('text').textContent")

    def greedy(self, prompt: str, max_tokens: int) -> str:
        """What the library writes."""
        return generate(self.server.model, self.server.tokenizer, prompt, max_tokens=max_tokens, temperature=0)

    def inspected(self, ids: list[int]) -> list[dict[str, Any]]:
        """What the server says of the tokens of a text."""
        answer = httpx.post(f"{self.server.address}/v1/inspect", json={"tokens": ids, "top": 5})
        return answer.json()["tokens"]


@pytest.fixture
def visit(browser: Browser, base: PageServer) -> Iterator[Visit]:
    yield from visiting(browser, base)


@pytest.fixture
def talk(browser: Browser, talking: PageServer) -> Iterator[Visit]:
    yield from visiting(browser, talking)


def visiting(browser: Browser, server: PageServer) -> Iterator[Visit]:
    visit = Visit(browser, server)
    yield visit
    visit.context.close()
    assert visit.complaints == []


# ---- text ---------------------------------------------------------------------------------------


def test_the_page_writes_what_the_library_writes(visit: Visit) -> None:
    visit.write("Once upon", max_tokens=40)
    assert visit.text == "Once upon" + visit.greedy("Once upon", 40)
    expect(visit.page.locator("#said")).to_have_text("length reached, 40 tokens")
    expect(visit.page.locator("#figures")).to_contain_text("context 49 of 128".replace(" ", "", 1))


def test_text_appears_while_it_is_written_and_stop_keeps_what_came(visit: Visit) -> None:
    visit.server.stage(seconds=0.03, script=b"a" * 100)
    visit.choose(max_tokens=100)
    visit.page.fill("#prompt", "b")
    visit.page.press("#prompt", "Control+Enter")
    expect(visit.page.locator("#text .token >> nth=4")).to_be_visible()
    expect(visit.page.locator("#generate")).to_have_text("Stop")
    visit.page.click("#generate")
    expect(visit.page.locator("#said")).to_contain_text("stopped")
    visit.wait()
    assert 5 <= visit.text.count("a") < 100
    visit.page.wait_for_timeout(100)  # far less than what is left of the text would take
    assert httpx.get(f"{visit.server.address}/health").json()["running"] == 0


def test_regenerate_begins_where_the_last_text_began_and_continue_where_it_ended(visit: Visit) -> None:
    for button, script, text in (
        ("#generate", b"one,", ">one,"),
        ("#text-continue", b"two,", ">one,two,"),
        ("#text-regenerate", b"TWO,", ">one,TWO,"),
        ("#generate", b"ONE,", ">ONE,"),
    ):
        visit.server.stage(script=script)
        visit.choose(max_tokens=4)
        visit.page.fill("#prompt", ">")
        visit.page.click(button)
        visit.wait()
        assert visit.text == text
    visit.page.click("#text-clear")
    assert visit.text == ""


def test_a_character_that_max_tokens_cut_is_written_anew(visit: Visit) -> None:
    visit.server.stage(script="né".encode())
    visit.write("", max_tokens=2)
    assert visit.text.endswith("n")
    visit.server.stage(script="é".encode())
    visit.page.click("#text-continue")
    visit.wait()
    assert visit.text.endswith("né")


def test_the_same_seed_writes_the_same_text_and_no_seed_another(visit: Visit) -> None:
    visit.write("x", temperature=1.5, top_p=1, seed=7)
    first = visit.text
    visit.page.click("#text-regenerate")
    visit.wait()
    assert visit.text == first
    visit.choose(seed="")
    visit.page.click("#text-regenerate")
    visit.wait()
    assert visit.text != first


def test_a_stop_string_ends_the_text(visit: Visit) -> None:
    visit.server.stage(script=b"one\ntwo\nthree")
    visit.choose(stop="\\ntw")
    visit.write("0 ")
    assert visit.text == "0 one"
    expect(visit.page.locator("#said")).to_contain_text("ended")


def test_an_empty_prompt_starts_a_document(visit: Visit) -> None:
    visit.write("", max_tokens=6)
    assert visit.text == visit.greedy("", 6)
    visit.page.locator("#text .token >> nth=0").click()
    expect(visit.page.locator("#panel h2")).to_have_text("<|endoftext|>")


def test_characters_of_several_tokens_are_whole(visit: Visit) -> None:
    visit.server.stage(script="né 😀!".encode())
    visit.write("é日", max_tokens=9)
    assert visit.text == "é日né 😀!"
    shown = visit.page.locator("#text .token").all_text_contents()
    assert shown == ["", "é", "", "", "日", "n", "", "é", " ", "", "", "", "😀", "!"]


# ---- tokens -------------------------------------------------------------------------------------


def test_a_token_shows_the_alternatives_and_experts_that_the_server_tells(visit: Visit) -> None:
    visit.server.stage(script=b"plain words")
    visit.write("ab ", max_tokens=11)
    visit.page.locator("#text .token >> nth=5").click()
    told = visit.inspected(list(b"ab plain words"))[5]
    panel = visit.page.locator("#panel")
    expect(panel.locator("h2")).to_have_text("a")
    expect(panel.locator(".facts").first).to_contain_text(f"token 6 of 14 · id {ord('a')}")
    shares = panel.locator(".alternative:not(.taken) .share").all_text_contents()
    others = [math.exp(other["logprob"]) for other in told["alternatives"] if other["id"] != ord("a")]
    assert [float(share.strip("<%\u00a0")) for share in shares] == pytest.approx([100 * p for p in others], rel=0.06)
    chosen = panel.locator(".experts li .unseen").all_text_contents()
    assert chosen == [
        f"MoE layer {layer + 1}: experts {', '.join(str(e + 1) for e in experts)}"
        for layer, experts in enumerate(told["experts"])
    ]
    filled = panel.locator(".experts li >> nth=0 >> .chosen").all_text_contents()
    assert sorted(filled) == sorted(str(e + 1) for e in told["experts"][0])


def test_pointing_shows_a_token_and_a_click_keeps_it(visit: Visit) -> None:
    visit.server.stage(script=b"xyz")
    visit.write("ab", max_tokens=3)
    tokens, head = visit.page.locator("#text .token"), visit.page.locator("#panel h2")
    tokens.nth(2).hover()
    expect(head).to_have_text("x")
    tokens.nth(3).click()
    tokens.nth(4).hover()
    expect(head).to_have_text("y")
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator("#panel")).to_be_hidden()


def test_an_alternative_becomes_the_text_and_the_model_goes_on_from_there(visit: Visit) -> None:
    visit.server.stage(script=b"abcdef")
    visit.write("> ", max_tokens=6)
    other = next(a for a in visit.inspected(list(b"> abcdef"))[4]["alternatives"] if 32 < a["id"] < 127)
    visit.page.locator("#text .token >> nth=4").click()
    visit.server.stage(script=b"!?")
    visit.choose(max_tokens=2)
    with visit.page.expect_request("**/v1/completions") as sent:
        visit.page.locator("#panel button.alternative").filter(has_text=other["text"]).first.click()
    visit.wait()
    assert visit.text == f"> ab{other['text']}!?"
    assert json.loads(sent.value.post_data)["prompt"] == list(f"> ab{other['text']}".encode())


def test_an_alternative_of_a_text_that_is_still_written_stops_it(visit: Visit) -> None:
    visit.server.stage(seconds=0.03, script=b"b" * 100)
    visit.choose(max_tokens=100)
    visit.page.fill("#prompt", "a")
    visit.page.click("#generate")
    expect(visit.page.locator("#text .token >> nth=3")).to_be_visible()
    visit.page.locator("#text .token").first.click()
    visit.choose(max_tokens=4)
    visit.page.locator("#panel button.alternative >> nth=0").click()
    expect(visit.page.locator("#said")).to_have_text("length reached, 4 tokens")
    visit.wait()
    expect(visit.page.locator("#text .token")).to_have_count(6)


def test_the_whole_page_works_with_the_keyboard_alone(visit: Visit) -> None:
    visit.server.stage(script=b"xyz")
    visit.choose(max_tokens=3)
    keys = visit.page.keyboard
    visit.page.focus("#prompt")
    keys.type("a b")
    keys.press("Tab")
    keys.press("Enter")
    visit.wait()
    for _ in range(4):  # past Regenerate, Continue and Clear
        keys.press("Tab")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(visit.page.locator("#panel h2")).to_have_text("␣")
    expect(visit.page.locator("#walked")).to_contain_text("token 2 of 6")
    keys.press("End")
    keys.press("Enter")
    keys.press("Tab")
    expect(visit.page.locator("#panel-close")).to_be_focused()
    keys.press("Tab")
    expect(visit.page.locator("button.alternative").first).to_be_focused()
    keys.press("Enter")
    visit.wait()
    assert visit.text.startswith("a bxy")
    assert not visit.text.startswith("a bxyz")


# ---- settings -----------------------------------------------------------------------------------


def test_settings_are_sent_and_remembered_until_they_are_reset(visit: Visit) -> None:
    visit.choose(temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, max_tokens=128, seed=5, stop="a\nb")
    visit.page.reload()
    visit.page.fill("#prompt", "x")
    with visit.page.expect_request("**/v1/completions") as sent:
        visit.page.click("#generate")
    visit.wait()
    body = json.loads(sent.value.post_data)
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop")
    assert [body[name] for name in names] == [0.5, 0.25, 3, 0.125, 128, 5, ["a", "b"]]
    visit.page.click("#reset")
    visit.page.reload()
    expect(visit.page.locator("#temperature")).to_have_value("1")
    expect(visit.page.locator("#temperature-slider")).to_have_value("1")


WRONG = {
    "seed": ("abc", "-5", "1.5", str(2**53)),
    "temperature": ("hot", "2.1", "-1", ""),
    "top_p": ("1.1",),
    "top_k": ("2.5", "-1"),
    "min_p": ("x",),
    "max_tokens": ("0", "129"),
    "stop": ("s" * 201, "\n".join("abcdefghijklmnopq")),
}


@pytest.mark.fault("A20")
def test_a_setting_that_is_wrong_is_said_and_not_sent(visit: Visit) -> None:
    sent: list[str] = []
    visit.page.on("request", lambda request: sent.append(request.url))
    for name, values in WRONG.items():
        field, fault = visit.page.locator(f"#{name}"), visit.page.locator(f"#{name}-fault")
        right = field.input_value()
        for value in values:
            field.fill(value)
            visit.page.click("#generate")
            expect(field).to_be_focused()
            expect(field).to_have_value(value)
            expect(fault).to_have_text(re.compile("whole number from|number from|At most 16"))
        field.fill(right)
        expect(fault).to_be_hidden()
    assert sent == []


@pytest.mark.fault("A20")
def test_a_reload_keeps_the_text_its_tokens_and_what_is_being_written(visit: Visit) -> None:
    visit.server.stage(script=b"xyz")
    visit.write("ab", max_tokens=3)
    visit.page.fill("#prompt", "the next")
    visit.page.reload()
    expect(visit.page.locator("#prompt")).to_have_value("the next")
    expect(visit.page.locator("#figures")).to_contain_text("5 of 128")
    assert visit.text == "abxyz"
    visit.page.locator("#text .token >> nth=3").click()
    expect(visit.page.locator("#panel .experts li").first).to_be_visible()
    visit.server.stage(script=b"!!!")
    visit.page.click("#text-continue")
    visit.wait()
    assert visit.text == "abxyz!!!"
    visit.page.click("#text-clear")
    visit.page.reload()
    expect(visit.page.locator("#text-clear")).to_be_disabled()
    assert visit.text == ""


@pytest.mark.fault("A20")
@pytest.mark.parametrize(
    "trouble", ["throw new DOMException('', 'QuotaExceededError')", "if (value.length > 600) throw 0"]
)
def test_storage_that_is_refused_or_full_does_not_break_the_page(visit: Visit, trouble: str) -> None:
    visit.context.add_init_script(
        f"Storage.prototype.put = Storage.prototype.setItem; "
        f"Storage.prototype.setItem = function (name, value) {{ {trouble}; this.put(name, value); }}"
    )
    visit.page.reload()
    visit.server.stage(script=b"xyz")
    visit.write("ab", max_tokens=3)
    assert visit.text == "abxyz"
    visit.page.reload()
    expect(visit.page.locator("#prompt")).to_be_visible()
    assert visit.text == ("" if "Quota" in trouble else "abxyz")


@pytest.mark.fault("A20")
def test_the_line_of_figures_does_not_move_and_the_first_text_has_a_speed(visit: Visit) -> None:
    places = (
        "[...document.querySelectorAll('.status dl, .status dt')].map((e) => JSON.stringify(e.getBoundingClientRect()))"
    )
    before = visit.page.evaluate(places)
    visit.server.stage(script=b"x")
    visit.write("ab", max_tokens=1, seed=2**53 - 1)
    expect(visit.page.locator(".figure-seed dd")).to_have_text(str(2**53 - 1))
    expect(visit.page.locator(".figure-speed dd")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    assert visit.page.evaluate(places) == before


@pytest.mark.fault("A20")
def test_a_page_that_was_opened_before_its_server_waits_for_it(browser: Browser, base: PageServer) -> None:
    page = browser.new_page()
    page.route("**/v1/models", lambda route: route.abort(), times=1)
    page.goto(base.address)
    expect(page.locator("#error")).to_contain_text("out of reach")
    expect(page.locator("#prompt")).to_be_visible()
    expect(page.locator("#error")).to_be_hidden()
    page.close()


# ---- looks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["text", "chat"])
def test_nothing_is_wider_than_a_narrow_phone(browser: Browser, talking: PageServer, mode: str) -> None:
    visit = Visit(browser, talking, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page, box, button = visit.page, *{"text": ("#prompt", "#generate"), "chat": ("#message", "#send")}[mode]
    talking.stage(script=b"long" * 20)
    page.locator("label").filter(has_text=mode.capitalize()).first.tap()
    page.fill(box, "unbroken" * 8)
    page.locator(button).tap()
    visit.wait()
    page.locator("label").filter(has_text="Colour by surprise").tap()
    page.locator(".token:visible >> nth=9").tap()
    expect(page.locator("#panel")).to_be_in_viewport()
    page.evaluate("document.getElementById('sampling').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    visit.context.close()
    assert visit.complaints == []


@pytest.mark.fault("A20")
def test_a_window_of_1280_by_800_does_not_scroll_and_keeps_the_composer_in_sight(talk: Visit) -> None:
    talk.page.set_viewport_size({"width": 1280, "height": 800})
    heights = "[document.documentElement.scrollHeight, document.querySelector('main').scrollHeight <= "
    heights += "document.querySelector('main').clientHeight]"
    assert talk.page.evaluate(heights) == [800, True]
    talk.server.stage(script=b"\n" * 60)
    talk.choose(max_tokens=60)
    talk.page.fill("#message", "Hi")
    talk.page.press("#message", "Enter")
    talk.wait()
    assert talk.page.evaluate(heights) == [800, False]
    expect(talk.page.locator("#send")).to_be_in_viewport(ratio=1)


@pytest.mark.fault("A20")
def test_the_panel_of_a_phone_is_a_drawer_that_opens_when_asked(browser: Browser, talking: PageServer) -> None:
    visit = Visit(browser, talking, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    talking.stage(script=b"some words")
    visit.page.fill("#message", "Hi")
    visit.page.tap("#send")
    visit.wait()
    visit.page.locator(".message.assistant .token >> nth=3").tap()
    expect(visit.page.locator("#panel h2")).to_be_in_viewport()
    assert visit.page.locator("#panel").bounding_box()["height"] < 844 / 5
    visit.page.locator("#panel-more summary").tap()
    expect(visit.page.locator("#panel .alternative").first).to_be_in_viewport()
    visit.context.close()
    assert visit.complaints == []


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (ground, colour) => {
    for (const fill of [ground, colour]) { canvas.fillStyle = fill; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
  return PAIRS.map(([ink, ground]) => {
    const [a, b] = [light(value("--card"), value(ground)), light(value(ground), value(ink))].sort((x, y) => y - x);
    return [ink, ground, (a + 0.05) / (b + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_the_contrast_of_wcag_aa(browser: Browser, base: PageServer, scheme: str) -> None:
    visit = Visit(browser, base, color_scheme=scheme)
    grounds = ["--ground", "--card", "--soft"] + [f"--surprise-{i}" for i in range(1, 6)]
    pairs = [["--ink", ground] for ground in grounds] + [
        ["--faint", "--ground"],
        ["--faint", "--card"],
        ["--faint", "--soft"],
    ]
    pairs += [["--accent-ink", "--accent"], ["--accent", "--card"], ["--bad", "--bad-ground"]]
    ratios = visit.page.evaluate(CONTRAST.replace("PAIRS", json.dumps(pairs)))
    assert [found for found in ratios if found[2] < 4.5] == []
    red = visit.page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")[0]
    assert (int(red) > 128) == (scheme == "light")
    visit.context.close()


# ---- what must not happen -----------------------------------------------------------------------


@pytest.mark.fault(99)
def test_markup_in_prompt_and_text_stays_text(visit: Visit) -> None:
    visit.server.stage(script=SCRIPT.encode())
    visit.write(SCRIPT, max_tokens=len(SCRIPT))
    assert visit.text == SCRIPT + SCRIPT
    visit.page.locator("#text .token >> nth=0").click()
    assert visit.page.title() == f"{NAME} · nanokimi"
    assert visit.page.locator("script").count() == 1


@pytest.mark.fault(99)
def test_markup_in_a_single_token_stays_text(visit: Visit) -> None:
    markup = "<img/src=x><b>"
    scores = {"tokens": [markup], "token_logprobs": [-1], "top_logprobs": [{markup: -1}], "text_offset": [0]}
    choice = {"text": markup, "logprobs": scores, "finish_reason": "stop", "token_ids": [1], "prompt_token_ids": [2]}
    events = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    visit.page.route("**/v1/completions", answering(content_type="text/event-stream", body=events))
    other = {"id": 3, "text": markup, "logprob": -2}
    seen = [{"id": i, "text": markup, "logprob": -1, "alternatives": [other], "experts": [[0]]} for i in (2, 1)]
    visit.page.route("**/v1/inspect", answering(json={"tokens": seen}))
    visit.write(markup)
    assert visit.page.locator("#text .token").all_text_contents() == [markup, markup]
    visit.page.locator("#text .token >> nth=1").click()
    shown = visit.page.locator("#panel h2, #panel .piece").all_text_contents()
    assert shown == [markup, markup, f"{markup} (this token)"]
    assert visit.page.locator("main img, aside img, b").count() == 0


@pytest.mark.fault(99)
def test_a_policy_forbids_scripts_that_are_not_the_pages_own(visit: Visit) -> None:
    ran = visit.page.evaluate(
        """() => { const s = document.createElement("script"); s.textContent = "window.ran = true";
        document.body.append(s); return Boolean(window.ran); }"""
    )
    assert not ran
    assert "Content Security Policy" in visit.complaints.pop()


@pytest.mark.fault(100)
def test_an_error_in_mid_stream_keeps_the_text_and_is_told_in_one_line(visit: Visit) -> None:
    visit.server.stage(script=b"abcdef", fail_at=4)
    visit.write("> ")
    assert visit.text == "> abcd"
    error = visit.page.locator("#error")
    expect(error).to_contain_text("It did not work: the model's logits are not finite")
    visit.server.stage(script=b"abcdef")
    visit.page.click("#text-regenerate")
    visit.wait()
    expect(error).to_be_hidden()


def answering(**answer: Any) -> Callable[[Route], None]:
    return lambda route: route.fulfill(**answer)


REFUSALS = [
    ({"status": 429, "headers": {"Retry-After": "7"}, "json": {"error": {"message": "full"}}}, "in 7 seconds"),
    ({"status": 401, "json": {"error": {"message": "wrong key"}}}, "its key"),
    ({"status": 400, "json": {"error": {"message": "n 9 is over the limit"}}}, "refused this: n 9 is over"),
    ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "the server answered 502"),
    ({"content_type": "text/event-stream", "body": 'data: {"choices": []}\n\n'}, "broke off"),
]


def test_refusals_and_broken_streams_are_told_in_one_line(visit: Visit) -> None:
    error = visit.page.locator("#error")
    for answer, told in REFUSALS:
        visit.page.route("**/v1/completions", answering(**answer), times=1)
        visit.page.click("#generate")
        expect(error).to_contain_text(told)
        assert "\n" not in error.inner_text()
        expect(visit.page.locator("#generate")).to_have_text("Generate")


def test_a_server_that_is_gone_is_told_in_one_line(visit: Visit) -> None:
    visit.page.route("**/v1/**", lambda route: route.abort())
    visit.page.click("#generate")
    expect(visit.page.locator("#error")).to_contain_text("See whether nanokimi serve still runs")


def test_events_are_read_however_the_network_cuts_them(visit: Visit) -> None:
    events = ": hello\r\n\r\ndata: é😀\r\n\r\ndata: a\ndata: b\n\ndata:[DONE]\n\ndata: cut off"
    read = """async ([bytes, size]) => {
      const { readEvents } = await import("/web/sse.js");
      const body = new ReadableStream({ start(out) {
        for (let i = 0; i < bytes.length; i += size) out.enqueue(new Uint8Array(bytes.slice(i, i + size)));
        out.close();
      } });
      const found = [];
      for await (const data of readEvents(body)) found.push(data);
      return found;
    }"""
    for size in (1, 2, 3, 1000):
        assert visit.page.evaluate(read, [list(events.encode()), size]) == ["é😀", "a\nb", "[DONE]"]


def test_pieces_of_tokens_are_laid_along_their_text(visit: Visit) -> None:
    align = """async ([text, pieces]) => (await import("/web/continuation.js")).align(text, pieces)"""
    for text, pieces, cut in (
        ("a b", ["a", " b"], ["a", " b"]),
        ("é日x", ["�"] * 5 + ["x"], ["", "é", "", "", "日", "x"]),
        ("a😀b😀", ["a", "�", "�", "b", "�", "�"], ["a", "", "😀", "b", "", "😀"]),
        ("", ["<|end|>"], [""]),
    ):
        assert visit.page.evaluate(align, [text, pieces]) == cut


# ---- chat ---------------------------------------------------------------------------------------


def say(talk: Visit, message: str, script: bytes | None = None) -> None:
    talk.server.stage(script=script)
    talk.page.fill("#message", message)
    talk.page.press("#message", "Enter")
    talk.wait()


def requests_of(page: Page) -> list[list[str]]:
    """What was said in each request for a reply, as they come; without the system message."""
    requests: list[list[str]] = []

    def note(sent: Request) -> None:
        if "chat/completions" in sent.url:
            messages = json.loads(sent.post_data or "")["messages"]
            requests.append([message["content"] for message in messages if message["role"] != "system"])

    page.on("request", note)
    return requests


def left_out(page: Page) -> int:
    """How many messages stand above the line."""
    return page.locator(".message:has(~ .edge)").count()


def test_a_base_model_shows_no_chat(visit: Visit) -> None:
    expect(visit.page.locator("#modes")).to_be_hidden()
    expect(visit.page.locator("#prompt")).to_be_visible()
    expect(visit.page.locator("#model")).to_contain_text("continues text · context of 128 tokens")


def test_a_talk_keeps_its_history_and_regenerate_replaces_the_last_reply(talk: Visit) -> None:
    page, replies = talk.page, talk.page.locator(".message.assistant .said")
    expect(page.locator("#model")).to_contain_text("talks in turns")
    talk.choose(max_tokens=4)
    for script, message in ((b"Hi!", "Hello?"), (b"Two.", f"1+1 {SCRIPT}")):
        talk.server.stage(script=script + b"\nuser: ")
        page.fill("#message", message)
        with page.expect_request("**/v1/chat/completions") as sent:
            page.press("#message", "Enter")
        talk.wait()
    history = [("user", "Hello?"), ("assistant", "Hi!\n"), ("user", f"1+1 {SCRIPT}")]
    assert [(m["role"], m["content"]) for m in json.loads(sent.value.post_data)["messages"]] == history
    talk.server.stage(script=b"Three")
    page.click("#chat-regenerate")
    talk.wait()
    assert replies.all_text_contents() == ["Hi!\n", "Thre"]
    assert page.locator(".message.user .said").last.text_content() == f"1+1 {SCRIPT}"
    page.click("#chat-clear")
    expect(page.locator(".message")).to_have_count(0)


def test_a_reply_can_be_inspected_with_all_that_the_model_read(talk: Visit) -> None:
    talk.server.stage(script="né".encode())
    talk.choose(max_tokens=3, system="Be brief.")
    talk.page.fill("#message", "Hi")
    talk.page.click("#send")
    talk.wait()
    prompt = "system: Be brief.\nuser: Hi\nassistant: "
    talk.page.click(".read summary")
    assert "".join(talk.page.locator(".read .token").all_text_contents()) == prompt
    talk.page.locator(".message.assistant .said .token >> nth=0").click()
    told = talk.inspected(list((prompt + "né").encode()))[len(prompt)]
    expect(talk.page.locator("#panel .probability")).to_be_visible()
    words = talk.page.locator("#panel .experts .unseen").first
    expect(words).to_have_text(f"MoE layer 1: experts {', '.join(str(e + 1) for e in told['experts'][0])}")


def test_shift_enter_is_a_new_line_and_escape_stops_the_reply(talk: Visit) -> None:
    talk.server.stage(seconds=0.03, script=b"a" * 60)
    talk.choose(max_tokens=60)
    talk.page.focus("#message")
    talk.page.keyboard.type("a")
    talk.page.keyboard.press("Shift+Enter")
    talk.page.keyboard.type("b")
    assert talk.page.input_value("#message") == "a\nb"
    talk.page.keyboard.press("Enter")
    expect(talk.page.locator(".message.assistant .token >> nth=2")).to_be_visible()
    talk.page.keyboard.press("Escape")
    expect(talk.page.locator("#said")).to_contain_text("stopped")
    talk.wait()
    assert 3 <= len(talk.page.locator(".message.assistant .said").text_content()) < 60


def test_a_reply_that_was_stopped_before_its_first_word_leaves_nothing(talk: Visit) -> None:
    talk.server.stage(seconds=0.5)
    talk.page.fill("#message", "Hi")
    talk.page.press("#message", "Enter")
    talk.page.keyboard.press("Escape")
    expect(talk.page.locator("#said")).to_have_text("stopped")
    expect(talk.page.locator(".message")).to_have_count(0)
    expect(talk.page.locator("#message")).to_have_value("Hi")


@pytest.mark.fault("A20")
def test_a_message_over_the_context_goes_back_and_the_talk_goes_on(talk: Visit) -> None:
    page = talk.page
    talk.choose(max_tokens=3)
    for message in ("Hi", "x" * 200):
        talk.server.stage(script=b"Yes")
        page.fill("#message", message)
        page.press("#message", "Enter")
        talk.wait()
    expect(page.locator("#error")).to_contain_text("has 218 tokens and the model's context holds 128")
    expect(page.locator("#message")).to_have_value("x" * 200)
    page.fill("#message", "Go on")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.press("#message", "Enter")
    talk.wait()
    said = [(m["role"], m["content"]) for m in json.loads(sent.value.post_data)["messages"]]
    assert said == [("user", "Hi"), ("assistant", "Yes"), ("user", "Go on")]
    expect(page.locator("#error")).to_be_hidden()
    page.fill("#message", "a draft")
    page.reload()
    expect(page.locator("#message")).to_have_value("a draft")
    assert page.locator(".message .said").all_text_contents() == ["Hi", "Yes", "Go on", "Yes"]
    page.click("#chat-clear")
    page.reload()
    expect(page.locator("#chat-clear")).to_be_disabled()


@pytest.mark.fault("A20")
def test_a_talk_that_fills_the_context_goes_on_with_the_turns_that_the_terminal_would_read(talk: Visit) -> None:
    page, server, reply = talk.page, talk.server, "abcdefghij" * 2
    talk.choose(max_tokens=20, system="Be brief.")
    nothing_said = Talk(server.tokenizer, server.template, system="Be brief.")
    terminal = Chat(server.model, SamplingOptions(max_tokens=20), io.StringIO(), server.decoder, nothing_said)
    requests = requests_of(page)
    for message, dropped in (
        ("one", 0),
        ("two", 0),
        ("three", 1),  # 125 tokens: the server takes them, but they leave no room for 20 more
        ("4" * 60, 3),  # 182: the server refuses
        ("five", 4),  # the turn before is known to have 117
        ("8" * 87, 5),  # 123 on its own: a short reply is better than none
    ):
        say(talk, message, reply.encode())
        asked = terminal.fit(terminal.talk.asked(message))
        assert requests[-1] == [text for turn in asked.turns for text in turn if text is not None]
        shown = page.locator(".message .said").last.text_content()
        terminal.talk = asked.answered(shown)
        assert shown == reply[: 128 - len(asked.ids())]
        assert left_out(page) == 2 * dropped
    sent = len(requests)
    say(talk, "x" * 92)  # 128 on its own: no room for a single token
    assert requests[sent:] == [["x" * 92]]
    expect(page.locator("#error")).to_contain_text("128 tokens leave no room for a reply: write less")
    expect(page.locator("#message")).to_have_value("x" * 92)
    assert left_out(page) == 10


@pytest.mark.fault("A20")
def test_what_was_left_out_stays_so_after_a_reload_until_the_talk_is_cleared(talk: Visit) -> None:
    page, requests = talk.page, requests_of(talk.page)
    talk.choose(max_tokens=4)
    for message in ("1" * 60, "2" * 60):
        say(talk, message, b"Yes.")
    page.reload()
    expect(page.get_by_text("left out from here up: the context is full")).to_be_visible()
    assert left_out(page) == 2
    say(talk, "Go on", b"Yes.")
    assert requests[-1] == ["2" * 60, "Yes.", "Go on"]
    page.click("#chat-regenerate")
    talk.wait()
    assert requests[-1] == requests[-2]
    page.reload()  # what each turn takes is known still
    sent = len(requests)
    say(talk, "3" * 50)
    assert [len(request) for request in requests[sent:]] == [5, 3]
    page.click("#chat-clear")
    expect(page.locator(".edge")).to_have_count(0)


GAPS = """(message) => {
  const words = document.createRange();
  words.selectNodeContents(message.querySelector("h2"));
  const [inner, outer] = [words.getBoundingClientRect(), message.getBoundingClientRect()];
  return [inner.left - outer.left, outer.right - inner.right];
}"""


@pytest.mark.fault("A20")
def test_a_heading_stands_on_the_side_of_its_reply(talk: Visit) -> None:
    sides = []
    for script in ("Yes", "שלום"):
        talk.choose(max_tokens=len(script.encode()))
        say(talk, "Hi", script.encode())
        left, right = talk.page.locator(".message.assistant").last.evaluate(GAPS)
        sides.append("left" if left < right else "right")
    assert sides == ["left", "right"]


@pytest.mark.fault("A20")
def test_a_reply_stands_again_when_another_one_is_refused(talk: Visit) -> None:
    talk.server.stage(script=b"Yes")
    talk.choose(max_tokens=3)
    talk.page.fill("#message", "Hi")
    talk.page.press("#message", "Enter")
    talk.wait()
    talk.page.route("**/v1/chat/completions", answering(status=429, json={"error": {"message": "full"}}), times=1)
    talk.page.click("#chat-regenerate")
    expect(talk.page.locator("#error")).to_contain_text("busy")
    assert talk.page.locator(".message .said").all_text_contents() == ["Hi", "Yes"]


def test_a_refused_message_can_be_sent_again(talk: Visit) -> None:
    refuse = answering(status=429, headers={"Retry-After": "1"}, json={"error": {"message": "full"}})
    talk.page.route("**/v1/chat/completions", refuse, times=1)
    talk.choose(max_tokens=3)
    talk.page.fill("#message", "Hi")
    talk.page.press("#message", "Enter")
    expect(talk.page.locator("#error")).to_contain_text("busy")
    expect(talk.page.locator(".message")).to_have_count(0)
    talk.page.press("#message", "Enter")
    talk.wait()
    expect(talk.page.locator(".message.assistant")).to_have_count(1)
