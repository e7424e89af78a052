"""What a user sees: an unmodified OpenAI client, parked models that answer, and clear refusals."""

import httpx2
import openai
import pytest

import sublet
from sublet.errors import SubletError
from tests.e2e.conftest import CHAT, OTHER
from tests.e2e.stack import RunningStack, chat, eventually

pytestmark = pytest.mark.nats


def test_a_chat_is_answered(stack: RunningStack) -> None:
    answer = stack.openai().chat.completions.create(
        model=CHAT, messages=[{"role": "user", "content": "hello"}], max_tokens=8
    )

    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 8 == answer.usage.completion_tokens


def test_a_chat_is_streamed(stack: RunningStack) -> None:
    pieces = [
        event.choices[0].delta.content
        for event in stack.openai().chat.completions.create(
            model=CHAT, messages=[{"role": "user", "content": "hello"}], max_tokens=8, stream=True
        )
        if event.choices
    ]

    assert 8 == sum(1 for piece in pieces if piece)


def test_the_models_are_listed(stack: RunningStack) -> None:
    assert {CHAT, OTHER} <= {model.id for model in stack.openai().models.list()}


def test_a_request_wakes_a_parked_model(stack: RunningStack) -> None:
    engines = stack.engines()
    with stack.client() as client:
        client.park(CHAT)
    eventually(lambda: stack.state_of(CHAT) == "parked", "not parked")

    assert chat(stack.openai(), CHAT)
    eventually(lambda: "resident" == stack.state_of(CHAT), "placement has not heard of it")
    assert engines == stack.engines(), "a park keeps the process"


def test_a_model_whose_context_is_most_of_its_share_parks_and_wakes_too(stack: RunningStack) -> None:
    others = stack.engines()
    with stack.client() as client:
        client.deploy(sublet.deployment("tiny", weights="50MB", share="800MiB"))
        eventually(lambda: stack.state_of("tiny") == "resident", "not resident")
        engines = stack.engines()
        client.park("tiny")
        eventually(lambda: stack.state_of("tiny") == "parked", "not parked")

        assert chat(stack.openai(), "tiny")
        assert engines == stack.engines(), "a park keeps the process"
        client.retire("tiny")
    eventually(lambda: stack.engines() == others, "its engine is still there")


def test_a_park_right_after_a_wake_stays(stack: RunningStack) -> None:
    with stack.client() as client:
        client.park(CHAT)
        eventually(lambda: stack.state_of(CHAT) == "parked", "not parked")
        chat(stack.openai(), CHAT)

        client.park(CHAT)
        eventually(lambda: stack.state_of(CHAT) == "parked", "not parked again")
        client.wake(CHAT)
    eventually(lambda: stack.state_of(CHAT) == "resident", "not awake")


def test_a_wrong_key_is_refused(stack: RunningStack) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(stack.openai(api_key="sk-sublet-wrong"), CHAT)


def test_a_revoked_key_is_refused(stack: RunningStack) -> None:
    with stack.client() as client:
        made = client.create_key("short-lived")
        eventually(lambda: accepts(stack, made.key), "the key was not accepted")

        client.revoke_key(made.key_id)

    eventually(lambda: not accepts(stack, made.key), "the key is still accepted")


def accepts(stack: RunningStack, key: str) -> bool:
    try:
        stack.openai(api_key=key).models.list()
    except openai.AuthenticationError:
        return False
    return True


def test_an_unknown_model_is_not_found_and_the_near_one_is_named(stack: RunningStack) -> None:
    with pytest.raises(openai.NotFoundError, match=CHAT):
        chat(stack.openai(), "chatt")


def test_a_body_that_cannot_be_read_is_a_bad_request(stack: RunningStack) -> None:
    deep = b'{"model": "chat", "messages": ' + b"[" * 20_000

    for body in (b"", b"\xff\xfe", b"[]", deep):
        answer = httpx2.post(
            f"{stack.context.gateway_url}/v1/chat/completions",
            content=body,
            headers={"authorization": f"Bearer {stack.context.api_key}"},
        )

        assert 400 == answer.status_code, answer.text
        assert answer.json()["error"]["message"]


def test_a_limit_below_the_request_is_rejected_with_both_numbers(stack: RunningStack) -> None:
    from sublet import _contract as contract

    spec = contract.DeploymentSpec(
        name="narrow",
        engine=contract.EngineSpec(weights_bytes=10**9),
        share=contract.ShareSpec(request_portion=0.5, limit_portion=0.4),
    )
    with stack.client() as client, pytest.raises(SubletError, match=r"limit \(0\.4\) is below the request \(0\.5\)"):
        client.deploy(spec)


def test_a_deployment_comes_and_goes(stack: RunningStack) -> None:
    engines = stack.engines()
    with stack.client() as client:
        client.deploy(sublet.deployment("guest", weights="1GB", share=0.2))
        assert chat(stack.openai(), "guest"), "a request waits for the cold start"

        client.retire("guest")

    eventually(lambda: not is_known(stack, "guest"), "a gateway still knows it")
    eventually(lambda: stack.engines() == engines, "its engine is still there")


def is_known(stack: RunningStack, model: str) -> bool:
    """A gateway hears of it after the command was answered; what it says until then is its own matter."""
    try:
        chat(stack.openai(), model)
    except openai.NotFoundError:
        return False
    except openai.APIStatusError:
        return True
    return True
