"""The report: its numbers, what a page may hold, and the page itself in a browser."""

import base64
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import scipy.stats

from masm_jax.evaluation import metrics, report, tables

MODALITIES = ("t1", "t1ce", "t2", "flair")
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
HOSTILE = "<img src=x onerror=alert(1)>\"'&"
END = "</script><script>alert(2)</script>"


def _case(seed, shape=(24, 28, 22)):
    """An ellipsoid of noise with a tumour in it: image, prediction, reference."""
    draw = np.random.default_rng(seed)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    brain = sum(((g - (n - 1) / 2) / (n / 2)) ** 2 for g, n in zip(grid, shape)) < 1

    def tumour(centre):
        radius = np.sqrt(sum((g - c) ** 2.0 for g, c in zip(grid, centre)))
        labels = np.select([radius < 1.5, radius < 3, radius < 5], [1, 3, 2], 0)
        return np.where(brain, labels, 0).astype(np.uint8)

    centre = [n / 2 + draw.uniform(-3, 3) for n in shape]
    reference = tumour(centre)
    prediction = tumour([c + draw.uniform(-1.5, 1.5) for c in centre])
    # Each modality looks different, so that switching them must change the screen.
    image = np.stack([draw.normal(size=shape) * 0.3 + m * np.cos(grid[1] / (m + 1.0)) + reference
                      for m in range(4)])  # fmt: skip
    return np.where(brain, image, 0).astype(np.float16), prediction, reference


def _view(image, prediction, reference, spacing=(2.0, 2.0, 2.0), view_spacing=2.0):
    return report.view(
        image, prediction, reference, spacing=spacing, view_spacing=view_spacing,
        modalities=MODALITIES[: len(image)], regions=REGIONS,
    )  # fmt: skip


def _read(text):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def _rows(case, dice, **more):
    return [{"case": case, "region": r, "dice": d, **more} for r, d in zip(("WT", "TC"), dice)]


def _write(folder, cases=("case-1", "case-2", HOSTILE), views=None, **changes):
    """A report of phantoms; returns its path."""
    rows, lesions, kept = [], [], {}
    for seed, case in enumerate(cases):
        image, prediction, reference = _case(seed)
        kept[case] = _view(image, prediction, reference)
        scores = metrics.evaluate(prediction, reference, (2, 2, 2), styles=("brats2023",))
        for region, values in scores.items():
            own = {"case": case, "region": region}
            lesions += [own | lesion for lesion in values.pop("lesions")]
            rows.append(own | values)
    content = {
        "title": f"Evaluation of {HOSTILE}",
        "summary": tables.summarise(rows),
        "rows": rows,
        "lesions": lesions,
        "views": iter(kept.items()) if views is None else views,
        "pictures": report.distributions(folder / "report", rows),
        "failed": {f"failed {HOSTILE}": f"no such file: /data/{END}"},
        "config": {"seed": 0, "model": {"size": "tiny"}, "data": {"records": f"/data/{END}"}},
        "about": {"run": f"runs/{END}", "step": 10, "device": "cpu", "versions": {"jax": "0.10"}},
        "notes": [f"about {HOSTILE}"],
    }
    report.write(folder / "report.html", **(content | changes))
    return folder / "report.html"


# ---------------------------------------------------------------- numbers


def test_intervals_agree_with_scipy():
    dice = np.random.default_rng(1).beta(8, 2, 40)
    rows = [row for i, d in enumerate(dice) for row in _rows(f"c{i}", (d, 0.5))]
    found = report.intervals(rows)
    expected = scipy.stats.bootstrap(
        (dice,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found["WT"]["dice"] == pytest.approx(list(expected), abs=0.003)
    assert found["TC"]["dice"] == [0.5, 0.5]
    assert report.intervals(rows) == found  # seeded


def test_intervals_leave_out_what_is_not_there():
    rows = [
        {"case": "a", "region": "WT", "dice": 0.5, "hd95": None, "nsd": 1.0, "empty": "both"},
        {"case": "b", "region": "WT", "dice": 0.7, "hd95": 3.0, "nsd": float("nan")},
    ]
    bounds = report.intervals(rows)
    assert list(bounds["WT"]) == ["dice"]
    low, high = bounds["WT"]["dice"]  # of two cases: both draws the one or the other, each 1/4
    assert (low, high) == (0.5, 0.7)


def test_chosen():
    rows = [row for i, d in enumerate((0.3, 0.9, 0.5, 0.7, 0.6)) for row in _rows(f"c{i}", (d, d))]
    rows += _rows("absent", (None, float("nan")))
    assert report.chosen(rows) == [("best", "c1"), ("median", "c4"), ("worst", "c0")]
    assert report.chosen(rows[:4]) == [("best", "c1"), ("worst", "c0")]
    assert report.chosen(rows[:2]) == [("best", "c0")]
    assert report.chosen([]) == []


def test_distributions_write_a_picture_and_its_numbers(tmp_path):
    rows = [row for i in range(5) for row in _rows(
        f"c{i}", (0.5, 0.1 * i), hd95=None if i == 2 else 3.0, nsd=0.4,
        volume_ml=2.0 * i, reference_ml=8.0)]  # fmt: skip
    listed = report.distributions(tmp_path, rows)
    assert [p["png"].name for p in listed] == ["dice.png", "hd95.png", "nsd.png", "volume.png"]
    for picture in listed:
        assert matplotlib.image.imread(picture["png"]).std() > 0
        assert len(picture["csv"].read_text().splitlines()) == 11
    assert (tmp_path / "hd95.csv").read_text().splitlines()[5] == "c2,WT,"


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("view_spacing", [1.0, 2.5, 5.0])
def test_a_view_keeps_places(view_spacing):
    image, prediction, reference = _case(3)
    spacing = np.array([1.0, 1.5, 3.0])
    view = _view(image, prediction, reference, spacing, view_spacing)
    for text, labels in ((view["prediction"], prediction), (view["reference"], reference)):
        scan = _read(text)
        assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
        assert scan.get_data_dtype() == np.uint8
        shown = np.asarray(scan.dataobj)
        places = np.argwhere(np.ones(shown.shape))
        world = nib.affines.apply_affine(scan.affine, places)
        # The voxel of the record that holds each point of the view; on a border it may be either.
        place = world / spacing + 0.5
        clear = (np.abs(place - np.round(place)) > 1e-3).all(1)
        assert clear.sum() > 0.5 * shown.size
        voxel = place[clear].astype(int)
        assert (shown.ravel()[clear] == labels[tuple(voxel.T)]).all()
        # Both grids fill the same box.
        extent = np.array(shown.shape) * scan.header.get_zooms()
        np.testing.assert_allclose(extent, spacing * labels.shape, rtol=1e-6)
    where = np.round(np.array(view["centre"]) / spacing).astype(int)
    assert reference[tuple(where)] == 1  # the middle of the tumour
    assert view["resampled"] == (view_spacing > 1)


def test_a_view_has_the_window_of_the_pictures():
    image, prediction, reference = _case(3)
    images = [np.asarray(_read(t).dataobj) for t in _view(image, prediction, None)["images"]]
    for shown, scan in zip(images, np.asarray(image, np.float32)):
        brain = (image != 0).any(0)
        assert (shown[~brain] == 0).all()
        low, high = np.percentile(scan[brain], (1, 99.5))
        assert (shown[brain & (scan <= low)] == 1).all()
        assert (shown[brain & (scan >= high)] == 255).all()
    assert _view(image, prediction, None)["reference"] is None


def test_a_view_names_every_label():
    image, prediction, reference = _case(3)
    reference[0, 0, 0] = 4
    names = {one["value"]: one["name"] for one in _view(image, prediction, reference)["labels"]}
    assert names == {
        2: "WT outside TC", 1: "TC outside ET", 3: "ET", 4: "label 4, in no region"
    }  # fmt: skip


def test_views_stay_within_the_budget():
    shapes, spacing = [(70, 85, 70)] * 3, (2.0, 2.0, 2.0)
    assert report.views_spacing(shapes, spacing, 4, 1000) == 2.0
    assert report.views_spacing(shapes, (1.25, 2, 5), 4, 1000) == 1.25
    for budget in (4.0, 1.0, 0.25):
        step = report.views_spacing(shapes, spacing, 4, budget)
        assert step > 2
        # Noise of one byte is the worst that a brain can be.
        image, prediction, reference = _case(0, shapes[0])
        image = np.where(image != 0, np.random.default_rng(0).uniform(1, 2, image.shape), 0)
        sharp = np.kron(image[:, ::2, ::2, ::2], np.ones((1, 2, 2, 2)))[:, :70, :85, :70]
        view = _view(sharp, prediction, reference, spacing, step)
        assert 3 * len(json.dumps(view)) / 1e6 <= budget
    with pytest.raises(ValueError, match="budget_mb=0.01.*12 mm"):
        report.views_spacing(shapes, spacing, 4, 0.01)


# ---------------------------------------------------------------- the page as text


def test_whatever_comes_from_data_is_escaped(tmp_path):
    page = _write(tmp_path).read_text()
    assert "<img src=x" not in page
    assert END not in page and "alert(2)" in page
    page = page.replace((report.PAGE / "niivue.js").read_text(), "")  # holds such a word itself
    assert page.count("<script") == page.count("</script>") == 2 + 3
    for script in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S):
        assert "<" not in script
        json.loads(script, parse_constant=pytest.fail)  # strict: no NaN


def test_the_page_says_what_it_must(tmp_path):
    page = _write(tmp_path).read_text()
    for words in (
        "not a medical device",
        "default-src 'none'",
        metrics.EMPTY_RULES["prediction"].words,
        "95 % interval",
        "bootstrap",
        "report/dice.csv",
        "BSD 2-Clause License",
        "model.size",
    ):
        assert words in page, words
    assert not re.search(r'(?:src|href)="(?:https?:)?//(?!github.com/niivue/niivue")', page)
    dice = re.findall(r'<tr data-case=.*?data-value="([\d.]+)"', page)
    assert dice == sorted(dice, key=float)  # worst first


def test_a_case_that_was_scored_but_not_drawn_is_said_to_be_in_the_numbers(tmp_path):
    failed = {"absent": "no such file", "case-1": "scored, but not drawn: disk full"}
    page = _write(tmp_path, failed=failed).read_text()
    apart = re.search('<section class="failed">(.*?)</section>', page, re.S)[1]
    lost, kept = apart.split("<h2>")[1:]
    assert lost.startswith("Failed: 1</h2><p>These cases are in no number") and "absent" in lost
    assert kept.startswith("Not drawn: 1</h2><p>These cases are in the numbers")
    assert "case-1" in kept and "case-1" not in lost
    assert "Not drawn" not in _write(tmp_path).read_text()


def test_pictures_of_an_unknown_section_are_refused(tmp_path):
    pictures = report.distributions(tmp_path / "report", _rows("a", (0.5, 0.6)))
    pictures[0]["section"] = "misc"
    with pytest.raises(ValueError, match="misc.*distributions"):
        _write(tmp_path, pictures=pictures)


def test_the_page_is_there_whole_or_not_at_all(tmp_path):
    def views():
        yield "case-1", {"centre": [float("nan"), 0, 0]}  # becomes null
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        _write(tmp_path, views=views())
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_the_bundled_viewer_is_the_one_that_its_note_describes():
    note = (report.PAGE / "NIIVUE.md").read_text()
    digest = hashlib.sha256((report.PAGE / "niivue.js").read_bytes()).hexdigest()
    assert digest in note
    assert "Redistribution and use in source and binary forms" in note


# ---------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: $CHROMIUM, one on the PATH, else Playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-test.txt")
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        found = found or playwright.chromium.executable_path
        if not pathlib.Path(found).exists():
            pytest.skip(
                "no Chromium: apt install chromium, or python -m playwright install chromium, or "
                "CHROMIUM=/path/to/one"
            )
        # WebGL2 by SwiftShader: no GPU is needed. Root may not use Chromium's sandbox.
        options = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
        chromium = playwright.chromium.launch(executable_path=found, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """The page of a report, from the disk; afterwards: no error, no request."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, problems, requests = context.new_page(), [], []
    page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(_write(tmp_path).as_uri())
    yield page
    context.close()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


def _names(page):
    return page.locator("#table tbody tr:visible").evaluate_all("x => x.map(r => r.dataset.case)")


def _pixels(page):
    page.wait_for_timeout(300)  # a frame may still be on its way
    png = page.locator("#canvas").screenshot()
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def _changed(before, after):
    return float((np.abs(before - after).max(-1) > 0.1).mean())


def test_table_sorts_and_filters(opened):
    expect = pytest.importorskip("playwright.sync_api").expect
    worst_first = _names(opened)
    heading = opened.locator("#table th[aria-sort]")
    expect(heading).to_have_attribute("aria-sort", "ascending")
    heading.locator("button").focus()
    opened.keyboard.press("Enter")
    expect(heading).to_have_attribute("aria-sort", "descending")
    assert _names(opened) == worst_first[::-1]
    opened.locator("#table thead .corner button").click()
    assert _names(opened)[1:] == ["case-1", "case-2"]  # the hostile name begins with "<"
    opened.locator("#filter").fill("CASE-2")
    assert _names(opened) == ["case-2"]
    expect(opened.locator("#count")).to_have_text("1 of 3")
    opened.get_by_label("HD95 mm").uncheck()
    expect(opened.locator("td.m-hd95").first).to_be_hidden()


def test_viewer_shows_a_case(opened, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    opened.locator("#filter").fill(HOSTILE)
    opened.locator("#table tbody tr:visible td").first.click()
    expect(opened.locator("#place")).to_contain_text("reference: TC outside ET")
    expect(opened.locator("#viewer-case")).to_have_text(HOSTILE)
    expect(opened.locator("#modalities button")).to_have_text(["T1 1", "T1ce 2", "T2 3", "FLAIR 4"])
    opened.screenshot(path=tmp_path / "viewer.png")
    first = _pixels(opened)
    assert first.std() > 0.05
    opened.keyboard.press("2")
    expect(opened.locator("#modalities [aria-pressed=true]")).to_have_text("T1ce 2")
    other = _pixels(opened)
    assert _changed(first, other) > 0.03
    opened.keyboard.press("p")
    expect(opened.locator("#show-prediction")).not_to_be_checked()
    without = _pixels(opened)
    assert _changed(other, without) > 0.001
    opened.keyboard.press("r")
    bare = _pixels(opened)
    assert _changed(without, bare) > 0.001
    coloured = np.ptp(bare[: len(bare) // 3, : bare.shape[1] // 2], axis=-1) > 0.3
    assert coloured.mean() < 0.02  # the cross alone
    for mode in ("axial", "3-D"):
        opened.locator("#modes").get_by_role("button", name=mode).click()
        after = _pixels(opened)
        assert _changed(bare, after) > 0.03
        bare = after
    opened.keyboard.press("Escape")
    expect(opened.locator("#viewer")).to_be_hidden()
    assert (tmp_path / "viewer.png").stat().st_size > 10_000


def test_viewer_shows_the_patients_right_on_the_left(browser, tmp_path):
    """A tumour at high i, so on the patient's right, is left on the axial slice, front is up."""
    expect = pytest.importorskip("playwright.sync_api").expect
    image, _, _ = _case(0)
    labels = np.zeros(image.shape[1:], np.uint8)
    labels[17:20, 20:23, 9:13] = 3
    view = _view(image, labels, labels * 0)
    view["centre"] = [24.0, 28.0, 22.0]  # the slices meet elsewhere; axial goes through the tumour
    page = browser.new_page(viewport={"width": 900, "height": 900})
    page.goto(_write(tmp_path, cases=("case-1",), views=[("case-1", view)]).as_uri())
    page.get_by_role("button", name="case-1").press("Enter")
    expect(page.locator("#place")).not_to_be_empty()
    page.locator("#modes").get_by_role("button", name="axial").click()
    page.locator("#cross").uncheck()
    pixels = _pixels(page)
    pink = (pixels[..., 0] - pixels[..., 1] > 0.25).nonzero()
    brain = (pixels.max(-1) > 0.2).nonzero()
    assert len(pink[0]) > 50
    assert pink[1].mean() < brain[1].mean() - 20
    assert pink[0].mean() < brain[0].mean() - 20
    page.close()


def test_viewer_by_keyboard_and_slider(opened):
    expect = pytest.importorskip("playwright.sync_api").expect
    names = _names(opened)
    opened.get_by_role("button", name=names[0]).focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("Enter")
    expect(opened.locator("#viewer-case")).to_have_text(names[1])
    expect(opened.locator("#place")).not_to_be_empty()
    slider = opened.locator("#slices input").first
    before, shown = slider.input_value(), _pixels(opened)
    slider.focus()
    opened.keyboard.press("ArrowRight")
    assert int(slider.input_value()) == int(before) + 1
    assert _changed(shown, _pixels(opened)) > 0.001
    opened.keyboard.press("c")
    expect(slider).to_have_js_property("value", before)
    opened.locator("#next").click()
    expect(opened.locator("#viewer-case")).to_have_text(names[2])
    expect(opened.locator("#next")).to_be_disabled()


def test_without_webgl_the_page_says_so(opened):
    expect = pytest.importorskip("playwright.sync_api").expect
    opened.evaluate("HTMLCanvasElement.prototype.getContext = () => null")
    opened.locator("#table tbody tr").first.click()
    expect(opened.locator("#viewer-message")).to_contain_text("no WebGL2")
    expect(opened.locator("#controls")).to_be_hidden()
