"""The ``hrsam`` command: each sub-command parses its arguments and calls one function of the package."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

DEFAULT_MODEL = "hrsam_pp_t.starter"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Cut objects out of high-resolution pictures by clicking.",
)

Model = Annotated[str, typer.Option("--model", help="A tag such as hrsam_pp_t.starter, or a .safetensors file.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, … or auto: cuda when there is one.")]
Side = Annotated[int, typer.Option("--side", min=64, max=16384, help="Longest side of the model's input in pixels.")]


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is chosen and done.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)


@app.command()
def demo(
    pictures: Annotated[Optional[list[Path]], typer.Argument(help="Picture files, or one folder of them.")] = None,  # noqa: UP045
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    side: Side = 1024,
    clicks: Annotated[int, typer.Option(min=1, max=20, help="Clicks of the simulated user.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the overlay; made when missing.")] = Path("out"),
    serve: Annotated[bool, typer.Option(help="Go on to the click page.")] = True,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than loopback lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(min=0, max=65535, help="Port; a free one unless given.")] = None,  # noqa: UP045
    state: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for work and uploads; one of your own unless given."),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Click on pictures in a browser:  hrsam demo photos/

    Without pictures it first cuts the bundled photograph with a few clicks of a simulated user and shows how good each mask is.
    """
    from hrsam.demo import apart, open_page, tour

    if pictures and not serve:
        raise ValueError("got pictures and --no-serve; leave one of them out")
    loaded = apart(lambda: _load(model, device))
    if not pictures:
        out.mkdir(parents=True, exist_ok=True)
        apart(lambda: tour(loaded, out / "demo.png", clicks=clicks, side=side, say=typer.echo))
    if serve:
        open_page(
            loaded, model, pictures or (), state=state, side=side, host=host, port=port, browser=browser, say=typer.echo
        )


@app.command()
def predict(
    photo: Annotated[Path, typer.Argument(help="JPEG, PNG, WebP, TIFF or BMP.")],
    click: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer reads the annotation at run time on Python 3.10 too
        typer.Option(
            "--click", help="X,Y on the object or X,Y,0 beside it, in pixels of the photo. Repeatable, in order."
        ),
    ] = None,
    box: Annotated[Optional[str], typer.Option("--box", help="X0,Y0,X1,Y1 in pixels.")] = None,  # noqa: UP045
    model: Model = DEFAULT_MODEL,
    side: Side = 1024,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", help="Mask, PNG with 0 and 255.")] = Path("mask.png"),
    overlay: Annotated[Optional[Path], typer.Option("--overlay", help="Photo with the mask drawn on it.")] = None,  # noqa: UP045
    json: Annotated[Optional[Path], typer.Option("--json", help="Every round: mask, predicted IoU, times.")] = None,  # noqa: UP045
    replay: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--replay", help="Do again what this click log says, at its side; --out gets a number an object."),
    ] = None,
) -> None:
    """Cut an object out of a photo:  hrsam predict cat.jpg --click 400,300 --click 80,90,0 --out mask.png"""
    from hrsam.clicks import parse_click
    from hrsam.predict import predict_file
    from hrsam.session import parse_box

    if replay is not None:
        if click or box is not None:
            raise ValueError("a click log holds all clicks and boxes; leave out --click and --box with --replay")
        _replay(photo, replay, model, device, out, overlay, json)
        return
    clicks = [parse_click(text) for text in click or ()]
    corners = None if box is None else parse_box(box)
    if not clicks and corners is None:
        raise ValueError("there is nothing to go by; give at least one --click X,Y or a --box X0,Y0,X1,Y1")
    if not photo.is_file():
        raise ValueError(f"there is no photo {photo}; give the path of a JPEG, PNG, WebP, TIFF or BMP file")
    cut = predict_file(
        photo, clicks, corners, _load(model, device), side=side, out=out, overlay_out=overlay, json_out=json
    )
    for note in cut.report["notes"]:
        typer.echo(f"note: {note}", err=True)
    last = cut.report["rounds"][-1]
    typer.echo(
        f"{out}: {last['area']} pixels, predicted IoU {last['predicted_iou']:.2f}, "
        f"encode {cut.report['encode_ms']:.0f} ms, last click {last['decode_ms']:.0f} ms"
    )


def _replay(
    photo: Path, file: Path, model: str, device: str, out: Path, overlay: Path | None, json: Path | None
) -> None:
    from hrsam.clicklog import read_log
    from hrsam.predict import replay_file
    from hrsam.weights import list_models

    log = read_log(file)
    if model == DEFAULT_MODEL and log.model.name in list_models():
        model = log.model.name
    loaded = _load(model, device)
    for name, area in replay_file(photo, log, file, loaded, out=out, overlay_out=overlay, json_out=json).items():
        typer.echo(f"{name}: {area} pixels")


@app.command()
def evaluate(
    reports: Annotated[Optional[list[Path]], typer.Argument(help="With --compare: two or more report.json.")] = None,  # noqa: UP045
    dataset: Annotated[Optional[str], typer.Option("--dataset", help="See --list.")] = None,  # noqa: UP045
    root: Annotated[Optional[Path], typer.Option("--root", help="Where the data set lies.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder for traces and reports.")] = None,  # noqa: UP045
    model: Model = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="model, or a baseline: grabcut, random_walker.")] = "model",
    protocol: Annotated[str, typer.Option(help="frozen, hrsam or ritm.")] = "frozen",
    side: Annotated[Optional[int], typer.Option(min=64, max=16384, help="Longest input side in pixels.")] = None,  # noqa: UP045
    clicks: Annotated[int, typer.Option(min=1, max=1000, help="Clicks on each object.")] = 20,
    ties: Annotated[Optional[str], typer.Option(help="Between deepest pixels: first or seeded.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Of seeded ties.")] = None,  # noqa: UP045
    tie_seeds: Annotated[int, typer.Option(min=0, max=100, help="Report the spread over so many tie seeds.")] = 0,
    replay: Annotated[Optional[Path], typer.Option(help="Make the clicks of this traces.jsonl.")] = None,  # noqa: UP045
    on_error: Annotated[str, typer.Option(help="When something of the data is unusable: stop or skip.")] = "stop",
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only the first so many objects.")] = None,  # noqa: UP045
    device: Device = "auto",
    processes: Annotated[int, typer.Option(min=0, max=1024, help="0: one a core on a CPU, one on a GPU.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of each process; may change the last bits.")] = 1,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=1024, help="Samples played in step; usually 8 on a GPU, 1 on a CPU."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the report.json files named as arguments.")
    ] = False,
    any_protocol: Annotated[
        bool, typer.Option("--any-protocol", help="Compare what differs in more than the model.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="List data sets, methods and protocols.")] = False,
) -> None:
    """How many clicks does a mask take?  hrsam evaluate --dataset davis --root data/DAVIS --out out/davis"""
    from hrsam import evaluate as run
    from hrsam.report import table

    if listing:
        for line in run.choices():
            typer.echo(line)
        return
    if compare:
        typer.echo(run.compare_files(reports or (), out, strict=not any_protocol))
        return
    if reports:
        raise ValueError(f"got {reports[0]} without --compare; files are named only to compare them")
    if dataset is None or root is None or out is None:
        raise ValueError("an evaluation needs --dataset, --root and --out; hrsam evaluate --list names the data sets")
    what = run.Evaluation(
        dataset, str(root), str(out), method=method, model=model, side=side, device=_device(device),
        protocol=run.choose_protocol(protocol, clicks=clicks, ties=ties, seed=seed), tie_seeds=tie_seeds,
        replay=None if replay is None else str(replay), on_error=on_error, limit=limit, processes=processes,
        threads=threads, batch=batch, command=shlex.join(["hrsam", *sys.argv[1:]]),
    )  # fmt: skip
    if report := run.evaluate(what, say=lambda line: typer.echo(line, err=True), progress=sys.stderr.isatty()):
        typer.echo(table(report))
        typer.echo(f"written: {out}/report.html, report.md, report.json, traces.jsonl")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="encoder, train-step, click, scan, attention, packing, demo or page.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="JSON report; folders are made.")] = None,  # noqa: UP045
    device: Device = "auto",
    dtype: Annotated[Optional[str], typer.Option(help="bfloat16, float16 or float32.")] = None,  # noqa: UP045
    side: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=16, max=16384, help="Side of the picture in pixels; repeatable."),
    ] = None,
    preset: Annotated[Optional[list[str]], typer.Option(help="Architecture; repeatable.")] = None,  # noqa: UP045
    peers: Annotated[bool, typer.Option("--peers", help="encoder: SAM's own ViT-B beside ours.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it runs.")] = False,
) -> None:
    """How fast, and beside what?  Checks every result before it is timed:  hrsam bench encoder --out encoder.json"""
    from hrsam.bench import command

    report = command.run(
        what, out, device=_device(device), dtype=dtype, sides=side, presets=preset, peers=peers, quick=quick
    )
    command.show(report)
    if out is not None:
        typer.echo(f"written: {out}")


@app.command()
def models() -> None:
    """List architectures and trained weights."""
    from hrsam.weights import describe_models

    for line in describe_models():
        typer.echo(line)


@app.command()
def doctor() -> None:
    """Say what is installed, which implementation will run and how much memory an encode takes."""
    from hrsam.doctor import report

    for line in report():
        typer.echo(line)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The authors', Meta's or MAE's checkpoint.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    origin: Annotated[str, typer.Option("--from", help="hrsam, sam or mae.")],
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="The file holds no decoder.")] = False,
    preset: Annotated[Optional[str], typer.Option(help="Architecture to build from an MAE file.")] = None,  # noqa: UP045
    decoder_from: Annotated[Optional[Path], typer.Option(help="SAM checkpoint with a decoder, for MAE.")] = None,  # noqa: UP045
) -> None:
    """Turn foreign weights into a safetensors file:  hrsam convert sam_vit_b.pth sam_b.safetensors --from sam"""
    from hrsam.weights import convert as convert_file

    summary = convert_file(source, target, origin, encoder_only=encoder_only, preset=preset, decoder_from=decoder_from)
    for name, value in summary.items():
        typer.echo(f"{name}: {value}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, for instance configs/hrsam_pp_t_starter.yaml.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, for instance seed=1.")] = None,  # noqa: UP045
    stop_after: Annotated[float, typer.Option(help="Seconds after which to save and stop.")] = float("inf"),
) -> None:
    """Train with simulated clicks; goes on with a run that was stopped or killed.

    Several devices: torchrun --nproc-per-node 2 -m hrsam train …

    Exit codes: 0 it is done, or SIGTERM or Ctrl-C came and it is saved; 2 wrong input; 3 a checkpoint or the log cannot be
    written; 4 a loss, gradient or weight is not finite; 5 a process that loads data is dead. The last checkpoint is whole
    after each of them.
    """
    from hrsam.config import read_settings
    from hrsam.train import TrainSettings
    from hrsam.train import train as run

    settings = read_settings(TrainSettings, config, overrides or ())
    typer.echo(run(settings, stop_after=stop_after, live=sys.stderr.isatty()))
    _report(settings)


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A YAML file, for instance configs/distill_hrsam_pp_b.yaml.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, for instance seed=1.")] = None,  # noqa: UP045
    stop_after: Annotated[float, typer.Option(help="Seconds after which to save and stop.")] = float("inf"),
    targets_only: Annotated[bool, typer.Option("--targets-only", help="Only fill the cache of embeddings.")] = False,
) -> None:
    """Teach an encoder a teacher's embeddings; goes on with a run that was stopped or killed.

    Several devices, and exit codes: as `hrsam train`.
    """
    from hrsam.config import read_settings
    from hrsam.distill import DistillSettings
    from hrsam.distill import distill as run

    settings = read_settings(DistillSettings, config, overrides or ())
    last = run(
        settings, stop_after=stop_after, targets_only=targets_only, live=sys.stderr.isatty(),
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(settings.targets if last is None else last)
    if last is not None:
        _report(settings)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training: its out.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    weights: Annotated[str, typer.Option(help="average or last.")] = "average",
    half: Annotated[bool, typer.Option("--half", help="Matrices in float16: half the bytes.")] = False,
    licence: Annotated[str, typer.Option(help="What others may do with them; written into the file.")] = "not stated",
) -> None:
    """Turn a training's last checkpoint into a weight file:  hrsam export out/run mine.safetensors"""
    from hrsam.release import release

    trained = release(run, target, weights=weights, dtype="float16" if half else None, licence=licence)
    typer.echo(f"{target}: {trained}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a training: its out.")],
    dataset: Annotated[Optional[list[str]], typer.Option("--dataset", help="Measure NoC on it; repeatable.")] = None,  # noqa: UP045
    root: Annotated[Optional[list[str]], typer.Option("--root", help="Where it lies; one for each --dataset.")] = None,  # noqa: UP045
    side: Side = 1024,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only the first so many objects of each.")] = None,  # noqa: UP045
    device: Device = "auto",
) -> None:
    """Write the page of a training, with its curves and clicks to a mask:  hrsam report out/run"""
    from hrsam.data.stream import Source
    from hrsam.runreport import write_run_report

    names, roots = dataset or [], root or []
    if len(names) != len(roots):
        raise ValueError(f"got {len(names)} --dataset and {len(roots)} --root; give one of each for every data set")
    sets = [Source(name=name, root=where) for name, where in zip(names, roots)]
    say, live = (lambda line: typer.echo(line, err=True)), sys.stderr.isatty()
    written = write_run_report(run, sets, side=side, device=_device(device), limit=limit, say=say, progress=live)
    typer.echo(written or run)


def _report(settings) -> None:
    """The page of a run that has arrived, or was stopped."""
    from hrsam.run import DISK, RunFailed
    from hrsam.runreport import has_arrived, write_run_report

    sets = settings.noc if has_arrived(settings) else ()
    try:
        written = write_run_report(settings.out, sets, side=settings.phases[-1].side, device=_device("auto"))
    except OSError as err:
        raise RunFailed(
            DISK, f"the run is saved, its page cannot be written: {err}; make room, then hrsam report"
        ) from err
    if written is not None:
        typer.echo(f"written: {written}", err=True)


def _load(name: str, device: str):
    """Load a model onto a device, both named by a person."""
    from hrsam.weights import load

    return load(name, device=_device(device))


def _device(name: str) -> str:
    """A device named by a person, ``auto`` settled; ``ValueError`` when it is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}; use cpu, cuda, cuda:0, … or auto") from None
    if where.type == "cuda" and (not torch.cuda.is_available() or (where.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"the device {name} is not available here; use --device cpu or auto")
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"the device {name!r} is not supported; use cpu, cuda or auto")
    return name


def main() -> None:
    """Run the command line; what a user did wrong is one sentence on stderr and exit code 2, or the one the error names."""
    try:
        app(prog_name="hrsam")  # also under `python -m hrsam`
    except Exception as err:
        code = getattr(err, "exit_code", 2 if isinstance(err, (ValueError, OSError)) else None)
        if code is None or "--verbose" in sys.argv or "-v" in sys.argv:
            raise
        typer.echo(f"hrsam: {' '.join(str(err).split())}", err=True)
        sys.exit(code)


if __name__ == "__main__":
    main()
