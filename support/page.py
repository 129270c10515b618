"""Search as a page: Flask serves one HTML file to this machine and answers it in JSON.

search.py hands in the shelf and its finders, support/desk.py finds the answers. Nobody else is let
in: it listens on 127.0.0.1 and refuses another Host and other sites; nothing is fetched from afar.
"""

from __future__ import annotations

import logging
import socket
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from sources.texts import readable
from support.command import UserError
from support.desk import LABELS, SIZES, Desk, NoPicture

if TYPE_CHECKING:
    from flask import Flask, Response

    from support.finder import Finder, Shelf

PAGE = Path(__file__).with_name("page.html")
UPLOAD = 20 * 2**20  # bytes of an uploaded picture at most
RESULTS, TEXT = 1000, 1000  # of a question at most; characters of a text
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
    "script-src 'nonce-{0}'; style-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def require_flask() -> None:
    """Raises UserError where Flask is missing, before anything slow is done."""
    try:
        import flask  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the page needs Flask; pip install -r requirements-search.txt, or give --query"
        ) from error


def guard(app: Flask, port: int) -> None:
    """Refuses what does not come from this machine's own page, and answers errors in JSON."""
    from flask import abort, jsonify, request
    from werkzeug.exceptions import HTTPException

    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
    hosts |= {"127.0.0.1", "localhost"} if port == 80 else set()

    @app.before_request
    def only_from_here() -> None:
        """Neither a name that leads to this machine, nor another site's page, gets an answer."""
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none")
        if request.headers.get("Host", "").lower() not in hosts:
            abort(403, "this page is for this machine alone")
        if site not in ("none", "same-origin") or origin not in (None, f"http://{request.host}"):
            abort(403, "another site may not ask")

    @app.after_request
    def close_doors(response: Response) -> Response:
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[Response, int]:
        too_large = f"a picture of at most {UPLOAD >> 20} MB, please"
        return jsonify(error=too_large if error.code == 413 else error.description), error.code

    @app.errorhandler(UserError)
    def mistaken(error: UserError) -> tuple[Response, int]:
        return jsonify(error=str(error)), 400

    @app.errorhandler(NoPicture)
    def gone(error: NoPicture) -> tuple[Response, int]:
        return jsonify(error="there is no such picture, or no longer"), 404


def answer_questions(app: Flask, desk: Desk) -> None:
    """What is asked of the models: a search, a picture's captions, labels, what matters."""
    from flask import jsonify, request

    def asked(name: str, most: int = TEXT) -> str:
        """A parameter of the request. Raises UserError when it is too long."""
        if len(text := request.args.get(name, "")) > most:
            raise UserError(f"{name}: {most:,} characters at most")
        return text.strip()

    def finder() -> int:
        """The number of the models asked for. Raises UserError."""
        if (number := asked("model") or "0") not in map(str, range(len(desk.finders))):
            raise UserError(f"model {number} is none of 0 to {len(desk.finders) - 1}")
        return int(number)

    @app.get("/api/search")
    def search() -> Response:
        k = asked("k") or "60"
        k = min(RESULTS, int(k)) if k.isascii() and k.isdigit() else 60
        question = partial(desk.search, finder(), asked("text"), asked("picture"), max(1, k))
        return jsonify(desk.quick.submit(question).result())

    @app.get("/api/about")
    def about() -> Response:
        return jsonify(desk.quick.submit(desk.about, finder(), asked("picture")).result())

    @app.get("/api/labels")
    def labels() -> Response:
        lines = asked("labels", 100 * LABELS).splitlines()
        names = [*dict.fromkeys(line.strip() for line in lines if line.strip())]
        question = partial(desk.labels, finder(), asked("picture"), names)
        return jsonify(desk.slow.submit(question).result())

    @app.get("/api/why")
    def why() -> Response:
        question = partial(desk.why, finder(), asked("picture"), asked("text"))
        return jsonify(desk.slow.submit(question).result())


def make_app(shelf: Shelf, finders: list[Finder], port: int) -> Flask:
    """The application; it answers requests to 127.0.0.1:`port` alone."""
    from flask import Flask, Response, abort, jsonify, request

    app, desk, run_id = Flask("search", static_folder=None), Desk(shelf, finders), token_hex(4)
    app.config["MAX_CONTENT_LENGTH"] = UPLOAD
    guard(app, port)
    answer_questions(app, desk)

    @app.get("/")
    def page() -> Response:
        nonce = token_hex(16)
        text = PAGE.read_text("utf-8").replace("{{nonce}}", nonce)
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        return Response(text, mimetype="text/html", headers=policy)

    @app.get("/api/start")
    def start() -> Response:
        models = [finder.name for finder in finders]
        return jsonify(
            title=readable(shelf.title), count=len(shelf.names), models=models, run=run_id
        )

    @app.post("/api/upload")
    def upload() -> Response:
        return jsonify(picture=desk.upload(request.get_data()))

    @app.get("/picture/<name>/<int:size>")
    def picture(name: str, size: int) -> Response:
        if size not in SIZES:
            abort(404, "no such size")
        kept = {"Cache-Control": "private, max-age=3600"}  # the address holds this run's number
        return Response(desk.jpeg(name, size), mimetype="image/jpeg", headers=kept)

    return app


def serve(shelf: Shelf, finders: list[Finder], port: int) -> None:
    """Serves the page until Ctrl-C. Raises UserError when the port is taken."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; give another, 0 for any") from error
        listener.listen()
        port = listener.getsockname()[1]
        app = make_app(shelf, finders, port)
        server = make_server("127.0.0.1", port, app, threaded=True, fd=listener.fileno())
        print(f"{readable(shelf.title)}: http://127.0.0.1:{port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
