"""containerd's task service itself, for what `ctr` does not ask for and for the codes of its answers.

The few messages that are sent are put together here, by their fields' numbers in containerd's
`api/services/tasks/v1/tasks.proto`.
"""

import dataclasses
import json

import grpc

SOCKET = "/run/containerd/containerd.sock"


@dataclasses.dataclass
class Answer:
    """How a call ended."""

    method: str
    code: str
    message: str

    def __str__(self):
        return f"{self.method}: {self.code} {self.message}"


def varint(number):
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out + bytes([number]))


def message(fields):
    """A protobuf message of {field's number: number, string, bytes, or a list of them}."""
    out = b""
    for number, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int):
                out += varint(number << 3) + varint(value)
            else:
                data = value.encode() if isinstance(value, str) else value
                out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def fields(data):
    """The fields of a protobuf message that has numbers and bytes only: {number: last value}."""
    def take():
        nonlocal at
        number = shift = 0
        while True:
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    at, found = 0, {}
    while at < len(data):
        key = take()
        value = take()
        if key & 7 == 2:
            value, at = data[at:at + value], at + value
        found[key >> 3] = value
    return found


def any_of(kind, value):
    """google.protobuf.Any with one of OCI's types, which are JSON."""
    return message({1: f"types.containerd.io/opencontainers/runtime-spec/1/{kind}", 2: json.dumps(value)})


def mount(kind, source, *options):
    """containerd.types.Mount"""
    return message({1: kind, 2: source, 4: list(options)})


def call(method, container, values=None):
    """Calls the task service; `values` are the fields after the first, which always is the container's id."""
    # A channel for each call: the daemon may be another by now.
    with grpc.insecure_channel(f"unix:{SOCKET}") as channel:
        ask = channel.unary_unary(f"/containerd.services.tasks.v1.Tasks/{method}")
        try:
            ask(message({1: container, **(values or {})}), timeout=150, metadata=[("containerd-namespace", "default")])
        except grpc.RpcError as error:
            return Answer(method, error.code().name, error.details())
    return Answer(method, "OK", "")


def create(container, rootfs):
    """Creates a task whose streams are /dev/null, on these mounts."""
    return call("Create", container, {3: rootfs})


def execute(container, exec_id, *args, cwd="/"):
    """Adds a process whose streams are /dev/null."""
    process = {"args": list(args), "cwd": cwd, "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]}
    return call("Exec", container, {6: any_of("Process", process), 7: exec_id})


def update(container, resources):
    """Sets limits: OCI's LinuxResources."""
    return call("Update", container, {2: any_of("LinuxResources", resources)})
