"""Addresses of the click page, each with one thing to do."""

from __future__ import annotations

import asyncio
import io
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from hrsam.demo import decoder
from hrsam.demo.desk import Desk, Done, View
from hrsam.demo.engine import Refusal
from hrsam.demo.exports import EXPORTS, Export, Options
from hrsam.demo.gallery import Entry
from hrsam.demo.live import NO_SUCH_DESK, WRONG, Live, announce, error_message, result
from hrsam.demo.messages import mask_tile
from hrsam.demo.site import Site
from hrsam.pyramid import TILE, Pyramid

STATIC = Path(__file__).parent / "static"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml; charset=utf-8",
    ".ico": "image/x-icon",
}
STATUS = {"busy": 503, "refused": 400, "superseded": 409, "memory": 507, "gone": 410}
FOREVER = {"cache-control": "private, max-age=31536000, immutable"}
NEVER = {"cache-control": "no-store"}
JPEG_QUALITY = 90
NO_DESK = "there is no such piece of work; open the picture anew"
PLAIN = {"Not Found": "there is nothing at this address", "Method Not Allowed": "this address does not do that"}


class NewDesk(BaseModel):
    """Body of ``POST /api/desks``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    picture: str


def make_app(site: Site) -> FastAPI:
    """The application, to be put behind a :class:`hrsam.demo.guard.Guard`, which says whose request it is."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        resting = asyncio.create_task(_rest(site))
        threading.Thread(target=_open_first, args=(site,), name="hrsam-first", daemon=True).start()
        yield
        resting.cancel()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _errors(app)
    _pictures(app, site)
    _desks(app, site)
    return app


def _open_first(site: Site) -> None:
    """The page comes next and shows this picture: decode it meanwhile.  What is wrong with it is told when it is asked for."""
    with suppress(ValueError, MemoryError):
        for entry in site.gallery.entries("")[:1]:
            site.gallery.open(entry)


async def _rest(site: Site) -> None:
    while True:
        await asyncio.sleep(site.limits.desk_idle_seconds / 10)
        try:
            site.desks.rest()
        except Refusal:  # there is more to do than to rest
            continue


def _errors(app: FastAPI) -> None:
    """Every error is one sentence that names nothing of this machine."""

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return _sentence(error.status_code, PLAIN.get(error.detail, error.detail))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, __: RequestValidationError) -> JSONResponse:
        return _sentence(400, "this request is not understood")

    @app.exception_handler(Refusal)
    async def _refused(_: Request, refusal: Refusal) -> JSONResponse:
        return _sentence(STATUS[refusal.kind], refusal.text, refusal.kind)

    @app.exception_handler(Exception)
    async def _wrong(_: Request, __: Exception) -> JSONResponse:
        return _sentence(500, WRONG)


def _sentence(status: int, text: str, kind: str = "refused") -> JSONResponse:
    return JSONResponse({"error": {"kind": kind, "text": text}}, status, headers=NEVER)


def _pictures(app: FastAPI, site: Site) -> None:
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in KINDS and path.is_file()}

    @app.get("/")
    def page() -> Response:
        return static("page.html")

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        path = files.get(name)
        if path is None:
            raise HTTPException(404)
        return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers={"cache-control": "no-cache"})

    @app.get("/favicon.ico")
    def favicon() -> Response:
        return static("favicon.ico") if "favicon.ico" in files else Response(status_code=204)

    @app.get("/api/about")
    def about() -> JSONResponse:
        return JSONResponse(site.about(), headers=NEVER)

    @app.get("/api/pictures")
    def pictures(request: Request) -> JSONResponse:
        found = site.gallery.entries(_owner(request))
        return JSONResponse([{"id": entry.id, "name": entry.name} for entry in found], headers=NEVER)

    @app.post("/api/pictures")
    async def upload(request: Request, name: str = "picture") -> JSONResponse:
        _only(request, "application/octet-stream")
        body = await _body(request, site.limits.upload_bytes, site)
        try:
            loop = asyncio.get_running_loop()
            entry = await loop.run_in_executor(site.decoders, site.gallery.upload, body, name, _owner(request))
        except ValueError as error:
            raise HTTPException(415, str(error)) from None
        finally:
            body.unlink(missing_ok=True)
        return JSONResponse({"id": entry.id, "name": entry.name}, 201, headers=NEVER)

    @app.get("/api/pictures/{id}")
    def picture(request: Request, id: str) -> JSONResponse:
        entry, pyramid = _open(site, id, _owner(request))
        size = {"width": pyramid.width, "height": pyramid.height, "tile": TILE, "levels": pyramid.levels}
        return JSONResponse({"id": entry.id, "name": entry.name, **size, "notes": pyramid.notes}, headers=NEVER)

    @app.get("/api/pictures/{id}/tiles/{level}/{col}/{row}")
    def tile(request: Request, id: str, level: int, col: int, row: int) -> Response:
        _, pyramid = _open(site, id, _owner(request))
        try:
            pixels = pyramid.tile(level, col, row)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        return Response(file.getvalue(), media_type="image/jpeg", headers=FOREVER)


def _desks(app: FastAPI, site: Site) -> None:
    @app.post("/api/desks")
    async def create(request: Request) -> JSONResponse:
        _only(request, "application/json")
        body = await _body(request, site.limits.json_bytes, site)
        try:
            wanted = NewDesk.model_validate_json(body.read_bytes())
        except ValueError:
            raise HTTPException(400, 'the body is {"picture": id}') from None
        finally:
            body.unlink(missing_ok=True)
        entry, pyramid = await asyncio.to_thread(_open, site, wanted.picture, _owner(request))
        desk = await asyncio.to_thread(site.desks.create, _owner(request), entry.id, pyramid)
        return JSONResponse({"desk": desk.id}, 201, headers=NEVER)

    @app.websocket("/api/desks/{id}/live")
    async def live(websocket: WebSocket, id: str) -> None:
        desk = await asyncio.to_thread(site.desks.find, id, websocket.scope["owner"])
        if desk is None:
            await websocket.accept()
            await websocket.send_bytes(error_message(None, Refusal("gone", NO_DESK)))
            await websocket.close(NO_SUCH_DESK)
            return
        shows = "shows" in websocket.query_params
        await Live(websocket, desk, site.paint, site.limits, shows=shows).run()

    @app.get("/api/desks/{id}/masks/{object}/{version}/{level}/{col}/{row}")
    async def mask(request: Request, id: str, object: int, version: int, level: int, col: int, row: int) -> Response:
        view = await _view(site, id, _owner(request))
        if view.versions.get(object) != version:
            raise HTTPException(410, "this mask was replaced by a newer one")
        try:
            shown = view.objects[object].mask
            png = await asyncio.get_running_loop().run_in_executor(
                site.painters, mask_tile, shown, level, col, row, TILE
            )
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        return Response(png, media_type="image/png", headers=NEVER)

    @app.post("/api/desks/{id}/given")
    async def given(request: Request, id: str, object: int) -> JSONResponse:
        _only(request, "application/octet-stream", "image/png")
        desk = await asyncio.to_thread(_desk, site, id, _owner(request))
        body = await _body(request, site.limits.given_bytes, site)
        try:
            loop, scratch = asyncio.get_running_loop(), site.gallery.scratch
            rle = await loop.run_in_executor(site.decoders, decoder.decode_mask, body, scratch, site.limits)
        except ValueError as error:
            raise HTTPException(415, str(error)) from None
        finally:
            body.unlink(missing_ok=True)
        work = desk.submit({"do": "given", "object": object, "rle": rle})
        done: Done = await result(work)
        await announce(desk, done, site.paint)
        return JSONResponse({"revision": done.view.revision}, headers=NEVER)

    @app.get("/api/desks/{id}/export/{name}")
    async def export(request: Request, id: str, name: str) -> Response:
        if name not in EXPORTS:
            raise HTTPException(404)
        view = await _view(site, id, _owner(request))
        entry = site.gallery.find(view.picture, _owner(request))
        what = Export(view, "picture" if entry is None else entry.name, site.model_name)
        kind, write = EXPORTS[name]
        file = tempfile.TemporaryFile(dir=site.gallery.scratch)  # noqa: SIM115 - closed when it was sent
        try:
            options = Options.model_validate(dict(request.query_params))
            change = await asyncio.get_running_loop().run_in_executor(site.painters, write, file, what, options)
        except ValueError as error:
            file.close()
            text = "this request is not understood" if isinstance(error, ValidationError) else str(error)
            raise HTTPException(400, text) from None
        except BaseException:
            file.close()
            raise
        headers = {**NEVER, "content-disposition": f'attachment; filename="{name}"', "x-area-change": str(change)}
        return StreamingResponse(_pieces(file), media_type=kind, headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(1 << 20):
            yield piece


def _owner(request: Request) -> str:
    return request.scope["owner"]


def _only(request: Request, *kinds: str) -> None:
    """Kinds of body that a page of another origin cannot send without asking first."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() not in kinds:
        raise HTTPException(415, f"this address takes {' or '.join(kinds)}")


def _open(site: Site, id: str, owner: str) -> tuple[Entry, Pyramid]:
    entry = site.gallery.find(id, owner)
    if entry is None:
        raise HTTPException(404, "there is no such picture")
    try:
        return entry, site.gallery.open(entry)
    except ValueError as error:
        raise HTTPException(415, str(error)) from None
    except MemoryError:
        raise HTTPException(507, "there is not enough memory to open this picture; make it smaller") from None


def _desk(site: Site, id: str, owner: str) -> Desk:
    desk = site.desks.find(id, owner)
    if desk is None:
        raise HTTPException(404, NO_DESK)
    return desk


async def _view(site: Site, id: str, owner: str) -> View:
    desk = await asyncio.to_thread(_desk, site, id, owner)
    return desk.view or await result(desk.wake())


async def _body(request: Request, most: int, site: Site) -> Path:
    """Stream the body into a file; 413 as soon as it is too large, 408 when it is too slow."""
    tell = request.headers.get("content-length", "0")
    if tell.isdecimal() and int(tell) > most:
        raise HTTPException(413, f"the body has more than the {most} bytes that may come here")
    path = site.gallery.scratch / f"{uuid.uuid4().hex}.body"
    try:
        await asyncio.wait_for(_stream(request, most, path, site.limits.chunk_seconds), site.limits.upload_seconds)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            raise HTTPException(408, "the body came too slowly") from None
        if isinstance(error, OSError):
            raise HTTPException(507, f"the body cannot be kept ({error.strerror})") from None
        raise
    return path


async def _stream(request: Request, most: int, path: Path, patience: float) -> None:
    size, chunks = 0, aiter(request.stream())
    with open(path, "xb") as file:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), patience)
            except StopAsyncIteration:
                return
            size += len(chunk)
            if size > most:
                raise HTTPException(413, f"the body has more than the {most} bytes that may come here")
            file.write(chunk)
