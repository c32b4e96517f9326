"""Messages and methods of the gRPC route, as `serve/embeddings.proto` says; made without generated code.

Generated code is bound to the protobuf release that made it, and Ray brings along its own. Clients in Python use
`stub`; those in other languages compile the `.proto`.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "gist_ray.v1.Embeddings"
SERVICER_FUNCTION = "gist_ray.serving.grpc_messages.add_servicer"
"""For `grpc_servicer_functions` of a Serve config's `grpc_options`."""

_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[tuple[str, int, bool, bool]]] = {
    # name, type, repeated, optional; numbered from 1 in this order
    "EmbedRequest": [
        ("texts", _Field.TYPE_STRING, True, False),
        ("model", _Field.TYPE_STRING, False, True),
        ("prompt_name", _Field.TYPE_STRING, False, True),
        ("truncate", _Field.TYPE_BOOL, False, True),
        ("dimensions", _Field.TYPE_UINT32, False, True),
    ],
    "EmbedResponse": [
        ("vectors", _Field.TYPE_BYTES, False, False),
        ("dim", _Field.TYPE_UINT32, False, False),
        ("num_tokens", _Field.TYPE_UINT32, False, False),
        ("model", _Field.TYPE_STRING, False, False),
    ],
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="gist_ray/embeddings.proto", package="gist_ray.v1", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, repeated, optional) in enumerate(fields, 1):
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if optional:  # proto3 tells "not given" from "empty" by a oneof of its own for each such field
                added.proto3_optional = True
                added.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field}")
    service = file.service.add(name="Embeddings")
    service.method.add(name="Embed", input_type=".gist_ray.v1.EmbedRequest", output_type=".gist_ray.v1.EmbedResponse")
    return file


FILE = _file()
# Among protobuf's own, as generated code would: so that server reflection (grpcurl) finds the service.
_pool = descriptor_pool.Default()
_pool.AddSerializedFile(FILE.SerializeToString())
EmbedRequest: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("gist_ray.v1.EmbedRequest"))
EmbedResponse: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("gist_ray.v1.EmbedResponse"))


def add_servicer(servicer: Any, server: Any) -> None:
    """Register the methods with a server. Serve calls it, with a servicer of its own."""
    embed = grpc.unary_unary_rpc_method_handler(
        servicer.Embed,
        request_deserializer=EmbedRequest.FromString,
        response_serializer=EmbedResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Embed": embed}),))


def stub(channel: Any) -> Any:
    """A callable for a `grpc` or `grpc.aio` channel: `stub(channel)(EmbedRequest(texts=["a"]), metadata=[...])`.

    Serve's gRPC proxy needs the name of the application in the metadata: `("application", "gist-ray")`.
    """
    return channel.unary_unary(
        f"/{SERVICE}/Embed",
        request_serializer=EmbedRequest.SerializeToString,
        response_deserializer=EmbedResponse.FromString,
    )
