# SPDX-License-Identifier: Apache-2.0
"""Serve a text or image classifier over HTTP, with a budget for each request.

  python examples/serve.py --model_name_or_path outputs/demo/finetuned --port 8000

  curl -s http://127.0.0.1:8000/predict -d '{"inputs": ["A warm, funny film."], "flops_ratio": 0.5}'

POST /predict takes JSON: `inputs`, a list of texts, of pairs of texts, or of images (files in base64); and optionally
`flops_ratio` or `max_changed`, the budget of this request. Inputs with the same merging settings run in one batch.
When many inputs wait, the model falls back to cheaper rows of its frontier (`config.merge_frontier`), and the answer
says so, unless the request has `max_changed` or `"may_fall_back": false`. GET /health, /metrics (Prometheus) and /
describe the server. docs/serve.md has the details.

One thread runs the model, another one reads inputs, and the event loop does neither.
"""

from __future__ import annotations

import asyncio
import base64
import math
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import prometheus_client
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.batching import Batcher, Budget
from examples.classifier import Classifier, Inputs
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming, one_line

RETRY_AFTER_SECONDS = 1

REQUESTS = prometheus_client.Counter("tome_requests", "Requests to /predict, by status of the answer.", ["status"])
IN_WORK = prometheus_client.Gauge("tome_requests_in_work", "Requests to /predict that have no answer yet.")
SECONDS = prometheus_client.Histogram("tome_request_seconds", "Seconds from request to answer.")


@dataclass
class ServeArguments:
    """Arguments of the server."""

    _argument_group_name: ClassVar[str] = "server"

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a classifier."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Let the tokenizer or image processor run code from the checkpoint."},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for a free one."})
    max_batch_size: int = field(default=16, metadata={"help": "Most inputs in a batch."})
    max_wait_ms: float = field(default=2.0, metadata={"help": "Longest wait for a batch to fill, in milliseconds."})
    fall_back_inputs: int = field(
        default=16,
        metadata={"help": "Waiting inputs for each row of the frontier to fall back by; 0 for never."},
    )
    max_requests: int = field(default=128, metadata={"help": "Most requests in work; others get status 503."})
    max_inputs: int = field(default=32, metadata={"help": "Most inputs in a request."})
    max_request_bytes: int = field(default=8_000_000, metadata={"help": "Most bytes in a request."})
    max_characters: int = field(default=20_000, metadata={"help": "Most characters in a text."})
    max_pixels: int = field(default=50_000_000, metadata={"help": "Most pixels in an image."})
    timeout: float = field(default=30.0, metadata={"help": "Seconds until a request gets status 504."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise BadInput("--model_name_or_path: is missing; use a Hub id or a folder with a finetuned classifier")
        for name, least in (("port", 0), ("fall_back_inputs", 0), ("max_wait_ms", 0)):
            if (value := getattr(self, name)) < least:
                raise BadInput(f"--{name} {value}: must be {least} or more")
        for name in (
            "max_batch_size", "max_requests", "max_inputs", "max_request_bytes", "max_characters", "max_pixels",
            "timeout",
        ):  # fmt: skip
            if (value := getattr(self, name)) <= 0:
                raise BadInput(f"--{name} {value}: must be above 0")


class PredictRequest(BaseModel):
    """Body of a request to /predict."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: Annotated[list[str | tuple[str, str]], Field(min_length=1)]
    flops_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    max_changed: Annotated[float, Field(gt=0, le=1)] | None = None
    may_fall_back: bool = True

    @model_validator(mode="after")
    def _check_budget(self) -> PredictRequest:
        if self.flops_ratio is not None and self.max_changed is not None:
            raise ValueError("use one of flops_ratio and max_changed")
        return self


class Service:
    """Answers to requests: limits at the door, reading of inputs, budgets and predictions."""

    def __init__(self, classifier: Classifier, arguments: ServeArguments) -> None:
        self.classifier, self.arguments = classifier, arguments
        self.batcher = Batcher(
            classifier, arguments.max_batch_size, arguments.max_wait_ms / 1000, arguments.fall_back_inputs
        )
        self.requests_in_work = 0
        IN_WORK.set_function(lambda: self.requests_in_work)
        self._reading_thread = ThreadPoolExecutor(1, "reading")

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Run batches while the server runs; uvicorn leaves the block after it has answered the accepted requests."""
        self.batches = asyncio.create_task(self.batcher.run())
        yield
        self.batches.cancel()

    async def predict(self, request: Request) -> dict[str, Any]:
        """Answer POST /predict."""
        if self.requests_in_work >= self.arguments.max_requests:
            message = f"{self.requests_in_work} requests are in work; try again later"
            raise HTTPException(503, message, {"Retry-After": str(RETRY_AFTER_SECONDS)})
        self.requests_in_work += 1
        try:
            async with asyncio.timeout(self.arguments.timeout):
                return await self._answer(await self._read_body(request))
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.arguments.timeout:g} seconds") from None
        finally:
            self.requests_in_work -= 1

    async def _read_body(self, request: Request) -> PredictRequest:
        body, most = bytearray(), self.arguments.max_request_bytes
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise HTTPException(413, f"the request has more than {most:,} bytes")
        try:
            asked = PredictRequest.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise HTTPException(422, f"{place}: {first['msg']}" if place else first["msg"]) from None
        if (count := len(asked.inputs)) > self.arguments.max_inputs:
            raise HTTPException(422, f"inputs: {count} given; must be at most {self.arguments.max_inputs}")
        return asked

    async def _answer(self, asked: PredictRequest) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            inputs = await loop.run_in_executor(self._reading_thread, self._read_inputs, asked.inputs)
            setting = await self.batcher.choose(Budget(asked.flops_ratio, asked.max_changed))
        except (ValueError, BadInput) as error:
            raise HTTPException(422, one_line(error)) from None
        # A cheaper row keeps a budget of cost, but not one of changed answers.
        may_fall_back = asked.may_fall_back and asked.max_changed is None
        predictions = await self.batcher.classify(inputs, setting, may_fall_back)
        return {
            "predictions": predictions,
            "asked": {"flops_ratio": asked.flops_ratio, "max_changed": asked.max_changed},
            "degraded": any(each["degraded"] for each in predictions),
        }

    def _read_inputs(self, inputs: Sequence[str | tuple[str, str]]) -> list[Inputs]:
        """Return the model's inputs.

        Raises:
            BadInput: for the first one that cannot be read.
        """
        read = []
        for index, each in enumerate(inputs):
            try:
                read.append(self._read_image(each) if self.classifier.takes_images else self._read_text(each))
            except (ValueError, BadInput) as error:
                raise BadInput(f"inputs.{index}: {one_line(error)}") from None
        return read

    def _read_text(self, text: str | tuple[str, str]) -> Inputs:
        characters, most = len(text) if isinstance(text, str) else sum(map(len, text)), self.arguments.max_characters
        if characters > most:
            raise ValueError(f"has {characters:,} characters; must have at most {most:,}")
        return self.classifier.read_text(text)

    def _read_image(self, encoded: str | tuple[str, str]) -> Inputs:
        try:
            data = base64.b64decode(encoded, validate=True)  # type: ignore[arg-type]
        except (ValueError, TypeError):
            raise ValueError("must be an image file in base64") from None
        return self.classifier.read_image(data)

    def describe(self) -> dict[str, Any]:
        """Answer GET /: the checkpoint, its frontier and the limits."""
        config, frontier = self.classifier.config, self.batcher.settings.frontier
        names = ("flops_ratio", "changed", "changed_bound")
        return {
            "model": Path(self.arguments.model_name_or_path or "").name,
            "architecture": type(self.classifier.model).__name__,
            "inputs": "images in base64" if self.classifier.takes_images else "texts or pairs of texts",
            "labels": list(config.id2label.values()),
            "latents": config.num_latents,
            "flops_ratio": self.batcher.settings.saved.flops_ratio,
            "frontier": [{name: getattr(row, name) for name in names} for row in (frontier.rows if frontier else [])],
            "limits": {name: value for name, value in asdict(self.arguments).items() if name.startswith("max_")},
        }

    def describe_frontier(self) -> str:
        """Say in a line what the server can fall back to."""
        frontier = self.batcher.settings.frontier
        if frontier is not None:
            other = (
                ""
                if frontier.was_measured_on(self.classifier.model)
                else "; measured on other weights, calibrate again"
            )
            rows = frontier.rows
            return f"frontier: {len(rows)} rows, down to {rows[-1].flops_ratio:.3f} of the FLOPs{other}"
        return (
            "frontier: none, so a schedule meets flops_ratio, max_changed is refused, and nothing falls back under "
            "load; use model.calibrate(samples) and save_pretrained"
        )

    def is_healthy(self) -> bool:
        return not self.batches.done()


def build_app(service: Service) -> FastAPI:
    """Return the routes of a service."""
    app = FastAPI(title="Perceiver that merges its latents", lifespan=service.running)
    body = {"requestBody": {"content": {"application/json": {"schema": PredictRequest.model_json_schema()}}}}

    @app.post("/predict", openapi_extra=body)
    async def predict(request: Request) -> dict[str, Any]:
        status, start = 500, time.monotonic()
        try:
            answer = await service.predict(request)
            status = 200
            return answer
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            REQUESTS.labels(status).inc()
            SECONDS.observe(time.monotonic() - start)

    @app.get("/")
    async def describe() -> dict[str, Any]:
        return service.describe()

    @app.get("/health")
    async def health(response: Response) -> dict[str, str]:
        response.status_code = 200 if service.is_healthy() else 503
        return {"status": "ok" if service.is_healthy() else "the model has stopped"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", ServeArguments)
    with naming(f"--host {arguments.host} --port {arguments.port}", OSError, OverflowError):
        listener = socket.create_server((arguments.host, arguments.port))
    with listener:
        classifier = Classifier(
            arguments.model_name_or_path, arguments.trust_remote_code, arguments.device, arguments.max_pixels
        )
        service = Service(classifier, arguments)
        print(service.describe_frontier())
        host, port = listener.getsockname()[:2]
        print(f"listening on http://{host}:{port}", flush=True)
        config = uvicorn.Config(
            build_app(service),
            log_level="warning",
            timeout_graceful_shutdown=math.ceil(arguments.timeout),
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
