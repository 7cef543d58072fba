"""A client of the API as somebody else would write it: stubs generated from proto/ by grpcio-tools, mutual TLS.

usage: client.py STUBS HOST:PORT CERTS VERB [ARGUMENT]

    create NODE             reboots a node at once and prints the operation's name
    create-later NODE       the same in an hour
    watch OPERATION         prints a line for each change: the operation's state, then NODE=STATE of what changed
    cancel OPERATION        prints the operation's state
"""

import pathlib
import sys
import time

import grpc

stubs, address, certs, verb, *arguments = sys.argv[1:]
sys.path.insert(0, stubs)

from marco.bootstrap.v1 import operation_pb2, operation_pb2_grpc  # noqa: E402  (generated, found by the line above)

TIME_OUT = 120


def channel() -> grpc.Channel:
    folder = pathlib.Path(certs)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(folder / "ca.crt").read_bytes(),
        private_key=(folder / "admin.key").read_bytes(),
        certificate_chain=(folder / "admin.crt").read_bytes(),
    )
    return grpc.secure_channel(address, credentials)


def create(operations, node: str, schedule_time: int | None = None) -> str:
    operation = operation_pb2.Operation(nodes={"nodes": [f"nodes/{node}"]})
    operation.reboot.notice.FromSeconds(0)
    operation.reboot.message = "from Python"
    if schedule_time is not None:
        operation.schedule_time.FromSeconds(schedule_time)
    request = operation_pb2.CreateOperationRequest(operation=operation)
    return operations.CreateOperation(request, timeout=TIME_OUT).name


def watch(operations, name: str) -> None:
    request = operation_pb2.WatchOperationRequest(name=name)
    for change in operations.WatchOperation(request, timeout=TIME_OUT):
        state = operation_pb2.Operation.State.Name(change.operation.state)
        executions = [
            f"{execution.node}={operation_pb2.Execution.State.Name(execution.state)}"
            for execution in change.executions
        ]
        print(state, *executions, flush=True)


def main() -> None:
    with channel() as connection:
        operations = operation_pb2_grpc.OperationServiceStub(connection)
        match verb, arguments:
            case "create", [node]:
                print(create(operations, node))
            case "create-later", [node]:
                print(create(operations, node, int(time.time()) + 3600))
            case "watch", [name]:
                watch(operations, name)
            case "cancel", [name]:
                request = operation_pb2.CancelOperationRequest(name=name)
                operation = operations.CancelOperation(request, timeout=TIME_OUT)
                print(operation_pb2.Operation.State.Name(operation.state))
            case _:
                sys.exit(__doc__)


main()
