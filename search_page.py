"""
Show what search.py found: on a terminal, as an HTML page that needs no server (--html), and as an app (--app).

    search.answer_query -> Answer -> print_answer, write_page, serve_app

Names of files and queries are escaped wherever they are shown. Both pages show a hit as a clip that plays its best
segment, with a picture that stands in for it where the browser cannot play the codec. The page refers to the files by
relative paths, so it may move together with the folder. The app sends the files of the index and no others.
"""

import html
import logging
import os
import socket
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from mimetypes import guess_type
from urllib.parse import quote

import numpy as np

import video
from files import atomic_write_text, escape_control
from frame_cache import encode_jpeg

PREVIEW_SIZE = 180      # pixels of the short side of a preview
MAX_PLAYING = 24        # clips that play by themselves; if there are more, each plays when it is clicked


@dataclass
class Hit:
    """A video that was found, with its best segment."""
    score: float
    name: str
    start: float        # seconds
    end: float
    parts: int          # segments that the video has


@dataclass
class Answer:
    """The best videos of a query."""
    query: str
    hits: list[Hit]     # best first
    note: str           # that the query was cut, or that no score reaches the threshold; usually empty
    count: int          # segments that were compared
    seconds: float


def format_time(seconds: float) -> str:
    """83.4 -> "1:23"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def print_answer(answer: Answer, folder: str):
    """Print the hits of a query, one a line."""
    print(f"\n{escape_control(answer.query)}  ({answer.count} segments, {1000 * answer.seconds:.0f} ms)")
    if answer.note:
        print(f"  {answer.note}")
    for rank, hit in enumerate(answer.hits, 1):
        part = f"  {format_time(hit.start)}-{format_time(hit.end)}" if hit.parts > 1 else ""
        print(escape_control(f"{rank:3}  {hit.score:6.3f}  {os.path.join(folder, hit.name)}{part}"))


# ---------------------------------------------------------------------------------------------------------------------
# HTML

STYLE = """<style>
.hits { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.hits figure { margin: 0; min-width: 0; }
.hits video, .hits img { width: 100%; aspect-ratio: 16 / 9; object-fit: contain; background: #000; display: block; }
.hits figcaption { padding: .4rem 0; overflow-wrap: anywhere; font-size: .9rem; }
.answer h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
.answer .note { font-size: .9rem; opacity: .8; margin: 0 0 .5rem; }
</style>"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>:root {{ color-scheme: light dark; }} body {{ font-family: system-ui, sans-serif; margin: 1.5rem; }}</style>
{style}
</head>
<body>
<h1>{title}</h1>
{answers}
</body>
</html>
"""


def escape(text: str) -> str:
    """Escape a text for HTML. Braces and $ too, which gradio's templates might read."""
    text = html.escape(escape_control(text))
    return "".join(f"&#{ord(c)};" if c in "{}$" else c for c in text)


def is_moving_picture(hit: Hit) -> bool:
    """Say whether the file of a hit is shown as a picture, which browsers move by themselves."""
    return hit.name.lower().endswith((".gif", ".apng"))


def render_answers(answers: list[Answer], link, preview) -> str:
    """
    Render answers as HTML.

    link(hit) -> address of its file; preview(hit) -> address of its picture, or a ValueError or OSError; the page
    shows its message.
    """
    playing = sum(len(answer.hits) for answer in answers) <= MAX_PLAYING
    parts = []
    for answer in answers:
        note = f'<p class="note">{escape(answer.note)}</p>\n' if answer.note else ""
        hits = "\n".join(render_hit(rank, hit, link, preview, playing) for rank, hit in enumerate(answer.hits, 1))
        parts.append(f'<section class="answer">\n<h2>{escape(answer.query)}</h2>\n{note}<div class="hits">\n{hits}\n'
                     "</div>\n</section>")
    return "\n".join(parts)


def render_clip(hit: Hit, address: str, preview, playing: bool) -> tuple[str, str]:
    """
    Render a hit as a clip that begins and ends with its best segment, or as a picture if that is what moves.

    Returns the HTML, and what is wrong with the preview, if anything is.
    """
    try:
        poster, problem = f' poster="{escape(preview(hit))}"', ""
    except (ValueError, OSError) as error:
        poster, problem = "", f"<br>no preview: {escape(str(error))}"
    if is_moving_picture(hit):
        return f'<img src="{address}" alt="">', problem
    options = ("autoplay" if playing else 'preload="none"') + " loop" * (hit.parts == 1)    # browsers loop no segments
    return f'<video src="{address}"{poster} controls muted playsinline {options}></video>', problem


def render_hit(rank: int, hit: Hit, link, preview, playing: bool) -> str:
    """Render one hit with its score, name and time."""
    address = escape(link(hit))
    if not is_moving_picture(hit):
        address += f"#t={round(hit.start, 3)}" + ("" if hit.parts == 1 else f",{round(hit.end, 3)}")
    clip, problem = render_clip(hit, address, preview, playing)
    return (f'<figure>{clip}<figcaption>{rank}. <b>{hit.score:.3f}</b> <a href="{address}">{escape(hit.name)}</a> '
            f"{format_time(hit.start)}–{format_time(hit.end)}{problem}</figcaption></figure>")


@lru_cache(maxsize=1024)
def read_preview(path: str, start: float, end: float) -> bytes:
    """Decode the first frame of a segment, or the one before it if it has none -> a small JPEG."""
    def select(times):
        first, last = np.searchsorted(times, (start - 1e-6, end - 1e-6))
        return [int(first if first < last else max(0, first - 1))]

    frame, = video.iter_frames(path, select)
    return encode_jpeg(video.frame_to_tensor(frame, PREVIEW_SIZE).numpy(), quality=80)


def check_page_path(path: str):
    """Raise a ValueError unless this is the name of a page in a folder that exists."""
    if not path.lower().endswith((".html", ".htm")) or not os.path.isdir(os.path.dirname(path) or ".") \
            or os.path.isdir(path):
        raise ValueError(f"--html must end in .html and be in an existing folder, got {path}")


def write_page(path: str, folder: str, answers: list[Answer]):
    """Write answers as one HTML file, complete or not at all, which refers to the files by relative paths."""
    parent = os.path.dirname(os.path.abspath(path))

    def link(hit):
        return quote(os.fsencode(os.path.relpath(os.path.join(folder, hit.name), parent)))

    def preview(hit):
        jpeg = read_preview(os.path.join(folder, hit.name), hit.start, hit.end)
        return "data:image/jpeg;base64," + b64encode(jpeg).decode()

    title = escape(f"Search in {os.path.basename(os.path.abspath(folder))}")
    atomic_write_text(path, PAGE.format(title=title, style=STYLE, answers=render_answers(answers, link, preview)))


# ---------------------------------------------------------------------------------------------------------------------
# App

# Browsers fetch nothing for the app from other servers, whatever the code of gradio asks for.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def check_gradio():
    """Raise a ValueError that says what to install, unless gradio is there."""
    try:
        version = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        raise ValueError("--app needs gradio: pip install gradio") from None
    if int(version.split(".")[0]) < 6:
        raise ValueError(f"--app needs gradio 6 or later, got {version}: pip install --upgrade gradio")


def listen(host: str, port: int) -> socket.socket:
    """Open the port of the app: before the index is updated, so that a port in use shows at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the app cannot be served at {host}, port {port} ({reason}): pass another --port or "
                         "--host") from None


def make_app(folder: str, names: list[str], answer, queries: tuple[str, ...], top: int, threshold: float):
    """
    Make the app, an ASGI application.

    names: the files that it may send; answer(queries, top, threshold) -> list of Answers, or a ValueError, which is
    shown; queries, top, threshold: what the page begins with.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", HF_HUB_DISABLE_TELEMETRY="1")
    import gradio
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse, Response
    folder, numbers = os.path.abspath(folder), {name: i for i, name in enumerate(names)}
    app = FastAPI(openapi_url=None)

    def find(number):
        if not 0 <= number < len(names) or not os.path.isfile(path := os.path.join(folder, names[number])):
            raise HTTPException(404, "no such clip")
        return path

    @app.get("/clips/{number}/{name}")                      # the name is for the person who saves the file
    def send_clip(number: int):
        path = find(number)
        return FileResponse(path, media_type=guess_type(path)[0] or "application/octet-stream")

    @app.get("/previews/{number}")
    def send_preview(number: int, start: float, end: float):
        path = find(number)
        try:
            return Response(read_preview(path, start, end), media_type="image/jpeg")
        except (ValueError, OSError) as error:
            raise HTTPException(404, escape_control(str(error))) from None

    def link(hit):
        return f"clips/{numbers[hit.name]}/{quote(os.fsencode(os.path.basename(hit.name)))}"

    def preview(hit):
        return f"previews/{numbers[hit.name]}?start={hit.start}&end={hit.end}"

    def search(text, top, threshold):
        lines = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
        try:
            if not lines:
                raise ValueError("write at least one query")
            if None in (top, threshold):
                raise ValueError("give the number of videos and the lowest score")
            return STYLE + render_answers(answer(lines, top, threshold), link, preview)
        except ValueError as error:
            raise gradio.Error(escape(str(error)), print_exception=False) from None

    title = f"Search in {escape_control(os.path.basename(folder))}"
    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        with gradio.Row():
            box = gradio.Textbox("\n".join(queries), label="Queries, one a line", lines=2, scale=2)
            number = gradio.Number(top, label="Videos per query", precision=0)
            least = gradio.Number(threshold, label="Lowest score, -1 to 1", step=0.01)
        button = gradio.Button("Search", variant="primary")
        page = gradio.HTML(search("\n".join(queries), top, threshold) if queries else "")
        gradio.on([button.click, box.submit], search, [box, number, least], page, api_name="search")
    theme = gradio.themes.Base(font=("system-ui", "sans-serif"), font_mono=("monospace",))
    gradio.mount_gradio_app(app, blocks, "/", theme=theme, footer_links=[], ssr_mode=False)

    async def with_policy(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await app(scope, receive, send_with_policy)

    return with_policy


def serve_app(app, listener: socket.socket):
    """Serve the app until Ctrl-C."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)      # it is no error that tabs are open
            await super().shutdown(sockets)

    host, port = listener.getsockname()[:2]
    print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port} until Ctrl-C", flush=True)
    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])
