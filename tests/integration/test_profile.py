"""anyflow-profile end to end on a small bundle: what it measures, writes, compares and estimates;
its page in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anyflow_deploy import MODELS, Bundle
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.profile_bundle import ProfileOptions, profile
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.memory.estimate import LatentShape
from anyflow_deploy.profiling import stages
from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.html_report import html_from_profile
from anyflow_deploy.profiling.operations import compute_types, stream_costs, transition_cost
from anyflow_deploy.profiling.record import Profile
from anyflow_deploy.targets import TARGETS
from tests.fakes.profile_sample import assert_operations_match_graph

ROOT = Path(__file__).parents[2]
SMALL_SHAPE = "64x96x5"


def run(line: str) -> int:
    return profile(parse_options(ProfileOptions, shlex.split(line)))


@pytest.fixture(scope="module")
def made(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of two shapes, with its page beside it."""
    folder = tmp_path_factory.mktemp("profile")
    flags = (
        f"--threads 1 --steps 1,3 --shapes {SMALL_SHAPE},64x64x9 --seconds 0.3 --skip text,vae"
        " --target h100"
    )
    assert run(f"{tiny_bundle.path} {flags} --json {folder}/p.json --html {folder}/p.html") == 0
    return folder


@pytest.fixture(scope="module")
def read(made: Path) -> Profile:
    return Profile.model_validate_json((made / "p.json").read_text())


def test_a_profile_says_what_how_and_where(read: Profile, tiny_bundle: Bundle) -> None:
    assert read.subject.digest == tiny_bundle.digest and read.subject.engine.startswith(
        "ONNX Runtime"
    )
    assert (
        read.method.clock["name"] == "time.perf_counter"
        and 0 < read.method.clock["reading_seconds"] < 1
    ), "seconds, whatever their number"
    assert read.machine["versions"]["onnxruntime"] and read.machine["cores"] >= 1
    assert "RAPL" in " ".join([*read.absent, *(power.name for power in read.power)]), (
        "energy, or why there is none"
    )
    assert read.absent["text"] == "left out by --skip"
    nowhere = tiny_bundle.manifest.source.model_copy(update={"location": "/nowhere"})
    for part in (stages.TEXT, stages.VAE):
        with pytest.raises(MeasurementUnavailableError, match="not available"):
            stages.find_pipeline_folder(
                tiny_bundle.manifest.model_copy(update={"source": nowhere}), None, part
            )


def test_times_hang_together(read: Profile) -> None:
    assert [point.shape for point in read.points] == [SMALL_SHAPE, "64x64x9"]
    for point in read.points:
        rounds = point.clips[0].latency.count
        assert rounds >= 3 and [clip.steps for clip in point.clips] == [1, 3]
        assert point.transition.count == rounds * (1 + 3), "every transition of every clip"
        latency = point.transition
        assert (
            latency.minimum
            <= latency.median
            <= latency.p90
            <= latency.p95
            <= latency.p99
            <= latency.maximum
        )
        assert latency.interval[0] <= latency.median <= latency.interval[1]
        longest = point.clips[1].latency
        assert sum(latency.samples) < sum(
            clip.latency.mean * clip.latency.count for clip in point.clips
        )
        assert longest.minimum > 2 * latency.minimum
        assert point.clips[1].frames_per_second == pytest.approx(point.frames / longest.median)
        assert (
            point.roofline is not None
            and point.roofline.efficiency is not None
            and 0 < point.roofline.efficiency < 1
        )
    assert 0 < read.memory.cpu_loaded <= read.memory.cpu_peak and read.memory.gpu_peak is None


def test_layers_add_up_and_carry_their_work(read: Profile) -> None:
    (layers,) = read.layers
    assert (
        sum(row.share for row in layers.rows) == pytest.approx(1)
        and layers.rows[0].seconds >= layers.rows[-1].seconds
    )
    for groups in (layers.by_operator, layers.by_part):
        assert sum(row.seconds for row in groups) == pytest.approx(layers.seconds)
    assert {"attn1.to_q", "ffn.net.2", "patch_embedding"} <= {row.name for row in layers.by_part}
    counted = read.points[0].roofline
    assert counted is not None
    assert sum(row.operations for row in layers.rows) == pytest.approx(
        sum(counted.operations.values()), rel=1e-3
    ), "ONNX Runtime's shapes and the architecture's arithmetic agree"


def test_operations_are_those_of_the_graph(tiny_bundle: Bundle) -> None:
    assert_operations_match_graph(tiny_bundle)


def test_a_stream_is_the_sum_of_its_chunks() -> None:
    from anyflow_deploy.engines.kv_cache import cache_plan

    a = MODELS["far-1.3b"].architecture
    plan = cache_plan(a, None, 60, 104)
    types = compute_types("fp8", "bf16")
    one, four = (stream_costs(a, types, plan, (60, 104), steps) for steps in (1, 4))
    assert len(one) == len(plan.chunks) and all(
        b.operations["fp8"] > a_.operations["fp8"] for a_, b in zip(one, four, strict=True)
    )
    first = transition_cost(a, types, (1, 60, 104), 512, 0, with_text=False)
    assert four[0].operations["bf16"] - one[0].operations["bf16"] == 3 * first.operations["bf16"]


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "bundle is missing"),
        ("b --skip layrs", "Did you mean 'layers'"),
        ("b --compare a --estimate", "one of --estimate and --compare"),
        ("--compare a.json", "takes two profiles"),
        ("--compare a.json b.json --steps 3", "--steps means nothing to --compare"),
        ("b --time-threshold 3", "belongs to --compare"),
        ("b --model 14b", "belongs to --estimate"),
        ("b --estimate", "needs --target"),
        ("--estimate --target orin", "one of a bundle and --model"),
        ("b --estimate --target orin --precision int8", "a bundle has its own"),
        ("b --estimate --target oren", "Did you mean 'orin'"),
        ("--estimate --target orin --model 14b --html x.html", "--html shows measurements"),
        ("b --seconds 0", "--seconds is '0'"),
        ("b --backend tensort", "Did you mean 'tensorrt'"),
    ],
)
def test_wrong_flags_are_refused(line: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=re.escape(message)):
        parse_options(ProfileOptions, shlex.split(line))


def test_what_cannot_be_measured_or_written_is_refused_before_work(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "there.json").write_text("")
    for flags, message in (
        (f"--json {tmp_path}/there.json", "exists"),
        (f"--html {tmp_path}/nowhere/p.html", "cannot be written"),
        ("--shapes 480x830x81", "width is 830"),
        ("--window 2", "causal model"),
        ("--target cpu", "any processor"),
    ):
        with pytest.raises(AnyFlowError, match=message):
            run(
                f"{tiny_bundle.path} {flags} --seconds 0.1 --rounds 1 --skip layers,text,vae"
                " --steps 1"
            )
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


# The estimate


def test_an_estimate_is_labelled_and_is_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--estimate --model 14b --precision int8 --target orin --json=-") == 0
    captured = capsys.readouterr()
    (estimate,) = json.loads(captured.out)
    assert "not a measurement" in estimate["label"] and "not a measurement" in captured.err.replace(
        "\n", " "
    )
    roof, orin = estimate["transition"], TARGETS["orin"]
    assert roof["compute_seconds"] == pytest.approx(
        sum(count / orin.tflops[kind] / 1e12 for kind, count in roof["operations"].items())
    )
    assert roof["memory_seconds"] == pytest.approx(roof["bytes"] / 204.8e9)
    assert estimate["clips"][3]["seconds"] == pytest.approx(8 * roof["compute_seconds"])
    with pytest.raises(AnyFlowError, match="fp8 does not run on target 'orin'"):
        run("--estimate --model 14b --precision fp8 --target orin")
    with pytest.raises(AnyFlowError, match="no data sheet"):
        run("--estimate --model 14b --precision fp32 --target cpu")


def test_faster_hardware_and_narrower_types_have_lower_bounds() -> None:
    from anyflow_deploy.profiling.estimate import estimate_latency

    a = MODELS["far-1.3b"].architecture
    shape = LatentShape(21, 60, 104)

    def seconds(precision: str, base: str, target: str) -> float:
        return (
            estimate_latency("far-1.3b", a, precision, base, TARGETS[target], shape, (4,))
            .clips[0]
            .seconds
        )

    assert (
        seconds("fp8", "fp16", "h100")
        < seconds("fp16", "fp16", "h100")
        < seconds("fp16", "fp16", "orin")
    )


# Two profiles


def test_compare_on_the_command_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = made / "p.json"
    assert run(f"--compare {old} {old}") == 0
    slower = json.loads(old.read_text())
    latency = slower["points"][0]["clips"][1]["latency"]
    for key in ("minimum", "mean", "median", "p90", "p95", "p99", "maximum"):
        latency[key] *= 100
    latency["interval"] = [100 * value for value in latency["interval"]]
    latency["samples"] = [100 * value for value in latency["samples"]]
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    capsys.readouterr()
    assert run(f"--compare {old} {tmp_path}/slower.json --json=-") == 1
    verdicts = {
        name: row["verdict"] for name, row in json.loads(capsys.readouterr().out)["rows"].items()
    }
    assert verdicts.pop(f"{SMALL_SHAPE}, 3 steps") == "regression" and set(verdicts.values()) == {
        "unchanged"
    }
    assert run(f"--compare {old} {tmp_path}/slower.json --time-threshold 20000") == 0
    (tmp_path / "no.json").write_text('{"schema": 1}')
    for path, message in (("no.json", "damaged at"), ("nowhere.json", "does not exist")):
        with pytest.raises(AnyFlowError, match=message):
            run(f"--compare {old} {tmp_path}/{path}")


# The page


class _Links(HTMLParser):
    """Collects whatever would be fetched, and what is never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"


def test_the_page_is_whole_in_itself(made: Path, read: Profile) -> None:
    text = (made / "p.html").read_text()
    parser = _Links()
    parser.feed(text)
    assert parser.fetched == [] and "url(" not in text and "@import" not in text
    assert parser.open == [] and parser.tags.count("svg") >= 8
    carried = re.search(
        r'<script type="application/json" id="profile">(.*?)</script>', text, re.DOTALL
    )
    assert carried is not None and Profile.model_validate_json(carried[1]) == read
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text), "a mark has no place"


def test_the_page_shows_foreign_words_as_text(read: Profile) -> None:
    nasty = read.model_copy(
        update={"subject": read.subject.model_copy(update={"bundle": "<img src=x>&</script>"})}
    )
    parser = _Links()
    parser.feed(html_from_profile(nasty))
    assert "img" not in parser.tags and parser.open == []


def test_the_page_in_a_browser(made: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    with playwright.sync_playwright() as session:
        try:
            browser = session.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        said: list[str] = []
        asked: list[str] = []
        for width, scheme in ((1240, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto((made / "p.html").as_uri())
            assert page.locator("svg").count() >= 8
            _look(page, width)
            page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        browser.close()
    assert said == [] and all(url.startswith("file:") for url in asked)


def _look(page: Any, width: int) -> None:
    """Nothing is wider than the window, every plot has a size, and no mark or word lies outside its
    plot."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate("""() => [...document.querySelectorAll('svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            const marks = [...svg.querySelectorAll('circle, rect, text')];
            return marks.filter(mark => { const b = mark.getBoundingClientRect();
                return !(b.width > 0) || b.left < box.left - 1 || b.right > box.right + 1
                    || b.top < box.top - 1
                    || b.bottom > box.bottom + 1 })
                    .map(mark => svg.ariaLabel + ': ' + mark.outerHTML);
        })""")
    assert outside == []
    assert all(
        size["height"] > 40
        for size in page.locator("svg").evaluate_all(
            "all => all.map(s => ({height: s.clientHeight}))"
        )
    )


# The documentation


def test_every_command_in_the_documentation_runs(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a short budget and the tiny bundle, text encoder and VAE included; those for hardware
    that is not here are parsed."""
    text = (ROOT / "docs" / "how-to" / "profiling.md").read_text()
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line
    ]
    (tmp_path / "my-bundle").symlink_to(tiny_bundle.path)
    monkeypatch.chdir(tmp_path)
    assert all(line.startswith("anyflow-profile ") for line in lines) and len(lines) >= 7
    ran = 0
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        options = parse_options(ProfileOptions, words)
        if "--backend" in words:
            continue
        if options.compare is None and not options.estimate:
            options = options.model_copy(update={"rounds": 2, "threads": 1, "seconds": 0.5})
        assert profile(options) in ((0, 1) if options.compare else (0,)), line
        ran += 1
    assert ran >= 6
    read = Profile.model_validate_json((tmp_path / "profile.json").read_text())
    assert {stage.name for stage in read.stages} == {"text encoder", "VAE"}
    assert (
        read.ceilings is not None
        and read.ceilings.measured
        and read.ceilings.operations["fp32"] > 0
    )
    row = read.end_to_end[0]
    assert row.total == pytest.approx(sum(row.seconds.values())) and 0 < row.first_frame < row.total
    assert row.cold_start > read.subject.load_seconds
