"""A gateway over real sockets: engines and a holder beside it, history in memory."""

import asyncio
import json
from typing import Any

import openai
import pytest

from services.gateway.routes import ReplicaState
from tests.unit.gateway import fleet
from tests.unit.gateway.world import KEY, World, world

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking_calls")]


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def error_of(response: Any) -> tuple[int, str]:
    return response.status, (await response.json())["error"]["code"]


# --- Resident models --------------------------------------------------------------------------------------------------


async def test_a_resident_model_answers() -> None:
    async with world() as there, there.chat(headers={"x-request-id": "mine"}) as response:
        body = await response.json()

        assert 200 == response.status
        assert "hello" == body["choices"][0]["message"]["content"]
        assert "mine" == response.headers["x-request-id"] == there.engine.headers[0]["x-request-id"]
        assert ("resident", "0") == (response.headers["x-sublet-state"], response.headers["x-sublet-held-ms"])


async def test_the_clients_trace_goes_on_in_the_engine_and_its_key_does_not() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    async with world() as there, there.chat(headers={"traceparent": parent}):
        seen = there.engine.headers[0]

        assert "0af7651916cd43dd8448eb211c80319c" in seen["traceparent"]
        assert "Authorization" not in seen


async def test_the_official_client_streams_and_sees_no_usage_that_it_did_not_ask_for() -> None:
    async with world() as there:
        # In a thread: it reads certificates, which blocks.
        client = await asyncio.to_thread(openai.AsyncOpenAI, base_url=there.url + "/v1", api_key=KEY, max_retries=0)
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
        models = [model.id async for model in client.models.list()]
        async with there.get("/metrics") as metrics:
            page = await metrics.text()
        await client.close()

    assert "hello" == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert ["m"] == models
    assert there.engine.requests[0]["stream_options"] == {"include_usage": True}
    assert 'sublet_gateway_tokens_total{kind="completion",model="m"} 2.0' in page


async def test_usage_that_was_asked_for_is_shown() -> None:
    async with world() as there, there.chat(stream=True, stream_options={"include_usage": True}) as response:
        events = events_of(await response.text())

    assert 7 == events[-2]["usage"]["total_tokens"]
    assert "[DONE]" == events[-1]


async def test_embeddings_pass_through() -> None:
    async with (
        world() as there,
        there.session.post(
            there.url + "/v1/embeddings", json={"model": "m", "input": "x"}, headers={"Authorization": f"Bearer {KEY}"}
        ) as response,
    ):
        assert 200 == response.status
        assert "list" == (await response.json())["object"]


async def test_traffic_to_a_resident_model_does_not_notice_that_nats_is_down() -> None:
    async with world() as there:
        there.server.stop()
        await there.until(lambda: there.holder.wish_count > 6)
        statuses = []
        for _ in range(5):
            async with there.chat() as response:
                statuses.append(response.status)
        async with there.get("/readyz") as response:
            ready = response.status, [problem["what"] for problem in (await response.json())["problems"]]
        async with there.get("/healthz") as response:
            health = response.status

    assert [200] * 5 == statuses
    assert (503, ["bus"]) == ready
    assert 200 == health


# --- Parked models ----------------------------------------------------------------------------------------------------


async def test_a_request_to_a_parked_model_waits_for_it_and_is_answered() -> None:
    async with world() as there:
        await there.park()
        asked = asyncio.create_task(read(there.chat()))
        await there.until_wanted()
        await there.make_resident()
        status, headers, body = await asked

    assert 200 == status
    assert "hello" in body
    assert "parked" == headers["x-sublet-state"]
    assert ("r", 1) == (there.wanted[0].replica_id, there.wanted[0].wake_epoch)


async def test_the_wish_is_repeated_with_its_trace_and_when_nats_is_back() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    async with world() as there:
        await there.park()
        asked = asyncio.create_task(read(there.chat(headers={"traceparent": parent})))
        await there.until_wanted(2)
        there.server.stop()
        count = len(there.wanted)
        await there.server.restart()
        await there.until_wanted(count + 1)
        await there.make_resident()
        status, headers, _ = await asked

    assert 200 == status
    assert int(headers["x-sublet-held-ms"]) >= 250
    assert {1} == {wanted.wake_epoch for wanted in there.wanted}
    assert all("0af7651916cd43dd8448eb211c80319c" in traceparent for traceparent in there.traceparents)


async def test_a_held_stream_hears_heartbeats_and_then_its_answer() -> None:
    async with world(heartbeat_s=0.02) as there:
        await there.park()
        async with there.chat(stream=True) as response:
            beat = await response.content.readline()
            await there.make_resident()
            events = events_of(await response.text())

    assert beat.startswith(b": waiting state=parked waited_s=0.")
    assert "[DONE]" == events[-1]


async def test_a_deadline_that_passes_before_a_heartbeat_keeps_its_status() -> None:
    async with world() as there:
        await there.park()
        async with there.chat(stream=True, headers={"x-sublet-timeout-s": "0.05"}) as response:
            assert (504, "deadline_exceeded") == await error_of(response)
            assert int(response.headers["Retry-After"]) >= 1


async def test_a_deadline_that_passes_after_a_heartbeat_is_one_event() -> None:
    async with world(heartbeat_s=0.02) as there:
        await there.park()
        async with there.chat(stream=True, headers={"x-sublet-timeout-s": "0.1"}) as response:
            events = events_of(await response.text())

    assert ["deadline_exceeded"] == [event["error"]["code"] for event in events]


async def test_a_client_that_leaves_the_hold_is_forgotten() -> None:
    async with world() as there:
        await there.park()
        asked = asyncio.create_task(read(there.chat()))
        await there.until_wanted()
        asked.cancel()
        await there.until(lambda: not there.gateway.runtime.core.requests)

        assert {} == there.gateway.runtime.tickets


async def test_closing_a_route_is_acknowledged_at_once_and_stops_new_requests() -> None:
    async with world() as there:
        async with asyncio.timeout(20):
            await there.holder.close("r")
        asked = asyncio.create_task(read(there.chat()))
        await there.until_wanted()

        assert [] == there.engine.requests
        there.holder.set_open("r", there.engine.url)
        assert 200 == (await asked)[0]


async def test_without_its_holder_a_node_gets_nothing_once_the_lease_ended_and_readiness_says_so() -> None:
    async with world() as there:
        there.holder.is_up = False
        await there.until(lambda: not there.is_routable())
        asked = asyncio.create_task(read(there.chat()))
        await there.until_wanted()
        async with there.get("/readyz") as response:
            problems = [problem["what"] for problem in (await response.json())["problems"]]
        sent = list(there.engine.requests)
        there.holder.is_up = True

        assert 200 == (await asked)[0]
        assert [] == sent
        assert ["route lease of n"] == problems


# --- Engines that misbehave -------------------------------------------------------------------------------------------


async def test_an_engine_that_says_it_is_asleep_gets_the_request_again_when_it_is_back() -> None:
    async with world() as there:
        there.engine.is_asleep = True
        asked = asyncio.create_task(read(there.chat(stream=True)))
        await there.until_wanted()
        there.engine.is_asleep = False

        status, _, body = await asked

        assert 200 == status
        assert "[DONE]" == events_of(body)[-1]
        assert len(there.engine.requests) >= 2


async def test_a_connection_that_breaks_before_the_first_byte_is_tried_again() -> None:
    async with world(shun_broken_s=0.02) as there:
        there.engine.cut_next_count = 1

        status, _, _ = await read(there.chat())

        assert 200 == status


async def test_a_request_that_is_always_cut_gets_one_error() -> None:
    async with world(shun_broken_s=0.02) as there:
        there.engine.cut_next_count = 100
        async with there.chat() as response:
            assert (502, "engine_cut") == await error_of(response)


async def test_a_refused_connection_waits_for_another_engine() -> None:
    async with world(shun_broken_s=0.02) as there:
        there.holder.set_open("r", "http://127.0.0.1:1")
        await there.until(lambda: there.gateway.runtime.core.routes.leases["n"].endpoints["r"].endswith(":1"))
        asked = asyncio.create_task(read(there.chat()))
        await there.until_wanted()
        there.holder.set_open("r", there.engine.url)

        assert 200 == (await asked)[0]


async def test_an_answer_that_breaks_off_ends_with_one_typed_event() -> None:
    async with world() as there:
        there.engine.cuts_in_the_middle = True
        async with there.chat(stream=True) as response:
            events = events_of(await response.text())

    assert "hel" == events[0]["choices"][0]["delta"]["content"]
    assert "answer_broken" == events[-1]["error"]["code"]


async def test_an_engine_that_stays_silent_gets_the_request_only_once() -> None:
    async with world(silence_timeout_s=0.1) as there:
        there.engine.first_gate.clear()
        async with there.chat() as response:
            assert (504, "engine_timeout") == await error_of(response)

        assert 1 == len(there.engine.requests)
        there.engine.first_gate.set()


async def test_a_client_that_leaves_a_stream_stops_the_engine() -> None:
    async with world() as there:
        there.engine.gate.clear()
        async with there.chat(stream=True) as response:
            await response.content.readline()
            response.close()
            async with asyncio.timeout(60):
                await there.engine.was_cancelled.wait()
        await there.until(lambda: not there.gateway.runtime.core.loads.by_replica)
        there.engine.gate.set()


async def test_a_stopping_gateway_finishes_what_runs() -> None:
    async with world() as there:
        there.engine.gate.clear()
        asked = asyncio.create_task(read(there.chat(stream=True)))
        await there.engine.arrived.wait()
        there.gateway.runtime.refuse_waiting()
        async with there.chat() as response:
            late = await error_of(response)
        there.engine.gate.set()
        status, _, body = await asked

    assert (503, "gateway_stopping") == late
    assert 200 == status
    assert "[DONE]" == events_of(body)[-1]


# --- Who may, and what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("authorization", "code"),
    [("", "missing_api_key"), ("Bearer sk-wrong", "invalid_api_key"), ("Basic sk-acme", "missing_api_key")],
)
async def test_without_a_known_key_nothing_is_told(authorization: str, code: str) -> None:
    async with world() as there:
        for path in ("/v1/models", "/v1/models/m"):
            async with there.session.get(there.url + path, headers={"Authorization": authorization}) as response:
                assert (401, code) == await error_of(response)
        async with there.chat(headers={"Authorization": authorization}) as response:
            assert (401, code) == await error_of(response)
            assert "Bearer" == response.headers["WWW-Authenticate"]


async def test_a_revoked_key_is_refused() -> None:
    async with world() as there:
        await there.historian.append(fleet.key_revoked())
        await there.until(lambda: there.gateway.runtime.core.routes._callers == {})
        async with there.chat() as response:
            assert (401, "invalid_api_key") == await error_of(response)


async def test_a_key_sees_its_tenants_models_only() -> None:
    async with world() as there:
        await there.historian.append(fleet.admitted("secret", tenant="other"))
        await there.until(lambda: "d-secret" in there.gateway.runtime.core.routes.deployments)
        async with there.get("/v1/models") as response:
            names = [model["id"] for model in (await response.json())["data"]]
        async with there.chat(model="secret") as response:
            error = (await response.json())["error"]

    assert ["m"] == names
    assert "model_not_found" == error["code"]


async def test_without_required_keys_the_open_tenant_is_served() -> None:
    async with (
        world(auth_required=False, open_tenant="acme") as there,
        there.chat(headers={"Authorization": ""}) as response,
    ):
        assert 200 == response.status


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "Expected `object`"),
        (b'{"messages": []}', "missing required field `model`"),
        (b'{"model": 3}', "Expected `str`, got `int` - at `$.model`"),
        (b"\xff", "not valid JSON"),
    ],
)
async def test_a_body_that_cannot_be_used_is_refused_in_one_sentence(body: bytes, says: str) -> None:
    async with world() as there:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with there.session.post(there.url + "/v1/completions", data=body, headers=headers) as response:
            error = (await response.json())["error"]

        assert (400, "bad_request") == (response.status, error["code"])
        assert says in error["message"]


async def test_a_body_that_is_too_large_is_refused() -> None:
    async with world(request_bytes_max=1000) as there, there.chat(user="x" * 2000) as response:
        assert (413, "body_too_large") == await error_of(response)


@pytest.mark.parametrize("given", ["soon", "-1", "0", "nan", "inf"])
async def test_a_deadline_that_is_no_time_is_refused(given: str) -> None:
    async with world() as there, there.chat(headers={"x-sublet-timeout-s": given}) as response:
        assert (400, "bad_request") == await error_of(response)


async def test_unknown_routes_get_openais_form_too() -> None:
    async with world() as there:
        async with there.get("/v1/nothing") as response:
            assert (404, "unknown_route") == await error_of(response)
        async with there.get("/v1/chat/completions") as response:
            assert (405, "wrong_method") == await error_of(response)


# --- What others see --------------------------------------------------------------------------------------------------


async def test_models_show_their_state_in_our_words_and_llama_cpps() -> None:
    async with world() as there:
        async with there.get("/v1/models/m") as response:
            loaded = await response.json()
        await there.historian.append(fleet.resident(wake_s=2.0, endpoint=there.engine.url))
        await there.park()
        async with there.get("/v1/models") as response:
            sleeping = (await response.json())["data"][0]

    assert ("loaded", "resident", 0.0) == seen(loaded)
    assert ("sleeping", "parked", 2.0) == seen(sleeping)
    assert {"request_portion": 0.5} == loaded["sublet"]["share"]


def seen(model: dict[str, Any]) -> tuple[str, str, float]:
    return model["status"]["value"], model["sublet"]["state"], model["sublet"]["eta_s"]


async def test_load_is_told_when_a_model_turns_busy_and_idle() -> None:
    async with world() as there:
        await read(there.chat())
        await there.until(lambda: len(turns(there)) >= 2)

        assert [1, 0] == turns(there)[:2]


def turns(there: World) -> list[int]:
    """In-flight counts, without samples that say nothing new."""
    counts = [load.in_flight_count for sample in there.sampled for load in sample.models]
    first = counts.index(1) if 1 in counts else len(counts)
    return [count for index, count in enumerate(counts[first:], first) if index == first or count != counts[index - 1]]


async def test_a_gateway_that_has_read_history_and_is_heard_is_ready() -> None:
    async with world(sample_every_s=0.05) as there:
        await there.until(lambda: there.sampled)
        async with there.get("/readyz") as response:
            assert (200, {"ready": True, "problems": []}) == (response.status, await response.json())


async def test_a_fact_that_does_not_continue_its_writers_chain_is_skipped() -> None:
    async with world() as there:
        routes = there.gateway.runtime.core.routes
        forged = fleet.admitted("forged")
        await there.historian.append_raw("placement", json.dumps({}).encode())
        from schemas.catalogue import encode

        await there.historian.append_raw("placement", encode(forged), is_chained=False)
        await there.historian.append(fleet.admitted("true"))
        await there.until(lambda: "d-true" in routes.deployments)

        assert "d-forged" not in routes.deployments
        assert 2 == there.gateway.view.skipped_count


async def test_a_message_of_a_newer_version_stops_the_reading_and_not_the_traffic() -> None:
    async with world() as there:
        await there.historian.append_raw("node.n", b'{"type":"nodes.replica_parked.v9"}')
        await there.until(lambda: there.gateway.view.problem)
        async with there.chat() as response:
            status = response.status
        async with there.get("/readyz") as response:
            problem = (await response.json())["problems"][0]

    assert 200 == status
    assert "upgrade this service first" in problem["why"]


async def test_a_history_that_was_replaced_is_read_anew_and_meanwhile_the_old_view_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.gateway.view.GONE_RETRY_S", 0.05)
    async with world() as there:
        from kit.bus import Stream

        there.server.recreate(Stream.HISTORY)
        await there.until(lambda: there.gateway.view.problem)
        async with there.chat() as response:
            assert 200 == response.status
        await there.until(lambda: not there.gateway.view.problem)

        assert {} == there.gateway.runtime.core.routes.deployments


async def test_before_history_is_read_the_gateway_says_that_it_starts() -> None:
    async with world() as there:
        there.gateway.view.is_usable = False
        async with there.chat() as response:
            assert (503, "gateway_starting") == await error_of(response)
            assert "1" == response.headers["Retry-After"]


async def test_a_failed_engine_shows_in_the_models() -> None:
    async with world() as there:
        await there.holder.close("r")
        await there.historian.append(fleet.failed(is_final=True))
        await there.until(lambda: there.state() == ReplicaState.FAILED)
        async with there.get("/v1/models/m") as response:
            model = await response.json()
        async with there.chat() as response:
            status, code = await error_of(response)

    assert "it crashed" == model["sublet"]["problem"]
    assert (503, "engine_failed") == (status, code)


async def read(asked: Any) -> tuple[int, Any, str]:
    async with asked as response:
        return response.status, response.headers, await response.text()
