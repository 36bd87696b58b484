"""The report page: what is in it, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probe.assemble import ALWAYS
from probe.errors import ProbeError
from probe.site import SEGMENTS, Fate
from probe.timing import PHASES
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable, open_trace
from probe.views import report_data as data
from probe.views.report import write_report

if os.environ.get("CI") != "true":  # there, a missing library is a failure
    pytest.importorskip("plotly", reason="a report needs Plotly: pip install 'dmllm-probe[report]'")

MASK = 6
NASTY = "</script><script>document.title='broken'</script><b>&amp; “who”?\n<img src=x onerror=alert(1)>"
LAYERS, POSITIONS, VISUAL = 3, 5, 4 + 16
SIGNALS = [
    Variable("attention_mass", ("step", "layer", "segment", "segment_key"), "1", "attention mass"),
    Variable("visual_importance", ("step", "layer", "visual"), "1", "attention received"),
    Variable("confidence", ("step", "position"), "1", "confidence"),
    Variable("entropy", ("step", "position"), "nat", "entropy"),
]


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def boxes() -> tuple[np.ndarray, np.ndarray]:
    """An overview of 2 x 2 tokens, four tiles of 2 x 2 tokens each, as float32 shares of the picture."""
    out, views = [], []
    for n, view in ((2, 0), (4, 1)):
        for y in range(n):
            for x in range(n):
                out.append((x / n, y / n, (x + 1) / n, (y + 1) / n))
                views.append(view + (2 * (y // 2) + x // 2 if view else 0))
    return np.array(out, np.float32), np.array(views, np.int16)


def arrays(steps: int, seed: int, *, visual: int, pruned: bool, signals: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    fate = np.full((steps, LAYERS, visual), int(Fate.KEPT), np.uint8)
    if pruned and visual:
        fate[steps // 2 :, :, 1::2] = int(Fate.DROPPED)
        fate[steps // 2 :, -1, :4] = int(Fate.MERGED)
    written = np.arange(POSITIONS) % steps
    token = np.where(written[None] <= np.arange(steps)[:, None], 40 + np.arange(POSITIONS)[None], MASK)
    box, view = boxes()
    known = {
        "token": token, "commit_step": written, "nominal_step": np.arange(steps), "block": np.zeros(steps, int),
        "visual_kept": fate, "visual_tokens": (fate == 1).sum(-1), "visual_box": box[:visual],
        "visual_view": view[:visual], "visual_role": np.ones(visual, int),
        "seconds": rng.random((steps, len(PHASES))), "flops": 1e9 * rng.random((steps, len(PHASES))),
    }  # fmt: skip
    for variable in ALWAYS:
        if not variable.dims:
            known[variable.name] = np.array(12) if variable.dtype == "int32" else np.array(0.5 + rng.random())
    known["confidence"] = np.where(written[None] >= np.arange(steps)[:, None], rng.random((steps, POSITIONS)), np.nan)
    if signals:
        known["attention_mass"] = rng.dirichlet(np.ones(len(SEGMENTS)), (steps, LAYERS, 1))
        known["visual_importance"] = np.where(fate == 1, rng.random(fate.shape) ** 4, np.nan)
        known["entropy"] = known["confidence"] * 2
    return known


def make(
    path: Path, recipe: str, *, pruned: bool = False, signals: bool = True, n: int = 4, partial: bool = False
) -> Path:
    """A trace of `n` samples: 1 fails, 2 has no picture, 3 has other questions' markup in its answer."""
    header = TraceHeader(
        recipe, f"schema: 1\nname: {recipe}\nabout: '<i>{NASTY!r}'\n", "5eed", "miniature", dtype="float32",
        device="cpu", created="2026-01-01T00:00:00+00:00", coords={
            "phase": PHASES, "corner": ["x0", "y0", "x1", "y1"],
            **({"segment": ["answer"], "segment_key": list(SEGMENTS)} if signals else {}),
        },
    )  # fmt: skip
    declared = [*ALWAYS, *(SIGNALS if signals else SIGNALS[2:3])]
    try:
        with TraceWriter(path, header, declared) as writer:
            for i in range(n):
                if i == 1:
                    writer.write(SampleRecord(i, "s1", "vqa", "Which?", failed="the picture <x> cannot be read"))
                    continue
                held = arrays(4 + i, 10 * i + pruned, visual=0 if i == 2 else VISUAL, pruned=pruned, signals=signals)
                said = "<b>" if i == 3 else f"answer {i}"
                writer.write(
                    SampleRecord(
                        i, f"s{i}", "vqa", NASTY if i == 0 else f"Why {i}?", (f"answer {i}",), said, "exact",
                        float(said.startswith("answer")) - 0.25 * pruned, arrays=held,
                        picture=None if i == 2 else picture(),
                    )
                )  # fmt: skip
            if partial:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        return path.with_name(path.name + ".partial")
    return path


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("report")
    return make(folder / "prune.trace.h5", "prune", pruned=True), make(folder / "base.trace.h5", "prune/baseline")


@pytest.fixture(scope="module")
def page(traces: tuple[Path, Path]) -> Path:
    return write_report(traces, traces[0].with_name("report.html"))


def unpacked(page: Path, i: int) -> tuple[dict[str, Any], bytes]:
    text = re.search(rf"id='payload-{i}'>([^<]+)<", page.read_text(encoding="utf-8"))
    assert text is not None
    content = gzip.decompress(base64.b64decode(text[1]))
    size = int(content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def array(described: dict[str, Any], blob: bytes) -> np.ndarray:
    shape, at, kind = described["shape"], described["at"], described["kind"]
    n = int(np.prod(shape))
    if kind == "u1":
        return np.frombuffer(blob, np.uint8, n, at).reshape(shape)
    planes = np.frombuffer(blob, np.uint8, 4 * n, at).reshape(4, n)
    return np.ascontiguousarray(planes.T).view("<f4" if kind == "f4" else "<i4").reshape(shape)


# ------------------------------------------------------------------ the file


def test_packed_numbers_are_those_of_the_trace(page: Path, traces: tuple[Path, Path]) -> None:
    sample, blob = unpacked(page, 0)
    for side, path in zip(sample["sides"], reversed(traces), strict=True):  # the baseline comes first
        with open_trace(path) as trace:
            for panel in ("importance", "slots"):
                for name, described in side[panel].items():
                    np.testing.assert_allclose(array(described, blob), trace.row(name, 0), rtol=1e-4)
            for name in ("token", "visual_kept", "commit_step"):
                np.testing.assert_array_equal(array(side[name], blob), trace.row(name, 0))
            mass = trace.row("attention_mass", 0).reshape(4, LAYERS, -1)
            np.testing.assert_allclose(array(side["maps"]["attention_mass"], blob), mass, rtol=1e-4)


def test_rounding_keeps_four_digits_and_what_is_no_number() -> None:
    values = np.array([0, 1, -1, 1 / 3, 1e-30, 3.4e38, np.nan, np.inf, -np.inf, 1e-42], np.float32)
    np.testing.assert_allclose(data.rounded(values), values, rtol=6.2e-5, atol=1e-40)


def test_a_grid_per_set_of_views_that_do_not_overlap() -> None:
    box, view = boxes()
    overview, tiles = data.grids(box, view, np.ones(len(box), int))
    assert (overview["label"], overview["tokens"], tiles["label"], tiles["tokens"]) == ("overview", 4, "tiles", 16)
    assert overview["cell"].tolist() == [[0, 1], [2, 3]]
    assert tiles["cell"].ravel().tolist() == list(range(4, 20))
    assert data.grids(box[:0], view[:0], np.zeros(0, int)) == []
    nowhere = data.grids(np.full_like(box, np.nan), view, np.ones(len(box), int))
    assert nowhere == []


def test_same_traces_same_page_and_escaped_texts(page: Path, traces: tuple[Path, Path], tmp_path: Path) -> None:
    again = write_report(traces, tmp_path / "again.html").read_bytes()
    assert again == page.read_bytes()
    text = again.decode()
    for markup in ("<script>document.title", "<img src=x", "<b>&amp; “who”"):
        assert markup not in text
    assert text.count("<script>") == 2 and "&lt;/script&gt;" in text


def test_only_its_own_scripts_may_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1] and "unsafe-eval" not in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]
    assert "'unsafe-inline'" not in policy[1].split("style-src")[0]
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text.replace(scripts[0], ""))


def test_a_page_says_what_failed_and_what_is_unfinished(tmp_path: Path) -> None:
    partial = make(tmp_path / "cut.trace.h5", "cut", partial=True)
    text = write_report([partial], tmp_path / "cut.html", samples=2).read_text(encoding="utf-8")
    assert "the run has not finished" in text and "1 of 4 samples failed" in text
    assert "The first 2 of 4 samples" in text and "failed: the picture &lt;x&gt; cannot be read" in text


def test_an_odd_trace_has_a_page_too(shard: Path, tmp_path: Path) -> None:
    text = write_report([shard], tmp_path / "odd.html").read_text(encoding="utf-8")
    assert "fastv on mini" in text and "no such picture" in text


def test_runs_over_different_data_are_refused(traces: tuple[Path, Path], shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="ask different questions in sample 1"):
        write_report([traces[0], shard], tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


def test_mistakes_are_said(traces: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProbeError, match="at least one trace"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(ProbeError, match="at least 1"):
        write_report(traces, tmp_path / "x.html", samples=0)
    with pytest.raises(ProbeError, match="cannot write"):
        write_report(traces, tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ProbeError, match=r"dmllm-probe\[report\]"):
        write_report(traces, tmp_path / "x.html")


def test_words_need_no_weights_and_no_network() -> None:
    words = data.Words("miniature", "")
    from probe.zoo.tokenizer import vocabulary

    known = vocabulary()
    assert (words.of(known.index("green")) or "").strip() == "green"
    assert words.of(known.index("##A")) == "A"
    assert words.of(10**6) is None
    assert data.Words("/no/such/folder", "").of(3) is None
    assert data.Words("owner/never-downloaded", "0" * 40).of(3) is None


def test_fifty_samples_of_the_miniatures_size_stay_small(tmp_path: Path) -> None:
    """Two traces of 50 samples with 17 steps, 6 layers, 192 visual tokens, all random: nothing to compress."""
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(2):
        pack = data.Pack()
        for _ in range(2):
            pack.add(rng.random((17, 6, 192)).astype(np.float32))
            pack.add(rng.random((17, 6, 5)).astype(np.float32))
            pack.add(rng.random((3, 17, 48)).astype(np.float32))
        total += len(pack.text({}))
    assert total / 2 * 50 + 5e6 + 50 * 20e3 < 15e6


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless chromium; without one the tests are skipped, except in CI."""
    found = [shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")]
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None  # type: ignore[assignment]
    if webdriver is None or not all(found):
        why = "no chromium, chromedriver or selenium: apt-get install chromium chromium-driver; pip install selenium"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(found[1])))
    yield driver
    driver.quit()


def until(told: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (value := told()):
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.03)
    return value


def size(browser: Any, width: int, height: int = 900) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def opened(browser: Any, page: Path, width: int = 1280) -> Any:
    size(browser, width)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    until(lambda: browser.execute_script("return document.body.dataset.drawn"))
    return browser


def move(browser: Any, sample: int | None = None, step: int | None = None, layer: int | None = None) -> None:
    """Move controls as a user does: through their events; wait until everything is drawn."""
    script = """
      const [id, value] = arguments, control = document.getElementById(id);
      if (id === "sample") control.selectedIndex = value; else control.value = value;
      control.dispatchEvent(new Event(id === "sample" ? "change" : "input", {bubbles: true}));"""
    for place, (name, value) in enumerate((("sample", sample), ("step", step), ("layer", layer))):
        if value is None:
            continue
        browser.execute_script(script, name, value)
        until(lambda p=place, v=value: (d := drawn(browser))[1:] == ["failed"] or d[p] == str(v))


def drawn(browser: Any) -> list[str]:
    return browser.execute_script("return document.body.dataset.drawn").split()


def chart(browser: Any, name: str, part: int = 0) -> dict[str, Any]:
    """What Plotly was told to draw."""
    script = "const d = document.getElementById(arguments[0]).data[arguments[1]]; return {z: d.z, x: d.x, y: d.y};"
    return browser.execute_script(script, name, part)


def test_nothing_is_fetched_and_nothing_goes_wrong(browser: Any, page: Path) -> None:
    opened(browser, page)
    for i in range(4):
        move(browser, sample=i)
    asked = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert {u.split(":")[0] for u in urls} <= {"file", "data"} and sum(u.startswith("file:") for u in urls) == 1
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert browser.title == "prune on miniature · probe report"


def test_controls_move_the_picture(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, page)
    seen = browser.find_element(By.ID, "picture-1")
    move(browser, sample=0, step=0, layer=0)
    before = (seen.screenshot_as_png, browser.find_element(By.ID, "picture-after-1").text)
    assert "20 kept" in before[1]
    move(browser, step=3)
    after = (seen.screenshot_as_png, browser.find_element(By.ID, "picture-after-1").text)
    assert "10 kept · 10 dropped" in after[1] and after[0] != before[0]
    move(browser, layer=2)
    last = (seen.screenshot_as_png, browser.find_element(By.ID, "picture-after-1").text)
    assert "4 merged" in last[1] and last[0] != after[0]
    shot = last[0]
    for choice in ("fate", "none", "both", "overview"):
        browser.execute_script(f"document.querySelector('input[value={choice}]').click()")
        shot = until(lambda old=shot: (now := seen.screenshot_as_png) != old and now)
    answer = browser.find_element(By.ID, "answer-before-1").text
    move(browser, sample=3, step=0)
    assert browser.find_element(By.ID, "question").text == "Why 3?"
    assert browser.find_element(By.ID, "said-1").text.endswith("<b>")
    assert browser.find_element(By.ID, "answer-before-1").text != answer
    assert browser.find_element(By.CSS_SELECTOR, "tr.chosen .choose").text == "3"
    move(browser, sample=1)
    assert "the picture <x> cannot be read" in browser.find_element(By.ID, "answers").text
    assert not browser.find_element(By.ID, "signals").is_displayed()
    move(browser, sample=2)
    assert "This sample has no picture." in browser.find_element(By.ID, "picture-0").text
    move(browser, sample=0)
    assert NASTY.split("\n")[0] in browser.find_element(By.ID, "question").text


def test_numbers_on_the_page_are_in_the_trace(browser: Any, page: Path, traces: tuple[Path, Path]) -> None:
    opened(browser, page)
    dice = random.Random(4)
    for _ in range(4):
        sample, layer, lane = dice.choice([0, 3]), dice.randrange(LAYERS), dice.randrange(2)
        step = dice.randrange(4 + sample)
        move(browser, sample=sample, step=step, layer=layer)
        with open_trace(traces[1 - lane]) as trace:
            held = {v.name: trace.row(v.name, sample) for v in (*ALWAYS, *SIGNALS)}
        cells = np.array(chart(browser, f"picture-{lane}")["z"], float).ravel()
        np.testing.assert_allclose(cells, held["visual_importance"][step, layer, 4:], rtol=1e-4)
        np.testing.assert_array_equal(
            np.array(chart(browser, f"picture-{lane}", 1)["z"]).ravel(), held["visual_kept"][step, layer, 4:]
        )
        np.testing.assert_allclose(
            np.array(chart(browser, f"tokens-{lane}")["z"], float), held["visual_importance"][step], rtol=1e-4
        )
        sure = np.array(chart(browser, f"answer-{lane}")["z"], float)
        np.testing.assert_allclose(sure, held["confidence"], rtol=1e-4)
        mass = held["attention_mass"][:, :, 0, SEGMENTS.index("visual")]
        np.testing.assert_allclose(np.array(chart(browser, f"map-{lane}")["z"], float), mass.T, rtol=1e-4)
        for part in range(len(SEGMENTS)):
            bars = chart(browser, f"mass-{lane}", part)["x"]
            np.testing.assert_allclose(bars, held["attention_mass"][step, :, 0, part], rtol=1e-4)
        script = "return document.getElementById('curves').children[0].data[arguments[0]].y"
        lines = browser.execute_script(script, lane)
        means = [row[~np.isnan(row)].mean() if not np.isnan(row).all() else np.nan for row in held["confidence"]]
        np.testing.assert_allclose(np.array(lines, float), means, rtol=1e-4)


def test_the_table_of_runs_is_the_mean_of_the_traces(browser: Any, page: Path, traces: tuple[Path, Path]) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, page)
    rows = browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
    heads = [h.text for h in browser.find_elements(By.CSS_SELECTOR, "#runs thead th")]
    assert [r.text.split()[0] for r in rows] == ["baseline", "prune"]
    for row, path in zip(rows, reversed(traces), strict=True):
        shown = dict(zip(heads, (c.text for c in row.find_elements(By.XPATH, "./*")), strict=True))
        with open_trace(path) as trace:
            assert float(shown["score"].split()[0]) == pytest.approx(np.nanmean(trace.array("score")), abs=5e-4)
            ran = [0, 2, 3]
            assert float(shown["seconds"]) == pytest.approx(trace.array("seconds_unrecorded")[ran].mean(), abs=5e-4)
            tokens = np.mean([trace.row("visual_tokens", r).mean() for r in ran])
            assert float(shown["visual tokens"].split()[0]) == pytest.approx(tokens, abs=0.05)
        assert shown["samples"] == "3"


def test_columns_sort_and_numbers_choose(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, page)

    def order() -> list[str]:
        return [b.text for b in browser.find_elements(By.CSS_SELECTOR, "#samples tbody .choose")]

    score = browser.find_element(By.CSS_SELECTOR, "th[data-column='4'] .sort")
    assert order() == ["0", "1", "2", "3"]
    browser.execute_script("arguments[0].click()", score)
    assert order() == ["3", "0", "2", "1"]  # the failed one has no score and comes last
    browser.execute_script("arguments[0].click()", score)
    assert order() == ["0", "2", "3", "1"]
    assert browser.find_element(By.CSS_SELECTOR, "th[data-column='4']").get_attribute("aria-sort") == "descending"
    browser.execute_script("document.querySelector('.choose[data-sample=\"3\"]').click()")
    until(lambda: drawn(browser)[0] == "3")


def test_everything_works_from_the_keyboard(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    visited: dict[str, float] = {}
    for _ in range(24):
        press(Keys.TAB)
        focus = browser.switch_to.active_element
        named = (focus.get_attribute(key) for key in ("id", "name", "class"))
        name = next((n for n in named if n), focus.tag_name)
        visited.setdefault(name, float(focus.value_of_css_property("outline-width").removesuffix("px")))
        if name == "step":
            press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
            until(lambda: drawn(browser)[1] == "2")
        if name == "layer":
            press(Keys.END)
            until(lambda: drawn(browser)[2] == str(LAYERS - 1))
        if name == "paint":
            press(Keys.ARROW_RIGHT)
            assert browser.find_element(By.CSS_SELECTOR, "input[value=fate]").is_selected()
    order = list(visited)
    wanted = ["scroller", "sample", "next", "step", "layer", "paint", "grid", "signal", "sort", "choose"]
    assert [n for n in order if n in wanted] == wanted
    assert all(width >= 2 for width in visited.values()), visited
    browser.execute_script("document.getElementById('next').focus()")
    press(Keys.ENTER)
    until(lambda: drawn(browser)[0] == "1")


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_a_page_fits_its_window(browser: Any, page: Path, width: int) -> None:
    opened(browser, page, width)
    for i in (0, 3):
        move(browser, sample=i)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        boxes = browser.execute_script("""
          const seen = [...document.querySelectorAll("button, select, input, .chart:not(:empty), h2, #runs")];
          return seen.filter((e) => e.offsetParent && !e.closest(".scroller") && !e.closest("#controls"))
            .concat([...document.querySelectorAll("#controls button, #controls select, #controls input")])
            .map((e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; });""")
        for k, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and right <= width + 0.5
            for l2, t2, r2, b2 in boxes[k + 1 :]:
                apart = right <= l2 + 0.5 or r2 <= left + 0.5 or bottom <= t2 + 0.5 or b2 <= top + 0.5
                assert apart, ((left, top, right, bottom), (l2, t2, r2, b2))


def test_traces_without_signals_say_what_records_them(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    bare = make(tmp_path / "bare.trace.h5", "bare", signals=False, n=1)
    opened(browser, write_report([bare], tmp_path / "bare.html"))
    text = browser.find_element(By.ID, "signals").text
    for recipe in ("record/visual_importance.yaml", "record/attention_mass.yaml"):
        assert recipe in text
    assert "20 kept" in text
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []


def test_an_odd_trace_opens(browser: Any, shard: Path, tmp_path: Path) -> None:
    opened(browser, write_report([shard], tmp_path / "odd.html"))
    for i in range(3):
        move(browser, sample=i)
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
