"""Command lines are read by Fire and checked by pydantic, before any work. These tests type what
people type (misspelt flags, values that look like numbers, switches before the bundle, dashes) and
look at what arrives, or at the one sentence that is answered; Fire itself must never be heard."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from pydantic.fields import FieldInfo
from rich.console import Console

from anyflow_deploy.cli.export import ExportOptions
from anyflow_deploy.cli.fit import FitOptions
from anyflow_deploy.cli.generate_options import GenerateOptions
from anyflow_deploy.cli.inspect_bundle import InspectOptions
from anyflow_deploy.cli.options import Numbers, Options, Steps, build_help, parse_options, run
from anyflow_deploy.cli.validate import ValidateOptions
from anyflow_deploy.errors import AnyFlowError, reraise_interrupt
from anyflow_deploy.shape_ranges import Range

COMMANDS: list[type[Options]] = [
    ExportOptions,
    FitOptions,
    GenerateOptions,
    InspectOptions,
    ValidateOptions,
]


class Small(Options):
    """One flag of every kind."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = ("small bundle --dry-run",)

    bundle: Path = Field(description="the folder")
    prompt: str | None = Field(None, description="words")
    note: str = Field("", description="more words")
    seed: int = Field(0, ge=0, description="a number")
    shift: float | None = Field(None, gt=0, description="a fraction")
    dry_run: bool = Field(False, description="a switch")
    loud: bool = Field(False, description="another switch")
    steps: Steps = Field((1, 2), description="numbers")
    sigmas: Numbers | None = Field(None, description="fractions")


class Two(Options):
    """Two arguments without flags."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("first", "second")

    first: str = Field(description="one")
    second: str = Field("2", description="two")


def given_by(options: type[Options], line: str) -> dict[str, object]:
    """What a command line sets, defaults left out."""
    return parse_options(options, shlex.split(line)).model_dump(exclude_unset=True)


def flag_of(name: str, field: FieldInfo) -> str:
    return f"--{(field.alias or name).replace('_', '-')}"


@pytest.fixture(autouse=True)
def _silence(capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Iterator[None]:
    """Parsing prints nothing, whatever happens."""
    yield
    if not request.node.name.startswith("test_run"):
        assert capfd.readouterr() == ("", "")


# What arrives


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("b", {}),
        ("--bundle b", {}),
        ("--bundle=b", {}),
        ("b --dry-run", {"dry_run": True}),
        ("--dry-run b", {"dry_run": True}),
        ("--dry_run b", {"dry_run": True}),
        ("--dry-run --loud b", {"dry_run": True, "loud": True}),
        ("--loud b --seed 3", {"loud": True, "seed": 3}),
        ("b --dry-run=False", {"dry_run": False}),
        ("b --dry-run=true", {"dry_run": True}),
        ("--seed 3 b", {"seed": 3}),
        ("--seed=3 b", {"seed": 3}),
        ("b --shift 1e-1", {"shift": 0.1}),
        ("b --steps 1,4,8", {"steps": (1, 4, 8)}),
        ("b --steps=4", {"steps": (4,)}),
        ("b --sigmas 1,0.9,.5", {"sigmas": (1.0, 0.9, 0.5)}),
        ("b --sigmas '1, 0.5'", {"sigmas": (1.0, 0.5)}),
        ("b --prompt 'a red fox'", {"prompt": "a red fox"}),
        ("--prompt 'a - b' b", {"prompt": "a - b"}),
        ("b --prompt=", {"prompt": ""}),
        ("b --prompt ''", {"prompt": ""}),
        ("b --prompt=a=b", {"prompt": "a=b"}),
        ("b --prompt=-x", {"prompt": "-x"}),
        ("b --prompt=--x", {"prompt": "--x"}),
        ("b --prompt=--seed", {"prompt": "--seed"}),
        ("b --prompt=--", {"prompt": "--"}),
        ("b --prompt=-", {"prompt": "-"}),
        ("b --prompt='--dry-run'", {"prompt": "--dry-run"}),
        ("b --seed 1 --seed 2", {"seed": 2}),  # as everywhere: the last one counts
        ("b --dry-run --dry-run=False", {"dry_run": False}),
    ],
)
def test_values_arrive(line: str, values: dict[str, object]) -> None:
    assert given_by(Small, line) == {"bundle": Path("b"), **values}


@pytest.mark.parametrize(
    "text",
    [
        "1.3",
        "1.50",
        "007",
        "1e3",
        "0x10",
        "1_000",
        "True",
        "None",
        "[1, 2]",
        "(1,)",
        "{'a': 1}",
        "'x'",
        '"x"',
        "a,b",
        "ünï 🦊",
        "a\nb",
    ],
)
@pytest.mark.parametrize("words", [("--prompt={}",), ("--prompt", "{}"), ("--note={}",)])
def test_text_stays_text(words: tuple[str, ...], text: str) -> None:
    options = parse_options(
        Small, ["b", *(word.format(text) if "{" in word else word for word in words)]
    )
    assert text in (options.prompt, options.note)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_survives_behind_an_equals_sign(text: str) -> None:
    assert parse_options(Small, ["b", f"--prompt={text}"]).prompt == text


@pytest.mark.parametrize(
    "bundle", ["1.3", "007", "True", "__doc__", "__class__", "FIRE_METADATA", "with space", "a,b"]
)
def test_any_name_is_a_bundle(bundle: str) -> None:
    assert parse_options(Small, [bundle]).bundle == Path(bundle)


def test_two_positional_arguments() -> None:
    assert given_by(Two, "1 '2 3'") == {"first": "1", "second": "2 3"}
    assert given_by(Two, "1 --second 5") == {"first": "1", "second": "5"}
    assert given_by(Two, "--first 5") == {"first": "5"}


def test_the_words_of_another_program_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "surplus", "--nonsense"])
    with pytest.raises(AnyFlowError, match=r"^bundle is missing: the folder\.$"):
        parse_options(Small, [])


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"bundle is missing: the folder\."),
        ("--seed 3", r"bundle is missing: the folder\."),
        ("b c", r"surplus argument 'c'; a flag's value follows its name, as in --steps 4\."),
        ("b --seed 1 2", r"surplus argument '2'; .*"),
        ("--dry-run b True", r"surplus argument 'True'; .*"),
        ("b ''", r"surplus argument ''; .*"),
        ("b --bundle c", r"bundle was given twice: 'b' and --bundle 'c'\."),
        ("b --seeed 3", r"unknown flag --seeed\. Did you mean '--seed'\?"),
        ("b --dryrun", r"unknown flag --dryrun\. Did you mean '--dry-run'\?"),
        ("b --dry_rum", r"unknown flag --dry-rum\. Did you mean '--dry-run'\?"),
        ("b --Seed=3", r"unknown flag --Seed\. Did you mean '--seed'\?"),
        ("b --zzzzzz 3", r"unknown flag --zzzzzz\."),
        ("b --seed", r"--seed .*"),
        ("b --seed=", r"--seed is '': input should be a valid integer.*"),
        ("b --seed x", r"--seed is 'x': input should be a valid integer.*"),
        ("b --seed 1.5", r"--seed is '1\.5': input should be a valid integer.*"),
        ("b --seed -1", r"--seed is '-1': input should be greater than or equal to 0\."),
        ("b --shift=0", r"--shift is '0': input should be greater than 0\."),
        ("b --shift=-5", r"--shift is '-5': input should be greater than 0\."),
        ("b --shift x", r"--shift is 'x': input should be a valid number.*"),
        ("b --dry-run=maybe", r"--dry-run is 'maybe': input should be a valid boolean.*"),
        ("b --steps 1,x", r"--steps is 'x': input should be a valid integer.*"),
        ("b --steps 1,2.5", r"--steps is '2\.5': input should be a valid integer.*"),
        ("b --steps 1,,2", r"--steps is '': input should be a valid integer.*"),
        ("b --steps ''", r"--steps is '': input should be a valid integer.*"),
        ("b --sigmas [1,0.5]", r"--sigmas is '\[1': input should be a valid number.*"),
        ("b --prompt -x", r"(--prompt|unknown flag --?x).*"),
        ("b --prompt --x", r"(--prompt|unknown flag --x).*"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(line: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=f"^{message}$"):
        parse_options(Small, shlex.split(line))


@pytest.mark.parametrize(
    "line", ["b --prompt", "b --prompt --dry-run", "--prompt --seed 3 b", "b --note"]
)
def test_a_text_flag_needs_a_value(line: str) -> None:
    with pytest.raises(AnyFlowError, match=r"^--(prompt|note) .*value"):
        parse_options(Small, shlex.split(line))


@pytest.mark.parametrize(
    "flag", ["--noprompt", "--no-prompt", "--nodry-run", "--no-dry-run", "--nobundle", "--notes"]
)
def test_fires_own_negations_are_unknown_flags(flag: str) -> None:
    with pytest.raises(AnyFlowError, match=rf"^unknown flag {flag}\."):
        parse_options(Small, ["b", flag])


@pytest.mark.parametrize(
    "line",
    [
        "b -- c",
        "b -- --help",
        "-- --help",
        "b -- --trace",
        "b -- --interactive",
        "b -",
        "b - c",
        "b --prompt -",
        "b --=x",
        "b ---x",
    ],
)
def test_fires_own_separators_are_refused(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--` would hand the rest to Fire, which prints, starts an interpreter or drops it; `-` would
    end the arguments."""

    monkeypatch.setattr(
        "code.InteractiveConsole.interact",
        lambda *_, **__: pytest.fail("an interpreter was started"),
    )
    with pytest.raises(AnyFlowError, match="-"):
        parse_options(Small, shlex.split(line))


# The real commands


@pytest.mark.parametrize("options", COMMANDS)
def test_every_example_is_a_valid_command_line(options: type[Options]) -> None:
    for example in options.EXAMPLES:
        assert given_by(options, example.partition(" ")[2])


@pytest.mark.parametrize("options", COMMANDS)
def test_every_flag_misspelt_is_answered_with_the_right_one(options: type[Options]) -> None:
    for name, field in options.model_fields.items():
        flag = flag_of(name, field)
        with pytest.raises(
            AnyFlowError, match=rf"^unknown flag {flag}x\. Did you mean '{flag}'\?$"
        ):
            parse_options(options, [f"{flag}x=1"])


@pytest.mark.parametrize("line", ["b --json", "--json b", "--json --verify b"])
def test_inspect_takes_json(line: str) -> None:
    options = parse_options(InspectOptions, shlex.split(line))
    assert (options.bundle, options.json_output) == (Path("b"), True)


def test_export_lines() -> None:
    options = parse_options(
        ExportOptions,
        shlex.split(
            "--random_weights --model tiny --frames 1:81 --height 480 --width 256:832 --batch 1:4"
        ),
    )
    assert (options.model, options.random_weights, options.precision) == ("tiny", True, "fp32")
    assert options.ranges() == {
        "batch": Range(1, 4),
        "frames": Range(1, 21),
        "height": Range(60, 60, 2),
        "width": Range(32, 104, 2),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "",
            (
                r"^nothing to start from: give --checkpoint DIR, --model NAME, or --model NAME"
                r" --random-weights\.$"
            ),
        ),
        ("--model 1.3", r"^unknown model '1\.3': known are .* Did you mean '1\.3b'\?$"),
        ("--model", r"model"),
        ("--modle tiny", r"^unknown flag --modle\. Did you mean '--model'\?$"),
        ("tiny", r"^surplus argument 'tiny'"),
        ("--random-weights tiny", r"^surplus argument 'tiny'"),
        ("--random-weights", r"^nothing to start from"),
        (
            "--random-weights --checkpoint c",
            r"^--random-weights takes the architecture from --model NAME, and no --checkpoint\.$",
        ),
        (
            "--random-weights --model tiny --checkpoint c",
            r"^--random-weights takes the architecture from --model NAME",
        ),
        ("--model tiny --precision fp15", r"^unknown precision 'fp15': .*Did you mean 'fp16'\?$"),
        (
            "--model tiny --precision bf16",
            r"^bf16 does not run on target 'cpu' \(ONNX Runtime's CPU provider has no bf16",
        ),
        ("--model tiny --target orinn", r"^unknown target 'orinn': .*Did you mean 'orin'\?$"),
        ("--model tiny --check maybe", r"^--check is 'maybe'; allowed are auto, full, none\.$"),
        ("--model tiny --frames 1:80", r"^frames is 80; allowed are 4n\+1 .*The nearest is 81\.$"),
        (
            "--model tiny --height x",
            r"^--height is 'x'; allowed are one number \(4\) or a range \(1:4\)\.$",
        ),
        (
            "--model tiny --width 24",
            r"^width is 24; allowed are multiples of 16\. The nearest is 32\.$",
        ),
        ("--model tiny --frames 81:1", r"^range 21 to 1 is empty"),
        ("--model tiny --batch 0", r"^range 0 starts below 1"),
        (
            "--model tiny --seed -1",
            r"^--seed is '-1': input should be greater than or equal to 0\.$",
        ),
        ("--model tiny --batch=", r"^--batch is ''; allowed are one number"),
        ("--model tiny --frames=", r"^--frames is ''; allowed are one number"),
    ],
)
def test_export_refuses(line: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        parse_options(ExportOptions, shlex.split(line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prompt x", r"^bundle is missing: the bundle's folder\.$"),
        ("b --steps 0", r"^--steps is '0': input should be greater than or equal to 1\.$"),
        ("b --steps 1001", r"^--steps is '1001': input should be less than or equal to 1000\.$"),
        ("b --steps 1,4", r"^--steps is '1,4': input should be a valid integer"),
        ("b --prompt-embed x", r"^unknown flag --prompt-embed\. Did you mean '--prompt-embeds'\?$"),
        ("b --frames 0", r"frames"),
        ("b --height 0", r"height"),
        ("b --width=-16", r"width"),
    ],
)
def test_generate_refuses(line: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        parse_options(GenerateOptions, shlex.split(line))


@pytest.mark.parametrize("steps", ["0", "1,0", "-1", "1001"])
def test_validate_refuses_impossible_steps(steps: str) -> None:
    with pytest.raises(AnyFlowError, match=r"^--steps .*1"):
        parse_options(ValidateOptions, ["b", f"--steps={steps}"])


# Help, and the body of a console script


def help_text(options: type[Options], width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(*build_help("anyflow-x", options), sep="\n")
    return capture.get()


@pytest.mark.parametrize("options", [*COMMANDS, Small, Two])
@pytest.mark.parametrize("width", [80, 200])
def test_help_names_every_flag(options: type[Options], width: int) -> None:
    text = help_text(options, width)
    for name, field in options.model_fields.items():
        label = name.upper() if name in options.POSITIONAL else flag_of(name, field)
        assert re.search(rf"^  {label} ", text, re.MULTILINE), label
    assert all(name.upper() in text.splitlines()[0] for name in options.POSITIONAL)


@pytest.mark.parametrize("options", COMMANDS)
def test_help_says_everything_that_was_written(options: type[Options]) -> None:
    text = " ".join(help_text(options, 400).split())
    pieces = [field.description or "" for field in options.model_fields.values()]
    assert [piece for piece in (*pieces, *options.EXAMPLES) if piece not in text] == []
    assert " ".join((options.__doc__ or "").split()) in text


def test_help_shows_types_and_defaults() -> None:
    text = help_text(Small, 200)
    for line in (
        r"BUNDLE +path +the folder$",
        r"--prompt +text +words$",
        r"--seed +number +a number \(default 0\)$",
        r"--note +text +more words$",
        r"--dry-run +switch +a switch$",
        r"--steps +numbers +numbers \(default 1,2\)$",
        r"--sigmas +numbers +fractions$",
    ):
        assert re.search(
            rf"^  {line}", re.sub(r" +$", "", text, flags=re.MULTILINE), re.MULTILINE
        ), line


def run_words(
    monkeypatch: pytest.MonkeyPatch, words: list[str], work: object = lambda options: 0
) -> object:
    monkeypatch.setattr(sys, "argv", ["small", *words])
    with pytest.raises(SystemExit) as left:
        run("small", Small, work)  # type: ignore[arg-type]
    return left.value.code


@pytest.mark.parametrize(
    "line", ["--help", "-h", "b --help", "b -- --help", "-- --help", "--nonsense --help"]
)
def test_run_shows_our_help_and_nothing_of_fire(
    line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_words(monkeypatch, line.split(), lambda options: pytest.fail("work was started")) == 0
    )
    out, err = capfd.readouterr()
    assert out.startswith("usage: small BUNDLE [flags]")
    assert "small bundle --dry-run" in out
    assert err == ""


@pytest.mark.parametrize("status", [0, 1])
def test_run_exits_with_what_work_returns(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    assert run_words(monkeypatch, ["b"], lambda options: seen.append(options) or status) == status
    assert seen == [Small(bundle=Path("b"))]


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "bundle is missing"), (["b", "--seed=[/red]"], "--seed is '[/red]'")],
)
def test_run_answers_wrong_flags_before_any_work(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_words(monkeypatch, words, lambda options: pytest.fail("work was started")) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.endswith("small --help lists every flag.\n")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (AnyFlowError("no [bold] way"), 1, "error: no [bold] way\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_explains_failures(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work(options: Small) -> int:
        raise error

    assert run_words(monkeypatch, ["b"], work) == status
    assert capfd.readouterr().err.startswith(said)


def test_an_import_that_ctrl_c_ended_is_no_missing_library() -> None:
    """pybind11 hides it in the cause; an import may be wrapped in another."""
    failed = ImportError("cannot import the package")
    reraise_interrupt(failed)
    failed.__cause__ = ImportError("initialization failed")
    reraise_interrupt(failed)
    failed.__cause__.__cause__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        reraise_interrupt(failed)


def test_run_does_not_hide_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["small", "b"])
    with pytest.raises(ZeroDivisionError):
        run("small", Small, lambda options: 1 // 0)
