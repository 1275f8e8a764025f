"""transformers' own server of OpenAI's interface, with one model of ours behind it.

What transformers serves is a model whose `generate` it calls: here that decodes self-speculatively.
"""

import inspect
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

# Of transformers' server, what one text model answers.
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}


class OneModel(ModelManager):
    """Has one model, which is loaded already and stays so, by the name that requests give."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.force_model = name
        self.model = model
        self.tokenizer = tokenizer

    def load_model_and_processor(self, *names: Any, **options: Any) -> Any:
        """The model and its tokenizer."""
        return self.model, self.tokenizer

    def get_gen_models(self) -> list[dict[str, Any]]:  # type: ignore[override]  # There it is static, and cached.
        """What `/v1/models` lists."""
        return [{"id": self.force_model, "object": "model", "owned_by": "layerskip", "created": 0}]

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: it has no revision."""
        return model_id


def application(manager: OneModel) -> FastAPI:
    """The server's application."""
    state = GenerationState()
    # Others, of which transformers' releases have more and more, are for other models.
    handlers = {name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")}
    ours = {
        "chat_handler": ChatCompletionHandler(manager, state),
        "completion_handler": CompletionHandler(manager, state),
        "response_handler": ResponseHandler(manager, state),
    }
    build: Any = build_server
    app: FastAPI = build(model_manager=manager, generation_state=state, **handlers | ours)
    app.add_exception_handler(ValueError, _refuse)
    app.router.routes = [route for route in app.routes if getattr(route, "path", None) in PATHS]
    return app


def _refuse(request: Request, error: Exception) -> JSONResponse:
    """What cannot be answered is the request's mistake: a prompt that is too long, a chat without a template."""
    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes one that is free.

    Raises:
        ValueError: there is no such address, or another program has it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(f"--host {host}, --port {port}: nothing can listen there ({error.strerror}).") from error


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests, one generation after another, until Ctrl-C or SIGTERM."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
