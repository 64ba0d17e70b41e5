"""openai-python, as its documentation uses it: models, completions, streams, mistakes.

Not for chats (test_chat.py). Input: the demo pair of conftest.py.
"""

import openai
import pytest
import tokenizers
from conftest import DEMO, PROMPT, run


def complete(client, prompt=PROMPT, **wanted):
    return client.completions.create(model="demo", prompt=prompt, **{"max_tokens": 16, "temperature": 0, **wanted})


def test_the_model_is_listed(client):
    model = client.models.list().data[0]
    assert (model.id, model.object) == ("demo", "model")
    assert client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other/one")
    assert refused.value.code == "model_not_found"


def test_a_text_is_the_one_that_run_prints(client):
    for sampling in [{"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.8}]:
        words = [word for key, value in sampling.items() for word in (f"--{key.replace('_', '-')}", value)]
        ran = run("demo", PROMPT, "--max-tokens", 16, *words)
        answer = complete(client, **sampling)
        assert answer.choices[0].text == ran["text"]
        assert answer.choices[0].finish_reason == ran["finish_reason"]
        assert answer.usage.completion_tokens == len(ran["ids"])


def test_a_stream_is_the_whole_text_in_pieces(client):
    whole = complete(client, max_tokens=40)
    options = {"include_usage": True}
    pieces = list(complete(client, max_tokens=40, stream=True, stream_options=options))
    assert len(pieces) > 3
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text
    assert [choice.finish_reason for piece in pieces for choice in piece.choices][-1] == "length"
    assert pieces[-1].usage == whole.usage
    assert {piece.id for piece in pieces} == {pieces[0].id}


def test_echo_scores_the_prompt(client):
    choice = complete(client, echo=True, logprobs=3, max_tokens=4).choices[0]
    logprobs = choice.logprobs
    # The tokenizer begins every text with a token that is not shown.
    shown = "".join(logprobs.tokens).removeprefix("<|endoftext|>")
    assert choice.text.startswith(PROMPT) and shown == choice.text
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, value, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs))[1:]:
        # The likeliest three, and the token itself if it is not one of them.
        assert 3 <= len(top) <= 4 and top[token] == value
    # Greedy: each generated token is the likeliest.
    assert [max(top.values()) for top in logprobs.top_logprobs[-4:]] == logprobs.token_logprobs[-4:]
    lens = [0] + [len(token) for token in logprobs.tokens[1:]]
    assert logprobs.text_offset == [sum(lens[:i]) for i in range(len(lens))]


def test_a_prompt_alone_can_be_scored(client):
    choice = complete(client, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert choice.text == PROMPT and len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)


def test_n_continuations_of_several_prompts(client):
    answer = complete(client, [PROMPT, "use std::"], n=2, temperature=1, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    alone = complete(client, "use std::", n=2, temperature=1, seed=3)
    assert [c.text for c in alone.choices] == [c.text for c in answer.choices[2:]]


def test_token_prompts_are_text_prompts(client):
    ids = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(PROMPT).ids
    text = complete(client).choices[0].text
    assert complete(client, ids).choices[0].text == text
    assert [choice.text for choice in complete(client, [ids, ids]).choices] == [text, text]


def test_a_stop_string_ends_the_text(client):
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[8:12]
    choice = complete(client, max_tokens=40, stop=[stop]).choices[0]
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_extensions_pass_through_extra_body(client):
    body = {"ignore_eos": True, "min_tokens": 16, "top_k": 1, "min_p": 0.1}
    assert complete(client, temperature=1, extra_body=body).choices[0].text == complete(client).choices[0].text


def refused(kind, call):
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert set(error.body) >= {"message", "type", "param", "code"}, error.body
    return error


def test_mistakes_are_the_exceptions_that_a_client_catches(client):
    error = refused(openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a"))
    assert (error.code, error.param, error.type) == ("model_not_found", "model", "invalid_request_error")
    error = refused(openai.BadRequestError, lambda: complete(client, temperature=-1))
    assert error.param == "temperature"
    error = refused(openai.BadRequestError, lambda: complete(client, suffix="}"))
    assert error.param == "suffix"
    error = refused(openai.BadRequestError, lambda: complete(client, [1] * 5000))
    assert error.code == "context_length_exceeded"
    refused(openai.NotFoundError, lambda: client.images.generate(prompt="a", model="demo"))


def test_a_full_queue_is_a_rate_limit(start):
    server = start("--max-running", 1, "--max-queue", 1)
    client = server.client()
    long = {"max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}}
    with complete(client, **long) as running, complete(client, **long) as waiting:
        next(running)
        error = refused(openai.RateLimitError, lambda: complete(client))
        assert error.response.headers["retry-after"] == "1"
        assert (error.code, error.type) == ("queue_full", "rate_limit_error")
        waiting.close()
    # Who waits as told gets through.
    assert complete(server.client(max_retries=8)).choices[0].text


def test_a_stream_that_is_left_frees_its_place(start):
    server = start("--max-running", 1, "--max-queue", 0)
    client = server.client(max_retries=8)
    for _ in range(3):
        with complete(client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}) as stream:
            next(stream)
    assert complete(client).choices[0].text


def test_a_key_is_asked_for(start):
    server = start("--api-key", "sesame-1", "--api-key", "sesame-2")
    with pytest.raises(openai.AuthenticationError) as caught:
        complete(server.client(api_key="wrong"))
    assert "sesame" not in str(caught.value)
    for key in ["sesame-1", "sesame-2"]:
        assert complete(server.client(api_key=key)).choices[0].text


def test_acceptance_is_told_to_who_asks(client):
    answer = complete(client, max_tokens=60, extra_body={"metrics": True, "provenance": True})
    told = answer.metrics["speculative_decoding"]
    assert len(told["acceptance_histogram"]) == told["num_spec_tokens"] + 1
    pieces = answer.choices[0].provenance
    assert "".join(piece["text"] for piece in pieces) == answer.choices[0].text
    assert {piece["source"] for piece in pieces} <= {"plain", "drafted", "corrected", "bonus"}
