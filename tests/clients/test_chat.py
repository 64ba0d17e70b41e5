"""Chats by openai-python and langchain-openai.

Not for what a model says: this one's weights are random. Input: the checkpoint CHAT of conftest.py.
"""

import typing

import openai
import pydantic
import pytest
from conftest import CHAT, Server, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def server():
    server = Server(CHAT, "--served-model-name", "chat")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def chat(client, messages=MESSAGES, **wanted):
    wanted = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}, **wanted}
    return client.chat.completions.create(model="chat", messages=messages, **wanted)


def test_a_message_is_answered_as_run_answers_it(client):
    answer = chat(client, MESSAGES[1:], temperature=0.9, seed=7)
    ran = run(CHAT, "--chat", "Say something.", "--max-tokens", 12, "--ignore-eos", "--temperature", 0.9, "--seed", 7)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ran["text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = chat(client)
    pieces = list(chat(client, stream=True, stream_options={"include_usage": True}))
    choices = [choice for piece in pieces for choice in piece.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == "length"
    # Not compared: cached_tokens, which the second finds.
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_stream_helper_collects_the_same(client):
    with client.chat.completions.stream(
        model="chat", messages=MESSAGES, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    ) as stream:
        stream.until_done()
        # Its `get_final_completion` takes an answer that was cut off for a mistake.
        said = stream.current_completion_snapshot.choices[0].message.content
    assert said == chat(client).choices[0].message.content


def test_likelihoods_are_told(client):
    tokens = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(tokens) == 12
    for token in tokens:
        assert token.logprob == max(top.logprob for top in token.top_logprobs) and len(token.top_logprobs) == 2


def test_n_answers_and_content_in_parts(client):
    answer = chat(client, n=3, temperature=1, seed=1, max_completion_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say something."}]}]
    assert chat(client, parts).choices[0].message.content == chat(client, MESSAGES[1:]).choices[0].message.content


def test_mistakes_are_told(client):
    for messages in [[], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]]:
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, messages)
        assert caught.value.body["param"].startswith("messages")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": "long " * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_langchain_invokes_and_streams(server, client):
    llm = ChatOpenAI(base_url=f"{server.root}/v1", api_key="none", model="chat", temperature=0, max_tokens=12,
                     extra_body={"ignore_eos": True})
    said = chat(client).choices[0].message.content
    messages = [SystemMessage("Be brief."), HumanMessage("Say something.")]
    answer = llm.invoke(messages)
    assert isinstance(answer, AIMessage) and answer.content == said
    assert answer.usage_metadata["output_tokens"] == 12
    assert "".join(piece.content for piece in llm.stream(messages)) == said


class Item(pydantic.BaseModel):
    kind: typing.Literal["tea", "coffee"]
    cups: typing.Annotated[int, pydantic.Field(ge=1, le=12)]
    sugar: bool


def test_an_answer_is_parsed_into_a_class(client):
    answer = client.chat.completions.parse(
        model="chat", messages=MESSAGES, response_format=Item, temperature=1, seed=3, max_tokens=300
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Item)
    with client.chat.completions.stream(
        model="chat", messages=MESSAGES, response_format=Item, temperature=1, seed=3, max_tokens=300
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_one_of_several_texts_is_chosen(client):
    choices = ["green", "black", "none at all"]
    for more in [{"guided_choice": choices}, {"structured_outputs": {"choice": choices}}]:
        answer = chat(client, max_tokens=100, extra_body=more)
        assert answer.choices[0].message.content in choices
        assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"guided_regex": "("})
    assert caught.value.body["param"] == "guided_regex"


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A server whose template shows tools and their calls."""
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text("{% if tools %}{{ tools[0].function.name }} <tool_call>{% endif %}{{ messages[-1].content }}")
    server = Server(CHAT, "--served-model-name", "chat", "--chat-template", template)
    with server.client() as client:
        yield client
    server.stop()


def test_calls_are_forced(caller):
    tool = openai.pydantic_function_tool(Item, name="order")
    named = {"type": "function", "function": {"name": "order"}}
    messages = [{"role": "user", "content": "Order."}]
    for choice in ["required", named]:
        answer = caller.chat.completions.parse(
            model="chat", messages=messages, tools=[tool], tool_choice=choice, parallel_tool_calls=False,
            temperature=1, seed=5, max_tokens=300,
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        [call] = answer.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Item)
