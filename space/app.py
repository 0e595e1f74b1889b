# SPDX-License-Identifier: Apache-2.0
"""Show in the browser what merging does to one input of a Perceiver checkpoint.

Choose an image or type a sentence and move a slider. The page shows which latents merged, and the prediction and time
of the merged model beside those of the unmerged one. In the repository:

  python space/app.py --model_name_or_path outputs/demo/finetuned

A Space on the Hub takes no arguments: it reads the checkpoint from the variable MODEL_NAME_OR_PATH of the Space, or
from the folder `checkpoint` beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import numpy as np
from comparison import BUDGET_STEP, IMAGE, MASKED, TEXT, Checkpoint, Comparison, Side, UnusableInput
from PIL import Image as PilImage
from transformers.image_utils import load_image

LOCAL_CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
# Labels of the controls that set how much merges.
BY_BUDGET, BY_FRONTIER = "Share of the computation", "Along the frontier"
BY_R, AS_SAVED = "Latents per layer", "As it was saved"
# Use digits that the demo did not train on: its test split is the last 500 of scikit-learn's.
EXAMPLE_DIGITS = range(-8, 0)
EXAMPLE_SENTENCES = {
    TEXT: [
        "A warm, funny and beautifully acted film.",
        "Two hours that I will never get back.",
        "The plot is thin, but the music saves it.",
    ],
    MASKED: ["The {} of the house was open.", "She went to the {} and bought some bread.", "He was born in the {} ."],
}
PAGE_CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
#image img, .gallery img {image-rendering: pixelated}
#image img {width: 100%; height: 100%; object-fit: contain}
.sides {display: grid; grid-template-columns: 1fr 1fr; gap: 12px}
.side {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 16px}
.side.merged {border-color: #d9480f}
.side h3 {margin: 0 0 2px; font-size: 0.95rem; opacity: 0.75; font-weight: 600}
.side.merged h3 {color: #d9480f; opacity: 1}
.side .label {font-size: 1.5rem; font-weight: 700; line-height: 1.3}
.side .guess {display: grid; grid-template-columns: minmax(3em, auto) 1fr 3.5em; gap: 8px; align-items: center}
.side .bar {height: 8px; border-radius: 4px; background: #4c6ef5}
.side.merged .bar {background: #d9480f}
.side .figures {display: flex; justify-content: space-between; margin-top: 8px; text-align: left}
.side .figures b {display: block; font-size: 1.05rem}
.side .figures span {font-size: 0.8rem; opacity: 0.75}
.verdict {font-size: 1.1rem; margin: 0 0 10px}
.verdict small {display: block; font-size: 0.85rem; opacity: 0.75}
footer {display: none !important}
"""


def main() -> None:
    arguments = parsed_arguments()
    try:
        page = build_page(Checkpoint(arguments.model_name_or_path), arguments.examples, arguments.model_name_or_path)
    except UnusableInput as error:
        stop(str(error))
    page.launch(
        server_name=arguments.host, server_port=arguments.port, css=PAGE_CSS, theme=gr.themes.Default(), quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    print(f"open {page.local_url}", flush=True)
    page.block_thread()


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = stop  # type: ignore[method-assign]
    parser.add_argument(
        "--model_name_or_path",
        default=os.environ.get("MODEL_NAME_OR_PATH") or (str(LOCAL_CHECKPOINT) if LOCAL_CHECKPOINT.is_dir() else None),
        help="Hub id or local folder of a Perceiver checkpoint for image classification, text classification or masked "
        "language modelling; the code in the checkpoint is run",
    )
    parser.add_argument(
        "--examples", nargs="+", help="image files or sentences to choose from, in place of the built-in ones"
    )
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--port", type=int, default=None, help="port to listen on (default: the first free one from 7860)"
    )
    arguments = parser.parse_args()
    if arguments.model_name_or_path is None:
        stop(
            "--model_name_or_path: is missing; give a Hub id or a folder, set MODEL_NAME_OR_PATH, or put a checkpoint "
            f"into {LOCAL_CHECKPOINT}"
        )
    return arguments


def build_page(checkpoint: Checkpoint, examples: list[str] | None, name: str) -> gr.Blocks:
    """Build the page of a checkpoint.

    Args:
        checkpoint: checkpoint to run.
        examples: image files or sentences; `None` for the built-in ones.
        name: Hub id or folder of the checkpoint, for the title.

    Raises:
        UnusableInput: for an example that is missing or that the model cannot read.
    """
    examples = examples or default_examples(checkpoint)
    first = read_example(checkpoint, examples[0])
    latents, layers = checkpoint.config.num_latents, len(checkpoint.config.merge_schedule)
    with gr.Blocks(title="Merge a Perceiver", fill_width=False) as page:
        gr.Markdown(
            f"## Merge a Perceiver\n**{Path(name).name}** reads its input into {latents} *latents*, vectors that "
            f"pass through {layers} layers. Merging redundant latents makes a pass cheaper. Move the slider to see "
            "what that does to one input."
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                entry = input_field(checkpoint, first)
                gr.Examples([[example] for example in examples], [entry], label="Examples", examples_per_page=12)
                settings = merging_fields(checkpoint, first)
            with gr.Column(scale=8, min_width=480):
                result = gr.HTML(note_html("Running ..."), elem_id="result")
                gr.Markdown(
                    "**What merged.** The bars show the number of latents left after each layer. Below them are the "
                    "latents left at the end: the size of each (how many latents merged into it), and the parts of "
                    "the input that it reads."
                )
                picture = gr.Image(
                    show_label=False, interactive=False, elem_id="picture", buttons=["fullscreen"], format="png"
                )
        triggers = [page.load, entry.change] if checkpoint.kind == IMAGE else [page.load, entry.submit, entry.blur]
        gr.on(
            [*triggers, *(field.change for field in settings)],
            partial(show, checkpoint), [entry, *settings], [result, picture], show_progress="hidden",
            api_name="compare",
            # While a comparison runs, keep only the latest change and drop those before it.
            trigger_mode="always_last",
        )  # fmt: skip
    return page


def input_field(checkpoint: Checkpoint, first: Any) -> Any:
    """Make the input field for an image or a sentence."""
    if checkpoint.kind == IMAGE:
        # The default format is lossy and would change pixels, so the image is sent as PNG.
        return gr.Image(first, label="Image", type="pil", format="png", height=190, elem_id="image", sources=["upload"])
    gap = f"; write {checkpoint.processor.mask_token} for the word to guess" if checkpoint.kind == MASKED else ""
    label = f"Sentence{gap} (press Enter to run)"
    return gr.Textbox(first, label=label, lines=2, max_lines=2, submit_btn=True, elem_id="text")


def merging_fields(checkpoint: Checkpoint, first: Any) -> list[Any]:
    """Make the buttons that choose how to set the amount of merging, and the sliders they show: share, r, row."""
    rows = len(checkpoint.rows)
    # If reading the input is nearly the whole cost of a pass, merging reaches no share of the slider.
    least = 1.0 if rows else checkpoint.smallest_budget(first)
    by_cost = [BY_FRONTIER] if rows else [BY_BUDGET] if least < 1 else []
    controls = [*by_cost, BY_R, *([AS_SAVED] if checkpoint.saved is not None else [])]
    most_r = max(1, checkpoint.config.num_latents // len(checkpoint.config.merge_schedule) * 2)
    control = gr.Radio(controls, value=controls[0], label="How much is merged", elem_id="control")
    row = gr.Slider(
        1, max(2, rows), value=max(1, rows // 2), step=1, elem_id="row", visible=rows > 0,
        label="Row of the frontier, from mild to strong",
    )  # fmt: skip
    row_line = gr.Markdown(checkpoint.describe_row(rows // 2) if rows else "", visible=rows > 0)
    share = gr.Slider(
        min(least, 1 - BUDGET_STEP), 1.0, value=max(least, 0.6), step=BUDGET_STEP, elem_id="share",
        visible=controls[0] == BY_BUDGET,
        label="Share of the computation to keep", info="1 is the unmerged model.",
    )  # fmt: skip
    r = gr.Slider(
        0, most_r, value=min(4, most_r), step=1, elem_id="r", visible=controls[0] == BY_R,
        label="Latents merged in each layer (r)", info="At most half of those that reach it. 0 is the unmerged model.",
    )  # fmt: skip
    hidden_event = {"show_progress": "hidden", "api_visibility": "private"}
    control.change(
        lambda chosen: [gr.update(visible=chosen == each) for each in (BY_FRONTIER, BY_FRONTIER, BY_BUDGET, BY_R)],
        [control], [row, row_line, share, r], **hidden_event,
    )  # fmt: skip
    if rows:
        row.change(lambda number: checkpoint.describe_row(int(number)), [row], [row_line], **hidden_event)
    return [control, share, r, row]


def show(
    checkpoint: Checkpoint, image_or_text: Any, control: str, share: float, r: float, row: float
) -> Iterator[tuple[Any, Any]]:
    """Yield the comparison first, and then the picture too, which takes longer."""
    if image_or_text is None:
        yield note_html("Choose or upload an image."), None
        return
    try:
        if control == AS_SAVED and checkpoint.saved is not None:
            merging = checkpoint.saved
        elif control == BY_FRONTIER:
            merging = checkpoint.at_row(int(row))
        else:
            merging = (
                checkpoint.model.unmerged.by(int(r)) if control == BY_R else checkpoint.within(share, image_or_text)
            )
        result = comparison_html(checkpoint.compare(image_or_text, merging))
        yield result, gr.skip()
        yield result, checkpoint.picture(image_or_text, merging)
    except UnusableInput as error:
        yield note_html(str(error)), None


def default_examples(checkpoint: Checkpoint) -> list[str]:
    """Return sentences, or paths of images: scikit-learn's digits for a digit classifier, otherwise its photographs."""
    if checkpoint.kind == MASKED:
        return [sentence.format(checkpoint.processor.mask_token) for sentence in EXAMPLE_SENTENCES[MASKED]]
    if checkpoint.kind == TEXT:
        return EXAMPLE_SENTENCES[TEXT]
    from sklearn.datasets import load_digits, load_sample_images

    if sorted(checkpoint.labels) == [str(digit) for digit in range(10)]:
        digits = load_digits().images
        # Grey values of scikit-learn's digits run from 0 to 16.
        images = [PilImage.fromarray(np.uint8(digits[index] * 255 / 16)) for index in EXAMPLE_DIGITS]
    else:
        images = [PilImage.fromarray(image) for image in load_sample_images().images]
    folder = Path(tempfile.mkdtemp(prefix="examples-"))
    paths = [folder / f"example_{index + 1}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return [str(path) for path in paths]


def read_example(checkpoint: Checkpoint, example: str) -> Any:
    """Return the image in an example's file, or the sentence itself.

    Raises:
        UnusableInput: for a missing image, or an example that the model cannot read.
    """
    try:
        if checkpoint.kind == IMAGE:
            with PilImage.open(example) as image:
                image_or_text = load_image(image)
        else:
            image_or_text = example
        checkpoint.encoded(image_or_text)
    except (UnusableInput, OSError, ValueError) as error:
        raise UnusableInput(f"--examples {example}: {error}") from error
    return image_or_text


def note_html(text: str) -> str:
    return f'<p class="verdict">{escape(text)}</p>'


def comparison_html(comparison: Comparison) -> str:
    """Format the results of both models, below a sentence about the effect of merging."""
    unmerged, merged, speedup = comparison.unmerged, comparison.merged, comparison.speedup
    same = [name for name, _ in unmerged.predictions[:1]] == [name for name, _ in merged.predictions[:1]]
    answer = "Same prediction" if same else "<b>Another prediction</b>"
    speed = f"{speedup:.2f} times as fast" if speedup >= 1 else f"slower ({speedup:.2f} times as fast)"
    if merged.latents_left == unmerged.latents_left and merged.flops_ratio >= 1:
        sentence = "Nothing merges: both sides run the same model, so their times differ only by noise."
    else:
        sentence = f"{answer} with {merged.flops_ratio:.0%} of the computation, {speed}."
    if speedup < 1 and merged.flops_ratio < 1:
        sentence += (
            "<small>Finding the latents to merge takes time too. In a small model, or if few latents merge, it can "
            "take more time than merging saves.</small>"
        )
    sides = _side_html("Unmerged", unmerged, comparison) + _side_html("Merged", merged, comparison)
    return f'<p class="verdict">{sentence}</p><div class="sides">{sides}</div>'


def _side_html(title: str, side: Side, comparison: Comparison) -> str:
    guesses = "".join(
        f'<span>{escape(label)}</span><span><div class="bar" style="width: {100 * probability:.1f}%"></div></span>'
        f"<span>{probability:.1%}</span>"
        for label, probability in side.predictions
        if probability is not None
    )
    label = escape(side.predictions[0][0])
    return (
        f'<div class="side {title.lower()}"><h3>{title}</h3><div class="label">{label}</div>'
        f'<div class="guess">{guesses}</div>'
        f'<div class="figures"><div><b>{side.milliseconds:.1f} ms</b><span>median of {comparison.rounds} passes</span>'
        f"</div><div><b>{side.flops_ratio:.0%}</b><span>of the computation</span></div>"
        f"<div><b>{side.latents_left} of {comparison.latents}</b><span>latents at the end</span></div></div></div>"
    )


if __name__ == "__main__":
    main()
