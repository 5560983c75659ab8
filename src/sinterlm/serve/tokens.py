"""``POST /tokenize`` and ``/detokenize``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sinterlm.engine.prompts import Prompt
from sinterlm.errors import UsageError
from sinterlm.serve.context import Context
from sinterlm.serve.decoding import BodyDecoder
from sinterlm.serve.endpoint import json_body
from sinterlm.serve.errors import bad_request, from_exception
from sinterlm.serve.models import json_answer
from sinterlm.serve.protocol.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from sinterlm.serve.rendering import Renderer, off_loop


class TokensEndpoint:
    """The two handlers."""

    def __init__(self, context: Context) -> None:
        options = context.options
        self._served = context.served
        self._tokenize = BodyDecoder(TokenizeRequest, unknown_fields=options.unknown_fields)
        self._detokenize = BodyDecoder(DetokenizeRequest, unknown_fields=options.unknown_fields)
        self._renderer = Renderer(
            context.served, trust_templates=options.trust_request_chat_template
        )

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        body = await json_body(request)
        asked = self._tokenize.decode(body)
        self._served.check_name(asked.model)
        return json_answer(await off_loop(len(body), lambda: self._tokenized(asked)))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await json_body(request)
        asked = self._detokenize.decode(body)
        self._served.check_name(asked.model)
        try:
            text = await off_loop(len(body), lambda: self._text(asked))
        except UsageError as exc:
            raise from_exception(exc, param="tokens") from exc
        return json_answer(DetokenizeAnswer(text))

    def _text(self, asked: DetokenizeRequest) -> str:
        ids = self._renderer.tokens(asked.tokens, "tokens", may_be_empty=True).token_ids
        return self._served.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _tokenized(self, asked: TokenizeRequest) -> TokenizeAnswer:
        ids = list(self._prompt(asked).token_ids)
        texts = None
        if asked.return_token_strs:
            texts = [self._served.tokenizer.token_text(i) or "" for i in ids]
        return TokenizeAnswer(
            count=len(ids),
            max_model_len=self._served.max_model_len,
            tokens=ids,
            token_strs=texts,
        )

    def _prompt(self, asked: TokenizeRequest) -> Prompt:
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("give exactly one of prompt and messages", param="prompt")
        if asked.messages is not None:
            variables = dict(asked.chat_template_kwargs or {})
            return self._renderer.chat(asked, asked.messages, asked.tools, variables)
        for field in ("tools", "add_generation_prompt", "continue_final_message", "chat_template",
                      "chat_template_kwargs"):  # fmt: skip
            if getattr(asked, field) is not None:
                raise bad_request(f"{field} belongs to messages, not to prompt", param=field)
        assert asked.prompt is not None
        return self._renderer.text(
            asked.prompt, asked.add_special_tokens, "prompt", may_be_empty=True, may_be_long=True
        )
