"""Bytes on a handler's stream that are no call: an answer or the stream's end, soon, and everybody else goes on."""

import struct

import pytest
import torch
from google.protobuf.internal.decoder import _DecodeVarint as read_varint
from google.protobuf.internal.encoder import _VarintBytes as varint
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.proto import p2pd_pb2

from calls import experts, raw, request, unary

UNARY, STREAM = "ConnectionHandler.rpc_forward", "ConnectionHandler.rpc_forward_stream"
pytestmark = pytest.mark.beyond_hivemind(why="it leaves most of these without an answer")


@pytest.fixture(scope="module")
def expert(dht, frozen):
    return experts(dht, "frozen.0")[0]


@pytest.fixture(autouse=True)
def everybody_else_goes_on(expert):
    yield
    assert expert(torch.randn(2, 512)).shape == (2, 512)


def call(uid="frozen.0"):
    return request(uid, torch.randn(2, 512)).SerializeToString()


def unary_frame(call_id=b"0123456789abcdef", **message):
    message = message or {"callUnary": p2pd_pb2.CallUnaryRequest(peer=b"", proto=UNARY, data=call())}
    body = p2pd_pb2.PersistentConnectionRequest(callId=call_id, **message).SerializeToString()
    return varint(len(body)) + body


def stream_frame(payload, marker=0, length=None):
    return struct.pack(">BQ", marker, len(payload) if length is None else length) + payload


END = stream_frame(b"", marker=1)


def unary_error(answer):
    length, start = read_varint(answer, 0)
    assert len(answer) == start + length
    return p2pd_pb2.PersistentConnectionRequest.FromString(answer[start:]).unaryResponse.error.decode()


def stream_error(answer):
    marker, length = struct.unpack(">BQ", answer[:9])
    assert marker == 1 and len(answer) == 9 + length
    return p2pd_pb2.RPCError.FromString(answer[9:]).message


def test_an_unknown_proto_field_gets_an_answer(dht, frozen):
    strange = p2pd_pb2.CallUnaryRequest(peer=b"", proto="ConnectionHandler.rpc_sideways", data=call())
    assert "rpc_sideways" in unary_error(raw(dht, frozen.peer_id, UNARY, unary_frame(callUnary=strange)))


def test_an_unknown_handler_is_refused(dht, frozen):
    with pytest.raises((P2PHandlerError, P2PDaemonError)):
        unary(dht, frozen.peer_id, "ConnectionHandler.rpc_sideways", call())


def test_an_answer_is_no_request(dht, frozen):
    answer = unary_frame(unaryResponse=p2pd_pb2.CallUnaryResponse(response=b"mine"))
    assert "answer" in unary_error(raw(dht, frozen.peer_id, UNARY, answer))


def test_a_stream_for_two_experts_is_refused_by_name(dht, frozen):
    both = stream_frame(call("frozen.0")) + stream_frame(call("frozen.1")) + END
    assert "frozen.1" in stream_error(raw(dht, frozen.peer_id, STREAM, both))


def test_a_stream_of_no_protobuf_is_refused(dht, frozen):
    assert stream_error(raw(dht, frozen.peer_id, STREAM, stream_frame(b"\xff" * 50) + END))


HOPELESS = {
    "a short call id": (UNARY, unary_frame(call_id=b"short")),
    "no protobuf": (UNARY, varint(50) + b"\xff" * 50),
    "a frame over the limit": (UNARY, varint(5 << 20) + bytes(100)),
    "a length without end": (UNARY, b"\xff" * 100),
    "an unknown marker": (STREAM, stream_frame(call(), marker=7)),
    "a streamed frame over the limit": (STREAM, stream_frame(bytes(100), length=5 << 20)),
    "a streamed frame without end": (STREAM, stream_frame(bytes(100), length=2**64 - 1)),
}


@pytest.mark.parametrize(("handler", "data"), HOPELESS.values(), ids=HOPELESS.keys())
def test_what_cannot_be_answered_ends_the_stream(dht, frozen, handler, data):
    assert raw(dht, frozen.peer_id, handler, data) == b""


@pytest.mark.parametrize(("handler", "data"), [(UNARY, unary_frame()), (STREAM, stream_frame(call()))])
def test_callers_who_leave_inside_a_frame_cost_nothing(dht, frozen, handler, data):
    for length in range(1, len(data), len(data) // 50):
        raw(dht, frozen.peer_id, handler, data[:length], wait=False)
