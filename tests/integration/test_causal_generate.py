"""From a prompt, a picture or a clip to a video that grows, by the commands a user types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AnyFlowFARPipeline, AutoencoderKLWan
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from anyflow_deploy import MODELS, AnyFlowError, Bundle, Schedule, load_engine, noise
from anyflow_deploy.checkpoints.tiny import save_tiny_pipeline
from anyflow_deploy.cli.generate import GenerateOptions, generate
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines.sampler import Chunk, stream
from anyflow_deploy.engines.step_policy import FirstChunkPolicy
from anyflow_deploy.pipelines import video_pipeline
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.frame_fit import FrameFit
from anyflow_deploy.pipelines.pictures import load_picture
from anyflow_deploy.pipelines.text_encoder import encode_prompts, save_embeddings
from anyflow_deploy.pipelines.vae import StreamingDecoder, decode_video, encode_video
from anyflow_deploy.pipelines.video_io import VideoWriter, load_video, save_video
from tests.media import turn_clip, write_clip

PROMPT = "a red fox runs in the snow"
CHUNKS = (1, 3, 1)
HEIGHT, WIDTH = 32, 64


@pytest.fixture(scope="module")
def words(far_pipeline: Path) -> NDArray[np.float32]:
    return encode_prompts(far_pipeline, [PROMPT], 512)


@pytest.fixture(scope="module")
def embeddings(words: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "fox.safetensors"
    save_embeddings(path, words, [PROMPT])
    return path


def moving(frames: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A smooth picture that moves, so that encoding costs little of it."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return np.stack([np.roll(ramp, 2 * frame, axis=1) for frame in range(frames)]).astype(np.uint8)


def asked(bundle: Bundle, embeddings: Path, **changes: object) -> GenerateOptions:
    common = {
        "bundle": bundle.path,
        "prompt_embeds": embeddings,
        "steps": 2,
        "frames": 17,
        "height": HEIGHT,
        "width": WIDTH,
    }
    return GenerateOptions(**{**common, "chunks": CHUNKS, **changes})  # type: ignore[arg-type]


def streamed(bundle: Bundle, words: NDArray[np.float32], **changes: object) -> NDArray[np.float32]:
    """The same video by the library's own loop."""
    arguments = {"policy": Schedule.uniform(2), "chunk_plan": CHUNKS, **changes}
    start = noise((1, sum(CHUNKS), 16, HEIGHT // 8, WIDTH // 8), 0)
    return np.concatenate(
        [c.latents for c in stream(load_engine(bundle), start, words, **arguments)], axis=1
    )  # type: ignore[arg-type]


# The VAE


def test_decoding_in_pieces_equals_decoding_the_whole(far_pipeline: Path) -> None:
    latents = noise((1, 6, 16, 4, 6), 3)
    decoder = StreamingDecoder(far_pipeline)
    pieces = [decoder.decode(latents[:, a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert [len(piece) for piece in pieces] == [1, 12, 8]
    np.testing.assert_array_equal(np.concatenate(pieces), decode_video(far_pipeline, latents)[0])


def test_decoding_in_pieces_equals_diffusers_to_1e_4(far_pipeline: Path) -> None:
    latents = noise((1, 4, 16, 4, 4), 4)
    decoder = StreamingDecoder(far_pipeline)
    ours = torch.cat([decoder.decode_pixels(latents[:, a:b]) for a, b in ((0, 3), (3, 4))], dim=2)
    vae = AutoencoderKLWan.from_pretrained(far_pipeline / "vae")
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        theirs = vae.decode(torch.from_numpy(latents).permute(0, 2, 1, 3, 4) * std + mean).sample
    assert (ours - theirs).abs().max() <= 1e-4


def test_two_decoders_do_not_mix(far_pipeline: Path) -> None:
    both = [noise((1, 3, 16, 4, 4), seed) for seed in (1, 2)]
    decoders = [StreamingDecoder(far_pipeline) for _ in both]
    pieces: list[list[NDArray[np.uint8]]] = [[], []]
    for start in range(3):
        for index, decoder in enumerate(decoders):
            pieces[index].append(decoder.decode(both[index][:, start : start + 1]))
    for latents, made in zip(both, pieces, strict=True):
        np.testing.assert_array_equal(np.concatenate(made), decode_video(far_pipeline, latents)[0])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 16, 4, 4), r"takes \(1, f, C, H, W\)"),
        ((1, 0, 16, 4, 4), "f at least 1"),
        (
            (1, 1, 16, 4, 6),
            r"\(C, H, W\) \(16, 4, 6\) and those before had \(16, 4, 4\); make another decoder",
        ),
    ],
)
def test_pieces_that_do_not_belong_are_refused(
    far_pipeline: Path, shape: tuple[int, ...], message: str
) -> None:
    decoder = StreamingDecoder(far_pipeline)
    decoder.decode(noise((1, 1, 16, 4, 4), 0))
    with pytest.raises(AnyFlowError, match=message):
        decoder.decode(noise(shape, 0))


def test_encoding_equals_diffusers(far_pipeline: Path) -> None:
    frames = moving(9)
    ours = encode_video(far_pipeline, frames)
    assert ours.shape == (1, 3, 16, HEIGHT // 8, WIDTH // 8) and ours.dtype == np.float32
    pipe = AnyFlowFARPipeline.from_pretrained(far_pipeline)
    with torch.no_grad():
        theirs = pipe.encode_video(
            torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255, HEIGHT, WIDTH
        ).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert decode_video(far_pipeline, ours).shape == (1, 9, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (moving(4), r"frames is 4; allowed are 4n\+1"),
        (moving(1, height=36), "height is 36; allowed are multiples of 8"),
        (moving(1)[0], r"allowed is uint8 \(frames, height, width, 3\)"),
        (moving(1).astype(np.float32), "frames are float32"),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused(
    far_pipeline: Path, frames: NDArray[np.uint8], message: str
) -> None:
    with pytest.raises(AnyFlowError, match=message):
        encode_video(far_pipeline, frames)


# Files


def test_a_growing_video_is_readable_while_it_grows(tmp_path: Path) -> None:
    path, frames = tmp_path / "grows.mp4", moving(21)
    with VideoWriter(path, 16, (HEIGHT, WIDTH)) as writer:
        assert not path.exists()
        for start, end in ((0, 1), (1, 13), (13, 21)):
            writer.append(frames[start:end])
            assert writer.frames == end
            shown = load_video(path)
            assert shown.shape == (end, HEIGHT, WIDTH, 3)
            assert np.abs(shown.astype(int) - frames[:end]).mean() < 8
    with av.open(str(path)) as container:
        packets = [
            (p.pts * p.time_base * 16, p.is_keyframe) for p in container.demux(video=0) if p.size
        ]
        assert container.streams.video[0].average_rate == 16
    assert [time for time, _ in packets] == list(range(21))
    assert all(packets[start][1] for start in (0, 1, 13))


def test_a_growing_video_shows_what_a_whole_one_shows(tmp_path: Path) -> None:
    frames = moving(13)
    save_video(tmp_path / "whole.mp4", frames, 16)
    with VideoWriter(tmp_path / "grown.mp4", 16, (HEIGHT, WIDTH)) as writer:
        for start in (0, 6):
            writer.append(frames[start : start + 7] if start else frames[:6])
    whole = load_video(tmp_path / "whole.mp4")
    grown = load_video(tmp_path / "grown.mp4")
    assert whole.shape == grown.shape and np.abs(whole.astype(int) - grown).mean() < 2


def test_after_an_exception_the_pieces_stay(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 16, (HEIGHT, WIDTH))
    with contextlib.suppress(RuntimeError), writer:
        writer.append(moving(5))
        raise RuntimeError
    assert len(load_video(tmp_path / "a.mp4")) == 5
    with pytest.raises(AnyFlowError, match="the writer of .* is closed"):
        writer.append(moving(1))


def test_a_writer_refuses_what_it_cannot_append(tmp_path: Path) -> None:
    with pytest.raises(AnyFlowError, match=r"ends in .mkv; allowed are .mp4"):
        VideoWriter(tmp_path / "a.mkv", 16, (HEIGHT, WIDTH))
    with pytest.raises(AnyFlowError, match="a video of 31 x 64 cannot be encoded.*even"):
        VideoWriter(tmp_path / "a.mp4", 16, (31, WIDTH))
    with VideoWriter(tmp_path / "a.mp4", 16, (HEIGHT, WIDTH)) as writer:
        for wrong in (moving(1, height=16), moving(1)[:0], moving(1).astype(np.float32)):
            with pytest.raises(
                AnyFlowError, match=r"takes uint8 \(frames, 32, 64, 3\), at least one frame"
            ):
                writer.append(wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_pictures_are_read(tmp_path: Path, name: str) -> None:
    Image.fromarray(moving(1)[0]).save(tmp_path / name)
    picture = load_picture(tmp_path / name)
    assert picture.shape == (1, HEIGHT, WIDTH, 3) and picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - moving(1)).mean() < (0.01 if name == "a.png" else 4)


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(AnyFlowError, match=r"a.png cannot be read as an image"):
        load_picture(tmp_path / "a.png")
    with pytest.raises(AnyFlowError, match=r"b.mp4 cannot be read as a video"):
        load_video(tmp_path / "b.mp4")


# The command


def test_the_latents_are_those_of_stream(
    far_bundle: Bundle,
    embeddings: Path,
    words: NDArray[np.float32],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "z.safetensors"
    assert generate(asked(far_bundle, embeddings, output=output)) == 0
    np.testing.assert_array_equal(load_file(output)["latents"], streamed(far_bundle, words))
    assert "3 chunks (1, 3, 1), cache of " in capsys.readouterr().err


def test_more_steps_for_the_first_chunk(
    far_bundle: Bundle, embeddings: Path, words: NDArray[np.float32], tmp_path: Path
) -> None:
    output = tmp_path / "z.safetensors"
    generate(asked(far_bundle, embeddings, first_steps=4, output=output))
    wanted = streamed(
        far_bundle, words, policy=FirstChunkPolicy(Schedule.uniform(4), Schedule.uniform(2))
    )
    np.testing.assert_array_equal(load_file(output)["latents"], wanted)
    assert np.abs(wanted - streamed(far_bundle, words)).max() > 1e-3


def test_whole_and_streamed_show_the_same(
    far_bundle: Bundle,
    far_pipeline: Path,
    embeddings: Path,
    words: NDArray[np.float32],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, grows in (("whole.mp4", False), ("grown.mp4", True)):
        assert generate(asked(far_bundle, embeddings, stream=grows, output=tmp_path / name)) == 0
        said = capsys.readouterr().err
        assert all(
            stage in said
            for stage in ("first generated frame", "3 chunks", "text", "engine", "VAE", "file")
        )
    wanted = decode_video(far_pipeline, streamed(far_bundle, words))[0]
    save_video(tmp_path / "wanted.mp4", wanted, 16)
    with VideoWriter(tmp_path / "wanted-grown.mp4", 16, (HEIGHT, WIDTH)) as writer:
        for start, end in ((0, 1), (1, 13), (13, 17)):
            writer.append(wanted[start:end])
    assert load_video(tmp_path / "whole.mp4").shape == (17, HEIGHT, WIDTH, 3)
    for made, same in (("whole", "wanted"), ("grown", "wanted-grown")):
        # x264 on several threads makes other blocks of the same frames now and then: 1 time in 50
        # here, 0.02 levels in the mean
        difference = load_video(tmp_path / f"{made}.mp4").astype(int) - load_video(
            tmp_path / f"{same}.mp4"
        )
        assert np.abs(difference).mean() < 0.2 < np.abs(np.diff(wanted.astype(int), axis=0)).mean()


def test_streaming_puts_a_chunk_on_disk_before_the_next_is_begun(
    far_bundle: Bundle, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / "grown.mp4", []

    def watched(*args: object, **kwargs: object) -> Iterator[Chunk]:
        for chunk in stream(*args, **kwargs):  # type: ignore[arg-type]
            seen.append(len(load_video(output)) if output.exists() else 0)
            yield chunk

    monkeypatch.setattr(video_pipeline, "stream", watched)
    generate(asked(far_bundle, embeddings, stream=True, output=output))
    assert seen == [0, 1, 13] and len(load_video(output)) == 17


def test_an_interrupted_stream_keeps_its_chunks(
    far_bundle: Bundle, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> Iterator[Chunk]:
        chunks = stream(*args, **kwargs)  # type: ignore[arg-type]
        yield next(chunks)
        yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(video_pipeline, "stream", broken)
    with pytest.raises(
        KeyboardInterrupt, match="grown.mp4 holds the first 13 frames, whole and playable"
    ):
        generate(asked(far_bundle, embeddings, stream=True, output=tmp_path / "grown.mp4"))
    assert len(load_video(tmp_path / "grown.mp4")) == 13


@pytest.mark.parametrize("grows", [False, True])
def test_a_video_begins_with_a_picture(
    far_bundle: Bundle, far_pipeline: Path, embeddings: Path, tmp_path: Path, grows: bool
) -> None:
    Image.fromarray(moving(1)[0]).save(tmp_path / "first.png")
    output = tmp_path / "video.mp4"
    generate(
        asked(far_bundle, embeddings, image=tmp_path / "first.png", stream=grows, output=output)
    )
    wanted = decode_video(far_pipeline, encode_video(far_pipeline, moving(1)))[0]
    with VideoWriter(tmp_path / "wanted.mp4", 16, (HEIGHT, WIDTH)) as writer:
        writer.append(wanted)
    shown = load_video(output)
    assert (
        len(shown) == 17
        and np.abs(shown[0].astype(int) - load_video(tmp_path / "wanted.mp4")[0]).mean() < 4
    )


def test_a_clip_of_a_phone_is_continued(
    far_bundle: Bundle,
    far_pipeline: Path,
    embeddings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Turned by 90 degrees, 32 frames a second, too large and too long."""
    shown = moving(40, HEIGHT + 32, WIDTH + 64)
    stored = [np.rot90(frame, 1) for frame in shown]
    path = write_clip(tmp_path / "a.mov", stored, fps=32)
    turn_clip(path, (0, 1, -1, 0))
    with ClipReader(path) as clip:
        every = clip.read_first(32, 40, FrameFit(HEIGHT, WIDTH, "crop"))
    assert np.abs(every[0].astype(int) - shown[0][::2, ::2]).mean() < 6
    for take, wanted in (("first", every[0:26:2]), ("last", every[14:40:2])):
        output = tmp_path / f"{take}.safetensors"
        generate(asked(far_bundle, embeddings, video=path, take=take, fit="crop", output=output))
        context = encode_video(far_pipeline, wanted)
        np.testing.assert_array_equal(load_file(output)["latents"][:, :4], context)
        said = " ".join(capsys.readouterr().err.split())
        assert (
            "a.mov is 64 x 128, turned by 90 degrees, 32 fps, 1.25 s; the"
            f" {take} 13 frames are used, 16 a second (0.81 s)" in said
        )


def test_a_picture_and_a_clip_are_context(
    far_bundle: Bundle,
    far_pipeline: Path,
    embeddings: Path,
    words: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    Image.fromarray(moving(1)[0]).save(tmp_path / "first.png")
    save_video(tmp_path / "clip.mp4", moving(13), 16)
    for flag, name, frames in (
        ("image", "first.png", load_picture(tmp_path / "first.png")),
        ("video", "clip.mp4", load_video(tmp_path / "clip.mp4")),
    ):
        output = tmp_path / f"{flag}.safetensors"
        generate(
            asked(far_bundle, embeddings, **{flag: tmp_path / name}, first_steps=3, output=output)
        )
        context = encode_video(far_pipeline, frames)
        policy = FirstChunkPolicy(Schedule.uniform(3), Schedule.uniform(2))
        wanted = streamed(far_bundle, words, context=context, policy=policy)
        latents = load_file(output)["latents"]
        np.testing.assert_array_equal(latents, wanted)
        np.testing.assert_array_equal(latents[:, : context.shape[1]], context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chunks": None},
            (
                r"own chunk plan \(1, 3, .*2\) has 21 latent frames, and 17 frames are 5 .*--frames"
                r" 81, .* 1,3,1\."
            ),
        ),
        (
            {"chunks": (1, 3, 3)},
            (
                r"plan \(1, 3, 3\) has 7 latent frames, and 17 frames are 5 latent frames. Give"
                r" --frames 25"
            ),
        ),
        ({"cache_budget": 0.00001}, r"takes [\d.]+ MB .*; 0.0 MB are allowed"),
        ({"height": 40}, "height is 40; allowed are multiples of 16"),
        (
            {"image": "wide.png"},
            r"wide.png is 32 x 96 and the requested video is 32 x 64 .*--height and --width",
        ),
        (
            {"image": "first.png", "chunks": (3, 2)},
            r"--image gives one latent frame; .*\(3, 2\) end after 3.*--chunks 1,3,1",
        ),
        (
            {"image": "first.png", "frames": 1, "chunks": (1,)},
            "nothing would be left to make. Raise --frames",
        ),
        (
            {"video": "clip9.mp4"},
            (
                r"--video has 9 frames, which are 3 latent frames; .*--chunks 3,1,1, or a clip of 1"
                r" or 13 frames"
            ),
        ),
        ({"video": "clip8.mp4"}, r"frames is 8; allowed are 4n\+1"),
        ({"video": "none.mp4"}, "none.mp4 cannot be read as a video"),
        ({"image": "first.png", "video": "clip9.mp4"}, "give one of --image and --video"),
        (
            {"image": "first.png", "take": "last"},
            "--take is for a clip, and there is none. Give --video",
        ),
        ({"fit": "crop"}, "--fit is for a picture or a clip, and there is none"),
        ({"background": "white"}, "--background is for a picture or a clip, and there is none"),
        ({"image": "first.png", "background": "x"}, "background is 'x'; allowed are the names"),
        (
            {"stream": True, "output": "z.safetensors"},
            r"--stream writes a video that grows, .*Give one that ends in .mp4",
        ),
        ({"stream": True, "output": "z.mkv"}, r"--stream writes a video that grows"),
        ({"sigmas": (1.0, 0.5), "steps": None, "first_steps": 3}, "leave out --first-steps"),
    ],
)
def test_bad_requests_are_refused(
    far_bundle: Bundle,
    embeddings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        video_pipeline, "load_engine", lambda *_, **__: pytest.fail("the engine was loaded")
    )
    Image.fromarray(moving(1)[0]).save("first.png")
    Image.fromarray(moving(1, width=96)[0]).save("wide.png")
    save_video(Path("clip9.mp4"), moving(9), 16)
    save_video(Path("clip8.mp4"), moving(8), 16)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AnyFlowError, match=message):
        generate(asked(far_bundle, embeddings, **changes))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "flag",
    [
        "--stream",
        "--image=a.png",
        "--video=a.mp4",
        "--chunks=1,3",
        "--cache-budget=1",
        "--first-steps=8",
    ],
)
def test_a_bidirectional_bundle_refuses_causal_flags(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_options(GenerateOptions, [str(tiny_bundle.path), "--prompt", PROMPT, flag])
    name = flag.partition("=")[0]
    with pytest.raises(
        AnyFlowError, match=rf"{name} needs a causal bundle, and .* is bidirectional \(tiny\)"
    ):
        generate(options)


def test_flags_are_read_from_words() -> None:
    words = [
        "b",
        "--prompt",
        "fox",
        "--stream",
        "--chunks",
        "1,3,3",
        "--cache-budget",
        "0.5",
        "--first-steps",
        "8",
    ]
    options = parse_options(GenerateOptions, words)
    assert (options.stream, options.chunks, options.cache_budget, options.first_steps) == (
        True,
        (1, 3, 3),
        0.5,
        8,
    )
    for chunks in ("1,0", "1,x", ""):
        with pytest.raises(AnyFlowError, match="--chunks is"):
            parse_options(GenerateOptions, ["b", f"--chunks={chunks}"])


def test_the_causal_tiny_pipeline_is_diffusers(far_pipeline: Path) -> None:
    pipe = AnyFlowFARPipeline.from_pretrained(far_pipeline)
    assert type(pipe.transformer).__name__ == "AnyFlowFARTransformer3DModel"
    with pytest.raises(
        AnyFlowError, match="far-1.3b cannot be made here; allowed are 'tiny' and 'far-tiny'"
    ):
        save_tiny_pipeline(MODELS["far-1.3b"], far_pipeline.parent / "none")
