"""`minference demo`: a page in the browser on which a prompt is answered dense and sparse."""

from __future__ import annotations

import json
import os
import time

import typer

from minference.cli.subject import AsJson, Quiet, load_subject
from minference.errors import require

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    model: str = typer.Argument("models/needle", help="Hub id or path of a transformers model."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for every one."),
    port: int | None = typer.Option(None, help="Port; the first free one from 7860."),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Serve the page until Ctrl-C; it loads nothing from elsewhere and sends nothing away."""
    for module in ("gradio", "matplotlib"):
        require(module, "demo")
    from minference.demo.page import serve
    from minference.demo.session import Session

    session = Session(load_subject(model, quiet=quiet or as_json))
    address = serve(session, host, port)
    found = {"url": address, "model": model}
    typer.echo(json.dumps(found) if as_json else f"{address} serves {model}; Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        session.close()
        # a prefill may be under way in a thread of the server, and an ordinary exit aborts in it
        os._exit(0)
