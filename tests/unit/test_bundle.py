"""Bundles are written whole or not at all, and read with suspicion. Everything here happens to
small hand-made bundles: one file that stands in for a graph, one for its weights, and a manifest
that could be real."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow_deploy.bundle import renames
from anyflow_deploy.bundle.atomic_io import file_sha256
from anyflow_deploy.bundle.bundle import Bundle, BundleWriter, load_bundle
from anyflow_deploy.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    WEIGHTS,
    AchievedPrecision,
    FileRecord,
    GraphRecord,
    GraphTensor,
    Manifest,
    ScheduleDefaults,
    VideoDefaults,
    WeightsSource,
    records_from_ranges,
)
from anyflow_deploy.errors import BundleError, OutputError
from anyflow_deploy.models import MODELS, Architecture, architecture_from_config
from anyflow_deploy.shape_ranges import widest_ranges

GRAPH = "transition.onnx"


def manifest(graph: str = GRAPH) -> Manifest:
    architecture = MODELS["tiny"].architecture
    latents = GraphTensor(
        name="latents", dtype="float32", shape=["batch", "frames", 16, "height", "width"]
    )
    return Manifest(
        kind="bidirectional",
        model="tiny",
        config=architecture.as_config(),
        source=WeightsSource(kind="random", location="tiny", seed=0),
        precision="fp32",
        achieved=AchievedPrecision(weight_bytes={"F32": 1000}),
        target="cpu",
        graphs={
            "transition": GraphRecord(file=graph, opset=20, inputs=[latents], outputs=[latents])
        },
        ranges=records_from_ranges(widest_ranges(architecture)),
        schedule=ScheduleDefaults(shift=5.0, steps=4),
        video=VideoDefaults(
            spatial_factor=8,
            temporal_factor=4,
            fps=16,
            text_tokens=512,
            frames=17,
            height=64,
            width=96,
        ),
        tools={"torch": "2.13"},
        files={},
    )


def write_bundle(path: Path, weights: bytes = b"weights", overwrite: bool = False) -> Bundle:
    with BundleWriter(path, overwrite) as writer:
        writer.write(WEIGHTS, weights)
        writer.write(GRAPH, b"graph")
        return writer.finish(manifest())


def write_half(path: Path, error: type[BaseException], overwrite: bool = False) -> None:
    """Start writing and fail."""
    with BundleWriter(path, overwrite) as writer:
        writer.create(WEIGHTS).write(b"half a ten")
        raise error("midway")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest of a bundle behind its back."""
    content = json.loads((bundle.path / MANIFEST).read_text())
    change(content)
    (bundle.path / MANIFEST).write_text(json.dumps(content))
    return bundle.path


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """A path in an otherwise empty folder."""
    return tmp_path / "bundle"


@pytest.fixture
def bundle(destination: Path) -> Bundle:
    return write_bundle(destination)


# Writing


def test_a_written_bundle_is_the_bundle_read(destination: Path) -> None:
    written = write_bundle(destination)
    assert load_bundle(destination) == load_bundle(str(destination)) == written
    assert names(destination) == [MANIFEST, GRAPH, WEIGHTS]
    assert names(destination.parent) == ["bundle"]
    assert written.manifest.files[GRAPH] == FileRecord(
        bytes=5, sha256=hashlib.sha256(b"graph").hexdigest()
    )
    assert written.manifest == manifest().model_copy(update={"files": written.manifest.files})


def test_digest_is_the_hash_of_the_manifest(bundle: Bundle) -> None:
    assert bundle.digest == hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()


def test_manifest_gives_back_what_was_declared(bundle: Bundle) -> None:
    architecture = MODELS["tiny"].architecture
    assert bundle.manifest.architecture == architecture
    assert bundle.manifest.shape_ranges == widest_ranges(architecture)
    assert json.loads((bundle.path / MANIFEST).read_text())["schema"] == SCHEMA


def test_architecture_and_ranges_are_computed_once(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def count(config: dict[str, Any], where: str) -> Architecture:
        counted.append(where)
        return architecture_from_config(config, where)

    monkeypatch.setattr("anyflow_deploy.bundle.manifest.architecture_from_config", count)
    opened = load_bundle(bundle.path).manifest
    assert opened.architecture is opened.architecture and opened.shape_ranges is opened.shape_ranges
    assert counted == [MANIFEST]


def test_what_a_manifest_computed_is_no_part_of_it(bundle: Bundle) -> None:
    fresh = Manifest.model_validate_json((bundle.path / MANIFEST).read_bytes())
    used = bundle.manifest
    assert used.shape_ranges.frames == widest_ranges(used.architecture).frames
    assert (
        used == fresh
        and used.model_dump_json() == fresh.model_dump_json()
        and repr(used) == repr(fresh)
    )
    again = pickle.loads(pickle.dumps(used))
    assert again == fresh and again.architecture == used.architecture
    changed = used.model_copy(update={"config": MODELS["1.3b"].architecture.as_config()})
    assert changed.architecture == MODELS["1.3b"].architecture != used.architecture
    assert used.model_copy(deep=True) == fresh


def test_files_are_hashed_as_they_are_written_in_pieces(destination: Path) -> None:
    pieces: list[Any] = [
        b"",
        b"a" * 1000,
        memoryview(b"b" * 7),
        memoryview(bytearray(range(8))).cast("h"),
        b"c",
    ]
    with BundleWriter(destination) as writer:
        file = writer.create(WEIGHTS)
        for piece in pieces:
            file.write(piece)
        record = file.close()
        assert (writer.folder / WEIGHTS).read_bytes() == b"".join(pieces)
        assert record == FileRecord(bytes=1016, sha256=file_sha256(writer.folder / WEIGHTS))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(destination: Path, error: type[BaseException]) -> None:
    with pytest.raises(error, match="midway"):
        write_half(destination, error)
    assert names(destination.parent) == []


def test_leaving_without_finish_leaves_nothing(destination: Path) -> None:
    with BundleWriter(destination) as writer:
        writer.write(GRAPH, b"graph")
        assert names(destination.parent) == [writer.folder.name]
    assert names(destination.parent) == []


def test_an_error_while_replacing_keeps_the_old_bundle(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="midway"):
        write_half(bundle.path, ValueError, overwrite=True)
    assert load_bundle(bundle.path) == bundle
    assert names(bundle.path.parent) == ["bundle"]


def test_finish_refuses_a_manifest_it_could_not_read_back(destination: Path) -> None:
    with BundleWriter(destination) as writer:
        writer.write(GRAPH, b"graph")
        with pytest.raises(BundleError, match=r"no file 'other\.onnx'"):
            writer.finish(manifest(graph="other.onnx"))
    assert names(destination.parent) == []


def test_an_existing_destination_is_refused_before_any_work(bundle: Bundle) -> None:
    with pytest.raises(
        OutputError,
        match=r"/bundle exists\. Choose another --output, or replace it with --overwrite\.$",
    ):
        BundleWriter(bundle.path)
    assert load_bundle(bundle.path) == bundle


def test_overwrite_replaces_a_bundle(bundle: Bundle) -> None:
    replaced = write_bundle(bundle.path, b"other weights", overwrite=True)
    assert load_bundle(bundle.path) == replaced != bundle
    assert names(bundle.path.parent) == ["bundle"]


def test_overwrite_does_not_need_anything_to_replace(destination: Path) -> None:
    assert write_bundle(destination, overwrite=True) == load_bundle(destination)


@pytest.mark.parametrize("kind", ["folder", "full folder", "file"])
def test_overwrite_spares_what_is_no_bundle(destination: Path, kind: str) -> None:
    if kind == "file":
        destination.write_text("thesis")
    else:
        destination.mkdir()
    if kind == "full folder":
        (destination / "thesis.tex").write_text("thesis")
    with pytest.raises(
        OutputError, match=r"exists and is not a bundle, so --overwrite does not replace it"
    ):
        BundleWriter(destination, overwrite=True)
    assert destination.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_the_work_is_not_replaced(destination: Path, overwrite: bool) -> None:
    with BundleWriter(destination, overwrite) as writer:
        writer.write(WEIGHTS, b"weights")
        writer.write(GRAPH, b"graph")
        destination.mkdir()
        (destination / "thesis.tex").write_text("thesis")
        with pytest.raises(OutputError, match=r"bundle appeared .* in .*/bundle-1\.$"):
            writer.finish(manifest())
    assert names(destination) == ["thesis.tex"]
    assert load_bundle(destination.with_name("bundle-1")).manifest.files


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_the_parent_must_be_a_folder(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError,
        match=rf"/{parent} is not a folder\. Make it first, or choose another --output\.$",
    ):
        BundleWriter(tmp_path / parent / "bundle")


# Killed writers


def test_a_replacement_that_fails_puts_the_old_bundle_back(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_for_partial(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("no rename today")
        return rename(path, target)

    monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(OutputError, match="no rename today"):
        write_bundle(bundle.path, b"other weights", overwrite=True)
    assert load_bundle(bundle.path) == bundle


SLOW_WRITER = """
import runpy, sys, time
from pathlib import Path
from anyflow_deploy.bundle import bundle, outputs
destination, stage, tests = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def wait():
    print("ready", flush=True)
    time.sleep(60)
if stage == "finishing":
    # The manifest is written, the folder not yet renamed.
    outputs.fsync_tree = lambda folder: wait()
with bundle.BundleWriter(destination, overwrite=True) as writer:
    file = writer.create("weights.safetensors")
    file.write(b"other")
    if stage == "writing":
        wait()
    writer.add("weights.safetensors", file.close())
    writer.write("transition.onnx", b"graph")
    writer.finish(runpy.run_path(tests)["manifest"]())
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("stage", ["writing", "finishing"])
def test_kill_9_leaves_no_half_bundle(destination: Path, stage: str, old: bool) -> None:
    before = write_bundle(destination) if old else None
    command = [sys.executable, "-c", SLOW_WRITER, str(destination), stage, __file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    left, *rest = names(destination.parent)
    assert left.endswith(".partial") and rest == (["bundle"] if old else [])
    if before is not None:
        assert load_bundle(destination) == before
    write_bundle(destination, overwrite=old)
    assert names(destination.parent) == ["bundle"]


# Reading


def test_file_names_what_there_is(bundle: Bundle) -> None:
    assert bundle.file(GRAPH) == bundle.path / GRAPH
    with pytest.raises(
        BundleError, match=rf"has no file 'other\.onnx'; its manifest lists {WEIGHTS}, {GRAPH}\.$"
    ):
        bundle.file("other.onnx")


@pytest.mark.parametrize("kind", ["missing", "empty folder", "file"])
def test_no_bundle(destination: Path, kind: str) -> None:
    if kind == "empty folder":
        destination.mkdir()
    elif kind == "file":
        destination.touch()
    with pytest.raises(
        BundleError,
        match=(
            r"/bundle is not a bundle: manifest\.json cannot be read \(.+\)\. Make one with anyflow"
        ),
    ):
        load_bundle(destination)


@pytest.mark.parametrize(
    "text",
    # The deeply nested one was a reported defect.
    [
        "",
        "{",
        "[]",
        '"schema"',
        "null",
        '{"model": "tiny"}',
        "\udcff",
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_damaged_json(bundle: Bundle, text: str) -> None:
    (bundle.path / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        BundleError,
        match=r"manifest\.json is not a manifest: no JSON object with a 'schema'\. Export again\.$",
    ):
        load_bundle(bundle.path)


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_manifest_cut_short(bundle: Bundle, cut: int) -> None:
    text = (bundle.path / MANIFEST).read_bytes().rstrip()
    (bundle.path / MANIFEST).write_bytes(text[:-cut])
    with pytest.raises(BundleError, match="is not a manifest"):
        load_bundle(bundle.path)


@pytest.mark.parametrize(
    ("schema", "advice"),
    [
        (SCHEMA + 1, r"Update anyflow_deploy"),
        (0, r"Export again"),
        ("2", r"Export again"),
        (None, r"Export again"),
    ],
)
def test_other_schemas_are_refused_by_name(bundle: Bundle, schema: object, advice: str) -> None:
    folder = edit(bundle, lambda m: m.update(schema=schema, novelty=1))
    with pytest.raises(
        BundleError,
        match=rf"has manifest schema {schema!r}; this version reads {SCHEMA}\. {advice}\.$",
    ):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.update(novelty=1), "novelty"),
        (lambda m: m["schedule"].update(novelty=1), r"schedule\.novelty"),
        (lambda m: m["files"][GRAPH].update(md5=""), rf"files\.{GRAPH}\.md5"),
        (lambda m: m.pop("precision"), "precision"),
        (lambda m: m["video"].pop("fps"), r"video\.fps"),
        (lambda m: m["schedule"].update(steps="4"), r"schedule\.steps"),
        (lambda m: m["files"][GRAPH].update(bytes=5.0), rf"files\.{GRAPH}\.bytes"),
        (lambda m: m.update(kind="sideways"), "kind"),
        (
            lambda m: m["graphs"]["transition"]["inputs"][0].update(dtype="int4"),
            r"graphs\.transition\.inputs\.0\.dtype",
        ),
        (lambda m: m.update(schema=True), "schema"),
        (lambda m: m.update(files=[]), "files"),
    ],
)
def test_damaged_manifests_name_the_place(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], place: str
) -> None:
    folder = edit(bundle, change)
    with pytest.raises(
        BundleError, match=rf"manifest\.json is damaged at '{place}': .+\. Export again\.$"
    ):
        load_bundle(folder)


def test_graphs_of_another_kind_are_named(bundle: Bundle) -> None:
    message = (
        r"is damaged: value error, a causal bundle holds text, chunk, compress, not transition\."
        r" Export again\.$"
    )
    with pytest.raises(BundleError, match=message):
        load_bundle(edit(bundle, lambda m: m.update(kind="causal")))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m["ranges"].pop("batch"), "batch"),
        (lambda m: m["ranges"].update(depth=m["ranges"]["batch"]), "depth"),
        (lambda m: m["ranges"]["frames"].update(minimum=9, maximum=5), "frames|range"),
        (lambda m: m["config"].update(novelty=1), "novelty"),
        (lambda m: m["config"].pop("ffn_dim"), "ffn_dim"),
    ],
)
def test_ranges_and_config_are_checked_when_loading(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], word: str
) -> None:
    folder = edit(bundle, change)
    with pytest.raises(BundleError, match=word):
        load_bundle(folder)


def test_a_graph_has_to_be_listed(bundle: Bundle) -> None:
    (bundle.path / "other.onnx").touch()
    folder = edit(bundle, lambda m: m["graphs"]["transition"].update(file="other.onnx"))
    with pytest.raises(BundleError, match=r"has no file 'other\.onnx'; its manifest lists"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit_is_found(bundle: Bundle, name: str, position: int) -> None:
    data = bytearray((bundle.path / name).read_bytes())
    data[position] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(
        BundleError,
        match=(
            rf"/{name} was changed: its SHA-256 is [0-9a-f]{{64}}, the manifest says"
            r" [0-9a-f]{64}\."
        ),
    ):
        load_bundle(bundle.path)
    assert load_bundle(bundle.path, verify=False) == bundle


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("size", [0, 6, 8])
def test_another_size_is_found_even_without_hashes(bundle: Bundle, size: int, verify: bool) -> None:
    (bundle.path / WEIGHTS).write_bytes(b"weights!"[:size])
    with pytest.raises(
        BundleError,
        match=rf"/{WEIGHTS} has {size} bytes; the manifest says 7\. Copy the bundle again",
    ):
        load_bundle(bundle.path, verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("instead", [None, "folder", "dangling link"])
def test_a_missing_file_is_named(bundle: Bundle, instead: str | None, verify: bool) -> None:
    path = bundle.path / WEIGHTS
    path.unlink()
    if instead == "folder":
        path.mkdir()
    elif instead == "dangling link":
        path.symlink_to("nowhere")
    with pytest.raises(BundleError, match=rf"bundle lacks '{WEIGHTS}', which its manifest lists"):
        load_bundle(bundle.path, verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "name",
    ["../secret", "{parent}/secret", "link", "folder/secret", "a/../../secret", "..", "a\\secret"],
)
def test_paths_that_leave_the_folder_are_refused(bundle: Bundle, name: str, verify: bool) -> None:
    parent = bundle.path.parent
    (parent / "secret").write_bytes(b"graph")
    (bundle.path / "link").symlink_to(parent / "secret")
    (bundle.path / "folder").symlink_to(parent)
    name = name.format(parent=parent)
    folder = edit(bundle, lambda m: m["files"].update({name: m["files"][GRAPH]}))
    with pytest.raises(
        BundleError,
        match=(
            r"manifest\.json names '.*', which leaves the bundle's folder\. Do not use this"
            r" bundle\."
        ),
    ):
        load_bundle(folder, verify)


@pytest.mark.parametrize(
    "name", ["loop", "a\0b", "a" * 300], ids=["loop of links", "NUL", "too long"]
)
def test_names_that_are_no_paths_are_refused(bundle: Bundle, name: str) -> None:
    (bundle.path / "loop").symlink_to("loop")
    folder = edit(bundle, lambda m: m["files"].update({name: m["files"][GRAPH]}))
    with pytest.raises(BundleError, match=r"loop|a.*b|aaa"):
        load_bundle(folder)


def cached(bundle: Bundle, cache: Path) -> Path:
    """The bundle as the Hub's cache keeps it: a snapshot of links into blobs/."""
    repository = cache / "models--me--bundle"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(bundle.path.iterdir())):
        blob = repository / "blobs" / str(number)
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("verify", [True, False])
def test_a_bundle_in_the_hubs_cache_is_read(bundle: Bundle, tmp_path: Path, verify: bool) -> None:
    snapshot = cached(bundle, tmp_path / "hub")
    assert load_bundle(snapshot, verify).digest == bundle.digest
    (tmp_path / "link").symlink_to(snapshot)
    assert load_bundle(tmp_path / "link", verify).digest == bundle.digest


@pytest.mark.parametrize("target", ["../../../outside", "../../outside", "../../blobs/x/outside"])
def test_a_link_out_of_the_hubs_blobs_is_refused(
    bundle: Bundle, tmp_path: Path, target: str
) -> None:
    snapshot = cached(bundle, tmp_path / "hub")
    (snapshot / GRAPH).unlink()
    (snapshot / GRAPH).symlink_to(target)
    outside = snapshot / target
    outside.parent.mkdir(exist_ok=True)
    outside.write_bytes(b"graph")
    with pytest.raises(BundleError, match=r"names 'transition\.onnx', which leaves the bundle's"):
        load_bundle(snapshot)


def test_a_bundle_may_be_a_hub_id(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached(bundle, tmp_path / "hub")
    calls: list[object] = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((hub_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_bundle("me/bundle@main").digest == bundle.digest
    assert calls == [
        ("me/bundle", "main", [MANIFEST]),
        ("me/bundle", "c0ffee", [MANIFEST, *sorted(bundle.manifest.files)]),
    ]
    (snapshot / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"me/bundle on the Hub is not a bundle: it has no"):
        load_bundle("me/bundle")


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_what_may_not_be_read_is_not_called_missing(
    bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=rf"/{name} is there and may not be read \(permission"):
        load_bundle(bundle.path)


def test_links_inside_the_folder_and_files_in_subfolders_are_fine(bundle: Bundle) -> None:
    (bundle.path / "sub").mkdir()
    (bundle.path / GRAPH).rename(bundle.path / "sub" / GRAPH)
    (bundle.path / GRAPH).symlink_to(f"sub/{GRAPH}")
    folder = edit(bundle, lambda m: m["files"].update({f"sub/{GRAPH}": m["files"][GRAPH]}))
    assert set(load_bundle(folder).manifest.files) == {WEIGHTS, GRAPH, f"sub/{GRAPH}"}


def test_files_that_came_later_do_not_matter(bundle: Bundle) -> None:
    (bundle.path / "validation.json").write_text("{}")
    assert load_bundle(bundle.path) == bundle


def test_verify_false_reads_no_file(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "anyflow_deploy.bundle.atomic_io.file_sha256", lambda path: pytest.fail(f"{path} was read")
    )
    assert load_bundle(bundle.path, verify=False) == bundle


def test_hash_of_a_file_larger_than_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyflow_deploy.bundle.atomic_io._BLOCK", 10)
    (tmp_path / "file").write_bytes(bytes(range(256)))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(bytes(range(256))).hexdigest()
