"""The page: a form, two sides and a picture, as gradio components around a `Session`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes
from gradio.components import Component

from minference.demo.session import Form, Session, Shown
from minference.eval.side_by_side import Answer

FACT, OWN = "A fact hidden in Python's documentation", "My own text"
LENGTHS = ("4k", "8k", "16k", "32k", "64k", "128k")
_CSS = """
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 16px; }
.side { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 16px; }
.side h3 { margin: 0 0 8px; }
.side dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; }
.side dt { opacity: 0.75; }
.side dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.side dd.big { font-size: 1.4em; line-height: 1.1; white-space: nowrap; }
#status .failed { color: #b91c1c; font-weight: 600; }
.dark #status .failed { color: #fca5a5; }
#question { opacity: 0.8; overflow-wrap: anywhere; white-space: pre-wrap; }
"""


def build_page(session: Session) -> gr.Blocks:
    """The page of one model; `launch` serves it."""
    name = session.subject.name
    with gr.Blocks(title="minference", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(
            f"# Dense and sparse, side by side\n`{escape(name)}` reads a long prompt twice. The "
            "dense side computes all of its attention, the sparse side only what a method "
            "expects to matter."
        )
        with gr.Row():
            with gr.Column(scale=2):
                inputs = _form(session)
                button = gr.Button("Answer dense and sparse", variant="primary", elem_id="go")
            with gr.Column(scale=3):
                status = gr.HTML("Fill in the form and press the button.", elem_id="status")
                sides = gr.HTML(_sides(None, None), elem_id="sides")
                question = gr.HTML("", elem_id="question")
                picture = gr.Image(
                    show_label=False,
                    buttons=["download", "fullscreen"],
                    type="filepath",
                    format="png",
                    interactive=False,
                    elem_id="picture",
                    alt_text="attention of the head in log colours beside its computed tiles",
                )

        def answer(*values: Any) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
            for shown in session.answer(_filled(*values)):
                yield _parts(shown)

        # one at a time: what is measured must not share the machine with itself
        button.click(answer, inputs, [status, question, sides, picture], concurrency_limit=1)
    return page


def serve(session: Session, host: str, port: int | None) -> str:
    """Serves the page in the background and tells its address; nothing leaves this machine.

    Raises:
        ValueError: the port is taken.
    """
    # what visitors upload and what they are shown goes when the session is closed
    os.environ["GRADIO_TEMP_DIR"] = str(session.folder)
    try:
        _, address, _ = build_page(session).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=_theme(),
            css=_CSS,
        )
    except OSError as error:
        raise ValueError(f"{host} cannot be listened on, port {port}: {error}") from error
    return address


def _theme() -> themes.Base:
    """System fonts, since the page loads nothing, and grey that can be read."""
    theme = themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"])
    return theme.set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )


def _form(session: Session) -> list[Component]:
    config = session.subject.model.config.get_text_config(decoder=True)
    source = gr.Radio([FACT, OWN], value=FACT, label="Prompt", elem_id="source")
    with gr.Group() as fact:
        tokens = gr.Dropdown(
            list(LENGTHS), value="8k", label="Tokens", allow_custom_value=True, elem_id="tokens"
        )
        depth = gr.Slider(0, 1, 0.5, step=0.05, label="Depth of the fact, 0 first")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
    with gr.Group(visible=False) as own:
        text = gr.Textbox(
            lines=12,
            max_lines=12,
            label="Text that ends where the answer begins",
            elem_id="text",
        )
        upload = gr.UploadButton("Load a text file", size="sm")
    method = gr.Textbox(
        "minference",
        label="Method of the sparse side",
        info="name:key=value,... such as minference:vertical=100,slash=800 or a_shape:local=1024",
        elem_id="method",
    )
    with gr.Row():
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        layer = gr.Slider(0, layers - 1, 2 * layers // 3, step=1, label="Layer")
        head = gr.Slider(0, heads - 1, heads // 2, step=1, label="Head")
    upload.upload(_read, upload, text)
    source.change(
        lambda chosen: (gr.update(visible=chosen == FACT), gr.update(visible=chosen == OWN)),
        source,
        [fact, own],
        queue=False,
    )
    return [source, text, tokens, depth, seed, method, layer, head]


def _filled(
    source: str,
    text: str,
    tokens: str,
    depth: float,
    seed: float | None,
    method: str,
    layer: float,
    head: float,
) -> Form:
    return Form(
        text=text if source == OWN else None,
        tokens=tokens or "",
        depth=depth,
        seed=int(seed or 0),
        method=method,
        layer=int(layer),
        head=int(head),
    )


def _parts(shown: Shown) -> tuple[str, str, str, str | None]:
    kind = "failed" if shown.failed else "told"
    return (
        f'<p class="{kind}">{escape(shown.status)}</p>',
        escape(shown.question or ""),
        _sides(shown.dense, shown.sparse),
        None if shown.picture is None else str(shown.picture),
    )


def _sides(dense: Answer | None, sparse: Answer | None) -> str:
    return f'<div class="sides">{_side("dense", dense)}{_side("sparse", sparse)}</div>'


def _side(name: str, answer: Answer | None) -> str:
    rows = [("first token after", "-"), ("density", "-"), ("answer", "-")]
    if answer is not None:
        values = f"{answer.seconds:.2f} s", f"{answer.density:.3f}", answer.text
        rows = [(label, value) for (label, _), value in zip(rows, values, strict=True)]
    cells = "".join(
        f"<dt>{label}</dt><dd class='{'big' if not number else ''}' "
        f"data-value='{label}'>{escape(value)}</dd>"
        for number, (label, value) in enumerate(rows)
    )
    return f'<div class="side" id="{name}"><h3>{name.capitalize()}</h3><dl>{cells}</dl></div>'


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise gr.Error("The file is no text in UTF-8.", title="Cannot be read") from error
